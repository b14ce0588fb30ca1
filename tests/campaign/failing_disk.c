/* Preloaded into a process: once $ICMSR_DISK_BYTES bytes were written to files under $ICMSR_DISK_FOLDER, every further
   write or flush there fails with the error number $ICMSR_DISK_ERRNO, as on a full or a broken disk. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static long long written;

static int counts(int descriptor) {
    const char *folder = getenv("ICMSR_DISK_FOLDER");
    char link[64], path[4096];
    if (!folder) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return strncmp(path, folder, strlen(folder)) == 0;
}

static int fails(size_t more) {
    const char *limit = getenv("ICMSR_DISK_BYTES"), *number = getenv("ICMSR_DISK_ERRNO");
    if (written + (long long)more > (limit ? atoll(limit) : 0)) {
        errno = number ? atoi(number) : ENOSPC;
        return 1;
    }
    written += more;
    return 0;
}

ssize_t write(int descriptor, const void *data, size_t size) {
    static ssize_t (*real)(int, const void *, size_t);
    if (!real) real = dlsym(RTLD_NEXT, "write");
    return counts(descriptor) && fails(size) ? -1 : real(descriptor, data, size);
}

ssize_t pwrite64(int descriptor, const void *data, size_t size, off64_t at) {
    static ssize_t (*real)(int, const void *, size_t, off64_t);
    if (!real) real = dlsym(RTLD_NEXT, "pwrite64");
    return counts(descriptor) && fails(size) ? -1 : real(descriptor, data, size, at);
}

ssize_t writev(int descriptor, const struct iovec *parts, int count) {
    static ssize_t (*real)(int, const struct iovec *, int);
    size_t size = 0;
    for (int i = 0; i < count; i++) size += parts[i].iov_len;
    if (!real) real = dlsym(RTLD_NEXT, "writev");
    return counts(descriptor) && fails(size) ? -1 : real(descriptor, parts, count);
}

int fsync(int descriptor) {
    static int (*real)(int);
    if (!real) real = dlsym(RTLD_NEXT, "fsync");
    return counts(descriptor) && fails(0) ? -1 : real(descriptor);
}
