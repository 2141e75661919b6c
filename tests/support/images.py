"""Real data from what the machine has; nothing large is committed. Sizes are whole blocks."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from tests.support.programs import require_program, run

BLOCK = 4096

# Libraries whose pages a process of this program holds: a swap-like memory has code objects, strings, tables.
IMPORTS = "import asyncio, click, decimal, email, http.client, json, logging, rich.console, sqlite3, unittest, xml.dom"


def python_tree(target: Path, *, copies: int = 1, packages: Sequence[str] = ("",)) -> Path:
    """A directory with this Python's own library (or some packages of it); installed packages and tests left out."""
    library = Path(sysconfig.get_path("stdlib"))
    unwanted = shutil.ignore_patterns("site-packages", "test", "tests", "*.a")
    for number in range(copies):
        for package in packages:
            shutil.copytree(library / package, target / f"python{number}" / package, ignore=unwanted)
    return target


def ext4_image(path: Path, tree: Path, size_bytes: int) -> Path:
    """An ext4 file system of `size_bytes` with the files of `tree` in it, made without mounting."""
    mke2fs = require_program("mke2fs", package="e2fsprogs")
    # Blocks of 4 KiB, as mke2fs itself takes from 512 MiB on: with less, equal files rarely share one.
    run([mke2fs, "-q", "-F", "-t", "ext4", "-b", "4096", "-d", tree, path, f"{size_bytes // 1024}k"])
    assert path.stat().st_size == size_bytes
    return path


def changed(image: bytes, *, seed: int) -> bytes:
    """A clone of a machine after some use: some blocks new, some copied elsewhere."""
    source = random.Random(seed)
    clone = bytearray(image)
    count = len(image) // BLOCK
    for _ in range(count // 20):
        at, other = source.randrange(count) * BLOCK, source.randrange(count) * BLOCK
        clone[at : at + BLOCK] = source.randbytes(BLOCK // 2) + bytes(BLOCK // 2)
        clone[other : other + BLOCK] = image[at : at + BLOCK]
    return bytes(clone)


def same_filled_mix(block_count: int, *, seed: int = 1) -> bytes:
    """Zero blocks, blocks that repeat one 8-byte word, near misses of both, and text."""
    source = random.Random(seed)
    blocks: list[bytes] = []
    for number in range(block_count):
        word = source.randbytes(8)
        match number % 5:
            case 0:
                blocks.append(bytes(BLOCK))
            case 1:
                blocks.append(word * (BLOCK // 8))
            case 2:  # the last word differs: not same-filled
                blocks.append(word * (BLOCK // 8 - 1) + source.randbytes(8))
            case 3:  # repeats with a period of four bytes, so of eight too
                blocks.append(word[:4] * (BLOCK // 4))
            case _:
                blocks.append((b"block %d " % number * BLOCK)[:BLOCK])
    return b"".join(blocks)


def random_bytes(block_count: int, *, seed: int = 2) -> bytes:
    """What does not compress."""
    return random.Random(seed).randbytes(block_count * BLOCK)


def process_memory() -> bytes:
    """The writable private memory of a Python process that has imported a good deal: what swap holds."""
    child = subprocess.Popen(
        [sys.executable, "-c", f"{IMPORTS}; print('ready', flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        return _writable_memory(child.pid)
    finally:
        child.kill()
        child.communicate()


def _writable_memory(pid: int) -> bytes:
    pieces = []
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            mapping = re.match(r"([0-9a-f]+)-([0-9a-f]+) rw.p", line)
            if mapping and "[v" not in line:  # vvar and vdso are the kernel's
                start, end = (int(edge, 16) for edge in mapping.groups())
                memory.seek(start)
                pieces.append(memory.read(end - start))
    image = b"".join(pieces)
    assert len(image) % BLOCK == 0
    return image
