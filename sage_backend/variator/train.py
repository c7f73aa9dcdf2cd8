# SPDX-License-Identifier: Apache-2.0
"""Train compression plugins: `sage variator train MODEL --ratio 2,4 --text FILE --out FILE`.

The model is frozen and teaches itself. First each plugin learns alone to give what its FFN
gives, from the inputs that the FFN has in the plain model. Then all plugins of a ratio work together in one pass, and learn to
leave the predictions for what follows a compressed prompt as they are. Some of the prompts, if asked for, hide a pass key: text
alone hardly shows whether exact tokens survive.

Batches depend on the step's number alone, so that a training that was interrupted continues as if it had not been.
"""

import argparse
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sage_backend.demo.passkey import KEY_DIGITS, make_passkey
from sage_backend.model_file import identity
from sage_backend.options import RATIOS
from sage_backend.tools.command import run_command
from sage_backend.tools.text import read_text
from sage_backend.variator import files

RATES = {"layers": 2e-3, "joint": 1e-3}
"""Peak learning rates of the two phases."""
WARMUP = 20  # steps
FINAL_RATE = 0.05  # fraction of the peak
TAIL = 32  # tokens before a pass key's answer that stay uncompressed, which hold the question
CHECKPOINT_EVERY = 50  # steps


@dataclass(frozen=True)
class Batch:
    """ids: int64 [rows, tokens], of which the first `cut` are the prompt. scored: bool [rows, tokens - cut], which predictions
    behind it count."""

    ids: Tensor
    cut: int
    scored: Tensor


class Batches:
    """Draws batches from a text's tokens, and prompts with pass keys."""

    def __init__(self, tokenizer: Any, text: str, rows: int, context: int, recall: float, seed: int) -> None:
        self.tokenizer, self.rows, self.context, self.recall, self.seed = tokenizer, rows, context, recall, seed
        self.ids = torch.tensor(tokenizer.encode(text))
        if len(self.ids) <= context:
            raise ValueError(f"the text has {len(self.ids)} tokens; training needs more than --context, which is {context}")

    def draw(self, step: int) -> Batch:
        rng = Random(f"{self.seed} {step}")
        return self._recall(rng) if rng.random() < self.recall else self._text(rng)

    def _text(self, rng: Random) -> Batch:
        """Windows, of which the first quarter to three quarters are the prompt."""
        starts = [rng.randrange(len(self.ids) - self.context + 1) for _ in range(self.rows)]
        ids = torch.stack([self.ids[start : start + self.context] for start in starts])
        cut = _whole_groups(rng.randint(self.context // 4, self.context * 3 // 4))
        return Batch(ids, cut, torch.ones(self.rows, self.context - cut, dtype=torch.bool))

    def _recall(self, rng: Random) -> Batch:
        """Prompts that end with the question for a key, and its answer, which alone is scored."""
        rows, ends = [], []
        for _ in range(self.rows):
            prompt, answer = make_passkey(self.context - KEY_DIGITS, rng.random(), rng, self.tokenizer)
            start = len(self.tokenizer.encode(prompt))
            row = torch.tensor(self.tokenizer.encode(prompt + answer))
            rows.append(F.pad(row, (0, self.context + KEY_DIGITS - len(row))))  # with anything, for nothing before looks there
            ends.append((start - 1, len(row) - 1))
        cut = _whole_groups(min(start for start, _ in ends) - TAIL)
        at = torch.arange(self.context + KEY_DIGITS)
        scored = torch.stack([(at >= start) & (at < end) for start, end in ends])
        return Batch(torch.stack(rows), cut, scored[:, cut:])


def _whole_groups(tokens: int) -> int:
    return tokens // max(RATIOS) * max(RATIOS)


class Attached:
    """A transformers model whose FFNs can be watched, and have plugins."""

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
        """What the FFN and its plugin make of x [rows, tokens, hidden]."""
        plugin = self.plugins[name][ratio]
        return plugin.expand(self.plain[name](plugin.pool(x)), x)

    @contextmanager
    def compressing(self, ratio: int, cut: int) -> Iterator[None]:
        """Compress the first `cut` tokens of each row inside."""
        self._ratio, self._cut = ratio, cut
        yield
        self._ratio = 1

    def log_probabilities(self, batch: Batch) -> Tensor:
        """Of every token behind the prompt's, float32 [scored, vocabulary]."""
        keep = batch.ids.shape[1] - batch.cut
        logits = self.model(batch.ids, logits_to_keep=keep, use_cache=False).logits
        return logits[batch.scored].float().log_softmax(-1)


def layer_loss(model: Attached, batch: Batch) -> Tensor:
    """The squared error of every plugin, over the variance of what it should give; the mean over plugins."""
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
    """Plugins on their way. Its state is what a checkpoint holds."""

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
    """Advance to the end, with a progress bar, and a checkpoint now and then."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    losses: dict[Any, float] = {}
    total = sum(training.steps.values())
    with tqdm(total=total, initial=training.step, unit="step", mininterval=1.0) as bar:
        while training.step < total:
            phase, loss = training.advance()
            losses[phase] = losses.get(phase, loss) * 0.95 + loss * 0.05
            bar.update()
            bar.set_postfix({phase: f"{losses[phase]:.4f}"}, refresh=False)
            if training.step % CHECKPOINT_EVERY == 0:
                part = checkpoint.with_name(checkpoint.name + ".part")
                torch.save({"settings": settings, **training.state()}, part)
                os.replace(part, checkpoint)


def _restore(training: Training, checkpoint: Path, settings: dict[str, Any]) -> None:
    """Raises ValueError for a checkpoint that is not there or is one of another training."""
    if not checkpoint.is_file():
        raise ValueError(f"there is no checkpoint {checkpoint} to resume from; leave --resume out")
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")
    for name, value in settings.items():
        if state["settings"].get(name) != value:
            raise ValueError(
                f"{checkpoint} is of a training with another {name} ({state['settings'].get(name)}, not {value}); "
                "use the same arguments, or leave --resume out"
            )
    training.restore(state)


def _ratios(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) in RATIOS for part in parts):
        raise argparse.ArgumentTypeError(f"takes ratios out of {', '.join(map(str, RATIOS))}, such as 2,4; not {text!r}")
    return sorted(set(map(int, parts)))


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status; what is wrong with the input is told in one line on stderr."""
    parser = argparse.ArgumentParser(prog="sage variator", description="Compression plugins for a model's FFNs.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("train", help="train plugins on a text and write them to a file")
    command.add_argument("model", help="folder or name")
    command.add_argument("--ratio", type=_ratios, default=[2, 4], metavar="RATIOS", help="for example 2,4 (default)")
    command.add_argument("--text", type=Path, required=True, help="what to train on")
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write the plugins")
    command.add_argument("--layer-steps", type=int, default=400, help="steps of plugins alone (default: %(default)s)")
    command.add_argument("--joint-steps", type=int, default=1600, help="steps of plugins together (default: %(default)s)")
    command.add_argument("--rows", type=int, default=4, help="windows of a step (default: %(default)s)")
    command.add_argument("--context", type=int, default=512, help="tokens of a window (default: %(default)s)")
    command.add_argument("--recall", type=float, default=0.0, help="share of steps with pass keys (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command.add_argument("--resume", action="store_true", help="continue from FILE.checkpoint")
    arguments = parser.parse_args(argv)
    return run_command(lambda: _train(arguments))


def _train(arguments: argparse.Namespace) -> None:
    text = read_text(arguments.text)
    if min(arguments.layer_steps, arguments.joint_steps) < 1 or arguments.rows < 1 or arguments.context < 8 * max(RATIOS):
        raise ValueError(f"steps and --rows must be at least 1, and --context at least {8 * max(RATIOS)}")
    if not arguments.out.absolute().parent.is_dir():
        raise ValueError(f"there is no folder {arguments.out.absolute().parent} for --out")
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(arguments.model)
    layers = files.default_layers(config)
    torch.manual_seed(arguments.seed)
    plugins = files.make(layers, arguments.ratio, config.hidden_size)
    on_cpu = torch.device(arguments.device).type == "cpu"  # where 16 bits are slow
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32 if on_cpu else "auto")
    model.to(arguments.device).eval().requires_grad_(False)
    batches = Batches(
        AutoTokenizer.from_pretrained(arguments.model), text,
        arguments.rows, arguments.context, arguments.recall, arguments.seed,
    )  # fmt: skip
    steps = {"layers": arguments.layer_steps, "joint": arguments.joint_steps}
    training = Training(Attached(model, plugins), batches, steps)
    training.modules.to(arguments.device)
    checkpoint = arguments.out.with_name(arguments.out.name + ".checkpoint")
    names = ("ratio", "layer_steps", "joint_steps", "rows", "context", "recall", "seed")
    settings = {name: getattr(arguments, name) for name in names}
    settings |= {"model": identity(arguments.model, config), "text": len(text)}
    if arguments.resume:
        _restore(training, checkpoint, settings)
    train(training, checkpoint, settings)
    files.save(arguments.out, plugins, arguments.model, config)
    checkpoint.unlink(missing_ok=True)
    added = sum(parameter.numel() for parameter in training.modules.parameters())
    share = added / sum(parameter.numel() for parameter in model.parameters())
    print(f"{arguments.out}: {added:,} parameters in {len(layers)} layers, {100 * share:.2f}% of the model's")


if __name__ == "__main__":
    sys.exit(main())
