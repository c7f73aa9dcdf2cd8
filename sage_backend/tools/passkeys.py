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
    """Whether an engine recalls each of the pass keys that are hidden at these depths (0 to 1) of prompts of `length` tokens.

    document: lines that prompts consist of, instead of filler. Raises ValueError for a length that holds no prompt.
    """
    from vllm import SamplingParams  # not at the top: it is slow to import, and --help and refusals do not need it

    rng, tokenizer = Random(length), llm.get_tokenizer()
    prompts, answers = zip(*(make_passkey(length, depth, rng, tokenizer, document) for depth in depths), strict=True)
    greedy = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS)
    texts = [output.outputs[0].text for output in llm.generate(list(prompts), greedy, use_tqdm=progress)]
    return [text.strip().startswith(answer) for text, answer in zip(texts, answers, strict=True)]
