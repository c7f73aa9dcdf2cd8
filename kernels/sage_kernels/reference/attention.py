# SPDX-License-Identifier: Apache-2.0
"""Paged attention, in plain torch and float32: what the kernels compute, and the exact attention that it approximates."""

import torch

from sage_kernels.batch import LayerCalibration, Modifiers, PagedBatch, RopeShift
from sage_kernels.reference.pages import load, prepare_queries
from sage_kernels.reference.quantize import (
    LOG2E,
    QueryTerms,
    qk_product,
    quantize_k,
    quantize_p,
    query_terms,
    rotate_values_back,
)
from sage_paged import PageLayout


def exact_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    modifiers: Modifiers | None = None,
) -> torch.Tensor:
    """Causal attention of one request without quantization, in float32.

    query: [queries, heads, head_dim], the last queries of the tokens; key, value: [tokens, kv_heads, head_dim]. Of modifiers,
    window, soft_cap and sinks count. Returns float32 of query's shape.
    """
    modifiers = modifiers or Modifiers()
    tokens, group = len(key), query.shape[1] // key.shape[1]
    q, k, v = (x.float().transpose(0, 1) for x in (query, key, value))
    logits = q @ k.repeat_interleave(group, 0).transpose(1, 2) * scale
    if modifiers.soft_cap:
        logits = modifiers.soft_cap * torch.tanh(logits / modifiers.soft_cap)
    positions = torch.arange(tokens - len(query), tokens, device=key.device)[:, None]
    keys = torch.arange(tokens, device=key.device)
    logits = logits.masked_fill(~visible_keys(positions, keys, modifiers.window), float("-inf"))
    if modifiers.sinks is not None:
        logits = torch.cat([logits, modifiers.sinks.float()[:, None, None].expand(-1, len(query), 1)], 2)
    return (logits.softmax(-1)[..., :tokens] @ v.repeat_interleave(group, 0)).transpose(0, 1)


def visible_keys(positions: torch.Tensor, keys: torch.Tensor, window: int) -> torch.Tensor:
    """bool [queries, tokens]: which keys a query sees. positions: int [queries, 1] of queries; keys: int [tokens]."""
    visible = keys <= positions
    return visible & (keys > positions - window) if window else visible


def rope_shift_table(frequencies: torch.Tensor, max_pages: int, page_tokens: int) -> torch.Tensor:
    """The `RopeShift.table` for shifts of 0 to max_pages - 1 pages, float32 [max_pages, head_dim].

    frequencies: [head_dim // 2], radians per token, of a rotary embedding that pairs channel c with channel c + head_dim // 2
    (NeoX style).
    """
    angles = torch.arange(max_pages, dtype=torch.float64)[:, None] * page_tokens * frequencies.double()
    return torch.cat([angles.cos(), angles.sin()], -1).float()


def turn_back(x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Rotate x, float32 [..., head_dim], toward the start of the context. shift: rows of a `rope_shift_table` [...,
    head_dim]."""
    (low, high), (cos, sin) = x.chunk(2, -1), shift.chunk(2, -1)
    return torch.cat([low * cos + high * sin, high * cos - low * sin], -1)


def turn_keys(codes: torch.Tensor, k_scale: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate stored keys away from the start of the context, and quantize them again: attention to them is that of queries that
    `turn_back` has rotated.

    codes: int8 [..., head_dim]; k_scale: float32 [...]; shift: a row of a `rope_shift_table` [head_dim], its pairs in the order
    of the keys. Returns codes and scales of the same shapes.
    """
    cos, sin = shift.chunk(2, -1)
    turned, scale = quantize_k(turn_back(codes.float(), torch.cat([cos, -sin], -1)))
    return turned, k_scale * scale


def attention(
    query: torch.Tensor,
    pages: torch.Tensor,
    layout: PageLayout,
    batch: PagedBatch,
    scale: float,
    modifiers: Modifiers | None = None,
    turns_keys: bool = False,
) -> torch.Tensor:
    """Causal attention of every request's query tokens over its pages.

    query: [tokens, heads, head_dim]. pages: uint8 [blocks, kv_heads, page_bytes]. scale multiplies the logits. turns_keys:
    where pages are read at shifted positions, rotate keys (`turn_keys`), as the prefill kernels do, in place of queries.
    Returns float32 of query's shape; rows of no request are 0.
    """
    modifiers = modifiers or Modifiers()
    heads, group = query.shape[1], query.shape[1] // pages.shape[1]
    calibration = modifiers.calibration_for(batch, layout.k_bits)
    out = torch.zeros(query.shape, dtype=torch.float32)
    for r in range(batch.num_requests):
        start, end, length = int(batch.query_start_loc[r]), int(batch.query_start_loc[r + 1]), int(batch.seq_lens[r])
        if start == end:
            continue
        used_pages = -(-length // layout.tokens)
        kv = [x[:, :length] for x in load(pages, batch.block_table[r, ..., :used_pages], layout)]
        positions = torch.arange(length - (end - start), length)[:, None]
        visible = visible_keys(positions, torch.arange(length), modifiers.window)
        shift = batch.rope_shift and RopeShift(batch.rope_shift.pages[r, :, :used_pages], batch.rope_shift.table)
        for head in range(heads):
            k, k_scale, v, v_exponent = (x[head // group] for x in kv)
            q = query[start:end, head].float()
            out[start:end, head] = _attend(
                q, k, k_scale, v, v_exponent, visible, layout, scale, modifiers, calibration, shift, head, head // group,
                turns_keys,
            )  # fmt: skip
    return out


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    v: torch.Tensor,
    v_exponent: torch.Tensor,
    visible: torch.Tensor,
    layout: PageLayout,
    scale: float,
    modifiers: Modifiers,
    calibration: LayerCalibration,
    shift: RopeShift | None,
    head: int,
    kv_head: int,
    turns_keys: bool,
) -> torch.Tensor:
    """Attention of one request's queries of one head, float32 [queries, head_dim]. q, k, k_scale, v and v_exponent are those of
    that head."""
    calibration = calibration.heads(slice(kv_head, kv_head + 1))

    def terms(q: torch.Tensor) -> QueryTerms:
        return query_terms(prepare_queries(q[None], calibration, layout)[0], scale, modifiers.q_block)

    def of_anchor(q: torch.Tensor) -> torch.Tensor:
        k_anchor = calibration.k_anchor
        return torch.zeros(len(q), 1) if k_anchor is None else (q @ k_anchor[0])[:, None] * scale

    def in_order(shift: torch.Tensor) -> torch.Tensor:
        return shift if calibration.order is None else shift.view(2, -1)[:, calibration.order[0].long()].flatten()

    logits, bias = qk_product(terms(q), k, k_scale), of_anchor(q)
    if shift is not None:
        for page, pages_back in enumerate(shift.pages[kv_head].tolist()):
            if not pages_back:
                continue
            rotated = turn_back(q, shift.table[pages_back])
            own = slice(page * layout.tokens, (page + 1) * layout.tokens)
            if turns_keys:
                product = qk_product(terms(q), *turn_keys(k[own], k_scale[own], in_order(shift.table[pages_back])))
            else:
                product = qk_product(terms(rotated), k[own], k_scale[own])
            logits[:, own] = product + of_anchor(rotated) - bias
    if modifiers.soft_cap:
        logits, bias = modifiers.soft_cap * torch.tanh((logits + bias) / modifiers.soft_cap), torch.zeros_like(bias)
    logits = (logits * LOG2E).masked_fill(~visible, float("-inf"))
    p, m_ref = quantize_p(logits + v_exponent, layout.tokens)
    l_i = (p * (-v_exponent).exp2()).sum(-1, keepdim=True)
    result = p @ v
    if layout.v_bits == 4:
        result = rotate_values_back(result)
    if calibration.v_anchor is not None:  # weighted as values are; a sink has no value
        result += l_i * calibration.v_anchor
    if modifiers.sinks is not None:
        l_i = l_i + torch.exp2((modifiers.sinks[head].float() - bias) * LOG2E - m_ref)
    return result / l_i
