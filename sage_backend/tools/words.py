# SPDX-License-Identifier: Apache-2.0
"""Words for synthetic texts: pairs such as amber-harbor, and words coined of syllables, which no model knows."""

from collections.abc import Callable, Iterator
from itertools import islice
from random import Random
from typing import Generic, TypeVar

T = TypeVar("T")

ADJECTIVES = """
    amber ancient azure bitter blue bold brave brief bright broad bronze calm cheap clean clear clever cold coral crisp curly
    damp dark deep distant dry dull dusty eager early east empty faint fair fast fine flat fresh frozen gentle glad golden grand
    gray green happy hard heavy hidden high hollow huge humble icy idle inner iron jolly keen kind large late lazy light little
    lively local lone long loud low lucky mild modest narrow neat new noble north odd old open outer pale patient plain polite
    proud quick quiet rapid rare red rich rough round royal sharp silver
"""
NOUNS = """
    anchor apple arrow basket beach bell bird boat bottle branch bread bridge brush bucket button cabin camel candle canoe
    carpet castle chair cherry circle cliff cloud coat comet copper corner cottage cradle crown curtain desert diary door dragon
    drum eagle feather fence ferry fiddle field flag flute forest fountain garden gate glove hammer harbor hill honey horse
    island jacket kettle key kitchen ladder lake lamp lantern leaf lemon letter lion market meadow mirror mountain needle
    orchard oven owl palace pencil piano pillow planet pocket pond quilt rabbit ribbon river saddle shelf spoon station stone
    table teapot temple tiger tower tunnel valley violin window
"""

_SYLLABLES = tuple(consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou")


class Endless(Generic[T]):
    """A list that is made as far as it is read, so that its start does not depend on how much of it is needed."""

    def __init__(self, items: Iterator[T]) -> None:
        self._items = items
        self._made: list[T] = []

    def first(self, count: int) -> list[T]:
        """The first `count` items."""
        self._made += islice(self._items, max(0, count - len(self._made)))
        return self._made[:count]


def pairs(rng: Random) -> Iterator[str]:
    """All pairs of an adjective and a noun, in a random order; then pairs with one more adjective, of which there are a
    hundred times as many."""
    adjectives, nouns = ADJECTIVES.split(), NOUNS.split()
    every = [f"{adjective}-{noun}" for adjective in adjectives for noun in nouns]
    rng.shuffle(every)
    yield from every
    yield from distinct(lambda: f"{rng.choice(adjectives)}-{rng.choice(every)}")


def coined(rng: Random) -> Iterator[str]:
    """Different words of three syllables, six lowercase letters. There are 343000, enough for millions of tokens."""
    return distinct(lambda: "".join(rng.choices(_SYLLABLES, k=3)))


def distinct(draw: Callable[[], str]) -> Iterator[str]:
    """What `draw` returns, without repetitions."""
    seen: set[str] = set()
    while True:
        if (word := draw()) not in seen:
            seen.add(word)
            yield word
