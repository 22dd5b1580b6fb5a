// Runs one target under libFuzzer; the variable WANDB_FUZZ_TARGET names it. run.sh builds and runs this.
//
// Waiting takes no time: a wait of the library that nobody ends moves a clock of the program's own forward instead.
// SPDX-License-Identifier: MIT
#include <dlfcn.h>
#include <poll.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>

#include "all_targets.hpp"

namespace {

std::atomic<long long> skipped{0};  // nanoseconds that the clock is ahead

const fuzz::target* chosen = nullptr;

long long nanoseconds(const timespec& time) { return time.tv_sec * 1'000'000'000LL + time.tv_nsec; }
timespec from_nanoseconds(long long count) { return {count / 1'000'000'000, count % 1'000'000'000}; }

}  // namespace

extern "C" {

int clock_gettime(clockid_t clock, timespec* time) noexcept {
  if (syscall(SYS_clock_gettime, clock, time) != 0) return -1;
  if (clock == CLOCK_MONOTONIC) *time = from_nanoseconds(nanoseconds(*time) + skipped);
  return 0;
}

int poll(pollfd* descriptors, nfds_t count, int timeout) {
  if (count == 0) {
    skipped += timeout * 1'000'000LL;
    return 0;
  }
  return static_cast<int>(syscall(SYS_poll, descriptors, count, timeout));
}

int pthread_cond_clockwait(pthread_cond_t* condition, pthread_mutex_t* mutex, clockid_t clock,
                           const timespec* until) {
  using function = int (*)(pthread_cond_t*, pthread_mutex_t*, clockid_t, const timespec*);
  static const auto original = reinterpret_cast<function>(dlsym(RTLD_NEXT, "pthread_cond_clockwait"));
  if (clock != CLOCK_MONOTONIC) return original(condition, mutex, clock, until);
  timespec real{};
  syscall(SYS_clock_gettime, clock, &real);
  const long long left = nanoseconds(*until) - skipped - nanoseconds(real);
  const timespec soon = from_nanoseconds(nanoseconds(real) + (left < 200'000 ? left : 200'000));
  const int code = original(condition, mutex, clock, &soon);
  if (code == ETIMEDOUT && left > 200'000) skipped += left - 200'000;
  return code;
}

int LLVMFuzzerInitialize(int*, char***) {
  const char* name = std::getenv("WANDB_FUZZ_TARGET");
  for (const auto& each : fuzz::targets)
    if (name != nullptr && std::strcmp(each.name, name) == 0) chosen = &each;
  if (chosen == nullptr) {
    std::fprintf(stderr, "set WANDB_FUZZ_TARGET to one of:");
    for (const auto& each : fuzz::targets) std::fprintf(stderr, " %s", each.name);
    std::fprintf(stderr, "\n");
    std::exit(2);
  }
  return 0;
}

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fuzz::run(*chosen, {reinterpret_cast<const char*>(data), size});
  return 0;
}
}
