"""`sage needle`: what an engine recalls from long contexts, by depth and length, drawn as a heat map for each run.

    sage needle SAGE SAGE:memory.local_tokens=1024,memory.extrapolate=2048 --lengths 2000,8000,32000 --out needle.json

A pass key is told at some depth of a long text and asked for at its end. Runs are those of `sage eval`.
"""

import argparse
import base64
import html
import io
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from sage_backend import cli, quality
from sage_backend.demo import MODEL_DIR
from sage_backend.demo.passkey import make_passkey

_ANSWER_TOKENS = 8  # room for a key of five digits and a space
_HIT, _MISS = "#2a9d5c", "#d1495b"


def recall(
    run: quality.Run, model: str, lengths: Sequence[int], depths: int, document: Sequence[str] = (), **arguments: Any
) -> dict[int, list[bool]]:
    """Whether the key was recalled, by length of the prompt in tokens and then by depth, from the start to the end.

    arguments: the engine's. Raises ValueError for lengths that do not hold a prompt.
    """
    from vllm import SamplingParams

    found = {}
    with quality.engine(run, model, max_model_len=max(lengths) + _ANSWER_TOKENS, **arguments) as llm:
        tokenizer = llm.get_tokenizer()
        greedy = SamplingParams(temperature=0, max_tokens=_ANSWER_TOKENS)
        for length in lengths:
            rng = Random(length)
            at = [i / max(depths - 1, 1) for i in range(depths)]
            prompts, answers = zip(*(make_passkey(length, each, rng, tokenizer, document) for each in at), strict=True)
            texts = [output.outputs[0].text for output in llm.generate(list(prompts), greedy, use_tqdm=False)]
            found[length] = [text.strip().startswith(answer) for text, answer in zip(texts, answers, strict=True)]
            print(f"  {length:>9} tokens: {sum(found[length])} of {depths} recalled", file=sys.stderr, flush=True)
    return found


def draw(report: dict[str, Any]) -> bytes:
    """The heat maps of a report side by side, as a PNG file. Raises ValueError where matplotlib is missing."""
    try:
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("heat maps need matplotlib; pip install matplotlib, or leave out --plots") from None
    runs, lengths, depths = report["runs"], report["lengths"], report["depths"]
    figure = Figure(figsize=(1.6 + 0.62 * len(lengths) * len(runs) + 0.6 * len(runs), 4.6), layout="constrained")
    panels = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    for panel, run in zip(panels, runs, strict=True):
        cells = [[run["recalled"][str(length)][depth] for length in lengths] for depth in range(depths)]
        panel.imshow(cells, aspect="auto", cmap=ListedColormap([_MISS, _HIT]), vmin=0, vmax=1, interpolation="nearest")
        shares = [sum(run["recalled"][str(length)]) / depths for length in lengths]
        labels = [f"{_short(length)}\n{share:.0%}" for length, share in zip(lengths, shares, strict=True)]
        panel.set_xticks(range(len(lengths)), labels, fontsize=8)
        panel.set_xticks([i + 0.5 for i in range(len(lengths) - 1)], minor=True)
        panel.set_yticks([i + 0.5 for i in range(depths - 1)], minor=True)
        panel.grid(which="minor", color="white", linewidth=1)
        panel.tick_params(which="both", length=0)
        panel.set_xlabel("prompt, tokens (share recalled)", fontsize=9)
        panel.set_title("\n".join(_wrapped(run["run"])), fontsize=9)
    marks = sorted({0, (depths - 1) // 2, depths - 1})
    panels[0].set_yticks(marks, [f"{mark / max(depths - 1, 1):.0%}" for mark in marks], fontsize=8)
    panels[0].set_ylabel("depth at which the key is told", fontsize=9)
    figure.suptitle(f"Pass keys recalled by {report['model']} (green) and not (red)", fontsize=11)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    return file.getvalue()


def _short(tokens: int) -> str:
    return f"{tokens / 1e6:g}M" if tokens >= 1e6 else f"{tokens / 1e3:g}K" if tokens >= 1e3 else str(tokens)


def _wrapped(name: str) -> list[str]:
    head, _, options = name.partition(":")
    return [head, *(each + "," for each in options.split(",")[:-1]), options.rpartition(",")[2]] if options else [head]


def page(report: dict[str, Any], picture: bytes) -> str:
    """A report as one HTML file that needs no other."""
    head = "".join(f"<th>{_short(length)}</th>" for length in report["lengths"])
    rows = "".join(
        f"<tr><th>{html.escape(run['run'])}</th>"
        + "".join(f"<td>{sum(run['recalled'][str(n)]) / report['depths']:.0%}</td>" for n in report["lengths"])
        + "</tr>"
        for run in report["runs"]
    )
    return (
        '<!doctype html><meta charset="utf-8"><title>sage needle</title>'
        "<style>body{font:15px system-ui;margin:2em auto;max-width:72em;padding:0 1em}img{max-width:100%}"
        "table{border-collapse:collapse}th,td{padding:.3em .8em;text-align:right;border-bottom:1px solid #ddd}"
        "tr>th:first-child{text-align:left;font-weight:500}code{background:#f4f4f4;padding:.1em .3em}</style>"
        f"<h1>Pass keys recalled by {html.escape(report['model'])}</h1>"
        f"<p>{report['depths']} depths for each length in tokens, on {html.escape(report['device'])}, {report['date']}.</p>"
        f'<img alt="heat maps" src="data:image/png;base64,{base64.b64encode(picture).decode()}">'
        f"<table><tr><th>run</th>{head}</tr>{rows}</table><p><code>{html.escape(report['command'])}</code></p>\n"
    )


def _run(arguments: argparse.Namespace, command: str) -> None:
    if not all(length.isdecimal() and int(length) for length in arguments.lengths.split(",")):
        raise ValueError(f"--lengths takes tokens such as 2000,8000, not {arguments.lengths!r}")
    lengths = sorted({int(length) for length in arguments.lengths.split(",")})
    if arguments.depths < 2:
        raise ValueError("--depths must be at least 2")
    document = cli.read_text(arguments.text).splitlines(keepends=True) if arguments.text else ()
    runs = [quality.Run.parse(run) for run in arguments.runs]
    if arguments.out and not arguments.out.absolute().parent.is_dir():
        raise ValueError(f"there is no folder {arguments.out.absolute().parent} for --out")
    from vllm.platforms import current_platform

    engine: dict[str, Any] = {"enforce_eager": True, "enable_prefix_caching": False, "disable_log_stats": True}
    if current_platform.is_cpu():
        engine["kv_cache_memory_bytes"] = 1 << 30
    engine |= quality.stretched(arguments.model, max(lengths) + _ANSWER_TOKENS)
    results: list[dict[str, Any]] = []
    for number, run in enumerate(runs, start=1):
        print(f"[{number}/{len(runs)}] {run.name}", file=sys.stderr, flush=True)
        found = recall(run, arguments.model, lengths, arguments.depths, document, **engine)
        results.append({"run": run.name, "recalled": {str(length): hits for length, hits in found.items()}})
    for result in results:
        shares = "  ".join(f"{_short(n)} {sum(result['recalled'][str(n)]) / arguments.depths:.0%}" for n in lengths)
        print(f"{result['run']}: {shares}")
    report = quality.circumstances(command, arguments.model)
    report |= {"lengths": lengths, "depths": arguments.depths, "runs": results}
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        if arguments.plots:
            picture = draw(report)
            arguments.out.with_suffix(".png").write_bytes(picture)
            arguments.out.with_suffix(".html").write_text(page(report, picture), encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit status; what is wrong with the input is told in one line on stderr."""
    argv = sys.argv[2:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="sage needle", description="Recall pass keys from long contexts.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="as for `sage eval`, for example SAGE:memory.topk_pages=64")
    parser.add_argument("--model", default=str(MODEL_DIR), help="folder or name (default: the embedded small model)")
    parser.add_argument("--text", type=Path, help="a document to hide keys in (default: lines of filler)")
    parser.add_argument("--lengths", default="2000,4000,8000,16000", help="tokens of prompts (default: %(default)s)")
    parser.add_argument("--depths", type=int, default=20, help="prompts of each length (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the results to this file, as JSON")
    parser.add_argument("--plots", action="store_true", help="beside it, write a heat map as PNG and as HTML")
    arguments = parser.parse_args(argv)
    if arguments.plots and not arguments.out:
        parser.error("--plots needs --out")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    return cli.run(lambda: _run(arguments, shlex.join(["sage", "needle", *argv])))
