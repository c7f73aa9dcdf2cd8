# SPDX-License-Identifier: Apache-2.0
"""The scheduler's side: which ratio a request gets, and how the prefix cache tells apart what was computed under it.

A request gets its ratio when it first asks for KV blocks, and keeps it for good, also when it is preempted and computed again.
"""

import copy
import functools
from collections.abc import Sequence
from typing import Any

from sage_backend.options import MIN_TAIL, VariatorOptions
from sage_backend.variator.groups import PLAIN, Reading, clip

RATIO, TAIL = "sage_ratio", "sage_tail"
"""What requests may ask for in `vllm_xargs` (`SamplingParams.extra_args`): a ratio, 1 for none, and how many of the prompt's
last tokens stay uncompressed."""

READING = "sage_reading"
"""Where workers find a request's reading, in its `extra_args`, and where the scheduler keeps it, as an attribute."""


class Policy:
    """Chooses ratios by load: one up when it is high, one down when it is low, none in between, so that it does not flutter."""

    def __init__(self, ratios: Sequence[int], waiting: int, kv_use: float) -> None:
        """ratios: what there is to choose from, ascending. waiting, kv_use: where load is high; it is low below half as many
        requests and 0.8 times the use."""
        self.ratios, self.waiting, self.kv_use = ratios, waiting, kv_use
        self._at = 0

    def choose(self, waiting: int, kv_use: float) -> int:
        """The ratio of a request that leaves `waiting` others behind, with the share `kv_use` of the KV cache in use."""
        if waiting >= self.waiting or kv_use >= self.kv_use:
            self._at = min(self._at + 1, len(self.ratios) - 1)
        elif waiting < self.waiting / 2 and kv_use < self.kv_use * 0.8:
            self._at = max(self._at - 1, 0)
        return self.ratios[self._at]


def check_request(parameters: Any, ratios: Sequence[int]) -> None:
    """Raises ValueError, in one line, for a ratio or a tail that cannot be had. parameters: SamplingParams or PoolingParams."""
    asked = getattr(parameters, "extra_args", None) or {}
    ratio = asked.get(RATIO)
    if ratio is not None and (type(ratio) is not int or ratio not in (1, *ratios)):
        raise ValueError(f"{RATIO} is {ratio!r}; this server has {', '.join(map(str, (1, *ratios)))}")
    tail = asked.get(TAIL)
    if tail is not None and (type(tail) is not int or tail < MIN_TAIL):
        raise ValueError(f"{TAIL} is {tail!r}; it can be a number of tokens from {MIN_TAIL} on")


def attach(scheduler: Any, options: VariatorOptions, ratios: Sequence[int]) -> None:
    """Have vLLM's scheduler give every request a ratio. ratios: those that there are plugins for."""
    _tell_blocks_apart()
    policy = Policy(options.choices(ratios), options.waiting, options.kv_use)
    lookup = scheduler._get_local_prefix_cache_hit

    def admit(request: Any) -> Any:
        if (reading := getattr(request, READING, None)) is None:
            _, waiting = scheduler.get_request_counts()
            ratio = policy.choose(waiting - 1, scheduler.get_kv_cache_usage())
            reading = _read(request, ratio, options.tail)
        if request.sampling_params is not None:
            # Requests of one call may share their parameters, and a session's next prompt brings new ones.
            request.sampling_params = copy.copy(request.sampling_params)
            request.sampling_params.extra_args = {**(request.sampling_params.extra_args or {}), READING: list(reading)}
        return lookup(request)

    def split(request: Any, tokens: int, local: int = 0, external: int = 0) -> int:
        return clip(tokens, request.num_computed_tokens + local + external, getattr(request, READING, PLAIN))

    scheduler._get_local_prefix_cache_hit = admit
    # Models with Mamba layers, which are not among ours, end their chunks where their states can be kept.
    scheduler.need_mamba_block_aligned_split = True
    scheduler._mamba_block_aligned_split = split


def _read(request: Any, ratio: int, tail: int) -> Reading:
    """Fix a request's reading: with the ratio and the tail that it asks for itself, if it does, else with these."""
    asked = (request.sampling_params and request.sampling_params.extra_args) or {}
    reading = Reading.of(request.num_prompt_tokens, asked.get(RATIO, ratio), asked.get(TAIL, tail))
    if request.sampling_params is None or not reading.limit:
        reading = PLAIN
    setattr(request, READING, reading)
    if reading.limit:  # its blocks were hashed when it came
        request.block_hashes.clear()
        request.update_block_hashes()
    return reading


@functools.cache
def _tell_blocks_apart() -> None:
    """Have the hash of a block say how many of its tokens are in groups, and of what ratio. Without groups, it says nothing."""
    from vllm.v1.core import block_pool, kv_cache_utils

    generate = kv_cache_utils.generate_block_hash_extra_keys

    def extra_keys(request: Any, first: int, end: int, start_mm_idx: int) -> Any:
        keys, next_mm_idx = generate(request, first, end, start_mm_idx)
        reading: Reading = getattr(request, READING, PLAIN)
        if reading.limit > first:
            keys = (*(keys or ()), (READING, f"{reading.ratio}:{min(reading.limit, end) - first}"))
        return keys, next_mm_idx

    kv_cache_utils.generate_block_hash_extra_keys = extra_keys
    block_pool.generate_block_hash_extra_keys = extra_keys
