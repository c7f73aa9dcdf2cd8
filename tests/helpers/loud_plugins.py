# SPDX-License-Identifier: Apache-2.0
"""Compression plugins for tests."""

from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from sage_backend.demo import MODEL_DIR
from sage_backend.variator import files

LAYERS = ["model.layers.1.mlp", "model.layers.2.mlp"]


def loud_plugins(folder: Path, model: Path = MODEL_DIR, ratios: Sequence[int] = (2, 4), layers: Sequence[str] = LAYERS) -> Path:
    """A file of random plugins: they change what they compress so much that it is clearly noticed."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(model)
    plugins = files.make(list(layers), list(ratios), config.hidden_size)
    for by_ratio in plugins.values():
        for plugin in by_ratio.values():
            for parameter in plugin.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
    path = folder / "plugins.safetensors"
    files.save(path, plugins, str(model), config)
    return path
