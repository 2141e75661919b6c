"""libnbd's programs: nbdinfo, nbdcopy both ways, and its Python binding."""

from __future__ import annotations

import filecmp
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import IMAGE_BYTES
from tests.support.programs import require_file, require_program, run
from tests.support.server import Nbdzram

pytestmark = pytest.mark.interop

SCRIPTS = Path(__file__).with_name("scripts")


def test_nbdinfo_sees_the_export_and_what_it_can_do(server: Nbdzram) -> None:
    """The size, the name, and every capability that the server implements, over both transports.

    --no-content: where the program `file` is missing, nbdinfo 1.14 prints bytes of uninitialised memory for it.
    """
    nbdinfo = require_program("nbdinfo", package="libnbd-bin")
    for uri in (server.uri(), server.tcp_uri()):
        listing = json.loads(run([nbdinfo, "--no-content", "--json", uri]))
        assert listing["protocol"].startswith("newstyle")
        (export,) = listing["exports"]
        assert export["export-name"] == "disk"
        assert export["export-size"] == IMAGE_BYTES
        assert not export["is_read_only"]
        for ability in ("can_flush", "can_fua", "can_multi_conn", "can_trim", "can_zero"):
            assert export[ability], ability


def test_nbdinfo_lists_every_export(serve: Callable[..., Nbdzram]) -> None:
    """NBD_OPT_LIST names all exports, and each of them opens."""
    server = serve({"left": "1M", "right": "2M"})
    nbdinfo = require_program("nbdinfo", package="libnbd-bin")
    listing = json.loads(run([nbdinfo, "--no-content", "--list", "--json", server.uri("")]))
    assert {export["export-name"]: export["export-size"] for export in listing["exports"]} == {
        "left": 1 << 20,
        "right": 2 << 20,
    }


@pytest.mark.parametrize("connections", [1, 4])
@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_nbdcopy_brings_an_image_in_and_out_again(
    server: Nbdzram, ext4_image: Path, tmp_path: Path, connections: int, transport: str
) -> None:
    """A real ext4 image goes in, folds, and comes out byte for byte."""
    nbdcopy = require_program("nbdcopy", package="libnbd-bin")
    uri = server.uri() if transport == "unix" else server.tcp_uri()
    target = tmp_path / "out.img"
    run([nbdcopy, f"--connections={connections}", "--flush", ext4_image, uri])
    server.fold()
    run([nbdcopy, f"--connections={connections}", uri, target])
    assert filecmp.cmp(ext4_image, target, shallow=False)


@pytest.mark.parametrize("script", ["in_flight.py", "requests.py"])
def test_libnbds_python_binding(server: Nbdzram, script: str) -> None:
    """What the scripts claim: see their first lines. The binding exists for Debian's own Python only."""
    python = require_program("/usr/bin/python3", package="python3")
    require_file(Path("/usr/lib/python3/dist-packages/nbd.py"), package="python3-libnbd")
    assert run([python, SCRIPTS / script, server.uri()]) == "PASS\n"
