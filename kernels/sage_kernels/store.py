"""Quantize new keys and values and write them into their pages, in one launch."""

import torch
import triton
import triton.language as tl

from sage_kernels.device import dependent_launch, fp8_path
from sage_kernels.reference import ANCHOR_TOKENS
from sage_kernels.tiles import (
    GROUP_BYTES,
    V_SCALE_MAX,
    V_SCALE_MIN,
    await_kernel_before,
    inverse_or_zero,
    next_power_of_two,
    section_offset,
    to_e4m3_bits,
    to_int,
    to_whole,
    v_position,
    v_token,
)
from sage_paged import PageLayout

BLOCK_TOKENS = 32


@triton.jit
def _quantize_v(
    value, v_anchor, tokens, used, token_stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, FP8: tl.constexpr, V_ANCHOR: tl.constexpr,
):  # fmt: skip
    """e4m3 codes (as int8 [tokens, channels]) and scales (float32 [tokens]) of the values of some tokens."""
    channels = tl.arange(0, BLOCK_D)
    pointers = value + tokens[:, None].to(tl.int64) * token_stride + channels[None, :]
    v = tl.load(pointers, mask=used[:, None] & (channels < HEAD_DIM)[None, :], other=0.0).to(tl.float32)
    if V_ANCHOR:
        v -= tl.load(v_anchor + channels, mask=channels < HEAD_DIM, other=0.0)[None, :]
    scale = next_power_of_two(tl.math.div_rn(tl.max(tl.abs(v), 1), 448.0))
    scale = tl.minimum(tl.maximum(scale, V_SCALE_MIN), V_SCALE_MAX)
    v *= (1.0 / scale)[:, None]  # exact: scale is a power of two
    v = tl.where(v > 448.0, 448.0, tl.where(v < -448.0, -448.0, v))  # NaN stays
    if FP8 == "native":
        codes = v.to(tl.float8e4nv).to(tl.int8, bitcast=True)
    else:
        codes = to_e4m3_bits(v).to(tl.int8, bitcast=True)
    return codes, scale


@triton.jit
def _store_v_scale(cache_i8, cache_f32, k_word, scale, used, PAGE: tl.constexpr, K_BITS: tl.constexpr):
    """Write scales of V where they belong to tokens whose scales of K are the words `k_word` of the cache."""
    if K_BITS == 8:
        tl.store(cache_f32 + k_word + PAGE, scale, mask=used)
    else:
        tl.store(cache_i8 + 4 * k_word, (scale.to(tl.int32, bitcast=True) >> 23).to(tl.int8), mask=used)


@triton.jit
def _nibbles(both, step, base):
    """Where the codes of groups, [groups, channels], stand between levels that begin at `base`, `step` apart."""
    return to_whole((both - base[:, None]) * tl.math.div_rn(1.0, step)[:, None])


@triton.jit
def _better(best, both, step, base, REACH: tl.constexpr):
    """The better of `best` (errors, steps, bases), if there is one, and these steps and bases for the codes of groups `both`,
    [groups, channels]. All are float32. REACH: whether the 16 levels reach all codes."""
    base = tl.minimum(tl.maximum(base, -128.0), 127.0 - 15.0 * step)
    nibbles = _nibbles(both, step, base)
    if not REACH:
        nibbles = tl.minimum(tl.maximum(nibbles, 0.0), 15.0)
    miss = step[:, None] * nibbles - (both - base[:, None])
    error = tl.sum(miss * miss, 1)
    if best is not None:
        better = error < best[0]
        step = tl.where(better, step, best[1])
        base = tl.where(better, base, best[2])
        error = tl.where(better, error, best[0])
    return error, step, base


@triton.jit
def _narrow(low, high, BLOCK_T: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr):
    """`reference.narrow` of the codes of the halves of a head, [BLOCK_T, GROUPS * GROUP] each: bytes of that shape, and steps
    and bases [BLOCK_T, GROUPS]. All are whole numbers, which float32 holds exactly."""
    both = tl.join(low.to(tl.float32), high.to(tl.float32)).reshape([BLOCK_T * GROUPS, 2 * GROUP])
    least, largest = tl.min(both, 1), tl.max(both, 1)
    whole = tl.maximum((largest - least + 14.0).to(tl.int32) // 15, 1).to(tl.float32)
    best = None
    for less in tl.static_range(2):
        step = tl.maximum(whole - less, 1.0)
        best = _better(best, both, step, least, less == 0)
        best = _better(best, both, step, largest - 15.0 * step, less == 0)
        best = _better(best, both, step, tl.floor((least + largest - 15.0 * step) * 0.5), less == 0)
    _, step, base = best  # type: ignore[misc]  # it is not None any more
    nibbles = tl.minimum(tl.maximum(_nibbles(both, step, base), 0.0), 15.0)
    low, high = tl.split(nibbles.to(tl.int32).reshape([BLOCK_T, GROUPS * GROUP, 2]))
    packed = (low | (high << 4)).to(tl.int8)
    return packed, step.reshape([BLOCK_T, GROUPS]).to(tl.int8), base.reshape([BLOCK_T, GROUPS]).to(tl.int8)


@triton.jit
def _mean_key(key, slots, num_tokens, token_stride, channels, limit, TOKENS: tl.constexpr):
    """The mean of the first TOKENS keys that are not padding, float32 [channels], as `reference.fix_anchor` takes it."""
    tokens = tl.arange(0, TOKENS)
    used = tl.load(slots + tokens, mask=tokens < num_tokens, other=-1) >= 0
    pointers = key + tokens[:, None].to(tl.int64) * token_stride + channels[None, :]
    k = tl.load(pointers, mask=used[:, None] & (channels < limit)[None, :], other=0.0).to(tl.float32)
    mean = tl.sum(k, 0) / tl.maximum(tl.sum(used.to(tl.int32), 0), 1)
    return tl.where(tl.abs(mean) < float("inf"), mean, 0.0)


@triton.jit
def _load_or_fix_anchor(anchor, key, slots, num_tokens, used, token_stride, half, HALF: tl.constexpr, TOKENS: tl.constexpr):
    """The halves of a head's anchor, float32 [channels]; anchor and key: pointers to the head's own.

    A head without an anchor gets one from every program that has tokens to store: all compute the same mean from the same
    tokens, so it does not matter who comes first, and none waits. Channel 0 is written last and read first: what it says holds
    for all channels. It is read by an atomic operation, which one thread does for all, for plain loads of several threads may
    fall before and after another program's writing, and the threads of a program have to go the same way.
    """
    inside = half < HALF
    channel_0 = anchor.to(tl.pointer_type(tl.int32), bitcast=True)
    first = tl.atomic_or(channel_0, 0, sem="acquire").to(tl.float32, bitcast=True)
    if first == first:
        low = tl.load(anchor + half, mask=inside, other=0.0)
        high = tl.load(anchor + HALF + half, mask=inside, other=0.0)
    else:
        low = _mean_key(key, slots, num_tokens, token_stride, half, HALF, TOKENS)
        high = _mean_key(key + HALF, slots, num_tokens, token_stride, half, HALF, TOKENS)
        if tl.max(used.to(tl.int32), 0) > 0:
            tl.store(anchor + half, low, mask=inside & (half > 0))
            tl.store(anchor + HALF + half, high, mask=inside)
            tl.debug_barrier()
            first = tl.sum(tl.where(half == 0, low, 0.0), 0)
            tl.atomic_xchg(channel_0, first.to(tl.int32, bitcast=True), sem="release")
    return low, high


@triton.jit(do_not_specialize=["num_tokens"])
def _store_kernel(
    key, value, slots, cache_i8, cache_f32, anchor, v_anchor, num_tokens,
    key_token_stride, key_head_stride, value_token_stride, value_head_stride, block_stride, head_stride,
    HEAD_DIM: tl.constexpr, K_BITS: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, FP8: tl.constexpr, ANCHOR_TOKENS: tl.constexpr,
    V_ANCHOR: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (token blocks, KV heads). ANCHOR_TOKENS: 0 for keys as they are."""
    await_kernel_before(PDL)
    HALF: tl.constexpr = HEAD_DIM // 2
    K_ROW: tl.constexpr = HEAD_DIM * K_BITS // 8
    V_OFFSET: tl.constexpr = section_offset("v", HEAD_DIM, K_BITS, PAGE)
    SCALES: tl.constexpr = section_offset("k_scale", HEAD_DIM, K_BITS, PAGE) // 4

    head = tl.program_id(1)
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    slot = tl.load(slots + tokens, mask=tokens < num_tokens, other=-1)
    used = slot >= 0
    page = (slot // PAGE).to(tl.int64) * block_stride + head.to(tl.int64) * head_stride
    row = slot % PAGE

    # Keys come in two halves, which is what a packed byte pairs up; INT8 takes the same way.
    half = tl.arange(0, BLOCK_D // 2)
    half_mask = used[:, None] & (half < HALF)[None, :]
    head_key = key + head * key_head_stride
    source = head_key + tokens[:, None].to(tl.int64) * key_token_stride + half[None, :]
    low = tl.load(source, mask=half_mask, other=0.0).to(tl.float32)
    high = tl.load(source + HALF, mask=half_mask, other=0.0).to(tl.float32)
    if ANCHOR_TOKENS > 0:
        anchor_low, anchor_high = _load_or_fix_anchor(
            anchor + head * HEAD_DIM, head_key, slots, num_tokens, used, key_token_stride, half, HALF, ANCHOR_TOKENS
        )
        low -= anchor_low[None, :]
        high -= anchor_high[None, :]
    target = cache_i8 + page[:, None] + row[:, None] * K_ROW + half[None, :]
    amax = tl.maximum(tl.max(tl.abs(low), 1), tl.max(tl.abs(high), 1))
    inverse = inverse_or_zero(amax, 127.0)[:, None]
    low_codes = to_int(low * inverse).to(tl.int8)
    high_codes = to_int(high * inverse).to(tl.int8)
    k_scale = tl.math.div_rn(amax, 127.0)
    if K_BITS == 8:
        tl.store(target, low_codes, mask=half_mask)
        tl.store(target + HALF, high_codes, mask=half_mask)
        tl.store(cache_f32 + page // 4 + SCALES + row, k_scale, mask=used)
    else:
        packed, step, base = _narrow(low_codes, high_codes, BLOCK_T, BLOCK_D // 2 // GROUP_BYTES, GROUP_BYTES)
        tl.store(target, packed, mask=half_mask)
        GROUPS: tl.constexpr = HALF // GROUP_BYTES
        group = tl.arange(0, BLOCK_D // 2 // GROUP_BYTES)
        group_mask = used[:, None] & (group < GROUPS)[None, :]
        first_group = page + section_offset("k_groups", HEAD_DIM, K_BITS, PAGE) + row * 2 * GROUPS
        groups = cache_i8 + first_group[:, None] + group[None, :]
        tl.store(groups, step, mask=group_mask)
        tl.store(groups + GROUPS, base, mask=group_mask)
        # The first of a scale's four bytes belongs to V.
        word = cache_i8 + page + 4 * (SCALES + row)
        for byte in tl.static_range(1, 4):
            tl.store(word + byte, (k_scale.to(tl.int32, bitcast=True) >> (8 * byte)).to(tl.int8), mask=used)

    # Tokens of a prompt mostly fill whole groups of slots, one after another. Then values are taken in the order of V, so that
    # bytes that leave together stand together.
    first = tl.load(slots + tl.program_id(0) * BLOCK_T)
    lanes = tl.arange(0, BLOCK_T)
    in_a_row = (first % BLOCK_T == 0) & (tl.min((slot == first + lanes).to(tl.int32), 0) == 1)
    head_page = head.to(tl.int64) * head_stride
    channels = tl.arange(0, BLOCK_D)
    head_value = value + head * value_head_stride
    v_anchor += head * HEAD_DIM
    if in_a_row:
        codes, scale = _quantize_v(
            head_value, v_anchor, tl.program_id(0) * BLOCK_T + v_token(lanes), lanes >= 0, value_token_stride,
            HEAD_DIM, BLOCK_D, FP8, V_ANCHOR,
        )  # fmt: skip
        page_offset = (first // PAGE).to(tl.int64) * block_stride + head_page
        v_offset = tl.multiple_of(page_offset + V_OFFSET + first % PAGE, 16)
        pointers = cache_i8 + v_offset + channels[:, None] * PAGE + lanes[None, :]
        tl.store(pointers, tl.trans(codes), mask=(channels < HEAD_DIM)[:, None])
        k_word = page_offset // 4 + SCALES + first % PAGE + v_token(lanes)
        _store_v_scale(cache_i8, cache_f32, k_word, scale, lanes >= 0, PAGE, K_BITS)
    else:
        codes, scale = _quantize_v(
            head_value, v_anchor, tokens, used, value_token_stride, HEAD_DIM, BLOCK_D, FP8, V_ANCHOR
        )
        pointers = cache_i8 + (page + V_OFFSET + v_position(row))[None, :] + channels[:, None] * PAGE
        tl.store(pointers, tl.trans(codes), mask=used[None, :] & (channels < HEAD_DIM)[:, None])
        _store_v_scale(cache_i8, cache_f32, page // 4 + SCALES + row, scale, used, PAGE, K_BITS)


def store(
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    slots: torch.Tensor,
    layout: PageLayout,
    anchor: torch.Tensor | None = None,
    v_anchor: torch.Tensor | None = None,
) -> None:
    """`reference.store` on a GPU, with the same arguments. key and value need unit stride in head_dim only."""
    num_tokens = slots.numel()
    if num_tokens == 0:
        return
    _store_kernel[(triton.cdiv(num_tokens, BLOCK_TOKENS), pages.shape[1])](
        key, value, slots, pages.view(torch.int8), pages.view(torch.float32), pages if anchor is None else anchor,
        pages if v_anchor is None else v_anchor, num_tokens,
        key.stride(0), key.stride(1), value.stride(0), value.stride(1), pages.stride(0), pages.stride(1),
        HEAD_DIM=layout.head_dim, K_BITS=layout.k_bits, PAGE=layout.tokens,
        BLOCK_D=triton.next_power_of_2(layout.head_dim), BLOCK_T=BLOCK_TOKENS, FP8=fp8_path(key.device),
        ANCHOR_TOKENS=0 if anchor is None else ANCHOR_TOKENS, V_ANCHOR=v_anchor is not None,
        num_warps=4 if layout.k_bits == 8 else 8, **dependent_launch(key.device),
    )  # fmt: skip
