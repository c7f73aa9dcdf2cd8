# SPDX-License-Identifier: Apache-2.0
"""Prefill: many query tokens per request, whole prompts or chunks, behind any history. Triton, for every GPU from sm_80 on."""

import functools

import torch
import triton
import triton.language as tl

from sage_kernels.batch import LayerCalibration, Modifiers, PagedBatch
from sage_kernels.device import fp8_path, multiplies_by_warp, shared_memory
from sage_kernels.portable.primitives import LOG2E, TABLE_STRIDES, TABLES, add_v_anchor, find_request
from sage_kernels.portable.query_tile import (
    PageRange,
    QueryRows,
    attend_pages,
    cache_views,
    calibration_constants,
    calibration_tensors,
    pipeline_stages,
    tensor_or,
)
from sage_kernels.portable.turn import bias_strides
from sage_kernels.portable.widen import attend_wide_pages
from sage_kernels.reference import TILE_ROWS, tile_rows, v_inverse_bits
from sage_paged import SCRATCH_V_BITS, PageLayout


@triton.jit(do_not_specialize=["num_reqs", "q_blocks", *TABLE_STRIDES], do_not_specialize_on_alignment=TABLES)
def _prefill_kernel(
    query, out, cache_i8, cache_v, cache_f32, block_table, seq_lens, query_start_loc, sinks, k_anchor, equalizer,
    order, v_anchor, page_bias, scale, soft_cap, num_reqs, q_blocks,
    q_token_stride, q_head_stride, out_token_stride, out_head_stride, table_stride, table_head_stride, block_stride,
    head_stride, bias_stride, bias_request_stride, bias_head_stride,
    GROUP: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, SINKS: tl.constexpr, K_ANCHOR: tl.constexpr,
    EQUALIZE: tl.constexpr, ORDER: tl.constexpr, V_ANCHOR: tl.constexpr, HEAD_DIM: tl.constexpr, K_BITS: tl.constexpr,
    V_BITS: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, FP8: tl.constexpr, PAGE_BIAS: tl.constexpr, SMOOTH_Q: tl.constexpr,
    INVERSE_BITS: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Grid: (query blocks, KV heads). The last blocks have the most keys, so they start first. INVERSE_BITS, SUMS: see
    `query_tile.attend_pages`."""
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    kv_head = tl.program_id(1)
    request, q_block = find_request(query_start_loc, q_blocks - 1 - tl.program_id(0), num_reqs, BLOCK_Q)
    q_start = tl.load(query_start_loc + request)
    q_len = tl.load(query_start_loc + request + 1) - q_start
    if q_block * BLOCK_Q >= q_len:
        return
    seq_len = tl.load(seq_lens + request)

    row = tl.arange(0, BLOCK_M)
    local = q_block * BLOCK_Q + row // GROUP
    head = kv_head * GROUP + row % GROUP
    valid = (row < BLOCK_Q * GROUP) & (local < q_len)
    rows = QueryRows(q_start + local, head, seq_len - q_len + local, valid)
    first_position = seq_len - q_len + q_block * BLOCK_Q
    last_position = tl.minimum(first_position + BLOCK_Q, seq_len) - 1
    first_page = 0
    if WINDOW > 0:
        first_page = tl.maximum(first_position - WINDOW + 1, 0) // PAGE
    full_pages = (first_position + 1) // PAGE if WINDOW == 0 else first_page
    page_range = PageRange(first_page, full_pages, last_position // PAGE + 1, seq_len)

    table_offset = request.to(tl.int64) * table_stride + kv_head * table_head_stride
    bias_row = q_block * (BLOCK_Q * GROUP) + row
    state, q_bias = attend_pages(
        query, cache_i8, cache_v, cache_f32, k_anchor + kv_head * HEAD_DIM, equalizer + kv_head * HEAD_DIM,
        order + kv_head * (HEAD_DIM // 2), None, block_table + table_offset, None,
        page_bias + request.to(tl.int64) * bias_request_stride + kv_head.to(tl.int64) * bias_head_stride + bias_row,
        page_range, rows, kv_head.to(tl.int64) * head_stride, block_stride, q_token_stride, q_head_stride, bias_stride,
        scale, soft_cap,
        WINDOW, SOFT_CAP, K_ANCHOR, EQUALIZE, ORDER, HEAD_DIM, K_BITS, V_BITS, PAGE, BLOCK_D, BLOCK_M, FP8, False, PAGE_BIAS,
        SMOOTH_Q, INVERSE_BITS, SUMS,
    )  # fmt: skip
    acc = add_v_anchor(state.acc, state.l_i, v_anchor + kv_head * HEAD_DIM, HEAD_DIM, V_ANCHOR)
    l_i, m_ref = state.l_i, state.m_ref
    if SINKS:
        if not SOFT_CAP:  # a sink is compared with whole logits, which under a cap they are already
            m_ref += q_bias
        l_i += tl.exp2(tl.load(sinks + head).to(tl.float32) * LOG2E - m_ref)
    acc = acc / l_i[:, None]
    channels = tl.arange(0, BLOCK_D)
    target = out + ((q_start + local).to(tl.int64) * out_token_stride + head * out_head_stride)[:, None] + channels[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=valid[:, None] & (channels < HEAD_DIM)[None, :])


@functools.cache
def tile(device: torch.device, layout: PageLayout, group: int, smooth_q: bool = False) -> tuple[int, int, bool]:
    """Rows of a query tile, warps, and whether each warp has rows of its own, so that warps need not wait for each other.

    They have where warps multiply matrices by themselves, for heads of up to 128 channels, which fit into registers, and pages
    whose codes need no widening, which each warp would have to do. Tiles then have at least 128 rows instead of 64, for half
    the loads of pages; not with smoothed queries, whose blocks are tiles. A tile has half of `reference.tile_rows`, or a
    quarter, where the query would not fit into shared memory next to P and V of a page: with heads of 512 channels, and on
    sm_86 with heads of 256 if Q is smoothed, which takes two terms.
    """
    block_m, block_d, half = tile_rows(group), triton.next_power_of_2(layout.head_dim), fp8_path(device) == "half"
    if block_d <= 128:
        wide = (layout.k_bits, layout.v_bits) == (8, SCRATCH_V_BITS if half else 8)
        whole_rows = wide and multiplies_by_warp(device)
        if whole_rows and not smooth_q:
            block_m = max(block_m, 2 * TILE_ROWS)
        return block_m, 4 if block_m <= 64 else 8, whole_rows
    element, terms = 2 if half else 1, 2 if smooth_q else 1
    room = shared_memory(device)
    while block_m >= max(2 * group, 32) and terms * block_m * block_d + element * layout.tokens * (block_m + block_d) > room:
        block_m //= 2
    return block_m, 8, False


def prefill(
    query: torch.Tensor,
    pages: torch.Tensor,
    layout: PageLayout,
    batch: PagedBatch,
    scale: float,
    out: torch.Tensor,
    modifiers: Modifiers | None = None,
) -> None:
    """`reference.attention` with the same arguments; writes `out`, which has query's shape.

    Only rows query_start_loc[0] to query_start_loc[-1] are read and written. query and out need unit stride in head_dim only.
    Raises ValueError for a modifiers.q_block that is neither 0 nor the tokens of a tile.
    """
    attend_wide_pages(_launch, query, pages, layout, batch, scale, out, modifiers or Modifiers())


def _launch(
    query: torch.Tensor,
    pages: torch.Tensor,
    layout: PageLayout,
    batch: PagedBatch,
    scale: float,
    out: torch.Tensor,
    modifiers: Modifiers,
    calibration: LayerCalibration,
    v_bits: int,
    page_bias: torch.Tensor | None,
) -> None:
    """`prefill` with pages as they are. calibration: in place of modifiers.calibration. v_bits: of values before pages were
    widened. page_bias: see `turn.page_bias`."""
    tokens, heads, head_dim = query.shape
    kv_heads, group, smooth_q = pages.shape[1], heads // pages.shape[1], modifiers.q_block > 0
    block_m, warps, whole_rows = tile(query.device, layout, group, smooth_q)
    if smooth_q and modifiers.q_block != block_m // group:
        raise ValueError(f"q_block is {modifiers.q_block}; on this device it must be {block_m // group} tokens, or 0")
    block_d = triton.next_power_of_2(head_dim)
    buffers = 2 if block_d <= 128 <= block_m else 1  # smaller tiles leave room for a second program instead
    q_blocks = tokens // (block_m // group) + batch.num_requests
    _prefill_kernel[(q_blocks, kv_heads)](
        query, out, *cache_views(pages), batch.block_table, batch.seq_lens, batch.query_start_loc,
        tensor_or(modifiers.sinks, query), *calibration_tensors(calibration, query), tensor_or(page_bias, query),
        scale, modifiers.soft_cap, batch.num_requests, q_blocks,
        query.stride(0), query.stride(1), out.stride(0), out.stride(1), *batch.table_strides,
        pages.stride(0), pages.stride(1), *bias_strides(page_bias),
        GROUP=group, WINDOW=modifiers.window, SOFT_CAP=modifiers.soft_cap > 0, SINKS=modifiers.sinks is not None,
        **calibration_constants(calibration), HEAD_DIM=head_dim,
        K_BITS=layout.k_bits, V_BITS=layout.v_bits, PAGE=layout.tokens, BLOCK_D=block_d, BLOCK_M=block_m,
        FP8=fp8_path(query.device),
        PAGE_BIAS=page_bias is not None, SMOOTH_Q=group if smooth_q else 0,
        INVERSE_BITS=v_inverse_bits(v_bits), SUMS=16 if whole_rows else 1,
        num_warps=warps,
        num_stages=pipeline_stages(
            query.device, layout, buffers, block_m, terms=2 if smooth_q else 1, whole_rows=whole_rows,
            page_bias=page_bias is not None,
        ),
    )  # fmt: skip
