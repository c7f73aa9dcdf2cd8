# SPDX-License-Identifier: Apache-2.0
"""RoPE frequencies of a model, for pages that are read at other positions than their own (`extrapolate`)."""

import functools
from typing import Any

import torch

from sage_kernels import reference

_KNOWN = ("RotaryEmbedding", "Llama3RotaryEmbedding")
"""vLLM's rotary embeddings whose angles are frequency times position, whatever the length of the context."""
_ROPE_TYPES = ("default", "llama3")


def check(model_config: Any) -> None:
    """Raises ValueError, in one line, for a model (ModelConfig) whose configuration names another form of RoPE."""
    rope = getattr(model_config.hf_text_config, "rope_parameters", None) or {}
    form = rope.get("rope_type", "default")
    if "mrope_section" in rope:
        form = "mrope"
    elif rope.get("partial_rotary_factor", 1.0) != 1.0:
        form = "partial"
    if form not in _ROPE_TYPES:
        raise ValueError(_refusal(model_config.model, f"of the form {form!r}"))


def _refusal(model: str, positions: str) -> str:
    return (
        f'"extrapolate" in option "memory" cannot serve {model}: its rotary positions are {positions}, and only those of the '
        f"forms {' and '.join(map(repr, _ROPE_TYPES))}, over whole heads in halves, can be changed; leave it out"
    )


def find_frequencies(model: torch.nn.Module, config: Any) -> None:
    """Give the layers of this backend that rotate pages their model's RoPE frequencies. config: VllmConfig.

    Raises ValueError for a model whose attention has rotary embeddings of another form.
    """
    for name, layer in config.compilation_config.static_forward_context.items():
        impl: Any = getattr(layer, "impl", None)
        if not getattr(impl, "rotates_pages", False):
            continue
        try:
            rotary: Any = model.get_submodule(name.rpartition(".")[0]).get_submodule("rotary_emb")
        except AttributeError:
            raise ValueError(_refusal(config.model_config.model, f"not found beside {name}")) from None
        form = type(rotary).__name__
        if form not in _KNOWN or not rotary.is_neox_style or rotary.rotary_dim != impl.head_size:
            raise ValueError(_refusal(config.model_config.model, f"of the form {form!r}"))
        impl.frequencies = tuple(rotary._compute_inv_freq(rotary.base).tolist())
        impl.max_pages = -(-config.model_config.max_model_len // impl.layout.tokens) + 1


@functools.cache
def rope_shift_table(
    frequencies: tuple[float, ...], max_pages: int, page_tokens: int, device: torch.device
) -> torch.Tensor:
    """`reference.rope_shift_table`, computed once for all layers."""
    return reference.rope_shift_table(torch.tensor(frequencies), max_pages, page_tokens).to(device)
