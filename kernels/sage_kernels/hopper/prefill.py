# SPDX-License-Identifier: Apache-2.0
"""Prefill for sm_90, in Gluon: the arithmetic of `portable.primitives.attend_page`, with the hardware's units scheduled by
hand.

Partitions of warps work on a tile. One warp copies pages into shared memory (TMA), one prepares their scales, and warpgroups of
64 query rows each attend. Programs are persistent (`scheduler`), so that pages of the next tile arrive while one ends.

There are three forms. Each partition has machine code of its own, and a tile of few pages runs through most of it, so two
partitions that attend wait for instructions more than they compute. PINGPONG has two, which share the pages: while one computes
exponentials, the other has the tensor cores. In COOPERATIVE, they are one partition, with one code. SINGLE has one warpgroup,
and two programs a multiprocessor, so that one computes while the other begins or ends a tile.

The two halves of a softmax use different units: logits and their maximum take arithmetic, exponentials the special function
units, and the second waits for the first. So a warpgroup computes the exponentials of one page together with the logits of the
next, in one straight run of instructions. Heads of 256 channels leave no registers for that: there a page is finished before
the logits of the next, and P V is accumulated a quarter of the channels at a time.

To read: `_prefill_kernel`, at the end, allocates shared memory and starts the partitions. `_copy_partition` and
`_scale_partition` bring pages. `_attend_partition` takes tiles; for each, `_attend_tile` quantizes the queries and walks the
pages. `_qk_product` multiplies queries by the keys of a page, `_add_page` multiplies P by its values.

What limits the speed, and what was tried: docs/developer/kernel-tuning.md.

Length: the four partitions of one kernel share its barriers and buffers, and are read together.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

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

from sage_kernels.batch import LayerCalibration, Modifiers, PagedBatch
from sage_kernels.device import multiprocessors
from sage_kernels.hopper.copy import (
    clear_v_behind,
    copy_keys,
    copy_scales,
    copy_values,
    descriptors,
    page_rows,
    plain,
    plain_layout,
)
from sage_kernels.hopper.ring import wait_empty, wait_full
from sage_kernels.hopper.scheduler import (
    FIELDS,
    QUEUE,
    Tables,
    TileQueue,
    counters,
    find_tile,
    get_tile,
    put_tile,
    release_tile,
)
from sage_kernels.portable.primitives import LOG2E, TABLE_STRIDES, TABLES, inverse_or_zero, softmax_reference, v_inverse_bits
from sage_kernels.portable.query_tile import calibration_constants, calibration_tensors, tensor_or
from sage_kernels.portable.turn import bias_strides
from sage_kernels.portable.widen import attend_wide_pages
from sage_paged import PageLayout

WARP_ROWS = gl.constexpr(16)
"""Query rows of a warp that attends."""


@dataclass(frozen=True)
class Form:
    """How the kernel shares out its work. A row's result is the same in all forms, up to the order in which its product with
    `k_anchor` is summed up. warps: of a partition that attends; partitions: those that share a tile; programs: of a
    multiprocessor."""

    warps: int
    partitions: int
    programs: int

    @property
    def rows(self) -> int:
        """Query rows of a tile."""
        return WARP_ROWS.value * self.warps * self.partitions


SINGLE, COOPERATIVE, PINGPONG = Form(4, 1, 2), Form(8, 1, 1), Form(4, 2, 1)
FORMS = {64: ((8192, SINGLE),), 128: ((512, SINGLE), (2048, COOPERATIVE)), 256: ((2048, COOPERATIVE),)}
"""By head_dim: up to how many tokens of context a form is faster than those behind it. PINGPONG is for the longest."""


def choose_form(head_dim: int, group: int, context: int) -> Form:
    """The form for tiles that read at most `context` tokens, with `group` query heads per KV head."""
    found = (form for most, form in FORMS[head_dim] if context <= most and group <= form.rows)
    return next(found, PINGPONG)


@triton.constexpr_function
def _is_wide(head_dim):
    """Whether the logits of a page and P V of the page before do not fit into registers together. Then one page is finished
    before the next, and channels are accumulated in parts."""
    return head_dim > 128


@triton.constexpr_function
def _channels_at_once(head_dim):
    """Channels of P V that are accumulated at a time."""
    return 64 if _is_wide(head_dim) else head_dim


@triton.constexpr_function
def _stages(head_dim, page, rows, programs):
    """Slots of shared memory. Slot n % stages holds what becomes free at the same time: V of page n with its scales, and K of
    page n + 1. K of a tile's first page has a slot of its own, behind the others."""
    room = 207 * 1024 // programs - (rows + page) * head_dim  # 20 KiB are left for conversions of layouts
    return min(1 << (room // (page * (2 * head_dim + 24))).bit_length() - 1, 8)  # a power of two divides fastest


LOGIT_BIAS = gl.constexpr(1024.0)
"""Added to all base-2 logits, to make a row's largest positive. The weights of a row are wrong in a page where all its logits
are below -LOGIT_BIAS (-710 in the exponent of e). It leaves 13 bits behind the binary point of logits and V's exponents; more
would leave fewer."""


class PageSource(NamedTuple):
    """What the copies of a prefill read. k, v, scales: TMA descriptors (`PageDescriptors`); block_rows, head_rows:
    `page_rows`."""

    k: gl.tensor
    v: gl.tensor
    scales: gl.tensor
    block_rows: gl.tensor
    head_rows: gl.tensor


class Buffers(NamedTuple):
    """Shared memory. k: [STAGES + 1, PAGE, HEAD_DIM], the last slot for a tile's first page; v: [STAGES, HEAD_DIM, PAGE];
    raw_scales: scales as copied; scales, inverses: what `_prepare_scales` makes of them; bias: [STAGES, rows of a tile], their
    page_bias."""

    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    raw_scales: gl.shared_memory_descriptor
    scales: gl.shared_memory_descriptor
    inverses: gl.shared_memory_descriptor
    bias: gl.shared_memory_descriptor


class Barriers(NamedTuple):
    """mbarriers of the slots: k and v (with raw scales) have been copied, scales are prepared, the slot may be overwritten."""

    k_full: gl.shared_memory_descriptor
    v_full: gl.shared_memory_descriptor
    scales_full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor


class Tensors(NamedTuple):
    """query, out: [tokens, heads, HEAD_DIM] with the strides behind them; sinks, k_anchor, equalizer, order,
    v_anchor: see `Modifiers` and `LayerCalibration`."""

    query: gl.tensor
    out: gl.tensor
    sinks: gl.tensor
    k_anchor: gl.tensor
    equalizer: gl.tensor
    order: gl.tensor
    v_anchor: gl.tensor
    q_token_stride: gl.tensor
    q_head_stride: gl.tensor
    out_token_stride: gl.tensor
    out_head_stride: gl.tensor


class PageBias(NamedTuple):
    """pointer: to `turn.page_bias`, with its strides from one page, request and KV head to the next."""

    pointer: gl.tensor
    stride: gl.tensor
    request_stride: gl.tensor
    head_stride: gl.tensor


class SoftmaxState(NamedTuple):
    """Between two pages. started: Q K^T of page n + 1 in flight, a tuple of one (none if the head is wide); logits: of page n;
    m_ref, m_i: see `primitives.softmax_reference`; m_page: m_ref less the bias of page n, which its logits lack; decay:
    rescales acc and l_i, sums over the pages before page n, to m_ref; acc: a tuple, one tensor per part of the channels."""

    started: tuple[Any, ...]
    logits: gl.tensor
    m_ref: gl.tensor
    m_i: gl.tensor
    m_page: gl.tensor
    decay: gl.tensor
    acc: tuple[Any, ...]
    l_i: gl.tensor


@gluon.jit
def _copy_tile(source, tile, tile_index, n, buffers, barriers, tables, HEAD_DIM: gl.constexpr, PAGE: gl.constexpr):
    """Copy the pages of a tile. n: pages of this program's tiles before."""
    STAGES: gl.constexpr = buffers.v.shape[0]
    table = tables.block_table + tile.request.to(gl.int64) * tables.stride + tile.kv_head * tables.head_stride
    first_row = tile.kv_head * source.head_rows
    row = gl.load(table + tile.first_page) * source.block_rows + first_row
    mbarrier.wait(barriers.empty.index(STAGES), (tile_index & 1) ^ 1)
    mbarrier.expect(barriers.k_full.index(STAGES), PAGE * HEAD_DIM)
    copy_keys(source.k, row, buffers.k.index(STAGES), barriers.k_full.index(STAGES), HEAD_DIM, 8, PAGE)
    for i in range(tile.pages):
        next_page = tile.first_page + gl.minimum(i + 1, tile.pages - 1)
        next_row = gl.load(table + next_page) * source.block_rows + first_row
        slot = (n + i) % STAGES
        wait_empty(barriers.empty, n + i, STAGES)
        v_full = barriers.v_full.index(slot)
        mbarrier.expect(v_full, PAGE * (HEAD_DIM + 2 * 4))
        copy_scales(source.scales, row, buffers.raw_scales.index(slot), v_full, HEAD_DIM, 8, 8, PAGE)
        k_full = barriers.k_full.index(slot)
        if i + 1 < tile.pages:
            mbarrier.expect(k_full, PAGE * HEAD_DIM)
            copy_keys(source.k, next_row, buffers.k.index(slot), k_full, HEAD_DIM, 8, PAGE)
        else:
            mbarrier.arrive(k_full)
        copy_values(source.v, row, buffers.v.index(slot), v_full, HEAD_DIM, 8, PAGE)
        row = next_row


@gluon.jit
def _copy_partition(
    source, buffers, barriers, queue, counters, tables, num_reqs, q_blocks, kv_heads,
    WINDOW: gl.constexpr, HEAD_DIM: gl.constexpr, PAGE: gl.constexpr, BLOCK_Q: gl.constexpr,
):  # fmt: skip
    """The warp that finds tiles and copies their pages."""
    programs = gl.num_programs(0)
    number = gl.program_id(0)
    tile_index = 0
    n = 0  # pages so far
    while number < q_blocks * kv_heads:
        tile = find_tile(number, tables, num_reqs, q_blocks, kv_heads, WINDOW, HEAD_DIM, PAGE, BLOCK_Q)
        if tile.pages > 0:
            put_tile(tile, queue, tile_index)
            _copy_tile(source, tile, tile_index, n, buffers, barriers, tables, HEAD_DIM, PAGE)
            n += tile.pages
            tile_index += 1
        number = gl.atomic_add(counters, 1) + programs
    put_tile((0,) * FIELDS, queue, tile_index)  # no pages: the end
    if gl.atomic_add(counters + 1, 1) == programs - 1:  # the last program leaves both counters 0 for the next launch
        gl.store(counters, 0)
        gl.store(counters + 1, 0)


@gluon.jit
def _in_v_order(x, COUNT: gl.constexpr, PAGE: gl.constexpr):
    """x [COUNT, PAGE] with its columns, the tokens of a page, in the order of V."""
    return x.reshape([COUNT, PAGE // 16, 2, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([COUNT, PAGE])


@gluon.jit
def _prepare_scales(
    tile, n, page_bias, buffers, barriers, GROUP: gl.constexpr, PAGE_BIAS: gl.constexpr, V_BITS: gl.constexpr,
    PAGE: gl.constexpr, BLOCK_Q: gl.constexpr,
):  # fmt: skip
    """Prepare a tile's scales for the softmax, once for all rows, and bring its page_bias. n: pages of this program's
    tiles before.

    buffers.scales: for each pair of tokens, both scales of K, then both exponents of V plus LOGIT_BIAS. buffers.inverses:
    2**-exponent as an e4m3 number (`v_inverse_bits`), in the order of V and in eight equal columns. It is the B operand of a
    matrix product with P, which leaves a row's sum in every thread that holds a part of the row. Tokens behind the last count
    nothing, whatever their scales are.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([8, PAGE // 32], [1, 32], [1, 1], [1, 0])
    COLUMNS: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    PAIRS: gl.constexpr = gl.BlockedLayout([PAGE // 16], [32], [1], [0])
    STAGES: gl.constexpr = buffers.v.shape[0]
    tokens = gl.arange(0, PAGE, COLUMNS)
    if PAGE_BIAS:  # rows behind the last query take its numbers
        ROWS: gl.constexpr = buffers.bias.shape[1]
        row = gl.arange(0, ROWS, gl.BlockedLayout([ROWS // 32], [32], [1], [0]))
        own = page_bias.pointer + gl.minimum(tile.q_block * BLOCK_Q + row // GROUP, tile.q_len - 1) * GROUP + row % GROUP
        own += tile.request.to(gl.int64) * page_bias.request_stride + tile.kv_head.to(gl.int64) * page_bias.head_stride
    for i in range(tile.pages):
        slot = (n + i) % STAGES
        if PAGE_BIAS:
            bias = gl.load(own + (tile.first_page + i) * page_bias.stride)
        wait_full(barriers.v_full, n + i, STAGES)
        if PAGE_BIAS:
            buffers.bias.index(slot).store(bias)
        raw = plain(buffers.raw_scales.index(slot), [2 * PAGE], gl.float32)
        k_scale = raw.slice(0, PAGE).load(COLUMNS)
        exponent = raw.slice(PAGE, PAGE).load(COLUMNS)
        in_pairs = gl.join(k_scale, exponent + LOGIT_BIAS).reshape([PAGE // 2, 2, 2]).permute([0, 2, 1]).reshape([2 * PAGE])
        buffers.scales.index(slot).store(gl.convert_layout(in_pairs, PAIRS))
        filled = tokens < tile.seq_len - (tile.first_page + i) * PAGE
        inverse = gl.where(filled, gl.exp2(v_inverse_bits(V_BITS) - exponent), 0.0)
        inverse = gl.convert_layout(_in_v_order(inverse[None, :], 1, PAGE), LAYOUT)
        inverses = gl.zeros([8, PAGE], gl.float32, LAYOUT) + inverse
        buffers.inverses.index(slot).store(inverses.to(gl.float8e4nv))
        fence_async_shared()
        mbarrier.arrive(barriers.scales_full.index(slot))


@gluon.jit
def _scale_partition(
    page_bias, buffers, barriers, queue, GROUP: gl.constexpr, PAGE_BIAS: gl.constexpr, V_BITS: gl.constexpr,
    PAGE: gl.constexpr, BLOCK_Q: gl.constexpr,
):  # fmt: skip
    """The warp that prepares scales."""
    tile_index = 0
    n = 0  # pages so far
    tile = get_tile(queue, 0)
    while tile.pages > 0:
        _prepare_scales(tile, n, page_bias, buffers, barriers, GROUP, PAGE_BIAS, V_BITS, PAGE, BLOCK_Q)
        release_tile(queue, tile_index)
        n += tile.pages
        tile_index += 1
        tile = get_tile(queue, tile_index)


@gluon.jit
def _qk_product(q, k, PAGE: gl.constexpr, S_LAYOUT: gl.constexpr):
    """Start Q K^T, int32 [rows, PAGE]. q, k: in shared memory."""
    ROWS: gl.constexpr = q.shape[0]
    zeros = gl.zeros([ROWS, PAGE], gl.int32, S_LAYOUT)
    return warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _start_next(q, buffers, barriers, n, HEAD_DIM: gl.constexpr, PAGE: gl.constexpr, S_LAYOUT: gl.constexpr):
    """Start Q K^T of the page after page n. Behind a tile's last page it takes whatever is in the slot, and nothing reads
    it."""
    STAGES: gl.constexpr = buffers.v.shape[0]
    wait_full(barriers.k_full, n, STAGES)
    return _qk_product(q, buffers.k.index(n % STAGES), PAGE, S_LAYOUT)


@gluon.jit
def _halves(x, COLUMNS: gl.constexpr):
    """The even and the odd groups of eight columns of x. A group is what four threads hold of one mma tile."""
    ROWS: gl.constexpr = x.shape[0]
    even, odd = gl.split(x.reshape([ROWS, COLUMNS // 16, 2, 8]).permute([0, 1, 3, 2]))
    return even.reshape([ROWS, COLUMNS // 2]), odd.reshape([ROWS, COLUMNS // 2])


@gluon.jit
def _row_max(logits, PAGE: gl.constexpr, S_LAYOUT: gl.constexpr):
    """Row maxima, float32 [rows], if they are positive: then they are also the largest as integers, of which one instruction
    compares three. The tree keeps many comparisons in flight; in a chain, each would wait for the one before."""
    left, right = _halves(logits.to(gl.int32, bitcast=True), PAGE)
    for level in gl.static_range(1, 4 if PAGE == 128 else 3):  # until eight columns are left of each
        first, second = _halves(left, PAGE >> level)
        third, right = _halves(right, PAGE >> level)
        left = gl.inline_asm_elementwise(
            "{.reg .s32 two; max.s32 two, $1, $2; max.s32 $0, two, $3;}",
            "=r,r,r,r", [first, second, third], dtype=gl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    highest = gl.max(gl.maximum(left, right), 1).to(gl.float32, bitcast=True)
    return gl.convert_layout(highest, gl.SliceLayout(1, S_LAYOUT))


@gluon.jit
def _logits(
    codes, q_scale, q_bias, buffers, n, first_visible, last_visible, soft_cap,
    HEAD_DIM: gl.constexpr, PAGE: gl.constexpr, MASKED: gl.constexpr, SOFT_CAP: gl.constexpr, S_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Base-2 logits of page n, plus LOGIT_BIAS and V's exponents, and their row maxima. codes: Q K^T of the page, whose
    prepared scales are in their slot. q_bias: what a row's logits get before the soft cap."""
    STAGES: gl.constexpr = buffers.v.shape[0]
    COLUMNS: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    # Of each 16 numbers (8 columns), each of four threads holds the four of its two columns.
    OWN: gl.constexpr = [[1], [2], [16], [32], [64], [128]] if PAGE == 128 else [[1], [2], [16], [32], [64]]
    WARPS: gl.constexpr = [[0]] * (2 if gl.num_warps() == 4 else 3)
    PAIRS: gl.constexpr = gl.DistributedLinearLayout(OWN, [[4], [8], [0], [0], [0]], WARPS, [], [2 * PAGE])
    in_pairs = buffers.scales.index(n % STAGES).load(PAIRS).reshape([PAGE // 2, 2, 2]).permute([0, 2, 1])
    k_scale, v_exponent = gl.split(in_pairs)
    k_scale = gl.convert_layout(k_scale.reshape([PAGE]), COLUMNS)
    v_exponent = gl.convert_layout(v_exponent.reshape([PAGE]), COLUMNS)
    logits = codes.to(gl.float32) * k_scale[None, :]
    if SOFT_CAP:
        capped = gl.exp2((logits * q_scale[:, None] + q_bias[:, None]) * (2.0 / soft_cap))
        logits = (soft_cap * LOG2E) * (1.0 - 2.0 / (capped + 1.0)) + v_exponent[None, :]  # tanh(x) = 1 - 2 / (exp(2x) + 1)
    else:
        logits = logits * q_scale[:, None] + v_exponent[None, :]
    if MASKED:
        tokens = gl.arange(0, PAGE, COLUMNS)
        visible = (tokens[None, :] <= last_visible[:, None]) & (tokens[None, :] >= first_visible[:, None])
        logits = gl.where(visible, logits, float("-inf"))
    return logits, _row_max(logits, PAGE, S_LAYOUT)


@gluon.jit
def _finite(m_ref, MASKED: gl.constexpr):
    """The reference that logits are compared with. A row that has seen nothing has none; any finite one keeps inf - inf out."""
    if MASKED:
        m_ref = gl.where(m_ref == float("-inf"), 0.0, m_ref)
    return m_ref


@gluon.jit
def _weights(logits, m_ref, PAGE: gl.constexpr, MASKED: gl.constexpr, P_LAYOUT: gl.constexpr):
    """P as the A operand of P V, in the order of V, which leaves every number in its thread.

    The conversions are written out: the compiler would convert before it reorders, at one more instruction for four numbers.
    """
    p = _in_v_order(gl.exp2(logits - _finite(m_ref, MASKED)[:, None]), logits.shape[0], PAGE)
    codes = gl.inline_asm_elementwise(
        """{
        .reg .b16 low, high;
        cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 $0, {low, high};
        }""",
        "=r,f,f,f,f", [gl.convert_layout(p, P_LAYOUT)], dtype=gl.int8, is_pure=True, pack=4,
    )  # fmt: skip
    return codes.to(gl.float8e4nv, bitcast=True)


@gluon.jit
def _half_of_columns(x):
    """One of two columns that a thread holds of x [rows, 8], whose columns are equal: half the registers."""
    even, _ = gl.split(x.reshape([x.shape[0], 4, 2]))
    return even


@gluon.jit
def _add_page(
    p, acc, l_i, decay, buffers, barriers, n,
    HEAD_DIM: gl.constexpr, PAGE: gl.constexpr, O_LAYOUT: gl.constexpr, T_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Returns decay * acc + P V and decay * l_i + the row sums of P, for page n, whose V is in its slot. acc: see
    `SoftmaxState`. Releases the slot, unless the head is wide: then K in it is still to be read."""
    STAGES: gl.constexpr = buffers.v.shape[0]
    PART: gl.constexpr = _channels_at_once(HEAD_DIM)
    slot = n % STAGES
    v = buffers.v.index(slot)
    ROWS: gl.constexpr = p.shape[0]
    acc_decay = gl.convert_layout(decay, gl.SliceLayout(1, O_LAYOUT))[:, None]
    row_sum = gl.zeros([ROWS, 8], gl.float32, T_LAYOUT)
    added = ()
    for part in gl.static_range(HEAD_DIM // PART):
        # FP8 tensor cores accumulate in 22 bits: every page gets a fresh accumulator (SageAttention2, section 3.4).
        pv = gl.zeros([ROWS, PART], gl.float32, O_LAYOUT)
        pv = warpgroup_mma(p, v.slice(part * PART, PART).permute((1, 0)), pv, use_acc=False, is_async=True)
        if part == 0:
            row_sum = warpgroup_mma(p, buffers.inverses.index(slot).permute((1, 0)), row_sum, use_acc=False, is_async=True)
        pv, row_sum = warpgroup_mma_wait(0, deps=[pv, row_sum])
        if not _is_wide(HEAD_DIM):
            mbarrier.arrive(barriers.empty.index(slot))
        added += (acc[part] * acc_decay + pv,)  # type: ignore[assignment]
    if l_i.shape[1] < 8:
        row_sum = _half_of_columns(row_sum)
    l_i = l_i * gl.convert_layout(decay, gl.SliceLayout(1, row_sum.type.layout))[:, None] + row_sum
    return added, l_i


@gluon.jit
def _bias_of_page(
    buffers, n, q_bias, PARTITION: gl.constexpr, PAGE_BIAS: gl.constexpr, SOFT_CAP: gl.constexpr, STAGES: gl.constexpr
):
    """What the rows' logits in page n get before the soft cap, and, without one, what they lack until the softmax: both float32
    [rows]."""
    ROWS: gl.constexpr = q_bias.shape[0]
    lacking = gl.zeros_like(q_bias)
    if PAGE_BIAS:
        bias = buffers.bias.index(n % STAGES).slice(PARTITION * ROWS, ROWS).load(q_bias.type.layout)
        if SOFT_CAP:
            q_bias += bias
        else:
            lacking = bias
    return q_bias, lacking


@gluon.jit
def _attend_page(
    q, q_scale, q_bias, state, buffers, barriers, n, first_visible, last_visible, soft_cap,
    PARTITION: gl.constexpr, HEAD_DIM: gl.constexpr, PAGE: gl.constexpr, MASKED: gl.constexpr, SOFT_CAP: gl.constexpr,
    PAGE_BIAS: gl.constexpr,
    S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr, T_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Finish page n and begin page n + 1. first_visible, last_visible: tokens of page n + 1 that a row sees. Returns the
    SoftmaxState of page n + 1."""
    STAGES: gl.constexpr = buffers.v.shape[0]
    started, acc, l_i = state.started, state.acc, state.l_i
    if _is_wide(HEAD_DIM):
        p = _weights(state.logits, state.m_page, PAGE, MASKED, P_LAYOUT)
        wait_full(barriers.v_full, n, STAGES)
        acc, l_i = _add_page(p, acc, l_i, state.decay, buffers, barriers, n, HEAD_DIM, PAGE, O_LAYOUT, T_LAYOUT)
        codes = _start_next(q, buffers, barriers, n, HEAD_DIM, PAGE, S_LAYOUT)
        wait_full(barriers.scales_full, n + 1, STAGES)
        codes = warpgroup_mma_wait(0, deps=[codes])
        mbarrier.arrive(barriers.empty.index(n % STAGES))
        q_bias, lacking = _bias_of_page(buffers, n + 1, q_bias, PARTITION, PAGE_BIAS, SOFT_CAP, STAGES)
        logits, page_max = _logits(
            codes, q_scale, q_bias, buffers, n + 1, first_visible, last_visible, soft_cap,
            HEAD_DIM, PAGE, MASKED, SOFT_CAP, S_LAYOUT,
        )  # fmt: skip
    else:
        wait_full(barriers.scales_full, n + 1, STAGES)
        # From here to the wait for V there is no branch, so that the compiler can interleave exponentials and logits.
        p = _weights(state.logits, state.m_page, PAGE, MASKED, P_LAYOUT)
        codes = warpgroup_mma_wait(0, deps=[started[0]])
        q_bias, lacking = _bias_of_page(buffers, n + 1, q_bias, PARTITION, PAGE_BIAS, SOFT_CAP, STAGES)
        logits, page_max = _logits(
            codes, q_scale, q_bias, buffers, n + 1, first_visible, last_visible, soft_cap,
            HEAD_DIM, PAGE, MASKED, SOFT_CAP, S_LAYOUT,
        )  # fmt: skip
        wait_full(barriers.v_full, n, STAGES)
        acc, l_i = _add_page(p, acc, l_i, state.decay, buffers, barriers, n, HEAD_DIM, PAGE, O_LAYOUT, T_LAYOUT)
        started = (_start_next(q, buffers, barriers, n + 1, HEAD_DIM, PAGE, S_LAYOUT),)
    if PAGE_BIAS:
        page_max += lacking
    m_ref, m_i = softmax_reference(page_max, state.m_i, state.m_ref, MASKED)
    decay = gl.exp2(state.m_ref - _finite(m_ref, MASKED))
    m_page = m_ref
    if PAGE_BIAS:
        m_page = m_ref - lacking
    return SoftmaxState(started, logits, m_ref, m_i, m_page, decay, acc, l_i)


@triton.constexpr_function
def _rows_layout(warps, row_bytes):
    """Rows in memory, so many bytes of each at a time."""
    return gl.BlockedLayout([1, 8], [512 // row_bytes, row_bytes // 16], [warps, 1], [1, 0])


@gluon.jit
def _query_rows(tile, GROUP: gl.constexpr, BLOCK_Q: gl.constexpr, PARTITION: gl.constexpr, LAYOUT: gl.constexpr):
    """The query rows of a partition: their tokens (int64), their heads, and whether they are valid."""
    ROWS: gl.constexpr = WARP_ROWS * gl.num_warps()
    rows = PARTITION * ROWS + gl.arange(0, ROWS, LAYOUT)
    local = tile.q_block * BLOCK_Q + rows // GROUP
    valid = (rows < BLOCK_Q * GROUP) & (local < tile.q_len)
    return (tile.q_start + local).to(gl.int64), tile.kv_head * GROUP + rows % GROUP, valid


@gluon.jit
def _channels(tensors, tile, HEAD_DIM: gl.constexpr, ORDER: gl.constexpr, LAYOUT: gl.constexpr):
    """The channel of the model's head at each position of stored keys, int32 [HEAD_DIM]."""
    HALF: gl.constexpr = HEAD_DIM // 2
    channels = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, LAYOUT))
    if ORDER:
        channels = gl.load(tensors.order + tile.kv_head * HALF + channels % HALF) + channels // HALF * HALF
    return channels


@gluon.jit
def _load_query(
    tensors, tile, PARTITION: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_Q: gl.constexpr,
    ORDER: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """A partition's query rows of a tile in the order of keys, [rows, HEAD_DIM], 0 where they are not valid."""
    tokens, heads, valid = _query_rows(tile, GROUP, BLOCK_Q, PARTITION, gl.SliceLayout(1, LAYOUT))
    offsets = tokens * tensors.q_token_stride + heads * tensors.q_head_stride
    channels = _channels(tensors, tile, HEAD_DIM, ORDER, LAYOUT)
    return gl.load(tensors.query + offsets[:, None] + channels[None, :], mask=valid[:, None], other=0.0)


@gluon.jit
def _codes(q, inverse):
    """q * inverse, rounded as `to_int` does, as int8. Conversion instructions run at a quarter of the speed of additions."""
    return gl.inline_asm_elementwise(
        """{
        .reg .f32 a, b, c, d;
        .reg .b32 low, high;
        mul.rn.f32 a, $1, $5;
        mul.rn.f32 b, $2, $6;
        mul.rn.f32 c, $3, $7;
        mul.rn.f32 d, $4, $8;
        add.rn.f32 a, a, 0f4B400000;
        add.rn.f32 b, b, 0f4B400000;
        add.rn.f32 c, c, 0f4B400000;
        add.rn.f32 d, d, 0f4B400000;
        prmt.b32 low, a, b, 0x0040;
        prmt.b32 high, c, d, 0x0040;
        prmt.b32 $0, low, high, 0x5410;
        }""",
        "=r,f,f,f,f,f,f,f,f", [q, inverse], dtype=gl.int8, is_pure=True, pack=4,
    )  # fmt: skip


@gluon.jit
def _attend_tile(
    q, tensors, tile, tile_index, n, buffers, barriers, q_codes, scale, soft_cap,
    PARTITION: gl.constexpr, GROUP: gl.constexpr, WINDOW: gl.constexpr, SOFT_CAP: gl.constexpr,
    K_ANCHOR: gl.constexpr, EQUALIZE: gl.constexpr, ORDER: gl.constexpr, PAGE_BIAS: gl.constexpr, HEAD_DIM: gl.constexpr,
    V_BITS: gl.constexpr, PAGE: gl.constexpr, BLOCK_Q: gl.constexpr, HALF_SUMS: gl.constexpr,
):  # fmt: skip
    """Quantize a partition's query rows q of a tile, and attend to all its pages. q_codes: where the codes of q go. n: pages of
    this program's tiles before. HALF_SUMS: whether l_i takes half the registers. Returns acc, l_i and m_ref after the last
    page, and q_bias."""
    WARPS: gl.constexpr = gl.num_warps()
    ROWS: gl.constexpr = WARP_ROWS * WARPS
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, PAGE, 32])
    STAGES: gl.constexpr = buffers.v.shape[0]
    PART: gl.constexpr = _channels_at_once(HEAD_DIM)
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, PART, 32])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, k_width=4)
    T_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 8, 32])
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    LAYOUT: gl.constexpr = q.type.layout

    q = q.to(gl.float32)
    channels = tile.kv_head * HEAD_DIM + _channels(tensors, tile, HEAD_DIM, ORDER, LAYOUT)
    if K_ANCHOR:
        product = gl.sum(q * gl.load(tensors.k_anchor + channels)[None, :], 1)
    if EQUALIZE:
        q = q * gl.load(tensors.equalizer + channels)[None, :]
    amax = gl.max(gl.abs(q), 1)
    q_codes.store(_codes(q, inverse_or_zero(amax, 127.0)[:, None]))
    fence_async_shared()
    mbarrier.wait(barriers.k_full.index(STAGES), tile_index & 1)
    codes = _qk_product(q_codes, buffers.k.index(STAGES), PAGE, S_LAYOUT)
    q_scale = gl.convert_layout(amax * (scale * LOG2E / 127.0), S_ROWS)
    q_bias = gl.zeros_like(q_scale)
    if K_ANCHOR:
        q_bias = gl.convert_layout(product * (scale * LOG2E), S_ROWS)

    # Positions are counted from the first page that is read. The first and the last page are always masked.
    position = tile.seq_len - tile.q_len + tile.q_block * BLOCK_Q + (PARTITION * ROWS + gl.arange(0, ROWS, S_ROWS)) // GROUP
    position -= tile.first_page * PAGE
    last = tile.pages - 1
    first_visible = position - WINDOW + 1 if WINDOW > 0 else gl.zeros_like(position)
    wait_full(barriers.scales_full, n, STAGES)
    codes = warpgroup_mma_wait(0, deps=[codes])
    mbarrier.arrive(barriers.empty.index(STAGES))
    page_bias, lacking = _bias_of_page(buffers, n, q_bias, PARTITION, PAGE_BIAS, SOFT_CAP, STAGES)
    logits, page_max = _logits(
        codes, q_scale, page_bias, buffers, n, first_visible, position, soft_cap,
        HEAD_DIM, PAGE, True, SOFT_CAP, S_LAYOUT,
    )  # fmt: skip
    started = ()
    if not _is_wide(HEAD_DIM):
        codes = _start_next(q_codes, buffers, barriers, n, HEAD_DIM, PAGE, S_LAYOUT)
        started = (codes,)  # type: ignore[assignment]
    acc = ()
    for _ in gl.static_range(HEAD_DIM // PART):
        acc += (gl.zeros([ROWS, PART], gl.float32, O_LAYOUT),)  # type: ignore[assignment]
    l_i = gl.zeros([ROWS, 8], gl.float32, T_LAYOUT)
    if HALF_SUMS:
        l_i = _half_of_columns(l_i)
    nothing = gl.full([ROWS], float("-inf"), gl.float32, S_ROWS)
    m_ref, m_i = softmax_reference(page_max + lacking, nothing, nothing, True)
    state = SoftmaxState(started, logits, m_ref, m_i, m_ref - lacking, gl.zeros_like(m_ref), acc, l_i)
    unmasked = gl.minimum(gl.maximum(tile.full_pages - 1, 0), last)
    for i in range(unmasked):
        state = _attend_page(
            q_codes, q_scale, q_bias, state, buffers, barriers, n + i, position, position, soft_cap,
            PARTITION, HEAD_DIM, PAGE, False, SOFT_CAP, PAGE_BIAS, S_LAYOUT, O_LAYOUT, P_LAYOUT, T_LAYOUT,
        )  # fmt: skip
    for i in range(unmasked, last):
        last_visible = position - (i + 1) * PAGE
        first_visible = last_visible - WINDOW + 1 if WINDOW > 0 else gl.zeros_like(last_visible)
        state = _attend_page(
            q_codes, q_scale, q_bias, state, buffers, barriers, n + i, first_visible, last_visible, soft_cap,
            PARTITION, HEAD_DIM, PAGE, True, SOFT_CAP, PAGE_BIAS, S_LAYOUT, O_LAYOUT, P_LAYOUT, T_LAYOUT,
        )  # fmt: skip
    if not _is_wide(HEAD_DIM):
        warpgroup_mma_wait(0, deps=[state.started[0]])  # type: ignore[misc]
    p = _weights(state.logits, state.m_page, PAGE, True, P_LAYOUT)
    n += last
    wait_full(barriers.v_full, n, STAGES)
    length = tile.seq_len - (tile.first_page + last) * PAGE
    if length < PAGE:
        clear_v_behind(buffers.v.index(n % STAGES), length, PAGE)
        fence_async_shared()
    acc, l_i = _add_page(p, state.acc, state.l_i, state.decay, buffers, barriers, n, HEAD_DIM, PAGE, O_LAYOUT, T_LAYOUT)
    if _is_wide(HEAD_DIM):
        mbarrier.arrive(barriers.empty.index(n % STAGES))
    return acc, gl.convert_layout(gl.max(l_i, 1), S_ROWS) * 2 ** -v_inverse_bits(V_BITS), state.m_ref, q_bias


@gluon.jit
def _write_out(
    acc, l_i, m_ref, q_bias, tensors, tile,
    PARTITION: gl.constexpr, GROUP: gl.constexpr, SOFT_CAP: gl.constexpr, SINKS: gl.constexpr, V_ANCHOR: gl.constexpr,
    HEAD_DIM: gl.constexpr, BLOCK_Q: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Normalize and write a partition's rows of a tile. acc, l_i, m_ref, q_bias: from `_attend_tile`."""
    PART: gl.constexpr = _channels_at_once(HEAD_DIM)
    O_LAYOUT: gl.constexpr = acc[0].type.layout
    S_ROWS: gl.constexpr = l_i.type.layout
    weight = gl.convert_layout(l_i, gl.SliceLayout(1, O_LAYOUT))[:, None]  # of the anchor of V: a sink has no value
    if SINKS:
        m_ref -= LOGIT_BIAS
        if not SOFT_CAP:  # a sink is compared with whole logits, which under a cap they are already
            m_ref += q_bias
        rows = PARTITION * l_i.shape[0] + gl.arange(0, l_i.shape[0], S_ROWS)
        head = tile.kv_head * GROUP + rows % GROUP
        l_i += gl.exp2(gl.load(tensors.sinks + head).to(gl.float32) * LOG2E - m_ref)
    l_i = gl.where(l_i > 0.0, l_i, 1.0)  # 0 where all logits are below -LOGIT_BIAS
    inverse = gl.convert_layout(1.0 / l_i, gl.SliceLayout(1, O_LAYOUT))[:, None]
    tokens, heads, valid = _query_rows(tile, GROUP, BLOCK_Q, PARTITION, gl.SliceLayout(1, LAYOUT))
    offsets = tokens * tensors.out_token_stride + heads * tensors.out_head_stride
    for part in gl.static_range(HEAD_DIM // PART):
        result = acc[part]
        if V_ANCHOR:
            anchor = tensors.v_anchor + tile.kv_head * HEAD_DIM + part * PART + gl.arange(0, PART, gl.SliceLayout(0, O_LAYOUT))
            result += weight * gl.load(anchor)[None, :]
        result = gl.convert_layout((result * inverse).to(tensors.out.dtype.element_ty), LAYOUT)
        channels = part * PART + gl.arange(0, PART, gl.SliceLayout(0, LAYOUT))
        gl.store(tensors.out + offsets[:, None] + channels[None, :], result, mask=valid[:, None])


@gluon.jit
def _attend_partition(
    tensors, buffers, barriers, queue, q_buffers, scale, soft_cap,
    PARTITION: gl.constexpr, GROUP: gl.constexpr, WINDOW: gl.constexpr, SOFT_CAP: gl.constexpr, SINKS: gl.constexpr,
    K_ANCHOR: gl.constexpr, EQUALIZE: gl.constexpr, ORDER: gl.constexpr, V_ANCHOR: gl.constexpr, PAGE_BIAS: gl.constexpr,
    HEAD_DIM: gl.constexpr, V_BITS: gl.constexpr, PAGE: gl.constexpr, BLOCK_Q: gl.constexpr, PARTITIONS: gl.constexpr,
):  # fmt: skip
    """The warps that attend, number PARTITION of PARTITIONS that share a tile."""
    # Fewer rows a thread and smaller sums take fewer instructions and registers at a tile's ends, but the compiler then orders
    # the loop over pages anew, which long prompts feel.
    FOR_LONG: gl.constexpr = PARTITIONS == 2 and not _is_wide(HEAD_DIM)
    LAYOUT: gl.constexpr = _rows_layout(gl.num_warps(), 2 * HEAD_DIM if FOR_LONG else 128)
    tile_index = 0
    n = 0  # pages so far
    tile = get_tile(queue, 0)
    while tile.pages > 0:
        q = _load_query(tensors, tile, PARTITION, GROUP, HEAD_DIM, BLOCK_Q, ORDER, LAYOUT)
        acc, l_i, m_ref, q_bias = _attend_tile(
            q, tensors, tile, tile_index, n, buffers, barriers, q_buffers.index(PARTITION), scale, soft_cap,
            PARTITION, GROUP, WINDOW, SOFT_CAP, K_ANCHOR, EQUALIZE, ORDER, PAGE_BIAS, HEAD_DIM, V_BITS, PAGE, BLOCK_Q,
            not FOR_LONG,
        )  # fmt: skip
        _write_out(
            acc, l_i, m_ref, q_bias, tensors, tile,
            PARTITION, GROUP, SOFT_CAP, SINKS, V_ANCHOR, HEAD_DIM, BLOCK_Q, LAYOUT,
        )  # fmt: skip
        release_tile(queue, tile_index)
        n += tile.pages
        tile_index += 1
        tile = get_tile(queue, tile_index)


@gluon.jit(do_not_specialize=["num_reqs", "q_blocks", "kv_heads", *TABLE_STRIDES], do_not_specialize_on_alignment=TABLES)
def _prefill_kernel(
    query, out, k_pages, v_pages, scale_rows, block_table, seq_lens, query_start_loc, sinks, k_anchor, equalizer, order,
    v_anchor, page_bias, counters, scale, soft_cap, num_reqs, q_blocks, kv_heads,
    q_token_stride, q_head_stride, out_token_stride, out_head_stride, table_stride, table_head_stride, block_rows,
    head_rows, bias_stride, bias_request_stride, bias_head_stride,
    GROUP: gl.constexpr, WINDOW: gl.constexpr, SOFT_CAP: gl.constexpr, SINKS: gl.constexpr, K_ANCHOR: gl.constexpr,
    EQUALIZE: gl.constexpr, ORDER: gl.constexpr, V_ANCHOR: gl.constexpr, PAGE_BIAS: gl.constexpr, HEAD_DIM: gl.constexpr,
    V_BITS: gl.constexpr, PAGE: gl.constexpr, BLOCK_Q: gl.constexpr, PARTITIONS: gl.constexpr, PROGRAMS: gl.constexpr,
):  # fmt: skip
    """Grid: as many programs as run at a time. Each takes one tile (query block, KV head) after the other. V_BITS: of values
    before pages were widened. PARTITIONS, PROGRAMS: see `Form`, whose warps are num_warps."""
    ROWS: gl.constexpr = WARP_ROWS * gl.num_warps()  # of a partition
    STAGES: gl.constexpr = _stages(HEAD_DIM, PAGE, ROWS * PARTITIONS, PROGRAMS)
    k_buffers = gl.allocate_shared_memory(gl.int8, [STAGES + 1, PAGE, HEAD_DIM], k_pages.layout)
    v_buffers = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, HEAD_DIM, PAGE], v_pages.layout)
    PLAIN: gl.constexpr = plain_layout(1)
    raw_buffers = gl.allocate_shared_memory(gl.float32, [STAGES, 2, PAGE], scale_rows.layout)
    scale_buffers = gl.allocate_shared_memory(gl.float32, [STAGES, 2 * PAGE], PLAIN)
    INVERSES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([8, PAGE], gl.float8e4nv)
    inverse_buffers = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 8, PAGE], INVERSES)
    bias_buffers = scale_buffers
    if PAGE_BIAS:
        bias_buffers = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS * PARTITIONS], PLAIN)
    q_buffers = gl.allocate_shared_memory(gl.int8, [PARTITIONS, ROWS, HEAD_DIM], k_pages.layout)
    tile_slots = gl.allocate_shared_memory(gl.int32, [QUEUE, 16], PLAIN)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    scales_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
    tile_full = gl.allocate_shared_memory(gl.int64, [QUEUE, 1], mbarrier.MBarrierLayout())
    tile_empty = gl.allocate_shared_memory(gl.int64, [QUEUE, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(scales_full.index(i), count=1)
    for i in gl.static_range(STAGES + 1):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=PARTITIONS)
    for i in gl.static_range(QUEUE):
        mbarrier.init(tile_full.index(i), count=1)
        mbarrier.init(tile_empty.index(i), count=PARTITIONS + 1)  # and the warp of scales

    buffers = Buffers(k_buffers, v_buffers, raw_buffers, scale_buffers, inverse_buffers, bias_buffers)
    barriers = Barriers(k_full, v_full, scales_full, empty)
    queue = TileQueue(tile_slots, tile_full, tile_empty)
    source = PageSource(k_pages, v_pages, scale_rows, block_rows, head_rows)
    tensors = Tensors(
        query, out, sinks, k_anchor, equalizer, order, v_anchor,
        q_token_stride, q_head_stride, out_token_stride, out_head_stride,
    )  # fmt: skip
    tables = Tables(block_table, query_start_loc, seq_lens, table_stride, table_head_stride)
    bias = PageBias(page_bias, bias_stride, bias_request_stride, bias_head_stride)
    if PARTITIONS == 2:
        gl.warp_specialize(
            [
                (_attend_partition, (
                    tensors, buffers, barriers, queue, q_buffers, scale, soft_cap,
                    0, GROUP, WINDOW, SOFT_CAP, SINKS, K_ANCHOR, EQUALIZE, ORDER, V_ANCHOR, PAGE_BIAS, HEAD_DIM, V_BITS, PAGE,
                    BLOCK_Q, PARTITIONS,
                )),
                (_attend_partition, (
                    tensors, buffers, barriers, queue, q_buffers, scale, soft_cap,
                    1, GROUP, WINDOW, SOFT_CAP, SINKS, K_ANCHOR, EQUALIZE, ORDER, V_ANCHOR, PAGE_BIAS, HEAD_DIM, V_BITS, PAGE,
                    BLOCK_Q, PARTITIONS,
                )),
                (_copy_partition, (
                    source, buffers, barriers, queue, counters, tables, num_reqs, q_blocks, kv_heads,
                    WINDOW, HEAD_DIM, PAGE, BLOCK_Q,
                )),
                (_scale_partition, (bias, buffers, barriers, queue, GROUP, PAGE_BIAS, V_BITS, PAGE, BLOCK_Q)),
            ],
            [4, 1, 1],
            [240, 24, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_attend_partition, (
                    tensors, buffers, barriers, queue, q_buffers, scale, soft_cap,
                    0, GROUP, WINDOW, SOFT_CAP, SINKS, K_ANCHOR, EQUALIZE, ORDER, V_ANCHOR, PAGE_BIAS, HEAD_DIM, V_BITS, PAGE,
                    BLOCK_Q, PARTITIONS,
                )),
                (_copy_partition, (
                    source, buffers, barriers, queue, counters, tables, num_reqs, q_blocks, kv_heads,
                    WINDOW, HEAD_DIM, PAGE, BLOCK_Q,
                )),
                (_scale_partition, (bias, buffers, barriers, queue, GROUP, PAGE_BIAS, V_BITS, PAGE, BLOCK_Q)),
            ],
            [1, 1],
            [24, 24],
        )  # fmt: skip


def supports(layout: PageLayout, group: int) -> bool:
    """Whether there is a kernel for pages of this layout and `group` query heads per KV head."""
    return layout.head_dim in FORMS and group <= PINGPONG.rows


def prefill(
    query: torch.Tensor,
    pages: torch.Tensor,
    layout: PageLayout,
    batch: PagedBatch,
    scale: float,
    out: torch.Tensor,
    modifiers: Modifiers | None = None,
) -> None:
    """`reference.attention` with the same arguments, where `supports` holds; writes `out`, which has query's shape.

    There is no kernel for modifiers.q_block. Pages of 4-bit keys or values, and those that are read at shifted positions, are
    copied first (`portable.widen`, `portable.turn`).
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
    """`prefill` for pages of INT8 keys and e4m3 values. calibration: in place of modifiers.calibration. v_bits: of values
    before pages were widened. page_bias: see `turn.page_bias`."""
    tokens, heads, head_dim = query.shape
    kv_heads, group = pages.shape[1], heads // pages.shape[1]
    context = min(batch.max_seq_len or 1 << 31, batch.block_table.shape[-1] * layout.tokens)
    if modifiers.window:
        context = min(context, modifiers.window + PINGPONG.rows)
    form = choose_form(head_dim, group, context)
    block_q = form.rows // group
    q_blocks = tokens // block_q + batch.num_requests
    source = descriptors(pages, layout)
    programs = min(q_blocks * kv_heads, form.programs * multiprocessors(query.device))
    _prefill_kernel[(programs,)](
        query, out, source.k, source.v, source.scales, batch.block_table, batch.seq_lens, batch.query_start_loc,
        tensor_or(modifiers.sinks, query), *calibration_tensors(calibration, query), tensor_or(page_bias, query),
        counters(query.device), scale, modifiers.soft_cap, batch.num_requests, q_blocks, kv_heads,
        query.stride(0), query.stride(1), out.stride(0), out.stride(1), *batch.table_strides, *page_rows(pages, layout),
        *bias_strides(page_bias),
        GROUP=group, WINDOW=modifiers.window, SOFT_CAP=modifiers.soft_cap > 0, SINKS=modifiers.sinks is not None,
        **calibration_constants(calibration), PAGE_BIAS=page_bias is not None, HEAD_DIM=head_dim, V_BITS=v_bits,
        PAGE=layout.tokens, BLOCK_Q=block_q, PARTITIONS=form.partitions, PROGRAMS=form.programs,
        num_warps=form.warps, maxnreg=128 if form.programs == 2 else None,
    )  # fmt: skip
