# SPDX-License-Identifier: Apache-2.0
"""RoPE frequencies of a model, for pages that are read at other positions than their own (`extrapolate`)."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch

from sage_backend.features.layers import own_impls
from sage_kernels import reference

_FREQUENCIES: dict[str, Callable[[Any], torch.Tensor]] = {
    "RotaryEmbedding": lambda rotary: rotary._compute_inv_freq(rotary.base),
    "Llama3RotaryEmbedding": lambda rotary: rotary._compute_inv_freq(rotary.base),
    "LinearScalingRotaryEmbedding": lambda rotary: rotary._compute_inv_freq(rotary.base) / _only(rotary.scaling_factors),
    "YaRNScalingRotaryEmbedding": lambda rotary: rotary._compute_inv_freq(rotary.scaling_factor),
    # vLLM takes the long factors for all positions if --max-model-len is past the original length.
    "Phi3LongRoPEScaledRotaryEmbedding": lambda rotary: rotary._compute_inv_freq(
        rotary.long_factor if rotary.use_long_rope else rotary.short_factor
    ),
}
"""vLLM's rotary embeddings whose angles are frequency times position, whatever the length of the context. Some also scale
queries and keys, which makes no difference to rotations."""
_SWITCHES = ("use_rope", "_use_rope", "apply_rope_all_layers", "is_local_attention", "v1", "force_rope")
"""Attributes of attention modules in vLLM's models. In layers of full attention, each is false where RoPE is not applied."""
_ROPE_TYPES = ("default", "llama3", "linear", "yarn", "longrope")
"""The same in a model's configuration."""


def _only(factors: Any) -> float:
    """The only factor of linear scaling."""
    (factor,) = factors if isinstance(factors, (list, tuple)) else [factors]
    return float(factor)


def check(model_config: Any) -> None:
    """Raises ValueError, in one line, for a model (ModelConfig) whose configuration names another form of RoPE.

    Where layers have rotary embeddings by their type, only those of full attention count: the others read no recalled pages.
    """
    rope = getattr(model_config.hf_text_config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    form = rope.get("rope_type", "default")
    if "mrope_section" in rope:
        form = "mrope"
    elif rope.get("use_fope"):
        form = "fope"
    elif rope.get("partial_rotary_factor", 1.0) != 1.0:
        form = "partial"
    if form not in _ROPE_TYPES:
        raise ValueError(_refusal(model_config.model, f"of the form {form!r}"))


def _refusal(model: str, positions: str) -> str:
    return (
        f'"extrapolate" in option "memory" cannot serve {model}: its rotary positions are {positions}, and only those of the '
        f"forms {', '.join(map(repr, _ROPE_TYPES))}, over whole heads in halves, can be changed; leave it out"
    )


def find_frequencies(models: Iterable[torch.nn.Module], config: Any) -> None:
    """Give the layers of this backend that rotate pages the RoPE frequencies of their models.

    models: the model and its drafter, if that is a model; config: VllmConfig. Raises ValueError for a model whose attention has
    rotary embeddings of another form.
    """
    beside = {id(layer): parent for model in models for parent in model.modules() for layer in parent.children()}
    layers, max_tokens = config.compilation_config.static_forward_context, config.model_config.max_model_len
    for name, impl in own_impls(config).items():
        if impl.rotates_pages:
            attention = beside.get(id(layers[name]))
            if not hasattr(attention, "rotary_emb"):
                raise ValueError(_refusal(config.model_config.model, f"not found next to {name}"))
            impl.frequencies = _frequencies(attention, impl.head_size, config.model_config.model)
            impl.max_pages = -(-max_tokens // impl.layout.tokens) + 1


def _frequencies(attention: Any, head_size: int, model: str) -> tuple[float, ...]:
    """RoPE frequencies, radians a position, of a model's module with a layer of full attention; zeros where it applies no RoPE.

    Raises ValueError for those of another form.
    """
    rotary = attention.rotary_emb
    if rotary is None or not all(getattr(attention, switch, True) for switch in _SWITCHES):
        return (0.0,) * (head_size // 2)
    form = type(rotary).__name__
    in_halves = getattr(rotary, "is_neox_style", True)  # vLLM's longrope has no other style, and does not say so
    if form not in _FREQUENCIES or not in_halves or rotary.rotary_dim != head_size:
        raise ValueError(_refusal(model, f"of the form {form!r}"))
    return tuple(_FREQUENCIES[form](rotary).tolist())


@functools.cache
def rope_shift_table(frequencies: tuple[float, ...], max_pages: int, page_tokens: int, device: torch.device) -> torch.Tensor:
    """`reference.rope_shift_table`, computed once for all layers."""
    return reference.rope_shift_table(torch.tensor(frequencies), max_pages, page_tokens).to(device)
