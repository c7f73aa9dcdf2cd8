# SPDX-License-Identifier: Apache-2.0
"""Keeps warm-up and dummy batches out of metrics.

What: adds `compile_or_warm_up_model` and `execute_dummy_batch` to `WorkerWrapperBase`, in front of the worker's own.
Why: on a GPU, vLLM warms up with requests that look like those of users. Dummy batches, which keep idle data parallel engines
    in step with the others, look like them, too.
Releases: 0.31 to 0.33.
Remove when: an attention backend can see that a batch is a dummy one.
"""

import functools
from typing import Any

from sage_backend.engine.patches.target import wrap_worker_method
from sage_backend.observability import recorder


@functools.cache
def apply() -> None:
    wrap_worker_method(__name__, "compile_or_warm_up_model", _paused)
    wrap_worker_method(__name__, "execute_dummy_batch", _paused, in_base=False)


def _paused(call: Any) -> Any:
    def without_counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        with recorder.paused():
            return call(self, *args, **kwargs)

    return without_counting
