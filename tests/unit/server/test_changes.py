"""Changes at run time: who is attached is dealt with first."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

from nbdzram.config import NOBODY, ExportConfig
from nbdzram.errors import NoSuchExport, UserError
from nbdzram.nbd.constants import Reply
from nbdzram.server.exports import Peer, PeerDirectory
from tests.support.loop_client import WireClient
from tests.unit.server.house import (
    GATE_SECONDS,
    MIB,
    UNCHANGED,
    GatedDisk,
    House,
    gate_disk,
    tell,
)
from tests.wire import name_and_infos, option


@pytest.mark.parametrize(
    ("method", "ask", "doing"),
    [
        ("clear", lambda changes: changes.reset_export("disk", force=False), "reset"),
        ("resize", lambda changes: changes.resize_export("disk", MIB, yes=True, force=False), "resized"),
    ],
)
def test_nobody_attaches_while_an_export_is_changing(house: House, method: str, ask: Any, doing: str) -> None:
    async def story() -> None:
        async with house.open() as changes:
            gate = gate_disk(house, method)
            change = asyncio.create_task(ask(changes))
            assert await asyncio.to_thread(gate.reached.wait, GATE_SECONDS)
            kind, text = await house.refusal()
            assert (kind, f"is being {doing}; try again" in text) == (Reply.ERR_UNKNOWN, True)
            house.service._exports.get("disk").disk = gate._disk
            gate.open.set()
            await change
            client = await house.client()
            await client.close()

    tell(story())


def test_a_client_that_found_the_export_before_the_change_does_not_attach_during_it(house: House) -> None:
    """The handshake asks again in the moment of attaching."""

    async def story() -> None:
        async with house.open():
            exports = house.service._exports
            export = exports.get("disk")
            peer = Peer("unix client", local=True)
            assert exports.attachable(export, peer) is export
            with export.change("reset"), pytest.raises(NoSuchExport, match="is being reset"):
                exports.attachable(export, peer)
            export.set_rules(access=NOBODY, read_only=False, description="")
            with pytest.raises(NoSuchExport, match="does not admit"):
                exports.attachable(export, peer)
            exports.remove("disk")
            with pytest.raises(NoSuchExport, match="was removed"):
                exports.attachable(export, peer)

    tell(story())


def test_a_connection_asks_again_in_the_moment_of_attaching(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its handshake was told before: turns of others may lie between."""

    async def story() -> None:
        async with house.open():
            export = house.service._exports.get("disk")
            monkeypatch.setattr(PeerDirectory, "find", lambda *_: export)
            with export.change("reset"):
                client = await WireClient.connect(house.path)
                client.send(option(7, name_and_infos(b"disk")))
                async with asyncio.timeout(GATE_SECONDS):  # one that attached would not be closed
                    await client.reader.read()
                await client.close()
            assert house.service.status().handshake_failures["unknown_export"] == 1
            assert not export.connections

    tell(story())


@pytest.mark.parametrize(
    ("ask", "verb"),
    [
        (lambda changes, force: changes.reset_export("disk", force=force), "reset"),
        (lambda changes, force: changes.resize_export("disk", MIB, yes=True, force=force), "shrink"),
        (lambda changes, force: changes.remove_export("disk", force=force), "remove"),
    ],
)
def test_what_destroys_names_the_clients_and_the_remedy_and_with_force_ends_them_first(
    house: House, ask: Any, verb: str
) -> None:
    async def story() -> None:
        async with house.open() as changes:
            client = await house.client()
            await client.write(4 * MIB, b"k" * 4096)
            with pytest.raises(UserError, match=rf"cannot {verb} .* 1 client is attached \(unix client.*--force"):
                await ask(changes, False)
            assert await client.read(4 * MIB, 4096) == b"k" * 4096
            other = await house.client()  # the refusal left the export open
            await ask(changes, True)
            for ended in (client, other):
                assert await ended.at_end()
                await ended.close()

    tell(story())


def test_nobody_is_attached_any_more_when_the_first_block_goes(house: House) -> None:
    async def story() -> None:
        async with house.open() as changes:
            client = await house.client()
            export = house.service._exports.get("disk")
            attached_when_cleared: list[int] = []
            disk = export.disk

            class Watched(GatedDisk):
                def __getattr__(self, name: str) -> Any:
                    if name == "clear":
                        attached_when_cleared.append(len(export.connections))
                    return getattr(disk, name)

            export.disk = Watched(disk, "")  # type: ignore[assignment]
            await changes.reset_export("disk", force=True)
            assert attached_when_cleared == [0]
            await client.close()

    tell(story())


def test_a_reset_leaves_nothing_also_of_a_last_block_that_is_none_whole(house: House) -> None:
    house.exports = (ExportConfig(name="disk", size_bytes=MIB + 512),)

    async def story() -> None:
        async with house.open() as changes:
            client = await house.client()
            await client.write(0, b"k" * (MIB + 512))
            assert house.found().stored_bytes == MIB + 4096
            await changes.reset_export("disk", force=True)
            assert house.found().stored_bytes == 0
            await client.close()

    tell(story())


IDENTITY = 5


@pytest.mark.parametrize(
    ("ask", "stays"),
    [
        pytest.param(lambda changes: changes.reset_export("disk", force=False), False, id="reset"),
        pytest.param(lambda changes: changes.resize_export("disk", 16 * MIB, yes=True, force=False), False, id="grown"),
        pytest.param(lambda changes: changes.resize_export("disk", MIB, yes=True, force=False), False, id="shrunk"),
        pytest.param(
            lambda changes: changes.resize_export("disk", 8 * MIB, yes=True, force=False), False, id="as large"
        ),
        pytest.param(
            lambda changes: changes.change_export("disk", **UNCHANGED | {"read_only": False}), False, id="open"
        ),
        pytest.param(
            lambda changes: changes.change_export("disk", **UNCHANGED | {"description": "a"}), True, id="told"
        ),
        pytest.param(lambda changes: changes.rename_export("disk", "other"), True, id="renamed"),
        pytest.param(lambda changes: changes.copy_export("disk", "copy", read_only=False), True, id="copied"),
        pytest.param(lambda changes: changes.lose_export("disk", 0), True, id="looked at"),
    ],
)
def test_what_makes_a_disk_other_content_ends_its_identity(house: House, ask: Any, *, stays: bool) -> None:
    """By which a stream says what it goes on from: with the former one, changes would be put upon other content."""

    async def story() -> None:
        async with house.open() as changes:
            await changes.change_export("disk", **UNCHANGED | {"read_only": True})
            disk = house.service._exports.get("disk").disk
            disk.identify(IDENTITY)
            await ask(changes)
            assert disk.identity == (IDENTITY if stays else 0)

    tell(story())


def test_a_loss_is_told_in_bytes_with_the_clients(house: House) -> None:
    async def story() -> None:
        async with house.open() as changes:
            client = await house.client()
            await client.write(0, os.urandom(MIB))
            await client.write(4 * MIB, os.urandom(64 << 10))
            whole = await changes.lose_export("disk", 0)
            assert (whole.stored_bytes, whole.clients) == (
                MIB + (64 << 10),
                (f"unix client (pid {os.getpid()}, uid {os.geteuid()})",),
            )
            assert whole.alone_bytes is not None
            assert whole.alone_bytes >= MIB
            assert (await changes.lose_export("disk", 2 * MIB)).stored_bytes == 64 << 10
            assert (await changes.lose_export("disk", 8 * MIB)).stored_bytes == 0
            await client.close()

    tell(story())


# -- a moment of all exports -------------------------------------------------------------------------------------------
