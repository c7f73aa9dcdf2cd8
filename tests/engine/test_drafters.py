# SPDX-License-Identifier: Apache-2.0
"""A drafter follows its target to this backend, unless the user or the drafter's architecture says otherwise."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import safetensors.torch
import torch
from engines import (
    EXACT,
    NEAR_TIE,
    PLAIN,
    assert_same_tokens,
    capacity,
    engine,
    environment,
    greedy,
    heldout_prompts,
    logged,
    metric,
    random_prompts,
)
from recording import scraped

from sage_backend import BACKEND, plugin
from sage_backend.demo import MODEL_DIR
from sage_backend.features.layers import own_impls
from sage_backend.observability import sinks
from sage_backend.observability.definitions import SAMPLE_EVERY

DRAFTS = {"method": "draft_model", "model": str(MODEL_DIR), "num_speculative_tokens": 3}
LENGTHS = (5, 129, 300)
MEMORY = 64 << 20
BF16 = 4 * 2 * 2 * 2 * 128
"""Bytes of a token in the embedded model: layers, KV heads, keys and values, two bytes, channels."""


def config_of(drafts: dict[str, Any], **arguments: Any) -> Any:
    with environment():
        from vllm.engine.arg_utils import EngineArgs

        plugin.register()
        arguments = {"attention_backend": "SAGE", "speculative_config": drafts, **arguments}
        return EngineArgs(model=str(MODEL_DIR), **arguments).create_engine_config()


def backend_of(drafts: dict[str, Any], **arguments: Any) -> str | None:
    return getattr(config_of(drafts, **arguments).speculative_config.attention_backend, "name", None)


def odd_heads(folder: Path) -> dict[str, Any]:
    """Drafts of a model whose heads have no page format."""
    config = json.loads((MODEL_DIR / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"head_dim": 72}))
    return DRAFTS | {"model": str(folder)}


def test_drafters_follow_their_target() -> None:
    assert backend_of(DRAFTS) == BACKEND
    assert backend_of(DRAFTS, attention_backend=None) is None


@pytest.mark.parametrize(("asked", "backend"), [("auto", None), ("CPU_ATTN", "CPU_ATTN"), ("sage", BACKEND)])
def test_what_the_user_says(asked: str, backend: str | None) -> None:
    assert backend_of(DRAFTS | {"attention_backend": asked}) == backend


def test_a_drafter_that_cannot_follow(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It gets a backend of vLLM's, with one line about it; asked for by the user, it is refused."""
    with caplog.at_level(logging.WARNING, logger="sage_backend"):
        assert backend_of(odd_heads(tmp_path)) is None
    [told] = logged(caplog, "the drafter")
    assert "head size 72 has no page format" in told
    with pytest.raises(
        ValueError, match=r"cannot serve the drafter .*: head size 72 .*; leave \"attention_backend\" out"
    ) as caught:
        config_of(odd_heads(tmp_path) | {"attention_backend": "SAGE"})
    assert "\n" not in str(caught.value)


def test_a_cache_dtype_keeps_a_drafter_back(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="sage_backend"):
        assert backend_of(DRAFTS | {"kv_cache_dtype": "fp8"}) is None
    [told] = logged(caplog, "the drafter")
    assert "fp8" in told


def test_a_drafter_follows_past_the_trained_length_if_its_positions_can_be_changed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    memory = {"local_tokens": 512, "topk_pages": 2, "query_block": 128, "extrapolate": 1900}
    arguments = {"additional_config": {"sage": {"memory": memory}}}
    assert backend_of(DRAFTS, **arguments) == BACKEND

    def refuse(model: Any) -> None:
        raise ValueError(f"{model.model} has other positions")

    monkeypatch.setattr("sage_backend.engine.drafter.positions", SimpleNamespace(check=refuse))
    with caplog.at_level(logging.WARNING, logger="sage_backend"):
        assert backend_of(DRAFTS, **arguments) is None
    [told] = logged(caplog, "the drafter")
    assert "has other positions" in told


def gauge(llm: Any, name: str) -> float:
    """This engine's own: the process may have run others."""
    return scraped(sinks.directory(llm.llm_engine.vllm_config))[(name,)]


@pytest.mark.engine
def test_drafters_in_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens without drafts, with drafts of this backend, and with drafts of vLLM's choice, which on a GPU (by model
    runner V2) is the target's backend. The bytes of a token are those that the memory has for it."""
    monkeypatch.setitem(SAMPLE_EVERY, "decode", 1)
    with engine(dtype="bfloat16") as llm:
        prompts = heldout_prompts(llm, LENGTHS)
        answers = greedy(llm, prompts)
        alone = gauge(llm, "sage_kv_bytes_per_token")
    for backend, layers in (("sage", 8), ("auto", 8 if torch.cuda.is_available() else 4)):
        drafts = DRAFTS | ({} if backend == "sage" else {"attention_backend": backend})
        with engine(dtype="bfloat16", speculative_config=drafts, enable_prefix_caching=False) as llm:
            assert_same_tokens(greedy(llm, prompts), answers, NEAR_TIE)
            assert metric(llm, "vllm:spec_decode_num_accepted_tokens") > 0.9 * metric(llm, "vllm:spec_decode_num_draft_tokens")
            config = llm.llm_engine.vllm_config
            assert len(own_impls(config)) == layers
            token, block = gauge(llm, "sage_kv_bytes_per_token"), config.cache_config.block_size
            assert token == (2 * alone if layers == 8 else alone + BF16)
            assert gauge(llm, "sage_kv_compression_ratio") == pytest.approx(2 * BF16 / token)
            assert 0 <= MEMORY - token * capacity(llm) < token * block
            values = scraped(sinks.directory(config))
            assert values["sage_attention_samples_total", "decode"] > 0, "of a layer of the model, not of its drafter"


Shapes = dict[str, tuple[int, ...]]


def save_weights(folder: Path, config: dict[str, Any], shapes: Shapes) -> None:
    """A checkpoint of random weights, of norms near 1."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: 0.1 * torch.randn(shape, generator=generator) + ("norm" in name) for name, shape in shapes.items()}
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file({name: x.bfloat16() for name, x in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def layer(prefix: str, hidden: int, inputs: int, heads: int, kv_heads: int, size: int, width: int) -> Shapes:
    """The shapes of a decoder layer's weights. hidden, inputs: channels of the layer and of what its attention takes; heads,
    kv_heads of `size` channels; width: of the MLP."""
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    return {
        f"{attention}.q_proj.weight": (heads * size, inputs),
        f"{attention}.k_proj.weight": (kv_heads * size, inputs),
        f"{attention}.v_proj.weight": (kv_heads * size, inputs),
        f"{attention}.o_proj.weight": (hidden, heads * size),
        f"{mlp}.gate_proj.weight": (width, hidden),
        f"{mlp}.up_proj.weight": (width, hidden),
        f"{mlp}.down_proj.weight": (hidden, width),
        f"{prefix}.input_layernorm.weight": (hidden,),
        f"{prefix}.post_attention_layernorm.weight": (hidden,),
    }


def eagle3(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The embedded model, and an EAGLE-3 drafter of one layer for it."""
    config = json.loads((MODEL_DIR / "config.json").read_text())
    hidden = config["hidden_size"]
    own = {"architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1, "attention_bias": False}
    own |= {"draft_vocab_size": config["vocab_size"], "tie_word_embeddings": False}
    layers = {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]}  # vLLM's own choice needs more than four layers
    own |= {"eagle_config": layers, **layers}  # its two model runners look in different places
    shapes = layer("midlayer", hidden, 2 * hidden, 4, 2, config["head_dim"], config["intermediate_size"])
    shapes |= {"midlayer.hidden_norm.weight": (hidden,), "norm.weight": (hidden,), "fc.weight": (hidden, 3 * hidden)}
    save_weights(folder, config | own, shapes | {"lm_head.weight": (config["vocab_size"], hidden)})
    return MODEL_DIR, {"method": "eagle3", "model": str(folder)}


def mtp(folder: Path) -> tuple[Path, dict[str, Any]]:
    """A small MiMo with its layer for multi-token prediction."""
    hidden, heads, kv_heads, size, width, tokens = 256, 4, 2, 64, 512, 4096
    config = {
        "architectures": ["MiMoForCausalLM"], "model_type": "qwen2", "hidden_size": hidden, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": size, "intermediate_size": width, "num_hidden_layers": 2,
        "vocab_size": tokens, "num_nextn_predict_layers": 1, "max_position_embeddings": 2048, "tie_word_embeddings": False,
        "dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    shapes: Shapes = {"model.norm.weight": (hidden,)}
    shapes |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (tokens, hidden))
    for prefix in ("model.layers.0", "model.layers.1", "model.mtp_layers.0"):
        shapes |= layer(prefix, hidden, hidden, heads, kv_heads, size, width)
        sizes = {"q": heads * size, "k": kv_heads * size, "v": kv_heads * size}
        shapes |= {f"{prefix}.self_attn.{name}_proj.bias": (n,) for name, n in sizes.items()}
    for norm in ("token_layernorm", "hidden_layernorm", "final_layernorm"):
        shapes[f"model.mtp_layers.0.{norm}.weight"] = (hidden,)
    save_weights(folder, config, shapes | {"model.mtp_layers.0.input_proj.weight": (hidden, 2 * hidden)})
    return folder, {"method": "mtp"}


@contextmanager
def recorded_drafts() -> Iterator[list[int]]:
    """What drafters propose, by vLLM's model runner V1."""
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer as Proposer

    drafted: list[int] = []
    propose = Proposer.propose

    def recording(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        proposed = propose(self, *args, **kwargs)
        drafted.extend(proposed.flatten().tolist())
        return proposed

    with mock.patch.object(Proposer, "propose", recording):
        yield drafted


@pytest.mark.engine
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("make", [eagle3, mtp])
def test_drafters_that_read_the_targets_states(make: Any, count: int, tmp_path: Path) -> None:
    """Random drafters, whose layer is one of this backend's. They draft what they do with vLLM's own backend, as long as the
    tokens before are the same and up to near ties. The tokens are those without drafts."""
    model, drafts = make(tmp_path / "model")
    arguments = {"model": model, "skip_tokenizer_init": True, "dtype": EXACT, "enable_prefix_caching": False}
    prompts, found = random_prompts(LENGTHS), {}
    with engine(**arguments) as llm:
        answers, layers = greedy(llm, prompts), len(own_impls(llm.llm_engine.vllm_config))
    for run in ("SAGE", PLAIN):
        with engine(run, **arguments, speculative_config={**drafts, "num_speculative_tokens": count}) as llm:
            for prompt in prompts:
                with recorded_drafts() as drafted:
                    found.setdefault(run, []).append((greedy(llm, [prompt])[0], drafted))
            if run == "SAGE":
                near_tie = NEAR_TIE if torch.cuda.is_available() else 0.02
                assert_same_tokens([answer for answer, _ in found[run]], answers, near_tie)
                assert len(own_impls(llm.llm_engine.vllm_config)) == layers + 1
            assert metric(llm, "vllm:spec_decode_num_draft_tokens") > 0
            assert metric(llm, "vllm:spec_decode_num_accepted_tokens") == 0  # so that each step has one token
    same = []  # empty with model runner V2, which drafts elsewhere
    for (answer, drafted), (other, others) in zip(*found.values(), strict=True):
        alike = [*(a == b for a, b in zip(answer.tokens, other.tokens, strict=True)), False].index(False)
        first = slice(0, count * alike, count)  # of each step: later ones follow from it
        same += [a == b for a, b in zip(drafted[first], others[first], strict=True)]
    assert sum(same) >= 0.6 * len(same), f"{sum(same)} of {len(same)}"  # of 4096 tokens; logits of random weights are close
