# SPDX-License-Identifier: Apache-2.0
"""The launches that are compiled without a GPU (machine_code.py does it): every kernel, head size and key precision, and each
feature that changes a kernel's code.

This is the one list of them. Whoever adds a kernel, or a feature that is a constant of a kernel, adds a launch here.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227}
"""Shared memory that a program may use, by compute capability (CUDA C++ Programming Guide, technical specifications)."""
HEAD_DIMS = dict.fromkeys((80, 89, 90, 100), (64, 80, 128, 256))
HEAD_DIMS[86] = (256,)  # the code of sm_80 in the shared memory of sm_89: what matters is whether the largest tiles fit

Launch = tuple[str, Callable[[], Any]]
"""The name of a case, unique for its kernel, head size and key precision, and the call that launches the kernels."""


def imitate_device(capability: int) -> None:
    """Make sage_kernels choose for a GPU of this compute capability, although its tensors are on the CPU."""
    from sage_kernels import device

    early = {"PDL": True, "launch_pdl": True} if capability >= 90 else {"PDL": False}
    device.fp8_path = lambda _: "native" if capability >= 89 else "half"  # type: ignore[assignment]
    device.dependent_launch = lambda _: early  # type: ignore[assignment]
    device.shared_memory = lambda _: SHARED_KIB[capability] * 1024  # type: ignore[assignment]


def launches(capability: int, head_dim: int, k_bits: int) -> Iterator[Launch]:
    """Every launch of this head size and key precision. Call `imitate_device` first."""
    import torch

    from sage_kernels import decode, prefill, recall, store
    from sage_kernels.reference import Turns
    from sage_paged import Memory, PageLayout

    def decode_by_its_own_kernel(*args: Any, **kwargs: Any) -> None:
        from sage_kernels import hopper_decode

        with mock.patch.object(decode, "choose_kernel", return_value=hopper_decode):
            decode.decode(*args, **kwargs)

    starts, lengths, table = torch.tensor([0, 1]), torch.tensor([1]), torch.zeros(1, 2)
    starts, lengths, table = (x.to(torch.int32) for x in (starts, lengths, table))
    layout = PageLayout(head_dim, k_bits)
    pages = layout.empty(2, 2)
    key, query = torch.zeros(1, 2, head_dim, dtype=torch.bfloat16), torch.zeros(1, 8, head_dim, dtype=torch.bfloat16)
    anchor = torch.zeros(2, head_dim)

    slots = torch.zeros(1, dtype=torch.int64)
    for name, smoothed in {"": {}, "anchor": {"anchor": anchor}, "values": {"anchor": anchor, "v_anchor": anchor}}.items():
        yield name, partial(store.store, key, key, pages, slots, layout, **smoothed)

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
        yield "", partial(recall.store_summaries, *where, 1, torch.zeros(2, 128), anchor)
        yield "", partial(recall.recall, query, *where, Memory(), 512)
        long = *where[:2], torch.zeros(1, 2000, dtype=torch.int32), *where[3:]
        for query_block in (0, 512):
            trained = Memory(trained_tokens=8192)
            yield f"long {query_block}", partial(recall.recall, query, *long, Memory(), query_block)
            yield f"trained {query_block}", partial(recall.recall, query, *where, trained, query_block, torch.zeros(2, 128))

    attentions: list[Callable[..., Any]] = [prefill.prefill, decode.decode]
    if capability == 90:
        from sage_kernels import hopper, hopper_decode

        if hopper.supports(layout, 4):
            attentions.append(hopper.prefill)
        if hopper_decode.supports(layout):
            attentions.append(decode_by_its_own_kernel)
    for name, mask in masks.items():
        # Only the portable kernels turn queries, and of these only that for prompts takes off their means.
        for attention in attentions[: 1 if "smooth_q" in mask else 2 if "turns" in mask else None]:
            out = torch.empty_like(query)
            yield name, partial(attention, query, pages, layout, table, lengths, starts, 0.1, out, **mask)
