# SPDX-License-Identifier: Apache-2.0
"""InfLLM memory in plain torch: summaries of full pages, and the choice of the pages that queries read
(`sage_paged.memory`)."""

from dataclasses import replace

import torch

from sage_kernels.batch import NOT_CALIBRATED, LayerCalibration, PagedBatch, RopeShift
from sage_kernels.page_cache import PageCache, summaries_of
from sage_kernels.reference.attention import turn_back
from sage_kernels.reference.pages import key_codes, restore_keys
from sage_paged import ALL_PAGES, Memory, PageLayout

SCORE_BITS = 20
"""Leading bits of a float32 score that are compared. Of pages with equal leading bits, the earlier one wins."""
REACH = 2.0
"""Half axes of the ellipsoid that a page's keys are taken to fill, in half ranges of the channels (see `select_pages`)."""


def store_summaries(
    pages: torch.Tensor,
    layout: PageLayout,
    batch: PagedBatch,
    shift_table: torch.Tensor | None = None,
    calibration: LayerCalibration = NOT_CALIBRATED,
    cache: PageCache | None = None,
) -> None:
    """Write the summaries of the pages that a step has filled: each channel's mean key and half the range of its keys.

    batch: the step's, with one page list for all heads; the step's tokens are stored already, with `calibration`. Summaries are
    of the model's keys, less the anchor. With a shift_table (`rope_shift_table`), they are of whole keys, rotated to where they
    would be if the page were the first of its context. A page whose last token is stored again (a rejected draft) gets a new
    summary. cache: where summaries are, unless they are in the pages.
    """
    summaries = summaries_of(pages, layout, cache)
    for r in range(batch.num_requests):
        length, queries = int(batch.seq_lens[r]), int(batch.query_start_loc[r + 1] - batch.query_start_loc[r])
        for page in range((length - queries) // layout.tokens, length // layout.tokens):
            block = int(batch.block_table[r, page])
            codes, k_scale = key_codes(pages[block], layout)
            key = codes * k_scale[..., None]
            if shift_table is None:
                key = restore_keys(key, replace(calibration, k_anchor=None), layout)
            else:
                key = turn_back(restore_keys(key, calibration, layout), shift_table[page])
            summaries[block] = torch.stack([key.mean(1), (key.amax(1) - key.amin(1)) / 2], 1).half()


def max_query_blocks(tokens: int, requests: int, query_block: int) -> int:
    """Upper bound on the query blocks of a step: blocks of query_block positions in which a request has a token. 0:
    requests."""
    return tokens // query_block + 2 * requests if query_block else requests


def select_pages(
    query: torch.Tensor,
    pages: torch.Tensor,
    layout: PageLayout,
    batch: PagedBatch,
    memory: Memory,
    query_block: int,
    shift_table: torch.Tensor | None = None,
    cache: PageCache | None = None,
) -> PagedBatch:
    """Choose the pages that each query block reads. In the result, query blocks replace requests.

    query: [tokens, heads, head_dim]. batch: the requests, with one page list for all heads. query_block: positions of a query
    block; 0 for one block per request. shift_table: `rope_shift_table`, needed where memory.trained_tokens is not 0. cache:
    where summaries are, unless they are in the pages.

    A page's score is the largest product that a query could have with keys in an ellipsoid around the page's mean key. Its half
    axes are REACH half ranges. Over the queries of a block and of all heads of a KV head, the score takes the mean of the
    center's products, and the root mean square of what the extent adds. With a shift_table, queries and pages are compared at
    the distance at which the page would be read: right before the local pages, for a query in the first local_tokens behind it.
    """
    kv_heads, tokens, summaries = pages.shape[1], layout.tokens, summaries_of(pages, layout, cache)
    first_token = int(batch.query_start_loc[0])
    blocks = max_query_blocks(query.shape[0], batch.num_requests, query_block)
    width = memory.list_pages(tokens, query_block or int(batch.query_start_loc.diff().max()), batch.block_table.shape[1])
    table = torch.zeros(blocks, kv_heads, width, dtype=torch.int32)
    shifts = torch.zeros_like(table)
    lengths = torch.zeros(blocks, dtype=torch.int32)
    starts = torch.full((blocks + 1,), first_token, dtype=torch.int32)
    for r in range(batch.num_requests):
        start, length = int(batch.query_start_loc[r]), int(batch.seq_lens[r])
        begin = length - (int(batch.query_start_loc[r + 1]) - start)  # the position of the first query
        topk = memory.topk_pages if batch.topk_pages is None else int(batch.topk_pages[r])
        # As in `primitives.find_request`: where a request's blocks are does not depend on the lengths of the others' contexts.
        block = (start - first_token) // query_block + 2 * r if query_block else r
        low = begin
        while low < length:
            high = min(length, (low // query_block + 1) * query_block) if query_block else length
            local = memory.local_page(low, tokens)
            q = query[start + low - begin : start + high - begin].float()
            listed = _listed(q, low, high, summaries, layout.tokens, batch.block_table[r].long(), memory, topk, shift_table)
            table[block, :, : listed.shape[1]] = batch.block_table[r].long()[listed].int()
            if memory.trained_tokens and high > memory.trained_tokens and topk != ALL_PAGES:
                shifts[block, :, : listed.shape[1]] = (local - 1 - listed).clamp(min=0).int()
            lengths[block] = (listed.shape[1] - (-(-high // tokens) - local)) * tokens + high - local * tokens
            starts[block] = start + low - begin
            starts[block + 1 :] = start + high - begin
            low, block = high, block + 1
    shift = None if shift_table is None else RopeShift(shifts, shift_table)
    return replace(
        batch, block_table=table, seq_lens=lengths, query_start_loc=starts, max_query_len=query_block or batch.max_query_len,
        rope_shift=shift, topk_pages=None,
    )  # fmt: skip


def _listed(
    q: torch.Tensor,
    low: int,
    high: int,
    summaries: torch.Tensor,
    tokens: int,
    blocks: torch.Tensor,
    memory: Memory,
    topk: int,
    shift_table: torch.Tensor | None,
) -> torch.Tensor:
    """The context's pages that a query block at positions low to high reads, int64 [kv_heads, listed], ascending. q: float32
    [queries, heads, head_dim]; tokens: of a page; blocks: int64 [pages], where the context's pages are; topk: the pages to
    recall."""
    kv_heads = summaries.shape[1]
    local, sinks = memory.local_page(low, tokens), memory.sink_pages(tokens)
    candidates = torch.arange(min(sinks, local), local)
    chosen = candidates.expand(kv_heads, -1)
    if len(candidates) > topk:
        if shift_table is not None:
            nearer = (torch.arange(low, high) // tokens - memory.local_tokens // tokens - 1).clamp(min=0)
            q = turn_back(q, shift_table[nearer][:, None])
        q = q.unflatten(1, (kv_heads, -1))
        center, radius = summaries[blocks[candidates]].float().unbind(2)  # [pages, kv_heads, head_dim]
        extent = (q.square().mean((0, 2)) * radius.square()).sum(-1).sqrt()
        scores = ((q.mean((0, 2)) * center).sum(-1) + REACH * extent).T.contiguous()
        coarse = (scores.view(torch.int32) >> (32 - SCORE_BITS) << (32 - SCORE_BITS)).view(torch.float32)
        order = coarse.sort(descending=True, stable=True).indices
        chosen = candidates[order[:, :topk]].sort().values
    sink_pages = torch.arange(min(sinks, local)).expand(kv_heads, -1)
    local_pages = torch.arange(local, -(-high // tokens)).expand(kv_heads, -1)
    return torch.cat([sink_pages, chosen, local_pages], 1)
