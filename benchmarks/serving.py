#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What clients of a real `vllm serve` see at rising request rates, for any attention backend.

    python3 benchmarks/serving.py run FLASH_ATTN SAGE SAGE:k_bits=4 --rates 2 4 6 --out benchmarks/results/serving-NAME.json
    P=variator.plugins=random
    python3 benchmarks/serving.py run SAGE SAGE:$P,variator.ratio=2 SAGE:$P,variator.waiting=4 --rates 3 4 5 6 --goal-ms 2000
    python3 benchmarks/serving.py plot benchmarks/results/serving-NAME.json --out serving-NAME.png

A run is named as for `sage eval`; its compression plugins can also be `random`. Each gets a server with random weights of the
given shape, and the embedded model's tokenizer. `vllm bench serve` sends it random prompts of --shortest to --longest tokens,
with short answers, for --seconds at each rate: an open loop with Poisson arrivals, the same for all runs. With --shared, all
prompts begin with the same tokens, and the servers have a prefix cache. A request counts as good if its first token came within
--goal-ms; goodput is how many of these come a second. `plot` draws the runs of one file or of several with the same load; it
needs matplotlib alone.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.report import command_line, save
from common.server import compiled_late, counters, serving
from common.shapes import SHAPES

FIGURES = ("request_throughput", "request_goodput", "completed", "failed", "total_input_tokens", "output_throughput")
FIGURES += ("median_ttft_ms", "p95_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms")
"""What is kept of the client's report."""
EMBEDDED = "embedded"
"""The shape of the embedded model, for CPUs."""
LOAD = ("shortest", "longest", "shared", "answer", "seconds", "goal_ms")
"""The options that a report keeps, beside its command."""
ROOM = 256
"""Tokens of context beyond those asked for: decoded and encoded again, random tokens can be more."""
SECONDS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)  # on the axis of a plot
WARM_UP, LEAST_REQUESTS = 8, 8  # requests before the first rate, and at each


def bench(base: str, folder: Path, rate: float, requests: int, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The client's figures for a number of requests at a rate."""
    middle = (arguments.shortest + arguments.longest) // 2
    report = folder / "client.json"
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--base-url", base, "--model", "m"]
    command += ["--tokenizer", str(folder), "--dataset-name", "random", "--random-input-len", str(middle)]
    spread = json.dumps({"input": 1 - arguments.shortest / middle, "output": 0.0})
    command += ["--random-range-ratio", spread, "--random-output-len", str(arguments.answer)]
    command += ["--random-prefix-len", str(arguments.shared)]
    command += ["--request-rate", str(rate), "--num-prompts", str(requests), "--seed", str(seed), "--ignore-eos"]
    command += ["--goodput", f"ttft:{arguments.goal_ms}", "--percentile-metrics", "ttft,tpot", "--metric-percentiles", "95,99"]
    command += ["--save-result", "--result-filename", str(report), "--disable-tqdm", "--temperature", "0"]
    before = looked_up(base)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=arguments.limit)
    if done.returncode:
        raise RuntimeError(f"the client ended with exit code {done.returncode}\n{done.stdout[-3000:]}")
    told = json.loads(report.read_text())
    queried, hit = (after - at_first for after, at_first in zip(looked_up(base), before, strict=True))
    return {"rate": rate, **{name: told[name] for name in FIGURES}, "cached_share": hit / queried if queried else None}


def looked_up(base: str) -> list[float]:
    """Prompt tokens that a server has looked for in its prefix cache so far, and found there."""
    sums = counters(base)
    return [sums.get(f"vllm:prefix_cache_{name}_total", 0.0) for name in ("queries", "hits")]


def measure(name: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The figures of a run: seconds until its server is ready, and the client's at each rate."""
    from common.plugins import fill_in  # not at the top: `plot` needs no torch

    from sage_backend.tools.engines import Run

    run = Run.parse(name)
    fill_in(run, str(folder))
    served = ["--jit-monitor-verbose", "--max-model-len", str(arguments.shared + arguments.longest + arguments.answer + ROOM)]
    if not arguments.shared:  # the client's random prompts count through the vocabulary, so that some begin like others
        served += ["--no-enable-prefix-caching"]
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
            if found["cached_share"] is not None:
                times += f"; {found['cached_share']:.0%} of prompts cached"
            print(f"  {rate} requests/s: {found['request_goodput']:.2f} good; ms to the first token: {times}", flush=True)
        figures["kernels_compiled_while_serving"] = compiled_late(server.log.read_text())
    return figures


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and save. Returns the exit status."""
    from sage_backend.demo import MODEL_DIR  # not at the top: plots need neither torch nor this package
    from sage_backend.tools.engines import circumstances

    shape = dict(SHAPES.get(arguments.shape) or json.loads((MODEL_DIR / "config.json").read_text()))
    if arguments.layers:
        shape["num_hidden_layers"] = arguments.layers
    report = {
        **circumstances(command_line("benchmarks/serving.py"), arguments.shape),
        **{name: getattr(arguments, name) for name in LOAD},
        "runs": [],
    }
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


def read(files: Sequence[Path]) -> dict[str, Any]:
    """The reports of `files` as one. Raises ValueError, in one line, for what is no report, and for different loads."""
    reports = []
    for file in files:
        try:
            report = {"shared": 0, **json.loads(file.read_text())}  # which older reports do not have
            reports.append({name: report[name] for name in ("model", "device", "date", "runs", *LOAD)})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is not a report of `run` ({type(error).__name__}: {error})") from None
    for name in ("model", "device", *LOAD):
        if len(found := {json.dumps(report[name]) for report in reports}) > 1:
            raise ValueError(f"the reports differ in {name}: {', '.join(sorted(found))}")
    return {**reports[0], "runs": [run for report in reports for run in report["runs"] if "error" not in run]}


def draw(plt: Any, report: dict[str, Any]) -> Any:
    """A figure: time to the first token, and answers a second, by the rate of requests."""
    figure, (waits, answers) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    goal = report["goal_ms"] / 1000
    for each in report["runs"]:
        rates = [at["rate"] for at in each["rates"]]
        [line] = waits.plot(rates, [at["p95_ttft_ms"] / 1000 for at in each["rates"]], marker="o", label=each["run"])
        answers.plot(rates, [at["request_throughput"] for at in each["rates"]], marker="o", color=line.get_color())
        answers.plot(rates, [at["request_goodput"] for at in each["rates"]], linestyle=":", color=line.get_color())
    waits.axhline(goal, color="#555555", linewidth=1, linestyle="--")
    waits.annotate(f"goal: {goal:g} s", (0.99, goal), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    waits.set_yscale("log")
    low, high = waits.get_ylim()
    waits.set_yticks(shown := [s for s in SECONDS if low <= s <= high], [f"{s:g}" for s in shown])
    waits.minorticks_off()
    waits.set(xlabel="requests a second", ylabel="s to the first token, 95th percentile", title="Waiting")
    answers.set(xlabel="requests a second", ylabel="answers a second", title=f"Answers (dotted: first token within {goal:g} s)")
    answers.set_ylim(bottom=0)
    figure.legend(*waits.get_legend_handles_labels(), loc="outside lower center", frameon=False, ncols=2)
    load = f"prompts of {report['shortest']} to {report['longest']} tokens, answers of {report['answer']}"
    if report["shared"]:
        load = f"{report['shared']} shared tokens and {load}"
    figure.suptitle(f"{report['model']}, {load}; {report['device']}, {report['date'][:10]}", fontsize=9, color="#555555")
    return figure


def plot(arguments: argparse.Namespace) -> int:
    """Draw the runs of reports. Returns the exit status."""
    try:
        report = read(arguments.files)
    except ValueError as error:
        sys.exit(f"serving.py plot: {error}")
    try:
        import matplotlib  # type: ignore[import-not-found]
    except ModuleNotFoundError:
        sys.exit("serving.py plot: needs matplotlib (pip install matplotlib, or this package's extra `bench`)")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}):
        draw(plt, report).savefig(arguments.out, dpi=160)
    print(arguments.out)
    return 0


def main() -> int:
    """The command. Returns its exit status."""
    parser = argparse.ArgumentParser(description="Measure what clients of a server see at rising request rates.")
    commands = parser.add_subparsers(required=True)
    measuring = commands.add_parser("run", help="measure")
    measuring.add_argument("runs", nargs="+", metavar="RUN")
    measuring.add_argument("--shape", choices=[*SHAPES, EMBEDDED], default="llama-3.1-8b")
    measuring.add_argument("--layers", type=int, help="instead of the shape's own number")
    measuring.add_argument("--rates", type=float, nargs="+", required=True, help="requests a second")
    measuring.add_argument("--seconds", type=float, default=30, help="at each rate (default: %(default)s)")
    measuring.add_argument("--shortest", type=int, default=2048, help="tokens of the shortest prompt (default: %(default)s)")
    measuring.add_argument("--longest", type=int, default=16384, help="tokens of the longest prompt (default: %(default)s)")
    measuring.add_argument("--shared", type=int, default=0, help="tokens in front of all prompts (default: %(default)s)")
    measuring.add_argument("--answer", type=int, default=16, help="tokens of each answer (default: %(default)s)")
    measuring.add_argument("--goal-ms", type=int, default=2000, help="to the first token (default: %(default)s)")
    measuring.add_argument("--limit", type=float, default=300, help="seconds to wait for a server or a client")
    measuring.add_argument("--serve", dest="serve_arguments", nargs=argparse.REMAINDER, default=[], help="its arguments")
    measuring.add_argument("--out", type=Path)
    measuring.set_defaults(command=run)
    drawing = commands.add_parser("plot", help="draw the runs of reports")
    drawing.add_argument("files", nargs="+", type=Path, metavar="FILE")
    drawing.add_argument("--out", type=Path, required=True, help="a PNG file")
    drawing.set_defaults(command=plot)
    arguments = parser.parse_args()
    return int(arguments.command(arguments))


if __name__ == "__main__":
    sys.exit(main())
