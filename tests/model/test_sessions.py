"""Random valid sessions on a real socket, many requests in flight, against a plain bytearray.

The protocol lets a server answer out of order, so requests in flight never overlap where one of them writes; everything
else may happen at once. Small budgets drive the same sessions through the paths for short memory; a full pool answers
ENOSPC, and what it answered so must read as it was, or as it should have become, block by block.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdzram.config import Limits
from tests.model.reference import (
    BLOCK,
    CACHE,
    DF,
    ENOSPC,
    FLUSH,
    FUA,
    NO_HOLE,
    PAYLOAD_LEN,
    READ,
    REQ_ONE,
    STATUS,
    TRIM,
    WRITE,
    ZEROES,
    Expected,
    PlainExport,
    Request,
    check_status,
)
from tests.support.loop_client import WireClient
from tests.unit.server.conftest import Play, Stage, play, stage  # noqa: F401  (fixtures)

AREA = 3 << 20
IN_FLIGHT = 32

sessions = settings(
    max_examples=10,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)

places = st.one_of(st.integers(0, AREA - 1), st.integers(0, AREA // BLOCK - 1).map(lambda block: block * BLOCK))
sizes = st.one_of(
    st.sampled_from([1, 512, BLOCK, 8 << 10, 64 << 10, (64 << 10) + 1, 256 << 10, 1 << 20, AREA]),
    st.integers(1, 300_000),
)
flavours = st.sampled_from([b"\0", b"same", b"compressible " * 20, None])


@st.composite
def plans(draw: st.DrawFn) -> list[tuple[int, int, int, int, bytes]]:
    """(command, flags, offset, length, payload) that any server must carry out."""
    plan = []
    for number in range(draw(st.integers(1, 50))):
        command = draw(st.sampled_from([READ, READ, WRITE, WRITE, WRITE, TRIM, ZEROES, STATUS, FLUSH, CACHE]))
        offset = draw(places)
        length = min(draw(sizes), AREA - offset)
        flags = draw(st.sampled_from([0, FUA]))
        payload = b""
        if command == FLUSH:
            offset = length = 0
        elif command == WRITE:
            flavour = draw(flavours)
            pattern = flavour if flavour is not None else random.Random(draw(st.integers(0, 9))).randbytes(length)
            payload = (pattern * (length // len(pattern) + 1))[:length]
        elif command == ZEROES:
            flags |= draw(st.sampled_from([0, NO_HOLE]))
        elif command == STATUS:
            flags |= draw(st.sampled_from([0, REQ_ONE]))
        elif command == READ and length <= 64 << 10:
            flags |= draw(st.sampled_from([0, DF]))
        plan.append((command, flags, offset, length, payload))
        assert number < 50
    return plan


@dataclass
class Conversation:
    """Keeps requests in flight, and holds each answer to the model."""

    client: WireClient
    model: PlainExport
    style: int
    full: Callable[[Request], None] | None = None
    flying: dict[int, Expected] = field(default_factory=dict)
    before: dict[int, bytes] = field(default_factory=dict)

    async def carry_out(self, plan: list[tuple[int, int, int, int, bytes]]) -> None:
        for cookie, (command, flags, offset, length, payload) in enumerate(plan, 1):
            if command == STATUS and self.style == 0:
                continue
            plain = flags & ~DF if self.style == 0 else flags
            sent = plain | (PAYLOAD_LEN if self.style == 2 and command == WRITE else 0)
            request = Request(command, sent, cookie, offset, length, payload)
            while len(self.flying) >= IN_FLIGHT or any(
                _collide(request, other.request) for other in self.flying.values()
            ):
                await self.take()
            self.before[cookie] = bytes(self.model.content[offset : offset + length])
            self.flying[cookie] = self.model.answer(request)
            assert self.flying[cookie].error == 0
            self.client.ask(command, offset, length, flags=plain, cookie=cookie, payload=payload)
        while self.flying:
            await self.take()

    async def take(self) -> None:
        """One reply, to whichever request."""
        if self.style == 0:
            cookie, error, content, status = await self._take_simple()
        else:
            cookie, error, content, status = await self._take_chunks()
        expected = self.flying.pop(cookie)
        request = expected.request
        before = self.before.pop(cookie)
        if error == ENOSPC and self.full is not None and request.command in (WRITE, ZEROES):
            self.full(request)
            return
        assert error == 0, (error, request)
        if request.command == READ:
            assert content == expected.content
        if request.command == STATUS:
            assert [context for context, _ in status] == [1, 2]
            whole = bytearray(len(self.model.content))
            whole[request.offset : request.offset + request.length] = before
            check_status(status[0][1], request, bytes(whole), self.style)

    async def _take_simple(self) -> tuple[int, int, bytes, list[tuple[int, bytes]]]:
        head = await self.client.reader.readexactly(16)
        error, cookie = int.from_bytes(head[4:8]), int.from_bytes(head[8:])
        request = self.flying[cookie].request
        content = await self.client.reader.readexactly(request.length) if request.command == READ and not error else b""
        return cookie, error, content, []

    async def _take_chunks(self) -> tuple[int, int, bytes, list[tuple[int, bytes]]]:
        """Chunks of several replies may be mixed: collect until one of them is done."""
        while True:
            magic = int.from_bytes(await self.client.reader.readexactly(4))
            flags, kind, cookie, payload = await self.client._chunk(magic)
            expected = self.flying[cookie]
            parts = self._parts.setdefault(cookie, _Parts(bytearray(expected.request.length)))
            parts.add(kind, payload, expected.request.offset)
            if flags & 1:
                del self._parts[cookie]
                request = expected.request
                assert request.command != READ or parts.error or parts.covered == request.length
                assert not request.flags & DF or request.command != READ or parts.chunks <= 1
                return cookie, parts.error, bytes(parts.content), parts.status

    _parts: dict[int, _Parts] = field(default_factory=dict)


@dataclass
class _Parts:
    """The chunks of one reply so far."""

    content: bytearray
    covered: int = 0
    chunks: int = 0
    error: int = 0
    status: list[tuple[int, bytes]] = field(default_factory=list)

    def add(self, kind: int, payload: bytes, base: int) -> None:
        if kind in (1, 2):
            at = int.from_bytes(payload[:8]) - base
            run = payload[8:] if kind == 1 else bytes(int.from_bytes(payload[8:]))
            assert at >= 0
            assert at + len(run) <= len(self.content)
            self.content[at : at + len(run)] = run
            self.covered += len(run)
            self.chunks += 1
        elif kind in (5, 6):
            self.status.append((int.from_bytes(payload[:4]), payload))
        elif kind & 0x8000:
            self.error = int.from_bytes(payload[:4])


def _collide(one: Request, other: Request) -> bool:
    """They touch a block in common (partial blocks are read, changed and stored), and one of them changes it."""
    if not {one.command, other.command} & {WRITE, TRIM, ZEROES}:
        return False
    first, second = (
        (request.offset // BLOCK, -(-(request.offset + request.length) // BLOCK)) for request in (one, other)
    )
    return first[0] < second[1] and second[0] < first[1]


@pytest.mark.parametrize("budget", [Limits().total_bytes, 1 << 20, 2 << 20], ids=["ample", "none", "scarce"])
@pytest.mark.parametrize("style", [0, 1, 2], ids=["simple", "structured", "extended"])
def test_a_session_is_a_bytearray(play: Play, stage: Stage, style: int, budget: int) -> None:  # noqa: F811
    contexts = (b"base:allocation", b"nbdzram:fold") if style else ()

    @sessions
    @given(plans())
    def search(plan: list[tuple[int, int, int, int, bytes]]) -> None:
        async def story(stage: Stage) -> None:
            client = await stage.client(style=style, contexts=contexts)
            await client.call(TRIM, 0, AREA)
            model = PlainExport(bytearray(AREA), style, len(contexts))
            await Conversation(client, model, style).carry_out(plan)
            assert stage.disk.disk.read(0, AREA) == bytes(model.content)
            await client.close()

        play(story, Limits(total_bytes=budget))
        stage.pool.check()

    search()


@pytest.mark.parametrize("style", [0, 1, 2], ids=["simple", "structured", "extended"])
def test_a_full_pool_refuses_with_enospc_and_loses_nothing(play: Play, stage: Stage, style: int) -> None:  # noqa: F811
    """Each block that a refused write meant has its old or its new content; everything else is the model's."""

    @sessions
    @given(plans())
    def search(plan: list[tuple[int, int, int, int, bytes]]) -> None:
        refused = bytearray(AREA // BLOCK)

        def remember(request: Request) -> None:
            for block in range(request.offset // BLOCK, -(-(request.offset + request.length) // BLOCK)):
                refused[block] = 1

        async def story(stage: Stage) -> None:
            client = await stage.client(style=style)
            await client.call(TRIM, 0, AREA)
            model = PlainExport(bytearray(AREA), style, 0)
            await Conversation(client, model, style, full=remember).carry_out(
                [step for step in plan if step[0] not in (READ, STATUS)]
            )
            stored = stage.disk.disk.read(0, AREA)
            for block in range(AREA // BLOCK):
                if not refused[block]:
                    at = block * BLOCK
                    assert stored[at : at + BLOCK] == model.content[at : at + BLOCK], f"block {block}"
            await client.close()

        stage.pool.mem_limit = 256 << 10
        play(story)
        stage.pool.check()

    search()


def test_commands_on_two_connections_at_once_keep_to_their_places(play: Play) -> None:  # noqa: F811
    """Two sessions on one export, each in its own half, do not disturb each other."""

    async def story(stage: Stage) -> None:  # noqa: F811
        halves = []
        for half in range(2):
            client = await stage.client(style=half + 1)
            base = half * (AREA // 2)
            content = bytes([half + 1]) * (AREA // 2)
            halves.append((client, base, content))
        await asyncio.gather(*(client.write(base, content) for client, base, content in halves))
        found = await asyncio.gather(*(client.read(base, len(content)) for client, base, content in halves))
        assert found == [content for _, _, content in halves]
        for client, _, _ in halves:
            await client.close()

    play(story)
