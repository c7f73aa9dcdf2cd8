"""`prefill` for sm_90, in Gluon: the same arithmetic as `tiles.attend_page`, with the hardware's pieces placed by hand.

One warp streams pages into shared memory with the tensor memory accelerator, one prepares their scales, and two warpgroups,
each with 64 query rows, share what they bring: while one is busy with numbers, the other has the tensor cores. A program takes
one tile, of a query block and a KV head, after the other, so that pages of the next are there when one ends.

A softmax has two parts that use different units: logits and their maximum (arithmetic) and exponentials (special functions),
and the second waits for the first. Within a warpgroup the exponentials of one page are therefore computed beside the logits of
the next, in one straight run of instructions. Heads of 256 channels leave no registers for that: a page is finished before the
logits of the next, and P V is added up a quarter of the channels at a time.

What limits it: by the clock, a page costs both warpgroups together 2,440 cycles, in about half of which the tensor cores work,
in half of which the schedulers issue, and in two fifths of which special functions do. Without any exponential it would be 13%
faster, and 10% on end: then an H100 meets its limit of power and runs it at 1,732 of 1,980 MHz, and FlashAttention-3 in BF16 at
1,478 (benchmarks/results/attention-sustained-h100.json).

What was slower:

- P V left running during the softmax, as in FlashAttention-3 (section 3.2), for which registers suffice only with longer sums
  in the 22-bit accumulators, or for half of the channels at a time (-18%; with turns -12%);
- warpgroups that take turns, by barriers in shared memory or by named ones (-4%); three warpgroups, which spill registers;
- pages of 64 tokens;
- accumulators of Q K^T that start as 1.5 * 2**23 and are floating-point numbers without a conversion, but have to be filled;
- a quarter of the exponentials as a polynomial, as in FlashAttention-4, which takes more instructions;
- half or all of the exponentials ahead of the wait for the logits that they are computed beside: carried into the next round,
  which spills registers, or held there by a store that depends on them and never happens (-4%, -7%);
- arrivals of all threads, which need no barrier around them (-2%);
- queries that two more warps quantize ahead of time, which takes these longer than a tile of a short prompt lasts;
- divisions without branches, +3% for prompts of 1,024 tokens, but -2% for long ones; five slots, now +3%, now -2%: the compiler
  lays out the loop anew after every change elsewhere, and nearly the same instructions in another order have cost 3%.

A tile costs as much as four pages more than it has: by the clock, 4,700 cycles from its queries to Q K^T of the first page,
2,100 to its logits, 2,000 for P V of the last page and 1,900 to write out, where a page between takes 2,500. Nor did it help to
bring the next tile's queries ahead of time, into the L2 cache (no gain), or into shared memory or registers (spills).
"""

import functools
from dataclasses import dataclass

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sage_kernels.device import multiprocessors
from sage_kernels.prefill import table_strides
from sage_kernels.tiles import (
    LOG2E,
    TABLE_STRIDES,
    TABLES,
    find_request,
    first_block,
    inverse_or_zero,
    page_reference,
    section_offset,
)
from sage_kernels.widen import widened
from sage_paged import PageLayout, v_token

ROWS = gl.constexpr(64)
"""Query rows of a warpgroup."""
BLOCK_M = 128
"""Query rows of a program: two warpgroups."""


@triton.constexpr_function
def _is_wide(head_dim):
    """Whether registers have no room for the logits of a page beside P V of the page before: pages are finished one after the
    other then, and channels are added up in parts."""
    return head_dim > 128


@triton.constexpr_function
def _channels_at_once(head_dim):
    """Channels of P V that are added up at a time."""
    return 64 if _is_wide(head_dim) else head_dim


@triton.constexpr_function
def _stages(head_dim, page):
    """Slots of shared memory. Slot n % stages holds what is free again at the same time: V of page n with its scales, and K of
    page n + 1. K of a tile's first page has a buffer of its own, behind the slots."""
    room = 207 * 1024 - (BLOCK_M + page) * head_dim  # 20 KiB are what layouts are converted with
    return min(1 << (room // (page * (2 * head_dim + 24))).bit_length() - 1, 8)  # a power of two divides fastest


LOGIT_BIAS = gl.constexpr(1024.0)
"""Added to all base-2 logits, to make the largest of a row positive. In a page where a row has none above -LOGIT_BIAS, which is
-710 as it stands in the exponent of e, its weights are wrong. It leaves logits, and what V's exponents add to them, 13 bits
behind the point; more would leave fewer."""

_FIELDS = gl.constexpr(9)
"""Numbers that say what a tile is."""
_PAGES = gl.constexpr(8)
"""Where among them is that of its pages."""
_v_token = gluon.jit(v_token)


@triton.constexpr_function
def _plain_layout(rank):
    return gl.SwizzledSharedLayout(1, 1, 1, order=list(range(rank - 1, -1, -1)))


@gluon.jit
def plain(buffer, shape: gl.constexpr, dtype: gl.constexpr):
    """A buffer row by row, as it was copied, which is not how its layout would be read."""
    return buffer._reinterpret(dtype, shape, _plain_layout(len(shape)))


# What starts to copy a section of the page that begins `row` times PAGE bytes into the cache, by the `descriptors`.


@gluon.jit
def copy_keys(k_pages, row, buffer, full, HEAD_DIM: gl.constexpr, K_BITS: gl.constexpr, PAGE: gl.constexpr):
    K_ROW: gl.constexpr = HEAD_DIM * K_BITS // 8
    k_row = row * (PAGE // K_ROW) if PAGE >= K_ROW else row // (K_ROW // PAGE)
    tma.async_copy_global_to_shared(k_pages, [k_row, 0], full, buffer)


@gluon.jit
def copy_values(v_pages, row, buffer, full, HEAD_DIM: gl.constexpr, K_BITS: gl.constexpr, PAGE: gl.constexpr):
    V_ROW: gl.constexpr = section_offset("v", HEAD_DIM, K_BITS, PAGE) // PAGE
    tma.async_copy_global_to_shared(v_pages, [row + V_ROW, 0], full, buffer)


@gluon.jit
def copy_scales(scale_rows, row, buffer, full, HEAD_DIM: gl.constexpr, K_BITS: gl.constexpr, PAGE: gl.constexpr):
    SCALE_ROW: gl.constexpr = section_offset("k_scale", HEAD_DIM, K_BITS, PAGE) // PAGE
    tma.async_copy_global_to_shared(scale_rows, [(row + SCALE_ROW) // 4, 0], full, buffer)


@gluon.jit
def _find_tile(
    number, seq_lens, query_start_loc, num_reqs, q_blocks, kv_heads,
    WINDOW: gl.constexpr, HEAD_DIM: gl.constexpr, PAGE: gl.constexpr, BLOCK_Q: gl.constexpr,
):  # fmt: skip
    """What a tile is: its request, the request's first query row, query tokens and length, the query block, the KV head, the
    first page, how many pages every row sees whole, and how many there are: 0 for a block behind the last query.

    Requests follow one another, and in a request KV heads, of which as many are taken at a time as have room in the L2 cache:
    their queries lie side by side in memory. Among these, the longest tiles come first. One head at a time, 16 prompts of 1024
    tokens take a quarter longer; eight at a time, one of 131072 an eighth.
    """
    CACHED: gl.constexpr = (10 << 20) // (2 * HEAD_DIM + 8)  # tokens of a KV head
    last = q_blocks - 1 - number // kv_heads
    request, block = find_request(query_start_loc, last, num_reqs, BLOCK_Q)
    q_start = gl.load(query_start_loc + request)
    q_len = gl.load(query_start_loc + request + 1) - q_start
    seq_len = gl.load(seq_lens + request)
    # Blocks of this request, and tiles before its first.
    end = first_block(query_start_loc, gl.load(query_start_loc), request + 1, BLOCK_Q)
    end = gl.where(request + 1 < num_reqs, end, q_blocks)
    blocks = end - (last - block)
    place = number - (q_blocks - end) * kv_heads
    at_once = gl.minimum(gl.maximum(CACHED // gl.maximum(seq_len, 1), 1), kv_heads)
    first_head = place // (at_once * blocks) * at_once
    heads = gl.minimum(kv_heads - first_head, at_once)
    place -= first_head * blocks
    kv_head = first_head + place % heads
    q_block = blocks - 1 - place // heads
    first_position = seq_len - q_len + q_block * BLOCK_Q
    first_page = 0
    if WINDOW > 0:
        first_page = gl.maximum(first_position - WINDOW + 1, 0) // PAGE
    last_page = (gl.minimum(first_position + BLOCK_Q, seq_len) - 1) // PAGE
    pages = gl.where(q_block * BLOCK_Q < q_len, last_page - first_page + 1, 0)
    full_pages = (first_position + 1) // PAGE if WINDOW == 0 else 0
    return request, q_start, q_len, seq_len, q_block, kv_head, first_page, full_pages, pages


@gluon.jit
def _hand_out(tile, tiles, turn):
    """Give a tile, the turn-th of this program, to the other partitions."""
    places, full, empty = tiles
    fields = gl.arange(0, 16, gl.BlockedLayout([1], [32], [1], [0]))
    packed = gl.zeros_like(fields)
    for k in gl.static_range(_FIELDS):
        packed = gl.where(fields == k, tile[k], packed)
    mbarrier.wait(empty.index(turn % 2), ((turn // 2) & 1) ^ 1)
    places.index(turn % 2).store(packed)
    fence_async_shared()
    mbarrier.arrive(full.index(turn % 2))


@gluon.jit
def _take(tiles, turn, WARPS: gl.constexpr):
    """The turn-th tile of this program, as `_find_tile` has it."""
    EVERYWHERE: gl.constexpr = gl.BlockedLayout([16], [32], [WARPS], [0])
    places, full, _ = tiles
    mbarrier.wait(full.index(turn % 2), (turn // 2) & 1)
    packed = places.index(turn % 2).load(EVERYWHERE)
    fields = gl.arange(0, 16, EVERYWHERE)
    tile = ()
    for k in gl.static_range(_FIELDS):
        tile += (gl.sum(gl.where(fields == k, packed, 0), 0),)  # type: ignore[assignment]
    return tile


@gluon.jit
def _forget(tiles, turn):
    """After this, the turn-th tile cannot be taken again."""
    _, _, empty = tiles
    mbarrier.arrive(empty.index(turn % 2))


@gluon.jit
def _table(tables, tile):
    """Where the request and the KV head of a tile have their list of blocks."""
    block_table, _, _, table_stride, table_head_stride = tables
    request, _, _, _, _, kv_head, _, _, _ = tile
    return block_table + request.to(gl.int64) * table_stride + kv_head * table_head_stride


@gluon.jit
def _stream_tile(
    pages_in, tile, turn, n, buffers, barriers, table, block_rows, head_rows, HEAD_DIM: gl.constexpr, PAGE: gl.constexpr
):
    """Copy the pages of a tile. table: where the tile's request and KV head have their blocks. n: pages before the tile's."""
    STAGES: gl.constexpr = _stages(HEAD_DIM, PAGE)
    _, _, _, _, _, kv_head, first_page, _, pages = tile
    k_pages, v_pages, scale_rows = pages_in
    k_buffers, v_buffers, raw_buffers, _, _ = buffers
    k_full, v_full, _, empty = barriers
    row = gl.load(table + first_page) * block_rows + kv_head * head_rows
    mbarrier.wait(empty.index(STAGES), (turn & 1) ^ 1)
    mbarrier.expect(k_full.index(STAGES), PAGE * HEAD_DIM)
    copy_keys(k_pages, row, k_buffers.index(STAGES), k_full.index(STAGES), HEAD_DIM, 8, PAGE)
    for i in range(pages):
        next_row = gl.load(table + first_page + gl.minimum(i + 1, pages - 1)) * block_rows + kv_head * head_rows
        slot = (n + i) % STAGES
        mbarrier.wait(empty.index(slot), (((n + i) // STAGES) & 1) ^ 1)
        mbarrier.expect(v_full.index(slot), PAGE * (HEAD_DIM + 2 * 4))
        copy_scales(scale_rows, row, raw_buffers.index(slot), v_full.index(slot), HEAD_DIM, 8, PAGE)
        if i + 1 < pages:
            mbarrier.expect(k_full.index(slot), PAGE * HEAD_DIM)
            copy_keys(k_pages, next_row, k_buffers.index(slot), k_full.index(slot), HEAD_DIM, 8, PAGE)
        else:
            mbarrier.arrive(k_full.index(slot))
        copy_values(v_pages, row, v_buffers.index(slot), v_full.index(slot), HEAD_DIM, 8, PAGE)
        row = next_row


@gluon.jit
def _stream_tiles(
    pages_in, buffers, barriers, tiles, counters, tables, num_reqs, q_blocks, kv_heads, block_rows, head_rows,
    WINDOW: gl.constexpr, HEAD_DIM: gl.constexpr, PAGE: gl.constexpr, BLOCK_Q: gl.constexpr,
):  # fmt: skip
    """The producer of tiles and of their pages. A program's first tile is that of its own number, the others are first come,
    first served. Pages are counted in rows of PAGE bytes, of which a page has bytes_per_token."""
    _, query_start_loc, seq_lens, _, _ = tables
    programs = gl.num_programs(0)
    number = gl.program_id(0)
    turn = 0
    n = 0  # pages so far
    while number < q_blocks * kv_heads:
        tile = _find_tile(number, seq_lens, query_start_loc, num_reqs, q_blocks, kv_heads, WINDOW, HEAD_DIM, PAGE, BLOCK_Q)
        pages = tile[_PAGES]
        if pages > 0:
            _hand_out(tile, tiles, turn)
            table = _table(tables, tile)
            _stream_tile(pages_in, tile, turn, n, buffers, barriers, table, block_rows, head_rows, HEAD_DIM, PAGE)
            n += pages
            turn += 1
        number = gl.atomic_add(counters, 1) + programs
    _hand_out((0,) * _FIELDS, tiles, turn)
    if gl.atomic_add(counters + 1, 1) == programs - 1:  # nobody counts any more: leave all as it was
        gl.store(counters, 0)
        gl.store(counters + 1, 0)


@gluon.jit
def _in_v_order(x, COUNT: gl.constexpr, PAGE: gl.constexpr):
    """x [COUNT, PAGE], whose columns are the tokens of a page, with these in the order of V."""
    return x.reshape([COUNT, PAGE // 16, 2, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([COUNT, PAGE])


@gluon.jit
def _prepare_scales(tile, n, buffers, barriers, PAGE: gl.constexpr, STAGES: gl.constexpr):
    """Work out what the softmax needs of a tile's scales, once for both warpgroups. n: pages before the tile's.

    Of each pair of tokens, side by side: both scales of K, and both exponents of V plus LOGIT_BIAS. As the B operand of a
    matrix product: 2**-exponent times 2**-8, which is an e4m3 number, in V's order and in eight equal columns, so that the
    product with P leaves the sum of a row in every thread that holds a part of it. Tokens behind the last one count nothing,
    whatever their scales may be.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([8, PAGE // 32], [1, 32], [1, 1], [1, 0])
    COLUMNS: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    PAIRS: gl.constexpr = gl.BlockedLayout([PAGE // 16], [32], [1], [0])
    _, _, _, seq_len, _, _, first_page, _, pages = tile
    _, _, raw_buffers, scale_buffers, inverse_buffers = buffers
    _, v_full, scales_full, _ = barriers
    tokens = gl.arange(0, PAGE, COLUMNS)
    for i in range(pages):
        slot = (n + i) % STAGES
        mbarrier.wait(v_full.index(slot), ((n + i) // STAGES) & 1)
        raw = plain(raw_buffers.index(slot), [2 * PAGE], gl.float32)
        k_scale = raw.slice(0, PAGE).load(COLUMNS)
        exponent = raw.slice(PAGE, PAGE).load(COLUMNS)
        in_pairs = gl.join(k_scale, exponent + LOGIT_BIAS).reshape([PAGE // 2, 2, 2]).permute([0, 2, 1]).reshape([2 * PAGE])
        scale_buffers.index(slot).store(gl.convert_layout(in_pairs, PAIRS))
        filled = tokens < seq_len - (first_page + i) * PAGE
        inverse = gl.where(filled, gl.exp2(-8.0 - exponent), 0.0)
        inverse = gl.convert_layout(_in_v_order(inverse[None, :], 1, PAGE), LAYOUT)
        inverses = gl.zeros([8, PAGE], gl.float32, LAYOUT) + inverse
        inverse_buffers.index(slot).store(inverses.to(gl.float8e4nv))
        fence_async_shared()
        mbarrier.arrive(scales_full.index(slot))


@gluon.jit
def _prepare_tiles(buffers, barriers, tiles, PAGE: gl.constexpr, STAGES: gl.constexpr):
    """The producer of scales."""
    turn = 0
    n = 0  # pages so far
    tile = _take(tiles, 0, 1)
    while tile[_PAGES] > 0:
        _prepare_scales(tile, n, buffers, barriers, PAGE, STAGES)
        _forget(tiles, turn)
        n += tile[_PAGES]
        turn += 1
        tile = _take(tiles, turn, 1)


@gluon.jit
def _start_product(q, buffers, barriers, slot, parity, PAGE: gl.constexpr, S_LAYOUT: gl.constexpr):
    """Start Q K^T of the page whose K is in a slot, int32 [ROWS, PAGE]."""
    k_buffers, _, _, _, _ = buffers
    k_full, _, _, _ = barriers
    mbarrier.wait(k_full.index(slot), parity)
    k = k_buffers.index(slot).permute((1, 0))
    return warpgroup_mma(q, k, gl.zeros([ROWS, PAGE], gl.int32, S_LAYOUT), use_acc=False, is_async=True)


@gluon.jit
def _start_next(q, buffers, barriers, n, HEAD_DIM: gl.constexpr, PAGE: gl.constexpr, S_LAYOUT: gl.constexpr):
    """Start Q K^T of the page behind page n; where a tile has none, of whatever is in the slot, which nobody looks at."""
    STAGES: gl.constexpr = _stages(HEAD_DIM, PAGE)
    return _start_product(q, buffers, barriers, n % STAGES, (n // STAGES) & 1, PAGE, S_LAYOUT)


@gluon.jit
def _halves(x, COLUMNS: gl.constexpr):
    """The even and the odd groups of eight columns of x, which are what four threads hold of one tile."""
    even, odd = gl.split(x.reshape([ROWS, COLUMNS // 16, 2, 8]).permute([0, 1, 3, 2]))
    return even.reshape([ROWS, COLUMNS // 2]), odd.reshape([ROWS, COLUMNS // 2])


@gluon.jit
def _row_max(logits, PAGE: gl.constexpr, S_LAYOUT: gl.constexpr):
    """Maxima of rows, float32 [ROWS], if they are positive: then they are the largest integers as well, of which one
    instruction compares three. A thread compares many at a time, for one after the other each would wait for the last."""
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
    """From Q K^T of page n, whose scales are there, to base-2 logits plus LOGIT_BIAS and V's exponent, and the largest of each
    row."""
    STAGES: gl.constexpr = _stages(HEAD_DIM, PAGE)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    # Of 16 numbers, which are 8 columns, each of four threads has the four of its two columns.
    OWN: gl.constexpr = [[1], [2], [16], [32], [64], [128]] if PAGE == 128 else [[1], [2], [16], [32], [64]]
    PAIRS: gl.constexpr = gl.DistributedLinearLayout(OWN, [[4], [8], [0], [0], [0]], [[0], [0]], [], [2 * PAGE])
    _, _, _, scale_buffers, _ = buffers
    in_pairs = scale_buffers.index(n % STAGES).load(PAIRS).reshape([PAGE // 2, 2, 2]).permute([0, 2, 1])
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
def _finite(base, MASKED: gl.constexpr):
    """What logits are compared with. A masked row that has seen nothing yet has none; any finite one keeps inf - inf out."""
    if MASKED:
        base = gl.where(base == float("-inf"), 0.0, base)
    return base


@gluon.jit
def _weights(logits, base, PAGE: gl.constexpr, MASKED: gl.constexpr, P_LAYOUT: gl.constexpr):
    """P as the first operand of P V, in V's order, which leaves every number in its thread.

    Conversions are written out, for the compiler's come before the change of order and cost it another instruction for four.
    """
    p = _in_v_order(gl.exp2(logits - _finite(base, MASKED)[:, None]), ROWS, PAGE)
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
def _add_page(
    p, acc, total, decay, buffers, barriers, n,
    HEAD_DIM: gl.constexpr, PAGE: gl.constexpr, O_LAYOUT: gl.constexpr, T_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Add P V of page n, whose V is there, and its sums of P to those of the pages before it, times decay. acc: a tuple, a
    tensor for each part of the channels. Frees the slot, if the head is not wide: else K in it is still to be read."""
    STAGES: gl.constexpr = _stages(HEAD_DIM, PAGE)
    PART: gl.constexpr = _channels_at_once(HEAD_DIM)
    _, v_buffers, _, _, inverse_buffers = buffers
    _, _, _, empty = barriers
    slot = n % STAGES
    v = v_buffers.index(slot)
    of_acc = gl.convert_layout(decay, gl.SliceLayout(1, O_LAYOUT))[:, None]
    row_sum = gl.zeros([ROWS, 8], gl.float32, T_LAYOUT)
    added = ()
    for part in gl.static_range(HEAD_DIM // PART):
        # FP8 tensor cores accumulate in 22 bits: every page gets a fresh accumulator (SageAttention2, section 3.4).
        pv = gl.zeros([ROWS, PART], gl.float32, O_LAYOUT)
        pv = warpgroup_mma(p, v.slice(part * PART, PART).permute((1, 0)), pv, use_acc=False, is_async=True)
        if part == 0:
            row_sum = warpgroup_mma(p, inverse_buffers.index(slot).permute((1, 0)), row_sum, use_acc=False, is_async=True)
        pv, row_sum = warpgroup_mma_wait(0, deps=[pv, row_sum])
        if not _is_wide(HEAD_DIM):
            mbarrier.arrive(empty.index(slot))
        added += (acc[part] * of_acc + pv,)  # type: ignore[assignment]
    total = total * gl.convert_layout(decay, gl.SliceLayout(1, T_LAYOUT))[:, None] + row_sum
    return added, total


@gluon.jit
def _attend(
    q, q_scale, q_bias, state, buffers, barriers, n, first_visible, last_visible, soft_cap,
    HEAD_DIM: gl.constexpr, PAGE: gl.constexpr, MASKED: gl.constexpr, SOFT_CAP: gl.constexpr,
    S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr, T_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Finish page n and begin page n + 1, of which first_visible and last_visible are.

    state: the started codes of page n + 1, unless the head is wide; logits of page n; base and top, see `page_reference`; and
    decay, which takes acc and total, sums over the pages before page n, to that base. Returns the state of page n + 1.
    """
    STAGES: gl.constexpr = _stages(HEAD_DIM, PAGE)
    started, logits, base, top, decay, acc, total = state
    _, v_full, scales_full, empty = barriers
    if _is_wide(HEAD_DIM):
        p = _weights(logits, base, PAGE, MASKED, P_LAYOUT)
        mbarrier.wait(v_full.index(n % STAGES), (n // STAGES) & 1)
        acc, total = _add_page(p, acc, total, decay, buffers, barriers, n, HEAD_DIM, PAGE, O_LAYOUT, T_LAYOUT)
        codes = _start_next(q, buffers, barriers, n, HEAD_DIM, PAGE, S_LAYOUT)
        mbarrier.wait(scales_full.index((n + 1) % STAGES), ((n + 1) // STAGES) & 1)
        codes = warpgroup_mma_wait(0, deps=[codes])
        mbarrier.arrive(empty.index(n % STAGES))
        logits, highest = _logits(
            codes, q_scale, q_bias, buffers, n + 1, first_visible, last_visible, soft_cap,
            HEAD_DIM, PAGE, MASKED, SOFT_CAP, S_LAYOUT,
        )  # fmt: skip
    else:
        mbarrier.wait(scales_full.index((n + 1) % STAGES), ((n + 1) // STAGES) & 1)
        # From here to the wait for V there is no branch, so that the compiler can mix the two.
        p = _weights(logits, base, PAGE, MASKED, P_LAYOUT)
        codes = warpgroup_mma_wait(0, deps=[started[0]])
        logits, highest = _logits(
            codes, q_scale, q_bias, buffers, n + 1, first_visible, last_visible, soft_cap,
            HEAD_DIM, PAGE, MASKED, SOFT_CAP, S_LAYOUT,
        )  # fmt: skip
        mbarrier.wait(v_full.index(n % STAGES), (n // STAGES) & 1)
        acc, total = _add_page(p, acc, total, decay, buffers, barriers, n, HEAD_DIM, PAGE, O_LAYOUT, T_LAYOUT)
        started = (_start_next(q, buffers, barriers, n + 1, HEAD_DIM, PAGE, S_LAYOUT),)
    new_base, top = page_reference(highest, top, base, MASKED)
    decay = gl.exp2(base - _finite(new_base, MASKED))
    return started, logits, new_base, top, decay, acc, total


@gluon.jit
def _query_rows(tile, GROUP: gl.constexpr, BLOCK_Q: gl.constexpr, WARPGROUP: gl.constexpr, LAYOUT: gl.constexpr):
    """Of a warpgroup's query rows: their tokens (int64), their heads, and whether there are such."""
    _, q_start, q_len, _, q_block, kv_head, _, _, _ = tile
    rows = WARPGROUP * ROWS + gl.arange(0, ROWS, LAYOUT)
    local = q_block * BLOCK_Q + rows // GROUP
    valid = (rows < BLOCK_Q * GROUP) & (local < q_len)
    return (q_start + local).to(gl.int64), kv_head * GROUP + rows % GROUP, valid


@triton.constexpr_function
def _q_layout(head_dim):
    return gl.BlockedLayout([1, 8], [256 // head_dim, head_dim // 8], [4, 1], [1, 0])


@gluon.jit
def _load_query(
    query, strides, tile, WARPGROUP: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_Q: gl.constexpr
):
    """A warpgroup's query rows of a tile, [ROWS, HEAD_DIM], 0 where there are none."""
    LAYOUT: gl.constexpr = _q_layout(HEAD_DIM)
    q_token_stride, q_head_stride, _, _ = strides
    tokens, heads, valid = _query_rows(tile, GROUP, BLOCK_Q, WARPGROUP, gl.SliceLayout(1, LAYOUT))
    offsets = tokens * q_token_stride + heads * q_head_stride
    channels = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, LAYOUT))
    return gl.load(query + offsets[:, None] + channels[None, :], mask=valid[:, None], other=0.0)


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
    q, tensors, tile, turn, n, buffers, barriers, q_codes, scale, soft_cap,
    WARPGROUP: gl.constexpr, GROUP: gl.constexpr, WINDOW: gl.constexpr, SOFT_CAP: gl.constexpr,
    ANCHOR: gl.constexpr, HEAD_DIM: gl.constexpr, PAGE: gl.constexpr, BLOCK_Q: gl.constexpr,
):  # fmt: skip
    """Quantize q, a warpgroup's query rows of a tile, and take them through all its pages. q_codes: where their codes go.
    n: pages before the tile's. Returns acc, total and base after the last page, and q_bias."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PAGE, 32])
    STAGES: gl.constexpr = _stages(HEAD_DIM, PAGE)
    PART: gl.constexpr = _channels_at_once(HEAD_DIM)
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 32])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, k_width=4)
    T_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 32])
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)

    _, _, _, anchor, _ = tensors
    _, _, q_len, seq_len, q_block, kv_head, first_page, full_pages, pages = tile
    _, v_buffers, _, _, _ = buffers
    _, v_full, scales_full, empty = barriers
    q = q.to(gl.float32)
    amax = gl.max(gl.abs(q), 1)
    q_codes.store(_codes(q, inverse_or_zero(amax, 127.0)[:, None]))
    fence_async_shared()
    codes = _start_product(q_codes, buffers, barriers, STAGES, turn & 1, PAGE, S_LAYOUT)
    q_scale = gl.convert_layout(amax * (scale * LOG2E / 127.0), S_ROWS)
    q_bias = gl.zeros_like(q_scale)
    if ANCHOR:
        channels = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, _q_layout(HEAD_DIM)))
        product = gl.sum(q * gl.load(anchor + kv_head * HEAD_DIM + channels)[None, :], 1)
        q_bias = gl.convert_layout(product * (scale * LOG2E), S_ROWS)

    # Tokens are counted from the first page of the stream on. The first and the last page are masked, whatever they are.
    position = seq_len - q_len + q_block * BLOCK_Q + (WARPGROUP * ROWS + gl.arange(0, ROWS, S_ROWS)) // GROUP
    position -= first_page * PAGE
    last = pages - 1
    first_visible = position - WINDOW + 1 if WINDOW > 0 else gl.zeros_like(position)
    mbarrier.wait(scales_full.index(n % STAGES), (n // STAGES) & 1)
    codes = warpgroup_mma_wait(0, deps=[codes])
    mbarrier.arrive(empty.index(STAGES))
    logits, highest = _logits(
        codes, q_scale, q_bias, buffers, n, first_visible, position, soft_cap,
        HEAD_DIM, PAGE, True, SOFT_CAP, S_LAYOUT,
    )  # fmt: skip
    started = ()
    if not _is_wide(HEAD_DIM):
        codes = _start_next(q_codes, buffers, barriers, n, HEAD_DIM, PAGE, S_LAYOUT)
        started = (codes,)  # type: ignore[assignment]
    acc = ()
    for _ in gl.static_range(HEAD_DIM // PART):
        acc += (gl.zeros([ROWS, PART], gl.float32, O_LAYOUT),)  # type: ignore[assignment]
    total = gl.zeros([ROWS, 8], gl.float32, T_LAYOUT)  # eight equal columns, 2**-8 times the sum of P
    nothing = gl.full([ROWS], float("-inf"), gl.float32, S_ROWS)
    base, top = page_reference(highest, nothing, nothing, True)
    state = (started, logits, base, top, gl.zeros_like(base), acc, total)
    unmasked = gl.minimum(gl.maximum(full_pages - 1, 0), last)
    for i in range(unmasked):
        state = _attend(
            q_codes, q_scale, q_bias, state, buffers, barriers, n + i, position, position, soft_cap,
            HEAD_DIM, PAGE, False, SOFT_CAP, S_LAYOUT, O_LAYOUT, P_LAYOUT, T_LAYOUT,
        )  # fmt: skip
    for i in range(unmasked, last):
        last_visible = position - (i + 1) * PAGE
        first_visible = last_visible - WINDOW + 1 if WINDOW > 0 else gl.zeros_like(last_visible)
        state = _attend(
            q_codes, q_scale, q_bias, state, buffers, barriers, n + i, first_visible, last_visible, soft_cap,
            HEAD_DIM, PAGE, True, SOFT_CAP, S_LAYOUT, O_LAYOUT, P_LAYOUT, T_LAYOUT,
        )  # fmt: skip
    started, logits, base, top, decay, acc, total = state
    if not _is_wide(HEAD_DIM):
        warpgroup_mma_wait(0, deps=[started[0]])  # type: ignore[misc]
    p = _weights(logits, base, PAGE, True, P_LAYOUT)
    n += last
    mbarrier.wait(v_full.index(n % STAGES), (n // STAGES) & 1)
    length = seq_len - (first_page + last) * PAGE
    if length < PAGE:  # codes behind the last token may be a NaN of an earlier owner's
        V_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 16], [32 * 16 // PAGE, PAGE // 16], [4, 1], [1, 0])
        v = v_buffers.index(n % STAGES)
        filled = _v_token(gl.arange(0, PAGE, gl.SliceLayout(0, V_LAYOUT))) < length
        bits = v.load(V_LAYOUT).to(gl.uint8, bitcast=True)
        v.store(gl.where(filled[None, :], bits, 0).to(gl.uint8).to(gl.float8e4nv, bitcast=True))
        fence_async_shared()
    acc, total = _add_page(p, acc, total, decay, buffers, barriers, n, HEAD_DIM, PAGE, O_LAYOUT, T_LAYOUT)
    if _is_wide(HEAD_DIM):
        mbarrier.arrive(empty.index(n % STAGES))
    return acc, gl.convert_layout(gl.max(total, 1), S_ROWS) * 256.0, base, q_bias


@gluon.jit
def _write_out(
    acc, total, base, q_bias, tensors, strides, tile,
    WARPGROUP: gl.constexpr, GROUP: gl.constexpr, SOFT_CAP: gl.constexpr, SINKS: gl.constexpr, V_ANCHOR: gl.constexpr,
    HEAD_DIM: gl.constexpr, BLOCK_Q: gl.constexpr,
):  # fmt: skip
    """Write a warpgroup's rows of a tile, of which `_attend_tile` has returned the first four arguments."""
    PART: gl.constexpr = _channels_at_once(HEAD_DIM)
    O_LAYOUT: gl.constexpr = acc[0].type.layout
    S_ROWS: gl.constexpr = total.type.layout
    _, out, sinks, _, v_anchor = tensors
    _, _, out_token_stride, out_head_stride = strides
    _, _, _, _, _, kv_head, _, _, _ = tile
    weight = gl.convert_layout(total, gl.SliceLayout(1, O_LAYOUT))[:, None]  # of what all values lack: a sink has no value
    if SINKS:
        base -= LOGIT_BIAS
        if not SOFT_CAP:  # sinks are compared with whole logits, which under a cap they are already
            base += q_bias
        head = kv_head * GROUP + (WARPGROUP * ROWS + gl.arange(0, ROWS, S_ROWS)) % GROUP
        total += gl.exp2(gl.load(sinks + head).to(gl.float32) * LOG2E - base)
    total = gl.where(total > 0.0, total, 1.0)  # 0 where all logits are below -LOGIT_BIAS
    inverse = gl.convert_layout(1.0 / total, gl.SliceLayout(1, O_LAYOUT))[:, None]
    OUT_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // PART, PART // 8], [4, 1], [1, 0])
    tokens, heads, valid = _query_rows(tile, GROUP, BLOCK_Q, WARPGROUP, gl.SliceLayout(1, OUT_LAYOUT))
    offsets = tokens * out_token_stride + heads * out_head_stride
    for part in gl.static_range(HEAD_DIM // PART):
        result = acc[part]
        if V_ANCHOR:
            lacking = v_anchor + kv_head * HEAD_DIM + part * PART + gl.arange(0, PART, gl.SliceLayout(0, O_LAYOUT))
            result += weight * gl.load(lacking)[None, :]
        result = gl.convert_layout((result * inverse).to(out.dtype.element_ty), OUT_LAYOUT)
        channels = part * PART + gl.arange(0, PART, gl.SliceLayout(0, OUT_LAYOUT))
        gl.store(out + offsets[:, None] + channels[None, :], result, mask=valid[:, None])


@gluon.jit
def _attend_tiles(
    tensors, strides, buffers, barriers, tiles, q_buffers, scale, soft_cap,
    WARPGROUP: gl.constexpr, GROUP: gl.constexpr, WINDOW: gl.constexpr, SOFT_CAP: gl.constexpr, SINKS: gl.constexpr,
    ANCHOR: gl.constexpr, V_ANCHOR: gl.constexpr, HEAD_DIM: gl.constexpr, PAGE: gl.constexpr, BLOCK_Q: gl.constexpr,
):  # fmt: skip
    """A warpgroup."""
    turn = 0
    n = 0  # pages so far
    tile = _take(tiles, 0, 4)
    while tile[_PAGES] > 0:
        q = _load_query(tensors[0], strides, tile, WARPGROUP, GROUP, HEAD_DIM, BLOCK_Q)
        acc, total, base, q_bias = _attend_tile(
            q, tensors, tile, turn, n, buffers, barriers, q_buffers.index(WARPGROUP), scale, soft_cap,
            WARPGROUP, GROUP, WINDOW, SOFT_CAP, ANCHOR, HEAD_DIM, PAGE, BLOCK_Q,
        )  # fmt: skip
        _write_out(
            acc, total, base, q_bias, tensors, strides, tile, WARPGROUP, GROUP, SOFT_CAP, SINKS, V_ANCHOR, HEAD_DIM, BLOCK_Q
        )
        _forget(tiles, turn)
        n += tile[_PAGES]
        turn += 1
        tile = _take(tiles, turn, 4)


@gluon.jit(do_not_specialize=["num_reqs", "q_blocks", "kv_heads", *TABLE_STRIDES], do_not_specialize_on_alignment=TABLES)
def _prefill_kernel(
    query, out, k_pages, v_pages, scale_rows, block_table, seq_lens, query_start_loc, sinks, anchor, v_anchor, counters,
    scale, soft_cap, num_reqs, q_blocks, kv_heads,
    q_token_stride, q_head_stride, out_token_stride, out_head_stride, table_stride, table_head_stride, block_rows,
    head_rows,
    GROUP: gl.constexpr, WINDOW: gl.constexpr, SOFT_CAP: gl.constexpr, SINKS: gl.constexpr, ANCHOR: gl.constexpr,
    V_ANCHOR: gl.constexpr, HEAD_DIM: gl.constexpr, PAGE: gl.constexpr, BLOCK_Q: gl.constexpr,
):  # fmt: skip
    """Grid: as many programs as run at a time. Each takes one tile, of a query block and a KV head, after the other."""
    STAGES: gl.constexpr = _stages(HEAD_DIM, PAGE)
    k_buffers = gl.allocate_shared_memory(gl.int8, [STAGES + 1, PAGE, HEAD_DIM], k_pages.layout)
    v_buffers = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, HEAD_DIM, PAGE], v_pages.layout)
    PLAIN: gl.constexpr = _plain_layout(1)
    raw_buffers = gl.allocate_shared_memory(gl.float32, [STAGES, 2, PAGE], scale_rows.layout)
    scale_buffers = gl.allocate_shared_memory(gl.float32, [STAGES, 2 * PAGE], PLAIN)
    INVERSES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([8, PAGE], gl.float8e4nv)
    inverse_buffers = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 8, PAGE], INVERSES)
    q_buffers = gl.allocate_shared_memory(gl.int8, [2, ROWS, HEAD_DIM], k_pages.layout)
    tile_places = gl.allocate_shared_memory(gl.int32, [2, 16], PLAIN)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    scales_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
    tile_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    tile_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(scales_full.index(i), count=1)
    for i in gl.static_range(STAGES + 1):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(tile_full.index(i), count=1)
        mbarrier.init(tile_empty.index(i), count=3)

    buffers = (k_buffers, v_buffers, raw_buffers, scale_buffers, inverse_buffers)
    barriers = (k_full, v_full, scales_full, empty)
    tiles = (tile_places, tile_full, tile_empty)
    pages_in = (k_pages, v_pages, scale_rows)
    tensors = (query, out, sinks, anchor, v_anchor)
    strides = (q_token_stride, q_head_stride, out_token_stride, out_head_stride)
    tables = (block_table, query_start_loc, seq_lens, table_stride, table_head_stride)
    gl.warp_specialize(
        [
            (_attend_tiles, (
                tensors, strides, buffers, barriers, tiles, q_buffers, scale, soft_cap,
                0, GROUP, WINDOW, SOFT_CAP, SINKS, ANCHOR, V_ANCHOR, HEAD_DIM, PAGE, BLOCK_Q,
            )),
            (_attend_tiles, (
                tensors, strides, buffers, barriers, tiles, q_buffers, scale, soft_cap,
                1, GROUP, WINDOW, SOFT_CAP, SINKS, ANCHOR, V_ANCHOR, HEAD_DIM, PAGE, BLOCK_Q,
            )),
            (_stream_tiles, (
                pages_in, buffers, barriers, tiles, counters, tables, num_reqs, q_blocks, kv_heads, block_rows, head_rows,
                WINDOW, HEAD_DIM, PAGE, BLOCK_Q,
            )),
            (_prepare_tiles, (buffers, barriers, tiles, PAGE, STAGES)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )  # fmt: skip


def supports(layout: PageLayout, group: int) -> bool:
    """Whether there is a kernel for pages of this layout and `group` query heads a KV head."""
    return layout.head_dim in (64, 128, 256) and group <= BLOCK_M


def descriptors(pages: torch.Tensor, layout: PageLayout) -> tuple[TensorDescriptor, ...]:
    """What the copy engine needs to know of a cache, uint8 [blocks, kv_heads, page_bytes], to copy a page's keys, values,
    groups of INT4 keys, and scales. The last two arrive as they lie in memory. Raises ValueError where pages begin at addresses
    that it cannot copy from."""
    return _descriptors(pages.data_ptr(), pages.shape[0], pages.stride(0), pages.stride(1), layout)


@functools.lru_cache(maxsize=1024)
def _descriptors(
    data: int, blocks: int, block_stride: int, head_stride: int, layout: PageLayout
) -> tuple[TensorDescriptor, ...]:
    page = layout.tokens
    if block_stride % (4 * page) or head_stride % (4 * page):
        raise ValueError(
            f"pages are {block_stride} and {head_stride} bytes apart, by blocks and by KV heads; on sm_90 both must be "
            f"multiples of {4 * page}"
        )

    def descriptor(dtype: torch.dtype, gl_dtype: gl.dtype, block: list[int], tiled: bool = True) -> TensorDescriptor:
        shape = [blocks * block_stride // (block[1] * dtype.itemsize), block[1]]
        plain = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=8 * dtype.itemsize, rank=2)
        placed = gl.NVMMASharedLayout.get_default_for(block, gl_dtype) if tiled else plain
        return TensorDescriptor(_Address(data, dtype), shape, [block[1], 1], block, placed)

    return (
        descriptor(torch.int8, gl.int8, [page, layout.k_row_bytes]),
        descriptor(torch.float8_e4m3fn, gl.float8e4nv, [layout.head_dim, page]),
        descriptor(torch.int8, gl.int8, [max(1, 2 * layout.k_groups), page], tiled=False),
        descriptor(torch.float32, gl.float32, [2 if layout.k_bits == 8 else 1, page], tiled=False),
    )


@dataclass(frozen=True)
class _Address:
    """A tensor as far as a descriptor looks at it; a real one would keep a freed cache alive."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


@functools.cache
def _zeros(device: torch.device, stream: int) -> torch.Tensor:
    return torch.zeros(2, dtype=torch.int32, device=device)


def _counters(device: torch.device) -> torch.Tensor:
    """What programs of a launch count tiles and themselves with, from 0 on: int32 [2]. They leave it as it was, so that the
    launches of a stream can share one."""
    if device.type != "cuda":
        return _zeros(device, 0)
    if torch.cuda.is_current_stream_capturing():  # graphs may be replayed in any stream
        return torch.zeros(2, dtype=torch.int32, device=device)
    return _zeros(device, torch.cuda.current_stream(device).cuda_stream)


SCRATCH = 512 << 20
"""Bytes of INT8 pages that INT4 ones are widened to at a time; one KV head of one request may take more."""


def _part(count: int, most: int) -> int:
    """The size of the parts, at most `most` if that is 1 or more, that `count` falls into as evenly as can be."""
    return -(-count // -(-count // max(1, most)))


def prefill(
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
    max_seq_len: int | None = None,
) -> None:
    """`reference.attention` with the same arguments, where `supports` holds; writes `out`, which has query's shape.

    max_seq_len: the most tokens of a request, as many as fit into block_table if None.
    """
    if layout.k_bits == 4:
        requests, kv_heads, group = seq_lens.numel(), pages.shape[1], query.shape[1] // pages.shape[1]
        longest = min(max_seq_len or 1 << 31, block_table.shape[-1] * layout.tokens)
        context_bytes = -(-longest // layout.tokens) * PageLayout(layout.head_dim, 8, layout.tokens).page_bytes
        rooms = max(1, SCRATCH // context_bytes)  # contexts of one head that there is room for
        # In equal parts: a small last one would leave most of the processors without work for as long as a large one takes.
        heads_at_once = _part(kv_heads, rooms // requests)
        requests_at_once = _part(requests, rooms // heads_at_once)
        for head in range(0, kv_heads, heads_at_once):
            kv, own = slice(head, head + heads_at_once), slice(head * group, (head + heads_at_once) * group)
            for request in range(0, requests, requests_at_once):
                end = request + requests_at_once
                table, lengths = block_table[request:end], seq_lens[request:end]
                table, starts = table[:, kv] if table.dim() == 3 else table, query_start_loc[request : end + 1]
                prefill(
                    query[:, own], *widened(pages[:, kv], layout, table, lengths, starts, longest, window), lengths,
                    starts, scale, out[:, own], window, soft_cap,
                    None if sinks is None else sinks[own], None if anchor is None else anchor[kv],
                    None if v_anchor is None else v_anchor[kv],
                )  # fmt: skip
        return
    num_reqs = seq_lens.numel()
    tokens, heads, head_dim = query.shape
    group = heads // pages.shape[1]
    q_blocks = tokens // (BLOCK_M // group) + num_reqs
    block_rows, head_rows = pages.stride(0) // layout.tokens, pages.stride(1) // layout.tokens
    k_pages, v_pages, _, scale_rows = descriptors(pages, layout)
    programs = min(q_blocks * pages.shape[1], multiprocessors(query.device))
    _prefill_kernel[(programs,)](
        query, out, k_pages, v_pages, scale_rows, block_table, seq_lens, query_start_loc,
        query if sinks is None else sinks, query if anchor is None else anchor,
        query if v_anchor is None else v_anchor, _counters(query.device), scale, soft_cap, num_reqs, q_blocks,
        pages.shape[1],
        query.stride(0), query.stride(1), out.stride(0), out.stride(1), *table_strides(block_table), block_rows,
        head_rows,
        GROUP=group, WINDOW=window, SOFT_CAP=soft_cap > 0, SINKS=sinks is not None, ANCHOR=anchor is not None,
        V_ANCHOR=v_anchor is not None, HEAD_DIM=head_dim, PAGE=layout.tokens, BLOCK_Q=BLOCK_M // group, num_warps=4,
    )  # fmt: skip
