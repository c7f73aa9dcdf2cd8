# SPDX-License-Identifier: Apache-2.0
"""What may represent a page when memory chooses pages, and the scores that queries get from it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Pages = tuple[Tensor, ...]
"""Representatives of pages, each [kv_heads, pages, ...]."""


@dataclass(frozen=True)
class Context:
    """Pages. keys: [kv_heads, pages, tokens, head_dim]. logits, received: [kv_heads, pages, tokens], `following_logits`, and
    the attention that tokens got while they were local."""

    keys: Tensor
    logits: Tensor
    received: Tensor


@dataclass(frozen=True)
class Method:
    """vectors: of head_dim numbers, which represent a page for one KV head. score: from queries [kv_heads, rows, queries,
    head_dim], times the scale of logits, and representatives, the scores [kv_heads, rows, pages]."""

    vectors: int
    build: Callable[[Context], Pages]
    score: Callable[..., Tensor]

    def bytes(self, head_dim: int) -> int:
        """In float16."""
        return 2 * self.vectors * head_dim

    def represent(self, context: Context) -> Pages:
        """The representatives, as float16 keeps them."""
        return tuple(x.half().float() for x in self.build(context))


def following_logits(queries: Tensor, keys: Tensor, local_tokens: int) -> Tensor:
    """The products of keys with the mean of the `local_tokens` queries that follow, fewer at the end, [kv_heads, tokens]. Both
    arguments: [kv_heads, tokens, head_dim]."""
    tokens = keys.shape[1]
    ahead = torch.arange(1, tokens + 1, device=keys.device)
    end = (ahead + local_tokens).clamp(max=tokens)
    sums = torch.nn.functional.pad(queries.cumsum(1, dtype=torch.float64), (0, 0, 1, 0))
    following = (sums[:, end] - sums[:, ahead]) / (end - ahead).clamp(min=1)[:, None]
    return (following * keys).sum(-1)


def best(scores: Tensor, count: int) -> Tensor:
    """Which pages are among the `count` with the largest scores."""
    found = scores.topk(min(count, scores.shape[-1]), -1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, found, True)


def mean(context: Context) -> Tensor:
    return context.keys.mean(2)


def half_range(context: Context) -> Tensor:
    return (context.keys.amax(2) - context.keys.amin(2)) / 2


def tokens(keys: Tensor, by: Tensor, count: int) -> Pages:
    return (torch.take_along_dim(keys, by.topk(count, -1).indices[..., None], 2),)


def summed(q: Tensor, representatives: Tensor) -> Tensor:
    """The products with all representatives of a page, as the mean over the queries."""
    return q.mean(2) @ representatives.sum(2).mT


def largest(q: Tensor, representatives: Tensor) -> Tensor:
    return torch.einsum("hrnd,hptd->hrnpt", q, representatives).amax(-1).mean(2)


def in_box(q: Tensor, center: Tensor, radius: Tensor, reach: float = 1.0) -> Tensor:
    """The largest logit in a box, as the mean over the queries."""
    return q.mean(2) @ center.mT + reach * q.abs().mean(2) @ radius.mT


def in_ellipsoid(q: Tensor, center: Tensor, radius: Tensor, reach: float) -> Tensor:
    """The largest logit in an ellipsoid, as the mean over the queries; in its second term, the root mean square."""
    return q.mean(2) @ center.mT + reach * (q.square().mean(2) @ radius.square().mT).sqrt()


def normal(q: Tensor, center: Tensor, deviation: Tensor) -> Tensor:
    """The logarithm of the mean exponential of logits if keys were normal and channels independent, as the mean over the
    queries."""
    return q.mean(2) @ center.mT + q.square().mean(2) @ deviation.square().mT / 2


METHODS = {
    "mean": Method(1, lambda c: (mean(c),), lambda q, m: q.mean(2) @ m.mT),
    "1 token": Method(1, lambda c: tokens(c.keys, c.logits, 1), summed),
    "4 tokens": Method(4, lambda c: tokens(c.keys, c.logits, 4), summed),
    "4 tokens, the largest": Method(4, lambda c: tokens(c.keys, c.logits, 4), largest),
    "4 tokens by attention": Method(4, lambda c: tokens(c.keys, c.received, 4), summed),
    "mean, deviation: normal": Method(2, lambda c: (mean(c), c.keys.std(2)), normal),
    "bounds": Method(
        2,
        lambda c: (c.keys.amin(2), c.keys.amax(2)),
        lambda q, least, most: in_box(q, (least + most) / 2, (most - least) / 2),
    ),
    "mean, range: box of 0.75": Method(2, lambda c: (mean(c), half_range(c)), functools.partial(in_box, reach=0.75)),
    **{
        f"mean, range: ellipsoid of {reach}": Method(
            2, lambda c: (mean(c), half_range(c)), functools.partial(in_ellipsoid, reach=reach)
        )
        for reach in (1, 2, 3)
    },
    "exact": Method(0, lambda _: (), lambda *_: torch.empty(0)),
}
"""`1 token`, `4 tokens`: InfLLM's (Xiao et al., NeurIPS 2024), the tokens of a page with the largest mean product
with the queries that follow, and the sum of their logits; `by attention`: those that got most attention while they were local.
`bounds`: Quest's. `exact`: attention itself, the ceiling."""
