# SPDX-License-Identifier: Apache-2.0
"""Calibrates an engine before it takes requests.

What: wraps `EngineCore.__init__`.
Why: a calibration takes a model that runs, in all of its workers and with the scheduler, and has to be there before the first
    request is stored.
Releases: 0.32.0.
Remove when: vLLM calls plugins or the attention backend with an engine that is about to be ready.
"""

import functools
from typing import Any

from sage_backend.engine import start_calibration
from sage_backend.engine.patches.target import find, replace


@functools.cache
def apply() -> None:
    replace(__name__, find(__name__, "vllm.v1.engine.core", "EngineCore"), "__init__", _calibrated)


def _calibrated(init: Any) -> Any:
    @functools.wraps(init)
    def init_and_calibrate(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        start_calibration.calibrate(self)

    return init_and_calibrate
