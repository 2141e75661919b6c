"""One mapping, addressed by offset: pages out, pages in.

What it owns: a reserved range of addresses, of which the first `mapped` bytes can be touched. It is cut into units of
64 KiB; a unit is the largest run that anybody needs (one zspage, a sixteenth of a cell segment). Addresses are
plentiful and memory is not, so a unit is given out whole and its pages become resident only when they are touched.

    | unit 0 | unit 1 | ... | unit_high - 1 |   not yet handed out   |   reserved, PROT_NONE   |
    0        64 KiB                         unit_high * 64 KiB       mapped                    reserved

Memory of this process (`memory` None); or a file, on tmpfs or a disk, under an exclusive lock; or one without a name
(memfd_create(2)), which lives as long as anybody has its descriptor: another process can go on with that, and nobody
else has to know where it lies. What is handed out next is mapped ahead, by whoever is about to change something and
holds no lock yet (make_ready).

Invariants
1. Nothing that is stored in the arena is an address: the mapping may lie elsewhere in the next process.
2. A page of a file is allocated (commit) before it is touched, read as well as written, because tmpfs takes memory for
   reading a hole too: a full file system is ENOSPC, never SIGBUS. In an arena opened again, `holds` tells which are.
   A file without a name has no file system that could be full: its pages come when they are touched, as a process's
   own do, unless the machine promises no more memory than it has (OVERCOMMIT_NEVER).
3. A released page reads as zeroes. It is not resident either, locked or not, unless the system refuses (locked memory
   before Linux 5.18, a file system that makes no holes): then it is cleared where it lies.
4. A file that was opened again is mapped for reading alone, and keeps its length, until `admit_writes`: whoever is to
   find out whether it is sound cannot change it.

A Region is the same for derived state: private memory that grows in place, so that nothing that points into it moves.
Its pages count in the pool's ledger from its beginning to the highest that was asked for.
"""

cimport cython
from libc.errno cimport EDQUOT, EINTR, EINVAL, EMFILE, ENFILE, ENOSPC, ENXIO, EOPNOTSUPP, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset, strerror

from nbdzram.engine.ledger cimport Ledger, ledger_give, ledger_take
from nbdzram.engine.lock cimport lock_end, lock_init, lock_leave, lock_take
from nbdzram.engine.page cimport PAGE_SIZE, UNIT_SIZE, pages_for
from nbdzram.engine.publish cimport add64, amend32, amend64, look32, look64

import os
import resource
import stat
from pathlib import Path

from nbdzram.errors import ArenaError, ArenaInUse

cdef extern from "sys/mman.h" nogil:
    void* mmap(void*, size_t, int, int, int, long)
    int munmap(void*, size_t)
    int mprotect(void*, size_t, int)
    int madvise(void*, size_t, int)
    int PROT_NONE, PROT_READ, PROT_WRITE
    int MAP_PRIVATE, MAP_SHARED, MAP_ANONYMOUS, MAP_NORESERVE, MAP_FIXED
    int MADV_DONTNEED, MADV_REMOVE, MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_DONTDUMP
    int MADV_DONTNEED_LOCKED "24"  # since Linux 5.18, and in no header of Debian 12's
    void* MAP_FAILED

cdef extern from "unistd.h" nogil:
    int ftruncate(int, long)
    int close(int)
    long lseek(int, long, int)
    int SEEK_DATA

cdef extern from "fcntl.h" nogil:
    int fallocate(int, int, long, long)
    int FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE

cdef extern from "sys/file.h" nogil:
    int flock(int, int)
    int LOCK_EX, LOCK_NB, LOCK_SH, LOCK_UN

ADDRESSES = 1 << 47  # of a process: four levels of page tables, on x86-64 as on arm64 with 48 bits

cdef enum:
    HUGE_PAGE = 2 << 20
    GROWTH = 16 << 20  # bytes mapped at a time: few system calls, and little address space made early

MFD_NOEXEC_SEAL = 8  # since Linux 6.3, which may insist on it (vm.memfd_noexec); memfd_create(2)
BEGUN = b"NBDZRAM?"
"""What stands where an arena's magic does, until the first pages behind it are written too."""
INSTEAD_OF_FILE = "remove it, or name another state directory"
INSTEAD_OF_KEPT = "whoever kept it has to let it go: systemctl stop the unit, and start it again"
OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")
OVERCOMMIT_NEVER = "2"


cdef long long _allocations_left = -1  # tests count down to a failure; -1 never fails
cdef bint _releases_refused = False


def _never_overcommits():
    """Whether the kernel promises no memory that it does not have. Where it is not told (ProcSubset=pid): as it is by
    itself."""
    try:
        return OVERCOMMIT.read_text().strip() == OVERCOMMIT_NEVER
    except OSError:
        return False


def refuse_releases(bint refuse, /) -> None:
    """Let the system refuse every page given back, as it does for locked memory. For tests."""
    global _releases_refused
    _releases_refused = refuse


def fail_allocation(long long after, /) -> None:
    """Let the allocation after the next `after` ones fail, once; -1: none. For tests of what a failure leaves
    behind."""
    global _allocations_left
    _allocations_left = after


def allocations_left() -> int:
    """What is left of fail_allocation's countdown; -1: it has run out, or none was set."""
    return _allocations_left


cdef inline bint _must_fail() noexcept nogil:
    global _allocations_left
    if _allocations_left < 0:
        return False
    _allocations_left -= 1
    return _allocations_left == -1


cdef bint region_reserve(Region* region, uint64_t size, Ledger* ledger) noexcept nogil:
    """Reserve addresses for `size` bytes; nothing is resident yet. False when the kernel refuses."""
    cdef void* base = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    region.committed = 0
    region.pages = 0
    region.ledger = ledger
    if base == MAP_FAILED:
        region.base = NULL
        region.reserved = 0
        return False
    madvise(base, size, MADV_DONTDUMP)
    # Where the system gives huge pages unasked, one touch would make 2 MiB resident that nobody counts, and clear them:
    # half a millisecond, under whatever lock the touch is.
    madvise(base, size, MADV_NOHUGEPAGE)
    region.base = <uint8_t*>base
    region.reserved = size
    return True


cdef bint region_ensure(Region* region, uint64_t size) noexcept nogil:
    """Make the first `size` bytes usable; new bytes are zero. False when the reservation, the limit or memory ends."""
    cdef uint64_t pages = pages_for(size)
    if pages <= region.pages:
        return True
    if _must_fail() or (size > region.committed and not _region_commit(region, size)):
        return False
    if region.ledger != NULL and not ledger_take(region.ledger, pages - region.pages):
        return False
    region.pages = pages
    return True


cdef bint _region_commit(Region* region, uint64_t size) noexcept nogil:
    """Let the first `size` bytes be touched, and some more, to save calls."""
    cdef uint64_t wanted
    wanted = (size + (1 << 20) - 1) & ~(<uint64_t>(1 << 20) - 1)
    if wanted > region.reserved:
        wanted = region.reserved
    if size > wanted:
        return False
    if mprotect(region.base + region.committed, wanted - region.committed, PROT_READ | PROT_WRITE) != 0:
        return False
    amend64(&region.committed, wanted)  # can_lie (slab.pxd) looks beside others
    return True


cdef void region_expect(Region* region, uint64_t size) noexcept nogil:
    """All of the first `size` bytes, which are usable, will soon be touched: have huge pages for them, if the system
    has some. Nothing is resident for it that would not be."""
    madvise(region.base, size // HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE)


cdef void region_shrink(Region* region, uint64_t size) noexcept nogil:
    """Keep the first `size` bytes; what lies behind their last page reads as zeroes, is not resident and not
    counted."""
    cdef uint64_t pages = pages_for(size)
    if pages >= region.pages:
        return
    region_return(region, pages * PAGE_SIZE, (region.pages - pages) * PAGE_SIZE)
    if region.ledger != NULL:
        ledger_give(region.ledger, region.pages - pages)
    region.pages = pages


cdef void region_return(Region* region, uint64_t start, uint64_t length) noexcept nogil:
    """Give the whole pages inside [start, start + length) back; they read as zeroes afterwards."""
    cdef uint64_t first = (start + PAGE_SIZE - 1) & ~(<uint64_t>PAGE_SIZE - 1)
    cdef uint64_t last = (start + length) & ~(<uint64_t>PAGE_SIZE - 1)
    if last > region.committed:
        last = region.committed
    if first < last and not _give_back(region.base + first, last - first):
        memset(region.base + first, 0, last - first)


cdef bint _give_back(void* start, uint64_t length) noexcept nogil:
    """Private pages, locked or not. False where the system refuses."""
    if _releases_refused:
        return False
    return madvise(start, length, MADV_DONTNEED) == 0 or (
        errno == EINVAL and madvise(start, length, MADV_DONTNEED_LOCKED) == 0)


cdef void region_free(Region* region) noexcept nogil:
    if region.base != NULL:
        munmap(region.base, region.reserved)
        region.base = NULL
        region.reserved = 0
        region.committed = 0


def _address_limit() -> str:
    """What a process may reserve, for a sentence."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return f"{ADDRESSES >> 40} TiB"
    return f"{limit >> 20} MiB (ulimit -v)"


def unnamed_file(name: str) -> int | None:
    """The descriptor of a new file in memory; None: this system has none, no descriptor is free, or files may not grow
    (ulimit -f), which is no bound of memory."""
    if resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY:
        return None
    for flags in (os.MFD_CLOEXEC | MFD_NOEXEC_SEAL, os.MFD_CLOEXEC):
        try:
            return os.memfd_create(name, flags)
        except OSError:
            continue
    return None


def holds_nothing(descriptor: int) -> bool:
    """See arena.pyi. The magic, its first word, is written last of all that is there before something is stored; BEGUN
    stands there once more than that page is written.
    """
    size = os.fstat(descriptor).st_size
    try:
        os.lseek(descriptor, 0, os.SEEK_DATA)
    except OSError as error:
        if error.errno != ENXIO:  # it has no data; else nobody knows
            raise
        return True
    first = os.pread(descriptor, 8, 0)
    if size > GROWTH or any(first):
        return size <= GROWTH and first == BEGUN
    return not any(any(os.pread(descriptor, UNIT_SIZE, at)) for at in range(PAGE_SIZE, size, UNIT_SIZE))


@cython.final
cdef class Arena:
    """A mapping of up to `reserve` bytes: of the file at `path`, or of the unnamed one behind the descriptor `memory`,
    which stays the caller's; else of anonymous memory. `opened` tells whether the file had content.

    read_only: whatever whole units a file has are mapped for reading, and it stays as it is (salvage.pyx).

    Raises ArenaError.
    """

    def __cinit__(self, path: str | None, uint64_t reserve, *, memory: int | None = None, bint read_only=False):
        self.base = NULL
        self.fd = -1
        lock_init(&self.growing, 0)
        self.path = path
        self.place = "in memory" if path is None else path
        self.opened = False
        if read_only:
            self._open_to_read(path)
        elif path is not None:
            self._open_file(path)
            self.allocates = True
            self._prove_allocation(path)
        elif memory is not None:
            self._open_file(f"/proc/self/fd/{memory}")  # opened anew, so that the lock is our own
            self.allocates = _never_overcommits()
        reserve = (reserve + GROWTH - 1) & ~(<uint64_t>GROWTH - 1)
        if reserve < 2 * self.mapped:
            reserve = 2 * self.mapped
        cdef void* base = mmap(NULL, reserve, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        if base == MAP_FAILED or not region_reserve(
                &self.free_units, (reserve // UNIT_SIZE) * sizeof(uint32_t), &self.ledger):
            self.discard()
            raise ArenaError(
                f"cannot reserve {(reserve + (1 << 30) - 1) >> 30} GiB of addresses for a pool: "
                f"{strerror(errno).decode()}; a process has {_address_limit()} of them, and pools with a smaller "
                "mem_limit reserve less"
            )
        self.base = <uint8_t*>base
        self.reserved = reserve
        madvise(base, reserve, MADV_DONTDUMP)
        if self.mapped:
            if mmap(self.base, self.mapped, PROT_READ, MAP_SHARED | MAP_FIXED, self.fd, 0) == MAP_FAILED:
                raise ArenaError(f"cannot map the arena {self.place}: {strerror(errno).decode()}")
            madvise(self.base, self.mapped, MADV_DONTDUMP)  # another mapping by now
        self.unit_high = <uint32_t>(self.mapped // UNIT_SIZE)
        if not region_ensure(&self.free_units, <uint64_t>self.unit_high * sizeof(uint32_t)):
            raise ArenaError(
                f"no memory to open the arena {self.place}: {strerror(errno).decode()}; end other programs")

    @property
    def found(self) -> str:
        """What there is, arena or not."""
        return "what was kept in memory" if self.path is None else self.path

    @property
    def instead(self) -> str:
        """What is to be done about one that cannot be used."""
        return INSTEAD_OF_KEPT if self.path is None else INSTEAD_OF_FILE

    def _open_to_read(self, path: str):
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ArenaError(f"cannot read {path}: {error.strerror}") from None
        if flock(self.fd, LOCK_SH | LOCK_NB) != 0:
            raise ArenaError(f"the arena {path} is in use by another process; stop that server first")
        self.opened = True
        self.mapped = os.fstat(self.fd).st_size // UNIT_SIZE * UNIT_SIZE

    def _open_file(self, path: str):
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            remedy = f"give it to this user, or {self.instead}"
            if error.errno in (EMFILE, ENFILE):
                remedy = "raise LimitNOFILE= of the unit, or `ulimit -n`"
            raise ArenaError(f"cannot open the arena {self.place}: {error.strerror}; {remedy}") from None
        if not stat.S_ISREG(os.fstat(self.fd).st_mode):
            raise ArenaError(f"{self.found} is not an nbdzram arena, and not even a file; {self.instead}")
        if flock(self.fd, LOCK_EX | LOCK_NB) != 0:
            raise ArenaInUse(f"the arena {self.place} is in use by another process; stop that server first")
        size = os.fstat(self.fd).st_size
        if size % UNIT_SIZE:
            raise ArenaError(
                f"{self.found} is not an nbdzram arena: its size, {size} bytes, is no multiple of {UNIT_SIZE}; "
                f"{self.instead}"
            )
        try:
            self.opened = not self._is_blank(size)
        except OSError as error:
            raise ArenaError(f"cannot read the arena {self.place}: {error.strerror}; {self.instead}") from None
        self.mapped = size if self.opened else 0

    def _is_blank(self, size: int) -> bool:
        """Whether nothing was stored yet; then all of it reads as zeroes."""
        if not holds_nothing(self.fd):
            return False
        if size and os.pread(self.fd, 8, 0) == BEGUN:
            os.ftruncate(self.fd, 0)
        return True

    def _prove_allocation(self, path: str):
        """Allocate the first page, which every arena has: whether this file system can, and has room."""
        if self._allocate(0, PAGE_SIZE, FALLOC_FL_KEEP_SIZE) == 0:
            return
        reason = errno
        self.discard()
        if reason == ENOSPC:
            raise ArenaError(f"no room for an arena at {path}: {self.lacks()}")
        if reason == EOPNOTSUPP:
            raise ArenaError(
                f"the file system of {path} cannot allocate pages of a file ahead (fallocate), so that a full one "
                "would end this server; name a state directory on tmpfs, ext4, XFS or Btrfs"
            )
        raise ArenaError(f"cannot allocate a page of {path}: {strerror(reason).decode()}; name another state directory")

    def lacks(self) -> str:
        """What a file that cannot become larger lacks, and what to do."""
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        if limit != resource.RLIM_INFINITY and self.mapped + GROWTH > limit:
            return f"this process may write no file of more than {limit} bytes; raise ulimit -f, LimitFSIZE= of a unit"
        reason = look32(&self.refusal)
        if reason not in (0, ENOSPC):
            remedy = "raise that of its owner" if reason == EDQUOT else "the kernel's log says more (dmesg)"
            return f"the file system gives no pages: {strerror(reason).decode()}; {remedy}"
        return "the file system is full; free some of it, or make it larger (a tmpfs: mount -o remount,size=SIZE)"

    def discard(self):
        """Remove a file in which nothing was stored: whoever failed to begin an arena leaves none."""
        if self.path is not None and self.fd >= 0 and not self.opened:
            try:
                os.unlink(self.path)
            except OSError:
                pass  # it is empty, and the next start takes it as it is

    cdef bint admit_writes(self) noexcept nogil:
        """An arena opened again is found sound: from now on it may change, and grow. False when the system refuses."""
        if self.fd < 0 or not self.opened:
            return True
        if mprotect(self.base, self.mapped, PROT_READ | PROT_WRITE) != 0:
            return False
        madvise(self.base, self.mapped, MADV_NOHUGEPAGE)
        return self.mapped % GROWTH == 0 or self._map(self.mapped)

    def __dealloc__(self):
        region_free(&self.free_units)
        lock_end(&self.growing)
        if self.base != NULL:
            munmap(self.base, self.reserved)
        if self.fd >= 0:
            close(self.fd)

    def close(self):
        """Let the file go; what is mapped stays readable."""
        if self.fd >= 0:
            flock(self.fd, LOCK_UN)  # the mapping holds the file open, and the lock with it
            close(self.fd)
            self.fd = -1

    cdef void cut(self, uint64_t size) noexcept nogil:
        """Give the file the length again that it had: whoever could not grow it leaves it as it was. Ends its use."""
        if self.fd >= 0:
            ftruncate(self.fd, size)

    cdef void make_ready(self) noexcept nogil:
        """Map ahead what is going to be taken, while the caller holds no lock: it is a system call or three, and waits
        for whoever has a page fault. Where it fails, who takes units tries again, and says so."""
        if look64(&self.mapped) < <uint64_t>look32(&self.unit_high) * UNIT_SIZE + GROWTH // 2:
            self._map_up_to(<uint64_t>look32(&self.unit_high) * UNIT_SIZE + GROWTH // 2)

    cdef bint _map_up_to(self, uint64_t size) noexcept nogil:
        cdef bint done
        lock_take(&self.growing)
        done = size <= self.mapped or self._map(size)
        lock_leave(&self.growing)
        return done

    cdef bint _map(self, uint64_t size) noexcept nogil:
        cdef uint64_t wanted = (size + GROWTH - 1) & ~(<uint64_t>GROWTH - 1)
        if wanted > self.reserved:
            return False
        if self.fd >= 0:
            # The file's length is always what is mapped: a page past the end would be SIGBUS.
            if ftruncate(self.fd, wanted) != 0:
                amend32(&self.refusal, errno)
                return False
            if mmap(self.base + self.mapped, wanted - self.mapped, PROT_READ | PROT_WRITE,
                    MAP_SHARED | MAP_FIXED, self.fd, self.mapped) == MAP_FAILED:
                return False
            madvise(self.base + self.mapped, wanted - self.mapped, MADV_DONTDUMP)  # as what it is mapped over
        elif mprotect(self.base + self.mapped, wanted - self.mapped, PROT_READ | PROT_WRITE) != 0:
            return False
        # A huge page would make pages resident that nobody has touched.
        madvise(self.base + self.mapped, wanted - self.mapped, MADV_NOHUGEPAGE)
        amend64(&self.mapped, wanted)
        return True

    cdef uint32_t take_run(self, uint32_t count) noexcept nogil:
        """`count` adjacent units, never handed out before. 0 when there are none: unit 0 is the superblock's."""
        cdef uint32_t first = self.unit_high
        cdef uint64_t end = (<uint64_t>first + count) * UNIT_SIZE
        if _must_fail():
            return 0
        if first + <uint64_t>count > (1 << 28) or (end > look64(&self.mapped) and not self._map_up_to(end)):
            return 0
        # Room for giving them back, which must never fail.
        if not region_ensure(&self.free_units, (first + <uint64_t>count) * sizeof(uint32_t)):
            return 0
        amend32(&self.unit_high, first + count)
        return first

    cdef uint32_t take(self) noexcept nogil:
        """One unit, its pages zero and not resident. 0 when there is none."""
        if self.free_count:
            self.free_count -= 1
            return (<uint32_t*>self.free_units.base)[self.free_count]
        return self.take_run(1)

    cdef void give(self, uint32_t unit) noexcept nogil:
        """Take back a unit whose pages have been released."""
        (<uint32_t*>self.free_units.base)[self.free_count] = unit
        self.free_count += 1

    cdef bint commit(self, uint64_t offset, uint64_t length) noexcept nogil:
        """Make sure that the pages of a range can be touched. False when the file system gives none."""
        if _must_fail():
            return False
        if not self.allocates or self._allocate(offset, length, 0) == 0:
            return True
        amend32(&self.refusal, errno)
        add64(&self.declined, 1)
        return False

    cdef int _allocate(self, uint64_t offset, uint64_t length, int mode) noexcept nogil:
        """fallocate, which tmpfs breaks off when a signal comes. 0, or -1 with errno."""
        while fallocate(self.fd, mode, offset, length) != 0:
            if errno != EINTR:
                return -1
        return 0

    cdef bint holds(self, uint64_t offset) noexcept nogil:
        """Whether the page at `offset` may be read although nobody committed it since the arena was opened again."""
        return self.held_from(offset) == offset // PAGE_SIZE * PAGE_SIZE

    cdef uint64_t held_from(self, uint64_t offset) noexcept nogil:
        """Where the first such page lies, from that of `offset` on. Where there is none, behind all that is mapped."""
        cdef long found
        offset = offset // PAGE_SIZE * PAGE_SIZE
        if self.fd < 0:
            return offset
        found = lseek(self.fd, offset, SEEK_DATA)
        if found < 0:
            return self.mapped + PAGE_SIZE if errno == ENXIO else offset
        return found

    cdef void release(self, uint64_t offset, uint64_t length) noexcept nogil:
        """Return whole pages to the system; they read as zeroes, whether it takes them or not."""
        cdef uint64_t page
        if length == 0:
            return
        if self.fd < 0:
            if _give_back(self.base + offset, length):
                return
        elif not _releases_refused and (
                madvise(self.base + offset, length, MADV_REMOVE) == 0
                or errno == EINVAL  # locked, which nobody minds who asks by the file
                and self._allocate(offset, length, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE) == 0):
            return
        for page in range(offset // PAGE_SIZE, (offset + length) // PAGE_SIZE):
            if self.holds(page * PAGE_SIZE):  # to clear a hole would take a page
                memset(self.base + page * PAGE_SIZE, 0, PAGE_SIZE)
