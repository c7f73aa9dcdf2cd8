# SPDX-License-Identifier: Apache-2.0
"""The choice of pages that `benchmarks/studies/representatives.py --model` measures: what must hold for any model."""

from collections.abc import Iterator

import pytest
import torch
from common.activations import load_model
from common.checkpoint import Checkpoint
from common.page_choice import BOTH, EXACT, METHOD_CHOICES, PARTS, Choice, Figures, Question, Summaries, Way

from sage_backend.demo import HELDOUT, MODEL_DIR

TOKENS, COUNT = 4096, 4
BETWEEN = (TOKENS - 2 * 1024) // 128 - 1
"""Pages of 128 tokens between sinks and local tokens, for the first of the queries."""


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def test_exact_choice_covers_most_and_all_pages_cover_all() -> None:
    """With every representative, of pages and of their parts. Keys drift, so that pages differ."""
    g = torch.Generator().manual_seed(0)
    k = torch.randn(2, TOKENS, 64, generator=g) + torch.randn(2, TOKENS // 256, 64, generator=g).repeat_interleave(256, 1)
    q = torch.randn(2, 3, TOKENS, 64, generator=g) / 4
    figures, choices = Figures(64), {*METHOD_CHOICES, *PARTS}
    cases = [(choice, row, count) for choice in choices for row in BOTH for count in (COUNT, BETWEEN - 1)]
    for layer in range(2):
        figures.add(layer, q, k, [TOKENS], cases)
    for row in BOTH:
        for page in (128, 64, 32):
            exact = figures.result((Choice("exact", page), row, COUNT), TOKENS)
            assert exact["recall"] == 1
            for choice in (each for each in choices if each.page == page):
                some, nearly = (figures.result((choice, row, count), TOKENS) for count in (COUNT, BETWEEN - 1))
                assert 0 < some["covered"] <= exact["covered"] < nearly["covered"] <= 1, choice
                assert some["covered"] < some["all"] < nearly["all"] <= 1
    mean = figures.result((Choice("mean"), 1, COUNT), TOKENS)
    assert mean["recall"] > 1.5 * COUNT / BETWEEN  # what chance finds, and more
    assert mean == figures.result((Choice("mean"), 1, COUNT), TOKENS, [1])  # both layers are alike
    assert not Figures(64).results(cases, [TOKENS])


def test_a_checkpoint_goes_on_from_a_context_as_it_reads_it_at_once() -> None:
    """The logits are those of the embedded model in plain torch, for dense attention and if all pages in between are chosen."""
    model, tokenizer = load_model()
    ids = tokenizer.encode(HELDOUT.read_text(encoding="utf-8")).ids[:1900]
    checkpoint, summaries = Checkpoint(MODEL_DIR), {}
    checkpoint.read(ids[:-64], lambda layer, q, k: summaries.update({layer: Summaries(q, k)}))
    asked = Question(ids[:-64], ids[-64:], ids[-5:], hidden=300)
    ways = [Way(choice, count, summaries, asked) for choice in (EXACT, Choice(page=64, parts=2)) for count in (16, 1)]
    dense, *chosen = checkpoint.go_on(asked.rest, [lambda *_: None, *ways], last=6).cpu()
    plain = model(torch.tensor(ids)[None])[0, -6:]
    for logits in (dense, chosen[0], chosen[2]):
        assert torch.allclose(logits, plain, atol=2e-3)
    for few, way in ((chosen[1], ways[1]), (chosen[3], ways[3])):
        assert not torch.allclose(few, plain, atol=2e-3)
        read, whole = torch.stack(way.read).sum(0).tolist()
        assert 0 <= read <= whole > 0
    read, whole = torch.stack(ways[0].read).sum(0).tolist()
    assert read == pytest.approx(whole)
