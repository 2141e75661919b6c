"""Clients that send what costs them nothing, as fast as they can, and take no reply.

A request of 28 bytes may be work: a sentence, a table walk, a block decoded and encoded again. Whoever sends thousands
at once has its turn, then everybody else has theirs (hotpath, `cost`), and nothing is left behind when it hangs up.
"""

from __future__ import annotations

import resource

import pytest

from tests.faults.crowd import KIB, MIB, STORED, Crowd, Watch, expect_others_are_served
from tests.support.nbd_client import Client, open_socket
from tests.support.server import Nbdzram
from tests.wire import (
    CMD_BLOCK_STATUS,
    CMD_CACHE,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    OPT_SET_META_CONTEXT,
    OPT_STRUCTURED_REPLY,
    REP_ACK,
    name_and_queries,
    request,
)

SPECKLED = 512 * MIB
"""Where a disk has every second block of 64 MiB stored: an extent a block is the most that can be told of it."""


@pytest.mark.parametrize(
    "storm",
    [
        pytest.param(request(CMD_FLUSH, 0, 0), id="flush"),
        pytest.param(request(CMD_CACHE, 0, 1 << 30), id="cache"),
        pytest.param(request(CMD_READ, 1 << 62, 1), id="refused"),
        pytest.param(request(CMD_READ, 0, 0), id="nothing"),
        pytest.param(request(CMD_READ, 5, 1), id="byte-read"),
        pytest.param(request(CMD_WRITE, 800 * MIB, 1) + b"x", id="byte-written"),
        pytest.param(request(CMD_WRITE_ZEROES, 800 * MIB + 1, MIB - 2), id="zeroed"),
        pytest.param(request(CMD_TRIM, 0, 0) * 3 + request(99, 0, 1 << 31), id="unknown"),
    ],
)
def test_a_storm_of_cheap_requests_that_nobody_reads(target: Nbdzram, crowd: Crowd, storm: bytes) -> None:
    """50 clients pipeline the same request 100,000 times, or as often as the server takes it: it stops in time."""
    watch = Watch(target)
    crowd.attach(target, 50)
    crowd.press([[storm * 5000] * 20] * 50)
    expect_others_are_served(target)
    watch.expect_modest()
    crowd.disperse()
    watch.expect_recovered()
    target.stop()


@pytest.mark.parametrize("length", [256 * KIB, 64 * MIB], ids=["on-the-loop", "in-a-thread"])
def test_a_storm_of_block_status_that_nobody_reads(target: Nbdzram, crowd: Crowd, length: int) -> None:
    """50 clients ask 500 times for as many extents as there can be, hang up, and the server ends at once."""
    with target.client() as client:
        for block in range(0, 64 * MIB, 8192):
            client.write(SPECKLED + block, STORED[:4096])
    watch = Watch(target)
    for _ in range(50):
        client = Client(target.unix_path, None)
        queries = name_and_queries(b"disk", b"base:allocation", b"nbdzram:fold")
        for number, content in ((OPT_STRUCTURED_REPLY, b""), (OPT_SET_META_CONTEXT, queries)):
            client.send_option(number, content)
            while client.option_reply(number)[0] != REP_ACK:
                pass
        client.go("disk")
        crowd.members.append(client.socket)
    crowd.press([[request(CMD_BLOCK_STATUS, SPECKLED, length) * 500]] * 50)
    expect_others_are_served(target)
    watch.expect_modest()
    crowd.disperse()
    target.stop()  # while threads still describe for those who left


def test_clients_beyond_the_descriptors_of_the_process_harm_nobody(target: Nbdzram, crowd: Crowd) -> None:
    """When accept finds no descriptor, who is attached is served, the log has no traceback, and later all is well."""
    watch = Watch(target)
    with target.client() as attached:
        limits = resource.prlimit(target.pid, resource.RLIMIT_NOFILE)
        highest = max(int(fd.name) for fd in watch.process.joinpath("fd").iterdir())
        resource.prlimit(target.pid, resource.RLIMIT_NOFILE, (highest + 5, limits[1]))
        assert target.port is not None
        for _ in range(100):
            crowd.members.append(open_socket(("127.0.0.1", target.port)))
        assert attached.read(0, MIB) == STORED
        crowd.disperse()
        resource.prlimit(target.pid, resource.RLIMIT_NOFILE, limits)
    expect_others_are_served(target)
    watch.expect_recovered()
    target.stop()  # asserts that nothing was logged as a traceback


def test_a_reset_before_accept_is_over_when_it_is_accepted(target: Nbdzram, crowd: Crowd) -> None:
    """2,000 connections that are reset at once leave nothing behind."""
    watch = Watch(target)
    assert target.port is not None
    for _ in range(20):
        for _ in range(100):
            crowd.members.append(open_socket(("127.0.0.1", target.port)))
        crowd.disperse(reset=True)
    expect_others_are_served(target)
    watch.expect_modest()
    watch.expect_recovered()
    target.stop()
