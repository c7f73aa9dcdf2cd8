#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Train an EAGLE-3 drafter for a real model of the Llama family, and count the drafts that engines accept with it.

    python3 benchmarks/corpus.py CORPUS
    python3 benchmarks/eagle.py train MODEL CORPUS/train.txt --out DRAFTER
    python3 benchmarks/eagle.py accept MODEL DRAFTER CORPUS/code-heldout.txt --runs CPU_ATTN SAGE --out RESULTS.json

Training takes what the drafter reads (states of three layers of the target) and what it has to draft (the tokens that the
target finds most likely) from --tokens of the text, and keeps both. Two drafts in a row are trained, the second from the state
of the first, as at inference. `accept` answers prompts with every run's backend, for target and drafter alike. Acceptance
belongs to this drafter, which saw little text; what counts is the difference between backends.
(EAGLE-3: Li et al., 2025, sections 3.1 and 3.2.)
"""

import argparse
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from common.report import command_line, save
from torch import Tensor, nn
from torch.nn import functional as F

from sage_backend.tools import engines

WINDOW, BATCH = 256, 4
"""Tokens of a sequence, and sequences of a batch of training."""
DRAFT_VOCABULARY = 8192
"""The drafter knows the most frequent tokens of its text only, as published drafters do."""
LEARNING_RATE, WARM_UP = 1e-3, 50
DRAFTS, ANSWER, PROMPT = 3, 128, 256


class RMSNorm(nn.Module):
    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(channels)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class Drafter(nn.Module):
    """What vLLM runs as LlamaForCausalLMEagle3, with its names of weights: a decoder layer over the embedding of the next token
    beside the state of the token before it. `states`: (batch, tokens, 3 * hidden) of the target, through `fc`."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, width, eps = config["hidden_size"], config["intermediate_size"], config["rms_norm_eps"]
        self.heads, self.kv_heads, self.size = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
        self.theta = config["rope_parameters"]["rope_theta"]
        attention, mlp = nn.Module(), nn.Module()
        for name, heads in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads)):
            setattr(attention, f"{name}_proj", nn.Linear(2 * hidden, heads * self.size, bias=False))
        attention.o_proj = nn.Linear(self.heads * self.size, hidden, bias=False)
        mlp.gate_proj, mlp.up_proj = (nn.Linear(hidden, width, bias=False) for _ in range(2))
        mlp.down_proj = nn.Linear(width, hidden, bias=False)
        self.midlayer = nn.Module()
        self.midlayer.self_attn, self.midlayer.mlp = attention, mlp
        for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm"):
            setattr(self.midlayer, name, RMSNorm(hidden, eps))
        self.norm, self.fc = RMSNorm(hidden, eps), nn.Linear(3 * hidden, hidden, bias=False)
        self.lm_head = nn.Linear(hidden, DRAFT_VOCABULARY, bias=False)

    def forward(self, embeds: Tensor, states: Tensor, before: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Any]:
        """The logits, the state for the next draft, and the layer's keys and values.

        embeds, states: (batch, tokens, hidden). before: keys and values of the first drafts, for a second one: a token attends
        to those before it, and to itself as it is now.
        """
        layer = self.midlayer
        x = torch.cat([layer.input_layernorm(embeds), layer.hidden_norm(states)], -1)
        q, k, v = (getattr(layer.self_attn, f"{name}_proj")(x) for name in "qkv")
        q, k = (self.rotated(each.unflatten(-1, (-1, self.size)).transpose(1, 2)) for each in (q, k))
        v = v.unflatten(-1, (-1, self.size)).transpose(1, 2)
        group, tokens = self.heads // self.kv_heads, x.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        keys, values = before or (k, v)
        logits = (q @ keys.transpose(-1, -2)) * self.size**-0.5
        now = torch.eye(tokens, dtype=torch.bool)
        if before:
            logits = torch.where(now, ((q * k).sum(-1) * self.size**-0.5).unsqueeze(-1), logits)
        p = logits.masked_fill(torch.ones(tokens, tokens, dtype=torch.bool).triu(1), float("-inf")).softmax(-1)
        out = p @ values
        if before:
            out += p.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * (v - values)
        residual = states + layer.self_attn.o_proj(out.transpose(1, 2).flatten(2))
        y = layer.post_attention_layernorm(residual)
        residual = residual + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(y)) * layer.mlp.up_proj(y))
        return self.lm_head(self.norm(residual)), residual, (k, v)

    def rotated(self, x: Tensor) -> Tensor:
        """RoPE of (batch, heads, tokens, channels), for positions from 0."""
        frequency = self.theta ** -(torch.arange(0, self.size, 2) / self.size)
        angle = torch.arange(x.shape[-2]).unsqueeze(-1) * frequency
        a, b = x.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def aux_layers(layers: int) -> list[int]:
    """The layers whose inputs a drafter reads, unless its configuration names others (vLLM, as EAGLE-3)."""
    return [2, layers // 2, layers - 3]


def read_target(model: Any, windows: Tensor) -> tuple[Tensor, Tensor]:
    """States, (windows, tokens, 3 * hidden), and the most likely next tokens, (windows, tokens), of windows of tokens."""
    states, likely = [], []
    with torch.inference_mode():
        for batch in windows.split(BATCH):
            out = model(batch, output_hidden_states=True, use_cache=False)
            states.append(torch.cat([out.hidden_states[i] for i in aux_layers(len(out.hidden_states) - 1)], -1).bfloat16())
            likely.append(out.logits.argmax(-1))
    return torch.cat(states), torch.cat(likely)


def train(arguments: argparse.Namespace) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    config = json.loads((arguments.model / "config.json").read_text())
    text = arguments.text.read_text(encoding="utf-8", errors="replace")
    step = max(len(text) // (arguments.tokens // WINDOW), 1)  # windows from all over the text
    encode = AutoTokenizer.from_pretrained(arguments.model).encode
    ids = [encode(text[at : at + 12 * WINDOW], add_special_tokens=False)[:WINDOW] for at in range(0, len(text), step)]
    windows = torch.tensor([each for each in ids if len(each) == WINDOW])
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16).eval()
    begun = time.monotonic()
    states, likely = read_target(model, windows)
    print(f"{windows.numel()} tokens read in {time.monotonic() - begun:.0f} s", flush=True)
    counted = Counter(likely.flatten().tolist() + list(range(config["vocab_size"])))  # each at least once
    known = torch.tensor(sorted(token for token, _ in counted.most_common(DRAFT_VOCABULARY)))
    labels = torch.full((config["vocab_size"],), -100)
    labels[known] = torch.arange(len(known))
    embed = model.get_input_embeddings().weight.detach().float()
    drafter = Drafter(config)
    drafter.lm_head.weight.data.copy_(model.get_output_embeddings().weight.detach()[known])
    del model
    optimizer = torch.optim.AdamW(drafter.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    begun, steps = time.monotonic(), 0
    while (progress := (time.monotonic() - begun) / arguments.seconds) < 1:
        chosen = torch.randint(len(windows), (BATCH,))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min((steps + 1) / WARM_UP, 1 - 0.95 * progress)
        losses = []
        embeds, target = embed[windows[chosen][:, 1:]], labels[likely[chosen][:, 1:]]
        logits, state, kept = drafter(embeds, drafter.fc(states[chosen][:, :-1].float()), None)
        losses.append(F.cross_entropy(logits.flatten(0, 1), target.flatten()))
        shifted = torch.cat([drafter.fc(states[chosen][:, :1].float()), state[:, :-1]], 1)
        again, _, _ = drafter(embeds, shifted, kept)
        losses.append(F.cross_entropy(again[:, 1:].flatten(0, 1), target[:, 1:].flatten()))
        optimizer.zero_grad()
        sum(losses).backward()
        nn.utils.clip_grad_norm_(drafter.parameters(), 1.0)
        optimizer.step()
        if steps % 50 == 0:
            right = (
                (logits.argmax(-1) == target).float().mean().item(),
                (again.argmax(-1) == target)[:, 1:].float().mean().item(),
            )
            print(
                f"{steps:5d} {progress:.0%} loss {losses[0]:.3f} {losses[1]:.3f} right {right[0]:.1%} {right[1]:.1%}",
                flush=True,
            )
        steps += 1
    own = {"architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1, "draft_vocab_size": DRAFT_VOCABULARY}
    tensors = {name: x.detach().bfloat16().contiguous() for name, x in drafter.named_parameters()}
    arguments.out.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors | {"d2t": known - torch.arange(len(known))}, arguments.out / "model.safetensors")
    (arguments.out / "config.json").write_text(json.dumps(config | own | {"tie_word_embeddings": False}, indent=2))


def accept(arguments: argparse.Namespace) -> None:
    from vllm import SamplingParams  # after the environment is set

    report = engines.circumstances(command_line("benchmarks/eagle.py"), arguments.model.name) | {"results": []}
    text = arguments.text.read_text(encoding="utf-8", errors="replace")
    params = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True, detokenize=False)
    speculative = {"method": "eagle3", "model": str(arguments.drafter), "num_speculative_tokens": DRAFTS}
    for run in map(engines.Run.parse, arguments.runs):
        sizes = {"max_model_len": 1024, "max_num_seqs": arguments.prompts, "kv_cache_memory_bytes": 1 << 30}
        limits = {"enforce_eager": not torch.cuda.is_available(), "enable_prefix_caching": False, "disable_log_stats": False}
        with engines.engine(run, str(arguments.model), speculative_config=speculative, **sizes, **limits) as llm:
            encode = llm.get_tokenizer().encode
            step = len(text) // arguments.prompts
            prompts = [encode(text[i * step :][: 12 * PROMPT])[:PROMPT] for i in range(arguments.prompts)]
            begun = time.monotonic()
            llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
            seconds = time.monotonic() - begun
            found = {metric.name: metric for metric in llm.get_metrics() if "spec_decode" in metric.name}
        steps, drafted, accepted = (
            found[f"vllm:spec_decode_num_{n}"].value for n in ("drafts", "draft_tokens", "accepted_tokens")
        )
        report["results"].append(
            {
                "run": run.name,
                "steps": steps,
                "draft_tokens": drafted,
                "accepted": round(accepted / drafted, 4),
                "accepted_by_position": [
                    round(n / steps, 4) for n in found["vllm:spec_decode_num_accepted_tokens_per_pos"].values[:DRAFTS]
                ],
                "tokens_per_step": round(1 + accepted / steps, 3),
                "seconds": round(seconds, 1),
            }
        )
        print(json.dumps(report["results"][-1]), flush=True)
        if arguments.out:
            save(report, arguments.out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train an EAGLE-3 drafter, and count the drafts that engines accept with it.")
    commands = parser.add_subparsers(required=True)
    trained = commands.add_parser("train", help="train a drafter on text")
    trained.set_defaults(command=train)
    trained.add_argument("model", type=Path)
    trained.add_argument("text", type=Path)
    trained.add_argument("--tokens", type=int, default=1 << 18, help="of the text, to train on")
    trained.add_argument("--seconds", type=float, default=600, help="of training, after the target has read the text")
    trained.add_argument("--out", type=Path, required=True, help="folder for the drafter")
    accepted = commands.add_parser("accept", help="count accepted drafts with each run's backend")
    accepted.set_defaults(command=accept)
    accepted.add_argument("model", type=Path)
    accepted.add_argument("drafter", type=Path)
    accepted.add_argument("text", type=Path)
    accepted.add_argument("--runs", nargs="+", required=True, metavar="RUN", help="as for sage eval")
    accepted.add_argument("--prompts", type=int, default=32)
    accepted.add_argument("--out", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    arguments.command(arguments)


if __name__ == "__main__":
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | {
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR")
    }
    sys.exit(main())
