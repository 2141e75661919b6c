"""What `serve` says of itself to people: what a configuration means, and where a server is that is ready."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nbdzram import __version__
from nbdzram.cli.hints import how_to_attach, tellable
from nbdzram.cli.perils import perils
from nbdzram.config import ExportConfig, ServerConfig, TlsConfig
from nbdzram.units import format_seconds, format_size, said

if TYPE_CHECKING:
    from nbdzram.status import CheckpointStatus, ServerStatus

GREETED_EXPORTS = 20  # what a screen takes
STDOUT = 1

log = logging.getLogger("nbdzram.server")


def print_in_background(lines: Iterable[str]) -> None:
    """Print what nobody may be reading: the exports are served all the same."""
    from nbdzram.server.logbook import LineWriter  # noqa: PLC0415 - other commands print nothing so

    def failed(error: OSError) -> None:
        log.warning("cannot print where it listens: %s", error.strerror)

    printed = LineWriter(STDOUT, encoding=sys.stdout.encoding, failed=failed)
    for line in lines:
        printed.put(line)
    printed.close(0.0)  # its thread ends with the last of them: a server may come here often


def greeting(status: ServerStatus, tls: TlsConfig, metrics: str | None, control: Path) -> Iterator[str]:
    """What a newcomer needs to see: what is offered, where it is, and how to attach."""
    yield f"nbdzram {__version__} is ready"
    exports = status.exports
    for export in exports[:GREETED_EXPORTS]:
        yield _export_line(export.name, export.size_bytes, export.pool, read_only=export.read_only)
    if len(exports) > GREETED_EXPORTS:
        yield f"           and {len(exports) - GREETED_EXPORTS} more: nbdzram exports list"
    for uri in status.uris:
        yield f"  NBD      {uri}"
    yield f"  metrics  {metrics or 'off'}"
    yield f"  control  {control}"
    if not exports:
        yield "there is no disk yet; add one with: nbdzram exports add NAME SIZE"
    told = tellable(status.uris)
    if told:
        yield "attach it with one of"
        name = exports[0].name if exports else "NAME"
        yield from (f"  {line}" for line in how_to_attach(told[0], name, tls, swap=status.swap))


def the_end(
    config: ServerConfig, before: ServerStatus, checkpoint: CheckpointStatus | None, *, systemd_keeps: bool
) -> str:
    """What became of the disks: `before` the stop, and the last checkpoint, which the stop takes."""
    stored_bytes = sum(export.stored_bytes for export in before.exports)
    stored = format_size(stored_bytes)
    if config.state_dir is not None:
        return f"stopped; the disks stay in {config.state_dir}"
    if systemd_keeps:
        return "stopped; systemd keeps the disks for the next process of the unit, unless it stops that"
    if not stored_bytes:
        return "stopped"
    if checkpoint is None or before.checkpoint is None:
        return f"stopped; {stored} of content is gone with it: --state-dir keeps disks"
    place = config.checkpoint.directory
    if checkpoint.failures == before.checkpoint.failures:
        return f"stopped; the disks, {stored} of content, are in the last checkpoint in {place}"
    return f"stopped; the last checkpoint in {place} failed, and what was written since the one before is gone"


def _export_line(name: str, size_bytes: int, pool: str, *, read_only: bool) -> str:
    return f"  export   {said(name)} ({format_size(size_bytes)} in pool {pool}{', read-only' if read_only else ''})"


def _terms(export: ExportConfig) -> Iterator[str]:
    """What a disk is declared to be beside its size: who looks whether a typo took effect looks for these."""
    if export.image is not None:
        yield f"loaded from {export.image}"
    if export.private:
        yield "private"
    if export.quota:
        yield f"quota {format_size(export.quota)}"
    if export.iops:
        yield f"{export.iops} requests/s"
    if export.bandwidth:
        yield f"{format_size(export.bandwidth)}/s"
    if export.snapshots_seconds:
        yield f"a snapshot every {format_seconds(export.snapshots_seconds)}, {export.snapshots_keep} kept"
    for admitted in (export.allow_addresses, export.allow_certificates):
        if admitted:
            yield f"for {' '.join(admitted)}"


def _without_state(config: ServerConfig) -> str:
    checkpoint = config.checkpoint
    if checkpoint.directory is None:
        return "none: the disks end with the process"
    return f"none, but a checkpoint in {checkpoint.directory} every {format_seconds(checkpoint.interval_seconds)}"


def description(config: ServerConfig) -> Iterator[str]:
    """What a configuration means, for whoever checks it."""
    yield "the configuration is valid"
    for pool in config.pools:
        limit = format_size(pool.mem_limit) if pool.mem_limit else "no limit"
        yield f"  pool     {pool.name} ({limit}, dedup {pool.dedup})"
    for export in config.exports:
        told = _export_line(export.name, export.size_bytes, export.pool, read_only=export.read_only)
        yield ", ".join([told, *_terms(export)])
    for address in (*config.tcp, *config.unix, *config.vsock):
        yield f"  listen   {address}"
    yield f"  TLS      {config.tls.mode}"
    yield f"  metrics  {config.metrics or 'off'}"
    if config.default_export is not None:
        declared = config.default_export in {export.name for export in config.exports}
        where = "" if declared else ", which is not declared here: it has to be there from before"
        yield f"  default  {said(config.default_export)}{where}"
    yield f"  state    {config.state_dir or _without_state(config)}"
    yield from (f"  warning  {peril.says}; {peril.remedy}" for peril in perils(config))
