# SPDX-License-Identifier: Apache-2.0
"""What cannot be served is refused before anything is loaded, with one line that says what to do about it."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import environment

from sage_backend import plugin
from sage_backend.demo import MODEL_DIR
from sage_backend.engine.checkpoint import check_model_folder, check_weight_files
from sage_backend.engine.checks import reasons
from sage_backend.options import SageOptions

TINY = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 512}


def refusal(model: Path | str, **arguments: Any) -> str:
    """The message that `vllm serve --attention-backend sage` would end with."""
    with environment():
        from vllm.engine.arg_utils import EngineArgs

        plugin.register()
        arguments = {"skip_tokenizer_init": True, "load_format": "dummy", **arguments}
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the caller looks at the message
            EngineArgs(model=str(model), attention_backend="SAGE", **arguments).create_engine_config()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_model_itself_is_accepted() -> None:
    with environment():
        from vllm.engine.arg_utils import EngineArgs

        plugin.register()
        EngineArgs(model=str(MODEL_DIR), attention_backend="SAGE").create_engine_config()


@pytest.mark.skipif(torch.cuda.is_available(), reason="about vLLM's CPU platform")
def test_a_platform_that_would_ignore_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """VLLM_TARGET_DEVICE=cpu makes vLLM skip platform plugins."""
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    with environment():
        monkeypatch.setattr(vllm.platforms, "_current_platform", CpuPlatform())
        assert "unset it" in refusal(MODEL_DIR)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"additional_config": {"sage": {"k_bits": 5}}}, r'option "k_bits" .* is 5; it can be 4 or 8'),
        ({"additional_config": {"sage": {"bits": 8}}}, r'unknown option "bits" .* are calibration, canary, .* or variator'),
        ({"kv_cache_dtype": "fp8"}, r"--kv-cache-dtype fp8 does not apply, .*; leave it at auto"),
        ({"block_size": 16}, r"--block-size 16 is not a multiple of the 128 tokens of a page; leave it out"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings(arguments: dict[str, Any], message: str) -> None:
    assert re.search(message, refusal(MODEL_DIR, **arguments))


def test_requests_with_wishes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody would check, or a store of pages would not notice, is refused."""
    memory = {"local_tokens": 128, "topk_pages": 1, "query_block": 128, "max_topk_pages": 2}
    asking: dict[str, Any] = {"additional_config": {"sage": {"memory": memory}}}
    connector = {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}
    assert "ExampleConnector finds pages by tokens alone" in refusal(MODEL_DIR, **asking, **connector)
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    message = refusal(MODEL_DIR, **asking)
    assert message.startswith('"max_topk_pages" in --additional-config "sage": vLLM')
    assert message.endswith("unset VLLM_USE_RUST_FRONTEND")


MLA = {"kv_lora_rank": 64, "q_lora_rank": None, "qk_rope_head_dim": 32, "qk_nope_head_dim": 64, "v_head_dim": 64}
MODELS = {
    "BertModel": (TINY, "attention of type encoder_only keeps no KV pages"),
    "T5ForConditionalGeneration": ({}, "attention of type encoder_decoder keeps no KV pages"),
    "BloomForCausalLM": ({"hidden_size": 128, "n_head": 2, "n_layer": 2, "vocab_size": 512}, "(ALiBi) is not supported"),
    "DeepseekV2ForCausalLM": (TINY | MLA | {"num_key_value_heads": 2}, "multi-head latent attention has its own"),
    "LlamaForCausalLM": (TINY | {"hidden_size": 144}, "head size 72 has no page format (there is 64, 80, 96, 112, 128, 160,"),
    "MiMoV2FlashForCausalLM": (
        TINY | {"model_type": "mimo_v2_flash", "head_dim": 192, "v_head_dim": 128},
        "keys of 192 channels with values of 128 have no page format",
    ),
    "MambaForCausalLM": ({"hidden_size": 128, "num_hidden_layers": 2, "vocab_size": 512}, "no attention layers"),
}


@pytest.mark.parametrize("architecture", MODELS)
def test_models(architecture: str, tmp_path: Path) -> None:
    values, message = MODELS[architecture]
    model_type = re.match("[A-Z][a-z0-9]*(V2)?", architecture)[0].lower().replace("v2", "_v2")  # type: ignore[index]
    config = {"architectures": [architecture], "model_type": model_type, "dtype": "bfloat16", **values}
    (tmp_path / "config.json").write_text(json.dumps(config))
    told = refusal(tmp_path)
    assert told.startswith(f"--attention-backend sage cannot serve {tmp_path}: ")
    assert message in told
    assert "use vLLM's default backend" in told


def test_layers() -> None:
    config = {"head_size": 64, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": None, "options": SageOptions()}
    assert reasons(**config) == []
    assert len(reasons(**config, attn_type="encoder_only")) == 1
    assert len(reasons(**config, use_non_causal=True, use_sparse=True)) == 2
    assert reasons(**config, capability=(8, 0)) == []
    assert "compute capability" in reasons(**config, capability=(7, 5))[0]
    large = config | {"head_size": 512}
    assert "needs pages of 64 tokens on compute capability 8.6" in reasons(**large, capability=(8, 6))[0]
    assert "needs pages of 64 tokens on compute capability 12.1" in reasons(**large, capability=(12, 1))[0]
    narrow = large | {"options": SageOptions(v_bits=4)}
    assert reasons(**narrow) == ['head size 512 has no 4-bit values; leave out option "v_bits"']
    assert reasons(**large | {"options": SageOptions(page_tokens=64)}, capability=(8, 6)) == []
    assert reasons(**large, capability=(8, 9)) == []


def _truncate(model: Path) -> None:
    weights = model / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated weights": (_truncate, r"has \d+ bytes where its header says \d+; fetch it again"),
    "empty weights": (lambda model: os.truncate(model / "model.safetensors", 0), "is not a safetensors file or is cut short"),
    "foreign weights": (
        lambda model: (model / "model.safetensors").write_text("<html>Not found</html>"),
        "is not a safetensors file or is cut short",
    ),
    "no weights": (lambda model: (model / "model.safetensors").unlink(), r"has no weights \(\*\.safetensors\)"),
    "no config": (lambda model: (model / "config.json").unlink(), "is not a model folder: it has no config.json"),
    "foreign config": (lambda model: (model / "config.json").write_text('{"a": 1}'), "its config.json names no model_type"),
    "broken config": (lambda model: (model / "config.json").write_text("{"), "is not JSON or is cut short; fetch it again"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders(case: str, tmp_path: Path) -> None:
    spoil, message = FOLDERS[case]
    model = tmp_path / "model"
    shutil.copytree(MODEL_DIR, model)
    spoil(model)
    assert re.search(message, refusal(model, load_format="auto"))


def test_an_empty_folder(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"{tmp_path} is not a model folder: it has no config.json"


@pytest.mark.parametrize("named", ["model_type", "architectures", "speculators_config"])
def test_folders_whose_type_vllm_finds(named: str, tmp_path: Path) -> None:
    """From the architectures of some models, or from what a speculator says of its target."""
    (tmp_path / "config.json").write_text(json.dumps({named: "any"}))
    check_model_folder(tmp_path)


def test_whole_weights_are_accepted() -> None:
    check_weight_files(MODEL_DIR)


def test_other_backends_are_left_alone(tmp_path: Path) -> None:
    """No refusal of ours without `--attention-backend sage`."""
    with environment():
        from vllm.engine.arg_utils import EngineArgs

        plugin.register()
        EngineArgs(model=str(MODEL_DIR), additional_config={"sage": {"k_bits": 5}}).create_engine_config()


@pytest.mark.parametrize(("version", "warnings"), [("0.31.0", 0), ("0.32.0+cpu", 0), ("0.33.0", 0), ("0.34.0", 1)])
def test_untested_vllm(version: str, warnings: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with environment():
        import vllm
    monkeypatch.setattr(vllm, "__version__", version)
    with caplog.at_level(logging.WARNING, logger="sage_backend.plugin"):
        plugin._warn_if_untested()
    told = [record.getMessage() for record in caplog.records if record.name == "sage_backend.plugin"]  # vLLM may say more
    assert len(told) == warnings
    assert all(version in each and "0.33.0" in each for each in told)


@pytest.mark.engine
@pytest.mark.parametrize("case", ["k_bits", "truncated weights"])
def test_command_line(case: str, tmp_path: Path) -> None:
    """`vllm serve` ends with our line and a status that is not 0."""
    options = []
    model = MODEL_DIR
    if case == "k_bits":
        options = ["--additional-config", '{"sage": {"k_bits": 5}}']
        message = 'ValueError: option "k_bits" in --additional-config "sage" is 5; it can be 4 or 8'
    else:
        model = tmp_path / "model"
        shutil.copytree(MODEL_DIR, model)
        _truncate(model)
        weights = model / "model.safetensors"
        sizes = weights.stat().st_size, (MODEL_DIR / "model.safetensors").stat().st_size
        message = f"ValueError: {weights} has {sizes[0]} bytes where its header says {sizes[1]}; fetch it again"
    vllm = Path(sys.executable).with_name("vllm")
    command = [vllm, "serve", model, "--attention-backend", "sage", "--port", "1", *options]
    with environment():
        run = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert run.returncode != 0
    errors = [line for line in run.stderr.splitlines() if re.match(r"(\S+ )?\w*Error: ", line.partition(") ")[2] or line)]
    assert run.stderr.strip().splitlines()[-1].endswith(message)
    assert len(errors) == 1
