"""How one configured value reads: from TOML's types or from text, into the types of config.py.

Each reader takes what a source gave (a str from a flag or the environment, any TOML type from a file) and raises
ValueError with a text that says what is allowed; settings.py adds where it was said. A list given as text is
separated by white space.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from nbdzram.config import DEFAULT_PORT, Dedup, TcpAddress, Trigger, UnixAddress, VsockAddress
from nbdzram.machine import Machine
from nbdzram.units import MAX_SIZE_BYTES, format_size, parse_seconds, parse_size

MAX_NAME_BYTES = 255  # what an export directory entry holds (engine/pool); the protocol allows 4096
STAMPED = "@auto-20261127T163000Z"  # what stands behind it in the name of a snapshot by the clock (server/schedule)
SECTOR_BYTES = 512  # what every NBD client can address
EXPORT_BYTES_MAX = 1 << 51  # 2 PiB: what a block table of three levels reaches (engine/table)
BLOCK_BYTES = 4096  # less would let nothing be stored, or hold a request for seconds
BANDWIDTH_MAX = 1 << 40  # a second: more than memory gives
IOPS_MAX = 10**9  # a nanosecond each, what a limit is counted in (sessions/throttle)
MAX_TEXT_BYTES = 4096  # a string of the NBD protocol, and no client need take more (doc/proto.md, "Values")
SECONDS_MAX = 100 * 365 * 86400.0  # a century: clocks and timers of every kind have room for it
SOCKET_PATH_BYTES = 107  # what the system's address of one has, and a zero (unix(7), sun_path)
MAX_RULES = 1024  # networks or certificate names of one export: each is looked at for each client that comes

_POOL_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")  # it becomes a file name
_HOST_PATTERN = re.compile(r"\*|(\*\.)?[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")
_TRUE = {"true", "yes", "on", "1"}
_FALSE = {"false", "no", "off", "0"}

Choice = TypeVar("Choice", bound=StrEnum)
Number = TypeVar("Number", int, float)


def text(value: object) -> str:
    """A string."""
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not text; put it in quotes")
    return value


def boolean(value: object) -> bool:
    """True or false, also as yes/no, on/off, 1/0 in text."""
    if isinstance(value, bool):
        return value
    word = value.lower() if isinstance(value, str) else ""
    if word not in _TRUE | _FALSE:
        raise ValueError(f"{value!r} is neither true nor false")
    return word in _TRUE


def integer(low: int, high: int) -> Callable[[object], int]:
    """A reader of whole numbers from `low` to `high`."""

    def read(value: object) -> int:
        if isinstance(value, str) and re.fullmatch(r"-?\d{1,20}", value):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"{value!r} is not a whole number from {low} to {high}")
        return value

    return read


def seconds(low: float, high: float) -> Callable[[object], float]:
    """A reader of times from `low` to `high` seconds, also as 30s, 10m, 2h."""

    def read(value: object) -> float:
        found = parse_seconds(value) if isinstance(value, str) else value
        if not isinstance(found, int | float) or isinstance(found, bool) or not low <= found <= high:
            raise ValueError(f"{value!r} is not a number of seconds from {low:g} to {high}, or a time such as 10m")
        return float(found)

    return read


def whole_seconds(low: int, high: int) -> Callable[[object], int]:
    """The same of what is counted in whole seconds."""

    def read(value: object) -> int:
        found = seconds(low, high)(value)
        if found % 1:
            raise ValueError(f"{value!r} is no whole number of seconds")
        return int(found)

    return read


def size(low: int, high: int) -> Callable[[object], int]:
    """A reader of sizes in bytes from `low` to `high`; a bare TOML integer is bytes."""

    def read(value: object) -> int:
        number = _size(value, of=None)
        if not low <= number <= high:
            raise ValueError(f"'{value}' is outside the allowed {low} to {high} bytes")
        return number

    return read


def memory(value: object) -> int:
    """A memory limit: a size, a share (50%) of the memory that this process may use, or 0 for none."""
    return _size(value, of=Machine().memory().amount)


def spare(value: object) -> int | None:
    """Memory that is kept free: auto, which is None, off, which is 0, or as a memory limit."""
    return {"auto": None, "off": 0}[value] if value in ("auto", "off") else memory(value)


def export_size(value: object) -> int:
    """The size of a disk: a multiple of a sector, at least one, as large as a block table reaches."""
    number = _size(value, of=None)
    if not SECTOR_BYTES <= number <= EXPORT_BYTES_MAX or number % SECTOR_BYTES:
        most = format_size(EXPORT_BYTES_MAX)
        raise ValueError(f"'{value}' is not the size of a disk: a multiple of {SECTOR_BYTES} bytes, at most {most}")
    return number


def quota(value: object) -> int:
    """Bytes that an export may store: a size of at least a block; off, or 0, is none."""
    return _bytes_or_off(value, EXPORT_BYTES_MAX)


def bandwidth(value: object) -> int:
    """Bytes a second, or at once: a size of at least a block; off, or 0, is no limit."""
    return _bytes_or_off(value, BANDWIDTH_MAX)


def iops(value: object) -> int:
    """Requests a second, or at once; off, or 0, is no limit."""
    return 0 if value == "off" else integer(0, IOPS_MAX)(value)


def _bytes_or_off(value: object, most: int) -> int:
    number = 0 if value == "off" else _size(value, of=None)
    if number and not BLOCK_BYTES <= number <= most:
        raise ValueError(f"'{value}' is neither off nor a size from {BLOCK_BYTES} bytes to {format_size(most)}")
    return number


BOUNDS: Mapping[str, Callable[[object], int]] = MappingProxyType(
    {
        "quota_bytes": quota,
        "iops": iops,
        "iops_burst": iops,
        "bandwidth_bytes": bandwidth,
        "bandwidth_burst_bytes": bandwidth,
    }
)
"""How each of bounds.Bounds reads."""


def choice(kind: type[Choice]) -> Callable[[object], Choice]:
    """A reader of one of an enumeration's values."""

    def read(value: object) -> Choice:
        allowed = [member.value for member in kind]
        if value not in allowed:
            raise ValueError(f"{value!r} is not allowed; it is one of {', '.join(allowed)}")
        return kind(value)

    return read


def path(value: object) -> Path:
    """A file or directory; `~` is the home directory."""
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError(f"{value!r} is not a path")
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        raise ValueError(
            f"{value!r} has letters that are in no file's name in the locale of this process; start it in a UTF-8 one"
        ) from None
    try:
        found = Path(value).expanduser()
    except RuntimeError:  # as Python says it: no such user, or a user without a home
        raise ValueError(f"{value!r} begins with the home directory of nobody here; write the whole path") from None
    try:
        found.absolute()
    except FileNotFoundError:
        raise ValueError(
            f"{value!r} begins in the directory that this process was started in, which is gone; write the whole path"
        ) from None
    return found


def socket_path(value: object) -> Path:
    """A file that can be a unix socket."""
    file = path(value)
    _require_room(file, len(os.fsencode(file)))
    return file


def _require_room(file: Path, size: int) -> None:
    """Room for so many bytes, in the system's address of a socket. Raises ValueError."""
    if size > SOCKET_PATH_BYTES:
        raise ValueError(f"the socket path {str(file)!r} is longer than the system's {SOCKET_PATH_BYTES} bytes")


def place(value: object) -> str:
    """A path as one program tells it to another, which is taken as it stands; empty: there is none."""
    told = text(value)
    try:
        if b"\0" not in os.fsencode(told):
            return told
    except UnicodeEncodeError:
        pass
    raise ValueError(f"{told[:80]!r} is not a path: no file has a NUL in its name, or characters that are no text")


def description(value: object) -> str:
    """What clients are told of an export, as one NBD string."""
    said = text(value)
    try:
        size = len(said.encode())
    except UnicodeEncodeError:
        raise ValueError(f"{said[:80]!r} is not UTF-8 text; write it in a UTF-8 locale") from None
    if size > MAX_TEXT_BYTES or "\0" in said:
        raise ValueError(
            f"a description of {size} bytes, beginning {said[:40]!r}: it is UTF-8 of at most {MAX_TEXT_BYTES} bytes, "
            "without NUL"
        )
    return said


def certificate_name(value: object) -> str:
    """A common or DNS name that a client's certificate may have."""
    name = text(value)
    if not name or not name.isprintable() or len(name.encode()) > MAX_NAME_BYTES:
        raise ValueError(f"{name[:80]!r} is not a certificate's name: 1 to {MAX_NAME_BYTES} bytes of printable UTF-8")
    return name


def export_name(value: object) -> str:
    """A name that NBD clients ask for. What is not printable, bytes that are no UTF-8 too, would garble every list."""
    name = text(value)
    if not name or not name.isprintable() or len(name.encode()) > MAX_NAME_BYTES:
        raise ValueError(f"{name[:80]!r} is not an export's name: 1 to {MAX_NAME_BYTES} bytes of printable UTF-8")
    return name


def name_of_snapshots(name: str) -> None:
    """An export's name that the names of its snapshots by the clock may begin with."""
    if len(name.encode()) + len(STAMPED) > MAX_NAME_BYTES:
        raise ValueError(
            f"snapshots of '{name[:20]}...' would be called that and {STAMPED}, more than {MAX_NAME_BYTES} bytes; give "
            "the export a shorter name"
        )


def pool_name(value: object) -> str:
    """A pool's name, which is also the name of its file in the state directory."""
    name = text(value)
    if _POOL_NAME.fullmatch(name) is None:
        raise ValueError(f"{name!r} is not a pool's name: up to 64 letters, digits, '_', '-' and '.'")
    return name


def several(read: Callable[[object], str]) -> Callable[[object], tuple[str, ...]]:
    """A reader of lists: TOML's, or text separated by white space."""

    def read_all(value: object) -> tuple[str, ...]:
        items = _items(value)
        if len(items) > MAX_RULES:
            raise ValueError(f"{len(items)} entries: at most {MAX_RULES} are allowed")
        return tuple(dict.fromkeys(read(item) for item in items))

    return read_all


def network(value: object) -> str:
    """An address or network in CIDR form. Through which interface somebody comes is not looked at."""
    try:
        network = ipaddress.ip_network(text(value))
    except ValueError as error:
        raise ValueError(f"{value!r} is not a network such as 10.0.0.0/8 or fd00::/8 ({error})") from None
    if getattr(network.network_address, "scope_id", None) is not None:
        raise ValueError(f"{value!r} names an interface behind %, which no rule can: write the address alone")
    return str(network)


def host_pattern(value: object) -> str:
    """A host's name, `*.DOMAIN` for those below a domain, or `*` for any. In lower case."""
    name = text(value).lower()
    if _HOST_PATTERN.fullmatch(name) is None:
        raise ValueError(f"{value!r} is not a host's name such as nbd1.example.org or *.example.org; * is any")
    return name


def tcp_address(default_port: int) -> Callable[[object], TcpAddress]:
    """A reader of HOST:PORT, HOST, [IPV6]:PORT or :PORT (which means 127.0.0.1)."""

    def read(value: object) -> TcpAddress:
        match = re.fullmatch(r"(?:\[(?P<six>[^\[\]]+)\]|(?P<host>[^\[\]:\s]*))(?::(?P<port>\d{1,5}))?", text(value))
        if match is None or not match[0] or not match[0].isprintable():
            raise ValueError(f"{value!r} is not an address such as 127.0.0.1:{default_port} or [::1]:{default_port}")
        port = default_port if match["port"] is None else int(match["port"])
        if port > 65535:  # 0 asks the system for a free one
            raise ValueError(f"{value!r} has the port {port}; a port is at most 65535")
        return TcpAddress(host=match["six"] or match["host"] or TcpAddress().host, port=port)

    return read


def tcp_address_or_off(default_port: int) -> Callable[[object], TcpAddress | None]:
    """The same, or `off`."""
    read = tcp_address(default_port)
    return lambda value: None if value is False or value == "off" else read(value)


def unix_address(value: object) -> UnixAddress:
    """PATH[,mode=0660][,owner=USER[:GROUP]]. The path is made whole: clients are told it wherever they are."""
    name, *options = text(value).split(",")
    mode, owner = 0o600, None
    for option in options:
        key, _, content = option.partition("=")
        if key == "mode" and re.fullmatch(r"0?[0-7]{3}", content):
            mode = int(content, 8)
        elif key == "owner" and content.isprintable() and content:
            owner = content
        else:
            raise ValueError(f"{option!r} is not allowed behind a socket's path; mode=0660 and owner=USER:GROUP are")
    file = path(name).absolute()
    try:
        size = len(str(file).encode())
    except UnicodeEncodeError:
        raise ValueError(
            f"the socket path {str(file)!r} is not UTF-8 text, as the URI that clients are told has to be"
        ) from None
    if not str(file).isprintable():  # who is told of a URI has to be able to copy it
        raise ValueError(f"the socket path {str(file)!r} has characters that do not print; choose one without")
    _require_room(file, size)
    return UnixAddress(path=file, mode=mode, owner=owner)


def listen(value: object) -> dict[str, object]:
    """Addresses to serve on: HOST:PORT, unix:PATH[,mode=0660][,owner=USER:GROUP], vsock:PORT."""
    tcp: list[TcpAddress] = []
    unix: list[UnixAddress] = []
    vsock: list[VsockAddress] = []
    for item in _items(value):
        scheme, colon, rest = text(item).partition(":")
        if scheme == "unix" and colon:
            unix.append(unix_address(rest))
        elif scheme == "vsock":
            vsock.append(VsockAddress(port=integer(0, (1 << 32) - 2)(rest) if rest else DEFAULT_PORT))
        else:
            tcp.append(tcp_address(DEFAULT_PORT)(item))
    named = [str(address) for address in (*tcp, *unix, *vsock)]
    twice = next((name for name in named if named.count(name) > 1 and not name.endswith(":0")), None)
    if twice is not None:
        raise ValueError(f"{twice} stands there twice; once is enough")
    return {"tcp": tuple(tcp), "unix": tuple(unix), "vsock": tuple(vsock)}


def interval(value: object) -> float:
    """A time of at least a second, as seconds or 30s, 5m, 2h. In seconds."""
    seconds = _seconds(value)
    if seconds is None or seconds < 1:
        raise ValueError(f"{value!r} is not an interval of at least a second, such as 60, 10m or 2h")
    return seconds


def _seconds(value: object) -> float | None:
    """What a number with one of those letters behind it, or without, is; None: it is no number. Raises ValueError."""
    seconds = None if isinstance(value, bool) else parse_seconds(str(value))
    if seconds is not None and seconds > SECONDS_MAX:
        raise ValueError(f"{value!r} is longer than a century, {SECONDS_MAX:.0f} seconds")
    return seconds


def trigger(name: str) -> Callable[[object], dict[str, object]]:
    """A reader of `off`, `auto` or an interval in seconds (or 30s, 5m, 2h) for the maintenance run `name`."""

    def read(value: object) -> dict[str, object]:
        if value is False or value == "off":
            return {name: Trigger.OFF}
        if value == "auto":
            return {name: Trigger.AUTO}
        seconds = _seconds(value)
        if not seconds:
            raise ValueError(f"{value!r} is not allowed; it is off, auto, or an interval such as 600, 10m or 2h")
        return {name: Trigger.INTERVAL, f"{name}_interval_seconds": seconds}

    return read


def pause(name: str, value: object) -> dict[str, object]:
    """`off`, or how often something is done by itself: a number of seconds, or 30m, 2h, 1d."""
    if value is False or value == "off":
        return {f"{name}_seconds": 0.0}
    seconds = _seconds(value)
    if not seconds:
        raise ValueError(f"{value!r} is not allowed; it is off, or an interval such as 30m, 2h or 1d")
    return {f"{name}_seconds": seconds}


def dedup(value: object) -> Dedup:
    """When equal blocks meet."""
    return choice(Dedup)(value)


def _size(value: object, *, of: int | None) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_SIZE_BYTES:
        return value
    if not isinstance(value, str):
        raise ValueError(f'{value!r} is not a size from 0 to {MAX_SIZE_BYTES} bytes; write it as "512M"')
    return parse_size(value, of=of)


def _items(value: object) -> list[object]:
    if isinstance(value, str):
        return list(value.split())
    if not isinstance(value, list):
        raise ValueError(f"{value!r} is not a list")
    return value
