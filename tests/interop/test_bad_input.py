"""Bad input over a raw socket: the protocol's error or a closed connection, a log line, and nothing stored is lost."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.conftest import IMAGE_BYTES
from tests.support.nbd_client import Client, RefusedOption, RequestFailed
from tests.support.server import Nbdzram
from tests.wire import (
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    EINVAL,
    ENOSPC,
    OPT_EXPORT_NAME,
    OPT_GO,
    REP_ERR_UNKNOWN,
    name_and_infos,
    option,
)

pytestmark = pytest.mark.interop

MIB = 1 << 20
BLOCK = 4096
LOG_SECONDS = 20
KEPT = random.Random(3).randbytes(MIB)


@contextmanager
def nothing_is_lost(server: Nbdzram) -> Iterator[Client]:
    """Store something first; afterwards the first client and a new one both read it back unchanged."""
    with server.client() as witness:
        witness.write(0, KEPT)
        yield witness
        assert witness.read(0, MIB) == KEPT
        with server.client() as newcomer:
            assert newcomer.read(0, MIB) == KEPT


def complaints(log: str) -> list[str]:
    """Whole lines, the ones about clients that attach left out."""
    return [line for line in log.splitlines(keepends=True) if line.endswith("\n") and "attached to export" not in line]


@contextmanager
def one_log_line(server: Nbdzram, *words: str) -> Iterator[None]:
    """The server logs exactly one line about it, and that line names what `words` say."""
    before = len(server.log)
    yield
    server.wait_until(lambda: complaints(server.log[before:]) != [], LOG_SECONDS)
    server.stat()  # a round trip through the event loop: whatever else it wanted to say is said
    lines = complaints(server.log[before:])
    assert len(lines) == 1, lines
    for word in words:
        assert word in lines[0], lines[0]


def expect_hang_up(client: Client) -> None:
    with pytest.raises((EOFError, ConnectionResetError, BrokenPipeError)):
        client.receive(1)
    client.close()


@pytest.mark.parametrize(
    ("command", "offset", "length", "error"),
    [
        pytest.param(CMD_READ, IMAGE_BYTES, 1, EINVAL, id="read behind the end"),
        pytest.param(CMD_READ, IMAGE_BYTES - 1, 2, EINVAL, id="read across the end"),
        pytest.param(CMD_READ, 2**64 - 1, 2, EINVAL, id="read that wraps around"),
        pytest.param(CMD_WRITE, IMAGE_BYTES - 1, 2, ENOSPC, id="write across the end"),
        pytest.param(CMD_WRITE, 2**64 - BLOCK, BLOCK, ENOSPC, id="write that wraps around"),
        pytest.param(CMD_TRIM, IMAGE_BYTES, BLOCK, EINVAL, id="trim behind the end"),
        pytest.param(CMD_WRITE_ZEROES, IMAGE_BYTES, BLOCK, ENOSPC, id="zeroes behind the end"),
    ],
)
def test_a_request_outside_the_export_gets_its_error(
    server: Nbdzram, command: int, offset: int, length: int, error: int
) -> None:
    """EINVAL for reads and trims, ENOSPC for writes, as the protocol asks; and on it goes."""
    with nothing_is_lost(server) as client:
        payload = bytes(length) if command == CMD_WRITE else b""
        with pytest.raises(RequestFailed) as refusal:
            client.call(command, offset, length, payload)
        assert refusal.value.error == error


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        pytest.param(99, 0, id="unknown command"),
        pytest.param(CMD_READ, 0x8000, id="unknown flag"),
        pytest.param(CMD_READ, 1 << 1, id="NO_HOLE on a read"),
        pytest.param(CMD_FLUSH, 1 << 4, id="FAST_ZERO on a flush"),
    ],
)
def test_an_unknown_command_or_flag_is_refused_and_the_connection_goes_on(
    server: Nbdzram, command: int, flags: int
) -> None:
    """EINVAL, and the next request on the same connection is served."""
    with nothing_is_lost(server) as client:
        length = 0 if command == CMD_FLUSH else BLOCK
        with pytest.raises(RequestFailed) as refusal:
            client.call(command, 0, length, flags=flags)
        assert refusal.value.error == EINVAL


def test_misaligned_requests_are_served_exactly(server: Nbdzram) -> None:
    """Any offset and length will do: the server announces no alignment."""
    with server.client() as client:
        client.write(0, KEPT)
        client.write(4093, b"0123456789")
        assert client.read(4090, 16) == KEPT[4090:4093] + b"0123456789" + KEPT[4103:4106]


@pytest.mark.parametrize("command", [CMD_READ, CMD_WRITE])
def test_a_payload_over_the_limit_is_refused_without_being_held(server: Nbdzram, command: int) -> None:
    """A request of almost 4 GiB gets an error or a closed connection, and the server does not grow by its size."""
    with nothing_is_lost(server):
        grown_from = server.resident_bytes()
        hostile = server.client()
        hostile.send(command, 0, 2**32 - BLOCK)
        try:
            error, _ = hostile.reply()
            assert error == EINVAL or command == CMD_READ
            assert error != 0
        except (EOFError, ConnectionResetError):
            pass  # the other answer that the protocol allows
        hostile.close()
        assert server.resident_bytes() - grown_from < 64 * MIB


def test_a_bad_magic_ends_the_connection(server: Nbdzram) -> None:
    """Nothing behind a wrong magic can be trusted: hang up, say so once."""
    with nothing_is_lost(server), one_log_line(server, "magic"):
        hostile = server.client()
        hostile.socket.sendall(struct.pack(">IHHQQI", 0x12345678, 0, 0, 1, 0, BLOCK))
        expect_hang_up(hostile)


def test_an_unknown_export_is_refused_and_haggling_goes_on(server: Nbdzram) -> None:
    """NBD_OPT_GO with an unknown name gets ERR_UNKNOWN; the same connection may then ask for one that exists."""
    with nothing_is_lost(server), one_log_line(server, "nowhere"):
        client = Client(server.unix_path, None)
        with pytest.raises(RefusedOption) as refusal:
            client.go("nowhere")
        assert refusal.value.reply == REP_ERR_UNKNOWN
        client.go("disk")
        assert client.read(0, BLOCK) == KEPT[:BLOCK]
        with client:
            pass


def test_an_unknown_export_by_the_old_option_ends_the_connection(server: Nbdzram) -> None:
    """NBD_OPT_EXPORT_NAME has no error reply: hang up, say so once."""
    with nothing_is_lost(server), one_log_line(server, "nowhere"):
        client = Client(server.unix_path, None)
        client.send_option(OPT_EXPORT_NAME, b"nowhere")
        expect_hang_up(client)


@pytest.mark.parametrize("kept_bytes", [4, 12, 16, 20])
def test_a_truncated_handshake_costs_one_connection(server: Nbdzram, kept_bytes: int) -> None:
    """A client that hangs up in the middle of an option is noted once, and the next one is served."""
    with nothing_is_lost(server), one_log_line(server, "handshake"):
        client = Client(server.unix_path, None)
        client.socket.sendall(option(OPT_GO, name_and_infos(b"disk"))[:kept_bytes])
        client.close()


def test_a_client_that_vanishes_in_the_middle_of_a_write_leaves_whole_blocks(server: Nbdzram) -> None:
    """Each block that the broken write meant has its old or its new content, none a mixture."""
    half = 300_000  # not a multiple of anything
    fresh = random.Random(4).randbytes(MIB)
    with nothing_is_lost(server) as witness, one_log_line(server):
        witness.write(MIB, KEPT)
        client = server.client()
        client.send(CMD_WRITE, MIB, MIB)
        client.socket.sendall(fresh[:half])
        client.close()
    with server.client() as witness:
        found = witness.read(MIB, MIB)
    for at in range(0, MIB, BLOCK):
        assert found[at : at + BLOCK] in {KEPT[at : at + BLOCK], fresh[at : at + BLOCK]}, f"block at {at}"
