# SPDX-License-Identifier: Apache-2.0
"""The file of a calibration: `sage calibrate` writes it, a server loads it.

It is a safetensors file. For each attention layer, by vLLM's name of it, it has the anchor of keys, float32 [kv_heads,
head_dim]. By that name and `OF_EQUALIZER` it has the equalizer; and `OF_ORDER`, the order of RoPE pairs, int32 [kv_heads,
head_dim // 2]; and `OF_VALUES`, the anchor of values, if the layer has one. Its metadata identify the model and have the bits
of each layer's keys and values, if they were chosen.
"""

import json
from pathlib import Path
from typing import Any

import torch

from sage_backend.model_file import ModelFileFormat
from sage_kernels import LayerCalibration
from sage_paged import K_BITS, V_BITS

_FILE = ModelFileFormat("calibration", "sage calibrate", "sage-calibration-2")
OF_EQUALIZER, OF_ORDER, OF_VALUES = ".equalizer", ".order", ".values"

LayerBits = dict[str, int]
"""What was chosen for a layer, by the name of the option that it replaces: k_bits, v_bits, or both."""
_CHOICES = {"k_bits": K_BITS, "v_bits": V_BITS}


def save(
    path: Path, tensors: dict[str, torch.Tensor], model_config: Any, bits: dict[str, LayerBits] | None = None
) -> None:
    """Write a calibration; an older file is replaced when the new one is complete.

    tensors: by the names of the file; model_config: vLLM's ModelConfig; bits: by layer, if they were chosen.
    """
    of_option = {option: {layer: each[option] for layer, each in (bits or {}).items() if option in each} for option in _CHOICES}
    metadata = {option: json.dumps(chosen) for option, chosen in of_option.items() if chosen}
    _FILE.save(path, tensors, model_config.model, model_config.hf_config, **metadata)


def check(path: str, model_config: Any) -> None:
    """Raises ValueError, in one line, for a file that is no calibration, is damaged, or is of another model (ModelConfig)."""
    _FILE.check(path, model_config)


def tensors(path: str) -> dict[str, torch.Tensor]:
    """All tensors of a file. Raises ValueError like `check`, other models excepted."""
    return _FILE.read(path, _FILE.shapes(path))[1]


def layer_bits(path: str) -> dict[str, LayerBits]:
    """The bits that the calibration chooses, for the layers where it does. Raises ValueError like `check`."""
    metadata, _ = _FILE.read(path)
    found: dict[str, LayerBits] = {}
    for option, allowed in _CHOICES.items():
        try:
            chosen = json.loads(metadata.get(option, "{}"))
            valid = set(chosen.values()) <= set(allowed)
        except (ValueError, AttributeError, TypeError):
            valid = False
        if not valid:
            raise ValueError(f"{path} is damaged: its {option} are {metadata[option]!r}; make one with: {_FILE.command}")
        for layer, bits in chosen.items():
            found.setdefault(layer, {})[option] = bits
    return found


def calibration(path: str, layer: str, heads: int, rank: int, ranks: int) -> LayerCalibration:
    """A layer's calibration for worker `rank` of `ranks` tensor-parallel workers with `heads` KV heads each.

    Raises ValueError like `check`, and if the file has another number of KV heads.
    """
    _, found = _FILE.read(path, [layer + kind for kind in ("", OF_EQUALIZER, OF_ORDER, OF_VALUES)])
    for each in found.values():
        if heads != max(1, len(each) // ranks):
            raise ValueError(
                f"{path} has {len(each)} KV heads in {layer}, and not {heads} for each of {ranks} workers; make one with: "
                f"{_FILE.command}"
            )
    return worker_calibration(found, layer, heads, rank, ranks)


def worker_calibration(tensors: dict[str, torch.Tensor], layer: str, heads: int, rank: int, ranks: int) -> LayerCalibration:
    """As `calibration`, out of the tensors of a file."""

    def slice_of(name: str) -> torch.Tensor | None:
        if name not in tensors:
            return None
        first = rank * len(tensors[name]) // ranks  # with fewer heads than workers, several have the same
        return tensors[name][first : first + heads]

    return LayerCalibration(*(slice_of(layer + kind) for kind in ("", OF_EQUALIZER, OF_ORDER, OF_VALUES)))
