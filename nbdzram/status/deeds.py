"""Of what is done to exports: what would be lost, and what came of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nbdzram.status.traffic import ExportStatus
from nbdzram.units import said


@dataclass(frozen=True, slots=True)
class ExportLoss:
    """What removing, resetting or shrinking an export would destroy."""

    name: str
    size_bytes: int  # of the export, now
    stored_bytes: int  # blocks that would go, same-filled included
    alone_bytes: int | None  # compressed bytes that nobody else holds; None: not asked for, or not known
    clients: tuple[str, ...]  # who is attached


@dataclass(frozen=True, slots=True)
class ExportRenaming:
    """What came of renaming an export."""

    old_name: str
    export: ExportStatus
    old_name_declared: bool  # the configuration still knows the export by its old name
    remembered: bool  # there is a state directory, or one of checkpoints

    def lines(self) -> Iterator[str]:
        """As a person reads it."""
        old, new = said(self.old_name), said(self.export.name)
        yield f"renamed {old} to {new}"
        if not self.old_name_declared:
            return
        yield f"{old} is declared in the configuration: " + (
            f"declare it as {new}; until then the next start offers {new} as it is, and makes no {old}"
            if self.remembered
            else f"the next start makes it again, empty, unless it is declared as {new}"
        )
