// Every kind of failure of a whole restore: its code, its text, and the files that it leaves. service_test.cpp has the single
// answers of the service.
#include "restore_fixture.hpp"

#include <atomic>
#include <functional>
#include <optional>
#include <set>
#include <sstream>

using namespace restore_tests;
using wandb::errc;

namespace {

const std::string old_text = "what was there before";
const std::string new_text = "what the run has";

struct row {
  const char* what;
  errc code;
  int http_status;
  bool not_found, transient;
  std::vector<std::string> names;  ///< in addition to the file and the run
  std::function<void(fixture&, wandb::settings&, wandb::restore_options&)> prepare;
  std::string name = "a.txt";
};

using at = std::function<void(fixture&, wandb::settings&, wandb::restore_options&)>;

at fault(target where, stand_in::action what) {
  return [=](fixture& f, wandb::settings&, wandb::restore_options&) { f.server.add_fault(where, what); };
}
at setting(std::function<void(wandb::settings&)> change) {
  return [=](fixture&, wandb::settings& s, wandb::restore_options&) { change(s); };
}
at option(std::function<void(wandb::restore_options&)> change) {
  return [=](fixture&, wandb::settings&, wandb::restore_options& o) { change(o); };
}
at file(std::function<void(stand_in::file_attributes&)> change) {
  return [=](fixture& f, wandb::settings&, wandb::restore_options&) {
    stand_in::file_attributes told;
    change(told);
    f.server.add_file(f.run, "a.txt", new_text, told);
  };
}
/// Answers that are retried. The other timeouts stay long, so that no late answer becomes another failure.
at briefly(at what) {
  return [=](fixture& f, wandb::settings& s, wandb::restore_options& o) {
    s.retry_timeout = 400ms;
    what(f, s, o);
  };
}
/// Faults that are retried, with short timeouts.
at impatient(at what) {
  return [=](fixture& f, wandb::settings& s, wandb::restore_options& o) {
    s.connect_timeout = s.idle_timeout = 300ms;
    s.retry_timeout = 400ms;
    what(f, s, o);
  };
}

const std::atomic<bool> already{true};

const std::vector<row>& table() {
  static const std::vector<row> rows = {
      // errors of the caller
      {"an empty name", errc::invalid_argument, 0, false, false, {"empty"}, option([](auto&) {}), ""},
      {"an escaping name",
       errc::invalid_argument,
       0,
       false,
       false,
       {"leaves"},
       option([](auto&) {}),
       "../a.txt"},
      {"no connections", errc::invalid_argument, 0, false, false, {"connections"}, option([](auto& o) {
         o.connections = 0;
       })},
      {"a malformed base URL",
       errc::invalid_argument,
       0,
       false,
       false,
       {"base URL", "gopher"},
       setting([](auto& s) { s.base_url = "gopher://127.0.0.1"; })},
      {"a base URL with a password",
       errc::invalid_argument,
       0,
       false,
       false,
       {"base URL", "@"},
       [](fixture& f, auto& s, auto&) {
         f.secrets.push_back("hunter2hunter2");
         s.base_url = "https://me:hunter2hunter2@127.0.0.1";
       }},
      {"a malformed key", errc::invalid_argument, 0, false, false, {"API key", "40"}, setting([](auto& s) {
         s.api_key = "short";
       })},
      {"a timeout of nothing", errc::invalid_argument, 0, false, false, {"timeout"}, setting([](auto& s) {
         s.idle_timeout = 0ms;
       })},
      {"a malformed run path", errc::invalid_run_path, 0, false, false, {"a/b/c/d/e"}, option([](auto& o) {
         o.run_path = "a/b/c/d/e";
       })},
      {"no run path", errc::invalid_run_path, 0, false, false, {"entity/project/run_id"}, option([](auto& o) {
         o.run_path.clear();
       })},
      // answers of the service
      {"no such run",
       errc::run_not_found,
       0,
       true,
       false,
       {"127.0.0.1", fixture::path, "run path"},
       [](fixture& f, auto&, auto&) { f.server.remove_run(f.run); }},
      {"no such file",
       errc::file_not_found,
       0,
       true,
       false,
       {"127.0.0.1", fixture::path},
       [](fixture& f, auto&, auto&) { f.server.remove_file(f.run, "a.txt"); }},
      {"a file that went away between question and fetch",
       errc::file_not_found,
       404,
       true,
       false,
       {"127.0.0.1", fixture::path},
       fault(place::files, act::status(404, {}, R"({"error":"file not found"})"))},
      {"401",
       errc::not_authenticated,
       401,
       false,
       false,
       {"127.0.0.1", fixture::path, "WANDB_API_KEY", "wandb login"},
       [](fixture& f, auto&, auto&) { f.server.set_key(std::string(40, 'n')); }},
      {"403",
       errc::permission_denied,
       403,
       false,
       false,
       {"127.0.0.1", fixture::path, "owner"},
       fault(place::graphql, act::html(403))},
      {"403 from storage, also with a new address",
       errc::permission_denied,
       403,
       false,
       false,
       {"127.0.0.1", fixture::path, "new address"},
       fault(place::storage, act::status(403))},
      // network failures
      {"offline",
       errc::offline,
       0,
       false,
       false,
       {fixture::path, "WANDB_MODE", "127.0.0.1"},
       setting([](auto& s) { s.offline = true; })},
      {"nobody listens",
       errc::connection_failed,
       0,
       false,
       true,
       {"127.0.0.1", fixture::path},
       impatient([](fixture& f, auto&, auto&) { f.server.stop(); })},
      {"no such host",
       errc::connection_failed,
       0,
       false,
       true,
       {"no-such-host.invalid", fixture::path},
       impatient(setting([](auto& s) { s.base_url = "https://no-such-host.invalid"; }))},
      {"no TLS there",
       errc::connection_failed,
       0,
       false,
       true,
       {"127.0.0.1", fixture::path},
       impatient(fault(place::connect, act::drop()))},
      {"a certificate of nobody known",
       errc::connection_failed,
       0,
       false,
       false,
       {"127.0.0.1", fixture::path, "certificate"},
       setting([](auto& s) { s.ca_file.clear(); })},
      {"a service that says nothing",
       errc::connection_failed,
       0,
       false,
       true,
       {"127.0.0.1", fixture::path},
       impatient(fault(place::graphql, act::hang()))},
      {"a storage that stalls",
       errc::connection_failed,
       0,
       false,
       true,
       {"127.0.0.1", fixture::path},
       impatient(fault(place::storage, act::stall(0)))},
      {"a storage that cuts off",
       errc::connection_failed,
       0,
       false,
       true,
       {"127.0.0.1", fixture::path},
       impatient(fault(place::storage, act::cut(0)))},
      {"a storage that resets",
       errc::connection_failed,
       0,
       false,
       true,
       {"127.0.0.1", fixture::path},
       impatient(fault(place::storage, act::reset(0)))},
      {"not done in time",
       errc::connection_failed,
       0,
       false,
       false,
       {fixture::path, "total_timeout"},
       [](fixture& f, wandb::settings& s, auto&) {
         s.total_timeout = 200ms;
         f.server.add_fault(place::graphql, act::hang());
       }},
      {"500 for ever",
       errc::http_failure,
       500,
       false,
       true,
       {"127.0.0.1", fixture::path, "500", "gave up"},
       briefly(fault(place::graphql, act::html(500)))},
      {"503 for ever, from storage",
       errc::http_failure,
       503,
       false,
       true,
       {"127.0.0.1", fixture::path, "503", "gave up"},
       briefly(fault(place::storage, act::status(503)))},
      {"429 that asks for more time than there is",
       errc::http_failure,
       429,
       false,
       true,
       {"127.0.0.1", fixture::path, "asks to wait 3600 s"},
       fault(place::graphql, act::too_many_requests("3600"))},
      {"404 from storage",
       errc::http_failure,
       404,
       false,
       false,
       {"127.0.0.1", fixture::path, "404"},
       fault(place::storage, act::status(404))},
      {"501",
       errc::http_failure,
       501,
       false,
       false,
       {"127.0.0.1", fixture::path, "501"},
       fault(place::storage, act::status(501))},
      // protocol violations
      {"no JSON",
       errc::protocol_violation,
       200,
       false,
       false,
       {"127.0.0.1", fixture::path, "base URL"},
       fault(place::graphql, act::malformed_json())},
      {"JSON of a wrong shape",
       errc::protocol_violation,
       0,
       false,
       false,
       {"127.0.0.1", fixture::path},
       fault(place::graphql, act::wrong_shape())},
      {"an answer that is too long",
       errc::protocol_violation,
       0,
       false,
       false,
       {"127.0.0.1", fixture::path},
       fault(place::graphql, act::oversize(64 << 20))},
      {"a redirect to http",
       errc::protocol_violation,
       302,
       false,
       false,
       {"127.0.0.1", fixture::path, "https"},
       [](fixture& f, auto&, auto&) { f.server.set_redirect(stand_in::redirect::plain_http); }},
      {"redirects without end",
       errc::protocol_violation,
       0,
       false,
       false,
       {"127.0.0.1", fixture::path, "10 redirects"},
       [](fixture& f, auto&, auto&) { f.server.set_redirect(stand_in::redirect::loop); }},
      {"a redirect to nowhere",
       errc::protocol_violation,
       302,
       false,
       false,
       {"127.0.0.1", fixture::path, "redirected"},
       fault(place::files, act::redirect_to("mailto:somebody?X-Signature=1"))},
      {"compressed, although it must not be",
       errc::protocol_violation,
       0,
       false,
       false,
       {"127.0.0.1", fixture::path, "gzip", "a proxy may be compressing"},
       [](fixture& f, auto&, auto&) {
         f.server.add_fault(place::storage, act::body("{}", "application/json"));
         f.server.add_fault(place::storage, act::header("Content-Encoding", "gzip"));
       }},
      {"no HTTP at all",
       errc::protocol_violation,
       0,
       false,
       false,
       {"127.0.0.1", fixture::path},
       fault(place::storage, act::garbage_status_line("SSH-2.0-OpenSSH_9.2"))},
      {"a reference to another store",
       errc::protocol_violation,
       0,
       false,
       false,
       {"s3://bucket/key", fixture::path},
       file([](auto& told) { told.url = told.direct_url = "s3://bucket/key?X-Signature=1"; })},
      {"another md5, twice",
       errc::checksum_mismatch,
       0,
       false,
       false,
       {fixture::path, stand_in::md5_hex(*stand_in::bytes(new_text)),
        stand_in::md5_hex(*stand_in::bytes("other")), "try again"},
       file([](auto& told) { told.md5 = stand_in::md5_base64(*stand_in::bytes("other")); })},
      // disk, local copy, cancellation
      {"a directory in its place",
       errc::disk_failure,
       0,
       false,
       false,
       {"directory"},
       option([](auto&) {}),
       "sub"},
      {"a root below a file",
       errc::invalid_argument,
       0,
       false,
       false,
       {"a.txt"},
       [](fixture& f, auto&, wandb::restore_options& o) { o.root = f.root() / "a.txt" / "deeper"; }},
      {"another run's copy",
       errc::local_conflict,
       0,
       false,
       false,
       {"a1b2c3d", "other", "replace"},
       [](fixture& f, wandb::settings& s, wandb::restore_options& o) {
         const auto other = f.server.add_run("vanpelt", "my-project", "other");
         f.server.add_file(other, "a.txt", old_text);
         (void)f.success(wandb::client<>(s).try_restore("a.txt", "vanpelt/my-project/other", true));
         o.replace = false;
       }},
      {"cancelled before it began", errc::cancelled, 0, false, false, {fixture::path}, option([](auto& o) {
         o.cancel = &already;
       })},
      {"cancelled by the progress callback",
       errc::cancelled,
       0,
       false,
       false,
       {fixture::path, "next call"},
       option([](auto& o) { o.on_progress = [](const wandb::progress&) { return false; }; })},
  };
  return rows;
}

}  // namespace

TEST_SUITE("errors") {
  TEST_CASE("each failure has its code and a helpful text, and leaves the old file unchanged") {
    for (const row& r : table()) {
      CAPTURE(std::string(r.what));
      fixture f;
      f.server.add_file(f.run, "a.txt", new_text);
      write_file(f.root() / "a.txt", old_text);
      fs::create_directories(f.root() / "sub");
      auto s = f.settings();
      auto options = f.options(true);
      r.prepare(f, s, options);
      const auto failure = f.failure(wandb::client<>(s).try_restore(r.name, options), r.code);
      CHECK(failure.http_status() == r.http_status);
      CHECK(failure.is_not_found() == r.not_found);
      CHECK(failure.is_transient() == r.transient);
      check_names(failure, {r.name});
      check_names(failure, r.names);
      const std::string text = failure.what();
      CHECK(text.size() < 1000);
      CHECK(std::none_of(text.begin(), text.end(),
                         [](char c) { return static_cast<unsigned char>(c) < 0x20; }));
      CHECK(visible(f.root()) == names{"a.txt"});
      CHECK(read_file(f.root() / "a.txt") == old_text);
    }
  }

  TEST_CASE("a failure without an old file leaves no file of that name") {
    for (const row& r : table()) {
      if (r.code == errc::local_conflict || r.code == errc::disk_failure ||
          std::string(r.what) == "a root below a file")
        continue;                 // these need an existing file
      if (r.transient) continue;  // these take long, and behave the same here
      CAPTURE(std::string(r.what));
      fixture f;
      f.server.add_file(f.run, "a.txt", new_text);
      auto s = f.settings();
      auto options = f.options();
      r.prepare(f, s, options);
      (void)f.failure(wandb::client<>(s).try_restore(r.name, options), r.code);
      CHECK(visible(f.root()).empty());
    }
  }

  TEST_CASE("the table reaches every code, and every code has a name") {
    std::set<errc> reached;
    for (const row& r : table()) reached.insert(r.code);
    std::set<std::string> words;
    for (int i = 1; i <= static_cast<int>(errc::cancelled); ++i) {
      const std::string word = wandb::to_string(static_cast<errc>(i));
      CAPTURE(word);
      CHECK(reached.count(static_cast<errc>(i)) == 1);
      CHECK(word != "unknown");
      words.insert(word);
    }
    CHECK(words.size() == reached.size());
    CHECK(std::string(wandb::to_string(static_cast<errc>(0))) == "unknown");
  }

  TEST_CASE("after a failure the same client restores again once the reason is gone") {
    fixture f;
    f.server.add_file(f.run, "a.txt", new_text);
    auto s = f.settings();
    s.retry_timeout = 300ms;
    wandb::client<> client(s);
    for (const auto& bad : {act::html(500), act::status(403), act::cut(0), act::reset(0), act::flip_byte(2),
                            act::status(404)}) {
      f.server.clear_faults();
      f.server.add_fault(place::storage, bad);
      (void)f.failure(client.try_restore("a.txt", f.path, true));
      f.server.clear_faults();
      auto file = f.success(client.try_restore("a.txt", f.path, true));
      CHECK(read_all(file) == new_text);
      CHECK(visible(f.root()) == names{"a.txt"});
      // no partial file is left
      CHECK(std::distance(fs::directory_iterator(f.root()), fs::directory_iterator()) == 1);
    }
  }

  TEST_CASE("an error can be copied, thrown, and caught as a runtime_error") {
    fixture f;
    const auto failure = f.failure(f.client().try_restore("none", f.path), errc::file_not_found);
    const wandb::error copy = failure;
    CHECK(copy.code() == failure.code());
    CHECK(std::string(copy.what()) == failure.what());
    CHECK_THROWS_AS(throw copy, std::runtime_error);
  }

  TEST_CASE("<< writes code and text of an error") {
    std::ostringstream out;
    out << wandb::error(errc::http_failure, "restoring \"a\": HTTP status 404", 404) << '\n';
    CHECK(out.str() == "http_failure: restoring \"a\": HTTP status 404\n");
    CHECK_THROWS_AS(throw wandb::error(errc::offline, "x"), std::runtime_error);
  }

  TEST_CASE("result<void>::value() throws the error, and does nothing after success") {
    const wandb::result<void> success;
    CHECK_NOTHROW(success.value());
    const wandb::result<void> failure = wandb::error(errc::offline, "the reason");
    CHECK_THROWS_WITH_AS(failure.value(), "the reason", wandb::error);
  }
}
