// Makes every system call of a restore fail in turn, and checks what is left each time.
//
//   system_calls [--sample N] [--call N] [--from-then-on] [--functions] [--each] [KIND...]
//
// For each kind of restore: run it once to count its calls (of the functions in calls.c, in all threads, by the library and the
// libraries that it uses). Then run it again and again; the first call fails in the first runs, once with each error that fits the
// function, then the second, and so on. Functions that read, write or copy also process half of the bytes. A function's calls after
// the 12th (the blocks of a large file) fail once each, with its errors by turns.
//
// --sample: only about N calls of each kind, once each. --call: only the N-th call. --from-then-on: later calls of the same function
// fail, too, if that can last (a full disk, no permission, no descriptors). --functions: print what came of the failures of each
// function. --each: print what came of each failure.
//
// What is checked after each run: see trial.hpp. Also, the outcome must be success, disk_failure or connection_failed, and after a
// single failure in a connection the restore must succeed, since it tries again.
//
// Prints the numbers of calls and of failures for each kind, and of each outcome. Exit status 1: a check failed; the text of the
// check is on standard error.
//
// SPDX-License-Identifier: MIT
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <signal.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <map>
#include <string>
#include <system_error>
#include <vector>

#include "calls.h"
#include "trial.hpp"

namespace {

/// The errors of a function.
struct function_faults {
  const char* function;
  int command;  // 0: any
  bool is_network;
  std::vector<int> codes;
};

const std::vector<function_faults>& all_faults() {
  static const std::vector<function_faults> all = {
      {"open", O_CREAT, false, {ENOSPC, EDQUOT, EACCES, EMFILE, EIO, EINTR, ESTALE, EROFS}},
      {"open", 0, false, {EACCES, EMFILE, EIO, EINTR, ESTALE, ENOMEM}},
      {"fopen", 0, false, {EMFILE, EACCES, EIO}},
      {"close", 0, false, {EIO, EINTR, EDQUOT}},
      {"read", 0, false, {EIO, EINTR, ESTALE, call_half}},
      {"write", 0, false, {EIO, EINTR, ENOSPC, call_half}},
      {"pread", 0, false, {EIO, EINTR, ESTALE, call_half}},
      {"pwrite", 0, false, {ENOSPC, EDQUOT, EIO, EINTR, ESTALE, call_half, call_nothing}},
      {"copy_file_range", 0, false, {EIO, EXDEV, ENOSPC, EINTR, call_half, call_nothing}},
      {"fsync", 0, false, {EIO, EINTR, ENOSPC, EDQUOT}},
      {"fdatasync", 0, false, {EIO, EINTR, ENOSPC, EDQUOT, ESTALE}},
      {"ftruncate", 0, false, {EIO, EINTR, EACCES, ESTALE}},
      {"fallocate", 0, false, {ENOSPC, EDQUOT, EIO, EINTR, EOPNOTSUPP}},
      {"futimens", 0, false, {EACCES, EIO, ESTALE}},
      {"fchmod", 0, false, {EPERM, EIO}},
      {"fcntl", F_SETFD, true, {EIO}},
      {"fcntl", F_SETFL, true, {EIO}},
      {"fcntl", 0, false, {ENOLCK, EINTR, EIO, ENOSYS, EMFILE}},
      {"stat", 0, false, {EIO, EACCES, ESTALE, EINTR}},
      {"lstat", 0, false, {EIO, EACCES, ESTALE, EINTR}},
      {"fstat", 0, false, {EIO, ESTALE, EINTR}},
      {"statx", 0, false, {ENOSYS, EACCES, EIO}},
      {"access", 0, false, {EIO, EACCES}},
      {"statvfs", 0, false, {EIO, ENOSYS, EINTR}},
      {"statfs", 0, false, {EIO, ENOSYS, EINTR}},
      {"fstatfs", 0, false, {EIO, ENOSYS, EINTR}},
      {"rename", 0, false, {EACCES, EIO, EINTR, ENOSPC, EDQUOT, ESTALE, call_lost}},
      {"link", 0, false, {EPERM, EIO, ENOSPC, call_lost}},
      {"symlink", 0, false, {EPERM, EIO, ENOSPC}},
      {"unlink", 0, false, {EACCES, EIO, EBUSY, ESTALE, call_lost}},
      {"rmdir", 0, false, {EACCES, EIO}},
      {"mkdir", 0, false, {EACCES, EIO, ENOSPC, EDQUOT, call_lost}},
      {"readlink", 0, false, {EACCES, EIO}},
      {"realpath", 0, false, {EACCES, EIO}},
      {"getcwd", 0, false, {EACCES, ENOENT}},
      {"opendir", 0, false, {EACCES, EMFILE, EIO}},
      {"readdir", 0, false, {EIO, ESTALE}},
      {"socket", 0, true, {EMFILE, ENOBUFS, EACCES}},
      {"connect", 0, true, {ECONNREFUSED, ENETUNREACH, ETIMEDOUT, EINTR, EACCES}},
      {"getsockopt", 0, true, {ENOBUFS}},
      {"setsockopt", 0, true, {EINVAL, ENOBUFS}},
      {"shutdown", 0, true, {ENOTCONN}},
      {"poll", 0, true, {EINTR, ENOMEM}},
      {"send", 0, true, {EPIPE, ECONNRESET, EINTR, EAGAIN, call_half}},
      {"recv", 0, true, {ECONNRESET, EINTR, EAGAIN, ETIMEDOUT, call_half, call_nothing}},
      {"getaddrinfo", 0, true, {EAI_AGAIN, EAI_FAIL, EAI_MEMORY}},
      {"pthread_create", 0, false, {EAGAIN}},
  };
  return all;
}

/// Whether later calls may fail with the error, too, without an endless loop of a caller that tries again.
bool can_last(int code) {
  return code != EINTR && code != EAGAIN && code != call_half && code != call_nothing && code != call_lost &&
         code != EXDEV;
}

const function_faults* faults_of(const call& made) {
  for (const auto& each : all_faults()) {
    if (std::strcmp(each.function, made.function) != 0) continue;
    const bool is_open = std::strcmp(made.function, "open") == 0;
    if (each.command == 0 || (is_open ? (made.command & O_CREAT) != 0 : made.command == each.command))
      return &each;
  }
  return nullptr;
}

std::atomic<bool> is_armed{false}, fails_later_ones{false};
std::atomic<std::uint64_t> calls{0}, failing{0}, failed{0};
std::atomic<std::size_t> variant{0};
std::atomic<const function_faults*> struck{nullptr};
std::atomic<int> struck_code{0}, struck_turn{0};
std::array<std::atomic<int>, 64> turns{};  // the number of calls of each function

/// Returns how often the function was called in this restore.
std::atomic<int>& turns_of(const function_faults* faults) {
  return turns[static_cast<std::size_t>(faults - all_faults().data())];
}

/// A pause of the library: not a site.
bool is_pause(const call& made) { return std::strcmp(made.function, "poll") == 0 && made.size == 0; }

std::string name_of(int code, bool is_resolver) {
  if (code == call_half) return "half";
  if (code == call_nothing) return "nothing";
  if (code == call_lost) return "made, but EIO";
  return is_resolver ? gai_strerror(code) : std::generic_category().message(code);
}

class failing_calls : public faults::failures {
 public:
  /// Selects the call that fails, and which of the errors that fit it. 0: none.
  void next(std::uint64_t number, std::size_t error) { number_ = number, error_ = error; }
  void begin() override {
    calls = failed = 0;
    for (auto& each : turns) each = 0;
    struck = nullptr;
    failing = number_;
    variant = error_;
    is_armed = true;
  }
  void end() override { is_armed = false; }
  std::uint64_t count() const override { return failed; }
  bool lasts() const override { return fails_later_ones; }
  std::string text() const override {
    std::string named = "call " + std::to_string(number_) + ", error " + std::to_string(error_);
    if (const auto* const faults = struck.load()) {
      named += std::string(" (") + faults->function + ": " +
               name_of(struck_code, std::strcmp(faults->function, "getaddrinfo") == 0) + ')';
    }
    return named;
  }
  bool explains(const std::string& outcome) const override {
    const auto* const faults = struck.load();
    if (outcome == "success") return true;
    // The file of certificates is an argument.
    if (outcome == "invalid_argument") return std::strcmp(faults->function, "fopen") == 0;
    if (fails_later_ones) return outcome == "disk_failure" || outcome == "connection_failed";
    return !faults->is_network && outcome == "disk_failure";
  }
  /// After a failed sync the kernel may have dropped bytes.
  bool may_lose_bytes() const override {
    const auto* const faults = struck.load();
    return faults != nullptr && std::strcmp(faults->function, "fdatasync") == 0;
  }

 private:
  std::uint64_t number_ = 0;
  std::size_t error_ = 0;
};

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

int before_call(const call* made) {
  if (!is_armed.load(std::memory_order_relaxed) || is_pause(*made)) return 0;
  const function_faults* const faults = faults_of(*made);
  if (faults == nullptr) return 0;
  const auto number = ++calls;
  const int turn = ++turns_of(faults);
  const auto first = failing.load(std::memory_order_relaxed);
  if (first == 0 || number < first) return 0;
  if (number == first) {
    struck_code = faults->codes[variant % faults->codes.size()];
    struck_turn = turn;
    struck = faults;
  } else if (!fails_later_ones || struck.load() != faults || !can_last(struck_code)) {
    return 0;
  }
  ++failed;
  return struck_code;
}

void after_call(const call*, long long) {}

int main(int argc, char** argv) {
  std::uint64_t sample = 0, only = 0;
  bool shows_functions = false, shows_each = false;
  std::vector<std::string> wanted;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--sample" && i + 1 < argc) {
      sample = std::strtoull(argv[++i], nullptr, 10);
    } else if (argument == "--call" && i + 1 < argc) {
      only = std::strtoull(argv[++i], nullptr, 10);
    } else if (argument == "--from-then-on") {
      fails_later_ones = true;
    } else if (argument == "--functions") {
      shows_functions = true;
    } else if (argument == "--each") {
      shows_each = true;
    } else if (argument.rfind("--", 0) == 0) {
      std::cerr << "usage: system_calls [--sample N] [--call N] [--from-then-on] [--functions] [--each] "
                   "[KIND...]\n";
      return 2;
    } else {
      wanted.push_back(argument);
    }
  }
  signal(SIGPIPE, SIG_IGN);
  const support::temporary_directory folder;
  const faults::servers all(folder.path());
  std::uint64_t sites = 0, runs_of_all = 0;
  int violations = 0;
  std::map<std::string, std::map<std::string, int>> by_function;
  failing_calls failures;
  double longest = 0;
  for (const auto& each : faults::all_kinds()) {
    if (!wanted.empty() && std::find(wanted.begin(), wanted.end(), each.name) == wanted.end()) continue;
    faults::trial one(each, all, folder.path(), failures);
    if (fails_later_ones) one.set_timeouts(std::chrono::seconds(2));
    failures.next(0, 0);
    if (one.run() != one.expected())
      std::cerr << each.name << ": fails without a failing call\n", ++violations;
    one.run();
    const std::uint64_t total = calls;
    const std::uint64_t step = sample == 0 ? 1 : (std::max<std::uint64_t>)(1, total / sample);
    std::map<std::string, int> outcomes;
    std::uint64_t runs = 0, number = (std::max<std::uint64_t>)(1, only);
    const auto began = seconds();
    // Threads make the number of calls vary: go on until none has failed.
    for (bool is_reached = true; is_reached && (only == 0 || number == only); number += step) {
      // The errors by turns, so that a function's later calls meet all of them.
      const std::size_t first = number / step;
      for (std::size_t error = first, end = first + 1; error < end; ++error) {
        failures.next(number, error);
        const auto start = seconds();
        const auto outcome = one.run();
        longest = (std::max)(longest, seconds() - start);
        const function_faults* const hit = struck;
        is_reached = hit != nullptr;
        if (!is_reached) break;
        if (sample == 0 && struck_turn <= 12) end = first + hit->codes.size();
        if (shows_each)
          std::cout << each.name << ", " << failures.text() << ": " << outcome << ' ' << one.message()
                    << '\n';
        ++outcomes[outcome];
        ++by_function[hit->function][outcome];
        ++runs;
        one.check_recovery();
      }
    }
    sites += only != 0 ? 1 : number - 1 - step;
    runs_of_all += runs;
    violations += one.violations();
    std::cout << each.name << ": " << total << " calls, " << runs << " failures";
    for (const auto& [outcome, count] : outcomes) std::cout << ", " << outcome << ' ' << count;
    std::cout << "; violations: " << one.violations() << " (" << seconds() - began << " s)" << std::endl;
  }
  if (shows_functions) {
    for (const auto& [function, outcomes] : by_function) {
      std::cout << function << ':';
      for (const auto& [outcome, count] : outcomes) std::cout << ' ' << outcome << ' ' << count;
      std::cout << '\n';
    }
  }
  std::cout << "longest restore: " << longest << " s\n";
  std::cout << "system calls that failed: " << sites << ", failures: " << runs_of_all
            << ", violations: " << violations << std::endl;
  return violations == 0 && sites > 0 ? 0 : 1;
}
