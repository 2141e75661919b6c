# The only door between threads: letters in a box, and a descriptor that wakes who sleeps before it.
#
# Whoever posts pushes onto a stack by compare-and-swap; the box's owner takes all of it with one exchange and turns it
# round. The one who finds the box empty writes to the eventfd, so many letters cost one wake-up. A letter is its
# receiver's once it is posted, and lies in one box at most: no memory is asked for to send one, so sending never fails.
#
# A Bell is a letter that may be sent again and again: what is wished is a bit, and rings only when no ring is on its
# way.

from libc.stdint cimport uint32_t, uint64_t

cdef extern from * nogil:
    """
    #include <errno.h>
    #include <stdint.h>
    #include <sys/eventfd.h>
    #include <unistd.h>

    typedef struct Letter {
        struct Letter* next;
        void* owner;   /* whom it is about; which class that is, its kind says */
        int kind;
    } Letter;

    typedef struct {
        Letter* newest;
        int event;
    } Mailbox;

    typedef struct {
        Letter letter;
        Mailbox* home;
        uint32_t wishes;
    } Bell;

    static __attribute__((unused)) int mail_open(Mailbox* box) {
        box->newest = NULL;
        box->event = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
        return box->event < 0 ? errno : 0;
    }
    static __attribute__((unused)) void mail_close(Mailbox* box) {
        if (box->event >= 0) close(box->event);
        box->event = -1;
    }
    static inline void mail_post(Mailbox* box, Letter* letter) {
        uint64_t one = 1;
        Letter* before = __atomic_load_n(&box->newest, __ATOMIC_RELAXED);
        do letter->next = before;
        while (!__atomic_compare_exchange_n(&box->newest, &before, letter, 1, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED));
        /* A full counter is a wake-up too, so what write returns says nothing. */
        if (before == NULL && write(box->event, &one, sizeof(one)) < 0) return;
    }
    static inline int mail_waits(Mailbox* box) { return __atomic_load_n(&box->newest, __ATOMIC_RELAXED) != NULL; }
    /* The eventfd is cleared before the box is emptied: what comes between the two rings again. */
    static inline void mail_quiet(Mailbox* box) {
        uint64_t count;
        if (read(box->event, &count, sizeof(count)) < 0) return;
    }
    static inline Letter* mail_take(Mailbox* box) {
        Letter* letter = __atomic_exchange_n(&box->newest, NULL, __ATOMIC_ACQ_REL);
        Letter* turned = NULL;
        while (letter != NULL) {
            Letter* next = letter->next;
            letter->next = turned;
            turned = letter;
            letter = next;
        }
        return turned;
    }
    static inline void bell_ring(Bell* bell, uint32_t wish) {
        if (__atomic_fetch_or(&bell->wishes, wish, __ATOMIC_ACQ_REL) == 0) mail_post(bell->home, &bell->letter);
    }
    /* For the receiver of its letter: from here on another ring sends it again. */
    static inline uint32_t bell_answer(Bell* bell) { return __atomic_exchange_n(&bell->wishes, 0, __ATOMIC_ACQ_REL); }
    """
    ctypedef struct Letter:
        Letter* next
        void* owner
        int kind
    ctypedef struct Mailbox:
        int event
    ctypedef struct Bell:
        Letter letter
        Mailbox* home
        uint32_t wishes
    int mail_open(Mailbox*)
    void mail_close(Mailbox*)
    void mail_post(Mailbox*, Letter*)
    bint mail_waits(Mailbox*)
    void mail_quiet(Mailbox*)
    Letter* mail_take(Mailbox*)
    void bell_ring(Bell*, uint32_t wish)
    uint32_t bell_answer(Bell*)

cdef inline void bell_hang(Bell* bell, Mailbox* home, int kind, void* owner) noexcept nogil:
    # Before anybody rings it.
    bell.letter.owner = owner
    bell.letter.kind = kind
    bell.home = home
    bell.wishes = 0

cdef enum:  # kinds of letters
    WISH = 0     # a session's bell: see session.pxd
    STORED = 1   # a Task of a large WRITE comes home
    ROUND = 2    # the thread's own bell: rest, end
    TIDINGS = 3  # a session's other bell, at the event loop
    NOTICED = 4  # there is something for the log
