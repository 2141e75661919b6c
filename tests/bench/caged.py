"""How long a reader waits beside writers for whom there is no memory: the server in a control group of 512 MiB.

python -m tests.bench.acceptance caged

Four clients write 1 GiB each of what does not compress, and go on when they are refused; folds and compactions follow
each other, and in the middle the server is taken over. One reader of a disk that was there before reads on all the
while, at depth 1, as it did alone.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event, Thread, get_native_id

from nbdzram.control.client import ControlClient
from tests.bench.figures import Figure
from tests.bench.measure import BLOCK, MIB, fill, fio, median
from tests.support.cgroup import cgroup, inside, oom_kills
from tests.support.nbd_client import Client, RequestFailed
from tests.support.takeover import Line

ROOM = 512 * MIB
WRITERS = 4
WRITTEN_BYTES = 1 << 30  # of each of them: eight times the room together
READ_BYTES = 64 * MIB
PIECES = 16  # of noise, written in turn: another MiB of it would cost the writer more than the server


class Pusher(Thread):
    """Writes its part of a disk over and over, whatever the answer, at the lowest priority: it stands for a machine."""

    def __init__(self, client: Client, number: int) -> None:
        super().__init__()
        self.client = client
        self.first = number * WRITTEN_BYTES
        self.pieces = [random.Random(number << 32 | piece).randbytes(MIB) for piece in range(PIECES)]
        self.ended = Event()
        self.refused = 0

    def run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, get_native_id(), 19)
        while not self.ended.is_set():
            for offset in range(0, WRITTEN_BYTES, MIB):
                if self.ended.is_set():
                    return
                try:
                    # A block of its own each: no two are equal, or folding would make room for all of them.
                    piece = self.pieces[offset // MIB % PIECES]
                    self.client.write(self.first + offset, _marked(piece, offset))
                except RequestFailed as refusal:
                    assert refusal.error == errno.ENOSPC
                    self.refused += 1


def _marked(piece: bytes, offset: int) -> bytes:
    """The piece, each block of it told apart by where it goes."""
    blocks = bytearray(piece)
    for start in range(0, MIB, BLOCK):
        blocks[start : start + 8] = (offset + start).to_bytes(8, "little")
    return bytes(blocks)


@contextmanager
def pushing(line: Line) -> Iterator[list[Pusher]]:
    """Writers that have all been refused, and runs over the pool one after the other."""
    done = Event()

    def run_and_run() -> None:
        while not done.is_set():
            for kind in ("fold", "compact"):
                line.last.command_line(kind, check=False)  # one that a takeover ends is told so

    with ExitStack() as stack:
        pushers = [Pusher(stack.enter_context(line.servers[0].client("full")), number) for number in range(WRITERS)]
        runner = Thread(target=run_and_run)
        for thread in (*pushers, runner):
            thread.start()
        try:
            line.last.wait_until(lambda: all(pusher.refused for pusher in pushers), 300)
            yield pushers
        finally:
            done.set()
            for pusher in pushers:
                pusher.ended.set()
            for thread in (*pushers, runner):
                thread.join()


def measure_caged(directory: Path, rounds: int, seconds: int) -> list[Figure]:
    """p99 of 4 KiB reads at depth 1: alone, beside writers that are refused, and with a takeover beside as well."""
    alone, beside, taken, details = [], [], [], []
    refused = 0
    with cgroup("memory", ROOM) as cage:
        line = Line(directory, (), {"disk": str(READ_BYTES), "full": "4G"}, in_memory=True, behind=inside(cage, []))
        try:
            fill(line.last, READ_BYTES)
            for _ in range(rounds):
                alone.append(_p99_us(line, seconds))
                with pushing(line) as pushers:
                    beside.append(_p99_us(line, seconds))
                    taking = Thread(target=_take_over_beside_reads, args=(line, _reads(line)))
                    taking.start()
                    taken.append(_p99_us(line, seconds))
                    taking.join()
                refused += sum(pusher.refused for pusher in pushers)
                details.append(f"{beside[-1]:.0f} and {taken[-1]:.0f}/{alone[-1]:.0f} us")
            kills = oom_kills(cage)
        finally:
            line.last.stop()
    ratios = [one / other for one, other in zip(beside, alone, strict=True)]
    ratios_taken = [one / other for one, other in zip(taken, alone, strict=True)]
    return [
        Figure("p99 of reads beside writers that are refused / alone", median(ratios), 2.0, False, ", ".join(details)),
        Figure("the same with a takeover beside", median(ratios_taken), 2.0, False, f"{refused} writes refused"),
        Figure("killed by the kernel", kills, 0, False, ""),
    ]


def _reads(line: Line) -> int:
    with ControlClient(line.control) as control:
        return sum(export.operations["read"].requests for export in control.status().exports)


def _take_over_beside_reads(line: Line, before: int) -> None:
    """Once the reader reads."""
    line.last.wait_until(lambda: _reads(line) > before, 60)
    line.take_over()


def _p99_us(line: Line, seconds: int) -> float:
    options = (
        "--rw=randread",
        "--bs=4k",
        "--iodepth=1",
        f"--size={READ_BYTES}",
        "--time_based",
        f"--runtime={seconds}",
    )
    report = fio(line.servers[0], *options)["read"]  # its sockets are handed over
    p99_ns: float = report["clat_ns"]["percentile"]["99.000000"]
    return p99_ns / 1000
