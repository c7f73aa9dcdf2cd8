# SPDX-License-Identifier: Apache-2.0
"""Pages of 4-bit codes from shared memory to registers, where wgmma takes its A operand: keys as INT8 codes, values as e4m3.

Each layout below is that of an A operand with something left out: keys by words of four channels, and values two rows a byte.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sage_kernels.hopper.copy import plain
from sage_kernels.portable.codes import GROUP_BYTES


@gluon.jit
def load_k_int4(k_buffer, group_buffer, first_buffer, HEAD_DIM: gl.constexpr, PAGE: gl.constexpr, LAYOUT: gl.constexpr):
    """The INT8 codes of a page's INT4 keys: the low and the high half of the head, [PAGE, HEAD_DIM // 2] each. LAYOUT: of the
    product."""
    HALF: gl.constexpr = HEAD_DIM // 2
    GROUPS: gl.constexpr = HALF // GROUP_BYTES
    A_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 4)
    # Numbers of a token's channels, by words of four channels.
    WORDS: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=_word_registers(HALF, PAGE), lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]], block_bases=[], shape=[PAGE, HALF // 4],
    )  # fmt: skip
    word = gl.arange(0, HALF // 4, gl.SliceLayout(0, WORDS))[None, :]
    # A token's steps, then its zero points: GROUPS bytes each. Four are a word, and prmt takes a byte out of two words.
    groups = plain(group_buffer, [PAGE, GROUPS // 2], gl.int32)
    steps = _group_words(groups, 0, word, GROUPS, WORDS)
    zeros = _group_words(groups, GROUPS // 4, word, GROUPS, WORDS)
    group = word // 2 % 8 * 0x1111
    step = _permute(steps[0], steps[1], group | 0x8880)  # a step alone: its sign, 0, in the other bytes
    # Four channels at a time: with 128 added to the zero point, no byte of zero + step * nibble carries into the next.
    zero = _permute(zeros[0], zeros[1], group) ^ -0x7F7F7F80
    # The low nibbles of the first group, 0 in others.
    firsts = plain(first_buffer, [PAGE, GROUP_BYTES // 4], gl.int32)
    first = gl.where(word == 0, firsts.slice(0, 1, dim=1).load(WORDS), 0)
    first = gl.where(word == 1, firsts.slice(1, 1, dim=1).load(WORDS), first)
    step, zero, first = _of_channels(step, A_LAYOUT), _of_channels(zero, A_LAYOUT), _of_channels(first, A_LAYOUT)
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 low, high, first;
        and.b32 low, $2, 0x0F0F0F0F;
        shr.u32 high, $2, 4;
        and.b32 high, high, 0x0F0F0F0F;
        mad.lo.u32 low, low, $3, $7;
        mad.lo.u32 high, high, $3, $7;
        and.b32 first, $11, 0x0F0F0F0F;
        add.u32 low, low, first;
        shr.u32 first, $11, 4;
        and.b32 first, first, 0x0F0F0F0F;
        add.u32 high, high, first;
        xor.b32 $0, low, 0x80808080;
        xor.b32 $1, high, 0x80808080;
        }""",
        "=r,=r,r,r,r,r,r,r,r,r,r,r,r,r,r", [k_buffer.load(A_LAYOUT), step, zero, first],
        dtype=(gl.int8, gl.int8), is_pure=True, pack=4,
    )  # fmt: skip


@gluon.jit
def _group_words(groups, first_word: gl.constexpr, word, GROUPS: gl.constexpr, WORDS: gl.constexpr):
    """The two words that hold the step, or the zero point, of each word of four channels. groups: of a page, int32 [tokens,
    words of four groups]; first_word: the first of steps, or of zero points."""
    low = groups.slice(first_word, 1, dim=1).load(WORDS)
    high = low
    if GROUPS >= 8:
        high = groups.slice(first_word + 1, 1, dim=1).load(WORDS)
    if GROUPS == 16:
        in_second = word >= 16
        low = gl.where(in_second, groups.slice(first_word + 2, 1, dim=1).load(WORDS), low)
        high = gl.where(in_second, groups.slice(first_word + 3, 1, dim=1).load(WORDS), high)
    return low, high


@gluon.jit
def _permute(low, high, selector):
    """prmt: four bytes of the eight in low and high, by the nibbles of the selector. The two broadcast with the selector."""
    low, selector = gl.broadcast(low, selector)
    high = gl.broadcast(high, selector)[0]
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, selector], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _of_channels(words, LAYOUT: gl.constexpr):
    """Each number of words [rows, words] for the four channels of its word: [rows, channels]."""
    twice = gl.join(words, words)
    return gl.convert_layout(gl.join(twice, twice).reshape([words.shape[0], 4 * words.shape[1]]), LAYOUT)


@triton.constexpr_function
def _word_registers(half, page):
    """What the bits of a register's number stand for in words of four channels [page, half // 4]: rows 8 behind, channels 16,
    32, ... behind; then the next 64 rows."""
    words = [[0, 4 << i] for i in range((half // 16).bit_length() - 1)]
    rows = [[64 << i, 0] for i in range((page // 64).bit_length() - 1)]
    return [[8, 0], *words, *rows]


@gluon.jit
def load_v_int4(buffer, HEAD_DIM: gl.constexpr, PAGE: gl.constexpr, LAYOUT: gl.constexpr):
    """The e4m3 codes of a page's 4-bit values, [HEAD_DIM, PAGE]. LAYOUT: of the product.

    Row r is channel 16 * (r // 16) + 2 * (r % 8) + r // 8 % 2: a thread has rows r and r + 8 of an operand, and a byte has two
    adjacent channels."""
    PACKED: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=_packed_registers(HEAD_DIM, PAGE), lane_bases=[[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[8, 0], [16, 0]], block_bases=[], shape=[HEAD_DIM // 2, PAGE],
    )  # fmt: skip
    # Eight values at a time: prmt looks four magnitudes up among the codes 3 * m + m // 4 + 1, then parts low and high nibbles.
    low, high = gl.inline_asm_elementwise(
        """{
        .reg .b32 least, most, magnitudes, first, second, low, high;
        mov.b32 least, 0x0A070401;
        mov.b32 most, 0x1714110E;
        and.b32 magnitudes, $2, 0x77777777;
        prmt.b32 first, least, most, magnitudes;
        shr.u32 magnitudes, magnitudes, 16;
        prmt.b32 second, least, most, magnitudes;
        prmt.b32 low, first, second, 0x6420;
        prmt.b32 high, first, second, 0x7531;
        shl.b32 first, $2, 4;
        and.b32 first, first, 0x80808080;
        or.b32 $0, low, first;
        and.b32 second, $2, 0x80808080;
        or.b32 $1, high, second;
        }""",
        "=r,=r,r", [buffer.load(PACKED)], dtype=(gl.int8, gl.int8), is_pure=True, pack=4,
    )  # fmt: skip
    codes = gl.join(low, high).reshape([HEAD_DIM // 16, 8, PAGE, 2]).permute([0, 3, 1, 2]).reshape([HEAD_DIM, PAGE])
    return gl.convert_layout(codes.to(gl.float8e4nv, bitcast=True), gl.DotOperandLayout(0, LAYOUT, 4))


@triton.constexpr_function
def _packed_registers(head_dim, page):
    """What the bits of a register's number stand for in the bytes of 4-bit values [head_dim // 2, page]: tensor cores read four
    adjacent tokens, those 16 behind, and so on by 32; then the next 64 channels."""
    tokens = [1, 2, 16] + [32 << i for i in range((page // 32).bit_length() - 1)]
    rows = [32 << i for i in range((head_dim // 64).bit_length() - 1)]
    return [[0, token] for token in tokens] + [[row, 0] for row in rows]
