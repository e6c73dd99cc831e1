/* A library for LD_PRELOAD that counts the calls with which a process changes files, and at the n-th kills the process or
 * lets the call fail. Calls on what is no regular file (sockets, pipes, terminals) are not counted.
 *
 * FAULTS_WHEN: at which call; FAULTS_ERROR: 0 to kill, otherwise the error number; FAULTS_ONCE: 1 for this call only, 0 for
 * it and all that follow; FAULTS_KINDS: which calls (1 data, 2 sync, 4 names, 8 rights, 16 reads); FAULTS_PARENT: 1 to kill
 * the process that started this one too, at the same moment; FAULTS_TELL: a file to make when it has come so far;
 * FAULTS_CUT: a folder whose file system is shut down before the kill, so that nothing reaches its disk any more;
 * FAULTS_LOG: a file that gets a line for each such call that succeeded. A process can also arm itself with faults_arm(),
 * faults_cut() and faults_log(); the first two hold for it alone, not for the programs that it starts.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { DATA = 1, SYNC = 2, NAMES = 4, RIGHTS = 8, READS = 16 };

static long calls, when = -1;
static int error_number, once = 1, kinds = 15, parent_too;
static const char *tell, *cut;
static int logged = -1;

void faults_arm(long at, int error, int only_once, int which)
{
    __atomic_store_n(&calls, 0, __ATOMIC_SEQ_CST);
    when = at;
    error_number = error;
    once = only_once;
    kinds = which;
}

long faults_count(void) { return __atomic_load_n(&calls, __ATOMIC_SEQ_CST); }

/* The power of the folder's disk fails together with the kill. */
void faults_cut(const char *folder) { cut = folder ? strdup(folder) : NULL; }

static void cut_power(void)
{
    /* FS_IOC_SHUTDOWN with FS_SHUTDOWN_FLAGS_NOLOGFLUSH, the same number on ext4 and XFS (include/uapi/linux/fs.h). */
    unsigned flags = 2;
    int folder = syscall(SYS_openat, AT_FDCWD, cut, O_RDONLY | O_DIRECTORY);
    syscall(SYS_ioctl, folder, _IOR('X', 125, unsigned), &flags);
}

void faults_log(const char *path)
{
    logged = path ? syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600) : -1;
}

/* "CALL INODE PATH": for a call on a descriptor what it has open; for a call on a name the name, and what has it now. */
static void log_descriptor(const char *call, int descriptor)
{
    char link[64], path[4096], line[4300];
    struct stat status;
    if (logged < 0 || fstat(descriptor, &status) != 0 || !(S_ISREG(status.st_mode) || S_ISDIR(status.st_mode)))
        return;
    int error = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t size = readlink(link, path, sizeof path - 1);
    path[size < 0 ? 0 : size] = 0;
    int length = snprintf(line, sizeof line, "%s %lu %s\n", call, (unsigned long)status.st_ino, path);
    syscall(SYS_write, logged, line, length);
    errno = error;
}

static void log_name(const char *call, int folder, const char *name)
{
    char link[64], path[4096], line[8300];
    if (logged < 0)
        return;
    int error = errno;
    ssize_t size = 0;
    if (name[0] != '/') {
        snprintf(link, sizeof link, folder == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", folder);
        size = readlink(link, path, sizeof path - 2);
        size = size < 0 ? 0 : size;
        path[size++] = '/';
    }
    path[size] = 0;
    struct stat status = {.st_ino = 0};
    char whole[8200];
    snprintf(whole, sizeof whole, "%s%s", path, name);
    syscall(SYS_newfstatat, AT_FDCWD, whole, &status, AT_SYMLINK_NOFOLLOW);
    int length = snprintf(line, sizeof line, "%s %lu %s\n", call, (unsigned long)status.st_ino, whole);
    syscall(SYS_write, logged, line, length);
    errno = error;
}

__attribute__((constructor)) static void from_environment(void)
{
    if (getenv("FAULTS_LOG") != NULL)
        faults_log(getenv("FAULTS_LOG"));
    const char *at = getenv("FAULTS_WHEN");
    if (at == NULL)
        return;
    const char *error = getenv("FAULTS_ERROR"), *only = getenv("FAULTS_ONCE"), *which = getenv("FAULTS_KINDS");
    tell = getenv("FAULTS_TELL");
    cut = getenv("FAULTS_CUT");
    parent_too = getenv("FAULTS_PARENT") != NULL;
    faults_arm(atol(at), error ? atoi(error) : 0, only ? atoi(only) : 1, which ? atoi(which) : 15);
}

/* Whether the call fails; does not return when the process is to die. */
static int fails(int kind)
{
    if (when < 0 || !(kinds & kind))
        return 0;
    long number = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
    if (number != when && (once || number < when))
        return 0;
    if (tell != NULL)
        syscall(SYS_close, syscall(SYS_openat, AT_FDCWD, tell, O_CREAT | O_WRONLY, 0600));
    if (error_number == 0) {
        if (number != when)
            return 0;
        if (cut != NULL)
            cut_power();
        if (parent_too)
            syscall(SYS_kill, getppid(), SIGKILL);
        syscall(SYS_kill, getpid(), SIGKILL);
        for (;;)
            pause();
    }
    errno = error_number;
    return 1;
}

static int fails_on(int descriptor, int kind)
{
    struct stat status;
    if (when < 0 || !(kinds & kind) || fstat(descriptor, &status) != 0)
        return 0;
    if (!S_ISREG(status.st_mode) && !(kind == SYNC && S_ISDIR(status.st_mode)))
        return 0;
    return fails(kind);
}

#define NEXT(type, name) \
    static type (*next)() = NULL; \
    if (next == NULL) \
        next = (type(*)())dlsym(RTLD_NEXT, #name)

#define ON(type, name, kind, parameters, arguments, descriptor) \
    type name parameters \
    { \
        NEXT(type, name); \
        if (fails_on(descriptor, kind)) \
            return -1; \
        type result = next arguments; \
        if (result >= 0 && kind != READS) \
            log_descriptor(#name, descriptor); \
        return result; \
    }

#define NO_NAME ((const char *)NULL)
#define CALL(name, parameters, arguments, from, old, to, new) \
    int name parameters \
    { \
        NEXT(int, name); \
        if (fails(NAMES)) \
            return -1; \
        int result = next arguments; \
        if (result == 0) { \
            if (old != NULL) \
                log_name(#name, from, old); \
            if (new != NULL) \
                log_name(#name, to, new); \
        } \
        return result; \
    }

ON(ssize_t, write, DATA, (int fd, const void *data, size_t size), (fd, data, size), fd)
ON(ssize_t, writev, DATA, (int fd, const struct iovec *v, int n), (fd, v, n), fd)
ON(ssize_t, pwrite, DATA, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at), fd)
ON(ssize_t, pwrite64, DATA, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at), fd)
ON(ssize_t, pwritev, DATA, (int fd, const struct iovec *v, int n, off_t at), (fd, v, n, at), fd)
ON(ssize_t, pwritev64, DATA, (int fd, const struct iovec *v, int n, off64_t at), (fd, v, n, at), fd)
ON(int, ftruncate, DATA, (int fd, off_t size), (fd, size), fd)
ON(int, ftruncate64, DATA, (int fd, off64_t size), (fd, size), fd)
ON(int, fallocate, DATA, (int fd, int mode, off_t at, off_t size), (fd, mode, at, size), fd)
ON(int, fallocate64, DATA, (int fd, int mode, off64_t at, off64_t size), (fd, mode, at, size), fd)
ON(ssize_t, copy_file_range, DATA, (int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags),
   (in, from, out, to, size, flags), out)
ON(int, sync_file_range, DATA, (int fd, off64_t at, off64_t size, unsigned flags), (fd, at, size, flags), fd)
ON(int, fsync, SYNC, (int fd), (fd), fd)
ON(int, fdatasync, SYNC, (int fd), (fd), fd)
ON(ssize_t, read, READS, (int fd, void *data, size_t size), (fd, data, size), fd)
ON(ssize_t, pread, READS, (int fd, void *data, size_t size, off_t at), (fd, data, size, at), fd)
ON(ssize_t, pread64, READS, (int fd, void *data, size_t size, off64_t at), (fd, data, size, at), fd)
ON(ssize_t, preadv, READS, (int fd, const struct iovec *v, int n, off_t at), (fd, v, n, at), fd)
ON(ssize_t, preadv64, READS, (int fd, const struct iovec *v, int n, off64_t at), (fd, v, n, at), fd)
CALL(rename, (const char *a, const char *b), (a, b), AT_FDCWD, a, AT_FDCWD, b)
CALL(renameat, (int x, const char *a, int y, const char *b), (x, a, y, b), x, a, y, b)
CALL(renameat2, (int x, const char *a, int y, const char *b, unsigned f), (x, a, y, b, f), x, a, y, b)
CALL(link, (const char *a, const char *b), (a, b), AT_FDCWD, NO_NAME, AT_FDCWD, b)
CALL(linkat, (int x, const char *a, int y, const char *b, int f), (x, a, y, b, f), x, NO_NAME, y, b)
CALL(symlink, (const char *a, const char *b), (a, b), AT_FDCWD, NO_NAME, AT_FDCWD, b)
CALL(unlink, (const char *a), (a), AT_FDCWD, a, 0, NO_NAME)
CALL(unlinkat, (int x, const char *a, int f), (x, a, f), x, a, 0, NO_NAME)
CALL(rmdir, (const char *a), (a), AT_FDCWD, a, 0, NO_NAME)
CALL(mkdir, (const char *a, mode_t m), (a, m), AT_FDCWD, a, 0, NO_NAME)
CALL(mkdirat, (int x, const char *a, mode_t m), (x, a, m), x, a, 0, NO_NAME)
ON(int, fchmod, RIGHTS, (int fd, mode_t m), (fd, m), fd)
ON(int, fchown, RIGHTS, (int fd, uid_t u, gid_t g), (fd, u, g), fd)
ON(int, fsetxattr, RIGHTS, (int fd, const char *n, const void *v, size_t s, int f), (fd, n, v, s, f), fd)

/* Of all that ioctl can do, sharing blocks changes files: FICLONE and FICLONERANGE (include/uapi/linux/fs.h). */
int ioctl(int fd, unsigned long request, ...)
{
    NEXT(int, ioctl);
    va_list rest;
    va_start(rest, request);
    void *argument = va_arg(rest, void *);
    va_end(rest);
    int shares = request == _IOW(0x94, 9, int) || request == 0x4020940dUL;
    if (shares && fails_on(fd, DATA))
        return -1;
    int result = next(fd, request, argument);
    if (shares && result == 0)
        log_descriptor("ioctl", fd);
    return result;
}

#define OPEN(name, before_parameters, before_arguments) \
    int name(before_parameters const char *path, int flags, ...) \
    { \
        NEXT(int, name); \
        mode_t mode = 0; \
        if (flags & (O_CREAT | __O_TMPFILE)) { \
            va_list rest; \
            va_start(rest, flags); \
            mode = va_arg(rest, mode_t); \
            va_end(rest); \
        } \
        if ((flags & O_CREAT) && fails(NAMES)) \
            return -1; \
        int result = next(before_arguments path, flags, mode); \
        if (result >= 0 && (flags & O_CREAT) && (flags & O_EXCL)) \
            log_descriptor("create", result); \
        return result; \
    }
#define NOTHING
#define WHERE int where,
#define WHERE_IT_IS where,
OPEN(open, NOTHING, NOTHING)
OPEN(open64, NOTHING, NOTHING)
OPEN(openat, WHERE, WHERE_IT_IS)
OPEN(openat64, WHERE, WHERE_IT_IS)
