# SPDX-License-Identifier: Apache-2.0
"""How subcommands of `sage` run, and what they say of errors."""

import sys
from collections.abc import Callable


def run_command(command: Callable[[], None]) -> int:
    """Run a command; returns its exit status. What is wrong with its input is told in one line on stderr."""
    try:
        command()
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def one_line(error: BaseException) -> str:
    """What an error says, in one line. Those of pydantic, which vLLM's configurations raise, begin with how many there are."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    told = next((line for line in lines if line.startswith("Value error, ")), lines[0])
    return told.removeprefix("Value error, ").partition(" [type=")[0]
