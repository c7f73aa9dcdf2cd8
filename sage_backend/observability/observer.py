# SPDX-License-Identifier: Apache-2.0
"""The one object that attention reports a step to. It passes on to metrics, coverage, the canary and calibration.

`SageMetadata.observer` is the observer of a step, made by the metadata builder; `SageImpl.forward` calls it. Each call takes
nanoseconds where nothing is to be observed, and none waits for the device.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from sage_backend.observability.canary import Check
from sage_backend.observability.recorder import Recorder, Sample, timed
from sage_kernels import LayerCalibration, PagedBatch


@dataclass(frozen=True)
class StepObserver:
    """sample: the calls of this step to time and whose coverage to measure; check: what to compare with exact attention. None
    for nothing."""

    sample: Sample | None = None
    check: Check | None = None

    @classmethod
    def of(
        cls, recorder: Recorder, names: list[str], common: Any, num_decodes: int, topk: list[int] | None = None
    ) -> "StepObserver":
        """What the recorder wants to see of the step that `common` (CommonAttentionMetadata) was made for, in the layers
        `names`. topk: the pages that its requests have recalled, if they have numbers of their own."""
        return cls(recorder.step(names, common, num_decodes, topk), recorder.check(names, common, num_decodes, topk))

    def timed(self, phase: str, layer: Any, device: torch.device) -> AbstractContextManager[None]:
        """The context in which `layer` (vLLM's Attention) selects pages and attends for a phase, "prefill" or "decode"."""
        return timed(self.sample, phase, layer, device)

    def selected(
        self,
        phase: str,
        layer: Any,
        query: torch.Tensor,
        pages: torch.Tensor,
        batch: PagedBatch,
        selected: PagedBatch,
        calibration: LayerCalibration,
    ) -> None:
        """Memory has read `selected` instead of `batch`, both of the requests of one phase.

        query: [tokens, heads, head_size], from the phase's first token on; pages: uint8, as of `PageLayout.pages`;
        calibration: that of the stored keys.
        """
        if self.sample is not None:
            self.sample.cover(phase, layer, query, pages, batch, selected, calibration)

    def attended(
        self, layer: Any, impl: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor
    ) -> None:
        """A layer has attended for all requests of the step. layer: vLLM's Attention; impl: its SageImpl.

        query, out: [tokens, heads, head_size]; key, value: [tokens, kv_heads, head_size], before quantization.
        """
        if impl.observer is not None:
            impl.observer.attended(query, out)
        if self.check is not None and self.check.layer == layer.layer_name:
            self.check.compare(impl, query, key, value, out)


NOT_OBSERVED = StepObserver()
