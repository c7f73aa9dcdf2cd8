# SPDX-License-Identifier: Apache-2.0
"""Serves checkpoints that declare a quantized KV cache as if they declared none.

What: wraps `EngineArgs.create_model_config`; in workers, `_init_kv_cache_quant` of attention layers.
Why: vLLM turns a checkpoint's declaration into a cache dtype before it asks a backend, as if the user had asked for it, and
    loads the scales of keys and values that come with it. Both concern vLLM's own caches; pages have their own format.
Releases: 0.31 to 0.33.
Remove when: a backend with a page format of its own can tell vLLM to keep the cache dtype at `auto`.
"""

import functools
import logging
from typing import Any

import torch

from sage_backend import BACKEND
from sage_backend.engine import checks
from sage_backend.engine.patches.target import find, wrap

logger = logging.getLogger(__name__)

_ATTENTION = "vllm.model_executor.layers.attention.attention"
_DECLARATIONS = ("kv_cache_scheme", "kv_cache_quant_algo")
"""Keys of a checkpoint's quantization config: that of compressed-tensors and ModelOpt, and that of older ModelOpt."""


@functools.cache
def apply() -> None:
    wrap(__name__, find(__name__, "vllm.engine.arg_utils", "EngineArgs"), "create_model_config", _undeclared)


@functools.cache
def apply_in_worker() -> None:
    wrap(__name__, find(__name__, _ATTENTION), "_init_kv_cache_quant", _without_scales)


def _undeclared(create: Any) -> Any:
    def create_undeclared(self: Any) -> Any:
        model = create(self)
        if checks.is_chosen_by(self) and self.kv_cache_dtype in checks.UNQUANTIZED:
            drop(model)
        return model

    return create_undeclared


def drop(model: Any) -> None:
    """Take the declaration of a quantized KV cache out of a model's configuration (ModelConfig), and log it if there is one."""
    found = ""
    for config in (model.hf_config, model.hf_text_config):
        for name in ("quantization_config", "compression_config"):
            declared, without = _drop(getattr(config, name, None))
            if declared:
                setattr(config, name, without)
                found = declared
    if found:
        _tell(model.model, found)


@functools.cache  # a checkpoint may be the target and the drafter
def _tell(model: str, declared: str) -> None:
    logger.warning(
        "%s declares a quantized KV cache (%s); --attention-backend sage keeps its own pages, and does not use the "
        "checkpoint's scales of keys and values", model, declared,
    )  # fmt: skip


def _drop(section: Any) -> tuple[str, Any]:
    """The declaration in a section of a configuration, "" if there is none, and a copy of the section without it."""
    if not isinstance(section, dict):
        return "", section
    declared, without = "", dict(section)
    for key, value in section.items():
        if key in _DECLARATIONS and value:
            declared, without[key] = f"{key}: {value}", None  # the key stays: vLLM requires some
        elif key == "quantization":  # ModelOpt's own file nests the settings
            nested, without[key] = _drop(value)
            declared = declared or nested
    return declared, without


def _without_scales(init: Any) -> Any:
    def init_without_scales(layer: Any, *args: Any, **kwargs: Any) -> None:
        init(layer, *args, **kwargs)
        if getattr(layer.impl, "backend", None) == BACKEND:
            for scale in layer.parameters(recurse=False):
                scale.weight_loader = _ignore

    return init_without_scales


def _ignore(scale: torch.nn.Parameter, loaded: torch.Tensor) -> None:
    """Leave a scale as it is, whatever the checkpoint has: there can be one for each head."""
