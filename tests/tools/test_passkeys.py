# SPDX-License-Identifier: Apache-2.0
"""Pass-key prompts: their lengths, and how much a tokenizer has to encode for them."""

from random import Random
from typing import Any

import pytest
from transformers import AutoTokenizer

from sage_backend.demo import HELDOUT, MODEL_DIR
from sage_backend.demo.passkey import FILLER, KEY_DIGITS, SEAM_TOKENS, PassKeys, make_passkey, needle_line

DOCUMENT = HELDOUT.read_text(encoding="utf-8").splitlines(keepends=True)


class CountingTokenizer:
    """The embedded model's tokenizer. It counts its calls and the characters that it has encoded."""

    def __init__(self) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(MODEL_DIR)
        self.calls = self.characters = 0

    def encode(self, text: str) -> list[int]:
        self.calls += 1
        self.characters += len(text)
        return self.tokenizer.encode(text)


@pytest.fixture
def tokenizer() -> CountingTokenizer:
    return CountingTokenizer()


def test_each_line_is_encoded_for_the_first_prompt_only(tokenizer: CountingTokenizer) -> None:
    """This holds for a document and for the filler. Each prompt takes one more call, for its key and question."""
    for passkeys, lines, length in ((PassKeys(tokenizer, DOCUMENT), len(DOCUMENT), 200_000), (PassKeys(tokenizer), 32, 2000)):
        before = tokenizer.calls
        passkeys.make(length, 0.5, Random(0))
        first = tokenizer.calls - before
        assert first <= 2 * lines + 1
        for depth in (0.0, 0.2, 0.7, 1.0):
            passkeys.make(length, depth, Random(depth))
        assert tokenizer.calls - before == first + 4


def test_a_short_prompt_encodes_little_of_a_long_document(tokenizer: CountingTokenizer) -> None:
    PassKeys(tokenizer, DOCUMENT * 20).make(1000, 0.5, Random(0))
    assert tokenizer.characters < 20_000


@pytest.mark.parametrize("length", [60, 500, 5000, 90_000])
@pytest.mark.parametrize("document", [DOCUMENT, ["\n", "a\n", "\n", "\n", "    b\n", "\n", "c"], ()])
def test_prompts_have_the_length_asked_for(tokenizer: CountingTokenizer, length: int, document: list[str]) -> None:
    """Also if tokens span lines, such as several line breaks in a row, and if a document is repeated."""
    passkeys = PassKeys(tokenizer, document)
    longest = max(len(tokenizer.encode(line * 2)) for line in document or FILLER) + SEAM_TOKENS
    for depth in (0.0, 0.3, 1.0):
        prompt, answer = passkeys.make(length, depth, Random(depth))
        assert length - longest <= len(tokenizer.encode(prompt)) <= length
        assert prompt.count(answer) == 2
        assert needle_line(answer) in prompt.splitlines(keepends=True)
        assert len(answer) == KEY_DIGITS


def test_one_prompt_is_that_of_many(tokenizer: CountingTokenizer) -> None:
    passkeys = PassKeys(tokenizer, DOCUMENT)
    passkeys.make(3000, 0.5, Random(2))
    assert passkeys.make(700, 0.5, Random(1)) == make_passkey(700, 0.5, Random(1), tokenizer, DOCUMENT)


def test_what_holds_no_prompt_is_refused(tokenizer: CountingTokenizer) -> None:
    with pytest.raises(ValueError, match=r"a pass-key prompt needs \d+ tokens, not 5"):
        PassKeys(tokenizer).make(5, 0.5, Random(0))

    class Deaf:
        def encode(self, text: str) -> list[int]:
            return []

    with pytest.raises(ValueError, match="the document has no tokens"):
        PassKeys(Deaf(), ["a\n"]).make(100, 0.5, Random(0))
