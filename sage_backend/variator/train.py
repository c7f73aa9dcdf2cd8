# SPDX-License-Identifier: Apache-2.0
"""Training of compression plugins; the command is `sage_backend.tools.variator`.

The model is frozen and teaches itself. First each plugin learns alone to give what its FFN gives, from the inputs that the FFN
has in the plain model. With `--layers`, the layers whose plugins move the predictions most are then left out
(`Training.choose`). Then all plugins of a ratio work together in one pass, and learn to leave the predictions for what follows
a compressed prompt as they are. Some of the prompts can hide a pass key: text alone hardly shows whether exact tokens survive.

Batches depend on the step's number alone, so that a training that was interrupted continues as if it had not been.
"""

import math
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm  # type: ignore[import-untyped]

from sage_backend.demo.passkey import KEY_DIGITS, PassKeys
from sage_backend.options import RATIOS
from sage_backend.variator import files
from sage_backend.variator.groups import START

RATES = {"layers": 2e-3, "joint": 1e-3}
"""Peak learning rates of the two phases."""
WARMUP = 20  # steps
FINAL_RATE = 0.05  # fraction of the peak
TAIL = 32  # tokens before a pass key's answer that stay uncompressed, which hold the question
CHECKPOINT_EVERY = 50  # steps
LEAST_CONTEXT = 8 * START
"""Tokens of the shortest windows: a quarter of one, which is the shortest prompt, has room for groups."""
CHOICE_BATCHES = 4
"""Batches of text on which `Training.choose` compares layers."""
LOGIT_ROWS = 1024
"""Predictions whose logits are in memory at once: vocabularies have 100,000 and more tokens."""


@dataclass(frozen=True)
class Batch:
    """ids: int64 [rows, tokens], of which the first `cut` are the prompt: compressed but for the first START tokens. scored:
    bool [rows, tokens - cut], the predictions behind it that count."""

    ids: Tensor
    cut: int
    scored: Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.ids.to(device), self.cut, self.scored.to(device))


class Batches:
    """Draws batches from a text's tokens, and prompts with pass keys."""

    def __init__(
        self, tokenizer: Any, text: str, rows: int, context: int, recall: float, seed: int, opening: Sequence[int] = ()
    ) -> None:
        """opening: the special tokens that the tokenizer puts before every text, and this class before every window."""
        self.tokenizer, self.rows, self.context, self.recall, self.seed = tokenizer, rows, context, recall, seed
        self.passkeys = PassKeys(tokenizer)
        self.opening = torch.tensor(list(opening), dtype=torch.int64)
        self.ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False))
        if len(self.ids) <= context:
            raise ValueError(f"the text has {len(self.ids)} tokens; training needs more than --context, which is {context}")

    def draw(self, step: int) -> Batch:
        rng = Random(f"{self.seed} {step}")
        return self._recall(rng) if rng.random() < self.recall else self.text(rng)

    def text(self, rng: Random) -> Batch:
        """Windows, of which the first quarter to three quarters are the prompt."""
        starts = [rng.randrange(len(self.ids) - self.context + 1) for _ in range(self.rows)]
        taken = self.context - len(self.opening)
        ids = torch.stack([torch.cat([self.opening, self.ids[start : start + taken]]) for start in starts])
        cut = _whole_groups(rng.randint(self.context // 4, self.context * 3 // 4))
        return Batch(ids, cut, torch.ones(self.rows, self.context - cut, dtype=torch.bool))

    def _recall(self, rng: Random) -> Batch:
        """Prompts that end with the question for a key, and its answer, which alone is scored."""
        rows, ends = [], []
        for _ in range(self.rows):
            prompt, answer = self.passkeys.make(self.context - KEY_DIGITS, rng.random(), rng)
            start = len(self.tokenizer.encode(prompt))
            row = torch.tensor(self.tokenizer.encode(prompt + answer))
            rows.append(F.pad(row, (0, self.context + KEY_DIGITS - len(row))))  # with any value: no earlier token attends to it
            ends.append((start - 1, len(row) - 1))
        cut = _whole_groups(min(start for start, _ in ends) - TAIL)
        at = torch.arange(self.context + KEY_DIGITS)
        scored = torch.stack([(at >= start) & (at < end) for start, end in ends])
        return Batch(torch.stack(rows), cut, scored[:, cut:])


def _whole_groups(tokens: int) -> int:
    return tokens // max(RATIOS) * max(RATIOS)


class Attached:
    """A transformers model whose FFNs record their inputs and outputs, and can be compressed by plugins."""

    def __init__(self, model: Any, plugins: files.Plugins) -> None:
        self.model, self.plugins = model, plugins
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}
        """Inputs and outputs of the FFNs with plugins in the last plain pass, each [rows, tokens, hidden]."""
        self.plain = {name: model.get_submodule(name).forward for name in plugins}
        self._ratio, self._cut, self._layers = 1, 0, set(plugins)
        for name in plugins:
            model.get_submodule(name).forward = self._forward(name)

    def _forward(self, name: str) -> Any:
        plain = self.plain[name]

        def forward(x: Tensor) -> Tensor:
            if self._ratio == 1:
                y = plain(x)
                self.seen[name] = (x, y)
                return y
            if name not in self._layers:
                return plain(x)
            start, prompt, rest = x[:, :START], x[:, START : self._cut], x[:, self._cut :]
            y, pooled = plain(torch.cat([start, rest], 1)), self.compressed(name, self._ratio, prompt)
            return torch.cat([y[:, :START], pooled, y[:, START:]], 1)

        return forward

    def compressed(self, name: str, ratio: int, x: Tensor) -> Tensor:
        """The output of the FFN and its plugin for x; both are [rows, tokens, hidden]."""
        plugin = self.plugins[name][ratio]
        return plugin.expand(self.plain[name](plugin.pool(x)), x)

    @contextmanager
    def compressing(self, ratio: int, cut: int, layers: Collection[str] | None = None) -> Iterator[None]:
        """Compress the first `cut` tokens of each row inside, but the first START, in these layers; in all if None."""
        self._ratio, self._cut, self._layers = ratio, cut, set(self.plugins if layers is None else layers)
        try:
            yield
        finally:
            self._ratio = 1

    def keep(self, layers: Collection[str]) -> None:
        """Detach the plugins of all other layers."""
        for name in [name for name in self.plugins if name not in layers]:
            self.model.get_submodule(name).forward = self.plain.pop(name)
            del self.plugins[name]
            self.seen.pop(name, None)

    def hidden(self, batch: Batch) -> Tensor:
        """The last hidden vectors behind the prompt that are scored, [scored, hidden]."""
        states = self.model.base_model(batch.ids, use_cache=False).last_hidden_state
        return states[:, batch.cut :][batch.scored]

    def log_probabilities(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] -> float32 [rows, vocabulary], as the model's own head has them."""
        config = self.model.config
        logits = self.model.get_output_embeddings()(hidden).float() / getattr(config, "logits_scaling", 1.0)  # Granite
        if cap := getattr(config, "final_logit_softcapping", None):  # Gemma
            logits = cap * torch.tanh(logits / cap)
        return logits.log_softmax(-1)

    def divergence(self, plain: Tensor, compressed: Tensor) -> Tensor:
        """KL(plain || compressed) of the predictions from last hidden vectors, [rows, hidden], in nats a row. float32 []."""
        parts = [
            recompute(self._divergence, *rows, use_reentrant=False)
            for rows in zip(plain.split(LOGIT_ROWS), compressed.split(LOGIT_ROWS), strict=True)
        ]
        return torch.stack(parts).sum() / len(plain)

    def _divergence(self, plain: Tensor, compressed: Tensor) -> Tensor:
        of_plain, of_compressed = self.log_probabilities(plain), self.log_probabilities(compressed)
        return F.kl_div(of_compressed, of_plain, reduction="sum", log_target=True)


def layer_loss(model: Attached, batch: Batch) -> Tensor:
    """The squared error of each plugin over the variance of the FFN's output, averaged over plugins. float32 []."""
    with torch.no_grad():
        model.model.base_model(batch.ids, use_cache=False)
    losses = []
    for name, by_ratio in model.plugins.items():
        x, y = (tensor[:, START : batch.cut] for tensor in model.seen[name])
        losses += [F.mse_loss(model.compressed(name, ratio, x).float(), y.float()) / y.float().var() for ratio in by_ratio]
    return torch.stack(losses).mean()


def joint_loss(model: Attached, batch: Batch, ratio: int) -> Tensor:
    """KL(plain || compressed) of the predictions behind the prompt, in nats a token."""
    with torch.no_grad():
        plain = model.hidden(batch)
    with model.compressing(ratio, batch.cut):
        compressed = model.hidden(batch)
    return model.divergence(plain, compressed)


class Training:
    """Plugins, their optimizer and the number of steps done, which is what a checkpoint holds."""

    def __init__(self, model: Attached, batches: Batches, steps: dict[str, int], layers: int) -> None:
        """steps: of each phase. layers: how many of the layers with plugins are compressed in the end."""
        self.model, self.batches, self.steps, self.layers = model, batches, steps, layers
        self.modules = nn.ModuleList(plugin for by_ratio in model.plugins.values() for plugin in by_ratio.values())
        self.optimizer = torch.optim.AdamW(self.modules.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
        self.step = 0

    def state(self) -> dict[str, Any]:
        state = {"step": self.step, "layers": list(self.model.plugins)}
        return {**state, "plugins": self.modules.state_dict(), "optimizer": self.optimizer.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        self.modules.load_state_dict(state["plugins"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.model.keep(state["layers"])

    @torch.no_grad()
    def choose(self) -> None:
        """Keep the plugins of the `layers` layers that, each compressed alone, move the predictions least."""
        rng = Random(f"{self.batches.seed} choice")
        costs = dict.fromkeys(self.model.plugins, 0.0)
        for _ in range(CHOICE_BATCHES):
            batch = self.batches.text(rng).to(self.device)
            with self.precision():
                plain = self.model.hidden(batch)
                for name, by_ratio in self.model.plugins.items():
                    for ratio in by_ratio:
                        with self.model.compressing(ratio, batch.cut, [name]):
                            costs[name] += self.model.divergence(plain, self.model.hidden(batch)).item()
        self.model.keep(sorted(costs, key=lambda name: costs[name])[: self.layers])

    @property
    def device(self) -> torch.device:
        return next(self.modules.parameters()).device

    def precision(self) -> torch.autocast:
        """The plugins are in float32, and a model on a GPU in its own precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def advance(self) -> tuple[str, float]:
        """One step; returns its phase and its loss."""
        phase, at = ("layers", self.step) if self.step < self.steps["layers"] else ("joint", self.step - self.steps["layers"])
        if (phase, at) == ("joint", 0) and self.layers < len(self.model.plugins):
            self.choose()
        batch = self.batches.draw(self.step).to(self.device)
        with self.precision():
            if phase == "layers":
                loss = layer_loss(self.model, batch)
            else:
                ratios = sorted(next(iter(self.model.plugins.values())))
                loss = joint_loss(self.model, batch, ratios[at % len(ratios)])
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        self.optimizer.param_groups[0]["lr"] = RATES[phase] * _rate_scale(at, self.steps[phase])
        self.optimizer.step()
        self.step += 1
        return phase, loss.item()


def _rate_scale(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
    return min(1.0, (step + 1) / WARMUP) * (FINAL_RATE + (1 - FINAL_RATE) * cosine)


def train(training: Training, checkpoint: Path, settings: dict[str, Any]) -> None:
    """Advance to the end, with a progress bar and a checkpoint every CHECKPOINT_EVERY steps. settings: kept in checkpoints."""
    losses: dict[Any, float] = {}
    total = sum(training.steps.values())
    with tqdm(total=total, initial=training.step, unit="step", mininterval=1.0) as bar:
        while training.step < total:
            phase, loss = training.advance()
            losses[phase] = losses.get(phase, loss) * 0.95 + loss * 0.05
            bar.update()
            bar.set_postfix({phase: f"{losses[phase]:.4f}"}, refresh=False)
            if training.step % CHECKPOINT_EVERY == 0:
                partial = checkpoint.with_name(checkpoint.name + ".part")
                torch.save({"settings": settings, **training.state()}, partial)
                os.replace(partial, checkpoint)
