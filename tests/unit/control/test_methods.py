"""What each method takes and refuses, what it asks of the server, and how answers look: methods.txt has all of it.

python -m tests.unit.control.test_methods        writes it anew, after a change that is meant
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nbdzram import errors
from nbdzram.control import messages
from nbdzram.control.messages import Code, MessageError, error_of, failure, parse_request, result
from nbdzram.control.methods import Changes, Method, Operations, StreamMethod, method_table
from tests.unit.records import RUNNING, WAITING

LEFT = {"self", "progress", "pipe"}
METHODS = Path(__file__).with_name("methods.txt")
RIGHT: Mapping[type, Any] = {str: "fold", int: 4096, bool: True, list: ["10.0.0.0/8"]}
RIGHT_ONES: Mapping[str, Mapping[str, Any]] = {
    "run": {"level": 7},
    "takeover": {"socket": "/s", "state_dir": "/d"},
}
WRONG: tuple[Any, ...] = (None, True, 3, -1, 1 << 70, "", "n" * 256, "10.0.0.1", 1.5, [], [3], ["a b"], {})
IDS: tuple[Any, ...] = (None, 0, -1, 7, "x", "", True, 1.5, [], {})
PARAMS: tuple[Any, ...] = ({}, {"b": 1}, [], None, "x")
REQUESTS: tuple[Any, ...] = (
    *({}, [], 3, None, {"jsonrpc": "2.0"}, {"jsonrpc": "1.0", "method": "a"}, {"jsonrpc": "2.0", "method": 3, "id": 7}),
    *({"jsonrpc": "2.0", "method": "a", "id": one} for one in IDS),
    *({"jsonrpc": "2.0", "method": "a", "id": 7, "params": one} for one in PARAMS),
    {"jsonrpc": "2.0", "method": "a", "id": 7, "else": 1},
)
LINES = (
    b"",
    b"{",
    b"\xff",
    b"[" * 100_000,
    b'{"jsonrpc":"2.0","method":"a"}\n',
    b'{"jsonrpc":"2.0","method":"\\ud800"}',
)


class Noting:
    """Stands for a server: notes what it is asked, and answers with exports, which some of it does."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        declared = getattr(Operations, name, None) or getattr(Changes, name)

        def note(*given: Any, **named: Any) -> Any:
            bound = inspect.signature(declared).bind(self, *given, **named).arguments
            self.asked.append(
                f"{name}({', '.join(f'{key}={bound[key]!r}' for key in sorted(bound) if key not in LEFT)})"
            )
            outcome = SimpleNamespace(name="changed", exports=("came", "with it"))
            return [outcome, outcome] if name == "take_moment" else outcome

        async def act(*given: Any, **named: Any) -> Any:
            return note(*given, **named)

        return act if inspect.iscoroutinefunction(declared) else note


def shortened(words: str) -> str:
    return words if len(words) < 150 else f"{words[:60]}...{words[-60:]}"


def read(method: Method | StreamMethod, given: Mapping[str, Any]) -> str:
    try:
        return repr(method.read(given))
    except MessageError as error:
        return f"{error.code.name}: {error}"


def of_a_method(name: str, method: Method | StreamMethod, server: Noting) -> Iterator[str]:
    kinds = ", ".join(
        f"{one}: {parameter.kind.__name__}{'' if parameter.default is ... else f' = {parameter.default!r}'}"
        for one, parameter in method.parameters.items()
    )
    way = "" if isinstance(method, Method) else ", a stream in" if method.inward else ", a stream out"
    yield f"-- {name}({kinds}){', an act' * method.is_act}{way}"
    least = {one: RIGHT[parameter.kind] for one, parameter in method.parameters.items() if parameter.default is ...}
    full = {one: RIGHT[parameter.kind] for one, parameter in method.parameters.items()}
    yield f"with an unknown one: {read(method, {**least, 'wrong': 1, 'unknown': 2})}"
    for one in least:
        yield f"without {one}: {read(method, {key: value for key, value in least.items() if key != one})}"
    for given in (least, {**full, **RIGHT_ONES.get(name, {})}):
        server.asked.clear()
        try:
            taken = method.read(given)
        except MessageError as error:
            yield f"with {given}: {error}"
            continue
        call: Any = method.call if isinstance(method, Method) else method.carry
        asyncio.run(call(taken, None))
        yield f"asks {'; '.join(server.asked)}"
    for one, parameter in method.parameters.items():
        told = {shortened(repr(value)): read(method, {**least, one: value}) for value in WRONG}
        taken_ones = ", ".join(value for value, said in told.items() if said.startswith("{"))
        yield f"  {one}: takes {taken_ones}"
        if parameter.read is not None:  # or else each is refused for its type
            yield from (
                f"    {value}: {shortened(said)}"
                for value, said in told.items()
                if not said.startswith("{") and "not of type" not in said
            )


def of_requests() -> Iterator[str]:
    """What is understood of a line."""
    for line in (*(json.dumps(one).encode() for one in REQUESTS), *LINES):
        shown = shortened(repr(line))
        try:
            yield f"{shown}: {parse_request(line)}"
        except MessageError as error:
            yield f"{shown}: {error.code:d} {error.request_id!r} {error}"


def of_answers() -> Iterator[str]:
    """How an answer is written, and what a client makes of a refusal."""
    for request_id in (7, "x", None):
        yield "".join(result(request_id, {"a": [1, None], "b": ()})).rstrip("\n")
    yield messages.request("a", {"b": "ü\n"}, 7).decode().rstrip("\n")
    yield messages.stream(7).decode().rstrip("\n")
    yield messages.progress(7, RUNNING, None).decode().rstrip("\n")
    assert '"waits_for":{' in messages.progress(7, WAITING, RUNNING).decode()
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.UserError)]
    for kind in kinds:
        made = kind.__new__(kind)
        made.args = ("words",)
        told = failure(7, Code.REFUSED, "words", made)
        read = error_of(json.loads(told)["error"])
        yield f"{told.decode().rstrip()}: {type(read).__name__}({read}), {read.exit_code}"
    for code in Code:
        read = error_of(json.loads(failure(7, code, "words"))["error"])
        yield f"{code.name}: {type(read).__name__}({read})"
    for odd in ({}, {"data": 3, "message": 4}, {"data": {}, "code": -32000}, {"data": {"kind": "Nothing"}}):
        yield f"{odd}: {type(error_of(odd)).__name__}({error_of(odd)})"


def lines() -> Iterator[str]:
    server = Noting()
    for name, method in method_table(server, server).items():
        yield from of_a_method(name, method, server)
    yield "-- requests"
    yield from of_requests()
    yield "-- answers"
    yield from of_answers()


def test_each_method_takes_asks_and_refuses_what_it_did() -> None:
    assert list(lines()) == METHODS.read_text(encoding="utf-8").splitlines()


if __name__ == "__main__":
    METHODS.write_text("\n".join(lines()) + "\n", encoding="utf-8")
