# SPDX-License-Identifier: Apache-2.0
"""Real servers with random weights, in a process group of their own, which ends with the benchmark."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Server:
    """A server that is ready. base: its address; seconds: how long it took to get ready; log: its output."""

    base: str
    seconds: float
    log: Path


@contextmanager
def serving(
    folder: Path, arguments: Sequence[str], limit: float, log_name: str = "log", more: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """`vllm serve` for the model in `folder`, with random weights, under the name m; ended on leaving. Its output goes into a
    file of the folder. more: environment variables.

    Raises RuntimeError with the end of its log if it is not ready within `limit` seconds.
    """
    port, log = free_port(), folder / log_name
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "WARNING", **(more or {})}  # for `compiled_late`
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder), "--served-model-name", "m"]
    command += ["--load-format", "dummy", "--host", "127.0.0.1", "--port", str(port), *arguments]
    begun = time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True, env=environment)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or the server would outlive a benchmark that is ended
    try:
        base = f"http://127.0.0.1:{port}"
        while not _is_healthy(base):
            if process.poll() is not None or time.monotonic() - begun > limit:
                state = "is not ready" if process.poll() is None else f"ended with exit code {process.returncode}"
                raise RuntimeError(f"the server {state} after {time.monotonic() - begun:.0f} s\n{log.read_text()[-3000:]}")
            time.sleep(0.2)
        yield Server(base, time.monotonic() - begun, log)
    finally:
        signal.signal(signal.SIGTERM, before)
        with suppress(ProcessLookupError):  # the server may have ended, and left its engine
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def compiled_late(log: str) -> list[str]:
    """The kernels that requests had to wait for, by a server's log: vLLM's monitor of compilation reports them, but for
    --enforce-eager."""
    return re.findall(r"compilation during inference: (\w+)", log)


def metric_sums(text: str) -> dict[str, float]:
    """The metrics of a page in Prometheus' format, each summed over its labels."""
    sums: dict[str, float] = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name = line.split("{")[0].split(" ")[0]
            sums[name] = sums.get(name, 0.0) + float(line.rsplit(" ", 1)[1])
    return sums


def counters(base: str) -> dict[str, float]:
    """`metric_sums` of a server at this address."""
    with urllib.request.urlopen(f"{base}/metrics", timeout=30) as response:
        return metric_sums(response.read().decode())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_healthy(base: str) -> bool:
    try:
        with urllib.request.urlopen(f"{base}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
