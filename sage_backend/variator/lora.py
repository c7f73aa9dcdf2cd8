# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters of the rows that FFNs with plugins compute.

vLLM's LoRA layers ask a punica wrapper which adapter a row has, and it knows the rows of the step: one for each token. In a
step with groups, an FFN computes fewer. A group lies in one request, so its row has the adapter of its first token.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.lora.punica_wrapper import get_punica_wrapper

from sage_backend.variator.groups import Segment


class AdaptersOfGroups:
    """A punica wrapper for the rows that FFNs with plugins compute, which takes the place of the step's while they do."""

    def __init__(self, manager: Any) -> None:
        """manager: the LoRAModelManager of a worker's model."""
        self._manager = manager
        self._wrapper = get_punica_wrapper(
            manager.max_num_batched_tokens,
            max_batches=manager.max_num_seqs,
            device=manager.device,
            lora_config=manager.lora_config,
        )
        self._known: Any = None

    def of(self, ffn: nn.Module) -> Callable[[Sequence[Segment]], AbstractContextManager[Any]]:
        """Makes a context of a step's segments, within which the FFN's rows are those that it computes for the segments.
        Outside, they are the step's."""
        layers = [layer for layer in ffn.modules() if isinstance(layer, BaseLayerWithLoRA)]
        return partial(self._swapped, layers) if layers else nullcontext  # adapters may be for other layers only

    @contextmanager
    def _swapped(self, layers: Sequence[Any], cut: Sequence[Segment]) -> Iterator[None]:
        self._update(cut)
        of_step = [layer.punica_wrapper for layer in layers]
        try:
            for layer in layers:
                layer.set_mapping(self._wrapper)
            yield
        finally:
            for layer, wrapper in zip(layers, of_step, strict=True):
                layer.set_mapping(wrapper)

    def _update(self, cut: Sequence[Segment]) -> None:
        """Build the wrapper's metadata for these segments of the current step, unless an earlier FFN has."""
        manager = self._manager
        asked = manager._last_mapping, tuple(manager.lora_index_to_id), cut
        if asked == self._known:
            return
        of_step, slots, _ = asked
        of_groups = [adapter for each in cut for adapter in of_step.index_mapping[each.first : each.end : each.ratio]]
        # As LoRAModelManager._set_adapter_mapping does for the step.
        mapping = replace(of_step, index_mapping=tuple(of_groups))
        self._wrapper.update_metadata(mapping, list(slots), manager.lora_slots + 1, manager.vocab_size)
        self._known = asked
