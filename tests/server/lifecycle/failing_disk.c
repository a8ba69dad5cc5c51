/* Preloaded by the tests: makes a chosen call that changes a file of the catalogue fail, as a full or broken disk does. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static int calls_before = -1; /* -1: none fails */
static int with_error, for_ever, num_failed;

void fail_disk(int after_calls, int error, int sticky) {
    calls_before = after_calls;
    with_error = error;
    for_ever = sticky;
    num_failed = 0;
}

void disk_is_well(void) { calls_before = -1; }

int failed_calls(void) { return num_failed; }

static int fails(int fd) {
    char link[64], path[4096];
    if (calls_before < 0) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    if (!strstr(path, "catalogue.db")) return 0;
    if (calls_before > 0) return calls_before--, 0;
    if (!for_ever && num_failed) return 0;
    num_failed++;
    errno = with_error;
    return 1;
}

#define FAILING(type, name, parameters, arguments)                        \
    type name parameters {                                                \
        static type(*real) parameters;                                    \
        if (!real) real = (type(*) parameters)dlsym(RTLD_NEXT, #name);    \
        return fails(fd) ? (type)-1 : real arguments;                     \
    }

FAILING(ssize_t, write, (int fd, const void *data, size_t size), (fd, data, size))
FAILING(ssize_t, pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
FAILING(ssize_t, pwrite64, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at))
FAILING(int, fsync, (int fd), (fd))
FAILING(int, fdatasync, (int fd), (fd))
FAILING(int, ftruncate, (int fd, off_t size), (fd, size))
FAILING(int, ftruncate64, (int fd, off64_t size), (fd, size))
