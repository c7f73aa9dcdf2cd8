# SPDX-License-Identifier: Apache-2.0
"""How well memory chooses pages of a model of transformers, and what limits it: attention covered on a text, and keys found.

Contexts are within the trained length. They are read densely, so all keys are at their own positions, and what is chosen
changes nothing that later layers see. Measured are the last `SPAN` queries of each context: each `EVERY`-th alone, as in
decoding, and all of them in rows, as in prefill. Figures are over all layers with full attention, KV heads and windows of the
text.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from common.checkpoint import Checkpoint
from common.page_summaries import METHODS, Context, Pages, best, following_logits
from torch import Tensor

from sage_backend.demo.passkey import PassKeys
from sage_backend.tools.tasks import TASKS
from sage_paged import Memory

BLOCK, SPAN, EVERY, PIECE = 32, 1024, 8, 128
"""Tokens of the smallest page; see above; and queries whose logits are there at a time."""
PAGE, ALONE, ROW = 128, 1, 512
"""Tokens of a page; queries of a row in decoding and in prefill."""
MEMORY = Memory(sink_tokens=PAGE, local_tokens=1024, query_block=ROW)
ASKED = 64
"""Tokens at the end of a prompt that choose pages, each alone, as do those of the answer."""
Result = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """How pages are chosen. page: tokens; parts: equal parts of a page, each with a summary. The best part's score counts."""

    method: str = "mean, range: ellipsoid of 2"
    page: int = PAGE
    parts: int = 1

    def pages(self, count: int) -> int:
        """The pages that have as many tokens as `count` pages of PAGE tokens."""
        return count * PAGE // self.page

    def describe(self, head_dim: int, count: int) -> Result:
        """bytes: of the summaries of PAGE tokens, for one KV head; recalled: the tokens of the pages that are chosen."""
        summaries = self.pages(1) * self.parts * METHODS[self.method].bytes(head_dim)
        described = {"representative": self.method, "page": self.page, "parts": self.parts, "bytes": summaries}
        return described | {"pages": self.pages(count), "recalled": count * PAGE}


DEFAULT, EXACT = Choice(), Choice("exact")
COMPARED = [name for name in METHODS if name != "4 tokens by attention"]
"""The attention that tokens get while they are local would need the whole matrix of logits."""
SHAPES = ((128, 1), (128, 2), (128, 4), (64, 1), (64, 2), (32, 1))
"""Tokens of a page, and its parts."""
PARTS = [Choice(method, *shape) for method in (DEFAULT.method, "mean") for shape in SHAPES]
PARTS += [Choice("exact", page) for page in (128, 64, 32)]
KEYS = [
    *(Choice(method) for method in COMPARED),
    *(choice for choice in PARTS if choice not in (DEFAULT, EXACT, Choice("mean"))),
]
KEY_PAGES, DENSE = (2, 4, 8, 16), (1, 2, 4)

Case = tuple[Choice, int, int]
"""A choice, the queries of a row, and the pages of PAGE tokens that have as many tokens as those chosen."""
BOTH = (ALONE, ROW)
METHOD_CHOICES = [Choice(method, page) for page in (PAGE, 64) for method in COMPARED]
METHOD_CASES = [(choice, row, count) for row in BOTH for choice in METHOD_CHOICES for count in (8, 16, 32, 64)]
PART_CASES = [(choice, row, count) for row in BOTH for choice in PARTS for count in (8, 32)]
ROW_CASES = [(choice, row, count) for choice in (DEFAULT, EXACT) for row in (64, 128, 256, 512, 1024) for count in (8, 32)]
BUDGET_CASES = [(choice, row, count) for row in BOTH for choice in (DEFAULT, EXACT) for count in (8, 16, 32, 64, 128)]
CASES = dict.fromkeys(METHOD_CASES + PART_CASES + ROW_CASES + BUDGET_CASES)


class Summaries:
    """The representatives of a layer's pages, made when they are first needed. Takes what `Observe` is given."""

    def __init__(self, q: Tensor, k: Tensor) -> None:
        self.keys, self.logits = k, following_logits(q.mean(1), k, MEMORY.local_tokens)
        self.made: dict[tuple[str, int], Pages] = {}

    def of(self, method: str, tokens: int) -> Pages:
        """Of all full pages of `tokens` tokens."""
        if (method, tokens) not in self.made:
            full = self.keys.shape[1] // tokens * tokens
            keys, logits = (x[:, :full].unflatten(1, (-1, tokens)) for x in (self.keys, self.logits))
            self.made[method, tokens] = METHODS[method].represent(Context(keys, logits, torch.zeros_like(logits)))
        return self.made[method, tokens]


@dataclass(frozen=True)
class Rows:
    """Queries that choose together. queries: [kv_heads, rows, queries, head_dim]; first: int [rows], the position of each row's
    first; attention: [kv_heads, rows, blocks], to each BLOCK tokens of the context, as the mean over a row's queries."""

    queries: Tensor
    first: Tensor
    attention: Tensor

    def pages(self, page: int) -> tuple[Tensor, Tensor]:
        """Attention to pages, [kv_heads, rows, pages], and which of them are in between, bool [rows, pages]."""
        blocks = page // BLOCK
        full = self.attention.shape[-1] // blocks * blocks
        attention = self.attention[..., :full].unflatten(-1, (-1, blocks)).sum(-1)
        local = (self.first - MEMORY.local_tokens + 1).clamp(min=0)[:, None] // page  # Memory.local_page
        index = torch.arange(attention.shape[-1], device=local.device)
        return attention, (index >= MEMORY.sink_pages(page)) & (index < local)

    def scores(self, choice: Choice, summaries: Summaries) -> Tensor:
        """[kv_heads, rows, pages], -inf for those that are not in between."""
        scores, between = self.pages(choice.page)
        count = scores.shape[-1]
        if choice.method != "exact":
            pages = summaries.of(choice.method, choice.page // choice.parts)
            scores = METHODS[choice.method].score(self.queries, *(x[:, : count * choice.parts] for x in pages))
            whole = scores.shape[-1] // choice.parts
            scores = scores[..., : whole * choice.parts].unflatten(-1, (-1, choice.parts)).amax(-1)
            scores = torch.nn.functional.pad(scores, (0, count - whole))
        return scores.masked_fill(~between, -torch.inf)


def alone(q: Tensor, attention: Tensor, positions: Tensor) -> Rows:
    """Each query as a row. q: [kv_heads, group, queries, head_dim], attention: [kv_heads, group, queries, blocks]."""
    return Rows(q.transpose(1, 2), positions, attention.mean(1))


def together(q: Tensor, attention: Tensor, positions: Tensor, row: int) -> Rows:
    """Rows of `row` queries, with arguments as for `alone`."""
    queries = q.unflatten(2, (-1, row)).transpose(1, 2).flatten(2, 3)
    return Rows(queries, positions[::row], attention.unflatten(2, (-1, row)).mean((1, 3)))


def in_blocks(attention: Tensor) -> Tensor:
    """The sums over each BLOCK tokens, of [..., tokens]."""
    return torch.nn.functional.pad(attention, (0, -attention.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK)).sum(-1)


def attention_of(q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
    """The attention to blocks of tokens, [kv_heads, group, queries, blocks]. q: [kv_heads, group, queries, head_dim]; k:
    [kv_heads, tokens, head_dim]."""
    found, tokens = [], torch.arange(k.shape[1], device=k.device)
    for queries, own in zip(q.split(PIECE, 2), positions.split(PIECE), strict=True):
        logits = queries @ k[:, None].mT
        found.append(in_blocks(logits.masked_fill_(tokens > own[:, None], -torch.inf).softmax(-1)))
    return torch.cat(found, 2)


# --- attention covered ------------------------------------------------------------------------------------------------------


@dataclass
class Figures:
    """Sums of [recall, attention covered, attention in between, rows], by case, tokens of the context, and layer."""

    head_dim: int
    sums: dict[tuple[Case, int], dict[int, Tensor]] = field(default_factory=lambda: defaultdict(dict))

    def add(self, layer: int, q: Tensor, k: Tensor, lengths: Iterable[int], cases: Iterable[Case] = tuple(CASES)) -> None:
        """Add a window's layer, with arguments as `Observe` has them, but for cases that choose all pages in between."""
        summaries = Summaries(q, k)
        for length in lengths:
            positions = torch.arange(length - SPAN, length, device=k.device)
            queries = q[:, :, length - SPAN : length]
            attention = attention_of(queries, k[:, :length], positions)
            some = slice(EVERY - 1, None, EVERY)
            rows = {ALONE: alone(queries[:, :, some], attention[:, :, some], positions[some])}
            for case in cases:
                choice, row, count = case
                if row not in rows:
                    rows[row] = together(queries, attention, positions, row)
                if choice.pages(count) < (length - SPAN - MEMORY.local_tokens) // choice.page - MEMORY.sink_pages(choice.page):
                    layers = self.sums[case, length]
                    layers[layer] = layers.get(layer, 0) + measured(rows[row], summaries, choice, choice.pages(count))

    def result(self, case: Case, length: int, layers: Sequence[int] | None = None) -> Result:
        """pages: those chosen; recall: of the pages with most attention; covered: the share of attention in between that the
        chosen pages have; all: the share of all attention that sinks, chosen and local pages have. layers: None for all."""
        by_layer = self.sums[case, length]
        recall, covered, between, rows = torch.stack([by_layer[i] for i in layers or by_layer]).sum(0).tolist()
        figures = {"recall": recall / rows, "covered": covered / between, "all": 1 - (between - covered) / rows}
        described = case[0].describe(self.head_dim, case[2]) | {"queries": case[1], "tokens": length}
        return described | {name: round(figure, 4) for name, figure in figures.items()}

    def results(self, cases: Iterable[Case], lengths: Iterable[int]) -> list[Result]:
        return [self.result(case, length) for case in cases for length in lengths if (case, length) in self.sums]


def measured(rows: Rows, summaries: Summaries, choice: Choice, count: int) -> Tensor:
    """What `Figures` sums up of one case, float32 [4]."""
    attention, between = rows.pages(choice.page)
    attention = attention * between
    chosen = best(rows.scores(choice, summaries), count)
    likeliest = best(rows.scores(Choice("exact", choice.page), summaries), count)
    recall = (chosen & likeliest).sum() / likeliest.sum(-1).max()
    return torch.stack([recall, (attention * chosen).sum(), attention.sum(), torch.ones_like(attention[..., 0]).sum()])


def text_figures(checkpoint: Checkpoint, windows: Sequence[Sequence[int]], lengths: Sequence[int]) -> Figures:
    figures = Figures(checkpoint.head_dim)
    for ids in windows:
        checkpoint.read(ids, lambda layer, q, k: figures.add(layer, q, k, lengths))
    return figures


def layer_cases(figures: Figures, length: int) -> list[tuple[Case, list[Result]]]:
    """The figures of each layer, for the default choice."""
    cases = [(DEFAULT, row, count) for row in BOTH for count in (8, 32)]
    return [
        (case, [{"layer": layer, **figures.result(case, length, [layer])} for layer in sorted(figures.sums[case, length])])
        for case in cases
        if (case, length) in figures.sums
    ]


def dense_layers(by_case: Iterable[tuple[Case, list[Result]]], head_dim: int, length: int) -> list[Result]:
    """The share of all attention that is read, as the mean over layers, if some read everything. by_case: `layer_cases`. dense:
    the first layers, or those that lose most, the first of them first."""
    found = []
    for (choice, row, count), layers in by_case:
        worst = sorted(layers, key=lambda each: each["all"])
        case = choice.describe(head_dim, count) | {"queries": row, "tokens": length}
        sets = [("none", []), *((f"first {n}", layers[:n]) for n in DENSE), *((f"worst {n}", worst[:n]) for n in DENSE)]
        for name, dense in sets:
            lost = sum(1 - each["all"] for each in layers if each not in dense) / len(layers)
            found.append({**case, "dense": name, "layers": [each["layer"] for each in dense], "all": round(1 - lost, 4)})
    return found


# --- keys -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A prompt's tokens up to its last ASKED, the rest and the answer, the answer's digits, and where these are hidden."""

    context: list[int]
    rest: list[int]
    digits: list[int]
    hidden: int


def question(prompt: list[int], answer: list[int], digits: list[int]) -> Question | None:
    """None if the digits are not in between. digits: the last tokens of the answer. Raises ValueError if they are not tokens of
    the prompt."""
    starts = (i for i in range(len(prompt)) if prompt[i : i + len(digits)] == digits)
    if (hidden := next(starts, None)) is None or answer[-len(digits) :] != digits:
        raise ValueError("the tokenizer does not encode digits one by one")
    context = prompt[:-ASKED]
    in_between = MEMORY.sink_tokens <= hidden < MEMORY.local_page(len(context), PAGE) * PAGE - len(digits)
    return Question(context, prompt[-ASKED:] + answer, digits, hidden) if in_between else None


def questions(tokenizer: Any, task: str, length: int, count: int, document: Sequence[str]) -> list[Question]:
    """Those of `count` prompts, at evenly spaced depths, whose key is in between."""

    def plain(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    if task == "passkey":
        passkeys = PassKeys(tokenizer, document)
        depths = [i / (count - 1) for i in range(count)]
        made = [passkeys.make(length, depth, Random(f"{length} {depth}")) for depth in depths]
        found = [question(tokenizer.encode(prompt), plain(answer), plain(answer)) for prompt, answer in made]
    else:
        prompts = TASKS[task].prompts(tokenizer, length, count, document)
        found = [question(each.ids, plain(f" {each.expected[0]}"), plain(each.expected[0])) for each in prompts]
    return [each for each in found if each is not None]


class Way:
    """A `Choose` that reads `count` pages of PAGE tokens, or as many tokens. It adds up the attention to the pages with the
    digits, while these are answered, and how much of it is read."""

    def __init__(self, choice: Choice, count: int, summaries: dict[int, Summaries], asked: Question) -> None:
        self.choice, self.count, self.summaries, self.asked = choice, choice.pages(count), summaries, asked
        self.read: list[Tensor] = []

    def __call__(self, layer: int, q: Tensor, logits: Tensor) -> Tensor:
        tokens, page, digits = logits.shape[-1], self.choice.page, len(self.asked.digits)
        positions = torch.arange(tokens - q.shape[2], tokens, device=q.device)
        rows = alone(q, in_blocks(logits.softmax(-1)), positions)
        attention, between = rows.pages(page)
        chosen = best(rows.scores(self.choice, self.summaries[layer]), self.count)
        pages = slice(self.asked.hidden // page, (self.asked.hidden + digits - 1) // page + 1)
        reached, whole = (x[:, -digits - 1 : -1, pages].sum() for x in (attention * chosen, attention))
        self.read.append(torch.stack([reached, whole]))
        shown = (chosen | ~between).repeat_interleave(page, -1)
        return torch.nn.functional.pad(shown, (0, tokens - shown.shape[-1]), value=True)


def ask(checkpoint: Checkpoint, asked: Question, choices: Sequence[tuple[Choice, int]]) -> tuple[list[bool], list[Tensor]]:
    """Whether the model answers densely and with each of the choices, and the sums of each `Way`, [2]."""
    summaries: dict[int, Summaries] = {}
    checkpoint.read(asked.context, lambda layer, q, k: summaries.update({layer: Summaries(q, k)}))
    ways = [Way(choice, count, summaries, asked) for choice, count in choices]
    logits = checkpoint.go_on(asked.rest, [lambda *_: None, *ways], len(asked.digits) + 1)
    right = logits[:, :-1].argmax(-1) == torch.tensor(asked.digits, device=logits.device)
    return right.all(-1).tolist(), [torch.stack(way.read).sum(0) for way in ways]


def keys(checkpoint: Checkpoint, task: str, length: int, count: int, document: Sequence[str]) -> list[Result]:
    """answered: the share of prompts; covered: the share of attention to the page with the key that is read while the digits
    are answered. The first result is of dense attention."""
    choices = [(choice, count) for choice in KEYS for count in KEY_PAGES]
    asked = questions(checkpoint.tokenizer, task, length, count, document)
    if not asked:
        raise ValueError(f"no key is in between sinks and local tokens at {length} tokens")
    answers, sums = zip(*(ask(checkpoint, each, choices) for each in asked), strict=True)
    dense, *shares = (sum(each) / len(asked) for each in zip(*answers, strict=True))
    case = {"task": task, "tokens": length, "prompts": len(asked)}
    found = [{"representative": "dense", **case, "answered": round(dense, 3)}]
    for (choice, pages), share, each in zip(choices, shares, zip(*sums, strict=True), strict=True):
        reached, whole = torch.stack(each).sum(0).tolist()
        figures = {"answered": round(share, 3), "covered": round(reached / whole, 4)}
        found.append(choice.describe(checkpoint.head_dim, pages) | case | figures)
    return found
