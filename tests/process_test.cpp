// Restores in separate processes: killed at any moment, many at once on one file, without locks, on failing disks.
//
// A child process is this program, with arguments that select one test case. The case restores one file and reports by its
// exit status. The environment has its parameters.
#include <doctest/doctest.h>

#include <algorithm>
#include <condition_variable>
#include <cstdlib>
#include <iterator>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "engine.hpp"

#ifndef _WIN32
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/stat.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "support.hpp"

extern char** environ;

namespace {

using namespace engine;
using stand_in::place;
using stand_in::request_kind;
using stand_in::target;
using wandb::errc;
namespace act = stand_in::act;

std::string variable(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

constexpr int downloaded = 0, local = 10, failed = 20;  // exit statuses; failed + errc

/// A child process that restores one file.
class child {
 public:
  using variables = std::vector<std::pair<std::string, std::string>>;

  child(const world& of, const std::string& name, const variables& more = {}) {
    variables all = {{"CHILD_URL", of.server.base_url()},
                     {"CHILD_KEY", of.server.key()},
                     {"CHILD_CA", of.settings.ca_file.string()},
                     {"CHILD_CACHE", of.settings.cache_dir.string()},
                     {"CHILD_ROOT", of.options.root.string()},
                     {"CHILD_NAME", name},
                     {"CHILD_REPLACE", of.options.replace ? "1" : "0"},
                     {"CHILD_CONNECTIONS", std::to_string(of.options.connections)},
                     {"CHILD_TEXT", (of.directory / "text").string()}};
    all.insert(all.end(), more.begin(), more.end());
    std::vector<std::string> texts;
    for (char** one = environ; *one != nullptr; ++one) texts.emplace_back(*one);
    for (const auto& [key, value] : all) texts.push_back(key + "=" + value);
    std::vector<char*> environment;
    for (auto& text : texts) environment.push_back(text.data());
    environment.push_back(nullptr);
    std::string program = "tests", only = "--test-case=process: restores one file", skipped = "--no-skip";
    char* arguments[] = {program.data(), only.data(), skipped.data(), nullptr};

    int ends[2];
    REQUIRE(pipe2(ends, O_CLOEXEC) == 0);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 1, "/dev/null", O_WRONLY, 0);
    posix_spawn_file_actions_adddup2(&actions, ends[1], 3);
    if (std::any_of(all.begin(), all.end(), [](const auto& one) { return one.first == "CHILD_CLOSED"; })) {
      for (const int standard : {0, 1, 2}) posix_spawn_file_actions_addclose(&actions, standard);
    }
    const int code = posix_spawn(&id_, "/proc/self/exe", &actions, nullptr, arguments, environment.data());
    posix_spawn_file_actions_destroy(&actions);
    ::close(ends[1]);
    progress_ = ends[0];
    REQUIRE(code == 0);
  }
  child(child&& other) noexcept
      : id_(std::exchange(other.id_, -1)), progress_(std::exchange(other.progress_, -1)) {}
  ~child() {
    if (id_ > 0) kill_now();
    if (progress_ >= 0) ::close(progress_);
  }

  /// Reads progress reports until `count` bytes are done. Returns the number of bytes, or 0 if the process ended before.
  std::uint64_t wait_for_bytes(std::uint64_t wanted) {
    for (std::uint64_t done = 0; read(progress_, &done, sizeof done) == static_cast<ssize_t>(sizeof done);) {
      if (done >= wanted) return wanted == 0 ? done + 1 : done;
    }
    return 0;
  }
  void kill_now() {
    kill(id_, SIGKILL);
    waitpid(id_, nullptr, 0);
    id_ = -1;
  }
  /// Returns the exit status, or -signal.
  int join() {
    int status = 0;
    waitpid(id_, &status, 0);
    id_ = -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  }

 private:
  pid_t id_ = -1;
  int progress_ = -1;
};

int status_of(errc code) { return failed + static_cast<int>(code); }

/// Returns the path of the preloaded library that makes disk operations fail (tests/faults/shim.c), or nothing under sanitizers.
std::optional<std::string> shim() {
#if TESTS_SANITIZED
  MESSAGE("left out: a preloaded library and a sanitizer's runtime do not go together");
  return std::nullopt;
#else
  const std::string library = WANDB_RESTORE_TESTS_SHIM;
  REQUIRE_MESSAGE(fs::exists(library), "not built: ", library);
  return library;
#endif
}

/// Whether a request is the only query of a process, or its first request to storage for a file of several ranges.
bool is_first(const stand_in::request_record& one, request_kind kind) {
  return one.kind == kind &&
         (kind == request_kind::graphql || one.range().value_or("").rfind("bytes=0-", 0) == 0);
}

/// Checks that a restore of model.h5 fails under a limit on file sizes of 5 MiB, with the remedy, and leaves nothing.
void check_exceeds_limit(const world& it) {
  rlimit before{};
  REQUIRE(::getrlimit(RLIMIT_FSIZE, &before) == 0);
  rlimit lower = before;
  lower.rlim_cur = 5 * MiB;
  REQUIRE(::setrlimit(RLIMIT_FSIZE, &lower) == 0);
  auto outcome = wandb::client<>(it.settings).try_restore("model.h5", it.options);
  REQUIRE(::setrlimit(RLIMIT_FSIZE, &before) == 0);
  const auto failure = it.check_failed(std::move(outcome), errc::disk_failure);
  CHECK(std::string(failure.what()).find("ulimit -f") != std::string::npos);
  CHECK(it.hidden() == 0);
}

/// Delays responses of storage until `processes` processes have sent their first request of this kind.
void gather(world& it, std::ptrdiff_t processes, request_kind kind) {
  it.server.on_request([&it, processes, kind](const stand_in::request_record& one) {
    if (one.kind != request_kind::storage) return;
    CHECK(it.server.wait_for(
        [=](const auto& now) {
          return std::count_if(now.requests.begin(), now.requests.end(),
                               [=](const auto& each) { return is_first(each, kind); }) >= processes;
        },
        60s));
  });
}

}  // namespace

/// A transport in memory with one file, for the process without standard streams: sockets are tested elsewhere.
class memory_transport {
 public:
  static std::string content() { return std::string(300'000, 'w'); }

  wandb::result<wandb::http_response> send(const wandb::http_request& request, wandb::body_sink& sink) {
    const bool question = request.method == "POST";
    const std::string body =
        question ? R"({"data":{"project":{"run":{"files":{"edges":[{"node":{"name":"model.h5","url":)"
                   R"("http://wandb.test/model.h5","sizeBytes":300000,"md5":")" +
                       stand_in::md5_hex(*stand_in::bytes(content())) +
                       R"("}}],"pageInfo":{"hasNextPage":false}}}}}})"
                 : content();
    const wandb::http_response head{200, {{"Content-Length", std::to_string(body.size())}}};
    if (!sink.start(head) || !sink.write(body)) return wandb::error(errc::cancelled, "cancelled");
    return head;
  }
};

/// Prints progress to the standard streams, whose descriptors may be other files.
bool print_to_standard_streams() {
  for (const int standard : {0, 1, 2}) (void)!write(standard, "progress", 8);
  return true;
}

/// Restores a file twice, first by a download, then from disk, with descriptors 0 to 2 closed. Returns an exit status.
int restore_without_standard_streams(wandb::settings settings, wandb::restore_options options) {
  settings.base_url = "http://wandb.test";
  options.on_progress = [](const wandb::progress&) { return print_to_standard_streams(); };
  wandb::client<memory_transport> client(settings, memory_transport());
  for (const auto source : {wandb::source::downloaded, wandb::source::local}) {
    auto file = client.try_restore("model.h5", options);
    if (!file) return status_of(file.error().code());
    print_to_standard_streams();
    for (const int standard : {0, 1, 2})
      if (fcntl(standard, F_GETFD) != -1) return 11;
    if (!file->verified() || file->source() != source) return 12;
    const std::string got(std::istreambuf_iterator<char>(*file), {});
    if (got != memory_transport::content()) return 13;
  }
  return downloaded;
}

TEST_CASE("process: restores one file" * doctest::skip()) {
  if (variable("CHILD_URL").empty()) return;
  if (variable("CHILD_UNPRIVILEGED") == "1" && geteuid() == 0) {
    if (setgid(65534) != 0 || setuid(65534) != 0) _exit(9);
  }
  signal(SIGPIPE, SIG_DFL);
  fcntl(3, F_SETFL, O_NONBLOCK);
  wandb::settings settings;
  settings.base_url = variable("CHILD_URL");
  settings.api_key = variable("CHILD_KEY");
  settings.ca_file = variable("CHILD_CA");
  settings.cache_dir = variable("CHILD_CACHE");
  settings.connect_timeout = settings.idle_timeout = 600s;  // tests hold answers
  settings.retry_timeout = 30s;
  settings.on_warning = [](std::string_view) {};
  wandb::restore_options options;
  options.run_path = "team/project/run1";
  options.root = variable("CHILD_ROOT");
  options.replace = variable("CHILD_REPLACE") == "1";
  options.connections = std::atoi(variable("CHILD_CONNECTIONS").c_str());
  options.on_progress = [](const wandb::progress& now) {
    const std::uint64_t done = now.phase == wandb::phase::downloading ? now.bytes_done : 0;
    if (now.phase == wandb::phase::downloading) (void)!write(3, &done, sizeof done);
    return true;
  };
  if (variable("CHILD_CLOSED") == "1") _exit(restore_without_standard_streams(settings, options));
  if (variable("CHILD_NAME").find('*') != std::string::npos) {
    alarm(300);  // a call that never ends is a failure
    const auto report = wandb::client<>(settings).try_restore_all(variable("CHILD_NAME"), options);
    if (report) _exit(downloaded);
    std::ofstream(variable("CHILD_TEXT")) << report.error().what();
    _exit(status_of(report.error().code()));
  }
  auto got = wandb::client<>(settings).try_restore(variable("CHILD_NAME"), options);
  if (got) _exit(got->verified() ? (got->source() == wandb::source::downloaded ? downloaded : local) : 8);
  std::ofstream(variable("CHILD_TEXT")) << got.error().what();
  _exit(status_of(got.error().code()));
}

/// A content whose last byte the server cannot send before release(). A process cannot finish before it is killed.
class held_content : public stand_in::content {
 public:
  explicit held_content(stand_in::content_ptr base) : base_(std::move(base)) {}
  ~held_content() override { release(); }

  std::uint64_t size() const override { return base_->size(); }
  std::string fingerprint() const override { return base_->fingerprint(); }
  void read(std::uint64_t offset, char* out, std::size_t count) const override {
    if (offset + count == size()) {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [this] { return released_; });
    }
    base_->read(offset, out, count);
  }
  void release() {
    const std::lock_guard lock(mutex_);
    released_ = true;
    changed_.notify_all();
  }

 private:
  stand_in::content_ptr base_;
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  bool released_ = false;
};

/// Replaces a file of the server by one with the same content that is held.
class held_file {
 public:
  held_file(world& of, const std::string& name, const stand_in::content_ptr& what)
      : content_(std::make_shared<held_content>(what)) {
    stand_in::file_attributes attributes;
    attributes.md5 = stand_in::md5_base64(*what);  // otherwise the server computes it from the held content
    of.server.add_file(of.run, name, content_, attributes);
  }
  held_file(const held_file&) = delete;
  held_file& operator=(const held_file&) = delete;
  ~held_file() { content_->release(); }

 private:
  std::shared_ptr<held_content> content_;
};

/// Returns the number of bytes in hidden files that equal the content, by pages. File sizes include reserved space.
std::uint64_t bytes_in_partials(const fs::path& folder, const stand_in::content& right) {
  std::uint64_t sum = 0;
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (entry.path().extension() != ".part") continue;
    std::ifstream in(entry.path(), std::ios::binary);
    std::string page(4096, '\0');
    for (std::uint64_t at = 0; at < large_size && in.read(page.data(), 4096); at += page.size()) {
      if (page == stand_in::read_text(right, at, page.size())) sum += page.size();
    }
  }
  return sum;
}

TEST_SUITE("processes: killed") {
  TEST_CASE(
      "killed at random moments: the next process restores the right file, and fetches few bytes again") {
    std::mt19937_64 random(1);
    std::uint64_t on_disk = 0, fetched = 0;  // in all rounds
    for (int round = 0; round < 8; ++round) {
      CAPTURE(round);
      world it;
      const auto what = it.add("model.h5", large_size);
      it.server.set_rate(0, 32 * MiB);
      const std::uint64_t moment = random() % (large_size * 9 / 10);
      CAPTURE(moment);
      {
        const held_file held(it, "model.h5", what);
        child first(it, "model.h5");
        REQUIRE(first.wait_for_bytes(moment) > 0);
        first.kill_now();
      }
      CHECK_FALSE(fs::exists(it.at("model.h5")));
      on_disk += bytes_in_partials(it.at("model.h5").parent_path(), *what);
      it.server.set_rate(0, 0);
      // The server may still send bytes to the killed process.
      REQUIRE(it.server.wait_for(
          [](const auto& now) { return now.counts.of(stand_in::origin::storage).open_connections == 0; },
          60s));
      it.server.clear_log();
      it.options.connections = 1;  // one connection requests no byte twice
      REQUIRE(child(it, "model.h5").join() == downloaded);
      CHECK(holds(it.at("model.h5"), *what));
      fetched += it.storage_bytes();
      CHECK(it.hidden() == 0);
    }
    REQUIRE(on_disk > 8 * MiB);
    CHECK(fetched <= 8 * large_size - on_disk * 9 / 10);  // the last written blocks are not recorded yet
  }

  TEST_CASE("killed again and again: the restore still succeeds") {
    world it;
    const auto what = it.add("model.h5", large_size);
    it.server.set_rate(0, 32 * MiB);
    for (std::uint64_t moment = 2 * MiB; moment < large_size; moment += 3 * MiB) {
      const held_file held(it, "model.h5", what);
      child one(it, "model.h5");
      REQUIRE(one.wait_for_bytes(moment) > 0);
      one.kill_now();
      CHECK_FALSE(fs::exists(it.at("model.h5")));
      CHECK(it.hidden() <= 3);  // the partial file, the lock, and one file of a kill between two steps
    }
    it.server.set_rate(0, 0);
    CHECK(it.restore("model.h5").has_value());
    CHECK(holds(it.at("model.h5"), *what));
    CHECK(it.hidden() == 0);
  }

  TEST_CASE("an old file stays complete until the new one replaces it") {
    world it;
    const auto what = it.add("model.h5", large_size);
    support::write_file(it.at("model.h5"), "old");
    it.options.replace = true;
    it.server.add_fault(target(place::storage).nth(1), act::stall(MiB));
    {
      child one(it, "model.h5");
      REQUIRE(it.server.wait_for([](const auto& now) { return now.counts.stalled > 0; }, 60s));
      one.kill_now();
    }
    CHECK(support::read_file(it.at("model.h5")) == "old");
    it.check_restored(it.restore("model.h5"), "model.h5", *what);
  }

  TEST_CASE("partial files of another content are removed") {
    world it;
    it.add("model.h5", large_size);
    it.options.connections = 1;
    it.server.add_fault(target(place::storage).nth(1), act::stall(8 * MiB));
    {
      child one(it, "model.h5");
      REQUIRE(one.wait_for_bytes(7 * MiB) > 0);
    }
    CHECK(it.hidden() == 2);  // the partial file, and the lock
    const auto later = it.add("model.h5", small_size);
    it.check_restored(it.restore("model.h5"), "model.h5", *later);
  }

  TEST_CASE("a waiting process resumes the killed one's download") {
    world it;
    const auto what = it.add("model.h5", large_size);
    it.options.connections = 1;
    it.server.add_fault(target(place::storage).nth(1), act::stall(12 * MiB));
    child first(it, "model.h5");
    REQUIRE(first.wait_for_bytes(12 * MiB) == 12 * MiB);
    child second(it, "model.h5");
    REQUIRE(second.wait_for_bytes(0) > 0);  // a waiting process reports progress
    const auto before = it.storage_bytes();
    first.kill_now();
    CHECK(second.join() == downloaded);
    CHECK(holds(it.at("model.h5"), *what));
    CHECK(before == 12 * MiB);
    CHECK(it.storage_bytes() - before <= large_size - 11 * MiB);  // the last blocks may not be recorded yet
    CHECK(it.hidden() == 0);
  }
}

/// Leaves a partial file of a killed process, renamed to an owner on another machine, with the given age.
fs::path leave_from(world& it, const std::string& realm, std::chrono::seconds silence) {
  it.options.connections = 1;
  it.server.add_fault(target(place::storage).nth(1), act::stall(12 * MiB));
  {
    child one(it, "model.h5");
    REQUIRE(one.wait_for_bytes(12 * MiB) > 0);
  }
  for (const auto& entry : fs::directory_iterator(it.options.root)) {
    if (entry.path().extension() != ".part") continue;
    std::string name = entry.path().filename().string();
    const auto begin = name.rfind('-') + 1, end = name.find('.', begin);
    const std::string own = name.substr(begin, end - begin);
    REQUIRE(own.size() == 16);
    const fs::path moved =
        entry.path().parent_path() /
        name.replace(begin, own.size(), realm.empty() ? own.substr(0, 8) + "00000000" : realm);
    fs::rename(entry.path(), moved);
    fs::last_write_time(moved, fs::file_time_type::clock::now() - silence);
    it.server.clear_log();
    return moved;
  }
  FAIL("no partial file was left");
  return {};
}

TEST_SUITE("processes: on other machines") {
  TEST_CASE("blocks of another host's partial file are copied after a minute's silence; after an hour that "
            "file is removed") {
    world it;
    const auto what = it.add("model.h5", large_size);
    const fs::path left = leave_from(it, "0000000000000000", 58s);
    auto got = it.restore("model.h5");
    CHECK(fs::file_time_type::clock::now() - fs::last_write_time(left) >= 60s);
    REQUIRE(got.has_value());
    CHECK(holds(it.at("model.h5"), *what));
    CHECK(it.storage_bytes() <= large_size - 11 * MiB);
    CHECK(fs::exists(left));  // its owner might return
    fs::last_write_time(left, fs::file_time_type::clock::now() - 2h);
    got = it.restore("model.h5");
    REQUIRE(got.has_value());
    CHECK(got->source() == wandb::source::local);
    CHECK(it.hidden() == 0);
  }

  TEST_CASE(
      "blocks of a partial file of another container of this machine are reused at once, and it is removed") {
    world it;
    const auto what = it.add("model.h5", large_size);
    leave_from(it, "", 0s);
    const auto began = std::chrono::steady_clock::now();
    it.check_restored(it.restore("model.h5"), "model.h5", *what);
    CHECK(std::chrono::steady_clock::now() - began < 50s);  // less than a minute of silence
    CHECK(it.storage_bytes() <= large_size - 11 * MiB);
  }

  TEST_CASE("a failed query, or an answer without a size, leaves partial files for the next call") {
    world it;
    const auto what = it.add("model.h5", large_size);
    it.options.connections = 1;
    it.server.add_fault(target(place::storage).nth(1), act::stall(12 * MiB));
    {
      std::atomic<bool> cancel{false};
      it.options.cancel = &cancel;
      it.options.on_progress = [&](const wandb::progress& now) {
        if (now.bytes_done >= 12 * MiB) cancel = true;
        return true;
      };
      it.check_failed(it.restore("model.h5"), errc::cancelled);
      it.options.cancel = nullptr;
      it.options.on_progress = {};
    }
    CHECK(it.hidden() == 1);
    stand_in::file_attributes unknown;
    unknown.size_as = stand_in::size_form::absent;
    it.server.add_file(it.run, "model.h5", what, unknown);
    it.server.clear_faults();
    it.server.add_fault(target(place::storage), act::status(404));
    CHECK_FALSE(it.restore("model.h5").has_value());
    CHECK(it.hidden() == 1);
    it.server.clear_faults();
    it.server.add_file(it.run, "model.h5", what, {});
    it.server.clear_log();
    it.check_restored(it.restore("model.h5"), "model.h5", *what);
    CHECK(it.storage_bytes() == large_size - 12 * MiB);
  }
}

TEST_SUITE("processes: many at once") {
  TEST_CASE("with working locks storage sends the file once") {
    world it;
    const auto what = it.add("model.h5", large_size);
    it.options.connections = 1;  // one connection requests no byte twice
    constexpr std::size_t count = 16;
    gather(it, count, request_kind::graphql);
    std::vector<child> all;
    for (std::size_t i = 0; i < count; ++i) all.emplace_back(it, "model.h5");
    int fetched = 0, opened = 0;
    for (auto& one : all) {
      const int status = one.join();
      fetched += status == downloaded;
      opened += status == local;
    }
    it.server.on_request({});
    CHECK(fetched == 1);
    CHECK(opened == count - 1);
    CHECK(holds(it.at("model.h5"), *what));
    CHECK(it.storage() == 1);
    CHECK(it.storage_bytes() == large_size);
    CHECK(it.hidden() == 0);
  }

  TEST_CASE("with ineffective or failing locks every process gets the right file") {
    const auto library = shim();
    if (!library) return;
    for (const char* locks : {"none", "ENOLCK", "ENOSYS"}) {
      CAPTURE(std::string(locks));
      world it;
      const auto what = it.add("model.h5", 9 * MiB);
      constexpr std::size_t count = 6;
      gather(it, count, request_kind::storage);
      std::vector<child> all;
      for (std::size_t i = 0; i < count; ++i)
        all.emplace_back(it, "model.h5", child::variables{{"LD_PRELOAD", *library}, {"FAULT_LOCK", locks}});
      for (auto& one : all) {
        const int status = one.join();
        CHECK((status == downloaded || status == local));
      }
      it.server.on_request({});
      CHECK(holds(it.at("model.h5"), *what));
      if (locks != std::string("none")) {  // ineffective lock files are not left
        for (const auto& entry : fs::directory_iterator(it.options.root))
          CHECK(entry.path().extension() != ".lock");
      }
      CHECK(it.storage_bytes() >
            9 * MiB * 3 / 2);  // the fault was effective: the file was fetched more than once
      // At most lock files are left, and no usable partial file.
      it.check_restored(
          [&] {
            it.options.replace = true;
            return it.restore("model.h5");
          }(),
          "model.h5", *what);
    }
  }

  TEST_CASE("if no thread can be started the call fails; if some can, the file is restored") {
    const auto library = shim();
    if (!library) return;
    struct row {
      const char *name, *threads;
      bool fails;
    };
    for (const row& each : {row{"model.h5", "1-", true}, row{"small.h5", "1-", true}, row{"*.h5", "1-", true},
                            row{"model.h5", "2-", true}, row{"model.h5", "3-", false},
                            row{"model.h5", "1", false}, row{"model.h5", "2", true}}) {
      const std::string shown = std::string(each.name) + ", threads that fail: " + each.threads;
      CAPTURE(shown);
      world it;
      const auto what = it.add("model.h5", 9 * MiB);
      it.add("small.h5", small_size);
      const int status =
          child(it, each.name, {{"LD_PRELOAD", *library}, {"FAULT_THREAD", each.threads}}).join();
      if (each.fails) {
        CHECK(status == status_of(errc::disk_failure));
        CHECK(support::read_file(it.directory / "text").find("cannot start a thread") != std::string::npos);
        CHECK_FALSE(fs::exists(it.at("model.h5")));
      } else {
        CHECK(status == downloaded);
        CHECK(holds(it.at("model.h5"), *what));
      }
    }
  }

  TEST_CASE("many files: the list may be read before the thread that asked for it goes on") {
    const auto library = shim();
    if (!library) return;
    world it;
    const auto what = it.add("small.h5", small_size);
    CHECK(child(it, "*.h5", {{"LD_PRELOAD", *library}, {"FAULT_THREAD", "late"}}).join() == downloaded);
    CHECK(holds(it.at("small.h5"), *what));
  }

  TEST_CASE("a limit on file sizes is reported with a remedy, before the download") {
    world it;
    it.add("model.h5", 9 * MiB);
    check_exceeds_limit(it);
    CHECK(it.storage() == 0);
  }

  TEST_CASE("a limit on file sizes is reported, not a signal, if the service does not tell the size") {
    for (const bool is_proved : {true, false}) {
      CAPTURE(is_proved);
      world it;
      stand_in::file_attributes attributes;
      attributes.size_as = stand_in::size_form::absent;
      if (!is_proved) attributes.md5_as = stand_in::md5_form::absent;
      it.add("model.h5", 9 * MiB, attributes);
      it.server.add_fault(place::storage, act::chunked());
      check_exceeds_limit(it);
    }
  }

  TEST_CASE("a download of 600 GiB is resumed, although its record has only the blocks that arrived") {
    const auto library = shim();
    if (!library) return;
    const child::variables no_free_space = {
        {"LD_PRELOAD", *library}, {"FAULT_FREE", "unknown"}, {"FAULT_ALLOCATE", "EOPNOTSUPP"}};
    world it;
    stand_in::file_attributes attributes;
    attributes.md5 = "0123456789abcdef0123456789abcdef";
    it.add("model.h5", 600 * 1024 * MiB, attributes);
    for (const std::uint64_t present : {0U, 1U}) {
      it.server.clear_log();
      child process(it, "model.h5", no_free_space);
      CHECK(process.wait_for_bytes(present == 0 ? 40 * MiB : 1) > 0);
      REQUIRE(it.server.wait_for(
          [](const auto& now) { return now.counts.of(request_kind::storage).requests > 0; }, 60s));
      const auto range = it.server.requests(request_kind::storage).front().range();
      REQUIRE(range.has_value());
      CHECK((range->substr(0, 8) == "bytes=0-") == (present == 0));
      process.kill_now();
    }
  }

  TEST_CASE("without locks, if some processes are killed, the others get the right file") {
    const auto library = shim();
    if (!library) return;
    world it;
    const auto what = it.add("model.h5", large_size);
    it.server.set_rate(0, 64 * MiB);
    const child::variables faults = {{"LD_PRELOAD", *library}, {"FAULT_LOCK", "none"}};
    std::vector<child> killed, others;
    std::optional<held_file> held;
    held.emplace(it, "model.h5", what);
    for (int i = 0; i < 3; ++i) {
      killed.emplace_back(it, "model.h5", faults);
      others.emplace_back(it, "model.h5", faults);
    }
    for (auto& one : killed) {
      REQUIRE(one.wait_for_bytes(2 * MiB) > 0);
      one.kill_now();
    }
    held.reset();
    others.emplace_back(it, "model.h5", faults);
    for (auto& one : others) {
      const int status = one.join();
      CHECK((status == downloaded || status == local));
    }
    CHECK(holds(it.at("model.h5"), *what));
  }
}

TEST_SUITE("processes: signals, streams and disks") {
  TEST_CASE("SIGPIPE does not end a program that has its default handler") {
    world it;
    const auto what = it.add("model.h5", large_size);
    it.server.add_fault(target(place::connect).nth(1), act::refuse());
    it.server.add_fault(target(place::graphql).nth(1), act::reset(5));
    it.server.add_fault(target(place::files).nth(1), act::close_silently());
    for (unsigned n = 1; n < 12; n += 2)
      it.server.add_fault(target(place::storage).nth(n), act::reset(200'000 * n));
    CHECK(child(it, "model.h5").join() == downloaded);
    CHECK(holds(it.at("model.h5"), *what));
  }

  TEST_CASE("output of a program without standard streams does not go into its files") {
    world it;
    CHECK(child(it, "model.h5", {{"CHILD_CLOSED", "1"}}).join() == downloaded);
    CHECK((support::read_file(it.at("model.h5")) == memory_transport::content()));
    CHECK(it.hidden() == 0);
  }

  TEST_CASE("an unwritable directory is disk_failure with its name, before the download") {
    world it;
    it.add("model.h5", small_size);
    fs::create_directories(it.options.root);
    fs::permissions(it.directory.path(), fs::perms(0755));
    fs::permissions(it.options.root, fs::perms(0555));
    CHECK(child(it, "model.h5", {{"CHILD_UNPRIVILEGED", "1"}, {"CHILD_TEXT", "/dev/null"}}).join() ==
          status_of(errc::disk_failure));
    CHECK(it.storage() == 0);
    fs::permissions(it.options.root, fs::perms(0755));
    CHECK(it.hidden() == 0);
  }

  TEST_CASE(
      "disk errors are disk_failure and leave the old file; short and interrupted operations are repeated") {
    const auto library = shim();
    if (!library) return;
    struct failing {
      const char* name;
      child::variables faults;
      bool before_the_first_byte;
      const char* text;  // nullptr: the restore succeeds
    };
    const std::vector<failing> rows = {
        {"too little is free", {{"FAULT_FREE", "1000000"}}, true, " are missing"},
        {"nothing is free", {{"FAULT_FREE", "0"}}, true, " are missing"},
        {"no room to reserve", {{"FAULT_ALLOCATE", "ENOSPC"}}, true, "No space left"},
        {"the quota is used up", {{"FAULT_ALLOCATE", "EDQUOT"}}, true, "uota"},
        {"full, and nothing told it before",
         {{"FAULT_ALLOCATE", "EOPNOTSUPP"}, {"FAULT_WRITE", "ENOSPC@20"}},
         false,
         "No space left"},
        {"a write fails", {{"FAULT_WRITE", "EIO@20"}}, false, "Input/output error"},
        {"the first write fails", {{"FAULT_WRITE", "EIO@1"}}, true, "Input/output error"},
        {"the sync fails", {{"FAULT_SYNC", "EIO"}}, false, "Input/output error"},
        {"the rename fails", {{"FAULT_RENAME", "EACCES"}}, false, "Permission denied"},
        {"reserving is not known there", {{"FAULT_ALLOCATE", "EOPNOTSUPP"}}, false, nullptr},
        {"nothing is known of free space", {{"FAULT_FREE", "unknown"}}, false, nullptr},
        {"writes that take half of what they are given", {{"FAULT_WRITE", "short"}}, false, nullptr},
        {"interrupted writes", {{"FAULT_WRITE", "EINTR"}}, false, nullptr},
        {"an interrupted sync", {{"FAULT_SYNC", "EINTR"}}, false, nullptr},
        {"an interrupted cut", {{"FAULT_TRUNCATE", "EINTR"}}, false, nullptr},
        {"an interrupted rename", {{"FAULT_RENAME", "EINTR"}}, false, nullptr},
        {"a rename whose answer is lost", {{"FAULT_RENAME", "lost"}}, false, nullptr},
        {"an interrupted lock", {{"FAULT_LOCK", "EINTR"}}, false, nullptr},
        {"an interrupted look", {{"FAULT_LOOK", "EINTR"}}, false, nullptr},
        {"an interrupted open", {{"FAULT_OPEN", "EINTR"}}, false, nullptr},
    };
    for (const auto& row : rows) {
      CAPTURE(std::string(row.name));
      world it;
      const auto what = it.add("model.h5", large_size);
      support::write_file(it.at("model.h5"), "old");
      it.options.replace = true;
      auto faults = row.faults;
      faults.emplace_back("LD_PRELOAD", *library);
      const int status = child(it, "model.h5", faults).join();
      if (row.text == nullptr) {
        CHECK(status == downloaded);
        CHECK(holds(it.at("model.h5"), *what));
        CHECK(it.hidden() == 0);
        continue;
      }
      CHECK(status == status_of(errc::disk_failure));
      const std::string text = support::read_file(it.directory / "text");
      CAPTURE(text);
      CHECK(text.find(row.text) != std::string::npos);
      CHECK(text.find(it.options.root.string()) != std::string::npos);
      CHECK(support::read_file(it.at("model.h5")) == "old");
      if (row.before_the_first_byte) {
        CHECK(it.storage() == 0);
        CHECK(it.hidden() == 0);
      }
      // Once the disk works again, the next call succeeds.
      it.check_restored(it.restore("model.h5"), "model.h5", *what);
    }
  }

  TEST_CASE("killed during the sync of finished content: no byte is fetched again") {
    const auto library = shim();
    if (!library) return;
    world it;
    const auto what = it.add("model.h5", large_size);
    const int status = child(it, "model.h5", {{"LD_PRELOAD", *library}, {"FAULT_SYNC", "kill"}}).join();
    CHECK(status == -SIGKILL);
    it.server.clear_log();
    it.check_restored(it.restore("model.h5"), "model.h5", *what);
    CHECK(it.storage_bytes() == 0);
  }

  TEST_CASE("after a failed sync the file is downloaded again") {
    const auto library = shim();
    if (!library) return;
    world it;
    const auto what = it.add("model.h5", large_size);
    CHECK(child(it, "model.h5", {{"LD_PRELOAD", *library}, {"FAULT_SYNC", "EIO"}}).join() ==
          status_of(errc::disk_failure));
    CHECK(it.hidden() == 0);
    it.server.clear_log();
    it.options.connections = 1;
    it.check_restored(it.restore("model.h5"), "model.h5", *what);
    CHECK(it.storage_bytes() == large_size);
  }

  TEST_CASE("one sync of the content and one of the directory") {
    const auto library = shim();
    if (!library) return;
    for (const auto size : {small_size, large_size}) {
      world it;
      it.add("model.h5", size);
      const fs::path synced = it.directory / "synced";
      CHECK(child(it, "model.h5", {{"LD_PRELOAD", *library}, {"FAULT_SYNCED", synced.string()}}).join() ==
            downloaded);
      CHECK(support::read_file(synced) == "fd");
    }
  }

  TEST_CASE("a new small file and a kept file do not read the directory") {
    const auto library = shim();
    if (!library) return;
    world it;
    const auto what = it.add("model.h5", small_size);
    const child::variables faults{{"LD_PRELOAD", *library}, {"FAULT_DIRECTORY", it.options.root.string()}};
    CHECK(child(it, "model.h5", faults).join() == downloaded);
    CHECK(child(it, "model.h5", faults).join() == local);
    // The fault is effective: after a kill the next process reads the directory.
    it.options.replace = true;
    CHECK(child(it, "model.h5", {{"LD_PRELOAD", *library}, {"FAULT_RENAME", "kill"}}).join() == -SIGKILL);
    CHECK(child(it, "model.h5", faults).join() == -SIGKILL);
    it.check_restored(it.restore("model.h5"), "model.h5", *what);
  }

  TEST_CASE("a lock file that cannot be removed does no harm, and the next call removes it") {
    const auto library = shim();
    if (!library) return;
    world it;
    const auto what = it.add("model.h5", small_size);
    CHECK(child(it, "model.h5", {{"LD_PRELOAD", *library}, {"FAULT_UNLINK", "EACCES"}}).join() == downloaded);
    CHECK(it.hidden() == 1);
    CHECK(child(it, "model.h5").join() == local);
    CHECK(it.hidden() == 0);
    CHECK(holds(it.at("model.h5"), *what));
  }

  TEST_CASE("killed before the rename: no byte is fetched again") {
    const auto library = shim();
    if (!library) return;
    world it;
    const auto what = it.add("model.h5", large_size);
    const int status = child(it, "model.h5", {{"LD_PRELOAD", *library}, {"FAULT_RENAME", "kill"}}).join();
    CHECK(status == -SIGKILL);
    CHECK_FALSE(fs::exists(it.at("model.h5")));
    it.server.clear_log();
    it.check_restored(it.restore("model.h5"), "model.h5", *what);
    CHECK(it.storage_bytes() == 0);
  }

  TEST_CASE("the blocks of a partial file are copied also where the kernel cannot copy them") {
    const auto library = shim();
    if (!library) return;
    world it;
    const auto what = it.add("model.h5", large_size);
    CHECK(child(it, "model.h5", {{"LD_PRELOAD", *library}, {"FAULT_RENAME", "kill"}}).join() == -SIGKILL);
    for (const auto& entry :
         fs::directory_iterator(it.options.root)) {  // with a second link it is not taken over
      if (entry.path().extension() != ".lock")
        fs::create_hard_link(entry.path(), it.directory / "second link");
    }
    REQUIRE(fs::exists(it.directory / "second link"));
    it.server.clear_log();
    CHECK(child(it, "model.h5", {{"LD_PRELOAD", *library}, {"FAULT_COPY", "EIO"}}).join() == downloaded);
    CHECK(holds(it.at("model.h5"), *what));
    CHECK(it.storage_bytes() == 0);
  }

  TEST_CASE("an unreadable local file is not taken for missing") {
    const auto library = shim();
    if (!library) return;
    struct row {
      const char* fault;
      const char* error;
      const char* text;
    };
    for (const auto& [fault, error, text] :
         {row{"FAULT_LOOK", "EIO", "Input/output error"}, row{"FAULT_LOOK", "EACCES", "Permission denied"},
          row{"FAULT_LOOK", "ESTALE", "Stale file handle"}, row{"FAULT_OPEN", "EIO", "Input/output error"},
          row{"FAULT_OPEN", "EACCES", "Permission denied"}, row{"FAULT_OPEN", "EMFILE", "ulimit -n"}}) {
      const std::string shown = std::string(fault) + " " + error;
      CAPTURE(shown);
      world it;
      it.add("model.h5", small_size);
      support::write_file(it.at("model.h5"), "the user's own");
      CHECK(child(it, "model.h5", {{"LD_PRELOAD", *library}, {fault, error}}).join() ==
            status_of(errc::disk_failure));
      const std::string told = support::read_file(it.directory / "text");
      CAPTURE(told);
      CHECK(told.find(text) != std::string::npos);
      CHECK(told.find(it.at("model.h5").string()) != std::string::npos);
      CHECK(support::read_file(it.at("model.h5")) == "the user's own");
      CHECK(it.graphql() == 0);
      CHECK(it.hidden() == 0);
    }
  }

  TEST_CASE("the error tells the exact number of missing bytes") {
    const auto library = shim();
    if (!library) return;
    world it;
    it.add("model.h5", large_size);
    CHECK(child(it, "model.h5", {{"LD_PRELOAD", *library}, {"FAULT_FREE", "1000000"}}).join() ==
          status_of(errc::disk_failure));
    const std::string text = support::read_file(it.directory / "text");
    CAPTURE(text);
    CHECK(text.find(std::to_string(large_size) + " bytes are needed") != std::string::npos);
    CHECK(text.find("1000000 are free") != std::string::npos);
    CHECK(text.find(std::to_string(large_size - 1000000) + " are missing") != std::string::npos);
  }
}

#endif  // _WIN32
