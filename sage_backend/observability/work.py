# SPDX-License-Identifier: Apache-2.0
"""A model of attention's work: the operations and the bytes of pages that a batch takes, with and without memory."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from sage_paged import Memory


class QueryBlocks(NamedTuple):
    """The blocks of queries that memory makes of a batch (see `sage_paged.memory`). Each field is int64 [blocks]: the position
    of a block's first query and that behind its last one, the tokens that a KV head reads for it, and the pages that it scores
    and recalls."""

    first: np.ndarray
    end: np.ndarray
    read: np.ndarray
    scored: np.ndarray
    recalled: np.ndarray

    @classmethod
    def of(
        cls,
        memory: Memory,
        page_tokens: int,
        query_lens: np.ndarray,
        seq_lens: np.ndarray,
        query_block: int,
        topk: np.ndarray | None = None,
    ) -> "QueryBlocks":
        """query_lens, seq_lens: int64 [requests], the query tokens of each request and all of its tokens. query_block: tokens
        of a block, 0 for one block a request. topk: int64 [requests], the pages that each has recalled; None: the memory's.
        Requests without queries have no block."""
        topk = np.full_like(seq_lens, memory.topk_pages) if topk is None else topk
        starts, ends, topk = (of[query_lens > 0] for of in (seq_lens - query_lens, seq_lens, topk))
        first, end = starts, ends
        if query_block:
            cuts = [
                np.arange(start // query_block + 1, -(-end // query_block)) * query_block
                for start, end in zip(starts, ends, strict=True)
            ]
            first = np.concatenate([np.r_[start, cut] for start, cut in zip(starts, cuts, strict=True)] or [starts])
            end = np.concatenate([np.r_[cut, end] for end, cut in zip(ends, cuts, strict=True)] or [ends])
            topk = np.repeat(topk, [len(cut) + 1 for cut in cuts])
        local = np.maximum(first - memory.local_tokens + 1, 0) // page_tokens
        sinks = memory.sink_pages(page_tokens)
        selects = local > sinks + topk
        distant = np.where(selects, sinks + topk, local)
        scored, recalled = np.where(selects, local - sinks, 0), np.where(selects, topk, 0)
        return cls(first, end, (distant - local) * page_tokens + end, scored, recalled)


@dataclass
class Work:
    """The work of attention: `operations` of the two matrix products, and `bytes` of pages, each read once a request."""

    operations: float
    bytes: float

    @classmethod
    def of(cls, impl: Any, query_lens: np.ndarray, seq_lens: np.ndarray, blocks: QueryBlocks | None = None) -> "Work":
        """In the layer of `impl` (SageImpl). query_lens, seq_lens: int64 [requests], the query tokens of each request and all
        of its tokens. blocks: those that memory makes of the requests, if the layer has it."""
        if blocks is not None:
            query_lens, keys = blocks.end - blocks.first, blocks.read
            pairs = query_lens * (2 * keys - query_lens + 1) // 2
        elif impl.window:
            pairs = _pairs_in_window(seq_lens, impl.window) - _pairs_in_window(seq_lens - query_lens, impl.window)
            keys = np.minimum(seq_lens, impl.window - 1 + query_lens)
        else:
            pairs = query_lens * (2 * seq_lens - query_lens + 1) // 2
            keys = seq_lens
        return cls(
            operations=4.0 * impl.num_heads * impl.head_size * float(pairs.sum()),
            bytes=float(impl.num_kv_heads * impl.layout.bytes_per_token) * float(keys[query_lens > 0].sum()),
        )


def _pairs_in_window(tokens: np.ndarray, window: int) -> np.ndarray:
    """The (query, key) pairs of the first `tokens` tokens, each of which sees itself and up to window - 1 before it."""
    full = np.minimum(tokens, window)
    return full * (full + 1) // 2 + (tokens - full) * window
