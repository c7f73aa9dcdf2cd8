#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What the quantization of each part costs: a whole model's predictions with attention quantized in some parts only.

    python3 benchmarks/studies/error_parts.py --out benchmarks/results/error-parts.json

The embedded model reads windows of held-out text in float32. In its attention, the parts that are named have the arithmetic of
`sage_kernels.reference`, and the others are exact. Keys are smoothed by the mean of the first tokens of each window. Three
parts are not those of the engine: INT8 values instead of e4m3, with one scale a token, which FP8 tensor cores cannot multiply;
e4m3 values with powers of two as scales, which only pages of INT4 keys have; and P relative to its row's largest logit rounded
up to an integer. Plain torch on a CPU; takes a minute or two.
"""

import math
import sys
from collections.abc import Set
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/, where common/ is

import torch
import torch.nn.functional as F
from common.activations import ANCHORS, HEAD_DIM, TOKENS, heads_of, load_model
from common.study import study
from torch import Tensor

from sage_backend.demo import HELDOUT
from sage_backend.demo.llama import Attention
from sage_kernels.reference import LOG2E, P_BITS, code_product, quantize_k, quantize_p, quantize_q, quantize_v
from sage_paged import PAGE_TOKENS

WINDOWS = 8
CASES: tuple[tuple[str, ...], ...] = (
    ("Q", "K INT8"),
    ("V e4m3",),
    ("P e4m3",),
    ("V e4m3", "P e4m3"),
    ("P e4m3 rounded up",),
    ("V e4m3 by powers of 2",),
    ("Q", "K INT8", "V e4m3", "P e4m3"),
    ("Q", "K INT8", "V e4m3", "P e4m3 rounded up"),
    ("Q", "K INT8", "V e4m3 by powers of 2", "P e4m3"),
    ("Q", "K INT8", "V INT8"),
    ("Q", "K INT8", "V INT8", "P e4m3"),
    ("Q", "K INT4"),
    ("Q", "K INT4", "V e4m3 by powers of 2", "P e4m3"),
)


def quantized_attention(q: Tensor, k: Tensor, v: Tensor, parts: Set[str]) -> Tensor:
    """Causal attention of heads [heads, tokens, HEAD_DIM] in float32, quantized in these parts."""
    k = k - ANCHORS["first tokens"](k)
    for bits in (8, 4):
        if f"K INT{bits}" in parts:
            codes, scale = quantize_k(k, bits)
            k = codes.float() * scale[..., None]
    if "Q" in parts:
        codes, scale = quantize_q(q)
        q = codes.float() * scale[..., None]
    v_exponent = torch.zeros(v.shape[:2])
    if parts & {"V e4m3", "V e4m3 by powers of 2"}:
        codes, v_exponent = quantize_v(v, "V e4m3" in parts)
        v = codes.float()
    elif "V INT8" in parts:
        v_exponent = (v.abs().amax(-1) / 127).log2()
        v = (v * (-v_exponent).exp2()[..., None]).round()
    logits = code_product(q, k, torch.ones(k.shape[:2])) * (LOG2E / math.sqrt(HEAD_DIM)) + v_exponent[:, None]
    logits.masked_fill_(torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1), float("-inf"))
    if "P e4m3" in parts:
        p, _ = quantize_p(logits, max(PAGE_TOKENS))
    elif "P e4m3 rounded up" in parts:
        p = torch.exp2(logits - (logits.amax(-1, keepdim=True).ceil() - P_BITS)).to(torch.float8_e4m3fn).float()
    else:
        p = torch.exp2(logits - logits.amax(-1, keepdim=True))
    return p @ v / (p * (-v_exponent).exp2()[:, None]).sum(-1, keepdim=True)


def forward(module: Attention, parts: Set[str], x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`Attention.forward` of one window."""
    q, k, v = heads_of(module, x, cos, sin)
    k, v = (t.repeat_interleave(len(q) // len(k), 0) for t in (k, v))
    out: Tensor = module.o_proj(quantized_attention(q, k, v, parts).transpose(0, 1).flatten(1)[None])
    return out


def costs() -> list[dict[str, object]]:
    """For each case: change of the loss (nats), mean absolute change of log-probabilities, agreement of likeliest tokens."""
    model, tokenizer = load_model()
    ids = torch.tensor(tokenizer.encode(HELDOUT.read_text(encoding="utf-8")).ids)
    windows = ids[: WINDOWS * (TOKENS + 1)].view(WINDOWS, -1)

    def read(parts: Set[str]) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the tokens and the likeliest ones, [windows, TOKENS]."""
        for layer in model.layers:
            layer.self_attn.forward = partial(forward, layer.self_attn, parts)
        true, likeliest = [], []
        for window in windows:
            logprobs = F.log_softmax(model(window[None, :-1])[0], -1)
            true.append(logprobs.gather(-1, window[1:, None])[:, 0])
            likeliest.append(logprobs.argmax(-1))
        return torch.stack(true), torch.stack(likeliest)

    exact, exact_likeliest = read(frozenset())
    results: list[dict[str, object]] = []
    for case in CASES:
        true, likeliest = read(frozenset(case))
        figures = {
            "loss_change": round(float((exact - true).mean()), 5),
            "mean_abs_logprob_change": round(float((exact - true).abs().mean()), 4),
            "top1_agreement": round(float((likeliest == exact_likeliest).float().mean()), 4),
        }
        results.append({"quantized": ", ".join(case), **figures})
    return results


def table(results: list[dict[str, object]]) -> str:
    lines = [f"{'quantized':<42} {'loss':>9} {'|d logp|':>9} {'top-1':>7}"]
    lines += [
        f"{r['quantized']:<42} {r['loss_change']:>+9.5f} {r['mean_abs_logprob_change']:>9.4f} {r['top1_agreement']:>7.2%}"
        for r in results
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    study(
        "error_parts.py",
        "Measure what the quantization of each part of attention costs.",
        "predictions against those of exact attention",
        {"embedded model": costs},
        table,
        tokens=WINDOWS * TOKENS,
    )
