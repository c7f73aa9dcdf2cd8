"""Attention of a few query tokens per request: one for plain decoding, some more to verify speculated ones.

The pages of a batch are shared out evenly among programs whose number depends on the device (see `shares`); what several of
them have of one request's KV head, a second kernel merges. All grids follow from shapes alone, nothing is read back, and the
workspace is allocated once, so both can be captured in a CUDA graph and replayed with other lengths.
"""

import functools
from dataclasses import dataclass
from types import ModuleType

import torch
import triton
import triton.language as tl

from sage_kernels.device import dependent_launch, fp8_path, has_own_kernels, multiprocessors, pipeline_stages
from sage_kernels.prefill import attend_pages, table_strides, turn_arguments
from sage_kernels.reference import Turns
from sage_kernels.shares import LANES, count_parts, find_share, next_segment, place_of_part
from sage_kernels.tiles import LOG2E, TABLE_STRIDES, TABLES, add_v_anchor, await_kernel_before
from sage_paged import PageLayout

# Tuned on an H200 at 64 x 8K, 8 x 128K and 1 x 128K tokens, when requests were cut into one number of splits: two warps read
# faster than four, which wait for each other. Eight programs are more than a processor holds, so that the next one is there
# when one ends.
_WARPS = 2
_PROGRAMS_PER_PROCESSOR = 8
_PARTS_AT_ONCE = 32
"""Results of parts that a program of the merge holds at a time."""
_MERGING = 8
"""Programs that may share the rows of a request when its parts are merged."""

MAX_ROWS = 64
"""Query rows (tokens times heads of a group) that one program takes; requests of several tokens with more rows belong to
the prefill kernel."""


@triton.jit(do_not_specialize=["num_reqs", "kv_heads", "slot_rows", *TABLE_STRIDES], do_not_specialize_on_alignment=TABLES)
def _decode_kernel(
    query, out, partial, partial_base, partial_total, cut, cache_i8, cache_v, cache_f32, block_table, seq_lens, query_start_loc,
    sinks, anchor, v_anchor, scale, soft_cap, turns, turn_table, num_reqs, kv_heads, slot_rows,
    q_token_stride, q_head_stride, out_token_stride, out_head_stride, table_stride, table_head_stride, block_stride,
    head_stride,
    GROUP: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, SINKS: tl.constexpr, ANCHOR: tl.constexpr,
    V_ANCHOR: tl.constexpr, HEAD_DIM: tl.constexpr, K_BITS: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, FP8: tl.constexpr, TURN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (programs). partial: float32 [places of parts, slot_rows, HEAD_DIM], normalized. cut: int32 [programs, 2], the
    segment whose first part ends a program's share, and how many parts it has; 0 if there is none."""
    await_kernel_before(PDL)
    program = tl.program_id(0)
    share, left, request, kv_head, first, seen, page = find_share(
        seq_lens, query_start_loc, num_reqs, kv_heads, program, tl.num_programs(0), tl.arange(0, LANES), WINDOW, PAGE
    )
    rows = tl.arange(0, BLOCK_M)
    local = rows // GROUP
    channels = tl.arange(0, BLOCK_D)
    cut_segment = 0
    cut_parts = 0
    while left > 0:
        q_start = tl.load(query_start_loc + request)
        q_len = tl.load(query_start_loc + request + 1) - q_start
        seq_len = tl.load(seq_lens + request)
        head = kv_head * GROUP + rows % GROUP
        valid = local < q_len
        part = tl.minimum(seen - page, left)
        first_page = first + page
        end_page = first_page + part
        # Pages up to this one are seen whole by every row.
        full_pages = tl.minimum((seq_len - q_len + 1) // PAGE, end_page) if WINDOW == 0 else first_page

        table_offset = request.to(tl.int64) * table_stride + kv_head * table_head_stride
        acc, total, base, q_bias = attend_pages(
            query, cache_i8, cache_v, cache_f32, anchor + kv_head * HEAD_DIM, turn_table, block_table + table_offset,
            turns + table_offset, first_page, full_pages, end_page, q_start + local, head, valid, seq_len - q_len + local,
            seq_len, kv_head.to(tl.int64) * head_stride, block_stride, q_token_stride, q_head_stride, scale, soft_cap,
            WINDOW, SOFT_CAP, ANCHOR, HEAD_DIM, K_BITS, PAGE, BLOCK_D, BLOCK_M, FP8, TURN, 0,
        )  # fmt: skip
        # What all values lack, every part gives back itself: the merge takes a mean of parts, less the share that a sink has.
        acc = add_v_anchor(acc, total, v_anchor + kv_head * HEAD_DIM, HEAD_DIM, V_ANCHOR)
        if ANCHOR and not SOFT_CAP:  # sinks are compared with whole logits, which under a cap they are already
            base += q_bias
        mask = valid[:, None] & (channels < HEAD_DIM)[None, :]
        if part == seen:
            if SINKS:
                total += tl.exp2(tl.load(sinks + head, mask=valid, other=0.0).to(tl.float32) * LOG2E - base)
            target = out + (q_start + local).to(tl.int64)[:, None] * out_token_stride + head[:, None] * out_head_stride
            acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
            tl.store(target + channels[None, :], acc.to(out.dtype.element_ty), mask=mask)
        else:
            slot = place_of_part(program, page > 0) * slot_rows + rows
            # A row that saw nothing has total 0; the merge skips it by its base of -inf.
            acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
            tl.store(partial + slot[:, None] * HEAD_DIM + channels[None, :], acc, mask=mask)
            tl.store(partial_base + slot, base, mask=valid)
            tl.store(partial_total + slot, total, mask=valid)
            if page == 0:
                cut_segment = request * kv_heads + kv_head
                cut_parts = count_parts(part, seen, share)
        left -= part
        page = 0
        request, kv_head, first, seen = next_segment(
            seq_lens, query_start_loc, request, kv_head, first, seen, kv_heads, left > 0, WINDOW, PAGE
        )
    tl.store(cut + 2 * program, cut_segment)
    tl.store(cut + 2 * program + 1, cut_parts)


@triton.jit(do_not_specialize=["kv_heads", "slot_rows"], do_not_specialize_on_alignment=TABLES)
def _merge_kernel(
    out, partial, partial_base, partial_total, cut, query_start_loc, sinks, kv_heads, slot_rows,
    out_token_stride, out_head_stride,
    GROUP: tl.constexpr, SINKS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (programs of the kernel before, programs that share the rows of a request)."""
    await_kernel_before(PDL)
    program = tl.program_id(0)
    segment = tl.load(cut + 2 * program)
    parts = tl.load(cut + 2 * program + 1)
    if parts == 0:
        return
    request = segment // kv_heads
    q_start = tl.load(query_start_loc + request)
    rows = (tl.load(query_start_loc + request + 1) - q_start) * GROUP
    channels = tl.arange(0, BLOCK_D)
    end = slot_rows
    if slot_rows > tl.num_programs(1):  # elsewhere a program has one row, and loading need not wait for their number
        end = rows
    for row in range(tl.program_id(1), end, tl.num_programs(1)):
        acc = tl.zeros([BLOCK_D], tl.float32)
        total = 0.0
        largest = float("-inf")
        for first in range(0, parts, BLOCK_S):
            part = first + tl.arange(0, BLOCK_S)
            there = part < parts
            place = place_of_part(program + part, part > 0) * slot_rows + row
            source = partial + place[:, None] * HEAD_DIM + channels[None, :]
            values = tl.load(source, mask=there[:, None] & (channels < HEAD_DIM)[None, :], other=0.0)
            base = tl.load(partial_base + place, mask=there, other=float("-inf"))
            weight = tl.load(partial_total + place, mask=there, other=0.0)
            new_largest = tl.maximum(largest, tl.max(base, 0))
            shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
            decay = tl.exp2(largest - shift)
            weight *= tl.exp2(base - shift)
            total = total * decay + tl.sum(weight, 0)
            acc = acc * decay + tl.sum(values * weight[:, None], 0)
            largest = new_largest
        head = segment % kv_heads * GROUP + row % GROUP
        if SINKS:
            total += tl.exp2(tl.load(sinks + head).to(tl.float32) * LOG2E - largest)
        mask = (channels < HEAD_DIM) & (row < rows)
        target = out + (q_start + row // GROUP).to(tl.int64) * out_token_stride + head * out_head_stride + channels
        tl.store(target, (acc / tl.where(total > 0.0, total, 1.0)).to(out.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Workspace:
    """Results of cut parts, float32 [places, head_dim], [places] and [places]; and what is cut, int32 [programs, 2]."""

    out: torch.Tensor
    base: torch.Tensor
    total: torch.Tensor
    cut: torch.Tensor

    @staticmethod
    def allocate(programs: int, query_rows: int, head_dim: int, device: torch.device | str) -> "Workspace":
        """query_rows: the most query tokens of a request times heads of a group."""
        places = 2 * programs * query_rows

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        cut = torch.empty(programs, 2, dtype=torch.int32, device=device)
        return Workspace(empty(places, head_dim), empty(places), empty(places), cut)


@functools.cache
def choose_kernel(device: torch.device, layout: PageLayout) -> ModuleType | None:
    """The module with a kernel made for this device and these pages, or None for the portable one."""
    if not has_own_kernels(device):
        return None
    from sage_kernels import hopper_decode

    return hopper_decode if hopper_decode.supports(layout) else None


def count_programs(device: torch.device, layout: PageLayout, turning: bool = False) -> int:
    """How many programs share the work, if `decode` is not told. turning: whether queries are turned for pages."""
    own = None if turning else choose_kernel(device, layout)
    return (_PROGRAMS_PER_PROCESSOR if own is None else own.programs_per_processor(layout)) * multiprocessors(device)


def decode(
    query: torch.Tensor,
    pages: torch.Tensor,
    layout: PageLayout,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    window: int = 0,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    anchor: torch.Tensor | None = None,
    v_anchor: torch.Tensor | None = None,
    turns: Turns | None = None,
    *,
    max_query_len: int = 1,
    programs: int | None = None,
    workspace: Workspace | None = None,
) -> None:
    """`reference.attention` on a GPU, with the same arguments; writes `out`, which has query's shape.

    Rows that are no request's, as a padded CUDA graph has them, and requests without a length are left as they are.

    max_query_len: the most query tokens of a request; times the heads of a group at most MAX_ROWS. programs: how many share the
    work, see `count_programs`. workspace: for at least as many programs and rows; allocated for this call if None.
    Raises ValueError where the workspace or a tile does not fit.
    """
    heads, head_dim = query.shape[1:]
    requests, kv_heads = seq_lens.numel(), pages.shape[1]
    group = heads // kv_heads
    rows = max_query_len * group
    if max_query_len > 1 and rows > MAX_ROWS:
        raise ValueError(f"{max_query_len} query tokens x {group} heads exceed the decode kernel's {MAX_ROWS} rows")
    own = choose_kernel(query.device, layout) if turns is None else None
    programs = programs or count_programs(query.device, layout, turns is not None)
    if workspace is None:
        workspace = Workspace.allocate(programs, rows, head_dim, query.device)
    else:
        given = workspace.cut.shape[0], *workspace.out.shape
        if given[0] < programs or given[1] < 2 * programs * rows or given[2] != head_dim:
            raise ValueError(
                f"a workspace for {given[0]} programs, {given[1]} places of {given[2]} channels; needed are {programs}, "
                f"{2 * programs * rows} and {head_dim}"
            )
    block_d = triton.next_power_of_2(head_dim)
    partial = workspace.out, workspace.base, workspace.total, workspace.cut
    sinks_or_any = query if sinks is None else sinks
    if own is not None:
        where = block_table, seq_lens, query_start_loc
        masks = window, soft_cap, sinks, anchor, v_anchor
        own.attend(query, pages, layout, *where, scale, out, *masks, rows, programs, partial)
    else:
        fp8 = fp8_path(query.device)
        block_m = max(16, triton.next_power_of_2(rows))
        _decode_kernel[(programs,)](
            query, out, *partial, pages.view(torch.int8), pages.view(torch.uint8 if fp8 == "half" else torch.float8_e4m3fn),
            pages.view(torch.float32), block_table, seq_lens, query_start_loc, sinks_or_any,
            query if anchor is None else anchor, query if v_anchor is None else v_anchor, scale, soft_cap,
            *turn_arguments(turns, query), requests, kv_heads, rows,
            query.stride(0), query.stride(1), out.stride(0), out.stride(1), *table_strides(block_table),
            pages.stride(0), pages.stride(1),
            GROUP=group, WINDOW=window, SOFT_CAP=soft_cap > 0, SINKS=sinks is not None, ANCHOR=anchor is not None,
            V_ANCHOR=v_anchor is not None, HEAD_DIM=head_dim, K_BITS=layout.k_bits, PAGE=layout.tokens,
            BLOCK_D=block_d, BLOCK_M=block_m, FP8=fp8, TURN=turns is not None, num_warps=_WARPS,
            num_stages=pipeline_stages(query.device, block_m, block_d, layout.tokens), **dependent_launch(query.device),
        )  # fmt: skip
    _merge_kernel[(programs, min(rows, _MERGING))](
        out, *partial, query_start_loc, sinks_or_any, kv_heads, rows, out.stride(0), out.stride(1),
        GROUP=group, SINKS=sinks is not None, HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_S=_PARTS_AT_ONCE, num_warps=4,
        **dependent_launch(query.device),
    )  # fmt: skip
