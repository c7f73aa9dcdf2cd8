# SPDX-License-Identifier: Apache-2.0
"""Prometheus and Grafana: the files of deploy/, and what a real Prometheus shows of a server under load."""

import math
import re
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import dashboard
import pytest
from monitoring import CONFIG, program, run_prometheus
from prometheus import DASHBOARD, Prometheus, panels
from server import HOST, READ_WHOLE, Server

CLIENTS, WARM_SECONDS, SECONDS, SCRAPE_SECONDS = 4, 3, 20, 3
LINE = "value = compute(value)\n"
LINE_TOKENS = 8


def promtool(*arguments: str | Path) -> None:
    run = subprocess.run([program("promtool"), *map(str, arguments)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_rules() -> None:
    promtool("test", "rules", CONFIG / "rules_test.yml")


@pytest.mark.parametrize("name", ["static", "ray", "kubernetes"])
def test_scrape_configurations(name: str, tmp_path: Path) -> None:
    """Debian's Prometheus has no Kubernetes support, so kubernetes.yml is checked without the two lines of its discovery."""
    text = (CONFIG / f"{name}.yml").read_text()
    text, replaced = re.subn(r"kubernetes_sd_configs:\n +- role: pod\n", "static_configs: []\n", text)
    assert replaced == (name == "kubernetes")
    (tmp_path / "prometheus.yml").write_text(text.replace("rules.yml", str(CONFIG / "rules.yml")))
    promtool("check", "config", tmp_path / "prometheus.yml")


def test_the_dashboard_is_what_its_source_makes() -> None:
    again = "python deploy/grafana/dashboard.py > deploy/grafana/dashboard.json"
    assert DASHBOARD.read_text(encoding="utf-8") == dashboard.to_json(), again


@pytest.fixture(scope="module")
def prometheus(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus with the configuration for static hosts."""
    replaced = {"127.0.0.1:8000": f"{HOST}:{server.port}"}
    with run_prometheus("static.yml", replaced, targets=1, folder=tmp_path_factory.mktemp("prometheus")) as prometheus:
        yield prometheus


@dataclass(frozen=True)
class Load:
    """What clients counted from `began` to `finished`: tokens that attention had to be computed for, and output tokens. `ended`
    is when the last request was sent, up to which the rates are those of a server under load."""

    began: float
    ended: float
    finished: float
    attended: int
    generated: int


@pytest.fixture(scope="module")
def load(server: Server, prometheus: Prometheus) -> Load:
    """Each client sends one request after another, and counts its tokens. Contexts of the first client are so long that memory
    reads a part of them."""
    time.sleep(SCRAPE_SECONDS)  # for Prometheus to scrape the end of what came before
    began = time.time()
    ended = began + WARM_SECONDS + SECONDS
    usage = {"include_usage": True}

    def ask(client: int) -> tuple[int, int]:
        attended = generated = 0
        while (now := time.time()) < ended:
            # No two prompts begin alike, so the prefix cache saves nothing.
            prompt = f"# {client} {now}\n" + LINE * (8 if client else READ_WHOLE // LINE_TOKENS + 16)
            *_, last = server.stream("/v1/completions", prompt=prompt, max_tokens=24, ignore_eos=True, stream_options=usage)
            attended += last["usage"]["total_tokens"] - 1  # nothing attends from the last token
            generated += last["usage"]["completion_tokens"]
        return attended, generated

    with ThreadPoolExecutor(CLIENTS) as pool:
        attended, generated = (sum(tokens) for tokens in zip(*pool.map(ask, range(CLIENTS)), strict=True))
    time.sleep(SCRAPE_SECONDS)
    return Load(began, ended, time.time(), attended, generated)


@pytest.mark.engine
def test_tokens_are_those_that_clients_counted(prometheus: Prometheus, load: Load) -> None:
    """Prints both (pytest -s)."""

    def counted(name: str) -> float:
        before, after = (prometheus.query(f"sum({name})", at) for at in (load.began, load.finished))
        return after[0][1] - (before[0][1] if before else 0)

    attended, generated = counted("sage_attended_tokens_total"), counted("vllm:generation_tokens_total")
    print(f"attended {attended}, clients {load.attended}; generated {generated}, clients {load.generated}")
    assert attended == pytest.approx(load.attended, rel=0.01)
    assert generated == load.generated > 0


@pytest.mark.engine
def test_every_panel_has_data(prometheus: Prometheus, load: Load) -> None:
    empty = []
    for panel in panels(rate_interval=f"{SECONDS}s"):
        for query in panel.queries:
            values = [value for _, value in prometheus.query(query.expression, load.ended)]
            if not values or any(map(math.isnan, values)):
                empty.append((panel.title, query.expression, values))
    assert not empty


@pytest.mark.engine
def test_every_recording_rule_has_data_and_no_alert_fires(prometheus: Prometheus, load: Load) -> None:
    for rule in re.findall(r"- record: (\S+)", (CONFIG / "rules.yml").read_text()):
        values = [value for _, value in prometheus.query(rule, load.ended)]
        assert values, rule
        assert not any(map(math.isnan, values)), rule
    assert not prometheus.query("ALERTS", load.ended)
