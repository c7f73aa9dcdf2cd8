# SPDX-License-Identifier: Apache-2.0
"""Reads a number that a device computes, without waiting for it."""

import torch


class Readout:
    """Some numbers at a time."""

    def __init__(self, device: torch.device, count: int = 1) -> None:
        """count: how many are put and taken together."""
        on_gpu = device.type == "cuda"
        # Pinned, since a copy to other memory would wait; and allocated at the start, since pinning waits, too.
        self._numbers = torch.zeros(count, dtype=torch.float64, pin_memory=on_gpu and torch.cuda.is_available())
        self._event = torch.cuda.Event() if on_gpu else None
        self.pending = False

    def put(self, numbers: torch.Tensor) -> None:
        """numbers: [count], or [] for one, of any type, on the device."""
        self._numbers.copy_(numbers.double(), non_blocking=True)
        if self._event is not None:
            self._event.record()
        self.pending = True

    def take(self) -> list[float] | None:
        """The numbers that were put last, once; None while they have not been computed."""
        if not self.pending or (self._event is not None and not self._event.query()):
            return None
        self.pending = False
        return self._numbers.tolist()  # type: ignore[no-any-return]
