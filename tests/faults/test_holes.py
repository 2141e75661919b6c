"""What clients make the server hold, in whatever order they ask and leave, is what requests may hold, and no more."""

from __future__ import annotations

from dataclasses import dataclass

from tests.faults.crowd import KIB, MIB, SETTLE_SECONDS, Crowd, Watch
from tests.support.nbd_client import Client
from tests.support.server import Nbdzram
from tests.wire import CMD_WRITE, SIMPLE_REPLY, request

BUDGET = 32 * MIB
PIECES = tuple(size * KIB for size in (66, 264, 1040, 4096))


@dataclass
class Begun:
    """A WRITE of which a byte is to come."""

    client: Client
    size: int

    def finish(self) -> None:
        self.client.socket.sendall(b"\0")
        self.client.receive(SIMPLE_REPLY.size)


def begin(server: Nbdzram, size: int, crowd: Crowd) -> Begun:
    client = Client(server.unix_path, "disk")
    crowd.members.append(client.socket)
    client.socket.sendall(request(CMD_WRITE, 0, size) + bytes(size - 1))
    return Begun(client, size)


def test_clients_that_leave_holes_too_small_for_the_next_hold_no_more_than_there_is_for_requests(
    target: Nbdzram, crowd: Crowd
) -> None:
    """Each round fills what is left with larger payloads and ends all but so many that the next ones fit nowhere in
    between; nobody leaves. A heap grew by as much each time, and kept it for as long as anybody stayed."""
    watch = Watch(target)
    held: list[Begun] = []
    for size, following in zip(PIECES, (*PIECES[1:], 8 * PIECES[-1]), strict=True):
        room = BUDGET - sum(one.size for one in held) - size - MIB // 2
        held += [begin(target, size, crowd) for _ in range(room // size)]
        kept, hole = [], 0
        for one in held:
            hole += one.size
            if hole + one.size >= following:
                kept.append(one)
                hole = 0
            else:
                one.finish()
        held = kept
    assert watch.peak_growth < BUDGET + BUDGET // 4 + 12 * MIB
    for one in held:
        one.finish()
    target.wait_until(lambda: watch.growth < 12 * MIB, SETTLE_SECONDS)
