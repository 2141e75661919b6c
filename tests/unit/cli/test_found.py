"""What doctor finds in a server, in each state that it tells apart: found.txt has every word and every figure of it.

python -m tests.unit.cli.test_found        writes it anew, after a change that is meant
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast
from unittest import mock

from nbdzram.cli import vitals
from nbdzram.cli.diagnosis import Patient
from nbdzram.config import ServerConfig
from nbdzram.machine import Machine, Share
from nbdzram.status import CheckpointStatus, HeadroomStatus, JournalStatus, ServerStatus
from tests.unit.records import MIB, SERVER, TWO_OF_EACH

FOUND = Path(__file__).with_name("found.txt")
ROOM = Share(1 << 30, Path("/unit"))
CHECKS = (
    vitals.pools,
    vitals.state,
    vitals.checkpoints,
    vitals.journal,
    vitals.descriptors,
    vitals.addresses,
    vitals.certificate,
)
CHECKPOINT = cast("CheckpointStatus", TWO_OF_EACH.checkpoint)
JOURNAL = cast("JournalStatus", TWO_OF_EACH.journal)
HEADROOM = cast("HeadroomStatus", TWO_OF_EACH.headroom)
NOW = SERVER.started_at + SERVER.uptime_seconds
DECADES = 10**10  # seconds since the epoch: no certificate ends before


def limits(first: int, second: int, *, taken: int = 37) -> ServerStatus:
    pools = [
        replace(pool, stats=replace(pool.stats, mem_limit=limit * MIB))
        for pool, limit in zip(TWO_OF_EACH.pools, (first, second), strict=True)
    ]
    pools[1] = replace(pools[1], stats=replace(pools[1].stats, mem_used_total=taken * MIB))
    return replace(TWO_OF_EACH, pools=tuple(pools), certificate_expires_at=DECADES)


WELL = limits(300, 200)


def waits(**beside: object) -> ServerStatus:
    checkpoint = replace(CHECKPOINT, failures=0, **beside)  # type: ignore[arg-type]
    return replace(WELL, checkpoint=checkpoint, journal=replace(JOURNAL, usable=False))


STATES: dict[str, ServerStatus] = {
    "a pool has no limit": limits(300, 0),
    "limits beyond memory": limits(600, 700),
    "limits as large as memory": limits(512, 512),
    "a pool at its limit": limits(300, 100, taken=86),
    "a pool below its limit": limits(300, 100, taken=84),
    "memory is short": replace(WELL, headroom=replace(HEADROOM, short=True)),
    "room for what is missing": replace(WELL, state_dir_free_bytes=158 * MIB),
    "no room": replace(WELL, state_dir_free_bytes=158 * MIB - 1),
    "no state directory": replace(WELL, pools=WELL.pools[:1], checkpoint=None),
    "a checkpoint a moment old": replace(WELL, checkpoint=replace(CHECKPOINT, moment=NOW - 3, failures=0)),
    "a checkpoint just in time": replace(WELL, checkpoint=replace(CHECKPOINT, moment=NOW - 240)),
    "an old checkpoint": replace(WELL, checkpoint=replace(CHECKPOINT, moment=NOW - 1000)),
    "no checkpoint yet": replace(WELL, checkpoint=replace(CHECKPOINT, moment=None)),
    "checkpoints lack": replace(WELL, checkpoint=replace(CHECKPOINT, held_back=("disk", "other"))),
    "damaged files": replace(WELL, checkpoint=replace(CHECKPOINT, moment=NOW - 3, damaged_files=1)),
    "no journal": replace(WELL, journal=None),
    "FLUSH of one fails": replace(WELL, journal=replace(JOURNAL, held_back=("other",))),
    "FLUSH fails": replace(WELL, journal=replace(JOURNAL, usable=False, trouble="no space left")),
    "FLUSH is not answered": replace(WELL, journal=replace(JOURNAL, trouble="FLUSH waits for the disk")),
    "FLUSH waits": waits(),
    "FLUSH waits for what is written": waits(written_share=0.31),
    "FLUSH waits for what failed": replace(waits(), checkpoint=replace(CHECKPOINT, failures=2, written_share=0.5)),
    "open to all": replace(WELL, uris=("nbd://0.0.0.0:10809", "nbd://[::]:10810", "nbds://[::]:10811")),
    "open and listed": replace(WELL, uris=("nbd://0.0.0.0:10809",), exports=WELL.exports[:1]),
    "an expired certificate": replace(WELL, certificate_expires_at=1e9),
    "keys alone": replace(WELL, certificate_expires_at=None, uris=("nbds://10.0.0.1:10809",)),
    "no TLS": replace(WELL, certificate_expires_at=None),
    "TLS files that cannot be used": replace(WELL, certificate_expires_at=None, tls_files_usable=False),
}


def found() -> Iterator[str]:
    """Of each state what differs from how it should be."""
    with tempfile.TemporaryDirectory() as processes, mock.patch.object(Machine, "memory", return_value=ROOM):
        place = Path(processes) / str(SERVER.pid)
        place.mkdir()
        (place / "comm").write_text("nbdzram\n")
        usual: list[str] = []
        for allowed in (1100, 4096):
            (place / "limits").write_text(f"Max open files            {allowed}                 {allowed}\n")
            lines = told(WELL, Path(processes))
            yield from [f"-- {allowed} descriptors", *(line for line in lines if line not in usual)]
            usual = lines
        for name, status in STATES.items():
            yield from [f"-- {name}", *(line for line in told(status, Path(processes)) if line not in usual)]


def told(status: ServerStatus, processes: Path) -> list[str]:
    patient = Patient(ServerConfig(), status, processes=processes)
    return [
        f"{finding.level.name} {finding.subject}: {finding.says}" + (f" -> {finding.remedy}" if finding.remedy else "")
        for check in CHECKS
        for finding in check(patient)
        if finding.subject != "survival"  # perils.py's, by what this machine has
    ]


def test_doctor_finds_what_it_did_in_each_state() -> None:
    assert list(found()) == FOUND.read_text(encoding="utf-8").splitlines()


if __name__ == "__main__":
    FOUND.write_text("\n".join(found()) + "\n", encoding="utf-8")
