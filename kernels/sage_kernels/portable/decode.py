# SPDX-License-Identifier: Apache-2.0
"""Decoding: a few query tokens per request, one for plain decoding, more to verify drafts. Triton, for every GPU from sm_80 on.

Split-KV: the pages of a batch are divided evenly among programs whose number depends on the device (`scheduler`). A second
kernel combines the partial results of split segments. All grids follow from shapes alone, nothing is read back, and the
workspace is allocated once: both kernels can be captured in a CUDA graph and replayed with other lengths.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sage_kernels.batch import Modifiers, PagedBatch
from sage_kernels.device import dependent_launch, fp8_path, multiprocessors, shared_memory
from sage_kernels.portable.primitives import LOG2E, TABLE_STRIDES, TABLES, add_v_anchor, await_previous_kernel, v_inverse_bits
from sage_kernels.portable.query_tile import (
    PageRange,
    QueryRows,
    attend_pages,
    bytes_beside_pages,
    cache_views,
    calibration_constants,
    calibration_tensors,
    pipeline_stages,
    shift_tensors,
    tensor_or,
)
from sage_kernels.portable.scheduler import LANES, count_parts, find_span, next_segment, partial_slot
from sage_paged import PageLayout

# Tuned on an H200 that stood in for other GPUs, at 128 x 1K, 64 x 8K and 8 x 128K tokens. Eight programs are more than a
# multiprocessor holds, so that the next one is there when one ends.
_WARPS = 4
_PROGRAMS_PER_MULTIPROCESSOR = 8
_PARTS_AT_ONCE = 32
"""Partial results that a program of the merge kernel holds at a time."""
_MERGE_PROGRAMS = 8
"""Most programs that share the rows of one request in the merge kernel."""

_MOST_ROWS = 64
"""Query rows (tokens times query heads per KV head) of one program. Requests of several tokens with more rows take prefill."""


@triton.jit(do_not_specialize=["num_reqs", "kv_heads", "slot_rows", *TABLE_STRIDES], do_not_specialize_on_alignment=TABLES)
def _decode_kernel(
    query, out, partial, partial_m, partial_l, split, cache_i8, cache_v, cache_f32, block_table, seq_lens, query_start_loc,
    sinks, k_anchor, equalizer, order, v_anchor, scale, soft_cap, shifts, shift_table, num_reqs, kv_heads, slot_rows,
    q_token_stride, q_head_stride, out_token_stride, out_head_stride, table_stride, table_head_stride, block_stride,
    head_stride,
    GROUP: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, SINKS: tl.constexpr, K_ANCHOR: tl.constexpr,
    EQUALIZE: tl.constexpr, ORDER: tl.constexpr, V_ANCHOR: tl.constexpr, HEAD_DIM: tl.constexpr, K_BITS: tl.constexpr,
    V_BITS: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, FP8: tl.constexpr, SHIFT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (programs). partial: float32 [slots, slot_rows, HEAD_DIM], normalized partial results; partial_m, partial_l:
    float32 [slots, slot_rows], their m_ref and l_i. split: int32 [programs, 2], the segment whose first part ends a program's
    span, and the number of its parts; 0 if there is none."""
    await_previous_kernel(PDL)
    program = tl.program_id(0)
    span, item = find_span(
        seq_lens, query_start_loc, num_reqs, kv_heads, program, tl.num_programs(0), tl.arange(0, LANES), WINDOW, PAGE
    )
    request, kv_head, first, seen, page, left = item
    row = tl.arange(0, BLOCK_M)
    local = row // GROUP
    channels = tl.arange(0, BLOCK_D)
    split_segment = 0
    split_parts = 0
    while left > 0:
        q_start = tl.load(query_start_loc + request)
        q_len = tl.load(query_start_loc + request + 1) - q_start
        seq_len = tl.load(seq_lens + request)
        head = kv_head * GROUP + row % GROUP
        valid = local < q_len
        rows = QueryRows(q_start + local, head, seq_len - q_len + local, valid)
        part = tl.minimum(seen - page, left)
        first_page = first + page
        end_page = first_page + part
        full_pages = tl.minimum((seq_len - q_len + 1) // PAGE, end_page) if WINDOW == 0 else first_page

        table_offset = request.to(tl.int64) * table_stride + kv_head * table_head_stride
        state, q_bias = attend_pages(
            query, cache_i8, cache_v, cache_f32, k_anchor + kv_head * HEAD_DIM, equalizer + kv_head * HEAD_DIM,
            order + kv_head * (HEAD_DIM // 2), shift_table,
            block_table + table_offset, shifts + table_offset, None, PageRange(first_page, full_pages, end_page, seq_len), rows,
            kv_head.to(tl.int64) * head_stride, block_stride, q_token_stride, q_head_stride, 0, scale, soft_cap,
            WINDOW, SOFT_CAP, K_ANCHOR, EQUALIZE, ORDER, HEAD_DIM, K_BITS, V_BITS, PAGE, BLOCK_D, BLOCK_M, FP8, SHIFT, False, 0,
            v_inverse_bits(V_BITS), 1,
        )  # fmt: skip
        l_i, m_ref = state.l_i, state.m_ref
        # Every part adds the anchor of V itself: the merge takes a weighted mean of parts, where a sink has a share too.
        acc = add_v_anchor(state.acc, l_i, v_anchor + kv_head * HEAD_DIM, HEAD_DIM, V_ANCHOR)
        if K_ANCHOR and not SOFT_CAP:  # a sink is compared with whole logits, which under a cap they are already
            m_ref += q_bias
        mask = valid[:, None] & (channels < HEAD_DIM)[None, :]
        if part == seen:
            if SINKS:
                l_i += tl.exp2(tl.load(sinks + head, mask=valid, other=0.0).to(tl.float32) * LOG2E - m_ref)
            target = out + (q_start + local).to(tl.int64)[:, None] * out_token_stride + head[:, None] * out_head_stride
            acc = acc / tl.where(l_i > 0.0, l_i, 1.0)[:, None]
            tl.store(target + channels[None, :], acc.to(out.dtype.element_ty), mask=mask)
        else:
            slot = partial_slot(program, page > 0) * slot_rows + row
            # A row that saw nothing has l_i 0; the merge skips it because its m_ref is -inf.
            acc = acc / tl.where(l_i > 0.0, l_i, 1.0)[:, None]
            tl.store(partial + slot[:, None] * HEAD_DIM + channels[None, :], acc, mask=mask)
            tl.store(partial_m + slot, m_ref, mask=valid)
            tl.store(partial_l + slot, l_i, mask=valid)
            if page == 0:
                split_segment = request * kv_heads + kv_head
                split_parts = count_parts(part, seen, span)
        left -= part
        page = 0
        request, kv_head, first, seen = next_segment(
            seq_lens, query_start_loc, request, kv_head, first, seen, kv_heads, left > 0, WINDOW, PAGE
        )
    tl.store(split + 2 * program, split_segment)
    tl.store(split + 2 * program + 1, split_parts)


@triton.jit(do_not_specialize=["kv_heads", "slot_rows"], do_not_specialize_on_alignment=TABLES)
def _merge_kernel(
    out, partial, partial_m, partial_l, split, query_start_loc, sinks, kv_heads, slot_rows,
    out_token_stride, out_head_stride,
    GROUP: tl.constexpr, SINKS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (programs of the decode kernel, programs that share the rows of a request)."""
    await_previous_kernel(PDL)
    program = tl.program_id(0)
    segment = tl.load(split + 2 * program)
    parts = tl.load(split + 2 * program + 1)
    if parts == 0:
        return
    request = segment // kv_heads
    q_start = tl.load(query_start_loc + request)
    rows = (tl.load(query_start_loc + request + 1) - q_start) * GROUP
    channels = tl.arange(0, BLOCK_D)
    end = slot_rows
    if slot_rows > tl.num_programs(1):  # elsewhere a program has one row, and the load need not wait for rows
        end = rows
    for row in range(tl.program_id(1), end, tl.num_programs(1)):
        acc = tl.zeros([BLOCK_D], tl.float32)
        l_i = 0.0
        m_i = float("-inf")
        for first in range(0, parts, BLOCK_S):
            part = first + tl.arange(0, BLOCK_S)
            valid = part < parts
            slot = partial_slot(program + part, part > 0) * slot_rows + row
            source = partial + slot[:, None] * HEAD_DIM + channels[None, :]
            values = tl.load(source, mask=valid[:, None] & (channels < HEAD_DIM)[None, :], other=0.0)
            m_part = tl.load(partial_m + slot, mask=valid, other=float("-inf"))
            weight = tl.load(partial_l + slot, mask=valid, other=0.0)
            m_new = tl.maximum(m_i, tl.max(m_part, 0))
            finite = tl.where(m_new == float("-inf"), 0.0, m_new)
            decay = tl.exp2(m_i - finite)
            weight *= tl.exp2(m_part - finite)
            l_i = l_i * decay + tl.sum(weight, 0)
            acc = acc * decay + tl.sum(values * weight[:, None], 0)
            m_i = m_new
        head = segment % kv_heads * GROUP + row % GROUP
        if SINKS:
            l_i += tl.exp2(tl.load(sinks + head).to(tl.float32) * LOG2E - m_i)
        mask = (channels < HEAD_DIM) & (row < rows)
        target = out + (q_start + row // GROUP).to(tl.int64) * out_token_stride + head * out_head_stride + channels
        tl.store(target, (acc / tl.where(l_i > 0.0, l_i, 1.0)).to(out.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Workspace:
    """Partial results of decoding, reused by every layer and step. out: float32 [slots, head_dim]; m_ref, l_i: float32 [slots];
    split: int32 [programs, 2]."""

    out: torch.Tensor
    m_ref: torch.Tensor
    l_i: torch.Tensor
    split: torch.Tensor

    @staticmethod
    def allocate(programs: int, query_rows: int, head_dim: int, device: torch.device | str) -> "Workspace":
        """query_rows: the most query tokens of a request times query heads per KV head."""
        slots = 2 * programs * query_rows

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        split = torch.empty(programs, 2, dtype=torch.int32, device=device)
        return Workspace(empty(slots, head_dim), empty(slots), empty(slots), split)

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.out, self.m_ref, self.l_i, self.split

    def check(self, programs: int, rows: int, head_dim: int) -> None:
        """Raises ValueError where the workspace is smaller than these, or of another head_dim."""
        has = self.split.shape[0], *self.out.shape
        needs = programs, 2 * programs * rows, head_dim
        if has[0] < needs[0] or has[1] < needs[1] or has[2] != needs[2]:
            raise ValueError(
                f"workspace too small: it has {has[0]} programs and {has[1]} slots of {has[2]} channels; this call needs "
                f"{needs[0]}, {needs[1]} and {needs[2]}"
            )


def count_programs(device: torch.device) -> int:
    """How many programs share the work of a step."""
    return _PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(device)


@functools.cache  # asked for in every launch
def max_rows(device: torch.device, layout: PageLayout) -> int:
    """Most query rows of a request with several tokens: 64, or 32 for heads of 512 channels where shared memory is small."""
    fits = bytes_beside_pages(device, layout, _MOST_ROWS) <= shared_memory(device)
    return _MOST_ROWS if fits else _MOST_ROWS // 2


def check_rows(device: torch.device, layout: PageLayout, max_query_len: int, group: int) -> int:
    """The query rows of a program. Raises ValueError where several query tokens need more than `max_rows`."""
    rows = max_query_len * group
    if max_query_len > 1 and rows > (most := max_rows(device, layout)):
        raise ValueError(f"{max_query_len} query tokens x {group} heads exceed the decode kernel's {most} rows")
    return rows


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
    """`reference.attention` with the same arguments, of requests of at most batch.max_query_len query tokens; writes `out`.

    Rows of no request (padding of a CUDA graph) and requests of length 0 are left as they are. modifiers.q_block is ignored: a
    block of one token, or of a few, has no mean worth subtracting. workspace: for at least as many programs and rows; allocated
    for this call if None. programs: how many share the work; `count_programs` if None. Raises ValueError where the workspace or
    a tile is too small.
    """
    modifiers = modifiers or Modifiers()
    group, head_dim, kv_heads = query.shape[1] // pages.shape[1], query.shape[2], pages.shape[1]
    calibration = modifiers.calibration_for(batch, layout.k_bits)
    rows = check_rows(query.device, layout, batch.max_query_len or 1, group)
    programs = programs or count_programs(query.device)
    workspace = workspace or Workspace.allocate(programs, rows, head_dim, query.device)
    workspace.check(programs, rows, head_dim)
    block_d, block_m = triton.next_power_of_2(head_dim), max(16, triton.next_power_of_2(rows))
    _decode_kernel[(programs,)](
        query, out, *workspace.tensors, *cache_views(pages), batch.block_table, batch.seq_lens, batch.query_start_loc,
        tensor_or(modifiers.sinks, query), *calibration_tensors(calibration, query), scale, modifiers.soft_cap,
        *shift_tensors(batch.rope_shift, query), batch.num_requests, kv_heads, rows,
        query.stride(0), query.stride(1), out.stride(0), out.stride(1), *batch.table_strides,
        pages.stride(0), pages.stride(1),
        GROUP=group, WINDOW=modifiers.window, SOFT_CAP=modifiers.soft_cap > 0, SINKS=modifiers.sinks is not None,
        **calibration_constants(calibration), HEAD_DIM=head_dim,
        K_BITS=layout.k_bits, V_BITS=layout.v_bits, PAGE=layout.tokens, BLOCK_D=block_d, BLOCK_M=block_m,
        FP8=fp8_path(query.device),
        SHIFT=batch.rope_shift is not None, num_warps=_WARPS,
        num_stages=pipeline_stages(query.device, layout, 2 if block_d <= 128 else 1, block_m), **dependent_launch(query.device),
    )  # fmt: skip
    merge(query, out, batch, kv_heads, rows, programs, modifiers, workspace)


def merge(
    query: torch.Tensor,
    out: torch.Tensor,
    batch: PagedBatch,
    kv_heads: int,
    rows: int,
    programs: int,
    modifiers: Modifiers,
    workspace: Workspace,
) -> None:
    """Combine the partial results of a decode kernel with this many programs and rows, and write them to `out`."""
    head_dim = query.shape[2]
    _merge_kernel[(programs, min(rows, _MERGE_PROGRAMS))](
        out, *workspace.tensors, batch.query_start_loc, tensor_or(modifiers.sinks, query), kv_heads, rows,
        out.stride(0), out.stride(1),
        GROUP=query.shape[1] // kv_heads, SINKS=modifiers.sinks is not None, HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim), BLOCK_S=_PARTS_AT_ONCE, num_warps=4, **dependent_launch(query.device),
    )  # fmt: skip
