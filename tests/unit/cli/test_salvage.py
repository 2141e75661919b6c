"""`nbdzram check --state-dir DIR --salvage FILE`, as an operator types it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from nbdzram.cli.check import _lines
from nbdzram.server.salvage import Lost, Salvaged
from tests.unit.cli.conftest import NBDZRAM, clean_environment
from tests.unit.engine.test_scrub import bend
from tests.unit.server.test_salvage import fill


def check(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [*NBDZRAM, "check", *map(str, words)]
    return subprocess.run(command, capture_output=True, env={**clean_environment(), **environment}, check=False)


def test_each_thing_that_is_lost_has_a_line_and_one_block_is_no_range() -> None:
    """The last block that is named is the last that is lost."""
    outcome = Salvaged(
        exports=["a", "b"],
        blocks=7,
        stream_bytes=9 << 20,
        lost=[Lost("a", 0, 1), Lost("a", 5, 2), Lost("b", 512, 512)],
        lost_exports=3,
        lost_pools=["pool 'fast': it cannot be read"],
        notes=["the state is not known"],
    )
    assert list(_lines(outcome)) == [
        "the state is not known",
        "lost: pool 'fast': it cannot be read",
        "lost: 3 exports, with names and sizes that are not what was written",
        "lost: block 0 of export 'a'",
        "lost: blocks 5 to 6 of export 'a'",
        "lost: blocks 512 to 1023 of export 'b'",
        "read 2 exports, 7 blocks with content; a stream of 9M",
    ]
    assert list(_lines(Salvaged())) == ["read 0 exports, 0 blocks with content; a stream of 0B"]


def test_what_is_lost_is_listed_and_the_rest_is_a_stream(tmp_path: Path) -> None:
    state, out = tmp_path / "state", tmp_path / "left.stream"
    fill(state)
    told = check("--state-dir", state, "--salvage", out)
    assert (told.returncode, told.stderr) == (0, b"")
    assert told.stdout.startswith(b"read 3 exports, ")
    bend(state / "default.pool", 1)
    told = check("--state-dir", state, "--salvage", tmp_path / "again.stream")
    assert told.returncode == 1
    assert b"lost: block 0 of export 'disk'\n" in told.stdout
    piped = check("--state-dir", state, "--salvage", "-", "--json")
    assert piped.returncode == 1
    assert piped.stdout.startswith(b"NBDZRAMS")
    assert json.loads(piped.stderr)["exports"] == ["disk", "twin", "alone"]


def test_a_file_that_is_there_is_left_alone_and_one_that_failed_is_not_left(tmp_path: Path) -> None:
    state, out = tmp_path / "state", tmp_path / "left.stream"
    fill(state)
    out.write_bytes(b"mine")
    told = check("--state-dir", state, "--salvage", out)
    assert told.returncode == 1
    assert b"name a file that is not there yet" in told.stderr
    assert out.read_bytes() == b"mine"
    (state / "default.pool").write_bytes(b"")
    told = check("--state-dir", state, "--salvage", tmp_path / "other.stream")
    assert b"nothing can be read" in told.stderr
    assert not (tmp_path / "other.stream").exists()


def test_what_is_told_as_read_is_on_the_disk(tmp_path: Path, unsyncable: dict[str, str]) -> None:
    state, out = tmp_path / "state", tmp_path / "left.stream"
    fill(state)
    told = check("--state-dir", state, "--salvage", out, **unsyncable)
    assert (told.returncode, told.stdout) == (1, b"")
    assert told.stderr.endswith(b"left.stream: Input/output error\n")
    assert not out.exists()
    piped = check("--state-dir", state, "--salvage", "-", **unsyncable)
    assert piped.returncode == 0, "a pipe has no disk"


def test_one_option_without_the_other_is_a_mistake(tmp_path: Path) -> None:
    told = check("--state-dir", tmp_path)
    assert told.returncode == 2
    assert b"belong together" in told.stderr
