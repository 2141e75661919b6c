"""The methods that the control socket offers: a table of names, parameters and calls.

What a method needs from the server is stated in Operations (server/service.py has it) and Changes (server/changes.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from nbdzram.control.messages import Code, MessageError
from nbdzram.engine.stats import DiskUsage
from nbdzram.status import ExportStatus, PoolStatus, RunOptions, RunReport, ServerStatus

Progress = Callable[[str, str, int, int], None]
"""Called with kind, pool, done and total."""


class Operations(Protocol):
    """What the server does on request. Refusals are UserErrors."""

    def status(self) -> ServerStatus:
        """Everything, at this moment."""

    async def usage(self) -> dict[str, DiskUsage]:
        """What each export's blocks cost, by name."""

    async def run(
        self, kind: str, options: RunOptions, *, pool: str | None, cpu_percent: int, progress: Progress
    ) -> tuple[RunReport, ...]:
        """Fold, compact, recompress or check one pool, or all of them."""


class Changes(Protocol):
    """How exports and pools are changed on request. Refusals are UserErrors."""

    async def add_pool(self, name: str, mem_limit: int, dedup: str) -> PoolStatus:
        """Open a new, empty pool. mem_limit in bytes, 0 is none; dedup is fold or inline."""

    async def change_pool(self, name: str, mem_limit: int | None, dedup: str | None) -> PoolStatus:
        """Set a pool's limit, or when equal blocks meet; what is not given stays."""

    async def remove_pool(self, name: str) -> None:
        """Close a pool that holds no export, and remove its file."""

    async def add_export(
        self, name: str, size_bytes: int, *, pool: str | None, read_only: bool, description: str
    ) -> ExportStatus:
        """Make a new, empty export and offer it."""

    async def remove_export(self, name: str, *, force: bool) -> None:
        """Stop offering an export and free what nobody else holds."""

    async def resize_export(self, name: str, size_bytes: int, *, force: bool) -> ExportStatus:
        """Change an export's size."""

    async def reset_export(self, name: str, *, force: bool) -> ExportStatus:
        """Empty an export."""

    async def copy_export(self, source: str, name: str, *, read_only: bool) -> ExportStatus:
        """Offer a clone, or a snapshot if read_only, of an export."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter by name; without a default it is required."""

    kind: type
    default: Any = ...


@dataclass(frozen=True, slots=True)
class Method:
    """One method: its parameters, and the call that takes them and gives records or nothing."""

    parameters: Mapping[str, Parameter]
    call: Callable[[Mapping[str, Any], Progress], Awaitable[Any]]

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
            if name in given and type(value) is not parameter.kind:  # bool is not an int here
                raise MessageError(
                    Code.INVALID_PARAMS, f"the parameter '{name}' is not of type {parameter.kind.__name__}"
                )
            read[name] = value
        return read


RUN_OPTIONS = {field.name: Parameter(type(field.default), field.default) for field in dataclasses.fields(RunOptions)}


def method_table(operations: Operations, changes: Changes) -> dict[str, Method]:
    """Every method by its name."""
    name, force = Parameter(str), Parameter(bool, False)
    size = Parameter(int)

    async def status(_: Mapping[str, Any], __: Progress) -> Any:
        return operations.status()

    async def usage(_: Mapping[str, Any], __: Progress) -> Any:
        return await operations.usage()

    async def run(given: Mapping[str, Any], progress: Progress) -> Any:
        chosen = {name: given[name] for name in RUN_OPTIONS}
        asked = {name: given[name] for name in ("kind", "pool", "cpu_percent")}
        return await operations.run(asked.pop("kind"), RunOptions(**chosen), **asked, progress=progress)

    async def add_pool(given: Mapping[str, Any], _: Progress) -> Any:
        return await changes.add_pool(**given)

    async def change_pool(given: Mapping[str, Any], _: Progress) -> Any:
        return await changes.change_pool(**given)

    async def remove_pool(given: Mapping[str, Any], _: Progress) -> Any:
        await changes.remove_pool(**given)

    async def add(given: Mapping[str, Any], _: Progress) -> Any:
        return await changes.add_export(**given)

    async def remove(given: Mapping[str, Any], _: Progress) -> Any:
        await changes.remove_export(**given)

    async def resize(given: Mapping[str, Any], _: Progress) -> Any:
        return await changes.resize_export(**given)

    async def reset(given: Mapping[str, Any], _: Progress) -> Any:
        return await changes.reset_export(**given)

    async def copy(given: Mapping[str, Any], _: Progress) -> Any:
        return await changes.copy_export(**given)

    return {
        "status": Method({}, status),
        "usage": Method({}, usage),
        "run": Method(
            {
                "kind": Parameter(str),
                "pool": Parameter(str, None),
                "cpu_percent": Parameter(int, 100),
                **RUN_OPTIONS,
            },
            run,
        ),
        "pools.add": Method({"name": name, "mem_limit": Parameter(int, 0), "dedup": Parameter(str, "fold")}, add_pool),
        "pools.change": Method(
            {"name": name, "mem_limit": Parameter(int, None), "dedup": Parameter(str, None)}, change_pool
        ),
        "pools.remove": Method({"name": name}, remove_pool),
        "exports.add": Method(
            {
                "name": name,
                "size_bytes": size,
                "pool": Parameter(str, None),
                "read_only": Parameter(bool, False),
                "description": Parameter(str, ""),
            },
            add,
        ),
        "exports.remove": Method({"name": name, "force": force}, remove),
        "exports.resize": Method({"name": name, "size_bytes": size, "force": force}, resize),
        "exports.reset": Method({"name": name, "force": force}, reset),
        "exports.copy": Method({"source": name, "name": name, "read_only": Parameter(bool, False)}, copy),
    }
