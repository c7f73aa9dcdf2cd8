# SPDX-License-Identifier: Apache-2.0
"""The canary: for a sample of prompts, the error of attention over quantized pages against exact attention.

Keys and values are exact only in the step that computes them. So a check takes a prompt, or its first chunk, no part of which
came from the prefix cache: one layer, one KV head, the last few queries among the first tokens. The work is the same for every
prompt, however long, and nothing waits for the device. docs/operator/metrics.md is the user's side.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sage_backend.observability.readout import Readout
from sage_backend.options import SageOptions
from sage_kernels import Modifiers, reference

TOKENS = 512
"""A check reads this many tokens of a prompt, from its start."""
QUERIES = 16
"""A check attends from this many of them, the last ones."""
LARGEST = 2.0
"""Errors are reported up to here, and NaN as this. Two outputs that have nothing in common are sqrt(2) apart."""


@dataclass(frozen=True)
class Check:
    """A check of one step: in `layer`, of the prompt whose first `tokens` tokens are rows of the batch from `start` on.

    check_index: the number of earlier checks of this layer, by which KV heads alternate.
    """

    canary: "Canary"
    layer: str
    check_index: int
    start: int
    tokens: int

    def compare(self, impl: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor) -> None:
        """Compute the relative L2 error and hand it to the canary. impl: the layer's SageImpl; query, out: [tokens, heads,
        head_size]; key, value: [tokens, kv_heads, head_size], before quantization."""
        head, group = self.check_index % impl.num_kv_heads, impl.num_heads // impl.num_kv_heads
        heads = slice(head * group, (head + 1) * group)
        rows = slice(self.start, self.start + self.tokens)
        queries = slice(rows.stop - min(QUERIES, self.tokens), rows.stop)
        modifiers = Modifiers(impl.window, impl.soft_cap, None if impl.sinks is None else impl.sinks[heads])
        key, value = key[rows, head : head + 1], value[rows, head : head + 1]
        exact = reference.exact_attention(query[queries, heads], key, value, impl.scale, modifiers)
        error = (out[queries, heads].float() - exact).norm() / exact.norm().clamp(min=torch.finfo(torch.float32).tiny)
        self.canary.put(error.nan_to_num(nan=LARGEST).clamp(max=LARGEST))


class Canary:
    """Chooses the checks. Every method takes microseconds."""

    def __init__(self, options: SageOptions, report: Callable[[float], None]) -> None:
        """report: takes each relative error."""
        assert options.canary is not None
        self._every, self._memory, self._page_tokens = options.canary, options.memory, options.page_tokens
        self._report = report
        self._groups: dict[tuple[str, ...], Sequence[str]] = {}
        self._readout: Readout | None = None
        self._steps = 0
        self._due: tuple[str, int] | None = None
        """Of the step whose metadata are being built, the layer to check and the check's index."""

    def add_layers(self, names: Sequence[str], owners: Sequence[str], device: torch.device) -> None:
        """Add a group of layers that share metadata. owners: those with keys of their own. A draft model's layers come last."""
        self._groups[tuple(names)] = owners
        self._readout = self._readout or Readout(device)

    def plan(self, names: Sequence[str], common: Any, num_decodes: int, topk: Sequence[int] | None = None) -> Check | None:
        """The check that is due in the layers `names` of a step, if any. common: their CommonAttentionMetadata; topk: the pages
        that memory recalls for each request, if they have numbers of their own."""
        prompt = self._prompt(common, num_decodes, topk)
        if tuple(names) == next(iter(self._groups)):
            self.collect()
            self._due = self._next() if prompt is not None else None
        if prompt is None or self._due is None or self._due[0] not in names:
            return None
        return Check(self, *self._due, *prompt)

    def _next(self) -> tuple[str, int] | None:
        """Count a step that has a prompt to check. There is no check while the result of the last one is still pending."""
        self._steps += 1
        if self._steps % self._every or self._readout is None or self._readout.pending:
            return None
        layers = [layer for owners in self._groups.values() for layer in owners]
        check_index, layer = divmod(self._steps // self._every - 1, len(layers))
        return layers[layer], check_index

    def _prompt(self, common: Any, num_decodes: int, topk: Sequence[int] | None) -> tuple[int, int] | None:
        """Of the prompts that begin in this step and are read whole, the longest one's first row and tokens to check."""
        lengths = common.seq_lens_cpu_upper_bound
        if lengths is None or len(lengths) == num_decodes:
            return None
        starts, lengths = common.query_start_loc_cpu.numpy(), lengths.numpy()
        begun = np.where(np.diff(starts) == lengths, lengths, 0)
        begun[:num_decodes] = 0  # so that no graph is captured with a check, nor replayed without
        if self._memory is not None:
            reads_all, own = self._memory.policy.reads_all, topk or [self._memory.topk_pages] * len(begun)
            whole = [reads_all(self._page_tokens, *each) for each in zip(begun.tolist(), own, strict=True)]
            begun = np.where(whole, begun, 0)
        if not begun.any():
            return None
        longest = int(begun.argmax())
        return int(starts[longest]), min(int(begun[longest]), TOKENS)

    def put(self, error: torch.Tensor) -> None:
        """Take the error of a check, float [] on the device."""
        assert self._readout is not None
        self._readout.put(error)
        self.collect()

    def collect(self) -> None:
        """Report the error of the last check if it has been computed."""
        if self._readout is not None and (error := self._readout.take()) is not None:
            self._report(*error)
