# SPDX-License-Identifier: Apache-2.0
"""Reports: JSON files that say how they were made."""

import importlib.metadata
import json
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def command_line(script: str, words: Sequence[str] | None = None) -> str:
    """The command as reports keep it, files without their folders. words: those of this process if None."""
    words = sys.argv[1:] if words is None else words
    return shlex.join([script, *(re.sub(r"(^|=)/.*/", r"\1", word) for word in words)])


def save(report: Mapping[str, Any], path: Path) -> None:
    """Write a report, in a folder that need not exist yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def circumstances(script: str) -> dict[str, Any]:
    """The part of a report that says how it was made, for a script that uses torch without vLLM's engine. Others take
    `sage_backend.tools.engines.circumstances`."""
    import torch  # not every script with a report has it

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "transformers"):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "command": command_line(script),
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "versions": versions,
    }
