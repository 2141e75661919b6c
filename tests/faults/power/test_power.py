"""No flushed write is lost to a power cut, and what is there behind it is what all exports were at one moment."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import random
import shutil
import subprocess
import sys
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from nbdzram.engine.pool import Pool
from nbdzram.server.restore import Restore
from nbdzram.server.state import State
from tests.faults.power.disk import MARKS, Act, Disk, Event, recorded
from tests.faults.power.story import CONTENTS, Contents, content
from tests.unit.engine.blocks import BLOCK

SOURCE = Path(__file__).parent
STEPS = 400
QUICK_CUTS, SLOW_CUTS = 60, 1000
NUMBERS = {hashlib.blake2b(content(number)).digest(): number for number in range(CONTENTS)}
SEEDS = [int(seed) for seed in os.environ.get("NBDZRAM_POWER_SEEDS", "").split()] or None


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shim, compiled."""
    built = tmp_path_factory.mktemp("recorder") / "recorder.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-O1", "-o", str(built), str(SOURCE / "recorder.c"), "-ldl"],
        check=True,
        capture_output=True,
    )
    return built


class Tale:
    """What a story did to its disk, and what its exports were."""

    def __init__(self, seed: int, recorder: Path, place: Path, one_fails_in: int = 0) -> None:
        self.place = place
        directory, log, history = place / "kept", place / "log", place / "history"
        directory.mkdir(parents=True)
        given = [f"--seed={seed}", f"--steps={STEPS}", f"--directory={directory}", f"--history={history}"]
        if (
            not one_fails_in
        ):  # behind a sync that failed this system shows a server what the recorded disk does not have
            given.append("--begins-again")
        told = subprocess.run(
            [sys.executable, "-m", "tests.faults.power.story", *given],
            env={
                **os.environ,
                "LD_PRELOAD": str(recorder),
                "NBDZRAM_RECORD_DIRECTORY": str(directory),
                "NBDZRAM_RECORD_LOG": str(log),
                "NBDZRAM_RECORD_FAILS": f"{seed} {one_fails_in}",
            },
            cwd=SOURCE.parents[2],
            capture_output=True,
            text=True,
            check=False,
        )
        assert told.returncode == 0, told.stderr
        self.events = list(recorded(log))
        self.history: list[Contents] = pickle.loads(history.read_bytes())
        shutil.rmtree(directory)

    def cuts(self, count: int, dice: random.Random) -> list[int]:
        """Positions in the events: before and behind what orders the others, and anywhere."""
        edges = [
            position + behind
            for position, event in enumerate(self.events)
            if event.act is not Act.WRITTEN
            for behind in (0, 1)
        ]
        first = next(position for position, event in enumerate(self.events) if _mark(event) is not None)
        wanted = [dice.choice(edges) if dice.random() < 0.7 else dice.randrange(len(self.events)) for _ in range(count)]
        return sorted(max(first, position) for position in wanted)


def _mark(event: Event) -> tuple[str, int] | None:
    if event.name != MARKS or event.act is not Act.WRITTEN:
        return None
    what, version = event.content.decode().split()
    return what, int(version)


@contextmanager
def begun_from(directory: Path) -> Iterator[Contents]:
    """What a server that begins from this directory has."""
    with ExitStack() as stack:
        pool = stack.enter_context(Pool())
        Restore([], {"default": pool}, State(None)).from_newest(directory)
        assert pool.all_disks() == pool.disks()
        yield {disk.name: numbers(disk.read(0, disk.size_bytes)) for disk in pool.disks()}
        pool.check()


def numbers(whole: bytes) -> bytes:
    """The numbers of an export's blocks."""
    blocks = [whole[at : at + BLOCK] for at in range(0, len(whole), BLOCK)]
    return array("H", [NUMBERS[hashlib.blake2b(block).digest()] for block in blocks]).tobytes()


def is_between(found: Contents, before: Contents, behind: Contents) -> bool:
    """Whether each block is as it was before a step or behind it, and all the rest as before, or as behind."""
    if found.keys() != before.keys() or before.keys() != behind.keys():
        return False
    return all(
        len(found[name]) == len(before[name]) == len(behind[name])
        and all(
            found[name][at : at + 2] in (before[name][at : at + 2], behind[name][at : at + 2])
            for at in range(0, len(found[name]), 2)
        )
        for name in found
    )


def hold_against_history(found: Contents, history: Sequence[Contents], flushed: int, begun: int) -> None:
    """Raises AssertionError where the exports are not what they were between what was flushed and what was begun."""
    for version in range(flushed, begun + 1):
        if found == history[version]:
            return
        if version < begun and is_between(found, history[version], history[version + 1]):
            return
    lost = [version for version in range(flushed) if found == history[version]]
    nearest = min(range(flushed, begun + 1), key=lambda version: len(differences(found, history[version])))
    raise AssertionError(
        f"the exports are those of version {lost[-1:]}, of {flushed} to {begun}; not as in version {nearest}: "
        f"{differences(found, history[nearest])[:8]}"
    )


def differences(found: Contents, expected: Contents) -> list[str]:
    """In words."""
    words = [f"{name} is there" for name in found.keys() - expected.keys()]
    words += [f"{name} is not there" for name in expected.keys() - found.keys()]
    for name in found.keys() & expected.keys():
        one, other = array("H", found[name]), array("H", expected[name])
        if len(one) != len(other):
            words.append(f"{name} has {len(one)} blocks, not {len(other)}")
        words += [
            f"{name} {at}: {here}, not {there}"
            for at, (here, there) in enumerate(zip(one, other, strict=False))
            if here != there
        ]
    return words


def cut_and_compare(tale: Tale, count: int, dice: random.Random) -> None:
    disk, taken, flushed, begun = Disk(), 0, 0, 0
    for number, cut in enumerate(tale.cuts(count, dice)):
        for event in tale.events[taken:cut]:
            if mark := _mark(event):
                flushed = max(flushed, mark[1]) if mark[0] == "flushed" else flushed
                begun = mark[1] if mark[0] == "begun" else begun
            if event.name != MARKS:
                disk.take(event)
        taken = max(taken, cut)
        left = tale.place / f"left-{number}"
        disk.lay_out(left, dice)
        if not any(left.glob("*.stream")):
            assert flushed == 0
        else:
            with begun_from(left) as found:
                hold_against_history(found, tale.history, flushed, min(begun, len(tale.history) - 1))
        shutil.rmtree(left)


def stories(
    count: int, cuts: int, recorder: Path, place: Path, caplog: pytest.LogCaptureFixture, *, one_fails_in: int = 0
) -> None:
    caplog.set_level(logging.ERROR, "nbdzram")
    for seed in SEEDS or random.sample(range(1 << 30), count):
        print(f"NBDZRAM_POWER_SEEDS={seed}")
        tale = Tale(seed, recorder, place / str(seed), one_fails_in)
        cut_and_compare(tale, cuts // count, random.Random(seed))
    assert "is damaged" not in caplog.text, "what the power tears is no damage"


def test_no_flushed_write_is_lost_to_a_power_cut(
    recorder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stories(2, QUICK_CUTS, recorder, tmp_path, caplog)


def test_no_flushed_write_is_lost_to_a_power_cut_of_a_disk_that_fails(
    recorder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Any write, sync, name and removal may; what was answered was answered by what did not."""
    stories(2, QUICK_CUTS, recorder, tmp_path, caplog, one_fails_in=40)


@pytest.mark.slow
@pytest.mark.parametrize("one_fails_in", [0, 15], ids=["sound", "failing"])
def test_no_flushed_write_is_lost_to_a_thousand_power_cuts(
    recorder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, one_fails_in: int
) -> None:
    stories(10, SLOW_CUTS, recorder, tmp_path, caplog, one_fails_in=one_fails_in)
