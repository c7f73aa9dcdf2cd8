# SPDX-License-Identifier: Apache-2.0
"""What compressing a prompt's FFNs costs in quality, and saves in computation, by layers, ratio and uncompressed tail.

`python benchmarks/studies/variator_quality.py MODEL PLUGINS --text code=FILE prose=FILE`. In plain torch, from the pass that
plugins are trained with; `sage eval --prompt` gives the same figures through vLLM. Layers are added in the order of what each
costs alone, so the rows of a ratio are a curve of loss against saved operations.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/, where common/ is

import torch
from common.report import circumstances, save
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from sage_backend.tools.text import read_text, windows
from sage_backend.variator import files
from sage_backend.variator.groups import START
from sage_backend.variator.plugin import saved_operations
from sage_backend.variator.train import Attached, Batch

SCORED = 512
"""Tokens behind each prompt that are scored."""
ORDER_WINDOWS = 4
"""Windows on which layers are ordered."""
TAIL = 64
"""Tokens at a prompt's end that stay uncompressed, as the option `tail` has it; other tails are in rows of their own."""
TAILS = (16, 256, 512)
Costs = dict[str, dict[int, float]]
"""The divergence, in nats a token, of each layer and ratio alone."""


@dataclass(frozen=True)
class Window:
    """ids: int64 [1, prompt + SCORED]; plain: the plain model's last hidden vectors from the prompt's last token on, [SCORED,
    hidden]."""

    ids: Tensor
    plain: Tensor


class Model:
    """A model with plugins that reads windows of a text."""

    attach: type[Attached] = Attached

    def __init__(self, model: Path, plugins: str, prompt: int) -> None:
        self.tokenizer, self.prompt = AutoTokenizer.from_pretrained(model), prompt
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16 if self.device == "cuda" else torch.float32)
        self.config: Any = loaded.config
        self.layers, self.ratios = files.contents(plugins)
        attached = {layer: files.load(plugins, layer, self.config.hidden_size, self.ratios) for layer in self.layers}
        for by_ratio in attached.values():
            for plugin in by_ratio.values():
                plugin.to(self.device, loaded.dtype)
        self.attached = self.attach(loaded.to(self.device).eval(), attached)

    def windows(self, text: str, number: int) -> list[Window]:
        length = self.prompt + SCORED
        cut = windows(self.tokenizer, text, number * length, length + 1)
        ids = [torch.tensor([each], device=self.device) for each in cut if len(each) == length]
        return [Window(each, self.hidden(each, self.prompt - 1)) for each in ids]

    def hidden(self, ids: Tensor, cut: int) -> Tensor:
        """The last hidden vectors from the prompt's last token to the last but one. cut: end of the compressed part, if any."""
        scored = torch.zeros(1, ids.shape[1] - cut, dtype=torch.bool, device=self.device)
        scored[:, self.prompt - 1 - cut : -1] = True
        return self.attached.hidden(Batch(ids, cut, scored))

    def compressed(self, window: Window, ratio: int, layers: list[str], tail: int) -> Tensor:
        cut = (self.prompt - tail) // ratio * ratio
        with self.attached.compressing(ratio, cut, layers):
            return self.hidden(window.ids, cut)

    def divergence(self, read: list[Window], ratio: int, layers: list[str]) -> float:
        """KL against the plain model, in nats a token."""
        found = [self.attached.divergence(each.plain, self.compressed(each, ratio, layers, TAIL)) for each in read]
        return torch.stack(found).mean().item()

    def costs(self, read: list[Window]) -> Costs:
        return {layer: {ratio: self.divergence(read, ratio, [layer]) for ratio in self.ratios} for layer in self.layers}

    def order(self, read: list[Window]) -> list[str]:
        """Layers by what each costs alone, over all ratios, the least first."""
        costs = self.costs(read)
        return sorted(costs, key=lambda layer: sum(costs[layer].values()))

    def by_window(self, read: list[Window], compressed: Callable[[Window], Tensor]) -> Tensor:
        """Behind each prompt: the plain model's loss, its change, KL, and how often the top token is the same. float64
        [windows, 4] on the CPU. compressed: gives what `compressed` of this class does."""
        found = []
        for window in read:
            true = window.ids[0, self.prompt :, None]
            plain = self.attached.log_probabilities(window.plain)
            other = self.attached.log_probabilities(compressed(window))
            change = (plain - other).gather(1, true).mean()
            divergence = (plain.exp() * (plain - other)).sum(1).mean()
            same = (plain.argmax(1) == other.argmax(1)).float().mean()
            found.append(torch.stack([-plain.gather(1, true).mean(), change, divergence, same]))
        return torch.stack(found).double().cpu()

    def saved(self, ratio: int, layers: int, tail: int) -> float:
        """The share of a prompt's operations that is saved."""
        tokens = (self.prompt - tail) // ratio * ratio - START
        return self.share(self.operations(tokens, ratio, layers))

    def operations(self, tokens: int, ratio: int, layers: int) -> int:
        """Operations that are saved."""
        return saved_operations(tokens, ratio, layers, self.config.hidden_size, self.config.intermediate_size)

    def share(self, operations: int) -> float:
        """Operations over those of a prompt, of which linear layers and attention are counted, not the logits."""
        c, n = self.config, self.prompt
        head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        projections = c.hidden_size * head * (2 * c.num_attention_heads + 2 * c.num_key_value_heads)
        attention = 2 * c.num_attention_heads * head * n / 2
        whole = 2 * n * c.num_hidden_layers * (projections + attention + 3 * c.hidden_size * c.intermediate_size)
        return round(operations / whole, 4)


M = TypeVar("M", bound=Model)
Keep = Callable[[dict[str, Any]], None]
"""Takes all that a study has found so far, after each row: the next one may be interrupted."""


def figures(by_window: Tensor) -> dict[str, float]:
    """The means of what `Model.by_window` gives, as reports have them."""
    plain_loss, change, divergence, same = by_window.mean(0).tolist()
    return {
        "loss_change": round(change, 5),
        "relative_loss_change": round(change / plain_loss, 5),
        "kl": round(divergence, 5),
        "top1_agreement": round(same, 5),
    }


def measure(model: Model, texts: dict[str, str], number: int, keep: Keep) -> None:
    read = {kind: model.windows(text, number) for kind, text in texts.items()}
    order = model.order([window for each in read.values() for window in each[:ORDER_WINDOWS]])
    counts = sorted({max(1, round(len(order) * part / 8)) for part in range(1, 9)})
    settings = [(ratio, layers, TAIL) for ratio in model.ratios for layers in counts]
    settings += [(ratio, len(order), tail) for ratio in model.ratios for tail in TAILS if tail < model.prompt - START]
    results: list[dict[str, Any]] = []
    found = {"order": order, "windows": {kind: len(each) for kind, each in read.items()}, "results": results}
    for ratio, layers, tail in settings:
        row: dict[str, Any] = {"ratio": ratio, "layers": layers, "tail": tail, "saved": model.saved(ratio, layers, tail)}
        compressed = partial(model.compressed, ratio=ratio, layers=order[:layers], tail=tail)
        row |= {kind: figures(model.by_window(each, compressed)) for kind, each in read.items()}
        results.append(row)
        keep(found)
        print(f"ratio {ratio}, {layers:>2} layers, tail {tail:>3}, saved {row['saved']:6.1%}", end="")
        for kind in read:
            print(f"   {kind} {row[kind]['relative_loss_change']:+7.2%} {row[kind]['top1_agreement']:6.2%}", end="")
        print(flush=True)


def command(script: str, description: str, kind: type[M], measure: Callable[[M, dict[str, str], int, Keep], None]) -> int:
    """The command of a study of plugins, which `measure` does with a model of this kind; a ValueError is its user's. Returns
    its exit status."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", type=Path, help="folder of a model")
    parser.add_argument("plugins", type=Path, help="a file of sage variator train")
    parser.add_argument("--text", nargs="+", required=True, metavar="KIND=FILE", help="texts held out from training")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=16, help="prompts of each text (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    texts = {name: read_text(Path(file)) for name, _, file in (each.partition("=") for each in arguments.text)}
    report = circumstances(f"benchmarks/studies/{script}")
    report |= {"model": arguments.model.name, "prompt": arguments.prompt, "scored": SCORED}

    def keep(found: dict[str, Any]) -> None:
        if arguments.out:
            save(report | found, arguments.out)

    try:
        with torch.inference_mode():
            measure(kind(arguments.model, str(arguments.plugins), arguments.prompt), texts, arguments.windows, keep)
    except ValueError as error:
        parser.error(str(error))
    return 0


def main() -> int:
    """The command. Returns its exit status."""
    return command("variator_quality.py", "Measure what compression plugins cost and save.", Model, measure)


if __name__ == "__main__":
    sys.exit(main())
