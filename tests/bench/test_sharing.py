"""Threads that read share nothing, and those that write little more than the index: `make sharing`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.sharing import AT_MOST, measure_sharing

THREADS = 8


@pytest.mark.slow
def test_threads_take_next_to_nothing_from_each_other(tmp_path: Path) -> None:
    found = measure_sharing(tmp_path, THREADS)
    assert found["overwritten, alike"].total > 1, "nothing was counted"
    for load, shared in found.items():
        assert shared.total <= AT_MOST[load], (load, shared.lines.most_common(12))
