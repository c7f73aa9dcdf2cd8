# SPDX-License-Identifier: Apache-2.0
"""The tasks of `sage needle`: what prompts contain, counted from their text alone, their lengths, scores, and the command."""

import json
import re
from collections import Counter
from contextlib import nullcontext, suppress
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from engines import environment
from transformers import AutoTokenizer

from sage_backend.demo import HELDOUT, MODEL_DIR
from sage_backend.tools import needle, plots
from sage_backend.tools.tasks import COMMON_TIMES, HOPS, OTHER_TIMES, TASKS, Draft, share_found

LENGTH, COUNT = 3000, 3
LONGEST_UNIT = 64
"""No line, document or word of the tasks has more tokens."""
CODE = re.compile(r"^One of the access codes of ([a-z-]+) is (\d{7})\.$", re.MULTILINE)
DOCUMENT = HELDOUT.read_text(encoding="utf-8").splitlines(keepends=True)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module", params=["filler", "document"])
def texts(request: pytest.FixtureRequest, tokenizer: Any) -> dict[str, list[tuple[str, tuple[str, ...]]]]:
    """The decoded prompts of each task and what their answers should contain."""
    document = DOCUMENT if request.param == "document" else ()
    return {
        name: [(tokenizer.decode(each.ids), each.expected) for each in task.prompts(tokenizer, LENGTH, COUNT, document)]
        for name, task in TASKS.items()
        if task.takes_text or not document
    }


def question(text: str) -> str:
    return text.rpartition("\n\n")[2]


@pytest.mark.parametrize(
    ("name", "keys", "asked", "values"), [("multikey", 16, 1, 1), ("multivalue", 1, 1, 4), ("multiquery", 4, 4, 1)]
)
def test_codes(texts: Any, name: str, keys: int, asked: int, values: int) -> None:
    for text, expected in texts[name]:
        codes = CODE.findall(text)
        assert len({key for key, _ in codes}) == keys
        assert len({code for _, code in codes}) == len(codes) == keys * values
        wanted = set(re.findall(r"[a-z]+-[a-z]+", question(text)))
        assert len(wanted) == asked
        assert sorted(expected) == sorted(code for key, code in codes if key in wanted)


def test_the_depth_of_the_code_that_is_asked_for(texts: Any) -> None:
    for i, (text, [code]) in enumerate(texts["multikey"]):
        before, _, behind = text.partition(f" is {code}.\n")
        assert len(before) / len(before + behind) == pytest.approx(i / (COUNT - 1), abs=0.1)


def test_variables(texts: Any) -> None:
    """Assignments are carried out in their order. Each variable is assigned once, and after the one it gets its value from."""
    for text, expected in texts["variables"]:
        values: dict[str, str] = {}
        for name, source in re.findall(r"^VAR ([A-Z]{5}) = (?:VAR )?(\w{5})$", text, re.MULTILINE):
            assert name not in values
            values[name] = source if source.isdecimal() else values[source]
        [asked] = set(re.findall(r"\d{5}", question(text)))
        assert Counter(values.values()) == dict.fromkeys(values.values(), HOPS + 1)
        assert len(set(values.values())) == 2
        assert set(expected) == {name for name, value in values.items() if value == asked}


def test_common_words(texts: Any) -> None:
    for text, expected in texts.get("common_words", ()):
        counts = Counter(re.findall(r"[a-z]+-[a-z]+", text.partition("\n\n")[2]))
        most = counts.most_common(10)
        assert {word for word, _ in most} == set(expected)
        assert {times for _, times in most} == {COMMON_TIMES}
        assert set(counts.values()) == {COMMON_TIMES, OTHER_TIMES}


def test_frequent_words(texts: Any) -> None:
    for text, expected in texts.get("frequent_words", ()):
        words = text.split("\n\n")[1].split()
        (noise, first), *others = Counter(words).most_common()
        assert noise == "..."
        assert tuple(word for word, _ in others[:3]) == expected
        assert others[2][1] > others[3][1]
        for rank, (_, times) in enumerate(others, start=2):
            assert times == pytest.approx(first / rank**2, abs=1)


def test_the_three_frequent_words_are_distinct_at_all_lengths() -> None:
    draft = TASKS["frequent_words"].draft(Random(0), 0, ())
    for units in range(draft.least, 3000, 7):
        counts = [times for _, times in Counter(draft.context(units).split()).most_common(5)]
        assert counts == sorted(set(counts), reverse=True)


def test_documents(texts: Any) -> None:
    """The answer takes two documents: the person's does not name the river, and the river's not the person."""
    for text, [expected] in texts.get("documents", ()):
        found = dict(re.findall(r"^Document \d+: (.+)\n(.+)$", text, re.MULTILINE))
        assert len(found) == text.count("\nDocument ") > 50
        [person] = [title for title in found if title in question(text)]
        town = found[person].partition(" lived in ")[2].partition(" for ")[0]
        assert re.search(r"the river (\w+)", found[town])[1] == expected
        assert expected not in found[person]
        assert person not in found[town]
        assert text.count(expected) == 1


@pytest.mark.parametrize("name", TASKS)
def test_a_question_does_not_give_the_answer_away(name: str) -> None:
    for i in range(50):
        draft = TASKS[name].draft(Random(i), 0.5, ())
        asked = f"{draft.instruction} {draft.question} {draft.answer}"
        assert not any(answer.lower() in asked.lower() for answer in draft.expected)
        assert share_found(draft.context(draft.least), draft.expected) == 1


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("template", [None, "<user>{{ messages[0]['content'] | trim }}<assistant>"])
def test_lengths(name: str, template: str | None) -> None:
    """Prompts fill their length, down to the least that the refusal of shorter ones names, with and without a chat template."""
    task, tokenizer = TASKS[name], AutoTokenizer.from_pretrained(MODEL_DIR)
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=rf"^a prompt of {name} needs at least \d+ tokens, not 10$") as refused:
        task.prompts(tokenizer, 10, COUNT)
    least = int(re.findall(r"\d+", str(refused.value))[0])
    with pytest.raises(ValueError, match=f"needs at least {least} tokens, not {least - 1}"):
        task.prompts(tokenizer, least - 1, COUNT)
    for length in (least, least + 700):
        for i, prompt in enumerate(task.prompts(tokenizer, length, COUNT)):
            assert length - LONGEST_UNIT < len(prompt.ids) <= length
            text = tokenizer.decode(prompt.ids)
            answer = task.draft(Random(f"{name} {i}"), i / (COUNT - 1), ()).answer
            assert text.startswith("<user>") == bool(template)
            assert text.endswith(f"<assistant>{answer}" if template else f"\n{answer}")


def test_a_prompt_takes_few_encodings(tokenizer: Any) -> None:
    calls: list[int] = []

    class Counting:
        chat_template = None

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            calls.append(len(text))
            return list(tokenizer.encode(text))

    TASKS["multikey"].draft(Random(0), 0.5, DOCUMENT).longest(Counting(), 16000)
    assert sum(size > 1 for size in calls) <= 10


@pytest.mark.parametrize("name", TASKS)
def test_prompts_are_the_same_each_time_and_differ(name: str, tokenizer: Any) -> None:
    task = TASKS[name]
    prompts = task.prompts(tokenizer, 2600, COUNT)
    assert prompts == task.prompts(tokenizer, 2600, COUNT)
    assert len({prompt.expected for prompt in prompts}) == COUNT
    longer = task.prompts(tokenizer, 3200, COUNT)
    assert [prompt.expected for prompt in longer] == [prompt.expected for prompt in prompts]


def test_special_tokens_come_once(tokenizer: Any) -> None:
    """Before a text without a chat template; a template has its own."""

    class WithOpening:
        chat_template = None

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [-1] * add_special_tokens + tokenizer.encode(text) + [-2] * add_special_tokens

    draft = Draft("Read.", lambda units: "a " * units, "What?", "It is", ("a",))
    ids = draft.ids(WithOpening(), 3)
    assert ids[0] == -1
    assert min(ids[1:]) >= 0


def test_scores() -> None:
    """Whole words count, in any case and order; a part of an answer, or another one, does not."""
    assert share_found(" 1234567.", ["1234567"]) == 1
    assert share_found("It is the Lubufa, I think", ["lubufa"]) == 1
    assert share_found("c-d, A-B", ["a-b", "c-d", "e-f", "g-h"]) == 0.5
    for wrong in ("", "123456", "12345678", "1234568", "x1234567", "7654321"):
        assert share_found(wrong, ["1234567"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "multikey,count"], "there is no task 'count'; --task takes passkey, multikey, multivalue, "),
        (["--task", ""], "there is no task ''; --task takes passkey, "),
        (["--task", "variables,documents", "--text", str(HELDOUT)], "--text does not go with the task documents"),
        (["--task", "passkey,common_words", "--lengths", "900,4000"], "a prompt of common_words needs at least "),
        (["--lengths", "20"], "a pass-key prompt needs "),
    ],
)
def test_the_command_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with environment():
        assert needle.main(["SAGE", *arguments]) == 1
    [error] = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("the model has")]
    assert error.startswith(f"error: {message}")


@pytest.mark.engine
def test_two_tasks_on_the_embedded_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It was trained to recall pass keys, and to copy: it finds codes, too."""
    out = tmp_path / "needle.json"
    with environment():
        arguments = ["--task", "passkey,multivalue", "--lengths", "600,900", "--depths", "2", "--out", str(out)]
        assert needle.main(["SAGE", *arguments]) == 0
    report = json.loads(out.read_text())
    assert (report["tasks"], report["lengths"], report["depths"]) == (["passkey", "multivalue"], [600, 900], 2)
    [run] = report["runs"]
    assert run["recalled"] == {"600": [True, True], "900": [True, True]}
    scores = run["scores"]["multivalue"]
    assert set(scores) == {"600", "900"}
    assert {score * 4 % 1 for each in scores.values() for score in each} == {0}
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[:2] == [["run", "task", "600", "900"], ["SAGE", "passkey", "100%", "100%"]]
    assert lines[2] == ["SAGE", "multivalue", *(f"{sum(scores[length]) / 2:.0%}" for length in ("600", "900"))]


@pytest.mark.engine
def test_what_was_measured_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is interrupted leaves the lengths before in its file."""
    out, lengths = tmp_path / "needle.json", []

    def recalls(llm: Any, passkeys: Any, length: int, depths: list[float], progress: bool) -> list[bool]:
        lengths.append(length)
        if length == 900:
            raise KeyboardInterrupt
        return [True, False]

    monkeypatch.setattr(needle, "recalls", recalls)
    monkeypatch.setattr(needle, "engine", lambda *_, **__: nullcontext(SimpleNamespace(get_tokenizer=lambda: None)))
    with environment(), suppress(KeyboardInterrupt):
        needle.main(["SAGE", "--lengths", "600,900", "--depths", "2", "--out", str(out)])
    assert lengths == [600, 900]
    assert json.loads(out.read_text())["runs"] == [{"run": "SAGE", "recalled": {"600": [True, False]}}]


def test_scores_of_answers(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    """Each answer is scored with what its own prompt expects: an engine that answers every second prompt gets half."""
    prompts = TASKS["multiquery"].prompts(tokenizer, 600, 4)
    answers = iter([" and ".join(each.expected) if i % 2 else "1111111" for i, each in enumerate(prompts)])
    asked: list[Any] = []

    class Engine:
        def __enter__(self) -> "Engine":
            return self

        def __exit__(self, *_: Any) -> None: ...

        def get_tokenizer(self) -> Any:
            return tokenizer

    def continuations(llm: Any, given: Any, tokens: int, progress: bool) -> list[str]:
        asked.extend(given)
        return [next(answers) for _ in given]

    monkeypatch.setattr(needle, "engine", lambda *_, **__: Engine())
    monkeypatch.setattr(needle, "continuations", continuations)
    questions = needle.Questions(["multiquery"], [600], 4)
    assert needle.recall(None, "model", questions) == {"multiquery": {600: [0, 1, 0, 1]}}  # type: ignore[arg-type]
    assert asked == [{"prompt_token_ids": prompt.ids} for prompt in prompts]


def test_plots(tmp_path: Path) -> None:
    """A heat map by depth for each task with depths, and one of all tasks."""
    pytest.importorskip("matplotlib", reason="matplotlib comes with the extra `bench`")
    facts = {"depths": 2, "device": "d", "versions": {"vllm": "0"}, "date": "2026", "model": "m", "command": "sage needle"}
    by_length = {"600": [1.0, 0.5], "700": [0.0, 0.5]}
    run = {"run": "SAGE", "recalled": by_length, "scores": {"multikey": by_length, "variables": by_length}}
    report = facts | {"tasks": ["passkey", "multikey", "variables"], "runs": [run, {"run": "FAILED", "error": "e"}]}
    files = plots.write_needle(report, [["run", "task", "600", "700"]], tmp_path)
    assert [file.name for file in files] == ["needle.png", "needle-multikey.png", "needle-tasks.png", "needle.html"]
    assert files[-1].read_text().count("data:image/png;base64,") == 3


def test_the_heat_map_of_tasks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It has a row for each task and a column for each length, with mean scores."""
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="matplotlib comes with the extra `bench`")
    scores = {"variables": {"600": [1.0, 0.5], "700": [0.0, 0.5]}, "documents": {"600": [1.0, 1.0], "700": [0.0, 0.0]}}
    found = plots._means(scores)
    assert found == {"600": [0.75, 1.0], "700": [0.25, 0.0]}
    figure = plots._heat_maps(pyplot, {"SAGE": found}, labels=list(scores), each="task", share="mean score, %")
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["variables", "documents"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["600", "700"]
    assert axes.collections[0].get_array().tolist() == [[75, 25], [100, 0]]
    pyplot.close(figure)
