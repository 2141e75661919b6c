"""How many threads serve large requests: as many as processors may be used, within bounds."""

from __future__ import annotations

import pytest
import uvloop

from nbdzram.config import ServerConfig
from nbdzram.server import hosting
from nbdzram.server.exports import Exports
from nbdzram.server.hosting import WORKERS_MOST, Hosting
from nbdzram.server.workers import Workers

TASKS_OF_ASYNCIO = 32  # ThreadPoolExecutor's most: min(32, processors + 4)
TASKS_MAX = 128  # the least that a unit of systemd has been shipped with


@pytest.mark.parametrize(("processors", "threads"), [(3, 3), (256, WORKERS_MOST)])
def test_processors_that_may_be_used_give_threads_up_to_a_bound(
    monkeypatch: pytest.MonkeyPatch, processors: int, threads: int
) -> None:
    started = []

    class Counted(Workers):
        def __init__(self, count: int) -> None:
            started.append(count)
            super().__init__(1)

    class Large:
        def processors(self) -> int:
            return processors

    async def story() -> None:
        Hosting(Exports(None), ServerConfig()).stop()

    monkeypatch.setattr(hosting, "Workers", Counted)
    monkeypatch.setattr(hosting, "Machine", Large)
    uvloop.run(story())
    assert started == [threads]


def test_all_threads_fit_into_the_units_limit_of_tasks() -> None:
    assert WORKERS_MOST + TASKS_OF_ASYNCIO < TASKS_MAX
