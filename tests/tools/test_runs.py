# SPDX-License-Identifier: Apache-2.0
"""Runs that fail and models that are not there, in every command that starts engines."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from engines import PLAIN, environment, save_random_model

from sage_backend.demo import HELDOUT, MODEL_DIR
from sage_backend.tools import calibrate, needle, plots, quality, variator
from sage_backend.tools.engines import Failure, Run, attempts, check_runs, engine, error_messages
from sage_backend.tools.models import check_model
from sage_backend.tools.tables import table

COMMANDS = {
    "eval": (quality.main, lambda model: ["SAGE", "--model", model]),
    "needle": (needle.main, lambda model: ["SAGE", "--model", model]),
    "calibrate": (calibrate.main, lambda model: [model, "--out", "c"]),
    "variator train": (variator.main, lambda model: ["train", model, "--text", str(HELDOUT), "--out", "p"]),
}


@pytest.fixture(scope="module")
def small_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a head size that SAGE has no page format for. Other backends serve it."""
    folder = tmp_path_factory.mktemp("small_heads")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 4096}
    save_random_model(folder, transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL_DIR / name, folder)
    return folder


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("TMP/nowhere", "there is no model folder TMP/nowhere"),
        ("./nowhere", "there is no model folder ./nowhere"),
        ("no/such/folder", "there is no model folder no/such/folder"),
        ("TMP", "TMP is not a model folder: it has no config.json"),
    ],
)
def test_a_folder_without_a_model(
    command: str, model: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main, arguments = COMMANDS[command]
    with environment():
        assert main(arguments(model.replace("TMP", str(tmp_path)))) == 1
    assert capsys.readouterr().err.splitlines() == [f"error: {message.replace('TMP', str(tmp_path))}"]


def test_runs_with_lists() -> None:
    """Only commas outside a list are between options."""
    with environment():
        run = Run.parse("SAGE:memory.dense_layers=[0,2],k_bits=4,memory.local_tokens=512")
    assert run.options == {"k_bits": 4, "memory": {"dense_layers": [0, 2], "local_tokens": 512}}
    shown = plots._short("SAGE:memory.dense_layers=[0,2],calibration=some/file")
    assert shown == "SAGE:memory.dense_layers=[0,2],calibration=file"


def test_eval_has_nowhere_to_write_to(capsys: pytest.CaptureFixture[str]) -> None:
    """It says so before it measures anything."""
    with environment():
        assert quality.main(["SAGE", "--out", "missing/x.json"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: there is no folder")


@pytest.mark.parametrize("model", [str(MODEL_DIR), "gpt2", "an-owner/a.model", "s3://bucket/a/b", str(HELDOUT)])
def test_what_may_be_a_model(model: str) -> None:
    check_model(model)


def test_a_backend_that_refuses_the_model_fails_its_runs_alone(small_heads: Path) -> None:
    """Wrong options, and a model that no run can serve, end the command instead."""
    arguments: dict[str, Any] = {"max_model_len": 64, "disable_log_stats": True}
    with environment():
        runs = [Run.parse(run) for run in (PLAIN, "SAGE", "SAGE:k_bits=4")]
        refused = check_runs(runs, str(small_heads), **arguments)
        assert list(refused) == ["SAGE", "SAGE:k_bits=4"]
        assert "head size 32 has no page format" in refused["SAGE"].reason
        assert check_runs(runs, str(MODEL_DIR), **arguments) == {}
        with pytest.raises(ValueError, match=r"SAGE:k_bits=4: .* head size 32 has no page format"):
            check_runs(runs[1:], str(small_heads), **arguments)
        with pytest.raises(ValueError, match=r"SAGE:memory\.topk_pages=64: option"):
            check_runs([*runs, Run.parse("SAGE:memory.topk_pages=64")], str(MODEL_DIR), **arguments)


@pytest.mark.engine
def test_a_refused_run_and_those_around_it(small_heads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.json"
    sizes = ["--model", str(small_heads), "--tokens", "40", "--context", "64", "--out", str(out)]
    with environment():
        assert quality.main([PLAIN, "SAGE", f"{PLAIN}/auto", *sizes]) == 1
        first, refused, last = json.loads(out.read_text())["runs"]
        assert refused["run"] == "SAGE"
        assert "head size 32 has no page format" in refused["error"]
        assert first["loss"] == last["loss"]
        assert capsys.readouterr().err.splitlines()[-1] == "error: 1 of 3 runs failed: SAGE"
        assert quality.main(["SAGE", PLAIN, *sizes]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: SAGE, the baseline, failed: ")
    assert "head size 32 has no page format" in message


@pytest.mark.engine
def test_an_engine_that_cannot_start_makes_room_for_the_next() -> None:
    """In this process, as in the tests of other engines."""
    runs = [Run.parse("SAGE"), Run.parse("SAGE:k_bits=4")]

    def start(run: Run) -> int:
        size = 1 << 16 if run.name == "SAGE" else 64 << 20
        with engine(run, str(MODEL_DIR), enforce_eager=True, max_model_len=512, kv_cache_memory_bytes=size) as llm:
            return len(llm.generate("a", use_tqdm=False))

    with environment():
        (_, failure), (_, answers) = attempts(runs, {}, start)
    assert isinstance(failure, Failure)
    assert "No available memory for the cache blocks" in failure.reason
    assert answers == 1


@pytest.mark.engine
def test_the_cause_of_a_failure_in_another_process() -> None:
    with environment(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        stderr = os.fstat(2)
        sizes: dict[str, Any] = {"max_model_len": 512, "kv_cache_memory_bytes": 1 << 16}
        started = engine(Run.parse("SAGE"), str(MODEL_DIR), enforce_eager=True, **sizes)
        with pytest.raises(RuntimeError, match=r"^No available memory for the cache blocks"), started:
            pass
        assert os.path.samestat(os.fstat(2), stderr)


def test_error_messages() -> None:
    stderr = """Traceback (most recent call last):
  File "a.py", line 1, in f
    raise ValueError("of no importance: Error: x")
(EngineCore pid=7) ValueError: the cause
a.b.CudaError: another
RuntimeError: Engine core initialization failed. See root cause above.
"""
    assert error_messages(stderr) == ["the cause", "another"]


def test_a_reason_spans_the_columns_of_a_table() -> None:
    rows = [["run", "loss", "change"], ["A", "1.5", "+0.1"], ["B:k_bits=4", "failed: a long reason that widens nothing"]]
    assert table(rows).splitlines() == [
        "run         loss  change",
        "A            1.5    +0.1",
        "B:k_bits=4  failed: a long reason that widens nothing",
    ]


def test_needle_plots_without_failed_runs(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib comes with the extra `bench`")
    facts = {"depths": 2, "device": "d", "versions": {"vllm": "0"}, "date": "2026", "model": "m", "command": "sage needle"}
    failed = {"run": "FAILED", "error": "out of memory"}
    for runs, files in (([{"run": "SAGE", "recalled": {"600": [1, 0]}}, failed], 2), ([failed], 1)):
        rows = [["run", "600", "700"], ["FAILED", "failed: out of memory"]]
        written = plots.write_needle(facts | {"runs": runs}, rows, tmp_path)
        assert len(written) == files
        assert "failed: out of memory" in written[-1].read_text()
