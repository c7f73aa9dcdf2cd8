# SPDX-License-Identifier: Apache-2.0
"""Ray Serve: all configurations of deploy/ray are checked, and one is run, on a cluster of two nodes on this machine."""

import http.client
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import torch
from engines import EXACT, inspect_embedded_model
from monitoring import run_prometheus
from server import HOST, ROOT, Server, free_port

FOLDER = ROOT / "deploy" / "ray"
GPUS = {"cpu": 0, "one-gpu": 1, "replicas": 1, "tensor-parallel": 4, "pipeline-parallel": 8}
"""GPUs of one replica of each configuration."""
START_SECONDS, CLIENTS, REQUEST_SECONDS = 1500, 6, 600
HEALTH_SECONDS, SHARE_SECONDS = 70, 20
"""How long a replica may be suspended: Ray replaces one that misses its health checks for 90 s. And how long to wait for an
answer of the other, before another moment is tried."""
ON_GPU = torch.cuda.is_available()
REPLICA = "ray::ServeReplica:sage:LLMServer"
"""How Ray names the processes of replicas."""

pytestmark = [pytest.mark.engine, pytest.mark.timeout(3600)]


CONFIGURATIONS = """
import json, sys
from pathlib import Path
import yaml
from ray.llm._internal.serve.core.ingress.builder import LLMServingArgs
from ray.serve.schema import ServeDeploySchema
from vllm.engine.arg_utils import AsyncEngineArgs

gpus = {}
for file in Path(sys.argv[1]).glob("*.yaml"):
    [application] = ServeDeploySchema.model_validate(yaml.safe_load(file.read_text())).applications
    [llm] = LLMServingArgs.model_validate(application.args).llm_configs
    assert AsyncEngineArgs(model=sys.argv[1], **llm.engine_kwargs).attention_backend == "SAGE"
    gpus[file.stem] = sum(bundle.get("GPU", 0) for bundle in llm.get_engine_config().placement_bundles)
print(json.dumps(gpus))
"""


def test_configurations() -> None:
    """Ray and vLLM know every option, and replicas take the intended numbers of GPUs.

    This runs in a process of its own: when it is imported, Ray sets up logging for the whole process.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", CONFIGURATIONS, FOLDER]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == GPUS


@dataclass(frozen=True)
class Cluster:
    """server: the OpenAI endpoint, in front of two replicas. metrics: the port of each node's metrics."""

    server: Server
    metrics: tuple[int, ...]


@pytest.fixture(scope="module")
def temporary() -> Iterator[Path]:
    """A folder with a short name: Ray makes sockets deep inside it, and their paths may have at most 107 characters."""
    with tempfile.TemporaryDirectory(prefix="sage-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def cluster(temporary: Path) -> Iterator[Cluster]:
    """Two replicas, a node each."""
    with run_cluster(temporary, {}, nodes=2, replicas=2) as running:
        yield running


@contextmanager
def run_cluster(temporary: Path, replaced: dict[str, str], nodes: int, replicas: int) -> Iterator[Cluster]:
    """`serve run deploy/ray/cpu.yaml` with another port, a canary and the texts `replaced`, on one or two nodes that share two
    CPUs and, on a GPU host, two GPUs. Two nodes also run on one GPU, which each of them takes for its own."""
    devices = torch.cuda.device_count()
    if ON_GPU and devices < 2 and nodes == 1:
        pytest.skip("needs two GPUs")
    inspect_embedded_model()
    port, metrics = free_port(), (free_port(), free_port())
    text = (FOLDER / "cpu.yaml").read_text()
    eager = "enforce_eager: true"
    more = [eager.replace("true", "false") if ON_GPU else eager, "additional_config: {sage: {canary: 1}}"]
    more.append(f"dtype: {EXACT}")  # many CPUs have no instructions for BF16
    more += ["gpu_memory_utilization: 0.4"] if devices == 1 else []
    first = {"port: 8000": f"port: {port}", eager: f"\n{' ' * 12}".join(more)}
    for old, new in {**first, **replaced}.items():
        assert old in text
        text = text.replace(old, new)
    text = text.replace("{CPU: 1}", "{CPU: 1, GPU: 1}") if ON_GPU else text
    (temporary / "cpu.yaml").write_text(text)
    settings = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_metrics_report_interval_ms": "1000",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TMPDIR": str(temporary),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # each replica would take all cores for itself
        "OMP_NUM_THREADS": "1",
    }
    with mock.patch.dict(os.environ, settings):
        os.environ.pop("TRITON_INTERPRET", None)
        # Ray sets up logging where it is imported: only in tests that start a cluster.
        from ray.cluster_utils import Cluster as Nodes

        ray_nodes, share = Nodes(), 2 // nodes
        shared: dict[str, Any] = {"num_cpus": share, "object_store_memory": 100 << 20, "include_log_monitor": False}
        try:
            for node in range(nodes):
                # A node takes the GPUs that it sees.
                gpus = ",".join(str((share * node + i) % max(devices, 1)) for i in range(share))
                head: dict[str, Any] = {} if node else {"include_dashboard": False, "no_monitor": True}
                with mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": gpus} if ON_GPU else {}):
                    ray_nodes.add_node(**shared, **head, num_gpus=share * ON_GPU, metrics_export_port=metrics[node])
            command = [Path(sys.executable).parent / "serve", "run", "--address", ray_nodes.address, temporary / "cpu.yaml"]
            with (temporary / "log").open("w") as log:
                process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, text=True)
            try:
                wait_for_replicas(process, ray_nodes.address, replicas, temporary / "log")
                yield Cluster(Server(process, port, temporary), metrics[:nodes])
            finally:
                process.terminate()
                process.wait(timeout=300)
        finally:
            ray_nodes.shutdown()


def wait_for_replicas(process: subprocess.Popen[str], address: str, number: int, log: Path) -> None:
    import ray
    from ray import serve
    from ray.serve import context

    ray.init(address, configure_logging=False, log_to_driver=False)
    deadline = time.monotonic() + START_SECONDS
    try:
        while True:
            if application := serve.status().applications.get("sage"):
                assert application.status != "DEPLOY_FAILED", (application.message, application.deployments)
                states = [deployment.replica_states.get("RUNNING") for deployment in application.deployments.values()]
                if sorted(states, key=str) == [1, number]:
                    return
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(1)
    finally:
        context._set_global_client(None)  # Serve keeps the one of this cluster otherwise, also for the next
        ray.shutdown()


@dataclass
class Request:
    """pieces: of the answer, as far as it has come."""

    began: float
    pieces: int = 0
    ended: float = math.inf
    failure: str = ""


class Clients:
    """They send requests, one after another each, until `stop`. `requests` are those of all, from when they are sent."""

    def __init__(self, server: Server) -> None:
        self.requests: list[Request] = []
        self._server, self._stopped = server, threading.Event()
        self._pool = ThreadPoolExecutor(CLIENTS)
        self._clients = [self._pool.submit(self._ask) for _ in range(CLIENTS)]

    def wait_for(self, requests: Callable[[], list[Request]], number: int) -> None:
        """Wait until there are so many `requests`."""
        deadline = time.monotonic() + REQUEST_SECONDS
        while len(requests()) < number:
            assert time.monotonic() < deadline, self.requests
            time.sleep(0.1)

    def in_flight(self) -> list[Request]:
        return [request for request in self.requests if request.ended == math.inf]

    def answered(self, since: float = 0.0) -> list[Request]:
        """Requests sent after `since` that have been answered without a failure."""
        done = [request for request in self.requests if request.ended < math.inf and not request.failure]
        return [request for request in done if request.began > since]

    def stop(self) -> None:
        """Wait for all answers. Errors of the clients themselves are raised here."""
        self._stopped.set()
        for client in self._clients:
            client.result()
        self._pool.shutdown()

    def _ask(self) -> None:
        while not self._stopped.is_set():
            request = Request(time.monotonic())
            self.requests.append(request)
            prompt = f"# {request.began}\ndef f("
            usage, tokens = None, 128
            try:
                body = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream_options": {"include_usage": True}}
                for piece in self._server.stream("/v1/completions", **body):
                    request.pieces += bool(piece.get("choices"))
                    usage = piece.get("usage")
                if usage is None or usage["completion_tokens"] != tokens:
                    request.failure = f"its usage is {usage}"
            except (AssertionError, ValueError, OSError, http.client.HTTPException) as error:
                request.failure = repr(error)
            request.ended = time.monotonic()


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs two GPUs")
def test_tensor_parallel(temporary: Path, passkeys: list[tuple[str, str]]) -> None:
    """One replica over the two GPUs of a node recalls keys, and its metrics are exported."""
    replaced = {"enforce_eager": f"tensor_parallel_size: 2\n{' ' * 12}enforce_eager", "[{CPU: 1}]": "[{CPU: 1}, {CPU: 1}]"}
    with run_cluster(temporary, replaced | {"num_replicas: 2": "num_replicas: 1"}, nodes=1, replicas=1) as running:
        for prompt, answer in passkeys:
            assert running.server.complete(prompt) == answer
        [port], deadline = running.metrics, time.monotonic() + 60
        while "sage_attended_tokens_total{" not in exported_by(port):
            assert time.monotonic() < deadline
            time.sleep(1)


def exported_by(port: int) -> str:
    """The metrics of a node."""
    with urllib.request.urlopen(f"http://{HOST}:{port}/metrics") as response:
        return response.read().decode()


def test_both_replicas_are_scraped(cluster: Cluster, tmp_path: Path) -> None:
    """Prometheus scrapes them with the configuration for Ray. Each node has a replica, and both have computed attention."""
    clients = Clients(cluster.server)
    clients.wait_for(clients.answered, 2 * CLIENTS)
    clients.stop()
    assert len(clients.answered()) == len(clients.requests), clients.requests
    targets = [f"{HOST}:{port}" for port in cluster.metrics]
    (tmp_path / "targets.json").write_text(json.dumps([{"labels": {"job": "ray"}, "targets": targets}]))  # as Ray does
    found = "/tmp/ray/prom_metrics_service_discovery.json"
    counters = (
        "sage_attended_tokens_total", "vllm:generation_tokens_total", "sage_kv_pages", "sage_kv_bytes_per_token",
        "sage_canary_relative_error_count", "sage_canary_relative_error_sum",
    )  # fmt: skip
    with run_prometheus("ray.yml", {found: str(tmp_path / "targets.json")}, 2, tmp_path) as prometheus:
        deadline = time.monotonic() + 600
        for name in counters:
            while set(instances := seen_at(prometheus, name)) != set(targets):
                assert time.monotonic() < deadline, (name, instances)
                time.sleep(0.5)


def seen_at(prometheus: Any, name: str) -> list[str]:
    return [labels["instance"] for labels, _ in prometheus.query(f'sum by (instance) ({name}{{job="sage"}}) > 0', time.time())]


def test_a_killed_replica_takes_only_its_requests_along(cluster: Cluster) -> None:
    """The other replica answers all requests that the killed one was not answering. Prints how many there were (pytest -s)."""
    replicas = [process for process in psutil.process_iter(["cmdline"]) if is_replica_of(process, cluster.server.temporary)]
    assert len(replicas) == 2
    clients = Clients(cluster.server)
    clients.wait_for(clients.answered, CLIENTS)
    held = suspend_with_requests(replicas[0], clients)
    killed = time.monotonic()
    replicas[0].kill()
    clients.wait_for(lambda: clients.answered(since=killed), 2 * CLIENTS)
    clients.stop()
    failed = [request for request in clients.requests if request.failure]
    print(f"{len(clients.requests)} requests, {len(held)} with the replica that was killed, {len(failed)} failed")
    assert all(request.failure for request in held)
    assert not [request for request in failed if not request.began < killed < request.ended], failed
    assert len(failed) < CLIENTS, "requests of the other replica failed, too"


def suspend_with_requests(replica: psutil.Process, clients: Clients) -> list[Request]:
    """Suspend a replica that answers some of the requests, and not all. Returns those, whose answers have begun and do not go
    on while the other replica gives its own. On a busy machine, Ray may prefer one replica for a while: then this one is
    resumed, and tried again later."""
    deadline = time.monotonic() + REQUEST_SECONDS
    while True:
        clients.wait_for(lambda: [request for request in clients.in_flight() if request.pieces], CLIENTS)
        replica.suspend()
        suspended = time.monotonic()
        begun = [request for request in clients.in_flight() if request.pieces]
        while (answered := len(clients.answered(since=suspended))) < 2 * CLIENTS:
            if time.monotonic() > suspended + (HEALTH_SECONDS if answered else SHARE_SECONDS):
                break
            time.sleep(0.1)
        held = [request for request in begun if request.ended == math.inf]
        if answered >= 2 * CLIENTS and 0 < len(held) < CLIENTS:
            return held
        replica.resume()
        assert time.monotonic() < deadline, clients.requests
        time.sleep(1)


def is_replica_of(process: psutil.Process, temporary: Path) -> bool:
    """Whether a process is a replica of the cluster that has this folder for temporary files."""
    name = " ".join(process.info["cmdline"] or ())
    return name.startswith(REPLICA) and process.environ().get("TMPDIR") == str(temporary)
