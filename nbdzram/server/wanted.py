"""What is asked of exports and pools at run time, held to the rules of flags and TOML."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from nbdzram import values
from nbdzram.config import PoolConfig
from nbdzram.errors import UserError
from nbdzram.server.state import ExportRecord

Outcome = TypeVar("Outcome")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked of an export; None: as it is. To give one list of its rules says that they are known."""

    read_only: bool | None
    description: str | None
    addresses: Sequence[str] | None
    certificates: Sequence[str] | None
    bounds: Mapping[str, int | None]  # those of bounds.Bounds that are asked for

    def applied_to(self, record: ExportRecord) -> ExportRecord:
        """The record with what is wanted. Raises UserError."""
        given: dict[str, Any] = {}
        if self.read_only is not None:
            given["read_only"] = self.read_only
        if self.description is not None:
            given["description"] = valid(values.description, self.description)
        lists: dict[str, Any] = {}
        if self.addresses is not None:
            lists["addresses"] = valid(values.several(values.network), list(self.addresses))
        if self.certificates is not None:
            lists["certificates"] = valid(values.several(values.certificate_name), list(self.certificates))
        if lists:
            given["access"] = dataclasses.replace(record.access, nobody=False, **lists)
        bounds = {name: valid(values.BOUNDS[name], value) for name, value in self.bounds.items() if value is not None}
        return dataclasses.replace(record, bounds=dataclasses.replace(record.bounds, **bounds), **given)


def pool_config(name: str, mem_limit: int, dedup: str, *, verify: bool, tell_sharing: bool) -> PoolConfig:
    """What is asked of a pool. Raises UserError."""
    return PoolConfig(
        name=valid(values.pool_name, name),
        mem_limit=valid(values.memory, mem_limit),
        dedup=valid(values.dedup, dedup),
        verify=verify,
        tell_sharing=tell_sharing,
    )


def valid(read: Callable[[object], Outcome], value: object) -> Outcome:
    """A value as flags and TOML read it. Raises UserError."""
    try:
        return read(value)
    except ValueError as error:
        raise UserError(str(error)) from None
