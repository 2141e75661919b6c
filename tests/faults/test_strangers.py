"""Clients that connect and never attach: they take no place, descriptor or turn from anybody who does."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdzram.control.client import ControlClient
from tests.faults.crowd import Crowd, expect_others_are_served
from tests.support.nbd_client import Client, open_socket
from tests.support.programs import require_program, run
from tests.support.server import Nbdzram
from tests.wire import OPT_LIST, client_hello, option


def test_more_silent_strangers_than_there_are_places_shut_nobody_out(target: Nbdzram, crowd: Crowd) -> None:
    """A client of the local socket, one of TCP, and the operator come while 1,100 sockets say nothing."""
    assert target.port is not None
    for _ in range(1100):
        crowd.members.append(open_socket(("127.0.0.1", target.port)))
    with Client(("127.0.0.1", target.port), "disk") as client:
        client.read(0, 4096)
    expect_others_are_served(target)
    with ControlClient(target.control) as control:
        failures = control.status().handshake_failures
    assert failures["connection_limit"] >= 1100 + 1 - 1024


def test_the_soft_limit_of_descriptors_is_raised_to_the_hard_one(serve: Callable[..., Nbdzram]) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, before[1]), before[1]))
    try:
        server = serve({"disk": "1M"})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert resource.prlimit(server.pid, resource.RLIMIT_NOFILE) == (before[1], before[1])


def test_lists_that_nobody_reads_take_turns(target: Nbdzram, crowd: Crowd) -> None:
    """50 strangers pipeline 120 lists each; who is attached is served, and a stranger who reads gets its list."""
    crowd.connect(target, 50)
    crowd.press([[client_hello(), option(OPT_LIST) * 120]] * 50)
    expect_others_are_served(target)


@pytest.mark.interop
@pytest.mark.parametrize("count", [100, pytest.param(4000, marks=pytest.mark.slow)])
def test_programs_that_list_ask_several_options_of_each_export(
    serve: Callable[..., Nbdzram], count: int, tmp_path: Path
) -> None:
    """`qemu-nbd --list` and `nbdinfo --list` describe every export over one connection."""
    qemu_nbd = require_program("qemu-nbd", package="qemu-utils")
    nbdinfo = require_program("nbdinfo", package="libnbd-bin")
    config = tmp_path / "many.toml"
    config.write_text("".join(f'[exports.disk{number}]\nsize = "1M"\n' for number in range(count)))
    server = serve({}, arguments=("-c", str(config)))
    assert f"exports available: {count}" in run([qemu_nbd, "--list", "-k", server.unix_path])
    assert run([nbdinfo, "--list", server.uri("")]).count("export=") == count
