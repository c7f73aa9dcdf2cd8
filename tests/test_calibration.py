"""Calibrations: `sage calibrate` on a real engine, and what becomes of files that are not what they should be."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import engine, environment, greedy, heldout_prompts

from sage_backend import calibration, cli
from sage_backend.demo import MODEL_DIR


def config(model: Path) -> Any:
    """What `calibration` looks at of vLLM's ModelConfig."""
    return SimpleNamespace(model=str(model), hf_config=SimpleNamespace())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "anchors.safetensors"
    calibration.save(path, {"layer": torch.arange(8.0)[:, None].expand(8, 64).contiguous()}, config(MODEL_DIR))
    return path


def test_round_trip(file: Path) -> None:
    calibration.check(str(file), config(MODEL_DIR))
    whole = calibration.anchor(str(file), "layer", 8, 0, 1)
    assert whole is not None
    assert whole[:, 0].tolist() == list(range(8))
    assert calibration.anchor(str(file), "another layer", 8, 0, 1) is None
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize(("ranks", "heads"), [(2, 4), (8, 1), (16, 1)])
def test_workers_take_their_heads(file: Path, ranks: int, heads: int) -> None:
    shares = [calibration.anchor(str(file), "layer", heads, rank, ranks) for rank in range(ranks)]
    found = [int(head) for share in shares if share is not None for head in share[:, 0]]
    assert found == sorted([*range(8)] * max(1, ranks // 8))


def test_another_number_of_heads_is_refused(file: Path) -> None:
    with pytest.raises(ValueError, match="has 8 KV heads in layer, and not 2 for each of 1 workers"):
        calibration.anchor(str(file), "layer", 2, 0, 1)


def test_unusable_files_are_refused(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "model"
    shutil.copytree(MODEL_DIR, other)
    weights = other / "model.safetensors"
    calibration.check(str(file), config(other))  # the same model elsewhere
    content = bytearray(weights.read_bytes())
    content[1 << 19] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match="is of another model; make one with: sage calibrate"):
        calibration.check(str(file), config(other))
    with pytest.raises(ValueError, match="is not a calibration of this release"):
        calibration.check(str(weights), config(MODEL_DIR))
    with pytest.raises(ValueError, match=r"there is no calibration nowhere; make one with: sage calibrate"):
        calibration.check("nowhere", config(MODEL_DIR))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="is not a calibration or is damaged"):
        calibration.check(str(file), config(MODEL_DIR))


@pytest.mark.engine
def test_engine_with_a_calibration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`sage calibrate` on the embedded model; an engine that loads the file has its anchors, and keeps them."""
    file = tmp_path / "anchors.safetensors"
    with environment():
        assert calibration.main([str(MODEL_DIR), "--out", str(file), "--tokens", "3000"]) == 0
    assert f"{file}: anchors of 4 layers" in capsys.readouterr().out
    with engine(additional_config={"sage": {"calibration": str(file)}}) as llm:
        answers = greedy(llm, heldout_prompts(llm, [100, 300]), tokens=8)
        assert all(len(answer.tokens) == 8 for answer in answers)
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        for name, layer in layers.items():
            expected = calibration.anchor(str(file), name, 2, 0, 1)
            assert expected is not None
            assert torch.equal(layer.impl.anchor, expected)
            assert expected.abs().max() > 15, "the biases of the embedded model's keys reach 21"


@pytest.mark.engine
def test_engine_refuses_a_calibration_of_another_model(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "model"
    shutil.copytree(MODEL_DIR, other)
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**settings, "rope_theta": 5e5}))
    option = {"sage": {"calibration": str(file)}}
    with pytest.raises(ValueError, match="is of another model"), engine(model=other, additional_config=option):
        pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["EMPTY/model", "--out", "c", "--text", "EMPTY/text"], "EMPTY/text is not a file with text"),
        ([str(MODEL_DIR), "--out", "NOWHERE/c"], "there is no folder"),
        ([str(MODEL_DIR), "--out", "c", "--tokens", "0"], "--tokens must be at least 1 and --context at least 2"),
        (["EMPTY", "--out", "c"], "EMPTY is not a model folder: it has no config.json"),
        ([str(MODEL_DIR), "--out", "c", "--context", "4096"], "(4096) is greater than the derived max_model_len"),
    ],
)
def test_bad_input(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").touch()
    arguments = [argument.replace("EMPTY", str(tmp_path)) for argument in arguments]
    with environment():
        assert calibration.main(arguments) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert message.replace("EMPTY", str(tmp_path)) in errors[0]


def test_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["sage", "--help"])
    assert cli.main() == 0
    assert "calibrate" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["sage", "evaluate"])
    assert cli.main() == 2
    assert "usage: sage COMMAND" in capsys.readouterr().err
