"""The specification: what every kernel of this package computes, in plain torch and float32.

Quantization follows SageAttention (Zhang et al., ICLR 2025, section 4) and SageAttention2 (Zhang et al., ICML 2025,
section 3): INT8 queries and keys for Q K^T, FP8 e4m3 probabilities and values for P V. Scales are per token and head, because
a page must never depend on which tokens happen to be neighbours. INT4 keys are kept in 4 bits and multiplied as the INT8 codes
they stand for: for every 16 channels, 16 of these codes a step apart, those that lie nearest to the channels' own (`narrow`).

P takes over the scale of a token's V before it is rounded: the scale's logarithm is added to the token's base-2 logit. What is
subtracted before the exponential is the largest of these sums that a row has in a page. So the largest weight in a page is
exact, and what P is rounded to does not depend on the order in which a kernel walks the pages, on how it splits them, or on how
the prompt was cut into chunks; only float32 summation order is left. Rows are normalized by the sum of the rounded P, not of
the exact one: a row that looks at one token gets exactly its value.

Keys are smoothed, as SageAttention does it, by subtracting a vector that all keys of a head have in common: a row's logits
then all change by the same number, and the softmax not at all. SageAttention takes the mean of the keys at hand; pages outlive
those, so here it is an anchor, fixed once by the first tokens (`fix_anchor`).

Values can be smoothed likewise (SageAttention2, on V): the weights of a row sum up to 1, so what all values lack is added to
the normalized output. Their anchor comes from a calibration only, never from first tokens: where values have nothing in
common, a mean over few of them would add more to the others than it takes away.

Queries can be smoothed, too (SageAttention2, section 3.2): a block of them is quantized less its mean, whose products with the
keys are added to the logits. The mean is itself in INT8 codes, and what is taken off is what these stand for: however it was
rounded, the two parts add up to the query, and all products are those of integers (`query_parts`).
"""

import math
from dataclasses import dataclass

import torch

from sage_paged import GROUP_BYTES, Memory, PageLayout, v_position

FP8_MAX = 448.0
P_BITS = 8
"""The largest P of a row in a page is 2**P_BITS, which uses the range of e4m3 (largest number 448) and is exact."""
FALL_BITS = 32
"""How far below the largest logit of a row, in base 2, a page is still given a reference of its own: sums in float32 have room
for that, and what is smaller is nothing beside them."""
LOG2E = 1.4426950408889634
ANCHOR_TOKENS = 32
"""Tokens at a batch's start whose mean key an anchor becomes. Few enough that a first prompt fixes the same anchor, whatever
the chunks are that it comes in."""
TILE_ROWS = 64
"""The least rows of a tile of a prompt's queries: tokens times heads of a group."""
SCORE_BITS = 20
"""Leading bits of a float32 score that tell pages apart. Of pages that are equal in these, the earlier one is chosen."""
REACH = 2.0
"""How far around a page's mean key its keys are taken to lie, in half ranges of the channels (see `recall`)."""
V_SCALES = (2.0**-16, 2.0)
"""The least and the largest power of two that V is scaled by, between which inverses fit e4m3 as well. V beyond +-896
saturates, and numbers below 2**-26 become 0."""
V_EIGHTHS = range(7, 4, -1)
"""What inverses of finer scales of V are of those of powers of two. With three bits, they fit e4m3, too, up to V_SCALE_FINE."""
V_SCALE_FINE = 0.25


def finer(eighths):  # without annotations, which Triton would look up
    """What such a scale adds to V's exponent."""
    return 3 - math.log2(eighths)


def _symmetric(x: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes in [-largest, largest] (int8, shape of x) and the scale over the last dimension (float32)."""
    amax = x.abs().amax(-1)
    inverse = torch.where(amax > 0, torch.full_like(amax, largest) / amax, 0.0)  # a scalar / tensor is not rounded once
    return (x * inverse[..., None]).round().clamp(-largest, largest).to(torch.int8), amax / largest


def quantize_q(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """query [..., head_dim] -> int8 codes of the same shape, float32 scales [...]."""
    return _symmetric(query.float(), 127)


def tile_rows(group: int) -> int:
    """Rows of a tile of a prompt's queries, for `group` heads that share a KV head: a power of two."""
    return max(TILE_ROWS, 1 << (group - 1).bit_length())


def tile_tokens(group: int) -> int:
    """Tokens of such a tile: the block whose mean is taken off where a prompt's queries are smoothed."""
    return tile_rows(group) // group


Parts = list[tuple[torch.Tensor, torch.Tensor]]
"""Queries as a sum: of each part, int8 codes [..., queries, head_dim] and float32 scales [..., queries]."""


def query_parts(query: torch.Tensor, scale: float, q_block: int = 0) -> Parts:
    """query [..., queries, head_dim], times scale: one part (`quantize_q`), or, if q_block is not 0, two: what queries have
    beside the mean of their block, and that mean. Blocks are of q_block queries, from the first on; the last may have fewer."""
    query, mean = query.float(), None
    if q_block:
        mean = quantize_q(torch.cat([x.mean(-2, keepdim=True).expand_as(x) for x in query.split(q_block, -2)], -2))
        query = query - mean[0] * mean[1][..., None]
    parts = [quantize_q(query)] if mean is None else [quantize_q(query), mean]
    return [(codes, q_scale * scale) for codes, q_scale in parts]


def quantize_k(key: torch.Tensor, k_bits: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """key [..., head_dim] -> int8 codes of the same shape, for INT4 keys those they stand for, and float32 scales [...]."""
    codes, scale = _symmetric(key.float(), 127)
    return (codes if k_bits == 8 else widen(*narrow(codes))), scale


def narrow(codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """INT8 codes in 4 bits: int8 [..., head_dim] -> int8 bytes [..., head_dim // 2] of two nibbles each, and int8 steps and
    bases [..., 2, groups] (see `sage_paged.layout`).

    The step is the smallest that takes 16 levels from a group's least to its largest code, or one less; the levels begin at the
    least code, end at the largest, or lie in the middle between. Of these six, the one with the smallest sum of squared errors
    is taken, of equals the first.
    """
    low, high = (half.int().unflatten(-1, (-1, GROUP_BYTES)) for half in codes.chunk(2, -1))
    both = torch.cat([low, high], -1)
    least, largest = both.amin(-1, keepdim=True), both.amax(-1, keepdim=True)
    whole = ((largest - least + 14) // 15).clamp(min=1)
    best: tuple[torch.Tensor, ...] = ()
    for step in (whole, (whole - 1).clamp(min=1)):
        for base in (least, largest - 15 * step, (least + largest - 15 * step) >> 1):
            base = torch.minimum(base.clamp(min=-128), 127 - 15 * step)
            nibbles = ((2 * (both - base) + step) // (2 * step)).clamp(0, 15)  # rounded, what is in the middle up
            found = (base + step * nibbles - both).square().sum(-1, keepdim=True), step, base, nibbles
            if not best:
                best = found
            better = found[0] < best[0]
            best = tuple(torch.where(better, x, y) for x, y in zip(found, best, strict=True))
    _, step, base, nibbles = best
    low, high = nibbles.to(torch.uint8).chunk(2, -1)
    return (low | (high << 4)).flatten(-2).view(torch.int8), torch.cat([step, base], -1).transpose(-1, -2).to(torch.int8)


def widen(packed: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """The INT8 codes, int8 [..., head_dim], that bytes, steps and bases stand for (see `narrow`)."""
    nibbles = torch.stack([packed & 0xF, (packed >> 4) & 0xF], -2).unflatten(-1, (-1, GROUP_BYTES))  # [..., half, groups, 8]
    step, base = groups[..., None, :, None].unbind(-4)
    return (base + step * nibbles).flatten(-3)


def products(q: torch.Tensor, k: torch.Tensor, k_scale: torch.Tensor) -> torch.Tensor:
    """Q K^T of the codes q [..., queries, head_dim] with the keys that the codes k [..., tokens, head_dim] and their scales
    k_scale [..., tokens] stand for, float32 [..., queries, tokens]."""
    return torch.matmul(q.float(), k.float().transpose(-1, -2)) * k_scale[..., None, :]


def times_keys(parts: Parts, k: torch.Tensor, k_scale: torch.Tensor) -> torch.Tensor:
    """The sum of the `products` of all parts of queries, with their scales: float32 [..., queries, tokens]."""
    logits, *others = (products(codes, k, k_scale).mul_(q_scale[..., None]) for codes, q_scale in parts)
    for other in others:
        logits += other
    return logits


def quantize_v(value: torch.Tensor, fine: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """value [..., head_dim] -> float8_e4m3fn codes of the same shape, float32 exponents [...]: value = code * 2**exponent.

    2**exponent is the least power of two that holds the largest value; if `fine`, it is 8/7, 8/6 or 8/5 of that where that
    loses less, of equals the first.
    """
    value = value.float()
    ratio = (value.abs().amax(-1) / FP8_MAX).contiguous()
    power = ((ratio.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)  # up to the next power of two
    power = power.clamp(*V_SCALES)

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
            exponent = torch.where(better, whole + finer(eighths), exponent)
    return codes(inverse), exponent


def quantize_p(logits: torch.Tensor, page_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights 2**(logits - base) as e4m3 codes give them, float32 of the logits' shape [..., queries, tokens], and base,
    float32 [..., queries, 1], P_BITS below the largest logit of a row. The first token is the first of a page.

    The codes of a page are relative to the largest logit that the row has in it, so that its largest weight is exact and codes
    depend on nothing outside the page; or, where that is further down, to FALL_BITS below the largest of the row.
    """
    tokens = logits.shape[-1]
    if tokens % page_tokens:
        logits = torch.nn.functional.pad(logits, (0, -tokens % page_tokens), value=float("-inf"))
    paged = logits.unflatten(-1, (-1, page_tokens))
    of_page = paged.amax(-1, keepdim=True)
    top = of_page.amax(-2, keepdim=True)
    of_page = torch.maximum(of_page, top - FALL_BITS)
    weights = (paged - (of_page - P_BITS)).exp2_().to(torch.float8_e4m3fn).float()
    weights *= (of_page - top).exp2_()
    return weights.flatten(-2)[..., :tokens], top.squeeze(-1) - P_BITS


def fix_anchor(anchor: torch.Tensor, key: torch.Tensor, used: torch.Tensor) -> None:
    """Fix the anchors, float32 [kv_heads, head_dim], of heads that have none yet and are NaN.

    An anchor becomes the mean of the used ones among the first ANCHOR_TOKENS keys (0 if none of these is used, and in channels
    where the mean is not finite), and never changes again. Batches of padding alone fix nothing. key: [tokens, kv_heads,
    head_dim]; used: bool [tokens].
    """
    if anchor.isnan().any() and used.any():
        first = key[:ANCHOR_TOKENS][used[:ANCHOR_TOKENS]].float()
        mean = first.mean(0).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        anchor.copy_(torch.where(anchor.isnan(), mean, anchor))


def store(
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    slots: torch.Tensor,
    layout: PageLayout,
    anchor: torch.Tensor | None = None,
    v_anchor: torch.Tensor | None = None,
) -> None:
    """Quantize tokens and write them into their pages.

    key, value: [tokens, kv_heads, head_dim], any float dtype. pages: uint8 [blocks, kv_heads, page_bytes], written in place.
    slots: int [tokens]; token t goes to block slots[t] // layout.tokens; a negative slot is padding and is skipped.
    anchor: float32 [kv_heads, head_dim], what is subtracted from keys; where it is NaN, it is fixed first (`fix_anchor`).
    v_anchor: the same for values, without NaN.
    """
    used = slots >= 0
    if anchor is not None:
        fix_anchor(anchor, key, used)
    slots = slots[used].long()
    block, offset = slots // layout.tokens, slots % layout.tokens
    views = layout.views(pages)
    k_codes, k_scale = quantize_k(key[used] if anchor is None else key[used].float() - anchor)
    v_codes, v_exponent = quantize_v(value[used] if v_anchor is None else value[used].float() - v_anchor, layout.k_bits == 8)
    if views.k_groups is not None:
        k_codes, views.k_groups[block, :, offset] = narrow(k_codes)
        biased = v_exponent.int() + 127
        k_scale = ((k_scale.contiguous().view(torch.int32) & ~0xFF) | biased).view(torch.float32)
    if views.v_exponent is not None:
        views.v_exponent[block, :, offset] = v_exponent
    views.k[block, :, offset] = k_codes
    # torch cannot index-assign float8, so the codes travel as bytes.
    views.v.view(torch.uint8)[block, :, :, v_position(offset)] = v_codes.view(torch.uint8)
    views.k_scale[block, :, offset] = k_scale


def key_codes(pages: torch.Tensor, layout: PageLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """INT8 codes [..., tokens, head_dim] and float32 scales [..., tokens] of the keys in pages [..., page_bytes]."""
    views = layout.views(pages)
    return (views.k if views.k_groups is None else widen(views.k, views.k_groups)), views.k_scale


def load(
    pages: torch.Tensor, block_table: torch.Tensor, layout: PageLayout
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gather the pages of one request.

    block_table: int [n], or [kv_heads, n] where heads read different pages. Returns K as INT8 codes
    [kv_heads, n * tokens, head_dim], V codes float32 of the same shape, and behind each its scales or
    exponents, float32 [kv_heads, n * tokens].
    """
    heads = torch.arange(pages.shape[1], device=pages.device)[:, None]
    pages = pages[block_table.long().expand(pages.shape[1], -1), heads]
    views = layout.views(pages)
    k_codes, k_scale = key_codes(pages, layout)
    v_codes = views.v.float()[..., v_position(torch.arange(layout.tokens, device=pages.device))].transpose(-1, -2)
    v_exponent = views.v_exponent
    if v_exponent is None:
        v_exponent = ((k_scale.view(torch.int32) & 0xFF) - 127).float()
    return k_codes.flatten(1, 2), k_scale.flatten(1), v_codes.flatten(1, 2), v_exponent.flatten(1)


def exact_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `attention` is an approximation of, for one request: the last queries of unquantized tokens, in float32.

    query: [queries, heads, head_dim]; key, value: [tokens, kv_heads, head_dim]. Returns float32 of query's shape.
    """
    tokens, group = len(key), query.shape[1] // key.shape[1]
    q, k, v = (x.float().transpose(0, 1) for x in (query, key, value))
    logits = q @ k.repeat_interleave(group, 0).transpose(1, 2) * scale
    if soft_cap:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    positions = torch.arange(tokens - len(query), tokens, device=key.device)[:, None]
    keys = torch.arange(tokens, device=key.device)
    hidden = keys > positions
    if window:
        hidden |= keys <= positions - window
    logits = logits.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        logits = torch.cat([logits, sinks.float()[:, None, None].expand(-1, len(query), 1)], 2)
    return (logits.softmax(-1)[..., :tokens] @ v.repeat_interleave(group, 0)).transpose(0, 1)


@dataclass(frozen=True)
class Turns:
    """How far queries are turned for each page, so that the page is read as if it were nearer.

    pages: int32 [requests, kv_heads, blocks], by how many pages, entry by entry of a block table. table: float32
    [pages, head_dim], the cosines of a turn's angles and, in the second half of the channels, their sines (`turn_table`).
    """

    pages: torch.Tensor
    table: torch.Tensor


def turn_table(frequencies: torch.Tensor, pages: int, page_tokens: int) -> torch.Tensor:
    """The `Turns.table` for up to `pages` pages. frequencies: [head_dim // 2], radians a token, of a rotary embedding that
    pairs channel c with channel c + head_dim // 2."""
    angles = torch.arange(pages, dtype=torch.float64)[:, None] * page_tokens * frequencies.double()
    return torch.cat([angles.cos(), angles.sin()], -1).float()


def turned(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """x: float32 [..., head_dim], moved towards the start of the context by turns, rows of a `turn_table` [..., head_dim]."""
    (low, high), (cos, sin) = x.chunk(2, -1), turn.chunk(2, -1)
    return torch.cat([low * cos + high * sin, high * cos - low * sin], -1)


def attention(
    query: torch.Tensor,
    pages: torch.Tensor,
    layout: PageLayout,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    anchor: torch.Tensor | None = None,
    v_anchor: torch.Tensor | None = None,
    turns: Turns | None = None,
    q_block: int = 0,
) -> torch.Tensor:
    """Causal attention of every request's last tokens over its pages.

    query: [tokens, heads, head_dim]; request r owns rows query_start_loc[r] to query_start_loc[r + 1], and they are the
    last of its seq_lens[r] tokens. block_table: int [requests, blocks], or [requests, kv_heads, blocks] where heads read
    different pages. scale multiplies the logits. window: a query sees itself and the window - 1 tokens before it, 0 for all.
    soft_cap: logits become cap * tanh(logits / cap), 0 for none. sinks: [heads], logits of an extra key without a value.
    anchor: that of the stored keys; only soft_cap, sinks and turns need it, for which it is not enough to know logits up to a
    number that a row's have in common. v_anchor: that of the stored values. turns: how queries are turned for each page.
    q_block: tokens of a block, counted from a request's first query, whose queries are smoothed by their mean; 0 for none.
    Returns float32 of query's shape; rows of no request stay 0.
    """
    heads, kv_heads = query.shape[1], pages.shape[1]
    out = torch.zeros(query.shape, dtype=torch.float32)
    for r in range(seq_lens.numel()):
        start, end, length = int(query_start_loc[r]), int(query_start_loc[r + 1]), int(seq_lens[r])
        if start == end:
            continue
        used_pages = -(-length // layout.tokens)
        k, k_scale, v, v_exponent = (x[:, :length] for x in load(pages, block_table[r, ..., :used_pages], layout))
        positions = torch.arange(length - (end - start), length)[:, None]
        keys = torch.arange(length)[None, :]
        visible = keys <= positions
        if window:
            visible &= keys > positions - window
        for head in range(heads):
            kv = head // (heads // kv_heads)
            logits = times_keys(query_parts(query[start:end, head], scale, q_block), k[kv], k_scale[kv])
            bias = 0.0 if anchor is None else (query[start:end, head].float() @ anchor[kv])[:, None] * scale
            if turns is not None:
                for page, turn in enumerate(turns.pages[r, kv, :used_pages].tolist()):
                    turned_query = turned(query[start:end, head].float(), turns.table[turn])
                    own = slice(page * layout.tokens, (page + 1) * layout.tokens)
                    parts = query_parts(turned_query, scale, q_block)
                    logits[:, own] = times_keys(parts, k[kv, own], k_scale[kv, own])
                    if anchor is not None:
                        logits[:, own] += (turned_query @ anchor[kv])[:, None] * scale - bias
            if soft_cap:
                logits, bias = soft_cap * torch.tanh((logits + bias) / soft_cap), 0.0
            logits = (logits * LOG2E).masked_fill(~visible, float("-inf"))
            p8, base = quantize_p(logits + v_exponent[kv], layout.tokens)
            total = (p8 * (-v_exponent[kv]).exp2()).sum(-1, keepdim=True)
            result = p8 @ v[kv]
            if v_anchor is not None:  # weighted as values are, and a sink has none
                result += total * v_anchor[kv]
            if sinks is not None:
                total = total + torch.exp2((sinks[head].float() - bias) * LOG2E - base)
            out[start:end, head] = result / total
    return out


def store_summaries(
    pages: torch.Tensor,
    layout: PageLayout,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    turn_table: torch.Tensor | None = None,
    anchor: torch.Tensor | None = None,
) -> None:
    """Write the summaries of the pages that a step has filled: of each channel, the mean key and half the range of the keys.

    The tensors are those of `attention`, block_table with one list for all heads; the step's tokens are stored already. With a
    turn_table, keys are taken as they would be if the page were the first of its context, for which their anchor is needed.
    A page whose last token is stored anew, as those of rejected drafts are, gets its summary anew.
    """
    views = layout.views(pages)
    assert views.summary is not None
    for r in range(seq_lens.numel()):
        length, queries = int(seq_lens[r]), int(query_start_loc[r + 1] - query_start_loc[r])
        for page in range((length - queries) // layout.tokens, length // layout.tokens):
            block = int(block_table[r, page])
            codes, k_scale = key_codes(pages[block], layout)
            key = codes * k_scale[..., None]
            if turn_table is not None:
                key = turned(key if anchor is None else key + anchor[:, None], turn_table[page])
            views.summary[block] = torch.stack([key.mean(1), (key.amax(1) - key.amin(1)) / 2], 1).half()


@dataclass(frozen=True)
class PageLists:
    """What rows of queries read, as `attention` takes it, with rows in the place of requests.

    block_table: int32 [rows, kv_heads, pages]; seq_lens: int32 [rows]; query_start_loc: int32 [rows + 1].
    """

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    turns: Turns | None


def max_rows(tokens: int, requests: int, query_block: int) -> int:
    """The most rows of a step: blocks of query_block positions that some request has a token in, or, without, requests."""
    return tokens // query_block + 2 * requests if query_block else requests


def recall(
    query: torch.Tensor,
    pages: torch.Tensor,
    layout: PageLayout,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    memory: Memory,
    query_block: int,
    turn_table: torch.Tensor | None = None,
) -> PageLists:
    """Choose the pages that each row of queries reads (see `sage_paged.memory`).

    The tensors are those of `attention`, block_table with one list for all heads. query_block: positions of a row; 0 for one
    row a request. turn_table: needed where memory.trained_tokens is not 0.

    A page's score is the largest product that a query could have with keys in an ellipsoid around the page's mean key, whose
    axes are REACH half ranges long. Taken over the row's queries, of all heads that share the KV head, it is the mean for the
    ellipsoid's center, and for what its extent adds the root of the mean square. With a turn_table, it is that at the distance
    of the page before the local ones, for every query as if it stood in the first local_tokens behind it.
    """
    kv_heads, tokens = pages.shape[1], layout.tokens
    summary = layout.views(pages).summary
    assert summary is not None
    first_token = int(query_start_loc[0])
    rows = max_rows(query.shape[0], seq_lens.numel(), query_block)
    width = memory.list_pages(tokens, query_block or int(query_start_loc.diff().max()))
    table = torch.zeros(rows, kv_heads, width, dtype=torch.int32)
    turn_counts = torch.zeros_like(table)
    lengths, starts = torch.zeros(rows, dtype=torch.int32), torch.full((rows + 1,), int(query_start_loc[-1]), dtype=torch.int32)
    sinks = memory.sink_pages(tokens)
    row = 0
    for r in range(seq_lens.numel()):
        start, length = int(query_start_loc[r]), int(seq_lens[r])
        begin = length - (int(query_start_loc[r + 1]) - start)  # the position of the first query
        # As in `tiles.find_request`: where a request's rows are does not depend on the lengths of the others' contexts.
        row = (start - first_token) // query_block + 2 * r if query_block else r
        low = begin
        while low < length:
            high = min(length, (low // query_block + 1) * query_block) if query_block else length
            local = memory.local_page(low, tokens)
            found = torch.arange(min(sinks, local), local)
            q = query[start + low - begin : start + high - begin].float()
            if turn_table is not None:
                nearer = (torch.arange(low, high) // tokens - memory.local_tokens // tokens - 1).clamp(min=0)
                q = turned(q, turn_table[nearer][:, None])
            q = q.unflatten(1, (kv_heads, -1))
            blocks = block_table[r].long()
            chosen = found.expand(kv_heads, -1)
            if len(found) > memory.topk_pages:
                center, radius = summary[blocks[found]].float().unbind(2)  # [pages, kv_heads, head_dim]
                extent = (q.square().mean((0, 2)) * radius.square()).sum(-1).sqrt()
                scores = ((q.mean((0, 2)) * center).sum(-1) + REACH * extent).T.contiguous()
                coarse = (scores.view(torch.int32) >> (32 - SCORE_BITS) << (32 - SCORE_BITS)).view(torch.float32)
                order = coarse.sort(descending=True, stable=True).indices
                chosen = found[order[:, : memory.topk_pages]].sort().values
            every = torch.arange(min(sinks, local)).expand(kv_heads, -1)
            rest = torch.arange(local, -(-high // tokens)).expand(kv_heads, -1)
            listed = torch.cat([every, chosen, rest], 1)
            table[row, :, : listed.shape[1]] = blocks[listed].int()
            if memory.trained_tokens and high > memory.trained_tokens:
                turn_counts[row, :, : listed.shape[1]] = (local - 1 - listed).clamp(min=0).int()
            lengths[row] = (every.shape[1] + chosen.shape[1]) * tokens + high - local * tokens
            starts[row] = start + low - begin
            starts[row + 1 :] = start + high - begin
            low, row = high, row + 1
    return PageLists(table, lengths, starts, None if turn_table is None else Turns(turn_counts, turn_table))
