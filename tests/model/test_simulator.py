"""Thousands of clients on a simulated network, by a seed: any pieces, any room, resets, drains and takeovers, while
memory is short and somebody stands still in the middle of a payload for which all others wait.

Each client has a part of the export for itself, and a plain model of it. One that is drained connects again and asks
for what was not answered; one that is released goes on elsewhere, on the same line. Everything that happens is drawn
from the seed, so a failure is played again by it: NBDZRAM_SEED=n pytest tests/model/test_simulator.py.
"""

from __future__ import annotations

import os
import random

import pytest

from nbdzram.config import Limits
from nbdzram.sessions.rehearsal import rest
from tests.support.rehearsal import Client, Stage
from tests.wire import CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES, request

KIB, MIB = 1 << 10, 1 << 20
PART = 128 * KIB
PARTS = 64
HOG_BYTES = 24 * MIB  # of one payload: more than may be stored as it arrives, beside others
HOGS = 2
UNTOLD_EACH = 4  # of so many lines one holds bytes of which no poller tells, as those under TLS do
QUICK_SEEDS, SLOW_SEEDS = 6, 300
STEPS = 15_000
SEEDS = (
    [int(os.environ["NBDZRAM_SEED"])]
    if "NBDZRAM_SEED" in os.environ
    else [
        *range(QUICK_SEEDS),
        *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(QUICK_SEEDS, SLOW_SEEDS)),
    ]
)


class Tenant:
    """One client after the other on one part of the export: what it asked, and what must come back."""

    def __init__(self, stage: Stage, dice: random.Random, part: int) -> None:
        self.stage = stage
        self.dice = dice
        self.start = part * PART
        self.content = bytearray(PART)
        self.asked: list[tuple[bytes, bytes]] = []  # each request of this connection, and its reply
        self.unsure = False  # a client was cut: what of its last writes came to be is not known
        self.drained = False
        self.client = self._attach()

    @property
    def expected(self) -> bytes:
        """All that is to come."""
        return b"".join(reply for _, reply in self.asked)

    def _attach(self, rest: bytes = b"") -> Client:
        client = self.stage.attach(style=0, limits=Limits(connection_bytes=MIB), rest=rest)
        client.line.piece = self.dice.choice([333, 5000, 70_000, 1 << 20])
        client.line.untold = self.start // PART % UNTOLD_EACH == 0
        return client

    def attach_again(self) -> Client:
        gone = self.client
        if gone.session.released:
            return self._carry_on(gone)
        again: list[tuple[bytes, bytes]] = []
        if self.unsure or not gone.line.closed_in_order:
            self.content[:] = self.stage.disk.read(self.start, PART)
            self.unsure = False
        elif self.drained:
            again = self._unanswered(len(gone.line.outgoing))
        self.drained = False
        self.asked = again
        client = self._attach()
        client.send(b"".join(asked for asked, _ in again))
        return client

    def _carry_on(self, gone: Client) -> Client:
        """On the same line, in another process, say."""
        client = self._attach(gone.session.take_rest())
        old, new = gone.line, client.line
        new.incoming, new.outgoing = old.incoming, old.outgoing + new.outgoing
        new.room, new.sends_no_more, new.reset = old.room, old.sends_no_more, old.reset
        return client

    def _unanswered(self, came: int) -> list[tuple[bytes, bytes]]:
        """Who was drained has whole answers to the first of his requests, and none to the others."""
        for index, (_, reply) in enumerate(self.asked):
            if came < len(reply):
                assert came == 0, "half an answer"
                return self.asked[index:]
            came -= len(reply)
        return []

    def act(self) -> None:
        """Something that a client, its network or the server's operator does."""
        if self.client.over:
            self.client = self.attach_again()
        what = self.dice.random()
        line = self.client.line
        if what < 0.55 and not line.sends_no_more and not line.closed:
            self._ask()
        elif what < 0.75:
            line.room = self.dice.choice([0, 1, 30, 4000, 100_000, 1 << 40])
        elif what < 0.85:
            self.stage.serve(self.client, alone=self.dice.random() < 0.5)
        elif what < 0.87:
            line.reset = True
            self.unsure = True
        elif what < 0.89:
            self.stage.plane.abort(self.client.session)
            self.unsure = True
        elif what < 0.91:
            line.sends_no_more = True
            line.room = 1 << 40
        elif what < 0.94:
            rest(self.stage.desk, self.client.session)
        elif what < 0.96:
            self._is_to_go()

    def _is_to_go(self) -> None:
        """In a takeover, where TLS is drained, or a stop; wishes that meet are one letter."""
        if not self.client.line.untold and self.dice.random() < 0.7:
            self.stage.plane.release(self.client.session)
        if self.client.line.untold or self.dice.random() < 0.4:
            self.client.line.room = 1 << 40
            self.drained = True
            self.stage.plane.drain(self.client.session)

    def _ask(self) -> None:
        length = self.dice.choice([0, 1, 512, 4096, 4097, 12_288, 70_000, PART])
        at = self.dice.randrange(PART - length + 1)
        cookie = self.dice.getrandbits(63)
        command = self.dice.choice([CMD_READ, CMD_READ, CMD_WRITE, CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES, CMD_FLUSH])
        reply = (0x67446698).to_bytes(4) + bytes(4) + cookie.to_bytes(8)
        offset = self.start + at
        if command == CMD_FLUSH:
            offset = length = 0
        payload = b""
        if command == CMD_READ:
            reply += self.content[at : at + length]
        elif command == CMD_WRITE:
            payload = self.dice.randbytes(min(length, 64)) * (length // 64 + 1)
            payload = payload[:length]
            self.content[at : at + length] = payload
        elif command == CMD_TRIM:
            first, last = -(-offset // 4096) * 4096, (offset + length) // 4096 * 4096
            if last > first:
                self.content[first - self.start : last - self.start] = bytes(last - first)
        elif command == CMD_WRITE_ZEROES:
            self.content[at : at + length] = bytes(length)
        asked = request(command, offset, length, cookie=cookie) + payload
        self.client.send(asked)
        self.asked.append((asked, reply))

    def check(self) -> None:
        """Nothing but what is expected has come; of a client that was cut, a beginning of it."""
        got = bytes(self.client.line.outgoing)
        assert got == self.expected[: len(got)], f"part {self.start // PART}"


class Hog:
    """Begins a huge payload, and stands still: where memory is short all large ones of others wait for their turn."""

    def __init__(self, stage: Stage, dice: random.Random) -> None:
        self.stage = stage
        self.dice = dice
        self.client: Client | None = None

    def act(self) -> None:
        """It comes, goes, or sends a little."""
        if self.client is None or self.client.over:
            self.client = self.stage.attach(style=0) if self.dice.random() < 0.5 else None
            if self.client is not None:
                self.client.send(request(CMD_WRITE, PART * PARTS, HOG_BYTES))
            return
        plane, session = self.stage.plane, self.client.session
        self.client.send(bytes(self.dice.choice([0, 1, 5000])))
        self.dice.choice([plane.abort, plane.drain, plane.release, plane.go_on, plane.go_on, plane.go_on])(session)

    def leave(self) -> None:
        """For good."""
        if self.client is not None and not self.client.over:
            self.stage.plane.abort(self.client.session)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_client_gets_what_it_asked_for_in_order_and_nothing_else(seed: int) -> None:
    dice = random.Random(seed)
    stage = Stage(PART * PARTS + HOG_BYTES, budget=dice.choice([1 << 20, 3 << 20, 1 << 30]), processors=1)
    stage.disk.trim(0, PART * PARTS)
    tenants = [Tenant(stage, dice, part) for part in range(PARTS)]
    hogs = [Hog(stage, dice) for _ in range(HOGS)]
    for step in range(STEPS):
        dice.choice(tenants).act()
        if dice.random() < 0.01:
            dice.choice(hogs).act()
        if dice.random() < 0.3:
            stage.desk.turn()
        if step % 50 == 0:
            stage.settle()
            for tenant in tenants:
                tenant.check()
    for hog in hogs:
        hog.leave()
    for tenant in tenants:
        tenant.client.line.room = 1 << 40
    stage.settle()
    for tenant in tenants:
        while tenant.client.over and (tenant.client.session.released or tenant.drained):
            tenant.client = tenant.attach_again()
            stage.settle()
        tenant.check()
        if not tenant.unsure:
            assert len(tenant.client.line.outgoing) == len(tenant.expected), "somebody is not answered"
            assert stage.disk.read(tenant.start, PART) == tenant.content
        tenant.client.line.sends_no_more = True
    stage.settle()
    assert all(tenant.client.over for tenant in tenants)
    assert stage.plane.budget.used == 0
    stage.close()
