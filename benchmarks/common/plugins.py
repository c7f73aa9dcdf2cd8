# SPDX-License-Identifier: Apache-2.0
"""Compression plugins with random numbers."""

from pathlib import Path

import torch
from transformers import AutoConfig

from sage_backend.options import RATIOS
from sage_backend.variator import files


def random_plugins(folder: str) -> str:
    """A file of compression plugins for the model in `folder`, as fast as trained ones."""
    config = AutoConfig.from_pretrained(folder)
    plugins = files.make(files.default_layers(config), list(RATIOS), config.hidden_size)
    for by_ratio in plugins.values():
        for parameter in (each for one in by_ratio.values() for each in one.parameters()):
            torch.nn.init.normal_(parameter, std=0.02)
    path = Path(folder, "plugins")
    files.save(path, plugins, folder, config)
    return str(path)
