"""A server's whole life in minutes: tenants who verify what they read, an operator who types every command, clients
that break off, a pool that is sometimes full, and now and then a power failure.

    tenant     a thread an export: writes, trims, reads, and compares with what it knows; attaches again after a failure
    operator   the test's own thread: the command line, and the power switch
"""

from __future__ import annotations

import errno
import random
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from tests.support.nbd_client import Client, RequestFailed, open_socket
from tests.support.server import START_SECONDS, Nbdzram
from tests.unit.engine.blocks import BLOCK, half_random, noise, prose
from tests.wire import CMD_READ

BLOCKS = 8192  # of an export: 32 MiB
EXPORTS = ("a", "b", "c")
STRETCH = 256  # blocks of one request when all are read
ARGUMENTS = (
    *("--mem-limit", "24M", "--fold-interval", "auto", "--compact-interval", "auto"),
    *("--recompress-interval", "auto", "--recompress-age", "5"),
)
RUNS = (
    ("fold", "--json"),
    ("fold", "--dry-run"),
    ("compact",),
    ("recompress", "--dictionary", "--json"),
    ("recompress", "--level", "9", "--idle", "1"),
    ("check",),
    ("stat", "--memory"),
)


def repeated_word(number: int) -> bytes:
    return number.to_bytes(8, "big") * (BLOCK // 8)


def content(number: int) -> bytes:
    """Number 0 is zeroes; the others are of every kind that the engine knows."""
    kinds = (repeated_word, noise, half_random, prose)
    return kinds[number % len(kinds)](number)


CONTENTS = [content(number) for number in range(1500)]


def joined(numbers: list[int]) -> bytes:
    return b"".join(CONTENTS[number] for number in numbers)


class House:
    """The server, started again with the same state directory whenever its power fails."""

    def __init__(self, place: Path) -> None:
        self.closing = False
        self._place = place
        self._life = 0
        self._changed = threading.Condition()
        self._server = self._start()

    def _start(self) -> Nbdzram:
        directory = self._place / f"life-{self._life}"
        directory.mkdir()
        dedup = "inline" if self._life % 2 else "fold"
        arguments = ("--state-dir", str(self._place / "state"), "--dedup", dedup, *ARGUMENTS)
        return Nbdzram(directory, dict.fromkeys(EXPORTS, BLOCKS * BLOCK), arguments=arguments)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.__exit__(kind, value, trace)

    @property
    def server(self) -> Nbdzram:
        return self.now()[0]

    def now(self) -> tuple[Nbdzram, int]:
        """The server, and the number of its life."""
        with self._changed:
            return self._server, self._life

    def fail_power(self) -> None:
        with self._changed:
            self._server.kill()
            assert "Traceback" not in self._server.log, self._server.log
            self._life += 1
            self._server = self._start()
            self._changed.notify_all()

    def wait_beyond(self, life: int) -> None:
        """For the next life. A connection that breaks without a power failure is the server's fault."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._life > life, START_SECONDS), self._server.log


class Tenant:
    """Who has a disk there, and knows what is on it."""

    def __init__(self, house: House, export: str, seed: int) -> None:
        self.export = export
        self.known = [0] * BLOCKS
        self.begun: dict[int, int] = {}  # block -> content of a request that was not answered, or failed
        self.spared: dict[int, int] = {}  # block -> content before an answered trim, which may have passed it over
        self.busy = threading.Lock()  # through one request
        self.answers = 0
        self.verified = -1  # the server's last life in which all of the disk was as it was left
        self._house = house
        self._choose = random.Random(f"{seed} {export}")
        self._claim = f"export {export}, seed {seed}"

    def live(self) -> None:
        while not self._house.closing:
            server, life = self._house.now()
            try:
                with server.client(self.export) as client:
                    self.verify_all(client)
                    self.verified = life
                    while not self._house.closing:
                        with self.busy:
                            self._use(client)
                        self.answers += 1
            except (OSError, EOFError):
                self._house.wait_beyond(life)

    def verify_all(self, client: Client) -> None:
        with self.busy:
            for first in range(0, BLOCKS, STRETCH):
                self._verify(client, first, STRETCH)

    def _use(self, client: Client) -> None:
        count = self._choose.choice((1, 1, 2, 8, 64, 300))
        first = self._choose.randrange(BLOCKS - count)
        do = self._choose.choice((self._write, self._write, self._verify, self._verify, self._trim))
        try:
            do(client, first, count)
        except RequestFailed as failure:
            assert failure.error == errno.ENOSPC, self._claim
            self._verify(client, first, count)
            self._trim(client, self._choose.randrange(BLOCKS - STRETCH), STRETCH)  # to make room

    def _write(self, client: Client, first: int, count: int) -> None:
        numbers = [self._choose.randrange(len(CONTENTS)) for _ in range(count)]
        self.begun = dict(zip(range(first, first + count), numbers, strict=True))
        client.write(first * BLOCK, joined(numbers))
        self._settle()

    def _trim(self, client: Client, first: int, count: int) -> None:
        """A trim is advice (section "NBD_CMD_TRIM"): where a clone shares the table, and a full pool has no page for a
        copy of it, the blocks stay as they are."""
        trimmed = range(first, first + count)
        self.begun = dict.fromkeys(trimmed, 0)
        client.trim(first * BLOCK, count * BLOCK)
        before = {block: self.spared.get(block, self.known[block]) for block in trimmed}
        self._settle()
        self.spared |= before

    def _settle(self) -> None:
        for block, number in self.begun.items():
            self.known[block] = number
            self.spared.pop(block, None)
        self.begun = {}

    def _verify(self, client: Client, first: int, count: int) -> None:
        """Every block is as it was left; one of a request that was cut off may be old or new."""
        found = client.read(first * BLOCK, count * BLOCK)
        for block in range(first, first + count):
            is_block = found[(block - first) * BLOCK :][:BLOCK]
            if is_block != CONTENTS[self.known[block]]:
                others = [numbers[block] for numbers in (self.begun, self.spared) if block in numbers]
                possible = [number for number in others if is_block == CONTENTS[number]]
                assert possible, f"block {block}, which may be {others} too: {self._claim}"
                self.known[block] = possible[0]
            self.begun.pop(block, None)
            self.spared.pop(block, None)


def copy(house: House, tenant: Tenant, verb: str, name: str) -> None:
    """A clone or snapshot taken while the tenant lives there is what the tenant had."""
    with tenant.busy:
        if tenant.begun:
            return  # the power has just failed, and the tenant does not know yet
        house.server.command_line(verb, tenant.export, name)
        known, spared = list(tenant.known), dict(tenant.spared)
    with house.server.client(name) as client:
        for first in range(0, BLOCKS, STRETCH):
            found = client.read(first * BLOCK, STRETCH * BLOCK)
            for block in range(first, first + STRETCH):
                is_block = found[(block - first) * BLOCK :][:BLOCK]
                possible = {known[block], spared.get(block, known[block])}
                assert any(is_block == CONTENTS[number] for number in possible), (verb, block)
    house.server.command_line("exports", "remove", name, "--yes")


def add_and_remove(house: House, name: str) -> None:
    house.server.command_line("exports", "add", name, "64M")
    house.server.command_line("exports", "resize", name, "1G")
    house.server.command_line("exports", "remove", name, "--yes")


def intrude(house: House, choose: random.Random) -> None:
    """Some talk nonsense; some ask for much and hang up."""
    server = house.server
    for _ in range(20):
        with open_socket(server.unix_path) as stranger:
            stranger.sendall(choose.randbytes(choose.randrange(1, 40)))
        with server.client(choose.choice(EXPORTS)) as client:
            for _ in range(4):
                client.send(CMD_READ, 0, BLOCKS * BLOCK)


def operate(house: House, tenants: list[Tenant], actions: int, seed: int, living: list[Future[None]]) -> None:
    """As many commands, and a power failure after every twentieth."""
    choose = random.Random(seed)
    for action in range(1, actions + 1):
        assert not any(future.done() for future in living), [future.result() for future in living if future.done()]
        kind = choose.randrange(10)
        if action % 20 == 0:
            house.fail_power()
        elif kind < 5:
            house.server.command_line(*choose.choice(RUNS))
        elif kind < 8:
            copy(house, choose.choice(tenants), choose.choice(("clone", "snapshot")), f"copy-{action}")
        elif kind < 9:
            add_and_remove(house, f"extra-{action}")
        else:
            intrude(house, choose)


def soak(place: Path, actions: int) -> None:
    seed = random.randrange(1 << 30)
    with House(place) as house:
        tenants = [Tenant(house, export, seed) for export in EXPORTS]
        with ThreadPoolExecutor() as executor:
            living = [executor.submit(tenant.live) for tenant in tenants]
            try:
                operate(house, tenants, actions, seed, living)
            finally:
                house.closing = True
        for future in living:
            future.result()
        for tenant in tenants:
            with house.server.client(tenant.export) as client:
                tenant.verify_all(client)
        house.server.command_line("check")


def test_tenants_keep_what_they_wrote_whatever_the_operator_does_and_whenever_the_power_fails(place: Path) -> None:
    soak(place, 45)


@pytest.mark.slow
def test_tenants_keep_what_they_wrote_for_long(place: Path) -> None:
    soak(place, 600)
