// The conformance suite for transports: a test case for each promise that a Transport makes, named after the promise.
// It uses the public part of wandb_restore.hpp alone, so a program of your own can put your transport through it:
//
//   #define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
//   #include <doctest/doctest.h>
//   #include "my_transport.hpp"
//
//   struct my_transport_under_test {
//     static constexpr const char* name = "my_transport";
//     /// Makes the transport. It takes the certificate authorities and verify_tls from the settings.
//     static my_transport make(const wandb::settings& settings) { return my_transport(settings); }
//     /// The promises that the HTTP stack below the transport cannot keep: the name of the case, and the reason.
//     static std::vector<std::pair<std::string, std::string>> cannot_keep() { return {}; }
//   };
//   #define TRANSPORTS_UNDER_TEST my_transport_under_test   // several: separated by commas
//   #include "transport_conformance.hpp"
//
//   c++ -std=c++17 -I. -Itests -Itests/stand_in my_test.cpp tests/stand_in/stand_in.cpp -lssl -lcrypto -pthread
//
// A promise in cannot_keep is reported and not tested; all others are tested. An entry of cannot_keep that names no case is a
// failure. With the environment variable TRANSPORT_CONFORMANCE_ALL set, the cases in cannot_keep run as well, to show
// which of them still fail.
//
// Put a transport without a network into LOCAL_TRANSPORTS_UNDER_TEST: only the promises that need no server are tested. Its
// `make` takes the content of a file, and its `address` is the URL at which it responds with that content.
//
// SPDX-License-Identifier: MIT
#ifndef WANDB_RESTORE_TESTS_TRANSPORT_CONFORMANCE_HPP
#define WANDB_RESTORE_TESTS_TRANSPORT_CONFORMANCE_HPP

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <string_view>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "sockets.hpp"
#include "stand_in.hpp"
#include "support.hpp"
#include "wandb_restore.hpp"

#ifndef _WIN32

#include <netinet/in.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#ifndef TRANSPORT_CONFORMANCE_SUITE
#define TRANSPORT_CONFORMANCE_SUITE "conformance"  // doctest's suite of all cases
#endif
#ifdef LOCAL_TRANSPORTS_UNDER_TEST
#define ALL_TRANSPORTS_UNDER_TEST TRANSPORTS_UNDER_TEST, LOCAL_TRANSPORTS_UNDER_TEST
#else
#define ALL_TRANSPORTS_UNDER_TEST TRANSPORTS_UNDER_TEST
#endif

namespace conformance {
inline namespace WANDB_RESTORE_PRIVATE_ABI {  // as in sockets.hpp

using namespace sockets;
namespace act = stand_in::act;

/// Returns the names of all cases.
inline std::set<std::string>& promises() {
  static std::set<std::string> names;
  return names;
}

/// Whether the case runs for this transport. Reports a promise that the transport cannot keep.
template <class Subject>
bool is_tested(const char* promise) {
  for (const auto& [name, reason] : Subject::cannot_keep()) {
    if (name != promise) continue;
    MESSAGE(std::string(Subject::name), " cannot keep this promise: ", reason);
    return std::getenv("TRANSPORT_CONFORMANCE_ALL") != nullptr;
  }
  return true;
}

// PROMISE("name") { ... } defines the case of a promise, for a type Subject. PROMISE_WITHOUT_NETWORK also tests transports
// without a network.
#define PROMISE(name) CONFORMANCE_CASE(name, __LINE__, TRANSPORTS_UNDER_TEST)
#define PROMISE_WITHOUT_NETWORK(name) CONFORMANCE_CASE(name, __LINE__, ALL_TRANSPORTS_UNDER_TEST)
#define CONFORMANCE_CASE(name, line, ...) CONFORMANCE_CASE_AT(name, line, __VA_ARGS__)
#define CONFORMANCE_CASE_AT(name, line, ...)                                                                 \
  template <class Subject>                                                                                   \
  void case_at_##line();                                                                                     \
  [[maybe_unused]] static const bool is_listed_##line = promises().insert(name).second;                      \
  TEST_CASE_TEMPLATE(name, Subject, __VA_ARGS__) {                                                           \
    if (is_tested<Subject>(name)) case_at_##line<Subject>();                                                 \
  }                                                                                                          \
  template <class Subject>                                                                                   \
  void case_at_##line()

// ---------------------------------------------------------------------------------------------- helpers of the cases

/// Makes a request with timeouts that only a faulty transport reaches.
inline wandb::http_request request_for(const std::string& url) {
  wandb::http_request request;
  request.url = url;
  request.headers = {{"User-Agent", "conformance"}, {"Accept", "*/*"}, {"Accept-Encoding", "identity"}};
  request.connect_timeout = request.idle_timeout = patience;
  return request;
}

/// Makes an exchange, and checks the transport's calls of the sink.
template <class Transport>
wandb::result<wandb::http_response> send(Transport& transport, const wandb::http_request& request,
                                         collector& sink) {
  auto outcome = transport.send(request, sink);
  CHECK(sink.out_of_turn == 0);
  if (outcome) {
    CHECK(sink.starts == 1);
    CHECK(outcome->status == sink.head.status);
    CHECK(outcome->headers == sink.head.headers);
  }
  return outcome;
}

/// Makes an exchange that has to succeed.
template <class Transport>
wandb::http_response sent(Transport& transport, const wandb::http_request& request, collector& sink) {
  const auto outcome = send(transport, request, sink);
  REQUIRE_MESSAGE(outcome.has_value(), outcome.error().what());
  return *outcome;
}

/// Makes an exchange with a new transport. Returns the body.
template <class Subject>
std::string body_of(const wandb::http_request& request) {
  auto transport = Subject::make({});
  collector sink;
  sent(transport, request, sink);
  return sink.body;
}

/// Makes an exchange with a new server. Returns the body.
template <class Subject>
std::string body_from(std::function<void(peer&)> serve) {
  raw_server server(std::move(serve));
  return body_of<Subject>(request_for(server.url()));
}

/// Reads a request's head, sends some bytes, and waits until the client closes the connection.
inline std::function<void(peer&)> answering(std::string bytes) {
  return [bytes = std::move(bytes)](peer& client) {
    client.read_head();
    client.send(bytes);
    client.wait_for_close(30s);
  };
}
/// As above, but the server closes the connection after the bytes.
inline std::function<void(peer&)> answering_and_leaving(std::string bytes) {
  return [bytes = std::move(bytes)](peer& client) {
    client.read_head();
    client.send(bytes);
    client.leave();
  };
}
/// Answers each request, over any connection, with the next of some answers; repeats the last one.
inline std::function<void(peer&)> answering_in_turn(std::vector<std::string> answers) {
  const auto next = std::make_shared<std::atomic<std::size_t>>(0);
  return [answers = std::move(answers), next](peer& client) {
    while (client.read_head().find("\r\n\r\n") != std::string::npos) {
      client.send(answers[(std::min)(next->fetch_add(1), answers.size() - 1)]);
    }
  };
}

/// Returns the header fields of a head as received.
inline wandb::http_headers fields_of(const std::string& head) {
  wandb::http_headers fields;
  for (std::size_t begin = head.find("\r\n") + 2; begin < head.size();) {
    const std::size_t end = head.find("\r\n", begin);
    if (end == std::string::npos || end == begin) break;
    const std::size_t colon = head.find(':', begin);
    std::string value = head.substr(colon + 1, end - colon - 1);
    value.erase(0, value.find_first_not_of(' '));
    fields.emplace_back(head.substr(begin, colon - begin), std::move(value));
    begin = end + 2;
  }
  return fields;
}
inline std::vector<std::string> values_of(const wandb::http_headers& fields, std::string_view name) {
  const auto lower = [](std::string_view text) {
    std::string small(text);
    for (char& c : small)
      if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
    return small;
  };
  std::vector<std::string> values;
  for (const auto& field : fields)
    if (lower(field.first) == lower(name)) values.push_back(field.second);
  return values;
}

/// A response with an endless head or framing: `beginning`, then `endless` repeated.
struct endless_response {
  const char* what;
  std::string beginning, endless;
};
inline std::vector<endless_response> endless_responses() {
  const std::string ok = "HTTP/1.1 200 OK\r\n";
  const std::string chunk = ok + "Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n";
  const std::string text(4096, 'x'), field = "X: " + text + "\r\n";
  return {{"a status line", "HTTP/1.1 200 ", text},
          {"a header line", ok + "X: ", text},
          {"header lines", ok, field},
          {"interim responses", "", "HTTP/1.1 100 Continue\r\n" + field + "\r\n"},
          {"a chunk's extension", chunk + "5;x=", text},
          {"a chunk's size", chunk, std::string(4096, '0')},
          {"a trailer line", chunk + "0\r\nX: ", text},
          {"trailer lines", chunk + "0\r\n", field}};
}

/// Makes an exchange with a server that sends an endless response. Returns the failure, and the number of bytes that the
/// server sent, including those in the buffers of the two sockets.
template <class Subject>
std::pair<wandb::result<wandb::http_response>, std::size_t>
endless_exchange(const endless_response& response) {
  std::atomic<std::size_t> sent_bytes{0};
  wandb::result<wandb::http_response> outcome;
  {
    raw_server server([&](peer& client) {
      client.read_head();
      client.send(response.beginning);
      sent_bytes = client.send_without_end(response.endless, 64u << 20);
    });
    auto transport = Subject::make({});
    collector sink;
    outcome = send(transport, request_for(server.url()), sink);
  }
  return {std::move(outcome), sent_bytes.load()};
}

/// A transport, and a request to which it responds with some content.
template <class Subject>
struct served {
  explicit served(std::uint64_t size)
      : content(stand_in::read_text(*stand_in::generated(size))), server(plain()), transport(make(content)) {
    if constexpr (has_network) {
      const auto run = server.add_run("e", "p", "r");
      server.add_file(run, "a.bin", content);
      request = request_for(server.signed_url(run, "a.bin"));
    } else {
      request = request_for(Subject::address);
    }
  }

  static constexpr bool has_network = std::is_invocable_v<decltype(&Subject::make), const wandb::settings&>;
  static auto make(const std::string& file) {
    if constexpr (has_network) {
      static_cast<void>(file);
      return Subject::make(wandb::settings{});
    } else {
      return Subject::make(file);
    }
  }
  using transport_type = decltype(make(std::string()));

  std::string content;
  stand_in::server server;  // not used by a transport without a network
  transport_type transport;
  wandb::http_request request;
};

/// A counter that threads of a test can wait for.
class milestone {
 public:
  void add(std::size_t count) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      count_ += count;
    }
    changed_.notify_all();
  }
  /// Returns false if it takes longer than 20 s.
  bool wait_for(std::size_t count) {
    std::unique_lock<std::mutex> lock(mutex_);
    return changed_.wait_for(lock, 20s, [&] { return count_ >= count; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::size_t count_ = 0;
};

inline std::atomic<int> sigpipes{0};

/// Counts the SIGPIPEs that reach the program.
class sigpipe_counter {
 public:
  sigpipe_counter() {
    sigpipes = 0;
    struct sigaction counting {};
    counting.sa_handler = [](int) { ++sigpipes; };
    ::sigaction(SIGPIPE, &counting, &before_);
    sigset_t pipe;
    ::sigemptyset(&pipe);
    ::sigaddset(&pipe, SIGPIPE);
    ::pthread_sigmask(SIG_UNBLOCK, &pipe, &mask_before_);
  }
  ~sigpipe_counter() {
    ::pthread_sigmask(SIG_SETMASK, &mask_before_, nullptr);
    ::sigaction(SIGPIPE, &before_, nullptr);
  }
  sigpipe_counter(const sigpipe_counter&) = delete;
  sigpipe_counter& operator=(const sigpipe_counter&) = delete;

  int count() const { return sigpipes; }

 private:
  struct sigaction before_ {};
  sigset_t mask_before_{};
};

TEST_SUITE_BEGIN(TRANSPORT_CONFORMANCE_SUITE);

// -------------------------------------------------------------------------------------------------- head, body, sink

PROMISE_WITHOUT_NETWORK("the head comes once and before the body") {
  served<Subject> s(3'000'001);
  collector sink;
  const auto answer = sent(s.transport, s.request, sink);
  CHECK(answer.status == 200);
  CHECK(sink.body == s.content);
}

PROMISE_WITHOUT_NETWORK("a sink that stops at the head ends the exchange with errc::cancelled") {
  served<Subject> s(1'000'000);
  collector sink;
  sink.wants_body = false;
  check_failed(send(s.transport, s.request, sink), wandb::errc::cancelled);
  CHECK(sink.starts == 1);
}

PROMISE_WITHOUT_NETWORK("a sink that stops in the body ends the exchange with errc::cancelled") {
  served<Subject> s(1'000'000);
  collector sink;
  sink.stop_after = 100'000;
  check_failed(send(s.transport, s.request, sink), wandb::errc::cancelled);
  CHECK(sink.body.size() >= 100'000);
}

PROMISE_WITHOUT_NETWORK("a request that is cancelled already fails with errc::cancelled") {
  served<Subject> s(1000);
  s.request.is_cancelled = [] { return true; };
  collector sink;
  check_failed(send(s.transport, s.request, sink), wandb::errc::cancelled);
}

PROMISE_WITHOUT_NETWORK("several threads may send at once") {
  served<Subject> s(300'000);
  std::atomic<int> right{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 10; ++i) {
        collector sink;
        if ((t + i) % 5 == 0) sink.stop_after = 1;
        const auto answer = s.transport.send(s.request, sink);
        if (answer ? sink.body == s.content : answer.error().code() == wandb::errc::cancelled) ++right;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  CHECK(right == 80);
}

PROMISE("several threads may send at once over TLS") {
  bench b;
  b.add(300'000);
  auto transport = Subject::make(b.trusting);
  const std::string whole = stand_in::read_text(*b.content);
  std::atomic<int> right{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 5; ++i) {
        collector sink;
        if (transport.send(b.get(), sink) && sink.body == whole) ++right;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  CHECK(right == 20);
}

PROMISE("the body is passed on as it arrives and is not kept") {
  // The server sends the next part only after the sink has received all earlier bytes. A transport that collects the body
  // before it calls the sink never receives the rest.
  constexpr std::size_t piece_bytes = 1u << 20, pieces = 120;
  for (const bool in_chunks : {false, true}) {
    CAPTURE(in_chunks);
    milestone seen;
    raw_server server([&](peer& client) {
      const std::string piece(piece_bytes, 'x');
      client.read_head();
      client.send(std::string("HTTP/1.1 200 OK\r\n") +
                  (in_chunks ? "Transfer-Encoding: chunked"
                             : "Content-Length: " + std::to_string(piece_bytes * pieces)) +
                  "\r\n\r\n");
      for (std::size_t i = 0; i < pieces; ++i) {
        if (in_chunks) client.send("100000\r\n");
        client.send({piece.data(), 1000});
        if (!seen.wait_for(i * piece_bytes + 1000)) return;
        client.send({piece.data(), piece_bytes - 1000});
        if (in_chunks) client.send("\r\n");
        if (!seen.wait_for((i + 1) * piece_bytes)) return;
      }
      if (in_chunks) client.send("0\r\n\r\n");
      client.wait_for_close(30s);
    });
    struct : wandb::body_sink {
      milestone* seen = nullptr;
      std::size_t bytes = 0;
      bool start(const wandb::http_response&) override { return true; }
      bool write(std::string_view part) override {
        bytes += part.size();
        seen->add(part.size());
        return true;
      }
    } sink;
    sink.seen = &seen;
    auto transport = Subject::make({});
    const auto answer = transport.send(request_for(server.url()), sink);
    REQUIRE_MESSAGE(answer.has_value(), answer.error().what());
    CHECK(sink.bytes == piece_bytes * pieces);
  }
}

PROMISE("the connection is closed when the sink stops") {
  for (const bool at_head : {true, false}) {
    CAPTURE(at_head);
    milestone closed;
    raw_server server([&](peer& client) {
      client.read_head();
      client.send("HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + std::string(1000, 'x'));
      if (client.wait_for_close(30s)) closed.add(1);
    });
    auto transport = Subject::make({});
    collector sink;
    if (at_head) sink.wants_body = false;
    else sink.stop_after = 1;
    check_failed(send(transport, request_for(server.url()), sink), wandb::errc::cancelled);
    CHECK(closed.wait_for(1));
  }
}

// ---------------------------------------------------------------------------------------------- one exchange, no more

PROMISE("a send makes one request and follows no redirect") {
  for (const int status : {301, 302, 303, 307, 308}) {
    CAPTURE(status);
    std::atomic<int> requests{0};
    raw_server server([&](peer& client) {
      while (client.read_head().find("\r\n\r\n") != std::string::npos) {
        ++requests;
        client.send("HTTP/1.1 " + std::to_string(status) +
                    " Elsewhere\r\nLocation: /elsewhere\r\nContent-Length: 2\r\n\r\nno");
      }
    });
    auto transport = Subject::make({});
    collector sink;
    const auto answer = sent(transport, request_for(server.url()), sink);
    CHECK(answer.status == status);
    CHECK(values_of(answer.headers, "Location") == std::vector<std::string>{"/elsewhere"});
    CHECK(sink.body == "no");
    CHECK(requests == 1);
  }
}

PROMISE("a request is not repeated after any status") {
  for (const int status : {400, 401, 404, 408, 421, 425, 429, 500, 502, 503, 504}) {
    CAPTURE(status);
    std::atomic<int> requests{0};
    raw_server server([&](peer& client) {
      while (client.read_head().find("\r\n\r\n") != std::string::npos) {
        ++requests;
        client.send(
            "HTTP/1.1 " + std::to_string(status) +
            " No\r\nRetry-After: 0\r\nWWW-Authenticate: Basic realm=\"r\"\r\nContent-Length: 2\r\n\r\nno");
      }
    });
    auto transport = Subject::make({});
    collector sink;
    CHECK(sent(transport, request_for(server.url()), sink).status == status);
    CHECK(sink.body == "no");
    CHECK(requests == 1);
  }
}

PROMISE("no credentials and no cookies are added") {
  std::vector<std::string> heads;
  std::mutex mutex;
  {
    raw_server server([&](peer& client) {
      for (;;) {
        const std::string head = client.read_head();
        if (head.find("\r\n\r\n") == std::string::npos) return;
        const std::lock_guard<std::mutex> lock(mutex);
        heads.push_back(head);
        client.send("HTTP/1.1 401 Who\r\nWWW-Authenticate: Basic realm=\"r\"\r\nSet-Cookie: a=b\r\n"
                    "Content-Length: 0\r\n\r\n");
      }
    });
    std::string with_user = server.url();
    with_user.insert(with_user.find("//") + 2, "user:secret@");
    auto transport = Subject::make({});
    for (const std::string& url : {server.url(), with_user}) {
      collector sink;
      CHECK(sent(transport, request_for(url), sink).status == 401);
    }
  }
  CHECK(heads.size() == 2);
  for (const auto& head : heads) {
    CAPTURE(head);
    CHECK(values_of(fields_of(head), "Authorization").empty());
    CHECK(values_of(fields_of(head), "Cookie").empty());
    CHECK(head.find("secret@") == std::string::npos);
  }
}

PROMISE("a body is not decompressed") {
  for (const std::string coding : {"gzip", "deflate", "br"}) {
    CAPTURE(coding);
    raw_server server(answering("HTTP/1.1 200 OK\r\nContent-Encoding: " + coding +
                                "\r\nContent-Length: 9\r\n\r\nas it is!"));
    auto transport = Subject::make({});
    collector sink;
    const auto answer = sent(transport, request_for(server.url()), sink);
    CHECK(sink.body == "as it is!");
    CHECK(values_of(answer.headers, "Content-Encoding") == std::vector<std::string>{coding});
  }
}

// ------------------------------------------------------------------------------------------- the request on the wire

PROMISE("the target is sent unchanged") {
  for (const std::string target :
       {"/a%2Fb%20c", "/a+b", "/x?x=%20", "/x?q=%2B+%7e&y=&&z", "/x?b=2&a=1&b=1", "/a/../b/./c", "//a//b",
        "/?", "/x?a=b?c", "/%e2%82%ac", "/~user/(a)*'!$,;:@", "/x?sig=a%2Fb%2B%3D&x-id=Get%4fbject"}) {
    CAPTURE(target);
    std::string head;
    std::string authority;
    {
      raw_server server([&](peer& client) {
        head = client.read_head();
        client.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
      });
      authority = server.url("").substr(7);
      body_of<Subject>(request_for(server.url(target)));
    }
    CHECK(head.substr(0, head.find('\r')) == "GET " + target + " HTTP/1.1");
    CHECK(values_of(fields_of(head), "Host") == std::vector<std::string>{authority});
  }
}

PROMISE("the request's headers are sent unchanged and in order") {
  wandb::http_headers fields;
  const wandb::http_headers given = {{"User-Agent", "a b/c (d)"},
                                     {"Accept", "application/json"},
                                     {"X-Twice", "1"},
                                     {"Accept-Encoding", "identity"},
                                     {"X-Mark", "a, b;c=%20\"d\""},
                                     {"X-Twice", "2"},
                                     {"Content-Type", "application/xx"},
                                     {"X-Empty", ""},
                                     {"Range", "bytes=5-9"},
                                     {"If-Range", "\"etag\""},
                                     {"Authorization", "Basic Og=="}};
  {
    raw_server server([&](peer& client) {
      fields = fields_of(client.read_head());
      client.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
    });
    auto request = request_for(server.url());
    request.headers = given;
    body_of<Subject>(request);
  }
  for (const auto& field : given) {
    CAPTURE(field.first);
    CHECK(values_of(fields, field.first) == values_of(given, field.first));
  }
}

PROMISE("no header is added except Host and Connection and Content-Length") {
  for (const std::size_t size : std::initializer_list<std::size_t>{0, 100, 2'000'000}) {
    CAPTURE(size);
    std::string head;
    {
      raw_server server([&](peer& client) {
        head = client.read_head();
        client.read(size);
        client.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
      });
      auto request = request_for(server.url());
      request.headers.clear();
      if (size > 0) request.method = "POST";
      request.body = std::string(size, 'x');
      body_of<Subject>(request);
    }
    for (const auto& field : fields_of(head)) {
      const bool is_expected =
          field.first == "Host" || field.first == "Connection" || field.first == "Content-Length";
      CHECK_MESSAGE(is_expected, field.first, ": ", field.second);
    }
  }
}

PROMISE("a header that would break out of its line is refused with errc::invalid_argument") {
  for (const wandb::http_headers& headers :
       {wandb::http_headers{{"X-A", "1\r\nX-B: 2"}}, wandb::http_headers{{"X-A", "1\nX-B: 2"}},
        wandb::http_headers{{"X-A: 1\r\nX-B", "2"}}, wandb::http_headers{{"X-A", std::string("1\0", 2)}}}) {
    std::atomic<int> requests{0};
    raw_server server([&](peer& client) {
      if (!client.read_head().empty()) ++requests;
    });
    auto request = request_for(server.url());
    request.headers = headers;
    auto transport = Subject::make({});
    collector sink;
    check_failed(send(transport, request, sink), wandb::errc::invalid_argument);
    CHECK(requests == 0);
  }
}

PROMISE("a POST sends its body byte for byte") {
  std::string binary;
  for (int i = 0; i < 256; ++i) binary += static_cast<char>(i);
  for (const std::string& body : {std::string(), std::string("{}"), binary, std::string(3'000'000, 'b')}) {
    CAPTURE(body.size());
    std::string head, received;
    {
      raw_server server([&](peer& client) {
        head = client.read_head();
        received = client.read(body.size());
        client.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
        client.wait_for_close(30s);
      });
      auto request = request_for(server.url());
      request.method = "POST";
      request.headers.emplace_back("Content-Type", "application/json");
      request.body = body;
      body_of<Subject>(request);
    }
    CHECK(head.substr(0, head.find(' ')) == "POST");
    CHECK(values_of(fields_of(head), "Content-Length") ==
          std::vector<std::string>{std::to_string(body.size())});
    CHECK(received == body);
  }
}

PROMISE("the host may be an IPv6 address") {
  std::string head;
  {
    raw_server server([&](peer& client) {
      head = client.read_head();
      client.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
    });
    CHECK(body_of<Subject>(request_for(server.url("/", "[::ffff:7f00:1]"))) == "ok");  // 127.0.0.1
  }
  const auto hosts = values_of(fields_of(head), "Host");
  REQUIRE(hosts.size() == 1);
  CHECK(hosts[0].find("[::ffff:7f00:1]:") == 0);
}

// ----------------------------------------------------------------------------------------------- the response's head

PROMISE("interim responses are skipped") {
  for (const std::string interim :
       {"100 Continue\r\n", "102 Processing\r\n", "103 Early Hints\r\nLink: </a>; rel=preload\r\n"}) {
    for (const int count : {1, 3}) {
      CAPTURE(interim);
      CAPTURE(count);
      std::string bytes;
      for (int i = 0; i < count; ++i) bytes += "HTTP/1.1 " + interim + "\r\n";
      raw_server server(answering(bytes + "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"));
      auto transport = Subject::make({});
      collector sink;
      const auto answer = sent(transport, request_for(server.url()), sink);
      CHECK(answer.status == 200);
      CHECK(values_of(answer.headers, "Link").empty());
      CHECK(sink.body == "ok");
    }
  }
}

PROMISE("response header values are passed on unchanged") {
  raw_server server(
      answering("HTTP/1.1 200 OK\r\nX-Percent: %41%2F%zz+%\r\nX-Comma: a, b ,\"c,d\"\r\nX-Twice: 1\r\n"
                "X-Spaces: \t a  b \t\r\nX-Empty:\r\nX-Twice: 2\r\nX-High: \xe9\xff\r\nX-None:x\r\n"
                "Location: http://h/%2B%2f+?s=%2B&t=a+b\r\nContent-Length: 0\r\n\r\n"));
  auto transport = Subject::make({});
  collector sink;
  const auto answer = sent(transport, request_for(server.url()), sink);
  const std::vector<std::pair<const char*, std::vector<std::string>>> expected = {
      {"X-Percent", {"%41%2F%zz+%"}},
      {"X-Comma", {"a, b ,\"c,d\""}},
      {"X-Twice", {"1", "2"}},
      {"X-Spaces", {"a  b"}},
      {"X-Empty", {""}},
      {"X-High", {"\xe9\xff"}},
      {"X-None", {"x"}},
      {"Location", {"http://h/%2B%2f+?s=%2B&t=a+b"}}};
  for (const auto& field : expected) {
    CAPTURE(std::string(field.first));
    CHECK(values_of(answer.headers, field.first) == field.second);
  }
}

PROMISE("response headers keep their order") {
  raw_server server(
      answering("HTTP/1.1 200 OK\r\nZ: 1\r\nA: 2\r\nz: 3\r\nM: 4\r\nContent-Length: 0\r\n\r\n"));
  auto transport = Subject::make({});
  collector sink;
  const auto answer = sent(transport, request_for(server.url()), sink);
  CHECK(answer.headers ==
        wandb::http_headers{{"Z", "1"}, {"A", "2"}, {"z", "3"}, {"M", "4"}, {"Content-Length", "0"}});
}

PROMISE("a Location of more than 8 KiB is passed on whole") {
  const std::string location = "http://h/x?signature=" + std::string(9000, 's') + "%2Fend";
  raw_server server(
      answering("HTTP/1.1 302 Found\r\nLocation: " + location + "\r\nContent-Length: 0\r\n\r\n"));
  auto transport = Subject::make({});
  collector sink;
  const auto answer = sent(transport, request_for(server.url()), sink);
  CHECK(answer.status == 302);
  CHECK(values_of(answer.headers, "Location") == std::vector<std::string>{location});
}

PROMISE("an answer that is not HTTP is a protocol_violation") {
  for (const std::string line : {"ICY 200 OK", "SSH-2.0-OpenSSH_9.2", "HTTP/1.1 abc", "<html>"}) {
    CAPTURE(line);
    raw_server server(answering_and_leaving(line + "\r\nContent-Length: 2\r\n\r\nok"));
    auto transport = Subject::make({});
    collector sink;
    check_failed(send(transport, request_for(server.url()), sink), wandb::errc::protocol_violation);
  }
}

// ------------------------------------------------------------------------------------------ the framing of the body

PROMISE("a body ends by Content-Length, chunks or the end of the connection") {
  const std::string ok = "HTTP/1.1 200 OK\r\n";
  const std::string chunks = ok + "Transfer-Encoding: chunked\r\n\r\n";
  CHECK(body_from<Subject>(answering(ok + "Content-Length: 5\r\n\r\nabcde")) == "abcde");
  CHECK(body_from<Subject>(answering(ok + "content-length:0\r\n\r\n")) == "");
  CHECK(body_from<Subject>(answering(chunks + "3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")) == "abcde");
  CHECK(body_from<Subject>(answering(chunks + "0005\r\nabcde\r\n000\r\n\r\n")) == "abcde");
  CHECK(body_from<Subject>(answering(chunks + "a\r\n0123456789\r\nA\r\n0123456789\r\n0\r\n\r\n")) ==
        "01234567890123456789");
  CHECK(body_from<Subject>(answering(chunks + "0\r\n\r\n")) == "");
  CHECK(body_from<Subject>(answering_and_leaving(ok + "\r\nabcde")) == "abcde");
  CHECK(body_from<Subject>(answering_and_leaving(ok + "\r\n")) == "");
  CHECK(body_from<Subject>(answering_and_leaving("HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nabc")) ==
        "abc");
  CHECK(body_from<Subject>(answering_and_leaving("HTTP/1.0 200 OK\r\n\r\nabc")) == "abc");
}

PROMISE("a response may come in pieces of any size") {
  const std::string answer = "HTTP/1.1 200 OK\r\nX: y\r\nTransfer-Encoding: "
                             "chunked\r\n\r\n3\r\nabc\r\n10\r\n0123456789abcdef\r\n0\r\n\r\n";
  for (const std::size_t size : std::initializer_list<std::size_t>{1, 2, 3, 7}) {
    CAPTURE(size);
    const auto serve = [&](peer& client) {
      client.read_head();
      client.send_at_once();
      for (std::size_t i = 0; i < answer.size(); i += size)
        client.send(std::string_view(answer).substr(i, size));
      client.wait_for_close(30s);
    };
    CHECK(body_from<Subject>(serve) == "abc0123456789abcdef");
  }
}

PROMISE("chunk extensions are skipped") {
  const std::string chunks = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
  CHECK(body_from<Subject>(answering(chunks + "3;a=b\r\nabc\r\n2;c=\"d;e\";f\r\nde\r\n0;last\r\n\r\n")) ==
        "abcde");
  CHECK(body_from<Subject>(answering(chunks + "3 ; a=b\r\nabc\r\n0\r\n\r\n")) == "abc");
}

PROMISE("trailers are skipped") {
  const std::string chunks = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
  raw_server server(answering_in_turn(
      {chunks + "3\r\nabc\r\n0\r\nX-Checksum: 1\r\nX-B: 2\r\n\r\n", chunks + "2\r\nde\r\n0\r\n\r\n"}));
  auto transport = Subject::make({});
  collector first, second;
  const auto answer = sent(transport, request_for(server.url()), first);
  CHECK(first.body == "abc");
  CHECK(values_of(answer.headers, "X-Checksum").empty());
  sent(transport, request_for(server.url()), second);
  CHECK(second.body == "de");
}

PROMISE("an endless head, chunk size line or trailer fails before 1 MiB is sent") {
  for (const auto& response : endless_responses()) {
    CAPTURE(std::string(response.what));
    const auto [outcome, sent_bytes] = endless_exchange<Subject>(response);
    CHECK(!outcome.has_value());
    CHECK(sent_bytes < 1u << 20);
  }
}

PROMISE("an endless head, chunk size line or trailer is a protocol_violation") {
  for (const auto& response : endless_responses()) {
    CAPTURE(std::string(response.what));
    check_failed(endless_exchange<Subject>(response).first, wandb::errc::protocol_violation);
  }
}

PROMISE("a size that does not fit 64 bits is a protocol_violation") {
  const std::string ok = "HTTP/1.1 200 OK\r\n";
  const std::string chunks = ok + "Transfer-Encoding: chunked\r\n\r\n";
  for (const std::string& answer : {chunks + "10000000000000000\r\nabc\r\n0\r\n\r\n",
                                    chunks + "100000000000000000000000003\r\nabc\r\n0\r\n\r\n",
                                    ok + "Content-Length: 18446744073709551619\r\n\r\nabc",
                                    ok + "Content-Length: 99999999999999999999999999\r\n\r\nabc"}) {
    CAPTURE(answer);
    raw_server server(answering(answer));
    auto transport = Subject::make({});
    collector sink;
    check_failed(send(transport, request_for(server.url()), sink), wandb::errc::protocol_violation);
  }
}

PROMISE("a malformed framing is a protocol_violation") {
  const std::string ok = "HTTP/1.1 200 OK\r\n";
  const std::string chunks = ok + "Transfer-Encoding: chunked\r\n\r\n";
  for (const std::string& answer :
       {ok + "Content-Length: -1\r\n\r\nabc", ok + "Content-Length: 3x\r\n\r\nabc",
        ok + "Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", chunks + "zz\r\nabc\r\n0\r\n\r\n",
        chunks + "-1\r\nabc\r\n0\r\n\r\n", chunks + "2\r\nabc\r\n0\r\n\r\n"}) {
    CAPTURE(answer);
    raw_server server(answering_and_leaving(answer));
    auto transport = Subject::make({});
    collector sink;
    check_failed(send(transport, request_for(server.url()), sink), wandb::errc::protocol_violation);
  }
}

PROMISE("a truncated response is a transient connection_failed") {
  const std::string ok = "HTTP/1.1 200 OK\r\n";
  const std::string chunks = ok + "Transfer-Encoding: chunked\r\n\r\n";
  for (const std::string& answer :
       {std::string(), ok, ok + "Content-Le", ok + "Content-Length: 5\r\n\r\n",
        ok + "Content-Length: 5\r\n\r\nabc", chunks, chunks + "5", chunks + "5\r\n", chunks + "5\r\nabc",
        chunks + "5\r\nabcde", chunks + "5\r\nabcde\r\n", chunks + "5\r\nabcde\r\n0",
        chunks + "5\r\nabcde\r\n0\r\n", chunks + "5\r\nabcde\r\n0\r\nX: y\r\n"}) {
    CAPTURE(answer);
    raw_server server(answering_and_leaving(answer));
    auto transport = Subject::make({});
    collector sink;
    const auto outcome = send(transport, request_for(server.url()), sink);
    check_failed(outcome, wandb::errc::connection_failed);
    CHECK(outcome.error().is_transient());
  }
}

PROMISE("a body that is truncated over TLS or reset is a transient connection_failed") {
  for (const bool tls : {true, false}) {
    for (const auto& cut : {act::cut(70'000), act::cut_abruptly(70'000), act::reset(70'000)}) {
      for (const bool in_chunks : {true, false}) {
        CAPTURE(tls);
        CAPTURE(in_chunks);
        bench b(tls ? stand_in::options{} : plain());
        b.add(200'000);
        b.server.add_fault(stand_in::place::storage, cut);
        if (in_chunks) b.server.add_fault(stand_in::place::storage, act::chunked());
        auto transport = Subject::make(b.trusting);
        collector sink;
        const auto outcome = send(transport, b.get(), sink);
        check_failed(outcome, wandb::errc::connection_failed);
        CHECK(outcome.error().is_transient());
        CHECK(sink.body.size() <= 70'000);
      }
    }
  }
}

PROMISE("a body that ends with its TLS connection is incomplete without close_notify") {
  bench b;
  b.add(200'000);
  auto transport = Subject::make(b.trusting);
  const auto whole = b.server.add_fault(stand_in::place::storage, act::until_close());
  collector first;
  sent(transport, b.get(), first);
  CHECK(b.server.struck(whole) == 1);
  CHECK(first.body.size() == 200'000);
  b.server.add_fault(stand_in::place::storage, act::cut_abruptly(70'000));
  collector second;
  check_failed(send(transport, b.get(), second), wandb::errc::connection_failed);
}

PROMISE("a response to HEAD or with status 204 or 304 has no body") {
  const std::string two = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
  for (const std::string status : {"200 OK", "204 No Content", "304 Not Modified"}) {
    CAPTURE(status);
    const bool is_head = status == "200 OK";
    raw_server server(answering_in_turn(
        {"HTTP/1.1 " + status + (status[0] == '2' && !is_head ? "" : "\r\nContent-Length: 1000") + "\r\n\r\n",
         two}));
    auto transport = Subject::make({});
    auto request = request_for(server.url());
    if (is_head) request.method = "HEAD";
    collector first, second;
    const auto answer = sent(transport, request, first);
    CHECK(std::to_string(answer.status) == status.substr(0, 3));
    CHECK(first.body == "");
    sent(transport, request_for(server.url()), second);
    CHECK(second.body == "ok");
  }
}

PROMISE("bytes after a response are not taken for the next one") {
  for (const std::string surplus : {"x", "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"}) {
    CAPTURE(surplus);
    raw_server server(answering_in_turn({"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc" + surplus,
                                         "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"}));
    auto transport = Subject::make({});
    collector first, second;
    sent(transport, request_for(server.url()), first);
    CHECK(first.body == "abc");
    sent(transport, request_for(server.url()), second);
    CHECK(second.body == "ok");
  }
}

// ------------------------------------------------------------------------------------------------------- connections

PROMISE("connections are reused after a Content-Length and after chunks") {
  const std::string ok = "HTTP/1.1 200 OK\r\n";
  const std::vector<std::string> answers = {
      ok + "Content-Length: 3\r\n\r\nabc", ok + "Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
      ok + "Content-Length: 0\r\n\r\n", "HTTP/1.1 204 No Content\r\n\r\n",
      "HTTP/1.1 404 Not Found\r\nContent-Length: 3\r\n\r\nabc"};
  raw_server server(answering_in_turn(answers));
  auto transport = Subject::make({});
  for (std::size_t i = 0; i <= answers.size(); ++i) {
    collector sink;
    sent(transport, request_for(server.url()), sink);
  }
  CHECK(server.connections() == 1);
}

PROMISE("TLS connections are reused without another handshake") {
  for (const auto version : {stand_in::tls_versions::only_1_2, stand_in::tls_versions::only_1_3}) {
    stand_in::options options;
    options.versions = version;
    bench b(options);
    b.add(100'000);
    auto transport = Subject::make(b.trusting);
    for (int i = 0; i < 4; ++i) {
      collector sink;
      sent(transport, b.get(), sink);
      CHECK(sink.body.size() == 100'000);
    }
    CHECK(b.connections() == 1);
    CHECK(b.server.counted().of(stand_in::origin::storage).handshakes == 1);
  }
}

PROMISE("an idle connection that the server closed is replaced") {
  for (const bool tls : {true, false}) {
    for (const bool is_announced : {true, false}) {
      CAPTURE(tls);
      CAPTURE(is_announced);
      bench b(tls ? stand_in::options{} : plain());
      b.add(1000);
      b.server.add_fault(stand_in::place::storage, is_announced ? act::close_after() : act::close_silently());
      auto transport = Subject::make(b.trusting);
      for (int i = 0; i < 3; ++i) {
        collector sink;
        sent(transport, b.get(), sink);
        CHECK(sink.body.size() == 1000);
        CHECK(b.server.wait_for(
            [](const auto& seen) { return seen.counts.of(stand_in::origin::storage).open_connections == 0; },
            20s));
      }
      CHECK(b.connections() == 3);
    }
  }
}

PROMISE("a failed connection attempt is a transient connection_failed") {
  const listener gone(-1);
  auto transport = Subject::make({});
  for (const std::string& url :
       {gone.url("http"), gone.url("https"), std::string("http://no-such-host.invalid/x")}) {
    CAPTURE(url);
    collector sink;
    const auto outcome = send(transport, request_for(url), sink);
    check_failed(outcome, wandb::errc::connection_failed);
    CHECK(outcome.error().is_transient());
    CHECK(sink.starts == 0);
  }
}

PROMISE("connect_timeout ends an unanswered connection attempt or TLS handshake") {
  const silent_address full;
  const listener silent;  // the kernel accepts the connection, but nobody answers the handshake
  auto transport = Subject::make({});
  for (const std::string& url :
       {full.socket().url("http"), full.socket().url("https"), silent.url("https")}) {
    CAPTURE(url);
    auto request = request_for(url);
    request.connect_timeout = 300ms;
    collector sink;
    const auto begin = clock_type::now();
    const auto outcome = send(transport, request, sink);
    check_failed(outcome, wandb::errc::connection_failed);
    CHECK(outcome.error().is_transient());
    CHECK(clock_type::now() - begin < 300ms + soon);
  }
}

PROMISE("idle_timeout ends an exchange without a byte sent or received") {
  const auto check = [](auto& transport, wandb::http_request request) {
    request.idle_timeout = 400ms;
    collector sink;
    const auto begin = clock_type::now();
    const auto outcome = send(transport, request, sink);
    check_failed(outcome, wandb::errc::connection_failed);
    CHECK(outcome.error().is_transient());
    CHECK(clock_type::now() - begin < 400ms + soon);
  };
  for (const bool tls : {true, false}) {
    for (const bool in_body : {true, false}) {
      CAPTURE(tls);
      CAPTURE(in_body);
      bench b(tls ? stand_in::options{} : plain());
      b.add(200'000);
      b.server.add_fault(stand_in::place::storage, in_body ? act::stall(70'000) : act::hang());
      auto transport = Subject::make(b.trusting);
      check(transport, b.get());
    }
  }
  // A server that does not read the request.
  const listener deaf;
  auto request = request_for(deaf.url("http"));
  request.method = "POST";
  request.body = std::string(16u << 20, 'x');
  auto transport = Subject::make({});
  check(transport, request);
}

PROMISE("idle_timeout does not end an exchange that makes progress") {
  bench b(plain());
  b.add(20);
  b.server.add_fault(stand_in::place::storage, act::drip(120ms));  // 2.3 s in all
  auto transport = Subject::make(b.trusting);
  auto request = b.get();
  request.idle_timeout = 2s;
  collector sink;
  sent(transport, request, sink);
  CHECK(sink.body.size() == 20);
}

// ------------------------------------------------------------------------------------------------------ cancellation

PROMISE("a cancellation while connecting takes effect within a second") {
  const silent_address full;
  for (const char* scheme : {"http", "https"}) {
    CAPTURE(std::string(scheme));
    auto request = request_for(full.socket().url(scheme));
    auto transport = Subject::make({});
    std::atomic<int> looks{0};  // counts the polls, which show that the exchange is under way
    clock_type::time_point begin{};
    request.is_cancelled = [&] {
      if (++looks < 3) return false;
      if (looks == 3) begin = clock_type::now();
      return true;
    };
    collector sink;
    const auto outcome = send(transport, request, sink);
    check_failed(outcome, wandb::errc::cancelled);
    CHECK(clock_type::now() - begin < soon);
  }
}

PROMISE("a cancellation in the TLS handshake takes effect within a second") {
  const listener silent;
  auto transport = Subject::make({});
  collector sink;
  int accepted = -1;
  const auto [outcome, delay] =
      cancel_when(transport, request_for(silent.url("https")), sink, [&] { accepted = silent.accept(); });
  ::close(accepted);
  check_failed(outcome, wandb::errc::cancelled);
  CHECK(delay < soon);
}

PROMISE("a cancellation while the request is sent takes effect within a second") {
  const listener deaf;
  auto transport = Subject::make({});
  auto request = request_for(deaf.url("http"));
  request.method = "POST";
  request.body = std::string(16u << 20, 'x');
  collector sink;
  int accepted = -1;
  const auto [outcome, delay] = cancel_when(transport, request, sink, [&] { accepted = deaf.accept(); });
  ::close(accepted);
  check_failed(outcome, wandb::errc::cancelled);
  CHECK(delay < soon);
}

PROMISE("a cancellation before the head or in the body takes effect within a second") {
  for (const bool tls : {true, false}) {
    for (const bool in_body : {true, false}) {
      CAPTURE(tls);
      CAPTURE(in_body);
      bench b(tls ? stand_in::options{} : plain());
      b.add(200'000);
      b.server.add_fault(stand_in::place::storage, in_body ? act::stall(70'000) : act::hang());
      auto transport = Subject::make(b.trusting);
      collector sink;
      bool is_under_way = true;
      const auto [outcome, delay] = cancel_when(transport, b.get(), sink, [&] {
        is_under_way = b.server.wait_for([](const auto& seen) { return seen.counts.stalled > 0; }, 20s);
        if (in_body) sink.wait_for_bytes(70'000);
      });
      CHECK(is_under_way);
      check_failed(outcome, wandb::errc::cancelled);
      CHECK(delay < soon);
      CHECK(b.server.wait_for(  // the connection is closed
          [](const auto& seen) { return seen.counts.of(stand_in::origin::storage).open_connections == 0; },
          20s));
    }
  }
}

// ---------------------------------------------------------------------------------------------------- TLS and SIGPIPE

PROMISE("a refused certificate is a permanent connection_failed") {
  using stand_in::certificate;
  for (const auto kind : {certificate::wrong_host, certificate::expired, certificate::other_authority}) {
    for (const char* host : {"127.0.0.1", "localhost"}) {
      CAPTURE(static_cast<int>(kind));
      CAPTURE(std::string(host));
      stand_in::options options;
      options.host = host;
      options.storage_certificate = kind;
      bench b(options);
      b.add(10);
      {
        auto transport = Subject::make(b.trusting);
        collector sink;
        const auto outcome = send(transport, b.get(), sink);
        check_failed(outcome, wandb::errc::connection_failed);
        CHECK(!outcome.error().is_transient());
        CHECK(sink.starts == 0);
        CHECK(b.server.requests(stand_in::request_kind::storage).empty());
      }
      b.trusting.verify_tls = false;
      auto careless = Subject::make(b.trusting);
      collector sink;
      sent(careless, b.get(), sink);
    }
  }
}

PROMISE("without settings::ca_file the test's authority is refused") {
  bench b;
  b.add(10);
  auto transport = Subject::make({});
  collector sink;
  const auto outcome = send(transport, b.get(), sink);
  check_failed(outcome, wandb::errc::connection_failed);
  CHECK(!outcome.error().is_transient());
}

PROMISE("SIGPIPE never reaches the program") {
  const sigpipe_counter pipes;
  for (int i = 0; i < 3; ++i) {
    raw_server leaver([](peer& client) {
      client.leave();
      client.read(100'000);
      client.end_with_reset();  // after a FIN: the client's next write fails with EPIPE
    });
    auto transport = Subject::make({});
    auto request = request_for(leaver.url());
    request.method = "POST";
    request.body = std::string(16u << 20, 'x');
    collector sink;
    check_failed(send(transport, request, sink), wandb::errc::connection_failed);
  }
  bench b;
  b.add(1000);
  b.server.add_fault(stand_in::place::storage, act::refuse());
  auto transport = Subject::make(b.trusting);
  auto request = b.get();
  request.method = "POST";
  request.body = std::string(16u << 20, 'x');
  for (int i = 0; i < 3; ++i) {
    collector sink;
    check_failed(send(transport, request, sink), wandb::errc::connection_failed);
  }
  CHECK(pipes.count() == 0);
}

// ------------------------------------------------------------------------------------------------------------ proxies

PROMISE("an http request goes to the proxy with its absolute URL") {
  std::string head;
  {
    raw_server proxy([&](peer& client) {
      head = client.read_head();
      client.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
      client.wait_for_close(30s);
    });
    auto request = request_for("http://origin.test:81/a%2Fb?x=%20&y=+");
    request.proxy = proxy.url("");
    CHECK(body_of<Subject>(request) == "ok");
  }
  CHECK(head.substr(0, head.find('\r')) == "GET http://origin.test:81/a%2Fb?x=%20&y=+ HTTP/1.1");
  CHECK(values_of(fields_of(head), "Host") == std::vector<std::string>{"origin.test:81"});
}

PROMISE("an https request goes through a tunnel and its headers reach only the origin") {
  stand_in::options options;
  options.proxy = true;
  bench b(options);
  b.add(100'000);
  auto transport = Subject::make(b.trusting);
  auto request = b.get();
  request.headers.emplace_back("X-Secret", "for the origin");
  request.proxy = b.server.proxy_url();
  for (int i = 0; i < 2; ++i) {
    collector sink;
    sent(transport, request, sink);
    CHECK(sink.body.size() == 100'000);
  }
  const auto tunnels = b.server.requests(stand_in::request_kind::proxy);
  CHECK(tunnels.size() == 1);
  for (const auto& seen : tunnels) {
    CHECK(seen.method == "CONNECT");
    CHECK(seen.target == b.server.storage_url().substr(8));
    CHECK(!seen.header("X-Secret"));
  }
  for (const auto& seen : b.server.requests(stand_in::request_kind::storage))
    CHECK(seen.header("X-Secret") == "for the origin");
}

PROMISE("a proxy's credentials go to the proxy alone") {
  for (const bool tls : {true, false}) {
    CAPTURE(tls);
    stand_in::options options = tls ? stand_in::options{} : plain();
    options.proxy = true;
    options.proxy_credentials = "us er:p@ss";
    bench b(options);
    b.add(1000);
    const std::string proxy = b.server.proxy_url();
    auto in_address = b.get();
    in_address.proxy = "http://us%20er:p%40ss@" + proxy.substr(proxy.find("//") + 2);
    auto in_header = b.get();
    in_header.proxy = proxy;
    in_header.proxy_authorization = "Basic dXMgZXI6cEBzcw==";
    for (const auto& request : {in_address, in_header}) {
      auto transport = Subject::make(b.trusting);
      collector sink;
      sent(transport, request, sink);
      CHECK(sink.body.size() == 1000);
    }
    for (const auto& seen : b.server.requests(stand_in::request_kind::storage))
      CHECK(seen.header("Proxy-Authorization").value_or("") == "");
    const auto asked = b.server.requests(stand_in::request_kind::proxy);
    CHECK(asked.size() == 2);
    for (const auto& seen : asked) CHECK(seen.header("Proxy-Authorization") == "Basic dXMgZXI6cEBzcw==");
  }
}

PROMISE("a refused tunnel is a permanent connection_failed") {
  stand_in::options options;
  options.proxy = true;
  options.proxy_credentials = "user:password";
  bench b(options);
  b.add(10);
  auto request = b.get();
  request.proxy = b.server.proxy_url();
  auto transport = Subject::make(b.trusting);
  collector sink;
  const auto outcome = send(transport, request, sink);
  check_failed(outcome, wandb::errc::connection_failed);
  CHECK(!outcome.error().is_transient());
  CHECK(sink.starts == 0);
}

PROMISE("bytes behind a proxy's answer to CONNECT are never taken for the server's response") {
  bench b;
  b.add(1000);
  auto request = b.get();
  const std::string server = b.server.storage_url();
  const int port = std::stoi(server.substr(server.rfind(':') + 1));
  raw_server proxy([&](peer& client) {
    client.read_head();
    client.send("HTTP/1.1 200 Connection established\r\n\r\n"
                "HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\ninjected");
    client.relay_to(port);
  });
  request.proxy = proxy.url("");
  request.idle_timeout = 5s;
  auto transport = Subject::make(b.trusting);
  collector sink;
  if (send(transport, request, sink)) {
    CHECK(sink.body == stand_in::read_text(*b.content));  // it discarded the bytes
  } else {
    CHECK(sink.starts == 0);
  }
}

PROMISE("proxies of the environment are ignored") {
  const listener gone(-1);
  const std::string dead = gone.url("http");
  const support::scoped_environment proxies{
      {"http_proxy", dead}, {"https_proxy", dead}, {"HTTP_PROXY", dead}, {"HTTPS_PROXY", dead}};
  for (const bool tls : {true, false}) {
    bench b(tls ? stand_in::options{} : plain());
    b.add(10);
    auto transport = Subject::make(b.trusting);
    collector sink;
    sent(transport, b.get(), sink);
  }
}

// ------------------------------------------------------------------------------------------------------------- tables

TEST_CASE_TEMPLATE("every entry of cannot_keep names a case of the suite", Subject,
                   ALL_TRANSPORTS_UNDER_TEST) {
  std::set<std::string> named;
  for (const auto& limit : Subject::cannot_keep()) {
    CAPTURE(limit.first);
    CHECK(promises().count(limit.first) == 1);
    CHECK(named.insert(limit.first).second);
    CHECK(!limit.second.empty());
  }
}

TEST_SUITE_END();

}  // namespace WANDB_RESTORE_PRIVATE_ABI
}  // namespace conformance

#endif  // _WIN32
#endif  // WANDB_RESTORE_TESTS_TRANSPORT_CONFORMANCE_HPP
