"""How many threads serve clients and large requests: as many as processors may be used, within bounds."""

from __future__ import annotations

import asyncio
import errno
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import pytest
import uvloop

from nbdzram.config import ExportConfig, Limits, ServerConfig, TlsConfig, TlsMode
from nbdzram.engine.pool import Pool
from nbdzram.nbd.handshake import Failure, Policy
from nbdzram.server import hosting
from nbdzram.server.attached import Attached
from nbdzram.server.exports import Exports
from nbdzram.server.handover import Counted
from nbdzram.server.hosting import PROCESSORS_MOST, THREADS_BY_DEFAULT, Hosting
from nbdzram.server.loading import served_alone
from nbdzram.server.lobby import Origin
from nbdzram.sessions.line import Line
from nbdzram.sessions.plane import MOST_IO_THREADS, Plane
from nbdzram.sessions.session import Session
from nbdzram.sessions.stage import Ending
from nbdzram.settings import MOST_THREADS
from tests.support.loop_client import WireClient
from tests.unit.server.house import MIB, Delegate, House, tell
from tests.unit.server.test_lobby import Stranger, arrive

TASKS_OF_ASYNCIO = 32  # ThreadPoolExecutor's most: min(32, processors + 4)
TASKS_MAX = 128  # the least that a unit of systemd has been shipped with


@pytest.mark.parametrize(
    ("configured", "processors", "started"),
    [
        (0, 3, (3, 3)),
        (0, 256, (THREADS_BY_DEFAULT, PROCESSORS_MOST)),
        (5, 3, (5, 3)),
        (1, 256, (1, PROCESSORS_MOST)),
    ],
)
def test_processors_that_may_be_used_give_threads_up_to_a_bound(
    monkeypatch: pytest.MonkeyPatch, configured: int, processors: int, started: tuple[int, int]
) -> None:
    asked = []

    def counted(threads: int, processors: int, budget_bytes: int) -> Plane:
        asked.append((threads, processors))
        return Plane(1, 1, budget_bytes)

    class Large:
        def processors(self) -> int:
            return processors

    async def story() -> None:
        Hosting(Exports(None), ServerConfig(threads=configured)).stop()

    monkeypatch.setattr(hosting, "Plane", counted)
    monkeypatch.setattr(hosting, "Machine", Large)
    uvloop.run(story())
    assert asked == [started]


def test_all_threads_fit_into_the_units_limit_of_tasks() -> None:
    assert THREADS_BY_DEFAULT + PROCESSORS_MOST + TASKS_OF_ASYNCIO < TASKS_MAX


def test_as_many_threads_may_be_asked_for_as_there_is_room_for() -> None:
    """settings stands below sessions, and says the number again."""
    assert MOST_THREADS == MOST_IO_THREADS


def test_limits_that_are_read_again_hold_for_who_haggles_too() -> None:
    async def story() -> None:
        hosting = Hosting(Exports(None), ServerConfig(threads=1, limits=Limits(connections=8)))
        hosting.adopt(ServerConfig(limits=Limits(connections=4)), None)
        strangers = arrive(hosting.lobby, "tcp", "192.0.2.1", 5)
        assert [stranger.present for stranger in strangers] == [False, True, True, True, True]
        hosting.stop()

    uvloop.run(story())


def test_what_a_server_counted_of_strangers_goes_over_to_the_next() -> None:
    async def story() -> None:
        one, other = (Hosting(Exports(None), ServerConfig(threads=1)) for _ in range(2))
        one.accepted, one.protocol_errors = 7, 3
        one.handshake_failures.update(dict.fromkeys(Failure, 2))
        other.go_on_from(one.counted())
        assert (other.accepted, other.protocol_errors) == (7, 3)
        assert other.handshake_failures == dict.fromkeys(Failure, 2)
        one.stop()
        other.stop()

    uvloop.run(story())


def test_those_who_are_attached_are_laid_to_rest_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time a while after the last; and not while nobody is attached."""

    async def story() -> None:
        asked: list[tuple[object, ...]] = []
        hosting = Hosting(Exports(None), ServerConfig(threads=1))
        monkeypatch.setattr(hosting, "loop", SimpleNamespace(call_later=lambda *given: asked.append(given)))
        hosting._rest_sessions()
        hosting.attached[1] = None  # type: ignore[assignment]
        hosting._rest_sessions()
        del hosting.attached[1]
        monkeypatch.undo()
        hosting.stop()
        assert asked == [(1.0, hosting._rest_sessions)]

    uvloop.run(story())


FIRST = ServerConfig(
    threads=1,
    list_exports=False,
    limits=Limits(handshake_seconds=23.0, handshake_options=29, connections=31, payload_bytes=37 << 20),
)
SECOND = ServerConfig(
    threads=1,
    limits=Limits(handshake_seconds=41.0, handshake_options=43, connections=47, payload_bytes=53 << 20),
)


def test_each_limit_arrives_where_it_holds_at_the_start_and_when_it_is_changed() -> None:
    async def story() -> None:
        hosted = Hosting(Exports(None), FIRST)
        for config in (FIRST, SECOND):
            limits = config.limits
            assert hosted.limits == limits
            assert hosted.policy == Policy(
                tls=TlsMode.OFF,
                list_exports=config.list_exports,
                option_limit=limits.handshake_options,
                payload_limit=limits.payload_bytes,
            )
            assert hosted.places.attached == limits.connections
            assert hosted.lobby.places == hosted.places.haggling
            hosted.adopt(SECOND, None)
        hosted.stop()

    uvloop.run(story())


def test_what_holds_for_a_client_arrives_where_it_is_served(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.exports = (ExportConfig(name="disk", size_bytes=MIB, read_only=True),)
    limits = Limits(payload_bytes=37 << 20, connection_bytes=5 << 20)

    async def story() -> None:
        async with house.open(limits=limits, state_dir=None):
            seen: list[dict[str, Any]] = []
            hosted = house.service._nbd._hosting
            assert hosted is not None
            plane = hosted.plane

            def attach(line: Line, **given: Any) -> Session:
                seen.append(given)
                return plane.attach(line, **given)

            hosted.plane = Delegate(plane, attach=attach)  # type: ignore[assignment]
            client = await house.client()
            await client.close()
            hosted.plane = plane
            export = house.service._exports.get("disk")
            (given,) = seen
            del given["greeting"]
            assert given == {
                "number": 1,
                "disk": export.disk,
                "tally": export.traffic,
                "throttle": export.throttle,
                "style": 1,
                "read_only": True,
                "contexts": (),
                "payload_limit": 37 << 20,
                "connection_limit": 5 << 20,
                "syncs": False,
                "rest": b"",
                "line_bytes": 0,
            }

    tell(story())


def test_what_was_counted_is_counted_on_each_figure_at_its_place() -> None:
    async def story() -> None:
        failures = {str(cause): number for number, cause in enumerate(Failure, start=11)}
        told = Counted(accepted=3, protocol_errors=5, handshake_failures=failures, last_client=7)
        hosted = Hosting(Exports(None), FIRST)
        hosted.go_on_from(told)
        assert (hosted.accepted, hosted.protocol_errors, hosted.number_client()) == (3, 5, 8)
        assert hosted.counted() == replace(told, last_client=8)
        hosted.stop()

    uvloop.run(story())


def test_it_is_quiet_while_no_connection_is_open() -> None:
    async def story() -> None:
        hosting = Hosting(Exports(None), ServerConfig(threads=1))
        strangers: list[Any] = [Stranger(Origin("tcp", "192.0.2.1")) for _ in range(3)]

        async def is_quiet() -> bool:
            waiting = asyncio.ensure_future(hosting.wait_quiet())
            await asyncio.sleep(0)
            waiting.cancel()
            return waiting.done()

        assert await is_quiet()
        for _ in range(2):
            for stranger in strangers:
                hosting.begin(stranger)
                assert not await is_quiet()
            for stranger in strangers:
                assert not await is_quiet()
                hosting.end_haggling(stranger)
            assert await is_quiet()
        hosting.stop()

    uvloop.run(story())


LIMIT = 3 * MIB
ENDS: dict[Ending, str | None] = {
    Ending.NOT_ENDING: None,
    Ending.LEFT: None,
    Ending.CUT: None,
    Ending.LINE_BROKE: None,
    Ending.BAD_MAGIC: "bad request magic",
    Ending.LONG_PAYLOAD: f"a payload of 77 bytes: the limit is {LIMIT}",
    Ending.HALF_A_REPLY: "stored bytes do not decode in the middle of a reply",
    Ending.TOO_SLOW: "77 bytes of a payload came in 5 s while others wait for room, and 524288 are asked",
    Ending.NO_MEMORY: "the system has no memory for its buffers",
    Ending.BARREN_RECORDS: "77 TLS records without data: at most 32 are taken",
}


@pytest.mark.parametrize("ending", Ending)
def test_each_way_that_a_client_ends_is_told_in_words_of_its_own(
    ending: Ending, caplog: pytest.LogCaptureFixture
) -> None:
    of = SimpleNamespace(limits=Limits(payload_bytes=LIMIT), protocol_errors=0)
    client: Any = SimpleNamespace(
        _who="who", _hosting=of, _payload_limit=LIMIT, session=SimpleNamespace(ending=int(ending), ending_value=77)
    )
    Attached.ended(client)
    said = ENDS[ending]
    assert caplog.messages == ([] if said is None else [f"who: {said}; disconnecting"])
    assert of.protocol_errors == (ending in (Ending.BAD_MAGIC, Ending.LONG_PAYLOAD, Ending.HALF_A_REPLY))


@pytest.mark.parametrize("midway", [True, False])
@pytest.mark.parametrize(
    ("lack", "said"),
    [
        (errno.ENOSPC, "the system watches no more connections of this user (sysctl fs.epoll.max_user_watches)"),
        (errno.ENOMEM, "the system has no memory for its connection"),
        (errno.ENOBUFS, "the system has no memory for its connection"),
    ],
)
def test_who_is_cut_as_the_system_lacks_something_did_not_go_away(
    lack: int, said: str, midway: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """It stood in the log where it was in the middle of a request alone, as a connection that broke: no space left on
    device."""
    session = SimpleNamespace(
        ending=int(Ending.LINE_BROKE), ending_value=lack, midway=midway, left=False, released=False, error_count=0
    )
    export = SimpleNamespace(connections=SimpleNamespace(discard=lambda _: None))
    closed = SimpleNamespace(set_result=lambda _: None)
    client: Any = SimpleNamespace(_who="who", session=session, export=export, closed=closed, _hosting=None)
    Attached.ended(client)
    Attached.gone(client)
    told = [record.message for record in caplog.records if record.levelno > logging.DEBUG]
    assert told == [f"who: {said}; disconnecting"]


@pytest.mark.parametrize("act", [Attached.drain, Attached.release, Attached.abort])
def test_nothing_is_asked_of_the_threads_for_who_is_gone(act: Any) -> None:
    """They have let go of it: nobody hears that bell."""
    loop = asyncio.new_event_loop()
    closed = loop.create_future()
    closed.set_result(None)
    loop.close()
    act(SimpleNamespace(closed=closed, _hosting=SimpleNamespace(), session=SimpleNamespace()))


def test_whoever_loads_a_disk_is_let_in_whatever_clients_are_asked_for(certificate: tuple[Path, Path]) -> None:
    """Without TLS, over several connections, on a socket that is gone behind it."""
    certificate_file, key = certificate
    config = ServerConfig(
        limits=Limits(connections=1, handshake_seconds=0),
        tls=TlsConfig(mode=TlsMode.REQUIRE, certificate=certificate_file, key=key),
    )

    async def story(pool: Pool) -> str:
        async with served_alone(pool.create("disk", MIB), config) as uri:
            path = unquote(uri.partition("socket=")[2])
            clients = [await (await WireClient.connect(path)).go(b"disk") for _ in range(4)]
            for number, client in enumerate(clients):
                await client.write(number * 4096, bytes([number]) * 4096)
            assert (await clients[0].read(3 * 4096, 4096)) == b"\3" * 4096
            for client in clients:
                await client.close()
        return path

    with Pool() as pool:
        assert not Path(uvloop.run(story(pool))).exists()
