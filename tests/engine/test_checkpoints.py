# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that declare a quantized KV cache are served like others: the declaration is about vLLM's own caches."""

import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import assert_same_tokens, capacity, engine, environment, greedy, heldout_prompts, logged
from safetensors.torch import save_file

from sage_backend import plugin
from sage_backend.demo import MODEL_DIR
from sage_backend.features.layers import own_impls

LAYERS, HEADS, KV_HEADS = 4, 4, 2
LENGTHS = (5, 129, 300)
FP8 = {"dynamic": False, "num_bits": 8, "type": "float"}
NVFP4 = FP8 | {"num_bits": 4}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["*"]}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}, "ignore": ["lm_head"]}
SCHEME = FP8 | {"strategy": "tensor", "symmetric": True}
OLD_MODELOPT = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["*"]}

DECLARATIONS: dict[str, dict[str, Any]] = {
    "ModelOpt FP8": MODELOPT | {"kv_cache_scheme": FP8},
    "ModelOpt NVFP4": MODELOPT | {"quant_algo": "NVFP4", "group_size": 16, "kv_cache_scheme": NVFP4},
    "ModelOpt, older": {"quantization": OLD_MODELOPT},
    "compressed-tensors": COMPRESSED | {"kv_cache_scheme": SCHEME},
    "compressed-tensors, a scale for each head": COMPRESSED | {"kv_cache_scheme": SCHEME | {"strategy": "attn_head"}},
    "compressed-tensors, integers": COMPRESSED | {"kv_cache_scheme": SCHEME | {"type": "int"}},
}
"""Quantization configs of checkpoints whose weights are not quantized. vLLM itself refuses the last one."""


def declaring(folder: Path, name: str) -> Path:
    """The embedded model as a checkpoint with a declaration and scales of keys and values."""
    shutil.copytree(MODEL_DIR, folder)
    declaration = DECLARATIONS[name]
    if "quantization" in declaration:  # in a file of its own
        (folder / "hf_quant_config.json").write_text(json.dumps({"producer": {"name": "modelopt"}} | declaration))
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": declaration}))
    scales = {}
    for layer in range(LAYERS):
        attention = f"model.layers.{layer}.self_attn"
        if "each head" in name:
            scales |= {f"{attention}.{kind}_scale": torch.full((KV_HEADS, 1, 1), 0.02) for kind in "kv"}
            scales[f"{attention}.q_scale"] = torch.full((HEADS, 1, 1), 0.5)
        else:
            scales |= {f"{attention}.{kind}_proj.{kind}_scale": torch.tensor(0.02) for kind in "kv"}
    save_file(scales, folder / "scales.safetensors")
    return folder


@pytest.fixture(scope="module")
def plain() -> tuple[list[list[int]], list[Any], int]:
    """Prompts, their answers without a declaration, and the tokens that the memory holds."""
    with engine(dtype="bfloat16") as llm:
        prompts = heldout_prompts(llm, LENGTHS)
        return prompts, greedy(llm, prompts), capacity(llm)


@pytest.mark.engine
@pytest.mark.parametrize("name", DECLARATIONS)
def test_declared_caches(
    name: str, plain: tuple[list[list[int]], list[Any], int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The same tokens and the same number of pages as without the declaration, and one line about it."""
    prompts, answers, tokens = plain
    with engine(model=declaring(tmp_path / "model", name), dtype="bfloat16") as llm:
        assert_same_tokens(greedy(llm, prompts), answers)
        assert capacity(llm) == tokens
        assert llm.llm_engine.vllm_config.cache_config.cache_dtype == "auto"
    told = logged(caplog, "declares a quantized KV cache")
    assert len(told) == 1
    assert "\n" not in told[0]


@pytest.mark.engine
@pytest.mark.parametrize(("dtype", "declares"), [("bfloat16", False), ("float16", True)])
def test_unquantized_cache_dtypes(
    dtype: str, declares: bool, plain: tuple[list[list[int]], list[Any], int], tmp_path: Path
) -> None:
    """What means "not quantized" to vLLM is accepted, with and without a declaration."""
    prompts, answers, tokens = plain
    model = declaring(tmp_path / "model", "compressed-tensors") if declares else MODEL_DIR
    with ExitStack() as stack:
        try:
            llm = stack.enter_context(engine(f"SAGE/{dtype}", model, dtype="bfloat16"))
        except ValueError as error:
            if 'kv_cache_dtype="float16" is incompatible with dtype="bfloat16"' not in str(error):
                raise
            pytest.skip("vLLM 0.33 refuses it for every backend")
        assert_same_tokens(greedy(llm, prompts), answers)
        assert capacity(llm) == tokens


def config_of(model: Path, **arguments: Any) -> Any:
    with environment():
        from vllm.engine.arg_utils import EngineArgs

        plugin.register()
        return EngineArgs(model=str(model), **arguments).create_engine_config()


@pytest.mark.parametrize("dtype", ["fp8", "nvfp4"])
def test_a_quantized_cache_that_the_user_asks_for(dtype: str, tmp_path: Path) -> None:
    model = declaring(tmp_path / "model", "ModelOpt FP8")
    with pytest.raises(ValueError, match=f"--kv-cache-dtype {dtype} does not apply, .*; leave it at auto") as caught:
        config_of(model, attention_backend="SAGE", kv_cache_dtype=dtype)
    assert "\n" not in str(caught.value)


def test_one_layer_kind_is_enough(tmp_path: Path) -> None:
    model = declaring(tmp_path / "model", "ModelOpt FP8")
    config = config_of(model, attention_config={"backend_per_kind": {"full_attention": "SAGE"}})
    assert config.cache_config.cache_dtype == "auto"


def test_other_backends_keep_the_declaration(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = config_of(declaring(tmp_path / "model", "ModelOpt FP8"))
    assert config.cache_config.cache_dtype == "fp8_e4m3"
    assert config.model_config.hf_config.quantization_config["kv_cache_scheme"] == FP8
    assert "declares" not in caplog.text


@pytest.mark.engine
def test_a_drafter_that_declares(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its declaration would make the cache of the target FP8 as well: both have one cache_config."""
    drafts = {"method": "draft_model", "model": str(declaring(tmp_path / "drafter", "compressed-tensors"))}
    with engine(dtype="bfloat16", speculative_config=drafts | {"num_speculative_tokens": 2}) as llm:
        assert len(greedy(llm, heldout_prompts(llm, LENGTHS))) == len(LENGTHS)
        config = llm.llm_engine.vllm_config
        assert config.cache_config.cache_dtype == "auto"
        assert len(own_impls(config)) == 2 * LAYERS
    assert caplog.text.count("declares a quantized KV cache") == 1
