# SPDX-License-Identifier: Apache-2.0
"""Texts that tools read and cut into prompts."""

from pathlib import Path
from typing import Any


def read_text(file: Path) -> str:
    """The text of a file (UTF-8), stripped. Raises ValueError if there is no file or no text in it."""
    if not (file.is_file() and (text := file.read_text(encoding="utf-8").strip())):
        raise ValueError(f"{file} is not a file with text")
    return text


def windows(tokenizer: Any, text: str, tokens: int, context: int) -> list[list[int]]:
    """The first `tokens` tokens of a text, as token ids cut into prompts of context - 1: engines need room for one token more.

    Each prompt starts with the tokenizer's `opening`, as it would if it came as text. These tokens do not count as the text's.
    Raises ValueError for a context without room for text.
    """
    before = opening(tokenizer)
    taken = context - 1 - len(before)
    if taken < 1:
        raise ValueError(f"a context of {context} tokens has no room for text behind the tokenizer's special tokens")
    ids = tokenizer.encode(text, add_special_tokens=False)[:tokens]
    return [before + ids[i : i + taken] for i in range(0, len(ids), taken)]


def opening(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer puts before every text, such as a beginning-of-text token; [] for many models."""
    plain, encoded = (list(tokenizer.encode("a", add_special_tokens=special)) for special in (False, True))
    starts = range(len(encoded) - len(plain) + 1)
    return encoded[: next((i for i in starts if encoded[i : i + len(plain)] == plain), 0)]
