# SPDX-License-Identifier: Apache-2.0
"""RoPE frequencies of a model: for calibration, which counts keys at further positions, and for pages that are read at other
positions than their own (`extrapolate`)."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from sage_backend.features.layers import modules_beside, own_impls
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
_ROPE_TYPES = ("default", "llama3", "linear", "yarn", "longrope")
"""The same in a model's configuration."""
_SWITCHES = ("use_rope", "_use_rope", "is_local_attention")
"""Attributes of attention modules in vLLM's models, each false where RoPE is not applied."""
_SWITCHES_OF_FULL_ATTENTION = ("apply_rope_all_layers", "v1", "force_rope")
"""The same in layers of full attention. With a sliding window, these models always apply it."""
_FARTHEST = 1 << 17
"""Most tokens of a context that a calibration is made for."""


def _only(factors: Any) -> float:
    """The only factor of linear scaling."""
    (factor,) = factors if isinstance(factors, (list, tuple)) else [factors]
    return float(factor)


def _rope_parameters(model_config: Any) -> dict[str, Any]:
    """Those of full attention, where layers have rotary embeddings by their type: the others read no recalled pages."""
    rope = getattr(model_config.hf_text_config, "rope_parameters", None) or {}
    return dict(rope.get("full_attention", rope))


def check(model_config: Any) -> None:
    """Raises ValueError, in one line, for a model (ModelConfig) whose configuration names another form of RoPE for full
    attention."""
    rope = _rope_parameters(model_config)
    form = rope.get("rope_type", "default")
    if "mrope_section" in rope:
        form = "mrope"
    elif rope.get("use_fope"):
        form = "fope"
    elif rope.get("partial_rotary_factor", 1.0) != 1.0:
        form = "partial"
    if form not in _ROPE_TYPES:
        raise ValueError(_refusal(model_config.model, f"of the form {form!r}"))


def takes_long_factors(model_config: Any, max_model_len: int) -> bool:
    """Whether rotary positions of the form `longrope` take their long factors: vLLM does so for all contexts of an engine, if
    its max_model_len is past the length that the model (ModelConfig) was trained with."""
    rope = _rope_parameters(model_config)
    return rope.get("rope_type") == "longrope" and max_model_len > rope["original_max_position_embeddings"]


def _refusal(model: str, positions: str) -> str:
    return (
        f'"extrapolate" in option "memory" cannot serve {model}: its rotary positions are {positions}, and only those of the '
        f"forms {', '.join(map(repr, _ROPE_TYPES))}, over whole heads in halves, can be changed; leave it out"
    )


def context(model_config: Any) -> int:
    """Tokens of the contexts that keys are calibrated for: those that the model (ModelConfig) was trained with, at most
    `_FARTHEST`. 0 if its configuration has no such number.

    Not --max-model-len, so that servers with different lengths quantize alike, if not for `takes_long_factors`. And without the
    factor of linear scaling: in some configurations, the number has it already.
    """
    longest, _ = model_config.model_arch_config.derived_max_model_len_and_key
    return int(min(longest, _FARTHEST)) if longest < math.inf else 0


class Rope(NamedTuple):
    """The rotary positions of a layer. form: vLLM's class of them; empty if none was found next to the layer. frequencies: of
    each RoPE pair, in radians a position; zeros where no RoPE is applied; None for a form that is not known."""

    form: str
    frequencies: tuple[float, ...] | None


def ropes(worker: Any) -> dict[str, Rope]:
    """The rotary positions of this backend's layers in a worker, by vLLM's name."""
    impls = own_impls(worker.vllm_config)
    return {name: _rope(attention, impls[name]) for name, attention in modules_beside(worker).items()}


def _rope(attention: Any, impl: Any) -> Rope:
    """The rotary positions of a layer (SageImpl) by the module of the model that has it, if there is one."""
    if not hasattr(attention, "rotary_emb"):
        return Rope("", None)
    rotary = attention.rotary_emb
    switches = _SWITCHES if impl.window else _SWITCHES + _SWITCHES_OF_FULL_ATTENTION
    form = type(rotary).__name__
    if rotary is None or not all(getattr(attention, switch, True) for switch in switches):
        return Rope(form, (0.0,) * (impl.head_size // 2))
    in_halves = getattr(rotary, "is_neox_style", True)  # vLLM's longrope has no other style, and does not say so
    if form not in _FREQUENCIES or not in_halves or rotary.rotary_dim != impl.head_size:
        return Rope(form, None)
    return Rope(form, tuple(_FREQUENCIES[form](rotary).tolist()))


def find_frequencies(worker: Any) -> None:
    """Give a worker's layers that rotate pages the RoPE frequencies of their models. Raises ValueError for a model whose
    attention has rotary embeddings of another form."""
    config = worker.vllm_config
    impls, model = own_impls(config), config.model_config
    for name, rope in ropes(worker).items():
        impl = impls[name]
        if impl.rotates_pages:
            if rope.frequencies is None:
                found = f"of the form {rope.form!r}" if rope.form else f"not found next to {name}"
                raise ValueError(_refusal(model.model, found))
            impl.frequencies = rope.frequencies
            impl.max_pages = -(-model.max_model_len // impl.layout.tokens) + 1


@functools.cache
def rope_shift_table(frequencies: tuple[float, ...], max_pages: int, page_tokens: int, device: torch.device) -> torch.Tensor:
    """`reference.rope_shift_table`, computed once for all layers."""
    return reference.rope_shift_table(torch.tensor(frequencies), max_pages, page_tokens).to(device)
