"""The `sage` command, and what its subcommands share."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

_COMMANDS = {
    "eval": ("sage_backend.quality", "compare attention backends and KV formats on a text"),
    "calibrate": ("sage_backend.calibration", "find the anchors of a model's keys and values and write them to a file"),
    "needle": ("sage_backend.needle", "recall pass keys from long contexts, and draw what is recalled"),
    "variator": ("sage_backend.variator.train", "train compression plugins for a model's FFNs"),
    "doctor": ("sage_backend.doctor", "say whether this machine can serve, and what to do if not"),
}
"""Where each command's `main` is, imported only when it is asked for: doctor has to work where torch and vLLM do not."""


def run(command: Callable[[], None]) -> int:
    """Run a command; returns its exit status. What is wrong with its input is told in one line on stderr."""
    try:
        command()
    except (ValueError, OSError, RuntimeError) as error:
        from sage_backend.checks import one_line

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
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in _COMMANDS:
        return importlib.import_module(_COMMANDS[name][0]).main(sys.argv[2:])
    lines = ["usage: sage COMMAND ...", "", *(f"  {each:<10} {what}" for each, (_, what) in _COMMANDS.items())]
    asked = name in ("-h", "--help")
    print("\n".join([*lines, "", "sage COMMAND --help lists its options."]), file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


if __name__ == "__main__":
    sys.exit(main())
