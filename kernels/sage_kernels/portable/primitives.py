# SPDX-License-Identifier: Apache-2.0
"""Building blocks of the Triton kernels: rounding and quantization, and one step of the online softmax.

The arithmetic is that of `reference`, bit by bit where that is possible. Where a line looks odd, the comment next to it says
why.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from triton import knobs

import sage_paged
from sage_kernels import reference
from sage_kernels.portable.codes import (
    bytes_of,
    half_order,
    halves_of,
    load_int4_k,
    load_k,
    load_v,
    load_v_words,
    section_offset,
    v_exponent_in_scale,
)

LOG2E = tl.constexpr(1.4426950408889634)
P_BITS = tl.constexpr(float(reference.P_BITS))
FALL_BITS = tl.constexpr(float(reference.FALL_BITS))
V_SCALE_MIN, V_SCALE_MAX = (tl.constexpr(scale) for scale in reference.V_SCALES)
V_SCALE_FINE = tl.constexpr(reference.V_SCALE_FINE)
V_INT4_INVERSE = tl.constexpr(reference.V_INT4_INVERSE)
V_INT4_LEAST = tl.constexpr(reference.V_INT4_LEAST)
NO_FRACTION = tl.constexpr(12582912.0)
"""1.5 * 2**23. A float32 plus this is rounded to a whole number, which its last bits then hold."""
NO_FRACTION_BITS = tl.constexpr(0x4B400000)
SCRATCH_V_BITS = tl.constexpr(sage_paged.SCRATCH_V_BITS)
INTERPRETED = tl.constexpr(knobs.runtime.interpret)
TABLES = ["block_table", "seq_lens", "query_start_loc", "topk_pages"]
"""Arguments that are sliced where the decodes of a batch end. The alignment of a slice must not cause a compilation."""
TABLE_STRIDES = ["table_stride", "table_head_stride"]
"""Arguments that differ between block tables and page lists. A server with memory alternates between the two."""

# The interpreter calls plain functions, and jit needs `tl` among a function's globals.
v_position, v_token = (f if INTERPRETED else triton.jit(f) for f in (sage_paged.v_position, sage_paged.v_token))
fine_exponent = triton.constexpr_function(reference.fine_exponent)
v_int4_level = triton.constexpr_function(reference.v_int4_level)
rotation_span = triton.constexpr_function(reference.rotation_span)
v_inverse_bits = triton.constexpr_function(reference.v_inverse_bits)


class QuantizedQuery(NamedTuple):
    """A query tile in INT8 codes. Each code tensor is int8 [rows, channels]: for INT8 keys the whole head in `low` (`high` is
    the same), for INT4 keys the two halves of the head. mean_*: the second term of Q smoothing; equal to the first without it.

    scale, mean_scale: float32 [rows], from code products to base-2 logits. bias: float32 [rows], Q times the anchor of K in
    base 2, which all logits of a row lack.
    """

    low: tl.tensor
    high: tl.tensor
    scale: tl.tensor
    mean_low: tl.tensor
    mean_high: tl.tensor
    mean_scale: tl.tensor
    bias: tl.tensor


class SoftmaxState(NamedTuple):
    """Running sums of the online softmax, all relative to 2**m_ref.

    acc: float32 [rows, channels], sum of P V. l_i: float32 [rows, n], sum of P, in n equal columns and times 2 to
    `v_inverse_bits`; as `attend_pages` returns it, float32 [rows], the sum itself. m_ref: float32 [rows], the reference of the
    exponentials (`softmax_reference`). m_i: float32 [rows], the largest base-2 logit so far. Both are -inf where a row has seen
    nothing.
    """

    acc: tl.tensor
    l_i: tl.tensor
    m_ref: tl.tensor
    m_i: tl.tensor


@triton.jit
def await_previous_kernel(PDL: tl.constexpr):
    """Programmatic dependent launch (`device.dependent_launch`): wait for the kernel before, ahead of any read or write.

    The programs of this kernel start when all programs of the kernel before have ended or left, and wait here for its writes.
    That hides most of a launch. (griddepcontrol.launch_dependents, which starts them even earlier, made a layer's decode with
    memory no faster.) Every program must call this: the next kernel relies on this kernel having waited.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def to_int(x):
    """Round float32 to the nearest integer, ties to even, for |x| < 2**22; float32 in the interpreter, int32 on a GPU.

    Adding NO_FRACTION leaves no fraction bits. A GPU would fuse that addition with a product in x and round once where the
    specification rounds twice, so there the conversion instruction is written out.
    """
    if INTERPRETED:
        rounded = (x + NO_FRACTION) - NO_FRACTION
    else:
        rounded = tl.inline_asm_elementwise("cvt.rni.s32.f32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)
    return rounded


@triton.jit
def to_whole(x):
    """`to_int` as float32, also on a GPU: two additions that nothing fuses with cost less than a conversion and back."""
    if INTERPRETED:
        rounded = (x + NO_FRACTION) - NO_FRACTION
    else:
        rounded = tl.inline_asm_elementwise(
            "{.reg .f32 t; add.rn.f32 t, $1, 0f4B400000; sub.rn.f32 $0, t, 0f4B400000;}",
            "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return rounded


@triton.jit
def inverse_or_zero(x, numerator):
    """numerator / x, and 0 where x is 0; NaN stays NaN."""
    return tl.where(x == 0.0, 0.0, tl.math.div_rn(numerator, x))


@triton.jit
def next_power_of_two(x):
    """The least power of two that is at least x, for x >= 0; 0 for 0."""
    return ((x.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def to_e4m3_bits(x):
    """float32 within +-448 -> e4m3 codes as uint8, ties to even, in integer arithmetic: sm_80 has no such instruction."""
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = tl.abs(x)
    m_bits = magnitude.to(tl.uint32, bitcast=True)
    normal = ((m_bits + 0x7FFFF + ((m_bits >> 20) & 1)) >> 20) - (120 << 3)  # 120: float32's exponent bias less e4m3's
    # Adding 2**14 leaves steps of 2**-9, which is the step of e4m3's subnormals.
    subnormal = (magnitude + 16384.0).to(tl.uint32, bitcast=True) & 0xF
    code = tl.where(magnitude < 0.015625, subnormal, normal)
    return (sign | tl.where(magnitude != magnitude, 0x7F, code)).to(tl.uint8)


@triton.jit
def e4m3_bits_to_half(code):
    """e4m3 codes as uint8 -> float16, 2**-8 times the value: float16's exponent bias is 8 larger."""
    wide = code.to(tl.uint16)
    return (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)


@triton.jit
def first_block(query_start_loc, first_query, request, BLOCK_Q: tl.constexpr, SPARE: tl.constexpr = 1):
    """The first query block of a request. first_query: query_start_loc[0].

    Request r has the blocks from start(r) // BLOCK_Q + SPARE * r on. These are at least as many as it needs, and no table has
    to be built. Blocks that are aligned to a request's first query need one spare block, blocks aligned to positions two.
    """
    return (tl.load(query_start_loc + request) - first_query) // BLOCK_Q + SPARE * request


@triton.jit
def find_request(query_start_loc, q_block, num_reqs, BLOCK_Q: tl.constexpr, SPARE: tl.constexpr = 1):
    """Returns the request of query block `q_block`, and the index of the block within the request (see `first_block`)."""
    first_query = tl.load(query_start_loc)
    lower = 0
    upper = num_reqs
    while upper - lower > 1:
        middle = (lower + upper) // 2
        if first_block(query_start_loc, first_query, middle, BLOCK_Q, SPARE) <= q_block:
            lower = middle
        else:
            upper = middle
    return lower, q_block - first_block(query_start_loc, first_query, lower, BLOCK_Q, SPARE)


@triton.jit
def turn_back(low, high, shift, mask, HALF: tl.constexpr):
    """`reference.turn_back` of the halves of a head. shift: pointers to the cosines in rows of a `rope_shift_table`; mask:
    which are valid. Both broadcast with low and high."""
    cos = tl.load(shift, mask=mask, other=1.0)
    sin = tl.load(shift + HALF, mask=mask, other=0.0)
    return low * cos + high * sin, high * cos - low * sin


@triton.jit
def largest_magnitude(x):
    """The largest |x| of each row of float32 [rows, channels]; NaN if there is one, which tl.max leaves out. As integers,
    magnitudes have the order of the numbers, and NaN comes last."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1).to(tl.float32, bitcast=True)


@triton.jit
def quantize_halves(low, high):
    """Two halves of rows, float32 [rows, channels] each, which share a scale -> int8 codes of both, and the largest magnitude,
    float32 [rows], which the code 127 stands for."""
    amax = tl.maximum(largest_magnitude(low), largest_magnitude(high), propagate_nan=tl.PropagateNan.ALL)
    factor = inverse_or_zero(amax, 127.0)[:, None]
    return to_int(low * factor).to(tl.int8), to_int(high * factor).to(tl.int8), amax


@triton.jit
def quantize_q(low, high, scale):
    """`quantize_halves` of query rows, but with the factor from code products to base-2 logits, float32 [rows]."""
    low, high, amax = quantize_halves(low, high)
    return low, high, amax * (scale * LOG2E / 127.0)


@triton.jit
def mean_of_heads(q, valid, SMOOTH_Q: tl.constexpr):
    """Each row's mean over the rows of its head, of SMOOTH_Q heads in turn. q: float32 [rows, channels], 0 in rows that are not
    valid."""
    head = (tl.arange(0, q.shape[0]) % SMOOTH_Q)[:, None]
    tokens = tl.sum(valid.to(tl.float32), 0) / SMOOTH_Q
    mean = tl.zeros_like(q)
    for each in tl.static_range(SMOOTH_Q):
        mean = tl.where(head == each, tl.sum(tl.where(head == each, q, 0.0), 0)[None, :] / tokens, mean)
    return mean


@triton.jit
def quantize_terms(low, high, valid, scale, SMOOTH_Q: tl.constexpr):
    """`reference.query_terms` of a tile that is one block of queries, of SMOOTH_Q heads in turn; SMOOTH_Q 0 for one term.

    low, high: the tile's two halves as in `quantize_q`, 0 in rows that are not valid. Returns what `quantize_q` does, for the
    queries less the mean of their head and for that mean. Each row of a head holds the mean: so both terms are multiplied by a
    page in the same way, and no product has to move from a row of means to the rows of its head. Without smoothing, the second
    three are unused.
    """
    if SMOOTH_Q:
        mean_low, mean_high = mean_of_heads(low, valid, SMOOTH_Q), mean_of_heads(high, valid, SMOOTH_Q)
        mean_low, mean_high, mean_scale = quantize_q(mean_low, mean_high, 1.0 / LOG2E)  # which gives back the mean itself
        low -= mean_low.to(tl.float32) * mean_scale[:, None]
        high -= mean_high.to(tl.float32) * mean_scale[:, None]
        low, high, q_scale = quantize_q(low, high, scale)
        mean_scale *= scale * LOG2E
    else:
        low, high, q_scale = quantize_q(low, high, scale)
        mean_low, mean_high, mean_scale = low, high, q_scale
    return low, high, q_scale, mean_low, mean_high, mean_scale


@triton.jit
def rope_pairs(order, BLOCK_D: tl.constexpr, HALF: tl.constexpr, ORDER: tl.constexpr):
    """The RoPE pair at each position of half a head, int32 [BLOCK_D // 2]; HALF or more for padding. order: pointer to those of
    the KV head, if ORDER (`LayerCalibration.order`)."""
    pair = tl.arange(0, BLOCK_D // 2)
    if ORDER:
        pair = tl.load(order + pair, mask=pair < HALF, other=HALF)
    return pair


@triton.jit
def odd_bits(x):
    """1 where an odd number of the lowest 16 bits of x are set, 0 elsewhere."""
    x ^= x >> 8
    x ^= x >> 4
    x ^= x >> 2
    return (x ^ (x >> 1)) & 1


@triton.jit
def rotation_signs(channels):
    """`reference.rotation_signs` of channels, float32."""
    return 1.0 - 2.0 * odd_bits(channels & (channels >> 1)).to(tl.float32)


@triton.jit
def rotate_values_back(acc, HEAD_DIM: tl.constexpr, V_BITS: tl.constexpr):
    """`reference.rotate_values_back` of rows float32 [rows, channels], if V_BITS is 4. Tensor cores multiply TF32 numbers,
    which have 11 bits, so rows are the sum of two of them. The matrix is exact."""
    if V_BITS == 4:
        SPAN: tl.constexpr = rotation_span(HEAD_DIM)
        row, column = tl.arange(0, SPAN)[:, None], tl.arange(0, SPAN)[None, :]
        matrix = (1.0 - 2.0 * odd_bits(row & column).to(tl.float32)) * SPAN**-0.5
        spans = acc.reshape([acc.shape[0] * (acc.shape[1] // SPAN), SPAN])
        high = (spans.to(tl.int32, bitcast=True) & -0x2000).to(tl.float32, bitcast=True)
        product = tl.dot(high, matrix, input_precision="tf32")
        product = tl.dot(spans - high, matrix, product, input_precision="tf32")
        acc = product.reshape(acc.shape) * rotation_signs(tl.arange(0, acc.shape[1]))[None, :]
    return acc


@triton.jit
def add_v_anchor(acc, l_i, v_anchor, HEAD_DIM: tl.constexpr, V_ANCHOR: tl.constexpr):
    """Add l_i times the anchor of V to acc [rows, channels], if V_ANCHOR. A sink has no value, so this comes before it joins
    l_i."""
    if V_ANCHOR:
        channels = tl.arange(0, acc.shape[1])
        acc += l_i[:, None] * tl.load(v_anchor + channels, mask=channels < HEAD_DIM, other=0.0)[None, :]
    return acc


@triton.jit
def softmax_reference(page_max, m_i, m_ref, MASKED: tl.constexpr):
    """The reference of a page's exponentials, and the new m_i. page_max, m_i, m_ref: float32 [rows], the largest logit in this
    page, the largest before it, and the reference before it. MASKED: whether rows may see nothing of the page.

    The reference is P_BITS below the page's own largest logit, so that the page's codes of P depend on nothing else. It is at
    least FALL_BITS below m_i, for which acc and l_i have room. A row that sees nothing of the page keeps its reference:
    rescaling would round its sums again, and which pages a tile walks depends on the rows that share it.
    """
    reference = tl.maximum(page_max, m_i - FALL_BITS) - P_BITS
    if MASKED:
        reference = tl.where(page_max == float("-inf"), m_ref, reference)
    return reference, tl.maximum(page_max, m_i)


@triton.jit
def integer_product(q_low, q_high, k_low, k_high, K_BITS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Q K^T of codes, float32 [rows, tokens]. For INT4 keys, k_low and k_high are halves of the head.

    Integer sums that start at the bits of NO_FRACTION end as floating-point numbers, NO_FRACTION larger. Conversions run at a
    quarter of the speed of additions (sm_80).
    """
    IS_SMALL: tl.constexpr = HEAD_DIM <= 256  # |sum| <= 127 * 128 * HEAD_DIM < 2**22
    codes = tl.full([q_low.shape[0], k_low.shape[1]], NO_FRACTION_BITS if IS_SMALL else 0, tl.int32)
    codes = tl.dot(q_low, k_low, codes, out_dtype=tl.int32)
    if K_BITS == 4:
        codes = tl.dot(q_high, k_high, codes, out_dtype=tl.int32)
    if IS_SMALL:
        product = codes.to(tl.float32, bitcast=True) - NO_FRACTION
    else:
        product = codes.to(tl.float32)
    return product


@triton.jit
def tanh(x):
    return 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)


@triton.jit
def attend_page(
    q, page_bias, state, cache_i8, cache_v, cache_f32, page_offset, length, first_visible, last_visible, soft_cap,
    HEAD_DIM: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, PAGE: tl.constexpr, MASKED: tl.constexpr,
    SOFT_CAP: tl.constexpr, FP8: tl.constexpr, PAGE_BIAS: tl.constexpr, SMOOTH_Q: tl.constexpr, INVERSE_BITS: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: a query tile against one page. Returns the new SoftmaxState.

    q: QuantizedQuery. page_bias: float32 [rows], added to base-2 logits if SOFT_CAP or PAGE_BIAS. state: SoftmaxState.
    page_offset: int64, bytes from the start of the cache. length: tokens of the page that are filled. first_visible,
    last_visible: int [rows], tokens of the page that a row sees. FP8: see `device.fp8_path`. INVERSE_BITS: `v_inverse_bits` of
    values as they were stored.
    """
    tokens = tl.arange(0, PAGE)  # of the columns of this tile, which are in the order of V
    if V_BITS != SCRATCH_V_BITS:
        if FP8 == "half":
            tokens = half_order(tokens)
        tokens = v_token(tokens)
    SCALES: tl.constexpr = section_offset("k_scale", HEAD_DIM, K_BITS, PAGE, V_BITS) // 4
    scales = cache_f32 + page_offset // 4 + SCALES
    if K_BITS == 4 and V_BITS == 8:
        k_scale = tl.load(scales + tokens)
        v_exponent = v_exponent_in_scale(k_scale)
    else:  # together: with fewer elements than threads, each warp would load all that its threads need
        k_scale, v_exponent = tl.split(tl.load(scales + tokens[:, None] + PAGE * tl.arange(0, 2)[None, :]))
    if K_BITS == 8:
        k_low = load_k(cache_i8 + page_offset, tokens, tl.arange(0, q.low.shape[1]), HEAD_DIM, HEAD_DIM)
        k_high = k_low
    else:
        k_low, k_high = load_int4_k(cache_i8 + page_offset, tokens, q.low.shape[1], PAGE, HEAD_DIM, V_BITS)
    v_inverse = tl.exp2(INVERSE_BITS - v_exponent)

    logits = integer_product(q.low, q.high, k_low, k_high, K_BITS, HEAD_DIM) * k_scale[None, :] * q.scale[:, None]
    if SMOOTH_Q:
        means = integer_product(q.mean_low, q.mean_high, k_low, k_high, K_BITS, HEAD_DIM)
        logits += means * k_scale[None, :] * q.mean_scale[:, None]
    if SOFT_CAP or PAGE_BIAS:
        logits += page_bias[:, None]
    if SOFT_CAP:
        logits = (soft_cap * LOG2E) * tanh(logits / (soft_cap * LOG2E))
    logits += v_exponent[None, :]
    if MASKED:
        visible = (tokens[None, :] <= last_visible[:, None]) & (tokens[None, :] >= first_visible[:, None])
        logits = tl.where(visible, logits, float("-inf"))
        # The scale of a token that is not there may be anything: keep 0 * inf out of the sum.
        v_inverse = tl.where(tokens < length, v_inverse, 0.0)

    m_ref, m_i = softmax_reference(tl.max(logits, 1), state.m_i, state.m_ref, MASKED)
    finite = m_ref
    if MASKED:  # a row that has seen nothing yet has no reference; any finite one keeps inf - inf out
        finite = tl.where(m_ref == float("-inf"), 0.0, m_ref)
    p = tl.exp2(logits - finite[:, None])

    channels = tl.arange(0, state.acc.shape[1])
    V_OFFSET: tl.constexpr = section_offset("v", HEAD_DIM, K_BITS, PAGE, V_BITS)
    decay = tl.exp2(state.m_ref - finite)
    v_section = cache_i8 + page_offset + V_OFFSET
    v_words = v_section.to(tl.pointer_type(tl.int32))
    if FP8 == "half":
        if V_BITS == SCRATCH_V_BITS:
            v = load_v(v_section.to(tl.pointer_type(tl.float16)), tokens, channels, length, PAGE, HEAD_DIM, False)
        else:
            v = halves_of(load_v_words(v_words, channels, PAGE, HEAD_DIM, V_BITS))
        p_codes = p.to(tl.float16)
        acc = tl.dot(p_codes, v, state.acc * decay[:, None])
    else:
        if V_BITS == 8:
            v = load_v(cache_v + page_offset + V_OFFSET, tokens, channels, length, PAGE, HEAD_DIM, MASKED)
        else:
            v = bytes_of(load_v_words(v_words, channels, PAGE, HEAD_DIM, V_BITS)).to(tl.float8e4nv, bitcast=True)
        if FP8 == "native":
            p_codes = p.to(tl.float8e4nv)
        else:
            p_codes = to_e4m3_bits(p).to(tl.float8e4nv, bitcast=True)
        # FP8 tensor cores accumulate in 22 bits: every page gets a fresh accumulator, and pages add up in float32
        # (SageAttention2, section 3.4).
        acc = state.acc * decay[:, None] + tl.dot(p_codes, v)
    l_i = state.l_i * decay[:, None]
    if l_i.shape[1] == 1:
        l_i += tl.sum(p_codes.to(tl.float32) * v_inverse[None, :], 1, keep_dims=True)
    else:
        inverses = tl.broadcast_to(v_inverse[:, None], [PAGE, l_i.shape[1]]).to(p_codes.dtype)
        if FP8 == "half":
            l_i = tl.dot(p_codes, inverses, l_i)
        else:
            l_i += tl.dot(p_codes, inverses)
    return SoftmaxState(acc, l_i, m_ref, m_i)


@triton.jit
def hadamard(x, SPAN: tl.constexpr):
    """x, float32 [rows, channels], times the normalized Hadamard matrix of each SPAN channels, addition by addition as in
    `reference.rotate_values`. A sum is kept where its first term was, so that most partners are in the same thread."""
    LOG: tl.constexpr = 6 if SPAN == 64 else 4
    ROWS: tl.constexpr = x.shape[0] * x.shape[1] // SPAN
    y = x.reshape([ROWS, SPAN])
    for bit in tl.static_range(LOG):
        pairs = y.reshape([ROWS, SPAN >> (bit + 1), 2, 1 << bit])
        if bit < 3:
            first, second = tl.split(pairs.permute([0, 1, 3, 2]))
            y = tl.join(first + second, first - second).permute([0, 1, 3, 2]).reshape([ROWS, SPAN])
        else:
            y = (tl.sum(pairs, 2, keep_dims=True) + pairs * (tl.arange(0, 2) * -2.0)[None, None, :, None]).reshape([ROWS, SPAN])
    return (y * SPAN**-0.5).reshape(x.shape)
