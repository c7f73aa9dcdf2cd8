# SPDX-License-Identifier: Apache-2.0
"""A canary: on a sample of prompts, what attention made of quantized pages, held against the exact one.

Keys and values are exact only in the step that computes them. So what is checked is a prompt, or its first chunk, none of which
the prefix cache supplied: one layer, one KV head, the last few queries among its first tokens. The work is the same for every
prompt, however long, and nothing waits for the device. docs/metrics.md is the user's side.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sage_backend.observability.readout import Readout
from sage_backend.options import SageOptions
from sage_kernels import reference

TOKENS = 512
"""The first tokens of a prompt, which is all that a check reads."""
QUERIES = 16
"""How many of the last of these are attended from."""
LARGEST = 2.0
"""Errors are told up to here. Two outputs that have nothing in common are sqrt(2) apart; what is no number counts as this."""


@dataclass(frozen=True)
class Check:
    """What is to be checked of a step: in `layer`, the prompt whose first `tokens` tokens stand in the batch from `start` on.

    turn: counts up; the KV heads take turns.
    """

    canary: "Canary"
    layer: str
    turn: int
    start: int
    tokens: int

    def compare(self, impl: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor) -> None:
        """impl: the layer's SageImpl; query, out: [tokens, heads, head_size]; key, value: [tokens, kv_heads, head_size], before
        they are quantized."""
        head, group = self.turn % impl.num_kv_heads, impl.num_heads // impl.num_kv_heads
        heads = slice(head * group, (head + 1) * group)
        known = slice(self.start, self.start + self.tokens)
        asked = slice(known.stop - min(QUERIES, self.tokens), known.stop)
        sinks = None if impl.sinks is None else impl.sinks[heads]
        key, value = key[known, head : head + 1], value[known, head : head + 1]
        exact = reference.exact_attention(query[asked, heads], key, value, impl.scale, impl.window, impl.soft_cap, sinks)
        error = (out[asked, heads].float() - exact).norm() / exact.norm().clamp(min=torch.finfo(torch.float32).tiny)
        self.canary.put(error.nan_to_num(nan=LARGEST).clamp(max=LARGEST))


class Canary:
    """Chooses what is checked. All methods take microseconds."""

    def __init__(self, options: SageOptions, tell: Callable[[float], None]) -> None:
        """tell: takes each relative error."""
        assert options.canary is not None
        self._every, self._memory, self._page_tokens = options.canary, options.memory, options.page_tokens
        self._tell = tell
        self._groups: dict[tuple[str, ...], Sequence[str]] = {}
        self._readout: Readout | None = None
        self._steps = 0
        self._due: tuple[str, int] | None = None
        """Of the step that is being built, the layer to check and the turn of its KV heads."""

    def add_layers(self, names: Sequence[str], owners: Sequence[str], device: torch.device) -> None:
        """Tell of a group of layers, of which the owners have keys of their own. Those of a draft model come last."""
        self._groups[tuple(names)] = owners
        self._readout = self._readout or Readout(device)

    def plan(self, names: Sequence[str], common: Any, num_decodes: int) -> Check | None:
        """What is to be checked of a step in the layers `names`, for which `common` (CommonAttentionMetadata) was made."""
        prompt = self._prompt(common, num_decodes)
        if tuple(names) == next(iter(self._groups)):
            self.collect()
            self._due = self._next() if prompt is not None else None
        if prompt is None or self._due is None or self._due[0] not in names:
            return None
        return Check(self, *self._due, *prompt)

    def _next(self) -> tuple[str, int] | None:
        """Count a step that has a prompt to check. One whose turn comes before the last check could be read goes without."""
        self._steps += 1
        if self._steps % self._every or self._readout is None or self._readout.pending:
            return None
        layers = [layer for owners in self._groups.values() for layer in owners]
        heads, layer = divmod(self._steps // self._every - 1, len(layers))
        return layers[layer], heads

    def _prompt(self, common: Any, num_decodes: int) -> tuple[int, int] | None:
        """Of the prompts that begin in this step and are read whole, the longest one's first row and tokens to check."""
        lengths = common.seq_lens_cpu_upper_bound
        if lengths is None or len(lengths) == num_decodes:
            return None
        starts, lengths = common.query_start_loc_cpu.numpy(), lengths.numpy()
        begun = np.where(np.diff(starts) == lengths, lengths, 0)
        begun[:num_decodes] = 0  # so that no graph is captured with a check, nor replayed without
        if self._memory is not None:
            whole = [self._memory.policy.reads_all(self._page_tokens, tokens) for tokens in begun.tolist()]
            begun = np.where(whole, begun, 0)
        if not begun.any():
            return None
        longest = int(begun.argmax())
        return int(starts[longest]), min(int(begun[longest]), TOKENS)

    def put(self, error: torch.Tensor) -> None:
        """Take the error of a check, a number on the device."""
        assert self._readout is not None
        self._readout.put(error)
        self.collect()

    def collect(self) -> None:
        """Tell the error of the last check, once it is there."""
        if self._readout is not None and (error := self._readout.take()) is not None:
            self._tell(error)
