#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Serve a model with the sage backend and stay in the foreground until Ctrl-C.
#
#   MODEL=PATH-OR-NAME   what to serve (default: the small model that the package embeds)
#   PORT=8000            where to listen, on 127.0.0.1
#   ARGS="--more args"   for `vllm serve`, after those below
#   SAGE_VENV=DIR        the environment that deploy/setup.sh made (default: .venv)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

HOST=127.0.0.1
port=${PORT:-8000}
venv=${SAGE_VENV:-.venv}
python=$venv/bin/python
log=$venv/sage-serve-$port.log

source deploy/messages.sh

[ -x "$venv/bin/vllm" ] || die "no vLLM in $venv: run deploy/setup.sh first"
case "$port" in
    '' | *[!0-9]*) die "PORT is '$port', not a number" ;;
esac
# The server would notice too, but only after a minute of loading.
bindable='import socket, sys; s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind((sys.argv[1], int(sys.argv[2])))'
"$python" -c "$bindable" "$HOST" "$port" 2>/dev/null || die "cannot listen on $HOST:$port: is it taken? Try PORT=$((port + 1))"

options=(--host "$HOST" --port "$port" --attention-backend sage)
model=${MODEL:-}
name=$model
if [ -z "$model" ]; then
    model=$("$python" -c 'from sage_backend.demo import MODEL_DIR; print(MODEL_DIR)') || die "the embedded model is missing"
    name=sage-demo
    options+=(--served-model-name "$name")
fi
case "$model" in
    /* | ./* | ../*) [ -e "$model" ] || die "$model does not exist" ;;
esac
# "GPU", "CPU", or "slow CPU": one without instructions for 16 bits, on which a product in BF16 takes 25 times as long.
classify='import torch
fast = torch.version.cuda or torch.ops.mkldnn._is_mkldnn_bf16_supported()
print("GPU" if torch.version.cuda else "CPU" if fast else "slow CPU")'
kind=$("$python" -c "$classify") || die "torch does not work in $venv: run deploy/setup.sh again"
if [ "$kind" != GPU ]; then
    # For a quick start: 1 GiB of KV cache instead of a share of the memory, and no compilation.
    export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}"
    options+=(--enforce-eager)
    # The embedded model's worker needs no process of its own, in which vLLM would be imported a third time. For larger
    # models vLLM starts one, with its threads bound to cores.
    if [ -z "${MODEL:-}" ]; then
        options+=(--distributed-executor-backend vllm.v1.executor.uniproc_executor.UniProcExecutor)
        if [ "$kind" = "slow CPU" ]; then options+=(--dtype float32); fi
    fi
fi
read -r -a extra <<<"${ARGS:-}"

server=
follower=
# shellcheck disable=SC2329  # the traps call it
stop() {
    trap - EXIT INT TERM HUP
    if [ -n "$follower" ]; then kill "$follower" 2>/dev/null || true; fi
    if [ -n "$server" ] && kill -TERM "$server" 2>/dev/null; then
        say "stopping the server"
        # The process group is gone when all of the engine's processes are. After 10 s, the rest is killed.
        for _ in {1..100}; do
            kill -0 -- "-$server" 2>/dev/null || return 0
            sleep 0.1
        done
        kill -KILL -- "-$server" 2>/dev/null || true
    fi
}
trap stop EXIT
trap 'stop; exit 0' INT
trap 'stop; exit 143' TERM HUP

say "starting vllm serve $model on http://$HOST:$port (log: $log)"
# With job control, the server has a process group of its own. Ctrl-C then reaches this script only,
# and `stop` stops the server once and in order.
set -m
"$venv/bin/vllm" serve "$model" "${options[@]}" ${extra[@]+"${extra[@]}"} >"$log" 2>&1 </dev/null &
server=$!
set +m

# http.client, unlike curl, is always there and ignores proxies.
healthy='import http.client, sys; c = http.client.HTTPConnection(sys.argv[1], int(sys.argv[2]), timeout=2)
c.request("GET", "/health"); sys.exit(c.getresponse().status != 200)'
# vLLM's latest message, without the process, level, date and source line before it. An indented line continues another
# message.
last_line() {
    { echo ' INFO [] loading vLLM' && cat "$log"; } |
        sed -nE 's/^.* INFO [^[]*\[[^]]*\] ([^[:space:]].*)$/\1/p' | tail -n 1 | cut -c 1-90
}
# The first error is the cause; later ones only show where it was passed on. Pydantic's errors have two more lines.
errors() {
    awk '/(^|[ .])[A-Za-z]*[Ee]rror: / { more = / validation errors? for / ? 3 : 1 }
         more-- > 0 && !seen[$0]++ && told++ < 3 { sub(/ \[type=.*/, ""); print; any = 1 }
         END { exit !any }' "$log" || tail -n 3 "$log"
}
began=$SECONDS
told=0
until "$python" -S -c "$healthy" "$HOST" "$port" 2>/dev/null; do
    if ! kill -0 "$server" 2>/dev/null; then
        server=
        if [ -t 1 ]; then printf '\r\033[K'; fi
        errors >&2
        die "the server ended before it was ready (all of its output: $log)"
    fi
    elapsed=$((SECONDS - began))
    if [ -t 1 ]; then
        printf '\r\033[K[sage] %3d s  %s' "$elapsed" "$(last_line)"
    elif ((elapsed - told >= 5)); then
        told=$elapsed
        say "$elapsed s  $(last_line)"
    fi
    sleep 1
done
if [ -t 1 ]; then printf '\r\033[K'; fi

say "ready after $((SECONDS - began)) s; Ctrl-C stops it. Try:"
key=
# The user's shell inserts the key, so that it is not printed here.
# shellcheck disable=SC2016
if [ -n "${VLLM_API_KEY:-}" ]; then key=' -H "Authorization: Bearer $VLLM_API_KEY"'; fi
cat <<EOF

  curl http://$HOST:$port/v1/completions$key -H 'Content-Type: application/json' \\
    -d '{"model": "$name", "prompt": "def fibonacci(n):", "max_tokens": 32}'

EOF
tail -n 0 -f "$log" &
follower=$!
status=0
wait "$server" || status=$?
server=
die "the server ended by itself with status $status (all of its output: $log)"
