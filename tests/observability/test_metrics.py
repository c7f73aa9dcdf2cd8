# SPDX-License-Identifier: Apache-2.0
"""What is counted, what is exported, and that docs/operator/metrics.md says so."""

import pickle
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engines import environment
from prometheus_client import REGISTRY, CollectorRegistry
from recording import Event, batch, exported, scraped
from server import Server

from sage_backend import plugin
from sage_backend.engine.patches import pages_gauge
from sage_backend.observability import definitions, exporter, sinks
from sage_backend.observability import recorder as recording
from sage_backend.observability.definitions import COMMON_LABELS, METRICS, SAMPLE_EVERY, Metric
from sage_backend.observability.recorder import Recorder
from sage_backend.observability.sinks import FileValues
from sage_backend.observability.work import QueryBlocks, Work
from sage_backend.options import SageOptions
from sage_kernels import KernelChoice, PagedBatch, reference
from sage_paged import Memory, PageLayout

ROOT = Path(__file__).resolve().parents[2]
LAYERS = ["layers.0", "layers.1"]
TOKEN_BYTES = 2 * 2 * (64 + 64 + 8)
IMPL = SimpleNamespace(
    num_heads=4, num_kv_heads=2, head_size=64, window=0, layout=PageLayout(64), memory_of=lambda layer: None
)


def config(rank: int = 0) -> Any:
    """The part of a VllmConfig that is read."""
    return SimpleNamespace(
        instance_id=str(time.time_ns()),
        additional_config={},
        parallel_config=SimpleNamespace(rank=rank, data_parallel_index=1, distributed_executor_backend="mp"),
        model_config=SimpleNamespace(served_model_name="a model"),
    )


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    recorder = Recorder(FileValues(tmp_path, "sage-1", ("a model", "0")))
    recorder.add_layers(LAYERS, LAYERS[-1], PageLayout(64), 2, 4, torch.device("cpu"))
    recorder.paused = False
    return recorder


def documented() -> list[tuple[str, str, frozenset[str]]]:
    """Name, kind and labels of every row of the table."""
    text = (ROOT / "docs" / "operator" / "metrics.md").read_text()
    rows = re.findall(r"^\| `(sage_\w+)` +\| (\w+) +\| (.*?) +\|", text, re.MULTILINE)
    return [(name, kind, frozenset(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows]


def test_the_table_is_what_the_code_has() -> None:
    assert documented() == [(metric.name, metric.kind, frozenset(metric.labels)) for metric in METRICS]


@pytest.mark.parametrize("window", [0, 1, 5, 100])
@pytest.mark.parametrize(("query_len", "seq_len"), [(1, 1), (1, 40), (7, 7), (7, 40), (40, 40)])
def test_work(window: int, query_len: int, seq_len: int) -> None:
    """Compared with counting one by one."""
    seen = [range(max(0, at - window + 1) if window else 0, at + 1) for at in range(seq_len - query_len, seq_len)]
    impl = SimpleNamespace(**{**vars(IMPL), "window": window})
    work = Work.of(impl, np.array([query_len, 0]), np.array([seq_len, 0]))
    assert work.operations == 2 * 2 * 4 * 64 * sum(map(len, seen))
    assert work.bytes == 2 * PageLayout(64).bytes_per_token * len(set().union(*seen))


@pytest.mark.parametrize("query_block", [0, 64])
@pytest.mark.parametrize("lengths", [(1, 1), (1, 900), (70, 900), (200, 200), (333, 1234)])
def test_rows_are_those_that_are_read(lengths: tuple[int, int], query_block: int) -> None:
    """Compared with the specification."""
    queries, tokens = lengths
    layout, memory = PageLayout(64, tokens=64, has_summary=True), Memory(70, 130, 3, 64)
    starts, ends = torch.tensor([0, queries, queries]), torch.tensor([tokens, 0])
    query, table = torch.randn(queries, 1, 64), torch.arange(20).expand(2, -1)
    requests = PagedBatch(table, ends, starts)
    lists = reference.select_pages(query, layout.empty(20, 1), layout, requests, memory, query_block)
    rows = QueryBlocks.of(memory, 64, np.array([queries, 0]), np.array([tokens, 0]), query_block)
    own = torch.tensor([1, 3], dtype=torch.int32)
    fewer = reference.select_pages(query, layout.empty(20, 1), layout, replace(requests, topk_pages=own), memory, query_block)
    rows_of_own = QueryBlocks.of(memory, 64, np.array([queries, 0]), np.array([tokens, 0]), query_block, own.numpy())
    assert rows_of_own.read.tolist() == [length for length in fewer.seq_lens.tolist() if length]
    read = [length for length in lists.seq_lens.tolist() if length]
    assert rows.read.tolist() == read
    assert (rows.end - rows.first).tolist() == [n for n in lists.query_start_loc.diff().tolist() if n]
    impl = SimpleNamespace(**{**vars(IMPL), "window": 0})
    pairs = sum(n * length - n * (n - 1) // 2 for n, length in zip(rows.end - rows.first, read, strict=True))
    assert Work.of(impl, np.array([queries]), np.array([tokens]), rows).operations == 4 * 4 * 64 * pairs
    assert rows.recalled.tolist() == [3 if scored else 0 for scored in rows.scored]
    assert rows.scored.any() == (tokens >= 900)


def test_memory_is_counted(tmp_path: Path) -> None:
    recorder = Recorder(FileValues(tmp_path, "sage-1", ("a model", "0")))
    memory = Memory(64, 130, 3, 64)
    recorder.add_layers(LAYERS, LAYERS[-1], PageLayout(64, tokens=64, has_summary=True), 2, 4, torch.device("cpu"), memory)
    recorder.paused = False
    recorder.step(LAYERS, batch((1, 1000), (1, 100)), 2)
    values = scraped(tmp_path)
    assert values["sage_memory_context_tokens_total", "decode"] == 1100
    assert values["sage_memory_read_tokens_total", "decode"] == 4 * 64 + 1000 - 13 * 64 + 100
    assert values["sage_memory_scored_pages_total", "decode"] == 12
    assert values["sage_memory_recalled_pages_total", "decode"] == 3
    assert values["sage_memory_context_tokens_total", "prefill"] == 0


def test_memory_is_counted_in_the_layers_that_have_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layers of a model may have a sliding window. They are counted and timed, and others' coverage is measured."""
    monkeypatch.setitem(SAMPLE_EVERY, "decode", 1)
    recorder = Recorder(FileValues(tmp_path, "sage-1", ("a model", "0")))
    layout, whole = PageLayout(64, tokens=64, has_summary=True), ["full.0", "full.1"]
    recorder.add_layers(LAYERS, LAYERS[-1], layout, 2, 4, torch.device("cpu"))
    recorder.add_layers(whole, "full.0", layout, 2, 4, torch.device("cpu"), Memory(64, 130, 3, 64))
    recorder.add_layers(["a drafter's"], "a drafter's", layout, 2, 4, torch.device("cpu"), Memory(64, 130, 3, 64))
    assert recorder.coverage is not None
    recorder.paused = False
    first, second, third = (recorder.step(names, batch((1, 1000)), 1) for names in (LAYERS, whole, ["a drafter's"]))
    assert first is not None
    assert second is not None
    assert third is None
    assert (first.layer, first.times, second.layer, second.times) == (LAYERS[-1], True, "full.0", False)
    for sample in (first, second):
        with recording.timed(sample, "decode", SimpleNamespace(layer_name=sample.layer, impl=IMPL), torch.device("cpu")):
            pass
    values = scraped(tmp_path)
    assert values["sage_memory_context_tokens_total", "decode"] == 1000
    assert values["sage_attention_steps_total", "decode"] == values["sage_attention_samples_total", "decode"] == 1


def test_steps(recorder: Recorder, tmp_path: Path) -> None:
    recorder.step(LAYERS, batch((1, 10), (2, 20), (30, 30), padded=3), 2)
    recorder.step(LAYERS, batch((1, 11), padded=1), 2)
    recorder.step(["another group"], batch((1, 11)), 1)
    recorder.paused = True
    recorder.step(LAYERS, batch((1, 12)), 1)
    values = scraped(tmp_path)
    assert values["sage_attended_tokens_total", "decode"] == 4
    assert values["sage_attended_tokens_total", "prefill"] == 30
    assert values["sage_attention_steps_total", "decode"] == 2
    assert values["sage_attention_steps_total", "prefill"] == 1
    assert values["sage_fallback_steps_total", "gluon_missing"] == 0


def test_prompts_that_get_a_slower_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason is smoothed queries. The recorder knows of them from the engine's options."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    choices = {True: KernelChoice("portable", "hopper", "smooth_q"), False: KernelChoice("hopper", "hopper")}
    monkeypatch.setattr(recording, "choose_kernels", lambda *which: choices[which[-1]])
    for smooth_q in (True, False):
        values = FileValues(tmp_path, f"sage-{int(smooth_q)}", ("a model", "0"))
        recorder = Recorder(values, SageOptions(smooth_q=smooth_q))
        recorder.add_layers(LAYERS, LAYERS[-1], PageLayout(64), 2, 4, torch.device("cuda"))
        recorder.paused = False
        recorder.step(LAYERS, batch((1, 10), (20, 20)), 1)
        recorder.step(LAYERS, batch((1, 11)), 1)
        found = {labels[0]: value for (name, *labels), value in scraped(tmp_path).items() if name.startswith("sage_fallback")}
        assert found == {"gluon_missing": 0, "page_format": 0, "smooth_q": 1}


def test_one_layer_is_timed_now_and_then(recorder: Recorder, tmp_path: Path) -> None:
    """It is timed in one phase only. The recorded work is that of the phase's share of the batch."""
    for _ in range(SAMPLE_EVERY["decode"] - 1):
        assert recorder.step(LAYERS, batch((1, 10)), 1) is None
    sample = recorder.step(LAYERS, batch((1, 10), (4, 20)), 1)
    for name in LAYERS:
        for phase in definitions.PHASES:
            with recording.timed(sample, phase, SimpleNamespace(layer_name=name, impl=IMPL), torch.device("cpu")):
                time.sleep(0.01)
    values, work = scraped(tmp_path), Work.of(IMPL, np.array([1]), np.array([10]))
    assert values["sage_attention_samples_total", "decode"] == 1
    assert values["sage_attention_samples_total", "prefill"] == 0
    assert values["sage_attention_sampled_operations_total", "decode"] == work.operations
    assert values["sage_attention_sampled_bytes_total", "decode"] == work.bytes
    assert 0.01 <= values["sage_attention_sampled_seconds_total", "decode"] < 1


def test_the_device_is_not_waited_for(recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample is counted in the first step that finds it done, and no other is taken until then."""
    Event.made = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    for _ in range(3 * SAMPLE_EVERY["decode"]):
        if sample := recorder.step(LAYERS, batch((1, 10)), 1):
            layer = SimpleNamespace(layer_name=LAYERS[-1], impl=IMPL)
            with recording.timed(sample, "decode", layer, torch.device("cuda")):
                pass
    assert len(Event.made) == 2
    assert scraped(tmp_path)["sage_attention_samples_total", "decode"] == 0
    for event in Event.made:
        event.passed = True
    recorder.step(LAYERS, batch((1, 10)), 1)
    assert scraped(tmp_path)["sage_attention_samples_total", "decode"] == 1
    assert scraped(tmp_path)["sage_attention_sampled_seconds_total", "decode"] == 0.003


def keys_and_values(kv_heads: int, head_size: int, block_size: int) -> Any:
    """The part of a layer's KVCacheSpec that is read."""
    return SimpleNamespace(num_kv_heads=kv_heads, head_size=head_size, head_size_v=head_size, block_size=block_size)


def cache(block_bytes: int, *groups: tuple[list[str], Any]) -> Any:
    """The part of a KVCacheConfig that is read. Layers that are called "shared" have no pages of their own."""
    owners = [name for names, _ in groups for name in names if name != "shared"]
    return SimpleNamespace(
        num_blocks=10,
        kv_cache_tensors=[SimpleNamespace(size=10 * block_bytes, layers=owners)],
        kv_cache_groups=[SimpleNamespace(layer_names=names, kv_cache_spec=spec) for names, spec in groups],
    )


def test_bytes_of_a_token(recorder: Recorder, tmp_path: Path) -> None:
    """Layers of all kinds count, and so does padding. Shared keys and values count once, states of Mamba layers never."""
    drafter = keys_and_values(1, 128, 128)
    together = SimpleNamespace(block_size=128, kv_cache_specs={"a": keys_and_values(2, 64, 128), "drafter": drafter})
    mamba = SimpleNamespace(block_size=128)
    recorder.set_cache(
        cache(128 * 900, (["a", "drafter", "shared"], together), (["b"], keys_and_values(4, 64, 256)), (["c"], mamba))
    )
    values = scraped(tmp_path)
    assert values[("sage_kv_bytes_per_token",)] == 900 + 450
    assert values[("sage_kv_compression_ratio",)] == 2 * 2 * (2 * 64 + 128 + 4 * 64) / (900 + 450)


def test_the_build_is_that_of_the_first_group(recorder: Recorder, tmp_path: Path) -> None:
    recorder.add_layers(["others"], "others", PageLayout(128, k_bits=4), 1, 4, torch.device("cpu"))
    [build] = [key for key in scraped(tmp_path) if key[0] == "sage_build_info"]
    assert {"k_int8_v_e4m3_page128", "torch"} < set(build)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    monkeypatch.setattr(exporter, "_folders", list(exporter._folders))
    monkeypatch.setattr(recording, "_current", ("", None))
    with environment():
        yield tmp_path


def write(config: Any, tokens: int) -> None:
    recorder = recording.recorder(config)
    assert recorder is not None
    recorder.add_layers(LAYERS, LAYERS[-1], PageLayout(64), 2, 4, torch.device("cpu"))
    recorder.set_cache(cache(128 * TOKEN_BYTES, (LAYERS, keys_and_values(2, 64, 128))))
    with recording.paused():
        recorder.step(LAYERS, batch((1000, 1000)), 0)
    recorder.step(LAYERS, batch((tokens, tokens)), 0)


def prefill_tokens(registry: CollectorRegistry) -> float | None:
    labels = {"model_name": "a model", "engine": "1", "phase": "prefill"}
    return registry.get_sample_value("sage_attended_tokens_total", labels)


def test_one_server(temporary: Path) -> None:
    """Its registry shows what the first worker of each of its engines wrote. Other users cannot read or write the files."""
    assert recording.recorder(config()) is None  # nothing is exported yet
    engines = [config(), config()]
    for engine in engines:
        exporter.export(engine)
        assert stat.S_IMODE(sinks.directory(engine).stat().st_mode) == 0o700
        write(engine, 5)
    second_worker = SimpleNamespace(**{**vars(engines[0]), "parallel_config": config(rank=1).parallel_config})
    assert recording.recorder(second_worker) is None
    assert prefill_tokens(REGISTRY) == 10


def test_several_servers(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All show vLLM's shared folder, and so the same values."""
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(temporary))
    engine = config()
    exporter.export(engine)
    write(engine, 5)
    assert prefill_tokens(get_prometheus_registry()) == prefill_tokens(get_prometheus_registry()) == 5
    assert not list(temporary.glob("sage-metrics-*"))


def test_a_killed_worker_keeps_what_it_counted(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from sage_backend.observability.definitions import TOKENS
from sage_backend.observability.sinks import FileValues
values = FileValues(Path({str(tmp_path)!r}), f"sage-{{os.getpid()}}", ("a model", "0"))
values.add(TOKENS, 7, "decode")
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    FileValues(tmp_path, "sage-another", ("a model", "0")).add(definitions.TOKENS, 5, "decode")
    assert scraped(tmp_path) == {("sage_attended_tokens_total", "decode"): 12}


class RayMetric:
    """Stands for Ray's counter, gauge and histogram, and refuses what they refuse. Of a histogram, it keeps the sum."""

    told: dict[tuple[str, ...], float]

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...], boundaries: list[float] | None = None) -> None:
        assert boundaries is None or min(boundaries) > 0
        self.name, self.tag_keys = name, tag_keys

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0
        self.set(self.told.get((self.name, *tags.values()), 0) + value, tags)

    observe = inc

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == set(self.tag_keys)
        self.told[(self.name, *tags.values())] = value


@pytest.fixture
def ray_metrics(monkeypatch: pytest.MonkeyPatch) -> type[RayMetric]:
    """Ray's metrics, in a process that is a Ray actor."""
    metric = type("RayMetric", (RayMetric,), {"told": {}})
    sinks.ray_values.cache_clear()
    monkeypatch.setattr(sinks, "REPEAT_SECONDS", 0.01)
    ray = SimpleNamespace(
        is_initialized=lambda: True, get_runtime_context=lambda: SimpleNamespace(get_actor_id=lambda: "an actor")
    )
    kinds = SimpleNamespace(Counter=metric, Gauge=metric, Histogram=metric)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.util", SimpleNamespace(metrics=kinds))
    return metric


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_ray_workers(temporary: Path, ray_metrics: type[RayMetric]) -> None:
    """Each reports its own metrics, and repeats those that Ray would forget."""
    engine = config()
    engine.parallel_config.distributed_executor_backend = "ray"
    exporter.export(engine)
    assert not list(temporary.iterdir())
    write(engine, 5)
    assert ray_metrics.told["sage_attended_tokens_total", "a model", "1", "prefill"] == 5
    gauge = "sage_kv_bytes_per_token", "a model", "1"
    assert ray_metrics.told[gauge] == TOKEN_BYTES
    ray_metrics.told.clear()
    wait_until(lambda: gauge in ray_metrics.told)
    assert not any(name.endswith("_total") for name, *_ in ray_metrics.told)


def test_ray_replica(temporary: Path, ray_metrics: type[RayMetric], monkeypatch: pytest.MonkeyPatch) -> None:
    """It reports what its workers write, which are not actors, as long as there is something to read."""
    monkeypatch.setattr(exporter, "RELAY_SECONDS", 0.01)
    engine = config()
    exporter.export(engine)
    [relay] = [thread for thread in threading.enumerate() if thread.name == "sage-metrics"]
    write(engine, 5)
    tokens = "sage_attended_tokens_total", "a model", "1", "prefill"
    wait_until(lambda: ray_metrics.told.get(tokens) == 5)
    recording.recorder(engine).step(LAYERS, batch((7, 7)), 0)
    wait_until(lambda: ray_metrics.told.get(tokens) == 12)
    assert ray_metrics.told["sage_kv_bytes_per_token", "a model", "1"] == TOKEN_BYTES
    FileValues(sinks.directory(engine), "sage-2", ("a model", "1")).observe(definitions.CANARY_ERROR, [0.035, 0.25, 0.25])
    wait_until(lambda: ("sage_canary_relative_error", "a model", "1") in ray_metrics.told)
    wait_until(lambda: ray_metrics.told["sage_canary_relative_error", "a model", "1"] == pytest.approx(0.04 + 0.3 + 0.3))
    shutil.rmtree(sinks.directory(engine))
    relay.join(10)
    assert not relay.is_alive()
    exporter._setter(object, definitions.PAGES, ["a model", 1])(7)  # a logger with gauges that are not Prometheus's
    assert ray_metrics.told["sage_kv_pages", "a model", "1"] == 7


def test_loggers_that_were_made_before() -> None:
    """Of an engine with another backend, in a process that then makes one with this backend."""
    told: list[object] = []
    recording = pages_gauge._recording(lambda self, stats, *args, engine_idx=0: told.append(stats))
    recording(SimpleNamespace(), "statistics")
    assert told == ["statistics"]


def test_who_gets_a_configuration_may_show_its_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if it did not make it, like replicas of Ray Serve on GPUs."""
    shown = []
    monkeypatch.setattr(pages_gauge, "apply", lambda: shown.append(True))
    member = plugin.backend_member(plugin.BACKEND)
    assert pickle.loads(pickle.dumps(member)) is member
    assert shown


def series(metric: Metric) -> list[str]:
    """The names that `metric` is exported by."""
    return [f"{metric.name}_{part}" for part in ("bucket", "count", "sum")] if metric.kind == "histogram" else [metric.name]


def allowed(metric: Metric, sample: Any) -> bool:
    """Whether these are the labels of `metric`, with values from its lists."""
    bounded = all(sample.labels[name] in values for name, values in metric.labels.items() if values)
    own = {*metric.labels, "le"} if sample.name.endswith("_bucket") else {*metric.labels}
    return set(sample.labels) == {*COMMON_LABELS, *own} and bounded


def step_seconds(folder: Path, layers: int, requests: int) -> float:
    """Seconds that counting takes in a decode step of this many layers and requests, with its share of sampled timings."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = [f"layers.{i}" for i in range(layers)]
    recorder = Recorder(FileValues(folder, "sage-overhead", ("a model", "0")))
    recorder.add_layers(names, names[-1], PageLayout(64), 2, 4, torch.device("cpu"))
    recorder.paused = False
    common, seconds, steps = batch(*[(1, 1000)] * requests), [], 4 * SAMPLE_EVERY["decode"]
    clock = time.perf_counter if device.type == "cuda" else time.thread_time  # without the time of other processes
    for _ in range(20):
        began = clock()
        for _ in range(steps):
            sample = recorder.step(names, common, requests)
            for name in names:
                with recording.timed(sample, "decode", SimpleNamespace(layer_name=name, impl=IMPL), device):
                    pass
        seconds.append((clock() - began) / steps)
    return sorted(seconds)[len(seconds) // 2]


@pytest.mark.engine
def test_overhead(server: Server, tmp_path: Path) -> None:
    """Counting takes under 1% of a decode step of the embedded model, a short step. Prints what it measured (pytest -s)."""

    def latency() -> np.ndarray:
        """Seconds between tokens so far, and how many tokens."""
        samples = exported(server, "vllm:inter_token_latency_seconds_")
        return np.array([samples[f"vllm:inter_token_latency_seconds_{each}"][0].value for each in ("sum", "count")])

    before = latency()
    server.post("/v1/completions", prompt="def f():", max_tokens=200, ignore_eos=True)
    seconds, tokens = latency() - before
    step = seconds / tokens
    ours = step_seconds(tmp_path, layers=4, requests=1)
    print(f"{ours * 1e6:.1f} us of a decode step of {step * 1e3:.2f} ms: {ours / step:.2%}")
    for requests in (1, 256):
        deep = step_seconds(tmp_path, layers=32, requests=requests)
        print(f"of 32 layers and {requests} requests: {deep * 1e6:.1f} us")
    assert ours < 0.01 * step


@pytest.mark.engine
def test_a_server_exports_the_table(server: Server) -> None:
    """The metrics of the table are exported and no others. Every token is counted, and no text of a request is exported."""
    before = exported(server)
    answer = server.post("/v1/completions", prompt="xylophone = quixotic(zephyr)", max_tokens=40, ignore_eos=True)
    after, usage = exported(server), answer["usage"]
    assert set(after) == {name for metric in METRICS for name in series(metric)}
    for metric in METRICS:
        for name in series(metric):
            assert all(allowed(metric, sample) for sample in after[name]), name
    [build] = after["sage_build_info"]
    assert build.labels["page_format"] == "k_int8_v_e4m3_page128"
    assert after["sage_kv_compression_ratio"][0].value == pytest.approx(1.91, abs=0.01)  # summaries included
    assert after["sage_kv_pages"][0].value > 0
    grown = {
        sample.labels["phase"]: sample.value - earlier.value
        for sample, earlier in zip(after["sage_attended_tokens_total"], before["sage_attended_tokens_total"], strict=True)
    }
    # The first token comes from the prefill.
    assert grown == {"prefill": usage["prompt_tokens"], "decode": usage["completion_tokens"] - 1}
    page = server.read("/metrics")
    assert not any(word in page for word in ("xylophone", "quixotic", "zephyr", answer["choices"][0]["text"]))
