# SPDX-License-Identifier: Apache-2.0
"""The `sage` command."""

import importlib
import sys

_COMMANDS = {
    "eval": ("sage_backend.tools.quality", "compare attention backends and KV formats on a text"),
    "calibrate": ("sage_backend.tools.calibrate", "calibrate a model's keys and values on a text, and write a file"),
    "needle": ("sage_backend.tools.needle", "ask for what is hidden in long contexts, and draw what is found"),
    "variator": ("sage_backend.tools.variator", "train compression plugins for a model's FFNs"),
    "doctor": ("sage_backend.tools.doctor", "check whether this machine can serve, and say what to do if not"),
}
"""The module of each command's `main`, and its help. Imported when it is called: doctor has to work where torch does not."""


def main() -> int:
    """Run a subcommand with the rest of the command line; returns its exit status."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in _COMMANDS:
        return importlib.import_module(_COMMANDS[name][0]).main(sys.argv[2:])
    lines = ["usage: sage COMMAND ...", "", *(f"  {each:<10} {text}" for each, (_, text) in _COMMANDS.items())]
    wants_help = name in ("-h", "--help")
    print("\n".join([*lines, "", "sage COMMAND --help lists its options."]), file=sys.stdout if wants_help else sys.stderr)
    return 0 if wants_help else 2


if __name__ == "__main__":
    sys.exit(main())
