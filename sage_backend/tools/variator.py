# SPDX-License-Identifier: Apache-2.0
"""The command `sage variator train MODEL --ratio 2,4 --text FILE --out FILE`. See `sage_backend.variator.train`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sage_backend.model_file import identity
from sage_backend.options import RATIOS
from sage_backend.tools.command import run_command
from sage_backend.tools.models import check_model
from sage_backend.tools.text import opening, read_text
from sage_backend.variator import files, train
from sage_backend.variator.groups import START


def _restore(training: train.Training, checkpoint: Path, settings: dict[str, Any]) -> None:
    """Raises ValueError for a checkpoint that does not exist or belongs to another training."""
    if not checkpoint.is_file():
        raise ValueError(f"there is no checkpoint {checkpoint} to resume from; leave --resume out")
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")
    for name, value in settings.items():
        if state["settings"].get(name) != value:
            raise ValueError(
                f"{checkpoint} is of a training with {name} {state['settings'].get(name)}, not {value}; "
                "use the same arguments, or leave --resume out"
            )
    training.restore(state)


def _ratios(text: str) -> list[int]:
    ratios = text.split(",")
    if not all(ratio.isdecimal() and int(ratio) in RATIOS for ratio in ratios):
        raise argparse.ArgumentTypeError(f"takes ratios out of {', '.join(map(str, RATIOS))}, such as 2,4; not {text!r}")
    return sorted(set(map(int, ratios)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sage variator", description="Compression plugins for a model's FFNs.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("train", help="train plugins on a text and write them to a file")
    command.add_argument("model", help="folder or name")
    command.add_argument("--ratio", type=_ratios, default=[2, 4], metavar="RATIOS", help="for example 2,4 (default)")
    command.add_argument("--text", type=Path, required=True, help="what to train on")
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write the plugins")
    command.add_argument("--layers", type=int, help="how many, the least harmful ones (default: all but the first and last)")
    command.add_argument("--layer-steps", type=int, default=400, help="steps of plugins alone (default: %(default)s)")
    command.add_argument("--joint-steps", type=int, default=1600, help="steps of plugins together (default: %(default)s)")
    command.add_argument("--rows", type=int, default=4, help="windows of a step (default: %(default)s)")
    command.add_argument("--context", type=int, default=512, help="tokens of a window (default: %(default)s)")
    command.add_argument("--recall", type=float, default=0.0, help="share of steps with pass keys (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command.add_argument("--resume", action="store_true", help="continue from FILE.checkpoint")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status. Errors in the input go to stderr, in one line."""
    arguments = _parser().parse_args(argv)
    return run_command(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    text = read_text(arguments.text)
    if min(arguments.layer_steps, arguments.joint_steps, arguments.rows) < 1:
        raise ValueError("--layer-steps, --joint-steps and --rows must be at least 1")
    if arguments.context < train.LEAST_CONTEXT:
        raise ValueError(f"--context must be at least {train.LEAST_CONTEXT}")
    if not arguments.out.absolute().parent.is_dir():
        raise ValueError(f"there is no folder {arguments.out.absolute().parent} for --out")
    check_model(arguments.model)
    # Not at the top: it takes seconds, which --help and errors in the arguments need not wait for.
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(arguments.model)
    layers = files.default_layers(config)
    if arguments.layers is not None:
        layers = files.all_layers(config)
        if not 1 <= arguments.layers <= len(layers):
            raise ValueError(f"--layers is {arguments.layers}; it can be 1 to {len(layers)} for this model")
    torch.manual_seed(arguments.seed)
    plugins = files.make(layers, arguments.ratio, config.hidden_size)
    on_cpu = torch.device(arguments.device).type == "cpu"  # where 16 bits are slow
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32 if on_cpu else "auto")
    model.to(arguments.device).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    drawn = arguments.rows, arguments.context, arguments.recall, arguments.seed
    batches = train.Batches(tokenizer, text, *drawn, opening=opening(tokenizer))
    steps = {"layers": arguments.layer_steps, "joint": arguments.joint_steps}
    training = train.Training(train.Attached(model, plugins), batches, steps, arguments.layers or len(layers))
    training.modules.to(arguments.device)
    checkpoint = arguments.out.with_name(arguments.out.name + ".checkpoint")
    names = ("ratio", "layers", "layer_steps", "joint_steps", "rows", "context", "recall", "seed")
    settings = {name: getattr(arguments, name) for name in names}
    settings |= {"model": identity(arguments.model, config), "text": len(text), "start": START}
    if arguments.resume:
        _restore(training, checkpoint, settings)
    try:
        train.train(training, checkpoint, settings)
    except KeyboardInterrupt:
        saved = training.step // train.CHECKPOINT_EVERY * train.CHECKPOINT_EVERY
        rest = f"; --resume continues from step {saved}" if saved else ", before the first checkpoint"
        raise RuntimeError(f"interrupted after {training.step} steps{rest}") from None
    plugins = training.model.plugins  # those of the layers that are left
    files.save(arguments.out, plugins, arguments.model, config)
    checkpoint.unlink(missing_ok=True)
    kept = [plugin for by_ratio in plugins.values() for plugin in by_ratio.values()]
    added = sum(parameter.numel() for plugin in kept for parameter in plugin.parameters())
    fraction = added / sum(parameter.numel() for parameter in model.parameters())
    numbers = ", ".join(layer.split(".")[2] for layer in plugins)
    print(f"{arguments.out}: {added:,} parameters, {100 * fraction:.2f}% of the model's; layers {numbers}")
