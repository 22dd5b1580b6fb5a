// Makes every allocation of a restore fail in turn, and checks what is left each time.
//
//   allocations [--sample N] [--from-then-on] [KIND...]
//
// For each kind of restore: run it once to count its allocations (malloc, calloc, realloc, aligned allocations, operator new, of
// this program and of the libraries that it uses, in all threads). Then run it again and again; the first allocation fails in the
// first run, the second in the second run, and so on. --sample: only about N runs of each kind. --from-then-on: the later
// allocations of a run fail, too, not only the one.
//
// What is checked after each run: see trial.hpp.
//
// Prints the number of allocations that failed for each kind, and of each outcome. Exit status 1: a check failed; the text of the
// check is on standard error.
//
// SPDX-License-Identifier: MIT
#include <errno.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <map>
#include <new>
#include <string>
#include <vector>

#include "trial.hpp"

// ------------------------------------------------------------------------------------------------- failing allocations

namespace {

std::atomic<bool> is_armed{false}, fails_later_ones{false};
std::atomic<std::uint64_t> allocations{0}, failing{0}, failed{0};

/// Counts an allocation. Returns whether it is to fail.
bool fails() {
  if (!is_armed.load(std::memory_order_relaxed)) return false;
  const auto number = ++allocations;
  const auto first = failing.load(std::memory_order_relaxed);
  if (first == 0 || number < first || (number > first && !fails_later_ones)) return false;
  ++failed;
  errno = ENOMEM;
  return true;
}

}  // namespace

// The GNU C library lets a program replace its allocation functions. Elsewhere, and under sanitizers, which replace them
// themselves, only operator new fails.
#if defined(__GLIBC__) && !TESTS_SANITIZED
#define REPLACES_MALLOC 1
extern "C" {
void* __libc_malloc(std::size_t);
void* __libc_calloc(std::size_t, std::size_t);
void* __libc_realloc(void*, std::size_t);
void* __libc_memalign(std::size_t, std::size_t);

void* malloc(std::size_t size) { return fails() ? nullptr : __libc_malloc(size); }
void* calloc(std::size_t count, std::size_t size) { return fails() ? nullptr : __libc_calloc(count, size); }
void* realloc(void* old, std::size_t size) { return fails() ? nullptr : __libc_realloc(old, size); }
void* memalign(std::size_t alignment, std::size_t size) {
  return fails() ? nullptr : __libc_memalign(alignment, size);
}
void* aligned_alloc(std::size_t alignment, std::size_t size) {
  return fails() ? nullptr : __libc_memalign(alignment, size);
}
int posix_memalign(void** out, std::size_t alignment, std::size_t size) {
  if (fails()) return ENOMEM;
  void* const made = __libc_memalign(alignment, size);
  if (made == nullptr) return ENOMEM;
  *out = made;
  return 0;
}
}
#else
#define REPLACES_MALLOC 0
// Not inline: GCC would warn that free() gets what operator new returned.
[[gnu::noinline]] void* operator new(std::size_t size) {
  void* const made = fails() ? nullptr : std::malloc(size != 0 ? size : 1);
  if (made == nullptr) throw std::bad_alloc();
  return made;
}
void* operator new[](std::size_t size) { return operator new(size); }
// std::stable_sort allocates with these. The sanitizers' own do not call the functions above.
[[gnu::noinline]] void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  return fails() ? nullptr : std::malloc(size != 0 ? size : 1);
}
void* operator new[](std::size_t size, const std::nothrow_t& tag) noexcept { return operator new(size, tag); }
[[gnu::noinline]] void operator delete(void* old) noexcept { std::free(old); }
void operator delete[](void* old) noexcept { std::free(old); }
[[gnu::noinline]] void operator delete(void* old, std::size_t) noexcept { std::free(old); }
void operator delete[](void* old, std::size_t) noexcept { std::free(old); }
#endif

namespace {

class failing_allocations : public faults::failures {
 public:
  /// Selects the allocation that fails. 0: none.
  void next(std::uint64_t number) { number_ = number; }
  void begin() override {
    allocations = failed = 0;
    failing = number_;
    is_armed = true;
  }
  void end() override { is_armed = false; }
  std::uint64_t count() const override { return failed; }
  bool lasts() const override { return fails_later_ones; }
  std::string text() const override { return "allocation " + std::to_string(number_); }
  bool explains(const std::string&) const override { return true; }

 private:
  std::uint64_t number_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
  std::uint64_t sample = 0;
  std::vector<std::string> wanted;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--sample" && i + 1 < argc) {
      sample = std::strtoull(argv[++i], nullptr, 10);
    } else if (argument == "--from-then-on") {
      fails_later_ones = true;
    } else if (argument.rfind("--", 0) == 0) {
      std::cerr << "usage: allocations [--sample N] [--from-then-on] [KIND...]\n";
      return 2;
    } else {
      wanted.push_back(argument);
    }
  }
  signal(SIGPIPE, SIG_IGN);
  const support::temporary_directory folder;
  const faults::servers all(folder.path());
  std::uint64_t sites = 0;
  int violations = 0;
  std::cout << (REPLACES_MALLOC ? "malloc and operator new" : "operator new") << " fail"
            << (fails_later_ones ? ", each with all later ones" : " in turn") << std::endl;
  failing_allocations failures;
  for (const auto& each : faults::all_kinds()) {
    if (!wanted.empty() && std::find(wanted.begin(), wanted.end(), each.name) == wanted.end()) continue;
    faults::trial one(each, all, folder.path(), failures);
    failures.next(0);
    if (one.run() != one.expected())
      std::cerr << each.name << ": fails without a failing allocation\n", ++violations;
    one.run();  // the first run has initialised what the libraries initialise once
    const std::uint64_t total = allocations;
    const std::uint64_t step = sample == 0 ? 1 : (std::max<std::uint64_t>)(1, total / sample);
    std::map<std::string, int> outcomes;
    std::uint64_t runs = 0, number = 1;
    // Threads make the number of allocations vary: go on until none has failed.
    for (;; number += step) {
      failures.next(number);
      const auto outcome = one.run();
      if (failed == 0) break;
      ++outcomes[outcome];
      ++runs;
      one.check_recovery();
    }
    sites += runs;
    violations += one.violations();
    std::cout << each.name << ": " << runs << " of " << number - 1 << " allocations failed";
    for (const auto& [outcome, count] : outcomes) std::cout << ", " << outcome << ' ' << count;
    std::cout << "; violations: " << one.violations() << std::endl;
  }
  std::cout << "allocations that failed: " << sites << ", violations: " << violations << std::endl;
  return violations == 0 && sites > 0 ? 0 : 1;
}
