"""The metrics that every process publishes, under the names that dashboards expect."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

from nbdzram.metrics.exposition import Family, Sample
from nbdzram.status import ServerStatus


def resident_bytes() -> int:
    """Resident size of this process."""
    return int(_statm()[1]) * os.sysconf("SC_PAGE_SIZE")


def _cpu(_: ServerStatus) -> Iterator[Sample]:
    used = os.times()
    yield "", used.user + used.system


def _resident(_: ServerStatus) -> Iterator[Sample]:
    yield "", resident_bytes()


def _virtual(_: ServerStatus) -> Iterator[Sample]:
    yield "", int(_statm()[0]) * os.sysconf("SC_PAGE_SIZE")


def _descriptors(_: ServerStatus) -> Iterator[Sample]:
    with os.scandir("/proc/self/fd") as entries:
        yield "", sum(1 for _ in entries) - 1  # less the one that lists them


def _descriptor_limit(_: ServerStatus) -> Iterator[Sample]:
    yield "", resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _start(status: ServerStatus) -> Iterator[Sample]:
    yield "", status.started_at


def _statm() -> list[str]:
    return Path("/proc/self/statm").read_text(encoding="ascii").split()


PROCESS_FAMILIES = (
    Family("process_cpu_seconds_total", "counter", "Processor time of the process.", _cpu),
    Family("process_resident_memory_bytes", "gauge", "Resident size of the process.", _resident),
    Family("process_virtual_memory_bytes", "gauge", "Virtual size of the process.", _virtual),
    Family("process_open_fds", "gauge", "Open file descriptors.", _descriptors),
    Family("process_max_fds", "gauge", "Most open file descriptors.", _descriptor_limit),
    Family("process_start_time_seconds", "gauge", "When the process started, since the epoch.", _start),
)
