# SPDX-License-Identifier: Apache-2.0
"""`sage needle`: what is found in long contexts, by task, length and depth; with --plots, as heat maps of each run.

    sage needle SAGE SAGE:memory.local_tokens=1024,memory.extrapolate=2048 --lengths 2000,8000,32000 --out needle.json
    sage needle SAGE --task multikey,variables --lengths 4000 --depths 10

The default task is a pass key that is hidden at some depth of a long text and asked for at its end. `tools/tasks.py` has the
others. Runs are named as for `sage eval`. A run that fails is marked in the report, and the others are made.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

from sage_backend.demo import MODEL_DIR
from sage_backend.demo.passkey import PassKeys
from sage_backend.tools import plots
from sage_backend.tools.command import check_out, run_command
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
from sage_backend.tools.passkeys import ANSWER_TOKENS, continuations, recalls
from sage_backend.tools.tables import table
from sage_backend.tools.tasks import NAMES, PASSKEY, TASKS, scores_by_task, share_found
from sage_backend.tools.text import read_text


@dataclass(frozen=True)
class Questions:
    """What every run is asked: `count` prompts of each task and length, in tokens. document: lines to hide things in."""

    tasks: Sequence[str]
    lengths: Sequence[int]
    count: int
    document: Sequence[str] = ()

    @property
    def context(self) -> int:
        """Tokens of the longest prompt and the longest answer."""
        return max(self.lengths) + max(ANSWER_TOKENS if task == PASSKEY else TASKS[task].answer_tokens for task in self.tasks)

    @property
    def depths(self) -> list[float]:
        """From the start of the text, 0, to its end, 1."""
        return [i / (self.count - 1) for i in range(self.count)]

    def check(self, tokenizer: Any) -> None:
        """Raises ValueError, in one line, if the shortest length does not hold a prompt of each task."""
        for task in self.tasks:
            if task == PASSKEY:
                PassKeys(tokenizer, self.document).make(min(self.lengths), 0, Random(0))
            else:
                TASKS[task].prompts(tokenizer, min(self.lengths), self.count, self.document)


Scores = dict[str, dict[int, list[float]]]
"""From 0 to 1: by task, by length in tokens, and by prompt, in the order of their depths. A score of the task `passkey` is
whether the key was recalled."""


def recall(
    run: Run, model: str, questions: Questions, keep: Callable[[Scores], None] | None = None, **arguments: Any
) -> Scores:  # fmt: skip
    """The scores of a run's answers.

    keep: is given what there is after each task and length, for the next one may be cut short. arguments: the engine's. Raises
    ValueError for lengths that do not hold a prompt.
    """
    found: Scores = {task: {} for task in questions.tasks}
    with engine(run, model, max_model_len=questions.context, **arguments) as llm:
        tokenizer = llm.get_tokenizer()
        passkeys = PassKeys(tokenizer, questions.document)
        for task, length in product(questions.tasks, questions.lengths):
            if task == PASSKEY:
                scores: list[float] = [*recalls(llm, passkeys, length, questions.depths, progress=False)]
            else:
                prompts = TASKS[task].prompts(tokenizer, length, questions.count, questions.document)
                asked = [{"prompt_token_ids": prompt.ids} for prompt in prompts]
                texts = continuations(llm, asked, TASKS[task].answer_tokens, progress=False)
                scores = [share_found(text, prompt.expected) for text, prompt in zip(texts, prompts, strict=True)]
            found[task][length] = scores
            if keep is not None:
                keep(found)
            share = sum(scores) / questions.count
            print(f"  {task}, {length} tokens: {share:.0%} of {questions.count} prompts", file=sys.stderr, flush=True)
    return found


def _tasks(names: str, takes_text: bool) -> list[str]:
    """The tasks of a list with commas. Raises ValueError, in one line, for names of none and for a text that one does not
    take."""
    tasks = list(dict.fromkeys(names.split(",")))
    for task in tasks:
        if task not in NAMES:
            raise ValueError(f"there is no task {task!r}; --task takes {', '.join(NAMES)}")
        if takes_text and not (task == PASSKEY or TASKS[task].takes_text):
            raise ValueError(f"--text does not go with the task {task}, which hides nothing in a text")
    return tasks


def _questions(arguments: argparse.Namespace) -> Questions:
    if not all(length.isdecimal() and int(length) for length in arguments.lengths.split(",")):
        raise ValueError(f"--lengths takes tokens such as 2000,8000, not {arguments.lengths!r}")
    if arguments.depths < 2:
        raise ValueError("--depths must be at least 2")
    return Questions(
        _tasks(arguments.task, bool(arguments.text)),
        sorted({int(length) for length in arguments.lengths.split(",")}),
        arguments.depths,
        read_text(arguments.text).splitlines(keepends=True) if arguments.text else (),
    )


def _run(arguments: argparse.Namespace, command: str) -> None:
    questions = _questions(arguments)
    runs = [Run.parse(each) for each in arguments.runs]
    check_out(arguments.out)
    if arguments.plots:
        plots.check()
    check_model(arguments.model)
    # Not at the top: vLLM reads VLLM_LOGGING_LEVEL, which `main` sets, when it is imported.
    from vllm.platforms import current_platform
    from vllm.tokenizers import get_tokenizer

    limits: dict[str, Any] = {"enforce_eager": True, "enable_prefix_caching": False, "disable_log_stats": True}
    if arguments.kv_gib or current_platform.is_cpu():
        limits["kv_cache_memory_bytes"] = int((arguments.kv_gib or 1) * 2**30)
    limits |= stretched(arguments.model, questions.context)
    refused = check_runs(runs, arguments.model, max_model_len=questions.context, **limits)
    questions.check(get_tokenizer(arguments.model))
    results: list[dict[str, Any]] = []
    report = circumstances(command, arguments.model)
    report |= {"tasks": questions.tasks, "lengths": questions.lengths, "depths": questions.count, "runs": results}

    def save(*unfinished: dict[str, Any]) -> None:
        if arguments.out:
            text = json.dumps({**report, "runs": [*results, *unfinished]}, indent=2)
            arguments.out.write_text(text + "\n", encoding="utf-8")

    def measure(run: Run) -> Scores:
        return recall(run, arguments.model, questions, lambda found: save(_result(run, found)), **limits)

    try:
        for run, found in attempts(runs, refused, measure):
            results.append(found.result() if isinstance(found, Failure) else _result(run, found))
            save()
    finally:
        if results:
            _print_report(report, arguments)
    check_failures(results)


def _result(run: Run, found: Scores) -> dict[str, Any]:
    """A run as a report holds it, with the scores of pass keys by themselves, as in reports of pass keys alone."""
    scores = {task: {str(length): each for length, each in by_length.items()} for task, by_length in found.items()}
    recalled = {"recalled": scores.pop(PASSKEY)} if PASSKEY in scores else {}
    return {"run": run.name} | recalled | ({"scores": scores} if scores else {})


def _rows(report: dict[str, Any]) -> list[list[str]]:
    """The rows of the table, headings first. Pass keys alone have no column for the task."""
    named = report["tasks"] != [PASSKEY]
    rows = [["run", *(["task"] if named else []), *map(str, report["lengths"])]]
    for result in report["runs"]:
        if "error" in result:
            rows.append([result["run"], f"failed: {result['error']}"])
        for task, by_length in scores_by_task(result).items():
            shares = [f"{sum(scores) / report['depths']:.0%}" for scores in by_length.values()]
            rows.append([result["run"], *([task] if named else []), *shares])
    return rows


def _print_report(report: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Print a report, and write its plots with --plots."""
    rows = _rows(report)
    print(table(rows))
    if arguments.plots:
        print(*plots.write_needle(report, rows, arguments.plots), sep="\n")


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit status. Errors in the input go to stderr, in one line."""
    argv = sys.argv[2:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="sage needle", description="Ask for what is hidden in long contexts.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="as for `sage eval`, for example SAGE:memory.topk_pages=64")
    parser.add_argument("--model", default=str(MODEL_DIR), help="folder or name (default: the embedded small model)")
    parser.add_argument(
        "--task", default=PASSKEY, metavar="NAMES", help=f"some of {', '.join(NAMES)}, with commas (default: %(default)s)"
    )
    parser.add_argument("--text", type=Path, help="a document to hide things in (default: lines of filler)")
    parser.add_argument("--lengths", default="2000,4000,8000,16000", help="tokens of prompts (default: %(default)s)")
    parser.add_argument("--depths", type=int, default=20, help="prompts of each task and length (default: %(default)s)")
    parser.add_argument(
        "--kv-gib", type=float, help="GiB of the GPU's memory for pages (default: what vLLM finds free; 1 on a CPU)"
    )
    parser.add_argument("--out", type=Path, help="write the results to this file, as JSON")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write heat maps as PNG and HTML into this folder")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    return run_command(lambda: _run(arguments, shlex.join(["sage", "needle", *argv])))
