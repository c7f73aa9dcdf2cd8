# SPDX-License-Identifier: Apache-2.0
"""`sage needle`: recall of pass keys from long contexts, by depth and length; with --plots, as a heat map of each run.

    sage needle SAGE SAGE:memory.local_tokens=1024,memory.extrapolate=2048 --lengths 2000,8000,32000 --out needle.json

A pass key is hidden at some depth of a long text and asked for at its end. Runs are named as for `sage eval`. A run that fails
is marked in the report, and the others are made.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sage_backend.demo import MODEL_DIR
from sage_backend.demo.passkey import PassKeys
from sage_backend.tools import plots
from sage_backend.tools.command import run_command
from sage_backend.tools.engines import (
    Failure,
    Run,
    attempts,
    check_failures,
    check_runs,
    circumstances,
    engine,
    stretched,
)
from sage_backend.tools.models import check_model
from sage_backend.tools.passkeys import ANSWER_TOKENS, recalls
from sage_backend.tools.tables import table
from sage_backend.tools.text import read_text


def recall(
    run: Run, model: str, lengths: Sequence[int], depths: int, document: Sequence[str] = (), **arguments: Any
) -> dict[int, list[bool]]:
    """Whether the key was recalled, by length of the prompt in tokens and then by depth, from the start to the end.

    arguments: the engine's. Raises ValueError for lengths that do not hold a prompt.
    """
    found = {}
    with engine(run, model, max_model_len=max(lengths) + ANSWER_TOKENS, **arguments) as llm:
        passkeys = PassKeys(llm.get_tokenizer(), document)
        for length in lengths:
            at = [i / (depths - 1) for i in range(depths)]
            found[length] = recalls(llm, passkeys, length, at, progress=False)
            print(f"  {length:>9} tokens: {sum(found[length])} of {depths} recalled", file=sys.stderr, flush=True)
    return found


def _run(arguments: argparse.Namespace, command: str) -> None:
    if not all(length.isdecimal() and int(length) for length in arguments.lengths.split(",")):
        raise ValueError(f"--lengths takes tokens such as 2000,8000, not {arguments.lengths!r}")
    lengths = sorted({int(length) for length in arguments.lengths.split(",")})
    if arguments.depths < 2:
        raise ValueError("--depths must be at least 2")
    document = read_text(arguments.text).splitlines(keepends=True) if arguments.text else ()
    runs = [Run.parse(each) for each in arguments.runs]
    if arguments.out and not arguments.out.absolute().parent.is_dir():
        raise ValueError(f"there is no folder {arguments.out.absolute().parent} for --out")
    if arguments.plots:
        plots.check()
    check_model(arguments.model)
    # Not at the top: vLLM reads VLLM_LOGGING_LEVEL, which `main` sets, when it is imported.
    from vllm.platforms import current_platform

    limits: dict[str, Any] = {"enforce_eager": True, "enable_prefix_caching": False, "disable_log_stats": True}
    if current_platform.is_cpu():
        limits["kv_cache_memory_bytes"] = 1 << 30
    limits |= stretched(arguments.model, max(lengths) + ANSWER_TOKENS)
    refused = check_runs(runs, arguments.model, max_model_len=max(lengths) + ANSWER_TOKENS, **limits)
    results: list[dict[str, Any]] = []
    report = circumstances(command, arguments.model)
    report |= {"lengths": lengths, "depths": arguments.depths, "runs": results}
    asked = arguments.model, lengths, arguments.depths, document
    try:
        for run, found in attempts(runs, refused, lambda run: recall(run, *asked, **limits)):
            if isinstance(found, Failure):
                results.append(found.result())
            else:
                results.append({"run": run.name, "recalled": {str(length): hits for length, hits in found.items()}})
            if arguments.out:  # after each run, for the next one may be cut short
                arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    finally:
        if results:
            _print_report(report, arguments)
    check_failures(results)


def _print_report(report: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Print a report, and write its plots with --plots."""
    rows = [["run", *map(str, report["lengths"])]]
    for result in report["runs"]:
        if "error" in result:
            rows.append([result["run"], f"failed: {result['error']}"])
            continue
        shares = (sum(hits) / report["depths"] for hits in result["recalled"].values())
        rows.append([result["run"], *(f"{share:.0%}" for share in shares)])
    print(table(rows))
    if arguments.plots:
        print(*plots.write_needle(report, rows, arguments.plots), sep="\n")


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit status. Errors in the input go to stderr, in one line."""
    argv = sys.argv[2:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="sage needle", description="Recall pass keys from long contexts.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="as for `sage eval`, for example SAGE:memory.topk_pages=64")
    parser.add_argument("--model", default=str(MODEL_DIR), help="folder or name (default: the embedded small model)")
    parser.add_argument("--text", type=Path, help="a document to hide keys in (default: lines of filler)")
    parser.add_argument("--lengths", default="2000,4000,8000,16000", help="tokens of prompts (default: %(default)s)")
    parser.add_argument("--depths", type=int, default=20, help="prompts of each length (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the results to this file, as JSON")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write heat maps as PNG and HTML into this folder")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    return run_command(lambda: _run(arguments, shlex.join(["sage", "needle", *argv])))
