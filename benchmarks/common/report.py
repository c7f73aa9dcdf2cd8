# SPDX-License-Identifier: Apache-2.0
"""Reports: JSON files that say how they were made."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def save(report: Mapping[str, Any], path: Path) -> None:
    """Write a report, in a folder that need not exist yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
