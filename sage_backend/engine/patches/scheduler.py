# SPDX-License-Identifier: Apache-2.0
"""Gives requests their compression ratio, ends chunks of prompts between groups, and has block hashes tell how tokens are read.

What: wraps `Scheduler.__init__`; with the option `variator`, replaces the new scheduler's `_get_local_prefix_cache_hit` and
    `_mamba_block_aligned_split`.
Why: a request gets its ratio when it first asks for KV blocks, where the load is known, and with what the prefix cache has
    under each ratio.
    Chunks have to end between groups. Models that can have plugins have no Mamba layers, whose split is free for that.
Releases: 0.31 to 0.33.
Remove when: vLLM has hooks for the admission of a request and for the size of its next chunk.
"""

import copy
import functools
from collections.abc import Sequence
from typing import Any

from sage_backend.engine import checks
from sage_backend.engine.patches import block_hash
from sage_backend.engine.patches.target import attribute, find, wrap
from sage_backend.options import VariatorOptions
from sage_backend.variator import admission
from sage_backend.variator.groups import PLAIN, clip


@functools.cache
def apply() -> None:
    wrap(__name__, find(__name__, "vllm.v1.core.sched.scheduler", "Scheduler"), "__init__", _attached)


def _attached(init: Any) -> Any:
    def init_and_attach(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        if checks.request_topk(vllm_config) is not None:
            block_hash.apply()  # before a KV connector, which the scheduler makes, takes vLLM's function
        init(self, vllm_config, *args, **kwargs)
        if found := checks.compression(vllm_config):
            attach(self, *found)

    return init_and_attach


def attach(scheduler: Any, options: VariatorOptions, ratios: Sequence[int]) -> None:
    """Have vLLM's scheduler give every request a ratio. ratios: those that there are plugins for."""
    block_hash.apply()
    policy = admission.Policy(options.choices(ratios), options.waiting, options.kv_use)

    def admitting(lookup: Any) -> Any:
        def admit(request: Any, *limits: Any) -> Any:  # 0.33 passes one
            if (plan := getattr(request, admission.PLAN_KEY, None)) is None:
                _, waiting = scheduler.get_request_counts()
                ratio = policy.choose(waiting - 1, scheduler.get_kv_cache_usage())
                # Without hashes, the request does not use the prefix cache, and the greatest ratio leaves the least work.
                candidates = policy.allowed if request.block_hashes else [ratio]
                plan = admission.admit_with_least_work(request, candidates, options.tail, lambda: lookup(request, *limits)[1])
            if request.sampling_params is not None:
                # Requests of one call may share their parameters, and a session's next prompt brings new ones.
                request.sampling_params = copy.copy(request.sampling_params)
                extra_args = request.sampling_params.extra_args or {}
                request.sampling_params.extra_args = {**extra_args, admission.PLAN_KEY: list(plan)}
            return lookup(request, *limits)

        return admit

    def split(request: Any, tokens: int, local: int = 0, external: int = 0) -> int:
        return clip(tokens, request.num_computed_tokens + local + external, getattr(request, admission.PLAN_KEY, PLAIN))

    wrap(__name__, scheduler, "_get_local_prefix_cache_hit", admitting)
    for name in ("need_mamba_block_aligned_split", "_mamba_block_aligned_split"):
        attribute(__name__, scheduler, name)
    scheduler.need_mamba_block_aligned_split = True
    scheduler._mamba_block_aligned_split = split
