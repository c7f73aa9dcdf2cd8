"""Anchors of a model's keys, found on a text before it is served: `sage calibrate MODEL --out FILE`.

Without a calibration, the first tokens that a server stores fix the anchors (`sage_kernels.reference.fix_anchor`). Here they
are the mean keys of a whole text. They are the same for every process that loads the file, so pages may leave the process, and
they are closer to what a prompt has in its middle and at its end, where keys have been rotated further.

A calibration is a safetensors file: for each attention layer, by vLLM's name of it, float32 [kv_heads, head_dim]; and in its
metadata which model it is of.
"""

import argparse
import hashlib
import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sage_backend import cli
from sage_backend.demo import HELDOUT

FORMAT = "sage-calibration-1"
_SAMPLED_BYTES = 1 << 20


def identity(model_config: Any) -> str:
    """A hash of a model: of a folder, its configuration and its weight files, by their names, sizes and first MiB; of one on a
    hub, its name and commit."""
    folder = Path(model_config.model)
    if not folder.is_dir():
        commit = getattr(model_config.hf_config, "_commit_hash", None)
        return hashlib.sha256(f"{model_config.model} {commit}".encode()).hexdigest()
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("config.json"), *folder.glob("*.safetensors")]):
        digest.update(f"{file.name} {file.stat().st_size} ".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_SAMPLED_BYTES))
    return digest.hexdigest()


def save(path: Path, anchors: dict[str, torch.Tensor], model_config: Any) -> None:
    """Write a calibration; an older file is replaced when the new one is complete."""
    from safetensors.torch import save_file

    part = path.with_name(path.name + ".part")
    save_file(anchors, part, metadata={"format": FORMAT, "model": identity(model_config)})
    os.replace(part, path)


def check(path: str, model_config: Any) -> None:
    """Raises ValueError, in one line, for a file that is no calibration, is damaged, or is one of another model."""
    metadata, _ = _read(path)
    if metadata["model"] != identity(model_config):
        raise ValueError(f"the calibration {path} is of another model; make one with: sage calibrate {model_config.model}")


def anchor(path: str, layer: str, heads: int, rank: int, ranks: int) -> torch.Tensor | None:
    """A layer's anchors for one of `ranks` tensor-parallel workers, float32 [heads, head_dim]; None where it has none.

    Raises ValueError like `check`, and where the shares of the workers do not fit the file.
    """
    _, anchors = _read(path, [layer])
    whole = anchors.get(layer)
    if whole is None:
        return None
    first = rank * len(whole) // ranks  # with fewer heads than workers, several have the same
    if heads != max(1, len(whole) // ranks):
        raise ValueError(f"{path} has {len(whole)} KV heads in {layer}, and not {heads} for each of {ranks} workers")
    return whole[first : first + heads]


def _read(path: str, layers: Sequence[str] = ()) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """The metadata, and the tensors of those of the layers that are there."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = set(file.keys())
            tensors = {layer: file.get_tensor(layer) for layer in layers if layer in names}
    except FileNotFoundError:
        raise ValueError(f"there is no calibration {path}; make one with: sage calibrate") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a calibration or is damaged ({error}); make one with: sage calibrate") from None
    if metadata.get("format") != FORMAT or "model" not in metadata:
        raise ValueError(f"{path} is not a calibration of this release; make one with: sage calibrate")
    return metadata, tensors


class KeyMean:
    """Sums up the keys that a layer stores."""

    def __init__(self) -> None:
        self.sum: torch.Tensor | float = 0.0
        self.count = 0

    def __call__(self, key: torch.Tensor, slots: torch.Tensor) -> None:
        """key: [tokens, kv_heads, head_dim]; slots: [tokens], negative for padding."""
        used = key[slots >= 0]
        self.sum = self.sum + used.double().sum(0)
        self.count += len(used)

    def result(self) -> torch.Tensor | None:
        """float32 [kv_heads, head_dim] on the CPU, or None if the layer has stored nothing."""
        return (self.sum / self.count).float().cpu() if self.count and isinstance(self.sum, torch.Tensor) else None


def _layers(worker: Any) -> dict[str, Any]:
    from sage_backend.backend import SageImpl

    layers = worker.vllm_config.compilation_config.static_forward_context
    return {name: impl for name, layer in layers.items() if isinstance(impl := getattr(layer, "impl", None), SageImpl)}


def _watch(worker: Any) -> None:
    for impl in _layers(worker).values():
        impl.watch = KeyMean()


def _means(worker: Any) -> dict[str, torch.Tensor]:
    means = {name: impl.watch.result() for name, impl in _layers(worker).items()}
    return {name: mean for name, mean in means.items() if mean is not None}


def calibrate(model: str, text: str, tokens: int, context: int, **arguments: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """The anchors of a model on the first `tokens` tokens of a text, read in windows of `context`, and vLLM's model_config.

    arguments: for the engine. Raises ValueError for a text without tokens.
    """
    from vllm import SamplingParams

    from sage_backend.quality import Run, engine, windows

    fixed = {"enforce_eager": True, "enable_prefix_caching": False, "max_model_len": context}
    with engine(Run.parse("SAGE"), model, **fixed, **arguments) as llm:
        config = llm.llm_engine.vllm_config
        prompts: list[Any] = [{"prompt_token_ids": each} for each in windows(llm.get_tokenizer(), text, tokens, context)]
        if not prompts:
            raise ValueError("the text is empty")
        llm.collective_rpc(_watch)
        llm.generate(prompts, SamplingParams(max_tokens=1, temperature=0, detokenize=False))
        of_workers = llm.collective_rpc(_means)
    heads = config.model_config.get_total_num_kv_heads()
    anchors: dict[str, torch.Tensor] = {}
    for name in {name: None for means in of_workers for name in means}:
        parts = torch.cat([means[name] for means in of_workers if name in means])
        anchors[name] = parts[:: max(1, len(parts) // heads)].contiguous()  # workers beyond the number of heads repeat one
    return anchors, config.model_config


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit status; what is wrong with the input is told in one line on stderr."""
    parser = argparse.ArgumentParser(prog="sage calibrate", description="Find the anchors of a model's keys on a text.")
    parser.add_argument("model", help="folder or name")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write the calibration")
    parser.add_argument("--text", type=Path, default=HELDOUT, help="what to read (default: the embedded held-out text)")
    parser.add_argument("--tokens", type=int, default=1 << 15, help="how many of its tokens (default: %(default)s)")
    parser.add_argument("--context", type=int, default=2048, help="tokens that are read together (default: %(default)s)")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    arguments = parser.parse_args(argv)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine is asked for what only its workers know
    return cli.run(lambda: _write(arguments))


def _write(arguments: argparse.Namespace) -> None:
    text = cli.read_text(arguments.text)
    if arguments.tokens < 1 or arguments.context < 2:
        raise ValueError("--tokens must be at least 1 and --context at least 2")
    if not arguments.out.absolute().parent.is_dir():
        raise ValueError(f"there is no folder {arguments.out.absolute().parent} for --out")
    from vllm.platforms import current_platform

    memory = {"kv_cache_memory_bytes": 1 << 30} if current_platform.is_cpu() else {}
    anchors, model_config = calibrate(
        arguments.model, text, arguments.tokens, arguments.context,
        tensor_parallel_size=arguments.tensor_parallel_size, **memory,
    )  # fmt: skip
    save(arguments.out, anchors, model_config)
    option = json.dumps({"sage": {"calibration": str(arguments.out)}})
    print(f"{arguments.out}: anchors of {len(anchors)} layers. Serve with --additional-config {shlex.quote(option)}")
