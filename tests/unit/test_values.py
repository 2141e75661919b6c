"""What each reader of a value makes of what people write, or the sentence by which it refuses: values.txt has it.

python -m tests.unit.test_values        writes it anew, after a change that is meant
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from unittest import mock

from nbdzram import values
from nbdzram.config import Dedup, Durability, TlsMode
from nbdzram.machine import Machine, Share
from nbdzram.units import counted, format_seconds, format_size, parse_size, some_of

VALUES = Path(__file__).with_name("values.txt")

NO_TEXT: Sequence[object] = (None, True, False, 0, 1.5, ["a"])
NUMBERS: Sequence[object] = (
    *(-1, 0, 1, 4, 5, 9, 10, 9.5, 10.0, "4", "5", "9", "10", "-1", "05", "1e1", "+5", "5.0", " 5", "\u0665", "5" * 20),
    *("5" * 21, "", "off", "auto"),
)
SIZES: Sequence[object] = (
    *(-1, 0, 1, 511, 512, 513, 4095, 4096, 1 << 40, (1 << 40) + 1, 1 << 51, (1 << 51) + 512, 1 << 63, (1 << 63) + 1),
    *("0", "512", "4K", "4kB", "4KiB", "1.5M", "0.1G", "2P", "2.1P", "8E", "8.1E", "50%", "0%", "100%", "100.1%"),
    *("1e3", "-1G", "1 M", "M", "", "off", "auto", "1X", "0.3K", "0.0000001%"),
)
TIMES: Sequence[object] = (
    *(
        0,
        0.0,
        0.001,
        0.99,
        1,
        1.5,
        3153600000,
        3153600001,
        -1,
        "0",
        "0s",
        "0.5",
        "0.99s",
        "1",
        "90",
        "1.5m",
        "2h",
        "3d",
    ),
    *("36500d", "36501d", "9" * 12, "9" * 13, "1w", "m", "-5", "", "off", "auto", "never"),
)
TEXTS: Sequence[object] = (
    *(
        "",
        "a",
        "disk",
        "two words",
        "-x",
        "a=b",
        "a/b",
        "ü" * 127,
        "ü" * 128,
        "n" * 255,
        "n" * 256,
        "a\0b",
        "a\nb",
        "\x7f",
    ),
    *("\udcff", "_" * 64, "_" * 65, ".a", "A.b-c_1", "n" * 238, "n" * 239, "d" * 4096, "d" * 4097),
)
ADDRESSES: Sequence[object] = (
    *("", ":", ":1", "a", "a:", "a:0", "a:65535", "a:65536", "a:123456", "127.0.0.1:11", "::1", "[::1]", "[::1]:11"),
    *("[fe80::1%eth0]:1", "[]:1", "[a", "a]:1", "a b", "a\x7f", "off", "host.example:7"),
)
NETWORKS: Sequence[object] = (
    *("", "10.0.0.0/8", "10.0.0.1/8", "10.0.0.1", "10.0.0.0/33", "::1", "fd00::/8", "fd00::1/8", "fe80::1%eth0", "a"),
)
HOSTS: Sequence[object] = (
    *("", "*", "*.", "*.a", "a.*", "A.Example", "a_b-c.d", "a..b", ".a", "a.", "h" * 63, "h" * 64, "a.b.c.d", "a:1"),
)
PATHS: Sequence[object] = (*("", "/", "a", "./a", "~", "~/a", "~nobody-has-this-name/a", "/a\0b", "/a,b", "/\udcff"),)
SOCKETS: Sequence[object] = (
    *("/s", "s", "", "/s,mode=0640", "/s,mode=640", "/s,mode=888", "/s,mode=00640", "/s,mode=64", "/s,owner=a"),
    *(
        "/s,owner=a:b,mode=0600",
        "/s,owner=",
        "/s,owner=a\n",
        "/s,",
        "/s,else=1",
        "/" + "s" * 106,
        "/" + "s" * 107,
        "/s\n",
    ),
    *("/ü" + "s" * 104, "/ü" + "s" * 105, "/\udcff"),
)
LISTS: Sequence[object] = ("", " ", "a", " a  b ", "a a", ["a", "b", "a"], ["a", 1], ("a",), ["a"] * 1024, ["a"] * 1025)
LISTENS: Sequence[object] = (
    *(
        ":1",
        "vsock",
        "vsock:",
        "vsock:0",
        "vsock:4294967294",
        "vsock:4294967295",
        "unix:/s",
        "unix",
        "unix:",
        "a:1 a:1",
    ),
    *("a:0 a:0", "a a:10809", "unix:/s unix:/s,mode=0600", "vsock:1 vsock:1", "10.0.0.1:11 unix:/u,mode=0640 vsock:13"),
    *(["a", ":2"], [1], "udp:1"),
)

READERS: Mapping[str, tuple[Callable[[object], object], Sequence[object]]] = {
    "text": (values.text, ["", "a", *NO_TEXT]),
    "boolean": (values.boolean, ["true", "TRUE", "Yes", "on", "1", "no", "off", "0", "False", "2", "", *NO_TEXT]),
    "integer from 5 to 9": (values.integer(5, 9), [*NUMBERS, *NO_TEXT]),
    "seconds from 5 to 9.5": (values.seconds(5, 9.5), [*NUMBERS, *NO_TEXT, "5.25", "9.51", "9" * 12, "9" * 13, "5."]),
    "size from 512 to 4096": (values.size(512, 4096), [*SIZES, *NO_TEXT]),
    "memory": (values.memory, [*SIZES, *NO_TEXT]),
    "spare": (values.spare, [*SIZES, *NO_TEXT[:4]]),
    "export size": (values.export_size, [*SIZES, *NO_TEXT]),
    "quota": (values.quota, [*SIZES, *NO_TEXT]),
    "bandwidth": (values.bandwidth, SIZES),
    "iops": (values.iops, [*NUMBERS, 10**9, 10**9 + 1, *NO_TEXT]),
    "TLS": (values.choice(TlsMode), [*TlsMode, "ON", "", *NO_TEXT]),
    "durability": (values.choice(Durability), [*Durability, "none"]),
    "dedup": (values.dedup, [*Dedup, "none"]),
    "path": (values.path, [*PATHS, *NO_TEXT]),
    "socket's path": (values.socket_path, ["/s", "s" * 107, "s" * 108, f"/{'ü' * 53}", f"/{'ü' * 53}s", "~/s", "", 7]),
    "place": (values.place, [*PATHS, *NO_TEXT]),
    "description": (values.description, [*TEXTS, *NO_TEXT]),
    "certificate's name": (values.certificate_name, [*TEXTS, *NO_TEXT]),
    "export's name": (values.export_name, [*TEXTS, *NO_TEXT]),
    "name of snapshots": (values.name_of_snapshots, (*TEXTS[:9], *TEXTS[19:21])),  # type: ignore[dict-item]
    "pool's name": (values.pool_name, [*TEXTS, *NO_TEXT]),
    "several": (values.several(values.text), [*LISTS, *NO_TEXT]),
    "network": (values.network, [*NETWORKS, *NO_TEXT]),
    "host pattern": (values.host_pattern, [*HOSTS, *NO_TEXT]),
    "TCP address": (values.tcp_address(7), [*ADDRESSES, *NO_TEXT]),
    "TCP address or off": (values.tcp_address_or_off(7), [*ADDRESSES, *NO_TEXT]),
    "unix address": (values.unix_address, [*SOCKETS, *NO_TEXT]),
    "listen": (values.listen, [*LISTENS, *NO_TEXT]),
    "interval": (values.interval, [*TIMES, *NO_TEXT]),
    "trigger": (values.trigger("fold"), [*TIMES, *NO_TEXT]),
    "pause": (lambda value: values.pause("scrub", value), [*TIMES, *NO_TEXT]),
    "a size of 8,000 bytes": (lambda value: parse_size(str(value), of=8000), SIZES),
}


def shortened(words: str) -> str:
    return words if len(words) < 150 else f"{words[:80]}...{words[-50:]} ({len(words)})"


def made(read: Callable[[object], object], value: object) -> str:
    try:
        return repr(read(value))
    except ValueError as error:
        return f"refused: {error}"


def figures() -> Iterator[str]:
    """Numbers for people, on both sides of where they change their form."""
    edges = [edge for power in range(10, 61, 10) for edge in ((1 << power) - 1, 1 << power, (3 << power) // 2)]
    sizes = [-(3 << 29), -1, 0, 1, 9, *edges, 10188, 10189, 1048524, 1048525, 1 << 63, (1 << 70) - 1, 1 << 70]
    yield f"sizes: {' '.join(format_size(size) for size in sizes)}"
    stretches = (0, 0.9, 1, 59.9, 60, 61, 3599, 3600, 3661, 86399, 86400, 90000, 10**7)
    yield f"times: {', '.join(format_seconds(seconds) for seconds in stretches)}"
    yield f"counted: {', '.join(counted(number, 'disk') for number in range(-1, 4))}"
    yield f"some of: {'; '.join(some_of(['a', 'b', 'c', 'd'], most) for most in range(6))}"


def lines() -> Iterator[str]:
    share = mock.patch.object(Machine, "memory", return_value=Share(8 << 30, None))
    with share, mock.patch.dict(os.environ, HOME="/home/me"):
        for name, (read, given) in READERS.items():
            yield f"-- {name}"
            yield from (f"{shortened(repr(value))}: {shortened(made(read, value))}" for value in given)
    yield "-- figures"
    yield from figures()


def test_each_value_is_read_as_it_was() -> None:
    told = [line.replace(str(Path.cwd()), "HERE") for line in lines()]
    assert told == VALUES.read_text(encoding="utf-8").splitlines()


if __name__ == "__main__":
    VALUES.write_text("\n".join(line.replace(str(Path.cwd()), "HERE") for line in lines()) + "\n", encoding="utf-8")
