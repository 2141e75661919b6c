"""What goes on whatever one step of it meets: the pulse, checkpoints, looks at memory, samples; and the server's end.

Each is begun once and then left to itself, so nobody would hear that a mistake of ours ended it: there would be no
checkpoint any more, no fold, no refusal before the kernel ends the process. So a step fails alone, and is told.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence

Step = tuple[str, Callable[[], Awaitable[None]]]  # of an end, and its name

log = logging.getLogger("nbdzram.server")


@contextlib.contextmanager
def steadily(what: str) -> Iterator[None]:
    """A step of `what`: its failure is an error in the log, which bounds how many of one kind it has."""
    try:
        yield
    except Exception as error:
        log.error("%s met what nobody foresaw, and goes on; please report it", what, exc_info=error)


async def end_all(steps: Sequence[Step]) -> None:
    """One after the other, whatever any of them meets."""
    for what, end in steps:
        with steadily(what):
            await end()
