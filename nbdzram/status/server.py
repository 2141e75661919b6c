"""Of a server as a whole."""

from __future__ import annotations

from dataclasses import dataclass

from nbdzram.status.maintenance import PoolStatus
from nbdzram.status.traffic import ExportStatus


@dataclass(frozen=True, slots=True)
class ExportSample:
    """What one export did in some seconds before a moment."""

    at: float  # seconds since the epoch
    read_bytes: float  # a second, as the next two
    write_bytes: float
    requests: float
    median_seconds: float  # of reads and writes; 0: there was none
    p99_seconds: float


@dataclass(frozen=True, slots=True)
class HistorySample(ExportSample):
    """What a server did in some seconds before a moment: all its exports together."""

    memory_bytes: int  # that all pools took, metadata included


@dataclass(frozen=True, slots=True)
class ThreadStatus:
    """A thread that serves clients."""

    number: int
    clients: int
    busy_seconds: float  # in turns, since the start
    longest_turn_seconds: float  # of the last interval


@dataclass(frozen=True, slots=True)
class CheckpointStatus:
    """The checkpoints that the server takes."""

    moment: float | None  # of the newest that is whole, in seconds since the epoch; None: none is yet
    interval_seconds: float
    seconds: float  # that the last one took
    stream_bytes: int  # of the last file
    failures: int
    written_share: float | None = None  # of the one under way; None: none is
    held_back: tuple[str, ...] = ()  # exports that cannot be read: the newest has them as they were, or not at all
    damaged_files: int = 0  # that a start could not use, and are kept in the directory until somebody removes them


@dataclass(frozen=True, slots=True)
class JournalStatus:
    """What FLUSH waits for in pools whose durability is flush."""

    pools: tuple[str, ...]
    usable: bool  # False: FLUSH waits for the first checkpoint, or is an I/O error until the next one
    trouble: str  # why it cannot be used, or is waited for; empty: it can, or begins
    groups: int  # written and synced since the start; each answers all who waited
    group_bytes: int
    segment_bytes: int  # of its file, since the last checkpoint
    seconds: float  # that the last group took
    failures: int
    held_back: tuple[str, ...] = ()  # exports that cannot be read: their FLUSH fails, and the disk has what they were


@dataclass(frozen=True, slots=True)
class HeadroomStatus:
    """What is left of memory, of the cgroup or machine that has the least."""

    whose: str
    limit_bytes: int
    free_bytes: int  # with page cache that can be dropped
    reserve_bytes: int  # what pools do not take
    short: bool  # pools take no page more
    shortages: int  # how often that began


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """The whole server, at one moment."""

    version: str
    pid: int
    started_at: float  # seconds since the epoch
    uptime_seconds: float
    uris: tuple[str, ...]  # one an address, without an export's name
    draining: bool
    connections: int
    connections_total: int
    handshake_failures: dict[str, int]  # by cause, from a fixed set
    protocol_errors: int  # connections ended because the peer broke the protocol after its handshake
    connections_limit: int
    tls_files_usable: bool  # False: they changed on disk, and the old ones are kept
    certificate_expires_at: float | None  # seconds since the epoch; None: there is none
    state_dir_size_bytes: int  # of its file system; 0: there is no state directory
    state_dir_free_bytes: int
    event_loop_lag_seconds: float  # the longest of the last interval
    latency_bounds_seconds: tuple[float, ...]
    pools: tuple[PoolStatus, ...]
    exports: tuple[ExportStatus, ...]
    checkpoint: CheckpointStatus | None = None  # None: no directory is named
    journal: JournalStatus | None = None  # None: FLUSH waits for none
    threads: tuple[ThreadStatus, ...] = ()
    headroom: HeadroomStatus | None = None  # None: nobody looks (limits.keep_free)
    starting: bool = False  # it opens its disks and loads images: nobody is let in yet
    swap: bool = False  # clients swap to it
