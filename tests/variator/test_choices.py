# SPDX-License-Identifier: Apache-2.0
"""What benchmarks/studies/variator_choices.py compresses, and how it chooses."""

import json
import math
from itertools import combinations, product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from loud_plugins import LAYERS, loud_plugins
from studies import variator_choices, variator_quality
from studies.variator_choices import BLOCK, SCORES, Choice, ChoosingModel, least_sums, similar_in_block, similarity

from sage_backend.demo import HELDOUT, MODEL_DIR, PLUGINS
from sage_backend.variator.groups import START
from sage_backend.variator.train import Attached

PROMPT, CUT = 176, 112
COSTS = {LAYERS[0]: {2: 0.2, 4: 0.5}, LAYERS[1]: {2: 0.1, 4: 0.3}}


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """And with short windows."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for module in (variator_quality, variator_choices):
        monkeypatch.setattr(module, "SCORED", 64)


@pytest.fixture
def model(tmp_path: Path, on_cpu: None) -> ChoosingModel:
    return ChoosingModel(MODEL_DIR, str(loud_plugins(tmp_path)), PROMPT)


@torch.inference_mode()
def test_all_groups_and_none(model: ChoosingModel) -> None:
    """All groups are the uniform row, bit for bit, and no groups are the plain model. Layers can have ratios of their own."""
    (window,) = model.windows(HELDOUT.read_text(), 1)
    assert model.cut == CUT
    uniform = {ratio: model.compressed(window, ratio, LAYERS, variator_quality.TAIL) for ratio in (2, 4)}
    for ratio, expected in uniform.items():
        assert (expected - window.plain).norm() > 0.1 * window.plain.norm()
        ratios = dict.fromkeys(LAYERS, ratio)
        assert torch.equal(model.chosen(window, Choice(ratios)), expected)
        for scores in SCORES:
            assert torch.equal(model.chosen(window, Choice(ratios, (CUT - START) // ratio, scores)), expected)
            torch.testing.assert_close(model.chosen(window, Choice(ratios, 0, scores)), window.plain, rtol=1e-3, atol=1e-3)
    alone = model.compressed(window, 4, LAYERS[1:], variator_quality.TAIL)
    assert torch.equal(model.chosen(window, Choice({LAYERS[1]: 4})), alone)
    mixed = model.chosen(window, Choice({LAYERS[0]: 2, LAYERS[1]: 4}))
    assert not any(torch.equal(mixed, other) for other in (*uniform.values(), alone))
    assert torch.equal(model.hidden(window.ids, PROMPT - 1), window.plain)


@torch.inference_mode()
@pytest.mark.parametrize("scores", SCORES)
def test_some_groups(model: ChoosingModel, scores: str) -> None:
    """Each group is either compressed or as in the plain model, by the scores of its layer or of the first one."""
    attached, ids = model.attached, torch.arange(PROMPT)[None]
    vectors = {name: torch.randn(1, CUT - START, model.config.hidden_size) for name in LAYERS}
    embedded = attached.model.get_input_embeddings()(ids)[:, START:CUT]
    found = []
    with attached.choosing(Choice(dict.fromkeys(LAYERS, 4), 10, scores), ids, CUT):
        for name, x in vectors.items():
            y = attached.compressed(name, 2, x).unflatten(1, (-1, 4))[0]
            pooled, plain = (
                each.unflatten(1, (-1, 4))[0] for each in (Attached.compressed(attached, name, 4, x), attached.plain[name](x))
            )
            is_pooled, is_plain = (torch.isclose(y, each, rtol=1e-4, atol=1e-4).flatten(1).all(1) for each in (pooled, plain))
            assert torch.equal(is_pooled, ~is_plain)
            found.append((is_pooled.nonzero()[:, 0].tolist(), (pooled - plain).square().flatten(1).sum(1)))
    assert [len(chosen) for chosen, _ in found] == [10, 10]
    assert (found[0][0] == found[1][0]) == SCORES[scores][1]
    of_inputs = [similarity(x, 4) for x in vectors.values()]
    expected = {
        "similar, by layer": of_inputs,
        "similar in first layer": [of_inputs[0]] * 2,
        "similar embeddings": [similarity(embedded, 4)] * 2,
        "least similar, by layer": [-each for each in of_inputs],
        "least error, by layer": [-error for _, error in found],
    }
    for (chosen, _), score in zip(found, expected.get(scores, ()), strict=False):
        assert chosen == sorted(score.topk(10).indices.tolist())


def test_similar_in_each_block() -> None:
    """About the same share of each block is chosen, and those are the most similar groups of the block."""
    x = torch.randn(1, 5 * BLOCK + 16, 32)
    score, found = similar_in_block(None, "", 4, x), similarity(x, 4)
    chosen = set(score.topk(40).indices.tolist())
    for groups in torch.arange(len(found)).split(BLOCK // 4):
        here = [group for group in groups.tolist() if group in chosen]
        assert abs(len(here) - len(groups) * 40 / len(found)) < 1
        assert here == sorted(groups[found[groups].topk(len(here)).indices].tolist())


@pytest.mark.parametrize("ratio", [2, 4, 8])
def test_similarity(ratio: int) -> None:
    x = torch.randn(1, 5 * ratio, 32)
    pairs = [[F.cosine_similarity(*pair, dim=0) for pair in combinations(group, 2)] for group in x[0].split(ratio)]
    torch.testing.assert_close(similarity(x, ratio), torch.tensor(pairs).mean(1))


def test_least_sums() -> None:
    """Against all ways to give four layers a ratio."""
    operations = {2: 20, 4: 31, 8: 35}
    costs = {f"layer {i}": {ratio: torch.rand(()).item() for ratio in operations} for i in range(4)}
    expected: dict[int, float] = {}
    for ratios in product((1, *operations), repeat=4):
        saved = sum(operations.get(ratio, 0) for ratio in ratios)
        cost = sum(by_ratio.get(ratio, 0.0) for ratio, by_ratio in zip(ratios, costs.values(), strict=True))
        expected[saved] = min(cost, expected.get(saved, math.inf))
    sums = least_sums(costs, operations)
    assert {saved: cost for saved, (cost, _) in sums.items()} == pytest.approx(expected)
    for saved, (cost, chosen) in sums.items():
        assert sum(operations[ratio] for ratio in chosen.values()) == saved
        assert sum(costs[layer][ratio] for layer, ratio in chosen.items()) == pytest.approx(cost)


def test_choices_save_as_much(model: ChoosingModel) -> None:
    """As the uniform row before them, or up to a group in each layer more."""
    tokens, compressed = CUT - START, []
    for (_, budget, uniform), *others in model.choices(COSTS):
        assert uniform.groups is None
        for _, saved, choice in others:
            if choice.groups is None:
                expected = sum(model.operations(tokens, ratio, 1) for ratio in choice.ratios.values())
            else:
                (ratio,) = set(choice.ratios.values())
                expected = model.operations(choice.groups * ratio, ratio, len(choice.ratios))
                assert saved < budget + model.operations(ratio, ratio, len(choice.ratios))
            assert saved == expected >= budget
        compressed.append((uniform.ratios, {tuple(choice.ratios.values()) for _, _, choice in others}))
    assert compressed == [
        ({LAYERS[1]: 2}, {(2, 2), (4, 4), (4,)}),  # groups in both layers, and in the one
        ({LAYERS[1]: 4}, {(2, 2), (4, 4)}),
        (dict.fromkeys(LAYERS[::-1], 2), {(4, 4)}),
        (dict.fromkeys(LAYERS[::-1], 4), set()),
    ]


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "choices.json"
    monkeypatch.setattr(variator_choices, "SCORES", {"similar, by layer": SCORES["similar, by layer"]})
    words = [
        str(MODEL_DIR),
        str(PLUGINS),
        "--text",
        f"code={HELDOUT}",
        "--windows",
        "2",
        "--prompt",
        str(PROMPT),
        "--out",
        str(out),
    ]
    monkeypatch.setattr("sys.argv", ["variator_choices.py", *words])
    assert variator_choices.main() == 0
    report = json.loads(out.read_text())
    assert report["windows"] == {"code": 2}
    assert [set(by_ratio) for by_ratio in report["costs"].values()] == [{"2", "4"}] * 2
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(report["results"])
    assert all(row["code"]["kl"] > 0 for row in report["results"])


def test_a_text_without_enough_windows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(MODEL_DIR), str(PLUGINS), "--text", f"code={HELDOUT}", "--windows", "1", "--prompt", str(PROMPT)]
    monkeypatch.setattr("sys.argv", ["variator_choices.py", *words])
    with pytest.raises(SystemExit, match="2"):
        variator_choices.main()
    said = capsys.readouterr().err.splitlines()[-1]
    length = PROMPT + variator_choices.SCORED
    assert said.endswith(f"error: code has 5 windows of {length} tokens; it takes 4 to order layers and at least 2 more")
