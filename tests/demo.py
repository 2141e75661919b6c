"""`make demo`: a real disk image goes in over NBD, folds, and is read back and compared. Under a minute.

Needs no NBD client: the image is written and read by the small client of the tests. With mke2fs on the machine the
image is an ext4 file system, otherwise a tar archive, of this Python's own library, placed twice: two machines
installed from the same files.
"""

from __future__ import annotations

import io
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support import images
from tests.support.nbd_client import PIECE, Client
from tests.support.programs import SEARCH_PATH
from tests.support.server import Nbdzram

MIB = 1 << 20
FIELDS = (
    *("orig_data_size", "compr_data_size", "mem_used_total", "mem_limit", "mem_used_max"),
    *("same_pages", "pages_compacted", "huge_pages", "huge_pages_since", "pages_folded"),
)


def make_image(directory: Path) -> tuple[bytes, str]:
    """One disk's content and what it is; whole blocks."""
    tree = images.python_tree(directory / "tree")
    if shutil.which("mke2fs", path=SEARCH_PATH):
        size = sum(path.stat().st_size for path in tree.rglob("*") if path.is_file())
        image = images.ext4_image(directory / "disk.img", tree, (size * 2 // MIB + 8) * MIB)
        return image.read_bytes(), "an ext4 file system"
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.add(tree, arcname=".")
    content = archive.getvalue()
    return content + bytes(-len(content) % images.BLOCK), "a tar archive"


def pieces(image: bytes) -> Iterator[bytes]:
    for offset in range(0, len(image), PIECE):
        yield image[offset : offset + PIECE]


def store(server: Nbdzram, names: list[str], image: bytes) -> None:
    for name in names:
        started = time.monotonic()
        with server.client(name) as client:
            client.write_all(pieces(image))
            client.flush()
        seconds = time.monotonic() - started
        print(f"  {name}: {len(image) / MIB:.0f} MiB in {seconds:.1f} s")


def verify(client: Client, image: bytes) -> int:
    """Compare every block; returns how many."""
    offset = 0
    for piece in client.read_all():
        assert piece == image[offset : offset + len(piece)], f"the piece at {offset} came back wrong"
        offset += len(piece)
    return offset // images.BLOCK


def show(title: str, mm_stat: list[int]) -> None:
    print(f"\n{title}")
    for name, number in zip(FIELDS, mm_stat, strict=True):
        size = f"  {number / MIB:8.1f} MiB" if name.endswith(("size", "total", "max")) else ""
        print(f"  {name:18} {number:12}{size}")


def main() -> None:
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="nbdzram-demo-") as name:
        directory = Path(name)
        image, kind = make_image(directory)
        disks = ["first", "second"]
        print(f"Made {kind} of {len(image) / MIB:.0f} MiB from this machine's Python library.")
        with Nbdzram(directory, dict.fromkeys(disks, len(image))) as server:
            print(f"Started a server: {server.uri('first')}\n\nWriting it to two disks over NBD:")
            store(server, disks, image)
            before = server.mm_stat()
            show("nbdzram stat --mm-stat", before)
            print("\nnbdzram fold")
            print(server.command_line("fold").stdout.rstrip())
            after = server.mm_stat()
            show("nbdzram stat --mm-stat", after)
            print("\nReading both disks back:")
            for disk in disks:
                with server.client(disk) as client:
                    print(f"  {disk}: {verify(client, image)} blocks, every one as written")
        ratio = after[0] / after[2]
        print(
            f"\n{after[0] / MIB:.0f} MiB of disk in {after[2] / MIB:.1f} MiB of memory ({ratio:.1f} : 1);"
            f" folding gave back {(before[2] - after[2]) / MIB:.1f} MiB."
            f" Took {time.monotonic() - started:.0f} s."
        )


if __name__ == "__main__":
    try:
        main()
    except AssertionError as error:
        sys.exit(f"demo: {error}")
