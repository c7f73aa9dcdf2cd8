# SPDX-License-Identifier: Apache-2.0
"""The shape of the repository: which layer may import which, and what gets installed."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

import machine_code
import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "sage_paged": ROOT / "paged" / "sage_paged",
    "sage_kernels": ROOT / "kernels" / "sage_kernels",
    "sage_backend": ROOT / "sage_backend",
}
# What each lower layer may import besides the standard library and itself. The top layer, the
# vLLM plugin, may import anything.
ALLOWED = {
    "sage_paged": {"torch"},
    "sage_kernels": {"torch", "triton", "sage_paged"},
}
# The rooms of the top layer: groups of its modules, from the bottom up. A room may import itself and the rooms before it.
ROOMS = (
    ("names", ("sage_backend", "sage_backend.options", "sage_backend.model_file")),
    ("demo", ("sage_backend.demo",)),
    ("features", ("sage_backend.features",)),
    ("observability", ("sage_backend.observability",)),
    ("variator", ("sage_backend.variator",)),
    ("engine", ("sage_backend.engine",)),
    ("plugin", ("sage_backend.plugin",)),
    ("tools", ("sage_backend.tools",)),
)
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 500, 60
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


def modules_of(package: str) -> dict[str, Path]:
    """Every module of a package by its dotted name."""
    folder = PACKAGES[package]
    return {
        ".".join([package, *file.relative_to(folder).with_suffix("").parts]).removesuffix(".__init__"): file
        for file in folder.rglob("*.py")
    }


MODULES = {name: file for package in PACKAGES for name, file in modules_of(package).items()}


def imported_modules(name: str, source: str, is_package: bool, known: Collection[str]) -> set[str]:
    """The modules, out of `known`, that module `name` imports, at any depth of nesting.

    Packages on the way to a module do not count: their __init__ runs too, but nothing is taken from it.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                outer = name.split(".")[: len(name.split(".")) - node.level + is_package]
                base = ".".join([*outer, *filter(None, [node.module])])
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # A module, or a class in one, that is named to be imported.
            found.add(node.value if node.value in known else node.value.rpartition(".")[0])
    return {each for each in found if each in known and each != name}


IMPORTED = {
    name: imported_modules(name, file.read_text(), file.name == "__init__.py", MODULES) for name, file in MODULES.items()
}


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The groups of nodes that reach each other, each sorted."""

    def reached(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            for each in graph.get(todo.pop(), ()):
                if each not in seen:
                    seen.add(each)
                    todo.append(each)
        return seen

    reach = {node: reached(node) for node in graph}
    groups = {tuple(sorted(other for other in reach[node] if node in reach[other])) for node in graph if node in reach[node]}
    return sorted(map(list, groups))


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a function is compiled for a GPU: decorated with triton.jit or gluon.jit."""
    return any("jit" in ast.unparse(decorator).partition("(")[0] for decorator in function.decorator_list)


def test_the_search_for_cycles_finds_them():
    known = {"p", "p.a", "p.b", "p.c", "p.d"}
    source = """
from p import a
def f():
    from p.b import g
    from . import c
    import_module("p.d")
"""
    assert imported_modules("p.x", source, False, known) == {"p.a", "p.b", "p.c", "p.d"}
    assert imported_modules("p", "from .a import b", True, known) == {"p.a"}
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}, "e": {"a"}}) == [["b", "c"], ["d"]]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_imports_itself_through_others(package):
    """Imports inside functions count: they hide a cycle, but do not remove it."""
    assert [cycle for cycle in cycles(IMPORTED) if cycle[0].partition(".")[0] == package] == []


def test_kernels_import_nothing_from_above_them():
    """So a change there leaves their code as it is."""
    modules = modules_of("sage_kernels")
    above = {name for name, file in modules.items() if file.name in machine_code.ABOVE_KERNELS}
    assert len(above) == len(machine_code.ABOVE_KERNELS)
    below = modules.keys() - above - {"sage_kernels"}
    assert {name: IMPORTED[name] & above for name in below if IMPORTED[name] & above} == {}


def room(module: str) -> int:
    """The index in ROOMS of the room of a module of sage_backend."""
    packages = [(package, i) for i, (_, packages) in enumerate(ROOMS) for package in packages if package != "sage_backend"]
    found = [i for package, i in packages if module == package or module.startswith(package + ".")]
    return found[0] if found else 0 if module == "sage_backend" else -1


def test_rooms_import_downwards_only():
    ours = [name for name in MODULES if name.partition(".")[0] == "sage_backend"]
    assert [name for name in ours if room(name) < 0] == [], "modules in no room"
    wrong = [
        f"{name} ({ROOMS[room(name)][0]}) imports {other} ({ROOMS[room(other)][0]})"
        for name in ours
        for other in sorted(IMPORTED[name])
        if other in ours and room(other) > room(name)
    ]
    assert wrong == []


@pytest.mark.parametrize("folder", ["sage_backend", "kernels", "paged", "benchmarks", "deploy", "examples", "tests"])
def test_modules_and_functions_are_short(folder):
    """A longer module gives its reason in its docstring, in a line that begins with "Length:". Kernels may be longer."""
    long = []
    for file in sorted((ROOT / folder).rglob("*.py")):
        source, name = file.read_text(), file.relative_to(ROOT).as_posix()
        tree, lines = ast.parse(source), source.count("\n")
        if lines > MOST_LINES and "\nLength: " not in (ast.get_docstring(tree) or ""):
            long.append(f"{name}: {lines} lines")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_kernel(node):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > MOST_LINES_OF_A_FUNCTION:
                    long.append(f"{name}.{node.name}: {lines} lines")
    assert long == []


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
    """`kernels` is also the name of another distribution, which may be installed. Our folder must not be importable."""
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
