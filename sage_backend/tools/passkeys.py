# SPDX-License-Identifier: Apache-2.0
"""Recall of pass keys by an engine."""

from collections.abc import Iterable, Sequence
from random import Random
from typing import Any

from sage_backend.demo.passkey import make_passkey

ANSWER_TOKENS = 8  # room for a key of five digits and a space


def recalls(
    llm: Any, length: int, depths: Iterable[float], document: Sequence[str] = (), progress: bool = True
) -> list[bool]:
    """Whether an engine recalls pass keys that are told at these depths of prompts of `length` tokens, which are a document's
    lines or filler."""
    from vllm import SamplingParams

    rng, tokenizer = Random(length), llm.get_tokenizer()
    prompts, answers = zip(*(make_passkey(length, depth, rng, tokenizer, document) for depth in depths), strict=True)
    greedy = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS)
    texts = [output.outputs[0].text for output in llm.generate(list(prompts), greedy, use_tqdm=progress)]
    return [text.strip().startswith(answer) for text, answer in zip(texts, answers, strict=True)]
