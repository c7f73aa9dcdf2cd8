"""Memory in an engine: keys recalled past the trained length, pages that are shared, and options that are refused."""

import re
from collections.abc import Iterator
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import engine, environment

from sage_backend import needle, positions
from sage_backend.demo.passkey import make_passkey
from sage_backend.options import MemoryOptions, SageOptions

RUN = "SAGE:memory.local_tokens=1024,memory.topk_pages=16,memory.extrapolate=2048"
LONG = {"max_model_len": 8192, "hf_overrides": {"max_position_embeddings": 8192}, "max_num_batched_tokens": 1024}


@pytest.fixture(scope="module")
def remembering() -> Iterator[Any]:
    with engine(RUN, **LONG) as llm:
        yield llm


def ask(llm: Any, prompts: list[str]) -> list[str]:
    from vllm import SamplingParams

    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    return [output.outputs[0].text.strip() for output in outputs]


@pytest.mark.engine
def test_keys_are_recalled_past_the_trained_length(remembering: Any) -> None:
    """The model was trained for 2048 tokens. The second round finds the pages of the first in the prefix cache, with their
    bounds."""
    tokenizer = remembering.get_tokenizer()
    prompts, answers = zip(*(make_passkey(6000, depth, Random(1), tokenizer) for depth in (0.1, 0.6)), strict=True)
    first = ask(remembering, list(prompts))
    assert [text[: len(answer)] for text, answer in zip(first, answers, strict=True)] == list(answers)
    assert ask(remembering, list(prompts)) == first


@pytest.mark.engine
def test_contexts_that_fit_are_read_as_without_memory(remembering: Any) -> None:
    tokenizer = remembering.get_tokenizer()
    prompts = [make_passkey(length, 0.5, Random(length), tokenizer)[0] for length in (300, 1500)]
    with engine("SAGE") as dense:
        assert ask(dense, prompts) == ask(remembering, prompts)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ([1], 'must be an object such as {"local_tokens": 4096}, not [1]'),
        ({"topk": 3}, 'has no "topk"; there is dense_layers, extrapolate, local_tokens, query_block, sink_tokens or'),
        ({"topk_pages": 129}, "is 129; it must be a number of pages from 1 to 128"),
        ({"topk_pages": True}, "is true; it must be a number of pages from 1 to 128"),
        ({"local_tokens": 100}, "is 100; it must be a number of tokens, at least 128"),
        ({"sink_tokens": 0}, "is 0; it must be a number of tokens, at least 1"),
        ({"extrapolate": True}, "is true; it must be a number of tokens, at least 1 or false"),
        ({"query_block": 100}, "is 100; it must be a multiple of page_tokens, 128"),
        ({"dense_layers": [-1]}, "is [-1]; it must be a list of indices such as [0, 1]"),
        ({"extrapolate": 4096}, "leaves no room for what is read at distances of up to 4864 tokens; lower local_tokens or"),
    ],
)
def test_refused_options(section: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        SageOptions.parse({"sage": {"memory": section}})


def test_options() -> None:
    options = SageOptions.parse({"sage": {"memory": {"local_tokens": 1024, "extrapolate": 2048, "dense_layers": [0]}}})
    assert options.memory == MemoryOptions(local_tokens=1024, extrapolate=2048, dense_layers=(0,))
    assert options.layout(128).bytes_per_token == SageOptions().layout(128).bytes_per_token + 4


def refused_at_start(run: str, **arguments: Any) -> str:
    with environment():
        from vllm.engine.arg_utils import EngineArgs

        from sage_backend import plugin, quality
        from sage_backend.demo import MODEL_DIR

        plugin.register()
        options = {"additional_config": {"sage": quality.Run.parse(run).options}, **arguments}
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the caller looks at the message
            EngineArgs(str(MODEL_DIR), attention_backend="SAGE", enforce_eager=True, **options).create_engine_config()
    return str(caught.value)


def test_memory_that_holds_every_context_is_refused() -> None:
    message = refused_at_start("SAGE:memory.local_tokens=1024", max_model_len=2048)
    assert "reads up to 5888 tokens, which is all of the 2048 of --max-model-len" in message


@pytest.mark.parametrize(
    ("rope", "form"),
    [({"rope_type": "yarn"}, "yarn"), ({"mrope_section": [1]}, "mrope"), ({"partial_rotary_factor": 0.5}, "partial")],
)
def test_positions_that_cannot_be_turned_are_refused(rope: dict[str, Any], form: str) -> None:
    config = SimpleNamespace(model="m", hf_text_config=SimpleNamespace(rope_parameters=rope))
    with pytest.raises(ValueError, match=f"cannot serve m: its rotary positions are of the form '{form}'"):
        positions.check(config)


def test_a_layer_whose_rotary_embedding_is_unknown_is_refused() -> None:
    model = torch.nn.Module()
    model.attention = torch.nn.Module()
    layers = {"attention.attn": SimpleNamespace(impl=SimpleNamespace(turns_pages=True, head_size=64))}
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=layers), model_config=SimpleNamespace(model="m")
    )
    with pytest.raises(ValueError, match="not found beside attention"):
        positions.find_frequencies(model, config)
    model.attention.rotary_emb = torch.nn.Identity()
    with pytest.raises(ValueError, match="of the form 'Identity'"):
        positions.find_frequencies(model, config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["SAGE", "--lengths", "a"], "error: --lengths takes tokens such as 2000,8000, not 'a'"),
        (["SAGE", "--depths", "1"], "error: --depths must be at least 2"),
        (["SAGE", "--text", "missing"], "error: missing is not a file with text"),
        (["SAGE", "--out", "missing/x.json"], "error: there is no folder"),
        (["NONE"], "error: vLLM has no attention backend 'NONE'"),
    ],
)
def test_needle_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with environment():
        assert needle.main(arguments) == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert errors[-1].startswith(message)
