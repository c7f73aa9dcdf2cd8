# SPDX-License-Identifier: Apache-2.0
"""How compression plugins are trained."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from engines import save_random_model
from safetensors.torch import load_file

from sage_backend.demo import HELDOUT, MODEL_DIR
from sage_backend.tools import cli
from sage_backend.variator import files, train


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of four small layers with the embedded model's tokenizer, to train plugins for."""
    folder = tmp_path_factory.mktemp("small")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": 4096}
    save_random_model(folder, transformers.LlamaConfig(**sizes, initializer_range=0.3))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL_DIR / name, folder)
    return folder


def run_training(model: Path, out: Path, *more: str) -> int:
    sizes = ["--rows", "2", "--context", "128", "--layer-steps", "80", "--joint-steps", "80", "--recall", "0.3"]
    arguments = ["--text", str(HELDOUT), "--out", str(out), *sizes, "--device", "cpu", *more]
    return cli_main(["variator", "train", str(model), *arguments])


def cli_main(arguments: list[str]) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["sage", *arguments])
        return cli.main()


def test_training(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Plugins get better in both phases. Training that was interrupted and resumed ends with the same plugins, of the same
    layers."""
    assert run_training(small, tmp_path / "whole", "--layers", "2") == 0
    layers, _ = files.contents(str(tmp_path / "whole"))
    assert len(layers) == 2
    numbers = ", ".join(layer.split(".")[2] for layer in layers)
    assert capsys.readouterr().out.endswith(f" of the model's; layers {numbers}\n")
    model = transformers.AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    batches = train.Batches(transformers.AutoTokenizer.from_pretrained(small), HELDOUT.read_text(), 4, 128, 0.0, seed=5)

    @torch.no_grad()
    def losses(plugins: files.Plugins) -> tuple[float, float]:
        attached = train.Attached(model, plugins)
        alone = sum(train.layer_loss(attached, batches.draw(i)).item() for i in range(4))
        together = sum(train.joint_loss(attached, batches.draw(i), 2).item() for i in range(4))
        for layer, plain in attached.plain.items():
            model.get_submodule(layer).forward = plain
        return alone, together

    untrained = losses(files.make(layers, [2, 4], 32))
    trained = {layer: files.load(str(tmp_path / "whole"), layer, 32, [2, 4]) for layer in layers}
    for by_ratio in trained.values():
        for plugin in by_ratio.values():
            plugin.float()
    now = losses(trained)
    assert now[0] < 0.98 * untrained[0], (now, untrained)
    assert now[1] < 0.98 * untrained[1], (now, untrained)

    advance = train.Training.advance
    monkeypatch.setattr(train, "CHECKPOINT_EVERY", 20)

    def interrupt(self: train.Training) -> tuple[str, float]:
        if self.step == 105:
            raise KeyboardInterrupt
        return advance(self)

    monkeypatch.setattr(train.Training, "advance", interrupt)
    assert run_training(small, tmp_path / "resumed", "--layers", "2") == 1
    saved = tmp_path / "resumed.checkpoint"
    assert saved.is_file()
    assert "error: interrupted after 105 steps; --resume continues from step 100\n" in capsys.readouterr().err
    monkeypatch.setattr(train.Training, "advance", advance)
    assert run_training(small, tmp_path / "resumed", "--resume") == 1
    assert "is of a training with layers 2, not None; use the same arguments" in capsys.readouterr().err
    assert run_training(small, tmp_path / "resumed", "--layers", "2", "--resume") == 0
    whole, resumed = (load_file(tmp_path / name) for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["resumed", "whole"]


def test_choice_of_layers(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers whose plugins move the predictions most are left out, and run as in the plain model from then on."""
    monkeypatch.setattr(train, "LOGIT_ROWS", 50)
    model = transformers.AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    torch.manual_seed(0)
    layers = files.all_layers(model.config)
    plugins = files.make(layers, [2], 32)
    for layer, scale in zip(layers, (0.0, 100.0, 100.0, 0.0), strict=True):
        torch.nn.init.normal_(plugins[layer][2].up.bias, std=scale)
    torch.nn.init.zeros_(model.get_submodule(layers[0]).down_proj.weight)  # the first layer's FFN is not missed at all
    batches = train.Batches(transformers.AutoTokenizer.from_pretrained(small), HELDOUT.read_text(), 1, 128, 0.0, seed=5)
    attached = train.Attached(model, plugins)
    training = train.Training(attached, batches, {"layers": 1, "joint": 1}, 2)
    batch = batches.draw(0)
    with torch.no_grad():
        plain = attached.hidden(batch)
        with attached.compressing(2, batch.cut, [layers[1]]):
            quiet = attached.hidden(batch)
        expected = F.kl_div(
            attached.log_probabilities(quiet), attached.log_probabilities(plain), reduction="batchmean", log_target=True
        )
        torch.testing.assert_close(attached.divergence(plain, quiet), expected)
        training.choose()
        assert sorted(plugins) == [layers[0], layers[3]]
        with attached.compressing(2, batch.cut, []):
            assert torch.equal(attached.hidden(batch), plain)
    left_out = model.get_submodule(layers[1])
    assert left_out.forward.__func__ is type(left_out).forward


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "EMPTY"], "EMPTY is not a file with text"),
        (["--context", "64"], "--context must be at least 128"),
        (["--layers", "5"], "--layers is 5; it can be 1 to 4 for this model"),
        (["--out", "NOWHERE/p"], "there is no folder"),
        (["--resume"], "to resume from; leave --resume out"),
        (["--context", "200000"], "training needs more than --context"),
    ],
)
def test_bad_input(
    arguments: list[str], message: str, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "EMPTY").touch()
    arguments = [str(tmp_path / each) if each == "EMPTY" else each for each in arguments]
    capsys.readouterr()
    assert run_training(small, tmp_path / "out", *arguments) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
