"""What an engine tells of its steps, as counters and gauges that Prometheus can read. docs/metrics.md is the user's side.

Workers serve no HTTP. The first worker of each engine keeps its values in files of prometheus_client's multiprocess format,
which `exporter` shows at the server's /metrics. Under Ray Serve, where no server of vLLM's is scraped, it hands them to Ray.
The other workers of an engine attend to the same tokens, with other heads or layers, and so have nothing to add.
"""

import functools
import itertools
import os
import platform
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from sage_backend import calibration
from sage_backend.canary import LARGEST, Canary, Check
from sage_backend.coverage import Coverage
from sage_backend.options import SageOptions
from sage_backend.variator import plugin
from sage_paged import Memory

PHASES = ("prefill", "decode")
SAMPLE_EVERY = {"prefill": 4, "decode": 16}
"""Steps of a phase from one whose attention is timed to the next. Prefills are fewer and longer."""

FALLBACKS = ("gluon_missing", "page_format", "smooth_q")
"""Why `sage_kernels.prefill.choose_kernel` takes the portable kernel."""

RATIOS = ("1", *map(str, plugin.RATIOS))
"""How many vectors become one in FFNs with compression plugins, and 1 for none."""

COMMON_LABELS = ("model_name", "engine")
"""Labels of every metric, as vLLM's own have them: the served model's name, and the engine's data parallel rank."""


@dataclass(frozen=True, eq=False)
class Metric:
    """labels: its labels beside the common ones, each with the values it takes; empty where that is a line of text. buckets:
    of a histogram, their upper bounds, the last of which no value exceeds."""

    name: str
    text: str
    labels: dict[str, tuple[str, ...]] = field(default_factory=dict)
    buckets: tuple[float, ...] = ()

    @property
    def kind(self) -> str:
        if self.buckets:
            return "histogram"
        return "counter" if self.name.endswith("_total") else "gauge"


BUILD = Metric(
    "sage_build_info",
    "Always 1; the labels say what serves.",
    dict.fromkeys(("version", "vllm_version", "page_format", "kernels", "architecture"), ()),
)
TOKENS = Metric("sage_attended_tokens_total", "Query tokens that attention was computed for.", {"phase": PHASES})
STEPS = Metric("sage_attention_steps_total", "Engine steps with tokens of the phase.", {"phase": PHASES})
FALLBACK_STEPS = Metric(
    "sage_fallback_steps_total", "Steps whose prefill did not take the kernel made for the GPU.", {"reason": FALLBACKS}
)
SAMPLES = Metric("sage_attention_samples_total", "Calls of one attention layer that were timed.", {"phase": PHASES})
SECONDS = Metric("sage_attention_sampled_seconds_total", "Seconds that these calls took.", {"phase": PHASES})
OPERATIONS = Metric("sage_attention_sampled_operations_total", "Operations of Q K^T and P V in these calls.", {"phase": PHASES})
BYTES = Metric("sage_attention_sampled_bytes_total", "Bytes of KV pages that these calls had to read.", {"phase": PHASES})
TOKEN_BYTES = Metric("sage_kv_bytes_per_token", "Bytes of one token's keys and values in all layers of one worker.")
COMPRESSION = Metric("sage_kv_compression_ratio", "Bytes of the same keys and values in BF16, over sage_kv_bytes_per_token.")
CONTEXT = Metric("sage_memory_context_tokens_total", "Tokens of context before the end of rows of queries.", {"phase": PHASES})
READ = Metric("sage_memory_read_tokens_total", "Those of them that each KV head reads.", {"phase": PHASES})
SCORED = Metric("sage_memory_scored_pages_total", "Pages that each KV head scores for rows of queries.", {"phase": PHASES})
RECALLED = Metric("sage_memory_recalled_pages_total", "Those of them that it recalls.", {"phase": PHASES})
COVERED = Metric(
    "sage_memory_attention_mass_covered",
    "Share of exact attention that falls on the pages that were read, in sampled calls that read a part.",
    {"phase": PHASES},
    buckets=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 1.0),
)
CANARY_ERROR = Metric(
    "sage_canary_relative_error",
    "Relative L2 error of attention over quantized pages, in checks of one KV head.",
    buckets=(0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, LARGEST),
)
READINGS = Metric(
    "sage_variator_requests_total", "Requests whose prompts were read in groups of this many tokens.", {"ratio": RATIOS}
)
COMPRESSED = Metric(
    "sage_variator_compressed_tokens_total", "Prompt tokens that FFNs computed in groups.", {"ratio": RATIOS[1:]}
)
SAVED = Metric("sage_variator_saved_operations_total", "Operations of FFNs that groups saved.")
PAGES = Metric("sage_kv_pages", "Pages of the KV cache.")
PAGES_IN_USE = Metric("sage_kv_pages_in_use", "Pages that requests hold.")

METRICS = (
    BUILD, TOKENS, STEPS, FALLBACK_STEPS, SAMPLES, SECONDS, OPERATIONS, BYTES, TOKEN_BYTES, COMPRESSION,
    CONTEXT, READ, SCORED, RECALLED, COVERED, CANARY_ERROR, READINGS, COMPRESSED, SAVED, PAGES, PAGES_IN_USE,
)  # fmt: skip


def directory(config: Any) -> Path:
    """Where an engine of this configuration (VllmConfig) keeps its values, if the folder exists.

    Several API servers share a folder of vLLM's already, which each of them shows. A single one makes its own.
    """
    shared = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    # The number is the time at which the configuration was made, in ns, and goes with it to all processes. Data parallel
    # engines under Ray append their rank.
    return Path(shared) if shared else Path(tempfile.gettempdir()) / f"sage-metrics-{config.instance_id.partition('_')[0]}"


def common_labels(config: Any) -> tuple[str, str]:
    """The values of COMMON_LABELS for an engine of this configuration (VllmConfig)."""
    return config.model_config.served_model_name, str(config.parallel_config.data_parallel_index)


class Values(Protocol):
    """Where values go. `labels` are the values of the metric's own labels, in their order."""

    def add(self, metric: Metric, amount: float, *labels: str) -> None: ...

    def set(self, metric: Metric, value: float, *labels: str) -> None: ...

    def observe(self, metric: Metric, values: Sequence[float], *labels: str) -> None: ...


class FileValues:
    """Values in files that another process reads while they are written: an addition is a store into mapped memory."""

    def __init__(self, folder: Path, writer: str, common: Sequence[str]) -> None:
        """writer: a name, without underscores, that no other process and no other engine of this one has."""
        from prometheus_client.mmap_dict import MmapedDict

        self._common = tuple(common)
        self._counters = MmapedDict(str(folder / f"counter_{writer}.db"))
        self._gauges = MmapedDict(str(folder / f"gauge_mostrecent_{writer}.db"))
        self._histograms = MmapedDict(str(folder / f"histogram_{writer}.db"))
        self._keys: dict[tuple[str, ...], str] = {}

    def add(self, metric: Metric, amount: float, *labels: str) -> None:
        _grow(self._counters, self._key(metric, labels), amount)

    def set(self, metric: Metric, value: float, *labels: str) -> None:
        self._gauges.write_value(self._key(metric, labels), value, time.time())

    def observe(self, metric: Metric, values: Sequence[float], *labels: str) -> None:
        """With no values, the histogram is there and empty."""
        from prometheus_client.utils import floatToGoString

        bounds = np.array((*metric.buckets, np.inf))
        counts = np.bincount(np.searchsorted(bounds, values), minlength=len(bounds))
        for bound, count in zip(bounds.tolist(), counts.tolist(), strict=True):  # of each bucket alone; the reader adds up
            _grow(self._histograms, self._key(metric, labels, "_bucket", floatToGoString(bound)), count)
        _grow(self._histograms, self._key(metric, labels, "_sum"), sum(values))

    def _key(self, metric: Metric, labels: tuple[str, ...], part: str = "", bound: str = "") -> str:
        """part, bound: of a histogram, which of its numbers, and the upper bound of a bucket."""
        key = self._keys.get((metric.name, part, bound, *labels))
        if key is None:
            from prometheus_client.mmap_dict import mmap_key

            own = dict(zip((*COMMON_LABELS, *metric.labels), (*self._common, *labels), strict=True))
            own |= {"le": bound} if bound else {}
            key = mmap_key(metric.name.removesuffix("_total"), metric.name + part, list(own), list(own.values()), metric.text)
            self._keys[(metric.name, part, bound, *labels)] = key
        return key


def _grow(numbers: Any, key: str, amount: float) -> None:
    value, _ = numbers.read_value(key)
    numbers.write_value(key, value + amount, 0.0)


REPEAT_SECONDS = 1.0
"""How often Ray is told again what gauges are at: it forgets one that was not set in its last two reports."""


class RayValues:
    """Values in Ray's own metrics, for a process that is a Ray actor: a worker, or a replica of Ray Serve."""

    def __init__(self, common: Sequence[str]) -> None:
        from ray.util import metrics as ray

        self._gauges: dict[tuple[Metric, tuple[str, ...]], float] = {}
        threading.Thread(target=self._repeat, name="sage-gauges", daemon=True).start()

        self._common = dict(zip(COMMON_LABELS, common, strict=True))
        self._metrics: dict[str, Any] = {}
        for metric in METRICS:
            make = {"counter": ray.Counter, "gauge": ray.Gauge, "histogram": ray.Histogram}[metric.kind]
            bounds = {"boundaries": list(metric.buckets)} if metric.buckets else {}
            tags = (*COMMON_LABELS, *metric.labels)
            self._metrics[metric.name] = make(metric.name, metric.text, tag_keys=tags, **bounds)

    def add(self, metric: Metric, amount: float, *labels: str) -> None:
        if amount:  # Ray refuses to add nothing
            self._metrics[metric.name].inc(amount, self._tags(metric, labels))

    def set(self, metric: Metric, value: float, *labels: str) -> None:
        self._gauges[metric, labels] = value
        self._metrics[metric.name].set(value, self._tags(metric, labels))

    def observe(self, metric: Metric, values: Sequence[float], *labels: str) -> None:
        for value in values:
            self._metrics[metric.name].observe(value, self._tags(metric, labels))

    def _repeat(self) -> None:
        while True:
            time.sleep(REPEAT_SECONDS)
            for (metric, labels), value in list(self._gauges.items()):
                self._metrics[metric.name].set(value, self._tags(metric, labels))

    def _tags(self, metric: Metric, labels: tuple[str, ...]) -> dict[str, str]:
        return {**self._common, **dict(zip(metric.labels, labels, strict=True))}


@functools.cache
def ray_values(common: tuple[str, ...]) -> RayValues:
    """The only one of this process with these values of COMMON_LABELS."""
    return RayValues(common)


def _open_values(config: Any) -> Values | None:
    """Where this worker's values go, or None if nobody asked for them or another worker tells them."""
    if config.parallel_config.rank != 0:
        return None
    common = common_labels(config)
    folder = directory(config)
    if folder.is_dir():
        return FileValues(folder, f"sage-{os.getpid()}-{config.instance_id.replace('_', '-')}", common)
    from vllm.ray.lazy_utils import is_in_ray_actor

    return ray_values(common) if is_in_ray_actor() else None


class Rows(NamedTuple):
    """What memory makes of a batch: of each row of queries (see `sage_paged.memory`), int64 [rows], the position of its first
    query and that behind its last one, the tokens that a KV head reads, and the pages that it scores and recalls."""

    first: np.ndarray
    end: np.ndarray
    read: np.ndarray
    scored: np.ndarray
    recalled: np.ndarray

    @classmethod
    def of(cls, memory: Memory, page_tokens: int, query_lens: np.ndarray, seq_lens: np.ndarray, query_block: int) -> "Rows":
        """Of requests with these query tokens and tokens in all, int64 [requests]; query_block 0 for one row a request."""
        begins, ends = (seq_lens - query_lens)[query_lens > 0], seq_lens[query_lens > 0]
        first, end = begins, ends
        if query_block:
            cuts = [
                np.arange(begin // query_block + 1, -(-end // query_block)) * query_block
                for begin, end in zip(begins, ends, strict=True)
            ]
            first = np.concatenate([np.r_[begin, cut] for begin, cut in zip(begins, cuts, strict=True)] or [begins])
            end = np.concatenate([np.r_[cut, end] for end, cut in zip(ends, cuts, strict=True)] or [ends])
        local = np.maximum(first - memory.local_tokens + 1, 0) // page_tokens
        sinks = memory.sink_pages(page_tokens)
        choosing = local > sinks + memory.topk_pages
        far = np.where(choosing, sinks + memory.topk_pages, local)
        scored, recalled = np.where(choosing, local - sinks, 0), np.where(choosing, memory.topk_pages, 0)
        return cls(first, end, (far - local) * page_tokens + end, scored, recalled)


@dataclass
class Work:
    """What attention had to do: `operations` of the two matrix products, `bytes` of pages, each read once a request."""

    operations: float
    bytes: float

    @classmethod
    def of(cls, impl: Any, query_lens: np.ndarray, seq_lens: np.ndarray, rows: Rows | None = None) -> "Work":
        """Of requests with these query tokens and tokens in all, int64 [requests], in the layer of `impl` (SageImpl). rows:
        those that memory makes of them, if the layer has it."""
        if rows is not None:
            query_lens, keys = rows.end - rows.first, rows.read
            pairs = query_lens * (2 * keys - query_lens + 1) // 2
        elif impl.window:
            pairs = _visible(seq_lens, impl.window) - _visible(seq_lens - query_lens, impl.window)
            keys = np.minimum(seq_lens, impl.window - 1 + query_lens)
        else:
            pairs = query_lens * (2 * seq_lens - query_lens + 1) // 2
            keys = seq_lens
        return cls(
            operations=4.0 * impl.num_heads * impl.head_size * float(pairs.sum()),
            bytes=float(impl.num_kv_heads * impl.layout.bytes_per_token) * float(keys[query_lens > 0].sum()),
        )


def _visible(tokens: np.ndarray, window: int) -> np.ndarray:
    """How many (query, key) pairs the first `tokens` tokens make, each seeing itself and up to window - 1 before it."""
    full = np.minimum(tokens, window)
    return full * (full + 1) // 2 + (tokens - full) * window


@dataclass
class Sample:
    """A step of which one layer's attention is timed, in `phases`. query_lens, seq_lens: int64 [requests]."""

    recorder: "Recorder"
    layer: str
    phases: Sequence[str]
    num_decodes: int
    query_lens: np.ndarray
    seq_lens: np.ndarray

    @contextmanager
    def timed(self, phase: str, impl: Any, memory: Memory | None, device: torch.device) -> Iterator[None]:
        """Time what is called inside, which attends for `phase` in the layer of `impl` (SageImpl), with its memory."""
        if phase not in self.phases:
            yield
            return
        (query_lens, seq_lens), rows = self._of(phase), None
        if memory is not None:
            query_block = 0 if phase == "decode" else memory.query_block
            rows = Rows.of(memory, impl.layout.tokens, query_lens, seq_lens, query_block)
        work = Work.of(impl, query_lens, seq_lens, rows)
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

    def cover(self, phase: str, layer: Any, *args: Any) -> None:
        """Tell how much of exact attention falls on what memory read for `phase` in `layer` (vLLM's Attention), if that is to
        be sampled. args: the last ones of `Coverage.measure`."""
        if phase in self.phases and layer.layer_name == self.layer and self.recorder.coverage is not None:
            self.recorder.coverage.measure(phase, layer.impl, *self._of(phase), *args)

    def _of(self, phase: str) -> tuple[np.ndarray, np.ndarray]:
        """Query tokens and tokens in all of the requests in `phase`."""
        requests = slice(self.num_decodes) if phase == "decode" else slice(self.num_decodes, None)
        return self.query_lens[requests], self.seq_lens[requests]


_NOT_TIMED = nullcontext()


def timed(sample: Sample | None, phase: str, layer: Any, device: torch.device) -> AbstractContextManager[None]:
    """What `layer` (vLLM's Attention) has to attend for `phase` inside of, so that it is timed where `sample` says so."""
    if sample is None or sample.layer != layer.layer_name:
        return _NOT_TIMED
    return sample.timed(phase, layer.impl, layer.impl.memory_of(layer), device)


class Recorder:
    """Counts the steps of one engine. All methods take microseconds and none waits for the device."""

    def __init__(self, values: Values, options: SageOptions | None = None) -> None:
        """options: those of the engine, unless they are the defaults."""
        self.canary: Canary | None = None
        """What checks attention, if it is asked for."""
        self.coverage: Coverage | None = None
        """What measures what the counted layers' memory leaves out, if they have one."""
        if options is not None and options.canary is not None:
            values.observe(CANARY_ERROR, [])
            self.canary = Canary(options, lambda error: values.observe(CANARY_ERROR, [error]))
        self.paused = True
        """Whether steps are made up: those of the warm-up, and those that keep idle data parallel engines in step."""
        self.pending: list[tuple[str, Work, Any, Any]] = []
        """What was timed and whose CUDA events may not have passed yet: phase, work, begin, end."""
        self._values, self._calibration = values, options and options.calibration
        self._smooth_q = options is not None and options.smooth_q
        self._group: list[str] = []
        self._fallback: str | None = None
        self._memory: tuple[Memory, int] | None = None
        """That of the counted layers, and the tokens of their pages."""
        self._steps = dict.fromkeys(PHASES, 0)
        self._group_bytes: dict[tuple[str, ...], np.ndarray] = {}
        # A counter that appears with its first event has no rate at that event.
        for metric in METRICS:
            if metric.kind == "counter":
                for labels in itertools.product(*metric.labels.values()):
                    values.add(metric, 0, *labels)

    def add_layers(
        self,
        names: list[str],
        owners: int,
        layout: Any,
        kv_heads: int,
        heads: int,
        device: torch.device,
        memory: Memory | None = None,
    ) -> None:
        """Tell of a group of layers, of which `owners` have pages of their own, in `layout` (PageLayout), and their memory.

        kv_heads, heads: of one layer in this worker.
        """
        if not self._group or self._group == names:
            # Steps are counted where the first group's metadata are built. A draft model's groups come later.
            self._group = names
            self._memory = None if memory is None else (memory, layout.tokens)
            if memory is not None:
                self.coverage = Coverage(memory, layout.tokens, device, self._add_covered)
                for phase in PHASES:
                    self._values.observe(COVERED, [], phase)
            self._tell_build(layout, heads // kv_heads, device)
        # By name, for vLLM may make a group's metadata builder more than once.
        self._group_bytes[tuple(names)] = np.array([layout.bytes_per_token, 2 * 2 * layout.head_dim]) * (kv_heads * owners)
        token_bytes, bf16_bytes = np.sum(list(self._group_bytes.values()), axis=0).tolist()
        self._values.set(TOKEN_BYTES, token_bytes)
        self._values.set(COMPRESSION, bf16_bytes / token_bytes)

    def _tell_build(self, layout: Any, group: int, device: torch.device) -> None:
        from vllm import __version__ as vllm_version

        from sage_backend import __version__ as version

        kernels, architecture = "torch", platform.machine()
        if device.type == "cuda":
            from sage_kernels import decode, prefill

            own, self._fallback = prefill.choose_kernel(device, layout, group, self._smooth_q)
            kernels = "triton" if own is None and decode.choose_kernel(device, layout) is None else "gluon+triton"
            architecture = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
        chosen = calibration.k_bits(self._calibration).values() if self._calibration else ()
        bits = "_".join(f"int{bits}" for bits in sorted({layout.k_bits, *chosen}))
        page_format = f"k_{bits}_v_e4m3_page{layout.tokens}"
        self._values.set(BUILD, 1, version, vllm_version, page_format, kernels, architecture)

    def step(self, names: list[str], common: Any, num_decodes: int) -> Sample | None:
        """Count a step, of which `common` (CommonAttentionMetadata) was made for the layers `names`.

        Returns what is to be timed of it, if anything.
        """
        if self.paused or names != self._group:
            return None
        self._collect()
        starts = common.query_start_loc_cpu.numpy()
        decode = int(starts[num_decodes])
        prefill = int(starts[-1]) - decode  # unlike num_actual_tokens, without padding
        sampled = []
        for phase, tokens in zip(PHASES, (prefill, decode), strict=True):
            if tokens:
                self._values.add(TOKENS, tokens, phase)
                self._values.add(STEPS, 1, phase)
                self._steps[phase] += 1
                if self._steps[phase] % SAMPLE_EVERY[phase] == 0:
                    sampled.append(phase)
        if prefill and self._fallback:
            self._values.add(FALLBACK_STEPS, 1, self._fallback)
        if common.seq_lens_cpu_upper_bound is None or not (self._memory or sampled):
            return None
        query_lens = np.diff(starts).astype(np.int64)
        seq_lens = common.seq_lens_cpu_upper_bound.numpy().astype(np.int64)
        if self._memory:
            memory, page_tokens = self._memory
            for phase, requests in (("prefill", slice(num_decodes, None)), ("decode", slice(num_decodes))):
                query_block = memory.query_block if phase == "prefill" else 0
                rows = Rows.of(memory, page_tokens, query_lens[requests], seq_lens[requests], query_block)
                counted = {CONTEXT: rows.end, READ: rows.read, SCORED: rows.scored, RECALLED: rows.recalled}
                for metric, numbers in counted.items():
                    self._values.add(metric, int(numbers.sum()), phase)
        if not sampled or self.pending:
            return None
        return Sample(self, names[-1], sampled, num_decodes, query_lens, seq_lens)

    def check(self, names: list[str], common: Any, num_decodes: int) -> Check | None:
        """What is to be held against exact attention of a step (see `step`), if anything."""
        if self.canary is None or self.paused:
            return None
        return self.canary.plan(names, common, num_decodes)

    def add_reading(self, ratio: int) -> None:
        """Count a request that has been given a ratio."""
        if not self.paused:
            self._values.add(READINGS, 1, str(ratio))

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

    def _add_covered(self, phase: str, share: float) -> None:
        self._values.observe(COVERED, [share], phase)

    def add_sample(self, phase: str, work: Work, seconds: float) -> None:
        self._values.add(SAMPLES, 1, phase)
        self._values.add(SECONDS, seconds, phase)
        self._values.add(OPERATIONS, work.operations, phase)
        self._values.add(BYTES, work.bytes, phase)


_current: tuple[str, Recorder | None] = ("", None)


def recorder(config: Any) -> Recorder | None:
    """The recorder of the engine that this worker runs, or None if it has nothing to tell. config: the worker's VllmConfig."""
    global _current
    if _current[0] != config.instance_id:
        values = _open_values(config)
        options = SageOptions.parse(config.additional_config)
        _current = config.instance_id, Recorder(values, options) if values else None
    return _current[1]


@contextmanager
def paused() -> Iterator[None]:
    """Do not count the steps inside, whose requests are made up. Counting begins with the first end of this."""
    if _current[1] is not None:
        _current[1].paused = True
    yield
    if _current[1] is not None:
        _current[1].paused = False
