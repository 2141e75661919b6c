"""A pool that serves: its maintenance, the runs that the engine offers, and the policies that start them."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Iterator

from nbdzram.config import MaintenanceConfig, Trigger
from nbdzram.engine.fold import Compact, Fold
from nbdzram.engine.pool import Pool
from nbdzram.engine.recompress import Recompress
from nbdzram.errors import UserError
from nbdzram.server.counts import PoolCount
from nbdzram.server.maintenance import Maintenance, RunFactory
from nbdzram.server.policy import Policy, compact_gain, fold_gain, recompress_gain
from nbdzram.server.runs import STOPS, Run
from nbdzram.server.scrubbing import Scrubs
from nbdzram.status import MaintenanceStatus, PoolStatus, RunOptions
from nbdzram.units import counted, format_size

REFUSALS_SECONDS = 60.0  # a full pool refuses thousands of writes a second; an operator reads of it once a minute
ROT_SECONDS = 60.0  # a disk that is read through names one broken block after the other

NOTHING = PoolCount()  # was counted before

log = logging.getLogger("nbdzram.server")


class PoolService:
    """One pool, its maintenance and the policies that start it."""

    def __init__(
        self,
        name: str,
        pool: Pool,
        wishes: MaintenanceConfig,
        now: float,
        numbers: Iterator[int] | None = None,
        *,
        before: PoolCount = NOTHING,
    ) -> None:
        """`before`: what another process counted that had the pool."""
        self.name = name
        self.pool = pool
        self.policies = _policies(wishes, now)
        self.scrubs = Scrubs(name, pool, objects=before.scrubbed_objects, blocks=before.scrubbed_blocks)
        self.maintenance = Maintenance(name, pool, _kinds(pool, self.scrubs), numbers)
        for kind in self.maintenance.totals.keys() & before.totals.keys():
            self.maintenance.totals[kind] = before.totals[kind]
        for kind in self.policies.keys() & before.decisions.keys():
            self.policies[kind].decisions.update(before.decisions[kind])
        self._counted_before = before.counters
        self.automatic: asyncio.Task[None] | None = None  # the run that a policy started
        self.scrubbing: asyncio.Task[None] | None = None  # the same, of a scrub: others need not wait for that
        self._refusals_told = 0
        self._declined = pool.declined()
        self._refusals_wait = now
        self._rot_told = 0
        self._rot_wait = now

    def status(self, now: float) -> PoolStatus:
        """The pool at this moment of the loop's clock."""
        done, total = self.maintenance.progress()
        return PoolStatus(
            name=self.name,
            path=self.pool.path,
            dedup="inline" if self.pool.inline_dedup else "fold",
            tells_sharing=self.pool.tells_sharing,
            verify=self.pool.verify,
            stats=self.pool.stats().gone_on(self._counted_before),
            scrub=self.scrubs.status(),
            maintenance=MaintenanceStatus(
                running=self.maintenance.running,
                done=done,
                total=total,
                totals=dict(self.maintenance.totals),
                decisions={kind: dict(policy.decisions) for kind, policy in self.policies.items()},
                next_allowed_seconds={kind: policy.waits_seconds(now) for kind, policy in self.policies.items()},
                recent=tuple(self.maintenance.recent),
                queue=self.maintenance.queue,
            ),
        )

    def counted(self) -> PoolCount:
        """What another process goes on from that opens the pool. Before it is closed."""
        scrubbed = self.scrubs.status()
        return PoolCount(
            counters=self.pool.stats().gone_on(self._counted_before).counters(),
            totals=dict(self.maintenance.totals),
            decisions={kind: dict(policy.decisions) for kind, policy in self.policies.items()},
            scrubbed_objects=scrubbed.objects,
            scrubbed_blocks=scrubbed.blocks,
        )

    def adopt(self, wishes: MaintenanceConfig, now: float) -> None:
        """Other triggers from now on; a kind whose trigger stays as it was waits on, and its decisions stay counted."""
        for kind, policy in _policies(wishes, now).items():
            old = self.policies[kind]
            if (policy.trigger, policy.interval_seconds) != (old.trigger, old.interval_seconds):
                policy.decisions.update(old.decisions)
                self.policies[kind] = policy

    def tell_refusals(self, now: float) -> None:
        """Log that writes found no room since the last such line, and what to do. Called with the loop's clock."""
        stats = self.pool.stats()
        refused = stats.failed_writes - self._refusals_told
        if not refused or now < self._refusals_wait:
            return
        self._refusals_told, self._refusals_wait = stats.failed_writes, now + REFUSALS_SECONDS
        log.warning(
            "the pool %s refused %s for lack of room: it uses %s, %s",
            *(self.name, counted(refused, "write"), format_size(stats.memory_used), self._bound(stats.mem_limit)),
        )

    def _bound(self, mem_limit: int) -> str:
        """What kept it from more since this was last asked, and what to do about that."""
        before, self._declined = self._declined, self.pool.declined()
        no_memory, no_file = [now > then for now, then in zip(self._declined, before, strict=True)]
        if no_memory and self.pool.purse is not None:
            return (
                f"and memory is short: all pools may take {format_size(self.pool.purse.ceiling)} (limits.keep_free); "
                "trim on the clients, fold, compact or remove exports, or give the server more"
            )
        if no_file:
            return f"and for {self.pool.path} {self.pool.lacks()}, or trim on the clients"
        if not mem_limit:  # addresses, say
            return "and it has no limit; trim on the clients, or remove exports"
        return (
            f"its limit is {format_size(mem_limit)}; see `nbdzram fold`, `compact` and `recompress`, trim on the "
            f"clients, or raise it: nbdzram pools limit {self.name} SIZE"
        )

    def tell_rot(self, now: float) -> None:
        """Log that blocks were found not to be what was written. Called with the loop's clock."""
        rotten = self.pool.stats().blocks_rotten
        if rotten == self._rot_told or now < self._rot_wait:
            return
        found, self._rot_told, self._rot_wait = rotten - self._rot_told, rotten, now + ROT_SECONDS
        log.error(
            "the pool %s found %s that a stored block is not what was written, last %s: reading such a block is "
            "an error, writing it mends it; memory may be failing, and `nbdzram check` names what else is wrong",
            *(self.name, counted(found, "time"), self.pool.last_rot() or "while it was opened"),
        )

    async def close(self, why: str = STOPS) -> None:
        """End the run under way at its next slice, and say why; then let the pool go."""
        await self.maintenance.stop(why)
        await asyncio.to_thread(self.pool.close)  # which waits for whoever is in the pool


def automatic_options(kind: str, wishes: MaintenanceConfig) -> RunOptions:
    """How a run goes that a policy starts."""
    if kind != "recompress":
        return RunOptions()
    return RunOptions(
        level=wishes.recompress_level,
        idle_seconds=wishes.recompress_age_seconds,
        huge_only=wishes.recompress_huge_only,
        dictionary=wishes.recompress_dictionary,
    )


def _kinds(pool: Pool, scrubs: Scrubs) -> dict[str, RunFactory]:
    """The engine's runs by name."""
    return {
        "fold": lambda options: Fold(pool, dry_run=options.dry_run),
        "compact": lambda options: Compact(pool, dry_run=options.dry_run),
        "recompress": _always_wet(
            "it cannot tell what it would save without doing it", functools.partial(_recompress, pool)
        ),
        "check": _always_wet("it changes nothing", lambda _: scrubs.begin_check()),
        "scrub": _always_wet("it changes nothing", lambda _: scrubs.begin()),
    }


def _recompress(pool: Pool, options: RunOptions) -> Run:
    return Recompress(
        pool,
        level=options.level,
        idle_seconds=options.idle_seconds,
        huge_only=options.huge_only,
        dictionary=options.dictionary,
    )


def _always_wet(why: str, start: Callable[[RunOptions], Run]) -> RunFactory:
    def factory(options: RunOptions) -> Run:
        if options.dry_run:
            raise UserError(f"this run has no dry run: {why}")
        return start(options)

    return factory


def _policies(wishes: MaintenanceConfig, now: float) -> dict[str, Policy]:
    return {
        "fold": Policy.new(wishes.fold, wishes.fold_interval_seconds, fold_gain, now),
        "compact": Policy.new(wishes.compact, wishes.compact_interval_seconds, compact_gain, now),
        "recompress": Policy.new(wishes.recompress, wishes.recompress_interval_seconds, recompress_gain, now),
        "scrub": Policy.new(
            Trigger.INTERVAL if wishes.scrub_seconds else Trigger.OFF, wishes.scrub_seconds, lambda _: 0, now
        ),
    }
