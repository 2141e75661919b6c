"""Thousands of clients on a simulated network, by a seed: any pieces, any room, resets, drains, while memory is short.

Each client has a part of the export for itself, and a plain model of it. Everything that happens is drawn from the
seed, so a failure is played again by it: NBDZRAM_SEED=n pytest tests/model/test_simulator.py.
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
SIMPLE_REPLY = 16
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
        self.expected = bytearray()
        self.unsure = False  # a client was cut: what of its last writes came to be is not known
        self.client = self._attach()

    def _attach(self) -> Client:
        client = self.stage.attach(style=0, limits=Limits(connection_bytes=MIB))
        self.expected = bytearray()
        if self.unsure:
            self.content[:] = self.stage.disk.read(self.start, PART)
            self.unsure = False
        client.line.piece = self.dice.choice([333, 5000, 70_000, 1 << 20])
        client.line.untold = self.start // PART % UNTOLD_EACH == 0
        return client

    def act(self) -> None:
        """Something that a client, its network or the server's operator does."""
        if self.client.over:
            self.client = self._attach()
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
        self.client.send(request(command, offset, length, cookie=cookie) + payload)
        self.expected += reply

    def check(self) -> None:
        """Nothing but what is expected has come; of a client that was cut, a beginning of it."""
        got = bytes(self.client.line.outgoing)
        assert got == self.expected[: len(got)], f"part {self.start // PART}"


@pytest.mark.parametrize("seed", SEEDS)
def test_every_client_gets_what_it_asked_for_in_order_and_nothing_else(seed: int) -> None:
    dice = random.Random(seed)
    stage = Stage(PART * PARTS, budget=dice.choice([1 << 20, 3 << 20, 1 << 30]), processors=1)
    stage.disk.trim(0, PART * PARTS)
    tenants = [Tenant(stage, dice, part) for part in range(PARTS)]
    for step in range(STEPS):
        dice.choice(tenants).act()
        if dice.random() < 0.3:
            stage.desk.turn()
        if step % 50 == 0:
            stage.settle()
            for tenant in tenants:
                tenant.check()
    for tenant in tenants:
        tenant.client.line.room = 1 << 40
    stage.settle()
    for tenant in tenants:
        tenant.check()
        if not tenant.unsure:
            assert len(tenant.client.line.outgoing) == len(tenant.expected), "somebody is not answered"
            assert stage.disk.read(tenant.start, PART) == tenant.content
        tenant.client.line.sends_no_more = True
    stage.settle()
    assert all(tenant.client.over for tenant in tenants)
    assert stage.plane.budget.used == 0
    stage.close()
