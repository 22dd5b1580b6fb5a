// Many files in one call: patterns, the list and the files side by side, one failure among successes, what ends a call, the
// newest file, and the wait for a file that is still to come.
#include "engine.hpp"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <fstream>
#include <memory>
#include <mutex>
#include <set>
#include <thread>

using engine::holds;
using engine::world;
using stand_in::place;
using stand_in::request_kind;
using wandb::errc;
namespace act = stand_in::act;
namespace fs = std::filesystem;
using namespace std::chrono_literals;

namespace {

std::vector<std::string> names(const wandb::restore_report& report) {
  std::vector<std::string> found;
  for (const auto& file : report.files) found.push_back(file.name);
  return found;
}

/// Returns the number of bytes that this process has read from files, or 0 where the system does not tell.
std::uint64_t bytes_read() {
  std::ifstream counters("/proc/self/io");
  std::string name;
  std::uint64_t value = 0;
  while (counters >> name >> value) {
    if (name == "rchar:") return value;
  }
  return 0;
}

wandb::restore_report all(world& w, std::string_view pattern) {
  auto report = wandb::client<>(w.settings).try_restore_all(pattern, w.options);
  if (!report) {
    const std::string text = report.error().what();
    CAPTURE(text);
    REQUIRE(report.has_value());
  }
  return *std::move(report);
}

}  // namespace

TEST_SUITE("restore_all") {
  TEST_CASE("restores the files that match, in the service's order, and no others") {
    world w;
    for (const char* name : {"a.h5", "ckpt/a.h5", "ckpt/deep/b.h5", "ckpt/c.txt", "d.txt"}) w.add(name, 1000);
    const std::pair<const char*, std::vector<std::string>> cases[] = {
        {"*.h5", {"a.h5", "ckpt/a.h5", "ckpt/deep/b.h5"}},
        {"ckpt/", {"ckpt/a.h5", "ckpt/c.txt", "ckpt/deep/b.h5"}},
        {"c*t/?.*", {"ckpt/a.h5", "ckpt/c.txt"}},
        {"?.txt", {"d.txt"}},
        {"a.h5", {"a.h5"}},
        {"*/deep/", {"ckpt/deep/b.h5"}},
        {"*", {"a.h5", "ckpt/a.h5", "ckpt/c.txt", "ckpt/deep/b.h5", "d.txt"}},
    };
    int number = 0;
    for (const auto& [pattern, wanted] : cases) {
      const std::string shown = pattern;
      CAPTURE(shown);
      w.options.root = w.directory / ("root" + std::to_string(++number));
      const auto report = all(w, pattern);
      auto found = names(report);
      CHECK(report.complete());
      std::sort(found.begin(), found.end());
      std::string text;
      for (const auto& name : found) text += name + " ";
      CAPTURE(text);
      CHECK(found == wanted);
      for (const auto& file : report.files) {
        CHECK_FALSE(file.failure.has_value());
        CHECK(file.verified);
        CHECK(file.size == 1000);
        CHECK(file.source == wandb::source::downloaded);
        CHECK(file.path == w.at(file.name));
        CHECK(fs::file_size(file.path) == 1000);
      }
      CHECK(w.hidden() == 0);
    }
  }

  TEST_CASE("matches_pattern: any text, one character, all below") {
    using wandb::matches_pattern;
    struct row {
      const char *name, *pattern;
      bool is_match;
    };
    const row table[] = {
        {"a", "a", true},
        {"a", "b", false},
        {"a", "", false},
        {"", "", true},
        {"", "*", true},
        {"abc", "*", true},
        {"a/b/c", "a*c", true},
        {"abc", "a*b", false},
        {"abab", "*ab", true},
        {"aaab", "a*ab", true},
        {"a", "?", true},
        {"", "?", false},
        {"ab", "?", false},
        {"a/b", "a?b", true},
        {"d/e", "d/", true},
        {"d", "d/", false},
        {"d/", "d/", true},
        {"x/d/e", "d/", false},
        {"x/d/e", "*/d/", true},
        {"a*b", "a?b", true},
        {"\xc3\xa4", "?", true},
        {"\xe2\x82\xac.pt", "?.pt", true},
        {"\xc3\xa4\xc3\xb6", "?", false},
        {"\xc3\xa4\xc3\xb6", "??", true},
        {"\xff", "?", true},
        {"[a]", "[a]", true},
        {"a", "[a]", false},
        {"A", "a", false},
    };
    for (const row& each : table) {
      CAPTURE(std::string(each.name));
      CAPTURE(std::string(each.pattern));
      CHECK(matches_pattern(each.name, each.pattern) == each.is_match);
    }
  }

  TEST_CASE("exclude leaves out files that match one of its patterns") {
    world w;
    for (const char* name : {"ckpt/1.h5", "ckpt/1.optim", "ckpt/tmp/2.h5", "log.txt"}) w.add(name, 100);
    w.options.exclude = {"*.optim", "*/tmp/"};
    CHECK(names(all(w, "ckpt/")) == std::vector<std::string>{"ckpt/1.h5"});
    CHECK_FALSE(fs::exists(w.at("ckpt/1.optim")));
    w.options.exclude = {"*"};
    const auto says = [](const wandb::error& failure, const char* text) {
      return std::string(failure.what()).find(text) != std::string::npos;
    };
    const auto nothing = wandb::client<>(w.settings).try_restore_all("ckpt/", w.options);
    REQUIRE_FALSE(nothing.has_value());
    CHECK(nothing.error().code() == errc::file_not_found);
    CHECK(says(nothing.error(), "looking for files that match \"ckpt/\""));
    CHECK_FALSE(says(nothing.error(), "is a directory"));
    const auto none = wandb::client<>(w.settings).try_restore_newest("ckpt/", w.options);
    REQUIRE_FALSE(none.has_value());
    CHECK(none.error().code() == errc::file_not_found);
    const auto directory = wandb::client<>(w.settings).try_restore_all("ckpt", w.options);
    REQUIRE_FALSE(directory.has_value());
    CHECK(says(directory.error(), "is a directory of the run: restore_all with the pattern \"ckpt/\""));
  }

  TEST_CASE("one query for each page, and no redirect where the list has direct addresses") {
    world w;
    for (int i = 0; i < 501; ++i) w.add("f" + std::to_string(i), 10);
    const auto report = all(w, "*");
    CHECK(report.files.size() == 501);
    CHECK(report.complete());
    CHECK(w.graphql() == 2);
    CHECK(w.files() == 0);
    CHECK(w.storage() == 501);
  }

  TEST_CASE("a direct address that is refused, or cannot be reached, is replaced by the service's own, for "
            "all files") {
    for (const char* direct : {"refused", "unreachable"}) {
      CAPTURE(std::string(direct));
      world w;
      w.options.connections = 1;
      const std::string address = std::string(direct) == "refused"
                                      ? w.server.storage_url() + "/no/such/object?X=1"
                                      : "https://127.0.0.1:1/x";
      for (int i = 0; i < 5; ++i) {
        stand_in::file_attributes attributes;
        attributes.direct_url = address;
        w.add("f" + std::to_string(i), 1000, attributes);
      }
      const auto report = all(w, "*");
      CHECK(report.complete());
      CHECK(w.files() == 5);
      CHECK(w.graphql() == 1);
      CHECK(w.storage() == 5);
      CHECK(w.requests(request_kind::other) == (std::string(direct) == "refused" ? 1 : 0));  // tried once
    }
  }

  TEST_CASE("large files are split, small ones side by side; connections limits both") {
    world w;
    w.options.connections = 3;
    const auto large = w.add("b-large", 16 * engine::MiB + 7);
    for (int i = 0; i < 10; ++i) w.add("a" + std::to_string(i), 1000);
    for (int i = 0; i < 10; ++i) w.add("c" + std::to_string(i), 1000);
    struct counts {
      std::atomic<int> now{0}, most{0};
    };
    struct counting_transport {
      wandb::http_transport real;
      std::shared_ptr<counts> of_storage;

      wandb::result<wandb::http_response> send(const wandb::http_request& request, wandb::body_sink& sink) {
        if (request.url.find("/bucket/") == std::string::npos) return real.send(request, sink);
        const int now = ++of_storage->now;
        int before = of_storage->most;
        while (before < now && !of_storage->most.compare_exchange_weak(before, now)) {}
        auto got = real.send(request, sink);
        --of_storage->now;
        return got;
      }
    };
    const auto of_storage = std::make_shared<counts>();
    wandb::client<counting_transport> client(
        w.settings, counting_transport{wandb::http_transport(w.settings), of_storage});
    const auto got = client.try_restore_all("*", w.options);
    REQUIRE(got.has_value());
    const auto& report = *got;
    CHECK(report.complete());
    CHECK(report.files.size() == 21);
    CHECK(holds(w.at("b-large"), *large));
    CHECK(of_storage->most > 1);
    CHECK(of_storage->most <= 3);
    std::set<std::string> ranges;
    for (const auto& request : w.server.requests(request_kind::storage))
      if (const auto range = request.range()) ranges.insert(*range);
    CHECK(ranges.size() > 1);
  }

  TEST_CASE("files of some MiB are fetched side by side, over the connections that a larger one leaves") {
    world w;
    w.options.connections = 4;
    constexpr std::size_t count = 3;  // over 2, 1 and 1 connections
    w.add("a", 16 * engine::MiB);
    for (const char* name : {"b", "c"}) w.add(name, 9 * engine::MiB);
    std::mutex mutex;
    std::condition_variable changed;
    std::set<std::string> asked;
    bool are_together = true;
    w.server.on_request([&](const stand_in::request_record& request) {
      if (request.kind != request_kind::storage) return;
      std::unique_lock<std::mutex> held(mutex);
      asked.insert(request.path);
      changed.notify_all();
      if (!changed.wait_for(held, std::chrono::seconds(20), [&] { return asked.size() >= count; }))
        are_together = false;
    });
    const auto report = all(w, "*");
    CHECK(report.complete());
    CHECK(report.files.size() == count);
    const std::lock_guard<std::mutex> guard(mutex);
    CHECK(are_together);
  }

  TEST_CASE("a second call fetches nothing; with refresh it asks for the list only, and reads no file") {
    world w;
    constexpr std::size_t count = 1000;
    for (std::size_t i = 0; i < count; ++i) w.add("f" + std::to_string(i), 20'000);
    CHECK(all(w, "*").complete());
    w.server.clear_log();
    auto report = all(w, "*");
    CHECK(report.complete());
    for (const auto& file : report.files) CHECK(file.source == wandb::source::local);
    CHECK(w.storage() == 0);
    w.options.cache = wandb::cache_policy::refresh();
    w.server.clear_log();
    const auto read_before = bytes_read();
    report = all(w, "*");
    const auto bytes = bytes_read() - read_before;
    CHECK(report.complete());
    CHECK(report.files.size() == count);
    for (const auto& file : report.files) {
      CHECK(file.source == wandb::source::local);
      CHECK(file.verified);
    }
    CHECK(w.graphql() == count / 500);
    CHECK(w.files() == 0);
    CHECK(w.storage() == 0);
    MESSAGE("bytes of local files that were read, for " << count << " files of 20,000: " << bytes);
    CHECK(bytes < 2'000 * count);  // receipts, and the CA file
  }

  TEST_CASE("the failure of one file does not stop the others") {
    world w;
    w.settings.retry_timeout = 300ms;
    for (int i = 0; i < 6; ++i) w.add("f" + std::to_string(i), 1000);
    w.server.add_fault(stand_in::target(place::storage).matching("f3"), act::status(404));
    w.server.add_fault(stand_in::target(place::files).matching("f3"), act::status(404));
    const auto report = all(w, "*");
    CHECK_FALSE(report.complete());
    CHECK_FALSE(report.failure.has_value());
    CHECK(report.files.size() == 6);
    for (const auto& file : report.files) {
      CAPTURE(file.name);
      CHECK(file.failure.has_value() == (file.name == "f3"));
      CHECK(fs::exists(w.at(file.name)) == (file.name != "f3"));
      if (file.failure) CHECK(std::string(file.failure->what()).find("\"f3\"") != std::string::npos);
    }
    CHECK(report.first_failure() != nullptr);
  }

  TEST_CASE("a refused key ends the call before any file") {
    world w;
    w.add("f", 1000);
    w.settings.api_key = std::string(40, 'x');
    const auto report = wandb::client<>(w.settings).try_restore_all("*", w.options);
    REQUIRE_FALSE(report.has_value());
    CHECK(report.error().code() == errc::not_authenticated);
  }

  TEST_CASE("a key that is refused midway ends the call; the report keeps what was done") {
    world w;
    w.options.connections = 1;
    for (int i = 0; i < 5; ++i) {
      stand_in::file_attributes attributes;
      attributes.direct_url = "";
      w.add("f" + std::to_string(i), 1000, attributes);
    }
    w.server.add_fault(stand_in::target(place::files).nth(3, 100), act::status(401));
    const auto report = all(w, "*");
    REQUIRE(report.failure.has_value());
    CHECK(report.failure->code() == errc::not_authenticated);
    REQUIRE(report.files.size() == 5);
    for (int i = 0; i < 5; ++i) {
      const auto& file = report.files[static_cast<std::size_t>(i)];
      CAPTURE(file.name);
      CHECK(file.failure.has_value() == (i >= 2));
      if (file.failure) CHECK(file.failure->code() == errc::not_authenticated);
    }
    CHECK(w.files() == 3);
  }

  TEST_CASE("no match names similar files; an empty pattern and a bad option are refused without a request") {
    world w;
    w.add("model-best.h5", 1000);
    auto report = wandb::client<>(w.settings).try_restore_all("model-bset.h5", w.options);
    REQUIRE_FALSE(report.has_value());
    CHECK(report.error().code() == errc::file_not_found);
    CHECK(std::string(report.error().what()).find("did you mean \"model-best.h5\"?") != std::string::npos);
    w.server.clear_log();
    report = wandb::client<>(w.settings).try_restore_all("", w.options);
    REQUIRE_FALSE(report.has_value());
    CHECK(report.error().code() == errc::invalid_argument);
    w.options.wait = -1s;
    report = wandb::client<>(w.settings).try_restore_all("*", w.options);
    REQUIRE_FALSE(report.has_value());
    CHECK(report.error().code() == errc::invalid_argument);
    CHECK(w.graphql() == 0);
  }

  TEST_CASE("names that leave the root, collide or are too long are errors of their files") {
    world w;
    w.add("Model.h5", 1000);
    w.add("model.h5", 1000);
    w.add("../evil", 1000);
    w.add(std::string(300, 'n'), 1000);
    w.add("good", 1000);
    const auto report = all(w, "*");
    CHECK(report.files.size() == 5);
    int failures = 0;
    for (const auto& file : report.files) {
      if (!file.failure) continue;
      ++failures;
      CHECK(file.failure->code() == errc::invalid_argument);
      CHECK((file.path.empty() || file.path == w.at("Model.h5") || file.path == w.at("model.h5")));
    }
    CHECK(failures == 3);
    CHECK(fs::exists(w.at("good")));
    CHECK(fs::exists(w.at("Model.h5")) != fs::exists(w.at("model.h5")));
    CHECK_FALSE(fs::exists(w.directory / "evil"));
  }

  TEST_CASE("a storage that cannot be reached is tried for retry_timeout, because the service was reached") {
    struct late_storage {
      std::optional<std::chrono::steady_clock::time_point> first = {};

      wandb::result<wandb::http_response> send(const wandb::http_request& request, wandb::body_sink& sink) {
        if (request.method == "GET") {
          if (!first) first = std::chrono::steady_clock::now();
          if (std::chrono::steady_clock::now() - *first < 600ms)
            return wandb::error(errc::connection_failed, "no route");
        }
        const std::string body =
            request.method == "GET"
                ? "0123456789"
                : R"({"data":{"project":{"run":{"files":{"edges":[{"node":{"name":"model.h5","url":)"
                  R"("http://wandb.test/model.h5","sizeBytes":10,"md5":")" +
                      stand_in::md5_hex(*stand_in::bytes("0123456789")) +
                      R"("}}],"pageInfo":{"hasNextPage":false}}}}}})";
        const wandb::http_response head{200, {{"Content-Length", std::to_string(body.size())}}};
        if (!sink.start(head) || !sink.write(body)) return wandb::error(errc::cancelled, "cancelled");
        return head;
      }
    };
    world w;
    w.settings.base_url = "http://wandb.test";
    w.settings.connect_timeout = 100ms;
    w.settings.retry_timeout = 60s;
    const auto report =
        wandb::client<late_storage>(w.settings, late_storage()).try_restore_all("*", w.options);
    REQUIRE(report.has_value());
    CHECK(report->complete());
  }

  TEST_CASE("a call that ends while the list is read is never complete, although the files of the first page "
            "are there") {
    for (const char* const end : {"flag", "on_progress", "total_timeout"}) {
      CAPTURE(std::string(end));
      world w;
      for (int i = 0; i < 501; ++i) w.add("f" + std::to_string(i), 10);
      w.server.add_fault(stand_in::target(place::graphql).nth(2), act::hang());
      std::atomic<bool> cancel{false};
      w.options.cancel = &cancel;
      const std::string how = end;
      if (how == "total_timeout") w.settings.total_timeout = 3s;
      bool has_refused = false;
      int calls_after = 0;
      w.options.on_progress = [&](const wandb::progress& now) {
        calls_after += has_refused ? 1 : 0;
        if (now.files_done < 500) return true;
        if (how == "flag") cancel = true;
        if (how == "on_progress") has_refused = true;
        return !has_refused;
      };
      const auto report = all(w, "*");
      CHECK_FALSE(report.complete());
      REQUIRE(report.failure.has_value());
      CHECK(report.failure->code() == (how == "total_timeout" ? errc::connection_failed : errc::cancelled));
      CHECK(report.files.size() == 500);
      CHECK(calls_after == 0);
    }
  }

  TEST_CASE(
      "progress counts files and bytes, in the caller's thread; false cancels, and the next call goes on") {
    world w;
    w.options.connections = 2;
    std::vector<stand_in::content_ptr> contents;
    for (int i = 0; i < 10; ++i) contents.push_back(w.add("f" + std::to_string(i), 100'000));
    w.server.add_fault(stand_in::target(place::storage).nth(5), act::stall(50'000));
    const auto caller = std::this_thread::get_id();
    bool same_thread = true;
    std::size_t files_done = 0;
    w.options.on_progress = [&](const wandb::progress& now) {
      same_thread = same_thread && std::this_thread::get_id() == caller;
      CHECK(now.files_done <= now.files_total);
      CHECK(now.bytes_done <= now.bytes_total.value_or(UINT64_MAX));
      files_done = now.files_done;
      return now.files_done < 4 || now.files_done == 10;
    };
    const auto report = all(w, "*");
    CHECK(same_thread);
    CHECK(files_done >= 4);
    REQUIRE(report.failure.has_value());
    CHECK(report.failure->code() == errc::cancelled);
    std::size_t restored = 0;
    for (const auto& file : report.files) restored += file.failure ? std::size_t{0} : std::size_t{1};
    CHECK(restored < 10);
    w.server.clear_faults();
    w.server.release();
    w.server.clear_log();
    w.options.on_progress = {};
    const auto again = all(w, "*");
    CHECK(again.complete());
    CHECK(w.storage() <= 10 - restored);
    for (int i = 0; i < 10; ++i)
      CHECK(holds(w.at("f" + std::to_string(i)), *contents[static_cast<std::size_t>(i)]));
    CHECK(w.hidden() == 0);
  }

  TEST_CASE("an exception of on_progress leaves the call, and no thread") {
    world w;
    for (int i = 0; i < 30; ++i) w.add("f" + std::to_string(i), 1000);
    struct stopped {};
    w.options.on_progress = [](const wandb::progress&) -> bool { throw stopped(); };
    wandb::client<> client(w.settings);
    CHECK_THROWS_AS((void)client.try_restore_all("*", w.options), stopped);
    w.options.on_progress = {};
    CHECK(client.try_restore_all("*", w.options).value().complete());
  }

  TEST_CASE("files of the first page are under way before the last page is asked for") {
    world w;
    for (int i = 0; i < 2600; ++i) w.add("f" + std::to_string(10000 + i), 10);
    const auto report = all(w, "*");
    CHECK(report.files.size() == 2600);
    CHECK(report.complete());
    std::size_t first_file = SIZE_MAX, last_page = 0;
    for (const auto& request : w.server.requests()) {
      if (request.kind == request_kind::storage) first_file = (std::min)(first_file, request.number);
      if (request.kind == request_kind::graphql) last_page = (std::max)(last_page, request.number);
    }
    CHECK(first_file < last_page);
    CHECK(w.graphql() == 6);
  }
}

TEST_SUITE("restore_newest") {
  TEST_CASE("restores the match that was changed last") {
    world w;
    const auto add = [&](const char* name, const char* time) {
      stand_in::file_attributes attributes;
      attributes.updated_at = time;
      return w.add(name, 1000, attributes);
    };
    add("ckpt/1.h5", "2024-01-01T00:00:00Z");
    const auto newest = add("ckpt/2.h5", "2024-01-03T00:00:00Z");
    add("ckpt/3.h5", "2024-01-02T00:00:00Z");
    add("other.txt", "2025-01-01T00:00:00Z");
    auto got = wandb::client<>(w.settings).try_restore_newest("ckpt/*.h5", w.options);
    w.check_restored(std::move(got), "ckpt/2.h5", *newest);
    CHECK(w.graphql() == 1);
    const auto none = wandb::client<>(w.settings).try_restore_newest("*.bin", w.options);
    REQUIRE_FALSE(none.has_value());
    CHECK(none.error().code() == errc::file_not_found);
  }
}

TEST_SUITE("wait") {
  TEST_CASE("without wait a missing file is an error at once; of a run that has ended, also with wait") {
    world w;
    w.options.wait = 3600s;
    const auto failure = w.check_failed(w.restore("later.h5"), errc::file_not_found);
    CHECK(std::string(failure.what()).find("the run has ended") != std::string::npos);
    CHECK(w.graphql() == 2);  // the second question looks for similar names
    w.server.set_run_state(w.run, "running");
    w.options.wait = 0s;
    w.server.clear_log();
    w.check_failed(w.restore("later.h5"), errc::file_not_found);
    CHECK(w.graphql() == 2);
  }

  TEST_CASE("a file, or the first match, that appears during the wait is restored") {
    for (const char* kind : {"file", "pattern", "newest"}) {
      CAPTURE(std::string(kind));
      world w;
      w.server.set_run_state(w.run, "running");
      w.options.wait = 1500ms;  // the last question comes at its end
      wandb::client<> client(w.settings);
      REQUIRE(client.try_list_files(w.options).has_value());  // connects: the wait counts from the beginning
      stand_in::content_ptr content;
      int questions = 0;
      w.server.on_request([&](const stand_in::request_record& request) {
        if (request.kind == request_kind::graphql && ++questions == 2) content = w.add("later.h5", 1000);
      });
      if (std::string(kind) == "pattern") {
        const auto report = client.try_restore_all("*.h5", w.options);
        REQUIRE(report.has_value());
        CHECK(report->complete());
        CHECK(names(*report) == std::vector<std::string>{"later.h5"});
      } else if (std::string(kind) == "newest") {
        auto got = client.try_restore_newest("*.h5", w.options);
        REQUIRE(content);
        w.check_restored(std::move(got), "later.h5", *content);
      } else {
        auto got = client.try_restore("later.h5", w.options);
        REQUIRE(content);
        w.check_restored(std::move(got), "later.h5", *content);
      }
      CHECK(questions == 2);
    }
  }

  TEST_CASE("a wait reports progress, and can be cancelled") {
    world w;
    w.server.set_run_state(w.run, "running");
    w.options.wait = 3600s;
    int reports = 0;
    w.options.on_progress = [&](const wandb::progress&) { return ++reports < 3; };
    w.check_failed(w.restore("later.h5"), errc::cancelled);
    CHECK(reports == 3);
    CHECK(w.graphql() == 1);
    reports = 0;
    const auto report = wandb::client<>(w.settings).try_restore_all("*", w.options);
    REQUIRE_FALSE(report.has_value());
    CHECK(report.error().code() == errc::cancelled);
    CHECK(reports == 3);
  }

  TEST_CASE("the throwing forms, and the functions that use the environment") {
    world w;
    const auto old = w.add("old.h5", 1000);
    const auto newest = w.add("new.h5", 1000);
    const support::scoped_environment there{{"WANDB_API_KEY", w.server.key()},
                                            {"WANDB_BASE_URL", w.server.base_url()},
                                            {"SSL_CERT_FILE", w.settings.ca_file.string()}};
    CHECK(wandb::try_restore_all("*.h5", w.options).value().complete());
    CHECK(wandb::restore_all("*.h5", w.options).files.size() == 2);
    CHECK(wandb::try_restore_newest("*.h5", w.options).value().size() == 1000);
    CHECK(wandb::restore_newest("*.h5", w.options).size() == 1000);
    wandb::client<> client(w.settings);
    CHECK(client.restore_all("*.h5", w.options).complete());
    CHECK(client.restore_newest("*.h5", w.options).size() == 1000);
    CHECK_THROWS_AS((void)client.restore_all("*.bin", w.options), wandb::error);
    CHECK_THROWS_AS((void)client.restore_newest("*.bin", w.options), wandb::error);
    CHECK_THROWS_AS((void)wandb::restore_newest("*.bin", w.options), wandb::error);
    CHECK_THROWS_AS((void)wandb::restore_all("", w.options), wandb::error);
    CHECK_THROWS_AS((void)client.restore_all("", w.options), wandb::error);
  }

  TEST_CASE("the run as second argument, as a text or an object") {
    world w;
    w.add("a.h5", 1000);
    const std::string text = "team/project/run1";
    const wandb::run_path run{"team", "project", "run1"}, broken{"team", "", "run1"};
    const auto root = w.options.root;
    wandb::client<> client(w.settings);
    CHECK(client.try_restore_all("*.h5", text, false, root).value().files[0].source ==
          wandb::source::downloaded);
    CHECK(client.try_restore_all("*.h5", run, false, root).value().files[0].source == wandb::source::local);
    CHECK(client.try_restore_all("*.h5", "team/project/run1", true, root).value().files[0].source ==
          wandb::source::downloaded);
    CHECK(client.try_restore_newest("*.h5", text, false, root)->source() == wandb::source::local);
    CHECK(client.restore_newest("*.h5", run, true, root).source() == wandb::source::downloaded);
    CHECK(client.restore_all("*.h5", run, true, root).files[0].source == wandb::source::downloaded);
    CHECK(client.try_restore_all("*", broken).error().code() == errc::invalid_run_path);
    CHECK(client.try_restore_newest("*", broken).error().code() == errc::invalid_run_path);

    const support::scoped_environment there{{"WANDB_API_KEY", w.server.key()},
                                            {"WANDB_BASE_URL", w.server.base_url()},
                                            {"SSL_CERT_FILE", w.settings.ca_file.string()}};
    CHECK(wandb::try_restore_all("*.h5", run, true, root).value().complete());
    CHECK(wandb::restore_all("*.h5", text, true, root).complete());
    CHECK(wandb::try_restore_newest("*.h5", text, true, root)->size() == 1000);
    CHECK(wandb::restore_newest("*.h5", run, true, root).size() == 1000);
  }
}
