"""A disk that is loaded from an image: whole before anybody sees it, or not there."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nbdzram.cli import images
from nbdzram.cli.images import MAGICS, Image, look_at
from nbdzram.config import ExportConfig, ServerConfig
from nbdzram.errors import ConfigError
from tests.support.nbd_client import Client
from tests.support.programs import require_program
from tests.unit.cli.conftest import NBDZRAM, Server, clean_environment

MIB = 1 << 20
Start = Callable[..., Server]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A raw image: some content, holes, and an end that is no whole sector."""
    path = tmp_path / "image.raw"
    with path.open("wb") as file:
        file.write(random.Random(1).randbytes(100_000))
        file.seek(2 * MIB)
        file.write(b"the end")
    return path


@pytest.fixture
def qcow2(raw: Path) -> Path:
    path = raw.with_suffix(".qcow2")
    program = require_program("qemu-img", package="qemu-utils")
    subprocess.run([program, "convert", "-f", "raw", "-O", "qcow2", raw, path], check=True, capture_output=True)
    return path


@pytest.fixture
def half_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A qemu-img that begins to copy and never ends, whoever asks it to; the file that it makes then."""
    begun, place = tmp_path / "begun", tmp_path / "bin"
    place.mkdir()
    program = place / "qemu-img"
    program.write_text(
        f"""#!/bin/sh
case $1 in
info) echo '{{"format": "raw", "virtual-size": {MIB}}}' ;;
*) trap '' TERM INT; printf '    (10.00/100%%)\\r'; echo $$ > {begun}.new; mv {begun}.new {begun}
    exec sleep 1000 ;;
esac
"""
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    yield begun
    with contextlib.suppress(OSError):  # it was never begun, or is gone
        process = int(begun.read_text())
        words = Path(f"/proc/{process}/cmdline").read_bytes()
        if bytes(place) in words or words.startswith(b"sleep"):
            os.kill(process, signal.SIGKILL)  # a server that was killed ended nobody


def content(server: Server, export: str, size: int) -> bytes:
    with Client(server.socket, export) as client:
        return bytes(client.read(0, size))


def beginning(directory: Path, begun: Path, image: Path) -> subprocess.Popen[str]:
    """A server that is in the middle of loading."""
    words = ["-e", f"disk=@{image}", "-U", str(directory / "n.sock"), "--control", str(directory / "c.sock")]
    process = subprocess.Popen(
        [*NBDZRAM, "serve", *words, "--metrics", "off", "--state-dir", str(directory / "state")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment(),
    )
    while not begun.exists():
        assert process.poll() is None, process.communicate()
        os.sched_yield()
    return process


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_a_disk_has_what_its_image_has_and_holes_stay_holes(
    start: Start, kind: str, request: pytest.FixtureRequest, raw: Path
) -> None:
    image: Path = request.getfixturevalue(kind)
    server = start("-e", f"disk=@{image}", "-e", "small=1M", "-e", f"large=@{image},size=4M,ro,private")
    size = -(-raw.stat().st_size // 512) * 512
    assert content(server, "disk", size) == raw.read_bytes().ljust(size, b"\0")
    listed = {export["name"]: export for export in json.loads(server.run("ls", "--json").out)}
    assert list(listed) == ["disk", "small", "large"]  # as they are declared
    assert (listed["disk"]["size_bytes"], listed["large"]["size_bytes"]) == (size, 4 * MIB)
    assert listed["disk"]["stored_bytes"] < 200_000
    assert (listed["large"]["read_only"], listed["large"]["private"]) == (True, True)
    server.wait_for_log("loading the export 'disk' from")
    server.wait_for_log("loaded the export 'disk': ")


def test_a_disk_that_is_there_is_not_loaded_again_and_needs_no_image(start: Start, raw: Path, tmp_path: Path) -> None:
    words = ("-e", f"disk=@{raw}", "--state-dir", str(tmp_path / "state"))
    server = start(*words)
    with Client(server.socket, "disk") as client:
        client.write(0, b"new" * 1024)
    assert server.stop() == 0
    raw.unlink()
    again = start(*words)
    assert content(again, "disk", 3072) == b"new" * 1024
    assert "loading" not in again.log.read_text()
    assert again.run("rm", "disk", "--yes").code == 0
    assert again.stop() == 0
    assert [line for line in start(*words).greeting if line.startswith("  export")] == []  # it was removed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_of_an_image_that_was_interrupted_nothing_is_left(
    start: Start, number: int, half_a_program: Path, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path = raw.parent
    process = beginning(tmp_path, half_a_program, raw)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert out == ""  # it never was ready
    if number != signal.SIGKILL:
        assert process.returncode == 1
        assert err.splitlines()[-1] == f"nbdzram: loading {raw} was interrupted; what was loaded of it is gone"
        assert not (tmp_path / "n.sock").exists()
    monkeypatch.setenv("PATH", os.environ["PATH"].partition(":")[2])
    bare = start("-e", "other=1M", "--state-dir", str(tmp_path / "state"))
    assert [export["name"] for export in json.loads(bare.run("ls", "--json").out)] == ["other"]
    assert bare.stop() == 0
    server = start("-e", f"disk=@{raw}", "--state-dir", str(tmp_path / "state"))
    assert content(server, "disk", 4096) == raw.read_bytes()[:4096]


def test_a_server_that_still_loads_is_not_healthy(tmp_path: Path, raw: Path, half_a_program: Path) -> None:
    process = beginning(tmp_path, half_a_program, raw)
    try:
        health = [*NBDZRAM, "health", "--control", str(tmp_path / "c.sock")]
        told = subprocess.run(health, capture_output=True, text=True, env=clean_environment(), check=False)
        assert (told.returncode, told.stdout) == (1, "")
        assert f"the server (pid {process.pid}) is starting" in told.stderr
        told = subprocess.run([*health, "--json"], capture_output=True, text=True, env=clean_environment(), check=False)
        assert (told.returncode, json.loads(told.stdout)["ready"]) == (1, False)
    finally:
        process.terminate()
        process.communicate(timeout=60)


def test_a_server_that_has_loaded_is_healthy(start: Start, raw: Path) -> None:
    server = start("-e", f"disk=@{raw}")
    assert server.run("health").out == "serving 1 export to 0 connections\n"


def test_an_image_that_does_not_fit_the_pool_is_an_error_and_no_half_disk(raw: Path) -> None:
    done = subprocess.run(
        [*NBDZRAM, "serve", "-e", f"disk=@{raw}", "--mem-limit", "64K", "--run", "echo served"],
        capture_output=True,
        text=True,
        check=False,
        env=clean_environment(),
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert f"loading {raw} failed: " in done.stderr.splitlines()[-1]
    assert "No space left on device" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("magic", MAGICS, ids=lambda magic: MAGICS[magic])
def test_each_kind_that_only_qemu_img_reads_is_known_by_its_beginning(
    magic: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaded as raw ones, they would be disks that nobody can use; and what only begins like one is a raw one."""
    monkeypatch.setattr(shutil, "which", {"nbdcopy": "/usr/bin/nbdcopy"}.get)
    image = tmp_path / "image"
    image.write_bytes(magic + bytes(1000))
    with pytest.raises(ConfigError, match=f"is a {MAGICS[magic]} image, which needs qemu-img"):
        look_at(image)
    image.write_bytes(magic[:-1] + b"?" + bytes(1000))
    assert look_at(image).format == "raw"


def test_what_no_program_here_can_read_is_refused_by_name(
    raw: Path, qcow2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"nbdcopy": "/usr/bin/nbdcopy"}
    monkeypatch.setattr(shutil, "which", found.get)
    size = -(-raw.stat().st_size // 512) * 512
    assert look_at(raw) == Image(raw, "raw", size)
    assert look_at(raw).command("nbd://x")[0] == "/usr/bin/nbdcopy"
    with pytest.raises(ConfigError, match="is a qcow2 image, which needs qemu-img; install it"):
        look_at(qcow2)
    found.clear()
    with pytest.raises(ConfigError, match="takes qemu-img, or nbdcopy for a raw one, and neither is found"):
        look_at(raw)
    with pytest.raises(ConfigError, match=r"cannot read the image .*: No such file"):
        look_at(raw.with_name("gone"))


def test_a_raw_image_is_loaded_by_nbdcopy_where_that_is_all_there_is(
    start: Start, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "bin"
    place.mkdir()
    (place / "nbdcopy").symlink_to(require_program("nbdcopy", package="libnbd-bin"))
    with monkeypatch.context() as patched:
        patched.setenv("PATH", str(place))
        server = start("-e", f"disk=@{raw},size=4M")
    assert content(server, "disk", 4096) == raw.read_bytes()[:4096]


def test_an_image_is_loaded_where_one_client_may_come_and_temporary_files_lie_deep(
    start: Start, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nbdcopy comes with four connections, and to a socket, whose path has 107 bytes."""
    place, deep = tmp_path / "bin", tmp_path / ("d" * 100)
    place.mkdir()
    deep.mkdir()
    (place / "nbdcopy").symlink_to(require_program("nbdcopy", package="libnbd-bin"))
    (tmp_path / "lonely.toml").write_text("[limits]\nconnections = 1\n")
    with monkeypatch.context() as patched:
        patched.setenv("PATH", str(place))
        patched.setenv("TMPDIR", str(deep))
        server = start("-e", f"disk=@{raw},size=4M", "-c", str(tmp_path / "lonely.toml"))
    assert content(server, "disk", 4096) == raw.read_bytes()[:4096]


def test_an_image_that_qemu_img_cannot_read_is_told_in_its_words(tmp_path: Path) -> None:
    require_program("qemu-img", package="qemu-utils")
    broken = tmp_path / "broken.qcow2"
    broken.write_bytes(b"QFI\xfb" + (99).to_bytes(4, "big") + bytes(1000))
    with pytest.raises(ConfigError, match=f"qemu-img cannot read the image {broken}: .*version"):
        look_at(broken)


def test_a_disk_smaller_than_its_image_is_refused(raw: Path) -> None:
    config = ServerConfig(exports=(ExportConfig(name="disk", size_bytes=MIB, image=raw),))
    with pytest.raises(ConfigError, match=r"the export 'disk' has 1M, but the disk in .* has 2M"):
        images.resolve(config)


@pytest.mark.parametrize(
    ("path", "kind"), [("/dev/null", "a character device"), ("pipe", "a pipe"), (".", "a directory")]
)
def test_what_is_no_image_is_refused_before_it_is_opened(tmp_path: Path, path: str, kind: str) -> None:
    """A pipe has no size, and what was read of it is gone; of /dev/null came a disk without a byte."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match=f"is {kind}; name a disk image or a block device"):
        look_at(tmp_path / path)


def test_a_disk_is_not_as_large_as_an_empty_image(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    config = ServerConfig(exports=(ExportConfig(name="disk", size_bytes=0, image=tmp_path / "empty"),))
    with pytest.raises(
        ConfigError, match=r"the disk in .*/empty, and '0' is not the size of a disk: a multiple of 512"
    ):
        images.resolve(config)
    given = replace(config, exports=(replace(config.exports[0], size_bytes=MIB),))
    assert images.resolve(given) == given
