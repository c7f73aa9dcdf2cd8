# SPDX-License-Identifier: Apache-2.0
"""The codes of a page, read and widened: INT4 keys to INT8, 4-bit values to e4m3, e4m3 to float16. Four at a time, in 32-bit
words, as far as possible."""

import triton
import triton.language as tl

import sage_paged

GROUP_BYTES = tl.constexpr(sage_paged.GROUP_BYTES)

section_offset = triton.constexpr_function(sage_paged.section_offset)


@triton.jit
def load_k(page, tokens, channels, K_ROW: tl.constexpr, CHANNELS: tl.constexpr):
    """The K bytes of a page, transposed: int8 [channels, tokens]. page: int8 pointer to the page."""
    pointers = page + tokens[None, :] * K_ROW + channels[:, None]
    if channels.shape[0] == CHANNELS:
        k = tl.load(pointers)
    else:
        k = tl.load(pointers, mask=(channels < CHANNELS)[:, None], other=0)
    return k


@triton.jit
def widen_k_int4(packed, first, step, zero):
    """INT4 keys as INT8 codes, four at a time: int32 words of the low and of the high half of the head.

    packed: words of four bytes; first: the low nibbles of the first group, 0 in others; step, zero: int8, of each word's group.
    With 128 added to zero points, no byte of zero + step * nibble carries into the next.
    """
    step = step.to(tl.int32)
    zero = (zero.to(tl.int32) + 128) * 0x01010101
    low = (packed & 0x0F0F0F0F) * step + (first & 0x0F0F0F0F) + zero
    high = ((packed >> 4) & 0x0F0F0F0F) * step + ((first >> 4) & 0x0F0F0F0F) + zero
    return low ^ -0x7F7F7F80, high ^ -0x7F7F7F80


@triton.jit
def bytes_of(words):
    """int32 [words, n] -> int8 [4 * words, n], the lowest byte of a word first."""
    halves = tl.join(words, words >> 16)
    each = tl.join(halves, halves >> 8).to(tl.int8)
    return each.permute([0, 2, 3, 1]).reshape([4 * words.shape[0], words.shape[1]])


@triton.jit
def load_int4_k(page, tokens, CHANNELS: tl.constexpr, PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, V_BITS: tl.constexpr):
    """The INT8 codes of a page of INT4 keys, for the low and the high half of the head: int8 [CHANNELS, tokens] each. CHANNELS:
    those of half the head, or more, where codes are not meant."""
    HALF: tl.constexpr = HEAD_DIM // 2
    GROUPS: tl.constexpr = HALF // GROUP_BYTES
    GROUP_WORDS: tl.constexpr = GROUP_BYTES // 4
    word = tl.arange(0, CHANNELS // 4)[:, None]
    group = tl.arange(0, CHANNELS // GROUP_BYTES)[:, None]
    words = page.to(tl.pointer_type(tl.int32))
    packed = words + tokens[None, :] * (HALF // 4) + word
    step = page + section_offset("k_groups", HEAD_DIM, 4, PAGE, V_BITS) + tokens[None, :] * (2 * GROUPS) + group
    if CHANNELS == HALF:
        packed = tl.load(packed)
        zero = tl.load(step + GROUPS)
        step = tl.load(step)
    else:
        packed = tl.load(packed, mask=word < HALF // 4, other=0)
        zero = tl.load(step + GROUPS, mask=group < GROUPS, other=0)
        step = tl.load(step, mask=group < GROUPS, other=0)
    first = words + section_offset("k_low", HEAD_DIM, 4, PAGE, V_BITS) // 4 + tokens[None, :] * GROUP_WORDS + word
    first = tl.load(first, mask=word < GROUP_WORDS, other=0)
    SHAPE: tl.constexpr = (CHANNELS // GROUP_BYTES, GROUP_WORDS, PAGE)
    low, high = widen_k_int4(packed.reshape(SHAPE), first.reshape(SHAPE), step[:, None, :], zero[:, None, :])
    return bytes_of(low.reshape([CHANNELS // 4, PAGE])), bytes_of(high.reshape([CHANNELS // 4, PAGE]))


@triton.jit
def v_exponent_in_scale(k_scale):
    """V's exponent, float32, from the scale of an INT4 key: its last 8 bits, biased as a float32 exponent is."""
    return ((k_scale.to(tl.int32, bitcast=True) & 0xFF) - 127).to(tl.float32)


@triton.jit
def widen_v_int4(packed):
    """The low nibbles of four bytes, 4-bit values, as e4m3 codes (`sage_paged.layout`). int32."""
    magnitude = packed & 0x07070707
    return ((packed & 0x08080808) << 4) | (magnitude * 3 + ((magnitude >> 2) & 0x01010101) + 0x01010101)


@triton.jit
def load_v_words(section, channels, PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, V_BITS: tl.constexpr):
    """The values of a page as e4m3 codes of four tokens at a time, tokens in the order of V: int32 [tokens / 4, channels].
    section: int32 pointer to them."""
    ROWS: tl.constexpr = channels.shape[0] * V_BITS // 8
    row = tl.arange(0, ROWS)[None, :]  # of one channel, or of two adjacent ones
    pointers = section + row * (PAGE // 4) + tl.arange(0, PAGE // 4)[:, None]
    if channels.shape[0] == HEAD_DIM:
        words = tl.load(pointers)
    else:
        words = tl.load(pointers, mask=row < HEAD_DIM * V_BITS // 8, other=0)
    if V_BITS == 4:
        words = tl.interleave(widen_v_int4(words), widen_v_int4(words >> 4))
    return words


@triton.jit
def half_words(words):
    """Words of four e4m3 codes -> words of two float16 numbers, 2**-8 times the values: those of the first and third code, and
    those of the second and fourth. All codes give finite numbers, so P of 0 needs no help against what unfilled tokens have
    left."""
    even = ((words & 0x00800080) << 8) | ((words & 0x007F007F) << 7)
    odd = (words & -0x7FFF8000) | ((words >> 1) & 0x3F803F80)
    return even, odd


@triton.jit
def halves_of(words):
    """`half_words` of int32 [words, n] as float16 [4 * words, n], in the order of `half_order`."""
    even, odd = half_words(words)
    pairs = tl.join(even, odd)
    each = tl.join(pairs, pairs >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return each.permute([0, 2, 3, 1]).reshape([4 * words.shape[0], words.shape[1]])


@triton.jit
def half_order(place):
    """Which token of a page, in the order of V, is at each place of `halves_of`: of every four, the second and third change
    places."""
    return (place & -4) | ((place & 1) << 1) | ((place >> 1) & 1)


@triton.jit
def load_v(section, tokens, channels, length, PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr):
    """The V codes of a page, [tokens, channels]. section: pointer to them; tokens: 0 to PAGE - 1 in the order of V, or in their
    own for float16.

    MASKED: codes from token `length` of the page on become 0. An earlier owner of the memory may have left a NaN there, and
    0 * NaN would reach every row.
    """
    pointers = section + channels[None, :] * PAGE + tl.arange(0, PAGE)[:, None]
    if channels.shape[0] == HEAD_DIM:
        v = tl.load(pointers)
    else:
        v = tl.load(pointers, mask=(channels < HEAD_DIM)[None, :], other=0.0)
    if MASKED:  # a select: a mask on the load would split it into single bytes
        filled = (tokens < length)[:, None]
        v = tl.where(filled, v.to(tl.uint8, bitcast=True), 0).to(tl.uint8).to(v.dtype, bitcast=True)
    return v
