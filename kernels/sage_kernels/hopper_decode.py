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

from sage_kernels.device import dependent_launch
from sage_kernels.hopper import copy_keys, copy_scales, copy_values, descriptors, plain
from sage_kernels.prefill import table_strides
from sage_kernels.shares import LANES, count_parts, find_share, next_segment, place_of_part
from sage_kernels.tiles import (
    GROUP_BYTES,
    LOG2E,
    TABLE_STRIDES,
    TABLES,
    await_kernel_before,
    inverse_or_zero,
    page_reference,
    section_offset,
    to_int,
    v_exponent_beside,
)
from sage_paged import PageLayout, v_token

_v_token = gluon.jit(v_token)


@gluon.jit
def _fetch(pages, buffers, full, slot, row, HEAD_DIM: gl.constexpr, K_BITS: gl.constexpr, PAGE: gl.constexpr):
    """Start to copy the page that begins `row` times PAGE bytes into the cache. pages, buffers: of K, V, groups, scales."""
    GROUP_ROW: gl.constexpr = section_offset("k_groups", HEAD_DIM, K_BITS, PAGE) // PAGE
    k_pages, v_pages, group_rows, scale_rows = pages
    k_buffers, v_buffers, group_buffers, scale_buffers = buffers
    barrier = full.index(slot)
    mbarrier.expect(barrier, section_offset("end", HEAD_DIM, K_BITS, PAGE))
    copy_keys(k_pages, row, k_buffers.index(slot), barrier, HEAD_DIM, K_BITS, PAGE)
    copy_values(v_pages, row, v_buffers.index(slot), barrier, HEAD_DIM, K_BITS, PAGE)
    if K_BITS == 4:
        tma.async_copy_global_to_shared(group_rows, [row + GROUP_ROW, 0], barrier, group_buffers.index(slot))
    copy_scales(scale_rows, row, scale_buffers.index(slot), barrier, HEAD_DIM, K_BITS, PAGE)


@gluon.jit
def _widen(k_buffer, group_buffer, low_buffer, high_buffer, HEAD_DIM: gl.constexpr, PAGE: gl.constexpr):
    """INT4 keys of a page as INT8 codes, one thread a token; the halves of the head are apart as their nibbles are."""
    HALF: gl.constexpr = HEAD_DIM // 2
    GROUPS: gl.constexpr = HALF // GROUP_BYTES
    BYTES: gl.constexpr = gl.BlockedLayout([1, GROUPS, GROUP_BYTES], [32, 1, 1], [4, 1, 1], [2, 1, 0])
    OF_GROUPS: gl.constexpr = gl.SliceLayout(2, BYTES)
    TOKENS: gl.constexpr = gl.BlockedLayout([1, HALF], [32, 1], [4, 1], [1, 0])
    groups = plain(group_buffer, [PAGE, 2 * GROUPS], gl.int8)
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


@gluon.jit
def _next_page(place, seq_lens, query_start_loc, kv_heads, WINDOW: gl.constexpr, PAGE: gl.constexpr):
    """The page of a share after one. A place: the request, its KV head, the first page that it sees, how many it sees, the how
    manieth of them it is, and how many pages are left of the share, itself included."""
    request, head, first, seen, page, left = place
    page += 1
    left -= 1
    if page == seen:
        page = 0
        request, head, first, seen = next_segment(
            seq_lens, query_start_loc, request, head, first, seen, kv_heads, left > 0, WINDOW, PAGE
        )
    return request, head, first, seen, page, left


@gluon.jit
def _row_of_page(place, block_table, table_stride, table_head_stride, block_rows, head_rows):
    """Where a page begins in the cache, in rows of PAGE bytes."""
    request, head, first, _, page, left = place
    entry = block_table + request.to(gl.int64) * table_stride + head * table_head_stride + first + page
    return gl.load(entry, mask=left > 0, other=0) * block_rows + head * head_rows


@gluon.jit(do_not_specialize=["num_reqs", "kv_heads", "slot_rows", *TABLE_STRIDES], do_not_specialize_on_alignment=TABLES)
def _decode_kernel(
    query, out, partial, partial_base, partial_total, cut, k_pages, v_pages, group_rows, scale_rows, block_table, seq_lens,
    query_start_loc, sinks, anchor, v_anchor, scale, soft_cap, num_reqs, kv_heads, slot_rows,
    q_token_stride, q_head_stride, out_token_stride, out_head_stride, table_stride, table_head_stride, block_rows, head_rows,
    GROUP: gl.constexpr, WINDOW: gl.constexpr, SOFT_CAP: gl.constexpr, SINKS: gl.constexpr, ANCHOR: gl.constexpr,
    V_ANCHOR: gl.constexpr, HEAD_DIM: gl.constexpr, K_BITS: gl.constexpr, PAGE: gl.constexpr, BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr, PDL: gl.constexpr,
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
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
    fence_async_shared()
    pages_in = (k_pages, v_pages, group_rows, scale_rows)
    buffers = (k_buffers, v_buffers, group_buffers, scale_buffers)

    await_kernel_before(PDL)
    program = gl.program_id(0)
    share, left, request, kv_head, first, seen, page = find_share(
        seq_lens, query_start_loc, num_reqs, kv_heads, program, gl.num_programs(0),
        gl.arange(0, LANES, gl.BlockedLayout([LANES // 32], [32], [4], [0])), WINDOW, PAGE,  # all of them in each warp
    )  # fmt: skip
    # Pages are fetched ahead of the one that is attended to, also those of parts to come.
    ahead = request, kv_head, first, seen, page, left
    for stage in gl.static_range(STAGES):
        if ahead[5] > 0:
            row = _row_of_page(ahead, block_table, table_stride, table_head_stride, block_rows, head_rows)
            _fetch(pages_in, buffers, full, stage, row, HEAD_DIM, K_BITS, PAGE)
            ahead = _next_page(ahead, seq_lens, query_start_loc, kv_heads, WINDOW, PAGE)

    nth = 0  # page of the share
    cut_segment = 0
    cut_parts = 0
    while left > 0:
        q_start = gl.load(query_start_loc + request)
        q_len = gl.load(query_start_loc + request + 1) - q_start
        seq_len = gl.load(seq_lens + request)
        part = gl.minimum(seen - page, left)
        first_page = first + page

        rows = gl.arange(0, BLOCK_M, gl.SliceLayout(1, Q_LAYOUT))
        offsets = (q_start + rows // GROUP).to(gl.int64) * q_token_stride + (kv_head * GROUP + rows % GROUP) * q_head_stride
        valid = rows // GROUP < q_len
        q = _load_query(query, offsets, valid, 0, Q_LAYOUT, PART)
        amax = gl.max(gl.abs(q), 1)
        q_high = q
        if K_BITS == 4:  # the second half of the head, with the same scale
            q_high = _load_query(query, offsets, valid, PART, Q_LAYOUT, PART)
            amax = gl.maximum(amax, gl.max(gl.abs(q_high), 1))
        inverse = inverse_or_zero(amax, 127.0)[:, None]
        q_buffer.store(to_int(q * inverse).to(gl.int8))
        if K_BITS == 4:
            q_high_buffer.store(to_int(q_high * inverse).to(gl.int8))
        fence_async_shared()
        q_scale = gl.convert_layout(amax * (scale * LOG2E / 127.0), ROWS)
        q_bias = gl.zeros_like(q_scale)
        if ANCHOR:
            head_anchor = anchor + kv_head * HEAD_DIM
            product = _times_anchor(q, head_anchor, Q_LAYOUT, PART)
            if K_BITS == 4:
                product += _times_anchor(q_high, head_anchor + PART, Q_LAYOUT, PART)
            q_bias = gl.convert_layout(product * (scale * LOG2E), ROWS)

        rows = gl.arange(0, BLOCK_M, ROWS)
        position = seq_len - q_len + rows // GROUP - first_page * PAGE
        tokens = gl.arange(0, PAGE, COLUMN)
        length = seq_len - first_page * PAGE
        acc = gl.zeros([HEAD_DIM, BLOCK_M], gl.float32, LAYOUT)
        total = gl.zeros([PAGE, BLOCK_M], gl.float32, LAYOUT)  # sums over pages; those over tokens come last
        base = gl.full([BLOCK_M], float("-inf"), gl.float32, ROWS)
        top = base
        for i in range(part):
            slot = nth % STAGES
            row = _row_of_page(ahead, block_table, table_stride, table_head_stride, block_rows, head_rows)
            mbarrier.wait(full.index(slot), (nth // STAGES) & 1)
            codes = gl.zeros([PAGE, BLOCK_M], gl.int32, LAYOUT)
            if K_BITS == 8:
                k = k_buffers.index(slot)
            else:
                _widen(k_buffers.index(slot), group_buffers.index(slot), low_buffer, high_buffer, HEAD_DIM, PAGE)
                k = low_buffer
            codes = warpgroup_mma(k, q_buffer.permute((1, 0)), codes, use_acc=False, is_async=True)
            if K_BITS == 4:
                codes = warpgroup_mma(high_buffer, q_high_buffer.permute((1, 0)), codes, is_async=True)
            scales = plain(scale_buffers.index(slot), [SCALES, PAGE], gl.float32)
            k_scale = scales.slice(0, 1, dim=0).permute((1, 0)).load(LAYOUT)
            if K_BITS == 8:
                v_exponent = scales.slice(1, 1, dim=0).permute((1, 0)).load(LAYOUT)
            else:
                v_exponent = v_exponent_beside(k_scale)
            v_inverse = gl.exp2(-v_exponent)
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
            new_base, top = page_reference(gl.max(logits, 0), top, base, True)
            shift = gl.where(new_base == float("-inf"), 0.0, new_base)  # a row that has seen nothing: any number will do
            p = gl.exp2(logits - shift[None, :]).to(gl.float8e4nv)
            decay = gl.exp2(base - shift)
            base = new_base
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
            if ahead[5] > 0:
                _fetch(pages_in, buffers, full, slot, row, HEAD_DIM, K_BITS, PAGE)
                ahead = _next_page(ahead, seq_lens, query_start_loc, kv_heads, WINDOW, PAGE)
            nth += 1

        sums = gl.sum(total, 0)
        channels = gl.arange(0, HEAD_DIM, COLUMN)
        if V_ANCHOR:
            acc += gl.load(v_anchor + kv_head * HEAD_DIM + channels)[:, None] * sums[None, :]
        if ANCHOR and not SOFT_CAP:  # sinks are compared with whole logits, which under a cap they are already
            base += q_bias
        head = kv_head * GROUP + rows % GROUP
        valid = rows // GROUP < q_len
        if part == seen:
            if SINKS:
                sums += gl.exp2(gl.load(sinks + head, mask=valid, other=0.0).to(gl.float32) * LOG2E - base)
            target = out + (q_start + rows // GROUP).to(gl.int64) * out_token_stride + head * out_head_stride
            acc = acc / gl.where(sums > 0.0, sums, 1.0)[None, :]
            gl.store(target[None, :] + channels[:, None], acc.to(out.dtype.element_ty), mask=valid[None, :])
        else:
            slot_row = place_of_part(program, page > 0) * slot_rows + rows
            # A row that saw nothing has total 0; the merge skips it by its base of -inf.
            acc = acc / gl.where(sums > 0.0, sums, 1.0)[None, :]
            gl.store(partial + slot_row[None, :] * HEAD_DIM + channels[:, None], acc, mask=valid[None, :])
            gl.store(partial_base + slot_row, base, mask=valid)
            gl.store(partial_total + slot_row, sums, mask=valid)
            if page == 0:
                cut_segment = request * kv_heads + kv_head
                cut_parts = count_parts(part, seen, share)
        left -= part
        page = 0
        request, kv_head, first, seen = next_segment(
            seq_lens, query_start_loc, request, kv_head, first, seen, kv_heads, left > 0, WINDOW, PAGE
        )
    gl.store(cut + 2 * program, cut_segment)
    gl.store(cut + 2 * program + 1, cut_parts)


_STAGES = 2
"""How many pages a program has under way. On an H100 three, or three programs on a processor, read no faster."""


def supports(layout: PageLayout) -> bool:
    """Whether there is a kernel for pages of this layout."""
    return layout.head_dim in (64, 128, 256)


def programs_per_processor(layout: PageLayout) -> int:
    """How many programs are on a processor at a time. Pages of heads of 256 channels leave room for one."""
    return 2 if layout.head_dim <= 128 else 1


def attend(
    query: torch.Tensor,
    pages: torch.Tensor,
    layout: PageLayout,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    window: int,
    soft_cap: float,
    sinks: torch.Tensor | None,
    anchor: torch.Tensor | None,
    v_anchor: torch.Tensor | None,
    rows: int,
    programs: int,
    partial: tuple[torch.Tensor, ...],
) -> None:
    """What `decode.decode` does before it merges, for up to so many rows a request. partial: the tensors of its workspace."""
    head_dim = query.shape[2]
    group = query.shape[1] // pages.shape[1]
    block_rows, head_rows = pages.stride(0) // layout.tokens, pages.stride(1) // layout.tokens
    _decode_kernel[(programs,)](
        query, out, *partial, *descriptors(pages, layout),
        block_table, seq_lens, query_start_loc, query if sinks is None else sinks, query if anchor is None else anchor,
        query if v_anchor is None else v_anchor, scale, soft_cap, seq_lens.numel(), pages.shape[1], rows,
        query.stride(0), query.stride(1), out.stride(0), out.stride(1), *table_strides(block_table), block_rows, head_rows,
        GROUP=group, WINDOW=window, SOFT_CAP=soft_cap > 0, SINKS=sinks is not None, ANCHOR=anchor is not None,
        V_ANCHOR=v_anchor is not None, HEAD_DIM=head_dim, K_BITS=layout.k_bits, PAGE=layout.tokens,
        BLOCK_M=max(8, 1 << (rows - 1).bit_length()), STAGES=_STAGES, num_warps=4,
        **dependent_launch(query.device),
    )  # fmt: skip
