"""Destroying asks on a terminal, wants a flag elsewhere, and always says what would be lost."""

from __future__ import annotations

import json
import os
import pty
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.nbd_client import Client
from tests.unit.cli.conftest import NBDZRAM, Done, Server, clean_environment
from tests.unit.cli.test_send_receive import until

MIB = 1 << 20
Start = Callable[..., Server]


def filled(server: Server, export: str = "disk", *, at: int = 0, size: int = MIB) -> None:
    with Client(server.socket, export) as client:
        client.write(at, random.randbytes(size))


def names(server: Server) -> list[str]:
    return [export["name"] for export in json.loads(server.run("exports", "list", "--json").out)]


def on_terminal(server: Server, answer: str, *words: str) -> Done:
    """One command on a terminal where somebody answers."""
    ours, theirs = pty.openpty()
    os.write(ours, answer.encode())
    process = subprocess.run(
        [*NBDZRAM, *words, "--control", str(server.control)],
        stdin=theirs,
        capture_output=True,
        text=True,
        env=clean_environment(),
        timeout=60,
        check=False,
    )
    os.close(ours)
    os.close(theirs)
    return Done(process.returncode, process.stdout, process.stderr)


def test_a_removal_without_a_terminal_wants_to_be_told_that_it_is_meant(start: Start) -> None:
    server = start("-e", "disk=4M")
    filled(server)
    refused = server.run("exports", "remove", "disk")
    assert (refused.code, names(server)) == (1, ["disk"])
    assert "to remove disk destroys 1M of content, with blocks that nothing else has (1M compressed)" in refused.err
    assert "say --yes if that is meant" in refused.err
    assert server.run("exports", "remove", "disk", "--yes").out == "removed disk\n"
    assert names(server) == []


def test_what_is_empty_goes_without_a_question(start: Start) -> None:
    server = start("-e", "disk=4M")
    assert server.run("exports", "reset", "disk").code == 0
    assert server.run("exports", "remove", "disk").code == 0


def test_what_a_clone_has_too_is_told_and_what_a_checkpoint_keeps_is_no_copy(start: Start, tmp_path: Path) -> None:
    server = start("-e", "disk=4M")
    filled(server)
    server.run("clone", "disk", "copy")
    asked = server.run("exports", "remove", "disk")
    assert "destroys 1M of content, and no block that nothing else has; say --yes" in asked.err
    kept = start("-e", "disk=4M", "--checkpoint", str(tmp_path / "kept"), "--checkpoint-interval", "1")
    filled(kept)
    until(lambda: any((tmp_path / "kept").glob("*.stream")))
    asked = kept.run("exports", "remove", "disk")
    assert "to remove disk destroys 1M of content; say --yes" in asked.err


def test_on_a_terminal_it_is_asked_and_no_means_no(start: Start) -> None:
    server = start("-e", "disk=4M")
    filled(server)
    declined = on_terminal(server, "n\n", "exports", "remove", "disk")
    assert (declined.code, names(server)) == (1, ["disk"])
    assert declined.err.endswith("nbdzram: that was not agreed to, and nothing is done\n")
    assert "to remove disk destroys 1M of content" in declined.err
    assert "; go on? [y/N]" in declined.err
    left = on_terminal(server, "\x04", "exports", "remove", "disk")  # Ctrl-D; the shell's prompt stood behind it
    assert (left.code, names(server), left.err.rpartition("?")[2]) == (130, ["disk"], " [y/N]: \n")
    agreed = on_terminal(server, "y\n", "exports", "remove", "disk")
    assert (agreed.code, agreed.out, names(server)) == (0, "removed disk\n", [])


def test_a_dry_run_tells_and_does_nothing(start: Start) -> None:
    server = start("-e", "disk=4M", "-e", "two=1M")
    filled(server, at=2 * MIB)
    for verb, words in (("remove", ()), ("reset", ()), ("resize", ("1M",))):
        for flags in ((), ("--yes",), ("--force",)):
            done = server.run("exports", verb, "disk", *words, "--dry-run", *flags)
            told = "shrink" if verb == "resize" else verb
            assert (done.code, done.out.startswith(f"to {told} disk destroys 1M of content")) == (0, True), done
    for size in ("4M", "8M"):
        grown = server.run("exports", "resize", "disk", size, "--dry-run")
        assert grown.out == "to resize disk destroys nothing that is stored\n"
    told = json.loads(server.run("exports", "remove", "disk", "two", "--dry-run", "--json").out)
    assert [(loss["name"], loss["stored_bytes"]) for loss in told] == [("disk", MIB), ("two", 0)]
    listed: list[dict[str, Any]] = json.loads(server.run("exports", "list", "--json").out)
    assert [(export["size_bytes"], export["stored_bytes"]) for export in listed] == [(4 * MIB, MIB), (MIB, 0)]


def test_several_names_at_once_and_a_wrong_one_among_them_ends_it_before_anything_is_done(start: Start) -> None:
    server = start("-e", "one=1M", "-e", "two=1M", "-e", "three=1M")
    assert server.run("exports", "remove", "one", "gone").code == 4
    assert names(server) == ["one", "two", "three"]
    assert server.run("exports", "reset", "one", "two").out.splitlines() == [
        "reset one (1M in pool default)",
        "reset two (1M in pool default)",
    ]
    assert server.run("exports", "remove", "one", "two").out == "removed one\nremoved two\n"
    assert json.loads(server.run("exports", "remove", "three", "--json").out) == {"removed": "three"}
    for name in ("p", "q"):
        server.run("pools", "add", name)
    assert json.loads(server.run("pools", "remove", "p", "q", "--json").out) == [{"removed": "p"}, {"removed": "q"}]


def test_attached_clients_are_named_and_force_ends_them(start: Start) -> None:
    server = start("-e", "disk=4M")
    filled(server)
    client = Client(server.socket, "disk")
    with client.socket:  # the server ends it: nobody says goodbye
        refused = server.run("exports", "remove", "disk", "--yes")
        assert refused.code == 1
        assert f"1 client is attached (unix client (pid {os.getpid()}, uid {os.geteuid()})); detach" in refused.err
        assert "--force" in refused.err
        assert "attached: unix client" in server.run("exports", "remove", "disk", "--dry-run").out
        (attached,) = json.loads(server.run("clients", "list", "--json").out)
        assert (attached["export"], attached["requests"]) == ("disk", 0)
        assert server.run("exports", "reset", "disk", "--force").code == 0
        assert json.loads(server.run("clients", "list", "--json").out) == []


def test_clients_are_listed_and_ended_by_number_or_export(start: Start) -> None:
    server = start("-e", "disk=4M", "-e", "two=1M")
    one, two = Client(server.socket, "disk"), Client(server.socket, "disk")
    with one.socket, two.socket, Client(server.socket, "two"):
        one.write(0, b"x" * 4096)
        one.read(0, 4096)
        listed = json.loads(server.run("clients", "list", "--json").out)
        assert [(client["number"], client["export"], client["requests"]) for client in listed] == [
            (1, "disk", 2),
            (2, "disk", 0),
            (3, "two", 0),
        ]
        assert listed[0]["idle_seconds"] >= 0
        assert listed[0]["in_flight"] == 0
        assert server.run("clients", "disconnect", "2").out == "disconnected 2\n"
        gone = server.run("clients", "disconnect", "2")
        assert (gone.code, "no client 2 is attached; `nbdzram clients list`" in gone.err) == (1, True)
        one.read(0, 512)
        assert server.run("clients", "disconnect", "--export", "disk").out == "disconnected 1\n"
        assert server.run("clients", "list", "--export", "disk").out == "no client is attached to disk\n"
        nobody = server.run("clients", "disconnect", "--export", "disk")
        assert (nobody.code, nobody.out) == (0, "no client is attached to disk\n")
        assert server.run("clients", "disconnect", "--export", "disk", "--json").out == "[]\n"
        wrong = server.run("clients", "disconnect", "--export", "dsik")
        assert (wrong.code, "there is no export 'dsik'; there are: disk, two" in wrong.err) == (4, True)
        assert server.run("clients", "list", "--export", "dsik").code == 4
        (alone,), (listed,) = (
            json.loads(server.run(*words, "--json").out) for words in (("clients",), ("clients", "list"))
        )
        assert {**alone, "idle_seconds": 0} == {**listed, "idle_seconds": 0}
        table = server.run("clients", "list").out.splitlines()
        assert table[0].split()[:3] == ["CLIENT", "PEER", "EXPORT"]
        assert [line.split()[0] for line in table[1:]] == ["3"]
    assert server.run("clients", "disconnect").code == 2


def test_rules_are_shown_and_changed_at_run_time(start: Start) -> None:
    server = start("-e", "disk=4M")
    assert server.run("exports", "change", "disk").code == 2
    wrong = server.run("exports", "change", "disk", "--allow-address", "10.0.0.1/8")
    assert (wrong.code, "has host bits set" in wrong.err) == (2, True)
    words = ("--allow-address", "10.0.0.0/8", "--allow-address", "fd00::/8", "--allow-certificate", "vm1.example")
    assert server.run("exports", "change", "disk", *words, "--read-only").out == "changed disk (4M in pool default)\n"
    (listed,) = json.loads(server.run("exports", "list", "--json").out)
    assert (listed["admits"], listed["allow_addresses"], listed["allow_certificates"], listed["read_only"]) == (
        "listed",
        ["10.0.0.0/8", "fd00::/8"],
        ["vm1.example"],
        True,
    )
    assert "10.0.0.0/8 fd00::/8 cert:vm1.example" in server.run("exports", "list").out
    assert json.loads(server.run("stat", "--json").out)["exports"][0]["allow_addresses"] == ["10.0.0.0/8", "fd00::/8"]
    server.run("exports", "change", "disk", "--allow-everyone", "--allow-certificate", "vm2.example", "--no-read-only")
    (listed,) = json.loads(server.run("exports", "list", "--json").out)
    assert (listed["allow_addresses"], listed["allow_certificates"], listed["read_only"]) == (
        [],
        ["vm2.example"],
        False,
    )
    server.run("exports", "change", "disk", "--allow-everyone")
    assert " everyone" in server.run("exports", "list").out
    server.run("exports", "add", "more", "1M", "--allow-address", "10.0.0.0/8")
    assert json.loads(server.run("exports", "list", "--json").out)[1]["allow_addresses"] == ["10.0.0.0/8"]


def test_acts_are_in_the_log_and_with_a_state_directory_in_a_file(start: Start, tmp_path: Any) -> None:
    server = start("-e", "disk=4M", "--state-dir", str(tmp_path / "state"))
    server.run("exports", "add", "scratch", "1M")
    server.run("exports", "remove", "gone")
    server.run("stat")
    server.wait_for_log("exports.add")
    noted = [json.loads(line) for line in (tmp_path / "state" / "audit.log").read_text().splitlines()]
    assert [(line["method"], line["uid"], line["result"].split(":")[0]) for line in noted] == [
        ("exports.add", os.geteuid(), "done")
    ]
    refused = server.run("exports", "remove", "gone", "--force")
    assert refused.code == 4
    server.wait_for_log('exports.remove name="gone"')
