"""Whether the other process of a takeover is gone: who is ending is waited for, however much he has to let go."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from nbdzram.ready import readable
from nbdzram.server import handover

ENDS_SLOWLY = """
import ctypes, os, threading
threading.Thread(target=os.read, args=(0, 1)).start()
os.write(1, b"x")
ctypes.CDLL(None).syscall(60, 0)  # exit(2): this thread's end, and not yet that of the process
"""
"""Is ending, as the kernel has it, until its standard input ends; as one that has hundreds of GiB to give back."""
HAS_MUCH = "import os; memory = bytearray(os.urandom(1 << 20)) * 256; os.write(1, b'x'); os.read(0, 1)"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "ENDING_SECONDS", 0.0)


@pytest.fixture
def other(request: pytest.FixtureRequest) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A process, and a descriptor of it."""
    command = [sys.executable, "-c", request.param]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.read(1) == b"x"
        descriptor = os.pidfd_open(process.pid)
        try:
            yield process, descriptor
        finally:
            process.kill()
            os.close(descriptor)


@pytest.mark.parametrize("other", [ENDS_SLOWLY], ids=["slow"], indirect=True)
def test_who_is_ending_is_waited_for_until_he_is_gone(
    other: tuple[subprocess.Popen[bytes], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever was to take from a large server that was killed gave up, and nobody served."""
    process, descriptor = other
    while not handover._is_ending(descriptor):
        os.sched_yield()
    looks: list[set[int]] = []

    def look(*descriptors: int, seconds: float | None = None) -> set[int]:
        looks.append(readable(*descriptors, seconds=seconds))
        if len(looks) == 1:
            assert process.stdin is not None
            process.stdin.close()
        return looks[-1]

    monkeypatch.setattr(handover, "readable", look)
    assert handover.has_ended(descriptor)
    assert (looks[0], looks[-1]) == (set(), {descriptor})


@pytest.mark.parametrize("other", [HAS_MUCH], ids=["large"], indirect=True)
def test_who_runs_has_not_ended_and_who_ends_in_that_moment_has(
    other: tuple[subprocess.Popen[bytes], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    process, descriptor = other
    assert not handover.has_ended(descriptor)

    def is_ending(_: int) -> bool:
        process.kill()
        process.wait()
        return real(descriptor)

    assert not handover._is_ending(process.stdout.fileno() if process.stdout else -1)  # no process at all
    real = handover._is_ending
    monkeypatch.setattr(handover, "_is_ending", is_ending)
    assert handover.has_ended(descriptor)
    assert not real(descriptor)  # it is gone, and has nothing to let go any more


@pytest.mark.parametrize("other", [HAS_MUCH], ids=["large"], indirect=True)
def test_who_was_silent_for_too_long_is_gone_before_the_old_one_goes_on(
    other: tuple[subprocess.Popen[bytes], int],
) -> None:
    """Until then it has the arenas, and the old one would not get them: it ended, and all disks in memory with it."""
    process, descriptor = other
    handover._end(process.pid, 15.0)
    assert readable(descriptor, seconds=0)
