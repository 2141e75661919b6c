"""One thread kept at a place, while another does something (Pool.test_locks)."""

from __future__ import annotations

from collections.abc import Callable

from nbdzram.engine.pool import Pool
from tests.support.threads import in_threads, wait_until


def lingering(pool: Pool, function: str, job: Callable[[], object], meanwhile: Callable[[], object]) -> None:
    """Run `job`, and do `meanwhile` while it is in `function`, just after it let the pool's lock go."""
    pool.test_locks(linger=function)

    def interrupt() -> None:
        try:
            wait_until(lambda: bool(pool.lingering()))
            meanwhile()
        finally:
            pool.test_locks()

    def work() -> None:
        job()

    in_threads(work, interrupt)
