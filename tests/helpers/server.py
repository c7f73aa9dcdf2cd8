# SPDX-License-Identifier: Apache-2.0
"""A server for the tests, started as a user does it: `deploy/serve.sh` with the embedded model."""

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engines import inspect_embedded_model

ROOT = Path(__file__).resolve().parents[2]
HOST = "127.0.0.1"
API_KEY = "a key for the tests"
OPTIONS = {"canary": 1, "memory": {"local_tokens": 512, "topk_pages": 4, "query_block": 128, "max_topk_pages": 8}}
"""Options with metrics, so that all panels have data. Contexts of over READ_WHOLE tokens are read in part."""
READ_WHOLE = 512 + 128 + 4 * 128
START_SECONDS, REQUEST_SECONDS, STOP_SECONDS = 1500, 600, 120


class Server:
    """A running server, which keeps temporary files in `temporary`."""

    def __init__(self, process: subprocess.Popen[str], port: int, temporary: Path) -> None:
        self.process, self.port, self.temporary = process, port, temporary

    def get(self, path: str) -> int:
        """The status of the response."""
        return self.ask("GET", path).status

    def read(self, path: str) -> str:
        response = self.ask("GET", path)
        assert response.status == 200
        return response.read().decode()

    def post(self, path: str, **body: Any) -> Any:
        """The answer to a request."""
        return json.load(self._post(path, **body))

    def stream(self, path: str, **body: Any) -> Iterator[Any]:
        """The pieces of an answer, as they arrive."""
        for line in self._post(path, stream=True, **body):
            event = line.decode().strip().removeprefix("data: ")
            if event == "[DONE]":
                return
            if event:
                yield json.loads(event)
        raise AssertionError("the stream was cut short")

    def complete(self, prompt: str, max_tokens: int = 5) -> str:
        return self.post("/v1/completions", prompt=prompt, max_tokens=max_tokens)["choices"][0]["text"]

    def _post(self, path: str, **body: Any) -> http.client.HTTPResponse:
        body = {"model": "sage-demo", "temperature": 0, **body}
        response = self.ask("POST", path, REQUEST_SECONDS, json.dumps(body))
        assert response.status == 200, response.read().decode()
        return response

    def ask(
        self, method: str, path: str, timeout: float = 60, body: str | None = None, key: str | None = API_KEY
    ) -> http.client.HTTPResponse:
        """The answer to a request with this API key, or without one."""
        headers = {"Content-Type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
        connection = http.client.HTTPConnection(HOST, self.port, timeout=timeout)
        connection.request(method, path, body, headers)
        return connection.getresponse()


def _heed_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


@contextmanager
def serve(temporary: Path) -> Iterator[Server]:
    port = free_port()
    environment = {**os.environ, "SAGE_VENV": sys.prefix, "PORT": str(port), "TMPDIR": str(temporary), "VLLM_API_KEY": API_KEY}
    environment["VLLM_CACHE_ROOT"] = str(temporary / "cache")
    shutil.copytree(inspected := inspect_embedded_model(), temporary / "cache" / inspected.name)
    for name in ("TRITON_INTERPRET", "MODEL"):
        environment.pop(name, None)
    environment["ARGS"] = f"--additional-config {json.dumps({'sage': OPTIONS}, separators=(',', ':'))}"
    process = subprocess.Popen(
        [ROOT / "deploy" / "serve.sh"],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # As on a terminal. In the background, tests run with SIGINT ignored, and bash would inherit that.
        preexec_fn=_heed_interrupts,
    )
    server = Server(process, port, temporary)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                if server.get("/health") == 200:
                    break
            except OSError:
                pass
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "the server did not start in time"
            time.sleep(1)
        yield server
    finally:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=STOP_SECONDS)
