"""What must hold for any bytes that a client sends: a fuzzer calls these, and so do the property tests.

1. Only the documented exceptions leave the parser.
2. Any split of a byte stream gives the same replies.
3. In the transmission phase the replies are those of the plain model (tests/model/reference.py).

The first bytes of an input choose the circumstances, the rest is what the client says. A fuzzer sees branches of Python
code only, unless the compiled code was built for it (test_compiled.py), so the model does double duty: it follows the
same stream in Python, and so leads the fuzzer through it.
"""

from __future__ import annotations

from dataclasses import dataclass

from nbdzram.config import TlsMode
from nbdzram.nbd.handshake import Close, Enter, Handshake, HandshakeError, Policy, Send, Upgrade
from tests.model.reference import PlainExport, check_status, parse, take_reply
from tests.support.rehearsal import Stage

EXPORT_SIZE = 64 << 10  # what fits is done at once, so that replies come in order
BUDGETS = (1 << 30, 0)  # ample, or none: either way nothing waits for a worker, and replies come in order
REPLY_LIMIT = 1 << 20


@dataclass(frozen=True)
class _Offer:
    name: str
    size_bytes: int = 1 << 20
    read_only: bool = False
    description: str = ""


class _Directory:
    def __init__(self) -> None:
        self._offers = (_Offer("disk", description="one"), _Offer("\N{SNOWMAN}", read_only=True))

    def find(self, name: str) -> _Offer | None:
        return next((offer for offer in self._offers if name in ("", offer.name)), None)

    def offers(self) -> tuple[_Offer, ...]:
        return self._offers


def haggle(source: bytes) -> None:
    """A handshake: byte 0 chooses the policy, byte 1 the split, the rest is said by the client."""
    if len(source) < 2:
        return
    tls = tuple(TlsMode)[source[0] % 3]
    policy = Policy(tls=tls, list_exports=not source[0] & 4, option_limit=20)
    said = source[2:]
    whole = _converse(policy, [said], tls_active=bool(source[0] & 8))
    step = source[1] % 37 + 1
    split = _converse(
        policy, [said[at : at + step] for at in range(0, len(said), step)], tls_active=bool(source[0] & 8)
    )
    assert whole == split, (whole, split)


def _converse(policy: Policy, pieces: list[bytes], *, tls_active: bool) -> tuple[bytes, str]:
    """All replies, and how it ended. STARTTLS ends it: what follows is TLS's."""
    handshake = Handshake(_Directory(), policy, tls_active=tls_active)
    replies = bytearray()
    for piece in pieces:
        handshake.receive(piece)
        try:
            while (event := handshake.next_event()) is not None:
                replies += event.reply
                assert len(event.reply) < REPLY_LIMIT
                match event:
                    case Send():
                        continue
                    case Enter(_, terms):
                        return bytes(replies), f"enter {terms.offer.name} {terms.style} {terms.contexts} {terms.flags}"
                    case Close() | Upgrade():
                        return bytes(replies), type(event).__name__
        except HandshakeError as error:
            return bytes(replies), f"failed {error.cause}"
    return bytes(replies), "open"


_stages: dict[int, Stage] = {}  # by their budgets


def transmit(source: bytes) -> None:
    """A transmission phase: byte 0 chooses style, contexts, budget; byte 1 the split; the rest the client says."""
    if len(source) < 2:
        return
    budget, said = BUDGETS[source[0] >> 5 & 1], source[2:]
    if budget not in _stages:
        _stages[budget] = Stage(EXPORT_SIZE, budget=budget)
    stage = _stages[budget]
    style = source[0] % 3
    contexts = 0 if style == 0 else source[0] >> 2 & 3 if source[0] >> 2 & 3 < 3 else 2
    read_only = source[0] & 16 != 0
    whole = stage.play([said], style=style, contexts=contexts, read_only=read_only)
    step = source[1] * 7 + 1
    pieces = [said[at : at + step] for at in range(0, len(said), step)]
    split = stage.play(pieces, style=style, contexts=contexts, read_only=read_only)
    assert whole == split, "another split, other replies"
    requests, _ = parse(said, style)
    model = PlainExport(bytearray(stage.content), style, contexts, read_only)
    at = 0
    for request in requests:
        expected = model.answer(request)
        at, status = take_reply(whole, at, expected, style)
        for context, payload in status:
            if context == 1:
                check_status(payload, request, bytes(model.content), style)
    assert at == len(whole), f"{len(whole) - at} bytes that nobody asked for"
