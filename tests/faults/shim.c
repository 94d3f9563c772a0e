/* Counts every change of the file system below a folder, and at the k-th one sends this process a signal, or lets the
 * call fail or wait. Loaded with LD_PRELOAD; tests/faults/shim.py compiles it and describes the plan that it shares. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

/* The same layout as PLAN in shim.py. */
struct plan {
    char folder[1024]; /* absolute, without links */
    char log[1024];    /* file that lists the changes; empty for none */
    int64_t first;     /* number of the change, from 1, at which faults begin; 0 means never */
    int64_t times;     /* how many faults */
    int64_t spacing;   /* number of changes from one fault to the next */
    int64_t signal;    /* signal that this process is sent, or 0 */
    int64_t error;     /* errno of the failing call, or 0 */
    int64_t wait;      /* milliseconds that the call takes longer */
    _Atomic int64_t count;
    _Atomic int64_t faults; /* how many faults there were */
};

enum { MAX_FD = 4096, WRITES_PER_FILE = 2 };

static struct plan *plan;
static unsigned char writes[MAX_FD]; /* writes through a descriptor since it was opened */

__attribute__((constructor)) static void load_plan(void) {
    const char *path = getenv("FAULT_PLAN");
    int fd = path ? (int)syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC, 0) : -1;
    if (fd < 0) return;
    void *mapped = mmap(NULL, sizeof *plan, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (mapped != MAP_FAILED) plan = mapped;
    syscall(SYS_close, fd);
}

static int below(const char *path) {
    size_t length = strlen(plan->folder);
    return length && !strncmp(path, plan->folder, length) && (path[length] == '/' || !path[length]);
}

static int descriptor_path(int fd, char *full) {
    char link[64];
    snprintf(link, sizeof link, fd == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, full, PATH_MAX - 1);
    if (length < 0) return 0;
    full[length] = 0;
    return 1;
}

static int is_watched_at(int folder, const char *path, char *full) {
    if (!plan || !plan->folder[0] || !path) return 0;
    if (path[0] == '/') return snprintf(full, PATH_MAX, "%s", path) < PATH_MAX && below(full);
    char base[PATH_MAX];
    if (!descriptor_path(folder, base)) return 0;
    return snprintf(full, PATH_MAX, "%s/%s", base, path) < PATH_MAX && below(full);
}

static int is_watched(int fd, char *full) {
    return plan && plan->folder[0] && descriptor_path(fd, full) && below(full);
}

static void note(int64_t number, const char *operation, const char *path) {
    if (!plan->log[0]) return;
    char line[PATH_MAX + 64];
    int length = snprintf(line, sizeof line, "%ld %s %s\n", (long)number, operation, path + strlen(plan->folder));
    int fd = (int)syscall(SYS_openat, AT_FDCWD, plan->log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
    if (fd < 0) return;
    syscall(SYS_write, fd, line, length);
    syscall(SYS_close, fd);
}

/* Count a change; return 0, or the errno with which the call has to fail. */
static int change(const char *operation, const char *path) {
    int64_t number = atomic_fetch_add(&plan->count, 1) + 1;
    note(number, operation, path);
    int64_t after = number - plan->first;
    if (!plan->first || after < 0 || after % plan->spacing || after / plan->spacing >= plan->times) return 0;
    if (!plan->signal && plan->error == ENOSPC && (!strcmp(operation, "unlink") || !strcmp(operation, "rmdir"))) return 0;
    atomic_fetch_add(&plan->faults, 1);
    if (plan->signal) {
        kill(getpid(), (int)plan->signal);
        return 0;
    }
    if (plan->wait) usleep((useconds_t)plan->wait * 1000);
    return (int)plan->error;
}

#define REAL(result, name, ...)                                        \
    static result (*real_##name)(__VA_ARGS__);                         \
    if (!real_##name) real_##name = dlsym(RTLD_NEXT, #name)

#define STOP_AT(watched, operation)                                    \
    do {                                                               \
        char full[PATH_MAX];                                           \
        int saved = errno, failed = 0;                                 \
        if (watched) failed = change(operation, full);                 \
        errno = saved;                                                 \
        if (failed) {                                                  \
            errno = failed;                                            \
            return -1;                                                 \
        }                                                              \
    } while (0)

/* Opening counts if it creates or empties a file. */
#define OPEN_AT(name, folder, parameters, large)                         \
    int name parameters {                                              \
        mode_t mode = 0;                                               \
        if (flags & (O_CREAT | __O_TMPFILE)) {                         \
            va_list rest;                                              \
            va_start(rest, flags);                                     \
            mode = va_arg(rest, mode_t);                               \
            va_end(rest);                                              \
        }                                                              \
        int fd;                                                        \
        if (flags & (O_CREAT | O_TRUNC)) STOP_AT(is_watched_at(folder, path, full), "open"); \
        fd = (int)syscall(SYS_openat, folder, path, flags | (large), mode); \
        if (fd >= 0 && fd < MAX_FD) writes[fd] = 0;                    \
        return fd;                                                     \
    }

OPEN_AT(open, AT_FDCWD, (const char *path, int flags, ...), 0)
OPEN_AT(open64, AT_FDCWD, (const char *path, int flags, ...), O_LARGEFILE)
OPEN_AT(openat, folder, (int folder, const char *path, int flags, ...), 0)
OPEN_AT(openat64, folder, (int folder, const char *path, int flags, ...), O_LARGEFILE)

int creat(const char *path, mode_t mode) { return open(path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return open(path, O_CREAT | O_WRONLY | O_TRUNC, mode); }

#define FOPEN(name)                                                    \
    FILE *name(const char *path, const char *mode) {                   \
        REAL(FILE *, name, const char *, const char *);                \
        char full[PATH_MAX];                                           \
        int failed = mode[0] != 'r' && is_watched_at(AT_FDCWD, path, full) ? change("open", full) : 0; \
        if (failed) {                                                  \
            errno = failed;                                            \
            return NULL;                                               \
        }                                                              \
        return real_##name(path, mode);                                \
    }
FOPEN(fopen)
FOPEN(fopen64)

/* Only the first writes after an opening count: a file that is half written is so after any of the later ones. A slow
 * disk is slow at all of them. */
static int counts(int fd, char *full) {
    if (fd < 0 || fd >= MAX_FD || !is_watched(fd, full)) return 0;
    if (writes[fd] >= WRITES_PER_FILE && !plan->wait) return 0;
    if (writes[fd] < WRITES_PER_FILE) writes[fd]++;
    return 1;
}

ssize_t write(int fd, const void *data, size_t size) {
    STOP_AT(counts(fd, full), "write");
    return syscall(SYS_write, fd, data, size);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    STOP_AT(counts(fd, full), "write");
    return syscall(SYS_writev, fd, parts, count);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    STOP_AT(counts(fd, full), "write");
    return syscall(SYS_pwrite64, fd, data, size, at);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) { return pwrite(fd, data, size, at); }
ssize_t copy_file_range(int in, off64_t *in_at, int out, off64_t *out_at, size_t size, unsigned flags) {
    STOP_AT(counts(out, full), "write");
    return syscall(SYS_copy_file_range, in, in_at, out, out_at, size, flags);
}
ssize_t sendfile(int out, int in, off_t *at, size_t size) {
    STOP_AT(counts(out, full), "write");
    return syscall(SYS_sendfile, out, in, at, size);
}
ssize_t sendfile64(int out, int in, off64_t *at, size_t size) { return sendfile(out, in, at, size); }

int ftruncate(int fd, off_t size) {
    STOP_AT(is_watched(fd, full), "truncate");
    return (int)syscall(SYS_ftruncate, fd, size);
}
int ftruncate64(int fd, off64_t size) { return ftruncate(fd, size); }
int truncate(const char *path, off_t size) {
    STOP_AT(is_watched_at(AT_FDCWD, path, full), "truncate");
    return (int)syscall(SYS_truncate, path, size);
}
int truncate64(const char *path, off64_t size) { return truncate(path, size); }
int fallocate(int fd, int mode, off_t at, off_t size) {
    STOP_AT(is_watched(fd, full), "truncate");
    return (int)syscall(SYS_fallocate, fd, mode, at, size);
}
int fallocate64(int fd, int mode, off64_t at, off64_t size) { return fallocate(fd, mode, at, size); }

int fsync(int fd) {
    STOP_AT(is_watched(fd, full), "fsync");
    return (int)syscall(SYS_fsync, fd);
}
int fdatasync(int fd) {
    STOP_AT(is_watched(fd, full), "fsync");
    return (int)syscall(SYS_fdatasync, fd);
}

/* A file system without locks: FAULT_LOCK is the errno of every attempt. */
int flock(int fd, int operation) {
    const char *error = getenv("FAULT_LOCK");
    if (error) {
        errno = atoi(error);
        return -1;
    }
    return (int)syscall(SYS_flock, fd, operation);
}

int renameat2(int from, const char *old, int to, const char *new, unsigned flags) {
    STOP_AT(is_watched_at(to, new, full), "rename");
    return (int)syscall(SYS_renameat2, from, old, to, new, flags);
}
int renameat(int from, const char *old, int to, const char *new) { return renameat2(from, old, to, new, 0); }
int rename(const char *old, const char *new) { return renameat2(AT_FDCWD, old, AT_FDCWD, new, 0); }

int unlinkat(int folder, const char *path, int flags) {
    STOP_AT(is_watched_at(folder, path, full), flags & AT_REMOVEDIR ? "rmdir" : "unlink");
    return (int)syscall(SYS_unlinkat, folder, path, flags);
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int mkdirat(int folder, const char *path, mode_t mode) {
    STOP_AT(is_watched_at(folder, path, full), "mkdir");
    return (int)syscall(SYS_mkdirat, folder, path, mode);
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

int symlinkat(const char *target, int folder, const char *path) {
    STOP_AT(is_watched_at(folder, path, full), "symlink");
    return (int)syscall(SYS_symlinkat, target, folder, path);
}
int symlink(const char *target, const char *path) { return symlinkat(target, AT_FDCWD, path); }

int linkat(int from, const char *old, int to, const char *new, int flags) {
    STOP_AT(is_watched_at(to, new, full), "link");
    return (int)syscall(SYS_linkat, from, old, to, new, flags);
}
int link(const char *old, const char *new) { return linkat(AT_FDCWD, old, AT_FDCWD, new, 0); }
