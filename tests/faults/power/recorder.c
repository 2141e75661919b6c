/* Records what a process does to the files of one directory, in the order in which it was done: loaded before libc.
 *
 * NBDZRAM_RECORD_DIRECTORY   the directory, absolute; files in it and itself are recorded
 * NBDZRAM_RECORD_LOG         the file that this writes
 * NBDZRAM_RECORD_FAILS       "SEED N": from the first mark on one act in N fails, EIO or ENOSPC; of those none is done
 *
 * A record: kind 4 | error 4 | file (its inode) 8 | offset 8 | length 8 | length of name 4 | of other 4 | name | other |
 * content. One mutex is held around each act and its record: the log's order is the order of the acts.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define MARKS ".marks"
enum { OPENED = 1, WRITTEN, SYNCED, RENAMED, UNLINKED, ALLOCATED, TRUNCATED, LINKED };

static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;
static int log_fd = -1;
static const char *directory;
static size_t directory_length;
static unsigned seed, one_in;  /* 0: nothing fails */
static int marked;

static void begin(void) {
    const char *path = getenv("NBDZRAM_RECORD_LOG");
    int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, "open");
    directory = getenv("NBDZRAM_RECORD_DIRECTORY");
    if (!path || !directory) return;
    directory_length = strlen(directory);
    log_fd = real(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (getenv("NBDZRAM_RECORD_FAILS")) sscanf(getenv("NBDZRAM_RECORD_FAILS"), "%u %u", &seed, &one_in);
}
static pthread_once_t once = PTHREAD_ONCE_INIT;

/* The name inside the directory ("" is itself); NULL: it lies elsewhere. */
static const char *inside(const char *path) {
    pthread_once(&once, begin);
    if (log_fd < 0 || !path || strncmp(path, directory, directory_length)) return NULL;
    if (path[directory_length] == 0) return path + directory_length;
    return path[directory_length] == '/' ? path + directory_length + 1 : NULL;
}

static const char *inside_fd(int fd, char *room, size_t size) {
    char link[64];
    ssize_t length;
    pthread_once(&once, begin);
    if (log_fd < 0 || fd < 0) return NULL;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    length = readlink(link, room, size - 1);
    if (length < 0) return NULL;
    room[length] = 0;
    return inside(room);
}

static uint64_t inode_of(int fd) {
    struct stat found;
    return fstat(fd, &found) == 0 ? found.st_ino : 0;
}

/* In turn: with which error an act is to fail; 0: it is done. */
static int refusal(const char *name) {
    if (!one_in || !marked || !strcmp(name, MARKS) || rand_r(&seed) % one_in) return 0;
    return rand_r(&seed) % 3 ? EIO : ENOSPC;
}

static void record(uint32_t kind, int error, uint64_t file, uint64_t offset, uint64_t length, const char *name,
                   const char *other, const void *content) {
    struct { uint32_t kind, error; uint64_t file, offset, length; uint32_t name, other; } head =
        {kind, (uint32_t)error, file, offset, length, (uint32_t)strlen(name), (uint32_t)strlen(other)};
    struct iovec parts[4] = {{&head, sizeof head}, {(void *)name, head.name}, {(void *)other, head.other},
                             {(void *)content, content ? length : 0}};
    ssize_t (*real)(int, const struct iovec *, int) = dlsym(RTLD_NEXT, "writev");
    ssize_t total = sizeof head + head.name + head.other + (content ? (ssize_t)length : 0);
    if (real(log_fd, parts, 4) != total) abort();
}

#define REAL(result, name, ...) static result (*real)(__VA_ARGS__); if (!real) real = dlsym(RTLD_NEXT, #name)
#define TURN(act) do { pthread_mutex_lock(&turn); act; pthread_mutex_unlock(&turn); } while (0)

static int opened(const char *path, int flags, mode_t mode) {
    REAL(int, open, const char *, int, ...);
    const char *name = inside(path);
    int fd = -1, fresh, saved;
    if (!name || !name[0] || (flags & O_ACCMODE) == O_RDONLY) return real(path, flags, mode);
    TURN({
        fresh = access(path, F_OK) != 0;
        saved = refusal(name);
        if (!saved) { fd = real(path, flags, mode); saved = errno; }
        if (fd >= 0) record(OPENED, 0, inode_of(fd), fresh, flags & O_TRUNC, name, "", NULL);
        errno = saved;
    });
    return fd;
}
static mode_t mode_in(int flags, va_list rest) { return flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; }
int open(const char *path, int flags, ...) {
    va_list rest; va_start(rest, flags); mode_t mode = mode_in(flags, rest); va_end(rest);
    return opened(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    va_list rest; va_start(rest, flags); mode_t mode = mode_in(flags, rest); va_end(rest);
    return opened(path, flags, mode);
}

static ssize_t written(int fd, const void *content, size_t length, off_t offset, int here) {
    static ssize_t (*real_write)(int, const void *, size_t);
    static ssize_t (*real_pwrite)(int, const void *, size_t, off_t);
    char room[4200];
    const char *name = inside_fd(fd, room, sizeof room);
    ssize_t done = -1;
    int saved;
    if (!real_write) { real_write = dlsym(RTLD_NEXT, "write"); real_pwrite = dlsym(RTLD_NEXT, "pwrite"); }
    if (!name) return here ? real_write(fd, content, length) : real_pwrite(fd, content, length, offset);
    TURN({
        marked |= !strcmp(name, MARKS);
        if (here) offset = lseek(fd, 0, SEEK_CUR);
        saved = refusal(name);
        if (!saved) {
            done = here ? real_write(fd, content, length) : real_pwrite(fd, content, length, offset);
            saved = errno;
        }
        if (done > 0) record(WRITTEN, 0, inode_of(fd), offset, done, name, "", content);
        errno = saved;
    });
    return done;
}
ssize_t write(int fd, const void *content, size_t length) { return written(fd, content, length, 0, 1); }
ssize_t pwrite(int fd, const void *content, size_t length, off_t offset) { return written(fd, content, length, offset, 0); }
ssize_t pwrite64(int fd, const void *content, size_t length, off_t offset) { return written(fd, content, length, offset, 0); }

static int synced(int fd, int alone) {
    static int (*real_fsync)(int), (*real_fdatasync)(int);
    char room[4200];
    const char *name = inside_fd(fd, room, sizeof room);
    int result = -1, saved;
    if (!real_fsync) { real_fsync = dlsym(RTLD_NEXT, "fsync"); real_fdatasync = dlsym(RTLD_NEXT, "fdatasync"); }
    if (!name) return alone ? real_fdatasync(fd) : real_fsync(fd);
    TURN({
        saved = refusal(name);
        if (!saved) { result = alone ? real_fdatasync(fd) : real_fsync(fd); saved = errno; }
        record(SYNCED, result ? saved : 0, inode_of(fd), 0, 0, name, "", NULL);
        errno = saved;
    });
    return result;
}
int fsync(int fd) { return synced(fd, 0); }
int fdatasync(int fd) { return synced(fd, 1); }

int rename(const char *from, const char *to) {
    REAL(int, rename, const char *, const char *);
    const char *name = inside(from), *other = inside(to);
    int result = -1, saved;
    if (!name || !other) return real(from, to);
    TURN({ saved = refusal(name); if (!saved) { result = real(from, to); saved = errno; } if (!result) record(RENAMED, 0, 0, 0, 0, name, other, NULL); errno = saved; });
    return result;
}
int link(const char *from, const char *to) {
    REAL(int, link, const char *, const char *);
    const char *name = inside(from), *other = inside(to);
    int result = -1, saved;
    if (!name || !other) return real(from, to);
    TURN({ saved = refusal(name); if (!saved) { result = real(from, to); saved = errno; } if (!result) record(LINKED, 0, 0, 0, 0, name, other, NULL); errno = saved; });
    return result;
}
int linkat(int at, const char *from, int there, const char *to, int flags) {
    REAL(int, linkat, int, const char *, int, const char *, int);
    if (inside(from) && inside(to)) return link(from, to);
    return real(at, from, there, to, flags);
}
int unlink(const char *path) {
    REAL(int, unlink, const char *);
    const char *name = inside(path);
    int result = -1, saved;
    if (!name) return real(path);
    TURN({ saved = refusal(name); if (!saved) { result = real(path); saved = errno; } if (!result) record(UNLINKED, 0, 0, 0, 0, name, "", NULL); errno = saved; });
    return result;
}
int posix_fallocate64(int fd, off64_t offset, off64_t length) {
    REAL(int, posix_fallocate64, int, off64_t, off64_t);
    char room[4200];
    const char *name = inside_fd(fd, room, sizeof room);
    int result = -1;
    if (!name) return real(fd, offset, length);
    TURN({ result = refusal(name); if (!result) result = real(fd, offset, length); if (!result) record(ALLOCATED, 0, inode_of(fd), offset, length, name, "", NULL); });
    return result;
}
int posix_fallocate(int fd, off_t offset, off_t length) { return posix_fallocate64(fd, offset, length); }
int ftruncate64(int fd, off64_t length) {
    REAL(int, ftruncate64, int, off64_t);
    char room[4200];
    const char *name = inside_fd(fd, room, sizeof room);
    int result = -1, saved;
    if (!name) return real(fd, length);
    TURN({ result = real(fd, length); saved = errno; if (!result) record(TRUNCATED, 0, inode_of(fd), length, 0, name, "", NULL); errno = saved; });
    return result;
}
int ftruncate(int fd, off_t length) { return ftruncate64(fd, length); }
