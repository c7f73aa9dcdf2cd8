#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What clients of a real `vllm serve` see at rising request rates, for any attention backend.

    python3 benchmarks/serving.py FLASH_ATTN SAGE SAGE:k_bits=4 --rates 2 4 6 --out benchmarks/results/serving-NAME.json
    P=variator.plugins=random
    python3 benchmarks/serving.py SAGE SAGE:$P,variator.ratio=2 SAGE:$P,variator.waiting=4 --rates 3 4 5 6 --goal-ms 2000

A run is named as for `sage eval`; its compression plugins can also be `random`. Each gets a server with random weights of the
given shape, and the embedded model's tokenizer. `vllm bench serve` sends it random prompts of --shortest to --longest tokens,
with short answers, for --seconds at each rate: an open loop with Poisson arrivals, the same for all runs. A request counts as
good if its first token came within --goal-ms; goodput is how many of these come a second.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common.plugins import fill_in
from common.report import save
from common.server import serving
from common.shapes import SHAPES

FIGURES = ("request_throughput", "request_goodput", "completed", "failed", "total_input_tokens", "output_throughput")
FIGURES += ("median_ttft_ms", "p95_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms")
"""What is kept of the client's report."""
WARM_UP, LEAST_REQUESTS = 8, 8  # requests before the first rate, and at each


def bench(base: str, folder: Path, rate: float, requests: int, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The client's figures for a number of requests at a rate."""
    middle = (arguments.shortest + arguments.longest) // 2
    report = folder / "client.json"
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--base-url", base, "--model", "m"]
    command += ["--tokenizer", str(folder), "--dataset-name", "random", "--random-input-len", str(middle)]
    spread = json.dumps({"input": 1 - arguments.shortest / middle, "output": 0.0})
    command += ["--random-range-ratio", spread, "--random-output-len", str(arguments.answer)]
    command += ["--request-rate", str(rate), "--num-prompts", str(requests), "--seed", str(seed), "--ignore-eos"]
    command += ["--goodput", f"ttft:{arguments.goal_ms}", "--percentile-metrics", "ttft,tpot", "--metric-percentiles", "95,99"]
    command += ["--save-result", "--result-filename", str(report), "--disable-tqdm", "--temperature", "0"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=arguments.limit)
    if done.returncode:
        raise RuntimeError(f"the client ended with exit code {done.returncode}\n{done.stdout[-3000:]}")
    told = json.loads(report.read_text())
    return {"rate": rate, **{name: told[name] for name in FIGURES}}


def measure(name: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The figures of a run: seconds until its server is ready, and the client's at each rate."""
    from sage_backend.tools.engines import Run

    run = Run.parse(name)
    fill_in(run, str(folder))
    # The client's random prompts count through the vocabulary, so that some begin like others.
    served = ["--max-model-len", str(arguments.longest + arguments.answer + 256), "--no-enable-prefix-caching"]
    for option, value in run.arguments.items():
        served += [f"--{option.replace('_', '-')}", json.dumps(value) if isinstance(value, dict) else str(value)]
    with serving(folder, [*served, *arguments.serve_arguments], arguments.limit) as server:
        figures: dict[str, Any] = {"run": name, "seconds_to_ready": round(server.seconds, 1), "rates": []}
        print(f"{name}: ready after {server.seconds:.0f} s", flush=True)
        bench(server.base, folder, 1, WARM_UP, 0, arguments)
        for seed, rate in enumerate(arguments.rates, start=1):
            requests = max(LEAST_REQUESTS, round(rate * arguments.seconds))
            figures["rates"].append(found := bench(server.base, folder, rate, requests, seed, arguments))
            times = ", ".join(f"{kind} {found[f'{kind}_ttft_ms']:,.0f}" for kind in ("median", "p95", "p99"))
            print(f"  {rate} requests/s: {found['request_goodput']:.2f} good; ms to the first token: {times}", flush=True)
    return figures


def main() -> int:
    """The command. Returns its exit status."""
    from sage_backend.demo import MODEL_DIR
    from sage_backend.tools.engines import circumstances

    parser = argparse.ArgumentParser(description="Measure what clients of a server see at rising request rates.")
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="instead of the shape's own number")
    parser.add_argument("--rates", type=float, nargs="+", required=True, help="requests a second")
    parser.add_argument("--seconds", type=float, default=30, help="at each rate (default: %(default)s)")
    parser.add_argument("--shortest", type=int, default=2048, help="tokens of the shortest prompt (default: %(default)s)")
    parser.add_argument("--longest", type=int, default=16384, help="tokens of the longest prompt (default: %(default)s)")
    parser.add_argument("--answer", type=int, default=16, help="tokens of each answer (default: %(default)s)")
    parser.add_argument("--goal-ms", type=int, default=2000, help="to the first token (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=300, help="seconds to wait for a server or a client")
    parser.add_argument("--serve", dest="serve_arguments", nargs=argparse.REMAINDER, default=[], help="its arguments")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    shape = dict(SHAPES[arguments.shape])
    if arguments.layers:
        shape["num_hidden_layers"] = arguments.layers
    command = shlex.join(["benchmarks/serving.py", *sys.argv[1:]])
    kept = ("shortest", "longest", "answer", "seconds", "goal_ms")
    report = {**circumstances(command, arguments.shape), **{name: getattr(arguments, name) for name in kept}, "runs": []}
    for name in arguments.runs:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(shape))
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(MODEL_DIR / file, folder)
            try:
                report["runs"].append(measure(name, arguments, Path(folder)))
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                print(f"{name}: {error}", flush=True)
                report["runs"].append({"run": name, "error": str(error).splitlines()[0]})
        if arguments.out:  # after each run: the next one may be interrupted
            save(report, arguments.out)
    return int(any("error" in run for run in report["runs"]))


if __name__ == "__main__":
    sys.exit(main())
