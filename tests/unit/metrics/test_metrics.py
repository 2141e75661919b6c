"""The metrics, scraped over HTTP from a real server and read by prometheus_client's own parser."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nbdzram import __version__
from nbdzram.metrics.exposition import labels
from nbdzram.metrics.families import FAMILIES, MM_STAT
from nbdzram.metrics.process import CARRIERS, resident_bytes
from nbdzram.server.policy import Reason
from nbdzram.status import ClientStatus, ExportSample, ServerStatus
from tests.support.programs import require_program
from tests.unit.metrics.stage import Show, with_server
from tests.unit.records import EXPORT, POOL_STATS, SERVER, USAGE


def get(path: str, status: ServerStatus = SERVER, show: Show | None = None) -> tuple[int, str, str]:
    def act(host: str, port: int) -> tuple[int, str, str]:
        try:
            with urllib.request.urlopen(f"http://{host}:{port}{path}", timeout=30) as reply:
                return reply.status, reply.headers["Content-Type"], reply.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers["Content-Type"], error.read().decode()

    answer: tuple[int, str, str] = with_server(act, show or Show(lambda: status))
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


def numbered(record: Any, numbers: Iterator[int]) -> Any:
    """The same record with a number of its own in the place of each that it has."""
    if isinstance(record, int | float) and not isinstance(record, bool):
        return next(numbers)
    if isinstance(record, tuple):
        return tuple(numbered(one, numbers) for one in record)
    if isinstance(record, dict):
        return {name: numbered(one, numbers) for name, one in record.items()}
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        fields = {field.name: numbered(getattr(record, field.name), numbers) for field in dataclasses.fields(record)}
        return dataclasses.replace(record, **fields)
    return record


def test_each_family_tells_a_figure_of_its_own() -> None:
    """Where every place of the status has a number of its own."""
    status = numbered(SERVER, (number**2 for number in itertools.count(1_000)))
    told = {name: value for (name, _), value in scrape(status).items() if name.startswith("nbdzram_")}
    names = [family.name for family in FAMILIES if told.get(family.name, 0) >= 1_000**2]
    assert len({told[name] for name in names}) == len(names) > 70


def test_what_waited_for_a_limit_is_told_when_the_limit_is_lifted() -> None:
    free = dataclasses.replace(EXPORT, bounds=dataclasses.replace(EXPORT.bounds, iops=0, bandwidth_bytes=0))
    idle = dataclasses.replace(free, name="idle", throttled_requests=0, throttled_seconds=0.0)
    found = scrape(dataclasses.replace(SERVER, exports=(free, idle)))
    for field in ("requests", "seconds"):
        value = found[key(f"nbdzram_throttled_{field}_total", pool="default", export="disk")]
        assert value == getattr(EXPORT, f"throttled_{field}")
        assert key(f"nbdzram_throttled_{field}_total", pool="default", export="idle") not in found


def test_samples_carry_the_labels_that_their_family_declares() -> None:
    found = scrape()
    for family in FAMILIES:
        for name, pairs in found:
            if name.removesuffix("_bucket") == family.name:
                assert {label for label, _ in pairs} == set(family.samples.labels), name


def test_the_process_describes_itself_once_with_the_librarys_own_collectors() -> None:
    found = scrape()
    assert found[key("process_resident_memory_bytes")] > 1 << 20
    assert resident_bytes() == pytest.approx(found[key("process_resident_memory_bytes")], rel=0.5)
    assert found[key("process_cpu_seconds_total")] > 0
    (build,) = (dict(pairs) for name, pairs in found if name == "nbdzram_build_info")
    assert build["version"] == __version__
    assert set(build) == {"version", "liblz4", *CARRIERS}
    assert re.fullmatch(r"1\.\d+\.\d+", build["liblz4"])  # the library's own, and not that of the package around it
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


def test_readiness_begins_when_clients_are_let_in_and_ends_with_draining_and_health_does_not() -> None:
    starting, draining = dataclasses.replace(SERVER, starting=True), dataclasses.replace(SERVER, draining=True)
    assert get("/readyz", starting)[::2] == (503, "starting\n")
    assert get("/healthz", starting)[::2] == (200, "ok\n")
    assert get("/readyz")[::2] == (200, "ready\n")
    assert get("/readyz", draining)[::2] == (503, "draining\n")
    assert get("/healthz", draining)[::2] == (200, "ok\n")


def test_the_status_page_stands_alone() -> None:
    code, kind, page = get("/")
    assert (code, kind) == (200, "text/html; charset=utf-8")
    assert "://" not in page.replace("http://www.w3.org/2000/svg", "")  # no outside assets
    assert json.loads(get("/status.json")[2])["pools"][0]["name"] == "default"
    assert json.loads(get("/usage.json")[2])["disk"]["unique"] == USAGE.unique


def test_the_status_page_has_words_for_every_reason_of_a_run() -> None:
    (told,) = re.findall(r"const REASONS = \{(.*?)\};", get("/")[2], re.DOTALL)
    assert set(re.findall(r"(\w+): \"", told)) == {"asked", "memory_short", *Reason}


def test_usage_says_its_age_or_that_nobody_counted_yet() -> None:
    def ages(show: Show) -> list[str | None]:
        def act(host: str, port: int) -> list[str | None]:
            with urllib.request.urlopen(f"http://{host}:{port}/usage.json", timeout=30) as reply:
                return [reply.headers["Age"]]

        found: list[str | None] = with_server(act, show)
        return found

    assert ages(Show(usage_age=41.3)) == ["41"]
    assert ages(Show(usage={}, usage_age=None)) == [None]


def test_history_is_told_sample_by_sample() -> None:
    told = dataclasses.replace(Show().samples[0], memory_bytes=393_216)  # in steps (coarse.py)
    assert json.loads(get("/history.json")[2]) == [dataclasses.asdict(told)]


def test_the_history_of_one_export_is_told_by_its_name() -> None:
    sample = ExportSample(1.7e9, 1.0, 2.0, 3.0, 4.0, 5.0)
    show = Show(of_exports={"disk": (), "a/b c?ü": (sample,)})
    assert json.loads(get("/history/disk", show=show)[2]) == []
    assert json.loads(get("/history/a%2Fb%20c%3F%C3%BC", show=show)[2]) == [dataclasses.asdict(sample)]
    for gone in ("/history/gone", "/history/", "/history"):
        assert get(gone, show=show)[0] == 404


def test_what_a_server_lacks_has_no_sample() -> None:
    bare = dataclasses.replace(
        SERVER,
        certificate_expires_at=None,
        state_dir_size_bytes=0,
        state_dir_free_bytes=0,
        checkpoint=None,
        journal=None,
    )
    gone = {name for name, _ in scrape()} - {name for name, _ in scrape(bare)}
    kinds = ("state_dir_free_bytes", "state_dir_size_bytes", "tls_certificate_expiry_timestamp_seconds")
    prefixes = ("nbdzram_checkpoint_", "nbdzram_journal_")
    checkpoint = [family.name for family in FAMILIES if family.name.startswith(prefixes)]
    assert gone == {*(f"nbdzram_{kind}" for kind in kinds), *checkpoint}
    assert len(checkpoint) == 14
    assert scrape()[key("nbdzram_tls_certificate_expiry_timestamp_seconds")] == 1.8e9


def test_who_may_attach_is_not_told_to_whoever_reads_figures() -> None:
    listed = dataclasses.replace(EXPORT, admits="listed", allow_addresses=("10.1.2.0/24",), allow_certificates=("vm1",))
    status = dataclasses.replace(SERVER, exports=(listed,))
    for path in ("/status.json", "/metrics", "/usage.json", "/history.json"):
        text = get(path, status)[2]
        assert "10.1.2" not in text
        assert "vm1" not in text
    (told,) = json.loads(get("/status.json", status)[2])["exports"]
    assert (told["admits"], told["name"]) == ("listed", EXPORT.name)


def test_who_is_attached_is_told_to_people_and_never_a_label() -> None:
    client = ClientStatus(7, "192.0.2.7:5555", ("vm1",), "disk", False, 1.7e9, 3, 1, 0.5)

    def texts(host: str, port: int) -> list[str]:
        found = []
        for path in ("/clients.json", "/metrics"):
            with urllib.request.urlopen(f"http://{host}:{port}{path}", timeout=30) as reply:
                found.append(reply.read().decode())
        return found

    clients, metrics = with_server(texts, Show(attached=(client,)))
    assert json.loads(clients) == [dataclasses.asdict(client) | {"certificate_names": ["vm1"]}]
    assert "192.0.2.7" not in metrics
