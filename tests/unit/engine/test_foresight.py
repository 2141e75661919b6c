"""What is brought near before it is looked at: followed with care, since memory may have changed under us."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdzram.engine.pool import Pool
from nbdzram.errors import EngineError
from tests.support.arena import BRANCHES, Arena
from tests.support.rehearsal import Stage
from tests.unit.engine.blocks import BLOCK, half_random
from tests.wire import CMD_READ, CMD_WRITE, request

BLOCKS = 4
CONTENT = b"".join(half_random(number) for number in range(1, BLOCKS + 1))
FAR = 0xFFFFFFF0 << 32  # a page, or a handle, that no arena has
SIMPLE_REPLY = 16
EIO = 5


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    made = Stage(64 << 20, path=str(tmp_path / "arena"))
    yield made
    made.close()


def wrong_words(arena: Arena) -> dict[str, int]:
    """Where what leads to the first block stands."""
    branches = {f"branch {level}": arena.word_at(level=level) for level in range(1, BRANCHES + 1)}
    return {"root": arena.root(), "entry": arena.word_at()} | branches


@pytest.mark.parametrize("place", ["root", *(f"branch {level}" for level in range(BRANCHES, 0, -1)), "entry"])
def test_a_word_that_leads_out_of_the_arena_is_not_followed(tmp_path: Path, place: str) -> None:
    path = tmp_path / "arena"
    with Pool(path=str(path)) as pool:
        disk = pool.create("disk", 16 << 20)
        disk.write(0, CONTENT)
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
            arena = Arena(view)
            at = wrong_words(arena)[place]
            right = arena.word(at)
            arena.set_word(at, right & 0xFFFFFFFF | FAR)
            with pytest.raises(EngineError, match="is not what was written"):
                disk.read(0, len(CONTENT))
            arena.set_word(at, right)
        assert disk.read(0, len(CONTENT)) == CONTENT


@pytest.mark.parametrize("place", ["root", "branch 1", "entry"])
def test_requests_that_come_together_do_not_follow_it_either(stage: Stage, tmp_path: Path, place: str) -> None:
    stage.disk.write(0, CONTENT)
    with (tmp_path / "arena").open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        arena = Arena(view)
        at = wrong_words(arena)[place]
        right = arena.word(at)
        arena.set_word(at, right & 0xFFFFFFFF | FAR)
        client = stage.attach(style=0)
        client.send(request(CMD_READ, 0, BLOCK) * 2)
        stage.settle()
        refused = bytes(client.line.outgoing)
        assert len(refused) == 2 * SIMPLE_REPLY
        assert int.from_bytes(refused[4:8], "big") == EIO
        arena.set_word(at, right)
        client.line.outgoing.clear()
        client.send(b"".join(request(CMD_READ, number * BLOCK, BLOCK) for number in range(BLOCKS)))
        stage.settle()
    answers = bytes(client.line.outgoing)
    size = SIMPLE_REPLY + BLOCK
    assert b"".join(answers[at + SIMPLE_REPLY : at + size] for at in range(0, len(answers), size)) == CONTENT


@pytest.mark.parametrize("style", [0, 1])
def test_what_was_foreseen_and_then_changed_is_read_as_it_is(stage: Stage, style: int) -> None:
    """Reads and writes of the same blocks that came together: each read finds what the write before it stored."""
    client = stage.attach(style=style)
    asked = b""
    for number in range(40):  # more than are foreseen at once
        asked += request(CMD_WRITE, 0, BLOCK) + half_random(number) + request(CMD_READ, 0, BLOCK)
    client.send(asked)
    stage.settle()
    answers = bytes(client.line.outgoing)
    at = 0
    for number in range(40):
        at = answers.index(half_random(number), at)
    assert client.session.requests == 80


def test_nothing_is_brought_near_of_a_pool_that_is_closed(stage: Stage) -> None:
    """Its memory is none of ours any more."""
    stage.disk.write(0, CONTENT)
    client = stage.attach(style=0)
    stage.pool.close()
    client.send(request(CMD_READ, 0, BLOCK) * 2)
    stage.settle()
    assert len(client.line.outgoing) == 2 * SIMPLE_REPLY
    assert int.from_bytes(client.line.outgoing[4:8], "big") == EIO
