"""What goes from one process to another: all of it, however many descriptors, and nothing stays where that fails."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nbdzram.config import EVERYONE, CheckpointConfig, ExportConfig, ServerConfig, UnixAddress
from nbdzram.errors import UserError
from nbdzram.machine import Machine
from nbdzram.nbd.constants import MetaContext, ReplyStyle, TransmissionFlag
from nbdzram.server import handover
from nbdzram.server.counts import ExportCount, OperationCount, PoolCount
from nbdzram.server.exports import Peer
from nbdzram.server.handover import FORMAT, KNOWS, SERVING, Client, Counted, Handover, give_away
from nbdzram.server.lobby import Origin
from nbdzram.server.moments import Moments, Reached
from nbdzram.server.service import Service
from nbdzram.server.state import FILE_NAME, ExportRecord, Kept, Remembered
from nbdzram.status import HistorySample, RunTotals, to_json
from tests.support.loop_client import WireClient
from tests.support.nbd_client import Client as Wire
from tests.support.takeover import listening
from tests.unit.server.house import UNCHANGED, Gate, tell
from tests.unit.server.test_maintenance import ScriptedRun

DISK = ExportConfig(name="disk", size_bytes=1 << 20)
CLIENTS = 450  # three messages with descriptors


def handed(clients: int) -> Handover:
    listener = socket.socket()
    record = ExportRecord(
        pool="p", size_bytes=1, read_only=True, description="d", access=EVERYONE, removed=False, declared=None
    )
    count = OperationCount(requests=1, size=2, nanoseconds=3, errors=(0, 1), latency=(1, 0, 2))
    return Handover(
        listeners=[listener],
        uris=["nbd://l"],
        paths=[(Path("/x"), 7)],
        control=socket.socket(socket.AF_UNIX),
        metrics=[socket.socket(), socket.socket()],
        clients=[client(number) for number in range(clients)],
        counted=Counted(
            accepted=9,
            handshake_failures={"tls": 2},
            last_client=450,
            exports={"e": ExportCount({"0": count}, 5, 6, 7)},
            pools={
                "p": PoolCount(
                    {"pages_folded": 8}, {"fold": RunTotals(1, 0, 0.5, 0.25, 4096)}, {"fold": {"x": 1}}, 2, 3
                )
            },
            history=(HistorySample(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7),),
        ),
        kept=Kept(Remembered(exports={"e": record}), {"p": os.memfd_create("p")}, files={"q": (8, 1 << 40)}),
        reached=Reached("ab" * 16, 1 << 60, {"e": 1 << 47}, (8, 1 << 40, 3)),
    )


def client(number: int) -> Client:
    return Client(
        number=number,
        export="e",
        size_bytes=1,
        style=ReplyStyle.STRUCTURED,
        contexts=(MetaContext.ALLOCATION,),
        flags=TransmissionFlag.READ_ONLY,
        peer=Peer("unix", local=True, account="uid 7"),
        listener="nbd://l",
        since=1.5,
        rest=bytes([number % 256]) * 3,
        payload_limit=33 << 20 if number % 2 else None,
        connection=os.memfd_create(f"client {number}"),
    )


def passed(given: Handover) -> Handover:
    """On the other side."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        giving = threading.Thread(target=given.give, args=(ours,))
        giving.start()
        try:
            return Handover.take(theirs)
        finally:
            giving.join()


def open_descriptors() -> set[str]:
    gc.collect()  # what others left does not close while we look
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def test_all_of_it_arrives_and_no_child_inherits_it() -> None:
    given = handed(CLIENTS)
    taken = passed(given)
    pairs = list(zip(given.clients, taken.clients, strict=True))
    assert all(one.text() == other.text() for one, other in pairs)
    assert all(os.path.sameopenfile(one.connection, other.connection) for one, other in pairs)
    assert os.path.sameopenfile(given.kept.arenas["p"], taken.kept.arenas["p"])
    assert taken.counted == given.counted
    assert taken.kept.remembered == given.kept.remembered
    assert taken.kept.files == given.kept.files
    assert taken.paths == given.paths
    assert taken.reached == given.reached
    assert taken.control is not None
    assert given.control is not None
    both = [(given.listeners, taken.listeners), (given.metrics, taken.metrics), ([given.control], [taken.control])]
    for mine, theirs in both:
        assert all(os.path.sameopenfile(a.fileno(), b.fileno()) for a, b in zip(mine, theirs, strict=True))
    descriptors = [other.connection for _, other in pairs] + list(taken.kept.arenas.values())
    descriptors += [listener.fileno() for listener in (taken.control, *taken.listeners, *taken.metrics)]
    assert not any(os.get_inheritable(descriptor) for descriptor in descriptors)
    given.close()
    taken.close()


def test_nothing_stays_open_where_it_is_no_text_that_we_know() -> None:
    given = handed(3)
    given.clients[1].contexts = (99,)  # type: ignore[assignment]
    before = open_descriptors()
    with pytest.raises(UserError, match="did not give away its connections"):
        passed(given)
    assert open_descriptors() == before
    given.close()


def test_a_server_that_is_starting_gives_nothing(tmp_path: Path) -> None:
    """It has no listeners yet: whoever took over now would have none."""
    config = ServerConfig(tcp=(), unix=(UnixAddress(path=tmp_path / "nbd.sock"),))

    async def story() -> None:
        service = Service(config)
        try:
            await service.start(listen=False)
            with pytest.raises(UserError, match="it is starting"):
                await service.takeover(str(tmp_path / "s"), os.getpid(), FORMAT, KNOWS, "", unit="")
            await service.listen()
            await service.takeover(str(tmp_path / "s"), os.getpid(), FORMAT, KNOWS, "", unit="")
            assert service.taken_over.is_set()
        finally:
            await service.stop()
        assert service.successor is not None
        service.successor.line.close()

    with listening(tmp_path / "s"):
        tell(story())


def test_a_server_without_addresses_is_taken_over_too(tmp_path: Path) -> None:
    """It serves whoever comes by control; what it has is not filled from a checkpoint as if it were new. It is ready
    until it waits: who is told otherwise takes his clients elsewhere."""
    config = ServerConfig(tcp=(), unix=())
    told: list[bool] = []

    async def story() -> None:
        service = Service(config)
        await service.start()
        await service.takeover(str(tmp_path / "s"), os.getpid(), FORMAT, KNOWS, "", unit="")
        given = await service.hand_over(lambda: told.append(service.status().draining or service.status().starting))
        assert told == [False]
        with socket.socket(socket.AF_UNIX) as control:
            assert [given.was_served, replace(given, control=control).was_served] == [False, True]
        given.close()
        assert service.successor is not None
        service.successor.line.close()

    with listening(tmp_path / "s"):
        tell(story())


def test_no_checkpoint_is_under_way_once_clients_wait_for_a_takeover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever takes over writes the next one."""
    kept = CheckpointConfig(directory=tmp_path / "kept")
    config = ServerConfig(exports=(DISK,), tcp=(), unix=(), checkpoint=kept)
    found: list[list[str]] = []

    async def story() -> None:
        service = Service(config)
        await service.start()
        writing = Gate(monkeypatch, Moments, "_copy_and_tell")
        taking = asyncio.create_task(service._checkpoints.take())
        await writing.until_reached()
        asyncio.get_running_loop().call_later(0.01, writing.open.set)
        service._nbd.prepare_to_hand_over()
        given = await service.hand_over(
            lambda: found.append([path.suffix for path in (tmp_path / "kept").iterdir() if "full" in path.name])
        )
        await taking
        given.close()

    tell(story())
    assert found == [[".stream"]]


def test_a_word_that_comes_in_the_last_moment_counts_and_later_there_is_no_way_for_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A process that is ended, or goes on, must not have told its clients of anything."""
    ended: list[int] = []
    monkeypatch.setattr(handover, "_end", lambda process, _: ended.append(process))

    def is_silent(*_: object) -> bytes:
        raise TimeoutError

    monkeypatch.setattr(handover, "receive_exactly", is_silent)
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(SERVING)
        assert give_away(Handover(), ours) == os.getpid()
    assert not ended
    ours, theirs = socket.socketpair()
    with theirs:
        assert give_away(Handover(), ours) is None
    assert ended == [os.getpid()]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert handover._last_word(ours) == b""
        with pytest.raises(BrokenPipeError):
            theirs.sendall(SERVING)


@pytest.mark.parametrize(
    ("end", "why"),
    [
        (lambda service: service.stop(), "the server stops"),
        (lambda service: service.hand_over(), "another process takes over; ask that one again"),
        (lambda service: service.changes.remove_pool("second"), "the pool is removed"),
    ],
    ids=["stop", "takeover", "removal"],
)
def test_who_waits_for_a_run_is_told_what_ended_it(end: Callable[[Service], Awaitable[object]], why: str) -> None:
    """Whoever hears that the server stops looks for his disks."""

    async def story() -> None:
        service = Service(ServerConfig(tcp=(), unix=()))
        await service.start()
        await service.changes.add_pool("second", 0, "fold")
        maintenance, begun = service._pools["second"].maintenance, threading.Event()
        maintenance._kinds = {"fold": lambda _: ScriptedRun(1 << 60, begun.set)}
        asked = asyncio.create_task(maintenance.run("fold", cpu_percent=1))
        await asyncio.to_thread(begun.wait)
        found = await end(service)
        for late in (asked, maintenance.run("fold")):
            with pytest.raises(UserError, match=f"^fold of the pool 'second' did not finish: {why}$"):
                await late
        assert maintenance.runs[-1].error == why
        if isinstance(found, Handover):
            found.close()
        else:
            await service.stop()

    tell(story())


def test_who_took_over_in_another_directory_removes_the_sockets_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ServerConfig(tcp=(), unix=(UnixAddress(path=Path("nbd.sock")),), exports=(DISK,))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)

    async def story() -> None:
        service = Service(config)
        await service.start()
        service._nbd.prepare_to_hand_over()
        handed = await service.hand_over()
        monkeypatch.chdir(elsewhere)
        with socket.socket(socket.AF_UNIX) as control:
            following = Service(config, handed=replace(handed, control=control))
            await following.start(listen=False)
            await following.listen()
            assert (tmp_path / "nbd.sock").is_socket()
            await following.stop()
        assert not (tmp_path / "nbd.sock").exists()

    tell(story())


def test_who_takes_over_has_longer_the_more_is_to_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ServerConfig(tcp=(), unix=(UnixAddress(path=tmp_path / "nbd.sock"),), exports=(DISK,))

    async def story() -> None:
        service = Service(config)
        await service.start()
        service._pools["default"].pool.disks()[0].write(0, os.urandom(1 << 20))
        handed = await service.hand_over()
        assert handed.stored_bytes == 1 << 20
        handed.close()

    tell(story())
    given: list[float | None] = []

    def is_told(receive: Any, *_: object) -> bytes:
        given.append(receive.__self__.gettimeout())
        return SERVING

    monkeypatch.setattr(handover, "receive_exactly", is_told)
    for gib in (0, 100):
        ours, theirs = socket.socketpair()
        with theirs:
            give_away(Handover(stored_bytes=gib << 30), ours)
    assert given == [15.0, 65.0]


def test_a_process_of_another_unit_is_refused_and_one_of_the_same_says_so_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No process of that number is seen here, as none is below PrivateUsers= and ProtectProc=."""
    monkeypatch.setattr(Machine, "unit", lambda _: "nbdzram.service")
    config = ServerConfig(tcp=(), unix=(UnixAddress(path=tmp_path / "nbd.sock"),))

    async def story() -> None:
        service = Service(config)
        await service.start()
        try:
            for other in ("", "trial.service"):
                with pytest.raises(UserError, match="`systemctl reload"):
                    await service.takeover(str(tmp_path / "s"), 1 << 30, FORMAT, KNOWS, "", unit=other)
            await service.takeover(str(tmp_path / "s"), 1 << 30, FORMAT, KNOWS, "", unit="nbdzram.service")
            assert service.taken_over.is_set()
        finally:
            await service.stop()
        assert service.successor is not None
        service.successor.line.close()

    with listening(tmp_path / "s"):
        tell(story())


def test_what_fails_while_it_ends_loses_no_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By then the clients are at rest and the pools closed: arenas that were not given away would be gone."""
    config = ServerConfig(
        tcp=(),
        unix=(UnixAddress(path=tmp_path / "nbd.sock"),),
        exports=(ExportConfig(name="disk", size_bytes=1 << 20),),
    )

    async def fail(_: str) -> None:
        raise KeyError("a mistake of ours")

    async def story() -> None:
        service = Service(config)
        await service.start()
        disk = service._pools["default"].pool.disks()[0]
        disk.write(0, b"x" * 4096)
        stop = service._streams.stop
        monkeypatch.setattr(service._streams, "stop", fail)
        handed = await service.hand_over()
        await stop()
        following = Service(config, handed=handed)
        await following.start()
        assert following._pools["default"].pool.disks()[0].read(0, 4096) == b"x" * 4096
        await following.stop()

    tell(story())


def test_clients_count_for_the_listener_by_which_they_came_in_whatever_it_is_called_now(tmp_path: Path) -> None:
    config = ServerConfig(tcp=(), unix=(UnixAddress(path=tmp_path / "nbd.sock"),), exports=(DISK,))

    async def story() -> None:
        first = Service(config)
        await first.start()
        client = await asyncio.to_thread(Wire, tmp_path / "nbd.sock", DISK.name)
        (before,) = origins(first)
        first._nbd.prepare_to_hand_over()
        given = await first.hand_over()
        given.uris[0] = given.clients[0].listener = "as another version calls it"
        second = Service(config, handed=given)
        await second.start(listen=False)
        await second.listen()
        (after,) = origins(second)
        assert after == before
        assert [after.listener] == second._nbd.uris
        await second.stop()
        client.socket.close()

    tell(story())


def lie_about(text: str) -> bytes:
    return len(text).to_bytes(4) + text.encode()


TRUTH = {
    "format": FORMAT,
    "listeners": 0,
    "control": False,
    "uris": [],
    "paths": [],
    "clients": [],
    "counted": json.loads(to_json(Counted())),
    "remembered": json.loads(to_json(Remembered())),
    "arenas": ["p"],
    "files": {},
}
LIES = {
    "more descriptors than it names": {},
    "what listens is no socket": {"listeners": 1, "arenas": ["p"]},
    "fewer than none": {"listeners": -1, "arenas": ["p", "q"]},
    "fewer than none for metrics": {"metrics": -1, "arenas": ["p", "q", "r"]},
    "one name twice": {"arenas": ["p", "p"]},
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_of_a_server_that_lies_about_its_descriptors_nothing_stays_open(lie: dict[str, object]) -> None:
    before = open_descriptors()
    with pytest.raises(UserError, match="did not give away its connections"):
        told(lie_about(json.dumps({**TRUTH, **lie})), descriptors=2)
    assert open_descriptors() == before


def test_what_the_lies_are_told_of_would_be_taken() -> None:
    """Else something else might be missed in each of them, and nothing said of descriptors."""
    handed = told(lie_about(json.dumps(TRUTH)), descriptors=1)
    (arena,) = handed.kept.arenas.values()
    os.close(arena)


def test_what_a_version_before_remembers_is_taken() -> None:
    """It does not know in which directory the disks are kept; nor whom those admitted that are gone."""
    remembered = {"format": 2, "exports": {}, "pools": {}}
    handed = told(lie_about(json.dumps({**TRUTH, "arenas": [], "remembered": remembered})), descriptors=0)
    assert handed.kept.remembered == Remembered()


def test_of_a_text_without_end_nothing_stays() -> None:
    with pytest.raises(UserError, match="did not give away its connections"):
        told(lie_about("[" * 100_000), descriptors=1)


def told(text: bytes, *, descriptors: int) -> Handover:
    """What is taken of a server that says this, and sends files without content."""
    ours, theirs = socket.socketpair()
    files = [os.memfd_create("p") for _ in range(descriptors)]
    try:
        with ours, theirs:
            ours.sendall(text)
            socket.send_fds(ours, [b"."], files)
            ours.shutdown(socket.SHUT_WR)
            return Handover.take(theirs)
    finally:
        for file in files:
            os.close(file)


def test_what_cannot_be_given_away_is_still_served() -> None:
    ours, theirs = socket.socketpair()
    given = Handover(counted=Counted(accepted=object()))  # type: ignore[arg-type]
    with theirs:
        assert give_away(given, ours) is None
    given.close()


@pytest.mark.parametrize(
    ("rules", "stays"),
    [({}, True), ({"allow_certificates": ("somebody",)}, False), ({"read_only": True}, False)],
    ids=["as they were", "others admitted", "nobody writes"],
)
def test_whoever_the_new_configuration_does_not_admit_is_not_carried_on(
    tmp_path: Path, rules: dict[str, Any], *, stays: bool
) -> None:
    """As where rules change while a server runs: no client outlives what admitted it."""
    path = tmp_path / "nbd.sock"
    before = ExportConfig(name="disk", size_bytes=1 << 20)

    def config(export: ExportConfig) -> ServerConfig:
        return ServerConfig(tcp=(), unix=(UnixAddress(path=path),), exports=(export,))

    async def story() -> None:
        service = Service(config(before))
        await service.start()
        client = await (await WireClient.connect(str(path))).go()
        service._nbd.prepare_to_hand_over()
        handed = await service.hand_over()
        following = Service(config(replace(before, **rules)), handed=handed)
        await following.start(listen=False)
        try:
            await following.listen()
            found = len(following.clients())
        finally:
            await following.stop()
        ended = await client.at_end()
        await client.close()
        assert (len(handed.clients), found, ended) == (1, stays, True)

    tell(story())


async def give_back(service: Service) -> Handover:
    service._nbd.prepare_to_hand_over()
    return await service.hand_over()


def test_what_was_removed_does_not_come_back_out_of_a_checkpoint(tmp_path: Path) -> None:
    config = ServerConfig(
        tcp=(), unix=(UnixAddress(path=tmp_path / "s"),), checkpoint=CheckpointConfig(directory=tmp_path / "kept")
    )

    async def story() -> None:
        service = Service(config)
        await service.start()
        await service.changes.add_export("disk", 1 << 20, pool=None, **UNCHANGED)
        await service._checkpoints.take()
        await service.changes.remove_export("disk", force=False)
        following = Service(config, handed=await give_back(service))
        await following.start(listen=False)
        await following.listen()
        found = following.status().exports
        await following.stop()
        assert found == ()

    tell(story())


def test_who_goes_on_alone_does_so_where_no_checkpoint_can_be_kept(tmp_path: Path) -> None:
    """As long as that is so they fail, and are told; disks in memory would be gone with the process."""
    place = tmp_path / "kept"
    config = ServerConfig(
        tcp=(), unix=(UnixAddress(path=tmp_path / "s"),), checkpoint=CheckpointConfig(directory=place)
    )

    async def story() -> None:
        service = Service(config)
        await service.start()
        await service.changes.add_export("disk", 1 << 20, pool=None, **UNCHANGED)
        handed = await give_back(service)
        place.rmdir()
        place.touch()
        following = Service(config, handed=handed)
        await following.start(listen=False)
        await following.listen()
        await following._checkpoints.take()
        failures = [following._checkpoints.status]
        place.unlink()
        await following._checkpoints.take()
        failures.append(following._checkpoints.status)
        await following.stop()
        assert [status.failures for status in failures if status] == [1, 1]
        assert (place / "00000001-full.stream").exists()

    tell(story())


def test_a_client_that_is_carried_on_is_who_it_was_and_a_newcomer_is_another(tmp_path: Path) -> None:
    path = tmp_path / "s"
    config = ServerConfig(
        tcp=(), unix=(UnixAddress(path=path),), exports=(ExportConfig(name="disk", size_bytes=1 << 20),)
    )

    async def story() -> None:
        service = Service(config)
        await service.start()
        client = await (await WireClient.connect(str(path))).go()
        (before,) = service.clients()
        following = Service(config, handed=await give_back(service))
        await following.start(listen=False)
        await following.listen()
        newcomer = await (await WireClient.connect(str(path))).go()
        carried, other = following.clients()
        await following.stop()
        for one in (client, newcomer):
            await one.close()
        assert (carried.number, carried.since) == (before.number, before.since)
        assert other.number > before.number

    tell(story())


def test_who_goes_on_alone_needs_nothing_that_another_version_wrote_in_its_place(tmp_path: Path) -> None:
    """A newer one started, noted what it found as it does, and failed."""
    config = ServerConfig(tcp=(), unix=(UnixAddress(path=tmp_path / "s"),), state_dir=tmp_path / "state")
    file = tmp_path / "state" / FILE_NAME

    async def story() -> None:
        service = Service(config)
        await service.start()
        await service.changes.add_export("disk", 1 << 20, pool=None, **{**UNCHANGED, "description": "mine"})
        handed = await give_back(service)
        file.write_text('{"format": 1000}')
        following = Service(config, handed=handed)
        await following.start(listen=False)
        await following.listen()
        (found,) = following.status().exports
        await following.stop()
        assert found.description == "mine"
        assert set(json.loads(file.read_text())["exports"]) == {"disk"}

    tell(story())


def origins(service: Service) -> list[Origin]:
    assert service._nbd._hosting is not None
    return list(service._nbd._hosting.origins.values())


def test_who_closes_what_was_handed_over_has_nothing_of_it_open() -> None:
    """Listeners, clients and arenas: what nobody serves any more would keep memory, and clients waiting."""
    before = sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208
    clients: list[Any] = [SimpleNamespace(connection=os.open(os.devnull, os.O_RDONLY)) for _ in range(2)]
    handed = Handover(
        listeners=[socket.socket(), socket.socket()],
        control=socket.socket(),
        clients=clients,
        kept=Kept(arenas={name: os.memfd_create(name) for name in ("one", "two")}),
    )
    handed.close()
    assert sorted(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
