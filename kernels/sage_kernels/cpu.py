# SPDX-License-Identifier: Apache-2.0
"""`reference.attention` for a CPU that serves requests: all heads of a request at once, and only the pages that it sees.

The arithmetic is that of the kernels. INT8 products are exact in float32, which on a CPU is the fast way to compute them.
Storing needs no version of its own: `reference.store` takes all tokens at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sage_kernels.batch import LayerCalibration, Modifiers, PagedBatch, RopeShift
from sage_kernels.reference import (
    LOG2E,
    QueryTerms,
    load,
    prepare_queries,
    qk_product,
    quantize_p,
    query_terms,
    rotate_back,
    rotate_values_back,
    visible_keys,
)
from sage_paged import PageLayout

MAX_LOGITS = 1 << 24
"""Elements of the logits matrix that is held at a time; longer prompts are taken in pieces."""


@dataclass(frozen=True)
class _Piece:
    """Query rows low to high of a request, the position one past the last of them, and the pages that they see."""

    request: int
    low: int
    high: int
    end_position: int
    used_pages: slice

    @property
    def rows(self) -> int:
        return self.high - self.low


@dataclass(frozen=True)
class _Queries:
    """How queries become terms of Q K^T. calibration: from `Modifiers.calibration_for`."""

    layout: PageLayout
    calibration: LayerCalibration
    q_block: int
    scale: float

    def terms(self, q: torch.Tensor) -> QueryTerms:
        """Queries [kv_heads, group, queries, head_dim], prepared and quantized."""
        return query_terms(prepare_queries(q, self.calibration, self.layout), self.scale, self.q_block)

    def bias(self, q: torch.Tensor) -> torch.Tensor:
        """What base-2 logits lack by the anchor, [kv_heads, group, queries, 1]."""
        if self.calibration.k_anchor is None:
            return torch.zeros(*q.shape[:-1], 1)
        return (q.float() @ self.calibration.k_anchor[:, None, :, None]) * self.scale


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
    kv_heads, group = pages.shape[1], query.shape[1] // pages.shape[1]
    by_head = query.unflatten(1, (kv_heads, group)).permute(1, 2, 0, 3)  # [kv_heads, group, queries, head_dim]
    for piece in _pieces(query.shape[1], layout, batch, modifiers):
        rows = slice(piece.low, piece.high)
        result = _attend(by_head[:, :, rows], piece, pages, layout, batch, scale, modifiers)
        out[rows] = result.permute(2, 0, 1, 3).flatten(1, 2).to(out.dtype)


def _pieces(heads: int, layout: PageLayout, batch: PagedBatch, modifiers: Modifiers) -> Iterator[_Piece]:
    """The requests' queries, cut so that no piece has more than MAX_LOGITS logits, and at whole blocks of Q smoothing."""
    starts, lengths = batch.query_start_loc.tolist(), batch.seq_lens.tolist()
    block = modifiers.q_block or 1
    for request, length in enumerate(lengths):
        start, end = starts[request], starts[request + 1]
        if start == end:
            continue
        step = max(block, MAX_LOGITS // (heads * length) // block * block)
        for low in range(start, end, step):
            high = min(low + step, end)
            end_position = length - (end - high)
            first = max(0, end_position - (high - low) - modifiers.window + 1) // layout.tokens if modifiers.window else 0
            yield _Piece(request, low, high, end_position, slice(first, -(-end_position // layout.tokens)))


def _attend(
    q: torch.Tensor,
    piece: _Piece,
    pages: torch.Tensor,
    layout: PageLayout,
    batch: PagedBatch,
    scale: float,
    modifiers: Modifiers,
) -> torch.Tensor:
    """Attention of a piece, float32 of q's shape. q: [kv_heads, group, queries, head_dim]."""
    kv_heads, group = q.shape[:2]
    calibration = modifiers.calibration_for(batch, layout.k_bits)
    queries = _Queries(layout, calibration, modifiers.q_block, scale * LOG2E)
    bias = queries.bias(q)
    begin = piece.used_pages.start * layout.tokens
    table = batch.block_table[piece.request, ..., piece.used_pages]
    k, k_scale, v, v_exponent = (x[:, : piece.end_position - begin] for x in load(pages, table, layout))

    logits = _qk_product(queries.terms(q), k, k_scale)
    if batch.rope_shift is not None:
        _shift_pages(logits, q, bias, k, k_scale, piece, batch.rope_shift, layout, queries)
    if modifiers.soft_cap:
        cap = modifiers.soft_cap * LOG2E
        logits = cap * torch.tanh((logits + bias) / cap)
    if piece.rows > 1 or modifiers.window:
        positions = torch.arange(piece.end_position - piece.rows, piece.end_position)[:, None]
        keys = torch.arange(begin, piece.end_position)[None, :]
        logits.masked_fill_(~visible_keys(positions, keys, modifiers.window), float("-inf"))

    logits += v_exponent[:, None, None, :]
    p, m_ref = quantize_p(logits, layout.tokens)
    l_i = torch.matmul(p.flatten(1, 2), (-v_exponent).exp2()[..., None]).unflatten(1, p.shape[1:3])
    result = torch.matmul(p.flatten(1, 2), v).unflatten(1, p.shape[1:3])
    if layout.v_bits == 4:
        result = rotate_values_back(result)
    if calibration.v_anchor is not None:
        result += l_i * calibration.v_anchor[:, None, None]
    if modifiers.sinks is not None:
        sinks = modifiers.sinks.float().mul(LOG2E).view(kv_heads, group, 1, 1)
        l_i = l_i + torch.exp2((sinks if modifiers.soft_cap else sinks - bias) - m_ref)
    result /= l_i
    return result


def _qk_product(terms: QueryTerms, k: torch.Tensor, k_scale: torch.Tensor) -> torch.Tensor:
    """`qk_product` for terms of queries [kv_heads, group, queries, head_dim] and the keys of KV heads."""
    flat = [(codes.flatten(1, 2), q_scale.flatten(1, 2)) for codes, q_scale in terms]
    return qk_product(flat, k, k_scale).unflatten(1, terms[0][1].shape[1:])


def _shift_pages(
    logits: torch.Tensor,
    q: torch.Tensor,
    bias: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    piece: _Piece,
    rope_shift: RopeShift,
    layout: PageLayout,
    queries: _Queries,
) -> None:
    """Replace the logits of pages that are read at shifted positions (`RopeShift`)."""
    for page, shift in enumerate(rope_shift.pages[piece.request, :, piece.used_pages].T):
        if not shift.any():
            continue
        rotated = rotate_back(q.float(), rope_shift.table[shift.long()][:, None, None])
        own = slice(page * layout.tokens, (page + 1) * layout.tokens)
        logits[..., own] = _qk_product(queries.terms(rotated), k[:, own], k_scale[:, own]) + (queries.bias(rotated) - bias)
