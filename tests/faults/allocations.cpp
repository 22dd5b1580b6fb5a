// Makes every allocation of a restore fail in turn, and checks what is left each time.
//
//   allocations [--sample N] [--from-then-on] [KIND...]
//
// For each kind of restore: run it once to count its allocations (malloc, calloc, realloc, aligned allocations, operator new, of
// this program and of the libraries that it uses, in all threads). Then run it again and again; the first allocation fails in the
// first run, the second in the second run, and so on. --sample: only about N runs of each kind. --from-then-on: the later
// allocations of a run fail, too, not only the one.
//
// After each run:
// - the call has returned, or thrown wandb::error or std::bad_alloc; within a minute;
// - the visible file is the old one, or the new one, or absent if there was none;
// - a resumed download has lost no bytes that had arrived before;
// - nothing else is outside of the library's hidden files; no thread and no descriptor is left;
// - the same restore without a failure succeeds, and leaves no hidden file.
//
// Prints the number of allocations that failed for each kind, and of each outcome. Exit status 1: a check failed; the text of the
// check is on standard error.
//
// The stand-in server runs in a child process, so that all allocations of this one are the client's.
//
// SPDX-License-Identifier: MIT
#include <dirent.h>
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <map>
#include <new>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "stand_in.hpp"
#include "support.hpp"
#include "wandb_restore.hpp"

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
void* operator new(std::size_t size) {
  void* const made = fails() ? nullptr : std::malloc(size != 0 ? size : 1);
  if (made == nullptr) throw std::bad_alloc();
  return made;
}
void* operator new[](std::size_t size) { return operator new(size); }
void operator delete(void* old) noexcept { std::free(old); }
void operator delete[](void* old) noexcept { std::free(old); }
void operator delete(void* old, std::size_t) noexcept { std::free(old); }
void operator delete[](void* old, std::size_t) noexcept { std::free(old); }
#endif

namespace {

namespace fs = std::filesystem;
using namespace std::chrono_literals;

constexpr std::uint64_t small_size = 150'001, large_size = 9 * 1024 * 1024 + 7;
constexpr std::uint64_t old_seed = 1, new_seed = 2;

// ------------------------------------------------------------------------------------------------------- the server

struct server_facts {
  std::string base_url, key, ca;
};

/// Two stand-ins, plain and TLS, in a child process that ends with this one.
class servers {
 public:
  explicit servers(const fs::path& folder) {
    int facts[2], life[2];
    if (pipe(facts) != 0 || pipe(life) != 0) std::abort();
    child_ = fork();
    if (child_ == 0) {
      close(facts[0]);
      close(life[1]);
      serve(folder, facts[1], life[0]);
    }
    close(facts[1]);
    close(life[0]);
    life_ = life[1];
    std::string text;
    char bytes[4096];
    for (ssize_t count; (count = read(facts[0], bytes, sizeof bytes)) > 0;)
      text.append(bytes, static_cast<std::size_t>(count));
    close(facts[0]);
    std::istringstream lines(text);
    for (auto* each : {&plain, &secure}) {
      std::getline(lines, each->base_url);
      std::getline(lines, each->key);
      std::getline(lines, each->ca);
    }
  }
  ~servers() {
    close(life_);
    waitpid(child_, nullptr, 0);
  }
  servers(const servers&) = delete;
  servers& operator=(const servers&) = delete;

  server_facts plain, secure;

 private:
  [[noreturn]] static void serve(const fs::path& folder, int facts, int life) {
    {
      stand_in::options without_tls;
      without_tls.service_tls = without_tls.storage_tls = false;
      stand_in::server plain_server(without_tls), secure_server;
      std::string text;
      for (auto* each : {&plain_server, &secure_server}) {
        const auto run = each->add_run("e", "p", "r");
        each->add_file(run, "small.bin", stand_in::generated(small_size, new_seed));
        each->add_file(run, "large.bin", stand_in::generated(large_size, new_seed));
        stand_in::file_attributes unknown;
        unknown.md5_as = stand_in::md5_form::null;
        unknown.size_as = stand_in::size_form::null;
        each->add_file(run, "unknown.bin", stand_in::generated(small_size, new_seed), unknown);
        const auto ca = folder / (each == &plain_server ? "plain.pem" : "secure.pem");
        each->write_ca(ca);
        text += each->base_url() + '\n' + each->key() + '\n' + ca.string() + '\n';
      }
      if (write(facts, text.data(), text.size()) != static_cast<ssize_t>(text.size())) _exit(1);
      close(facts);
      char end;
      while (read(life, &end, 1) > 0) {}
    }
    _exit(0);
  }

  pid_t child_ = -1;
  int life_ = -1;
};

// --------------------------------------------------------------------------------------------------- kinds of restores

struct kind {
  const char* name;
  const char* file;
  bool is_secure = false;
  bool has_old = false;      ///< another content is in the file's place before
  bool has_new = false;      ///< the content is in the file's place before, with a receipt
  bool has_partial = false;  ///< a part of the content was downloaded before
  bool lists = false;        ///< lists the run's files instead
  wandb::cache_policy policy = wandb::cache_policy::keep();
  bool reads = false;  ///< reads parts of the file remotely instead
};

std::vector<kind> all_kinds() {
  using wandb::cache_policy;
  return {{"fresh, small", "small.bin"},
          {"fresh, split", "large.bin"},
          {"fresh, size and md5 unknown", "unknown.bin"},
          {"resumed, split", "large.bin", false, false, false, true},
          {"replaced, small", "small.bin", false, true, false, false, false, cache_policy::replace()},
          {"replaced, split", "large.bin", false, true, false, false, false, cache_policy::replace()},
          {"refreshed, changed", "small.bin", false, true, false, false, false, cache_policy::refresh()},
          {"refreshed, unchanged", "small.bin", false, false, true, false, false, cache_policy::refresh()},
          {"kept", "small.bin", false, true},
          {"listed", "", false, false, false, false, true},
          {"fresh, over TLS", "small.bin", true},
          {"read remotely", "large.bin", false, false, false, false, false, cache_policy::keep(), true}};
}

/// A root before a restore, as files to copy.
using files = std::map<std::string, std::string>;

files read_files(const fs::path& folder) {
  files read;
  for (const auto& entry : fs::directory_iterator(folder))
    read[entry.path().filename().string()] = support::read_file(entry.path());
  return read;
}

extern "C" void end_hang(int) {
  char text[64];
  const int size = std::snprintf(text, sizeof text, "allocation %llu: the call does not return\n",
                                 static_cast<unsigned long long>(failing.load()));
  (void)!write(2, text, static_cast<std::size_t>(size));
  _exit(1);
}

bool is_hidden(const std::string& name) { return name.rfind(".wandb-restore-", 0) == 0; }

std::size_t entries_in(const char* folder) {
  std::size_t count = 0;
  if (DIR* const opened = opendir(folder)) {
    while (readdir(opened) != nullptr) ++count;
    closedir(opened);
  }
  return count;
}

class trial {
 public:
  trial(const kind& which, const servers& all, const fs::path& folder)
      : kind_(which), root_(folder / "root"), cache_(folder / "cache") {
    const auto& facts = which.is_secure ? all.secure : all.plain;
    settings_.base_url = facts.base_url;
    settings_.api_key = facts.key;
    settings_.ca_file = facts.ca;
    settings_.cache_dir = cache_;
    settings_.connect_timeout = settings_.idle_timeout = settings_.retry_timeout = 20s;
    settings_.on_warning = [](std::string_view) {};
    options_.run_path = "e/p/r";
    options_.root = root_;
    options_.cache = which.policy;
    const std::uint64_t size = which.file == std::string("large.bin") ? large_size : small_size;
    old_content_ = stand_in::read_text(*stand_in::generated(size, old_seed));
    new_content_ = stand_in::read_text(*stand_in::generated(size, new_seed));
    prepare();
  }

  /// Runs the restore with a failing allocation; 0: none fails. Returns what came of it.
  std::string run(std::uint64_t number) {
    reset();
    const auto descriptors = entries_in("/proc/self/fd"), threads = entries_in("/proc/self/task");
    std::string outcome = "success";
    alarm(60);  // end_hang() ends the program
    allocations = failed = 0;
    failing = number;
    wandb::errc code{};
    bool is_bad_alloc = false, is_unknown = false;
    {
      // The strings and functions of the options are copied before.
      const wandb::settings settings = settings_;
      auto options = options_;
      std::string buffer(large_read, '\0');
      wandb::remote_file file;
      is_armed = true;
      try {
        wandb::client<> client(settings);
        if (kind_.reads) {
          code = read_parts(client, options, file, buffer);
        } else if (kind_.lists) {
          if (auto got = client.try_list_files(options); !got) code = got.error().code();
        } else if (auto got = client.try_restore(kind_.file, options); !got) {
          code = got.error().code();
        }
      } catch (const std::bad_alloc&) {
        is_bad_alloc = true;
      } catch (...) {
        is_unknown = true;
      }
      is_armed = false;
      // A file that was opened can be read after a lack of memory.
      if (file.size() != 0 && (!read_part(file, 0, buffer, 100) || !read_part(file, 5, buffer, large_read)))
        report(number, "the remote file is of no use afterwards");
    }
    alarm(0);
    if (code != wandb::errc{}) outcome = wandb::to_string(code);
    if (is_bad_alloc) outcome = "bad_alloc";
    if (is_unknown) report(number, "another exception than std::bad_alloc");
    if (entries_in("/proc/self/fd") != descriptors) report(number, "a descriptor is left");
    for (int tries = 0; tries < 100'000 && entries_in("/proc/self/task") > threads; ++tries)
      sched_yield();  // the system may list a thread for a moment after it was joined
    if (entries_in("/proc/self/task") > threads) report(number, "a thread is left");
    if (failed == 0 && outcome != "success") report(number, "no allocation failed, but " + outcome);
    check_files(number, outcome);
    return outcome;
  }

  /// Runs the restore without a failure on what a run() has left.
  void check_recovery(std::uint64_t number) {
    try {
      wandb::client<> client(settings_);
      if (kind_.lists) {
        if (auto got = client.try_list_files(options_); !got || got->size() != 3)
          report(number, "the list is wrong afterwards");
        return;
      }
      if (kind_.reads) {
        std::string buffer(large_read, '\0');
        wandb::remote_file file;
        if (read_parts(client, options_, file, buffer) != wandb::errc{})
          report(number, "cannot be read afterwards");
        return;
      }
      const bool keeps = kind_.has_old && std::string(kind_.name) == "kept";
      auto got = client.try_restore(kind_.file, options_);
      if (!got) return report(number, std::string("afterwards: ") + got.error().what());
      const std::string content(std::istreambuf_iterator<char>(*got), {});
      if (content != (keeps ? old_content_ : new_content_)) report(number, "afterwards: wrong content");
    } catch (const std::exception& failure) {
      report(number, std::string("afterwards: ") + failure.what());
    }
    for (const auto& [name, text] : read_files(root_))
      if (name != kind_.file) report(number, "afterwards: " + name + " is left");
  }

  int violations() const { return violations_; }

 private:
  static constexpr std::size_t large_read = 300'000;  // bytes: past the cache

  bool read_part(const wandb::remote_file& file, std::uint64_t offset, std::string& buffer,
                 std::size_t length) {
    const auto count = file.try_read_at(offset, buffer.data(), length);
    if (!count) std::cerr << count.error().what() << '\n';
    return count && *count == length &&
           new_content_.compare(static_cast<std::size_t>(offset), length, buffer, 0, length) == 0;
  }
  /// Reads a small part, a large one, and through a stream.
  wandb::errc read_parts(wandb::client<>& client, const wandb::restore_options& options,
                         wandb::remote_file& file, std::string& buffer) {
    auto opened = client.try_open(kind_.file, options);
    if (!opened) return opened.error().code();
    file = *std::move(opened);
    for (const std::size_t length : {std::size_t{100}, large_read}) {
      const auto count = file.try_read_at(1000, buffer.data(), length);
      if (!count) return count.error().code();
    }
    auto in = file.stream();
    in.exceptions(std::ios::badbit);
    in.seekg(500'000);
    for (int i = 0; i < 100; ++i) in.read(buffer.data(), 1000);
    return {};
  }

  void report(std::uint64_t number, const std::string& text) {
    if (++violations_ <= 20) std::cerr << kind_.name << ", allocation " << number << ": " << text << '\n';
  }

  void check_files(std::uint64_t number, const std::string& outcome) {
    bool is_visible = false, has_part = false;
    for (const auto& [name, text] : read_files(root_)) {
      has_part = has_part || name.find(".part") != name.npos;
      if (is_hidden(name)) continue;
      is_visible = is_visible || name == kind_.file;
      const bool is_old = kind_.has_old && text == old_content_;
      if (name != kind_.file || !(is_old || text == new_content_))
        report(number, name + " has a wrong content");
      const bool is_replaced = kind_.has_old && std::string(kind_.name) != "kept";
      if (outcome == "success" && is_replaced && is_old)
        report(number, "success, but the file is the old one");
    }
    if (!is_visible &&
        (kind_.has_old || kind_.has_new || (outcome == "success" && !kind_.lists && !kind_.reads)))
      report(number, "the file is missing");
    if (kind_.has_partial && !is_visible && !has_part) report(number, "the bytes that had arrived are lost");
  }

  /// Makes the files that are there before each run.
  void prepare() {
    fs::remove_all(root_);
    fs::remove_all(cache_);
    fs::create_directories(root_);
    fs::create_directories(cache_);
    if (kind_.has_old) support::write_file(root_ / kind_.file, old_content_);
    if (kind_.has_new || kind_.has_partial) {
      auto options = options_;
      options.cache = wandb::cache_policy::replace();
      if (kind_.has_partial) {
        options.connections = 1;
        options.on_progress = [](const wandb::progress& now) { return now.bytes_done < large_size / 2; };
        settings_.idle_timeout = 20s;
      }
      (void)wandb::client<>(settings_).try_restore(kind_.file, options);
    }
    before_ = read_files(root_);
    if (kind_.has_partial && before_.empty()) {
      std::cerr << "no partial file was made\n";
      std::exit(1);
    }
  }
  void reset() {
    for (const auto& entry : fs::directory_iterator(root_)) {
      const std::string name = entry.path().filename().string();
      if (kind_.has_new && before_.count(name) != 0) continue;  // the receipt has its time of modification
      fs::remove(entry.path());
    }
    if (kind_.has_new && fs::exists(root_ / kind_.file)) return;
    for (const auto& [name, text] : before_) support::write_file(root_ / name, text);
  }

  kind kind_;
  const fs::path root_, cache_;
  wandb::settings settings_;
  wandb::restore_options options_;
  std::string old_content_, new_content_;
  files before_;
  int violations_ = 0;
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
  signal(SIGALRM, end_hang);
  const support::temporary_directory folder;
  const servers all(folder.path());
  std::uint64_t sites = 0;
  int violations = 0;
  std::cout << (REPLACES_MALLOC ? "malloc and operator new" : "operator new") << " fail"
            << (fails_later_ones ? ", each with all later ones" : " in turn") << std::endl;
  for (const auto& each : all_kinds()) {
    if (!wanted.empty() && std::find(wanted.begin(), wanted.end(), each.name) == wanted.end()) continue;
    trial one(each, all, folder.path());
    if (one.run(0) != "success")
      std::cerr << each.name << ": fails without a failing allocation\n", ++violations;
    one.run(0);  // the first run has initialised what the libraries initialise once
    const std::uint64_t total = allocations;
    const std::uint64_t step = sample == 0 ? 1 : (std::max<std::uint64_t>)(1, total / sample);
    std::map<std::string, int> outcomes;
    std::uint64_t runs = 0, number = 1;
    // Threads make the number of allocations vary: go on until none has failed.
    for (;; number += step) {
      const auto outcome = one.run(number);
      if (failed == 0) break;
      ++outcomes[outcome];
      ++runs;
      one.check_recovery(number);
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
