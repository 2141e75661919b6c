"""`nbdzram serve`: read the configuration, start everything, say where it is, and drain when told to stop.

Only this command is imported by the serving process: no rich, no other command.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nbdzram.cli.announce import description, greeting, print_in_background, the_end
from nbdzram.cli.going_on import told_as_it_starts, told_as_it_stops
from nbdzram.cli.loading import load_image, with_image_sizes
from nbdzram.cli.numbers import Whole
from nbdzram.cli.onlookers import hand_over, metrics_server, starts
from nbdzram.cli.perils import perils
from nbdzram.cli.processes import (
    enough_allowed,
    first_of,
    if_it_can_be,
    name_process,
    parent_watched,
    pid_file,
    private_place,
    run_command,
    told_to_commands,
)
from nbdzram.cli.shown import AsShown
from nbdzram.cli.stops import stop_without_parent, watch_signals
from nbdzram.cli.supervisor import notify_supervisor, wait_for_supervisor
from nbdzram.cli.usage import or_before_the_command
from nbdzram.config import (
    DEFAULT_METRICS_PORT,
    DEFAULT_PORT,
    ServerConfig,
    TcpAddress,
    TlsConfig,
    TlsMode,
)
from nbdzram.errors import ConfigError
from nbdzram.residence import go_late, stay
from nbdzram.settings import NO_DEFAULTS, Given, Layer, export_layers, load, pool_layers, require_files

if TYPE_CHECKING:
    from nbdzram.cli.takeover import Takeover
    from nbdzram.metrics.http import MetricsServer
    from nbdzram.server.handover import Handover
    from nbdzram.server.opening import Opening
    from nbdzram.server.service import Service
    from nbdzram.server.state import Kept

log = logging.getLogger("nbdzram.server")

PORT = Whole(0, 65535, of="port")
NOT_ON_STDIN = ("control", "exit-with-parent", "metrics", "restore", "run")

FLAGS: dict[str, tuple[str, ...]] = {
    "mem_limit": ("pools", "default", "mem_limit"),
    "dedup": ("pools", "default", "dedup"),
    "durability": ("pools", "default", "durability"),
    "metrics": ("metrics",),
    "control": ("control",),
    "state_dir": ("state_dir",),
    "default_export": ("default_export",),
    "threads": ("threads",),
    "swap": ("swap",),
    "metrics_hosts": ("metrics_hosts",),
    "pidfile": ("pidfile",),
    "log": ("log",),
    "log_level": ("log_level",),
    "log_format": ("log_format",),
    "fold_interval": ("maintenance", "fold"),
    "compact_interval": ("maintenance", "compact"),
    "recompress_interval": ("maintenance", "recompress"),
    "recompress_age": ("maintenance", "recompress_age_seconds"),
    "scrub_interval": ("maintenance", "scrub"),
    "cpu_percent": ("maintenance", "cpu_percent"),
    "checkpoint": ("checkpoint", "directory"),
    "checkpoint_interval": ("checkpoint", "interval_seconds"),
    "checkpoint_keep": ("checkpoint", "keep"),
    "tls": ("tls", "mode"),
    "tls_certificate": ("tls", "certificate"),
    "tls_key": ("tls", "key"),
    "tls_client_ca": ("tls", "client_ca"),
    "tls_psk_file": ("tls", "psk_file"),
}
"""Flags that set one key each; the environment and TOML set the same keys."""


@click.command(
    "serve",
    epilog="\b\nExamples:\n  nbdzram serve -e disk=1G\n"
    "  nbdzram serve -e vm1=20G -e vm2=20G --mem-limit 50% --fold-interval auto\n"
    "  nbdzram serve -e root=@debian.qcow2 --pool fast=4G -e tmp=20G,pool=fast\n"
    "  nbdzram serve -c /etc/nbdzram/nbdzram.toml --check-config\n"
    "  nbdzram serve -e disk=1G --run 'nbdinfo $uri'",
)
@click.option(
    "-c",
    "--config",
    metavar="FILE",
    type=click.Path(path_type=Path, readable=False),  # reading it says why it cannot
    help="TOML file; the *.toml files in conf.d beside it are read after it.",
)
@click.option(
    "-e",
    "--export",
    "exports",
    metavar="NAME=SIZE|NAME=@IMAGE",
    multiple=True,
    help="Offer a disk: a new one, or one that is loaded from an image file (by qemu-img). Behind it may stand ,ro "
    ",private ,pool=POOL ,quota=SIZE ,iops=N ,bandwidth=SIZE ,snapshots=1h ,snapshots_keep=24 and behind an image "
    ",size=SIZE.",
)
@click.option(
    "--pool",
    "pools",
    metavar="NAME[=LIMIT]",
    multiple=True,
    help="Have a pool beside the default one. Behind it may stand ,inline ,unverified ,tell-sharing.",
)
@click.option(
    "-p",
    "--port",
    metavar="PORT",
    type=PORT,
    help=f"TCP port; 0 takes a free one.  [default: {DEFAULT_PORT}]",
)
@click.option("-i", "--ip", "addresses", metavar="ADDR", multiple=True, help="TCP address.  [default: 127.0.0.1]")
@click.option(
    "-U",
    "--unix",
    "sockets",
    metavar="PATH",
    multiple=True,
    help="Unix socket, PATH[,mode=0660][,owner=USER:GROUP]; without -p and -i there is no TCP then.",
)
@click.option("--vsock", metavar="PORT", help="AF_VSOCK port, for guests of this host.")
@click.option(
    "--mem-limit",
    metavar="SIZE",
    help="Most memory for stored blocks: a size, or a share such as 50%.  [default: none]",
)
@click.option(
    "--dedup",
    metavar="fold|inline",
    help="When equal blocks meet: in a fold, or already at the write.  [default: fold]",
)
@click.option(
    "--metrics", metavar="ADDR:PORT|off", help=f"Metrics and status page.  [default: 127.0.0.1:{DEFAULT_METRICS_PORT}]"
)
@click.option(
    "--metrics-hosts",
    metavar="NAMES",
    help="Names under which the metrics are reached, beside addresses and this machine's own.",
)
@click.option(
    "--control",
    metavar="PATH",
    callback=or_before_the_command,
    help="Control socket.  [default: nbdzram.sock in the runtime directory]",
)
@click.option("--state-dir", metavar="DIR", help="Keep the disks in files there, so that they outlive the process.")
@click.option("--default-export", metavar="NAME", help="The export that clients get who name none.")
@click.option(
    "--threads", metavar="N", help="Threads that serve clients.  [default: one for each processor, at most 16]"
)
@click.option(
    "--swap",
    is_flag=True,
    default=None,
    help="Clients swap to its disks: lock memory, be ended last when it runs out, wait for no page to be written.",
)
@click.option("--fold-interval", metavar="auto|SECONDS|off", help="Fold by itself, also 10m or 2h.  [default: off]")
@click.option(
    "--compact-interval", metavar="auto|SECONDS|off", help="Compact by itself, also 10m or 2h.  [default: off]"
)
@click.option(
    "--recompress-interval",
    metavar="auto|SECONDS|off",
    help="Recompress resting blocks by itself, also 10m or 2h.  [default: off]",
)
@click.option(
    "--recompress-age", metavar="SECONDS", help="Unused for so long, also 1h, a block rests.  [default: 3600]"
)
@click.option("--scrub-interval", metavar="SECONDS|off", help="Look for rot by itself, also 12h or 7d.  [default: off]")
@click.option("--cpu-percent", metavar="PERCENT", help="Share of one core for runs by itself.  [default: 25]")
@click.option(
    "--tls", metavar="off|on|require", help="TLS: not at all, for whoever asks, for everyone.  [default: off]"
)
@click.option("--tls-certificate", metavar="FILE", help="Certificate chain, PEM.")
@click.option("--tls-key", metavar="FILE", help="Its private key, PEM.")
@click.option("--tls-client-ca", metavar="FILE", help="Clients need a certificate signed by this authority.")
@click.option("--tls-psk-file", metavar="FILE", help="Pre-shared keys, a line NAME:HEXKEY each.")
@click.option("--pidfile", metavar="FILE", help="Write the process's number there while it serves.")
@click.option("--log", metavar="stderr|syslog|null", help="Where the log goes.  [default: stderr]")
@click.option("--log-level", metavar="LEVEL", help="debug, info, warning or error.  [default: info]")
@click.option("--log-format", metavar="text|json", help="Lines for people, or a JSON object each.  [default: text]")
@click.option(
    "--stdin", "on_stdin", is_flag=True, help="Serve the one client whose socket is standard input, as inetd does."
)
@click.option(
    "--run",
    "run",
    metavar="COMMAND",
    help="Serve while the shell's COMMAND runs, and end with its status. It finds $uri, $unixsocket, $port and "
    "$exportname; unless told otherwise the server listens on a unix socket of its own, without metrics.",
)
@click.option(
    "--exit-with-parent", is_flag=True, help="End, as on SIGTERM, when the process ends that started this one."
)
@click.option(
    "--checkpoint",
    metavar="DIR",
    help="Keep checkpoints of all exports there, and begin from the newest unless there are disks already.",
)
@click.option("--checkpoint-interval", metavar="SECONDS", help="From one to the next, also 10m or 2h.  [default: 60]")
@click.option("--checkpoint-keep", metavar="N", help="Chains to keep, each from a whole one on.  [default: 2]")
@click.option(
    "--durability",
    metavar="checkpoint|flush",
    help="flush: FLUSH is answered when the disk of --checkpoint has what changed.  [default: checkpoint]",
)
@click.option(
    "--restore",
    metavar="FILE",
    type=click.Path(path_type=Path, readable=False),  # as above
    help="Begin with the exports of a stream, which `send` wrote, unless there are disks, or a checkpoint, already.",
)
@click.option(
    "--takeover",
    is_flag=True,
    help="Go on in place of the server that runs, with its disks, in memory or in this state directory, and its "
    "clients, who see a pause. It leaves once this one serves, and goes on if that fails. Where none runs, start.",
)
@click.option(
    "--upgrade",
    is_flag=True,
    help="For ExecReload= of a unit: let the server that runs read its configuration again, or if it is of another "
    "version take over from it in the background. Ends when that is done, with 1 if it could not be.",
)
@click.option("--check-config", is_flag=True, help="Read the configuration, say what it means, and end.")
@click.pass_obj
def command(
    first: Callable[[], None],
    /,
    *,
    config: Path | None,
    exports: tuple[str, ...],
    pools: tuple[str, ...],
    port: int | None,
    addresses: tuple[str, ...],
    sockets: tuple[str, ...],
    vsock: str | None,
    on_stdin: bool,
    run: str | None,
    exit_with_parent: bool,
    restore: Path | None,
    takeover: bool,
    upgrade: bool,
    check_config: bool,
    **flags: str | bool | None,
) -> None:
    """Serve disks over NBD until SIGINT or SIGTERM, then drain and end.

    A second signal ends at once. SIGHUP reads the configuration again, and the server goes on, disks and all, also when
    it comes of a terminal that is closed or a line that broke. Every flag but those for one run alone (--run,
    --exit-with-parent, --stdin, --restore, --takeover, --upgrade, --check-config) has a key in the TOML file and a
    variable NBDZRAM_KEY; flags win over the environment, and the environment over the file.
    """
    parent = os.getppid() if exit_with_parent else None
    layer = export_layers(exports, "-e") | pool_layers(pools, "--pool")
    layer |= _listen_layer(port, addresses, sockets, vsock)
    for name, value in flags.items():
        if value is not None:
            layer[FLAGS[name]] = Given(value, f"--{name.replace('_', '-')}")

    with private_place() if run is not None else contextlib.nullcontext(NO_DEFAULTS) as defaults:

        def reread() -> ServerConfig:
            require_files(config, os.environ)
            return with_image_sizes(load(config, os.environ, layer, defaults))

        settled = with_image_sizes(load(config, os.environ, layer, defaults))
        if check_config:
            warnings = _check_tls_files(settled.tls)
            for line in (*description(settled), *(f"  warning  {sentence}" for sentence in warnings)):
                click.echo(line)
            return
        if on_stdin:
            given = {**flags, "run": run, "exit-with-parent": parent, "restore": restore}
            serve_stdin(settled, forbidden=[name for name in NOT_ON_STDIN if given[name] is not None])
            return
        serves = None
        if upgrade:
            serves = _upgrade(settled)
            if serves is None:
                return
        status = serve(
            settled,
            reread,
            run=run,
            parent=parent,
            restore=restore,
            takeover=first if takeover or upgrade else None,
            serves=serves,
        )
    raise click.exceptions.Exit(status)


for _option in command.params:
    if _option.type is click.STRING:
        _option.type = AsShown()


def _control_path(config: ServerConfig) -> Path:
    """Where the control socket of a server with this configuration is."""
    from nbdzram.control.paths import socket_for_server  # noqa: PLC0415

    return config.control or socket_for_server(os.environ)


def _upgrade(config: ServerConfig) -> Callable[[], None] | None:
    """The way to say that a server serves which took over; None: the one that runs is of this version."""
    from nbdzram.cli.upgrade import go_to_background, reload_if_current  # noqa: PLC0415

    old = reload_if_current(_control_path(config))
    return None if old is None else go_to_background(old)


def serve_stdin(config: ServerConfig, *, forbidden: list[str]) -> None:
    """Serve the client behind standard input until it leaves. Raises UserError."""
    from nbdzram.server.logbook import open_logbook  # noqa: PLC0415
    from nbdzram.server.sockets import take_stdin  # noqa: PLC0415

    if forbidden:
        raise ConfigError(f"--stdin serves one client and nothing beside it; leave out --{forbidden[0]}")
    client = take_stdin()
    with (
        enough_allowed(),
        open_logbook(config.log, config.log_level, config.log_format, os.environ),
        pid_file(config.pidfile),
        _event_loop() as runner,
    ):
        runner.run(_serve_stdin(config, client))


async def _serve_stdin(config: ServerConfig, client: socket.socket) -> None:
    from nbdzram.server.service import Service  # noqa: PLC0415

    service = Service(config)
    told_to_stop = asyncio.Event()
    watch_signals(service, told_to_stop)
    await service.start(listen=False)
    for export in service.changes.unloaded():
        await load_image(service, export, told_to_stop)
    served = asyncio.create_task(service.serve_socket(client))
    stopping = asyncio.create_task(told_to_stop.wait())
    try:
        await asyncio.wait({served, stopping}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
        await service.stop()
    await served  # it has ended: the client left, or was drained


def serve(
    config: ServerConfig,
    reread: Callable[[], ServerConfig],
    *,
    run: str | None = None,
    parent: int | None = None,
    restore: Path | None = None,
    takeover: Callable[[], None] | None = None,
    serves: Callable[[], None] | None = None,
) -> int:
    """Run until a signal, until the process `parent` ends, or as long as the command `run` does; the exit status.

    It begins with what the stream in the file `restore` holds, or where the server that runs ends: until then it is the
    first to go where memory runs out (`takeover` ends that), and then says that it `serves`. Raises UserError when
    something cannot start.
    """
    from nbdzram.cli.kept import kept_before  # noqa: PLC0415 - --check-config and --help serve nothing
    from nbdzram.server.logbook import open_logbook  # noqa: PLC0415
    from nbdzram.server.opening import Opening  # noqa: PLC0415

    name_process()
    refusals = stay(late=takeover is None) if config.swap else []
    with (
        enough_allowed(),
        open_logbook(config.log, config.log_level, config.log_format, os.environ),
        _event_loop() as runner,  # while there are descriptors: libuv ends the process where it lacks one
    ):
        for refusal in refusals:
            log.warning("--swap: %s", refusal)
        for peril in perils(config):
            log.warning("%s; %s", peril.says, peril.remedy)
        kept = kept_before(os.environ, config.state_dir)
        begin = functools.partial(_serve, config, reread, kept, run=run, parent=parent, restore=restore)
        if takeover is None:
            with Opening(config, kept) as opening:  # while all that follows is imported
                return runner.run(begin(opening=opening))
        from nbdzram.cli.takeover import load_what_serves, take_over  # noqa: PLC0415

        def counts() -> None:
            takeover()
            for refusal in go_late() if config.swap else ():
                log.warning("--swap: %s", refusal)

        load_what_serves()
        with take_over(_control_path(config), config.state_dir, config.metrics, serves, counts) as taken:
            return runner.run(begin(taken=taken))


def _event_loop() -> asyncio.Runner:
    import uvloop  # noqa: PLC0415 - --check-config and --help need none

    return asyncio.Runner(loop_factory=uvloop.new_event_loop)


async def _serve(
    config: ServerConfig,
    reread: Callable[[], ServerConfig],
    kept: Kept,
    *,
    taken: Takeover | None = None,
    opening: Opening | None = None,
    run: str | None,
    parent: int | None,
    restore: Path | None,
) -> int:
    """Serve until the end; or until another process has taken over, and where that fails go on."""
    from nbdzram.server.handover import Handover, give_away  # noqa: PLC0415
    from nbdzram.server.service import Service  # noqa: PLC0415

    handed, confirm = Handover(kept=kept), None
    told_to_stop = asyncio.Event()
    if taken is not None:
        handed, confirm, taken.told_to_stop = taken.handover, taken.confirm, told_to_stop.is_set
        handed.kept.keeper, handed.kept.file = kept.keeper, kept.file
    asked_before: set[asyncio.Task[None]] = set()  # they end beside what goes on
    while True:
        service = Service(config, reread, restore_from=restore, handed=handed, opening=opening)
        service.ends_with_a_command = run is not None
        watch_signals(service, told_to_stop)
        watched = parent_watched(parent, functools.partial(stop_without_parent, service, told_to_stop))
        with if_it_can_be(watched, needed=handed.control is None):  # from now on: a start may read for hours
            metrics = metrics_server(config, service)
            outcome = await _serve_once(service, metrics, told_to_stop, handed, confirm, run=run)
        if isinstance(outcome, int):
            return outcome
        assert service.successor is not None
        successor = await asyncio.to_thread(give_away, outcome, service.successor.line)
        if successor is not None:
            log.info("process %d has taken over; leaving", successor)
            notify_supervisor(f"MAINPID={successor}")
            wait_for_supervisor()
            outcome.close()
            if metrics is not None:  # last: clients are not ours any more, and whoever asks of us is few
                await metrics.finish()
            return 0
        log.warning("the process that wanted to take over does not serve; going on")
        if metrics is not None:
            ending = asyncio.create_task(metrics.finish())
            asked_before.add(ending)
            ending.add_done_callback(asked_before.discard)
        config, handed, confirm, restore, opening = service.config, outcome, None, None, None


async def _serve_once(
    service: Service,
    metrics: MetricsServer | None,
    told_to_stop: asyncio.Event,
    handed: Handover,
    confirm: Callable[[], None] | None,
    *,
    run: str | None,
) -> int | Handover:
    """Serve until the end (an exit status), or a takeover (all that was served). `handed`: what another process had."""
    from nbdzram.control.audit import Audit  # noqa: PLC0415 - the same
    from nbdzram.control.methods import method_table  # noqa: PLC0415 - the same
    from nbdzram.control.server import ControlServer  # noqa: PLC0415

    config, listening = service.config, handed.control
    methods = method_table(service, service.changes)
    control = ControlServer(_control_path(config), methods, Audit(config.state_dir), listening=listening)
    await control.start(accept=listening is None)
    serves = False
    given: Handover | None = None
    try:
        async with told_as_it_starts(service):
            await service.start(listen=False, serves=False)
        try:
            for export in service.changes.unloaded():
                await load_image(service, export, told_to_stop)
            if metrics is not None and not await starts(metrics, handed):
                metrics = None
            await service.listen(confirm)  # last: until that word nothing that was taken over has been touched
            serves = True
            if listening is not None:  # whoever asked meanwhile is answered by a server that has its disks
                await control.accept()
                if metrics is not None:
                    metrics.accept()
            with if_it_can_be(pid_file(config.pidfile), needed=listening is None):
                if run is not None:  # whose output is its own: there is no greeting
                    notify_supervisor("READY=1")
                    _keep_what_there_is()
                    environment = told_to_commands(service.status(), config.default_export, control.path)
                    return await run_command(run, environment, told_to_stop)
                where = metrics.url if metrics else None
                print_in_background(greeting(service.status(), config.tls, where, control.path))
                notify_supervisor("READY=1")
                _keep_what_there_is()  # last: `health` says ready since it listens, and who asked reads the greeting
                if await first_of(service.taken_over, told_to_stop) is service.taken_over:
                    given = await hand_over(service, metrics)
                    given.control = control.surrender()
                    return given
                return 0
        finally:
            if given is None:
                await _stop(service, config, serves=serves, systemd_keeps=handed.kept.keeper is not None)
                if metrics is not None:
                    await metrics.stop()
    finally:
        if listening is not None and not serves:
            control.surrender().close()  # and leave its file to the one who had it before
        await control.stop()


def _keep_what_there_is() -> None:
    """What start-up made lives as long as the process: no collection needs to look at it again."""
    gc.unfreeze()  # where a takeover failed, what served before it: its mappings too
    gc.collect()
    gc.freeze()


async def _stop(service: Service, config: ServerConfig, *, serves: bool, systemd_keeps: bool) -> None:
    if not serves:  # one that failed to take over must not end the unit of the other
        await service.stop(served=False)
        return
    before = service.status()
    async with told_as_it_stops(service):
        await service.stop()
    # whoever stopped it reads what became of the disks
    log.info("%s", the_end(config, before, service.checkpoint, systemd_keeps=systemd_keeps))


def _listen_layer(port: int | None, addresses: tuple[str, ...], sockets: tuple[str, ...], vsock: str | None) -> Layer:
    """-i, -p, -U and --vsock together say the one key `listen`."""
    hosts = addresses or ((TcpAddress().host,) if port is not None else ())
    listen = [_address(host, port) for host in hosts] + [f"unix:{path}" for path in sockets]
    listen += [f"vsock:{vsock}"] if vsock is not None else []
    said = {"-i": addresses, "-p": port is not None, "-U": sockets, "--vsock": vsock is not None}
    return {("listen",): Given(listen, ", ".join(flag for flag, given in said.items() if given))} if listen else {}


def _address(host: str, port: int | None) -> str:
    return str(TcpAddress(host=host.strip("[]"), port=DEFAULT_PORT if port is None else port))


def _check_tls_files(tls: TlsConfig) -> list[str]:
    """What `serve` would warn of. Raises ConfigError for files that are missing, unreadable, or not of one pair."""
    if tls.mode is TlsMode.OFF:
        return []
    from nbdzram.server.tls import check_files  # noqa: PLC0415 - most do without

    return list(check_files(tls))
