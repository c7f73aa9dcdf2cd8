# SPDX-License-Identifier: Apache-2.0
"""Refuses requests that ask for a compression ratio that there is not, as they come.

What: wraps `InputProcessor.__init__`; with the option `variator`, also the new processor's `_validate_params`.
Why: `vllm_xargs` are not validated; the scheduler, which reads them, has no way to refuse a request with a message.
Releases: 0.31 to 0.33.
Remove when: plugins can validate the parameters of requests.
"""

import functools
from typing import Any

from sage_backend.engine import checks
from sage_backend.engine.patches.target import find, wrap
from sage_backend.variator.admission import check_request


@functools.cache
def apply() -> None:
    wrap(__name__, find(__name__, "vllm.v1.engine.input_processor", "InputProcessor"), "__init__", _attached)


def _attached(init: Any) -> Any:
    def init_and_check(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        init(self, vllm_config, *args, **kwargs)
        if found := checks.compression(vllm_config):
            _, ratios = found

            def checked(validate: Any) -> Any:
                def check_and_validate(params: Any, *args: Any, **kwargs: Any) -> Any:
                    check_request(params, ratios)
                    return validate(params, *args, **kwargs)

                return check_and_validate

            wrap(__name__, self, "_validate_params", checked)

    return init_and_check
