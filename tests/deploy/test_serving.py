# SPDX-License-Identifier: Apache-2.0
"""The server, started and stopped as a user does it: `deploy/serve.sh` with the embedded model."""

import json
import signal
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from server import API_KEY, STOP_SECONDS, Server

from sage_backend.demo import HELDOUT

pytestmark = pytest.mark.engine


def test_keys_are_calibrated(server: Server) -> None:
    """Also in an engine that is a process of its own."""
    server.complete("def")
    assert len(list((server.temporary / "cache" / "sage" / "calibrations").glob("*.safetensors"))) == 1


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
    pieces = list(server.stream("/v1/completions", prompt=prompt, max_tokens=16))
    assert len(pieces) > 1
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == server.complete(prompt, 16)


def test_concurrent_requests(server: Server, passkeys: list[tuple[str, str]]) -> None:
    prompts, answers = zip(*passkeys * 3, strict=True)
    with ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(server.complete, prompts)) == list(answers)


def test_requests_ask_for_pages(server: Server) -> None:
    """A number that is not to be had is refused, and the message says what is."""
    for asked, status in ((8, 200), (9, 400), ("all", 400)):
        body = {"model": "sage-demo", "prompt": "def", "max_tokens": 1, "vllm_xargs": {"sage_topk_pages": asked}}
        answer = server.ask("POST", "/v1/completions", body=json.dumps(body))
        assert answer.status == status
        assert status == 200 or f"sage_topk_pages is {asked!r}; this server has 1 to 8" in answer.read().decode()


@pytest.mark.stops_server
def test_ctrl_c_stops_everything(server: Server) -> None:
    """This test runs last, because it stops the server. The server's output does not contain the key."""
    assert list(server.temporary.glob("sage-metrics-*"))
    processes = psutil.Process(server.process.pid).children(recursive=True)
    assert len(processes) > 1
    server.process.send_signal(signal.SIGINT)
    output, _ = server.process.communicate(timeout=STOP_SECONDS)
    assert server.process.returncode == 0
    assert '/v1/completions -H "Authorization: Bearer $VLLM_API_KEY" ' in output
    assert API_KEY not in output
    assert "[sage] stopping the server" in output
    assert "Traceback" not in output
    _, alive = psutil.wait_procs(processes, timeout=STOP_SECONDS)
    assert not alive
    with pytest.raises(OSError, match="refused"):
        server.get("/health")
    assert not list(server.temporary.glob("sage-metrics-*"))
