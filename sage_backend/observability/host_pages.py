# SPDX-License-Identifier: Apache-2.0
"""How many pages a worker fetches from host memory, counted by the device."""

from collections.abc import Callable, Sequence

import torch

from sage_backend.observability.readout import Readout

_READ_EVERY = 16
"""Steps from one reading of the counters to the next."""


class HostPages:
    """Reports the pages that layers have fetched since the last report, without waiting for the device."""

    def __init__(self, layers: Sequence[tuple[torch.Tensor, int]], report: Callable[[int, int], None]) -> None:
        """layers: `PageCache.fetched` of each layer, int64 [kv_heads], and the bytes of a page. report: takes pages of one KV
        head, and their bytes."""
        self._counters = [fetched for fetched, _ in layers]
        self._page_bytes = sum(size for _, size in layers) / len(layers)
        self._readout, self._report = Readout(self._counters[0].device), report
        self._steps, self._reported = 0, 0

    def step(self) -> None:
        """To be called once a step."""
        if (total := self._readout.take()) is not None:
            new = int(total) - self._reported
            self._report(new, round(new * self._page_bytes))
            self._reported += new
        if self._steps % _READ_EVERY == 0 and not self._readout.pending:
            self._readout.put(torch.stack(self._counters).sum())
        self._steps += 1
