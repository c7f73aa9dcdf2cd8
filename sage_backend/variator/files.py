# SPDX-License-Identifier: Apache-2.0
"""Plugin files: the plugins of some layers of one model, for one or more ratios.

A safetensors file. The plugin of `ratio` at the FFN that is called `layer` (such as model.layers.3.mlp) both in transformers
and in vLLM has its parameters under `{layer}.{ratio}.`.
"""

from pathlib import Path
from typing import Any

import torch

from sage_backend.model_file import ModelFileFormat
from sage_backend.options import RATIOS
from sage_backend.variator.plugin import CompressionPlugin

FILE = ModelFileFormat("plugin file", "sage variator train", "sage-variator-1")

MODEL_TYPES = ("gemma3_text", "glm4", "granite", "llama", "mistral", "phi3", "qwen2", "qwen3")
"""`model_type` of the models whose FFNs are called model.layers.N.mlp and map each token's hidden vector by itself."""

Plugins = dict[str, dict[int, CompressionPlugin]]
"""By layer, then by ratio."""


def default_layers(hf_config: Any) -> list[str]:
    """All layers but the first and the last. Raises ValueError like `check_model`."""
    return all_layers(hf_config)[1:-1]


def all_layers(hf_config: Any) -> list[str]:
    """The names of a model's FFNs. Raises ValueError like `check_model`."""
    check_model(hf_config)
    return [f"model.layers.{i}.mlp" for i in range(hf_config.num_hidden_layers)]


def check_model(hf_config: Any) -> None:
    """Raises ValueError, in one line, for a model that plugins cannot be attached to. hf_config: its transformers config."""
    if hf_config.model_type not in MODEL_TYPES:
        raise ValueError(
            f"compression plugins do not know models of type {hf_config.model_type}; "
            f"there is {', '.join(MODEL_TYPES)}; leave the option variator out"
        )


def make(layers: list[str], ratios: list[int], hidden: int) -> Plugins:
    """Untrained plugins."""
    return {layer: {ratio: CompressionPlugin(hidden, ratio) for ratio in ratios} for layer in layers}


def _shapes(layers: list[str], ratios: list[int], hidden: int) -> Plugins:
    """Plugins on the meta device. Drawing their numbers would start torch's threads, and an engine that vLLM forks from a
    process with such threads waits for them forever."""
    with torch.device("meta"):
        return make(layers, ratios, hidden)


def save(path: Path, plugins: Plugins, model: str, hf_config: Any) -> None:
    """Write plugins in bfloat16. An older file is replaced when the new one is complete."""
    tensors = {
        f"{layer}.{ratio}.{name}": tensor.detach().bfloat16().cpu().contiguous()
        for layer, by_ratio in plugins.items()
        for ratio, plugin in by_ratio.items()
        for name, tensor in plugin.state_dict().items()
    }
    FILE.save(path, tensors, model, hf_config)


def check(path: str, model_config: Any) -> tuple[int, ...]:
    """The ratios of the plugins in a file, after checking the file against a model (vLLM's ModelConfig).

    Raises ValueError, in one line, for a file that has no plugins, is damaged, or is of another model, and for a type of model
    that is not supported.
    """
    check_model(model_config.hf_config)
    FILE.check(path, model_config)
    layers, ratios = contents(path)
    hidden = model_config.hf_config.hidden_size
    expected = {
        f"{layer}.{ratio}.{name}": tuple(tensor.shape)
        for layer, by_ratio in _shapes(layers, ratios, hidden).items()
        for ratio, plugin in by_ratio.items()
        for name, tensor in plugin.state_dict().items()
    }
    if not layers or not set(all_layers(model_config.hf_config)).issuperset(layers) or FILE.shapes(path) != expected:
        raise ValueError(f"{path} is not a complete plugin file; make one with: {FILE.command} {model_config.model}")
    return tuple(ratios)


def contents(path: str) -> tuple[list[str], list[int]]:
    """The layers and the ratios of a file, sorted. Raises ValueError like `check`, for a file that is no plugin file."""
    layers, ratios = set(), set()
    for name in FILE.shapes(path):
        layer, _, ratio = name.rpartition(".")[0].rpartition(".")[0].rpartition(".")
        if not ratio.isdecimal() or int(ratio) not in RATIOS:
            raise ValueError(f"{path} is not a plugin file of this release; make one with: {FILE.command}")
        layers.add(layer)
        ratios.add(int(ratio))
    return sorted(layers), sorted(ratios)


def load(path: str, layer: str, hidden: int, ratios: list[int]) -> dict[int, CompressionPlugin]:
    """The plugins of a layer by ratio, in bfloat16 on the CPU. Raises ValueError like `check`."""
    plugins = _shapes([layer], ratios, hidden)[layer]
    for ratio, plugin in plugins.items():
        prefix = f"{layer}.{ratio}."
        _, tensors = FILE.read(path, [prefix + name for name in plugin.state_dict()])
        # Copied, since tensors that were read share the file's memory.
        read = {name.removeprefix(prefix): tensor.to(torch.bfloat16, copy=True) for name, tensor in tensors.items()}
        plugin.load_state_dict(read, assign=True)
    return {ratio: plugin.requires_grad_(False) for ratio, plugin in plugins.items()}
