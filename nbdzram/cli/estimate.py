"""`nbdzram estimate`: what images would need, without a server and without storing them."""

from __future__ import annotations

import dataclasses
import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nbdzram.cli.columns import Column, render, screen_width
from nbdzram.cli.common import ANY_PATH, json_option, print_json
from nbdzram.cli.images import what_else
from nbdzram.cli.numbers import Whole
from nbdzram.engine.stats import BLOCK_SIZE
from nbdzram.errors import UserError
from nbdzram.units import format_size

if TYPE_CHECKING:
    from nbdzram.engine.estimate import Estimate, Figures, Need

PIECE_BYTES = 4 << 20  # fed at once: large enough to leave the interpreter, small enough for a smooth bar

Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Image:
    """A file or device that is looked at."""

    path: Path
    size_bytes: int


@click.command(
    "estimate",
    epilog="\b\nExamples:\n  nbdzram estimate machine.img\n  nbdzram estimate vm1.img vm2.img vm3.img --level 9\n"
    "  sudo nbdzram estimate /dev/sda --sample 16 --json",
)
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=ANY_PATH)
@click.option("--level", metavar="N", type=Whole(1, 22), default=3, show_default=True, help="Zstandard's level.")
@click.option(
    "--sample",
    metavar="N",
    type=Whole(1, 1 << 20),
    default=1,
    show_default=True,
    help="Compress about one distinct block in N, and scale up; every block is still read.",
)
@json_option
def command(*, files: tuple[Path, ...], level: int, sample: int, as_json: bool) -> None:
    """Tell how much memory disk images would need, together in one pool.

    Needs no server and stores nothing: each block is hashed, and compressed as LZ4 (as it is stored first) and as
    Zstandard (as recompression stores it). Takes 16 bytes of memory a distinct block, less with --sample.
    """
    from nbdzram.engine.estimate import Estimate  # noqa: PLC0415 - --help needs no engine

    images = [_open(path) for path in files]
    estimate = Estimate(level=level, sample=sample)
    holes = 0
    with _progress(sum(image.size_bytes for image in images), quiet=as_json) as advance:
        for image in images:
            holes += _feed(estimate, image, advance)
    figures = estimate.figures()
    if as_json:
        return print_json(_as_object(images, figures, holes, sample))
    for line in describe(images, figures, holes, sample):
        click.echo(line)
    return None


def describe(images: list[Image], figures: Figures, holes: int, sample: int) -> Iterator[str]:
    """The result as text."""
    size = sum(image.size_bytes for image in images)
    what = click.format_filename(images[0].path) if len(images) == 1 else f"{len(images)} images"
    about = f", from one distinct block in {sample}" if sample > 1 else ""
    yield f"{what}: {format_size(size)}, of which {format_size(holes)} are holes{about}"
    duplicates = figures.objects - figures.distinct_objects
    share = f" ({100 * duplicates / figures.objects:.0f} %)" if figures.objects else ""
    yield (
        f"{figures.blocks} blocks: {figures.same_filled} same-filled, {figures.distinct_objects} distinct, "
        f"{duplicates} duplicates{share}"
    )
    columns: list[Column[tuple[str, str, Need]]] = [
        Column("", "", lambda row: row[0]),
        Column("MEMORY", "", lambda row: row[2].memory, True),
        Column("FOLDED", "", lambda row: row[2].memory_folded, True),
        Column("RATIO", "", lambda row: _ratio(figures.blocks * BLOCK_SIZE, row[2].memory_folded)),
        Column("HOW", "", lambda row: row[1]),
    ]
    rows = [(name.upper(), HOW.get(name, ""), need) for name, need in figures.needs.items()]
    yield from render(columns, rows, width=screen_width())


HOW = {
    "lz4": "as written, then `nbdzram fold`",
    "zstd": "after `nbdzram recompress` too",
}


def _as_object(images: list[Image], figures: Figures, holes: int, sample: int) -> dict[str, Any]:
    files = [{"path": str(image.path), "size_bytes": image.size_bytes} for image in images]
    return {"files": files, "hole_bytes": holes, "sample": sample, **dataclasses.asdict(figures)}


def _ratio(stored: int, memory: int) -> str:
    return f"{stored / memory:.2f}" if memory else "-"


def _open(path: Path) -> Image:
    """Raises UserError for what cannot be read or is no file and no block device."""
    try:
        kind = what_else(path)
        if kind is not None:
            raise UserError(f"{path} is {kind}; name a disk image or a block device")
        with path.open("rb", buffering=0) as file:
            return Image(path, file.seek(0, os.SEEK_END))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _feed(estimate: Estimate, image: Image, advance: Advance) -> int:
    """Every block that is not a hole. Gives the bytes of the holes."""
    buffer, read_to, data = bytearray(PIECE_BYTES), 0, 0
    view = memoryview(buffer)
    try:
        with image.path.open("rb", buffering=0) as file:
            for start, end in _extents(file.fileno(), image.size_bytes):
                file.seek(start)
                advance(start - read_to)
                read_to = start
                while read_to < end:
                    length = _fill(file, view[: min(PIECE_BYTES, end - read_to)])
                    if length == 0:
                        break  # the file became shorter meanwhile
                    estimate.feed(view[:length])
                    advance(length)
                    read_to, data = read_to + length, data + length
    except OSError as error:
        raise UserError(f"cannot read {image.path}: {error.strerror}") from error
    advance(image.size_bytes - read_to)
    return image.size_bytes - data


def _fill(file: Any, target: memoryview) -> int:
    """Read until `target` is full or the file ends: blocks that are fed must be whole."""
    filled = 0
    while filled < len(target):
        length = file.readinto(target[filled:])
        if not length:
            break
        filled += length
    return filled


def _extents(descriptor: int, size_bytes: int) -> Iterator[tuple[int, int]]:
    """What is not a hole (lseek(2), SEEK_DATA), rounded to blocks. A device or an old file system is one extent."""
    position = 0
    while position < size_bytes:
        try:
            start = os.lseek(descriptor, position, os.SEEK_DATA)
            end = os.lseek(descriptor, start, os.SEEK_HOLE)
        except OSError as error:
            if position == 0 and error.errno != errno.ENXIO:  # ENXIO: nothing but a hole from here
                yield 0, size_bytes
            return
        start = max(start // BLOCK_SIZE * BLOCK_SIZE, position)
        position = min(-(-end // BLOCK_SIZE) * BLOCK_SIZE, size_bytes)
        yield start, position


@contextmanager
def _progress(total: int, *, quiet: bool) -> Iterator[Advance]:
    """A bar on a terminal; nothing elsewhere."""
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console  # noqa: PLC0415 - a pipe does not pay for it
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn  # noqa: PLC0415

    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda length: bar.advance(task, length)
