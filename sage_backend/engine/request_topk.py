# SPDX-License-Identifier: Apache-2.0
"""Per-request top-k: requests that ask for another number of recalled pages, with the option `max_topk_pages` of memory."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from sage_backend.features.step_requests import StepRequests
from sage_backend.options import ALL, MemoryOptions
from sage_paged import ALL_PAGES

TOPK_PAGES = "sage_topk_pages"
"""What requests may ask for in `vllm_xargs` (`SamplingParams.extra_args`): a number of pages, or "all" to read everything."""

REQUEST_TOPK = "sage.request_topk"
"""The name under which an engine's layers (`static_forward_context`) hold its `RequestTopk`, if requests may ask for pages."""

_FIXED = "sage_fixed_topk"
"""The attribute of a request (vLLM's Request) with what it asked for when it came."""


def check_request(parameters: Any, memory: MemoryOptions | None) -> None:
    """Raises ValueError, in one line, for a number of pages that is not to be had. parameters: SamplingParams or
    PoolingParams; memory: the engine's."""
    asked = (getattr(parameters, "extra_args", None) or {}).get(TOPK_PAGES)
    if asked is None:
        return
    if memory is None or memory.max_topk_pages is None:
        raise ValueError(f'{TOPK_PAGES} is {asked!r}; this server has no "max_topk_pages" in option "memory"; leave it out')
    most, whole = memory.most_asked, memory.max_topk_pages == ALL
    if not (whole and asked == ALL) and not (type(asked) is int and 1 <= asked <= most):
        raise ValueError(f"{TOPK_PAGES} is {asked!r}; this server has 1 to {most}" + f', and "{ALL}"' * whole)


def asked_for(arguments: Mapping[str, Any], memory: MemoryOptions) -> int:
    """The pages that a request with these `extra_args` has recalled, or ALL_PAGES."""
    asked = arguments.get(TOPK_PAGES)
    return ALL_PAGES if asked == ALL else memory.topk_pages if asked is None else int(asked)


def of_blocks(request: Any) -> Any:
    """What the hashes of a request's blocks have to say of the pages that its tokens have read: what it asks for, or None. It
    is that of its first prompt, also in a session whose later prompts bring other parameters, as for `StepRequests`."""
    if not hasattr(request, _FIXED):
        parameters = getattr(request, "sampling_params", None)
        setattr(request, _FIXED, ((parameters and parameters.extra_args) or {}).get(TOPK_PAGES))
    return getattr(request, _FIXED)


class RequestTopk(StepRequests[int]):
    """The pages that requests have recalled."""

    def __init__(self, memory: MemoryOptions) -> None:
        super().__init__(partial(asked_for, memory=memory))
        self.default = memory.topk_pages


class TopkTensor:
    """The pages of a step's requests as kernels read them: one tensor for all steps, which CUDA graphs are captured with."""

    def __init__(self, topk: RequestTopk, requests: int, device: torch.device) -> None:
        """requests: the most of a step."""
        self._topk = topk
        self._tensor = torch.full((requests,), topk.default, dtype=torch.int32, device=device)
        self._values = [topk.default] * requests

    def of_step(self, requests: int) -> tuple[torch.Tensor, list[int]]:
        """int32 [requests], of the step whose metadata are being built, padding included, and the same values."""
        values = self._topk.in_order()[:requests]
        values += [self._topk.default] * (requests - len(values))
        if values != self._values[:requests]:
            source = torch.tensor(values, dtype=torch.int32, pin_memory=self._tensor.is_cuda)
            self._tensor[:requests].copy_(source, non_blocking=True)
            self._values[:requests] = values
        return self._tensor[:requests], values
