# SPDX-License-Identifier: Apache-2.0
"""The engines that tools start, one for each run that a user names, and the facts that a report has about them."""

import datetime
import gc
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from sage_backend import BACKEND, __version__
from sage_backend.options import SageOptions
from sage_backend.plugin import backend_member
from sage_backend.tools.command import one_line

T = TypeVar("T")


def assignments(text: str) -> list[str]:
    """The options of a run, apart: text as "k_bits=4,memory.dense_layers=[0,1]"."""
    return [each for each in re.split(r",(?![^\[]*\])", text) if each]


def _value(text: str) -> Any:
    """The value of an option: a number, a boolean or a list as in JSON, or the text itself."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, int | float | list) else text


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
        head, _, given = text.partition(":")
        name, _, dtype = head.partition("/")
        backend = name.upper()
        try:
            backend_member(backend)
        except (KeyError, ValueError):
            raise ValueError(f"vLLM has no attention backend {name!r}") from None
        options: dict[str, Any] = {}
        for assignment in assignments(given):
            option, _, value = assignment.partition("=")
            if backend != BACKEND or not value:
                raise ValueError(f"{text!r} is not a run; one with options is, for example, SAGE:k_bits=4")
            *sections, option = option.split(".")
            target = options
            for section in sections:
                target = target.setdefault(section, {})
            target[option] = _value(value)
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
    """A vLLM engine (`vllm.LLM`) with the run's backend. Leaving the context shuts it down, so that another can follow.

    Raises RuntimeError with the message of the cause if the engine's own process fails, at its start or later.
    """
    from vllm import LLM, envs

    causes: list[str] = []
    llm = None
    try:
        with _child_errors(causes) if envs.VLLM_ENABLE_V1_MULTIPROCESSING else nullcontext():
            try:
                llm = LLM(model, **run.arguments, **arguments)
                yield llm
            finally:
                if llm is not None:
                    llm.llm_engine.engine_core.shutdown()
                del llm
                _release()
    except Exception as error:
        if _ELSEWHERE in str(error) and causes:
            raise RuntimeError(causes[-1]) from error
        raise


_ELSEWHERE = "root cause"
"""What vLLM's exceptions say when the engine's process has failed and written the reason to stderr."""


@contextmanager
def _child_errors(found: list[str]) -> Iterator[None]:
    """Add to `found`, on leaving, the messages of exceptions that this process and its children wrote to stderr meanwhile."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.NamedTemporaryFile() as copy:
        # A process and not a thread, because engines are forked. It ignores interrupts, or writing to stderr would fail.
        tee = subprocess.Popen(["tee", "-i", copy.name], stdin=subprocess.PIPE, stdout=stderr)
        assert tee.stdin is not None
        os.dup2(tee.stdin.fileno(), 2)
        tee.stdin.close()
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            with suppress(subprocess.TimeoutExpired):
                tee.wait(10)  # until the last child has ended
            text = Path(copy.name).read_text(encoding="utf-8", errors="replace")
            found += error_messages(text)


def error_messages(stderr: str) -> list[str]:
    """The messages of the exceptions whose tracebacks are in the output of processes, without those that refer to another."""
    messages = re.findall(r"^(?:\(.*?\) )?(?:\w+\.)*\w+(?:Error|Exception): (.+)", stderr, re.MULTILINE)
    return [message for message in messages if _ELSEWHERE not in message]


def _release() -> None:
    """Free what an engine has left in this process."""
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


@dataclass(frozen=True)
class Failure:
    """A run that could not start or was cut short. reason: one line."""

    run: Run
    reason: str

    def result(self) -> dict[str, str]:
        """What a report holds in place of the run's figures."""
        return {"run": self.run.name, "error": self.reason}


def check_runs(runs: Sequence[Run], model: str, **arguments: Any) -> dict[str, Failure]:
    """Check runs before the first of them starts. Returns those whose backend refuses this model or these arguments whatever
    the run's own options are, by name: they fail, and others can be made.

    Raises ValueError, in one line, if the options of a run are what is refused, or if every run fails.
    """
    refused: dict[str, Failure] = {}
    for run in runs:
        try:
            run.check(model, **arguments)
        except ValueError as error:
            if _is_accepted(Run(run.backend, run.backend), model, arguments) or len(refused) + 1 == len(runs):
                raise
            refused[run.name] = Failure(run, str(error).removeprefix(f"{run.name}: "))
    return refused


def _is_accepted(run: Run, model: str, arguments: Mapping[str, Any]) -> bool:
    try:
        run.check(model, **arguments)
    except ValueError:
        return False
    return True


def attempts(
    runs: Sequence[Run], refused: Mapping[str, Failure], measure: Callable[[Run], T]
) -> Iterator[tuple[Run, T | Failure]]:
    """Make one run after the other, and tell progress on stderr. Yields each run with its result, or with its failure, which
    does not keep the others from being made. refused: from `check_runs`."""
    for number, run in enumerate(runs, start=1):
        print(f"[{number}/{len(runs)}] {run.name}", file=sys.stderr, flush=True)
        yield run, refused[run.name] if run.name in refused else _attempt(run, measure)


def _attempt(run: Run, measure: Callable[[Run], T]) -> T | Failure:
    try:
        return measure(run)
    except Exception as error:  # whatever a backend raises is the result of its run
        kind = "" if isinstance(error, (ValueError, OSError, RuntimeError)) else f"{type(error).__name__}: "
        failure = Failure(run, kind + one_line(error))
    _release()  # again, without the exception, whose traceback kept the engine
    return failure


def check_failures(results: Sequence[Mapping[str, Any]]) -> None:
    """Raises RuntimeError, which names the runs, if any of these results is that of a failure."""
    if failed := [result["run"] for result in results if "error" in result]:
        raise RuntimeError(f"{len(failed)} of {len(results)} runs failed: {' '.join(failed)}")


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
