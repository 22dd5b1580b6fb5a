// Shared by the programs that make operations of a restore fail: a server in a child process, the kinds of restores, and what is
// checked after each.
//
// After each restore:
// - the call has returned, or thrown wandb::error or std::bad_alloc; within a minute;
// - a stream that it returned has exactly the right content;
// - the visible file is the old one, or the new one, or absent if there was none;
// - a resumed download has lost no bytes that had arrived before;
// - nothing else is outside of the library's hidden files; no thread and no descriptor is left;
// - the same restore without a failure succeeds, and leaves no hidden file.
//
// The stand-in server runs in a child process, so that all operations of this one are the client's.
//
// SPDX-License-Identifier: MIT
#ifndef WANDB_RESTORE_TESTS_FAULTS_TRIAL_HPP
#define WANDB_RESTORE_TESTS_FAULTS_TRIAL_HPP

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
#include <thread>
#include <utility>
#include <vector>

#include "stand_in.hpp"
#include "support.hpp"
#include "wandb_restore.hpp"

namespace faults {

namespace fs = std::filesystem;
using namespace std::chrono_literals;

constexpr std::uint64_t small_size = 150'001, large_size = 9 * 1024 * 1024 + 7;
constexpr std::uint64_t stalled_size = 3 * 1024 * 1024;
constexpr std::uint64_t old_seed = 1, new_seed = 2;

// ------------------------------------------------------------------------------------------------------- failures

/// Makes operations of this process fail.
class failures {
 public:
  virtual ~failures() = default;
  /// Begins to count the operations of a restore, and to make the chosen ones fail. Allocates no memory.
  virtual void begin() = 0;
  virtual void end() = 0;
  /// Returns the number of operations that failed since begin().
  virtual std::uint64_t count() const = 0;
  /// Names the failure, for messages.
  virtual std::string text() const = 0;
  /// Whether a restore may end with this outcome, "success" or an error, after the failure.
  virtual bool explains(const std::string& outcome) const = 0;
  /// Whether bytes of an earlier download may be lost after the failure.
  virtual bool may_lose_bytes() const { return false; }
  /// Whether later operations fail, too. Then a restore may be unable to tell that the writer of a hidden file has ended: a call
  /// removes the file an hour later.
  virtual bool lasts() const { return false; }
};

/// Ends the program with this message unless alarm(0) is called within five minutes.
inline void begin_deadline(const std::string& text) {
  static char message[256];
  std::snprintf(message, sizeof message, "%s: the call does not return\n", text.c_str());
  signal(SIGALRM, [](int) {
    (void)!write(2, message, std::strlen(message));
    _exit(1);
  });
  alarm(300);
}

// ------------------------------------------------------------------------------------------------------- the server

struct server_facts {
  std::string base_url, key, ca;
};

/// Stand-ins in a child process that ends with this one: plain, with TLS, and plain but stalling after 3 MiB of each answer.
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
    for (auto* each : {&plain, &secure, &stalling}) {
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

  server_facts plain, secure, stalling;

 private:
  [[noreturn]] static void serve(const fs::path& folder, int facts, int life) {
    {
      stand_in::options without_tls;
      without_tls.service_tls = without_tls.storage_tls = false;
      stand_in::server plain_server(without_tls), secure_server, stalling_server(without_tls);
      stalling_server.add_fault(stand_in::place::storage, stand_in::act::stall(stalled_size));
      std::string text;
      for (auto* each : {&plain_server, &secure_server, &stalling_server}) {
        const auto run = each->add_run("e", "p", "r");
        each->add_file(run, "small.bin", stand_in::generated(small_size, new_seed));
        each->add_file(run, "large.bin", stand_in::generated(large_size, new_seed));
        stand_in::file_attributes unknown;
        unknown.md5_as = stand_in::md5_form::null;
        unknown.size_as = stand_in::size_form::null;
        each->add_file(run, "unknown.bin", stand_in::generated(small_size, new_seed), unknown);
        each->add_file(each->add_run("e", "p", "another"), "small.bin",
                       stand_in::generated(small_size, old_seed));
        const auto ca = folder / (each == &secure_server ? "secure.pem" : "none.pem");
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
  bool was_killed = false;         ///< the process of that download was killed
  bool has_no_directory = false;   ///< the directory is not there before
  bool reads = false;              ///< reads parts of the file remotely instead
  bool is_of_another_run = false;  ///< the old content was restored from another run, and has a receipt
};

inline std::vector<kind> all_kinds() {
  using wandb::cache_policy;
  std::vector<kind> all{
      {"fresh, small", "small.bin"},
      {"fresh, split", "large.bin"},
      {"fresh, size and md5 unknown", "unknown.bin"},
      {"fresh, in a new directory", "small.bin", false, false, false, false, false, cache_policy::keep(),
       false, true},
      {"resumed, split", "large.bin", false, false, false, true},
      {"replaced, small", "small.bin", false, true, false, false, false, cache_policy::replace()},
      {"replaced, split", "large.bin", false, true, false, false, false, cache_policy::replace()},
      {"refreshed, changed", "small.bin", false, true, false, false, false, cache_policy::refresh()},
      {"refreshed, unchanged", "small.bin", false, false, true, false, false, cache_policy::refresh()},
      {"kept", "small.bin", false, true},
      {"listed", "", false, false, false, false, true},
      {"fresh, over TLS", "small.bin", true},
      {"read remotely", "large.bin"}};
  all.back().reads = true;
  all.push_back({"kept, of another run", "small.bin", false, true});
  all.back().is_of_another_run = true;
#if !TESTS_SANITIZED  // see support.hpp: forks
  all.push_back({"resumed after a kill, split", "large.bin", false, false, false, true, false,
                 cache_policy::keep(), true});
#endif
  return all;
}

/// A root before a restore, as files to copy.
using files = std::map<std::string, std::string>;

inline files read_files(const fs::path& folder) {
  files read;
  if (!fs::exists(folder)) return read;
  for (const auto& entry : fs::directory_iterator(folder))
    read[entry.path().filename().string()] = support::read_file(entry.path());
  return read;
}

inline bool is_hidden(const std::string& name) { return name.rfind(".wandb-restore-", 0) == 0; }

inline std::size_t entries_in(const char* folder) {
  std::size_t count = 0;
  if (DIR* const opened = opendir(folder)) {
    while (readdir(opened) != nullptr) ++count;
    closedir(opened);
  }
  return count;
}

/// Downloads the first third of the large file. Then cancels the restore, or, if `is_killed`, kills its process.
inline void make_partial(const servers& all, wandb::settings settings, wandb::restore_options options,
                         bool is_killed) {
  settings.base_url = all.stalling.base_url;
  settings.api_key = all.stalling.key;
  options.connections = 1;
  options.on_progress = [is_killed](const wandb::progress& now) {
    if (now.bytes_done < stalled_size) return true;
    if (is_killed) kill(getpid(), SIGKILL);
    return false;
  };
  const pid_t child = is_killed ? fork() : 0;
  if (child == 0) (void)wandb::client<>(settings).try_restore("large.bin", options);
  if (child == 0 && is_killed) _exit(0);
  if (is_killed) waitpid(child, nullptr, 0);
  std::size_t parts = 0;
  for (const auto& [name, bytes] : read_files(options.root)) parts += name.find(".part") != name.npos;
  if (child >= 0 && parts == 1) return;
  std::cerr << "no partial file was made\n";
  std::exit(1);
}

class trial {
 public:
  trial(const kind& which, const servers& all, const fs::path& folder, failures& source)
      : failures_(source), servers_(all), kind_(which),
        root_(which.has_no_directory ? folder / "root" / "new" / "one" : folder / "root"),
        cache_(folder / "cache") {
    const auto& facts = which.is_secure ? all.secure : all.plain;
    settings_.base_url = facts.base_url;
    settings_.api_key = facts.key;
    settings_.ca_file = facts.ca;
    settings_.cache_dir = cache_;
    set_timeouts(20s);
    settings_.on_warning = [this](std::string_view) { has_warned_ = true; };
    options_.run_path = "e/p/r";
    options_.root = root_;
    options_.cache = which.policy;
    const std::uint64_t size = which.file == std::string("large.bin") ? large_size : small_size;
    old_content_ = stand_in::read_text(*stand_in::generated(size, old_seed));
    new_content_ = stand_in::read_text(*stand_in::generated(size, new_seed));
    std::thread([] {}).join();  // a sanitizer starts a thread of its own with the first one
    prepare();
  }

  /// Returns the outcome of the restore without a failure.
  std::string expected() const { return kind_.is_of_another_run ? "local_conflict" : "success"; }

  /// Runs the restore under failures. Returns "success", or the error.
  std::string run() {
    reset();
    has_warned_ = false;
    const auto descriptors = entries_in("/proc/self/fd"), threads = entries_in("/proc/self/task");
    std::string outcome = "success";
    begin_deadline(kind_.name + (", " + failures_.text()));
    std::optional<wandb::error> failure;
    std::optional<wandb::restored_file> restored;
    bool is_bad_alloc = false, is_unknown = false;
    {
      // The strings and functions of the options are copied before.
      const wandb::settings settings = settings_;
      auto options = options_;
      std::string buffer(large_read, '\0');
      wandb::remote_file file;
      failures_.begin();
      try {
        wandb::client<> client(settings);
        if (kind_.reads) {
          failure = read_parts(client, options, file, buffer);
        } else if (kind_.lists) {
          if (auto got = client.try_list_files(options); !got) failure = got.error();
        } else if (auto got = client.try_restore(kind_.file, options)) {
          restored.emplace(*std::move(got));
        } else {
          failure = got.error();
        }
      } catch (const std::bad_alloc&) {
        is_bad_alloc = true;
      } catch (...) {
        is_unknown = true;
      }
      failures_.end();
      // A file that was opened can be read after a failure.
      if (file.size() != 0 && (!read_part(file, 0, buffer, 100) || !read_part(file, 5, buffer, large_read)))
        report("the remote file is of no use afterwards");
    }
    alarm(0);
    if (restored) check_content(*std::exchange(restored, std::nullopt), "");
    message_ = failure ? failure->what() : "";
    if (failure) outcome = wandb::to_string(failure->code());
    if (is_bad_alloc) outcome = "bad_alloc";
    if (is_unknown) report("another exception than std::bad_alloc");
    if (entries_in("/proc/self/fd") != descriptors) report("a descriptor is left");
    for (int tries = 0; tries < 100'000 && entries_in("/proc/self/task") > threads; ++tries)
      sched_yield();  // the system may list a thread for a moment after it was joined
    if (entries_in("/proc/self/task") > threads) report("a thread is left");
    if (failures_.count() == 0 && outcome != expected()) report("nothing failed, but " + outcome);
    if (failures_.count() != 0 && outcome != expected() && !failures_.explains(outcome))
      report("the outcome is " + outcome + ": " + message_);
    if (kind_.is_of_another_run && outcome == "success" && !has_warned_)
      report("another run's file was returned without a warning");
    check_files(outcome);
    return outcome;
  }

  /// Runs the restore without a failure on what a run() has left.
  void check_recovery() {
    try {
      wandb::client<> client(settings_);
      if (kind_.lists) {
        if (auto got = client.try_list_files(options_); !got || got->size() != 3)
          report("the list is wrong afterwards");
        return;
      }
      if (kind_.reads) {
        std::string buffer(large_read, '\0');
        wandb::remote_file file;
        if (read_parts(client, options_, file, buffer)) report("cannot be read afterwards");
        return;
      }
      auto got = client.try_restore(kind_.file, options_);
      if (kind_.is_of_another_run) {
        if (got || got.error().code() != wandb::errc::local_conflict)
          report("afterwards: the file of another run is not recognised");
      } else if (!got) {
        return report(std::string("afterwards: ") + got.error().what());
      } else {
        check_content(*std::move(got), "afterwards: ");
      }
    } catch (const std::exception& failure) {
      report(std::string("afterwards: ") + failure.what());
    }
    if (failures_.lasts() && read_files(root_).size() > 1) {
      for (const auto& entry : fs::directory_iterator(root_)) {
        if (is_hidden(entry.path().filename().string()))
          fs::last_write_time(entry.path(), fs::last_write_time(entry.path()) - 2h);
      }
      if (!wandb::client<>(settings_).try_restore(kind_.file, options_)) report("fails two hours later");
    }
    for (const auto& [name, text] : read_files(root_))
      if (name != kind_.file) report("afterwards: " + name + " is left");
  }

  /// How long a restore may go without progress.
  void set_timeouts(std::chrono::milliseconds time) {
    settings_.connect_timeout = settings_.idle_timeout = settings_.retry_timeout = time;
  }
  int violations() const { return violations_; }
  /// The text of the error of the last run(); empty after a success.
  const std::string& message() const { return message_; }

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
  std::optional<wandb::error> read_parts(wandb::client<>& client, const wandb::restore_options& options,
                                         wandb::remote_file& file, std::string& buffer) {
    auto opened = client.try_open(kind_.file, options);
    if (!opened) return opened.error();
    file = *std::move(opened);
    for (const std::size_t length : {std::size_t{100}, large_read}) {
      const auto count = file.try_read_at(1000, buffer.data(), length);
      if (!count) return count.error();
    }
    auto in = file.stream();
    in.seekg(500'000);
    for (int i = 0; i < 100; ++i) in.read(buffer.data(), 1000);
    if (const wandb::error* failure = in.failure()) return *failure;
    return std::nullopt;
  }

  void report(const std::string& text) {
    if (++violations_ <= 20) std::cerr << kind_.name << ", " << failures_.text() << ": " << text << std::endl;
  }

  void check_content(wandb::restored_file file, const std::string& when) {
    const bool is_kept = std::string(kind_.name).rfind("kept", 0) == 0;
    const std::string content(std::istreambuf_iterator<char>(file), {});
    if (content != (is_kept ? old_content_ : new_content_)) report(when + "wrong content");
    if (file.verified() && content != new_content_) report(when + "the content is verified, but wrong");
  }
  void check_files(const std::string& outcome) {
    bool is_visible = false, has_part = false;
    for (const auto& [name, text] : read_files(root_)) {
      has_part = has_part || name.find(".part") != name.npos;
      if (is_hidden(name)) continue;
      is_visible = is_visible || name == kind_.file;
      const bool is_old = kind_.has_old && text == old_content_;
      if (name != kind_.file || !(is_old || text == new_content_)) report(name + " has a wrong content");
      const bool is_replaced = kind_.has_old && std::string(kind_.name).rfind("kept", 0) != 0;
      if (outcome == "success" && is_replaced && is_old) report("success, but the file is the old one");
    }
    if (!is_visible &&
        (kind_.has_old || kind_.has_new || (outcome == "success" && !kind_.lists && !kind_.reads)))
      report("the file is missing");
    if (kind_.has_partial && !is_visible && !has_part && !failures_.may_lose_bytes())
      report("the bytes that had arrived are lost");
  }

  bool has_receipt() const { return kind_.has_new || kind_.is_of_another_run; }
  /// Makes the files that are there before each run.
  void prepare() {
    fs::remove_all(root_);
    fs::remove_all(cache_);
    fs::create_directories(kind_.has_no_directory ? root_.parent_path().parent_path() : root_);
    fs::create_directories(cache_);
    if (kind_.has_old) support::write_file(root_ / kind_.file, old_content_);
    if (has_receipt()) {
      auto options = options_;
      if (kind_.is_of_another_run) options.run_path = "e/p/another";
      options.cache = wandb::cache_policy::replace();
      (void)wandb::client<>(settings_).try_restore(kind_.file, options);
    }
    if (kind_.has_partial) make_partial(servers_, settings_, options_, kind_.was_killed);
    before_ = read_files(root_);
  }
  void reset() {
    if (kind_.has_no_directory) return void(fs::remove_all(root_.parent_path()));
    for (const auto& entry : fs::directory_iterator(root_)) {
      const std::string name = entry.path().filename().string();
      if (has_receipt() && before_.count(name) != 0) continue;  // the receipt has its time of modification
      fs::remove(entry.path());
    }
    if (has_receipt() && fs::exists(root_ / kind_.file)) return;
    for (const auto& [name, text] : before_) support::write_file(root_ / name, text);
  }

  failures& failures_;
  const servers& servers_;
  const kind kind_;
  const fs::path root_, cache_;
  wandb::settings settings_;
  wandb::restore_options options_;
  std::string old_content_, new_content_, message_;
  files before_;
  std::atomic<bool> has_warned_{false};
  int violations_ = 0;
};

}  // namespace faults

#endif  // WANDB_RESTORE_TESTS_FAULTS_TRIAL_HPP
