/* See calls.h.
 *
 * SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#undef _FORTIFY_SOURCE /* it defines some of the functions inline */
#undef _TIME_BITS      /* programs call the functions by both names, independent of this build's setting */
#undef _FILE_OFFSET_BITS
#include "calls.h"

#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/types.h>
#include <sys/vfs.h>
#include <unistd.h>

/* The functions of the C library. */
#define NEXT(type, name, parameters) ((type(*) parameters)dlsym(RTLD_NEXT, name))

/* Describes a call. The arguments after the name are designated initializers of struct call. */
#define DESCRIBE(plain, ...)                                                                                 \
  { .function = plain, __VA_ARGS__ }

/* Defines a function that returns -1 and sets errno if it fails. */
#define CALL(type, name, plain, parameters, arguments, ...)                                                  \
  type name parameters {                                                                                     \
    const struct call made = DESCRIBE(plain, __VA_ARGS__);                                                   \
    const int code = before_call(&made);                                                                     \
    if (code != 0 && code != call_lost) {                                                                    \
      errno = code;                                                                                          \
      return (type)-1;                                                                                       \
    }                                                                                                        \
    const type result = NEXT(type, #name, parameters) arguments;                                             \
    after_call(&made, (long long)result);                                                                    \
    if (code != call_lost) return result;                                                                    \
    errno = EIO;                                                                                             \
    return (type)-1;                                                                                         \
  }

/* The same, for a function with the parameter `count`, the number of bytes that it shall read, write or copy. */
#define COUNTED(type, name, plain, parameters, arguments, ...)                                               \
  type name parameters {                                                                                     \
    struct call made = DESCRIBE(plain, .size = count, __VA_ARGS__);                                          \
    const int code = before_call(&made);                                                                     \
    if (code == call_nothing) return 0;                                                                      \
    if (code == call_half) made.size = count = count > 1 ? count / 2 : count;                                \
    if (code != 0 && code != call_half) {                                                                    \
      errno = code;                                                                                          \
      return (type)-1;                                                                                       \
    }                                                                                                        \
    const type result = NEXT(type, #name, parameters) arguments;                                             \
    after_call(&made, (long long)result);                                                                    \
    return result;                                                                                           \
  }

/* Defines a function that returns NULL and sets errno if it fails. */
#define POINTER(type, name, plain, parameters, arguments, ...)                                               \
  type* name parameters {                                                                                    \
    const struct call made = DESCRIBE(plain, __VA_ARGS__);                                                   \
    const int code = before_call(&made);                                                                     \
    if (code != 0) {                                                                                         \
      errno = code;                                                                                          \
      return NULL;                                                                                           \
    }                                                                                                        \
    type* const result = NEXT(type*, #name, parameters) arguments;                                           \
    after_call(&made, result ? 0 : -1);                                                                      \
    return result;                                                                                           \
  }

/* Defines a function that returns its error. */
#define CODE(name, plain, parameters, arguments, ...)                                                        \
  int name parameters {                                                                                      \
    const struct call made = DESCRIBE(plain, __VA_ARGS__);                                                   \
    const int code = before_call(&made);                                                                     \
    if (code != 0) return code;                                                                              \
    const int result = NEXT(int, #name, parameters) arguments;                                               \
    after_call(&made, result);                                                                               \
    return result;                                                                                           \
  }

/* ---- files */

#define OPEN(name)                                                                                           \
  int name(const char* path, int flags, ...) {                                                               \
    va_list rest;                                                                                            \
    va_start(rest, flags);                                                                                   \
    const mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;                            \
    va_end(rest);                                                                                            \
    const struct call made = DESCRIBE("open", .path = path, .command = flags);                               \
    const int code = before_call(&made);                                                                     \
    if (code != 0) {                                                                                         \
      errno = code;                                                                                          \
      return -1;                                                                                             \
    }                                                                                                        \
    const int result = NEXT(int, #name, (const char*, int, ...))(path, flags, mode);                         \
    after_call(&made, result);                                                                               \
    return result;                                                                                           \
  }
OPEN(open)

#define OPENAT(name)                                                                                         \
  int name(int folder, const char* path, int flags, ...) {                                                   \
    va_list rest;                                                                                            \
    va_start(rest, flags);                                                                                   \
    const mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;                            \
    va_end(rest);                                                                                            \
    const struct call made = DESCRIBE("open", .path = path, .command = flags);                               \
    const int code = before_call(&made);                                                                     \
    if (code != 0) {                                                                                         \
      errno = code;                                                                                          \
      return -1;                                                                                             \
    }                                                                                                        \
    const int result = NEXT(int, #name, (int, const char*, int, ...))(folder, path, flags, mode);            \
    after_call(&made, result);                                                                               \
    return result;                                                                                           \
  }
OPENAT(openat)

/* The descriptor is closed even if close fails. */
int close(int fd) {
  const struct call made = DESCRIBE("close", .descriptor = fd);
  const int code = before_call(&made);
  const int result = NEXT(int, "close", (int))(fd);
  after_call(&made, result);
  if (code == 0) return result;
  errno = code;
  return -1;
}

COUNTED(ssize_t, read, "read", (int fd, void* bytes, size_t count), (fd, bytes, count), .descriptor = fd)
COUNTED(ssize_t, write, "write", (int fd, const void* bytes, size_t count), (fd, bytes, count),
        .descriptor = fd, .bytes = bytes)
#define PREAD(name, off)                                                                                     \
  COUNTED(ssize_t, name, "pread", (int fd, void* bytes, size_t count, off offset),                           \
          (fd, bytes, count, offset), .descriptor = fd, .offset = offset)
#define PWRITE(name, off)                                                                                    \
  COUNTED(ssize_t, name, "pwrite", (int fd, const void* bytes, size_t count, off offset),                    \
          (fd, bytes, count, offset), .descriptor = fd, .offset = offset, .bytes = bytes)
PREAD(pread, off_t)
PWRITE(pwrite, off_t)
#ifdef __GLIBC__
COUNTED(ssize_t, copy_file_range, "copy_file_range",
        (int from, off64_t* from_offset, int to, off64_t* to_offset, size_t count, unsigned flags),
        (from, from_offset, to, to_offset, count, flags), .descriptor = from, .second_descriptor = to,
        .offset = *to_offset)
#endif
CALL(int, fsync, "fsync", (int fd), (fd), .descriptor = fd)
CALL(int, fdatasync, "fdatasync", (int fd), (fd), .descriptor = fd)
#define FTRUNCATE(name, off)                                                                                 \
  CALL(int, name, "ftruncate", (int fd, off size), (fd, size), .descriptor = fd, .offset = size)
#define FALLOCATE(name, off)                                                                                 \
  CALL(int, name, "fallocate", (int fd, int mode, off offset, off size), (fd, mode, offset, size),           \
       .descriptor = fd, .command = mode, .offset = offset, .size = (size_t)size)
FTRUNCATE(ftruncate, off_t)
FALLOCATE(fallocate, off_t)
CALL(int, futimens, "futimens", (int fd, const struct timespec times[2]), (fd, times), .descriptor = fd)
CALL(int, fchmod, "fchmod", (int fd, mode_t mode), (fd, mode), .descriptor = fd)

#define FCNTL(name)                                                                                          \
  int name(int fd, int command, ...) {                                                                       \
    va_list rest;                                                                                            \
    va_start(rest, command);                                                                                 \
    void* argument = va_arg(rest, void*);                                                                    \
    va_end(rest);                                                                                            \
    const struct call made = DESCRIBE("fcntl", .descriptor = fd, .command = command);                        \
    const int code = before_call(&made);                                                                     \
    if (code != 0) {                                                                                         \
      errno = code;                                                                                          \
      return -1;                                                                                             \
    }                                                                                                        \
    const int result = NEXT(int, #name, (int, int, ...))(fd, command, argument);                             \
    after_call(&made, result);                                                                               \
    return result;                                                                                           \
  }
FCNTL(fcntl)

/* ---- names */

#define STAT(name, plain, facts_type)                                                                        \
  CALL(int, name, plain, (const char* path, struct facts_type* facts), (path, facts), .path = path)
#define FSTAT(name, facts_type)                                                                              \
  CALL(int, name, "fstat", (int fd, struct facts_type* facts), (fd, facts), .descriptor = fd)
#if !defined(__GLIBC__) || __GLIBC_PREREQ(2, 33) /* before, they were inline functions */
#define HAS_STAT 1
#else
#define HAS_STAT 0
#endif
#if HAS_STAT
STAT(stat, "stat", stat)
STAT(lstat, "lstat", stat)
FSTAT(fstat, stat)
#endif
STAT(statvfs, "statvfs", statvfs)
STAT(statfs, "statfs", statfs)
CALL(int, fstatfs, "fstatfs", (int fd, struct statfs* facts), (fd, facts), .descriptor = fd)
#ifdef STATX_BASIC_STATS
CALL(int, statx, "statx", (int fd, const char* path, int flags, unsigned mask, struct statx* facts),
     (fd, path, flags, mask, facts), .path = path)
#endif
CALL(int, access, "access", (const char* path, int mode), (path, mode), .path = path)
CALL(int, rename, "rename", (const char* from, const char* to), (from, to), .path = from, .new_path = to)
CALL(int, link, "link", (const char* from, const char* to), (from, to), .path = from, .new_path = to)
CALL(int, symlink, "symlink", (const char* text, const char* path), (text, path), .path = path)
CALL(int, unlink, "unlink", (const char* path), (path), .path = path)
CALL(int, remove, "unlink", (const char* path), (path), .path = path)
CALL(int, rmdir, "rmdir", (const char* path), (path), .path = path)
CALL(int, mkdir, "mkdir", (const char* path, mode_t mode), (path, mode), .path = path)
CALL(ssize_t, readlink, "readlink", (const char* path, char* text, size_t count), (path, text, count),
     .path = path)
POINTER(char, realpath, "realpath", (const char* path, char* text), (path, text), .path = path)
POINTER(char, getcwd, "getcwd", (char* text, size_t count), (text, count), .size = count)
POINTER(DIR, opendir, "opendir", (const char* path), (path), .path = path)
POINTER(FILE, fopen, "fopen", (const char* path, const char* mode), (path, mode), .path = path)

/* readdir returns NULL at the end, too. */
#define READDIR(name, entry_type)                                                                            \
  POINTER(struct entry_type, name, "readdir", (DIR * folder), (folder), .path = NULL)
READDIR(readdir, dirent)

/* ---- sockets and threads */

CALL(int, socket, "socket", (int family, int type, int protocol), (family, type, protocol), .command = family)
CALL(int, connect, "connect", (int fd, const struct sockaddr* peer, socklen_t size), (fd, peer, size),
     .descriptor = fd)
CALL(int, getsockopt, "getsockopt", (int fd, int level, int name, void* value, socklen_t* size),
     (fd, level, name, value, size), .descriptor = fd)
CALL(int, setsockopt, "setsockopt", (int fd, int level, int name, const void* value, socklen_t size),
     (fd, level, name, value, size), .descriptor = fd)
CALL(int, shutdown, "shutdown", (int fd, int how), (fd, how), .descriptor = fd)
CALL(int, poll, "poll", (struct pollfd * entries, nfds_t entry_count, int timeout),
     (entries, entry_count, timeout), .size = entry_count)
COUNTED(ssize_t, send, "send", (int fd, const void* bytes, size_t count, int flags),
        (fd, bytes, count, flags), .descriptor = fd, .bytes = bytes)
COUNTED(ssize_t, recv, "recv", (int fd, void* bytes, size_t count, int flags), (fd, bytes, count, flags),
        .descriptor = fd, .command = flags)
CODE(getaddrinfo, "getaddrinfo",
     (const char* host, const char* port, const struct addrinfo* hints, struct addrinfo** found),
     (host, port, hints, found), .path = host)
CODE(pthread_create, "pthread_create",
     (pthread_t * made_thread, const pthread_attr_t* attributes, void* (*function)(void*), void* argument),
     (made_thread, attributes, function, argument), .command = 0)

/* ---- the second names of the GNU C library */

#ifdef __GLIBC__
OPEN(open64)
OPENAT(openat64)
PREAD(pread64, off64_t)
PWRITE(pwrite64, off64_t)
FTRUNCATE(ftruncate64, off64_t)
FALLOCATE(fallocate64, off64_t)
FCNTL(fcntl64)
#if HAS_STAT
STAT(stat64, "stat", stat64)
STAT(lstat64, "lstat", stat64)
FSTAT(fstat64, stat64)
#endif
STAT(statvfs64, "statvfs", statvfs64)
STAT(statfs64, "statfs", statfs64)
CALL(int, fstatfs64, "fstatfs", (int fd, struct statfs64* facts), (fd, facts), .descriptor = fd)
POINTER(FILE, fopen64, "fopen", (const char* path, const char* mode), (path, mode), .path = path)
READDIR(readdir64, dirent64)
#endif
