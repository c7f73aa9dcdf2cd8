# SPDX-License-Identifier: Apache-2.0
"""The part of a layer's pages that a GPU holds when the pages themselves are in host memory.

With InfLLM memory, a query reads few pages of a long context, and consecutive queries read mostly the same ones. So all pages
can be in host memory, where a GPU reaches them over its bus, and the GPU keeps copies of those that were read last, in frames.
As in an operating system's paging, a page table says in which frame a page is. What every query reads of every page, the
summaries, stays on the GPU too.

    store        writes new tokens into their pages, and into the frames of those that have one
    select_pages reads summaries only
    fetch_pages  copies the pages that a batch reads into frames and evicts those that were not used for longest, of up to
                 `reference.EVICTION_WINDOW` frames at a time
    attention    reads frames

Everything is decided and copied by the GPU, in its stream: nothing waits for the host, and all of it can be captured in a CUDA
graph. A frame never holds anything that its page in host memory does not, so evicting is forgetting.
"""

from dataclasses import dataclass

import torch

from sage_paged import PageLayout


@dataclass(frozen=True)
class PageCache:
    """frames: uint8 [frames, kv_heads, page_bytes], copies of pages. Each KV head has a page list of its own, so it has frames
    of its own as well.
    frame_of: int32 [blocks, kv_heads], the page table: the frame that has a page, or -1.
    page_in: int32 [frames, kv_heads], the page that a frame has, or -1.
    last_use: int32 [frames, kv_heads], the time of the last fetch_pages that asked for what is in a frame.
    clock, hand: int32 [kv_heads], the fetches so far, and the frame at which the search for the next victim begins.
    queue: int32 [kv_heads, frames], the pages that a fetch brings in. queued: int32 [2, kv_heads], how many there are: while
        they are found, and while they are copied.
    fetched: int64 [kv_heads], pages brought in so far.
    times: int64 [3], in nanoseconds: when the last fetch began and when it had its pages, and how long those before it took in
        all. A fetch that finds all pages in frames counts nothing.
    summaries: float16 [blocks, kv_heads, 2, head_dim], those of all pages (see `sage_paged.layout`).
    """

    frames: torch.Tensor
    frame_of: torch.Tensor
    page_in: torch.Tensor
    last_use: torch.Tensor
    clock: torch.Tensor
    hand: torch.Tensor
    queue: torch.Tensor
    queued: torch.Tensor
    fetched: torch.Tensor
    times: torch.Tensor
    summaries: torch.Tensor

    @classmethod
    def allocate(
        cls, blocks: int, kv_heads: int, layout: PageLayout, frames: int, device: torch.device | str = "cpu"
    ) -> "PageCache":
        """An empty cache for pages uint8 [blocks, kv_heads, page_bytes], of which a KV head has `frames` on the device."""

        def whole(*shape: int, fill: int = 0) -> torch.Tensor:
            return torch.full(shape, fill, dtype=torch.int32, device=device)

        return cls(
            frames=layout.empty(frames, kv_heads, device),
            frame_of=whole(blocks, kv_heads, fill=-1),
            page_in=whole(frames, kv_heads, fill=-1),
            last_use=whole(frames, kv_heads),
            clock=whole(kv_heads, fill=1),
            hand=whole(kv_heads),
            queue=whole(kv_heads, frames),
            queued=whole(2, kv_heads),
            fetched=torch.zeros(kv_heads, dtype=torch.int64, device=device),
            times=torch.zeros(3, dtype=torch.int64, device=device),
            summaries=torch.zeros(blocks, kv_heads, 2, layout.head_dim, dtype=torch.float16, device=device),
        )

    @staticmethod
    def block_bytes(layout: PageLayout, kv_heads: int) -> int:
        """Bytes on the device that every block takes, in a frame or not: its summaries and its part of the page table."""
        return kv_heads * (4 * layout.head_dim + 4)

    @staticmethod
    def frame_bytes(layout: PageLayout, kv_heads: int) -> int:
        """Bytes on the device that a frame of every KV head takes."""
        return kv_heads * (layout.page_bytes + 12)


def summaries_of(pages: torch.Tensor, layout: PageLayout, cache: PageCache | None) -> torch.Tensor:
    """The summaries of pages, float16 [blocks, kv_heads, 2, head_dim]: those of the cache, or those in the pages themselves."""
    return layout.summaries(pages) if cache is None else cache.summaries
