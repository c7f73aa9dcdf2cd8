# SPDX-License-Identifier: Apache-2.0
"""A short run of benchmarks/soak.py, and whether each of its checks can fail."""

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from server import API_KEY, HOST, Server

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "soak.py"
SECONDS = 15


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_soak", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.engine
def test_soak(soak: ModuleType, server: Server, tmp_path: Path) -> None:
    """64 clients at once. Every kind of request must have been sent, otherwise the run says nothing about it."""
    out = tmp_path / "soak.json"
    command = ["--url", f"http://{HOST}:{server.port}", "--key", API_KEY, "--seconds", str(SECONDS), "--out", str(out)]
    assert soak.main(command) == 0, out.read_text()
    assert set(soak.KINDS) < set(json.loads(out.read_text())["seen"])
    assert API_KEY not in out.read_text()


@pytest.mark.engine
def test_without_the_key_nobody_gets_in(server: Server) -> None:
    for path in ("/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/nowhere"):
        for key in (None, "", "another", API_KEY[:-1], API_KEY + "x"):
            for method in ("GET", "POST"):
                assert server.ask(method, path, key=key).status == 401, (method, path, key)
    assert server.ask("GET", "/v1/models").status == 200


ENDS = {"stream": 2, "hang up": 1, "no JSON": 1, "no key": 1}
SEEN = Counter({**ENDS, "accepted": 3, "prompt tokens": 100, "completion tokens": 96})
GROWN = {
    "2xx": 3, "4xx": 1, "vllm:request_success_total": 3, "vllm:generation_tokens_total": 100, "vllm:num_preemptions_total": 0,
    "sage_attended_tokens_total": 200,
}  # fmt: skip
AFTER = {
    "vllm:num_requests_running": 0, "vllm:num_requests_waiting": 0, "sage_kv_pages_in_use": 0, "vllm:kv_cache_usage_perc": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("verdict", "seen", "grown", "after", "health"),
    [
        (None, {}, {}, {}, 200),
        ("every request ended as it should", {"stream: cut short after 3 pieces": 1}, {}, {}, 200),
        ("healthy", {}, {}, {}, 503),
        ("idle", {}, {}, {"vllm:num_requests_waiting": 1}, 200),
        ("all pages returned", {}, {}, {"sage_kv_pages_in_use": 1}, 200),
        ("HTTP counts the accepted", {}, {"2xx": 2}, {}, 200),
        ("HTTP counts the refused", {}, {"4xx": 0}, {}, 200),
        ("no errors of the server", {}, {"5xx": 1}, {}, 200),
        ("requests add up", {}, {"vllm:request_success_total": 4}, {}, 200),
        ("output tokens add up", {}, {"vllm:generation_tokens_total": 95}, {}, 200),
        ("attended tokens add up", {}, {"sage_attended_tokens_total": 193}, {}, 200),
    ],
)
def test_verdicts(soak: ModuleType, verdict: str | None, seen: dict, grown: dict, after: dict, health: int) -> None:
    verdicts = soak.judge(SEEN + Counter(seen), GROWN | grown, AFTER | after, health)
    assert [name for name, holds in verdicts.items() if not holds] == ([verdict] if verdict else [])
