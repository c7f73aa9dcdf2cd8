# SPDX-License-Identifier: Apache-2.0
"""The scheduler's side: which ratio a request gets (`engine.patches.scheduler` calls this).

A request gets its ratio when it first asks for KV blocks, and keeps it for good, also when it is preempted and computed again.
"""

from collections.abc import Callable, Sequence
from typing import Any

from sage_backend.options import MIN_TAIL
from sage_backend.variator.groups import PLAIN, CompressionPlan

RATIO, TAIL = "sage_ratio", "sage_tail"
"""What requests may ask for in `vllm_xargs` (`SamplingParams.extra_args`): a ratio, 1 for none, and the number of tokens at the
prompt's end that stay uncompressed."""

PLAN_KEY = "sage_plan"
"""Where a request's CompressionPlan is: in its `extra_args` for workers, as an attribute for the scheduler."""


class Policy:
    """Chooses ratios by load: one step up under high load, one step down under low load. Between them it does not change."""

    def __init__(self, ratios: Sequence[int], waiting: int, kv_use: float) -> None:
        """ratios: the choices, ascending. waiting, kv_use: the requests waiting, or the fraction of the KV cache in use, from
        which load is high. Load is low below half the former and 0.8 times the latter."""
        self.ratios, self.waiting, self.kv_use = ratios, waiting, kv_use
        self._at = 0

    def choose(self, waiting: int, kv_use: float) -> int:
        """The ratio of a request that leaves `waiting` others behind, with the fraction `kv_use` of the KV cache in use."""
        if waiting >= self.waiting or kv_use >= self.kv_use:
            self._at = min(self._at + 1, len(self.ratios) - 1)
        elif waiting < self.waiting / 2 and kv_use < self.kv_use * 0.8:
            self._at = max(self._at - 1, 0)
        return self.ratios[self._at]

    @property
    def allowed(self) -> Sequence[int]:
        """The ratios up to the last choice, ascending."""
        return self.ratios[: self._at + 1]


def check_request(parameters: Any, ratios: Sequence[int]) -> None:
    """Raises ValueError, in one line, for a ratio or a tail that is not available. parameters: SamplingParams or
    PoolingParams; ratios: those of the engine's plugins."""
    asked = getattr(parameters, "extra_args", None) or {}
    ratio = asked.get(RATIO)
    if ratio is not None and (type(ratio) is not int or ratio not in (1, *ratios)):
        raise ValueError(f"{RATIO} is {ratio!r}; this server has {', '.join(map(str, (1, *ratios)))}")
    tail = asked.get(TAIL)
    if tail is not None and (type(tail) is not int or tail < MIN_TAIL):
        raise ValueError(f"{TAIL} is {tail!r}; it can be a number of tokens from {MIN_TAIL} on")


def admit(request: Any, ratio: int, tail: int) -> CompressionPlan:
    """Fix the plan of a request (vLLM's Request): with the ratio and the tail that it asks for, otherwise with these."""
    asked = (request.sampling_params and request.sampling_params.extra_args) or {}
    plan = CompressionPlan.of(request.num_prompt_tokens, asked.get(RATIO, ratio), asked.get(TAIL, tail))
    if request.sampling_params is None or not plan.limit:
        plan = PLAIN
    hashed = getattr(request, PLAN_KEY, PLAIN)  # when it came, its blocks were hashed without a ratio
    setattr(request, PLAN_KEY, plan)
    if plan != hashed:
        request.block_hashes.clear()
        request.update_block_hashes()
    return plan


def admit_with_least_work(request: Any, ratios: Sequence[int], tail: int, cached: Callable[[], int]) -> CompressionPlan:
    """`admit` with that one of these ratios, ascending, which leaves the least to compute; of equals, with the smallest.
    cached: how many tokens of the request's prompt the prefix cache has under the plan of the last `admit`."""

    def work(ratio: int) -> float:
        return admit(request, ratio, tail).work(request.num_prompt_tokens, cached())

    return admit(request, min(ratios, key=work) if len(ratios) > 1 else ratios[0], tail)
