#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Measure everything that needs a GPU, step by step: benchmarks/gpu.sh NAME [STEP...]
#
#   NAME   goes into the names of the results, benchmarks/results/*-NAME.json; for example h200
#   STEP   one of those below; all of them if none is given
#   SAGE_PYTHON=EXE   the Python that has vLLM and this backend (default: .venv/bin/python)
#
# A command that fails or takes longer than its limit is reported, and the next one runs. The exit status is the number of such
# commands. With two GPUs, servers also run on both.
# shellcheck disable=SC2329  # steps are called by their names
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

[ $# -ge 1 ] || { sed -n '3,10s/^# \{0,1\}//p' "$0"; exit 64; }
name=$1
shift
python=${SAGE_PYTHON:-.venv/bin/python}
results=benchmarks/results
logs=$(mktemp -d)
failed=0
export VLLM_LOGGING_LEVEL=${VLLM_LOGGING_LEVEL:-ERROR}

# run LIMIT COMMAND...: a command of at most LIMIT seconds
run() {
    local limit=$1 begun=$SECONDS status=0 log=$logs/$step.log
    shift
    timeout --kill-after=10 "$limit" "$@" >>"$log" 2>&1 || status=$?
    if [ "$status" -eq 0 ]; then
        echo "[$step] ok, $((SECONDS - begun)) s"
    else
        failed=$((failed + 1))
        echo "[$step] exit status $status after $((SECONDS - begun)) s: $*"
        tail -n 5 "$log"
    fi
}
benchmark() { run "$1" "$python" "benchmarks/$2.py" "${@:3}"; }
engines() { benchmark "$1" engine "${@:3}" --out "$results/$2-$name.json"; }
evaluate() { run "$1" "$python" -m sage_backend.tools.cli eval FLASH_ATTN "${@:3}" --out "$results/$2-$name.json"; }
peers=(TRITON_ATTN FLASH_ATTN/fp8 TRITON_ATTN/{int8,fp8,int4}_per_token_head)
calibrate() { run 120 "$python" -m sage_backend.tools.cli calibrate "$1" --out "$2" --text "$("$python" -c 'import argparse; print(argparse.__file__)')" "${@:3}"; }
serve() { benchmark 240 mixed_traffic --longest 16384 --out "$results/$1-$name.json" -- --attention-backend sage --max-num-seqs 64 "${@:2}"; }

step_tests() {
    run 300 "$python" -m pytest -q tests/kernels --ignore=tests/kernels/test_compile.py
    run 300 "$python" -m pytest -q -m gpu tests/observability/test_canary.py tests/engine/test_{memory,reports}.py
}
step_sanitizer() { benchmark 600 sanitizer run --out "$results/sanitizer-$name.json"; }
step_doctor() { run 120 "$python" -m sage_backend.tools.cli doctor; }
step_attention() {
    benchmark 300 attention run --prefill 1024 4096 8192 16384 32768 131072 64x256 16x1024 4x4096 --chunk 2048x129024 --store 8192 \
        --decode 128x1024 64x8192 8x131072 1x131072 1x1000000 131072+63x1024 --seconds 2 --out "$results/attention-$name.json"
    local shape d heads kv_heads
    for shape in "64 32 8" "256 32 8" "128 32 32"; do  # channels, query heads, KV heads
        read -r d heads kv_heads <<<"$shape"
        benchmark 60 attention run --prefill 16384 --decode 64x8192 --contenders sage-int{8,4,4-v4} fa3-{bf16,fp8} --seconds 1 \
            --head-dim "$d" --heads "$heads" --kv-heads "$kv_heads" --out "$results/attention-d$d-${heads}x$kv_heads-$name.json"
    done
}
step_stand_in() {
    local capability
    [ "$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1)" = 9.0 ] || { echo "[$step] needs a Hopper GPU"; return; }
    for capability in 8.0 8.6 8.9; do
        benchmark 150 attention run --prefill 4096 32768 --chunk 2048x30720 --decode 128x1024 64x8192 --seconds 1 \
            --as-if "$capability" --contenders sage-int{8,4,4-v4} fa2-bf16 triton-bf16 \
            --out "$results/attention-as-if-$capability-$name.json"
    done
}
step_recall() { benchmark 60 recall --lengths 65536 262144 1000000 --out "$results/recall-$name.json"; }
step_engine() {
    engines 900 engine SAGE SAGE:k_bits=4 FLASH_ATTN FLASH_ATTN/fp8 --prefill 8192 32768 131072 \
        --decode 128x1024 32x8192 --repeat 2 --warm-up 8192
    engines 120 engine-triton-int8 TRITON_ATTN/int8_per_token_head --graphs --prefill 32768 --repeat 1 --warm-up 8192
}
step_variator() {
    local plugins=variator.plugins=random
    engines 400 variator SAGE "SAGE:$plugins,variator.ratio=2" "SAGE:$plugins,variator.ratio=4" --graphs --prefill 8192 \
        --decode 16x8192 --repeat 5
}
step_serving() {
    local plugins=variator.plugins=random serve=(--serve --max-num-seqs 64)
    serve+=(--compilation-config '{"mode":0,"cudagraph_mode":"FULL_DECODE_ONLY"}' --kv-cache-memory-bytes)
    benchmark 1500 serving run FLASH_ATTN FLASH_ATTN/fp8 SAGE SAGE:k_bits=4,v_bits=4 --rates 1 2 4 8 --seconds 20 \
        --shortest 1024 --longest 7168 --answer 256 --out "$results/serving-24gb-$name.json" "${serve[@]}" $((5 << 30))
    benchmark 1500 serving run SAGE "SAGE:$plugins,variator.ratio=2" "SAGE:$plugins,variator.waiting=4" \
        --rates 3 3.5 4 5 6 7 --out "$results/serving-goodput-$name.json" "${serve[@]}" $((32 << 30))
}
step_memory() {
    engines 300 engine-memory-prefill SAGE:memory.topk_pages=32 FLASH_ATTN --eager --repeat 1 --warm-up 32768 \
        --prefill 131072 524288
    engines 400 engine-memory-decode SAGE:memory.topk_pages=32 SAGE --layers 24 --prefill --decode 1x65536 1x1000000 \
        --repeat 2 --skip-prefill-attention
    local long=(--graphs --repeat 1 --prefill 1000000 --decode 1x1000000 4x250000)  # 70 GiB of a GPU, 80 GiB of its host
    engines 300 host-pages-device SAGE:memory.local_tokens=4096 --kv-gib 70 "${long[@]}"
    engines 300 host-pages SAGE:memory.local_tokens=4096,memory.host_gib=72 --kv-gib 8 "${long[@]}"
    benchmark 480 host_pages --seconds 300 --host-gib 0.0625 --kv-gib 0.04 --graphs --tie 0.375 \
        --out "$results/host-pages-clients-$name.json"
}
step_needle() {
    local remembering=SAGE:memory.local_tokens=1024,memory.topk_pages=64,memory.extrapolate=2048
    run 300 "$python" -m sage_backend.tools.cli needle SAGE "$remembering" --lengths 2048,4096,8192,16384,65536,262144 \
        --out "$results/needle-$name.json"
    run 300 "$python" -m sage_backend.tools.cli needle "$remembering" --lengths 256000,1000000 --out "$results/needle-1m-$name.json"
}
step_quality() {
    local model=sage_backend/demo/model
    calibrate "$model" anchors.tmp
    calibrate "$model" mixed.tmp --k-bits auto --budget 0.05
    evaluate 400 quality SAGE SAGE:smooth_q=true SAGE:k_bits=4 "${peers[@]}"
    evaluate 300 quality-calibrated SAGE:calibration={anchors,mixed}.tmp SAGE:k_bits=4,calibration=anchors.tmp
}
step_heldout() {  # the same for a model that is not in the repository
    run 300 "$python" -m sage_backend.demo.train --large --seed 1 --seconds 60 --out heldout.tmp
    calibrate heldout.tmp heldout-anchors.tmp
    calibrate heldout.tmp heldout-mixed.tmp --k-bits auto --budget 0.05
    evaluate 700 quality-heldout SAGE SAGE:k_bits=4 SAGE:calibration=heldout-{anchors,mixed}.tmp \
        SAGE:k_bits=4,calibration=heldout-anchors.tmp "${peers[@]}" --model heldout.tmp --text heldout.tmp/heldout.txt
}
step_servers() {
    serve mixed
    if [ "$(nvidia-smi -L | wc -l)" -gt 1 ]; then
        serve mixed-tensor-parallel --tensor-parallel-size 2
        serve mixed-replicas --data-parallel-size 2
    fi
}

step_disaggregation() {  # two servers, on two GPUs or on one; needs NIXL
    "$python" -c "import nixl" 2>/dev/null || { echo "[$step] needs NIXL: pip install nixl"; return; }
    benchmark 300 disaggregation SAGE SAGE:k_bits=4,v_bits=4 FLASH_ATTN --out "$results/disaggregation-$name.json" \
        -- --enforce-eager --max-model-len 2048 --kv-cache-memory-bytes $((256 << 20))
}

step_ray() {  # two replicas, on two GPUs or on one, and with two GPUs also tensor parallelism
    "$python" -c "import ray" 2>/dev/null || { echo "[$step] needs Ray: pip install -r requirements/ray.txt"; return; }
    run 900 "$python" -m pytest -s -v tests/deploy/test_ray.py
}

steps=(doctor tests sanitizer attention stand_in recall engine variator serving memory needle quality heldout servers disaggregation ray)
[ $# -gt 0 ] || set -- "${steps[@]}"
for step; do
    [[ " ${steps[*]} " == *" $step "* ]] || { echo "there is no step $step; there are: ${steps[*]}"; exit 64; }
done
# vLLM's CPU build would start the same steps and call their results by the name of a GPU.
nvidia-smi -L >/dev/null 2>&1 || { echo "benchmarks/gpu.sh: needs an NVIDIA GPU, and nvidia-smi lists none here" >&2; exit 69; }
for step; do "step_$step"; done
echo "logs: $logs"
exit "$failed"
