# SPDX-License-Identifier: Apache-2.0
"""The server's side of `metrics`: what workers wrote, shown at its /metrics beside vLLM's own, or told to Ray."""

import atexit
import functools
import shutil
import struct
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY, Gauge
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from sage_backend.engine.checks import is_chosen
from sage_backend.observability import definitions, sinks
from sage_backend.options import SageOptions

RELAY_SECONDS = 1.0
"""How often what workers wrote is told to Ray."""

_folders: list[Path] = []  # those of engines of this process


@functools.cache
def _show_workers() -> None:
    REGISTRY.register(_Workers())


class _Workers(Collector):
    """The sums of what the workers of this process's engines wrote."""

    def collect(self) -> Iterable[Any]:
        return _written(_folders)


def _written(folders: list[Path], accumulate: bool = True) -> Iterable[Any]:
    """The metrics in these folders, added up over the workers. accumulate: whether a histogram's bucket has what is in those
    below it, too, as Prometheus takes it."""
    return MultiProcessCollector.merge([str(file) for folder in folders for file in folder.glob("*.db")], accumulate)


def export(config: Any) -> None:
    """Show the metrics of an engine of this configuration (VllmConfig), whose processes have not been started yet."""
    from vllm.ray.lazy_utils import is_ray_initialized

    follow_schedulers()
    folder = sinks.directory(config)
    # One that exists is vLLM's, which every API server shows as it is. Workers that are Ray actors tell Ray themselves.
    under_ray = is_ray_initialized()
    if folder.exists() or (under_ray and config.parallel_config.distributed_executor_backend == "ray"):
        return
    folder.mkdir(mode=0o700)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if under_ray:
        relay = Relay(folder, sinks.ray_values(sinks.common_labels(config)))
        threading.Thread(target=relay.run, name="sage-metrics", daemon=True).start()
    else:
        _folders.append(folder)
        _show_workers()


class Relay:
    """Tells Ray what workers write into `folder` that are no Ray actors, as those of a replica on a CPU."""

    def __init__(self, folder: Path, values: sinks.Values) -> None:
        self._folder, self._values = folder, values
        self._told: dict[tuple[str, ...], float] = {}

    def run(self) -> None:
        while self._folder.exists():
            with suppress(OSError, struct.error):  # of a file that is being made or removed just now
                self.tell()
            time.sleep(RELAY_SECONDS)

    def tell(self) -> None:
        """Pass on what was written since the last time."""
        metric_of = {metric.name: metric for metric in definitions.METRICS}
        for sample in (sample for family in _written([self._folder], accumulate=False) for sample in family.samples):
            metric = metric_of.get(sample.name.removesuffix("_bucket"))
            if metric is None:  # the sum of a histogram, of which Ray is told the single values
                continue
            labels = [sample.labels[name] for name in metric.labels]
            if metric.kind == "gauge":
                self._values.set(metric, sample.value, *labels)
                continue
            bound = sample.labels.get("le", "")
            key = (metric.name, bound, *labels)
            grown = sample.value - self._told.get(key, 0.0)
            self._told[key] = sample.value
            if metric.kind == "histogram":  # whose values are known by their buckets
                self._values.observe(metric, [float(bound)] * int(grown), *labels)
            else:
                self._values.add(metric, grown, *labels)


@functools.cache
def follow_schedulers() -> None:
    """Have vLLM's logger of metrics tell how many pages are in use, too, which only schedulers know."""
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    init, record = PrometheusStatLogger.__init__, PrometheusStatLogger.record

    def init_pages(self: Any, vllm_config: Any, engine_indexes: list[int] | None = None) -> None:
        init(self, vllm_config, engine_indexes)
        self.sage_pages = _Pages(self) if is_chosen(vllm_config) else None

    def record_pages(self: Any, scheduler_stats: Any, *args: Any, engine_idx: int = 0, **kwargs: Any) -> None:
        record(self, scheduler_stats, *args, engine_idx=engine_idx, **kwargs)
        if self.sage_pages is not None and scheduler_stats is not None:
            self.sage_pages.set(engine_idx, scheduler_stats.kv_cache_usage)

    PrometheusStatLogger.__init__ = init_pages
    PrometheusStatLogger.record = record_pages


class _Pages:
    """The gauges of pages, for one of vLLM's loggers."""

    def __init__(self, logger: Any) -> None:
        config, kind = logger.vllm_config, logger._gauge_cls
        blocks = config.cache_config.num_gpu_blocks // len(logger.engine_indexes)  # vLLM sums them over engines
        page_tokens = SageOptions.parse(config.additional_config).page_tokens
        # Less the block that stands for none.
        self._total = (blocks - 1) * config.cache_config.block_size // page_tokens
        self._in_use = {}
        for engine, labels in logger.per_engine_labelvalues.items():
            _setter(kind, definitions.PAGES, labels)(self._total)
            self._in_use[engine] = _setter(kind, definitions.PAGES_IN_USE, labels)
            self._in_use[engine](0)

    def set(self, engine: int, usage: float) -> None:
        self._in_use[engine](round(usage * self._total))


def _setter(kind: Any, metric: definitions.Metric, labels: Sequence[Any]) -> Callable[[float], None]:
    """What sets a gauge, Prometheus's or Ray's, whichever one of vLLM's loggers uses itself (`kind` is its class of gauges)."""
    if issubclass(kind, Gauge):
        return _gauge(metric).labels(*labels).set
    return functools.partial(sinks.ray_values(tuple(map(str, labels))).set, metric)


@functools.cache
def _gauge(metric: definitions.Metric) -> Gauge:
    return Gauge(metric.name, metric.text, labelnames=definitions.COMMON_LABELS, multiprocess_mode="mostrecent")
