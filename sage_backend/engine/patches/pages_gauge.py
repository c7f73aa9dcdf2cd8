# SPDX-License-Identifier: Apache-2.0
"""Exports how many pages there are and how many are in use.

What: wraps `PrometheusStatLogger.__init__` and `.record`, which the subclass for Ray inherits.
Why: only schedulers know which pages are in use, and this logger is where vLLM hears from them.
Releases: 0.31 to 0.33.
Remove when: a plugin can add a stat logger to an engine's own ones without replacing them.
"""

import functools
from typing import Any

from sage_backend.engine import checks
from sage_backend.engine.patches.target import find, wrap


@functools.cache
def apply() -> None:
    logger = find(__name__, "vllm.v1.metrics.loggers", "PrometheusStatLogger")
    wrap(__name__, logger, "__init__", _with_pages)
    wrap(__name__, logger, "record", _recording)


def _with_pages(init: Any) -> Any:
    def init_pages(self: Any, vllm_config: Any, engine_indexes: list[int] | None = None) -> None:
        # prometheus_client chooses its storage when it is imported, by a variable that vLLM sets after loading plugins.
        from sage_backend.observability.exporter import Pages

        init(self, vllm_config, engine_indexes)
        self.sage_pages = Pages(self) if checks.is_chosen(vllm_config) else None

    return init_pages


def _recording(record: Any) -> Any:
    def record_pages(self: Any, scheduler_stats: Any, *args: Any, engine_idx: int = 0, **kwargs: Any) -> None:
        record(self, scheduler_stats, *args, engine_idx=engine_idx, **kwargs)
        pages = getattr(self, "sage_pages", None)  # loggers that were made before the patch have none
        if pages is not None and scheduler_stats is not None:
            pages.set(engine_idx, scheduler_stats.kv_cache_usage)

    return record_pages
