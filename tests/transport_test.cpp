// The default transport against the stand-in server, and against sockets with faults below HTTP.
#include <doctest/doctest.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <memory>
#include <mutex>
#include <optional>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "sockets.hpp"
#include "stand_in.hpp"
#include "support.hpp"
#include "wandb_restore.hpp"

#ifndef _WIN32
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>
#endif

#ifndef _WIN32

namespace {

using namespace sockets;
using stand_in::act::chunked;

/// Serves a connection: sends the answer after the first byte of the request, and waits until the client closes.
std::function<void(peer&)> blurting(const std::string& answer) {
  return [answer](const peer& client) {
    (void)client.read(1);
    (void)client.send(answer);
    client.leave();
    (void)client.wait_for_close(10s);
  };
}
std::string with_scheme(const std::string& scheme, const std::string& url) {
  return scheme + url.substr(url.find(':'));
}

wandb::detail::socket_address address_of(const listener& socket) {
  wandb::detail::socket_address address;
  address.size = sizeof(sockaddr_in);
  std::memcpy(&address.storage, &socket.address(), sizeof(sockaddr_in));
  return address;
}
wandb::detail::socket_address refused_address() {
  static const listener reserved(-1);
  return address_of(reserved);
}
wandb::detail::socket_address made_up_address(int family, int port) {
  wandb::detail::socket_address address;
  address.size = family == AF_INET ? sizeof(sockaddr_in) : sizeof(sockaddr_in6);
  address.storage.ss_family = static_cast<sa_family_t>(family);
  reinterpret_cast<sockaddr_in*>(&address.storage)->sin_port = htons(static_cast<std::uint16_t>(port));
  return address;
}
/// The port at the other end of a connected socket.
int peer_port(int socket) {
  sockaddr_in peer{};
  socklen_t size = sizeof peer;
  REQUIRE(::getpeername(socket, reinterpret_cast<sockaddr*>(&peer), &size) == 0);
  return ntohs(peer.sin_port);
}
int port_of(const listener& socket) { return ntohs(socket.address().sin_port); }
std::size_t open_descriptors() {
  const std::filesystem::directory_iterator entries("/proc/self/fd");
  return static_cast<std::size_t>(std::distance(begin(entries), end(entries)));
}

wandb::result<wandb::http_response> ask(const std::string& url, collector& sink,
                                        const std::string& method = "GET") {
  wandb::http_request request;
  request.method = method;
  request.url = url;
  request.idle_timeout = 5s;
  wandb::http_transport transport;
  return transport.send(request, sink);
}

/// Checks that an exchange was cancelled in time.
void check_cancel(wandb::http_transport& transport, wandb::http_request request, collector& sink,
                  const std::function<void()>& is_under_way) {
  request.connect_timeout = request.idle_timeout = patience;
  const auto [outcome, delay] = cancel_when(transport, request, sink, is_under_way);
  check_failed(outcome, wandb::errc::cancelled, "cancelled");
  CHECK(delay < soon);
}

}  // namespace

TEST_SUITE("http_transport") {
  TEST_CASE("head and body arrive unchanged, over TLS and over plain TCP") {
    for (const bool tls : {true, false}) {
      CAPTURE(tls);
      bench b(tls ? stand_in::options{} : plain());
      b.add(3'000'001);
      wandb::http_transport transport(b.trusting);
      collector sink;
      const auto answer = transport.send(b.get(), sink);
      REQUIRE_MESSAGE(answer.has_value(), answer.error().what());
      CHECK(answer->status == 200);
      CHECK(sink.starts == 1);
      REQUIRE(answer->header("content-length") != nullptr);
      CHECK(*answer->header("content-length") == "3000001");
      CHECK(sink.body == stand_in::read_text(*b.content));
    }
  }

  TEST_CASE("consecutive requests share one connection and one handshake") {
    bench b;
    b.add(100'000);
    wandb::http_transport transport(b.trusting);
    for (int i = 0; i < 5; ++i) {
      collector sink;
      REQUIRE(transport.send(b.get(), sink).has_value());
      CHECK(sink.body.size() == 100'000);
    }
    CHECK(b.connections() == 1);
    CHECK(b.server.counted().of(stand_in::origin::storage).handshakes == 1);
  }

  TEST_CASE("target, headers and body are sent byte for byte") {
    scripted peer({"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"});
    wandb::http_request request;
    request.method = "POST";
    const std::string origin = peer.url().substr(0, peer.url().rfind('/'));
    request.url = origin + "/a%2Fb%20c?x=%2B+%7e&y=&&z";
    request.headers = {{"X-Z", "1"}, {"X-A", "2"}};
    request.body = std::string(5000, 'b');
    collector sink;
    wandb::http_transport transport;
    REQUIRE(transport.send(request, sink).has_value());
    peer.join();
    CHECK(peer.asked.at(0) == "POST /a%2Fb%20c?x=%2B+%7e&y=&&z HTTP/1.1\r\nHost: " + origin.substr(7) +
                                  "\r\nX-Z: 1\r\nX-A: 2\r\nContent-Length: 5000\r\n\r\n");
  }

  TEST_CASE("a header that would break out of its line is refused") {
    collector sink;
    wandb::http_request request;
    request.url = "http://127.0.0.1:9/";
    request.headers = {{"X-A", "1\r\nX-B: 2"}};
    wandb::http_transport transport;
    check_failed(transport.send(request, sink), wandb::errc::invalid_argument, "malformed");
    request.headers.clear();
    request.url = "https://127.0.0.1:9/";  // the request for a tunnel has the field, too
    request.proxy = "http://127.0.0.1:9";
    request.proxy_authorization = "Basic x\r\nX-B: 2";
    check_failed(transport.send(request, sink), wandb::errc::invalid_argument, "malformed");
  }

  TEST_CASE("header values are not decoded, and keep their order; interim responses are skipped") {
    scripted peer({"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
                   "HTTP/1.1 302 Found\r\nLocation: http://h/%2B%2f?s=%2B\r\nX-B: 1\r\nX-A:2  "
                   "\r\nContent-Length: 0\r\n\r\n"});
    collector sink;
    const auto answer = ask(peer.url(), sink);
    REQUIRE(answer.has_value());
    CHECK(answer->status == 302);
    CHECK(answer->headers ==
          wandb::http_headers{
              {"Location", "http://h/%2B%2f?s=%2B"}, {"X-B", "1"}, {"X-A", "2"}, {"Content-Length", "0"}});
    CHECK(sink.starts == 1);
  }

  TEST_CASE("responses without a body leave the connection usable") {
    bench b(plain());
    b.add(10);
    wandb::http_transport transport;
    auto head = b.get();
    head.method = "HEAD";
    collector first, second;
    REQUIRE(transport.send(head, first).has_value());
    CHECK(first.starts == 1);
    CHECK(first.body.empty());
    REQUIRE(transport.send(b.get(), second).has_value());
    CHECK(second.body.size() == 10);
  }

  TEST_CASE("every framing of a body is understood") {
    const std::string head = "HTTP/1.1 200 OK\r\n", chunks = head + "Transfer-Encoding: chunked\r\n\r\n";
    const std::string line_bound(8000, 'x');
    struct example {
      std::string answer, body;
      bool closes = false;
    };
    for (const auto& [answer, body, closes] : std::vector<example>{
             {head + "Content-Length: 3\r\n\r\nabc", "abc"},
             {head + "Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc", "abc"},
             {"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nabc", "abc"},
             {head + "\r\nabc", "abc", true},
             {"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n", ""},
             {"HTTP/1.1 304 Not Modified\r\nContent-Length: 3\r\n\r\n", ""},
             {chunks + "0\r\n\r\n", ""},
             {chunks + "3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n", "abcde"},
             {chunks + "3;x=y\r\nabc\r\n002 ;a=\"b;c\" \r\nde\r\n0;last\r\n\r\n", "abcde"},
             {chunks + "3;" + line_bound + "\r\nabc\r\n0;" + line_bound + "\r\n\r\n", "abc"},
             {chunks + "A\r\n0123456789\r\n0\r\nX-Sum: 1\r\nX: y\r\n\r\n", "0123456789"},
             {chunks + "1\r\na\r\n0\r\nA: " + line_bound + "\r\nB: " + line_bound + "\r\n\r\n", "a"},
             {head + "Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
              "abc"}}) {
      const auto& shown = answer;
      CAPTURE(shown);
      scripted peer({answer}, closes);
      collector sink;
      const auto outcome = ask(peer.url(), sink);
      REQUIRE_MESSAGE(outcome.has_value(), outcome.error().what());
      CHECK(sink.body == body);
      CHECK(sink.starts == 1);
    }
  }

  TEST_CASE("a connection is reused only if the end of the body is certain") {
    const std::string head = "HTTP/1.1 200 OK\r\n", next = head + "Content-Length: 4\r\n\r\nnext";
    const std::string chunked_abc = "Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n";
    for (const auto& answer : std::vector<std::string>{
             "HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nabc",
             head + "Connection: x, Close\r\nContent-Length: 3\r\n\r\nabc",
             head + "Content-Length: 3\r\n" + chunked_abc, head + chunked_abc + "surplus"}) {
      CAPTURE(answer);
      scripted peer({answer, next}, false);
      wandb::http_transport transport;
      wandb::http_request request;
      request.url = peer.url();
      collector first, second;
      REQUIRE(transport.send(request, first).has_value());
      CHECK(first.body == "abc");
      REQUIRE(transport.send(request, second).has_value());
      CHECK(second.body == "next");
    }
  }

  TEST_CASE("a response that breaks the protocol is a protocol_violation") {
    using answer_list = std::vector<std::string>;
    const std::string head = "HTTP/1.1 200 OK\r\n";
    const std::string chunks = head + "Transfer-Encoding: chunked\r\n\r\n";
    for (const auto& answer :
         answer_list{"ICY 200 OK\r\n\r\n",
                     "HTTP/1.1 abc\r\n\r\n",
                     "HTTP/1.1 2000\r\n\r\n",
                     "\r\n\r\n",
                     "HTTP/1.1 101 Switching\r\n\r\n",
                     head + "Content-Length: -1\r\n\r\nabc",
                     head + "Content-Length: 3x\r\n\r\nabc",
                     head + "Content-Length: 99999999999999999999\r\n\r\nabc",
                     head + "Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
                     head + "no colon\r\n\r\n",
                     head + " folded: x\r\n\r\n",
                     head + "A : x\r\n\r\n",
                     head + std::string("A: \0x\r\n\r\n", 9),
                     head + "Transfer-Encoding: gzip, chunked\r\n\r\n",
                     chunks + "zz\r\nabc\r\n0\r\n\r\n",
                     chunks + "2\r\nabc\r\n0\r\n\r\n",
                     chunks + "\r\nabc\r\n0\r\n\r\n",
                     chunks + ";x\r\nabc\r\n",
                     chunks + "-3\r\nabc\r\n",
                     chunks + "0x3\r\nabc\r\n",
                     chunks + "3 3\r\nabc\r\n",
                     chunks + "10000000000000003\r\nabc\r\n0\r\n\r\n",
                     chunks + "4000000000000001\r\nabc\r\n",
                     chunks + "1\r\na\r\n4000000000000000\r\nabc\r\n",
                     chunks + "3\r\nabc0\r\n\r\n",
                     head + "Content-Length: 4911686018427387905\r\n\r\nabc",
                     head + "Content-Length: \r\n\r\nabc",
                     head + "Content-Length: 3, 3\r\n\r\nabc",
                     head + "Transfer-Encoding: chunked\r\n" + chunks.substr(head.size())}) {
      CAPTURE(answer);
      scripted peer({answer}, false);
      collector sink;
      check_failed(ask(peer.url(), sink), wandb::errc::protocol_violation, "GET http://127.0.0.1");
    }
  }

  TEST_CASE("the error about a body that is not chunked shows nothing of it") {
    scripted peer({"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
                   "{\"url\": \"https://host/?Signature=secret\"}\r\n"},
                  false);
    collector sink;
    const auto outcome = ask(peer.url(), sink);
    check_failed(outcome, wandb::errc::protocol_violation, "the size line of a chunk is malformed");
    CHECK(std::string(outcome.error().what()).find("secret") == std::string::npos);
  }

  TEST_CASE("a head has a maximum size") {
    for (const bool many_lines : {true, false}) {
      CAPTURE(many_lines);
      bench b;
      b.add(10);
      b.server.add_fault(stand_in::place::storage,
                         many_lines ? stand_in::act::endless_header()
                                    : stand_in::act::header("X", std::string(70'000, 'x')));
      wandb::http_transport transport(b.trusting);
      collector sink;
      check_failed(transport.send(b.get(), sink), wandb::errc::protocol_violation, "64");
      CHECK(sink.starts == 0);
    }
  }

  TEST_CASE("the lines of a chunked body have a maximum size, each and together") {
    const std::string chunks = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
    const std::string endless(1u << 20, 'x');
    std::string trailers;
    while (trailers.size() < endless.size()) trailers += "X: y\r\n";
    struct example {
      std::string answer;
      const char* text;
    };
    for (const auto& [answer, text] : std::vector<example>{
             {chunks + std::string(1u << 20, '0'), "size line of a chunk has more than 8.0 KiB"},
             {chunks + "3;" + endless, "size line of a chunk has more than 8.0 KiB"},
             {chunks + "3\r\nabc" + endless, "end of a chunk"},
             {chunks + "0\r\nX: " + endless, "trailer line of the body has more than 8.0 KiB"},
             {chunks + "0\r\n" + trailers, "trailers of the body have more than 64.0 KiB"}}) {
      const std::string shown = text;
      CAPTURE(shown);
      scripted peer({answer}, false);
      collector sink;
      check_failed(ask(peer.url(), sink), wandb::errc::protocol_violation, text);
    }
  }

  TEST_CASE("a body that ends early is connection_failed, with every framing, also over TLS") {
    namespace act = stand_in::act;
    for (const bool tls : {true, false}) {
      for (const auto& cut : {act::cut(70'000), act::cut_abruptly(70'000), act::reset(70'000)}) {
        for (const bool in_chunks : {true, false}) {
          CAPTURE(tls);
          CAPTURE(in_chunks);
          bench b(tls ? stand_in::options{} : plain());
          b.add(200'000);
          b.server.add_fault(stand_in::place::storage, cut);
          if (in_chunks) b.server.add_fault(stand_in::place::storage, chunked());
          wandb::http_transport transport(b.trusting);
          collector sink;
          const auto answer = transport.send(b.get(), sink);
          check_failed(answer, wandb::errc::connection_failed, "the body");
          CHECK(answer.error().is_transient());
          CHECK(sink.starts == 1);
        }
      }
    }
  }

  TEST_CASE("a chunked body that ends anywhere before its last line is connection_failed") {
    const std::string head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
    const std::string body = "3;x\r\nabc\r\n0\r\nX: y\r\n\r\n";
    for (std::size_t size = 0; size < body.size(); ++size) {
      CAPTURE(size);
      scripted peer({head + body.substr(0, size)});
      collector sink;
      check_failed(ask(peer.url(), sink), wandb::errc::connection_failed, "before the end of the body");
    }
  }

  TEST_CASE("a body without framing is not complete without close_notify") {
    bench b;
    b.add(200'000);
    b.server.add_fault(stand_in::place::storage, stand_in::act::until_close());
    b.server.add_fault(stand_in::place::storage, stand_in::act::cut_abruptly(70'000));
    wandb::http_transport transport(b.trusting);
    collector sink;
    check_failed(transport.send(b.get(), sink), wandb::errc::connection_failed, "the body");
  }

  TEST_CASE("bytes after a response are not taken for the next one") {
    for (const bool tls : {true, false}) {
      CAPTURE(tls);
      bench b(tls ? stand_in::options{} : plain());
      b.add(1000);
      b.server.add_fault(stand_in::target(stand_in::place::storage).nth(1),
                         stand_in::act::length_off_by(-10));
      wandb::http_transport transport(b.trusting);
      collector first, second;
      REQUIRE(transport.send(b.get(), first).has_value());
      CHECK(first.body.size() == 990);
      REQUIRE(transport.send(b.get(), second).has_value());
      CHECK(second.body == stand_in::read_text(*b.content));
      CHECK(b.connections() == 2);
    }
  }

  TEST_CASE("a connection that the server closed while it was idle is replaced") {
    for (const bool tls : {true, false}) {
      CAPTURE(tls);
      bench b(tls ? stand_in::options{} : plain());
      b.add(1000);
      b.server.add_fault(stand_in::target(stand_in::place::storage).nth(1), stand_in::act::close_silently());
      wandb::http_transport transport(b.trusting);
      for (int i = 0; i < 2; ++i) {
        collector sink;
        const auto answer = transport.send(b.get(), sink);
        REQUIRE_MESSAGE(answer.has_value(), answer.error().what());
        CHECK(sink.body.size() == 1000);
      }
      CHECK(b.connections() == 2);
    }
  }

  TEST_CASE("an idempotent request on a connection that is being closed is sent once more") {
    for (const bool tls : {true, false}) {
      CAPTURE(tls);
      bench b(tls ? stand_in::options{} : plain());
      b.add(1000);
      b.server.add_fault(stand_in::target(stand_in::place::storage).nth(2), stand_in::act::drop());
      wandb::http_transport transport(b.trusting);
      collector first, second, third;
      REQUIRE(transport.send(b.get(), first).has_value());
      REQUIRE(transport.send(b.get(), second).has_value());
      CHECK(second.body.size() == 1000);
      b.server.clear_faults();
      b.server.add_fault(stand_in::place::storage, stand_in::act::drop());
      check_failed(transport.send(b.get(), third), wandb::errc::connection_failed, "without a response");
    }
  }

  TEST_CASE("a request that times out on a reused connection is not sent again") {
    raw_server server([](peer& client) {
      client.read_head();
      client.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
      client.read_head();
      client.wait_for_close(30s);
    });
    wandb::http_request request;
    request.url = server.url();
    request.idle_timeout = 10s;
    wandb::http_transport transport;
    collector first, second;
    REQUIRE(transport.send(request, first).has_value());
    request.idle_timeout = 100ms;
    check_failed(transport.send(request, second), wandb::errc::connection_failed, "timed out");
    CHECK(server.connections() == 1);
  }

  TEST_CASE("a connection that has been idle for 90 s is closed, also if another route is asked for") {
    struct counted {
      std::string route;
      int& open;
      counted(std::string to, int& count) : route(std::move(to)), open(count) { ++open; }
      counted(const counted&) = delete;
      counted& operator=(const counted&) = delete;
      ~counted() { --open; }
      const std::string& key() const { return route; }
      bool is_reusable() const { return true; }
    };
    const auto start = wandb::detail::clock::now();
    int open = 0;
    wandb::detail::idle_connections<counted> idle;
    idle.give_back(std::make_unique<counted>("a", open), start);
    idle.give_back(std::make_unique<counted>("a", open), start + 10s);
    idle.give_back(std::make_unique<counted>("b", open), start + 20s);
    auto taken = idle.take("a", start + 89s);
    REQUIRE(taken != nullptr);
    idle.give_back(std::move(taken), start + 89s);
    CHECK(idle.take("c", start + 109s) == nullptr);
    CHECK(open == 2);  // not the first connection of a
    CHECK(idle.take("b", start + 110s) == nullptr);
    CHECK(open == 1);
    CHECK(idle.take("a", start + 178s) != nullptr);
    CHECK(open == 0);
  }

  TEST_CASE(
      "a silently dropped idle connection counts as established, and the others of its route are not used") {
    raw_server server([](peer& client) {
      client.read_head();
      client.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
      if (client.read_head().empty()) return;
      client.wait_for_close(30s);
    });
    struct counting final : wandb::body_sink {
      int established = 0;
      void connected() override { ++established; }
      bool start(const wandb::http_response&) override { return true; }
      bool write(std::string_view) override { return true; }
    };
    wandb::http_request request;
    request.url = server.url();
    request.idle_timeout = 10s;
    wandb::http_transport transport;
    std::vector<std::thread> threads;
    struct meeting final : wandb::body_sink {  // two exchanges at once make two connections
      std::atomic<int>& present;
      explicit meeting(std::atomic<int>& all) : present(all) {}
      bool start(const wandb::http_response&) override {
        for (++present; present < 2;) std::this_thread::yield();
        return true;
      }
      bool write(std::string_view) override { return true; }
    };
    std::atomic<int> present{0}, right{0};
    for (int i = 0; i < 2; ++i) {
      threads.emplace_back([&] {
        meeting sink(present);
        if (transport.send(request, sink)) ++right;
      });
    }
    for (auto& each : threads) each.join();
    REQUIRE(right == 2);
    REQUIRE(server.connections() == 2);
    request.idle_timeout = 100ms;
    counting dropped, fresh;
    check_failed(transport.send(request, dropped), wandb::errc::connection_failed, "timed out");
    CHECK(dropped.established == 1);
    request.idle_timeout = 10s;
    REQUIRE(transport.send(request, fresh).has_value());
    CHECK(fresh.established == 1);
    CHECK(server.connections() == 3);
  }

  TEST_CASE("the longest time limits do not overflow") {
    bench b;
    b.add(1000);
    auto request = b.get();
    request.connect_timeout = request.idle_timeout = (std::chrono::milliseconds::max)();
    collector sink;
    CHECK(wandb::http_transport(b.trusting).send(request, sink).has_value());
  }

  TEST_CASE("the continuation of a folded header line is not shown") {
    const raw_server server(
        blurting("HTTP/1.1 302 F\r\nLocation: https://h/p?X-Amz-Signature=\r\n SECRET\r\n\r\n"));
    collector sink;
    wandb::http_request request;
    request.url = server.url();
    const auto outcome = wandb::http_transport().send(request, sink);
    check_failed(outcome, wandb::errc::protocol_violation, "a header line of the response is malformed");
    CHECK(std::string(outcome.error().what()).find("SECRET") == std::string::npos);
  }

  TEST_CASE("the sink can stop at the head or in the body") {
    bench b;
    b.add(5'000'000);
    wandb::http_transport transport(b.trusting);
    collector at_head, in_body;
    at_head.wants_body = false;
    check_failed(transport.send(b.get(), at_head), wandb::errc::cancelled, "stopped");
    in_body.stop_after = 100'000;
    check_failed(transport.send(b.get(), in_body), wandb::errc::cancelled, "stopped");
    CHECK(in_body.body.size() < 300'000);
    CHECK(b.server.wait_for(
        [](const auto& seen) { return seen.counts.of(stand_in::origin::storage).open_connections == 0; },
        10s));
  }

  TEST_CASE("cancellation while connecting") {
    const silent_address silent;
    wandb::http_transport transport;
    for (const char* scheme : {"http", "https"}) {
      wandb::http_request request;
      request.url = silent.socket().url(scheme);
      request.connect_timeout = request.idle_timeout = patience;
      std::atomic<int> looks{0};
      request.is_cancelled = [&] { return ++looks > 3; };
      collector sink;
      const auto begin = clock_type::now();
      check_failed(transport.send(request, sink), wandb::errc::cancelled, "cancelled");
      CHECK(clock_type::now() - begin < soon);

      request.is_cancelled = nullptr;
      request.connect_timeout = 300ms;
      check_failed(transport.send(request, sink), wandb::errc::connection_failed, "no answer in time");
    }
  }

  TEST_CASE("cancellation and timeout during the TLS handshake") {
    const listener silent;  // the kernel accepts the connection, but nobody answers the handshake
    wandb::http_transport transport;
    wandb::http_request request;
    request.url = silent.url("https");
    collector sink;
    int accepted =
        -1;  // shows that it runs; open until the end, so that nothing but the cancellation ends it
    check_cancel(transport, request, sink, [&] { accepted = silent.accept(); });
    ::close(accepted);
    request.connect_timeout = 300ms;
    request.idle_timeout = patience;
    const auto begin = clock_type::now();
    check_failed(transport.send(request, sink), wandb::errc::connection_failed, "TLS handshake");
    CHECK(clock_type::now() - begin < soon);
  }

  TEST_CASE("cancellation and idle timeout before the head and in the body") {
    namespace act = stand_in::act;
    for (const bool tls : {true, false}) {
      for (const bool in_body : {true, false}) {
        CAPTURE(tls);
        CAPTURE(in_body);
        bench b(tls ? stand_in::options{} : plain());
        b.add(200'000);
        b.server.add_fault(stand_in::place::storage, in_body ? act::stall(70'000) : act::hang());
        wandb::http_transport transport(b.trusting);
        collector sink;
        check_cancel(transport, b.get(), sink, [&] {
          CHECK(b.server.wait_for([](const auto& seen) { return seen.counts.stalled > 0; }, 20s));
          if (in_body) sink.wait_for_bytes(70'000);
        });
        auto impatient = b.get();
        impatient.idle_timeout = 300ms;
        collector second;
        const auto begin = clock_type::now();
        check_failed(transport.send(impatient, second), wandb::errc::connection_failed, "timed out");
        CHECK(clock_type::now() - begin < soon);
      }
    }
  }

  TEST_CASE("cancellation while the request is sent") {
    const listener deaf;
    wandb::http_transport transport;
    wandb::http_request request;
    request.method = "POST";
    request.url = deaf.url("http");
    request.body = std::string(64u << 20, 'x');
    collector sink;
    int peer = -1;
    check_cancel(transport, request, sink, [&] { peer = deaf.accept(); });
    ::close(peer);
  }

  TEST_CASE("addresses of a host: a silent first address costs 250 ms, once") {
    const silent_address silent;
    const listener good;
    wandb::detail::address_memory memory;
    const wandb::detail::socket_addresses addresses{address_of(silent.socket()), address_of(good)};
    const std::size_t descriptors = open_descriptors();
    wandb::detail::socket_addresses many(20, addresses[0]);  // would cost 5 s
    many.push_back(addresses[1]);
    for (const auto& each : {addresses, many}) {  // the first connection, then a later one
      const auto begin = clock_type::now();
      const auto outcome = wandb::detail::connect_to_host("host:1", each, begin + patience, {}, memory);
      REQUIRE_MESSAGE(outcome.socket >= 0, outcome.failure);
      CHECK(clock_type::now() - begin < 2500ms);
      CHECK(peer_port(outcome.socket) == port_of(good));
      CHECK(open_descriptors() == descriptors + 1);  // the loser's socket is closed
      ::close(outcome.socket);
    }
    auto ordered = addresses;
    memory.prefer_remembered("host:2", ordered);
    CHECK(ordered == addresses);
    memory.prefer_remembered("host:1", ordered);
    CHECK(ordered == wandb::detail::socket_addresses{addresses[1], addresses[0]});
  }

  TEST_CASE("addresses of a host: the memory keeps the hosts that were reached last") {
    wandb::detail::address_memory memory;
    const auto first = made_up_address(AF_INET, 1), second = made_up_address(AF_INET, 2);
    const wandb::detail::socket_addresses addresses{first, second};
    for (int i = 0; i < 2000; ++i) memory.remember("host:" + std::to_string(i), second);
    auto ordered = addresses;
    memory.prefer_remembered("host:0", ordered);
    CHECK(ordered == addresses);
    memory.prefer_remembered("host:1999", ordered);
    CHECK(ordered == wandb::detail::socket_addresses{second, first});
  }

  TEST_CASE("addresses of a host: a remembered address that has become silent is replaced") {
    const listener good;
    auto silent = std::make_unique<silent_address>();
    wandb::detail::address_memory memory;
    const wandb::detail::socket_addresses addresses{address_of(good), address_of(silent->socket())};
    memory.remember("host:1", addresses[1]);
    const auto outcome =
        wandb::detail::connect_to_host("host:1", addresses, clock_type::now() + 10s, {}, memory);
    REQUIRE_MESSAGE(outcome.socket >= 0, outcome.failure);
    CHECK(peer_port(outcome.socket) == port_of(good));
    ::close(outcome.socket);
    auto ordered = addresses;
    memory.prefer_remembered("host:1", ordered);
    CHECK(ordered == addresses);
  }

  TEST_CASE("addresses of a host: after a failed address the next one is tried at once") {
    const listener good;
    wandb::detail::address_memory memory;
    wandb::detail::socket_addresses addresses(20, refused_address());  // with the wait of a silent one: 5 s
    addresses.insert(addresses.begin(), made_up_address(AF_INET6, 0));
    addresses.push_back(address_of(good));
    const auto begin = clock_type::now();
    const auto outcome = wandb::detail::connect_to_host("host:1", addresses, begin + patience, {}, memory);
    REQUIRE_MESSAGE(outcome.socket >= 0, outcome.failure);
    CHECK(clock_type::now() - begin < 2500ms);
    CHECK(peer_port(outcome.socket) == port_of(good));
    ::close(outcome.socket);
  }

  TEST_CASE("addresses of a host: no socket stays open after a failure or a cancellation") {
    const silent_address silent;
    wandb::detail::address_memory memory;
    (void)refused_address();  // its socket stays open
    const std::size_t descriptors = open_descriptors();
    const auto refused = wandb::detail::connect_to_host("host:1", {refused_address(), refused_address()},
                                                        clock_type::now() + 10s, {}, memory);
    CHECK(refused.socket == -1);
    CHECK(refused.failure.find("refused") != std::string::npos);

    const wandb::detail::socket_addresses dead{address_of(silent.socket()), refused_address(),
                                               address_of(silent.socket())};
    const auto begin = clock_type::now();
    CHECK(wandb::detail::connect_to_host("host:1", dead, begin + 400ms, {}, memory).failure ==
          "no answer in time");
    CHECK(clock_type::now() - begin < soon);

    int looks = 0;
    wandb::http_request request;
    request.is_cancelled = [&] { return ++looks > 5; };
    const auto cancelled =
        wandb::detail::connect_to_host("host:1", dead, clock_type::now() + 10s, request, memory);
    CHECK(cancelled.socket == -1);
    CHECK(cancelled.failure.empty());
    CHECK(open_descriptors() == descriptors);
  }

  TEST_CASE("addresses of a host: families alternate, beginning with the resolver's first") {
    const auto v4 = [](int port) { return made_up_address(AF_INET, port); };
    const auto v6 = [](int port) { return made_up_address(AF_INET6, port); };
    using list = wandb::detail::socket_addresses;
    CHECK(wandb::detail::interleave_families({}) == list{});
    CHECK(wandb::detail::interleave_families({v6(1), v6(2), v6(3), v4(4), v4(5)}) ==
          list{v6(1), v4(4), v6(2), v4(5), v6(3)});
    CHECK(wandb::detail::interleave_families({v4(1), v4(2), v6(3)}) == list{v4(1), v6(3), v4(2)});
  }

  TEST_CASE("errors of failed connections name the cause") {
    const listener gone(-1);
    collector sink;
    check_failed(ask(gone.url("http"), sink), wandb::errc::connection_failed, "cannot connect to 127.0.0.1:");
    check_failed(ask("http://no-such-host.invalid/", sink), wandb::errc::connection_failed,
                 "cannot be resolved");
    check_failed(ask("ftp://host/", sink), wandb::errc::protocol_violation, "scheme");
  }

  TEST_CASE("IPv6 literals") {
    scripted peer({"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"});
    collector sink;
    const auto answer = ask(peer.url("[::ffff:127.0.0.1]"), sink);
    REQUIRE_MESSAGE(answer.has_value(), answer.error().what());
    peer.join();
    CHECK(peer.asked.at(0).find("\r\nHost: [::ffff:127.0.0.1]:") != std::string::npos);
  }

  TEST_CASE("certificates: a wrong host, an expired certificate and an unknown authority fail permanently") {
    using stand_in::certificate;
    for (const auto kind : {certificate::wrong_host, certificate::expired, certificate::other_authority}) {
      for (const char* host : {"127.0.0.1", "localhost"}) {
        CAPTURE(static_cast<int>(kind));
        stand_in::options how;
        how.host = host;
        how.storage_certificate = kind;
        bench b(how);
        b.add(10);
        {
          wandb::http_transport transport(b.trusting);
          collector sink;
          const auto answer = transport.send(b.get(), sink);
          check_failed(answer, wandb::errc::connection_failed, "certificate is refused");
          CHECK(!answer.error().is_transient());
          CHECK(std::string(answer.error().what()).find("SSL_CERT_FILE") != std::string::npos);
          CHECK(sink.starts == 0);
          CHECK(b.server.requests(stand_in::request_kind::storage).empty());
        }
        b.trusting.verify_tls = false;
        wandb::http_transport careless(b.trusting);
        collector sink;
        CHECK(careless.send(b.get(), sink).has_value());
      }
    }
  }

  TEST_CASE("certificates: a bundle with the intermediate authority alone is accepted, another one is not") {
    stand_in::options how;
    how.through_intermediate = true;
    bench b(how), another(how);
    b.add(10);
    std::ofstream(b.files / "intermediate.pem") << b.server.intermediate_pem();
    std::ofstream(b.files / "another.pem") << another.server.intermediate_pem();
    for (const char* name : {"ca.pem", "intermediate.pem"}) {
      CAPTURE(name);
      wandb::settings trusting;
      trusting.ca_file = b.files / name;
      collector sink;
      const auto answer = wandb::http_transport(trusting).send(b.get(), sink);
      REQUIRE_MESSAGE(answer.has_value(), answer.error().what());
    }
    wandb::settings trusting;
    trusting.ca_file = b.files / "another.pem";
    collector sink;
    check_failed(wandb::http_transport(trusting).send(b.get(), sink), wandb::errc::connection_failed,
                 "certificate is refused");
  }

  TEST_CASE("certificates: with SSL_CERT_DIR alone, the system's bundle is trusted as well") {
    const wandb::detail::path bundle = wandb::detail::system_bundle();
    REQUIRE(std::filesystem::is_regular_file(bundle));  // tests/run.sh installs a package with one
    const support::temporary_directory files;
    for (const auto& [file, expected] :
         {std::pair<std::optional<std::string>, wandb::detail::path>{std::nullopt, bundle},
          {"/chosen.pem", "/chosen.pem"}}) {
      const support::scoped_environment environment{{"SSL_CERT_DIR", files.string()},
                                                    {"SSL_CERT_FILE", file}};
      const auto found = wandb::settings::from_environment();
      CHECK(found.ca_file == expected);
      CHECK(found.ca_directory.string().find(files.string()) == 0);
    }
  }

  TEST_CASE("certificates: without the server's CA the system's certificates do not suffice") {
    bench b;
    b.add(10);
    wandb::http_transport transport;
    collector sink;
    check_failed(transport.send(b.get(), sink), wandb::errc::connection_failed, "certificate is refused");
  }

  TEST_CASE("certificates: an unusable CA file or directory is an invalid_argument that names it") {
    bench b;
    b.add(10);
    std::ofstream(b.files / "garbage.pem") << "not a certificate";
    for (const char* name : {"absent.pem", "garbage.pem"}) {
      wandb::settings unusable;
      unusable.ca_file = b.files / name;
      wandb::http_transport transport(unusable);
      collector sink;
      check_failed(transport.send(b.get(), sink), wandb::errc::invalid_argument, name);
    }
    wandb::settings unusable;
    unusable.ca_directory = b.files / "absent";
    wandb::http_transport transport(unusable);
    collector sink;
    check_failed(transport.send(b.get(), sink), wandb::errc::invalid_argument, "absent");
  }

  TEST_CASE("certificates: a transport reads the CA file once") {
    bench b;
    b.add(10);
    b.server.add_fault(stand_in::place::storage, stand_in::act::close_after());
    wandb::http_transport transport(b.trusting);
    collector first, second;
    REQUIRE(transport.send(b.get(), first).has_value());
    std::filesystem::remove(b.trusting.ca_file);
    REQUIRE(transport.send(b.get(), second).has_value());
    CHECK(b.connections() == 2);
  }

  TEST_CASE("TLS to a plain HTTP port, and the reverse, fail permanently and name the right scheme") {
    using namespace std::string_literals;
    const std::string text = "HTTP/1.1 400 Bad Request\r\nContent-Length: 100\r\n\r\n";
    struct example {
      const char* scheme;
      std::string answer;
      const char* text;
    };
    for (const auto& each : std::vector<example>{
             {"https", text + "<html>", "use http://"},
             {"https", "SSH-2.0-OpenSSH_9.2\r\n", "does not speak TLS"},
             {"http", "\x15\x03\x01\x00\x02\x02\x46"s, "use https://"},
             {"http", text + "<h1>The plain HTTP request was sent to HTTPS port</h1>", "use https://"},
             {"http", text + "Reason: You're speaking plain HTTP to an SSL-enabled server port.",
              "use https://"},
             {"http", "HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n",
              "use https://"},
             {"http", text + "Bad Request\r\nThis combination of host and port requires TLS.\r\n",
              "use https://"}}) {
      CAPTURE(each.answer);
      const raw_server server(blurting(each.answer));
      collector sink;
      const auto outcome = ask(with_scheme(each.scheme, server.url()), sink);
      check_failed(outcome, wandb::errc::connection_failed, each.text);
      CHECK(!outcome.error().is_transient());
      CHECK(sink.starts == 0);
    }
    const raw_server server(blurting(text.substr(0, text.find("Content")) + "Content-Length: 3\r\n\r\nbad"));
    collector sink;
    const auto answer = ask(server.url(), sink);
    REQUIRE(answer.has_value());
    CHECK(answer->status == 400);
    CHECK(sink.body == "bad");
  }

  TEST_CASE("a 400 that asks for TLS is recognised however its bytes arrive") {
    const std::string head = "HTTP/1.1 400 Bad Request\r\n";
    for (const auto& answer :
         {head + "Transfer-Encoding: chunked\r\n\r\n"
                 "24\r\n<h1>The plain HTTP request was sent \r\ne\r\nto HTTPS port.\r\n0\r\n\r\n",
          head + "Content-Length: 49\r\n\r\n<h1>The plain HTTP request was sent to HTTPS port"}) {
      CAPTURE(answer);
      const raw_server server([&answer](const peer& client) {
        (void)client.read(1);
        for (const char c : answer) (void)client.send({&c, 1});
        client.leave();
        (void)client.wait_for_close(10s);
      });
      collector sink;
      const auto outcome = ask(server.url(), sink);
      check_failed(outcome, wandb::errc::connection_failed, "use https://");
      CHECK(outcome.error().http_status() == 400);
      CHECK(sink.starts == 0);
    }
  }

  TEST_CASE("the body of another 400 is delivered whole, or up to where it is cut") {
    const std::string body(20'000, 'x');
    for (const std::size_t cut : {std::size_t{0}, std::size_t{10}, std::size_t{5'000}, body.size()}) {
      CAPTURE(cut);
      const raw_server server(blurting("HTTP/1.1 400 Bad Request\r\nContent-Length: " +
                                       std::to_string(body.size()) + "\r\n\r\n" + body.substr(0, cut)));
      collector sink;
      const auto outcome = ask(server.url(), sink);
      CHECK(outcome.has_value() == (cut == body.size()));
      CHECK(sink.starts == 1);
      CHECK(sink.body == body.substr(0, cut));
    }
    // The sink may stop at the beginning and in the body.
    for (const bool at_start : {true, false}) {
      const raw_server server(blurting("HTTP/1.1 400 Bad Request\r\nContent-Length: 3\r\n\r\nbad"));
      collector sink;
      sink.wants_body = !at_start;
      sink.stop_after = 0;
      check_failed(ask(server.url(), sink), wandb::errc::cancelled, "stopped by the receiver");
    }
  }

  TEST_CASE("TLS alerts about versions, certificates and names are permanent, others are not") {
    const auto alert = [](int number) {
      return std::string("\x15\x03\x03\x00\x02\x02", 6) + static_cast<char>(number);
    };
    for (const int number : {40, 42, 43, 46, 48, 49, 70, 71, 112, 116}) {
      CAPTURE(number);
      const raw_server server(blurting(alert(number)));
      collector sink;
      const auto outcome = ask(with_scheme("https", server.url()), sink);
      check_failed(outcome, wandb::errc::connection_failed, "do not agree on TLS");
      CHECK(!outcome.error().is_transient());
    }
    for (const int number : {10, 20, 80, 90}) {
      CAPTURE(number);
      const raw_server server(blurting(alert(number)));
      collector sink;
      const auto outcome = ask(with_scheme("https", server.url()), sink);
      check_failed(outcome, wandb::errc::connection_failed, "TLS");
      CHECK(outcome.error().is_transient());
    }
  }

  TEST_CASE("a server that requires a client certificate is reported at once, with each TLS version") {
    for (const auto version : {stand_in::tls_versions::only_1_2, stand_in::tls_versions::only_1_3}) {
      stand_in::options how;
      how.versions = version;
      how.demands_client_certificate = true;
      bench b(how);
      b.add(10);
      wandb::http_transport transport(b.trusting);
      collector sink;
      const auto outcome = transport.send(b.get(), sink);
      check_failed(outcome, wandb::errc::connection_failed, "client certificate");
      CHECK(!outcome.error().is_transient());
    }
  }

  TEST_CASE("TLS 1.2 and 1.3 work") {
    for (const auto version : {stand_in::tls_versions::only_1_2, stand_in::tls_versions::only_1_3}) {
      stand_in::options how;
      how.versions = version;
      bench b(how);
      b.add(500'000);
      wandb::http_transport transport(b.trusting);
      for (int i = 0; i < 3; ++i) {
        collector sink;
        REQUIRE(transport.send(b.get(), sink).has_value());
        CHECK(sink.body.size() == 500'000);
      }
      CHECK(b.connections() == 1);
    }
  }

  TEST_CASE("a proxy gets tunnels and absolute addresses; each credential goes to its own recipient") {
    for (const bool tls : {true, false}) {
      CAPTURE(tls);
      stand_in::options how = tls ? stand_in::options{} : plain();
      how.proxy = true;
      how.proxy_credentials = "us er:p@ss";
      bench b(how);
      b.add(100'000);
      const std::string proxy = b.server.proxy_url();
      const std::string authority = proxy.substr(proxy.find("//") + 2);
      wandb::http_transport transport(b.trusting);

      auto with_user = b.get();
      with_user.headers.emplace_back("X-Secret", "for the origin");
      with_user.proxy = "http://us%20er:p%40ss@" + authority;
      auto with_header = with_user;
      with_header.proxy = authority;  // also without a scheme
      with_header.proxy_authorization = "Basic dXMgZXI6cEBzcw==";
      for (const auto& request : {with_user, with_user, with_header}) {
        collector sink;
        const auto answer = transport.send(request, sink);
        REQUIRE_MESSAGE(answer.has_value(), answer.error().what());
        CHECK(sink.body.size() == 100'000);
      }
      for (const auto& seen : b.server.requests(stand_in::request_kind::storage)) {
        CHECK(!seen.header("Proxy-Authorization"));
        CHECK(seen.header("X-Secret") == "for the origin");
      }
      for (const auto& seen : b.server.requests(stand_in::request_kind::proxy)) {
        CHECK(seen.header("Proxy-Authorization") == "Basic dXMgZXI6cEBzcw==");
        if (tls) CHECK(!seen.header("X-Secret"));
      }

      auto refused = b.get();
      refused.proxy = proxy;
      collector sink;
      const auto answer = transport.send(refused, sink);
      check_failed(answer, wandb::errc::connection_failed, "407");
      CHECK(!answer.error().is_transient());
      CHECK(sink.starts == 0);
    }
  }

  TEST_CASE("a proxy's 4xx to CONNECT is permanent, a 5xx is retried") {
    for (const int status : {403, 502}) {
      CAPTURE(status);
      scripted proxy({"HTTP/1.1 " + std::to_string(status) + " No\r\nContent-Length: 0\r\n\r\n"}, false);
      wandb::http_request request;
      request.url = "https://origin.test/x";
      request.proxy = proxy.url();
      request.idle_timeout = 5s;
      wandb::http_transport transport;
      collector sink;
      const auto outcome = transport.send(request, sink);
      check_failed(outcome, wandb::errc::connection_failed, status == 403 ? "answered 403" : "answered 502");
      CHECK(outcome.error().http_status() == status);
      CHECK(outcome.error().is_transient() == (status == 502));
    }
  }

  TEST_CASE("a host name that TLS cannot carry is invalid_argument") {
    scripted proxy({"HTTP/1.1 200 Connection established\r\n\r\n"}, false);
    wandb::http_request request;
    request.url = "https://" + std::string(300, 'a') + "/x";
    request.proxy = proxy.url();
    request.idle_timeout = 5s;
    wandb::http_transport transport;
    collector sink;
    check_failed(transport.send(request, sink), wandb::errc::invalid_argument,
                 "TLS cannot use the host name");
  }

  TEST_CASE("bytes behind a proxy's answer to CONNECT are a protocol_violation") {
    const std::string established = "HTTP/1.1 200 Connection established\r\n\r\n";
    for (const std::string& unexpected : {std::string("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
                                          std::string("\x15"), std::string("\r\n")}) {
      CAPTURE(unexpected);
      scripted proxy({established + unexpected}, false);
      wandb::http_request request;
      request.url = "https://origin.test/x";
      request.proxy = proxy.url();
      request.idle_timeout = 5s;
      wandb::http_transport transport;
      collector sink;
      check_failed(transport.send(request, sink), wandb::errc::protocol_violation,
                   "before the TLS handshake");
      CHECK(sink.starts == 0);
    }
  }

  TEST_CASE("an unusable proxy address is reported without its password") {
    for (const char* proxy :
         {"https://u:secret@127.0.0.1:1", "socks5://u:secret@127.0.0.1:1", "http://u:secret@"}) {
      wandb::http_request request;
      request.url = "https://127.0.0.1:9/";
      request.proxy = proxy;
      collector sink;
      wandb::http_transport transport;
      check_failed(transport.send(request, sink), wandb::errc::invalid_argument,
                   "http://[user:password@]host:port");
    }
  }

  TEST_CASE("many threads can send at once") {
    bench b;
    b.add(300'000);
    wandb::http_transport transport(b.trusting);
    const std::string whole = stand_in::read_text(*b.content);
    std::atomic<int> right{0};
    std::vector<std::thread> threads;
    for (int t = 0; t < 8; ++t) {
      threads.emplace_back([&, t] {
        for (int i = 0; i < 10; ++i) {
          collector sink;
          if ((t + i) % 5 == 0) sink.stop_after = 1;
          const auto answer = transport.send(b.get(), sink);
          if (answer ? sink.body == whole : answer.error().code() == wandb::errc::cancelled) ++right;
        }
      });
    }
    for (auto& thread : threads) thread.join();
    CHECK(right == 80);
  }

  TEST_CASE("a child leaves its parent's pool alone if another thread held a lock of it during the fork") {
    wandb::detail::connection_pool pool;
    CHECK(pool.try_close());
    for (std::mutex* const held : {&pool.tls_mutex, &pool.memory.mutex}) {
      std::thread([&] {
        held->lock();
      }).join();  // in the child the thread that holds the lock does not exist
      CHECK_FALSE(pool.try_close());
      held->unlock();
    }
    CHECK(pool.try_close());
  }

#ifndef __SANITIZE_THREAD__  // the sanitizer does not support threads that start after a fork
  TEST_CASE("after a fork, parent and child each get the files that they request") {
    const auto content_for = [](const std::string& name) {
      return stand_in::read_text(*stand_in::generated(50'000, std::hash<std::string>()(name)));
    };
    for (const bool tls : {true, false}) {
      CAPTURE(tls);
      // The server is another process: a thread of it here could hold a lock of OpenSSL or of a sanitizer during the fork,
      // and the child would wait for it for ever.
      int facts[2], end[2];
      REQUIRE((::pipe(facts) == 0 && ::pipe(end) == 0));
      const pid_t serving = ::fork();
      REQUIRE(serving >= 0);
      if (serving == 0) {
        ::close(facts[0]);
        ::close(end[1]);
        bool served = false;
        {
          bench b(tls ? stand_in::options{} : plain());
          for (const char* who : {"parent", "child"}) {
            for (int round = 0; round < 20; ++round) {
              const std::string name = who + std::to_string(round);
              b.server.add_file(b.run, name, content_for(name));
            }
          }
          const std::string text =
              b.server.base_url() + '\n' + b.server.key() + '\n' + b.trusting.ca_file.string();
          served = ::write(facts[1], text.data(), text.size()) == static_cast<ssize_t>(text.size());
          ::close(facts[1]);
          char byte = 0;
          served = served && ::read(end[0], &byte, 1) == 0;
        }
        ::_exit(served ? 7 : 8);
      }
      ::close(facts[1]);
      ::close(end[0]);
      std::string text;
      char part[512];
      for (ssize_t count = 0; (count = ::read(facts[0], part, sizeof part)) > 0;)
        text.append(part, static_cast<std::size_t>(count));
      ::close(facts[0]);
      std::istringstream lines(text);
      wandb::settings settings;
      std::string ca_file;
      REQUIRE((std::getline(lines, settings.base_url) && std::getline(lines, settings.api_key) &&
               std::getline(lines, ca_file)));
      const support::temporary_directory restored;
      settings.ca_file = ca_file;
      settings.run_dir = restored.path();
      wandb::client<> client(settings);
      const auto restores = [&](const std::string& name) {
        const auto file = client.try_restore(name, "e/p/r");
        std::ifstream stream(settings.run_dir / name, std::ios::binary);
        return file && std::string(std::istreambuf_iterator<char>(stream), {}) == content_for(name);
      };
      REQUIRE(restores("parent0"));  // the pool now has idle connections
      int right = 0;
      for (int round = 1; round < 20; ++round) {
        const pid_t child = fork_child();
        REQUIRE(child >= 0);
        if (child == 0) ::_exit(restores("child" + std::to_string(round)) ? 7 : 8);
        const bool is_right = restores("parent" + std::to_string(round));
        int status = 0;
        REQUIRE(::waitpid(child, &status, 0) == child);
        if (is_right && WIFEXITED(status) && WEXITSTATUS(status) == 7) ++right;
      }
      CHECK(right == 19);
      ::close(end[1]);
      int status = 0;
      REQUIRE(::waitpid(serving, &status, 0) == serving);
      REQUIRE(WIFEXITED(status));
      CHECK(WEXITSTATUS(status) == 7);
    }
  }
#endif  // __SANITIZE_THREAD__

#if !TESTS_SANITIZED
  TEST_CASE("a child that ends or destroys the transport does not close its parent's connections") {
    for (const bool tls : {true, false}) {
      CAPTURE(tls);
      bench b(tls ? stand_in::options{} : plain());
      b.add(1000);
      auto transport = std::make_unique<wandb::http_transport>(b.trusting);
      collector first, second;
      REQUIRE(transport->send(b.get(), first).has_value());
      const pid_t child = fork_child();
      REQUIRE(child >= 0);
      if (child == 0) {
        {
          collector sink;
          const auto copy = std::make_unique<wandb::http_transport>(*transport);
          if (!copy->send(b.get(), sink)) ::_exit(8);
        }
        transport.reset();
        ::_exit(7);
      }
      int status = 0;
      REQUIRE(::waitpid(child, &status, 0) == child);
      REQUIRE(WIFEXITED(status));
      CHECK(WEXITSTATUS(status) == 7);
      REQUIRE(transport->send(b.get(), second).has_value());
      CHECK(second.body == first.body);
      CHECK(b.connections() == 2);  // one of the parent, used twice, and one of the child
    }
  }

  TEST_CASE("a socket never takes the descriptor of a standard stream") {
    bench b;
    b.add(1000);
    const pid_t child = fork_child();
    REQUIRE(child >= 0);
    if (child == 0) {
      struct : wandb::body_sink {
        int streams = 0;
        bool start(const wandb::http_response&) override {
          for (const int descriptor : {0, 1, 2}) streams += ::fcntl(descriptor, F_GETFD) != -1;
          return true;
        }
        bool write(std::string_view) override { return true; }
      } sink;
      for (const int descriptor : {0, 1, 2}) ::close(descriptor);
      wandb::http_transport transport(b.trusting);
      ::_exit(transport.send(b.get(), sink) && sink.streams == 0 ? 7 : 8);
    }
    int status = 0;
    REQUIRE(::waitpid(child, &status, 0) == child);
    REQUIRE(WIFEXITED(status));
    CHECK(WEXITSTATUS(status) == 7);
  }

  TEST_CASE("SIGPIPE never reaches the program, which has its default handler") {
    bench b;
    b.add(1000);
    b.server.add_fault(stand_in::place::storage, stand_in::act::refuse());
    const listener leaver;
    int has_left[2];
    REQUIRE(::pipe(has_left) == 0);
    const pid_t child = fork_child();  // a signal ends only the child; the server's threads run in the parent
    REQUIRE(child >= 0);
    if (child == 0) {
      ::signal(SIGPIPE, SIG_DFL);
      wandb::http_transport transport(b.trusting);
      wandb::http_request request = b.get();
      request.method = "POST";
      request.body = std::string(16u << 20, 'x');
      collector sink;
      (void)transport.send(request, sink).has_value();
      request.url = leaver.url("http");
      bool waited = false;
      request.is_cancelled = [&] {  // called between connecting and sending
        char byte = 0;
        if (!waited) waited = ::read(has_left[0], &byte, 1) == 1;
        return false;
      };
      const auto answer = transport.send(request, sink);
      ::_exit(!answer && answer.error().code() == wandb::errc::connection_failed ? 7 : 8);
    }
    const int peer = leaver.accept();
    ::shutdown(peer,
               SHUT_RDWR);  // FIN, then RST for later bytes: from then on writing raises the signal
    CHECK(::write(has_left[1], "x", 1) == 1);
    int status = 0;
    REQUIRE(::waitpid(child, &status, 0) == child);
    for (const int each : {peer, has_left[0], has_left[1]}) ::close(each);
    REQUIRE(WIFEXITED(status));
    CHECK(WEXITSTATUS(status) == 7);
  }
#endif  // TESTS_SANITIZED
}

#endif
