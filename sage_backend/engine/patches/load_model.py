# SPDX-License-Identifier: Apache-2.0
"""Prepares a worker once its model is loaded: which layers are a drafter's, RoPE frequencies, compression plugins on FFNs, and
per-request top-k.

What: adds `load_model` to `WorkerWrapperBase`, in front of the worker's own.
Why: layers that read pages at other positions need the frequencies of the model's RoPE, the option `variator` replaces FFNs,
    and metrics are not of a drafter's layers: all need loaded modules, before anything is compiled or captured. A model runner
    tells of its requests from then on.
Releases: 0.31 to 0.33.
Remove when: vLLM calls plugins or the attention backend with a model that has been loaded.
"""

import functools
from typing import Any

from sage_backend.engine import checks
from sage_backend.engine.patches import cache_declaration, model_runner, nixl_handshake
from sage_backend.engine.patches.target import wrap_worker_method
from sage_backend.engine.request_topk import REQUEST_TOPK, RequestTopk
from sage_backend.features import positions
from sage_backend.features.layers import of_drafter, own_impls


@functools.cache
def apply() -> None:
    wrap_worker_method(__name__, "load_model", _prepared)


def _prepared(load: Any) -> Any:
    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        config = self.vllm_config
        if checks.is_chosen(config):
            cache_declaration.apply_in_worker()
            nixl_handshake.apply_for(config)
        load(self, *args, **kwargs)
        impls = own_impls(config)
        if impls and config.speculative_config is not None:
            for name in of_drafter(self.worker):
                impls[name].drafts = True
        if any(impl.rotates_pages for impl in impls.values()):
            positions.find_frequencies(self.worker)
        if (memory := checks.request_topk(config)) is not None:
            topk = config.compilation_config.static_forward_context[REQUEST_TOPK] = RequestTopk(memory)
            model_runner.apply(self.worker.model_runner, topk)
        if found := checks.compression(config):
            # Importing it registers a custom op and takes vLLM's compiler, which only engines with this option need.
            from sage_backend.variator import layers

            model_runner.apply(self.worker.model_runner, layers.attach(self.worker, config, *found))

    return load_model
