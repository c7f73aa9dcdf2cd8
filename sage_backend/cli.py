"""The `sage` command: `sage eval ...` and `sage calibrate ...`."""

import sys


def main() -> int:
    """Run a subcommand with the rest of the command line; returns its exit status."""
    from sage_backend import calibration, quality

    commands = {
        "eval": (quality.main, "compare attention backends and KV formats on a text"),
        "calibrate": (calibration.main, "find the anchors of a model's keys and write them to a file"),
    }
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in commands:
        return commands[name][0](sys.argv[2:])
    lines = ["usage: sage COMMAND ...", "", *(f"  {each:<10} {what}" for each, (_, what) in commands.items())]
    asked = name in ("-h", "--help")
    print("\n".join([*lines, "", "sage COMMAND --help lists its options."]), file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2
