# SPDX-License-Identifier: Apache-2.0
"""The demonstration model for training: a Llama in plain torch, with outlier channels in its biases.

Parameters have the names that `transformers` gives them, and the arithmetic is the same.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DROPOUT = 0.1  # the corpus is read dozens of times

# Bias entries, by channel of a head. They are set at the start and never trained. Qwen2 has similar ones: a few key channels
# have a large offset that is the same for all tokens, and sets the scale of a quantized group. RoPE rotates channels c and
# c + 64 as a pair. Pairs 59 to 63 rotate by less than half a radian in 2048 tokens, which keeps most of the offset. Queries
# and keys use different pairs: a product of two offsets would be a large logit that depends on distance alone.
OUTLIERS: dict[str, dict[int, float]] = {
    "q_proj": {62: 3.0, 60 + 64: -3.0},
    "k_proj": {63: 20.0, 61 + 64: -19.0, 59: 21.0},
    "v_proj": {17: 2.0, 90: -2.0},
}


@dataclass(frozen=True)
class Shape:
    """Dimensions of the model: 4.98 million parameters, 10 MB in bf16."""

    vocab: int = 4096
    context: int = 2048
    hidden: int = 256
    layers: int = 4
    query_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 128
    intermediate: int = 768
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6


LARGE = Shape(hidden=512, layers=5, query_heads=8, kv_heads=4, intermediate=1536)
"""A larger model of the same kind, with 21.8 million parameters. Nothing was tuned on it, so it makes a fair test."""


def rotary_tables(shape: Shape) -> tuple[Tensor, Tensor]:
    """Cosines and sines of RoPE, each (context, head_dim), in Llama's half-split layout."""
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    angles = torch.outer(torch.arange(shape.context, dtype=torch.float32), shape.rope_theta**-exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to x (..., tokens, head_dim), in float32 like the tables."""
    left, right = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-right, left), dim=-1) * sin).to(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square normalization in float32."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape.hidden))
        self.eps = shape.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        """x and the result: (..., hidden)."""
        wide = x.float()
        return (self.weight * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention with biases on all four projections."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        query_width, kv_width = shape.query_heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, query_width)
        self.k_proj = nn.Linear(shape.hidden, kv_width)
        self.v_proj = nn.Linear(shape.hidden, kv_width)
        self.o_proj = nn.Linear(query_width, shape.hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x and the result: (batch, tokens, hidden)."""
        batch, tokens, _ = x.shape
        q, k, v = (
            projection(x).view(batch, tokens, -1, self.shape.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        # Repeating the heads costs little here, and every fused attention kernel accepts the result.
        k, v = (t.repeat_interleave(self.shape.query_heads // self.shape.kv_heads, dim=1) for t in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, tokens, -1))
        return out


class MLP(nn.Module):
    """Gated feed-forward layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x and the result: (..., hidden)."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = MLP(shape)
        self.input_layernorm = RMSNorm(shape)
        self.post_attention_layernorm = RMSNorm(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x and the result: (batch, tokens, hidden)."""
        x = x + F.dropout(self.self_attn(self.input_layernorm(x), cos, sin), DROPOUT, self.training)
        return x + F.dropout(self.mlp(self.post_attention_layernorm(x)), DROPOUT, self.training)


class Llama(nn.Module):
    """The decoder, with the parameter names of Hugging Face's LlamaModel and a head tied to the embedding."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape)
        cos, sin = rotary_tables(shape)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._initialize(shape)

    def _initialize(self, shape: Shape) -> None:
        """Draw the weights (smaller ones where a layer writes to the residual stream), and set the outliers."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                writes_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 / math.sqrt(2 * shape.layers) if writes_residual else 0.02
                nn.init.normal_(parameter, std=std)
        for bias, offsets in outlier_biases(self, shape):
            bias.data += offsets

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (batch, tokens, vocabulary) for ids (batch, tokens)."""
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        x = F.dropout(self.embed_tokens(ids), DROPOUT, self.training)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.linear(self.norm(x), self.embed_tokens.weight)


def outlier_biases(model: Llama, shape: Shape) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Each bias that carries outliers, with its offsets: zero in the entries that are trained."""
    for name, bias in model.named_parameters():
        projection, _, kind = name.rpartition(".")
        channels = OUTLIERS.get(projection.rpartition(".")[2])
        if kind != "bias" or channels is None:
            continue
        offsets = torch.zeros(len(bias) // shape.head_dim, shape.head_dim)
        for channel, value in channels.items():
            offsets[::2, channel], offsets[1::2, channel] = value, -value
        yield bias, offsets.flatten().to(bias.device)


def weighted_loss(model: Llama, ids: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of the cross-entropy, in nats: ids (batch, tokens + 1), weights (batch, tokens)."""
    logits = model(ids[:, :-1])
    losses = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


def largest_biases(model: Llama) -> list[dict[str, float]]:
    """For each layer, the largest absolute bias of queries, keys and values."""
    return [
        {name[0]: layer.get_parameter(f"self_attn.{name}.bias").abs().max().item() for name in OUTLIERS}
        for layer in model.layers
    ]
