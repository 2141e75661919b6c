"""Asking before content is destroyed: on a terminal a question, elsewhere a flag, and always what would be lost."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from nbdzram.cli.common import print_json, require_all, require_export, warn
from nbdzram.control.client import ControlClient
from nbdzram.errors import UserError
from nbdzram.status.encoding import from_json
from nbdzram.units import format_size, said

if TYPE_CHECKING:
    from nbdzram.status import ExportLoss

NAMED_CLIENTS = 5  # enough to know whom to ask


def agree(
    client: ControlClient,
    verb: str,
    names: Sequence[str],
    *,
    size_bytes: int = 0,
    snapshot: str | None = None,
    yes: bool,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> bool:
    """Whether to go on and `verb` these exports, of which `size_bytes` bytes or a `snapshot` would stay.

    A dry run tells and does not go on. Nothing is asked when nothing is lost (but a shrinking disk may have partitions
    to its end), nor of one disk alone when clients are attached: the server will refuse. A name that is not there,
    several of which one has clients, or a snapshot that cannot be gone back to, ends the command before anything is
    asked or done. Where another process has taken over while somebody thought, it is asked once more: what was agreed
    to is what the one before would have destroyed. Raises UserError.
    """
    stays = {"size_bytes": size_bytes} if snapshot is None else {"snapshot": snapshot}
    while True:
        if len(names) > 1:
            _require_possible(client, names, whoever=force or dry_run)
        if (yes or force) and not dry_run:
            return True
        losses = _losses(client, names, stays)
        if dry_run:
            _tell(verb, losses, size_bytes, as_json=as_json)
            return False
        at_stake = [loss for loss in losses if loss.stored_bytes or 0 < size_bytes < loss.size_bytes]
        if not at_stake or any(loss.clients for loss in losses):
            return True
        lost = "; ".join(_describe(loss, verb) for loss in at_stake)
        if not sys.stdin.isatty():
            raise UserError(f"to {verb} {lost}; say --yes if that is meant, or look with --dry-run")
        if not click.confirm(f"to {verb} {lost}; go on?", err=True):
            raise UserError("that was not agreed to, and nothing is done")
        if not client.renewed():
            return True
        warn("another server answers since the question, and nothing is done yet; of this one:")


def _require_possible(client: ControlClient, names: Sequence[str], *, whoever: bool) -> None:
    """Each is there, and has no clients unless `whoever` is attached is ended. Raises NoSuchExport, UserError."""
    attached = {one["name"]: one["connections"] for one in client.status_part("exports")}
    for name in names:
        require_export(name, attached)
    peers: dict[str, list[str]] = {}
    for one in client.clients() if not whoever and any(attached[name] for name in names) else ():
        peers.setdefault(one.export, []).append(one.peer)
    held = {name: f"has clients ({_named(peers[name])})" if name in peers else "" for name in attached}
    require_all("the export", names, held, "let them detach, or end them with --force")


def _losses(client: ControlClient, names: Sequence[str], stays: Mapping[str, Any]) -> list[ExportLoss]:
    from nbdzram.status import ExportLoss  # noqa: PLC0415 - lists and additions destroy nothing

    return [from_json(ExportLoss, client.call("exports.lose", name=name, **stays)) for name in names]


def _tell(verb: str, losses: Sequence[ExportLoss], size_bytes: int, *, as_json: bool) -> None:
    if as_json:
        return print_json(losses)
    for loss in losses:
        meant = "resize" if size_bytes >= loss.size_bytes else verb  # nothing lies behind its new end
        clients = f"; attached: {_named(loss.clients)} (--force ends them)" if loss.clients else ""
        click.echo(f"to {meant} {_describe(loss, meant)}{clients}")
    return None


def _describe(loss: ExportLoss, verb: str) -> str:
    """Behind the verb."""
    if not loss.stored_bytes:  # whoever is asked all the same reads why
        why = ", though a file system or partitions may reach to its end" if verb == "shrink" else ""
        return f"{said(loss.name)} destroys nothing that is stored{why}"
    told = f"{said(loss.name)} destroys {format_size(loss.stored_bytes)} of content"
    if loss.alone_bytes is None:
        return told
    if not loss.alone_bytes:
        return f"{told}, and no block that nothing else has"
    return f"{told}, with blocks that nothing else has ({format_size(loss.alone_bytes)} compressed)"


def _named(clients: Sequence[str]) -> str:
    more = len(clients) - NAMED_CLIENTS
    return ", ".join(clients[:NAMED_CLIENTS]) + (f" and {more} more" if more > 0 else "")
