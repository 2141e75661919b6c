"""Pre-shared keys: the file, and the handshake where Python has them."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from nbdzram.config import TlsConfig, TlsMode
from nbdzram.errors import ConfigError
from nbdzram.server.tls import make_context, read_keys

KEY = "00112233445566778899aabbccddeeff"
PSK = hasattr(ssl.SSLContext, "set_psk_server_callback")


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys.psk"
    path.write_text(f"# for the lab\n\nvm1:{KEY}\nteam:vm2:{KEY[::-1]}\n")
    return path


def test_keys_are_read_as_psktool_writes_them(keys: Path) -> None:
    assert read_keys(keys) == {"vm1": bytes.fromhex(KEY), "team:vm2": bytes.fromhex(KEY[::-1])}


@pytest.mark.parametrize("line", ["vm1", "vm1:", f":{KEY}", "vm1:xyz", "vm1:0011"])
def test_a_line_that_is_no_key_is_named_and_never_shown(keys: Path, line: str) -> None:
    keys.write_text(f"vm0:{KEY}\n{line}\n")
    with pytest.raises(ConfigError, match=r"keys\.psk line 2: not NAME:HEXKEY") as caught:
        read_keys(keys)
    assert "0011" not in str(caught.value)


@pytest.mark.skipif(PSK, reason="this Python has pre-shared keys")
def test_an_older_python_says_which_one_is_needed(keys: Path) -> None:
    with pytest.raises(ConfigError, match=r"Python 3\.13 or newer, this is 3\."):
        make_context(TlsConfig(mode=TlsMode.ON, psk_file=keys))


@pytest.mark.skipif(not PSK, reason="pre-shared keys need Python 3.13")
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize(
    ("name", "key", "admitted"), [("vm1", KEY, True), ("vm1", KEY[::-1], False), ("vm9", KEY, False)]
)
def test_only_who_knows_the_key_gets_in(
    keys: Path, version: ssl.TLSVersion, name: str, key: str, admitted: bool
) -> None:
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_mode = ssl.CERT_NONE
    client.minimum_version = client.maximum_version = version
    client.set_ciphers("ALL:PSK")
    install = getattr(client, "set_psk_client_callback", None)
    assert install is not None
    install(lambda _hint: (name, bytes.fromhex(key)))
    server = make_context(TlsConfig(mode=TlsMode.ON, psk_file=keys))
    assert shakes_hands(client, server) is admitted


def shakes_hands(client: ssl.SSLContext, server: ssl.SSLContext) -> bool:
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(down, up), server.wrap_bio(up, down, server_side=True)]
    for _ in range(4):
        for end in list(ends):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLError:
                return False
            ends.remove(end)
    return not ends
