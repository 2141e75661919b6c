"""Where a configuration comes from: TOML files, the environment, flags; and which keys there are.

Every source becomes a layer (path -> value and its origin); layers are laid over one another: TOML file, its
conf.d, NBDZRAM_*, flags. Only then are values read, by the one table KEYS, so that an error can name the file and
line, the variable or the flag that it came from. Defaults stand in config.py.

A path names one leaf: ("metrics",), ("limits", "connections"), ("exports", "disk", "size"). `*` in KEYS is a name
that the operator chooses.

Known limits: tomllib keeps no line numbers, so they are found by scanning for headers and `key =`; inside an inline
table the line named is the one where the table starts.
"""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from nbdzram import values
from nbdzram.config import (
    DEFAULT_METRICS_PORT,
    DEFAULT_POOL,
    CheckpointConfig,
    Durability,
    ExportConfig,
    Limits,
    LogFormat,
    LogLevel,
    LogTarget,
    MaintenanceConfig,
    PoolConfig,
    ServerConfig,
    TlsConfig,
    TlsMode,
)
from nbdzram.errors import ConfigError

ENVIRONMENT_PREFIX = "NBDZRAM_"
CONFIG_DIRECTORY = "conf.d"
MAX_FILE_BYTES = 4 << 20  # ten thousand exports fit; a disk image given by mistake does not
_NEAR = 0.8  # a letter of ten that is missing, doubled or wrong; what is further off is somebody else's
DEEPEST_KEY = 3  # names of a path: ("exports", "disk", "size")

LeafPath = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Given:
    """A raw value, and where it was said."""

    value: object
    origin: str


Layer = dict[LeafPath, Given]
NO_DEFAULTS: Mapping[LeafPath, Given] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Key:
    """One key that may be set: where it stands, which fields it fills, and what it is for."""

    path: LeafPath
    read: Callable[[object], Any]
    says: str
    fills_several: bool = False  # read() gives a dict of fields instead of one value

    def fields(self, value: object) -> dict[str, Any]:
        """The dataclass fields that `value` fills. Raises ValueError."""
        read = self.read(value)
        return read if self.fills_several else {self.path[-1]: read}

    @property
    def variable(self) -> str | None:
        """Its environment variable. Of the keys under a chosen name, only the default pool's have one."""
        if self.path[0] == "exports":
            return None
        words = self.path[2:] if self.path[0] == "pools" else self.path
        return ENVIRONMENT_PREFIX + "_".join(words).upper()


GIB = 1 << 30
MOST_THREADS = 63  # sessions/tally has room for so many, beside the event loop
_DAY = 86400.0

KEYS = (
    Key(
        ("listen",),
        values.listen,
        "addresses: HOST:PORT, unix:PATH[,mode=0660][,owner=U:G], vsock:PORT",
        True,
    ),
    Key(("metrics",), values.tcp_address_or_off(DEFAULT_METRICS_PORT), "HOST:PORT of the metrics, or off"),
    Key(
        ("metrics_hosts",),
        values.several(values.host_pattern),
        "names under which browsers and scrapers reach the metrics, such as nbd1.example.org or *.example.org",
    ),
    Key(("control",), values.socket_path, "the control socket"),
    Key(("state_dir",), values.path, "directory whose files let disks outlive the process"),
    Key(("default_export",), values.export_name, "the export that the empty name means"),
    Key(("list_exports",), values.boolean, "whether clients may list the exports"),
    Key(("pidfile",), values.path, "file that has the process's number while it serves"),
    Key(("log",), values.choice(LogTarget), "stderr, syslog or null: where the log goes"),
    Key(
        ("threads",),
        values.integer(0, MOST_THREADS),
        "threads that serve clients; 0: one for each processor, at most 16",
    ),
    Key(("swap",), values.boolean, "true: clients swap to its disks, so it stays in memory, and is ended last"),
    Key(("log_level",), values.choice(LogLevel), "debug, info, warning or error"),
    Key(("log_format",), values.choice(LogFormat), "text, or json: an object a line"),
    Key(("tls", "mode"), values.choice(TlsMode), "off, on or require"),
    Key(("tls", "certificate"), values.path, "X.509 certificate chain, PEM"),
    Key(("tls", "key"), values.path, "its private key, PEM"),
    Key(("tls", "client_ca"), values.path, "certificate authority that clients must be signed by, PEM"),
    Key(("tls", "psk_file"), values.path, "pre-shared keys, a line NAME:HEXKEY each"),
    Key(("limits", "handshake_seconds"), values.seconds(0.1, 3600), "a handshake ends within this time"),
    Key(("limits", "handshake_options"), values.integer(8, 65536), "options of one handshake"),
    Key(("limits", "connections"), values.integer(1, 1 << 20), "connections at once"),
    Key(("limits", "payload_bytes"), values.size(65536, GIB), "largest READ or WRITE"),
    Key(("limits", "connection_bytes"), values.size(65536, GIB), "buffers of one connection"),
    Key(("limits", "total_bytes"), values.size(1 << 20, 1 << 40), "buffers of all connections"),
    Key(
        ("limits", "keep_free"),
        values.spare,
        "memory that is left to the machine or cgroup: auto, off, a size or a share; below it writes are refused",
    ),
    Key(("limits", "drain_seconds"), values.seconds(0, 3600), "how long a stop waits for requests under way"),
    Key(("checkpoint", "directory"), values.path, "directory that checkpoints of all exports are kept in"),
    Key(("checkpoint", "interval_seconds"), values.interval, "from one checkpoint to the next: 60, 10m or 2h"),
    Key(("checkpoint", "keep"), values.integer(1, 1000), "chains of checkpoints to keep, each from a whole one on"),
    Key(("maintenance", "fold"), values.trigger("fold"), "off, auto or an interval", True),
    Key(("maintenance", "compact"), values.trigger("compact"), "off, auto or an interval", True),
    Key(("maintenance", "recompress"), values.trigger("recompress"), "off, auto or an interval", True),
    Key(
        ("maintenance", "recompress_age_seconds"),
        values.whole_seconds(0, 10**9),
        "age at which a block is idle: 3600, 1h or 7d",
    ),
    Key(("maintenance", "recompress_level"), values.integer(1, 22), "Zstandard's level for recompression"),
    Key(("maintenance", "recompress_huge_only"), values.boolean, "recompress only blocks that are stored raw"),
    Key(("maintenance", "recompress_dictionary"), values.boolean, "train a dictionary from the pool's own blocks"),
    Key(
        ("maintenance", "scrub"),
        functools.partial(values.pause, "scrub"),
        "off, or how often every block is held against what was written: 12h, 7d",
        True,
    ),
    Key(("maintenance", "scrub_cpu_percent"), values.integer(1, 100), "share of one core for that"),
    Key(("maintenance", "cpu_percent"), values.integer(1, 100), "share of one core for automatic runs"),
    Key(
        ("pools", "*", "mem_limit"), values.memory, "most memory of the pool, tables included: a size or a share (50%)"
    ),
    Key(("pools", "*", "dedup"), values.dedup, "fold or inline"),
    Key(
        ("pools", "*", "durability"),
        values.choice(Durability),
        "flush: FLUSH is answered when the disk has what changed; checkpoint: at once",
    ),
    Key(("pools", "*", "verify"), values.boolean, "false: deliver what is stored without checking it"),
    Key(("pools", "*", "tell_sharing"), values.boolean, "true: clients may find out what others in the pool store"),
    Key(("exports", "*", "size"), values.export_size, "size of the disk"),
    Key(("exports", "*", "image"), values.path, "image file that a new disk is loaded from; its size may be left out"),
    Key(("exports", "*", "pool"), values.pool_name, "the pool that holds it"),
    Key(("exports", "*", "read_only"), values.boolean, "true: clients may not write"),
    Key(("exports", "*", "private"), values.boolean, "true: its blocks are never folded with other exports'"),
    Key(
        ("exports", "*", "snapshots"),
        functools.partial(values.pause, "snapshots"),
        "off, or how often a snapshot EXPORT@auto-TIME is taken by itself, such as 1h",
        True,
    ),
    Key(("exports", "*", "snapshots_keep"), values.integer(1, 1000), "how many of those are kept"),
    Key(("exports", "*", "quota"), values.quota, "bytes of blocks that it may store; off: as many as its pool takes"),
    Key(("exports", "*", "iops"), values.iops, "requests a second, of all its clients together; off: as many as come"),
    Key(("exports", "*", "iops_burst"), values.iops, "of these at once; off: a second's"),
    Key(("exports", "*", "bandwidth"), values.bandwidth, "bytes a second, read and written, such as 50M, or off"),
    Key(("exports", "*", "bandwidth_burst"), values.bandwidth, "of these at once; off: a second's"),
    Key(("exports", "*", "description"), values.description, "what clients are told of it"),
    Key(("exports", "*", "allow_addresses"), values.several(values.network), "networks that may attach"),
    Key(
        ("exports", "*", "allow_certificates"),
        values.several(values.certificate_name),
        "certificate names that may attach",
    ),
)
"""Every key, in the order of the reference."""

BOUNDED_BY = ("quota", "iops", "iops_burst", "bandwidth", "bandwidth_burst")
"""What bounds an export, as bounds.Bounds has it."""

_BY_PATH = {key.path: key for key in KEYS}
_NAMED = {"pools": values.pool_name, "exports": values.export_name}


def load(
    file: Path | None, environment: Mapping[str, str], flags: Layer, defaults: Mapping[LeafPath, Given] = NO_DEFAULTS
) -> ServerConfig:
    """The configuration from all its sources; what none of them says is as in `defaults`. Raises ConfigError."""
    layer: Layer = dict(defaults)
    named = file or _file_from(environment)
    for source in _files(named) if named is not None else ():
        layer |= read_toml(source)
    layer |= read_environment(environment)
    layer |= flags
    return build(layer)


def require_files(file: Path | None, environment: Mapping[str, str]) -> None:
    """Whether what `load` reads can be read again: a pipe is empty by then, and may let its reader wait for ever.

    Raises ConfigError.
    """
    named = file or _file_from(environment)
    for source in _files(named) if named is not None else ():
        if source.exists() and not source.is_file():
            raise ConfigError(f"{source} is no regular file, so it is not read again; restart to change something")


def read_toml(path: Path) -> Layer:
    """One file's leaves. Raises ConfigError."""
    try:
        with path.open(encoding="utf-8-sig") as file:  # some editors begin a file with a byte order mark
            content = file.read(MAX_FILE_BYTES + 1)  # a device may have no end
        if len(content) > MAX_FILE_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_FILE_BYTES} bytes; is it a configuration file?")
        document = tomllib.loads(content)
    except OSError as error:
        raise ConfigError(
            f"cannot read the configuration file {path}: {error.strerror}; -c or NBDZRAM_CONFIG names one"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start})") from error
    except RecursionError:
        raise ConfigError(f"{path} is nested without end; a key here has {DEEPEST_KEY} names at most") from None
    except ValueError as error:  # a TOMLDecodeError, or a number of thousands of digits
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    lines = _line_numbers(content)
    return {leaf: Given(value, f"{path}{_line_of(leaf, lines)}") for leaf, value in _leaves(document, ())}


def read_environment(environment: Mapping[str, str]) -> Layer:
    """The NBDZRAM_* variables that name a key; an empty one counts as unset.

    Others are left alone: Kubernetes sets NBDZRAM_PORT and its kin by itself for a service named nbdzram.
    """
    layer: Layer = {}
    for key in KEYS:
        variable = key.variable
        if variable is not None and environment.get(variable):
            path = tuple(DEFAULT_POOL if word == "*" else word for word in key.path)
            layer[path] = Given(environment[variable], variable)
    for noun, layers in (("POOLS", pool_layers), ("EXPORTS", export_layers)):
        variable = ENVIRONMENT_PREFIX + noun
        layer |= layers(environment.get(variable, "").split(), variable)
    return layer


def misspelled(environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """NBDZRAM_* variables that name no key, and the one that each is nearly, or is the beginning or the end of."""
    known = [key.variable for key in KEYS if key.variable is not None]
    known += [ENVIRONMENT_PREFIX + word for word in ("CONFIG", "EXPORTS", "POOLS")]
    for variable in sorted(environment):
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable in known:
            continue
        import difflib  # noqa: PLC0415 - only a mistake pays for it

        word = variable.removeprefix(ENVIRONMENT_PREFIX)
        words = [name.removeprefix(ENVIRONMENT_PREFIX) for name in known]
        near = [ENVIRONMENT_PREFIX + name for name in difflib.get_close_matches(word, words, n=1, cutoff=_NEAR)]
        near += [name for name in known if name.startswith(variable) or name.endswith(f"_{word}")]
        if near:
            yield variable, near[0]


def export_layers(specifications: Iterable[str], origin: str) -> Layer:
    """Several exports of one origin as a layer. Raises ConfigError, also for a name given twice."""
    return _layers(export_layer, specifications, origin, "export '{}' is given twice; give each disk a name of its own")


def pool_layers(specifications: Iterable[str], origin: str) -> Layer:
    """Several pools of one origin as a layer. Raises ConfigError, also for a name given twice."""
    return _layers(pool_layer, specifications, origin, "pool '{}' is given twice; say all of it at once")


def export_layer(specification: str, origin: str) -> Layer:
    """NAME=SIZE[,ro][,private][,pool=POOL], or NAME=@IMAGE[,size=SIZE] and so on, as a layer. Raises ConfigError."""
    match = _EXPORT_OF_IMAGE.fullmatch(specification) or _EXPORT.fullmatch(specification)
    if match is None:
        raise ConfigError(f"{origin}: '{specification}' is not NAME=SIZE, such as disk=1G, and not NAME=@IMAGE")
    name, source = match["name"], match["size"]
    of_image = source.startswith("@")
    layer: Layer = {
        ("exports", name, "image" if of_image else "size"): Given(
            source.removeprefix("@") if of_image else source, origin
        )
    }
    valued = ["pool", "snapshots", "snapshots_keep", *BOUNDED_BY, *(["size"] if of_image else [])]
    words = {"ro": "read_only", "private": "private"}
    return layer | _options(match["options"], ("exports", name), words, valued, origin)


def pool_layer(specification: str, origin: str) -> Layer:
    """NAME[=LIMIT][,inline][,unverified][,tell-sharing] as a layer. Raises ConfigError."""
    head, _, options = specification.partition(",")
    name, limited, limit = head.partition("=")
    if not name or (limited and not limit):
        raise ConfigError(f"{origin}: '{specification}' is not NAME or NAME=LIMIT, such as fast=4G")
    layer: Layer = {("pools", name): Given({}, origin)}
    if limited:
        layer["pools", name, "mem_limit"] = Given(limit, origin)
    said: dict[str, tuple[str, object]] = {
        "inline": ("dedup", "inline"),
        "unverified": ("verify", False),
        "tell-sharing": ("tell_sharing", True),
    }
    for option in options.split(",") if options else ():
        if option not in said:
            raise ConfigError(f"{origin}: '{option}' is not allowed behind a pool; {', '.join(map(repr, said))} are")
        key, value = said[option]
        layer["pools", name, key] = Given(value, origin)
    return layer


def _layers(layer_of: Callable[[str, str], Layer], specifications: Iterable[str], origin: str, complaint: str) -> Layer:
    layer: Layer = {}
    for specification in specifications:
        found = layer_of(specification, origin)
        named = {path[:2] for path in layer}
        for path in found:
            if path[:2] in named:
                raise ConfigError(f"{origin}: {complaint.format(path[1])}")
        layer |= found
    return layer


def _options(text: str, path: LeafPath, words: Mapping[str, str], valued: Sequence[str], origin: str) -> Layer:
    """What stands behind a size: words that are keys with the value true, and NAME=VALUE. Raises ConfigError."""
    layer: Layer = {}
    for option in text.split(",")[1:]:
        key, equals, content = option.partition("=")
        if option in words:
            layer[*path, words[option]] = Given(True, origin)
        elif equals and key in valued:
            layer[*path, key] = Given(content, origin)
        else:
            *rest, last = [*map(repr, words), *(f"'{name}=...'" for name in valued)]
            raise ConfigError(f"{origin}: '{option}' is not allowed behind a size; {', '.join(rest)} and {last} are")
    return layer


def build(layer: Layer) -> ServerConfig:
    """Read every value of the merged layer. Raises ConfigError."""
    fields: dict[LeafPath, dict[str, Any]] = {}
    for path, given in layer.items():
        _require_name(path, given)
        if isinstance(given.value, Mapping) and _is_section(path):
            fields.setdefault(path, {})  # an empty [pools.fast] is a pool with defaults
            continue
        key = _key_of(path, given)
        try:
            fields.setdefault(path[:-1], {}).update(key.fields(given.value))
        except ValueError as error:
            raise ConfigError(f"{given.origin}: {'.'.join(path)}: {error}") from None
    pools = {name: PoolConfig(name=name, **fields[path]) for path, name in _names(fields, "pools")}
    pools.setdefault(DEFAULT_POOL, PoolConfig())
    exports = tuple(_export(name, fields[path], layer, pools) for path, name in _names(fields, "exports"))
    tls = TlsConfig(**fields.get(("tls",), {}))
    checkpoint = CheckpointConfig(**fields.get(("checkpoint",), {}))
    _check_tls(tls, layer)
    _check_durability(pools, checkpoint, layer)
    config = ServerConfig(
        exports=exports,
        pools=tuple(pools.values()),
        tls=tls,
        limits=Limits(**fields.get(("limits",), {})),
        maintenance=MaintenanceConfig(**fields.get(("maintenance",), {})),
        checkpoint=checkpoint,
        **fields.get((), {}),
    )
    _check_places(config, layer)
    return config


def _export(name: str, given: dict[str, Any], layer: Layer, pools: Mapping[str, PoolConfig]) -> ExportConfig:
    if "size" not in given and "image" not in given:
        origin = next(item.origin for path, item in layer.items() if path[:2] == ("exports", name))
        raise ConfigError(f"{origin}: export '{name}' has no size; add size = \"1G\"")
    export = ExportConfig(name=name, size_bytes=given.pop("size", 0), **given)
    if export.pool not in pools:
        origin = layer["exports", name, "pool"].origin
        known = ", ".join(sorted(pools))
        more = f"--pool {export.pool}" if origin.startswith("-") else f"[pools.{export.pool}]"
        raise ConfigError(
            f"{origin}: export '{name}' asks for the pool '{export.pool}'; the pools are {known}; "
            f"add {more} for one more"
        )
    if export.snapshots_seconds:
        try:
            values.name_of_snapshots(name)
        except ValueError as error:
            raise ConfigError(f"{layer['exports', name, 'snapshots'].origin}: snapshots: {error}") from None
    return export


def _check_durability(pools: Mapping[str, PoolConfig], checkpoint: CheckpointConfig, layer: Layer) -> None:
    for pool in pools.values():
        if pool.durability is Durability.FLUSH and checkpoint.directory is None:
            origin = layer["pools", pool.name, "durability"].origin
            raise ConfigError(
                f"{origin}: durability = \"flush\" of the pool '{pool.name}' needs a disk to write to; name one with "
                "--checkpoint DIR, or checkpoint.directory"
            )


def _check_places(config: ServerConfig, layer: Layer) -> None:
    """Each place is listened at for one thing: no start comes beyond the second. Where nothing is said of `listen`, the
    sockets may be handed over.
    """
    if ("listen",) not in layer:
        return
    places = {unix.path: f"unix:{unix.path}" for unix in config.unix}
    if config.control is not None and config.control.absolute() in places:
        taken, by, key = places[config.control.absolute()], "the control socket is", "control"
    elif config.metrics is not None and config.metrics.port and config.metrics in config.tcp:
        taken, by, key = str(config.metrics), "metrics are served", "metrics"
    else:
        return
    raise ConfigError(f"{layer['listen',].origin}: listen: {taken} is where {by}; name another place, or another {key}")


def _check_tls(tls: TlsConfig, layer: Layer) -> None:
    if tls.mode is TlsMode.OFF:
        return
    origin = layer["tls", "mode"].origin
    if tls.psk_file is None and (tls.certificate is None or tls.key is None):
        raise ConfigError(f"{origin}: tls.mode = {tls.mode} needs tls.certificate and tls.key, or tls.psk_file")


def _require_name(path: LeafPath, given: Given) -> None:
    """The operator's own name in a path, also of a table that says nothing else. Raises ConfigError."""
    if len(path) > 1 and path[0] in _NAMED:
        try:
            _NAMED[path[0]](path[1])
        except ValueError as error:
            raise ConfigError(f"{given.origin}: {error}") from None


def _key_of(path: LeafPath, given: Given) -> Key:
    """The table's entry for a path, or a ConfigError that names the nearest keys."""
    pattern = (path[0], "*", path[2]) if len(path) == 3 else path
    if pattern in _BY_PATH:
        return _BY_PATH[pattern]
    if len(path) < 3 and path[0] in _NAMED:
        keys = ", ".join(key.path[2] for key in KEYS if key.path[0] == path[0])
        raise ConfigError(f"{given.origin}: '{path[0]}' holds tables: write [{path[0]}.NAME] and below it {keys}")
    import difflib  # noqa: PLC0415 - only a mistake pays for it

    siblings, wrong = [key.path[-1] for key in KEYS if key.path[:-1] == pattern[:-1]], path[-1]
    if len(path) == 1 or not siblings:  # nothing begins like that: it is the first word that is wrong
        siblings, wrong = [key.path[0] for key in KEYS], path[0]
    near = difflib.get_close_matches(wrong, siblings, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"allowed are {', '.join(dict.fromkeys(siblings))}"
    raise ConfigError(f"{given.origin}: unknown key '{'.'.join(path)}'; {hint}")


def _is_section(path: LeafPath) -> bool:
    if len(path) == 2 and path[0] in _NAMED:
        return True
    return len(path) == 1 and any(len(key.path) > 1 and key.path[0] == path[0] for key in KEYS)


def _names(fields: Mapping[LeafPath, object], section: str) -> list[tuple[LeafPath, str]]:
    return [(path, path[1]) for path in fields if len(path) == 2 and path[0] == section]


def _file_from(environment: Mapping[str, str]) -> Path | None:
    variable = f"{ENVIRONMENT_PREFIX}CONFIG"
    try:
        return values.path(environment[variable]) if environment.get(variable) else None
    except ValueError as error:
        raise ConfigError(f"{variable}: {error}") from None


def _files(file: Path) -> Iterator[Path]:
    yield file
    directory = file.parent / CONFIG_DIRECTORY
    try:
        found = sorted(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:  # what lies there would count: it must not be passed over
        raise ConfigError(
            f"cannot read the directory {directory}: {error.strerror}; let this user read it, or move it elsewhere"
        ) from None
    yield from (path for path in found if path.suffix == ".toml")


def _leaves(table: Mapping[str, object], path: LeafPath) -> Iterator[tuple[LeafPath, object]]:
    """The keys that hold values, the tables that are empty, and those that lie deeper than any key."""
    for name, value in table.items():
        if isinstance(value, Mapping) and value and len(path) < DEEPEST_KEY:
            yield from _leaves(value, (*path, name))
        else:
            yield (*path, name), value


# A name may contain "=": the size stands behind the last one that has no comma before it.
_EXPORT = re.compile(r"(?P<name>[^=]+(?:=[^=,]*)*)=(?P<size>[^=,]+)(?P<options>(?:,.*)?)", re.DOTALL)
_EXPORT_OF_IMAGE = re.compile(r"(?P<name>[^,]+?)=(?P<size>@[^,]+)(?P<options>(?:,.*)?)", re.DOTALL)
_PART = r"""(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')"""
_DOTTED = rf"{_PART}(?:\s*\.\s*{_PART})*"
_LINE = re.compile(rf"\s*(?:\[\s*(?P<table>{_DOTTED})\s*\]|(?P<key>{_DOTTED})\s*=)")


def _line_numbers(content: str) -> dict[LeafPath, int]:
    """path -> line, counted from 1, for every header and key that stands at the start of a line."""
    found: dict[LeafPath, int] = {}
    table: LeafPath = ()
    for number, line in enumerate(content.splitlines(), start=1):
        match = _LINE.match(line)
        if match is None:
            continue
        parts = tuple(part.strip("\"'") for part in re.findall(_PART, match["table"] or match["key"]))
        if match["table"] is not None:
            table = parts
            found.setdefault(table, number)
        else:
            found.setdefault(table + parts, number)
    return found


def _line_of(leaf: LeafPath, lines: Mapping[LeafPath, int]) -> str:
    for length in range(len(leaf), 0, -1):
        if leaf[:length] in lines:
            return f" line {lines[leaf[:length]]}"
    return ""
