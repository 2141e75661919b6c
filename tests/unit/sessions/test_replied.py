"""What each request of each kind of content is answered, sound and rotten, with room and without: replied.txt.

python -m tests.unit.sessions.test_replied        writes it anew, after a change that is meant
"""

from __future__ import annotations

import itertools
import mmap
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from nbdzram.engine.fold import Fold
from tests.support.arena import Arena
from tests.support.rehearsal import Stage
from tests.unit.engine.blocks import BLOCK, half_random, noise, run, text
from tests.wire import (
    CMD_BLOCK_STATUS,
    CMD_CACHE,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    request,
)

REPLIED = Path(__file__).with_name("replied.txt")
MIB = 1 << 20
SIZE = 8 * MIB + 700  # its last block is none whole
ROTTEN = (2, 600)  # an entry that is not what was written, and an object
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = 1, 2, 4, 8, 16
WORD = bytes(range(8)) * (BLOCK // 8)
RANGES = {
    "two blocks": (0, 2 * BLOCK),
    "within a block": (5, 10),
    "parts of three": (9 * BLOCK - 3, BLOCK + 7),
    "a hole and its ends": (20 * BLOCK - 1, 3 * BLOCK + 2),
    "all of many kinds": (0, 40 * BLOCK),
    "a leaf and more": (0, 3 * MIB),
    "all": (0, SIZE),
    "the end": (SIZE - 701, 701),
    "behind the end": (SIZE - 1, 2),
    "nothing": (0, 0),
    "rot": (ROTTEN[0] * BLOCK, BLOCK),
    "part of rot": (ROTTEN[1] * BLOCK + 9, 20),
    "up to rot": ((ROTTEN[1] - 40) * BLOCK, 60 * BLOCK),
}
ASKED = {
    "read": (CMD_READ, (0, DF)),
    "write": (CMD_WRITE, (0, FUA)),
    "trim": (CMD_TRIM, (0, FUA)),
    "zero": (CMD_WRITE_ZEROES, (0, NO_HOLE, FAST_ZERO)),
    "cache": (CMD_CACHE, (0,)),
    "flush": (CMD_FLUSH, (0,)),
    "status": (CMD_BLOCK_STATUS, (0, REQ_ONE)),
}


def filled(stage: Stage, *, tell: bool) -> None:
    """Two that are equal, one that is huge, same-filled ones, holes between, some in another leaf."""
    stage.disk.trim(0, SIZE)
    stage.disk.write(0, text(1) + half_random(2) + text(3) + noise(4) + text(1) + WORD * 2 + bytes(BLOCK) + noise(8))
    stage.disk.write(9 * BLOCK, b"".join(half_random(number % 3, 900) for number in range(11)))
    stage.disk.write(22 * BLOCK, b"\x09" * BLOCK + noise(23))
    stage.disk.write(590 * BLOCK, b"".join(text(number) for number in range(20)))
    stage.disk.write(SIZE - 900, b"the end" * 100)
    stage.pool.tells_sharing = tell
    run(Fold(stage.pool))


def spoilt(path: Path) -> None:
    """What others wrote into the arena, behind the server's back."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        arena = Arena(view)
        for block in ROTTEN:
            entry = arena.word_at(block)
            arena.set_word(entry, arena.word(entry) ^ 1 << 40)


def answers(
    stage: Stage,
    *,
    style: int,
    contexts: int,
    read_only: bool,
    commands: dict[str, tuple[int, tuple[int, ...]]],
    anew: bool,
) -> Iterator[str]:
    """Of one client, that asks for one thing after the other."""
    client = stage.attach(style=style, contexts=contexts, read_only=read_only)
    replies: dict[str, list[str]] = {}
    for (name, (command, all_flags)), (where, (offset, length)) in itertools.product(commands.items(), RANGES.items()):
        for flags in all_flags:
            client.line.outgoing.clear()
            client.line.gifts.clear()
            before, errors = stage.disk.stats(), client.session.error_count
            asked = request(command, offset, length, flags=flags, extended=style == 2)
            if command == CMD_WRITE:
                asked = request(command, offset, length, flags=flags | 32 * (style == 2), extended=style == 2)
                asked += (noise(77) * (length // BLOCK + 1))[:length]
            client.send(asked)
            stage.settle()
            after, answer = stage.disk.stats(), bytes(client.line.outgoing)
            told = answer.hex() if len(answer) <= 200 else f"{answer[:36].hex()} {len(answer)} {zlib.crc32(answer):08x}"
            words = [f"in {len(client.line.gifts)}"] if len(client.line.gifts) > 1 else []
            words += [f"errors {client.session.error_count - errors}"] if client.session.error_count > errors else []
            words += [f"stores {after.stored - before.stored:+} {after.same_filled - before.same_filled:+}"] * (
                after != before
            )
            if after != before or command in (CMD_WRITE, CMD_WRITE_ZEROES):
                words.append(
                    f"{zlib.crc32(stage.disk.read(590 * BLOCK, 9 * BLOCK) + stage.disk.read(9 * BLOCK, BLOCK)):08x}"
                )
            replies.setdefault(f"{told} {' '.join(words)}".rstrip(), []).append(
                f"{name} {where} {flags}".removesuffix(" 0")
            )
            if anew and after != before:
                filled(stage, tell=stage.pool.tells_sharing)
    client.line.sends_no_more = True
    stage.settle()
    assert client.over
    assert stage.plane.budget.used == 0
    for reply, to in replies.items():
        yield f"{', '.join(to)}: {reply}"


def lines() -> Iterator[str]:
    looks = {name: ASKED[name] for name in ("read", "status", "cache", "flush")}
    changes = {name: ASKED[name] for name in ("write", "trim", "zero")}
    for style, tell in itertools.product(range(3), (False, True)):
        stage = Stage(SIZE)
        filled(stage, tell=tell)
        told = answers(stage, style=style, contexts=2 * (style > 0), read_only=tell, commands=looks, anew=False)
        yield from (f"{style}{' telling' * tell} {line}" for line in told)
        if tell:
            told = answers(stage, style=style, contexts=0, read_only=True, commands=changes, anew=False)
            yield from (f"{style} read-only {line}" for line in told)
        else:
            told = answers(stage, style=style, contexts=1 * (style > 0), read_only=False, commands=changes, anew=True)
            yield from (f"{style} {line}" for line in told)
            stage.pool.mem_limit = stage.pool.stats().memory_used
            told = answers(stage, style=style, contexts=0, read_only=False, commands=changes, anew=False)
            yield from (f"{style} full {line}" for line in told)
        stage.close()
        if not tell:
            with tempfile.TemporaryDirectory() as directory:
                path = Path(directory) / "arena"
                stage = Stage(SIZE, path=str(path))
                filled(stage, tell=False)
                spoilt(path)
                told = answers(
                    stage, style=style, contexts=2 * (style > 0), read_only=False, commands=ASKED, anew=False
                )
                yield from (f"{style} rotten {line}" for line in told)
                stage.close()


def test_each_request_is_answered_as_it_was() -> None:
    assert list(lines()) == REPLIED.read_text(encoding="utf-8").splitlines()


if __name__ == "__main__":
    REPLIED.write_text("".join(f"{line}\n" for line in lines()), encoding="utf-8")
