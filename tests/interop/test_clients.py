"""Each client of others over each transport: TCP, unix socket, TLS with certificates on both sides."""

from __future__ import annotations

import filecmp
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import IMAGE_BYTES
from tests.support.programs import PROGRAM_SECONDS, require_file, require_program, run
from tests.support.reach import Reach, let_others_pass, trusting_user
from tests.support.server import Nbdzram

pytestmark = pytest.mark.interop

SCRIPTS = Path(__file__).with_name("scripts")
MIB = 1 << 20


def require_binding() -> str:
    """The Python that can import libnbd's binding: Debian's own."""
    require_file(Path("/usr/lib/python3/dist-packages/nbd.py"), package="python3-libnbd")
    return require_program("/usr/bin/python3", package="python3")


@pytest.mark.parametrize("script", ["options.py", "in_flight.py", "requests.py"])
def test_libnbds_python_binding(reach: Reach, script: str) -> None:
    """What the scripts claim: see their first lines."""
    assert run([require_binding(), SCRIPTS / script, reach.uri()]) == "PASS\n"


def test_nbdinfo_shows_the_protocol_and_the_transport(reach: Reach) -> None:
    nbdinfo = require_program("nbdinfo", package="libnbd-bin")
    shown = json.loads(run([nbdinfo, "--json", reach.uri()]))
    assert shown["protocol"] == "newstyle-fixed"
    assert shown["TLS"] is (reach.transport == "tls")
    assert shown["structured"]
    (export,) = shown["exports"]
    assert export["export-size"] == IMAGE_BYTES
    assert set(export["contexts"]) == {"base:allocation", "nbdzram:fold"}
    listing = json.loads(run([nbdinfo, "--list", "--json", reach.uri("")]))
    assert [item["export-name"] for item in listing["exports"]] == ["disk"]


def test_nbdinfo_has_the_time_that_a_list_takes_over_tcp(serve: Callable[..., Nbdzram], tmp_path: Path) -> None:
    """It takes 0.2 s of each export, which are the kernel's: what libnbd asks last leaves only then."""
    nbdinfo = require_program("nbdinfo", package="libnbd-bin")
    (tmp_path / "impatient.toml").write_text("[limits]\nhandshake_seconds = 1\n")
    names = [f"disk{number:02}" for number in range(16)]
    server = serve(dict.fromkeys(names, "1M"), arguments=("-c", tmp_path / "impatient.toml"))
    listing = json.loads(run([nbdinfo, "--list", "--json", server.tcp_uri("")]))
    assert [item["export-name"] for item in listing["exports"]] == names


def test_an_image_goes_in_and_out_and_its_map_is_the_files(reach: Reach, ext4_image: Path, tmp_path: Path) -> None:
    """nbdcopy both ways with four connections; the map tells data from holes block for block."""
    nbdcopy = require_program("nbdcopy", package="libnbd-bin")
    nbdinfo = require_program("nbdinfo", package="libnbd-bin")
    run([nbdcopy, "--connections=4", "--flush", ext4_image, reach.uri()])
    run([nbdcopy, "--connections=4", reach.uri(), tmp_path / "out.img"])
    assert filecmp.cmp(ext4_image, tmp_path / "out.img", shallow=False)
    content = ext4_image.read_bytes()
    extents = json.loads(run([nbdinfo, "--map", "--json", reach.uri()]))
    assert sum(extent["length"] for extent in extents) == IMAGE_BYTES
    assert any(extent["type"] == 3 for extent in extents), "a file system of real files has holes"
    for extent in extents:
        if extent["type"] & 2:  # reads as zeroes
            start = extent["offset"]
            assert not any(content[start : start + extent["length"]])


def test_nbddump_prints_what_was_written(reach: Reach) -> None:
    nbddump = require_program("nbddump", package="libnbd-bin")
    qemu_io = require_program("qemu-io", package="qemu-utils")
    options, image = reach.qemu()
    run([qemu_io, *options, "--image-opts", image, "-c", "write -P 0x41 1M 16", "-c", "flush"])
    assert "AAAAAAAAAAAAAAAA" in run([nbddump, "--length=16", reach.uri()]) or "100000" in run([nbddump, reach.uri()])


def test_nbdkit_as_a_proxy_with_checkwrite_finds_every_byte(reach: Reach, ext4_image: Path) -> None:
    """checkwrite fails each write whose bytes the export does not have already, so copying again must succeed."""
    nbdkit = require_program("nbdkit", package="nbdkit")
    require_program("nbdcopy", package="libnbd-bin")
    proxy = [nbdkit, "-U", "-", "nbd", *reach.nbdkit()]
    copy = f'nbdcopy --flush "{ext4_image}" "$uri"'
    run([*proxy, "--run", copy])
    run([*proxy, "--filter=checkwrite", "--run", copy])


def test_checkwrite_notices_one_changed_byte(reach: Reach, ext4_image: Path) -> None:
    """The check above can fail."""
    nbdkit = require_program("nbdkit", package="nbdkit")
    qemu_io = require_program("qemu-io", package="qemu-utils")
    proxy = [nbdkit, "-U", "-", "nbd", *reach.nbdkit()]
    run([*proxy, "--run", f'nbdcopy --flush "{ext4_image}" "$uri"'])
    options, image = reach.qemu()
    run([qemu_io, *options, "--image-opts", image, "-c", "write -P 0xa5 1080 1"])
    with pytest.raises(AssertionError, match="exit code 1"):
        run([*proxy, "--filter=checkwrite", "--run", f'nbdcopy --flush "{ext4_image}" "$uri"'])


def test_qemu_converts_compares_maps_and_benches(reach: Reach, ext4_image: Path) -> None:
    qemu_img = require_program("qemu-img", package="qemu-utils")
    options, image = reach.qemu()
    file = f"driver=raw,file.driver=file,file.filename={ext4_image}"
    run([qemu_img, "convert", *options, "--image-opts", "--target-image-opts", "-n", file, image])
    assert "identical" in run([qemu_img, "compare", *options, "--image-opts", file, image])
    extents = json.loads(run([qemu_img, "map", *options, "--output=json", "--image-opts", image]))
    assert sum(extent["length"] for extent in extents) == IMAGE_BYTES
    assert {extent["zero"] for extent in extents} == {True, False}
    if not options:  # QEMU 7.2's bench cannot be told of certificates
        bench = [qemu_img, "bench", "--image-opts", "-c", "2000", "-d", "64"]
        assert "Run completed" in run([*bench, image])
        assert "Run completed" in run([*bench, "-w", "--flush-interval=100", image])


def test_a_qcow2_image_lives_in_an_export(reach: Reach, ext4_image: Path) -> None:
    """Made, filled, snapshotted and checked by QEMU over NBD."""
    qemu_img = require_program("qemu-img", package="qemu-utils")
    qemu_io = require_program("qemu-io", package="qemu-utils")
    options, image = reach.qemu(driver="qcow2")
    _, raw = reach.qemu()
    small = ext4_image.with_name("small.qcow2")
    run([qemu_img, "create", "-q", "-f", "qcow2", small, "48M"])
    file = f"driver=raw,file.driver=file,file.filename={small}"
    run([qemu_img, "convert", *options, "--image-opts", "--target-image-opts", "-n", file, raw])
    commands = ["write -P 1 0 20M", "write -z 4M 4M", "discard 8M 1M", "aio_write -P 2 30M 64k", "aio_flush", "flush"]
    run([qemu_io, *options, "--image-opts", image, *(word for line in commands for word in ("-c", line))])
    assert "No errors" in run([qemu_img, "check", *options, "--image-opts", image])
    checks = ["read -P 1 0 4M", "read -P 0 4M 4M", "read -P 1 9M 11M", "read -P 2 30M 64k"]
    printed = run([qemu_io, *options, "--image-opts", image, *(word for line in checks for word in ("-c", line))])
    assert "verification failed" not in printed


FIO = """
[global]
ioengine=nbd
uri={uri}
thread
iodepth=16
bsrange=512-256k
bs_unaligned
refill_buffers
buffer_compress_percentage=40
randseed=5
size=8M
io_size=8M

[verified]
rw=randwrite
verify=crc32c
verify_fatal=1
do_verify=1
offset=0

[mixed]
rw=randrw
offset=16M

[trimming]
rw=randtrimwrite
offset=32M

[zeroing]
rw=randwrite
zero_buffers
offset=48M
"""


def test_fio_mixes_sizes_trims_and_zeroes_in_four_jobs(reach: Reach) -> None:
    fio = require_program("fio", package="fio")
    with trusting_user(reach.client_files) as user:
        jobs = user.home / "jobs.fio"
        jobs.write_text(FIO.format(uri=reach.uri().partition("?tls")[0]))
        if reach.transport == "unix":
            reach.server.unix_path.chmod(0o666)
            let_others_pass(reach.server.directory)
        process = subprocess.run(
            [fio, "--output-format=json", jobs],
            cwd=user.home,
            env=user.environment(),
            user=user.user,
            capture_output=True,
            text=True,
            timeout=PROGRAM_SECONDS,
            check=False,
        )
    assert process.returncode == 0, process.stdout + process.stderr
    report = json.loads(process.stdout[process.stdout.index("{") :])
    assert [job["error"] for job in report["jobs"]] == [0] * 4
    verified, _, trimming, _ = report["jobs"]
    assert verified["read"]["io_bytes"] > 0
    assert trimming["trim"]["io_bytes"] > 0


def test_nbd_client_lists_exports(reach: Reach) -> None:
    nbd_client = require_program("nbd-client", package="nbd-client")
    target = ["-u", str(reach.server.unix_path)] if reach.transport == "unix" else ["127.0.0.1", str(reach.server.port)]
    tls = []
    if reach.transport == "tls":
        files = reach.client_files
        tls = ["-cacertfile", str(files / "ca-cert.pem"), "-tlshostname", "localhost"]
        tls += ["-certfile", str(files / "client-cert.pem"), "-keyfile", str(files / "client-key.pem")]
    printed = run([nbd_client, "-l", *target, *tls])
    assert "disk" in printed.split()
