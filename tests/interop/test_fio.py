"""fio's nbd engine writes and verifies, undisturbed by folding."""

from __future__ import annotations

import contextlib
import json
import platform
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.programs import PROGRAM_SECONDS, require_program
from tests.support.server import Nbdzram

pytestmark = pytest.mark.interop

# Two jobs on halves of their own: blocks that are all different (fio puts a checked header into each), and blocks that
# repeat one pattern of half a KiB, so that thousands of them fold into one.
JOBS = """
[global]
ioengine=nbd
uri={uri}
iodepth=16
size=24M
refill_buffers
buffer_compress_percentage=50
verify_fatal=1
do_verify=1
randseed=11

[different]
rw=randwrite
bsrange=512-256k
bs_unaligned
offset=0
verify=crc32c

[equal]
rw=randwrite
bs=4k
offset=32M
verify=pattern
verify_pattern={pattern}
loops=4
"""


def start_fio(directory: Path, uri: str) -> subprocess.Popen[str]:
    fio = require_program("fio", package="fio")
    pattern = "0x" + "".join(f"{(number * 37 + number // 7) & 255:02x}" for number in range(256))
    jobs = directory / "jobs.fio"
    jobs.write_text(JOBS.format(uri=uri, pattern=pattern))
    return subprocess.Popen(
        [fio, "--output-format=json", jobs],
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(fio: subprocess.Popen[str]) -> None:
    printed, _ = fio.communicate(timeout=PROGRAM_SECONDS)
    assert fio.returncode == 0, printed
    report = json.loads(printed[printed.index("{") :])
    assert [job["error"] for job in report["jobs"]] == [0, 0], printed
    for job in report["jobs"]:
        assert job["read"]["io_bytes"] > 0, "fio verified nothing"


def test_fio_verifies_what_it_wrote(server: Nbdzram, tmp_path: Path) -> None:
    """Random writes of many sizes, sixteen in flight, read back with the right checksums."""
    finish(start_fio(tmp_path, server.tcp_uri()))


def test_folding_again_and_again_disturbs_no_verification(server: Nbdzram, tmp_path: Path) -> None:
    """While fio writes, overwrites and verifies, folds and compactions run back to back, and merge a good deal."""
    fio = start_fio(tmp_path, server.uri())
    folds = 0
    try:
        while fio.poll() is None:
            server.fold()
            server.compact()
            folds += 1
    finally:
        if fio.poll() is None:
            fio.kill()
    finish(fio)
    assert folds > 0
    server.fold()
    assert server.mm_stat()[9] > 0, "nothing folded"


NAP_SEEN_SECONDS = 100  # at the latest: a second on an idle machine, ten where fifteen programs want a processor
CLOCK_NANOSLEEP = {"x86_64": 230, "aarch64": 115}  # its number, of system calls
MONOTONIC = "0x1"  # its first argument; who waits for a lock of the engine sleeps by another clock


def who_naps(server: Nbdzram, number: int) -> Path | None:
    """The place in /proc of a thread that does just now."""
    for thread in Path(f"/proc/{server.process.pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            if (thread / "syscall").read_text().split()[:2] == [str(number), MONOTONIC]:
                return thread
    return None


def test_a_thread_naps_while_a_client_keeps_many_requests_under_way(tmp_path: Path) -> None:
    """With thirty-two it is tried at least, where they follow each other as fast as a program in C can send them."""
    number = CLOCK_NANOSLEEP.get(platform.machine())
    if number is None:
        pytest.skip(f"the number of clock_nanosleep on {platform.machine()} is not known here")
    server = Nbdzram(tmp_path, {"disk": "64M"}, arguments=["--threads", "1"])
    try:
        fio = require_program("fio", package="fio")
        load = ("--name=stream", "--ioengine=nbd", f"--uri={server.uri()}", "--rw=randread", "--bs=4k", "--iodepth=32")
        command = [fio, *load, "--size=64M", "--time_based", f"--runtime={PROGRAM_SECONDS}"]
        deadline = time.monotonic() + NAP_SEEN_SECONDS
        with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) as running:
            try:
                while (thread := who_naps(server, number)) is None:
                    assert time.monotonic() < deadline, "no nap was seen"
                    assert running.poll() is None, "fio has ended"
            finally:
                running.kill()
        with contextlib.suppress(PermissionError):  # only root with all capabilities is told
            assert int(Path("/proc", thread.name, "timerslack_ns").read_text()) == 1, "its naps end when it suits"
    finally:
        server.stop()
