"""The server, started and stopped as a user does it: `deploy/serve.sh` with the embedded model."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest

from sage_backend.demo import HELDOUT, MODEL_DIR
from sage_backend.demo.passkey import make_passkey

pytestmark = pytest.mark.engine

ROOT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
START_SECONDS, REQUEST_SECONDS, STOP_SECONDS = 300, 60, 30


def _heed_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Server:
    """A running server. `post` returns the answer to a request, or the list of its pieces if it is streamed."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process, self.port = process, port

    def get(self, path: str) -> int:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=5)
        connection.request("GET", path)
        return connection.getresponse().status

    def post(self, path: str, **body: Any) -> Any:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=REQUEST_SECONDS)
        body = {"model": "sage-demo", "temperature": 0, **body}
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read().decode()
        assert response.status == 200, text
        if not body.get("stream"):
            return json.loads(text)
        events = [line.removeprefix("data: ") for line in text.splitlines() if line]
        assert events.pop() == "[DONE]"
        return [json.loads(event) for event in events]

    def complete(self, prompt: str, max_tokens: int = 5) -> str:
        return self.post("/v1/completions", prompt=prompt, max_tokens=max_tokens)["choices"][0]["text"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    port = _free_port()
    environment = {**os.environ, "SAGE_VENV": sys.prefix, "PORT": str(port)}
    for name in ("TRITON_INTERPRET", "MODEL", "ARGS"):
        environment.pop(name, None)
    process = subprocess.Popen(
        [ROOT / "deploy" / "serve.sh"],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # As on a terminal: where the tests run in the background, SIGINT is ignored, and bash keeps it so.
        preexec_fn=_heed_interrupts,
    )
    server = Server(process, port)
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


@pytest.fixture(scope="module")
def passkeys() -> list[tuple[str, str]]:
    """Prompts of up to 1500 tokens with their answers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    rng = Random(0)
    return [make_passkey(length, depth, rng, tokenizer) for length, depth in ((1500, 0.1), (1500, 0.6), (700, 0.5), (200, 0.9))]


def test_completion(server: Server) -> None:
    answer = server.post("/v1/completions", prompt=HELDOUT.read_text(encoding="utf-8")[:1000], max_tokens=16)
    assert answer["choices"][0]["text"]
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["model"] == "sage-demo"


def test_passkey(server: Server, passkeys: list[tuple[str, str]]) -> None:
    prompt, answer = passkeys[0]
    assert server.complete(prompt) == answer


def test_chat(server: Server, passkeys: list[tuple[str, str]]) -> None:
    prompt, answer = passkeys[2]
    reply = server.post("/v1/chat/completions", messages=[{"role": "user", "content": prompt}], max_tokens=5)
    assert reply["choices"][0]["message"]["content"] == answer


def test_streaming(server: Server) -> None:
    prompt = "def fibonacci(n):"
    pieces = server.post("/v1/completions", prompt=prompt, max_tokens=16, stream=True)
    assert len(pieces) > 1
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == server.complete(prompt, 16)


def test_concurrent_requests(server: Server, passkeys: list[tuple[str, str]]) -> None:
    prompts, answers = zip(*passkeys * 3, strict=True)
    with ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(server.complete, prompts)) == list(answers)


def test_ctrl_c_stops_everything(server: Server) -> None:
    """Last, because the server is gone then."""
    processes = psutil.Process(server.process.pid).children(recursive=True)
    assert len(processes) > 1
    server.process.send_signal(signal.SIGINT)
    output, _ = server.process.communicate(timeout=STOP_SECONDS)
    assert server.process.returncode == 0
    assert "[sage] stopping the server" in output
    assert "Traceback" not in output
    _, alive = psutil.wait_procs(processes, timeout=STOP_SECONDS)
    assert not alive
    with pytest.raises(OSError, match="refused"):
        server.get("/health")
