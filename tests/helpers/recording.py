# SPDX-License-Identifier: Apache-2.0
"""Steps for a recorder of metrics, events in place of CUDA's, and what a scrape shows."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families
from server import Server

from sage_backend.observability.definitions import COMMON_LABELS


def scraped(folder: Path) -> dict[tuple[str, ...], float]:
    """What a scrape of `folder` shows, by name and own labels."""
    samples = (sample for family in MultiProcessCollector.merge(map(str, folder.glob("*.db"))) for sample in family.samples)
    common = set(COMMON_LABELS)
    return {(s.name, *(value for name, value in s.labels.items() if name not in common)): s.value for s in samples}


def batch(*requests: tuple[int, int], padded: int = 0) -> Any:
    """The part of CommonAttentionMetadata that is read: requests of (query tokens, tokens in all), then padding."""
    query_lens, seq_lens = zip(*requests, *[(0, 0)] * padded, strict=True)
    return SimpleNamespace(
        query_start_loc_cpu=torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        seq_lens_cpu_upper_bound=torch.tensor(seq_lens, dtype=torch.int32),
    )


class Event:
    """A CUDA event that has passed once a test sets `passed`. It cannot be waited for."""

    made: list["Event"]

    def __init__(self, enable_timing: bool = False) -> None:
        self.passed = False
        self.made.append(self)

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return self.passed

    def elapsed_time(self, end: "Event") -> float:
        assert end.passed
        return 3.0  # ms


def exported(server: Server, prefix: str = "sage_") -> dict[str, list[Any]]:
    """The samples of metrics whose names begin with `prefix`, by name."""
    samples: dict[str, list[Any]] = {}
    for family in text_string_to_metric_families(server.read("/metrics")):
        for sample in family.samples:
            if sample.name.startswith(prefix):
                samples.setdefault(sample.name, []).append(sample)
    return samples
