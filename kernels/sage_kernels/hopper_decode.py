"""`decode` for sm_90, in Gluon: pages come in by the tensor memory accelerator, and the tensor cores take them as they lie.

Decoding is bound by the bytes of the pages, so everything else has to be out of their way. The tensor cores of sm_90 take 64
rows at least from their first operand and as few as 8 columns from the second. Few query rows therefore are the columns here:
K Q^T gives transposed logits and V^T P^T a transposed output. K [tokens, channels] and V [channels, tokens] are first operands
just as a page holds them, so no code is ever touched by a thread, and a page costs its 128 threads a few hundred instructions.
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
from sage_kernels.tiles import LOG2E, P_BITS, TABLES, inverse_or_zero, to_int
from sage_paged import PageLayout, v_token

_to_int = gluon.jit(to_int.fn)
_inverse_or_zero = gluon.jit(inverse_or_zero.fn)
_v_token = gluon.jit(v_token)


@gluon.jit
def _fetch(
    k_pages, v_pages, scale_rows, k_buffers, v_buffers, scale_buffers, full, slot, row,
    HEAD_DIM: gl.constexpr, PAGE: gl.constexpr,
):  # fmt: skip
    """Start to copy the page that begins `row` times PAGE bytes into the cache."""
    k_row = row * (PAGE // HEAD_DIM) if PAGE >= HEAD_DIM else row // (HEAD_DIM // PAGE)
    barrier = full.index(slot)
    mbarrier.expect(barrier, 2 * PAGE * HEAD_DIM + 8 * PAGE)
    tma.async_copy_global_to_shared(k_pages, [k_row, 0], barrier, k_buffers.index(slot))
    tma.async_copy_global_to_shared(v_pages, [row + HEAD_DIM, 0], barrier, v_buffers.index(slot))
    tma.async_copy_global_to_shared(scale_rows, [row // 4 + HEAD_DIM // 2, 0], barrier, scale_buffers.index(slot))


@gluon.jit(do_not_specialize_on_alignment=TABLES)
def _decode_kernel(
    query, partial, partial_top, partial_total, k_pages, v_pages, scale_rows, block_table, seq_lens, query_start_loc, anchor,
    scale, soft_cap, q_token_stride, q_head_stride, table_stride, table_head_stride, block_rows, head_rows,
    GROUP: gl.constexpr, WINDOW: gl.constexpr, SOFT_CAP: gl.constexpr, ANCHOR: gl.constexpr,
    HEAD_DIM: gl.constexpr, PAGE: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Grid and results as those of the portable kernel."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 32])
    """Of logits [tokens, rows] and of the output [channels, rows]."""
    ROWS: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    COLUMN: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    Q_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    Q_BUFFER: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, HEAD_DIM], gl.int8)
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

    k_buffers = gl.allocate_shared_memory(gl.int8, [STAGES, PAGE, HEAD_DIM], k_pages.layout)
    v_buffers = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, HEAD_DIM, PAGE], v_pages.layout)
    scale_buffers = gl.allocate_shared_memory(gl.float32, [STAGES, 2, PAGE], scale_rows.layout)
    q_buffer = gl.allocate_shared_memory(gl.int8, [BLOCK_M, HEAD_DIM], Q_BUFFER)
    p_buffer = gl.allocate_shared_memory(gl.float8e4nv, [BLOCK_M, PAGE], P_BUFFER)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    for i in gl.static_range(STAGES):
        if i < pages:
            row = gl.load(table + i) * block_rows + head_rows
            _fetch(k_pages, v_pages, scale_rows, k_buffers, v_buffers, scale_buffers, full, i, row, HEAD_DIM, PAGE)

    rows = gl.arange(0, BLOCK_M, gl.SliceLayout(1, Q_LAYOUT))
    channels = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, Q_LAYOUT))
    offsets = (q_start + rows // GROUP).to(gl.int64) * q_token_stride + (kv_head * GROUP + rows % GROUP) * q_head_stride
    valid = rows // GROUP < q_len
    q = gl.load(query + offsets[:, None] + channels[None, :], mask=valid[:, None], other=0.0).to(gl.float32)
    amax = gl.max(gl.abs(q), 1)
    q_buffer.store(_to_int(q * _inverse_or_zero(amax, 127.0)[:, None]).to(gl.int8))
    fence_async_shared()
    q_scale = gl.convert_layout(amax * (scale * LOG2E / 127.0), ROWS)
    q_bias = gl.zeros_like(q_scale)
    if ANCHOR:
        product = gl.sum(q * gl.load(anchor + kv_head * HEAD_DIM + channels)[None, :], 1)
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
        codes = warpgroup_mma(k_buffers.index(slot), q_buffer.permute((1, 0)), codes, use_acc=False, is_async=True)
        # What was copied stands row by row, which is not how this layout would be read.
        scales = scale_buffers.index(slot)._reinterpret(gl.float32, [2, PAGE], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
        k_scale = scales.index(0).load(COLUMN)[:, None]
        v_scale_bits = scales.index(1).load(COLUMN)[:, None].to(gl.int32, bitcast=True)
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
            _fetch(k_pages, v_pages, scale_rows, k_buffers, v_buffers, scale_buffers, full, slot, next_row, HEAD_DIM, PAGE)

    # A split that saw nothing has total 0; the merge skips it by its top of -inf.
    sums = gl.sum(total, 0)
    acc = acc / gl.where(sums > 0.0, sums, 1.0)[None, :]
    if ANCHOR and not SOFT_CAP:  # sinks are compared with whole logits, which under a cap they are already
        top += q_bias
    valid = rows // GROUP < q_len
    heads = gl.num_programs(1) * GROUP
    target = ((q_start + rows // GROUP) * heads + kv_head * GROUP + rows % GROUP).to(gl.int64) * splits + split
    channels = gl.arange(0, HEAD_DIM, COLUMN)
    gl.store(partial + target[None, :] * HEAD_DIM + channels[:, None], acc, mask=valid[None, :])
    gl.store(partial_top + target, top, mask=valid)
    gl.store(partial_total + target, sums, mask=valid)


_SHARED = 110 * 1024
"""Bytes of shared memory of a program, so that two fit on a processor. Pages of heads of 256 channels leave room for one."""


def supports(layout: PageLayout) -> bool:
    """Whether there is a kernel for pages of this layout."""
    return layout.k_bits == 8 and layout.head_dim in (64, 128, 256)


def stages(layout: PageLayout) -> int:
    """How many pages a program has under way. Three suffice to keep the memory busy; few pages a program need no more."""
    return max(2, min(_SHARED // (layout.bounds_offset + 1024), 4))


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
        block_table, seq_lens, query_start_loc, query if anchor is None else anchor, scale, soft_cap,
        query.stride(0), query.stride(1), *table_strides(block_table), block_rows, head_rows,
        GROUP=group, WINDOW=window, SOFT_CAP=soft_cap > 0, ANCHOR=anchor is not None, HEAD_DIM=head_dim, PAGE=layout.tokens,
        BLOCK_M=max(8, 1 << (max_query_len * group - 1).bit_length()), STAGES=stages(layout), num_warps=4,
    )  # fmt: skip
