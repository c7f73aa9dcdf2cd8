# SPDX-License-Identifier: Apache-2.0
"""Pages into frames, in plain torch (`sage_kernels.page_cache`)."""

import time
from dataclasses import replace

import torch

from sage_kernels.batch import PagedBatch
from sage_kernels.page_cache import PageCache
from sage_paged import PageLayout

EVICTION_WINDOW = 1024
"""Frames among which the least recently used ones are found at a time."""
MAX_AGE = (1 << 16) - 1
"""Frames that were not used for as many fetches are equally old."""


def frame_slots(cache: PageCache, slots: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """Where tokens go in frames: int64 [kv_heads, tokens], -1 where a token's page has no frame. slots: int64 [tokens], as of
    `store`."""
    frame = cache.frame_of[slots.clamp(min=0) // layout.tokens].T.long()
    return torch.where((slots >= 0) & (frame >= 0), frame * layout.tokens + slots % layout.tokens, -1)


def fetch_pages(cache: PageCache, pages: torch.Tensor, layout: PageLayout, batch: PagedBatch) -> PagedBatch:
    """Bring what a batch reads into frames. Returns the batch with frames in the place of pages.

    pages: uint8 [blocks, kv_heads, page_bytes], of which every one that the batch reads is copied unless a frame has it
    already. batch: with one page list for all heads or with one for each; it reads at most as many pages as there are frames.
    What was not used for longest makes room, among EVICTION_WINDOW frames at a time, from the hand on.
    """
    cache.times[2] += cache.times[1] - cache.times[0]
    cache.times[:2] = time.perf_counter_ns()
    brings = False
    kv_heads = pages.shape[1]
    table = batch.block_table if batch.block_table.dim() == 3 else batch.block_table[:, None].expand(-1, kv_heads, -1)
    read = torch.arange(table.shape[2])[None, :] * layout.tokens < batch.seq_lens[:, None]
    result = torch.zeros_like(table)
    for head in range(kv_heads):
        frame_of, now = cache.frame_of[:, head], int(cache.clock[head])
        wanted = table[:, head][read].long().unique()
        frames = frame_of[wanted].long()
        cache.last_use[frames[frames >= 0], head] = now
        missing = wanted[frames < 0].tolist()
        _bring(cache, pages, head, missing, now)
        brings |= bool(missing)
        cache.clock[head] = now + 1
        result[:, head] = torch.where(read, frame_of[table[:, head].long()], 0)
    if brings:
        cache.times[1] = time.perf_counter_ns()
    return replace(batch, block_table=result)


def _bring(cache: PageCache, pages: torch.Tensor, head: int, missing: list[int], now: int) -> None:
    """Copy the pages `missing` of a KV head into frames that were not used at the time `now`."""
    frames, begin = len(cache.frames), int(cache.hand[head])
    cache.fetched[head] += len(missing)
    scanned = 0
    while missing and scanned < frames:
        window = (begin + torch.arange(scanned, min(scanned + EVICTION_WINDOW, frames))) % frames
        age = (now - cache.last_use[window, head]).clamp(max=MAX_AGE)
        victims = window[age.argsort(descending=True, stable=True)][: int((age > 0).sum())]
        for frame, page in zip(victims.tolist(), missing, strict=False):
            if (evicted := int(cache.page_in[frame, head])) >= 0:
                cache.frame_of[evicted, head] = -1
            cache.page_in[frame, head], cache.frame_of[page, head], cache.last_use[frame, head] = page, frame, now
            cache.frames[frame, head] = pages[page, head]
        missing = missing[len(victims) :]
        scanned += len(window)
    cache.hand[head] = (begin + scanned) % frames
