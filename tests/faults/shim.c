/* Makes disk operations fail on demand, in programs that preload it (LD_PRELOAD). The environment selects the
 * failures:
 *
 *   FAULT_LOCK=none | ENOLCK | ENOSYS    locks succeed without locking anything, or fail
 *   FAULT_FREE=BYTES | unknown           statvfs reports this free space; unknown: 0 in all fields
 *   FAULT_ALLOCATE=ERROR                 fallocate fails
 *   FAULT_WRITE=ERROR[@N] | short        pwrite fails, from the N-th call on; or writes half of the bytes
 *   FAULT_SYNC=ERROR | kill              fsync and fdatasync fail, or the process is killed in fdatasync
 *   FAULT_SYNCED=PATH                    each fsync and fdatasync appends a letter to PATH: d for a directory, f for a
 *                                        file
 *   FAULT_TRUNCATE=ERROR                 ftruncate fails
 *   FAULT_UNLINK=ERROR                   removing a name that ends in .lock fails
 *   FAULT_DIRECTORY=PATH                 the process is killed when it reads that directory
 *   FAULT_RENAME=ERROR | kill | lost     rename fails, or the process is killed in rename, or rename fails after it has
 *                                        renamed the file, if the new name does not begin with a dot
 *   FAULT_LOOK=ERROR                     the first stat of a file named model.h5 fails
 *   FAULT_OPEN=ERROR                     the first open of a file named model.h5 fails
 *   FAULT_THREAD=N | N- | late           the N-th pthread_create fails; N-: and all later ones; late: each returns when the
 *                                        new thread has had 300 ms
 *   FAULT_COPY=ERROR                     copy_file_range fails
 *
 * ERROR is ENOSPC, EDQUOT, EIO, EACCES, EROFS, EOPNOTSUPP, ENOLCK, ENOSYS, ESTALE,
 * EINTR or EMFILE. EINTR interrupts every other call: the next one goes through.
 */
#define _GNU_SOURCE
#undef _TIME_BITS /* programs call the functions by both names, independent of this build's setting */
#undef _FILE_OFFSET_BITS
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/types.h>
#include <unistd.h>

static int number_of(const char* name) {
  static const struct {
    const char* name;
    int number;
  } all[] = {{"ENOSPC", ENOSPC}, {"EDQUOT", EDQUOT},         {"EIO", EIO},       {"EACCES", EACCES},
             {"EROFS", EROFS},   {"EOPNOTSUPP", EOPNOTSUPP}, {"ENOLCK", ENOLCK}, {"ENOSYS", ENOSYS},
             {"ESTALE", ESTALE}, {"EINTR", EINTR},           {"EMFILE", EMFILE}};
  for (size_t i = 0; i < sizeof all / sizeof *all; ++i)
    if (strncmp(name, all[i].name, strlen(all[i].name)) == 0) return all[i].number;
  return EINVAL;
}

/* Returns 1 and sets errno if this call is to fail with the given error. */
static int strikes(const char* error) {
  static int interrupted = 0;
  errno = number_of(error);
  return errno != EINTR || __atomic_fetch_add(&interrupted, 1, __ATOMIC_SEQ_CST) % 2 == 0;
}

/* The same, if the variable says so. */
static int fails(const char* variable) {
  const char* value = getenv(variable);
  return value != NULL && strikes(value);
}

/* The same, for the first call with a path that ends in /model.h5. */
static int fails_once(const char* variable, const char* path, int* calls) {
  static const char wanted[] = "/model.h5";
  const size_t length = strlen(path), end = sizeof wanted - 1;
  if (!getenv(variable) || length < end || strcmp(path + length - end, wanted) != 0) return 0;
  return __atomic_fetch_add(calls, 1, __ATOMIC_SEQ_CST) == 0 && fails(variable);
}

static int looks = 0, opens = 0;

#define STAT(name, facts_type)                                                                               \
  int name(const char* path, struct facts_type* facts) {                                                     \
    if (fails_once("FAULT_LOOK", path, &looks)) return -1;                                                   \
    return ((int (*)(const char*, struct facts_type*))dlsym(RTLD_NEXT, #name))(path, facts);                 \
  }
STAT(stat, stat)
#ifdef __GLIBC__
STAT(stat64, stat64)
#endif

#define OPEN(name)                                                                                           \
  int name(const char* path, int flags, ...) {                                                               \
    va_list arguments;                                                                                       \
    va_start(arguments, flags);                                                                              \
    const mode_t mode = flags & O_CREAT ? va_arg(arguments, mode_t) : 0;                                     \
    va_end(arguments);                                                                                       \
    if (fails_once("FAULT_OPEN", path, &opens)) return -1;                                                   \
    return ((int (*)(const char*, int, ...))dlsym(RTLD_NEXT, #name))(path, flags, mode);                     \
  }
OPEN(open)
#ifdef __GLIBC__
OPEN(open64)
#endif

static int lock_answer(int command, int* answer) {
  const char* value = getenv("FAULT_LOCK");
  const int locks =
      command == F_SETLK || command == F_SETLKW || command == F_OFD_SETLK || command == F_OFD_SETLKW;
  if (!value || !locks) return 0;
  *answer = strcmp(value, "none") == 0 ? 0 : -1;
  return *answer == 0 || strikes(value);
}

#define FCNTL(name)                                                                                          \
  int name(int fd, int command, ...) {                                                                       \
    va_list arguments;                                                                                       \
    va_start(arguments, command);                                                                            \
    void* argument = va_arg(arguments, void*);                                                               \
    va_end(arguments);                                                                                       \
    int answer;                                                                                              \
    if (lock_answer(command, &answer)) return answer;                                                        \
    return ((int (*)(int, int, ...))dlsym(RTLD_NEXT, #name))(fd, command, argument);                         \
  }
FCNTL(fcntl)
#ifdef __GLIBC__ /* other C libraries have one name for each function */
FCNTL(fcntl64)
#endif

int flock(int fd, int operation) {
  int answer;
  if (lock_answer(F_SETLK, &answer)) return answer;
  return ((int (*)(int, int))dlsym(RTLD_NEXT, "flock"))(fd, operation);
}

#define FALLOCATE(name, offset_type)                                                                         \
  int name(int fd, int mode, offset_type offset, offset_type length) {                                       \
    if (fails("FAULT_ALLOCATE")) return -1;                                                                  \
    return ((int (*)(int, int, offset_type, offset_type))dlsym(RTLD_NEXT, #name))(fd, mode, offset, length); \
  }
FALLOCATE(fallocate, off_t)
#ifdef __GLIBC__
FALLOCATE(fallocate64, off64_t)
#endif

#define POSIX_FALLOCATE(name, offset_type)                                                                   \
  int name(int fd, offset_type offset, offset_type length) {                                                 \
    if (fails("FAULT_ALLOCATE")) return errno;                                                               \
    return ((int (*)(int, offset_type, offset_type))dlsym(RTLD_NEXT, #name))(fd, offset, length);            \
  }
POSIX_FALLOCATE(posix_fallocate, off_t)
#ifdef __GLIBC__
POSIX_FALLOCATE(posix_fallocate64, off64_t)
#endif

#define STATVFS(name, facts_type)                                                                            \
  int name(const char* where, struct facts_type* facts) {                                                    \
    const int answer = ((int (*)(const char*, struct facts_type*))dlsym(RTLD_NEXT, #name))(where, facts);    \
    const char* free_bytes = getenv("FAULT_FREE");                                                           \
    if (answer != 0 || !free_bytes) return answer;                                                           \
    if (strcmp(free_bytes, "unknown") == 0) {                                                                \
      memset(facts, 0, sizeof *facts);                                                                       \
    } else {                                                                                                 \
      facts->f_frsize = 1;                                                                                   \
      facts->f_bavail = facts->f_bfree = strtoull(free_bytes, NULL, 10);                                     \
    }                                                                                                        \
    return 0;                                                                                                \
  }
STATVFS(statvfs, statvfs)
#ifdef __GLIBC__
STATVFS(statvfs64, statvfs64)
#endif

/* Returns 1 if the write is to fail. Otherwise it may reduce the number of bytes. */
static int write_fails(size_t* count) {
  static int writes = 0;
  const char* value = getenv("FAULT_WRITE");
  if (!value) return 0;
  if (strcmp(value, "short") == 0) {
    if (*count > 1) *count /= 2;
    return 0;
  }
  const char* from = strchr(value, '@');
  if (__atomic_add_fetch(&writes, 1, __ATOMIC_SEQ_CST) < (from ? atoi(from + 1) : 1)) return 0;
  return strikes(value);
}

#define PWRITE(name, offset_type)                                                                            \
  ssize_t name(int fd, const void* bytes, size_t count, offset_type offset) {                                \
    if (write_fails(&count)) return -1;                                                                      \
    return ((ssize_t(*)(int, const void*, size_t, offset_type))dlsym(RTLD_NEXT, #name))(fd, bytes, count,    \
                                                                                        offset);             \
  }
PWRITE(pwrite, off_t)
#ifdef __GLIBC__
PWRITE(pwrite64, off64_t)
#endif

static void note_sync(int fd) {
  const char* path = getenv("FAULT_SYNCED");
  if (!path) return;
  struct stat facts;
  const int file = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  if (fstat(fd, &facts) != 0 || write(file, S_ISDIR(facts.st_mode) ? "d" : "f", 1) != 1) abort();
  close(file);
}

int fsync(int fd) {
  note_sync(fd);
  if (fails("FAULT_SYNC")) return -1;
  return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(fd);
}
int fdatasync(int fd) {
  note_sync(fd);
  const char* value = getenv("FAULT_SYNC");
  if (value && strcmp(value, "kill") == 0) raise(SIGKILL);
  if (fails("FAULT_SYNC")) return -1;
  return ((int (*)(int))dlsym(RTLD_NEXT, "fdatasync"))(fd);
}

#define FTRUNCATE(name, offset_type)                                                                         \
  int name(int fd, offset_type size) {                                                                       \
    if (fails("FAULT_TRUNCATE")) return -1;                                                                  \
    return ((int (*)(int, offset_type))dlsym(RTLD_NEXT, #name))(fd, size);                                   \
  }
FTRUNCATE(ftruncate, off_t)
#ifdef __GLIBC__
FTRUNCATE(ftruncate64, off64_t)
#endif

#define UNLINK(name)                                                                                         \
  int name(const char* path) {                                                                               \
    const size_t length = strlen(path);                                                                      \
    if (length > 5 && strcmp(path + length - 5, ".lock") == 0 && fails("FAULT_UNLINK")) return -1;           \
    return ((int (*)(const char*))dlsym(RTLD_NEXT, #name))(path);                                            \
  }
UNLINK(unlink)
UNLINK(remove)

static void check_directory(const struct stat* opened) {
  const char* forbidden = getenv("FAULT_DIRECTORY");
  struct stat named;
  if (forbidden && stat(forbidden, &named) == 0 && named.st_dev == opened->st_dev &&
      named.st_ino == opened->st_ino) {
    raise(SIGKILL);
  }
}
DIR* opendir(const char* path) {
  struct stat opened;
  if (stat(path, &opened) == 0) check_directory(&opened);
  return ((DIR * (*)(const char*)) dlsym(RTLD_NEXT, "opendir"))(path);
}
DIR* fdopendir(int fd) {
  struct stat opened;
  if (fstat(fd, &opened) == 0) check_directory(&opened);
  return ((DIR * (*)(int)) dlsym(RTLD_NEXT, "fdopendir"))(fd);
}

int rename(const char* from, const char* to) {
  const char* name = strrchr(to, '/');
  if ((name ? name[1] : to[0]) != '.') {
    const char* value = getenv("FAULT_RENAME");
    if (value && strcmp(value, "kill") == 0) raise(SIGKILL);
    if (value && strcmp(value, "lost") == 0) {
      if (((int (*)(const char*, const char*))dlsym(RTLD_NEXT, "rename"))(from, to) == 0) errno = EIO;
      return -1;
    }
    if (fails("FAULT_RENAME")) return -1;
  }
  return ((int (*)(const char*, const char*))dlsym(RTLD_NEXT, "rename"))(from, to);
}

int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*start)(void*),
                   void* argument) {
  static int calls = 0;
  const char* value = getenv("FAULT_THREAD");
  if (value) {
    char* rest;
    const long failing = strtol(value, &rest, 10);
    const int call = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
    if (call == failing || (call > failing && *rest == '-')) return EAGAIN;
  }
  const int failure = ((int (*)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*))dlsym(
      RTLD_NEXT, "pthread_create"))(thread, attributes, start, argument);
  if (value && strcmp(value, "late") == 0) usleep(300000);
  return failure;
}

#ifdef __GLIBC__
ssize_t copy_file_range(int in, off64_t* read_from, int out, off64_t* write_to, size_t size, unsigned flags) {
  if (fails("FAULT_COPY")) return -1;
  return ((ssize_t(*)(int, off64_t*, int, off64_t*, size_t, unsigned))dlsym(RTLD_NEXT, "copy_file_range"))(
      in, read_from, out, write_to, size, flags);
}
#endif
