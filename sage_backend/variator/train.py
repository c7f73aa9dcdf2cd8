# SPDX-License-Identifier: Apache-2.0
"""Training of compression plugins; the command is `sage_backend.tools.variator`.

The model is frozen and teaches itself. First each plugin learns alone to give what its FFN gives, from the inputs that the FFN
has in the plain model. Then all plugins of a ratio work together in one pass, and learn to leave the predictions for what
follows a compressed prompt as they are. Some of the prompts can hide a pass key: text alone hardly shows whether exact tokens
survive.

Batches depend on the step's number alone, so that a training that was interrupted continues as if it had not been.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from sage_backend.demo.passkey import KEY_DIGITS, PassKeys
from sage_backend.options import RATIOS
from sage_backend.variator import files

RATES = {"layers": 2e-3, "joint": 1e-3}
"""Peak learning rates of the two phases."""
WARMUP = 20  # steps
FINAL_RATE = 0.05  # fraction of the peak
TAIL = 32  # tokens before a pass key's answer that stay uncompressed, which hold the question
CHECKPOINT_EVERY = 50  # steps


@dataclass(frozen=True)
class Batch:
    """ids: int64 [rows, tokens], of which the first `cut` are the prompt. scored: bool [rows, tokens - cut], the predictions
    behind it that count."""

    ids: Tensor
    cut: int
    scored: Tensor


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
        return self._recall(rng) if rng.random() < self.recall else self._text(rng)

    def _text(self, rng: Random) -> Batch:
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

    def __init__(self, model: nn.Module, plugins: files.Plugins) -> None:
        self.model, self.plugins = model, plugins
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}
        """Inputs and outputs of the FFNs with plugins in the last plain pass, each [rows, tokens, hidden]."""
        self.plain = {name: model.get_submodule(name).forward for name in plugins}
        self._ratio, self._cut = 1, 0
        for name in plugins:
            model.get_submodule(name).forward = self._forward(name)

    def _forward(self, name: str) -> Any:
        plain = self.plain[name]

        def forward(x: Tensor) -> Tensor:
            if self._ratio == 1:
                y = plain(x)
                self.seen[name] = (x, y)
                return y
            prompt, rest = x[:, : self._cut], x[:, self._cut :]
            return torch.cat([self.compressed(name, self._ratio, prompt), plain(rest)], 1)

        return forward

    def compressed(self, name: str, ratio: int, x: Tensor) -> Tensor:
        """The output of the FFN and its plugin for x; both are [rows, tokens, hidden]."""
        plugin = self.plugins[name][ratio]
        return plugin.expand(self.plain[name](plugin.pool(x)), x)

    @contextmanager
    def compressing(self, ratio: int, cut: int) -> Iterator[None]:
        """Compress the first `cut` tokens of each row inside."""
        self._ratio, self._cut = ratio, cut
        yield
        self._ratio = 1

    def log_probabilities(self, batch: Batch) -> Tensor:
        """The log-probabilities behind the prompt that are scored, float32 [scored, vocabulary]."""
        keep = batch.ids.shape[1] - batch.cut
        logits = self.model(batch.ids, logits_to_keep=keep, use_cache=False).logits
        return logits[batch.scored].float().log_softmax(-1)


def layer_loss(model: Attached, batch: Batch) -> Tensor:
    """The squared error of each plugin over the variance of the FFN's output, averaged over plugins. float32 []."""
    with torch.no_grad():
        model.model(batch.ids, logits_to_keep=1, use_cache=False)
    losses = []
    for name, by_ratio in model.plugins.items():
        x, y = (tensor[:, : batch.cut] for tensor in model.seen[name])
        losses += [F.mse_loss(model.compressed(name, ratio, x).float(), y.float()) / y.float().var() for ratio in by_ratio]
    return torch.stack(losses).mean()


def joint_loss(model: Attached, batch: Batch, ratio: int) -> Tensor:
    """KL(plain || compressed) of the predictions behind the prompt, in nats a token."""
    with torch.no_grad():
        plain = model.log_probabilities(batch)
    with model.compressing(ratio, batch.cut):
        compressed = model.log_probabilities(batch)
    return F.kl_div(compressed, plain, reduction="batchmean", log_target=True)


class Training:
    """Plugins, their optimizer and the number of steps done, which is what a checkpoint holds."""

    def __init__(self, model: Attached, batches: Batches, steps: dict[str, int]) -> None:
        self.model, self.batches, self.steps = model, batches, steps
        self.modules = nn.ModuleList(plugin for by_ratio in model.plugins.values() for plugin in by_ratio.values())
        self.optimizer = torch.optim.AdamW(self.modules.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
        self.step = 0

    def state(self) -> dict[str, Any]:
        return {"step": self.step, "plugins": self.modules.state_dict(), "optimizer": self.optimizer.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        self.modules.load_state_dict(state["plugins"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def advance(self) -> tuple[str, float]:
        """One step; returns its phase and its loss."""
        phase, at = ("layers", self.step) if self.step < self.steps["layers"] else ("joint", self.step - self.steps["layers"])
        drawn = self.batches.draw(self.step)
        device = next(self.modules.parameters()).device
        batch = Batch(drawn.ids.to(device), drawn.cut, drawn.scored.to(device))
        # The plugins are in float32, and a model on a GPU in its own precision.
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
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
