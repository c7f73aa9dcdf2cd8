# SPDX-License-Identifier: Apache-2.0
"""Keeps warm-up and dummy batches out of metrics and anchors.

What: adds `compile_or_warm_up_model` and `execute_dummy_batch` to `WorkerWrapperBase`, in front of the worker's own.
Why: the first tokens fix the anchor of keys, and on a GPU vLLM warms up with requests that look like those of users. Dummy
    batches, which keep idle data parallel engines in step with the others, look like them, too.
Releases: 0.32.0.
Remove when: an attention backend can see that a batch is a dummy one.
"""

import functools
from typing import Any

from sage_backend.engine.patches.target import replace_in_worker
from sage_backend.features.layers import own_impls
from sage_backend.observability import recorder


@functools.cache
def apply() -> None:
    replace_in_worker(__name__, "compile_or_warm_up_model", _warm_up)
    replace_in_worker(__name__, "execute_dummy_batch", _paused, in_base=False)


def _warm_up(warm_up: Any) -> Any:
    """Forget the anchors that the warm-up has fixed. Counting begins when it ends."""

    def compile_or_warm_up_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        with recorder.paused():
            times = warm_up(self, *args, **kwargs)
        for impl in own_impls(self.vllm_config).values():
            impl.forget_anchor()
        return times

    return compile_or_warm_up_model


def _paused(execute: Any) -> Any:
    def execute_dummy_batch(self: Any, *args: Any, **kwargs: Any) -> Any:
        with recorder.paused():
            return execute(self, *args, **kwargs)

    return execute_dummy_batch
