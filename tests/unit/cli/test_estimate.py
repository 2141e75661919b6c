"""`nbdzram estimate` says what a pool then needs."""

from __future__ import annotations

import json
import os
import random
from itertools import islice, pairwise
from pathlib import Path

import pytest

from nbdzram.cli.estimate import _extents
from nbdzram.engine.fold import Compact, Fold
from nbdzram.engine.pool import Pool
from nbdzram.engine.recompress import Recompress
from nbdzram.server.runs import Run
from tests.unit.cli.conftest import run

BLOCK = 4096
HOLE = 64 * BLOCK


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Text, duplicates, zeroes, random bytes and a hole."""
    choose = random.Random(7)
    words = [choose.randbytes(5).hex().encode() for _ in range(200)]
    texts = [b" ".join(choose.choices(words, k=600))[:BLOCK] for _ in range(60)]
    blocks = [*texts, *choose.choices(texts, k=40), *[bytes(BLOCK)] * 10, *(choose.randbytes(BLOCK) for _ in range(20))]
    choose.shuffle(blocks)
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.write(b"".join(blocks))
        file.truncate(len(blocks) * BLOCK + HOLE)
    return path


def finish(*runs: Run) -> None:
    for run_ in runs:
        while run_.step():
            pass


def test_the_estimate_is_what_a_pool_needs(image: Path) -> None:
    told = json.loads(run("estimate", str(image), "--json").out)
    assert told["hole_bytes"] == HOLE
    with Pool() as pool:
        disk = pool.create("disk", image.stat().st_size)
        disk.write(0, image.read_bytes()[:-HOLE])
        stats = pool.stats()
        assert told["blocks"] * BLOCK == stats.orig_data_size
        assert told["same_filled"] == stats.same_pages
        assert told["needs"]["lz4"]["memory"] == stats.mem_used_total
        finish(Fold(pool), Compact(pool))
        assert told["needs"]["lz4"]["memory_folded"] == pool.stats().mem_used_total
        assert told["distinct_objects"] == pool.stats().objects
        finish(Recompress(pool), Compact(pool))
        # Recompression goes for smaller slots; the estimate takes the shorter of both encodings.
        assert told["needs"]["zstd"]["memory_folded"] == pytest.approx(pool.stats().mem_used_total, rel=0.1)


def test_holes_between_and_around_what_is_stored_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "sparse.img"
    for written, holes, more in (((), 5 * HOLE, 0), ((1, 3), 5 * HOLE - 2 * BLOCK, 0), ((1, 5), 5 * HOLE - BLOCK, 100)):
        with path.open("wb") as file:
            for number in written:
                file.seek(number * HOLE)
                file.write(b"x" * (BLOCK if number < 5 else more))
            file.truncate(5 * HOLE + more)  # and the last block may be none that is whole
        told = json.loads(run("estimate", str(path), "--json").out)
        assert (told["blocks"], told["hole_bytes"]) == (len(written), holes)


def test_several_images_share_one_pool(image: Path, tmp_path: Path) -> None:
    twin = tmp_path / "twin.img"
    twin.write_bytes(image.read_bytes()[:-HOLE])
    one, both = (json.loads(run("estimate", *map(str, files), "--json").out) for files in ([image], [image, twin]))
    assert both["objects"] == 2 * one["objects"]
    assert both["distinct_objects"] == one["distinct_objects"]
    assert both["hole_bytes"] == one["hole_bytes"] > 0, "the other is written out"


def test_the_table_tells_memory_before_and_after_folding(image: Path) -> None:
    out = run("estimate", str(image), "--level", "9", "--sample", "2").out
    assert "130 blocks: 10 same-filled" in out
    assert "from one distinct block in 2" in out
    assert [line.split()[0] for line in out.splitlines()[2:]] == ["MEMORY", "LZ4", "ZSTD"]


@pytest.mark.parametrize(("name", "clue"), [("gone.img", "No such file"), ("", "is a directory")])
def test_what_cannot_be_read_is_one_sentence(tmp_path: Path, name: str, clue: str) -> None:
    done = run("estimate", str(tmp_path / name))
    assert (done.code, clue in done.err, "Traceback" in done.err) == (1, True, False)


@pytest.mark.parametrize(
    ("path", "kind"), [("/dev/zero", "a character device"), ("pipe", "a pipe"), (".", "a directory")]
)
def test_what_is_no_image_is_refused_without_waiting(tmp_path: Path, path: str, kind: str) -> None:
    """A pipe that nobody writes to is not even opened."""
    os.mkfifo(tmp_path / "pipe")
    done = run("estimate", str(tmp_path / path))
    assert (done.code, f"is {kind}; name a disk image" in done.err) == (1, True)


@pytest.mark.parametrize("more", [0, 100])
def test_extents_cover_all_data_once_in_whole_blocks(tmp_path: Path, more: int) -> None:
    """But for the last one, which ends with the file."""
    path, size, offsets = tmp_path / "sparse.img", (8 << 20) + more, [0, 1 << 20, (3 << 20) + 100, (8 << 20) + more - 1]
    with path.open("wb") as file:
        for offset in offsets:
            file.seek(offset)
            file.write(b"x")
    with path.open("rb") as file:
        extents = list(islice(_extents(file.fileno(), size), 9))
    assert all(start % BLOCK == 0 and (end % BLOCK == 0 or end == size) for start, end in extents)
    assert all(before[1] <= after[0] for before, after in pairwise(extents))
    for offset in offsets:
        assert sum(start <= offset < end for start, end in extents) == 1
    assert sum(end - start for start, end in extents) < size or os.statvfs(tmp_path).f_bsize > 1 << 20
