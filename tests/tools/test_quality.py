# SPDX-License-Identifier: Apache-2.0
"""What quantized pages cost the small model, as `sage eval` measures it."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import PLAIN, environment

from sage_backend.tools import plots, quality
from sage_backend.tools.engines import Run
from sage_backend.tools.quality import KL_TOP, PASSKEY_DEPTHS, TOP, Scores

TOKENS = 1 << 14


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The command's own report on K INT8 and K INT4 against vLLM's backend in BF16."""
    out = tmp_path_factory.mktemp("quality") / "report.json"
    runs = [PLAIN, "SAGE", "SAGE:k_bits=4"]
    with environment():
        assert quality.main([*runs, "--tokens", str(TOKENS), "--passkey", "1500", "--out", str(out)]) == 0
    return json.loads(out.read_text())


@pytest.mark.engine
def test_report(report: dict[str, Any]) -> None:
    plain = report["runs"][0]
    assert report["predicted_tokens"] == TOKENS - 9  # nine windows; the first token of each is not predicted
    assert {"command", "date", "device", "versions"} <= set(report)
    assert (plain["loss_change"], plain["kl"], plain["top1_agreement"]) == (0, 0, 1)
    assert 1 < plain["loss"] < 3
    by_position = plain["loss_by_position"]
    assert list(by_position) == ["128", "256", "512", "1024", "2048"]
    assert by_position["128"] == max(by_position.values())  # less is known about the first tokens of a window
    scored = [8 * 127 + 7, 8 * 128, 8 * 256, 8 * 512, 8 * 1023]  # the ninth window has 8 tokens
    assert np.average(list(by_position.values()), weights=scored) == pytest.approx(plain["loss"])
    for run in report["runs"]:
        moved = run["abs_logprob_change_by_position"]
        assert np.average(list(moved.values()), weights=scored) == pytest.approx(run["mean_abs_logprob_change"])
    assert plain["passkey"] == {"1500": 1.0}
    assert plain["passkey_by_depth"] == {"1500": [1.0] * PASSKEY_DEPTHS}
    assert [run["kv_capacity"] for run in report["runs"]] == pytest.approx([1, 512 / 264, 512 / 220], rel=0.01)


@pytest.mark.engine
def test_int8_keys(report: dict[str, Any]) -> None:
    """The keys of this model have biases of up to 21, which smoothing removes."""
    int8 = report["runs"][1]
    assert int8["passkey"] == {"1500": 1.0}
    assert abs(int8["loss_change"]) <= 0.002
    assert int8["top1_agreement"] >= 0.98


@pytest.mark.engine
def test_int4_keys(report: dict[str, Any]) -> None:
    """16 levels are few, so these bounds allow for the rounding of other machines."""
    int4 = report["runs"][2]
    assert abs(int4["loss_change"]) <= 0.015
    assert int4["top1_agreement"] >= 0.94


def _scores(logits: np.ndarray) -> Scores:
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    tokens = np.argsort(-logprobs, 1)[:, :TOP]
    return Scores(logprobs[:, 0], tokens, np.take_along_axis(logprobs, tokens, 1), {}, 1000, 1 + np.arange(len(logits)))


def test_figures_of_known_distributions() -> None:
    logits = np.random.default_rng(0).normal(size=(50, 40)) * 2
    other = logits + np.random.default_rng(1).normal(size=logits.shape) * 0.1
    baseline, changed = _scores(logits), _scores(other)
    figures = changed.against(baseline)
    assert figures["loss_change"] == pytest.approx(baseline.true.mean() - changed.true.mean())
    assert figures["top1_agreement"] == (logits.argmax(1) == other.argmax(1)).mean()
    best = np.argsort(-logits, 1)[:, :KL_TOP]
    p, q = (np.exp(np.take_along_axis(x, best, 1)) for x in (logits, other))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    assert figures["kl"] == pytest.approx((p * np.log(p / q)).sum(1).mean())
    assert baseline.against(baseline)["kl"] == pytest.approx(0)


def test_figures_by_position() -> None:
    """Against a loop over the tokens: those of two windows, in which the first four tokens are not scored."""
    before = np.concatenate([np.arange(4, 700), np.arange(4, 100)])
    true = np.random.default_rng(0).normal(size=before.size)
    expected: dict[str, list[float]] = {}
    for position, logprob in zip(before.tolist(), true.tolist(), strict=True):
        end = next(end for end in (128, 256, 512, 1024) if position < end)
        expected.setdefault(str(end), []).append(-logprob)
    nothing = np.empty((before.size, 0))
    found = Scores(true, nothing, nothing, {}, 1000, before).by_position(-true)
    assert found == pytest.approx({end: np.mean(losses) for end, losses in expected.items()})
    assert list(found) == ["128", "256", "512", "1024"]
    assert list(Scores(true[:1], nothing, nothing, {}, 1000, before[:1] + 512).by_position(true[:1])) == ["1024"]


def test_runs() -> None:
    with environment():
        assert Run.parse("sage:k_bits=4,smooth_k=false") == Run(
            "sage:k_bits=4,smooth_k=false", "SAGE", "auto", {"k_bits": 4, "smooth_k": False}
        )
        assert Run.parse("SAGE:k_bits=8,variator.plugins=FILE,variator.ratio=2").options == {
            "k_bits": 8,
            "variator": {"plugins": "FILE", "ratio": 2},
        }
        assert Run.parse("SAGE:variator.plugins=null,variator.kv_use=0.5").options == {
            "variator": {"plugins": "null", "kv_use": 0.5}
        }
        assert Run.parse("FLASH_ATTN/fp8").kv_cache_dtype == "fp8"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["NONE"], "vLLM has no attention backend 'NONE'"),
        (["SAGE:k_bits=5"], 'option "k_bits" in --additional-config "sage" is 5; it can be 4 or 8'),
        (["SAGE:smooth_k=1"], 'option "smooth_k" in --additional-config "sage" is 1; it can be false or true'),
        (["SAGE:k_bits"], "'SAGE:k_bits' is not a run"),
        (["SAGE:smooth_k=no"], 'option "smooth_k" in --additional-config "sage" is \'no\'; it can be false or true'),
        (["CPU_ATTN:k_bits=4"], "'CPU_ATTN:k_bits=4' is not a run"),
        (["SAGE", "--text", "EMPTY"], "EMPTY is not a file with text"),
        (["SAGE", "--text", "NOWHERE"], "NOWHERE is not a file with text"),
        (["SAGE", "--tokens", "1"], "--tokens must be at least 2"),
        (["SAGE", "--model", "FOLDER"], "FOLDER is not a model folder: it has no config.json"),
        (["SAGE", "--passkey-keys", "0"], "--passkey-keys must be at least 1"),
        (["SAGE", "--prompt", "2047"], "--prompt must be below 2047"),
        (["SAGE:variator.plugins=FILE"], "only what follows a prompt can be scored; add, for example, --prompt 1024"),
        (["SAGE:variator.ratio=2"], '"variator" in --additional-config "sage" must be an object such as'),
        (["SAGE", "--passkey", "500,2041"], "pass-key prompts of 2041 tokens do not fit a context of 2048"),
        (["SAGE", "--passkey", "many"], "--passkey takes lengths such as 500,1500, not 'many'"),
    ],
)
def test_bad_input(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "EMPTY").touch()
    (tmp_path / "FOLDER").mkdir()
    arguments = [str(tmp_path / argument) if argument in ("EMPTY", "NOWHERE", "FOLDER") else argument for argument in arguments]
    with environment():
        assert quality.main(arguments) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert message in errors[0]


def test_a_run_that_fails_is_marked_and_others_are_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(run: Run, *_: Any, **__: Any) -> Scores:
        if run.options == {"k_bits": 4}:
            raise RuntimeError("out of memory\nand more of it")
        if run.options == {"page_tokens": 64}:
            raise KeyError("layer")
        return _scores(np.random.default_rng(0).normal(size=(50, 40)))

    monkeypatch.setattr(quality, "measure", measure)
    out, runs = tmp_path / "quality.json", ["SAGE", "SAGE:k_bits=4", "SAGE:page_tokens=64", "SAGE:smooth_k=false"]
    with environment():
        assert quality.main([*runs, "--out", str(out)]) == 1
        told = capsys.readouterr()
        first, second, third, last = json.loads(out.read_text())["runs"]
        assert second == {"run": "SAGE:k_bits=4", "error": "out of memory"}
        assert third == {"run": "SAGE:page_tokens=64", "error": "KeyError: 'layer'"}
        assert (first["run"], last["run"], last["loss_change"]) == ("SAGE", "SAGE:smooth_k=false", 0)
        lines = [line.split(maxsplit=1) for line in told.out.splitlines()]
        assert ["SAGE:k_bits=4", "failed: out of memory"] in lines
        assert ["SAGE:page_tokens=64", "failed: KeyError: 'layer'"] in lines
        assert told.err.splitlines()[-1] == "error: 2 of 4 runs failed: SAGE:k_bits=4 SAGE:page_tokens=64"
        # Options that every engine refuses are found before the first run begins.
        assert quality.main(["SAGE", "SAGE:memory.topk_pages=64"]) == 1
    assert "[1/" not in capsys.readouterr().err


def test_a_baseline_that_fails_ends_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def measure(run: Run, *_: Any, **__: Any) -> Scores:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(quality, "measure", measure)
    with environment():
        assert quality.main(["SAGE", "SAGE:k_bits=4"]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines() == ["[1/2] SAGE", "error: SAGE, the baseline, failed: out of memory"]


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib comes with the extra `bench`")
    figures = {"loss_change": 0.0, "top1_agreement": 1.0, "kv_capacity": 1.0}
    keys = {"passkey": {"500": 0.5}, "passkey_by_depth": {"500": [1.0, 0.0]}}
    runs = [{"run": "PLAIN", **figures, **keys}, {"run": "SAGE:calibration=a/b.safetensors", **figures, **keys}]
    runs.append({"run": "SAGE:k_bits=4", "error": "out of <memory>"})
    facts = {"predicted_tokens": 9, "text": "a <text>", "context": 8, "device": "a device", "date": "2026", "model": "a model"}
    report = {**facts, "versions": {"vllm": "0"}, "command": "sage eval", "runs": runs}
    files = plots.write(report, [["run", "loss", "kl"], ["PLAIN", "1.5", "0"], ["SAGE", "failed: <"]], tmp_path / "plots")
    assert [file.name for file in files] == ["quality.png", "passkey.png", "quality.html"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files[:2])
    page = files[2].read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "<td>1.5</td>" in page
    assert '<tr><td>SAGE</td><td colspan="2" class="failed">failed: &lt;</td></tr>' in page
    assert "a &lt;text&gt;" in page


def test_plots_need_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="--plots needs matplotlib"):
        plots.check()
