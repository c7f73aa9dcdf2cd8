# SPDX-License-Identifier: Apache-2.0
"""Checks every engine configuration where it is made. For engines that choose this backend, lets the drafter follow and exports
metrics.

What: wraps `EngineArgs.create_engine_config`.
Why: vLLM asks a backend what it supports only in the workers, where a refusal ends in the traces of other processes. And the
    folder of metrics has to be there before workers start.
Releases: 0.31 to 0.33.
Remove when: vLLM calls a hook of the chosen backend, or of plugins, with the configuration of a new engine.
"""

import functools
from typing import Any

from sage_backend.engine import checks, drafter
from sage_backend.engine.patches import cache_declaration, pages_gauge
from sage_backend.engine.patches.target import find, wrap


@functools.cache
def apply() -> None:
    wrap(__name__, find(__name__, "vllm.engine.arg_utils", "EngineArgs"), "create_engine_config", _checked)


def _checked(create: Any) -> Any:
    def create_and_check(self: Any, *args: Any, **kwargs: Any) -> Any:
        checks.check_arguments(self)
        config = create(self, *args, **kwargs)
        has_metrics = not self.disable_log_stats
        checks.check_config(config, has_metrics)
        if (draft_model := drafter.choose_backend(config, self)) is not None:
            cache_declaration.drop(draft_model)
        if has_metrics and checks.is_chosen(config):
            # prometheus_client chooses its storage when it is imported, by a variable that vLLM sets after loading plugins.
            from sage_backend.observability import exporter

            pages_gauge.apply()
            exporter.export(config)
        return config

    return create_and_check
