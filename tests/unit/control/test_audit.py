"""Every administrative act is told: who, what, and what came of it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nbdzram.control import audit as audit_module
from nbdzram.control.audit import FILE_NAME, Act, Audit, Caller
from nbdzram.control.client import ControlClient
from nbdzram.control.methods import Method, Parameter, method_table
from nbdzram.control.server import ControlServer
from nbdzram.errors import UserError

CALLER = Caller(uid=1000, pid=42, socket="/run/nbdzram/nbdzram.sock")


async def look(*_: Any) -> str:
    return "seen"


async def change(given: Any, _: Any) -> None:
    if given["name"] == "locked":
        raise UserError("it is locked")
    if given["name"] == "broken":
        raise RuntimeError("a bug of ours")


METHODS = {"look": Method({}, look, is_act=False), "change": Method({"name": Parameter(str)}, change)}


def noted(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / FILE_NAME).read_text().splitlines()]


def serve_to(directory: Path, act: Any, audit: Audit | None = None) -> None:
    async def story() -> None:
        server = ControlServer(directory / "control.sock", METHODS, audit or Audit(directory))
        await server.start()
        try:
            await asyncio.to_thread(act)
        finally:
            await server.stop()

    asyncio.run(story())


def test_an_act_is_noted_with_who_and_what_came_of_it_and_a_look_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def act() -> None:
        with ControlClient(tmp_path / "control.sock") as client:
            client.call("look")
            client.call("change", name="disk")
            for name in ("locked", "broken"):
                with pytest.raises(UserError):
                    client.call("change", name=name)

    with caplog.at_level(logging.INFO, logger="nbdzram.audit"):
        serve_to(tmp_path, act)
    done = noted(tmp_path)
    assert [(line["method"], line["params"], line["result"]) for line in done] == [
        ("change", {"name": "disk"}, "done"),
        ("change", {"name": "locked"}, "failed: it is locked"),
        ("change", {"name": "broken"}, "failed: a bug of ours"),
    ]
    for line in done:
        assert (line["uid"], line["pid"], line["socket"]) == (
            os.geteuid(),
            os.getpid(),
            str(tmp_path / "control.sock"),
        )
        assert line["time"].endswith("Z")
    told = [record.getMessage() for record in caplog.records if record.name == "nbdzram.audit"]
    assert len(told) == 3
    assert told[0].startswith(f"uid {os.geteuid()} (pid {os.getpid()}) on {tmp_path}/control.sock: ")
    assert 'change name="disk"' in told[0]
    assert stat.S_IMODE((tmp_path / FILE_NAME).stat().st_mode) == 0o600


def test_every_method_that_changes_something_is_an_act() -> None:
    table = method_table(object(), object())  # type: ignore[arg-type]
    looks = {name for name, method in table.items() if not method.is_act}
    assert looks == {"status", "usage", "clients", "runs", "streams", "exports.lose", "pools.lose"} & set(table)


def test_a_line_is_one_line_whatever_a_name_has_in_it() -> None:
    act = Act(CALLER, "exports.remove", {"name": "a\nb\x1b[2J"}, "failed: no 'a\nb'", 0.5)
    assert act.line(0.0).count("\n") == 1
    assert json.loads(act.line(0.0))["params"] == {"name": "a\nb\x1b[2J"}
    assert "\x1b" not in act.sentence()
    assert len(Act(CALLER, "x", {"description": "d" * 4096}, "done", 0).sentence()) < 700


def test_an_act_is_noted_when_its_asker_went_away(tmp_path: Path) -> None:
    async def story() -> None:
        begun, end = asyncio.Event(), asyncio.Event()

        async def slow(*_: Any) -> None:
            begun.set()
            await end.wait()

        server = ControlServer(tmp_path / "control.sock", {"slow": Method({}, slow)}, Audit(tmp_path))
        await server.start()
        _, writer = await asyncio.open_unix_connection(tmp_path / "control.sock")
        writer.write(b'{"jsonrpc":"2.0","method":"slow","id":1}\n')
        await begun.wait()
        writer.close()
        stopping = asyncio.create_task(server.stop())
        await asyncio.sleep(0)
        end.set()
        await stopping
        assert noted(tmp_path)[0]["result"] == "done"

    asyncio.run(story())


@pytest.mark.parametrize("reads", [True, False])
def test_what_is_performed_while_a_server_stops_is_answered_to_whoever_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: bool
) -> None:
    """Who asked to take over was told nothing, where the server came to rest before the audit file had its line; and it
    started, beside the server."""
    if not reads:
        monkeypatch.setattr("nbdzram.control.server.ANSWERING_SECONDS", 0.0)

    async def story() -> None:
        begun, end = asyncio.Event(), asyncio.Event()

        async def slow(*_: Any) -> str:
            begun.set()
            await end.wait()
            return "done" if reads else "x" * (8 << 20)

        server = ControlServer(tmp_path / "control.sock", {"slow": Method({}, slow)}, Audit(tmp_path))
        await server.start()
        reader, writer = await asyncio.open_unix_connection(tmp_path / "control.sock")
        idle, another = await asyncio.open_unix_connection(tmp_path / "control.sock")
        writer.write(b'{"jsonrpc":"2.0","method":"slow","id":1}\n')
        await begun.wait()
        stopping = asyncio.create_task(server.stop())
        await asyncio.sleep(0)
        end.set()
        if reads:
            assert json.loads(await reader.readline())["result"] == "done"
        await stopping
        assert await idle.read() == b""
        for connection in (writer, another):
            connection.close()

    asyncio.run(story())


def test_a_file_that_cannot_be_written_is_told_once_and_stops_no_act(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / FILE_NAME).mkdir()

    def act() -> None:
        with ControlClient(tmp_path / "control.sock") as client:
            client.call("change", name="one")
            client.call("change", name="two")

    with caplog.at_level(logging.INFO, logger="nbdzram.audit"):
        serve_to(tmp_path, act)
    assert caplog.text.count("acts are in this log only") == 1
    assert caplog.text.count("change name=") == 2


def test_a_file_that_could_be_written_again_is_told_of_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Once for each time that it broke, however many acts there are then."""
    file = tmp_path / FILE_NAME

    async def story() -> None:
        audit = Audit(tmp_path)
        for broken in range(1, 4):
            file.mkdir()
            for _ in range(2):
                await audit.note(Act(CALLER, "x", {}, "done", 0.0))
                assert caplog.text.count("acts are in this log only") == broken
            file.rmdir()
            await audit.note(Act(CALLER, "x", {}, "done", 0.0))
            file.unlink()

    asyncio.run(story())


def test_a_line_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    """Where the file system has room for a part of it, that would stand before the next one, and spoil it too."""
    code = (
        "import resource, sys; from pathlib import Path; from nbdzram.control.audit import _append\n"
        "path = Path(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))\n"  # the first 100 bytes find room
        "_append(path, 'a' * 59 + chr(10))\n"
        "try: _append(path, 'b' * 59 + chr(10))\n"
        "except OSError as error: print(error.strerror)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)\n"
        "_append(path, 'c' * 9 + chr(10))\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path / FILE_NAME)]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "File too large\n"
    assert (tmp_path / FILE_NAME).read_text() == f"{'a' * 59}\n{'c' * 9}\n"


def test_a_pipe_in_the_place_of_the_file_holds_up_no_act(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.mkfifo(tmp_path / FILE_NAME)

    async def story() -> None:
        await Audit(tmp_path).note(Act(CALLER, "x", {}, "done", 0.0))

    asyncio.run(story())
    assert "acts are in this log only" in caplog.text


def test_a_link_in_the_place_of_the_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("")
    (tmp_path / FILE_NAME).symlink_to(tmp_path / "precious")

    async def story() -> None:
        await Audit(tmp_path).note(Act(CALLER, "x", {}, "done", 0.0))

    asyncio.run(story())
    assert (tmp_path / "precious").read_text() == ""


def test_the_file_is_bounded_and_keeps_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_module, "AUDIT_BYTES", 1000)

    async def story() -> None:
        audit = Audit(tmp_path)
        for number in range(50):
            await audit.note(Act(CALLER, "x", {"number": number}, "done", 0.0))

    asyncio.run(story())
    assert noted(tmp_path)[-1]["params"] == {"number": 49}
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2000
