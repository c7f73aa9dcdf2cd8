# SPDX-License-Identifier: Apache-2.0
"""The models of an engine, and those of their layers that this backend serves."""

from typing import Any

from sage_backend import BACKEND


def own_impls(config: Any) -> dict[str, Any]:
    """This backend's attention layers in a worker: by vLLM's name, each layer's SageImpl. config: the worker's VllmConfig.

    Layers are recognized by an attribute, so that SageImpl, and with it vLLM's attention, is not imported where it is not used.
    """
    layers = config.compilation_config.static_forward_context
    impls = {name: getattr(layer, "impl", None) for name, layer in layers.items()}
    return {name: impl for name, impl in impls.items() if getattr(impl, "backend", None) == BACKEND}


def models(worker: Any) -> list[Any]:
    """A worker's model, and its drafter's if that is one too."""
    runner = worker.model_runner
    drafter = getattr(runner, "drafter", None) or getattr(runner, "speculator", None)
    drafting = getattr(drafter, "model", None)
    return [worker.get_model(), *([] if drafting is None else [drafting])]


def of_drafter(worker: Any) -> list[str]:
    """The names of this backend's layers that are not of a worker's model, but of its drafter."""
    config = worker.vllm_config
    layers, own = config.compilation_config.static_forward_context, {id(module) for module in worker.get_model().modules()}
    return [name for name in own_impls(config) if id(layers[name]) not in own]


def modules_beside(worker: Any) -> dict[str, Any]:
    """By layer of this backend, the module of a model that has it, or None: usually the model's own attention module, with
    projections and rotary positions."""
    config = worker.vllm_config
    beside = {id(layer): parent for model in models(worker) for parent in model.modules() for layer in parent.children()}
    layers = config.compilation_config.static_forward_context
    return {name: beside.get(id(layers[name])) for name in own_impls(config)}
