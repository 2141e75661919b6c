"""What this process may use of the machine: memory, processors, tasks.

A container, a unit of systemd and a batch job give a process less than the machine has, and say so in its cgroups. A
limit holds for everything below it, so what counts is the smallest on the way up from the process's own cgroup:

    /proc/self/cgroup          which cgroup: 0::/a/b (version 2), 9:memory:/a/b (version 1, a hierarchy a controller)
    /proc/self/mountinfo       where its hierarchy is mounted, and from which cgroup on (in a container rarely from /)
    MOUNT/a/b, MOUNT/a, MOUNT  each may have a limit; no file, or "max", is none

Both versions may be mounted together; whichever has the controller tells. Of processors the affinity counts too, which
is also how cpusets are seen. Sources: cgroups(7), Documentation/admin-guide/cgroup-v2.rst and cgroup-v1, proc(5).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

MEMORY_FILES = ("memory.max", "memory.high", "memory.limit_in_bytes")
"""Hard limits of both versions, and the one above which version 2 stalls a process: no disk should grow past it."""


MEMINFO = Path("/proc/meminfo")
MEMORY_FILE_SYSTEMS = {"tmpfs", "ramfs", "hugetlbfs"}


@dataclass(frozen=True, slots=True)
class Share:
    """So much of something, and whose limit it is: a cgroup's directory, or None for the machine's own."""

    amount: int
    cgroup: Path | None = None

    def __str__(self) -> str:
        return "this machine" if self.cgroup is None else f"the cgroup {self.cgroup}"


@dataclass(frozen=True, slots=True)
class Room:
    """So many bytes of a share of memory may still be taken; below 0 where too much is."""

    free: int
    share: Share


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine as the process sees it whose directory `process` is.

    Where file systems are mounted is what `viewer` sees, who looks at them: another process may be in a container.
    """

    process: Path = Path("/proc/self")
    viewer: Path | None = None  # None: the process itself

    def memory(self) -> Share:
        """Bytes of memory."""
        found = [Share(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))]
        for directory in self._cgroups("memory"):
            limits = [_number(directory / name) for name in MEMORY_FILES]
            found += [Share(limit, directory) for limit in limits if limit is not None]
        return min(found, key=lambda share: share.amount)

    def memory_groups(self) -> tuple[Path, ...]:
        """The directories of the cgroups that may have limits of memory, from the inside out."""
        return tuple(self._cgroups("memory"))

    def rooms(self, groups: Sequence[Path]) -> list[Room]:
        """What the machine and each of those cgroups with a limit have left, and page cache that can be dropped; as far
        as it is told: a process may not be shown /proc/meminfo (ProcSubset=pid)."""
        told = _words(MEMINFO)
        rooms = []
        if "MemAvailable:" in told:
            rooms.append(Room(told["MemAvailable:"] << 10, Share(told["MemTotal:"] << 10)))
        for directory in groups:
            limits = [limit for name in MEMORY_FILES if (limit := _number(directory / name)) is not None]
            if limits:
                taken = _number(directory / "memory.current")
                if taken is None:
                    taken = _number(directory / "memory.usage_in_bytes") or 0
                rooms.append(Room(min(limits) - taken + _cached(directory), Share(min(limits), directory)))
        return rooms

    def stalled_percent(self, groups: Sequence[Path]) -> float:
        """In how much of the last ten seconds everybody in the innermost cgroup waited for memory; 0: none tells."""
        files = [*(directory / "memory.pressure" for directory in groups), Path("/proc/pressure/memory")]
        for text in map(_text, files):
            if found := re.search(r"^full avg10=(\d+\.\d+)", text, re.MULTILINE):
                return float(found[1])
        return 0.0

    def processors(self) -> int:
        """Processors that may be used at once: by affinity, and by quota, rounded up. At least one."""
        allowed = [len(os.sched_getaffinity(0))]
        for directory in self._cgroups("cpu"):
            words = _text(directory / "cpu.max").split()  # QUOTA PERIOD in microseconds
            if not words:
                words = [_text(directory / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
            if all(word.isdecimal() for word in words):  # "max" and -1 are none
                quota, period = map(int, words)
                allowed.append(math.ceil(quota / period))
        return max(min(allowed), 1)

    def tasks(self) -> Share | None:
        """Processes and threads that the cgroup may have, all together. None: no limit."""
        limits = [(_number(directory / "pids.max"), directory) for directory in self._cgroups("pids")]
        found = [Share(limit, directory) for limit, directory in limits if limit is not None]
        return min(found, key=lambda share: share.amount, default=None)

    def unit(self) -> str | None:
        """The service of systemd in whose cgroup the process is. None: it is in none, or in a container's."""
        for _, cgroup in self._memberships():
            names = [name for name in PurePosixPath(cgroup).parts if name.endswith((".service", ".scope"))]
            if names and names[-1].endswith(".service") and not names[-1].startswith("user@"):
                return names[-1]
        return None

    def keeps_in_memory(self, path: Path) -> bool:
        """Whether what is stored there never reaches a disk. False where it cannot be told."""
        device = path.stat().st_dev
        name = f"{os.major(device)}:{os.minor(device)}"
        lines = _lines((self.viewer or self.process) / "mountinfo")
        kinds = {line.partition(" - ")[2].split(" ")[0] for line in lines if line.split(" ")[2] == name}
        return bool(kinds) and kinds <= MEMORY_FILE_SYSTEMS

    def _cgroups(self, controller: str) -> Iterator[Path]:
        """The directories of the process's own cgroup and those above it, from the inside out."""
        for names, cgroup in self._memberships():
            if names and controller not in names:
                continue
            for root, mount in self._mounts(controller if names else None):
                inside = PurePosixPath(cgroup)
                known = inside.is_relative_to(root) and ".." not in inside.parts
                directory = mount / inside.relative_to(root) if known else mount
                yield directory
                yield from (parent for parent in directory.parents if parent.is_relative_to(mount))

    def _memberships(self) -> Iterator[tuple[list[str], str]]:
        """Controllers (none for version 2) and cgroup."""
        for line in _lines(self.process / "cgroup"):
            _, names, cgroup = line.split(":", 2)
            yield [name for name in names.split(",") if name], cgroup

    def _mounts(self, controller: str | None) -> Iterator[tuple[str, Path]]:
        """Where version 2, or a controller's hierarchy of version 1, is mounted: from which cgroup on, and where."""
        for line in _lines((self.viewer or self.process) / "mountinfo"):
            place, _, kind = line.partition(" - ")
            kind, _, options = kind.split(" ", 2)
            wanted = kind == "cgroup2" if controller is None else kind == "cgroup" and controller in options.split(",")
            if wanted:
                root, mount = map(_unescape, place.split(" ")[3:5])
                yield root, Path(mount)


def _cached(group: Path) -> int:
    """Bytes of page cache that the kernel drops before it ends anybody: what was used once, and half of what was again.

    Files on a tmpfs are not among them. Version 1 tells of the groups below in words of their own.
    """
    told = _words(group / "memory.stat")
    inactive, active = (told.get(f"total_{name}_file", told.get(f"{name}_file", 0)) for name in ("inactive", "active"))
    return inactive + active // 2


def _words(file: Path) -> dict[str, int]:
    """Lines of a name and a number, and maybe a unit."""
    lines = (line.split() for line in _lines(file))
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}


def _number(file: Path) -> int | None:
    """A limit; None for "max", for -1, and where there is no such file."""
    text = _text(file).strip()
    return int(text) if text.isdecimal() else None


def _lines(file: Path) -> list[str]:
    """The kernel ends lines with a newline alone, and escapes nothing else in the name of a directory that somebody
    mounts on, or calls a cgroup, that ends a line for Python: a form feed, say."""
    return [line for line in _text(file).split("\n") if line]


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""


def _unescape(path: str) -> str:
    """Blanks, tabs, newlines and backslashes are octal in mountinfo."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path)
