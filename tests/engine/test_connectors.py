# SPDX-License-Identifier: Apache-2.0
"""Pages that leave an engine and come back, through vLLM's KV connectors: the tokens stay the same. The right answers are those
of the engine that computed the pages.

OffloadingConnector runs with a store of the tests' own (`host_offloading.py`), because vLLM's needs a GPU. Its copies are the
only part that is not vLLM's. On a GPU, vLLM's own runs as well.
"""

from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from engines import EXACT, NEAR_TIE, Answer, assert_same_tokens, engine, environment, greedy, heldout_prompts, metric

from sage_backend import plugin
from sage_backend.demo import MODEL_DIR
from sage_backend.engine import start_calibration
from sage_backend.features import calibration_file
from sage_backend.features.layers import own_impls

pytestmark = pytest.mark.engine

PAGE = 64
MEMORY = "memory.sink_tokens=64,memory.local_tokens=128,memory.topk_pages=4,memory.query_block=64"
"""Reads 7 of the 11 pages of the longest prompt."""
FORMATS = {"K INT8": "", "K INT4": "k_bits=4", "K INT4, V 4 bits": "k_bits=4,v_bits=4", "memory": f"k_bits=4,{MEMORY}"}
LENGTHS = (300, 700, 600, 500, 650)
CACHED = [(length - 1) // PAGE * PAGE for length in LENGTHS]
"""Tokens of each prompt in whole pages, without the last token."""
NOISE = NEAR_TIE if torch.cuda.is_available() else 0.02
"""Bound on the change of a token's log-probability by the other requests of a batch, in nats."""
SIZES = {"dtype": EXACT, "block_size": PAGE, "max_model_len": 1024}


def run_of(options: str) -> str:
    return f"SAGE:page_tokens={PAGE},{options}".rstrip(",")


def change(actual: Sequence[Answer], expected: Sequence[Answer]) -> float:
    """The largest change of a token's log-probability, in nats, among those that two answers begin with."""
    found = [0.0]
    for a, b in zip(actual, expected, strict=True):
        pairs = zip(a.tokens, b.tokens, a.logprobs, b.logprobs, strict=True)
        found += [abs(x - y) for _, _, x, y in takewhile(lambda pair: pair[0] == pair[1], pairs)]
    return max(found)


def assert_same(actual: Sequence[Answer], expected: Sequence[Answer], noise: float = NOISE) -> None:
    assert_same_tokens(actual, expected, 2 * noise)
    found = change(actual, expected)
    assert found <= noise, f"a log-probability changes by {found:.3f}"


def assert_noticed(actual: Sequence[Answer], expected: Sequence[Answer]) -> None:
    """Assert that `assert_same` would fail."""
    with pytest.raises(AssertionError):
        assert_same(actual, expected)


def fill(tensor: torch.Tensor) -> None:
    """Fill a tensor of bytes with random ones."""
    low, high = (-128, 128) if tensor.dtype == torch.int8 else (0, 256)
    tensor.random_(low, high, generator=torch.Generator(tensor.device).manual_seed(0))


def calibrations(llm: Any) -> dict[str, Any]:
    return {name: impl.calibration for name, impl in own_impls(llm.llm_engine.vllm_config).items()}


def loaded(llm: Any) -> float:
    """Tokens whose pages came from the connector since the engine's start."""
    return metric(llm, "vllm:external_prefix_cache_hits")


# Shared storage. These come first: a process has one KV connector, and an engine of the fixture below has it to the end.


def shared_storage(folder: Path) -> dict[str, Any]:
    """The arguments of an engine that stores its prompts in a folder, one file a prompt and layer."""
    config = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    extra = {"kv_connector_extra_config": {"shared_storage_path": str(folder)}}
    whole = {"enable_chunked_prefill": False, "max_num_batched_tokens": 4096}
    return {"kv_transfer_config": config | extra, **SIZES, **whole}


@pytest.mark.parametrize("name", FORMATS)
def test_another_engine_reads_what_one_has_stored(name: str, tmp_path: Path) -> None:
    """All prompts at once. Last, other bytes are in the files, which the answers must show."""
    with engine(run_of(FORMATS[name]), **shared_storage(tmp_path)) as llm:
        prompts = heldout_prompts(llm, LENGTHS)
        answers = greedy(llm, prompts, 16)
        assert [answer.cached for answer in answers] == [0] * len(LENGTHS)
    with engine(run_of(FORMATS[name]), **shared_storage(tmp_path)) as llm:
        again = greedy(llm, prompts, 16)
        # This connector leaves out the page before the last token, too, if the rest of the prompt is one token.
        assert [answer.cached for answer in again] == [(length - 2) // PAGE * PAGE for length in LENGTHS]
        assert loaded(llm) == sum(answer.cached for answer in again)
        assert_same(again, answers)

        files = list(tmp_path.rglob("*.safetensors"))
        assert len(files) == 4 * len(LENGTHS)
        for file in files:
            tensor = safetensors.torch.load_file(file)["kv_cache"]
            fill(tensor.view(torch.uint8))
            safetensors.torch.save_file({"kv_cache": tensor}, file)
        assert llm.reset_prefix_cache()
        assert_noticed(greedy(llm, prompts, 16), answers)


def test_the_texts_of_the_calibration_stay_in_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that found them in the storage would not compute them, and would calibrate its keys by what is left. This
    connector finds pages by their tokens alone."""
    found = []
    for cache in ("first", "second"):
        monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / cache))
        with engine(run_of("k_bits=4"), **shared_storage(tmp_path / "pages")) as llm:
            found.append(calibrations(llm))
            texts = start_calibration._prompts(llm.llm_engine.vllm_config)
            if cache == "first":
                assert not (tmp_path / "pages").exists()
                greedy(llm, texts, 1)
            else:
                assert loaded(llm) == 0
                assert min(answer.cached for answer in greedy(llm, texts, 1)) > 0
    for (name, own), other in zip(found[0].items(), found[1].values(), strict=True):
        torch.testing.assert_close(own.k_anchor, other.k_anchor, msg=name)
        torch.testing.assert_close(own.equalizer, other.equalizer, msg=name)


# On a GPU: vLLM's own store in host memory, and a sleep that frees the memory of the pages

FEW_BLOCKS = {"num_gpu_blocks_override": 1024 // PAGE + 3, "max_num_seqs": 8}
"""Room for one context of 1024 tokens."""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="vLLM's store copies from a GPU")
@pytest.mark.parametrize("name", FORMATS)
def test_offloading_to_vllms_own_store(name: str) -> None:
    """Evicted pages come back, one request after another and under load. The store copies while the engine goes on, so a page
    may be missing that was evicted a moment ago."""
    with engine(run_of(FORMATS[name]), kv_offloading_size=1, **SIZES, **FEW_BLOCKS) as llm:
        prompts = heldout_prompts(llm, LENGTHS)
        answers = greedy(llm, prompts, 16, together=False)
        assert [answer.cached for answer in answers] == [0] * len(LENGTHS)
        again = greedy(llm, prompts, 16, together=False)
        assert sum(answer.cached for answer in again) >= 0.8 * sum(CACHED)
        assert loaded(llm) == sum(answer.cached for answer in again)
        assert_same(again, answers)

        before = loaded(llm)
        together = greedy(llm, prompts, 16)
        assert loaded(llm) > before
        assert_same(together, answers, 0.1 if "memory" in name else NOISE)  # as in `test_under_load`


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="vLLM's CPU workers keep their memory")
@pytest.mark.parametrize("level", [1, 2])
def test_a_sleep_that_frees_memory(level: int) -> None:
    """Pages are lost, weights are not at level 1. The calibration of keys stays."""
    with engine(run_of("k_bits=4"), enable_sleep_mode=True, **SIZES) as llm:
        prompts = heldout_prompts(llm, LENGTHS)
        answers, before = greedy(llm, prompts, 16, together=False), calibrations(llm)
        copies = {each: own.k_anchor.clone() for each, own in before.items()}
        free = torch.cuda.mem_get_info()[0]
        llm.sleep(level=level)
        assert torch.cuda.mem_get_info()[0] - free >= 64 << 20
        llm.wake_up()
        if level == 2:
            llm.collective_rpc("reload_weights")
        assert llm.reset_prefix_cache()
        again = greedy(llm, prompts, 16, together=False)
        assert [answer.cached for answer in again] == [0] * len(LENGTHS)
        assert_same(again, answers)
        assert all(torch.equal(own.k_anchor, copies[each]) for each, own in calibrations(llm).items())


# Offloading


@pytest.fixture(scope="module")
def of_layers(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The option of a calibration that chooses other bits for every other layer."""
    file = tmp_path_factory.mktemp("bits") / "bits.safetensors"
    names = [f"model.layers.{i}.self_attn.attn" for i in range(4)]
    bits = {name: {"k_bits": 4, "v_bits": 4} for name in names[::2]}
    tensors = {name: torch.zeros(2, 128) for name in names}
    calibration_file.save(file, tensors, SimpleNamespace(model=str(MODEL_DIR), hf_config=SimpleNamespace()), bits)
    return f"calibration={file}"


OFFLOADING = {
    "kv_connector": "OffloadingConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {
        "cpu_bytes_to_use": 64 << 20, "spec_name": "HostOffloadingSpec", "spec_module_path": "host_offloading",
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=[*FORMATS, "bits by layer"])
def offloading(request: pytest.FixtureRequest) -> Iterator[SimpleNamespace]:
    """An engine whose cache has room for one context of 1024 tokens, and its answers to all prompts, from nothing cached."""
    options = FORMATS.get(request.param) or (request.getfixturevalue("of_layers") if "by" in request.param else "")
    with engine(run_of(options), kv_transfer_config=OFFLOADING, **SIZES, **FEW_BLOCKS) as llm:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        prompts = heldout_prompts(llm, LENGTHS)
        store = get_kv_transfer_group().connector_worker.worker
        assert not any(stored.any() for stored in store.stored), "the texts of the calibration are not stored"
        answers = greedy(llm, prompts, 16, together=False)
        yield SimpleNamespace(llm=llm, prompts=prompts, answers=answers, store=store)


def test_evicted_pages_come_back(offloading: Any) -> None:
    """Each prompt evicts the pages of those before."""
    llm, before = offloading.llm, loaded(offloading.llm)
    assert [answer.cached for answer in offloading.answers] == [0] * len(LENGTHS)
    again = greedy(llm, offloading.prompts, 16, together=False)
    assert [answer.cached for answer in again] == CACHED
    assert loaded(llm) - before == sum(CACHED)
    assert_same(again, offloading.answers)


def test_under_load(offloading: Any) -> None:
    """All at once: more pages than there are, so that requests are preempted while others' pages are loaded and stored."""
    llm, preempted = offloading.llm, metric(offloading.llm, "vllm:num_preemptions")
    before = loaded(llm)
    answers = greedy(llm, [*offloading.prompts, *(prompt[:290] for prompt in offloading.prompts)], 40)
    assert metric(llm, "vllm:num_preemptions") > preempted
    assert loaded(llm) - before >= sum(CACHED)
    # With memory, a preempted request reads again what it has generated, as a part of its prompt: these queries choose pages
    # together, where each had chosen alone. docs/user/compatibility.md names this limit.
    noise = 0.1 if own_impls(llm.llm_engine.vllm_config).popitem()[1].memory_options else NOISE
    first = [Answer(a.tokens[:16], a.margins[:16], 0, a.logprobs[:16]) for a in answers[: len(LENGTHS)]]
    assert_same(first, offloading.answers, noise)


def test_sleep(offloading: Any) -> None:
    """A sleep discards all pages. Those of the store are discarded with them, and the calibration of keys is not.

    vLLM's CPU workers keep their memory, so the test fills it. Without `--enable-sleep-mode`, so do those of a GPU."""
    llm, before = offloading.llm, calibrations(offloading.llm)
    copies = {name: own.k_anchor.clone() for name, own in before.items()}
    llm.sleep(level=1)
    for tensor in (*offloading.store.pages, *offloading.store.stored):
        fill(tensor)
    llm.wake_up()
    answers = greedy(llm, offloading.prompts, 16, together=False)
    assert [answer.cached for answer in answers] == [0] * len(LENGTHS)
    assert_same(answers, offloading.answers)
    assert all(torch.equal(own.k_anchor, copies[name]) for name, own in calibrations(llm).items())


def test_reset_of_the_prefix_cache(offloading: Any) -> None:
    """It does not touch the store, unless it is told to."""
    llm, prompt, answer = offloading.llm, offloading.prompts[:1], offloading.answers[:1]
    greedy(llm, prompt, 1)
    for reset_connector, cached in ((False, CACHED[0]), (True, 0)):
        before = loaded(llm)
        assert llm.reset_prefix_cache(reset_connector=reset_connector)
        again = greedy(llm, prompt, 16)
        assert [each.cached for each in again] == [cached]
        assert loaded(llm) - before == cached
        assert_same(again, answer)


def test_what_the_store_holds_matters(offloading: Any) -> None:
    """The tests above would notice other bytes in the store, and with memory, other summaries. The last to use the store."""
    llm, prompts, store = offloading.llm, offloading.prompts, offloading.store
    greedy(llm, prompts, 1, together=False)
    assert_same(greedy(llm, prompts, 16, together=False), offloading.answers)
    impls = own_impls(llm.llm_engine.vllm_config)
    layout = next(iter(impls.values())).layout
    if layout.has_summary:
        for stored in store.stored:
            pages = stored.view(torch.uint8).view(len(stored), -1, layout.page_bytes)
            summaries = layout.views(pages).summary
            summaries[:] = summaries.flip(0)
    else:
        for stored in store.stored:
            fill(stored)
    assert_noticed(greedy(llm, prompts, 16, together=False), offloading.answers)


# Refusals

EXAMPLE = {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}
WHOLE = {"enable_chunked_prefill": False, "max_model_len": 1024, "max_num_batched_tokens": 1024}
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"kv_offloading_size": 1}, "OffloadingConnector moves pages between a GPU and its host", marks=NO_GPU),
        ({**EXAMPLE}, "stores a prompt after its first chunk, computed or not; add --no-enable-chunked-prefill"),
        ({**EXAMPLE, **WHOLE, "block_size": 256}, "takes a block of 256 tokens for a page of 128; add --block-size 128"),
        ({**EXAMPLE, **WHOLE}, ""),
        ({"kv_transfer_config": OFFLOADING}, ""),
    ],
    ids=["offloading", "chunks", "blocks", "shared storage", "a store of one's own"],
)
def test_refusals(arguments: dict[str, Any], message: str) -> None:
    """Before weights are loaded, in one line; or nothing, where there is no reason."""
    with environment():
        from vllm.engine.arg_utils import EngineArgs

        plugin.register()
        made = EngineArgs(str(MODEL_DIR), attention_backend="SAGE", **arguments)
        if not message:
            made.create_engine_config()
            return
        with pytest.raises(ValueError, match="cannot serve with --kv-transfer-config") as caught:
            made.create_engine_config()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
