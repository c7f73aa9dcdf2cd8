# SPDX-License-Identifier: Apache-2.0
"""The canary: what is checked and when, that its errors are right, what it costs, and that it is off unless asked for."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engines import engine, environment, greedy, heldout_prompts
from recording import Event, batch, exported, scraped
from server import Server

from sage_backend.demo import MODEL_DIR
from sage_backend.features import observers
from sage_backend.observability import sinks
from sage_backend.observability.canary import LARGEST, QUERIES, TOKENS, Canary, Check
from sage_backend.observability.recorder import Recorder
from sage_backend.observability.sinks import FileValues
from sage_backend.options import SageOptions
from sage_kernels import Modifiers, reference
from sage_paged import PageLayout

CPU = torch.device("cpu")
LAYERS = ["layers.0", "layers.1", "layers.2"]
GROUPS = (LAYERS[:2], LAYERS[2:])


def made(device: torch.device = CPU, **options: Any) -> tuple[Canary, list[float]]:
    """A canary for two groups of layers (one layer has no keys of its own), and the errors that it reports."""
    errors: list[float] = []
    canary = Canary(SageOptions.parse({"sage": {"canary": 1, **options}}), errors.append)
    canary.add_layers(GROUPS[0], GROUPS[0], device)
    canary.add_layers([*GROUPS[1], "shares keys"], GROUPS[1], device)
    canary.add_layers(GROUPS[0], GROUPS[0], device)  # vLLM may do so twice
    return canary, errors


def planned(canary: Canary, common: Any, num_decodes: int = 0) -> list[Check]:
    plans = [canary.plan(names, common, num_decodes) for names in (GROUPS[0], [*GROUPS[1], "shares keys"])]
    return [plan for plan in plans if plan is not None]


def test_layers_and_heads_take_turns() -> None:
    """Every third step in which a prompt begins is checked, with the next layer or head."""
    canary, _ = made(canary=3)
    turns = []
    for step in range(1, 19):
        assert not planned(canary, batch((1, 9), (1, 1), padded=2), 2), "a step of decodes"
        assert not planned(canary, batch((1, 9), (5, 100)), 1), "a later chunk, or a prompt that is cached in part"
        checks = planned(canary, batch((1, 9), (30, 30)), 1)
        assert len(checks) == (step % 3 == 0)
        turns += [(check.layer, check.check_index) for check in checks]
    assert turns == [(layer, head) for head in (0, 1) for layer in LAYERS]


def test_the_longest_prompt_is_checked() -> None:
    canary, _ = made()
    [check] = planned(canary, batch((2, 2), (20, 20), (40, 40), (300, 301), (30, 30), padded=1), 1)
    assert (check.start, check.tokens) == (22, 40)
    [check] = planned(canary, batch((20, 20), (TOKENS + 1, TOKENS + 1)))
    assert (check.start, check.tokens) == (20, TOKENS)


def test_what_memory_reads_in_part_is_not_checked() -> None:
    """Memory reads up to 3 * 128 tokens here. A longer context would show an error that is not that of quantization."""
    canary, _ = made(memory={"sink_tokens": 128, "local_tokens": 128, "topk_pages": 1})
    [check] = planned(canary, batch((385, 385), (384, 384)))
    assert (check.start, check.tokens) == (385, 384)
    assert not planned(canary, batch((385, 385)))


@pytest.mark.parametrize("mask", [{}, {"window": 20}, {"soft_cap": 3.0}, {"sinks": True}])
def test_error(mask: dict[str, Any]) -> None:
    """The output has a known error, and other requests are in the batch. Heads and rows that are not checked are NaN."""
    start, tokens, heads, kv_heads, head_dim = 7, 100, 6, 3, 64
    query, key, value = (torch.randn(120, n, head_dim).bfloat16() for n in (heads, kv_heads, kv_heads))
    sinks = torch.randn(heads) + 3 if "sinks" in mask else None
    impl = SimpleNamespace(
        num_heads=heads, num_kv_heads=kv_heads, scale=0.2, window=mask.get("window", 0),
        soft_cap=mask.get("soft_cap", 0.0), sinks=sinks,
    )  # fmt: skip
    prompt = slice(start, start + tokens)
    modifiers = Modifiers(impl.window, impl.soft_cap, sinks)
    exact = reference.exact_attention(query[prompt], key[prompt], value[prompt], impl.scale, modifiers)
    out = torch.full(query.shape, torch.nan)
    checked = slice(start + tokens - QUERIES, start + tokens)
    out[checked, 2:4] = exact[-QUERIES:, 2:4] * 1.25
    canary, errors = made()
    Check(canary, "any", 4, start, tokens).compare(impl, query, key, value, out)
    assert errors == [pytest.approx(0.25, rel=1e-4)]


@pytest.mark.parametrize(("out", "error"), [(float("nan"), LARGEST), (float("inf"), LARGEST), (1e30, LARGEST), (0.0, 1.0)])
def test_every_error_is_a_number(out: float, error: float) -> None:
    impl = SimpleNamespace(num_heads=1, num_kv_heads=1, scale=0.1, window=0, soft_cap=0.0, sinks=None)
    x = torch.randn(30, 1, 64)
    canary, errors = made()
    Check(canary, "any", 0, 0, 30).compare(impl, x, x, x, torch.full_like(x, out))
    assert errors == [pytest.approx(error)]


def test_nothing_of_nothing_is_no_error() -> None:
    impl = SimpleNamespace(num_heads=1, num_kv_heads=1, scale=0.1, window=0, soft_cap=0.0, sinks=None)
    zeros = torch.zeros(30, 1, 64)
    canary, errors = made()
    Check(canary, "any", 0, 0, 30).compare(impl, zeros, zeros, zeros, zeros)
    assert errors == [0.0]


def test_the_device_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error is reported in the first step that finds it computed, and nothing else is checked until then."""
    Event.made = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    canary, errors = made(torch.device("cuda"))
    canary.put(torch.tensor(0.5))
    [event] = Event.made
    for _ in range(3):
        assert not planned(canary, batch((30, 30)))
    assert not errors
    event.passed = True
    assert planned(canary, batch((30, 30)))
    planned(canary, batch((1, 30)), 1)
    assert errors == [0.5]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_device_is_not_waited_for_on_a_gpu() -> None:
    """torch raises an error if a call synchronizes."""
    impl = SimpleNamespace(num_heads=4, num_kv_heads=2, scale=0.1, window=20, soft_cap=3.0, sinks=torch.randn(4).cuda())
    query, key, value = (torch.randn(600, n, 64, device="cuda").bfloat16() for n in (4, 2, 2))
    canary, errors = made(torch.device("cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        [check] = planned(canary, batch((600, 600)))
        check.compare(impl, query, key, value, torch.zeros_like(query))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    canary.collect()
    assert errors == [pytest.approx(1.0)]


def recorder(folder: Path, **options: Any) -> Recorder:
    recorder = Recorder(FileValues(folder, "sage-1", ("a model", "0")), SageOptions.parse({"sage": options}))
    recorder.add_layers(LAYERS, LAYERS[-1], PageLayout(64), 2, 4, CPU)
    recorder.paused = False
    return recorder


def test_off_unless_asked_for(tmp_path: Path) -> None:
    asked_nothing = recorder(tmp_path)
    assert asked_nothing.canary is None
    assert asked_nothing.check(LAYERS, batch((30, 30)), 0) is None
    assert not [name for name, *_ in scraped(tmp_path) if "canary" in name]


def test_histogram(tmp_path: Path) -> None:
    """It exists before the first error, because a rate needs a start. Warm-up steps are not checked."""
    asked = recorder(tmp_path, canary=1)
    assert asked.canary is not None
    asked.canary.add_layers(LAYERS, LAYERS, CPU)
    assert scraped(tmp_path)[("sage_canary_relative_error_count",)] == 0
    assert asked.check(LAYERS, batch((30, 30)), 0) is not None
    asked.paused = True
    assert asked.check(LAYERS, batch((30, 30)), 0) is None
    for error in (0.015, 0.02, 0.45, LARGEST):
        asked.canary.put(torch.tensor(error, dtype=torch.float64).float())
    values = scraped(tmp_path)
    assert values[("sage_canary_relative_error_sum",)] == pytest.approx(0.015 + 0.02 + 0.45 + LARGEST)
    below = {bound: count for (name, *bound), count in values.items() if name.endswith("_bucket") for bound in bound}
    assert [below[bound] for bound in ("0.01", "0.02", "0.3", "0.5", "1.0", "2.0", "+Inf")] == [0, 2, 2, 3, 3, 4, 4]


def seconds(tokens: int) -> float:
    """Seconds for a check of a prompt of this many tokens, in the shape of the embedded model."""
    impl = SimpleNamespace(num_heads=4, num_kv_heads=2, scale=0.1, window=0, soft_cap=0.0, sinks=None)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    query, key, value = (torch.randn(tokens, n, 128, device=device, dtype=torch.bfloat16) for n in (4, 2, 2))
    canary, errors = made(device)
    clock = time.perf_counter if device.type == "cuda" else time.thread_time  # without the time of other processes
    taken = []
    for _ in range(30):
        began = clock()
        [check] = planned(canary, batch((tokens, tokens)))
        check.compare(impl, query, key, value, query)
        while canary._readout.pending:  # type: ignore[union-attr]
            canary.collect()
        taken.append(clock() - began)
    assert len(errors) == len(taken)
    return sorted(taken)[len(taken) // 4]


@pytest.mark.engine
@pytest.mark.usefixtures("one_thread")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's step of this small model is no measure for the check")
def test_overhead(server: Server) -> None:
    """A check takes about as long for a long prompt as for a short one, and under 2% of the step of the short one, which is
    just long enough to be checked in full. Prints what it measured (pytest -s)."""

    def prefills() -> tuple[float, float]:
        samples = exported(server, "vllm:request_prefill_time_seconds_")
        total, count = (samples[f"vllm:request_prefill_time_seconds_{each}"][0].value for each in ("sum", "count"))
        return total, count

    before = prefills()
    for i in range(5):
        usage = server.post("/v1/completions", prompt=[20 + i] + [30] * (TOKENS - 1), max_tokens=1)["usage"]
        assert usage["prompt_tokens"] == TOKENS
    after = prefills()
    step = (after[0] - before[0]) / (after[1] - before[1])
    short, long = seconds(TOKENS), seconds(64 * TOKENS)
    print(f"{short * 1e6:.0f} us, of a long prompt {long * 1e6:.0f} us; {short / step:.2%} of a step of {step * 1e3:.1f} ms")
    assert long < 3 * short
    assert short < 0.02 * step


class HeadErrors:
    """Errors of each KV head of a layer, of the last prompt."""

    def __init__(self, impl: Any, bits: int) -> None:
        self.formats = [(bits, 8)]
        self.impl, self.group = impl, impl.num_heads // impl.num_kv_heads
        self.stored_last: tuple[torch.Tensor, ...] = ()
        self.relative: list[float] = []

    def stored(self, *args: torch.Tensor) -> None:
        self.stored_last = args

    def attended(self, query: torch.Tensor, out: torch.Tensor) -> None:
        key, value, slots = self.stored_last
        if len(query) < TOKENS:
            return
        self.relative = []
        for head in range(self.impl.num_kv_heads):
            kv, heads = slice(head, head + 1), slice(head * self.group, (head + 1) * self.group)
            of_head = observers.PageErrors(self.impl, self.impl.calibration.heads(kv), self.formats)
            of_head.stored(key[:, kv], value[:, kv], slots)
            of_head.attended(query[:, heads], out[:, heads])
            self.relative.append((of_head.squares[self.formats[0]] / of_head.squares["exact"]) ** 0.5)


@pytest.mark.engine
@pytest.mark.parametrize("bits", [8, 4])
def test_engine(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each prompt is checked, and its error is what a calibration finds for the same queries, with either kind of page."""
    from sage_backend.engine.impl import SageImpl

    monkeypatch.setattr(observers, "_ERROR_QUERIES", QUERIES)
    found, known = [], []
    with engine(f"SAGE:canary=1,k_bits={bits}") as llm:
        context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        impls = [layer.impl for layer in context.values() if isinstance(getattr(layer, "impl", None), SageImpl)]
        for impl in impls:
            impl.observer = HeadErrors(impl, bits)
        folder = sinks.directory(llm.llm_engine.vllm_config)
        # Each layer and KV head is checked once. A repeated prompt is cached in part, and not checked.
        prompts = heldout_prompts(llm, [TOKENS] * len(impls) * impls[0].num_kv_heads)
        for i, prompt in enumerate(prompts):
            greedy(llm, [prompt], tokens=2)
            found.append(scraped(folder)[("sage_canary_relative_error_sum",)])
            head, layer = divmod(i, len(impls))
            known.append(impls[layer].observer.relative[head])
        greedy(llm, [prompts[0]], tokens=2)
        assert scraped(folder)[("sage_canary_relative_error_count",)] == len(prompts)
    print(f"errors {np.diff(found, prepend=0)}, known {known}")
    assert np.diff(found, prepend=0).tolist() == pytest.approx(known, rel=0.05)
    assert (0.01 if bits == 8 else 0.03) < np.mean(known) < (0.03 if bits == 8 else 0.08)


@pytest.mark.parametrize("value", [0, -1, True, 1.0, "1", None, {}])
def test_refused_options(value: Any) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared
        SageOptions.parse({"sage": {"canary": value}})
    place = 'option "canary" in --additional-config "sage"'
    assert str(caught.value) == f"{place} is {value!r}; it can be a number of steps from 1 on"


def test_it_is_refused_without_metrics() -> None:
    with environment():
        from vllm.engine.arg_utils import EngineArgs

        from sage_backend import plugin

        plugin.register()
        arguments = {"attention_backend": "SAGE", "enforce_eager": True, "additional_config": {"sage": {"canary": 100}}}
        EngineArgs(str(MODEL_DIR), **arguments).create_engine_config()
        with pytest.raises(ValueError, match="and --disable-log-stats turns metrics off; leave one of them out"):
            EngineArgs(str(MODEL_DIR), disable_log_stats=True, **arguments).create_engine_config()
