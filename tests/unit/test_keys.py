"""Every key arrives in its field, from a file, a variable and a flag; every number has the limits that it should."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from nbdzram import values
from nbdzram.cli import serve
from nbdzram.cli.main import run
from nbdzram.config import ServerConfig, TcpAddress, Trigger, UnixAddress, VsockAddress
from nbdzram.control.messages import MessageError
from nbdzram.control.methods import method_table
from nbdzram.errors import ConfigError
from nbdzram.settings import KEYS, LeafPath, load

ARRIVES: dict[LeafPath, tuple[str, dict[str, object]]] = {
    ("listen",): (
        "10.0.0.1:11 unix:/u,mode=0640,owner=a:b vsock:13",
        {
            "tcp": (TcpAddress(host="10.0.0.1", port=11),),
            "unix": (UnixAddress(path=Path("/u"), mode=0o640, owner="a:b"),),
            "vsock": (VsockAddress(port=13),),
        },
    ),
    ("metrics",): ("10.0.0.2:17", {"metrics": TcpAddress(host="10.0.0.2", port=17)}),
    ("metrics_hosts",): ("a.example *.example", {"metrics_hosts": ("a.example", "*.example")}),
    ("control",): ("/control", {"control": Path("/control")}),
    ("state_dir",): ("/state", {"state_dir": Path("/state")}),
    ("default_export",): ("disk", {"default_export": "disk"}),
    ("list_exports",): ("off", {"list_exports": False}),
    ("pidfile",): ("/pid", {"pidfile": Path("/pid")}),
    ("log",): ("syslog", {"log": "syslog"}),
    ("threads",): ("19", {"threads": 19}),
    ("swap",): ("on", {"swap": True}),
    ("log_level",): ("error", {"log_level": "error"}),
    ("log_format",): ("json", {"log_format": "json"}),
    ("tls", "mode"): ("require", {"tls.mode": "require"}),
    ("tls", "certificate"): ("/certificate", {"tls.certificate": Path("/certificate")}),
    ("tls", "key"): ("/key", {"tls.key": Path("/key")}),
    ("tls", "client_ca"): ("/ca", {"tls.client_ca": Path("/ca")}),
    ("tls", "psk_file"): ("/psk", {"tls.psk_file": Path("/psk")}),
    ("limits", "handshake_seconds"): ("23", {"limits.handshake_seconds": 23.0}),
    ("limits", "handshake_options"): ("29", {"limits.handshake_options": 29}),
    ("limits", "connections"): ("31", {"limits.connections": 31}),
    ("limits", "payload_bytes"): ("37M", {"limits.payload_bytes": 37 << 20}),
    ("limits", "connection_bytes"): ("41M", {"limits.connection_bytes": 41 << 20}),
    ("limits", "total_bytes"): ("43M", {"limits.total_bytes": 43 << 20}),
    ("limits", "keep_free"): ("47M", {"limits.keep_free": 47 << 20}),
    ("limits", "drain_seconds"): ("53", {"limits.drain_seconds": 53.0}),
    ("checkpoint", "directory"): ("/kept", {"checkpoint.directory": Path("/kept")}),
    ("checkpoint", "interval_seconds"): ("59m", {"checkpoint.interval_seconds": 59 * 60.0}),
    ("checkpoint", "keep"): ("61", {"checkpoint.keep": 61}),
    ("maintenance", "fold"): (
        "67s",
        {"maintenance.fold": Trigger.INTERVAL, "maintenance.fold_interval_seconds": 67.0},
    ),
    ("maintenance", "compact"): (
        "71m",
        {"maintenance.compact": Trigger.INTERVAL, "maintenance.compact_interval_seconds": 71 * 60.0},
    ),
    ("maintenance", "recompress"): (
        "73h",
        {"maintenance.recompress": Trigger.INTERVAL, "maintenance.recompress_interval_seconds": 73 * 3600.0},
    ),
    ("maintenance", "recompress_age_seconds"): ("79", {"maintenance.recompress_age_seconds": 79}),
    ("maintenance", "recompress_level"): ("9", {"maintenance.recompress_level": 9}),
    ("maintenance", "recompress_huge_only"): ("yes", {"maintenance.recompress_huge_only": True}),
    ("maintenance", "recompress_dictionary"): ("1", {"maintenance.recompress_dictionary": True}),
    ("maintenance", "scrub"): ("83d", {"maintenance.scrub_seconds": 83 * 86400.0}),
    ("maintenance", "scrub_cpu_percent"): ("89", {"maintenance.scrub_cpu_percent": 89}),
    ("maintenance", "cpu_percent"): ("97", {"maintenance.cpu_percent": 97}),
    ("pools", "*", "mem_limit"): ("101M", {"mem_limit": 101 << 20}),
    ("pools", "*", "dedup"): ("inline", {"dedup": "inline"}),
    ("pools", "*", "durability"): ("flush", {"durability": "flush"}),
    ("pools", "*", "verify"): ("no", {"verify": False}),
    ("pools", "*", "tell_sharing"): ("true", {"tell_sharing": True}),
    ("exports", "*", "size"): ("103M", {"size_bytes": 103 << 20}),
    ("exports", "*", "image"): ("/image", {"image": Path("/image")}),
    ("exports", "*", "pool"): ("default", {"pool": "default"}),
    ("exports", "*", "read_only"): ("true", {"read_only": True}),
    ("exports", "*", "private"): ("true", {"private": True}),
    ("exports", "*", "snapshots"): ("107m", {"snapshots_seconds": 107 * 60.0}),
    ("exports", "*", "snapshots_keep"): ("109", {"snapshots_keep": 109}),
    ("exports", "*", "quota"): ("113M", {"quota": 113 << 20, "bounds.quota_bytes": 113 << 20}),
    ("exports", "*", "iops"): ("127", {"iops": 127, "bounds.iops": 127}),
    ("exports", "*", "iops_burst"): ("131", {"iops_burst": 131, "bounds.iops_burst": 131}),
    ("exports", "*", "bandwidth"): ("137M", {"bandwidth": 137 << 20, "bounds.bandwidth_bytes": 137 << 20}),
    ("exports", "*", "bandwidth_burst"): (
        "139M",
        {"bandwidth_burst": 139 << 20, "bounds.bandwidth_burst_bytes": 139 << 20},
    ),
    ("exports", "*", "description"): ("the first", {"description": "the first"}),
    ("exports", "*", "allow_addresses"): (
        "10.0.0.0/8 ::1",
        {"allow_addresses": ("10.0.0.0/8", "::1/128"), "access.addresses": ("10.0.0.0/8", "::1/128")},
    ),
    ("exports", "*", "allow_certificates"): (
        "a b",
        {"allow_certificates": ("a", "b"), "access.certificates": ("a", "b")},
    ),
}
"""What is said for each key, and what of the configuration it is then."""

ELSE: Mapping[LeafPath, Mapping[LeafPath, str]] = {
    ("tls", "mode"): {("tls", "psk_file"): "/psk"},
    ("pools", "*", "durability"): {("checkpoint", "directory"): "/kept"},
    **{key.path: {("exports", "*", "size"): "1M"} for key in KEYS if key.path[0] == "exports"},
}
"""What one has to say beside it."""


def named(path: LeafPath, name: str) -> LeafPath:
    return tuple(name if word == "*" else word for word in path)


def as_toml(said: Mapping[LeafPath, str], name: str) -> str:
    return "\n".join(f"{'.'.join(named(path, name))} = {value!r}" for path, value in said.items())


def differing(config: ServerConfig, path: LeafPath, name: str) -> dict[str, object]:
    """What of a configuration is not as it is by default, by its place, of the pool or export of that name or all."""
    part: Any = config
    of: Any = load(None, {}, {})
    if path[0] in {"pools", "exports"}:
        (part,) = (one for one in getattr(config, path[0]) if one.name == name)
        of = type(part)(name=name, **({"size_bytes": 0} if path[0] == "exports" else {}))
    found: dict[str, object] = {}
    for field in dataclasses.fields(part):
        value, default = getattr(part, field.name), getattr(of, field.name)
        if dataclasses.is_dataclass(default) and not isinstance(value, TcpAddress):
            inner = (one.name for one in dataclasses.fields(default))
            found |= {
                f"{field.name}.{one}": getattr(value, one)
                for one in inner
                if getattr(value, one) != getattr(default, one)
            }
        elif value != default:
            found[field.name] = value
    return {place: value for place, value in found.items() if place not in {"exports", "pools"}}


def test_the_table_has_every_key() -> None:
    assert list(ARRIVES) == [key.path for key in KEYS]


@pytest.mark.parametrize("path", ARRIVES, ids=".".join)
def test_what_is_said_in_a_file_arrives_where_it_is_used_and_nowhere_else(tmp_path: Path, path: LeafPath) -> None:
    value, expected = ARRIVES[path]
    file = tmp_path / "n.toml"
    file.write_text(as_toml({**ELSE.get(path, {}), path: value}, "second"))
    config = load(file, {}, {})
    holds(config, path, "second", expected)


@pytest.mark.parametrize("path", [key.path for key in KEYS if key.variable is not None], ids=".".join)
def test_what_a_variable_says_arrives_there_too(path: LeafPath) -> None:
    said = {**ELSE.get(path, {}), path: ARRIVES[path][0]}
    variables = {key.variable: said[key.path] for key in KEYS if key.path in said and key.variable is not None}
    assert len(variables) == len(said)
    holds(load(None, variables, {}), path, "default", ARRIVES[path][1])


OTHERWISE_CALLED: dict[str, LeafPath] = {
    **{name: ("pools", "*", name) for name in ("mem_limit", "dedup", "durability")},
    **{f"{name}_interval": ("maintenance", name) for name in ("fold", "compact", "recompress", "scrub")},
    "recompress_age": ("maintenance", "recompress_age_seconds"),
    "cpu_percent": ("maintenance", "cpu_percent"),
    "checkpoint": ("checkpoint", "directory"),
    "checkpoint_interval": ("checkpoint", "interval_seconds"),
    "tls": ("tls", "mode"),
}
"""Flags that are not called as their key is, with its words one behind the other."""
FLAG_KEYS = {"_".join(key.path): key.path for key in KEYS} | OTHERWISE_CALLED


@pytest.mark.parametrize("flag", serve.FLAGS)
def test_what_a_flag_says_arrives_there_too(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = FLAG_KEYS[flag]
    begun: list[ServerConfig] = []
    monkeypatch.setattr(serve, "serve", lambda config, *_, **__: begun.append(config))
    flags = {places: name for name, places in serve.FLAGS.items()}
    words = []
    for place, value in {**ELSE.get(pattern, {}), pattern: ARRIVES[pattern][0]}.items():
        word = f"--{flags[named(place, 'default')].replace('_', '-')}"
        words += [word] if flag == "swap" else [word, value]
    assert run(["serve", *words]) == 0
    holds(begun[0], pattern, "default", ARRIVES[pattern][1])


def holds(config: ServerConfig, path: LeafPath, name: str, expected: Mapping[str, object]) -> None:
    part: Any = config
    if path[0] in {"pools", "exports"}:
        (part,) = (one for one in getattr(config, path[0]) if one.name == name)
    assert {place: attrgetter(place)(part) for place in expected} == expected
    fields = {place for place in expected if not place.startswith(("bounds.", "access."))}
    beside = {".".join(place[-1:] if path[0] in {"pools", "exports"} else place) for place in ELSE.get(path, {})}
    beside |= {"size_bytes"} if path[0] == "exports" else set()
    assert set(differing(config, path, name)) - beside == fields - beside - {"pool"}


GIB, PIB = 1 << 30, 1 << 50
LIMITS: dict[LeafPath, tuple[object, object, object, object]] = {
    ("threads",): (-1, 0, 63, 64),
    ("limits", "handshake_seconds"): (0.09, 0.1, 3600, 3601),
    ("limits", "handshake_options"): (7, 8, 65536, 65537),
    ("limits", "connections"): (0, 1, 1 << 20, (1 << 20) + 1),
    ("limits", "payload_bytes"): (65535, 65536, GIB, GIB + 1),
    ("limits", "connection_bytes"): (65535, 65536, GIB, GIB + 1),
    ("limits", "total_bytes"): ((1 << 20) - 1, 1 << 20, 1 << 40, (1 << 40) + 1),
    ("limits", "keep_free"): (-1, 0, 1 << 63, (1 << 63) + 1),
    ("limits", "drain_seconds"): (-0.1, 0, 3600, 3600.1),
    ("checkpoint", "interval_seconds"): (0.99, 1, 36500 * 86400, 36500 * 86400 + 1),
    ("checkpoint", "keep"): (0, 1, 1000, 1001),
    ("maintenance", "fold"): (0, 0.001, 36500 * 86400, 36500 * 86400 + 1),
    ("maintenance", "recompress_age_seconds"): (-1, 0, 10**9, 10**9 + 1),
    ("maintenance", "recompress_level"): (0, 1, 22, 23),
    ("maintenance", "scrub_cpu_percent"): (0, 1, 100, 101),
    ("maintenance", "cpu_percent"): (0, 1, 100, 101),
    ("pools", "*", "mem_limit"): (-1, 0, 1 << 63, (1 << 63) + 1),
    ("exports", "*", "size"): (511, 512, 2 * PIB, 2 * PIB + 512),
    ("exports", "*", "snapshots_keep"): (0, 1, 1000, 1001),
    ("exports", "*", "quota"): (4095, 4096, 2 * PIB, 2 * PIB + 1),
    ("exports", "*", "iops"): (-1, 0, 10**9, 10**9 + 1),
    ("exports", "*", "bandwidth"): (4095, 4096, 1 << 40, (1 << 40) + 1),
}
"""Of each number: what is too little, the least, the most, and what is too much."""
READ = {key.path: key.read for key in KEYS}


@pytest.mark.parametrize("path", LIMITS, ids=".".join)
def test_a_number_has_a_least_and_a_most(path: LeafPath) -> None:
    below, least, most, above = LIMITS[path]
    for value in (least, most):
        READ[path](value)
        READ[path](str(value))
    for value in (below, above):
        with pytest.raises(ValueError, match=r".+"):
            READ[path](value)
    if not isinstance(least, float):
        with pytest.raises(ValueError, match=r".+"):
            READ[path](True)


@pytest.mark.parametrize(
    "path", [("checkpoint", "interval_seconds"), ("maintenance", "fold"), ("maintenance", "scrub")]
)
def test_a_time_that_is_too_long_is_told_as_that(path: LeafPath) -> None:
    for value in (36500 * 86400 + 1, "36501d", "999999999999"):
        with pytest.raises(ValueError, match="is longer than a century"):
            READ[path](value)


LENGTHS: dict[str, tuple[Callable[[object], object], object, object]] = {
    "an export's name": (values.export_name, "n" * 255, "n" * 256),
    "its bytes": (values.export_name, "ü" * 127, "ü" * 128),
    "a pool's name": (values.pool_name, "p" * 64, "p" * 65),
    "a description": (values.description, "d" * 4096, "d" * 4097),
    "a host": (values.several(values.host_pattern), "h" * 63, "h" * 64),
    "a certificate's name": (values.several(values.certificate_name), ["c" * 255], ["c" * 256]),
    "rules": (values.several(values.network), ["::1"] * 1024, ["::1"] * 1025),
    "a port": (values.tcp_address(1), "a:65535", "a:65536"),
    "a vsock port": (values.listen, f"vsock:{(1 << 32) - 2}", f"vsock:{(1 << 32) - 1}"),
    "a socket's path": (values.unix_address, "/" + "s" * 106, "/" + "s" * 107),
}


@pytest.mark.parametrize("what", LENGTHS)
def test_a_text_has_a_most(what: str) -> None:
    read, most, above = LENGTHS[what]
    read(most)
    with pytest.raises(ValueError, match=r".+"):
        read(above)


@pytest.mark.parametrize(("size", "steps"), [("exports.add", 512), ("exports.resize", 512), ("exports.lose", 1)])
def test_control_reads_a_size_by_the_same_limits(size: str, steps: int) -> None:
    method = method_table(None, None)[size]  # type: ignore[arg-type]
    method.read({"name": "a", "size_bytes": 2 * PIB})
    with pytest.raises(MessageError):
        method.read({"name": "a", "size_bytes": 2 * PIB + steps})


def test_a_configuration_file_has_a_most(tmp_path: Path) -> None:
    file = tmp_path / "n.toml"
    file.write_text("#" * (4 << 20))
    load(file, {}, {})
    file.write_text("#" * ((4 << 20) + 1))
    with pytest.raises(ConfigError, match="is larger than 4194304 bytes"):
        load(file, {}, {})
