# SPDX-License-Identifier: Apache-2.0
"""Pages into frames on a GPU (`sage_kernels.page_cache`). Three launches find what is missing, make room, and copy.

All grids follow from shapes alone and nothing is read back, so that all of it can be captured in a CUDA graph.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from sage_kernels.batch import PagedBatch
from sage_kernels.device import dependent_launch
from sage_kernels.page_cache import PageCache
from sage_kernels.portable.primitives import INTERPRETED, TABLE_STRIDES, TABLES, await_previous_kernel
from sage_kernels.reference import EVICTION_WINDOW
from sage_kernels.reference import MAX_AGE as _MAX_AGE
from sage_paged import PageLayout

MAX_AGE = tl.constexpr(_MAX_AGE)
_AGE_BITS = tl.constexpr(_MAX_AGE.bit_length())
QUEUED = tl.constexpr(-2)
"""In the page table while a fetch runs: the page has no frame yet, and is in the queue."""
_ENTRIES = 256
"""Entries of page lists that a program looks up."""
_COPIERS = 32
"""Programs a KV head that copy. Together they have to keep enough bytes in flight for a bus with a latency of microseconds."""
_WORDS = 1024
"""Words of four bytes that a program copies at a time."""


@triton.jit
def _entries(table, seq_lens, head, part, rows, width, row_stride, head_stride, PAGE: tl.constexpr, ENTRIES: tl.constexpr):
    """Part of the page lists of a batch: places in them, int32 [ENTRIES], the pages there, and whether the batch reads them."""
    place = part * ENTRIES + tl.arange(0, ENTRIES)
    row, nth = place // width, place % width
    read = row < rows
    read = read & (nth * PAGE < tl.load(seq_lens + row, mask=read, other=0))
    pointers = table + row.to(tl.int64) * row_stride + head.to(tl.int64) * head_stride + nth
    return place, tl.load(pointers, mask=read, other=0), read


@triton.jit(do_not_specialize=["rows", "width", *TABLE_STRIDES], do_not_specialize_on_alignment=TABLES)
def _find_kernel(
    block_table, seq_lens, frame_of, last_use, clock, queue, queued, times, rows, width, frames, table_stride,
    table_head_stride, PAGE: tl.constexpr, ENTRIES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (parts of the page lists, KV heads). Note the time in frames that are read, and queue pages that have none."""
    await_previous_kernel(PDL)
    head, heads = tl.program_id(1), tl.num_programs(1)
    if tl.program_id(0) + head == 0:
        tl.store(times + 2, tl.load(times + 2) + tl.load(times + 1) - tl.load(times))
        began = _nanoseconds()
        tl.store(times, began)
        tl.store(times + 1, began)
    _, page, read = _entries(
        block_table, seq_lens, head, tl.program_id(0), rows, width, table_stride, table_head_stride, PAGE, ENTRIES
    )  # fmt: skip
    entry = frame_of + page.to(tl.int64) * heads + head
    frame = tl.load(entry, mask=read, other=0)
    tl.store(last_use + frame * heads + head, tl.load(clock + head), mask=read & (frame >= 0))
    missing = read & (frame < 0)
    # Of several that miss the same page, one finds it unqueued.
    first = missing & (tl.atomic_min(entry, QUEUED, mask=missing) > QUEUED)
    place = tl.atomic_add(queued + head + tl.zeros([ENTRIES], tl.int32), 1, mask=first)
    tl.store(queue + head * frames + place, page, mask=first & (place < frames))


@triton.jit
def _nanoseconds():
    """The GPU's clock, int64. The interpreter has none."""
    if INTERPRETED:
        return tl.full([], 0, tl.int64)
    else:
        return globaltimer()


@triton.jit
def _oldest(age, wanted):
    """Which of ages, int32 [n], are the `wanted` largest; of equal ones, the first. At least as many must be above 0."""
    limit = tl.full([], 0, tl.int32)
    for bit in tl.static_range(_AGE_BITS - 1, -1, -1):
        enough = tl.sum((age >= limit + (1 << bit)).to(tl.int32), 0) >= wanted
        limit += tl.where(enough, 1 << bit, 0)
    older, equal = (age > limit).to(tl.int32), (age == limit).to(tl.int32)
    room = wanted - tl.sum(older, 0)
    return (older == 1) | ((equal == 1) & (tl.cumsum(equal, 0) <= room))


@triton.jit(do_not_specialize=["frames"])
def _evict_kernel(
    frame_of, page_in, last_use, clock, hand, queue, queued, fetched, frames, WINDOW: tl.constexpr, PDL: tl.constexpr
):
    """Grid: (KV heads). Give every queued page a frame, and take the frames from those that were not used for longest."""
    await_previous_kernel(PDL)
    head, heads = tl.program_id(0), tl.num_programs(0)
    now, begin = tl.load(clock + head), tl.load(hand + head)
    wanted = tl.minimum(tl.load(queued + head), frames)
    tl.store(queued + heads + head, wanted)
    tl.store(queued + head, 0)
    tl.store(fetched + head, tl.load(fetched + head) + wanted)
    tl.store(clock + head, now + 1)
    given = tl.full([], 0, tl.int32)
    scanned = tl.full([], 0, tl.int32)
    while (given < wanted) & (scanned < frames):
        lane = scanned + tl.arange(0, WINDOW)
        frame = (begin + lane) % frames
        age = now - tl.load(last_use + frame * heads + head, mask=lane < frames, other=0)  # wraps around after 2**32 fetches
        age = tl.where(lane < frames, tl.where(age < 0, MAX_AGE, tl.minimum(age, MAX_AGE)), 0)
        taken = tl.minimum(wanted - given, tl.sum((age > 0).to(tl.int32), 0))
        chosen = _oldest(age, taken) & (age > 0)
        nth = given + tl.cumsum(chosen.to(tl.int32), 0) - 1
        page = tl.load(queue + head * frames + nth, mask=chosen, other=0)
        evicted = tl.load(page_in + frame * heads + head, mask=chosen, other=-1)
        tl.store(frame_of + evicted.to(tl.int64) * heads + head, -1, mask=chosen & (evicted >= 0))
        tl.store(page_in + frame * heads + head, page, mask=chosen)
        tl.store(last_use + frame * heads + head, now, mask=chosen)
        tl.store(frame_of + page.to(tl.int64) * heads + head, frame, mask=chosen)
        given += taken
        scanned += WINDOW
    tl.store(hand + head, (begin + tl.minimum(scanned, frames)) % frames)


@triton.jit(do_not_specialize=["rows", "width", *TABLE_STRIDES], do_not_specialize_on_alignment=TABLES)
def _copy_kernel(
    pages, frames_i32, block_table, framed_table, seq_lens, frame_of, queue, queued, times, rows, width, frames,
    block_stride, head_stride, table_stride, table_head_stride,
    PAGE: tl.constexpr, PAGE_WORDS: tl.constexpr, WORDS: tl.constexpr, COPIERS: tl.constexpr, ENTRIES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (copiers and parts of the page lists, KV heads). Copy queued pages into their frames, and write page lists of
    frames. pages, frames_i32: int32 pointers, and strides in words."""
    await_previous_kernel(PDL)
    program, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    if program < COPIERS:
        PIECES: tl.constexpr = (PAGE_WORDS + WORDS - 1) // WORDS
        pieces = tl.load(queued + heads + head) * PIECES
        for piece in range(program, pieces, COPIERS):
            page = tl.load(queue + head * frames + piece // PIECES).to(tl.int64)
            frame = tl.load(frame_of + page * heads + head).to(tl.int64)
            word = piece % PIECES * WORDS + tl.arange(0, WORDS)
            copied = tl.load(pages + page * block_stride + head * head_stride + word, mask=word < PAGE_WORDS, other=0)
            tl.store(frames_i32 + (frame * heads + head) * PAGE_WORDS + word, copied, mask=word < PAGE_WORDS)
        if pieces > 0:
            tl.debug_barrier()  # so that the clock is read once all threads have their words
            tl.atomic_max(times + 1, _nanoseconds())
    else:
        place, page, read = _entries(
            block_table, seq_lens, head, program - COPIERS, rows, width, table_stride, table_head_stride, PAGE, ENTRIES
        )  # fmt: skip
        frame = tl.load(frame_of + page.to(tl.int64) * heads + head, mask=read, other=0)
        target = framed_table + (place // width).to(tl.int64) * heads * width + head * width + place % width
        tl.store(target, frame, mask=place // width < rows)


def fetch_pages(cache: PageCache, pages: torch.Tensor, layout: PageLayout, batch: PagedBatch) -> PagedBatch:
    """`reference.fetch_pages` on a GPU, with the same arguments. `api.fetch_pages` checks that page lists have no more entries
    than there are frames; with more, pages would stay queued for ever."""
    kv_heads, frames, (rows, width) = pages.shape[1], len(cache.frames), (batch.num_requests, batch.block_table.shape[-1])
    lists = batch.block_table, batch.seq_lens
    shape = rows, width, frames
    parts, pdl = triton.cdiv(rows * width, _ENTRIES), dependent_launch(pages.device)
    _find_kernel[(parts, kv_heads)](
        *lists, cache.frame_of, cache.last_use, cache.clock, cache.queue, cache.queued, cache.times, *shape,
        *batch.table_strides,
        PAGE=layout.tokens, ENTRIES=_ENTRIES, num_warps=4, **pdl,
    )  # fmt: skip
    _evict_kernel[(kv_heads,)](
        cache.frame_of, cache.page_in, cache.last_use, cache.clock, cache.hand, cache.queue, cache.queued, cache.fetched,
        frames, WINDOW=EVICTION_WINDOW, num_warps=4, **pdl,
    )  # fmt: skip
    framed = torch.empty(rows, kv_heads, width, dtype=torch.int32, device=pages.device)
    words = pages.view(torch.int32)
    _copy_kernel[(_COPIERS + parts, kv_heads)](
        words, cache.frames.view(torch.int32), batch.block_table, framed, batch.seq_lens, cache.frame_of, cache.queue,
        cache.queued, cache.times, *shape, words.stride(0), words.stride(1), *batch.table_strides,
        PAGE=layout.tokens, PAGE_WORDS=layout.page_bytes // 4, WORDS=_WORDS, COPIERS=_COPIERS, ENTRIES=_ENTRIES, num_warps=8,
        **pdl,
    )  # fmt: skip
    return replace(batch, block_table=framed)
