"""`nbdzram pools`: list, add, remove, limit and set pools of a running server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from nbdzram.cli.columns import Column
from nbdzram.cli.common import (
    Group,
    connect,
    control_option,
    each_once,
    json_option,
    list_rows,
    pool_names,
    print_json,
    remove_named,
    warn,
)
from nbdzram.control.client import ControlClient
from nbdzram.errors import NoSuchExport, UserError
from nbdzram.status import PoolFigures, from_json, limit_trouble
from nbdzram.units import format_size

COLUMNS: list[Column[PoolFigures]] = [
    Column("NAME", "", lambda pool: pool.name),
    Column("DATA", "", lambda pool: pool.stats.orig_data_size, True),
    Column("TOTAL", "", lambda pool: pool.stats.mem_used_total, True),
    Column("MEM-LIMIT", "", lambda pool: pool.stats.mem_limit, True, zero="none"),
    Column("DEDUP", "", lambda pool: pool.dedup),
    Column("VERIFY", "", lambda pool: None if pool.verify else "off", seldom=True),
    Column("SHARING", "", lambda pool: "told" if pool.tells_sharing else None, seldom=True),
    Column("FILE", "", lambda pool: pool.path or ""),
]
DEDUP = click.Choice(["fold", "inline"])  # as config.Dedup has it, which a command that asks a server does not load
SWITCH = click.Choice(["on", "off"])


class Limit(click.ParamType[int]):
    """A pool's limit in bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """A size, a share of this machine's memory, or 0 for none."""
        from nbdzram.values import memory  # noqa: PLC0415 - which the configuration comes with

        try:
            return memory(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


@click.group(
    "pools",
    cls=Group,
    invoke_without_command=True,
    epilog="\b\nExamples:\n  nbdzram pools\n  nbdzram pools add fast --mem-limit 4G --dedup inline",
)
@json_option
@control_option
@click.pass_context
def command(context: click.Context, *, as_json: bool, control: Path | None) -> None:
    """List, add, remove, limit and set pools of a running server.

    A pool is one memory limit and one folding domain. With --state-dir the server remembers these changes.
    """
    if context.invoked_subcommand is None:
        show(as_json=as_json, control=control)


def show(*, as_json: bool, control: Path | None) -> None:
    """Print the pools. Raises UserError."""
    list_rows(COLUMNS, PoolFigures, "pools", as_json=as_json, control=control)


@command.command("list", epilog="Example: nbdzram pools list --json")
@json_option
@control_option
def list_(*, as_json: bool, control: Path | None) -> None:
    """List the pools, as `nbdzram pools` alone does."""
    show(as_json=as_json, control=control)


@command.command("add", epilog="Example: nbdzram pools add fast --mem-limit 25%")
@click.argument("name")
@click.option(
    "--mem-limit", type=Limit(), metavar="SIZE", default=0, help="Most memory, metadata included.  [default: none]"
)
@click.option("--dedup", type=DEDUP, default="fold", show_default=True, help="When equal blocks meet.")
@click.option("--no-verify", is_flag=True, help="Deliver what is stored without checking it.")
@click.option("--tell-sharing", is_flag=True, help="Let clients find out what others in the pool store.")
@json_option
@control_option
def add(
    *,
    name: str,
    mem_limit: int,
    dedup: str,
    no_verify: bool,
    tell_sharing: bool,
    as_json: bool,
    control: Path | None,
) -> None:
    """Open a new, empty pool.

    `nbdzram exports add --pool NAME` puts disks into it.
    """
    settings = {"mem_limit": mem_limit, "dedup": dedup, "verify": not no_verify, "tell_sharing": tell_sharing}
    _change("pools.add", control, as_json, "added", name=name, **settings)


@command.command("remove", epilog="Example: nbdzram pools remove fast")
@click.argument("names", metavar="NAME...", nargs=-1, required=True, callback=each_once, shell_complete=pool_names)
@json_option
@control_option
def remove(*, names: tuple[str, ...], as_json: bool, control: Path | None) -> None:
    """Close pools that hold no export, and remove their files.

    Of several none goes where one cannot.
    """
    with connect(control) as client:
        if len(names) > 1:
            _require_all_removable(client, names)
        remove_named(client, "pools.remove", names, as_json=as_json)


@command.command(
    "limit",
    epilog="\b\nExamples:\n  nbdzram pools limit default 8G\n  nbdzram pools limit default 50%\n"
    "  nbdzram pools limit default 0",
)
@click.argument("name", shell_complete=pool_names)
@click.argument("size", type=Limit())
@json_option
@control_option
def limit(*, name: str, size: int, as_json: bool, control: Path | None) -> None:
    """Set a pool's memory limit to SIZE; 0 is none.

    What is stored stays, as in zram: below what is in use, writes that need memory fail until enough was freed.
    """
    _change("pools.change", control, as_json, "limited", name=name, mem_limit=size)


@command.command("dedup", epilog="Example: nbdzram pools dedup default inline")
@click.argument("name", shell_complete=pool_names)
@click.argument("when", type=DEDUP)
@json_option
@control_option
def dedup(*, name: str, when: str, as_json: bool, control: Path | None) -> None:
    """Let equal blocks meet in a fold, or already at the write."""
    _change("pools.change", control, as_json, "changed", name=name, dedup=when)


@command.command("verify", epilog="Example: nbdzram pools verify default off")
@click.argument("name", shell_complete=pool_names)
@click.argument("switch", type=SWITCH)
@json_option
@control_option
def verify(*, name: str, switch: str, as_json: bool, control: Path | None) -> None:
    """Hold what is read against its fingerprint, or deliver it without.

    With on, damaged memory is an error of its block, and never wrong bytes.
    """
    _change("pools.change", control, as_json, "changed", name=name, verify=switch == "on")


@command.command("tell-sharing", epilog="Example: nbdzram pools tell-sharing default on")
@click.argument("name", shell_complete=pool_names)
@click.argument("switch", type=SWITCH)
@json_option
@control_option
def tell_sharing(*, name: str, switch: str, as_json: bool, control: Path | None) -> None:
    """Let clients and metrics find out what the pool's other exports store, or not.

    With on, also exports that admit different clients may be folded inline; so it is not turned off while they are.
    """
    _change("pools.change", control, as_json, "changed", name=name, tell_sharing=switch == "on")


def _require_all_removable(client: ControlClient, names: Sequence[str]) -> None:
    """Ask the server of each whether it would go. Raises NoSuchExport, UserError."""
    against = []
    for name in names:
        try:
            client.call("pools.lose", name=name)
        except NoSuchExport:
            raise
        except UserError as error:
            against.append(str(error))
    if against:
        raise UserError(f"nothing is done: {'; '.join(against)}")


def _change(method: str, control: Path | None, as_json: bool, done: str, **params: Any) -> None:
    with connect(control) as client:
        answer = client.call(method, **params)
    pool = from_json(PoolFigures, answer)
    trouble = limit_trouble(pool.name, pool.stats.mem_limit, pool.stats.memory_used) if "mem_limit" in params else None
    if trouble is not None:
        warn("; ".join(trouble))
    if as_json:
        return print_json(answer)
    told = [format_size(pool.stats.mem_limit) if pool.stats.mem_limit else "no limit", f"dedup {pool.dedup}"]
    told += ["verify off"] * (not pool.verify) + ["sharing told"] * pool.tells_sharing
    click.echo(f"{done} {pool.name} ({', '.join(told)})")
    return None
