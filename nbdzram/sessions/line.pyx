"""The way to one peer: a socket. tls puts OpenSSL before one, and tests a simulated peer in its place.

    take      bytes that came; 0: the peer sends no more
    give      bytes that the peer takes now, of those that there are; 0 is LATER
    watch     what to be woken for: bytes that come, room for bytes that go, both, or nothing
    finish    everything was given: say so, if the line has a word for it. False: not now, when it can be written to
    hang_up   nothing is taken or given any more

A line belongs to the thread that serves it.
"""

from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint8_t
from libc.string cimport memcmp

from nbdzram.sessions.epoll cimport (
    EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD, EPOLLIN, EPOLLOUT, epoll_ctl, epoll_event,
)

from nbdzram.unread import UNHEARD_SECONDS

cdef extern from "<sys/socket.h>" nogil:
    ssize_t c_send "send"(int, const void*, size_t, int)
    ssize_t c_recv "recv"(int, void*, size_t, int)
    int setsockopt(int, int, int, const void*, unsigned int)
    struct sockaddr:
        pass
    int getsockname(int, sockaddr*, unsigned int*)
    int getpeername(int, sockaddr*, unsigned int*)
    enum:
        AF_INET
        AF_INET6
        MSG_NOSIGNAL
        MSG_DONTWAIT

cdef extern from "<netinet/in.h>" nogil:
    struct in_addr:
        pass
    struct in6_addr:
        pass
    struct sockaddr_in:
        unsigned short sin_family
        in_addr sin_addr
    struct sockaddr_in6:
        in6_addr sin6_addr
    enum:
        IPPROTO_TCP

cdef extern from "<netinet/tcp.h>" nogil:
    enum:
        TCP_CONGESTION
        TCP_USER_TIMEOUT

cdef extern from "<unistd.h>" nogil:
    int c_close "close"(int)


cdef enum:
    DROPPED_READS = 256  # a megabyte: more than a socket holds, as a rule
    PATIENT = 0  # a client may stand still for as long as it likes: a virtual machine that is paused does

cdef unsigned int unheard_ms = int(UNHEARD_SECONDS * 1000)

cdef union Address:
    sockaddr any
    sockaddr_in v4
    sockaddr_in6 v6


cdef class Line:
    """See the module's docstring. Each kind of line completes it."""

    def __cinit__(self):
        self.grain = 1

    cdef void attend(self, int poller, void* session) noexcept nogil:
        """Let `poller` (epoll's descriptor) wake the thread for it, with `session` as its word."""

    cdef ssize_t take(self, uint8_t* target, size_t size) noexcept nogil:
        return BROKEN

    cdef ssize_t give(self, const uint8_t* source, size_t size) noexcept nogil:
        return BROKEN

    cdef int watch(self, int wanted) noexcept nogil:
        """0, or the errno of a system that does not do it."""
        return 0

    cdef bint finish(self) noexcept nogil:
        return True

    cdef void hang_up(self, bint orderly) noexcept nogil:
        """`orderly`: all was given, and the peer may be told that no more comes."""


cdef class SocketLine(Line):
    """A connected socket, which is ours from now on."""

    def __cinit__(self):
        self.fd = self.poller = -1

    def __init__(self, int fd):
        self.fd = fd

    def __dealloc__(self):
        if self.fd >= 0:
            c_close(self.fd)

    def fileno(self):
        """The socket's descriptor; -1 once it is closed."""
        return self.fd

    def detach(self):
        """The socket's descriptor, which is the caller's from now on. Its session has let it go."""
        fd, self.fd = self.fd, -1
        return fd

    cdef void attend(self, int poller, void* session) noexcept nogil:
        self.poller = poller
        self.session = session
        self.wait_for_peer(PATIENT)
        if self.stays_here():
            self.pace_nothing()

    cdef ssize_t take(self, uint8_t* target, size_t size) noexcept nogil:
        cdef ssize_t taken
        while True:
            taken = c_recv(self.fd, target, size, MSG_DONTWAIT)
            if taken >= 0:
                return taken
            if errno == EAGAIN:
                return LATER
            if errno != EINTR:
                self.error = errno
                return BROKEN

    cdef ssize_t give(self, const uint8_t* source, size_t size) noexcept nogil:
        return self.transmit(source, size, 0)

    cdef ssize_t transmit(self, const uint8_t* source, size_t size, int flags) noexcept nogil:
        cdef ssize_t given
        while True:
            given = c_send(self.fd, source, size, MSG_NOSIGNAL | MSG_DONTWAIT | flags)
            if given >= 0:
                return given
            if errno == EAGAIN:
                return LATER
            if errno != EINTR:
                self.error = errno
                return BROKEN

    cdef int watch(self, int wanted) noexcept nogil:
        """A line that nobody waits for is taken out: the system tells of a broken one whether one asks or not."""
        cdef epoll_event event
        cdef int act = EPOLL_CTL_MOD if self.polled else EPOLL_CTL_ADD
        if wanted == self.watched and self.polled == (wanted != 0):
            return 0
        if wanted == 0:
            act = EPOLL_CTL_DEL
        event.events = (EPOLLIN if wanted & WATCH_READ else 0) | (EPOLLOUT if wanted & WATCH_WRITE else 0)
        event.data.ptr = self.session
        if epoll_ctl(self.poller, act, self.fd, &event) != 0:
            return errno
        self.watched = wanted
        self.polled = wanted != 0
        return 0

    cdef void hang_up(self, bint orderly) noexcept nogil:
        """A socket that is closed with unread bytes tells its peer of an error, and forgets replies that it has not
        sent yet (RFC 1122, section 4.2.2.13); so what came too late to be performed is read, and dropped."""
        cdef uint8_t dropped[4096]
        cdef int reads = 0
        if self.fd < 0:
            return
        self.watch(0)
        while orderly and reads < DROPPED_READS and c_recv(self.fd, dropped, sizeof(dropped), MSG_DONTWAIT) > 0:
            reads += 1
        self.wait_for_peer(unheard_ms)
        c_close(self.fd)
        self.fd = -1

    cdef void wait_for_peer(self, unsigned int milliseconds) noexcept nogil:
        """How long the peer may take nothing of what is on its way before the system gives up (tcp(7)); 0: it asks on.
        Sockets that are no TCP refuse, and need it not: what they hold is in the peer's own buffer."""
        setsockopt(self.fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &milliseconds, sizeof(milliseconds))

    cdef bint stays_here(self) noexcept nogil:
        """Both ends of a connection have one address: what goes to the peer does not leave the machine."""
        cdef Address ours
        cdef Address peer
        cdef unsigned int size = sizeof(Address)
        cdef unsigned int peer_size = sizeof(Address)
        if getsockname(self.fd, &ours.any, &size) != 0 or getpeername(self.fd, &peer.any, &peer_size) != 0:
            return False
        if ours.v4.sin_family == AF_INET:
            return memcmp(&ours.v4.sin_addr, &peer.v4.sin_addr, sizeof(ours.v4.sin_addr)) == 0
        if ours.v4.sin_family == AF_INET6:
            return memcmp(&ours.v6.sin6_addr, &peer.v6.sin6_addr, sizeof(ours.v6.sin6_addr)) == 0
        return False

    cdef void pace_nothing(self) noexcept nogil:
        """Where the administrator chose BBR for the network, the system spaces out what is sent, by a timer for each
        piece; of a large READ to a neighbour that was a sixth (decision 20). Reno is always there and anybody may take
        it (tcp(7)). A system that refuses sends as it did."""
        setsockopt(self.fd, IPPROTO_TCP, TCP_CONGESTION, b"reno", 4)
