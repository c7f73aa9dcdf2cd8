# SPDX-License-Identifier: Apache-2.0
"""Pass-key prompts: a five-digit key hidden in filler text, with a question at the end.

The format is defined here once. Training uses the same pieces, so the model was trained to answer prompts from `PassKeys`. The
answer is the next five tokens, one per digit.
"""

from bisect import bisect_right
from collections.abc import Sequence, Sized
from functools import cached_property
from random import Random
from typing import Protocol

KEY_DIGITS = 5

SEAM_TOKENS = 2
"""Tokens that a prompt may have in addition, where key and question are put between lines of a document that one token
spanned."""

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
"""Whole lines of filler. They have no digits, so the key is the only number in the prompt."""


class Encoder(Protocol):
    """What a tokenizer must offer: `encode`, whose result has a length in tokens."""

    def encode(self, text: str, /) -> Sized: ...


def needle_line(key: str) -> str:
    """The line with the key."""
    return f"# The pass key is #{key}. Remember it: #{key} is the pass key.\n"


class PassKeys:
    """Makes pass-key prompts for one tokenizer. A line of filler or of a document is encoded once, when it is first needed."""

    def __init__(self, tokenizer: Encoder, document: Sequence[str] = ()) -> None:
        """document: lines, with their line breaks. They are the filler, in order and repeated as needed, instead of random
        lines of FILLER."""
        self._tokenizer = tokenizer
        self._blocks = _blocks(document)
        self._costs: list[int] = []  # tokens of the first blocks, each counted after the one before it
        self._ends: list[int] = []  # tokens from the document's start to the end of each block, over all repetitions

    def make(self, tokens_target: int, depth: float, rng: Random) -> tuple[str, str]:
        """Make a prompt of at most `tokens_target` tokens, shorter by less than one line of filler, or by one block of the
        document and `SEAM_TOKENS`.

        depth: the place of the key, from 0 (start of the filler) to 1 (its end). Returns the prompt and the answer: the digits
        that should follow immediately. Raises ValueError for a target too small for key and question.
        """
        answer = "".join(rng.choices("0123456789", k=KEY_DIGITS))
        needle = needle_line(answer)
        budget = tokens_target - self._tokens(needle + QUESTION)
        if budget < 0:
            raise ValueError(f"a pass-key prompt needs {tokens_target - budget} tokens, not {tokens_target}")
        filler = self._take_blocks(budget - SEAM_TOKENS) if self._blocks else self._draw_filler(budget, rng)
        split = round(depth * len(filler))
        return "".join([*filler[:split], needle, *filler[split:], QUESTION]), answer

    def _tokens(self, text: str) -> int:
        return len(self._tokenizer.encode(text))

    def _take_blocks(self, budget: int) -> list[str]:
        """The blocks of the document, over and over, until the next one would exceed `budget` tokens."""
        count = len(self._blocks)
        while not self._ends or self._ends[-1] <= budget:
            at = len(self._ends) % count
            if len(self._costs) < count:
                before = self._blocks[at - 1]
                self._costs.append(self._tokens(before + self._blocks[at]) - self._tokens(before))
            self._ends.append((self._ends[-1] if self._ends else 0) + self._costs[at])
            if len(self._ends) == count and not self._ends[-1]:
                raise ValueError("the document has no tokens")
        return [self._blocks[at % count] for at in range(bisect_right(self._ends, budget))]

    @cached_property
    def _filler_costs(self) -> dict[str, int]:
        """Tokens that each line of FILLER adds to a text, without the special tokens that `encode` may add to every text."""
        return {line: self._tokens(line + line) - self._tokens(line) for line in FILLER}

    def _draw_filler(self, budget: int, rng: Random) -> list[str]:
        """Draw lines of filler until the next one would exceed `budget` tokens.

        The tokens of each line are counted once; the whole text is not encoded. The counts add up, because no token spans a
        line break followed by '#'. So a prompt of a million tokens takes no more encoding than a short one.
        """
        lines: list[str] = []
        while self._filler_costs[line := rng.choice(FILLER)] <= budget:
            lines.append(line)
            budget -= self._filler_costs[line]
        return lines


def make_passkey(
    tokens_target: int, depth: float, rng: Random, tokenizer: Encoder, document: Sequence[str] = ()
) -> tuple[str, str]:
    """Make a single prompt. For several, `PassKeys` encodes less."""
    return PassKeys(tokenizer, document).make(tokens_target, depth, rng)


def _blocks(document: Sequence[str]) -> list[str]:
    """The lines of a document, each with the blank lines after it; the first also with those before it.

    A token may contain several line breaks, but none extends past the next block. So if each block is counted after the one
    before it, the counts add up to the tokens of the whole."""
    blocks: list[str] = []
    for line in document:
        if blocks and not (line.strip() and blocks[-1].strip()):
            blocks[-1] += line
        else:
            blocks.append(line)
    if blocks and not blocks[-1].endswith("\n"):
        blocks[-1] += "\n"
    return blocks
