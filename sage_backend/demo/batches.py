# SPDX-License-Identifier: Apache-2.0
"""Training batches: windows of the corpus, and rows of synthetic recall episodes."""

import multiprocessing
import os
import random
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor

from sage_backend.demo.corpus import END_OF_TEXT, VOCAB, Ids
from sage_backend.demo.passkey import FILLER, KEY_DIGITS, QUESTION, needle_line

Floats = npt.NDArray[np.float32]

RECALL_SHARE = 0.4  # of the rows of a batch
TASK_SHARES = {"passkey": 0.4, "lookup": 0.3, "copy": 0.3}  # by method of RecallEpisodes
PASSKEY_WEIGHT = 32.0  # without it, five answer digits would hardly count among up to 2048 tokens
LOOKUP_WEIGHT = 4.0
WORKERS = 6
BATCHES_AHEAD = 24


class Piece(NamedTuple):
    """Some tokens and, for each, the weight of the loss of predicting it; both of shape (tokens,)."""

    ids: Ids
    weights: Floats


def _plain(ids: Ids) -> Piece:
    """Plain text: every token has weight 1."""
    return Piece(ids, np.ones(len(ids), np.float32))


def _join(*pieces: Piece) -> Piece:
    return Piece(np.concatenate([p.ids for p in pieces]), np.concatenate([p.weights for p in pieces]))


def _line_ends(ids: Ids, newline: np.uint16) -> npt.NDArray[np.intp]:
    return np.flatnonzero(ids == newline) + 1


class Stream:
    """A long token stream. Spans are cut from it that end where a line ends."""

    def __init__(self, ids: Ids, newline: np.uint16) -> None:
        self.ids = ids
        self.line_ends = _line_ends(ids, newline)

    def span(self, length: int, rng: np.random.Generator) -> Ids:
        """`length` tokens from a random place."""
        first = int(np.searchsorted(self.line_ends, length))
        end = int(self.line_ends[rng.integers(first, len(self.line_ends))])
        return self.ids[end - length : end]


class RecallEpisodes:
    """Makes the synthetic tasks. Each method returns an episode of exactly `length` tokens.

    Random content cannot be predicted, and has weight 0. Answers have more weight than plain text.
    """

    def __init__(self, tokenizer: Tokenizer, corpus: Ids) -> None:
        def encode(text: str) -> Ids:
            return np.asarray(tokenizer.encode(text).ids, np.uint16)

        self.newline = encode("\n")[0]
        filler = encode("".join(random.Random(0).choices(FILLER, k=20_000)))
        self.streams = (Stream(corpus, self.newline), Stream(filler, self.newline))
        self.end = _plain(encode(END_OF_TEXT))
        self.digits = encode("0123456789")
        words = sorted(token for token in tokenizer.get_vocab() if token.isascii() and token.isalpha())
        self.words = np.asarray([tokenizer.token_to_id(word) for word in words], np.uint16)

        zeros = "0" * KEY_DIGITS  # marks the places of digits, as x marks those of names
        self.needle, self.question = encode(needle_line(zeros)), _plain(encode(QUESTION))
        self.definition, self.query = encode(f"x_x = {zeros}\n"), encode(f"x_x == {zeros}\n")
        self.name_slots = self.definition == encode("x")[0]
        self.value_slots = self.definition == self.digits[0]
        self.shortest = len(self.needle) + len(self.question.ids) + KEY_DIGITS + len(self.end.ids)

    def passkey(self, length: int, rng: np.random.Generator) -> Piece:
        """A pass-key prompt, in the format of `PassKeys`, and its answer."""
        key = rng.choice(self.digits, KEY_DIGITS)
        text = self._filler(length - self.shortest, rng)
        split = int(rng.choice(np.append(_line_ends(text, self.newline), 0)))
        answer = Piece(key, np.full(KEY_DIGITS, PASSKEY_WEIGHT, np.float32))
        return _join(
            _plain(text[:split]), self._needle(key), _plain(text[split:]), self.question, answer, self.end
        )

    def _needle(self, key: Ids) -> Piece:
        """The line with the key, twice. The first time it cannot be predicted; the second time it can be recalled."""
        ids, weights = self.needle.copy(), np.ones(len(self.needle), np.float32)
        slots = np.flatnonzero(ids == self.digits[0])
        ids[slots] = np.tile(key, 2)
        weights[slots] = np.repeat([0.0, 1.0], KEY_DIGITS)
        return Piece(ids, weights)

    def lookup(self, length: int, rng: np.random.Generator) -> Piece:
        """Lines `name_name = 12345`, then filler, then the same names in another order, to be completed."""
        most = (length - 1) // (2 * len(self.definition))
        pairs = int(rng.integers(1, most + 1))
        names = rng.choice(self.words, (pairs, 2))
        values = rng.choice(self.digits, (pairs, KEY_DIGITS))
        order = rng.permutation(pairs)
        told = self._table(self.definition, names, values, 0.0)
        asked = self._table(self.query, names[order], values[order], LOOKUP_WEIGHT)
        filler = self._filler(length - 1 - 2 * len(told.ids), rng)
        return _join(told, _plain(filler), asked, self.end)

    def _table(self, line: Ids, names: Ids, values: Ids, value_weight: float) -> Piece:
        """The line filled in once for each pair: names of shape (pairs, 2), values (pairs, digits)."""
        ids = np.tile(line, (len(names), 1))
        ids[:, self.name_slots] = names
        ids[:, self.value_slots] = values
        weights = np.where(self.value_slots, value_weight, 0.0).astype(np.float32)
        return Piece(ids.ravel(), np.tile(weights, len(names)))

    def copy(self, length: int, rng: np.random.Generator) -> Piece:
        """A span of text, or of random tokens, and then the same span again."""
        half = length // 2
        is_text = rng.random() < 0.5
        span = self._filler(half, rng) if is_text else rng.integers(0, VOCAB, half, np.uint16)
        first = Piece(span, np.full(half, float(is_text), np.float32))
        return _join(first, _plain(span), *[self.end] * (length % 2))

    def _filler(self, length: int, rng: np.random.Generator) -> Ids:
        """Plain text, from the corpus or from the sentences of the pass-key prompts."""
        return self.streams[rng.integers(len(self.streams))].span(length, rng)


class BatchSampler:
    """Draws batches of corpus windows and rows of recall episodes."""

    def __init__(self, tokenizer: Tokenizer, corpus: Ids, rows: int, context: int, seed: int) -> None:
        self.corpus = corpus
        self.episodes = RecallEpisodes(tokenizer, corpus)
        self.rows = rows
        self.row_length = context + 1  # the inputs and, one further, the targets
        self.seed = seed

    def batch(self, step: int, limit: int) -> tuple[Ids, Floats]:
        """Rows for one step, episodes no longer than about `limit`: ids and weights (rows, context + 1)."""
        rng = np.random.default_rng((self.seed, step))
        recall_rows = round(self.rows * RECALL_SHARE)
        rows = [self._recall_row(limit, rng) for _ in range(recall_rows)]
        rows += [self._corpus_row(rng) for _ in range(self.rows - recall_rows)]
        return np.stack([row.ids for row in rows]), np.stack([row.weights for row in rows])

    def _corpus_row(self, rng: np.random.Generator) -> Piece:
        start = int(rng.integers(len(self.corpus) - self.row_length + 1))
        return _plain(self.corpus[start : start + self.row_length])

    def _recall_row(self, limit: int, rng: np.random.Generator) -> Piece:
        """A row filled with episodes, one after another."""
        pieces: list[Piece] = []
        room = self.row_length
        while room:
            length = self._episode_length(room, limit, rng)
            task = rng.choice(list(TASK_SHARES), p=list(TASK_SHARES.values()))
            pieces.append(getattr(self.episodes, task)(length, rng))
            room -= length
        return _join(*pieces)

    def _episode_length(self, room: int, limit: int, rng: np.random.Generator) -> int:
        """`limit` half of the time, else log-uniform below it; all of `room` if no other episode would fit."""
        shortest = self.episodes.shortest
        length = limit if rng.random() < 0.5 else int(shortest * (limit / shortest) ** rng.random())
        return length if room - length >= shortest else room


_worker_sampler: BatchSampler  # of a worker process: it gets this once, not with every task


def _start_worker(sampler: BatchSampler) -> None:
    global _worker_sampler
    _worker_sampler = sampler


def _worker_batch(step: int, limit: int) -> tuple[Ids, Floats]:
    return _worker_sampler.batch(step, limit)


class BatchQueue:
    """Batches made ahead of time by worker processes, in the order of their steps."""

    def __init__(self, sampler: BatchSampler, device: torch.device) -> None:
        self.device = device
        self.pool = ProcessPoolExecutor(
            max_workers=min(WORKERS, os.cpu_count() or 1),
            mp_context=multiprocessing.get_context("spawn"),  # a fork would copy the state of CUDA
            initializer=_start_worker,
            initargs=(sampler,),
        )
        self.pending: deque[Future[tuple[Ids, Floats]]] = deque()
        self.asked = 0

    def next(self, limit: int) -> tuple[Tensor, Tensor]:
        """The next batch: ids (batch, context + 1) int64, weights of the targets (batch, context) float32.

        `limit` applies to the batch that this call requests, which is returned `BATCHES_AHEAD` steps later.
        """
        while len(self.pending) < BATCHES_AHEAD:
            self.pending.append(self.pool.submit(_worker_batch, self.asked, limit))
            self.asked += 1
        ids, weights = self.pending.popleft().result()
        return self._send(ids.astype(np.int32)).long(), self._send(weights)[:, 1:]

    def _send(self, array: npt.NDArray[Any]) -> Tensor:
        """Copy to the device, from pinned memory: otherwise the copy would wait for all earlier GPU work."""
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def __enter__(self) -> "BatchQueue":
        return self

    def __exit__(self, *_: object) -> None:
        """End the worker processes, and drop the batches that were not returned."""
        self.pool.shutdown(cancel_futures=True)
