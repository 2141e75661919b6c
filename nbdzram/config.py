"""What the server is told: frozen dataclasses, built once from TOML, environment and flags.

Precedence: flag > NBDZRAM_* > TOML > default; nbdzram/settings.py reads them. A default stands here and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from nbdzram.bounds import Bounds

DEFAULT_PORT = 10809  # registered with IANA for NBD
DEFAULT_METRICS_PORT = 9809
DEFAULT_POOL = "default"


class TlsMode(StrEnum):
    """Whether a connection may, or must, be upgraded."""

    OFF = "off"
    ON = "on"
    REQUIRE = "require"


class Trigger(StrEnum):
    """When a pool starts a maintenance run by itself."""

    OFF = "off"
    AUTO = "auto"  # when it pays, and less and less often on memory where it does not
    INTERVAL = "interval"


class LogLevel(StrEnum):
    """How much the server says on standard error."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LogFormat(StrEnum):
    """What a line of the log is: words for people, or a JSON object for programs."""

    TEXT = "text"
    JSON = "json"


class LogTarget(StrEnum):
    """Where the log goes."""

    STDERR = "stderr"
    SYSLOG = "syslog"
    NULL = "null"


class Dedup(StrEnum):
    """When equal objects meet: only in a fold, or already at the write."""

    FOLD = "fold"
    INLINE = "inline"


class Durability(StrEnum):
    """What FLUSH and FUA wait for: that the process may end, or that the power may."""

    CHECKPOINT = "checkpoint"
    FLUSH = "flush"


@dataclass(frozen=True, slots=True, kw_only=True)
class TcpAddress:
    """One listening address. An IPv6 host has no brackets here."""

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT

    def __str__(self) -> str:
        """As a person writes it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class UnixAddress:
    """One listening unix socket, with the mode and owner that its file gets."""

    path: Path
    mode: int = 0o600
    owner: str | None = None  # user, or user:group

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True, slots=True, kw_only=True)
class VsockAddress:
    """One listening AF_VSOCK port (any local context)."""

    port: int = DEFAULT_PORT

    def __str__(self) -> str:
        return f"vsock:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsConfig:
    """X.509 files, or a pre-shared key file; client_ca asks clients for certificates."""

    mode: TlsMode = TlsMode.OFF
    certificate: Path | None = None
    key: Path | None = None
    client_ca: Path | None = None
    psk_file: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one client may cost. Each default has its reason beside it."""

    handshake_seconds: float = 10.0  # a LAN handshake takes milliseconds; slow TLS under load takes one or two seconds
    handshake_options: int = 128  # libnbd in option mode sends about ten; programs that list get more with the list
    connections: int = 1024  # attached, and as many that haggle: descriptors well below the usual hard limit
    payload_bytes: int = 64 << 20  # the largest READ or WRITE served
    connection_bytes: int = 4 << 20  # queued replies and payloads in flight of one connection, beyond one request
    total_bytes: int = 32 << 20  # the same over all connections; beyond it each has 4 KiB to go on with
    keep_free: int | None = None  # bytes of memory kept free; None: by what there is, 0: nobody looks (server/headroom)
    drain_seconds: float = 10.0  # how long SIGTERM waits for requests under way


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolConfig:
    """One memory limit, one folding domain."""

    name: str = DEFAULT_POOL
    mem_limit: int = 0  # bytes; 0 is none
    dedup: Dedup = Dedup.FOLD
    verify: bool = True  # what is read is held against its fingerprint: docs/decisions/0012 has the figures
    durability: Durability = Durability.CHECKPOINT
    tell_sharing: bool = False  # clients may find out what others in the pool store


@dataclass(frozen=True, slots=True, kw_only=True)
class MaintenanceConfig:
    """What pools do on their own. Off by default, as in zram: memory moves when the operator says so."""

    fold: Trigger = Trigger.OFF
    fold_interval_seconds: float = 0.0  # with Trigger.INTERVAL
    compact: Trigger = Trigger.OFF
    compact_interval_seconds: float = 0.0
    recompress: Trigger = Trigger.OFF
    recompress_interval_seconds: float = 0.0
    recompress_age_seconds: int = 3600  # a block that nobody touched for so long is idle
    recompress_level: int = 3  # Zstandard's: above it a block costs several times the time and gains a few percent
    recompress_huge_only: bool = False
    recompress_dictionary: bool = False  # trained from the pool's own blocks
    scrub_seconds: float = 0.0  # every block is looked at as often as that; 0: by no one but `nbdzram check`
    scrub_cpu_percent: int = 5  # of one core: a TiB takes an hour or two
    cpu_percent: int = 25  # of one core, for each pool's automatic runs; runs that a person asks for take what is idle


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """Streams of all exports that are kept in a directory, and begun from."""

    directory: Path | None = None  # None: none are taken
    interval_seconds: float = 60.0
    keep: int = 2  # chains: a whole one, and what changed since


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Who may attach to an export: whom both lists admit. An empty list admits everyone."""

    addresses: tuple[str, ...] = ()  # CIDR
    certificates: tuple[str, ...] = ()  # common or DNS names
    nobody: bool = False  # whatever the lists say: the rules of this disk are not known

    @property
    def admits(self) -> str:
        """In a word: everyone, listed or nobody."""
        if self.nobody:
            return "nobody"
        return "listed" if self.addresses or self.certificates else "everyone"


EVERYONE = Access()
NOBODY = Access(nobody=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """A disk offered by name."""

    name: str
    size_bytes: int  # 0: as large as the disk in its image
    pool: str = DEFAULT_POOL
    read_only: bool = False
    description: str = ""
    allow_addresses: tuple[str, ...] = ()  # CIDR; empty admits everyone
    allow_certificates: tuple[str, ...] = ()  # common or DNS names; empty admits everyone
    private: bool = False  # its blocks share objects with its own and its clones' alone
    snapshots_seconds: float = 0.0  # a snapshot as often as that; 0: none by itself
    snapshots_keep: int = 24  # of those; older ones are removed
    quota: int = 0  # bytes of blocks that may be stored, whatever the size; this and the next four: 0 is no bound
    iops: int = 0  # requests a second, of all its clients together
    iops_burst: int = 0
    bandwidth: int = 0  # bytes a second
    bandwidth_burst: int = 0
    image: Path | None = None  # what a new disk is filled from before it is offered

    @property
    def access(self) -> Access:
        """Who may attach, as it is declared."""
        return Access(addresses=self.allow_addresses, certificates=self.allow_certificates)

    @property
    def bounds(self) -> Bounds:
        """What it may take, as it is declared."""
        return Bounds(
            quota_bytes=self.quota,
            iops=self.iops,
            iops_burst=self.iops_burst,
            bandwidth_bytes=self.bandwidth,
            bandwidth_burst_bytes=self.bandwidth_burst,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Everything that `nbdzram serve` is told."""

    exports: tuple[ExportConfig, ...] = ()
    pools: tuple[PoolConfig, ...] = (PoolConfig(),)
    tcp: tuple[TcpAddress, ...] = (TcpAddress(),)
    unix: tuple[UnixAddress, ...] = ()
    vsock: tuple[VsockAddress, ...] = ()
    tls: TlsConfig = field(default_factory=TlsConfig)
    limits: Limits = field(default_factory=Limits)
    maintenance: MaintenanceConfig = field(default_factory=MaintenanceConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    default_export: str | None = None  # what the empty name means; None: the only export, if there is one
    list_exports: bool = True
    threads: int = 0  # that serve clients; 0: as many as processors that may be used, at most 16
    swap: bool = False  # clients swap to it: stay in memory, whatever happens
    state_dir: Path | None = None  # arenas as files that outlive the process; None: anonymous memory
    metrics: TcpAddress | None = field(default_factory=lambda: TcpAddress(port=DEFAULT_METRICS_PORT))
    metrics_hosts: tuple[str, ...] = ()  # names that requests may be sent to, beside addresses and this machine's own
    control: Path | None = None  # None: nbdzram.sock under the runtime directory
    pidfile: Path | None = None  # has the process's number while it serves
    log: LogTarget = LogTarget.STDERR
    log_level: LogLevel = LogLevel.INFO
    log_format: LogFormat = LogFormat.TEXT
