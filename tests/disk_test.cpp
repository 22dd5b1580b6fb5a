// The library's files on disk: partial files and their owners, locks, receipts, and the publication of a file.
//
// These classes are in the implementation part of the header: this file compiles it inline, in the inline namespace of that
// build mode. The rest of the program is not affected.
#undef WANDB_RESTORE_SPLIT
#include "wandb_restore.hpp"

#if defined(CTRL) || defined(CEOF) || defined(TIOCGWINSZ) || defined(ECHO)
#error "the header leaks macros of <sys/ioctl.h>"
#endif

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <fstream>
#include <functional>
#include <iterator>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "support.hpp"

#ifndef _WIN32
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/stat.h>
#ifdef __linux__
#include <sched.h>
#include <sys/mount.h>
#include <sys/syscall.h>
#endif
#include <sys/wait.h>
#include <unistd.h>

namespace {

namespace fs = std::filesystem;
using support::read_file;
using support::temporary_directory;
using support::write_file;
using wandb::detail::check_replaceable;
using wandb::detail::facts_of;
using wandb::detail::owner;
using wandb::detail::partial_file;
using wandb::detail::place;
using wandb::detail::place_lock;
using wandb::detail::remove_abandoned_partials;
using wandb::detail::stream_on;

std::vector<wandb::detail::found_partial> partials_of(const place& destination) {
  return wandb::detail::find_partials(destination).found;
}

const std::string md5 = "900150983cd24fb0d6963f7d28e17f72";
const std::string other_md5 = "0123456789abcdef0123456789abcdef";
constexpr std::uint64_t block = partial_file::block;
constexpr std::uint64_t size = 3 * block + 100;  // four blocks, the last one short

std::string block_text(std::uint64_t index, char salt = 'a') {
  return std::string(static_cast<std::size_t>(index == 3 ? 100 : block),
                     static_cast<char>(salt + static_cast<char>(index)));
}
void fill(partial_file& file, std::uint64_t first, std::uint64_t last, char salt = 'a') {
  for (auto i = first; i < last; ++i) REQUIRE(file.write(i * block, block_text(i, salt)).has_value());
  REQUIRE(file.record(first, last).has_value());
}
std::unique_ptr<partial_file> must(wandb::result<std::unique_ptr<partial_file>> made) {
  REQUIRE(made.has_value());
  return *std::move(made);
}
std::string content_at(const partial_file& file, std::uint64_t index) {
  std::string text(block_text(index).size(), '\0');
  REQUIRE(file.content().read_at(index * block, text.data(), text.size()) ==
          static_cast<std::int64_t>(text.size()));
  return text;
}
std::size_t files_in(const fs::path& directory) {
  return static_cast<std::size_t>(std::distance(fs::directory_iterator(directory), fs::directory_iterator()));
}
void set_age(const fs::path& where, std::int64_t seconds) {
  timespec now{};
  clock_gettime(CLOCK_REALTIME, &now);
  now.tv_sec -= seconds;
  const timespec times[2] = {now, now};
  REQUIRE(utimensat(AT_FDCWD, where.c_str(), times, 0) == 0);
}

/// A child process that runs `body`, reports its end, and then waits until it is killed. After the fork it uses only system
/// calls and this library.
class process {
 public:
  explicit process(const std::function<void()>& body) {
    int ready[2];
    REQUIRE(pipe(ready) == 0);
    id_ = fork();
    REQUIRE(id_ >= 0);
    if (id_ == 0) {
      body();
      (void)!write(ready[1], "x", 1);
      for (;;) pause();
    }
    ::close(ready[1]);
    char told = 0;
    const bool began = read(ready[0], &told, 1) == 1;
    ::close(ready[0]);
    REQUIRE(began);
  }
  ~process() { end(); }
  process(const process&) = delete;
  process& operator=(const process&) = delete;

  pid_t id() const { return id_; }
  /// Kills the process without waiting for it: a zombie.
  void kill_only() {
    kill(id_, SIGKILL);
    siginfo_t what{};
    REQUIRE(waitid(P_PID, static_cast<id_t>(id_), &what, WEXITED | WNOWAIT) == 0);
  }
  void end() {
    if (id_ <= 0) return;
    kill(id_, SIGKILL);
    waitpid(id_, nullptr, 0);
    id_ = -1;
  }

 private:
  pid_t id_ = -1;
};

/// Leaves a partial file with some blocks, as a killed process does.
fs::path leave_killed(const place& at, const std::string& what, std::uint64_t first, std::uint64_t last) {
  std::vector<fs::path> before;
  for (const auto& one : partials_of(at)) before.push_back(one.where);
  {
    process other([&] {
      auto made = partial_file::create(at, what, size);
      if (!made) _exit(1);
      for (auto i = first; i < last; ++i) (void)(*made)->write(i * block, block_text(i));
      (void)(*made)->record(first, last);
      (void)made->release();
    });
  }
  for (const auto& one : partials_of(at)) {
    if (std::find(before.begin(), before.end(), one.where) == before.end()) return one.where;
  }
  FAIL("no partial file was left");
  return {};
}

/// Runs a function as another user. Returns false with a message if the test does not run as root.
bool as_another_user(const std::function<void()>& body) {
  if (geteuid() != 0) {
    MESSAGE("left out: to act as another user needs root");
    return false;
  }
  REQUIRE(seteuid(65534) == 0);
  body();
  REQUIRE(seteuid(0) == 0);
  return true;
}

/// Returns the receipt of a file; an empty one if there is none or it cannot be read.
wandb::detail::receipt receipt_for(const fs::path& cache, const fs::path& target,
                                   const wandb::detail::file_facts& now) {
  return wandb::detail::read_receipt(cache, target, now).value_or(wandb::detail::receipt());
}

}  // namespace

TEST_SUITE("partial files") {
  TEST_CASE("a new partial file is hidden and empty; its owner removes it") {
    const temporary_directory directory;
    const place at(directory / "model.h5");
    {
      const auto made = must(partial_file::create(at, md5, size));
      CHECK(made->blocks() == 4);
      for (std::uint64_t i = 0; i < 4; ++i) CHECK_FALSE(made->has(i));
      CHECK(made->where().filename().string().front() == '.');
      CHECK(made->where().parent_path() == directory.path());
      CHECK(partials_of(at).size() == 1);
      CHECK_FALSE(partials_of(at).front().abandoned());
    }
    CHECK(files_in(directory.path()) == 0);
  }

  TEST_CASE("a released partial file is resumed from its recorded blocks, on the same inode") {
    const temporary_directory directory;
    const place at(directory / "model.h5");
    auto first = must(partial_file::open(at, md5, size));
    fill(*first, 1, 2);
    fill(*first, 3, 4);
    const auto inode = first->content().facts()->inode;
    first->release(at, md5);
    first.reset();
    REQUIRE(partials_of(at).size() == 1);
    CHECK(partials_of(at).front().released);

    const auto second = must(partial_file::open(at, md5, size));
    CHECK(second->content().facts()->inode == inode);
    CHECK_FALSE(second->has(0));
    CHECK(second->has(1));
    CHECK_FALSE(second->has(2));
    CHECK(second->has(3));
    CHECK(content_at(*second, 1) == block_text(1));
    CHECK(content_at(*second, 3) == block_text(3));
    CHECK(partials_of(at).size() == 1);
  }

  TEST_CASE("release removes a partial file without blocks or without an md5") {
    const temporary_directory directory;
    const place at(directory / "model.h5");
    auto empty = must(partial_file::create(at, md5, size));
    empty->release(at, md5);
    empty.reset();
    CHECK(files_in(directory.path()) == 0);
    auto unknown = must(partial_file::create(at, "", size));
    fill(*unknown, 0, 4);
    unknown->release(at, "");
    unknown.reset();
    CHECK(files_in(directory.path()) == 0);
  }

  TEST_CASE("a partial file of another content, target or size is not resumed") {
    const temporary_directory directory;
    const place at(directory / "model.h5");
    const auto leave = [&](const place& where, const std::string& what, std::uint64_t how_long) {
      auto left = must(partial_file::create(where, what, how_long));
      REQUIRE(left->record(0, 1).has_value());
      left->release(where, what);
    };
    const auto check_nothing = [&](std::size_t partials) {
      const auto mine = must(partial_file::open(at, md5, size));
      for (std::uint64_t i = 0; i < 4; ++i) CHECK_FALSE(mine->has(i));
      CHECK(partials_of(at).size() == partials);
    };
    leave(place(directory / "other.h5"), md5, size);
    check_nothing(1);
    leave(at, other_md5, size);
    check_nothing(2);  // the own file, and that of the other content, which may still be resumed
    for (const std::uint64_t another : {size + block, size + 1, block}) {
      leave(at, md5, another);
      check_nothing(2);
    }
    CHECK(partials_of(place(directory / "other.h5")).size() == 1);
  }

  TEST_CASE("of two released partial files the one with more blocks stays") {
    const temporary_directory directory;
    const place at(directory / "model.h5");
    auto more = must(partial_file::create(at, md5, size)), less = must(partial_file::create(at, md5, size));
    fill(*more, 0, 3);
    fill(*less, 3, 4);
    more->release(at, md5);
    less->release(at, md5);
    less.reset();
    REQUIRE(partials_of(at).size() == 1);
    const auto mine = must(partial_file::open(at, md5, size));
    CHECK(mine->has(2));
    CHECK_FALSE(mine->has(3));
  }

  TEST_CASE(
      "of several partial files of killed owners the fullest is resumed; the others' blocks are copied") {
    const temporary_directory directory;
    const place at(directory / "model.h5");
    leave_killed(at, md5, 0, 1);
    const fs::path fullest = leave_killed(at, md5, 1, 3);
    leave_killed(at, md5, 3, 4);
    const auto inode = facts_of(fullest)->inode;
    const auto mine = must(partial_file::open(at, md5, size));
    CHECK(mine->content().facts()->inode == inode);
    for (std::uint64_t i = 0; i < 4; ++i) {
      CAPTURE(i);
      REQUIRE(mine->has(i));
      CHECK((content_at(*mine, i) == block_text(i)));
    }
    CHECK(partials_of(at).size() == 1);
  }

  TEST_CASE("a torn, foreign or missing record is ignored") {
    const temporary_directory directory;
    const place at(directory / "model.h5");
    const auto spoil = [&](const std::function<void(const fs::path&)>& how) {
      auto left = must(partial_file::create(at, md5, size));
      fill(*left, 0, 4);
      left->release(at, md5);
      left.reset();
      REQUIRE(partials_of(at).size() == 1);
      how(partials_of(at).front().where);
      const auto mine = must(partial_file::open(at, md5, size));
      CHECK(partials_of(at).size() <= 2);  // the content of a torn record is unknown
      remove_abandoned_partials(at, 0);
      return mine->has(0) || mine->has(1) || mine->has(2) || mine->has(3);
    };
    CHECK(spoil([](const fs::path&) {}));  // without damage the blocks are found
    CHECK_FALSE(spoil([](const fs::path& where) { fs::resize_file(where, 4 * block + 64); }));
    CHECK_FALSE(spoil([](const fs::path& where) { fs::resize_file(where, 4 * block + 10); }));
    CHECK_FALSE(spoil([](const fs::path& where) { fs::resize_file(where, 4 * block); }));
    CHECK_FALSE(spoil([](const fs::path& where) { fs::resize_file(where, 0); }));
    CHECK_FALSE(spoil([](const fs::path& where) {
      std::fstream file(where, std::ios::in | std::ios::out | std::ios::binary);
      file.seekp(4 * block);
      file << 'W';
    }));
  }

  TEST_CASE("complete content without a record has all blocks") {
    const temporary_directory directory;
    const place at(directory / "model.h5");
    fs::resize_file(leave_killed(at, md5, 0, 4), size);
    auto mine = must(partial_file::open(at, md5, size));
    for (std::uint64_t i = 0; i < 4; ++i) CHECK(mine->has(i));
    CHECK(content_at(*mine, 3) == block_text(3));
    // touch() must not change the meaning of a complete file without a record.
    mine->touch();
    mine->release(at, md5);
    mine = must(partial_file::open(at, md5, size));
    for (std::uint64_t i = 0; i < 4; ++i) CHECK(mine->has(i));
  }

  TEST_CASE("a partial file of a live owner is left alone; one of a killed owner is taken over") {
    const temporary_directory directory;
    const place at(directory / "model.h5");
    process other([&] {
      auto made = partial_file::create(at, md5, size);
      if (!made) _exit(1);
      (void)(*made)->write(0, block_text(0));
      (void)(*made)->record(0, 1);
      (void)made->release();  // skip the destructor, as a kill does
    });
    REQUIRE(partials_of(at).size() == 1);
    CHECK_FALSE(partials_of(at).front().abandoned());
    {
      const auto mine = must(partial_file::open(at, md5, size));
      CHECK_FALSE(mine->has(0));
      CHECK(partials_of(at).size() == 2);
      remove_abandoned_partials(at, 0);
      CHECK(partials_of(at).size() == 2);
    }
    bool buried = false;
    SUBCASE("the owner is a zombie") { other.kill_only(); }
    SUBCASE("the owner was waited for") {
      other.end();
      buried = true;
    }
    CAPTURE(buried);
    CHECK(partials_of(at).front().abandoned());
    const auto mine = must(partial_file::open(at, md5, size));
    CHECK(mine->has(0));
    CHECK(content_at(*mine, 0) == block_text(0));
    CHECK(partials_of(at).size() == 1);
  }

  TEST_CASE("a cancelled download is kept, whatever has the released name") {
    const temporary_directory directory;
    const place at(directory / "shared" / "model.h5");
    fs::create_directory(at.directory);
    REQUIRE(chmod(at.directory.c_str(), 01777) == 0);
    fs::permissions(directory.path(), fs::perms(0777));
    const auto leave = [&](std::uint64_t blocks) {
      const auto left = must(partial_file::open(at, md5, size));
      fill(*left, 0, blocks);
      left->release(at, md5);
    };
    SUBCASE("another user's part, in a directory with the sticky bit") {
      leave(1);
      if (!as_another_user([&] { leave(2); })) return;
      CHECK(partials_of(at).size() == 2);
    }
    SUBCASE("a directory") {
      fs::create_directories(at.released() / "x");
      leave(2);
    }
    SUBCASE("a part that cannot be read at the moment") {
      bool is_kept = false;
      const bool done = as_another_user([&] {
        leave(3);
        REQUIRE(chmod(at.released().c_str(), 0) == 0);
        leave(2);
        is_kept = fs::exists(at.released());
        REQUIRE(chmod(at.released().c_str(), 0600) == 0);
      });
      if (!done) return;
      CHECK(is_kept);
      CHECK(partials_of(at).size() == 2);
    }
    const auto mine = must(partial_file::open(at, md5, size));
    CHECK(mine->has(1));
    CHECK(content_at(*mine, 1) == block_text(1));
  }

  TEST_CASE("a place whose directory cannot be read is not clean") {
    const temporary_directory directory;
    const place at(directory / "shared" / "model.h5");
    fs::create_directory(at.directory);
    CHECK(remove_abandoned_partials(at, 0));
    REQUIRE(chmod(at.directory.c_str(), 0333) == 0);
    fs::permissions(directory.path(), fs::perms(0777));
    bool is_clean = true;
    if (as_another_user([&] { is_clean = remove_abandoned_partials(at, 0); })) CHECK_FALSE(is_clean);
  }

  TEST_CASE("a partial file whose blocks were not all copied is not removed") {
    const temporary_directory directory;
    const place at(directory / "model.h5");
    const auto larger = leave_killed(at, md5, 0, 2);
    const auto smaller = leave_killed(at, md5, 3, 4);
    {
      const auto mine = must(partial_file::open(at, md5, size, [](std::uint64_t) { return false; }));
      CHECK(mine->has(0));
      CHECK_FALSE(mine->has(3));
      CHECK_FALSE(fs::exists(larger));  // taken over
      CHECK(fs::exists(smaller));
      mine->release(at, md5);
    }
    const auto mine = must(partial_file::open(at, md5, size));
    CHECK(mine->has(0));
    CHECK(mine->has(3));
    CHECK(content_at(*mine, 3) == block_text(3));
    CHECK(partials_of(at).size() == 1);
  }

  TEST_CASE("clean-up removes released partial files and those of dead owners, of any content") {
    const temporary_directory directory;
    const place at(directory / "model.h5");
    {
      process other([&] {
        (void)partial_file::create(at, md5, size)->release();
        (void)partial_file::create(at, other_md5, size)->release();
      });
    }
    auto released = must(partial_file::create(at, md5, size));
    fill(*released, 0, 1);
    released->release(at, md5);
    released.reset();
    const auto alive = must(partial_file::create(at, other_md5, size));
    write_file(directory / ".wandb-restore-notes", "the user's own");
    REQUIRE(partials_of(at).size() == 4);
    remove_abandoned_partials(at, 0);
    REQUIRE(partials_of(at).size() == 1);
    CHECK(partials_of(at).front().where == alive->where());
    CHECK(fs::exists(directory / ".wandb-restore-notes"));
  }

  TEST_CASE("one of several threads claims a released partial file; each gets its own inode") {
    const temporary_directory directory;
    const place at(directory / "model.h5");
    for (int round = 0; round < 20; ++round) {
      auto left = must(partial_file::create(at, md5, size));
      fill(*left, 0, 4);
      left->release(at, md5);
      left.reset();

      constexpr std::size_t count = 8;
      std::vector<std::unique_ptr<partial_file>> got(count);
      std::atomic<int> failures{0};
      std::mutex mutex;
      std::condition_variable go;
      bool started = false;
      std::vector<std::thread> threads;
      for (auto& mine : got) {
        threads.emplace_back([&] {
          {
            std::unique_lock<std::mutex> lock(mutex);
            go.wait(lock, [&] { return started; });
          }
          auto opened = partial_file::open(at, md5, size);
          if (opened) mine = *std::move(opened);
          else ++failures;
        });
      }
      {
        const std::lock_guard<std::mutex> lock(mutex);
        started = true;
      }
      go.notify_all();
      for (auto& one : threads) one.join();
      REQUIRE(failures == 0);
      int claimed = 0;
      std::vector<std::uint64_t> inodes;
      for (const auto& one : got) {
        claimed += one->has(0);
        inodes.push_back(one->content().facts()->inode);
      }
      std::sort(inodes.begin(), inodes.end());
      REQUIRE(claimed == 1);
      REQUIRE(std::unique(inodes.begin(), inodes.end()) == inodes.end());
    }
  }

  TEST_CASE("blocks of an owner on another machine are copied after a minute without writes") {
    const temporary_directory directory;
    const place at(directory / "model.h5");
    // On this host the owner would be dead; on another host its state is unknown.
    const owner foreign{"0000000000000000", 1234, 5678, 9};
    auto left = must(partial_file::create(at, md5, size));
    fill(*left, 0, 1);
    fill(*left, 3, 4);
    const fs::path theirs = at.partial(md5, foreign.str());
    fs::rename(left->where(), theirs);

    set_age(theirs, static_cast<std::int64_t>(partial_file::quiet) - 10);
    {
      const auto mine = must(partial_file::open(at, md5, size));
      CHECK_FALSE(mine->has(0));
    }
    set_age(theirs, static_cast<std::int64_t>(partial_file::quiet) + 10);
    const auto mine = must(partial_file::open(at, md5, size));
    CHECK(mine->has(0));
    CHECK_FALSE(mine->has(1));
    CHECK(mine->has(3));
    CHECK(content_at(*mine, 0) == block_text(0));
    CHECK(content_at(*mine, 3) == block_text(3));
    CHECK(mine->content().facts()->inode != facts_of(theirs)->inode);
    const auto now = mine->content().facts()->modified;
    remove_abandoned_partials(at, now);
    CHECK(fs::exists(theirs));  // its owner may still write to it

    // Later writes of the other owner do not change the copy.
    REQUIRE(left->write(0, block_text(0, 'z')).has_value());
    CHECK(content_at(*mine, 0) == block_text(0));
  }

  TEST_CASE("a partial file of another user is not taken over: its blocks are copied, and it is removed") {
    const temporary_directory directory;
    const place at(directory / "model.h5");
    fs::permissions(directory.path(), fs::perms(0777));
    for (const mode_t mode : {0644u, 0666u}) {
      std::uint64_t theirs = 0;
      const bool done = as_another_user([&] {
        auto left = must(partial_file::create(at, md5, size));
        fill(*left, 0, 2);
        left->release(at, md5);
        REQUIRE(chmod(at.released().c_str(), mode) == 0);
        theirs = facts_of(at.released())->inode;
      });
      if (!done) return;
      auto mine = must(partial_file::open(at, md5, size));
      CHECK(mine->content().facts()->inode != theirs);
      CHECK(mine->content().facts()->user == 0);
      CHECK(mine->has(0));
      CHECK(mine->has(1));
      CHECK_FALSE(mine->has(2));
      CHECK((content_at(*mine, 1) == block_text(1)));
      CHECK(partials_of(at).size() == 1);
    }
  }

  TEST_CASE("links, pipes and files with a second name are not taken over, written to or waited for") {
    const temporary_directory directory;
    const place at(directory / "model.h5");
    const fs::path elsewhere = directory / "elsewhere";
    auto made = must(partial_file::create(at, md5, size));
    fill(*made, 0, 4, 'k');
    made->release(at, md5);
    made.reset();
    fs::rename(at.released(), elsewhere);
    const std::string before = read_file(elsewhere);
    const std::string dead = owner{owner::self().realm, 999999999, 1, 1}.str();
    const std::string unknown = owner{"0000000000000000", 1, 2, 3}.str();
    std::function<void(const fs::path&)> put;
    SUBCASE("a symbolic link") {
      put = [&](const fs::path& where) { fs::create_symlink(elsewhere, where); };
    }
    SUBCASE("a dangling link") {
      put = [&](const fs::path& where) { fs::create_symlink(directory / "none", where); };
    }
    SUBCASE("a pipe") {
      put = [&](const fs::path& where) { REQUIRE(mkfifo(where.c_str(), 0666) == 0); };
    }
    SUBCASE("a hard link") {
      put = [&](const fs::path& where) { fs::create_hard_link(elsewhere, where); };
    }
    SUBCASE("a directory") {
      put = [&](const fs::path& where) { fs::create_directory(where); };
    }
    for (const fs::path& where : {at.released(), at.partial(md5, dead), at.partial(md5, unknown)}) {
      CAPTURE(where);
      put(where);
      auto mine = must(partial_file::open(at, md5, size));
      CHECK(mine->content().facts()->links == 1);
      CHECK(mine->content().facts()->inode != facts_of(elsewhere)->inode);
      fill(*mine, 0, 4, 'm');
      REQUIRE(mine->publish(at).has_value());
      CHECK_FALSE(fs::is_symlink(at.target));
      CHECK((read_file(elsewhere) == before));
      CHECK_FALSE(fs::exists(directory / "none"));
      fs::remove(at.target);
      fs::remove(where);
    }
  }

  TEST_CASE("a file that replaces a partial file is not published") {
    const temporary_directory directory;
    const place at(directory / "model.h5");
    auto mine = must(partial_file::create(at, md5, size));
    fill(*mine, 0, 4);
    write_file(directory / "another", "of a neighbour");
    fs::rename(directory / "another", mine->where());
    const auto stream = mine->publish(at);
    REQUIRE_FALSE(stream.has_value());
    CHECK(stream.error().code() == wandb::errc::disk_failure);
    CHECK_FALSE(fs::exists(at.target));
  }

  TEST_CASE("a partial file has at most the permissions of the target") {
    const temporary_directory directory;
    const place at(directory / "model.h5");
    auto wide = must(partial_file::create(at, md5, size));
    CHECK(wide->content().facts()->mode == 0644);
    fill(*wide, 0, 1);
    wide->release(at, md5);
    write_file(at.target, "secret");
    for (const mode_t mode : {0600u, 0400u, 0640u}) {
      REQUIRE(chmod(at.target.c_str(), mode) == 0);
      CHECK(must(partial_file::create(at, md5, size))->content().facts()->mode == (mode | 0600u));
    }
    REQUIRE(chmod(at.target.c_str(), 0600) == 0);
    auto resumed = must(partial_file::open(at, md5, size));
    REQUIRE(resumed->has(0));
    CHECK(resumed->content().facts()->mode == 0600);
    fill(*resumed, 0, 4);
    REQUIRE(resumed->publish(at).has_value());
    CHECK(facts_of(at.target)->mode == 0600);
  }

  TEST_CASE("a new file takes neither the owner nor wider permissions from another user's old file") {
    const temporary_directory directory;
    const place at(directory / "model.h5");
    fs::permissions(directory.path(), fs::perms(0777));
    for (const mode_t mode : {0666u, 0600u}) {
      const bool done = as_another_user([&] {
        fs::remove(at.target);
        write_file(at.target, "theirs");
        REQUIRE(chmod(at.target.c_str(), mode) == 0);
      });
      if (!done) return;
      auto mine = must(partial_file::create(at, md5, size));
      fill(*mine, 0, 4);
      REQUIRE(mine->publish(at).has_value());
      CHECK(facts_of(at.target)->user == 0);
      CHECK(facts_of(at.target)->mode == (mode & 0644u));
      fs::remove(at.target);
    }
  }

  TEST_CASE("an irreplaceable target is refused before the download") {
    const temporary_directory directory;
    const place at(directory / "model.h5");
    CHECK(check_replaceable(at).has_value());
    write_file(at.target, "old");
    CHECK(check_replaceable(at).has_value());
    REQUIRE(chmod(directory.path().c_str(), 01777) == 0);
    wandb::result<void> refused;
    if (!as_another_user([&] { refused = check_replaceable(at); })) return;
    REQUIRE_FALSE(refused.has_value());
    CHECK(refused.error().code() == wandb::errc::disk_failure);
    CHECK(check_replaceable(at).has_value());
    REQUIRE(chmod(directory.path().c_str(), 0777) == 0);
    if (!as_another_user([&] { refused = check_replaceable(at); })) return;
    CHECK(refused.has_value());
#ifdef __linux__
    write_file(directory / "volume", "mounted");
    process other([&] {
      if (unshare(CLONE_NEWNS) != 0 || mount("none", "/", "none", MS_REC | MS_PRIVATE, nullptr) != 0 ||
          mount((directory / "volume").c_str(), at.target.c_str(), "none", MS_BIND, nullptr) != 0) {
        write_file(directory / "left out", "no mounts here");
        return;
      }
      const auto found = check_replaceable(at);
      write_file(directory / "told", found ? "nothing" : found.error().what());
    });
    if (fs::exists(directory / "left out")) {
      MESSAGE("left out: mounts need a privilege");
      return;
    }
    const std::string told = read_file(directory / "told");
    CAPTURE(told);
    CHECK(told.find("mounted") != told.npos);
#endif
  }

  TEST_CASE("copying blocks stops when the observer returns false") {
    const temporary_directory directory;
    const place at(directory / "model.h5");
    constexpr std::uint64_t many = 100;
    auto left = must(partial_file::create(at, md5, many * block));
    REQUIRE(left->record(0, many).has_value());
    const fs::path theirs = at.partial(md5, owner{"0000000000000000", 1, 2, 3}.str());
    fs::rename(left->where(), theirs);
    set_age(theirs, static_cast<std::int64_t>(partial_file::quiet) + 10);
    int asked = 0;
    const auto mine =
        must(partial_file::open(at, md5, many * block, [&](std::uint64_t) { return ++asked < 2; }));
    CHECK(asked == 2);
    CHECK(mine->has(0));
    CHECK_FALSE(mine->has(many - 1));
  }

  TEST_CASE("a working lock proves that an owner in another container has ended") {
    const temporary_directory directory;
    const place at(directory / "model.h5");
    const std::string here = owner::self().realm;
    REQUIRE(here.size() == 16);
    auto left = must(partial_file::create(at, md5, size));
    fill(*left, 0, 2);
    const fs::path theirs = at.partial(md5, owner{here.substr(0, 8) + "00000000", 1, 2, 3}.str());
    fs::rename(left->where(), theirs);
    const auto inode = facts_of(theirs)->inode;
    place_lock lock(at);
    CHECK_FALSE(must(partial_file::open(at, md5, size, {}, &lock))->has(0));  // not held
    REQUIRE(lock.try_acquire() == place_lock::outcome::held);
    if (!lock.is_effective()) {
      MESSAGE("left out: locks have no effect here");
      return;
    }
    const auto mine = must(partial_file::open(at, md5, size, {}, &lock));
    CHECK(mine->has(1));
    CHECK(mine->content().facts()->inode != inode);  // its owner may return, so no inode is shared
    CHECK_FALSE(fs::exists(theirs));
  }

  TEST_CASE("an owner on another host counts as gone after an hour without writes") {
    const temporary_directory directory;
    const place at(directory / "model.h5");
    auto left = must(partial_file::create(at, md5, size));
    const auto now = left->content().facts()->modified;
    const fs::path theirs = at.partial(md5, owner{"0000000000000000", 1, 2, 3}.str());
    fs::copy_file(left->where(), theirs);
    set_age(theirs, 3500);
    remove_abandoned_partials(at, now);
    CHECK(fs::exists(theirs));
    set_age(theirs, 3700);
    set_age(left->where(), 3700);
    remove_abandoned_partials(at, now);
    CHECK_FALSE(fs::exists(theirs));
    CHECK(fs::exists(left->where()));  // its owner is this live process
  }

  TEST_CASE("clean-up spares partial files that are younger than the given age") {
    const temporary_directory directory;
    const place at(directory / "model.h5");
    const fs::path left = leave_killed(at, md5, 0, 1);
    const auto now = facts_of(left)->modified;
    CHECK_FALSE(remove_abandoned_partials(at, now, std::chrono::hours(1)));
    CHECK(fs::exists(left));
    set_age(left, 3700);
    CHECK(remove_abandoned_partials(at, now, std::chrono::hours(1)));
    CHECK_FALSE(fs::exists(left));
  }

  TEST_CASE("touch() updates the modification time and keeps the record") {
    const temporary_directory directory;
    const place at(directory / "model.h5");
    auto mine = must(partial_file::create(at, md5, size));
    fill(*mine, 1, 2);
    set_age(mine->where(), 3600);
    const auto before = mine->content().facts()->modified;
    mine->touch();
    CHECK(mine->content().facts()->modified > before);
    CHECK(mine->has(1));
    CHECK_FALSE(mine->has(0));
  }

  TEST_CASE("files with similar names are not partial files") {
    const temporary_directory directory;
    const place at(directory / "model.h5");
    const std::string tag = place(directory / "model.h5").tag;
    for (const auto& name :
         {tag + "x.part", tag + "-.part", tag + "-" + md5 + "-.part", tag + "-" + md5 + ".part",
          tag + "-" + md5 + "-1.2.3.4.part.txt", tag + ".lock", "x" + tag + ".part"}) {
      write_file(directory / name, "text");
    }
    CHECK(partials_of(at).empty());
    write_file(directory / (tag + "-" + md5.substr(0, 16) + "-nonsense.part"),
               "text");  // no owner is known to be dead
    REQUIRE(partials_of(at).size() == 1);
    CHECK_FALSE(partials_of(at).front().abandoned());
    CHECK(must(partial_file::open(at, md5, size)) != nullptr);
  }

  TEST_CASE("a size beyond the free space is an error that names the missing bytes; no file is left") {
    const temporary_directory directory;
    const place at(directory / "model.h5");
    const auto length = partial_file::max_size;
    for (const auto& made : {partial_file::create(at, md5, length), partial_file::open(at, md5, length)}) {
      REQUIRE_FALSE(made.has_value());
      CHECK(made.error().code() == wandb::errc::disk_failure);
      const std::string text = made.error().what();
      CAPTURE(text);
      CHECK(text.find("not enough room") != std::string::npos);
      CHECK(text.find(std::to_string(length)) != std::string::npos);
      CHECK(text.find("are missing") != std::string::npos);
    }
    CHECK(files_in(directory.path()) == 0);
  }

  TEST_CASE("an impossible size is a protocol_violation, whatever the free space is; no file is left") {
    const temporary_directory directory;
    const place at(directory / "model.h5");
    for (const auto length : {partial_file::max_size + 1, std::uint64_t{1} << 61, ~std::uint64_t{0}}) {
      CAPTURE(length);
      for (const auto& made : {partial_file::create(at, md5, length), partial_file::open(at, md5, length)}) {
        REQUIRE_FALSE(made.has_value());
        CHECK(made.error().code() == wandb::errc::protocol_violation);
        const std::string text = made.error().what();
        CAPTURE(text);
        CHECK(text.find("impossible size: " + std::to_string(length) + " bytes") != std::string::npos);
      }
    }
    CHECK(files_in(directory.path()) == 0);
  }

  TEST_CASE("space is reserved in advance, without writing") {
    const temporary_directory directory;
    const place at(directory / "model.h5");
    const auto made = must(partial_file::create(at, md5, 64 * block));
    REQUIRE(made->reserve().has_value());
    const auto facts = made->content().facts();
    REQUIRE(facts.found());
#ifdef __linux__
    CHECK(facts->allocated >= 64 * block);
#endif
    CHECK_FALSE(made->has(0));
  }
}

TEST_SUITE("looking at a path") {
  TEST_CASE("facts, absent and failed are told apart") {
    const temporary_directory directory;
    write_file(directory / "file", "12345");
    fs::create_symlink("loop", directory / "loop");
    fs::create_symlink("nowhere", directory / "dangling");
    const auto file = facts_of(directory / "file");
    CHECK(file.found());
    CHECK_FALSE(file.absent());
    CHECK(file.failure() == 0);
    CHECK(file->size == 5);
    for (const fs::path& where : {directory / "none", directory / "none" / "in none",
                                  directory / "file" / "x", directory / "dangling"}) {
      CAPTURE(where);
      CHECK_FALSE(facts_of(where).found());
      CHECK(facts_of(where).absent());
      CHECK(facts_of(where).failure() == 0);
    }
    for (const fs::path& where : {directory / "loop", directory / std::string(300, 'n')}) {
      CAPTURE(where);
      CHECK_FALSE(facts_of(where).found());
      CHECK_FALSE(facts_of(where).absent());
      CHECK(facts_of(where).failure() != 0);
    }
  }
}

TEST_SUITE("owners") {
  TEST_CASE("owner::self() is alive, and unique for each call") {
    const auto me = owner::self(), again = owner::self();
    CHECK_FALSE(me.is_provably_dead());
    CHECK(me.str() != again.str());
    const auto read = owner::parse(me.str());
    CHECK(read.str() == me.str());
  }

  TEST_CASE("malformed names of owners are refused") {
    for (const char* text :
         {"", "a", "a.0.2.3", "a.1.2", "a.1.2.3.4", "a.x.2.3", "a.1.x.3", "a.1.2.x", "a.-1.2.3"}) {
      CAPTURE(std::string(text));
      CHECK(owner::parse(text).process == 0);
    }
  }

  TEST_CASE("an owner is dead only if its process id on this host is unused or reused") {
    const auto me = owner::self();
    REQUIRE_FALSE(me.realm.empty());
    process other([] {});
    const auto its_start = wandb::detail::process_start(static_cast<std::uint64_t>(other.id()));
    REQUIRE(its_start.has_value());
    const owner it{me.realm, static_cast<std::uint64_t>(other.id()), *its_start, 1};
    CHECK_FALSE(it.is_provably_dead());
    CHECK(owner{it.realm, it.process, it.start + 1, 1}.is_provably_dead());  // the process id was reused
    CHECK_FALSE(owner{it.realm, it.process, 0, 1}.is_provably_dead());       // the start time is unknown
    CHECK_FALSE(owner{"elsewhere", it.process, it.start + 1, 1}.is_provably_dead());
    CHECK_FALSE(owner{"", it.process, it.start + 1, 1}.is_provably_dead());
    CHECK_FALSE(owner{"unknown", it.process, it.start + 1, 1}.is_provably_dead());
    other.kill_only();
    CHECK(it.is_provably_dead());
    CHECK_FALSE(owner{"elsewhere", it.process, it.start, 1}.is_provably_dead());
    other.end();
    CHECK(it.is_provably_dead());
  }

#if defined(__linux__) &&                                                                                    \
    !defined(__SANITIZE_THREAD__)  // the sanitizer does not support threads that start after a fork
  TEST_CASE("a process is alive as long as any of its threads runs") {
    int ready[2];
    REQUIRE(pipe(ready) == 0);
    const pid_t id = fork();
    REQUIRE(id >= 0);
    if (id == 0) {
      static int told = ready[1];
      pthread_t second;
      (void)pthread_create(
          &second, nullptr,
          [](void*) -> void* {
            // Waits until the first thread is a zombie.
            const std::string stat = "/proc/self/task/" + std::to_string(getpid()) + "/stat";
            for (std::string text; text.find(") Z ") == std::string::npos;) {
              std::ifstream in(stat);
              text.assign(std::istreambuf_iterator<char>(in), {});
            }
            (void)!write(told, "x", 1);
            for (;;) pause();
          },
          nullptr);
      syscall(SYS_exit, 0);  // ends only this thread
    }
    ::close(ready[1]);
    char told = 0;
    CHECK(read(ready[0], &told, 1) == 1);
    ::close(ready[0]);
    CHECK(wandb::detail::process_start(static_cast<std::uint64_t>(id)).has_value());
    kill(id, SIGKILL);
    waitpid(id, nullptr, 0);
    CHECK_FALSE(wandb::detail::process_start(static_cast<std::uint64_t>(id)).has_value());
  }
#endif
}

TEST_SUITE("locks") {
  TEST_CASE("one thread holds a lock at a time; the next one gets it; no file is left") {
    const temporary_directory directory;
    const place at(directory / "model.h5");
    {
      place_lock first(at), second(at), elsewhere(place(directory / "other.h5"));
      CHECK(first.try_acquire() == place_lock::outcome::held);
      CHECK(first.try_acquire() == place_lock::outcome::held);
      CHECK(second.try_acquire() == place_lock::outcome::busy);
      CHECK(second.try_acquire() == place_lock::outcome::busy);
      CHECK(elsewhere.try_acquire() == place_lock::outcome::held);
    }
    CHECK(files_in(directory.path()) == 0);
    place_lock third(at);
    CHECK(third.try_acquire() == place_lock::outcome::held);
  }

  TEST_CASE("one target has the same lock by every path") {
    const temporary_directory directory;
    fs::create_directory(directory / "sub");
    fs::create_directory_symlink(directory / "sub", directory / "link");
    place_lock first(place(directory / "sub" / "model.h5"));
    REQUIRE(first.try_acquire() == place_lock::outcome::held);
    place_lock dotted(place(directory / "sub" / ".." / "sub" / "model.h5"));
    CHECK(dotted.try_acquire() == place_lock::outcome::busy);
    place_lock linked(place(directory / "link" / "model.h5"));
    CHECK(linked.try_acquire() == place_lock::outcome::busy);
  }

  TEST_CASE("a process holds a lock until it ends, also by a signal") {
    const temporary_directory directory;
    const place at(directory / "model.h5");
    process other([&] {
      auto* held = new place_lock(at);
      if (held->try_acquire() != place_lock::outcome::held) _exit(1);
    });
    place_lock mine(at);
    CHECK(mine.try_acquire() == place_lock::outcome::busy);
    other.end();
    CHECK(mine.try_acquire() == place_lock::outcome::held);
  }

  TEST_CASE("two processes never hold a lock at once, although each removes the file") {
    const temporary_directory directory;
    const place at(directory / "model.h5");
    const fs::path inside = directory / "inside";
    std::vector<pid_t> all;
    for (int i = 0; i < 4; ++i) {
      const pid_t id = fork();
      REQUIRE(id >= 0);
      if (id == 0) {
        for (int round = 0; round < 100; ++round) {
          place_lock lock(at);
          while (lock.try_acquire() == place_lock::outcome::busy) sched_yield();
          const int alone = open(inside.c_str(), O_CREAT | O_EXCL | O_WRONLY, 0600);
          if (alone < 0) _exit(2);
          ::close(alone);
          if (unlink(inside.c_str()) != 0) _exit(3);
        }
        _exit(0);
      }
      all.push_back(id);
    }
    for (const pid_t id : all) {
      int status = -1;
      REQUIRE(waitpid(id, &status, 0) == id);
      CHECK(WIFEXITED(status));
      CHECK(WEXITSTATUS(status) == 0);
    }
    CHECK(files_in(directory.path()) == 0);
  }

  TEST_CASE("a lock file is left on demand, and the next holder sees that it existed") {
    const temporary_directory directory;
    const place at(directory / "model.h5");
    {
      place_lock first(at);
      CHECK_FALSE(first.is_first());
      REQUIRE(first.try_acquire() == place_lock::outcome::held);
      CHECK(first.is_first());
      first.leave_file();
    }
    CHECK(fs::exists(at.lock()));
    CHECK(facts_of(at.lock())->mode == 0600);
    {
      place_lock second(at);
      REQUIRE(second.try_acquire() == place_lock::outcome::held);
      CHECK_FALSE(second.is_first());
    }
    CHECK(files_in(directory.path()) == 0);
  }

  TEST_CASE("a link in place of the lock file is not followed, another user's file not used, a pipe not "
            "waited for") {
    const temporary_directory directory;
    const place at(directory / "model.h5");
    SUBCASE("a dangling link") { fs::create_symlink(directory / "elsewhere", at.lock()); }
    SUBCASE("a link") {
      write_file(directory / "file", "precious");
      fs::create_symlink(directory / "file", at.lock());
    }
    SUBCASE("a hard link") {
      write_file(directory / "file", "precious");
      fs::create_hard_link(directory / "file", at.lock());
    }
    SUBCASE("a pipe") { REQUIRE(mkfifo(at.lock().c_str(), 0666) == 0); }
    SUBCASE("a file of another user") {
      fs::permissions(directory.path(), fs::perms(0777));
      if (!as_another_user([&] {
            write_file(at.lock(), "");
            REQUIRE(chmod(at.lock().c_str(), 0666) == 0);
          })) {
        return;
      }
    }
    place_lock lock(at);
    CHECK(lock.try_acquire() == place_lock::outcome::unavailable);
    CHECK_FALSE(lock.is_first());
    CHECK_FALSE(fs::exists(directory / "elsewhere"));
    if (fs::exists(directory / "file")) CHECK(read_file(directory / "file") == "precious");
  }

  TEST_CASE("a lock is taken from a fork of its dead holder") {
    const temporary_directory directory;
    const place at(directory / "model.h5");
    int ready[2];
    REQUIRE(pipe(ready) == 0);
    {
      process holder([&] {
        auto* held = new place_lock(at);
        if (held->try_acquire() != place_lock::outcome::held) _exit(1);
        const pid_t fork_of_it = fork();
        if (fork_of_it == 0) {
          for (;;) pause();
        }
        (void)!write(ready[1], &fork_of_it, sizeof fork_of_it);
      });
      place_lock mine(at);
      CHECK(mine.try_acquire() == place_lock::outcome::busy);
      CHECK_FALSE(mine.take_from_dead());  // the holder is alive
    }
    pid_t left = 0;
    REQUIRE(read(ready[0], &left, sizeof left) == static_cast<ssize_t>(sizeof left));
    ::close(ready[0]);
    ::close(ready[1]);
    place_lock mine(at);
    CHECK(mine.try_acquire() == place_lock::outcome::busy);
    CHECK(mine.take_from_dead());
    CHECK(mine.try_acquire() == place_lock::outcome::held);
    CHECK_FALSE(mine.is_first());  // the dead one may have left hidden files
    kill(left, SIGKILL);
  }

  TEST_CASE("a child gets a lock that a thread of its parent held during the fork and has released") {
    const temporary_directory directory;
    const place at(directory / "model.h5");
    int released[2];
    REQUIRE(pipe(released) == 0);
    std::optional<place_lock> held(std::in_place, at);
    REQUIRE(held->try_acquire() == place_lock::outcome::held);
    const pid_t id = fork();
    REQUIRE(id >= 0);
    if (id == 0) {
      ::close(released[1]);
      char unused = 0;
      if (read(released[0], &unused, 1) != 0) _exit(2);  // until the parent closes its end
      place_lock lock(at);
      _exit(lock.try_acquire() == place_lock::outcome::held ? 0 : 1);
    }
    held.reset();
    ::close(released[0]);
    ::close(released[1]);
    int status = -1;
    REQUIRE(waitpid(id, &status, 0) == id);
    CHECK(WIFEXITED(status));
    CHECK(WEXITSTATUS(status) == 0);
  }

  TEST_CASE("a child has an object of its own, also if its parent's is locked during the fork") {
    struct object {
      std::mutex mutex = {};
      int value = 0;
      bool try_close() { return wandb::detail::is_free(mutex); }
    };
    wandb::detail::per_process<object> all;
    all.get().value = 1;
    std::unique_lock<std::mutex> held(all.get().mutex);
    const pid_t id = fork();
    REQUIRE(id >= 0);
    if (id == 0) {
      ::alarm(300);
      object& own = all.get();
      const std::lock_guard<std::mutex> guard(own.mutex);
      _exit(own.value == 0 && &own == &all.get() ? 7 : 8);
    }
    held.unlock();
    int status = -1;
    REQUIRE(waitpid(id, &status, 0) == id);
    CHECK(WIFEXITED(status));
    CHECK(WEXITSTATUS(status) == 7);
    CHECK(all.get().value == 1);
  }

  TEST_CASE("without a lock file the lock is unavailable, but still excludes other threads") {
    const temporary_directory directory;
    const place at(directory / "missing" / "model.h5");
    place_lock first(at), second(at);
    CHECK(first.try_acquire() == place_lock::outcome::unavailable);
    CHECK(second.try_acquire() == place_lock::outcome::busy);
  }
}

TEST_SUITE("receipts") {
  TEST_CASE("a receipt is valid for the unchanged file that it was written for") {
    const temporary_directory directory;
    const fs::path cache = directory / "cache", target = directory / "a b\xc3\xa9\"\n.h5";
    write_file(target, "hello");
    set_age(target, 10);
    const auto facts = facts_of(target);
    REQUIRE(facts.found());
    const wandb::run_path run{"team \"x\"", "p\xff", "r/1"};
    REQUIRE(
        wandb::detail::write_receipt(cache, target, {run, "model \n.h5", facts->size, facts->modified, md5})
            .has_value());
    const auto found = receipt_for(cache, target, *facts);
    REQUIRE(found);
    CHECK(found.run == run);
    CHECK(found.name == "model \n.h5");
    CHECK(found.md5 == md5);
    CHECK(found.size == 5);

    auto changed = *facts;
    changed.size = 6;
    CHECK_FALSE(receipt_for(cache, target, changed));
    changed = *facts;
    changed.modified += 1;
    CHECK_FALSE(receipt_for(cache, target, changed));
    CHECK_FALSE(receipt_for(cache, directory / "other", *facts));
    CHECK_FALSE(receipt_for({}, target, *facts));
    CHECK_FALSE(receipt_for(directory / "no cache", target, *facts));
  }

  TEST_CASE("a receipt belongs to the path in any spelling") {
    const temporary_directory directory;
    const fs::path cache = directory / "cache";
    write_file(directory / "model.h5", "hello");
    set_age(directory / "model.h5", 10);
    fs::create_directory(directory / "x");
    const support::scoped_working_directory here(directory.path());
    const auto facts = facts_of("model.h5");
    REQUIRE(facts.found());
    REQUIRE(wandb::detail::write_receipt(cache, "model.h5",
                                         {{"e", "p", "r"}, "model.h5", facts->size, facts->modified, md5})
                .has_value());
    CHECK(receipt_for(cache, directory / "model.h5", *facts));
    CHECK(receipt_for(cache, "./x/../model.h5", *facts));
  }

  TEST_CASE("a link in front of \"..\" leads where the system says") {
    const temporary_directory directory;
    fs::create_directories(directory / "data" / "in");
    fs::create_directories(directory / "data" / "out");
    fs::create_directories(directory / "here" / "out");
    fs::create_directory_symlink(directory / "data" / "in", directory / "here" / "link");
    const support::scoped_working_directory here(directory / "here");
    const fs::path cache = directory / "cache", target = "link/../out/model.h5";
    write_file(target, "hello");
    write_file("out/model.h5", "hello");
    set_age(target, 10);
    set_age("out/model.h5", 10);
    const auto facts = *facts_of(target), other = *facts_of("out/model.h5");
    REQUIRE(wandb::detail::write_receipt(cache, target, {{"e", "p", "r"}, "n", 5, facts.modified, md5})
                .has_value());
    CHECK(receipt_for(cache, target, facts));
    CHECK(receipt_for(cache, directory / "data/out/model.h5", facts));
    auto as_if = other;
    as_if.modified = facts.modified;
    CHECK_FALSE(receipt_for(cache, "out/model.h5", as_if));
    place_lock one{place(target)}, two{place("out/model.h5")};
    CHECK(one.try_acquire() == place_lock::outcome::held);
    CHECK(two.try_acquire() == place_lock::outcome::held);
  }

  TEST_CASE("a torn or forged receipt is ignored") {
    const temporary_directory directory;
    const fs::path cache = directory / "cache", target = directory / "model.h5";
    write_file(target, "hello");
    set_age(target, 10);
    const auto facts = *facts_of(target);
    REQUIRE(wandb::detail::write_receipt(cache, target,
                                         {{"e", "p", "r"}, "model.h5", facts.size, facts.modified, md5})
                .has_value());
    const fs::path where = wandb::detail::receipt_path(cache, target);
    const std::string good = read_file(where);
    REQUIRE(receipt_for(cache, target, facts));
    for (std::size_t length = 0; length + 3 < good.size(); ++length) {
      write_file(where, good.substr(0, length));
      REQUIRE_FALSE(receipt_for(cache, target, facts));
    }
    for (const char* text :
         {"null", "[]", "\"x\"", "{}", "{\"path\":1,\"size\":\"5\",\"modified_ns\":null}", "\x00\xff"}) {
      write_file(where, text);
      CHECK_FALSE(receipt_for(cache, target, facts));
    }
    write_file(where, good + std::string(100000, ' '));
    CHECK_FALSE(receipt_for(cache, target, facts));
    fs::remove(where);
    fs::create_directory(where);
    CHECK_FALSE(receipt_for(cache, target, facts));
  }

  TEST_CASE("the md5 of a file that changed a moment ago is not recorded") {
    const temporary_directory directory;
    const fs::path cache = directory / "cache", target = directory / "model.h5";
    write_file(target, "hello");
    const auto facts = *facts_of(target);
    const wandb::detail::receipt known{{"e", "p", "r"}, "model.h5", facts.size, facts.modified, md5};
    REQUIRE(wandb::detail::write_receipt(cache, target, known).has_value());
    const auto found = receipt_for(cache, target, facts);
    REQUIRE(found);
    CHECK(found.run == known.run);
    CHECK(found.md5.empty());
  }

  TEST_CASE("a receipt of another user, a link and a pipe are ignored") {
    const temporary_directory directory;
    const fs::path cache = directory / "cache", target = directory / "model.h5";
    write_file(target, "hello");
    set_age(target, 10);
    const auto facts = *facts_of(target);
    const wandb::detail::receipt known{{"e", "p", "r"}, "model.h5", facts.size, facts.modified, md5};
    REQUIRE(wandb::detail::write_receipt(cache, target, known).has_value());
    const fs::path where = wandb::detail::receipt_path(cache, target);
    REQUIRE(receipt_for(cache, target, facts));
    SUBCASE("a link") {
      fs::rename(where, directory / "elsewhere");
      fs::create_symlink(directory / "elsewhere", where);
    }
    SUBCASE("a pipe") {
      fs::remove(where);
      REQUIRE(mkfifo(where.c_str(), 0666) == 0);
    }
    SUBCASE("a file of another user") {
      if (geteuid() != 0) {
        MESSAGE("left out: to act as another user needs root");
        return;
      }
      REQUIRE(chown(where.c_str(), 65534, 65534) == 0);
    }
    CHECK_FALSE(receipt_for(cache, target, facts));
    REQUIRE(wandb::detail::write_receipt(cache, target, known).has_value());
    CHECK(receipt_for(cache, target, facts));
    CHECK(facts_of(where)->user == geteuid());
  }

  TEST_CASE("unfinished receipts are removed after a day, and receipts stay") {
    const temporary_directory directory;
    const fs::path cache = directory / "cache", receipts = cache / "receipts", target = directory / "gone";
    write_file(target, "hello");
    REQUIRE(wandb::detail::write_receipt(cache, target, {{"e", "p", "r"}, "n", 5, 1, md5}).has_value());
    fs::remove(target);
    const fs::path receipt = wandb::detail::receipt_path(cache, target);
    const fs::path abandoned = receipts / "0123.new-4567", fresh = receipts / "0123.new-89ab";
    write_file(abandoned, "path=");
    write_file(fresh, "path=");
    for (const fs::path& old : {receipt, abandoned}) set_age(old, 90000);
    wandb::detail::remove_unfinished_receipts(receipts);
    CHECK(fs::exists(receipt));
    CHECK_FALSE(fs::exists(abandoned));
    CHECK(fs::exists(fresh));
  }

  TEST_CASE("a cache that cannot be written is no failure") {
    const temporary_directory directory;
    write_file(directory / "cache", "a file");
    CHECK_FALSE(wandb::detail::write_receipt(directory / "cache", directory / "model.h5",
                                             {{"e", "p", "r"}, "model.h5", 1, 2, md5})
                    .has_value());
    CHECK(wandb::detail::write_receipt({}, directory / "model.h5", {{"e", "p", "r"}, "model.h5", 1, 2, md5})
              .has_value());
    CHECK(read_file(directory / "cache") == "a file");
  }
}

namespace {

std::unique_ptr<partial_file> whole(const place& at) {
  auto made = must(partial_file::create(at, md5, size));
  fill(*made, 0, 4);
  return made;
}
std::string whole_text() { return block_text(0) + block_text(1) + block_text(2) + block_text(3); }
std::string rest_of(std::ifstream& in) { return std::string(std::istreambuf_iterator<char>(in), {}); }

}  // namespace

TEST_SUITE("publishing") {
  TEST_CASE("a published file is complete, without its record; the stream has its inode") {
    const temporary_directory directory;
    const place at(directory / "model.h5");
    auto made = whole(at);
    const auto inode = made->content().facts()->inode;
    auto stream = made->publish(at);
    REQUIRE(stream.has_value());
    made.reset();
    CHECK(files_in(directory.path()) == 1);
    CHECK(read_file(at.target) == whole_text());
    CHECK(facts_of(at.target)->inode == inode);
    write_file(directory / "new", "another");
    fs::rename(directory / "new", at.target);
    CHECK(rest_of(*stream) == whole_text());
  }

  TEST_CASE("without /proc and /dev/fd the stream has the published inode, too") {
    if (geteuid() != 0) {
      MESSAGE("left out: chroot needs root");
      return;
    }
    const temporary_directory directory;
    const pid_t id = fork();
    REQUIRE(id >= 0);
    if (id == 0) {
      if (chroot(directory.path().c_str()) != 0 || chdir("/") != 0) _exit(1);
      const place at("/model.h5");
      auto made = partial_file::create(at, md5, size);
      if (!made) _exit(2);
      for (std::uint64_t i = 0; i < 4; ++i)
        if (!(*made)->write(i * block, block_text(i))) _exit(3);
      auto stream = (*made)->publish(at);
      if (!stream || rest_of(*stream) != whole_text()) _exit(4);
      wandb::detail::file opened;
      if (opened.open(at.target, wandb::detail::file::mode::keep_name) != 0) _exit(5);
      auto again = stream_on(opened, at.target);
      if (!again || rest_of(*again) != whole_text()) _exit(6);
      std::error_code failure;
      fs::rename(at.target, "/moved", failure);
      std::ofstream("/model.h5") << "another";
      if (stream_on(opened, at.target)) _exit(7);
      _exit(0);
    }
    int status = -1;
    REQUIRE(waitpid(id, &status, 0) == id);
    CHECK(WIFEXITED(status));
    CHECK(WEXITSTATUS(status) == 0);
  }

  TEST_CASE("the published file's time is earlier than that of any later change, also with a coarse clock") {
    const temporary_directory directory;
    const place at(directory / "model.h5");
    timespec before{};
    clock_gettime(CLOCK_REALTIME, &before);
    auto made = whole(at);
    std::int64_t announced = 0;
    REQUIRE(made->publish(at, [&](const auto& facts) { announced = facts.modified; }).has_value());
    const auto modified = facts_of(at.target)->modified;
    CHECK(modified < (before.tv_sec - 2) * std::int64_t{1000000000});
    CHECK(modified > (before.tv_sec - 60) * std::int64_t{1000000000});
    CHECK(announced == modified);
  }

  TEST_CASE("an old file is replaced, not written to; the new file has its permissions") {
    const temporary_directory directory;
    const place at(directory / "model.h5");
    write_file(at.target, "old");
    REQUIRE(chmod(at.target.c_str(), 0640) == 0);
    fs::create_hard_link(at.target, directory / "linked");
    std::ifstream reader(at.target, std::ios::binary);
    auto made = whole(at);
    CHECK(read_file(at.target) == "old");
    REQUIRE(made->publish(at).has_value());
    CHECK(read_file(at.target) == whole_text());
    CHECK(facts_of(at.target)->mode == 0640);
    CHECK(read_file(directory / "linked") == "old");
    CHECK(rest_of(reader) == "old");
  }

  TEST_CASE("a new file has the permissions of the process's umask") {
    const temporary_directory directory;
    const place at(directory / "model.h5");
    const mode_t before = umask(027);
    auto made = whole(at);
    const bool done = made->publish(at).has_value();
    umask(before);
    REQUIRE(done);
    CHECK(facts_of(at.target)->mode == 0640);
  }

  TEST_CASE("a symbolic link is replaced, not followed; also a dangling one") {
    const temporary_directory directory;
    const place at(directory / "model.h5");
    fs::create_symlink(directory / "elsewhere", at.target);
    SUBCASE("to a file") { write_file(directory / "elsewhere", "old"); }
    SUBCASE("to nothing") {}
    auto made = whole(at);
    REQUIRE(made->publish(at).has_value());
    CHECK_FALSE(fs::is_symlink(at.target));
    CHECK(read_file(at.target) == whole_text());
    if (fs::exists(directory / "elsewhere")) CHECK(read_file(directory / "elsewhere") == "old");
  }

  TEST_CASE("a directory in the target's place is an error, and stays") {
    const temporary_directory directory;
    const place at(directory / "model.h5");
    fs::create_directory(at.target);
    write_file(at.target / "inner", "old");
    auto made = whole(at);
    const auto stream = made->publish(at);
    REQUIRE_FALSE(stream.has_value());
    CHECK(stream.error().code() == wandb::errc::disk_failure);
    made.reset();
    CHECK(read_file(at.target / "inner") == "old");
    CHECK(files_in(directory.path()) == 1);
  }

  TEST_CASE("hidden files work for target names of any length and spelling") {
    const temporary_directory directory;
    for (const std::string& name : {std::string(255, 'n'), std::string("with spaces and 'quotes\""),
                                    std::string("\xc3\xa9\xe4\xb8\xad"), std::string("\xff\xfe not UTF-8"),
                                    std::string("-rf"), std::string(".hidden")}) {
      CAPTURE(name);
      const place at(directory / name);
      place_lock lock(at);
      CHECK(lock.try_acquire() == place_lock::outcome::held);
      auto made = whole(at);
      made->release(at, md5);
      made = must(partial_file::open(at, md5, size));
      CHECK(made->has(3));
      REQUIRE(made->publish(at).has_value());
      CHECK(read_file(at.target) == whole_text());
      REQUIRE(wandb::detail::write_receipt(
                  directory / "cache", at.target,
                  {{"e", "p", "r"}, "model.h5", size, facts_of(at.target)->modified, md5})
                  .has_value());
      CHECK(receipt_for(directory / "cache", at.target, *facts_of(at.target)));
    }
  }

  TEST_CASE("a part of yesterday is resumed, although another program changes the file meanwhile") {
    const temporary_directory directory;
    const place at(directory / "root" / "model.h5");
    fs::create_directory(at.directory);
    std::string content;
    for (std::uint64_t i = 0; i < 4; ++i) content += block_text(i);
    wandb::detail::md5 hash;
    hash.update(content);
    const std::string content_md5 = hash.finish();
    struct storage {
      const std::string& content;
      const std::string& md5;
      fs::path target;
      std::shared_ptr<std::atomic<std::uint64_t>> sent;

      wandb::result<wandb::http_response> send(const wandb::http_request& request,
                                               wandb::body_sink& sink) const {
        wandb::http_response head;
        head.status = 200;
        std::string body = content;
        if (request.method == "POST") {
          write_file(target, "written by another program");
          body =
              R"({"data":{"project":{"run":{"files":{"edges":[{"node":{"name":"model.h5","url":"http://s/m","md5":")" +
              wandb::detail::base64_encode(wandb::detail::hex_decode(md5).value_or("")) +
              R"(","sizeBytes":)" + std::to_string(content.size()) + "}}]}}}}}";
        } else if (!request.headers.empty()) {
          for (const auto& [name, value] : request.headers) {
            if (name != "Range") continue;
            const auto begin = std::stoull(value.substr(6)),
                       end = std::stoull(value.substr(value.find('-') + 1)) + 1;
            body = content.substr(begin, end - begin);
            head.status = 206;
            head.headers = {{"ETag", "\"a\""},
                            {"Content-Range", "bytes " + std::to_string(begin) + '-' +
                                                  std::to_string(end - 1) + '/' +
                                                  std::to_string(content.size())}};
          }
        }
        if (request.method != "POST") *sent += body.size();
        head.headers.emplace_back("Content-Length", std::to_string(body.size()));
        if (!sink.start(head) || !sink.write(body)) return wandb::error(wandb::errc::cancelled, "stopped");
        return head;
      }
    };
    {
      process other([&] {  // is killed, and leaves its lock file, too
        static place_lock lock(at);
        (void)lock.try_acquire();
        auto made = partial_file::create(at, content_md5, content.size());
        for (std::uint64_t i = 0; i < 3; ++i) (void)(*made)->write(i * block, block_text(i));
        (void)(*made)->record(0, 3);
        (void)made->release();
      });
    }
    REQUIRE(partials_of(at).size() == 1);
    set_age(partials_of(at).front().where, 90'000);
    const auto sent = std::make_shared<std::atomic<std::uint64_t>>(0);
    wandb::settings settings;
    settings.base_url = "http://service";
    settings.api_key = std::string(40, 'k');
    settings.on_warning = [](std::string_view) {};
    wandb::client<storage> client(settings, storage{content, content_md5, at.target, sent});
    const auto restored = client.try_restore("model.h5", "e/p/r", true, at.directory);
    REQUIRE(restored.has_value());
    CHECK(restored->verified());
    CHECK(sent->load() == block_text(3).size());
  }
}

#endif  // _WIN32
