#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Send mixed traffic to a real `vllm serve` with random weights, and check that every request is answered.

    python3 benchmarks/mixed_traffic.py --longest 32768 --out benchmarks/results/mixed-NAME.json -- --attention-backend sage

It starts the server with the arguments after `--`, and sends all prompts at once. They have from 1 to --longest tokens. Half of
the answers are streamed, and some clients hang up. Afterwards, no request may be running, no KV block in use, and no error in
the server's log.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
from common.report import command_line, save
from common.server import Server, compiled_late, metric_sums, serving
from common.shapes import SHAPES

from sage_backend.tools.engines import circumstances


async def send(session: aiohttp.ClientSession, base: str, rng: random.Random, longest: int, index: int) -> str:
    """Send one request. Returns its outcome: "complete", "hung up", or what went wrong."""
    length = [1, 7, 127, 128, 129, 1000, longest // 4, longest][index % 8]
    tokens = rng.choice([1, 16, 64])
    hang_up, stream = index % 12 == 5, index % 2 == 1
    body: dict[str, Any] = {
        "model": "m",
        "prompt": [rng.randrange(1000) for _ in range(length)],
        "max_tokens": 64 if hang_up else tokens,
        "ignore_eos": True,
        "stream": stream,
        "return_token_ids": True,
    }
    async with session.post(f"{base}/v1/completions", json=body) as response:
        if response.status != 200:
            return f"status {response.status}: {(await response.text())[:200]}"
        if not stream:
            usage = (await response.json())["usage"]
            expected = {"prompt_tokens": length, "completion_tokens": body["max_tokens"]}
            return "complete" if all(usage[k] == v for k, v in expected.items()) else f"usage {usage}, not {expected}"
        received = 0
        async for line in response.content:
            if line.startswith(b"data: {"):
                received += len(json.loads(line[6:])["choices"][0].get("token_ids") or [])
                if hang_up and received >= 2:
                    return "hung up"
        return "complete" if received == body["max_tokens"] else f"{received} tokens, not {body['max_tokens']}"


async def metrics(session: aiohttp.ClientSession, base: str) -> dict[str, float]:
    """The server's metrics, each summed over its labels."""
    async with session.get(f"{base}/metrics") as response:
        return metric_sums(await response.text())


async def drive(arguments: argparse.Namespace, server: Server) -> dict[str, Any]:
    rng = random.Random(0)
    timeout = aiohttp.ClientTimeout(total=arguments.limit)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        print(f"ready after {server.seconds:.0f} s", flush=True)
        start = time.monotonic()
        outcomes = await asyncio.gather(
            *(send(session, server.base, rng, arguments.longest, i) for i in range(arguments.requests)), return_exceptions=True
        )
        seconds = time.monotonic() - start
        running = kv_use = 1.0
        for _ in range(100):
            told = await metrics(session, server.base)
            running, kv_use = told["vllm:num_requests_running"], told["vllm:kv_cache_usage_perc"]
            if running == kv_use == 0:
                break
            await asyncio.sleep(0.1)
        counts: dict[str, int] = {}
        for outcome in map(str, outcomes):
            counts[outcome] = counts.get(outcome, 0) + 1
        return {
            "seconds_to_ready": round(server.seconds, 1),
            "seconds": round(seconds, 1),
            "outcomes": counts,
            "requests_running_after": running,
            "kv_cache_usage_after": kv_use,
            "generated_tokens": told["vllm:generation_tokens_total"],
            "metrics": {  # counters only: a sum of gauges over replicas means nothing
                name: value for name, value in sorted(told.items()) if name.startswith("sage_") and name.endswith("_total")
            },
        }


def main() -> None:
    parser = argparse.ArgumentParser(description="Send mixed traffic to a `vllm serve` with random weights.")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="instead of the shape's own number")
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--longest", type=int, default=32768, help="tokens of the longest prompt")
    parser.add_argument("--limit", type=float, default=300, help="seconds to wait for the server, and for the answers")
    parser.add_argument("--out", type=Path)
    parser.add_argument("serve_arguments", nargs="*", metavar="ARGUMENT", help="for `vllm serve`, after --")
    arguments = parser.parse_args()
    shape = dict(SHAPES[arguments.shape])
    if arguments.layers:
        shape["num_hidden_layers"] = arguments.layers
    served = ["--skip-tokenizer-init", "--max-model-len", str(arguments.longest + 1024), "--jit-monitor-verbose"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(shape))
        with serving(Path(folder), [*served, *arguments.serve_arguments], arguments.limit) as server:
            try:
                report = asyncio.run(drive(arguments, server))
            finally:
                output = server.log.read_text()  # before the processes are ended: they log errors then
                if sys.exc_info()[0]:
                    print(output[-3000:])
    errors = [line for line in output.splitlines() if " ERROR " in line]
    report["errors_in_the_log"] = errors[:5]
    report["kernels_compiled_while_serving"] = compiled_late(output)
    report |= circumstances(command_line("benchmarks/mixed_traffic.py"), arguments.shape)
    print(json.dumps(report, indent=2))
    if arguments.out:
        save(report, arguments.out)
    expected = {"complete", "hung up"}
    if not set(report["outcomes"]) <= expected or errors or report["kv_cache_usage_after"] or report["requests_running_after"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
