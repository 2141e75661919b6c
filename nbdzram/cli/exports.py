"""`nbdzram exports`: list, add, change, rename, remove, resize, reset and roll back exports of a running server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nbdzram.cli.agree import agree
from nbdzram.cli.common import (
    Bound,
    Command,
    Group,
    Size,
    connect,
    control_option,
    each_once,
    export_names,
    json_option,
    one_by_one,
    pool_names,
    print_json,
    remove_named,
    warn,
)
from nbdzram.cli.listing import list_, show
from nbdzram.status import ExportFigures, from_json
from nbdzram.units import format_size, format_sizes, said

force_option = click.option(
    "--force", is_flag=True, help="End clients that are attached, once they have their answers; implies --yes."
)
yes_option = click.option("--yes", is_flag=True, help="Do not ask before content is destroyed.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Only tell what would be destroyed.")


def rules_options(command: Command) -> Command:
    """--allow-address NETWORK, --allow-certificate NAME."""
    for name, fills, metavar, of in (
        ("certificate", "certificates", "NAME", "clients whose certificate has this common or DNS name"),
        ("address", "addresses", "NETWORK", "IP clients from this address or network, such as 10.0.0.0/8"),
    ):
        option = click.option(
            f"--allow-{name}", fills, metavar=metavar, multiple=True, help=f"Admit {of}; may be given again."
        )
        command = option(command)
    return command


def bounds_options(command: Command) -> Command:
    """--quota SIZE, --iops N and so on, each None where it is not given."""
    for option, bound, metavar, says in reversed(BOUND_OPTIONS):
        command = click.option(option, bound, metavar=metavar, type=Bound(bound), help=says)(command)
    return command


BOUND_OPTIONS = (
    ("--quota", "quota_bytes", "SIZE", "Bytes of blocks that it may store, or off."),
    ("--iops", "iops", "N", "Requests a second, of all its clients together, or off."),
    ("--iops-burst", "iops_burst", "N", "Of these at once, after a while without; off: a second's."),
    ("--bandwidth", "bandwidth_bytes", "SIZE", "Bytes a second that they read and write, or off."),
    ("--bandwidth-burst", "bandwidth_burst_bytes", "SIZE", "Of these at once, after a while without; off: a second's."),
)


@click.group(
    "exports",
    cls=Group,
    invoke_without_command=True,
    epilog="\b\nExamples:\n  nbdzram exports\n  nbdzram exports add scratch 10G",
)
@json_option
@control_option
@click.pass_context
def command(context: click.Context, *, as_json: bool, control: Path | None) -> None:
    """List, add, change, rename, remove, resize, reset and roll back exports of a running server.

    With --state-dir the server remembers these changes.
    """
    if context.invoked_subcommand is None:
        show(as_json=as_json, control=control)


command.add_command(list_)


@command.command("add", epilog="Example: nbdzram exports add scratch 10G --description 'build trees'")
@click.argument("name")
@click.argument("size", type=Size())
@click.option("--pool", metavar="NAME", shell_complete=pool_names, help="The pool that holds it.  [default: default]")
@click.option("--read-only", is_flag=True, help="Clients may not write.")
@click.option("--private", is_flag=True, help="Its blocks are never folded with other exports'.")
@click.option("--description", metavar="TEXT", help="What clients are told of it.")
@rules_options
@bounds_options
@json_option
@control_option
def add(
    *,
    name: str,
    size: int,
    pool: str | None,
    read_only: bool,
    private: bool,
    description: str | None,
    addresses: tuple[str, ...],
    certificates: tuple[str, ...],
    as_json: bool,
    control: Path | None,
    **bounds: int | None,
) -> None:
    """Offer a new, empty disk.

    Without --allow-address and --allow-certificate it admits everyone who reaches the server. Of a name that the
    configuration declares, what is not given is as it is declared; of a name that a removed disk had, whom that
    admitted stays.
    """
    given = {
        "pool": pool,
        "read_only": read_only or None,
        "private": private or None,
        "description": description,
        "allow_addresses": addresses or None,
        "allow_certificates": certificates or None,
        **bounds,
    }
    _change("exports.add", control, as_json, "added", name=name, size_bytes=size, **_given(given))


@command.command(
    "change",
    epilog="\b\nExamples:\n  nbdzram exports change scratch --allow-address 10.0.0.0/8\n"
    "  nbdzram exports change golden --read-only --description 'the image of May'\n"
    "  nbdzram exports change scratch --allow-everyone\n"
    "  nbdzram exports change scratch --quota 20G --iops 500 --bandwidth 50M",
)
@click.argument("name", shell_complete=export_names)
@rules_options
@click.option(
    "--allow-everyone", is_flag=True, help="Forget the rules that there were; with none beside it, admit everyone."
)
@click.option("--read-only/--no-read-only", default=None, help="Whether clients may write.")
@click.option("--description", metavar="TEXT", help="What clients are told of it.")
@bounds_options
@json_option
@control_option
def change(
    *,
    name: str,
    addresses: tuple[str, ...],
    certificates: tuple[str, ...],
    allow_everyone: bool,
    read_only: bool | None,
    description: str | None,
    as_json: bool,
    control: Path | None,
    **bounds: int | None,
) -> None:
    """Set who may attach to a disk and how, what it may take, and what clients are told of it.

    A list that is given takes the place of the one there was; what is not given stays. Clients that are attached and no
    longer qualify are ended, once what they have under way is answered. Over its quota a disk keeps what it stores: its
    blocks can be written again and trimmed, and what would be a block more is refused for want of space. Over its
    limits requests wait; those that wait already are held to new limits at once.
    """
    forgotten: list[str] | None = [] if allow_everyone else None
    given = _given(
        {
            "allow_addresses": addresses or forgotten,
            "allow_certificates": certificates or forgotten,
            "read_only": read_only,
            "description": description,
            **bounds,
        }
    )
    if not given:
        raise click.UsageError(
            "Nothing to change: give --allow-address, --allow-certificate, --allow-everyone, --read-only, "
            f"--description, {', '.join(option for option, *_ in BOUND_OPTIONS[:-1])} or {BOUND_OPTIONS[-1][0]}."
        )
    _change("exports.change", control, as_json, "changed", name=name, **given)


@command.command("rename", epilog="Example: nbdzram exports rename scratch build-trees")
@click.argument("name", shell_complete=export_names)
@click.argument("new_name")
@json_option
@control_option
def rename(*, name: str, new_name: str, as_json: bool, control: Path | None) -> None:
    """Offer a disk under another name, with its content and its rules.

    Clients that are attached go on; who connects from now on asks for NEW_NAME. Metrics and logs name it so, too.
    """
    with connect(control) as client:
        answer = client.call("exports.rename", name=name, new_name=new_name)
    if as_json:
        return print_json(answer)
    from nbdzram.status import ExportRenaming  # noqa: PLC0415 - for this alone

    for line in from_json(ExportRenaming, answer).lines():
        click.echo(line)
    return None


@command.command("remove", epilog="Example: nbdzram exports remove scratch")
@click.argument("names", metavar="NAME...", nargs=-1, required=True, callback=each_once, shell_complete=export_names)
@yes_option
@force_option
@dry_run_option
@json_option
@control_option
def remove(
    *, names: tuple[str, ...], yes: bool, force: bool, dry_run: bool, as_json: bool, control: Path | None
) -> None:
    """Remove disks with their content. Their clones and snapshots stay.

    Asks before content goes; where nobody can be asked, --yes or --force says it beforehand.
    """
    with connect(control) as client:
        if agree(client, "remove", names, yes=yes, force=force, dry_run=dry_run, as_json=as_json):
            remove_named(client, "exports.remove", names, as_json=as_json, force=force)


@command.command("resize", epilog="Example: nbdzram exports resize scratch 20G")
@click.argument("name", shell_complete=export_names)
@click.argument("size", type=Size())
@yes_option
@force_option
@dry_run_option
@json_option
@control_option
def resize(*, name: str, size: int, yes: bool, force: bool, dry_run: bool, as_json: bool, control: Path | None) -> None:
    """Change a disk's size. Clients see the new size when they attach again.

    Shrinking destroys what lies behind the new end: it asks, and where nobody can be asked wants --yes or --force.
    """
    with connect(control) as client:
        if agree(client, "shrink", (name,), size_bytes=size, yes=yes, force=force, dry_run=dry_run, as_json=as_json):
            answer = client.call("exports.resize", name=name, size_bytes=size, yes=True, force=force)
            _tell("resized", answer, as_json=as_json)


@command.command("reset", epilog="Example: nbdzram exports reset scratch")
@click.argument("names", metavar="NAME...", nargs=-1, required=True, callback=each_once, shell_complete=export_names)
@yes_option
@force_option
@dry_run_option
@json_option
@control_option
def reset(
    *, names: tuple[str, ...], yes: bool, force: bool, dry_run: bool, as_json: bool, control: Path | None
) -> None:
    """Empty disks, as zramctl --reset does.

    Asks before content goes; where nobody can be asked, --yes or --force says it beforehand.
    """
    with connect(control) as client:
        if not agree(client, "reset", names, yes=yes, force=force, dry_run=dry_run, as_json=as_json):
            return
        one_by_one(
            names,
            lambda name: client.call("exports.reset", name=name, force=force),
            lambda answer: _done("reset", answer),
            as_json=as_json,
            as_list=False,
        )


@command.command("rollback", epilog="Example: nbdzram exports rollback disk disk@monday")
@click.argument("name", shell_complete=export_names)
@click.argument("snapshot", shell_complete=export_names)
@yes_option
@force_option
@dry_run_option
@json_option
@control_option
def rollback(
    *, name: str, snapshot: str, yes: bool, force: bool, dry_run: bool, as_json: bool, control: Path | None
) -> None:
    """Let a disk hold what SNAPSHOT holds.

    What differs is read first: a snapshot parts of which are not what was written is refused. What the disk held is
    gone, and its size is the snapshot's; name, rules and counters stay, and so does the snapshot. Asks before content
    goes; where nobody can be asked, --yes or --force says it beforehand.
    """
    with connect(control) as client:
        if agree(
            client, "roll back", (name,), snapshot=snapshot, yes=yes, force=force, dry_run=dry_run, as_json=as_json
        ):
            answer = client.call("exports.rollback", name=name, snapshot=snapshot, force=force)
            _tell("rolled back", answer, as_json=as_json)


def _change(method: str, control: Path | None, as_json: bool, done: str, **params: Any) -> None:
    with connect(control) as client:
        answer = client.call(method, **params)
    export = from_json(ExportFigures, answer)
    if 0 < params.get("quota_bytes", 0) < export.stored_bytes:
        stores, quota = format_sizes(export.stored_bytes, params["quota_bytes"])
        warn(
            f"the export '{export.name}' stores {stores}, over its quota of {quota}: what is stored "
            "stays, and writes of new blocks fail; trim it, or raise the quota"
        )
    _tell(done, answer, as_json=as_json)


def _tell(done: str, answer: Any, *, as_json: bool) -> None:
    if as_json:
        return print_json(answer)
    return click.echo(_done(done, answer))


def _done(done: str, answer: Any) -> str:
    export = from_json(ExportFigures, answer)
    return f"{done} {said(export.name)} ({format_size(export.size_bytes)} in pool {export.pool})"


def _given(params: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in params.items() if value is not None}
