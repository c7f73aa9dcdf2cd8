# SPDX-License-Identifier: Apache-2.0
"""Compression plugins with random numbers."""

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

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


def fill_in(run: Any, folder: str) -> None:
    """If a run (`sage_backend.tools.engines.Run`) asks for plugins called `random`, make some for the model in `folder`."""
    variator = run.options.get("variator", {})
    if variator.get("plugins") == "random":
        with ProcessPoolExecutor(1) as other:  # torch's threads would not survive the fork of the engine
            variator["plugins"] = other.submit(random_plugins, folder).result()
