"""The guest's root file system: a cpio archive of busybox, nbd-client, mke2fs, kernel modules and files to copy.

The format is the kernel's "newc" (Documentation/driver-api/early-userspace/buffer-format.rst): per file 110 bytes of
ASCII hex, the name, the content, name and content each padded to 4 bytes; a file TRAILER!!! ends it.
"""

from __future__ import annotations

import hashlib
import re
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tests.kernel.guest.kernel import Kernel
from tests.support.programs import require_program

INIT = Path(__file__).with_name("init.sh")
PRESSURE = Path(__file__).with_name("pressure.py")
MODULES = ("virtio_pci", "virtio_net", "nbd", "ext4")

# Enough for folding and memory pressure to mean something, little enough for an emulated machine to copy in seconds.
PAYLOAD_BYTES = 12 << 20


class Archive:
    """A cpio archive under construction. Parent directories appear by themselves."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._names: set[str] = set()

    def directory(self, name: str) -> None:
        if name not in self._names and name not in {"", "."}:
            self.directory(str(Path(name).parent))
            self._entry(name, stat.S_IFDIR | 0o755, b"")

    def file(self, name: str, content: bytes, mode: int = 0o644) -> None:
        if name not in self._names:
            self.directory(str(Path(name).parent))
            self._entry(name, stat.S_IFREG | mode, content)

    def program(self, path: str, name: str) -> None:
        """A program of this machine with the shared libraries that it loads."""
        self.file(name, Path(path).read_bytes(), 0o755)
        # ldd fails on a static program, and says so.
        listing = subprocess.run(["ldd", path], capture_output=True, text=True, check=False, timeout=60).stdout
        for library in re.findall(r"(/\S+) \(0x", listing):
            self.file(library.lstrip("/"), Path(library).read_bytes(), 0o755)

    def finish(self) -> bytes:
        self._entry("TRAILER!!!", 0, b"")
        return b"".join(self._parts)

    def _entry(self, name: str, mode: int, content: bytes) -> None:
        self._names.add(name)
        encoded = name.encode() + b"\0"
        inode = len(self._names)
        # inode mode uid gid nlink mtime size devmajor devminor rdevmajor rdevminor namesize check
        numbers = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(encoded), 0)
        header = b"070701" + b"".join(b"%08X" % number for number in numbers)
        self._parts += [_padded(header + encoded), _padded(content)]


def _padded(piece: bytes) -> bytes:
    return piece + bytes(-len(piece) % 4)


class Tree(Archive):
    """The same, as files below a directory."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self._root = root

    def _entry(self, name: str, mode: int, content: bytes) -> None:
        self._names.add(name)
        path = self._root / name
        if stat.S_ISDIR(mode):
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.write_bytes(content)
            path.chmod(stat.S_IMODE(mode))


def build_root(directory: Path) -> None:
    """A root directory whose first process is init.sh, for a root disk over nbdzram that `attach --persist` keeps."""
    tree = Tree(directory)
    for name in ("dev", "proc", "sys", "run", "tmp"):
        tree.directory(name)
    tree.program(require_program("busybox", package="busybox-static"), "bin/busybox")
    (directory / "bin" / "sh").symlink_to("busybox")
    tree.program(require_program("nbd-client", package="nbd-client"), "sbin/nbd-client")
    tree.file("sbin/init", INIT.read_bytes(), 0o755)
    add_nbdzram(tree)


def build_initramfs(kernel: Kernel, *, with_nbdzram: bool = False) -> bytes:
    archive = Archive()
    for name in ("dev", "proc", "sys", "mnt", "ram", "cgroup"):
        archive.directory(name)
    archive.file("init", INIT.read_bytes(), 0o755)
    archive.program(require_program("busybox", package="busybox-static"), "bin/busybox")
    archive.program(require_program("nbd-client", package="nbd-client"), "sbin/nbd-client")
    archive.program(require_program("mke2fs", package="e2fsprogs"), "sbin/mke2fs")
    for number, (name, module) in enumerate(kernel.modules_for(*MODULES)):
        archive.file(f"modules/{number:02}-{name}.ko", module)
    if with_nbdzram:
        add_nbdzram(archive)
    digests = []
    for name, content in payload():
        archive.file(f"payload/{name}", content)
        digests.append(f"{hashlib.sha256(content).hexdigest()}  {name}\n")
    archive.file("payload.sha256", "".join(digests).encode())
    return archive.finish()


def add_nbdzram(archive: Archive) -> None:
    """This Python with the modules that `nbdzram attach --persist` loads, each where it lies here."""
    program = str(Path(sys.executable).resolve())
    root = str(Path(__file__).resolve().parents[3])
    told = subprocess.run(
        [sys.executable, "-B", "-c", LOADED],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={"PYTHONPATH": root},
    ).stdout
    archive.program(program, program.lstrip("/"))
    for path in map(Path, told.splitlines()):
        if path.suffix == ".so":
            archive.program(str(path), str(path).lstrip("/"))
        else:
            archive.file(str(path).lstrip("/"), path.read_bytes())
    archive.file("pressure.py", PRESSURE.read_bytes())
    archive.file("python/program", program.encode())
    archive.file("python/home", sys.base_prefix.encode())
    archive.file("python/path", f"{root}:{sysconfig.get_path('purelib')}".encode())


LOADED = """
import encodings.ascii, encodings.idna, hashlib, mmap, sys
from nbdzram.cli import attach, greeting, keep, main, netlink, supervisor, voice
from nbdzram import __main__, residence
for module in list(sys.modules.values()):
    if getattr(module, "__file__", None):
        print(module.__file__)
"""


def payload() -> Iterator[tuple[str, bytes]]:
    """Real files of this machine: Python's own library, in a stable order, up to PAYLOAD_BYTES."""
    library = Path(sysconfig.get_path("stdlib"))
    total = 0
    for path in sorted(library.rglob("*.py")):
        if path.is_file() and " " not in path.name and "site-packages" not in path.parts:
            content = path.read_bytes()
            total += len(content)
            if total > PAYLOAD_BYTES:
                return
            yield str(path.relative_to(library)), content
