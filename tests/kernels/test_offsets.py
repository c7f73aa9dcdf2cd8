# SPDX-License-Identifier: Apache-2.0
"""Tensors of more than 2**32 bytes: a cache, and the queries, keys, values and outputs of a step.

Reports of this kind: a kernel multiplies a block number by a stride in 32 bits, and large caches or large steps give wrong
answers or a crash. On a CPU, the memory is reserved, and only the few pages that are touched exist.
"""

import mmap
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_cases import ON_GPU
from paged_batch import Batch, make_batch, poisoned

from sage_kernels import Modifiers, cpu, reference
from sage_paged import K_BITS, Memory, PageLayout

FAR = 1 << 32
"""Bytes, or elements of 16 bits, before what is far away. In 32 bits, signed or not, its offset would be that of something else
in the same memory: a wrong offset gives a wrong result, not a crash."""
REQUESTS = [(260, 3), (40, 1)]
MEMORY = Memory(sink_tokens=64, local_tokens=64, topk_pages=1, query_block=64)


def reserve(size: int, device: str) -> torch.Tensor:
    """uint8 [size], with any content on a GPU, and zeros that take no memory on a CPU."""
    if device != "cpu":
        return torch.empty(size, dtype=torch.uint8, device=device)
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # which Python names from 3.13 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=torch.uint8)


def far_cache(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """A cache in which every other block of the batch's is behind FAR, and where each block is, int64 [blocks]. The blocks hold
    the batch's garbage, and so does what 32 bits would take them for."""
    blocks, heads, size = batch.garbage.shape
    first = -(-FAR // (heads * size))
    pages = reserve((first + blocks) * heads * size, batch.garbage.device.type).view(-1, heads, size)
    place = torch.arange(blocks) + torch.arange(blocks) % 2 * first
    pages[:blocks] = batch.garbage
    pages[first:] = batch.garbage
    return pages, place.to(batch.garbage.device)


def far_rows(tokens: int, channels: int, row: int, device: str) -> torch.Tensor:
    """bfloat16 [tokens, channels], rows `row` elements apart. Where 32 bits would put the late ones, there is memory, too."""
    memory = reserve((FAR // 2 + tokens * row) * 2, device).view(torch.bfloat16)
    return memory[FAR // 2 :].view(tokens, row)[:, :channels]


def moved(batch: Batch, pages: torch.Tensor, place: torch.Tensor) -> Batch:
    """The batch with its blocks in `pages`, at `place`."""
    tokens, used = batch.layout.tokens, batch.slots >= 0
    slots = torch.where(used, place[batch.slots.clamp(min=0) // tokens] * tokens + batch.slots % tokens, -1)
    table = place[batch.requests.block_table.long()].int()
    return replace(batch, slots=slots, pages=pages, requests=replace(batch.requests, block_table=table))


def runs(kernels: Any) -> dict[str, tuple[Callable[..., None], dict[str, int]]]:
    return {
        "prefill": (kernels.prefill, {}),
        "decode": (kernels.decode, {"programs": 2}),
        **({} if ON_GPU else {"cpu": (cpu.attention, {})}),
    }


@pytest.mark.parametrize("k_bits", K_BITS)
def test_large_caches(kernels, k_bits: int) -> None:
    """Storing, summaries, the choice of pages and attention are the same, bit by bit, as in a small cache."""
    layout = PageLayout(64, k_bits, 64, has_summary=True)
    batch = make_batch(layout, REQUESTS, 2, 1, smooth=True, equalize=True, device=kernels.device)
    batch.requests = replace(batch.requests, max_query_len=3)
    pages, place = far_cache(batch)
    far = moved(batch, pages, place)
    far.query = far_rows(4, 2 * 64, FAR // 4, kernels.device).unflatten(1, (2, 64)).copy_(batch.query)
    assert int(place.max()) * pages.stride(0) > FAR
    modifiers = Modifiers(calibration=batch.calibration)
    stores = [kernels.store] if ON_GPU else [kernels.store, reference.store]
    for store in stores:
        pages[place] = batch.garbage
        for each, into in ((batch, batch.pages), (far, pages)):
            store(each.key, each.value, into, each.slots, layout, batch.calibration)
        assert torch.equal(pages[place], batch.pages)
    whole = torch.nn.functional.pad(batch.requests.seq_lens.cumsum(0), (1, 0)).int()
    lists = []
    for each in (batch, far):
        step = replace(each.requests, query_start_loc=whole)
        kernels.store_summaries(each.pages, layout, step, sum(n for n, _ in REQUESTS), None, batch.calibration)
        lists.append(kernels.select_pages(each.query, each.pages, layout, each.requests, MEMORY, MEMORY.query_block))
    assert torch.equal(pages[place], batch.pages)
    near_list, far_list = lists
    assert int(near_list.seq_lens.max()) < REQUESTS[0][0], "all pages are read, and none is chosen"
    assert torch.equal(far_list.seq_lens, near_list.seq_lens)
    assert torch.equal(far_list.block_table, place[near_list.block_table.long()].int())
    for name, (run, options) in runs(kernels).items():
        outputs: list[torch.Tensor] = []
        for each in (batch, far):
            outputs.append(poisoned(each.query))
            run(*each.attention_args(), outputs[-1], modifiers, **options)
        assert not outputs[0].isnan().any()
        assert torch.equal(*outputs), name


@pytest.mark.parametrize("k_bits", K_BITS)
def test_large_steps(kernels, k_bits: int) -> None:
    """Queries, keys, values and outputs side by side in one tensor, as some models have them, with rows so long that those of
    late tokens are behind FAR: the same bits as with short rows."""
    batch = make_batch(PageLayout(64, k_bits, 64), [(3, 3), (142, 14)], 2, 1, smooth=True, equalize=True, device=kernels.device)
    batch.requests = replace(batch.requests, max_query_len=14)
    rows = far_rows(18, 384, FAR // 16, kernels.device)
    parts = [rows[:, low:high].unflatten(1, (-1, 64)) for low, high in ((0, 128), (128, 192), (192, 256), (256, 384))]
    query, key, value, out = parts
    earlier, late = slice(-18), slice(-18, None)  # the last of them is padding
    query[:17], key[:], value[:] = batch.query, batch.key[late], batch.value[late]
    for store in [kernels.store] if ON_GPU else [kernels.store, reference.store]:
        near, far = batch.garbage.clone(), batch.garbage.clone()
        for pages in (near, far):
            store(batch.key[earlier], batch.value[earlier], pages, batch.slots[earlier], batch.layout, batch.calibration)
        store(batch.key[late], batch.value[late], near, batch.slots[late], batch.layout, batch.calibration)
        store(key, value, far, batch.slots[late], batch.layout, batch.calibration)
        assert torch.equal(far, near)
    modifiers = Modifiers(calibration=batch.calibration)
    for name, (run, options) in runs(kernels).items():
        expected = torch.full_like(batch.query, float("nan"))
        run(*batch.attention_args(), expected, modifiers, **options)
        out.fill_(float("nan"))
        run(query[:17], batch.pages, batch.layout, batch.requests, batch.scale, out[:17], modifiers, **options)
        assert not expected.isnan().any()
        assert torch.equal(out[:17], expected), name
