/* A disk that fails on demand, for programs that reach the kernel through libc: LD_PRELOAD of disk.py.
 *
 * FAULTY_DISK names a directory; only files below it are concerned. FAULTY_DISK_CONTROL names a file that says what the disk does
 * now: "ok", "full" (ENOSPC), "readonly" (EROFS) or "slow MICROSECONDS" (each fsync takes that much longer). It is read at every
 * call. Reading always works, and so does deleting on a full disk. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

enum mood { OK, FULL, READONLY, SLOW };

static enum mood mood(long *microseconds)
{
    char text[64] = "";
    const char *control = getenv("FAULTY_DISK_CONTROL");
    int saved = errno;
    int fd = control == NULL ? -1 : (int)syscall(SYS_openat, AT_FDCWD, control, O_RDONLY | O_CLOEXEC, 0);
    if (fd >= 0) {
        if (syscall(SYS_read, fd, text, sizeof text - 1) < 0)
            text[0] = '\0';
        syscall(SYS_close, fd);
    }
    errno = saved;
    if (strncmp(text, "full", 4) == 0)
        return FULL;
    if (strncmp(text, "readonly", 8) == 0)
        return READONLY;
    if (strncmp(text, "slow ", 5) == 0) {
        *microseconds = atol(text + 5);
        return SLOW;
    }
    return OK;
}

static int below(const char *path)
{
    const char *directory = getenv("FAULTY_DISK");
    size_t length = directory == NULL ? 0 : strlen(directory);
    return length > 0 && strncmp(path, directory, length) == 0 && (path[length] == '/' || path[length] == '\0');
}

static int ours(int fd)
{
    char name[64], path[PATH_MAX];
    int saved = errno;
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, name, path, sizeof path - 1);
    errno = saved;
    if (length < 0)
        return 0;
    path[length] = '\0';
    return below(path);
}

/* 0, or the error with which a change must fail now. */
static int refusal(int concerned)
{
    long ignored;
    switch (concerned ? mood(&ignored) : OK) {
    case FULL:
        return ENOSPC;
    case READONLY:
        return EROFS;
    default:
        return 0;
    }
}

#define REFUSE(concerned)                     \
    do {                                      \
        int refused = refusal(concerned);     \
        if (refused != 0) {                   \
            errno = refused;                  \
            return -1;                        \
        }                                     \
    } while (0)

ssize_t write(int fd, const void *data, size_t size)
{
    REFUSE(fd > 2 && ours(fd));
    return syscall(SYS_write, fd, data, size);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset)
{
    REFUSE(ours(fd));
    return syscall(SYS_pwrite64, fd, data, size, offset);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) { return pwrite64(fd, data, size, offset); }

int ftruncate64(int fd, off64_t size)
{
    struct stat now;
    int grows = syscall(SYS_fstat, fd, &now) == 0 && size > now.st_size;
    long ignored;
    REFUSE((grows || mood(&ignored) == READONLY) && ours(fd));
    return (int)syscall(SYS_ftruncate, fd, size);
}

int ftruncate(int fd, off_t size) { return ftruncate64(fd, size); }

int fallocate64(int fd, int mode, off64_t offset, off64_t size)
{
    REFUSE(ours(fd));
    return (int)syscall(SYS_fallocate, fd, mode, offset, size);
}

int fallocate(int fd, int mode, off_t offset, off_t size) { return fallocate64(fd, mode, offset, size); }

int posix_fallocate64(int fd, off64_t offset, off64_t size)
{
    int refused = refusal(ours(fd));
    if (refused != 0)
        return refused;
    return syscall(SYS_fallocate, fd, 0, offset, size) == 0 ? 0 : errno;
}

int posix_fallocate(int fd, off_t offset, off_t size) { return posix_fallocate64(fd, offset, size); }

static int open_at(int directory, const char *path, int flags, mode_t mode_bits)
{
    long ignored;
    int concerned = below(path);
    enum mood now = concerned ? mood(&ignored) : OK;
    int absent = concerned && syscall(SYS_faccessat, directory, path, F_OK) != 0;
    if (now == READONLY && ((flags & O_ACCMODE) != O_RDONLY || (flags & O_CREAT && absent))) {
        errno = EROFS;
        return -1;
    }
    if (now == FULL && flags & O_CREAT && absent) {
        errno = ENOSPC;
        return -1;
    }
    return (int)syscall(SYS_openat, directory, path, flags, mode_bits);
}

#define MODE_BITS(bits, last)                              \
    mode_t bits = 0;                                       \
    if (flags & (O_CREAT | __O_TMPFILE)) {                 \
        va_list rest;                                      \
        va_start(rest, last);                              \
        bits = va_arg(rest, mode_t);                       \
        va_end(rest);                                      \
    }

int open(const char *path, int flags, ...)
{
    MODE_BITS(bits, flags)
    return open_at(AT_FDCWD, path, flags, bits);
}

int open64(const char *path, int flags, ...)
{
    MODE_BITS(bits, flags)
    return open_at(AT_FDCWD, path, flags, bits);
}

int openat(int directory, const char *path, int flags, ...)
{
    MODE_BITS(bits, flags)
    return open_at(directory, path, flags, bits);
}

int openat64(int directory, const char *path, int flags, ...)
{
    MODE_BITS(bits, flags)
    return open_at(directory, path, flags, bits);
}

int mkdir(const char *path, mode_t mode_bits)
{
    REFUSE(below(path));
    return (int)syscall(SYS_mkdirat, AT_FDCWD, path, mode_bits);
}

int unlink(const char *path)
{
    long ignored;
    if (below(path) && mood(&ignored) == READONLY) {
        errno = EROFS;
        return -1;
    }
    return (int)syscall(SYS_unlinkat, AT_FDCWD, path, 0);
}

int rename(const char *from, const char *to)
{
    long ignored;
    if (below(to) && mood(&ignored) == READONLY) {
        errno = EROFS;
        return -1;
    }
    return (int)syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
}

static void dawdle(int fd)
{
    long microseconds = 0;
    if (ours(fd) && mood(&microseconds) == SLOW) {
        struct timespec pause = {microseconds / 1000000, microseconds % 1000000 * 1000};
        nanosleep(&pause, NULL);
    }
}

int fsync(int fd)
{
    dawdle(fd);
    return (int)syscall(SYS_fsync, fd);
}

int fdatasync(int fd)
{
    dawdle(fd);
    return (int)syscall(SYS_fdatasync, fd);
}
