# SPDX-License-Identifier: Apache-2.0
"""Decoding for sm_90, in Gluon: pages arrive by TMA, and tensor cores read them where they lie.

Decoding is bound by the bytes of the pages, so nothing else may hold them up. wgmma takes at least 64 rows from its A operand
and as few as 8 columns from B. So the few query rows are the columns here: K Q^T gives transposed logits, V^T P^T a transposed
output. K [tokens, channels] and V [channels, tokens] are A operands just as a page holds them. No thread ever touches an 8-bit
code, and a page costs the 128 threads a few hundred instructions. wgmma also takes its A operand from registers. That is where
4-bit codes are widened (`int4`).

To read: `_decode_kernel`, at the end, walks a program's pages. `_copy_page` brings a page, `_load_query_tile` quantizes the
queries, and `_attend_page` multiplies them by the page's keys, and P by its values. `portable.scheduler` divides the pages
among programs, and `portable.decode.merge` combines partial results.
"""

from typing import NamedTuple

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sage_kernels.batch import Modifiers, PagedBatch
from sage_kernels.device import dependent_launch, multiprocessors
from sage_kernels.hopper.copy import (
    clear_v_behind,
    copy_groups,
    copy_keys,
    copy_low,
    copy_scales,
    copy_values,
    descriptors,
    page_rows,
    plain,
)
from sage_kernels.hopper.int4 import load_k_int4, load_v_int4
from sage_kernels.hopper.ring import wait_full
from sage_kernels.portable.codes import GROUP_BYTES, section_offset, v_exponent_in_scale
from sage_kernels.portable.decode import Workspace, check_rows, merge
from sage_kernels.portable.primitives import (
    LOG2E,
    TABLE_STRIDES,
    TABLES,
    await_previous_kernel,
    inverse_or_zero,
    rotation_signs,
    rotation_span,
    softmax_reference,
    to_int,
)
from sage_kernels.portable.query_tile import calibration_constants, calibration_tensors, tensor_or
from sage_kernels.portable.scheduler import LANES, WorkItem, count_parts, find_span, next_segment, partial_slot
from sage_paged import PageLayout

_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # the name before Triton 3.7


class PageSource(NamedTuple):
    """What the copies of a decode read. k, v, groups, low, scales: TMA descriptors (`PageDescriptors`); block_rows, head_rows:
    `page_rows`; block_table and its strides: see `PagedBatch`."""

    k: gl.tensor
    v: gl.tensor
    groups: gl.tensor
    low: gl.tensor
    scales: gl.tensor
    block_rows: gl.tensor
    head_rows: gl.tensor
    block_table: gl.tensor
    table_stride: gl.tensor
    table_head_stride: gl.tensor


class Buffers(NamedTuple):
    """Shared memory of STAGES pages as copied, and the barriers `full`, on which a page's copies arrive. groups, low: for INT4
    keys."""

    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    groups: gl.shared_memory_descriptor
    low: gl.shared_memory_descriptor
    scales: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor


class Operands(NamedTuple):
    """Operands of matrix products in shared memory. q_low, q_high: codes of the query tile (INT8 keys: all in q_low); p: P of a
    page."""

    q_low: gl.shared_memory_descriptor
    q_high: gl.shared_memory_descriptor
    p: gl.shared_memory_descriptor


class QueryTile(NamedTuple):
    """scale: float32 [rows], from code products to base-2 logits; bias: float32 [rows], Q times the anchor of K, base 2;
    position: int [rows], counted from the first page that is read; length: tokens of the request, counted likewise."""

    scale: gl.tensor
    bias: gl.tensor
    position: gl.tensor
    length: gl.tensor


class SoftmaxState(NamedTuple):
    """acc: float32 [channels, rows]; l_i: float32 [tokens, rows], sums over pages (those over tokens come last); m_ref, m_i:
    float32 [rows], see `primitives.softmax_reference`."""

    acc: gl.tensor
    l_i: gl.tensor
    m_ref: gl.tensor
    m_i: gl.tensor


@gluon.jit
def _copy_page(
    source, buffers, slot, row, HEAD_DIM: gl.constexpr, K_BITS: gl.constexpr, V_BITS: gl.constexpr, PAGE: gl.constexpr
):
    """Start to copy the page that begins at `row` into a slot."""
    full = buffers.full.index(slot)
    mbarrier.expect(full, section_offset("end", HEAD_DIM, K_BITS, PAGE, V_BITS))
    copy_keys(source.k, row, buffers.k.index(slot), full, HEAD_DIM, K_BITS, PAGE)
    copy_values(source.v, row, buffers.v.index(slot), full, HEAD_DIM, K_BITS, PAGE)
    if K_BITS == 4:
        copy_groups(source.groups, row, buffers.groups.index(slot), full, HEAD_DIM, V_BITS, PAGE)
        copy_low(source.low, row, buffers.low.index(slot), full, HEAD_DIM, V_BITS, PAGE)
    copy_scales(source.scales, row, buffers.scales.index(slot), full, HEAD_DIM, K_BITS, V_BITS, PAGE)


@triton.constexpr_function
def _log2(number):
    return number.bit_length() - 1


@gluon.jit
def _rotate_back(acc, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, LAYOUT: gl.constexpr):
    """`reference.rotate_values_back` of an output [channels, rows] whose channels are in the order of `load_v_int4`. Once for
    many pages, so that the exchanges between threads do not matter."""
    SPAN: gl.constexpr = rotation_span(HEAD_DIM)
    PAIRS: gl.constexpr = gl.BlockedLayout([2, 1], [4, 8], [4, 1], [1, 0])
    y = acc.reshape([HEAD_DIM // 16, 2, 8, BLOCK_M]).permute([0, 2, 1, 3]).reshape([HEAD_DIM, BLOCK_M])
    for _ in gl.static_range(_log2(SPAN)):
        y = gl.convert_layout(y, PAIRS)
        even, odd = gl.split(y.reshape([HEAD_DIM // 2, 2, BLOCK_M]).permute([0, 2, 1]))
        y = gl.join(even + odd, even - odd).reshape([HEAD_DIM // SPAN, SPAN // 2, BLOCK_M, 2])
        y = y.permute([0, 3, 1, 2]).reshape([HEAD_DIM, BLOCK_M])
    y = gl.convert_layout(y * SPAN**-0.5, LAYOUT)
    return y * rotation_signs(gl.arange(0, HEAD_DIM, gl.SliceLayout(1, LAYOUT)))[:, None]


@gluon.jit
def _load_query(query, offsets, valid, channels):
    """These channels of query rows, float32 [rows, channels], 0 where not valid."""
    return gl.load(query + offsets[:, None] + channels[None, :], mask=valid[:, None], other=0.0).to(gl.float32)


@gluon.jit
def _load_query_tile(
    query, k_anchor, equalizer, order, operands, q_start, q_len, seq_len, kv_head, first_page, scale,
    q_token_stride, q_head_stride,
    GROUP: gl.constexpr, K_ANCHOR: gl.constexpr, EQUALIZE: gl.constexpr, ORDER: gl.constexpr, HEAD_DIM: gl.constexpr,
    K_BITS: gl.constexpr, PAGE: gl.constexpr, BLOCK_M: gl.constexpr, PART: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Quantize a request's query rows into shared memory. Returns QueryTile, its rows in the layout ROWS."""
    Q_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // PART, PART // 8], [4, 1], [1, 0])
    rows = gl.arange(0, BLOCK_M, gl.SliceLayout(1, Q_LAYOUT))
    offsets = (q_start + rows // GROUP).to(gl.int64) * q_token_stride + (kv_head * GROUP + rows % GROUP) * q_head_stride
    valid = rows // GROUP < q_len
    channels = gl.arange(0, PART, gl.SliceLayout(0, Q_LAYOUT))
    if ORDER:  # only with INT4 keys: PART is half a head
        channels = gl.load(order + kv_head * PART + channels)
    q = _load_query(query, offsets, valid, channels)
    q_high = q
    if K_BITS == 4:  # the second half of the head, with the same scale
        q_high = _load_query(query + PART, offsets, valid, channels)
    head_channels = kv_head * HEAD_DIM + channels
    if K_ANCHOR:
        product = gl.sum(q * gl.load(k_anchor + head_channels)[None, :], 1)
        if K_BITS == 4:
            product += gl.sum(q_high * gl.load(k_anchor + head_channels + PART)[None, :], 1)
    if EQUALIZE:
        q *= gl.load(equalizer + head_channels)[None, :]
        if K_BITS == 4:
            q_high *= gl.load(equalizer + head_channels + PART)[None, :]
    amax = gl.max(gl.abs(q), 1)
    if K_BITS == 4:
        amax = gl.maximum(amax, gl.max(gl.abs(q_high), 1))
    inverse = inverse_or_zero(amax, 127.0)[:, None]
    operands.q_low.store(to_int(q * inverse).to(gl.int8))
    if K_BITS == 4:
        operands.q_high.store(to_int(q_high * inverse).to(gl.int8))
    fence_async_shared()
    q_scale = gl.convert_layout(amax * (scale * LOG2E / 127.0), ROWS)
    q_bias = gl.zeros_like(q_scale)
    if K_ANCHOR:
        q_bias = gl.convert_layout(product * (scale * LOG2E), ROWS)
    rows = gl.arange(0, BLOCK_M, ROWS)
    position = seq_len - q_len + rows // GROUP - first_page * PAGE
    return QueryTile(q_scale, q_bias, position, seq_len - first_page * PAGE)


@gluon.jit
def _next_page(item, seq_lens, query_start_loc, kv_heads, WINDOW: gl.constexpr, PAGE: gl.constexpr):
    """The WorkItem of the span's next page."""
    request, kv_head, first, seen, page, left = item
    page += 1
    left -= 1
    if page == seen:
        page = 0
        request, kv_head, first, seen = next_segment(
            seq_lens, query_start_loc, request, kv_head, first, seen, kv_heads, left > 0, WINDOW, PAGE
        )
    return WorkItem(request, kv_head, first, seen, page, left)


@gluon.jit
def _row_of_page(item, source):
    """Where the page of a WorkItem begins in the cache, in rows of PAGE bytes."""
    table = source.block_table + item.request.to(gl.int64) * source.table_stride + item.kv_head * source.table_head_stride
    block = gl.load(table + item.first + item.page, mask=item.left > 0, other=0)
    return block * source.block_rows + item.kv_head * source.head_rows


@gluon.jit
def _attend_page(
    q, state, tokens, operands, buffers, n, first_token, soft_cap,
    WINDOW: gl.constexpr, SOFT_CAP: gl.constexpr, HEAD_DIM: gl.constexpr, K_BITS: gl.constexpr, V_BITS: gl.constexpr,
    PAGE: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """One step of the online softmax: the query tile against page n of the span, once its copy has arrived.

    tokens: 0 to PAGE - 1. first_token: the page's first token, counted from the first page that is read. Returns the new
    SoftmaxState."""
    SCALES: gl.constexpr = 1 if K_BITS == 4 and V_BITS == 8 else 2
    slot = n % STAGES
    wait_full(buffers.full, n, STAGES)
    codes = gl.zeros([PAGE, BLOCK_M], gl.int32, LAYOUT)
    if K_BITS == 8:
        codes = warpgroup_mma(buffers.k.index(slot), operands.q_low.permute((1, 0)), codes, use_acc=False, is_async=True)
    else:
        low, high = load_k_int4(
            buffers.k.index(slot), buffers.groups.index(slot), buffers.low.index(slot), HEAD_DIM, PAGE, LAYOUT
        )
        codes = warpgroup_mma(low, operands.q_low.permute((1, 0)), codes, use_acc=False, is_async=True)
        codes = warpgroup_mma(high, operands.q_high.permute((1, 0)), codes, is_async=True)
    v = buffers.v.index(slot)
    if V_BITS == 4:  # now, while the tensor cores are busy
        v = load_v_int4(v, HEAD_DIM, PAGE, LAYOUT)
    scales = plain(buffers.scales.index(slot), [SCALES, PAGE], gl.float32)
    k_scale = scales.slice(0, 1, dim=0).permute((1, 0)).load(LAYOUT)
    if SCALES == 2:
        v_exponent = scales.slice(1, 1, dim=0).permute((1, 0)).load(LAYOUT)
    else:
        v_exponent = v_exponent_in_scale(k_scale)
    v_inverse = gl.exp2(-v_exponent)
    codes = warpgroup_mma_wait(0, deps=[codes])

    logits = codes.to(gl.float32) * k_scale
    if SOFT_CAP:
        capped = gl.exp2((logits * q.scale[None, :] + q.bias[None, :]) * (2.0 / soft_cap))
        logits = (soft_cap * LOG2E) * (1.0 - 2.0 / (capped + 1.0)) + v_exponent  # tanh(x) = 1 - 2 / (exp(2x) + 1)
    else:
        logits = logits * q.scale[None, :] + v_exponent
    last_visible = q.position - first_token
    visible = tokens[:, None] <= last_visible[None, :]
    if WINDOW > 0:
        visible &= tokens[:, None] > last_visible[None, :] - WINDOW
    logits = gl.where(visible, logits, float("-inf"))
    m_ref, m_i = softmax_reference(gl.max(logits, 0), state.m_i, state.m_ref, True)
    finite = gl.where(m_ref == float("-inf"), 0.0, m_ref)  # a row that has seen nothing: any number will do
    p = gl.exp2(logits - finite[None, :]).to(gl.float8e4nv)
    decay = gl.exp2(state.m_ref - finite)
    filled = q.length - first_token
    weighted = p.to(gl.float32) * v_inverse
    l_i = state.l_i * decay[None, :] + gl.where((tokens < filled)[:, None], weighted, 0.0)
    p = p.reshape([PAGE // 16, 2, 4, 2, BLOCK_M]).permute([0, 2, 1, 3, 4]).reshape([PAGE, BLOCK_M])  # in the order of V
    operands.p.permute((1, 0)).store(p)
    if V_BITS == 8:  # noqa: SIM102 - known when the kernel is compiled; codes of 4-bit values are finite, whatever they are
        if filled < PAGE:
            clear_v_behind(v, filled, PAGE)
    fence_async_shared()
    # FP8 tensor cores accumulate in 22 bits: every page gets a fresh accumulator (SageAttention2, section 3.4).
    pv = gl.zeros([HEAD_DIM, BLOCK_M], gl.float32, LAYOUT)
    pv = warpgroup_mma(v, operands.p.permute((1, 0)), pv, use_acc=False, is_async=True)
    pv = warpgroup_mma_wait(0, deps=[pv])
    return SoftmaxState(state.acc * decay[None, :] + pv, l_i, m_ref, m_i)


@gluon.jit(do_not_specialize=["num_reqs", "kv_heads", "slot_rows", *TABLE_STRIDES], do_not_specialize_on_alignment=TABLES)
def _decode_kernel(
    query, out, partial, partial_m, partial_l, split, k_pages, v_pages, group_rows, low_rows, scale_rows, block_table, seq_lens,
    query_start_loc, sinks, k_anchor, equalizer, order, v_anchor, scale, soft_cap, num_reqs, kv_heads, slot_rows,
    q_token_stride, q_head_stride, out_token_stride, out_head_stride, table_stride, table_head_stride, block_rows, head_rows,
    GROUP: gl.constexpr, WINDOW: gl.constexpr, SOFT_CAP: gl.constexpr, SINKS: gl.constexpr, K_ANCHOR: gl.constexpr,
    EQUALIZE: gl.constexpr, ORDER: gl.constexpr, V_ANCHOR: gl.constexpr, HEAD_DIM: gl.constexpr, K_BITS: gl.constexpr,
    V_BITS: gl.constexpr, PAGE: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Grid and results as those of the portable kernel."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 32])
    """Of logits [tokens, rows] and of the output [channels, rows]."""
    ROWS: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    COLUMN: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    PART: gl.constexpr = HEAD_DIM if K_BITS == 8 else HEAD_DIM // 2
    """Channels that are multiplied at a time."""
    K_ROW: gl.constexpr = HEAD_DIM * K_BITS // 8
    SCALES: gl.constexpr = 1 if K_BITS == 4 and V_BITS == 8 else 2
    Q_BUFFER: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, PART], gl.int8)
    P_BUFFER: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, PAGE], gl.float8e4nv)

    k_buffers = gl.allocate_shared_memory(gl.int8, [STAGES, PAGE, K_ROW], k_pages.layout)
    v_buffers = gl.allocate_shared_memory(v_pages.dtype, [STAGES, HEAD_DIM * V_BITS // 8, PAGE], v_pages.layout)
    scale_buffers = gl.allocate_shared_memory(gl.float32, [STAGES, SCALES, PAGE], scale_rows.layout)
    q_buffer = gl.allocate_shared_memory(gl.int8, [BLOCK_M, PART], Q_BUFFER)
    group_buffers, first_buffers, q_high_buffer = k_buffers, k_buffers, q_buffer
    if K_BITS == 4:
        group_buffers = gl.allocate_shared_memory(gl.int8, [STAGES, HEAD_DIM // GROUP_BYTES, PAGE], group_rows.layout)
        first_buffers = gl.allocate_shared_memory(gl.int8, [STAGES, GROUP_BYTES, PAGE], low_rows.layout)
        q_high_buffer = gl.allocate_shared_memory(gl.int8, [BLOCK_M, PART], Q_BUFFER)
    p_buffer = gl.allocate_shared_memory(gl.float8e4nv, [BLOCK_M, PAGE], P_BUFFER)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
    fence_async_shared()
    source = PageSource(
        k_pages, v_pages, group_rows, low_rows, scale_rows, block_rows, head_rows, block_table, table_stride, table_head_stride
    )
    buffers = Buffers(k_buffers, v_buffers, group_buffers, first_buffers, scale_buffers, full)
    operands = Operands(q_buffer, q_high_buffer, p_buffer)

    await_previous_kernel(PDL)
    program = gl.program_id(0)
    span, item = find_span(
        seq_lens, query_start_loc, num_reqs, kv_heads, program, gl.num_programs(0),
        gl.arange(0, LANES, gl.BlockedLayout([LANES // 32], [32], [4], [0])), WINDOW, PAGE,  # all of them in each warp
    )  # fmt: skip
    request, kv_head, first, seen, page, left = item
    # Pages are copied ahead of the one that is attended to, also those of segments to come.
    ahead = item
    for stage in gl.static_range(STAGES):
        if ahead.left > 0:
            _copy_page(source, buffers, stage, _row_of_page(ahead, source), HEAD_DIM, K_BITS, V_BITS, PAGE)
            ahead = _next_page(ahead, seq_lens, query_start_loc, kv_heads, WINDOW, PAGE)

    n = 0  # page of the span
    split_segment = 0
    split_parts = 0
    while left > 0:
        q_start = gl.load(query_start_loc + request)
        q_len = gl.load(query_start_loc + request + 1) - q_start
        seq_len = gl.load(seq_lens + request)
        part = gl.minimum(seen - page, left)
        q = _load_query_tile(
            query, k_anchor, equalizer, order, operands, q_start, q_len, seq_len, kv_head, first + page, scale, q_token_stride,
            q_head_stride, GROUP, K_ANCHOR, EQUALIZE, ORDER, HEAD_DIM, K_BITS, PAGE, BLOCK_M, PART, ROWS,
        )  # fmt: skip
        tokens = gl.arange(0, PAGE, COLUMN)
        nothing = gl.full([BLOCK_M], float("-inf"), gl.float32, ROWS)
        state = SoftmaxState(
            gl.zeros([HEAD_DIM, BLOCK_M], gl.float32, LAYOUT), gl.zeros([PAGE, BLOCK_M], gl.float32, LAYOUT), nothing, nothing
        )
        for i in range(part):
            row = _row_of_page(ahead, source)
            state = _attend_page(
                q, state, tokens, operands, buffers, n, i * PAGE, soft_cap,
                WINDOW, SOFT_CAP, HEAD_DIM, K_BITS, V_BITS, PAGE, BLOCK_M, STAGES, LAYOUT,
            )  # fmt: skip
            _barrier()  # no warp reads this slot any more
            if ahead.left > 0:
                _copy_page(source, buffers, n % STAGES, row, HEAD_DIM, K_BITS, V_BITS, PAGE)
                ahead = _next_page(ahead, seq_lens, query_start_loc, kv_heads, WINDOW, PAGE)
            n += 1

        acc, m_ref = state.acc, state.m_ref
        if V_BITS == 4:
            acc = _rotate_back(acc, HEAD_DIM, BLOCK_M, LAYOUT)
        l_i = gl.sum(state.l_i, 0)
        channels = gl.arange(0, HEAD_DIM, COLUMN)
        if V_ANCHOR:
            acc += gl.load(v_anchor + kv_head * HEAD_DIM + channels)[:, None] * l_i[None, :]
        if K_ANCHOR and not SOFT_CAP:  # a sink is compared with whole logits, which under a cap they are already
            m_ref += q.bias
        rows = gl.arange(0, BLOCK_M, ROWS)
        head = kv_head * GROUP + rows % GROUP
        valid = rows // GROUP < q_len
        if part == seen:
            if SINKS:
                l_i += gl.exp2(gl.load(sinks + head, mask=valid, other=0.0).to(gl.float32) * LOG2E - m_ref)
            target = out + (q_start + rows // GROUP).to(gl.int64) * out_token_stride + head * out_head_stride
            acc = acc / gl.where(l_i > 0.0, l_i, 1.0)[None, :]
            gl.store(target[None, :] + channels[:, None], acc.to(out.dtype.element_ty), mask=valid[None, :])
        else:
            slot_row = partial_slot(program, page > 0) * slot_rows + rows
            # A row that saw nothing has l_i 0; the merge skips it because its m_ref is -inf.
            acc = acc / gl.where(l_i > 0.0, l_i, 1.0)[None, :]
            gl.store(partial + slot_row[None, :] * HEAD_DIM + channels[:, None], acc, mask=valid[None, :])
            gl.store(partial_m + slot_row, m_ref, mask=valid)
            gl.store(partial_l + slot_row, l_i, mask=valid)
            if page == 0:
                split_segment = request * kv_heads + kv_head
                split_parts = count_parts(part, seen, span)
        left -= part
        page = 0
        request, kv_head, first, seen = next_segment(
            seq_lens, query_start_loc, request, kv_head, first, seen, kv_heads, left > 0, WINDOW, PAGE
        )
    gl.store(split + 2 * program, split_segment)
    gl.store(split + 2 * program + 1, split_parts)


_STAGES = 2
"""Pages that a program has in flight. On an H100 three, or three programs per multiprocessor, read no faster."""


def supports(layout: PageLayout) -> bool:
    """Whether there is a kernel for pages of this layout."""
    return layout.head_dim in (64, 128, 256)


def _programs_at_once(layout: PageLayout) -> int:
    """Programs that a multiprocessor runs at a time. Where pages are small, or 4-bit codes take time to widen, it takes more of
    them to keep the memory busy. Measured on an H200 at 128 x 1K, 64 x 8K and 8 x 128K tokens."""
    widened = (layout.k_bits == 4) + (layout.v_bits == 4)
    return {64: (2, 4, 4), 128: (2, 2, 4), 256: (1, 1, 2)}[layout.head_dim][widened]


def count_programs(device: torch.device, layout: PageLayout) -> int:
    """How many programs share the work of a step."""
    return _programs_at_once(layout) * multiprocessors(device)


def decode(
    query: torch.Tensor,
    pages: torch.Tensor,
    layout: PageLayout,
    batch: PagedBatch,
    scale: float,
    out: torch.Tensor,
    modifiers: Modifiers | None = None,
    workspace: Workspace | None = None,
    *,
    programs: int | None = None,
) -> None:
    """`portable.decode.decode` with the same arguments, where `supports` holds. There is no kernel for batch.rope_shift."""
    modifiers = modifiers or Modifiers()
    group, head_dim, kv_heads = query.shape[1] // pages.shape[1], query.shape[2], pages.shape[1]
    calibration = modifiers.calibration_for(batch, layout.k_bits)
    rows = check_rows(query.device, layout, batch.max_query_len or 1, group)
    programs = programs or count_programs(query.device, layout)
    workspace = workspace or Workspace.allocate(programs, rows, head_dim, query.device)
    workspace.check(programs, rows, head_dim)
    block_m = max(8, 1 << (rows - 1).bit_length())
    # Four programs of 128 threads fit into the registers if each has at most 128. More rows need more.
    registers = 128 if block_m == 8 and _programs_at_once(layout) == 4 else None
    _decode_kernel[(programs,)](
        query, out, *workspace.tensors, *descriptors(pages, layout), batch.block_table, batch.seq_lens, batch.query_start_loc,
        tensor_or(modifiers.sinks, query), *calibration_tensors(calibration, query), scale, modifiers.soft_cap,
        batch.num_requests, kv_heads, rows,
        query.stride(0), query.stride(1), out.stride(0), out.stride(1), *batch.table_strides, *page_rows(pages, layout),
        GROUP=group, WINDOW=modifiers.window, SOFT_CAP=modifiers.soft_cap > 0, SINKS=modifiers.sinks is not None,
        **calibration_constants(calibration), HEAD_DIM=head_dim,
        K_BITS=layout.k_bits, V_BITS=layout.v_bits, PAGE=layout.tokens, BLOCK_M=block_m, STAGES=_STAGES, num_warps=4,
        maxnreg=registers, **dependent_launch(query.device),
    )  # fmt: skip
    merge(query, out, batch, kv_heads, rows, programs, modifiers, workspace)
