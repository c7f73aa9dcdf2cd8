# SPDX-License-Identifier: Apache-2.0
"""How an engine serves compression plugins."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from engines import (
    EXACT,
    NEAR_TIE,
    NGRAM_DRAFTS,
    WARMED_UP,
    Answer,
    assert_same_tokens,
    engine,
    environment,
    give_two_workers_cores,
    greedy,
    heldout_prompts,
    metric,
    random_prompts,
    save_random_model,
)
from loud_plugins import LAYERS, loud_plugins
from prometheus_client import REGISTRY
from recording import scraped

from sage_backend.demo import PLUGINS
from sage_backend.engine.patches import block_hash
from sage_backend.observability import sinks
from sage_backend.options import MIN_TAIL
from sage_backend.tools import quality
from sage_backend.variator import files, train
from sage_backend.variator.admission import PLAN_KEY, RATIO, TAIL
from sage_backend.variator.groups import PLAIN, START, CompressionPlan

LENGTHS = (700, 300, 129 + START, 400, 90)
OPTIONS = {"smooth_k": False}


def ask(llm: Any, prompts: Sequence[list[int]], asked: Sequence[dict[str, int]], tokens: int = 16) -> list[Answer]:
    """Continue the prompts as one batch. asked: the extra arguments of each."""
    return greedy(llm, prompts, tokens, extra_args=[dict(each) for each in asked])


def ask_all(llm: Any, prompts: Sequence[list[int]], ratio: int) -> list[Answer]:
    return ask(llm, prompts, [asking(ratio)] * len(prompts))


def asking(ratio: int) -> dict[str, int]:
    """With the shortest possible tail, because the answer depends on the tail most."""
    return {RATIO: ratio, TAIL: MIN_TAIL}


def compressing(plugins: Path, dtype: str = EXACT, **arguments: Any) -> Any:
    """An engine with plugins that chooses ratios by load."""
    options = {**OPTIONS, "variator": {"plugins": str(plugins), "waiting": 4}}
    return engine(dtype=dtype, additional_config={"sage": options}, **arguments)


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return loud_plugins(tmp_path_factory.mktemp("plugins"))


@pytest.fixture(scope="module")
def plain() -> tuple[list[list[int]], list[Answer]]:
    """Prompts, and the answers of an engine without plugins."""
    with engine(dtype=EXACT, additional_config={"sage": OPTIONS}) as llm:
        prompts = heldout_prompts(llm, LENGTHS)
        return prompts, ask_all(llm, prompts, 1)


@pytest.fixture(scope="module")
def served(plugins: Path, plain: tuple[list[list[int]], list[Answer]]) -> Iterator[Any]:
    """This engine ends when a test starts another one, so the tests that use it come first."""
    with compressing(plugins, enable_prefix_caching=True, max_num_batched_tokens=2048, max_num_seqs=4) as llm:
        yield llm


@pytest.fixture(scope="module")
def answers(served: Any, plain: tuple[list[list[int]], list[Answer]]) -> dict[int, list[Answer]]:
    """Answers of the compressing engine, by ratio, each from an empty prefix cache."""
    found = {}
    for ratio in (1, 2, 4):
        assert served.reset_prefix_cache()
        found[ratio] = ask_all(served, plain[0], ratio)
        assert not any(answer.cached for answer in found[ratio])
    return found


def counted(name: str) -> dict[str, float]:
    """A metric's values by ratio, summed over all engines that this process has had."""
    found: dict[str, float] = {}
    for family in REGISTRY.collect():
        for sample in family.samples:
            if sample.name == name:
                ratio = sample.labels.get("ratio", "")
                found[ratio] = found.get(ratio, 0) + sample.value
    return found


def change(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {ratio: after[ratio] - before.get(ratio, 0) for ratio in after if after[ratio] != before.get(ratio, 0)}


def distance(a: Answer, b: Answer) -> float:
    """The mean difference of the tokens' margins, in nats, up to the first token that differs. There the difference is the sum
    of both margins: each answer prefers its token to the other's by that much or more."""
    same = next((i for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=True)) if x != y), len(a.tokens))
    parts = [abs(x - y) for x, y in zip(a.margins[:same], b.margins[:same], strict=True)]
    if same < len(a.tokens):
        parts.append(a.margins[same] + b.margins[same])
    return sum(parts) / len(parts)


TIE, NOISE = (0.0, 0.1) if EXACT == "float32" else (NEAR_TIE, 0.2)
"""Bounds for answers that count as the same, in nats: on the margin of a token that differs, and on their distance."""


def assert_same(actual: Sequence[Answer], expected: Sequence[Answer], near_tie: float = 0.0) -> None:
    assert_same_tokens(actual, expected, max(near_tie, TIE))
    assert max(map(distance, actual, expected)) < NOISE


@pytest.mark.engine
def test_ratios_are_told_apart(answers: dict[int, list[Answer]], plain: tuple[list[list[int]], list[Answer]]) -> None:
    """Without compression, the tokens are those of the plain engine. With these plugins, every ratio gives other answers."""
    assert_same(answers[1], plain[1])
    for i, length in enumerate(LENGTHS):
        for a, b in ((1, 2), (1, 4), (2, 4)):
            assert distance(answers[a][i], answers[b][i]) > 2 * NOISE, f"prompt of {length}, ratios {a} and {b}"


@pytest.mark.engine
def test_mixed_load(served: Any, answers: dict[int, list[Answer]], plain: tuple[list[list[int]], list[Answer]]) -> None:
    """Requests of all ratios in one batch: each gets the same as in a batch of its own ratio."""
    for shift in range(3):
        assert served.reset_prefix_cache()
        ratios = [(1, 2, 4)[(i + shift) % 3] for i in range(len(LENGTHS))]
        mixed = ask(served, plain[0], [asking(ratio) for ratio in ratios])
        assert_same(mixed, [answers[ratio][i] for i, ratio in enumerate(ratios)])


@pytest.mark.engine
def test_prefix_cache(served: Any, answers: dict[int, list[Answer]], plain: tuple[list[list[int]], list[Answer]]) -> None:
    """Blocks are found again with the ratio that they were computed with, and with no other."""
    assert served.reset_prefix_cache()
    for ratio in (4, 1, 2):
        for cached in (False, True):
            found = ask_all(served, plain[0], ratio)
            assert_same(found, answers[ratio])
            assert [a.cached for a in found] == [(length - 1) // 128 * 128 * cached for length in LENGTHS]


@pytest.mark.engine
def test_prompts_that_share_a_start(
    served: Any, answers: dict[int, list[Answer]], plain: tuple[list[list[int]], list[Answer]]
) -> None:
    """The uncompressed end of one prompt is not taken for the compressed middle of another, nor the other way around."""
    long, short = plain[0][0], plain[0][0][:520]
    for first, second in ((short, long), (long, short)):
        assert served.reset_prefix_cache()
        alone = ask_all(served, [second], 2)
        assert served.reset_prefix_cache()
        ask_all(served, [first], 2)
        again = ask_all(served, [second], 2)
        # 504 tokens of the short prompt are in groups: three blocks and a part of the fourth.
        assert again[0].cached == 384
        assert_same(again, alone)


@pytest.mark.engine
def test_metrics(served: Any, plain: tuple[list[list[int]], list[Answer]]) -> None:
    assert served.reset_prefix_cache()
    names = "requests_total", "compressed_tokens_total", "saved_operations_total"
    before = [counted(f"sage_variator_{name}") for name in names]
    ask(served, plain[0], [{RATIO: 4}, {RATIO: 4, TAIL: 100}, {RATIO: 2}, {RATIO: 1}, {RATIO: 1}])
    requests, tokens, operations = (
        change(old, counted(f"sage_variator_{name}")) for old, name in zip(before, names, strict=True)
    )
    assert requests == {"4": 2, "2": 1, "1": 2}
    fours = 636 + 200 - 2 * START
    assert tokens == {"4": fours, "2": 64}
    of_plugins = 2 * 256 * (fours * 5 + 64 * 3 + 64 * (2 * fours + fours // 4 + 2 * 64 + 32))
    assert operations == {"": 2 * (2 * 3 * 256 * 768 * (fours * 3 // 4 + 64 // 2) - of_plugins)}


@pytest.mark.engine
def test_load(served: Any, plain: tuple[list[list[int]], list[Answer]]) -> None:
    """With at most four running requests, ratios go up while others wait and down when none do. A request can opt out."""
    prompts, expected = plain
    before = counted("sage_variator_requests_total")
    crowd = [prompts[0][i : i + 200] for i in range(16)]
    together = ask(served, [*crowd, prompts[1]], [*[{}] * 16, {RATIO: 1}], tokens=16)
    seen = change(before, counted("sage_variator_requests_total"))
    assert sum(seen.values()) == 17
    assert seen["4"] >= 4
    assert_same(together[-1:], expected[1:2])
    alone = counted("sage_variator_requests_total")
    for _ in range(3):
        ask(served, [prompts[3]], [{}])
    assert change(alone, counted("sage_variator_requests_total"))["1"] >= 1
    alone = counted("sage_variator_requests_total")
    ask(served, [prompts[3]], [{}])
    assert change(alone, counted("sage_variator_requests_total")) == {"1": 1}


@pytest.mark.engine
def test_cached_prompts_under_load(served: Any, plain: tuple[list[list[int]], list[Answer]]) -> None:
    """What was computed without compression is used under load, too, where it leaves less to compute."""
    prompts, expected = plain
    assert served.reset_prefix_cache()
    ask(served, prompts[:1], [{RATIO: 1}])
    crowd = [prompts[1][i : i + 200] for i in range(16)]
    before = counted("sage_variator_requests_total")
    *_, again = ask(served, [*crowd, prompts[0]], [{}] * 17, tokens=len(expected[0].tokens))
    assert change(before, counted("sage_variator_requests_total"))["4"] >= 4
    assert again.cached == (LENGTHS[0] - 1) // 128 * 128
    assert_same([again], expected[:1])


@pytest.mark.engine
def test_requests_for_what_there_is_not(served: Any, plain: tuple[list[list[int]], list[Answer]]) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match="sage_ratio is 8; this server has 1, 2, 4"):
        ask(served, plain[0][:1], [{RATIO: 8}])


def reference_logprobs(model: Path, plugins: Path, prompts: Sequence[list[int]], ratio: int, cut: int) -> torch.Tensor:
    """Log-probabilities of tokens after the first `cut`, from the training's own pass; with ratio 1, from the plain model."""
    hidden = transformers.AutoConfig.from_pretrained(model).hidden_size
    loaded = {layer: files.load(str(plugins), layer, hidden, [2, 4]) for layer in LAYERS}
    for by_ratio in loaded.values():
        for plugin in by_ratio.values():
            plugin.float()
    attached = train.Attached(transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), loaded)
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        batch = train.Batch(ids, cut, torch.ones(1, len(prompt) - cut, dtype=torch.bool))
        with torch.no_grad(), attached.compressing(ratio, cut):
            logprobs = attached.log_probabilities(attached.hidden(batch))[:-1]
        found.append(logprobs.gather(1, ids[0, cut + 1 :, None])[:, 0])
    return torch.cat(found)


MODELS: dict[str, dict[str, Any]] = {
    "Gemma3Text": {
        "final_logit_softcapping": 20.0,
        "initializer_range": 0.2,
        "sliding_window": 128,
        "query_pre_attn_scalar": 64,
    },
    "Glm4": {"partial_rotary_factor": 0.5},
    "Granite": {"logits_scaling": 0.4, "embedding_multiplier": 2.0, "residual_multiplier": 0.7, "attention_multiplier": 0.1},
    "Llama": {},
    "Mistral": {"sliding_window": None},
    "Phi3": {},
    "Qwen2": {},
    "Qwen3": {},
}


@pytest.mark.engine
@pytest.mark.parametrize("kind", MODELS)
def test_what_is_served_is_what_was_trained(kind: str, tmp_path: Path) -> None:
    """Log-probabilities after a compressed prompt, in the engine and in the pass that plugins are trained with."""
    from vllm import SamplingParams

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "vocab_size": 512}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "initializer_range": 0.1}
    special = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "max_position_embeddings": 1024}
    model = tmp_path / "model"
    save_random_model(model, getattr(transformers, f"{kind}Config")(**{**sizes, **heads, **special, **MODELS[kind]}))
    path = loud_plugins(tmp_path, model)
    prompts = random_prompts((500, 330))
    options = {"sage": {**OPTIONS, "variator": {"plugins": str(path), "ratio": 4}}}
    scored = {"temperature": 0, "max_tokens": 1, "prompt_logprobs": 0, "flat_logprobs": True, "detokenize": False}
    parameters = [SamplingParams(**scored, extra_args={TAIL: len(prompt) - 256}) for prompt in prompts]
    limits = {"max_model_len": 1024, "max_num_batched_tokens": 200, "skip_tokenizer_init": True}
    with engine(model=model, dtype=EXACT, additional_config=options, **limits) as llm:
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], parameters, use_tqdm=False)
    actual = torch.cat([torch.tensor(output.prompt_logprobs.logprobs)[256:] for output in outputs])
    compressed, plain = (reference_logprobs(model, path, prompts, ratio, 256) for ratio in (4, 1))
    assert (compressed - plain).abs().mean() > 0.2
    bound = 0.2 if EXACT == "float32" else 0.3
    assert (actual - compressed).abs().mean() < bound * (compressed - plain).abs().mean()


@pytest.mark.engine
def test_quality(tmp_path: Path) -> None:
    """The embedded model's plugins at ratio 2: the loss after a compressed prompt, and whether pass keys are found in it."""
    runs = ["SAGE", f"SAGE:variator.plugins={PLUGINS},variator.ratio=2"]
    sizes = ["--tokens", "8192", "--prompt", "1024", "--passkey", "2040", "--out", str(tmp_path / "report")]
    with environment():
        assert quality.main([*runs, *sizes]) == 0
    report = json.loads((tmp_path / "report").read_text())
    plain, pairs = report["runs"]
    assert report["predicted_tokens"] == 4 * (2047 - 1024 - 1)
    assert pairs["loss"] != plain["loss"]
    assert pairs["loss"] < 1.01 * plain["loss"]
    assert pairs["passkey"] == {"2040": 1.0}


@pytest.mark.engine
def test_small_chunks(plugins: Path, answers: dict[int, list[Answer]], plain: tuple[list[list[int]], list[Answer]]) -> None:
    """Chunks of at most 50 tokens, which is a multiple neither of 4 nor of a page, next to decodes."""
    with compressing(plugins, enable_prefix_caching=False, max_num_batched_tokens=50, max_num_seqs=16) as llm:
        for ratio in (2, 4):
            assert_same(ask_all(llm, plain[0], ratio), answers[ratio])


@pytest.mark.engine
def test_preemption(plugins: Path, plain: tuple[list[list[int]], list[Answer]]) -> None:
    """Too few blocks for all requests: some are preempted, and computed again with the ratio that they had."""
    with compressing(plugins, enable_prefix_caching=False, num_gpu_blocks_override=18) as llm:
        prompts = [plain[0][0][:length] for length in (510, 511, 512, 500)]
        asked = [asking(ratio) for ratio in (4, 2, 4, 1)]
        together = ask(llm, prompts, asked, tokens=32)
        assert metric(llm, "vllm:num_preemptions") > 0
        for i in range(4):
            assert_same(together[i : i + 1], ask(llm, prompts[i : i + 1], asked[i : i + 1], tokens=32))


@pytest.mark.engine
def test_compiled_model(plugins: Path, answers: dict[int, list[Answer]], plain: tuple[list[list[int]], list[Answer]]) -> None:
    """With torch.compile, which must not trace into the op, and on a GPU with CUDA graphs, which must not contain it."""
    with compressing(plugins, enforce_eager=False) as llm:
        for ratio in (1, 4):
            assert_same(ask_all(llm, plain[0], ratio), answers[ratio], 0.05)


@pytest.mark.engine
def test_tensor_parallel(plugins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers in processes of their own, each with half of every FFN."""
    with compressing(plugins) as llm:
        prompts = heldout_prompts(llm, LENGTHS)
        expected = ask_all(llm, prompts, 4)
    give_two_workers_cores(monkeypatch)
    with compressing(plugins, tensor_parallel_size=2) as llm:
        assert_same(ask_all(llm, prompts, 4), expected, 0.05)


@pytest.mark.engine
def test_pipeline_parallel(
    plugins: Path, answers: dict[int, list[Answer]], plain: tuple[list[list[int]], list[Answer]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Two workers, each with half of the layers and their plugins."""
    give_two_workers_cores(monkeypatch)
    with compressing(plugins, pipeline_parallel_size=2, **WARMED_UP) as llm:
        assert_same(ask_all(llm, plain[0], 4), answers[4])
        values = scraped(sinks.directory(llm.llm_engine.vllm_config))
        assert values["sage_variator_compressed_tokens_total", "4"] > 0


@pytest.mark.engine
def test_speculative_decoding(
    plugins: Path, answers: dict[int, list[Answer]], plain: tuple[list[list[int]], list[Answer]]
) -> None:
    limits = {"enable_prefix_caching": False, "max_num_batched_tokens": 64, "max_num_seqs": 8}
    with compressing(plugins, speculative_config=NGRAM_DRAFTS, **limits) as llm:
        assert_same(ask_all(llm, plain[0], 4), answers[4])


def test_hashes_of_blocks() -> None:
    """A block's hash contains the ratio and the number of its tokens in groups. Without groups, nothing is added."""
    with environment():
        from vllm.v1.core import kv_cache_utils

        block_hash.apply()

        def keys(reading: CompressionPlan | None, first: int) -> Any:
            request = SimpleNamespace(mm_features=[], lora_request=None, cache_salt="salt", prompt_embeds=None)
            if reading is not None:
                setattr(request, PLAN_KEY, reading)
            return kv_cache_utils.generate_block_hash_extra_keys(request, first, first + 128, 0)[0]

        assert keys(None, 0) == keys(PLAIN, 0) == (("cache_salt", "salt"),)
        assert keys(CompressionPlan(2, 200), 0) == (("cache_salt", "salt"), (PLAN_KEY, f"2:{128 - START}"))
        assert keys(CompressionPlan(4, 200), 128) == ((PLAN_KEY, "4:72"),)
        assert keys(CompressionPlan(2, 200), 256) is None
