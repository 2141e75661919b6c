"""The plane with threads and sockets of its own: who serves whom, what is counted, and that nobody is forgotten."""

from __future__ import annotations

import contextlib
import gc
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from nbdzram.engine.disk import Disk
from nbdzram.engine.pool import Pool
from nbdzram.ready import readable
from nbdzram.sessions.line import SocketLine
from nbdzram.sessions.plane import Plane
from nbdzram.sessions.session import Session
from nbdzram.sessions.stage import Ending
from nbdzram.sessions.tally import Tally
from nbdzram.sessions.throttle import Throttle
from nbdzram.unread import UNHEARD_SECONDS
from tests.support.rehearsal import Stage
from tests.wire import CMD_DISC, CMD_READ, CMD_WRITE, request

BLOCK, KIB = 4096, 1 << 10
SIMPLE_REPLY = 16
THREADS = 3


class House:
    """A plane, and clients of it on pairs of sockets."""

    def __init__(self) -> None:
        self.pool = Pool()
        self.disk: Disk = self.pool.create("disk", 64 << 20)
        self.plane = Plane(THREADS, 2, 1 << 25)
        self.tally = Tally()
        self.sessions: dict[int, Session] = {}
        self.refused: list[tuple[int, ...]] = []
        self._numbers = 0

    def attach(self, pair: tuple[socket.socket, socket.socket] | None = None) -> tuple[socket.socket, Session]:
        """One more client; it is not served before `plane.begin`."""
        ours, theirs = pair or socket.socketpair()
        self._numbers += 1
        session = self.plane.attach(
            SocketLine(theirs.detach()),
            number=self._numbers,
            disk=self.disk,
            tally=self.tally,
            throttle=Throttle(),
            style=0,
            read_only=False,
            contexts=(),
            payload_limit=32 << 20,
            connection_limit=4 << 20,
            syncs=False,
            greeting=b"",
            rest=b"",
        )
        self.sessions[self._numbers] = session
        return ours, session

    def client(self) -> tuple[socket.socket, Session]:
        """One more client, served."""
        ours, session = self.attach()
        self.plane.begin(session)
        return ours, session

    def hear(self) -> None:
        """Wait until a thread has something to tell, and see to it."""
        readable(self.plane.fileno())
        tidings, notices = self.plane.collect()
        self.refused += notices
        for session, _, _, gone in tidings:
            if gone:
                del self.sessions[session.number]
                self.plane.bury(session)

    def empty(self) -> None:
        """Until everybody is gone."""
        while self.sessions:
            self.hear()


@pytest.fixture
def house() -> Iterator[House]:
    made = House()
    yield made
    for session in list(made.sessions.values()):
        made.plane.abort(session)
    made.empty()
    made.plane.stop()
    made.pool.close()


def take(client: socket.socket, size: int) -> bytes:
    """Exactly so many bytes."""
    taken = b""
    while len(taken) < size:
        more = client.recv(size - len(taken))
        assert more, f"the end came after {len(taken)} bytes of {size}"
        taken += more
    return taken


def test_clients_are_spread_over_the_threads(house: House) -> None:
    clients = [house.client()[0] for _ in range(3 * THREADS)]
    assert [thread.sessions for thread in house.plane.threads] == [3] * THREADS
    for client in clients:
        client.sendall(request(CMD_READ, 0, 512))
        assert len(take(client, SIMPLE_REPLY + 512)) == SIMPLE_REPLY + 512
        client.close()
    house.empty()
    assert [thread.sessions for thread in house.plane.threads] == [0] * THREADS
    assert all(thread.busy_seconds() > 0 for thread in house.plane.threads)
    assert house.plane.budget.used == 0


def test_a_client_may_stand_still_for_ever_and_one_that_was_hung_up_on_may_not(house: House) -> None:
    """The system forgets what it has not taken by then, and its socket (TCP_USER_TIMEOUT)."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    with ours, theirs.dup() as witness:

        def unheard_ms() -> int:
            return witness.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)

        witness.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1)  # as in the handshake
        _, session = house.attach((ours, theirs))
        house.plane.begin(session)
        ours.sendall(request(CMD_READ, 0, 512))
        take(ours, SIMPLE_REPLY + 512)
        assert unheard_ms() == 0
        ours.sendall(request(CMD_DISC, 0, 0))
        house.empty()
        assert unheard_ms() == UNHEARD_SECONDS * 1000


def test_every_request_is_counted_once_whichever_thread_serves_it(house: House) -> None:
    """Three clients on three threads at once, over one export."""
    each, batch = 20_000, 500

    def ask(client: socket.socket) -> None:
        for _ in range(each // batch):
            client.sendall(request(CMD_READ, 0, 512) * batch)
            take(client, batch * (SIMPLE_REPLY + 512))

    clients = [house.client()[0] for _ in range(THREADS)]
    askers = [threading.Thread(target=ask, args=(client,)) for client in clients]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    for client in clients:
        client.close()
    house.empty()  # the duration of a turn is counted behind its last reply
    assert house.tally.total_requests() == THREADS * each
    counted = house.tally.operation(CMD_READ)
    assert counted is not None
    assert counted[:2] == (THREADS * each, THREADS * each * 512)
    assert sum(counted[4]) == THREADS * each


@pytest.mark.parametrize("wish", ["drain", "abort", "both"])
def test_a_wish_that_comes_before_the_client_is_served_is_not_lost(house: House, wish: str) -> None:
    """Rings that meet on their way are one letter; each wish in it is done."""
    for _ in range(50):
        client, session = house.attach()
        house.plane.begin(session)
        if wish in ("drain", "both"):
            house.plane.drain(session)
        if wish in ("abort", "both"):
            house.plane.abort(session)
        with contextlib.suppress(ConnectionError):
            assert client.recv(1) == b""
        client.close()
        house.empty()
    assert house.plane.budget.used == 0


def test_who_comes_and_goes_at_once_a_thousand_times_leaves_nothing(house: House) -> None:
    """Ends of every kind: said, closed, reset in the middle of a request and of a payload, cut by the server."""
    for number in range(1000):
        client, session = house.client()
        with contextlib.suppress(ConnectionError):
            if number % 5 == 0:
                client.sendall(request(CMD_DISC, 0, 0))
            elif number % 5 == 1:
                client.sendall(request(CMD_READ, 0, 64 * KIB) * 20)
            elif number % 5 == 2:
                client.sendall(request(CMD_WRITE, 0, 4 << 20) + bytes(100 * KIB))
            elif number % 5 == 3:
                client.sendall(request(CMD_READ, 0, 4096)[:17])
            else:
                house.plane.abort(session)
        client.close()
        if number % 7 == 0:
            house.hear()
    house.empty()
    assert house.plane.budget.used == 0
    assert sum(thread.sessions for thread in house.plane.threads) == 0


def test_refusals_are_told_as_they_are_and_a_flood_of_them_is_bounded(house: House) -> None:
    client, session = house.client()
    client.sendall(request(CMD_READ, 1 << 40, 512) * 200 + request(CMD_DISC, 0, 0))
    take(client, 200 * SIMPLE_REPLY)
    house.empty()
    assert session.error_count == 200
    assert session.ending is Ending.LEFT
    assert set(house.refused) == {(1, 4, CMD_READ, 0, 1 << 40, 512, 64 << 20)}
    assert len(house.refused) == 10
    client.close()


def test_a_client_that_left_is_not_remembered(house: House) -> None:
    """Neither by its thread nor by the plane: who comes and goes costs nothing in the end."""
    for _ in range(5):
        client, session = house.client()
        client.sendall(request(CMD_DISC, 0, 0))
        assert client.recv(1) == b""
        client.close()
        del session
    house.empty()
    while remembered := sum(isinstance(thing, Session) for thing in gc.get_objects()):
        assert readable(house.plane.fileno(), seconds=30), f"{remembered} sessions are kept"
        house.plane.collect()


def test_what_came_too_late_to_be_performed_does_not_reset_the_connection(house: House) -> None:
    """More than an inbox behind a DISC: the client reads its replies, and then the end."""
    client, session = house.attach()
    client.sendall(request(CMD_READ, 0, 512) + request(CMD_DISC, 0, 0) + bytes(50 * KIB))
    house.plane.begin(session)
    assert len(take(client, SIMPLE_REPLY + 512)) == SIMPLE_REPLY + 512
    assert client.recv(1) == b""
    client.close()
    house.empty()


def test_a_client_that_takes_a_little_of_an_answer_does_not_stand_still() -> None:
    stage = Stage(1 << 20)
    client = stage.attach(style=0)
    client.line.room = 0
    client.send(request(CMD_READ, 0, 1 << 19))
    stage.settle()
    before = time.monotonic()
    client.line.room = 1000
    stage.settle()
    assert client.line.watched == 2, "it owes the rest"
    assert client.session.idle_seconds <= time.monotonic() - before
    client.line.reset = True
    stage.plane.abort(client.session)
    stage.close()
