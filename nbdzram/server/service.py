"""The whole service: pools, exports, the NBD server and maintenance, from start to drain.

Everything here runs on the event loop; what may take long goes to threads. What is changed at run time: changes.py.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from nbdzram import __version__
from nbdzram.config import ExportConfig, ServerConfig, Trigger
from nbdzram.engine.disk import Disk
from nbdzram.engine.stats import DiskUsage
from nbdzram.errors import NoSuchExport, UserError
from nbdzram.machine import Machine
from nbdzram.server.changes import Changes
from nbdzram.server.checkpoints import Checkpoints
from nbdzram.server.counts import LATENCY_BOUNDS_SECONDS
from nbdzram.server.exports import Export, Exports
from nbdzram.server.handover import ARENA, FORMAT, MEMORY, Handover, Successor, reach
from nbdzram.server.headroom import Headroom, Relief
from nbdzram.server.history import History, began
from nbdzram.server.inventory import look_for_the_default, place_exports, require_loaded
from nbdzram.server.listener import NbdServer
from nbdzram.server.loading import served_alone
from nbdzram.server.maintenance import Maintenance, Progress
from nbdzram.server.opening import Opening, durable_pools, remember_as_declared
from nbdzram.server.policy import STARTS, Reason
from nbdzram.server.pools import NOTHING, PoolService, automatic_options
from nbdzram.server.reload import Reload
from nbdzram.server.restore import Begun, Restore
from nbdzram.server.runs import LIVE, REPLACED, Ticket
from nbdzram.server.schedule import Schedule
from nbdzram.server.state import State
from nbdzram.server.steadily import Patience, Step, end_all, steadily
from nbdzram.server.streams import Streams
from nbdzram.server.syncs import Syncs
from nbdzram.server.usage import Usages
from nbdzram.status import (
    CheckpointStatus,
    ClientStatus,
    ExportSample,
    ExportStatus,
    HistorySample,
    ReceiveReport,
    ReloadReport,
    RunOptions,
    RunReport,
    RunStatus,
    SendReport,
    ServerStatus,
    StreamStatus,
    ThreadStatus,
)
from nbdzram.stream.pipe import Pipe

TICK_SECONDS = 1.0  # the policy's pulse, the engine's clock for idle tracking, and the sample of event-loop lag

log = logging.getLogger("nbdzram.server")


class Service:
    """A running server. start() and stop() once; between them the operations that control offers, and `changes`."""

    def __init__(
        self,
        config: ServerConfig,
        reread: Callable[[], ServerConfig] | None = None,
        *,
        restore_from: Path | None = None,
        handed: Handover | None = None,
        opening: Opening | None = None,
    ) -> None:
        """`reread` gives the configuration as its sources have it now; None: they cannot be asked again.

        restore_from: a stream that empty pools are filled from, before anything is offered. handed: what another
        process served, which is ours from now on. opening: with what is kept of that, where it was begun before.
        """
        self._opening = opening
        self._restore_from = restore_from
        self._handed = handed or Handover()
        self._pools: dict[str, PoolService] = {}
        self._run_numbers = itertools.count(self._handed.counted.last_run + 1)
        self._exports = Exports(config.default_export)
        durable = durable_pools(config)
        self._checkpoints = Checkpoints(config.checkpoint, self._exports, self._pools, durable)
        journal = self._checkpoints.journal
        self._nbd = NbdServer(
            self._exports, config, Syncs(journals={} if journal is None else dict.fromkeys(durable, journal))
        )
        self._usages = Usages(self._exports)
        self._history = History(self._exports, self._memory_bytes, config.state_dir, self._handed.counted.history)
        self.changes = Changes(config, self._pools, self._exports, self._nbd, self._run_numbers)
        self._streams = Streams(self.changes, self._exports, self._pools)
        self._reload = Reload(
            config, reread=reread, changes=self.changes, pools=self._pools, exports=self._exports, nbd=self._nbd
        )
        self._headroom = Headroom(
            Machine(),
            lambda: [service.pool for service in tuple(self._pools.values())],
            lambda: self._config.limits.keep_free,
            config.limits.total_bytes,
        )
        self._relief = Relief(self._headroom, self._pools)
        self._schedule = Schedule(self._exports, self.changes)
        self._state = State(None)
        self.told_to_stop = threading.Event()  # a start that still reads a stream or checkpoint ends with a UserError
        self.taken_over = asyncio.Event()
        self.ends_with_a_command = False  # and cannot be taken over
        self.successor: Successor | None = None  # the process that takes over
        self._pulse: asyncio.Task[None] | None = None
        self._started_at = self._started = 0.0
        self._lag_seconds = 0.0
        self._threads: tuple[ThreadStatus, ...] = ()
        self._requests_seen = 0
        self._draining = False

    async def start(self, *, listen: bool = True, serves: bool = True) -> None:
        """Open pools, offer exports, listen. Raises UserError, and then nothing is left open. Unless it `serves` then,
        no checkpoint is taken before listen().
        """
        config = self._config
        loop = asyncio.get_running_loop()
        self._started_at, self._started = time.time(), loop.time()
        opening = self._opening or Opening(config, self._handed.kept)
        opened = await opening.opened()
        self._state, pools = opened.state, opened.pools
        self._checkpoints.place.have(opened.claim)
        try:
            for name, pool in pools.items():
                before = self._handed.counted.pools.get(name, NOTHING)
                self._pools[name] = PoolService(
                    name, pool, config.maintenance, loop.time(), self._run_numbers, before=before
                )
            if self._handed.was_served and not self._handed.comes_back:  # clients wait, and an image takes minutes
                require_loaded(config.exports, pools, opened.state)
            await asyncio.to_thread(self._headroom.start)
            await self._with_checkpoints(partial(self._checkpoints.prepare, config.state_dir))
            for_a_journal = self._checkpoints.journal is not None
            known = (config.exports, pools, opened.state, opened.known)
            restore = Restore(*known, for_a_journal=for_a_journal, told_to_stop=self.told_to_stop)
            was_served = self._handed.was_served
            belong = partial(self._checkpoints.place.belong, opened.state, opened.known, was_served=was_served)
            await self._with_checkpoints(partial(belong, outlived=restore.outlived or was_served))
            begun = await asyncio.to_thread(self._restore, restore)
            for placed in await asyncio.to_thread(place_exports, config.exports, pools, opened.state):
                self._offer(placed.export())
            look_for_the_default(config, self._exports)
            await asyncio.to_thread(remember_as_declared, config.pools, opened.state)
            await self._checkpoints.go_on_from(begun)
            if listen:
                self._state.begin_to_serve()
                await self._nbd.start()
        except BaseException:
            self._headroom.stop()
            await self._checkpoints.give_up()
            for pool in pools.values():
                pool.close()
            raise
        self.changes.begin(opened.state, self._checkpoints.settling)
        self._checkpoints.start(begun, opened.state, opened.known)
        if serves:
            self._checkpoints.begin_to_serve()
        self._pulse = asyncio.create_task(self._beat())
        self._history.start()

    async def _with_checkpoints(self, step: Callable[[], None]) -> None:
        """A step of the start. Raises UserError, but where clients came back to us."""
        try:
            await asyncio.to_thread(step)
        except UserError as error:
            if not self._handed.comes_back:
                raise
            log.error("%s; going on, and each checkpoint tries again", error)

    def _offer(self, export: Export) -> None:
        if export.name in self._handed.counted.exports:
            export.traffic.go_on_from(self._handed.counted.exports[export.name])
        self._exports.add(export)

    def _restore(self, restore: Restore) -> Begun:
        """Fill empty pools. What they are of. Raises UserError.

        What a checkpoint has was served here last, so it comes before a file that a unit may name at each start. Those
        that another process served have what they should, be it nothing.
        """
        if self._handed.was_served:
            return restore.from_what_was_served(self._handed.reached)
        directory = self._config.checkpoint.directory
        begun = None if directory is None else restore.from_newest(directory)
        if self._restore_from is not None:
            if begun is None:
                restore.from_file(self._restore_from)
            else:
                log.info("%s is not restored: what a checkpoint has was served here last", self._restore_from)
        return begun or Begun()

    async def listen(self, ready: Callable[[], None] | None = None) -> None:
        """Of a service that was started without: let clients in, and go on with those handed once we are `ready`.

        Raises UserError; before that.
        """
        self._exports.arrange(export.name for export in self._config.exports)  # as if those loaded had been there
        if not self._handed.was_served:  # the first client may come before all addresses are listened on
            self._state.begin_to_serve()

        def begin() -> None:
            if ready is not None:
                ready()
            self._state.begin_to_serve()
            self._checkpoints.begin_to_serve()

        await self._nbd.start(handed=self._handed if self._handed.was_served else None, ready=begin)

    async def load(self, export: ExportConfig, fill: Callable[[str], Awaitable[None]]) -> ExportStatus:
        """Make a declared export and offer it once `fill` has filled the disk at the URI that it is given.

        Raises UserError, and then there is no such export.
        """

        async def serve(disk: Disk) -> None:
            async with served_alone(disk, self._config) as uri:
                await fill(uri)

        return await self.changes.load_export(export, serve)

    async def serve_socket(self, client: socket.socket) -> None:
        """Serve one connected client until it leaves."""
        await self._nbd.serve_socket(client)

    def what_a_stop_does(self) -> str:
        """In words, for whoever tells the server to stop."""
        attached = len(list(self._nbd.sessions))
        if not attached:
            return "nobody is attached; stopping"
        clients = "1 client has" if attached == 1 else f"{attached} clients have"
        return f"stopping once {clients} the answers to what was begun, {self._config.limits.drain_seconds:g} s at most"

    async def takeover(
        self,
        socket: str,
        pid: int,
        format: int,  # noqa: A002
        knows: Sequence[str],
        state_dir: str,
        *,
        unit: str,
    ) -> int:
        """Another process wants to go on in our place: our number. Raises UserError: it cannot, and nothing happened.

        `unit`: of systemd that it is of, or none. It says so itself: below PrivateUsers= its /proc is hidden from us.
        """
        ours = self._config.state_dir
        mine, theirs = [
            str(path) and await asyncio.to_thread(os.path.realpath, path) for path in (ours or "", state_dir)
        ]
        if mine != theirs:
            raise UserError(f"its disks lie in {mine or 'memory'}, and not in {theirs or 'memory'}; mend --state-dir")
        if format != FORMAT:
            raise UserError(
                f"its version {__version__} gives away connections in format {FORMAT}, and was asked for {format}; "
                "restart it instead"
            )
        lacking = {ARENA, *(() if mine else (MEMORY,))}.difference(knows)
        if lacking:
            raise UserError(
                f"its version {__version__} has {min(lacking)!r}, which the one that asks does not know; restart it "
                "instead, or take over with a newer version"
            )
        if not mine and any(service.pool.is_private for service in self._pools.values()):
            raise UserError(
                "its disks are its own memory, as this system makes no files without names (memfd_create), or bounds "
                "those that there are (ulimit -f, LimitFSIZE=)"
            )
        unit_of_ours = Machine().unit()
        if unit_of_ours not in (None, unit):
            raise UserError(
                f"it is the unit {unit_of_ours}, and process {pid} is not of it, so that systemd would end both; "
                f"`systemctl reload {unit_of_ours}` upgrades it"
            )
        if self.ends_with_a_command:
            raise UserError("it ends with the command that it runs (--run)")
        if not self._nbd.lets_in:
            raise UserError("it is starting; ask again once it serves")
        self._require_no_end()
        self._checkpoints.require_flushes_answered()
        await asyncio.to_thread(self._state.require_arenas)
        self._require_no_end()
        self._nbd.prepare_to_hand_over()
        successor = await asyncio.to_thread(reach, Path(socket))
        self._require_no_end(successor)
        log.info("process %d takes over: everything is given to it, while clients wait", pid)
        self.successor = Successor(successor, frozenset(knows))
        self.taken_over.set()
        return os.getpid()

    def _require_no_end(self, successor: socket.socket | None = None) -> None:
        """Raises UserError: it ends, or is to; and the successor is hung up on."""
        if self._draining or self.told_to_stop.is_set() or self.taken_over.is_set():
            if successor is not None:
                successor.close()
            raise UserError("it is ending already")

    @property
    def config(self) -> ServerConfig:
        """As it is now."""
        return self._config

    @property
    def checkpoint(self) -> CheckpointStatus | None:
        """The newest, also of a server that has stopped."""
        return self._checkpoints.status

    async def hand_over(self, before_clients_wait: Callable[[], None] = lambda: None) -> Handover:
        """As stop, but clients that come to rest keep their connections. They are served until all else has ended."""
        self._begin_end()
        ends = [service.maintenance.stop(REPLACED) for service in self._pools.values()]
        ends += [self._streams.stop(REPLACED), self.changes.stop(REPLACED)]
        ends += [self._checkpoints.finish(), self._usages.stop()]
        with Patience("the takeover waits for the end of runs, streams and checkpoints"):
            outcomes = await asyncio.gather(*ends, return_exceptions=True)
        await end_all([("the end of scheduled snapshots", self._schedule.stop)])
        before_clients_wait()
        handed = await self._nbd.hand_over()
        pools = {service.name: service.counted() for service in self._pools.values()}
        handed.stored_bytes = sum(service.pool.stats().mem_used_total for service in self._pools.values())
        await end_all([("the end of checkpoints", partial(self._checkpoints.stop, last=False)), *self._last_steps()])
        with steadily("what ends before a takeover"):  # there is no way back: who raised now would lose the disks
            _raise_first(outcomes)
        handed.reached = self._checkpoints.reached
        handed.kept = self._state.surrender()
        handed.counted = dataclasses.replace(
            handed.counted,
            last_run=next(self._run_numbers) - 1,
            exports={export.name: export.traffic.counted() for export in self._exports},
            pools=pools,
            history=tuple(self._history.samples),
        )
        return handed

    async def stop(self, *, served: bool = True) -> None:
        """Drain: answer what is under way, end maintenance at its next slice, close the pools. No last checkpoint is
        taken where nobody was `served`, but by who served before a takeover that came to nothing: nobody else has that.
        """
        served = served or self._handed.comes_back
        self._begin_end()
        ends = (self._nbd.drain(), self._streams.stop(), self.changes.stop())
        with Patience("the stop waits for clients, streams and the change under way"):
            outcomes = await asyncio.gather(*ends, return_exceptions=True)
        await end_all(
            [
                ("the end of scheduled snapshots", self._schedule.stop),
                ("the last checkpoint", self._checkpoints.stop if served else self._checkpoints.give_up),
                *self._last_steps(),
            ]
        )
        _raise_first(outcomes)

    def _begin_end(self) -> None:
        self._draining = True
        if self._pulse is not None:
            self._pulse.cancel()
        self._history.stop()

    def _last_steps(self) -> list[Step]:
        return [
            ("the end of walks", self._usages.stop),
            ("the end of looks at memory", partial(asyncio.to_thread, self._headroom.stop)),
            *((f"the end of the pool {service.name}", service.close) for service in self._pools.values()),
        ]

    @property
    def _config(self) -> ServerConfig:
        return self._reload.config

    def hang_up(self) -> None:
        """SIGHUP: read certificates and configuration again, and log what came of it."""
        self._nbd.renew_certificates()
        self._reload.soon()

    async def reload(self) -> ReloadReport:
        """Read the configuration again. Raises UserError; for an error in it, and nothing was changed."""
        report = await self._reload.now()
        self._nbd.renew_certificates()
        return report

    def status(self) -> ServerStatus:
        """Everything, at this moment."""
        now = asyncio.get_running_loop().time()
        return ServerStatus(
            version=__version__,
            pid=os.getpid(),
            started_at=self._started_at,
            uptime_seconds=now - self._started,
            uris=tuple(self._nbd.uris),
            draining=self._draining and not self.taken_over.is_set(),  # whose clients notice nothing
            connections=self._nbd.connections,
            connections_total=self._nbd.connections_accepted,
            handshake_failures=dict(self._nbd.handshake_failures),
            protocol_errors=self._nbd.protocol_errors,
            connections_limit=self._config.limits.connections,
            tls_files_usable=self._nbd.tls_files_usable,
            certificate_expires_at=self._nbd.certificate_expires_at,
            state_dir_size_bytes=self._history.state_dir_size_bytes,
            state_dir_free_bytes=self._history.state_dir_free_bytes,
            event_loop_lag_seconds=self._lag_seconds,
            threads=self._threads,
            latency_bounds_seconds=LATENCY_BOUNDS_SECONDS,
            pools=tuple(service.status(now) for service in self._pools.values()),
            exports=tuple(export.status() for export in self._exports),
            checkpoint=self._checkpoints.status,
            journal=None if self._checkpoints.journal is None else self._checkpoints.journal.status,
            headroom=self._headroom.status,
            starting=not (self._nbd.lets_in or self._draining),
            swap=self._config.swap,
        )

    def clients(self) -> tuple[ClientStatus, ...]:
        """Who is attached, at this moment."""
        return tuple(session.status() for session in self._nbd.sessions)

    async def disconnect_client(self, number: int) -> None:
        """End one client, once what it has under way is answered. It may come again. Raises UserError."""
        found = [session for session in self._nbd.sessions if session.number == number]
        if not found:
            raise UserError(f"no client {number} is attached; `nbdzram clients list` shows who is")
        await self._nbd.end(found)

    async def usage(self) -> dict[str, DiskUsage]:
        """What each export's blocks cost, by name: from a walk, or one that is still fresh."""
        return await self._usages.now()

    def usage_so_far(self) -> tuple[dict[str, DiskUsage], float | None]:
        """The same at once, from the last walk, and how many seconds ago that was; the next starts if it is due."""
        return self._usages.so_far()

    def history(self) -> tuple[HistorySample, ...]:
        """The last hours, the oldest first."""
        return tuple(self._history.samples)

    def history_of(self, name: str) -> tuple[ExportSample, ...]:
        """The same of one export, where it did anything. Raises NoSuchExport."""
        return self._history.of(self._exports.get(name))

    async def run(
        self, kind: str, options: RunOptions, *, pool: str | None, cpu_percent: int, progress: Progress
    ) -> tuple[RunReport, ...]:
        """One maintenance run on one pool, or on each in turn. Raises UserError."""
        if not 1 <= cpu_percent <= 100:
            raise UserError(f"the processor budget is {cpu_percent} percent; it lies from 1 to 100")
        self.changes.require_begun()
        services = list(self._pools.values()) if pool is None else [self._pool(pool)]
        reports = [
            await service.maintenance.run(kind, options, cpu_percent=cpu_percent, progress=progress)
            for service in services
        ]
        return tuple(reports)

    async def send_stream(
        self, exports: Sequence[str], since: str | None, *, resumable: bool, resume: str | None, pipe: Pipe
    ) -> SendReport:
        """Write exports, or all, as a stream of one moment, or what is left of one. Raises UserError."""
        if resume is not None:
            return await self._streams.resume(resume, pipe)
        return await self._streams.send(exports, since, pipe, resumable=resumable)

    async def receive_stream(self, prefix: str, pool: str | None, *, resumable: bool, pipe: Pipe) -> ReceiveReport:
        """Offer what a stream holds: all of it when it has ended, or nothing. Raises UserError."""
        self.changes.require_begun()
        return await self._streams.receive(prefix, pool, pipe, resumable=resumable)

    async def streams(self) -> tuple[StreamStatus, ...]:
        """Those that are under way, and what is kept of others."""
        return self._streams.status()

    async def abandon_stream(self, name: str) -> None:
        """Keep nothing of a stream any more. Raises UserError."""
        await self._streams.abandon(name)

    async def runs(self) -> tuple[RunStatus, ...]:
        """The runs that wait, are under way, or ended lately, by their numbers."""
        found = [run for service in self._pools.values() for run in service.maintenance.runs]
        return tuple(sorted(found, key=lambda run: run.number))

    async def cancel_run(self, number: int) -> RunStatus:
        """End a run at its next slice, or before it began; what it did stays. Raises UserError."""
        maintenance, ticket = self._run(number)
        return await maintenance.cancel(ticket)

    async def pause_run(self, number: int) -> RunStatus:
        """Hold a run that is under way; those behind it wait on. Raises UserError."""
        _, ticket = self._run(number)
        ticket.pause()
        return ticket.status()

    async def resume_run(self, number: int) -> RunStatus:
        """Let a paused run go on. Raises UserError."""
        _, ticket = self._run(number)
        ticket.resume()
        return ticket.status()

    def _run(self, number: int) -> tuple[Maintenance, Ticket]:
        for service in self._pools.values():
            ticket = service.maintenance.find(number)
            if ticket is not None:
                return service.maintenance, ticket
        live = [
            str(ticket.number)
            for service in self._pools.values()
            for ticket in service.maintenance.queue
            if ticket.state in LIVE
        ]
        known = f"the runs that do are {', '.join(live)}" if live else "none does"
        raise UserError(f"run {number} neither waits nor runs; {known}, and `nbdzram runs` shows them")

    def _memory_bytes(self) -> int:
        stats = [service.pool.stats() for service in self._pools.values()]
        return sum(pool.mem_used_total + pool.metadata for pool in stats)

    def _pool(self, name: str) -> PoolService:
        if name not in self._pools:
            raise NoSuchExport.among(sorted(self._pools), name, "pool")
        return self._pools[name]

    async def _beat(self) -> None:
        """The pulse: engine clock, lag, policies."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + TICK_SECONDS
            await asyncio.sleep(TICK_SECONDS)
            now = loop.time()
            self._lag_seconds = max(now - due, 0.0)
            self._started_at = began(self._started_at, now - self._started)
            self._threads = self._nbd.threads()
            requests = sum(export.traffic.total_requests() for export in self._exports)
            rate, self._requests_seen = (requests - self._requests_seen) / TICK_SECONDS, requests
            for service in self._pools.values():
                with steadily(f"the pulse of the pool {service.name}"):
                    service.pool.set_clock(int(time.time()))  # not the loop's clock: ages outlive the machine's start
                    service.tell_refusals(now)
                    service.tell_rot(now)
                    service.scrubs.tell(time.time())
                    self._consider(service, now, rate)
            with steadily("relief where memory is short"):
                self._relief.consider(now)
            with steadily("the schedule of snapshots"):
                self._schedule.consider(self._config.exports, datetime.now(UTC).replace(microsecond=0))

    def _consider(self, service: PoolService, now: float, requests_per_second: float) -> None:
        """Start the first run that a policy asks for, unless one is under way."""
        busy = service.automatic is not None and not service.automatic.done()
        scrubbing = service.scrubbing is not None and not service.scrubbing.done()
        if (
            busy
            or (service.maintenance.running and not (scrubbing and service.maintenance.running == "scrub"))
            or all(policy.trigger is Trigger.OFF for policy in service.policies.values())
        ):
            return
        stats = service.pool.stats()
        for kind, policy in service.policies.items():
            if kind == "scrub" and scrubbing:
                continue
            reason = policy.decide(now, stats, requests_per_second)
            if reason in STARTS:
                assert reason is not None
                expected = policy.expected_gain(stats)
                run = asyncio.create_task(self._run_automatic(service, kind, reason, expected))
                if kind == "scrub":
                    service.scrubbing = run
                else:
                    service.automatic = run
                return

    async def _run_automatic(self, service: PoolService, kind: str, reason: Reason, expected: int) -> None:
        loop, policy, freed = asyncio.get_running_loop(), service.policies[kind], 0
        try:
            wishes = self._config.maintenance
            options = automatic_options(kind, wishes)
            percent = wishes.scrub_cpu_percent if kind == "scrub" else wishes.cpu_percent
            freed = await service.maintenance.gain(kind, options, cpu_percent=percent, reason=reason)
        except UserError as error:
            log.warning("automatic %s", error)
        policy.learn(loop.time(), expected, freed)


def _raise_first(outcomes: Sequence[object]) -> None:
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
