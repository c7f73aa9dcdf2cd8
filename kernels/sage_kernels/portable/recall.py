# SPDX-License-Identifier: Apache-2.0
"""InfLLM memory on a GPU: the summaries of full pages, and the choice of the pages that query blocks read.

The choice takes two launches: one scores the pages of a context, one makes the best into a page list. The queries of a block
are folded into two vectors first, for prompts by a launch of its own. In long contexts, one more launch finds the best pages of
each thousand. All grids follow from shapes alone and nothing is read back, so that all of it can be captured in a CUDA graph.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from sage_kernels.batch import NOT_CALIBRATED, LayerCalibration, PagedBatch, RopeShift
from sage_kernels.device import dependent_launch
from sage_kernels.page_cache import PageCache, summaries_of
from sage_kernels.portable.codes import load_int4_k, load_k, section_offset
from sage_kernels.portable.primitives import TABLES, await_previous_kernel, find_request, rope_pairs, turn_back
from sage_kernels.portable.query_tile import calibration_tensors, tensor_or
from sage_kernels.reference import REACH as _REACH
from sage_kernels.reference import SCORE_BITS as _SCORE_BITS
from sage_kernels.reference import max_query_blocks
from sage_paged import ALL_PAGES as _ALL_PAGES
from sage_paged import Memory, PageLayout

_PART_PAGES = 64
"""Pages that one program scores."""
ALL_PAGES = tl.constexpr(_ALL_PAGES)
REACH = tl.constexpr(_REACH)
_CHUNK_PAGES = 1024
"""Pages among which one program finds the best."""
SCORE_BITS = tl.constexpr(_SCORE_BITS)
LARGEST_SCORE = tl.constexpr(1 << _SCORE_BITS)
_FOLD_ROWS = 64
"""Query rows (tokens times query heads per KV head) that a program folds at a time."""


@triton.jit(do_not_specialize=["num_reqs"], do_not_specialize_on_alignment=TABLES)
def _summary_kernel(
    cache_i8, cache_f32, summaries, block_table, seq_lens, query_start_loc, shift_table, k_anchor, equalizer, order, num_reqs,
    table_stride, block_stride, head_stride, summary_stride, summary_head_stride,
    HEAD_DIM: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_D: tl.constexpr, SHIFT: tl.constexpr, K_ANCHOR: tl.constexpr, EQUALIZE: tl.constexpr, ORDER: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (pages that a step may fill, KV heads)."""
    await_previous_kernel(PDL)
    HALF: tl.constexpr = HEAD_DIM // 2
    SCALES: tl.constexpr = section_offset("k_scale", HEAD_DIM, K_BITS, PAGE, V_BITS) // 4
    head = tl.program_id(1)
    request, nth = find_request(query_start_loc, tl.program_id(0), num_reqs, PAGE)
    q_len = tl.load(query_start_loc + request + 1) - tl.load(query_start_loc + request)
    seq_len = tl.load(seq_lens + request)
    page = (seq_len - q_len) // PAGE + nth
    if q_len == 0 or (page + 1) * PAGE > seq_len:
        return
    block = tl.load(block_table + request.to(tl.int64) * table_stride + page).to(tl.int64)
    offset = block * block_stride + head.to(tl.int64) * head_stride
    tokens = tl.arange(0, PAGE)
    half = tl.arange(0, BLOCK_D // 2)
    pair = rope_pairs(order + head * HALF, BLOCK_D, HALF, ORDER)
    inside = half < HALF
    scale = tl.load(cache_f32 + offset // 4 + SCALES + tokens)[None, :]
    if K_BITS == 8:
        low = load_k(cache_i8 + offset, tokens, half, HEAD_DIM, HALF).to(tl.float32) * scale
        high = load_k(cache_i8 + offset + HALF, tokens, half, HEAD_DIM, HALF).to(tl.float32) * scale
    else:
        low, high = load_int4_k(cache_i8 + offset, tokens, BLOCK_D // 2, PAGE, HEAD_DIM, V_BITS)
        low = low.to(tl.float32) * scale
        high = high.to(tl.float32) * scale
    if EQUALIZE:
        low *= tl.load(equalizer + head * HEAD_DIM + pair, mask=inside, other=1.0)[:, None]
        high *= tl.load(equalizer + head * HEAD_DIM + HALF + pair, mask=inside, other=1.0)[:, None]
    if SHIFT:
        if K_ANCHOR:
            low += tl.load(k_anchor + head * HEAD_DIM + pair, mask=inside, other=0.0)[:, None]
            high += tl.load(k_anchor + head * HEAD_DIM + HALF + pair, mask=inside, other=0.0)[:, None]
        low, high = turn_back(low, high, (shift_table + page * HEAD_DIM + pair)[:, None], inside[:, None], HALF)
    center = summaries + block * summary_stride + head.to(tl.int64) * summary_head_stride + pair
    tl.store(center, (tl.sum(low, 1) / PAGE).to(tl.float16), mask=inside)
    tl.store(center + HALF, (tl.sum(high, 1) / PAGE).to(tl.float16), mask=inside)
    tl.store(center + HEAD_DIM, ((tl.max(low, 1) - tl.min(low, 1)) / 2).to(tl.float16), mask=inside)
    tl.store(center + HEAD_DIM + HALF, ((tl.max(high, 1) - tl.min(high, 1)) / 2).to(tl.float16), mask=inside)


def store_summaries(
    pages: torch.Tensor,
    layout: PageLayout,
    batch: PagedBatch,
    num_tokens: int,
    shift_table: torch.Tensor | None = None,
    calibration: LayerCalibration = NOT_CALIBRATED,
    cache: PageCache | None = None,
) -> None:
    """`reference.store_summaries` on a GPU, with the same arguments. num_tokens: at least the query tokens of the step."""
    calibration = calibration.for_keys(layout.k_bits)
    k_anchor, equalizer, order, _ = calibration_tensors(calibration, pages)
    summaries = summaries_of(pages, layout, cache)
    _summary_kernel[(num_tokens // layout.tokens + batch.num_requests, pages.shape[1])](
        pages.view(torch.int8), pages.view(torch.float32), summaries, batch.block_table, batch.seq_lens,
        batch.query_start_loc, tensor_or(shift_table, pages), k_anchor, equalizer, order, batch.num_requests,
        batch.block_table.stride(0), pages.stride(0), pages.stride(1), summaries.stride(0), summaries.stride(1),
        HEAD_DIM=layout.head_dim, K_BITS=layout.k_bits, V_BITS=layout.v_bits, PAGE=layout.tokens,
        BLOCK_D=triton.next_power_of_2(layout.head_dim), SHIFT=shift_table is not None,
        K_ANCHOR=calibration.k_anchor is not None, EQUALIZE=calibration.equalizer is not None,
        ORDER=calibration.order is not None, num_warps=4, **dependent_launch(pages.device),
    )  # fmt: skip


@triton.jit
def _locate(query_start_loc, seq_lens, row, num_reqs, QUERY_BLOCK: tl.constexpr, LOCAL: tl.constexpr, PAGE: tl.constexpr):
    """Where a query block is. Returns its request, the position of its first query and the one past its last, its first local
    page, and the index of its first query token."""
    if QUERY_BLOCK > 0:
        request, index = find_request(query_start_loc, row, num_reqs, QUERY_BLOCK, 2)
    else:
        request, index = row, 0
    start = tl.load(query_start_loc + request)
    length = tl.load(seq_lens + request)
    first_query = length - (tl.load(query_start_loc + request + 1) - start)
    begin, end = first_query, length
    if QUERY_BLOCK > 0:
        block = first_query // QUERY_BLOCK + index
        begin = tl.minimum(tl.maximum(block * QUERY_BLOCK, first_query), length)
        end = tl.maximum(tl.minimum((block + 1) * QUERY_BLOCK, length), begin)
    return request, begin, end, tl.maximum(begin - LOCAL + 1, 0) // PAGE, start + begin - first_query


@triton.jit
def _recalled(topk_pages, request, TOPK: tl.constexpr, PER_REQUEST: tl.constexpr):
    """How many pages are recalled for a request. PER_REQUEST: whether requests have numbers of their own, `topk_pages`,
    which then are TOPK at most, or ALL_PAGES."""
    if PER_REQUEST:
        topk = tl.load(topk_pages + request)
    else:
        topk = TOPK
    return topk


@triton.jit
def _fold(
    query, shift_table, begin, end, start, head, q_token_stride, q_head_stride,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr, LOCAL: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Means over the queries of a block, at positions from begin to before end and from token `start` on: of the two halves of
    the head, and of their squares. Four float32 [channels of a half]."""
    HALF: tl.constexpr = HEAD_DIM // 2
    half = tl.arange(0, BLOCK_D // 2)
    inside = (half < HALF)[None, :]
    zeros = tl.zeros([BLOCK_T * BLOCK_G, BLOCK_D // 2], tl.float32)
    low_sum, high_sum, low_squares, high_squares = zeros, zeros, zeros, zeros
    rows = tl.arange(0, BLOCK_T * BLOCK_G)
    for first in range(begin, end, BLOCK_T):
        token = first + rows // BLOCK_G
        member = rows % BLOCK_G
        valid = (token < end) & (member < GROUP)
        source = (start + token - begin).to(tl.int64) * q_token_stride + (head * GROUP + member) * q_head_stride
        pointers = query + source[:, None] + half[None, :]
        mask = valid[:, None] & inside
        q_low = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        q_high = tl.load(pointers + HALF, mask=mask, other=0.0).to(tl.float32)
        if SHIFT:
            nearer = tl.maximum(token // PAGE - LOCAL // PAGE - 1, 0)
            q_low, q_high = turn_back(q_low, q_high, shift_table + nearer[:, None] * HEAD_DIM + half[None, :], mask, HALF)
        low_sum += q_low
        low_squares += q_low * q_low
        high_sum += q_high
        high_squares += q_high * q_high
    share = 1.0 / (tl.maximum(end - begin, 1) * GROUP)  # query blocks of no request get here too
    return (
        tl.sum(low_sum, 0) * share, tl.sum(high_sum, 0) * share, tl.sum(low_squares, 0) * share, tl.sum(high_squares, 0) * share
    )  # fmt: skip


@triton.jit
def _store_row(row_starts, row_lens, row, rows, begin, end, local, start, far, PAGE: tl.constexpr):
    """Write the query_start_loc and the seq_len of a query block, which reads up to `far` pages before the local ones."""
    tl.store(row_starts + row, start)
    tl.store(row_lens + row, tl.where(end > begin, tl.minimum(local, far) * PAGE + end - local * PAGE, 0))
    if row == rows - 1:
        tl.store(row_starts + row + 1, start + end - begin)


@triton.jit(do_not_specialize=["num_reqs"], do_not_specialize_on_alignment=TABLES)
def _fold_kernel(
    query, folded, row_starts, row_lens, seq_lens, query_start_loc, topk_pages, shift_table, num_reqs, q_token_stride,
    q_head_stride,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr, SINK_PAGES: tl.constexpr, LOCAL: tl.constexpr, TOPK: tl.constexpr, PER_REQUEST: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, SHIFT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (query blocks, KV heads). folded: float32 [blocks, kv_heads, 2, HEAD_DIM], the means of a block's queries and of
    their squares. row_starts, row_lens: query_start_loc and seq_lens of the result."""
    await_previous_kernel(PDL)
    HALF: tl.constexpr = HEAD_DIM // 2
    row = tl.program_id(0)
    head = tl.program_id(1)
    request, begin, end, local, start = _locate(query_start_loc, seq_lens, row, num_reqs, QUERY_BLOCK, LOCAL, PAGE)
    far = SINK_PAGES + _recalled(topk_pages, request, TOPK, PER_REQUEST)
    if head == 0:
        _store_row(row_starts, row_lens, row, tl.num_programs(0), begin, end, local, start, far, PAGE)
    if local <= far:
        return
    low_mean, high_mean, low_squares, high_squares = _fold(
        query, shift_table, begin, end, start, head, q_token_stride, q_head_stride,
        GROUP, BLOCK_G, HEAD_DIM, PAGE, BLOCK_D, BLOCK_T, LOCAL, SHIFT,
    )  # fmt: skip
    half = tl.arange(0, BLOCK_D // 2)
    target = folded + (row * tl.num_programs(1) + head).to(tl.int64) * 2 * HEAD_DIM + half
    tl.store(target, low_mean, mask=half < HALF)
    tl.store(target + HALF, high_mean, mask=half < HALF)
    tl.store(target + HEAD_DIM, low_squares, mask=half < HALF)
    tl.store(target + HEAD_DIM + HALF, high_squares, mask=half < HALF)


@triton.jit
def _score_half(summary, valid, mean, squares, half, HALF: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Half of the channels' share of a page score: the products of mean keys with the mean query, and the squared extents
    toward the queries. Two float32 [pages]. summary: pointers to these channels of the mean keys."""
    mask = valid[:, None] & (half < HALF)[None, :]
    center = tl.load(summary[:, None] + half[None, :], mask=mask, other=0.0).to(tl.float32)
    radius = tl.load(summary[:, None] + HEAD_DIM + half[None, :], mask=mask, other=0.0).to(tl.float32)
    return tl.sum(center * mean[None, :], 1), tl.sum(radius * radius * squares[None, :], 1)


@triton.jit(do_not_specialize=["num_reqs", "width"], do_not_specialize_on_alignment=TABLES)
def _score_kernel(
    query, folded, scores, row_starts, row_lens, summaries, block_table, seq_lens, query_start_loc, topk_pages, shift_table,
    num_reqs, width, q_token_stride, q_head_stride, table_stride, summary_stride, summary_head_stride,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr, SINK_PAGES: tl.constexpr, LOCAL: tl.constexpr, TOPK: tl.constexpr, PER_REQUEST: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, SHIFT: tl.constexpr, PDL: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Grid: (parts of a context, KV heads, query blocks). scores: float32 [blocks, kv_heads, width], of the pages behind the
    sinks.

    The queries of prompts are folded already. The few queries of a decode are folded by each program itself: for one request of
    a million tokens that took less time than another launch.
    """
    await_previous_kernel(PDL)
    HALF: tl.constexpr = HEAD_DIM // 2
    part = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.program_id(2)
    request, begin, end, local, start = _locate(query_start_loc, seq_lens, row, num_reqs, QUERY_BLOCK, LOCAL, PAGE)
    far = SINK_PAGES + _recalled(topk_pages, request, TOPK, PER_REQUEST)
    if QUERY_BLOCK == 0 and part + head == 0:
        _store_row(row_starts, row_lens, row, tl.num_programs(2), begin, end, local, start, far, PAGE)
    page = SINK_PAGES + part * PART + tl.arange(0, PART)
    if local <= far or SINK_PAGES + part * PART >= local:
        return
    valid = page < local
    blocks = tl.load(block_table + request.to(tl.int64) * table_stride + page, mask=valid, other=0).to(tl.int64)
    summary = summaries + blocks * summary_stride + head.to(tl.int64) * summary_head_stride
    half = tl.arange(0, BLOCK_D // 2)
    if QUERY_BLOCK == 0:
        low_mean, high_mean, low_squares, high_squares = _fold(
            query, shift_table, begin, end, start, head, q_token_stride, q_head_stride,
            GROUP, BLOCK_G, HEAD_DIM, PAGE, BLOCK_D, BLOCK_T, LOCAL, SHIFT,
        )  # fmt: skip
    else:
        source = folded + (row * tl.num_programs(1) + head).to(tl.int64) * 2 * HEAD_DIM + half
        low_mean = tl.load(source, mask=half < HALF, other=0.0)
        high_mean = tl.load(source + HALF, mask=half < HALF, other=0.0)
        low_squares = tl.load(source + HEAD_DIM, mask=half < HALF, other=0.0)
        high_squares = tl.load(source + HEAD_DIM + HALF, mask=half < HALF, other=0.0)
    low_product, low_extent = _score_half(summary, valid, low_mean, low_squares, half, HALF, HEAD_DIM)
    high_product, high_extent = _score_half(summary + HALF, valid, high_mean, high_squares, half, HALF, HEAD_DIM)
    score = low_product + high_product + REACH * tl.sqrt(low_extent + high_extent)
    tl.store(scores + (row * tl.num_programs(1) + head).to(tl.int64) * width + page - SINK_PAGES, score, mask=valid)


@triton.jit
def _top_k(score, valid, topk):
    """Top-k of scores, float32 [n]: which of the valid ones are chosen, and the rank by index of each among the chosen. Of
    scores that agree in SCORE_BITS bits, the first ones are chosen."""
    bits = score.to(tl.int32, bitcast=True)
    # Unsigned integers in the order of the floats; 0 is below all of them.
    ordered = tl.where(bits < 0, ~bits, bits | -0x80000000).to(tl.uint32, bitcast=True) >> (32 - SCORE_BITS)
    ordered = tl.where(valid, ordered + 1, 0).to(tl.int32)
    # Find the topk-th largest two bits at a time: one sum counts how many scores reach each of the three next candidates.
    limit = tl.full([], 0, tl.int32)
    one = tl.full([], LARGEST_SCORE, tl.int32)
    for _ in range(SCORE_BITS // 2 + 1):
        reached = (ordered >= limit + one).to(tl.int64) + ((ordered >= limit + 2 * one).to(tl.int64) << 20)
        reached = tl.sum(reached + ((ordered >= limit + 3 * one).to(tl.int64) << 40), 0)
        limit += one * (
            ((reached & 0xFFFFF) >= topk).to(tl.int32)
            + (((reached >> 20) & 0xFFFFF) >= topk).to(tl.int32)
            + ((reached >> 40) >= topk).to(tl.int32)
        )
        one = one >> 2
    above = (ordered > limit).to(tl.int32)
    equal = (ordered == limit).to(tl.int32)
    room = topk - tl.sum(above, 0)
    before = tl.cumsum(above + (equal << 16), 0)  # itself included
    equals = before >> 16
    chosen = (above == 1) | ((equal == 1) & (equals <= room))
    return chosen, (before & 0xFFFF) + tl.minimum(equals, room) - 1


@triton.jit(do_not_specialize=["num_reqs", "width", "finalists"], do_not_specialize_on_alignment=TABLES)
def _finalists_kernel(
    scores, best, best_pages, seq_lens, query_start_loc, topk_pages, num_reqs, width, finalists,
    PAGE: tl.constexpr, SINK_PAGES: tl.constexpr, LOCAL: tl.constexpr, TOPK: tl.constexpr, PER_REQUEST: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (chunks of a context, KV heads, query blocks). best, best_pages: float32 and int32 [blocks, kv_heads, finalists],
    the scores and indices of the TOPK best pages of each chunk, in its order, or of all if it has fewer."""
    await_previous_kernel(PDL)
    head = tl.program_id(1)
    row = tl.program_id(2)
    request, _, _, local, _ = _locate(query_start_loc, seq_lens, row, num_reqs, QUERY_BLOCK, LOCAL, PAGE)
    page = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    far = SINK_PAGES + _recalled(topk_pages, request, TOPK, PER_REQUEST)
    if local <= far or SINK_PAGES + tl.program_id(0) * CHUNK >= local:
        return
    valid = page < local - SINK_PAGES
    score = tl.load(scores + (row * tl.num_programs(1) + head).to(tl.int64) * width + page, mask=valid, other=0.0)
    chosen, place = _top_k(score, valid, TOPK)
    target = (row * tl.num_programs(1) + head).to(tl.int64) * finalists + tl.program_id(0) * TOPK + place
    tl.store(best + target, score, mask=chosen & valid)
    tl.store(best_pages + target, page, mask=chosen & valid)


@triton.jit(do_not_specialize=["num_reqs", "width", "list_width"], do_not_specialize_on_alignment=TABLES)
def _list_kernel(
    scores, scored_pages, lists, shifts, block_table, seq_lens, query_start_loc, topk_pages, num_reqs, width, list_width,
    table_stride,
    PAGE: tl.constexpr, SINK_PAGES: tl.constexpr, LOCAL: tl.constexpr, TOPK: tl.constexpr, PER_REQUEST: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, TRAINED: tl.constexpr, CANDIDATES: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (query blocks, KV heads). scores: float32 [blocks, kv_heads, width], of all pages behind the sinks, or, with a
    CHUNK, of scored_pages (see `_finalists_kernel`). lists, shifts: int32 [blocks, kv_heads, list_width]; shifts are written
    where TRAINED is not 0."""
    await_previous_kernel(PDL)
    row = tl.program_id(0)
    head = tl.program_id(1)
    request, begin, end, local, _ = _locate(query_start_loc, seq_lens, row, num_reqs, QUERY_BLOCK, LOCAL, PAGE)
    target = (row * tl.num_programs(1) + head).to(tl.int64) * list_width
    table = block_table + request.to(tl.int64) * table_stride
    topk = _recalled(topk_pages, request, TOPK, PER_REQUEST)
    far = tl.minimum(local, SINK_PAGES + topk)
    pages = tl.where(end > begin, far + tl.cdiv(end, PAGE) - local, 0)
    choosing = local > SINK_PAGES + topk
    shifting = (TRAINED > 0) & (end > TRAINED) & (topk < ALL_PAGES)
    for first in range(0, list_width, BLOCK):
        entry = first + tl.arange(0, BLOCK)
        page = tl.where(entry < far, entry, local + entry - far)
        write = (entry < list_width) & ~(choosing & (entry >= SINK_PAGES) & (entry < far))
        tl.store(lists + target + entry, tl.load(table + page, mask=entry < pages, other=0), mask=write)
        if TRAINED > 0:
            tl.store(shifts + target + entry, tl.where(shifting & (entry < far), local - 1 - page, 0), mask=write)
    if choosing:
        candidate = tl.arange(0, CANDIDATES)
        source = (row * tl.num_programs(1) + head).to(tl.int64) * width + candidate
        if CHUNK > 0:
            valid = candidate % TOPK < tl.minimum(local - SINK_PAGES - candidate // TOPK * CHUNK, CHUNK)
        else:
            valid = candidate < local - SINK_PAGES
        chosen, place = _top_k(tl.load(scores + source, mask=valid, other=0.0), valid, topk)
        page = SINK_PAGES + candidate
        if CHUNK > 0:
            page = SINK_PAGES + tl.load(scored_pages + source, mask=chosen, other=0)
        entry = target + SINK_PAGES + place
        tl.store(lists + entry, tl.load(table + page, mask=chosen, other=0), mask=chosen)
        if TRAINED > 0:
            tl.store(shifts + entry, tl.where(shifting, local - 1 - page, 0), mask=chosen)


def scratch_bytes(layout: PageLayout, memory: Memory, tokens: int, requests: int, kv_heads: int, context_pages: int) -> int:
    """The bytes that `select_pages` allocates for a step of `tokens` query tokens of `requests` requests, whose block tables
    have context_pages columns."""
    rows = max(requests, max_query_blocks(tokens, requests, memory.query_block))
    lists = memory.list_pages(layout.tokens, memory.query_block, context_pages) * (2 if memory.trained_tokens else 1)
    scores, folded = max(1, context_pages - memory.sink_pages(layout.tokens)), 2 * layout.head_dim
    finalists = 2 * triton.cdiv(scores, _CHUNK_PAGES) * memory.most_pages if scores > _CHUNK_PAGES else 0
    return 4 * (rows * kv_heads * (lists + scores + finalists + folded) + 2 * rows + 1)


def select_pages(
    query: torch.Tensor,
    pages: torch.Tensor,
    layout: PageLayout,
    batch: PagedBatch,
    memory: Memory,
    query_block: int,
    shift_table: torch.Tensor | None = None,
    cache: PageCache | None = None,
) -> PagedBatch:
    """`reference.select_pages` on a GPU, with the same arguments. batch.max_query_len matters where query_block is 0."""
    requests, kv_heads, device = batch.num_requests, pages.shape[1], query.device
    max_query_len = batch.max_query_len or 1
    blocks = max_query_blocks(query.shape[0], requests, query_block)
    list_width = memory.list_pages(layout.tokens, query_block or max_query_len, batch.block_table.shape[1])
    candidates = max(1, batch.block_table.shape[1] - memory.sink_pages(layout.tokens))
    lists = torch.empty(blocks, kv_heads, list_width, dtype=torch.int32, device=device)
    shift = None if shift_table is None else RopeShift(torch.empty_like(lists), shift_table)
    row_lens, row_starts = (torch.empty(n, dtype=torch.int32, device=device) for n in (blocks, blocks + 1))
    constants = {
        "PAGE": layout.tokens, "SINK_PAGES": memory.sink_pages(layout.tokens), "LOCAL": memory.local_tokens,
        "PER_REQUEST": batch.topk_pages is not None,
        "TOPK": memory.topk_pages if batch.topk_pages is None else memory.most_pages,
        "QUERY_BLOCK": query_block, **dependent_launch(device),
    }  # fmt: skip
    topk_pages = batch.seq_lens if batch.topk_pages is None else batch.topk_pages
    summaries = summaries_of(pages, layout, cache)
    scores = _scores(
        query, summaries, layout, batch, topk_pages, row_starts, row_lens, candidates, shift_table, query_block, constants
    )
    scored_pages, chunk = lists, 0
    if candidates > _CHUNK_PAGES:
        every, chunk = scores, _CHUNK_PAGES
        chunks = triton.cdiv(candidates, chunk)
        finalists = chunks * int(constants["TOPK"])
        scores = torch.empty(blocks, kv_heads, finalists, device=device)
        scored_pages = lists.new_empty(blocks, kv_heads, finalists)
        _finalists_kernel[(chunks, kv_heads, blocks)](
            every, scores, scored_pages, batch.seq_lens, batch.query_start_loc, topk_pages, requests, candidates, finalists,
            CHUNK=chunk, num_warps=4, **constants,
        )  # fmt: skip
        candidates = finalists
    _list_kernel[(blocks, kv_heads)](
        scores, scored_pages, lists, lists if shift is None else shift.pages, batch.block_table, batch.seq_lens,
        batch.query_start_loc, topk_pages, requests, candidates, list_width, batch.block_table.stride(0),
        TRAINED=0 if shift is None else memory.trained_tokens, CANDIDATES=triton.next_power_of_2(candidates), CHUNK=chunk,
        BLOCK=64, num_warps=4, **constants,
    )  # fmt: skip
    return replace(
        batch, block_table=lists, seq_lens=row_lens, query_start_loc=row_starts,
        max_query_len=query_block or batch.max_query_len, rope_shift=shift, topk_pages=None,
    )  # fmt: skip


def _scores(
    query: torch.Tensor,
    summaries: torch.Tensor,
    layout: PageLayout,
    batch: PagedBatch,
    topk_pages: torch.Tensor,
    row_starts: torch.Tensor,
    row_lens: torch.Tensor,
    candidates: int,
    shift_table: torch.Tensor | None,
    query_block: int,
    constants: dict[str, int | bool],
) -> torch.Tensor:
    """Score the pages behind the sinks, float32 [blocks, kv_heads, candidates], and write row_starts and row_lens on the
    way."""
    kv_heads, blocks = summaries.shape[1], row_lens.numel()
    group = query.shape[1] // kv_heads
    block_group = triton.next_power_of_2(group)
    of_queries = {
        "GROUP": group, "BLOCK_G": block_group, "HEAD_DIM": layout.head_dim,
        "BLOCK_D": triton.next_power_of_2(layout.head_dim), "SHIFT": shift_table is not None,
        "BLOCK_T": min(triton.next_power_of_2(query_block or batch.max_query_len or 1), max(1, _FOLD_ROWS // block_group)),
    }  # fmt: skip
    table_or_any = query if shift_table is None else shift_table
    scores = torch.empty(blocks, kv_heads, candidates, dtype=torch.float32, device=query.device)
    folded = scores
    if query_block:
        folded = scores.new_empty(blocks, kv_heads, 2, layout.head_dim)
        _fold_kernel[(blocks, kv_heads)](
            query, folded, row_starts, row_lens, batch.seq_lens, batch.query_start_loc, topk_pages, table_or_any,
            batch.num_requests, query.stride(0), query.stride(1), num_warps=4, **of_queries, **constants,
        )  # fmt: skip
    _score_kernel[(triton.cdiv(candidates, _PART_PAGES), kv_heads, blocks)](
        query, folded, scores, row_starts, row_lens, summaries, batch.block_table, batch.seq_lens,
        batch.query_start_loc, topk_pages, table_or_any, batch.num_requests, candidates, query.stride(0), query.stride(1),
        batch.block_table.stride(0), summaries.stride(0), summaries.stride(1),
        PART=_PART_PAGES, num_warps=8, **of_queries, **constants,
    )  # fmt: skip
    return scores
