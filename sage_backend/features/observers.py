# SPDX-License-Identifier: Apache-2.0
"""Observers of one layer, which see its keys, values and queries before quantization. `SageImpl.observer` is one."""

from dataclasses import replace
from typing import Any, Protocol

import torch

from sage_kernels import Modifiers, PagedBatch, PageLayout, attend_prefill, reference, store
from sage_paged import K_BITS

_ERROR_QUERIES = 256


class Observer(Protocol):
    """What a layer calls in each step if it has an observer."""

    def stored(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        """New tokens were stored. key, value: [tokens, kv_heads, head_dim] in the model's dtype; slots: int64 [tokens],
        negative for padding."""

    def attended(self, query: torch.Tensor) -> None:
        """The layer attended. query: [tokens, heads, head_dim] in the model's dtype, for the tokens stored last."""


class Means:
    """Sums the keys and values that a layer stores, and the squares of values."""

    def __init__(self) -> None:
        self.sum: torch.Tensor | float = 0.0
        self.count = 0

    def stored(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        used = slots >= 0
        key, value = key[used].double(), value[used].double()
        self.sum = self.sum + torch.stack([key.sum(0), value.sum(0), value.square().sum(0)], 1)
        self.count += len(key)

    def attended(self, query: torch.Tensor) -> None:
        """Nothing is to be learned from queries."""

    def result(self) -> torch.Tensor | None:
        """The means of keys, of values and of squares of values, float32 [kv_heads, 3, head_dim] on the CPU, or None if the
        layer has stored nothing."""
        return (self.sum / self.count).float().cpu() if self.count and isinstance(self.sum, torch.Tensor) else None


class PageErrors:
    """Squared errors of a layer's attention with each kind of page, over prompts that come whole and one at a time.

    The last _ERROR_QUERIES queries of a prompt count, compared with exact attention to the keys and values before quantization.
    """

    def __init__(self, impl: Any) -> None:
        self.impl = impl
        self.key = self.value = torch.empty(0)
        self.squares = dict.fromkeys((*K_BITS, "exact"), 0.0)
        """By bits of keys, the sum of squared errors; by "exact", the sum of the exact outputs' squares."""

    def stored(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        self.key, self.value = key[slots >= 0], value[slots >= 0]

    def attended(self, query: torch.Tensor) -> None:
        tokens, impl, device = len(self.key), self.impl, query.device
        if len(query) != tokens:
            return
        query = query[-_ERROR_QUERIES:]
        plain = Modifiers(impl.window, impl.soft_cap, impl.sinks)
        exact = reference.exact_attention(query, self.key, self.value, impl.scale, plain)
        self.squares["exact"] += float(exact.square().sum())
        for bits in K_BITS:
            layout = PageLayout(impl.head_size, bits, impl.layout.tokens)
            blocks = -(-tokens // layout.tokens)
            pages = layout.empty(blocks, self.key.shape[1], device)
            store(self.key, self.value, pages, torch.arange(tokens, device=device), layout, impl.anchor, impl.v_anchor)
            table, lengths, starts = (
                torch.tensor(x, dtype=torch.int32, device=device) for x in ([[*range(blocks)]], [tokens], [0, len(query)])
            )
            batch = PagedBatch(table, lengths, starts)
            out = torch.empty_like(exact)
            q_block = impl.q_block(device, layout)
            smoothed = replace(plain, k_anchor=impl.anchor, v_anchor=impl.v_anchor, q_block=q_block)
            attend_prefill(query, pages, layout, batch, impl.scale, out, smoothed)
            self.squares[bits] += float((out - exact).square().sum())
