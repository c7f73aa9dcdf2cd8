#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Serve a model with quantized KV pages and ask it something: examples/serve.sh [MODEL] [OPTIONS of vllm serve...]
#
#   PORT=8000        where to listen, on 127.0.0.1
#   EXAMPLE_ONCE=1   end after one answered request; otherwise, serve until Ctrl-C
#
# Without MODEL, it takes the small model that the package embeds. `vllm` and `python` must be in PATH.
set -euo pipefail

port=${PORT:-8000}
model=${1:-$(python -c 'from sage_backend.demo import MODEL_DIR; print(MODEL_DIR)')}
options=(--attention-backend sage --served-model-name demo --host 127.0.0.1 --port "$port" --max-model-len 2048)
if ! python -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; then
    export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1} # GiB
    options+=(--enforce-eager)                                 # a quick start
fi

vllm serve "$model" "${options[@]}" "${@:2}" &
server=$!
trap 'kill "$server" 2>/dev/null; wait "$server" || true' EXIT

until curl --silent --fail --output /dev/null "http://127.0.0.1:$port/health"; do
    kill -0 "$server" || exit 1 # the server has ended and printed why
    sleep 1
done
curl --silent --fail "http://127.0.0.1:$port/v1/completions" -H 'Content-Type: application/json' \
    -d '{"model": "demo", "prompt": "def fibonacci(n):", "max_tokens": 32}'
echo
if [ -z "${EXAMPLE_ONCE:-}" ]; then wait "$server"; fi
