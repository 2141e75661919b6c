"""The metrics, scraped over HTTP from a real server and read by prometheus_client's own parser."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nbdzram import __version__
from nbdzram.config import TcpAddress
from nbdzram.engine.stats import DiskUsage
from nbdzram.errors import UserError
from nbdzram.metrics.exposition import labels
from nbdzram.metrics.families import FAMILIES, MM_STAT
from nbdzram.metrics.http import MAX_CONNECTIONS, MAX_HEAD_BYTES, MetricsServer
from nbdzram.metrics.process import CARRIERS
from nbdzram.status import ServerStatus
from tests.support.programs import require_program
from tests.unit.records import EXPORT, POOL_STATS, SERVER, USAGE


async def usage() -> dict[str, DiskUsage]:
    return {"disk": USAGE}


def with_server(act: Callable[[str, int], Any], status: ServerStatus = SERVER) -> Any:
    """Run the blocking client code `act` with host and port of a live server."""

    async def both() -> Any:
        server = MetricsServer(TcpAddress(port=0), lambda: status, usage)
        await server.start()
        port = int(server.url.split(":")[2].split("/")[0])
        try:
            return await asyncio.to_thread(act, "127.0.0.1", port)
        finally:
            await server.stop()

    return asyncio.run(both())


def get(path: str, status: ServerStatus = SERVER) -> tuple[int, str, str]:
    def act(host: str, port: int) -> tuple[int, str, str]:
        try:
            with urllib.request.urlopen(f"http://{host}:{port}{path}", timeout=30) as reply:
                return reply.status, reply.headers["Content-Type"], reply.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers["Content-Type"], error.read().decode()

    answer: tuple[int, str, str] = with_server(act, status)
    return answer


def scrape(status: ServerStatus = SERVER) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    code, kind, text = get("/metrics", status)
    assert (code, kind) == (200, "text/plain; version=0.0.4; charset=utf-8")
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    found = {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}
    assert len(found) == len(samples)  # no sample twice
    return found


def key(name: str, **pairs: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(pairs.items())


def test_mm_stat_is_published_one_to_one_in_the_kernels_order() -> None:
    found = scrape()
    assert [found[key(family.name, pool="default")] for family in MM_STAT] == list(POOL_STATS.mm_stat())


def test_io_stat_is_published_one_to_one() -> None:
    found = scrape()
    for field in ("failed_reads", "failed_writes", "invalid_io", "notify_free"):
        value = found[key(f"nbdzram_{field}_total", pool="default", export="disk")]
        assert value == getattr(EXPORT, field)


def test_traffic_is_counted_by_operation_and_cause_with_a_cumulative_histogram() -> None:
    status = dataclasses.replace(SERVER, latency_bounds_seconds=(1e-6, 2e-6, 4e-6, 8e-6, 1.6e-5))
    read = dataclasses.replace(EXPORT.operations["read"], requests=10, latency_counts=(1, 2, 3, 0, 1, 3))
    idle = dataclasses.replace(read, requests=0, latency_counts=(0,) * 6)
    export = dataclasses.replace(EXPORT, operations={"read": read, "write": idle})
    found = scrape(dataclasses.replace(status, exports=(export,)))
    where = {"pool": "default", "export": "disk", "operation": "read"}
    assert found[key("nbdzram_requests_total", **where)] == 10
    assert found[key("nbdzram_request_errors_total", **where, cause="EINVAL")] == 1
    buckets = {
        bound: found[key("nbdzram_request_duration_seconds_bucket", **where, le=bound)]
        for bound in ("4e-06", "1.6e-05", "+Inf")
    }
    assert buckets == {"4e-06": 6, "1.6e-05": 7, "+Inf": 10}
    assert found[key("nbdzram_request_duration_seconds_count", **where)] == 10
    assert key("nbdzram_request_duration_seconds_count", **where | {"operation": "write"}) not in found


def test_names_that_an_operator_chose_are_escaped() -> None:
    odd = 'a"b\\c\nd'
    found = scrape(dataclasses.replace(SERVER, exports=(dataclasses.replace(EXPORT, name=odd),)))
    assert found[key("nbdzram_export_size_bytes", pool="default", export=odd)] == EXPORT.size_bytes
    assert labels(a=odd) == '{a="a\\"b\\\\c\\nd"}'


def test_every_family_is_published() -> None:
    names = {name for name, _ in scrape()}
    missing = [f.name for f in FAMILIES if f.name not in names and f"{f.name}_count" not in names]
    assert missing == ["nbdzram_maintenance_wait_seconds"]  # the only one without a sample in these records


def test_samples_carry_the_labels_that_their_family_declares() -> None:
    found = scrape()
    for family in FAMILIES:
        for name, pairs in found:
            if name.removesuffix("_bucket") == family.name:
                assert {label for label, _ in pairs} == set(family.samples.labels), name


def test_the_process_describes_itself_once_with_the_librarys_own_collectors() -> None:
    found = scrape()
    assert found[key("process_resident_memory_bytes")] > 1 << 20
    assert found[key("process_cpu_seconds_total")] > 0
    (build,) = (dict(pairs) for name, pairs in found if name == "nbdzram_build_info")
    assert build["version"] == __version__
    assert set(build) == {"version", *CARRIERS}
    assert "python_info" in {name for name, _ in found}


def test_the_names_are_as_promtool_wants_them() -> None:
    promtool = require_program("promtool", package="prometheus")
    text = get("/metrics")[2]
    done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_a_scrape_of_a_hundred_exports_renders_each_of_them_once() -> None:
    exports = tuple(dataclasses.replace(EXPORT, name=f"disk{number}") for number in range(100))
    found = scrape(dataclasses.replace(SERVER, exports=exports))
    assert sum(1 for name, _ in found if name == "nbdzram_export_size_bytes") == 100


def test_readiness_ends_with_draining_and_health_does_not() -> None:
    draining = dataclasses.replace(SERVER, draining=True)
    assert get("/readyz")[::2] == (200, "ready\n")
    assert get("/readyz", draining)[::2] == (503, "draining\n")
    assert get("/healthz", draining)[::2] == (200, "ok\n")


def test_the_status_page_stands_alone() -> None:
    code, kind, page = get("/")
    assert (code, kind) == (200, "text/html; charset=utf-8")
    assert "://" not in page.replace("http://www.w3.org/2000/svg", "")  # no outside assets
    assert json.loads(get("/status.json")[2])["pools"][0]["name"] == "default"
    assert json.loads(get("/usage.json")[2])["disk"]["unique"] == USAGE.unique


def raw(request: bytes) -> bytes:
    def act(host: str, port: int) -> bytes:
        with socket.create_connection((host, port), timeout=30) as client:
            client.sendall(request)
            return b"".join(iter(lambda: client.recv(65536), b""))

    answer: bytes = with_server(act)
    return answer


@pytest.mark.parametrize(
    ("request_head", "code"),
    [
        (b"GET /nothing HTTP/1.1\r\n\r\n", 404),
        (b"POST /metrics HTTP/1.1\r\n\r\n", 405),
        (b"\x16\x03\x01\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nCookie: " + b"x" * MAX_HEAD_BYTES + b"\r\n\r\n", 431),
        (b"GET /metrics?x=1 HTTP/1.0\r\n\r\n", 200),
    ],
)
def test_each_request_gets_the_status_that_fits(request_head: bytes, code: int) -> None:
    assert raw(request_head).startswith(f"HTTP/1.1 {code} ".encode())


def test_head_gets_the_head_alone() -> None:
    assert raw(b"HEAD /healthz HTTP/1.1\r\n\r\n").endswith(b"\r\n\r\n")


def test_more_connections_than_allowed_are_closed_and_the_others_stay() -> None:
    def act(host: str, port: int) -> bytes:
        held = [socket.create_connection((host, port), timeout=30) for _ in range(MAX_CONNECTIONS)]
        try:
            with socket.create_connection((host, port), timeout=30) as extra:
                assert extra.recv(1) == b""
            held[0].sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
            return held[0].recv(65536)
        finally:
            for connection in held:
                connection.close()

    assert with_server(act).startswith(b"HTTP/1.1 200 ")


def test_an_address_in_use_is_one_sentence_with_the_remedy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = TcpAddress(port=taken.getsockname()[1])
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{address.port} for metrics: .*--metrics off"):
            asyncio.run(MetricsServer(address, lambda: SERVER, usage).start())
