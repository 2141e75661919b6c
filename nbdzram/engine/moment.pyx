"""Disks that become visible together or not at all, and the one moment at which several are copied.

    prepare              an empty disk, FILLING        a kill from here on: the next opening deletes it
    snapshot_together    copies, of one moment
    snapshot_changed     the same, of those that are not what an earlier copy holds
    finish               it is WHOLE                   a kill from here on: opening keeps it, concealed
    reveal               it is an export

Between finish and reveal whoever offers disks (the server) remembers durably that these are to be offered. That is the
store that makes it true for all of them; a server that starts reveals what is remembered and deletes the rest.

One moment: the locks of all pools at stake are held together while the roots are shared, a microsecond for each disk.
Every write that was answered before is in the copies, and none that began afterwards. This is the only place in which
two locks of a kind are held, so their order (by address) is nobody else's business.
"""

from libc.stdint cimport uint64_t
from libc.stdlib cimport free, malloc

import contextlib
import os

from nbdzram.engine.directory cimport CONCEALED, STATE
from nbdzram.engine.disk cimport Disk
from nbdzram.engine.format cimport CONCEALED_FILLING, CONCEALED_WHOLE, ENTRY_LIVE
from nbdzram.engine.lock cimport Lock, lock_leave, lock_take
from nbdzram.engine.pool cimport Pool
from nbdzram.engine.table cimport page_of
from nbdzram.engine.users cimport users_enter, users_leave

from nbdzram.errors import EngineError, UserError


def concealed(Pool pool):
    return [disk for disk in pool.all_disks() if disk.concealed]


def prepare(Pool pool, name, size_bytes, *, read_only=False, private=False, alike=None):
    with _inside([pool]):
        disk = pool._written(name, size_bytes, read_only, private, alike)
        _conceal(disk)
        pool._disks.append(disk)
        return disk


def snapshot_together(list sources, list names, *, read_only=True):
    cdef list twins = []
    pools = list({id(source.pool): source.pool for source in sources}.values())
    if len(set(names)) < len(names):
        raise UserError("two copies of one moment have the same name")
    with _inside(pools):
        known = _names_in(pools)
        for source, name in zip(sources, names, strict=True):
            twins.append(_twin_of(source, name, read_only, known))
            with nogil:  # thousands of them take long, and the event loop is to have its turns
                pass
        _require_shared(sources, twins, pools, [])
        return twins


def snapshot_changed(list sources, list earlier, list names, *, read_only=True):
    """See moment.pyi. What differs is looked at twice: to make twins, which takes long, and at the moment itself."""
    cdef Py_ssize_t at
    pools = list({id(source.pool): source.pool for source in sources}.values())
    twins = [None] * len(sources)
    with _inside(pools):
        late, known = _differing(sources, earlier), _names_in(pools)
        while late:
            for at in late:
                twins[at] = _twin_of(sources[at], names[at], read_only, known)
                with nogil:  # as above
                    pass
            late = _require_shared(sources, twins, pools, earlier)
        return twins


cdef dict _names_in(list pools):
    """Of exports, by pool: looked at once, however many copies there are to be."""
    return {id(pool): pool._names() for pool in pools}


cdef _twin_of(source, name, read_only, dict known):
    """A disk that is none yet, for a copy."""
    return source.pool._written(name, source.size_bytes, read_only, False, source, known[id(source.pool)])


cdef _require_shared(list sources, list twins, list pools, list earlier):
    """Share with all twins, or say which further ones are needed: nothing is shared then. Raises EngineError."""
    late = _share_all(sources, twins, pools, earlier)
    for at in late:
        if twins[at] is not None:
            raise EngineError(f"cannot copy export {sources[at].name!r}: {sources[at].why_not()}")
    if not late:
        for twin in twins:
            if twin is not None:
                (<Pool>twin.pool)._disks.append(twin)
    return late


cdef _differing(list sources, list earlier):
    """Where a source does not hold what its earlier copy holds, or has none."""
    return [at for at in range(len(sources)) if earlier[at] is None or _differs(sources[at], earlier[at])]


cdef bint _differs(Disk source, Disk copy):
    cdef bint differs
    lock_take(&source.pool.lock)
    differs = not _is_same(source.root(), copy.root())
    lock_leave(&source.pool.lock)
    return differs


cdef inline bint _is_same(const uint64_t* one, const uint64_t* other) noexcept nogil:
    """Under the lock: both name the same node, or none: as long as the copy is there, no node of it is changed."""
    return one != NULL and other != NULL and page_of(one[0]) == page_of(other[0])


@contextlib.contextmanager
def _inside(pools):
    """In these pools, and alone in making disks there."""
    with contextlib.ExitStack() as stack:
        for pool in sorted(pools, key=id):
            _enter(pool)
            stack.callback(_leave, pool)
            stack.enter_context((<Pool>pool).making)
        yield


def are_alike(Disk disk not None, Disk copy not None):
    """See moment.pyi."""
    if disk.pool is not copy.pool or disk.size_bytes != copy.size_bytes or not users_enter(&disk.pool.users):
        return False
    alike = not _differs(disk, copy)
    users_leave(&disk.pool.users)
    return alike


def finish(Disk disk):
    """Nothing of it is missing any more."""
    _publish(disk, CONCEALED, CONCEALED_WHOLE, True)


def reveal(Disk disk):
    """It is an export from now on."""
    _publish(disk, STATE, ENTRY_LIVE, False)


def discard(list disks):
    """Delete disks that are not going to be offered, those of them that are still there."""
    for disk in disks:
        try:
            if not (<Disk>disk).gone:
                disk.pool.delete(disk)
        except EngineError:
            pass  # the pool closes: the next opening deletes what is concealed


def new_identity():
    return int.from_bytes(os.urandom(6), "little") or 1


cdef _enter(Pool pool):
    if not users_enter(&pool.users):
        raise EngineError("its pool was closed")


cdef _leave(Pool pool):
    users_leave(&pool.users)


cdef _conceal(Disk disk):
    lock_take(&disk.pool.lock)
    disk.pool.directory.publish(disk.number, CONCEALED, CONCEALED_FILLING)
    disk.concealed = True
    lock_leave(&disk.pool.lock)


cdef _publish(Disk disk, field, uint64_t value, bint concealed):
    lock_take(&disk.pool.lock)
    sound = disk.sound_root() != NULL
    if sound:
        disk.pool.directory.publish(disk.number, field, value)
        if not concealed:
            disk.reveal()
    lock_leave(&disk.pool.lock)
    if not sound:
        raise EngineError(f"export {disk.name!r}: {disk.why_not()}")


cdef _share_all(list sources, list twins, list pools, list earlier):
    """Give each twin, at one moment, what its source holds then; a source without a twin still holds what its earlier
    copy does. Where a source is gone, or one without a twin is not that, nothing is done, and all such are named."""
    cdef Py_ssize_t count = len(pools), index
    cdef Py_ssize_t at, all_of_them = len(twins), late_count = 0
    cdef Disk source, twin
    cdef bint is_late
    cdef list late = [None] * all_of_them
    cdef list numbers = list(range(all_of_them))
    cdef Lock** locks = _locks_of(pools)
    for index in range(count):
        lock_take(locks[index])
    for at in range(all_of_them):  # nothing in here makes a Python object
        source = <Disk>sources[at]
        if twins[at] is None:
            is_late = not _is_same(source.root(), (<Disk>earlier[at]).root())
        else:
            is_late = source.root() == NULL
        if is_late:
            late[late_count] = numbers[at]
            late_count += 1
    for at in range(all_of_them if late_count == 0 else 0):
        if twins[at] is not None:
            source = <Disk>sources[at]
            twin = <Disk>twins[at]
            source.share_concealed(twin)
    for index in range(count):
        lock_leave(locks[index])
    free(locks)
    return late[:late_count]


cdef Lock** _locks_of(list pools) except NULL:
    """Those of these pools, by address; the caller frees them. Raises MemoryError."""
    cdef list addresses = sorted([<size_t>&(<Pool>pool).lock for pool in pools])
    cdef Lock** locks = <Lock**>malloc((len(addresses) or 1) * sizeof(Lock*))
    cdef Py_ssize_t index
    if locks == NULL:
        raise MemoryError()
    for index in range(len(addresses)):
        locks[index] = <Lock*><size_t>addresses[index]
    return locks
