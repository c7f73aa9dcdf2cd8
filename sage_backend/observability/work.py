# SPDX-License-Identifier: Apache-2.0
"""A model of attention's work: the operations and bytes that a batch takes, with and without memory."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from sage_paged import Memory


class Rows(NamedTuple):
    """What memory makes of a batch: of each row of queries (see `sage_paged.memory`), int64 [rows], the position of its first
    query and that behind its last one, the tokens that a KV head reads, and the pages that it scores and recalls."""

    first: np.ndarray
    end: np.ndarray
    read: np.ndarray
    scored: np.ndarray
    recalled: np.ndarray

    @classmethod
    def of(cls, memory: Memory, page_tokens: int, query_lens: np.ndarray, seq_lens: np.ndarray, query_block: int) -> "Rows":
        """Of requests with these query tokens and tokens in all, int64 [requests]; query_block 0 for one row a request."""
        begins, ends = (seq_lens - query_lens)[query_lens > 0], seq_lens[query_lens > 0]
        first, end = begins, ends
        if query_block:
            cuts = [
                np.arange(begin // query_block + 1, -(-end // query_block)) * query_block
                for begin, end in zip(begins, ends, strict=True)
            ]
            first = np.concatenate([np.r_[begin, cut] for begin, cut in zip(begins, cuts, strict=True)] or [begins])
            end = np.concatenate([np.r_[cut, end] for end, cut in zip(ends, cuts, strict=True)] or [ends])
        local = np.maximum(first - memory.local_tokens + 1, 0) // page_tokens
        sinks = memory.sink_pages(page_tokens)
        choosing = local > sinks + memory.topk_pages
        far = np.where(choosing, sinks + memory.topk_pages, local)
        scored, recalled = np.where(choosing, local - sinks, 0), np.where(choosing, memory.topk_pages, 0)
        return cls(first, end, (far - local) * page_tokens + end, scored, recalled)


@dataclass
class Work:
    """What attention had to do: `operations` of the two matrix products, `bytes` of pages, each read once a request."""

    operations: float
    bytes: float

    @classmethod
    def of(cls, impl: Any, query_lens: np.ndarray, seq_lens: np.ndarray, rows: Rows | None = None) -> "Work":
        """Of requests with these query tokens and tokens in all, int64 [requests], in the layer of `impl` (SageImpl). rows:
        those that memory makes of them, if the layer has it."""
        if rows is not None:
            query_lens, keys = rows.end - rows.first, rows.read
            pairs = query_lens * (2 * keys - query_lens + 1) // 2
        elif impl.window:
            pairs = _visible(seq_lens, impl.window) - _visible(seq_lens - query_lens, impl.window)
            keys = np.minimum(seq_lens, impl.window - 1 + query_lens)
        else:
            pairs = query_lens * (2 * seq_lens - query_lens + 1) // 2
            keys = seq_lens
        return cls(
            operations=4.0 * impl.num_heads * impl.head_size * float(pairs.sum()),
            bytes=float(impl.num_kv_heads * impl.layout.bytes_per_token) * float(keys[query_lens > 0].sum()),
        )


def _visible(tokens: np.ndarray, window: int) -> np.ndarray:
    """How many (query, key) pairs the first `tokens` tokens make, each seeing itself and up to window - 1 before it."""
    full = np.minimum(tokens, window)
    return full * (full + 1) // 2 + (tokens - full) * window
