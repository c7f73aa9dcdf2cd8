# SPDX-License-Identifier: Apache-2.0
"""The launches that are compiled without a GPU (machine_code.py does it): every kernel, head size and key precision, and each
feature that changes a kernel's code.

This is the one list of them. Whoever adds a kernel, or a feature that is a constant of a kernel, adds a launch here.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99, 121: 99}
"""Shared memory that a program may use, by compute capability (CUDA C++ Programming Guide, technical specifications)."""
HEAD_DIMS = (64, 80, 128, 192, 256, 512)

Launch = tuple[str, Callable[[], Any]]
"""The name of a case, unique for its kernel, head size and key precision, and the call that launches the kernels."""


def imitate_device(capability: int) -> None:
    """Make sage_kernels choose for a GPU of this compute capability, although its tensors are on the CPU."""
    from sage_kernels import device

    early = {"PDL": True, "launch_pdl": True} if capability >= 90 else {"PDL": False}
    device.fp8_path = lambda _: "native" if capability >= 89 and capability != 121 else "half"  # type: ignore[assignment]
    device.multiplies_by_warp = lambda _: capability < 90 or capability >= 120  # type: ignore[assignment]
    device.dependent_launch = lambda _: early  # type: ignore[assignment]
    device.shared_memory = lambda _: SHARED_KIB[capability] * 1024  # type: ignore[assignment]


def launches(capability: int, head_dim: int, k_bits: int) -> Iterator[Launch]:
    """Every launch of this head size and key precision. Call `imitate_device` first."""
    import torch

    from sage_kernels import LayerCalibration, Modifiers, PageCache, PagedBatch, PageLayout, RopeShift
    from sage_kernels.portable import decode, page_cache, prefill, store
    from sage_paged import MAX_V_INT4_DIM

    starts, lengths, table = (torch.zeros(*shape, dtype=torch.int32) for shape in ((2,), (1,), (1, 2)))
    batch = PagedBatch(table, lengths, starts)
    layout = PageLayout(head_dim, k_bits, 64 if head_dim == 512 and capability in (86, 121) else 128)
    pages = layout.empty(2, 2)
    key, query = torch.zeros(1, 2, head_dim, dtype=torch.bfloat16), torch.zeros(1, 8, head_dim, dtype=torch.bfloat16)
    anchor, equalizer, order = torch.zeros(2, head_dim), torch.ones(2, head_dim), torch.zeros(2, head_dim // 2).int()
    keys, values = (LayerCalibration(anchor, equalizer, order, of_values) for of_values in (None, anchor))

    slots = torch.zeros(1, dtype=torch.int64)
    for name, calibration in {"": LayerCalibration(), "keys": keys, "values": values}.items():
        yield name, partial(store.store, key, key, pages, slots, layout, calibration)

    attentions = attention_functions(capability, layout)
    if head_dim <= MAX_V_INT4_DIM:
        narrow = replace(layout, v_bits=4)
        narrow_pages = narrow.empty(2, 2)
        yield "narrow values", partial(store.store, key, key, narrow_pages, slots, narrow, values)
        for attention in attentions:
            out = torch.empty_like(query)
            yield "narrow values", partial(attention, query, narrow_pages, narrow, batch, 0.1, out, Modifiers(calibration=keys))

    block = prefill.tile(query.device, layout, 4, smooth_q=True)[0] // 4
    cases: dict[str, tuple[PagedBatch, Modifiers]] = {"": (batch, Modifiers(calibration=keys))}
    shifted = replace(batch, rope_shift=RopeShift(table.expand(2, 2).unsqueeze(0), torch.zeros(2, head_dim)))
    if head_dim >= 256:  # whose tiles leave the least shared memory
        cases["means"] = batch, Modifiers(calibration=keys, q_block=block)
    if head_dim >= 128:
        cases["turned means"] = shifted, Modifiers(calibration=keys, q_block=block)
    most = replace(batch, max_query_len=decode.max_rows(query.device, layout) // 4)
    yield "drafts", partial(attentions[1], query, pages, layout, most, 0.1, torch.empty_like(query), Modifiers())
    if head_dim == 128:
        cases["sinks"] = batch, Modifiers(sinks=torch.zeros(8), calibration=keys)
        cases["values"] = batch, Modifiers(calibration=values)
        cases["all"] = batch, Modifiers(100, 30.0, torch.zeros(8), values)
        cases["turns"] = shifted, Modifiers(calibration=keys)
        held = PageCache.allocate(2, 2, layout, 2)
        yield "frames", partial(store.store, key, key, pages, slots, layout, keys, held)
        yield "", partial(page_cache.fetch_pages, held, pages, layout, batch)
        yield from selection_launches(query, k_bits, batch, keys)

    for name, (where, modifiers) in cases.items():
        # Only portable prefill smooths queries, and for sm_90 decodes alone have no kernel that reads pages elsewhere.
        for attention in attentions[: 1 if modifiers.q_block else 3 if where.rope_shift else None]:
            yield name, partial(attention, query, pages, layout, where, 0.1, torch.empty_like(query), modifiers)
    if capability == 90 and len(attentions) > 2:
        for name in ("", "all", "turns")[: 3 if head_dim == 128 else 1]:
            yield from form_launches(attentions[2], name, query, pages, layout, *cases[name])


def form_launches(
    prefill: Callable[..., Any], name: str, query: Any, pages: Any, layout: Any, batch: Any, modifiers: Any
) -> Iterator[Launch]:
    """Prefill for sm_90, in each of its forms."""
    import torch

    for form, context in contexts(layout.head_dim):
        table = torch.zeros(1, -(-context // layout.tokens), dtype=torch.int32)
        shift = batch.rope_shift and replace(batch.rope_shift, pages=table.expand(1, 2, -1))
        where = replace(batch, block_table=table, rope_shift=shift)
        yield (
            f"{form} {name}".strip(),
            partial(prefill, query, pages, layout, where, 0.1, torch.empty_like(query), modifiers),
        )


def contexts(head_dim: int) -> Iterator[tuple[str, int]]:
    """The forms of the prefill kernel for sm_90, each with tokens of context for which it is chosen."""
    from sage_kernels.hopper import prefill

    names = {prefill.SINGLE: "single", prefill.COOPERATIVE: "cooperative"}
    for most, form in prefill.FORMS[head_dim]:
        yield names[form], most
    yield "pingpong", most + 1


def selection_launches(query: Any, k_bits: int, batch: Any, keys: Any) -> Iterator[Launch]:
    """Those of memory: summaries, and the choice of pages."""
    import torch

    from sage_kernels import Memory, PageLayout
    from sage_kernels.portable import recall

    cache = (layout := PageLayout(query.shape[2], k_bits, has_summary=True)).empty(2, 2), layout
    yield "", partial(recall.store_summaries, *cache, batch, 1, torch.zeros(2, 128), keys)
    yield "", partial(recall.select_pages, query, *cache, batch, Memory(), 512)
    long = replace(batch, block_table=torch.zeros(1, 2000, dtype=torch.int32))
    own, room = replace(long, topk_pages=batch.seq_lens), Memory(max_topk_pages=128, whole=True)
    for query_block in (0, 512):
        yield f"long {query_block}", partial(recall.select_pages, query, *cache, long, Memory(), query_block)
        yield f"own {query_block}", partial(recall.select_pages, query, *cache, own, room, query_block)
        trained = batch, Memory(trained_tokens=8192), query_block, torch.zeros(2, 128)
        yield f"trained {query_block}", partial(recall.select_pages, query, *cache, *trained)


def attention_functions(capability: int, layout: Any) -> list[Callable[..., Any]]:
    """The portable functions, of prefill and of decode, and those for sm_90 that take this layout."""
    from sage_kernels.portable import decode, prefill

    found: list[Callable[..., Any]] = [prefill.prefill, decode.decode]
    if capability == 90:
        from sage_kernels.hopper import decode as hopper_decode
        from sage_kernels.hopper import prefill as hopper_prefill

        if hopper_prefill.supports(layout, 4):
            found.append(hopper_prefill.prefill)
        if hopper_decode.supports(layout):
            found.append(hopper_decode.decode)
    return found
