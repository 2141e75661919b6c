"""What becomes of a session in each situation by each thing that can happen then, as it was: rehearsed.txt.

python -m tests.unit.sessions.test_rehearsed        writes it anew, after a change that is meant
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from nbdzram.config import Limits
from nbdzram.ready import readable
from nbdzram.sessions.rehearsal import RehearsalLine, age, pass_time, rest, serve
from nbdzram.sessions.stage import Ending
from nbdzram.sessions.stage import Stage as Ends
from tests.support.rehearsal import Client, Stage
from tests.wire import (
    CMD_BLOCK_STATUS,
    CMD_DISC,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    request,
)

REHEARSED = Path(__file__).with_name("rehearsed.txt")
BLOCK, KIB, MIB = 4096, 1 << 10, 1 << 20
SIZE = 32 * MIB
FUA, NO_HOLE = 1, 2
SPAN = 120  # less than a machine that runs tests has been up: its clock begins at 0
NANOSECONDS = 10**9
PLENTY = 1 << 40
BUDGET = 3 * MIB  # less than the longest answers take


class Watched(Stage):
    """A stage that tells all that can be seen of a session."""

    def __init__(self) -> None:
        super().__init__(SIZE, budget=BUDGET)
        self.notices: list[Any] = []
        self.seen = 0  # bytes and gifts that were told of
        self.gifts = 0
        self.turns = 0
        self.rest = b""

    def begin(self, style: int, *, syncs: bool, limited: bool) -> Client:
        self.disk.trim(0, SIZE)
        self.disk.write(0, bytes(range(1, 252)) * 3000)
        self.disk.write(SIZE - BLOCK, b"\x07" * BLOCK)
        self.throttle.limit((2, 2) if limited else (0, 0), (0, 0), SPAN)
        self.tallies.clear()
        self.notices, self.seen, self.gifts, self.rest = [], 0, 0, b""
        return self.attach(
            style=style,
            contexts=2 if style else 0,
            syncs=syncs,
            limits=Limits(connection_bytes=MIB, payload_bytes=8 * MIB),
        )

    def settle(self) -> None:
        """The same, and count how often it is its turn."""
        going = True
        while going:
            served = sum(map(self.serve, self.clients.values()))
            self.turns += served
            going = served > 0
            while readable(self.desk.fileno(), seconds=0):
                self.desk.turn()
                self.turns += 1
                going = True
            self.hear()

    def hear(self) -> None:
        tidings, notices = self.plane.collect()
        self.notices += [notice[1:] for notice in notices]
        for session, _, _, gone in tidings:
            if gone:
                self.clients.pop(session.number, None)
                self.plane.bury(session)

    def told(self, client: Client) -> str:
        session, line = client.session, client.line
        answers, gifts = bytes(line.outgoing[self.seen :]), line.gifts[self.gifts :]
        words = [f"{Ends(session.stage).name} asked {session.requests} in {self.turns}"]
        self.seen, self.gifts, self.turns = len(line.outgoing), len(line.gifts), 0
        if answers:
            words.append(f"{len(answers)} bytes {zlib.crc32(answers):08x} in {gifts if len(gifts) < 9 else len(gifts)}")
        figures = {
            "under way": session.in_flight,
            "storing": session.storing,
            "to come": session.payload_remaining,
            "errors": session.error_count,
            "left in the line": len(line.incoming),
            "held": self.plane.budget.used,
            "wait for a turn": self.plane.turns.waiting,
            "unsynced": self.plane.syncs_asked(session),
        }
        marks = {
            "midway": session.midway,
            "waits for its peer": session.waits_for_peer,
            "left": session.left,
            "released": session.released,
            "closed": line.closed,
            "in order": line.closed_in_order,
        }
        words += [f"{name} {figure}" for name, figure in figures.items() if figure]
        words += [name for name, holds in marks.items() if holds]
        if session.ending:
            words.append(f"{Ending(session.ending).name} {session.ending_value}")
        if session.released and not self.rest:
            self.rest = session.take_rest() or b"-"
            words.append(f"rest {len(self.rest)} {zlib.crc32(self.rest):08x}")
        words.append(f"watched {line.watched}")
        words += [f"notice {notice}" for notice in self.notices]
        self.notices.clear()
        return ", ".join(words)

    def counted(self) -> str:
        (tally,) = self.tallies.values()
        told = []
        for number in range(9):
            if (found := tally.operation(number)) is not None:
                requests, size, _, errors, latencies = found
                wrong = {verdict: count for verdict, count in enumerate(errors) if count}
                told.append(f"{number}: {requests} {size} {wrong or ''} {sum(latencies)}")
        return f"{'; '.join(told)}; trimmed {tally.blocks_trimmed()}; waited {tally.throttled()[0]}"


Ask = Callable[..., bytes]


class Scene(NamedTuple):
    """One client on the stage."""

    stage: Watched
    client: Client
    style: int

    def ask(self, *given: int, **named: int) -> bytes:
        return request(*given, **named, extended=self.style == 2)

    @property
    def line(self) -> RehearsalLine:
        return self.client.line


Act = Callable[[Scene], None]


def sends(*parts: Callable[[Ask], bytes], room: int = PLENTY, turns: int = 0) -> Act:
    """What it sends; `turns`: served so often, and no further."""

    def bring(scene: Scene) -> None:
        scene.line.room = room
        scene.client.send(b"".join(part(scene.ask) for part in parts))
        for _ in range(turns):
            serve(scene.stage.desk, scene.client.session)
        if not turns:
            scene.stage.settle()

    return bring


SITUATIONS: dict[str, Act] = {
    "at rest": sends(),
    "answered": sends(lambda ask: ask(CMD_READ, 3, BLOCK) + ask(CMD_WRITE, 5, 7) + b"written"),
    "half a header": sends(lambda ask: ask(CMD_READ, 0, 512)[:10]),
    "a header and no payload": sends(lambda ask: ask(CMD_WRITE, 0, 600)),
    "half a payload": sends(lambda ask: ask(CMD_WRITE, 1, 60 * KIB) + b"w" * 30 * KIB),
    "half a large payload": sends(lambda ask: ask(CMD_WRITE, 1, MIB) + b"w" * 300 * KIB),
    "half a payload that is refused": sends(lambda ask: ask(CMD_WRITE, SIZE - 1, MIB) + b"w" * 300 * KIB),
    "an answer that is not read": sends(lambda ask: ask(CMD_READ, 0, 512), room=10),
    "a long answer that is not read": sends(lambda ask: ask(CMD_READ, 0, 2 * MIB), room=100 * KIB),
    "more than the budget is not read": sends(lambda ask: ask(CMD_READ, 0, 6 * MIB), room=100 * KIB),
    "many answers that are not read": sends(lambda ask: ask(CMD_READ, 7, 30 * KIB) * 90, room=0),
    "a long READ": sends(lambda ask: ask(CMD_READ, 0, 8 * MIB), turns=1),
    "a large WRITE has begun behind a long READ": sends(
        lambda ask: ask(CMD_READ, 0, 2 * MIB) + ask(CMD_WRITE, 9, 2 * MIB) + b"w" * 1000, room=100 * KIB
    ),
    "one that is refused has begun behind a long READ": sends(
        lambda ask: ask(CMD_READ, 0, 2 * MIB) + ask(CMD_WRITE, SIZE, MIB) + b"w" * 1000, room=100 * KIB
    ),
    "a large WRITE": sends(lambda ask: ask(CMD_WRITE, 9, 2 * MIB) + b"w" * 2 * MIB, turns=9),
    "a long TRIM": sends(lambda ask: ask(CMD_TRIM, 0, SIZE), turns=1),
    "long zeroes": sends(lambda ask: ask(CMD_WRITE_ZEROES, 1, SIZE - 1, flags=NO_HOLE), turns=1),
    "a long look": sends(lambda ask: ask(CMD_BLOCK_STATUS, 0, SIZE), turns=1),
    "two hundred requests": sends(lambda ask: ask(CMD_READ, 1 << 62, 1) * 200, turns=1),
    "waits for a sync": sends(lambda ask: ask(CMD_FLUSH, 0, 0) + ask(CMD_WRITE, 0, 4, flags=FUA) + b"sync"),
    "its trim waits for a sync": sends(lambda ask: ask(CMD_TRIM, 0, BLOCK, flags=FUA)),
    "its zeroes wait for a sync": sends(lambda ask: ask(CMD_WRITE_ZEROES, 0, BLOCK, flags=FUA)),
    "nothing waits for a sync": sends(lambda ask: ask(CMD_TRIM, 0, BLOCK) + ask(CMD_READ, 0, 9, flags=FUA)),
    "commands that there are not": sends(lambda ask: b"".join(ask(command, 0, 0) for command in (8, 9, 10, 77, 65535))),
    "waits for its limit": sends(lambda ask: ask(CMD_READ, 0, 1) + ask(CMD_WRITE, 0, 3) + b"abc" + ask(CMD_READ, 1, 2)),
    "a payload waits for its limit": sends(lambda ask: ask(CMD_READ, 0, 1) * 2 + ask(CMD_WRITE, 0, 3) + b"abc"),
    "leaves": sends(lambda ask: ask(CMD_READ, 0, 512) + ask(CMD_DISC, 0, 0) + ask(CMD_READ, 0, 512)),
    "leaves and does not read": sends(lambda ask: ask(CMD_READ, 0, 512) + ask(CMD_DISC, 0, 0), room=8),
    "nonsense": sends(lambda ask: ask(CMD_READ, 0, 512) + b"nonsense" * 5),
    "too long a payload": sends(lambda ask: ask(CMD_READ, 0, 512) + ask(CMD_WRITE, 0, 9 * MIB)),
}


def reads(scene: Scene) -> None:
    scene.line.room = PLENTY


def goes_on(scene: Scene) -> None:
    scene.line.room = PLENTY
    scene.client.send(b"r" * scene.client.session.payload_remaining)


def seconds(scene: Scene) -> None:
    for _ in range(3):
        rest(scene.stage.desk, scene.client.session)


def ages(scene: Scene) -> None:
    age(scene.client.session, 6)
    rest(scene.stage.desk, scene.client.session)


def synced(scene: Scene, *, failed: bool = False) -> None:
    plane, session = scene.stage.plane, scene.client.session
    plane.synced(session, plane.syncs_asked(session), failed)


def may_go_on(scene: Scene) -> None:
    scene.stage.throttle.limit((0, 0), (0, 0))
    scene.stage.plane.go_on(scene.client.session)


EVENTS: dict[str, Act] = {
    "the peer reads": reads,
    "the rest comes": goes_on,
    "a request comes": lambda scene: scene.client.send(scene.ask(CMD_READ, 0, 9)),
    "the peer sends no more": lambda scene: setattr(scene.line, "sends_no_more", True),
    "the line breaks": lambda scene: setattr(scene.line, "reset", True),
    "it is drained": lambda scene: scene.stage.plane.drain(scene.client.session),
    "it is released": lambda scene: scene.stage.plane.release(scene.client.session),
    "it is cut": lambda scene: scene.stage.plane.abort(scene.client.session),
    "three seconds": seconds,
    "six seconds of closing": ages,
    "it is synced": synced,
    "it cannot be synced": lambda scene: synced(scene, failed=True),
    "two minutes": lambda scene: pass_time(scene.stage.desk, scene.stage.throttle, SPAN * NANOSECONDS),
    "no limit": may_go_on,
}


def played(stage: Watched, style: int, situation: str, event: Act) -> Iterator[str]:
    """What the situation is, what comes of the event, and how it ends then."""
    client = stage.begin(style, syncs="sync" in situation, limited="limit" in situation)
    scene = Scene(stage, client, style)
    SITUATIONS[situation](scene)
    yield stage.told(client)
    event(scene)
    stage.settle()
    yield stage.told(client)
    ends = ""
    if not client.over:
        client.line.room, client.line.sends_no_more = PLENTY, True
        may_go_on(scene)
        synced(scene)
        stage.settle()
        ends = f"at its end {stage.told(client)}; "
    yield f"{ends}counted {stage.counted()}"
    assert client.over
    assert stage.plane.budget.used == 0


def lines() -> Iterator[str]:
    """What an event does not change is told once."""
    stage = Watched()
    for style, situation in product(range(3), SITUATIONS):
        nothing = list(played(stage, style, situation, lambda _: None))
        yield f"{style} {situation}: {nothing[0]}"
        yield from (f"{style} {situation}, nothing: {line}" for line in nothing[1:])
        unmoved = []
        for happens, event in EVENTS.items():
            _, became, ended = played(stage, style, situation, event)
            if [became, ended] == nothing[1:]:
                unmoved.append(happens)
            else:
                yield f"{style} {situation}, {happens}: {became}"
                yield f"{style} {situation}, {happens}: {ended}"
        yield f"{style} {situation}, as nothing: {', '.join(unmoved)}"
    stage.close()


def test_each_thing_that_happens_makes_of_a_session_what_it_did() -> None:
    assert list(lines()) == REHEARSED.read_text(encoding="utf-8").splitlines()


if __name__ == "__main__":
    REHEARSED.write_text("".join(f"{line}\n" for line in lines()), encoding="utf-8")
