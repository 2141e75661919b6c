"""The control protocol's messages, without I/O.

One message a line: a JSON-RPC 2.0 object, UTF-8, ended by a newline (JSON text has none inside). The client sends
requests one at a time; the server answers each, and before the answer may send `progress` notifications that name
the request's id. Batches are not offered: there is nothing to gain on a local socket.

Two methods carry a stream of bytes (stream/pipe). The server says `stream`, naming the request's id, and the bytes come
behind it on the same connection, before the answer: from the server, or from the client. A client's stream that was
refused in its middle ends the connection, behind the refusal.

Errors: the codes of the JSON-RPC specification, section 5.1; REFUSED is ours and carries in `data` the exit code that
the command line ends with.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from nbdzram.errors import (
    ConfigError,
    ExportExists,
    NoSuchExport,
    RunCancelled,
    ServerUnreachable,
    StreamCut,
    StreamError,
    UserError,
)
from nbdzram.status.encoding import to_json, to_json_pieces

if TYPE_CHECKING:
    from nbdzram.status import RunStatus

_KINDS: dict[str, type[UserError]] = {
    kind.__name__: kind
    for kind in (ConfigError, NoSuchExport, ExportExists, RunCancelled, ServerUnreachable, StreamCut, StreamError)
}
MAX_REQUEST_BYTES = 64 << 10  # a name of 4096 bytes, escaped, in each parameter
MAX_REPLY_BYTES = 64 << 20  # the status of ten thousand exports with their histograms


class Code(IntEnum):
    """Why a request failed."""

    PARSE_ERROR = -32700
    INVALID_REQUEST = -32600
    METHOD_NOT_FOUND = -32601
    INVALID_PARAMS = -32602
    INTERNAL_ERROR = -32603
    REFUSED = -32000


class MessageError(Exception):
    """A request that breaks the protocol, answered with `code`."""

    def __init__(self, code: Code, text: str, request_id: object = None) -> None:
        super().__init__(text)
        self.code = code
        self.request_id = request_id


class Request(NamedTuple):
    """One call. `id` None: a notification, which is not answered. A tuple: clients make the class, too."""

    method: str
    params: Mapping[str, Any]
    id: int | str | None


def parse_request(line: bytes) -> Request:
    """A line as a request. Raises MessageError."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        raise MessageError(Code.PARSE_ERROR, "the line is not JSON") from None
    if not isinstance(message, dict) or message.get("jsonrpc") != "2.0":
        raise MessageError(Code.INVALID_REQUEST, "the message is not a JSON-RPC 2.0 object")
    request_id = message.get("id")
    if isinstance(request_id, bool) or not isinstance(request_id, int | str | None):
        raise MessageError(Code.INVALID_REQUEST, "'id' is neither a whole number nor text")
    method, params = message.get("method"), message.get("params", {})
    if not isinstance(method, str):
        raise MessageError(Code.INVALID_REQUEST, "'method' is not text", request_id)
    if not isinstance(params, dict):
        raise MessageError(Code.INVALID_PARAMS, "'params' is not an object; parameters go by name", request_id)
    return Request(method, params, request_id)


def request(method: str, params: Mapping[str, Any], request_id: int) -> bytes:
    """A call as a line."""
    return _line({"jsonrpc": "2.0", "method": method, "params": params, "id": request_id})


def result(request_id: object, value: Any) -> Iterator[str]:
    """The answer to a call, in pieces: it may be long."""
    yield '{"jsonrpc":"2.0","result":'
    yield from to_json_pieces(value)
    yield f',"id":{to_json(request_id)}}}\n'


def failure(request_id: object, code: Code, text: str, kind: UserError | None = None) -> bytes:
    """The refusal of a call."""
    error: dict[str, Any] = {"code": code, "message": text}
    if kind is not None:
        error["data"] = {"kind": type(kind).__name__, "exit_code": kind.exit_code}
    return _line({"jsonrpc": "2.0", "error": error, "id": request_id})


def progress(request_id: object, run: RunStatus, waits_for: RunStatus | None) -> bytes:
    """How far the run that the call with this id asked for has come; what it waits for, if it does."""
    params = {"id": request_id, "run": run, "waits_for": waits_for}
    return _line({"jsonrpc": "2.0", "method": "progress", "params": params})


def stream(request_id: object) -> bytes:
    """The bytes of a stream come next (stream/pipe): the server's, or it is ready for those of the client."""
    return _line({"jsonrpc": "2.0", "method": "stream", "params": {"id": request_id}})


def error_of(error: Mapping[str, Any]) -> UserError:
    """The exception that an error object stands for on the client's side."""
    if error.get("code") == Code.INVALID_PARAMS:
        kind: type[UserError] = ConfigError  # a value that flags and files would refuse, too
    else:
        data = error.get("data")
        kind = _KINDS.get(data.get("kind", ""), UserError) if isinstance(data, dict) else UserError
    return kind(str(error.get("message", "the server refused without a reason")))


def _line(message: Mapping[str, Any]) -> bytes:
    return to_json(message).encode() + b"\n"
