"""The command line as a person uses it: a real server, real commands, their words and exit codes."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from nbdzram.cli import pools
from nbdzram.cli.announce import greeting
from nbdzram.cli.attach import missing
from nbdzram.cli.diagnosis import Kernel
from nbdzram.cli.hints import Address, Attachment
from nbdzram.cli.main import COMMANDS
from nbdzram.cli.processes import told_to_commands
from nbdzram.config import Dedup, TlsConfig
from nbdzram.control.client import ControlClient
from tests.support.nbd_client import Client
from tests.unit.cli.conftest import NBDZRAM, Server, clean_environment, make_certificate, run
from tests.unit.records import SERVER

Start = Callable[..., Server]


def test_a_newcomer_sees_where_it_is_and_how_to_attach(start: Start) -> None:
    server = start("-e", "disk=1G")
    text = "\n".join(server.greeting)
    assert "export   disk (1G in pool default)" in text
    assert f"NBD      nbd+unix:///?socket={server.socket}" in text
    assert f"control  {server.control}" in text
    assert "metrics  http://127.0.0.1:" in text
    assert f"nbd-client -unix {server.socket} /dev/nbd0 -name disk" in text
    assert f"qemu-img info 'nbd+unix:///disk?socket={server.socket}'" in text
    assert server.log.read_text() == ""  # the greeting says it all


def test_a_socket_that_has_no_path_is_served_and_no_command_is_made_of_it() -> None:
    """systemd binds ListenStream=@NAME so; the server had said that it is ready, and ended."""
    nameless, odd = "nbd+unix:///?socket=%00nbdzram", "nbd+unix:///?socket=/run/a%0Ab"
    lines = list(greeting(replace(SERVER, uris=(nameless, odd)), TlsConfig(), None, Path("c.sock")))
    assert [line.strip() for line in lines if "NBD" in line] == [f"NBD      {nameless}", f"NBD      {odd}"]
    assert "attach it with one of" not in lines
    told = told_to_commands(replace(SERVER, uris=(nameless, "nbd://127.0.0.1:7")), None, Path("c.sock"))
    assert (told["unixsocket"], told["port"]) == ("", "7")
    (_, *told_of) = greeting(replace(SERVER, uris=(odd, "nbd://127.0.0.1:7")), TlsConfig(), None, Path("c.sock"))
    assert "nbd-client 127.0.0.1 7" in "".join(told_of[told_of.index("attach it with one of") :])


def test_the_greeting_goes_from_what_there_is_to_where_it_is_to_how_to_attach(start: Start) -> None:
    """Each line begins as a reader's eye, or a script's pattern, expects it; what is served comes first."""
    greeting = start("-e", "root=1G", "-e", "swap=1M,ro").greeting
    assert [line.split()[0] for line in greeting] == [
        "nbdzram",
        "export",
        "export",
        "NBD",
        "metrics",
        "control",
        "attach",
        "nbd-client",
        "nbdinfo",
        "qemu-img",
    ]
    assert greeting[0].endswith(" is ready")
    assert [line.split()[1] for line in greeting[1:3]] == ["root", "swap"]
    assert all("root" in line for line in greeting[-3:]), "attach the first of them"


def test_a_server_without_disks_says_how_to_add_one(start: Start) -> None:
    assert "add one with: nbdzram exports add NAME SIZE" in "\n".join(start().greeting)


def test_a_greeting_fits_a_screen(start: Start) -> None:
    greeting = start(*(word for number in range(25) for word in ("-e", f"disk{number}=1M"))).greeting
    assert len([line for line in greeting if line.startswith("  export")]) == 20
    assert "           and 5 more: nbdzram exports list" in greeting


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_drains_and_ends_with_0_and_leaves_no_sockets(start: Start, number: signal.Signals) -> None:
    server = start("-e", "disk=1M")
    server.process.send_signal(number)
    server.process.communicate(timeout=60)
    assert server.process.returncode == 0
    assert not server.socket.exists()
    assert not server.control.exists()


def test_stat_prints_zramctls_columns(start: Start) -> None:
    server = start("-e", "disk=1G", "-e", "swap=2G", "--mem-limit", "512M")
    lines = server.run("stat").out.splitlines()
    assert lines[0].split() == [
        "NAME",
        "TYPE",
        "DISKSIZE",
        "DATA",
        "COMPR",
        "UNIQUE",
        "TOTAL",
        "MEM-LIMIT",
        "SAVED",
        "CLIENTS",
    ]
    assert lines[1].split()[:3] == ["default", "pool", "3G"]
    assert lines[2].split()[:3] == ["disk", "disk", "1G"]
    raw = server.run("stat", "-b", "-n", "--raw", "-o", "NAME,DISKSIZE,TOTAL,COMPR", "disk").out
    assert raw == f"disk {1 << 30} - 0\n"
    assert server.run("stat", "-n", "-b", "-o", "MEM-LIMIT").out.splitlines()[0] == str(512 << 20)


def test_snapshot_takes_all_exports_of_one_moment(start: Start) -> None:
    server = start("-e", "vm1=1M", "-e", "vm2=1M", "-e", "golden=1M,ro")
    done = server.run("snapshot", "--all", "monday")
    assert done.out == "snapshot vm1@monday is offered\nsnapshot vm2@monday is offered\n"
    told = json.loads(server.run("snapshot", "--all", "tuesday", "--json").out)
    assert [(export["name"], export["read_only"]) for export in told] == [("vm1@tuesday", True), ("vm2@tuesday", True)]
    assert server.run("snapshot", "--all", "monday").code == 1
    for wrong in (["vm1"], ["vm1", "copy", "--all", "monday"], []):
        assert server.run("snapshot", *wrong).code == 2


def test_stat_explains_where_memory_went(start: Start) -> None:
    server = start("-e", "disk=1M", "--mem-limit", "1M")
    told = server.run("stat", "--memory").out
    assert "nothing is stored yet" in told
    assert [line for line in told.splitlines() if len(line) > 80] == []
    assert server.run("stat", "-n", "--raw", "-o", "SAVED").out == "-\n-\n"
    block = bytes(range(256)) * 16
    with Client(server.socket, "disk") as client:
        client.write(0, block * 2 + random.Random(1).randbytes(4096))
    server.run("snapshot", "disk", "monday")
    with Client(server.socket, "disk") as client:
        client.write(8192, random.Random(2).randbytes(4096))
    told = json.loads(server.run("stat", "--json").out)
    (pool,) = told["pools"]
    disk, monday = (export["usage"] for export in told["exports"])
    assert disk["unique"] == monday["unique"] == 4096  # each has one block of random bytes to itself
    assert disk["shared"] == monday["shared"] > 0
    lines = [line.split() for line in server.run("stat", "--memory", "-b").out.splitlines()]
    figures = {" ".join(words[:-1]): int(words[-1]) for line in lines if (words := _until_number(line))}
    assert figures["needed by one export alone"] + figures["+ shared"] == figures["= compressed objects"]
    assert figures["= compressed objects"] + figures["+ fragmentation"] == figures["= memory used"]
    assert figures["= memory used"] + figures["+ metadata"] == figures["= taken in all"]
    assert figures["blocks stored"] - figures["= taken in all"] == figures["saved, metadata deducted"]
    spared = int(next(line[-1] for line in lines if "spares" in line))
    assert spared == disk["compressed"] + monday["compressed"] - pool["compr_data_size"]
    assert pool["saved"] == figures["saved, metadata deducted"] < 0
    assert "below zero: the tables take more" in server.run("stat", "--memory").out
    saved = server.run("stat", "-b", "-n", "--raw", "-o", "SAVED").out
    assert saved.splitlines()[0] == str(pool["saved"])
    of_one = server.run("stat", "--memory", "-b", "disk").out  # what others hold alone is neither its own nor shared
    rows = [words for line in of_one.splitlines() if (words := _until_number(line.split()))]
    assert {" ".join(words[:-1]): int(words[-1]) for words in rows} == {
        "blocks stored": disk["stored"],
        "needed by it alone": disk["unique"],
        "+ shared": disk["shared"],
        "= compressed blocks": disk["compressed"],
    }
    assert of_one.startswith("export disk of pool default\n")
    table = server.run("stat", "-b", "-n", "--raw", "-o", "NAME,UNIQUE,SHARED", "disk").out
    assert table == f"disk 4096 {disk['shared']}\n"


def _until_number(words: list[str]) -> list[str]:
    """A line's words up to its first figure; nothing if it has none."""
    for index, word in enumerate(words):
        if word.lstrip("-").isdigit():
            return words[: index + 1]
    return []


def test_mm_stat_and_io_stat_are_the_kernels_lines(start: Start) -> None:
    server = start("-e", "disk=1G", "--mem-limit", "1M")
    assert server.run("stat", "--mm-stat").out.split() == ["0", "0", "0", str(1 << 20), *["0"] * 6]
    assert server.run("stat", "--io-stat", "disk").out.split() == ["0"] * 4


def test_fold_compact_and_check_tell_what_they_did(start: Start) -> None:
    server = start("-e", "disk=1M")
    for kind in ("fold", "compact", "check"):
        done = server.run(kind)
        assert (done.code, done.err) == (0, "")  # no progress bar in a pipe
        assert done.out.startswith(f"{kind} of pool default: nothing to do in ")
    (report,) = json.loads(server.run("fold", "--dry-run", "--json").out)
    assert (report["kind"], report["dry_run"], report["result"]["objects_merged"]) == ("fold", True, 0)
    assert server.run("fold", "--pool", "gone").code == 4


def test_recompress_keeps_what_became_smaller_and_the_content(start: Start) -> None:
    server = start("-e", "disk=1M")
    text = b"".join(b"%08d the quick brown fox jumps over the lazy dog " % number for number in range(5000))[
        : 40 * 4096
    ]
    with Client(server.socket, "disk") as client:
        client.write(0, text)
        (report,) = json.loads(server.run("recompress", "--level", "9", "--json").out)
        assert report["result"]["objects_recompressed"] > 0
        assert report["after"]["compr_by_codec"]["zstd"] > 0
        assert report["after"]["compr_data_size"] < report["before"]["compr_data_size"]
        assert client.read(0, len(text)) == text
    (report,) = json.loads(server.run("recompress", "--huge-only", "--idle", "60", "--dictionary", "--json").out)
    assert report["result"]["objects_recompressed"] == 0


def test_resting_blocks_are_recompressed_by_itself(start: Start) -> None:
    server = start("-e", "disk=1M", "--recompress-interval", "1", "--recompress-age", "0")
    with Client(server.socket, "disk") as client:
        client.write(
            0, b"".join(b"%08d the quick brown fox jumps over the lazy dog " % number for number in range(2000))
        )
    deadline = time.monotonic() + 60
    while not json.loads(server.run("stat", "--json").out)["pools"][0]["compr_by_codec"]["zstd"]:
        assert time.monotonic() < deadline, server.log.read_text()
    with ControlClient(server.control) as control:
        (pool,) = control.status().pools
    assert {run.reason for run in pool.maintenance.recent if run.kind == "recompress"} == {"interval"}


def test_pools_come_change_and_go_at_run_time_and_after_a_restart(start: Start, tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    server = start("-e", "disk=1M", "--mem-limit", "1M", "--state-dir", state)
    added = server.run("pools", "add", "fast", "--mem-limit", "2M", "--dedup", "inline")
    assert added.out == "added fast (2M, dedup inline)\n"
    assert "there is a pool 'fast' already" in server.run("pools", "add", "fast").err
    assert server.run("exports", "add", "scratch", "1M", "--pool", "fast").code == 0
    assert server.run("pools", "limit", "default", "3M").out == "limited default (3M, dedup fold)\n"
    assert server.run("pools", "dedup", "fast", "fold").out == "changed fast (2M, dedup fold)\n"
    held = server.run("pools", "remove", "fast")
    assert (held.code, "holds the export 'scratch'" in held.err) == (1, True)
    assert server.stop() == 0
    server = start("-e", "disk=1M", "--mem-limit", "1M", "--state-dir", state)
    listed = {
        pool["name"]: pool["stats"]["mem_limit"] for pool in json.loads(server.run("pools", "list", "--json").out)
    }
    assert listed == {"default": 3 << 20, "fast": 2 << 20}
    assert server.run("exports", "remove", "scratch").code == 0
    assert server.run("pools", "remove", "fast").out == "removed fast\n"
    assert not (tmp_path / "state" / "fast.pool").exists()
    declared = server.run("pools", "remove", "default")
    assert (declared.code, "is declared in the configuration" in declared.err) == (1, True)
    assert server.run("pools", "limit", "gone", "1M").code == 4
    assert server.stop() == 0
    changed = start("-e", "disk=1M", "--mem-limit", "5M", "--state-dir", state)  # a new declaration wins
    assert changed.run("pools", "list").out.split()[-3:-1] == ["5M", "fold"]


def test_exports_come_grow_and_go_at_run_time(start: Start) -> None:
    server = start("-e", "disk=1M")
    assert (
        server.run("exports", "add", "scratch", "2M", "--description", "for trees").out
        == "added scratch (2M in pool default)\n"
    )
    assert server.run("exports", "resize", "scratch", "4M").out == "resized scratch (4M in pool default)\n"
    shrink = server.run("exports", "resize", "scratch", "1M")
    assert (shrink.code, "say --yes if that is meant" in shrink.err) == (1, True)
    assert server.run("exports", "resize", "scratch", "1M", "--yes").code == 0
    assert server.run("snapshot", "scratch", "monday").code == 0
    assert server.run("clone", "monday", "tuesday").code == 0
    listed = {export["name"]: export for export in json.loads(server.run("exports", "list", "--json").out)}
    assert list(listed) == ["disk", "scratch", "monday", "tuesday"]
    assert [export["read_only"] for export in listed.values()] == [False, False, True, False]
    assert listed["scratch"]["size_bytes"] == 1 << 20
    assert server.run("exports", "remove", "scratch").out == "removed scratch\n"
    assert server.run("exports", "reset", "tuesday").out == "reset tuesday (1M in pool default)\n"
    assert server.run("exports", "remove", "scratch").code == 4
    taken = server.run("exports", "add", "disk", "1M")
    assert (taken.code, "there is an export 'disk' already" in taken.err) == (1, True)


def test_what_a_disk_may_take_is_said_changed_and_shown(start: Start) -> None:
    """Where nothing is bound, lists have no column for it."""
    server = start("-e", "disk=1M,quota=64K")
    told = server.run("exports", "list").out.splitlines()
    assert "QUOTA" in told[0]
    assert "LIMITS" not in told[0]
    assert server.run("exports", "add", "new", "1M", "--iops", "500", "--bandwidth", "50M").code == 0
    assert server.run("exports", "change", "disk", "--quota", "off").code == 0
    heading, *rows = server.run("exports", "list").out.splitlines()
    assert ("QUOTA" in heading, "LIMITS" in heading) == (False, True)
    assert "500/s 50M/s" in next(row for row in rows if row.startswith("new"))
    columns = server.run("stat", "-n", "--raw", "-o", "NAME,QUOTA,LIMITS,THROTTLED", "new").out
    assert columns == "new none 500/s\\x2050M/s 0\n"
    wrong = server.run("exports", "change", "disk", "--quota", "100")
    assert (wrong.code, "neither off nor a size from 4096 bytes" in wrong.err) == (2, True)
    nothing = server.run("exports", "change", "disk")
    assert (nothing.code, "--bandwidth-burst" in nothing.err) == (2, True)


def test_a_disk_is_renamed_listed_and_removed_in_few_letters(start: Start) -> None:
    server = start("-e", "disk=1M")
    assert server.run("exports", "add", "scratch", "1M").code == 0
    assert server.run("exports", "rename", "scratch", "trees").out == "renamed scratch to trees\n"
    assert server.run("ls").out == server.run("exports", "list").out
    assert [export["name"] for export in json.loads(server.run("ls", "--json").out)] == ["disk", "trees"]
    assert server.run("rm", "trees").out == "removed trees\n"
    assert server.run("exports", "rename", "trees", "scratch").code == 4
    told = server.run("exports", "rename", "disk", "root").out.splitlines()
    assert told[0] == "renamed disk to root"
    assert told[1].startswith("disk is declared in the configuration: the next start makes it again, empty")


def test_a_disk_goes_back_to_a_snapshot_and_asks_first(start: Start) -> None:
    server = start("-e", "disk=1M,snapshots=1d,snapshots_keep=2")
    with Client(server.socket, "disk") as client:
        client.write(0, b"old" * 1024)
        server.run("snapshot", "disk", "monday")
        client.write(0, b"new" * 1024)
    refused = server.run("exports", "rollback", "disk", "monday")
    assert (refused.code, "to roll back disk destroys 4K of content" in refused.err) == (1, True)
    dry = server.run("exports", "rollback", "disk", "monday", "--dry-run")
    assert dry.out.startswith("to roll back disk destroys 4K")
    done = server.run("exports", "rollback", "disk", "monday", "--yes")
    assert done.out == "rolled back disk (1M in pool default)\n"
    with Client(server.socket, "disk") as client:
        assert client.read(0, 3) == b"old"


def test_run_time_changes_are_there_after_a_restart(start: Start, tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    server = start("-e", "disk=1M", "--state-dir", state)
    server.run("exports", "add", "scratch", "2M", "--description", "for trees")
    server.run("exports", "resize", "disk", "3M")
    server.run("exports", "add", "gone", "1M")
    server.run("exports", "remove", "gone")
    assert server.stop() == 0
    again = start("-e", "disk=1M", "--state-dir", state)
    listed = json.loads(again.run("exports", "list", "--json").out)
    assert [(e["name"], e["size_bytes"] >> 20, e["description"]) for e in listed] == [
        ("disk", 3, ""),
        ("scratch", 2, "for trees"),
    ]
    assert again.run("exports", "remove", "disk").code == 0
    assert again.stop() == 0
    last = start("-e", "disk=1M", "--state-dir", state)
    assert [e["name"] for e in json.loads(last.run("exports", "list", "--json").out)] == ["scratch"]
    last.wait_for_log("was removed at run time")
    assert [line.split()[1] for line in last.greeting if line.startswith("  export")] == ["scratch"]


def test_an_export_that_cannot_be_remembered_is_not_made(start: Start, tmp_path: Path) -> None:
    """Nor would it be there after a restart, or keep its name, or what it shares."""
    state = tmp_path / "state"
    server = start("-e", "disk=1M", "--state-dir", str(state))
    with Client(server.socket, "disk") as client:
        client.write(0, random.randbytes(4096))
        (state / "changes.new").mkdir()  # the file that the next change is written to cannot be made
        for words in (("clone", "disk", "other"), ("exports", "add", "other", "1M")):
            assert "cannot remember the change" in server.run(*words).err
        (state / "changes.new").rmdir()
        client.trim(0, 4096)
    assert json.loads(server.run("stat", "--json").out)["pools"][0]["objects"] == 0
    assert server.run("exports", "add", "other", "1M").code == 0


@pytest.mark.parametrize("behind", [(), ("--control", "behind.sock")])
def test_the_control_socket_that_stands_before_serve_is_its_own(tmp_path: Path, behind: tuple[str, ...]) -> None:
    """As before every command; and what stands behind the command wins."""
    there = tmp_path / (behind[1] if behind else "before.sock")
    words = (*behind[:1], str(there)) if behind else ()
    before = str(tmp_path / "before.sock")
    done = run(
        "--control", before, "serve", *words, "-e", "disk=1M", "--run", f'test "$(ls {tmp_path})" = {there.name}'
    )
    assert done.code == 0, done.err


def test_a_dead_server_is_3_and_an_unknown_export_is_4(start: Start, tmp_path: Path) -> None:
    done = run("stat", "--control", str(tmp_path / "nothing.sock"))
    assert (done.code, done.out) == (3, "")
    assert done.err.startswith("nbdzram: no server answers on ")
    server = start("-e", "disk=1M")
    done = server.run("stat", "default")
    assert (done.code, "is a pool and no export; --pool default shows it" in done.err) == (4, True)
    done = server.run("stat", "gone")
    assert (done.code, done.err) == (4, "nbdzram: there is no export 'gone'; there are: disk\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_each_commands_help_shows_an_example_in_80_columns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = run(name, "--help")
    assert done.code == 0
    assert f"nbdzram {name}" in done.out.split("Example", 1)[-1]
    assert [line for line in done.out.splitlines() if len(line) > 80] == []


def test_words_that_are_written_out_are_those_of_the_configuration() -> None:
    assert [choice.value for choice in Dedup] == list(pools.DEDUP.choices)


def test_systemd_is_told_when_the_server_is_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: Start
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        server = start("-e", "disk=1M")
        assert supervisor.recv(100) == b"FDSTORE=1\nFDPOLL=0\nFDNAME=pool-default"
        assert supervisor.recv(100) == b"READY=1"
        assert server.stop() == 0
        assert supervisor.recv(100) == b"STOPPING=1"


def on_stdin(tmp_path: Path, *arguments: str) -> tuple[Client, subprocess.Popen[bytes]]:
    """A client of `serve --stdin`: what inetd does, for one connection; standard error is the socket too."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "inetd.sock"))
        listening.listen(1)
        connected: list[Client] = []
        connecting = threading.Thread(target=lambda: connected.append(Client(tmp_path / "inetd.sock", "disk")))
        connecting.start()
        accepted, _ = listening.accept()
        with accepted:
            line = [*NBDZRAM, "serve", "--stdin", "-e", "disk=1M", *arguments]
            process = subprocess.Popen(
                line,
                stdin=accepted.fileno(),
                stdout=accepted.fileno(),
                stderr=accepted.fileno(),
                env=clean_environment(),
            )
        connecting.join(timeout=60)
        return connected[0], process


def test_under_inetd_it_serves_the_one_client_and_ends_when_it_leaves(tmp_path: Path) -> None:
    state, number = str(tmp_path / "state"), tmp_path / "pid"
    client, process = on_stdin(tmp_path, "--state-dir", state, "--pidfile", str(number))
    with client:
        client.write(4096, b"x" * 4096)
        assert number.read_text() == f"{process.pid}\n"
    assert process.wait(timeout=60) == 0
    assert not number.exists()
    (tmp_path / "inetd.sock").unlink()
    client, process = on_stdin(tmp_path, "--state-dir", state)
    with contextlib.closing(client):
        assert client.read(4096, 4096) == b"x" * 4096
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0


def test_stdin_that_is_no_socket_is_one_sentence() -> None:
    done = run("serve", "--stdin", "-e", "disk=1M")
    assert (done.code, "needs a connected socket" in done.err) == (1, True)
    done = run("serve", "--stdin", "--metrics", "off", "-e", "disk=1M")
    assert (done.code, "leave out --metrics" in done.err) == (2, True)


def test_hangup_looks_at_the_certificates_again(start: Start, tmp_path: Path) -> None:
    make_certificate(tmp_path, "first")
    files = ["--tls-certificate", str(tmp_path / "cert.pem"), "--tls-key", str(tmp_path / "key.pem")]
    server = start("-e", "disk=1M", "--tls", "on", *files)
    make_certificate(tmp_path, "second")
    server.process.send_signal(signal.SIGHUP)
    server.wait_for_log("TLS files reloaded")
    (tmp_path / "cert.pem").write_text("no certificate")
    server.process.send_signal(signal.SIGHUP)
    server.wait_for_log("keeping the old ones")
    assert server.run("stat").code == 0


def test_the_control_protocol_is_open_to_other_programs(start: Start) -> None:
    server = start("-e", "disk=1M")
    with ControlClient(server.control) as client:
        status = client.status()
    assert status.pid == server.process.pid
    assert [export.name for export in status.exports] == ["disk"]
    assert stat.S_IMODE(server.control.stat().st_mode) == 0o600


def test_attach_prints_the_line_that_nbd_client_wants(start: Start) -> None:
    server = start("-e", "disk=1M")
    assert server.run("attach", "disk").out == f"nbd-client -unix {server.socket} /dev/nbd0 -name disk\n"
    four = server.run("attach", "disk", "/dev/nbd3", "-C", "4", "--swap", "--nbdtab").out
    assert four == f"nbd3 {server.socket} disk unix,conns=4,swap,persist\n"
    assert server.run("attach", "gone").code == 4
    far = run("attach", "disk", "--uri", "nbd://[fd00::1]:10809", "--nbdtab")
    assert far.out == "nbd0 fd00::1 disk port=10809,persist\n"
    assert far.err == ""
    for uri in ("http://x", "nbd://x:port", "nbd://[::1"):
        wrong = run("attach", "disk", "--uri", uri)
        assert (wrong.code, "is not an NBD URI" in wrong.err) == (2, True)


@pytest.mark.parametrize(
    ("made", "hint"),
    [
        ("module", None),
        ("modules/kernel/drivers/block/nbd.ko.xz", "modprobe nbd"),
        ("modules/empty", "has no module nbd"),
    ],
)
def test_attach_says_what_the_kernel_lacks(tmp_path: Path, made: str, hint: str | None) -> None:
    (tmp_path / made).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / made).touch()
    kernel = Kernel(tmp_path / "module", tmp_path / "modules")
    told = missing(Attachment(Address.of("nbd://192.0.2.10"), "disk"), None, kernel)
    about_modules = [line for line in told if "module" in line]
    assert len(about_modules) == (hint is not None)
    assert hint is None or hint in about_modules[0]


def test_attach_to_a_server_with_tls_names_the_files_that_nbd_client_needs(tmp_path: Path) -> None:
    uri = ("--uri", "nbds://192.0.2.10")
    unsure = run("attach", "disk", *uri)
    assert unsure.out == "nbd-client 192.0.2.10 10809 /dev/nbd0 -name disk -cacertfile DIR/ca-cert.pem\n"
    assert "--tls-certificates names it" in unsure.err
    missing = run("attach", "disk", *uri, "--tls-certificates", str(tmp_path))
    assert (missing.code, f"{tmp_path} holds no ca-cert.pem" in missing.err) == (1, True)
    for name in ("ca-cert.pem", "client-cert.pem", "client-key.pem"):
        (tmp_path / name).touch()
    whole = run("attach", "disk", *uri, "--tls-certificates", str(tmp_path), "--nbdtab")
    files = f"cacertfile={tmp_path}/ca-cert.pem,certfile={tmp_path}/client-cert.pem,keyfile={tmp_path}/client-key.pem"
    assert whole.out == f"nbd0 192.0.2.10 disk port=10809,{files},persist\n"
    assert "--tls-certificates DIR" in run("attach", "disk", *uri, "--run").err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_completes_commands(shell: str) -> None:
    assert "_NBDZRAM_COMPLETE" in run("completion", shell).out


def test_exports_are_completed_from_the_running_server(start: Start) -> None:
    server = start("-e", "root=1M", "-e", "rescue=1M", "-e", "swap=1M")
    environment = clean_environment() | {
        "_NBDZRAM_COMPLETE": "bash_complete",
        "COMP_WORDS": "nbdzram snapshot r",
        "COMP_CWORD": "2",
        "NBDZRAM_CONTROL": str(server.control),
    }
    done = subprocess.run([*NBDZRAM], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.split() == ["plain,root", "plain,rescue"]
    pools = environment | {"COMP_WORDS": "nbdzram pools limit d", "COMP_CWORD": "3"}
    done = subprocess.run([*NBDZRAM], capture_output=True, text=True, check=False, env=pools)
    assert done.stdout.split() == ["plain,default"]
    nobody = environment | {"NBDZRAM_CONTROL": str(server.control.with_name("gone"))}
    done = subprocess.run([*NBDZRAM], capture_output=True, text=True, check=False, env=nobody)
    assert (done.stdout.strip(), done.stderr) == ("", "")


def test_a_completion_request_is_answered() -> None:
    environment = clean_environment() | {
        "_NBDZRAM_COMPLETE": "bash_complete",
        "COMP_WORDS": "nbdzram fo",
        "COMP_CWORD": "1",
    }
    done = subprocess.run([*NBDZRAM], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.split() == ["plain,fold"]
