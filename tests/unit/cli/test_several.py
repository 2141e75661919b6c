"""Commands that take several names or numbers: all of them are looked at first, and what is done is told.

And limits that are set below what is there already."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from nbdzram import __version__
from nbdzram.cli import version
from nbdzram.cli.common import one_by_one
from nbdzram.cli.objects import SCHEMA
from nbdzram.errors import NoSuchExport, UserError
from tests.support.nbd_client import Client
from tests.unit.cli.conftest import Server, run

Start = Callable[..., Server]


def names(server: Server, what: str = "exports") -> list[str]:
    return [one["name"] for one in json.loads(server.run(what, "list", "--json").out)]


@pytest.mark.parametrize("flags", [(), ("--yes",), ("--yes", "--json")])
@pytest.mark.parametrize("verb", ["remove", "reset"])
def test_no_disk_goes_where_one_of_several_has_clients(start: Start, verb: str, flags: tuple[str, ...]) -> None:
    """Also not the one before it, and not without a question, as when the server was left to refuse."""
    server = start("-e", "one=1M", "-e", "two=1M", "-e", "three=1M")
    with Client(server.socket, "one") as client:
        client.write(0, b"x" * 4096)
    attached = Client(server.socket, "two")
    with attached.socket:  # the server ends it: nobody says goodbye
        done = server.run("exports", verb, "one", "two", "three", *flags)
        assert (done.code, done.out) == (1, "")
        who = f"unix client (pid {os.getpid()}, uid {os.geteuid()})"
        assert f"the export two has clients ({who}): nothing is done; let them detach, or end them with" in done.err
        assert names(server) == ["one", "two", "three"]
        with Client(server.socket, "one") as client:
            assert client.read(0, 4096) == b"x" * 4096
        assert "to remove one destroys 4K" in server.run("exports", "remove", "one", "two", "--dry-run").out
        done = server.run("exports", verb, "one", "two", "--force")
        assert (done.code, len(done.out.splitlines())) == (0, 2)


def test_no_pool_goes_where_one_of_several_is_held_or_not_there(start: Start) -> None:
    server = start("-e", "disk=1M")
    for name in ("empty", "held"):
        server.run("pools", "add", name)
    server.run("exports", "add", "other", "1M", "--pool", "held")
    done = server.run("pools", "remove", "empty", "held")
    assert (done.code, done.out) == (1, "")
    assert "nothing is done: the pool 'held' holds the export 'other'; remove its exports first" in done.err
    assert server.run("pools", "remove", "empty", "gone").code == 4
    assert names(server, "pools") == ["default", "empty", "held"]


@pytest.mark.parametrize("flags", [(), ("--json",)])
@pytest.mark.parametrize("order", [("empty", "declared"), ("declared", "empty")])
def test_no_pool_goes_where_one_of_several_is_declared(
    start: Start, order: tuple[str, ...], flags: tuple[str, ...]
) -> None:
    """Whether one is declared only the server knows: it is asked of all before one goes."""
    server = start("-e", "disk=1M", "-e", "other=1M,pool=declared", "--pool", "declared=64M")
    server.run("exports", "remove", "other")
    for name in ("empty", "held"):
        server.run("pools", "add", name)
    server.run("exports", "add", "another", "1M", "--pool", "held")
    done = server.run("pools", "remove", *order, "held", *flags)
    assert (done.code, done.out) == (1, "")
    assert (
        "nothing is done: the pool 'declared' is declared in the configuration; remove it there and restart; "
        "the pool 'held' holds the export 'another'" in done.err
    )
    assert names(server, "pools") == ["declared", "default", "empty", "held"]
    assert server.run("pools", "remove", *order).code == 1
    assert server.run("pools", "remove", "empty").out == "removed empty\n"


@pytest.mark.parametrize("as_json", [False, True])
def test_what_fails_all_the_same_ends_it_and_those_before_are_told(
    capsys: pytest.CaptureFixture[str], *, as_json: bool
) -> None:
    """In JSON a list, also where one alone would be an object: of those before there may be more."""

    def act(name: str) -> dict[str, str]:
        if name == "gone":
            raise UserError(name)
        return {"removed": name}

    with pytest.raises(UserError, match="gone"):
        one_by_one(
            ("one", "gone", "two"), act, lambda done: f"removed {done['removed']}", as_json=as_json, as_list=True
        )
    told = capsys.readouterr().out
    assert (json.loads(told) if as_json else told) == ([{"removed": "one"}] if as_json else "removed one\n")


def test_of_many_names_some_are_told_and_how_many_more_there_are(start: Start) -> None:
    told = ", ".join(f"vm{number}" for number in range(10))
    for count, more in ((10, ""), (11, ", and 1 more")):
        error = NoSuchExport.among([f"vm{number}" for number in range(count)], "gone")
        assert str(error) == f"there is no export 'gone'; there are: {told}{more}"
    server = start(*(word for number in range(12) for word in ("-e", f"vm{number}=1M")))
    for words in (("exports", "remove", "gone", "--yes"), ("attach", "gone"), ("snapshot", "gone", "it")):
        done = server.run(*words)
        assert (done.code, done.err) == (4, f"nbdzram: there is no export 'gone'; there are: {told}, and 2 more\n")


def test_no_client_is_ended_where_one_of_several_is_not_attached(start: Start) -> None:
    server = start("-e", "disk=1M", "-e", "two=1M")
    with Client(server.socket, "disk") as one, Client(server.socket, "two") as two:
        for wrong, told in (
            (("1", "99"), "client 99 is not there: nothing is done; `nbdzram clients list` shows who is attached"),
            (("--export", "disk", "1", "2"), "of disk the client 2 is not there: nothing is done"),
            (("--export", "disk", "2"), "of disk the client 2 is not there: nothing is done"),
            (("98", "1", "99"), "client 98 is not there; client 99 is not there: nothing is done"),
        ):
            done = server.run("clients", "disconnect", *wrong)
            assert (done.code, done.out, told in done.err) == (1, "", True), done
        for client in (one, two):
            assert client.read(0, 512) == bytes(512)


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_a_limit_below_what_is_stored_is_warned_of_where_it_is_set(start: Start, flags: tuple[str, ...]) -> None:
    server = start("-e", "disk=4M")
    with Client(server.socket, "disk") as client:
        for block in range(512):
            client.write(block * 4096, block.to_bytes(2, "big") * 512 + random.Random(block).randbytes(3072))
    done = server.run("pools", "limit", "default", "1200K", *flags)
    assert (done.code, "nbdzram: warning: the pool 'default' takes " in done.err) == (0, True), done
    assert ", over its limit of 1.2M: what is stored stays, and writes that need memory fail; fold it" in done.err
    assert bool(flags) == done.out.startswith("{")
    server.wait_for_log("WARNING nbdzram.server: the pool 'default' takes ")
    stats = json.loads(server.run("pools", "list", "--json").out)[0]["stats"]
    done = server.run("pools", "limit", "default", str(stats["mem_used_total"] + stats["metadata"] - 4096), *flags)
    assert "the pool 'default' takes " in done.err, "its tables count"
    for harmless in (("limit", "default", "64M"), ("limit", "default", "0"), ("verify", "default", "off")):
        done = server.run("pools", *harmless, *flags)
        assert (done.code, done.err) == (0, "")
    done = server.run("exports", "change", "disk", "--quota", "1M", *flags)
    assert done.code == 0
    assert "the export 'disk' stores 2M, over its quota of 1M: what is stored stays" in done.err
    for bound in (("--quota", "2M"), ("--quota", "off"), ("--iops", "5")):
        done = server.run("exports", "change", "disk", *bound, *flags)
        assert (done.code, done.err) == (0, "")


@pytest.mark.parametrize(
    "words", [("pools", "limit", "default", "1020K"), ("pools", "add", "small", "--mem-limit", "8")]
)
def test_a_limit_too_small_for_anything_is_warned_of_where_it_is_set(start: Start, words: tuple[str, ...]) -> None:
    done = start("-e", "disk=1M").run(*words)
    assert (done.code, "bytes, too few to write anything; a number without a suffix is bytes" in done.err) == (0, True)


def test_a_reload_says_which_limit_is_below_what_is_stored(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "nbdzram.toml"
    file.write_text('[exports.disk]\nsize = "4M"\n[pools.default]\nmem_limit = "64M"\n')
    server = start("-c", str(file))
    with Client(server.socket, "disk") as client:
        client.write(0, random.Random(1).randbytes(2 << 20))
    file.write_text('[exports.disk]\nsize = "4M"\n[pools.default]\nmem_limit = "2M"\n')
    told = server.run("reload").out
    assert "pool default changed (mem_limit): the pool 'default' takes 2." in told
    assert "over its limit of 2M: what is stored stays" in told
    file.write_text('[exports.disk]\nsize = "4M"\n[pools.default]\nmem_limit = "2M"\nverify = false\n')
    assert server.run("reload").out == "pool default changed (verify)\n"


def test_what_is_not_said_of_a_disk_that_is_added_again_is_as_it_is_declared(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "nbdzram.toml"
    file.write_text('[exports.disk]\nsize = "1M"\nprivate = true\nread_only = true\n')
    server = start("-c", str(file))
    control = ("--control", str(server.control))
    assert run(*control, "exports", "remove", "disk", "--yes").code == 0  # the socket before the group of commands
    assert run("exports", *control, "add", "disk", "1M").code == 0  # and between that and its command
    (told,) = json.loads(server.run("exports", "--json").out)
    assert (told["private"], told["read_only"]) == (True, True)


def test_a_program_says_its_own_version_and_that_of_the_server(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start("-e", "disk=1M")
    monkeypatch.setattr(version, "__version__", "0.0.1")
    told = CliRunner().invoke(version.command, ["--control", str(server.control)]).output
    assert told == f"nbdzram 0.0.1\nserver  {__version__}\n"
    told = CliRunner().invoke(version.command, ["--control", str(server.control), "--json"]).output
    assert json.loads(told) == {"schema": SCHEMA, "version": "0.0.1", "server_version": __version__}
    told = CliRunner().invoke(version.command, ["--control", "/nowhere/nbdzram.sock"]).output
    assert told.startswith("nbdzram 0.0.1\nserver  no server answers on /nowhere/nbdzram.sock (No such file")


def test_a_blank_at_a_names_end_is_seen_in_every_sentence(start: Start) -> None:
    """As in tables. There it was a blank more, or none at the end of a line."""
    server = start("-e", "x=1M")
    words = [
        ("exports", "add", "disk ", "1M"),
        ("exports", "change", "disk ", "--description", "d"),
        ("exports", "resize", "disk ", "2M"),
        ("exports", "reset", "disk ", "--dry-run"),
        ("exports", "reset", "disk "),
        ("snapshot", "disk ", "copy"),
        ("clients", "list", "--export", "disk "),
        ("clients", "disconnect", "--export", "disk "),
        ("clients", "disconnect", "7", "--export", "disk "),
        ("stat", "--memory", "disk "),
        ("stat", "nope"),
        ("rm", "nope", "disk "),
        ("snapshot", "--all", "m "),
        ("exports", "rename", "disk ", "disk"),
        ("exports", "rename", "disk", "disk "),
        ("exports", "rollback", "disk ", "copy", "--yes"),
        ("rm", "disk "),
    ]
    for command in words:
        done = server.run(*command)
        told = done.out + done.err
        assert "'disk " in told or "'x@m '" in told, (command, told)
        assert "disk " not in re.sub(r"'disk (@m )?'|\bdisk (\(|to)", "", told), (command, told)
