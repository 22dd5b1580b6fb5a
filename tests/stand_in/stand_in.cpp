// The stand-in server: a blocking HTTP/1.1 server with a thread per connection, over sockets and OpenSSL. The tests need exact
// control of each byte, reset and stall; a server library would repair, buffer or refuse such responses. TLS runs over memory
// BIOs, so that every byte passes through send() with MSG_NOSIGNAL and the process gets no SIGPIPE.
//
// SPDX-License-Identifier: MIT
#ifndef _FILE_OFFSET_BITS
#define _FILE_OFFSET_BITS 64  // 64-bit offsets for pread on 32-bit systems
#endif
#ifndef _GNU_SOURCE
#define _GNU_SOURCE  // POLLRDHUP
#endif
#include "stand_in.hpp"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/bio.h>
#include <openssl/ec.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <poll.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>
#ifdef __linux__
#include <linux/sockios.h>  // SIOCOUTQ
#endif

#include <algorithm>
#include <atomic>
#include <cctype>
#include <cerrno>
#include <charconv>
#include <condition_variable>
#include <cstring>
#include <ctime>
#include <fstream>
#include <list>
#include <map>
#include <mutex>
#include <nlohmann/json.hpp>
#include <random>
#include <set>
#include <stdexcept>
#include <system_error>
#include <thread>

namespace stand_in {
namespace {

using json = nlohmann::ordered_json;
using clock_type = std::chrono::steady_clock;
using std::chrono::milliseconds;

#ifdef MSG_NOSIGNAL
constexpr int no_signal = MSG_NOSIGNAL;
#else
constexpr int no_signal = 0;  // macOS: SO_NOSIGPIPE on the socket instead
#endif
#ifdef POLLRDHUP
constexpr short peer_left = POLLRDHUP | POLLHUP | POLLERR;
#else
constexpr short peer_left = POLLHUP | POLLERR;
#endif

constexpr std::size_t piece_bytes = 64 * 1024;
constexpr std::size_t max_head_bytes = 1024 * 1024;
constexpr std::size_t max_request_body_bytes = 64 * 1024 * 1024;

// ---- text ----------------------------------------------------------------------------------------------

bool same_ignoring_case(std::string_view a, std::string_view b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](unsigned char x, unsigned char y) { return std::tolower(x) == std::tolower(y); });
}

bool starts_with(std::string_view text, std::string_view start) {
  return text.substr(0, start.size()) == start;
}

std::string_view trimmed(std::string_view text) {
  const auto from = text.find_first_not_of(" \t\r\n");
  if (from == std::string_view::npos) return {};
  return text.substr(from, text.find_last_not_of(" \t\r\n") - from + 1);
}

/// Returns the part before the first `separator`, and removes it and the separator from `text`.
std::string_view take_until(std::string_view& text, char separator) {
  const auto at = text.find(separator);
  const auto part = text.substr(0, at);
  text = at == std::string_view::npos ? std::string_view() : text.substr(at + 1);
  return part;
}

std::optional<std::uint64_t> to_number(std::string_view text, int base = 10) {
  std::uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value, base);
  if (text.empty() || error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

std::string hex(const unsigned char* data, std::size_t count) {
  constexpr char digits[] = "0123456789abcdef";
  std::string out;
  for (std::size_t i = 0; i < count; ++i) {
    out += digits[data[i] >> 4];
    out += digits[data[i] & 15];
  }
  return out;
}

std::string base64(const unsigned char* data, std::size_t count) {
  std::vector<unsigned char> out(4 * ((count + 2) / 3) + 1);
  const int length = EVP_EncodeBlock(out.data(), data, static_cast<int>(count));
  return {out.begin(), out.begin() + length};
}

std::string base64(std::string_view text) {
  const std::vector<unsigned char> raw(text.begin(), text.end());
  return base64(raw.data(), raw.size());
}

std::string from_base64(std::string_view text) {
  const std::vector<unsigned char> raw(text.begin(), text.end());
  std::vector<unsigned char> out(3 * (raw.size() / 4) + 3);
  int length = EVP_DecodeBlock(out.data(), raw.data(), static_cast<int>(raw.size()));
  if (length < 0) return {};
  for (auto at = text.rbegin(); at != text.rend() && *at == '=' && length > 0; ++at) --length;
  return {out.begin(), out.begin() + length};
}

std::string percent_encoded(std::string_view text) {
  std::string out;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (std::isalnum(byte) || std::strchr("-._~/", c)) {
      out += c;
    } else {
      out += '%' + hex(&byte, 1);
    }
  }
  return out;
}

std::string percent_decoded(std::string_view text, bool plus_is_space = false) {
  std::string out;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const auto value =
        text[i] == '%' && i + 2 < text.size() ? to_number(text.substr(i + 1, 2), 16) : std::nullopt;
    if (value) {
      out += static_cast<char>(*value);
      i += 2;
    } else {
      out += plus_is_space && text[i] == '+' ? ' ' : text[i];
    }
  }
  return out;
}

/// Returns a field of a query or a form.
std::optional<std::string> form_field(std::string_view form, std::string_view name) {
  while (!form.empty()) {
    auto value = take_until(form, '&');
    if (take_until(value, '=') == name) return percent_decoded(value, true);
  }
  return std::nullopt;
}

std::string random_hex() {
  std::random_device source;
  std::array<unsigned char, 16> raw{};
  for (auto& byte : raw) byte = static_cast<unsigned char>(source());
  return hex(raw.data(), raw.size());
}

std::string http_date() {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
  gmtime_r(&now, &parts);
  std::array<char, 64> text{};
  return {text.data(), std::strftime(text.data(), text.size(), "%a, %d %b %Y %H:%M:%S GMT", &parts)};
}

std::optional<std::string> find_header(const header_list& fields, std::string_view name) {
  for (const auto& [key, value] : fields) {
    if (same_ignoring_case(key, name)) return value;
  }
  return std::nullopt;
}

void remove_header(header_list& fields, std::string_view name) {
  const auto same = [&](const auto& field) { return same_ignoring_case(field.first, name); };
  fields.erase(std::remove_if(fields.begin(), fields.end(), same), fields.end());
}

void set_header(header_list& fields, const std::string& name, std::string value) {
  remove_header(fields, name);
  fields.emplace_back(name, std::move(value));
}

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error("stand-in: " + what); }
[[noreturn]] void fail_errno(const std::string& what) {
  fail(what + ": " + std::generic_category().message(errno));
}

// ---- file descriptors and stopping ---------------------------------------------------------------------

class descriptor {
 public:
  explicit descriptor(int fd = -1) : fd_(fd) {}
  descriptor(descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  descriptor& operator=(descriptor&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~descriptor() { close(); }
  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }
  void close() {
    if (fd_ >= 0) ::close(std::exchange(fd_, -1));
  }

 private:
  int fd_;
};

void set_non_blocking(int fd) {
  fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
  fcntl(fd, F_SETFD, FD_CLOEXEC);
}

/// A flag that is raised once, and then ends every wait.
class stop_signal {
 public:
  stop_signal() {
    std::array<int, 2> ends{};
    if (pipe(ends.data()) != 0) fail_errno("pipe");
    read_end_ = descriptor(ends[0]);
    write_end_ = descriptor(ends[1]);
    set_non_blocking(ends[0]);
    set_non_blocking(ends[1]);
  }
  void raise() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (raised_.exchange(true)) return;
    }
    const ssize_t written =
        ::write(write_end_.get(), "x", 1);  // never read, so that the pipe stays readable for all waits
    static_cast<void>(written);
    condition_.notify_all();
  }
  bool raised() const { return raised_; }
  int fd() const { return read_end_.get(); }
  /// Returns false if the flag was raised before the deadline.
  bool wait_until(clock_type::time_point when) {
    std::unique_lock<std::mutex> lock(mutex_);
    return !condition_.wait_until(lock, when, [&] { return raised_.load(); });
  }

 private:
  descriptor read_end_, write_end_;
  std::mutex mutex_;
  std::condition_variable condition_;
  std::atomic<bool> raised_{false};
};

/// Waits until `fd` is ready. Returns false if stopped, or after `timeout`.
bool wait_ready(int fd, short events, const stop_signal& stop, int timeout = -1) {
  std::array<pollfd, 2> both{{{fd, events, 0}, {stop.fd(), POLLIN, 0}}};
  for (;;) {
    const int count = poll(both.data(), both.size(), timeout);
    if (count < 0 && errno == EINTR) continue;
    return count > 0 && both[1].revents == 0;
  }
}

bool would_block() { return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR; }

bool send_all(int fd, const char* data, std::size_t count, const stop_signal& stop) {
  while (count > 0) {
    const ssize_t sent = ::send(fd, data, count, no_signal);
    if (sent < 0) {
      if (!would_block() || !wait_ready(fd, POLLOUT, stop)) return false;
      continue;
    }
    data += sent;
    count -= static_cast<std::size_t>(sent);
  }
  return !stop.raised();
}

/// Returns 0 at the end of file, after an error, or if stopped.
std::size_t receive_some(int fd, char* out, std::size_t room, const stop_signal& stop) {
  for (;;) {
    if (!wait_ready(fd, POLLIN, stop)) return 0;
    const ssize_t got = ::recv(fd, out, room, 0);
    if (got >= 0) return static_cast<std::size_t>(got);
    if (!would_block()) return 0;
  }
}

sockaddr_in loopback(std::uint16_t port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return address;
}

void prepare_stream(int fd) {
  set_non_blocking(fd);
  const int on = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
#ifdef SO_NOSIGPIPE
  setsockopt(fd, SOL_SOCKET, SO_NOSIGPIPE, &on, sizeof on);
#endif
}

std::pair<descriptor, std::uint16_t> listen_on(std::uint16_t port) {
  descriptor fd(socket(AF_INET, SOCK_STREAM, 0));
  if (!fd) fail_errno("socket");
  set_non_blocking(fd.get());
  const int on = 1;
  setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  sockaddr_in address = loopback(port);
  socklen_t length = sizeof address;
  auto* const generic = reinterpret_cast<sockaddr*>(&address);
  if (bind(fd.get(), generic, length) != 0) fail_errno("bind to 127.0.0.1:" + std::to_string(port));
  if (listen(fd.get(), 256) != 0 || getsockname(fd.get(), generic, &length) != 0) fail_errno("listen");
  return {std::move(fd), ntohs(address.sin_port)};
}

// ---- TLS -----------------------------------------------------------------------------------------------

struct openssl_delete {
  void operator()(SSL* p) const { SSL_free(p); }
  void operator()(SSL_CTX* p) const { SSL_CTX_free(p); }
  void operator()(X509* p) const { X509_free(p); }
  void operator()(X509_EXTENSION* p) const { X509_EXTENSION_free(p); }
  void operator()(EVP_PKEY* p) const { EVP_PKEY_free(p); }
  void operator()(EVP_PKEY_CTX* p) const { EVP_PKEY_CTX_free(p); }
  void operator()(EVP_MD_CTX* p) const { EVP_MD_CTX_free(p); }
  void operator()(BIO* p) const { BIO_free(p); }
};
template <class T>
using owned = std::unique_ptr<T, openssl_delete>;

void check(bool good, const char* what) {
  if (!good) fail(std::string("OpenSSL: ") + what);
}

owned<EVP_PKEY> make_key() {
  const owned<EVP_PKEY_CTX> context(EVP_PKEY_CTX_new_id(EVP_PKEY_EC, nullptr));
  EVP_PKEY* key = nullptr;
  check(context && EVP_PKEY_keygen_init(context.get()) == 1 &&
            EVP_PKEY_CTX_set_ec_paramgen_curve_nid(context.get(), NID_X9_62_prime256v1) == 1 &&
            EVP_PKEY_keygen(context.get(), &key) == 1,
        "cannot make a key");
  return owned<EVP_PKEY>(key);
}

struct identity {
  owned<EVP_PKEY> key;
  owned<X509> certificate;
};

/// Makes a certificate signed by `issuer`, or self-signed if that is null.
identity make_identity(const std::string& name, const identity* issuer, long from_seconds, long to_seconds,
                       const std::vector<std::pair<int, std::string>>& extensions) {
  identity made{make_key(), owned<X509>(X509_new())};
  X509* const x = made.certificate.get();
  check(x != nullptr, "cannot make a certificate");
  static std::atomic<long> serial{std::time(nullptr)};
  X509_set_version(x, 2);
  ASN1_INTEGER_set(X509_get_serialNumber(x), ++serial);
  X509_gmtime_adj(X509_getm_notBefore(x), from_seconds);
  X509_gmtime_adj(X509_getm_notAfter(x), to_seconds);
  X509_set_pubkey(x, made.key.get());
  const std::vector<unsigned char> raw(name.begin(), name.end());
  X509_NAME_add_entry_by_txt(X509_get_subject_name(x), "CN", MBSTRING_UTF8, raw.data(),
                             static_cast<int>(raw.size()), -1, 0);
  X509* const signer = issuer ? issuer->certificate.get() : x;
  X509_set_issuer_name(x, X509_get_subject_name(signer));
  X509V3_CTX context;
  std::memset(&context, 0, sizeof context);
  X509V3_set_ctx(&context, signer, x, nullptr, nullptr, 0);
  for (const auto& [id, text] : extensions) {
    const owned<X509_EXTENSION> extension(X509V3_EXT_conf_nid(nullptr, &context, id, text.c_str()));
    check(extension && X509_add_ext(x, extension.get(), -1) == 1, "cannot add an extension");
  }
  check(X509_sign(x, issuer ? issuer->key.get() : made.key.get(), EVP_sha256()) > 0, "cannot sign");
  return made;
}

constexpr long day_seconds = 24 * 60 * 60;

identity make_authority(const std::string& name, const identity* issuer = nullptr) {
  return make_identity(name, issuer, -day_seconds, 30 * day_seconds,
                       {{NID_basic_constraints, "critical,CA:TRUE"},
                        {NID_key_usage, "critical,keyCertSign,cRLSign"},
                        {NID_subject_key_identifier, "hash"}});
}

identity make_server_identity(const identity& authority, certificate kind,
                              const std::vector<std::string>& more_hosts) {
  std::string hosts = "DNS:localhost,IP:127.0.0.1,IP:::1";
  for (const auto& host : more_hosts) {
    const bool is_address = host.find_first_not_of("0123456789.") == std::string::npos;
    hosts += (is_address ? ",IP:" : ",DNS:") + host;
  }
  if (kind == certificate::wrong_host) hosts = "DNS:elsewhere.invalid";
  const bool expired = kind == certificate::expired;
  return make_identity("stand-in server", &authority, expired ? -2 * day_seconds : -day_seconds,
                       expired ? -day_seconds : 30 * day_seconds,
                       {{NID_subject_alt_name, hosts},
                        {NID_basic_constraints, "critical,CA:FALSE"},
                        {NID_key_usage, "critical,digitalSignature"},
                        {NID_ext_key_usage, "serverAuth"},
                        {NID_subject_key_identifier, "hash"},
                        {NID_authority_key_identifier, "keyid"}});
}

owned<SSL_CTX> make_context(const identity& who, tls_versions versions) {
  owned<SSL_CTX> context(SSL_CTX_new(TLS_server_method()));
  check(context && SSL_CTX_use_certificate(context.get(), who.certificate.get()) == 1 &&
            SSL_CTX_use_PrivateKey(context.get(), who.key.get()) == 1,
        "cannot use the certificate");
  SSL_CTX_set_min_proto_version(context.get(),
                                versions == tls_versions::only_1_3 ? TLS1_3_VERSION : TLS1_2_VERSION);
  SSL_CTX_set_max_proto_version(context.get(),
                                versions == tls_versions::only_1_2 ? TLS1_2_VERSION : TLS1_3_VERSION);
  constexpr unsigned char session_context[] = "stand-in";
  SSL_CTX_set_session_id_context(context.get(), session_context, sizeof session_context - 1);
  return context;
}

std::string pem_of(X509* x) {
  const owned<BIO> out(BIO_new(BIO_s_mem()));
  check(out && PEM_write_bio_X509(out.get(), x) == 1, "cannot write PEM");
  std::string text(BIO_ctrl_pending(out.get()), '\0');
  BIO_read(out.get(), text.data(), static_cast<int>(text.size()));
  return text;
}

/// An accepted connection, plain or TLS. Only its own thread uses it.
class connection {
 public:
  connection(descriptor fd, SSL_CTX* context, stop_signal& stop) : fd_(std::move(fd)), stop_(stop) {
    if (!context) return;
    tls_.reset(SSL_new(context));
    from_peer_ = BIO_new(BIO_s_mem());
    to_peer_ = BIO_new(BIO_s_mem());
    check(tls_ && from_peer_ && to_peer_, "cannot begin TLS");
    SSL_set_bio(tls_.get(), from_peer_, to_peer_);  // the SSL object owns the BIOs from here on
    SSL_set_accept_state(tls_.get());
  }

  bool is_tls() const { return tls_ != nullptr; }
  int fd() const { return fd_.get(); }
  /// Limits the kernel's buffer: from now on the peer has read all sent bytes except about 100 KiB.
  void buffer_little() const {
    const int bytes = 64 * 1024;
    setsockopt(fd(), SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
  }
  std::string buffer;  ///< received and not used yet

  bool handshake() {
    return advance([&] { return SSL_do_handshake(tls_.get()); }) > 0;
  }

  /// Appends received bytes to the buffer. Returns false if the peer closed, or if stopped.
  bool fill() {
    std::array<char, 16384> room;
    std::size_t got = 0;
    if (tls_) {
      const int read =
          advance([&] { return SSL_read(tls_.get(), room.data(), static_cast<int>(room.size())); });
      got = read > 0 ? static_cast<std::size_t>(read) : 0;
    } else {
      got = receive_some(fd(), room.data(), room.size(), stop_);
    }
    buffer.append(room.data(), got);
    return got > 0;
  }

  bool send(std::string_view text) {
    if (!tls_) return send_all(fd(), text.data(), text.size(), stop_);
    ERR_clear_error();
    return text.empty() || (SSL_write(tls_.get(), text.data(), static_cast<int>(text.size())) > 0 && flush());
  }

  bool peer_gone() const {
    pollfd one{fd(), peer_left, 0};
    return poll(&one, 1, 0) > 0 && (one.revents & peer_left) != 0;
  }

  /// Closes in order: close_notify if requested, then FIN. Then it reads and discards bytes for a while: closing a socket with
  /// unread bytes would send a reset, which can overtake the sent bytes.
  void close(bool notify) {
    if (!fd_) return;
    if (tls_ && notify && SSL_is_init_finished(tls_.get())) {
      ERR_clear_error();
      SSL_shutdown(tls_.get());
      flush();
    }
    ::shutdown(fd(), SHUT_WR);
    const auto deadline = clock_type::now() + milliseconds(500);
    std::array<char, 4096> waste;
    while (!stop_.raised()) {
      const auto left = std::chrono::duration_cast<milliseconds>(deadline - clock_type::now()).count();
      if (left <= 0 || !wait_ready(fd(), POLLIN, stop_, static_cast<int>(left))) break;
      const ssize_t got = ::recv(fd(), waste.data(), waste.size(), 0);
      if (got == 0 || (got < 0 && !would_block())) break;
    }
    fd_.close();
  }

  /// Closes with RST. First waits until the peer's system has received all sent bytes, so that their number is certain.
  void reset() {
    if (!fd_) return;
#ifdef __linux__
    const auto deadline = clock_type::now() + std::chrono::seconds(2);
    int unsent = 0;
    while (ioctl(fd(), SIOCOUTQ, &unsent) == 0 && unsent > 0 && clock_type::now() < deadline) {
      if (!stop_.wait_until(clock_type::now() + milliseconds(1))) break;
    }
#endif
    const linger at_once{1, 0};
    setsockopt(fd(), SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
    fd_.close();
  }

 private:
  /// Runs an OpenSSL operation, and moves bytes between OpenSSL and the socket. Returns > 0 on success.
  template <class Step>
  int advance(Step step) {
    for (;;) {
      ERR_clear_error();
      const int result = step();
      const int error = result > 0 ? SSL_ERROR_NONE : SSL_get_error(tls_.get(), result);
      if (!flush() || result > 0) return result;
      if (error != SSL_ERROR_WANT_READ) return 0;
      std::array<char, 16384> room;
      const std::size_t got = receive_some(fd(), room.data(), room.size(), stop_);
      if (got == 0) return 0;
      BIO_write(from_peer_, room.data(), static_cast<int>(got));
    }
  }

  bool flush() {
    outgoing_.resize(BIO_ctrl_pending(to_peer_));
    if (outgoing_.empty()) return true;
    BIO_read(to_peer_, outgoing_.data(), static_cast<int>(outgoing_.size()));
    return send_all(fd(), outgoing_.data(), outgoing_.size(), stop_);
  }

  descriptor fd_;
  stop_signal& stop_;
  owned<SSL> tls_;
  BIO* from_peer_ = nullptr;
  BIO* to_peer_ = nullptr;
  std::vector<char> outgoing_;
};

// ---- content -------------------------------------------------------------------------------------------

class text_content : public content {
 public:
  explicit text_content(std::string text) : text_(std::move(text)) {}
  std::uint64_t size() const override { return text_.size(); }
  void read(std::uint64_t offset, char* out, std::size_t count) const override {
    text_.copy(out, count, static_cast<std::size_t>(offset));
  }
  std::string fingerprint() const override { return text_; }

 private:
  std::string text_;
};

class disk_content : public content {
 public:
  explicit disk_content(const std::filesystem::path& path)
      : path_(path.string()), fd_(::open(path_.c_str(), O_RDONLY | O_CLOEXEC)) {
    struct stat facts {};
    if (!fd_ || fstat(fd_.get(), &facts) != 0) fail_errno("cannot open " + path_);
    if (!S_ISREG(facts.st_mode)) fail(path_ + " is not a regular file");
    size_ = static_cast<std::uint64_t>(facts.st_size);
    changed_ = facts.st_mtime;
  }
  std::uint64_t size() const override { return size_; }
  void read(std::uint64_t offset, char* out, std::size_t count) const override {
    while (count > 0) {
      const ssize_t got = pread(fd_.get(), out, count, static_cast<off_t>(offset));
      if (got < 0 && errno == EINTR) continue;
      if (got <= 0) fail("cannot read " + path_);
      out += got;
      offset += static_cast<std::uint64_t>(got);
      count -= static_cast<std::size_t>(got);
    }
  }
  std::string fingerprint() const override {
    return path_ + " " + std::to_string(size_) + " " + std::to_string(changed_);
  }

 private:
  std::string path_;
  descriptor fd_;
  std::uint64_t size_ = 0;
  std::time_t changed_ = 0;
};

class generated_content : public content {
 public:
  generated_content(std::uint64_t size, std::uint64_t seed) : size_(size), seed_(seed) {}
  std::uint64_t size() const override { return size_; }
  void read(std::uint64_t offset, char* out, std::size_t count) const override {
    while (count > 0) {
      const std::uint64_t word = mixed(offset / 8);
      std::array<char, 8> raw;
      for (unsigned i = 0; i < 8; ++i)
        raw[i] = static_cast<char>(word >> (8 * i));  // little endian on every machine
      const auto skip = static_cast<std::size_t>(offset % 8);
      const std::size_t taken = std::min(count, raw.size() - skip);
      std::memcpy(out, raw.data() + skip, taken);
      out += taken;
      offset += taken;
      count -= taken;
    }
  }
  std::string fingerprint() const override {
    return std::to_string(size_) + " of seed " + std::to_string(seed_);
  }

 private:
  /// splitmix64
  std::uint64_t mixed(std::uint64_t index) const {
    std::uint64_t z = (seed_ + index + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }

  std::uint64_t size_, seed_;
};

/// `head`, filler up to the size, `tail`.
class filler_content : public content {
 public:
  filler_content(std::string head, std::uint64_t size, std::string tail)
      : head_(std::move(head)), tail_(std::move(tail)),
        size_(std::max<std::uint64_t>(size, head_.size() + tail_.size())) {}
  std::uint64_t size() const override { return size_; }
  void read(std::uint64_t offset, char* out, std::size_t count) const override {
    for (std::size_t i = 0; i < count; ++i, ++offset) {
      const std::uint64_t to_end = size_ - offset;
      if (offset < head_.size()) {
        out[i] = head_[static_cast<std::size_t>(offset)];
      } else {
        out[i] = to_end <= tail_.size() ? tail_[tail_.size() - static_cast<std::size_t>(to_end)] : 'a';
      }
    }
  }
  std::string fingerprint() const override { return head_ + std::to_string(size_); }

 private:
  std::string head_, tail_;
  std::uint64_t size_;
};

/// A content with other bytes from an offset on.
class altered_content : public content {
 public:
  altered_content(content_ptr base, std::uint64_t from, std::uint64_t to = UINT64_MAX)
      : base_(std::move(base)), from_(from), to_(to) {}
  std::uint64_t size() const override { return base_->size(); }
  void read(std::uint64_t offset, char* out, std::size_t count) const override {
    base_->read(offset, out, count);
    for (std::size_t i = 0; i < count; ++i) {
      if (offset + i >= from_ && offset + i < to_) out[i] = static_cast<char>(out[i] ^ 0x5a);
    }
  }
  std::string fingerprint() const override {
    return base_->fingerprint() + " altered from " + std::to_string(from_);
  }

 private:
  content_ptr base_;
  std::uint64_t from_, to_;
};

class md5_hash {
 public:
  md5_hash() : context_(EVP_MD_CTX_new()) {
    check(context_ && EVP_DigestInit_ex(context_.get(), EVP_md5(), nullptr) == 1, "no MD5");
  }
  void add(const char* data, std::size_t count) { EVP_DigestUpdate(context_.get(), data, count); }
  std::array<unsigned char, 16> end() {
    std::array<unsigned char, 16> digest{};
    EVP_DigestFinal_ex(context_.get(), digest.data(), nullptr);
    return digest;
  }

 private:
  owned<EVP_MD_CTX> context_;
};

std::array<unsigned char, 16> md5_of(const content& of) {
  md5_hash hash;
  std::vector<char> piece(piece_bytes);
  for (std::uint64_t at = 0; at < of.size();) {
    const auto count = static_cast<std::size_t>(std::min<std::uint64_t>(piece.size(), of.size() - at));
    of.read(at, piece.data(), count);
    hash.add(piece.data(), count);
    at += count;
  }
  return hash.end();
}

/// A file of a run. Its md5 is computed once, on demand.
class stored_file {
 public:
  stored_file(content_ptr what, file_attributes how)
      : content_(std::move(what)), attributes_(std::move(how)) {
    md5_hash hash;
    const std::string print = content_->fingerprint();
    hash.add(print.data(), print.size());
    const auto digest = hash.end();
    etag_ = '"' + hex(digest.data(), digest.size()) + '"';
  }
  const content_ptr& what() const { return content_; }
  const file_attributes& attributes() const { return attributes_; }

  /// Returns the ETag with its quotes, or an empty string.
  std::string etag() const {
    switch (attributes_.etag) {
      case etag_form::strong: return etag_;
      case etag_form::weak: return "W/" + etag_;
      case etag_form::none: break;
    }
    return {};
  }

  json md5() const {
    switch (attributes_.md5_as) {
      case md5_form::null: return nullptr;
      case md5_form::absent: return json(json::value_t::discarded);
      case md5_form::base64:
      case md5_form::hex: break;
    }
    if (attributes_.md5) return *attributes_.md5;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!digest_) digest_ = md5_of(*content_);
    const bool as_hex = attributes_.md5_as == md5_form::hex;
    return as_hex ? hex(digest_->data(), digest_->size()) : base64(digest_->data(), digest_->size());
  }

  json size_bytes() const {
    const std::uint64_t size = attributes_.size.value_or(content_->size());
    switch (attributes_.size_as) {
      case size_form::number: return size;
      case size_form::string: return std::to_string(size);
      case size_form::null: return nullptr;
      case size_form::absent: break;
    }
    return json(json::value_t::discarded);
  }

 private:
  content_ptr content_;
  file_attributes attributes_;
  std::string etag_;
  mutable std::mutex mutex_;
  mutable std::optional<std::array<unsigned char, 16>> digest_;
};
using file_ptr = std::shared_ptr<const stored_file>;

// ---- GraphQL -------------------------------------------------------------------------------------------

/// An error of a GraphQL query.
class question_error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct field {
  std::string alias, name;
  json arguments = json::object();
  std::vector<field> fields;
};

/// Adds a field to a selection. Fields of the same alias become one, as in GraphQL section 5.3.2.
void add_field(std::vector<field>& selection, field one) {
  const auto same = std::find_if(selection.begin(), selection.end(),
                                 [&](const field& present) { return present.alias == one.alias; });
  if (same == selection.end()) {
    selection.push_back(std::move(one));
  } else {
    for (auto& inner : one.fields) add_field(same->fields, std::move(inner));
  }
}

/// Parses a query and substitutes its variables. Supports the syntax that clients of runs and files use: one operation with
/// variables and their defaults, arguments, aliases, fragments, and the directives @include and @skip.
class query_reader {
 public:
  query_reader(std::string_view text, const json& variables) : text_(text), given_(variables) { next(); }

  std::vector<field> read() {
    // A fragment uses the operation's variables, and may stand in front of it: first find where each begins.
    std::optional<position> operation;
    while (!token_.empty()) {
      if (accept("fragment")) {
        const std::string name = read_name();
        expect("on");
        read_name();
        fragments_[name] = {at_, token_};
      } else if (operation || (token_ != "query" && token_ != "{")) {
        throw question_error("Syntax Error: expected one query, found \"" + token_ + "\"");
      } else {
        operation = {at_, token_};
      }
      skip_definition();
    }
    if (!operation) throw question_error("Syntax Error: expected a query");
    std::tie(at_, token_) = *operation;
    if (accept("query")) {
      if (is_name()) next();
      if (accept("(")) read_variables();
    }
    return read_fields();
  }

 private:
  using position =
      std::pair<std::size_t, std::string>;  // of the reader: the offset behind a token, the token

  /// Goes behind a definition's selection and looks at nothing in it.
  void skip_definition() {
    while (token_ != "{" && !token_.empty()) next();
    int open = 0;
    do {
      if (token_.empty()) throw question_error("Syntax Error: expected \"}\", found the end");
      open += token_ == "{" ? 1 : token_ == "}" ? -1 : 0;
      next();
    } while (open > 0);
  }

  bool is_name() const {
    return !token_.empty() && (std::isalpha(static_cast<unsigned char>(token_[0])) || token_[0] == '_');
  }

  void next() {
    while (at_ < text_.size()) {
      if (text_[at_] == '#') {
        at_ = std::min(text_.find('\n', at_), text_.size());
      } else if (std::isspace(static_cast<unsigned char>(text_[at_])) || text_[at_] == ',') {
        ++at_;
      } else {
        break;
      }
    }
    const std::size_t from = at_;
    const auto in_word = [&] {
      return at_ < text_.size() &&
             (std::isalnum(static_cast<unsigned char>(text_[at_])) || std::strchr("_.-", text_[at_]));
    };
    if (at_ >= text_.size()) {
      token_.clear();
      return;
    }
    if (text_[at_] == '"') {
      for (++at_; at_ < text_.size() && text_[at_] != '"'; ++at_) at_ += text_[at_] == '\\';
      if (at_ >= text_.size()) throw question_error("Syntax Error: unterminated string");
      ++at_;
    } else if (starts_with(text_.substr(at_), "...")) {
      at_ += 3;
    } else if (in_word()) {
      while (in_word()) ++at_;
    } else {
      ++at_;
    }
    token_ = std::string(text_.substr(from, at_ - from));
  }

  bool accept(std::string_view token) {
    if (token_ != token) return false;
    next();
    return true;
  }

  void expect(std::string_view token) {
    if (!accept(token)) {
      throw question_error("Syntax Error: expected \"" + std::string(token) + "\", found \"" + token_ + "\"");
    }
  }

  std::string read_name() {
    if (!is_name()) throw question_error("Syntax Error: expected a name, found \"" + token_ + "\"");
    std::string name = token_;
    next();
    return name;
  }

  json read_value() {
    if (accept("$")) {
      const std::string name = read_name();
      const auto found = variables_.find(name);
      if (found == variables_.end()) throw question_error("Variable \"$" + name + "\" is not defined.");
      return *found;
    }
    if (accept("[")) {
      json list = json::array();
      while (!accept("]")) list.push_back(read_value());
      return list;
    }
    json value = json::parse(token_, nullptr, false);
    if (value.is_discarded()) throw question_error("Syntax Error: unexpected \"" + token_ + "\"");
    next();
    return value;
  }

  struct type {
    std::string name;
    bool required = false, list = false;
  };

  type read_type() {
    type read;
    if (accept("[")) {
      read.list = true;
      read.name = read_name();
      accept("!");
      expect("]");
    } else {
      read.name = read_name();
    }
    read.required = accept("!");
    return read;
  }

  static bool fits(const json& value, const std::string& name) {
    if (value.is_null()) return true;
    if (name == "Int") return value.is_number_integer();
    if (name == "Boolean") return value.is_boolean();
    if (name == "String" || name == "ID") return value.is_string();
    return true;
  }

  void read_variables() {
    while (!accept(")")) {
      expect("$");
      const std::string name = read_name();
      expect(":");
      const type wanted = read_type();
      json value = accept("=") ? read_value() : json();
      const bool given = given_.contains(name);
      if (given) value = given_.at(name);
      if (wanted.required && value.is_null()) {
        throw question_error("Variable \"$" + name + "\" of required type \"" + wanted.name +
                             "!\" was not provided.");
      }
      const bool good =
          wanted.list && value.is_array()
              ? std::all_of(value.begin(), value.end(), [&](const json& v) { return fits(v, wanted.name); })
              : fits(value, wanted.name);
      if (!good) throw question_error("Variable \"$" + name + "\" got an invalid value.");
      variables_[name] = std::move(value);
    }
  }

  std::vector<field> read_fields() {
    if (++depth_ > 32) throw question_error("Syntax Error: nested too deeply");
    std::vector<field> fields;
    expect("{");
    while (!accept("}")) {
      if (accept("...")) {
        for (auto& inner : read_spread()) add_field(fields, std::move(inner));
        continue;
      }
      field one;
      one.alias = one.name = read_name();
      if (accept(":")) one.name = read_name();
      if (accept("(")) {
        while (!accept(")")) {
          const std::string name = read_name();
          expect(":");
          one.arguments[name] = read_value();
        }
      }
      const bool wanted = read_directives();
      if (token_ == "{") one.fields = read_fields();
      if (wanted) add_field(fields, std::move(one));
    }
    --depth_;
    return fields;
  }

  /// The fields of "... on TYPE {}" or of the fragment in "...NAME". Every type is taken to be the right one.
  std::vector<field> read_spread() {
    std::string fragment;
    if (accept("on")) {
      read_name();
    } else if (is_name()) {
      fragment = read_name();
    }
    const bool wanted = read_directives();
    std::vector<field> fields;
    if (fragment.empty()) {
      fields = read_fields();
    } else {
      const auto found = fragments_.find(fragment);
      if (found == fragments_.end()) throw question_error("Unknown fragment \"" + fragment + "\".");
      const position behind{at_, token_};
      std::tie(at_, token_) = found->second;
      fields = read_fields();  // which bounds the depth, and with it fragments that contain themselves
      std::tie(at_, token_) = behind;
    }
    if (!wanted) fields.clear();
    return fields;
  }

  /// False if @include or @skip leaves out what stands in front of them.
  bool read_directives() {
    bool wanted = true;
    while (accept("@")) {
      const std::string name = read_name();
      if (name != "include" && name != "skip") throw question_error("Unknown directive \"@" + name + "\".");
      expect("(");
      expect("if");
      expect(":");
      const json condition = read_value();
      expect(")");
      if (!condition.is_boolean()) throw question_error("Directive \"@" + name + "\" takes a Boolean.");
      wanted = wanted && condition.get<bool>() == (name == "include");
    }
    return wanted;
  }

  std::string_view text_;
  std::size_t at_ = 0;
  std::string token_;
  const json& given_;
  json variables_ = json::object();
  std::map<std::string, position> fragments_;  // where each fragment's selection begins
  int depth_ = 0;
};

using resolver = std::function<json(const field&)>;
using resolvers = std::map<std::string, resolver, std::less<>>;

/// Returns only the selected fields of an object. Discarded values are left out.
json select(const std::vector<field>& fields, const std::string& type, const resolvers& known,
            const std::vector<std::string>& unknown) {
  if (fields.empty())
    throw question_error("Field of type \"" + type + "\" must have a selection of subfields.");
  json out = json::object();
  for (const auto& one : fields) {
    if (one.name == "__typename") {
      out[one.alias] = type;
      continue;
    }
    const auto found = known.find(one.name);
    if (found == known.end() || std::count(unknown.begin(), unknown.end(), one.name) > 0) {
      throw question_error("Cannot query field \"" + one.name + "\" on type \"" + type + "\".");
    }
    json value = found->second(one);
    if (!value.is_discarded()) out[one.alias] = std::move(value);
  }
  return out;
}

resolver constant(json value) {
  return [value = std::move(value)](const field&) { return value; };
}

/// SQL's LIKE: % matches any text, _ any character.
bool is_like(std::string_view text, std::string_view pattern) {
  if (pattern.empty()) return text.empty();
  if (pattern[0] == '%')
    return is_like(text, pattern.substr(1)) || (!text.empty() && is_like(text.substr(1), pattern));
  return !text.empty() && (pattern[0] == '_' || pattern[0] == text[0]) &&
         is_like(text.substr(1), pattern.substr(1));
}

json graphql_errors_json(const std::vector<std::string>& texts) {
  json errors = json::array();
  for (const auto& text : texts) errors.push_back({{"message", text}});
  return {{"errors", std::move(errors)}};
}

}  // namespace

// ---- faults --------------------------------------------------------------------------------------------

struct circumstances {
  bool ignore_range = false;
  std::optional<std::string> etag;
  std::optional<std::uint64_t> changed_from;
};

struct reply {
  enum class opening { answer, hang, drop, refuse };
  enum class framing { length, chunked, until_close, none };
  enum class ending { clean, abrupt, reset };

  opening begin = opening::answer;
  std::vector<int> interim;
  std::optional<std::string> status_line;  // instead of the usual status line
  int status = 0;
  header_list fields;
  unsigned filler_headers = 0;
  bool endless_header = false;

  content_ptr body;
  std::uint64_t offset = 0, length = 0;  // the part of the file that is sent
  bool endless_body = false;
  bool from_storage = false;  // file bytes, subject to the rate limits
  framing frame = framing::length;
  std::int64_t promised_more = 0;

  std::optional<std::uint64_t> cut_after, stall_after;
  ending cut_as = ending::clean;
  std::optional<milliseconds> drip_interval;
  std::size_t drip_bytes = 1;
  bool close = false, close_silently = false;

  void set_body(std::string text, const std::string& type) {
    set_header(fields, "Content-Type", type);
    length = text.size();
    offset = 0;
    body = bytes(std::move(text));
  }
  void become(int code) {
    status = code;
    fields.clear();
    body = nullptr;
    offset = length = 0;
    from_storage = false;
    frame = framing::length;
  }
};

namespace {

reply text_reply(int status, std::string body, const std::string& type, header_list fields = {}) {
  reply made;
  made.status = status;
  made.fields = std::move(fields);
  made.set_body(std::move(body), type);
  return made;
}

reply json_reply(int status, const json& body) {
  return text_reply(status, body.dump(-1, ' ', false, json::error_handler_t::replace), "application/json");
}

/// An error document in the format of object stores.
reply xml_reply(int status, const std::string& code, const std::string& message) {
  return text_reply(status,
                    "<?xml version='1.0' encoding='UTF-8'?><Error><Code>" + code + "</Code><Message>" +
                        message + "</Message></Error>",
                    "application/xml; charset=UTF-8");
}

action on_reply(std::function<void(reply&)> change) { return {nullptr, std::move(change)}; }
action beforehand(std::function<void(circumstances&)> change) { return {std::move(change), nullptr}; }
action begin_with(reply::opening how) {
  return on_reply([how](reply& r) { r.begin = how; });
}
action cut_with(std::uint64_t after, reply::ending how) {
  return on_reply([=](reply& r) {
    r.cut_after = after;
    r.cut_as = how;
  });
}

}  // namespace

namespace act {

action hang() { return begin_with(reply::opening::hang); }
action drop() { return begin_with(reply::opening::drop); }
action refuse() { return begin_with(reply::opening::refuse); }

action status(int code, header_list fields, std::string body) {
  return on_reply([=](reply& r) {
    r.become(code);
    r.set_body(body, "text/plain; charset=utf-8");
    for (const auto& [name, value] : fields) set_header(r.fields, name, value);
  });
}
action too_many_requests(std::string retry_after) {
  return status(429, {{"Retry-After", std::move(retry_after)}, {"Content-Type", "application/json"}},
                R"({"error":"rate limit exceeded"})");
}
action html(int code) {
  return status(code, {{"Content-Type", "text/html"}},
                "<html><head><title>" + std::to_string(code) +
                    "</title></head><body><center><h1>Not today</h1></center><hr>gateway</body></html>\n");
}
action body(std::string text, std::string type) {
  return status(200, {{"Content-Type", std::move(type)}}, std::move(text));
}
action malformed_json() { return body(R"({"data":{"project":{"run":{"files":{"edges":[{"node")"); }
action wrong_shape() {
  return body(R"({"data":{"project":[{"run":"none"},7],"viewer":"me"},"access_token":{}})");
}
action graphql_errors(std::vector<std::string> texts) { return body(graphql_errors_json(texts).dump()); }
action redirect_to(std::string location, int code) {
  return status(code, {{"Location", std::move(location)}});
}
action oversize(std::uint64_t size) {
  return on_reply([=](reply& r) {
    r.become(200);
    set_header(r.fields, "Content-Type", "application/json");
    r.body = std::make_shared<filler_content>("{\"data\":\"", size, "\"}");
    r.length = r.body->size();
  });
}
action endless_body() {
  return on_reply([](reply& r) {
    r.endless_body = true;
    r.frame = reply::framing::chunked;
  });
}

action interim(int code, unsigned count) {
  return on_reply([=](reply& r) { r.interim.insert(r.interim.end(), count, code); });
}
action header(std::string name, std::string value) {
  return on_reply([=](reply& r) { set_header(r.fields, name, value); });
}
action without_header(std::string name) {
  return on_reply([=](reply& r) { remove_header(r.fields, name); });
}
action many_headers(unsigned count) {
  return on_reply([=](reply& r) { r.filler_headers = count; });
}
action endless_header() {
  return on_reply([](reply& r) { r.endless_header = true; });
}
action garbage_status_line(std::string line) {
  return on_reply([=](reply& r) { r.status_line = line; });
}
action close_after() {
  return on_reply([](reply& r) { r.close = true; });
}
action close_silently() {
  return on_reply([](reply& r) { r.close_silently = true; });
}
action chunked() {
  return on_reply([](reply& r) { r.frame = reply::framing::chunked; });
}
action until_close() {
  return on_reply([](reply& r) { r.frame = reply::framing::until_close; });
}
action length_off_by(std::int64_t promised_more) {
  return on_reply([=](reply& r) { r.promised_more = promised_more; });
}
action content_range(bad_range how) {
  return on_reply([how](reply& r) {
    if (r.status != 206 || !r.body) return;
    const std::uint64_t first = r.offset, last = r.offset + r.length - 1, total = r.body->size();
    const auto say = [&](std::uint64_t a, std::uint64_t b, const std::string& of) {
      set_header(r.fields, "Content-Range",
                 "bytes " + std::to_string(a) + "-" + std::to_string(b) + "/" + of);
    };
    switch (how) {
      case bad_range::missing: remove_header(r.fields, "Content-Range"); break;
      case bad_range::shifted: say(first + 1, last + 1, std::to_string(total + 1)); break;
      case bad_range::wrong_end: say(first, last + 1, std::to_string(total + 1)); break;
      case bad_range::wrong_total: say(first, last, std::to_string(total + 1)); break;
      case bad_range::unknown_total: say(first, last, "*"); break;
      case bad_range::garbage: set_header(r.fields, "Content-Range", "lines one-two/three"); break;
    }
  });
}

action flip_byte(std::uint64_t offset) {
  return on_reply([=](reply& r) {
    if (r.from_storage && r.body) r.body = std::make_shared<altered_content>(r.body, offset, offset + 1);
  });
}
action cut(std::uint64_t after) { return cut_with(after, reply::ending::clean); }
action cut_abruptly(std::uint64_t after) { return cut_with(after, reply::ending::abrupt); }
action reset(std::uint64_t after) { return cut_with(after, reply::ending::reset); }
action stall(std::uint64_t after) {
  return on_reply([=](reply& r) { r.stall_after = after; });
}
action drip(milliseconds interval, std::size_t count) {
  return on_reply([=](reply& r) {
    r.drip_interval = interval;
    r.drip_bytes = std::max<std::size_t>(count, 1);
  });
}
action ignore_range() {
  return beforehand([](circumstances& c) { c.ignore_range = true; });
}
action etag(std::string text) {
  return beforehand([=](circumstances& c) { c.etag = text; });
}
action changed_content(std::uint64_t from) {
  return beforehand([=](circumstances& c) { c.changed_from = from; });
}

}  // namespace act

namespace {

using fault_arguments = std::vector<std::string>;

[[noreturn]] void refuse_spec(const std::string& what) { throw std::invalid_argument("fault: " + what); }

std::uint64_t number_in(const std::string& text) {
  const auto value = to_number(text);
  if (!value) refuse_spec('"' + text + "\" is not a number");
  return *value;
}
template <class Integer>
Integer small_number_in(const std::string& text) {
  const std::uint64_t value = number_in(text);
  if (value > static_cast<std::uint64_t>(INT32_MAX)) refuse_spec(text + " is too large");
  return static_cast<Integer>(value);
}

struct fault_word {
  const char* name;
  const char* arguments;
  const char* meaning;
  std::size_t least, most;  // the number of arguments
  action (*make)(const fault_arguments&);
};

const std::vector<fault_word>& fault_words() {
  using args = const fault_arguments&;
  static const std::vector<fault_word> words = {
      {"hang", "", "never answer (connect: hang in the handshake)", 0, 0, [](args) { return act::hang(); }},
      {"drop", "", "close in place of an answer", 0, 0, [](args) { return act::drop(); }},
      {"refuse", "", "reset in place of an answer", 0, 0, [](args) { return act::refuse(); }},
      {"status", "CODE[,NAME:VALUE...]", "answer with this status and these headers", 1, 32,
       [](args a) {
         header_list fields;
         for (auto it = a.begin() + 1; it != a.end(); ++it) {
           std::string_view value = *it;
           const std::string name(trimmed(take_until(value, ':')));
           fields.emplace_back(name, trimmed(value));
         }
         return act::status(small_number_in<int>(a[0]), std::move(fields));
       }},
      {"limit", "SECONDS", "429 with Retry-After", 1, 1, [](args a) { return act::too_many_requests(a[0]); }},
      {"html", "CODE", "an HTML error page", 1, 1,
       [](args a) { return act::html(small_number_in<int>(a[0])); }},
      {"malformed", "", "JSON that breaks off", 0, 0, [](args) { return act::malformed_json(); }},
      {"shape", "", "JSON of a wrong shape", 0, 0, [](args) { return act::wrong_shape(); }},
      {"errors", "TEXT[,TEXT...]", "200 with GraphQL errors", 1, 32,
       [](args a) { return act::graphql_errors(a); }},
      {"redirect", "ADDRESS", "302 to there", 1, 1, [](args a) { return act::redirect_to(a[0]); }},
      {"oversize", "BYTES", "a JSON document of that size", 1, 1,
       [](args a) { return act::oversize(number_in(a[0])); }},
      {"endless-body", "", "a body without end", 0, 0, [](args) { return act::endless_body(); }},
      {"interim", "CODE[,COUNT]", "1xx responses first", 1, 2,
       [](args a) {
         return act::interim(small_number_in<int>(a[0]), a.size() > 1 ? small_number_in<unsigned>(a[1]) : 1);
       }},
      {"header", "NAME,VALUE", "set a header", 2, 2, [](args a) { return act::header(a[0], a[1]); }},
      {"without-header", "NAME", "leave one out", 1, 1, [](args a) { return act::without_header(a[0]); }},
      {"many-headers", "COUNT", "that many more headers", 1, 1,
       [](args a) { return act::many_headers(small_number_in<unsigned>(a[0])); }},
      {"endless-header", "", "a head without end", 0, 0, [](args) { return act::endless_header(); }},
      {"garbage", "", "a status line that is none", 0, 0, [](args) { return act::garbage_status_line(); }},
      {"close", "", "Connection: close", 0, 0, [](args) { return act::close_after(); }},
      {"close-silently", "", "close although keep-alive was promised", 0, 0,
       [](args) { return act::close_silently(); }},
      {"chunked", "", "chunks in place of a length", 0, 0, [](args) { return act::chunked(); }},
      {"until-close", "", "neither length nor chunks", 0, 0, [](args) { return act::until_close(); }},
      {"longer", "BYTES", "Content-Length promises so many more", 1, 1,
       [](args a) { return act::length_off_by(small_number_in<std::int64_t>(a[0])); }},
      {"shorter", "BYTES", "Content-Length promises so many fewer", 1, 1,
       [](args a) { return act::length_off_by(-small_number_in<std::int64_t>(a[0])); }},
      {"content-range", "missing|shifted|wrong-end|wrong-total|unknown-total|garbage",
       "a wrong Content-Range", 1, 1,
       [](args a) {
         static const std::map<std::string, bad_range> known = {{"missing", bad_range::missing},
                                                                {"shifted", bad_range::shifted},
                                                                {"wrong-end", bad_range::wrong_end},
                                                                {"wrong-total", bad_range::wrong_total},
                                                                {"unknown-total", bad_range::unknown_total},
                                                                {"garbage", bad_range::garbage}};
         const auto found = known.find(a[0]);
         if (found == known.end()) refuse_spec("no content-range \"" + a[0] + '"');
         return act::content_range(found->second);
       }},
      {"flip", "OFFSET", "a wrong byte there", 1, 1, [](args a) { return act::flip_byte(number_in(a[0])); }},
      {"cut", "BYTES", "close after so many bytes of body", 1, 1,
       [](args a) { return act::cut(number_in(a[0])); }},
      {"cut-abruptly", "BYTES", "the same without TLS close_notify", 1, 1,
       [](args a) { return act::cut_abruptly(number_in(a[0])); }},
      {"reset", "BYTES", "reset after so many", 1, 1, [](args a) { return act::reset(number_in(a[0])); }},
      {"stall", "BYTES", "send nothing more after so many", 1, 1,
       [](args a) { return act::stall(number_in(a[0])); }},
      {"drip", "MILLISECONDS[,BYTES]", "so many bytes (1) in each interval", 1, 2,
       [](args a) {
         return act::drip(milliseconds(small_number_in<int>(a[0])),
                          a.size() > 1 ? small_number_in<std::size_t>(a[1]) : 1);
       }},
      {"ignore-range", "", "200 and the whole file", 0, 0, [](args) { return act::ignore_range(); }},
      {"etag", "TEXT", "another ETag", 1, 1, [](args a) { return act::etag('"' + a[0] + '"'); }},
      {"changed", "[OFFSET]", "another content from there on, with its own ETag", 0, 1,
       [](args a) { return act::changed_content(a.empty() ? 0 : number_in(a[0])); }},
  };
  return words;
}

const std::map<std::string_view, place>& place_names() {
  static const std::map<std::string_view, place> names = {
      {"any", place::any},    {"connect", place::connect}, {"graphql", place::graphql},
      {"oidc", place::oidc},  {"files", place::files},     {"storage", place::storage},
      {"proxy", place::proxy}};
  return names;
}

}  // namespace

std::pair<target, action> parse_fault(std::string_view spec) {
  const std::size_t name_end = spec.find_first_of("(#@:");
  const auto known_place = place_names().find(spec.substr(0, name_end));
  if (known_place == place_names().end())
    refuse_spec("no place \"" + std::string(spec.substr(0, name_end)) + '"');
  if (name_end == std::string_view::npos) refuse_spec("a ':' and what happens are missing");
  target where(known_place->second);
  spec.remove_prefix(name_end);
  if (spec[0] == '(') {
    const auto close = spec.find(')');
    if (close == std::string_view::npos) refuse_spec("no ')' to the '('");
    where.matching(std::string(spec.substr(1, close - 1)));
    spec.remove_prefix(close + 1);
  }
  std::string_view what = spec;
  std::string_view which = take_until(what, ':');
  while (!which.empty()) {
    const char sign = which[0];
    const auto end = std::min(which.find_first_of("#@", 1), which.size());
    std::string_view value = which.substr(1, end - 1);
    which.remove_prefix(end);
    if (sign == '@') {
      where.covering(number_in(std::string(value)));
    } else if (sign == '#') {
      const bool is_span = value.find('-') != std::string_view::npos;
      const auto first = small_number_in<unsigned>(std::string(take_until(value, '-')));
      where.nth(first, !is_span        ? first
                       : value.empty() ? UINT32_MAX
                                       : small_number_in<unsigned>(std::string(value)));
    } else {
      refuse_spec("expected '#', '@' or ':' before \"" + std::string(1, sign) + '"');
    }
  }
  const std::string word(take_until(what, '='));
  fault_arguments arguments;
  while (!what.empty()) arguments.emplace_back(take_until(what, ','));
  for (const auto& known : fault_words()) {
    if (word != known.name) continue;
    if (arguments.size() < known.least || arguments.size() > known.most) {
      refuse_spec(word + " takes " + (*known.arguments ? known.arguments : "no argument"));
    }
    return {where, known.make(arguments)};
  }
  refuse_spec("nothing is known of \"" + word + '"');
}

std::string fault_notation() {
  std::string text =
      "WHERE[(TEXT)][#N[-[M]]][@OFFSET]:WHAT[=ARGUMENT,...]\n"
      "  WHERE    connect, graphql, oidc, files (where they redirect), storage (where bytes come from), "
      "proxy, any\n"
      "  (TEXT)   only where the path (graphql: the request's body; connect: the origin's name) contains it\n"
      "  #N-M     only the Nth to the Mth of those requests; #N: that one; #N-: from there on; otherwise "
      "all\n"
      "  @OFFSET  only ranges that contain this offset\n"
      "WHAT is one of\n";
  for (const auto& word : fault_words()) {
    std::string head =
        "  " + std::string(word.name) + (*word.arguments ? std::string("=") + word.arguments : "");
    head.resize(std::max<std::size_t>(head.size() + 2, 26), ' ');
    text += head + word.meaning + "\n";
  }
  return text + "for example  storage#1:reset=100000  graphql#1-3:status=503  storage(model.h5)@0:flip=7\n";
}

// ---- content and records, as declared ------------------------------------------------------------------

content_ptr bytes(std::string text) { return std::make_shared<text_content>(std::move(text)); }
content_ptr from_disk(const std::filesystem::path& path) { return std::make_shared<disk_content>(path); }
content_ptr generated(std::uint64_t size, std::uint64_t seed) {
  return std::make_shared<generated_content>(size, seed);
}

std::string read_text(const content& from, std::uint64_t offset, std::uint64_t count) {
  offset = std::min(offset, from.size());
  std::string text(static_cast<std::size_t>(std::min(count, from.size() - offset)), '\0');
  if (!text.empty()) from.read(offset, text.data(), text.size());
  return text;
}
std::string md5_base64(const content& of) {
  const auto digest = md5_of(of);
  return base64(digest.data(), digest.size());
}
std::string md5_hex(const content& of) {
  const auto digest = md5_of(of);
  return hex(digest.data(), digest.size());
}

std::optional<std::string> request_record::header(std::string_view name) const {
  return find_header(headers, name);
}

std::string_view name_of(origin at) {
  constexpr std::array<std::string_view, origin_count> names = {"service", "storage", "proxy"};
  return names.at(static_cast<std::size_t>(at));
}
std::string_view name_of(request_kind kind) {
  constexpr std::array<std::string_view, request_kind_count> names = {"graphql", "oidc",  "files",
                                                                      "storage", "proxy", "other"};
  return names.at(static_cast<std::size_t>(kind));
}

// ---- the server ----------------------------------------------------------------------------------------

namespace {

struct request {
  std::string method, target, path, query, body;
  header_list headers;
  std::optional<std::string> header(std::string_view name) const { return find_header(headers, name); }
};

/// The interpretation of a request.
struct route {
  request_kind kind = request_kind::other;
  place at = place::any;
  std::string match;  // the text in which a fault's pattern is searched
  run_ref run;
  std::string name;
  bool direct = false;  // the service sends the file without a redirect
};

struct span {
  std::uint64_t first, last;  // inclusive
};

/// Parses a Range header with one range. nullopt: to be ignored; first > last: cannot be satisfied.
std::optional<span> parse_range(const std::string& text, std::uint64_t size) {
  std::string_view rest = text;
  if (take_until(rest, '=') != "bytes" || rest.find(',') != std::string_view::npos) return std::nullopt;
  const bool has_dash = rest.find('-') != std::string_view::npos;
  const std::string_view from = trimmed(take_until(rest, '-')), to = trimmed(rest);
  const auto first = to_number(from), last = to_number(to);
  if (!has_dash || (!from.empty() && !first) || (!to.empty() && !last) || (!first && !last))
    return std::nullopt;
  if (!first) return size == 0 || *last == 0 ? span{1, 0} : span{size - std::min(*last, size), size - 1};
  if (last && *last < *first) return std::nullopt;
  return *first >= size ? span{1, 0} : span{*first, std::min(last.value_or(size - 1), size - 1)};
}

bool lists_etag(const std::string& header, const std::string& etag) {
  if (trimmed(header) == "*") return true;
  std::string_view rest = header;
  while (!rest.empty()) {
    if (trimmed(take_until(rest, ',')) == etag)
      return !etag.empty() && etag[0] == '"';  // only strong tags match
  }
  return false;
}

/// Schedules bytes so that `rate` bytes per second are not exceeded.
class pacer {
 public:
  clock_type::time_point reserve(std::size_t count, std::uint64_t rate) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto now = clock_type::now();
    if (rate == 0) return now;
    const auto start = std::max(now, next_);
    const double seconds = static_cast<double>(count) / static_cast<double>(rate);
    next_ = start + std::chrono::duration_cast<clock_type::duration>(std::chrono::duration<double>(seconds));
    return start;
  }

 private:
  std::mutex mutex_;
  clock_type::time_point next_;
};

/// A run and its files. An answer uses a snapshot, which shares the files until one is added or removed.
class stored_run {
 public:
  using file_map = std::map<std::string, file_ptr>;

  std::string state = "finished";
  bool is_public = false;

  const file_map& files() const { return *files_; }
  /// Returns the files in order to change them.
  file_map& own_files() {
    if (is_shared_) files_ = std::make_shared<file_map>(*files_);
    is_shared_ = false;
    return *files_;
  }
  stored_run snapshot() {
    is_shared_ = true;
    return *this;
  }

 private:
  std::shared_ptr<file_map> files_ = std::make_shared<file_map>();
  bool is_shared_ = false;
};

struct fault_rule {
  target where;
  action what;
  unsigned matched = 0;
  std::size_t struck = 0;
  bool active = true;
};

struct signature {
  std::string path;
  unsigned used = 0;
};

enum class caller { nobody, known, wrong };

std::string text_of(const run_ref& run) { return run.entity + "/" + run.project + "/" + run.id; }

std::size_t index_of(origin at) { return static_cast<std::size_t>(at); }

}  // namespace

class server::implementation {
 public:
  explicit implementation(options how) : how_(std::move(how)) {
    while (!how_.prefix.empty() && how_.prefix.back() == '/') how_.prefix.pop_back();
    if (!how_.prefix.empty() && how_.prefix.front() != '/') how_.prefix.insert(0, 1, '/');
    const identity authority = make_authority("stand-in authority");
    const identity other = make_authority("an authority that nobody knows");
    const identity intermediate = make_authority("stand-in intermediate authority", &authority);
    ca_pem_ = pem_of(authority.certificate.get());
    intermediate_pem_ = pem_of(intermediate.certificate.get());
    const auto prepare = [&](origin at, bool tls, certificate kind, std::uint16_t port) {
      auto& it = listeners_.at(index_of(at));
      std::tie(it.fd, it.port) = listen_on(port);
      if (!tls) return;
      const identity& issuer = kind == certificate::other_authority ? other
                               : how_.through_intermediate          ? intermediate
                                                                    : authority;
      it.tls = make_context(make_server_identity(issuer, kind, how_.more_hosts), how_.versions);
      if (how_.through_intermediate) {
        check(SSL_CTX_add1_chain_cert(it.tls.get(), intermediate.certificate.get()) == 1,
              "cannot add to the chain");
      }
      if (how_.demands_client_certificate) {
        SSL_CTX_set_verify(it.tls.get(), SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, nullptr);
      }
    };
    prepare(origin::service, how_.service_tls, how_.service_certificate, how_.service_port);
    prepare(origin::storage, how_.storage_tls, how_.storage_certificate, how_.storage_port);
    if (how_.proxy) prepare(origin::proxy, false, certificate::good, how_.proxy_port);
    for (const origin at : {origin::service, origin::storage, origin::proxy}) {
      auto& it = listeners_.at(index_of(at));
      if (it.fd) it.thread = std::thread([this, at] { accept_loop(at); });
    }
  }

  ~implementation() { stop(); }

  void stop() {
    stop_.raise();
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      changed_.notify_all();
    }
    const std::lock_guard<std::mutex> only_one(stop_mutex_);
    for (auto& one : listeners_) {
      if (one.thread.joinable()) one.thread.join();
      one.fd.close();
    }
    for (auto& one : workers_) one.thread.join();  // complete: the acceptors have ended
    workers_.clear();
  }

  // -- addresses --

  std::string address(origin at) const {
    const auto& it = listeners_.at(index_of(at));
    if (at == origin::service && !how_.service_url.empty()) return how_.service_url;
    if (at == origin::storage && !how_.storage_url.empty()) return how_.storage_url;
    return (it.tls ? "https://" : "http://") + how_.host + ":" + std::to_string(it.port);
  }
  std::string base_url() const { return address(origin::service) + how_.prefix; }
  static std::string file_path(const run_ref& run, std::string_view name) {
    return percent_encoded(text_of(run)) + "/" + percent_encoded(name);
  }
  std::string files_path(const run_ref& run, std::string_view name) const {
    return how_.prefix + "/files/" + file_path(run, name);
  }
  std::string sign(const run_ref& run, std::string_view name) {
    const std::string path = text_of(run) + "/" + std::string(name);
    const std::string secret = random_hex();
    const std::lock_guard<std::mutex> lock(mutex_);
    signatures_[secret] = {path, 0};
    ++counters_.signatures_made;
    changed_.notify_all();
    return address(origin::storage) + "/bucket/" + file_path(run, name) + "?X-Signature=" + secret +
           "&X-Expires=3600";
  }

  // -- threads and connections --

  struct listener {
    descriptor fd;
    std::uint16_t port = 0;
    owned<SSL_CTX> tls;
    std::thread thread;
  };

  void accept_loop(origin at) {
    block_signals();
    auto& mine = listeners_.at(index_of(at));
    while (wait_ready(mine.fd.get(), POLLIN, stop_)) {
      descriptor fd(::accept(mine.fd.get(), nullptr, nullptr));
      if (!fd) {
        // for example out of descriptors: the connection stays in the queue until others end
        if (!would_block() && !stop_.wait_until(clock_type::now() + milliseconds(10))) break;
        continue;
      }
      prepare_stream(fd.get());
      const std::lock_guard<std::mutex> lock(workers_mutex_);
      for (auto it = workers_.begin(); it != workers_.end();) {
        if (it->done) {
          it->thread.join();
          it = workers_.erase(it);
        } else {
          ++it;
        }
      }
      workers_.emplace_back();
      auto& added = workers_.back();
      added.thread = std::thread([this, at, &added, socket = std::make_shared<descriptor>(std::move(fd))] {
        block_signals();
        serve(at, std::move(*socket));
        added.done = true;
      });
    }
  }

  /// Blocks signals in this thread: the threads of the host process handle them.
  static void block_signals() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, nullptr);
  }

  void serve(origin at, descriptor fd) {
    std::uint64_t id = 0;
    change([&] {
      id = next_connection_++;
      ++counters_.by_origin.at(index_of(at)).connections;
      ++counters_.by_origin.at(index_of(at)).open_connections;
    });
    bool open = true;
    const auto closed = [&] {
      if (std::exchange(open, false))
        change([&] { --counters_.by_origin.at(index_of(at)).open_connections; });
    };
    try {
      connection peer(std::move(fd), listeners_.at(index_of(at)).tls.get(), stop_);
      const reply::ending end = converse(at, id, peer);
      closed();
      if (end == reply::ending::reset) {
        peer.reset();
      } else {
        peer.close(end == reply::ending::clean);
      }
    } catch (const std::exception&) {
      closed();  // a disk error, or out of memory: the connection is closed
    }
  }

  /// Serves a connection from accept to close. Returns how to close it.
  reply::ending converse(origin at, std::uint64_t id, connection& peer) {
    reply at_connect;
    for (const auto& one : strike(place::connect, std::string(name_of(at)), std::nullopt)) {
      if (one.after) one.after(at_connect);
    }
    if (const auto end = not_begun(at_connect, peer)) return *end;
    if (peer.is_tls()) {
      const bool good = peer.handshake();
      change([&] {
        auto& counted = counters_.by_origin.at(index_of(at));
        ++(good ? counted.handshakes : counted.failed_handshakes);
      });
      if (!good) return reply::ending::abrupt;
    }
    for (;;) {
      request asked;
      const int problem = read_request(peer, asked);
      if (problem < 0) return reply::ending::clean;
      if (problem > 0) {
        reply refused = text_reply(problem, "the request is malformed or too large\n", "text/plain");
        refused.close = true;
        send(refused, false, std::nullopt, peer);
        return reply::ending::clean;
      }
      const route where = route_of(at, asked);
      const std::size_t number = record(at, id, where.kind, asked);
      auto end = reply::ending::clean;
      bool again = false;
      try {
        again = where.kind == request_kind::proxy ? forward(asked, number, peer, end)
                                                  : respond(asked, where, number, peer, end);
      } catch (...) {
        finish(number);
        throw;
      }
      finish(number);
      if (!again) return end;
    }
  }

  /// Returns how to close if a fault prevents the answer. A hanging request is answered once it is released.
  std::optional<reply::ending> not_begun(const reply& what, connection& peer) {
    switch (what.begin) {
      case reply::opening::answer: return std::nullopt;
      case reply::opening::hang:
        if (hold(peer)) return std::nullopt;
        return reply::ending::abrupt;
      case reply::opening::drop: return reply::ending::clean;
      case reply::opening::refuse: break;
    }
    return reply::ending::reset;
  }

  /// Waits until release(). Returns false if stopped, or if the peer closed.
  bool hold(connection& peer) {
    std::unique_lock<std::mutex> lock(mutex_);
    const auto generation = releases_;
    ++counters_.stalled;
    changed_.notify_all();
    bool gone = false;
    while (!gone && !stop_.raised() && generation == releases_) {
      changed_.wait_for(lock, milliseconds(50));
      gone = peer.peer_gone();
    }
    --counters_.stalled;
    changed_.notify_all();
    return generation != releases_ && !gone && !stop_.raised();
  }

  // -- requests --

  /// Returns 0 after a request, < 0 if the peer closed, or the status to refuse the request with.
  int read_request(connection& peer, request& out) {
    std::string& buffer = peer.buffer;
    std::size_t end = 0;
    while ((end = buffer.find("\r\n\r\n")) == std::string::npos) {
      if (buffer.size() > max_head_bytes) return 431;
      if (!peer.fill()) return -1;
    }
    const std::string head = buffer.substr(0, end + 2);
    buffer.erase(0, end + 4);
    std::string_view rest = head;
    std::string_view line = trimmed(take_until(rest, '\n'));
    out.method = std::string(take_until(line, ' '));
    out.target = std::string(take_until(line, ' '));
    if (out.target.empty() || !starts_with(line, "HTTP/1.")) return 400;
    while (!rest.empty()) {
      std::string_view value = trimmed(take_until(rest, '\n'));
      if (value.find(':') == std::string_view::npos) return 400;
      const std::string name(take_until(value, ':'));
      out.headers.emplace_back(name, trimmed(value));
    }
    std::string_view path = out.target;
    path = take_until(path, '#');
    std::string_view query = path;
    out.path = percent_decoded(take_until(query, '?'));
    out.query = std::string(query);
    return read_body(peer, out);
  }

  int read_body(connection& peer, request& out) {
    std::string& buffer = peer.buffer;
    if (out.header("Expect")) peer.send("HTTP/1.1 100 Continue\r\n\r\n");
    const auto take = [&](std::uint64_t count) {
      while (buffer.size() < count) {
        if (!peer.fill()) return false;
      }
      out.body.append(buffer, 0, static_cast<std::size_t>(count));
      buffer.erase(0, static_cast<std::size_t>(count));
      return true;
    };
    if (same_ignoring_case(out.header("Transfer-Encoding").value_or(""), "chunked")) {
      for (;;) {
        std::size_t end = 0;
        while ((end = buffer.find("\r\n")) == std::string::npos) {
          if (!peer.fill()) return -1;
        }
        std::string_view line(buffer.data(), end);
        const auto size = to_number(trimmed(take_until(line, ';')), 16);
        if (!size || *size > max_request_body_bytes || out.body.size() > max_request_body_bytes) return 400;
        buffer.erase(0, end + 2);
        if (!take(*size + 2))
          return -1;  // the last chunk ends with an empty line, because no trailers are sent
        out.body.resize(out.body.size() - 2);
        if (*size == 0) return 0;
      }
    }
    const auto promised = out.header("Content-Length");
    if (!promised) return 0;
    const auto length = to_number(*promised);
    if (!length) return 400;
    if (*length > max_request_body_bytes) return 413;
    return take(*length) ? 0 : -1;
  }

  route route_of(origin at, const request& asked) {
    if (at == origin::proxy) return {request_kind::proxy, place::proxy, asked.target, {}, {}, false};
    std::string_view raw = asked.target;
    raw = take_until(raw, '?');
    route where;
    where.match = asked.path;
    if (at == origin::storage) {
      if (!starts_with(raw, "/bucket/")) return where;
      where.kind = request_kind::storage;
      where.at = place::storage;
      raw.remove_prefix(std::strlen("/bucket/"));
    } else {
      if (!starts_with(raw, how_.prefix)) return where;
      raw.remove_prefix(how_.prefix.size());
      if (raw == "/graphql") return {request_kind::graphql, place::graphql, asked.body, {}, {}, false};
      if (raw == "/oidc/token") return {request_kind::oidc, place::oidc, asked.path, {}, {}, false};
      if (!starts_with(raw, "/files/")) return where;
      where.kind = request_kind::files;
      raw.remove_prefix(std::strlen("/files/"));
      const std::lock_guard<std::mutex> lock(mutex_);
      where.direct = how_.redirect_to == redirect::none || form_field(asked.query, "direct").has_value();
      where.at = where.direct ? place::storage : place::files;
    }
    where.run.entity = percent_decoded(take_until(raw, '/'));
    where.run.project = percent_decoded(take_until(raw, '/'));
    where.run.id = percent_decoded(take_until(raw, '/'));
    where.name = percent_decoded(raw);
    return where;
  }

  std::size_t record(origin at, std::uint64_t id, request_kind kind, const request& asked) {
    request_record made;
    std::function<void(const request_record&)> callback;
    change([&] {
      made.number = next_request_++;
      made.at = at;
      made.kind = kind;
      made.connection = id;
      made.method = asked.method;
      made.target = asked.target;
      made.path = asked.path;
      made.query = asked.query;
      made.headers = asked.headers;
      made.body = asked.body;
      requests_.push_back(made);
      ++counters_.by_kind.at(static_cast<std::size_t>(kind)).requests;
      callback = on_request_;
    });
    if (callback) callback(made);
    return made.number;
  }

  /// Changes a request's record and the counters of its kind.
  template <class Change>
  void update(std::size_t number, Change apply) {
    change([&] {
      if (requests_.empty() || number < requests_.front().number)
        return;  // the log was cleared in the meantime
      auto& record = requests_[number - requests_.front().number];
      apply(record, counters_.by_kind.at(static_cast<std::size_t>(record.kind)));
    });
  }
  void finish(std::size_t number) {
    update(number, [](request_record& one, kind_counters& kind) {
      one.finished = true;
      if (one.status != 0) ++kind.answered;
    });
  }
  /// Adds to the number of sent bytes. A negative `count` takes back an earlier one.
  void count_sent(std::size_t number, std::int64_t count) {
    update(number, [count](request_record& one, kind_counters& kind) {
      one.body_sent += static_cast<std::uint64_t>(count);
      kind.body_bytes += static_cast<std::uint64_t>(count);
    });
  }

  // -- answers --

  bool respond(const request& asked, const route& where, std::size_t number, connection& peer,
               reply::ending& end) {
    const file_ptr file = find_file(where.run, where.name);
    std::optional<span> range;
    if (file && where.at == place::storage) {
      const std::uint64_t size = file->what()->size();
      if (const auto text = asked.header("Range")) range = parse_range(*text, size);
      if (!range && size > 0) range = span{0, size - 1};
    }
    const auto struck = strike(where.at, where.match, range);
    circumstances given;
    for (const auto& one : struck) {
      if (one.before) one.before(given);
    }
    reply answer = answer_to(asked, where, file, given);
    for (const auto& one : struck) {
      if (one.after) one.after(answer);
    }
    if (const auto early = not_begun(answer, peer)) {
      end = *early;
      return false;
    }
    const bool wants_close = same_ignoring_case(asked.header("Connection").value_or(""), "close");
    if (wants_close) answer.close = true;
    end = answer.cut_as;
    return send(answer, asked.method == "HEAD", number, peer);
  }

  reply answer_to(const request& asked, const route& where, const file_ptr& file,
                  const circumstances& given) {
    switch (where.kind) {
      case request_kind::graphql: return answer_graphql(asked);
      case request_kind::oidc: return answer_oidc(asked);
      case request_kind::files: return answer_files(asked, where, file, given);
      case request_kind::storage: return answer_storage(asked, where, file, given);
      case request_kind::proxy:
      case request_kind::other: break;
    }
    return json_reply(404, {{"error", "not found"}});
  }

  caller who(const request& asked) {
    const auto header = asked.header("Authorization");
    if (!header) return caller::nobody;
    std::string_view value = *header;
    const auto scheme = take_until(value, ' ');
    const std::lock_guard<std::mutex> lock(mutex_);
    if (same_ignoring_case(scheme, "Basic") && from_base64(value) == "api:" + how_.key) return caller::known;
    if (same_ignoring_case(scheme, "Bearer") && tokens_.count(std::string(value)) > 0) return caller::known;
    return caller::wrong;
  }

  reply answer_graphql(const request& asked) {
    if (asked.method != "POST") return json_reply(405, graphql_errors_json({"POST it"}));
    const std::string type = asked.header("Content-Type").value_or("");
    if (!starts_with(type, "application/json"))
      return json_reply(400, graphql_errors_json({"expected application/json"}));
    const caller by = who(asked);
    if (by == caller::wrong) return json_reply(401, graphql_errors_json({"invalid API key"}));
    const json body = json::parse(asked.body, nullptr, false);
    if (!body.is_object() || !body.contains("query") || !body["query"].is_string()) {
      return json_reply(400, graphql_errors_json({"Must provide query string."}));
    }
    const json variables = body.value("variables", json());
    if (!variables.is_null() && !variables.is_object()) {
      return json_reply(400, graphql_errors_json({"Variables must be provided as an object."}));
    }
    try {
      const json given = variables.is_null() ? json::object() : variables;
      const std::string query = body["query"].get<std::string>();
      const auto fields = query_reader(query, given).read();
      return json_reply(200, {{"data", data_for(fields, by == caller::known)}});
    } catch (const question_error& error) {
      return json_reply(400, graphql_errors_json({error.what()}));
    }
  }

  json data_for(const std::vector<field>& fields, bool known) {
    const auto project = [&](const field& one) { return project_json(one, known); };
    return select(fields, "Query",
                  {{"project", project},
                   {"model", project},
                   {"viewer", [&](const field& one) { return known ? viewer_json(one) : json(); }}},
                  how_.unknown_fields);
  }

  json viewer_json(const field& asked) const {
    const json entity = how_.viewer_entity ? json(*how_.viewer_entity) : json();
    const json name = how_.viewer_entity.value_or("somebody");
    const auto nobody = [&](const field& one) {
      return select(one.fields, "Connection", {{"edges", constant(json::array())}}, how_.unknown_fields);
    };
    return select(asked.fields, "User",
                  {{"id", constant("VXNlcjox")},
                   {"entity", constant(entity)},
                   {"username", constant(name)},
                   {"name", constant(name)},
                   {"email", constant("somebody@example.invalid")},
                   {"flags", constant("{}")},
                   {"admin", constant(false)},
                   {"deletedAt", constant(nullptr)},
                   {"apiKeys", nobody},
                   {"teams", nobody}},
                  how_.unknown_fields);
  }

  static std::string string_argument(const field& asked, const char* name) {
    const json value = asked.arguments.value(name, json());
    return value.is_string() ? value.get<std::string>() : std::string();
  }

  json project_json(const field& asked, bool known) {
    run_ref run{string_argument(asked, "entityName"), string_argument(asked, "name"), {}};
    if (run.entity.empty() && known) run.entity = how_.viewer_entity.value_or("");
    const std::string start = run.entity + "/" + run.project + "/";
    bool visible = false;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (auto it = runs_.lower_bound(start); it != runs_.end() && starts_with(it->first, start); ++it) {
        visible = visible || known || it->second.is_public;
      }
    }
    if (!visible) return nullptr;
    const auto run_field = [&](const field& one) { return run_json(one, run, known); };
    return select(asked.fields, "Project",
                  {{"id", constant("UHJvamVjdDox")},
                   {"internalId", constant("1")},
                   {"name", constant(run.project)},
                   {"entityName", constant(run.entity)},
                   {"createdAt", constant("2024-01-01T00:00:00")},
                   {"isBenchmark", constant(false)},
                   {"readOnly", constant(false)},
                   {"user", [&](const field& one) { return viewer_json(one); }},
                   {"run", run_field},
                   {"bucket", run_field}},
                  how_.unknown_fields);
  }

  json run_json(const field& asked, run_ref run, bool known) {
    run.id = string_argument(asked, "name");
    stored_run stored;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = runs_.find(text_of(run));
      if (found == runs_.end() || !(known || found->second.is_public)) return nullptr;
      stored = found->second.snapshot();
    }
    return select(asked.fields, "Run",
                  {{"id", constant(base64("Run:v1:" + text_of(run)))},
                   {"projectId", constant("1")},
                   {"name", constant(run.id)},
                   {"displayName", constant(run.id)},
                   {"state", constant(stored.state)},
                   {"tags", constant(json::array())},
                   {"sweepName", constant(nullptr)},
                   {"config", constant("{}")},
                   {"group", constant(nullptr)},
                   {"jobType", constant(nullptr)},
                   {"commit", constant(nullptr)},
                   {"readOnly", constant(false)},
                   {"description", constant(nullptr)},
                   {"notes", constant(nullptr)},
                   {"systemMetrics", constant("{}")},
                   {"summaryMetrics", constant("{}")},
                   {"historyLineCount", constant(0)},
                   {"historyKeys", constant(json::object())},
                   {"user", [&](const field& one) { return viewer_json(one); }},
                   {"createdAt", constant("2024-01-02T03:00:00")},
                   {"heartbeatAt", constant("2024-01-02T03:04:05")},
                   {"fileCount", constant(stored.files().size())},
                   {"files", [&](const field& one) { return files_json(one, run, stored); }}},
                  how_.unknown_fields);
  }

  json files_json(const field& asked, const run_ref& run, const stored_run& stored) {
    const json names = asked.arguments.value("names", json());
    const json pattern = asked.arguments.value("pattern", json());
    const bool by_name = names.is_array() && !names.empty();
    if (by_name && pattern.is_string()) throw question_error("names and pattern exclude each other");
    std::vector<std::pair<std::string_view, file_ptr>>
        chosen;  // the names are those of `names` or of `stored`
    if (by_name) {
      for (const auto& name : names) {
        if (!name.is_string()) continue;
        const auto found = stored.files().find(name.get<std::string>());
        const bool there = found != stored.files().end();
        if (there || how_.node_for_missing)
          chosen.emplace_back(name.get_ref<const std::string&>(), there ? found->second : nullptr);
      }
    } else {
      for (const auto& [name, file] : stored.files()) {
        if (!pattern.is_string() || is_like(name, pattern.get<std::string>()))
          chosen.emplace_back(name, file);
      }
    }
    const json limit = asked.arguments.value("first", json());
    const std::size_t most = limit.is_number_unsigned() ? limit.get<std::size_t>() : 50;
    std::string_view cursor_left;
    const std::string cursor = from_base64(string_argument(asked, "after"));
    cursor_left = cursor;
    take_until(cursor_left, ':');
    const auto after = to_number(cursor_left);
    if (!string_argument(asked, "after").empty() && !after) throw question_error("invalid cursor");
    const std::size_t begin =
        after ? static_cast<std::size_t>(std::min<std::uint64_t>(*after + 1, chosen.size())) : 0;
    const std::size_t end = begin + std::min(most, chosen.size() - begin);
    const auto cursor_at = [](std::size_t index) { return base64("file:" + std::to_string(index)); };

    const auto edges = [&](const field& one) {
      json list = json::array();
      for (std::size_t i = begin; i < end; ++i) {
        const auto node = [&](const field& inner) {
          return node_json(inner, run, std::string(chosen[i].first), chosen[i].second);
        };
        list.push_back(select(one.fields, "FileEdge", {{"node", node}, {"cursor", constant(cursor_at(i))}},
                              how_.unknown_fields));
      }
      return list;
    };
    const auto page = [&](const field& one) {
      const json last = end > begin ? json(cursor_at(end - 1)) : json();
      return select(one.fields, "PageInfo",
                    {{"endCursor", constant(last)}, {"hasNextPage", constant(end < chosen.size())}},
                    how_.unknown_fields);
    };
    return select(asked.fields, "FileConnection", {{"edges", edges}, {"pageInfo", page}},
                  how_.unknown_fields);
  }

  /// `file` is null for a name that was never uploaded, for which the service still has a node.
  json node_json(const field& asked, const run_ref& run, const std::string& name, const file_ptr& file) {
    const file_attributes given = file ? file->attributes() : file_attributes{};
    const auto url = [&](const field&) -> json {
      return given.url.value_or(address(origin::service) + files_path(run, name));
    };
    const auto direct = [&](const field&) -> json {
      return given.direct_url ? *given.direct_url : sign(run, name);
    };
    const auto md5 = [&](const field&) -> json { return file ? file->md5() : json("0"); };
    return select(asked.fields, "File",
                  {{"id", constant(base64("File:" + text_of(run) + ":" + name))},
                   {"name", constant(name)},
                   {"url", url},
                   {"directUrl", direct},
                   {"sizeBytes", constant(file ? file->size_bytes() : json(0))},
                   {"mimetype", constant(given.mimetype)},
                   {"updatedAt", constant(file && given.updated_at ? json(*given.updated_at) : json())},
                   {"md5", md5}},
                  how_.unknown_fields);
  }

  reply answer_oidc(const request& asked) {
    if (asked.method != "POST") return json_reply(405, {{"error", "POST it"}});
    if (form_field(asked.body, "grant_type") != "urn:ietf:params:oauth:grant-type:jwt-bearer") {
      return json_reply(400, {{"error", "unsupported_grant_type"}});
    }
    const std::string token = form_field(asked.body, "assertion").value_or("");
    if (std::count(how_.identity_tokens.begin(), how_.identity_tokens.end(), token) == 0) {
      return json_reply(401, {{"error", "invalid_grant"}});
    }
    const std::string access = "token-" + random_hex();
    change([&] { tokens_.insert(access); });
    return json_reply(
        200, {{"access_token", access}, {"token_type", "Bearer"}, {"expires_in", how_.token_seconds}});
  }

  reply answer_files(const request& asked, const route& where, const file_ptr& file,
                     const circumstances& given) {
    const caller by = who(asked);
    redirect to{};
    unsigned hops = 0;
    int status = 0;
    bool allowed = false;
    std::function<std::string(const run_ref&, const std::string&)> addresses;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      addresses = addresses_;
      const auto run = runs_.find(text_of(where.run));
      allowed = by != caller::wrong && (by == caller::known || (run != runs_.end() && run->second.is_public));
      to = how_.redirect_to;
      hops = how_.redirect_hops;
      status = how_.redirect_status;
    }
    if (!allowed) return json_reply(401, {{"error", "user is not logged in"}});
    if (!file) return json_reply(404, {{"error", "file not found"}});
    if (where.direct) return file_reply(asked, *file, given);

    const std::string here = files_path(where.run, where.name);
    const std::uint64_t hop = to_number(form_field(asked.query, "hop").value_or("0")).value_or(0);
    std::string location;
    if (to == redirect::relative) {
      location = here + "?direct=1";
    } else if (to == redirect::loop || (to == redirect::chain && hop < hops)) {
      location = base_url() + here.substr(how_.prefix.size()) + "?hop=" + std::to_string(hop + 1);
    } else {
      location = addresses ? addresses(where.run, where.name) : sign(where.run, where.name);
      if (to == redirect::plain_http && starts_with(location, "https:")) location.erase(4, 1);
      if (to == redirect::other_host)
        location.replace(location.find(how_.host), how_.host.size(), how_.other_host);
    }
    return text_reply(status, "", "text/html; charset=utf-8", {{"Location", location}});
  }

  reply answer_storage(const request& asked, const route& where, const file_ptr& file,
                       const circumstances& given) {
    const auto secret = form_field(asked.query, "X-Signature");
    if (secret && asked.header("Authorization")) {
      return xml_reply(400, "InvalidArgument", "Only one auth mechanism allowed");
    }
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = signatures_.find(secret.value_or(""));
      if (found == signatures_.end() || found->second.path != text_of(where.run) + "/" + where.name) {
        return xml_reply(403, "AccessDenied", "Request has expired or is not signed");
      }
      if (how_.signature_uses > 0 && found->second.used >= how_.signature_uses) {
        return xml_reply(403, "AccessDenied", "Request has expired");
      }
      ++found->second.used;
    }
    if (!file) return xml_reply(404, "NoSuchKey", "The specified key does not exist.");
    return file_reply(asked, *file, given);
  }

  reply file_reply(const request& asked, const stored_file& file, const circumstances& given) {
    if (asked.method != "GET" && asked.method != "HEAD")
      return xml_reply(405, "MethodNotAllowed", "GET or HEAD");
    reply made;
    made.body = file.what();
    std::string etag = file.etag();
    if (given.changed_from) {
      made.body = std::make_shared<altered_content>(made.body, *given.changed_from);
      etag = "\"changed-" + std::to_string(*given.changed_from) + '"';
    }
    if (given.etag) etag = *given.etag;
    const std::uint64_t size = made.body->size();
    made.status = 200;
    made.length = size;
    made.from_storage = true;
    made.fields = {{"Content-Type", file.attributes().mimetype},
                   {"Accept-Ranges", "bytes"},
                   {"Last-Modified", "Tue, 02 Jan 2024 03:04:05 GMT"}};
    if (!etag.empty()) made.fields.emplace_back("ETag", etag);

    const auto if_match = asked.header("If-Match");
    if (if_match && !lists_etag(*if_match, etag)) return xml_reply(412, "PreconditionFailed", "If-Match");
    const auto if_range = asked.header("If-Range");
    const bool same =
        !if_range || lists_etag(*if_range, etag) || *if_range == find_header(made.fields, "Last-Modified");
    const auto text = asked.header("Range");
    if (!text || !same || given.ignore_range) return made;
    const auto range = parse_range(*text, size);
    if (!range) return made;
    if (range->first > range->last) {
      reply refused = xml_reply(416, "InvalidRange", "The requested range cannot be satisfied.");
      refused.fields.emplace_back("Content-Range", "bytes */" + std::to_string(size));
      return refused;
    }
    made.status = 206;
    made.offset = range->first;
    made.length = range->last - range->first + 1;
    made.fields.emplace_back("Content-Range", "bytes " + std::to_string(range->first) + "-" +
                                                  std::to_string(range->last) + "/" + std::to_string(size));
    return made;
  }

  /// Sends the answer. Returns true if the connection can be used for another request.
  bool send(reply& answer, bool head_only, std::optional<std::size_t> number, connection& peer) {
    for (const int code : answer.interim) {
      if (!peer.send("HTTP/1.1 " + std::to_string(code) + " Interim\r\n\r\n")) return false;
    }
    if (number) update(*number, [&](request_record& one, kind_counters&) { one.status = answer.status; });
    if (!peer.send(head_of(answer))) return false;
    if (answer.endless_header) {
      const std::string filler = "X-Filler: " + std::string(1000, 'a') + "\r\n";
      while (peer.send(filler)) {}
      return false;
    }
    const bool whole = head_only || answer.frame == reply::framing::none || send_body(answer, number, peer);
    return whole && !answer.close && !answer.close_silently && answer.promised_more == 0 &&
           answer.frame != reply::framing::until_close;
  }

  static std::string head_of(const reply& answer) {
    std::string head = answer.status_line.value_or("HTTP/1.1 " + std::to_string(answer.status) + " " +
                                                   (answer.status < 300   ? "OK"
                                                    : answer.status < 400 ? "Elsewhere"
                                                                          : "Refused")) +
                       "\r\n";
    head += "Date: " + http_date() + "\r\n";
    for (const auto& [name, value] : answer.fields) head += name + ": " + value + "\r\n";
    if (answer.frame == reply::framing::chunked) head += "Transfer-Encoding: chunked\r\n";
    if (answer.frame == reply::framing::length && answer.status != 204 && answer.status != 304) {
      const auto promised = static_cast<std::int64_t>(answer.length) + answer.promised_more;
      head += "Content-Length: " + std::to_string(std::max<std::int64_t>(promised, 0)) + "\r\n";
    }
    if (answer.close || answer.frame == reply::framing::until_close) head += "Connection: close\r\n";
    for (unsigned i = 0; i < answer.filler_headers; ++i) head += "X-Filler-" + std::to_string(i) + ": a\r\n";
    return answer.endless_header ? head : head + "\r\n";
  }

  /// Returns true if the whole body was sent.
  bool send_body(const reply& answer, std::optional<std::size_t> number, connection& peer) {
    if (answer.status == 204 || answer.status == 304) return true;
    std::uint64_t each_rate = 0, global_rate = 0;
    if (answer.from_storage) {
      const std::lock_guard<std::mutex> lock(mutex_);
      each_rate = how_.body_rate;
      global_rate = how_.global_rate;
    }
    const bool is_chunked = answer.frame == reply::framing::chunked;
    pacer own;
    std::uint64_t stall_at = answer.stall_after.value_or(UINT64_MAX);
    std::string piece;
    std::uint64_t sent = 0;
    if (answer.stall_after) peer.buffer_little();
    for (;;) {
      if (answer.cut_after && sent >= *answer.cut_after) return false;
      if (sent >= stall_at) {
        stall_at = UINT64_MAX;
        if (!hold(peer)) return false;
      }
      std::uint64_t count = answer.length - std::min(sent, answer.length);
      const bool filler = count == 0 && answer.endless_body;
      if (filler) count = piece_bytes;
      if (count == 0) break;
      const auto limit = [&](std::uint64_t most) {
        count = std::min(count, std::max<std::uint64_t>(most, 1));
      };
      limit(piece_bytes);
      if (answer.cut_after) limit(*answer.cut_after - sent);
      limit(stall_at - sent);
      if (answer.drip_interval) limit(answer.drip_bytes);
      if (each_rate > 0) limit(each_rate / 50);
      if (global_rate > 0) limit(global_rate / 50);
      piece.resize(static_cast<std::size_t>(count));
      if (filler) {
        std::fill(piece.begin(), piece.end(), ' ');
      } else {
        answer.body->read(answer.offset + sent, piece.data(), piece.size());
      }
      auto when =
          std::max(own.reserve(piece.size(), each_rate), all_bodies_.reserve(piece.size(), global_rate));
      if (answer.drip_interval && sent > 0) when = std::max(when, clock_type::now() + *answer.drip_interval);
      if (when > clock_type::now() && !stop_.wait_until(when)) return false;
      if (is_chunked && !peer.send(chunk_head(piece.size()))) return false;
      // Counted first: a client that has the last byte may look at the counts at once.
      if (number) count_sent(*number, static_cast<std::int64_t>(piece.size()));
      if (!peer.send(piece)) {
        if (number) count_sent(*number, -static_cast<std::int64_t>(piece.size()));
        return false;
      }
      if (is_chunked && !peer.send("\r\n")) return false;
      sent += count;
    }
    return !is_chunked || peer.send("0\r\n\r\n");
  }

  static std::string chunk_head(std::size_t size) {
    std::array<char, 16> text{};
    const auto end = std::to_chars(text.data(), text.data() + text.size(), size, 16).ptr;
    return std::string(text.data(), end) + "\r\n";
  }

  // -- the forward proxy --

  bool forward(const request& asked, std::size_t number, connection& peer, reply::ending& end) {
    reply answer;
    const bool tunnel = asked.method == "CONNECT";
    std::string rest = asked.target;
    if (!tunnel) rest.erase(0, starts_with(rest, "http://") ? std::strlen("http://") : rest.size());
    const auto authority_end = std::min(rest.find('/'), rest.size());
    const std::uint16_t port = own_port(rest.substr(0, authority_end));
    const std::string credentials = "Basic " + base64(how_.proxy_credentials.value_or(""));
    if (how_.proxy_credentials && asked.header("Proxy-Authorization") != credentials) {
      answer = text_reply(407, "", "text/plain", {{"Proxy-Authenticate", "Basic realm=\"stand-in\""}});
    } else if (port == 0) {
      answer = text_reply(403, "this proxy leads to the stand-in alone\n", "text/plain");
    } else if (tunnel) {
      answer.status = 200;
      answer.frame = reply::framing::none;
    }
    for (const auto& one : strike(place::proxy, asked.target, std::nullopt)) {
      if (one.after) one.after(answer);
    }
    if (const auto early = not_begun(answer, peer)) {
      end = *early;
      return false;
    }
    end = answer.cut_as;
    const bool passes =
        answer.status == 0 || (tunnel && answer.status == 200 && answer.frame == reply::framing::none);
    if (!passes) return send(answer, false, number, peer);

    descriptor upstream(socket(AF_INET, SOCK_STREAM, 0));
    const sockaddr_in to = loopback(port);
    if (!upstream || connect(upstream.get(), reinterpret_cast<const sockaddr*>(&to), sizeof to) != 0)
      return false;
    prepare_stream(upstream.get());
    if (tunnel) {
      send(answer, false, number, peer);
    } else {
      std::string head = asked.method + " " +
                         (authority_end < rest.size() ? rest.substr(authority_end) : "/") + " HTTP/1.1\r\n";
      for (const auto& [name, value] : asked.headers) {
        const bool hop_by_hop = starts_with(name, "Proxy-") || same_ignoring_case(name, "Connection");
        if (!hop_by_hop) head += name + ": " + value + "\r\n";
      }
      head += "Connection: close\r\n\r\n" + asked.body;
      send_all(upstream.get(), head.data(), head.size(), stop_);
    }
    relay(peer, upstream.get(), number);
    return false;
  }

  /// Returns the port of this stand-in for `authority` (host:port), or 0.
  std::uint16_t own_port(std::string authority) const {
    const auto colon = authority.rfind(':');
    const auto port = to_number(colon == std::string::npos ? "80" : authority.substr(colon + 1));
    std::string host = authority.substr(0, colon);
    for (char& c : host) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    std::vector<std::string> mine = how_.more_hosts;
    mine.insert(mine.end(), {"localhost", "127.0.0.1", "[::1]"});
    if (std::count(mine.begin(), mine.end(), host) == 0) return 0;
    const auto& more = how_.more_hosts;
    const bool is_more = std::find(more.begin(), more.end(), host) != more.end();
    if (is_more && port == std::uint64_t{443}) return listeners_.at(index_of(origin::service)).port;
    for (const origin at : {origin::service, origin::storage}) {
      const auto& it = listeners_.at(index_of(at));
      if (port == it.port) return it.port;
    }
    return 0;
  }

  /// Relays bytes in both directions until one side ends.
  void relay(connection& peer, int upstream, std::size_t number) {
    if (!send_all(upstream, peer.buffer.data(), peer.buffer.size(), stop_)) return;
    peer.buffer.clear();
    std::vector<char> room(piece_bytes);
    for (;;) {
      std::array<pollfd, 3> all{{{peer.fd(), POLLIN, 0}, {upstream, POLLIN, 0}, {stop_.fd(), POLLIN, 0}}};
      if (poll(all.data(), all.size(), -1) < 0 && errno != EINTR) return;
      if (all[2].revents != 0) return;
      for (const std::size_t side : {std::size_t{0}, std::size_t{1}}) {
        if (all[side].revents == 0) continue;
        const std::size_t got = receive_some(all[side].fd, room.data(), room.size(), stop_);
        if (got == 0 || !send_all(all[1 - side].fd, room.data(), got, stop_)) return;
        if (side == 1) count_sent(number, static_cast<std::int64_t>(got));
      }
    }
  }

  // -- state --

  file_ptr find_file(const run_ref& run, const std::string& name) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = runs_.find(text_of(run));
    if (found == runs_.end()) return nullptr;
    const auto file = found->second.files().find(name);
    return file == found->second.files().end() ? nullptr : file->second;
  }

  /// Returns the effects of all faults that apply to a request, in the order of the faults, and counts them.
  std::vector<action> strike(place at, const std::string& text, const std::optional<span>& range) {
    std::vector<action> struck;
    change([&] {
      for (auto& rule : faults_) {
        const bool here = rule.where.at == at || (rule.where.at == place::any && at != place::connect);
        if (!rule.active || !here || text.find(rule.where.match) == std::string::npos) continue;
        const auto covers = rule.where.covers;
        if (covers && !(range && range->first <= *covers && *covers <= range->last)) continue;
        ++rule.matched;
        if (rule.matched < rule.where.first || rule.matched > rule.where.last) continue;
        ++rule.struck;
        ++counters_.faults_struck;
        struck.push_back(rule.what);
      }
    });
    return struck;
  }

  /// Notifies waiting threads of a change.
  template <class Change>
  void change(Change apply) {
    const std::lock_guard<std::mutex> lock(mutex_);
    apply();
    changed_.notify_all();
  }

  struct worker {
    std::thread thread;
    std::atomic<bool> done{false};
  };

  options how_;  // key, redirects and rates are guarded by the mutex, the others never change
  std::string ca_pem_, intermediate_pem_;
  stop_signal stop_;
  std::array<listener, origin_count> listeners_;
  std::mutex workers_mutex_, stop_mutex_;
  std::list<worker> workers_;
  pacer all_bodies_;

  std::mutex mutex_;  // guards everything below
  std::condition_variable changed_;
  std::map<std::string, stored_run> runs_;
  std::map<std::string, signature> signatures_;
  std::set<std::string> tokens_;
  std::vector<fault_rule> faults_;
  std::function<void(const request_record&)> on_request_;
  std::function<std::string(const run_ref&, const std::string&)> addresses_;
  std::vector<request_record> requests_;
  counters counters_;
  std::size_t next_request_ = 0;
  std::uint64_t next_connection_ = 0;
  std::uint64_t releases_ = 0;
};

server::server(options how) : impl_(std::make_unique<implementation>(std::move(how))) {}
server::~server() = default;
void server::stop() { impl_->stop(); }

std::string server::base_url() const { return impl_->base_url(); }
std::string server::storage_url() const { return impl_->address(origin::storage); }
std::string server::proxy_url() const {
  return impl_->how_.proxy ? impl_->address(origin::proxy) : std::string();
}
std::uint16_t server::port(origin at) const { return impl_->listeners_.at(index_of(at)).port; }
std::string server::key() const {
  const std::lock_guard<std::mutex> lock(impl_->mutex_);
  return impl_->how_.key;
}
std::string server::ca_pem() const { return impl_->ca_pem_; }
std::string server::intermediate_pem() const { return impl_->intermediate_pem_; }
void server::write_ca(const std::filesystem::path& file) const {
  std::ofstream out(file, std::ios::binary);
  if (!(out << impl_->ca_pem_ << std::flush)) fail("cannot write " + file.string());
}
std::string server::files_url(const run_ref& run, std::string_view name) const {
  return impl_->address(origin::service) + impl_->files_path(run, name);
}
std::string server::signed_url(const run_ref& run, std::string_view name) { return impl_->sign(run, name); }

run_ref server::add_run(std::string entity, std::string project, std::string id, bool is_public) {
  run_ref run{std::move(entity), std::move(project), std::move(id)};
  impl_->change([&] { impl_->runs_[text_of(run)].is_public = is_public; });
  return run;
}
void server::remove_run(const run_ref& run) {
  impl_->change([&] { impl_->runs_.erase(text_of(run)); });
}
void server::add_file(const run_ref& run, const std::string& name, content_ptr what,
                      file_attributes attributes) {
  auto file = std::make_shared<const stored_file>(std::move(what), std::move(attributes));
  impl_->change([&] { impl_->runs_[text_of(run)].own_files()[name] = std::move(file); });
}
void server::add_file(const run_ref& run, const std::string& name, std::string text,
                      file_attributes attributes) {
  add_file(run, name, bytes(std::move(text)), std::move(attributes));
}
void server::remove_file(const run_ref& run, const std::string& name) {
  impl_->change([&] { impl_->runs_[text_of(run)].own_files().erase(name); });
}
std::size_t server::load_folder(const run_ref& run, const std::filesystem::path& directory) {
  std::size_t count = 0;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(directory)) {
    if (!entry.is_regular_file()) continue;
    add_file(run, entry.path().lexically_relative(directory).generic_string(), from_disk(entry.path()));
    ++count;
  }
  return count;
}

void server::set_key(std::string key) {
  impl_->change([&] { impl_->how_.key = std::move(key); });
}
void server::expire_signatures() {
  impl_->change([&] { impl_->signatures_.clear(); });
}
void server::revoke_tokens() {
  impl_->change([&] { impl_->tokens_.clear(); });
}
void server::set_run_state(const run_ref& run, std::string state) {
  impl_->change([&] { impl_->runs_[text_of(run)].state = std::move(state); });
}

void server::set_redirect(redirect to, unsigned hops, int status) {
  impl_->change([&] {
    impl_->how_.redirect_to = to;
    impl_->how_.redirect_hops = hops;
    impl_->how_.redirect_status = status;
  });
}
void server::set_addresses(std::function<std::string(const run_ref&, const std::string&)> addresses) {
  impl_->change([&] { impl_->addresses_ = std::move(addresses); });
}
void server::set_rate(std::uint64_t each_body, std::uint64_t all_together) {
  impl_->change([&] {
    impl_->how_.body_rate = each_body;
    impl_->how_.global_rate = all_together;
  });
}

std::size_t server::add_fault(target where, action what) {
  std::size_t number = 0;
  impl_->change([&] {
    number = impl_->faults_.size();
    impl_->faults_.push_back({std::move(where), std::move(what)});
  });
  return number;
}
std::size_t server::add_fault(std::string_view spec) {
  auto [where, what] = parse_fault(spec);
  return add_fault(std::move(where), std::move(what));
}
std::size_t server::struck(std::size_t fault) const {
  const std::lock_guard<std::mutex> lock(impl_->mutex_);
  return impl_->faults_.at(fault).struck;
}
void server::clear_faults() {
  impl_->change([&] {
    for (auto& rule : impl_->faults_)
      rule.active = false;  // kept, so that their numbers stay valid for struck()
  });
}
void server::release() {
  impl_->change([&] { ++impl_->releases_; });
}

void server::on_request(std::function<void(const request_record&)> callback) {
  impl_->change([&] { impl_->on_request_ = std::move(callback); });
}
std::vector<request_record> server::requests() const {
  const std::lock_guard<std::mutex> lock(impl_->mutex_);
  return impl_->requests_;
}
std::vector<request_record> server::requests(request_kind kind) const {
  auto all = requests();
  all.erase(std::remove_if(all.begin(), all.end(), [&](const auto& one) { return one.kind != kind; }),
            all.end());
  return all;
}
counters server::counted() const {
  const std::lock_guard<std::mutex> lock(impl_->mutex_);
  return impl_->counters_;
}
void server::clear_log() {
  impl_->change([&] {
    impl_->requests_.clear();
    counters fresh;
    fresh.stalled = impl_->counters_.stalled;
    for (std::size_t i = 0; i < origin_count; ++i) {
      fresh.by_origin.at(i).open_connections = impl_->counters_.by_origin.at(i).open_connections;
    }
    impl_->counters_ = fresh;
  });
}
bool server::wait_for(const std::function<bool(const view&)>& predicate, milliseconds timeout) const {
  std::unique_lock<std::mutex> lock(impl_->mutex_);
  const auto holds = [&] { return predicate({impl_->requests_, impl_->counters_}); };
  const auto deadline = clock_type::now() + timeout;
  bool held = false;
  while (!(held = holds()) && !impl_->stop_.raised()) {
    if (impl_->changed_.wait_until(lock, deadline) == std::cv_status::timeout) return holds();
  }
  return held;
}

}  // namespace stand_in
