#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Which representative of a page memory should select pages by: how well the selection by each agrees with attention, and
whether it finds pass keys, on activations of the embedded model.

    python3 benchmarks/studies/representatives.py --out benchmarks/results/representatives.json

A context is read as `sage_paged.memory` describes: sinks, local tokens and some of the pages in between. Past the trained
length, these pages are read at positions right before the local ones. Keys are not quantized; representatives are float16. The
study measures

- on held-out text, for single queries (as in decoding) and for rows of 512 (as in prefill): how many of the pages with the most
  attention are selected (recall), and which share of the attention to all pages in between falls on the selected ones;
- with pass keys at 20 depths of held-out text, all of them in between: the share of keys that the model answers, and which
  share of the attention to the page with the key remains while the digits are answered.

Held-out text is read with the exact selection. Prompts with pass keys are read with sinks and local tokens only, up to the
question. Each token of the question selects pages for itself, by the representative that is measured. Plain torch on a CPU;
takes about 20 minutes of processor time.
"""

import functools
import itertools
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/, where common/ is

import torch
from common.activations import HEAD_DIM, load_model
from common.study import study
from torch import Tensor

from sage_backend.demo import HELDOUT
from sage_backend.demo.llama import Llama, Shape, rotary_tables, rotate
from sage_backend.demo.passkey import KEY_DIGITS, QUESTION, PassKeys
from sage_paged import Memory

PAGE, SINKS, ROW = 128, 1, 512
MEMORY = Memory(sink_tokens=SINKS * PAGE, local_tokens=1024, query_block=ROW, trained_tokens=2048)
READ_PAGES = 16
"""Pages in between that are read with held-out text."""
LENGTHS = (4096, 8192, 16384)
TOPK = (8, 16, 32)
KEY_LENGTHS, KEY_TOPK = (4096, 16384), (2, 8)
DEPTHS = [0.05 + 0.65 * i / 19 for i in range(20)]
KV_HEADS, GROUP = Shape.kv_heads, Shape.query_heads // Shape.kv_heads
SCALE = 1 / math.sqrt(HEAD_DIM)
COS, SIN = rotary_tables(Shape(context=2 * max(LENGTHS)))
Pages = tuple[Tensor, ...]
"""Representatives of pages, each [kv_heads, pages, ...]."""


def at(x: Tensor, positions: Tensor) -> Tensor:
    return rotate(x, COS[positions], SIN[positions])


# --- reading a context ------------------------------------------------------------------------------------------------------


class Layer:
    """What a layer keeps of up to `tokens` tokens. q: [kv_heads, group, tokens, HEAD_DIM], without positions. near, far, v:
    [kv_heads, tokens, HEAD_DIM], keys at their positions, keys as if each page were the first, and values. received:
    [kv_heads, tokens], the attention that tokens got while they were local."""

    def __init__(self, tokens: int) -> None:
        self.q = torch.zeros(KV_HEADS, GROUP, tokens, HEAD_DIM)
        self.near, self.far, self.v = torch.zeros(3, KV_HEADS, tokens, HEAD_DIM)
        self.received = torch.zeros(KV_HEADS, tokens)

    def store(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> None:
        self.q[:, :, positions] = q.unflatten(0, (KV_HEADS, GROUP))
        self.near[:, positions], self.far[:, positions], self.v[:, positions] = at(k, positions), at(k, positions % PAGE), v

    def representatives(self, tokens: int) -> dict[str, Pages]:
        """The representatives of the full pages after the sinks, by name of the method."""
        ahead = torch.arange(1, tokens + 1)
        end = (ahead + MEMORY.local_tokens).clamp(max=tokens)
        queries = at(self.q[:, :, :tokens], ahead - 1).mean(1)
        sums = torch.nn.functional.pad(queries.cumsum(1, dtype=torch.float64), (0, 0, 1, 0))
        following = (sums[:, end] - sums[:, ahead]) / (end - ahead).clamp(min=1)[:, None]
        logits = (following * self.near[:, :tokens]).sum(-1)

        def paged(x: Tensor) -> Tensor:
            return x[:, SINKS * PAGE : tokens // PAGE * PAGE].unflatten(1, (-1, PAGE))

        context = Context(paged(self.far), paged(logits), paged(self.received))
        return {name: tuple(x.half().float() for x in method.build(context)) for name, method in METHODS.items()}


class Row:
    """Queries of a layer, at ascending positions, with the same first local page, and their logits.

    local: the first local page. far, near: logits [kv_heads, group, queries, tokens] for the keys before it (in the first
    `pages` pages; None for all) and from it on.
    """

    def __init__(self, layer: Layer, positions: Tensor, pages: int | None = None) -> None:
        first, end = int(positions[0]), int(positions[-1]) + 1
        self.positions = positions
        self.queries = layer.q[:, :, positions] * SCALE
        self.local = MEMORY.local_page(first, PAGE) if end > MEMORY.trained_tokens else 0
        begin = self.local * PAGE
        far_keys = layer.far[:, : min(self.local, self.local if pages is None else pages) * PAGE]
        self.far = self._products(positions - begin + PAGE, far_keys)
        self.near = self._products(positions, layer.near[:, begin:end])
        self.near.masked_fill_(torch.arange(begin, end) > positions[:, None], -math.inf)

    def _products(self, positions: Tensor, keys: Tensor) -> Tensor:
        return (at(self.queries, positions).flatten(1, 2) @ keys.mT).unflatten(1, (GROUP, -1))

    def attention(self) -> Tensor:
        """Attention to the pages in between, [kv_heads, group, queries, pages]."""
        total = torch.cat([self.far, self.near], -1).logsumexp(-1, keepdim=True)
        return (self.far[..., SINKS * PAGE :] - total).exp().unflatten(-1, (-1, PAGE)).sum(-1)

    def turned_queries(self) -> Tensor:
        """Queries rotated to compare them with pages in between, each as if it were among the first local tokens after them."""
        nearer = (self.positions // PAGE - MEMORY.local_tokens // PAGE - 1).clamp(min=0)
        return at(self.queries, self.positions - nearer * PAGE)

    def scores(self, method: str, pages: Pages, alone: bool) -> Tensor:
        """Scores [kv_heads, rows, pages in between]. alone: each query is a row."""
        if method == "exact":
            attention = self.attention()
            return attention.mean(1) if alone else attention.mean((1, 2))[:, None]
        q = self.turned_queries()
        q = q.transpose(1, 2) if alone else q.flatten(1, 2)[:, None]
        return METHODS[method].score(q, *(x[:, : self.local - SINKS] for x in pages))


Choose = Callable[[int, Row], Tensor | None]
"""From the index of a layer and a row: the pages in between that the row reads, bool [kv_heads, queries or 1, pages]; None for
all."""


def read(model: Llama, ids: Tensor, layers: list[Layer], first: int, choose: Choose | None, row_tokens: int) -> Tensor:
    """Logits of tokens from position `first` on; `layers` has those before. Without `choose`, nothing in between is read."""
    x = model.embed_tokens(ids)
    for index, (block, layer) in enumerate(zip(model.layers, layers, strict=True)):
        hidden, attention = block.input_layernorm(x), block.self_attn
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        q, k, v = (projection(hidden).unflatten(-1, (-1, HEAD_DIM)).transpose(0, 1) for projection in projections)
        positions = torch.arange(first, first + len(ids))
        layer.store(q, k, v, positions)
        mixed = []
        for own in positions.split(row_tokens):
            row = Row(layer, own, None if choose else SINKS)
            chosen = choose(index, row) if choose and row.local > SINKS else None
            if chosen is not None:
                hidden_keys = ~chosen.repeat_interleave(PAGE, -1)[:, None]
                row.far[..., SINKS * PAGE :].masked_fill_(hidden_keys, -math.inf)
            end, begin, count = int(own[-1]) + 1, row.local * PAGE, row.far.shape[-1]
            weights = torch.cat([row.far, row.near], -1).softmax(-1)
            layer.received[:, begin:end] += weights[..., count:].sum((1, 2))
            values = torch.cat([layer.v[:, :count], layer.v[:, begin:end]], 1)
            mixed.append((weights.flatten(1, 2) @ values).unflatten(1, (GROUP, -1)))
        x = x + attention.o_proj(torch.cat(mixed, 2).flatten(0, 1).transpose(0, 1).flatten(1))
        x = x + block.mlp(block.post_attention_layernorm(x))
    return torch.nn.functional.linear(model.norm(x), model.embed_tokens.weight)


def best(scores: Tensor, count: int) -> Tensor:
    """Which pages are among the `count` with the largest scores."""
    found = scores.topk(min(count, scores.shape[-1]), -1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, found, True)


# --- representatives --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Context:
    """The pages in between. keys: [kv_heads, pages, PAGE, HEAD_DIM], each page as if it were the first. logits, received:
    [kv_heads, pages, PAGE], the mean product with the queries of the local_tokens tokens that follow, and `Layer.received`."""

    keys: Tensor
    logits: Tensor
    received: Tensor


@dataclass(frozen=True)
class Method:
    """bytes: of a page's representatives, for one KV head. score: from queries [kv_heads, rows, queries, HEAD_DIM], times the
    scale of logits, and representatives, the scores [kv_heads, rows, pages]."""

    bytes: int
    build: Callable[[Context], Pages]
    score: Callable[..., Tensor]


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


ROW_BYTES = 2 * HEAD_DIM
METHODS = {
    "mean": Method(ROW_BYTES, lambda c: (mean(c),), lambda q, m: q.mean(2) @ m.mT),
    "1 token": Method(ROW_BYTES, lambda c: tokens(c.keys, c.logits, 1), summed),
    "4 tokens": Method(4 * ROW_BYTES, lambda c: tokens(c.keys, c.logits, 4), summed),
    "4 tokens, the largest": Method(4 * ROW_BYTES, lambda c: tokens(c.keys, c.logits, 4), largest),
    "4 tokens by attention": Method(4 * ROW_BYTES, lambda c: tokens(c.keys, c.received, 4), summed),
    "mean, deviation: normal": Method(2 * ROW_BYTES, lambda c: (mean(c), c.keys.std(2)), normal),
    "bounds": Method(
        2 * ROW_BYTES,
        lambda c: (c.keys.amin(2), c.keys.amax(2)),
        lambda q, least, most: in_box(q, (least + most) / 2, (most - least) / 2),
    ),
    "mean, range: box of 0.75": Method(
        2 * ROW_BYTES, lambda c: (mean(c), half_range(c)), functools.partial(in_box, reach=0.75)
    ),
    **{
        f"mean, range: ellipsoid of {reach}": Method(
            2 * ROW_BYTES, lambda c: (mean(c), half_range(c)), functools.partial(in_ellipsoid, reach=reach)
        )
        for reach in (1, 2, 3)
    },
    "exact": Method(0, lambda _: (), lambda *_: torch.empty(0)),
}
"""`1 token`, `4 tokens`: InfLLM's (Xiao et al., NeurIPS 2024), the tokens of a page with the largest mean product
with the queries that follow, and the sum of their logits; `by attention`: those that got most attention while they were local.
`bounds`: Quest's. `exact`: attention itself, the ceiling."""


# --- measurements -----------------------------------------------------------------------------------------------------------

Figures = dict[tuple[str, int, int], list[tuple[float, float, float]]]
"""By method, context length and number of pages: samples of one figure, and of numerator and denominator of another."""


def results(figures: Figures, names: tuple[str, str]) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for (method, length, count), samples in figures.items():
        first, part, whole = (sum(column) for column in zip(*samples, strict=True))
        case = {"representative": method, "bytes": METHODS[method].bytes, "tokens": length, "pages": count}
        found.append({**case, names[0]: round(first / len(samples), 3), names[1]: round(part / whole, 3)})
    return found


@functools.cache
def text() -> list[tuple[Layer, dict[str, Pages]]]:
    """The layers after a window of held-out text."""
    model, tokenizer = load_model()
    ids = torch.tensor(tokenizer.encode(HELDOUT.read_text(encoding="utf-8")).ids[: max(LENGTHS)])
    layers = [Layer(len(ids)) for _ in model.layers]
    read(model, ids, layers, 0, lambda _, row: best(row.scores("exact", (), alone=False), READ_PAGES), ROW)
    return [(layer, layer.representatives(len(ids))) for layer in layers]


def rows(length: int, alone: bool) -> Iterator[Tensor]:
    """Positions in the last 1024 tokens of a context: rows of a prompt, or single queries, those with the same local page
    together."""
    if alone:
        for start in range(length - 1024, length - PAGE, PAGE):
            yield torch.arange(start + PAGE - 1, start + 2 * PAGE - 1, 8)
    else:
        yield from torch.arange(length - 1024, length).split(ROW)


def agreement(alone: bool) -> list[dict[str, object]]:
    figures: Figures = defaultdict(list)
    for layer, representatives in text():
        for length in LENGTHS:
            for positions in rows(length, alone):
                row = Row(layer, positions)
                attention = row.scores("exact", (), alone)
                for method, pages in representatives.items():
                    scores = row.scores(method, pages, alone)
                    for count in (count for count in TOPK if count < scores.shape[-1]):
                        chosen = best(scores, count)
                        recall = (chosen & best(attention, count)).sum(-1).float().mean() / count
                        sample = recall, (attention * chosen).sum(), attention.sum()
                        figures[method, length, count].append(tuple(map(float, sample)))  # type: ignore[arg-type]
    return results(figures, ("recall", "covered"))


class Encoder:
    def __init__(self, tokenizer: object) -> None:
        self.tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids  # type: ignore[attr-defined, no-any-return]


def pass_keys() -> list[dict[str, object]]:
    model, tokenizer = load_model()
    encoder = Encoder(tokenizer)
    passkeys = PassKeys(encoder, HELDOUT.read_text(encoding="utf-8").splitlines(keepends=True))
    asked = len(encoder.encode(QUESTION)) + KEY_DIGITS
    figures: Figures = defaultdict(list)
    for length, depth in itertools.product(KEY_LENGTHS, DEPTHS):
        prompt, answer = passkeys.make(length, depth, Random(f"{length} {depth}"))
        told = len(encoder.encode(prompt[: prompt.index(answer)]))
        digits = sorted({told // PAGE - SINKS, (told + KEY_DIGITS - 1) // PAGE - SINKS})
        ids = torch.tensor(encoder.encode(prompt + answer))
        history = len(ids) - asked
        layers = [Layer(len(ids)) for _ in model.layers]
        read(model, ids[:history], layers, 0, None, ROW)
        representatives = [layer.representatives(history) for layer in layers]
        to_digits: list[Tensor] = []  # by layer, from the exact selection
        for method, count in itertools.product(reversed(METHODS), KEY_TOPK):
            reached = []

            def choose(index: int, row: Row) -> Tensor:
                scores = row.scores(method, representatives[index][method], alone=True)  # noqa: B023
                if index == len(to_digits):  # noqa: B023
                    to_digits.append(scores[:, -KEY_DIGITS - 1 : -1, digits])  # noqa: B023
                chosen = best(scores, count)  # noqa: B023
                reached.append((to_digits[index] * chosen[:, -KEY_DIGITS - 1 : -1, digits]).sum())  # noqa: B023
                return chosen

            logits = read(model, ids[history:], layers, history, choose, asked)
            right = logits[-KEY_DIGITS - 1 : -1].argmax(-1).equal(ids[-KEY_DIGITS:])
            figures[method, length, count].append((float(right), float(sum(reached)), float(sum(x.sum() for x in to_digits))))
    return results(figures, ("answered", "covered"))


def table(found: list[dict[str, object]]) -> str:
    columns = list(dict.fromkeys((r["tokens"], r["pages"]) for r in found))
    cells = {(r["representative"], r["tokens"], r["pages"]): list(r.values())[-2:] for r in found}
    lines = [f"{'':<32} bytes " + " ".join(f"{f'{count} of {length}':>11}" for length, count in columns)]
    for name, method in METHODS.items():
        figures = ("/".join(f"{figure:.2f}" for figure in cells[name, *column]) for column in columns)
        lines.append(f"{name:<32} {method.bytes or '':>5} " + " ".join(f"{cell:>11}" for cell in figures))
    return "\n".join(lines)


if __name__ == "__main__":
    study(
        "representatives.py",
        "Compare representatives of a page for selection by memory.",
        "by pages selected and tokens of the context",
        {
            "queries alone, recall and attention covered": lambda: agreement(alone=True),
            "rows of queries, recall and attention covered": lambda: agreement(alone=False),
            "pass keys, answered and attention to their pages covered": pass_keys,
        },
        table,
    )
