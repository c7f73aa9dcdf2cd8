#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Which representative of a page memory should select pages by: how well the selection by each agrees with attention, and
whether it finds pass keys, on activations of the embedded model or of a checkpoint.

    python3 benchmarks/studies/representatives.py --out benchmarks/results/representatives.json
    python3 benchmarks/studies/representatives.py --model FOLDER --out benchmarks/results/representatives-NAME.json

Without --model, a context of the embedded model is read as `sage_paged.memory` describes: sinks, local tokens and some of the
pages in between. Past the trained length, these pages are read at positions right before the local ones. Keys are not
quantized; representatives are float16. The study measures

- on held-out text, for single queries (as in decoding) and for rows of 512 (as in prefill): how many of the pages with the most
  attention are selected (recall), and which share of the attention to all pages in between falls on the selected ones;
- with pass keys at 20 depths of held-out text, all of them in between: the share of keys that the model answers, and which
  share of the attention to the page with the key remains while the digits are answered.

Held-out text is read with the exact selection. Prompts with pass keys are read with sinks and local tokens only, up to the
question. Each token of the question selects pages for itself, by the representative that is measured. Plain torch on a CPU;
takes about 20 minutes of processor time.

With --model, the study asks what limits the choice of pages of a model of transformers, within its trained length
(`common/page_choice.py`): representatives, summaries of parts of pages, queries that choose together, layers, the number of
pages, and keys among --text. Prompts are read densely, up to their last 64 tokens. Of each context, 1024 queries are measured;
of the text, up to `WINDOWS` windows. Needs transformers, and a GPU for long contexts; on a CPU, `--lengths 4096 --prompts 3`
takes minutes.
"""

import argparse
import functools
import itertools
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/, where common/ is

import torch
from common.activations import HEAD_DIM, load_model
from common.page_summaries import METHODS, Context, Pages, best, following_logits
from common.report import circumstances, save
from common.study import study
from torch import Tensor

from sage_backend.demo import HELDOUT
from sage_backend.demo.llama import Llama, Shape, rotary_tables, rotate
from sage_backend.demo.passkey import KEY_DIGITS, QUESTION, PassKeys
from sage_backend.tools.text import read_text, windows
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
        queries = at(self.q[:, :, :tokens], torch.arange(tokens)).mean(1)
        logits = following_logits(queries, self.near[:, :tokens], MEMORY.local_tokens)

        def paged(x: Tensor) -> Tensor:
            return x[:, SINKS * PAGE : tokens // PAGE * PAGE].unflatten(1, (-1, PAGE))

        context = Context(paged(self.far), paged(logits), paged(self.received))
        return {name: method.represent(context) for name, method in METHODS.items()}


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


# --- measurements -----------------------------------------------------------------------------------------------------------

Figures = dict[tuple[str, int, int], list[tuple[float, float, float]]]
"""By method, context length and number of pages: samples of one figure, and of numerator and denominator of another."""


def results(figures: Figures, names: tuple[str, str]) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for (method, length, count), samples in figures.items():
        first, part, whole = (sum(column) for column in zip(*samples, strict=True))
        case = {"representative": method, "bytes": METHODS[method].bytes(HEAD_DIM), "tokens": length, "pages": count}
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
        lines.append(f"{name:<32} {method.bytes(HEAD_DIM) or '':>5} " + " ".join(f"{cell:>11}" for cell in figures))
    return "\n".join(lines)


# --- a checkpoint -----------------------------------------------------------------------------------------------------------

CHECKPOINT_LENGTHS, WINDOWS = (8192, 16384, 32768), 2
LONGEST_KEYS = 16384
"""Tokens of the longest prompts with keys."""


def wide_table(found: list[dict[str, object]], line: tuple[str, ...], column: tuple[str, ...], cell: tuple[str, ...]) -> str:
    """A table of results by the names of their figures: those that tell lines and columns apart, and those in cells. Its first
    line has these names."""
    cells: dict[tuple[str, str], str] = {}
    for each in found:
        place = ["  ".join(str(each.get(name, "")) for name in names) for names in (line, column)]
        cells[place[0], place[1]] = "/".join(f"{each[name]:.3f}" for name in cell if name in each)
    lines, columns = (list(dict.fromkeys(place)) for place in zip(*cells, strict=True))
    widths = {name: max(len(name), *(len(cells.get((each, name), "")) for each in lines)) for name in columns}
    first = max(map(len, lines))
    head = f"{'':<{first}}  " + "  ".join(f"{name:>{width}}" for name, width in widths.items())
    body = (
        f"{each:<{first}}  " + "  ".join(f"{cells.get((each, name), ''):>{widths[name]}}" for name in columns) for each in lines
    )
    names = ", ".join(line), ", ".join(column), "/".join(cell)
    return "\n".join(["{}; columns: {}; cells: {}".format(*names), head, *body])


def of_checkpoint(folder: Path, text: Path, lengths: list[int], prompts: int, out: Path | None) -> None:
    """Print a table of each part's results, and write these to `out` after each part. Raises ValueError for a text or lengths
    that do not fit."""
    # Not at the top: the embedded model needs no transformers, which are slow to import.
    from common import checkpoint, page_choice

    model = checkpoint.Checkpoint(folder)
    lengths = lengths or [length for length in CHECKPOINT_LENGTHS if length <= model.trained_tokens]
    least, most = 4 * page_choice.SPAN, model.trained_tokens
    if not lengths or any(length % page_choice.SPAN or not least <= length <= most for length in lengths):
        raise ValueError(f"--lengths are multiples of {page_choice.SPAN} from {least} to {most}")
    longest, document = max(lengths), read_text(text)
    cut = windows(model.tokenizer, document, WINDOWS * longest, longest + 1)
    cut = [ids for ids in cut if len(ids) == longest]
    if not cut:
        raise ValueError(f"{text.name} has fewer than {longest} tokens")
    report: dict[str, object] = circumstances("benchmarks/studies/representatives.py")
    report |= {"model": folder.name, "text": text.name, "windows": len(cut)}

    def keep(name: str, found: list[dict[str, object]], *names: tuple[str, ...]) -> None:
        print(f"{name}\n{wide_table(found, *names)}\n", flush=True)
        report[name] = found
        if out:
            save(report, out)

    figures = page_choice.text_figures(model, cut, lengths)
    by_choice, by_count = ("representative", "page", "parts", "bytes"), ("queries", "tokens", "recalled")
    parts = {
        "representatives": (page_choice.METHOD_CASES, by_choice, by_count, ("recall", "covered")),
        "parts of pages": (page_choice.PART_CASES, by_choice, by_count, ("covered",)),
        "queries of a row": (page_choice.ROW_CASES, ("representative", "queries"), ("tokens", "recalled"), ("covered", "all")),
        "budget": (page_choice.BUDGET_CASES, ("representative", "queries", "pages"), ("tokens",), ("covered", "all")),
    }
    for name, (cases, *names) in parts.items():
        keep(name, figures.results(cases, lengths), *names)
    by_case = page_choice.layer_cases(figures, longest)
    keep("layers", [each for _, found in by_case for each in found], ("layer",), by_count, ("covered", "all"))
    keep("dense layers", page_choice.dense_layers(by_case, model.head_dim, longest), ("dense",), by_count, ("all",))
    length = max((length for length in lengths if length <= LONGEST_KEYS), default=min(lengths))
    for task in ("passkey", "multikey"):
        found = page_choice.keys(model, task, length, prompts, document.splitlines(keepends=True))
        keep(task, found, by_choice, ("tokens", "recalled"), ("answered", "covered"))


def main() -> int:
    """The command. Returns its exit status."""
    parser = argparse.ArgumentParser(description="Compare representatives of a page for selection by memory.")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--model", type=Path, help="folder of a model of transformers (default: the embedded model)")
    of_model = parser.add_argument_group("with --model")
    of_model.add_argument("--text", type=Path, default=HELDOUT, help="text to measure on (default: the embedded held-out text)")
    lengths_help = f"tokens of contexts (default: of {' '.join(map(str, CHECKPOINT_LENGTHS))}, those within the trained length)"
    of_model.add_argument("--lengths", type=int, nargs="+", help=lengths_help)
    of_model.add_argument("--prompts", type=int, default=12, help="prompts of each task (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.model is None:
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
        return 0
    if arguments.prompts < 3:
        parser.error("--prompts must be at least 3: of two, neither key lies between the first and the local tokens")
    try:
        with torch.inference_mode():
            of_checkpoint(arguments.model, arguments.text, arguments.lengths, arguments.prompts, arguments.out)
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
