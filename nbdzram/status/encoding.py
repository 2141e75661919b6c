"""How records cross the control socket, and reach files: as JSON objects of the same shape.

A field that the reader does not know is ignored, a missing one is an error: an older server cannot answer a newer
client's question. So a record with fewer fields reads of the same object what it needs; one that is only read so is a
NamedTuple, which takes a command a fifth of the time to make (and which JSON would have as a list).
"""

from __future__ import annotations

import functools
import json
import reprlib
import types
import typing
from collections.abc import Iterator
from typing import Any, TypeVar

from nbdzram.errors import UserError

Record = TypeVar("Record")


def to_json(value: Any) -> str:
    """A record, or a list or table of them, as JSON text."""
    return _ENCODER.encode(value)


def to_json_pieces(value: Any, depth: int = 2) -> Iterator[str]:
    """The same text in pieces: what lies `depth` levels down, such as one export of a ServerStatus, is one piece.

    What an iterator gives is made when its turn comes, and written as a list.
    """
    if depth and hasattr(value, "__dataclass_fields__"):
        value = fields(value)
    if depth and isinstance(value, dict):
        opening = "{"
        for name, item in value.items():
            yield f"{opening}{to_json(name)}:"
            yield from to_json_pieces(item, depth - 1)
            opening = ","
        yield "}" if value else "{}"
    elif depth and isinstance(value, list | tuple | Iterator):
        opening = "["
        for item in value:
            yield opening
            yield from to_json_pieces(item, depth - 1)
            opening = ","
        yield "[]" if opening == "[" else "]"
    else:
        yield to_json(value)


def fields(record: Any) -> dict[str, Any]:
    """A record's fields by name, as they are. dataclasses.asdict copies every number below: 30 ms for 100 exports."""
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


_ENCODER = json.JSONEncoder(separators=(",", ":"), default=fields)


def from_json(kind: type[Record], payload: object, source: str = "the server's answer") -> Record:
    """The record of type `kind` whose JSON was read as `payload`. Raises UserError, which names the source."""
    try:
        return typing.cast("Record", _decode(kind, payload))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{source} lacks or misplaces {error}; was it written by another version?") from None


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    """Resolving them costs 50 us; a status of 100 exports has a thousand records."""
    return typing.get_type_hints(kind)


def _decode(kind: Any, payload: Any) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    names = getattr(kind, "__dataclass_fields__", None) or getattr(kind, "_fields", None)
    if (names or origin is dict) and not isinstance(payload, dict):
        raise TypeError(f"{reprlib.repr(payload)} (not an object)")
    if origin is tuple and not isinstance(payload, list):
        raise TypeError(f"{reprlib.repr(payload)} (not a list)")
    if names:
        hints = _hints(kind)
        return kind(**{name: _decode(hints[name], payload[name]) for name in names})
    if origin is tuple:
        return tuple(_decode(arguments[0], item) for item in payload)
    if origin is dict:
        return {str(key): _decode(arguments[1], item) for key, item in payload.items()}
    if origin is types.UnionType:
        return None if payload is None else _decode(arguments[0], payload)
    if kind is float and isinstance(payload, int):
        return float(payload)
    if not isinstance(payload, kind):
        raise TypeError(f"{reprlib.repr(payload)} (not {kind.__name__})")
    return payload
