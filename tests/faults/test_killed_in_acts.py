"""A server is killed while it does something for its operator, and clients write: nothing that was answered is lost.

The tenants of test_soak live there. A kill comes behind some further answers to them, counted from the moment in which
the act was asked for; so it hits acts at their beginning, in their middle, and behind their end.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from nbdzram.control.client import ControlClient
from nbdzram.errors import ServerUnreachable, UserError
from tests.faults.test_soak import BLOCKS, EXPORTS, STRETCH, House, Tenant
from tests.support.nbd_client import Client
from tests.support.server import START_SECONDS
from tests.unit.engine.blocks import BLOCK

MOST_ANSWERS = 60
"""To the tenants, before the kill: an act of a pool this small has ended by then."""


Act = Callable[[House, str, str], object]
"""With the name of an export that has a tenant, and one that is free."""


def ask(house: House, method: str, **params: Any) -> Any:
    with ControlClient(house.server.control) as control:
        return control.call(method, **params)


def run(kind: str, **options: Any) -> Act:
    return lambda house, _, __: ask(house, "run", kind=kind, **options)


def resize(house: House, _: str, name: str) -> None:
    ask(house, "exports.add", name=name, size_bytes=1 << 26)
    ask(house, "exports.resize", name=name, size_bytes=1 << 30)
    ask(house, "exports.resize", name=name, size_bytes=1 << 20, yes=True)


def rename(house: House, export: str, name: str) -> None:
    ask(house, "exports.copy", source=export, name=name)
    ask(house, "exports.rename", name=name, new_name=f"{name}-renamed")


def remove(house: House, export: str, name: str) -> None:
    ask(house, "exports.copy", source=export, name=name)
    ask(house, "exports.remove", name=name)


def reset(house: House, export: str, name: str) -> None:
    ask(house, "exports.copy", source=export, name=name)
    ask(house, "exports.reset", name=name)


def roll_back(house: House, export: str, name: str) -> None:
    ask(house, "exports.copy", source=export, name=f"{name}-old", read_only=True)
    ask(house, "exports.copy", source=export, name=name)
    ask(house, "exports.rollback", name=name, snapshot=f"{name}-old")


def pool(house: House, _: str, name: str) -> None:
    ask(house, "pools.add", name=name, mem_limit=1 << 24)
    ask(house, "pools.change", name=name, mem_limit=1 << 25)
    ask(house, "exports.add", name=name, size_bytes=1 << 26, pool=name)
    ask(house, "exports.remove", name=name)
    ask(house, "pools.remove", name=name)


def send_and_receive(house: House, export: str, name: str) -> None:
    sent = bytearray()
    with ControlClient(house.server.control) as control:
        control.call_for_stream("streams.send", sent.extend, exports=[export])
        control.call_with_stream("streams.receive", io.BytesIO(sent).read, prefix=f"{name}-")


ACTS: dict[str, Act] = {
    "fold": run("fold"),
    "compact": run("compact"),
    "recompress": run("recompress", level=3),
    "check": run("check"),
    "clone": lambda house, export, name: ask(house, "exports.copy", source=export, name=name),
    "snapshot": lambda house, export, name: ask(house, "exports.copy", source=export, name=name, read_only=True),
    "moment": lambda house, _, name: ask(house, "moments.take", name=name),
    "resize": resize,
    "rename": rename,
    "remove": remove,
    "reset": reset,
    "roll back": roll_back,
    "change": lambda house, export, name: ask(house, "exports.change", name=export, description=name),
    "pool": pool,
    "send and receive": send_and_receive,
}


class Killed(House):
    """One whose tenants have as many answers as were counted."""

    def __init__(self, place: Path, seed: int) -> None:
        super().__init__(place)
        self.tenants = [Tenant(self, export, seed) for export in EXPORTS]

    def answers(self) -> int:
        return sum(tenant.answers for tenant in self.tenants)

    def wait_for(self, condition: Callable[[], bool], living: list[Future[None]]) -> None:
        """What the tenants bring about."""
        while not condition():
            assert not any(future.done() for future in living), [one.result() for one in living if one.done()]
            os.sched_yield()

    def wait_for_answers(self, count: int, living: list[Future[None]]) -> None:
        """So many more of them."""
        wanted = self.answers() + count
        self.wait_for(lambda: self.answers() >= wanted, living)

    def verified(self) -> bool:
        """All tenants have found in this life what they left in the one before."""
        return all(tenant.verified == self.now()[1] for tenant in self.tenants)


@contextlib.contextmanager
def begun(house: House, act: str, export: str, name: str) -> Iterator[None]:
    """The act, on a thread of its own: it ends with the server, or before."""
    failed: list[BaseException] = []

    def perform() -> None:
        try:
            ACTS[act](house, export, name)
        except (ServerUnreachable, ConnectionError, EOFError):
            pass
        except UserError as error:  # a full pool takes no copy
            if "room" not in str(error) and "limit" not in str(error):
                failed.append(error)

    thread = threading.Thread(target=perform)
    thread.start()
    try:
        yield
    finally:
        thread.join(START_SECONDS)
        assert not failed, (act, failed)


def clear_away(house: House) -> None:
    """What acts have left; all of it can be read. A check finds nothing wrong."""
    with ControlClient(house.server.control) as control:
        for export in control.status().exports:
            if export.name not in EXPORTS:
                with Client(house.server.unix_path, export.name) as client:
                    for first in range(0, min(client.size_bytes // BLOCK, BLOCKS), STRETCH):
                        client.read(first * BLOCK, STRETCH * BLOCK)
        for export in control.status().exports:
            if export.name not in EXPORTS:
                control.call("exports.remove", name=export.name, force=True)
        for one in control.status().pools:
            if one.name != "default":
                control.call("pools.remove", name=one.name)
        control.call("run", kind="check")


def kill_in_acts(place: Path, rounds: int) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    choose = random.Random(seed)
    with Killed(place, seed) as house, ThreadPoolExecutor() as executor:
        living = [executor.submit(tenant.live) for tenant in house.tenants]
        try:
            for number in range(rounds):
                for act in ACTS:
                    house.wait_for(house.verified, living)
                    with begun(house, act, choose.choice(EXPORTS), f"x{number}"):
                        house.wait_for_answers(choose.randrange(MOST_ANSWERS), living)
                        house.fail_power()
                    clear_away(house)
        finally:
            house.closing = True
        for future in living:
            future.result()
        for tenant in house.tenants:
            with house.server.client(tenant.export) as client:
                tenant.verify_all(client)


def test_a_server_that_is_killed_in_any_act_loses_nothing_that_was_answered(place: Path) -> None:
    kill_in_acts(place, 1)


@pytest.mark.slow
def test_a_hundred_kills_in_all_acts_lose_nothing_that_was_answered(place: Path) -> None:
    kill_in_acts(place, 7)
