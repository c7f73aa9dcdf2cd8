# SPDX-License-Identifier: Apache-2.0
"""Texts that tools read, and how they cut them into prompts."""

from pathlib import Path
from typing import Any


def read_text(file: Path) -> str:
    """A text that a command is to read. Raises ValueError where there is none."""
    if not (file.is_file() and (text := file.read_text(encoding="utf-8").strip())):
        raise ValueError(f"{file} is not a file with text")
    return text


def windows(tokenizer: Any, text: str, tokens: int, context: int) -> list[list[int]]:
    """The first `tokens` tokens of a text, cut into prompts that leave room in the context for a token to generate, without
    which no engine runs."""
    ids = tokenizer.encode(text)[:tokens]
    return [ids[i : i + context - 1] for i in range(0, len(ids), context - 1)]
