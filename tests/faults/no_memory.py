"""Stories of the engine and of a session, told again and again while one allocation of theirs is refused: the first,
the second, and so on until a story needs no more. What came of it, a line each. Runs with no_memory.c before libc."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

from nbdzram.config import Limits
from nbdzram.engine import moment
from nbdzram.engine.disk import Disk
from nbdzram.engine.estimate import Estimate
from nbdzram.engine.fold import Compact, Fold
from nbdzram.engine.pool import Pool
from nbdzram.engine.recompress import Recompress
from nbdzram.engine.scrub import Scrub
from nbdzram.engine.walk import Told, Walk
from nbdzram.errors import NbdzramError
from nbdzram.sessions.stage import Ending
from tests.support.rehearsal import Client, Stage
from tests.unit.engine.blocks import BLOCK, half_random, noise, prose, run, text
from tests.wire import CMD_BLOCK_STATUS, CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE, request

MIB, FAR = 1 << 20, 1 << 32
GRANTED, LASTS, REFUSED = (
    ctypes.c_long.in_dll(ctypes.CDLL(None), f"no_memory_{name}") for name in ("after", "lasts", "refused")
)
CONTENT = b"".join([text(1), noise(2), half_random(3), text(1), *map(prose, range(60))])


def acts(pool: Pool) -> Iterator[Callable[[], object]]:
    """What asks for memory of its own."""
    disk = pool.create("disk", 2 * FAR)
    yield lambda: disk.write(0, CONTENT)
    yield lambda: disk.write(FAR, CONTENT[: 9 * BLOCK])
    yield lambda: disk.extents(0, 2 * FAR, 100)
    yield from (partial(disk.trim, place * BLOCK, BLOCK) for place in range(0, 60, 2))
    yield lambda: disk.extents(0, 2 * FAR, 100, 4)
    yield lambda: run(Fold(pool))
    yield disk.usage
    yield lambda: run(Recompress(pool, dictionary=True))
    yield lambda: run(Compact(pool))
    yield lambda: run(Scrub(pool))
    copies: list[Disk] = []
    yield lambda: copies.extend(moment.snapshot_together([disk], ["copy"]))
    yield from (partial(walked, copy) for copy in copies)
    yield lambda: moment.discard(copies)
    yield estimated


def walked(copy: Disk) -> None:
    walk = Walk(copy, None, Told())
    while walk.step() is not None:
        pass


def estimated() -> object:
    estimate = Estimate()
    for number in range(40):
        estimate.feed(b"".join(half_random(number * 40 + block, 90) for block in range(40)))
    return estimate.figures()


def of_the_engine(after: int) -> str:
    GRANTED.value, REFUSED.value = after, 0
    refused = []
    try:
        with Pool() as pool:
            for act in acts(pool):
                try:
                    act()
                except (NbdzramError, MemoryError) as error:
                    refused.append(f"{type(error).__name__}: {error}")
            GRANTED.value = -1
            pool.check()
            for disk in pool.all_disks():
                pool.delete(disk)
            assert pool.stats().objects == 0
            pool.check()
    except (NbdzramError, MemoryError) as error:
        GRANTED.value = -1
        refused.append(f"no more: {type(error).__name__}: {error}")
    return ("; ".join(refused) or "all the same") if REFUSED.value else ""


def of_a_session(after: int, processors: int = 1) -> str:
    stage = Stage(8 * MIB, budget=4 * MIB, processors=processors)
    stage.pool.tells_sharing = False
    stage.disk.write(0, CONTENT)
    run(Fold(stage.pool))
    GRANTED.value, REFUSED.value = after, 0
    told: list[str] = []
    clients: list[Client] = []
    try:
        client = stage.attach(style=1, contexts=2, syncs=True, limits=Limits(connection_bytes=2 * MIB))
        clients.append(client)
        for number, asked in enumerate(
            (
                request(CMD_WRITE, 5, 300 << 10, cookie=1) + b"w" * (300 << 10),
                request(CMD_READ, 3, 70 << 10, cookie=2),
                request(CMD_BLOCK_STATUS, 0, 8 * MIB, cookie=3),
                request(CMD_FLUSH, 0, 0, cookie=4),
                request(CMD_TRIM, 0, BLOCK, cookie=5) * 40,
                request(CMD_READ, 0, MIB, cookie=6) + request(CMD_READ, 0, 100 << 10, cookie=7),
            )
        ):
            client.line.room = 1 << 40 if number < 5 else 50 << 10
            client.send(asked)
            stage.settle()
            client.line.room = 1 << 40
            stage.plane.synced(client.session, stage.plane.syncs_asked(client.session), failed=False)
            stage.settle()
        told.append(
            f"{client.session.requests} asked, {client.session.error_count} errors, {len(client.line.outgoing)} bytes"
        )
        client.send(request(CMD_READ, 0, 3) + request(CMD_WRITE, 0, 9)[:20])
        stage.settle()
        stage.plane.release(client.session)
        stage.settle()
        told.append(f"kept {len(client.session.take_rest())}" if client.session.released else "not released")
        client.line.reset = True
    except (NbdzramError, MemoryError) as error:
        told.append(f"{type(error).__name__}: {error}")
    GRANTED.value = -1
    for client in clients:
        stage.plane.abort(client.session)
        stage.settle()
        assert client.over
        told.append(Ending(client.session.ending).name)
    assert stage.plane.budget.used == 0
    stage.pool.check()
    stage.close()
    return ", ".join(told) if REFUSED.value else ""


def lines() -> Iterator[str]:
    for lasts, name in product((False, True), ("engine", "session")):
        LASTS.value, after = lasts, 0
        story = of_the_engine if name == "engine" else of_a_session
        while told := re.sub(r"\d+ [GT]iB of (addresses|them)", r"some \1", story(after)):  # the machine's
            yield f"{name}, without number {after}{' and all behind it' * lasts}: {told}"
            after += 1
        for number in range(after if name == "session" else 0):
            of_a_session(number, processors=3)  # who of the threads asks first is chance, and so is what is told


if __name__ == "__main__":
    for line in lines():
        print(line)
