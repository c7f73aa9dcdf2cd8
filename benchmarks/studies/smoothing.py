#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What smoothing of K, Q and V gains: the error of attention's output with each on and off, for INT8 and INT4 keys, on
activations of the embedded model and on random ones with biases in all three.

    python3 benchmarks/studies/smoothing.py --out benchmarks/results/smoothing.json

The arithmetic is that of `sage_kernels.reference`, P in e4m3 included. Smoothing is SageAttention2's, as far as pages that are
written once allow it:

- K: an anchor of the layer and head is subtracted.
- Q: the mean of a block is subtracted, and its products with the keys are added to the logits. A block is the tokens of a tile
  of the portable prefill kernel.
- V: an anchor is subtracted, as from K, and added to the output again: the weights of a row sum to 1.

The engine smooths K, V where a calibration has an anchor for it, and Q with the option smooth_q (docs/developer/arithmetic.md).

Plain torch on a CPU; takes a minute or two.
"""

import itertools
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/, where common/ is

import torch
from common.activations import ANCHORS, HEAD_DIM, TOKENS, Heads, attention, model_activations, random_activations
from common.study import study
from torch import Tensor

from sage_kernels.reference import LOG2E, qk_product, quantize_k, quantize_p, quantize_v, query_terms, tile_tokens
from sage_paged import K_BITS, PAGE_TOKENS

SMOOTHED = ("none", "whole text")


def biased_activations() -> list[Heads]:
    [(q, k, v)] = random_activations()
    q[..., 5::17] += 4
    v[..., 3::17] += 4
    return [(q, k, v)]


def quantized_attention(q: Tensor, k: Tensor, v: Tensor, k_bits: int, k_anchor: str, smooth_q: bool, v_anchor: str) -> Tensor:
    group = len(q) // len(k)
    common = ANCHORS[v_anchor](v)
    k_codes, k_scale = quantize_k(k - ANCHORS[k_anchor](k), k_bits)
    v_codes, v_exponent = quantize_v(v - common, k_bits == 8)
    k_codes, k_scale, v_codes, v_exponent, common = (
        x.repeat_interleave(group, 0) for x in (k_codes, k_scale, v_codes.float(), v_exponent, common)
    )
    terms = query_terms(q, LOG2E / math.sqrt(HEAD_DIM), tile_tokens(group) if smooth_q else 0)
    logits = qk_product(terms, k_codes, k_scale)
    logits.masked_fill_(torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1), float("-inf"))
    p8, _ = quantize_p(logits + v_exponent[:, None], max(PAGE_TOKENS))
    return p8 @ v_codes / (p8 * (-v_exponent).exp2()[:, None]).sum(-1, keepdim=True) + common


def errors(layers: list[Heads]) -> list[dict[str, object]]:
    """The relative L2 error of attention's output, as mean over the layers, of every combination."""
    expected = [attention(*layer) for layer in layers]
    results: list[dict[str, object]] = []
    for k_bits, k_anchor, smooth_q, v_anchor in itertools.product(reversed(K_BITS), SMOOTHED, (False, True), SMOOTHED):
        found = []
        for layer, exact in zip(layers, expected, strict=True):
            out = quantized_attention(*layer, k_bits, k_anchor, smooth_q, v_anchor)
            found.append(float((out - exact).norm() / exact.norm()))
        combination = {"k_bits": k_bits, "K": k_anchor, "Q": smooth_q, "V": v_anchor}
        results.append({**combination, "error": round(sum(found) / len(found), 5)})
    return results


def table(results: list[dict[str, object]]) -> str:
    error = {(r["k_bits"], r["K"], r["Q"], r["V"]): r["error"] for r in results}
    columns = list(itertools.product((False, True), SMOOTHED))
    lines = [f"{'Q smoothed':<22} " + " ".join(f"{'yes' if q else 'no':>12}" for q, _ in columns)]
    lines.append(f"{'V less':<22} " + " ".join(f"{v:>12}" for _, v in columns))
    for k_bits, k in itertools.product(reversed(K_BITS), SMOOTHED):
        name = f"K INT{k_bits} less {k}"
        lines.append(f"{name:<22} " + " ".join(f"{error[k_bits, k, *column]:>12.4f}" for column in columns))
    return "\n".join(lines)


if __name__ == "__main__":
    study(
        "smoothing.py",
        "Measure what smoothing of K, Q and V gains.",
        "relative error of attention, by what is smoothed",
        {"embedded model": lambda: errors(model_activations()), "random": lambda: errors(biased_activations())},
        table,
        tokens=TOKENS,
    )
