"""A real Prometheus scrapes a live server under load: every query of the dashboard finds figures, every rule works."""

from __future__ import annotations

import contextlib
import random
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from tests.deploy.grafana import dashboard, substituted, targets
from tests.deploy.prometheus import Prometheus
from tests.support.nbd_client import Client, RefusedOption, RequestFailed, open_socket
from tests.support.server import Nbdzram
from tests.wire import CMD_READ, CMD_WRITE

BLOCK = 4096
CHUNK = 64 * BLOCK
ROUNDS = 4  # of load, a scrape after each: rates need two points, and the first one may fall into the middle of a round
QUERIES = dict(targets())
CONFIGURATION = """
[pools.default]
mem_limit = "256M"
[pools.small]
mem_limit = "256K"
[maintenance]
fold = "auto"
scrub = "1"
compact = "auto"
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nbdzram]:
    directory = tmp_path_factory.mktemp("server")
    file = directory / "nbdzram.toml"
    file.write_text(CONFIGURATION)
    bounds = "quota=32M,iops=40,bandwidth=64M"  # fewer requests a second than a round asks for at once
    exports: dict[str, str | int] = {"vm1": "64M", "vm2": f"64M,{bounds}", "tight": "16M,pool=small"}
    kept = ["--checkpoint", str(directory / "checkpoints"), "--checkpoint-interval", "1", "--durability", "flush"]
    with Nbdzram(directory, exports, arguments=["-c", str(file), *kept], metrics=True) as running:
        yield running


@pytest.fixture(scope="module")
def prometheus(server: Nbdzram, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """It has seen the server idle, then ROUNDS of everything that a server can meet."""
    with Prometheus(tmp_path_factory.mktemp("prometheus"), server.metrics_url) as running:
        running.wait_for_scrapes(2)
        for seed in range(ROUNDS):
            _load(server, random.Random(seed))
            running.wait_for_scrapes(1)
        running.wait_for_scrapes(1)
        yield running


def _load(server: Nbdzram, content: random.Random) -> None:
    """Traffic of all kinds, twins to fold, holes to compact, and every kind of failure."""
    twin = content.randbytes(CHUNK // 2) + bytes(CHUNK // 2)
    for name in ("vm1", "vm2"):
        with server.client(name) as client:
            offset = content.randrange(64) * CHUNK
            client.write(offset, twin)
            for block in range(64, 128):
                client.write(block * BLOCK, content.randbytes(BLOCK // 2) + b"half of it is text" * 113 + bytes(14))
            client.read(offset, CHUNK)
            client.trim(64 * BLOCK, 48 * BLOCK)
            client.flush()
            _expect_failure(client, CMD_READ, client.size_bytes, BLOCK, b"")
    with server.client("tight") as client:
        for offset in range(0, 2 * CHUNK, CHUNK // 4):
            with contextlib.suppress(RequestFailed):  # which is the point of it, from the second round on at the first
                client.write(offset, content.randbytes(CHUNK // 4))
    server.fold()
    server.compact()
    server.command_line("recompress")
    _break_handshake(server)
    _break_protocol(server)


def _expect_failure(client: Client, command: int, offset: int, length: int, payload: bytes) -> None:
    with pytest.raises(RequestFailed):
        client.call(command, offset, length, payload)


def _break_handshake(server: Nbdzram) -> None:
    with pytest.raises(RefusedOption):
        server.client("no such export")
    with open_socket(server.unix_path) as stranger:
        stranger.recv(18)
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        stranger.recv(1)


def _break_protocol(server: Nbdzram) -> None:
    client = server.client("vm1")
    client.socket.sendall(struct.pack(">IHHQQI", 0xDEAD, 0, CMD_WRITE, 1, 0, 0))
    with pytest.raises((EOFError, ConnectionError)):
        client.receive(1)
    client.close()


@pytest.mark.parametrize("name", QUERIES)
def test_every_query_of_the_dashboard_returns_data(prometheus: Prometheus, name: str) -> None:
    """As Grafana would ask it, with All chosen: at least one figure that is a number."""
    expr = substituted(QUERIES[name]["expr"])
    if QUERIES[name].get("instant"):
        assert prometheus.instant(expr), expr
    else:
        assert prometheus.values(expr), expr


@pytest.mark.parametrize("annotation", dashboard()["annotations"]["list"], ids=lambda annotation: annotation["name"])
def test_every_annotation_marks_something(prometheus: Prometheus, annotation: dict[str, Any]) -> None:
    """Maintenance and starts happened, and their queries find them."""
    assert max(prometheus.values(substituted(annotation["expr"]))) > 0


@pytest.mark.parametrize("variable", dashboard()["templating"]["list"][1:], ids=lambda variable: variable["name"])
def test_every_variable_offers_its_values(prometheus: Prometheus, variable: dict[str, Any]) -> None:
    """label_values finds the label on the series that the variable asks."""
    series, label = substituted(variable["query"]["query"]).removeprefix("label_values(")[:-1].rsplit(",", 1)
    offered = {found[label] for found in prometheus.ask("series", **{"match[]": series})}
    expected = {"pool": {"default", "small"}, "export": {"vm1", "vm2", "tight"}, "job": {"nbdzram"}}
    assert offered == expected.get(label, offered)
    assert offered


def test_traffic_is_counted_where_it_went(prometheus: Prometheus) -> None:
    """The figures are not only there: both pools stored something, only one was full, folding saved something."""
    assert max(prometheus.values('nbdzram_pool_full_total{pool="small"}')) > 0
    assert max(prometheus.values('nbdzram_pool_full_total{pool="default"}')) == 0
    assert max(prometheus.values('nbdzram_shared_bytes{pool="default"}')) >= CHUNK // 2
    assert max(prometheus.values('nbdzram_codec_bytes{codec="zstd"}')) > 0
    assert max(prometheus.values('nbdzram_requests_total{export="vm1",operation="write"}')) == ROUNDS * 65


def test_rules_evaluate_without_error_and_the_right_alerts_fire(prometheus: Prometheus) -> None:
    """Writes failed and so NbdzramFailedWrites fires, with its sentences filled in; nothing says that it is down."""
    groups = prometheus.ask("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}, [rule.get("lastError") for rule in rules]
    found = prometheus.ask("alerts")["alerts"]
    alerts = {alert["labels"]["alertname"]: alert for alert in found if alert["state"] == "firing"}
    assert "NbdzramDown" not in alerts
    failed = alerts["NbdzramFailedWrites"]
    assert failed["labels"]["export"] == "tight"
    assert "Writes to tight at 127.0.0.1:" in failed["annotations"]["summary"]
    for alert in alerts.values():
        assert "<error" not in str(alert["annotations"])
