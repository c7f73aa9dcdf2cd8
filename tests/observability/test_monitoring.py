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

CLIENTS, WARM_SECONDS, SECONDS = 4, 3, 20
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
    """What a client measured: tokens a second that attention had to be computed for, and output tokens a second."""

    ended: float
    attended: float
    generated: float


@pytest.fixture(scope="module")
def load(server: Server, prometheus: Prometheus) -> Load:
    """Each client sends one request after another, and counts the tokens that arrive in the last SECONDS. Contexts of the first
    client are so long that memory reads a part of them."""
    ended = time.time() + WARM_SECONDS + SECONDS
    usage = {"include_usage": True, "continuous_usage_stats": True}

    def ask(client: int) -> tuple[int, int]:
        attended = generated = 0
        while (now := time.time()) < ended:
            # No two prompts begin alike, so the prefix cache saves nothing.
            prompt, before = f"# {client} {now}\n" + LINE * (8 if client else READ_WHOLE // LINE_TOKENS + 16), (0, 0)
            for piece in server.stream("/v1/completions", prompt=prompt, max_tokens=24, ignore_eos=True, stream_options=usage):
                # The latest token has not been attended to yet.
                so_far = piece["usage"]["total_tokens"] - 1, piece["usage"]["completion_tokens"]
                if ended - SECONDS <= time.time() < ended:
                    attended += so_far[0] - before[0]
                    generated += so_far[1] - before[1]
                before = so_far
        return attended, generated

    with ThreadPoolExecutor(CLIENTS) as pool:
        attended, generated = (sum(tokens) / SECONDS for tokens in zip(*pool.map(ask, range(CLIENTS)), strict=True))
    time.sleep(2)  # for Prometheus to scrape the end of it
    return Load(ended, attended, generated)


@pytest.mark.engine
def test_throughput_is_what_the_client_measured(prometheus: Prometheus, load: Load) -> None:
    """Prints both (pytest -s)."""
    [(_, attended)] = prometheus.query(f"sum(rate(sage_attended_tokens_total[{SECONDS}s]))", load.ended)
    [(_, generated)] = prometheus.query(f"sum(rate(vllm:generation_tokens_total[{SECONDS}s]))", load.ended)
    print(f"attended {attended:.1f}/s, client {load.attended:.1f}; generated {generated:.1f}/s, client {load.generated:.1f}")
    assert attended == pytest.approx(load.attended, rel=0.1)
    assert generated == pytest.approx(load.generated, rel=0.1)


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
