// Another user of a shared directory puts something in each place that a restore uses. Needs root, to act as two users.
#include <doctest/doctest.h>

#ifndef _WIN32
#include <fcntl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/prctl.h>
#include <sys/sysmacros.h>
#endif

#include <functional>
#include <iterator>
#include <string>
#include <vector>

#include "engine.hpp"

namespace {

using namespace engine;

constexpr uid_t user = 65533, neighbour = 65534;

/// Acts as another user within a scope.
class acting_as {
 public:
  explicit acting_as(uid_t id) {
    REQUIRE(seteuid(id) == 0);
#ifdef __linux__
    prctl(PR_SET_DUMPABLE, 1);  // else /proc/self/fd belongs to root
#endif
  }
  ~acting_as() { REQUIRE(seteuid(0) == 0); }
  acting_as(const acting_as&) = delete;
  acting_as& operator=(const acting_as&) = delete;
};

struct trap {
  const char* name;
  std::function<void(const fs::path& where)> put;
  bool is_replaceable;  // in the target's place
  bool is_made_by_root = false;
};

struct stat entry_of(const fs::path& where) {
  struct stat facts {};
  REQUIRE(lstat(where.c_str(), &facts) == 0);
  return facts;
}

TEST_SUITE("neighbours") {
  TEST_CASE("what another user puts where a restore writes is not used, not written to and not waited for") {
    if (geteuid() != 0) {
      MESSAGE("left out: to act as other users needs root");
      return;
    }
    world it;
    const auto what = it.add("model.h5", small_size);
    it.options.replace = true;
    const fs::path cache = it.settings.cache_dir, elsewhere = it.directory / "elsewhere",
                   root = it.options.root;
    for (const auto& each : {cache, root, elsewhere}) fs::create_directories(each);
    REQUIRE(chown(cache.c_str(), user, user) == 0);
    REQUIRE(chown(elsewhere.c_str(), neighbour, neighbour) == 0);

    // A cancelled restore shows the names of the hidden files, and leaves blocks with a record.
    std::string lock, in_use, released, honest;
    {
      world other;
      other.server.add_file(other.run, "model.h5", what);
      other.server.add_fault(stand_in::place::storage, stand_in::act::stall(4 * 65536));
      other.options.on_progress = [&](const wandb::progress& now) {
        for (const auto& entry : fs::directory_iterator(other.options.root))
          (entry.path().extension() == ".lock" ? lock : in_use) = entry.path().filename().string();
        return now.bytes_done < 2 * 65536;
      };
      other.check_failed(other.restore("model.h5"), wandb::errc::cancelled);
      REQUIRE(other.hidden() == 1);
      const fs::path left = fs::directory_iterator(other.options.root)->path();
      released = left.filename().string();
      honest = support::read_file(left);
    }
    std::string forged = honest;  // claims blocks with other bytes
    forged.replace(0, 4096, std::string(4096, '!'));
    // "<tag>-<key>-<realm>.<process>.<start>.<serial>.part"
    const auto owner_at = in_use.rfind('-') + 1, process_at = in_use.find('.', owner_at);
    const std::string dead = in_use.substr(0, process_at) + ".999999999.1.1.part";
    const std::string unknown = in_use.substr(0, owner_at) + "0000000000000000.1.2.3.part";

    const fs::path theirs = elsewhere / "theirs";
    const std::vector<trap> traps = {
        {"a symbolic link", [&](const fs::path& where) { fs::create_symlink(theirs, where); }, true},
        {"a dangling link", [&](const fs::path& where) { fs::create_symlink(elsewhere / "none", where); },
         true},
        {"a hard link", [&](const fs::path& where) { fs::create_hard_link(theirs, where); }, true},
        {"a file", [&](const fs::path& where) { fs::copy_file(theirs, where); }, true},
        {"a pipe", [&](const fs::path& where) { REQUIRE(mkfifo(where.c_str(), 0666) == 0); }, false},
        {"a socket",
         [&](const fs::path& where) {
           sockaddr_un address{};
           address.sun_family = AF_UNIX;
           const std::string text = (elsewhere / "s").string();  // `where` may be too long for an address
           REQUIRE(text.size() < sizeof address.sun_path);
           text.copy(address.sun_path, text.size());
           const int opened = socket(AF_UNIX, SOCK_STREAM, 0);
           REQUIRE(bind(opened, reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0);
           ::close(opened);
           fs::rename(text, where);
         },
         false},
        {"a directory", [&](const fs::path& where) { fs::create_directory(where); }, false},
#ifdef __linux__
        {"a device",
         [&](const fs::path& where) { REQUIRE(mknod(where.c_str(), S_IFCHR | 0666, makedev(1, 5)) == 0); },
         false, true},
#endif
    };
    struct round {
      mode_t mode;
      const std::string& content;
    };
    for (const round& now : {round{0777, honest}, round{0777, forged}, round{01777, honest}}) {
      const mode_t mode = now.mode;
      const std::string& content = now.content;
      for (const std::string& name : {std::string("model.h5"), lock, released, dead, unknown}) {
        for (const auto& each : traps) {
          CAPTURE(std::string(each.name));
          CAPTURE(name);
          CAPTURE(mode);
          fs::remove_all(root);
          fs::create_directory(root);
          REQUIRE(chmod(root.c_str(), mode) == 0);
          int opened = -1;
          {
            const acting_as other(each.is_made_by_root ? 0 : neighbour);
            const auto mask = umask(0);
            fs::remove(theirs);
            support::write_file(theirs, content);
            each.put(root / name);
            umask(mask);
            opened = ::open((root / name).c_str(), O_RDWR | O_NONBLOCK);  // of a file: to change it later
          }
          wandb::result<wandb::restored_file> got = wandb::error(wandb::errc::cancelled, "");
          {
            const acting_as me(user);
            got = it.restore("model.h5");
          }
          const bool is_target = name == "model.h5";
          if (is_target && (!each.is_replaceable || mode == 01777u)) {
            it.check_failed(std::move(got), wandb::errc::disk_failure);
          } else {
            const std::string text = got ? "" : got.error().what();
            CAPTURE(text);
            REQUIRE(got.has_value());
            CHECK(got->verified());
            const auto published = entry_of(root / "model.h5");
            CHECK(S_ISREG(published.st_mode));
            CHECK(published.st_uid == user);
            CHECK(published.st_nlink == 1);
            if (opened >= 0) (void)!pwrite(opened, "later", 5, 0);
            CHECK(holds(root / "model.h5", *what));
            (void)std::string(std::istreambuf_iterator<char>(*got), {});
          }
          if (opened >= 0) ::close(opened);
          std::string kept = support::read_file(theirs);
          if (kept.compare(0, 5, "later") == 0) kept.replace(0, 5, content, 0, 5);
          CHECK((kept == content));
          CHECK_FALSE(fs::exists(elsewhere / "none"));
          for (const auto& entry : fs::directory_iterator(root)) {
            const bool is_hidden = entry.path().filename().string().rfind(".wandb-restore-", 0) == 0;
            CHECK_FALSE((is_hidden && entry_of(entry.path()).st_uid == user));
          }
        }
      }
    }
  }
}

}  // namespace
#endif
