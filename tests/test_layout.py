"""The shape of the repository: which layer may import which, and what gets installed."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "sage_paged": ROOT / "paged" / "sage_paged",
    "sage_kernels": ROOT / "kernels" / "sage_kernels",
    "sage_backend": ROOT / "sage_backend",
}
# What each lower layer may import beside the standard library and itself. The top layer, the
# vLLM plugin, may import anything.
ALLOWED = {
    "sage_paged": {"torch"},
    "sage_kernels": {"torch", "triton", "sage_paged"},
}
IMPORT_CALLS = {"import_module", "__import__", "importorskip", "find_spec"}


def imports(source: str) -> Iterator[tuple[int, str]]:
    """Line and top-level module of every absolute import in source, at any depth of nesting.

    An import by a call, as in ``importlib.import_module("vllm")``, counts where the name is a literal.
    """
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        elif isinstance(node, ast.Call) and node.args:
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            first = node.args[0]
            if called in IMPORT_CALLS and isinstance(first, ast.Constant) and isinstance(first.value, str):
                names = [first.value] if not first.value.startswith(".") else []
        yield from ((node.lineno, name.partition(".")[0]) for name in names)


def escapes(source: str, depth: int) -> Iterator[int]:
    """Lines of relative imports that leave a package depth levels above the module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level > depth:
            yield node.lineno


def test_import_scanner_sees_every_form():
    source = """
import a.b, c as d
from e.f import g
from . import h
def i():
    import j
    importlib.import_module("k.l")
    __import__("m")
"""
    assert sorted(name for _, name in imports(source)) == ["a", "c", "e", "j", "k", "m"]
    assert list(escapes("from . import a\nfrom .. import b", depth=1)) == [2]


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_upwards_only(package):
    folder = PACKAGES[package]
    modules = sorted(folder.rglob("*.py"))
    assert modules, f"{folder} holds no module"
    allowed = set(sys.stdlib_module_names) | {package} | ALLOWED.get(package, set())
    wrong = []
    for module in modules:
        where, source = module.relative_to(ROOT), module.read_text()
        if package in ALLOWED:
            wrong += [
                f"{where}:{line} imports {name}" for line, name in imports(source) if name not in allowed
            ]
        depth = len(module.relative_to(folder).parts)
        wrong += [f"{where}:{line} leaves {package}" for line in escapes(source, depth)]
    assert not wrong, "\n".join(wrong)


def test_every_shipped_module_is_in_a_layer():
    outside = [
        str(module.relative_to(ROOT))
        for folder in ("paged", "kernels", "sage_backend")
        for module in (ROOT / folder).rglob("*.py")
        if not any(module.is_relative_to(package) for package in PACKAGES.values())
    ]
    assert not outside


@pytest.fixture(scope="module")
def distribution() -> importlib.metadata.Distribution:
    return importlib.metadata.distribution("sage-backend")


def test_only_our_three_packages_are_installed(distribution):
    assert set((distribution.read_text("top_level.txt") or "").split()) == set(PACKAGES)
    # What else the installation put in place: its metadata, the command, an editable installation's
    # finder, and compiled files next to these.
    ours = re.compile(
        r"(__pycache__/)?__editable__[\w.]*sage_backend|sage_backend-[^/]*/|sage_(backend|kernels|paged)/|(\.\./)+bin/sage$"
    )
    stray = [str(file) for file in distribution.files or [] if not ours.match(str(file))]
    assert not stray


@pytest.mark.parametrize("name", ["kernels", "paged"])
def test_folders_are_not_top_level_modules(name):
    """`kernels` is also a distribution of somebody else's, which may be there; ours may not be."""
    code = f"""
import importlib.util
spec = importlib.util.find_spec({name!r})
print(*([spec.origin, *(spec.submodule_search_locations or [])] if spec else []), sep="\\n")
"""
    # -I: nothing but what is installed, not the current folder and not PYTHONPATH.
    run = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True, cwd="/"
    )
    found = [Path(line) for line in run.stdout.splitlines() if line not in ("", "None")]
    assert not [path for path in found if path.is_relative_to(ROOT / name)]


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("vllm.general_plugins", "sage", "sage_backend.plugin:register"),
        ("vllm.platform_plugins", "sage_cpu", "sage_backend.plugin:cpu_platform"),
    ],
)
def test_entry_points(distribution, group, name, value):
    [entry_point] = distribution.entry_points.select(group=group, name=name)
    assert entry_point.value == value
    assert callable(entry_point.load())
