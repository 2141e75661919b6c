
from nbdzram.sessions.budget cimport Budget
from nbdzram.sessions.mail cimport Mailbox
from nbdzram.sessions.notices cimport Notices
from nbdzram.sessions.turns cimport Turns
from nbdzram.sessions.workers cimport Workers

cdef class Plane:
    cdef Mailbox box
    cdef readonly Budget budget
    cdef readonly Workers workers
    cdef readonly Turns turns
    cdef readonly Notices notices
    cdef readonly list threads
    cdef dict sessions
