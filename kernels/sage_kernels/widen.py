"""Pages of INT4 keys as pages of INT8 keys: the same codes, scales and values, for kernels that read nothing else.

INT4 keys stand for INT8 codes (`reference.widen`), so attention to either kind of page gives the same, bit for bit. A prompt
reads each page of its history once for every 128 rows of queries; widening it once before costs a part of that.
"""

import torch
import triton
import triton.language as tl

from sage_kernels.prefill import table_strides
from sage_kernels.tiles import GROUP_BYTES, TABLE_STRIDES, TABLES, section_offset, v_exponent_beside
from sage_paged import PageLayout


@triton.jit(do_not_specialize=["pages", *TABLE_STRIDES], do_not_specialize_on_alignment=TABLES)
def _widen_kernel(
    narrow_i8, narrow_i32, wide_i32, block_table, seq_lens, query_start_loc, pages,
    table_stride, table_head_stride, block_stride, head_stride,
    HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, WIDE_BYTES: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Grid: (pages, KV heads, requests)."""
    K_ROW: tl.constexpr = HEAD_DIM // 2
    GROUPS: tl.constexpr = K_ROW // GROUP_BYTES
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
    # Four bytes at a time: with 128 added to bases, no byte of base + step * nibble leaves its place.
    tokens = tl.arange(0, PAGE)
    groups = tl.arange(0, GROUPS)
    in_group = groups[None, :, None] * (GROUP_BYTES // 4) + tl.arange(0, GROUP_BYTES // 4)[None, None, :]
    packed = tl.load(narrow_i32 + source // 4 + tokens[:, None, None] * (K_ROW // 4) + in_group)
    steps = narrow_i8 + source + section_offset("k_groups", HEAD_DIM, 4, PAGE) + tokens[:, None] * 2 * GROUPS + groups[None, :]
    step = tl.load(steps).to(tl.int32)[:, :, None]
    base = ((tl.load(steps + GROUPS).to(tl.int32) + 128) * 0x01010101)[:, :, None]
    k = wide_i32 + target // 4 + tokens[:, None, None] * (HEAD_DIM // 4) + in_group
    tl.store(k, ((packed & 0x0F0F0F0F) * step + base) ^ -0x7F7F7F80)
    tl.store(k + K_ROW // 4, (((packed >> 4) & 0x0F0F0F0F) * step + base) ^ -0x7F7F7F80)
    words = tl.arange(0, PAGE * HEAD_DIM // 4)
    v = tl.load(narrow_i32 + (source + section_offset("v", HEAD_DIM, 4, PAGE)) // 4 + words)
    tl.store(wide_i32 + (target + section_offset("v", HEAD_DIM, 8, PAGE)) // 4 + words, v)
    k_scale = tl.load(narrow_i32 + (source + section_offset("k_scale", HEAD_DIM, 4, PAGE)) // 4 + tokens)
    tl.store(wide_i32 + (target + section_offset("k_scale", HEAD_DIM, 8, PAGE)) // 4 + tokens, k_scale)
    v_exponent = wide_i32 + (target + section_offset("v_exponent", HEAD_DIM, 8, PAGE)) // 4 + tokens
    tl.store(v_exponent, v_exponent_beside(k_scale).to(tl.int32, bitcast=True))


def widened(
    pages: torch.Tensor,
    layout: PageLayout,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    max_seq_len: int,
    window: int = 0,
) -> tuple[torch.Tensor, PageLayout, torch.Tensor]:
    """The pages of requests of at most max_seq_len tokens, their layout, and the block table that leads to them. Pages that
    none of a request's queries sees through the window are left out; what stands in their place may be anything.

    The other arguments are those of `reference.attention`; head_dim has to be a power of two.
    """
    requests, kv_heads = seq_lens.numel(), pages.shape[1]
    used = min(-(-max_seq_len // layout.tokens), block_table.shape[-1])
    wide_layout = PageLayout(layout.head_dim, 8, layout.tokens)
    wide = torch.empty(requests * used, kv_heads, wide_layout.page_bytes, dtype=torch.uint8, device=pages.device)
    _widen_kernel[(used, kv_heads, requests)](
        pages.view(torch.int8), pages.view(torch.int32), wide.view(torch.int32), block_table, seq_lens, query_start_loc,
        used, *table_strides(block_table), pages.stride(0), pages.stride(1),
        HEAD_DIM=layout.head_dim, PAGE=layout.tokens, WIDE_BYTES=wide_layout.page_bytes, WINDOW=window, num_warps=4,
    )  # fmt: skip
    table = torch.arange(requests * used, dtype=torch.int32, device=pages.device).view(requests, used)
    return wide, wide_layout, table
