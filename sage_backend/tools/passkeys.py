# SPDX-License-Identifier: Apache-2.0
"""Recall of pass keys by an engine, and its answers to other prompts."""

from collections.abc import Iterable, Sequence
from random import Random
from typing import Any

from sage_backend.demo.passkey import PassKeys

ANSWER_TOKENS = 8  # room for a key of five digits and a space


def recalls(llm: Any, passkeys: PassKeys, length: int, depths: Iterable[float], progress: bool = True) -> list[bool]:
    """Whether an engine recalls each of the pass keys that are hidden at these depths (0 to 1) of prompts of `length` tokens.

    passkeys: makes the prompts, with the engine's tokenizer. Raises ValueError for a length that holds no prompt.
    """
    rng = Random(length)
    prompts, answers = zip(*(passkeys.make(length, depth, rng) for depth in depths), strict=True)
    texts = continuations(llm, prompts, ANSWER_TOKENS, progress)
    return [text.strip().startswith(answer) for text, answer in zip(texts, answers, strict=True)]


def continuations(llm: Any, prompts: Sequence[Any], tokens: int, progress: bool) -> list[str]:
    """The texts of at most `tokens` tokens with which an engine continues prompts, as `vllm.LLM.generate` takes them, by greedy
    decoding."""
    from vllm import SamplingParams  # not at the top: it is slow to import, and --help and refusals do not need it

    greedy = SamplingParams(temperature=0, max_tokens=tokens)
    return [output.outputs[0].text for output in llm.generate(list(prompts), greedy, use_tqdm=progress)]
