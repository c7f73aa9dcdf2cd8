# SPDX-License-Identifier: Apache-2.0
"""The command of a study: a script of benchmarks/studies that measures on a CPU and prints tables."""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from common.report import circumstances, save


def study(
    script: str,
    description: str,
    heading: str,
    parts: dict[str, Callable[[], list[dict[str, object]]]],
    table: Callable[[list[dict[str, object]]], str],
    **facts: object,
) -> None:
    """Print a table of each part's results, and write these to the file of --out."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    report: dict[str, object] = circumstances(f"benchmarks/studies/{script}") | facts
    with torch.inference_mode():
        for name, measure in parts.items():
            results = measure()
            print(f"{name}: {heading}")
            print(table(results), end="\n\n", flush=True)
            report[name] = results
    if arguments.out:
        save(report, arguments.out)
