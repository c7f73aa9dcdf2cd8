"""The `sage` command, and what its subcommands share."""

import sys
from collections.abc import Callable
from pathlib import Path

from sage_backend.checks import one_line


def run(command: Callable[[], None]) -> int:
    """Run a command; returns its exit status. What is wrong with its input is told in one line on stderr."""
    try:
        command()
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def read_text(file: Path) -> str:
    """A text that a command is to read. Raises ValueError where there is none."""
    if not (file.is_file() and (text := file.read_text(encoding="utf-8").strip())):
        raise ValueError(f"{file} is not a file with text")
    return text


def main() -> int:
    """Run a subcommand with the rest of the command line; returns its exit status."""
    from sage_backend import calibration, needle, quality

    commands = {
        "eval": (quality.main, "compare attention backends and KV formats on a text"),
        "calibrate": (calibration.main, "find the anchors of a model's keys and write them to a file"),
        "needle": (needle.main, "recall pass keys from long contexts, and draw what is recalled"),
    }
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in commands:
        return commands[name][0](sys.argv[2:])
    lines = ["usage: sage COMMAND ...", "", *(f"  {each:<10} {what}" for each, (_, what) in commands.items())]
    asked = name in ("-h", "--help")
    print("\n".join([*lines, "", "sage COMMAND --help lists its options."]), file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


if __name__ == "__main__":
    sys.exit(main())
