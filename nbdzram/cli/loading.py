"""New disks that are loaded from image files before they are offered, and what is said meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import click

from nbdzram.cli.supervisor import notify_supervisor
from nbdzram.cli.terminals import may_draw_on
from nbdzram.config import ExportConfig, ServerConfig
from nbdzram.units import format_size

if TYPE_CHECKING:
    from nbdzram.server.service import Service

LOADING_SILENCE_MICROSECONDS = 300_000_000  # in which systemd lets the next percent of an image take

log = logging.getLogger("nbdzram.server")


async def load_image(service: Service, export: ExportConfig, told_to_stop: asyncio.Event) -> None:
    """Fill a new disk from its image, and say how far that is: on a terminal, and to systemd, which waits as long."""
    from nbdzram.cli.images import copy, look_at  # noqa: PLC0415 - most do without

    assert export.image is not None
    image, began = await asyncio.to_thread(look_at, export.image), time.monotonic()
    says = f"loading the export '{export.name}' from {image.path}"
    log.info("%s (%s, %s)", says, image.format, format_size(image.size_bytes))
    with _progress_line(says) as show:

        def tell(percent: int) -> None:
            notify_supervisor(f"STATUS={says}: {percent} %\nEXTEND_TIMEOUT_USEC={LOADING_SILENCE_MICROSECONDS}")
            show(percent)

        status = await service.load(export, lambda uri: copy(image, uri, tell, told_to_stop))
    notify_supervisor("STATUS=")
    log.info(
        "loaded the export '%s': %s stored, in %.1f s",
        *(export.name, format_size(status.stored_bytes), time.monotonic() - began),
    )


@contextlib.contextmanager
def _progress_line(says: str) -> Iterator[Callable[[int], None]]:
    """On a terminal one line that is written over and over, and gone at the end; elsewhere nothing."""
    if not may_draw_on(sys.stderr):
        yield lambda _: None
        return
    try:
        yield lambda percent: click.echo(f"\r{says}: {percent} %", nl=False, err=True)
    finally:
        click.echo("\r\033[K", nl=False, err=True)


def with_image_sizes(config: ServerConfig) -> ServerConfig:
    """Disks that are loaded from images have the size of theirs, unless they were given one."""
    if all(export.image is None for export in config.exports):
        return config
    from nbdzram.cli.images import resolve  # noqa: PLC0415 - most do without

    return resolve(config)
