# SPDX-License-Identifier: Apache-2.0
"""Refuses requests that ask for an unavailable compression ratio or number of recalled pages, as they come.

What: wraps `InputProcessor.__init__`; with this backend, also the new processor's `_validate_params`.
Why: `vllm_xargs` are not validated; the scheduler and workers, which read them, have no way to refuse a request with a message.
Releases: 0.31 to 0.33.
Remove when: plugins can validate the parameters of requests.
"""

import functools
from typing import Any

from sage_backend.engine import checks, request_topk
from sage_backend.engine.patches.target import find, wrap
from sage_backend.options import MemoryOptions
from sage_backend.variator import admission


@functools.cache
def apply() -> None:
    wrap(__name__, find(__name__, "vllm.v1.engine.input_processor", "InputProcessor"), "__init__", _attached)


def _attached(init: Any) -> Any:
    def init_and_check(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        init(self, vllm_config, *args, **kwargs)
        if checks.is_chosen(vllm_config):
            attach(self, checks.compression(vllm_config), checks.memory(vllm_config))

    return init_and_check


def attach(processor: Any, compression: Any, memory: MemoryOptions | None) -> None:
    """Have vLLM's processor of requests check what they ask for. compression: that of `checks.compression`."""

    def checked(validate: Any) -> Any:
        def check_and_validate(params: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                if compression is not None:
                    admission.check_request(params, compression[1])
                request_topk.check_request(params, memory)
            except ValueError as error:
                from vllm.exceptions import VLLMValidationError  # vLLM loads this package before its own modules

                raise VLLMValidationError(str(error)) from None  # for status 400: other errors become 500, without a message
            return validate(params, *args, **kwargs)

        return check_and_validate

    wrap(__name__, processor, "_validate_params", checked)
