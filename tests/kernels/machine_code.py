# SPDX-License-Identifier: Apache-2.0
"""Compile every Triton kernel for GPUs that are not here, and compare the machine code of two versions of the sources.

    python tests/kernels/machine_code.py                      compile for all compute capabilities, with progress
    python tests/kernels/machine_code.py 90 --head-dim 128    only one head size, with another Triton, say
    python tests/kernels/machine_code.py 90 --sass DIR        also write the disassembly of each kernel of sm_90 into DIR
    python tests/kernels/machine_code.py --compare OLD NEW    what differs between two such folders; status 1 if anything does
    python tests/kernels/machine_code.py --record             compile what is not cached, and write compiled.json

Kernels are launched through the project's own functions (launches.py lists the calls) with a driver that only compiles. Each
target, head size and key precision is a unit of work for one process; as many run at once as there are cores. What became of
its kernels is kept in ~/.cache/sage-backend/compile under a hash of the sources, so a second run compiles nothing, and
Triton's own cache keeps the kernels that a change does not touch. compiled.json is the same for a clean clone, in which
compiling would take most of the time of `make test`: the results for one hash. When the sources have another, it is void, and
everything is compiled. Comments and docstrings do not change the hash. With --spot-check, which the tests use, one unit is
compiled although compiled.json has it, and must come out the same; which one depends on the hash.

The comparison ignores addresses, line numbers and the names of kernels and labels. It needs nvdisasm and cuobjdump, from PATH
or from the Triton wheel; without them PTX is written and compared.
"""

import argparse
import ast
import hashlib
import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from launches import HEAD_DIMS, SHARED_KIB, imitate_device, launches

HERE = Path(__file__).resolve().parent
INSTRUCTIONS = {
    "int8": r"mma\S*\.s8\.s8|tcgen05\.mma\S*kind::i8",
    "fp8": r"mma\S*\.e4m3\.e4m3|tcgen05\.mma\S*kind::f8f6f4",
    "half": r"mma\S*\.f16\.f16|tcgen05\.mma\S*kind::f16",
}
KEPT_DAYS = 30
RECORD = HERE / "compiled.json"
ABOVE_KERNELS = ("api.py", "cpu.py")
"""Modules of sage_kernels that no kernel imports (tests/test_layout.py)."""


@dataclass(frozen=True)
class Unit:
    """What one process compiles."""

    capability: int
    head_dim: int
    k_bits: int

    def __str__(self) -> str:
        return f"sm_{self.capability}-d{self.head_dim}-k{self.k_bits}"


def units(capabilities: list[int]) -> list[Unit]:
    """All units of these compute capabilities, those that take longest first."""
    found = [Unit(each, head_dim, k_bits) for each in capabilities for head_dim in HEAD_DIMS for k_bits in (8, 4)]
    return sorted(found, key=lambda unit: (unit.head_dim != 128, unit.capability != 90, -unit.head_dim))


def when_it_starts(ptx: str) -> str:
    """What all programs of a kernel that may start before the one before it ends do first: they wait for it, or "run"."""
    runs = r"\b(ld|st|red|atom|cp)\S*\.global|\bbra\b|\bret\b"  # or part before they wait
    wait, other = (re.search(pattern, ptx) for pattern in (r"griddepcontrol\.wait", runs))
    assert other, "a kernel that touches no memory"
    return "waits" if wait and wait.start() < other.start() else "runs"


def compile_unit(unit: Unit, folder: Path | None = None) -> list[dict[str, Any]]:
    """Compile what `launches` has for a unit, in a process that compiles nothing else. Writes disassemblies into `folder`.

    Returns for each kernel launched: its name and case, which matrix instructions it uses, its shared memory in bytes and
    `starts`: "waits" or "runs" (see `when_it_starts`), or "alone" where it starts after the kernel before it.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class CompilingDriver:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", unit.capability, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)

    assert "sage_kernels.portable" not in sys.modules, "kernels that were imported before do not see the imitated device"
    driver.set_active(CompilingDriver())
    imitate_device(unit.capability)
    compiled: list[dict[str, Any]] = []
    names: Counter[str] = Counter()
    texts: dict[str, tuple[str, str]] = {}
    run = JITFunction.run
    case = ""

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        ptx = kernel.asm["ptx"]
        name = "hopper " * ("hopper" in self.__module__) + self.__name__.strip("_").removesuffix("_kernel")
        compiled.append(
            {
                "kernel": name,
                "head_dim": unit.head_dim,
                "k_bits": unit.k_bits,
                "mask": case,
                "uses": [name for name, pattern in INSTRUCTIONS.items() if re.search(pattern, ptx)],
                "shared": kernel.metadata.shared,
                "starts": when_it_starts(ptx) if kernel.metadata.launch_pdl else "alone",
            }
        )
        if folder is not None:
            label = "-".join([name, f"d{unit.head_dim}", f"k{unit.k_bits}", *filter(None, [case])]).replace(" ", "_")
            names[label] += 1
            if names[label] > 1:
                label += f"-{names[label]}"
            if kernel.hash not in texts:
                texts[kernel.hash] = disassembled(kernel, self.__name__)
            suffix, text = texts[kernel.hash]
            (folder / f"{label}{suffix}").write_text(text)

    JITFunction.run = compile_only
    try:
        for name, launch in launches(unit.capability, unit.head_dim, unit.k_bits):
            case = name
            launch()
    finally:
        JITFunction.run = run
    return compiled


def disassembler(name: str) -> str | None:
    """The path of nvdisasm or cuobjdump."""
    import triton.backends.nvidia

    bundled = Path(triton.backends.nvidia.__file__).parent / "bin" / name if triton.backends.nvidia.__file__ else None
    return shutil.which(name) or (str(bundled) if bundled and bundled.exists() else None)


def disassembled(kernel: Any, name: str) -> tuple[str, str]:
    """ ".sass" and the kernel's machine code, or ".ptx" and its PTX where there is no disassembler. The first line is a comment
    with `name` and the kernel's resources as JSON."""
    resources = {"kernel": name, "warps": kernel.metadata.num_warps, "shared": kernel.metadata.shared}
    nvdisasm, cuobjdump = disassembler("nvdisasm"), disassembler("cuobjdump")
    if not nvdisasm or not cuobjdump:
        return ".ptx", f"// {json.dumps(resources)}\n{kernel.asm['ptx']}"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        text = subprocess.run([nvdisasm, "-c", cubin.name], check=True, capture_output=True, text=True).stdout
        usage = subprocess.run([cuobjdump, "-res-usage", cubin.name], check=True, capture_output=True, text=True).stdout
    for resource, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage):
        resources[{"REG": "registers", "STACK": "stack", "LOCAL": "local"}[resource]] = int(value)
    return ".sass", f"// {json.dumps(resources)}\n{text}"


# --- The cache of results -----------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sage-backend" / "compile"


def code_of(path: Path) -> str:
    """A module's source without comments and docstrings."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):  # that of a lambda is none
            said = [each for each in body if isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant)]
            node.body = [each for each in body if each not in said]  # type: ignore[attr-defined]
    return ast.unparse(tree)


def sources_hash() -> str:
    """A hash of everything that decides about the code: the kernels, what they import, the launches, this file and Triton."""
    import triton

    specs = (importlib.util.find_spec(package) for package in ("sage_kernels", "sage_paged"))
    packages = [Path(spec.origin).parent for spec in specs if spec and spec.origin]
    assert len(packages) == 2, "sage_kernels and sage_paged must be installed"
    digest = hashlib.sha256(triton.__version__.encode())
    for path in sorted(chain(*(package.rglob("*.py") for package in packages), HERE.glob("*.py"))):
        if not path.name.startswith("test_") and path.name not in ABOVE_KERNELS:
            digest.update(f"{path.name}\n{code_of(path)}\n".encode())
    return digest.hexdigest()[:20]


def read_record(digest: str) -> dict[str, list[dict[str, Any]]]:
    """The units of compiled.json, or none if they are of other sources."""
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {"sources": None}
    if record["sources"] == digest:
        return record["units"]
    print(f"{RECORD.name} is of other sources: update it with --record before you commit", file=sys.stderr, flush=True)
    return {}


def write_record(digest: str, compiled: dict[Unit, list[dict[str, Any]]]) -> None:
    units = ",\n".join(f"  {json.dumps(str(unit))}: {json.dumps(kernels)}" for unit, kernels in compiled.items())
    RECORD.write_text(f'{{"sources": "{digest}", "units": {{\n{units}\n}}}}\n')


def load(unit: Unit, digest: str) -> list[dict[str, Any]] | None:
    try:
        return json.loads((cache_folder() / f"{unit}-{digest}.json").read_text())
    except (OSError, ValueError):
        return None


def save(unit: Unit, digest: str, compiled: list[dict[str, Any]]) -> None:
    """Keep a unit's result, and forget those that were made long ago. A cache that cannot be written is no error."""
    path = cache_folder() / f"{unit}-{digest}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(compiled))
        unfinished.replace(path)
        for other in path.parent.iterdir():
            if time.time() - other.stat().st_mtime > KEPT_DAYS * 86400:
                other.unlink(missing_ok=True)
    except OSError:
        pass


def compile_all(
    wanted: list[Unit], digest: str, known: dict[Unit, list[dict[str, Any]]], folder: Path | None = None
) -> dict[Unit, list[dict[str, Any]]]:
    """What became of the kernels of all units that are wanted; those of units that are known are not compiled.

    Prints progress on stderr. Raises what a compilation raised."""
    # Loaded here once, and not by each process that is forked from this one. The kernels themselves are imported by each,
    # after `imitate_device`.
    import torch  # noqa: F401
    import triton.experimental.gluon  # noqa: F401
    from triton.runtime.cache import triton_key

    triton_key()  # reads all of Triton
    began = time.monotonic()
    compiled = dict(known)
    waiting = [unit for unit in wanted if unit not in known]
    processes = len(os.sched_getaffinity(0))
    if waiting:
        print(f"compiling {len(waiting)} of {len(wanted)} units, {processes} at once", file=sys.stderr, flush=True)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
        futures = {pool.submit(_compile_in_fork, unit, folder): unit for unit in waiting}
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                unit = futures[future]
                compiled[unit], seconds = future.result()
                save(unit, digest, compiled[unit])
                progress = f"{time.monotonic() - began:4.0f} s  {done}/{len(waiting)}  {unit}"
                print(f"  {progress}: {len(compiled[unit])} launches, {seconds:.0f} s of a core", file=sys.stderr, flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {unit: compiled[unit] for unit in wanted}


def _compile_in_fork(unit: Unit, folder: Path | None) -> tuple[list[dict[str, Any]], float]:
    """`compile_unit` in a child of its own: Triton keeps what it compiled for one target, and would take it for another.

    Returns the result, and the seconds that processors spent on it."""
    receive, send = multiprocessing.Pipe(duplex=False)
    pid = os.fork()
    if pid == 0:
        try:
            send.send(compile_unit(unit, folder))
        except BaseException as error:
            send.send(RuntimeError(f"{unit}: {type(error).__name__}: {error}"))
        finally:
            os._exit(0)
    send.close()
    try:
        result = receive.recv()
    except EOFError:
        result = RuntimeError(f"{unit}: the compiler died")
    _, _, usage = os.wait4(pid, 0)
    if isinstance(result, Exception):
        raise result
    return result, usage.ru_utime + usage.ru_stime


# --- The comparison -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Code:
    resources: dict[str, int]
    instructions: list[str]

    @staticmethod
    def read(path: Path) -> "Code":
        """The instructions of a file that `disassembled` made, without addresses, comments, names and line numbers."""
        header, text = path.read_text().split("\n", 1)
        resources = json.loads(header.removeprefix("// "))
        text = text.replace(resources.pop("kernel"), "KERNEL")
        labels: dict[str, str] = {}
        instructions = []
        for line in text.splitlines():
            line = re.sub(r"/\*.*?\*/|//.*", "", line).strip().rstrip(";").strip()
            line = re.sub(r"\.L_x_\d+|\$L__\w+", lambda match: labels.setdefault(match[0], f"L{len(labels)}"), line)
            is_code = path.suffix == ".sass" and not line.startswith(".")
            is_ptx = path.suffix == ".ptx" and not re.match(r"\.(loc|file|section|b8|b32|b64|version|target)\b", line)
            if line and (is_code or is_ptx):
                instructions.append(re.sub(r"\s+", " ", line))
        return Code(resources, instructions)

    def without_parameters(self) -> list[str]:
        """The instructions without the places of the kernel's parameters, which change with their order."""
        return [re.sub(r"c\[0x0\]\[0x[0-9a-f]+\]", "c[PARAMETER]", line) for line in self.instructions]

    def opcodes(self) -> list[str]:
        return [re.sub(r"^@!?U?P\w+ ", "", line).split(" ")[0] for line in self.instructions]


def difference(old: Code, new: Code) -> str:
    """What differs, in words; "" if nothing does."""
    found = []
    if old.resources != new.resources:
        both = old.resources | new.resources
        changed = (name for name in both if old.resources.get(name) != new.resources.get(name))
        found.append(", ".join(f"{name} {old.resources.get(name)} -> {new.resources.get(name)}" for name in changed))
    if old.instructions != new.instructions:
        if old.without_parameters() == new.without_parameters():
            found.append("only the places of parameters")
        elif old.opcodes() == new.opcodes():
            count = sum(a != b for a, b in zip(old.without_parameters(), new.without_parameters(), strict=True))
            found.append(f"same opcodes in the same order, other operands in {count} of {len(old.instructions)} instructions")
        else:
            before, after = Counter(old.opcodes()), Counter(new.opcodes())
            changes = [f"{after[each] - before[each]:+d} {each}" for each in before | after if after[each] != before[each]]
            sizes = f"{len(old.instructions)} -> {len(new.instructions)} instructions"
            found.append(f"{sizes} ({', '.join(changes[:12]) or 'the same ones in another order'})")
    return "; ".join(found)


def compare(old_folder: Path, new_folder: Path) -> int:
    """Print which kernels differ. Returns the number of those whose instructions or resources do.

    Kernels are matched by the name of their launch. One that only one folder has is matched with equal code of any name.
    """
    old, new = ({path.name: Code.read(path) for path in sorted(each.glob("*.*"))} for each in (old_folder, new_folder))
    same = moved = differ = 0
    for name in sorted(old.keys() & new.keys()):
        what = difference(old[name], new[name])
        if not what:
            same += 1
        elif what == "only the places of parameters":
            moved += 1
        else:
            differ += 1
            print(f"{name}: {what}")
    for name in sorted(old.keys() ^ new.keys()):
        mine, others, where = (old, new, "old") if name in old else (new, old, "new")
        twins = [each for each, code in others.items() if difference(mine[name], code) in ("", "only the places of parameters")]
        if twins:
            print(f"{name}: only in the {where} folder, same code as {twins[0]} in the other")
        else:
            differ += 1
            print(f"{name}: only in the {where} folder")
    print(f"{same} the same, {moved} the same but for the places of parameters, {differ} differ")
    return differ


def summarize(capability: int, kernels: list[dict[str, Any]]) -> bool:
    """Print what was compiled. Returns whether a kernel needs more shared memory than there is."""
    most, room = max(kernel["shared"] for kernel in kernels), SHARED_KIB[capability] * 1024
    print(f"sm_{capability}: {len(kernels)} launches compiled; the largest needs {most:,} of {room:,} bytes of shared memory")
    return most > room


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capability", type=int, nargs="*", choices=[[], *SHARED_KIB], help="compute capability, such as 90")
    parser.add_argument("--head-dim", type=int, help="only this head size")
    parser.add_argument("--sass", type=Path, metavar="DIR", help="write disassemblies (of one capability)")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("OLD", "NEW"), help="compare two such folders")
    parser.add_argument("--record", action="store_true", help="write compiled.json")
    parser.add_argument("--spot-check", action="store_true", help="compile a unit that compiled.json has, and compare")
    parser.add_argument("--json", action="store_true", help="print what became of each kernel")
    arguments = parser.parse_args()
    if arguments.compare:
        sys.exit(compare(*arguments.compare) > 0)
    capabilities = arguments.capability or list(SHARED_KIB)
    if arguments.record and (set(capabilities) != set(SHARED_KIB) or arguments.head_dim):
        parser.error("--record takes all compute capabilities and head sizes")
    if arguments.sass:
        if len(capabilities) != 1:
            parser.error("--sass takes one capability")
        arguments.sass.mkdir(parents=True, exist_ok=True)
    wanted, digest = [unit for unit in units(capabilities) if arguments.head_dim in (None, unit.head_dim)], sources_hash()
    if not wanted:
        parser.error(f"--head-dim is none of {', '.join(str(size) for size in HEAD_DIMS)}")
    record = {} if arguments.record or arguments.head_dim else read_record(digest)
    known = {unit: kernels for unit in wanted if (kernels := load(unit, digest) or record.get(str(unit))) is not None}
    small = [unit for unit in units(list(SHARED_KIB)) if unit.head_dim < 128]
    checked = small[int(digest, 16) % len(small)]
    if arguments.spot_check:
        known.pop(checked, None)
    compiled = compile_all(wanted, digest, {} if arguments.sass else known, arguments.sass)
    if arguments.spot_check and checked in compiled and compiled[checked] != record.get(str(checked), compiled[checked]):
        sys.exit(f"error: {RECORD.name} is wrong about {checked}: update it with --record")
    if arguments.record:
        write_record(digest, compiled)
    by_capability = {each: [x for unit in wanted if unit.capability == each for x in compiled[unit]] for each in capabilities}
    if arguments.json:
        print(json.dumps(by_capability))
    else:
        too_large = [summarize(capability, kernels) for capability, kernels in by_capability.items()]
        sys.exit(any(too_large))


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    main()
