"""Pre-shared keys: the file, and the handshake."""

from __future__ import annotations

import contextlib
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nbdzram.config import TlsConfig, TlsMode
from nbdzram.errors import ConfigError, TlsError
from nbdzram.ready import readable
from nbdzram.server.tls import make_context, read_keys
from nbdzram.sessions.tls import TlsLine
from tests.support.openssl import TLS_1_2, TLS_1_3, OpenSslClient

KEY = "00112233445566778899aabbccddeeff"


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys.psk"
    path.write_text(f"# for the lab\n\n  # indented\nvm1:{KEY}\nteam:vm2:{KEY[::-1]}\n")
    path.chmod(0o640)
    return path


def test_keys_are_read_as_psktool_writes_them(keys: Path) -> None:
    assert read_keys(keys) == {"vm1": bytes.fromhex(KEY), "team:vm2": bytes.fromhex(KEY[::-1])}


def test_a_mark_of_the_byte_order_in_front_is_no_part_of_the_first_name(keys: Path) -> None:
    """Nobody sees it who looks for why that client alone is refused."""
    keys.write_text(f"vm1:{KEY}\n", encoding="utf-8-sig")
    assert list(read_keys(keys)) == ["vm1"]


@pytest.mark.parametrize("line", ["vm1", "vm1:", f":{KEY}", "vm1:xyz", "vm1:0011", f"vm\0:{KEY}", f"vm1:{KEY * 20}"])
def test_a_line_that_is_no_key_is_named_and_never_shown(keys: Path, line: str) -> None:
    keys.write_text(f"vm0:{KEY}\n{line}\n")
    with pytest.raises(ConfigError, match=r"keys\.psk line 2: not NAME:HEXKEY") as caught:
        read_keys(keys)
    assert "0011" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "\n \n", f"# vm1:{KEY}\n  # vm2:{KEY}\n"])
def test_a_file_without_a_key_is_refused(keys: Path, content: str) -> None:
    keys.write_text(content)
    with pytest.raises(ConfigError, match=r"keys\.psk hold none, and need one at least.*`psktool -u NAME -p .*` adds"):
        read_keys(keys)


@pytest.mark.parametrize("key", [KEY, KEY[::-1]])
def test_a_name_with_two_keys_is_refused_also_where_they_are_equal(keys: Path, key: str) -> None:
    """The last one would count, and who revoked a key by removing a line has left the other."""
    keys.write_text(f"vm1:{KEY}\nvm2:{KEY}\n vm1:{key}\n")
    with pytest.raises(ConfigError, match=r"line 3: 'vm1' has a key in line 1 already.*remove the line") as caught:
        read_keys(keys)
    assert key not in str(caught.value)


@pytest.mark.parametrize(("mode", "told"), [(0o644, "0644"), (0o602, "0602"), (0o606, "0606"), (0o777, "0777")])
def test_keys_that_others_may_read_or_write_are_refused(keys: Path, mode: int, told: str) -> None:
    keys.chmod(mode)
    with pytest.raises(ConfigError, match=rf"key file {keys} has mode {told}: others may .*; chmod o= {keys}"):
        read_keys(keys)
    keys.chmod(mode & 0o771)
    assert read_keys(keys)


@pytest.mark.parametrize("newest", [TLS_1_2, TLS_1_3])
@pytest.mark.parametrize(
    ("name", "key", "admitted"),
    [("vm1", KEY, True), ("team:vm2", KEY[::-1], True), ("vm1", KEY[::-1], False), ("vm", KEY, False)],
)
def test_only_who_knows_the_key_gets_in(keys: Path, newest: int, name: str, key: str, admitted: bool) -> None:
    context = make_context(TlsConfig(mode=TlsMode.ON, psk_file=keys))
    ours, theirs = socket.socketpair()
    line = TlsLine(ours.detach(), context, b"")
    with ThreadPoolExecutor(1) as pool:
        client = pool.submit(OpenSslClient, theirs, psk=(name, bytes.fromhex(key)), newest=newest)
        assert shakes_hands(line) is admitted
        line.close(orderly=True)
        assert (client.exception() is None) is admitted
    theirs.close()


def shakes_hands(line: TlsLine) -> bool:
    with contextlib.suppress(TlsError, EOFError):
        while not line.handshake():
            readable(line.fileno())
        return True
    return False
