# SPDX-License-Identifier: Apache-2.0
"""The server's side: exports what workers wrote at its /metrics, with vLLM's own metrics, or to Ray."""

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

from sage_backend.observability import definitions, sinks
from sage_backend.options import SageOptions

RELAY_SECONDS = 1.0
"""Seconds between two exports to Ray."""

_folders: list[Path] = []  # those of engines of this process


@functools.cache
def _register_workers() -> None:
    REGISTRY.register(_Workers())


class _Workers(Collector):
    """The sums of what the workers of this process's engines wrote."""

    def collect(self) -> Iterable[Any]:
        return _written(_folders)


def _written(folders: list[Path], accumulate: bool = True) -> Iterable[Any]:
    """The metrics in these folders, summed over the workers. accumulate: whether buckets of histograms are cumulative, as
    Prometheus takes them."""
    return MultiProcessCollector.merge([str(file) for folder in folders for file in folder.glob("*.db")], accumulate)


def export(config: Any) -> None:
    """Export the metrics of an engine of this configuration (VllmConfig), whose processes have not been started yet."""
    from vllm.ray.lazy_utils import is_ray_initialized  # not at the top, for tests that export without vLLM

    folder = sinks.directory(config)
    # If the folder exists, it is vLLM's, which every API server exports. Workers that are Ray actors report to Ray themselves.
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
        _register_workers()


class Relay:
    """Reports to Ray what workers write into `folder` that are no Ray actors themselves, such as those of a replica on a
    CPU."""

    def __init__(self, folder: Path, values: sinks.Values) -> None:
        self._folder, self._values = folder, values
        self._reported: dict[tuple[str, ...], float] = {}

    def run(self) -> None:
        while self._folder.exists():
            with suppress(OSError, struct.error):  # of a file that is being made or removed just now
                self.report()
            time.sleep(RELAY_SECONDS)

    def report(self) -> None:
        """Report what was written since the last call."""
        metric_of = {metric.name: metric for metric in definitions.METRICS}
        for sample in (sample for family in _written([self._folder], accumulate=False) for sample in family.samples):
            metric = metric_of.get(sample.name.removesuffix("_bucket"))
            if metric is None:  # the sum of a histogram, which Ray computes from single values
                continue
            labels = [sample.labels[name] for name in metric.labels]
            if metric.kind == "gauge":
                self._values.set(metric, sample.value, *labels)
                continue
            bound = sample.labels.get("le", "")
            key = (metric.name, bound, *labels)
            grown = sample.value - self._reported.get(key, 0.0)
            self._reported[key] = sample.value
            if metric.kind == "histogram":  # each value stands for the bound of its bucket
                self._values.observe(metric, [float(bound)] * int(grown), *labels)
            else:
                self._values.add(metric, grown, *labels)


class Pages:
    """The gauges of pages for one of vLLM's loggers (PrometheusStatLogger)."""

    def __init__(self, logger: Any) -> None:
        config, kind = logger.vllm_config, logger._gauge_cls
        blocks = config.cache_config.num_gpu_blocks // len(logger.engine_indexes)  # vLLM sums them over engines
        page_tokens = SageOptions.parse(config.additional_config).page_tokens
        # One block is vLLM's null block.
        self._total = (blocks - 1) * config.cache_config.block_size // page_tokens
        self._in_use = {}
        for engine, labels in logger.per_engine_labelvalues.items():
            _setter(kind, definitions.PAGES, labels)(self._total)
            self._in_use[engine] = _setter(kind, definitions.PAGES_IN_USE, labels)
            self._in_use[engine](0)

    def set(self, engine: int, usage: float) -> None:
        """usage: the fraction of the KV cache in use."""
        self._in_use[engine](round(usage * self._total))


def _setter(kind: Any, metric: definitions.Metric, labels: Sequence[Any]) -> Callable[[float], None]:
    """A function that sets a gauge, of Prometheus or of Ray, as vLLM's logger uses itself. kind: the logger's class of
    gauges."""
    if issubclass(kind, Gauge):
        return _gauge(metric).labels(*labels).set
    return functools.partial(sinks.ray_values(tuple(map(str, labels))).set, metric)


@functools.cache
def _gauge(metric: definitions.Metric) -> Gauge:
    return Gauge(metric.name, metric.text, labelnames=definitions.COMMON_LABELS, multiprocess_mode="mostrecent")
