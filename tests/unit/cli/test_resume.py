"""`nbdzram send --resume`: pipes that break between real servers, and what is kept, seen and given up of them."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nbdzram.engine.pool import Pool
from tests.support.nbd_client import Client
from tests.unit.cli.conftest import Server, clean_environment
from tests.unit.cli.test_send_receive import (
    MIB,
    PATIENCE_SECONDS,
    command,
    content_of,
    fill,
    names,
    objects,
    receive,
    send,
    until,
)
from tests.unit.engine.blocks import BLOCK, half_random, noise
from tests.unit.stream import plain_reader

Start = Callable[..., Server]
TOKEN = re.compile(r"--resume ([0-9a-f]{32}-\d+-[0-9a-f]{16})")
HEAD_BYTES = 56


def kept(server: Server) -> list[dict[str, Any]]:
    return [told for told in json.loads(server.run("streams", "--json").out) if told["state"] == "kept"]


def send_some(server: Server, *words: str, count: int) -> bytes:
    """The beginning of a stream whose reader goes away."""
    process = subprocess.Popen(
        command(server, "send", *words), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=clean_environment()
    )
    assert process.stdout is not None
    first = process.stdout.read(count)
    process.stdout.close()
    process.wait(timeout=PATIENCE_SECONDS)
    return first


def broken(here: Server, there: Server, path: Path, *words: str, count: int) -> str:
    """A stream breaks on both sides; the token that was told."""
    path.write_bytes(send_some(here, *words, "--resumable", count=count))
    done = receive(there, path, "--resumable")
    assert done.returncode == 1
    assert "the stream ends in the middle" in done.stderr
    found = TOKEN.search(done.stderr)
    assert found, done.stderr
    until(lambda: len(kept(here)) == 1)
    return found[1]


def test_what_broke_goes_on_where_it_ended(start: Start, tmp_path: Path) -> None:
    here, there = start("-e", "vm1=8M", "-e", "vm2=8M"), start()
    fill(here, "vm1", *(noise(number) for number in range(1000)))
    fill(here, "vm2", *(half_random(number) for number in range(800)))
    before = {name: content_of(here, name, 8 * MIB) for name in ("vm1", "vm2")}
    send(here, tmp_path / "uncut", "vm1", "vm2")
    first, rest = tmp_path / "first", tmp_path / "rest"
    token = broken(here, there, first, "vm1", "vm2", count=3 * MIB)
    assert names(there) == []
    (told,) = kept(there)
    assert (told["token"], told["way"], told["exports"]) == (token, "received", ["vm1"])
    assert 3000 < told["seconds_left"] <= 3600
    assert kept(here)[0]["stream"] == token[:32]
    shown = there.run("streams").out
    assert f"go on with vm1: nbdzram send --resume {token}" in shown
    fill(here, "vm1", *(noise(5000 + number) for number in range(1000)))  # what is written now is none of it
    done = send(here, rest, "--resume", token, "--json")
    assert done.returncode == 0
    assert json.loads(done.stderr)["stream_bytes"] == rest.stat().st_size
    whole_records, _ = plain_reader.whole_records(first.read_bytes(), told["records"])
    assert whole_records + rest.stat().st_size - HEAD_BYTES == (tmp_path / "uncut").stat().st_size
    assert plain_reader.contents(plain_reader.joined(first.read_bytes(), rest.read_bytes())) == before
    done = receive(there, rest)
    assert (done.returncode, done.stdout) == (0, "received vm1\nreceived vm2\n")
    assert {name: content_of(there, name, 8 * MIB) for name in ("vm1", "vm2")} == before
    assert kept(there) == []
    again = receive(there, rest)  # it is whole: nothing is kept to go on with
    assert (again.returncode, "no first part of the stream" in again.stderr) == (1, True)


def test_what_would_come_twice_is_refused_and_what_came_stays(start: Start, tmp_path: Path) -> None:
    here, there = start("-e", "vm1=8M"), start()
    fill(here, "vm1", *(noise(number) for number in range(1000)))
    first, rest = tmp_path / "first", tmp_path / "rest"
    token = broken(here, there, first, "vm1", count=3 * MIB)
    earlier = int(token.split("-")[1]) - 1
    _, digest = plain_reader.whole_records(first.read_bytes(), earlier)
    assert send(here, rest, "--resume", f"{token[:32]}-{earlier}-{digest:016x}").returncode == 0
    done = receive(there, rest)
    assert f"this goes on behind record {earlier}" in done.stderr
    assert f"send it with --resume {token}" in done.stderr
    assert [told["token"] for told in kept(there)] == [token]


def test_it_breaks_again_and_again(start: Start, tmp_path: Path) -> None:
    here, there = start("-e", "vm1=8M"), start()
    content = fill(here, "vm1", *(noise(number) for number in range(1500)))
    path = tmp_path / "part"
    token = broken(here, there, path, "vm1", count=MIB)
    parts = 0
    while True:
        assert send(here, path, "--resume", token).returncode == 0
        part = path.read_bytes()
        path.write_bytes(part[:MIB])
        done = receive(there, path)
        if done.returncode == 0:
            break
        found = TOKEN.search(done.stderr)
        assert found
        assert int(found[1].split("-")[1]) > int(token.split("-")[1])
        token, parts = found[1], parts + 1
    assert parts > 3
    assert content_of(there, "vm1", len(content)) == content


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_receive_that_is_ended_keeps_what_came(start: Start, tmp_path: Path, how: signal.Signals) -> None:
    here, there = start("-e", "disk=8M"), start()
    content = fill(here, "disk", *(noise(number) for number in range(1000)))
    path = tmp_path / "stream"
    send(here, path, "disk", "--resumable")
    stream = path.read_bytes()
    process = subprocess.Popen(
        command(there, "receive", "--resumable"),
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=clean_environment(),
    )
    assert process.stdin is not None
    process.stdin.write(stream[: len(stream) // 2])
    process.stdin.flush()
    until(lambda: objects(there) > 100)
    (told,) = json.loads(there.run("streams", "--json").out)
    assert (told["state"], told["way"], told["token"]) == ("under way", "received", None)
    process.send_signal(how)
    process.wait(timeout=PATIENCE_SECONDS)
    process.stdin.close()
    until(lambda: len(kept(there)) == 1)
    assert send(here, path, "--resume", kept(there)[0]["token"]).returncode == 0
    assert path.stat().st_size < len(stream) * 0.8
    assert receive(there, path).returncode == 0
    assert content_of(there, "disk", len(content)) == content


def test_what_is_kept_is_given_up_on_request(start: Start, tmp_path: Path) -> None:
    here, there = start("-e", "disk=8M"), start()
    fill(here, "disk", *(noise(number) for number in range(1000)))
    token = broken(here, there, tmp_path / "x", "disk", count=2 * MIB)
    assert objects(there) > 100
    send(here, tmp_path / "anew", "disk")
    refused = receive(there, tmp_path / "anew")
    assert f"a part of 'disk' came with the stream {token[:32]} that was interrupted" in refused.stderr
    both = there.run("streams", "abandon", token[:32], "00" * 16)
    told = f"the stream {'00' * 16} is not there: nothing is done; `nbdzram streams` shows what is kept"
    assert (both.code, both.out, told in both.err, len(kept(there))) == (1, "", True, 1)
    twice = there.run("streams", "abandon", token[:32], token[:32], "--json")
    assert json.loads(twice.out) == [{"abandoned": token[:32]}]
    assert (kept(there), objects(there)) == ([], 0)
    assert receive(there, tmp_path / "anew").returncode == 0
    fill(here, "disk", bytes(8 * MIB))
    assert objects(here) == 1000  # the moment holds them
    assert here.run("streams", "abandon", token).code == 0
    assert (kept(here), objects(here)) == ([], 0)
    for server in (here, there):
        done = server.run("streams", "abandon", token)
        assert (done.code, f"no part of the stream {token[:32]} is kept here" in done.err) == (1, True)
        assert "no stream is under way, and nothing is kept of one" in server.run("streams").out


def test_a_pool_in_which_a_stream_has_something_stays(start: Start, tmp_path: Path) -> None:
    """Without exports a pool could be removed; what is kept would be gone, its memory not, and each token lie."""
    here, there = start("-e", "disk=8M,pool=p", "--pool", "p=0"), start()
    assert there.run("pools", "add", "p").code == 0
    fill(here, "disk", *(noise(number) for number in range(1000)))
    token = broken(here, there, tmp_path / "x", "disk", count=2 * MIB)
    refused = there.run("pools", "remove", "p")
    assert (refused.code, f"what is kept of the stream {token[:32]} that was interrupted" in refused.err) == (1, True)
    with subprocess.Popen(command(there, "receive"), stdin=subprocess.PIPE, env=clean_environment()) as process:
        assert process.stdin is not None
        rest = tmp_path / "rest"
        assert send(here, rest, "--resume", token).returncode == 0
        process.stdin.write(rest.read_bytes()[:-1])
        process.stdin.flush()
        until(lambda: there.run("streams").out.count("under way") == 1)
        refused = there.run("pools", "remove", "p")
        assert (refused.code, "a stream that is under way" in refused.err) == (1, True)
        process.stdin.write(rest.read_bytes()[-1:])
        process.stdin.close()
        assert process.wait(PATIENCE_SECONDS) == 0
    assert there.run("exports", "remove", "disk", "--yes").code == 0
    assert there.run("pools", "remove", "p").code == 0


def test_a_moment_that_is_gone_is_refused_in_a_sentence(start: Start, tmp_path: Path) -> None:
    here, there = start("-e", "disk=8M", "--state-dir", str(tmp_path / "state")), start()
    fill(here, "disk", *(noise(number) for number in range(1000)))
    token = broken(here, there, tmp_path / "x", "disk", count=2 * MIB)
    other = token[:33] + "1" + token[-17:]
    done = send(here, tmp_path / "y", "--resume", other)
    assert (done.returncode, "its first 1 records are others" in done.stderr) == (1, True)
    assert len(kept(here)) == 1
    here.process.kill()
    here.process.communicate()
    again = start("-e", "disk=8M", "--state-dir", str(tmp_path / "state"))
    done = send(again, tmp_path / "y", "--resume", token)
    assert done.returncode == 1
    assert f"no moment of the stream {token[:32]} is kept here" in done.stderr
    assert "kept for 1 h" in done.stderr
    assert "send the exports anew" in done.stderr
    assert send(again, tmp_path / "y", "--resume", "x").returncode == 1
    assert send(again, tmp_path / "y", "--resume", token, "disk").returncode == 2
    fill(again, "disk", bytes(8 * MIB))
    assert objects(again) == 0


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_receiver_that_starts_again_has_nothing_of_it(start: Start, tmp_path: Path, how: str) -> None:
    state = ("--state-dir", str(tmp_path / "state"))
    here, there = start("-e", "disk=8M"), start(*state, "-e", "own=1M")
    fill(here, "disk", *(noise(number) for number in range(1000)))
    token = broken(here, there, tmp_path / "x", "disk", count=2 * MIB)
    if how == "killed":
        there.process.kill()
        there.process.communicate()
    else:
        assert there.stop() == 0
        with Pool(path=str(tmp_path / "state" / "default.pool")) as pool:
            assert [disk.name for disk in pool.all_disks()] == ["own"]
    again = start(*state)
    assert (names(again), objects(again), kept(again)) == (["own"], 0, [])
    send(here, tmp_path / "rest", "--resume", token)
    done = receive(again, tmp_path / "rest")
    assert (done.returncode, "no first part of the stream" in done.stderr) == (1, True)


def test_what_is_kept_gives_way_to_writes(start: Start) -> None:
    server = start("-e", "disk=8M", "--mem-limit", "9M")
    fill(server, "disk", *(noise(number) for number in range(1500)))
    send_some(server, "disk", "--resumable", count=MIB)
    until(lambda: len(kept(server)) == 1)
    fresh = [noise(5000 + number) for number in range(1500)]
    with Client(server.socket, "disk") as client, pytest.raises(Exception, match=r"(?i)space|28"):
        client.write(0, b"".join(fresh))
    until(lambda: kept(server) == [])
    fill(server, "disk", *fresh)
    assert content_of(server, "disk", 1500 * BLOCK) == b"".join(fresh)


def test_unique_is_what_removing_an_export_frees_at_once(start: Start) -> None:
    """What a copy of a moment holds too is not; it goes with the copy."""
    server = start("-e", "own=8M", "-e", "copied=8M")
    fill(server, "copied", *(noise(number) for number in range(1000)))
    send_some(server, "copied", "--resumable", count=MIB)
    until(lambda: len(kept(server)) == 1)
    fill(server, "own", *(noise(number) for number in range(500, 1100)))
    server.run("fold")
    for name, promised in (("own", 100 * BLOCK), ("copied", 0)):
        until(partial(is_alone, server, name, promised))
        before = compressed(server)
        said = json.loads(server.run("stat", "--json", name).out)["exports"][0]["usage"]["unique"]
        assert server.run("rm", "--yes", name).code == 0
        assert before - compressed(server) == said
    assert "held by several or a copy" in server.run("stat", "--memory").out
    assert compressed(server) == 1000 * BLOCK
    (copy,) = kept(server)
    assert server.run("streams", "abandon", copy["stream"]).code == 0
    until(lambda: compressed(server) == 0)


def is_alone(server: Server, name: str, size: int) -> bool:
    """Whether so much is UNIQUE; the server counts anew every few seconds."""
    return int(server.run("stat", "-b", "-n", "--raw", "-o", "UNIQUE", name).out) == size


def compressed(server: Server) -> int:
    return int(json.loads(server.run("stat", "--json").out)["pools"][0]["compr_data_size"])


def test_the_oldest_makes_room(start: Start) -> None:
    server = start("-e", "disk=8M")
    fill(server, "disk", *(noise(number) for number in range(1000)))
    seen: list[str] = []
    for turn in range(6):
        send_some(server, "disk", "--resumable", count=MIB)
        until(lambda: kept(server)[-1:] != [] and kept(server)[-1]["stream"] not in seen)
        seen.append(kept(server)[-1]["stream"])
        until(lambda: len(kept(server)) == min(turn + 1, 4))  # noqa: B023 - within the turn
    assert [told["stream"] for told in kept(server)] == seen[-4:]


def test_without_the_word_nothing_is_kept(start: Start, tmp_path: Path) -> None:
    here, there = start("-e", "disk=8M"), start()
    fill(here, "disk", *(noise(number) for number in range(1000)))
    (tmp_path / "x").write_bytes(send_some(here, "disk", count=2 * MIB))
    done = receive(there, tmp_path / "x")
    assert (done.returncode, "--resume" in done.stderr) == (1, False)
    assert (kept(here), kept(there), objects(there)) == ([], [], 0)
