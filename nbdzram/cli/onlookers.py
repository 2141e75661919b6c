"""Metrics and health of a server: begun with what there is to listen on, and ended when another process has that."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from nbdzram.config import ServerConfig
from nbdzram.errors import UserError
from nbdzram.listening import close_all

if TYPE_CHECKING:
    from nbdzram.metrics.http import MetricsServer
    from nbdzram.server.handover import Handover
    from nbdzram.server.service import Service

log = logging.getLogger("nbdzram.server")


def metrics_server(config: ServerConfig, service: Service) -> MetricsServer | None:
    """None: there shall be none."""
    if config.metrics is None:
        return None
    from nbdzram.metrics.http import MetricsServer  # noqa: PLC0415 - not with --metrics off

    return MetricsServer(config.metrics, service, config.metrics_hosts)


async def starts(metrics: MetricsServer, handed: Handover) -> bool:
    """Whether metrics are served; a server that goes on with its clients does so without. Raises UserError."""
    try:
        await metrics.start(handed.metrics)
    except UserError as error:
        if not handed.comes_back:
            raise
        log.error("%s; going on without metrics", error)
        return False
    return True


async def hand_over(service: Service, metrics: MetricsServer | None) -> Handover:
    """All that was served. Where metrics were, too, unless the other process may need that port itself; who has asked
    there is still to be answered (`finish`)."""
    assert service.successor is not None
    takes = metrics is not None and service.successor.serves_metrics_at(metrics.address)
    if metrics is not None and (takes or service.successor.leaves_ports(metrics.ports)):
        given = await service.hand_over(metrics.accept_no_more)
        given.metrics, given.metrics_stay = metrics.surrender(), not takes
    else:
        given = await service.hand_over()
        if metrics is not None:
            metrics.accept_no_more()
            close_all(metrics.surrender())
    return given
