# SPDX-License-Identifier: Apache-2.0
"""Pass-key prompts: a five-digit key hidden in filler text, with a question at the end.

The format is fixed here once. Training encodes the same pieces, so a prompt from `make_passkey` is one
that the model was trained to answer, in its next five tokens, one per digit.
"""

import itertools
from collections.abc import Sequence, Sized
from random import Random
from typing import Protocol

KEY_DIGITS = 5

QUESTION = "# What is the pass key? The pass key is #"

FILLER = (
    "# The loop below walks the tree once and returns early when nothing has changed.\n",
    "# Callers must hold the lock before they touch the shared table.\n",
    "# This helper is kept for older programs and does nothing new.\n",
    "# Each worker reads its own queue, so no further locking is needed here.\n",
    "# Strings are compared without regard to case on some systems.\n",
    "# The file is closed by the context manager, even if an error is raised.\n",
    "# Empty lines are skipped, and so are lines that hold only a comment.\n",
    "# The result is cached, because computing it again would be slow.\n",
    "# We cannot know the size in advance, so the buffer grows as needed.\n",
    "# Names that start with an underscore are private to the module.\n",
    "# The default is chosen so that most users never have to change it.\n",
    "# An iterator may be consumed only once, so make a list of it first.\n",
    "# The order of the arguments matters to the functions that follow.\n",
    "# On failure the old value is restored and the error is raised again.\n",
    "# The parser looks one token ahead and never goes back.\n",
    "# A weak reference is used here, to let the object be collected.\n",
    "# The clock may move backwards, so compare with some care.\n",
    "# Both branches return the same type, which keeps the checker happy.\n",
    "# The server sends its headers first, and the body after them.\n",
    "# Unknown options are passed through to the next handler in the chain.\n",
    "# The path is made absolute before it is compared with the others.\n",
    "# Sorting is stable, so equal items stay in the order they came in.\n",
    "# The test is skipped where the platform has no such call.\n",
    "# A set would be faster here, but the order has to be kept.\n",
    "# The message is shown to the user, so keep it short and clear.\n",
    "# The child process inherits nothing but the standard streams.\n",
    "# Rounding goes to the nearest even value, as the standard asks.\n",
    "# The copy is shallow, and the items themselves are shared.\n",
    "# The timeout applies to each attempt and not to all of them together.\n",
    "# Subclasses may override this method to add checks of their own.\n",
    "# The encoding is read from the first line of the file, if there is one.\n",
    "# Nothing is written until the whole input has been read.\n",
)
"""Whole lines of filler. They hold no digits, so that the key is the only number in the prompt."""


class Encoder(Protocol):
    """What a tokenizer must offer: `encode`, whose result has a length in tokens."""

    def encode(self, text: str, /) -> Sized: ...


def needle_line(key: str) -> str:
    """The line that tells the key."""
    return f"# The pass key is #{key}. Remember it: #{key} is the pass key.\n"


def make_passkey(
    tokens_target: int, depth: float, rng: Random, tokenizer: Encoder, document: Sequence[str] = ()
) -> tuple[str, str]:
    """Make a prompt of at most `tokens_target` tokens, shorter by less than one line of filler.

    `depth` is where the key is told: 0 at the start of the filler, 1 at its end. `document`: lines to use as
    filler, from the first on and over again, instead of drawing from FILLER. Returns the prompt and the
    answer: the digits that should follow it at once.
    """
    answer = "".join(rng.choices("0123456789", k=KEY_DIGITS))
    needle = needle_line(answer)
    budget = tokens_target - len(tokenizer.encode(needle + QUESTION))
    if budget < 0:
        raise ValueError(f"a pass-key prompt needs {tokens_target - budget} tokens, not {tokens_target}")
    filler = _take_lines(budget, document, tokenizer) if document else _draw_filler(budget, rng, tokenizer)
    split = round(depth * len(filler))
    return "".join([*filler[:split], needle, *filler[split:], QUESTION]), answer


def _take_lines(budget: int, document: Sequence[str], tokenizer: Encoder) -> list[str]:
    """The lines of a document, over and over, until the next one would exceed `budget` tokens."""
    cost = [_marginal_tokens(line, tokenizer) for line in document]
    if not sum(cost):
        raise ValueError("the document has no tokens")
    lines: list[str] = []
    for line, tokens in itertools.cycle(zip(document, cost, strict=True)):
        if tokens > budget:
            return lines
        lines.append(line)
        budget -= tokens
    raise AssertionError  # a cycle does not end


def _draw_filler(budget: int, rng: Random, tokenizer: Encoder) -> list[str]:
    """Draw lines of filler until the next one would exceed `budget` tokens.

    Lines are counted, not the text that they make up: no token spans a line break followed by '#', so the
    counts add up, and a prompt of a million tokens costs no more encoding than a short one.
    """
    cost = {line: _marginal_tokens(line, tokenizer) for line in FILLER}
    lines: list[str] = []
    while cost[line := rng.choice(FILLER)] <= budget:
        lines.append(line)
        budget -= cost[line]
    return lines


def _marginal_tokens(line: str, tokenizer: Encoder) -> int:
    """Tokens that `line` adds to a text, without the special tokens that `encode` may add to every text."""
    return len(tokenizer.encode(line + line)) - len(tokenizer.encode(line))
