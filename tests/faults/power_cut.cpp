// Simulates power cuts during a restore: records what the restore does to the disk, and puts back each state that a file system may
// hold after a cut.
//
//   power_cut [--sample N] [--seed N] [KIND...]
//
// For each kind of restore: record its writes, changes of size, syncs and changes of names, in all threads. Then cut after each of
// these operations. The model of what is on the disk after a cut:
// - names (files created, renamed and removed) are those after some earlier operation: changes of names get there in their order, and
//   all before a sync of a directory are there;
// - the content of a file is that of its last sync; of each later operation on it all, nothing, zeros, or some of its pages are
//   there, whatever is there of the names.
// For each cut several such states are made: everything; the synced content only; sizes, but zeros in place of the unsynced bytes;
// the last write only; a prefix that ends within a write; pages by chance; and the latter two with older names. Equal states count once.
// What processes wrote into names and lock files belongs to another boot of the machine then.
//
// In each state the visible file must be the old one, or exactly the new one, or absent if there was none; it must be the new one if
// the restore had returned. A restore over the state must return the new content, and leave no hidden file if the cut was an hour ago.
//
// --sample: only about N states of each kind. Prints the seed and the number of states of each kind. Exit status 1: a check failed;
// the text of the check is on standard error.
//
// SPDX-License-Identifier: MIT
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iostream>
#include <iterator>
#include <map>
#include <mutex>
#include <random>
#include <regex>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "calls.h"
#include "trial.hpp"

namespace {

namespace fs = std::filesystem;

// ------------------------------------------------------------------------------------------------------- the recorder

enum class action {
  create,
  make_directory,
  rename,
  remove,
  write,
  resize,
  extend,
  set_time,
  sync,
  sync_directory
};

/// What the restore has done to the disk.
struct operation {
  action what;
  int file = -1;               // its number
  std::string name, new_name;  // of changes of names
  std::uint64_t offset = 0;    // of write; the size of resize and extend
  std::string bytes;           // of write
  timespec time{};             // of set_time
};

/// A disk: files by number, and their names.
struct names_of_disk {
  std::map<std::string, int> files;
  std::set<std::string> directories;

  void apply(const operation& done) {
    if (done.what == action::create) files[done.name] = done.file;
    if (done.what == action::make_directory) directories.insert(done.name);
    if (done.what == action::remove && files.erase(done.name) == 0) directories.erase(done.name);
    if (done.what != action::rename) return;
    const auto moved = files.find(done.name);
    if (moved == files.end()) return;
    const int file = moved->second;
    files.erase(moved);
    files[done.new_name] = file;
  }
};

/// Records the operations of this process below a folder.
class recorder {
 public:
  std::vector<operation> operations;
  names_of_disk names;
  std::string folder;
  bool is_on = false;

  /// Returns whether the call changes the disk. Then the mutex is locked until after().
  bool before(const call& made) {
    static const std::set<std::string_view> functions{
        "open",      "close",     "pwrite", "write", "ftruncate", "fsync", "unlink",         "rmdir",
        "fdatasync", "fallocate", "rename", "mkdir", "futimens",  "link",  "copy_file_range"};
    if (!is_on || functions.count(made.function) == 0) return false;
    mutex_.lock();
    return true;
  }
  void after(const call& made, long long result) {
    if (result >= 0) take(made, result);
    mutex_.unlock();
  }

 private:
  void take(const call& made, long long result) {
    const std::string_view function = made.function;
    const std::string path = made.path != nullptr ? made.path : "";
    const bool is_ours = path.compare(0, folder.size(), folder) == 0;
    if (function == "open") return open(path, static_cast<int>(result), made.command);
    if (function == "close")
      return void((opened_.erase(made.descriptor), directories_.erase(made.descriptor)));
    if (function == "mkdir" && is_ours) return add({action::make_directory, -1, path, {}, 0, {}, {}});
    if ((function == "unlink" || function == "rmdir") && is_ours)
      return add({action::remove, -1, path, {}, 0, {}, {}});
    if (function == "rename" && is_ours) return add({action::rename, -1, path, made.new_path, 0, {}, {}});
    if (function == "link" && is_ours) std::abort();  // the header makes none: not in the model
    if (directories_.count(made.descriptor) != 0) {
      if (function == "fsync") add({action::sync_directory, -1, {}, {}, 0, {}, {}});
      return;
    }
    const auto opened =
        opened_.find(function == "copy_file_range" ? made.second_descriptor : made.descriptor);
    if (opened == opened_.end()) return;
    const int file = opened->second;
    const auto offset = static_cast<std::uint64_t>(made.offset);
    const auto count = static_cast<std::size_t>(result);
    if (function == "pwrite")
      add({action::write, file, {}, {}, offset, {static_cast<const char*>(made.bytes), count}, {}});
    if (function == "write") std::abort();  // the header writes at offsets: not in the model
    if (function == "copy_file_range") {
      std::string bytes(count, '\0');
      if (pread(opened->first, bytes.data(), count, static_cast<off_t>(offset)) != result) std::abort();
      add({action::write, file, {}, {}, offset, std::move(bytes), {}});
    }
    if (function == "ftruncate") add({action::resize, file, {}, {}, offset, {}, {}});
    if (function == "fallocate") add({action::extend, file, {}, {}, offset + made.size, {}, {}});
    if (function == "fsync" || function == "fdatasync") add({action::sync, file, {}, {}, 0, {}, {}});
    if (function == "futimens") {
      struct stat facts;
      if (fstat(made.descriptor, &facts) != 0) std::abort();
      add({action::set_time, file, {}, {}, 0, {}, facts.st_mtim});
    }
  }
  void open(const std::string& path, int descriptor, int flags) {
    opened_.erase(descriptor);
    directories_.erase(descriptor);
    if (path.compare(0, folder.size(), folder) != 0) return;
    if (names.directories.count(path) != 0) return void(directories_.insert(descriptor));
    if (names.files.count(path) == 0) {
      if ((flags & O_CREAT) == 0) std::abort();  // a file that this does not know
      add({action::create, next_file_++, path, {}, 0, {}, {}});
    }
    opened_[descriptor] = names.files[path];
  }
  void add(operation done) {
    names.apply(done);
    operations.push_back(std::move(done));
  }

  std::mutex mutex_;
  std::map<int, int> opened_;  // descriptors of files
  std::set<int> directories_;  // descriptors of directories
  int next_file_ = 1000;       // those that are there before have lower numbers
};

recorder the_recorder;
thread_local bool is_recorded = false;

}  // namespace

int before_call(const call* made) {
  const int code = errno;
  is_recorded = the_recorder.before(*made);
  errno = code;
  return 0;
}

void after_call(const call* made, long long result) {
  if (!is_recorded) return;
  is_recorded = false;
  const int code = errno;
  the_recorder.after(*made, result);
  errno = code;
}

namespace {

// --------------------------------------------------------------------------------------------------------- the states

/// What is left of the operations on a file after its last sync.
enum class survival { everything, nothing, zeros, last_write, prefix, pages };

struct content {
  std::string bytes;
  timespec time{};
};

class disk {
 public:
  explicit disk(std::map<int, content> before) : synced_(std::move(before)) {}

  void apply(const operation& done) {
    if (done.what == action::sync) {
      synced_[done.file] = left_of(done.file, survival::everything, nullptr);
      unsynced_[done.file].clear();
    } else if (done.what == action::write || done.what == action::resize || done.what == action::extend ||
               done.what == action::set_time) {
      unsynced_[done.file].push_back(&done);
    }
  }
  bool has_unsynced() const {
    return std::any_of(unsynced_.begin(), unsynced_.end(),
                       [](const auto& each) { return !each.second.empty(); });
  }
  content left_of(int file, survival how, std::mt19937_64* dice) const {
    content left;
    if (const auto found = synced_.find(file); found != synced_.end()) left = found->second;
    const auto pending = unsynced_.find(file);
    if (pending == unsynced_.end() || how == survival::nothing) return left;
    const auto& done = pending->second;
    const std::size_t kept = how == survival::prefix ? (*dice)() % (done.size() + 1) : done.size();
    for (std::size_t i = 0; i < kept; ++i) {
      const operation& one = *done[i];
      if (one.what == action::set_time) left.time = one.time;
      if (one.what == action::resize) left.bytes.resize(one.offset);
      if (one.what == action::extend)
        left.bytes.resize((std::max<std::size_t>)(left.bytes.size(), one.offset));
      if (one.what != action::write) continue;
      std::string_view bytes = one.bytes;
      if (how == survival::prefix && i + 1 == kept) bytes = bytes.substr(0, (*dice)() % (bytes.size() + 1));
      left.bytes.resize((std::max<std::size_t>)(left.bytes.size(), one.offset + bytes.size()));
      if (how == survival::zeros || (how == survival::last_write && i + 1 < kept)) continue;
      for (std::size_t at = 0; at < bytes.size();) {
        const std::size_t count = (std::min)(page - (one.offset + at) % page, bytes.size() - at);
        if (how != survival::pages || (*dice)() % 2 == 0)
          left.bytes.replace(one.offset + at, count, bytes.substr(at, count));
        at += count;
      }
    }
    return left;
  }

 private:
  static constexpr std::size_t page = 4096;
  std::map<int, content> synced_;
  std::map<int, std::vector<const operation*>> unsynced_;
};

class cutting {
 public:
  cutting(const faults::kind& which, const faults::servers& all, const fs::path& folder, std::uint64_t seed)
      : servers_(all), kind_(which),
        root_(which.has_no_directory ? folder / "root" / "new" / "one" : folder / "root"),
        cache_(folder / "cache"), folder_(folder), dice_(seed) {
    settings_.base_url = all.plain.base_url;
    settings_.api_key = all.plain.key;
    settings_.cache_dir = cache_;
    settings_.on_warning = [](std::string_view) {};
    options_.run_path = "e/p/r";
    options_.root = root_;
    options_.cache = which.policy;
    const std::uint64_t size =
        which.file == std::string("large.bin") ? faults::large_size : faults::small_size;
    old_content_ = stand_in::read_text(*stand_in::generated(size, faults::old_seed));
    new_content_ = stand_in::read_text(*stand_in::generated(size, faults::new_seed));
  }

  /// Runs the restore, and records it.
  void record() {
    fs::remove_all(folder_);
    fs::create_directories(kind_.has_no_directory ? root_.parent_path().parent_path() : root_);
    fs::create_directories(cache_);
    if (kind_.has_old) support::write_file(root_ / kind_.file, old_content_);
    if (kind_.has_partial) faults::make_partial(servers_, settings_, options_, kind_.was_killed);
    int number = 0;
    for (const auto& entry : fs::recursive_directory_iterator(folder_)) {
      if (entry.is_directory()) {
        before_.directories.insert(entry.path().string());
        continue;
      }
      struct stat facts;
      if (stat(entry.path().c_str(), &facts) != 0) std::abort();
      before_.files[entry.path().string()] = number;
      contents_[number++] = {support::read_file(entry.path()), facts.st_mtim};
    }
    the_recorder.operations.clear();
    the_recorder.names = before_;
    the_recorder.folder = folder_.string();
    the_recorder.is_on = true;
    auto got = wandb::client<>(settings_).try_restore(kind_.file, options_);
    the_recorder.is_on = false;
    if (!got) report(std::string("the recorded restore fails: ") + got.error().what());
    operations_ = std::move(the_recorder.operations);
  }

  /// Makes the states. Calls `take` for one out of `step`.
  void run(std::uint64_t step) {
    names_of_disk names = before_;
    disk now(contents_);
    std::vector<names_of_disk> since_sync{names};  // the states of the names that may be there
    for (std::size_t cut = 0; cut <= operations_.size(); ++cut) {
      cut_ = cut;
      if (cut > 0) {
        const operation& done = operations_[cut - 1];
        names.apply(done);
        now.apply(done);
        if (done.what == action::sync_directory) since_sync.clear();
        if (done.what <= action::remove || since_sync.empty()) since_sync.push_back(names);
      }
      for (const auto how : {survival::everything, survival::nothing, survival::zeros, survival::last_write,
                             survival::prefix, survival::pages, survival::pages}) {
        consider(names, now, how, step);
        if (how != survival::everything && !now.has_unsynced()) break;
      }
      for (const auto how : {survival::prefix, survival::pages})
        if (since_sync.size() > 1) consider(since_sync[dice_() % since_sync.size()], now, how, step);
    }
  }
  std::uint64_t states() const { return states_; }
  std::uint64_t checked() const { return checked_; }
  std::size_t operations() const { return operations_.size(); }
  int violations() const { return violations_; }
  void print_visible() const {
    std::cout << "visible: the old file " << is_old_ << ", the new one " << is_new_ << ", none "
              << is_absent_;
  }

 private:
  void consider(const names_of_disk& names, const disk& now, survival how, std::uint64_t step) {
    std::map<std::string, content> files;
    std::string key;
    for (const auto& [name, file] : names.files) {
      const content& left = files[name] = now.left_of(file, how, &dice_);
      key += name + ' ' + std::to_string(std::hash<std::string>()(left.bytes)) + ' ' +
             std::to_string(left.time.tv_nsec) + '\n';
    }
    for (const auto& each : names.directories) key += each + '\n';
    if (!seen_.insert(std::hash<std::string>()(key)).second) return;
    if (states_++ % step != 0) return;
    ++checked_;
    // Just now: the hidden files may belong to a process on another machine. Two hours ago: their writers are gone.
    const bool is_long_ago = dice_() % 4 != 0;
    put(names, files, is_long_ago);
    check(is_long_ago);
  }

  void put(const names_of_disk& names, const std::map<std::string, content>& files, bool is_long_ago) {
    fs::remove_all(folder_);
    for (const auto& each : names.directories) fs::create_directories(each);
    for (const auto& [name, left] : files) {
      fs::path where = name;
      std::string file_name = where.filename().string(), bytes = left.bytes;
      // The first half of a realm is the boot: "-<realm>.<process>.<start>.<serial>.part", and a lock file's text.
      static const std::regex writer("-([0-9a-f]{8})([0-9a-f]{8}[.][0-9]+[.][0-9]+[.][0-9]+[.]part)$");
      file_name = std::regex_replace(file_name, writer, "-00000000$2");
      if (file_name.size() > 5 && file_name.compare(file_name.size() - 5, 5, ".lock") == 0)
        bytes.replace(0, (std::min<std::size_t>)(8, bytes.size()), (std::min<std::size_t>)(8, bytes.size()),
                      '0');
      where.replace_filename(file_name);
      if (!fs::is_directory(where.parent_path())) continue;  // its directory is not there
      support::write_file(where, bytes);
      timespec times[2]{left.time, left.time};
      if (faults::is_hidden(file_name)) {
        const auto hours = std::chrono::hours(is_long_ago ? 2 : 0);
        times[1].tv_sec = std::chrono::system_clock::to_time_t(std::chrono::system_clock::now() - hours);
      } else if (left.time.tv_sec == 0) {
        continue;
      }
      if (utimensat(AT_FDCWD, where.c_str(), times, 0) != 0) std::abort();
    }
  }

  void check(bool is_long_ago) {
    const fs::path visible = root_ / kind_.file;
    const bool is_there = fs::exists(visible);
    const std::string text = is_there ? support::read_file(visible) : std::string();
    const bool is_new = is_there && text == new_content_,
               is_old = is_there && kind_.has_old && text == old_content_;
    if (is_there && !is_new && !is_old) report("the visible file has a wrong content");
    if (!is_there && kind_.has_old) report("the old file is lost");
    if (cut_ == operations_.size() && !is_new) report("the restore had returned, but its file is not there");
    ++(is_new ? is_new_ : is_old ? is_old_ : is_absent_);
    faults::begin_deadline(kind_.name + std::string(": a restore after the cut"));
    auto got = wandb::client<>(settings_).try_restore(kind_.file, options_);
    alarm(0);
    if (!got) return report(std::string("afterwards: ") + got.error().what());
    if (std::string(std::istreambuf_iterator<char>(*got), {}) != new_content_)
      report("afterwards: wrong content");
    for (const auto& [name, ignored] : faults::read_files(root_)) {
      if (name == kind_.file || (faults::is_hidden(name) && !is_long_ago)) continue;
      report("afterwards: " + name + " is left");
    }
  }
  void report(const std::string& text) {
    if (++violations_ <= 20) {
      std::cerr << kind_.name << ", cut after operation " << cut_ << " of " << operations_.size()
                << ", state " << states_ << ": " << text << std::endl;
    }
  }

  const faults::servers& servers_;
  const faults::kind kind_;
  const fs::path root_, cache_, folder_;
  std::mt19937_64 dice_;
  wandb::settings settings_;
  wandb::restore_options options_;
  std::string old_content_, new_content_;
  names_of_disk before_;
  std::map<int, content> contents_;
  std::vector<operation> operations_;
  std::set<std::size_t> seen_;
  std::size_t cut_ = 0;
  std::uint64_t states_ = 0, checked_ = 0, is_old_ = 0, is_new_ = 0, is_absent_ = 0;
  int violations_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
  std::uint64_t sample = 0, seed = std::random_device()();
  std::vector<std::string> wanted;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if ((argument == "--sample" || argument == "--seed") && i + 1 < argc) {
      (argument == "--seed" ? seed : sample) = std::strtoull(argv[++i], nullptr, 10);
    } else if (argument.rfind("--", 0) == 0) {
      std::cerr << "usage: power_cut [--sample N] [--seed N] [KIND...]\n";
      return 2;
    } else {
      wanted.push_back(argument);
    }
  }
  signal(SIGPIPE, SIG_IGN);
  const support::temporary_directory folder;
  fs::create_directories(folder / "place");
  const faults::servers all(folder.path());
  std::cout << "seed: " << seed << std::endl;
  std::uint64_t states = 0;
  int violations = 0;
  for (const auto& each : faults::all_kinds()) {
    if (each.lists || each.is_secure || each.has_new || std::string(each.name).rfind("kept", 0) == 0)
      continue;  // they write nothing new
    if (!wanted.empty() && std::find(wanted.begin(), wanted.end(), each.name) == wanted.end()) continue;
    cutting one(each, all, folder / "place", seed);
    one.record();
    constexpr std::uint64_t per_operation = 6;  // states, about
    one.run(sample == 0 ? 1 : (std::max<std::uint64_t>)(1, one.operations() * per_operation / sample));
    states += one.checked();
    violations += one.violations();
    std::cout << each.name << ": " << one.operations() << " operations, " << one.checked() << " of "
              << one.states() << " states; ";
    one.print_visible();
    std::cout << "; violations: " << one.violations() << std::endl;
  }
  std::cout << "states: " << states << ", violations: " << violations << std::endl;
  return violations == 0 && states > 0 ? 0 : 1;
}
