# SPDX-License-Identifier: Apache-2.0
"""The engines that tools start, one for each run that a user names, and the facts that a report has about them."""

import datetime
import gc
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sage_backend import BACKEND, __version__
from sage_backend.options import SageOptions
from sage_backend.plugin import backend_member
from sage_backend.tools.command import one_line


@dataclass(frozen=True)
class Run:
    """One configuration: `BACKEND`, `BACKEND/kv_cache_dtype`, `SAGE:k_bits=4,smooth_k=false` or `SAGE:memory.topk_pages=64`."""

    name: str
    backend: str
    kv_cache_dtype: str = "auto"
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "Run":
        """Raises ValueError, in one line, for text that is no run or names no backend of this vLLM."""
        head, _, assignments = text.partition(":")
        name, _, dtype = head.partition("/")
        backend = name.upper()
        try:
            backend_member(backend)
        except (KeyError, ValueError):
            raise ValueError(f"vLLM has no attention backend {name!r}") from None
        booleans = {"false": False, "true": True}
        options: dict[str, Any] = {}
        for assignment in filter(None, assignments.split(",")):
            option, _, value = assignment.partition("=")
            if backend != BACKEND or not value:
                raise ValueError(f"{text!r} is not a run; one with options is, for example, SAGE:k_bits=4")
            *sections, option = option.split(".")
            target = options
            for section in sections:
                target = target.setdefault(section, {})
            target[option] = booleans[value] if value in booleans else int(value) if value.isdecimal() else value
        SageOptions.parse({"sage": options})
        return cls(text, backend, dtype or "auto", options)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of an engine (EngineArgs) for this run."""
        sage = {"additional_config": {"sage": self.options}} if self.options else {}
        return {"attention_backend": self.backend, "kv_cache_dtype": self.kv_cache_dtype, **sage}

    def check(self, model: str, **arguments: Any) -> None:
        """Raises ValueError, in one line, if an engine with these arguments would refuse to start, before a model is loaded."""
        # This and the other imports of vLLM and torch in functions: `sage COMMAND --help` and refusals do not need them, and
        # vLLM reads its environment variables, which commands set, when it is imported.
        from vllm.engine.arg_utils import EngineArgs

        try:
            EngineArgs(model, **self.arguments, **arguments).create_engine_config()
        except ValueError as error:
            raise ValueError(f"{self.name}: {one_line(error)}") from None


@contextmanager
def engine(run: Run, model: str, **arguments: Any) -> Iterator[Any]:
    """A vLLM engine (`vllm.LLM`) with the run's backend. Leaving the context shuts it down, so that another can follow."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(model, **run.arguments, **arguments)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def stretched(model: str, tokens: int) -> dict[str, Any]:
    """More arguments of an engine, so that it takes contexts of `tokens` tokens: if the model's table of positions is shorter,
    a longer one with the same frequencies."""
    from vllm.transformers_utils.config import get_config

    positions = getattr(get_config(model, trust_remote_code=False).get_text_config(), "max_position_embeddings", tokens)
    if positions >= tokens:
        return {}
    print(f"the model has {positions} positions; its table is made longer, to {tokens}", file=sys.stderr)
    return {"hf_overrides": {"max_position_embeddings": tokens}}


def _versions() -> dict[str, str]:
    import torch
    import vllm

    versions = {"torch": torch.__version__, "vllm": vllm.__version__, "sage_backend": __version__}
    return {"python": platform.python_version(), **versions}


def _device() -> str:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return current_platform.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    return f"{os.cpu_count()} x {names[0]}" if names else platform.machine()


def circumstances(command: str, model: str) -> dict[str, Any]:
    """The part of a report that says how it was made. command: the command line; model: folder or name."""
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": _device(),
        "versions": _versions(),
        "model": Path(model).name if Path(model).is_dir() else model,
    }
