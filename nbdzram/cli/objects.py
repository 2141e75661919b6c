"""What --json prints: objects whose shape programs may rely on, and their text.

SCHEMA is the number of that shape, for every command's --json. Keys may be added under one number; a key that goes, or
whose type or meaning changes, takes the next. docs/reference/json.md describes it, and a test holds it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nbdzram.cli.columns import Column, Row
from nbdzram.status.encoding import fields

if TYPE_CHECKING:
    from nbdzram.engine.stats import DiskUsage
    from nbdzram.rates import Rates
    from nbdzram.status import Account, ExportStatus, OperationStatus, PoolFigures, ServerStatus

SCHEMA = 1

LINE_WIDTH = 120
"""What fits in so many columns is one line: a figure a line made 2,569 of them for nine exports."""


def text_of(value: Any, indent: int = 0, behind: int = 0) -> str:
    """JSON for programs that people can read: objects and lists on one line where they fit. Records are objects.

    `behind`: columns of the first line that are taken already.
    """
    line = json.dumps(value, default=fields)
    if behind + len(line) < LINE_WIDTH:  # a comma may follow
        return line
    if not isinstance(value, dict | list | tuple):
        value = fields(value) if hasattr(value, "__dataclass_fields__") else value
    inner = " " * (indent + 2)
    if isinstance(value, dict) and value:
        keys = [f"{inner}{json.dumps(str(key))}: " for key in value]
        parts = [key + text_of(item, indent + 2, len(key)) for key, item in zip(keys, value.values(), strict=True)]
        return "{\n" + ",\n".join(parts) + "\n" + " " * indent + "}"
    if isinstance(value, list | tuple) and value:
        return (
            "[\n"
            + ",\n".join(inner + text_of(item, indent + 2, indent + 2) for item in value)
            + "\n"
            + " " * indent
            + "]"
        )
    return line


def stat_object(status: Account, usage: Mapping[str, DiskUsage]) -> dict[str, Any]:
    """Of `stat --json`: a pool's counters stand beside its name, an export's costs under `usage`."""
    return {
        "schema": SCHEMA,
        "version": status.version,
        "pid": status.pid,
        "uptime_seconds": status.uptime_seconds,
        "uris": list(status.uris),
        "connections": status.connections,
        "pools": [_pool(pool) for pool in status.pools],
        "exports": [
            _export(export, usage.get(export.name), status.latency_bounds_seconds) for export in status.exports
        ],
    }


def rows_object(columns: Sequence[Column[Row]], rows: Sequence[Row]) -> dict[str, Any]:
    """Of `stat --json -o LIST`: the columns that were asked for, a row each; sizes in bytes, null for an empty cell."""
    keys = [column.heading.lower().replace("-", "_") for column in columns]
    return {
        "schema": SCHEMA,
        "rows": [dict(zip(keys, (column.cell(row) for column in columns), strict=True)) for row in rows],
    }


def top_object(status: ServerStatus, all_rates: Rates, rates: Mapping[str, Rates]) -> dict[str, Any]:
    """Of `top --json`: what happened a second since the last look, and what is stored."""
    from nbdzram.rates import Rates  # noqa: PLC0415 - most JSON has none

    return {
        "schema": SCHEMA,
        "uptime_seconds": status.uptime_seconds,
        "connections": status.connections,
        "rates": fields(all_rates),
        "pools": [
            {
                "name": pool.name,
                "orig_data_size": pool.stats.orig_data_size,
                "mem_used_total": pool.stats.mem_used_total,
                "mem_limit": pool.stats.mem_limit,
                "metadata": pool.stats.metadata,
                "saved": pool.stats.saved,
                "queue": [fields(run) for run in pool.maintenance.queue],
            }
            for pool in status.pools
        ],
        "exports": [
            {
                "name": export.name,
                "stored_bytes": export.stored_bytes,
                "connections": export.connections,
                "rates": fields(rates.get(export.name, Rates())),
            }
            for export in status.exports
        ],
    }


def _pool(pool: PoolFigures) -> dict[str, Any]:
    names = {"name": pool.name, "path": pool.path, "dedup": pool.dedup}
    return names | fields(pool.stats) | {"saved": pool.stats.saved}


def _export(export: ExportStatus, usage: DiskUsage | None, bounds: Sequence[float]) -> dict[str, Any]:
    operations = {name: _operation(operation, bounds) for name, operation in export.operations.items()}
    return fields(export) | {"operations": operations, "usage": fields(usage) if usage else None}


def _operation(operation: OperationStatus, bounds: Sequence[float]) -> dict[str, Any]:
    """Without its histogram, which /metrics has; its median and p99 instead, since the server started."""
    from nbdzram.rates import quantile  # noqa: PLC0415 - the same

    return {
        "requests": operation.requests,
        "bytes": operation.bytes,
        "errors": operation.errors,
        "median_seconds": quantile(operation.latency_counts, bounds, 0.5),
        "p99_seconds": quantile(operation.latency_counts, bounds, 0.99),
    }
