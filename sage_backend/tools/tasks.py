# SPDX-License-Identifier: Apache-2.0
"""Tasks of `sage needle` that are harder than one pass key. Their kinds and scores follow RULER (Hsieh et al. 2024, arXiv
2404.06654, section 3); texts and code are our own.

Each prompt is an instruction, a context that fills the length asked for, a question, and the first words of the answer. With a
chat template, the tokenizer puts all but these first words into a user's message, and the answer goes on from them.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from operator import itemgetter
from random import Random
from typing import Any

from sage_backend.demo.passkey import FILLER
from sage_backend.tools.text import opening
from sage_backend.tools.words import Endless, coined, distinct, pairs

COMMON, COMMON_TIMES, OTHER_TIMES = 10, 30, 3
"""`common_words`: how many words are common, how often each of them occurs, and how often each other word does."""
ZETA = 2.0
"""`frequent_words`: the exponent of the zeta distribution."""
CHAINS, HOPS = 2, 4
"""`variables`: chains of assignments, and the assignments of each after its first."""


@dataclass(frozen=True)
class Draft:
    """A prompt whose length is open. context: its text with a number of units, such as lines of filler, of at least `least`;
    answer: the first words of the answer; expected: what is to follow."""

    instruction: str
    context: Callable[[int], str]
    question: str
    answer: str
    expected: tuple[str, ...]
    least: int = 0

    def ids(self, tokenizer: Any, units: int) -> list[int]:
        """The prompt as token ids."""
        message = f"{self.instruction}\n\n{self.context(units)}\n{self.question}\n"
        if not getattr(tokenizer, "chat_template", None):
            return [*opening(tokenizer), *tokenizer.encode(message + self.answer, add_special_tokens=False)]
        chat = [{"role": "user", "content": message}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) + self.answer
        return list(tokenizer.encode(text, add_special_tokens=False))

    def longest(self, tokenizer: Any, length: int) -> list[int]:
        """The prompt with the most units that has at most `length` tokens; at least the one with the least units. Their number
        is found by interpolation, since the tokens are nearly linear in it."""
        low, ids, high, slope = self.least, self.ids(tokenizer, self.least), None, None
        while high is None or high - low > 1:
            guess = low + (max(1, int((length - len(ids)) / slope)) if slope else 16)
            guess = guess if high is None else min(guess, high - 1)
            found = self.ids(tokenizer, guess)
            slope = max(1.0, (len(found) - len(ids)) / (guess - low))
            if len(found) <= length:
                low, ids = guess, found
            else:
                high = guess
        return ids


@dataclass(frozen=True)
class Prompt:
    """Token ids, and what the answer should contain."""

    ids: list[int]
    expected: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """A kind of prompt. draft: makes one from a source of random numbers, a depth from 0 to 1, and the lines of a document;
    answer_tokens: room for the answer; by_depth: whether the depth matters; takes_text: whether the document does."""

    name: str
    draft: Callable[[Random, float, Sequence[str]], Draft]
    answer_tokens: int
    by_depth: bool = False
    takes_text: bool = False

    def prompts(self, tokenizer: Any, length: int, count: int, document: Sequence[str] = ()) -> list[Prompt]:
        """Make prompts of at most `length` tokens each, with the tokenizer's special tokens and its chat template if it has
        one. They are shorter by less than one unit: a line, three times a word, a coded word or a document.

        count: at least 2; depths are evenly spaced from 0 to 1. Each prompt has a seed of its own, the text "NAME INDEX", so
        that what is hidden is the same at all lengths. document: lines that replace the filler. Raises ValueError for a length
        that does not hold each of the prompts.
        """
        drafts = [self.draft(Random(f"{self.name} {i}"), i / (count - 1), document) for i in range(count)]
        least = max(len(draft.ids(tokenizer, draft.least)) for draft in drafts)
        if least > length:
            raise ValueError(f"a prompt of {self.name} needs at least {least} tokens, not {length}")
        return [Prompt(draft.longest(tokenizer, length), draft.expected) for draft in drafts]


def share_found(text: str, expected: Sequence[str]) -> float:
    """The share of the expected answers that occur in a text as whole words, in any order and case. RULER scores so, too, but
    also counts answers inside of longer words."""
    found = [re.search(rf"(?<!\w){re.escape(each)}(?!\w)", text, re.IGNORECASE) for each in expected]
    return sum(map(bool, found)) / len(expected)


def _hide(lines: Iterable[tuple[float, str]], rng: Random, document: Sequence[str]) -> Callable[[int], str]:
    """A context of lines of the document, or of random filler, with other lines at their depths, from 0 to 1."""
    plain = [line.removeprefix("# ") for line in FILLER]
    drawn = iter(lambda: rng.choice(plain), None)
    around = Endless(cycle(line.rstrip("\n") + "\n" for line in document) if document else drawn)
    hidden = sorted(lines, key=itemgetter(0))

    def context(units: int) -> str:
        text, parts, start = around.first(units), [], 0
        for depth, line in hidden:
            stop = round(depth * units)
            parts += [*text[start:stop], line]
            start = stop
        return "".join(parts + text[start:])

    return context


def _codes(rng: Random, depth: float, document: Sequence[str], *, keys: int, values: int, asked: int) -> Draft:
    """Keys with codes, of which `asked` are asked for. If that is one code, it lies at the depth; others are anywhere."""
    names = list(islice(pairs(rng), keys))
    codes = [str(code) for code in rng.sample(range(10**6, 10**7), keys * values)]
    lines = [f"One of the access codes of {names[i // values]} is {code}.\n" for i, code in enumerate(codes)]
    depths = [rng.random() for _ in codes]
    one = asked * values == 1
    if one:
        depths[0] = depth
    whose = names[0] if asked == 1 else ", ".join(names[: asked - 1]) + f" and {names[asked - 1]}"
    which = f"access code of {whose}" if one else f"access codes of {whose}"
    return Draft(
        "The text below hides access codes. Remember them: you will be asked for some of them.",
        _hide(zip(depths, lines, strict=True), rng, document),
        f"{'What is the' if one else 'What are all the'} {which} in the text above?",
        f"The {which} {'is' if one else 'are'}",
        tuple(codes[: asked * values]),
    )


def _variables(rng: Random, depth: float, document: Sequence[str]) -> Draft:
    """Chains of assignments, each in its order, between lines of filler. All variables of the first chain are asked for."""
    names = distinct(lambda: "".join(rng.choices("ABCDEFGHJKLMNPQRSTUVWXYZ", k=5)))
    values = [str(value) for value in rng.sample(range(10**4, 10**5), CHAINS)]
    chains = [list(islice(names, HOPS + 1)) for _ in range(CHAINS)]
    lines: list[tuple[float, str]] = []
    for value, chain in zip(values, chains, strict=True):
        sources = [value, *(f"VAR {name}" for name in chain)]
        assigned = [f"VAR {name} = {source}\n" for name, source in zip(chain, sources, strict=False)]
        lines += zip(sorted(rng.random() for _ in chain), assigned, strict=True)
    return Draft(
        "The text below hides assignments of variables. Follow them: a variable may get its value from another one.",
        _hide(lines, rng, document),
        f"Which variables have the value {values[0]} in the text above, directly or from another variable? Name all of them.",
        f"These {HOPS + 1} variables have the value {values[0]}:",
        tuple(chains[0]),
    )


def _common_words(rng: Random, depth: float, document: Sequence[str]) -> Draft:
    words, seed = Endless(pairs(rng)), rng.random()
    common = words.first(COMMON)

    def context(others: int) -> str:
        text = common * COMMON_TIMES + words.first(COMMON + others)[COMMON:] * OTHER_TIMES
        Random(seed).shuffle(text)
        return ", ".join(text) + "\n"

    return Draft(
        "Below is a list of words. Some occur far more often than the others. Remember those.",
        context,
        f"Which {COMMON} words occur most often in the list above?",
        f"The {COMMON} words that occur most often are:",
        tuple(common),
        least=COMMON,
    )


def _frequent_words(rng: Random, depth: float, document: Sequence[str]) -> Draft:
    """Word number k of `units` words occurs units / (k^ZETA zeta(ZETA)) times, rounded; the first one is noise."""
    words, seed = Endless(coined(rng)), rng.random()
    noise, asked, total = "...", 3, math.pi**2 / 6  # zeta(2)

    def context(units: int) -> str:
        text, rank = [], 1
        while times := round(units / (rank**ZETA * total)):
            text += [noise if rank == 1 else words.first(rank - 1)[-1]] * times
            rank += 1
        Random(seed).shuffle(text)
        return " ".join(text) + "\n"

    return Draft(
        f"Below is a text of coded words. Count how often each of them occurs. The dots {noise} are no word.",
        context,
        f"Which {asked} coded words occur most often in the text above?",
        f"The {asked} coded words that occur most often are:",
        tuple(words.first(asked)),
        least=100,  # below 73, the third and the fourth word may occur equally often
    )


_JOBS = ("baker", "carpenter", "doctor", "farmer", "gardener", "painter", "teacher", "watchmaker")
_GOODS = ("apples", "bells", "carpets", "cheese", "glass", "honey", "paper", "pottery")


def _documents(rng: Random, depth: float, document: Sequence[str]) -> Draft:
    """A person's town is in one document, and that town's river in another, among those of other persons and towns."""
    names = map(str.capitalize, coined(rng))

    def town_of(person: str, town: str) -> tuple[str, str]:
        return person, f"{person} is a {rng.choice(_JOBS)} who has lived in {town} for {rng.randrange(2, 60)} years."

    def river_of(town: str, river: str) -> tuple[str, str]:
        return town, f"{town} is a town on the river {river}. It is known for its {rng.choice(_GOODS)}."

    def pair(person: str, town: str, river: str) -> tuple[tuple[str, str], tuple[str, str]]:
        return town_of(person, town), river_of(town, river)

    def draw() -> tuple[str, str, str]:
        first, last, town, river = islice(names, 4)
        return f"{first} {last}", town, river

    person, town, river = draw()
    needed, seed = pair(person, town, river), rng.random()
    others = Endless(each for _ in iter(int, 1) for each in pair(*draw()))

    def context(units: int) -> str:
        found = [*needed, *others.first(units)]
        Random(seed).shuffle(found)
        return "\n".join(f"Document {i}: {title}\n{text}\n" for i, (title, text) in enumerate(found, start=1))

    return Draft(
        "Answer the question from the documents below. The answer takes two of them.",
        context,
        f"In which town does {person} live, and on which river does that town lie?",
        f"{person} lives in",
        (river,),
        least=4,
    )


TASKS = {
    task.name: task
    for task in (
        Task("multikey", partial(_codes, keys=16, values=1, asked=1), 32, by_depth=True, takes_text=True),
        Task("multivalue", partial(_codes, keys=1, values=4, asked=1), 64, takes_text=True),
        Task("multiquery", partial(_codes, keys=4, values=1, asked=4), 128, takes_text=True),
        Task("variables", _variables, 48, takes_text=True),
        Task("common_words", _common_words, 80),
        Task("frequent_words", _frequent_words, 48),
        Task("documents", _documents, 48),
    )
}
"""The tasks but the pass keys, by name. docs/user/needle-tasks.md describes them, and says where they differ from RULER."""

PASSKEY = "passkey"
NAMES = (PASSKEY, *TASKS)


def has_depths(task: str) -> bool:
    """Whether the prompts of a task differ by the depth of what is asked for."""
    return task == PASSKEY or TASKS[task].by_depth


def scores_by_task(result: Mapping[str, Any]) -> dict[str, dict[str, list[float]]]:
    """The scores in a run's result of `sage needle`, from 0 to 1: by task, by length in tokens, and then by prompt."""
    return ({PASSKEY: result["recalled"]} if "recalled" in result else {}) | result.get("scores", {})
