# SPDX-License-Identifier: Apache-2.0
"""Sinks of metric values: files that a server reads, or Ray.

Workers serve no HTTP. The first worker of each engine keeps its values in files of prometheus_client's multiprocess format,
which `exporter` exports at the server's /metrics. Under Ray Serve, where no server of vLLM's is scraped, it reports them to
Ray. The other workers of an engine attend to the same tokens, with other heads or layers, and have nothing to add.
"""

import functools
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sage_backend.observability.definitions import COMMON_LABELS, METRICS, Metric


def directory(config: Any) -> Path:
    """The folder in which an engine of this configuration (VllmConfig) keeps its values, if it exists.

    Several API servers share a folder of vLLM's, which each of them exports. A single server makes its own.
    """
    shared = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    # The number is the time at which the configuration was made, in ns, and goes with it to all processes. Data parallel
    # engines under Ray append their rank.
    return Path(shared) if shared else Path(tempfile.gettempdir()) / f"sage-metrics-{config.instance_id.partition('_')[0]}"


def common_labels(config: Any) -> tuple[str, str]:
    """The values of COMMON_LABELS for an engine of this configuration (VllmConfig)."""
    return config.model_config.served_model_name, str(config.parallel_config.data_parallel_index)


class Values(Protocol):
    """A sink. labels: the values of the metric's own labels, in their order."""

    def add(self, metric: Metric, amount: float, *labels: str) -> None: ...

    def set(self, metric: Metric, value: float, *labels: str) -> None: ...

    def observe(self, metric: Metric, values: Sequence[float], *labels: str) -> None: ...


class FileValues:
    """Values in files that another process reads while they are written: an addition is a store into mapped memory."""

    def __init__(self, folder: Path, writer: str, common: Sequence[str]) -> None:
        """writer: a name, without underscores, that no other process and no other engine of this one has."""
        # It chooses its storage when it is imported, by a variable that vLLM sets after loading plugins.
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
        """Without values, an empty histogram is exported."""
        from prometheus_client.utils import floatToGoString  # see __init__

        bounds = np.array((*metric.buckets, np.inf))
        counts = np.bincount(np.searchsorted(bounds, values), minlength=len(bounds))
        for bound, count in zip(bounds.tolist(), counts.tolist(), strict=True):  # not cumulative; the reader adds up
            _grow(self._histograms, self._key(metric, labels, "_bucket", floatToGoString(bound)), count)
        _grow(self._histograms, self._key(metric, labels, "_sum"), sum(values))

    def _key(self, metric: Metric, labels: tuple[str, ...], suffix: str = "", bound: str = "") -> str:
        """suffix, bound: for a histogram, the suffix of the series, and the upper bound of a bucket."""
        key = self._keys.get((metric.name, suffix, bound, *labels))
        if key is None:
            from prometheus_client.mmap_dict import mmap_key  # see __init__

            own = dict(zip((*COMMON_LABELS, *metric.labels), (*self._common, *labels), strict=True))
            own |= {"le": bound} if bound else {}
            key = mmap_key(metric.name.removesuffix("_total"), metric.name + suffix, list(own), list(own.values()), metric.text)
            self._keys[(metric.name, suffix, bound, *labels)] = key
        return key


def _grow(numbers: Any, key: str, amount: float) -> None:
    value, _ = numbers.read_value(key)
    numbers.write_value(key, value + amount, 0.0)


REPEAT_SECONDS = 1.0
"""Seconds after which gauges are set again: Ray drops a gauge that was not set in its last two reports."""


class RayValues:
    """Values in Ray's own metrics, for a process that is a Ray actor: a worker, or a replica of Ray Serve."""

    def __init__(self, common: Sequence[str]) -> None:
        from ray.util import metrics as ray  # an optional package

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
    """The sink of this process for these values of COMMON_LABELS."""
    return RayValues(common)


def open_values(config: Any) -> Values | None:
    """This worker's sink, or None if there is no exporter or another worker of the engine reports."""
    if config.parallel_config.rank != 0:
        return None
    common = common_labels(config)
    folder = directory(config)
    if folder.is_dir():
        return FileValues(folder, f"sage-{os.getpid()}-{config.instance_id.replace('_', '-')}", common)
    from vllm.ray.lazy_utils import is_in_ray_actor  # not at the top, for tests without vLLM

    return ray_values(common) if is_in_ray_actor() else None
