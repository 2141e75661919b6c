"""Loading an image file into a new disk, by qemu-img, or by nbdcopy where the image is raw.

The disk is concealed until the program has ended well (server/loading.py): whoever interrupts it leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nbdzram.config import ExportConfig, ServerConfig
from nbdzram.errors import ConfigError, UserError
from nbdzram.residence import NOT_RUN, earlier
from nbdzram.server.state import State
from nbdzram.units import format_sizes
from nbdzram.values import SECTOR_BYTES, export_size

MAGICS = {b"QFI\xfb": "qcow2", b"KDMV": "vmdk", b"vhdxfile": "vhdx", b"conectix": "vpc", b"QED\0": "qed"}
"""What images begin with that are not raw (QEMU's block drivers); without qemu-img nobody here can read them."""

PROGRESS = re.compile(rb"(\d+)(?:\.\d+)?/100")  # of both programs
ENGLISH = {"LC_ALL": "C"}
KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFCHR: "a character device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}
TOLD_BYTES = 4096  # of what a program complains: its last line is what a person needs


@dataclass(frozen=True, slots=True)
class Image:
    """A file to load a disk from."""

    path: Path
    format: str
    size_bytes: int  # of the disk in it

    def command(self, uri: str) -> list[str]:
        """The program that copies it to an empty disk, and tells how far it is."""
        source = str(self.path.absolute())  # a path that begins with "/" is never a protocol's name to QEMU
        program = shutil.which("qemu-img")
        if program is not None:
            return [program, "convert", "-p", "-n", "--target-is-zero", "-f", self.format, "-O", "raw", source, uri]
        return [_nbdcopy_for(self.path), "--destination-is-zero", "--progress=1", source, uri]


def resolve(config: ServerConfig) -> ServerConfig:
    """The same, with the sizes of exports that are to be as large as their images. Raises ConfigError."""
    if all(export.image is None for export in config.exports):
        return config
    return dataclasses.replace(config, exports=tuple(_sized(export, config) for export in config.exports))


def _sized(export: ExportConfig, config: ServerConfig) -> ExportConfig:
    if export.image is None:
        return export
    if not export.image.exists() and config.state_dir is not None:  # it was loaded before, and is not needed again
        known = State(config.state_dir).changes.exports.get(export.name)
        if known is not None and known.declared is not None:
            return dataclasses.replace(export, size_bytes=export.size_bytes or known.declared.size_bytes)
    size = look_at(export.image).size_bytes
    if export.size_bytes and export.size_bytes < size:
        has, needs = format_sizes(export.size_bytes, size)
        raise ConfigError(
            f"the export '{export.name}' has {has}, but the disk in {export.image} has {needs}; "
            "leave out the size, or give a larger one"
        )
    try:
        return dataclasses.replace(export, size_bytes=export.size_bytes or export_size(size))
    except ValueError as error:
        raise ConfigError(
            f"the export '{export.name}' is as large as the disk in {export.image}, and {error}; give it a size"
        ) from None


def look_at(path: Path) -> Image:
    """What an image file is. Raises ConfigError."""
    try:
        kind = what_else(path)
        if kind is not None:
            raise ConfigError(f"{path} is {kind}; name a disk image or a block device")
        with path.open("rb") as file:
            beginning = file.read(max(map(len, MAGICS)))
            size = file.seek(0, os.SEEK_END)  # of a block device too
    except OSError as error:
        raise ConfigError(f"cannot read the image {path}: {error.strerror}") from error
    program = shutil.which("qemu-img")
    if program is None:
        _nbdcopy_for(path)
        kinds = [kind for magic, kind in MAGICS.items() if beginning.startswith(magic)]
        if kinds:
            raise ConfigError(f"{path} is a {kinds[0]} image, which needs qemu-img; install it (qemu-utils)")
        return Image(path, "raw", _in_sectors(size))
    command = [program, "info", "--output=json", "-U", str(path.absolute())]
    done = subprocess.run(earlier(command), capture_output=True, check=False, env={**os.environ, **ENGLISH})
    if done.returncode in NOT_RUN:
        raise ConfigError(_does_not_run(program, _last_line(done.stderr)))
    try:
        told = json.loads(done.stdout)
        return Image(path, str(told["format"]), _in_sectors(int(told["virtual-size"])))
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"qemu-img cannot read the image {path}: {_last_line(done.stderr)}") from None


def what_else(path: Path) -> str | None:
    """What is at `path` that is neither a file nor a block device: those alone have an end, and can be read twice.

    Asked before it is opened: a pipe that nobody writes to would wait for ever. Raises OSError.
    """
    mode = path.stat().st_mode
    return None if stat.S_ISREG(mode) or stat.S_ISBLK(mode) else KINDS.get(stat.S_IFMT(mode), "not a file")


async def copy(image: Image, uri: str, tell: Callable[[int], None], told_to_stop: asyncio.Event) -> None:
    """Copy an image to an empty disk; `tell` hears the percents. Raises UserError."""
    command = image.command(uri)
    process = await asyncio.create_subprocess_exec(
        *earlier(command),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **ENGLISH},
        start_new_session=True,  # Ctrl-C is told to us alone, and we tell the program
    )
    watching = asyncio.create_task(_watch(process, tell))
    stopping = asyncio.create_task(told_to_stop.wait())
    try:
        await asyncio.wait({watching, stopping}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
        if not watching.done():
            with contextlib.suppress(ProcessLookupError):
                process.kill()
    complaint = await watching
    if told_to_stop.is_set():
        raise UserError(f"loading {image.path} was interrupted; what was loaded of it is gone")
    if process.returncode in NOT_RUN:
        raise UserError(_does_not_run(command[0], complaint))
    if process.returncode:
        raise UserError(f"loading {image.path} failed: {complaint}")


async def _watch(process: asyncio.subprocess.Process, tell: Callable[[int], None]) -> str:
    """Until it has ended; its last complaint."""
    assert process.stdout is not None
    assert process.stderr is not None
    complaining = asyncio.create_task(process.stderr.read())
    while piece := await process.stdout.read(TOLD_BYTES):
        found: list[bytes] = PROGRESS.findall(piece)
        if found:
            tell(int(found[-1]))
    complaints = await complaining
    await process.wait()
    return _last_line(complaints[-TOLD_BYTES:])


def _nbdcopy_for(path: Path) -> str:
    program = shutil.which("nbdcopy")
    if program is None:
        raise ConfigError(
            f"to load the image {path} takes qemu-img, or nbdcopy for a raw one, and neither is found; install one "
            "(qemu-utils, libnbd-bin)"
        )
    return program


def _does_not_run(program: str, complaint: str) -> str:
    """`complaint`: of the shell that tried, which ends with the reason."""
    return f"{program} cannot be run: {complaint.rpartition(': ')[2]}; install it anew, or take it out of the way"


def _in_sectors(size: int) -> int:
    return -(-size // SECTOR_BYTES) * SECTOR_BYTES


def _last_line(complaints: bytes) -> str:
    lines = complaints.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it does not say why"
