"""`nbdzram send` and `receive`, `serve --restore`: between real servers, over pipes that break."""

from __future__ import annotations

import json
import os
import pty
import random
import signal
import struct
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from nbdzram.bounds import Bounds
from nbdzram.engine.pool import Pool
from nbdzram.stream import layout
from tests.support.nbd_client import Client
from tests.unit.cli.conftest import NBDZRAM, Server, clean_environment
from tests.unit.engine.blocks import BLOCK, half_random, noise, text
from tests.unit.stream import plain_reader
from tests.unit.stream.test_streams import EXPORT, HEADER, POOL, forged

MIB = 1 << 20
Start = Callable[..., Server]
PATIENCE_SECONDS = 60


def fill(server: Server, export: str, *blocks: bytes, at: int = 0) -> bytes:
    content = b"".join(blocks)
    with Client(server.socket, export) as client:
        client.write(at, content)
    return content


def content_of(server: Server, export: str, size: int = MIB) -> bytes:
    with Client(server.socket, export) as client:
        return client.read(0, size)


def names(server: Server) -> list[str]:
    return [export["name"] for export in json.loads(server.run("exports", "list", "--json").out)]


def objects(server: Server) -> int:
    return int(json.loads(server.run("stat", "--json").out)["pools"][0]["objects"])


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < deadline
        os.sched_yield()


def command(server: Server, *words: str) -> list[str]:
    return [*NBDZRAM, *words, "--control", str(server.control)]


def send(server: Server, path: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    with path.open("wb") as out:
        return subprocess.run(
            command(server, "send", *words),
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env={**clean_environment(), **environment},
        )


def receive(server: Server, path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    with path.open("rb") as source:
        return subprocess.run(
            command(server, "receive", *words),
            stdin=source,
            capture_output=True,
            text=True,
            check=False,
            env=clean_environment(),
        )


def test_what_is_told_as_sent_is_on_the_disk(start: Start, tmp_path: Path, unsyncable: dict[str, str]) -> None:
    done = send(start("-e", "vm1=1M"), tmp_path / "all.stream", "--all", **unsyncable)
    assert done.returncode == 1
    assert "what was sent is not on the disk: Input/output error" in done.stderr
    assert "sent 1 export" not in done.stderr


def test_exports_go_to_another_server_with_their_content_and_rules(start: Start, tmp_path: Path) -> None:
    here, there = start("-e", "vm1=1M", "-e", "vm2=1M"), start()
    first = fill(here, "vm1", text(1), noise(2), half_random(3))
    fill(here, "vm2", half_random(3), at=MIB - BLOCK)
    here.run("exports", "change", "vm2", "--allow-address", "10.0.0.0/8", "--description", "the second")
    limits = {"quota_bytes": MIB, "iops": 700, "iops_burst": 70, "bandwidth_bytes": 30 * MIB}
    here.run("exports", "change", "vm2", "--quota", "1M", "--iops", "700", "--iops-burst", "70", "--bandwidth", "30M")
    path = tmp_path / "all.stream"
    done = send(here, path, "--all")
    assert (done.returncode, done.stderr.split(":")[0]) == (0, "sent 2 exports, 4 blocks, 4 objects")
    assert plain_reader.contents(path.read_bytes())["vm1"].startswith(first)
    said = {export.name: export.bounds for export in plain_reader.exports_of(path.read_bytes())}
    assert said == {"vm1": [0] * 5, "vm2": [*limits.values(), 0]}
    done = receive(there, path)
    assert (done.returncode, done.stdout) == (0, "received vm1\nreceived vm2\n")
    for name in ("vm1", "vm2"):
        assert content_of(there, name) == content_of(here, name)
    told = {export["name"]: export for export in json.loads(there.run("exports", "list", "--json").out)}
    assert (told["vm1"]["admits"], told["vm2"]["allow_addresses"]) == ("everyone", ["10.0.0.0/8"])
    assert told["vm2"]["description"] == "the second"
    assert told["vm2"]["bounds"] == {**limits, "bandwidth_burst_bytes": 0}
    assert set(told["vm1"]["bounds"].values()) == {0}
    again = receive(there, path)
    assert (again.returncode, "there is an export 'vm1' already" in again.stderr) == (1, True)
    done = receive(there, path, "--prefix", "old-", "--json")
    report = json.loads(done.stdout)
    assert report["exports"] == ["old-vm1", "old-vm2"]
    assert report["objects_folded"] == report["objects"] == 4
    assert names(there) == ["vm1", "vm2", "old-vm1", "old-vm2"]


def test_what_changed_since_a_moment_is_sent_by_itself(start: Start, tmp_path: Path) -> None:
    here, there = start("-e", "vm1=8M", "-e", "vm2=8M"), start()
    for name in ("vm1", "vm2"):
        fill(here, name, *(half_random(number) for number in range(500)))
    here.run("snapshot", "--all", "monday")
    full, later = tmp_path / "full", tmp_path / "later"
    assert send(here, full, "vm1@monday", "vm2@monday").returncode == 0
    fill(here, "vm1", noise(7), at=BLOCK)
    here.run("snapshot", "--all", "tuesday")
    done = send(here, later, "vm1@tuesday", "vm2@tuesday", "--since", "monday", "--json")
    report = json.loads(done.stderr)
    assert (report["blocks"], report["objects"]) == (1, 1)
    assert later.stat().st_size < full.stat().st_size / 100
    refused = receive(there, later)
    assert refused.returncode == 1
    assert "holds what changed in 'vm1@tuesday' since 'vm1@monday'" in refused.stderr
    assert names(there) == []
    assert receive(there, full).returncode == 0
    assert receive(there, later).returncode == 0
    for name in ("vm1@tuesday", "vm2@tuesday"):
        assert content_of(there, name, 8 * MIB) == content_of(here, name, 8 * MIB)
    # From there it goes on: what was received is a base as well.
    assert send(there, tmp_path / "on", "vm1@tuesday", "--since", "monday").returncode == 0
    assert (tmp_path / "on").stat().st_size < 2 * BLOCK


def test_a_snapshot_that_was_written_is_no_base_any_more(start: Start, tmp_path: Path) -> None:
    here, there = start("-e", "vm1=1M"), start()
    fill(here, "vm1", text(1))
    here.run("snapshot", "vm1", "monday")
    send(here, tmp_path / "full", "monday")
    receive(there, tmp_path / "full")
    fill(here, "vm1", text(2), at=BLOCK)
    here.run("snapshot", "vm1", "tuesday")
    assert send(here, tmp_path / "later", "tuesday", "--since", "monday").returncode == 0
    there.run("exports", "change", "monday", "--no-read-only")
    fill(there, "monday", text(9))
    there.run("exports", "change", "monday", "--read-only")
    assert "no read-only disk with that content" in receive(there, tmp_path / "later").stderr
    assert names(there) == ["monday"]


def test_mistakes_are_told_in_a_sentence(start: Start, tmp_path: Path) -> None:
    server = start("-e", "disk=1M")
    assert send(server, tmp_path / "x").returncode == 2
    assert send(server, tmp_path / "x", "disk", "--all").returncode == 2
    for beside in (("disk",), ("--all",), ("--since", "monday")):
        assert send(server, tmp_path / "x", "--resume", "token", *beside).returncode == 2
    assert send(server, tmp_path / "x", "none").returncode == 4
    done = send(server, tmp_path / "x", "disk", "--since", "monday")
    assert (done.returncode, "no snapshot 'monday' or 'disk@monday'" in done.stderr) == (4, True)
    for content, says in ((b"garbage" * 100, "this is no nbdzram stream"), (b"", "the stream is empty")):
        (tmp_path / "garbage").write_bytes(content)
        done = receive(server, tmp_path / "garbage")
        assert (done.returncode, says in done.stderr) == (1, True)
    send(server, tmp_path / "x", "disk")
    done = receive(server, tmp_path / "x", "--pool", "none", "--prefix", "new-")
    assert (done.returncode, "there is no pool 'none'" in done.stderr) == (4, True)
    done = receive(server, tmp_path / "x", "--prefix", "a\nb")
    assert (done.returncode, "cannot be offered" in done.stderr) == (1, True)
    beyond = layout.export_body(replace(layout.read_export(memoryview(EXPORT)), bounds=Bounds(iops=1 << 40)))
    end = struct.pack("<IIQQQ", 1, 0, 0, 0, 0)
    (tmp_path / "x").write_bytes(forged((1, HEADER), (2, POOL), (3, beyond), (7, end)))
    done = receive(server, tmp_path / "x", "--prefix", "new-")
    assert (done.returncode, "'disk' cannot be offered: 1099511627776 is not" in done.stderr) == (1, True)
    assert names(server) == ["disk"]


def test_a_stream_is_not_written_to_a_terminal_nor_read_from_one(start: Start) -> None:
    server = start("-e", "disk=1M")
    ours, theirs = pty.openpty()
    try:
        for words in (["send", "disk"], ["receive"]):
            done = subprocess.run(
                command(server, *words),
                stdin=theirs,
                stdout=theirs,
                stderr=subprocess.PIPE,
                check=False,
                env=clean_environment(),
            )
            assert done.returncode == 1
            assert b"terminal" in done.stderr
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_receive_that_is_ended_in_the_middle_leaves_nothing(
    start: Start, tmp_path: Path, how: signal.Signals
) -> None:
    here, there = start("-e", "disk=8M"), start()
    fill(here, "disk", *(noise(number) for number in range(1000)))
    path = tmp_path / "stream"
    send(here, path, "disk")
    stream = path.read_bytes()
    process = subprocess.Popen(
        command(there, "receive"), stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, env=clean_environment()
    )
    assert process.stdin is not None
    process.stdin.write(stream[: len(stream) // 2])
    process.stdin.flush()
    until(lambda: objects(there) > 100)
    assert names(there) == []
    process.send_signal(how)
    process.wait(timeout=PATIENCE_SECONDS)
    process.stdin.close()
    until(lambda: objects(there) == 0)
    assert receive(there, path).returncode == 0
    assert content_of(there, "disk", 8 * MIB) == content_of(here, "disk", 8 * MIB)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_send_that_is_ended_in_the_middle_leaves_no_copy(start: Start, how: signal.Signals) -> None:
    server = start("-e", "disk=8M")
    fill(server, "disk", *(noise(number) for number in range(2000)))
    process = subprocess.Popen(
        command(server, "send", "disk"), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=clean_environment()
    )
    assert process.stdout is not None
    process.stdout.read(100_000)
    fill(server, "disk", bytes(8 * MIB))
    assert objects(server) == 2000  # the copy holds them
    process.send_signal(how)
    process.wait(timeout=PATIENCE_SECONDS)
    process.stdout.close()
    until(lambda: objects(server) == 0)


def test_a_server_that_stops_ends_a_stream_that_nobody_reads(start: Start) -> None:
    server = start("-e", "disk=8M")
    fill(server, "disk", *(noise(number) for number in range(2000)))
    process = subprocess.Popen(
        command(server, "send", "disk"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environment()
    )
    assert process.stdout is not None
    process.stdout.read(100_000)
    assert server.stop() == 0
    stream, told = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode != 0
    assert told
    with pytest.raises(plain_reader.NotAStreamError):
        plain_reader.contents(stream)


def test_a_stream_gives_way_when_writes_find_no_room(start: Start) -> None:
    server = start("-e", "disk=8M", "--mem-limit", "9M")
    fill(server, "disk", *(noise(number) for number in range(1500)))
    process = subprocess.Popen(
        command(server, "send", "disk"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environment()
    )
    assert process.stdout is not None
    process.stdout.read(100_000)
    with Client(server.socket, "disk") as client, pytest.raises(Exception, match=r"(?i)space|28"):
        for number in range(1500):
            client.write(number * BLOCK, random.Random(-number - 1).randbytes(BLOCK))

    def write_again() -> bool:
        with Client(server.socket, "disk") as client:
            try:
                client.write(0, b"".join(random.Random(-number - 1).randbytes(BLOCK) for number in range(1500)))
            except Exception:  # noqa: BLE001 - still no room
                return False
        return True

    until(write_again)  # and nobody has read any more of the stream
    process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode != 0


# -- over a kill, and from a file ------------------------------------------------------------------------------------


def test_a_server_killed_while_it_receives_has_nothing_of_it(start: Start, tmp_path: Path) -> None:
    here = start("-e", "disk=8M")
    fill(here, "disk", *(noise(number) for number in range(1000)))
    path = tmp_path / "stream"
    send(here, path, "disk")
    state = tmp_path / "state"
    there = start("--state-dir", str(state), "-e", "own=1M")
    process = subprocess.Popen(
        command(there, "receive"), stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, env=clean_environment()
    )
    assert process.stdin is not None
    process.stdin.write(path.read_bytes()[:-100])
    process.stdin.flush()
    until(lambda: objects(there) > 900)
    there.process.kill()
    there.process.communicate()
    process.stdin.close()
    process.wait(timeout=PATIENCE_SECONDS)
    with Pool(path=str(state / "default.pool")) as pool:
        assert [disk.name for disk in pool.all_disks()] == ["own"]
        assert pool.stats().objects == 0
        pool.check()


def test_a_server_begins_with_what_a_stream_holds(start: Start, tmp_path: Path) -> None:
    here = start("-e", "vm1=1M", "-e", "vm2=1M")
    fill(here, "vm1", text(1), noise(2))
    fill(here, "vm2", noise(3))
    here.run("snapshot", "vm1", "monday")
    path = tmp_path / "stream"
    send(here, path, "--all")
    state = ("--state-dir", str(tmp_path / "state"))
    there = start("--restore", str(path), "-e", "vm1=2M", *state)
    assert sorted(names(there)) == ["monday", "vm1", "vm2"]
    for name in ("vm1", "vm2", "monday"):
        assert content_of(there, name)[: 2 * BLOCK] == content_of(here, name)[: 2 * BLOCK]
    assert json.loads(there.run("exports", "list", "--json").out)[0]["size_bytes"] == 2 * MIB
    fill(there, "vm1", text(9))
    assert there.stop() == 0
    again = start("--restore", str(path), "-e", "vm1=2M", *state)
    assert content_of(again, "vm1")[:BLOCK] == text(9)
    again.wait_for_log("is not restored")


def test_a_start_from_a_stream_that_is_cut_is_refused(tmp_path: Path, start: Start) -> None:
    here = start("-e", "disk=1M")
    fill(here, "disk", noise(1))
    path = tmp_path / "stream"
    send(here, path, "disk")
    path.write_bytes(path.read_bytes()[:-1])
    done = subprocess.run(
        [*NBDZRAM, "serve", "-U", str(tmp_path / "s"), "--control", str(tmp_path / "c"), "--metrics", "off",
         "--restore", str(path)],
        capture_output=True, text=True, check=False, env=clean_environment(), timeout=PATIENCE_SECONDS,
    )  # fmt: skip
    assert done.returncode == 1
    assert f"cannot restore {path}: the stream ends in the middle" in done.stderr


def test_clones_cost_next_to_nothing_in_a_stream_and_where_it_arrives(start: Start, tmp_path: Path) -> None:
    here, there = start("-e", "golden=32M"), start()
    fill(here, "golden", *(half_random(number, 700) for number in range(4000)))
    alone, all_of_them = tmp_path / "alone", tmp_path / "all"
    send(here, alone, "golden")
    for number in range(20):
        here.run("clone", "golden", f"vm{number}")
        fill(here, f"vm{number}", text(number), at=number * MIB)
    send(here, all_of_them, "--all")
    assert all_of_them.stat().st_size < alone.stat().st_size * 1.02
    assert receive(there, all_of_them).returncode == 0
    for name in ("golden", "vm7", "vm19"):
        assert content_of(there, name, 32 * MIB) == content_of(here, name, 32 * MIB)
    sizes = [json.loads(server.run("stat", "--json").out)["pools"][0] for server in (here, there)]
    assert sizes[1]["metadata"] < sizes[0]["metadata"] * 1.1
    assert sizes[1]["mem_used_total"] < sizes[0]["mem_used_total"] * 1.1


def test_a_server_that_was_killed_begins_from_its_newest_checkpoint(start: Start, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    flags = ("-e", "disk=1M", "--checkpoint", str(kept), "--checkpoint-interval", "1s")
    server = start(*flags)
    fill(server, "disk", noise(1))
    until(lambda: len(list(kept.glob("*.stream"))) == 1)
    fill(server, "disk", noise(2), at=BLOCK)
    until(lambda: len(list(kept.glob("*.stream"))) == 2)
    server.process.kill()
    server.process.communicate()
    again = start(*flags)
    assert content_of(again, "disk")[: 2 * BLOCK] == noise(1) + noise(2)
    again.wait_for_log("1 export restored from the checkpoint of 20")
    fill(again, "disk", noise(3), at=2 * BLOCK)
    assert again.stop() == 0
    assert content_of(start(*flags), "disk")[2 * BLOCK : 3 * BLOCK] == noise(3)


def test_what_a_client_flushed_is_there_when_the_server_was_killed(start: Start, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    flags = ("-e", "disk=1M", "--checkpoint", str(kept), "--durability", "flush")
    server = start(*flags)
    with Client(server.socket, "disk") as client:
        for number in range(20):
            client.write(number * BLOCK, noise(number))
            client.flush()
    server.process.kill()
    server.process.communicate()
    again = start(*flags)
    assert content_of(again, "disk")[: 20 * BLOCK] == b"".join(noise(number) for number in range(20))
    again.wait_for_log("of the journal behind the checkpoint")
    with Client(again.socket, "disk") as client:
        client.flush()
    assert "FLUSH is on the disk when it is answered" in again.run("doctor").out


def test_a_durable_pool_without_a_directory_is_a_mistake() -> None:
    words = [*NBDZRAM, "serve", "-e", "disk=1M", "--durability", "flush", "--check-config"]
    told = subprocess.run(words, capture_output=True, text=True, env=clean_environment(), check=False)
    assert told.returncode == 2
    assert "needs a disk to write to; name one with --checkpoint DIR" in told.stderr


def test_an_export_that_is_received_again_is_bound_as_it_is_declared(start: Start, tmp_path: Path) -> None:
    """Whatever the stream says; and what is remembered holds, behind a restart too, until it is declared anew."""
    server = start("-e", "disk=8M,quota=1M,iops=7")
    send(server, tmp_path / "x", "disk")
    assert server.run("exports", "remove", "disk", "--yes").code == 0
    assert receive(server, tmp_path / "x").returncode == 0
    (export,) = json.loads(server.run("stat", "--json").out)["exports"]
    assert (export["bounds"]["quota_bytes"], export["bounds"]["iops"]) == (MIB, 7)


def test_what_is_received_again_is_opened_to_nobody_whom_its_declaration_keeps_out(
    start: Start, tmp_path: Path
) -> None:
    """A backup of before the list was declared admits everyone. Of a list that it has itself nothing is lost."""
    file = tmp_path / "disks.toml"
    file.write_text('[exports.open]\nsize = "1M"\n[exports.listed]\nsize = "1M"\nallow_addresses = ["10.0.0.0/8"]\n')
    file.write_text(file.read_text() + '[exports.image]\nsize = "1M"\nread_only = true\niops = 70\n')
    server = start("-c", str(file))
    assert server.run("exports", "change", "listed", "--allow-everyone").code == 0
    assert server.run("exports", "change", "open", "--allow-address", "10.1.0.0/16").code == 0
    assert server.run("exports", "change", "image", "--no-read-only", "--iops", "50").code == 0
    send(server, tmp_path / "before", "--all")
    again = start("-c", str(file))
    for name in ("open", "listed", "image"):
        assert again.run("exports", "remove", name, "--yes").code == 0
    assert receive(again, tmp_path / "before").returncode == 0
    exports = {one["name"]: one for one in json.loads(again.run("stat", "--json").out)["exports"]}
    assert exports["listed"]["allow_addresses"] == ["10.0.0.0/8"]
    assert exports["open"]["allow_addresses"] == ["10.1.0.0/16"]
    assert exports["image"]["read_only"]
    assert exports["image"]["bounds"]["iops"] == 70
    told = "holds as declared, and not as it was sent"
    again.wait_for_log(f"of the export 'image' {told}")
    assert f"of the export 'open' {told}" not in again.log.read_text()


def test_a_name_that_is_declared_private_is_given_to_no_disk_that_is_not(start: Start, tmp_path: Path) -> None:
    """Whoever reads the configuration believes that its blocks are shared with nobody's."""
    server = start("-e", "secret=8M,private", "-e", "other=8M")
    send(server, tmp_path / "private", "secret")
    send(server, tmp_path / "shared", "other")
    for name in ("secret", "other"):
        assert server.run("exports", "remove", name, "--yes").code == 0
    assert receive(server, tmp_path / "shared").returncode == 0
    says = "the export 'secret' is declared private"
    for words in (["clone", "other", "secret"], ["exports", "rename", "other", "secret"]):
        done = server.run(*words)
        assert (done.code, says in done.err) == (1, True), done
    assert server.run("exports", "rename", "other", "et").code == 0
    send(server, tmp_path / "et", "et")
    received = receive(server, tmp_path / "et", "--prefix", "secr")
    assert (received.returncode, says in received.stderr) == (1, True), received.stderr
    assert receive(server, tmp_path / "private").returncode == 0
    assert sorted(names(server)) == ["et", "secret"]
