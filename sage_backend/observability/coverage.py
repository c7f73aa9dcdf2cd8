# SPDX-License-Identifier: Apache-2.0
"""Coverage of memory: the fraction of exact attention that falls on the pages that it reads. docs/user/memory.md is the user's
side.

In a sampled step, it is measured for the last query of one request and one KV head, over the keys of all of the request's
context as its pages hold them. The longer the contexts, the fewer are measured, which bounds the mean cost. Nothing waits for
the device.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from sage_backend.observability.readout import Readout
from sage_kernels import LayerCalibration, PagedBatch, reference
from sage_kernels.batch import NOT_CALIBRATED
from sage_paged import Memory, PageLayout

TOKENS = 8192
"""Tokens of context that a sampled call reads on average at most: with contexts of 65536 tokens, one call in 8 is measured."""
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
    calibration: LayerCalibration = NOT_CALIBRATED,
) -> torch.Tensor:
    """The fraction of the softmax over a context that falls on the blocks in `read`, the mean over the heads of a KV head.
    float32 [].

    query: [heads, head_dim], of the context's last token; blocks: int [n], the context's pages in order; length: its tokens,
    at most those of n pages; read: int [m], with -1 for nothing; calibration: the one that keys were stored with. Keys keep
    their own positions, even past the length that a model was trained for.
    """
    query, blocks, calibration = query.float(), blocks.long(), calibration.heads(slice(head, head + 1))
    prepared = reference.prepare_queries(query[None], calibration, layout)[0]
    logits = []
    for some in blocks.split(PIECE // layout.tokens):
        codes, k_scale = reference.key_codes(pages[:, head].index_select(0, some), layout)
        logits.append((codes.float() @ prepared.T).mul_(k_scale[..., None] * scale))
    found = torch.cat(logits)  # [n, tokens, heads]
    if soft_cap:  # without one, the anchor's share of the logits makes no difference
        if calibration.k_anchor is not None:
            found = found + query @ calibration.k_anchor[0] * scale
        found = soft_cap * torch.tanh(found / soft_cap)
    behind = torch.arange(found.shape[0] * layout.tokens, device=found.device).view(-1, layout.tokens) >= length
    found = found.masked_fill(behind[..., None], float("-inf"))
    mass = found.flatten(0, 1).softmax(0).unflatten(0, found.shape[:2]).sum(1)  # [n, heads]
    return (mass * (blocks[:, None] == read).any(1, keepdim=True)).sum(0).mean()


class Coverage:
    """Measures one fraction at a time, and reports it once it has been computed."""

    def __init__(self, memory: Memory, page_tokens: int, device: torch.device, report: Callable[[str, float], None]) -> None:
        """report: takes a phase and the fraction."""
        self._memory, self._page_tokens, self._report = memory, page_tokens, report
        self._readout, self._phase, self._samples, self._budget = Readout(device), "", 0, 0

    def measure(
        self,
        phase: str,
        impl: Any,
        query_lens: np.ndarray,
        host_seq_lens: np.ndarray,
        topk: np.ndarray | None,
        query: torch.Tensor,
        pages: torch.Tensor,
        batch: PagedBatch,
        selected: PagedBatch,
        calibration: LayerCalibration,
    ) -> None:
        """Measure the request with the longest context in the phase, unless memory reads all of it. KV heads alternate.

        impl: the layer's SageImpl; query_lens, host_seq_lens: int64 [requests], the latter as upper bounds; topk: int64
        [requests], the pages recalled for each, if they have numbers of their own; query: [tokens, heads, head_size], from the
        phase's first; batch: the phase's requests; selected: what `select_pages` made of it;
        calibration: that of the stored keys.
        """
        self.collect()
        lengths = np.where(query_lens > 0, host_seq_lens, 0)
        request = int(lengths.argmax())
        length = int(lengths[request])
        recalled = None if topk is None else int(topk[request])
        if self._readout.pending or self._memory.reads_all(self._page_tokens, length, recalled):
            return
        self._budget = min(self._budget + TOKENS, length)
        if self._budget < length:
            return
        self._phase, self._samples, self._budget = phase, self._samples + 1, 0
        last = int(query_lens[: request + 1].sum()) - 1
        row = request
        if phase == "prefill":  # the last query block of the request (see `reference.select_pages`)
            block, begin = self._memory.query_block, length - int(query_lens[request])
            row = int(query_lens[:request].sum()) // block + 2 * request + (length - 1) // block - begin // block
        head, group = self._samples % impl.num_kv_heads, impl.num_heads // impl.num_kv_heads
        table = selected.block_table[row, head]
        entry = torch.arange(len(table), device=table.device)
        read = table.masked_fill(entry * self._page_tokens >= selected.seq_lens[row], -1)
        fraction = mass_covered(
            query[last, head * group : (head + 1) * group], pages, impl.layout, head,
            batch.block_table[request, : -(-length // self._page_tokens)], batch.seq_lens[request], read, impl.scale,
            impl.soft_cap, calibration,
        )  # fmt: skip
        self._readout.put(fraction.nan_to_num(nan=0.0).clamp(max=1.0))
        self.collect()

    def collect(self) -> None:
        """Report the last fraction if it has been computed."""
        if (fraction := self._readout.take()) is not None:
            self._report(self._phase, *fraction)
