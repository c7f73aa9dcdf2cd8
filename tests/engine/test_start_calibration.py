# SPDX-License-Identifier: Apache-2.0
"""The calibration of keys when an engine starts: what it finds, that it is kept, and that no first request changes it."""

import logging
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from engines import (
    EXACT,
    NGRAM_DRAFTS,
    assert_same_tokens,
    engine,
    give_two_workers_cores,
    greedy,
    heldout_prompts,
    metric,
    save_random_model,
)
from safetensors import SafetensorError
from transformers import LlamaConfig, PretrainedConfig

from sage_backend import model_file
from sage_backend.demo import MODEL_DIR
from sage_backend.engine import start_calibration
from sage_backend.features import calibration_file, positions
from sage_backend.features.layers import own_impls

pytestmark = pytest.mark.engine


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of vLLM's. Returns where calibrations are kept in it."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    return tmp_path / "sage" / "calibrations"


def calibrations(llm: Any) -> dict[str, Any]:
    """Of each layer, the calibration that it stores keys with."""
    return {name: impl.calibration for name, impl in own_impls(llm.llm_engine.vllm_config).items()}


def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the tokens of each prompt that an engine reads to calibrate itself."""
    read, lengths = start_calibration._read, []
    monkeypatch.setattr(start_calibration, "_read", lambda core, prompt: (lengths.append(len(prompt)), read(core, prompt)))
    return lengths


def test_it_is_made_once_and_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second start reads nothing, and has the same tensors. Neither counts as requests or leaves pages in a cache."""
    lengths = measured(monkeypatch)
    found = []
    for _ in range(2):
        with engine("SAGE:k_bits=4") as llm:
            found.append(calibrations(llm))
            assert metric(llm, "vllm:prompt_tokens") == 0
            assert metric(llm, "vllm:prefix_cache_queries") == 0
            [core] = [llm.llm_engine.engine_core.engine_core]
            assert core.scheduler.kv_cache_manager.usage == 0
    assert len(lengths) == len(start_calibration.TEXTS) + 1
    assert all(100 < length <= start_calibration.MAX_TOKENS for length in lengths)
    [file] = cache.iterdir()
    kept = calibration_file.tensors(str(file))
    assert not any(name.endswith(calibration_file.OF_VALUES) for name in kept)
    for first, second in zip(found[0].items(), found[1].items(), strict=True):
        (name, own), (_, again) = first, second
        assert torch.equal(own.k_anchor.cpu(), kept[name])
        assert torch.equal(own.equalizer.cpu(), kept[f"{name}.equalizer"])
        assert torch.equal(own.order.cpu(), kept[f"{name}.order"])
        assert own.v_anchor is None
        assert torch.equal(own.k_anchor, again.k_anchor)
        assert torch.equal(own.equalizer, again.equalizer)
        assert own.k_anchor.abs().max() > 10, "the biases of the embedded model's keys reach 21"
        assert own.equalizer.max() > 1.5 * own.equalizer.min()


def test_nothing_depends_on_the_first_request() -> None:
    answers = []
    for before in ([], [[1, 2, 3]], [list(range(5, 400))]):
        with engine("SAGE:k_bits=4", dtype=EXACT) as llm:
            if before:
                greedy(llm, before, tokens=1)
            answers.append(greedy(llm, heldout_prompts(llm, [300, 700])))
    assert_same_tokens(answers[1], answers[0])
    assert_same_tokens(answers[2], answers[0])


@pytest.mark.parametrize(
    ("run", "arguments"),
    [
        ("SAGE:smooth_k=false,equalize=false", {}),
        ("SAGE", {"max_model_len": 64}),
        ("SAGE", {"max_num_batched_tokens": 32, "max_num_seqs": 4}),
        ("SAGE", {"skip_tokenizer_init": True}),
        ("SAGE", {"enable_prefix_caching": True, "async_scheduling": True}),
        ("SAGE", {"runner": "pooling"}),
    ],
    ids=str,
)
def test_engines_of_all_kinds(run: str, arguments: dict[str, Any], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = measured(monkeypatch)
    with engine(run, **arguments) as llm:
        found = calibrations(llm)
    if "false" in run:
        assert not lengths
        assert not cache.exists()
        return
    assert lengths
    assert all(length <= arguments.get("max_model_len", 2048) - 1 for length in lengths)
    assert all(own.k_anchor.any() and (own.equalizer != 1).any() for own in found.values())


def test_long_factors_have_a_calibration_of_their_own() -> None:
    """vLLM rotates keys by others if --max-model-len is past the original length, and only then does that length matter."""
    from vllm.engine.arg_utils import EngineArgs

    def path(length: int, **rope: Any) -> Path:
        overrides = {"rope_parameters": {"rope_theta": 10000.0, **rope}}
        arguments = EngineArgs(str(MODEL_DIR), max_model_len=length, hf_overrides=overrides, attention_backend="SAGE")
        return start_calibration.cache_path(arguments.create_engine_config())

    factors = {"short_factor": [1.0] * 32, "long_factor": [2.0] * 32, "original_max_position_embeddings": 1024}
    assert path(700, rope_type="default") == path(2000, rope_type="default")
    assert path(700, rope_type="longrope", **factors) == path(1024, rope_type="longrope", **factors)
    assert path(700, rope_type="longrope", **factors) != path(1025, rope_type="longrope", **factors)


def test_sizes_of_a_step_do_not_matter(cache: Path) -> None:
    """Options that keys do not depend on share a file."""
    step = {"max_num_batched_tokens": 64, "max_num_seqs": 8, "enable_prefix_caching": True, "max_model_len": 1024}
    for arguments in ({}, step):
        for run in ("SAGE", "SAGE:page_tokens=64"):
            with engine(run, **arguments):
                pass
    with engine("SAGE", speculative_config=NGRAM_DRAFTS):  # which no model makes
        pass
    assert len(list(cache.iterdir())) == 1
    with engine("SAGE", dtype="float16"):
        pass
    assert len(list(cache.iterdir())) == 2


def test_the_first_of_several_engines_decides(cache: Path) -> None:
    """Engines that start at the same time each measure, and use what the first of them has kept."""
    model = SimpleNamespace(model=str(MODEL_DIR), hf_config=SimpleNamespace())
    first, second = ({"layer": torch.full((2, 64), value)} for value in (1.0, 2.0))
    path = cache / "some.safetensors"
    assert start_calibration._keep(path, first, model) is first
    assert path.stat().st_mode & 0o777 == cache.stat().st_mode & 0o666, "who may read the folder cannot read it"
    assert torch.equal(start_calibration._keep(path, second, model)["layer"], first["layer"])
    assert list(cache.iterdir()) == [path]
    path.write_bytes(path.read_bytes()[:-5])
    assert start_calibration._keep(path, second, model) is second
    assert torch.equal(calibration_file.tensors(str(path))["layer"], second["layer"])
    assert list(cache.iterdir()) == [path]


def test_a_damaged_file_is_made_anew(cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine():
        pass
    [file] = cache.iterdir()
    good = file.read_bytes()
    file.write_bytes(good[:-10])
    lengths = measured(monkeypatch)
    with caplog.at_level(logging.WARNING, start_calibration.__name__), engine() as llm:
        assert calibrations(llm)
    assert lengths
    assert "is damaged" in caplog.text
    assert len(file.read_bytes()) == len(good)


def test_a_folder_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "sage").write_text("a file in the way")
    with caplog.at_level(logging.WARNING, start_calibration.__name__), engine() as llm:
        assert all(own.k_anchor.any() for own in calibrations(llm).values())
    assert "the calibration cannot be kept" in caplog.text


def test_a_file_that_cannot_be_written(cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors has errors of its own where the folder is read-only, or full after a part of the file."""

    def save(tensors: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"a part")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", save)
    model, own = SimpleNamespace(model=str(MODEL_DIR), hf_config=SimpleNamespace()), {"layer": torch.ones(2, 64)}
    assert start_calibration._keep(cache / "some.safetensors", own, model) is own
    assert "the calibration cannot be kept (Error while serializing: I/O error: No space left" in caplog.text
    assert not list(cache.iterdir())


def test_configurations_of_models_with_code_of_their_own() -> None:
    """transformers leaves out what a class has by default, which some classes cannot be asked for."""

    class Config(PretrainedConfig):  # type: ignore[misc]
        def __init__(self, layers: int, **values: Any) -> None:
            super().__init__(**values)
            self.layers = layers

    assert '"layers": 7' in start_calibration._as_json(Config(7))


@pytest.mark.parametrize("kept", [True, False])
def test_an_engine_that_joins_others(
    kept: bool, cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks nothing of them, which would wait for each other, and takes their calibration if it finds it."""
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(str(MODEL_DIR), attention_backend="SAGE").create_engine_config()
    given: list[Any] = []
    executor = SimpleNamespace(collective_rpc=lambda call, args: given.append(args))
    core = SimpleNamespace(vllm_config=config, model_executor=executor, dp_group="of engines that do not answer")
    if kept:
        start_calibration._keep(start_calibration.cache_path(config), {"layer": torch.ones(2, 64)}, config.model_config)
    monkeypatch.setenv("VLLM_ELASTIC_EP_SCALE_UP_LAUNCH", "1")
    with caplog.at_level(logging.WARNING, start_calibration.__name__):
        start_calibration.calibrate(core)
    assert [list(tensors) for (tensors,) in given] == ([["layer"]] if kept else [])
    assert ("for an engine that joins others" in caplog.text) == (not kept)


def test_a_model_of_a_hub_is_the_same_without_network(tmp_path: Path) -> None:
    """With HF_HUB_OFFLINE, vLLM names the folder in the hub's cache instead of the model."""
    commit = "0123456789abcdef" * 2 + "01234567"
    folders = [tmp_path / f"models--some--model-8B/snapshots/{name}" for name in (commit, commit[::-1], "main")]
    for folder in folders:
        folder.mkdir(parents=True)
    named = model_file.identity("some/model-8B", SimpleNamespace(_commit_hash=commit))
    assert [model_file.identity(str(folder), SimpleNamespace()) == named for folder in folders] == [True, False, False]


def test_random_weights_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, start_calibration.__name__), engine(load_format="dummy"):
        pass
    assert "keys are calibrated for random weights (load format dummy)" in caplog.text


def test_layers_of_a_drafter_are_calibrated(tmp_path: Path) -> None:
    drafter = {"method": "draft_model", "model": str(MODEL_DIR), "num_speculative_tokens": 2, "attention_backend": "SAGE"}
    with engine(speculative_config=drafter, max_model_len=512) as llm:
        found = calibrations(llm)
        [ropes] = llm.collective_rpc(positions.ropes)
    assert len(found) == 8
    assert all(any(ropes[name].frequencies) for name in found)
    assert all(own.k_anchor.abs().max() > 10 for own in found.values())


def test_a_drafter_with_other_heads_than_its_target(tmp_path: Path) -> None:
    """Each layer's calibration is that of its own heads, here of four KV heads beside the target's two."""
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "head_dim": 64, "vocab_size": 4096}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=2048)
    save_random_model(tmp_path / "drafter", config)
    drafter = {"method": "draft_model", "model": str(tmp_path / "drafter"), "num_speculative_tokens": 2}
    with engine(speculative_config=drafter, max_model_len=512) as llm:
        shapes = sorted(tuple(own.k_anchor.shape) for own in calibrations(llm).values())
        assert len(greedy(llm, [[5, 6, 7]], tokens=4)[0].tokens) == 4
    assert shapes == [*[(2, 128)] * 4, (4, 64)]


LAUNCHED = """
import sys
from vllm import LLM, SamplingParams

model, dtype, *prompt = sys.argv[1:]
limits = {"enforce_eager": True, "max_model_len": 1024, "kv_cache_memory_bytes": 64 << 20, "dtype": dtype}
ranks = {"tensor_parallel_size": 2, "distributed_executor_backend": "external_launcher"}
llm = LLM(model, attention_backend="SAGE", additional_config={"sage": {"k_bits": 4}}, **ranks, **limits)
params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
[output] = llm.generate({"prompt_token_ids": [int(token) for token in prompt]}, params, use_tqdm=False)
sys.stdout.write(f"tokens {' '.join(map(str, output.outputs[0].token_ids))}\\n")  # in one piece, beside the other rank's
"""


def test_engines_that_are_started_by_torchrun(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank has an engine of its own, with half of the heads. Together they calibrate all, as one engine does."""
    with engine("SAGE:k_bits=4", dtype=EXACT) as llm:
        prompts = heldout_prompts(llm, [300])
        answers = greedy(llm, prompts, tokens=16)
        alone = {name: own.k_anchor.cpu() for name, own in calibrations(llm).items()}
    [file] = cache.iterdir()
    file.unlink()
    give_two_workers_cores(monkeypatch)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    script = tmp_path / "script.py"
    script.write_text(LAUNCHED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, MODEL_DIR, EXACT]
    run = subprocess.run([*command, *map(str, prompts[0])], capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr
    kept = calibration_file.tensors(str(file))
    for name, anchor in alone.items():
        torch.testing.assert_close(kept[name], anchor, rtol=1e-3, atol=0.02)
    assert re.findall(r"tokens ([\d ]+)", run.stdout) == [" ".join(map(str, answers[0].tokens))] * 2


def test_models_without_a_chat_template() -> None:
    class Tokenizer:
        def encode(self, text: str) -> list[int]:
            return [1, *text.encode()]

        def apply_chat_template(self, messages: Any, **_: Any) -> Any:
            raise ValueError("there is none")

    assert start_calibration._chat(Tokenizer())[:3] == [1, *start_calibration.CHAT[0].encode()[:2]]


def test_an_engine_that_does_not_read_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_calibration, "_MAX_STEPS", 0)
    with pytest.raises(RuntimeError, match="does not read the texts of its calibration"), engine():
        pass
