# SPDX-License-Identifier: Apache-2.0
"""The observer of a step: what reaches metrics, coverage, the canary and calibration, and that without them nothing does."""

from types import SimpleNamespace
from typing import Any

import torch

from sage_backend.observability.observer import NOT_OBSERVED, StepObserver

CPU = torch.device("cpu")


class Recording:
    """Records the calls of methods, whatever they are called."""

    def __init__(self, calls: list[tuple[Any, ...]], **attributes: Any) -> None:
        self._calls = calls
        vars(self).update(attributes)

    def __getattr__(self, name: str) -> Any:
        return lambda *args: self._calls.append((name, *args))


def layer(name: str, observer: Any = None) -> Any:
    """vLLM's Attention with a SageImpl."""
    return SimpleNamespace(layer_name=name, impl=SimpleNamespace(observer=observer, memory_of=lambda layer: "memory"))


def tables(name: str) -> Any:
    return SimpleNamespace(block_table=f"{name} table", seq_lens=f"{name} lengths", query_start_loc=f"{name} starts")


def test_nothing_is_observed() -> None:
    """Then the layer's name is not read: not every caller has one."""
    anonymous, impl, nothing = SimpleNamespace(), SimpleNamespace(observer=None), torch.empty(0)
    with NOT_OBSERVED.timed("decode", anonymous, CPU):
        NOT_OBSERVED.selected("decode", anonymous, nothing, nothing, tables("batch"), tables("selected"), None)
    NOT_OBSERVED.attended(anonymous, impl, nothing, nothing, nothing, nothing)


def test_calibration_sees_every_layer() -> None:
    calls: list[tuple[Any, ...]] = []
    observed = layer("a", Recording(calls))
    query, out = torch.randn(3, 2, 64), torch.empty(3, 2, 64)
    StepObserver().attended(observed, observed.impl, query, query, query, out)
    assert calls == [("attended", query, out)]


def test_the_canary_sees_its_layer_only() -> None:
    calls: list[tuple[Any, ...]] = []
    observer = StepObserver(check=Recording(calls, layer="b"))  # type: ignore[arg-type]
    query, key, value, out = (torch.randn(3, 2, 64) for _ in range(4))
    for name in ("a", "b", "c"):
        asked = layer(name)
        observer.attended(asked, asked.impl, query, key, value, out)
        if name == "b":
            assert calls == [("compare", asked.impl, query, key, value, out)]
    assert len(calls) == 1


def test_a_sample_times_its_layer_and_gets_page_lists() -> None:
    calls: list[tuple[Any, ...]] = []

    class Sample(Recording):
        layer = "b"

        def timed(self, *args: Any) -> Any:
            calls.append(("timed", *args))
            return SimpleNamespace(__enter__=None)

    observer = StepObserver(sample=Sample(calls))  # type: ignore[arg-type]
    with observer.timed("decode", layer("a"), CPU):
        pass
    assert not calls
    sampled = layer("b")
    observer.timed("decode", sampled, CPU)
    assert calls.pop() == ("timed", "decode", sampled.impl, "memory", CPU)
    query, pages, anchor = torch.empty(1), torch.empty(2), torch.empty(3)
    batch, selected = tables("batch"), tables("selected")
    observer.selected("prefill", sampled, query, pages, batch, selected, anchor)
    assert calls == [("cover", "prefill", sampled, query, pages, batch, selected, anchor)]
