/* Replaces functions of the C library in a program that links calls.c: the program sees each of its calls before and after it is
 * made, and can make it fail. This includes the calls of the libraries that the program uses, but not those that the C library
 * makes itself.
 *
 * SPDX-License-Identifier: MIT */
#ifndef WANDB_RESTORE_TESTS_FAULTS_CALLS_H
#define WANDB_RESTORE_TESTS_FAULTS_CALLS_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* A call of a function. */
struct call {
  const char* function;  /* "open", also for open64 */
  int descriptor;        /* of functions that take one */
  int command;           /* of open: the flags; of fcntl: the command */
  const char* path;      /* NULL: the function takes none */
  const char* new_path;  /* of rename and link */
  const void* bytes;     /* of functions that write */
  size_t size;           /* of functions that read, write or copy: the number of bytes */
  long long offset;      /* of pwrite, fallocate and copy_file_range; of ftruncate: the new size */
  int second_descriptor; /* of copy_file_range: the destination */
};

enum {
  call_half = 100001,    /* read, write or copy half of the bytes, at least one */
  call_nothing = 100002, /* return 0 */
  call_lost = 100003     /* make the call, but return EIO: the answer of a remote disk is lost */
};

/* Defined by the program. Called before each call. Returns 0 to make it, one of the constants, or the error to fail with: an errno
 * value; of getaddrinfo, its own code. */
int before_call(const struct call* made);
/* Defined by the program. Called after each call, unless it failed by before_call. `result`: what it returned; of functions that
 * return a pointer, 0 or -1. Must not change errno. */
void after_call(const struct call* made, long long result);

#ifdef __cplusplus
}
#endif

#endif
