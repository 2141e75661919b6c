"""Extended headers, spoken by those who have them: libnbd 1.22 and QEMU 10 of Debian 13."""

from __future__ import annotations

import filecmp
import json
import platform
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.debian13 import program
from tests.support.programs import run
from tests.support.reach import Reach
from tests.support.server import Nbdzram

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="fetches Debian 13's packages for amd64"),
]


def test_nbdinfo_negotiates_extended_headers(reach: Reach) -> None:
    shown = json.loads(run([*program("nbdinfo"), "--json", reach.uri()]))
    assert shown["protocol"] == "newstyle-fixed"
    assert shown["extended"] is True


def test_nbdcopy_brings_an_image_in_and_out_again(reach: Reach, ext4_image: Path, tmp_path: Path) -> None:
    nbdcopy = program("nbdcopy")
    run([*nbdcopy, "--connections=4", "--flush", ext4_image, reach.uri()])
    run([*nbdcopy, "--connections=4", reach.uri(), tmp_path / "out.img"])
    assert filecmp.cmp(ext4_image, tmp_path / "out.img", shallow=False)


def test_qemu_10_writes_reads_zeroes_and_maps(reach: Reach, ext4_image: Path) -> None:
    """QEMU 10 leaves PAYLOAD_LEN off its writes; they are served all the same."""
    options, image = reach.qemu()
    file = f"driver=raw,file.driver=file,file.filename={ext4_image}"
    convert = [*program("qemu-img"), "convert", *options, "--image-opts", "--target-image-opts", "-n"]
    run([*convert, file, image])
    assert "identical" in run([*program("qemu-img"), "compare", *options, "--image-opts", file, image])
    writes = ["write -P 3 1M 100000", "write -f -P 4 8M 4k", "write -z 2M 1M", "discard 16M 1M", "flush"]
    reads = ["read -P 3 1M 100000", "read -P 4 8M 4k", "read -P 0 2M 1M", "read -P 0 16M 1M"]
    words = [word for line in (*writes, *reads) for word in ("-c", line)]
    printed = run([*program("qemu-io"), *options, "--image-opts", image, *words])
    assert "failed" not in printed, printed
    extents = json.loads(run([*program("qemu-img"), "map", *options, "--output=json", "--image-opts", image]))
    assert {extent["zero"] for extent in extents} == {True, False}


def test_one_request_describes_and_zeroes_more_than_32_bits(serve: Callable[..., Nbdzram]) -> None:
    """8 GiB in one block status and one zero request: what 32-bit lengths cannot say."""
    server = serve({"disk": "8G"})
    extents = json.loads(run([*program("nbdinfo"), "--map", "--json", server.uri()]))
    assert [(extent["offset"], extent["length"]) for extent in extents] == [(0, 8 << 30)]
    printed = run([*program("qemu-io"), "-f", "raw", server.uri(), "-c", "write -z -n 0 8G"])
    assert "failed" not in printed, printed
