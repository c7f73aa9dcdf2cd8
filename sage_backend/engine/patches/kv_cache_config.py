# SPDX-License-Identifier: Apache-2.0
"""Exports how many bytes a token takes.

What: wraps `WorkerWrapperBase.initialize_from_config`.
Why: layers of other backends and padded pages share the cache. Only vLLM's KVCacheConfig knows of all of them, and a backend is
    not given it.
Releases: 0.31 to 0.33.
Remove when: metadata builders get the KVCacheConfig, or vLLM exports the bytes of a token.
"""

import functools
from typing import Any

from sage_backend.engine import checks
from sage_backend.engine.patches.target import find, wrap
from sage_backend.observability.recorder import recorder


@functools.cache
def apply() -> None:
    wrapper = find(__name__, "vllm.v1.worker.worker_base", "WorkerWrapperBase")
    wrap(__name__, wrapper, "initialize_from_config", _recorded)


def _recorded(initialize: Any) -> Any:
    def initialize_and_record(self: Any, kv_cache_configs: list[Any]) -> None:
        initialize(self, kv_cache_configs)
        if checks.is_chosen(self.vllm_config) and (record := recorder(self.vllm_config)) is not None:
            record.set_cache(kv_cache_configs[self.global_rank])

    return initialize_and_record
