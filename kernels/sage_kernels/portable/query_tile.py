# SPDX-License-Identifier: Apache-2.0
"""A query tile and the pages of its request, for prefill and decode alike.

The query heads that share a KV head are packed into the rows of one tile (row = token * group + head of the group), so that
each page is read once for all of them.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sage_kernels.batch import LayerCalibration, RopeShift
from sage_kernels.device import fp8_path, multiplies_by_warp, shared_memory
from sage_kernels.portable.primitives import (
    LOG2E,
    QuantizedQuery,
    SoftmaxState,
    attend_page,
    quantize_terms,
    rope_pairs,
    rotate_values_back,
    turn_back,
)
from sage_paged import PageLayout


class QueryRows(NamedTuple):
    """The rows of a query tile. token: int [rows], index into the batch's query tokens; head: int [rows], query head; position:
    int [rows], of the token in its context; valid: bool [rows]."""

    token: tl.tensor
    head: tl.tensor
    position: tl.tensor
    valid: tl.tensor


class PageRange(NamedTuple):
    """Pages of a request that a tile reads: from `first` to before `end`. Every row sees those before `full` whole. seq_len:
    tokens of the request."""

    first: tl.tensor
    full: tl.tensor
    end: tl.tensor
    seq_len: tl.tensor


@triton.jit
def load_query(query, rows, token_stride, head_stride, channels, limit):
    """A query tile as float32 [rows, channels]. Channels from `limit` on and invalid rows are 0. rows: QueryRows."""
    pointers = query + (rows.token.to(tl.int64) * token_stride + rows.head * head_stride)[:, None] + channels[None, :]
    return tl.load(pointers, mask=rows.valid[:, None] & (channels < limit)[None, :], other=0.0).to(tl.float32)


@triton.jit
def take_channels(q, channels):
    """Query rows [rows, n] with these of their channels, int32 [n]. Loading them so would scatter rows, and leave them in an
    order in which the tensor cores' operands cannot be read in whole words."""
    return tl.gather(q, tl.broadcast_to(channels[None, :], q.shape), 1)


@triton.jit
def equalize(q, equalizer, channels, limit, EQUALIZE: tl.constexpr):
    """Query rows float32 [rows, channels] times the equalizer of keys, if EQUALIZE. equalizer: pointer to the first channel's;
    channels from `limit` on stay."""
    if EQUALIZE:
        q = q * tl.load(equalizer + channels, mask=channels < limit, other=1.0)[None, :]
    return q


@triton.jit
def _times_anchor(q, k_anchor, channels, limit, K_ANCHOR: tl.constexpr):
    """Query rows times the anchor of K over the channels before `limit`, float32 [rows]; 0 without K_ANCHOR."""
    if K_ANCHOR:
        product = tl.sum(q * tl.load(k_anchor + channels, mask=channels < limit, other=0.0)[None, :], 1)
    else:
        product = tl.zeros([q.shape[0]], tl.float32)
    return product


@triton.jit
def quantize_query(
    query, k_anchor, equalizer, order, shift, rows, token_stride, head_stride, scale,
    K_ANCHOR: tl.constexpr, EQUALIZE: tl.constexpr, ORDER: tl.constexpr, SHIFT: tl.constexpr, HEAD_DIM: tl.constexpr,
    K_BITS: tl.constexpr, BLOCK_D: tl.constexpr, SMOOTH_Q: tl.constexpr,
):  # fmt: skip
    """Load and quantize a query tile. Returns QuantizedQuery.

    k_anchor, equalizer, order: pointers to those of the KV head, if K_ANCHOR, EQUALIZE, ORDER. shift: pointer to a row of a
    `rope_shift_table`, if SHIFT. rows: QueryRows. SMOOTH_Q: see `primitives.quantize_terms`.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    if K_BITS == 8:
        channels = tl.arange(0, BLOCK_D)
        q = load_query(query, rows, token_stride, head_stride, channels, HEAD_DIM)
        if ORDER:  # of wide pages (`widen`)
            ordered = tl.load(order + channels % HALF) + channels // HALF * HALF
            channels = ordered if BLOCK_D == HEAD_DIM else tl.where(channels < HEAD_DIM, ordered, channels)
            q = take_channels(q, channels)
        if SHIFT:
            low_half = channels < HALF
            angle = tl.where(low_half, channels, channels - HALF)
            cos = tl.load(shift + angle, mask=channels < HEAD_DIM, other=1.0)
            sin = tl.load(shift + HALF + angle, mask=channels < HEAD_DIM, other=0.0)
            partner = tl.where(low_half, channels + HALF, channels - HALF)
            other = load_query(query, rows, token_stride, head_stride, partner, HEAD_DIM)
            q = q * cos[None, :] + other * tl.where(low_half, sin, -sin)[None, :]
        product = _times_anchor(q, k_anchor, channels, HEAD_DIM, K_ANCHOR)
        q = equalize(q, equalizer, channels, HEAD_DIM, EQUALIZE)
        low = q
        high = q
    else:
        pair = rope_pairs(order, BLOCK_D, HALF, ORDER)
        half = tl.arange(0, BLOCK_D // 2)
        low = load_query(query, rows, token_stride, head_stride, half, HALF)
        high = load_query(query + HALF, rows, token_stride, head_stride, half, HALF)
        if ORDER:
            low, high = take_channels(low, pair), take_channels(high, pair)
        if SHIFT:
            low, high = turn_back(low, high, (shift + pair)[None, :], (pair < HALF)[None, :], HALF)
        product = _times_anchor(low, k_anchor, pair, HALF, K_ANCHOR)
        product += _times_anchor(high, k_anchor + HALF, pair, HALF, K_ANCHOR)
        low = equalize(low, equalizer, pair, HALF, EQUALIZE)
        high = equalize(high, equalizer + HALF, pair, HALF, EQUALIZE)
    low, high, q_scale, mean_low, mean_high, mean_scale = quantize_terms(low, high, rows.valid, scale, SMOOTH_Q)
    return QuantizedQuery(low, high, q_scale, mean_low, mean_high, mean_scale, product * (scale * LOG2E))


@triton.jit
def attend_pages(
    query, cache_i8, cache_v, cache_f32, k_anchor, equalizer, order, shift_table, table, shifts, page_bias, page_range, rows,
    head_offset, block_stride, q_token_stride, q_head_stride, bias_stride, scale, soft_cap,
    WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, K_ANCHOR: tl.constexpr, EQUALIZE: tl.constexpr, ORDER: tl.constexpr,
    HEAD_DIM: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, PAGE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, FP8: tl.constexpr, SHIFT: tl.constexpr, PAGE_BIAS: tl.constexpr, SMOOTH_Q: tl.constexpr,
    INVERSE_BITS: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """A query tile against a range of its request's pages. Returns SoftmaxState, whose acc is of the model's channels, and the
    bias of `QuantizedQuery`.

    page_range: PageRange; rows: QueryRows. k_anchor, equalizer, order: pointers to those of the KV head. table, shifts:
    pointers to the request's list of blocks and, if SHIFT, to its list of shifts in pages. page_bias: if PAGE_BIAS, pointers to
    what the rows' base-2 logits get in page 0 (`turn.page_bias`), bias_stride numbers before that of page 1. head_offset:
    int64, bytes from the start of a block to the page of the KV head. INVERSE_BITS: `v_inverse_bits` of values as they were
    stored. SUMS: 16 for row sums by tensor cores, which serves tiles whose warps have whole rows; 1 for sums in registers.
    """
    q = quantize_query(
        query, k_anchor, equalizer, order, shift_table, rows, q_token_stride, q_head_stride, scale,
        K_ANCHOR, EQUALIZE, ORDER, False, HEAD_DIM, K_BITS, BLOCK_D, SMOOTH_Q,
    )  # fmt: skip
    q_bias = q.bias
    bias = q_bias
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    l_i = tl.zeros([BLOCK_M, SUMS], tl.float32)
    m_ref = tl.full([BLOCK_M], float("-inf"), tl.float32)
    state = SoftmaxState(acc, l_i, m_ref, m_ref)
    if PAGE_BIAS:  # loaded a page ahead: the compiler's pipeline would take more shared memory, which pages need
        bias_ahead = tl.load(page_bias + page_range.first * bias_stride, mask=rows.valid, other=0.0)
    for masked in tl.static_range(2):
        first = tl.maximum(page_range.first, page_range.full) if masked else page_range.first
        for page in range(first, page_range.end if masked else page_range.full):
            offset = tl.load(table + page).to(tl.int64) * block_stride + head_offset
            last_visible = rows.position - page * PAGE
            first_visible = last_visible - WINDOW + 1 if WINDOW > 0 else tl.zeros_like(last_visible)
            if SHIFT:
                q = quantize_query(
                    query, k_anchor, equalizer, order, shift_table + tl.load(shifts + page) * HEAD_DIM, rows,
                    q_token_stride, q_head_stride, scale, K_ANCHOR, EQUALIZE, ORDER, True, HEAD_DIM, K_BITS, BLOCK_D, SMOOTH_Q,
                )  # fmt: skip
                bias = q.bias
                if not SOFT_CAP:
                    bias -= q_bias
            elif PAGE_BIAS:
                bias = bias_ahead
                ahead = rows.valid & (page + 1 < page_range.end)
                bias_ahead = tl.load(page_bias + (page + 1) * bias_stride, mask=ahead, other=0.0)
                if SOFT_CAP:
                    bias += q_bias
            state = attend_page(
                q, bias, state, cache_i8, cache_v, cache_f32, offset, page_range.seq_len - page * PAGE,
                first_visible, last_visible, soft_cap,
                HEAD_DIM, K_BITS, V_BITS, PAGE, masked == 1, SOFT_CAP, FP8, SHIFT or PAGE_BIAS, SMOOTH_Q, INVERSE_BITS,
            )  # fmt: skip
    acc = state.acc
    if FP8 == "half":
        acc *= 256.0  # see `halves_of`
    acc = rotate_values_back(acc, HEAD_DIM, V_BITS)
    l_i = tl.max(state.l_i, 1) * 2**-INVERSE_BITS
    return SoftmaxState(acc, l_i, state.m_ref, state.m_i), q_bias


@functools.cache  # asked for in every launch
def pipeline_stages(
    device: torch.device, layout: PageLayout, buffers: int, block_m: int, terms: int = 1, whole_rows: bool = False,
    page_bias: bool = False,
) -> int:  # fmt: skip
    """The num_stages of `attend_pages` for that many buffers of a page in shared memory, or for as many as there is room for.
    The load of a page waits for its number in the block table, so each takes two stages. With two buffers, a page is loaded
    while another is computed; with one, other programs of the multiprocessor compute in the meantime.

    block_m: rows of a query tile, in `terms` terms; whole_rows: see `prefill.tile`; page_bias: whether there is one.
    """
    page = layout.offset("end") * triton.next_power_of_2(layout.head_dim) // layout.head_dim
    other = bytes_beside_pages(device, layout, block_m, terms, whole_rows, page_bias)
    return 1 + 2 * max(0, min(buffers, (shared_memory(device) - other) // page))


def bytes_beside_pages(
    device: torch.device, layout: PageLayout, block_m: int, terms: int = 1, whole_rows: bool = False, page_bias: bool = False
) -> int:
    """Shared memory that `attend_pages` needs beside its buffers of pages. Arguments are those of `pipeline_stages`."""
    block_d, half = triton.next_power_of_2(layout.head_dim), fp8_path(device) == "half"
    other = 512 + terms * block_m * block_d + 4 * block_m * page_bias
    if not whole_rows:
        other += block_m * layout.tokens * (2 if half else 1)
    if layout.k_bits == 4:
        other += layout.tokens * block_d
    if half:  # the inverses of scales, if they are a matrix, and values that are widened from 4 bits
        other += 32 * layout.tokens * whole_rows + 2 * layout.tokens * block_d * (layout.v_bits == 4)
    else:  # V without what is behind the last token, or in float16 for tiles that are too small for FP8 instructions
        other += layout.tokens * block_d * (1 if multiplies_by_warp(device) or block_m >= 64 else 2)
    return other


# Arguments of launches. A kernel is passed any tensor for an argument that it does not read.


def tensor_or(tensor: torch.Tensor | None, unused: torch.Tensor) -> torch.Tensor:
    return unused if tensor is None else tensor


def calibration_tensors(calibration: LayerCalibration, unused: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The `k_anchor`, `equalizer`, `order` and `v_anchor` of a kernel."""
    tensors = calibration.k_anchor, calibration.equalizer, calibration.order, calibration.v_anchor
    return tuple(tensor_or(tensor, unused) for tensor in tensors)


def calibration_constants(calibration: LayerCalibration) -> dict[str, bool]:
    """Which of `calibration_tensors` a kernel uses."""
    return {
        "K_ANCHOR": calibration.k_anchor is not None,
        "EQUALIZE": calibration.equalizer is not None,
        "ORDER": calibration.order is not None,
        "V_ANCHOR": calibration.v_anchor is not None,
    }


def shift_tensors(shift: RopeShift | None, unused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The `shifts` and `shift_table` of a kernel."""
    return (unused, unused) if shift is None else (shift.pages, shift.table)


def cache_views(pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The cache as int8 keys, as e4m3 values, and as float32 scales. Devices without e4m3 (`device.fp8_path`) read values as
    32-bit words or as float16, and get uint8 for them."""
    v_type = torch.uint8 if fp8_path(pages.device) == "half" else torch.float8_e4m3fn
    return pages.view(torch.int8), pages.view(v_type), pages.view(torch.float32)
