# SPDX-License-Identifier: Apache-2.0
"""The layers of an engine that this backend serves."""

from typing import Any

from sage_backend import BACKEND


def own_impls(config: Any) -> dict[str, Any]:
    """This backend's attention layers in a worker: by vLLM's name, each layer's SageImpl. config: the worker's VllmConfig.

    Layers are recognized by an attribute, so that SageImpl, and with it vLLM's attention, is not imported where it is not used.
    """
    layers = config.compilation_config.static_forward_context
    impls = {name: getattr(layer, "impl", None) for name, layer in layers.items()}
    return {name: impl for name, impl in impls.items() if getattr(impl, "backend", None) == BACKEND}
