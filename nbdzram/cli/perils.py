"""What of a configuration loses disks later, or does not do what it says, although everything works today.

`serve` logs it, `serve --check-config` prints it and `doctor` finds it: one list, so that nobody is told less.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from nbdzram.config import DEFAULT_POOL, CheckpointConfig, ServerConfig, TlsConfig, TlsMode
from nbdzram.machine import Machine
from nbdzram.settings import misspelled
from nbdzram.status import default_trouble, limit_trouble
from nbdzram.units import counted, format_size, format_sizes

OWN_BYTES = 72 << 20  # the program's 40 MiB, and what requests under way may hold (limits.total_bytes)
TABLES_SHARE = 10  # tables and indexes come on top of a pool's limit: at most a tenth of it

VANISHING = {
    Path("/dev/shm"): "systemd erases what a user other than root has there when the unit stops, or at logout "  # noqa: S108 - looked at
    "(RemoveIPC)",
    Path("/run/user"): "it is erased when the user logs out",
    Path("/run/nbdzram"): "it is the service's runtime directory, which systemd erases when the service stops",
    Path("/tmp"): "systemd gives a service a /tmp of its own and erases it when the service stops (PrivateTmp)",  # noqa: S108
    Path("/var/tmp"): "systemd gives a service a /var/tmp of its own and erases it at its stop (PrivateTmp)",  # noqa: S108
}
"""Directories that somebody else empties: systemd.exec(5), logind.conf(5), tmpfiles.d(5)."""


@dataclass(frozen=True, slots=True)
class Peril:
    """What would happen, and what to do instead."""

    says: str
    remedy: str


def perils(
    config: ServerConfig, machine: Machine | None = None, environment: Mapping[str, str] | None = None
) -> Iterator[Peril]:
    """Every one."""
    machine = machine or Machine()
    yield from size_perils(config, machine)
    yield from thread_perils(config, machine)
    yield from memory_perils(config, machine)
    yield from state_perils(config)
    yield from idle_perils(config)
    yield from environment_perils(os.environ if environment is None else environment)


def idle_perils(config: ServerConfig) -> Iterator[Peril]:
    """What is set and does nothing, where whoever set it relies on it."""
    tls, checkpoint = config.tls, config.checkpoint
    if tls.mode is TlsMode.OFF and tls != TlsConfig():
        yield Peril(
            "TLS has files, but its mode is off: clients are served in plain text",
            "--tls on offers it, --tls require insists on it",
        )
    if checkpoint.directory is None and checkpoint != CheckpointConfig():
        yield Peril(
            "checkpoints have an interval or a number, but no directory: none are taken", "set --checkpoint DIR"
        )
    if config.state_dir is None and checkpoint.directory is None:  # else it may be kept there: the server looks
        trouble = default_trouble(config.default_export, [export.name for export in config.exports])
        if trouble is not None:
            yield Peril(*trouble)
    for pool in config.pools:
        trouble = limit_trouble(pool.name, pool.mem_limit)
        if trouble is not None:
            yield Peril(*trouble)


def environment_perils(environment: Mapping[str, str]) -> Iterator[Peril]:
    """Variables that are nearly one of ours."""
    for variable, meant in misspelled(environment):
        yield Peril(f"the variable {variable} is none of nbdzram's and does nothing", f"did you mean {meant}?")


def size_perils(config: ServerConfig, machine: Machine) -> Iterator[Peril]:
    """Limits beyond what the machine has; doctor finds them by itself. Of a cgroup's memory: memory_perils."""
    share, limit = machine.memory(), sum(pool.mem_limit for pool in config.pools)
    if share.cgroup is None and limit > share.amount:
        may, has = format_sizes(limit, share.amount)
        says = f"the pools may take {may}, and {share} has {has}: memory runs out before a limit is reached"
        yield Peril(says, "lower --mem-limit, for example to 50%")


def thread_perils(config: ServerConfig, machine: Machine) -> Iterator[Peril]:
    """More threads than may run at a time."""
    processors = machine.processors()
    if config.threads > processors:
        says = f"{config.threads} threads are to serve clients, and {counted(processors, 'processor')} may be used"
        yield Peril(
            f"{says}: the others wait for a turn", f"--threads {processors}; unless it is said, there is one for each"
        )


def without_limit(pools: Mapping[str, int], used: Collection[str]) -> list[str]:
    """Of pools by their limits those that may take all there is: not the default one, which is always there, where
    there are others and it holds no export.
    """
    idle = {DEFAULT_POOL} - {*used} if len(pools) > 1 else set[str]()
    return [name for name, limit in pools.items() if not limit and name not in idle]


def memory_perils(config: ServerConfig, machine: Machine) -> Iterator[Peril]:
    """A cgroup ends what outgrows it, and disks in anonymous memory end with it."""
    share = machine.memory()
    if share.cgroup is None:
        return
    limits = {pool.name: pool.mem_limit for pool in config.pools}
    unlimited, limit = without_limit(limits, {export.pool for export in config.exports}), sum(limits.values())
    room = max(share.amount - OWN_BYTES, 0) * TABLES_SHARE // (TABLES_SHARE + 1)
    if unlimited:
        says = f"the pool '{unlimited[0]}' has no limit"
    elif limit > room:
        says = f"the pools may take {format_size(limit)}"
    else:
        return
    yield Peril(
        f"{says}, and {share} ends the server, and its disks with it, at {format_size(share.amount)}",
        f"--mem-limit {format_size(room)} leaves room for the program, tables and indexes" if room else "raise it",
    )


def state_perils(config: ServerConfig) -> Iterator[Peril]:
    """A state directory where others clean up."""
    if config.state_dir is None:
        return
    place = Path(os.path.realpath(config.state_dir))  # Path.resolve has no word for a link that leads to itself
    for directory, why in VANISHING.items():
        if place.is_relative_to(directory):
            yield Peril(
                f"the state directory {config.state_dir} lies below {directory}: {why}",
                "a tmpfs of its own keeps disks in memory: mount -t tmpfs -o size=SIZE,mode=0700,uid=USER tmpfs "
                "/var/lib/nbdzram",
            )
