# SPDX-License-Identifier: Apache-2.0
"""Calibrations: `sage calibrate` on a real engine, how layers and workers read them, and how wrong files are refused."""

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import capacity, engine, environment, greedy, heldout_prompts, prompt_logprobs

from sage_backend.demo import MODEL_DIR
from sage_backend.features import calibration, calibration_file, observers
from sage_backend.tools import calibrate, cli
from sage_kernels import LayerCalibration, Modifiers, PagedBatch, reference
from sage_paged import PageLayout


def config(model: Path) -> Any:
    """The part of vLLM's ModelConfig that is read."""
    return SimpleNamespace(model=str(model), hf_config=SimpleNamespace())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "anchors.safetensors"
    heads = torch.arange(8.0)[:, None].expand(8, 64)
    anchors = {"layer": heads.contiguous(), "layer.equalizer": heads + 20, "layer.values": heads + 10, "bare": heads.clone()}
    anchors["layer.order"] = heads[:, :32].int() + 30
    calibration_file.save(path, anchors, config(MODEL_DIR))
    return path


def test_round_trip(file: Path) -> None:
    calibration_file.check(str(file), config(MODEL_DIR))
    found = calibration_file.calibration(str(file), "layer", 8, 0, 1)
    for tensor, first in ((found.k_anchor, 0), (found.equalizer, 20), (found.order, 30), (found.v_anchor, 10)):
        assert tensor is not None
        assert tensor[:, 0].tolist() == list(range(first, first + 8))
    bare = calibration_file.calibration(str(file), "bare", 8, 0, 1)
    assert bare.k_anchor is not None
    assert (bare.equalizer, bare.v_anchor) == (None, None)
    assert calibration_file.calibration(str(file), "another layer", 8, 0, 1) == LayerCalibration()
    assert set(calibration_file.tensors(str(file))) == {"layer", "layer.equalizer", "layer.order", "layer.values", "bare"}
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize(("ranks", "heads"), [(2, 4), (8, 1), (16, 1)])
def test_workers_take_their_heads(file: Path, ranks: int, heads: int) -> None:
    shares = [calibration_file.calibration(str(file), "layer", heads, rank, ranks) for rank in range(ranks)]
    for kind, first in (("k_anchor", 0), ("equalizer", 20), ("order", 30), ("v_anchor", 10)):
        found = [int(head) - first for share in shares for head in getattr(share, kind)[:, 0]]
        assert found == sorted([*range(8)] * max(1, ranks // 8))


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_statistics_of_workers_make_a_calibration(workers: int) -> None:
    """The same one however the heads are spread over workers. An anchor of values is kept where it pays: what counts is the
    share of a layer's mean square, over all its heads."""
    g = torch.Generator().manual_seed(0)
    key, value, query = (torch.randn(500, heads, 64, generator=g) for heads in (4, 4, 16))
    key += 3
    key[..., 5] *= 10
    query[:, 7, 40] *= 20  # of the second head, in the pair of channel 8
    biased = value.clone()
    biased[:, 1] += 0.6  # a twelfth of the mean square of the four heads
    slots = torch.cat([torch.arange(499), torch.tensor([-1])])

    found_by = []
    for worker in range(workers):
        first, last = worker * 4 // workers, max(worker * 4 // workers + 1, (worker + 1) * 4 // workers)
        heads, share = slice(first, last), slice(first * 4, last * 4)
        if workers == 8:  # two workers have the same head of keys, each with two of its four query heads
            share = slice(worker * 2, worker * 2 + 2)
        found_by.append({})
        for layer, values in (("plain", value), ("biased", biased)):
            observer = observers.Statistics(SimpleNamespace(window=0, soft_cap=0.0, sinks=None, scale=0.125))
            assert observer.result() is None
            for part in (slice(0, 300), slice(300, 500)):
                observer.stored(key[part, heads], values[part, heads], slots[part])
                queries = query[part, share][slots[part] >= 0]
                observer.attended(queries, torch.empty_like(queries))
            found_by[-1][layer] = observer.result()
    found = calibration.tensors_of(found_by, [{"plain": 4, "biased": 4}])
    kinds = {"", ".equalizer", ".order"}
    assert set(found) == {f"{layer}{kind}" for layer in ("plain", "biased") for kind in kinds} | {"biased.values"}
    mean = key[:-1].mean(0)
    assert torch.allclose(found["plain"], mean, atol=1e-6)
    assert torch.allclose(found["biased.values"], biased[:-1].mean(0), atol=1e-6)
    of_key = (key[:-1] - mean).abs().amax(0).unflatten(-1, (2, 32)).amax(1)
    of_query = query[:-1].abs().amax(0).unflatten(0, (4, 4)).amax(1).unflatten(-1, (2, 32)).amax(1)
    assert torch.allclose(found["plain.equalizer"], (of_key / of_query).sqrt().repeat(1, 2), rtol=1e-4)
    worth = of_key * query[:-1].square().mean(0).unflatten(0, (4, 4)).mean(1).unflatten(-1, (2, 32)).mean(1).sqrt()
    assert torch.equal(found["plain.order"], worth.sort(-1, descending=True).indices.int())
    factors = found["plain.equalizer"]
    assert factors[0, 5] > 2 * factors[0, 6]
    assert factors[1, 8] < factors[1, 9] / 2


def test_statistics_do_not_depend_on_earlier_layers() -> None:
    """A prompt that comes whole is attended to exactly, whatever the pages hold."""
    query, key, value = (torch.randn(300, heads, 64) for heads in (4, 2, 2))
    observer = observers.Statistics(SimpleNamespace(window=100, soft_cap=0.0, sinks=None, scale=0.125))
    observer.stored(key, value, torch.arange(300))
    out = torch.full_like(query, 7.0)
    observer.attended(query[:5], out[:5])
    assert (out == 7).all(), "a decode"
    observer.attended(query, out)
    exact = reference.exact_attention(query, key, value, 0.125, Modifiers(window=100))
    assert torch.allclose(out, exact, atol=1e-5)


def test_chunks_of_a_prompt_are_attended_to_as_a_whole() -> None:
    query, key, value = (torch.randn(700, heads, 64) for heads in (4, 2, 2))
    exact, results = reference.exact_attention(query, key, value, 0.125), []
    for chunk in (700, 300, 64):
        observer = observers.Statistics(SimpleNamespace(window=0, soft_cap=0.0, sinks=None, scale=0.125))
        for _ in range(2):  # the second prompt does not see the first
            observer.begin_prompt()
            out = torch.full_like(query, float("nan"))
            for first in range(0, 700, chunk):
                rows = slice(first, first + chunk)
                observer.stored(key[rows], value[rows], torch.arange(700)[rows])
                observer.attended(query[rows], out[rows])
            assert torch.allclose(out, exact, atol=1e-5)
        results.append(observer.result())
    assert torch.allclose(results[1], results[0], rtol=1e-5)
    assert torch.allclose(results[2], results[0], rtol=1e-5)


def test_tokens_that_are_not_finite_do_not_count() -> None:
    key, query = torch.randn(50, 2, 64), torch.randn(50, 4, 64)
    results = []
    for broken in (False, True):
        observer = observers.Statistics(SimpleNamespace(window=0, soft_cap=0.0, sinks=None, scale=0.125))
        if broken:
            for flaw in (float("nan"), float("inf")):
                wrong = key.clone()
                wrong[:, 1, 7] = flaw
                observer.stored(wrong, key, torch.arange(50))
                observer.attended(torch.full_like(query, flaw), torch.empty_like(query))
            assert observer.result() is None
        observer.stored(key, key, torch.arange(50))
        observer.attended(query, torch.empty_like(query))
        results.append(observer.result())
    assert torch.equal(results[0], results[1])


def counted(key: torch.Tensor, query: torch.Tensor, chunk: int, *turning: Any) -> Any:
    """The statistics of a prompt in chunks. turning: frequencies and context."""
    observer = observers.Statistics(SimpleNamespace(window=0, soft_cap=0.0, sinks=None, scale=0.125), *turning)
    for keys, queries in zip(key.split(chunk), query.split(chunk), strict=True):
        observer.stored(keys, keys, torch.arange(len(keys)))
        observer.attended(queries, torch.empty_like(queries))
    return observer.result()


def rotated(x: torch.Tensor, positions: Any, frequencies: torch.Tensor) -> torch.Tensor:
    """x [tokens, heads, head_dim] with RoPE, in float64."""
    angles = torch.as_tensor(positions).double()[..., None, None] * frequencies.double()
    low, high = x.double().chunk(2, -1)
    return torch.cat([low * angles.cos() - high * angles.sin(), high * angles.cos() + low * angles.sin()], -1)


def test_keys_and_queries_count_at_offsets() -> None:
    key, query = torch.randn(400, 2, 64) + 1, torch.randn(400, 4, 64)
    frequencies = 1e4 ** (-torch.arange(32) / 32)
    offsets = (0, 512, 1024, 2048, 4096)
    keys, queries = (torch.cat([rotated(x, offset, frequencies) for offset in offsets]) for x in (key, query))
    for chunk in (400, 300):
        found = counted(key, query, chunk, tuple(frequencies.tolist()), 4096)
        assert torch.allclose(found[:, 0], keys.mean(0).float(), atol=1e-6)
        assert torch.allclose(found[:, 4], keys.amin(0).float(), atol=1e-5)
        assert torch.allclose(found[:, 5], keys.amax(0).float(), atol=1e-5)
        largest = queries.abs().unflatten(1, (2, 2)).amax((0, 2))
        assert torch.allclose(found[:, 6], largest.float(), atol=1e-5)
        own = counted(key, query, chunk)
        assert torch.equal(found[:, 1:4], own[:, 1:4]), "values, and squares of queries"
        assert not torch.allclose(found[:, 0], own[:, 0], atol=0.1)
        for nowhere in (((0.0,) * 32, 4096), ((), 4096), (tuple(frequencies.tolist()), 0)):
            assert torch.equal(counted(key, query, chunk, *nowhere), own)


def test_anchors_are_those_of_a_context() -> None:
    """Of a slow pair with a bias, the first 512 positions show one side. Anchors are closer to the mean, and ranges reach as
    far as those of all positions."""
    frequencies = 1e5 ** (-torch.arange(32) / 32)
    biased = torch.randn(8192, 1, 64)
    biased[..., 28] += 20  # a pair that turns 0.3 radians in 8192 positions, and one that turns 3.5
    biased[..., 21] += 20
    keys = rotated(biased, torch.arange(8192), frequencies).float()
    short, query = keys[:512], torch.randn(512, 2, 64)
    found = calibration.tensors_of([{"a": counted(short, query, 512, tuple(frequencies.tolist()), 8192)}], [{"a": 1}])
    mean = keys.mean(0)
    assert (short.mean(0) - mean).norm() > 10
    assert (found["a"] - mean).norm() < 0.6 * (short.mean(0) - mean).norm()
    largest = (keys - found["a"]).abs().amax(0).unflatten(-1, (2, 32)).amax(1)[0, 21]
    # Queries count at all positions, too: at some, the whole of a pair is in one channel.
    wanted = (largest / query[..., [21, 53]].norm(dim=-1).max()).sqrt()
    assert found["a.equalizer"][0, 21] == pytest.approx(float(wanted), rel=0.07)


def test_reasons_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, calibration.__name__):
        calibration.log_reasons([{}, {}])
        assert not caplog.messages
        calibration.log_reasons([{"a": "this", "b": "that"}, {"a": "this", "b": "that"}, {"c": "this"}])
    [message] = caplog.messages
    assert message.endswith("not further on in contexts: this (2 layers); that (1 layers)")


def test_channels_without_keys_or_queries_are_left_alone() -> None:
    observer = observers.Statistics(SimpleNamespace(window=0, soft_cap=0.0, sinks=None, scale=1.0))
    key, query = torch.randn(9, 1, 64), torch.randn(9, 2, 64)
    key[..., [3, 35]], query[..., [4, 36]] = 0, 0
    observer.stored(key, key, torch.arange(9))
    observer.attended(query, torch.empty_like(query))
    equalizer = calibration.tensors_of([{"a": observer.result()}], [{"a": 1}])["a.equalizer"]
    assert equalizer.isfinite().all()
    assert (equalizer > 0).all()
    assert equalizer[0, [3, 35, 4, 36]].tolist() == [1, 1, 1, 1]


def test_another_number_of_heads_is_refused(file: Path) -> None:
    with pytest.raises(ValueError, match="has 8 KV heads in layer, and not 2 for each of 1 workers"):
        calibration_file.calibration(str(file), "layer", 2, 0, 1)


def test_unusable_files_are_refused(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "model"
    shutil.copytree(MODEL_DIR, other)
    weights = other / "model.safetensors"
    calibration_file.check(str(file), config(other))  # the same model elsewhere
    content = bytearray(weights.read_bytes())
    content[1 << 19] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match="is of another model; make one with: sage calibrate"):
        calibration_file.check(str(file), config(other))
    with pytest.raises(ValueError, match="is not a calibration of this release"):
        calibration_file.check(str(weights), config(MODEL_DIR))
    with pytest.raises(ValueError, match=r"there is no calibration nowhere; make one with: sage calibrate"):
        calibration_file.check("nowhere", config(MODEL_DIR))
    for option in ("k_bits", "v_bits"):
        calibration_file.save(file, {}, config(MODEL_DIR), {"layer": {option: 5}})
        with pytest.raises(ValueError, match=f"is damaged: its {option} are"):
            calibration_file.layer_bits(str(file))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="is not a calibration or is damaged"):
        calibration_file.check(str(file), config(MODEL_DIR))


def test_bits_are_the_least_within_the_budget(file: Path) -> None:
    errors = {"a": {(4, 8): 0.2, (8, 8): 0.03}, "b": {(4, 4): 0.16, (8, 4): 0.12, (4, 8): 0.1, (8, 8): 0.02}}
    found = calibrate.Calibration(config(MODEL_DIR), {}, errors)
    assert found.choose(0.15) == {"a": (8, 8), "b": (8, 4)}
    with pytest.raises(ValueError, match=r"--budget 0.025 cannot be met: the error of a is at least 0.0300"):
        found.choose(0.025)
    assert calibration_file.layer_bits(str(file)) == {}
    bits = {"a": {"k_bits": 8, "v_bits": 4}, "b": {"k_bits": 4}}
    calibration_file.save(file, {}, config(MODEL_DIR), bits)
    assert calibration_file.layer_bits(str(file)) == bits


@pytest.mark.parametrize(("soft_cap", "smooth_q"), [(0.0, False), (5.0, False), (0.0, True)])
def test_errors_of_pages(soft_cap: float, smooth_q: bool) -> None:
    """The observer's sums for the last queries of a prompt are those that the reference gives for their pages."""
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(300, heads, 64, generator=g) for heads in (4, 2, 2))
    query[..., ::17] += 20 * smooth_q
    k_anchor, equalizer, v_anchor = (torch.rand(2, 64, generator=g) + 0.5 for _ in range(3))
    own = LayerCalibration(k_anchor, equalizer, torch.arange(31, -1, -1).int().repeat(2, 1), v_anchor)
    q_block = 32 if smooth_q else 0
    shape = {"head_size": 64, "scale": 0.125, "window": 0, "soft_cap": soft_cap, "sinks": None}
    impl = SimpleNamespace(**shape, layout=PageLayout(64), q_block=lambda device, layout: q_block)
    formats = [(8, 8), (4, 8), (8, 4), (4, 4)]
    observer = observers.PageErrors(impl, own, formats)
    observer.stored(torch.cat([key, key[:1]]), torch.cat([value, value[:1]]), torch.tensor([*range(300), -1]))
    observer.attended(query, query)
    observer.attended(query[:1], query[:1])  # a decode
    exact = reference.exact_attention(query, key, value, 0.125, Modifiers(soft_cap=soft_cap))[-256:]
    assert observer.squares["exact"] == pytest.approx(float(exact.square().sum()), rel=1e-4)
    requests = PagedBatch(torch.arange(3)[None], torch.tensor([300]), torch.tensor([0, 256]))
    modifiers = Modifiers(soft_cap=soft_cap, calibration=own, q_block=q_block)
    query = query[-256:]
    for bits in formats:
        layout = PageLayout(64, bits[0], v_bits=bits[1])
        pages = layout.empty(3, 2)
        reference.store(key, value, pages, torch.arange(300), layout, own)
        out = reference.attention(query, pages, layout, requests, 0.125, modifiers)
        assert observer.squares[bits] == pytest.approx(float((out - exact).square().sum()), rel=0.02)


def test_only_layers_of_one_kind_can_differ() -> None:
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    shape = {"block_size": 128, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}
    full, small = (FullAttentionSpec(**shape, state_content_bytes=size) for size in (136, 108))
    window = SlidingWindowSpec(**shape, sliding_window=100, state_content_bytes=136)
    for specs, can_differ in (([full, small], True), ([full, window], False)):
        worker = SimpleNamespace(get_kv_cache_spec=lambda specs=specs: dict(enumerate(specs)))
        assert calibrate._can_differ(worker) == can_differ


@pytest.mark.parametrize(("of", "what"), [("k_bits", "keys"), ("v_bits", "values")])
def test_bits_are_chosen_once(of: str, what: str, file: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    calibration_file.save(file, {}, config(MODEL_DIR), {"layer": {of: 4}})
    option = {"sage": {"calibration": str(file), of: 8}}
    with environment(), pytest.raises(ValueError, match=f'has chosen the bits of {what}; leave out option "{of}"'):
        EngineArgs(str(MODEL_DIR), attention_backend="SAGE", additional_config=option).create_engine_config()


@pytest.mark.engine
def test_engine_with_a_calibration(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`sage calibrate` on the embedded model; an engine that loads the file has its anchors, keeps them, and has pages of the
    kinds that were chosen."""
    monkeypatch.setattr(calibration, "MIN_MEAN_FRACTION", 0.01)  # 2% to 3% of its values are common to all tokens
    file = tmp_path / "anchors.safetensors"
    choice = ["--k-bits", "auto", "--v-bits", "auto", "--budget", "0.075"]
    with environment():
        assert calibrate.main([str(MODEL_DIR), "--out", str(file), "--tokens", "3000", *choice]) == 0
    told = capsys.readouterr().out
    assert f"{file}: 4 layers, 4 of which have an anchor of values" in told
    chosen = calibration_file.layer_bits(str(file))
    for option in ("k_bits", "v_bits"):
        bits = {each[option] for each in chosen.values()}
        assert bits == {4, 8}, "this test needs a budget between the errors of these layers"
    for name, bits in chosen.items():
        words = f"K INT{bits['k_bits']} V {'e4m3' if bits['v_bits'] == 8 else '4 bits'}"
        assert f"{name}: {words} (errors: K INT8 V e4m3 0.0" in told
    with engine(additional_config={"sage": {"calibration": str(file)}}) as llm:
        bytes_per_token = sum(2 * PageLayout(128, **bits).bytes_per_token for bits in chosen.values())
        assert capacity(llm) == (64 << 20) // (128 * bytes_per_token) * 128, "pages of two sizes share the memory without waste"
        answers = greedy(llm, heldout_prompts(llm, [100, 300]), tokens=8)
        assert all(len(answer.tokens) == 8 for answer in answers)
        prompts = heldout_prompts(llm, [500, 130])
        found = prompt_logprobs(llm, prompts)
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        for name, layer in layers.items():
            expected, own = calibration_file.calibration(str(file), name, 2, 0, 1), layer.impl.calibration
            assert torch.equal(own.k_anchor, expected.k_anchor)
            assert torch.equal(own.equalizer, expected.equalizer)
            assert torch.equal(own.v_anchor, expected.v_anchor)
            assert layer.impl.layout == PageLayout(128, **chosen[name])
            assert own.k_anchor.abs().max() > 15, "the biases of the embedded model's keys reach 21"
        # With another anchor, the same values get other codes.
        with torch.inference_mode():  # in which it was allocated
            for layer in layers.values():
                layer.impl.calibration.v_anchor.fill_(0.5)
        llm.reset_prefix_cache()
        change = (prompt_logprobs(llm, prompts) - found).abs()
        assert 0 < change.mean() < 0.2


@pytest.mark.engine
def test_engine_refuses_a_calibration_of_another_model(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "model"
    shutil.copytree(MODEL_DIR, other)
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**settings, "rope_theta": 5e5}))
    option = {"sage": {"calibration": str(file)}}
    with pytest.raises(ValueError, match="is of another model"), engine(model=other, additional_config=option):
        pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["EMPTY/model", "--out", "c", "--text", "EMPTY/text"], "EMPTY/text is not a file with text"),
        ([str(MODEL_DIR), "--out", "NOWHERE/c"], "there is no folder"),
        ([str(MODEL_DIR), "--out", "c", "--tokens", "0"], "--tokens must be at least 1 and --context at least 2"),
        ([str(MODEL_DIR), "--out", "c", "--v-bits", "auto"], "--budget goes with --k-bits auto, --v-bits auto, or both"),
        ([str(MODEL_DIR), "--out", "c", "--k-bits", "auto", "--budget", "0"], "--budget must be above 0"),
        (["EMPTY", "--out", "c"], "EMPTY is not a model folder: it has no config.json"),
        ([str(MODEL_DIR), "--out", "c", "--context", "4096"], "(4096) is greater than the derived max_model_len"),
    ],
)
def test_bad_input(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").touch()
    arguments = [argument.replace("EMPTY", str(tmp_path)) for argument in arguments]
    with environment():
        assert calibrate.main(arguments) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert message.replace("EMPTY", str(tmp_path)) in errors[0]


def test_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["sage", "--help"])
    assert cli.main() == 0
    assert "calibrate" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["sage", "evaluate"])
    assert cli.main() == 2
    assert "usage: sage COMMAND" in capsys.readouterr().err
