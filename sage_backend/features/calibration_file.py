# SPDX-License-Identifier: Apache-2.0
"""The file of a calibration: what `sage calibrate` writes and a server loads.

A calibration is a safetensors file: for each attention layer, by vLLM's name of it, float32 [kv_heads, head_dim]; the same of
values by that name and `OF_VALUES`, if the layer has it; and in its metadata which model it is of and, if they were chosen, the
bits of each layer's keys.
"""

import json
from pathlib import Path
from typing import Any

import torch

from sage_backend.model_file import Kind
from sage_paged import K_BITS

_FILE = Kind("calibration", "sage calibrate", "sage-calibration-1")
OF_VALUES = ".values"


def save(path: Path, anchors: dict[str, torch.Tensor], model_config: Any, chosen: dict[str, int] | None = None) -> None:
    """Write a calibration; an older file is replaced when the new one is complete. anchors: as the file has them. chosen: bits
    of keys by layer."""
    metadata = {"k_bits": json.dumps(chosen)} if chosen else {}
    _FILE.save(path, anchors, model_config.model, model_config.hf_config, **metadata)


def check(path: str, model_config: Any) -> None:
    """Raises ValueError, in one line, for a file that is no calibration, is damaged, or is one of another model."""
    _FILE.check(path, model_config)


def k_bits(path: str) -> dict[str, int]:
    """The bits of each layer's keys, as far as the calibration chooses them. Raises ValueError like `check`."""
    metadata, _ = _FILE.read(path)
    try:
        chosen = json.loads(metadata.get("k_bits", "{}"))
        if set(chosen.values()) <= set(K_BITS):
            return chosen
    except (ValueError, AttributeError, TypeError):
        pass
    raise ValueError(f"{path} is damaged: its k_bits are {metadata['k_bits']!r}; make one with: sage calibrate")


Anchors = tuple[torch.Tensor | None, torch.Tensor | None]
"""Of a layer's keys and of its values, float32 [kv_heads, head_dim] each; None where there is none."""


def anchors(path: str, layer: str, heads: int, rank: int, ranks: int) -> Anchors:
    """A layer's anchors for one of `ranks` tensor-parallel workers with `heads` KV heads each.

    Raises ValueError like `check`, and where the shares of the workers do not fit the file.
    """
    _, whole = _FILE.read(path, [layer, layer + OF_VALUES])
    for each in whole.values():
        if heads != max(1, len(each) // ranks):
            raise ValueError(f"{path} has {len(each)} KV heads in {layer}, and not {heads} for each of {ranks} workers")
    return share_of(whole, layer, heads, rank, ranks)


def share_of(whole: dict[str, torch.Tensor], layer: str, heads: int, rank: int, ranks: int) -> Anchors:
    """As `anchors`, of what a file has."""

    def share(name: str) -> torch.Tensor | None:
        if name not in whole:
            return None
        first = rank * len(whole[name]) // ranks  # with fewer heads than workers, several have the same
        return whole[name][first : first + heads]

    return share(layer), share(layer + OF_VALUES)
