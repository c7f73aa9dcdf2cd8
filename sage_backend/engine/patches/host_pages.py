# SPDX-License-Identifier: Apache-2.0
"""Puts vLLM's pool of pages into host memory, with the option `host_gib` of memory.

What: wraps `determine_available_memory` and `initialize_from_config` of workers, and `allocate_kv_cache` in the modules of both
    model runners.
Why: vLLM sizes its pool by what is free on the GPU, and allocates it there.
Releases: 0.31 to 0.33.
Remove when: a backend can say how large the pool is and where it lies.
"""

import functools
import sys
from typing import Any

from sage_backend.engine import checks, host_pages
from sage_backend.engine.patches.target import find, wrap, wrap_worker_method

_RUNNERS = ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.attn_utils")
"""The modules that call `allocate_kv_cache`: of model runner V1, the CPU's included, and of V2."""


@functools.cache
def apply() -> None:
    wrap_worker_method(__name__, "determine_available_memory", _in_host_memory, in_base=False)
    wrapper = find(__name__, "vllm.v1.worker.worker_base", "WorkerWrapperBase")
    wrap(__name__, wrapper, "initialize_from_config", _with_caches)


def _has_host_pages(config: Any) -> bool:
    memory = checks.memory(config)
    return memory is not None and bool(memory.host_gib)


def _in_host_memory(determine: Any) -> Any:
    def determine_available_memory(self: Any) -> int:
        host_pages.forget()  # the plan of an engine of this process that did not start
        found: int = determine(self)
        if not _has_host_pages(self.vllm_config):
            return found
        _replace_allocation()
        return host_pages.plan(self.vllm_config, found)

    return determine_available_memory


def _replace_allocation() -> None:
    for module in _RUNNERS:
        if module in sys.modules:  # a worker has imported that of its runner, and a process's next worker may have the other
            _replace_in(module)


@functools.cache
def _replace_in(module: str) -> None:
    owner = find(__name__, module)
    wrap(__name__, owner, "allocate_kv_cache", lambda allocate: functools.partial(host_pages.allocate, allocate))


def _with_caches(initialize: Any) -> Any:
    def initialize_and_attach(self: Any, kv_cache_configs: list[Any]) -> None:
        initialize(self, kv_cache_configs)
        host_pages.attach(self.vllm_config)
        host_pages.forget()

    return initialize_and_attach
