"""The container image, built by an engine of the test's own and run: what it may do, what a stop and a restart keep.

Slow lane. The base is a bare Debian 12 under the name that the Dockerfile asks for: what is built on it comes from apt
and pip alone. Root.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.deploy.grafana import DEPLOY
from tests.support.docker import BUILD_SECONDS, Engine
from tests.support.machine import layer_over, reach_packages, require_base
from tests.support.nbd_client import Client
from tests.support.programs import require_program, run
from tests.support.server import START_SECONDS, free_port

pytestmark = pytest.mark.slow

BASE = ("python3", "python3-venv", "python3-dev", "python-is-python3")  # what python:*-slim has
USER = 10809
CONFINED = (
    "--network=host",
    "--read-only",
    f"--tmpfs=/run/nbdzram:uid={USER},gid={USER},mode=0700",
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges",
)
"""As compose.yaml and the Kubernetes manifests run it."""

CONTENT = os.urandom(1 << 20)
HEALTH_SECONDS = 120  # some checks of 3 s each, on a busy machine


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """With the image `nbdzram`, built as deploy/README.md says."""
    with Engine(tmp_path_factory.mktemp("docker")) as engine:
        base = require_base("trixie", *BASE)
        with layer_over(base, engine.directory / "layer") as root:
            reach_packages(root)
            engine.import_root(root, "python:debian")
        dockerfile = DEPLOY / "docker" / "Dockerfile"
        how = ["--network=host", "--build-arg=PYTHON=debian", f"--file={dockerfile}", "--tag=nbdzram"]
        engine.run("build", *how, DEPLOY.parent, seconds=BUILD_SECONDS)
        yield engine


@pytest.fixture
def start(engine: Engine) -> Iterator[Callable[..., tuple[str, int]]]:
    """Start a confined container; its id, and the port on this machine's loopback."""
    started = []

    def start(*options: str, serve: tuple[str, ...] = ()) -> tuple[str, int]:
        port = free_port()
        listen = ["--ip=127.0.0.1", f"--port={port}", "--metrics=off"]
        container = engine.run("run", "--detach", *CONFINED, *options, "nbdzram", "-e", "disk=64M", *listen, *serve)
        started.append(container)
        wait_ready(engine, container)
        return container, port

    yield start
    for container in started:
        engine.run("rm", "--force", "--volumes", container)


def wait_ready(engine: Engine, container: str, *, times: int = 1) -> None:
    """Until it said so, once for each start."""

    def ready() -> bool:
        assert engine.inspect(container)["State"]["Running"], engine.logs(container)
        return engine.logs(container).count("is ready") >= times

    engine.wait_until(ready, START_SECONDS)


def test_a_confined_container_serves_over_tcp_and_a_socket_in_a_volume(
    engine: Engine, start: Callable[..., tuple[str, int]], tmp_path: Path
) -> None:
    """Read-only, without capabilities, as a user other than root."""
    sockets = tmp_path / "sockets"
    sockets.mkdir()
    os.chown(sockets, USER, USER)
    container, port = start(f"--volume={sockets}:/sockets", serve=("--unix=/sockets/nbd.sock",))
    status = engine.run("exec", container, "cat", "/proc/1/status")
    assert re.search(rf"^Uid:\s+{USER}\s", status, re.MULTILINE), status
    assert set(re.findall(r"^Cap\w+:\s+(\w+)$", status, re.MULTILINE)) == {"0" * 16}, status
    assert re.search(r"^NoNewPrivs:\s+1$", status, re.MULTILINE), status
    (root,) = (mount for mount in engine.run("exec", container, "cat", "/proc/mounts").splitlines() if " / " in mount)
    assert "ro" in root.split()[3].split(","), root
    with Client(("127.0.0.1", port), "disk") as writer, Client(sockets / "nbd.sock", "disk") as reader:
        writer.write(4096, CONTENT)
        assert reader.read(4096, len(CONTENT)) == CONTENT
    assert '"name": "disk"' in engine.run("exec", container, "nbdzram", "stat", "--json")


def test_a_stop_drains_and_a_volume_keeps_the_disks_for_the_next_container(
    engine: Engine, start: Callable[..., tuple[str, int]]
) -> None:
    """`docker stop` with a client attached, `docker start`, and a new container on the same volume."""
    volume = "--volume=disks:/var/lib/nbdzram"
    keep = ("--state-dir=/var/lib/nbdzram",)
    container, port = start(volume, serve=keep)
    with Client(("127.0.0.1", port), "disk") as client:
        client.write(0, CONTENT)
        engine.run("stop", "--time=60", container)
    state = engine.inspect(container)["State"]
    assert (state["ExitCode"], state["OOMKilled"]) == (0, False), engine.logs(container)
    assert "Traceback" not in engine.logs(container)
    engine.run("start", container)
    wait_ready(engine, container, times=2)
    with Client(("127.0.0.1", port), "disk") as client:
        assert client.read(0, len(CONTENT)) == CONTENT
    engine.run("rm", "--force", container)
    _, port = start(volume, serve=keep)
    with Client(("127.0.0.1", port), "disk") as client:
        assert client.read(0, len(CONTENT)) == CONTENT


def test_the_health_check_finds_the_control_socket_that_the_configuration_names(
    engine: Engine, start: Callable[..., tuple[str, int]], tmp_path: Path
) -> None:
    """And calls a server that no longer answers unhealthy."""
    file = tmp_path / "nbdzram.toml"
    file.write_text('control = "/run/nbdzram/elsewhere.sock"\n')
    file.chmod(0o644)
    often = ("--health-interval=1s", "--health-retries=1", "--health-start-period=0s")
    named, _ = start(f"--volume={file}:/etc/nbdzram/nbdzram.toml:ro", *often)
    default, _ = start(*often)

    def health(container: str) -> str:
        said: str = engine.inspect(container)["State"]["Health"]["Status"]
        return said

    for container in (default, named):
        engine.wait_until(lambda container=container: health(container) == "healthy", HEALTH_SECONDS)  # type: ignore[misc]
    engine.run("kill", "--signal=STOP", named)
    engine.wait_until(lambda: health(named) == "unhealthy", HEALTH_SECONDS)
    engine.run("kill", "--signal=CONT", named)
    engine.wait_until(lambda: health(named) == "healthy", HEALTH_SECONDS)


def test_compose_runs_the_service_as_the_file_says(engine: Engine, tmp_path: Path) -> None:
    """Under docker-compose 1.29, which Debian 12 has; but for the ports, which are free ones here."""
    compose = [require_program("docker-compose", package="docker-compose"), "--project-name=nbdzram-test"]
    service = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text())["services"]["nbdzram"]
    del service["build"]  # the image is there
    port = free_port()
    service["ports"] = [f"127.0.0.1:{port}:10809"]
    file = tmp_path / "compose.yaml"
    file.write_text(yaml.safe_dump({"services": {"nbdzram": service}}))
    compose.append(f"--file={file}")
    run([*compose, "up", "--detach"], environment=engine.environment())
    try:
        container = run([*compose, "ps", "--quiet"], environment=engine.environment()).strip()
        wait_ready(engine, container)
        with Client(("127.0.0.1", port), "disk") as client:
            client.write(0, CONTENT)
            assert client.read(0, len(CONTENT)) == CONTENT
        run([*compose, "stop"], environment=engine.environment())
        assert engine.inspect(container)["State"]["ExitCode"] == 0, engine.logs(container)
    finally:
        run([*compose, "down", "--volumes"], environment=engine.environment())
