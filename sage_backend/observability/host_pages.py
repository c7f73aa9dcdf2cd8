# SPDX-License-Identifier: Apache-2.0
"""How many pages a worker fetches from host memory, counted by the device."""

from collections.abc import Callable, Sequence

import torch

from sage_backend.observability.readout import Readout

_READ_EVERY = 16
"""Steps from one reading of the counters to the next."""


class HostPages:
    """Reports what layers have fetched since the last report, without waiting for the device."""

    def __init__(self, layers: Sequence[tuple[torch.Tensor, int]], report: Callable[[int, int], None]) -> None:
        """layers: `PageCache.fetched` of each layer, int64 [kv_heads], and the bytes of a page. report: takes pages of one KV
        head, and their bytes."""
        self._counters = [fetched for fetched, _ in layers]
        device = self._counters[0].device
        self._page_bytes = torch.tensor([size for fetched, size in layers for _ in fetched], device=device)
        self._pages, self._bytes, self._report = Readout(device), Readout(device), report
        self.restart()

    def restart(self) -> None:
        """Count from the next step on: what was fetched before was not for users."""
        self._reported: tuple[int, int] | None = None
        self._pages.pending = self._bytes.pending = False
        self._steps = 0

    def step(self) -> None:
        """To be called once a step, before its layers run."""
        size = self._bytes.take()  # first: it was put last
        if size is not None and (pages := self._pages.take()) is not None:
            total = int(pages), int(size)
            if self._reported is not None:
                self._report(total[0] - self._reported[0], total[1] - self._reported[1])
            self._reported = total
        if self._steps % _READ_EVERY == 0 and not self._bytes.pending:
            counts = torch.cat(self._counters)
            self._pages.put(counts.sum())
            self._bytes.put((counts * self._page_bytes).sum())
        self._steps += 1
