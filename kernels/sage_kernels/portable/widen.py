# SPDX-License-Identifier: Apache-2.0
"""Widening: pages of 4-bit keys or values as pages of INT8 keys and e4m3 values, for kernels that read only these, and on GPUs
without FP8 any page as one of INT8 keys and float16 values.

INT4 keys stand for INT8 codes (`reference.unpack_int4`) and 4-bit values for e4m3 codes (`reference.v_levels`), so attention to
either page gives the same result, bit for bit. Values stay rotated, and so is the output: `rotate_output_back` ends that.
Prefill reads each page of the history once for every 64 or 128 query rows; widening it once before costs a fraction of that.
Pages that are read at shifted RoPE positions are copied, too, whatever their codes, so that their keys can be rotated (`turn`).
"""

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
import triton
import triton.language as tl

from sage_kernels.batch import Modifiers, PagedBatch, RopeShift
from sage_kernels.device import fp8_path
from sage_kernels.portable.codes import GROUP_BYTES, half_words, section_offset, v_exponent_in_scale, widen_k_int4, widen_v_int4
from sage_kernels.portable.primitives import TABLE_STRIDES, TABLES, hadamard, rotation_signs, rotation_span
from sage_kernels.portable.turn import longest_query, page_bias, turn
from sage_kernels.reference import rotate_values
from sage_paged import SCRATCH_V_BITS, PageLayout

SCRATCH = 512 << 20
"""Bytes of wide pages, and of their `page_bias`, that exist at a time. One KV head of one request may take more."""


@triton.jit
def _load(pointers, in_head, WHOLE: tl.constexpr):
    """Where in_head, or, if WHOLE, everywhere: masks that are always true cost instructions."""
    if WHOLE:
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=in_head)
    return x


@triton.jit
def _store(pointers, x, in_head, WHOLE: tl.constexpr):
    """Likewise."""
    if WHOLE:
        tl.store(pointers, x)
    else:
        tl.store(pointers, x, mask=in_head)


@triton.jit
def _widen_keys(
    narrow_i8, narrow_i32, wide_i32, source, target,
    HEAD_DIM: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, PAGE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The codes of K of the page at `source`, bytes from the start of the cache, to the wide page at `target`."""
    WHOLE: tl.constexpr = BLOCK_D == HEAD_DIM
    tokens = tl.arange(0, PAGE)
    if K_BITS == 8:
        word = tl.arange(0, BLOCK_D // 4)[None, :]
        words = tokens[:, None] * (HEAD_DIM // 4) + word
        in_head = word < HEAD_DIM // 4
        codes = _load(narrow_i32 + source // 4 + words, in_head, WHOLE)
        _store(wide_i32 + target // 4 + words, codes, in_head, WHOLE)
    else:
        K_ROW: tl.constexpr = HEAD_DIM // 2
        GROUPS: tl.constexpr = K_ROW // GROUP_BYTES
        groups = tl.arange(0, BLOCK_D // 2 // GROUP_BYTES)
        in_head = groups[None, :, None] < GROUPS
        in_group = groups[None, :, None] * (GROUP_BYTES // 4) + tl.arange(0, GROUP_BYTES // 4)[None, None, :]
        packed = _load(narrow_i32 + source // 4 + tokens[:, None, None] * (K_ROW // 4) + in_group, in_head, WHOLE)
        section = narrow_i8 + source + section_offset("k_groups", HEAD_DIM, 4, PAGE, V_BITS)
        steps = section + tokens[:, None] * 2 * GROUPS + groups[None, :]
        step = _load(steps, groups[None, :] < GROUPS, WHOLE)[:, :, None]
        zero = _load(steps + GROUPS, groups[None, :] < GROUPS, WHOLE)[:, :, None]
        # The low nibbles of the first group, 0 in others.
        section = narrow_i32 + (source + section_offset("k_low", HEAD_DIM, 4, PAGE, V_BITS)) // 4
        in_first = groups[None, :, None] == 0
        first = tl.load(section + tokens[:, None, None] * (GROUP_BYTES // 4) + in_group, mask=in_first, other=0)
        k = wide_i32 + target // 4 + tokens[:, None, None] * (HEAD_DIM // 4) + in_group
        low, high = widen_k_int4(packed, first, step, zero)
        _store(k, low, in_head, WHOLE)
        _store(k + K_ROW // 4, high, in_head, WHOLE)


@triton.jit
def _store_values(v, channel, word, codes, in_head, PAGE: tl.constexpr, WIDE_V_BITS: tl.constexpr, WHOLE: tl.constexpr):
    """Store words of four e4m3 codes, number `word` of a channel of V, where in_head: as they are, or in float16 and the
    tokens' own order."""
    if WIDE_V_BITS == 8:
        _store(v + channel * (PAGE // 4) + word, codes, in_head, WHOLE)
    else:  # a word has tokens 2j, 2j + 1, 2j + 8 and 2j + 9 of 16 (`sage_paged.v_position`)
        even, odd = half_words(codes)
        v += channel * (PAGE // 2) + word // 4 * 8 + word % 4
        _store(v, (even & 0xFFFF) | (odd << 16), in_head, WHOLE)
        _store(v + 4, ((even >> 16) & 0xFFFF) | (odd & -0x10000), in_head, WHOLE)


@triton.jit
def _widen_values(
    narrow_i32, wide_i32, source, target, HEAD_DIM: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr,
    PAGE: tl.constexpr, WIDE_V_BITS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The codes of V, likewise."""
    v = narrow_i32 + (source + section_offset("v", HEAD_DIM, K_BITS, PAGE, V_BITS)) // 4
    wide_v = wide_i32 + (target + section_offset("v", HEAD_DIM, 8, PAGE, WIDE_V_BITS)) // 4
    row, word = tl.arange(0, BLOCK_D * V_BITS // 8)[:, None], tl.arange(0, PAGE // 4)[None, :]
    WHOLE: tl.constexpr = BLOCK_D == HEAD_DIM
    in_head = row < HEAD_DIM * V_BITS // 8
    codes = _load(v + row * (PAGE // 4) + word, in_head, WHOLE)
    if V_BITS == 8:
        _store_values(wide_v, row, word, codes, in_head, PAGE, WIDE_V_BITS, WHOLE)
    else:  # a row has two adjacent channels
        _store_values(wide_v, 2 * row, word, widen_v_int4(codes), in_head, PAGE, WIDE_V_BITS, WHOLE)
        _store_values(wide_v, 2 * row + 1, word, widen_v_int4(codes >> 4), in_head, PAGE, WIDE_V_BITS, WHOLE)


@triton.jit(do_not_specialize=["pages", *TABLE_STRIDES], do_not_specialize_on_alignment=TABLES)
def _widen_kernel(
    narrow_i8, narrow_i32, wide_i32, block_table, seq_lens, query_start_loc, pages,
    table_stride, table_head_stride, block_stride, head_stride,
    HEAD_DIM: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, PAGE: tl.constexpr, WIDE_BYTES: tl.constexpr,
    WINDOW: tl.constexpr, WIDE_V_BITS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid: (pages, KV heads, requests). BLOCK_D: HEAD_DIM or the next power of two."""
    page = tl.program_id(0)
    head = tl.program_id(1)
    request = tl.program_id(2)
    seq_len = tl.load(seq_lens + request)
    if page * PAGE >= seq_len:
        return
    if WINDOW > 0:
        queries = tl.load(query_start_loc + request + 1) - tl.load(query_start_loc + request)
        if (page + 1) * PAGE <= seq_len - queries - WINDOW + 1:
            return
    block = tl.load(block_table + request.to(tl.int64) * table_stride + head * table_head_stride + page)
    source = block.to(tl.int64) * block_stride + head.to(tl.int64) * head_stride
    target = ((request.to(tl.int64) * pages + page) * tl.num_programs(1) + head) * WIDE_BYTES
    _widen_keys(narrow_i8, narrow_i32, wide_i32, source, target, HEAD_DIM, K_BITS, V_BITS, PAGE, BLOCK_D)
    _widen_values(narrow_i32, wide_i32, source, target, HEAD_DIM, K_BITS, V_BITS, PAGE, WIDE_V_BITS, BLOCK_D)
    tokens = tl.arange(0, PAGE)
    scales = narrow_i32 + (source + section_offset("k_scale", HEAD_DIM, K_BITS, PAGE, V_BITS)) // 4 + tokens
    k_scale = tl.load(scales)
    if K_BITS == 4 and V_BITS == 8:
        v_exponent = v_exponent_in_scale(k_scale).to(tl.int32, bitcast=True)
    else:
        v_exponent = tl.load(scales + PAGE)
    wide_scales = wide_i32 + (target + section_offset("k_scale", HEAD_DIM, 8, PAGE, WIDE_V_BITS)) // 4 + tokens
    tl.store(wide_scales, k_scale)
    tl.store(wide_scales + PAGE, v_exponent)


@functools.cache  # asked for in every call
def _wide_layout(layout: PageLayout, fp8: str) -> PageLayout:
    """The layout of widened pages: float16 values where there are no FP8 instructions (see `device.fp8_path`), if two of these
    pages fit into shared memory on sm_80."""
    v_bits = SCRATCH_V_BITS if fp8 == "half" and layout.head_dim <= 128 else 8
    return PageLayout(layout.head_dim, 8, layout.tokens, v_bits=v_bits)


def widens(layout: PageLayout, device: torch.device) -> bool:
    """Whether `attend_wide_pages` widens pages of this layout."""
    wide = _wide_layout(layout, fp8_path(device))
    return (layout.k_bits, layout.v_bits) != (wide.k_bits, wide.v_bits)


def widen(
    pages: torch.Tensor, layout: PageLayout, batch: PagedBatch, max_seq_len: int, window: int = 0
) -> tuple[torch.Tensor, PageLayout, PagedBatch]:
    """Copies of the batch's pages with INT8 keys and e4m3 or float16 values: the cache that holds them, its layout, and the
    batch with its block table.

    max_seq_len: upper bound on the tokens of a request. Pages that no query of a request sees through the window are skipped;
    their copies hold anything.
    """
    requests, kv_heads = batch.num_requests, pages.shape[1]
    used = min(-(-max_seq_len // layout.tokens), batch.block_table.shape[-1])
    wide_layout = _wide_layout(layout, fp8_path(pages.device))
    wide = torch.empty(requests * used, kv_heads, wide_layout.page_bytes, dtype=torch.uint8, device=pages.device)
    _widen_kernel[(used, kv_heads, requests)](
        pages.view(torch.int8), pages.view(torch.int32), wide.view(torch.int32), batch.block_table, batch.seq_lens,
        batch.query_start_loc, used, *batch.table_strides, pages.stride(0), pages.stride(1),
        HEAD_DIM=layout.head_dim, K_BITS=layout.k_bits, V_BITS=layout.v_bits, PAGE=layout.tokens,
        WIDE_BYTES=wide_layout.page_bytes, WINDOW=window, WIDE_V_BITS=wide_layout.v_bits,
        BLOCK_D=triton.next_power_of_2(layout.head_dim), num_warps=4,
    )  # fmt: skip
    table = torch.arange(requests * used, dtype=torch.int32, device=pages.device).view(requests, used)
    return wide, wide_layout, replace(batch, block_table=table)


@triton.jit(do_not_specialize=["num_reqs"], do_not_specialize_on_alignment=TABLES)
def _rotate_output_kernel(
    out, query_start_loc, num_reqs, token_stride, head_stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Grid: (token blocks, query heads). BLOCK_D: HEAD_DIM or the next power of two."""
    token = tl.load(query_start_loc) + tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    channels = tl.arange(0, BLOCK_D)
    valid = (token < tl.load(query_start_loc + num_reqs))[:, None] & (channels < HEAD_DIM)[None, :]
    rows = out + token[:, None].to(tl.int64) * token_stride + tl.program_id(1) * head_stride + channels[None, :]
    x = hadamard(tl.load(rows, mask=valid, other=0.0).to(tl.float32), rotation_span(HEAD_DIM))
    tl.store(rows, (x * rotation_signs(channels)[None, :]).to(out.dtype.element_ty), mask=valid)


def rotate_output_back(out: torch.Tensor, batch: PagedBatch) -> None:
    """`reference.rotate_values_back` of attention's output [tokens, heads, head_dim], in place: the rows of the batch's
    requests."""
    tokens, heads, head_dim = out.shape
    _rotate_output_kernel[(triton.cdiv(tokens, 16), heads)](
        out, batch.query_start_loc, batch.num_requests, out.stride(0), out.stride(1), HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim), BLOCK_T=16, num_warps=4,
    )  # fmt: skip


@functools.cache
def _rotation(head_dim: int, device: torch.device) -> torch.Tensor:
    """`reference.rotate_values` as a matrix, float32 [head_dim, head_dim], from the right."""
    return rotate_values(torch.eye(head_dim)).to(device)


def _even_part(count: int, most: int) -> int:
    """The largest of the parts, each at most max(1, most), into which `count` is divided as evenly as possible."""
    return -(-count // -(-count // max(1, most)))


def attend_wide_pages(
    launch: Callable[..., None],
    query: torch.Tensor,
    pages: torch.Tensor,
    layout: PageLayout,
    batch: PagedBatch,
    scale: float,
    out: torch.Tensor,
    modifiers: Modifiers,
) -> None:
    """Attention by `launch`, to pages that are copied first if `widens` says so or the batch has a rope_shift, SCRATCH bytes at
    a time.

    launch: a function with these arguments and, at the end, the calibration to use in place of modifiers.calibration, the bits
    of values before pages were widened, and the `page_bias`. It finds wide keys in the order of the calibration, and rotated.
    """
    if batch.rope_shift is None and not widens(layout, query.device):
        calibration = modifiers.calibration_for(batch, layout.k_bits)
        launch(query, pages, layout, batch, scale, out, modifiers, calibration, layout.v_bits, None)
        return
    requests, kv_heads, group = batch.num_requests, pages.shape[1], query.shape[1] // pages.shape[1]
    longest = min(batch.max_seq_len or 1 << 31, batch.block_table.shape[-1] * layout.tokens)
    page_bytes = _wide_layout(layout, fp8_path(query.device)).page_bytes
    if batch.rope_shift is not None and modifiers.calibration.k_anchor is not None:
        page_bytes += 4 * group * longest_query(query, batch)
    context_bytes = -(-longest // layout.tokens) * page_bytes
    contexts = max(1, SCRATCH // context_bytes)  # of one KV head, that fit into the scratch memory
    # Even parts: a small last one would leave most multiprocessors idle for as long as a large one takes.
    heads_at_once = _even_part(kv_heads, contexts // requests)
    requests_at_once = _even_part(requests, contexts // heads_at_once)
    for head in range(0, kv_heads, heads_at_once):
        kv, own = slice(head, head + heads_at_once), slice(head * group, (head + heads_at_once) * group)
        for request in range(0, requests, requests_at_once):
            part = batch.requests(request, min(request + requests_at_once, requests))
            if part.block_table.dim() == 3:
                part = replace(part, block_table=part.block_table[:, kv])
            shift, part = part.rope_shift, replace(part, rope_shift=None)
            wide, wide_layout, part = widen(pages[:, kv], layout, part, longest, modifiers.window)
            of_heads, bias = modifiers.heads(kv, group), None
            calibration = of_heads.calibration_for(part, layout.k_bits)
            if shift is not None:
                shift = RopeShift(shift.pages[:, kv], shift.table)
                turn(wide, wide_layout, part, shift, calibration.order)
                bias = page_bias(query[:, own], wide_layout, part, shift, scale, of_heads.calibration.k_anchor)
            if layout.v_bits == 4 and calibration.v_anchor is not None:  # it joins an output that is still rotated
                calibration = replace(calibration, v_anchor=calibration.v_anchor @ _rotation(layout.head_dim, query.device))
            launch(query[:, own], wide, wide_layout, part, scale, out[:, own], of_heads, calibration, layout.v_bits, bias)
            del wide, bias  # before the next part allocates its own
            if layout.v_bits == 4:
                rotate_output_back(out[:, own], part)
