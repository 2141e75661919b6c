"""What passed through one export, as records for a scrape and for people."""

from __future__ import annotations

from collections.abc import Sequence

from nbdzram.nbd.constants import Command
from nbdzram.nbd.verdicts import Verdict
from nbdzram.server.counts import LATENCY_BOUNDS_SECONDS, ExportCount, IoStat, OperationCount
from nbdzram.sessions.tally import Tally
from nbdzram.status import OperationStatus

_NAMES = {int(command): command.name.lower() for command in Command if command is not Command.DISC}
_NAMES[max(Command) + 1] = "other"  # commands that do not exist
_CAUSES = [verdict.name.lower() for verdict in Verdict]
_INVALID = [
    verdict.invalid_io for verdict in Verdict
]  # asking the enumeration each time would cost more than the counting
_FAILED_READS = frozenset({int(Command.READ), int(Command.BLOCK_STATUS)})
_UNUSED = OperationStatus(
    requests=0, bytes=0, errors={}, latency_counts=(0,) * (len(LATENCY_BOUNDS_SECONDS) + 1), latency_sum_seconds=0.0
)  # one record for all: of a hundred exports' operations most were never asked for


Counts = tuple[int, int, int, Sequence[int], Sequence[int]]
"""Of one operation: requests, bytes, nanoseconds, errors by verdict, and latencies by bound."""
Found = dict[int, Counts]
"""Of those that were ever asked for, by number."""


class Traffic(Tally):
    """Counters of one export since it was made."""

    def told(self) -> tuple[dict[str, OperationStatus], IoStat]:
        """Both of the following, of one look: a scrape asks a hundred exports in one go."""
        found = self._found()
        return _operations(found), self._io_stat(found)

    def operations(self) -> dict[str, OperationStatus]:
        """Counts by operation name (read, write...; other: commands that do not exist)."""
        return _operations(self._found())

    def io_stat(self) -> IoStat:
        """The four fields of zram's io_stat."""
        return self._io_stat(self._found())

    def counted(self) -> ExportCount:
        """All of it, for another process that goes on with the export."""
        found = self._found()
        requests_throttled, nanoseconds_throttled = self.throttled()
        return ExportCount(
            operations={
                str(number): OperationCount(requests, size, nanoseconds, tuple(errors), tuple(latency))
                for number, (requests, size, nanoseconds, errors, latency) in found.items()
            },
            blocks_trimmed=self.blocks_trimmed(),
            throttled_requests=requests_throttled,
            throttled_nanoseconds=nanoseconds_throttled,
        )

    def go_on_from(self, count: ExportCount) -> None:
        """Count on from there. Before anybody is attached."""
        for number, one in count.operations.items():
            if int(number) in _NAMES:
                self.add(int(number), one.requests, one.size, one.nanoseconds, one.errors, one.latency)
        self.add_trimmed(count.blocks_trimmed)
        self.add_throttled(count.throttled_requests, count.throttled_nanoseconds)

    def _found(self) -> Found:
        return {number: found for number in _NAMES if (found := self.operation(number)) is not None}

    def _io_stat(self, found: Found) -> IoStat:
        failed_reads = failed_writes = invalid_io = 0
        for number, (_, _, _, errors, _) in found.items():
            if not any(errors):
                continue
            invalid = sum(count for count, told in zip(errors, _INVALID, strict=True) if told)
            invalid_io += invalid
            if number in _FAILED_READS:
                failed_reads += sum(errors) - invalid
            else:
                failed_writes += sum(errors) - invalid
        return IoStat(failed_reads, failed_writes, invalid_io, self.blocks_trimmed())


def _operations(found: Found) -> dict[str, OperationStatus]:
    return {name: _operation(found[number]) if number in found else _UNUSED for number, name in _NAMES.items()}


def _operation(counts: Counts) -> OperationStatus:
    requests, size, nanoseconds, errors, latency = counts
    return OperationStatus(
        requests=requests,
        bytes=size,
        errors={cause: count for cause, count in zip(_CAUSES, errors, strict=True) if count} if any(errors) else {},
        latency_counts=tuple(latency),
        latency_sum_seconds=nanoseconds / 1e9,
    )
