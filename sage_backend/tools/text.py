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
    """The first `tokens` tokens of a text, as token ids cut into prompts of context - 1: engines need room for one token
    more."""
    ids = tokenizer.encode(text)[:tokens]
    return [ids[i : i + context - 1] for i in range(0, len(ids), context - 1)]
