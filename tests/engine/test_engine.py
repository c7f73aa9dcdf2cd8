# SPDX-License-Identifier: Apache-2.0
"""The backend inside vLLM: however the engine processes a request, its tokens are the same."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from engines import (
    EXACT,
    NEAR_TIE,
    NGRAM_DRAFTS,
    PLAIN,
    WARMED_UP,
    Answer,
    assert_same_tokens,
    capacity,
    engine,
    give_two_workers_cores,
    greedy,
    heldout_prompts,
    metric,
    prompt_logprobs,
    random_prompts,
    save_random_model,
)
from recording import scraped

from sage_backend.features.layers import own_impls
from sage_backend.observability import sinks

pytestmark = pytest.mark.engine

LENGTHS = (5, 127, 128, 129, 300, 700)
CASES = [("SAGE", "bfloat16"), ("SAGE", "float16")]
if not torch.cuda.is_available():
    # Float32 rounds the model's other layers least. On some processors, their sums still depend on the rows of a batch. A code
    # that changes in an early layer then changes more in later layers, and can change a token at a near tie.
    CASES.append(("SAGE:k_bits=4,v_bits=4", "float32"))


@dataclass
class Plain:
    """The reference: all prompts at once, without chunks, with enough pages and nothing cached. Then the same from the prefix
    cache, and one by one."""

    run: str
    dtype: str
    prompts: list[list[int]]
    answers: list[Answer]
    cached: list[Answer]
    one_by_one: list[Answer]


@pytest.fixture(scope="module", params=CASES, ids=" ".join)
def plain(request: pytest.FixtureRequest) -> Iterator[Plain]:
    run, dtype = request.param
    with engine(run, dtype=dtype, enable_prefix_caching=True, max_num_batched_tokens=8192) as llm:
        prompts = heldout_prompts(llm, LENGTHS)
        answers = greedy(llm, prompts)
        cached = greedy(llm, prompts)
        assert llm.reset_prefix_cache()
        yield Plain(run, dtype, prompts, answers, cached, greedy(llm, prompts, together=False))


def test_prefix_cache(plain: Plain) -> None:
    assert [answer.cached for answer in plain.answers] == [0] * len(LENGTHS)
    assert [answer.cached for answer in plain.cached] == [(length - 1) // 128 * 128 for length in LENGTHS]
    assert_same_tokens(plain.cached, plain.answers, NEAR_TIE)


def test_one_by_one(plain: Plain) -> None:
    assert_same_tokens(plain.one_by_one, plain.answers, NEAR_TIE)


def test_small_chunks(plain: Plain) -> None:
    """Chunks of at most 64 tokens: prefills and decodes share batches, and pages are filled piece by piece."""
    limits = {"max_num_batched_tokens": 64, "max_num_seqs": 16}
    with engine(plain.run, dtype=plain.dtype, enable_prefix_caching=False, **limits) as llm:
        assert_same_tokens(greedy(llm, plain.prompts), plain.answers, NEAR_TIE)


def test_preemption(plain: Plain) -> None:
    """Too few blocks for all requests: some are preempted and computed again."""
    with engine(plain.run, dtype=plain.dtype, enable_prefix_caching=False, num_gpu_blocks_override=18) as llm:
        # The prompts fit: they take 16 pages, and vLLM keeps one. Their continuations do not.
        prompts = [plain.prompts[-1][:length] for length in (510, 511, 512, 500)]
        together = greedy(llm, prompts)
        assert metric(llm, "vllm:num_preemptions") > 0
        assert_same_tokens(together, greedy(llm, prompts, together=False), NEAR_TIE)


def test_speculative_decoding(plain: Plain) -> None:
    """Drafts taken from the prompt, verified several tokens at a time."""
    with engine(plain.run, dtype=plain.dtype, enable_prefix_caching=False, speculative_config=NGRAM_DRAFTS) as llm:
        answers = greedy(llm, plain.prompts)
        assert metric(llm, "vllm:spec_decode_num_accepted_tokens") > 0
        assert_same_tokens(answers, plain.answers, NEAR_TIE)


def test_capacity() -> None:
    """Heads of 128 channels: the same memory holds this many more tokens."""
    tokens = {}
    for run in (PLAIN, "SAGE", "SAGE:k_bits=4", "SAGE:k_bits=4,v_bits=4"):
        with engine(run) as llm:
            tokens[run] = capacity(llm)
    assert tokens["SAGE"] >= 1.88 * tokens[PLAIN]
    assert tokens["SAGE:k_bits=4"] >= 2.32 * tokens[PLAIN]
    assert tokens["SAGE:k_bits=4,v_bits=4"] >= 3.19 * tokens[PLAIN]


@pytest.fixture(scope="module")
def eager() -> tuple[list[list[int]], list[Answer]]:
    """Prompts, and the answers of an eager engine."""
    with engine(dtype=EXACT) as llm:
        prompts = heldout_prompts(llm, LENGTHS)
        return prompts, greedy(llm, prompts)


def test_small_pages(eager: tuple[list[list[int]], list[Answer]]) -> None:
    prompts, answers = eager
    with engine("SAGE:page_tokens=64", dtype=EXACT) as llm:
        assert_same_tokens(greedy(llm, prompts), answers, NEAR_TIE)


def test_smoothed_queries() -> None:
    """Decoding works, and prompts get nearly the same log-probabilities as without smoothing."""
    with engine("SAGE:smooth_q=true", dtype=EXACT, enable_prefix_caching=False) as llm:
        prompts = heldout_prompts(llm, LENGTHS)
        assert all(len(answer.tokens) == 8 for answer in greedy(llm, prompts, tokens=8))
        smoothed = prompt_logprobs(llm, prompts)
        for layer in llm.llm_engine.vllm_config.compilation_config.static_forward_context.values():
            assert layer.impl.smooth_q
            layer.impl.smooth_q = False
        change = (prompt_logprobs(llm, prompts) - smoothed).abs()
        assert 0 < change.mean() < 0.1


def test_compiled_model(eager: tuple[list[list[int]], list[Answer]]) -> None:
    """Without enforce_eager: through torch.compile and, on a GPU, CUDA graphs."""
    prompts, answers = eager
    with engine(dtype=EXACT, enforce_eager=False) as llm:
        assert_same_tokens(greedy(llm, prompts), answers, NEAR_TIE)


@pytest.mark.parametrize(
    "arguments", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2, **WARMED_UP}], ids=["tensor", "pipeline"]
)
def test_two_workers(
    arguments: dict[str, Any], eager: tuple[list[list[int]], list[Answer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In processes of their own, each with half of the heads, or half of the layers."""
    give_two_workers_cores(monkeypatch)
    prompts, answers = eager
    with engine(dtype=EXACT, **arguments) as llm:
        assert_same_tokens(greedy(llm, prompts), answers, NEAR_TIE)


ATTENTION = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
SIZES = {"vocab_size": 512, "intermediate_size": 128, "max_position_embeddings": 1024, "initializer_range": 0.1}
TOKENS = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
BASE: dict[str, Any] = {**ATTENTION, **SIZES, **TOKENS}
SLIDING: dict[str, Any] = {"sliding_window": 100, "layer_types": ["sliding_attention", "full_attention"] * 2}
LINEAR = ["linear_attention", "full_attention"] * 2
MAMBA = {"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1}
DELTA_NET = {f"linear_{name}": 2 if name.startswith("num") else 64 for name in (
    "num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim",
)}  # fmt: skip
# Every expert is always used: a different choice of experts would not come from attention.
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
GEMMA4 = {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "hidden_size_per_layer_input": 0}
GEMMA3N = {"vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 32, "laurel_rank": 8, "altup_num_inputs": 2}
SHARING = {"num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.0] * 4, "intermediate_size": [128] * 4}

# For each: the kind of configuration, what differs from BASE, and the attribute of SageImpl that the model tests, broken.
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "one KV head a query head": ("Llama", {"num_key_value_heads": 4, "head_dim": 96}, {}),
    "one KV head for all": ("Llama", {"num_key_value_heads": 1, "head_dim": 80}, {}),
    "sliding window": ("Mistral", {"sliding_window": 100}, {"window": 0}),
    "soft cap": (
        "Gemma2",
        {**SLIDING, "head_dim": 256, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 16},
        {"soft_cap": 0.0},
    ),
    "sliding and full layers": ("Gemma3Text", {**SLIDING, "head_dim": 256, "query_pre_attn_scalar": 64}, {"window": 0}),
    "two head sizes": ("Gemma4Text", {**SLIDING, **GEMMA4, "head_dim": 256, "global_head_dim": 512}, {"window": 0}),
    "sinks": ("GptOss", {**SLIDING, "num_local_experts": 2, "num_experts_per_tok": 2}, {"sinks": None}),
    "shared KV": ("Gemma3nText", {**SLIDING, **GEMMA3N, **SHARING}, {}),
    "attention beside Mamba": ("FalconH1", MAMBA, {}),
    "attention between linear attention": ("Qwen3Next", {**DELTA_NET, **EXPERTS, "layer_types": LINEAR}, {}),
}
NOISE = 0.12
"""Bound on the mean change of a token's log-probability in these models, in nats; a broken mask changes it by more."""


@pytest.mark.parametrize("name", MODELS)
def test_features_of_models(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models with random weights give every token nearly the log-probability that vLLM's own backend gives it."""
    kind, values, flaw = MODELS[name]
    save_random_model(tmp_path, getattr(transformers, f"{kind}Config")(**BASE | values))
    prompts = random_prompts((500, 130, 20))

    def logprobs(run: str) -> torch.Tensor:
        limits = {"max_model_len": 1024, "max_num_batched_tokens": 256, "max_num_seqs": 8, "enable_prefix_caching": False}
        with engine(run, tmp_path, skip_tokenizer_init=True, dtype="bfloat16", **limits) as llm:
            return prompt_logprobs(llm, prompts)

    expected, actual = logprobs(PLAIN), logprobs("SAGE")
    assert expected.std() > 0.5  # the model does not predict all tokens alike
    assert (actual - expected).abs().mean() < NOISE

    if flaw:
        from sage_backend.engine.impl import SageImpl

        whole = SageImpl.__init__

        def flawed(self: SageImpl, *args: Any, **kwargs: Any) -> None:
            whole(self, *args, **kwargs)
            vars(self).update(flaw)

        monkeypatch.setattr(SageImpl, "__init__", flawed)
        assert (logprobs("SAGE") - expected).abs().mean() > 2 * NOISE, "this test would not notice"


@pytest.mark.parametrize("dense", ["[]", "[1]"])
def test_memory_of_layers_that_share_keys(dense: str, tmp_path: Path) -> None:
    """Layer 3 has the pages of layer 1 and recalls some of them, also where layer 1 itself reads everything. Metrics are of a
    layer that has memory, which layer 0, with its sliding window, has not."""
    save_random_model(tmp_path, transformers.Gemma3nTextConfig(**BASE | MODELS["shared KV"][1]))
    options = {"sink_tokens": 128, "local_tokens": 128, "topk_pages": 1, "query_block": 128, "dense_layers": dense}
    run = "SAGE:" + ",".join(f"memory.{name}={value}" for name, value in options.items())
    with engine(run, tmp_path, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=1024) as llm:
        greedy(llm, random_prompts((900,)), 1)
        config = llm.llm_engine.vllm_config
        impls, layers = own_impls(config), config.compilation_config.static_forward_context
        [owner, sharer] = [name for name, impl in impls.items() if not impl.window]
        assert impls[sharer].kv_sharing_target_layer_name == owner
        assert impls[sharer].memory_of(layers[sharer]) is not None
        layout, pages = impls[owner].layout, impls[owner].layout.pages(layers[owner].kv_cache)
        radius = layout.views(pages).summary[..., 1, :].float()
        assert int((radius > 0).flatten(1).any(1).sum()) >= 900 // 128
        values = scraped(sinks.directory(config))
        assert values["sage_memory_scored_pages_total", "prefill"] > 0
        assert ("sage_memory_attention_mass_covered_count", "prefill") in values


def test_unknown_head_sizes_are_refused_by_name(tmp_path: Path) -> None:
    """Also those that only some layers have."""
    values = {**SLIDING, **GEMMA4, "global_head_dim": 320}
    save_random_model(tmp_path, transformers.Gemma4TextConfig(**BASE | values))
    arguments = {"skip_tokenizer_init": True, "max_model_len": 1024}
    with pytest.raises(ValueError, match="head size 320 has no page format"), engine(model=tmp_path, **arguments):
        pass
