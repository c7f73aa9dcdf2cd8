# SPDX-License-Identifier: Apache-2.0
"""Kinds of faults that users of vLLM report of its attention backends, as tests of this one. The right answer is that of the
same request alone, without what the report is about. (Kernel tests of this kind: `test_offsets.py`, and
`test_attention.test_sinks_and_windows_of_about_a_page`.)"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from random import Random
from statistics import mean
from typing import Any

import pytest
import torch
import transformers
from engines import (
    EXACT,
    NGRAM_DRAFTS,
    Answer,
    assert_same_answers,
    changes,
    engine,
    greedy,
    heldout_prompts,
    metric,
    random_prompts,
    save_random_model,
)

from sage_backend.demo.passkey import make_passkey

pytestmark = pytest.mark.engine

PAGE = 64


def scheduler(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def layers(llm: Any) -> list[Any]:
    context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    return [layer for layer in context.values() if hasattr(layer, "impl")]


def fill_cache(llm: Any, byte: int) -> None:
    """Fill all pages of an engine, those of no request, too."""
    for layer in layers(llm):
        memory = torch.empty(0, dtype=torch.uint8, device=layer.kv_cache.device)
        memory.set_(layer.kv_cache.untyped_storage()).fill_(byte)


@contextmanager
def allocations(llm: Any) -> Iterator[list[tuple[int, list[int]]]]:
    """What the pool hands out: blocks that are free afterwards, and the numbers of the blocks."""
    pool = scheduler(llm).kv_cache_manager.block_pool
    allocate, found = pool.get_new_blocks, []

    def recorded(*args: Any, **kwargs: Any) -> Any:
        blocks = allocate(*args, **kwargs)
        found.append((pool.get_num_free_blocks(), [block.block_id for block in blocks]))
        return blocks

    pool.get_new_blocks = recorded
    try:
        yield found
    finally:
        pool.get_new_blocks = allocate


# These come first: vLLM does not start a model with experts next to an engine that has none.

HYBRID: dict[str, Any] = {
    "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "vocab_size": 512, "intermediate_size": 128, "max_position_embeddings": 1024, "initializer_range": 0.1,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "sliding_window": 100,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_local_experts": 2, "num_experts_per_tok": 2,  # all are used: a choice of experts would have near ties
}  # fmt: skip


@pytest.fixture(scope="module", params=[True, False], ids=["caching", "no caching"])
def hybrid(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Sliding and full layers with sinks, and 96 blocks of 64 tokens for both kinds."""
    folder = tmp_path_factory.mktemp("hybrid")
    save_random_model(folder, transformers.GptOssConfig(**HYBRID))
    limits = {
        "max_model_len": 1024,
        "max_num_seqs": 48,
        "max_num_batched_tokens": 4096,
        "num_gpu_blocks_override": 97,
        "block_size": 64,
        "enable_prefix_caching": request.param,
    }
    with engine("SAGE:page_tokens=64", folder, skip_tokenizer_init=True, dtype=EXACT, **limits) as llm:
        yield llm


FULL = {6: (504, 503, 497, 460, 450, 449), 48: range(9, 57)}
"""Lengths of prompts that fill the 96 blocks as one batch: 6 with 8 blocks of either kind, or 48 with one."""


@pytest.mark.parametrize("requests", FULL)
def test_a_pool_that_is_full_to_the_last_block(hybrid: Any, requests: int) -> None:
    """Answers were corrupted where the last block of a context is partly filled, or where the pool has no block left."""
    prompts = random_prompts(FULL[requests])
    with allocations(hybrid) as found:
        together = greedy(hybrid, prompts, 8)
    assert min(free for free, _ in found) == 0
    assert_same_answers(together, greedy(hybrid, prompts, 8, together=False))


def owned_before(llm: Any, prompt: list[int], others: Callable[[int], list[list[int]]], turns: int) -> list[Answer]:
    """Answers to a prompt. Before, its pages are full of 0x7F, 0xFF and 0x00, and then of other prompts."""
    answers, pages = [], set()
    for turn in range(turns):
        if turn < 3:
            fill_cache(llm, (0x7F, 0xFF, 0x00)[turn])
        else:
            greedy(llm, others(turn), 2)
        assert llm.reset_prefix_cache()
        with allocations(llm) as found:
            answers += greedy(llm, [prompt], 8)
        pages.add(tuple(block for _, blocks in found for block in blocks))
    assert len(pages) > turns // 2 - torch.cuda.is_available()  # one of eight less was seen on a GPU
    return answers


def test_earlier_owners_of_pages(hybrid: Any) -> None:
    """The same prompt got other answers in pages that had other owners before: what they left behind was read. The bytes 0x7F
    and 0xFF are NaN as values and as scales."""
    [prompt] = random_prompts([300], seed=1)
    answers = owned_before(hybrid, prompt, lambda turn: random_prompts(FULL[6], seed=turn), 8)
    assert answers == answers[:1] * 8


LIMITS = {"max_num_batched_tokens": 8192, "max_num_seqs": 128, "block_size": PAGE}


@pytest.fixture(scope="module")
def plain() -> Iterator[Any]:
    """The embedded model, without drafts."""
    with engine(f"SAGE:page_tokens={PAGE}", dtype=EXACT, **LIMITS) as llm:
        yield llm


@pytest.fixture(scope="module")
def drafting() -> Iterator[Any]:
    with engine(f"SAGE:page_tokens={PAGE}", dtype=EXACT, speculative_config=NGRAM_DRAFTS, **LIMITS) as llm:
        yield llm


def test_every_length_behind_a_cached_prefix(plain: Any, drafting: Any) -> None:
    """One prompt length in 128, which was a page, gave wrong answers with prefix caching and drafts: all lengths from one page
    to two. Half of them find the first page in the cache while it is being filled, the others later."""
    [text] = heldout_prompts(plain, [2 * PAGE])
    prompts = [text[:length] for length in range(PAGE + 1, 2 * PAGE + 1)]
    expected = greedy(plain, prompts, 4, read_cache=False)
    assert {answer.cached for answer in expected} == {0}
    answers = greedy(drafting, prompts[: PAGE // 2], 4) + greedy(drafting, prompts[PAGE // 2 :], 4)
    assert [answer.cached for answer in answers] == [0] + [PAGE] * (PAGE - 1)
    assert metric(drafting, "vllm:spec_decode_num_accepted_tokens") > 3
    assert_same_answers(answers, expected)


def test_chunks_while_others_decode(plain: Any, drafting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that decodes, and computes a chunk of one token or most of the longest prompt, disturbed the requests that decode,
    or itself: buffers were sized or filled for another step. Drafts make the steps differ more."""
    longest = plain.llm_engine.vllm_config.model_config.max_model_len - 10
    prompts = heldout_prompts(plain, [PAGE, 5, 70, 300, PAGE + 1, longest])
    prompts[4][:PAGE] = prompts[0]  # so that its only chunk is its last token
    expected = greedy(plain, prompts, 8, together=False, read_cache=False)
    for llm, chunk in ((plain, 679), (drafting, longest - 1)):
        assert longest % chunk == 1  # the last chunk of the longest prompt
        monkeypatch.setattr(scheduler(llm).scheduler_config, "long_prefill_token_threshold", chunk)
        assert llm.reset_prefix_cache()
        greedy(llm, [prompts[0]], 1)
        answers = greedy(llm, prompts, 8)
        assert answers[4].cached == PAGE
        assert_same_answers(answers, expected)


CHUNKS = (63, 64, 65, 127, 129)


def changes_by_chunks(
    llm: Any, prompt: list[int], cached: int, monkeypatch: pytest.MonkeyPatch, chunks: Sequence[int] = CHUNKS
) -> tuple[Answer, dict[int, Answer]]:
    """The answer to a prompt whose first `cached` tokens are in the cache, in one chunk, and in chunks of these sizes."""
    answers = {}
    for chunk in (len(prompt), *chunks):
        assert llm.reset_prefix_cache()
        greedy(llm, [prompt[: cached + 1]], 1)
        with monkeypatch.context() as patch:
            patch.setattr(scheduler(llm), "max_num_scheduled_tokens", chunk)
            [answers[chunk]] = greedy(llm, [prompt], 6)
        assert answers[chunk].cached == cached
    return answers.pop(len(prompt)), answers


def test_chunks_behind_a_cached_prefix(plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that end inside a page, behind a prefix that is in the cache, gave other answers than one chunk. With smooth_q,
    that is documented: a chunk that ends inside a block of queries has other means, and answers within the error of codes."""
    [prompt] = heldout_prompts(plain, [PAGE + 140])
    for part, chunks in ((prompt, CHUNKS), (prompt[: PAGE + 9], [1])):
        whole, chunked = changes_by_chunks(plain, part, PAGE, monkeypatch, chunks)
        assert_same_answers(list(chunked.values()), [whole] * len(chunked))
    for layer in layers(plain):
        monkeypatch.setattr(layer.impl, "smooth_q", True)
    block = layer.impl.q_block(layer.kv_cache.device, layer.impl.layout)
    single, by_token = changes_by_chunks(plain, prompt[: PAGE + 9], PAGE, monkeypatch, [1])
    assert 0 < mean(changes(by_token[1], single)) < 0.1
    smoothed, chunked = changes_by_chunks(plain, prompt, PAGE, monkeypatch)
    assert_same_answers([chunked.pop(n) for n in CHUNKS if n % block == 0], [smoothed])
    assert 0 < max(mean(changes(each, smoothed)) for each in chunked.values()) < 0.1


MEMORY = "SAGE:page_tokens=64,memory.sink_tokens=64,memory.local_tokens=128,memory.topk_pages=4,memory.query_block=64"


@pytest.fixture(scope="module")
def remembering() -> Iterator[Any]:
    with engine(MEMORY, dtype=EXACT, num_gpu_blocks_override=40) as llm:
        yield llm


def test_chunks_with_memory(remembering: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with memory, which is documented, too: a chunk that ends inside a query block chooses its pages with fewer
    queries. Other chunks give the same answer, and all of them find the key."""
    tokenizer = remembering.get_tokenizer()
    text, key = make_passkey(800, 0.3, Random(0), tokenizer)
    whole, chunked = changes_by_chunks(remembering, tokenizer.encode(text), 640, monkeypatch)
    _, by_token = changes_by_chunks(remembering, tokenizer.encode(text), 768, monkeypatch, [1])
    for answer in (whole, *chunked.values(), by_token[1]):
        assert tokenizer.decode(answer.tokens).strip().startswith(key)
    assert_same_answers([chunked.pop(64)], [whole])
    assert max(mean(changes(each, whole)) for each in chunked.values()) > 0


def test_earlier_owners_of_summaries(remembering: Any) -> None:
    """The same with memory, whose pages have summaries."""
    prompt, *rest = heldout_prompts(remembering, [600, 560, 300, 300, 560])
    answers = owned_before(remembering, prompt, lambda turn: rest[2 * (turn - 3) : 2 * (turn - 2)], 5)
    assert answers == answers[:1] * 5


LONG_DRAFTS = NGRAM_DRAFTS | {"num_speculative_tokens": 40}
"""With two query heads for a KV head, more rows than a decode kernel takes: they go through the prefill kernel."""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, for CUDA graphs")
@pytest.mark.parametrize(
    ("run", "drafts"),
    [("SAGE:k_bits=4", LONG_DRAFTS), ("SAGE:k_bits=4,v_bits=4", LONG_DRAFTS), ("SAGE:k_bits=4,v_bits=4", None)],
)
def test_graphs_fit_contexts_longer_than_those_of_their_capture(run: str, drafts: Any) -> None:
    """A graph captured long drafts with memory for the widened pages of short contexts, and later read behind it. The text
    repeats itself, so that most drafts are whole, and such steps replay a graph."""
    tokens = (drafts or {}).get("num_speculative_tokens", 0) + 1
    graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [tokens, 2 * tokens, 4 * tokens]}
    arguments = {"dtype": EXACT, "speculative_config": drafts, "max_num_seqs": 4}
    with engine(run, **arguments) as llm:
        prompts = [(text * 9)[: 1700 + i] for i, text in enumerate(heldout_prompts(llm, [150, 200, 250, 300]))]
        expected = greedy(llm, prompts, 160)
    with engine(run, enforce_eager=False, compilation_config=graphs, **arguments) as llm:
        answers = greedy(llm, prompts, 160)
        if drafts:
            assert metric(llm, "vllm:spec_decode_num_draft_tokens") > 30 * metric(llm, "vllm:spec_decode_num_drafts")
    assert_same_answers(answers, expected)
