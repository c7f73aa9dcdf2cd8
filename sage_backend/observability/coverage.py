# SPDX-License-Identifier: Apache-2.0
"""What memory leaves out: how much of exact attention falls on the pages that it reads. docs/memory.md is the user's side.

Of a step that is sampled, it is asked for the last query of one request and one KV head, over all of the request's context as
the pages hold it. That reads the keys of one head of one layer once. Long contexts are asked about the less often, so that the
mean cost has a bound, and nothing waits for the device.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from sage_backend.observability.readout import Readout
from sage_kernels import reference
from sage_paged import Memory, PageLayout

TOKENS = 8192
"""Tokens of context that a sampled call may read on average: of 8 calls with contexts of 65536 tokens, one is measured."""
PIECE = 1 << 16
"""Tokens whose keys are dequantized at a time."""


def mass_covered(
    query: torch.Tensor,
    pages: torch.Tensor,
    layout: PageLayout,
    head: int,
    blocks: torch.Tensor,
    length: torch.Tensor,
    read: torch.Tensor,
    scale: float,
    soft_cap: float = 0.0,
    anchor: torch.Tensor | None = None,
) -> torch.Tensor:
    """The share of the softmax over a context that falls on the blocks in `read`, the mean over the heads of a KV head.

    query: [heads, head_dim], of the context's last token; blocks: int [n], the context's pages in order; length: its tokens,
    fewer than those of n pages; read: int [m], with -1 for nothing; anchor: [head_dim], that of the stored keys. Keys are taken
    where they are, also past the length that a model was trained for.
    """
    query, blocks = query.float(), blocks.long()
    logits = []
    for some in blocks.split(PIECE // layout.tokens):
        codes, k_scale = reference.key_codes(pages[some, head], layout)
        logits.append((codes * k_scale[..., None]) @ query.T * scale)
    found = torch.cat(logits)  # [n, tokens, heads]
    if soft_cap:  # elsewhere, what all logits have in common makes no difference
        found = found if anchor is None else found + query @ anchor * scale
        found = soft_cap * torch.tanh(found / soft_cap)
    behind = torch.arange(found.shape[0] * layout.tokens, device=found.device).view(-1, layout.tokens) >= length
    found = found.masked_fill(behind[..., None], float("-inf"))
    mass = found.flatten(0, 1).softmax(0).unflatten(0, found.shape[:2]).sum(1)  # [n, heads]
    return (mass * (blocks[:, None] == read).any(1, keepdim=True)).sum(0).mean()


class Coverage:
    """Measures one share at a time, and tells it when it is there."""

    def __init__(self, memory: Memory, page_tokens: int, device: torch.device, tell: Callable[[str, float], None]) -> None:
        """tell: takes a phase and the share."""
        self._memory, self._page_tokens, self._tell = memory, page_tokens, tell
        self._readout, self._phase, self._turn, self._saved = Readout(device), "", 0, 0

    def measure(
        self,
        phase: str,
        impl: Any,
        query_lens: np.ndarray,
        host_seq_lens: np.ndarray,
        query: torch.Tensor,
        pages: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        lists: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        anchor: torch.Tensor | None,
    ) -> None:
        """Of the phase's requests, take the one with the longest context, if it is not read whole. KV heads take turns.

        impl: the layer's SageImpl; query_lens, host_seq_lens: int64 [requests], the latter as upper bounds; query: [tokens,
        heads, head_size], from the phase's first; block_table, seq_lens: as attention takes them without memory; lists: what it
        takes instead, as `reference.PageLists` has it; anchor: [kv_heads, head_size], that of the stored keys.
        """
        self.collect()
        lengths = np.where(query_lens > 0, host_seq_lens, 0)
        request = int(lengths.argmax())
        length = int(lengths[request])
        if self._readout.pending or self._memory.reads_all(self._page_tokens, length):
            return
        self._saved = min(self._saved + TOKENS, length)
        if self._saved < length:
            return
        self._phase, self._turn, self._saved = phase, self._turn + 1, 0
        last = int(query_lens[: request + 1].sum()) - 1
        row = request
        if phase == "prefill":  # where a request's rows are is said in `reference.recall`; this is its last one
            block, begin = self._memory.query_block, length - int(query_lens[request])
            row = int(query_lens[:request].sum()) // block + 2 * request + (length - 1) // block - begin // block
        head, group = self._turn % impl.num_kv_heads, impl.num_heads // impl.num_kv_heads
        table, tokens, _ = lists
        entry = torch.arange(table.shape[-1], device=table.device)
        read = table[row, head].masked_fill(entry * self._page_tokens >= tokens[row], -1)
        share = mass_covered(
            query[last, head * group : (head + 1) * group], pages, impl.layout, head,
            block_table[request, : -(-length // self._page_tokens)], seq_lens[request], read, impl.scale, impl.soft_cap,
            None if anchor is None else anchor[head],
        )  # fmt: skip
        self._readout.put(share.nan_to_num(nan=0.0).clamp(max=1.0))
        self.collect()

    def collect(self) -> None:
        """Tell the last share, once it is there."""
        if (share := self._readout.take()) is not None:
            self._tell(self._phase, share)
