"""Strangers before they are attached: their places, their turns, and what they cannot take from anybody else."""

from __future__ import annotations

import ipaddress
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from nbdzram.config import Limits, TcpAddress
from nbdzram.server.descriptors import KEPT_DESCRIPTORS, places
from nbdzram.server.exports import Peer
from nbdzram.server.lobby import Lobby, Origin, origin_of
from tests.support.loop_client import WireClient
from tests.support.pki import Pki
from tests.support.tls_client import attach, leave, start_tls
from tests.unit.server.conftest import Play, Secure, Stage
from tests.wire import OPT_ABORT, OPT_GO, OPT_LIST, name_and_infos


@dataclass(eq=False)
class Stranger:
    origin: Origin
    present: bool = True

    def give_way(self) -> None:
        self.present = False


def arrive(lobby: Lobby, listener: str, source: str, count: int = 1) -> list[Stranger]:
    strangers = [Stranger(Origin(listener, source)) for _ in range(count)]
    for stranger in strangers:
        lobby.enter(stranger)
    return strangers


def came_from(address: ipaddress.IPv4Address | ipaddress.IPv6Address, *names: str) -> Origin:
    return origin_of("tcp", Peer("a client", address, certificate_names=frozenset(names)))


def lobby_of(places: int) -> Lobby:
    return Lobby(places, lambda callback: callback())


def test_a_newcomer_takes_the_place_of_the_oldest_of_the_source_with_the_most() -> None:
    lobby = lobby_of(5)
    few = arrive(lobby, "tcp", "192.0.2.1", 2)
    many = arrive(lobby, "tcp", "192.0.2.2", 3)
    arrive(lobby, "tcp", "192.0.2.3")
    assert [stranger.present for stranger in few] == [True, True]
    assert [stranger.present for stranger in many] == [False, True, True]
    assert len(lobby) == 5


def test_a_flood_on_one_listener_never_costs_another_listeners_guests_their_places() -> None:
    lobby = lobby_of(8)
    local = arrive(lobby, "unix", "local", 2)
    for number in range(100):
        arrive(lobby, "tcp", f"192.0.2.{number}")
    assert all(stranger.present for stranger in local)
    assert len(lobby) == 8


def test_who_left_takes_no_place_and_leaves_once() -> None:
    lobby = lobby_of(2)
    first, second = arrive(lobby, "tcp", "192.0.2.1", 2)
    lobby.leave(first)
    lobby.leave(first)
    arrive(lobby, "tcp", "192.0.2.2")
    assert second.present
    assert len(lobby) == 2


def test_one_customers_ipv6_addresses_are_one_source() -> None:
    one, two, other = map(ipaddress.ip_address, ("2001:db8::1", "2001:db8::ffff:2", "2001:db8:0:1::1"))
    assert came_from(one) == came_from(two) != came_from(other)
    mapped = [came_from(ipaddress.ip_address(f"::ffff:192.0.2.{number}")) for number in (1, 2)]
    assert mapped[0] != mapped[1]


def test_who_shows_a_certificate_is_another_source_than_its_address() -> None:
    """And several that show one are told apart by their addresses still."""
    nat, other = ipaddress.ip_address("192.0.2.1"), ipaddress.ip_address("192.0.2.2")
    sources = [came_from(nat), came_from(nat, "vm1"), came_from(nat, "vm2"), came_from(other, "vm1")]
    assert len(set(sources)) == len(sources)
    assert [source.certified for source in sources] == [False, True, True, True]


def test_each_account_of_the_machine_is_a_source_of_a_local_socket() -> None:
    mine, others = (origin_of("unix", Peer("unix client", local=True, account=f"uid {uid}")) for uid in (1000, 1001))
    assert mine != others


def test_strangers_take_one_step_a_turn_of_the_loop_in_order() -> None:
    turns: list[Callable[[], None]] = []
    taken: list[str] = []
    lobby = Lobby(8, turns.append)

    def step_of(name: str, more: int) -> Callable[[], None]:
        def step() -> None:
            taken.append(name)
            if more:
                lobby.call_soon(step_of(name, more - 1))

        return step

    lobby.call_soon(step_of("a", 2))
    lobby.call_soon(step_of("b", 1))
    for count in range(1, 6):
        assert len(turns) == count
        turns[-1]()
        assert len(taken) == count
    assert taken == ["a", "b", "a", "b", "a"]
    assert len(turns) == 5


def test_a_step_that_fails_does_not_end_the_others_turns() -> None:
    turns: list[Callable[[], None]] = []
    taken: list[str] = []
    lobby = Lobby(8, turns.append)
    lobby.call_soon(lambda: taken[1])  # type: ignore[arg-type]
    lobby.call_soon(lambda: taken.append("next"))
    with pytest.raises(IndexError):
        turns[0]()
    turns[1]()
    assert taken == ["next"]


def test_silent_strangers_are_cut_for_one_who_comes_to_be_served(play: Play) -> None:
    async def story(stage: Stage) -> None:
        silent = [await WireClient.connect(stage.path, client_flags=None) for _ in range(4)]
        client = await stage.client()
        assert await client.read(0, 512) == bytes(512)
        assert await silent[0].at_end()
        assert stage.server.handshake_failures["connection_limit"] == 1
        for one in (*silent, client):
            await one.close()

    play(story, Limits(connections=4))


def test_who_haggles_takes_no_place_of_those_who_are_attached(play: Play) -> None:
    async def story(stage: Stage) -> None:
        attached = [await stage.client() for _ in range(4)]
        stranger = await WireClient.connect(stage.path)
        assert (await stranger.option(OPT_LIST))[0].data[4:] == b"disk" + b"for tests"
        stranger.send(b"")
        assert (await stranger.option(OPT_ABORT))[-1].kind == 1
        for client in (*attached, stranger):
            await client.close()

    play(story, Limits(connections=4))


def test_the_last_places_are_for_other_sources(play: Play, stage: Stage) -> None:
    """Of 16 places one client's host gets 14, however long it asks; somebody else's first connection is served."""
    stage.config = replace(stage.config, tcp=(TcpAddress(port=0),))

    async def story(stage: Stage) -> None:
        many = [await stage.client() for _ in range(14)]
        refused = await WireClient.connect(stage.path)
        refused.send(b"")
        with pytest.raises(EOFError):  # asyncio.IncompleteReadError: closed without a reply
            await refused.option(OPT_GO, name_and_infos(b"disk"))
        hosting = stage.server._hosting
        assert hosting is not None
        tcp = Origin("nbd://127.0.0.1", "127.0.0.1")
        assert hosting.no_place_for(tcp) == ""
        assert "its share" in hosting.no_place_for(Origin("unix", f"uid {os.getuid()}"))
        last = list(hosting.attached.values())[-1]
        await many.pop().close()
        await last.closed
        many.append(await stage.client())
        assert await many[-1].read(0, 512) == bytes(512)
        for client in (*many, refused):
            await client.close()

    play(story, Limits(connections=16))


def test_a_crowd_at_the_same_address_shuts_nobody_out_who_has_a_certificate(
    play: Play, secure: Secure, pki: Pki
) -> None:
    """It is attached as often as it may be; and the last place is for nobody who shows none, wherever he comes from."""
    secure(client_ca=pki.authority)

    async def story(stage: Stage) -> None:
        crowd = [await stage.client() for _ in range(14)]
        friends = [await attach(stage.path, pki.client_context("vm1.example"))]
        hosting = stage.server._hosting
        assert hosting is not None
        (listener,) = stage.server.uris
        assert "a certificate" in hosting.no_place_for(Origin(listener, "uid 4711"))
        friends.append(await attach(stage.path, pki.client_context("vm2.example")))
        for friend in friends:
            assert await friend.read(0, 512) == bytes(512)
            await leave(friend)
        for client in crowd:
            await client.close()
        await hosting.wait_quiet()
        assert not hosting._attached_from, "who is gone takes a place"

    play(story, Limits(connections=16))


def test_who_has_shown_a_certificate_does_not_give_way_to_the_crowd_at_its_address(
    play: Play, secure: Secure, pki: Pki
) -> None:
    secure(client_ca=pki.authority)

    async def story(stage: Stage) -> None:
        friend = await WireClient.connect(stage.path)
        await start_tls(friend, pki.client_context("vm1.example"))
        crowd = [await WireClient.connect(stage.path, client_flags=None) for _ in range(9)]
        assert (await friend.option(OPT_LIST))[-1].kind == 1
        for client in crowd:
            await client.close()
        await leave(friend)

    play(story, Limits(connections=4))


@pytest.mark.parametrize("descriptors", [64, 300, 1024, 4096, 1 << 20])
def test_clients_never_get_the_descriptors_of_control_and_health(descriptors: int) -> None:
    haggling, attached = places(1024, descriptors)
    kept = min(KEPT_DESCRIPTORS, descriptors - descriptors // 4)
    assert haggling + attached <= max(descriptors - kept, 16)
    assert 4 <= haggling <= 1024
    assert 4 <= attached <= 1024
    assert (haggling, attached) == (1024, 1024) or descriptors < 2 * 1024 + KEPT_DESCRIPTORS


@pytest.mark.parametrize("flags", [None, 3])
def test_who_knocks_and_says_nothing_is_not_in_the_log(
    play: Play, caplog: pytest.LogCaptureFixture, flags: int | None
) -> None:
    """A health check does so every few seconds; of one who said something it is told that he left."""

    async def story(stage: Stage) -> None:
        client = await WireClient.connect(stage.path, client_flags=flags)
        if flags is not None:
            await client.option(3)
        await client.close()
        hosting = stage.server._hosting
        assert hosting is not None
        await hosting.wait_quiet()

    with caplog.at_level(logging.DEBUG, logger="nbdzram"):
        play(story)
    (told,) = (record for record in caplog.records if "disconnected in the handshake" in record.getMessage())
    assert told.levelno == (logging.DEBUG if flags is None else logging.INFO)


@pytest.mark.parametrize(
    ("descriptors", "shared"),
    [
        (16, (4, 4)),
        (64, (4, 12)),
        (256, (16, 48)),
        (300, (18, 57)),
        (1024, (192, 576)),
        (2400, (1024, 1024)),
        (1 << 30, (1024, 1024)),
    ],
)
def test_few_descriptors_are_shared_so(descriptors: int, shared: tuple[int, int]) -> None:
    """A quarter of them is for clients where the operator's would be all."""
    assert places(1024, descriptors) == shared
