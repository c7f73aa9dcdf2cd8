# SPDX-License-Identifier: Apache-2.0
"""Adds to the hash of a KV block how its tokens were read: the ratio and the number of tokens in groups, if it has groups, and
the number of recalled pages that its request asks for, if any.

What: wraps `generate_block_hash_extra_keys`, in the module that defines it and in the one that imports it by name.
Why: keys and values that were computed under one ratio, or from other pages, must not be found under another by the prefix
    cache.
Releases: 0.31 to 0.33.
Remove when: a request can bring extra keys per block, as it can a `cache_salt` for all of them.
"""

import functools
from typing import Any

from sage_backend.engine import request_topk
from sage_backend.engine.patches.target import find, wrap
from sage_backend.variator.admission import PLAN_KEY
from sage_backend.variator.groups import PLAIN, CompressionPlan

_FUNCTION = "generate_block_hash_extra_keys"


@functools.cache
def apply() -> None:
    wrap(__name__, find(__name__, "vllm.v1.core.kv_cache_utils"), _FUNCTION, _with_reading)
    wrap(__name__, find(__name__, "vllm.v1.core.block_pool"), _FUNCTION, _with_reading)


def _with_reading(generate: Any) -> Any:
    def extra_keys(request: Any, first: int, end: int, start_mm_idx: int) -> Any:
        keys, next_mm_idx = generate(request, first, end, start_mm_idx)
        plan: CompressionPlan = getattr(request, PLAN_KEY, PLAIN)
        first, end = plan.groups(first, end)
        if end > first:
            keys = (*(keys or ()), (PLAN_KEY, f"{plan.ratio}:{end - first}"))
        if (topk := request_topk.of_blocks(request)) is not None:
            keys = (*(keys or ()), (request_topk.TOPK_PAGES, str(topk)))
        return keys, next_mm_idx

    return extra_keys
