"""Attention of a few query tokens per request: one for plain decoding, some more to verify speculated ones.

One request's KV length is split over several programs (Flash-Decoding), whose partial results a second kernel merges. All
grids follow from shapes alone, nothing is read back, and the workspace is allocated once, so both can be captured in a
CUDA graph and replayed with other lengths.
"""

import functools
from dataclasses import dataclass
from types import ModuleType

import torch
import triton
import triton.language as tl

from sage_kernels.device import fp8_path, has_own_kernels, pipeline_stages
from sage_kernels.prefill import quantized_query, table_strides, turn_arguments
from sage_kernels.reference import Turns
from sage_kernels.tiles import LOG2E, TABLES, add_v_anchor, attend_page
from sage_paged import PageLayout

# Tuned on an H200 at 64 x 8K, 8 x 128K and 1 x 128K tokens: two warps read faster than four, which wait for each other, and
# eight programs a processor level out the tails of long requests.
_WARPS = 2
_PROGRAMS_PER_PROCESSOR = 8
_MAX_SPLITS = 128
_SPLITS_AT_ONCE = 16
"""Partial results that the merge holds at a time."""

MAX_ROWS = 64
"""Query rows (tokens times heads of a group) that one program takes; requests of several tokens with more rows belong to
the prefill kernel."""


@triton.jit(do_not_specialize_on_alignment=TABLES)
def _decode_kernel(
    query, partial, partial_top, partial_total, cache_i8, cache_v, cache_f32, block_table, seq_lens, query_start_loc, anchor,
    v_anchor, scale, soft_cap,
    turns, turn_table, q_token_stride, q_head_stride, table_stride, table_head_stride, block_stride, head_stride,
    GROUP: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, ANCHOR: tl.constexpr, V_ANCHOR: tl.constexpr,
    HEAD_DIM: tl.constexpr, K_BITS: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, FP8: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """Grid: (splits, KV heads, requests). partial: float32 [tokens, heads, splits, HEAD_DIM], normalized."""
    split = tl.program_id(0)
    splits = tl.num_programs(0)
    kv_head = tl.program_id(1)
    request = tl.program_id(2)
    q_start = tl.load(query_start_loc + request)
    q_len = tl.load(query_start_loc + request + 1) - q_start
    seq_len = tl.load(seq_lens + request)

    rows = tl.arange(0, BLOCK_M)
    local = rows // GROUP
    head = kv_head * GROUP + rows % GROUP
    valid = local < q_len
    q_low, q_high, q_scale, q_bias = quantized_query(
        query, anchor + kv_head * HEAD_DIM, turn_table, q_start + local, head, valid, q_token_stride, q_head_stride, scale,
        ANCHOR, False, HEAD_DIM, K_BITS, BLOCK_D,
    )  # fmt: skip
    page_bias = q_bias

    position = seq_len - q_len + local
    first_page = 0
    if WINDOW > 0:
        first_page = tl.maximum(seq_len - q_len - WINDOW + 1, 0) // PAGE
    pages = tl.cdiv(seq_len, PAGE) - first_page
    per_split = tl.cdiv(pages, splits)
    first_page += split * per_split
    end_page = tl.minimum(first_page + per_split, tl.cdiv(seq_len, PAGE))
    # Pages up to this one are seen whole by every row.
    full_pages = tl.minimum((seq_len - q_len + 1) // PAGE, end_page) if WINDOW == 0 else first_page

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    table_offset = request.to(tl.int64) * table_stride + kv_head * table_head_stride
    table = block_table + table_offset
    head_offset = kv_head.to(tl.int64) * head_stride
    for page in range(first_page, full_pages):
        offset = tl.load(table + page).to(tl.int64) * block_stride + head_offset
        if TURN:
            q_low, q_high, q_scale, page_bias = quantized_query(
                query, anchor + kv_head * HEAD_DIM, turn_table + tl.load(turns + table_offset + page) * HEAD_DIM,
                q_start + local, head, valid, q_token_stride, q_head_stride, scale, ANCHOR, True, HEAD_DIM, K_BITS, BLOCK_D,
            )  # fmt: skip
            if not SOFT_CAP:
                page_bias -= q_bias
        acc, total, top = attend_page(
            q_low, q_high, q_scale, page_bias, acc, total, top, cache_i8, cache_v, cache_f32, offset,
            PAGE, rows, rows, soft_cap, HEAD_DIM, K_BITS, PAGE, False, SOFT_CAP, FP8, TURN,
        )  # fmt: skip
    for page in range(tl.maximum(first_page, full_pages), end_page):
        offset = tl.load(table + page).to(tl.int64) * block_stride + head_offset
        last_visible = position - page * PAGE
        first_visible = last_visible - WINDOW + 1 if WINDOW > 0 else tl.zeros_like(last_visible)
        if TURN:
            q_low, q_high, q_scale, page_bias = quantized_query(
                query, anchor + kv_head * HEAD_DIM, turn_table + tl.load(turns + table_offset + page) * HEAD_DIM,
                q_start + local, head, valid, q_token_stride, q_head_stride, scale, ANCHOR, True, HEAD_DIM, K_BITS, BLOCK_D,
            )  # fmt: skip
            if not SOFT_CAP:
                page_bias -= q_bias
        acc, total, top = attend_page(
            q_low, q_high, q_scale, page_bias, acc, total, top, cache_i8, cache_v, cache_f32, offset,
            seq_len - page * PAGE, first_visible, last_visible, soft_cap,
            HEAD_DIM, K_BITS, PAGE, True, SOFT_CAP, FP8, TURN,
        )  # fmt: skip

    # What all values lack, every split gives back itself: the merge takes a mean of splits, less the share that a sink has.
    acc = add_v_anchor(acc, total, v_anchor + kv_head * HEAD_DIM, HEAD_DIM, V_ANCHOR)
    # A split that saw nothing has total 0; the merge skips it by its top of -inf.
    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    if ANCHOR and not SOFT_CAP:  # sinks are compared with whole logits, which under a cap they are already
        top += q_bias
    channels = tl.arange(0, BLOCK_D)
    slot = ((q_start + local) * tl.num_programs(1) * GROUP + head).to(tl.int64) * splits + split
    target = partial + slot[:, None] * HEAD_DIM + channels[None, :]
    tl.store(target, acc, mask=valid[:, None] & (channels < HEAD_DIM)[None, :])
    tl.store(partial_top + slot, top, mask=valid)
    tl.store(partial_total + slot, total, mask=valid)


@triton.jit(do_not_specialize=["splits"])
def _merge_kernel(
    out, partial, partial_top, partial_total, sinks, splits, out_token_stride, out_head_stride,
    SINKS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, MAX_SPLITS: tl.constexpr,
):  # fmt: skip
    """Grid: (tokens, heads)."""
    token = tl.program_id(0)
    head = tl.program_id(1)
    slot = (token * tl.num_programs(1) + head).to(tl.int64) * splits
    every = tl.arange(0, MAX_SPLITS)
    largest = tl.max(tl.load(partial_top + slot + every, mask=every < splits, other=float("-inf")), 0)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    channels = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    total = 0.0
    for first in range(0, splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        top = tl.load(partial_top + slot + split, mask=split < splits, other=float("-inf"))
        weight = tl.load(partial_total + slot + split, mask=split < splits, other=0.0)
        weight = tl.where(top == float("-inf"), 0.0, weight * tl.exp2(top - shift))
        total += tl.sum(weight, 0)
        source = partial + (slot + split)[:, None] * HEAD_DIM + channels[None, :]
        mask = (weight > 0.0)[:, None] & (channels < HEAD_DIM)[None, :]
        acc += tl.sum(tl.load(source, mask=mask, other=0.0) * weight[:, None], 0)
    if SINKS:
        total += tl.exp2(tl.load(sinks + head).to(tl.float32) * LOG2E - shift)
    target = out + token.to(tl.int64) * out_token_stride + head * out_head_stride + channels
    tl.store(target, (acc / tl.where(total > 0.0, total, 1.0)).to(out.dtype.element_ty), mask=channels < HEAD_DIM)


@dataclass(frozen=True)
class Workspace:
    """Partial results: float32 [capacity, head_dim], [capacity] and [capacity], one row a (token, head, split)."""

    out: torch.Tensor
    top: torch.Tensor
    total: torch.Tensor

    @staticmethod
    def allocate(rows: int, head_dim: int, device: torch.device | str) -> "Workspace":
        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        return Workspace(empty(rows, head_dim), empty(rows), empty(rows))


@functools.cache
def choose_kernel(device: torch.device, layout: PageLayout) -> ModuleType | None:
    """The module with a kernel made for this device and these pages, or None for the portable one."""
    if not has_own_kernels(device):
        return None
    from sage_kernels import hopper_decode

    return hopper_decode if hopper_decode.supports(layout) else None


def choose_splits(requests: int, kv_heads: int, max_seq_len: int, page_tokens: int, processors: int, own: bool = False) -> int:
    """Over how many programs to spread each request's KV length: enough to fill the chip, none with under two pages.

    own: whether the kernel is one that `choose_kernel` knows. Two of its programs fill a processor. Requests beside each
    other differ in length, so they are cut into smaller pieces.
    """
    programs = _PROGRAMS_PER_PROCESSOR
    if own:
        programs = 2 if requests == 1 else 4
    wanted = -(-programs * processors // (requests * kv_heads))
    return max(1, min(wanted, -(-max_seq_len // (2 * page_tokens)), _MAX_SPLITS))


def workspace_rows(max_requests: int, max_query_len: int, heads: int, kv_heads: int, processors: int) -> int:
    """Rows that a `Workspace` needs so that it serves every batch of up to max_requests with `choose_splits`."""
    return max_query_len * heads * (-(-_PROGRAMS_PER_PROCESSOR * processors // kv_heads) + max_requests)


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
    splits: int = 1,
    workspace: Workspace | None = None,
) -> None:
    """`reference.attention` on a GPU, with the same arguments; writes `out`, which has query's shape.

    max_query_len: the most query tokens of a request; times the heads of a group at most MAX_ROWS. splits: see
    `choose_splits`. workspace: at least tokens * heads * splits rows; allocated for this call if None.
    Raises ValueError where the workspace or a tile is too small.
    """
    tokens, heads, head_dim = query.shape
    requests, kv_heads = seq_lens.numel(), pages.shape[1]
    group = heads // kv_heads
    if max_query_len > 1 and max_query_len * group > MAX_ROWS:
        raise ValueError(f"{max_query_len} query tokens x {group} heads exceed the decode kernel's {MAX_ROWS} rows")
    if workspace is None:
        workspace = Workspace.allocate(tokens * heads * splits, head_dim, query.device)
    elif workspace.top.numel() < tokens * heads * splits:
        raise ValueError(f"workspace of {workspace.top.numel()} rows, {tokens * heads * splits} needed")
    block_d = triton.next_power_of_2(head_dim)
    partial = workspace.out, workspace.top, workspace.total
    own = choose_kernel(query.device, layout) if turns is None else None
    if own is not None:
        where = block_table, seq_lens, query_start_loc
        own.attend(query, pages, layout, *where, scale, window, soft_cap, anchor, v_anchor, max_query_len, splits, partial)
    else:
        fp8 = fp8_path(query.device)
        block_m = max(16, triton.next_power_of_2(max_query_len * group))
        _decode_kernel[(splits, kv_heads, requests)](
            query, *partial, pages.view(torch.int8), pages.view(torch.uint8 if fp8 == "half" else torch.float8_e4m3fn),
            pages.view(torch.float32), block_table, seq_lens, query_start_loc, query if anchor is None else anchor,
            query if v_anchor is None else v_anchor, scale, soft_cap, *turn_arguments(turns, query),
            query.stride(0), query.stride(1), *table_strides(block_table), pages.stride(0), pages.stride(1),
            GROUP=group, WINDOW=window, SOFT_CAP=soft_cap > 0, ANCHOR=anchor is not None,
            V_ANCHOR=v_anchor is not None, HEAD_DIM=head_dim, K_BITS=layout.k_bits, PAGE=layout.tokens,
            BLOCK_D=block_d, BLOCK_M=block_m, FP8=fp8, TURN=turns is not None, num_warps=_WARPS,
            num_stages=pipeline_stages(query.device, block_m, block_d, layout.tokens),
        )  # fmt: skip
    _merge_kernel[(tokens, heads)](
        out, workspace.out, workspace.top, workspace.total, out if sinks is None else sinks, splits,
        out.stride(0), out.stride(1),
        SINKS=sinks is not None, HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_S=_SPLITS_AT_ONCE, MAX_SPLITS=_MAX_SPLITS,
        num_warps=4,
    )  # fmt: skip
