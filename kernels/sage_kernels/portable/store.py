# SPDX-License-Identifier: Apache-2.0
"""Quantize new keys and values and write them into their pages, in one launch. On every GPU, sm_90 included."""

import torch
import triton
import triton.language as tl

from sage_kernels.batch import NOT_CALIBRATED, LayerCalibration
from sage_kernels.device import dependent_launch, fp8_path
from sage_kernels.page_cache import PageCache
from sage_kernels.portable.codes import GROUP_BYTES, section_offset
from sage_kernels.portable.primitives import (
    NO_FRACTION,
    V_INT4_INVERSE,
    V_INT4_LEAST,
    V_SCALE_FINE,
    V_SCALE_MAX,
    V_SCALE_MIN,
    await_previous_kernel,
    e4m3_bits_to_half,
    fine_exponent,
    hadamard,
    inverse_or_zero,
    largest_magnitude,
    next_power_of_two,
    rope_pairs,
    rotation_signs,
    rotation_span,
    to_e4m3_bits,
    to_int,
    to_whole,
    v_int4_level,
    v_position,
    v_token,
)
from sage_kernels.portable.query_tile import calibration_constants, calibration_tensors
from sage_kernels.reference import V_EIGHTHS
from sage_paged import PageLayout

BLOCK_TOKENS = 16
_EIGHTHS, _END = tl.constexpr(V_EIGHTHS.start), tl.constexpr(V_EIGHTHS.stop)


@triton.jit
def _to_e4m3(x, FP8: tl.constexpr):
    """float32 -> e4m3 codes as int8, at most 448; NaN stays."""
    if FP8 == "native":  # where the conversion saturates
        codes = x.to(tl.float8e4nv).to(tl.int8, bitcast=True)
    else:
        codes = to_e4m3_bits(tl.where(x > 448.0, 448.0, tl.where(x < -448.0, -448.0, x))).to(tl.int8, bitcast=True)
    return codes


@triton.jit
def _from_e4m3(codes, FP8: tl.constexpr):
    """The numbers of `_to_e4m3`, float32."""
    if FP8 == "native":
        x = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        x = e4m3_bits_to_half(codes.to(tl.uint8, bitcast=True)).to(tl.float32) * 256.0
    return x


@triton.jit
def _e4m3_error(x, FP8: tl.constexpr):
    """Squared error of x, float32 [tokens, channels], in e4m3: sums over rows, float32 [tokens]."""
    error = _from_e4m3(_to_e4m3(x, FP8), FP8) - x
    return tl.sum(error * error, 1)


@triton.jit
def _quantize_v(v, FINE: tl.constexpr, FP8: tl.constexpr):
    """`reference.quantize_v`. v: float32 [tokens, channels]. Returns e4m3 codes as int8 of that shape, and exponents, float32
    [tokens]."""
    power = next_power_of_two(tl.math.div_rn(tl.max(tl.abs(v), 1), 448.0))
    power = tl.minimum(tl.maximum(power, V_SCALE_MIN), V_SCALE_MAX)
    whole = ((power.to(tl.int32, bitcast=True) >> 23) - 127).to(tl.float32)
    exponent, inverse = whole, 1.0 / power
    if FINE:
        coarse = inverse
        least = _e4m3_error(v * inverse[:, None], FP8)
        for eighths in tl.static_range(_EIGHTHS, _END, -1):
            error = _e4m3_error(v * (coarse * (eighths / 8))[:, None], FP8) * (64 / (eighths * eighths))
            better = (error < least) & (power <= V_SCALE_FINE)
            least = tl.where(better, error, least)
            exponent = tl.where(better, whole + fine_exponent(eighths), exponent)
            inverse = tl.where(better, coarse * (eighths / 8), inverse)
    return _to_e4m3(v * inverse[:, None], FP8), exponent


@triton.jit
def _quantize_v_int4(v, FP8: tl.constexpr):
    """`reference.quantize_v_int4`. v: rotated values, float32 [tokens, channels]. Returns packed bytes, int8 [tokens, channels
    // 2], and exponents, float32 [tokens]."""
    magnitude = tl.abs(v)
    amax = largest_magnitude(v)
    inverse = tl.minimum(tl.maximum(tl.math.div_rn(V_INT4_INVERSE, amax), V_INT4_LEAST), 448.0)
    inverse = _from_e4m3(_to_e4m3(inverse, FP8), FP8) / 32.0
    scaled = magnitude * (inverse * 512.0)[:, None]
    codes = tl.where(v < 0.0, 8, 0)
    for m in tl.static_range(7):
        codes += (scaled > (v_int4_level(m) + v_int4_level(m + 1)) / 2).to(tl.int32)
    low, high = tl.split(codes.reshape([v.shape[0], v.shape[1] // 2, 2]))
    bits = inverse.to(tl.int32, bitcast=True)
    mantissa = ((bits & 0x7FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)  # from 0.5 on, as of frexp
    exponent = (126 - (bits >> 23)).to(tl.float32) - to_whole(tl.log2(mantissa) * 65536.0) / 65536.0
    return (low | (high << 4)).to(tl.int8), tl.where(amax < float("inf"), exponent, float("nan"))


@triton.jit
def _write_rows(
    page_i8, page_f32, row, used, k, k_scale, v_exponent,
    HEAD_DIM: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, PAGE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the sections of pages that have one row per token: all but the codes of V.

    page_i8, page_f32: pointers to the page of all tokens, or of each token. used: bool [tokens], which to write. k: the two
    halves of INT8 codes, or packed INT4 codes, steps, zero points and low nibbles.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    SCALES: tl.constexpr = section_offset("k_scale", HEAD_DIM, K_BITS, PAGE, V_BITS) // 4
    half = tl.arange(0, BLOCK_D // 2)
    half_mask = used[:, None] & (half < HALF)[None, :]
    target = (page_i8 + row * (HEAD_DIM * K_BITS // 8))[:, None] + half[None, :]
    scales = page_f32 + SCALES + row
    if K_BITS == 8:
        low, high = k
        tl.store(target, low, mask=half_mask)
        tl.store(target + HALF, high, mask=half_mask)
    else:
        packed, step, zero, first_low = k
        tl.store(target, packed, mask=half_mask)
        low_target = page_i8 + section_offset("k_low", HEAD_DIM, K_BITS, PAGE, V_BITS) + row * GROUP_BYTES
        tl.store(low_target[:, None] + half[None, :], first_low, mask=used[:, None] & (half < GROUP_BYTES)[None, :])
        GROUPS: tl.constexpr = HALF // GROUP_BYTES
        group = tl.arange(0, BLOCK_D // 2 // GROUP_BYTES)
        group_mask = used[:, None] & (group < GROUPS)[None, :]
        first_group = page_i8 + section_offset("k_groups", HEAD_DIM, K_BITS, PAGE, V_BITS) + row * (2 * GROUPS)
        groups = first_group[:, None] + group[None, :]
        tl.store(groups, step, mask=group_mask)
        tl.store(groups + GROUPS, zero, mask=group_mask)
    if K_BITS == 4 and V_BITS == 8:  # the last of the four bytes of k_scale holds V's exponent
        both = (k_scale.to(tl.int32, bitcast=True) & -256) | (v_exponent.to(tl.int32) + 127)
        tl.store(scales, both.to(tl.float32, bitcast=True), mask=used)
    else:
        tl.store(scales, k_scale, mask=used)
        tl.store(scales + PAGE, v_exponent, mask=used)


@triton.jit
def _levels(codes, step, zero, AT_LEAST: tl.constexpr, AT_MOST: tl.constexpr):
    """The nearest levels of codes, [groups, channels], for the step and zero point of each group: whole numbers plus
    NO_FRACTION. AT_LEAST, AT_MOST: whether codes may lie below level 0 or above level 15.

    A code halfway between two levels belongs to the upper one. The inverse of the step is a little too large, so that this
    holds whether product and sum are fused or not.
    """
    inverse = ((1.0 + 2.0**-20) / step)[:, None]
    levels = (codes - zero[:, None]) * inverse + NO_FRACTION
    if AT_LEAST:
        levels = tl.maximum(levels, NO_FRACTION)
    if AT_MOST:
        levels = tl.minimum(levels, NO_FRACTION + 15.0)
    return levels


@triton.jit
def _better(best, codes, step, zero, AT_LEAST: tl.constexpr, AT_MOST: tl.constexpr):
    """The better quantizer of groups of codes, [groups, channels]: `best` (errors, steps, zero points; None at first) or this
    step and zero point. All are float32. AT_LEAST, AT_MOST: see `_levels`."""
    zero = tl.minimum(tl.maximum(zero, -128.0), 127.0 - 15.0 * step)
    levels = _levels(codes, step, zero, AT_LEAST, AT_MOST) - NO_FRACTION
    miss = step[:, None] * levels - (codes - zero[:, None])
    error = tl.sum(miss * miss, 1)
    if best is not None:
        better = error < best[0]
        step = tl.where(better, step, best[1])
        zero = tl.where(better, zero, best[2])
        error = tl.where(better, error, best[0])
    return error, step, zero


@triton.jit
def _pack_int4(low, high, BLOCK_T: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr):
    """`reference.pack_int4` of the codes of the two halves of a head, float32 [BLOCK_T, GROUPS * GROUP] each. Returns packed
    bytes of that shape, steps and zero points [BLOCK_T, GROUPS], and low nibbles of that shape, of which the first group's
    count, all int8. Codes are whole numbers, which float32 holds exactly."""
    low_code, high_code = low.to(tl.int32) + 128, high.to(tl.int32) + 128
    codes = tl.join(low, high).reshape([BLOCK_T * GROUPS, 2 * GROUP])
    least, largest = tl.min(codes, 1), tl.max(codes, 1)
    whole = tl.maximum((largest - least + 14.0).to(tl.int32) // 15, 1).to(tl.float32)
    best = _better(None, codes, whole, least, False, False)
    best = _better(best, codes, whole, largest - 15.0 * whole, False, False)
    best = _better(best, codes, whole, tl.floor((least + largest - 15.0 * whole) * 0.5), False, False)
    less = tl.maximum(whole - 1.0, 1.0)
    _, step, zero = _better(best, codes, less, tl.floor((least + largest - 15.0 * less) * 0.5), True, True)
    levels = _levels(codes, step, zero, True, True).to(tl.int32, bitcast=True)
    low, high = tl.split((levels & 0xF).reshape([BLOCK_T, GROUPS * GROUP, 2]))
    packed = (low | (high << 4)).to(tl.int8)
    # The codes of the first group are whole.
    in_first = (tl.arange(0, GROUPS * GROUP) < GROUP)[None, :]
    packed = tl.where(in_first, (low_code >> 4) | (high_code & 0xF0), packed.to(tl.int32)).to(tl.int8)
    first_low = ((low_code & 0xF) | ((high_code & 0xF) << 4)).to(tl.int8)
    is_first = (tl.arange(0, GROUPS) == 0)[None, :]
    step = tl.where(is_first, 16.0, step.reshape([BLOCK_T, GROUPS])).to(tl.int8)
    zero = tl.where(is_first, -128.0, zero.reshape([BLOCK_T, GROUPS])).to(tl.int8)
    return packed, step, zero, first_low


@triton.jit
def _in_order(low, high, pair):
    """Codes of the two halves of a head, float32 [tokens, positions], whole numbers, with the RoPE pairs in the order `pair`.

    Codes are put in order, not the keys as they are loaded: that would take a load for each channel. A warp gathers among the
    positions of several tokens at once. So a thread gets adjacent positions of one token, and what `_pack_int4` sums over a
    group stays within one or two threads.
    """
    HALF: tl.constexpr = low.shape[1]
    AT_ONCE: tl.constexpr = min(4, 256 // HALF)  # tokens; more would take more shuffles
    SHAPE: tl.constexpr = [low.shape[0] // AT_ONCE, AT_ONCE * HALF]
    source = tl.arange(0, AT_ONCE)[:, None] * HALF + pair[None, :]
    source = tl.broadcast_to(source[None, :, :], [SHAPE[0], AT_ONCE, HALF]).reshape(SHAPE)
    both = low.to(tl.int32) + high.to(tl.int32) * 256
    both = tl.gather(both.reshape(SHAPE), source, 1).reshape(low.shape)
    low = both.to(tl.int8).to(tl.int32)
    return low.to(tl.float32), ((both - low) >> 8).to(tl.float32)


@triton.jit
def _prepare_keys(low, high, k_anchor, equalizer, pair, HALF: tl.constexpr, K_ANCHOR: tl.constexpr, EQUALIZE: tl.constexpr):
    """`reference.prepare_keys` of the two halves of a head, float32 [tokens, pairs] each, before their order. k_anchor,
    equalizer: pointers to the head's own; pair: HALF and above for padding."""
    if K_ANCHOR:
        low -= tl.load(k_anchor + pair, mask=pair < HALF, other=0.0)[None, :]
        high -= tl.load(k_anchor + HALF + pair, mask=pair < HALF, other=0.0)[None, :]
    if EQUALIZE:  # both channels of a pair have the same factor
        factor = tl.math.div_rn(1.0, tl.load(equalizer + pair, mask=pair < HALF, other=1.0))[None, :]
        low *= factor
        high *= factor
    return low, high


@triton.jit
def _write_tokens(
    cache_i8, cache_f32, slot, first, k, k_scale, v, v_exponent, head_offset, block_stride,
    HEAD_DIM: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, PAGE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Write quantized tokens, in the order of V, to their slots. slot: int64 [BLOCK_T], negative for none; first: the slot of
    the first token."""
    V_OFFSET: tl.constexpr = section_offset("v", HEAD_DIM, K_BITS, PAGE, V_BITS)
    V_ROWS: tl.constexpr = HEAD_DIM * V_BITS // 8
    lanes = tl.arange(0, BLOCK_T)
    used = slot >= 0
    v_rows = tl.arange(0, v.shape[1])
    if (first >= 0) & (first % BLOCK_T == 0) & (tl.min((slot == first + v_token(lanes)).to(tl.int32), 0) == 1):
        same_page = (first // PAGE).to(tl.int64) * block_stride + head_offset
        first_row = tl.multiple_of((first % PAGE).to(tl.int32), BLOCK_T)
        _write_rows(
            cache_i8 + same_page, cache_f32 + same_page // 4, first_row + v_token(lanes), lanes >= 0, k, k_scale, v_exponent,
            HEAD_DIM, K_BITS, V_BITS, PAGE, BLOCK_D,
        )  # fmt: skip
        pointers = cache_i8 + same_page + V_OFFSET + first_row + v_rows[:, None] * PAGE + lanes[None, :]
        tl.store(pointers, tl.trans(v), mask=(v_rows < V_ROWS)[:, None])
    else:
        page = (slot // PAGE).to(tl.int64) * block_stride + head_offset
        row = (slot % PAGE).to(tl.int32)
        _write_rows(
            cache_i8 + page, cache_f32 + page // 4, row, used, k, k_scale, v_exponent,
            HEAD_DIM, K_BITS, V_BITS, PAGE, BLOCK_D,
        )  # fmt: skip
        positions = cache_i8 + page + V_OFFSET + v_position(row)
        tl.store(positions[:, None] + v_rows[None, :] * PAGE, v, mask=used[:, None] & (v_rows < V_ROWS)[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
def _store_kernel(
    key, value, slots, cache_i8, cache_f32, k_anchor, equalizer, order, v_anchor, num_tokens,
    key_token_stride, key_head_stride, value_token_stride, value_head_stride, block_stride, head_stride,
    frames_i8, frames_f32, frame_of, frame_stride, frame_head_stride,
    HEAD_DIM: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, FP8: tl.constexpr, K_ANCHOR: tl.constexpr, EQUALIZE: tl.constexpr,
    ORDER: tl.constexpr, V_ANCHOR: tl.constexpr, FRAMES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write the keys and values of BLOCK_T tokens of one KV head into their pages, and into the frames of those that have one
    (`sage_kernels.page_cache`). Grid: (token blocks, KV heads)."""
    await_previous_kernel(PDL)
    HALF: tl.constexpr = HEAD_DIM // 2

    # Tokens are taken in the order of V. So tokens with consecutive slots, as in most of a prompt, write consecutive bytes of
    # V.
    head = tl.program_id(1)
    begin = tl.program_id(0) * BLOCK_T
    lanes = tl.arange(0, BLOCK_T)
    tokens = begin + v_token(lanes)
    valid = tokens < num_tokens
    # Keys are loaded in two halves, which a packed byte pairs up. INT8 keys take the same path.
    pair = tl.arange(0, BLOCK_D // 2)
    half_mask = valid[:, None] & (pair < HALF)[None, :]
    source = key + head * key_head_stride + tokens[:, None].to(tl.int64) * key_token_stride + pair[None, :]
    low = tl.load(source, mask=half_mask, other=0.0)
    high = tl.load(source + HALF, mask=half_mask, other=0.0)
    channels = tl.arange(0, BLOCK_D)
    source = value + head * value_head_stride + tokens[:, None].to(tl.int64) * value_token_stride + channels[None, :]
    v = tl.load(source, mask=valid[:, None] & (channels < HEAD_DIM)[None, :], other=0.0)
    slot = tl.load(slots + tokens, mask=valid, other=-1)
    first = tl.load(slots + begin)
    low, high, v = low.to(tl.float32), high.to(tl.float32), v.to(tl.float32)

    first_channel = head * HEAD_DIM
    low, high = _prepare_keys(
        low, high, k_anchor + first_channel, equalizer + first_channel, pair, HALF, K_ANCHOR, EQUALIZE
    )  # fmt: skip
    amax = tl.maximum(largest_magnitude(low), largest_magnitude(high), propagate_nan=tl.PropagateNan.ALL)
    inverse = inverse_or_zero(amax, 127.0)[:, None]
    k_scale = tl.math.div_rn(amax, 127.0)
    if K_BITS == 8:
        k = to_int(low * inverse).to(tl.int8), to_int(high * inverse).to(tl.int8)
    else:
        low, high = to_whole(low * inverse), to_whole(high * inverse)
        if ORDER:
            low, high = _in_order(low, high, rope_pairs(order + head * HALF, BLOCK_D, HALF, True))
        k = _pack_int4(low, high, BLOCK_T, BLOCK_D // 2 // GROUP_BYTES, GROUP_BYTES)
    if V_ANCHOR:
        v -= tl.load(v_anchor + head * HEAD_DIM + channels, mask=channels < HEAD_DIM, other=0.0)[None, :]
    if V_BITS == 8:
        v, v_exponent = _quantize_v(v, K_BITS == 8, FP8)
    else:
        v, v_exponent = _quantize_v_int4(hadamard(v * rotation_signs(channels)[None, :], rotation_span(HEAD_DIM)), FP8)
    _write_tokens(
        cache_i8, cache_f32, slot, first, k, k_scale, v, v_exponent, head.to(tl.int64) * head_stride, block_stride,
        HEAD_DIM, K_BITS, V_BITS, PAGE, BLOCK_D, BLOCK_T,
    )  # fmt: skip
    if FRAMES:
        heads = tl.num_programs(1)
        frame = tl.load(frame_of + slot // PAGE * heads + head, mask=slot >= 0, other=-1)
        slot = tl.where(frame >= 0, frame.to(tl.int64) * PAGE + slot % PAGE, -1)
        frame = tl.load(frame_of + first // PAGE * heads + head, mask=first >= 0, other=-1)
        first = tl.where(frame >= 0, frame.to(tl.int64) * PAGE + first % PAGE, -1)
        _write_tokens(
            frames_i8, frames_f32, slot, first, k, k_scale, v, v_exponent, head.to(tl.int64) * frame_head_stride, frame_stride,
            HEAD_DIM, K_BITS, V_BITS, PAGE, BLOCK_D, BLOCK_T,
        )  # fmt: skip


def store(
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    slots: torch.Tensor,
    layout: PageLayout,
    calibration: LayerCalibration = NOT_CALIBRATED,
    cache: PageCache | None = None,
) -> None:
    """`reference.store` on a GPU, with the same arguments. key and value need unit stride in head_dim only, and one row per
    slot, padding included. cache: the layer's, whose frames get the tokens too."""
    num_tokens = slots.numel()
    calibration = calibration.for_keys(layout.k_bits)
    if num_tokens == 0:
        return
    views = pages.view(torch.int8), pages.view(torch.float32)
    framed, framed_views = pages, views
    if cache is not None:
        framed, framed_views = cache.frames, (cache.frames.view(torch.int8), cache.frames.view(torch.float32))
    _store_kernel[(triton.cdiv(num_tokens, BLOCK_TOKENS), pages.shape[1])](
        key, value, slots, *views,
        *calibration_tensors(calibration, pages), num_tokens,
        key.stride(0), key.stride(1), value.stride(0), value.stride(1), pages.stride(0), pages.stride(1),
        *framed_views, slots if cache is None else cache.frame_of, framed.stride(0), framed.stride(1),
        HEAD_DIM=layout.head_dim, K_BITS=layout.k_bits, V_BITS=layout.v_bits, PAGE=layout.tokens,
        BLOCK_D=triton.next_power_of_2(layout.head_dim), BLOCK_T=BLOCK_TOKENS, FP8=fp8_path(key.device),
        **calibration_constants(calibration), FRAMES=cache is not None,
        num_warps=4, **dependent_launch(key.device),
    )  # fmt: skip
