"""Who gets in under TLS, and who does not: haggling on real sockets, certificates, deadlines, files."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import resource
import shutil
import ssl
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nbdzram.config import Access, Limits, TlsConfig, TlsMode
from nbdzram.errors import ConfigError
from nbdzram.nbd.constants import Reply
from nbdzram.server import tls
from nbdzram.server.attached import Attached
from nbdzram.server.connection import Connection
from nbdzram.server.exports import Export
from nbdzram.server.tls import TlsFiles
from nbdzram.server.tls_transport import TlsTransport
from nbdzram.sessions.tls import TlsLine
from nbdzram.sessions.tls_context import TlsContext
from tests.support.loop_client import WireClient
from tests.support.pki import Pki
from tests.support.tls_client import GO_DISK, attach, by_hand, leave, start_tls
from tests.unit.server.conftest import Play, Secure, Stage
from tests.wire import name_and_infos, option, request

READ, WRITE = 0, 1
STARTTLS, LIST, GO, STRUCTURED_REPLY, ABORT = 5, 3, 7, 8, 2


def test_starttls_resets_what_was_settled_in_the_clear(play: Play, secure: Secure, pki: Pki) -> None:
    """Structured replies agreed on before TLS are not sent after it."""
    secure()

    async def story(stage: Stage) -> None:
        client = await WireClient.connect(stage.path)
        assert (await client.option(STRUCTURED_REPLY))[-1].kind == Reply.ACK
        await start_tls(client, pki.client_context())
        await client.go(b"disk", style=0)
        client.ask(READ, 0, 512)
        assert (await client.reader.readexactly(4)).hex() == "67446698"
        await leave(client)

    play(story)


def test_an_option_in_the_clear_behind_starttls_is_never_executed(play: Play, secure: Secure) -> None:
    """An attacker in the middle adds GO to the client's STARTTLS: the connection ends with a TLS alert, unanswered."""
    secure()

    async def story(stage: Stage) -> None:
        client = await WireClient.connect(stage.path)
        client.send(option(STARTTLS) + GO_DISK + request(WRITE, 0, 512) + bytes(512))
        received = await client.reader.read()
        assert received[20:21] in (b"", b"\x15"), "something else than an alert"
        assert stage.server.handshake_failures["tls"] == 1
        assert not stage.disk.connections
        await leave(client)

    play(story)


def test_a_server_that_requires_tls_serves_nothing_without(play: Play, secure: Secure, pki: Pki) -> None:
    """Every option but ABORT gets TLS_REQD, and never again once TLS runs."""
    secure(mode=TlsMode.REQUIRE)

    async def story(stage: Stage) -> None:
        client = await WireClient.connect(stage.path)
        for number in (LIST, GO, STRUCTURED_REPLY, 99):
            assert (await client.option(number, b""))[-1].kind == Reply.ERR_TLS_REQD
        await start_tls(client, pki.client_context())
        assert (await client.option(LIST))[-1].kind == Reply.ACK
        assert (await client.option(99))[-1].kind == Reply.ERR_UNSUP
        assert (await client.option(STARTTLS))[-1].kind == Reply.ERR_INVALID
        assert (await client.option(ABORT))[-1].kind == Reply.ACK
        await leave(client)

    play(story)


def test_a_client_without_a_certificate_is_turned_away_where_one_is_asked_for(
    play: Play, secure: Secure, pki: Pki, caplog: pytest.LogCaptureFixture
) -> None:
    secure(client_ca=pki.authority)

    async def story(stage: Stage) -> None:
        hand = await by_hand(stage.path, pki.client_context())
        with pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"):  # TLS 1.3 tells it after the handshake
            await hand.read(1)
        assert stage.server.handshake_failures["tls"] == 1
        await leave(hand.client)
        friend = await attach(stage.path, pki.client_context("vm1.example"))
        assert await friend.read(0, 512) == bytes(512)
        await leave(friend)

    with caplog.at_level(logging.INFO):
        play(story)
    (told,) = (record.getMessage() for record in caplog.records if record.name == "nbdzram.attached")
    assert told.endswith("attached to export 'disk' with the certificate of vm1.example")


def test_a_certificate_of_another_authority_is_turned_away(
    play: Play, secure: Secure, pki: Pki, tmp_path: Path
) -> None:
    secure(client_ca=pki.authority)
    stranger = Pki(tmp_path / "stranger", authority="somebody else")

    async def story(stage: Stage) -> None:
        context = pki.client_context()
        context.load_cert_chain(*stranger.issue("vm1.example", file="vm1"))
        hand = await by_hand(stage.path, context)
        with pytest.raises(ssl.SSLError, match=r"UNKNOWN_CA|DECRYPT_ERROR|alert"):
            await hand.read(1)
        await leave(hand.client)

    play(story)


def test_an_export_for_one_certificate_does_not_exist_for_others(play: Play, secure: Secure, pki: Pki) -> None:
    secure(client_ca=pki.authority)

    async def story(stage: Stage) -> None:
        disk = stage.disk.disk
        stage.exports.add(
            Export(
                name="inner",
                disk=disk,
                pool_name="default",
                access=Access(certificates=("vm1.example",)),
                read_only=False,
            )
        )
        friend = await attach(stage.path, pki.client_context("vm1.example"), b"inner")
        await leave(friend)
        other = await WireClient.connect(stage.path)
        await start_tls(other, pki.client_context("vm2.example"))
        assert (await other.option(GO, name_and_infos(b"inner")))[-1].kind == Reply.ERR_UNKNOWN
        assert all(b"inner" not in reply.data for reply in await other.option(LIST))
        await leave(other)
        clear = await WireClient.connect(stage.path)
        assert (await clear.option(GO, name_and_infos(b"inner")))[-1].kind == Reply.ERR_UNKNOWN
        await leave(clear)

    play(story)


def test_a_renewed_certificate_counts_from_the_next_connection_on(
    play: Play, stage: Stage, pki: Pki, tmp_path: Path
) -> None:
    """Attached clients stay; a renewal that cannot be used changes nothing; nothing is restarted."""
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"

    def put(name: str) -> None:
        for source, target in zip(pki.issue(name, file="renewed"), (certificate, key), strict=True):
            source.replace(target)

    put("localhost")
    stage.config = replace(stage.config, tls=TlsConfig(mode=TlsMode.ON, certificate=certificate, key=key))

    async def served_name(stage: Stage) -> object:
        client = await WireClient.connect(stage.path)
        context = pki.client_context()
        context.check_hostname = False
        await start_tls(client, context)
        peer = client.writer.get_extra_info("ssl_object").getpeercert()
        await leave(client)
        return peer["subject"][0][0][1]

    async def story(stage: Stage) -> None:
        attached = await attach(stage.path, pki.client_context())
        assert await served_name(stage) == "localhost"
        put("renewed.example")
        assert await served_name(stage) == "renewed.example"
        certificate.write_text("no certificate")
        assert await served_name(stage) == "renewed.example"
        certificate.unlink()
        assert await served_name(stage) == "renewed.example"
        assert await attached.read(0, 512) == bytes(512)
        await leave(attached)

    play(story)


def test_clients_under_tls_have_threads_as_others_have(play: Play, secure: Secure, pki: Pki, stage: Stage) -> None:
    """The next one goes to the thread with the fewest, whatever is on the wire."""
    secure()
    stage.config = replace(stage.config, threads=2)

    async def story(stage: Stage) -> None:
        clients = [await attach(stage.path, pki.client_context()), await stage.client()]
        assert [(thread.number, thread.clients) for thread in stage.server.threads()] == [(1, 1), (2, 1)]
        for client in clients:
            assert await client.read(0, 512) == bytes(512)
            await leave(client)

    play(story)


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01\x02\x00\x01"])
def test_silence_in_the_tls_handshake_ends_at_the_deadline(play: Play, secure: Secure, sent: bytes) -> None:
    """Nothing at all, or the first bytes of a ClientHello."""
    secure()

    async def story(stage: Stage) -> None:
        client = await WireClient.connect(stage.path)
        assert (await client.option(STARTTLS))[-1].kind == Reply.ACK
        client.send(sent)
        assert await client.at_end()
        assert stage.server.handshake_failures["timeout"] == 1
        await leave(client)

    play(story, Limits(handshake_seconds=0.05))


def test_silence_behind_the_tls_handshake_ends_at_the_deadline(play: Play, secure: Secure, pki: Pki) -> None:
    secure()

    async def story(stage: Stage) -> None:
        hand = await by_hand(stage.path, pki.client_context())
        with pytest.raises(ssl.SSLError):
            await hand.read(1)
        assert stage.server.handshake_failures["timeout"] == 1
        await leave(hand.client)

    play(story, Limits(handshake_seconds=0.2))


@pytest.mark.parametrize("stands", [False, True], ids=["at once", "when it stands"])
def test_no_tls_at_all_behind_starttls_is_a_counted_failure(play: Play, secure: Secure, pki: Pki, stands: bool) -> None:
    """And the end: no deadline has to come for that."""
    secure()

    async def story(stage: Stage) -> None:
        if stands:
            client = (await by_hand(stage.path, pki.client_context())).client
        else:
            client = await WireClient.connect(stage.path)
            assert (await client.option(STARTTLS))[-1].kind == Reply.ACK
        client.send(b"GET / HTTP/1.1\r\n\r\n")
        async with asyncio.timeout(20):
            await client.reader.read()
        assert stage.server.handshake_failures["tls"] == 1
        await leave(client)

    play(story, Limits(handshake_seconds=10**6))


def test_a_connection_that_ended_leaves_nothing_to_the_garbage_collector(play: Play, secure: Secure, pki: Pki) -> None:
    """They hold each other; if they stayed until the collector comes, a crowd would cost megabytes."""
    secure()

    async def story(stage: Stage) -> None:
        other = await attach(stage.path, pki.client_context())
        for _ in range(3):
            client = await attach(stage.path, pki.client_context())
            assert await client.read(0, 512) == bytes(512)
            await leave(client)
            stranger = await WireClient.connect(stage.path)
            assert (await stranger.option(STARTTLS))[-1].kind == Reply.ACK
            stranger.send(b"GET / HTTP/1.1\r\n\r\n")
            await stranger.reader.read()
            await leave(stranger)
        kinds = (Connection, Attached, TlsTransport, TlsLine)

        def kept() -> list[str]:
            return sorted(type(thing).__name__ for thing in gc.get_objects() if isinstance(thing, kinds))

        while kept() != ["Attached", "TlsLine"]:  # what ends after its connection
            assert await other.read(0, 512) == bytes(512)
        await leave(other)

    gc.collect()
    gc.disable()
    try:
        play(story)
    finally:
        gc.enable()


def test_a_peer_that_sends_on_and_on_before_tls_stands_is_cut(
    play: Play, secure: Secure, caplog: pytest.LogCaptureFixture
) -> None:
    """A ClientHello of nearly the length that OpenSSL takes, most of it in records of one byte."""
    secure()

    async def story(stage: Stage) -> None:
        client = await WireClient.connect(stage.path)
        assert (await client.option(STARTTLS))[-1].kind == Reply.ACK
        hello = b"\x01\x01\xff\xf0\x03\x03" + bytes(1 << 16)
        pieces = (hello[:64], *(bytes([byte]) for byte in hello[64:]))
        with contextlib.suppress(OSError):
            client.send(b"".join(b"\x16\x03\x01" + len(piece).to_bytes(2) + piece for piece in pieces))
            await client.reader.read()
        assert stage.server.handshake_failures["tls"] == 1
        assert "before TLS stands" in caplog.text
        await leave(client)

    play(story)


def with_file(config: TlsConfig, key: str, path: Path) -> TlsConfig:
    changed: dict[str, Any] = {key: path}
    return replace(config, **changed)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"certificate": "junk"}, "not PEM, or the two exchanged; name"),
        ({"key": "junk"}, "(not PEM, or the two exchanged|the key is none that OpenSSL can read); name"),
        ({"certificate": "key", "key": "certificate"}, "not PEM, or the two exchanged; name"),
        ({"key": "other"}, "the key is not that of the certificate; name"),
        ({"client_ca": "junk"}, "no certificate or crl found; name"),
        ({"key": "directory"}, "is no regular file; put what is to be read into one"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_sentence(
    pki: Pki, certificate: tuple[Path, Path], tmp_path: Path, wrong: dict[str, str], said: str
) -> None:
    (tmp_path / "junk.pem").write_text("junk")
    paths = {"certificate": certificate[0], "key": certificate[1], "junk": tmp_path / "junk.pem", "directory": tmp_path}
    paths["other"] = pki.issue("other", file="other")[1]
    config = TlsConfig(mode=TlsMode.ON, certificate=certificate[0], key=certificate[1])
    for key, which in wrong.items():
        config = with_file(config, key, paths[which])
    with pytest.raises(ConfigError, match=said):
        TlsFiles(config)


@pytest.mark.parametrize("wrong", ["certificate", "key", "client_ca"])
def test_a_file_that_cannot_be_used_is_named(certificate: tuple[Path, Path], tmp_path: Path, wrong: str) -> None:
    junk = tmp_path / "junk.pem"
    junk.write_text("junk")
    config = TlsConfig(mode=TlsMode.ON, certificate=certificate[0], key=certificate[1])
    with pytest.raises(ConfigError, match=r"junk\.pem"):
        TlsFiles(with_file(config, wrong, junk))
    with pytest.raises(ConfigError, match=r"missing\.pem"):
        TlsFiles(with_file(config, wrong, tmp_path / "missing.pem"))


def with_one_named(certificate: tuple[Path, Path], directory: Path, which: str) -> tuple[Path, TlsFiles]:
    """All four files, that one of them as a copy of its own, which is what comes first."""
    good = {"certificate": certificate[0], "key": certificate[1], "client_ca": certificate[0]}
    good["psk_file"] = directory / "keys"
    good["psk_file"].write_text(f"client:{'ab' * 16}\n")
    good["psk_file"].chmod(0o600)
    named = directory / "named"
    shutil.copy(good[which], named)
    return named, TlsFiles(TlsConfig(mode=TlsMode.ON, **(good | {which: named})))


@pytest.mark.parametrize("wrong", ["certificate", "key", "client_ca", "psk_file"])
def test_a_file_that_keeps_its_reader_waiting_is_not_opened(
    certificate: tuple[Path, Path], tmp_path: Path, wrong: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A pipe that nobody writes, in place of what was there, say: whoever opened it would stand, and the loop too."""
    named, files = with_one_named(certificate, tmp_path, wrong)
    in_use = files.context()
    named.unlink()
    os.mkfifo(named)
    descriptor = os.open(
        named, os.O_RDWR
    )  # whoever opens it all the same waits for no writer, and finds no certificate
    files.renew(unchanged_too=True)
    os.close(descriptor)
    assert f"{named} is no regular file" in caplog.text
    assert files.context() is in_use


def written_again(path: Path) -> None:
    """In place, as long, and of the same age (as by rsync)."""
    found = path.stat()
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def put_in_place(path: Path) -> None:
    """Another file of the same age."""
    fresh = path.with_name("fresh")
    shutil.copy2(path, fresh)
    fresh.replace(path)


@pytest.mark.parametrize("change", [written_again, put_in_place, Path.touch], ids=lambda change: change.__name__)
@pytest.mark.parametrize("which", ["certificate", "key", "client_ca", "psk_file"])
def test_whichever_file_changed_and_however_it_counts_from_the_next_connection_on(
    certificate: tuple[Path, Path], tmp_path: Path, which: str, change: Callable[[Path], None]
) -> None:
    named, files = with_one_named(certificate, tmp_path, which)
    in_use = files.context()
    assert files.context() is in_use
    probe = tmp_path / "probe"
    while not probe.exists() or probe.stat().st_ctime_ns == named.stat().st_ctime_ns:
        probe.touch()  # until the clock that stamps files has gone on
    change(named)
    assert files.context() is not in_use


def test_a_key_that_goes_while_files_are_read_again_changes_nothing(
    certificate: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It was looked at once more, for who may read it, when the new certificate was in use already: the log said that
    the old ones are kept."""
    named = tmp_path / "key"
    shutil.copy(certificate[1], named)
    files = TlsFiles(TlsConfig(mode=TlsMode.ON, certificate=certificate[0], key=named))
    in_use = files.context()
    make = tls.make_context

    def make_as_the_key_goes(config: TlsConfig) -> TlsContext:
        made = make(config)
        named.unlink()
        return made

    monkeypatch.setattr(tls, "make_context", make_as_the_key_goes)
    files.renew(unchanged_too=True)
    assert "keeping the old ones" in caplog.text
    assert files.context() is in_use


def test_a_file_that_changed_twice_in_one_moment_of_its_clock_is_read_twice(
    certificate: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of it was there at first. File systems tell when by the tick, and some by the second."""
    key, now = tmp_path / "key", time.time_ns()
    shutil.copy(certificate[1], key)
    whole = key.read_bytes()
    files = TlsFiles(TlsConfig(mode=TlsMode.ON, certificate=certificate[0], key=key))
    look = tls._stat

    def look_by_a_coarse_clock(path: Path) -> SimpleNamespace:
        return SimpleNamespace(st_mode=look(path).st_mode, st_mtime_ns=now, st_ctime_ns=now, st_ino=1, st_size=1)

    monkeypatch.setattr(tls, "_stat", look_by_a_coarse_clock)
    monkeypatch.setattr(tls, "SETTLED_SECONDS", 10**6)
    for content, usable in ((whole[:-200], False), (whole, True)):
        key.write_bytes(content)
        files.renew()
        assert files.usable is usable


@pytest.mark.parametrize("which", ["certificate", "key", "client_ca", "psk_file"])
def test_files_that_changed_while_no_descriptor_was_left_count_as_soon_as_there_is_one(
    certificate: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    """They were taken for files that cannot be used, and not looked at again before they changed once more."""
    monkeypatch.setattr(tls, "SETTLED_SECONDS", 0)
    named, files = with_one_named(certificate, tmp_path, which)
    in_use = files.context()
    put_in_place(named)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        assert files.context() is in_use
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert not files.usable
    assert files.context() is not in_use
    assert files.usable
