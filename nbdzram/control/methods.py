"""The methods that the control socket offers: a table of names, parameters and calls.

What a method needs from the server is stated in Operations (server/service.py has it) and Changes (server/changes.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from nbdzram import values
from nbdzram.control.messages import Code, MessageError
from nbdzram.engine.stats import DiskUsage
from nbdzram.status import (
    ClientStatus,
    ExportLoss,
    ExportRenaming,
    ExportStatus,
    PoolStatus,
    ReceiveReport,
    ReloadReport,
    RunOptions,
    RunReport,
    RunStatus,
    SendReport,
    ServerStatus,
    StreamStatus,
)
from nbdzram.stream.pipe import Pipe

Progress = Callable[[RunStatus, RunStatus | None], None]
"""Told of a run, and of the one under way while it waits for that."""
Beside = TypeVar("Beside", Progress, Pipe)


class Operations(Protocol):
    """What the server does on request. Refusals are UserErrors."""

    def status(self) -> ServerStatus:
        """Everything, at this moment."""

    def clients(self) -> tuple[ClientStatus, ...]:
        """Who is attached, at this moment."""

    async def disconnect_client(self, number: int) -> None:
        """End one client, once what it has under way is answered. It may come again."""

    async def usage(self) -> dict[str, DiskUsage]:
        """What each export's blocks cost, by name."""

    async def run(
        self, kind: str, options: RunOptions, *, pool: str | None, cpu_percent: int, progress: Progress
    ) -> tuple[RunReport, ...]:
        """Fold, compact, recompress or check one pool, or all of them."""

    async def reload(self) -> ReloadReport:
        """Read the configuration again. An error in it changes nothing."""

    async def takeover(
        self,
        socket: str,
        pid: int,
        format: int,  # noqa: A002
        knows: Sequence[str],
        state_dir: str,
        *,
        unit: str,
    ) -> int:
        """Give all that is served to the process that listens on that socket, and end when it serves; our number."""

    async def runs(self) -> tuple[RunStatus, ...]:
        """The runs that wait, are under way, or ended lately, by their numbers."""

    async def cancel_run(self, number: int) -> RunStatus:
        """End a run at its next slice, or before it began. What it did until then stays."""

    async def pause_run(self, number: int) -> RunStatus:
        """Hold a run that is under way; those behind it wait on."""

    async def resume_run(self, number: int) -> RunStatus:
        """Let a paused run go on."""

    async def send_stream(
        self, exports: Sequence[str], since: str | None, *, resumable: bool, resume: str | None, pipe: Pipe
    ) -> SendReport:
        """Write exports, or all, as a stream of one moment; with since, what changed since that snapshot.

        If it is resumable and breaks, resume is the token with which another call writes what is left.
        """

    async def receive_stream(self, prefix: str, pool: str | None, *, resumable: bool, pipe: Pipe) -> ReceiveReport:
        """Offer what a stream holds: all of it when it has ended, or nothing. If resumable, keep what came."""

    async def streams(self) -> tuple[StreamStatus, ...]:
        """The streams that are under way, and what is kept of those that were interrupted."""

    async def abandon_stream(self, name: str) -> None:
        """Keep nothing of a stream any more. Name is its identity, or a token."""


class Changes(Protocol):
    """How exports and pools are changed on request. Refusals are UserErrors."""

    async def add_pool(self, name: str, mem_limit: int, dedup: str, *, verify: bool, tell_sharing: bool) -> PoolStatus:
        """Open a pool, with what its arena holds if any. mem_limit in bytes, 0 is none; dedup is fold or inline."""

    async def change_pool(
        self, name: str, mem_limit: int | None, dedup: str | None, *, verify: bool | None, tell_sharing: bool | None
    ) -> PoolStatus:
        """Set a pool's limit, when equal blocks meet, whether what is read is checked against its fingerprint, and
        whether clients may find out what others store; what is not given stays."""

    async def remove_pool(self, name: str) -> None:
        """Close a pool that holds no export, and remove its file."""

    def lose_pool(self, name: str) -> None:
        """Refuse what the removal of a pool would be refused for now; nothing is changed."""

    async def add_export(
        self,
        name: str,
        size_bytes: int,
        *,
        pool: str | None,
        read_only: bool | None,
        description: str | None,
        allow_addresses: Sequence[str] | None,
        allow_certificates: Sequence[str] | None,
        bounds: Mapping[str, int | None],
        private: bool | None = None,
    ) -> ExportStatus:
        """Make a new, empty export and offer it. What is not given is as declared, if the name is."""

    async def change_export(
        self,
        name: str,
        *,
        read_only: bool | None,
        description: str | None,
        allow_addresses: Sequence[str] | None,
        allow_certificates: Sequence[str] | None,
        bounds: Mapping[str, int | None],
    ) -> ExportStatus:
        """Set an export's rules, bounds and description; what is not given stays. Who no longer qualifies is ended."""

    async def rename_export(self, name: str, new_name: str) -> ExportRenaming:
        """Offer an export under another name; who is attached goes on."""

    async def lose_export(self, name: str, size_bytes: int, snapshot: str | None) -> ExportLoss:
        """What shrinking an export to size_bytes, or to nothing, would destroy; or going back to a snapshot, if it can.

        Nothing is changed.
        """

    async def remove_export(self, name: str, *, force: bool) -> None:
        """Stop offering an export and free what nobody else holds; with force, end who is attached."""

    async def resize_export(self, name: str, size_bytes: int, *, yes: bool, force: bool) -> ExportStatus:
        """Change an export's size; to shrink it wants yes, or force, which also ends who is attached."""

    async def reset_export(self, name: str, *, force: bool) -> ExportStatus:
        """Empty an export; with force, end who is attached."""

    async def rollback_export(self, name: str, snapshot: str, *, force: bool) -> ExportStatus:
        """Let an export hold what a snapshot holds; with force, end who is attached."""

    async def copy_export(self, source: str, name: str, *, read_only: bool) -> ExportStatus:
        """Offer a clone, or a snapshot if read_only, of an export."""

    async def take_moment(self, name: str) -> tuple[ExportStatus, ...]:
        """Offer a snapshot EXPORT@NAME of each export that clients may write, all of one moment, or none."""

    async def settled(self, changed: Collection[str]) -> None:
        """Return once what was changed before outlives the power, where a flush does; changed: names of exports whose
        content, or size, was."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter by name; without a default it is required. `read` holds a value to the rule of flags and TOML."""

    kind: type
    default: Any = ...
    read: Callable[[Any], object] | None = None  # raises ValueError


@dataclass(frozen=True, slots=True)
class Named:
    """What a method takes, by name."""

    parameters: Mapping[str, Parameter]

    def read(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters, complete and of the right types. Raises MessageError."""
        unknown = given.keys() - self.parameters.keys()
        if unknown:
            allowed = ", ".join(self.parameters) or "none"
            raise MessageError(Code.INVALID_PARAMS, f"unknown parameter '{min(unknown)}'; allowed are {allowed}")
        read = {}
        for name, parameter in self.parameters.items():
            value = given.get(name, parameter.default)
            if value is ...:
                raise MessageError(Code.INVALID_PARAMS, f"the parameter '{name}' is missing")
            read[name] = value
            if name not in given or (value is None and parameter.default is None):
                continue
            if type(value) is not parameter.kind:  # bool is not an int here
                raise MessageError(
                    Code.INVALID_PARAMS, f"the parameter '{name}' is not of type {parameter.kind.__name__}"
                )
            if parameter.read is not None:
                try:
                    parameter.read(value)
                except ValueError as error:
                    raise MessageError(Code.INVALID_PARAMS, f"{name}: {error}") from None
        return read


@dataclass(frozen=True, slots=True)
class Method(Named):
    """One method: its parameters, and the call that takes them and gives records or nothing."""

    call: Callable[[Mapping[str, Any], Progress], Awaitable[Any]]
    is_act: bool = True  # an administrative act, of which is noted who did it


@dataclass(frozen=True, slots=True)
class StreamMethod(Named):
    """One that carries bytes, from the server or (`inward`) to it, before it gives its record. It is an act."""

    carry: Callable[[Mapping[str, Any], Pipe], Awaitable[Any]]
    inward: bool
    is_act: bool = True


_RUN_VALUES = {"level": values.integer(1, 22), "idle_seconds": values.integer(0, 10**9)}
RUN_OPTIONS = {
    field.name: Parameter(type(field.default), field.default, _RUN_VALUES.get(field.name))
    for field in dataclasses.fields(RunOptions)
}


def _one(outcome: ExportStatus) -> Collection[str]:
    return (outcome.name,)


def _several(outcome: Sequence[ExportStatus]) -> Collection[str]:
    return [export.name for export in outcome]


def _with_bounds(given: Mapping[str, Any]) -> dict[str, Any]:
    """What bounds an export by one name."""
    others = {name: value for name, value in given.items() if name not in values.BOUNDS}
    return others | {"bounds": {name: given[name] for name in values.BOUNDS}}


def method_table(operations: Operations, changes: Changes) -> dict[str, Method | StreamMethod]:
    """Every method by its name."""
    name, force = Parameter(str), Parameter(bool, False)
    new_name, new_pool = Parameter(str, read=values.export_name), Parameter(str, read=values.pool_name)
    size = Parameter(int, read=values.export_size)
    rules = {
        "read_only": Parameter(bool, None),
        "description": Parameter(str, None, values.description),
        "allow_addresses": Parameter(list, None, values.several(values.network)),
        "allow_certificates": Parameter(list, None, values.several(values.certificate_name)),
        **{bound: Parameter(int, None, read) for bound, read in values.BOUNDS.items()},
    }

    def lasting(
        act: Callable[[Mapping[str, Any], Beside], Awaitable[Any]],
        exports: Callable[[Any], Collection[str]] = lambda _: (),
    ) -> Callable[..., Awaitable[Any]]:
        """Answered as done once what it changed outlives the power, where a flush does.

        exports: by the act's outcome, whose content, or size, it changed.
        """

        async def settle(given: Mapping[str, Any], beside: Beside) -> Any:
            outcome = await act(given, beside)
            await changes.settled(exports(outcome))
            return outcome

        return settle

    async def status(_: Mapping[str, Any], __: Progress) -> Any:
        return operations.status()

    async def usage(_: Mapping[str, Any], __: Progress) -> Any:
        return await operations.usage()

    async def clients(_: Mapping[str, Any], __: Progress) -> Any:
        return operations.clients()

    async def disconnect(given: Mapping[str, Any], _: Progress) -> Any:
        await operations.disconnect_client(**given)

    async def run(given: Mapping[str, Any], progress: Progress) -> Any:
        chosen = {name: given[name] for name in RUN_OPTIONS}
        asked = {name: given[name] for name in ("kind", "pool", "cpu_percent")}
        return await operations.run(asked.pop("kind"), RunOptions(**chosen), **asked, progress=progress)

    async def reload(_: Mapping[str, Any], __: Progress) -> Any:
        return await operations.reload()

    async def takeover(given: Mapping[str, Any], _: Progress) -> Any:
        return await operations.takeover(**given)

    async def runs(_: Mapping[str, Any], __: Progress) -> Any:
        return await operations.runs()

    async def cancel_run(given: Mapping[str, Any], _: Progress) -> Any:
        return await operations.cancel_run(**given)

    async def pause_run(given: Mapping[str, Any], _: Progress) -> Any:
        return await operations.pause_run(**given)

    async def resume_run(given: Mapping[str, Any], _: Progress) -> Any:
        return await operations.resume_run(**given)

    async def add_pool(given: Mapping[str, Any], _: Progress) -> Any:
        return await changes.add_pool(**given)

    async def change_pool(given: Mapping[str, Any], _: Progress) -> Any:
        return await changes.change_pool(**given)

    async def remove_pool(given: Mapping[str, Any], _: Progress) -> Any:
        await changes.remove_pool(**given)

    async def lose_pool(given: Mapping[str, Any], _: Progress) -> Any:
        changes.lose_pool(**given)

    async def add(given: Mapping[str, Any], _: Progress) -> Any:
        return await changes.add_export(**_with_bounds(given))

    async def change(given: Mapping[str, Any], _: Progress) -> Any:
        return await changes.change_export(**_with_bounds(given))

    async def rename(given: Mapping[str, Any], _: Progress) -> Any:
        return await changes.rename_export(**given)

    async def lose(given: Mapping[str, Any], _: Progress) -> Any:
        return await changes.lose_export(**given)

    async def remove(given: Mapping[str, Any], _: Progress) -> Any:
        await changes.remove_export(**given)

    async def resize(given: Mapping[str, Any], _: Progress) -> Any:
        return await changes.resize_export(**given)

    async def reset(given: Mapping[str, Any], _: Progress) -> Any:
        return await changes.reset_export(**given)

    async def roll_back(given: Mapping[str, Any], _: Progress) -> Any:
        return await changes.rollback_export(**given)

    async def copy(given: Mapping[str, Any], _: Progress) -> Any:
        return await changes.copy_export(**given)

    async def take_moment(given: Mapping[str, Any], _: Progress) -> Any:
        return await changes.take_moment(**given)

    async def send(given: Mapping[str, Any], pipe: Pipe) -> Any:
        return await operations.send_stream(**given, pipe=pipe)

    async def receive(given: Mapping[str, Any], pipe: Pipe) -> Any:
        return await operations.receive_stream(**given, pipe=pipe)

    async def streams(_given: Mapping[str, Any], _: Progress) -> Any:
        return await operations.streams()

    async def abandon(given: Mapping[str, Any], _: Progress) -> Any:
        await operations.abandon_stream(**given)

    return {
        "status": Method({}, status, is_act=False),
        "usage": Method({}, usage, is_act=False),
        "clients": Method({}, clients, is_act=False),
        "clients.disconnect": Method({"number": Parameter(int)}, disconnect),
        "run": Method(
            {
                "kind": Parameter(str),
                "pool": Parameter(str, None),
                "cpu_percent": Parameter(int, 100),
                **RUN_OPTIONS,
            },
            run,
        ),
        "reload": Method({}, lasting(reload)),
        "takeover": Method(
            {
                "socket": Parameter(str, read=values.place),
                "pid": Parameter(int),
                "format": Parameter(int),
                "knows": Parameter(list, [], values.several(values.text)),
                "state_dir": Parameter(str, read=values.place),
                "unit": Parameter(str, ""),
            },
            takeover,
        ),
        "runs": Method({}, runs, is_act=False),
        "runs.cancel": Method({"number": Parameter(int)}, cancel_run),
        "runs.pause": Method({"number": Parameter(int)}, pause_run),
        "runs.resume": Method({"number": Parameter(int)}, resume_run),
        "pools.add": Method(
            {
                "name": new_pool,
                "mem_limit": Parameter(int, 0, values.memory),
                "dedup": Parameter(str, "fold", values.dedup),
                "verify": Parameter(bool, True),
                "tell_sharing": Parameter(bool, False),
            },
            lasting(add_pool),
        ),
        "pools.change": Method(
            {
                "name": name,
                "mem_limit": Parameter(int, None, values.memory),
                "dedup": Parameter(str, None, values.dedup),
                "verify": Parameter(bool, None),
                "tell_sharing": Parameter(bool, None),
            },
            lasting(change_pool),
        ),
        "pools.lose": Method({"name": name}, lose_pool, is_act=False),
        "pools.remove": Method({"name": name}, lasting(remove_pool)),
        "exports.add": Method(
            {
                "name": new_name,
                "size_bytes": size,
                "pool": Parameter(str, None),
                "private": Parameter(bool, None),
                **rules,
            },
            lasting(add),
        ),
        "exports.change": Method({"name": name, **rules}, lasting(change)),
        "exports.rename": Method({"name": name, "new_name": new_name}, lasting(rename)),
        "exports.lose": Method(
            {
                "name": name,
                "size_bytes": Parameter(int, 0, values.size(0, values.EXPORT_BYTES_MAX)),
                "snapshot": Parameter(str, None),
            },
            lose,
            is_act=False,
        ),
        "exports.remove": Method({"name": name, "force": force}, lasting(remove)),
        "exports.resize": Method(
            {"name": name, "size_bytes": size, "yes": Parameter(bool, False), "force": force}, lasting(resize, _one)
        ),
        "exports.reset": Method({"name": name, "force": force}, lasting(reset, _one)),
        "exports.rollback": Method({"name": name, "snapshot": name, "force": force}, lasting(roll_back, _one)),
        "exports.copy": Method(
            {"source": name, "name": new_name, "read_only": Parameter(bool, False)}, lasting(copy, _one)
        ),
        "moments.take": Method({"name": new_name}, lasting(take_moment, _several)),
        "streams.send": StreamMethod(
            {
                "exports": Parameter(list, [], values.several(values.text)),
                "since": Parameter(str, None),
                "resumable": Parameter(bool, False),
                "resume": Parameter(str, None),
            },
            send,
            inward=False,
        ),
        "streams.receive": StreamMethod(
            {"prefix": Parameter(str, ""), "pool": Parameter(str, None), "resumable": Parameter(bool, False)},
            lasting(receive, lambda report: report.exports),
            inward=True,
        ),
        "streams": Method({}, streams, is_act=False),
        "streams.abandon": Method({"name": Parameter(str)}, abandon),
    }
