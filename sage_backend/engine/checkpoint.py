# SPDX-License-Identifier: Apache-2.0
"""Checks of a model's folder and of its weight files, before anything of them is loaded."""

import json
import struct
from pathlib import Path

_OF_MODELS = ("model_type", "architectures", "speculators_config")
"""What the config.json of a model has at least one of. vLLM finds the type of some models by others than the first."""
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}


def check_model_folder(folder: Path) -> None:
    """Raises ValueError for a folder without a config.json, or with one that is not that of a model."""
    if (folder / "params.json").is_file():  # Mistral's own format, which vLLM reads too
        return
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} is not a model folder: it has no config.json")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{file} is not JSON or is cut short; fetch it again") from None
    if not (isinstance(config, dict) and any(config.get(name) for name in _OF_MODELS)):
        raise ValueError(f"{folder} is not a model folder: its config.json names no model_type")


def check_weight_files(folder: Path) -> None:
    """Raises ValueError for no weights at all, or the first *.safetensors file whose size is not what its header says."""
    if not any(file.suffix in _WEIGHTS for file in folder.iterdir()):
        raise ValueError(f"{folder} has no weights (*.safetensors)")
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        try:
            with file.open("rb") as stream:
                (header_size,) = struct.unpack("<Q", stream.read(8))
                header = json.loads(stream.read(header_size)) if header_size < size else None
            if header is None:
                raise ValueError
            end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        except (struct.error, ValueError, LookupError, TypeError, AttributeError):
            raise ValueError(f"{file} is not a safetensors file or is cut short; fetch it again") from None
        if size != 8 + header_size + end:
            raise ValueError(f"{file} has {size} bytes where its header says {8 + header_size + end}; fetch it again")
