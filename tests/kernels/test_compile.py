# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel compiles for every supported generation of GPUs, to the instructions meant, without a GPU.

machine_code.py does it, in processes of its own because the other tests make Triton interpret kernels.
"""

import json
import os
import subprocess
import sys
from typing import Any

import machine_code
import pytest
from launches import HEAD_DIMS, SHARED_KIB

pytestmark = pytest.mark.timeout(0)  # on a busy machine compiling takes as long as it takes; the compiler itself never hangs


@pytest.fixture(scope="module")
def compiled_for() -> dict[str, list[dict[str, Any]]]:
    """What became of the kernels, by compute capability: all are compiled at once, or taken from a cache but for one unit."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, machine_code.__file__, "--json", "--spot-check"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


MEMORY = {"summary", "fold", "score", "finalists", "list", "find", "evict", "copy"}
"""The kernels of memory, those of pages in host memory included."""


@pytest.fixture(scope="module", params=SHARED_KIB, ids=lambda capability: f"sm_{capability}")
def compiled(request: pytest.FixtureRequest, compiled_for: dict[str, list[dict[str, Any]]]) -> tuple[int, list[dict[str, Any]]]:
    return request.param, compiled_for[str(request.param)]


def test_all_kernels_compile(compiled: tuple[int, list[dict[str, Any]]]) -> None:
    _, kernels = compiled
    for name in ("prefill", "decode", "merge", "store"):
        cases = {(kernel["head_dim"], kernel["k_bits"]) for kernel in kernels if kernel["kernel"] == name}
        assert len(cases) == 2 * len(HEAD_DIMS), name
    assert {kernel["kernel"] for kernel in kernels} >= MEMORY


def test_a_kernel_that_starts_early_first_waits(compiled: tuple[int, list[dict[str, Any]]]) -> None:
    capability, kernels = compiled
    assert [kernel for kernel in kernels if kernel["starts"] == "runs"] == []
    early = {kernel["kernel"] for kernel in kernels if kernel["starts"] == "waits"}
    own = {"hopper decode"} if capability == 90 else set()
    assert early == ({"store", "decode", "merge"} | MEMORY | own if capability >= 90 else set())


def test_shared_memory_suffices(compiled: tuple[int, list[dict[str, Any]]]) -> None:
    capability, kernels = compiled
    assert [kernel for kernel in kernels if kernel["shared"] > SHARED_KIB[capability] * 1024] == []
    twice = [kernel for kernel in kernels if kernel["mask"].startswith("single")]
    assert bool(twice) == (capability == 90)
    assert [kernel for kernel in twice if 2 * (kernel["shared"] + 1024) > 228 * 1024] == []  # two programs a multiprocessor


def test_tensor_cores_are_used(compiled: tuple[int, list[dict[str, Any]]]) -> None:
    """INT8 instructions for Q K^T everywhere; FP8 ones for P V where there are any, else FP16.

    Portable decoding, if not of many drafts, has fewer rows than the asynchronous instructions of sm_90 and sm_100 take, and
    with those of before Triton widens FP8 to FP16 there. sm_89 and sm_120 have others.
    """
    capability, kernels = compiled
    has_fp8 = capability >= 89 and capability != 121  # for which Triton 3.6 has no FP8 instructions
    pv = {"decode": "fp8" if capability in (89, 120) else "half", "prefill": "fp8" if has_fp8 else "half"}
    pv |= {"hopper decode": "fp8", "hopper prefill": "fp8"}
    pv["drafts"] = pv["prefill"]
    attentions = [
        (kernel, pv["drafts" if kernel["mask"] == "drafts" else kernel["kernel"]])
        for kernel in kernels
        if kernel["kernel"] in pv
    ]
    assert attentions
    assert [kernel for kernel, instruction in attentions if kernel["uses"] != ["int8", instruction]] == []
