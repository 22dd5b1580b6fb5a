// The header is included twice, after macros like those of windows.h, in a program whose names are those of the library. It must
// compile, and define no macros beyond its own.
#include <algorithm>
#include <array>
#include <atomic>
#include <cctype>
#include <charconv>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <deque>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <vector>
#include <nlohmann/json.hpp>
#ifndef WANDB_RESTORE_NO_OPENSSL
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#endif
#ifndef _WIN32
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

// Every other header is included above, so that only wandb_restore.hpp meets these macros.
#undef min
#undef max
#undef small
#undef near
#undef far
#undef interface
#undef CHECK
#undef INFO
#undef IN
#undef OUT
#undef major
#undef minor
#undef DELETE
#undef ERROR
#undef unix
#undef linux
#define DELETE 1
#define ERROR 0
#define min(a, b) ((a) < (b) ? (a) : (b))
#define max(a, b) ((a) > (b) ? (a) : (b))
#define small char
#define near
#define far
#define interface struct
#define major(x) static_assert(false, "a macro of somebody else's")
#define minor(x) major(x)
#define CHECK(x) major(x)
#define INFO major
#define IN
#define OUT
#define unix 1
#define linux 1

// Functions, types and namespaces of the program.
namespace detail {
struct md5 {};
}  // namespace detail
namespace service {}
struct settings {};
struct progress {};
struct file_info {};
class error {};
class client {};
int url = 0;
int source = 0;
int phase = 0;
int restore(const char*) { return 7; }
int lower(int c) { return c; }
int split(int c) { return c; }
int trim(int c) { return c; }

#include "wandb_restore.hpp"
#include "wandb_restore.hpp"

#ifdef WANDB_RESTORE_IMPLEMENTATION
#error "the implementation was not asked for"
#endif

int main() {
  // Unqualified names still mean those of the program.
  const error mine;
  const settings own;
  const detail::md5 digest;
  (void)mine, (void)own, (void)digest;
  const auto run = wandb::run_path::parse("e/p/r");
  if (!run || run->str() != "e/p/r" || restore("") + lower(url) + split(source) + trim(phase) != 7) return 1;
  std::puts("ok");
}
