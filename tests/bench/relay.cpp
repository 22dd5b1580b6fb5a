// A TCP relay that simulates a distant server: relay LISTEN-PORT SERVER-PORT MILLISECONDS [RATE]. Delays every byte from the
// server by MILLISECONDS. RATE limits each connection, in bytes a second. Ends with SIGTERM.
// SPDX-License-Identifier: MIT
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

namespace {

using clock_type = std::chrono::steady_clock;

sockaddr_in loopback(int port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<std::uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return address;
}

bool send_all(int socket, const char* bytes, std::size_t size) {
  while (size > 0) {
    const ssize_t count = send(socket, bytes, size, MSG_NOSIGNAL);
    if (count <= 0) return false;
    bytes += count;
    size -= static_cast<std::size_t>(count);
  }
  return true;
}

/// The connections to one client and to the server.
class relayed_connection {
 public:
  relayed_connection(int client, int server, std::chrono::milliseconds delay, double rate)
      : client_(client), server_(server), delay_(delay), rate_(rate) {}
  relayed_connection(const relayed_connection&) = delete;
  relayed_connection& operator=(const relayed_connection&) = delete;
  ~relayed_connection() {
    close(client_);
    close(server_);
  }

  void run() {
    std::thread up([this] { forward(); });
    std::thread read([this] { receive(); });
    deliver();
    shutdown(client_, SHUT_RDWR);
    shutdown(server_, SHUT_RDWR);
    up.join();
    read.join();
  }

 private:
  struct piece {
    clock_type::time_point due;
    std::string bytes;  // empty: the server has ended
  };
  static constexpr std::size_t most_queued = 64 * 1024 * 1024;  // bytes

  void forward() {
    char buffer[65536];
    for (ssize_t count = 0; (count = recv(client_, buffer, sizeof buffer, 0)) > 0;) {
      if (!send_all(server_, buffer, static_cast<std::size_t>(count))) break;
    }
    shutdown(server_, SHUT_WR);
  }
  void receive() {
    for (bool more = true; more;) {
      std::string bytes(262144, '\0');
      const ssize_t count = recv(server_, bytes.data(), bytes.size(), 0);
      more = count > 0;
      bytes.resize(more ? static_cast<std::size_t>(count) : 0);
      std::unique_lock<std::mutex> held(mutex_);
      changed_.wait(held, [&] { return queued_ < most_queued || is_over_; });
      if (is_over_) return;
      queued_ += bytes.size();
      queue_.push_back({clock_type::now() + delay_, std::move(bytes)});
      changed_.notify_all();
    }
  }
  void deliver() {
    clock_type::time_point idle_since;  // when the rate allows the next piece
    for (bool more = true; more;) {
      piece next;
      {
        std::unique_lock<std::mutex> held(mutex_);
        changed_.wait(held, [&] { return !queue_.empty(); });
        next = std::move(queue_.front());
        queue_.pop_front();
        queued_ -= next.bytes.size();
        changed_.notify_all();
      }
      const auto begin = std::max(next.due, idle_since);
      std::this_thread::sleep_until(begin);
      if (rate_ > 0) {
        const std::chrono::duration<double> time(static_cast<double>(next.bytes.size()) / rate_);
        idle_since = begin + std::chrono::duration_cast<clock_type::duration>(time);
      }
      more = !next.bytes.empty() && send_all(client_, next.bytes.data(), next.bytes.size());
    }
    const std::lock_guard<std::mutex> guard(mutex_);
    is_over_ = true;
    changed_.notify_all();
  }

  const int client_, server_;
  const std::chrono::milliseconds delay_;
  const double rate_;  // bytes a second; 0: no limit
  std::mutex mutex_;   // guards the rest
  std::condition_variable changed_;
  std::deque<piece> queue_;
  std::size_t queued_ = 0;  // bytes
  bool is_over_ = false;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4 && argc != 5) return 2;
  std::signal(SIGPIPE, SIG_IGN);
  const int port = std::atoi(argv[2]);
  const std::chrono::milliseconds delay(std::atoi(argv[3]));
  const double rate = argc == 5 ? std::atof(argv[4]) : 0;
  const int listener = socket(AF_INET, SOCK_STREAM, 0), on = 1;
  setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  const sockaddr_in here = loopback(std::atoi(argv[1]));
  if (bind(listener, reinterpret_cast<const sockaddr*>(&here), sizeof here) != 0 || listen(listener, 64) != 0)
    return 1;
  for (int client = 0; (client = accept(listener, nullptr, nullptr)) >= 0;) {
    const int server = socket(AF_INET, SOCK_STREAM, 0);
    const sockaddr_in there = loopback(port);
    if (connect(server, reinterpret_cast<const sockaddr*>(&there), sizeof there) != 0) return 1;
    for (const int each : {client, server}) setsockopt(each, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    std::thread([connection = std::make_shared<relayed_connection>(client, server, delay, rate)] {
      connection->run();
    }).detach();
  }
  return 1;
}
