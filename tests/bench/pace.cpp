// Loaded into nginx (LD_PRELOAD). Lets the kernel pace every connection that nginx accepts on one port. nginx's limit_rate is
// not used: it applies per request and sends the first second's bytes at once, so it does not limit small ranges.
//
// PACE_FILE contains five 32-bit numbers in shared memory, which the benchmark may change at any time: the port; bytes per
// second of a connection; bytes per second of the slow connection; the number of the slow connection (1: the first; 0: none);
// the number of accepted connections.
// SPDX-License-Identifier: MIT
#include <arpa/inet.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>

namespace {

struct control {
  std::atomic<std::uint32_t> port, rate, slow_rate, slow, count;
};

control* open_control() {
  const char* name = std::getenv("PACE_FILE");
  const int file = name != nullptr ? open(name, O_RDWR | O_CLOEXEC) : -1;
  if (file < 0) return nullptr;
  void* const shared = mmap(nullptr, sizeof(control), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  return shared != MAP_FAILED ? static_cast<control*>(shared) : nullptr;
}

control* const all = open_control();  // opened at the start, because nginx's workers have no environment

void pace(int connection) {
  sockaddr_in here{};
  socklen_t size = sizeof here;
  if (all == nullptr || getsockname(connection, reinterpret_cast<sockaddr*>(&here), &size) != 0 ||
      here.sin_family != AF_INET || ntohs(here.sin_port) != all->port) {
    return;
  }
  const std::uint32_t number = ++all->count;
  const unsigned long rate = number == all->slow ? all->slow_rate : all->rate;
  setsockopt(connection, SOL_SOCKET, SO_MAX_PACING_RATE, &rate, sizeof rate);
}

}  // namespace

extern "C" int accept4(int listener, sockaddr* address, socklen_t* size, int flags) {
  using function = int (*)(int, sockaddr*, socklen_t*, int);
  static const auto real = reinterpret_cast<function>(dlsym(RTLD_NEXT, "accept4"));
  const int connection = real(listener, address, size, flags);
  if (connection >= 0) pace(connection);
  return connection;
}
