# SPDX-License-Identifier: Apache-2.0
"""Kubernetes manifests against their schemas, and whether the files of deploy/ fit together.

There is no Docker and no cluster here, so no image is built and no manifest applied. kubernetes-validate has no schemas of
custom resources; tests check what these refer to.
"""

import re
import stat
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from server import ROOT

from sage_backend import DEFAULT_VLLM, __version__

DEPLOY = ROOT / "deploy"
KUBERNETES = "1.32"
IMAGE = f"sage-backend:{__version__}"
LABEL = "app.kubernetes.io/name"


def documents(path: str) -> list[Any]:
    return list(yaml.safe_load_all((DEPLOY / path).read_text()))


[CLAIM, SERVICE, DEPLOYMENT] = documents("kubernetes/server.yaml")
[RAY_SERVICE] = documents("kubernetes/rayservice.yaml")
COMPOSE = documents("docker/compose.yml")[0]
DOCKERFILE = (DEPLOY / "docker" / "Dockerfile").read_text()
USER = 2000


def pods() -> dict[str, Any]:
    """The pods of all manifests, as manifests of their own."""
    ray = RAY_SERVICE["spec"]["rayClusterConfig"]
    templates = {
        "server": DEPLOYMENT["spec"]["template"],
        "ray head": ray["headGroupSpec"]["template"],
        "ray worker": ray["workerGroupSpecs"][0]["template"],
    }
    head = {"apiVersion": "v1", "kind": "Pod"}
    return {
        name: {**head, "metadata": {"name": "pod", **template["metadata"]}, "spec": template["spec"]}
        for name, template in templates.items()
    }


@pytest.mark.parametrize("manifest", [CLAIM, SERVICE, DEPLOYMENT], ids=lambda manifest: manifest["kind"])
def test_manifests(manifest: Any) -> None:
    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@pytest.mark.parametrize("pod", pods().values(), ids=pods())
def test_pods(pod: Any) -> None:
    """They are valid, and have resources but no privileges."""
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    security = pod["spec"]["securityContext"]
    assert (security["runAsNonRoot"], security["runAsUser"], security["fsGroup"]) == (True, USER, USER)
    [container] = pod["spec"]["containers"]
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
    assert container["image"].removesuffix(f":{__version__}") in ("sage-backend", "sage-backend-ray")
    volumes = {volume["name"] for volume in pod["spec"].get("volumes", ())}
    assert volumes == {mount["name"] for mount in container.get("volumeMounts", ())}


def test_a_manifest_with_a_mistake_is_noticed() -> None:
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**SERVICE, "spec": {**SERVICE["spec"], "port": 80}}, KUBERNETES, strict=True)


def test_the_server_on_kubernetes() -> None:
    """Its claim, its key, its labels and its port are those that other files refer to."""
    pod = DEPLOYMENT["spec"]["template"]
    [container] = pod["spec"]["containers"]
    [port] = container["ports"]
    labels = pod["metadata"]["labels"]
    assert labels == DEPLOYMENT["spec"]["selector"]["matchLabels"] == SERVICE["spec"]["selector"]
    assert SERVICE["spec"]["ports"][0]["targetPort"] == port["name"]
    assert port["containerPort"] == int(container["args"][container["args"].index("--port") + 1])
    assert pod["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] == CLAIM["metadata"]["name"]
    [variable] = container["env"]
    secret = variable["valueFrom"]["secretKeyRef"]
    assert variable["name"] == "VLLM_API_KEY"
    command = f"kubectl create secret generic {secret['name']} --from-literal={secret['key']}="
    assert command in (DEPLOY / "kubernetes" / "server.yaml").read_text()
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": port["name"]}
    scraped = (DEPLOY / "prometheus" / "kubernetes.yml").read_text()
    assert f"regex: {labels[LABEL]};{port['name']}" in scraped


def test_pod_monitors() -> None:
    """Each finds its pods and their port. The one for Ray renames metrics as Prometheus's own configuration does."""
    for monitor in documents("kubernetes/podmonitor.yaml"):
        label = monitor["spec"]["selector"]["matchLabels"][LABEL]
        [endpoint] = monitor["spec"]["podMetricsEndpoints"]
        found = [pod["spec"]["containers"][0] for pod in pods().values() if pod["metadata"]["labels"][LABEL] == label]
        assert found
        assert all(endpoint["port"] in {port["name"] for port in container["ports"]} for container in found)
        if renamed := endpoint.get("metricRelabelings"):
            [job] = documents("prometheus/ray.yml")[0]["scrape_configs"]
            snake_case = [{re.sub("(?=[A-Z])", "_", key).lower(): rule[key] for key in rule} for rule in renamed]
            assert snake_case == job["metric_relabel_configs"]


def test_ray_service() -> None:
    assert yaml.safe_load(RAY_SERVICE["spec"]["serveConfigV2"]) == documents("ray/replicas.yaml")[0]
    version = RAY_SERVICE["spec"]["rayClusterConfig"]["rayVersion"]
    assert f"ray=={version}" in (ROOT / "requirements" / "ray.txt").read_text().splitlines()


def test_dockerfile() -> None:
    """It is pinned to the vLLM that deploy/setup.sh installs, and every image runs as a user without privileges."""
    assert f"VLLM_CUDA='vllm=={DEFAULT_VLLM}'" in (ROOT / "deploy" / "setup.sh").read_text()
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]
    assert [stage.splitlines()[0] for stage in stages] == [f"vllm/vllm-openai:v{DEFAULT_VLLM} AS server", "server AS ray"]
    assert all(re.findall(r"^USER (.+)$", stage, re.MULTILINE)[-1] == f"{USER}:{USER}" for stage in stages)
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {source for line in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE) for source in line.split()}
    assert copied == allowed
    assert all((ROOT / source).exists() for source in copied)


def test_compose_file() -> None:
    """Images are pinned, files exist, services listen on loopback only, and no password is in the file."""
    services = COMPOSE["services"]
    assert services["vllm"]["image"] == IMAGE
    assert all(re.search(r":v?\d+\.\d+\.\d+$", service["image"]) for service in services.values())
    assert all(service["network_mode"] == "host" for service in services.values())
    vllm = services["vllm"]["command"]
    assert vllm[vllm.index("--host") + 1] == "127.0.0.1"
    assert "--web.listen-address=127.0.0.1:9090" in services["prometheus"]["command"]
    assert services["grafana"]["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    for name, variable in (("vllm", "VLLM_API_KEY"), ("grafana", "GF_SECURITY_ADMIN_PASSWORD")):
        assert re.fullmatch(r"\$\{\w+:\?.+\}", services[name]["environment"][variable])  # it refuses to start without
    mounted = [volume for service in services.values() for volume in service["volumes"] if volume.startswith(".")]
    assert mounted
    assert all((DEPLOY / "docker" / volume.partition(":")[0]).is_dir() for volume in mounted)


def test_secrets(tmp_path: Path) -> None:
    """They are those that the compose file needs, differ each time, are readable by the owner only, and are never replaced."""
    asked = set(re.findall(r"\$\{(\w+):", (DEPLOY / "docker" / "compose.yml").read_text()))
    made = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "secrets.sh").write_text((DEPLOY / "docker" / "secrets.sh").read_text())
        for _ in range(2):
            subprocess.run(["bash", folder / "secrets.sh"], check=True, capture_output=True)
            made.append((folder / ".env").read_text())
        assert stat.S_IMODE((folder / ".env").stat().st_mode) == 0o600
        assert {line.partition("=")[0] for line in made[-1].splitlines()} == asked
    assert all(len(line.partition("=")[2]) == 32 for line in made[0].splitlines())
    assert made[0] == made[1]
    assert len(set(made[0].splitlines() + made[2].splitlines())) == 4
