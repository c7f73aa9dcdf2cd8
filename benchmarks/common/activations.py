# SPDX-License-Identifier: Apache-2.0
"""Queries, keys and values for the studies: those of the embedded model, and random ones with outliers."""

import math
from collections.abc import Callable

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from sage_backend.demo import HELDOUT, MODEL_DIR
from sage_backend.demo.llama import Attention, Llama, Shape, rotate

TOKENS, HEAD_DIM = 2047, 128
Heads = tuple[Tensor, Tensor, Tensor]
"""Queries [heads, tokens, HEAD_DIM], keys and values [kv_heads, tokens, HEAD_DIM] of a layer, rotated, float32."""


def load_model() -> tuple[Llama, Tokenizer]:
    """The embedded model, in float32, and its tokenizer."""
    model = Llama(Shape()).eval()
    weights = load_file(MODEL_DIR / "model.safetensors")
    model.load_state_dict({name.removeprefix("model."): w.float() for name, w in weights.items()}, strict=False)
    return model, Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))


def heads_of(module: Attention, x: Tensor, cos: Tensor, sin: Tensor) -> Heads:
    """The queries, keys and values of a layer of the model, for one window. Arguments as for `Attention.forward`."""
    q, k, v = (
        projection(x)[0].unflatten(-1, (-1, HEAD_DIM)).transpose(0, 1)
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def model_activations() -> list[Heads]:
    """Queries, keys and values of the embedded model's four layers, on a window of held-out text."""
    model, tokenizer = load_model()
    layers: list[Heads] = []

    def keep(module: Attention, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        layers.append(heads_of(module, *inputs))

    for layer in model.layers:
        layer.self_attn.register_forward_hook(keep)
    ids = tokenizer.encode(HELDOUT.read_text(encoding="utf-8")).ids
    model(torch.tensor(ids[:TOKENS])[None])
    return layers


def random_activations() -> list[Heads]:
    """Normal data. Keys of one token in 50 are ten times as large, and 8 is added to every 17th channel of all keys."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(heads, TOKENS, HEAD_DIM, generator=g) for heads in (4, 2, 2))
    k *= torch.where(torch.rand(2, TOKENS, 1, generator=g) < 0.02, 10.0, 1.0)
    k[..., ::17] += 8
    return [(q, k, v)]


ANCHORS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda k: torch.zeros_like(k[:, :1]),
    "first tokens": lambda k: k[:, :32].mean(1, keepdim=True),
    "whole text": lambda k: k.mean(1, keepdim=True),
}
"""Vectors that may be subtracted from all keys of a head: float32 [kv_heads, 1, HEAD_DIM]."""


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Exact causal attention, for [heads, TOKENS, HEAD_DIM] and [kv_heads, TOKENS, HEAD_DIM]."""
    k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
    hidden = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    return torch.softmax((q @ k.mT / math.sqrt(HEAD_DIM)).masked_fill(hidden, float("-inf")), -1) @ v
