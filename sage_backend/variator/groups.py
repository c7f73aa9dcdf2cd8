# SPDX-License-Identifier: Apache-2.0
"""Which tokens become groups: those of a prompt, except its first and last ones, in a request with a ratio above 1.

A group begins at a multiple of the ratio, counted from the start of the prompt, and lies in one block of the KV cache and in
one chunk. So a token's keys and values depend only on the prompt and on the request's `CompressionPlan`: not on other requests,
on chunks, or on the contents of the prefix cache.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sage_backend.options import MIN_TAIL

COMPRESSOR = "sage.variator"
"""The name under which an engine's layers (`static_forward_context`) hold its `layers.Compressor`, if it has one."""

CHUNK = MIN_TAIL
"""Chunks end at multiples of this in the compressed part of a prompt. It is a multiple of all ratios, and more tokens than
speculative decoding verifies at once, below which a chunk would count as a decode. The same holds for MIN_TAIL, so that the
chunk with the last group never counts as a decode."""

START = CHUNK
"""Tokens at a prompt's start that stay uncompressed. Attention rests on the first tokens of any text (attention sinks). Pooled
with their neighbours, they are lost to every token behind."""

FFN_SHARE = 2 / 3
"""Of a token's operations: 8 of 12 hidden² where an FFN is four times as wide as the model (Vaswani et al. 2017), and attention
to a long prompt does not yet count. Good enough to compare what is cached with what is not."""


class CompressionPlan(NamedTuple):
    """How a prompt is read: its tokens from START to `limit` in groups of `ratio`, none if `limit` is 0. Goes to workers in a
    request's `extra_args`."""

    ratio: int
    limit: int

    @classmethod
    def of(cls, prompt: int, ratio: int, tail: int) -> "CompressionPlan":
        """For a prompt of `prompt` tokens, the last `tail` of which stay uncompressed."""
        limit = max(0, prompt - tail) // ratio * ratio
        return cls(ratio, limit if ratio > 1 and limit > START else 0)

    def groups(self, first: int, end: int) -> tuple[int, int]:
        """The part of the tokens [first, end) that whole groups cover, as [first, end). It is empty if there is none."""
        first = -(-max(first, START) // self.ratio) * self.ratio
        end = min(end, self.limit) // self.ratio * self.ratio
        return first, max(first, end)

    def work(self, prompt: int, cached: int) -> float:
        """What is left to compute of a prompt of `prompt` tokens, `cached` of which are in the prefix cache, in uncompressed
        tokens."""
        first, end = self.groups(cached, prompt)
        return prompt - cached - (end - first) * FFN_SHARE * (1 - 1 / self.ratio)


PLAIN = CompressionPlan(1, 0)


@dataclass(frozen=True)
class Segment:
    """Rows [first, end) of a step's batch with one ratio."""

    first: int
    end: int
    ratio: int

    @property
    def rows(self) -> int:
        """Rows that an FFN computes for them."""
        return (self.end - self.first) // self.ratio


def segments(requests: Iterable[tuple[int, int, int, CompressionPlan]]) -> list[Segment]:
    """Cut a batch into as few segments as possible; an empty list if nothing of it is compressed.

    requests: for each, in the order of the batch, its first row, the row behind its last one, the position of its first row's
    token in its prompt, and its plan.
    """
    cut: list[Segment] = []

    def add(first: int, end: int, ratio: int) -> None:
        if first == end:
            return
        if cut and cut[-1].ratio == ratio:
            first = cut.pop().first
        cut.append(Segment(first, end, ratio))

    for row, behind, position, plan in requests:
        first, end = (row + at - position for at in plan.groups(position, position + behind - row))
        if plan.ratio == 1 or first >= end:
            first = end = behind
        add(row, first, 1)
        add(first, end, plan.ratio)
        add(end, behind, 1)
    return cut if any(segment.ratio > 1 for segment in cut) else []


def clip(tokens: int, position: int, plan: CompressionPlan) -> int:
    """The tokens, of `tokens` from `position` on, that a chunk may have to end between groups, and not to count as a decode if
    it has some. 0 asks the scheduler to wait for a larger budget; behind `limit`, at least MIN_TAIL tokens are left."""
    end = position + tokens
    if position < plan.limit and tokens < CHUNK:
        return 0
    return tokens if end >= plan.limit else max(0, end // CHUNK * CHUNK - position)


def compressed(cut: Sequence[Segment]) -> dict[int, int]:
    """Tokens in groups, by ratio."""
    tokens: dict[int, int] = {}
    for segment in cut:
        if segment.ratio > 1:
            tokens[segment.ratio] = tokens.get(segment.ratio, 0) + segment.end - segment.first
    return tokens
