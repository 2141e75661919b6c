"""Option haggling: from the greeting to the transmission phase, without I/O.

The owner feeds bytes in with `receive` and takes events out with `next_event` until it returns None; each
event carries bytes to send. One event at a time: who does not read replies is not answered further.

    FLAGS --4 bytes--> OPTION --16 bytes--> DATA --length bytes--> (handler) --> OPTION
                        | |                       |--> LISTING --a slice an event--> OPTION
                        | |                       `--> UPGRADING --TLS runs, the rest is void--> OPTION
                        | `--> SKIP --length bytes, never stored--> (error) --> OPTION
                        `--> DONE (Enter: transmission; Close: the end)

Invariants
1. At most OPTION_DATA_LIMIT bytes of one option are ever held; a longer one is counted past and answered.
2. Each option gets exactly one final reply, except EXPORT_NAME, which the protocol gives none.
3. `Enter` is emitted once, and only for an export that the directory returned for this peer.
4. Behind STARTTLS and before TLS no byte is interpreted.

Section names are those of doc/proto.md (see constants).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum, StrEnum, auto
from typing import Protocol

from nbdzram.config import TlsMode
from nbdzram.errors import ProtocolError
from nbdzram.nbd.constants import (
    EXPORT_NAME_PADDING,
    INIT_MAGIC,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    STRING_LIMIT,
    ClientFlag,
    HandshakeFlag,
    Info,
    MetaContext,
    Option,
    Reply,
    ReplyStyle,
    TransmissionFlag,
)
from nbdzram.nbd.options import Refusal, parse_info, parse_meta_context, parse_name, text_bytes

OPTION_DATA_LIMIT = 32 << 10
"""Bytes of one option's data. A GO with a 4096-byte name and thousands of information types fits; a thousand
clients that all stop in the middle of the longest option hold 32 MiB together."""

LIST_SLICE = 8
"""Exports that one event of LIST looks at: ten or twenty microseconds, as long as a small request of a client."""

LIST_SLICE_BYTES = 32 << 10
"""Bytes of reply from which on such an event ends: names and descriptions have up to 4 KiB each."""

OPTIONS_A_LISTED = 8
"""Further options for each export of the longest list told: `qemu-nbd --list` asks three of each, `nbdinfo` two."""

PREFERRED_BLOCK_SIZE = 4096  # the engine's block: smaller writes read, change and store one
MINIMUM_BLOCK_SIZE = 1  # any alignment is served

_OPTION_HEADER = struct.Struct(">QII")
_REPLY_HEADER = struct.Struct(">QIII")
_GREETING = struct.pack(">QQH", INIT_MAGIC, OPTION_MAGIC, HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)
_KNOWN_CLIENT_FLAGS = int(ClientFlag.FIXED_NEWSTYLE | ClientFlag.NO_ZEROES)


class Failure(StrEnum):
    """Why a handshake ended without an export: the fixed set of causes that metrics count."""

    CLIENT_FLAGS = "client_flags"
    BAD_MAGIC = "bad_magic"
    TOO_MANY_OPTIONS = "too_many_options"
    UNKNOWN_EXPORT = "unknown_export"
    TLS_REQUIRED = "tls_required"
    TLS = "tls"
    PROTOCOL = "protocol"
    TIMEOUT = "timeout"
    VANISHED = "vanished"
    SHUTDOWN = "shutdown"
    CONNECTION_LIMIT = "connection_limit"


class HandshakeError(ProtocolError):
    """The handshake cannot go on; nothing more is sent, the connection ends."""

    def __init__(self, cause: Failure, message: str) -> None:
        super().__init__(message)
        self.cause = cause


class Offer(Protocol):
    """What the handshake must know of an export."""

    @property
    def name(self) -> str:
        """As EXPORT_NAME and GO ask for it."""

    @property
    def size_bytes(self) -> int:
        """Now; an export may be resized later."""

    @property
    def read_only(self) -> bool:
        """Writes get EPERM."""

    @property
    def description(self) -> str:
        """For people."""


class Directory(Protocol):
    """The exports that this peer may see."""

    def find(self, name: str) -> Offer | None:
        """The export of that name; the default one for the empty name."""

    def offers(self) -> Iterable[Offer | None]:
        """All of them, for LIST; None for one that is there and that this peer may not see."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What this server allows while haggling."""

    tls: TlsMode = TlsMode.OFF
    list_exports: bool = True
    option_limit: int = 128
    payload_limit: int = 64 << 20


@dataclass(frozen=True, slots=True)
class Terms:
    """What was settled: which export, in which style, with which metadata contexts."""

    offer: Offer
    style: ReplyStyle
    contexts: tuple[MetaContext, ...]
    flags: TransmissionFlag


@dataclass(frozen=True, slots=True)
class Send:
    """Send `reply` and go on. `complaint`: what an operator should read about it, most often nothing."""

    reply: bytes
    complaint: str = ""


@dataclass(frozen=True, slots=True)
class Upgrade:
    """Send `reply`, then speak TLS, then call `tls_started`."""

    reply: bytes


@dataclass(frozen=True, slots=True)
class Enter:
    """Send `reply`; the transmission phase begins."""

    reply: bytes
    terms: Terms


@dataclass(frozen=True, slots=True)
class Close:
    """Send `reply`, then close: the client asked for it."""

    reply: bytes


Event = Send | Upgrade | Enter | Close


class _State(Enum):
    FLAGS = auto()
    OPTION = auto()
    DATA = auto()
    SKIP = auto()
    LISTING = auto()
    UPGRADING = auto()
    DONE = auto()


def transmission_flags(offer: Offer, style: ReplyStyle, contexts: tuple[MetaContext, ...]) -> TransmissionFlag:
    """What INFO, GO and EXPORT_NAME say about an export: one answer for all three."""
    flags = (
        TransmissionFlag.HAS_FLAGS
        | TransmissionFlag.SEND_FLUSH
        | TransmissionFlag.SEND_FUA
        | TransmissionFlag.SEND_CACHE
        | TransmissionFlag.CAN_MULTI_CONN
    )
    if offer.read_only:
        flags |= TransmissionFlag.READ_ONLY
    else:
        flags |= TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES | TransmissionFlag.SEND_FAST_ZERO
    if style is not ReplyStyle.SIMPLE:
        flags |= TransmissionFlag.SEND_DF
    if style is ReplyStyle.EXTENDED and contexts:
        flags |= TransmissionFlag.BLOCK_STATUS_PAYLOAD
    return flags


class Handshake:
    """One connection's haggling. See the module's docstring."""

    def __init__(self, directory: Directory, policy: Policy, *, tls_active: bool = False) -> None:
        self.shutting_down = False
        self.listed = 0  # exports of the longest list told
        self._directory = directory
        self._policy = policy
        self._tls_active = tls_active
        self._state = _State.FLAGS
        self._buffer = bytearray()
        self._skip = 0
        self._fixed = False
        self._zeroes = True
        self._option_count = 0
        self._option = 0
        self._length = 0
        self._refusal: Refusal | None = None
        self._offers: Iterator[Offer | None] = iter(())
        self._told = 0
        self._style = ReplyStyle.SIMPLE
        self._contexts: tuple[MetaContext, ...] = ()
        self._contexts_of: str | None = None

    @property
    def greeting(self) -> bytes:
        """What the server says first."""
        return _GREETING

    @property
    def tls_active(self) -> bool:
        """TLS runs on this connection."""
        return self._tls_active

    def receive(self, chunk: bytes | memoryview) -> None:
        """Take bytes from the peer. Skipped option data is dropped here, never stored."""
        if self._state is _State.SKIP and self._skip:
            dropped = min(self._skip, len(chunk))
            self._skip -= dropped
            chunk = chunk[dropped:]
        self._buffer += chunk

    def next_event(self) -> Event | None:
        """The next thing to do, or None when more bytes are needed. Raises HandshakeError."""
        while True:
            step = _STEPS[self._state]
            if step is None:
                return None
            progressed, event = step(self)
            if event is not None or not progressed:
                return event

    def take_rest(self) -> bytes:
        """Bytes behind the option that ended the haggling: the first of the transmission phase."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        return rest

    def tls_started(self, directory: Directory) -> None:
        """TLS runs; `directory` is what the peer may see now.

        Raises HandshakeError for bytes in the clear behind STARTTLS: they may be an attacker's.
        """
        assert self._state is _State.UPGRADING
        if self._buffer:
            raise HandshakeError(Failure.TLS, f"{len(self._buffer)} bytes in the clear behind STARTTLS")
        self._tls_active = True
        self._directory = directory
        self._forget()
        self._state = _State.OPTION

    # ---- states ----

    def _read_flags(self) -> tuple[bool, Event | None]:
        """Section "Client flags": an unknown flag drops the connection."""
        if len(self._buffer) < 4:
            return False, None
        flags = int.from_bytes(self._take(4))
        if flags & ~_KNOWN_CLIENT_FLAGS:
            raise HandshakeError(
                Failure.CLIENT_FLAGS, f"client flags {flags:#x}: only {_KNOWN_CLIENT_FLAGS:#x} are known"
            )
        self._fixed = bool(flags & ClientFlag.FIXED_NEWSTYLE)
        self._zeroes = not flags & ClientFlag.NO_ZEROES
        self._state = _State.OPTION
        return True, None

    def _read_option(self) -> tuple[bool, Event | None]:
        if len(self._buffer) < _OPTION_HEADER.size:
            return False, None
        magic, self._option, self._length = _OPTION_HEADER.unpack(self._take(_OPTION_HEADER.size))
        if magic != OPTION_MAGIC:
            raise HandshakeError(Failure.BAD_MAGIC, f"option magic {magic:#018x} is not {OPTION_MAGIC:#018x}")
        self._option_count += 1
        limit = self._policy.option_limit + OPTIONS_A_LISTED * self.listed
        if self._option_count > limit:
            raise HandshakeError(Failure.TOO_MANY_OPTIONS, f"more than {limit} options in one handshake")
        if self._option == Option.ABORT:
            # Its data, of whatever length, is not waited for: section "Termination of the session".
            self._state = _State.DONE
            return True, Close(self._reply(Reply.ACK))
        self._refusal = self._admit()
        if self._refusal is None:
            self._state = _State.DATA
        else:
            self._state = _State.SKIP
            self._skip = self._length - len(self._take(min(self._length, len(self._buffer))))
        return True, None

    def _admit(self) -> Refusal | None:
        """Judge an option by its header alone. Raises HandshakeError where the protocol knows no reply."""
        name = _option_name(self._option)
        if self._option == Option.EXPORT_NAME:
            self._admit_export_name()
            return None
        if not self._fixed:
            raise HandshakeError(Failure.PROTOCOL, f"{name} from a client that did not set FIXED_NEWSTYLE")
        if self.shutting_down:
            return Refusal(Reply.ERR_SHUTDOWN, "the server is shutting down")
        if self._policy.tls is TlsMode.REQUIRE and not self._tls_active and self._option != Option.STARTTLS:
            return Refusal(Reply.ERR_TLS_REQD, "this server requires TLS: send STARTTLS first")
        if self._option not in _HANDLERS:
            return Refusal(Reply.ERR_UNSUP, f"{name} is not supported")
        if self._length > OPTION_DATA_LIMIT:
            return Refusal(
                Reply.ERR_TOO_BIG,
                f"{self._length} bytes of data for {name}: the limit is {OPTION_DATA_LIMIT}",
            )
        return None

    def _admit_export_name(self) -> None:
        """EXPORT_NAME has no error reply: what cannot be served ends the session (section "Option types")."""
        if self.shutting_down:
            raise HandshakeError(Failure.SHUTDOWN, "EXPORT_NAME while the server is shutting down")
        if self._policy.tls is TlsMode.REQUIRE and not self._tls_active:
            raise HandshakeError(Failure.TLS_REQUIRED, "EXPORT_NAME without TLS, which this server requires")
        if self._style is ReplyStyle.EXTENDED:
            raise HandshakeError(Failure.PROTOCOL, "EXPORT_NAME after EXTENDED_HEADERS: GO is required")
        if self._length > STRING_LIMIT:
            raise HandshakeError(
                Failure.PROTOCOL, f"an export name of {self._length} bytes: the limit is {STRING_LIMIT}"
            )

    def _skip_data(self) -> tuple[bool, Event | None]:
        if self._skip:
            return False, None
        refusal, self._refusal = self._refusal, None
        assert refusal is not None
        self._state = _State.OPTION
        if self._option == Option.SET_META_CONTEXT:
            self._clear_contexts()
        return True, Send(self._error(refusal))

    def _read_data(self) -> tuple[bool, Event | None]:
        if len(self._buffer) < self._length:
            return False, None
        data = self._take(self._length)
        self._state = _State.OPTION
        if self._option == Option.EXPORT_NAME:
            return True, self._enter_by_name(data)
        try:
            return True, _HANDLERS[Option(self._option)](self, data)
        except Refusal as refusal:
            # A name that is not there is most often the operator's own mistake; other refusals are how clients probe.
            complaint = str(refusal) if refusal.reply is Reply.ERR_UNKNOWN else ""
            return True, Send(self._error(refusal), complaint)

    # ---- options ----

    def _enter_by_name(self, data: bytes) -> Event:
        try:
            offer = self._find(parse_name(data))
        except Refusal as refusal:
            raise HandshakeError(Failure.UNKNOWN_EXPORT, f"EXPORT_NAME: {refusal}") from None
        terms = self._terms(offer)
        self._state = _State.DONE
        padding = bytes(EXPORT_NAME_PADDING) if self._zeroes else b""
        return Enter(struct.pack(">QH", offer.size_bytes, terms.flags) + padding, terms)

    def _list(self, data: bytes) -> Event:
        if data:
            raise Refusal(Reply.ERR_INVALID, f"LIST takes no data, {len(data)} bytes came")
        if not self._policy.list_exports:
            raise Refusal(Reply.ERR_POLICY, "listing exports is turned off on this server")
        self._state = _State.LISTING
        self._offers = iter(self._directory.offers())
        self._told = 0
        return self._list_slice()

    def _list_more(self) -> tuple[bool, Event | None]:
        return True, self._list_slice()

    def _list_slice(self) -> Event:
        """The next few exports; behind the last of them ACK."""
        replies = bytearray()
        for count, offer in enumerate(self._offers, start=1):
            if offer is not None:
                name = offer.name.encode()
                replies += self._reply(Reply.SERVER, len(name).to_bytes(4) + name + text_bytes(offer.description))
                self._told += 1
            if count == LIST_SLICE or len(replies) >= LIST_SLICE_BYTES:
                return Send(bytes(replies))
        self._state = _State.OPTION
        self.listed = max(self.listed, self._told)
        return Send(bytes(replies) + self._reply(Reply.ACK))

    def _starttls(self, data: bytes) -> Event:
        if data:
            raise Refusal(Reply.ERR_INVALID, f"STARTTLS takes no data, {len(data)} bytes came")
        if self._tls_active:
            raise Refusal(Reply.ERR_INVALID, "TLS is already active")
        if self._policy.tls is TlsMode.OFF:
            raise Refusal(Reply.ERR_POLICY, "TLS is turned off on this server")
        self._state = _State.UPGRADING
        return Upgrade(self._reply(Reply.ACK))

    def _info(self, data: bytes) -> Event:
        name, requested = parse_info(data)
        offer = self._find(name)
        return Send(self._describe(offer, requested) + self._reply(Reply.ACK))

    def _go(self, data: bytes) -> Event:
        name, requested = parse_info(data)
        offer = self._find(name)
        self._state = _State.DONE
        return Enter(self._describe(offer, requested) + self._reply(Reply.ACK), self._terms(offer))

    def _structured_reply(self, data: bytes) -> Event:
        if data:
            raise Refusal(Reply.ERR_INVALID, f"STRUCTURED_REPLY takes no data, {len(data)} bytes came")
        if self._style is ReplyStyle.EXTENDED:
            raise Refusal(Reply.ERR_EXT_HEADER_REQD, "extended headers are already settled and take precedence")
        self._style = ReplyStyle.STRUCTURED
        return Send(self._reply(Reply.ACK))

    def _extended_headers(self, data: bytes) -> Event:
        if data:
            raise Refusal(Reply.ERR_INVALID, f"EXTENDED_HEADERS takes no data, {len(data)} bytes came")
        self._style = ReplyStyle.EXTENDED
        return Send(self._reply(Reply.ACK))

    def _list_meta_context(self, data: bytes) -> Event:
        self._require_chunks()
        name, queries = parse_meta_context(data)
        self._find(name)
        found = [context for context in MetaContext if not queries or _listed(context, queries)]
        # The id is reserved here and should be zero: section "LIST_META_CONTEXT".
        return Send(self._name_contexts(found, ids=False))

    def _set_meta_context(self, data: bytes) -> Event:
        self._clear_contexts()  # a failed request clears, a successful one replaces
        self._require_chunks()
        name, queries = parse_meta_context(data)
        offer = self._find(name)
        found = [context for context in MetaContext if context.wire_name in queries]
        self._contexts = tuple(found)
        self._contexts_of = offer.name
        return Send(self._name_contexts(found, ids=True))

    # ---- parts ----

    def _require_chunks(self) -> None:
        """Section "SET_META_CONTEXT": what answers in chunks comes first."""
        if self._style is ReplyStyle.SIMPLE:
            raise Refusal(Reply.ERR_INVALID, "metadata contexts need STRUCTURED_REPLY or EXTENDED_HEADERS first")

    def _find(self, name: str) -> Offer:
        offer = self._directory.find(name)
        if offer is None:
            meant = f"export {name[:256]!r} that admits this client" if name else "default export: give a name"
            raise Refusal(Reply.ERR_UNKNOWN, f"there is no {meant}")
        return offer

    def _terms(self, offer: Offer) -> Terms:
        contexts = self._contexts if self._contexts_of == offer.name else ()
        return Terms(offer, self._style, contexts, transmission_flags(offer, self._style, contexts))

    def _describe(self, offer: Offer, requested: frozenset[int]) -> bytes:
        """EXPORT always, the others on request; never BLOCK_SIZE_REQD, since every alignment is served."""
        terms = self._terms(offer)
        infos = [struct.pack(">HQH", Info.EXPORT, offer.size_bytes, terms.flags)]
        if Info.NAME in requested:
            infos.append(struct.pack(">H", Info.NAME) + offer.name.encode())
        if Info.DESCRIPTION in requested and offer.description:
            infos.append(struct.pack(">H", Info.DESCRIPTION) + text_bytes(offer.description))
        if Info.BLOCK_SIZE in requested:
            sizes = (MINIMUM_BLOCK_SIZE, PREFERRED_BLOCK_SIZE, self._policy.payload_limit)
            infos.append(struct.pack(">HIII", Info.BLOCK_SIZE, *sizes))
        return b"".join(self._reply(Reply.INFO, info) for info in infos)

    def _name_contexts(self, contexts: list[MetaContext], *, ids: bool) -> bytes:
        replies = [
            self._reply(Reply.META_CONTEXT, (context if ids else 0).to_bytes(4) + context.wire_name.encode())
            for context in contexts
        ]
        return b"".join(replies) + self._reply(Reply.ACK)

    def _forget(self) -> None:
        """What was settled in the clear does not count under TLS (section "STARTTLS")."""
        self._style = ReplyStyle.SIMPLE
        self._clear_contexts()

    def _clear_contexts(self) -> None:
        self._contexts = ()
        self._contexts_of = None

    def _take(self, size: int) -> bytes:
        assert size <= len(self._buffer)
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken

    def _reply(self, reply: Reply, data: bytes = b"") -> bytes:
        return _REPLY_HEADER.pack(OPTION_REPLY_MAGIC, self._option, reply, len(data)) + data

    def _error(self, refusal: Refusal) -> bytes:
        return self._reply(refusal.reply, text_bytes(str(refusal)))


def _listed(context: MetaContext, queries: frozenset[str]) -> bool:
    """A namespace with an empty leaf lists all of it: section "Metadata querying"."""
    namespace = context.wire_name.partition(":")[0] + ":"
    return context.wire_name in queries or namespace in queries


def _option_name(option: int) -> str:
    try:
        return Option(option).name
    except ValueError:
        return f"option {option}"


_Handler = Callable[[Handshake, bytes], Event]

_HANDLERS: dict[int, _Handler] = {
    Option.LIST: Handshake._list,
    Option.STARTTLS: Handshake._starttls,
    Option.INFO: Handshake._info,
    Option.GO: Handshake._go,
    Option.STRUCTURED_REPLY: Handshake._structured_reply,
    Option.LIST_META_CONTEXT: Handshake._list_meta_context,
    Option.SET_META_CONTEXT: Handshake._set_meta_context,
    Option.EXTENDED_HEADERS: Handshake._extended_headers,
}
"""EXPORT_NAME and ABORT are not here: the protocol gives them rules of their own (_admit, _read_option)."""

_Step = Callable[[Handshake], tuple[bool, Event | None]]

_STEPS: dict[_State, _Step | None] = {
    _State.FLAGS: Handshake._read_flags,
    _State.OPTION: Handshake._read_option,
    _State.DATA: Handshake._read_data,
    _State.SKIP: Handshake._skip_data,
    _State.LISTING: Handshake._list_more,
    _State.UPGRADING: None,
    _State.DONE: None,
}
