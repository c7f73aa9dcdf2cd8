# SPDX-License-Identifier: Apache-2.0
"""The frame of every subcommand of `sage`: errors in the input become one line on stderr."""

import sys
from collections.abc import Callable
from pathlib import Path


def run_command(command: Callable[[], None]) -> int:
    """Run a command; returns its exit status. A ValueError, OSError or RuntimeError becomes one line on stderr."""
    try:
        command()
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def check_out(path: Path | None) -> None:
    """Raises ValueError, before anything is measured, if the folder of --out is not there."""
    if path is not None and not path.absolute().parent.is_dir():
        raise ValueError(f"there is no folder {path.absolute().parent} for --out")


def one_line(error: BaseException) -> str:
    """The message of an error in one line. pydantic's, which vLLM's configurations raise, begin with a count, which is
    skipped."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    message = next((line for line in lines if line.startswith("Value error, ")), lines[0])
    return message.removeprefix("Value error, ").partition(" [type=")[0]
