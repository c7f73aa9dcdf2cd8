# SPDX-License-Identifier: Apache-2.0
"""How many pages a worker fetches from host memory, and how long that takes, counted by the device."""

from collections.abc import Callable, Sequence

import torch

from sage_backend.observability.readout import Readout
from sage_kernels import PageCache

_READ_EVERY = 16
"""Steps from one reading of the counters to the next."""


class HostPages:
    """Reports what layers have fetched since the last report, without waiting for the device."""

    def __init__(self, layers: Sequence[tuple[PageCache, int]], report: Callable[[int, int, float], None]) -> None:
        """layers: the cache of each layer, and the bytes of a page. report: takes pages of one KV head, their bytes, and the
        seconds that fetches took."""
        self._fetched, self._times = [cache.fetched for cache, _ in layers], [cache.times for cache, _ in layers]
        device = self._fetched[0].device
        self._page_bytes = torch.tensor([size for cache, size in layers for _ in cache.fetched], device=device)
        self._readout, self._report = Readout(device, 3), report
        self.restart()

    def restart(self) -> None:
        """Count from the next step on: what was fetched before was not for users."""
        self._reported: list[float] | None = None
        self._readout.pending = False
        self._steps = 0

    def step(self) -> None:
        """To be called once a step, before its layers run."""
        if (totals := self._readout.take()) is not None:
            if self._reported is not None:
                pages, size, nanoseconds = (now - before for now, before in zip(totals, self._reported, strict=True))
                self._report(int(pages), int(size), nanoseconds / 1e9)
            self._reported = totals
        if self._steps % _READ_EVERY == 0 and not self._readout.pending:
            counts = torch.cat(self._fetched)
            began, ended, before = torch.stack(self._times).unbind(1)
            took = (before + ended - began).sum()
            self._readout.put(torch.stack([counts.sum(), (counts * self._page_bytes).sum(), took]))
        self._steps += 1
