// Peers for the tests of transports: the stand-in server with one file, and sockets that answer byte for byte.
#ifndef WANDB_RESTORE_TESTS_SOCKETS_HPP
#define WANDB_RESTORE_TESTS_SOCKETS_HPP

#include <doctest/doctest.h>

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <set>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "stand_in.hpp"
#include "support.hpp"
#include "wandb_restore.hpp"

#ifndef _WIN32
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

// Source files include wandb_restore.hpp in different modes. The inline namespace separates types that depend on the mode.
namespace sockets {
inline namespace WANDB_RESTORE_PRIVATE_ABI {

using namespace std::chrono_literals;
using clock_type = std::chrono::steady_clock;

/// A cancelled exchange ends within a second, one whose time is up soon after that; on a machine under load both may take
/// longer. The tests' other time limits are those of `patience`, so that an exchange that ends soon was ended by the
/// cancellation, or by the time limit that the test is about.
constexpr auto soon = 3s, patience = 60s;

/// Forks. In the child, returns 0, and ends the process after five minutes, so that a child that hangs fails the test.
inline pid_t fork_child() {
  const pid_t child = ::fork();
  if (child == 0) ::alarm(300);
  return child;
}

/// A sink that stores head and body, and stops the exchange where a test wants.
class collector final : public wandb::body_sink {
 public:
  wandb::http_response head;
  std::string body;
  int starts = 0;
  int out_of_turn = 0;                ///< calls in the wrong order
  std::size_t stop_after = SIZE_MAX;  ///< write returns false after this number of bytes
  bool wants_body = true;             ///< false: start returns false

  void connected() override { out_of_turn += starts > 0; }
  bool start(const wandb::http_response& response) override {
    out_of_turn += starts > 0;
    ++starts;
    head = response;
    return wants_body;
  }
  bool write(std::string_view bytes) override {
    out_of_turn += starts == 0 || !wants_body || body.size() >= stop_after;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      body += bytes;
    }
    arrived_.notify_all();
    return body.size() < stop_after;
  }
  /// Blocks a test's thread until `count` bytes of the body have arrived.
  void wait_for_bytes(std::size_t count) {
    std::unique_lock<std::mutex> lock(mutex_);
    CHECK(arrived_.wait_for(lock, 20s, [&] { return body.size() >= count; }));
  }

 private:
  std::mutex mutex_;
  std::condition_variable arrived_;
};

/// A stand-in server with one file, and settings that trust its certificate.
struct bench {
  explicit bench(stand_in::options options = {}) : server(std::move(options)) {
    run = server.add_run("e", "p", "r");
    server.write_ca(files / "ca.pem");
    trusting.ca_file = files / "ca.pem";
  }
  void add(std::uint64_t size) {
    content = stand_in::generated(size);
    server.add_file(run, "a.bin", content);
    address = server.signed_url(run, "a.bin");
  }
  wandb::http_request get() const {
    wandb::http_request request;
    request.url = address;
    request.headers = {{"User-Agent", "test"}, {"Accept", "*/*"}, {"Accept-Encoding", "identity"}};
    request.connect_timeout = request.idle_timeout = patience;
    return request;
  }
  std::uint64_t connections() const { return server.counted().of(stand_in::origin::storage).connections; }

  support::temporary_directory files;
  stand_in::server server;
  stand_in::run_ref run;
  stand_in::content_ptr content;
  std::string address;
  wandb::settings trusting;
};

/// Options of a server that speaks plain HTTP.
inline stand_in::options plain() {
  stand_in::options options;
  options.service_tls = options.storage_tls = false;
  return options;
}

/// A listening socket on 127.0.0.1. Connections are accepted by the test alone. With a backlog below 0 the socket has an address
/// and does not listen: connections are refused, and no other program gets the port.
class listener {
 public:
  explicit listener(int backlog = 8) : handle_(::socket(AF_INET, SOCK_STREAM, 0)) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof address;
    REQUIRE(::bind(handle_, reinterpret_cast<sockaddr*>(&address), size) == 0);
    if (backlog >= 0) REQUIRE(::listen(handle_, backlog) == 0);
    REQUIRE(::getsockname(handle_, reinterpret_cast<sockaddr*>(&address), &size) == 0);
    address_ = address;
  }
  ~listener() { close(); }
  listener(const listener&) = delete;
  listener& operator=(const listener&) = delete;

  void close() {
    if (handle_ >= 0) ::close(handle_);
    handle_ = -1;
  }
  /// Makes a blocked accept in another thread return.
  void stop() const { ::shutdown(handle_, SHUT_RDWR); }
  int accept() const { return ::accept(handle_, nullptr, nullptr); }
  const sockaddr_in& address() const { return address_; }
  std::string url(const char* scheme, const char* host = "127.0.0.1") const {
    return std::string(scheme) + "://" + host + ':' + std::to_string(ntohs(address_.sin_port)) +
           "/x?secret=1";
  }

 private:
  int handle_;
  sockaddr_in address_{};
};

/// An address that drops packets: the queue of its listening socket is full, so that a SYN is not answered.
class silent_address {
 public:
  silent_address() {
    std::array<pollfd, 4> connected{};
    for (std::size_t i = 0; i < fillers_.size(); ++i) {
      fillers_[i] = ::socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
      (void)!::connect(fillers_[i], reinterpret_cast<const sockaddr*>(&full_.address()), sizeof(sockaddr_in));
      connected[i] = {fillers_[i], POLLOUT, 0};
    }
    REQUIRE(::poll(connected.data(), connected.size(), 20'000) > 0);  // the queue is full
  }
  ~silent_address() {
    for (const int filler : fillers_) ::close(filler);
  }
  silent_address(const silent_address&) = delete;
  silent_address& operator=(const silent_address&) = delete;
  const listener& socket() const { return full_; }

 private:
  listener full_{0};  // one connection fills the queue
  std::array<int, 4> fillers_{};
};

/// A server that accepts one connection for each of its answers, one after the other: it reads and stores a request's head,
/// and sends the answer byte for byte.
class scripted {
 public:
  explicit scripted(std::vector<std::string> answers, bool closes = true)
      : worker_([this, answers = std::move(answers), closes] {
          for (const auto& answer : answers) {
            const int peer = socket_.accept();
            if (peer < 0) return;
            std::string head;
            for (char c = 0; head.find("\r\n\r\n") == std::string::npos && ::recv(peer, &c, 1, 0) == 1;)
              head += c;
            asked.push_back(head);
            (void)!::send(peer, answer.data(), answer.size(), MSG_NOSIGNAL);
            if (!closes) {  // the client closes the connection
              char c = 0;
              while (::recv(peer, &c, 1, 0) > 0) {}
            }
            ::close(peer);
          }
        }) {}
  ~scripted() { join(); }
  void join() {
    if (worker_.joinable()) worker_.join();
  }
  std::string url(const char* host = "127.0.0.1") const { return socket_.url("http", host); }

  std::vector<std::string> asked;  ///< valid after join

 private:
  listener socket_;
  std::thread worker_;
};

/// A connection that a raw_server accepted, for one thread.
class peer {
 public:
  explicit peer(int handle) : handle_(handle) {}
  peer(const peer&) = delete;
  peer& operator=(const peer&) = delete;

  /// Reads a request's head with its final blank line. Returns an incomplete head if the client closed the connection.
  std::string read_head() const {
    std::string head;
    for (char c = 0; head.find("\r\n\r\n") == std::string::npos && ::recv(handle_, &c, 1, 0) == 1;) head += c;
    return head;
  }
  /// Reads `count` bytes, or fewer if the client closes the connection.
  std::string read(std::size_t count) const {
    std::string bytes(count, '\0');
    std::size_t size = 0;
    while (size < count) {
      const auto more = ::recv(handle_, &bytes[size], count - size, 0);
      if (more <= 0) break;
      size += static_cast<std::size_t>(more);
    }
    bytes.resize(size);
    return bytes;
  }
  /// Sends all bytes. Returns false if the client closed the connection.
  bool send(std::string_view bytes) const {
    while (!bytes.empty()) {
      const auto count = ::send(handle_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (count <= 0) return false;
      bytes.remove_prefix(static_cast<std::size_t>(count));
    }
    return true;
  }
  /// Sends `bytes` repeatedly until the client closes the connection, at most `limit` bytes. Returns the number of sent bytes,
  /// including those in the buffers of the two sockets.
  std::size_t send_without_end(std::string_view bytes, std::size_t limit) const {
    const int small = 16 * 1024;
    ::setsockopt(handle_, SOL_SOCKET, SO_SNDBUF, &small, sizeof small);
    std::size_t sent = 0;
    while (sent < limit && send(bytes)) sent += bytes.size();
    return sent;
  }
  /// Waits until the client closes the connection. Returns false after `limit`.
  bool wait_for_close(std::chrono::milliseconds limit) const {
    const auto end = clock_type::now() + limit;
    for (;;) {
      const auto left = std::chrono::ceil<std::chrono::milliseconds>(end - clock_type::now()).count();
      pollfd entry{handle_, POLLIN, 0};
      if (left <= 0 || ::poll(&entry, 1, static_cast<int>(left)) == 0) return false;
      char bytes[4096];
      if (::recv(handle_, bytes, sizeof bytes, 0) <= 0) return true;
    }
  }
  /// Connects to a port of 127.0.0.1, and passes bytes in both directions until one side closes its connection.
  void relay_to(int port) const {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<std::uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    const int server = ::socket(AF_INET, SOCK_STREAM, 0);
    const peer upstream(server);
    if (::connect(server, reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0) {
      pollfd entries[] = {{handle_, POLLIN, 0}, {server, POLLIN, 0}};
      for (bool is_open = true; is_open && ::poll(entries, 2, 30'000) > 0;) {
        for (int side = 0; side < 2 && is_open; ++side) {
          char bytes[65536];
          if (entries[side].revents == 0) continue;
          const auto count = ::recv(entries[side].fd, bytes, sizeof bytes, 0);
          is_open =
              count > 0 && (side == 0 ? upstream : *this).send({bytes, static_cast<std::size_t>(count)});
        }
      }
    }
    ::close(server);
  }
  /// Makes each send a packet of its own.
  void send_at_once() const {
    const int on = 1;
    ::setsockopt(handle_, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  }
  /// Sends a FIN.
  void leave() const { ::shutdown(handle_, SHUT_WR); }
  /// Makes close send a RST.
  void end_with_reset() const {
    const linger at_once{1, 0};
    ::setsockopt(handle_, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
  }

 private:
  int handle_;
};

/// A server that runs a function in a new thread for each connection, and closes the connection when the function returns.
class raw_server {
 public:
  explicit raw_server(std::function<void(peer&)> serve)
      : serve_(std::move(serve)), acceptor_([this] { accept_all(); }) {}
  /// Ends all connections, and waits for the functions.
  ~raw_server() {
    socket_.stop();
    acceptor_.join();
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (const int handle : open_) ::shutdown(handle, SHUT_RDWR);
    }
    for (auto& each : threads_) each.join();
  }
  raw_server(const raw_server&) = delete;
  raw_server& operator=(const raw_server&) = delete;

  /// "http://host:port" + target.
  std::string url(const std::string& target = "/x?secret=1", const char* host = "127.0.0.1") const {
    const std::string address = socket_.url("http", host);
    return address.substr(0, address.rfind('/')) + target;
  }
  int connections() const { return connections_; }

 private:
  void accept_all() {
    for (;;) {
      const int handle = socket_.accept();
      if (handle < 0) return;
      const std::lock_guard<std::mutex> lock(mutex_);
      ++connections_;
      open_.insert(handle);
      threads_.emplace_back([this, handle] {
        peer client(handle);
        serve_(client);
        const std::lock_guard<std::mutex> closing(mutex_);
        open_.erase(handle);
        ::close(handle);
      });
    }
  }

  const std::function<void(peer&)> serve_;
  listener socket_;
  std::atomic<int> connections_{0};
  std::mutex mutex_;  // guards the next two
  std::set<int> open_;
  std::vector<std::thread> threads_;
  std::thread acceptor_;  // the last member, because the thread uses the others
};

template <class Result>
void check_failed(const Result& outcome, wandb::errc code, const char* text = "") {
  REQUIRE(!outcome.has_value());
  const std::string told = outcome.error().what();
  CAPTURE(told);
  CHECK(outcome.error().code() == code);
  CHECK(told.find(text) != std::string::npos);
  CHECK(told.find("secret") == std::string::npos);
}

struct cancelled_exchange {
  wandb::result<wandb::http_response> outcome;
  std::chrono::nanoseconds delay;  ///< from the cancellation to the return of send
};

/// Makes an exchange, and cancels it from a thread once `is_under_way` returns there.
template <class Transport>
cancelled_exchange cancel_when(Transport& transport, wandb::http_request request, wandb::body_sink& sink,
                               const std::function<void()>& is_under_way) {
  std::atomic<bool> cancelled{false};
  request.is_cancelled = [&] { return cancelled.load(); };
  clock_type::time_point begin;
  std::thread canceller([&] {
    is_under_way();
    begin = clock_type::now();
    cancelled = true;
  });
  auto outcome = transport.send(request, sink);
  const auto end = clock_type::now();
  canceller.join();
  return {std::move(outcome), end - begin};
}

}  // namespace WANDB_RESTORE_PRIVATE_ABI
}  // namespace sockets

#endif  // _WIN32
#endif  // WANDB_RESTORE_TESTS_SOCKETS_HPP
