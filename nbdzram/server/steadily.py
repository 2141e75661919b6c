"""What goes on whatever one step of it meets: the pulse, checkpoints, looks at memory, samples; and the server's end.

Each is begun once and then left to itself, so nobody would hear that a mistake of ours ended it: there would be no
checkpoint any more, no fold, no refusal before the kernel ends the process. So a step fails alone, and is told. So is
one that takes long: a disk may fail without a word, by an answer that never comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Self

Step = tuple[str, Callable[[], Awaitable[None]]]  # of an end, and its name

SLOW_SECONDS = 10.0
"""From then on a wait is told: half a minute is what the kernel's clients bear by themselves."""

log = logging.getLogger("nbdzram.server")


@contextlib.contextmanager
def steadily(what: str) -> Iterator[None]:
    """A step of `what`: its failure is an error in the log, which bounds how many of one kind it has."""
    try:
        yield
    except Exception as error:
        log.error("%s met what nobody foresaw, and goes on; please report it", what, exc_info=error)


class Patience:
    """Of who waits for what may never come: one wait after another. The log tells of one that takes long, and how long
    it was.
    """

    def __init__(self, what: str) -> None:
        """`what`: who waits for what, in words."""
        self.what = what
        self.is_over = False
        """It takes long."""
        self._began = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._began, self._timer = loop.time(), loop.call_later(SLOW_SECONDS, self._tell)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._timer is not None
        self._timer.cancel()
        if self.is_over:
            self.is_over = False
            log.info("%s no longer, after %.0f s", self.what, asyncio.get_running_loop().time() - self._began)

    def _tell(self) -> None:
        self.is_over = True
        log.warning("%s, for %.0f s by now", self.what, SLOW_SECONDS)


async def end_all(steps: Sequence[Step]) -> None:
    """One after the other, whatever any of them meets."""
    for what, end in steps:
        with steadily(what), Patience(f"what ends waits for {what}"):
            await end()
