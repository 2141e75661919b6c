"""What the data itself allows, counted without the engine, with the function that compresses blocks there.

That function, because lz4.block.compress is LZ4's for streams: it needs 1.4 % more for blocks of shared libraries, and
would be a bound that is easily reached.
"""

from __future__ import annotations

import hashlib
import shutil
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nbdzram.engine.codec import compress_lz4
from tests.support import images
from tests.support.programs import SEARCH_PATH

BLOCK = 4096
MIB = 1 << 20
CACHE = Path(__file__).resolve().parents[2] / ".cache" / "bench"


@dataclass(frozen=True, slots=True)
class Distinct:
    """Blocks of an image, each content counted once; same-filled ones apart."""

    blocks: int
    compressed_bytes: int  # by LZ4, or 4096 where that does not help
    same_filled: int
    total: int


def count_distinct(pieces: Iterable[bytes], *, huge_threshold: int) -> Distinct:
    """pieces: whole blocks. huge_threshold: compressed sizes from here on are stored as 4096 bytes."""
    seen: set[bytes] = set()
    compressed = same_filled = total = 0
    for piece in pieces:
        for offset in range(0, len(piece), BLOCK):
            block = piece[offset : offset + BLOCK]
            total += 1
            if block == block[:8] * (BLOCK // 8):
                same_filled += 1
                continue
            digest = hashlib.sha256(block).digest()
            if digest not in seen:
                seen.add(digest)
                size = len(compress_lz4(block))
                compressed += size if size < huge_threshold else BLOCK
    return Distinct(len(seen), compressed, same_filled, total)


def ext4_gibibyte() -> Path:
    """A 1 GiB ext4 image of real files: Python with its packages, then this machine's libraries. Kept under .cache."""
    image = CACHE / "ext4-1g.img"
    if not image.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        tree = CACHE / "tree"
        _collect(tree, 800 * MIB)
        unfinished = CACHE / "unfinished.img"
        images.ext4_image(unfinished, tree, 1024 * MIB)
        unfinished.rename(image)
        shutil.rmtree(tree)
    return image


def _collect(tree: Path, limit: int) -> None:
    """Copy files until there are `limit` bytes of them."""
    assert shutil.which("mke2fs", path=SEARCH_PATH), "mke2fs is not installed; try: apt-get install e2fsprogs"
    shutil.rmtree(tree, ignore_errors=True)
    total = 0
    for source in (
        Path(sysconfig.get_path("stdlib")),
        Path("/usr/lib"),
        Path("/usr/share"),
        Path("/usr/bin"),
    ):
        for path in sorted(source.rglob("*")):
            if not path.is_file() or path.is_symlink():
                continue
            total += path.stat().st_size
            if total > limit:
                return
            target = tree / path.relative_to("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
