# SPDX-License-Identifier: Apache-2.0
"""Observers of one layer, which see its keys, values and queries before quantization. `SageImpl.observer` is one."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, Protocol

import torch

from sage_kernels import LayerCalibration, Modifiers, PagedBatch, attend_prefill, reference, store

_ERROR_QUERIES = 256
"""The last queries of a prompt, for which errors of pages are measured, and tokens that are computed with at a time."""
_LEAST_OFFSET = 512
"""Keys and queries also count as they would be this far on, twice as far, and so on, up to the context of a model."""


class Observer(Protocol):
    """What a layer calls in each step if it has an observer."""

    def stored(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        """New tokens were stored. key, value: [tokens, kv_heads, head_dim] in the model's dtype; slots: int64 [tokens],
        negative for padding."""

    def attended(self, query: torch.Tensor, out: torch.Tensor) -> None:
        """The layer attended. query, out: [tokens, heads, head_dim] in the model's dtype, for the tokens stored last. out may
        be overwritten."""


class Statistics:
    """What a calibration needs to know of a layer, over prompts that come one at a time, whole or in chunks.

    Attention to them is computed exactly, so that the statistics of later layers do not depend on how earlier ones quantize.
    Tokens with a number that is not finite do not count.

    Short texts show a slow RoPE pair at a fraction of its turn, where a key with a bias looks constant. Far on in a context, it
    points elsewhere. So keys and queries also count as they would be at further offsets. Each is twice as far as the one
    before: most contexts are short.
    """

    def __init__(self, impl: Any, frequencies: tuple[float, ...] = (), context: int = 0) -> None:
        """impl: the layer's SageImpl. frequencies: of its RoPE pairs, in radians a position; none if they are not known, and
        then keys and queries count at their own positions only. context: how far offsets reach."""
        self.impl = impl
        times = (context // _LEAST_OFFSET).bit_length() if any(frequencies) else 0
        offsets = torch.tensor([0, *(_LEAST_OFFSET << i for i in range(times))], dtype=torch.float64)
        angles = offsets[:, None] * torch.tensor(frequencies or (0.0,), dtype=torch.float64)
        self.turns = torch.polar(torch.ones_like(angles), angles)
        """The rotations of RoPE pairs to the offsets, complex128 [offsets, head_dim // 2]; [1, 1] without frequencies."""
        self.count = 0
        self.key = self.value = torch.empty(0)
        """Of the prompt so far, [tokens, kv_heads, head_dim]."""
        self.new = 0
        """The tokens that were stored last."""
        self.sums: torch.Tensor | None = None
        """Of keys, values, squares of values, and squares of queries (the mean over query heads), float64 [kv_heads, 4,
        head_dim]. None of them at offsets: `result` turns the mean key, and squares are used as means over both channels of a
        pair, which do not turn."""
        self.ranges: torch.Tensor | None = None
        """The least key, the largest key and the largest magnitude of queries at all offsets, float32 [kv_heads, 3,
        head_dim]."""

    def begin_prompt(self) -> None:
        """What is stored next begins a prompt."""
        self.key = self.value = torch.empty(0)

    def stored(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        used = slots >= 0
        key, value = key[used], value[used]
        self.new = len(key)
        before = len(self.key) > 0
        self.key = torch.cat([self.key, key]) if before else key
        self.value = torch.cat([self.value, value]) if before else value
        finite = key.isfinite().flatten(1).all(1) & value.isfinite().flatten(1).all(1)
        key, value = key[finite].double(), value[finite].double()
        if len(key) == 0:
            return
        sums = torch.stack([key.sum(0), value.sum(0), value.square().sum(0), torch.zeros_like(key[0])], 1)
        self.sums = sums if self.sums is None else self.sums + sums
        self.count += len(key)
        for each in self._at_offsets(key):
            self._widen(each.amin(0).float(), each.amax(0).float(), torch.zeros_like(each[0], dtype=torch.float32))

    def attended(self, query: torch.Tensor, out: torch.Tensor) -> None:
        if self.sums is None or self.ranges is None or len(query) != self.new:
            return
        by_head = query[query.isfinite().flatten(1).all(1)].float().unflatten(1, (self.key.shape[1], -1))
        if len(by_head):
            self.sums[:, 3] += by_head.double().square().sum(0).mean(1)
            for each in self._at_offsets(by_head):
                self._widen(self.ranges[:, 0], self.ranges[:, 1], each.abs().amax((0, 2)).float())
        plain = Modifiers(self.impl.window, self.impl.soft_cap, self.impl.sinks)
        for first in range(0, len(query), _ERROR_QUERIES):  # as many logits as fit into memory
            rows = slice(first, min(first + _ERROR_QUERIES, len(query)))
            visible = slice(len(self.key) - len(query) + rows.stop)
            key, value = self.key[visible], self.value[visible]
            out[rows] = reference.exact_attention(query[rows], key, value, self.impl.scale, plain).to(out.dtype)

    def _at_offsets(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """Keys or queries [tokens, ..., head_dim] as they would be at each offset, float64, as many as fit into memory."""
        for part, turn in itertools.product(x.split(_ERROR_QUERIES), self.turns.to(x.device)):
            yield _turned(part.double(), turn)

    def _widen(self, least: torch.Tensor, largest: torch.Tensor, query: torch.Tensor) -> None:
        if self.ranges is not None:
            least = torch.minimum(least, self.ranges[:, 0])
            largest = torch.maximum(largest, self.ranges[:, 1])
            query = torch.maximum(query, self.ranges[:, 2])
        self.ranges = torch.stack([least, largest, query], 1)

    def result(self) -> torch.Tensor | None:
        """float32 [kv_heads, 7, head_dim] on the CPU: the means of keys, of values, of squares of values and of squares of
        queries, the least and the largest key, and the largest magnitude of queries. None if the layer has stored nothing."""
        if self.sums is None or self.ranges is None:
            return None
        means = (self.sums / self.count).cpu()
        means[:, 0] = _turned(means[:, 0], self.turns.mean(0))
        return torch.cat([means.float(), self.ranges.cpu()], 1)


def _turned(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """x, float64 [..., head_dim], with its RoPE pairs as complex numbers times `turn`, complex128 [head_dim // 2]."""
    turned = torch.complex(*x.chunk(2, -1)) * turn
    return torch.cat([turned.real, turned.imag], -1)


class PageErrors:
    """Squared errors of a layer's attention with each kind of page, over prompts that come whole and one at a time.

    The last _ERROR_QUERIES queries of a prompt count, compared with exact attention to the keys and values before quantization.
    """

    def __init__(self, impl: Any, calibration: LayerCalibration, formats: Iterable[tuple[int, int]]) -> None:
        """impl: the layer's SageImpl; calibration: that of the pages, on the layer's device; formats: bits of keys and of
        values of each kind of page."""
        self.impl, self.calibration, self.formats = impl, calibration, tuple(formats)
        self.key = self.value = torch.empty(0)
        self.squares: dict[Any, float] = dict.fromkeys((*self.formats, "exact"), 0.0)
        """By format, the sum of squared errors; by "exact", the sum of the exact outputs' squares."""

    def stored(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        self.key, self.value = key[slots >= 0], value[slots >= 0]

    def attended(self, query: torch.Tensor, out: torch.Tensor) -> None:
        tokens, impl, device = len(self.key), self.impl, query.device
        if len(query) != tokens:
            return
        query = query[-_ERROR_QUERIES:]
        plain = Modifiers(impl.window, impl.soft_cap, impl.sinks)
        exact = reference.exact_attention(query, self.key, self.value, impl.scale, plain)
        self.squares["exact"] += float(exact.square().sum())
        for k_bits, v_bits in self.formats:
            layout = replace(impl.layout, k_bits=k_bits, v_bits=v_bits, has_summary=False)
            blocks = -(-tokens // layout.tokens)
            pages = layout.empty(blocks, self.key.shape[1], device)
            store(self.key, self.value, pages, torch.arange(tokens, device=device), layout, self.calibration)
            table, lengths, starts = (
                torch.tensor(x, dtype=torch.int32, device=device) for x in ([[*range(blocks)]], [tokens], [0, len(query)])
            )
            batch = PagedBatch(table, lengths, starts)
            quantized = torch.empty_like(exact)
            modifiers = replace(plain, calibration=self.calibration, q_block=impl.q_block(device, layout))
            attend_prefill(query, pages, layout, batch, impl.scale, quantized, modifiers)
            self.squares[k_bits, v_bits] += float((quantized - exact).square().sum())
