# SPDX-License-Identifier: Apache-2.0
"""The documents: their links, their tables of options, the files that they name."""

import json
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

from sage_backend.options import MemoryOptions, SageOptions, VariatorOptions

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "benchmarks" / "README.md"])
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)")


def slugs(document: Path) -> set[str]:
    """The anchors of a document's headings, as both GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links(document: Path) -> None:
    for target, anchor in LINK.findall(document.read_text(encoding="utf-8")):
        file = (document.parent / target).resolve() if target else document
        assert file.exists(), f"{target} does not exist"
        assert file.is_relative_to(ROOT)
        if anchor:
            assert anchor in slugs(file), f"{target} has no #{anchor}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_lines(document: Path) -> None:
    """Rows of tables may be longer."""
    lines = document.read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if len(line) > 128 and not line.lstrip().startswith("|")]


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize(
    ("document", "options"),
    [("options", SageOptions), ("memory", MemoryOptions), ("variator", VariatorOptions)],
    ids=["sage", "memory", "variator"],
)
def test_tables_of_options(document: str, options: Any) -> None:
    """Each has every option, and its default."""
    text = (ROOT / "docs" / "user" / f"{document}.md").read_text(encoding="utf-8")
    table = text.partition("| option")[2].partition("\n\n")[0]
    found = dict(re.findall(r"^\| `(\w+)` +\|[^|]+\| *(\S+) \|", table, re.MULTILINE))
    defaults = {}
    for field in fields(options):
        value = "required" if field.default is MISSING else "none" if field.default is None else field.default
        defaults[field.name] = value if isinstance(value, str) else json.dumps(value)
    assert {name: default.strip("`") for name, default in found.items()} == defaults


def test_tables_of_patches() -> None:
    """The document and the package's docstring list all patches, in one order."""
    folder = ROOT / "sage_backend" / "engine" / "patches"
    document = (ROOT / "docs" / "developer" / "vllm.md").read_text(encoding="utf-8").partition("\n## Patches")[2]
    listed = re.findall(r"^\| `?(\w+)`? +\|", document.partition("\n## ")[0], re.MULTILINE)
    in_package = re.findall(r"^\| (\w+) +\|", (folder / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert listed == in_package
    assert set(listed) == {"patch"} | {file.stem for file in folder.glob("*.py")} - {"__init__", "target"}


def test_results_are_named() -> None:
    """Every results file is named by a document, and names its own command."""
    text = "\n".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    for file in (ROOT / "benchmarks" / "results").rglob("*.json"):
        assert file.name in text
        assert json.loads(file.read_text(encoding="utf-8"))["command"]
