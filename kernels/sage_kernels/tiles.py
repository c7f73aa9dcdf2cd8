"""What the Triton kernels share: how a tile of a page is read, and how numbers become codes.

The arithmetic is that of `reference`; where a line here looks odd, the reason is written beside it.
"""

import triton
import triton.language as tl
from triton import knobs

import sage_paged
from sage_kernels import reference

LOG2E = tl.constexpr(1.4426950408889634)
P_BITS = tl.constexpr(float(reference.P_BITS))
FALL_BITS = tl.constexpr(float(reference.FALL_BITS))
V_SCALE_MIN, V_SCALE_MAX = (tl.constexpr(scale) for scale in reference.V_SCALES)
V_SCALE_FINE = tl.constexpr(reference.V_SCALE_FINE)
NO_FRACTION = tl.constexpr(12582912.0)
"""1.5 * 2**23: what is added to a float32 to round it to a whole number, which its last bits then are."""
INTERPRETED = tl.constexpr(knobs.runtime.interpret)
TABLES = ["block_table", "seq_lens", "query_start_loc"]
"""Arguments that are sliced where the decodes of a batch end: how a slice is aligned must not cost a compilation."""
TABLE_STRIDES = ["table_stride", "table_head_stride"]
"""Arguments that differ between block tables and page lists: a server that recalls goes from one to the other."""

GROUP_BYTES = tl.constexpr(sage_paged.GROUP_BYTES)

# The interpreter takes functions as they are, and jit only where `tl` is in sight.
v_position, v_token = (f if INTERPRETED else triton.jit(f) for f in (sage_paged.v_position, sage_paged.v_token))
section_offset = triton.constexpr_function(sage_paged.section_offset)
finer = triton.constexpr_function(reference.finer)


@triton.jit
def await_kernel_before(PDL: tl.constexpr):
    """Stands before all that a kernel which `device.dependent_launch` lets start early reads and writes.

    Its programs come when all of the kernel before have ended, and wait here for what these wrote, which saves most of a
    launch's time. (Letting them come even earlier, by griddepcontrol.launch_dependents, made a layer's decode with memory no
    faster.) Every program has to come here, so that what this kernel waited for is over when the next one goes on.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def to_int(x):
    """Round float32 to the nearest integer, ties to even, for |x| < 2**22; float32 in the interpreter, int32 on a GPU.

    Adding 1.5 * 2**23 leaves no fraction bits. A GPU would fuse that addition with the product x often is, and round once
    where the specification rounds twice, so there the conversion instruction is asked for by name.
    """
    if INTERPRETED:
        rounded = (x + NO_FRACTION) - NO_FRACTION
    else:
        rounded = tl.inline_asm_elementwise("cvt.rni.s32.f32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)
    return rounded


@triton.jit
def to_whole(x):
    """`to_int`, but float32 on a GPU as well, where two additions that nothing is fused with cost less than conversions."""
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
def first_block(query_start_loc, base, request, BLOCK_Q: tl.constexpr, SPARE: tl.constexpr = 1):
    """The first query block of a request. base: query_start_loc[0].

    Request r gets its blocks from start(r) // BLOCK_Q + SPARE * r on: at least as many as it needs, without a table. Blocks
    that begin with a request's first query need one to spare, others, which may begin before it, two.
    """
    return (tl.load(query_start_loc + request) - base) // BLOCK_Q + SPARE * request


@triton.jit
def find_request(query_start_loc, q_block, num_reqs, BLOCK_Q: tl.constexpr, SPARE: tl.constexpr = 1):
    """The request that query block `q_block` belongs to, and the how manieth of its blocks that is (see `first_block`)."""
    base = tl.load(query_start_loc)
    low = 0
    high = num_reqs
    while high - low > 1:
        middle = (low + high) // 2
        if first_block(query_start_loc, base, middle, BLOCK_Q, SPARE) <= q_block:
            low = middle
        else:
            high = middle
    return low, q_block - first_block(query_start_loc, base, low, BLOCK_Q, SPARE)


@triton.jit
def turned(low, high, turn, mask, HALF: tl.constexpr):
    """The halves of `reference.turned`. turn: pointers to the cosines of rows of a turn table; mask: which of them are there.
    Both have shapes that go with that of low and high."""
    cos = tl.load(turn, mask=mask, other=1.0)
    sin = tl.load(turn + HALF, mask=mask, other=0.0)
    return low * cos + high * sin, high * cos - low * sin


@triton.jit
def quantize_q(q, scale):
    """q: float32 [rows, channels] -> int8 codes, and float32 [rows] that take code products to base-2 logits."""
    amax = tl.max(tl.abs(q), 1)
    codes = to_int(q * inverse_or_zero(amax, 127.0)[:, None]).to(tl.int8)
    return codes, amax * (scale * LOG2E / 127.0)


@triton.jit
def quantize_parts(q, valid, scale, MEANS: tl.constexpr):
    """`reference.query_parts` of a tile whose rows are a block of queries of MEANS heads in turn, or one part if MEANS is 0.

    q: float32 [rows, channels], 0 in rows that are not valid. Returns codes and scales as `quantize_q` does, of what rows have
    beside the mean of their head, and of that mean, which every row of the head has: so both parts are multiplied with a page
    alike, and no product has to be brought from a row of means to the rows of its head. With one part, the second stands for
    nothing.
    """
    if MEANS:
        head = (tl.arange(0, q.shape[0]) % MEANS)[:, None]
        tokens = tl.sum(valid.to(tl.float32), 0) / MEANS
        mean = tl.zeros_like(q)
        for each in tl.static_range(MEANS):
            mean = tl.where(head == each, tl.sum(tl.where(head == each, q, 0.0), 0)[None, :] / tokens, mean)
        mean_codes, mean_scale = quantize_q(mean, 1.0 / LOG2E)  # what codes are multiplied by to be the mean
        codes, q_scale = quantize_q(q - mean_codes.to(tl.float32) * mean_scale[:, None], scale)
        mean_scale *= scale * LOG2E
    else:
        codes, q_scale = quantize_q(q, scale)
        mean_codes, mean_scale = codes, q_scale
    return codes, q_scale, mean_codes, mean_scale


@triton.jit
def load_k(page, tokens, channels, K_ROW: tl.constexpr, CHANNELS: tl.constexpr):
    """page: int8 pointer to a page. Returns the K bytes transposed, [channels, tokens]."""
    pointers = page + tokens[None, :] * K_ROW + channels[:, None]
    if channels.shape[0] == CHANNELS:
        k = tl.load(pointers)
    else:
        k = tl.load(pointers, mask=(channels < CHANNELS)[:, None], other=0)
    return k


@triton.jit
def load_wide_k(page, tokens, channels, PAGE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Of a page of INT4 keys, the INT8 codes of the low and of the high half of the head, [channels, tokens] each."""
    HALF: tl.constexpr = HEAD_DIM // 2
    GROUPS: tl.constexpr = HALF // GROUP_BYTES
    k = load_k(page, tokens, channels, HALF, HALF)
    section = page + section_offset("k_groups", HEAD_DIM, 4, PAGE)
    groups = section + tokens[None, :] * (2 * GROUPS) + (channels // GROUP_BYTES)[:, None]
    if channels.shape[0] == HALF:
        step = tl.load(groups)
        base = tl.load(groups + GROUPS)
    else:
        inside = (channels < HALF)[:, None]
        step = tl.load(groups, mask=inside, other=0)
        base = tl.load(groups + GROUPS, mask=inside, other=0)
    # What leaves the range of int8 on the way comes back.
    return ((k & 0xF) * step + base).to(tl.int8), (((k >> 4) & 0xF) * step + base).to(tl.int8)


@triton.jit
def v_exponent_beside(k_scale):
    """V's exponent, float32, from the scale of an INT4 key, whose last 8 bits it is, as a float32 would have it."""
    return ((k_scale.to(tl.int32, bitcast=True) & 0xFF) - 127).to(tl.float32)


@triton.jit
def load_v(section, tokens, channels, length, PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr):
    """section: pointer to a page's V codes; tokens: those of a page in the order of V. Returns [tokens, channels].

    MASKED: codes at and after token `length` of the page become 0. Whatever an earlier owner of the memory left there may
    be a NaN, and 0 * NaN would reach every row.
    """
    pointers = section + channels[None, :] * PAGE + tl.arange(0, PAGE)[:, None]
    if channels.shape[0] == HEAD_DIM:
        v = tl.load(pointers)
    else:
        v = tl.load(pointers, mask=(channels < HEAD_DIM)[None, :], other=0.0)
    if MASKED:  # a select, for a mask on the load would split it into single bytes
        filled = (tokens < length)[:, None]
        v = tl.where(filled, v.to(tl.uint8, bitcast=True), 0).to(tl.uint8).to(v.dtype, bitcast=True)
    return v


@triton.jit
def add_v_anchor(acc, total, v_anchor, HEAD_DIM: tl.constexpr, V_ANCHOR: tl.constexpr):
    """Give acc [rows, channels] what all stored values lack, if V_ANCHOR; before a sink, which has no value, is in total."""
    if V_ANCHOR:
        channels = tl.arange(0, acc.shape[1])
        acc += total[:, None] * tl.load(v_anchor + channels, mask=channels < HEAD_DIM, other=0.0)[None, :]
    return acc


@triton.jit
def page_reference(highest, top, base, MASKED: tl.constexpr):
    """What the exponents of P are relative to in a page, from the largest logits `highest` that rows have there, the largest
    before it, `top`, and the reference before it, `base`; and the largest so far. All are float32 [rows], -inf where a row has
    seen nothing. MASKED: whether there may be rows that see nothing of the page.

    The reference is P_BITS below the page's own largest logit, so that what a page's codes are depends on nothing else; but it
    does not fall further than acc and total have room for (see `reference.FALL_BITS`). Where a row sees nothing, it stays, for
    sums that are scaled anew are rounded anew, and what pages a tile has depends on which rows share it.
    """
    reference = tl.maximum(highest, top - FALL_BITS) - P_BITS
    if MASKED:
        reference = tl.where(highest == float("-inf"), base, reference)
    return reference, tl.maximum(highest, top)


@triton.jit
def tanh(x):
    return 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)


@triton.jit
def attend_page(
    q_low, q_high, q_scale, mean_low, mean_high, mean_scale, q_bias, acc, total, base, top,
    cache_i8, cache_v, cache_f32, page_offset, length, first_visible, last_visible, soft_cap,
    HEAD_DIM: tl.constexpr, K_BITS: tl.constexpr, PAGE: tl.constexpr, MASKED: tl.constexpr,
    SOFT_CAP: tl.constexpr, FP8: tl.constexpr, TURN: tl.constexpr, MEANS: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: the rows of a query tile against one page.

    q_low, q_high: int8 [rows, channels], for INT4 the halves of the head, for INT8 the whole head in q_low.
    q_scale: float32 [rows]. mean_low, mean_high, mean_scale: the same of what was taken off the queries, if MEANS is not 0.
    q_bias: float32 [rows], what base-2 logits lack by the keys' anchor.
    acc: float32 [rows, channels], total: float32 [rows]: sums so far, times 2**-base. base, top: see `page_reference`.
    page_offset: int64, bytes from the cache's start.
    length: tokens of the page that are filled. first_visible, last_visible: int [rows], tokens of the page that a row may
    see. FP8: see `device.fp8_path`. TURN: whether queries are turned for this page, so that pages have biases of their own.
    Returns acc, total, base, top.
    """
    tokens = v_token(tl.arange(0, PAGE))  # every column of this tile is in the order of V
    SCALES: tl.constexpr = section_offset("k_scale", HEAD_DIM, K_BITS, PAGE) // 4
    k_channels = tl.arange(0, q_low.shape[1])
    k_scale = tl.load(cache_f32 + page_offset // 4 + SCALES + tokens)
    if K_BITS == 8:
        k = load_k(cache_i8 + page_offset, tokens, k_channels, HEAD_DIM, HEAD_DIM)
        codes = tl.dot(q_low, k, out_dtype=tl.int32)
        if MEANS:
            mean_codes = tl.dot(mean_low, k, out_dtype=tl.int32)
        v_exponent = tl.load(cache_f32 + page_offset // 4 + SCALES + PAGE + tokens)
    else:
        k_low, k_high = load_wide_k(cache_i8 + page_offset, tokens, k_channels, PAGE, HEAD_DIM)
        codes = tl.dot(q_high, k_high, tl.dot(q_low, k_low, out_dtype=tl.int32), out_dtype=tl.int32)
        if MEANS:
            mean_codes = tl.dot(mean_high, k_high, tl.dot(mean_low, k_low, out_dtype=tl.int32), out_dtype=tl.int32)
        v_exponent = v_exponent_beside(k_scale)
    v_inverse = tl.exp2(-v_exponent)

    logits = codes.to(tl.float32) * k_scale[None, :] * q_scale[:, None]
    if MEANS:
        logits += mean_codes.to(tl.float32) * k_scale[None, :] * mean_scale[:, None]
    if SOFT_CAP or TURN:
        logits += q_bias[:, None]
    if SOFT_CAP:
        logits = (soft_cap * LOG2E) * tanh(logits / (soft_cap * LOG2E))
    logits += v_exponent[None, :]
    if MASKED:
        visible = (tokens[None, :] <= last_visible[:, None]) & (tokens[None, :] >= first_visible[:, None])
        logits = tl.where(visible, logits, float("-inf"))
        # The scale of a token that is not there may be anything: keep 0 * inf out of the sum.
        v_inverse = tl.where(tokens < length, v_inverse, 0.0)

    new_base, top = page_reference(tl.max(logits, 1), top, base, MASKED)
    shift = new_base
    if MASKED:  # a row that has seen nothing yet has no reference; any finite one keeps inf - inf out
        shift = tl.where(new_base == float("-inf"), 0.0, new_base)
    p = tl.exp2(logits - shift[:, None])

    channels = tl.arange(0, acc.shape[1])
    v_section = cache_v + page_offset + section_offset("v", HEAD_DIM, K_BITS, PAGE)
    v = load_v(v_section, tokens, channels, length, PAGE, HEAD_DIM, MASKED)
    if FP8 == "half":
        p_codes = p.to(tl.float16)
        pv = tl.dot(p_codes, e4m3_bits_to_half(v)) * 256.0
    else:
        if FP8 == "native":
            p_codes = p.to(tl.float8e4nv)
        else:
            p_codes = to_e4m3_bits(p).to(tl.float8e4nv, bitcast=True)
        pv = tl.dot(p_codes, v)
    row_sum = tl.sum(p_codes.to(tl.float32) * v_inverse[None, :], 1)

    # FP8 tensor cores accumulate in 22 bits: every page gets a fresh accumulator, and pages add up in float32
    # (SageAttention2, section 3.4). Rescaling acc to the new reference costs nothing more, it is the same FMA.
    decay = tl.exp2(base - shift)
    return acc * decay[:, None] + pv, total * decay + row_sum, new_base, top
