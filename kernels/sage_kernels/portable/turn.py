# SPDX-License-Identifier: Apache-2.0
"""Prompts whose pages are read at shifted RoPE positions: keys of a page are rotated in its wide copy (`widen`), once for all
query rows that read it, instead of queries for each page.

Rotated keys are quantized again (`reference.turn_keys`). The anchor of keys is not in a page, and would be rotated with it. So
each query row gets, for each page, the difference that makes to its logits (`page_bias`).
"""

import torch
import triton
import triton.language as tl

from sage_kernels.batch import PagedBatch, RopeShift
from sage_kernels.portable.codes import section_offset
from sage_kernels.portable.primitives import (
    LOG2E,
    TABLE_STRIDES,
    TABLES,
    find_request,
    quantize_halves,
    rope_pairs,
    turn_back,
)
from sage_paged import PageLayout

_BLOCK_T = 32
"""Tokens that a program of `_turn_kernel` rotates at a time."""
_BIAS_ROWS, _BIAS_PAGES, _BIAS_WARPS = 64, 64, 4
"""Query rows of a program of `_page_bias_kernel` for heads of up to 128 channels, pages at a time, and warps."""


@triton.jit(do_not_specialize=["pages", *TABLE_STRIDES], do_not_specialize_on_alignment=TABLES)
def _turn_kernel(
    wide_i8, wide_f32, shifts, shift_table, order, seq_lens, pages, table_stride, table_head_stride,
    HEAD_DIM: tl.constexpr, V_BITS: tl.constexpr, PAGE: tl.constexpr, PAGE_BYTES: tl.constexpr, ORDER: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Grid: (pages, KV heads, requests). Pages that stay where they are keep their codes. BLOCK_D: HEAD_DIM or the next power
    of two."""
    HALF: tl.constexpr = HEAD_DIM // 2
    page = tl.program_id(0)
    head = tl.program_id(1)
    request = tl.program_id(2)
    if page * PAGE >= tl.load(seq_lens + request):
        return
    shift = tl.load(shifts + request.to(tl.int64) * table_stride + head * table_head_stride + page)
    if shift == 0:
        return
    source = ((request.to(tl.int64) * pages + page) * tl.num_programs(1) + head) * PAGE_BYTES
    scales = wide_f32 + (source + section_offset("k_scale", HEAD_DIM, 8, PAGE, V_BITS)) // 4
    half = tl.arange(0, BLOCK_D // 2)
    pair = rope_pairs(order + head * HALF, BLOCK_D, HALF, ORDER)
    for first in range(0, PAGE, BLOCK_T):
        tokens = first + tl.arange(0, BLOCK_T)
        keys = wide_i8 + source + tokens[:, None] * HEAD_DIM + half[None, :]
        valid = (half < HALF)[None, :]
        low = tl.load(keys, mask=valid, other=0).to(tl.float32)
        high = tl.load(keys + HALF, mask=valid, other=0).to(tl.float32)
        # Away from the start, which is the rotation of `turn_back` with both halves exchanged.
        high, low = turn_back(high, low, (shift_table + shift * HEAD_DIM + pair)[None, :], valid, HALF)
        low, high, amax = quantize_halves(low, high)
        tl.store(keys, low, mask=valid)
        tl.store(keys + HALF, high, mask=valid)
        tl.store(scales + tokens, tl.load(scales + tokens) * (amax * (1.0 / 127.0)))


def turn(wide: torch.Tensor, layout: PageLayout, batch: PagedBatch, shift: RopeShift, order: torch.Tensor | None) -> None:
    """Rotate the keys of wide pages, in place, to where `shift` has them read.

    wide, layout, batch: from `widen`. shift: of the batch before. order: `LayerCalibration.order` of the keys.
    """
    requests, used = batch.block_table.shape
    _turn_kernel[(used, wide.shape[1], requests)](
        wide.view(torch.int8), wide.view(torch.float32), shift.pages, shift.table, shift.table if order is None else order,
        batch.seq_lens, used, *_strides(shift), HEAD_DIM=layout.head_dim, V_BITS=layout.v_bits, PAGE=layout.tokens,
        PAGE_BYTES=layout.page_bytes, ORDER=order is not None, BLOCK_D=triton.next_power_of_2(layout.head_dim),
        BLOCK_T=_BLOCK_T, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_reqs", "pages", "longest", *TABLE_STRIDES], do_not_specialize_on_alignment=TABLES)
def _page_bias_kernel(
    query, bias, shifts, shift_table, k_anchor, seq_lens, query_start_loc, scale, num_reqs, pages, longest,
    q_token_stride, q_head_stride, table_stride, table_head_stride,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Grid: (query blocks, KV heads). BLOCK_M: BLOCK_Q * GROUP or the next power of two; BLOCK_P: pages at a time."""
    HALF: tl.constexpr = HEAD_DIM // 2
    head = tl.program_id(1)
    request, q_block = find_request(query_start_loc, tl.program_id(0), num_reqs, BLOCK_Q)
    start = tl.load(query_start_loc + request)
    row = tl.arange(0, BLOCK_M)
    local = q_block * BLOCK_Q + row // GROUP
    valid = (row < BLOCK_Q * GROUP) & (start + local < tl.load(query_start_loc + request + 1))
    half = tl.arange(0, BLOCK_D // 2)
    in_head = half < HALF
    q = query + (start + local).to(tl.int64)[None, :] * q_token_stride
    q += (head * GROUP + row % GROUP)[None, :] * q_head_stride + half[:, None]
    low = tl.load(q, mask=valid[None, :] & in_head[:, None], other=0.0).to(tl.float32)
    high = tl.load(q + HALF, mask=valid[None, :] & in_head[:, None], other=0.0).to(tl.float32)
    anchor = k_anchor + head * HEAD_DIM + half
    anchor_low = tl.load(anchor, mask=in_head, other=0.0)[None, :]
    anchor_high = tl.load(anchor + HALF, mask=in_head, other=0.0)[None, :]
    used = tl.cdiv(tl.load(seq_lens + request), PAGE)
    for first in range(0, used, BLOCK_P):
        page = first + tl.arange(0, BLOCK_P)
        listed = shifts + request.to(tl.int64) * table_stride + head * table_head_stride + page
        shift = tl.load(listed, mask=page < used, other=0)
        product = tl.zeros([BLOCK_P, BLOCK_M], tl.float32)
        if tl.max(shift) > 0:  # the local window stays
            turned = shift_table + shift[:, None] * HEAD_DIM + half[None, :]
            turned_high, turned_low = turn_back(anchor_high, anchor_low, turned, in_head[None, :], HALF)
            # The anchors of models whose keys have biases make logits of thousands: a product in TF32 alone would lose them.
            product = tl.dot(turned_low - anchor_low, low, product, input_precision="tf32x3")
            product = tl.dot(turned_high - anchor_high, high, product, input_precision="tf32x3")
        of_page = bias + ((head * num_reqs + request).to(tl.int64) * pages + page) * (longest * GROUP)
        target = of_page[:, None] + (q_block * (BLOCK_Q * GROUP) + row)[None, :]
        tl.store(target, product * (scale * LOG2E), mask=(page < used)[:, None] & valid[None, :])


def page_bias(
    query: torch.Tensor, layout: PageLayout, batch: PagedBatch, shift: RopeShift, scale: float, k_anchor: torch.Tensor | None
) -> torch.Tensor | None:
    """What the anchor of keys adds to base-2 logits in pages that are read at shifted positions, less what it adds where they
    are not: float32 [kv_heads, requests, pages, query tokens of a request, group], 0 in pages that stay; None without an
    anchor. Only pages and query tokens that a request has are written.

    query: [tokens, heads, head_dim]. batch: from `widen`; shift: of the batch before.
    """
    if k_anchor is None:
        return None
    (tokens, heads, head_dim), kv_heads, (requests, used) = query.shape, len(k_anchor), batch.block_table.shape
    group = heads // kv_heads
    block_d, longest = max(32, triton.next_power_of_2(head_dim)), longest_query(query, batch)
    block_q = max(1, _BIAS_ROWS * 128 // max(128, block_d) // group)
    bias = torch.empty(kv_heads, requests, used, longest, group, device=query.device)
    _page_bias_kernel[(tokens // block_q + requests, kv_heads)](
        query, bias, shift.pages, shift.table, k_anchor, batch.seq_lens, batch.query_start_loc, scale, requests, used,
        longest, query.stride(0), query.stride(1), *_strides(shift), GROUP=group, HEAD_DIM=head_dim, PAGE=layout.tokens,
        BLOCK_D=block_d, BLOCK_Q=block_q, BLOCK_M=max(16, triton.next_power_of_2(block_q * group)), BLOCK_P=_BIAS_PAGES,
        num_warps=_BIAS_WARPS,
    )  # fmt: skip
    return bias


def _strides(shift: RopeShift) -> tuple[int, int]:
    """From one request to the next in shift.pages, and from one KV head to the next."""
    return shift.pages.stride(0), shift.pages.stride(1)


def longest_query(query: torch.Tensor, batch: PagedBatch) -> int:
    """A bound on the query tokens of a request of the batch. query: [tokens, heads, head_dim]."""
    return min(len(query), batch.max_query_len or len(query))


def bias_strides(bias: torch.Tensor | None) -> tuple[int, int, int]:
    """Of a `page_bias`, from one page to the next, from one request to the next, and from one KV head to the next."""
    return (0, 0, 0) if bias is None else (bias.stride(2), bias.stride(1), bias.stride(0))
