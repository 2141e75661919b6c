"""What a running server says of itself: frozen records that the server makes, control sends and metrics publish.

A file for each thing that is told of. It is read when something of it is first asked for: to make the class of a record
takes half a millisecond, there are some thirty, and a command of the command line needs two or three.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

PLACES = {
    "encoding": "fields from_json to_json to_json_pieces",
    "exports": "ExportFigures default_trouble",
    "traffic": "OperationStatus ExportStatus",
    "deeds": "ExportLoss ExportRenaming",
    "clients": "ClientStatus",
    "pools": "PoolFigures limit_trouble",
    "runs": "RunOptions RunStatus",
    "maintenance": "RunTotals RunSummary MaintenanceStatus ScrubStatus PoolStatus RunReport",
    "streams": "SendReport ReceiveReport StreamStatus",
    "brief": "Named Brief",
    "holdings": "Holdings",
    "account": "Account",
    "server": "ExportSample HistorySample ThreadStatus CheckpointStatus JournalStatus HeadroomStatus ServerStatus",
    "reload": "ReloadReport",
}
"""What each file has."""

if TYPE_CHECKING:
    from nbdzram.status.account import *
    from nbdzram.status.brief import *
    from nbdzram.status.clients import *
    from nbdzram.status.deeds import *
    from nbdzram.status.encoding import *
    from nbdzram.status.exports import *
    from nbdzram.status.holdings import *
    from nbdzram.status.maintenance import *
    from nbdzram.status.pools import *
    from nbdzram.status.reload import *
    from nbdzram.status.runs import *
    from nbdzram.status.server import *
    from nbdzram.status.streams import *
    from nbdzram.status.traffic import *
else:

    def __getattr__(name: str) -> Any:
        """Read the file that has it."""
        for place, names in PLACES.items():
            if name in names.split():
                found = globals()[name] = getattr(importlib.import_module(f"{__name__}.{place}"), name)
                return found
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
