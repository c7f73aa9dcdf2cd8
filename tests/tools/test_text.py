# SPDX-License-Identifier: Apache-2.0
"""Windows of a text, for tokenizers with and without special tokens, and how `sage eval`, `sage calibrate` and
`sage variator train` use them."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from engines import environment
from tokenizers.processors import TemplateProcessing

from sage_backend.tools import calibrate, quality
from sage_backend.tools.engines import Run
from sage_backend.tools.text import opening, windows
from sage_backend.variator import train

WORDS = [f"w{i}" for i in range(100)]
TEXT = " ".join(WORDS)
BOS, EOS = 1, 2


def tokenizer(template: str) -> Any:
    """A tokenizer of words, which encodes w0, w1, ... as 10, 11, ... and puts special tokens around a text by `template`."""
    special = {"<unk>": 0, "<bos>": BOS, "<eos>": EOS, "a": 3}
    vocabulary = special | {word: 10 + i for i, word in enumerate(WORDS)}
    of_words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    of_words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    of_words.post_processor = TemplateProcessing(single=template, special_tokens=[("<bos>", BOS), ("<eos>", EOS)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=of_words, bos_token="<bos>", eos_token="<eos>")


FORMS = [("$A", []), ("<bos> $A", [BOS]), ("<bos> $A <eos>", [BOS]), ("<bos> <bos> $A", [BOS, BOS]), ("$A <eos>", [])]


@pytest.mark.parametrize(("template", "before"), FORMS)
def test_every_window_starts_as_a_text_does(template: str, before: list[int]) -> None:
    found = windows(tokenizer(template), TEXT, tokens=95, context=11)
    assert opening(tokenizer(template)) == before
    assert all(window[: len(before)] == before for window in found)
    taken = [window[len(before) :] for window in found]
    assert [token for window in taken for token in window] == [10 + i for i in range(95)]
    assert {len(window) for window in found[:-1]} == {10}
    with pytest.raises(ValueError, match="has no room for text"):
        windows(tokenizer(template), TEXT, tokens=95, context=1 + len(before))


class FakeEngine:
    """Records prompts. As the log-probability of each token, it returns the token's own id."""

    def __init__(self, template: str) -> None:
        self.tokenizer = tokenizer(template)
        self.prompts: list[list[int]] = []
        config = SimpleNamespace(
            cache_config=SimpleNamespace(kv_cache_size_tokens=1000),
            model_config=SimpleNamespace(get_total_num_kv_heads=lambda: 1),
        )
        self.llm_engine = SimpleNamespace(vllm_config=config)

    def get_tokenizer(self) -> Any:
        return self.tokenizer

    def collective_rpc(self, *_: Any, **__: Any) -> list[Any]:
        return [{}]

    def generate(self, prompts: Any, *_: Any, **__: Any) -> list[Any]:
        self.prompts += [prompt["prompt_token_ids"] for prompt in prompts]
        outputs = []
        for prompt in prompts:
            ids = [token for token in prompt["prompt_token_ids"][1:] for _ in range(quality.TOP + 1)]
            outputs.append(SimpleNamespace(prompt_logprobs=SimpleNamespace(logprobs=list(map(float, ids)), token_ids=ids)))
        return outputs


@contextmanager
def faked(module: Any, template: str) -> Iterator[FakeEngine]:
    fake = FakeEngine(template)

    @contextmanager
    def engine(*_: Any, **__: Any) -> Iterator[FakeEngine]:
        yield fake

    with environment(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "engine", engine)
        yield fake


@pytest.mark.parametrize(("template", "before"), FORMS)
def test_special_tokens_are_not_scored(template: str, before: list[int]) -> None:
    """Every token of the text is, except those with nothing before them."""
    with faked(quality, template) as fake:
        scores = quality.measure(Run("SAGE", "SAGE"), "model", TEXT, 96, max_model_len=33)
    firsts = [] if before else [10 + i * 32 for i in range(3)]
    assert scores.true.tolist() == [10.0 + i for i in range(96) if 10 + i not in firsts]
    taken = 32 - len(before)
    assert scores.before.tolist() == [len(before) + i % taken for i in range(96) if 10 + i not in firsts]
    assert all(window[: len(before)] == before for window in fake.prompts)


def test_the_prompt_of_a_window_includes_its_special_tokens() -> None:
    with faked(quality, "<bos> $A"):
        scores = quality.measure(Run("SAGE", "SAGE"), "model", TEXT, 31, prompt=8, max_model_len=33)
    assert scores.true.tolist() == [10.0 + i for i in range(8, 31)]


@pytest.mark.parametrize(("template", "before"), FORMS)
def test_a_calibration_reads_windows_as_texts(template: str, before: list[int]) -> None:
    with faked(calibrate, template) as fake:
        calibrate.calibrate("model", TEXT, tokens=96, context=17)
    assert len(fake.prompts) > 5
    assert all(window[: len(before)] == before and len(window) <= 16 for window in fake.prompts)


@pytest.mark.parametrize(("template", "before"), FORMS)
def test_training_reads_windows_as_texts(template: str, before: list[int]) -> None:
    reads = tokenizer(template)
    batch = train.Batches(reads, TEXT, rows=3, context=64, recall=0, seed=0, opening=opening(reads)).draw(0)
    assert batch.ids.shape == (3, 64)
    assert (batch.ids[:, : len(before)] == torch.tensor(before, dtype=torch.int64)).all()
    assert (batch.ids[:, len(before) :] >= 10).all()
