# SPDX-License-Identifier: Apache-2.0
"""A drafter follows its target to this backend, unless the user or the drafter's architecture says otherwise."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import NEAR_TIE, assert_same_tokens, capacity, engine, environment, greedy, heldout_prompts, logged, metric
from recording import scraped

from sage_backend import BACKEND, plugin
from sage_backend.demo import MODEL_DIR
from sage_backend.features.layers import own_impls
from sage_backend.observability import sinks

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
def test_drafters_in_an_engine() -> None:
    """The same tokens without drafts, with drafts of this backend, and with drafts of vLLM's choice, which on a GPU (by model
    runner V2) is the target's backend. The bytes of a token are those that the memory has for it."""
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
