# SPDX-License-Identifier: Apache-2.0
"""A Prometheus for the tests, with the configurations of deploy/prometheus."""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prometheus import Prometheus
from server import HOST, ROOT, free_port

CONFIG = ROOT / "deploy" / "prometheus"


def program(name: str) -> str:
    """The path of a program that deploy/prometheus/install.sh has put into the environment, or that is in PATH."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{Path(sys.prefix) / 'bin'}") or shutil.which(name)
    assert found, f"no {name} in PATH: run deploy/setup.sh --dev"
    return found


@contextmanager
def run_prometheus(name: str, replaced: dict[str, str], targets: int, folder: Path) -> Iterator[Prometheus]:
    """A Prometheus that runs CONFIG/name with the texts `replaced`, and scrapes every second. Waits until `targets` targets are
    up."""
    port = free_port()
    text = (CONFIG / name).read_text()
    for old, new in {
        **replaced,
        "rules.yml": str(CONFIG / "rules.yml"),
        "scrape_interval: 15s": "scrape_interval: 1s",
        "evaluation_interval: 15s": "evaluation_interval: 1s",
    }.items():
        assert old in text
        text = text.replace(old, new)
    config = folder / "prometheus.yml"
    config.write_text(text)
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [
                program("prometheus"), f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={HOST}:{port}",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            prometheus, deadline = Prometheus(f"http://{HOST}:{port}"), time.monotonic() + 300
            while True:
                try:
                    if len(prometheus.query("up == 1", time.time())) == targets:
                        break
                except OSError:
                    pass
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.2)
            yield prometheus
        finally:
            process.terminate()
            process.wait(timeout=120)
