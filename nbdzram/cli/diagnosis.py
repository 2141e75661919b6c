"""What `nbdzram doctor` looks at: one function a subject, each giving findings.

A finding is ok, warn (it will run, but not as it could) or fail (it will not run as configured); warn and fail carry a
remedy. Nothing is changed; ports are tried by binding to them for a moment.
"""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path

from nbdzram import __version__
from nbdzram.cli.perils import perils, size_perils, without_limit
from nbdzram.config import ServerConfig, TcpAddress, TlsMode
from nbdzram.control.client import ControlClient
from nbdzram.control.paths import socket_for_client
from nbdzram.errors import ConfigError, NoServerHere, UserError, reason_of
from nbdzram.listening import close_all, listen_on, look_up
from nbdzram.machine import Machine
from nbdzram.ready import readable
from nbdzram.residence import OOM_SCORE, may_go_late, may_lock
from nbdzram.server.certificate import validity
from nbdzram.server.descriptors import places, wanted
from nbdzram.status import ServerStatus
from nbdzram.units import format_size, format_sizes

EXPIRES_SOON = timedelta(days=30)
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
CLIENT_SECONDS = 10  # nbd-client -V takes a millisecond
CLIENT_BYTES = 4096  # and says a line
PROC_VM = Path("/proc/sys/vm")
SPARE_TASKS = 48  # beside one for each processor: asyncio's threads (32), libuv's, the log's, the interpreter's


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's."""

    level: Level
    subject: str
    says: str
    remedy: str = ""


class Module(StrEnum):
    """How the kernel stands to its module nbd."""

    LOADED = "loaded"
    LOADABLE = "loadable"
    ABSENT = "absent"


@dataclass(frozen=True, slots=True)
class Kernel:
    """Where a kernel shows its modules."""

    loaded: Path = Path("/sys/module/nbd")
    modules: Path = Path("/lib/modules") / platform.release()

    @property
    def nbd(self) -> Module:
        """Whether /dev/nbdN can be had."""
        if self.loaded.exists() or "drivers/block/nbd.ko" in _text(self.modules / "modules.builtin"):
            return Module.LOADED
        there = any(self.modules.glob("kernel/drivers/block/nbd.ko*"))
        return Module.LOADABLE if there else Module.ABSENT


@dataclass(frozen=True, slots=True)
class Patient:
    """What is looked at: the configuration that `serve` would use, and the server that runs, if one does."""

    config: ServerConfig
    server: ServerStatus | None
    kernel: Kernel = Kernel()
    source: str | None = None  # the configuration's file
    unreachable: str | None = None  # why a server is not looked at that may run
    processes: Path = Path("/proc")
    settings: Path = Path("/sys/kernel/mm/transparent_hugepage")

    @property
    def process(self) -> Path:
        """The directory of the server's process; none that exists where its number is another's (containers)."""
        if self.server is not None:
            place = self.processes / str(self.server.pid)
            if _text(place / "comm").strip() == "nbdzram":
                return place
        return self.processes / "unseen"


def running_server(control: Path | None) -> tuple[ServerStatus | None, str | None]:
    """The status of the server on the control socket; or why there is none to look at, unless none runs here."""
    try:
        with ControlClient(control or socket_for_client(os.environ)) as client:
            return client.status(), None
    except NoServerHere:
        return None, None
    except UserError as error:
        return None, str(error)


def versions(_: Patient) -> Iterator[Finding]:
    """Ours, Python's, and those of the libraries, which must give back what they were given."""
    yield Finding(Level.OK, "version", f"nbdzram {__version__} on Python {platform.python_version()}")
    from nbdzram.errors import CodecUnavailable  # noqa: PLC0415

    try:
        from nbdzram.engine import codec  # noqa: PLC0415 - loading it is what is tried
    except (CodecUnavailable, ImportError) as error:
        yield Finding(Level.FAIL, "libraries", str(error), "pip install --force-reinstall lz4 xxhash zstandard")
        return
    block = bytes(range(256)) * 16
    whole = (
        codec.decompress_lz4(codec.compress_lz4(block)) == codec.decompress_zstd(codec.compress_zstd(block)) == block
    )
    carried = ", ".join(f"{name} {number}" for name, number in _library_versions())
    if whole:
        yield Finding(Level.OK, "libraries", f"{carried}; a block came back whole")
    else:
        yield Finding(
            Level.FAIL,
            "libraries",
            f"{carried}: a block came back changed",
            "pip install --force-reinstall lz4 xxhash zstandard",
        )


def configuration(patient: Patient) -> Iterator[Finding]:
    """What memory, state, addresses and TLS below are of; a server that runs may have been told otherwise."""
    if patient.source is None:
        yield Finding(Level.OK, "configuration", "the defaults and the environment; -c FILE looks at a file's")
    else:
        yield Finding(Level.OK, "configuration", f"{patient.source} can be read")


def server(patient: Patient) -> Iterator[Finding]:
    """Whether one runs, and is ours."""
    status = patient.server
    if status is None and patient.unreachable is not None:
        says, _, remedy = patient.unreachable.partition("; ")
        says += ": what follows is of a configuration, and of no server"
        yield Finding(Level.WARN, "server", says, remedy or "its log may tell why")
    elif status is None:
        yield Finding(Level.OK, "server", "none runs here")
    elif status.version != __version__:
        says = f"version {status.version} runs (pid {status.pid}), this command is {__version__}"
        yield Finding(Level.WARN, "server", says, "restart the server")
    else:
        yield Finding(Level.OK, "server", f"runs as pid {status.pid}; exports: {len(status.exports)}")


def huge_pages(patient: Patient) -> Iterator[Finding]:
    """A page of 2 MiB is given back whole or not at all; pools decline them, file systems may give them even so."""
    setting = _chosen(patient.settings / "enabled")
    if not setting:
        yield Finding(Level.OK, "huge pages", "this kernel has no transparent ones")
    elif _chosen(patient.settings / "shmem_enabled") == "force":
        says = "every tmpfs is made of huge pages, a state directory there too: what blocks free stays taken"
        remedy = f"echo never > {patient.settings / 'shmem_enabled'}, and mount the state directory without huge="
        yield Finding(Level.WARN, "huge pages", says, remedy)
    else:
        yield Finding(Level.OK, "huge pages", f"transparent ones: {setting}; pools decline them")


def client(patient: Patient) -> Iterator[Finding]:
    """The kernel's client: needed to attach on this machine, not to serve."""
    module = patient.kernel.nbd
    if module is Module.LOADED:
        yield Finding(Level.OK, "kernel module", "nbd is loaded")
    elif module is Module.LOADABLE:
        says = "nbd is not loaded; only attaching on this machine needs it"
        yield Finding(
            Level.WARN, "kernel module", says, "modprobe nbd; at each boot: echo nbd > /etc/modules-load.d/nbd.conf"
        )
    else:
        says = f"the kernel {platform.release()} has no module nbd; only attaching on this machine needs it"
        yield Finding(Level.WARN, "kernel module", says, "install the kernel's own modules, or use libnbd or QEMU")
    program = shutil.which("nbd-client", path=SEARCH_PATH)
    if program is None:
        says = "missing; only attaching on this machine needs it"
        yield Finding(Level.WARN, "nbd-client", says, "apt-get install nbd-client")
    else:
        yield _version_of(program)


def descriptors(patient: Patient) -> Iterator[Finding]:
    """Each connection takes one; the server raises its soft limit to the hard one by itself."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = patient.config.limits.connections
    needed = wanted(allowed)
    if hard == resource.RLIM_INFINITY or hard >= needed:
        yield Finding(Level.OK, "descriptors", f"{needed} needed for {allowed} connections, and allowed")
    else:
        attached = places(allowed, hard).attached
        says = (
            f"{hard} allowed, {needed} needed for limits.connections = {allowed} and as many that haggle: "
            f"{attached} will be attached at once"
        )
        yield Finding(Level.WARN, "descriptors", says, f"ulimit -Hn {needed}, or LimitNOFILE={needed} in the unit")


def memory(patient: Patient) -> Iterator[Finding]:
    """Limits against what the machine has, and how the kernel promises memory."""
    share, config = Machine().memory(), patient.config
    total, limits = share.amount, {pool.name: pool.mem_limit for pool in config.pools}
    unlimited, limit = without_limit(limits, {export.pool for export in config.exports}), sum(limits.values())
    if unlimited:
        says = f"the pool '{unlimited[0]}' has no limit, {share} has {format_size(total)}"
        yield Finding(
            Level.WARN, "memory", says, "set --mem-limit, for example 50%, so that writes fail before the machine"
        )
    elif limit > total:
        may, has = format_sizes(limit, total)
        says = f"the pools may take {may}, {share} has {has}"
        yield Finding(Level.FAIL, "memory", says, "lower --mem-limit")
    else:
        says = f"{share} has {format_size(total)}, of which pools may take {format_size(limit)}"
        yield Finding(Level.OK, "memory", says)
    if _text(PROC_VM / "overcommit_memory").strip() == "2":
        says = "vm.overcommit_memory is 2: the kernel counts memory that is only reserved"
        yield Finding(Level.WARN, "overcommit", says, "sysctl vm.overcommit_memory=0")
    else:
        yield Finding(Level.OK, "overcommit", "memory is taken when it is written")


def state(patient: Patient) -> Iterator[Finding]:
    """The directory that lets disks outlive the process."""
    directory = patient.config.state_dir
    if directory is None:
        begins = "" if patient.config.checkpoint.directory is None else ", and the next one begins from a checkpoint"
        yield Finding(Level.OK, "state", f"no --state-dir: disks end with the process{begins}")
        return
    existing = next(place for place in (directory, *directory.absolute().parents) if _there(place))
    limit, room = sum(pool.mem_limit for pool in patient.config.pools), _free(existing)
    obstacle = _obstacle(directory, is_made=True)
    if obstacle is not None:
        yield Finding(Level.FAIL, "state", obstacle, _remedy(directory, "--state-dir"))
    elif room < limit:
        there, may = format_sizes(room, limit)
        says = f"{existing} has room for {there}, the pools may take {may}"
        yield Finding(
            Level.WARN, "state", says, f"mount -o remount,size=SIZE {existing} if it is a tmpfs, or lower --mem-limit"
        )
    else:
        yield Finding(Level.OK, "state", f"{directory} has room for {format_size(room)}")


def files(patient: Patient) -> Iterator[Finding]:
    """Where the server puts files beside those of its disks."""
    config = patient.config
    for subject, path, flag in (("control", config.control, "--control"), ("pidfile", config.pidfile, "--pidfile")):
        if path is not None:
            yield _file(subject, path, flag)
    directory = config.checkpoint.directory
    if directory is None:
        yield Finding(Level.OK, "checkpoints", "none: --checkpoint names no directory")
        return
    obstacle = _obstacle(directory, is_made=True)
    if obstacle is None:
        yield Finding(Level.OK, "checkpoints", f"{directory} can be written")
    else:
        yield Finding(Level.FAIL, "checkpoints", obstacle, _remedy(directory, "--checkpoint"))


def survival(patient: Patient) -> Iterator[Finding]:
    """What would lose disks later, although everything works today."""
    told = set(size_perils(patient.config, Machine()))  # by `memory`, which calls them worse
    found = [peril for peril in perils(patient.config) if peril not in told]
    if not found:
        yield Finding(Level.OK, "survival", "nothing here ends the server, or cleans up after it, by itself")
    yield from (Finding(Level.WARN, "survival", peril.says, peril.remedy) for peril in found)


def tasks(patient: Patient) -> Iterator[Finding]:
    """Threads, which a cgroup counts together with those of others in it."""
    allowed, needed = Machine().tasks(), tasks_needed(Machine(), patient.config.threads)
    if allowed is None:
        yield Finding(Level.OK, "tasks", f"no limit; up to {needed} threads are started")
    elif allowed.amount >= needed:
        yield Finding(Level.OK, "tasks", f"{allowed} allows {allowed.amount}, up to {needed} are needed")
    else:
        says = f"{allowed} allows {allowed.amount}, up to {needed} are needed"
        yield Finding(Level.WARN, "tasks", says, f"TasksMax={needed} in the unit, or --pids-limit {needed}")


def tasks_needed(machine: Machine, threads: int) -> int:
    """By a server of which so many `threads` serve clients."""
    return max(machine.processors(), threads) + SPARE_TASKS


def swap(patient: Patient) -> Iterator[Finding]:
    """Whether stored blocks have gone to the swap, where a read waits for a disk; or may, where clients swap to it."""
    if patient.server is None:
        if not patient.config.swap:
            yield Finding(Level.OK, "swap", "no server runs here whose blocks could be swapped out")
            return
        refusals = [refusal for refusal in (may_lock(), may_go_late()) if refusal is not None]
        for refusal in refusals:
            yield Finding(Level.WARN, "swap", f"swap = true, but {refusal.what}: {refusal.reason}", refusal.remedy)
        if not refusals:
            yield Finding(Level.OK, "swap", "this user may lock memory, and have it ended last")
        return
    status = _text(patient.process / "status")
    found = re.search(r"^VmSwap:\s+(\d+) kB", status, re.MULTILINE)
    swapped = int(found[1]) << 10 if found else 0
    if swapped:
        says = f"{format_size(swapped)} of the server are swapped out, and wait for a disk when they are read"
        yield Finding(Level.WARN, "swap", says, "lower --mem-limit, or MemorySwapMax=0 in the unit")
    elif re.search(r"^VmLck:\s+[1-9]", status, re.MULTILINE):
        score = int(_text(patient.process / "oom_score_adj") or OOM_SCORE)
        if score > OOM_SCORE:
            says = f"memory is locked, but the OOM killer's score is {score}: whoever swaps to the server ends with it"
            yield Finding(
                Level.WARN, "swap", says, f"OOMScoreAdjust={OOM_SCORE} in the unit, or --oom-score-adj {OOM_SCORE}"
            )
        else:
            yield Finding(Level.OK, "swap", "the server's memory is locked: clients may swap to it")
    else:
        yield Finding(Level.OK, "swap", "nothing of the server is swapped out; --swap is for clients that swap to it")


def addresses(patient: Patient) -> Iterator[Finding]:
    """Every address can be listened on, or is the running server's own."""
    wanted = [("port", address, "choose another with -p or -i") for address in patient.config.tcp]
    if patient.config.metrics is not None:
        wanted.append(("metrics", patient.config.metrics, "choose another with --metrics, or --metrics off"))
    for subject, address, remedy in wanted:
        reason = _cannot_listen(address)
        if reason is None:
            yield Finding(Level.OK, subject, f"{address} is free")
        elif patient.server is not None and reason == "Address already in use":
            yield Finding(Level.OK, subject, f"{address} is in use; a server runs")
        else:
            yield Finding(Level.FAIL, subject, f"cannot listen on {address}: {reason}", remedy)
    for unix in patient.config.unix:
        obstacle = _obstacle(unix.path.parent)
        if obstacle is None:
            yield Finding(Level.OK, "socket", f"{unix.path} can be made")
        else:
            yield Finding(
                Level.FAIL, "socket", f"{unix.path} cannot be made: {obstacle}", _remedy(unix.path.parent, "-U")
            )


def certificates(patient: Patient) -> Iterator[Finding]:
    """TLS files are there, belong together, and have not expired."""
    tls = patient.config.tls
    if tls.mode is TlsMode.OFF:
        yield Finding(Level.OK, "TLS", "off in this configuration: whoever reaches an address may attach")
        return
    from nbdzram.server.tls import check_files, exposed  # noqa: PLC0415 - most do without

    try:
        for _ in check_files(tls):  # which warns of what is told below, too
            pass
    except ConfigError as error:
        yield Finding(Level.FAIL, "TLS", str(error), "mend or exchange that file; `serve` would not start with it")
        return
    if tls.psk_file is not None:
        yield Finding(Level.OK, "TLS", f"{tls.psk_file} holds keys")
    for sentence in exposed(tls):
        said, _, remedy = sentence.partition("; ")
        yield Finding(Level.WARN, "TLS", said, remedy)
    for path in (tls.certificate, tls.client_ca):
        if path is not None:
            yield _expiry(path, datetime.now(UTC))


CHECKS: tuple[Callable[[Patient], Iterator[Finding]], ...] = (
    versions,
    server,
    configuration,
    memory,
    state,
    files,
    survival,
    swap,
    tasks,
    descriptors,
    addresses,
    certificates,
    huge_pages,
    client,
)
"""Of a configuration, in the order in which they are told. Those of a server that runs: nbdzram/cli/vitals.py."""


def _expiry(path: Path, now: datetime) -> Finding:
    try:
        first, last = validity(path)
    except (OSError, ValueError) as error:
        return Finding(Level.FAIL, "TLS", f"{path} cannot be read: {error}", "give a certificate in PEM")
    told = f"{path} is valid until {last:%Y-%m-%d}"
    if now > last:
        return Finding(
            Level.FAIL, "TLS", f"{path} expired on {last:%Y-%m-%d}", "renew it; a running server takes it up"
        )
    if now < first:
        return Finding(Level.FAIL, "TLS", f"{path} is valid from {first:%Y-%m-%d} only", "check this machine's clock")
    if last - now < EXPIRES_SOON:
        return Finding(Level.WARN, "TLS", told, "renew it soon; a running server takes it up")
    return Finding(Level.OK, "TLS", told)


def _version_of(program: str) -> Finding:
    """What nbd-client says of itself; one that does not start, hangs, or says nothing is a finding, too."""
    remedy = "apt-get install --reinstall nbd-client"
    try:
        said, status = _said_by(program)
    except subprocess.TimeoutExpired:
        return Finding(Level.WARN, "nbd-client", f"{program} -V says nothing for {CLIENT_SECONDS} s", remedy)
    except OSError as error:
        return Finding(Level.WARN, "nbd-client", f"{program} cannot be run: {error.strerror}", remedy)
    if len(said) == CLIENT_BYTES:
        return Finding(Level.WARN, "nbd-client", f"{program} -V says more than {CLIENT_BYTES - 1} bytes", remedy)
    told = said.decode(errors="replace").split("\n")
    lines = [line.strip() for line in told if line.strip()]
    if status < 0 or not lines:
        ended = f"was killed by signal {-status}" if status < 0 else f"ended with {status}"
        return Finding(Level.WARN, "nbd-client", f"{program} -V {ended} and said nothing of its version", remedy)
    printable = "".join(letter if letter.isprintable() else "\ufffd" for letter in lines[-1])
    return Finding(Level.OK, "nbd-client", printable)


def _said_by(program: str) -> tuple[bytes, int]:
    """The first CLIENT_BYTES of what `program -V` says, and how it ended; one that says more, or nothing, is killed.

    Raises OSError, TimeoutExpired.
    """
    deadline = time.monotonic() + CLIENT_SECONDS
    command = [program, "-V"]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
    ) as process:
        assert process.stdout is not None
        said = b""
        try:
            while len(said) < CLIENT_BYTES:
                if not readable(process.stdout.fileno(), seconds=deadline - time.monotonic()):
                    raise subprocess.TimeoutExpired(command, CLIENT_SECONDS)
                piece = process.stdout.read(CLIENT_BYTES - len(said))
                if not piece:
                    return said, process.wait(max(deadline - time.monotonic(), 0))
                said += piece
        finally:
            process.kill()
    return said, process.returncode


def _library_versions() -> Iterator[tuple[str, str]]:
    """The C libraries' own, not those of the packages that carry them."""
    import lz4  # noqa: PLC0415 - a broken installation is a finding, not a traceback
    import xxhash  # noqa: PLC0415
    import zstandard  # noqa: PLC0415

    yield "lz4", lz4.library_version_string()
    yield "xxhash", xxhash.XXHASH_VERSION
    yield "zstd", ".".join(map(str, zstandard.ZSTD_VERSION))


def _cannot_listen(address: TcpAddress) -> str | None:
    """Why not; None if it can: on all addresses of the name that this machine has, as `serve` does."""
    try:
        opened, _ = listen_on(look_up(address), backlog=1)
    except (OSError, UnicodeError) as error:
        return reason_of(error)
    close_all(opened)
    return None


def _chosen(setting: Path) -> str:
    """The word in brackets, as the kernel marks it: always [madvise] never."""
    return "".join(re.findall(r"\[(\w+)\]", _text(setting))[:1])


def _file(subject: str, path: Path, flag: str) -> Finding:
    """Whether it can be made, in a directory that is there already."""
    obstacle = f"{path} is a directory" if _there(path) and path.is_dir() else _obstacle(path.parent)
    if obstacle is None:
        return Finding(Level.OK, subject, f"{path} can be made")
    return Finding(Level.FAIL, subject, f"{path} cannot be made: {obstacle}", _remedy(path.parent, flag))


def _obstacle(directory: Path, *, is_made: bool = False) -> str | None:
    """Why nothing can be made in a directory; one that `is_made` where it is not there, with those above it."""
    there = directory.absolute()
    while is_made and not _there(there):
        there = there.parent
    if not _there(there):
        return f"{there} does not exist, or lies where this user may not look"
    if not there.is_dir():
        return f"{there} is no directory"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"{there} may not be written by this user"
    return None


def _remedy(directory: Path, flag: str) -> str:
    """One that is there already may be others' too, such as /run: nobody is told to make it his own."""
    if _there(directory):
        return f"choose another with {flag}"
    return f"as root: install -d -m 700 -o {_me()} {directory.absolute()}; or choose another with {flag}"


def _free(directory: Path) -> int:
    try:
        found = os.statvfs(directory)
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize


def _there(path: Path) -> bool:
    """Path.exists raises PermissionError below a directory of somebody else's."""
    return os.access(path, os.F_OK)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")  # a process may call itself anything
    except OSError:
        return ""


def _me() -> str:
    return str(os.geteuid())
