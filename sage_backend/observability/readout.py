# SPDX-License-Identifier: Apache-2.0
"""Reads a number that a device computes, without waiting for it."""

import torch


class Readout:
    """One number at a time."""

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        # Pinned, since a copy to other memory would wait; and allocated at the start, since pinning waits, too.
        self._number = torch.zeros((), dtype=torch.float64, pin_memory=on_gpu and torch.cuda.is_available())
        self._event = torch.cuda.Event() if on_gpu else None
        self.pending = False

    def put(self, number: torch.Tensor) -> None:
        """number: [] of any type, on the device."""
        self._number.copy_(number.double(), non_blocking=True)
        if self._event is not None:
            self._event.record()
        self.pending = True

    def take(self) -> float | None:
        """The number that was put last, once; None while it has not been computed."""
        if not self.pending or (self._event is not None and not self._event.query()):
            return None
        self.pending = False
        return float(self._number)
