"""`make instructions`: what requests, a fold and a scrape take, held against what they took when last kept.

    python -m tests.bench.instructions           count, and fail where one takes over 3 % more than it is known to
    python -m tests.bench.instructions --keep    count, and write instructions.toml: with a change that means it

Counts of another Python, compiler or library are others; they are printed then, and not judged.

Instructions, because they are the same on a busy machine: callgrind counts those of this process, without the kernel's.
The requests go through a whole session, from its line to its line, 32 in a turn as a busy client sends them. What
drives them is Python and is counted with them: less than a tenth of a READ.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import version
from pathlib import Path

import uvloop

from nbdzram.config import ExportConfig, PoolConfig, ServerConfig, UnixAddress
from nbdzram.engine.fold import Fold
from nbdzram.metrics.families import FAMILIES
from nbdzram.server.service import Service
from tests.bench.figures import Figure, print_table
from tests.support.programs import require_program
from tests.support.rehearsal import Stage
from tests.wire import CMD_READ, CMD_WRITE, request

KEPT = Path(__file__).with_suffix(".toml")
TOLERANCE = 0.03
WITH = "made_with"
MARK = "getpgid"
"""A function of libc's that nothing else calls meanwhile: callgrind writes what it counted each time that it begins."""

BLOCK = 4096
BLOCKS = 4096
BATCH = 32
LARGE = 256 << 10
MEM_LIMIT = 1 << 30  # callgrind has few addresses, and a pool reserves by its limit
EXPORTS = 20
SCRAPES = 10


def half_compressible(seed: int) -> bytes:
    """Blocks of which half is noise, as fio makes them."""
    source = random.Random(seed)
    return b"".join(source.randbytes(BLOCK // 2) + bytes(BLOCK // 2) for _ in range(BLOCKS))


def begin() -> None:
    """What is counted begins here."""
    print("\t", flush=True)
    os.getpgid(0)


def end(what: str, divisor: int) -> None:
    """What was counted since `begin` is `divisor` times `what`."""
    os.getpgid(0)
    print(f"{what}\t{divisor}", flush=True)


def play_requests(stage: Stage) -> None:
    """READs and WRITEs by one client, each kind once before it is counted."""
    client = stage.attach(style=0)
    source = random.Random(1)
    contents = [half_compressible(seed) for seed in (1, 2)]
    stage.disk.write(0, contents[0])
    for length, in_a_turn in ((BLOCK, BATCH), (LARGE, 1)):
        offsets = list(range(0, BLOCKS * BLOCK, length))
        source.shuffle(offsets)
        for name, command in (("READ", CMD_READ), ("WRITE", CMD_WRITE)):
            for content in contents:
                asked = [
                    request(command, at, length) + (content[at : at + length] if command == CMD_WRITE else b"")
                    for at in offsets
                ]
                turns = [b"".join(asked[first : first + in_a_turn]) for first in range(0, len(asked), in_a_turn)]
                begin()
                for turn in turns:
                    client.send(turn)
                    while stage.serve(client) or client.session.in_flight:
                        stage.desk.turn()
                    client.line.outgoing.clear()
                end(f"{name} of {length >> 10} KiB" if content is contents[1] else "", len(asked))
    client.line.sends_no_more = True
    stage.settle()


def play_fold(stage: Stage) -> None:
    """A fold of blocks that all have a twin."""
    half = half_compressible(3)[: BLOCKS * BLOCK // 2]
    stage.disk.write(0, half)
    stage.disk.write(len(half), half)
    run = Fold(stage.pool)
    begin()
    while run.step(BLOCKS):
        pass
    end("fold, a block", BLOCKS)
    assert run.report().objects_merged >= BLOCKS // 2


def play_scrape(directory: Path) -> None:
    """A scrape of a server with EXPORTS exports."""

    async def look() -> None:
        exports = tuple(ExportConfig(name=f"disk{number}", size_bytes=1 << 20) for number in range(EXPORTS))
        config = ServerConfig(
            exports=exports,
            pools=(PoolConfig(mem_limit=MEM_LIMIT),),
            threads=2,
            tcp=(),
            unix=(UnixAddress(path=directory / "nbd.sock"),),
        )
        service = Service(config)
        await service.start()
        gc.collect()  # as a server that has started: or the collector's turns, which what was imported decides, count
        gc.freeze()
        begin()
        for _ in range(SCRAPES):
            status = service.status()
            "".join(line for family in FAMILIES for line in family.lines(status))
        end(f"scrape of {EXPORTS} exports", SCRAPES)
        await service.stop()

    uvloop.run(look())


def play(directory: Path) -> None:
    """All of it, in the process that is watched."""
    stage = Stage(BLOCKS * BLOCK, mem_limit=MEM_LIMIT)
    play_requests(stage)
    play_fold(stage)
    stage.close()
    play_scrape(directory)


def counted(directory: Path) -> dict[str, float]:
    """Instructions of each thing that is played."""
    valgrind = require_program("valgrind", package="valgrind")
    played = subprocess.run(
        [
            *(valgrind, "--tool=callgrind", f"--callgrind-out-file={directory}/out", f"--dump-before={MARK}"),
            *(sys.executable, "-m", "tests.bench.instructions", "--play", str(directory)),
        ],
        env={**os.environ, "PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    if played.returncode != 0:
        sys.exit(f"instructions were not counted:\n{played.stdout}{played.stderr[-4000:]}")
    counts = {}
    for number, line in enumerate(played.stdout.splitlines(), 1):  # each mark wrote what came before it
        what, divisor = line.split("\t")
        if what:
            found = re.search(r"^totals: (\d+)", (directory / f"out.{number}").read_text(), re.MULTILINE)
            assert found, f"callgrind told no total of {what}"
            counts[what] = int(found[1]) / int(divisor)
    return counts


def made_with() -> str:
    """What the counts depend on besides our code."""
    compiler = subprocess.run(["gcc", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    libraries = (f"{name} {version(name)}" for name in ("Cython", "lz4", "uvloop", "xxhash"))
    return "; ".join((sys.version, " ".join(platform.libc_ver()), platform.machine(), compiler, *libraries))


def keep(counts: dict[str, float]) -> None:
    KEPT.write_text(
        "# What `make instructions` counted when this was last written; see instructions.py.\n"
        f"{WITH} = {json.dumps(made_with())}\n"
        + "".join(f"{json.dumps(what)} = {round(count)}\n" for what, count in counts.items())
    )


def judged(counts: dict[str, float]) -> list[Figure]:
    """Each count, as a share of what it was."""
    kept = tomllib.loads(KEPT.read_text())
    with_what = kept.pop(WITH)
    if with_what != made_with():
        print(f"counted with {made_with()}\nkept with    {with_what}: so none is judged")
        kept = counts
    if kept.keys() != counts.keys():
        sys.exit(f"{KEPT.name} does not tell of the same things; write it anew with --keep")
    return [
        Figure(f"instructions, {what} / when kept", count / kept[what], 1 + TOLERANCE, False, f"{count:,.0f}")
        for what, count in counts.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Count what requests, a fold and a scrape take.")
    parser.add_argument("--keep", action="store_true", help=f"write the counts to {KEPT.name}")
    parser.add_argument("--play", metavar="DIRECTORY", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.play:
        play(arguments.play)
        return
    with tempfile.TemporaryDirectory() as directory:
        counts = counted(Path(directory))
    if arguments.keep:
        keep(counts)
    figures = judged(counts)
    print_table(figures)
    sys.exit(0 if all(figure.reached for figure in figures) else 1)


if __name__ == "__main__":
    main()
