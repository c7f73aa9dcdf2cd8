# SPDX-License-Identifier: Apache-2.0
"""`reference.attention` for a CPU that serves requests: all heads at once, short queries of several requests at once, and only
the pages that they see.

The arithmetic is that of the kernels. INT8 products are exact in float32, which on a CPU is the fast way to compute them. Codes
of 4 bits are unpacked eight bytes at a time, in integers of 64 bits. To and from e4m3, torch converts one number after another;
here, integer operations do. Tokens stay in the order that values have in a page (`v_position`): moving keys into it is part of
their conversion.

Storing needs no version of its own: `reference.store` takes all tokens at once.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from sage_kernels.batch import LayerCalibration, Modifiers, PagedBatch, RopeShift
from sage_kernels.reference import (
    FALL_BITS,
    LOG2E,
    P_BITS,
    QueryTerms,
    prepare_queries,
    qk_product,
    query_terms,
    rotate_values_back,
    turn_back,
    visible_keys,
)
from sage_paged import GROUP_BYTES, PageLayout, v_token

MAX_LOGITS = 1 << 19
"""Elements of the logits matrix that is held at a time, so that a core's cache holds it; longer prompts are taken in parts."""
FEW_QUERIES = 16
"""Requests with as many queries or fewer are taken together."""
MAX_KEYS = 1 << 20
"""Elements of the keys of requests that are taken together. Beyond, there is nothing to gain."""
OVER_FLOAT16 = 256.0
"""An e4m3 number, over the float16 number with the same sign, exponent bits and mantissa."""


@dataclass(frozen=True)
class _Piece:
    """Queries that attend at once: `queries` of each of some requests, and as many pages of each as the longest needs.

    requests, first_row, end_position, first_page: int64 [requests]; the first query's row in the batch, the position one past
    that of the last query, and the first page that is seen.
    """

    requests: torch.Tensor
    first_row: torch.Tensor
    end_position: torch.Tensor
    first_page: torch.Tensor
    queries: int
    pages: int
    page_tokens: int

    def rows(self) -> torch.Tensor:
        """int64 [requests * queries]."""
        return (self.first_row[:, None] + torch.arange(self.queries)).flatten()

    def positions(self) -> torch.Tensor:
        """Of the queries, int64 [requests, queries]."""
        return self.end_position[:, None] + torch.arange(-self.queries, 0)

    def places(self) -> torch.Tensor:
        """Of pages in the requests' block tables, int64 [requests, pages]. Behind a request's last page, that page again."""
        last = (self.end_position - 1) // self.page_tokens
        return torch.minimum(self.first_page[:, None] + torch.arange(self.pages), last[:, None])

    @cached_property
    def keys(self) -> torch.Tensor:
        """The positions of keys in the order of V, int64 [requests, tokens]."""
        return self.first_page[:, None] * self.page_tokens + v_token(torch.arange(self.pages * self.page_tokens))


@dataclass(frozen=True)
class _Stored:
    """Keys and values of a piece, tokens in the order of V.

    k: INT8 codes, float32 [kv_heads, requests, tokens, head_dim]; v: codes over OVER_FLOAT16, float32 [kv_heads, requests,
    head_dim, tokens]; k_scale, v_exponent: float32 [kv_heads, requests, tokens].
    """

    k: torch.Tensor
    k_scale: torch.Tensor
    v: torch.Tensor
    v_exponent: torch.Tensor

    def of(self, tokens: slice) -> "_Stored":
        return _Stored(self.k[:, :, tokens], self.k_scale[..., tokens], self.v[..., tokens], self.v_exponent[..., tokens])


@dataclass(frozen=True)
class _Queries:
    """How queries become terms of Q K^T. calibration: from `Modifiers.calibration_for`."""

    layout: PageLayout
    calibration: LayerCalibration
    q_block: int
    scale: float

    def terms(self, q: torch.Tensor) -> QueryTerms:
        """Queries [kv_heads, requests, group, queries, head_dim], prepared and quantized."""
        return query_terms(prepare_queries(q, self.calibration, self.layout), self.scale, self.q_block)

    def bias(self, q: torch.Tensor) -> torch.Tensor:
        """What base-2 logits lack by the anchor, [kv_heads, requests, group, queries, 1]."""
        if self.calibration.k_anchor is None:
            return torch.zeros(*q.shape[:-1], 1)
        return (q.float() @ self.calibration.k_anchor[:, None, None, :, None]) * self.scale


def attention(
    query: torch.Tensor,
    pages: torch.Tensor,
    layout: PageLayout,
    batch: PagedBatch,
    scale: float,
    out: torch.Tensor,
    modifiers: Modifiers | None = None,
) -> None:
    """`reference.attention` with the same arguments; writes `out`, which has query's shape, rows of no request excepted."""
    modifiers = modifiers or Modifiers()
    kv_heads = pages.shape[1]
    for piece in _pieces(kv_heads, layout, batch, modifiers.window):
        stored = _load(pages, batch.block_table, piece, layout)
        for part in _parts(piece, query.shape[1], modifiers):
            rows = part.rows()
            q = query.index_select(0, rows).view(len(part.requests), part.queries, kv_heads, -1, layout.head_dim)
            start = int(part.first_page[0] - piece.first_page[0]) * layout.tokens
            own = stored.of(slice(start, start + part.pages * layout.tokens))
            result = _attend(q.permute(2, 0, 3, 1, 4), own, part, layout, batch, scale, modifiers)
            out.index_copy_(0, rows, result.permute(1, 3, 0, 2, 4).reshape(len(rows), *query.shape[1:]).to(out.dtype))


def _pieces(kv_heads: int, layout: PageLayout, batch: PagedBatch, window: int) -> Iterator[_Piece]:
    """The requests' queries: those of a prompt alone, a few together with those of requests that see about as many pages."""
    starts, lengths = batch.query_start_loc.tolist(), batch.seq_lens.tolist()
    alike: defaultdict[tuple[int, int, int | None], list[tuple[int, ...]]] = defaultdict(list)
    for request, length in enumerate(lengths):
        queries = starts[request + 1] - starts[request]
        if queries == 0:
            continue
        first = _first_page(length, queries, layout.tokens, window)
        pages = -(-length // layout.tokens) - first
        alone = request if queries > FEW_QUERIES else None
        alike[queries, pages.bit_length(), alone].append((request, starts[request], length, first, pages))
    for (queries, bits, _), requests in alike.items():
        together = max(1, MAX_KEYS // (kv_heads * layout.tokens * layout.head_dim << bits))
        for nth in range(0, len(requests), together):
            index, first_row, end_position, first_page, seen = torch.tensor(requests[nth : nth + together]).T
            yield _Piece(index, first_row, end_position, first_page, queries, int(seen.max()), layout.tokens)


def _first_page(end_position: int, queries: int, page_tokens: int, window: int) -> int:
    """The first page that the queries before a position see."""
    return max(0, end_position - queries - window + 1) // page_tokens if window else 0


def _parts(piece: _Piece, heads: int, modifiers: Modifiers) -> Iterator[_Piece]:
    """A piece, cut so that no part has more than MAX_LOGITS logits, and at whole blocks of Q smoothing. A part has those pages
    that its queries see."""
    block, page_tokens = modifiers.q_block or 1, piece.page_tokens
    step = max(block, MAX_LOGITS // (heads * piece.pages * page_tokens) // block * block)
    if len(piece.requests) > 1 or piece.queries <= step:
        yield piece
        return
    begin = int(piece.end_position) - piece.queries
    for low in range(0, piece.queries, step):
        queries = min(step, piece.queries - low)
        end = begin + low + queries
        first = _first_page(end, queries, page_tokens, modifiers.window)
        yield _Piece(
            piece.requests, piece.first_row + low, torch.tensor([end]), torch.tensor([first]), queries,
            -(-end // page_tokens) - first, page_tokens,
        )  # fmt: skip


def _attend(
    q: torch.Tensor,
    stored: _Stored,
    piece: _Piece,
    layout: PageLayout,
    batch: PagedBatch,
    scale: float,
    modifiers: Modifiers,
) -> torch.Tensor:
    """Attention of a piece, float32 of q's shape. q: [kv_heads, requests, group, queries, head_dim]."""
    kv_heads, _, group, n_queries, _ = q.shape
    calibration = modifiers.calibration_for(batch, layout.k_bits)
    queries = _Queries(layout, calibration, modifiers.q_block, scale * LOG2E)
    bias = queries.bias(q)

    logits = _qk_product(queries.terms(q), stored)
    if batch.rope_shift is not None:
        _shift_pages(logits, q, bias, stored, piece, batch.rope_shift, queries)
    if modifiers.soft_cap:
        cap = modifiers.soft_cap * LOG2E
        logits = cap * torch.tanh((logits + bias) / cap)
    logits += stored.v_exponent[:, :, None, None]
    positions, keys = piece.positions()[:, None, :, None], piece.keys[:, None, None]
    logits.masked_fill_(~visible_keys(positions, keys, modifiers.window), float("-inf"))

    p, m_ref = _quantize_p(logits, layout.tokens)
    flat = p.flatten(2, 3)
    l_i = torch.matmul(flat, (-stored.v_exponent).exp2()[..., None]).unflatten(2, (group, n_queries))
    result = torch.matmul(flat, stored.v.mT).unflatten(2, (group, n_queries)).mul_(OVER_FLOAT16)
    if layout.v_bits == 4:
        result = rotate_values_back(result)
    if calibration.v_anchor is not None:
        result += l_i * calibration.v_anchor[:, None, None, None]
    if modifiers.sinks is not None:
        sinks = modifiers.sinks.float().mul(LOG2E).view(kv_heads, 1, group, 1, 1)
        l_i = l_i + torch.exp2((sinks if modifiers.soft_cap else sinks - bias) - m_ref)
    result /= l_i
    return result


def _quantize_p(logits: torch.Tensor, page_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference.quantize_p`, of whole pages."""
    paged = logits.unflatten(-1, (-1, page_tokens))
    page_max = paged.amax(-1, keepdim=True)
    m_i = page_max.amax(-2, keepdim=True)
    page_max = torch.maximum(page_max, m_i - FALL_BITS)
    weights = _round_to_e4m3((paged - (page_max - P_BITS)).exp2_())
    weights *= (page_max - m_i).exp2_()
    return weights.flatten(-2), m_i.squeeze(-1) - P_BITS


def _round_to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """x, float32 of 0 to 448, rounded in place. Around 2**20 times x, float32 numbers are as far apart as e4m3 numbers around
    x. Those below 2**-6 have one distance."""
    power = x.clamp(min=2**-6).view(torch.int32).bitwise_and_(0x7F800000).add_(20 << 23).view(torch.float32)
    return x.add_(power).sub_(power)


def _qk_product(terms: QueryTerms, stored: _Stored) -> torch.Tensor:
    """`qk_product` for terms of queries [kv_heads, requests, group, queries, head_dim]."""
    flat = [(codes.flatten(2, 3), q_scale.flatten(2, 3)) for codes, q_scale in terms]
    return qk_product(flat, stored.k, stored.k_scale).unflatten(2, terms[0][1].shape[2:])


def _shift_pages(
    logits: torch.Tensor,
    q: torch.Tensor,
    bias: torch.Tensor,
    stored: _Stored,
    piece: _Piece,
    rope_shift: RopeShift,
    queries: _Queries,
) -> None:
    """Replace the logits of pages that are read at shifted positions (`RopeShift`)."""
    of_requests = rope_shift.pages[piece.requests].long()  # [requests, kv_heads, places]
    for page, place in enumerate(piece.places().T):
        shift = of_requests.take_along_dim(place[:, None, None], 2).squeeze(2).T
        if not shift.any():
            continue
        rotated = turn_back(q.float(), rope_shift.table[shift][:, :, None, None])
        own = slice(page * piece.page_tokens, (page + 1) * piece.page_tokens)
        logits[..., own] = _qk_product(queries.terms(rotated), stored.of(own)) + (queries.bias(rotated) - bias)


def _load(pages: torch.Tensor, block_table: torch.Tensor, piece: _Piece, layout: PageLayout) -> _Stored:
    """What `reference.load` does, of the pages that a piece sees. pages and block_table: see `attention`."""
    gathered = _gather(pages, block_table, piece.requests, piece.places())
    past = piece.keys >= piece.end_position[:, None]
    k_scale, v_exponent = _load_scales(gathered, past, layout)
    return _Stored(_load_k(gathered, layout), k_scale, _load_v(gathered, past, layout), v_exponent)


def _gather(pages: torch.Tensor, block_table: torch.Tensor, requests: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Pages of requests, uint8 [kv_heads, requests, n, page_bytes]. places: in their block tables, int64 [requests, n]."""
    if block_table.dim() == 2:
        blocks = block_table[requests[:, None], places]
        return pages.index_select(0, blocks.flatten()).unflatten(0, blocks.shape).permute(2, 0, 1, 3)
    heads = torch.arange(pages.shape[1])[:, None, None]
    blocks = block_table[requests[:, None], heads, places].long()
    return pages.view(torch.int64)[blocks, heads].view(torch.uint8)


def _section(gathered: torch.Tensor, layout: PageLayout, name: str, of_token: int, dtype: torch.dtype) -> torch.Tensor:
    """A section of pages as elements of `dtype` [kv_heads, requests, n, elements]. of_token: a token's bytes in it."""
    start = layout.offset(name)
    return gathered[..., start : start + layout.tokens * of_token].view(dtype)


def _in_order_of_v(x: torch.Tensor, layout: PageLayout, dtype: torch.dtype) -> torch.Tensor:
    """x [kv_heads, requests, n, tokens, ...] as `dtype`, with tokens of pages in `v_position` order: [kv_heads, requests,
    n * tokens, ...]. Of each 16 tokens, it swaps "which half" and "which pair of the half"."""
    pairs = x.unflatten(3, (layout.tokens // 16, 2, 4, 2)).transpose(4, 5)
    return pairs.to(dtype, memory_format=torch.contiguous_format).flatten(2, 6)


def _load_k(gathered: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """The INT8 codes of keys (`reference.key_codes`), as float32 [kv_heads, requests, tokens, head_dim]."""
    if layout.k_bits == 8:
        codes = _section(gathered, layout, "k", layout.head_dim, torch.int8).unflatten(-1, (layout.tokens, -1))
    else:
        # A group of a token is one word.
        words = _section(gathered, layout, "k", layout.k_row_bytes, torch.int64).unflatten(-1, (layout.tokens, -1))
        groups = _section(gathered, layout, "k_groups", 2 * layout.k_groups, torch.int8).unflatten(-1, (layout.tokens, 2, -1))
        step, zero = groups.long().unbind(-2)
        product = torch.stack(_nibbles(words), -2) * step[..., None, :]  # at most 15 * 17: no byte runs over into the next
        product[..., 0] += torch.stack(_nibbles(_section(gathered, layout, "k_low", GROUP_BYTES, torch.int64)), -1)
        codes = _add_bytes(product, _each_byte(zero & 0xFF)[..., None, :]).flatten(-2).view(torch.int8)
    return _in_order_of_v(codes, layout, torch.float32)


def _load_scales(gathered: torch.Tensor, past: torch.Tensor, layout: PageLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales of K and the exponents of V, float32 [kv_heads, requests, tokens] each. past: [requests, tokens], where there
    is no token; its exponent is 0."""
    k_scale = _in_order_of_v(_section(gathered, layout, "k_scale", 4, torch.float32), layout, torch.float32)
    if (layout.k_bits, layout.v_bits) == (4, 8):
        v_exponent = ((k_scale.view(torch.int32) & 0xFF) - 127).float()
    else:
        v_exponent = _in_order_of_v(_section(gathered, layout, "v_exponent", 4, torch.float32), layout, torch.float32)
    return k_scale, v_exponent.masked_fill_(past, 0.0)


def _load_v(gathered: torch.Tensor, past: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """The codes of values over OVER_FLOAT16, float32 [kv_heads, requests, head_dim, tokens]. past: see `_load_scales`."""
    pages = _section(gathered, layout, "v", layout.head_dim * layout.v_bits // 8, torch.int64)
    words = pages.unflatten(-1, (-1, layout.tokens // 8)).transpose(2, 3).flatten(3)  # eight tokens each
    if layout.v_bits == 8:
        return _from_e4m3(words, past)
    nibbles = torch.stack(_nibbles(words), 3).flatten(2, 3)
    magnitude = nibbles & _each_byte(7)
    sign = (nibbles & _each_byte(8)) << 4
    return _from_e4m3(sign | (3 * magnitude + ((magnitude >> 2) & _each_byte(1)) + _each_byte(1)), past)


def _each_byte(number: Any) -> Any:
    """A number from 0 to 255, or integers of 64 bits that are, in each byte of 64 bits."""
    return number * 0x0101010101010101


def _nibbles(words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of bytes, eight in each integer, the low and the high nibbles."""
    return words & _each_byte(0xF), (words >> 4) & _each_byte(0xF)


def _add_bytes(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Sums of bytes modulo 256, eight in each integer: without the highest bits, and then these, so that nothing is carried."""
    return ((a & _each_byte(0x7F)) + (b & _each_byte(0x7F))) ^ ((a ^ b) & ~_each_byte(0x7F))


def _from_e4m3(words: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
    """The numbers of e4m3 codes over OVER_FLOAT16, float32 [..., requests, rows, tokens]. words: eight codes each; past:
    [requests, tokens], where codes mean nothing."""
    codes = words.view(torch.int8)
    wide = codes.short().bitwise_left_shift_(7).bitwise_and_(~0x4000)
    if (((words & _each_byte(0x7F)) + _each_byte(1)) & ~_each_byte(0x7F)).any():  # the magnitude 0x7F is not a number
        nan = ((codes & 0x7F) == 0x7F) & ~past[:, None]
        wide.masked_fill_(past[:, None], 0).masked_fill_(nan, 0x7FFF)
    return wide.view(torch.float16).float()
