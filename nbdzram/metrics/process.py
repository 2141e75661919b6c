"""The process itself, as prometheus_client's own collectors describe it, under the names that dashboards expect.

A registry of our own: whoever embeds the server and fills the library's global registry publishes none of that here.
These twenty samples cost 0.4 ms a scrape; the families with hundreds of samples an export are written directly
(exposition.py, docs/decisions/0001-write-hot-metric-families-directly.md).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import lz4
from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    Info,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.metrics_core import Metric

from nbdzram import __version__
from nbdzram.metrics.coarse import in_steps

CARRIERS = ("uvloop", "lz4", "xxhash", "zstandard")
"""The packages whose compiled code serves requests: their versions stand beside ours in nbdzram_build_info.

That of LZ4 itself is another: the package lz4 4.x carries liblz4 1.9 or 1.10, or uses the system's."""


class ProcessMetrics:
    """process_*, python_* and nbdzram_build_info."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        _CoarseProcess(registry=self._registry)
        PlatformCollector(registry=self._registry)
        GCCollector(registry=self._registry)
        build = Info(
            "nbdzram_build", "The version that runs, and those of the libraries below it", registry=self._registry
        )
        carriers = {name: _version(name) for name in CARRIERS}
        build.info({"version": __version__, "liblz4": lz4.library_version_string(), **carriers})

    def families(self) -> list[tuple[str, str, str]]:
        """Name, type and help of each, for the reference."""
        text = self.render().splitlines()
        kinds = dict(line.split()[2:4] for line in text if line.startswith("# TYPE "))
        helps = (line.removeprefix("# HELP ").partition(" ") for line in text if line.startswith("# HELP "))
        return [(name, kinds[name], says) for name, _, says in helps]

    def pieces(self) -> Iterator[str]:
        """The same as one piece of a longer text, of the moment when that is written."""
        yield self.render()

    def render(self) -> str:
        """Every sample of this moment, in the text format."""
        return generate_latest(self._registry).decode()


class _CoarseProcess(ProcessCollector):
    """Pools are a part of the process, and what of them is equal to what shows in its memory: see coarse.py."""

    def collect(self) -> Iterator[Metric]:
        for metric in super().collect():
            if metric.name == "process_resident_memory_bytes":
                metric.samples = [one._replace(value=in_steps(int(one.value))) for one in metric.samples]
            yield metric


def resident_bytes() -> int:
    """Resident size of this process."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a distribution may have left out the package's metadata
        return "unknown"
