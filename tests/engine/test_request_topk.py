# SPDX-License-Identifier: Apache-2.0
"""Per-request top-k: requests that ask for another number of recalled pages, with the option `max_topk_pages` of memory."""

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import EXACT, NGRAM_DRAFTS, NOISE, Answer, assert_same_answers, engine, environment, greedy, heldout_prompts
from recording import scraped

from sage_backend.engine.patches import block_hash
from sage_backend.engine.request_topk import RequestTopk, TopkTensor, check_request
from sage_backend.observability import sinks
from sage_backend.options import MemoryOptions, SageOptions
from sage_paged import ALL_PAGES

MEMORY = "SAGE:page_tokens=64,memory.sink_tokens=64,memory.local_tokens=128,memory.query_block=64,memory.topk_pages="
LENGTHS = (1500, 700, 1501, 900, 400)
ASKED = (None, 1, "all", 6, "all")
TOKENS = 12


@pytest.fixture(scope="module")
def without_memory() -> list[Answer]:
    with engine("SAGE:page_tokens=64", dtype=EXACT) as dense:
        return greedy(dense, heldout_prompts(dense, LENGTHS), TOKENS)


@pytest.fixture(scope="module", params=[None, NGRAM_DRAFTS], ids=["no drafts", "drafts"])
def serving(request: pytest.FixtureRequest, without_memory: list[Answer]) -> Iterator[Any]:
    """An engine whose requests may ask. On a GPU, with CUDA graphs."""
    arguments: dict[str, Any] = {"dtype": EXACT, "speculative_config": request.param, "max_num_seqs": 8}
    if torch.cuda.is_available():
        arguments |= {"enforce_eager": False, "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}
    with engine(f"{MEMORY}2,memory.max_topk_pages=all", **arguments) as llm:
        yield llm


def ask(llm: Any, prompts: Sequence[list[int]], asked: Sequence[Any], tokens: int = TOKENS, **more: Any) -> list[Answer]:
    arguments = [None if each is None else {"sage_topk_pages": each} for each in asked]
    return greedy(llm, prompts, tokens, extra_args=arguments, **more)


@pytest.mark.engine
def test_each_request_reads_its_own_pages(serving: Any) -> None:
    """Together, requests get the answers that they get alone, which differ by how much is read."""
    prompts = heldout_prompts(serving, LENGTHS)
    alone = [ask(serving, [prompt], [each], read_cache=False)[0] for prompt, each in zip(prompts, ASKED, strict=True)]
    assert_same_answers(ask(serving, prompts, ASKED, read_cache=False), alone)
    [least] = ask(serving, [prompts[2]], [1], read_cache=False)
    differences = [abs(a - b) for a, b in zip(least.logprobs, alone[2].logprobs, strict=True)]
    assert max(differences[:3]) > 0.1, "of a context that is read whole, more is read than one page"


@pytest.mark.engine
def test_all_is_what_is_read_without_memory(serving: Any, without_memory: list[Answer]) -> None:
    prompts = heldout_prompts(serving, LENGTHS)
    answers = ask(serving, prompts, ["all"] * 5, read_cache=False)
    assert_same_answers(
        answers, without_memory, max(NOISE, 0.05)
    )  # keys are calibrated with what is read of the texts at start


@pytest.mark.engine
def test_the_prefix_cache_tells_them_apart(serving: Any) -> None:
    [prompt] = heldout_prompts(serving, [800])
    assert serving.reset_prefix_cache()
    cached = [ask(serving, [prompt], [each], 1)[0].cached for each in (None, 2, "all", "all", 6, None)]
    whole = cached[3]
    assert whole >= 700
    assert cached == [0, 0, 0, whole, 0, whole]


@pytest.mark.engine
def test_metrics_count_what_is_read(serving: Any) -> None:
    [prompt] = heldout_prompts(serving, [801])
    folder = sinks.directory(serving.llm_engine.vllm_config)

    def read(asked: Any) -> list[float]:
        before = scraped(folder)
        ask(serving, [prompt], [asked], 1, read_cache=False)
        after = scraped(folder)
        names = ("sage_memory_context_tokens_total", "sage_memory_read_tokens_total", "sage_memory_recalled_pages_total")
        return [after[name, "prefill"] - before[name, "prefill"] for name in names]

    (context, least, _), (_, more, recalled), (same, whole, none) = read(1), read(3), read("all")
    assert least < more < context == whole == same
    assert recalled > 0 == none


@pytest.mark.engine
def test_what_is_not_to_be_had_is_refused(serving: Any) -> None:
    from vllm.exceptions import VLLMValidationError  # a front end answers with status 400

    for asked in (0, 129, "every", True, 1.5):
        with pytest.raises(VLLMValidationError, match=r"^sage_topk_pages is .*; this server has 1 to 128, and \"all\"$"):
            ask(serving, [[1, 2, 3]], [asked], 1)


def parameters(asked: Any) -> Any:
    return SimpleNamespace(extra_args={"sage_topk_pages": asked})


@pytest.mark.parametrize(
    ("memory", "asked", "message"),
    [
        (None, 3, 'has no "max_topk_pages"'),
        (MemoryOptions(), 3, 'has no "max_topk_pages"'),
        (MemoryOptions(max_topk_pages=16), 17, "is 17; this server has 1 to 16$"),
        (MemoryOptions(max_topk_pages=16), "all", "is 'all'; this server has 1 to 16$"),
    ],
)
def test_requests_that_are_refused(memory: MemoryOptions | None, asked: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_request(parameters(asked), memory)
    check_request(SimpleNamespace(extra_args=None), memory)
    check_request(SimpleNamespace(), memory)  # of pooling


def test_hashes_of_blocks() -> None:
    """All blocks of a request tell what its first prompt asked for."""
    with environment():
        from vllm.v1.core import kv_cache_utils

        block_hash.apply()

        def keys(request: Any, first: int = 128) -> Any:
            return kv_cache_utils.generate_block_hash_extra_keys(request, first, first + 128, 0)[0]

        def request(**asked: Any) -> Any:
            own = SimpleNamespace(extra_args=asked or None)
            return SimpleNamespace(mm_features=[], lora_request=None, cache_salt=None, prompt_embeds=None, sampling_params=own)

        assert keys(request()) is None
        assert keys(request(sage_topk_pages=None)) is None
        session = request(sage_topk_pages=8)
        assert keys(session) == (("sage_topk_pages", "8"),)
        session.sampling_params = SimpleNamespace(extra_args={"sage_topk_pages": "all"})
        assert keys(session, 0) == (("sage_topk_pages", "8"),)
        assert keys(request(sage_topk_pages="all")) == (("sage_topk_pages", "all"),)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"max_topk_pages": 129}, 'is 129; it must be a number of pages from 1 to 128, or "all"'),
        ({"max_topk_pages": "every"}, 'is "every"; it must be a number of pages from 1 to 128, or "all"'),
        ({"max_topk_pages": "all", "host_gib": 1}, '"host_gib" in .* does not go with "max_topk_pages": "all"'),
    ],
)
def test_refused_options(section: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SageOptions.parse({"sage": {"memory": section}})


def test_the_tensor_of_a_step() -> None:
    """It stays where it is, and has the default for padding, for dummy steps, and once a request has ended."""
    topk = RequestTopk(MemoryOptions(topk_pages=8, max_topk_pages="all"))
    tensor = TopkTensor(topk, 4, torch.device("cpu"))

    def new(name: str, **asked: Any) -> Any:
        return SimpleNamespace(req_id=name, sampling_params=SimpleNamespace(extra_args=asked or None))

    first = tensor.of_step(4)[0]
    assert first.tolist() == [8] * 4
    topk.order = lambda: ["b", "a"]
    requests = [new("a", sage_topk_pages=3), new("b", sage_topk_pages="all")]
    with topk.step(SimpleNamespace(finished_req_ids=[], scheduled_new_reqs=requests)):
        step, values = tensor.of_step(3)
        assert values == step.tolist() == [ALL_PAGES, 3, 8]
    assert step.data_ptr() == first.data_ptr()
    assert tensor.of_step(3)[1] == [8] * 3, "a dummy step"
    topk.order = lambda: ["a"]
    with topk.step(SimpleNamespace(finished_req_ids=["b"], scheduled_new_reqs=[])):
        assert tensor.of_step(2)[0].tolist() == [3, 8]
        assert first.tolist() == [3, 8, 8, 8]
    later = [new("a", sage_topk_pages=5), new("c", sage_topk_pages=None)]
    topk.order = lambda: ["a", "c"]
    with topk.step(SimpleNamespace(finished_req_ids=[], scheduled_new_reqs=later)):
        assert tensor.of_step(2)[1] == [3, 8], "a session keeps what it asked for first"
    assert list(topk.asked) == ["a", "c"]
