"""`make bench-memory`: the cost of real data in the kernel's zram, in nbdkit's zstd allocator, and here; and the bound.

Every image is made from files and processes of this machine, and read back and compared at the end. Sizes are MiB;
"bound" is the sum of the distinct blocks' compressed sizes, same-filled blocks left out: no store of single blocks can
be smaller with that codec. Behind the sizes stand the figures that a release must reach, with their verdicts.
"""

from __future__ import annotations

import hashlib
import os
import platform
import random
import sysconfig
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import zstandard

from nbdzram.engine.check import Check
from nbdzram.engine.fold import Compact, Fold
from nbdzram.engine.pool import HUGE_THRESHOLD, Pool
from nbdzram.engine.recompress import Recompress
from nbdzram.engine.reports import Report
from nbdzram.engine.run import Run
from tests.bench.content import count_distinct
from tests.bench.economy import measure_economy
from tests.bench.figures import Figure, print_table
from tests.support import images
from tests.support.nbd_client import Client
from tests.support.server import Nbdkit
from tests.support.zram import CONTROL, zram_device

MIB = 1 << 20
BLOCK = 4096
REQUEST = 256 * 1024
ZSTD_LEVEL = 3


@dataclass(frozen=True, slots=True)
class Costs:
    """One image's memory in bytes, by who keeps it."""

    image: int
    zram: int | None  # None where this kernel has none, or without root
    nbdkit: int
    stored: int
    folded: int
    recompressed: int
    metadata: int
    bound_lz4: int
    bound_zstd: int
    duplicates: int  # left after the fold

    def figures(self, name: str) -> list[Figure]:
        ratios = [
            *([] if self.zram is None else [Figure(f"{name}: stored / zram", self.stored / self.zram, 1.0, False, "")]),
            Figure(f"{name}: folded, compacted / bound", self.folded / self.bound_lz4, 1.02, False, ""),
            Figure(f"{name}: recompressed / nbdkit zstd", self.recompressed / self.nbdkit, 0.85, False, ""),
        ]
        return [*ratios, Figure(f"{name}: duplicates left after a fold", self.duplicates, 0, False, "")]


def ext4_of_installations(directory: Path) -> bytes:
    """Three installations of the same Python on one file system."""
    tree = images.python_tree(directory / "tree", copies=3)
    size = sum(path.stat().st_size for path in tree.rglob("*") if path.is_file())
    return images.ext4_image(directory / "disk.img", tree, (size * 5 // 4 // MIB + 16) * MIB).read_bytes()


def memory_of_processes(_: Path) -> bytes:
    """Four processes of one program, as if all were swapped out."""
    return b"".join(images.process_memory() for _ in range(4))


def cloned_machines(directory: Path) -> bytes:
    """One image three times, a twentieth of the blocks of each clone rewritten."""
    tree = images.python_tree(directory / "tree")
    size = sum(path.stat().st_size for path in tree.rglob("*") if path.is_file())
    image = images.ext4_image(directory / "disk.img", tree, (size * 5 // 4 // MIB + 16) * MIB).read_bytes()
    return image + b"".join(images.changed(image, seed=seed) for seed in (1, 2))


def text(_: Path) -> bytes:
    """Source code, one file behind the other."""
    library = Path(sysconfig.get_path("stdlib"))
    sources = (path for path in sorted(library.rglob("*.py")) if "site-packages" not in path.parts)
    return whole_blocks(b"".join(path.read_bytes() for path in sources)[: 64 * MIB])


def compressed_media(_: Path) -> bytes:
    """The same, compressed already, in pieces of 1 MiB as a player or an archive would hold them."""
    plain = text(_)
    return whole_blocks(b"".join(zlib.compress(plain[at : at + MIB], 9) for at in range(0, len(plain), MIB)))


def noise(_: Path) -> bytes:
    return random.Random(9).randbytes(16 * MIB)


def whole_blocks(content: bytes) -> bytes:
    return content + bytes(-len(content) % BLOCK)


IMAGES: dict[str, Callable[[Path], bytes]] = {
    "ext4, 3 Pythons": ext4_of_installations,
    "memory, 4 processes": memory_of_processes,
    "3 cloned machines": cloned_machines,
    "text": text,
    "compressed media": compressed_media,
    "random": noise,
}


def zram_bytes(image: bytes, directory: Path) -> int | None:
    if os.geteuid() != 0 or not (CONTROL / "hot_add").exists():
        return None
    file = directory / "image"
    file.write_bytes(image)
    with zram_device(len(image)) as zram:
        zram.write(file)
        return zram.mm_stat()[2]


def nbdkit_bytes(image: bytes, directory: Path) -> int:
    """By how much the resident size grows."""
    place = directory / "nbdkit"
    place.mkdir()
    with Nbdkit(place, str(len(image)), allocator="zstd") as server:
        before = server.resident_bytes()
        with Client(server.unix_path, "") as client:
            client.write_all(image[at : at + REQUEST] for at in range(0, len(image), REQUEST))
        return server.resident_bytes() - before


def zstd_bound(image: bytes) -> int:
    compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_content_size=False, write_checksum=False)
    sizes: dict[bytes, int] = {}
    for at in range(0, len(image), BLOCK):
        block = image[at : at + BLOCK]
        digest = hashlib.sha256(block).digest()
        if digest not in sizes and block != block[:8] * (BLOCK // 8):
            sizes[digest] = min(BLOCK, len(compressor.compress(block)))
    return sum(sizes.values())


def finish(run: Run[Report]) -> None:
    while run.step():
        pass


def measure(image: bytes, directory: Path) -> Costs:
    distinct = count_distinct([image], huge_threshold=HUGE_THRESHOLD)
    with Pool() as pool:
        disk = pool.create("disk", len(image))
        for at in range(0, len(image), REQUEST):
            disk.write(at, image[at : at + REQUEST])
        stored = pool.stats().mem_used_total
        finish(Fold(pool))
        finish(Compact(pool))
        after = pool.stats()
        assert disk.read(0, len(image)) == image
        finish(Recompress(pool, level=ZSTD_LEVEL, dictionary=True))
        finish(Compact(pool))
        recompressed = pool.stats().mem_used_total
        assert disk.read(0, len(image)) == image
        finish(Check(pool))
    return Costs(
        image=len(image),
        zram=zram_bytes(image, directory),
        nbdkit=nbdkit_bytes(image, directory),
        stored=stored,
        folded=after.mem_used_total,
        recompressed=recompressed,
        metadata=after.metadata,
        bound_lz4=distinct.compressed_bytes,
        bound_zstd=zstd_bound(image),
        duplicates=after.objects - distinct.blocks,
    )


HEADINGS = (
    "image",
    "zram lz4",
    "nbdkit zstd",
    "stored",
    "folded",
    "recompressed",
    "metadata",
    "bound lz4",
    "bound zstd",
)


def cells(costs: Costs) -> list[str]:
    sizes = [costs.image, costs.zram, costs.nbdkit, costs.stored, costs.folded, costs.recompressed, costs.metadata]
    return ["-" if size is None else f"{size / MIB:.1f}" for size in [*sizes, costs.bound_lz4, costs.bound_zstd]]


def main() -> None:
    print(f"{platform.machine()}, Linux {platform.release()}; MiB")
    print(f"{'':20}" + "".join(f"{heading:>14}" for heading in HEADINGS))
    figures: list[Figure] = []
    for name, make in IMAGES.items():
        with tempfile.TemporaryDirectory(prefix="nbdzram-memory-") as place:
            directory = Path(place)
            costs = measure(make(directory), directory)
        print(f"{name:20}" + "".join(f"{cell:>14}" for cell in cells(costs)), flush=True)
        figures += costs.figures(name)
    print_table(figures)
    with tempfile.TemporaryDirectory(prefix="nbdzram-memory-") as place:
        print_table(measure_economy(Path(place)))


if __name__ == "__main__":
    main()
