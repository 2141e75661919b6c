import asyncio

from nbdzram.server.channel import TlsChannel
from nbdzram.sessions.line import Line

class TlsLine(Line):
    """The line of a client behind TLS, which the event loop serves."""

    def __init__(self, channel: TlsChannel, loop: asyncio.AbstractEventLoop) -> None: ...
