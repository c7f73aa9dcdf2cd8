"""Attention of many query tokens over pages: prompts, whole or in chunks, behind any history.

The heads that share a KV head are packed into the rows of one tile, so each page is read once for all of them
(row = token * group + head of the group).
"""

import functools
from types import ModuleType

import torch
import triton
import triton.language as tl

from sage_kernels.device import fp8_path, has_own_kernels, pipeline_stages, shared_memory
from sage_kernels.reference import Turns, tile_rows
from sage_kernels.tiles import (
    LOG2E,
    TABLE_STRIDES,
    TABLES,
    add_v_anchor,
    attend_page,
    find_request,
    quantize_parts,
    turned,
)
from sage_paged import PageLayout


@triton.jit
def load_query(query, token, head, valid, token_stride, head_stride, channels, limit):
    """Rows of a query tile as float32 [rows, channels]; channels at and past `limit` and invalid rows are 0."""
    pointers = query + (token.to(tl.int64) * token_stride + head * head_stride)[:, None] + channels[None, :]
    return tl.load(pointers, mask=valid[:, None] & (channels < limit)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _times_anchor(q, anchor, channels, limit, ANCHOR: tl.constexpr):
    """Products of query rows with an anchor over the channels before `limit`, float32 [rows]; 0 without ANCHOR."""
    if ANCHOR:
        product = tl.sum(q * tl.load(anchor + channels, mask=channels < limit, other=0.0)[None, :], 1)
    else:
        product = tl.zeros([q.shape[0]], tl.float32)
    return product


@triton.jit
def quantized_query(
    query, anchor, turn, token, head, valid, token_stride, head_stride, scale,
    ANCHOR: tl.constexpr, TURN: tl.constexpr, HEAD_DIM: tl.constexpr, K_BITS: tl.constexpr, BLOCK_D: tl.constexpr,
    MEANS: tl.constexpr,
):  # fmt: skip
    """The query tile as `attend_page` takes it: codes of the low and high half of the head (INT8 keys: all, all) and q_scale,
    the same of the means that were taken off if MEANS (see `tiles.quantize_parts`), and q_bias. anchor: pointer to that of the
    KV head, if ANCHOR. turn: pointer to a row of a turn table, if TURN."""
    HALF: tl.constexpr = HEAD_DIM // 2
    if K_BITS == 8:
        channels = tl.arange(0, BLOCK_D)
        q = load_query(query, token, head, valid, token_stride, head_stride, channels, HEAD_DIM)
        if TURN:
            low_half = channels < HALF
            angle = tl.where(low_half, channels, channels - HALF)
            cos = tl.load(turn + angle, mask=channels < HEAD_DIM, other=1.0)
            sin = tl.load(turn + HALF + angle, mask=channels < HEAD_DIM, other=0.0)
            partner = tl.where(low_half, channels + HALF, channels - HALF)
            other = load_query(query, token, head, valid, token_stride, head_stride, partner, HEAD_DIM)
            q = q * cos[None, :] + other * tl.where(low_half, sin, -sin)[None, :]
        low_codes, q_scale, mean_low, mean_scale = quantize_parts(q, valid, scale, MEANS)
        high_codes, mean_high = low_codes, mean_low
        product = _times_anchor(q, anchor, channels, HEAD_DIM, ANCHOR)
    else:
        half = tl.arange(0, BLOCK_D // 2)
        low = load_query(query, token, head, valid, token_stride, head_stride, half, HALF)
        high = load_query(query + HALF, token, head, valid, token_stride, head_stride, half, HALF)
        if TURN:
            low, high = turned(low, high, (turn + half)[None, :], (half < HALF)[None, :], HALF)
        # Both halves have one scale, so they are quantized as one row.
        both = tl.reshape(tl.join(low, high), [low.shape[0], BLOCK_D])
        codes, q_scale, mean_codes, mean_scale = quantize_parts(both, valid, scale, MEANS)
        low_codes, high_codes = tl.split(tl.reshape(codes, [low.shape[0], BLOCK_D // 2, 2]))
        mean_low, mean_high = tl.split(tl.reshape(mean_codes, [low.shape[0], BLOCK_D // 2, 2]))
        product = _times_anchor(low, anchor, half, HALF, ANCHOR) + _times_anchor(high, anchor + HALF, half, HALF, ANCHOR)
    return low_codes, high_codes, q_scale, mean_low, mean_high, mean_scale, product * (scale * LOG2E)


@triton.jit
def attend_pages(
    query, cache_i8, cache_v, cache_f32, anchor, turn_table, table, turns, first_page, full_pages, end_page,
    token, head, valid, position, seq_len, head_offset, block_stride, q_token_stride, q_head_stride, scale, soft_cap,
    WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, ANCHOR: tl.constexpr, HEAD_DIM: tl.constexpr, K_BITS: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, FP8: tl.constexpr, TURN: tl.constexpr,
    MEANS: tl.constexpr,
):  # fmt: skip
    """The rows of a query tile against pages first_page to end_page of a request, of which every row sees those before
    full_pages whole. Returns acc, total and base as `attend_page` does, and q_bias.

    token, head, position: int [rows], of each row; valid: bool [rows]. anchor: pointer to that of the KV head, if ANCHOR.
    table, turns: pointers to the request's blocks and, if TURN, to the rows of turn_table that its pages take. head_offset:
    int64, bytes from a block's start to the head's page. MEANS: of how many heads the means are taken off queries: those of a
    group, or 0.
    """
    q_low, q_high, q_scale, mean_low, mean_high, mean_scale, q_bias = quantized_query(
        query, anchor, turn_table, token, head, valid, q_token_stride, q_head_stride, scale,
        ANCHOR, False, HEAD_DIM, K_BITS, BLOCK_D, MEANS,
    )  # fmt: skip
    page_bias = q_bias
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    base = tl.full([BLOCK_M], float("-inf"), tl.float32)
    top = base
    for masked in tl.static_range(2):
        first = tl.maximum(first_page, full_pages) if masked else first_page
        for page in range(first, end_page if masked else full_pages):
            offset = tl.load(table + page).to(tl.int64) * block_stride + head_offset
            last_visible = position - page * PAGE
            first_visible = last_visible - WINDOW + 1 if WINDOW > 0 else tl.zeros_like(last_visible)
            if TURN:
                q_low, q_high, q_scale, mean_low, mean_high, mean_scale, page_bias = quantized_query(
                    query, anchor, turn_table + tl.load(turns + page) * HEAD_DIM, token, head, valid,
                    q_token_stride, q_head_stride, scale, ANCHOR, True, HEAD_DIM, K_BITS, BLOCK_D, MEANS,
                )  # fmt: skip
                if not SOFT_CAP:
                    page_bias -= q_bias
            acc, total, base, top = attend_page(
                q_low, q_high, q_scale, mean_low, mean_high, mean_scale, page_bias, acc, total, base, top,
                cache_i8, cache_v, cache_f32, offset, seq_len - page * PAGE, first_visible, last_visible, soft_cap,
                HEAD_DIM, K_BITS, PAGE, masked == 1, SOFT_CAP, FP8, TURN, MEANS,
            )  # fmt: skip
    return acc, total, base, q_bias


@triton.jit(do_not_specialize=["num_reqs", "q_blocks", *TABLE_STRIDES], do_not_specialize_on_alignment=TABLES)
def _prefill_kernel(
    query, out, cache_i8, cache_v, cache_f32, block_table, seq_lens, query_start_loc, sinks, anchor, v_anchor,
    turns, turn_table, scale, soft_cap, num_reqs, q_blocks,
    q_token_stride, q_head_stride, out_token_stride, out_head_stride, table_stride, table_head_stride, block_stride,
    head_stride,
    GROUP: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, SINKS: tl.constexpr, ANCHOR: tl.constexpr,
    V_ANCHOR: tl.constexpr, HEAD_DIM: tl.constexpr, K_BITS: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, FP8: tl.constexpr, TURN: tl.constexpr, MEANS: tl.constexpr,
):  # fmt: skip
    """Grid: (query blocks, KV heads). The last blocks have the most keys, so they are started first."""
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    kv_head = tl.program_id(1)
    request, q_block = find_request(query_start_loc, q_blocks - 1 - tl.program_id(0), num_reqs, BLOCK_Q)
    q_start = tl.load(query_start_loc + request)
    q_len = tl.load(query_start_loc + request + 1) - q_start
    if q_block * BLOCK_Q >= q_len:
        return
    seq_len = tl.load(seq_lens + request)

    rows = tl.arange(0, BLOCK_M)
    local = q_block * BLOCK_Q + rows // GROUP
    head = kv_head * GROUP + rows % GROUP
    valid = (rows < BLOCK_Q * GROUP) & (local < q_len)
    position = seq_len - q_len + local
    first_position = seq_len - q_len + q_block * BLOCK_Q
    last_position = tl.minimum(first_position + BLOCK_Q, seq_len) - 1
    first_page = 0
    if WINDOW > 0:
        first_page = tl.maximum(first_position - WINDOW + 1, 0) // PAGE
    # Pages before this one are seen whole by every row.
    full_pages = (first_position + 1) // PAGE if WINDOW == 0 else first_page
    last_page = last_position // PAGE

    table_offset = request.to(tl.int64) * table_stride + kv_head * table_head_stride
    acc, total, base, q_bias = attend_pages(
        query, cache_i8, cache_v, cache_f32, anchor + kv_head * HEAD_DIM, turn_table, block_table + table_offset,
        turns + table_offset, first_page, full_pages, last_page + 1, q_start + local, head, valid, position, seq_len,
        kv_head.to(tl.int64) * head_stride, block_stride, q_token_stride, q_head_stride, scale, soft_cap,
        WINDOW, SOFT_CAP, ANCHOR, HEAD_DIM, K_BITS, PAGE, BLOCK_D, BLOCK_M, FP8, TURN, MEANS,
    )  # fmt: skip
    acc = add_v_anchor(acc, total, v_anchor + kv_head * HEAD_DIM, HEAD_DIM, V_ANCHOR)
    if SINKS:
        if not SOFT_CAP:  # sinks are compared with whole logits, which under a cap they are already
            base += q_bias
        total += tl.exp2(tl.load(sinks + head).to(tl.float32) * LOG2E - base)
    acc = acc / total[:, None]
    channels = tl.arange(0, BLOCK_D)
    target = out + ((q_start + local).to(tl.int64) * out_token_stride + head * out_head_stride)[:, None] + channels[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=valid[:, None] & (channels < HEAD_DIM)[None, :])


def table_strides(block_table: torch.Tensor) -> tuple[int, int]:
    """Of requests and of KV heads, which may share a list."""
    return block_table.stride(0), block_table.stride(1) if block_table.dim() == 3 else 0


def turn_arguments(turns: Turns | None, unused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernels take for turns: its tensors, or some other where there are none."""
    return (unused, unused) if turns is None else (turns.pages, turns.table)


@functools.cache
def tile(device: torch.device, layout: PageLayout, group: int, smooth_q: bool = False) -> tuple[int, int]:
    """Rows of a query tile, and warps. If queries are smoothed, the rows have half of `reference.tile_rows` where these and
    their means find no room beside P and V of a page: on sm_86, with heads of 256 channels."""
    block_m, block_d = tile_rows(group), triton.next_power_of_2(layout.head_dim)
    element = 2 if fp8_path(device) == "half" else 1
    taken = 2 * block_m * block_d + element * layout.tokens * (block_m + block_d)
    if smooth_q and taken > shared_memory(device) and 2 * group <= block_m:
        block_m //= 2
    return block_m, 4 if block_m <= 64 and layout.head_dim <= 128 else 8


@functools.cache
def choose_kernel(
    device: torch.device, layout: PageLayout, group: int, smooth_q: bool = False
) -> tuple[ModuleType | None, str | None]:
    """The module with a kernel made for this device, these pages and, if smooth_q, smoothed queries; None for the portable one.

    Where the device has such a kernel and the portable one is taken all the same, the second element says why:
    "gluon_missing" if it cannot be imported, "page_format" if it does not read these pages, "smooth_q" if it is only that it
    does not smooth queries.
    """
    own = has_own_kernels(device)
    if not own:
        return None, None if own is False else "gluon_missing"
    from sage_kernels import hopper

    if not hopper.supports(layout, group):
        return None, "page_format"
    return (None, "smooth_q") if smooth_q else (hopper, None)


def scratch_bytes(device: torch.device, layout: PageLayout, group: int, smooth_q: bool = False) -> int:
    """How much memory `prefill` takes for itself while it runs."""
    hopper, _ = choose_kernel(device, layout, group, smooth_q)
    return 0 if hopper is None or layout.k_bits == 8 else hopper.SCRATCH


def prefill(
    query: torch.Tensor,
    pages: torch.Tensor,
    layout: PageLayout,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    window: int = 0,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    anchor: torch.Tensor | None = None,
    v_anchor: torch.Tensor | None = None,
    turns: Turns | None = None,
    *,
    max_seq_len: int | None = None,
    smooth_q: bool = False,
) -> None:
    """`reference.attention` on a GPU, with the same arguments; writes `out`, which has query's shape.

    max_seq_len: the most tokens of a request, if known; it saves room where pages are widened (see `hopper`). smooth_q: whether
    queries are smoothed, by means of the tokens of a `tile` (the reference's q_block).

    Only rows query_start_loc[0] to query_start_loc[-1] are read and written. query and out need unit stride in head_dim only.
    """
    hopper, _ = choose_kernel(query.device, layout, query.shape[1] // pages.shape[1], smooth_q)
    if hopper is not None and turns is None:
        where = block_table, seq_lens, query_start_loc
        hopper.prefill(query, pages, layout, *where, scale, out, window, soft_cap, sinks, anchor, v_anchor, max_seq_len)
        return
    num_reqs = seq_lens.numel()
    tokens, heads, head_dim = query.shape
    group = heads // pages.shape[1]
    block_m, warps = tile(query.device, layout, group, smooth_q)
    block_d = triton.next_power_of_2(head_dim)
    q_blocks = tokens // (block_m // group) + num_reqs
    fp8 = fp8_path(query.device)
    tiles = 2 if smooth_q else 1  # one of means lies beside that of queries
    _prefill_kernel[(q_blocks, pages.shape[1])](
        query, out, pages.view(torch.int8), pages.view(torch.uint8 if fp8 == "half" else torch.float8_e4m3fn),
        pages.view(torch.float32), block_table, seq_lens, query_start_loc, query if sinks is None else sinks,
        query if anchor is None else anchor, query if v_anchor is None else v_anchor, *turn_arguments(turns, query),
        scale, soft_cap, num_reqs, q_blocks,
        query.stride(0), query.stride(1), out.stride(0), out.stride(1), *table_strides(block_table), pages.stride(0),
        pages.stride(1),
        GROUP=group, WINDOW=window, SOFT_CAP=soft_cap > 0, SINKS=sinks is not None, ANCHOR=anchor is not None,
        V_ANCHOR=v_anchor is not None, HEAD_DIM=head_dim, K_BITS=layout.k_bits, PAGE=layout.tokens,
        BLOCK_D=block_d, BLOCK_M=block_m, FP8=fp8, TURN=turns is not None, MEANS=group if smooth_q else 0,
        num_warps=warps, num_stages=pipeline_stages(query.device, tiles * block_m, block_d, layout.tokens),
    )  # fmt: skip
