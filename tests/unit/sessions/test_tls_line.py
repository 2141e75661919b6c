"""The server's end of TLS over a socket pair: records, turns, ends, and whom a certificate names."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest

from nbdzram.errors import PassPhraseWanted, TlsError
from nbdzram.ready import readable
from nbdzram.sessions.tls import MOST_BARREN_RECORDS, TlsLine
from nbdzram.sessions.tls_context import TlsContext
from tests.support.openssl import TLS_1_2, OpenSslClient
from tests.support.pki import Pki
from tests.support.programs import require_program, run
from tests.support.tls_client import pattern
from tests.support.tls_pair import RECORD, Pair

T = TypeVar("T")
MIB = 1 << 20
LEAST_OF_OPENSSL = 4 << 10  # bytes of a connection, however idle
UORDBLKS = 7  # of mallinfo(3): bytes in use


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def certificate(pki: Pki) -> tuple[Path, Path]:
    return pki.issue("localhost", file="server")


@pytest.fixture
def context(certificate: tuple[Path, Path]) -> TlsContext:
    made = TlsContext()
    made.use_certificate(*map(bytes, certificate))
    return made


@pytest.fixture
def pair(context: TlsContext, pki: Pki) -> Iterator[Pair]:
    made = Pair(context, pki.client_context())
    made.shake_hands()
    yield made
    made.close()


def take(line: TlsLine, size: int = RECORD) -> bytes | None:
    buffer = bytearray(size)
    count = line.receive(buffer)
    return None if count is None else bytes(buffer[:count])


def holds_more(line: TlsLine) -> bool:
    return line.holds_more


SUITES = """
import sys
from pathlib import Path
from nbdzram.sessions.tls_context import TlsContext
from tests.support.pki import Pki
from tests.support.tls_pair import Pair
pki = Pki(Path(sys.argv[1]))
context = TlsContext()
context.use_certificate(*map(bytes, pki.issue("localhost", file="server")))
pair = Pair(context, pki.client_context())
pair.shake_hands()
print(pair.tls.cipher()[0])
"""
"""The suite of TLS 1.3 that is agreed on, in a process that may have its own configuration of OpenSSL."""


@pytest.mark.parametrize(
    ("allowed", "agreed"),
    [
        (None, "TLS_AES_128_GCM_SHA256"),
        ("TLS_AES_256_GCM_SHA384:TLS_AES_128_GCM_SHA256", "TLS_AES_128_GCM_SHA256"),
        ("TLS_CHACHA20_POLY1305_SHA256:TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"),
    ],
)
def test_the_suite_with_the_fewest_rounds_is_preferred_where_the_system_allows_it(
    allowed: str | None, agreed: str, tmp_path: Path
) -> None:
    configuration = tmp_path / "openssl.cnf"
    lines = ["openssl_conf = a", "[a]", "ssl_conf = b", "[b]", "system_default = c", "[c]"]
    configuration.write_text("\n".join([*lines, *([f"Ciphersuites = {allowed}"] if allowed else [])]) + "\n")
    environment = os.environ | {"OPENSSL_CONF": str(configuration)}
    assert run([sys.executable, "-c", SUITES, tmp_path / "pki"], environment=environment).strip() == agreed


@pytest.mark.parametrize("size", [1, RECORD, RECORD + 1, MIB])
def test_bytes_come_through_in_both_ways(pair: Pair, size: int) -> None:
    content, taken, got = pattern(size + 8)[:size], bytearray(), bytearray()
    for at in range(0, size, 5 * RECORD):
        pair.send(content[at : at + RECORD], *(content[at + n * RECORD : at + (n + 1) * RECORD] for n in range(1, 5)))
        while (part := take(pair.line, 100_000)) is not None:
            taken += part
    assert taken == content
    left = memoryview(content)
    while left:
        left = left[pair.line.send(left) :]
        got += pair.receive()
    assert got == content


def test_a_record_that_the_socket_does_not_take_whole_is_offered_again(pair: Pair) -> None:
    """The peer does not read: what OpenSSL has of a record and could not send is no byte that was taken. The last one
    is shorter than those before it."""
    content, got = pattern(4 * MIB + 8)[:-7], b""
    given = pair.line.send(content)
    assert 0 < given < len(content)
    assert pair.line.send(content[given:]) == 0
    while given < len(content):
        got += pair.receive()
        given += pair.line.send(content[given:])
    assert got + pair.receive() == content


def test_a_turn_ends_though_tiny_records_go_on(pair: Pair) -> None:
    """Each is work: one turn takes a few hundred of them, and says that there are more."""
    pair.send(*[b"x"] * 3000)
    turns: list[int] = []
    while sum(turns) < 3000:
        taken = take(pair.line)
        assert taken
        turns.append(len(taken))
    assert max(turns) <= 256
    assert not holds_more(pair.line)


def test_what_is_held_of_a_record_is_told_of(pair: Pair) -> None:
    """The poller saw all of it go: who asked for less must ask again."""
    pair.send(b"a" * 100, b"b" * 100)
    assert take(pair.line, 60) == b"a" * 60
    assert holds_more(pair.line)
    assert take(pair.line, 60) == b"a" * 40 + b"b" * 20
    assert holds_more(pair.line)
    assert take(pair.line, 200) == b"b" * 80
    assert not holds_more(pair.line)
    assert take(pair.line) is None


def test_what_came_with_a_record_is_told_of(pair: Pair) -> None:
    """Small records come many at once: the socket is empty, and most of them are not decrypted yet."""
    pair.send(*[b"x"] * 50)
    assert take(pair.line, 10) == b"x" * 10
    assert holds_more(pair.line)
    assert take(pair.line, 100) == b"x" * 40
    assert not holds_more(pair.line)


def test_what_came_before_tls_began_is_part_of_it(context: TlsContext, pki: Pki) -> None:
    pair = Pair(context, pki.client_context(), hurried=True)
    pair.shake_hands()
    pair.send(b"behind")
    assert take(pair.line) == b"behind"
    pair.close()


def test_the_end_comes_behind_the_last_bytes(pair: Pair) -> None:
    """close_notify lies in the same bytes, and the socket has nothing more to tell."""
    pair.send(b"last")
    with contextlib.suppress(ssl.SSLWantReadError):
        pair.tls.unwrap()
    pair.flush()
    assert take(pair.line) == b"last"
    assert holds_more(pair.line)
    assert take(pair.line) == b""


def test_a_peer_that_sends_no_more_still_gets_what_it_asked_for(pair: Pair) -> None:
    """End of file without close_notify, and the same in the middle of a record."""
    pair.send(b"question")
    pair.socket.shutdown(socket.SHUT_WR)
    assert take(pair.line) == b"question"
    assert take(pair.line) == b""
    assert pair.line.send(b"answer") == 6
    assert pair.receive() == b"answer"


def test_goodbye_waits_for_room_and_is_close_notify(pair: Pair) -> None:
    """Where the last reply has filled the socket to its last byte; other bytes do so here."""
    filled = 0
    with socket.socket(fileno=os.dup(pair.line.fileno())) as same, contextlib.suppress(BlockingIOError):
        while True:
            filled += same.send(bytes(RECORD), socket.MSG_DONTWAIT)
    assert not pair.line.say_goodbye()
    while filled:
        filled -= len(pair.socket.recv(filled))
    assert pair.line.say_goodbye()
    pair.fetch()
    assert pair.tls.read(1) == b""


def test_a_broken_record_is_an_error_and_tells_the_peer_why(pair: Pair) -> None:
    pair.socket.sendall(pair.forge(100))
    with pytest.raises(TlsError, match="bad"):
        take(pair.line)
    pair.fetch()
    with pytest.raises(ssl.SSLError, match="ALERT"):
        pair.tls.read(1)


def test_writing_to_a_peer_that_is_gone_is_an_error_and_no_signal(pair: Pair) -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGPIPE, lambda number, _: came.append(number))
    try:
        pair.socket.close()
        with pytest.raises(OSError, match="Broken pipe"):
            while pair.line.send(b"x" * RECORD):
                pass
        assert not came
    finally:
        signal.signal(signal.SIGPIPE, before)


def test_a_socket_is_closed_once_with_its_line(context: TlsContext) -> None:
    for orderly in (True, False):
        ours, theirs = socket.socketpair()
        line = TlsLine(ours.detach(), context, b"")
        line.close(orderly=orderly)
        assert line.fileno() == -1
        assert theirs.recv(1) == b""
        theirs.close()
    ours, theirs = socket.socketpair()
    line = TlsLine(ours.detach(), context, b"")
    del line
    assert theirs.recv(1) == b""
    theirs.close()


def test_a_line_that_hung_up_holds_nothing(context: TlsContext) -> None:
    """Its object lives until the event loop has heard of its end; what OpenSSL has of it does not."""
    lines = [TlsLine(socket.socket().detach(), context, b"") for _ in range(300)]
    held = allocated_bytes()
    if not held:
        pytest.skip("the C library's allocator is not in use: a sanitizer's is")
    for line in lines:
        line.close(orderly=False)
    assert held - allocated_bytes() > 300 * LEAST_OF_OPENSSL


class _MallInfo(ctypes.Structure):
    _fields_ = [("words", ctypes.c_size_t * 10)]


def allocated_bytes() -> int:
    library = ctypes.CDLL(None)
    library.mallinfo2.restype = _MallInfo
    return int(library.mallinfo2().words[UORDBLKS])


def with_openssl(line: TlsLine, connected: socket.socket, act: Callable[[OpenSslClient], T], **options: object) -> T:
    """Shake hands with a client of another thread, and then let it do something."""

    def play() -> T:
        return act(OpenSslClient(connected, **options))  # type: ignore[arg-type]

    with ThreadPoolExecutor(1) as pool:
        acting = pool.submit(play)
        with contextlib.suppress(TlsError, EOFError, OSError):
            while not line.handshake():
                readable(line.fileno())
        if acting.done() and acting.exception():
            line.close(orderly=True)
        return acting.result()


def test_key_updates_are_charged_and_too_many_are_too_many(context: TlsContext) -> None:
    """None of them gives data; each turn takes a few, and there is an end to it."""
    ours, theirs = socket.socketpair()
    line = TlsLine(ours.detach(), context, b"")
    with_openssl(line, theirs, lambda client: theirs.sendall(b"".join(client.key_update() for _ in range(200))))
    assert take(line) is None
    assert holds_more(line)
    with pytest.raises(TlsError, match=f"at most {MOST_BARREN_RECORDS}"):
        for _ in range(4):
            take(line)
    theirs.close()


def test_a_byte_between_key_updates_is_no_excuse(context: TlsContext) -> None:
    ours, theirs = socket.socketpair()
    line = TlsLine(ours.detach(), context, b"")
    client = with_openssl(line, theirs, lambda client: client)
    with pytest.raises(TlsError, match=f"at most {MOST_BARREN_RECORDS}"):
        for _ in range(3 * MOST_BARREN_RECORDS):
            theirs.sendall(client.key_update() + client.encrypt(b"x"))
            while take(line) is None:
                assert holds_more(line)
    theirs.close()


def test_data_between_them_lets_keys_be_updated_for_ever(context: TlsContext) -> None:
    ours, theirs = socket.socketpair()
    line = TlsLine(ours.detach(), context, b"")
    client = with_openssl(line, theirs, lambda client: client)
    for _ in range(3 * MOST_BARREN_RECORDS):
        theirs.sendall(client.key_update() + client.encrypt(b"x" * RECORD))
        while take(line, 2 * RECORD) is None:
            assert holds_more(line)
    theirs.close()


def test_another_handshake_is_refused_with_an_alert(context: TlsContext) -> None:
    """A client could make us compute them for ever; TLS 1.3 has none."""
    ours, theirs = socket.socketpair()
    line = TlsLine(ours.detach(), context, b"")
    client = with_openssl(line, theirs, lambda client: client, newest=TLS_1_2)
    theirs.sendall(client.renegotiate())
    assert take(line) is None
    assert theirs.recv(1 << 16)[:1] == b"\x15"
    assert line.send(b"still served") == 12
    theirs.close()


@pytest.mark.parametrize("newest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_no_session_is_ever_resumed(context: TlsContext, pki: Pki, newest: ssl.TLSVersion) -> None:
    """What a ticket gives back would be one more thing to renew with the certificates."""
    trust = pki.client_context()
    trust.maximum_version = newest
    pair = Pair(context, trust)
    pair.shake_hands()
    pair.line.send(b"x")
    assert pair.receive() == b"x"
    assert pair.tls.session is not None
    assert not pair.tls.session.has_ticket
    if newest is ssl.TLSVersion.TLSv1_2:
        assert pair.tls.session.id == b""
    pair.close()


def test_nothing_older_than_tls_1_2_is_spoken(context: TlsContext) -> None:
    ours, theirs = socket.socketpair()
    line = TlsLine(ours.detach(), context, b"")
    with pytest.raises(ConnectionError):
        with_openssl(line, theirs, lambda client: client, newest=TLS_1_2 - 1)
    theirs.close()


def test_a_certificates_common_and_dns_names_count_and_others_do_not(
    context: TlsContext, pki: Pki, certificate: tuple[Path, Path]
) -> None:
    trust = pki.client_context()
    others = "DNS:vm1.example,DNS:*.vm1.example,IP:192.0.2.1,URI:nbd://x,email:x@example.org"
    trust.load_cert_chain(*pki.issue("vm1", file="several", alternatives=others))
    pair = Pair(context, trust)
    pair.shake_hands()
    assert pair.line.names() == frozenset()  # nobody asked for it
    pair.close()
    asking = TlsContext()
    asking.use_certificate(*map(bytes, certificate))
    asking.require_certificates(bytes(pki.authority))
    pair = Pair(asking, trust)
    pair.shake_hands()
    assert pair.line.names() == {"vm1", "vm1.example", "*.vm1.example"}
    pair.close()


def test_nobody_is_asked_for_a_pass_phrase(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    locked = tmp_path / "locked.pem"
    openssl = require_program("openssl", package="openssl")
    run([openssl, "pkey", "-in", certificate[1], "-aes256", "-passout", "pass:x", "-out", locked])
    with pytest.raises(PassPhraseWanted):
        TlsContext().use_certificate(bytes(certificate[0]), bytes(locked))


def test_connections_keep_the_context_that_they_began_with(certificate: tuple[Path, Path], pki: Pki) -> None:
    made = TlsContext()
    made.use_certificate(*map(bytes, certificate))
    pair = Pair(made, pki.client_context())
    del made
    pair.shake_hands()
    pair.send(b"still")
    assert take(pair.line) == b"still"
    pair.close()


def test_a_process_has_one_openssl() -> None:
    """It is that of Python's ssl: two in one process would be two to keep up to date, and to hold."""
    TlsContext()
    with Path("/proc/self/maps").open(encoding="ascii") as maps:
        found = {os.path.realpath(line.split()[-1]) for line in maps if "/libssl" in line}
    assert len(found) == 1


@pytest.mark.parametrize("libraries", ["[]", "[b'libnowhere.so.3']", "[b'libc.so.6']"])
def test_without_openssl_the_error_says_what_is_missing(libraries: str) -> None:
    code = (
        "import nbdzram.sessions.openssl as found\n"
        f"found._libraries = lambda: {libraries}\n"
        "try: found.load()\n"
        "except found.TlsUnavailable as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    missing = "TLS_server_method" if "libc" in libraries else "libssl"
    assert said.startswith(f"TLS needs OpenSSL 1.1.1 or newer: {missing} is neither in")
    assert "serve without TLS" in said


def test_the_systems_openssl_is_found_where_python_has_none(tmp_path: Path) -> None:
    """A Python that was built without ssl, or with one that hides its functions."""
    (tmp_path / "_ssl.py").write_text("raise ImportError('this Python has no ssl')")
    code = "from nbdzram.sessions.tls_context import TlsContext; TlsContext(); print('made')"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == "made\n", done.stderr
