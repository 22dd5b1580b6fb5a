// Whole restores against the stand-in server, over TLS: requests, retries, failures, cancellation, progress.
#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "engine.hpp"

namespace {

using namespace engine;
using stand_in::bad_range;
using stand_in::origin;
using stand_in::place;
using stand_in::request_kind;
using stand_in::target;
using wandb::errc;
namespace act = stand_in::act;

/// A restore in another thread. The destructor cancels and joins it.
class background {
 public:
  background(world& of, const std::string& name)
      : thread_([this, name, options = of.options, settings = of.settings]() mutable {
          options.cancel = &cancel;
          result_.emplace(wandb::client<>(settings).try_restore(name, options));
        }) {}
  ~background() {
    cancel = true;
    if (thread_.joinable()) thread_.join();
  }
  background(const background&) = delete;
  background& operator=(const background&) = delete;
  wandb::result<wandb::restored_file> join() {
    thread_.join();
    return *std::move(result_);
  }
  std::atomic<bool> cancel{false};

 private:
  std::optional<wandb::result<wandb::restored_file>> result_;
  std::thread thread_;
};

using clock_type = std::chrono::steady_clock;
// A cancelled call returns within a second; on a machine under load it may take longer. The tests' other time limits are far
// longer, so that a call that ends soon was ended by the cancellation.
constexpr auto soon = 3s;

/// A transport in memory with one file, which throws std::bad_alloc when it has sent a number of bytes.
struct throwing_transport {
  stand_in::content_ptr what;
  bool has_md5;
  std::uint64_t throws_after;
  std::shared_ptr<std::atomic<std::uint64_t>> left =
      std::make_shared<std::atomic<std::uint64_t>>(throws_after);
  std::shared_ptr<std::atomic<std::uint64_t>> sent = std::make_shared<std::atomic<std::uint64_t>>(0);

  wandb::result<wandb::http_response> send(const wandb::http_request& request, wandb::body_sink& sink) {
    wandb::http_response head{200, {}};
    if (request.method == "POST") {
      const std::string answer =
          R"({"data":{"project":{"run":{"files":{"edges":[{"node":{"name":"model.h5","url":"http://wandb.test/f","sizeBytes":)" +
          std::to_string(what->size()) + (has_md5 ? R"(,"md5":")" + stand_in::md5_hex(*what) + '"' : "") +
          "}}]}}}}}";
      if (sink.start(head)) sink.write(answer);
      return head;
    }
    std::uint64_t begin = 0, end = what->size();
    for (const auto& [name, value] : request.headers) {
      if (name != "Range") continue;
      begin = std::stoull(value.substr(6));
      const auto dash = value.find('-');
      if (dash + 1 < value.size()) end = std::stoull(value.substr(dash + 1)) + 1;
      head.status = 206;
      head.headers.emplace_back("Content-Range", "bytes " + std::to_string(begin) + '-' +
                                                     std::to_string(end - 1) + '/' +
                                                     std::to_string(what->size()));
    }
    head.headers.emplace_back("Content-Length", std::to_string(end - begin));
    if (!sink.start(head)) return wandb::error(errc::cancelled, "stopped");
    for (constexpr std::uint64_t piece = 16 * 1024; begin < end; begin += piece) {
      const std::string bytes = stand_in::read_text(*what, begin, (std::min)(piece, end - begin));
      for (auto now = left->load();;) {
        if (now < bytes.size()) throw std::bad_alloc();
        if (left->compare_exchange_weak(now, now - bytes.size())) break;
      }
      *sent += bytes.size();
      if (!sink.write(bytes)) return wandb::error(errc::cancelled, "stopped");
    }
    return head;
  }
};

/// A store that sends at most a number of bytes of a range, as RFC 9110, section 15.3.7, allows.
class capped_ranges {
 public:
  capped_ranges(const wandb::settings& settings, std::uint64_t most) : real_(settings), most_(most) {}
  wandb::result<wandb::http_response> send(const wandb::http_request& request, wandb::body_sink& sink) {
    wandb::http_request asked = request;
    for (auto& [name, value] : asked.headers) {
      if (name != "Range") continue;
      const auto dash = value.find('-');
      const auto first = std::stoull(value.substr(6)), last = std::stoull(value.substr(dash + 1));
      value = value.substr(0, dash + 1) + std::to_string((std::min)(last, first + most_ - 1));
    }
    return real_.send(asked, sink);
  }

 private:
  wandb::http_transport real_;
  std::uint64_t most_;
};

/// A transport that changes the responses of storage.
class altering {
 public:
  using head_change = void (*)(wandb::http_response&);
  altering(const wandb::settings& settings, head_change change) : real_(settings), change_(change) {}

  wandb::result<wandb::http_response> send(const wandb::http_request& request, wandb::body_sink& sink) {
    struct altered final : wandb::body_sink {
      altered(wandb::body_sink& to, head_change how) : sink(to), change(how) {}
      void connected() override { sink.connected(); }
      bool start(const wandb::http_response& head) override {
        auto changed = head;
        change(changed);
        return sink.start(changed);
      }
      bool write(std::string_view bytes) override { return sink.write(bytes); }
      wandb::body_sink& sink;
      head_change change;
    } changed(sink, change_);
    auto got = real_.send(request, changed);
    if (got) change_(*got);
    return got;
  }

 private:
  wandb::http_transport real_;
  head_change change_;
};

/// A transport to a store that answers ranges with an error.
class refusing_ranges {
 public:
  refusing_ranges(const wandb::settings& settings, int status) : real_(settings), status_(status) {}
  wandb::result<wandb::http_response> send(const wandb::http_request& request, wandb::body_sink& sink) {
    for (const auto& field : request.headers) {
      if (field.first != "Range") continue;
      wandb::http_response refusal;
      refusal.status = status_;
      (void)sink.start(refusal);
      return refusal;
    }
    return real_.send(request, sink);
  }

 private:
  wandb::http_transport real_;
  int status_;
};

/// A transport that delivers whole bodies from storage, and then fails.
class failing_at_the_end {
 public:
  explicit failing_at_the_end(const wandb::settings& settings) : real_(settings) {}
  wandb::result<wandb::http_response> send(const wandb::http_request& request, wandb::body_sink& sink) {
    auto got = real_.send(request, sink);
    if (got && request.url.find("/bucket/") != std::string::npos && got->status < 300)
      return wandb::error(errc::connection_failed, "the connection was lost");
    return got;
  }

 private:
  wandb::http_transport real_;
};

/// A service and its storage in memory, for what no server can be made to do. The service knows one file, "a".
class memory_store {
 public:
  using reply = std::function<wandb::result<wandb::http_response>(int number, const wandb::http_request&,
                                                                  wandb::body_sink&)>;
  /// `facts` are further members of the file's node. `storage` answers the requests for the file, counted from 1.
  memory_store(std::string facts, reply storage) : state_(std::make_shared<state>()) {
    state_->facts = std::move(facts);
    state_->storage = std::move(storage);
  }
  wandb::result<wandb::http_response> send(const wandb::http_request& request, wandb::body_sink& sink) {
    sink.connected();
    if (request.method == "POST") {
      return answer(
          sink, 200, {},
          R"({"data":{"project":{"run":{"files":{"edges":[{"node":{"name":"a","url":"http://service/f")" +
              state_->facts + "}}]}}}}}");
    }
    if (request.url.find("http://service") == 0) {
      ++state_->resolved;
      return answer(sink, 302, {{"Location", "http://storage/f"}}, "");
    }
    return state_->storage(++state_->asked, request, sink);
  }
  static wandb::result<wandb::http_response> answer(wandb::body_sink& sink, int status,
                                                    wandb::http_headers fields, std::string_view body) {
    wandb::http_response head;
    head.status = status;
    head.headers = std::move(fields);
    head.headers.push_back({"Content-Length", std::to_string(body.size())});
    if (!sink.start(head)) return wandb::error(errc::cancelled, "stopped");
    for (; !body.empty(); body.remove_prefix((std::min<std::size_t>)(body.size(), 65536)))
      if (!sink.write(body.substr(0, 65536))) return wandb::error(errc::cancelled, "stopped");
    return head;
  }
  /// The bytes that a request asks for, of `content`.
  static wandb::result<wandb::http_response> part(const wandb::http_request& request, wandb::body_sink& sink,
                                                  const std::string& content) {
    for (const auto& [name, value] : request.headers) {
      if (name != "Range") continue;
      const auto first = std::stoull(value.substr(6)), last = std::stoull(value.substr(value.find('-') + 1));
      return answer(sink, 206,
                    {{"Content-Range", "bytes " + std::to_string(first) + '-' + std::to_string(last) + '/' +
                                           std::to_string(content.size())}},
                    std::string_view(content).substr(first, last - first + 1));
    }
    return answer(sink, 200, {}, content);
  }
  static bool asks_range(const wandb::http_request& request) {
    return std::any_of(request.headers.begin(), request.headers.end(),
                       [](const auto& field) { return field.first == "Range"; });
  }
  /// How often the redirect was followed.
  int resolved() const { return state_->resolved; }

 private:
  struct state {
    std::string facts;
    reply storage;
    std::atomic<int> asked{0}, resolved{0};
  };
  std::shared_ptr<state> state_;
};

/// Restores "a" from a store in memory.
struct memory_world {
  wandb::result<wandb::restored_file> restore(const memory_store& store) {
    wandb::settings settings;
    settings.base_url = "http://service";
    settings.api_key = std::string(40, 'k');
    settings.retry_timeout = 20s;
    wandb::restore_options options;
    options.run_path = "e/p/r";
    options.root = directory / "root";
    options.replace = true;
    options.connections = 4;
    return wandb::client<memory_store>(settings, store).try_restore("a", options);
  }
  static std::string facts(const std::string& content) {
    return ",\"sizeBytes\":" + std::to_string(content.size()) + ",\"md5\":\"" +
           stand_in::md5_hex(*stand_in::bytes(content)) + '"';
  }
  support::temporary_directory directory;
};

/// Delays the first responses of storage until there are `count` requests, also if some threads of the client start late.
void hold_until(world& it, std::uint64_t count) {
  it.server.on_request([&it, count](const stand_in::request_record& one) {
    if (one.kind != request_kind::storage) return;
    CHECK(it.server.wait_for(
        [=](const auto& now) { return now.counts.of(request_kind::storage).requests >= count; }, 20s));
  });
}

bool something_hangs(const stand_in::server& server) {
  return server.wait_for([](const auto& now) { return now.counts.stalled > 0; }, 20s);
}

}  // namespace

#ifdef __SANITIZE_THREAD__
// libcrypto is not compiled with this sanitizer, which therefore does not see its atomics, and reports races where handshakes
// share the cached key identifiers of certificates.
extern "C" const char* __tsan_default_suppressions();
extern "C" const char* __tsan_default_suppressions() { return "called_from_lib:libcrypto.so\n"; }
#endif

TEST_SUITE("download: requests and connections") {
  TEST_CASE("a small file takes one query, one redirect, one plain GET, and one handshake for each origin") {
    world it;
    const auto what = it.add("model.h5", small_size);
    it.check_restored(it.restore("model.h5"), "model.h5", *what);
    CHECK(it.graphql() == 1);
    CHECK(it.files() == 1);
    CHECK(it.storage() == 1);
    CHECK(it.server.requests().size() == 3);
    CHECK(it.server.counted().of(origin::service).handshakes == 1);
    CHECK(it.server.counted().of(origin::storage).handshakes == 1);
    CHECK_FALSE(it.server.requests(request_kind::storage).at(0).range().has_value());
    CHECK(it.storage_bytes() == small_size);
  }

  TEST_CASE("files of sizes around every boundary are restored") {
    world it;
    wandb::client<> client(it.settings);
    for (const std::uint64_t size :
         {std::uint64_t{0}, std::uint64_t{1}, std::uint64_t{65535}, std::uint64_t{65536},
          std::uint64_t{65537}, std::uint64_t{262144}, std::uint64_t{262145}, 8 * MiB - 1, 8 * MiB,
          8 * MiB + 1, 12 * MiB + 65537}) {
      CAPTURE(size);
      const std::string name = "model-" + std::to_string(size);
      const auto what = it.add(name, size);
      it.check_restored(client.try_restore(name, it.options), name, *what);
    }
  }

  TEST_CASE("a large file takes several connections, one redirect, and every byte once") {
    world it;
    const auto what = it.add("model.h5", 64 * MiB);
    it.check_restored(it.restore("model.h5"), "model.h5", *what);
    CHECK(it.graphql() == 1);
    CHECK(it.files() == 1);
    const auto counted = it.server.counted();
    CHECK(counted.of(origin::storage).handshakes > 1);
    std::set<std::uint64_t> connections;
    for (const auto& one : it.server.requests(request_kind::storage)) {
      connections.insert(one.connection);
      CHECK(one.range().has_value());
      CHECK(one.header("Accept-Encoding") == "identity");
    }
    CHECK(connections.size() > 1);
    CHECK(it.storage_bytes() >= 64 * MiB);
    CHECK(it.storage_bytes() <= 64 * MiB + 16 * MiB);  // bytes in transit when a range was split
    // All requests have If-Range but those that were sent before the first response, at most one for each connection.
    const auto all = it.server.requests(request_kind::storage);
    CHECK(std::count_if(all.begin(), all.end(), [](const auto& one) {
            return !one.header("If-Range").has_value();
          }) <= it.options.connections);
  }

  TEST_CASE("with one connection a large file takes one request") {
    world it;
    it.options.connections = 1;
    const auto what = it.add("model.h5", large_size);
    it.check_restored(it.restore("model.h5"), "model.h5", *what);
    CHECK(it.storage() == 1);
    CHECK(it.server.counted().of(origin::storage).connections == 1);
    CHECK(it.storage_bytes() == large_size);
  }

  TEST_CASE("no more connections are opened than requested") {
    for (const int connections : {2, 3}) {
      world it;
      it.options.connections = connections;
      const auto what = it.add("model.h5", large_size);
      it.server.add_fault(target(place::storage).nth(1, 2), act::stall(100));
      background restore(it, "model.h5");
      REQUIRE(it.server.wait_for([&](const auto& now) { return now.counts.stalled == 2; }, 20s));
      CHECK(it.server.counted().of(origin::storage).open_connections <=
            static_cast<std::uint64_t>(connections));
      it.server.release();
      it.check_restored(restore.join(), "model.h5", *what);
    }
  }

  TEST_CASE("keep makes no request, refresh makes one query, replace downloads again") {
    world it;
    const auto what = it.add("model.h5", small_size);
    it.check_restored(it.restore("model.h5"), "model.h5", *what);
    it.server.clear_log();
    auto kept = it.restore("model.h5");
    REQUIRE(kept.has_value());
    CHECK(kept->source() == wandb::source::local);
    CHECK(kept->verified());
    CHECK(it.server.requests().empty());
    it.options.cache = wandb::cache_policy::refresh();
    auto refreshed = it.restore("model.h5");
    REQUIRE(refreshed.has_value());
    CHECK(refreshed->source() == wandb::source::local);
    CHECK(it.server.requests().size() == 1);
    it.options.replace = true;
    it.check_restored(it.restore("model.h5"), "model.h5", *what);
    CHECK(it.storage() == 1);
  }

  TEST_CASE("credentials stay with the service") {
    world it;
    it.settings.extra_headers = {{"X-Tenant", "secret"}, {"Cookie", "secret"}};
    it.settings.username = "someone";
    const auto what = it.add("model.h5", large_size);
    it.check_restored(it.restore("model.h5"), "model.h5", *what);
    for (const auto& one : it.server.requests()) {
      const bool home = one.at == origin::service;
      CHECK(one.header("Authorization").has_value() == home);
      CHECK(one.header("X-Tenant").has_value() == home);
      CHECK(one.header("Cookie").has_value() == home);
      if (!home) {
        for (const auto& [name, value] : one.headers) {
          CHECK(value.find("secret") == std::string::npos);
          CHECK(value.find(it.server.key()) == std::string::npos);
        }
      }
    }
  }

  TEST_CASE("names with spaces, quotes, UTF-8 and 255 bytes, and in directories") {
    world it;
    wandb::client<> client(it.settings);
    for (const std::string& name : {std::string("a b.h5"), std::string("it's \"quoted\" \\ 100% #1?.h5"),
                                    std::string("\xc3\xa9\xe4\xb8\xad.h5"), std::string(255, 'n'),
                                    std::string("ckpt/deep/er/best.h5"), std::string("a&b=c+d;e.h5")}) {
      CAPTURE(name);
      const auto what = it.add(name, 1000);
      it.check_restored(client.try_restore(name, it.options), name, *what);
    }
  }
}

TEST_SUITE("download: redirects") {
  TEST_CASE("every kind of redirect to the file is followed") {
    using stand_in::redirect;
    for (const auto kind :
         {redirect::absolute, redirect::relative, redirect::chain, redirect::other_host, redirect::none}) {
      CAPTURE(static_cast<int>(kind));
      world it;
      it.server.set_redirect(kind);
      const auto what = it.add("model.h5", large_size);
      it.check_restored(it.restore("model.h5"), "model.h5", *what);
      if (kind == redirect::absolute) CHECK(it.files() == 1);
      if (kind == redirect::chain) CHECK(it.files() == 4);
    }
    for (const int status : {301, 303, 307, 308}) {
      CAPTURE(status);
      world it;
      it.server.set_redirect(redirect::absolute, 0, status);
      const auto what = it.add("model.h5", small_size);
      it.check_restored(it.restore("model.h5"), "model.h5", *what);
    }
  }

  TEST_CASE("a redirect loop, an endless chain, and https to http are a protocol_violation") {
    using stand_in::redirect;
    for (const auto kind : {redirect::loop, redirect::chain, redirect::plain_http}) {
      CAPTURE(static_cast<int>(kind));
      world it;
      it.server.set_redirect(kind, 50);
      it.add("model.h5", small_size);
      it.check_failed(it.restore("model.h5"), errc::protocol_violation);
      CHECK(it.storage() == 0);
      CHECK(it.files() <= 11);
      CHECK_FALSE(fs::exists(it.at("model.h5")));
      CHECK(it.hidden() == 0);
    }
  }

  TEST_CASE("an unusable address is a protocol_violation") {
    for (const char* location :
         {"ftp://127.0.0.1/x", "http://", "https://127.0.0.1:99999/", "javascript:alert(1)"}) {
      CAPTURE(std::string(location));
      world it;
      it.add("model.h5", small_size);
      it.server.add_fault(place::files, act::redirect_to(location));
      it.check_failed(it.restore("model.h5"), errc::protocol_violation);
    }
  }
}

TEST_SUITE("download: retries") {
  struct fault {
    const char* name;
    stand_in::action what;
  };

  TEST_CASE("a transient failure is retried, and the download resumes") {
    const std::vector<fault> faults = {
        {"cut", act::cut(200'000)},
        {"cut abruptly", act::cut_abruptly(200'000)},
        {"reset", act::reset(200'000)},
        {"cut at once", act::cut(0)},
        {"drop", act::drop()},
        {"refuse", act::refuse()},
        {"408", act::status(408)},
        {"429", act::too_many_requests("0")},
        {"500", act::html(500)},
        {"502", act::html(502)},
        {"503", act::status(503)},
        {"504", act::status(504)},
        {"short", act::length_off_by(1000)},
    };
    for (const auto size : {small_size, large_size}) {
      for (const auto& one : faults) {
        const std::string fault_name = one.name;
        if (size == small_size && fault_name == "short") continue;  // only its length is wrong: see below
        if (size == large_size && fault_name.find_first_of("0123456789") != std::string::npos &&
            fault_name != "503")
          continue;
        CAPTURE(size);
        CAPTURE(std::string(one.name));
        world it;
        const auto what = it.add("model.h5", size);
        const auto number = it.server.add_fault(target(place::storage).nth(1), one.what);
        it.check_restored(it.restore("model.h5"), "model.h5", *what);
        CHECK(it.server.struck(number) == 1);
        CHECK(it.graphql() == 1);
        if (size == small_size) {
          CHECK(it.storage() == 2);
          CHECK(it.storage_bytes() <= size + 70'000);
        }
      }
    }
  }

  TEST_CASE("a download succeeds although every third response is cut and every fifth is a 503") {
    world it;
    const auto what = it.add("model.h5", large_size);
    std::size_t first_cut = SIZE_MAX, first_refusal = SIZE_MAX;
    for (unsigned n = 3; n < 40; n += 3) {
      const auto number = it.server.add_fault(target(place::storage).nth(n), act::cut_abruptly(300'000));
      first_cut = (std::min)(first_cut, number);
    }
    for (unsigned n = 5; n < 40; n += 5) {
      const auto number = it.server.add_fault(target(place::storage).nth(n), act::status(503));
      first_refusal = (std::min)(first_refusal, number);
    }
    hold_until(it, 4);  // the third is cut: there is a fifth
    it.check_restored(it.restore("model.h5"), "model.h5", *what);
    CHECK(it.server.struck(first_cut) == 1);
    CHECK(it.server.struck(first_refusal) == 1);
    CHECK(it.storage_bytes() < large_size + large_size / 2);  // less than a second download
  }

  TEST_CASE("connections that are closed after each response, announced or not, are replaced") {
    for (const bool silently : {false, true}) {
      CAPTURE(silently);
      world it;
      const auto what = it.add("model.h5", large_size);
      it.server.add_fault(place::any, silently ? act::close_silently() : act::close_after());
      it.check_restored(it.restore("model.h5"), "model.h5", *what);
      CHECK(it.server.counted().of(origin::storage).handshakes >= it.storage());
    }
  }

  TEST_CASE("a failed connection is retried") {
    for (const char* where : {"service", "storage"}) {
      for (const bool refused : {false, true}) {
        CAPTURE(std::string(where));
        CAPTURE(refused);
        world it;
        const auto what = it.add("model.h5", small_size);
        const auto number = it.server.add_fault(target(place::connect).matching(where).nth(1),
                                                refused ? act::refuse() : act::drop());
        it.check_restored(it.restore("model.h5"), "model.h5", *what);
        CHECK(it.server.struck(number) == 1);
      }
    }
  }

  TEST_CASE("a hanging handshake and a missing response are given up in time") {
    world it;
    it.settings.connect_timeout = 1500ms;
    it.settings.idle_timeout = 400ms;
    const auto what = it.add("model.h5", small_size);
    for (const auto& where : {target(place::connect).matching("storage"), target(place::graphql),
                              target(place::files), target(place::storage)})
      it.server.add_fault(target(where).nth(1), act::hang());
    it.check_restored(it.restore("model.h5"), "model.h5", *what);
    CHECK(it.server.counted().faults_struck == 4);
    CHECK(it.graphql() >= 2);  // more if a right answer comes late
    CHECK(it.storage() >= 2);
  }

  TEST_CASE("a server that accepts a connection counts as reached: it is retried beyond connect_timeout") {
    world it;
    it.settings.connect_timeout = 300ms;
    it.settings.idle_timeout = 200ms;
    const auto what = it.add("model.h5", small_size);
    it.server.add_fault(target(place::connect).matching("service").nth(1, 2), act::hang());
    it.server.add_fault(target(place::graphql).nth(1), act::hang());
    it.check_restored(it.restore("model.h5"), "model.h5", *what);
    CHECK(it.server.counted().faults_struck == 3);
  }

  TEST_CASE("a stalled or slow body is dropped, and the download resumes") {
    for (const bool drips : {false, true}) {
      CAPTURE(drips);
      world it;
      it.settings.idle_timeout = drips ? 400ms : 800ms;
      const auto what = it.add("model.h5", small_size);
      it.server.add_fault(target(place::storage).nth(1), drips ? act::drip(10ms) : act::stall(200'000));
      it.check_restored(it.restore("model.h5"), "model.h5", *what);
      CHECK(it.storage() >= 2);  // more if a right answer comes late
      if (!drips) CHECK(it.server.requests(request_kind::storage).back().range().has_value());
    }
  }

  TEST_CASE("Retry-After is honoured") {
    world it;
    const auto what = it.add("model.h5", 1000);
    it.server.add_fault(target(place::storage).nth(1), act::too_many_requests("1"));
    const auto began = clock_type::now();
    it.check_restored(it.restore("model.h5"), "model.h5", *what);
    CHECK(clock_type::now() - began >= 1s);
    CHECK(it.storage() == 2);
  }

  TEST_CASE("a query that fails transiently is retried") {
    for (const auto& one : std::vector<fault>{{"500", act::status(500)},
                                              {"429", act::too_many_requests("0")},
                                              {"reset", act::reset(10)},
                                              {"drop", act::drop()}}) {
      CAPTURE(std::string(one.name));
      world it;
      const auto what = it.add("model.h5", 1000);
      const auto number = it.server.add_fault(target(place::graphql).nth(1), one.what);
      it.check_restored(it.restore("model.h5"), "model.h5", *what);
      CHECK(it.server.struck(number) == 1);
      CHECK(it.graphql() == 2);
      CHECK(it.files() == 1);
    }
  }

  TEST_CASE("chunks, a missing length, interim responses, and unknown sizes or range totals are understood") {
    const std::vector<fault> faults = {{"chunked", act::chunked()},
                                       {"until close", act::until_close()},
                                       {"interim", act::interim(103, 3)},
                                       {"unknown total", act::content_range(bad_range::unknown_total)},
                                       {"identity", act::header("Content-Encoding", "identity")},
                                       {"no ETag", act::without_header("ETag")}};
    for (const auto& one : faults) {
      for (const bool told : {true, false}) {
        CAPTURE(std::string(one.name));
        CAPTURE(told);
        world it;
        stand_in::file_attributes attributes;
        if (!told) attributes.size_as = stand_in::size_form::null;
        const auto what = it.add("model.h5", told ? 8 * MiB + 3 : MiB + 3, attributes);
        it.server.add_fault(place::storage, one.what);
        it.check_restored(it.restore("model.h5"), "model.h5", *what);
        if (!told) CHECK(it.storage() == 1);
      }
    }
  }

  TEST_CASE("with an unknown size a cut download resumes, also if the server sends the whole file again") {
    for (const bool ignores : {false, true}) {
      CAPTURE(ignores);
      world it;
      stand_in::file_attributes attributes;
      attributes.size_as = stand_in::size_form::null;
      const auto what = it.add("model.h5", 3 * MiB + 3, attributes);
      it.server.add_fault(target(place::storage).nth(1), act::cut_abruptly(MiB + 1));
      it.server.add_fault(target(place::storage).nth(1), act::chunked());
      if (ignores) it.server.add_fault(target(place::storage).from(2), act::ignore_range());
      it.check_restored(it.restore("model.h5"), "model.h5", *what);
      CHECK(it.storage() == 2);
      const auto got = it.storage_bytes();
      CHECK(got <= what->size() + (ignores ? MiB + 1 : 70'000));
    }
  }

  TEST_CASE("with an unknown size a file that became shorter is fetched again") {
    world it;
    stand_in::file_attributes attributes;
    attributes.size_as = stand_in::size_form::null;
    const auto what = it.add("model.h5", 3 * MiB + 3, attributes);
    it.server.add_fault(target(place::storage).nth(1), act::cut_abruptly(MiB + 1));
    it.server.add_fault(target(place::storage).nth(1), act::chunked());
    it.server.add_fault(target(place::storage).nth(2), act::ignore_range());
    it.server.add_fault(target(place::storage).nth(2), act::body("short"));
    it.check_restored(it.restore("model.h5"), "model.h5", *what);
    CHECK(it.storage() == 3);
  }

  TEST_CASE("with an unknown size and no md5 a cut download starts over if the server ignores Range") {
    world it;
    stand_in::file_attributes attributes;
    attributes.size_as = stand_in::size_form::null;
    attributes.md5_as = stand_in::md5_form::null;
    const auto what = it.add("model.h5", 3 * MiB + 3, attributes);
    it.server.add_fault(target(place::storage).nth(1), act::cut_abruptly(MiB + 1));
    it.server.add_fault(target(place::storage).from(2), act::ignore_range());
    it.check_restored(it.restore("model.h5"), "model.h5", *what, false);
    CHECK(it.storage() == 2);
  }

  TEST_CASE("a server that ignores Range sends the whole file once, over one connection") {
    world it;
    const auto what = it.add("model.h5", large_size);
    it.server.add_fault(place::storage, act::ignore_range());
    it.check_restored(it.restore("model.h5"), "model.h5", *what);
    const auto all = it.server.requests(request_kind::storage);
    std::uint64_t whole = 0;
    for (const auto& one : all) whole += one.body_sent == large_size;
    CHECK(whole == 1);
    CHECK(all.size() <= 8);
  }

  TEST_CASE("a server that begins to ignore Range sends the whole file; the parts are not mixed") {
    world it;
    const auto what = it.add("model.h5", large_size);
    const auto number = it.server.add_fault(target(place::storage).from(4), act::ignore_range());
    hold_until(it, 4);
    it.check_restored(it.restore("model.h5"), "model.h5", *what);
    CHECK(it.server.struck(number) >= 1);
    CHECK(it.storage() <= 16);
  }

  TEST_CASE("without an md5 a file is restored, and is not verified()") {
    for (const char* told : {"(absent)", "(null)", "junk", "abc="}) {
      CAPTURE(std::string(told));
      world it;
      stand_in::file_attributes attributes;
      if (told == std::string("(absent)")) attributes.md5_as = stand_in::md5_form::absent;
      else if (told == std::string("(null)")) attributes.md5_as = stand_in::md5_form::null;
      else attributes.md5 = told;
      const auto what = it.add("model.h5", small_size, attributes);
      it.check_restored(it.restore("model.h5"), "model.h5", *what, false);
      it.server.clear_log();
      auto kept = it.restore("model.h5");
      REQUIRE(kept.has_value());
      CHECK_FALSE(kept->verified());
      CHECK(it.server.requests().empty());
    }
  }

  TEST_CASE("verify = false checks no md5") {
    world it;
    stand_in::file_attributes attributes;
    attributes.md5 = "AAAAAAAAAAAAAAAAAAAAAA==";
    const auto what = it.add("model.h5", small_size, attributes);
    it.options.verify = false;
    it.check_restored(it.restore("model.h5"), "model.h5", *what, false);
    CHECK(it.storage() == 1);
  }
}

TEST_SUITE("download: the content changes") {
  TEST_CASE("after a wrong byte the file is downloaded once more from the beginning") {
    for (const auto size : {small_size, large_size}) {
      CAPTURE(size);
      world it;
      const auto what = it.add("model.h5", size);
      // In every response before the second query: a slow connection's range may be fetched by another one, too.
      it.server.add_fault(place::storage, act::flip_byte(size / 2));
      std::atomic<int> queries{0};
      it.server.on_request([&](const stand_in::request_record& one) {
        if (one.kind == request_kind::graphql && ++queries == 2) it.server.clear_faults();
      });
      it.check_restored(it.restore("model.h5"), "model.h5", *what);
      CHECK(it.graphql() == 2);
      CHECK(it.storage_bytes() >= 2 * size);
    }
  }

  TEST_CASE("a wrong md5 or size is checksum_mismatch after two downloads; the old file stays, no partial "
            "file is left") {
    for (const bool size_is_wrong : {false, true}) {
      for (const auto size : {small_size, large_size}) {
        CAPTURE(size_is_wrong);
        CAPTURE(size);
        world it;
        support::write_file(it.at("model.h5"), "old");
        it.options.replace = true;
        stand_in::file_attributes attributes;
        if (size_is_wrong) attributes.size = size + 1;
        else attributes.md5 = "AAAAAAAAAAAAAAAAAAAAAA==";
        it.add("model.h5", size, attributes);
        it.check_failed(it.restore("model.h5"), errc::checksum_mismatch);
        CHECK(it.graphql() == 2);
        if (!size_is_wrong) CHECK(it.storage_bytes() >= 2 * size);
        CHECK(support::read_file(it.at("model.h5")) == "old");
        CHECK(it.hidden() == 0);
      }
    }
  }

  TEST_CASE("after another entity tag the service is asked once whether the file is the same; then the md5 "
            "decides") {
    world it;
    const auto what = it.add("model.h5", large_size);
    it.server.add_fault(target(place::storage).nth(3), act::etag("\"another\""));
    it.check_restored(it.restore("model.h5"), "model.h5", *what);
    CHECK(it.graphql() == 2);
  }

  TEST_CASE("without an md5, after another entity tag one request fetches the whole file") {
    world it;
    stand_in::file_attributes attributes;
    attributes.md5_as = stand_in::md5_form::null;
    attributes.size_as = stand_in::size_form::null;
    const auto what = it.add("model.h5", 3 * MiB + 3, attributes);
    it.server.add_fault(target(place::storage).nth(1), act::cut_abruptly(MiB + 1));
    const auto number = it.server.add_fault(target(place::storage).nth(2), act::etag("\"another\""));
    it.check_restored(it.restore("model.h5"), "model.h5", *what, false);
    CHECK(it.server.struck(number) == 1);
  }

  TEST_CASE("replicas with different entity tags are no failure: the md5 decides") {
    world it;
    const auto what = it.add("model.h5", large_size);
    for (unsigned n = 2; n < 100; n += 2)
      it.server.add_fault(target(place::storage).nth(n), act::etag("\"" + std::to_string(n) + "\""));
    it.check_restored(it.restore("model.h5"), "model.h5", *what);
    CHECK(it.graphql() >= 2);
    CHECK(it.graphql() <= 1 + static_cast<std::uint64_t>(it.options.connections));
  }

  TEST_CASE("parts of different contents are never combined, with a strong, a weak or no entity tag") {
    using stand_in::etag_form;
    for (const auto form : {etag_form::strong, etag_form::weak, etag_form::none}) {
      CAPTURE(static_cast<int>(form));
      world it;
      stand_in::file_attributes attributes;
      attributes.etag = form;
      it.add("model.h5", large_size, attributes);
      it.server.add_fault(target(place::storage).from(3), act::changed_content());
      if (form == etag_form::none) it.server.add_fault(place::storage, act::without_header("ETag"));
      auto got = it.restore("model.h5");
      REQUIRE_FALSE(got.has_value());
      const bool right =
          got.error().code() == errc::checksum_mismatch || got.error().code() == errc::protocol_violation;
      CHECK(right);
      CHECK_FALSE(fs::exists(it.at("model.h5")));
      // A weak tag does not identify the bytes.
      bool weak = false;
      for (const auto& one : it.server.requests(request_kind::storage))
        weak = weak || one.header("If-Range").value_or("").rfind("W/", 0) == 0;
      CHECK_FALSE(weak);
    }
  }

  TEST_CASE("a file that the run replaces during the download is restored with its new content") {
    world it;
    it.add("model.h5", large_size);
    const auto later = stand_in::generated(large_size - 5, 99);
    std::atomic<int> seen{0};
    it.server.on_request([&](const stand_in::request_record& one) {
      if (one.kind == request_kind::storage && ++seen == 3) it.server.add_file(it.run, "model.h5", later);
    });
    it.check_restored(it.restore("model.h5"), "model.h5", *later);
  }

  TEST_CASE("blocks that were hashed are not overwritten by another content") {
    // All responses but the last are right. The last is the whole file with another first byte, without an ETag.
    world it;
    it.options.connections = 2;
    stand_in::file_attributes attributes;
    attributes.etag = stand_in::etag_form::none;
    const auto what = it.add("model.h5", large_size, attributes);
    const auto last = target(place::storage).covering(large_size - 1).nth(1);
    it.server.add_fault(place::storage, act::without_header("ETag"));
    it.server.add_fault(last, act::ignore_range());
    const auto number = it.server.add_fault(last, act::flip_byte(0));
    auto got = it.restore("model.h5");
    CHECK(it.server.struck(number) == 1);
    if (got) CHECK(holds(it.at("model.h5"), *what));
    else CHECK(got.error().code() == errc::checksum_mismatch);
  }
}

TEST_SUITE("download: expired signatures") {
  TEST_CASE("while one connection still reads from the old address, renewals are counted all the same") {
    world it;
    it.add("model.h5", large_size);
    it.server.add_fault(target(place::storage).nth(1), act::drip(10ms, 64 * 1024));
    it.server.add_fault(target(place::storage).from(2), act::status(403));
    it.check_failed(it.restore("model.h5"), errc::permission_denied, 403);
    CHECK(it.graphql() <= 1 + 3);
  }

  TEST_CASE("an expired address is renewed once for all connections") {
    world it;
    const auto what = it.add("model.h5", 40 * MiB);
    std::atomic<int> seen{0};
    it.server.on_request([&](const stand_in::request_record& one) {
      if (one.kind == request_kind::storage && ++seen == 6) it.server.expire_signatures();
    });
    it.check_restored(it.restore("model.h5"), "model.h5", *what);
    CHECK(it.graphql() == 2);
    CHECK(it.files() == 2);
  }

  TEST_CASE("401, 403 and 410 from storage renew the address, at the first request or later") {
    for (const int status : {401, 403, 410}) {
      for (const unsigned n : {1u, 3u}) {
        CAPTURE(status);
        CAPTURE(n);
        world it;
        const auto what = it.add("model.h5", n == 1 ? small_size : large_size);
        it.server.add_fault(target(place::storage).nth(n), act::status(status));
        it.check_restored(it.restore("model.h5"), "model.h5", *what);
        CHECK(it.graphql() == 2);
        CHECK(it.files() == 2);
      }
    }
  }

  TEST_CASE("addresses that expire after a few requests are renewed each time") {
    stand_in::options how;
    how.signature_uses = 3;
    world it(how);
    const auto what = it.add("model.h5", 40 * MiB);
    it.check_restored(it.restore("model.h5"), "model.h5", *what);
    CHECK(it.graphql() > 1);
    CHECK(it.graphql() == it.files());
    CHECK(it.graphql() <= 2 + it.storage() / 3);
  }

  TEST_CASE("the bytes that arrived are kept if the service's answer about a new address cannot be used") {
    world it;
    const auto what = it.add("model.h5", large_size);
    it.options.connections = 1;
    it.server.add_fault(target(place::storage).nth(1), act::cut_abruptly(MiB));
    it.server.add_fault(target(place::storage).nth(2), act::status(403));
    it.server.add_fault(target(place::graphql).from(2), act::body("<html>Sign in", "text/html"));
    const auto failure = it.check_failed(it.restore("model.h5"), errc::protocol_violation);
    CHECK(std::string(failure.what()).find("resumes from the bytes") != std::string::npos);
    CHECK(it.hidden() == 1);
    it.server.clear_faults();
    it.server.clear_log();
    it.check_restored(it.restore("model.h5"), "model.h5", *what);
    CHECK(it.storage_bytes() <= large_size - MiB + 64 * 1024);
  }

  TEST_CASE("after three refused new addresses: permission_denied (410: http_failure), without a fourth") {
    for (const int status : {401, 403, 410}) {
      for (const auto size : {small_size, large_size}) {
        CAPTURE(status);
        CAPTURE(size);
        world it;
        it.add("model.h5", size);
        it.server.add_fault(
            place::storage,
            act::status(status, {},
                        "<Error><Code>AccessDenied</Code><Signature>X-Signature=1</Signature></Error>"));
        it.check_failed(it.restore("model.h5"), status == 410 ? errc::http_failure : errc::permission_denied,
                        status);
        CHECK(it.graphql() == 1 + 3);
        CHECK(it.files() == 1 + 3);
        CHECK(it.hidden() == 0);
      }
    }
  }
}

TEST_SUITE("download: failures") {
  TEST_CASE("a refusal of storage is named by the code in its body, and nothing else of the body is shown") {
    const struct {
      const char *body, *shown;
    } rows[] = {
        {"<?xml version=\"1.0\"?>\n<Error><Code>NoSuchKey</Code><Message>m</Message></Error>",
         "HTTP status 404, NoSuchKey"},
        {"<Error>\n <Code>\n BlobNotFound </Code><Message>RequestId:1</Message></Error>",
         "HTTP status 404, BlobNotFound"},
        {"<Error><Code>a1b2c3</Code></Error>", "HTTP status 404"},  // may be a signature
        {"<Error><Code></Code></Error>", "HTTP status 404"},
        {"<Error><Code>NoSuchKey", "HTTP status 404"},
        {"<Error><Code>No such key</Code></Error>", "HTTP status 404"},
        {"<Code>NoSuchKey</Code>", "HTTP status 404"},  // not an error document
        {"", "HTTP status 404"},
    };
    for (const auto& row : rows) {
      CAPTURE(row.body);
      world it;
      it.add("a.txt", 5);
      it.server.add_fault(place::storage, act::status(404, {}, row.body));
      auto failed = it.restore("a.txt");
      REQUIRE(!failed);
      const std::string text = failed.error().what();
      it.check_failed(std::move(failed), errc::http_failure, 404);
      const std::string shown = row.shown;
      CHECK_MESSAGE(text.find(shown) != text.npos, text);
      CHECK(text.substr(text.find(shown)) == shown);
    }
  }

  struct failing {
    const char* name;
    place where;
    stand_in::action what;
    errc code;
    int status;           // -1: any
    std::uint64_t count;  // requests of that kind; 0: any number
  };

  TEST_CASE("permanent failures are not retried") {
    const std::vector<failing> rows = {
        {"graphql 400", place::graphql, act::status(400), errc::http_failure, 400, 1},
        {"graphql 401", place::graphql, act::status(401), errc::not_authenticated, 401, 1},
        {"graphql 403", place::graphql, act::status(403), errc::permission_denied, 403, 1},
        {"graphql 404", place::graphql, act::status(404), errc::http_failure, 404, 1},
        {"graphql 501", place::graphql, act::status(501), errc::http_failure, 501, 1},
        {"graphql malformed", place::graphql, act::malformed_json(), errc::protocol_violation, -1, 1},
        {"graphql shape", place::graphql, act::wrong_shape(), errc::protocol_violation, -1, 1},
        {"graphql text", place::graphql, act::body("<html>", "text/html"), errc::protocol_violation, -1, 1},
        {"graphql oversize", place::graphql, act::oversize(17 * MiB), errc::protocol_violation, -1, 1},
        {"graphql endless", place::graphql, act::endless_body(), errc::protocol_violation, -1, 1},
        {"graphql many headers", place::graphql, act::many_headers(5000), errc::protocol_violation, -1, 1},
        {"graphql endless header", place::graphql, act::endless_header(), errc::protocol_violation, -1, 1},
        {"graphql garbage", place::graphql, act::garbage_status_line(), errc::protocol_violation, -1, 1},
        {"graphql encoded", place::graphql, act::header("Content-Encoding", "gzip"), errc::protocol_violation,
         -1, 1},
        {"graphql error with the key", place::graphql,
         act::graphql_errors({std::string("permission denied for api:") + stand_in::default_key}),
         errc::permission_denied, -1, 1},
        {"files 401", place::files, act::status(401), errc::not_authenticated, 401, 1},
        {"files 403", place::files, act::status(403), errc::permission_denied, 403, 1},
        {"files 404", place::files, act::status(404), errc::http_failure, 404, 1},
        {"files error with the key", place::files,
         act::status(400, {}, std::string("{\"error\":\"no key ") + stand_in::default_key + "\"}"),
         errc::http_failure, 400, 1},
        {"storage 400", place::storage, act::status(400, {}, "?X-Signature=1&X-Expires=2"),
         errc::http_failure, 400, 1},
        {"storage 404", place::storage, act::status(404), errc::http_failure, 404, 1},
        {"storage 412", place::storage, act::status(412), errc::http_failure, 412, 1},
        {"storage 501", place::storage, act::status(501), errc::http_failure, 501, 1},
        {"storage 204", place::storage, act::status(204), errc::http_failure, 204, 1},
        {"storage 304", place::storage, act::status(304), errc::http_failure, 304, 1},
        {"storage many headers", place::storage, act::many_headers(5000), errc::protocol_violation, -1, 1},
        {"storage endless header", place::storage, act::endless_header(), errc::protocol_violation, -1, 1},
        {"storage garbage", place::storage, act::garbage_status_line(), errc::protocol_violation, -1, 1},
        {"files malformed header", place::files,
         act::header("Location ", "https://h/a?X-Signature=1&X-Expires=2"), errc::protocol_violation, -1, 1},
        {"storage interim for ever", place::storage, act::interim(103, 100000), errc::protocol_violation, -1,
         1},
    };
    for (const auto& row : rows) {
      CAPTURE(std::string(row.name));
      world it;
      it.add("model.h5", small_size);
      it.server.add_fault(row.where, row.what);
      it.check_failed(it.restore("model.h5"), row.code, row.status);
      const auto kind = row.where == place::graphql ? request_kind::graphql
                        : row.where == place::files ? request_kind::files
                                                    : request_kind::storage;
      CHECK(it.requests(kind) == row.count);
      CHECK_FALSE(fs::exists(it.at("model.h5")));
      CHECK(it.hidden() == 0);
    }
  }

  TEST_CASE("a refusal with a truncated body is still a refusal") {
    for (const int status : {400, 404, 403, 401}) {
      CAPTURE(status);
      world it;
      it.add("model.h5", small_size);
      it.server.add_fault(place::files, act::status(status, {}, std::string(1000, 'x')));
      it.server.add_fault(place::files, act::cut_abruptly(10));
      it.check_failed(it.restore("model.h5"),
                      status == 401   ? errc::not_authenticated
                      : status == 403 ? errc::permission_denied
                                      : errc::http_failure,
                      status);
      CHECK(it.files() == 1);
    }
  }

  TEST_CASE("an empty response of status 200 is retried with waits, and ends after retry_timeout") {
    world it;
    it.settings.retry_timeout = 1500ms;
    it.add("model.h5", small_size);
    it.server.add_fault(place::storage, act::status(200));
    it.server.add_fault(place::storage, act::chunked());
    it.check_failed(it.restore("model.h5"), errc::connection_failed);
    CHECK(it.storage() >= 2);
    CHECK(it.storage() <= 50);
  }

  TEST_CASE("very large timeouts mean no limit") {
    world it;
    const auto what = it.add("model.h5", small_size);
    it.settings.connect_timeout = it.settings.idle_timeout = it.settings.retry_timeout =
        it.settings.total_timeout = std::chrono::milliseconds::max();
    it.check_restored(it.restore("model.h5"), "model.h5", *what);
  }

  TEST_CASE("if ranges fail, one plain GET fetches the file") {
    struct row {
      const char* name;
      stand_in::action what;
    };
    const std::vector<row> rows = {
        {"no Content-Range", act::content_range(bad_range::missing)},
        {"garbage", act::content_range(bad_range::garbage)},
        {"shifted", act::content_range(bad_range::shifted)},
        {"wrong end", act::content_range(bad_range::wrong_end)},
        {"wrong total", act::content_range(bad_range::wrong_total)},
        {"another range", act::header("Content-Range", "bytes 1-2/*")},
        {"a wider range", act::header("Content-Range", "bytes 0-" + std::to_string(large_size - 1) + "/*")},
    };
    for (const auto& one : rows) {
      CAPTURE(std::string(one.name));
      world it;
      const auto what = it.add("model.h5", large_size);
      bool has_plain = false;
      it.server.add_fault(place::storage, one.what);
      it.check_restored(it.restore("model.h5"), "model.h5", *what);
      for (const auto& request : it.server.requests(request_kind::storage))
        has_plain = has_plain || !request.range();
      CHECK(has_plain);
    }
  }

  TEST_CASE("after a short range that ends inside a block the next request continues there") {
    for (const std::uint64_t most : {99'999u, 300'001u, 1'000'000u, 1'048'576u}) {
      CAPTURE(most);
      world it;
      const auto what = it.add("model.h5", large_size);
      wandb::client<capped_ranges> client(it.settings, capped_ranges(it.settings, most));
      it.check_restored(client.try_restore("model.h5", it.options), "model.h5", *what);
    }
  }

  TEST_CASE("416 is refused for ranges and for the whole file") {
    world it;
    it.add("model.h5", large_size);
    it.server.add_fault(place::storage, act::status(416));
    it.check_failed(it.restore("model.h5"), errc::http_failure, 416);
    CHECK_FALSE(fs::exists(it.at("model.h5")));
    CHECK(it.hidden() == 0);
  }

  // A store returns the Content-Encoding that the file was uploaded with, although the request accepts identity only. A proxy
  // that compresses sets the same header.
  TEST_CASE("a Content-Encoding is accepted where size and md5 are those of the bytes as sent") {
    struct row {
      const char* name;
      std::uint64_t size;
      bool has_size, has_md5;
    };
    for (const auto& one : std::vector<row>{{"one GET", small_size, true, true},
                                            {"ranges", large_size, true, true},
                                            {"an unknown size", small_size, false, true},
                                            {"an unknown md5", small_size, true, false}}) {
      for (const bool chunked : {false, true}) {
        CAPTURE(std::string(one.name));
        CAPTURE(chunked);
        world it;
        stand_in::file_attributes attributes;
        if (!one.has_size) attributes.size_as = stand_in::size_form::null;
        if (!one.has_md5) attributes.md5_as = stand_in::md5_form::null;
        const auto what = it.add("table.json.gz", one.size, attributes);
        it.server.add_fault(place::storage, act::header("Content-Encoding", "gzip"));
        if (chunked) it.server.add_fault(place::storage, act::chunked());
        it.check_restored(it.restore("table.json.gz"), "table.json.gz", *what, one.has_md5);
        if (one.size == small_size) CHECK(it.storage() == 1);
      }
    }
  }

  TEST_CASE("a Content-Encoding is refused where size or md5 differ, or where the service tells neither") {
    struct row {
      const char* name;
      std::uint64_t size;  // of the bytes as sent; the service says small_size
      bool has_size, has_md5, chunked;
      errc code;
    };
    for (const auto& one :
         std::vector<row>{{"shorter", 1000, true, true, false, errc::protocol_violation},
                          {"shorter, chunked", 1000, true, true, true, errc::protocol_violation},
                          {"longer", large_size, true, true, false, errc::protocol_violation},
                          {"longer, chunked", large_size, true, true, true, errc::protocol_violation},
                          {"shorter, no md5", 1000, true, false, false, errc::protocol_violation},
                          {"shorter, chunked, no md5", 1000, true, false, true, errc::protocol_violation},
                          {"the same size", small_size, true, true, false, errc::checksum_mismatch},
                          {"no size", 1000, false, true, true, errc::checksum_mismatch},
                          {"no size, no md5", small_size, false, false, false, errc::protocol_violation}}) {
      CAPTURE(std::string(one.name));
      world it;
      stand_in::file_attributes attributes;
      attributes.size = small_size;
      attributes.md5 = stand_in::md5_base64(*stand_in::bytes("as uploaded"));
      if (!one.has_size) attributes.size_as = stand_in::size_form::null;
      if (!one.has_md5) attributes.md5_as = stand_in::md5_form::null, attributes.md5.reset();
      it.add("model.h5", one.size, attributes);
      it.server.add_fault(place::storage, act::header("Content-Encoding", "br"));
      if (one.chunked) it.server.add_fault(place::storage, act::chunked());
      const std::string text = it.check_failed(it.restore("model.h5"), one.code).what();
      CAPTURE(text);
      CHECK(text.find("Content-Encoding is \"br\"") != std::string::npos);
      CHECK(text.find("a proxy may be compressing") != std::string::npos);
      CHECK(it.storage() <= 2);
      CHECK_FALSE(fs::exists(it.at("model.h5")));
    }
  }

  TEST_CASE("the error about another answer in the place of the file says what came") {
    struct row {
      std::string body, type, words;  // what the error quotes
    };
    const std::string key = stand_in::default_key;
    const std::vector<row> rows = {
        {"<!DOCTYPE html>\n<html><head><title>Sign in</title><style>p { margin: 0 }</style></head>\n<body>  "
         "to "
         "the\n\tcluster</body></html>",
         "text/html; charset=utf-8", "\"Sign in to the cluster\""},
        {"<?xml version=\"1.0\"?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>",
         "application/xml", "\"AccessDenied Access Denied\""},
        {"{\"error\": \"who are you?\"}", "application/json", "who are you?"},
        {"Please\x1b[31m log\x07 in" + std::string(3, '\0'), "text/plain", "\"Please[31m log in\""},
        {"<html>key " + key + " and api:" + key + " in it", "text/html", "\"key *** and api:*** in it\""},
        {"<p>see https://bucket.test/x?X-Signature=1&X-Expires=2 or /y?X-Signature=1 or X-Signature=2",
         "text/html", "see https://bucket.test/x"},
        {"<p>" + std::string(5000, 'x') + " y", "text/html", "\"***"},
        {"<p>" +
             [] {
               std::string many;
               for (int i = 0; i < 999; ++i) many += "word ";
               return many;
             }(),
         "text/html", "word word ...\""},
    };
    for (const auto& one : rows) {
      for (const bool chunked : {false, true}) {
        for (const std::uint64_t size : {small_size, large_size}) {
          CAPTURE(one.body.substr(0, 100));
          CAPTURE(chunked);
          world it;
          it.add("model.h5", size);
          it.server.add_fault(place::storage, act::body(one.body, one.type));
          if (chunked) it.server.add_fault(place::storage, act::chunked());
          const auto code = chunked ? errc::protocol_violation : errc::checksum_mismatch;
          const std::string text = it.check_failed(it.restore("model.h5"), code).what();
          CAPTURE(text);
          CHECK(text.find("\"" + one.type + "\"") != std::string::npos);
          CHECK(text.find(one.words) != std::string::npos);
          CHECK(text.find("a login page or proxy may answer in the place of the server") !=
                std::string::npos);
          CHECK(text.size() < 700);
          for (const char c : text) CHECK_FALSE((static_cast<unsigned char>(c) < 0x20 || c == 0x7f));
          CHECK_FALSE(fs::exists(it.at("model.h5")));
          CHECK(it.hidden() == 0);
        }
      }
    }
  }

  TEST_CASE("the error about another answer is of use with an unknown size, and quotes no file's content") {
    {
      world it;
      stand_in::file_attributes attributes;
      attributes.size_as = stand_in::size_form::null;
      it.add("model.h5", small_size, attributes);
      it.server.add_fault(place::storage, act::body("<html>Sign in", "text/html"));
      const std::string text = it.check_failed(it.restore("model.h5"), errc::checksum_mismatch).what();
      CAPTURE(text);
      CHECK(text.find("begins with \"Sign in\"") != std::string::npos);
    }
    for (const std::string type : {"application/json", "application/octet-stream"}) {
      for (const std::string parameters : {"", "; charset=utf-8"}) {
        CAPTURE(type);
        CAPTURE(parameters);
        world it;
        stand_in::file_attributes attributes;
        attributes.mimetype = type + parameters;
        it.add("summary.json", small_size, attributes);
        it.server.add_fault(place::storage, act::body("{\"password\": \"abc\"}", type));
        const std::string text = it.check_failed(it.restore("summary.json"), errc::checksum_mismatch).what();
        CAPTURE(text);
        CHECK(text.find("abc") == std::string::npos);
        CHECK(text.find("has 19 bytes, the service says 300001") != std::string::npos);
      }
    }
  }

  TEST_CASE("the error about an answer of the service that is not JSON says what came") {
    world it;
    it.add("model.h5", small_size);
    it.server.add_fault(place::graphql,
                        act::body("<html><title>Sign in</title>" + it.server.key(), "text/html"));
    const std::string text = it.check_failed(it.restore("model.h5"), errc::protocol_violation).what();
    CAPTURE(text);
    CHECK(text.find("\"text/html\" and begins with \"Sign in ***\"") != std::string::npos);
    CHECK(text.find("a login page or proxy may answer in the place of the server") != std::string::npos);
  }

  TEST_CASE("the error about another answer hides the password of a proxy") {
    world it;
    it.settings.https_proxy = {"http://user:pr%6fxy-pass@127.0.0.1:9", "*"};  // used by nobody
    it.add("model.h5", small_size);
    it.server.add_fault(place::storage,
                        act::body("<html>hello pr0xy, proxy-pass, dXNlcjpwcm94eS1wYXNz", "text/html"));
    const std::string text = it.check_failed(it.restore("model.h5"), errc::checksum_mismatch).what();
    CAPTURE(text);
    CHECK(text.find("\"hello pr0xy, ***, ***\"") != std::string::npos);
  }

  TEST_CASE("after 400, 405, 416 or 501 to a range, one plain GET fetches the file") {
    for (const int status : {400, 405, 416, 501}) {
      CAPTURE(status);
      world it;
      const auto what = it.add("model.h5", large_size);
      wandb::client<refusing_ranges> client(it.settings, refusing_ranges(it.settings, status));
      it.check_restored(client.try_restore("model.h5", it.options), "model.h5", *what);
    }
  }

  TEST_CASE("a response of status 200 with a Content-Range is taken for a part") {
    world it;
    const auto what = it.add("model.h5", large_size);
    wandb::client<altering> client(it.settings, altering(it.settings, [](wandb::http_response& head) {
                                     if (head.status == 206) head.status = 200;
                                   }));
    it.check_restored(client.try_restore("model.h5", it.options), "model.h5", *what);
    CHECK(it.storage_bytes() < large_size + large_size / 2);  // no second download
  }

  TEST_CASE("a 206 to a request without Range is refused") {
    world it;
    it.add("model.h5", small_size);
    it.server.add_fault(place::storage, act::status(206, {{"Content-Range", "bytes 0-4/5"}}, "hello"));
    it.check_failed(it.restore("model.h5"), errc::protocol_violation);
  }

  TEST_CASE("a body longer than the file's size is refused") {
    world it;
    it.add("model.h5", small_size);
    it.server.add_fault(place::storage, act::until_close());
    it.server.add_fault(place::storage, act::endless_body());
    it.check_failed(it.restore("model.h5"), errc::protocol_violation);
    CHECK_FALSE(fs::exists(it.at("model.h5")));
  }

  TEST_CASE("retries end after retry_timeout; the error has the last failure and the number of tries") {
    world it;
    it.settings.retry_timeout = 1s;
    it.add("model.h5", small_size);
    SUBCASE("503") {
      it.server.add_fault(place::storage, act::status(503));
      const auto failure = it.check_failed(it.restore("model.h5"), errc::http_failure, 503);
      CHECK(std::string(failure.what()).find("gave up after") != std::string::npos);
    }
    SUBCASE("reset") {
      it.server.add_fault(place::storage, act::reset(0));
      it.check_failed(it.restore("model.h5"), errc::connection_failed);
    }
    SUBCASE("Retry-After beyond retry_timeout") {
      it.server.add_fault(place::storage, act::too_many_requests("3600"));
      const auto failure = it.check_failed(it.restore("model.h5"), errc::http_failure, 429);
      CHECK(std::string(failure.what()).find("3600 s") != std::string::npos);
      CHECK(it.storage() == 1);
    }
    SUBCASE("503 to the query") {
      it.server.add_fault(place::graphql, act::status(503));
      it.check_failed(it.restore("model.h5"), errc::http_failure, 503);
    }
    CHECK(it.hidden() == 0);
  }

  TEST_CASE("with eight connections a failing store ends the download after one retry_timeout") {
    struct phase {
      const char* name;
      std::vector<stand_in::action> what;
    };
    for (const auto& one :
         std::vector<phase>{{"ignores Range, dies midway", {act::ignore_range(), act::cut_abruptly(9 * MiB)}},
                            {"ranges are cut at once", {act::cut_abruptly(0)}},
                            {"refused", {act::refuse()}},
                            {"silent", {act::hang()}},
                            {"busy", {act::status(503)}}}) {
      CAPTURE(std::string(one.name));
      world it;
      it.settings.retry_timeout = 2s;
      it.settings.idle_timeout = 500ms;
      it.settings.connect_timeout = 500ms;
      it.add("model.h5", 40 * MiB);
      for (const auto& each : one.what) it.server.add_fault(target(place::storage).from(2), each);
      std::mutex mutex;
      int seen = 0;
      clock_type::time_point failing;  // since then all requests fail
      it.server.on_request([&](const stand_in::request_record& request) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (request.kind == request_kind::storage && ++seen == 2) failing = clock_type::now();
      });
      const auto began = clock_type::now();
      const auto got = it.restore("model.h5");
      const auto end = clock_type::now();
      REQUIRE_FALSE(got.has_value());
      CHECK(std::string(got.error().what()).find("gave up after") != std::string::npos);
      CHECK(end - began >= 2s);
      const std::lock_guard<std::mutex> lock(mutex);
      REQUIRE(seen >= 2);
      CHECK(end - failing < 12s);  // one after another would take 16 s
    }
  }

  TEST_CASE("connections that fail together three times are retried, and the download succeeds") {
    world it;
    const auto what = it.add("model.h5", 40 * MiB);
    const auto number = it.server.add_fault(target(place::storage).nth(6, 30), act::status(503));
    hold_until(it, 6);
    it.check_restored(it.restore("model.h5"), "model.h5", *what);
    CHECK(it.server.struck(number) == 25);
  }

  TEST_CASE("after a cut with progress the next try follows at once") {
    stand_in::options plain;
    plain.service_tls = plain.storage_tls = false;
    world it(plain);
    it.options.connections = 1;
    it.settings.total_timeout = 60s;  // 336 tries with a wait of a quarter of a second each would take 84 s
    const auto what = it.add("model.h5", 32 * MiB);
    it.server.add_fault(place::storage, act::cut_abruptly(100'000));
    it.check_restored(it.restore("model.h5"), "model.h5", *what);
    CHECK(it.storage() > 330);
  }

  TEST_CASE(
      "after a complete body and an error of the transport the md5 decides; without an md5 retries end") {
    for (const bool size_is_told : {true, false}) {
      for (const bool md5_is_told : {true, false}) {
        CAPTURE(size_is_told);
        CAPTURE(md5_is_told);
        world it;
        it.settings.retry_timeout = 1s;
        stand_in::file_attributes attributes;
        if (!size_is_told) attributes.size_as = stand_in::size_form::null;
        if (!md5_is_told) attributes.md5_as = stand_in::md5_form::absent;
        const auto what = it.add("model.h5", MiB + 3, attributes);
        wandb::client<failing_at_the_end> client(it.settings, failing_at_the_end(it.settings));
        auto got = client.try_restore("model.h5", it.options);
        if (md5_is_told) {
          it.check_restored(std::move(got), "model.h5", *what);
        } else {
          const auto failure = it.check_failed(std::move(got), errc::connection_failed);
          CHECK(std::string(failure.what()).find("gave up after") != std::string::npos);
        }
      }
    }
  }

  TEST_CASE("with an unknown size, a matching md5 completes a download whose last response was cut") {
    for (const bool is_resumed : {false, true}) {
      CAPTURE(is_resumed);
      world it;
      stand_in::file_attributes attributes;
      attributes.size_as = stand_in::size_form::null;
      const auto what = it.add("model.h5", 3 * MiB, attributes);
      it.server.add_fault(place::storage, act::chunked());
      if (is_resumed) it.server.add_fault(target(place::storage).nth(1), act::cut_abruptly(MiB));
      it.server.add_fault(target(place::storage).from(is_resumed ? 2 : 1),
                          act::cut_abruptly(is_resumed ? 2 * MiB : 3 * MiB));
      it.check_restored(it.restore("model.h5"), "model.h5", *what);
    }
  }

  TEST_CASE("an unreachable server is connection_failed within connect_timeout") {
    world it;
    it.add("model.h5", small_size);
    it.settings.connect_timeout = 500ms;
    it.settings.retry_timeout = 60s;
    it.server.stop();
    const auto began = clock_type::now();
    it.check_failed(it.restore("model.h5"), errc::connection_failed);
    CHECK(clock_type::now() - began < soon);
  }

  TEST_CASE("total_timeout ends a call, and the bytes that arrived are kept") {
    world it;
    const auto what = it.add("model.h5", large_size);
    it.options.connections = 1;
    it.settings.total_timeout = 5s;
    std::uint64_t arrived = 0;  // less than the stall on a slow machine
    it.options.on_progress = [&](const wandb::progress& now) {
      arrived = now.bytes_done;
      return true;
    };
    it.server.add_fault(target(place::storage).nth(1), act::stall(3 * MiB));
    const auto failure = it.check_failed(it.restore("model.h5"), errc::connection_failed);
    CHECK(std::string(failure.what()).find("total_timeout") != std::string::npos);
    CHECK(std::string(failure.what()).find("resumes from the bytes") != std::string::npos);
    CHECK(it.hidden() == 1);
    REQUIRE(arrived > 0);
    it.server.clear_log();
    it.settings.total_timeout = 0ms;
    it.options.on_progress = {};
    it.check_restored(it.restore("model.h5"), "model.h5", *what);
    CHECK(it.storage_bytes() < large_size - arrived + 65536);  // a part of a block is not kept
  }

  TEST_CASE("whole blocks in a buffer are kept, too") {
    world it;
    const auto what = it.add("model.h5", small_size);
    it.server.add_fault(target(place::storage).nth(1), act::stall(150'000));
    it.options.on_progress = [](const wandb::progress& now) { return now.bytes_done < 150'000; };
    it.check_failed(it.restore("model.h5"), errc::cancelled);
    CHECK(it.hidden() == 1);
    it.server.clear_log();
    it.options.on_progress = {};
    it.check_restored(it.restore("model.h5"), "model.h5", *what);
    CHECK(it.storage_bytes() == small_size - 2 * 65536);
  }

  TEST_CASE(
      "a refresh that finds the local file up to date removes the partial file of an earlier download") {
    world it;
    const auto what = it.add("model.h5", small_size);
    it.server.add_fault(target(place::storage).nth(1), act::stall(150'000));
    it.options.on_progress = [](const wandb::progress& now) { return now.bytes_done < 2 * 65536; };
    it.check_failed(it.restore("model.h5"), errc::cancelled);
    CHECK(it.hidden() == 1);
    support::write_file(it.at("model.h5"), stand_in::read_text(*what));
    it.options.on_progress = {};
    it.options.cache = wandb::cache_policy::refresh();
    const auto refreshed = it.restore("model.h5");
    REQUIRE(refreshed.has_value());
    CHECK(refreshed->source() == wandb::source::local);
    CHECK(it.hidden() == 0);
  }

  TEST_CASE("a few quick bytes with each try are no progress: retries end") {
    world it;
    it.add("model.h5", small_size);
    it.settings.retry_timeout = 2s;
    it.server.add_fault(place::storage, act::cut(50));
    const auto failure = it.check_failed(it.restore("model.h5"), errc::connection_failed);
    CHECK(std::string(failure.what()).find("gave up") != std::string::npos);
  }

  TEST_CASE("a few bytes with each try are no progress: retries end") {
    world it;
    it.add("model.h5", small_size);
    it.settings.idle_timeout = 300ms;
    it.settings.retry_timeout = 2s;
    it.server.add_fault(place::storage, act::stall(50));
    const auto failure = it.check_failed(it.restore("model.h5"), errc::connection_failed);
    CHECK(std::string(failure.what()).find("gave up") != std::string::npos);
  }

  TEST_CASE("a size beyond any disk: disk_failure before the first byte") {
    for (const auto size : {std::uint64_t{1} << 45, std::uint64_t{1} << 46}) {
      CAPTURE(size);
      world it;
      stand_in::file_attributes attributes;
      attributes.size = size;
      it.add("model.h5", small_size, attributes);
      const auto failure = it.check_failed(it.restore("model.h5"), errc::disk_failure);
      CHECK(std::string(failure.what()).find("are missing") != std::string::npos);
      CHECK(it.storage() == 0);
      CHECK(it.hidden() == 0);
    }
  }
}

TEST_SUITE("download: target") {
  TEST_CASE("a symbolic link is replaced, not followed; also a dangling one") {
    world it;
    const auto what = it.add("model.h5", small_size);
    it.options.replace = true;
    fs::create_directories(it.options.root);
    fs::create_symlink(it.directory / "elsewhere", it.at("model.h5"));
    SUBCASE("to a file") { support::write_file(it.directory / "elsewhere", "old"); }
    SUBCASE("to nothing") {}
    it.check_restored(it.restore("model.h5"), "model.h5", *what);
    CHECK_FALSE(fs::is_symlink(it.at("model.h5")));
    if (fs::exists(it.directory / "elsewhere"))
      CHECK(support::read_file(it.directory / "elsewhere") == "old");
  }

  TEST_CASE("a directory with the file's name is disk_failure, without a request") {
    world it;
    it.add("model.h5", small_size);
    fs::create_directories(it.at("model.h5") / "inner");
    it.check_failed(it.restore("model.h5"), errc::disk_failure);
    CHECK(it.server.requests().empty());
    CHECK(fs::exists(it.at("model.h5") / "inner"));
  }

  TEST_CASE("a directory that takes the file's name during the download is disk_failure, and stays") {
    world it;
    it.add("model.h5", small_size);
    it.server.on_request([&](const stand_in::request_record& one) {
      if (one.kind == request_kind::storage) fs::create_directories(it.at("model.h5") / "inner");
    });
    it.check_failed(it.restore("model.h5"), errc::disk_failure);
    CHECK(fs::exists(it.at("model.h5") / "inner"));
    it.server.on_request({});
    fs::remove_all(it.at("model.h5"));
    CHECK(it.restore("model.h5").has_value());
    CHECK(it.hidden() == 0);
  }

  TEST_CASE("a file as root is invalid_argument, a file above the target disk_failure; both stay") {
    world it;
    it.add("model.h5", small_size);
    it.add("ckpt/model.h5", small_size);
    support::write_file(it.directory / "root", "a file");
    it.check_failed(it.restore("model.h5"), errc::invalid_argument);
    it.check_failed(it.restore("ckpt/model.h5"), errc::invalid_argument);
    CHECK(support::read_file(it.directory / "root") == "a file");
    fs::remove(it.directory / "root");
    support::write_file(it.at("ckpt"), "a file");
    it.check_failed(it.restore("ckpt/model.h5"), errc::disk_failure);
    CHECK(support::read_file(it.at("ckpt")) == "a file");
    CHECK(it.storage() == 0);
  }
}

TEST_SUITE("download: cancelled") {
  TEST_CASE("the flag cancels soon, in every phase of a call") {
    struct phase {
      const char* name;
      target where;
      stand_in::action what;
    };
    const std::vector<phase> phases = {
        {"handshake with the service", target(place::connect).matching("service"), act::hang()},
        {"handshake with storage", target(place::connect).matching("storage"), act::hang()},
        {"the question", place::graphql, act::hang()},
        {"the redirect", place::files, act::hang()},
        {"the head", place::storage, act::hang()},
        {"the body", place::storage, act::stall(50'000)},
        {"the body of the answer to the question", place::graphql, act::stall(10)},
    };
    for (const auto& one : phases) {
      CAPTURE(std::string(one.name));
      world it;
      it.add("model.h5", large_size);
      it.server.add_fault(one.where, one.what);
      background restore(it, "model.h5");
      REQUIRE(something_hangs(it.server));
      const auto began = clock_type::now();
      restore.cancel = true;
      it.check_failed(restore.join(), errc::cancelled);
      CHECK(clock_type::now() - began < soon);
      CHECK_FALSE(fs::exists(it.at("model.h5")));
    }
  }

  TEST_CASE("on_progress cancels while storage is silent") {
    for (const bool body : {false, true}) {
      CAPTURE(body);
      world it;
      it.add("model.h5", large_size);
      it.server.add_fault(place::storage, body ? act::stall(50'000) : act::hang());
      std::atomic<bool> go_on{true};
      it.options.on_progress = [&](const wandb::progress&) { return go_on.load(); };
      background restore(it, "model.h5");
      REQUIRE(something_hangs(it.server));
      const auto began = clock_type::now();
      go_on = false;
      it.check_failed(restore.join(), errc::cancelled);
      CHECK(clock_type::now() - began < soon);
    }
  }

  TEST_CASE("the flag cancels a wait before a retry") {
    world it;
    it.add("model.h5", large_size);
    it.settings.retry_timeout = 600s;
    it.server.add_fault(place::any, act::too_many_requests("300"));
    SUBCASE("before a query") {}
    SUBCASE("before a request for the file") {
      it.server.clear_faults();
      it.server.add_fault(place::storage, act::too_many_requests("300"));
    }
    background restore(it, "model.h5");
    REQUIRE(it.server.wait_for([](const auto& now) { return now.counts.faults_struck > 0; }, 20s));
    const auto began = clock_type::now();
    restore.cancel = true;
    it.check_failed(restore.join(), errc::cancelled);
    CHECK(clock_type::now() - began < soon);
  }

  TEST_CASE("the flag cancels a call that waits for another download of the same file") {
    world it;
    const auto what = it.add("model.h5", large_size);
    it.server.add_fault(target(place::storage).nth(1), act::stall(50'000));
    it.options.connections = 1;
    background first(it, "model.h5");
    REQUIRE(something_hangs(it.server));
    std::mutex mutex;
    std::condition_variable told;
    bool waiting = false;
    it.options.on_progress = [&](const wandb::progress&) {
      const std::lock_guard<std::mutex> lock(mutex);
      waiting = true;
      told.notify_all();
      return true;
    };
    background second(it, "model.h5");
    {
      std::unique_lock<std::mutex> lock(mutex);
      REQUIRE(told.wait_for(lock, 20s, [&] { return waiting; }));
    }
    const auto began = clock_type::now();
    second.cancel = true;
    it.check_failed(second.join(), errc::cancelled);
    CHECK(clock_type::now() - began < soon);
    CHECK(it.storage() == 1);
    it.server.release();
    it.check_restored(first.join(), "model.h5", *what);
  }

  TEST_CASE("the next call after a cancellation resumes") {
    world it;
    const auto what = it.add("model.h5", large_size);
    it.options.connections = 1;
    it.server.add_fault(target(place::storage).nth(1), act::stall(12 * MiB));
    {
      std::mutex mutex;
      std::condition_variable told;
      std::uint64_t done = 0;
      it.options.on_progress = [&](const wandb::progress& now) {
        const std::lock_guard<std::mutex> lock(mutex);
        done = now.bytes_done;
        told.notify_all();
        return true;
      };
      background restore(it, "model.h5");
      {
        std::unique_lock<std::mutex> lock(mutex);
        REQUIRE(told.wait_for(lock, 20s, [&] { return done >= 12 * MiB; }));
      }
      restore.cancel = true;
      it.check_failed(restore.join(), errc::cancelled);
    }
    it.options.on_progress = {};
    CHECK(it.hidden() == 1);
    CHECK_FALSE(fs::exists(it.at("model.h5")));
    it.server.clear_log();
    it.check_restored(it.restore("model.h5"), "model.h5", *what);
    CHECK(it.storage_bytes() == large_size - 12 * MiB);
  }

  TEST_CASE("without an md5 a cancelled download is not kept") {
    world it;
    stand_in::file_attributes attributes;
    attributes.md5_as = stand_in::md5_form::absent;
    it.add("model.h5", large_size, attributes);
    it.server.add_fault(target(place::storage).from(1), act::stall(MiB));
    background restore(it, "model.h5");
    REQUIRE(something_hangs(it.server));
    restore.cancel = true;
    it.check_failed(restore.join(), errc::cancelled);
    CHECK(it.hidden() == 0);
  }

  TEST_CASE("a resumed download with a wrong md5 is repeated once from the beginning") {
    world it;
    const auto what = it.add("model.h5", large_size);
    it.options.connections = 1;
    it.server.add_fault(target(place::storage).nth(1), act::flip_byte(5));
    it.server.add_fault(target(place::storage).nth(1), act::stall(12 * MiB));
    it.options.on_progress = [](const wandb::progress& now) { return now.bytes_done < 12 * MiB; };
    it.check_failed(it.restore("model.h5"), errc::cancelled);
    REQUIRE(it.hidden() == 1);
    it.options.on_progress = {};
    it.server.clear_log();
    it.check_restored(it.restore("model.h5"), "model.h5", *what);
    CHECK(it.graphql() == 2);
    CHECK(it.storage_bytes() == large_size - 12 * MiB + large_size);
  }
}

TEST_SUITE("download: a store in memory") {
  TEST_CASE("without an md5, parts of two versions of a file are never combined") {
    for (const bool has_tag : {false, true}) {
      CAPTURE(has_tag);
      const std::string before(200'000, 'x'), after(300'000, 'y');
      memory_world world;
      auto got = world.restore(memory_store(
          "",
          [&](int number, const wandb::http_request&,
              wandb::body_sink& sink) -> wandb::result<wandb::http_response> {
            if (number == 1) {
              wandb::http_response head;
              head.status = 200;
              head.headers = {{"ETag", "\"a\""}, {"Content-Length", "200000"}};
              if (sink.start(head)) sink.write(std::string_view(before).substr(0, 100'000));
              return wandb::error(errc::connection_failed, "the connection was lost");
            }
            wandb::http_headers fields;
            if (has_tag) fields = {{"ETag", "\"a\""}};
            if (number > 2) return memory_store::answer(sink, 200, fields, after);
            fields.push_back({"Content-Range", "bytes 100000-299999/300000"});
            return memory_store::answer(sink, 206, fields, std::string_view(after).substr(100'000));
          }));
      REQUIRE(got.has_value());
      CHECK(support::read_file(world.directory / "root" / "a") == after);
    }
  }

  TEST_CASE("a long Retry-After for one connection does not end the download while others receive") {
    /// Calls a function between the head of a response and its body.
    struct pausing_sink final : wandb::body_sink {
      pausing_sink(wandb::body_sink& to, std::function<void()> between)
          : sink(to), pause(std::move(between)) {}
      bool start(const wandb::http_response& head) override {
        if (!sink.start(head)) return false;
        pause();
        return true;
      }
      bool write(std::string_view bytes) override { return sink.write(bytes); }
      wandb::body_sink& sink;
      std::function<void()> pause;
    };
    const std::string content(32 * MiB, 'x');
    memory_world world;
    std::mutex mutex;
    std::condition_variable changed;
    bool receives = false;     // the body of response 2 is awaited
    std::string refused;       // the range of request 3, without its end
    bool is_repeated = false;  // another connection requests it
    const auto got = world.restore(memory_store(
        world.facts(content), [&](int number, const wandb::http_request& request, wandb::body_sink& sink) {
          const auto wait_for = [&](const bool& flag) {
            std::unique_lock<std::mutex> held(mutex);
            while (!flag && !request.cancelled()) changed.wait_for(held, 20ms);
          };
          const auto set = [&](bool& flag) {
            const std::lock_guard<std::mutex> guard(mutex);
            flag = true;
            changed.notify_all();
          };
          std::string range;
          for (const auto& [name, value] : request.headers)
            if (name == "Range") range = value.substr(0, value.find('-') + 1);
          if (number == 3) {
            wait_for(receives);
            const std::lock_guard<std::mutex> guard(mutex);
            refused = range;
            return memory_store::answer(sink, 429, {{"Retry-After", "3600"}}, "");
          }
          if (number == 2) {
            pausing_sink pausing(sink, [&] {
              set(receives);
              wait_for(is_repeated);
            });
            return memory_store::part(request, pausing, content);
          }
          if (number > 3) {
            std::unique_lock<std::mutex> held(mutex);
            const bool is_refused = range == refused;
            held.unlock();
            if (is_refused) set(is_repeated);
          }
          return memory_store::part(request, sink, content);
        }));
    if (!got) MESSAGE(got.error().what());
    CHECK(got.has_value());
    CHECK(is_repeated);
  }

  TEST_CASE("several connections learn at once that ranges do not work") {
    const std::string content(32 * MiB, 'x');
    memory_world world;
    bool were_together = false;  // in at least one round
    for (int round = 0; round < 20; ++round) {
      std::mutex mutex;
      std::condition_variable changed;
      int waiting = 0;
      const auto got = world.restore(memory_store(
          world.facts(content), [&](int, const wandb::http_request& request, wandb::body_sink& sink) {
            if (!memory_store::asks_range(request)) return memory_store::part(request, sink, content);
            {
              std::unique_lock<std::mutex> held(mutex);
              ++waiting;
              changed.notify_all();
              were_together |= changed.wait_for(held, 500ms, [&] { return waiting >= 4; });
            }
            return memory_store::answer(sink, 416, {}, "");
          }));
      if (!got) MESSAGE(got.error().what());
      REQUIRE(got.has_value());
    }
    CHECK(were_together);
  }

  TEST_CASE("a connection that is silent loses its range, and the address stays known") {
    const std::string content(32 * MiB, 'x');
    memory_world world;
    std::atomic<int> silent{0};
    memory_store store(world.facts(content),
                       [&](int number, const wandb::http_request& request,
                           wandb::body_sink& sink) -> wandb::result<wandb::http_response> {
                         if (number != 3) return memory_store::part(request, sink, content);
                         ++silent;
                         while (!request.cancelled()) std::this_thread::yield();
                         return wandb::error(errc::cancelled, "cancelled");
                       });
    const auto got = world.restore(store);
    CHECK(got.has_value());
    CHECK(silent == 1);
    CHECK(store.resolved() == 1);
  }
}

TEST_SUITE("download: progress") {
  TEST_CASE("reports come from one thread, never decrease, never exceed the total, and end with the total") {
    for (const bool verify : {true, false}) {
      CAPTURE(verify);
      world it;
      it.options.verify = verify;
      const auto what = it.add("model.h5", large_size);
      it.server.set_rate(0, 40 * MiB);
      struct report {
        std::thread::id thread;
        std::string name;
        wandb::phase phase;
        std::uint64_t done;
        std::optional<std::uint64_t> total;
        double rate;
      };
      std::vector<report> reports;  // no lock: on_progress is called from one thread at a time
      it.options.on_progress = [&](const wandb::progress& now) {
        reports.push_back({std::this_thread::get_id(), std::string(now.name), now.phase, now.bytes_done,
                           now.bytes_total, now.bytes_per_second});
        return true;
      };
      const auto began = clock_type::now();
      it.check_restored(it.restore("model.h5"), "model.h5", *what, verify);
      const auto took = clock_type::now() - began;
      REQUIRE(reports.size() >= 3);
      // At most one in 80 ms, but for the first and the last. Two may be closer together if a report was delayed.
      CHECK(static_cast<std::int64_t>(reports.size()) <= took / 80ms + 2);
      CHECK(reports.back().done == large_size);
      CHECK(reports.back().phase == (verify ? wandb::phase::verifying : wandb::phase::downloading));
      bool rate_seen = false;
      for (std::size_t i = 0; i < reports.size(); ++i) {
        const auto& now = reports[i];
        CHECK(now.thread == std::this_thread::get_id());
        CHECK(now.name == "model.h5");
        CHECK(now.total == large_size);
        CHECK(now.done <= large_size);
        rate_seen = rate_seen || now.rate > 0;
        if (i == 0) continue;
        CHECK(static_cast<int>(now.phase) >= static_cast<int>(reports[i - 1].phase));
        if (now.phase == reports[i - 1].phase) CHECK(now.done >= reports[i - 1].done);
      }
      CHECK(rate_seen);
    }
  }

  TEST_CASE("false from the first report cancels, and no file is left") {
    world it;
    it.add("model.h5", small_size);
    it.options.on_progress = [](const wandb::progress&) { return false; };
    it.check_failed(it.restore("model.h5"), errc::cancelled);
    CHECK_FALSE(fs::exists(it.at("model.h5")));
  }

  TEST_CASE("an exception from on_progress reaches the caller after all threads have ended") {
    world it;
    it.add("model.h5", large_size);
    it.server.set_rate(0, 10 * MiB);
    it.options.on_progress = [](const wandb::progress&) -> bool { throw std::runtime_error("enough"); };
    CHECK_THROWS_WITH_AS((void)it.restore("model.h5"), "enough", std::runtime_error);
    CHECK_FALSE(fs::exists(it.at("model.h5")));
    CHECK(it.server.wait_for(
        [](const auto& now) { return now.counts.of(origin::storage).open_connections == 0; }, 20s));
  }
}

TEST_SUITE("download: several at once") {
  TEST_CASE(
      "an exception from a transport in a thread reaches the caller, and the bytes that arrived are kept") {
    struct row {
      std::uint64_t size;
      bool has_md5;
      std::uint64_t throws_after;  // bytes
      std::uint64_t most_lost;     // bytes that are fetched again
    };
    for (const row& each : {row{20 * MiB + 7, true, 9 * MiB, 4 * 256 * 1024},
                            row{MiB, true, 640 * 1024, 64 * 1024}, row{MiB, false, 640 * 1024, MiB}}) {
      const auto size = each.size;
      const bool has_md5 = each.has_md5;
      CAPTURE(size);
      CAPTURE(has_md5);
      const support::temporary_directory directory;
      wandb::settings settings;
      settings.base_url = "http://wandb.test";
      settings.cache_dir = directory / "cache";
      wandb::restore_options options;
      options.run_path = "team/project/run1";
      options.root = directory / "root";
      options.connections = 4;
      const auto what = stand_in::generated(size, 3);
      throwing_transport transport{what, has_md5, each.throws_after};
      wandb::client<throwing_transport> client(settings, transport);
      CHECK_THROWS_AS((void)client.try_restore("model.h5", options), std::bad_alloc);
      CHECK_FALSE(fs::exists(options.root / "model.h5"));
      const std::uint64_t before = *transport.sent;
      *transport.left = UINT64_MAX;
      const auto got = client.try_restore("model.h5", options);
      REQUIRE(got.has_value());
      CHECK(holds(options.root / "model.h5", *what));
      CHECK(*transport.sent <= size + each.most_lost);
      CHECK(*transport.sent - before < (has_md5 ? size : size + 1));
    }
  }

  TEST_CASE("threads that restore one file download it once") {
    world it;
    const auto what = it.add("model.h5", large_size);
    it.options.connections = 1;  // one connection requests no byte twice
    wandb::client<> client(it.settings);
    std::vector<std::thread> threads;
    std::atomic<int> downloaded{0}, local{0}, right{0};
    for (int i = 0; i < 8; ++i) {
      threads.emplace_back([&] {
        auto got = client.try_restore("model.h5", it.options);
        if (!got) return;
        ++(got->source() == wandb::source::downloaded ? downloaded : local);
        right += got->verified() && got->size() == large_size;
      });
    }
    for (auto& one : threads) one.join();
    CHECK(right == 8);
    CHECK(downloaded == 1);
    CHECK(local == 7);
    CHECK(holds(it.at("model.h5"), *what));
    CHECK(it.storage_bytes() == large_size);
    CHECK(it.hidden() == 0);
  }

  TEST_CASE("threads restore different files at once") {
    world it;
    std::vector<stand_in::content_ptr> all;
    for (int i = 0; i < 6; ++i)
      all.push_back(it.add("model-" + std::to_string(i), 3 * MiB + static_cast<std::uint64_t>(i)));
    wandb::client<> client(it.settings);
    std::vector<std::thread> threads;
    std::atomic<int> right{0};
    for (int i = 0; i < 6; ++i) {
      threads.emplace_back([&, i] {
        const std::string name = "model-" + std::to_string(i);
        right += client.try_restore(name, it.options).has_value() &&
                 holds(it.at(name), *all[static_cast<std::size_t>(i)]);
      });
    }
    for (auto& one : threads) one.join();
    CHECK(right == 6);
  }

  TEST_CASE("if the downloading call is cancelled, a waiting call resumes") {
    world it;
    const auto what = it.add("model.h5", large_size);
    it.options.connections = 1;
    it.server.add_fault(target(place::storage).nth(1), act::stall(12 * MiB));
    std::mutex mutex;
    std::condition_variable told;
    std::uint64_t done = 0;
    it.options.on_progress = [&](const wandb::progress& now) {
      const std::lock_guard<std::mutex> lock(mutex);
      done = (std::max)(done, now.bytes_done);
      told.notify_all();
      return true;
    };
    background first(it, "model.h5");
    {
      std::unique_lock<std::mutex> lock(mutex);
      REQUIRE(told.wait_for(lock, 20s, [&] { return done >= 12 * MiB; }));
    }
    bool waits = false;
    it.options.on_progress = [&](const wandb::progress&) {
      const std::lock_guard<std::mutex> lock(mutex);
      waits = true;
      told.notify_all();
      return true;
    };
    background second(it, "model.h5");
    {
      std::unique_lock<std::mutex> lock(mutex);
      REQUIRE(told.wait_for(lock, 20s, [&] { return waits; }));
    }
    first.cancel = true;
    it.check_failed(first.join(), errc::cancelled);
    it.check_restored(second.join(), "model.h5", *what);
    CHECK(it.storage_bytes() == large_size);
  }
}
