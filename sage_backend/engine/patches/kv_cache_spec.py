# SPDX-License-Identifier: Apache-2.0
"""Gives each layer pages with the precision of keys and values that a calibration has chosen for it.

What: adds `get_kv_cache_spec` to `WorkerWrapperBase`, in front of the worker's own.
Why: vLLM asks a backend for the bytes of a token (`customize_spec`) without saying of which layer. Here layers have names.
Releases: 0.31 to 0.33.
Remove when: `customize_spec` gets the layer's name.
"""

import functools
from dataclasses import replace
from typing import Any

from sage_backend import options
from sage_backend.engine.patches.target import wrap_worker_method
from sage_backend.features import calibration_file
from sage_backend.features.layers import own_impls


@functools.cache
def apply() -> None:
    wrap_worker_method(__name__, "get_kv_cache_spec", _per_layer)


def _per_layer(get: Any) -> Any:
    def get_kv_cache_spec(self: Any) -> Any:
        specs = get(self)
        impls = own_impls(self.vllm_config)
        return choose_pages(specs, self.vllm_config, impls) if impls else specs

    return get_kv_cache_spec


def choose_pages(specs: dict[str, Any], config: Any, impls: dict[str, Any]) -> dict[str, Any]:
    """A worker's KV cache specs (AttentionSpec), by layer, with the sizes of the pages that the calibration has chosen.

    Sets `layout` of the layers concerned. config: VllmConfig; impls: this backend's layers (`own_impls`). Raises ValueError
    for a damaged calibration.
    """
    file = options.current().calibration
    bits = calibration_file.layer_bits(file) if file is not None else {}
    layers = config.compilation_config.static_forward_context
    for name, impl in impls.items():
        owner = getattr(layers[name], "kv_sharing_target_layer_name", None) or name
        if owner in bits:
            impl.layout = options.current().layout(impl.head_size, **bits[owner])
            if name in specs:
                specs[name] = replace(specs[name], state_content_bytes=impl.layout.bytes_per_token)
    return specs
