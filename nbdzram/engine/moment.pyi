from collections.abc import Sequence

from nbdzram.engine.disk import Disk
from nbdzram.engine.pool import Pool

def concealed(pool: Pool) -> list[Disk]:
    """The disks of a pool that are not offered: being filled, or whole and found so on opening."""

def prepare(
    pool: Pool, name: str, size_bytes: int, *, read_only: bool = False, private: bool = False, alike: Disk | None = None
) -> Disk:
    """A new, empty disk that is concealed, and deleted by the next opening until it is finished.

    alike: it is of that disk's folding domain. Raises as Pool.create does.
    """

def snapshot_together(sources: Sequence[Disk], names: Sequence[str], *, read_only: bool = True) -> list[Disk]:
    """Concealed copies of disks, of any pools, as they are at one moment: each answered write is in, no later one.

    Raises UserError, ExportExists, EngineError (one is gone); then there is none.
    """

def snapshot_changed(
    sources: Sequence[Disk], earlier: Sequence[Disk | None], names: Sequence[str], *, read_only: bool = True
) -> list[Disk | None]:
    """The same, of one moment, but None for each disk that holds just then what its `earlier` copy holds.

    Compared are roots: a block that was rewritten with the same bytes is a change, a resizing is none. Raises as above.
    """

def are_alike(disk: Disk, copy: Disk) -> bool:
    """Whether a disk holds what a copy of it holds, and is as large.

    Compared are roots: one where a block was rewritten with the same bytes is another one, and so is one that is gone.
    """

def finish(disk: Disk) -> None:
    """Say of a concealed disk that it is whole: opening keeps it from now on. Raises EngineError when it is gone."""

def reveal(disk: Disk) -> None:
    """Make a concealed disk an export as any other. Raises EngineError when it is gone."""

def discard(disks: Sequence[Disk]) -> None:
    """Delete disks that are not going to be offered, those that are still there. May take long.

    Of a pool that is being closed the next opening deletes them.
    """

def new_identity() -> int:
    """One that no content has."""
