"""What an export is where it is declared, was changed at run time, and is declared otherwise since: value by value."""

from __future__ import annotations

from dataclasses import replace
from operator import attrgetter
from typing import Any

import pytest

from nbdzram.bounds import Bounds
from nbdzram.config import NOBODY, Access, ExportConfig
from nbdzram.server.inventory import declared_export, effective
from nbdzram.server.state import ExportRecord

PLACES = {
    "size_bytes": "size_bytes",
    "read_only": "read_only",
    "description": "description",
    "allow_addresses": "access.addresses",
    "allow_certificates": "access.certificates",
    "quota": "bounds.quota_bytes",
    "iops": "bounds.iops",
    "iops_burst": "bounds.iops_burst",
    "bandwidth": "bounds.bandwidth_bytes",
    "bandwidth_burst": "bounds.bandwidth_burst_bytes",
}
"""Each key of a declaration, and where a record has it."""
DECLARED = ExportConfig(name="disk", size_bytes=4096)
SINCE: dict[str, Any] = {
    **dict.fromkeys(PLACES, 3 << 20),
    "read_only": True,
    "description": "as declared since",
    "allow_addresses": ("10.0.0.0/8",),
    "allow_certificates": ("since",),
}
SAID = ExportRecord(
    pool="default",
    size_bytes=8192,
    read_only=False,
    description="said",
    access=Access(addresses=("::1/128",), certificates=("said",)),
    bounds=Bounds(quota_bytes=1, iops=2, iops_burst=3, bandwidth_bytes=4, bandwidth_burst_bytes=5),
    removed=False,
    declared=declared_export(DECLARED),
)


def values(record: ExportRecord) -> dict[str, Any]:
    return {key: attrgetter(place)(record) for key, place in PLACES.items()}


def test_what_was_said_holds_where_nothing_is_declared_otherwise() -> None:
    assert values(effective(DECLARED, SAID)) == values(SAID)


@pytest.mark.parametrize("key", PLACES)
def test_one_value_that_is_declared_otherwise_takes_no_other_back(key: str) -> None:
    """Who let one network in alone does not have that undone by a list of certificates, nor a limit by another one."""
    now = replace(DECLARED, **{key: SINCE[key]})
    assert values(effective(now, SAID)) == {**values(SAID), key: SINCE[key]}


@pytest.mark.parametrize("key", PLACES)
def test_one_value_that_was_declared_otherwise_then_is_as_declared_now(key: str) -> None:
    then = declared_export(replace(DECLARED, **{key: SINCE[key]}))
    found = effective(DECLARED, replace(SAID, declared=then))
    assert values(found) == {**values(SAID), key: getattr(DECLARED, key)}


def test_who_is_not_known_to_be_admitted_is_not_until_somebody_says_who_is() -> None:
    """In one list: what the other one was is not known either."""
    unknown = replace(SAID, access=NOBODY)
    assert effective(DECLARED, unknown).access == NOBODY
    assert effective(replace(DECLARED, iops=7), unknown).access == NOBODY
    said = effective(replace(DECLARED, allow_certificates=("since",)), unknown)
    assert said.access == Access(certificates=("since",))


@pytest.mark.parametrize("key", PLACES)
def test_one_that_was_removed_comes_back_with_another_size_alone(key: str) -> None:
    now = replace(DECLARED, **{key: SINCE[key]})
    assert effective(now, replace(SAID, removed=True)).removed == (key != "size_bytes")
