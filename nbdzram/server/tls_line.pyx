"""The line of a client behind TLS: the event loop decrypts and encrypts, and serves the session at its own desk."""

from libc.errno cimport EIO
from libc.stdint cimport uint8_t

from nbdzram.server.channel cimport TlsChannel
from nbdzram.sessions.line cimport BROKEN, LATER, WATCH_READ, Line


cdef class TlsLine(Line):
    """Over a TlsChannel. Bytes that came are pushed (Desk.received), so nothing is taken here."""

    cdef TlsChannel channel
    cdef object loop
    cdef bint reading

    def __init__(self, TlsChannel channel not None, loop):
        self.channel = channel
        self.loop = loop
        self.reading = False  # as the handshake leaves it: the session has no place for bytes before it begins

    cdef ssize_t give(self, const uint8_t* source, size_t size) noexcept nogil:
        with gil:
            try:
                if self.channel.blocked or self.channel.closing:
                    return LATER
                return self.channel.send(source, size) or LATER
            except BaseException as error:
                return self.mistake(error)

    cdef int watch(self, int wanted) noexcept nogil:
        cdef bint reading = wanted & WATCH_READ != 0
        if reading == self.reading:
            return 0
        with gil:
            self.reading = reading
            try:
                if reading:
                    self.channel.resume_reading()
                else:
                    self.channel.pause_reading()
            except BaseException as error:
                self.mistake(error)
                return EIO
        return 0

    cdef void hang_up(self, bint orderly) noexcept nogil:
        with gil:
            try:
                if orderly:
                    self.channel.close()
                else:
                    self.channel.abort()
            except BaseException as error:
                self.mistake(error)

    cdef ssize_t mistake(self, error):
        """A mistake of ours: as loud as what asyncio itself catches."""
        self.error = EIO
        self.loop.call_exception_handler({"message": "TLS: not sent", "exception": error})
        return BROKEN
