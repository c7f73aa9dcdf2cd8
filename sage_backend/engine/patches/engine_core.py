# SPDX-License-Identifier: Apache-2.0
"""Calibrates an engine before it reads its first request.

What: wraps `EngineCore.__init__`, and `run_busy_loop` of the engines that are processes.
Why: a calibration takes a model that runs, in all of its workers and with the scheduler, and has to be there before the first
    request is stored. A process that is spawned for an engine loads plugins inside `EngineCore.__init__`, where it is too late
    to wrap that call; its requests wait until it enters its loop.
Releases: 0.31 to 0.33.
Remove when: vLLM calls plugins or the attention backend with an engine that is about to be ready.
"""

import functools
from typing import Any

from sage_backend.engine import start_calibration
from sage_backend.engine.patches.target import find, wrap

_DONE = "_sage_calibrated"
"""The attribute of an engine that has been asked for its calibration."""


@functools.cache
def apply() -> None:
    wrap(__name__, find(__name__, "vllm.v1.engine.core", "EngineCore"), "__init__", _calibrate_after)
    for name in ("EngineCoreProc", "DPEngineCoreProc"):
        wrap(__name__, find(__name__, "vllm.v1.engine.core", name), "run_busy_loop", _calibrate_before)


def _calibrate_once(core: Any) -> None:
    if not getattr(core, _DONE, False):
        setattr(core, _DONE, True)
        start_calibration.calibrate(core)


def _calibrate_after(init: Any) -> Any:
    @functools.wraps(init)
    def init_and_calibrate(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        _calibrate_once(self)

    return init_and_calibrate


def _calibrate_before(run: Any) -> Any:
    @functools.wraps(run)
    def calibrate_and_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        _calibrate_once(self)
        return run(self, *args, **kwargs)

    return calibrate_and_run
