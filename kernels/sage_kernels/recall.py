"""Memory on a GPU: the summaries of full pages, and the choice of the pages that rows of queries read.

The choice takes two launches: the pages of a context are scored, and the best become a page list. The queries of a row are
folded into two vectors first, by a launch of their own for prompts, whose rows have many. Before the best of many pages are
found, one more launch finds the best of each thousand. All grids follow from shapes alone and nothing is read back, so that it
can be captured in a CUDA graph.
"""

import torch
import triton
import triton.language as tl

from sage_kernels.device import dependent_launch
from sage_kernels.reference import REACH as _REACH
from sage_kernels.reference import SCORE_BITS as _SCORE_BITS
from sage_kernels.reference import PageLists, Turns, max_rows
from sage_kernels.tiles import TABLES, await_kernel_before, find_request, load_k, load_wide_k, section_offset, turned
from sage_paged import Memory, PageLayout

_PART_PAGES = 64
"""Pages that one program scores."""
REACH = tl.constexpr(_REACH)
_CHUNK_PAGES = 1024
"""Pages whose best one program finds."""
SCORE_BITS = tl.constexpr(_SCORE_BITS)
LARGEST_SCORE = tl.constexpr(1 << _SCORE_BITS)
_FOLD_ROWS = 64
"""Queries, tokens times heads of a group, that a program holds while it folds them."""


@triton.jit(do_not_specialize=["num_reqs"], do_not_specialize_on_alignment=TABLES)
def _summary_kernel(
    cache_i8, cache_f32, cache_f16, block_table, seq_lens, query_start_loc, turn_table, anchor, num_reqs,
    table_stride, block_stride, head_stride,
    HEAD_DIM: tl.constexpr, K_BITS: tl.constexpr, PAGE: tl.constexpr, SUMMARY: tl.constexpr, BLOCK_D: tl.constexpr,
    TURN: tl.constexpr, ANCHOR: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (pages that a step may fill, KV heads)."""
    await_kernel_before(PDL)
    HALF: tl.constexpr = HEAD_DIM // 2
    SCALES: tl.constexpr = section_offset("k_scale", HEAD_DIM, K_BITS, PAGE) // 4
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
    inside = half < HALF
    scale = tl.load(cache_f32 + offset // 4 + SCALES + tokens)[None, :]
    if K_BITS == 8:
        low = load_k(cache_i8 + offset, tokens, half, HEAD_DIM, HALF).to(tl.float32) * scale
        high = load_k(cache_i8 + offset + HALF, tokens, half, HEAD_DIM, HALF).to(tl.float32) * scale
    else:
        low, high = load_wide_k(cache_i8 + offset, tokens, half, PAGE, HEAD_DIM)
        low = low.to(tl.float32) * scale
        high = high.to(tl.float32) * scale
    if TURN:
        if ANCHOR:
            low += tl.load(anchor + head * HEAD_DIM + half, mask=inside, other=0.0)[:, None]
            high += tl.load(anchor + head * HEAD_DIM + HALF + half, mask=inside, other=0.0)[:, None]
        low, high = turned(low, high, (turn_table + page * HEAD_DIM + half)[:, None], inside[:, None], HALF)
    center = cache_f16 + offset // 2 + SUMMARY + half
    tl.store(center, (tl.sum(low, 1) / PAGE).to(tl.float16), mask=inside)
    tl.store(center + HALF, (tl.sum(high, 1) / PAGE).to(tl.float16), mask=inside)
    tl.store(center + HEAD_DIM, ((tl.max(low, 1) - tl.min(low, 1)) / 2).to(tl.float16), mask=inside)
    tl.store(center + HEAD_DIM + HALF, ((tl.max(high, 1) - tl.min(high, 1)) / 2).to(tl.float16), mask=inside)


def store_summaries(
    pages: torch.Tensor,
    layout: PageLayout,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    tokens: int,
    turn_table: torch.Tensor | None = None,
    anchor: torch.Tensor | None = None,
) -> None:
    """`reference.store_summaries` on a GPU, with the same arguments. tokens: at least those of the step."""
    requests = seq_lens.numel()
    _summary_kernel[(tokens // layout.tokens + requests, pages.shape[1])](
        pages.view(torch.int8), pages.view(torch.float32), pages.view(torch.float16), block_table, seq_lens, query_start_loc,
        pages if turn_table is None else turn_table, pages if anchor is None else anchor, requests,
        block_table.stride(0), pages.stride(0), pages.stride(1),
        HEAD_DIM=layout.head_dim, K_BITS=layout.k_bits, PAGE=layout.tokens, SUMMARY=layout.summary_offset // 2,
        BLOCK_D=triton.next_power_of_2(layout.head_dim), TURN=turn_table is not None, ANCHOR=anchor is not None, num_warps=4,
        **dependent_launch(pages.device),
    )  # fmt: skip


@triton.jit
def _locate(
    query_start_loc, seq_lens, row, num_reqs, QUERY_BLOCK: tl.constexpr, LOCAL: tl.constexpr, PAGE: tl.constexpr
):
    """A row's request, the position of its first query and the one past its last, its first local page, and where its queries
    start."""
    if QUERY_BLOCK > 0:
        request, nth = find_request(query_start_loc, row, num_reqs, QUERY_BLOCK, 2)
    else:
        request, nth = row, 0
    start = tl.load(query_start_loc + request)
    length = tl.load(seq_lens + request)
    begin = length - (tl.load(query_start_loc + request + 1) - start)
    low, high = begin, length
    if QUERY_BLOCK > 0:
        block = begin // QUERY_BLOCK + nth
        low = tl.minimum(tl.maximum(block * QUERY_BLOCK, begin), length)
        high = tl.maximum(tl.minimum((block + 1) * QUERY_BLOCK, length), low)
    return request, low, high, tl.maximum(low - LOCAL + 1, 0) // PAGE, start + low - begin


@triton.jit
def _fold(
    query, turn_table, low, high, start, head, q_token_stride, q_head_stride,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr, LOCAL: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """Of a row's queries, at positions low to high and from token `start` on, the means of the halves of the head and of their
    squares, four float32 [channels of a half]."""
    HALF: tl.constexpr = HEAD_DIM // 2
    half = tl.arange(0, BLOCK_D // 2)
    inside = (half < HALF)[None, :]
    zeros = tl.zeros([BLOCK_T * BLOCK_G, BLOCK_D // 2], tl.float32)
    low_sum, high_sum, low_squares, high_squares = zeros, zeros, zeros, zeros
    rows = tl.arange(0, BLOCK_T * BLOCK_G)
    for first in range(low, high, BLOCK_T):
        token = first + rows // BLOCK_G
        member = rows % BLOCK_G
        valid = (token < high) & (member < GROUP)
        source = (start + token - low).to(tl.int64) * q_token_stride + (head * GROUP + member) * q_head_stride
        pointers = query + source[:, None] + half[None, :]
        mask = valid[:, None] & inside
        q_low = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        q_high = tl.load(pointers + HALF, mask=mask, other=0.0).to(tl.float32)
        if TURN:
            nearer = tl.maximum(token // PAGE - LOCAL // PAGE - 1, 0)
            q_low, q_high = turned(q_low, q_high, turn_table + nearer[:, None] * HEAD_DIM + half[None, :], mask, HALF)
        low_sum += q_low
        low_squares += q_low * q_low
        high_sum += q_high
        high_squares += q_high * q_high
    share = 1.0 / (tl.maximum(high - low, 1) * GROUP)  # rows that nobody has get here too
    return (
        tl.sum(low_sum, 0) * share, tl.sum(high_sum, 0) * share, tl.sum(low_squares, 0) * share, tl.sum(high_squares, 0) * share
    )  # fmt: skip


@triton.jit
def _store_row(row_starts, row_lens, row, rows, low, high, local, start, PAGE: tl.constexpr, FAR: tl.constexpr):
    """What `PageLists` tells of a row: where its queries start, and how many tokens its pages hold."""
    tl.store(row_starts + row, start)
    tl.store(row_lens + row, tl.where(high > low, tl.minimum(local, FAR) * PAGE + high - local * PAGE, 0))
    if row == rows - 1:
        tl.store(row_starts + row + 1, start + high - low)


@triton.jit(do_not_specialize=["num_reqs"], do_not_specialize_on_alignment=TABLES)
def _fold_kernel(
    query, folded, row_starts, row_lens, seq_lens, query_start_loc, turn_table, num_reqs, q_token_stride, q_head_stride,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr, SINKS: tl.constexpr, LOCAL: tl.constexpr, TOPK: tl.constexpr, QUERY_BLOCK: tl.constexpr,
    TURN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (rows, KV heads). folded: float32 [rows, kv_heads, 2, HEAD_DIM], the means of a row's queries and of their squares.
    row_starts, row_lens: `PageLists.query_start_loc` and `seq_lens`."""
    await_kernel_before(PDL)
    HALF: tl.constexpr = HEAD_DIM // 2
    row = tl.program_id(0)
    head = tl.program_id(1)
    _, low, high, local, start = _locate(query_start_loc, seq_lens, row, num_reqs, QUERY_BLOCK, LOCAL, PAGE)
    if head == 0:
        _store_row(row_starts, row_lens, row, tl.num_programs(0), low, high, local, start, PAGE, SINKS + TOPK)
    if local <= SINKS + TOPK:
        return
    low_mean, high_mean, low_squares, high_squares = _fold(
        query, turn_table, low, high, start, head, q_token_stride, q_head_stride,
        GROUP, BLOCK_G, HEAD_DIM, PAGE, BLOCK_D, BLOCK_T, LOCAL, TURN,
    )  # fmt: skip
    half = tl.arange(0, BLOCK_D // 2)
    target = folded + (row * tl.num_programs(1) + head).to(tl.int64) * 2 * HEAD_DIM + half
    tl.store(target, low_mean, mask=half < HALF)
    tl.store(target + HALF, high_mean, mask=half < HALF)
    tl.store(target + HEAD_DIM, low_squares, mask=half < HALF)
    tl.store(target + HEAD_DIM + HALF, high_squares, mask=half < HALF)


@triton.jit
def _score_half(summary, there, mean, squares, half, HALF: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The parts that half of the channels have in the products of pages' mean keys with a mean query, and in the squares of how
    far they extend towards queries: two float32 [pages]. summary: pointers to those channels of the means."""
    mask = there[:, None] & (half < HALF)[None, :]
    center = tl.load(summary[:, None] + half[None, :], mask=mask, other=0.0).to(tl.float32)
    radius = tl.load(summary[:, None] + HEAD_DIM + half[None, :], mask=mask, other=0.0).to(tl.float32)
    return tl.sum(center * mean[None, :], 1), tl.sum(radius * radius * squares[None, :], 1)


@triton.jit(do_not_specialize=["num_reqs", "width"], do_not_specialize_on_alignment=TABLES)
def _score_kernel(
    query, folded, scores, row_starts, row_lens, cache_f16, block_table, seq_lens, query_start_loc, turn_table, num_reqs, width,
    q_token_stride, q_head_stride, table_stride, block_stride, head_stride,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr, SUMMARY: tl.constexpr, SINKS: tl.constexpr, LOCAL: tl.constexpr, TOPK: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, TURN: tl.constexpr, PDL: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Grid: (parts of a context, KV heads, rows). scores: float32 [rows, kv_heads, width], of the pages behind the sinks.

    Prompts have been folded. A decode has few queries, which each program folds for itself: for one request of a million tokens
    that took less time than the launch of a kernel.
    """
    await_kernel_before(PDL)
    HALF: tl.constexpr = HEAD_DIM // 2
    part = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.program_id(2)
    request, low, high, local, start = _locate(query_start_loc, seq_lens, row, num_reqs, QUERY_BLOCK, LOCAL, PAGE)
    if QUERY_BLOCK == 0 and part + head == 0:
        _store_row(row_starts, row_lens, row, tl.num_programs(2), low, high, local, start, PAGE, SINKS + TOPK)
    page = SINKS + part * PART + tl.arange(0, PART)
    if local <= SINKS + TOPK or SINKS + part * PART >= local:
        return
    there = page < local
    blocks = tl.load(block_table + request.to(tl.int64) * table_stride + page, mask=there, other=0).to(tl.int64)
    summary = cache_f16 + (blocks * block_stride + head.to(tl.int64) * head_stride) // 2 + SUMMARY
    half = tl.arange(0, BLOCK_D // 2)
    if QUERY_BLOCK == 0:
        low_mean, high_mean, low_squares, high_squares = _fold(
            query, turn_table, low, high, start, head, q_token_stride, q_head_stride,
            GROUP, BLOCK_G, HEAD_DIM, PAGE, BLOCK_D, BLOCK_T, LOCAL, TURN,
        )  # fmt: skip
    else:
        source = folded + (row * tl.num_programs(1) + head).to(tl.int64) * 2 * HEAD_DIM + half
        low_mean = tl.load(source, mask=half < HALF, other=0.0)
        high_mean = tl.load(source + HALF, mask=half < HALF, other=0.0)
        low_squares = tl.load(source + HEAD_DIM, mask=half < HALF, other=0.0)
        high_squares = tl.load(source + HEAD_DIM + HALF, mask=half < HALF, other=0.0)
    low_product, low_extent = _score_half(summary, there, low_mean, low_squares, half, HALF, HEAD_DIM)
    high_product, high_extent = _score_half(summary + HALF, there, high_mean, high_squares, half, HALF, HEAD_DIM)
    score = low_product + high_product + REACH * tl.sqrt(low_extent + high_extent)
    tl.store(scores + (row * tl.num_programs(1) + head).to(tl.int64) * width + page - SINKS, score, mask=there)


@triton.jit
def _places(score, there, TOPK: tl.constexpr):
    """Of scores, float32 [n]: which are among the TOPK largest that are there, of equals the first ones, and the how manieth of
    these each is. Scores count as equal where they agree in SCORE_BITS bits."""
    bits = score.to(tl.int32, bitcast=True)
    # Unsigned integers in the order of the numbers; 0 is below all of them.
    ordered = tl.where(bits < 0, ~bits, bits | -0x80000000).to(tl.uint32, bitcast=True) >> (32 - SCORE_BITS)
    ordered = tl.where(there, ordered + 1, 0).to(tl.int32)
    # The TOPK-th largest, two bits at a time: how many reach each of the three next candidates, counted in one sum.
    limit = tl.full([], 0, tl.int32)
    one = tl.full([], LARGEST_SCORE, tl.int32)
    for _ in range(SCORE_BITS // 2 + 1):
        reached = (ordered >= limit + one).to(tl.int64) + ((ordered >= limit + 2 * one).to(tl.int64) << 20)
        reached = tl.sum(reached + ((ordered >= limit + 3 * one).to(tl.int64) << 40), 0)
        limit += one * (
            ((reached & 0xFFFFF) >= TOPK).to(tl.int32)
            + (((reached >> 20) & 0xFFFFF) >= TOPK).to(tl.int32)
            + ((reached >> 40) >= TOPK).to(tl.int32)
        )
        one = one >> 2
    above = (ordered > limit).to(tl.int32)
    equal = (ordered == limit).to(tl.int32)
    room = TOPK - tl.sum(above, 0)
    before = tl.cumsum(above + (equal << 16), 0)  # itself included
    equals = before >> 16
    chosen = (above == 1) | ((equal == 1) & (equals <= room))
    return chosen, (before & 0xFFFF) + tl.minimum(equals, room) - 1


@triton.jit(do_not_specialize=["num_reqs", "width", "finalists"], do_not_specialize_on_alignment=TABLES)
def _narrow_kernel(
    scores, best, best_pages, seq_lens, query_start_loc, num_reqs, width, finalists,
    PAGE: tl.constexpr, SINKS: tl.constexpr, LOCAL: tl.constexpr, TOPK: tl.constexpr, QUERY_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (chunks of a context, KV heads, rows). best, best_pages: float32 and int32 [rows, kv_heads, finalists], the TOPK
    best pages of each chunk, in its order, or as many as it has, and their scores."""
    await_kernel_before(PDL)
    head = tl.program_id(1)
    row = tl.program_id(2)
    _, _, _, local, _ = _locate(query_start_loc, seq_lens, row, num_reqs, QUERY_BLOCK, LOCAL, PAGE)
    page = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    if local <= SINKS + TOPK or SINKS + tl.program_id(0) * CHUNK >= local:
        return
    there = page < local - SINKS
    score = tl.load(scores + (row * tl.num_programs(1) + head).to(tl.int64) * width + page, mask=there, other=0.0)
    chosen, place = _places(score, there, TOPK)
    target = (row * tl.num_programs(1) + head).to(tl.int64) * finalists + tl.program_id(0) * TOPK + place
    tl.store(best + target, score, mask=chosen & there)
    tl.store(best_pages + target, page, mask=chosen & there)


@triton.jit(do_not_specialize=["num_reqs", "width", "list_width"], do_not_specialize_on_alignment=TABLES)
def _list_kernel(
    scores, scored_pages, lists, turns, block_table, seq_lens, query_start_loc, num_reqs, width, list_width, table_stride,
    PAGE: tl.constexpr, SINKS: tl.constexpr, LOCAL: tl.constexpr, TOPK: tl.constexpr, QUERY_BLOCK: tl.constexpr,
    TRAINED: tl.constexpr, CANDIDATES: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (rows, KV heads). scores: float32 [rows, kv_heads, width], of all pages behind the sinks, or, with a CHUNK, of
    scored_pages (see `_narrow_kernel`). lists, turns: int32 [rows, kv_heads, list_width]; turns are written where TRAINED is
    not 0."""
    await_kernel_before(PDL)
    row = tl.program_id(0)
    head = tl.program_id(1)
    request, low, high, local, _ = _locate(query_start_loc, seq_lens, row, num_reqs, QUERY_BLOCK, LOCAL, PAGE)
    target = (row * tl.num_programs(1) + head).to(tl.int64) * list_width
    table = block_table + request.to(tl.int64) * table_stride
    far = tl.minimum(local, SINKS + TOPK)
    pages = tl.where(high > low, far + tl.cdiv(high, PAGE) - local, 0)
    choosing = local > SINKS + TOPK
    turning = (TRAINED > 0) & (high > TRAINED)
    for first in range(0, list_width, BLOCK):
        entry = first + tl.arange(0, BLOCK)
        page = tl.where(entry < far, entry, local + entry - far)
        write = (entry < list_width) & ~(choosing & (entry >= SINKS) & (entry < far))
        tl.store(lists + target + entry, tl.load(table + page, mask=entry < pages, other=0), mask=write)
        if TRAINED > 0:
            tl.store(turns + target + entry, tl.where(turning & (entry < far), local - 1 - page, 0), mask=write)
    if choosing:
        candidate = tl.arange(0, CANDIDATES)
        source = (row * tl.num_programs(1) + head).to(tl.int64) * width + candidate
        if CHUNK > 0:
            there = candidate % TOPK < local - SINKS - candidate // TOPK * CHUNK
        else:
            there = candidate < local - SINKS
        chosen, place = _places(tl.load(scores + source, mask=there, other=0.0), there, TOPK)
        page = SINKS + candidate
        if CHUNK > 0:
            page = SINKS + tl.load(scored_pages + source, mask=chosen, other=0)
        entry = target + SINKS + place
        tl.store(lists + entry, tl.load(table + page, mask=chosen, other=0), mask=chosen)
        if TRAINED > 0:
            tl.store(turns + entry, tl.where(turning, local - 1 - page, 0), mask=chosen)


def recall(
    query: torch.Tensor,
    pages: torch.Tensor,
    layout: PageLayout,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    memory: Memory,
    query_block: int,
    turn_table: torch.Tensor | None = None,
    *,
    max_query_len: int = 1,
) -> PageLists:
    """`reference.recall` on a GPU, with the same arguments. max_query_len: the most query tokens of a request, where
    query_block is 0."""
    requests, kv_heads, device = seq_lens.numel(), pages.shape[1], query.device
    rows = max_rows(query.shape[0], requests, query_block)
    sinks = memory.sink_pages(layout.tokens)
    list_width = memory.list_pages(layout.tokens, query_block or max_query_len)
    candidates = max(1, block_table.shape[1] - sinks)
    lists = torch.empty(rows, kv_heads, list_width, dtype=torch.int32, device=device)
    turns = None if turn_table is None else Turns(torch.empty_like(lists), turn_table)
    row_lens, row_starts = (torch.empty(n, dtype=torch.int32, device=device) for n in (rows, rows + 1))
    scores = torch.empty(rows, kv_heads, candidates, dtype=torch.float32, device=device)
    group = query.shape[1] // kv_heads
    block_group = triton.next_power_of_2(group)
    policy = {
        "PAGE": layout.tokens, "SINKS": sinks, "LOCAL": memory.local_tokens, "TOPK": memory.topk_pages,
        "QUERY_BLOCK": query_block, **dependent_launch(device),
    }  # fmt: skip
    of_queries = {
        "GROUP": group, "BLOCK_G": block_group, "HEAD_DIM": layout.head_dim,
        "BLOCK_D": triton.next_power_of_2(layout.head_dim), "TURN": turn_table is not None,
        "BLOCK_T": min(triton.next_power_of_2(query_block or max_query_len), max(1, _FOLD_ROWS // block_group)),
    }  # fmt: skip
    turned_by = query if turn_table is None else turn_table
    folded = scores
    if query_block:
        folded = scores.new_empty(rows, kv_heads, 2, layout.head_dim)
        _fold_kernel[(rows, kv_heads)](
            query, folded, row_starts, row_lens, seq_lens, query_start_loc, turned_by, requests,
            query.stride(0), query.stride(1), num_warps=4, **of_queries, **policy,
        )  # fmt: skip
    _score_kernel[(triton.cdiv(candidates, _PART_PAGES), kv_heads, rows)](
        query, folded, scores, row_starts, row_lens, pages.view(torch.float16), block_table, seq_lens, query_start_loc,
        turned_by, requests, candidates, query.stride(0), query.stride(1), block_table.stride(0), pages.stride(0),
        pages.stride(1), SUMMARY=layout.summary_offset // 2, PART=_PART_PAGES, num_warps=8, **of_queries, **policy,
    )  # fmt: skip
    scored_pages, chunk = lists, 0
    if candidates > _CHUNK_PAGES:
        every, chunk = scores, _CHUNK_PAGES
        chunks = triton.cdiv(candidates, chunk)
        finalists = chunks * memory.topk_pages
        scores, scored_pages = torch.empty(rows, kv_heads, finalists, device=device), lists.new_empty(rows, kv_heads, finalists)
        _narrow_kernel[(chunks, kv_heads, rows)](
            every, scores, scored_pages, seq_lens, query_start_loc, requests, candidates, finalists,
            CHUNK=chunk, num_warps=4, **policy,
        )  # fmt: skip
        candidates = finalists
    _list_kernel[(rows, kv_heads)](
        scores, scored_pages, lists, lists if turns is None else turns.pages, block_table, seq_lens, query_start_loc, requests,
        candidates, list_width, block_table.stride(0),
        TRAINED=0 if turns is None else memory.trained_tokens, CANDIDATES=triton.next_power_of_2(candidates), CHUNK=chunk,
        BLOCK=64, num_warps=4, **policy,
    )  # fmt: skip
    return PageLists(lists, row_lens, row_starts, turns)
