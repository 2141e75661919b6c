"""Jobs that run at once, for tests of what threads do to each other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

PATIENCE_SECONDS = 30  # for a thread that never comes


def wait_until(true: Callable[[], bool]) -> None:
    """Until another thread made it so."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not true():
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0)


def in_threads(*jobs: Callable[[], None]) -> None:
    """Run them all at once; the first failure is raised."""
    failures: list[BaseException] = []
    barrier = threading.Barrier(len(jobs))

    def guarded(job: Callable[[], None]) -> None:
        try:
            barrier.wait()
            job()
        except BaseException as failure:  # noqa: BLE001 -- handed to the main thread
            failures.append(failure)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
