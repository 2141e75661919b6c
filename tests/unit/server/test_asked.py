"""What a server does for each act that it is asked for, and by which sentence it refuses others: asked.txt.

python -m tests.unit.server.test_asked        writes it anew, after a change that is meant
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import uvloop

from nbdzram.config import ExportConfig, PoolConfig, ServerConfig, UnixAddress
from nbdzram.errors import RunCancelled, UserError
from nbdzram.server.handover import ARENA, FORMAT, MEMORY
from nbdzram.server.service import Service
from tests.unit.engine.blocks import BLOCK, half_random, noise
from tests.unit.server.house import MIB
from tests.unit.server.lasting import asked

ASKED = Path(__file__).with_name("asked.txt")
Act = tuple[str, Mapping[str, Any]]
CONFIG = ServerConfig(
    exports=(
        ExportConfig(name="disk", size_bytes=8 * MIB),
        ExportConfig(name="mine", size_bytes=MIB, private=True, allow_addresses=("10.0.0.0/8",)),
        ExportConfig(name="frozen", size_bytes=MIB, read_only=True),
        ExportConfig(name="quick", size_bytes=MIB, pool="fast"),
    ),
    pools=(PoolConfig(mem_limit=64 * MIB), PoolConfig(name="fast", mem_limit=8 * MIB)),
    tcp=(),
    unix=(),
)


def act(method: str, **given: Any) -> Act:
    return method, given


def acts() -> Iterator[Act]:
    """One after the other, of one server."""
    yield act("exports.add", name="disk", size_bytes=MIB)
    yield act("exports.add", name="new", size_bytes=MIB, pool="nowhere")
    yield act("exports.add", name="new", size_bytes=MIB, pool="fast", description="added", iops=7)
    yield act("exports.add", name="NEW", size_bytes=512, private=True, allow_certificates=["a"])
    yield act("exports.change", name="nobody", iops=3)
    yield act("exports.change", name="new", read_only=True, quota_bytes=4096, bandwidth_bytes=8192, description="")
    yield act("exports.change", name="new")
    yield act("exports.copy", source="nobody", name="copy")
    yield act("exports.copy", source="disk", name="disk")
    yield act("exports.copy", source="disk", name="copy")
    yield act("exports.copy", source="disk", name="disk@a", read_only=True)
    yield act("exports.copy", source="mine", name="mine@a", read_only=True)
    yield act("exports.copy", source="new", name="new@a")
    yield act("exports.rename", name="nobody", new_name="other")
    yield act("exports.rename", name="copy", new_name="copy")
    yield act("exports.rename", name="copy", new_name="disk")
    yield act("exports.rename", name="copy", new_name="renamed")
    yield act("exports.rename", name="quick", new_name="quicker")
    for size in (4 * MIB, 8 * MIB, 9 * MIB):
        yield act("exports.lose", name="disk", size_bytes=size)
        yield act("exports.resize", name="disk", size_bytes=size)
    yield act("exports.resize", name="disk", size_bytes=4 * MIB, yes=True)
    yield act("exports.resize", name="disk", size_bytes=2 * MIB, force=True)
    yield act("exports.resize", name="frozen", size_bytes=2 * MIB)
    yield act("exports.resize", name="nobody", size_bytes=2 * MIB)
    yield act("exports.lose", name="disk", snapshot="disk@a")
    yield act("exports.lose", name="disk", snapshot="nobody")
    yield act("exports.lose", name="nobody")
    yield act("exports.rollback", name="disk", snapshot="nobody")
    yield act("exports.rollback", name="disk", snapshot="renamed")
    yield act("exports.rollback", name="disk", snapshot="disk")
    yield act("exports.rollback", name="disk", snapshot="mine@a")
    yield act("exports.rollback", name="disk", snapshot="frozen")
    yield act("exports.rollback", name="frozen", snapshot="disk@a")
    yield act("exports.rollback", name="quicker", snapshot="disk@a")
    yield act("exports.rollback", name="disk", snapshot="disk@a")
    yield act("exports.reset", name="nobody")
    yield act("exports.reset", name="disk@a")
    yield act("exports.reset", name="disk")
    yield act("moments.take", name="now")
    yield act("moments.take", name="now")
    yield act("exports.remove", name="nobody")
    yield act("exports.remove", name="renamed")


def acts_on_pools() -> Iterator[Act]:
    """The same server's."""
    yield act("pools.lose", name="fast")
    yield act("pools.lose", name="nowhere")
    yield act("pools.remove", name="default")
    yield act("pools.remove", name="fast")
    yield act("pools.remove", name="nowhere")
    yield act("pools.add", name="fast")
    yield act("pools.add", name="more", mem_limit=4 * MIB, dedup="inline", verify=False, tell_sharing=True)
    yield act("exports.add", name="in more", size_bytes=MIB, pool="more")
    yield act("pools.lose", name="more")
    yield act("pools.remove", name="more")
    yield act("exports.remove", name="in more", force=True)
    yield act("pools.remove", name="more")
    yield act("pools.change", name="nowhere", mem_limit=1)
    yield act("pools.change", name="default", mem_limit=1 << 60)
    yield act("pools.change", name="default", dedup="inline")
    yield act("pools.change", name="fast", mem_limit=16 * MIB, verify=False)
    yield act("pools.change", name="fast")
    for number in (0, 1):
        yield act("clients.disconnect", number=number)
        for what in ("cancel", "pause", "resume"):
            yield act(f"runs.{what}", number=number)
    for percent in (0, 101):
        yield act("run", kind="fold", cpu_percent=percent)
    yield act("run", kind="nothing")
    yield act("run", kind="fold", pool="nowhere")
    for kind in ("fold", "compact", "recompress", "check"):
        yield act("run", kind=kind, pool="fast")
        yield act("run", kind=kind, pool="fast", dry_run=True)
    yield act("run", kind="fold")
    yield act("streams.abandon", name="x")
    yield act("streams.abandon", name="00" * 16)
    yield act("reload")
    yield act("exports.change", name="disk", read_only=True)
    for name in (
        "mine",
        "quicker",
        "NEW",
        "disk@a",
        "mine@a",
        "new@a",
        "disk@now",
        "mine@now",
        "quicker@now",
        "NEW@now",
    ):
        yield act("exports.remove", name=name, force=True)
    yield act("moments.take", name="then")


def seen(outcome: Any) -> str:
    """An outcome in short: times, and figures of memory, which are others each time, left out."""
    if isinstance(outcome, tuple):
        return f"({', '.join(map(seen, outcome))})"
    if isinstance(outcome, Mapping):
        return f"{{{', '.join(f'{key}: {seen(value)}' for key, value in outcome.items() if key not in VARIES)}}}"
    if not is_dataclass(outcome):
        return repr(outcome)
    shown = {name: getattr(outcome, name) for name in outcome.__dataclass_fields__ if name not in VARIES}
    told = (f"{name}={seen(value)}" for name, value in shown.items() if value not in (None, (), "", 0, False, {}))
    return f"{type(outcome).__name__}({', '.join(told)})"


VARIES = {
    *("seconds", "cpu_seconds", "asked_at", "started_at", "finished_at", "before", "after", "operations", "stats"),
    *(
        "objects_recompressed",
        "dictionary_bytes",
        "pages_returned",
        "bytes_freed",
        "comparisons",
        "maintenance",
        "bytes_before",
        "bytes_after",
    ),
}


@contextlib.asynccontextmanager
async def serving(config: ServerConfig = CONFIG) -> AsyncIterator[Service]:
    service = Service(config)
    await service.start(listen=False)
    try:
        yield service
    finally:
        await service.stop()


async def lines() -> list[str]:
    told = []
    async with serving() as service:
        for export in service._exports:
            export.disk.write(0, noise(1) + half_random(2, 900) + half_random(2, 900) + bytes(BLOCK))
        for method, given in (*acts(), *acts_on_pools()):
            words = " ".join(f"{name}={value!r}" for name, value in given.items())
            try:
                outcome = seen(await asked(service, method, **given))
            except UserError as error:
                outcome = f"{type(error).__name__}: {error}"
            told.append(f"{method} {words}: {outcome}")
        for record in service.status().exports:
            told.append(f"at the end {seen(record)}")
    return told


def test_each_act_is_done_or_refused_as_it_was() -> None:
    assert uvloop.run(lines()) == ASKED.read_text(encoding="utf-8").splitlines()


def test_a_run_is_held_goes_on_and_is_ended_by_its_number() -> None:
    async def story() -> None:
        async with serving() as service:
            disk = service._exports.get("disk").disk
            disk.write(0, b"".join(half_random(number % 1000) for number in range(2000)))
            running = asyncio.create_task(asked(service, "run", kind="fold", pool="default", cpu_percent=1))
            while not [run for run in await service.runs() if run.state == "running"]:  # noqa: ASYNC110 - nobody is told
                await asyncio.sleep(0)
            (run,) = await service.runs()
            for what, state in (("pause", "paused"), ("resume", "running"), ("cancel", "cancelled")):
                told = await asked(service, f"runs.{what}", number=run.number)
                assert (told.number, told.kind, told.pool, told.state) == (run.number, "fold", "default", state)
                if state != "cancelled":
                    with pytest.raises(UserError, match=rf"run 99 neither .*; the runs that do are {run.number}, and"):
                        await asked(service, f"runs.{what}", number=99)
            with pytest.raises(RunCancelled):
                await running
            with pytest.raises(UserError, match="; none does, and"):
                await asked(service, "runs.pause", number=run.number)
            await asked(service, "run", kind="check", pool="fast")
            await asked(service, "run", kind="check", pool="default")
            assert [one.number for one in await service.runs()] == [run.number, run.number + 1, run.number + 2]

    uvloop.run(story())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another directory": (
        {"state_dir": "/tmp/another"},
        "its disks lie in memory, and not in /tmp/another; mend --state-dir",
    ),
    "another format": ({"format": FORMAT + 1}, f"in format {FORMAT}, and was asked for {FORMAT + 1}; restart"),
    "what it does not know": ({"knows": [ARENA]}, f"has '{MEMORY}', which the one that asks does not know"),
    "nobody listens": ({}, "is not reached|No such file"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_who_cannot_take_over_is_told_why_and_nothing_happens(why: str) -> None:
    given, words = REFUSED[why]

    async def story(directory: Path) -> None:
        async with serving(replace(CONFIG, unix=(UnixAddress(path=directory / "nbd.sock"),))) as service:
            usual = {"socket": str(directory / "none"), "pid": 1, "format": FORMAT, "knows": [ARENA, MEMORY]}
            with pytest.raises(UserError, match="it is starting; ask again once it serves"):
                await asked(service, "takeover", **usual, state_dir="")
            await service.listen()
            with pytest.raises(UserError, match=words):
                await asked(service, "takeover", **{**usual, "state_dir": "", **given})
            service.ends_with_a_command = True
            with pytest.raises(UserError, match=words if given else "it ends with the command that it runs"):
                await asked(service, "takeover", **{**usual, "state_dir": "", **given})
            assert not service.taken_over.is_set()

    with tempfile.TemporaryDirectory() as directory:
        uvloop.run(story(Path(directory)))


if __name__ == "__main__":
    ASKED.write_text("\n".join(uvloop.run(lines())) + "\n", encoding="utf-8")
