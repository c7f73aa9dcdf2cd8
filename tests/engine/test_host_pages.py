# SPDX-License-Identifier: Apache-2.0
"""Pages in host memory, in an engine: whatever it does, its answers are those of an engine with all pages in its own memory."""

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import (
    NEAR_TIE,
    NGRAM_DRAFTS,
    Answer,
    assert_same_tokens,
    capacity,
    engine,
    environment,
    give_two_workers_cores,
    greedy,
    heldout_prompts,
    metric,
)
from recording import scraped

from sage_backend.demo.passkey import make_passkey
from sage_backend.engine import host_pages
from sage_backend.observability import sinks
from sage_kernels import PageCache, PagedBatch, RopeShift
from sage_paged import PageLayout

RUN = "SAGE:memory.local_tokens=1024,memory.topk_pages=16,memory.extrapolate=2048"
LONG = {"max_model_len": 8192, "hf_overrides": {"max_position_embeddings": 8192}, "max_num_batched_tokens": 1024}
NEEDED = 30
"""Pages that a query block reads: 1 sink, 16 recalled and 13 local ones."""
HOST_GIB, PAGES = 0.03, 119
"""The size of the pool, in which all pass-key prompts have room."""
FEW_GIB, FEW_PAGES = 0.0092, 36
"""That of a pool in which few of the requests of `traffic` have room at a time."""
LAYERS, KV_HEADS, LAYOUT = 4, 2, PageLayout(128)
"""Of the embedded model."""
NOISE = NEAR_TIE if torch.cuda.is_available() else 0.0
"""Bound on the change of a log-probability by host pages, in nats. On a GPU, the work of a step is cut into other parts."""


def device_bytes(frames: int, pages: int = PAGES) -> int:
    """What an engine needs in its own memory for that many frames."""
    fixed, of_frame = (size(LAYOUT, KV_HEADS) for size in (PageCache.block_bytes, PageCache.frame_bytes))
    return LAYERS * (pages * fixed + frames * of_frame)


FRAMES = NEEDED + 3
HOSTED = f"{RUN},memory.host_gib={HOST_GIB}"
SMALL = {**LONG, "kv_cache_memory_bytes": device_bytes(FRAMES)}


@pytest.fixture(scope="module")
def hosted() -> Iterator[Any]:
    """Its own memory has room for 3 pages more than a query block reads."""
    with engine(HOSTED, **SMALL) as llm:
        FETCHED_AT_START.append(fetched(llm))
        yield llm


FETCHED_AT_START: list[int] = []
"""What the engine `hosted` fetched before the first request of a test."""


@pytest.fixture(scope="module")
def whole() -> Iterator[Any]:
    """As many pages, all of them in its own memory."""
    with engine(RUN, num_gpu_blocks_override=PAGES, **LONG) as llm:
        yield llm


def caches(llm: Any) -> list[PageCache]:
    return [impl.cache for impl in host_pages.owners(llm.llm_engine.vllm_config).values()]


def fetched(llm: Any) -> int:
    """Pages of a KV head of a layer that were fetched since the engine's start."""
    return sum(int(cache.fetched.sum()) for cache in caches(llm))


def assert_same(actual: Sequence[Answer], expected: Sequence[Answer]) -> None:
    """Assert that the answers are the same, with the same log-probabilities and as much from the prefix cache."""
    assert [answer.cached for answer in actual] == [answer.cached for answer in expected]
    assert_same_tokens(actual, expected, 2 * NOISE)
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        if a.tokens == b.tokens:
            change = max(abs(x - y) for x, y in zip(a.logprobs, b.logprobs, strict=True))
            assert change <= NOISE, f"request {i}: a log-probability changes by {change}"


def check_caches(llm: Any) -> None:
    """Assert that the page tables are inverse, and that every frame has what its page has."""
    assert host_pages.damage(llm.llm_engine.vllm_config) == ""


@pytest.mark.engine
def test_answers_with_few_pages_in_memory(hosted: Any, whole: Any) -> None:
    """Pass-key prompts of up to three times the trained length, together. The second round comes from the prefix cache."""
    tokenizer = hosted.get_tokenizer()
    texts, keys = zip(*(make_passkey(n, 0.3, Random(n), tokenizer) for n in (500, 1500, 6000)), strict=True)
    prompts = [tokenizer.encode(text) for text in texts]
    before = fetched(hosted)
    for turn in range(2):
        answers = greedy(hosted, prompts, 8)
        assert_same(answers, greedy(whole, prompts, 8))
        assert [answer.cached for answer in answers] == [turn * ((len(prompt) - 1) // 128 * 128) for prompt in prompts]
        check_caches(hosted)
    for answer, key in zip(answers, keys, strict=True):
        assert tokenizer.decode(answer.tokens).strip().startswith(key)
    for cache in caches(hosted):
        assert len(cache.frames) == FRAMES
        assert len(cache.frame_of) == PAGES
        assert (cache.page_in >= 0).all()
    assert fetched(hosted) - before > 2 * FRAMES * KV_HEADS * LAYERS


@pytest.mark.engine
def test_damage_is_found(hosted: Any) -> None:
    """A byte that differs in a frame, and two pages that claim the same frame. Both are mended again."""
    greedy(hosted, heldout_prompts(hosted, [300]), 1)
    config, cache = hosted.llm_engine.vllm_config, caches(hosted)[1]
    assert host_pages.damage(config) == ""
    frame = cache.frames[int((cache.page_in[:, 1] >= 0).nonzero()[0]), 1]
    frame[5] ^= 1
    assert re.fullmatch(r"\S+layers\.1\.\S+, KV head 1: 1 of \d+ frames differ from their pages", host_pages.damage(config))
    frame[5] ^= 1
    page = int((cache.frame_of[:, 0] < 0).nonzero()[0])
    cache.frame_of[page, 0] = 0
    assert host_pages.damage(config).endswith("KV head 0: the tables of pages and frames are not inverse to each other")
    cache.frame_of[page, 0] = -1
    assert host_pages.damage(config) == ""


@pytest.mark.engine
def test_metrics(hosted: Any) -> None:
    """Pages are counted within 16 steps. What is fetched before the first step of a user's request does not count."""
    [prompt] = heldout_prompts(hosted, [2500])
    folder = sinks.directory(hosted.llm_engine.vllm_config)
    began, waited = time.monotonic(), scraped(folder)["sage_memory_fetch_seconds_total",]
    greedy(hosted, [prompt], 1, read_cache=False)
    before = fetched(hosted) - FETCHED_AT_START[-1]
    greedy(hosted, [prompt[:700]], 18)
    values = scraped(folder)
    assert values["sage_memory_host_pages",] == capacity(hosted) // 128 == PAGES
    assert values["sage_memory_device_pages",] == FRAMES
    assert 0 < before <= values["sage_memory_fetched_pages_total",] <= fetched(hosted) - FETCHED_AT_START[-1]
    assert values["sage_memory_fetched_bytes_total",] == values["sage_memory_fetched_pages_total",] * LAYOUT.page_bytes
    assert 0 < values["sage_memory_fetch_seconds_total",] - waited < time.monotonic() - began


@pytest.mark.parametrize("selected", [False, True])
def test_groups_of_rows(selected: bool) -> None:
    """As many rows at a time as have room in frames. Lists of selected pages keep their width: kernels take the strides of a
    page list for those of its shifts."""
    with environment():
        from sage_backend.engine.impl import SageImpl
    pages, cache = LAYOUT.empty(64, 2), PageCache.allocate(64, 2, LAYOUT, 12)
    table = torch.arange(5 * 2 * 8, dtype=torch.int32).view(5, 2, 8) % 64
    lengths, starts = torch.full((5,), 300, dtype=torch.int32), torch.arange(6, dtype=torch.int32)
    shift = RopeShift(torch.zeros_like(table), torch.zeros(8, 128)) if selected else None
    batch = PagedBatch(table if selected else table[:, 0], lengths, starts, 1, 1000, shift)
    impl: Any = SimpleNamespace(layout=LAYOUT)
    groups = [part for _, part in SageImpl._held(impl, pages, batch, cache, 400)]
    assert [part.num_requests for part in groups] == ([1] * 5 if selected else [3, 2])
    for part in groups:
        assert part.block_table.shape[1:] == ((2, 8) if selected else (2, 4))
        if part.rope_shift is not None:
            assert part.rope_shift.pages.stride() == part.block_table.stride()
    assert torch.cat([part.query_start_loc[:-1] for part in groups]).tolist() == [0, 1, 2, 3, 4]


# Engines of their own. Where one ends, the engines of the fixtures above cannot go on.


@dataclass(frozen=True)
class Alone:
    """Pass-key prompts, and the answers of an engine with all pages in its own memory."""

    prompts: list[list[int]]
    answers: list[Answer]


@pytest.fixture(scope="module")
def alone() -> Alone:
    with engine(RUN, **LONG) as llm:
        tokenizer = llm.get_tokenizer()
        prompts = [tokenizer.encode(make_passkey(n, 0.2, Random(n), tokenizer)[0]) for n in (500, 3900)]
        return Alone(prompts, greedy(llm, prompts, 16))


# Traffic


@dataclass(frozen=True)
class Request:
    """arrives, leaves: the steps before which it is added and, if at all, aborted."""

    prompt: list[int]
    tokens: int
    arrives: int
    leaves: int | None = None


def traffic(llm: Any) -> list[Request]:
    """24 requests with prompts of 100 to 4000 tokens, most of which soon need one page more. Three of four begin with one of
    three prefixes. Five are aborted."""
    random = Random(3)
    lengths = [random.choice((100, 124, 252, 380, 508, 636)) for _ in range(24)]
    lengths[6], lengths[17] = 1148, 4000
    prefixes = heldout_prompts(llm, (384, 256, 300))
    requests = []
    for i, (length, text) in enumerate(zip(lengths, heldout_prompts(llm, lengths), strict=True)):
        prompt = [*prefixes[i % 4], *text][:length] if i % 4 < 3 else text
        leaves = i // 4 + random.randrange(1, 12) if i % 4 == 1 and length < 1000 else None
        requests.append(Request(prompt, 24 if leaves else random.choice((4, 12, 16)), i // 4, leaves))
    return requests


def serve(llm: Any, requests: Sequence[Request]) -> dict[int, Answer]:
    """The answers to those that are not aborted."""
    from vllm import SamplingParams

    engine_, answers, step = llm.llm_engine, {}, 0
    scheduler = engine_.engine_core.engine_core.scheduler
    while engine_.has_unfinished_requests() or any(request.arrives >= step for request in requests):
        for i, request in enumerate(requests):
            if request.arrives == step:
                params = SamplingParams(
                    temperature=0, max_tokens=request.tokens, ignore_eos=True, logprobs=2, detokenize=False
                )  # fmt: skip
                engine_.add_request(str(i), {"prompt_token_ids": request.prompt}, params)
            if request.leaves == step:
                left = len(scheduler.requests)
                engine_.abort_request([str(i)])
                assert len(scheduler.requests) == left - 1, f"request {i} had ended before it was aborted"
        for output in engine_.step():
            if output.finished:
                ids, found = list(output.outputs[0].token_ids), output.outputs[0].logprobs
                logprobs = [at[token].logprob for token, at in zip(ids, found, strict=True)]
                answers[int(output.request_id)] = Answer(ids, [0.0] * len(ids), output.num_cached_tokens, logprobs)
        step += 1
    return answers


@pytest.mark.engine
def test_traffic() -> None:
    """Requests that share prefixes, preempt each other and are aborted. Their numbers of tokens are fixed, so that both engines
    take the same steps. At the end, all pages are free."""
    limits = {**LONG, "max_model_len": 4352}
    results: list[dict[int, Answer]] = []
    for run, memory in (
        (RUN, {"num_gpu_blocks_override": FEW_PAGES}),
        (f"{RUN},memory.host_gib={FEW_GIB}", {"kv_cache_memory_bytes": device_bytes(NEEDED, FEW_PAGES)}),
    ):
        with engine(run, **limits, **memory) as llm:
            requests = traffic(llm)
            results.append(serve(llm, requests))
            assert metric(llm, "vllm:num_preemptions") > 0
            scheduler = llm.llm_engine.engine_core.engine_core.scheduler
            assert not scheduler.requests
            assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == FEW_PAGES - 1, "vLLM keeps one"
            if "host_gib" in run:
                check_caches(llm)
                assert fetched(llm) > 2 * FEW_PAGES * KV_HEADS * LAYERS
    expected, actual = results
    assert actual.keys() == expected.keys() == {i for i, request in enumerate(requests) if request.leaves is None}
    assert_same([actual[i] for i in sorted(actual)], [expected[i] for i in sorted(actual)])
    assert sum(answer.cached > 0 for answer in actual.values()) > 3


@pytest.mark.engine
def test_drafts(alone: Alone) -> None:
    """Drafts give the text without them, and no page is lost to those that are rejected."""
    with engine(HOSTED, speculative_config=NGRAM_DRAFTS, **SMALL) as llm:
        answers = greedy(llm, alone.prompts, 16)
        accepted, drafted = (metric(llm, f"vllm:spec_decode_num_{kind}_tokens") for kind in ("accepted", "draft"))
        assert 0 < accepted < drafted
        assert fetched(llm) > FRAMES * KV_HEADS * LAYERS
        check_caches(llm)
    assert_same_tokens(answers, alone.answers, NEAR_TIE)


@pytest.mark.engine
def test_two_workers(alone: Alone, monkeypatch: pytest.MonkeyPatch) -> None:
    """In processes of their own, each with half of the heads, of the host memory and of what an engine needs in its own."""
    give_two_workers_cores(monkeypatch)
    limits = {**LONG, "kv_cache_memory_bytes": device_bytes(FRAMES) // 2}
    with engine(HOSTED, tensor_parallel_size=2, **limits) as llm:
        assert capacity(llm) == PAGES * 128
        answers = greedy(llm, alone.prompts, 16)
        values = scraped(sinks.directory(llm.llm_engine.vllm_config))
    assert values["sage_memory_device_pages",] == FRAMES
    assert values["sage_memory_fetched_pages_total",] > FRAMES * LAYERS, "of the first worker"
    assert_same_tokens(answers, alone.answers, NEAR_TIE)


# Engines that come next in the same process


@pytest.fixture
def allocated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of pools that are allocated in host memory."""
    allocate, found = host_pages._pinned, []

    def recorded(size: int, device: torch.device) -> torch.Tensor:
        found.append(size)
        return allocate(size, device)

    monkeypatch.setattr(host_pages, "_pinned", recorded)
    return found


def check_plain_engine(allocated: Sequence[int]) -> None:
    """Start an engine without the option, and assert that it has no pool in host memory."""
    pools = len(allocated)
    with engine(RUN, num_gpu_blocks_override=70, **LONG) as llm:
        assert len(allocated) == pools
        assert caches(llm) == [None] * LAYERS
        assert capacity(llm) == 70 * 128
        values = scraped(sinks.directory(llm.llm_engine.vllm_config))
        assert values["sage_memory_host_pages",] == values["sage_memory_device_pages",] == 0
        assert len(greedy(llm, heldout_prompts(llm, [300]), 4)[0].tokens) == 4


@pytest.mark.engine
def test_engines_without_host_pages_are_left_alone(allocated: list[int]) -> None:
    with engine(HOSTED, **SMALL):
        assert allocated == [PAGES * LAYERS * KV_HEADS * LAYOUT.page_bytes]
    check_plain_engine(allocated)


@pytest.mark.engine
def test_an_engine_after_one_that_did_not_start(allocated: list[int]) -> None:
    """It fails once its pool is planned, before that is allocated."""
    with pytest.raises(ValueError, match="To serve at least one"), engine(HOSTED, num_gpu_blocks_override=3, **SMALL):
        pass
    check_plain_engine(allocated)


# Refusals


@pytest.mark.engine
def test_too_little_memory_for_a_query_block(alone: Alone) -> None:
    """An engine starts with room for the pages that a query block reads, and with a byte less it says how much is needed."""
    least = device_bytes(NEEDED)
    mib = least // 2**20  # what it has; it needs a byte more
    told = rf'^option "memory" .* needs {mib + 1} MiB of the GPU for pages, which has {mib}: .* for {NEEDED} pages that'
    with pytest.raises(ValueError, match=told) as caught, engine(HOSTED, **LONG, kv_cache_memory_bytes=least - 1):
        pass
    assert "\n" not in str(caught.value)
    with engine(HOSTED, **LONG, kv_cache_memory_bytes=least) as llm:
        assert {len(cache.frames) for cache in caches(llm)} == {NEEDED}
        assert_same(greedy(llm, alone.prompts, 16), alone.answers)
        check_caches(llm)


@pytest.mark.engine
def test_a_pool_too_small_for_a_context() -> None:
    told = r'^option "host_gib" .* has room for 4864 tokens, fewer than the 8192 of --max-model-len; change one of them$'
    with pytest.raises(ValueError, match=told), engine(f"{RUN},memory.host_gib=0.01", **SMALL):
        pass


@pytest.mark.engine
def test_a_pool_of_one_context() -> None:
    """vLLM keeps a page for itself. With --max-model-len auto, it takes the longest context that there is room for."""
    sixteen = 16 * LAYERS * KV_HEADS * LAYOUT.page_bytes / 2**30
    arguments = {"kv_cache_memory_bytes": device_bytes(NEEDED), "max_num_batched_tokens": 1024}
    run = "SAGE:memory.local_tokens=1024,memory.topk_pages=1,memory.host_gib="
    told = r"has room for 1920 tokens, fewer than the 2048 of --max-model-len; change one of them$"
    with pytest.raises(ValueError, match=told), engine(f"{run}{sixteen}", **arguments):
        pass
    with engine(f"{run}{sixteen}", **arguments, max_model_len=-1) as llm:
        assert 1024 < llm.llm_engine.vllm_config.model_config.max_model_len <= 1920
