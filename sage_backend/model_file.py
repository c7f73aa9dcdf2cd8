# SPDX-License-Identifier: Apache-2.0
"""Files made for one model: safetensors files whose metadata identify it."""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_SAMPLED_BYTES = 1 << 20


def identity(model: str, hf_config: Any) -> str:
    """A hash (hex) of a model. Of a folder, its configuration and its weight files count, by names, sizes and first MiB; of a
    model on a hub, its name and commit, also where vLLM names its folder in the hub's cache instead (HF_HUB_OFFLINE)."""
    folder = Path(model)
    if snapshot := re.fullmatch(r"models--(.+)/snapshots/([0-9a-f]{40})", "/".join(folder.parts[-3:])):
        name, commit = snapshot.groups()
        return hashlib.sha256(f"{name.replace('--', '/', 1)} {commit}".encode()).hexdigest()
    if not folder.is_dir():
        commit = getattr(hf_config, "_commit_hash", None)
        return hashlib.sha256(f"{model} {commit}".encode()).hexdigest()
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("config.json"), *folder.glob("*.safetensors")]):
        digest.update(f"{file.name} {file.stat().st_size} ".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_SAMPLED_BYTES))
    return digest.hexdigest()


@dataclass(frozen=True)
class ModelFileFormat:
    """A format of files. noun: the users' word for one; command: the command that makes one; format: the name and version in a
    file's metadata."""

    noun: str
    command: str
    format: str

    def save(self, path: Path, tensors: dict[str, torch.Tensor], model: str, hf_config: Any, **metadata: str) -> None:
        """Write a file. An older one is replaced when the new one is complete. Raises OSError."""
        from safetensors import SafetensorError  # needed by engines with such a file only
        from safetensors.torch import save_file

        partial = path.with_name(f"{path.name}.{os.getpid()}.part")  # replicas may write the same file at once
        try:
            save_file(tensors, partial, metadata={"format": self.format, "model": identity(model, hf_config), **metadata})
            with suppress(OSError):  # safetensors lets only the owner read; who may read the folder may read its files
                partial.chmod(path.parent.stat().st_mode & 0o666)
            os.replace(partial, path)
        except SafetensorError as error:  # a folder that cannot be written, or a full one
            raise OSError(str(error)) from error
        finally:
            partial.unlink(missing_ok=True)

    def check(self, path: str, model_config: Any) -> dict[str, str]:
        """The metadata. Raises ValueError like `read`, and for a file of another model."""
        metadata, _ = self.read(path)
        if metadata["model"] != identity(model_config.model, model_config.hf_config):
            raise ValueError(f"the {self.noun} {path} is of another model; make one with: {self.command} {model_config.model}")
        return metadata

    def read(self, path: str, names: Iterable[str] = ()) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
        """The metadata, and those of the named tensors that are there.

        Raises ValueError, in one line, for a file that is not there, is damaged, or is of another kind.
        """
        with self._open(path) as file:
            present = set(file.keys())
            return self._metadata(path, file), {name: file.get_tensor(name) for name in names if name in present}

    def shapes(self, path: str) -> Mapping[str, tuple[int, ...]]:
        """The shapes of all tensors by name, without reading them. Raises ValueError like `read`."""
        with self._open(path) as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - it is no mapping

    def _metadata(self, path: str, file: Any) -> dict[str, str]:
        metadata = file.metadata() or {}
        if metadata.get("format") != self.format or "model" not in metadata:
            raise ValueError(f"{path} is not a {self.noun} of this release; make one with: {self.command}")
        return metadata

    def _open(self, path: str) -> Any:
        from safetensors import SafetensorError, safe_open  # needed by engines with such a file only

        try:
            return safe_open(path, framework="pt")
        except FileNotFoundError:
            raise ValueError(f"there is no {self.noun} {path}; make one with: {self.command}") from None
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a {self.noun} or is damaged ({error}); make one with: {self.command}") from None
