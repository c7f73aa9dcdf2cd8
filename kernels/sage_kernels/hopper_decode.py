"""`decode` for sm_90, in Gluon: pages come in by the tensor memory accelerator, and the tensor cores take them as they lie.

Decoding is bound by the bytes of the pages, so everything else has to be out of their way. The tensor cores of sm_90 take 64
rows at least from their first operand and as few as 8 columns from the second. Few query rows therefore are the columns here:
K Q^T gives transposed logits and V^T P^T a transposed output. K [tokens, channels] and V [channels, tokens] are first operands
just as a page holds them, so no code is ever touched by a thread, and a page costs its 128 threads a few hundred instructions.
INT4 keys are widened to INT8 codes on the way, from shared memory to shared memory.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sage_kernels.hopper import descriptors
from sage_kernels.prefill import table_strides
from sage_kernels.tiles import (
    GROUP_BYTES,
    LOG2E,
    P_BITS,
    TABLES,
    inverse_or_zero,
    section_offset,
    to_int,
    v_scale_bits_beside,
)
from sage_paged import PageLayout, v_token

_to_int = gluon.jit(to_int.fn)
_inverse_or_zero = gluon.jit(inverse_or_zero.fn)
_v_scale_bits_beside = gluon.jit(v_scale_bits_beside.fn)
_v_token = gluon.jit(v_token)


@gluon.jit
def _fetch(pages, buffers, full, slot, row, HEAD_DIM: gl.constexpr, K_BITS: gl.constexpr, PAGE: gl.constexpr):
    """Start to copy the page that begins `row` times PAGE bytes into the cache. pages, buffers: of K, V, groups, scales."""
    K_ROW: gl.constexpr = HEAD_DIM * K_BITS // 8
    V_ROW: gl.constexpr = section_offset("v", HEAD_DIM, K_BITS, PAGE) // PAGE
    GROUP_ROW: gl.constexpr = section_offset("k_groups", HEAD_DIM, K_BITS, PAGE) // PAGE
    SCALE_ROW: gl.constexpr = section_offset("k_scale", HEAD_DIM, K_BITS, PAGE) // PAGE
    k_row = row * (PAGE // K_ROW) if PAGE >= K_ROW else row // (K_ROW // PAGE)
    k_pages, v_pages, group_rows, scale_rows = pages
    k_buffers, v_buffers, group_buffers, scale_buffers = buffers
    barrier = full.index(slot)
    mbarrier.expect(barrier, section_offset("end", HEAD_DIM, K_BITS, PAGE))
    tma.async_copy_global_to_shared(k_pages, [k_row, 0], barrier, k_buffers.index(slot))
    tma.async_copy_global_to_shared(v_pages, [row + V_ROW, 0], barrier, v_buffers.index(slot))
    if K_BITS == 4:
        tma.async_copy_global_to_shared(group_rows, [row + GROUP_ROW, 0], barrier, group_buffers.index(slot))
    tma.async_copy_global_to_shared(scale_rows, [(row + SCALE_ROW) // 4, 0], barrier, scale_buffers.index(slot))


@gluon.jit
def _plain(buffer, shape: gl.constexpr, dtype: gl.constexpr):
    """A buffer row by row, as it was copied, which is not how its layout would be read."""
    return buffer._reinterpret(dtype, shape, gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0]))


@gluon.jit
def _widen(k_buffer, group_buffer, low_buffer, high_buffer, HEAD_DIM: gl.constexpr, PAGE: gl.constexpr):
    """INT4 keys of a page as INT8 codes, one thread a token; the halves of the head are apart as their nibbles are."""
    HALF: gl.constexpr = HEAD_DIM // 2
    GROUPS: gl.constexpr = HALF // GROUP_BYTES
    BYTES: gl.constexpr = gl.BlockedLayout([1, GROUPS, GROUP_BYTES], [32, 1, 1], [4, 1, 1], [2, 1, 0])
    OF_GROUPS: gl.constexpr = gl.SliceLayout(2, BYTES)
    TOKENS: gl.constexpr = gl.BlockedLayout([1, HALF], [32, 1], [4, 1], [1, 0])
    groups = _plain(group_buffer, [PAGE, 2 * GROUPS], gl.int8)
    step = groups.slice(0, GROUPS, dim=1).load(OF_GROUPS)[:, :, None]
    base = groups.slice(GROUPS, GROUPS, dim=1).load(OF_GROUPS)[:, :, None]
    nibbles = gl.convert_layout(k_buffer.load(TOKENS).reshape([PAGE, GROUPS, GROUP_BYTES]), BYTES)
    nibbles, step, base = gl.broadcast(nibbles, step)[0], gl.broadcast(step, nibbles)[0], gl.broadcast(base, nibbles)[0]
    # Four bytes at a time: with 128 added to the base, no byte of base + step * nibble leaves its place.
    low, high = gl.inline_asm_elementwise(
        """{
        .reg .b32 low, high, step, base;
        and.b32 low, $2, 0x0F0F0F0F;
        shr.u32 high, $2, 4;
        and.b32 high, high, 0x0F0F0F0F;
        and.b32 step, $3, 0xFF;
        xor.b32 base, $4, 0x80808080;
        mad.lo.u32 low, low, step, base;
        mad.lo.u32 high, high, step, base;
        xor.b32 $0, low, 0x80808080;
        xor.b32 $1, high, 0x80808080;
        }""",
        "=r,=r,r,r,r", [nibbles, step, base], dtype=(gl.int8, gl.int8), is_pure=True, pack=4,
    )  # fmt: skip
    low_buffer.store(gl.convert_layout(low.reshape([PAGE, HALF]), TOKENS))
    high_buffer.store(gl.convert_layout(high.reshape([PAGE, HALF]), TOKENS))
    fence_async_shared()


@gluon.jit
def _load_query(query, offsets, valid, first, Q_LAYOUT: gl.constexpr, CHANNELS: gl.constexpr):
    channels = first + gl.arange(0, CHANNELS, gl.SliceLayout(0, Q_LAYOUT))
    return gl.load(query + offsets[:, None] + channels[None, :], mask=valid[:, None], other=0.0).to(gl.float32)


@gluon.jit
def _times_anchor(q, anchor, Q_LAYOUT: gl.constexpr, CHANNELS: gl.constexpr):
    return gl.sum(q * gl.load(anchor + gl.arange(0, CHANNELS, gl.SliceLayout(0, Q_LAYOUT)))[None, :], 1)


@gluon.jit(do_not_specialize_on_alignment=TABLES)
def _decode_kernel(
    query, partial, partial_top, partial_total, k_pages, v_pages, group_rows, scale_rows, block_table, seq_lens,
    query_start_loc, anchor, v_anchor, scale, soft_cap, q_token_stride, q_head_stride, table_stride, table_head_stride,
    block_rows, head_rows,
    GROUP: gl.constexpr, WINDOW: gl.constexpr, SOFT_CAP: gl.constexpr, ANCHOR: gl.constexpr, V_ANCHOR: gl.constexpr,
    HEAD_DIM: gl.constexpr, K_BITS: gl.constexpr, PAGE: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Grid and results as those of the portable kernel."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 32])
    """Of logits [tokens, rows] and of the output [channels, rows]."""
    ROWS: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    COLUMN: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    PART: gl.constexpr = HEAD_DIM if K_BITS == 8 else HEAD_DIM // 2
    """Channels that are multiplied at a time."""
    K_ROW: gl.constexpr = HEAD_DIM * K_BITS // 8
    SCALES: gl.constexpr = 2 if K_BITS == 8 else 1
    Q_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // PART, PART // 8], [4, 1], [1, 0])
    Q_BUFFER: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, PART], gl.int8)
    WIDE_BUFFER: gl.constexpr = gl.NVMMASharedLayout.get_default_for([PAGE, PART], gl.int8)
    P_BUFFER: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, PAGE], gl.float8e4nv)

    split = gl.program_id(0)
    splits = gl.num_programs(0)
    kv_head = gl.program_id(1)
    request = gl.program_id(2)
    q_start = gl.load(query_start_loc + request)
    q_len = gl.load(query_start_loc + request + 1) - q_start
    seq_len = gl.load(seq_lens + request)
    first_page = 0
    if WINDOW > 0:
        first_page = gl.maximum(seq_len - q_len - WINDOW + 1, 0) // PAGE
    of_all = (seq_len + PAGE - 1) // PAGE - first_page
    end_page = first_page + (split + 1) * of_all // splits
    first_page += split * of_all // splits
    pages = end_page - first_page
    table = block_table + request.to(gl.int64) * table_stride + kv_head * table_head_stride + first_page
    head_rows *= kv_head

    k_buffers = gl.allocate_shared_memory(gl.int8, [STAGES, PAGE, K_ROW], k_pages.layout)
    v_buffers = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, HEAD_DIM, PAGE], v_pages.layout)
    scale_buffers = gl.allocate_shared_memory(gl.float32, [STAGES, SCALES, PAGE], scale_rows.layout)
    q_buffer = gl.allocate_shared_memory(gl.int8, [BLOCK_M, PART], Q_BUFFER)
    group_buffers, q_high_buffer, low_buffer, high_buffer = k_buffers, q_buffer, k_buffers, k_buffers
    if K_BITS == 4:
        group_buffers = gl.allocate_shared_memory(gl.int8, [STAGES, HEAD_DIM // GROUP_BYTES, PAGE], group_rows.layout)
        q_high_buffer = gl.allocate_shared_memory(gl.int8, [BLOCK_M, PART], Q_BUFFER)
        low_buffer = gl.allocate_shared_memory(gl.int8, [PAGE, PART], WIDE_BUFFER)
        high_buffer = gl.allocate_shared_memory(gl.int8, [PAGE, PART], WIDE_BUFFER)
    p_buffer = gl.allocate_shared_memory(gl.float8e4nv, [BLOCK_M, PAGE], P_BUFFER)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    pages_in = (k_pages, v_pages, group_rows, scale_rows)
    buffers = (k_buffers, v_buffers, group_buffers, scale_buffers)
    for i in gl.static_range(STAGES):
        if i < pages:
            row = gl.load(table + i) * block_rows + head_rows
            _fetch(pages_in, buffers, full, i, row, HEAD_DIM, K_BITS, PAGE)

    rows = gl.arange(0, BLOCK_M, gl.SliceLayout(1, Q_LAYOUT))
    offsets = (q_start + rows // GROUP).to(gl.int64) * q_token_stride + (kv_head * GROUP + rows % GROUP) * q_head_stride
    valid = rows // GROUP < q_len
    q = _load_query(query, offsets, valid, 0, Q_LAYOUT, PART)
    amax = gl.max(gl.abs(q), 1)
    q_high = q
    if K_BITS == 4:  # the second half of the head, with the same scale
        q_high = _load_query(query, offsets, valid, PART, Q_LAYOUT, PART)
        amax = gl.maximum(amax, gl.max(gl.abs(q_high), 1))
    inverse = _inverse_or_zero(amax, 127.0)[:, None]
    q_buffer.store(_to_int(q * inverse).to(gl.int8))
    if K_BITS == 4:
        q_high_buffer.store(_to_int(q_high * inverse).to(gl.int8))
    fence_async_shared()
    q_scale = gl.convert_layout(amax * (scale * LOG2E / 127.0), ROWS)
    q_bias = gl.zeros_like(q_scale)
    if ANCHOR:
        anchor += kv_head * HEAD_DIM
        product = _times_anchor(q, anchor, Q_LAYOUT, PART)
        if K_BITS == 4:
            product += _times_anchor(q_high, anchor + PART, Q_LAYOUT, PART)
        q_bias = gl.convert_layout(product * (scale * LOG2E), ROWS)

    rows = gl.arange(0, BLOCK_M, ROWS)
    position = seq_len - q_len + rows // GROUP - first_page * PAGE
    tokens = gl.arange(0, PAGE, COLUMN)
    length = seq_len - first_page * PAGE
    acc = gl.zeros([HEAD_DIM, BLOCK_M], gl.float32, LAYOUT)
    total = gl.zeros([PAGE, BLOCK_M], gl.float32, LAYOUT)  # sums over pages; those over tokens come last
    top = gl.full([BLOCK_M], float("-inf"), gl.float32, ROWS)
    for i in range(pages):
        slot = i % STAGES
        next_row = gl.load(table + gl.minimum(i + STAGES, pages - 1)) * block_rows + head_rows
        mbarrier.wait(full.index(slot), (i // STAGES) & 1)
        codes = gl.zeros([PAGE, BLOCK_M], gl.int32, LAYOUT)
        if K_BITS == 8:
            k = k_buffers.index(slot)
        else:
            _widen(k_buffers.index(slot), group_buffers.index(slot), low_buffer, high_buffer, HEAD_DIM, PAGE)
            k = low_buffer
        codes = warpgroup_mma(k, q_buffer.permute((1, 0)), codes, use_acc=False, is_async=True)
        if K_BITS == 4:
            codes = warpgroup_mma(high_buffer, q_high_buffer.permute((1, 0)), codes, is_async=True)
        scales = _plain(scale_buffers.index(slot), [SCALES, PAGE], gl.float32)
        k_scale = scales.slice(0, 1, dim=0).permute((1, 0)).load(LAYOUT)
        if K_BITS == 8:
            v_scale_bits = scales.slice(1, 1, dim=0).permute((1, 0)).load(LAYOUT).to(gl.int32, bitcast=True)
        else:
            v_scale_bits = _v_scale_bits_beside(k_scale)
        v_exponent = v_scale_bits.to(gl.float32) * (1.0 / (1 << 23)) - 127.0
        v_inverse = ((254 << 23) - v_scale_bits).to(gl.float32, bitcast=True)
        codes = warpgroup_mma_wait(0, deps=[codes])

        logits = codes.to(gl.float32) * k_scale
        if SOFT_CAP:
            capped = gl.exp2((logits * q_scale[None, :] + q_bias[None, :]) * (2.0 / soft_cap))
            logits = (soft_cap * LOG2E) * (1.0 - 2.0 / (capped + 1.0)) + v_exponent  # tanh(x) = 1 - 2 / (exp(2x) + 1)
        else:
            logits = logits * q_scale[None, :] + v_exponent
        last_visible = position - i * PAGE
        visible = tokens[:, None] <= last_visible[None, :]
        if WINDOW > 0:
            visible &= tokens[:, None] > last_visible[None, :] - WINDOW
        logits = gl.where(visible, logits, float("-inf"))
        new_top = gl.maximum(top, gl.ceil(gl.max(logits, 0)) - P_BITS)
        shift = gl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen nothing: any number will do
        p = gl.exp2(logits - shift[None, :]).to(gl.float8e4nv)
        decay = gl.exp2(top - shift)
        top = new_top
        filled = length - i * PAGE
        weighted = p.to(gl.float32) * v_inverse
        total = total * decay[None, :] + gl.where((tokens < filled)[:, None], weighted, 0.0)
        # In the order of V.
        p = p.reshape([PAGE // 16, 2, 4, 2, BLOCK_M]).permute([0, 2, 1, 3, 4]).reshape([PAGE, BLOCK_M])
        p_buffer.permute((1, 0)).store(p)
        if filled < PAGE:  # codes behind the last token may be a NaN of an earlier owner's
            V_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 16], [32 * 16 // PAGE, PAGE // 16], [4, 1], [1, 0])
            v = v_buffers.index(slot)
            kept = _v_token(gl.arange(0, PAGE, gl.SliceLayout(0, V_LAYOUT))) < filled
            bits = v.load(V_LAYOUT).to(gl.uint8, bitcast=True)
            v.store(gl.where(kept[None, :], bits, 0).to(gl.uint8).to(gl.float8e4nv, bitcast=True))
        fence_async_shared()
        # FP8 tensor cores accumulate in 22 bits: every page gets a fresh accumulator (SageAttention2, section 3.4).
        pv = gl.zeros([HEAD_DIM, BLOCK_M], gl.float32, LAYOUT)
        pv = warpgroup_mma(v_buffers.index(slot), p_buffer.permute((1, 0)), pv, use_acc=False, is_async=True)
        pv = warpgroup_mma_wait(0, deps=[pv])
        acc = acc * decay[None, :] + pv
        gl.thread_barrier()  # no warp reads this slot any more
        if i + STAGES < pages:
            _fetch(pages_in, buffers, full, slot, next_row, HEAD_DIM, K_BITS, PAGE)

    sums = gl.sum(total, 0)
    channels = gl.arange(0, HEAD_DIM, COLUMN)
    if V_ANCHOR:
        acc += gl.load(v_anchor + kv_head * HEAD_DIM + channels)[:, None] * sums[None, :]
    # A split that saw nothing has total 0; the merge skips it by its top of -inf.
    acc = acc / gl.where(sums > 0.0, sums, 1.0)[None, :]
    if ANCHOR and not SOFT_CAP:  # sinks are compared with whole logits, which under a cap they are already
        top += q_bias
    valid = rows // GROUP < q_len
    heads = gl.num_programs(1) * GROUP
    target = ((q_start + rows // GROUP) * heads + kv_head * GROUP + rows % GROUP).to(gl.int64) * splits + split
    gl.store(partial + target[None, :] * HEAD_DIM + channels[:, None], acc, mask=valid[None, :])
    gl.store(partial_top + target, top, mask=valid)
    gl.store(partial_total + target, sums, mask=valid)


_SHARED = 110 * 1024
"""Bytes of shared memory of a program, so that two fit on a processor. Pages of heads of 256 channels leave room for one."""


def supports(layout: PageLayout) -> bool:
    """Whether there is a kernel for pages of this layout."""
    return layout.head_dim in (64, 128, 256)


def stages(layout: PageLayout) -> int:
    """How many pages a program has under way. Three suffice to keep the memory busy; few pages a program need no more."""
    wide = layout.tokens * layout.head_dim if layout.k_bits == 4 else 0
    return max(2, min((_SHARED - 4096 - wide) // layout.summary_offset, 4))


def attend(
    query: torch.Tensor,
    pages: torch.Tensor,
    layout: PageLayout,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    scale: float,
    window: int,
    soft_cap: float,
    anchor: torch.Tensor | None,
    v_anchor: torch.Tensor | None,
    max_query_len: int,
    splits: int,
    partial: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """The partial results of `decode.decode`, into its workspace's `partial`."""
    head_dim = query.shape[2]
    group = query.shape[1] // pages.shape[1]
    block_rows, head_rows = pages.stride(0) // layout.tokens, pages.stride(1) // layout.tokens
    _decode_kernel[(splits, pages.shape[1], seq_lens.numel())](
        query, *partial, *descriptors(pages.data_ptr(), pages.shape[0] * block_rows, layout),
        block_table, seq_lens, query_start_loc, query if anchor is None else anchor,
        query if v_anchor is None else v_anchor, scale, soft_cap,
        query.stride(0), query.stride(1), *table_strides(block_table), block_rows, head_rows,
        GROUP=group, WINDOW=window, SOFT_CAP=soft_cap > 0, ANCHOR=anchor is not None,
        V_ANCHOR=v_anchor is not None, HEAD_DIM=head_dim, K_BITS=layout.k_bits, PAGE=layout.tokens,
        BLOCK_M=max(8, 1 << (max_query_len * group - 1).bit_length()), STAGES=stages(layout), num_warps=4,
    )  # fmt: skip
