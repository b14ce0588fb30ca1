/* Preloaded into a process, it counts what is done to files under $ICMSR_DISK_FOLDER: writes, flushes, renames,
   removals, new folders.

   With $ICMSR_DISK_ERRNO, once $ICMSR_DISK_BYTES bytes were written there, a write puts down what still fits, and every
   further write, flush, rename or new folder fails with that error number, as on a full or a broken disk. With
   $ICMSR_KILL_CALL the process group is killed by SIGKILL at the call of that number; of a write, half is done. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name, result, ...)                          \
    static result (*real)(__VA_ARGS__);                  \
    if (!real) real = dlsym(RTLD_NEXT, name)

static long long written, calls;

/* How many calls there were until now. */
long long icmsr_disk_calls(void) { return calls; }

static int under(const char *path) {
    const char *folder = getenv("ICMSR_DISK_FOLDER");
    return folder && strncmp(path, folder, strlen(folder)) == 0;
}

static int counts(int descriptor) {
    char link[64], path[4096];
    if (!getenv("ICMSR_DISK_FOLDER")) return 0;
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = before;
    if (length < 0) return 0;
    path[length] = 0;
    return under(path);
}

static int path_counts(int folder, const char *path) {
    char whole[8192], place[4096];
    if (!getenv("ICMSR_DISK_FOLDER")) return 0;
    if (path[0] == '/') return under(path);
    if (folder != AT_FDCWD) return counts(folder);
    if (!getcwd(place, sizeof place)) return 0;
    snprintf(whole, sizeof whole, "%s/%s", place, path);
    return under(whole);
}

static int now_killed(void) {
    const char *last = getenv("ICMSR_KILL_CALL");
    return ++calls == (last ? atoll(last) : 0);
}

static void end(void) {
    kill(0, SIGKILL);
    for (;;) pause();
}

/* How many of `more` bytes can be written; 0 with errno set where none can. `more` is 0 for what is no write. */
static size_t room(size_t more, int *fails) {
    const char *limit = getenv("ICMSR_DISK_BYTES"), *number = getenv("ICMSR_DISK_ERRNO");
    *fails = 0;
    if (!number) return more;
    long long left = (limit ? atoll(limit) : 0) - written;
    if (left <= 0) {
        *fails = 1;
        errno = atoi(number);
        return 0;
    }
    if ((long long)more > left) more = left;
    written += more;
    return more;
}

static int refused(void) {
    int fails;
    if (now_killed()) end();
    room(0, &fails);
    return fails;
}

ssize_t write(int descriptor, const void *data, size_t size) {
    REAL("write", ssize_t, int, const void *, size_t);
    int fails;
    if (!counts(descriptor)) return real(descriptor, data, size);
    if (now_killed()) {
        real(descriptor, data, size / 2);
        end();
    }
    size_t part = room(size, &fails);
    return fails ? -1 : real(descriptor, data, part);
}

ssize_t pwrite64(int descriptor, const void *data, size_t size, off64_t at) {
    REAL("pwrite64", ssize_t, int, const void *, size_t, off64_t);
    int fails;
    if (!counts(descriptor)) return real(descriptor, data, size, at);
    if (now_killed()) {
        real(descriptor, data, size / 2, at);
        end();
    }
    size_t part = room(size, &fails);
    return fails ? -1 : real(descriptor, data, part, at);
}

ssize_t writev(int descriptor, const struct iovec *parts, int count) {
    REAL("writev", ssize_t, int, const struct iovec *, int);
    if (!counts(descriptor) || count < 1) return real(descriptor, parts, count);
    for (int i = 0; i < count; i++)  /* as a disk may, it takes the first part alone */
        if (parts[i].iov_len) return write(descriptor, parts[i].iov_base, parts[i].iov_len);
    return 0;
}

int fsync(int descriptor) {
    REAL("fsync", int, int);
    return counts(descriptor) && refused() ? -1 : real(descriptor);
}

int rename(const char *from, const char *to) {
    REAL("rename", int, const char *, const char *);
    return path_counts(AT_FDCWD, to) && refused() ? -1 : real(from, to);
}

int mkdir(const char *path, mode_t mode) {
    REAL("mkdir", int, const char *, mode_t);
    return path_counts(AT_FDCWD, path) && refused() ? -1 : real(path, mode);
}

int unlink(const char *path) {
    REAL("unlink", int, const char *);
    if (path_counts(AT_FDCWD, path) && now_killed()) end();
    return real(path);
}

int unlinkat(int folder, const char *path, int flags) {
    REAL("unlinkat", int, int, const char *, int);
    if (path_counts(folder, path) && now_killed()) end();
    return real(folder, path, flags);
}

int rmdir(const char *path) {
    REAL("rmdir", int, const char *);
    if (path_counts(AT_FDCWD, path) && now_killed()) end();
    return real(path);
}
