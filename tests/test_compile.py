"""Every Triton kernel compiles for every supported generation of GPUs, to the instructions meant, without a GPU.

`python tests/test_compile.py 90` does so for one compute capability, launching the kernels through the project's own functions
with a driver that only compiles, and prints what became of each. It is a process of its own because the other tests make
Triton interpret kernels.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest

HEAD_DIMS = dict.fromkeys((80, 89, 90, 100), (64, 80, 128, 256))
HEAD_DIMS[86] = (256,)  # the code of sm_80 in the shared memory of sm_89: what matters is whether the largest tiles fit
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227}
"""Shared memory that a program may use, by compute capability (CUDA C++ Programming Guide, technical specifications)."""
INSTRUCTIONS = {
    "int8": r"mma\S*\.s8\.s8|tcgen05\.mma\S*kind::i8",
    "fp8": r"mma\S*\.e4m3\.e4m3|tcgen05\.mma\S*kind::f8f6f4",
    "half": r"mma\S*\.f16\.f16|tcgen05\.mma\S*kind::f16",
}


def when_it_starts(ptx: str) -> str:
    """What all programs of a kernel that may start before the one before it ends do first: they wait for it, or "run"."""
    runs = r"\b(ld|st|red|atom|cp)\S*\.global|\bbra\b|\bret\b"  # or part before they wait
    wait, other = (re.search(pattern, ptx) for pattern in (r"griddepcontrol\.wait", runs))
    assert other, "a kernel that touches no memory"
    return "waits" if wait and wait.start() < other.start() else "runs"


def compile_all(capability: int) -> list[dict[str, Any]]:
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from sage_kernels import device
    from sage_paged import PageLayout

    class CompilingDriver:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)

    driver.set_active(CompilingDriver())
    device.fp8_path = lambda _: "native" if capability >= 89 else "half"  # type: ignore[assignment]
    early = {"PDL": True, "launch_pdl": True} if capability >= 90 else {"PDL": False}
    device.dependent_launch = lambda _: early  # type: ignore[assignment]
    device.shared_memory = lambda _: SHARED_KIB[capability] * 1024  # type: ignore[assignment]
    from sage_kernels import decode, prefill, recall, store
    from sage_kernels.reference import Turns
    from sage_paged import Memory

    def decode_by_its_own_kernel(*args: Any, **kwargs: Any) -> None:
        from sage_kernels import hopper_decode

        with mock.patch.object(decode, "choose_kernel", return_value=hopper_decode):
            decode.decode(*args, **kwargs)

    compiled = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        found = [name for name, pattern in INSTRUCTIONS.items() if re.search(pattern, kernel.asm["ptx"])]
        hopper = "hopper" in self.__module__
        name = self.__name__.strip("_").removesuffix("_kernel")
        of_kernel = {"kernel": "hopper " * hopper + name, **case, "uses": found, "shared": kernel.metadata.shared}
        compiled.append(of_kernel | {"starts": when_it_starts(kernel.asm["ptx"]) if kernel.metadata.launch_pdl else "alone"})

    JITFunction.run = compile_only
    starts, lengths, table = torch.tensor([0, 1]), torch.tensor([1]), torch.zeros(1, 2)
    starts, lengths, table = (x.to(torch.int32) for x in (starts, lengths, table))
    for head_dim in HEAD_DIMS[capability]:
        for k_bits in (8, 4):
            layout = PageLayout(head_dim, k_bits)
            pages = layout.empty(2, 2)
            key, query = torch.zeros(1, 2, head_dim, dtype=torch.bfloat16), torch.zeros(1, 8, head_dim, dtype=torch.bfloat16)
            case: dict[str, Any] = {"head_dim": head_dim, "k_bits": k_bits, "mask": ""}
            anchor = torch.zeros(2, head_dim)
            for smoothed in ({}, {"anchor": anchor}, {"anchor": anchor, "v_anchor": anchor}):
                store.store(key, key, pages, torch.zeros(1, dtype=torch.int64), layout, **smoothed)
            masks: dict[str, dict[str, Any]] = {"": {}}
            if head_dim == 256:  # whose tiles leave the least shared memory
                masks["means"] = {"smooth_q": True}
            if head_dim == 128:
                masks["sinks"] = {"sinks": torch.zeros(8), "anchor": anchor}
                masks["values"] = {"v_anchor": anchor}
                masks["all"] = {"window": 100, "soft_cap": 30.0, **masks["sinks"], **masks["values"]}
                masks["turns"] = {"turns": Turns(table.expand(2, 2).unsqueeze(0), torch.zeros(2, 128)), "anchor": anchor}
                masks["turned means"] = {**masks["turns"], "smooth_q": True}
                remembering = PageLayout(head_dim, k_bits, has_summary=True)
                where = remembering.empty(2, 2), remembering, table, lengths, starts
                recall.store_summaries(*where, 1, torch.zeros(2, 128), anchor)
                recall.recall(query, *where, Memory(), 512)
                long = *where[:2], torch.zeros(1, 2000, dtype=torch.int32), *where[3:]
                for query_block in (0, 512):
                    recall.recall(query, *long, Memory(), query_block)
                    recall.recall(query, *where, Memory(trained_tokens=8192), query_block, torch.zeros(2, 128))
            attentions = [prefill.prefill, decode.decode]
            if capability == 90:
                from sage_kernels import hopper, hopper_decode

                if hopper.supports(layout, 4):
                    attentions.append(hopper.prefill)
                if hopper_decode.supports(layout):
                    attentions.append(decode_by_its_own_kernel)
            for case["mask"], mask in masks.items():
                # Only the portable kernels turn queries, and of these only that for prompts takes off their means.
                for attention in attentions[: 1 if "smooth_q" in mask else 2 if "turns" in mask else None]:
                    attention(query, pages, layout, table, lengths, starts, 0.1, torch.empty_like(query), **mask)
    return compiled


@pytest.fixture(scope="module")
def compilers() -> Iterator[dict[int, subprocess.Popen[str]]]:
    """One process for each compute capability, all at once."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    processes = {each: subprocess.Popen([sys.executable, __file__, str(each)], **pipes) for each in SHARED_KIB}
    yield processes
    for process in processes.values():
        process.kill()


@pytest.fixture(scope="module", params=SHARED_KIB, ids=lambda capability: f"sm_{capability}")
def compiled(request: pytest.FixtureRequest, compilers: dict[int, subprocess.Popen[str]]) -> tuple[int, list[dict[str, Any]]]:
    output, errors = compilers[request.param].communicate(timeout=900)
    assert compilers[request.param].returncode == 0, errors[-3000:]
    return request.param, json.loads(output)


def test_all_kernels_compile(compiled: tuple[int, list[dict[str, Any]]]) -> None:
    capability, kernels = compiled
    for name in ("prefill", "decode", "merge", "store"):
        cases = {(kernel["head_dim"], kernel["k_bits"]) for kernel in kernels if kernel["kernel"] == name}
        assert len(cases) == 2 * len(HEAD_DIMS[capability]), name
    remembering = {"summary", "fold", "score", "narrow", "list"} & {kernel["kernel"] for kernel in kernels}
    assert len(remembering) == (5 if 128 in HEAD_DIMS[capability] else 0)


def test_a_kernel_that_starts_early_first_waits(compiled: tuple[int, list[dict[str, Any]]]) -> None:
    capability, kernels = compiled
    assert [kernel for kernel in kernels if kernel["starts"] == "runs"] == []
    early = {kernel["kernel"] for kernel in kernels if kernel["starts"] == "waits"}
    own = {"hopper decode"} if capability == 90 else set()
    recalling = {"summary", "fold", "score", "narrow", "list"} if 128 in HEAD_DIMS[capability] else set()
    assert early == ({"store", "decode", "merge"} | recalling | own if capability >= 90 else set())


def test_shared_memory_suffices(compiled: tuple[int, list[dict[str, Any]]]) -> None:
    capability, kernels = compiled
    assert [kernel for kernel in kernels if kernel["shared"] > SHARED_KIB[capability] * 1024] == []


def test_tensor_cores_are_used(compiled: tuple[int, list[dict[str, Any]]]) -> None:
    """INT8 instructions for Q K^T everywhere; FP8 ones for P V where there are any, else FP16.

    Portable decoding has fewer rows than the asynchronous instructions of sm_90 and later take, and with those of before
    Triton widens FP8 to FP16 there.
    """
    capability, kernels = compiled
    pv = {"decode": "fp8" if capability == 89 else "half", "prefill": "fp8" if capability >= 89 else "half"}
    pv |= {"hopper decode": "fp8", "hopper prefill": "fp8"}
    attentions = [(kernel, pv[kernel["kernel"]]) for kernel in kernels if kernel["kernel"] in pv]
    assert attentions
    assert [kernel for kernel, instruction in attentions if kernel["uses"] != ["int8", instruction]] == []


if __name__ == "__main__":
    print(json.dumps(compile_all(int(sys.argv[1]))))
