"""What a running server says of itself: frozen records that the server makes, control sends and metrics publish.

They cross the control socket as JSON objects of the same shape (to_json, from_json). A field that the reader does not
know is ignored, a missing one is an error: an older server cannot answer a newer client's question.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import reprlib
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from nbdzram.bounds import Bounds
from nbdzram.engine.stats import PoolStats
from nbdzram.errors import UserError

Record = TypeVar("Record")


@dataclass(frozen=True, slots=True)
class OperationStatus:
    """One operation's traffic on one export since the server started."""

    requests: int
    bytes: int  # payload read or written; for trim and write_zeroes the length of the range
    errors: dict[str, int]  # by cause, from a fixed set
    latency_counts: tuple[int, ...]  # requests a bucket (not cumulative), the last one above every bound
    latency_sum_seconds: float


@dataclass(frozen=True, slots=True)
class ExportStatus:
    """One export: what it is, what it holds, who uses it."""

    name: str
    pool: str
    size_bytes: int
    read_only: bool
    description: str
    admits: str  # everyone, listed (the two lists below) or nobody (its rules are not known)
    allow_addresses: tuple[str, ...]
    allow_certificates: tuple[str, ...]
    private: bool  # its blocks share objects with its own and its clones' alone
    bounds: Bounds
    stored_bytes: int  # blocks stored, same-filled included
    same_filled_bytes: int
    connections: int
    failed_reads: int  # the four fields of zram's io_stat
    failed_writes: int
    invalid_io: int
    notify_free: int
    throttled_requests: int  # that its limits let wait before they began
    throttled_seconds: float  # that they waited
    operations: dict[str, OperationStatus]


@dataclass(frozen=True, slots=True)
class ClientStatus:
    """One attached client."""

    number: int  # in the order in which they attached, never used again
    peer: str
    certificate_names: tuple[str, ...]  # verified: common name and DNS names
    export: str
    read_only: bool
    since: float  # seconds since the epoch
    requests: int  # taken since then
    in_flight: int
    idle_seconds: float  # since its last request came


@dataclass(frozen=True, slots=True)
class ExportLoss:
    """What removing, resetting or shrinking an export would destroy."""

    name: str
    size_bytes: int  # of the export, now
    stored_bytes: int  # blocks that would go, same-filled included
    alone_bytes: int | None  # compressed bytes that nobody else holds; None: not asked for, or not known
    clients: tuple[str, ...]  # who is attached


@dataclass(frozen=True, slots=True)
class ExportRenaming:
    """What came of renaming an export."""

    old_name: str
    export: ExportStatus
    old_name_declared: bool  # the configuration still knows the export by its old name
    remembered: bool  # there is a state directory

    def lines(self) -> Iterator[str]:
        """As a person reads it."""
        yield f"renamed {self.old_name} to {self.export.name}"
        if not self.old_name_declared:
            return
        old, new = self.old_name, self.export.name
        yield f"{old} is declared in the configuration: " + (
            f"declare it as {new}; until then the next start offers {new} as it is, and makes no {old}"
            if self.remembered
            else f"the next start makes it again, empty, unless it is declared as {new}"
        )


@dataclass(frozen=True, slots=True)
class RunTotals:
    """All runs of one kind (fold, compact, ...) on one pool since the server started."""

    runs: int = 0
    failures: int = 0
    seconds: float = 0.0  # wall time
    cpu_seconds: float = 0.0
    bytes_freed: int = 0  # the pages that they returned, whatever clients stored meanwhile

    def plus(self, other: RunTotals) -> RunTotals:
        """The sum, field by field."""
        mine, others = dataclasses.astuple(self), dataclasses.astuple(other)
        return RunTotals(*(a + b for a, b in zip(mine, others, strict=True)))


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How a run goes. All but dry_run are recompression's (engine/recompress)."""

    dry_run: bool = False
    level: int = 3  # Zstandard's
    idle_seconds: int = 0  # only blocks that nobody used for so long
    huge_only: bool = False
    dictionary: bool = False


@dataclass(frozen=True, slots=True)
class RunSummary:
    """One run that came to its end, in short."""

    kind: str
    reason: str  # asked, or the policy's
    finished_at: float  # seconds since the epoch
    seconds: float
    bytes_freed: int  # the pages that it returned, whatever clients stored meanwhile
    result: dict[str, int]  # the engine's report()


@dataclass(frozen=True, slots=True)
class RunStatus:
    """One maintenance run: waiting, under way, or ended."""

    number: int  # counted from 1 since the server started
    kind: str
    pool: str
    state: str  # waiting, running, paused, done, failed or cancelled
    reason: str  # asked, or the policy's
    dry_run: bool
    cpu_percent: int  # share of one core that it may use
    asked_at: float  # seconds since the epoch
    started_at: float | None
    finished_at: float | None
    seconds: float  # since it started, pauses included
    done: int  # of total, in the run's own measure of work
    total: int
    seconds_left: float | None  # as fast as it was so far; null while that cannot be told
    result: dict[str, int]  # the engine's report(), of one that has ended
    error: str | None  # why it failed


@dataclass(frozen=True, slots=True)
class MaintenanceStatus:
    """What a pool's maintenance is doing, did, and why."""

    running: str | None  # the kind of the run under way
    done: int
    total: int
    totals: dict[str, RunTotals]  # by kind
    decisions: dict[str, dict[str, int]]  # kind -> reason -> how often the policy started or declined a run
    next_allowed_seconds: dict[str, float]  # kind -> for how long the policy still backs off
    recent: tuple[RunSummary, ...]  # the last runs, the oldest first; dry runs are left out
    queue: tuple[RunStatus, ...]  # the run under way, and those that wait for it, in their order


@dataclass(frozen=True, slots=True)
class ScrubStatus:
    """Looking for rot, by itself and in checks."""

    objects: int  # decoded since the start
    blocks: int  # looked at since the start
    rotten_objects: int  # that the last one found which was finished
    rotten_blocks: int
    finished_at: float | None  # in seconds since the epoch; None: none was finished yet


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """One pool."""

    name: str
    path: str | None  # the arena's file; None: anonymous memory
    dedup: str
    tells_sharing: bool  # clients may find out what others store: figures for strangers are not rounded
    verify: bool  # what is read is held against its fingerprint
    stats: PoolStats
    scrub: ScrubStatus
    maintenance: MaintenanceStatus


@dataclass(frozen=True, slots=True)
class HistorySample:
    """What a server did in some seconds before a moment."""

    at: float  # seconds since the epoch
    read_bytes: float  # a second, as the next two
    write_bytes: float
    requests: float
    median_seconds: float  # of reads and writes; 0: there was none
    p99_seconds: float
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


@dataclass(frozen=True, slots=True)
class JournalStatus:
    """What FLUSH waits for in pools whose durability is flush."""

    pools: tuple[str, ...]
    usable: bool  # False: FLUSH waits for the first checkpoint, or is an I/O error until the next one
    trouble: str  # why it cannot be used; empty: it can, or begins
    groups: int  # written and synced since the start; each answers all who waited
    group_bytes: int
    segment_bytes: int  # of its file, since the last checkpoint
    seconds: float  # that the last group took
    failures: int


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


@dataclass(frozen=True, slots=True)
class RunReport:
    """One maintenance run that came to its end."""

    kind: str
    pool: str
    dry_run: bool
    reason: str  # asked, or the policy's
    seconds: float
    cpu_seconds: float
    result: dict[str, int]  # the engine's report()
    before: PoolStats
    after: PoolStats


@dataclass(frozen=True, slots=True)
class SendReport:
    """A stream that was sent to its end."""

    exports: tuple[str, ...]
    blocks: int  # stored ones, or those that changed
    objects: int  # each once, however many blocks hold it
    object_bytes: int  # of them, as they are stored
    stream_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class ReceiveReport:
    """A stream that was received to its end, and is offered."""

    exports: tuple[str, ...]
    blocks: int
    objects: int
    objects_folded: int  # of them, those that the pool had already
    object_bytes: int
    stream_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class StreamStatus:
    """A stream that is under way, or of which something is kept after it was interrupted."""

    stream: str  # its identity, the same where it is sent and where it is received
    way: str  # sent, or received
    state: str  # under way, or kept
    exports: tuple[str, ...]
    records: int  # that were written, or came whole
    stream_bytes: int  # since it began or went on
    seconds_left: float | None  # for which it is kept at most; None: it is under way
    token: str | None  # with which `nbdzram send --resume` goes on; None: it is under way, or sent


@dataclass(frozen=True, slots=True)
class ReloadReport:
    """What came of reading the configuration again."""

    changed: tuple[str, ...]  # what is otherwise from now on
    kept: tuple[str, ...]  # exports and pools that are declared no more, and stay until they are removed
    restart: tuple[str, ...]  # keys whose new value takes effect at the next start

    def lines(self) -> Iterator[str]:
        """As a person reads it."""
        yield from self.changed or ("nothing is declared otherwise than before",)
        yield from (f"{name} is declared no more, and stays until it is removed" for name in self.kept)
        yield from (f"{name} takes effect at the next start" for name in self.restart)


def to_json(value: Any) -> str:
    """A record, or a list or table of them, as JSON text."""
    return _ENCODER.encode(value)


def to_json_pieces(value: Any, depth: int = 2) -> Iterator[str]:
    """The same text in pieces: what lies `depth` levels down, such as one export of a ServerStatus, is one piece."""
    if depth and dataclasses.is_dataclass(value):
        value = fields(value)
    if depth and isinstance(value, dict):
        opening = "{"
        for name, item in value.items():
            yield f"{opening}{to_json(name)}:"
            yield from to_json_pieces(item, depth - 1)
            opening = ","
        yield "}" if value else "{}"
    elif depth and isinstance(value, list | tuple):
        opening = "["
        for item in value:
            yield opening
            yield from to_json_pieces(item, depth - 1)
            opening = ","
        yield "]" if value else "[]"
    else:
        yield to_json(value)


def fields(record: Any) -> dict[str, Any]:
    """A record's fields by name, as they are. dataclasses.asdict copies every number below: 30 ms for 100 exports."""
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


_ENCODER = json.JSONEncoder(separators=(",", ":"), default=fields)


def from_json(kind: type[Record], payload: object, source: str = "the server's answer") -> Record:
    """The record of type `kind` whose JSON was read as `payload`. Raises UserError, which names the source."""
    try:
        return typing.cast("Record", _decode(kind, payload))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{source} lacks or misplaces {error}; was it written by another version?") from None


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    """Resolving them costs 50 us; a status of 100 exports has a thousand records."""
    return typing.get_type_hints(kind)


def _decode(kind: Any, payload: Any) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    is_record = isinstance(kind, type) and dataclasses.is_dataclass(kind)
    if (is_record or origin is dict) and not isinstance(payload, dict):
        raise TypeError(f"{reprlib.repr(payload)} (not an object)")
    if origin is tuple and not isinstance(payload, list):
        raise TypeError(f"{reprlib.repr(payload)} (not a list)")
    if is_record:
        hints = _hints(kind)
        return kind(
            **{field.name: _decode(hints[field.name], payload[field.name]) for field in dataclasses.fields(kind)}
        )
    if origin is tuple:
        return tuple(_decode(arguments[0], item) for item in payload)
    if origin is dict:
        return {str(key): _decode(arguments[1], item) for key, item in payload.items()}
    if origin is types.UnionType:
        return None if payload is None else _decode(arguments[0], payload)
    if kind is float and isinstance(payload, int):
        return float(payload)
    if not isinstance(payload, kind):
        raise TypeError(f"{reprlib.repr(payload)} (not {kind.__name__})")
    return payload
