# SPDX-License-Identifier: Apache-2.0
"""`sage doctor`: what it reports on this machine, on others, and where something is missing or broken."""

import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sage_backend.tools import doctor
from sage_backend.tools.doctor import FAIL, OK, WARN, Finding
from sage_kernels import KernelChoice


def run(*hidden: str, **environment: str) -> tuple[int, str]:
    """The exit status and output of `sage doctor` in a process that cannot import the modules `hidden`."""
    code = f"""
import sys
sys.modules.update(dict.fromkeys({hidden!r}))
sys.argv = ["sage", "doctor"]
from sage_backend.tools.cli import main
sys.exit(main())
"""
    # A new environment, so that settings of the tests have no effect.
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path), **environment}
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200, check=False)
    assert process.stderr == ""
    return process.returncode, process.stdout


def states(output: str) -> dict[str, str]:
    """The state of each finding, by its subject."""
    lines = [line.split() for line in output.splitlines() if line and not line.startswith((" ", "This machine"))]
    return {what: state for state, what, *_ in lines}


def test_this_machine() -> None:
    status, output = run()
    assert (status, set(states(output).values()) - {doctor.ABSENT}) == (0, {OK}), output
    assert {"Python", "torch", "device", "Triton", "vLLM", "plugin", "kernels"} < set(states(output))
    assert "sage_backend.engine.backend.SageBackend" in output
    assert output.count("\n") <= 24
    assert max(map(len, output.splitlines())) <= 120


@pytest.mark.parametrize(("hidden", "what"), [("torch", "torch"), ("vllm", "vLLM")])
def test_what_is_missing(hidden: str, what: str) -> None:
    status, output = run(hidden)
    assert status == 1
    assert states(output)[what] == FAIL
    assert "-> run deploy/setup.sh" in output
    assert output.endswith("This machine cannot serve yet.\n")


def test_a_vllm_that_does_not_work() -> None:
    """Not for want of this plugin: as with a torchvision that is built for another torch."""
    status, output = run("vllm.config")
    assert (status, states(output)["vLLM"]) == (1, FAIL)
    assert "with or without this plugin" in output
    assert "plugin" not in states(output)


def test_a_plugin_that_vllm_is_told_not_to_load() -> None:
    status, output = run(VLLM_PLUGINS="sage_cpu")
    assert (status, states(output)["plugin"]) == (1, FAIL)
    assert "VLLM_PLUGINS=sage_cpu keeps vLLM" in output


def test_entry_points_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: ())
    finding = doctor._plugin(on_cpu=True)
    assert finding.state == FAIL
    assert "pip install --no-deps ." in finding.remedy


@pytest.mark.parametrize(("version", "state"), [("0.32.0+cpu", OK), ("0.31.0", OK), ("0.33.0", OK), ("0.34.0", WARN)])
def test_vllm_that_was_not_tested(version: str, state: str) -> None:
    assert doctor._vllm_version(version).state == state


def broken() -> Any:
    raise RuntimeError("CUDA driver initialization failed\nand much more")


def on_gpu(capability: tuple[int, int], available: Callable[[], bool] = lambda: True) -> Any:
    """A torch that is built for CUDA, with one GPU."""
    cuda = SimpleNamespace(
        is_available=available,
        get_device_name=lambda: "a GPU",
        get_device_capability=lambda: capability,
        mem_get_info=lambda: (70 << 30, 80 << 30),
        device_count=lambda: 1,
    )
    return SimpleNamespace(version=SimpleNamespace(cuda="13.0"), cuda=cuda, device=torch.device)


@pytest.mark.parametrize(
    ("machine", "device", "text"),
    [
        (on_gpu((9, 0)), "cuda", "a GPU, sm_90, 80 GiB of which 70 are free"),
        (on_gpu((8, 0)), "cuda", "sm_80"),
        (on_gpu((7, 5)), None, "sm_75"),
        (on_gpu((9, 0), lambda: False), None, "finds no GPU"),
        (on_gpu((9, 0), broken), None, "CUDA driver initialization failed)"),
    ],
)
def test_gpus(machine: Any, device: str | None, text: str) -> None:
    found, finding = doctor._device(machine)
    assert (found and found.type, finding.state) == (device, OK if device else FAIL)
    assert text in finding.text
    assert bool(finding.remedy) == (device is None)


def test_a_gpu_that_torch_was_not_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_has_gpu", lambda: True)
    device, finding = doctor._device(SimpleNamespace(version=SimpleNamespace(cuda=None), device=torch.device))
    assert (device.type, finding.state) == ("cpu", WARN)
    assert "SAGE_DEVICE=cuda" in finding.remedy


@pytest.mark.parametrize(
    ("choice", "fp8", "state", "words"),
    [
        (KernelChoice("hopper", "hopper"), "native", OK, "prefill and decode Gluon"),
        (KernelChoice("portable", "portable", "gluon_missing"), "native", WARN, "Gluon cannot be imported"),
        (KernelChoice("portable", "portable"), "half", OK, "prefill and decode Triton; store Triton; FP16"),
    ],
)
def test_which_kernels(choice: Any, fp8: str, state: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sage_kernels.choose_kernels", lambda *_: choice)
    monkeypatch.setattr("sage_kernels.device.fp8_path", lambda _: fp8)
    finding = doctor._choice(torch.device("cuda"))
    assert finding.state == state
    assert words in finding.text


def test_kernels_are_compared_with_the_reference(kernels: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device(kernels.device)
    for name in ("store", "prefill", "decode"):  # on a CPU, Triton's kernels in the interpreter
        monkeypatch.setattr(f"sage_kernels.{'attend_' * (name != 'store')}{name}", getattr(kernels, name))
    assert "equal to the reference" in doctor.compile_kernels(device)
    monkeypatch.setattr("sage_kernels.attend_decode", lambda *_: None)
    with pytest.raises(RuntimeError, match="decode with 8-bit keys and 8-bit values is off by nan"):
        doctor.compile_kernels(device)


def test_kernels_that_do_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(device: torch.device) -> str:
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(doctor, "_choice", lambda device: Finding(OK, "kernels", ""))
    monkeypatch.setattr(doctor, "compile_kernels", no_compiler)
    *_, finding = doctor._kernels(torch.device("cuda"))
    assert finding.state == FAIL
    assert "apt install gcc" in finding.remedy
