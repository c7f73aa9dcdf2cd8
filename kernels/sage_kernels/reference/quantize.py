# SPDX-License-Identifier: Apache-2.0
"""Quantization of Q, K, V and P, in plain torch and float32.

It follows SageAttention (Zhang et al., ICLR 2025, section 4) and SageAttention2 (Zhang et al., ICML 2025, section 3): INT8
queries and keys for Q K^T, FP8 e4m3 probabilities and values for P V. K and V have one scale per token and head, because a page
must not depend on which tokens are neighbors. INT4 keys are stored in 4 bits and multiplied as INT8 codes: 16 channels share a
scale and a zero point that turn a nibble into an INT8 code (`pack_int4`, `unpack_int4`). The first 16 keep their INT8 codes.

P takes over the scale of V before it is rounded: the logarithm of a token's V scale is added to its base-2 logit. The reference
that is subtracted before the exponential is a row's largest such sum in one page. So the largest weight of a page is exact, and
the codes of P do not depend on the order in which a kernel walks the pages, on split-KV, or on chunked prefill; only the order
of float32 sums does. Rows are normalized by the sum of the rounded P: a row that sees one token returns exactly its value.

K smoothing subtracts a per-head vector, the anchor, from all keys of a head. All logits of a row change by the same number, so
softmax does not change. SageAttention subtracts the mean of all keys of the call. Pages outlive a batch, so here the anchor
comes from a calibration and never changes.

Equalization divides the channels of keys, and multiplies those of queries, by a vector of the head, the equalizer. All logits
stay the same (SmoothQuant, Xiao et al., ICML 2023, does this to activations and weights). The INT8 codes of a row share one
scale, so a row loses least if no channel is much larger than the others, in keys and in queries alike. Both channels of a RoPE
pair have the same factor, so that equalization and rotation commute.

V smoothing (SageAttention2) works alike: the weights of a row add up to 1, so the anchor of V is added to the normalized
output. Where values have no common mean there is none: it would add more error than it removes.

4-bit values are e4m3 codes kept in 4 bits (`quantize_v_int4`). Values have no common scale that a calibration could move
elsewhere, so a token's channels are rotated before, and attention's output is rotated back (`rotate_values`): a signed Hadamard
matrix, as QuaRot (Ashkboos et al., NeurIPS 2024) applies to values, makes each stored channel a sum of many, and a few large
ones no longer set the scale of all. Their distribution is then close to the normal one, for which the 16 levels are chosen.

Q smoothing (SageAttention2, section 3.2) quantizes a block of queries less its mean, and adds the products of the mean with the
keys to the logits. The mean is itself rounded to INT8 codes, and the rounded mean is what is subtracted: the two parts add up
to the query exactly, and all products are integer products (`query_terms`).
"""

import functools
import math

import torch

from sage_paged import GROUP_BYTES

FP8_MAX = 448.0
P_BITS = 8
"""The largest P of a row in a page is 2**P_BITS. That uses the range of e4m3 (largest number 448) and is exact."""
FALL_BITS = 32
"""A page has a softmax reference of its own down to this many powers of two below the row's largest logit. Float32 sums have
room for that, and smaller weights are nothing next to them."""
LOG2E = 1.4426950408889634
TILE_ROWS = 64
"""Least rows (query tokens times query heads per KV head) of a prefill tile."""
V_SCALES = (2.0**-16, 2.0)
"""Least and largest power of two among the scales of V; their inverses fit e4m3 too. V beyond +-896 saturates, and numbers
below 2**-26 become 0."""
V_EIGHTHS = range(7, 4, -1)
"""Finer scales of V: 8/7, 8/6 and 8/5 of a power of two. Their inverses have three bits, which fit e4m3 up to V_SCALE_FINE."""
V_SCALE_FINE = 0.25
V_INT4_INVERSE = 32 * 30 / 512 / 0.95
"""32 times the inverse of the scale of a token's 4-bit values, times the token's largest magnitude.

The largest level, 30 / 512 of the scale, is 95% of that magnitude. On rotated values of SmolLM2 and Qwen2.5-Coder no other
constant has a smaller squared error, nor has the best of five scales for each token. Rounded to an e4m3 number of at least
V_INT4_LEAST, the product serves magnitudes from 2**-8 to 960."""
V_INT4_LEAST = 2.0**-9


def fine_exponent(eighths):  # without annotations, which Triton would look up
    """log2(8 / eighths): what a finer scale of V adds to its exponent."""
    return 3 - math.log2(eighths)


def _symmetric(x: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes in [-largest, largest] of x's shape, and float32 scales over the last dimension: x = code * scale."""
    amax = x.abs().amax(-1)
    inverse = torch.where(amax > 0, torch.full_like(amax, largest) / amax, 0.0)  # scalar / tensor would round twice
    return (x * inverse[..., None]).round().clamp(-largest, largest).to(torch.int8), amax / largest


def _next_power_of_two(x: torch.Tensor) -> torch.Tensor:
    """The least power of two that is at least x, float32 not negative; 0 for 0."""
    return ((x.contiguous().view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)


def quantize_q(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """query [..., head_dim] -> int8 codes of the same shape, float32 scales [...]."""
    return _symmetric(query.float(), 127)


def tile_rows(group: int) -> int:
    """Rows of a prefill tile for `group` query heads per KV head: a power of two."""
    return max(TILE_ROWS, 1 << (group - 1).bit_length())


def tile_tokens(group: int) -> int:
    """Query tokens of a prefill tile, which is the block of Q smoothing."""
    return tile_rows(group) // group


QueryTerms = list[tuple[torch.Tensor, torch.Tensor]]
"""Queries as a sum of terms, each int8 codes [..., queries, head_dim] and float32 scales [..., queries]."""


def query_terms(query: torch.Tensor, scale: float, q_block: int = 0) -> QueryTerms:
    """Quantize scale * query, query [..., queries, head_dim].

    One term (`quantize_q`) without smoothing. With q_block, two: the queries less the mean of their block, and that mean. A
    block is q_block queries, counted from the first; the last block may be shorter.
    """
    query, mean = query.float(), None
    if q_block:
        mean = quantize_q(torch.cat([x.mean(-2, keepdim=True).expand_as(x) for x in query.split(q_block, -2)], -2))
        query = query - mean[0] * mean[1][..., None]
    terms = [quantize_q(query)] if mean is None else [quantize_q(query), mean]
    return [(codes, q_scale * scale) for codes, q_scale in terms]


def quantize_k(key: torch.Tensor, k_bits: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """key [..., head_dim] -> int8 codes of the same shape and float32 scales [...]. INT4 keys: the codes after packing."""
    codes, scale = _symmetric(key.float(), 127)
    return (codes if k_bits == 8 else unpack_int4(*pack_int4(codes))), scale


def pack_int4(codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """INT8 codes in 4 bits: int8 [..., head_dim] -> packed nibbles, int8 [..., head_dim // 2]; the integer scales (steps) and
    zero points of groups, int8 [..., 2, groups]; and the low nibbles of the first group, int8 [..., GROUP_BYTES] (see
    `sage_paged.layout`).

    The first group is whole: its step is 16, its zero point -128. For others, the least sum of squared errors decides (the
    first of equals). The step is the smallest with which 16 levels span the codes, which start at the least code, end at the
    largest, or are centered; or the step is one less, and they are centered."""
    low, high = (half.int().unflatten(-1, (-1, GROUP_BYTES)) for half in codes.chunk(2, -1))
    both = torch.cat([low, high], -1)
    least, largest = both.amin(-1, keepdim=True), both.amax(-1, keepdim=True)
    whole = ((largest - least + 14) // 15).clamp(min=1)
    best: tuple[torch.Tensor, ...] = ()
    less = (whole - 1).clamp(min=1)
    start, end, center = least, largest - 15 * whole, (least + largest - 15 * whole) >> 1
    for step, zero in ((whole, start), (whole, end), (whole, center), (less, (least + largest - 15 * less) >> 1)):
        zero = torch.minimum(zero.clamp(min=-128), 127 - 15 * step)
        nibbles = ((2 * (both - zero) + step) // (2 * step)).clamp(0, 15)  # rounds half up
        found = (zero + step * nibbles - both).square().sum(-1, keepdim=True), step, zero, nibbles
        if not best:
            best = found
        better = found[0] < best[0]
        best = tuple(torch.where(better, x, y) for x, y in zip(found, best, strict=True))
    _, step, zero, nibbles = best
    first = both[..., 0, :] + 128
    step[..., 0, :], zero[..., 0, :], nibbles[..., 0, :] = 16, -128, first >> 4

    def pack(nibbles: torch.Tensor) -> torch.Tensor:
        low, high = nibbles.to(torch.uint8).chunk(2, -1)
        return (low | (high << 4)).view(torch.int8)

    groups = torch.cat([step, zero], -1).transpose(-1, -2).to(torch.int8)
    return pack(nibbles).flatten(-2), groups, pack(first & 0xF)


def unpack_int4(packed: torch.Tensor, groups: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_int4`: INT8 codes zero + step * nibble (+ low nibble in the first group), int8 [..., head_dim]."""

    def unpack(packed: torch.Tensor) -> torch.Tensor:
        return torch.stack([packed & 0xF, (packed >> 4) & 0xF], -2)

    nibbles = unpack(packed).unflatten(-1, (-1, GROUP_BYTES))  # [..., half, groups, 8]
    step, zero = groups[..., None, :, None].unbind(-4)
    codes = zero + step * nibbles  # int8, which wraps around on the way
    codes[..., 0, :] += unpack(low)
    return codes.flatten(-3)


def code_product(q: torch.Tensor, k: torch.Tensor, k_scale: torch.Tensor) -> torch.Tensor:
    """Q K^T of codes q [..., queries, head_dim] and k [..., tokens, head_dim], times k_scale [..., tokens]: float32 [...,
    queries, tokens]. INT8 products are exact in float32: |sum| <= 127 * 128 * 512 < 2**24."""
    return torch.matmul(q.float(), k.float().transpose(-1, -2)) * k_scale[..., None, :]


def qk_product(terms: QueryTerms, k: torch.Tensor, k_scale: torch.Tensor) -> torch.Tensor:
    """Q K^T summed over the terms of Q, dequantized: float32 [..., queries, tokens]."""
    logits, *others = (code_product(codes, k, k_scale).mul_(q_scale[..., None]) for codes, q_scale in terms)
    for other in others:
        logits += other
    return logits


def quantize_v(value: torch.Tensor, fine: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """value [..., head_dim] -> float8_e4m3fn codes of the same shape, float32 exponents [...]: value = code * 2**exponent.

    2**exponent is the least power of two that holds the largest value. If `fine`, 8/7, 8/6 and 8/5 of it compete too, and the
    scale with the least squared error wins (the first of equals).
    """
    value = value.float()
    power = _next_power_of_two(value.abs().amax(-1) / FP8_MAX).clamp(*V_SCALES)

    def codes(inverse: torch.Tensor) -> torch.Tensor:
        return (value * inverse[..., None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)

    def error(inverse: torch.Tensor) -> torch.Tensor:
        return (codes(inverse).float() - value * inverse[..., None]).square().sum(-1)

    whole = (power.view(torch.int32) >> 23).float() - 127
    exponent, inverse = whole, 1 / power
    if fine:
        least = error(inverse)
        for eighths in V_EIGHTHS:
            smaller = eighths / 8 / power
            found = error(smaller) * (64 / eighths**2)
            better = (found < least) & (power <= V_SCALE_FINE)
            least, inverse = torch.where(better, found, least), torch.where(better, smaller, inverse)
            exponent = torch.where(better, whole + fine_exponent(eighths), exponent)
    return codes(inverse), exponent


def v_inverse_bits(v_bits):  # without annotations, which Triton would look up
    """The inverses of V's scales times 2 to this power are e4m3 numbers: V_SCALES, V_INT4_INVERSE."""
    return 5.0 if v_bits == 4 else -8.0


def rotation_span(head_dim):  # without annotations, which Triton would look up
    """Channels that `rotate_values` mixes: a power of 4, whose square root floating-point numbers hold exactly."""
    return 64 if head_dim % 64 == 0 else 16


@functools.cache
def rotation_signs(head_dim: int) -> torch.Tensor:
    """The signs of `rotate_values`, float32 [head_dim]: the Rudin-Shapiro sequence, which is -1 where the bits of the channel
    have an odd number of pairs 11. It looks like noise to a Hadamard matrix, which maps a constant vector to a single peak."""
    return torch.tensor([1.0 - 2.0 * ((c & (c >> 1)).bit_count() & 1) for c in range(head_dim)])


def _hadamard(x: torch.Tensor) -> torch.Tensor:
    """x [..., head_dim] times the normalized Hadamard matrix of each `rotation_span` channels, which is its own inverse."""
    y = x.unflatten(-1, (-1, rotation_span(x.shape[-1])))
    for bit in range(y.shape[-1].bit_length() - 1):  # a fixed order: a matrix product's depends on the number of rows
        even, odd = y.unflatten(-1, (-1, 2)).unbind(-1)
        total = even + odd  # from bit 3 on, kernels have a partner in another thread, and see only their sum
        y = torch.cat([total, even - odd if bit < 3 else total - 2 * odd], -1)
    return (y * y.shape[-1] ** -0.5).flatten(-2)


def rotate_values(value: torch.Tensor) -> torch.Tensor:
    """value [..., head_dim] -> float32 of the same shape: signs, then a Hadamard matrix over each `rotation_span` channels."""
    return _hadamard(value.float() * rotation_signs(value.shape[-1]))


def rotate_values_back(out: torch.Tensor) -> torch.Tensor:
    """The inverse of `rotate_values`, for the output of attention, float32 [..., head_dim]."""
    return _hadamard(out) * rotation_signs(out.shape[-1])


def v_int4_level(magnitude):  # without annotations, which Triton would look up
    """The level of a 4-bit value's magnitude, 0 to 7, in units of 2**-9. E4m3 codes up to 16 are these units; from there to 24
    a step of the code is two."""
    code = 3 * magnitude + magnitude // 4 + 1
    return code if code < 16 else 2 * code - 16


def v_levels(nibbles: torch.Tensor) -> torch.Tensor:
    """The e4m3 numbers of 4-bit values, float32: from int [...] of 0 to 15 (see `sage_paged.layout`)."""
    magnitude = nibbles & 7
    code = (nibbles & 8) << 4 | (3 * magnitude + (magnitude >> 2) + 1)
    return code.to(torch.uint8).view(torch.float8_e4m3fn).float()


def quantize_v_int4(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated values [..., head_dim] -> nibbles, int32 of the same shape, and float32 exponents [...]: value = `v_levels` *
    2**exponent.

    The inverse of the scale is an e4m3 number over 32 (V_INT4_INVERSE), as which kernels multiply it. The fraction of the
    exponent is rounded to 16 bits, so that every device finds the same. A value halfway between two levels gets the smaller
    one. A token with a value that is not finite gets the exponent NaN: its levels could not say so.
    """
    value = value.float()
    amax = value.abs().amax(-1)
    inverse = (V_INT4_INVERSE / amax).clamp(V_INT4_LEAST, FP8_MAX).to(torch.float8_e4m3fn).float() / 32
    levels = torch.tensor([float(v_int4_level(m)) for m in range(8)], device=value.device)
    codes = torch.bucketize(value.abs() * (inverse * 512)[..., None], (levels[1:] + levels[:-1]) / 2)
    mantissa, power = inverse.frexp()
    exponent = -power - (mantissa.log2() * 65536).round() / 65536
    return (codes | (value < 0).long() << 3).int(), torch.where(amax.isfinite(), exponent, torch.nan)


def quantize_p(
    logits: torch.Tensor, page_tokens: int, dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round P to e4m3, or to `dtype`: float16 on GPUs without FP8 (`device.fp8_path`). logits: base-2, float32 [..., queries,
    tokens]; the first token is the first of a page.

    Returns the weights 2**(logits - m_ref) after rounding, float32 of the same shape, and m_ref, float32 [..., queries, 1],
    which is P_BITS below the row's largest logit m_i.

    A page's codes are relative to the row's largest logit in that page. So the page's largest weight is exact, and the codes
    depend on nothing outside the page. The reference of a page is at least m_i - FALL_BITS.
    """
    tokens = logits.shape[-1]
    if tokens % page_tokens:
        logits = torch.nn.functional.pad(logits, (0, -tokens % page_tokens), value=float("-inf"))
    paged = logits.unflatten(-1, (-1, page_tokens))
    page_max = paged.amax(-1, keepdim=True)
    m_i = page_max.amax(-2, keepdim=True)
    page_max = torch.maximum(page_max, m_i - FALL_BITS)
    weights = (paged - (page_max - P_BITS)).exp2_().to(dtype).float()
    weights *= (page_max - m_i).exp2_()
    return weights.flatten(-2)[..., :tokens], m_i.squeeze(-1) - P_BITS
