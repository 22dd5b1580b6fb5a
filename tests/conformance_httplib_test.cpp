// The conformance suite over httplib_transport.
#define WANDB_RESTORE_HTTPLIB
#include "wandb_restore.hpp"

#ifndef _WIN32

#include "conformance_tables.hpp"

namespace {

struct httplib_transport {
  static constexpr const char* name = "httplib_transport";
  static wandb::httplib_transport make(const wandb::settings& settings) {
    return wandb::httplib_transport(settings);
  }
  static conformance::limits cannot_keep() { return conformance::limits_of_httplib(); }
};

}  // namespace

#define TRANSPORT_CONFORMANCE_SUITE "conformance_httplib"
#define TRANSPORTS_UNDER_TEST httplib_transport
#include "transport_conformance.hpp"

#include <memory>
#include <sys/wait.h>
#include <unistd.h>

TEST_SUITE("conformance_httplib") {
  TEST_CASE("for a tunnel, credentials other than Basic and Bearer are refused") {
    using namespace sockets;
    wandb::http_request request;
    request.url = "https://origin.test/x";
    request.idle_timeout = 5s;
    wandb::httplib_transport transport;
    collector sink;
    {
      const raw_server proxy([](const peer& client) {
        (void)client.read(1);
        (void)client.send("HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n");
      });
      request.proxy = proxy.url();
      request.proxy_authorization = "Bearer token";
      check_failed(transport.send(request, sink), wandb::errc::connection_failed, "");
    }
    request.proxy_authorization = "Digest token";  // refused before a connection is made
    check_failed(transport.send(request, sink), wandb::errc::invalid_argument, "Basic and Bearer");
  }

  TEST_CASE("an interim response is skipped or refused, and never taken for the answer") {
    using namespace sockets;
    scripted server({"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n"}, false);
    wandb::http_request request;
    request.url = server.url();
    request.idle_timeout = 5s;
    wandb::httplib_transport transport;
    collector sink;
    const auto outcome = transport.send(request, sink);
    if (outcome) {
      CHECK(outcome->status == 204);
    } else {
      CHECK(outcome.error().code() == wandb::errc::protocol_violation);
    }
  }

  TEST_CASE("a CA file without certificates is invalid_argument, with a remedy") {
    using namespace sockets;
    bench b;
    b.add(10);
    wandb::settings unusable;
    unusable.ca_file = b.files / "garbage.pem";
    std::ofstream(unusable.ca_file) << "not a certificate";
    wandb::httplib_transport transport(unusable);
    collector sink;
    check_failed(transport.send(b.get(), sink), wandb::errc::invalid_argument, "SSL_CERT_FILE");
  }
}

#if !TESTS_SANITIZED
TEST_SUITE("conformance_httplib") {
  TEST_CASE("a child of fork leaves its parent's connections alone") {
    using namespace sockets;
    for (const bool tls : {true, false}) {
      CAPTURE(tls);
      bench b(tls ? stand_in::options{} : plain());
      b.add(1000);
      auto transport = std::make_unique<wandb::httplib_transport>(b.trusting);
      collector first, second;
      REQUIRE(transport->send(b.get(), first).has_value());
      const pid_t child = fork_child();
      REQUIRE(child >= 0);
      if (child == 0) {
        collector sink;
        const bool has_come = transport->send(b.get(), sink).has_value();
        transport.reset();
        ::_exit(has_come ? 7 : 8);
      }
      int status = 0;
      REQUIRE(::waitpid(child, &status, 0) == child);
      REQUIRE(WIFEXITED(status));
      CHECK(WEXITSTATUS(status) == 7);
      REQUIRE(transport->send(b.get(), second).has_value());
      CHECK(second.body == first.body);
      CHECK(b.connections() == 2);  // the parent's, used twice, and the child's
    }
  }
}
#endif  // TESTS_SANITIZED

#endif  // _WIN32
