# SPDX-License-Identifier: Apache-2.0
"""Whether compression plugins should choose, at equal saved operations: a ratio for each layer, or which groups to compress.

`python benchmarks/studies/variator_choices.py MODEL PLUGINS --text code=FILE prose=FILE`. Uniform rows are like those of
`variator_quality.py`: one ratio in half, three quarters or all of the layers, in those that cost least at this ratio. Each is
followed by choices that save as much: another ratio in more or fewer layers, and

- **Ratios by layer.** The divergence of each layer alone is measured at each ratio. Of all ways to give each layer a ratio or
  none, the one with the least sum of divergences is taken.
- **Some of the groups**, in all layers with plugins or in those of the uniform row. The others are computed as in the plain
  model. Groups of similar vectors are chosen. By the FFN's inputs in each layer, they are the most similar of the prompt or of
  each block; or they are chosen once for all layers. Controls are random groups, the least similar ones, and those in which a
  layer's plugin errs least. These last ones need both results, so they save nothing.

Ratios and layers are chosen on the first windows of each text. All rows are measured on the windows behind these. The table
gives the change of KL to the uniform row, with the standard error over windows. The work of choosing groups is not counted.
Plugins were trained with all groups, and with the same ratio in all layers.
"""

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/, where common/ and studies/ are

import torch
import torch.nn.functional as F
from studies.variator_quality import ORDER_WINDOWS, SCORED, TAIL, Costs, Keep, Model, Window, command, figures
from torch import Tensor

from sage_backend.options import RATIOS
from sage_backend.variator import files
from sage_backend.variator.groups import CHUNK, START
from sage_backend.variator.train import Attached

RATIO_PARTS = (1 / 2, 3 / 4, 1)
"""Shares of the layers that uniform rows compress, which ratios by layer are compared with."""
GROUP_PARTS = (1 / 2, 1)
"""Those of them which some of the groups are compared with."""
BLOCK = 64
"""Tokens of a block. The same share of each is compressed, so which groups that are depends on no later block."""


@dataclass(frozen=True)
class Choice:
    """What is compressed. ratios: of each layer that is. groups: how many of a layer's groups, all if None. scores: a name of
    SCORES, by which the groups are chosen."""

    ratios: Mapping[str, int]
    groups: int | None = None
    scores: str = ""


class Choosing(Attached):
    """Compresses by a `Choice`. Only for batches of one row."""

    def __init__(self, model: Any, plugins: files.Plugins) -> None:
        super().__init__(model, plugins)
        self.choice, self.embedded = Choice({}), torch.empty(0)
        self._chosen: tuple[Tensor, Tensor] | None = None

    @contextmanager
    def choosing(self, choice: Choice, ids: Tensor, cut: int) -> Iterator[None]:
        """Compress the tokens of `ids`, int64 [1, tokens], from START to `cut` inside."""
        self.choice, self._chosen = choice, None
        self.embedded = self.model.get_input_embeddings()(ids)[:, START:cut]
        try:
            with self.compressing(max(RATIOS), cut, choice.ratios):  # `compressed` takes the choice's ratios instead
                yield
        finally:
            self.choice = Choice({})

    def compressed(self, name: str, ratio: int, x: Tensor) -> Tensor:
        """As in training, but for the choice. x: [1, tokens, hidden]."""
        ratio = self.choice.ratios.get(name, ratio)
        if self.choice.groups is None:
            return super().compressed(name, ratio, x)
        groups = x.unflatten(1, (-1, ratio))
        y = torch.empty_like(groups)
        chosen, others = self._groups(name, ratio, x)
        y[:, chosen] = super().compressed(name, ratio, groups[:, chosen].flatten(1, 2)).unflatten(1, (-1, ratio))
        y[:, others] = self.plain[name](groups[:, others].flatten(1, 2)).unflatten(1, (-1, ratio))
        return y.flatten(1, 2)

    def _groups(self, name: str, ratio: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """The groups that are compressed and the others, sorted, int64."""
        score, once = SCORES[self.choice.scores]
        if self._chosen is None or not once:
            order, groups = score(self, name, ratio, x).argsort(descending=True, stable=True), self.choice.groups
            self._chosen = order[:groups].sort().values, order[groups:].sort().values
        return self._chosen

    def errors(self, name: str, ratio: int, x: Tensor) -> Tensor:
        """The squared error of a plugin, summed over each group. float32 [groups]."""
        error = super().compressed(name, ratio, x) - self.plain[name](x)
        return error[0].float().square().sum(1).unflatten(0, (-1, ratio)).sum(1)


def similarity(x: Tensor, ratio: int) -> Tensor:
    """The mean cosine of all pairs of vectors in each group. x: [1, tokens, hidden] -> float32 [groups]."""
    directions = F.normalize(x[0].float(), dim=1).unflatten(0, (-1, ratio))
    return (directions.sum(1).square().sum(1) - ratio) / (ratio * (ratio - 1))


Score = Callable[[Choosing, str, int, Tensor], Tensor]
"""(model, layer, ratio, the FFN's inputs [1, tokens, hidden]) -> [groups]. Groups of the highest scores are compressed."""


def similar(model: Choosing, name: str, ratio: int, x: Tensor) -> Tensor:
    return similarity(x, ratio)


def similar_in_block(model: Choosing, name: str, ratio: int, x: Tensor) -> Tensor:
    """The rank of a group's similarity in its block, as a share of the block's groups."""
    return torch.cat([each.argsort().argsort() / len(each) for each in similarity(x, ratio).split(BLOCK // ratio)])


def dissimilar(model: Choosing, name: str, ratio: int, x: Tensor) -> Tensor:
    return -similarity(x, ratio)


def embedded(model: Choosing, name: str, ratio: int, x: Tensor) -> Tensor:
    return similarity(model.embedded, ratio)


def exact(model: Choosing, name: str, ratio: int, x: Tensor) -> Tensor:
    return -model.errors(name, ratio, x)


def chance(model: Choosing, name: str, ratio: int, x: Tensor) -> Tensor:
    return torch.rand(x.shape[1] // ratio, device=x.device)


SCORES: dict[str, tuple[Score, bool]] = {
    "similar, by layer": (similar, False),
    "similar in block, by layer": (similar_in_block, False),
    "similar in first layer": (similar, True),
    "similar embeddings": (embedded, True),
    "random, by layer": (chance, False),
    "random, once": (chance, True),
    "least similar, by layer": (dissimilar, False),
    "least error, by layer": (exact, False),
}
"""How groups are chosen, and whether all layers take those of the first one."""

Row = tuple[str, int, Choice]
"""A label, the operations that are saved, and what is compressed."""


class ChoosingModel(Model):
    """A model whose plugins compress by a `Choice`."""

    attach = Choosing
    attached: Choosing

    @property
    def cut(self) -> int:
        """The end of the compressed part, whatever the ratio."""
        return (self.prompt - TAIL) // CHUNK * CHUNK

    def chosen(self, window: Window, choice: Choice) -> Tensor:
        """As `compressed`."""
        with self.attached.choosing(choice, window.ids, self.cut):
            return self.hidden(window.ids, self.cut)

    def choices(self, costs: Costs) -> Iterator[list[Row]]:
        """Uniform rows, the least savings first, each with the choices that save as much behind it."""
        by_layer = {ratio: self.operations(self.cut - START, ratio, 1) for ratio in self.ratios}
        sums = least_sums(costs, by_layer)

        def uniform(ratio: int, count: int) -> Row:
            choice = Choice(dict.fromkeys(cheapest(costs, ratio, count), ratio))
            return f"ratio {ratio} in {count} layers", by_layer[ratio] * count, choice

        parts = {(ratio, max(1, round(len(costs) * part))): part for ratio in self.ratios for part in RATIO_PARTS}
        for (ratio, count), part in sorted(parts.items(), key=lambda each: by_layer[each[0][0]] * each[0][1]):
            budget, layers = by_layer[ratio] * count, cheapest(costs, ratio, count)
            others = {other: math.ceil(budget / by_layer[other]) for other in self.ratios if other != ratio}
            rows = [uniform(ratio, count), *(uniform(*each) for each in others.items() if each[1] <= len(costs))]
            saved = min((each for each in sums if each >= budget), key=lambda each: sums[each][0])
            ratios = sums[saved][1]
            if all(ratios != choice.ratios for _, _, choice in rows):
                counts = sorted(Counter(ratios.values()).items())
                rows.append(("by layer: " + ", ".join(f"{of} of ratio {one}" for one, of in counts), saved, Choice(ratios)))
            if part in GROUP_PARTS:
                rows += self._some_groups(self.layers, budget)
                if count < len(self.layers):
                    rows += self._some_groups(layers, budget)
            yield rows

    def _some_groups(self, layers: list[str], budget: int) -> Iterator[Row]:
        """All ways to choose groups, at each ratio of which some of the groups in these layers save the budget."""
        for ratio in self.ratios:
            of_group, there = self.operations(ratio, ratio, len(layers)), (self.cut - START) // ratio
            groups = math.ceil(budget / of_group)
            for scores in SCORES if groups < there else ():
                label = f"ratio {ratio}, {groups / there:.0%} of groups in {len(layers)} layers: {scores}"
                yield label, groups * of_group, Choice(dict.fromkeys(layers, ratio), groups, scores)


def cheapest(costs: Costs, ratio: int, count: int) -> list[str]:
    """The layers that cost least at a ratio."""
    return sorted(costs, key=lambda layer: costs[layer][ratio])[:count]


def least_sums(costs: Costs, operations: Mapping[int, int]) -> dict[int, tuple[float, dict[str, int]]]:
    """For each number of operations that ratios by layer can save: the least sum of costs, and the ratios of this sum.
    operations: saved by one layer at each ratio."""
    sums: dict[int, tuple[float, dict[str, int]]] = {0: (0.0, {})}
    for layer, by_ratio in costs.items():
        longer = dict(sums)
        for saved, (cost, ratios) in sums.items():
            for ratio, more in by_ratio.items():
                at = saved + operations[ratio]
                if at not in longer or cost + more < longer[at][0]:
                    longer[at] = cost + more, {**ratios, layer: ratio}
        sums = longer
    return sums


HEADS = f"{'KL':>7} {'change':>8} {'':7} {'top 1':>7}"


def difference(kl: Tensor, uniform: Tensor) -> dict[str, float]:
    """The mean change of windows' divergences, each [windows], and its standard error."""
    change = kl - uniform
    error = change.std(correction=0).item() / math.sqrt(max(1, len(change) - 1))
    return {"kl_change": round(change.mean().item(), 5), "kl_change_error": round(error, 5)}


def measure(model: ChoosingModel, texts: dict[str, str], number: int, keep: Keep) -> None:
    """Raises ValueError for a text that is too short for an error of means."""
    torch.manual_seed(0)
    read = {kind: model.windows(text, ORDER_WINDOWS + number) for kind, text in texts.items()}
    for kind, each in read.items():
        if len(each) < ORDER_WINDOWS + 2:
            raise ValueError(
                f"{kind} has {len(each)} windows of {model.prompt + SCORED} tokens; it takes {ORDER_WINDOWS} to order layers "
                "and at least 2 more"
            )
    costs = model.costs([window for each in read.values() for window in each[:ORDER_WINDOWS]])
    held_out = {kind: each[ORDER_WINDOWS:] for kind, each in read.items()}
    results: list[dict[str, Any]] = []
    found = {"costs": costs, "windows": {kind: len(each) for kind, each in held_out.items()}, "results": results}
    print(f"{'saved':>6} {'what is compressed':<64}" + "".join(f" {kind + ': loss':>12} {HEADS}" for kind in texts))
    for rows in model.choices(costs):
        uniform: dict[str, Tensor] = {}
        for label, operations, choice in rows:
            row: dict[str, Any] = {"label": label, "saved": model.share(operations), "ratios": choice.ratios}
            if choice.groups is not None:
                row |= {"groups": choice.groups, "scores": choice.scores}
            print(f"{row['saved']:6.1%} {label:<64}", end="")
            for kind, windows in held_out.items():
                by_window = model.by_window(windows, partial(model.chosen, choice=choice))
                row[kind] = of = figures(by_window) | difference(by_window[:, 2], uniform.setdefault(kind, by_window[:, 2]))
                print(f" {of['relative_loss_change']:+12.2%} {of['kl']:7.4f} {of['kl_change']:+8.4f}", end="")
                print(f" ±{of['kl_change_error']:.4f} {of['top1_agreement']:7.2%}", end="", flush=True)
            results.append(row)
            keep(found)
            print()


def main() -> int:
    """The command. Returns its exit status."""
    return command("variator_choices.py", "Compare ways to choose what is compressed.", ChoosingModel, measure)


if __name__ == "__main__":
    sys.exit(main())
