"""What --json prints: programs may rely on each key that one number of the schema has ever had."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nbdzram.cli.columns import render
from nbdzram.cli.diagnosis import Finding, Level
from nbdzram.cli.objects import LINE_WIDTH, SCHEMA, rows_object, stat_object, text_of, top_object
from nbdzram.cli.stat import COLUMNS, Line
from nbdzram.cli.top import _print_lines
from nbdzram.rates import Rates
from nbdzram.status import (
    Account,
    ExportLoss,
    ExportRenaming,
    ReceiveReport,
    ReloadReport,
    SendReport,
    ServerStatus,
    from_json,
    to_json,
)
from tests.unit.records import CLIENT, EXPORT, MAINTENANCE, REPORT, RUNNING, SERVER, STREAM, USAGE, WAITING

GOLDEN = Path(__file__).with_name(f"json_schema_{SCHEMA}.json")
BUSY = replace(SERVER, pools=(replace(SERVER.pools[0], maintenance=replace(MAINTENANCE, queue=(RUNNING, WAITING))),))


def account(status: ServerStatus) -> Account:
    """As `stat --json` reads it."""
    return from_json(Account, json.loads(to_json(status)))


def shape_of(value: Any) -> Any:
    """The names of types in place of values; of a list that of its first item, `number` for whole and other ones."""
    if isinstance(value, dict):
        return {key: shape_of(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape_of(value[0])] if value else []
    if isinstance(value, bool):
        return "boolean"
    return "number" if isinstance(value, int | float) else "null" if value is None else "string"


def shapes() -> dict[str, Any]:
    """Of each command that answers with records."""
    rates = Rates(1.0, 2.0, 3.0, 4.0, 5.0)
    printed = {
        "stat": stat_object(account(SERVER), {"disk": USAGE}),
        "top": top_object(BUSY, rates, {"disk": rates}),
        "runs": [RUNNING],
        "fold": [REPORT],
        "exports list": [EXPORT],
        "pools list": [SERVER.pools[0]],
        "clients list": [CLIENT],
        "streams list": [STREAM],
        "exports remove --dry-run": [ExportLoss("disk", 3, 2, 1, ("127.0.0.1:1",))],
        "exports rename": ExportRenaming("old", EXPORT, old_name_declared=True, remembered=True),
        "reload": ReloadReport(("one",), ("two",), ("three",)),
        "send": SendReport(("disk",), 1, 2, 3, 4, 0.5),
        "receive": ReceiveReport(("disk",), 1, 2, 3, 4, 5, 0.5),
        "doctor": [Finding(Level.WARN, "memory", "it is short", "trim")],
    }
    return {command: shape_of(json.loads(to_json(value))) for command, value in printed.items()}


def test_no_key_goes_and_none_changes_its_type_under_one_number() -> None:
    """A new key may be written into the golden file; what stands there stays until SCHEMA is another number."""
    assert not missing(json.loads(GOLDEN.read_text()), shapes(), "")


def missing(promised: Any, printed: Any, path: str) -> list[str]:
    if isinstance(promised, dict) and isinstance(printed, dict):
        gone = [f"{path}.{key} is gone" for key in promised.keys() - printed.keys()]
        kept = promised.keys() & printed.keys()
        return gone + [line for key in sorted(kept) for line in missing(promised[key], printed[key], f"{path}.{key}")]
    if isinstance(promised, list) and isinstance(printed, list):
        return missing(promised[0], printed[0], f"{path}[]") if promised and printed else []
    return [] if promised == printed else [f"{path} was {promised} and is {printed}"]


def test_the_golden_file_knows_every_key() -> None:
    """So that a key that is new today is held from today on."""
    assert not missing(shapes(), json.loads(GOLDEN.read_text()), "")


def test_an_export_is_a_handful_of_lines() -> None:
    exports = tuple(replace(EXPORT, name=f"disk{number}") for number in range(9))
    text = text_of(stat_object(account(replace(SERVER, exports=exports)), {"disk0": USAGE}))
    assert len(text.splitlines()) < 400
    assert max(map(len, text.splitlines())) <= LINE_WIDTH
    assert json.loads(text)["exports"][8]["name"] == "disk8"


def test_what_does_not_fit_one_line_is_spread_and_says_the_same() -> None:
    value = {"a": list(range(100)), "b": {"c": "x" * 200}, "d": [], "e": {}}
    assert json.loads(text_of(value)) == value
    assert text_of({"a": [1, 2]}) == '{"a": [1, 2]}'


def test_a_record_of_a_few_figures_is_one_line() -> None:
    figures = {"name": "disk", "requests": 123456, "bytes": 7890123456, "errors": {"EINVAL": 12}, "idle": [1, 2, 3]}
    assert text_of([figures]).splitlines() == [json.dumps([figures])]


def test_p99_is_where_the_slowest_hundredth_begins() -> None:
    slow = replace(EXPORT.operations["read"], latency_counts=(90, 0, 10))
    export = replace(EXPORT, operations={"read": slow})
    status = replace(SERVER, exports=(export,), latency_bounds_seconds=(0.001, 0.01, 0.1))
    told = stat_object(account(status), {})["exports"][0]["operations"]["read"]
    assert told["median_seconds"] < 0.001
    assert 0.01 < told["p99_seconds"] <= 0.1


def test_no_limit_reads_as_none_for_people() -> None:
    (column,) = (column for column in COLUMNS if column.heading == "MEM-LIMIT")
    pool = replace(SERVER.pools[0], stats=replace(SERVER.pools[0].stats, mem_limit=0))
    line = Line(pool, None, (), {})
    assert [text.strip() for text in render([column], [line], headings=False)] == ["none"]
    assert [text.strip() for text in render([column], [line], headings=False, in_bytes=True)] == ["0"]


def test_columns_that_were_asked_for_are_rows_of_plain_numbers() -> None:
    chosen = [column for column in COLUMNS if column.heading in {"NAME", "MEM-LIMIT", "UNIQUE"}]
    status: ServerStatus = SERVER
    line = Line(status.pools[0], None, status.exports, {"disk": USAGE})
    found = rows_object(chosen, [line, line._replace(export=EXPORT)])
    assert found["schema"] == SCHEMA
    assert found["rows"] == [
        {"name": "default", "unique": USAGE.unique, "mem_limit": 512 << 20},
        {"name": "disk", "unique": USAGE.unique, "mem_limit": None},
    ]


def test_saved_has_one_meaning() -> None:
    """What is stored, less all memory for it: in JSON, in the column, and in the metric."""
    pool = stat_object(account(SERVER), {})["pools"][0]
    assert pool["saved"] == pool["orig_data_size"] - pool["mem_used_total"] - pool["metadata"]
    assert pool["saved"] == top_object(SERVER, Rates(), {})["pools"][0]["saved"]
    (column,) = (column for column in COLUMNS if column.heading == "SAVED")
    assert column.cell(Line(SERVER.pools[0], None, SERVER.exports, {})) == pool["saved"]


def test_each_line_of_top_is_of_the_time_since_the_line_before(capsys: pytest.CaptureFixture[str]) -> None:
    def asked(seconds: int, requests: int) -> ServerStatus:
        read = replace(EXPORT.operations["read"], requests=requests)
        exports = (replace(EXPORT, operations={**EXPORT.operations, "read": read}),)
        return replace(SERVER, uptime_seconds=SERVER.uptime_seconds + seconds, exports=exports)

    statuses = iter([asked(0, 100), asked(1, 110), asked(2, 110)])
    client = SimpleNamespace(status=lambda: next(statuses))
    with pytest.raises(StopIteration):
        _print_lines(client, 0.0, once=False)  # type: ignore[arg-type]
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["rates"]["requests"] for line in lines] == [10, 0]
