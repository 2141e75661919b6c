/* The floor: what an NBD server costs that does nothing but copy plain memory.

   One epoll a thread; a wake-up receives what is there, in one call, answers every complete request in it, and sends
   all answers with one writev, whose vectors point into the memory itself. No checks beyond what keeps it alive, no
   errors, no TLS, simple replies only. It is the yardstick of `make bench-scaling`, and serves nothing else.

       floor SOCKET SIZE_BYTES THREADS

   Wire formats: doc/proto.md of the NBD project. */

#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

enum {
    RECEIVE_SIZE = 256 << 10, /* one receive: 60 WRITEs of 4 KiB */
    VECTORS = 1024,           /* IOV_MAX */
    REQUEST_SIZE = 28,
    REPLY_SIZE = 16,
    READ = 0, WRITE = 1, DISC = 2,
    OPT_EXPORT_NAME = 1, OPT_ABORT = 2, OPT_INFO = 6, OPT_GO = 7,
    REP_ACK = 1, REP_INFO = 3,
};
#define REP_UNSUPPORTED 0x80000001u
#define TRANSMISSION_FLAGS 0x0101 /* HAS_FLAGS, CAN_MULTI_CONN */

static uint8_t *memory;
static uint64_t memory_size;

typedef struct {
    int fd;
    uint8_t *received; /* RECEIVE_SIZE; [0, filled) came and is not yet understood */
    size_t filled;
    uint64_t target;   /* of a WRITE whose payload is still coming: where the rest belongs, and how much it is */
    uint64_t missing;
    uint64_t cookie;
} Client;

static void die(const char *what) { perror(what); exit(1); }

static int receive_all(int fd, void *target, size_t size) {
    return recv(fd, target, size, MSG_WAITALL) == (ssize_t)size;
}

static int send_all(int fd, const void *source, size_t size) {
    return send(fd, source, size, MSG_NOSIGNAL) == (ssize_t)size;
}

static int send_option_reply(int fd, uint32_t option, uint32_t kind, const void *body, uint32_t size) {
    struct __attribute__((packed)) { uint64_t magic; uint32_t option, kind, size; } head = {
        htobe64(0x3e889045565a9ull), htobe32(option), htobe32(kind), htobe32(size)};
    return send_all(fd, &head, sizeof head) && (size == 0 || send_all(fd, body, size));
}

/* Fixed newstyle haggling, blocking. 0: the client left. */
static int haggle(int fd) {
    struct __attribute__((packed)) { uint64_t magic, option; uint16_t flags; } greeting = {
        htobe64(0x4e42444d41474943ull), htobe64(0x49484156454f5054ull), htobe16(3)};
    struct __attribute__((packed)) { uint16_t kind; uint64_t size; uint16_t flags; } export = {
        0, htobe64(memory_size), htobe16(TRANSMISSION_FLAGS)};
    struct __attribute__((packed)) { uint64_t magic; uint32_t option, size; } option;
    uint32_t flags;
    static __thread uint8_t body[8192];
    if (!send_all(fd, &greeting, sizeof greeting) || !receive_all(fd, &flags, 4)) return 0;
    for (;;) {
        if (!receive_all(fd, &option, sizeof option)) return 0;
        uint32_t size = be32toh(option.size), number = be32toh(option.option);
        if (size > sizeof body || (size && !receive_all(fd, body, size))) return 0;
        if (number == OPT_EXPORT_NAME)
            return send_all(fd, (uint8_t *)&export + 2, 10) &&
                   (be32toh(flags) & 2 || send_all(fd, memset(body, 0, 124), 124));
        if (number == OPT_GO || number == OPT_INFO) {
            if (!send_option_reply(fd, number, REP_INFO, &export, 12) || !send_option_reply(fd, number, REP_ACK, 0, 0))
                return 0;
            if (number == OPT_GO) return 1;
        } else if (number == OPT_ABORT) {
            send_option_reply(fd, number, REP_ACK, 0, 0);
            return 0;
        } else if (!send_option_reply(fd, number, REP_UNSUPPORTED, 0, 0))
            return 0;
    }
}

/* Send all of it, waiting where the socket is full: what a real server would queue. */
static int send_vectors(int fd, struct iovec *vectors, int count) {
    struct msghdr message = {.msg_iov = vectors, .msg_iovlen = count};
    while (message.msg_iovlen) {
        ssize_t sent = sendmsg(fd, &message, MSG_NOSIGNAL);
        if (sent < 0) return 0;
        while (message.msg_iovlen && (size_t)sent >= message.msg_iov->iov_len) {
            sent -= message.msg_iov->iov_len;
            message.msg_iov++;
            message.msg_iovlen--;
        }
        if (message.msg_iovlen) {
            message.msg_iov->iov_base = (uint8_t *)message.msg_iov->iov_base + sent;
            message.msg_iov->iov_len -= sent;
        }
    }
    return 1;
}

static void put_reply(uint8_t *target, uint64_t cookie) {
    uint32_t words[2] = {htobe32(0x67446698), 0};
    memcpy(target, words, 8);
    memcpy(target + 8, &cookie, 8);
}

/* One wake-up. 0: the client is gone. */
static int serve(Client *client) {
    static __thread uint8_t replies[VECTORS / 2][REPLY_SIZE];
    static __thread struct iovec vectors[VECTORS];
    int vector_count = 0, reply_count = 0;
    ssize_t size;
    if (client->missing) { /* straight to where it belongs */
        size = recv(client->fd, memory + client->target, client->missing, MSG_DONTWAIT);
        if (size <= 0) return size < 0 && errno == EAGAIN;
        client->target += size;
        client->missing -= size;
        if (client->missing) return 1;
        put_reply(replies[0], client->cookie);
        return send_all(client->fd, replies[0], REPLY_SIZE);
    }
    size = recv(client->fd, client->received + client->filled, RECEIVE_SIZE - client->filled, MSG_DONTWAIT);
    if (size <= 0) return size < 0 && errno == EAGAIN;
    client->filled += size;
    uint8_t *next = client->received, *end = next + client->filled;
    while (end - next >= REQUEST_SIZE) {
        uint16_t command;
        uint64_t cookie, offset;
        uint32_t length;
        memcpy(&command, next + 6, 2);
        memcpy(&cookie, next + 8, 8);
        memcpy(&offset, next + 16, 8);
        memcpy(&length, next + 24, 4);
        command = be16toh(command);
        offset = be64toh(offset);
        length = be32toh(length);
        if (command == DISC || offset > memory_size || length > memory_size - offset) return 0;
        if (command == WRITE && (size_t)(end - next) < REQUEST_SIZE + (size_t)length) {
            if (length < RECEIVE_SIZE / 4) break;
            client->missing = REQUEST_SIZE + (size_t)length - (end - next);
            client->target = offset + length - client->missing;
            client->cookie = cookie;
            memcpy(memory + offset, next + REQUEST_SIZE, length - client->missing);
            next = end;
            break;
        }
        if (reply_count == VECTORS / 2) {
            if (!send_vectors(client->fd, vectors, vector_count)) return 0;
            vector_count = reply_count = 0;
        }
        put_reply(replies[reply_count], cookie);
        vectors[vector_count++] = (struct iovec){replies[reply_count++], REPLY_SIZE};
        next += REQUEST_SIZE;
        if (command == READ)
            vectors[vector_count++] = (struct iovec){memory + offset, length};
        else if (command == WRITE) {
            memcpy(memory + offset, next, length);
            next += length;
        }
    }
    client->filled = end - next;
    memmove(client->received, next, client->filled);
    return vector_count == 0 || send_vectors(client->fd, vectors, vector_count);
}

static void *run_thread(void *poller) {
    struct epoll_event events[64];
    for (;;) {
        int count = epoll_wait((int)(intptr_t)poller, events, 64, -1);
        for (int number = 0; number < count; number++) {
            Client *client = events[number].data.ptr;
            if (!serve(client)) {
                close(client->fd);
                free(client->received);
                free(client);
            }
        }
    }
    return NULL;
}

static void leave(int signal) { (void)signal; _exit(0); }

int main(int count, char **words) {
    if (count != 4) {
        fprintf(stderr, "usage: floor SOCKET SIZE_BYTES THREADS\n");
        return 2;
    }
    int threads = atoi(words[3]), listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int *pollers = calloc(threads, sizeof *pollers);
    signal(SIGTERM, leave);
    memory_size = strtoull(words[2], NULL, 10);
    memory = mmap(NULL, memory_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || pollers == NULL) die("memory");
    strncpy(address.sun_path, words[1], sizeof address.sun_path - 1);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 64)) die(words[1]);
    for (int number = 0; number < threads; number++) {
        pthread_t thread;
        pollers[number] = epoll_create1(EPOLL_CLOEXEC);
        if (pthread_create(&thread, NULL, run_thread, (void *)(intptr_t)pollers[number])) die("thread");
    }
    for (unsigned accepted = 0;; accepted++) {
        Client *client = calloc(1, sizeof *client);
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = client};
        client->fd = accept(listener, NULL, NULL);
        if (client->fd < 0) die("accept");
        client->received = malloc(RECEIVE_SIZE);
        if (!haggle(client->fd)) {
            close(client->fd);
            free(client->received);
            free(client);
        } else if (epoll_ctl(pollers[accepted % threads], EPOLL_CTL_ADD, client->fd, &event)) die("epoll");
    }
}
