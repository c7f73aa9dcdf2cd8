# SPDX-License-Identifier: Apache-2.0
"""Train the demonstration model from the interpreter's own standard library.

    python3 -m sage_backend.demo.train --out DIR --seconds 350

It needs torch (2.9 or newer), transformers and tokenizers. One recent GPU is enough, and `--smoke` tries the whole script on a
CPU. It writes into DIR a checkpoint that `transformers` and vLLM load (config.json, model.safetensors in bf16, tokenizer
files), heldout.txt, and training.json with the measurements.

The model learns two things at once. Python source (PSF license) teaches it a real next-token distribution, so its loss on
held-out text, in nats, shows what a cache format costs. Synthetic recall episodes (pass keys, table lookups, copies) teach it
to find exact tokens anywhere in its context, so an error in a key or value shows as a wrong digit.
"""

import argparse
import json
import math
import platform
import sys
import sysconfig
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

if not __package__:  # run as a script: make the package importable
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from sage_backend.demo.batches import BatchQueue, BatchSampler
from sage_backend.demo.checkpoint import check_export, evaluate, save_checkpoint
from sage_backend.demo.corpus import (
    Ids,
    check_round_trip,
    corpus_texts,
    encode_corpus,
    heldout_text,
    train_tokenizer,
)
from sage_backend.demo.llama import LARGE, Llama, Shape, largest_biases, outlier_biases, weighted_loss

MATRIX_RATE = 4e-3  # peak learning rate of Muon, for the weight matrices of the layers
VECTOR_RATE = 3e-3  # peak learning rate of AdamW, for embedding, biases and norms
WEIGHT_DECAY = 0.1
WARMUP = 0.02  # fraction of the training time
FINAL_RATE = 0.02  # fraction of the peak learning rate

SHORTEST_LIMIT = 256  # where the curriculum of episode lengths starts, in tokens
CURRICULUM_END = 0.4  # fraction of the training time at which episodes reach the whole context


@dataclass(frozen=True)
class Run:
    """How much work one run does; `SMOKE` is just enough to execute every line."""

    rows: int  # a step
    context: int  # tokens a row
    corpus_bytes: int
    passkey_prompts: int  # for each evaluation length
    heldout_windows: int


FULL = Run(rows=64, context=Shape.context, corpus_bytes=1 << 30, passkey_prompts=100, heldout_windows=1000)
SMOKE = Run(rows=2, context=512, corpus_bytes=2_000_000, passkey_prompts=2, heldout_windows=2)


def learning_rate_scale(progress: float) -> float:
    """Linear warm-up, then half a cosine; `progress` is the fraction of the training time that has passed."""
    if progress < WARMUP:
        return max(progress / WARMUP, 1e-3)
    cosine = 0.5 + 0.5 * math.cos(math.pi * min(1.0, (progress - WARMUP) / (1 - WARMUP)))
    return FINAL_RATE + (1 - FINAL_RATE) * cosine


def episode_limit(progress: float, context: int) -> int:
    """Longest recall episode, in tokens: grows geometrically to a whole row of `context` + 1."""
    ratio = (context + 1) / SHORTEST_LIMIT
    return int(SHORTEST_LIMIT * ratio ** min(1.0, progress / CURRICULUM_END))


class Trainer:
    """Trains a model for a given time. The clock, not a number of steps, drives both schedules."""

    def __init__(self, model: Llama, shape: Shape, device: torch.device, compiled: bool) -> None:
        self.model = model
        self.device = device
        self.loss = torch.compile(weighted_loss) if compiled else weighted_loss
        self.frozen = [(bias, offsets != 0) for bias, offsets in outlier_biases(model, shape)]
        matrices = [p for p in model.layers.parameters() if p.ndim == 2]
        others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
            # No decay here: it would shrink the frozen outliers.
            torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
        ]
        self.peak_rates = (MATRIX_RATE, VECTOR_RATE)

    def train(self, batches: BatchQueue, run: Run, seconds: float, heldout: Tensor) -> dict[str, Any]:
        """Train for `seconds`, not counting compilation; returns figures for training.json."""
        self._backward(*batches.next(SHORTEST_LIMIT))  # compiles
        curve: list[dict[str, float]] = []
        steps, sampled = 0, -1
        start = time.monotonic()
        with tqdm(total=100, unit="%", mininterval=2.0) as bar:
            while (progress := (time.monotonic() - start) / seconds) < 1.0:
                loss = self._step(*batches.next(episode_limit(progress, run.context)), progress)
                steps += 1
                if int(100 * progress) > sampled:  # rarely: reading a loss waits for the GPU
                    bar.update(int(100 * progress) - max(sampled, 0))
                    sampled = int(100 * progress)
                    curve.append(self._sample(steps, loss, heldout[::4], time.monotonic() - start))
                    bar.set_postfix(curve[-1])
        elapsed = time.monotonic() - start
        return {
            "steps": steps,
            "tokens": steps * run.rows * run.context,
            "seconds": round(elapsed, 1),
            "loss_curve": curve,
        }

    def _step(self, ids: Tensor, weights: Tensor, progress: float) -> Tensor:
        """One optimizer step; returns the loss without waiting for it."""
        loss = self._backward(ids, weights)
        for bias, frozen in self.frozen:
            assert bias.grad is not None
            bias.grad.masked_fill_(frozen, 0.0)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, peak in zip(self.optimizers, self.peak_rates, strict=True):
            optimizer.param_groups[0]["lr"] = peak * learning_rate_scale(progress)
            optimizer.step()
        return loss

    def _backward(self, ids: Tensor, weights: Tensor) -> Tensor:
        """Set the gradients; returns the loss."""
        self.model.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss: Tensor = self.loss(self.model, ids, weights)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    @torch.no_grad()
    def _sample(self, step: int, loss: Tensor, heldout: Tensor, seconds: float) -> dict[str, float]:
        """A point of the loss curve: this batch's weighted loss, and the plain loss on held-out text."""
        self.model.eval()
        weights = torch.ones_like(heldout[:, 1:], dtype=torch.float32)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            heldout_loss = weighted_loss(self.model, heldout, weights)
        self.model.train()
        return {
            "step": step,
            "seconds": round(seconds, 1),
            "train": round(loss.item(), 4),
            "heldout": round(heldout_loss.item(), 4),
        }


def windows_of(ids: Ids, tokens: int, most: int, device: torch.device) -> Tensor:
    """Non-overlapping windows (windows, tokens) from the start of a stream, at most `most`."""
    count = min(most, len(ids) // tokens)
    return torch.from_numpy(ids[: count * tokens].astype(np.int64)).view(count, tokens).to(device)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    parser = argparse.ArgumentParser(description="Train the demonstration model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and the report")
    parser.add_argument("--seconds", type=float, default=350.0, help="training time, without compilation")
    parser.add_argument("--corpus", type=Path, nargs="+", default=[stdlib], help="folders of Python source")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--large", action="store_true", help="a model of 22 million parameters instead of the embedded one")
    parser.add_argument("--no-compile", action="store_true", help="run the model without torch.compile")
    parser.add_argument("--smoke", action="store_true", help="tiny batches, little data: try the script")
    return parser.parse_args()


def describe_run(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What identifies a run. Folders appear by name only: their paths mean nothing on other machines."""
    command = f"python3 -m sage_backend.demo.train --seconds {arguments.seconds:g} --seed {arguments.seed}"
    command += " --large" * arguments.large + " --no-compile" * arguments.no_compile + " --smoke" * arguments.smoke
    return {
        "command": command,
        "seed": arguments.seed,
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "corpus": [folder.name for folder in arguments.corpus],
    }


def main() -> None:
    """Prepare the data, train, save, check what was saved, and report."""
    arguments = parse_arguments()
    run = SMOKE if arguments.smoke else FULL
    shape, device = LARGE if arguments.large else Shape(), torch.device(arguments.device)
    out, seed = arguments.out, arguments.seed
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)

    heldout = heldout_text(arguments.corpus)
    (out / "heldout.txt").write_text(heldout, encoding="utf-8")
    texts = corpus_texts(arguments.corpus, run.corpus_bytes)
    tokenizer = train_tokenizer(texts)
    check_round_trip(tokenizer, heldout)
    corpus = encode_corpus(tokenizer, texts)
    windows = windows_of(encode_corpus(tokenizer, [heldout]), run.context + 1, run.heldout_windows, device)
    print(f"corpus: {len(texts)} files, {len(corpus):,} tokens; held out: {len(heldout):,} bytes", flush=True)

    model = Llama(shape).to(device)
    trainer = Trainer(model, shape, device, compiled=device.type == "cuda" and not arguments.no_compile)
    sampler = BatchSampler(tokenizer, corpus, run.rows, run.context, seed)
    with BatchQueue(sampler, device) as batches:
        training = trainer.train(batches, run, arguments.seconds, windows)

    save_checkpoint(model, shape, tokenizer, out)
    report = {
        **describe_run(arguments, device),
        "corpus_files": len(texts),
        "corpus_tokens": len(corpus),
        **evaluate(out, tokenizer, windows, run.passkey_prompts, seed),
        "export_logit_difference": check_export(model, shape, out, windows[:1, :256].cpu()),
        "largest_biases": largest_biases(model),
        **training,
    }
    (out / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in report.items() if key != "loss_curve"}, indent=2))


if __name__ == "__main__":
    main()
