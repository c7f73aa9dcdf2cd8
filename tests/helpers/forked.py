# SPDX-License-Identifier: Apache-2.0
"""Processes forked from one that has imported vLLM, which takes ten seconds; no engine was ever started there.

As in a process of its own, nothing of the tests' has been imported, and the environment is that of the moment of its start. But
variables that are read when vLLM or OpenMP is imported have the values of `engines.ENVIRONMENT` and of this process's start.
"""

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

PRELOADED = (
    "uncompiled", "vllm.entrypoints.llm", "vllm.entrypoints.cli.main", "vllm.entrypoints.cli.serve",
    "vllm.v1.worker.cpu_worker", "vllm.v1.executor.multiproc_executor",
)  # fmt: skip
SECONDS = 1200


class _Process(ForkServerProcess):
    """Takes the environment along, which processes of a fork server otherwise have from that. It runs within `around`."""

    around: Callable[[], AbstractContextManager[Any]] = nullcontext

    def run(self) -> None:
        os.environ.clear()
        os.environ.update(self.environment)
        with self.around():
            super().run()

    def start(self) -> None:
        self.environment = dict(os.environ)
        super().start()


class _Context(ForkServerContext):
    around: Callable[[], AbstractContextManager[Any]] = nullcontext

    def Process(self, *arguments: Any, **named: Any) -> _Process:
        process = _Process(*arguments, **named)
        process.around = self.around
        return process


def context(
    environment: Mapping[str, str], around: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> ForkServerContext:
    """What vLLM's executor starts workers with, instead of multiprocessing.get_context("spawn"). environment: what differs from
    that of this process where vLLM is imported, once for all processes. around: gives a context within which a process runs."""
    found = _Context()
    found.around = around
    found.set_forkserver_preload(list(PRELOADED))
    with mock.patch.dict(os.environ, {**environment, "PYTHONPATH": str(Path(__file__).parent)}):
        os.environ.pop("TRITON_INTERPRET", None)
        forkserver.ensure_running()
    return found


def python(code: str, environment: Mapping[str, str], output: Path) -> tuple[int, str]:
    """Run `code` as `python -c` does. Returns the exit status and what it wrote to stderr. output: a file for that."""
    return _run(_execute, code, environment, output)


def vllm(*arguments: str | Path, environment: Mapping[str, str], output: Path) -> tuple[int, str]:
    """The same for the command `vllm` with these arguments."""
    return _run(_command, ["vllm", *map(str, arguments)], environment, output)


def _run(call: Callable[[Any], None], what: Any, environment: Mapping[str, str], output: Path) -> tuple[int, str]:
    started = context(environment)
    with mock.patch.dict(os.environ, environment):
        os.environ.pop("TRITON_INTERPRET", None)
        process = started.Process(target=_redirected, args=(call, what, output))
        process.start()
    process.join(SECONDS)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"it still ran after {SECONDS} s: {output.read_text()}")
    return process.exitcode, output.read_text()


def _redirected(call: Callable[[Any], None], what: Any, output: Path) -> None:
    with output.open("w") as file, open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(file.fileno(), 2)
    call(what)


def _execute(code: str) -> None:
    exec(code, {"__name__": "__main__"})


def _command(arguments: list[str]) -> None:
    from vllm.entrypoints.cli.main import main

    sys.argv = arguments
    main()
