"""What `nbdzram doctor` looks at in a server that runs: what it was given, what it uses, and who looks after it.

Nothing here is taken from a configuration, which the server may never have been told. It tells its own state over the
control socket; the kernel tells the rest of its process under /proc, some of it only to root and the server's own user.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path

from nbdzram.cli.diagnosis import (
    EXPIRES_SOON,
    Finding,
    Level,
    Patient,
    client,
    huge_pages,
    server,
    swap,
    tasks_needed,
    versions,
)
from nbdzram.cli.hints import Address
from nbdzram.cli.perils import memory_perils, without_limit
from nbdzram.config import ExportConfig, PoolConfig, ServerConfig
from nbdzram.machine import Machine
from nbdzram.server.descriptors import places, wanted
from nbdzram.status import ServerStatus
from nbdzram.thresholds import LATE_INTERVALS, LATE_SECONDS, NEAR_LIMIT
from nbdzram.units import counted, format_seconds, format_size, format_sizes, some_of

NAMED = 10  # exports in a line; the log has them all
UNREADABLE_REMEDY = "the log names the block: write it anew, or remove the export"


def unit(patient: Patient) -> Iterator[Finding]:
    """Who starts it again after a crash, and with which limits."""
    name = _machine(patient).unit()
    if not patient.process.exists():
        says = "the server's process is not seen from here; in its container, or as its user, more can be told"
    elif name is None:
        says = "no service of systemd runs it: after a crash nobody starts it again, unless a container's engine does"
    else:
        says = f"{name} runs it; `systemctl show {name} -p MemoryMax -p TasksMax` tells its limits"
    yield Finding(Level.OK, "unit", says)


def pools(patient: Patient) -> Iterator[Finding]:
    """The limits that pools have now, together and each for itself, against what the server may have."""
    status, machine = _server(patient), _machine(patient)
    share = machine.memory()
    limits = {pool.name: pool.stats.mem_limit for pool in status.pools}
    unlimited = without_limit(limits, {export.pool for export in status.exports})
    total = sum(limits.values())
    if unlimited:
        says = f"the pool '{unlimited[0]}' has no limit, {share} has {format_size(share.amount)}"
        remedy = f"nbdzram pools limit {unlimited[0]} SIZE, so that writes fail before the machine"
        yield Finding(Level.WARN, "memory", says, remedy)
    elif total > share.amount:
        may, has = format_sizes(total, share.amount)
        says = f"the pools may take {may}, {share} has {has}"
        remedy = f"nbdzram pools limit {max(limits, key=limits.__getitem__)} SIZE, or raise MemoryMax= or --memory"
        yield Finding(Level.FAIL, "memory", says, remedy)
    else:
        says = f"{share} has {format_size(share.amount)}, of which pools may take {format_size(total)}"
        yield Finding(Level.OK, "memory", says)
    asked = ServerConfig(
        pools=tuple(PoolConfig(name=name, mem_limit=limit) for name, limit in limits.items()),
        exports=tuple(ExportConfig(name=one.name, size_bytes=one.size_bytes, pool=one.pool) for one in status.exports),
    )
    for peril in memory_perils(asked, machine):
        yield Finding(Level.WARN, "survival", peril.says, peril.remedy)
    left = status.headroom
    if left is not None and left.short:
        free = f"{format_size(left.free_bytes)} of {format_size(left.limit_bytes)}"
        says = f"memory is short: {free} are left to {left.whose}, and writes that need more are refused"
        yield Finding(
            Level.WARN, "memory", says, "trim on the clients, remove exports, or raise MemoryMax= or --memory"
        )
    for pool in status.pools:
        taken, limit = pool.stats.mem_used_total + pool.stats.metadata, pool.stats.mem_limit
        if limit and taken > NEAR_LIMIT * limit:
            says = f"the pool '{pool.name}' takes {format_size(taken)} of {format_size(limit)}: writes will fail"
            remedy = f"nbdzram fold --pool {pool.name}, or nbdzram pools limit {pool.name} SIZE"
            yield Finding(Level.WARN, "pool", says, remedy)


def state(patient: Patient) -> Iterator[Finding]:
    """Whether disks outlive the process, and whether their directory has room for what pools may still take."""
    status = _server(patient)
    kept = [pool for pool in status.pools if pool.path is not None]
    if not kept:
        name = _machine(patient).unit()
        end = "end with the process"
        if name is not None:
            end = f"outlive the process where {name} has FileDescriptorStoreMax=, and end with `systemctl stop {name}`"
        begins = "" if status.checkpoint is None else ", and the next one begins from a checkpoint"
        yield Finding(Level.OK, "state", f"no --state-dir: disks {end}{begins}")
        return
    place, room = Path(kept[0].path or "").parent, status.state_dir_free_bytes
    missing = sum(max(pool.stats.mem_limit - pool.stats.mem_used_total - pool.stats.metadata, 0) for pool in kept)
    if room < missing:
        there, missed = format_sizes(room, missing)
        says = f"{place} has room for {there}, the pools may take {missed} more"
        remedy = f"mount -o remount,size=SIZE {place} if it is a tmpfs, or lower the pools' limits"
        yield Finding(Level.WARN, "state", says, remedy)
    else:
        yield Finding(Level.OK, "state", f"{place} has room for {format_size(room)} more")


def threads(patient: Patient) -> Iterator[Finding]:
    """Against what its cgroup allows."""
    machine = _machine(patient)
    allowed, needed = machine.tasks(), tasks_needed(machine, len(_server(patient).threads))
    says = f"{_told(patient, 'status', 'Threads') or 'an unknown number'} run, up to {needed} are needed"
    if allowed is None:
        yield Finding(Level.OK, "tasks", f"{says}, no limit")
    elif allowed.amount >= needed:
        yield Finding(Level.OK, "tasks", f"{says}, {allowed} allows {allowed.amount}")
    else:
        remedy = f"TasksMax={needed} in the unit, or --pids-limit {needed}"
        yield Finding(Level.WARN, "tasks", f"{says}, {allowed} allows {allowed.amount}", remedy)


def descriptors(patient: Patient) -> Iterator[Finding]:
    """How many the server may have, for as many connections as it was told to take."""
    status = _server(patient)
    allowed, needed = status.connections_limit, wanted(status.connections_limit)
    limit = _told(patient, "limits", "Max open files")
    if limit == "unlimited":
        yield Finding(Level.OK, "descriptors", f"{needed} needed for {allowed} connections, and allowed")
    elif not limit:
        yield Finding(Level.OK, "descriptors", "the server's limit is told to root and to its own user only")
    elif int(limit) >= needed:
        says = f"{needed} needed for {allowed} connections, {limit} allowed; {status.connections} are connected"
        yield Finding(Level.OK, "descriptors", says)
    else:
        attached = places(allowed, int(limit)).attached
        says = f"{limit} allowed, {needed} needed for {allowed} connections: {attached} will be attached at once"
        yield Finding(Level.WARN, "descriptors", says, f"ulimit -Hn {needed}, or LimitNOFILE={needed} in the unit")


def addresses(patient: Patient) -> Iterator[Finding]:
    """Where it is reached, and whether by everybody."""
    status = _server(patient)
    for uri in status.uris:
        if _is_open(uri) and any(export.admits == "everyone" for export in status.exports):
            says = f"{uri} is reached from other machines, without TLS, and exports admit everyone"
            yield Finding(Level.WARN, "address", says, "listen on 127.0.0.1, require TLS, or list who may attach")
        else:
            yield Finding(Level.OK, "address", f"{uri} is served")


def certificate(patient: Patient) -> Iterator[Finding]:
    """The one that the server uses, until when, and whether its successor can be used."""
    status = _server(patient)
    if not status.tls_files_usable:
        says = "its files changed and cannot be used as they are; the server goes on with the old ones"
        yield Finding(
            Level.FAIL, "TLS", says, "mend the files, then systemctl reload, or kill -HUP; the log says what is wrong"
        )
    if status.certificate_expires_at is not None:
        yield _expiry(datetime.fromtimestamp(status.certificate_expires_at, UTC), datetime.now(UTC))
    elif any(uri.startswith("nbds") for uri in status.uris):
        yield Finding(Level.OK, "TLS", "required, with pre-shared keys")
    elif status.tls_files_usable:
        yield Finding(Level.OK, "TLS", "no certificate is in use")


def checkpoints(patient: Patient) -> Iterator[Finding]:
    """Whether they come as they should."""
    status = _server(patient)
    found, now = status.checkpoint, status.started_at + status.uptime_seconds
    if found is None:
        yield Finding(Level.OK, "checkpoints", "none: --checkpoint names no directory")
        return
    age = now - (status.started_at if found.moment is None else found.moment)
    told = "none is whole yet" if found.moment is None else f"the newest is {format_seconds(max(age, 0))} old"
    failed = f", {counted(found.failures, 'failure')} since the start" if found.failures else ""
    late = age > LATE_INTERVALS * found.interval_seconds + LATE_SECONDS
    due = age > 2 * found.interval_seconds + found.seconds and found.written_share is None  # and none is under way
    missed = due and found.failures > 0
    says = f"{told}, and one is due every {format_seconds(found.interval_seconds)}{failed}"
    remedy = "look into the log for why, and make room in the directory, or name another with --checkpoint"
    if late and status.exports:  # of nothing none is taken
        yield Finding(Level.FAIL, "checkpoints", says, remedy)
    elif found.held_back:
        names = some_of(found.held_back, NAMED)
        says = f"{told}{failed}; {names} cannot be read, and is there as it was before, if at all"
        yield Finding(Level.FAIL, "checkpoints", says, UNREADABLE_REMEDY)
    elif found.damaged_files:
        says = f"{told}{failed}; {counted(found.damaged_files, 'file')} that a start could not use lie beside it"
        remedy = "look into the directory's disk, and read or remove what is called *.damaged there"
        yield Finding(Level.WARN, "checkpoints", says, remedy)
    elif missed and status.exports:
        yield Finding(Level.WARN, "checkpoints", says, remedy)
    else:
        yield Finding(Level.OK, "checkpoints", f"{told}{failed}")


def journal(patient: Patient) -> Iterator[Finding]:
    """Whether FLUSH is answered, where it waits for a disk."""
    status = _server(patient)
    found, taken = status.journal, status.checkpoint
    if found is None:
        yield Finding(Level.OK, "journal", "none: what was flushed ends with the power, or is as old as a checkpoint")
    elif found.held_back:
        names = some_of(found.held_back, NAMED)
        says = f"FLUSH of {names} fails, as it cannot be read; on the disk is what was flushed before"
        yield Finding(Level.FAIL, "journal", says, UNREADABLE_REMEDY)
    elif found.usable and found.trouble:
        remedy = "look at that disk, and into the kernel's log: what is flushed is answered once it answers"
        yield Finding(Level.FAIL, "journal", f"{found.trouble}, which gives no answer", remedy)
    elif found.usable:
        yield Finding(Level.OK, "journal", f"FLUSH is on the disk when it is answered; pools: {', '.join(found.pools)}")
    elif found.trouble:
        remedy = "make room there, or start with --checkpoint on another disk; a new checkpoint is tried all the time"
        yield Finding(Level.FAIL, "journal", f"FLUSH fails: {found.trouble}", remedy)
    else:
        says = "FLUSH waits for the first checkpoint of this server"
        if taken is not None and taken.written_share is not None:
            says += f", of which {taken.written_share:.0%} is written"
        if taken is not None and taken.failures:
            says += f"; it failed {counted(taken.failures, 'time')}"
            yield Finding(Level.FAIL, "journal", says, "the log says why: it is tried again all the time")
        else:
            yield Finding(Level.WARN, "journal", says, "wait; the log says if it fails")


VITALS: tuple[Callable[[Patient], Iterator[Finding]], ...] = (
    versions,
    server,
    unit,
    pools,
    state,
    checkpoints,
    journal,
    swap,
    threads,
    descriptors,
    addresses,
    certificate,
    huge_pages,
    client,
)
"""Of a server that runs, in the order in which they are told."""


def _expiry(last: datetime, now: datetime) -> Finding:
    remedy = "renew it; a running server takes it up"
    if now > last:
        return Finding(Level.FAIL, "TLS", f"the certificate in use expired on {last:%Y-%m-%d}", remedy)
    level = Level.WARN if last - now < EXPIRES_SOON else Level.OK
    says = f"the certificate in use is valid until {last:%Y-%m-%d}"
    return Finding(level, "TLS", says, remedy if level is Level.WARN else "")


def _is_open(uri: str) -> bool:
    """Without TLS, on an address that is not this machine's own."""
    if not uri.startswith("nbd://"):
        return False
    return not ip_address(Address.of(uri).host.partition("%")[0]).is_loopback


def _server(patient: Patient) -> ServerStatus:
    assert patient.server is not None
    return patient.server


def _machine(patient: Patient) -> Machine:
    """As the server sees it, whose cgroup is rarely that of the shell where this runs."""
    return Machine(patient.process, viewer=patient.processes / "self")


def _told(patient: Patient, file: str, name: str) -> str:
    """The first word behind `name` in a file of the server's process; nothing where it may not be read."""
    try:
        text = (patient.process / file).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(rf"^{name}:?\s+(\w+)", text, re.MULTILINE)
    return found[1] if found else ""
