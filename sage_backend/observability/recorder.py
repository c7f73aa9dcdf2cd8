# SPDX-License-Identifier: Apache-2.0
"""Per-step attention metrics: the recorder that counts an engine's steps. docs/operator/metrics.md is the user's side."""

import itertools
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from sage_backend import __version__ as version
from sage_backend.features import calibration_file
from sage_backend.observability.cache_size import token_bytes
from sage_backend.observability.canary import Canary, Check
from sage_backend.observability.coverage import Coverage
from sage_backend.observability.definitions import (
    BUILD,
    BYTES,
    CANARY_ERROR,
    COMPRESSED,
    COMPRESSION,
    CONTEXT,
    COVERED,
    DEVICE_PAGES,
    FALLBACK_STEPS,
    FETCH_SECONDS,
    FETCHED,
    FETCHED_BYTES,
    HOST_PAGES,
    METRICS,
    OPERATIONS,
    PHASES,
    READ,
    RECALLED,
    REQUESTS,
    SAMPLE_EVERY,
    SAMPLES,
    SAVED,
    SCORED,
    SECONDS,
    STEPS,
    TOKEN_BYTES,
    TOKENS,
)
from sage_backend.observability.host_pages import HostPages
from sage_backend.observability.sinks import Values, open_values
from sage_backend.observability.work import QueryBlocks, Work
from sage_backend.options import SageOptions
from sage_kernels import choose_kernels
from sage_paged import Memory

_KEY_FORMATS = {4: "int4_first16", 8: "int8"}
_VALUE_FORMATS = {4: "int4", 8: "e4m3"}
"""The names of formats in `sage_build_info`, by bits. Of INT4 keys, 16 channels have 8 bits."""


@dataclass
class Sample:
    """A step in which one layer's attention is timed, in `phases`, and what its memory covers is measured; times: False for the
    latter only. query_lens, seq_lens: int64 [requests], query tokens and all tokens. topk: int64 [requests], the pages that
    memory recalls for each; None: the memory's."""

    recorder: "Recorder"
    layer: str
    phases: Sequence[str]
    num_decodes: int
    query_lens: np.ndarray
    seq_lens: np.ndarray
    topk: np.ndarray | None = None
    times: bool = True

    @contextmanager
    def timed(self, phase: str, impl: Any, memory: Memory | None, device: torch.device) -> Iterator[None]:
        """Time the block, which attends for `phase` in the layer of `impl` (SageImpl), with its memory."""
        if phase not in self.phases or not self.times:
            yield
            return
        blocks = None if memory is None else self.blocks(phase, memory, impl.layout.tokens)
        work = Work.of(impl, *self._lengths(phase), blocks)
        if device.type == "cpu":
            began = time.perf_counter()
            yield
            self.recorder.add_sample(phase, work, time.perf_counter() - began)
        else:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self.recorder.pending.append((phase, work, begin, end))

    def blocks(self, phase: str, memory: Memory, page_tokens: int) -> QueryBlocks:
        """The blocks that memory makes of the requests in `phase`."""
        query_block = 0 if phase == "decode" else memory.query_block
        return QueryBlocks.of(memory, page_tokens, *self._lengths(phase), query_block, self._topk(phase))

    def cover(self, phase: str, layer: Any, *args: Any) -> None:
        """Measure the fraction of exact attention on the pages that memory read for `phase` in `layer` (vLLM's Attention), if
        this is the sampled layer. args: the last ones of `Coverage.measure`."""
        if phase in self.phases and layer.layer_name == self.layer and self.recorder.coverage is not None:
            self.recorder.coverage.measure(phase, layer.impl, *self._lengths(phase), self._topk(phase), *args)

    def _lengths(self, phase: str) -> tuple[np.ndarray, np.ndarray]:
        """query_lens and seq_lens of the requests in `phase`."""
        requests = self._requests(phase)
        return self.query_lens[requests], self.seq_lens[requests]

    def _topk(self, phase: str) -> np.ndarray | None:
        """topk of the requests in `phase`."""
        return None if self.topk is None else self.topk[self._requests(phase)]

    def _requests(self, phase: str) -> slice:
        return slice(self.num_decodes) if phase == "decode" else slice(self.num_decodes, None)


@dataclass(frozen=True)
class _MemoryLayers:
    """Layers that share metadata, and have memory. sampled: one of them."""

    names: list[str]
    sampled: str
    memory: Memory
    page_tokens: int


_NOT_TIMED = nullcontext()


def timed(sample: Sample | None, phase: str, layer: Any, device: torch.device) -> AbstractContextManager[None]:
    """The context in which `layer` (vLLM's Attention) attends for `phase`; it takes the time if `sample` has this layer."""
    if sample is None or sample.layer != layer.layer_name:
        return _NOT_TIMED
    return sample.timed(phase, layer.impl, layer.impl.memory_of(layer), device)


class Recorder:
    """Counts the steps of one engine. Every method takes microseconds, and none waits for the device."""

    def __init__(self, values: Values, options: SageOptions | None = None) -> None:
        """options: those of the engine, unless they are the defaults."""
        self.canary: Canary | None = None
        """Present with the option `canary`."""
        self.coverage: Coverage | None = None
        """Present if the counted layers have memory."""
        if options is not None and options.canary is not None:
            values.observe(CANARY_ERROR, [])
            self.canary = Canary(options, lambda error: values.observe(CANARY_ERROR, [error]))
        self.host_pages: HostPages | None = None
        """Present if pages are in host memory."""
        self.paused = True
        """Whether steps are not those of users: of the warm-up, of the calibration at start, and those that keep idle data
        parallel engines in step."""
        self.pending: list[tuple[str, Work, Any, Any]] = []
        """Timed calls whose CUDA events may not have passed yet: phase, work, begin, end."""
        self._values, self._calibration = values, options and options.calibration
        self._smooth_q = options is not None and options.smooth_q
        self._group: list[str] = []
        """The layers whose steps are counted."""
        self._sampled, self._due = "", list[str]()
        """The one of them that is timed, and the phases of the current step in which it is."""
        self._fallback: str | None = None
        self._memory: _MemoryLayers | None = None
        """The layers whose memory is counted. Those of `_group`, unless these have none."""
        self._steps = dict.fromkeys(PHASES, 0)
        for gauge in (HOST_PAGES, DEVICE_PAGES):
            values.set(gauge, 0)
        # A counter that appears with its first event has no rate at that event.
        for metric in METRICS:
            if metric.kind == "counter":
                for labels in itertools.product(*metric.labels.values()):
                    values.add(metric, 0, *labels)

    def set_cache(self, cache: Any) -> None:
        """Record what a token takes in this worker's KV cache (KVCacheConfig)."""
        taken, bf16 = token_bytes(cache)
        self._values.set(TOKEN_BYTES, taken)
        self._values.set(COMPRESSION, bf16 / taken)

    def set_host_pages(self, pages: int, frames: int, host_pages: HostPages) -> None:
        """Record that host memory holds `pages` pages of a KV head, of which the GPU can hold `frames`."""
        self._values.set(HOST_PAGES, pages)
        self._values.set(DEVICE_PAGES, frames)
        self.host_pages = host_pages

    def add_layers(
        self,
        names: list[str],
        sampled: str,
        layout: Any,
        kv_heads: int,
        heads: int,
        device: torch.device,
        memory: Memory | None = None,
    ) -> None:
        """Add a group of layers that share metadata. sampled: one of them, to be timed; layout: its PageLayout; kv_heads,
        heads: of one layer in this worker; memory: that of the sampled layer, if it has one."""
        # Steps are counted where the first group's metadata are built, and memory in the first group that has one.
        if memory is not None and (self._memory is None or self._memory.names == names):
            self._memory = _MemoryLayers(names, sampled, memory, layout.tokens)
            self.coverage = Coverage(memory, layout.tokens, device, self._add_covered)
            for phase in PHASES:
                self._values.observe(COVERED, [], phase)
        if not self._group or self._group == names:
            self._group, self._sampled = names, sampled
            self._record_build_info(layout, heads // kv_heads, device)

    def _record_build_info(self, layout: Any, group: int, device: torch.device) -> None:
        # Not at the top: the exporter's processes and tests use this module without starting vLLM.
        from vllm import __version__ as vllm_version

        kernels, architecture = "torch", platform.machine()
        if device.type == "cuda":
            choice = choose_kernels(device, layout, group, self._smooth_q)
            self._fallback = choice.fallback_reason
            kernels = "gluon+triton" if "hopper" in (choice.prefill, choice.decode) else "triton"
            architecture = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
        chosen = calibration_file.layer_bits(self._calibration).values() if self._calibration else ()

        def used(option: str, formats: dict[int, str]) -> str:
            bits = {getattr(layout, option), *(each[option] for each in chosen if option in each)}
            return "_".join(formats[each] for each in sorted(bits))

        page_format = f"k_{used('k_bits', _KEY_FORMATS)}_v_{used('v_bits', _VALUE_FORMATS)}_page{layout.tokens}"
        self._values.set(BUILD, 1, version, vllm_version, page_format, kernels, architecture)

    def step(self, names: list[str], common: Any, num_decodes: int, topk: list[int] | None = None) -> Sample | None:
        """Count a step. common: the CommonAttentionMetadata of the layers `names`; topk: the pages that memory recalls for each
        request, if they have numbers of their own. Returns the calls to time, if any."""
        memory = self._memory if self._memory is not None and self._memory.names == names else None
        if self.paused or (names != self._group and memory is None):
            return None
        starts = common.query_start_loc_cpu.numpy()
        if names == self._group:
            self._count(int(starts[num_decodes]), int(starts[-1]))  # unlike num_actual_tokens, without padding
        if common.seq_lens_cpu_upper_bound is None or not (memory or self._due):
            return None
        lengths = np.diff(starts).astype(np.int64), common.seq_lens_cpu_upper_bound.numpy().astype(np.int64)
        own = None if topk is None else np.array(topk, np.int64)
        sample = Sample(self, self._sampled, self._due, num_decodes, *lengths, own)
        if memory is not None:
            self._count_memory(memory, sample)
            if names != self._group:
                sample = replace(sample, layer=memory.sampled, times=False)
        return sample if self._due and not self.pending else None

    def _count(self, decode: int, tokens: int) -> None:
        """Count a step with so many tokens, the first `decode` of which decode, and decide what is sampled in it."""
        self._collect()
        if self.host_pages is not None:
            self.host_pages.step()
        self._due = []
        for phase, of_phase in zip(PHASES, (tokens - decode, decode), strict=True):
            if of_phase:
                self._values.add(TOKENS, of_phase, phase)
                self._values.add(STEPS, 1, phase)
                self._steps[phase] += 1
                if self._steps[phase] % SAMPLE_EVERY[phase] == 0:
                    self._due.append(phase)
        if tokens > decode and self._fallback:
            self._values.add(FALLBACK_STEPS, 1, self._fallback)

    def _count_memory(self, layers: "_MemoryLayers", sample: Sample) -> None:
        """Count what a layer with memory reads of the step of `sample`."""
        for phase in PHASES:
            blocks = sample.blocks(phase, layers.memory, layers.page_tokens)
            counted = {CONTEXT: blocks.end, READ: blocks.read, SCORED: blocks.scored, RECALLED: blocks.recalled}
            for metric, numbers in counted.items():
                self._values.add(metric, int(numbers.sum()), phase)

    def check(self, names: list[str], common: Any, num_decodes: int, topk: list[int] | None = None) -> Check | None:
        """The check of a step against exact attention, if one is due. Arguments as for `step`."""
        if self.canary is None or self.paused:
            return None
        return self.canary.plan(names, common, num_decodes, topk)

    def add_request(self, ratio: int) -> None:
        """Count a request that has been given a ratio."""
        if not self.paused:
            self._values.add(REQUESTS, 1, str(ratio))

    def add_compressed(self, ratio: int, tokens: int, saved_operations: int) -> None:
        """Count tokens of a step that FFNs computed in groups of `ratio`."""
        if not self.paused:
            self._values.add(COMPRESSED, tokens, str(ratio))
            self._values.add(SAVED, saved_operations)

    def _collect(self) -> None:
        """Add the pending samples whose events have passed."""
        while self.pending and self.pending[0][-1].query():
            phase, work, begin, end = self.pending.pop(0)
            self.add_sample(phase, work, begin.elapsed_time(end) / 1000)
        if self.coverage is not None:
            self.coverage.collect()

    def add_fetched(self, pages: int, size: int, seconds: float) -> None:
        """Count pages fetched from host memory, their bytes, and the seconds that fetches took."""
        self._values.add(FETCHED, pages)
        self._values.add(FETCHED_BYTES, size)
        self._values.add(FETCH_SECONDS, seconds)

    def _add_covered(self, phase: str, fraction: float) -> None:
        self._values.observe(COVERED, [fraction], phase)

    def add_sample(self, phase: str, work: Work, seconds: float) -> None:
        """Count a timed call of one layer."""
        self._values.add(SAMPLES, 1, phase)
        self._values.add(SECONDS, seconds, phase)
        self._values.add(OPERATIONS, work.operations, phase)
        self._values.add(BYTES, work.bytes, phase)


_current: tuple[str, Recorder | None] = ("", None)


def recorder(config: Any) -> Recorder | None:
    """The recorder of the engine that this worker runs, or None if it exports nothing. config: the worker's VllmConfig."""
    global _current
    if _current[0] != config.instance_id:
        values = open_values(config)
        options = SageOptions.parse(config.additional_config)
        _current = config.instance_id, Recorder(values, options) if values else None
    return _current[1]


def pause(paused: bool) -> None:
    """Stop counting the steps of this process's engine, or count from now on."""
    if (record := _current[1]) is not None:
        record.paused = paused
        if record.host_pages is not None:
            record.host_pages.restart()


@contextmanager
def paused() -> Iterator[None]:
    """Do not count the steps inside, which are dummy ones. Counting begins when the first such block ends."""
    pause(True)
    yield
    pause(False)
