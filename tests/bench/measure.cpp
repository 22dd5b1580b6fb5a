// Runs a program and writes its time, memory and I/O as one line of JSON.
//
//   measure [--kill-after SECONDS] OUTPUT PROGRAM [ARGUMENT...]
//
// Fields: seconds; user and system (CPU seconds); peak_kib (resident memory); read_bytes and written_bytes (by system calls,
// without sockets); switches (voluntary context switches); status (exit status, or 128 + n after signal n). Until exec, the
// kernel counts the parent's memory as the child's, so this program uses little.
// SPDX-License-Identifier: MIT
#include <fcntl.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

double now() {
  timespec time{};
  clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

double seconds_of(timeval time) {
  return static_cast<double>(time.tv_sec) + 1e-6 * static_cast<double>(time.tv_usec);
}

// Reads a counter of a child from /proc. The kernel keeps the counters of a dead child until waitpid.
long long account_of(pid_t child, const char* field) {
  char name[64];
  std::snprintf(name, sizeof name, "/proc/%d/io", static_cast<int>(child));
  std::FILE* file = std::fopen(name, "r");
  if (file == nullptr) return -1;
  char key[32];
  long long value = -1;
  while (std::fscanf(file, "%31s %lld", key, &value) == 2 && std::strcmp(key, field) != 0) value = -1;
  std::fclose(file);
  return value;
}

}  // namespace

int main(int argc, char** argv) {
  double kill_after = 0;
  int at = 1;
  if (argc > 2 && std::strcmp(argv[1], "--kill-after") == 0) {
    kill_after = std::atof(argv[2]);
    at = 3;
  }
  if (argc < at + 2) {
    std::fputs("usage: measure [--kill-after SECONDS] OUTPUT PROGRAM [ARGUMENT...]\n", stderr);
    return 2;
  }

  const double begin = now();
  const pid_t child = vfork();
  if (child < 0) return std::perror("measure: fork"), 2;
  if (child == 0) {
    execvp(argv[at + 1], argv + at + 1);
    _exit(127);
  }
  if (kill_after > 0) {
    const int handle = static_cast<int>(syscall(SYS_pidfd_open, child, 0));
    pollfd ended{handle, POLLIN, 0};
    if (handle < 0 || poll(&ended, 1, static_cast<int>(kill_after * 1000)) == 0) kill(child, SIGKILL);
    if (handle >= 0) close(handle);
  }
  siginfo_t dead{};
  while (waitid(P_PID, static_cast<id_t>(child), &dead, WEXITED | WNOWAIT) != 0) {}
  const double end = now();
  const long long read_bytes = account_of(child, "rchar:"), written_bytes = account_of(child, "wchar:");
  int status = 0;
  rusage used{};
  while (wait4(child, &status, 0, &used) != child) {}
  const int code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);

  std::FILE* out = std::fopen(argv[at], "w");
  if (out == nullptr) return std::perror("measure: output"), 2;
  std::fprintf(
      out,
      "{\"seconds\": %.6f, \"user\": %.6f, \"system\": %.6f, \"peak_kib\": %ld, \"read_bytes\": %lld, "
      "\"written_bytes\": %lld, \"switches\": %ld, \"status\": %d}\n",
      end - begin, seconds_of(used.ru_utime), seconds_of(used.ru_stime), used.ru_maxrss, read_bytes,
      written_bytes, used.ru_nvcsw, code);
  std::fclose(out);
  return code;
}
