"""Records: each in the file that the package says, so that whoever asks for one reads that alone."""

from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nbdzram import status
from nbdzram.engine.stats import PoolStats
from nbdzram.status.encoding import from_json, to_json
from nbdzram.status.maintenance import PoolStatus
from nbdzram.status.pools import PoolFigures
from nbdzram.status.streams import StreamStatus
from tests.unit.records import STREAM


@pytest.mark.parametrize("place", status.PLACES)
def test_every_record_of_a_file_is_told_and_no_other(place: str) -> None:
    module = importlib.import_module(f"nbdzram.status.{place}")
    own = {name for name, found in vars(module).items() if getattr(found, "__module__", "") == module.__name__}
    told = set(status.PLACES[place].split())
    assert told == {name for name in own if dataclasses.is_dataclass(getattr(module, name)) or name in told}
    assert {getattr(status, name).__module__ for name in told} == {module.__name__}


def test_every_file_has_its_place() -> None:
    names = [name for names in status.PLACES.values() for name in names.split()]
    assert len(names) == len(set(names))
    files = {path.stem for path in Path(status.__file__).parent.glob("*.py")}
    assert files - {"__init__"} == set(status.PLACES)


def test_a_name_that_there_is_not_is_an_error_as_in_any_module() -> None:
    with pytest.raises(AttributeError, match=r"'nbdzram\.status' has no attribute 'NoStatus'"):
        status.NoStatus  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'NoStatus'"):
        from nbdzram.status import NoStatus  # type: ignore[attr-defined]  # noqa: F401


def test_asking_for_one_record_reads_one_file() -> None:
    code = """
import sys
from nbdzram.status import ClientStatus
print(*(name for name in sys.modules if name.startswith("nbdzram.s")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["nbdzram.status", "nbdzram.status.clients"]


def test_a_record_with_less_reads_the_same_object() -> None:
    """A table of pools is made from what a server says of them, and looks at no run."""
    less = [field.name for field in dataclasses.fields(PoolFigures)]
    assert [field.name for field in dataclasses.fields(PoolStatus)][: len(less)] == less
    told: dict[str, Any] = dict.fromkeys(less, "") | {
        "path": None,
        "tells_sharing": False,
        "verify": True,
        "runs": ["of another version"],
    }
    told["stats"] = {field.name: {} if field.name == "compr_by_codec" else 1 for field in dataclasses.fields(PoolStats)}
    assert status.from_json(PoolFigures, told).stats.objects == 1


@pytest.mark.parametrize("token", [None, "", "0"])
@pytest.mark.parametrize("left", [None, 0.0, 1.5])
def test_what_is_nothing_is_read_as_nothing_and_what_is_zero_as_zero(left: float | None, token: str | None) -> None:
    record = dataclasses.replace(STREAM, seconds_left=left, token=token)
    assert from_json(StreamStatus, json.loads(to_json(record))) == record


def test_what_a_pool_counts_goes_on_from_what_another_process_counted() -> None:
    """Whatever only grows, and the highest memory so far; nothing else."""
    numbered = {
        field.name: number
        for number, field in enumerate(dataclasses.fields(PoolStats), start=1)
        if field.name != "compr_by_codec"
    }
    stats = PoolStats(**numbered, compr_by_codec={})
    before = dict.fromkeys((*numbered, "compr_by_codec"), 1000)
    grown = {name for name in numbered if getattr(stats.gone_on(before), name) == numbered[name] + 1000}
    words = ("since", "folded", "compacted", "moved", "recompressed", "failed", "rotten")
    assert grown == {name for name in numbered if any(word in name for word in words)}
    assert stats.gone_on(before).mem_used_max == 1000
    assert stats.gone_on({"mem_used_max": 1}).mem_used_max == stats.mem_used_max
    assert set(stats.counters()) == grown | {"mem_used_max"}
