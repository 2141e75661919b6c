"""What passed through one export, as records for a scrape and for people."""

from __future__ import annotations

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


class Traffic(Tally):
    """Counters of one export since it was made."""

    def operations(self) -> dict[str, OperationStatus]:
        """Counts by operation name (read, write...; other: commands that do not exist)."""
        return {name: self._operation(number) for number, name in _NAMES.items()}

    def counted(self) -> ExportCount:
        """All of it, for another process that goes on with the export."""
        found = {str(number): told for number in _NAMES if (told := self.operation(number)) is not None}
        requests_throttled, nanoseconds_throttled = self.throttled()
        return ExportCount(
            operations={
                number: OperationCount(requests, size, nanoseconds, tuple(errors), tuple(latency))
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

    def _operation(self, number: int) -> OperationStatus:
        found = self.operation(number)
        if found is None:
            return _UNUSED
        requests, size, nanoseconds, errors, latency = found
        return OperationStatus(
            requests=requests,
            bytes=size,
            errors={cause: count for cause, count in zip(_CAUSES, errors, strict=True) if count},
            latency_counts=tuple(latency),
            latency_sum_seconds=nanoseconds / 1e9,
        )

    def io_stat(self) -> IoStat:
        """The four fields of zram's io_stat."""
        failed_reads = failed_writes = invalid_io = 0
        for number in _NAMES:
            found = self.operation(number)
            if found is None or not any(errors := found[3]):
                continue
            invalid = sum(count for count, told in zip(errors, _INVALID, strict=True) if told)
            invalid_io += invalid
            if number in _FAILED_READS:
                failed_reads += sum(errors) - invalid
            else:
                failed_writes += sum(errors) - invalid
        return IoStat(failed_reads, failed_writes, invalid_io, self.blocks_trimmed())
