#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Codes for keys: the error of attention against the bytes of a key, for every combination of an anchor, a transformation and a
code, on activations of the embedded model and on random ones with outliers.

    python3 benchmarks/studies/key_codes.py --out benchmarks/results/key-codes.json

All codes are token-local: a token's code depends on that token and on constants of its layer. Queries are INT8 per token,
values and probabilities exact, so that codes differ only in the error of keys. Plain torch on a CPU; takes some minutes.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/, where common/ is

import torch
from common.activations import ANCHORS, HEAD_DIM, TOKENS, Heads, attention, model_activations, random_activations
from common.study import study
from torch import Tensor

from sage_kernels.reference import quantize_k

SCALE_BYTES = 4

# --- transformations of queries and keys that do not change their products --------------------------------------------------


def hadamard(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    matrix = torch.ones(1, 1)
    while len(matrix) < HEAD_DIM:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    signs = torch.randint(0, 2, (HEAD_DIM,), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    rotation = signs[:, None] * matrix / math.sqrt(HEAD_DIM)
    return q @ rotation, k @ rotation


def equalized(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Keys divided, and queries multiplied, in each channel by the root of the ratio of the text's largest key and query."""
    group = len(q) // len(k)
    q_max = q.unflatten(0, (len(k), group)).abs().amax((1, 2))[:, None]
    factor = (k.abs().amax(1, keepdim=True).clamp_min(1e-3) / q_max).sqrt()
    return q * factor.repeat_interleave(group, 0), k / factor


TRANSFORMS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "none": lambda q, k: (q, k),
    "Hadamard": hadamard,
    "equalized": equalized,
}

# --- codes ------------------------------------------------------------------------------------------------------------------


def symmetric(x: Tensor, largest: int, clip: float = 1.0) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) * clip / largest
    return (x / scale).round().clamp(-largest, largest) * scale


def asymmetric(x: Tensor, levels: int) -> Tensor:
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    step = ((high - low) / (levels - 1)).clamp_min(1e-12)
    return ((x - low) / step).round() * step + low


def best_clip(x: Tensor, largest: int) -> Tensor:
    """For each token, the clipping that leaves the least squared error."""
    tried = torch.stack([symmetric(x, largest, clip) for clip in (1, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)])
    best = (tried - x).square().sum(-1).argmin(0)
    return torch.take_along_dim(tried, best[None, ..., None], 0)[0]


def grouped(code: Callable[[Tensor], Tensor], groups: int) -> Callable[[Tensor], Tensor]:
    return lambda x: code(x.unflatten(-1, (groups, -1))).flatten(-2)


def int4(x: Tensor) -> Tensor:
    return symmetric(x, 7)


def uint4(x: Tensor) -> Tensor:
    return asymmetric(x, 16)


def mixed(x: Tensor, channels: int = 16) -> Tensor:
    """The channels that are largest over the text in INT8, the others in two groups of 16 levels."""
    by_size = x.square().mean(1, keepdim=True).argsort(-1, descending=True)
    ordered = x.gather(-1, by_size.expand_as(x))
    coded = torch.cat([symmetric(ordered[..., :channels], 127), grouped(uint4, 2)(ordered[..., channels:])], -1)
    return torch.empty_like(x).scatter_(-1, by_size.expand_as(x), coded)


def in_use(x: Tensor) -> Tensor:
    codes, scale = quantize_k(x, 4)
    return codes * scale[..., None]


CODES: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    "INT8": (HEAD_DIM + SCALE_BYTES, lambda x: symmetric(x, 127)),
    "INT4": (HEAD_DIM / 2 + SCALE_BYTES, int4),
    "INT4, clipped": (HEAD_DIM / 2 + SCALE_BYTES, lambda x: best_clip(x, 7)),
    "INT4, asymmetric": (HEAD_DIM / 2 + SCALE_BYTES, uint4),
    "INT4, 2 groups": (HEAD_DIM / 2 + SCALE_BYTES, grouped(int4, 2)),
    "INT4, 2 groups, asymmetric": (HEAD_DIM / 2 + 2 * SCALE_BYTES, grouped(uint4, 2)),
    "INT4, 4 groups": (HEAD_DIM / 2 + 2 * SCALE_BYTES, grouped(int4, 4)),
    "INT4, 4 groups, asymmetric": (HEAD_DIM / 2 + 4 * SCALE_BYTES, grouped(uint4, 4)),
    "INT4, 8 groups": (HEAD_DIM / 2 + 4 * SCALE_BYTES, grouped(int4, 8)),
    "INT4 of INT8, 8 groups": (HEAD_DIM / 2 + 16 + SCALE_BYTES, in_use),
    "INT4 (2, a.), 16 in INT8": (HEAD_DIM / 2 + 8 + 2.5 * SCALE_BYTES, mixed),
    "INT5": (HEAD_DIM * 5 / 8 + SCALE_BYTES, lambda x: symmetric(x, 15)),
    "INT5, 2 groups, asymmetric": (HEAD_DIM * 5 / 8 + 2 * SCALE_BYTES, grouped(lambda x: asymmetric(x, 32), 2)),
}
"""Bytes of a key of one head, and the code. One scale is float32; several, and those with zero points, are bfloat16.
`INT4 of INT8, 8 groups` is what INT4 pages hold."""


def errors(layers: list[Heads]) -> list[dict[str, object]]:
    """The relative L2 error of attention's output, as mean over the layers, of every combination."""
    expected = [attention(*layer) for layer in layers]
    results: list[dict[str, object]] = []
    for code_name, (size, code) in CODES.items():
        for anchor_name, anchor in ANCHORS.items():
            for transform_name, transform in TRANSFORMS.items():
                found = []
                for (q, k, v), exact in zip(layers, expected, strict=True):
                    new_q, new_k = transform(q, k - anchor(k))
                    out = attention(symmetric(new_q, 127), code(new_k), v)
                    found.append(float((out - exact).norm() / exact.norm()))
                error = round(sum(found) / len(found), 5)
                combination = {"code": code_name, "anchor": anchor_name, "transform": transform_name}
                results.append({**combination, "key_bytes": size, "error": error})
    return results


def table(results: list[dict[str, object]]) -> str:
    columns = [(anchor, transform) for anchor in ANCHORS for transform in TRANSFORMS]
    error = {(r["code"], r["anchor"], r["transform"]): r["error"] for r in results}
    lines = [f"{'':<27} bytes " + " ".join(f"{anchor:>12}" for anchor, _ in columns)]
    lines.append(" " * 34 + " ".join(f"{transform:>12}" for _, transform in columns))
    for code, (size, _) in CODES.items():
        lines.append(f"{code:<27} {size:>5.0f} " + " ".join(f"{error[code, *column]:>12.4f}" for column in columns))
    return "\n".join(lines)


if __name__ == "__main__":
    study(
        "key_codes.py",
        "Compare codes for keys.",
        "relative error of attention, by anchor (first line) and transformation (second)",
        {"embedded model": lambda: errors(model_activations()), "random": lambda: errors(random_activations())},
        table,
        tokens=TOKENS,
    )
