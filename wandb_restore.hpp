// wandb_restore.hpp - restore files of Weights & Biases runs in C++: verified, resumable, parallel.
//
//   #include "wandb_restore.hpp"
//   auto file = wandb::restore("model-best.h5", "entity/project/run_id");   // a std::ifstream on a verified local copy
//   load_weights(file.name());
//
// Needs C++17, nlohmann/json and, for https, OpenSSL.
// SPDX-License-Identifier: MIT
// SPDX-FileCopyrightText: 2026 wandb_restore contributors
//
// The sections, in order. Each uses only the sections above it.
//   configuration            version, WANDB_RESTORE_* macros, includes
//   errors                   errc, error, result
//   run path                 text <-> entity, project and run id
//   HTTP vocabulary          URLs, headers, request, response, body sink, and the Transport concept
//   files                    file_info, progress, restored_file, remote_file
//   cache policy             when a local copy is used instead of a download
//   settings                 server, credentials, default run, timeouts, proxies
//   client and entry points  restore, open, client
// ---- implementation
//   text                     base64, hex, percent-encoding, JSON, dates, readers of ini and netrc files
//   disk                     partial files, positional writes, atomic rename, locks, receipts
//   digest                   MD5, streamed
//   settings, resolved       environment, settings files, netrc, resume file
//   exchange                 redirects, credentials by origin, proxies, retries with backoff
//   service                  the GraphQL queries and their answers
//   download                 byte ranges, connections, verification
//   restoring                one call, from the name to the open stream
//   remote files             reading parts of a file without a local copy
//   http_transport           the default transport: sockets, TLS, HTTP/1.1
//   httplib_transport        cpp-httplib as a transport, if WANDB_RESTORE_HTTPLIB is defined
#ifndef WANDB_RESTORE_HPP
#define WANDB_RESTORE_HPP

// ============================================================================================ configuration

#define WANDB_RESTORE_VERSION_MAJOR 0
#define WANDB_RESTORE_VERSION_MINOR 2
#define WANDB_RESTORE_VERSION_PATCH 0
#define WANDB_RESTORE_VERSION "0.2.0"

// Macros a program may define. The first three must be the same in every file of one program. The name of the inline
// namespace contains their values: if two files define them differently, one does not link with the types of the other.
//   WANDB_RESTORE_SPLIT           the header only declares; see WANDB_RESTORE_IMPLEMENTATION
//   WANDB_RESTORE_NO_OPENSSL      plain HTTP only
//   WANDB_RESTORE_EXCEPTIONS      0 or 1; default: 1 if the compiler's flags allow exceptions
//   WANDB_RESTORE_IMPLEMENTATION  in split mode, for exactly one source file, which then has the definitions
//   WANDB_RESTORE_HTTPLIB         adds httplib_transport, over cpp-httplib; in split mode, the source file with the
//                                 definitions needs it, too

#if defined(_MSVC_LANG) ? _MSVC_LANG < 201703L : __cplusplus < 201703L
#error "wandb_restore.hpp needs C++17: compile with -std=c++17 (or /std:c++17) or later"
#endif

#ifndef WANDB_RESTORE_EXCEPTIONS
#if defined(__cpp_exceptions) || defined(__EXCEPTIONS) || defined(_CPPUNWIND)
#define WANDB_RESTORE_EXCEPTIONS 1
#else
#define WANDB_RESTORE_EXCEPTIONS 0
#endif
#elif WANDB_RESTORE_EXCEPTIONS && !(defined(__cpp_exceptions) || defined(__EXCEPTIONS) || defined(_CPPUNWIND))
#error "WANDB_RESTORE_EXCEPTIONS is 1, but the compiler's flags switch exceptions off"
#endif

#ifdef WANDB_RESTORE_SPLIT
#define WANDB_RESTORE_PRIVATE_SPLIT _split
#define WANDB_RESTORE_PRIVATE_INLINE
#else
#define WANDB_RESTORE_PRIVATE_SPLIT
#define WANDB_RESTORE_PRIVATE_INLINE inline
#endif
#if WANDB_RESTORE_EXCEPTIONS
#define WANDB_RESTORE_PRIVATE_NOEX
#else
#define WANDB_RESTORE_PRIVATE_NOEX _noexceptions
#endif
#ifdef WANDB_RESTORE_NO_OPENSSL
#define WANDB_RESTORE_PRIVATE_NOTLS _notls
#else
#define WANDB_RESTORE_PRIVATE_NOTLS
#endif
#define WANDB_RESTORE_PRIVATE_JOIN2(a, b, c, d) a##b##c##d
#define WANDB_RESTORE_PRIVATE_JOIN(a, b, c, d) WANDB_RESTORE_PRIVATE_JOIN2(a, b, c, d)
#define WANDB_RESTORE_PRIVATE_ABI                                                                            \
  WANDB_RESTORE_PRIVATE_JOIN(v0, WANDB_RESTORE_PRIVATE_SPLIT, WANDB_RESTORE_PRIVATE_NOEX,                    \
                             WANDB_RESTORE_PRIVATE_NOTLS)

#if defined(__GNUC__) && !defined(_WIN32)
#define WANDB_RESTORE_PRIVATE_VISIBLE __attribute__((visibility("default")))
#else
#define WANDB_RESTORE_PRIVATE_VISIBLE
#endif

#include <atomic>            // the caller's cancel flag
#include <chrono>            // timeouts
#include <cstdint>           // sizes
#include <cstdlib>           // abort, if exceptions are off
#include <filesystem>        // paths
#include <fstream>           // restored_file is an ifstream
#include <functional>        // callbacks
#include <initializer_list>  //
#include <memory>            // shared_ptr
#include <optional>          // unknown values; result
#include <stdexcept>         // error is a runtime_error
#include <string>            //
#include <string_view>       //
#include <type_traits>       //
#include <utility>           //
#include <vector>            //

namespace wandb {
inline namespace WANDB_RESTORE_PRIVATE_ABI {

// =================================================================================================== errors

/// The kind of a failure. README.md lists the situations that lead to each code.
enum class errc {
  invalid_argument = 1,  ///< bad file name (empty, absolute, or with ".."), root, option, base URL or API key
  invalid_run_path,      ///< malformed run path, or the entity, project or run id is missing
  run_not_found,         ///< the run does not exist, or this API key may not see it
  file_not_found,        ///< the run has no such file, or the file was never uploaded
  not_authenticated,     ///< the service answered 401
  permission_denied,     ///< the service answered 403; or the storage did, also to a renewed URL
  offline,               ///< WANDB_MODE forbids network access and there is no local copy to use
  connection_failed,  ///< no connection, certificate refused, peer slow or silent, connection cut, total_timeout is over
  http_failure,        ///< any other error status that remained after the retries
  protocol_violation,  ///< the answer violates HTTP or the service's API, or exceeds a limit of this library
  checksum_mismatch,   ///< the file was downloaded twice, and both times its size or md5 was wrong
  local_conflict,      ///< the local copy was restored from a different run, or is another file of the run
  disk_failure,  ///< disk full, permission denied, a directory has the file's name; or no thread can be started
  cancelled,     ///< the caller cancelled; the next call resumes from the bytes that had arrived
};

/// Returns the enumerator's name, e.g. "file_not_found"; "unknown" for any other value. Never null.
[[nodiscard]] constexpr const char* to_string(errc code) noexcept {
  switch (code) {
    case errc::invalid_argument: return "invalid_argument";
    case errc::invalid_run_path: return "invalid_run_path";
    case errc::run_not_found: return "run_not_found";
    case errc::file_not_found: return "file_not_found";
    case errc::not_authenticated: return "not_authenticated";
    case errc::permission_denied: return "permission_denied";
    case errc::offline: return "offline";
    case errc::connection_failed: return "connection_failed";
    case errc::http_failure: return "http_failure";
    case errc::protocol_violation: return "protocol_violation";
    case errc::checksum_mismatch: return "checksum_mismatch";
    case errc::local_conflict: return "local_conflict";
    case errc::disk_failure: return "disk_failure";
    case errc::cancelled: return "cancelled";
  }
  return "unknown";
}

/// A failure: a code for programs and a text for people. The text (`what()`) names the attempted operation, the file or
/// URL, the answer, and a remedy. It never contains an API key, an Authorization header or the query of a signed URL.
class WANDB_RESTORE_PRIVATE_VISIBLE error : public std::runtime_error {
 public:
  /// Makes an error. `http_status` is 0 if the failure has none. Code and status determine `is_transient()`.
  error(errc code, const std::string& text, int http_status = 0)
      : std::runtime_error(text), code_(code), http_status_(http_status),
        transient_(may_pass(code, http_status)) {}

  /// Makes an error with `is_transient()` false, whatever its code: for a refused certificate, for example.
  [[nodiscard]] static error permanent(errc code, const std::string& text, int http_status = 0) {
    error e(code, text, http_status);
    e.transient_ = false;
    return e;
  }

  /// Returns the kind of the failure.
  [[nodiscard]] errc code() const noexcept { return code_; }
  /// Returns true for run_not_found and file_not_found: there is no such run or file (yet), or the service hides the run because
  /// the API key is missing or has no access. To start from scratch if a checkpoint is missing, test
  /// `code() == errc::file_not_found`: with a wrong key the service reports run_not_found.
  [[nodiscard]] bool is_not_found() const noexcept {
    return code_ == errc::run_not_found || code_ == errc::file_not_found;
  }
  /// Returns true if a retry may succeed: for connection_failed, and for http_failure with status 408, 429 or 5xx
  /// except 501, unless the error was made by `permanent`.
  [[nodiscard]] bool is_transient() const noexcept { return transient_; }
  /// Returns the HTTP status that caused the failure, or 0.
  [[nodiscard]] int http_status() const noexcept { return http_status_; }
  /// Returns the server's Retry-After as a duration from the time of the response, or 0.
  [[nodiscard]] std::chrono::milliseconds retry_after() const noexcept { return retry_after_; }
  /// Sets the value that `retry_after()` returns.
  void retry_after(std::chrono::milliseconds time) noexcept { retry_after_ = time; }

  /// Writes code and text to a stream: "file_not_found: restoring ...".
  friend std::ostream& operator<<(std::ostream& out, const error& failure) {
    return out << to_string(failure.code()) << ": " << failure.what();
  }

 private:
  static bool may_pass(errc code, int status) noexcept {
    return code == errc::connection_failed ||
           (code == errc::http_failure &&
            (status == 408 || status == 429 || (status >= 500 && status != 501)));
  }
  errc code_;
  int http_status_;
  bool transient_;
  std::chrono::milliseconds retry_after_{0};
};

namespace detail {

/// The part of result<T> that does not depend on T: success, or an error.
class outcome {
 public:
  using error_type = wandb::error;  ///< as in std::expected

  /// Success.
  outcome() = default;
  /// Failure.
  outcome(const wandb::error& failure) : failure_(failure) {}  // NOLINT: implicit, as in expected
  /// Failure.
  outcome(wandb::error&& failure) : failure_(std::move(failure)) {}  // NOLINT

  /// Returns true for success.
  [[nodiscard]] bool has_value() const noexcept { return !failure_; }
  /// Returns `has_value()`.
  explicit operator bool() const noexcept { return has_value(); }

  /// Returns the error. Undefined if `has_value()`.
  [[nodiscard]] const wandb::error& error() const& noexcept { return *failure_; }
  /// Returns the error. Undefined if `has_value()`.
  [[nodiscard]] wandb::error&& error() && noexcept { return *std::move(failure_); }

 protected:
  /// Throws the error, if there is one; aborts without exceptions.
  void require() const {
    if (has_value()) return;
#if WANDB_RESTORE_EXCEPTIONS
    throw wandb::error(*failure_);
#else
    std::abort();
#endif
  }

 private:
  std::optional<wandb::error> failure_;
};

}  // namespace detail

/// A value or an `error`: a subset of std::expected<T, error> with the same names. T is default-constructible.
template <class T>
class [[nodiscard]] result : public detail::outcome {
 public:
  using value_type = T;  ///< as in std::expected
  using outcome::outcome;

  // Two constructors, not one that takes T by value: before Clang 13, `return local;` would copy into that parameter.
  /// Success.
  result(const T& value) : value_(value) {}  // NOLINT: implicit, as in expected
  /// Success.
  result(T&& value) : value_(std::move(value)) {}  // NOLINT

  /// @name Unchecked access
  /// @{

  /// Returns the value. After a failure this is a value-initialised T.
  T& operator*() & noexcept { return value_; }
  const T& operator*() const& noexcept { return value_; }
  T&& operator*() && noexcept { return std::move(value_); }
  T* operator->() noexcept { return &value_; }
  const T* operator->() const noexcept { return &value_; }
  /// @}

  /// @name Checked access
  /// @{

  /// Returns the value. After a failure it throws the error; without exceptions it calls std::abort.
  T& value() & { return require(), value_; }
  const T& value() const& { return require(), value_; }
  T&& value() && { return require(), std::move(value_); }
  /// @}

  /// Returns the value, or after a failure `fallback` converted to T.
  template <class U>
  T value_or(U&& fallback) && {
    return has_value() ? std::move(value_) : static_cast<T>(std::forward<U>(fallback));
  }

 private:
  T value_{};  // an optional or a variant takes several times as long to compile
};

/// Success without a value, or an `error`.
template <>
class [[nodiscard]] result<void> : public detail::outcome {
 public:
  using value_type = void;  ///< as in std::expected
  using outcome::outcome;

  /// Does nothing after success. After a failure it throws the error; without exceptions it calls std::abort.
  void value() const { require(); }
};

// ================================================================================================= run path

/// Identifies a run.
struct run_path {
  std::string entity;   ///< a user or a team
  std::string project;  ///< a project of the entity
  std::string run_id;   ///< the id of the run, as in its browser address; not its display name

  /// Parses every form of a run path that the Python SDK accepts, with the same meaning: `e/p/r`, `e/p/runs/r`, `e/p:r`,
  /// `p/r`, `p:r`, `r`, also with slashes and spaces around it. Parses browser addresses of a run too, with or without
  /// scheme and with any tail (`https://forge.coreweave.com/wandb/e/p/runs/r/files/x`, `https://wandb.ai/e/p/runs/r`);
  /// the host is ignored. A query or fragment is dropped.
  ///
  /// @param text      the run path; if empty, all three parts come from `defaults`.
  /// @param defaults  supplies the parts that `text` leaves out.
  /// @return          the run, or errc::invalid_run_path if a part is malformed or neither argument has it.
  /// Source: wandb/apis/public/api.py, Api._parse_path.
  static result<run_path> parse(std::string_view text, const run_path& defaults = {});

  /// Returns "entity/project/run_id".
  [[nodiscard]] std::string str() const { return entity + '/' + project + '/' + run_id; }

  /// Compares all three parts, byte by byte.
  friend bool operator==(const run_path& a, const run_path& b) {
    return a.entity == b.entity && a.project == b.project && a.run_id == b.run_id;
  }
  /// Returns !(a == b).
  friend bool operator!=(const run_path& a, const run_path& b) { return !(a == b); }
  /// Writes `run.str()` to a stream.
  friend std::ostream& operator<<(std::ostream& out, const run_path& run) { return out << run.str(); }
};

// ========================================================================================== HTTP vocabulary

/// An absolute http or https URL in parts (RFC 3986, section 3).
struct url {
  std::string scheme;     ///< "http" or "https"
  std::string user_info;  ///< percent-encoded, as written; used for proxies only
  std::string host;       ///< lower case; an IPv6 address without brackets
  int port = 0;           ///< the explicit port, or the scheme's default
  std::string target;     ///< path and query as they are sent; starts with '/'

  /// Parses a URL. Percent-encodes spaces and bytes beyond ASCII, and drops a fragment.
  /// @return  the URL, or errc::protocol_violation for control characters, another scheme, a missing host or a bad port.
  static result<url> parse(std::string_view text);
  /// Resolves a reference, absolute or relative, against this URL (RFC 3986, section 5.2). Errors as for `parse`.
  [[nodiscard]] result<url> resolve(std::string_view location) const;

  /// Returns "scheme://host", with ":port" if it is not the scheme's default (RFC 6454, section 4).
  [[nodiscard]] std::string origin() const;
  /// Returns the URL without user_info.
  [[nodiscard]] std::string str() const { return origin() + target; }
  /// Returns the URL without user_info and query, for messages and logs: a query may contain a signature.
  /// Cuts a path after 1,000 bytes.
  [[nodiscard]] std::string redacted() const {
    const std::string path = target.substr(0, target.find('?'));
    return origin() + (path.size() > 1000 ? path.substr(0, 1000) + "..." : path);
  }
};

/// Header fields, pairs of name and value, in the order in which they are sent or were received.
using http_headers = std::vector<std::pair<std::string, std::string>>;

/// The request of one HTTP exchange.
struct http_request {
  std::string method = "GET";  ///< the library sends "GET" and "POST"
  std::string url = {};        ///< absolute, http or https. Keep it out of logs: its query may be a signature
  http_headers headers = {};   ///< all fields except Host, Connection and Content-Length
  std::string body = {};       ///< sent with Content-Length; empty for a GET
  /// "http://[user:password@]host:port"; empty for a direct connection. Keep it out of logs.
  std::string proxy = {};
  std::string proxy_authorization = {};  ///< the value of Proxy-Authorization; sent to the proxy only
  /// Limits TCP connection, CONNECT and TLS handshake together, without name resolution.
  std::chrono::milliseconds connect_timeout{30000};
  /// The exchange fails after this long without a byte in either direction.
  std::chrono::milliseconds idle_timeout{30000};
  std::function<bool()> is_cancelled = {};  ///< may be empty; may be called from any thread

  /// Returns true if the exchange shall end. A transport calls this at least once a second.
  [[nodiscard]] bool cancelled() const { return is_cancelled && is_cancelled(); }
};

/// The head of a response.
struct http_response {
  int status = 0;             ///< the final status; interim (1xx) responses are skipped
  http_headers headers = {};  ///< as received

  /// Returns the value of the first field with this name, compared without case, or null. The pointer is valid until
  /// `headers` changes.
  [[nodiscard]] const std::string* header(std::string_view name) const;
};

/// Receives a response from a transport: `connected` at most once, then `start` once, then `write` for each piece of the
/// body, all from the thread that called `send`. If `start` or `write` returns false, the transport stops reading, closes
/// the connection and returns errc::cancelled.
class body_sink {
 public:
  /// Reports an established TCP connection to the server or proxy. Optional. If a transport makes this call, a failed
  /// exchange is retried for settings::retry_timeout; otherwise for settings::connect_timeout only.
  virtual void connected() {}
  /// Delivers status and headers of the final response, also if it has no body. Returns false to stop.
  virtual bool start(const http_response& head) = 0;
  /// Delivers the next bytes of the body, without transfer coding. Returns false to stop. `bytes` is not kept.
  virtual bool write(std::string_view bytes) = 0;

 protected:
  // Transports use a sink, but never own, copy or delete it.
  /// @cond
  body_sink() = default;
  body_sink(const body_sink&) = default;
  body_sink& operator=(const body_sink&) = default;
  ~body_sink() = default;
  /// @endcond
};

/// Tells whether T is a Transport, that is, has a member `result<http_response> send(const http_request&, body_sink&)`.
/// `send` makes exactly one HTTP exchange, blocks until it ends, and may be called from several threads at once. It follows
/// no redirects, retries nothing, adds no credentials, decompresses nothing, does not collect the body and does not throw.
/// It returns the response's head (a 4xx or 5xx status is no error), or an error with one of these codes:
/// - errc::connection_failed; made with `error::permanent` if a retry cannot succeed
/// - errc::protocol_violation if the response violates HTTP
/// - errc::cancelled if the request was cancelled or the sink returned false
/// - errc::invalid_argument if the request cannot be sent
template <class T, class = void>
struct is_transport : std::false_type {};
template <class T>
struct is_transport<T, std::void_t<decltype(std::declval<T&>().send(std::declval<const http_request&>(),
                                                                    std::declval<body_sink&>()))>>
    : std::is_convertible<decltype(std::declval<T&>().send(std::declval<const http_request&>(),
                                                           std::declval<body_sink&>())),
                          result<http_response>> {};

// ==================================================================================================== files

/// A file of a run, as the service describes it.
struct file_info {
  std::string name;                   ///< path inside the run, '/'-separated
  std::optional<std::uint64_t> size;  ///< bytes; empty if unknown
  std::string md5;                    ///< 32 lower-case hex digits; empty if unknown
  std::string mimetype;               ///< e.g. "text/plain"; empty if unknown
  std::string updated_at;             ///< time of the last change in ISO 8601, as received; empty if unknown
};

/// Returns true if a file's name matches a pattern of restore_all: `*` matches any text, '/' included, and `?` one
/// character. A pattern that ends in '/' matches all files below it. Any other text matches itself only.
[[nodiscard]] bool matches_pattern(std::string_view name, std::string_view pattern);

/// The activity that a progress report is about.
enum class phase {
  downloading,  ///< the call downloads, or waits for another process that downloads the file, or for the run to upload the file
  verifying,    ///< this call computes the md5 of a complete file
};

/// A progress report of one restore, or of restore_all.
struct progress {
  /// The file's name in the run; in restore_all, the name of one of the files in progress. Valid during the callback only.
  std::string_view name;
  wandb::phase phase = wandb::phase::downloading;  ///< what `bytes_done` counts
  /// While downloading: bytes present, including those of earlier tries. While verifying: bytes hashed.
  std::uint64_t bytes_done = 0;
  /// The file's size; in restore_all, the sum over the files found so far. Empty if unknown.
  std::optional<std::uint64_t> bytes_total;
  double bytes_per_second = 0;  ///< recent rate of the network; 0 if unknown
  std::size_t files_done = 0;   ///< files that restore_all has finished, successfully or not
  std::size_t files_total = 1;  ///< files that restore_all has found so far
};

/// The origin of a restored file's bytes.
enum class source {
  downloaded,  ///< this call downloaded them
  local,       ///< they were on disk, or another process downloaded them during this call
  store,       ///< reserved
};

/// A local copy of a file, as an open binary input stream at offset 0. Movable, not copyable. Like any stream, an object
/// may be used by one thread at a time.
class restored_file : public std::ifstream {
 public:
  /// The properties of a restored file, as an argument of the constructor.
  struct facts {
    std::filesystem::path path;                   ///< see `restored_file::path()`
    std::uint64_t size = 0;                       ///< see `restored_file::size()`
    std::string md5;                              ///< see `restored_file::md5()`
    wandb::source source = wandb::source::local;  ///< see `restored_file::source()`
    bool verified = false;                        ///< see `restored_file::verified()`
  };
  /// Makes a closed stream without properties, as a target for a move.
  restored_file() = default;
  /// Takes over an open stream. Public so that a program's tests can make objects, too.
  restored_file(std::ifstream stream, facts known)
      : std::ifstream(std::move(stream)), facts_(std::move(known)) {}
  /// Moves stream and properties.
  restored_file(restored_file&& other) noexcept
      : std::ifstream(std::move(other)), facts_(std::move(other.facts_)) {}
  /// Closes this stream, then moves stream and properties.
  restored_file& operator=(restored_file&& other) noexcept {
    std::ifstream::operator=(std::move(other));  // moves the base class only
    facts_ = std::move(other.facts_);            // NOLINT(bugprone-use-after-move)
    return *this;
  }

  /// Returns `path()` as a string, for frameworks that open files by name. On Windows it throws std::system_error if the code
  /// page lacks a character of the path.
  [[nodiscard]] std::string name() const { return facts_.path.string(); }
  /// Returns the local path: root / name, both as given; relative if root is.
  [[nodiscard]] const std::filesystem::path& path() const noexcept { return facts_.path; }
  /// Returns the size in bytes.
  [[nodiscard]] std::uint64_t size() const noexcept { return facts_.size; }
  /// Returns the verified md5 as 32 lower-case hex digits; empty if the file was not verified.
  [[nodiscard]] const std::string& md5() const noexcept { return facts_.md5; }
  /// Returns where the bytes came from.
  [[nodiscard]] wandb::source source() const noexcept { return facts_.source; }
  /// Returns true if the content was compared with the service's md5: by this restore, or by an earlier one whose receipt
  /// has the file's present size and time of modification.
  [[nodiscard]] bool verified() const noexcept { return facts_.verified; }

 private:
  facts facts_;
};

/// The outcome of restore_all for one file.
struct restored_entry {
  std::string name;                             ///< path inside the run, '/'-separated
  std::filesystem::path path;                   ///< the local path: root / name; empty if the name is refused
  std::uint64_t size = 0;                       ///< bytes; 0 after a failure
  std::string md5;                              ///< see restored_file::md5()
  wandb::source source = wandb::source::local;  ///< see restored_file::source()
  bool verified = false;                        ///< see restored_file::verified()
  std::chrono::milliseconds time{0};            ///< spent on this file, without the wait in the queue
  std::optional<wandb::error> failure = {};     ///< why the file was not restored; empty if it was
};

/// The outcome of restore_all: an entry for each file that matched, in the service's order.
struct restore_report {
  std::vector<restored_entry>
      files;  ///< without open streams: there may be more files than a process may open
  std::optional<wandb::error> failure =
      {};  ///< what ended the call early; the list of files may then be incomplete

  /// Returns true if every matching file was restored.
  [[nodiscard]] bool complete() const { return first_failure() == nullptr; }
  /// Returns `failure`, or else the failure of the first file that has one, or null.
  [[nodiscard]] const wandb::error* first_failure() const {
    if (failure) return &*failure;
    for (const restored_entry& file : files) {
      if (file.failure) return &*file.failure;
    }
    return nullptr;
  }
};

namespace detail {
class remote_reader;
class remote_buffer;
}  // namespace detail

class remote_stream;

/// A file of a run that is read over the network, part by part. Nothing is written to disk. Movable, not copyable; it may
/// outlive the client that opened it.
///
/// Reads of less than 256 KiB go through a cache of 64 blocks of 64 KiB: a missing block is requested once, also if several
/// threads want it, and the least recently used blocks make room. While a file is read in order, requests grow to 1 MiB, so
/// that few are needed; at the beginning of a file they have 256 KiB; other reads request only the blocks that they touch.
/// A read of 256 KiB or more is one request for exactly its bytes, which go straight into the caller's buffer. Memory: up
/// to 4 MiB for the cache, and 64 KiB for each stream.
///
/// All bytes are of one version of the file, that of the first response. A version is known by a strong entity tag (RFC
/// 9110, section 8.8.3); otherwise by entity tag and Last-Modified, as far as the storage sends them; and always by the
/// size. A response of another version is errc::protocol_violation. The md5 is not checked: that would take the whole file.
class remote_file {
 public:
  /// Makes an object without a file, as a target for a move.
  remote_file() = default;
  /// Leaves the argument without a file.
  remote_file(remote_file&&) noexcept = default;
  /// Leaves the argument without a file.
  remote_file& operator=(remote_file&&) noexcept = default;

  /// Returns the file's path inside the run.
  [[nodiscard]] const std::string& name() const noexcept { return info_.name; }
  /// Returns the size in bytes.
  [[nodiscard]] std::uint64_t size() const noexcept { return reader_ ? info_.size.value_or(0) : 0; }
  /// Returns the service's description of the file. Its size is known; if the service did not tell it, the storage did.
  [[nodiscard]] const file_info& info() const noexcept { return info_; }
  /// Returns the entity tag of the first response; empty before it, or if the storage sends none. Thread-safe.
  [[nodiscard]] std::string entity_tag() const;

  /// Reads bytes at a position. Blocks. Safe to call from several threads at once. Failed requests are retried, and an expired
  /// address is renewed, as in wandb::try_restore; settings::total_timeout limits each call.
  ///
  /// @param offset  of the first byte, in bytes.
  /// @param buffer  `length` bytes; after a failure their content is unspecified.
  /// @param length  in bytes; may be 0.
  /// @return        the number of bytes read: `length`, or less if the file ends earlier; 0 at and beyond its end. Or an error:
  ///                protocol_violation if the file has changed since it was opened; http_failure with status 200 if the server
  ///                does not serve parts of files (then restore it); invalid_argument if the object has no file; or another errc
  ///                of wandb::try_restore.
  result<std::size_t> try_read_at(std::uint64_t offset, void* buffer, std::size_t length) const;
#if WANDB_RESTORE_EXCEPTIONS
  /// As try_read_at, but throws wandb::error instead of returning one.
  std::size_t read_at(std::uint64_t offset, void* buffer, std::size_t length) const {
    return try_read_at(offset, buffer, length).value();
  }
#endif
  /// Returns a stream at offset 0. Several streams of one file share its cache, and may be used at once.
  [[nodiscard]] remote_stream stream() const;

 private:
  friend class detail::remote_reader;
  friend class remote_stream;
  std::shared_ptr<detail::remote_reader> reader_ = {};
  file_info info_ = {};
};

/// A seekable binary input stream on a remote_file, which it may outlive. Movable, not copyable. An object may be used by one
/// thread at a time. Seeking beyond the end of the file fails.
///
/// After a failed read `bad()` is true and `failure()` tells the reason. std::istream rethrows the wandb::error only if
/// `exceptions()` has badbit. If the program is compiled without exceptions, the stream has badbit, eofbit and failbit after a
/// failed read: test `bad()` before `eof()`. After `clear()` the next read tries again, from the position before the failed one.
class remote_stream : public std::istream {
 public:
  /// Makes a stream at offset 0. Makes no request.
  explicit remote_stream(const remote_file& file);
  /// Moves position, state and formatting.
  remote_stream(remote_stream&& other) noexcept;
  /// Moves position, state and formatting.
  remote_stream& operator=(remote_stream&& other) noexcept;
  /// Releases the buffer. Makes no request.
  ~remote_stream() override;

  /// Returns the last failure, or null if no read has failed. The pointer is valid until the next read.
  [[nodiscard]] const wandb::error* failure() const noexcept;

 private:
  std::unique_ptr<detail::remote_buffer> buffer_;
};

// ============================================================================================= cache policy

namespace detail {
class restoring;
class opened_copy;
}  // namespace detail

/// Describes an existing local copy to a cache policy. All members are found without a request.
class local_copy {
 public:
  std::filesystem::path path;                        ///< root / name
  std::uint64_t size = 0;                            ///< bytes
  std::chrono::system_clock::time_point modified{};  ///< time of the last modification
  /// The run that the file was restored from, by its receipt. Empty if there is no receipt, or if the file has changed since.
  std::optional<run_path> restored_from;
  /// The name of the file in that run, as in file_info::name. Empty if restored_from is empty, or if the receipt does not
  /// record the name.
  std::string restored_name;
  /// The md5 in the receipt, in hex. Empty if there is no receipt, or if the file was restored without verification.
  std::string receipt_md5;

  /// Returns the md5 of the content in hex: the receipt's, or else computed by reading the file once, which blocks and
  /// reports progress. During a restore this reads the file that the restore has open; afterwards, the file at `path`.
  /// Returns an empty string if the file cannot be read or has changed since the restore opened it, or if the restore is
  /// cancelled. Not thread-safe.
  [[nodiscard]] std::string md5() const;

 private:
  friend class detail::restoring;
  std::weak_ptr<const detail::opened_copy> opened_ = {};  // objects of this class may outlive the restore
  mutable std::string known_md5_ = {};
};

/// Decides whether an existing local copy is used or replaced. A restore without a local copy does not consult the policy.
class cache_policy {
 public:
  /// A decision about a local copy.
  enum class verdict {
    keep,   ///< use the local copy
    fetch,  ///< download the file and replace the local copy
    ask,    ///< request the file's properties from the service, then call the rule again with them
  };
  /// A rule. The first call has `remote` null. If it returns `ask`, a second call has the service's description of the
  /// file; then `ask` means `fetch`. If another process has restored the file meanwhile, the rule is called again for the
  /// new copy. Threads that share a client call the rule concurrently, and so does one restore_all.
  using rule = std::function<verdict(const local_copy& local, const file_info* remote)>;

  /// Makes a policy of a rule. `decide` must not be empty.
  cache_policy(rule decide)
      : decide_(std::move(decide)) {}  // NOLINT: implicit, so that a lambda converts to a policy
  /// Makes a policy of a function object that converts to `rule`, e.g. a lambda.
  template <class F, class = std::enable_if_t<std::is_constructible_v<rule, F> &&
                                              !std::is_same_v<std::decay_t<F>, cache_policy> &&
                                              !std::is_same_v<std::decay_t<F>, rule>>>
  cache_policy(F&& decide) : decide_(std::forward<F>(decide)) {}  // NOLINT

  /// Uses any local copy, without a request (the SDK's `replace=False`).
  static cache_policy keep();
  /// Always downloads (the SDK's `replace=True`).
  static cache_policy replace();
  /// Asks the service for the md5. Downloads if the service has none, or if the local copy's differs.
  static cache_policy refresh();

  /// Calls the rule.
  [[nodiscard]] verdict operator()(const local_copy& local, const file_info* remote) const {
    return decide_(local, remote);
  }

 private:
  rule decide_;
};

// ================================================================================================= settings

/// A proxy for one scheme, and the hosts that are reached without it.
struct proxy_settings {
  std::string url;  ///< "http://[user:password@]host:port"; empty: no proxy
  /// As NO_PROXY: host, .domain, address, address/prefix, each with an optional :port; or "*".
  std::string bypass;
};

/// A setting as text, for people: see settings::shown.
struct shown_setting {
  std::string name;   ///< the member of `settings`
  std::string value;  ///< empty if the setting has no value; of a secret only "(set)"
  /// A variable ("WANDB_BASE_URL"), a key of a file ("base_url in wandb/settings"), "netrc entry MACHINE in FILE", "default" or
  /// "program".
  std::string source;
};

/// Server, credentials, default run, time limits, proxies and certificates. A default-constructed object uses the public
/// service without a key; `from_environment` finds the values that the SDK would use. The first call that needs an
/// invalid setting reports it.
struct settings {
  /// The address of the service's API; it may have a path prefix and trailing slashes. The public service has two names,
  /// api.forge.coreweave.com and api.wandb.ai: credentials that are stored for one are used for the other, too.
  std::string base_url = "https://api.forge.coreweave.com";

  std::string api_key = {};                     ///< 40 characters or more, or a JWT
  std::string identity_token_file = {};         ///< a file with a JWT to exchange for an access token
  std::filesystem::path credentials_file = {};  ///< stores access tokens; shared with the SDK
  std::filesystem::path netrc_file = {};  ///< searched for a key if api_key and identity_token_file are empty

  std::string entity = {};   ///< default for run paths without an entity
  std::string project = {};  ///< default for run paths without a project
  std::string run_id = {};   ///< default for run paths without a run id, and for calls without a run path

  std::filesystem::path run_dir = {};    ///< default of restore_options::root; if empty too: "."
  std::filesystem::path cache_dir = {};  ///< stores receipts; empty: no receipts are written
  bool offline = false;                  ///< true: make no request

  /// Limits TCP connection, CONNECT and TLS handshake together.
  std::chrono::milliseconds connect_timeout{30000};
  /// A connection fails if it receives less than `low_speed` bytes per second for this long.
  std::chrono::milliseconds idle_timeout{30000};
  std::uint64_t low_speed = 1024;                   ///< bytes per second
  std::chrono::milliseconds retry_timeout{300000};  ///< retries stop after this long without progress
  std::chrono::milliseconds total_timeout{0};       ///< limits a whole call; 0: no limit

  proxy_settings http_proxy = {};   ///< for http addresses
  proxy_settings https_proxy = {};  ///< for https addresses, through CONNECT
  /// CA certificates in a PEM file. If this and ca_directory are empty, the system's CA certificates are used.
  std::filesystem::path ca_file = {};
  /// Directories of certificates with hashed names (openssl rehash), separated by ':' (Windows: ';').
  std::filesystem::path ca_directory = {};
  bool verify_tls = true;  ///< false accepts any certificate, with a warning

  /// Sent with requests to base_url only; a Proxy-Authorization is sent to the proxy only.
  http_headers extra_headers = {};
  std::string username = {};    ///< X-WANDB-USERNAME in GraphQL requests
  std::string user_email = {};  ///< X-WANDB-USER-EMAIL in GraphQL requests
  std::string user_agent = "wandb_restore.hpp/" WANDB_RESTORE_VERSION;  ///< the User-Agent of all requests

  /// Receives warnings (insecure TLS, unreadable settings files). Must not throw. May be called concurrently, from
  /// threads that use the client and from threads of the library. Default: writes to standard error.
  std::function<void(std::string_view)> on_warning = {};
  /// Warnings of from_environment; the first request passes them to on_warning.
  std::vector<std::string> warnings = {};
  std::optional<wandb::error> problem =
      {};  ///< an error of from_environment; each call that needs a request returns it

  /// Reads environment variables, then settings files (local, then global), then wandb-resume.json (if WANDB_RESUME is
  /// auto), as README.md lists them; the first source of a value counts. Makes no request. Never fails: see `problem`.
  static settings from_environment();

  std::vector<shown_setting> sources = {};  ///< what from_environment found, and where; for `shown`
  /// Returns every setting with its value and the source of the value, without secrets. Keys and the values of headers
  /// appear as "(set)", proxies without user name and password. Reads the netrc file if there is no other key. A value that
  /// the program set has the source "program". The source of a secret is where from_environment found one, even if the
  /// program has replaced that secret.
  [[nodiscard]] std::vector<shown_setting> shown() const;
};

// ================================================================================= client and entry points

/// The options of one call. The first three are the Python SDK's.
struct restore_options {
  std::string run_path = {};  ///< any form that run_path::parse accepts; empty: the run in the settings
  bool replace = false;       ///< true: download even if there is a local copy
  /// The directory to put the file under, created if missing. Empty: settings::run_dir, or "." if that is empty too.
  std::filesystem::path root = {};
  std::optional<cache_policy> cache = {};  ///< overrides the client's policy; `replace = true` overrides both
  /// Called about ten times a second in the caller's thread; returns false to cancel. May throw: the exception leaves the
  /// restore, and the next call resumes from the bytes that had arrived.
  std::function<bool(const progress&)> on_progress = {};
  /// A flag that the caller sets to cancel, or null; must exist until the call returns. Once it is true, the call returns
  /// errc::cancelled within a second, except while a host name is resolved, the system writes the file to stable storage, or a
  /// disk does not answer.
  const std::atomic<bool>* cancel = nullptr;
  /// The most connections that download at once, for one large file or for the files of restore_all; at least 1. A value
  /// above 64 is treated as 64.
  int connections = 8;
  bool verify = true;  ///< false: do not check the md5, use one connection, resume nothing
  /// How long to wait for a file that the run has not uploaded yet, or for the first match of a pattern. The service is
  /// asked every ten seconds. The wait ends early if the service says that the run has ended. 0: do not wait.
  std::chrono::milliseconds wait{0};
  std::vector<std::string> exclude =
      {};  ///< patterns: restore_all and restore_newest leave out files that match one
};

/// The default transport: HTTP/1.1 (RFC 9112) over TCP and, for https, TLS 1.2 or later (OpenSSL). Keeps idle connections for
/// later requests to the same server, and loads CA certificates once. Copies share both. Tries the addresses of a host side
/// by side (RFC 8305). Safe to use from several threads at once, and in parent and child after a fork: the child opens
/// connections of its own.
class http_transport {
 public:
  /// Trusts the system's CA certificates.
  http_transport();
  /// Uses ca_file, ca_directory and verify_tls of `configuration`. The first https request reads the certificates.
  explicit http_transport(const settings& configuration);
  /// Makes one exchange, as is_transport says. Blocks; name resolution cannot be cancelled.
  result<http_response> send(const http_request& request, body_sink& sink);

 private:
  struct state;
  std::shared_ptr<state> state_;
};

#ifdef WANDB_RESTORE_HTTPLIB
/// A transport over cpp-httplib (0.11 to 0.53), for programs that use that library anyway. It keeps idle connections for later
/// requests to the same server; copies share them. Safe to use from several threads at once.
///
/// It uses the public interface of httplib::Client only, and therefore breaks some promises of a Transport. README.md lists
/// them; in short:
/// - an interim response other than 100 fails the exchange;
/// - a line of a response's head has at most 8 KiB: a longer Location (some signed addresses) fails the exchange;
/// - 0.11 to 0.41 percent-decode header values and lose their order; 0.41 decodes and re-encodes the query of an address;
/// - some versions accept endless lines and trailers, and an endless status line crashes 0.11;
/// - a malformed response is errc::connection_failed: cpp-httplib reports it as it reports a cut connection;
/// - if a body without a length ends without a TLS close_notify, 0.11 to 0.41 accept it as complete.
/// Besides, each connection reads the CA certificates again, and if ca_file is set, ca_directory may be ignored. Each
/// exchange starts a thread that polls for cancellation. On Windows, cancelling takes effect only after the connection is
/// established or connect_timeout has passed.
class httplib_transport {
 public:
  /// Trusts the CA certificates that cpp-httplib finds on the system.
  httplib_transport();
  /// Uses ca_file, ca_directory and verify_tls of `configuration`.
  explicit httplib_transport(const settings& configuration);
  /// Makes one exchange, as is_transport says. Blocks; name resolution cannot be cancelled.
  result<http_response> send(const http_request& request, body_sink& sink);

 private:
  struct state;
  std::shared_ptr<state> state_;
};
#endif

namespace detail {

/// Refers to a Transport of any type. The engine uses this type, so that its functions are no templates.
struct transport_ref {
  std::shared_ptr<void> object;  // shared: a remote_file may outlive its client
  result<http_response> (*send)(void* object, const http_request&, body_sink&);
};

/// The run that a call names. Refers to its argument.
struct run_argument {
  explicit run_argument(std::string_view run) : text(run) {}
  explicit run_argument(const run_path& run) : parts(&run) {}
  std::string_view text = {};
  const run_path* parts = nullptr;  // null: `text` counts
};

class session;
std::shared_ptr<session> open_session(settings configuration, transport_ref transport, cache_policy policy);
result<restored_file> restore(session& current, std::string_view name, const restore_options& options);
result<restored_file> restore(session& current, std::string_view name, const run_argument& run, bool replace,
                              std::filesystem::path root);
result<restore_report> restore_all(session& current, std::string_view pattern,
                                   const restore_options& options);
result<restore_report> restore_all(session& current, std::string_view pattern, const run_argument& run,
                                   bool replace, std::filesystem::path root);
result<restored_file> restore_newest(session& current, std::string_view pattern,
                                     const restore_options& options);
result<restored_file> restore_newest(session& current, std::string_view pattern, const run_argument& run,
                                     bool replace, std::filesystem::path root);
result<remote_file> open_remote(const std::shared_ptr<session>& current, std::string_view name,
                                const restore_options& options);
result<remote_file> open_remote(const std::shared_ptr<session>& current, std::string_view name,
                                const run_argument& run);
result<std::vector<file_info>> list_files(session& current, const restore_options& options);
result<std::vector<file_info>> list_files(session& current, const run_argument& run);

/// Whether T names a run: a text, or a run_path. No template parameter is deduced from a braced list, so `{...}` is a
/// restore_options.
template <class T>
inline constexpr bool names_run =
    std::is_convertible_v<T, std::string_view> || std::is_convertible_v<T, run_path>;

}  // namespace detail

/// Restores files with its own settings, transport and policy, and reuses connections between calls. All calls block, and
/// may be made from several threads at once. Movable while no call is running.
template <class Transport = http_transport>
class client {
  static_assert(is_transport<Transport>::value,
                "a Transport has a member: wandb::result<wandb::http_response> "
                "send(const wandb::http_request&, wandb::body_sink&)");

 public:
  /// Uses settings::from_environment(). The first call that needs an invalid setting returns errc::invalid_argument.
  client() : client(settings::from_environment()) {}
  /// Uses the given settings and policy. Constructs the Transport from the settings, or without arguments if it has no
  /// such constructor.
  explicit client(settings configuration, cache_policy policy = cache_policy::keep())
      : transport_(make_transport(configuration)),
        session_(detail::open_session(std::move(configuration), ref(), std::move(policy))) {}
  /// Uses the given settings, transport and policy. The client owns the transport.
  client(settings configuration, Transport transport, cache_policy policy = cache_policy::keep())
      : transport_(std::make_shared<Transport>(std::move(transport))),
        session_(detail::open_session(std::move(configuration), ref(), std::move(policy))) {}

  /// Restores one file. See the free function wandb::try_restore.
  result<restored_file> try_restore(std::string_view name, const restore_options& options = {}) {
    return detail::restore(*session_, name, options);
  }
  /// Restores one file, with the Python SDK's order of arguments. `run` is a text or a wandb::run_path.
  template <class Run, std::enable_if_t<detail::names_run<Run>, int> = 0>
  result<restored_file> try_restore(std::string_view name, const Run& run, bool replace = false,
                                    std::filesystem::path root = {}) {
    return detail::restore(*session_, name, detail::run_argument(run), replace, std::move(root));
  }

  /// Restores every file of the run that matches a pattern, several at once. See the free function wandb::try_restore_all.
  result<restore_report> try_restore_all(std::string_view pattern, const restore_options& options = {}) {
    return detail::restore_all(*session_, pattern, options);
  }
  /// Restores the files of the given run, a text or a wandb::run_path.
  template <class Run, std::enable_if_t<detail::names_run<Run>, int> = 0>
  result<restore_report> try_restore_all(std::string_view pattern, const Run& run, bool replace = false,
                                         std::filesystem::path root = {}) {
    return detail::restore_all(*session_, pattern, detail::run_argument(run), replace, std::move(root));
  }
  /// Restores the file that was changed last. See the free function wandb::try_restore_newest.
  result<restored_file> try_restore_newest(std::string_view pattern, const restore_options& options = {}) {
    return detail::restore_newest(*session_, pattern, options);
  }
  /// Restores a file of the given run, a text or a wandb::run_path.
  template <class Run, std::enable_if_t<detail::names_run<Run>, int> = 0>
  result<restored_file> try_restore_newest(std::string_view pattern, const Run& run, bool replace = false,
                                           std::filesystem::path root = {}) {
    return detail::restore_newest(*session_, pattern, detail::run_argument(run), replace, std::move(root));
  }

  /// Opens a file of a run for reading over the network. See the free function wandb::try_open.
  result<remote_file> try_open(std::string_view name, const restore_options& options = {}) {
    return detail::open_remote(session_, name, options);
  }
  /// Opens a file of the given run, a text or a wandb::run_path.
  template <class Run, std::enable_if_t<detail::names_run<Run>, int> = 0>
  result<remote_file> try_open(std::string_view name, const Run& run) {
    return detail::open_remote(session_, name, detail::run_argument(run));
  }

  /// Lists the files of a run in the service's order. Uses the options run_path and cancel only. Errors as in
  /// wandb::try_restore, and errc::protocol_violation for a list that takes more than 24 MiB (about 125,000 files) or
  /// 5,000 pages.
  result<std::vector<file_info>> try_list_files(const restore_options& options = {}) {
    return detail::list_files(*session_, options);
  }
  /// Lists the files of the given run, a text or a wandb::run_path.
  template <class Run, std::enable_if_t<detail::names_run<Run>, int> = 0>
  result<std::vector<file_info>> try_list_files(const Run& run) {
    return detail::list_files(*session_, detail::run_argument(run));
  }

#if WANDB_RESTORE_EXCEPTIONS
  /// As try_restore, but throws wandb::error instead of returning one.
  restored_file restore(std::string_view name, const restore_options& options = {}) {
    return try_restore(name, options).value();
  }
  /// As try_restore, but throws wandb::error instead of returning one.
  template <class Run, std::enable_if_t<detail::names_run<Run>, int> = 0>
  restored_file restore(std::string_view name, const Run& run, bool replace = false,
                        std::filesystem::path root = {}) {
    return try_restore(name, run, replace, std::move(root)).value();
  }
  /// As try_restore_all, but throws wandb::error where that returns one. Failures of single files are in the report.
  restore_report restore_all(std::string_view pattern, const restore_options& options = {}) {
    return try_restore_all(pattern, options).value();
  }
  /// As try_restore_all, but throws wandb::error where that returns one.
  template <class Run, std::enable_if_t<detail::names_run<Run>, int> = 0>
  restore_report restore_all(std::string_view pattern, const Run& run, bool replace = false,
                             std::filesystem::path root = {}) {
    return try_restore_all(pattern, run, replace, std::move(root)).value();
  }
  /// As try_restore_newest, but throws wandb::error instead of returning one.
  restored_file restore_newest(std::string_view pattern, const restore_options& options = {}) {
    return try_restore_newest(pattern, options).value();
  }
  /// As try_restore_newest, but throws wandb::error instead of returning one.
  template <class Run, std::enable_if_t<detail::names_run<Run>, int> = 0>
  restored_file restore_newest(std::string_view pattern, const Run& run, bool replace = false,
                               std::filesystem::path root = {}) {
    return try_restore_newest(pattern, run, replace, std::move(root)).value();
  }
  /// As try_open, but throws wandb::error instead of returning one.
  remote_file open(std::string_view name, const restore_options& options = {}) {
    return try_open(name, options).value();
  }
  /// As try_open, but throws wandb::error instead of returning one.
  template <class Run, std::enable_if_t<detail::names_run<Run>, int> = 0>
  remote_file open(std::string_view name, const Run& run) {
    return try_open(name, run).value();
  }
  /// As try_list_files, but throws wandb::error instead of returning one.
  std::vector<file_info> list_files(const restore_options& options = {}) {
    return try_list_files(options).value();
  }
  /// As try_list_files, but throws wandb::error instead of returning one.
  template <class Run, std::enable_if_t<detail::names_run<Run>, int> = 0>
  std::vector<file_info> list_files(const Run& run) {
    return try_list_files(run).value();
  }
#endif

 private:
  static std::shared_ptr<Transport> make_transport(const settings& configuration) {
    if constexpr (std::is_constructible_v<Transport, const settings&>) {
      return std::make_shared<Transport>(configuration);
    } else {
      return std::make_shared<Transport>();
    }
  }
  detail::transport_ref ref() {
    return {transport_, [](void* object, const http_request& request, body_sink& sink) {
              return result<http_response>(static_cast<Transport*>(object)->send(request, sink));
            }};
  }
  std::shared_ptr<Transport> transport_;  // on the heap: a move of the client must not change its address
  std::shared_ptr<detail::session> session_;
};

/// Downloads one file of a run, verifies it and opens the local copy. By default an existing local copy is opened without
/// a request. Blocks. May be called from several threads and processes at once, also for the same file.
///
/// Each call makes a client<>, which reads the settings and opens connections anew. To restore several files, make one
/// client and use it for all of them.
///
/// @param name     the file's path inside the run, '/'-separated, e.g. "ckpt/best.h5". Must not be empty, absolute, or
///                 contain "..".
/// @param options  see restore_options.
/// @return         the open stream, or an error with any errc. After a failure the file at the local path is unchanged; a
///                 hidden file beside it keeps the bytes that arrived, and the next call resumes from them.
/// @throws         std::bad_alloc if an allocation fails in any thread of the call, and any exception of on_progress or of
///                 the transport: the state is as after a failure. (Without exceptions, a failed allocation ends the
///                 program.)
/// Source: wandb.restore of the Python SDK (wandb/sdk/wandb_run.py).
inline result<restored_file> try_restore(std::string_view name, const restore_options& options = {}) {
  return client<>().try_restore(name, options);
}
/// As above, with the Python SDK's order of arguments. `run` is a text or a wandb::run_path.
template <class Run, std::enable_if_t<detail::names_run<Run>, int> = 0>
result<restored_file> try_restore(std::string_view name, const Run& run, bool replace = false,
                                  std::filesystem::path root = {}) {
  return client<>().try_restore(name, run, replace, std::move(root));
}

/// Downloads every file of a run that matches a pattern. Blocks; thread-safe as try_restore.
///
/// The list is fetched page by page (500 files). Meanwhile the files of earlier pages are downloaded side by side. A file
/// gets one connection, and one more for each further 8 MiB while connections are free. `options.connections` limits the
/// connections of the whole call, except the one that fetches the list. Each file is restored as try_restore restores it:
/// policy, receipts, verification and resuming are the same. cache_policy::refresh takes the md5 from the list, without a
/// request for each file.
///
/// The failure of one file does not stop the others. not_authenticated, a full disk, offline mode and a cancellation stop
/// the call: such a failure is restore_report::failure, and the failure of each file that was listed but not tried. Of two
/// names that differ only in the case of ASCII letters, the second is refused with invalid_argument: some file systems
/// would store both as one file.
///
/// @param pattern  as matches_pattern says; files that match one of `options.exclude` are left out.
/// @param options  see restore_options; on_progress gets sums over all files, `wait` waits for the first match.
/// @return         the report; or, if the call ended before any file matched, an error: file_not_found if the run has no match,
///                 else any errc of try_restore.
inline result<restore_report> try_restore_all(std::string_view pattern, const restore_options& options = {}) {
  return client<>().try_restore_all(pattern, options);
}
/// As above, for the given run, a text or a wandb::run_path.
template <class Run, std::enable_if_t<detail::names_run<Run>, int> = 0>
result<restore_report> try_restore_all(std::string_view pattern, const Run& run, bool replace = false,
                                       std::filesystem::path root = {}) {
  return client<>().try_restore_all(pattern, run, replace, std::move(root));
}
/// Restores the most recently changed file that matches a pattern (file_info::updated_at). Of files with equal times, takes the
/// last in the service's order. Otherwise as try_restore. @return  the open stream, or an error with any errc.
inline result<restored_file> try_restore_newest(std::string_view pattern,
                                                const restore_options& options = {}) {
  return client<>().try_restore_newest(pattern, options);
}
/// As above, for the given run, a text or a wandb::run_path.
template <class Run, std::enable_if_t<detail::names_run<Run>, int> = 0>
result<restored_file> try_restore_newest(std::string_view pattern, const Run& run, bool replace = false,
                                         std::filesystem::path root = {}) {
  return client<>().try_restore_newest(pattern, run, replace, std::move(root));
}

/// Opens a file of a run for reading over the network: one tensor of a checkpoint, the directory of an archive. Nothing is
/// written to disk. Asks the service for the file. The first read contacts the storage; this call contacts it if the
/// service does not tell the size. Blocks. May be called from several threads at once.
///
/// @param name     as for try_restore.
/// @param options  run_path, cancel and wait are used, on_progress during the wait. `cancel` must exist until the remote_file
///                 and its streams are destroyed, and cancels their reads, too.
/// @return         the file, or an error as try_restore. See remote_file for the errors of reading.
inline result<remote_file> try_open(std::string_view name, const restore_options& options = {}) {
  return client<>().try_open(name, options);
}
/// Opens a file of the given run, a text or a wandb::run_path.
template <class Run, std::enable_if_t<detail::names_run<Run>, int> = 0>
result<remote_file> try_open(std::string_view name, const Run& run) {
  return client<>().try_open(name, run);
}

/// Lists the files of a run in the service's order. Uses the options run_path and cancel only. Blocks, and makes a
/// client<> for each call.
/// @return  the files, or an error as try_restore.
inline result<std::vector<file_info>> try_list_files(const restore_options& options = {}) {
  return client<>().try_list_files(options);
}
/// Lists the files of the given run, a text or a wandb::run_path.
template <class Run, std::enable_if_t<detail::names_run<Run>, int> = 0>
result<std::vector<file_info>> try_list_files(const Run& run) {
  return client<>().try_list_files(run);
}

#if WANDB_RESTORE_EXCEPTIONS
/// As try_restore, but throws wandb::error instead of returning one.
inline restored_file restore(std::string_view name, const restore_options& options = {}) {
  return try_restore(name, options).value();
}
/// As try_restore, but throws wandb::error instead of returning one.
template <class Run, std::enable_if_t<detail::names_run<Run>, int> = 0>
restored_file restore(std::string_view name, const Run& run, bool replace = false,
                      std::filesystem::path root = {}) {
  return try_restore(name, run, replace, std::move(root)).value();
}
/// As try_restore_all, but throws wandb::error where that returns one. Failures of single files are in the report.
inline restore_report restore_all(std::string_view pattern, const restore_options& options = {}) {
  return try_restore_all(pattern, options).value();
}
/// As try_restore_all, but throws wandb::error where that returns one.
template <class Run, std::enable_if_t<detail::names_run<Run>, int> = 0>
restore_report restore_all(std::string_view pattern, const Run& run, bool replace = false,
                           std::filesystem::path root = {}) {
  return try_restore_all(pattern, run, replace, std::move(root)).value();
}
/// As try_restore_newest, but throws wandb::error instead of returning one.
inline restored_file restore_newest(std::string_view pattern, const restore_options& options = {}) {
  return try_restore_newest(pattern, options).value();
}
/// As try_restore_newest, but throws wandb::error instead of returning one.
template <class Run, std::enable_if_t<detail::names_run<Run>, int> = 0>
restored_file restore_newest(std::string_view pattern, const Run& run, bool replace = false,
                             std::filesystem::path root = {}) {
  return try_restore_newest(pattern, run, replace, std::move(root)).value();
}
/// As try_open, but throws wandb::error instead of returning one.
inline remote_file open(std::string_view name, const restore_options& options = {}) {
  return try_open(name, options).value();
}
/// As try_open, but throws wandb::error instead of returning one.
template <class Run, std::enable_if_t<detail::names_run<Run>, int> = 0>
remote_file open(std::string_view name, const Run& run) {
  return try_open(name, run).value();
}
/// As try_list_files, but throws wandb::error instead of returning one.
inline std::vector<file_info> list_files(const restore_options& options = {}) {
  return try_list_files(options).value();
}
/// As try_list_files, but throws wandb::error instead of returning one.
template <class Run, std::enable_if_t<detail::names_run<Run>, int> = 0>
std::vector<file_info> list_files(const Run& run) {
  return try_list_files(run).value();
}
#endif

}  // namespace WANDB_RESTORE_PRIVATE_ABI
}  // namespace wandb

#endif  // WANDB_RESTORE_HPP

// ------------------------------------------------------------------------------ implementation from here on
#if (!defined(WANDB_RESTORE_SPLIT) || defined(WANDB_RESTORE_IMPLEMENTATION)) &&                              \
    !defined(WANDB_RESTORE_IMPLEMENTED)
#define WANDB_RESTORE_IMPLEMENTED

#include <algorithm>           // min, max, all_of
#include <array>               //
#include <condition_variable>  // waits between a download's threads
#include <cstdio>              // warnings
#include <cstring>             // memcpy
#include <ctime>               // strftime
#include <exception>           // exceptions of threads
#include <mutex>               //
#include <new>                 // nothrow

#include <nlohmann/json.hpp>

#ifdef _WIN32
#ifndef WIN32_LEAN_AND_MEAN
#define WIN32_LEAN_AND_MEAN
#define WANDB_RESTORE_PRIVATE_LEAN
#endif
#ifndef NOMINMAX
#define NOMINMAX
#define WANDB_RESTORE_PRIVATE_NOMINMAX
#endif
#include <windows.h>
#ifdef WANDB_RESTORE_PRIVATE_LEAN
#undef WIN32_LEAN_AND_MEAN
#undef WANDB_RESTORE_PRIVATE_LEAN
#endif
#ifdef WANDB_RESTORE_PRIVATE_NOMINMAX
#undef NOMINMAX
#undef WANDB_RESTORE_PRIVATE_NOMINMAX
#endif
#include <process.h>  // _beginthreadex
#else
#include <cerrno>          //
#include <dirent.h>        // opendir
#include <fcntl.h>         // open, record locks, fallocate
#include <pthread.h>       // threads: pthread_create returns its error, std::thread throws it
#include <signal.h>        // kill(pid, 0): is the process alive
#include <sys/stat.h>      //
#include <sys/resource.h>  // RLIMIT_FSIZE
#include <sys/statvfs.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/vfs.h>  // fstatfs
#endif
#ifdef __APPLE__
#include <sys/sysctl.h>
#endif
#endif

#ifdef _WIN32
#include <winsock2.h>
#include <ws2tcpip.h>  // getaddrinfo, inet_pton
#ifndef WANDB_RESTORE_NO_OPENSSL
#include <wincrypt.h>  // the system's certificates; before OpenSSL, which undefines some of its macros
#endif
#ifdef _MSC_VER
#pragma comment(lib, "ws2_32")
#pragma comment(lib, "crypt32")
#endif
#else
#include <arpa/inet.h>    // inet_pton
#include <netdb.h>        // getaddrinfo
#include <netinet/in.h>   //
#include <netinet/tcp.h>  // TCP_NODELAY
#include <poll.h>         //
#include <sys/socket.h>   //
#endif
#ifndef WANDB_RESTORE_NO_OPENSSL
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored                                                                               \
    "-Wuseless-cast"  // a cast from 64 bits to std::size_t is needed on 32-bit machines
#endif

namespace wandb {
inline namespace WANDB_RESTORE_PRIVATE_ABI {

// ==================================================================================================== text

namespace detail {

/// Refers to a function object, which must outlive the reference. std::function is slow to compile.
template <class Signature>
class function_ref;
template <class Result, class... Arguments>
class function_ref<Result(Arguments...)> {
 public:
  function_ref() = default;  ///< empty
  template <class Function>
  function_ref(const Function& function)  // NOLINT: implicit, as in std::function
      : object_(&function), call_([](const void* object, Arguments... arguments) -> Result {
          return (*static_cast<const Function*>(object))(arguments...);
        }) {}
  explicit operator bool() const { return call_ != nullptr; }
  Result operator()(Arguments... arguments) const { return call_(object_, arguments...); }

 private:
  const void* object_ = nullptr;
  Result (*call_)(const void* object, Arguments... arguments) = nullptr;
};

inline bool is_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }
inline bool is_control(char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7f; }
inline bool is_digit(char c) { return c >= '0' && c <= '9'; }
inline bool is_letter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }

inline char lower(char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c; }
inline std::string lower(std::string_view text) {
  std::string out(text);
  for (char& c : out) c = lower(c);
  return out;
}
inline bool equal_ignoring_case(std::string_view a, std::string_view b) {
  std::size_t same = 0;
  while (same < a.size() && same < b.size() && lower(a[same]) == lower(b[same])) ++same;
  return same == a.size() && same == b.size();
}
inline bool contains_ignoring_case(std::string_view text, std::string_view part) {
  return lower(text).find(lower(part)) != std::string::npos;
}
inline bool has_control(std::string_view text) {
  for (const char c : text) {
    if (is_control(c)) return true;
  }
  return false;
}
/// Whether the text has only letters, digits, '-' and '_'.
inline bool is_plain(std::string_view text) {
  for (const char c : text) {
    if (!is_letter(c) && !is_digit(c) && c != '-' && c != '_') return false;
  }
  return true;
}
inline bool has_word(std::string_view text, std::string_view word) {
  for (std::size_t begin = 0; begin + word.size() <= text.size(); ++begin) {
    const auto end = begin + word.size();
    if (equal_ignoring_case(text.substr(begin, word.size()), word) &&
        (begin == 0 || !is_plain(text.substr(begin - 1, 1))) &&
        (end == text.size() || !is_plain(text.substr(end, 1)))) {
      return true;
    }
  }
  return false;
}
inline bool starts_with(std::string_view text, std::string_view prefix) {
  return text.substr(0, prefix.size()) == prefix;
}

inline std::string_view trim(std::string_view text) {
  while (!text.empty() && is_space(text.front())) text.remove_prefix(1);
  while (!text.empty() && is_space(text.back())) text.remove_suffix(1);
  return text;
}

/// Removes the white space that Python's str.strip() removes from both ends of a UTF-8 text.
inline std::string_view strip(std::string_view text) {
  const auto is_white = [](std::string_view c) {
    if (c.size() == 1) return is_space(c.front()) || (c.front() >= '\x1c' && c.front() <= '\x1f');
    if (c.size() == 2) return c == "\xc2\x85" || c == "\xc2\xa0";  // U+0085, U+00A0
    const std::string_view last = c.substr(2);
    if (starts_with(c, "\xe2\x80"))  // U+2000 to U+200A, U+2028, U+2029, U+202F
      return (last >= "\x80" && last <= "\x8a") || last == "\xa8" || last == "\xa9" || last == "\xaf";
    return c == "\xe1\x9a\x80" || c == "\xe2\x81\x9f" || c == "\xe3\x80\x80";  // U+1680, U+205F, U+3000
  };
  for (std::size_t bytes = 1; bytes <= 3 && bytes <= text.size();) {
    const bool white = is_white(text.substr(0, bytes));
    if (white) text.remove_prefix(bytes);
    bytes = white ? 1 : bytes + 1;
  }
  for (std::size_t bytes = 1; bytes <= 3 && bytes <= text.size();) {
    const bool white = is_white(text.substr(text.size() - bytes));
    if (white) text.remove_suffix(bytes);
    bytes = white ? 1 : bytes + 1;
  }
  return text;
}

inline std::vector<std::string_view> split(std::string_view text, char separator) {
  std::vector<std::string_view> parts;
  for (;;) {
    const auto end = text.find(separator);
    parts.push_back(text.substr(0, end));
    if (end == std::string_view::npos) return parts;
    text.remove_prefix(end + 1);
  }
}

/// Converts the whole text, digits without a sign, to a number. Returns nothing for other texts and on overflow. Does not
/// use <charconv>, which is slow to compile.
inline std::optional<std::uint64_t> to_number(std::string_view text, unsigned base = 10) {
  constexpr std::uint64_t greatest = ~std::uint64_t{0};
  std::uint64_t value = 0;
  for (const char c : text) {
    const auto digit = static_cast<unsigned>(is_digit(c) ? c - '0' : is_letter(c) ? lower(c) - 'a' + 10 : 36);
    if (digit >= base || value > (greatest - digit) / base) return std::nullopt;
    value = value * base + digit;
  }
  return text.empty() ? std::nullopt : std::optional<std::uint64_t>(value);
}

inline std::string hex_encode(std::string_view bytes) {
  static constexpr char digits[] = "0123456789abcdef";
  std::string out;
  out.reserve(bytes.size() * 2);
  for (const char c : bytes) {
    out += digits[static_cast<unsigned char>(c) >> 4];
    out += digits[static_cast<unsigned char>(c) & 15];
  }
  return out;
}
inline std::optional<std::string> hex_decode(std::string_view text) {
  if (text.size() % 2 != 0) return std::nullopt;
  std::string out;
  for (std::size_t i = 0; i < text.size(); i += 2) {
    const auto byte = to_number(text.substr(i, 2), 16);
    if (!byte) return std::nullopt;
    out += static_cast<char>(*byte);
  }
  return out;
}
inline std::string hex64(std::uint64_t value) {
  std::string bytes;
  for (int shift = 56; shift >= 0; shift -= 8) bytes += static_cast<char>(value >> shift & 0xff);
  return hex_encode(bytes);
}

inline constexpr std::string_view base64_digits =
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// RFC 4648, section 4.
inline std::string base64_encode(std::string_view bytes) {
  std::string out;
  std::uint32_t bits = 0;
  int held = 0;
  for (const char c : bytes) {
    bits = bits << 8 | static_cast<unsigned char>(c);
    for (held += 8; held >= 6; held -= 6) out += base64_digits[bits >> (held - 6) & 63];
  }
  if (held > 0) out += base64_digits[bits << (6 - held) & 63];
  out.resize((out.size() + 3) / 4 * 4, '=');
  return out;
}
/// Returns nothing if padding is missing or a character is not in the alphabet.
inline std::optional<std::string> base64_decode(std::string_view text) {
  if (text.size() % 4 != 0) return std::nullopt;
  std::size_t padding = 0;
  while (padding < 2 && !text.empty() && text.back() == '=') text.remove_suffix(1), ++padding;
  std::string out;
  std::uint32_t bits = 0;
  int held = 0;
  for (const char c : text) {
    const auto value = base64_digits.find(c);
    if (value == std::string_view::npos) return std::nullopt;
    bits = bits << 6 | static_cast<std::uint32_t>(value);
    held += 6;
    if (held >= 8) {
      held -= 8;
      out += static_cast<char>(bits >> held & 0xff);
    }
  }
  return out;
}

/// Encodes all bytes except unreserved characters (RFC 3986, section 2.3) and the characters in `keep`.
inline std::string percent_encode(std::string_view bytes, std::string_view keep = "") {
  std::string out;
  for (const char c : bytes) {
    if (is_letter(c) || is_digit(c) ||
        (c != '\0' && std::string_view("-._~").find(c) != std::string_view::npos) ||
        keep.find(c) != std::string_view::npos) {
      out += c;
    } else {
      out += '%';
      for (const char digit : hex_encode({&c, 1}))
        out += is_letter(digit) ? static_cast<char>(digit - 'a' + 'A') : digit;
    }
  }
  return out;
}
inline std::optional<std::string> percent_decode(std::string_view text) {
  std::string out;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '%') {
      out += text[i];
      continue;
    }
    const auto byte = i + 2 < text.size() ? to_number(text.substr(i + 1, 2), 16) : std::nullopt;
    if (!byte) return std::nullopt;
    out += static_cast<char>(*byte);
    i += 2;
  }
  return out;
}

/// Quotes a text for a message: in double quotes, control characters escaped, cut after 200 bytes.
inline std::string in_quotes(std::string_view text) {
  std::string out = "\"";
  for (const char c : text.substr(0, 200)) {
    if (is_control(c) || c == '"' || c == '\\') {
      out += is_control(c) ? "\\x" + hex_encode({&c, 1}) : std::string{'\\', c};
    } else {
      out += c;
    }
  }
  return out + (text.size() > 200 ? "...\"" : "\"");
}

/// Converts a path to UTF-8, the encoding of file names inside runs, of messages and of records.
inline std::string utf8(const std::filesystem::path& path) {
#ifdef _WIN32
  const std::wstring& wide = path.native();  // u8string() throws for a lone surrogate
  const int size = static_cast<int>(wide.size());
  std::string text(wide.size() * 3, '\0');  // a UTF-16 unit takes three bytes at most
  text.resize(static_cast<std::size_t>(WideCharToMultiByte(CP_UTF8, 0, wide.data(), size, text.data(),
                                                           static_cast<int>(text.size()), nullptr, nullptr)));
  return text;
#else
  return path.native();
#endif
}
inline std::filesystem::path from_utf8(std::string_view text) {
#ifdef _WIN32
  std::wstring wide(text.size(), L'\0');
  const int length = static_cast<int>(text.size());
  wide.resize(
      static_cast<std::size_t>(MultiByteToWideChar(CP_UTF8, 0, text.data(), length, wide.data(), length)));
  return wide;
#else
  return text;
#endif
}
// A template, so that a string does not convert to a path.
template <class Path, std::enable_if_t<std::is_same_v<Path, std::filesystem::path>, int> = 0>
std::string in_quotes(const Path& path) {
  return in_quotes(std::string_view(utf8(path)));
}

/// Writes a number of bytes for a message: "512 bytes", "11.8 MiB".
inline std::string readable_bytes(std::uint64_t count) {
  static constexpr const char* units[] = {"bytes", "KiB", "MiB", "GiB", "TiB"};
  double value = static_cast<double>(count);
  std::size_t unit = 0;
  for (; value >= 1024 && unit < 4; ++unit) value /= 1024;
  std::array<char, 32> text{};
  static_cast<void>(
      std::snprintf(text.data(), text.size(), unit == 0 ? "%.0f %s" : "%.1f %s", value, units[unit]));
  return text.data();
}

/// Returns the 64-bit FNV-1a hash. Collisions can be made at will: use it for names, not as proof of equality.
inline std::uint64_t name_hash(std::string_view text) {
  std::uint64_t hash = 0xcbf29ce484222325u;
  for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  return hash;
}

/// Converts an md5 in base64 or hex to 32 lower-case hex digits. Returns "" (md5 unknown) for other texts.
inline std::string normalised_md5(std::string_view text) {
  if (text.size() == 32) {
    const auto bytes = hex_decode(text);
    return bytes ? hex_encode(*bytes) : std::string();
  }
  const auto bytes = base64_decode(text);
  return bytes && bytes->size() == 16 ? hex_encode(*bytes) : std::string();
}

/// Returns the days from 1970-01-01 to a Gregorian date. Counts years from March, so that a leap day is the last day of a
/// year.
inline std::int64_t days_from_civil(int year, int month, int day) {
  const std::int64_t y = year - (month <= 2), era = (y >= 0 ? y : y - 399) / 400, year_of_era = y - era * 400;
  const std::int64_t day_of_year = (153 * (month > 2 ? month - 3 : month + 9) + 2) / 5 + day - 1;
  return era * 146097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719468;
}

/// Converts a time in UTC to seconds since 1970. `parts`: year, month, day, hour, minute, second, in decimal digits.
inline std::optional<std::uint64_t> utc_seconds(const std::string_view (&parts)[6]) {
  int number[6] = {};
  for (std::size_t i = 0; i < 6; ++i) {
    const auto value = parts[i].size() <= 4 ? to_number(parts[i]) : std::nullopt;
    if (!value) return std::nullopt;
    number[i] = static_cast<int>(*value);
  }
  const auto [year, month, day, hour, minute, second] = number;
  if (year < 1970 || month < 1 || month > 12 || day < 1 || day > 31 || hour > 23 || minute > 59 ||
      second > 60)
    return std::nullopt;
  return static_cast<std::uint64_t>(days_from_civil(year, month, day) * 86400 + hour * 3600 + minute * 60 +
                                    second);
}

/// Converts an HTTP date in the preferred format, IMF-fixdate (RFC 9110, section 5.6.7), to seconds since 1970.
inline std::optional<std::uint64_t> parse_http_date(std::string_view text) {
  static constexpr std::string_view months = "JanFebMarAprMayJunJulAugSepOctNovDec";
  if (text.size() != 29 || text.substr(25) != " GMT") return std::nullopt;
  const auto found = months.find(text.substr(8, 3));
  if (found == std::string_view::npos || found % 3 != 0) return std::nullopt;
  const std::string month = std::to_string(found / 3 + 1);
  return utc_seconds({text.substr(12, 4), month, text.substr(5, 2), text.substr(17, 2), text.substr(20, 2),
                      text.substr(23, 2)});
}

// ---- header fields (RFC 9110, section 5)

/// Limit for all header fields of a response together, in bytes.
inline constexpr std::size_t max_head_bytes = 64 * 1024;

inline bool is_token(std::string_view text) {
  for (const char c : text) {
    if (!is_plain({&c, 1}) && std::string_view("!#$%&'*+.^`|~").find(c) == std::string_view::npos)
      return false;
  }
  return !text.empty();
}
inline bool is_field_value(std::string_view text) {
  for (const char c : text) {
    if (is_control(c) && c != '\t') return false;
  }
  return true;
}

/// Returns the value of the first field with this name, or null.
inline const std::string* find_header(const http_headers& fields, std::string_view name) {
  for (const auto& field : fields) {
    if (equal_ignoring_case(field.first, name)) return &field.second;
  }
  return nullptr;
}
inline void add_header(http_headers& fields, std::string_view name, std::string_view value) {
  fields.push_back({std::string(name), std::string(value)});
}

/// Whether a text looks like a JWT (RFC 7519), which is a secret.
inline bool is_jwt(std::string_view text) { return starts_with(trim(text), "eyJ"); }

/// Removes user name, password, query and fragment from an address, for messages: each may be a secret. The address need
/// not be well-formed; a user name may contain '@', and a password '?' and '/'.
inline std::string redacted_address(std::string_view text) {
  const auto scheme_end = text.find("://");
  const bool has_scheme =
      scheme_end != text.npos && text.find_first_of(":/?#") == scheme_end;  // not one in the query
  const auto authority = has_scheme ? scheme_end + 3 : 0;
  const std::string scheme(text.substr(0, authority));
  const auto query = (std::min)(text.find_first_of("?#", authority), text.size());
  const auto last_at = text.rfind('@');
  if (last_at == text.npos || last_at < authority) return std::string(text.substr(0, query));
  if (last_at < query) return scheme + "..." + std::string(text.substr(last_at, query - last_at));
  // The '@' is in the query, or follows a password with '?'.
  const auto before_path = text.substr(authority, text.find_first_of("/?#", authority) - authority);
  return before_path.find_first_of(":@") == text.npos ? std::string(text.substr(0, query)) : scheme + "...";
}

/// Cuts off the query and fragment of each address in a text, for messages: a query may be a signature.
inline std::string without_queries(std::string_view text) {
  std::string shown;
  for (auto scheme = text.find("://"); scheme != text.npos; scheme = text.find("://")) {
    const auto end = (std::min)(text.find_first_of(" \t\r\n\"'<>", scheme), text.size());
    const auto query = (std::min)(text.find_first_of("?#", scheme), end);
    shown.append(text.substr(0, query)).append(query < end ? "?***" : "");
    text.remove_prefix(end);
  }
  return shown.append(text);
}

/// Removes tags, and the content of the elements "script" and "style", from a text in HTML or XML.
inline std::string without_markup(std::string_view text) {
  const auto skip_to = [&](std::string_view mark) {
    text.remove_prefix((std::min)(text.find(mark), text.size()));
  };
  std::string plain;
  while (!text.empty()) {
    const auto tag = (std::min)(text.find('<'), text.size());
    plain.append(text.substr(0, tag)).append(" ");
    text.remove_prefix(tag);
    const std::string name = lower(text.substr(0, 7));
    if (starts_with(name, "<script") || starts_with(name, "<style")) skip_to("</");
    skip_to(">");
    if (!text.empty()) text.remove_prefix(1);
  }
  return plain;
}

/// Returns the first words of a server's text for a message, about 80 bytes: on one line, without markup and control
/// characters. Words that may be secrets become "***": keys, tokens, and the queries of addresses.
inline std::string first_words(std::string_view text) {
  constexpr std::size_t most = 80, shortest_secret = 20;
  std::string plain = without_markup(text);
  if (trim(plain).empty()) plain = text;
  for (char& c : plain) {
    if (is_space(c)) c = ' ';
  }
  std::string words;
  for (const auto word : split(plain, ' ')) {
    std::string shown;
    for (const char c : word) {
      if (!is_control(c)) shown += c;
    }
    if (shown.empty()) continue;
    if (const auto mark = shown.find('?'), equals = shown.find('='); equals < mark) {
      shown = "***";
    } else if (equals != shown.npos) {
      shown = redacted_address(shown) + "***";
    } else if (shown.find("://") != shown.npos) {
      shown = redacted_address(shown);
    }
    std::size_t run = 0;  // length of a run of characters that occur in keys
    for (const char c : shown) {
      run = is_plain({&c, 1}) || c == '+' || c == '/' || c == '.' || c == '%' ? run + 1 : 0;
      if (run == shortest_secret && shown.find("://") == shown.npos) {
        shown = "***";
        break;
      }
    }
    words.append(words.empty() ? "" : " ").append(shown);
    if (words.size() > most) break;
  }
  if (words.size() <= most) return words;
  std::size_t end = most;  // not inside a character
  while (end > 0 && (static_cast<unsigned char>(words[end]) & 0xC0U) == 0x80U) --end;
  return words.substr(0, end) + "...";
}

}  // namespace detail

WANDB_RESTORE_PRIVATE_INLINE const std::string* http_response::header(std::string_view name) const {
  return detail::find_header(headers, name);
}

WANDB_RESTORE_PRIVATE_INLINE result<url> url::parse(std::string_view text) {
  const std::string shown = detail::redacted_address(text);
  const auto fail = [&](const char* why) {
    return error(errc::protocol_violation, "cannot use the address " + detail::in_quotes(shown) + ": " + why);
  };
  if (detail::has_control(text)) return fail("it has control characters");
  const auto colon = text.find("://");
  if (colon == std::string_view::npos) return fail("it is not absolute (http:// or https://)");
  url parsed;
  parsed.scheme = detail::lower(text.substr(0, colon));
  if (parsed.scheme != "http" && parsed.scheme != "https")
    return fail("its scheme is neither http nor https");
  parsed.port = parsed.scheme == "https" ? 443 : 80;

  text = text.substr(0, text.find('#'));
  const std::string_view rest = text.substr(colon + 3);
  std::string_view authority = rest.substr(0, rest.find_first_of("/?"));
  const std::string_view target = rest.substr(authority.size());
  if (const auto user_end = authority.rfind('@'); user_end != std::string_view::npos) {
    parsed.user_info = authority.substr(0, user_end);
    authority.remove_prefix(user_end + 1);
  }
  std::string_view host = authority, port;
  if (!authority.empty() && authority.front() == '[') {
    const auto end = authority.find(']');
    if (end == std::string_view::npos) return fail("its IPv6 host has no closing bracket");
    host = authority.substr(1, end - 1);
    port = authority.substr(end + 1);
    if (host.find_first_not_of("0123456789abcdefABCDEF:.") != std::string_view::npos)
      return fail("its IPv6 host is malformed");
  } else if (const auto host_end = authority.find(':'); host_end != std::string_view::npos) {
    host = authority.substr(0, host_end);
    port = authority.substr(host_end);
  }
  if (host.empty()) return fail("it has no host");
  if (host.find_first_of(" \"<>\\^`{|}%") != std::string_view::npos) return fail("its host is malformed");
  for (const char c : host) {
    if (static_cast<unsigned char>(c) >= 0x80)
      return fail("its host has characters beyond ASCII; write it in its xn-- form (RFC 5890)");
  }
  parsed.host = detail::lower(host);
  if (!port.empty() && port.front() != ':') return fail("its port is malformed");
  if (port.size() > 1) {
    const auto number = detail::to_number(port.substr(1));
    if (!number || *number < 1 || *number > 65535) return fail("its port is malformed");
    parsed.port = static_cast<int>(*number);
  }
  parsed.target = target.empty() || target.front() != '/' ? "/" : "";
  for (const char c : target) {
    const bool plain = static_cast<unsigned char>(c) < 0x80 && c != ' ';
    parsed.target += plain ? std::string(1, c) : detail::percent_encode({&c, 1});
  }
  return parsed;
}

WANDB_RESTORE_PRIVATE_INLINE result<url> url::resolve(std::string_view location) const {
  const auto mark = location.find_first_of(":/?#");
  if (mark != std::string_view::npos && location[mark] == ':') return parse(location);
  if (detail::starts_with(location, "//")) return parse(scheme + ":" + std::string(location));
  const std::string base_path = target.substr(0, target.find('?'));
  if (location.empty() || location.front() == '#') return parse(str());
  if (location.front() == '?') return parse(origin() + base_path + std::string(location));

  std::string path(location.substr(0, location.find_first_of("?#")));
  const std::string tail(location.substr(path.size()));
  if (path.front() != '/') path = base_path.substr(0, base_path.rfind('/') + 1) + path;
  std::vector<std::string_view> kept;  // dot segments removed (RFC 3986, section 5.2.4)
  bool directory = false;
  for (const auto segment : detail::split(std::string_view(path).substr(1), '/')) {
    directory = segment == "." || segment == "..";
    if (segment == ".." && !kept.empty()) kept.pop_back();
    if (!directory) kept.push_back(segment);
  }
  std::string joined;
  for (const auto segment : kept) joined.append("/").append(segment);
  if (directory || joined.empty()) joined += '/';
  return parse(origin() + joined + tail);
}

WANDB_RESTORE_PRIVATE_INLINE std::string url::origin() const {
  const bool is_ipv6 = host.find(':') != std::string::npos;
  std::string text = scheme + "://" + (is_ipv6 ? "[" + host + "]" : host);
  if (port != (scheme == "https" ? 443 : 80)) text += ":" + std::to_string(port);
  return text;
}

namespace detail {

// ------------------------------------------------------------------------------- configuration files, as text

/// Whether a list of texts has this one.
inline bool contains(const std::vector<std::string>& texts, std::string_view text) {
  for (const auto& each : texts) {
    if (each == text) return true;
  }
  return false;
}

/// Texts by name, in the order of their insertion. Configuration files are short, and std::map is slow to compile.
class text_map {
 public:
  /// Returns null if there is no such name.
  [[nodiscard]] const std::string* find(std::string_view name) const {
    for (const auto& entry : entries_) {
      if (entry.first == name) return &entry.second;
    }
    return nullptr;
  }
  /// Adds an empty text if there is no such name. A later addition invalidates the reference.
  std::string& operator[](std::string_view name) {
    for (auto& entry : entries_) {
      if (entry.first == name) return entry.second;
    }
    entries_.push_back({std::string(name), {}});
    return entries_.back().second;
  }
  /// Adds the texts whose names are missing.
  void merge(const text_map& others) {
    for (const auto& [name, text] : others.entries_) {
      if (!find(name)) entries_.push_back({name, text});
    }
  }
  void clear() { entries_.clear(); }
  [[nodiscard]] auto begin() { return entries_.begin(); }
  [[nodiscard]] auto end() { return entries_.end(); }
  [[nodiscard]] auto begin() const { return entries_.begin(); }
  [[nodiscard]] auto end() const { return entries_.end(); }

 private:
  http_headers entries_;
};

inline std::vector<std::string_view> split_lines(std::string_view text) {
  auto lines = split(text, '\n');
  for (auto& line : lines) {
    if (!line.empty() && line.back() == '\r') line.remove_suffix(1);
  }
  return lines;
}

/// Replaces %% by %. Returns nothing if a % stands alone: Python's configparser refuses it, or expands `%(name)s`, which
/// settings files do not use.
inline std::optional<std::string> unescape_percent(std::string_view value) {
  std::string out;
  for (std::size_t i = 0; i < value.size(); ++i) {
    if (value[i] == '%' && (++i == value.size() || value[i] != '%')) return std::nullopt;
    out += value[i];
  }
  return out;
}

/// Reads the section [default] of a settings file, and the values that it inherits from [DEFAULT]; keys are in lower case.
/// The syntax is that of Python's configparser: `key = value` or `key : value`, comments on lines of their own; a line that
/// is indented deeper continues the value above. Returns an error for a file that Python refuses.
inline result<text_map> parse_ini(std::string_view text) {
  text_map values, inherited, others;  // values in [default], in [DEFAULT], and in any other section
  std::vector<std::string> sections;
  text_map* section = nullptr;
  std::string* value = nullptr;  // the value that an indented line continues
  std::size_t value_indent = 0, number = 0;
  const auto fail = [&](std::string_view why) {
    return error(errc::invalid_argument, "line " + std::to_string(number) + ": " + std::string(why));
  };

  for (const auto line : split_lines(text)) {
    ++number;
    const auto content = trim(line);
    if (content.empty()) {
      if (value) *value += '\n';
      continue;
    }
    if (content.front() == '#' || content.front() == ';') continue;
    const auto indent = static_cast<std::size_t>(content.data() - line.data());
    if (value && indent > value_indent) {
      value->append("\n").append(content);
      continue;
    }
    value_indent = indent;

    if (const auto end = content.rfind(']'); content.front() == '[' && end != content.npos && end > 1) {
      const std::string name(content.substr(1, end - 1));
      if (name != "DEFAULT" && contains(sections, name)) {
        return fail("the section [" + name + "] appears twice");
      }
      sections.push_back(name);
      others.clear();
      section = name == "default" ? &values : name == "DEFAULT" ? &inherited : &others;
      value = nullptr;
      continue;
    }
    if (!section) return fail("a section header is missing, expected [default]");
    const auto delimiter = content.find_first_of("=:");
    const std::string key = lower(trim(content.substr(0, delimiter)));
    if (key.empty() || delimiter == content.npos) return fail("expected key = value");
    if (section->find(key)) {
      return fail("the key " + in_quotes(std::string_view(key)) + " appears twice");
    }
    value = &((*section)[key] = trim(content.substr(delimiter + 1)));
  }

  if (!contains(sections, "default")) return text_map{};
  values.merge(inherited);
  for (auto& [key, raw] : values) {
    while (!raw.empty() && is_space(raw.back())) raw.pop_back();
    auto plain = unescape_percent(raw);
    if (!plain)
      return error(errc::invalid_argument,
                   "the value of " + in_quotes(std::string_view(key)) + " has a lone %; write %%");
    raw = *std::move(plain);
  }
  return values;
}

/// Reads lines of KEY=VALUE, as in a container's env file. Skips other lines. If a key appears twice, the last value counts.
inline text_map parse_key_values(std::string_view text) {
  text_map values;
  for (auto line : split_lines(text)) {
    line = trim(line);
    const auto equals = line.find('=');
    if (equals != line.npos) values[line.substr(0, equals)] = line.substr(equals + 1);
  }
  return values;
}

/// Splits a netrc file into words. White space separates them; a word in "quotes" may contain white space; a backslash
/// makes the next character part of the word.
class netrc_reader {
 public:
  explicit netrc_reader(std::string_view text) : rest_(text) {}

  /// Returns the next word, or nothing at the end. A quoted word may be empty.
  std::optional<std::string> word() {
    while (!rest_.empty() && is_space(rest_.front())) rest_.remove_prefix(1);
    if (rest_.empty()) return std::nullopt;
    const bool in_quotes = rest_.front() == '"';
    if (in_quotes) rest_.remove_prefix(1);
    std::string text;
    while (!rest_.empty() && !(in_quotes ? rest_.front() == '"' : is_space(rest_.front()))) {
      if (rest_.front() == '\\' && rest_.size() > 1) rest_.remove_prefix(1);
      text += rest_.front();
      rest_.remove_prefix(1);
    }
    if (in_quotes && !rest_.empty()) rest_.remove_prefix(1);
    return text;
  }
  /// Skips comments, then returns the next word, or nothing at the end.
  std::optional<std::string> keyword() {
    for (;;) {
      while (!rest_.empty() && is_space(rest_.front())) rest_.remove_prefix(1);
      if (rest_.empty() || rest_.front() != '#') return word();
      skip_line();
    }
  }
  /// Skips the body of a macro, which ends with an empty line.
  void skip_macro() {
    skip_line();
    while (!rest_.empty() && !trim(rest_.substr(0, rest_.find('\n'))).empty()) skip_line();
  }

 private:
  void skip_line() {
    rest_.remove_prefix((std::min)(rest_.size(), rest_.substr(0, rest_.find('\n')).size() + 1));
  }
  std::string_view rest_;
};

/// Returns the password of each machine; the key "default" holds the entry `default`. If a machine has several entries, the
/// last one counts, even without a password.
inline result<text_map> parse_netrc(std::string_view text) {
  text_map passwords;
  std::string* password = nullptr;
  netrc_reader reader(text);
  while (const auto word = reader.keyword()) {
    if (*word == "default") {
      password = &(passwords["default"] = "");
      continue;
    }
    const bool in_entry = *word == "login" || *word == "user" || *word == "account" || *word == "password";
    if (!(in_entry && password) && *word != "machine" && *word != "macdef") {
      // Do not show the word: it may be a part of a password.
      return error(errc::invalid_argument,
                   "expected machine, default or macdef, then login, account or password");
    }
    auto argument = reader.word();
    if (!argument) return error(errc::invalid_argument, "the file ends after the word " + *word);
    if (*word == "machine") password = &(passwords[*argument] = "");
    if (*word == "password") *password = *std::move(argument);
    if (*word == "macdef") reader.skip_macro(), password = nullptr;
  }
  return passwords;
}

// ----------------------------------------------------------------------------------------------------- JSON

// nlohmann/json is used for parsing only: code that builds, copies or writes its values takes long to compile. The
// functions that read a value accept every type, and return an empty result for a type that they do not expect.

using json = nlohmann::json;

/// Empties containers from the innermost out. The destructor of nlohmann::json needs memory to destroy containers in
/// containers, and ends the program if there is none.
inline void clear_json(json& value) {
  if (auto* const list = value.get_ptr<json::array_t*>()) {
    for (json& element : *list) clear_json(element);
    list->clear();
  } else if (auto* const object = value.get_ptr<json::object_t*>()) {
    for (auto& entry : *object) clear_json(entry.second);
    object->clear();
  }
}

/// A value of a parsed JSON text, which it shares with its copies.
class json_document {
 public:
  json_document() = default;  ///< null
  explicit json_document(json* parsed) : text_(parsed, destroy), value_(parsed) {}

  const json& operator*() const { return *value_; }
  const json* operator->() const { return value_; }
  /// Returns the document of a value within this one.
  [[nodiscard]] json_document at(const json& inner) const {
    json_document narrowed = *this;
    narrowed.value_ = &inner;
    return narrowed;
  }
  static const json& null() {
    static const json value;
    return value;
  }

 private:
  static void destroy(json* parsed) {
    clear_json(*parsed);
    delete parsed;
  }
  std::shared_ptr<const json> text_;
  const json* value_ = &null();
};

/// Builds a value from the events of nlohmann's parser. (Its own builder ends the program if it needs memory to destroy an
/// incomplete value, and there is none.) Refuses texts that need too much memory: more than 64 levels of brackets, more
/// than 131,072 values, or a string of more than 64 KiB. The service's answers have less than ten levels, about 7,000
/// values for a page of files, and addresses of about 2 KiB. Thousands of levels could overflow the stack when the value is
/// destroyed. Two bytes of text can become a value of 160 bytes. Strings are copied several times.
class json_builder {
 public:
  explicit json_builder(json& root) : root_(root) {}

  bool null() { return add(json()) != nullptr; }
  bool boolean(bool value) { return add(json(value)) != nullptr; }
  bool number_integer(json::number_integer_t value) { return add(json(value)) != nullptr; }
  bool number_unsigned(json::number_unsigned_t value) { return add(json(value)) != nullptr; }
  bool number_float(json::number_float_t value, const json::string_t&) { return add(json(value)) != nullptr; }
  bool string(json::string_t& value) {
    return value.size() <= max_string && add(json(std::move(value))) != nullptr;
  }
  template <class Bytes>
  bool binary(Bytes&) {
    return false;  // not in a text
  }
  bool start_object(std::size_t) { return open(json::value_t::object); }
  bool key(json::string_t& name) {
    name_ = std::move(name);
    return name_.size() <= max_string;
  }
  bool end_object() { return close(); }
  bool start_array(std::size_t) { return open(json::value_t::array); }
  bool end_array() { return close(); }
  bool parse_error(std::size_t, const std::string&, const json::exception&) { return false; }

 private:
  static constexpr std::size_t max_depth = 64, max_values = 131'072, max_string = 64 * 1024;

  /// Adds a value to the innermost open container. Returns its place, or null if there are too many values.
  json* add(json value) {
    if (++values_ > max_values) return nullptr;
    json* place = &root_;
    if (!open_.empty()) {
      if (auto* const list = open_.back()->get_ptr<json::array_t*>()) {
        list->push_back(json());
        place = &list->back();
      } else {
        place = &(*open_.back()->get_ptr<json::object_t*>())[name_];
        clear_json(*place);  // of two members with one name the last counts
      }
    }
    place->swap(value);
    return place;
  }
  bool open(json::value_t type) {
    json* const opened = open_.size() < max_depth ? add(json(type)) : nullptr;
    if (opened != nullptr) open_.push_back(opened);
    return opened != nullptr;
  }
  bool close() {
    open_.pop_back();
    return true;
  }

  json& root_;
  std::vector<json*> open_;  // containers, the innermost at the end
  std::string name_;         // of the next member
  std::size_t values_ = 0;
};

/// Parses JSON. Returns null for text that is not JSON, or that json_builder refuses.
inline json_document parse_json(std::string_view text) {
  auto* const root = new json;
  json_document parsed(root);
  json_builder builder(*root);
  return json::sax_parse(text, &builder) ? parsed : json_document();
}

inline const json::object_t& members(const json& value) {
  static const json::object_t none;
  const auto* all = value.get_ptr<const json::object_t*>();
  return all ? *all : none;
}
inline const json::array_t& elements(const json& value) {
  static const json::array_t none;
  const auto* all = value.get_ptr<const json::array_t*>();
  return all ? *all : none;
}
inline bool has_member(const json& object, std::string_view name) {
  return members(object).find(std::string(name)) != members(object).end();
}
/// Returns the member with this name, or null.
inline const json& member(const json& object, std::string_view name) {
  const auto found = members(object).find(std::string(name));
  return found == members(object).end() ? json_document::null() : found->second;
}
inline std::string text_of(const json& value) {
  const auto* text = value.get_ptr<const json::string_t*>();
  return text ? *text : std::string();
}
inline double number_of(const json& value) {
  if (const auto* fraction = value.get_ptr<const json::number_float_t*>()) return *fraction;
  if (const auto* count = value.get_ptr<const json::number_unsigned_t*>()) return static_cast<double>(*count);
  const auto* integer = value.get_ptr<const json::number_integer_t*>();
  return integer ? static_cast<double>(*integer) : 0;
}
inline bool is_true(const json& value) {
  const auto* truth = value.get_ptr<const json::boolean_t*>();
  return truth && *truth;
}

/// Returns the length in bytes of the UTF-8 character at the beginning of a text (RFC 3629, section 4); 0 if there is none.
inline std::size_t utf8_length(std::string_view text) {
  const auto byte = [&](std::size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0u; };
  const unsigned first = byte(0), second = byte(1);
  const bool is_overlong = (first == 0xe0 && second < 0xa0) || (first == 0xf0 && second < 0x90);
  const bool is_surrogate = first == 0xed && second > 0x9f, is_too_great = first == 0xf4 && second > 0x8f;
  if (first < 0x80) return text.empty() ? 0 : 1;
  if (first < 0xc2 || first > 0xf4 || is_overlong || is_surrogate || is_too_great) return 0;
  const std::size_t size = first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
  for (std::size_t i = 1; i < size; ++i) {
    if ((byte(i) & 0xc0) != 0x80) return 0;
  }
  return size;
}
/// Returns a JSON string (RFC 8259, section 7). Bytes that are not UTF-8 become U+FFFD.
inline std::string json_string(std::string_view text) {
  std::string out = "\"";
  while (!text.empty()) {
    const std::size_t size = utf8_length(text);
    const std::string_view character = text.substr(0, (std::max<std::size_t>)(size, 1));
    text.remove_prefix(character.size());
    if (size == 0) {
      out += "\xef\xbf\xbd";
    } else if (is_control(character[0])) {
      out += "\\u00" + hex_encode(character);
    } else {
      if (character[0] == '"' || character[0] == '\\') out += '\\';
      out += character;
    }
  }
  return out += '"';
}

/// Writes a JSON object, member by member: on one line, or, as a value `depth` levels deep, on lines of its own.
class json_object {
 public:
  json_object() = default;
  explicit json_object(std::size_t depth)
      : open_('\n' + std::string(depth * 2 + 2, ' ')), close_('\n' + std::string(depth * 2, ' ')) {}

  /// `value`: a JSON text.
  json_object& add(std::string_view name, std::string_view value) {
    members_.append(members_.empty() ? "" : ",").append(open_);
    members_.append(json_string(name)).append(open_.empty() ? ":" : ": ").append(value);
    return *this;
  }
  json_object& add_text(std::string_view name, std::string_view text) { return add(name, json_string(text)); }
  [[nodiscard]] std::string str() const { return '{' + members_ + close_ + '}'; }

 private:
  std::string open_, close_, members_;
};

/// Writes a value, which is `depth` levels deep, as JSON.
inline std::string json_of(const json& value, std::size_t depth) {
  if (value.is_string()) return json_string(text_of(value));
  if (value.is_object()) {
    json_object object(depth);
    for (const auto& [name, inner] : members(value)) object.add(name, json_of(inner, depth + 1));
    return object.str();
  }
  if (value.is_array()) {
    std::string list;
    for (const json& element : elements(value))
      list.append(list.empty() ? "" : ", ").append(json_of(element, depth));
    return '[' + list + ']';
  }
  if (value.is_boolean()) return is_true(value) ? "true" : "false";
  if (const auto* count = value.get_ptr<const json::number_unsigned_t*>()) return std::to_string(*count);
  if (const auto* integer = value.get_ptr<const json::number_integer_t*>()) return std::to_string(*integer);
  if (!value.is_number()) return "null";
  char digits[32] = {};
  static_cast<void>(std::snprintf(digits, sizeof digits, "%.17g", number_of(value)));
  for (char& c : digits) {
    if (c == ',') c = '.';  // the decimal comma of the program's locale
  }
  return digits;
}

// ------------------------------------------------------------------------------- the public service's names

/// The hosts of a deployment of the public service. Both API hosts serve the API at "/"; the web host serves the web pages,
/// and the API below "/api/wandb". Source: FORGE_HOSTS in wandb/sdk/lib/urls.py.
struct forge_deployment {
  std::string_view web_host, api_host, wandb_api_host;
};
inline constexpr forge_deployment forge_deployments[] = {
    {"forge.coreweave.com", "api.forge.coreweave.com", "api.wandb.ai"},
    {"qa.forge.coreweave.com", "api.qa.forge.coreweave.com", "api.qa.wandb.ai"},
};

/// Returns the deployment that a host (in lower case) belongs to, or null.
inline const forge_deployment* forge_deployment_of(std::string_view host) {
  for (const auto& deployment : forge_deployments) {
    if (host == deployment.web_host || host == deployment.api_host || host == deployment.wandb_api_host)
      return &deployment;
  }
  return nullptr;
}

// ------------------------------------------------------------------------------------------------- run paths

inline std::string replace_all(std::string_view text, std::string_view part, std::string_view replacement) {
  std::string out;
  for (auto found = text.find(part); found != text.npos; found = text.find(part)) {
    out.append(text.substr(0, found)).append(replacement);
    text.remove_prefix(found + part.size());
  }
  return out.append(text);
}

inline bool is_usable_part(std::string_view part) {
  return !part.empty() && part.find('/') == part.npos && !has_control(part);
}

/// Parses the forms that the SDK accepts, and leaves missing parts empty. Returns nothing for other texts.
inline std::optional<run_path> plain_run_path(std::string_view text) {
  const std::string plain = replace_all(replace_all(text, "/runs/", "/"), "/sweeps/", "/");
  const auto first = plain.find_first_not_of("/ "), last = plain.find_last_not_of("/ ");
  if (first == plain.npos) return std::nullopt;
  auto parts = split(std::string_view(plain).substr(first, last - first + 1), '/');
  if (parts.size() == 4 && parts[2] == "runs") parts.erase(parts.begin() + 2);
  if (parts.size() <= 2) {  // the last part may be "project:id"
    const auto tail = parts.back();
    if (const auto colon = tail.find(':'); colon != tail.npos) {
      parts.back() = tail.substr(0, colon);
      parts.push_back(tail.substr(colon + 1));
    }
  }
  if (parts.size() > 3) return std::nullopt;
  for (auto& part : parts) {
    part = strip(part);
    if (part.empty()) return std::nullopt;
  }
  run_path found;
  found.run_id = parts.back();
  if (parts.size() > 1) found.project = parts[parts.size() - 2];
  if (parts.size() > 2) found.entity = parts.front();
  return found;
}

inline bool looks_like_host(std::string_view segment) {
  return segment == "localhost" || (segment.find_first_of(".:") != segment.npos && segment.back() != ':');
}

/// Parses the address of a run: [scheme://host[/prefix]/]entity/project/runs/run_id[/tail]. Percent-decodes the parts if
/// the address has a host.
inline std::optional<run_path> pasted_run_path(std::string_view text, bool has_scheme) {
  if (has_scheme) text.remove_prefix(text.find("://") + 3);
  std::vector<std::string_view> segments;
  for (const auto segment : split(text, '/')) {
    if (!segment.empty()) segments.push_back(segment);
  }
  const bool has_host = has_scheme || (segments.size() >= 5 && looks_like_host(segments.front()));
  if (has_host && !segments.empty()) {
    const std::string host = lower(segments.front());
    const auto* deployment = forge_deployment_of(host);
    const bool has_prefix = deployment != nullptr && host == deployment->web_host && segments.size() > 1 &&
                            segments[1] == "wandb";  // https://forge.coreweave.com/wandb/entity/...
    segments.erase(segments.begin(), segments.begin() + (has_prefix ? 2 : 1));
  }

  // Look for "runs" after entity and project: a project may itself be called "runs".
  std::size_t runs = 2;
  while (has_host && runs < segments.size() && segments[runs] != "runs") ++runs;
  if (runs + 1 >= segments.size() || segments[runs] != "runs") return std::nullopt;
  run_path found;
  std::size_t next = runs - 2;
  for (std::string* part : {&found.entity, &found.project, &found.run_id}) {
    if (next == runs) ++next;
    const auto plain = has_host ? percent_decode(segments[next++]) : std::string(segments[next++]);
    if (!plain || !is_usable_part(strip(*plain))) return std::nullopt;
    *part = strip(*plain);
  }
  return found;
}

/// Whether a path or address names a sweep: [scheme://host/][prefix/]entity/project/sweeps/ID[/tail].
inline bool names_sweep(std::string_view path, bool has_scheme) {
  if (has_scheme) path.remove_prefix(path.find("://") + 3);
  std::vector<std::string_view> segments;
  for (const auto segment : split(path, '/')) {
    if (!strip(segment).empty()) segments.push_back(strip(segment));
  }
  std::size_t kind = has_scheme ? 3 : 2;  // after the host, if there is one, entity and project
  while (kind < segments.size() && segments[kind] != "runs" && segments[kind] != "sweeps") ++kind;
  return kind + 1 < segments.size() && segments[kind] == "sweeps";
}

/// Parses a run path, and leaves missing parts empty. Returns three empty parts for an empty text, and
/// errc::invalid_run_path for a malformed text and for a sweep's path, which the SDK would take for a run's.
inline result<run_path> split_run_path(std::string_view text) {
  if (text.empty()) return run_path{};
  const auto fail = [&](std::string_view why) {
    return error(errc::invalid_run_path,
                 "invalid run path " + in_quotes(redacted_address(text)) + ": " + std::string(why));
  };
  const auto path = strip(text.substr(0, text.find_first_of("?#")));
  if (has_control(path)) return fail("it has control characters");
  const std::string start = lower(path.substr(0, 8));
  const bool has_scheme = starts_with(start, "http://") || start == "https://";
  if (names_sweep(path, has_scheme)) {
    return fail("this names a sweep, not a run; expected entity/project/run_id of one of its runs");
  }
  // Try the SDK's forms first: a text that the SDK accepts must have the same meaning here.
  auto found = has_scheme ? std::nullopt : plain_run_path(path);
  if (!found) found = pasted_run_path(path, has_scheme);
  if (found) return *std::move(found);
  return fail(has_scheme
                  ? "this is not the address of a run, expected https://host/entity/project/runs/run_id"
                  : "expected entity/project/run_id, project/run_id or run_id: at most three parts, none of "
                    "them empty");
}

/// Parses a run path, and takes missing parts from `defaults`.
inline result<run_path> completed_run_path(std::string_view text, const run_path& defaults) {
  auto found = split_run_path(text);
  if (!found) return found;
  if (found->entity.empty()) found->entity = defaults.entity;
  if (found->project.empty()) found->project = defaults.project;
  if (found->run_id.empty()) found->run_id = defaults.run_id;
  return found;
}

struct run_path_part {
  const char* name;
  const char* variable;
  const std::string& value;
};

/// Checks that no part is missing or malformed. The message shows `text`, the run path that the caller gave.
inline result<void> check_parts(std::string_view text, std::initializer_list<run_path_part> parts) {
  const auto subject = [&] {
    return text.empty() ? "no run path was given" : "invalid run path " + in_quotes(redacted_address(text));
  };
  std::string missing, variables;
  for (const auto& [name, variable, value] : parts) {
    if (value.empty()) {
      missing.append(missing.empty() ? "no " : ", no ").append(name);
      variables.append(variables.empty() ? "" : ", ").append(variable);
    } else if (!is_usable_part(value)) {
      return error(errc::invalid_run_path, subject() + ": the " + name + " " +
                                               in_quotes(std::string_view(value)) +
                                               " has a slash or control characters");
    }
  }
  if (missing.empty()) return {};
  return error(errc::invalid_run_path,
               subject() + ": " + missing + "; expected entity/project/run_id, or set " + variables);
}

}  // namespace detail

WANDB_RESTORE_PRIVATE_INLINE result<run_path> run_path::parse(std::string_view text,
                                                              const run_path& defaults) {
  auto found = detail::completed_run_path(text, defaults);
  if (!found) return found;
  const auto good = detail::check_parts(text, {{"entity", "WANDB_ENTITY", found->entity},
                                               {"project", "WANDB_PROJECT", found->project},
                                               {"run id", "WANDB_RUN_ID", found->run_id}});
  if (!good) return good.error();
  return found;
}

// ==================================================================================================== disk

namespace detail {

using path = std::filesystem::path;

inline std::string system_text(int code) { return std::system_category().message(code); }
inline std::error_condition system_condition(int code) {
  return std::system_category().default_error_condition(code);
}
/// Whether the code means that the user lacks a permission.
inline bool is_refusal(int code) {
  return system_condition(code) == std::errc::permission_denied ||
         system_condition(code) == std::errc::operation_not_permitted;
}

/// Returns a remedy for a disk failure, to append to a message; empty if none is known.
inline const char* disk_remedy(const std::error_condition& why) {
  if (why == std::errc::no_space_on_device) return "; free some space, or set root to another disk";
  if (why == std::errc::permission_denied || why == std::errc::operation_not_permitted ||
      why == std::errc::read_only_file_system) {
    return "; set root to a directory that this user may write to";
  }
  if (why == std::errc::too_many_files_open) return "; raise the limit on open files (ulimit -n)";
  if (why == std::errc::filename_too_long) return "; set root to a directory with a shorter path";
  return "";
}

/// Makes an error: cannot <action> "<where>": <the system's text><remedy>. `code` is the system's error code.
inline error disk_error(std::string_view action, const path& where, int code) {
  return error(errc::disk_failure, "cannot " + std::string(action) + " " + in_quotes(where) + ": " +
                                       system_text(code) + disk_remedy(system_condition(code)));
}

/// Properties of a directory entry or an open file. Windows leaves the members after `modified` at their defaults.
struct file_facts {
  bool is_directory = false;
  bool is_file = false;                 // an ordinary file: no directory, link, device, pipe or socket
  std::uint64_t size = 0;               // bytes
  std::uint64_t allocated = 0;          // bytes allocated on the disk
  std::int64_t modified = 0;            // last change of the content, in nanoseconds since 1970
  std::int64_t changed = 0;             // last change of content, name or permissions (ctime), likewise
  std::uint64_t device = 0, inode = 0;  //
  std::uint64_t links = 1;              // number of hard links
  std::uint64_t user = 0;               // id of the owner
  unsigned mode = 0;                    // permission bits

  /// Compares identity, size and time of modification: equal facts mean, in all likelihood, the same content.
  friend bool operator==(const file_facts& a, const file_facts& b) {
    return a.size == b.size && a.modified == b.modified && a.device == b.device && a.inode == b.inode;
  }
  [[nodiscard]] bool is_same_file(const file_facts& other) const {
    return device == other.device && inode == other.inode;
  }
};

/// The outcome of examining a path or file: found, absent, or unknown because the system call failed. Unknown must not
/// count as absent: the file would be replaced.
class look_result {
 public:
  look_result(const file_facts& facts) : facts_(facts) {}  // NOLINT: implicit, as in result
  /// `code`: the system's error code.
  static look_result failed(int code) {
    look_result made{file_facts()};
    made.code_ = code;
    return made;
  }

  [[nodiscard]] bool found() const { return code_ == 0; }
  [[nodiscard]] bool absent() const;
  /// Returns the system's error code if the examination failed, otherwise 0.
  [[nodiscard]] int failure() const { return absent() ? 0 : code_; }
  /// Returns the facts; value-initialised ones unless found().
  const file_facts& operator*() const { return facts_; }
  const file_facts* operator->() const { return &facts_; }

 private:
  file_facts facts_;
  int code_ = 0;
};

/// How to open a file. Only `read` and `keep_name` follow symbolic links. Only `read` may block, on a pipe.
enum class file_mode {
  read,       //
  keep_name,  // read; on Windows, nobody can rename or replace the file while it is open
  neighbour,  // read a file that another user may have made
  update,     // read and write
  create,     // read and write a new file; fails if the name is taken
};

/// Returns a directory by a name that the system accepts: an empty path stands for the working directory.
inline path or_dot(const path& directory) { return directory.empty() ? path(".") : directory; }

// ---- operating systems: one block for each, with the same functions. An error code is the system's; 0 means success.

using process_id = std::uint64_t;

#ifdef _WIN32

using file_handle = HANDLE;
inline file_handle no_file() { return INVALID_HANDLE_VALUE; }
inline int last_os_error() { return static_cast<int>(GetLastError()); }
constexpr int no_space_code = ERROR_DISK_FULL;
constexpr int name_taken_code = ERROR_FILE_EXISTS;

inline bool look_result::absent() const {
  return code_ == ERROR_FILE_NOT_FOUND || code_ == ERROR_PATH_NOT_FOUND;
}

inline std::uint64_t joined(DWORD high, DWORD low) { return static_cast<std::uint64_t>(high) << 32 | low; }
/// FILETIME counts 100 ns since 1601.
inline std::int64_t nanoseconds_since_1970(const FILETIME& time) {
  return (static_cast<std::int64_t>(joined(time.dwHighDateTime, time.dwLowDateTime)) - 116444736000000000) *
         100;
}

inline int open_file(file_handle& opened, const path& where, file_mode mode, unsigned permissions) {
  (void)permissions;
  const bool writes = mode == file_mode::update || mode == file_mode::create;
  const DWORD others_may_rename = mode == file_mode::keep_name ? 0 : FILE_SHARE_DELETE;
  const bool follows = mode == file_mode::read || mode == file_mode::keep_name;
  opened = CreateFileW(where.c_str(), writes ? GENERIC_READ | GENERIC_WRITE : GENERIC_READ,
                       FILE_SHARE_READ | FILE_SHARE_WRITE | others_may_rename, nullptr,
                       mode == file_mode::create ? CREATE_NEW : OPEN_EXISTING,
                       FILE_ATTRIBUTE_NORMAL | (follows ? 0 : FILE_FLAG_OPEN_REPARSE_POINT), nullptr);
  if (opened == no_file()) return last_os_error();
  if (mode == file_mode::create) {  // sparse, or a write at a high offset would fill the gap with zeros first
    constexpr DWORD set_sparse = 0x900c4;  // FSCTL_SET_SPARSE
    DWORD ignored = 0;
    DeviceIoControl(opened, set_sparse, nullptr, 0, nullptr, 0, &ignored, nullptr);
  }
  return 0;
}
inline void close_file(file_handle opened) { CloseHandle(opened); }

inline OVERLAPPED file_offset(std::uint64_t offset) {
  OVERLAPPED position{};
  position.Offset = static_cast<DWORD>(offset);
  position.OffsetHigh = static_cast<DWORD>(offset >> 32);
  return position;
}
inline int write_some(file_handle opened, std::uint64_t offset, std::string_view bytes, std::size_t& count) {
  OVERLAPPED position = file_offset(offset);
  DWORD written = 0;
  const auto wanted = static_cast<DWORD>((std::min<std::size_t>)(bytes.size(), 1u << 30));
  if (!WriteFile(opened, bytes.data(), wanted, &written, &position)) return last_os_error();
  count = written;
  return 0;
}
inline int read_some(file_handle opened, std::uint64_t offset, char* buffer, std::size_t size,
                     std::size_t& count) {
  OVERLAPPED position = file_offset(offset);
  DWORD got = 0;
  const auto wanted = static_cast<DWORD>((std::min<std::size_t>)(size, 1u << 30));
  if (!ReadFile(opened, buffer, wanted, &got, &position) && GetLastError() != ERROR_HANDLE_EOF)
    return last_os_error();
  count = got;
  return 0;
}
inline int resize_file(file_handle opened, std::uint64_t size) {
  FILE_END_OF_FILE_INFO end;
  end.EndOfFile.QuadPart = static_cast<LONGLONG>(size);
  return SetFileInformationByHandle(opened, FileEndOfFileInfo, &end, sizeof end) ? 0 : last_os_error();
}
inline int sync_file(file_handle opened) { return FlushFileBuffers(opened) ? 0 : last_os_error(); }
inline int reserve_room(file_handle, std::uint64_t) { return 0; }
inline std::uint64_t clone_bytes(file_handle, file_handle, std::uint64_t, std::uint64_t) { return 0; }
inline int set_modified(file_handle opened, std::chrono::nanoseconds since_1970) {
  const auto ticks = static_cast<std::uint64_t>(since_1970.count() / 100 + 116444736000000000);
  FILETIME time;
  time.dwLowDateTime = static_cast<DWORD>(ticks);
  time.dwHighDateTime = static_cast<DWORD>(ticks >> 32);
  return SetFileTime(opened, nullptr, nullptr, &time) ? 0 : last_os_error();
}
inline void set_modified_now(file_handle opened) {
  (void)set_modified(opened, std::chrono::system_clock::now().time_since_epoch());
}
inline void set_permissions(file_handle, unsigned) {}
inline look_result facts_of(file_handle opened) {
  LARGE_INTEGER size;
  FILETIME written;
  if (!GetFileSizeEx(opened, &size) || !GetFileTime(opened, nullptr, nullptr, &written))
    return look_result::failed(last_os_error());
  file_facts facts;
  facts.is_file = GetFileType(opened) == FILE_TYPE_DISK;
  facts.size = static_cast<std::uint64_t>(size.QuadPart);
  facts.modified = nanoseconds_since_1970(written);
  return facts;
}
inline look_result facts_of(const path& where) {
  WIN32_FILE_ATTRIBUTE_DATA entry;
  if (!GetFileAttributesExW(where.c_str(), GetFileExInfoStandard, &entry))
    return look_result::failed(last_os_error());
  file_facts facts;
  facts.is_directory = (entry.dwFileAttributes & FILE_ATTRIBUTE_DIRECTORY) != 0;
  facts.is_file = (entry.dwFileAttributes & (FILE_ATTRIBUTE_DIRECTORY | FILE_ATTRIBUTE_DEVICE)) == 0;
  facts.size = joined(entry.nFileSizeHigh, entry.nFileSizeLow);
  facts.modified = nanoseconds_since_1970(entry.ftLastWriteTime);
  return facts;
}
inline look_result facts_of_entry(const path& where) { return facts_of(where); }
inline std::uint64_t own_user() { return 0; }
[[nodiscard]] inline int rename_over(const path& source, const path& destination) {
  constexpr DWORD flags = MOVEFILE_REPLACE_EXISTING | MOVEFILE_WRITE_THROUGH;
  return MoveFileExW(source.c_str(), destination.c_str(), flags) ? 0 : last_os_error();
}
inline void sync_directory(const path&) {}
inline void pause_thread(int milliseconds) { ::Sleep(static_cast<DWORD>(milliseconds)); }
inline const char* why_not_replaceable(const path&) { return nullptr; }
inline std::size_t longest_name(const path&) { return 255; }
/// Returns the length in UTF-16 units, the unit of longest_name.
inline std::size_t name_length(std::string_view name) { return from_utf8(name).native().size(); }
inline std::optional<std::uint64_t> free_space(const path& directory) {
  std::error_code failure;
  const auto space = std::filesystem::space(or_dot(directory), failure);
  return failure ? std::nullopt : std::optional<std::uint64_t>(space.available);
}
inline std::optional<std::uint64_t> file_size_limit() { return std::nullopt; }

/// The file must be open in file_mode::keep_name, so that its name cannot lead to another file.
inline result<std::ifstream> stream_on(file_handle, const path& where) {
  std::ifstream stream(where, std::ios::binary);
  if (!stream) return disk_error("open", where, last_os_error());
  return stream;
}

/// Windows removes the file with its last handle, even if the process is killed: no process finds an old lock file.
inline int open_lock_file(file_handle& opened, const path& where, bool& existed) {
  existed = true;
  opened = CreateFileW(where.c_str(), GENERIC_READ | GENERIC_WRITE, 0, nullptr, OPEN_ALWAYS,
                       FILE_ATTRIBUTE_HIDDEN | FILE_FLAG_DELETE_ON_CLOSE, nullptr);
  return opened == no_file() ? last_os_error() : 0;
}
inline bool is_lock_busy(int code) { return code == ERROR_SHARING_VIOLATION; }
/// Calls `take` for each name in a directory. Returns false if the directory could not be read to its end.
inline bool for_each_name(const path& directory, function_ref<void(const path& name)> take) {
  std::error_code failure;
  std::filesystem::directory_iterator entry(directory, failure), end;
  for (; !failure && entry != end; entry.increment(failure)) take(entry->path().filename());
  return !failure;
}
inline int lock_file(file_handle) { return 0; }  // open_lock_file shares the file with nobody
inline bool are_locks_effective(file_handle, const path&) { return true; }

inline process_id own_process() { return GetCurrentProcessId(); }
inline std::optional<std::uint64_t> process_start(process_id id) {
  HANDLE process = OpenProcess(PROCESS_QUERY_LIMITED_INFORMATION, FALSE, static_cast<DWORD>(id));
  if (process == nullptr) {
    return GetLastError() == ERROR_INVALID_PARAMETER ? std::nullopt : std::optional<std::uint64_t>(0);
  }
  FILETIME created{}, exited{}, kernel{}, user{};
  DWORD status = 0;
  const bool known = GetProcessTimes(process, &created, &exited, &kernel, &user) != 0;
  const bool over = GetExitCodeProcess(process, &status) && status != STILL_ACTIVE;
  CloseHandle(process);
  if (over) return std::nullopt;
  return known ? joined(created.dwHighDateTime, created.dwLowDateTime) : 0;
}
inline std::string process_realm() {
  std::array<char, 256> name{};
  DWORD size = static_cast<DWORD>(name.size());
  return GetComputerNameA(name.data(), &size) ? hex64(name_hash({name.data(), size})) : std::string();
}

#else  // POSIX

using file_handle = int;
constexpr file_handle no_file() { return -1; }
constexpr int no_space_code = ENOSPC;
constexpr int name_taken_code = EEXIST;

// Files over 2 GiB on 32-bit machines need glibc's explicit names: system headers may precede this one, and then it is too
// late to set _FILE_OFFSET_BITS.
#ifdef __GLIBC__
#define WANDB_RESTORE_PRIVATE_LARGE(name) name##64
#else
#define WANDB_RESTORE_PRIVATE_LARGE(name) name
#endif

inline bool look_result::absent() const { return code_ == ENOENT || code_ == ENOTDIR; }

/// Repeats a system call while signals interrupt it. Returns 0 or the error code.
template <class Call>
int uninterrupted(const Call& call) {
  int outcome = 0;
  do {
    outcome = call();
  } while (outcome == -1 && errno == EINTR);
  return outcome == -1 ? errno : 0;
}

/// Moves a new descriptor above 2, close-on-exec: if a program has closed descriptors 0 to 2, a file that got one of these
/// numbers would receive the program's output. Returns the descriptor; negative, with errno set, after a failure.
inline int above_standard_streams(int descriptor) {
  if (descriptor < 0 || descriptor > 2) return descriptor;
  const int moved = ::fcntl(descriptor, F_DUPFD_CLOEXEC, 3);
  const int code = errno;
  ::close(descriptor);
  errno = code;
  return moved;
}

/// Opens a directory on each closed descriptor from 0 to 2, so that no stream gets one of these numbers: the descriptor of
/// a stream cannot be moved. Output to them fails, as it does while they are closed.
class standard_streams_guard {
 public:
  standard_streams_guard() {
    for (int& held : held_) {
      const int descriptor = ::open("/", O_RDONLY | O_CLOEXEC);
      if (descriptor > 2) ::close(descriptor);
      if (descriptor < 0 || descriptor > 2) break;
      held = descriptor;
    }
  }
  ~standard_streams_guard() {
    for (const int held : held_)
      if (held >= 0) ::close(held);
  }
  standard_streams_guard(const standard_streams_guard&) = delete;
  standard_streams_guard& operator=(const standard_streams_guard&) = delete;

 private:
  std::array<int, 3> held_{{-1, -1, -1}};
};

inline int open_file(file_handle& opened, const path& where, file_mode mode, unsigned permissions) {
  constexpr int careful = O_NOFOLLOW | O_NONBLOCK;
  const int flags = mode == file_mode::read ? O_RDONLY
                    : mode == file_mode::keep_name ? O_RDONLY | O_NONBLOCK
                    : mode == file_mode::neighbour ? O_RDONLY | careful
                    : mode == file_mode::update ? O_RDWR | careful
                                                : O_RDWR | O_CREAT | O_EXCL;
  return uninterrupted([&] {
    return opened = above_standard_streams(
               WANDB_RESTORE_PRIVATE_LARGE(open)(where.c_str(), flags | O_CLOEXEC, permissions));
  });
}
inline void close_file(file_handle opened) { ::close(opened); }

inline int write_some(file_handle opened, std::uint64_t offset, std::string_view bytes, std::size_t& count) {
  const auto written = WANDB_RESTORE_PRIVATE_LARGE(pwrite)(opened, bytes.data(), bytes.size(),
                                                           static_cast<std::int64_t>(offset));
  count = written > 0 ? static_cast<std::size_t>(written) : 0;
  return written < 0 ? errno : 0;
}
inline int read_some(file_handle opened, std::uint64_t offset, char* buffer, std::size_t size,
                     std::size_t& count) {
  const auto got =
      WANDB_RESTORE_PRIVATE_LARGE(pread)(opened, buffer, size, static_cast<std::int64_t>(offset));
  count = got > 0 ? static_cast<std::size_t>(got) : 0;
  return got < 0 ? errno : 0;
}
inline int resize_file(file_handle opened, std::uint64_t size) {
  return uninterrupted(
      [&] { return WANDB_RESTORE_PRIVATE_LARGE(ftruncate)(opened, static_cast<std::int64_t>(size)); });
}
inline int set_modified(file_handle opened, std::chrono::nanoseconds since_1970) {
  struct timespec times[2]{};
  times[0].tv_nsec = UTIME_OMIT;
  times[1].tv_sec = static_cast<decltype(times[1].tv_sec)>(since_1970.count() / 1000000000);
  times[1].tv_nsec = static_cast<decltype(times[1].tv_nsec)>(since_1970.count() % 1000000000);
  return ::futimens(opened, times) == 0 ? 0 : errno;
}
/// Sets the time of modification to now, by the file system's clock.
inline void set_modified_now(file_handle opened) {
  struct timespec times[2]{};
  times[0].tv_nsec = UTIME_OMIT;
  times[1].tv_nsec = UTIME_NOW;
  (void)::futimens(opened, times);
}
inline void set_permissions(file_handle opened, unsigned mode) {
  (void)::fchmod(opened, static_cast<mode_t>(mode));
}

/// Nanoseconds since 1970. Times beyond 100 years from then, which anybody may give a file, count as 100 years.
inline std::int64_t nanoseconds_of(const struct timespec& time) {
  constexpr std::int64_t most =
      std::int64_t{100} * 366 * 86400;  // seconds: differences do not overflow either
  return std::clamp<std::int64_t>(time.tv_sec, -most, most) * 1000000000 + time.tv_nsec;
}
inline file_facts facts_of(const struct WANDB_RESTORE_PRIVATE_LARGE(stat) & entry) {
#ifdef __APPLE__
  const auto modified = entry.st_mtimespec, changed = entry.st_ctimespec;
#else
  const auto modified = entry.st_mtim, changed = entry.st_ctim;
#endif
  file_facts facts;
  facts.is_directory = S_ISDIR(entry.st_mode);
  facts.is_file = S_ISREG(entry.st_mode);
  facts.size = static_cast<std::uint64_t>(entry.st_size);
  facts.allocated = static_cast<std::uint64_t>(entry.st_blocks) * 512;
  facts.modified = nanoseconds_of(modified);
  facts.changed = nanoseconds_of(changed);
  facts.device = static_cast<std::uint64_t>(entry.st_dev);
  facts.inode = static_cast<std::uint64_t>(entry.st_ino);
  facts.links = static_cast<std::uint64_t>(entry.st_nlink);
  facts.user = static_cast<std::uint64_t>(entry.st_uid);
  facts.mode = entry.st_mode & 07777;
  return facts;
}
inline look_result facts_of(file_handle opened) {
  struct WANDB_RESTORE_PRIVATE_LARGE(stat) entry;
  const int code = uninterrupted([&] { return WANDB_RESTORE_PRIVATE_LARGE(fstat)(opened, &entry); });
  return code == 0 ? look_result(facts_of(entry)) : look_result::failed(code);
}
/// Follows symbolic links.
inline look_result facts_of(const path& where) {
  struct WANDB_RESTORE_PRIVATE_LARGE(stat) entry;
  const int code = uninterrupted([&] { return WANDB_RESTORE_PRIVATE_LARGE(stat)(where.c_str(), &entry); });
  return code == 0 ? look_result(facts_of(entry)) : look_result::failed(code);
}
/// Does not follow symbolic links.
inline look_result facts_of_entry(const path& where) {
  struct WANDB_RESTORE_PRIVATE_LARGE(stat) entry;
  const int code = uninterrupted([&] { return WANDB_RESTORE_PRIVATE_LARGE(lstat)(where.c_str(), &entry); });
  return code == 0 ? look_result(facts_of(entry)) : look_result::failed(code);
}
inline std::uint64_t own_user() { return static_cast<std::uint64_t>(::geteuid()); }

/// Renames a file; replaces `destination` atomically.
[[nodiscard]] inline int rename_over(const path& source, const path& destination) {
  return uninterrupted([&] { return ::rename(source.c_str(), destination.c_str()); });
}
/// Brings renames in a directory to stable storage. Ignores failures: some file systems refuse the call.
inline void sync_directory(const path& directory) {
  file_handle opened = no_file();
  if (open_file(opened, or_dot(directory), file_mode::read, 0) != 0) return;
  (void)uninterrupted([&] { return ::fsync(opened); });
  close_file(opened);
}
inline void pause_thread(int milliseconds) { ::poll(nullptr, 0, milliseconds); }

/// Returns the limit, in bytes, for a name in the directory.
inline std::size_t longest_name(const path& directory) {
  const long limit = ::pathconf(or_dot(directory).c_str(), _PC_NAME_MAX);
  return limit > 0 ? static_cast<std::size_t>(limit) : 255;
}
inline std::size_t name_length(std::string_view name) { return name.size(); }

/// Returns the bytes that an unprivileged user may still write; nothing if unknown.
inline std::optional<std::uint64_t> free_space(const path& directory) {
#ifdef __GLIBC__
  struct statvfs64 volume;
  const int code = ::statvfs64(or_dot(directory).c_str(), &volume);
#else
  struct statvfs volume;
  const int code = ::statvfs(or_dot(directory).c_str(), &volume);
#endif
  if (code != 0 || volume.f_blocks == 0) return std::nullopt;  // some remote file systems report only zeros
  return static_cast<std::uint64_t>(volume.f_bavail) * volume.f_frsize;
}
/// Returns RLIMIT_FSIZE in bytes: a write beyond it kills the process (SIGXFSZ).
inline std::optional<std::uint64_t> file_size_limit() {
  struct rlimit limit {};
  if (::getrlimit(RLIMIT_FSIZE, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return std::nullopt;
  return static_cast<std::uint64_t>(limit.rlim_cur);
}

/// Opens a stream on the file that `opened` has open, even if the file's name leads to another file by now. An ifstream
/// opens by name only; /proc/self/fd/N (Linux) and /dev/fd/N (macOS and others) name the open file itself. If neither is
/// mounted, opens the name `where`, and checks before and after that it leads to this file. (No other file can get the
/// inode number while `opened` is open, and renaming the file away and back changes its ctime.) Returns an error if
/// `where` leads to another file.
inline result<std::ifstream> stream_on(file_handle opened, const path& where) {
  const auto facts = facts_of(opened);
  if (!facts.found()) return disk_error("look at", where, facts.failure());
  const standard_streams_guard guard;
  for (const char* folder : {"/proc/self/fd/", "/dev/fd/"}) {
    const path link = folder + std::to_string(opened);
    const auto linked = facts_of(link);
    if (!linked.found() || !linked->is_same_file(*facts)) continue;
    std::ifstream stream(link, std::ios::binary);
    if (stream) return stream;
  }
  const auto name_leads_here = [&] {
    const auto named = facts_of(where);
    return named.found() && named->is_same_file(*facts) && named->changed == facts->changed;
  };
  if (name_leads_here()) {
    std::ifstream stream(where, std::ios::binary);
    if (!stream) return disk_error("open", where, errno);
    if (name_leads_here()) return stream;
  }
  return error(errc::disk_failure,
               "cannot open " + in_quotes(where) + ": another process has just replaced it; try again");
}

/// Opens or creates the lock file. Only this user may open it: another user could hold the lock for ever. Returns EACCES for
/// a file of another user. Sets `existed` if the file was there already.
inline int open_lock_file(file_handle& opened, const path& where, bool& existed) {
  existed = false;
  int code = open_file(opened, where, file_mode::create, 0600);
  if (code != EEXIST) return code;
  existed = true;
  code = open_file(opened, where, file_mode::update, 0);
  if (code != 0) return code == ENOENT ? EAGAIN : code;  // ENOENT: the holder has just removed the file
  const auto facts = facts_of(opened);
  if (facts.found() && facts->is_file && facts->links <= 1 && facts->user == own_user()) return 0;
  close_file(std::exchange(opened, no_file()));
  return EACCES;
}
inline bool is_lock_busy(int code) { return code == EAGAIN; }

/// Calls `take` with the name of each entry of a directory, except "." and "..". Returns false if the directory could not be read
/// to its end. Does not use std::filesystem::directory_iterator: libstdc++'s ends the program if there is no memory.
inline bool for_each_name(const path& directory, function_ref<void(const path& name)> take) {
  struct closer {
    void operator()(DIR* opened) const { ::closedir(opened); }
  };
  const std::unique_ptr<DIR, closer> opened(::opendir(directory.c_str()));
  if (!opened) return false;
  for (;;) {
    errno = 0;
    const auto* const entry = WANDB_RESTORE_PRIVATE_LARGE(readdir)(opened.get());
    if (entry == nullptr) return errno == 0;
    const path name = entry->d_name;
    if (name != "." && name != "..") take(name);
  }
}
#if defined(F_OFD_SETLK)
constexpr int set_lock_command = F_OFD_SETLK, get_lock_command = F_OFD_GETLK;
#elif defined(__GLIBC__)
constexpr int set_lock_command = F_SETLK64, get_lock_command = F_GETLK64;
#else
constexpr int set_lock_command = F_SETLK, get_lock_command = F_GETLK;
#endif
inline struct WANDB_RESTORE_PRIVATE_LARGE(flock) whole_file_lock() {
  struct WANDB_RESTORE_PRIVATE_LARGE(flock) whole {};
  whole.l_type = F_WRLCK;
  whole.l_whence = SEEK_SET;
  return whole;
}
/// Returns 0 if this process now holds the lock, EAGAIN if another one does.
inline int lock_file(file_handle opened) {
  auto whole = whole_file_lock();
  const int code = uninterrupted([&] { return ::fcntl(opened, set_lock_command, &whole); });
  return code == EACCES ? EAGAIN : code;
}
/// Whether the lock of this process excludes other processes of this machine: some file systems accept locks and ignore
/// them. Returns false if unknown: a process can query its own lock only if it is an open-file-description lock.
inline bool are_locks_effective(file_handle, const path& where) {
#if defined(F_OFD_SETLK)
  file_handle second = no_file();
  if (open_file(second, where, file_mode::update, 0) != 0) return false;
  auto whole = whole_file_lock();
  const bool seen = ::fcntl(second, get_lock_command, &whole) == 0 && whole.l_type != F_UNLCK;
  close_file(second);
  return seen;
#else
  (void)where;
  return false;
#endif
}

inline process_id own_process() { return static_cast<process_id>(::getpid()); }

#if defined(__linux__)

inline int sync_file(file_handle opened) {
  return uninterrupted([&] { return ::fdatasync(opened); });
}
/// Allocates disk space for `size` bytes without writing any. Returns 0 without effect if the file system cannot do that.
inline int reserve_room(file_handle opened, std::uint64_t size) {
  // Skip tmpfs: it would allocate all memory pages at once, and check_room knows its free space exactly.
  constexpr long tmpfs = 0x01021994;
  struct WANDB_RESTORE_PRIVATE_LARGE(statfs) volume;
  if (WANDB_RESTORE_PRIVATE_LARGE(fstatfs)(opened, &volume) == 0 && static_cast<long>(volume.f_type) == tmpfs)
    return 0;
  if (size == 0) return 0;
  const int code = uninterrupted(
      [&] { return WANDB_RESTORE_PRIVATE_LARGE(fallocate)(opened, 0, 0, static_cast<std::int64_t>(size)); });
  return code == ENOSPC || code == EDQUOT || code == EFBIG ? code : 0;
}
/// Copies bytes inside the kernel; some file systems then share the blocks. Returns the number of bytes copied; after 0 the
/// caller has to read and write.
inline std::uint64_t clone_bytes(file_handle source, file_handle destination, std::uint64_t offset,
                                 std::uint64_t size) {
#if defined(__GLIBC__) && (__GLIBC__ > 2 || __GLIBC_MINOR__ >= 27)
  auto read_from = static_cast<off64_t>(offset), write_to = read_from;
  const auto count =
      ::copy_file_range(source, &read_from, destination, &write_to, static_cast<std::size_t>(size), 0);
  return count > 0 ? static_cast<std::uint64_t>(count) : 0;
#else
  return (void)source, (void)destination, (void)offset, (void)size, std::uint64_t{0};
#endif
}
/// Returns why a rename over this file would fail although its directory is writable; null if no reason is known.
inline const char* why_not_replaceable(const path& where) {
#if defined(STATX_ATTR_MOUNT_ROOT) && defined(STATX_ATTR_IMMUTABLE)
  struct statx entry {};
  if (::statx(AT_FDCWD, where.c_str(), AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT, 0, &entry) != 0) return nullptr;
  if ((entry.stx_attributes & STATX_ATTR_MOUNT_ROOT) != 0)
    return "something is mounted on it (a container's volume?)";
  if ((entry.stx_attributes & STATX_ATTR_IMMUTABLE) != 0)
    return "it is immutable (chattr -i makes it changeable)";
#else
  (void)where;
#endif
  return nullptr;
}

#else

inline int sync_file(file_handle opened) {
#ifdef F_FULLFSYNC  // macOS: fsync leaves the bytes in the drive's cache
  if (uninterrupted([&] { return ::fcntl(opened, F_FULLFSYNC); }) == 0) return 0;
#endif
  return uninterrupted([&] { return ::fsync(opened); });
}
inline int reserve_room(file_handle, std::uint64_t) { return 0; }
inline std::uint64_t clone_bytes(file_handle, file_handle, std::uint64_t, std::uint64_t) { return 0; }
inline const char* why_not_replaceable(const path&) { return nullptr; }

#endif

#endif  // POSIX

// ---- files, on every system

/// An open file, or none. Several threads may read and write at different offsets at once.
class file {
 public:
  using mode = file_mode;

  file() = default;
  file(file&& other) noexcept : handle_(std::exchange(other.handle_, no_file())) {}
  ~file() { close(); }

  [[nodiscard]] bool is_open() const { return handle_ != no_file(); }
  void close() {
    if (is_open()) close_file(std::exchange(handle_, no_file()));
  }
  /// Returns 0 or the system's error code. A new file gets `permissions` without the bits of the umask.
  [[nodiscard]] int open(const path& where, mode access, unsigned permissions = 0666) {
    close();
    return open_file(handle_, where, access, permissions);
  }
  [[nodiscard]] int open_lock(const path& where, bool& existed) {
    close();
    return open_lock_file(handle_, where, existed);
  }

  /// Writes all bytes. Returns 0 or the system's error code.
  [[nodiscard]] int write_at(std::uint64_t offset, std::string_view bytes) const {
    while (!bytes.empty()) {
      std::size_t count = 0;
      const int code = write_some(handle_, offset, bytes, count);
      if (code != 0 && system_condition(code) == std::errc::interrupted) continue;
      if (code != 0) return code;
      if (count == 0) return no_space_code;
      offset += count;
      bytes.remove_prefix(count);
    }
    return 0;
  }
  /// Reads `size` bytes, fewer only at the end of the file. Returns their number, or the negated system error code.
  [[nodiscard]] std::int64_t read_at(std::uint64_t offset, char* buffer, std::size_t size) const {
    std::size_t done = 0;
    while (done < size) {
      std::size_t count = 0;
      const int code = read_some(handle_, offset + done, buffer + done, size - done, count);
      if (code != 0 && system_condition(code) == std::errc::interrupted) continue;
      if (code != 0) return -code;
      if (count == 0) break;
      done += count;
    }
    return static_cast<std::int64_t>(done);
  }
  [[nodiscard]] int resize(std::uint64_t size) const { return resize_file(handle_, size); }
  /// Brings the content to stable storage. Returns 0 or the system's error code.
  [[nodiscard]] int sync() const { return sync_file(handle_); }
  [[nodiscard]] int reserve(std::uint64_t size) const { return reserve_room(handle_, size); }
  [[nodiscard]] look_result facts() const { return facts_of(handle_); }
  /// Whether the directory entry `where` is certainly missing or another file. Returns false if the examination fails.
  [[nodiscard]] bool is_surely_not(const path& where) const {
    const auto own = facts(), named = facts_of_entry(where);
    return named.absent() || (own.found() && named.found() && !named->is_same_file(*own));
  }
  /// Whether the directory entry `where` is this file: another process may have replaced the entry.
  [[nodiscard]] bool is_named(const path& where) const {
    const auto own = facts(), named = facts_of_entry(where);
    return own.found() && named.found() && named->is_same_file(*own);
  }
  /// Renames this file. A network file system may report a failure after the rename, if its first response was lost: then
  /// succeeds if this file has the new name. On Windows no other file may have the new name.
  [[nodiscard]] int rename(const path& source, const path& destination) const {
    const int code = rename_over(source, destination);
    return code != 0 && is_named(destination) ? 0 : code;
  }
  [[nodiscard]] file_handle native() const { return handle_; }

 private:
  file_handle handle_ = no_file();
};

/// Opens a stream, at offset 0, on the file that `opened` has open, in file::mode::keep_name or a mode that writes.
inline result<std::ifstream> stream_on(const file& opened, const path& where) {
  return stream_on(opened.native(), where);
}

/// A page-aligned buffer for reading files: reads from the page cache into other buffers can take three times as long.
class page_buffer {
 public:
  static constexpr std::size_t size = 256 * 1024;
  [[nodiscard]] char* data() {
    return bytes_.data() + (page - reinterpret_cast<std::uintptr_t>(bytes_.data()) % page);
  }

 private:
  static constexpr std::size_t page = 4096;
  std::string bytes_ = std::string(size + page, '\0');
};

/// Removes "." and empty segments, but keeps "..": the system resolves a link in front of "..", so that the two do not cancel out.
inline path absolute_path(const path& where) {
  std::error_code failure;
  const path whole = std::filesystem::absolute(where, failure);
  if (failure) return where;
  return std::find(whole.begin(), whole.end(), path("..")) == whole.end() ? whole.lexically_normal() : whole;
}

/// Removes an entry, if there is one. Returns false if it may still be there.
inline bool remove_quietly(const path& where) {
  std::error_code failure;
  std::filesystem::remove(where, failure);
  return !failure;
}

inline result<void> make_directories(const path& directory) {
  if (directory.empty()) return {};
  std::error_code failure;
  std::filesystem::create_directories(directory, failure);
  const auto made = facts_of(directory);
  if (made.found() && made->is_directory) return {};
  if (!failure) {
    failure = made.failure() != 0 ? std::error_code(made.failure(), std::system_category())
                                  : std::make_error_code(std::errc::not_a_directory);
  }
  return error(errc::disk_failure, "cannot make the directory " + in_quotes(directory) + ": " +
                                       failure.message() + disk_remedy(failure.default_error_condition()));
}

/// Reads a whole open file. Returns errc::disk_failure if it has more than `limit` bytes or cannot be read.
inline result<std::string> read_small_file(const file& opened, const path& where, std::size_t limit) {
  std::string text;
  // Read until the end instead of asking for the size: files in /proc have size 0.
  for (std::size_t held = 0; held == text.size() && held <= limit;) {
    text.resize((std::min)(limit + 1, held + 4096));
    const auto count = opened.read_at(held, text.data() + held, text.size() - held);
    if (count < 0) return disk_error("read", where, static_cast<int>(-count));
    held += static_cast<std::size_t>(count);
    if (held < text.size()) {
      text.resize(held);
      break;
    }
  }
  if (text.size() > limit) {
    return error(errc::disk_failure,
                 "cannot use " + in_quotes(where) + ": it is longer than " + readable_bytes(limit));
  }
  return text;
}
inline result<std::string> read_small_file(const path& where, std::size_t limit) {
  file opened;
  if (const int code = opened.open(where, file::mode::read)) return disk_error("open", where, code);
  return read_small_file(opened, where, limit);
}

/// Returns a number that differs between calls and processes, for file names and for the jitter of retries, not for secrets.
/// Does not use std::random_device, which throws if the system has no source of randomness.
inline std::uint64_t unique_number() {
  static std::atomic<std::uint64_t> calls{0};
  const auto now = std::chrono::steady_clock::now().time_since_epoch().count();
  std::string text;
  for (const std::uint64_t part :
       {own_process(), static_cast<process_id>(reinterpret_cast<std::uintptr_t>(&calls)),
        static_cast<process_id>(now), calls++}) {
    text += std::to_string(part) + ' ';
  }
  return name_hash(text);
}

/// Whether a small file is synced before it replaces the old one. Without the sync, a power failure may leave an empty file.
enum class durability { lasting, best_effort };

/// Replaces a small file atomically: readers see the old content or the new. Replaces a symbolic link, does not follow it.
inline result<void> replace_small_file(const path& where, std::string_view text, unsigned permissions = 0666,
                                       durability wanted = durability::lasting) {
  if (auto made = make_directories(where.parent_path()); !made) return made;
  path beside = where;
  beside += ".new-" + hex64(unique_number());
  file out;
  int code = out.open(beside, file::mode::create, permissions);
  if (code == 0) code = out.write_at(0, text);
  if (code == 0 && wanted == durability::lasting) code = out.sync();
  out.close();
  if (code == 0) code = rename_over(beside, where);
  if (code == 0) return {};
  remove_quietly(beside);
  return disk_error("write", where, code);
}

// ---- processes: is the writer of a partial file, or the holder of a lock, still running?

#ifndef _WIN32
#if defined(__linux__)

/// Returns the start time of a process, in a unit of the system; 0 if the time is unknown; nothing if the process does not
/// exist or is a zombie.
inline std::optional<std::uint64_t> process_start(process_id id) {
  const auto text = read_small_file("/proc/" + std::to_string(id) + "/stat", 4096);
  if (!text)
    return ::kill(static_cast<pid_t>(id), 0) != 0 && errno == ESRCH ? std::nullopt
                                                                    : std::optional<std::uint64_t>(0);
  // Field 2, the program's name in parentheses, may contain any character; field 3 is the state, field 20 the number of
  // threads, field 22 the start time. A process whose first thread has ended has state Z even while other threads run.
  const auto fields =
      split(std::string_view(*text).substr((std::min)(text->rfind(')') + 2, text->size())), ' ');
  if (fields.size() < 20) return 0;
  if ((fields[0] == "Z" && to_number(fields[17]).value_or(0) <= 1) || fields[0] == "X") return std::nullopt;
  return to_number(fields[19]).value_or(0);
}
/// Identifies the boot and the pid namespace, in which process ids are unique: a hash of each, eight hex digits long. Empty
/// if unknown.
inline std::string process_realm() {
  const auto boot = read_small_file("/proc/sys/kernel/random/boot_id", 64);
  std::error_code failure;
  const path space = std::filesystem::read_symlink("/proc/self/ns/pid", failure);
  if (!boot || failure) return {};
  return hex64(name_hash(*boot)).substr(0, 8) + hex64(name_hash(space.native())).substr(0, 8);
}

#elif defined(__APPLE__)

inline std::optional<std::uint64_t> process_start(process_id id) {
  struct kinfo_proc process {};
  std::size_t size = sizeof process;
  int query[] = {CTL_KERN, KERN_PROC, KERN_PROC_PID, static_cast<int>(id)};
  if (::sysctl(query, 4, &process, &size, nullptr, 0) != 0) return 0;
  if (size == 0 || process.kp_proc.p_stat == SZOMB) return std::nullopt;
  return static_cast<std::uint64_t>(process.kp_proc.p_starttime.tv_sec) * 1000000 +
         static_cast<std::uint64_t>(process.kp_proc.p_starttime.tv_usec);
}
inline std::string process_realm() {
  std::array<char, 64> boot{};
  std::size_t size = boot.size();
  return ::sysctlbyname("kern.bootsessionuuid", boot.data(), &size, nullptr, 0) == 0
             ? hex64(name_hash({boot.data(), size}))
             : std::string();
}

#else

inline std::optional<std::uint64_t> process_start(process_id id) {
  return ::kill(static_cast<pid_t>(id), 0) != 0 && errno == ESRCH ? std::nullopt
                                                                  : std::optional<std::uint64_t>(0);
}
inline std::string process_realm() { return {}; }

#endif
#endif

// ---- state after a fork: the child's copy of a lock stays locked if another thread held it during the fork

#ifdef _WIN32
/// Windows has no fork.
inline std::uint64_t this_process() { return 0; }
#else
/// Identifies this process: never equal in a child and its parent. Process ids can be equal, if each process is the first of
/// a pid namespace.
inline std::uint64_t this_process() {
  static std::atomic<std::uint32_t> forks{0};
  static const int registered = ::pthread_atfork(nullptr, nullptr, [] { ++forks; });
  static_cast<void>(registered);
  return std::uint64_t{forks.load()} << 32 | static_cast<std::uint32_t>(::getpid());
}
#endif

/// Whether no thread holds the lock.
inline bool is_free(std::mutex& lock) {
  const std::unique_lock<std::mutex> held(lock, std::try_to_lock);
  return held.owns_lock();
}

/// Holds one T for each process. In a forked child, the first get() makes a new T, and the parent's T is not used any more.
/// T::try_close() closes its descriptors. It returns false if a thread of the parent held a lock at the fork: such a T is
/// never destroyed.
template <class T>
class per_process {
 public:
  per_process() : newest_(new node) {}
  per_process(const per_process&) = delete;
  per_process& operator=(const per_process&) = delete;
  ~per_process() {
    for (node* each = newest_; each != nullptr;) {
      node* const inherited = each->inherited;
      if (each->object.try_close()) delete each;
      each = inherited;
    }
  }

  /// Returns the object of this process. Thread-safe.
  T& get() {
    node* newest = newest_;
    if (newest->process == this_process()) return newest->object;
    auto own = std::make_unique<node>();
    own->inherited = newest;
    // Several threads of a child may get here at once: one installs its object, the others use that.
    if (!newest_.compare_exchange_strong(newest, own.get())) return newest->object;
    newest->object.try_close();
    return own.release()->object;
  }

 private:
  struct node {
    const std::uint64_t process = this_process();
    node* inherited = nullptr;  // of the parent process
    T object = {};
  };
  std::atomic<node*> newest_;
};

/// Names the writer of a partial file or the holder of a lock: "<realm>.<process>.<start>.<serial>".
struct owner {
  std::string realm;
  process_id process = 0;  // 0: no owner
  std::uint64_t start = 0;
  std::uint64_t serial = 0;

  static owner self() {
    static std::atomic<std::uint64_t> next{0};
    // A process may contain two copies of this header (in shared libraries): the address makes their serials differ.
    const auto salt = name_hash(std::to_string(reinterpret_cast<std::uintptr_t>(&next))) & 0xffff;
    return {process_realm(), own_process(), process_start(own_process()).value_or(0), (salt << 24) + next++};
  }
  /// Returns an owner that counts as ended: a file that is named after it is abandoned.
  static owner ended() {
    owner made = self();
    if (made.start != 0) ++made.start;  // another process with this process's id
    return made;
  }
  [[nodiscard]] std::string str() const {
    return (realm.empty() ? "unknown" : realm) + '.' + std::to_string(process) + '.' + std::to_string(start) +
           '.' + std::to_string(serial);
  }
  /// Returns an owner with process 0 if the text is malformed.
  static owner parse(std::string_view text) {
    const auto parts = split(text, '.');
    if (parts.size() != 4) return {};
    const auto process = to_number(parts[1]);
    const auto start = to_number(parts[2]), serial = to_number(parts[3]);
    if (!process || !start || !serial) return {};
    return {std::string(parts[0]), *process, *start, *serial};
  }
  /// Whether it runs in this boot and pid namespace, so that process_start can examine it.
  [[nodiscard]] bool is_here() const { return !realm.empty() && realm == process_realm(); }
  /// Whether it runs in this boot, in any pid namespace (container): effective locks exclude it.
  [[nodiscard]] bool is_of_this_boot() const {
    const std::string here = process_realm();
    return here.size() == 16 && realm.size() == 16 && realm.compare(0, 8, here, 0, 8) == 0;
  }
  /// Whether it has certainly ended. False if unknown.
  [[nodiscard]] bool is_provably_dead() const {
    if (process == 0 || !is_here()) return false;
    const auto now = process_start(process);
    return !now || (*now != 0 && start != 0 && *now != start);
  }
};

// ---- places, and the hidden files beside them

/// The prefix of all hidden files' names. Files of a run whose names have it are refused.
constexpr std::string_view hidden_prefix = ".wandb-restore-";

/// The place a file is restored to, and the names of the hidden files beside it.
struct place {
  path target;      // root / name
  path directory;   // of the target
  std::string tag;  // prefix of the target's hidden files

  explicit place(path where) : target(std::move(where)), directory(target.parent_path()) {
    tag = std::string(hidden_prefix) + hex64(name_hash(utf8(target.filename())));
  }
  [[nodiscard]] path lock() const { return directory / (tag + ".lock"); }
  /// The partial file that this user's last writer has released. Each user has a name of his own, because in a directory
  /// with the sticky bit users cannot replace each other's files. Its record holds the md5 of its content.
  [[nodiscard]] path released() const {
    return directory / (tag + '-' + std::to_string(own_user()) + ".part");
  }
  /// A partial file in use. It remains if its writer is killed.
  [[nodiscard]] path partial(const std::string& md5, const std::string& writer) const {
    return directory / (tag + '-' + key(md5) + '-' + writer + ".part");
  }
  /// Shortens an md5 for a file name; the record holds the whole md5.
  static std::string key(const std::string& md5) { return md5.empty() ? "unknown" : md5.substr(0, 16); }
};

/// Returns an error if a rename over the target would fail. Call before downloading.
inline result<void> check_replaceable(const place& destination) {
  const auto old = facts_of_entry(destination.target);
  if (old.failure() != 0) return disk_error("look at", destination.target, old.failure());
  if (old.absent()) return {};
  const auto refuse = [&](const std::string& why) {
    return error(errc::disk_failure,
                 "cannot replace " + in_quotes(destination.target) + ": " + why + "; set another root");
  };
  if (const char* why = why_not_replaceable(destination.target)) return refuse(why);
  // In a directory with the sticky bit, only the owners of file and directory, and root, may replace a file.
  const auto directory = facts_of(or_dot(destination.directory));
  if (directory.found() && (directory->mode & 01000u) != 0 && own_user() != 0 && old->user != own_user() &&
      directory->user != own_user()) {
    return refuse("it belongs to another user, and in this directory only owners may replace files");
  }
  return {};
}

// ---- locks: they avoid duplicate work; correctness does not depend on them

/// Excludes other threads and, if the file system's locks work, other processes from a place. Never blocks. The holder
/// writes its name into the lock file: a forked child inherits the lock, and may keep it after the holder has ended.
class place_lock {
 public:
  enum class outcome { held, busy, unavailable };

  explicit place_lock(const place& destination)
      : where_(destination.lock()), key_(utf8(absolute_path(destination.target))) {}
  place_lock(const place_lock&) = delete;
  place_lock& operator=(const place_lock&) = delete;
  ~place_lock() {
    // Remove the file before unlocking: see try_file(). If another process has removed this lock file, the name may be that
    // of its own one.
    if (outcome_ == outcome::held && !leave_ && out_.is_named(where_)) remove_quietly(where_);
    out_.close();
    if (outcome_ != outcome::busy) forget();
  }

  outcome try_acquire() {
    if (outcome_ != outcome::busy) return outcome_;
    {
      locked_targets& locked = of_this_process();
      const std::lock_guard<std::mutex> guard(locked.mutex);
      if (contains(locked.keys, key_)) return outcome::busy;
      locked.keys.push_back(key_);
    }
    outcome_ = outcome::unavailable;  // if try_file() throws: the destructor then forgets the key
    outcome_ = try_file();
    if (outcome_ == outcome::busy) forget();
    return outcome_;
  }
  /// Whether the lock is held, and its file was made by this object: no earlier holder was killed or left hidden files.
  [[nodiscard]] bool is_first() const { return outcome_ == outcome::held && !existed_ && !took_; }
  /// Whether the lock is held and certainly excludes the other processes of this machine.
  [[nodiscard]] bool is_effective() const {
    return outcome_ == outcome::held && are_locks_effective(out_.native(), where_);
  }
  /// Makes the destructor keep the lock file, so that the next holder looks for hidden files to clean up.
  void leave_file() { leave_ = true; }
  void remove_file() { leave_ = false; }
  /// Removes the lock file if its holder has certainly ended: a forked child may still have the lock. Returns true if the
  /// file was removed; try_acquire then makes a new one.
  bool take_from_dead() {
    file held;
    if (held.open(where_, file::mode::neighbour) != 0) return false;
    const auto text = read_small_file(held, where_, 256);
    if (!text || !owner::parse(*text).is_provably_dead() || !held.is_named(where_)) return false;
    std::error_code failure;
    if (!std::filesystem::remove(where_, failure)) return false;
    return took_ = true;
  }
  /// Returns nanoseconds since 1970 by the file system's clock, or by the system's clock if the former is unknown.
  [[nodiscard]] std::int64_t now() const {
    if (out_.is_open()) set_modified_now(out_.native());
    const auto facts = out_.is_open() ? out_.facts() : look_result::failed(no_space_code);
    if (facts.found()) return facts->modified;
    const auto now = std::chrono::system_clock::now().time_since_epoch();
    return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
  }

 private:
  /// The targets that threads of this process have locked.
  struct locked_targets {
    std::mutex mutex = {};
    std::vector<std::string> keys = {};  // absolute paths
    bool try_close() { return is_free(mutex); }
  };
  static locked_targets& of_this_process() {
    static auto& all = *new per_process<locked_targets>;  // threads may still run while the program exits
    return all.get();
  }
  void forget() const {
    locked_targets& locked = of_this_process();
    const std::lock_guard<std::mutex> guard(locked.mutex);
    for (auto key = locked.keys.begin(); key != locked.keys.end(); ++key) {
      if (*key == key_) {
        locked.keys.erase(key);
        return;
      }
    }
  }
  outcome try_file() {
    int code = out_.open_lock(where_, existed_);
    if (code != 0) return is_lock_busy(code) ? outcome::busy : outcome::unavailable;
    code = lock_file(out_.native());
    if (code != 0) {
      out_.close();
      if (is_lock_busy(code)) return outcome::busy;
      if (!existed_) remove_quietly(where_);  // otherwise another process may hold it
      return outcome::unavailable;
    }
    // The previous holder may have removed the file after it was opened here: the next try makes a new one.
    if (!out_.is_named(where_)) {
      const bool is_disk_failing = !out_.facts().found() || facts_of_entry(where_).failure() != 0;
      out_.close();
      return is_disk_failing ? outcome::unavailable : outcome::busy;
    }
    const std::string name = owner::self().str();
    (void)out_.resize(0);
    (void)out_.write_at(0, name);
    return outcome::held;
  }

  path where_;
  std::string key_;
  file out_;
  outcome outcome_ = outcome::busy;
  bool existed_ = false, took_ = false, leave_ = false;
};

// ---- partial files

/// A hidden partial file found beside a target. Do not trust it: any user who may write to the directory may have made it.
struct found_partial {
  path where;
  std::string key;  // place::key of its content; empty for a released file
  owner writer;     // process 0: released, or the name is malformed
  bool released = false;
  file_facts facts;            // of the entry itself, even if it is a link
  std::uint64_t recorded = 0;  // blocks that its record claims, once it was inspected
  bool is_own = false;         // it may be taken over, once it was inspected

  /// Whether certainly no process writes to it.
  [[nodiscard]] bool abandoned() const { return released || writer.is_provably_dead(); }
  /// Whether it was not written for `time`. `now` is the file system's clock in nanoseconds since 1970.
  [[nodiscard]] bool is_silent(std::int64_t now, std::chrono::nanoseconds time) const {
    return now - facts.modified > time.count();
  }
};

/// The partial files of a place.
struct partial_listing {
  std::vector<found_partial> found = {};
  bool is_complete = true;  // false: the directory or a file in it could not be examined
};

inline partial_listing find_partials(const place& destination) {
  partial_listing listing;
  const bool is_read = for_each_name(or_dot(destination.directory), [&](const path& file_name) {
    const std::string name = utf8(file_name);
    constexpr std::string_view suffix = ".part";
    if (!starts_with(name, destination.tag) || name.size() < destination.tag.size() + suffix.size() ||
        name.compare(name.size() - suffix.size(), suffix.size(), suffix) != 0) {
      return;
    }
    found_partial partial;
    partial.where = destination.directory / file_name;
    std::string_view middle = name;
    middle = middle.substr(destination.tag.size(), name.size() - destination.tag.size() - suffix.size());
    if (middle.empty() || (middle[0] == '-' && to_number(middle.substr(1)))) {  // empty: made by version 0.1
      partial.released = true;
    } else {
      const auto dash = middle.find('-', 1);
      if (middle[0] != '-' || dash == std::string_view::npos || dash + 1 == middle.size()) return;
      partial.key = middle.substr(1, dash - 1);
      partial.writer = owner::parse(middle.substr(dash + 1));
    }
    const auto facts = facts_of_entry(partial.where);
    if (facts.failure() != 0) listing.is_complete = false;
    if (!facts.found()) return;
    partial.facts = *facts;
    listing.found.push_back(std::move(partial));
  });
  if (!is_read) listing.is_complete = false;
  return listing;
}

/// A long operation calls this now and then with the number of bytes done, and stops if it returns false.
using watcher = function_ref<bool(std::uint64_t done)>;

/// A partially downloaded file: the content at its final offsets, then a record of the blocks that are present. Both are in
/// one file, so that one rename moves both. Blocks are written before they are recorded, but a crash may lose a write: only
/// the md5 of the whole file proves the content.
class partial_file {
 public:
  static constexpr std::uint64_t block = 64 * 1024;  // bytes
  /// The size of the largest file, 64 TiB.
  static constexpr std::uint64_t max_size = std::uint64_t{1} << 46;
  // Seconds without a write after which a writer counts as dead if its process cannot be examined.
  static constexpr std::uint64_t quiet = 60;

  /// Reuses partial files of this content, or starts a new one. Takes over an abandoned file of this user; copies the
  /// recorded blocks of other files that no live process writes, until `go_on` returns false. `lock` is the lock of the
  /// place, or null.
  static result<std::unique_ptr<partial_file>> open(const place& destination, const std::string& md5,
                                                    std::uint64_t size, watcher go_on = {},
                                                    const place_lock* lock = nullptr);
  /// Starts a new file without reusing any. The new file has at most the permissions of the file that it will replace.
  static result<std::unique_ptr<partial_file>> create(const place& destination, const std::string& md5,
                                                      std::uint64_t size);
  partial_file(const partial_file&) = delete;
  partial_file& operator=(const partial_file&) = delete;
  /// Removes the file, or renames it to the fallback, unless it was released or published.
  ~partial_file() {
    out_.close();
    if (!is_claimed_ || (!fallback_.empty() && rename_over(where_, fallback_) == 0)) return;
    remove_quietly(where_);
  }

  [[nodiscard]] const file& content() const { return out_; }
  [[nodiscard]] const path& where() const { return where_; }
  [[nodiscard]] std::uint64_t size() const { return size_; }
  [[nodiscard]] bool has(std::uint64_t index) const {
    return byte_of(index) < bits_.size() && (bits_[byte_of(index)] >> (index % 8) & 1) != 0;
  }
  [[nodiscard]] std::uint64_t blocks() const { return (size_ + block - 1) / block; }
  /// The number of blocks that `bits_` covers; later ones are absent. `bits_` grows with the blocks that arrive, because a
  /// server may claim any size.
  [[nodiscard]] std::uint64_t covered() const {
    return (std::min<std::uint64_t>)(blocks(), bits_.size() * 8);
  }

  /// Writes bytes at their offset. Safe to call from several threads at once.
  result<void> write(std::uint64_t offset, std::string_view bytes) const {
    if (const int code = out_.write_at(offset, bytes)) return disk_error("write", where_, code);
    return {};
  }
  /// Records that blocks [first, last) have been written. Call from one thread at a time.
  result<void> record(std::uint64_t first, std::uint64_t last) {
    if (first >= last) return {};
    bits_.resize((std::max)(bits_.size(), byte_of(last - 1) + 1), '\0');
    for (auto i = first; i < last; ++i)
      bits_[byte_of(i)] = static_cast<char>(bits_[byte_of(i)] | 1 << (i % 8));
    const auto begin = byte_of(first), end = byte_of(last - 1) + 1;
    return write(record_offset() + header_size + begin, std::string_view(bits_).substr(begin, end - begin));
  }
  /// Updates the time of modification without a write, so that other processes do not take this writer for dead.
  void touch() const { set_modified_now(out_.native()); }
  /// Sets the size of content that was started with an unknown size.
  void set_size(std::uint64_t size) { size_ = size; }

  /// Allocates disk space for the missing blocks, if the file system can. Returns an error if there is not enough.
  result<void> reserve() const;
  /// Returns an error if this process may not write a file of this size.
  static result<void> check_limit(std::uint64_t bytes);
  /// Returns an error if the directory's disk has less free space.
  static result<void> check_room(const path& directory, std::uint64_t bytes);

  /// Whether it holds blocks that a later restore can recognise and reuse.
  [[nodiscard]] bool is_worth_keeping(const std::string& md5) const {
    return !md5.empty() && !is_unreliable_ && bits_.find_first_not_of('\0') != std::string::npos;
  }
  /// Sets the name that the destructor gives the file; if the name is empty, the destructor removes the file. A file that
  /// open() took over has its former name as the fallback, so that an exception does not lose the bytes that had arrived.
  void set_fallback(path name) { fallback_ = std::move(name); }
  /// Closes the file, and keeps it for the next restore of this content, unless a better one is there. Returns false if it did not
  /// get the released name: then the next restore finds it only by reading the directory. Has no effect on a published file.
  bool release(const place& destination, const std::string& md5) {
    bool is_found_by_name = true;
    if (out_.is_open() && out_.is_surely_not(where_))
      is_claimed_ = false;  // another program has replaced the entry
    if (is_claimed_ && is_worth_keeping(md5) && out_.is_open()) {
      if (is_finished_) write_record();
      const auto better = has_better_released(destination);
      if (!better || !*better) {
        is_found_by_name = better && rename_over(where_, destination.released()) == 0;
        if (!is_found_by_name)
          static_cast<void>(rename_over(where_, destination.partial(md5, owner::ended().str())));
        is_claimed_ = false;
      }
    }
    out_.close();
    return is_found_by_name;
  }

  /// Cuts the record off and brings the content to stable storage. May take long; cannot be cancelled.
  result<void> finish();
  /// Calls finish() if it was not called before, replaces the target with this file, and returns a stream on it. Calls
  /// `announce` just before the replacement, with the facts that the published file will have.
  result<std::ifstream> publish(const place& destination,
                                function_ref<void(const file_facts&)> announce = {});

 private:
  static constexpr std::string_view magic = "wandb-restore 2\n";
  static constexpr std::size_t header_size = 64;
  static constexpr std::size_t shortest_record = 1024 * 1024;  // bytes; of files of 512 GiB and more

  partial_file(file out, path where, const std::string& md5, std::uint64_t size)
      : out_(std::move(out)), where_(std::move(where)), md5_(md5), size_(size),
        bits_((std::min)(record_size(), shortest_record), '\0') {}
  static std::size_t byte_of(std::uint64_t index) { return static_cast<std::size_t>(index / 8); }
  /// Returns the bytes of content and record.
  [[nodiscard]] std::uint64_t whole() const { return record_offset() + header_size + record_size(); }
  [[nodiscard]] std::size_t record_size() const { return byte_of(blocks() + 7); }
  [[nodiscard]] std::uint64_t record_offset() const { return (size_ + block - 1) / block * block; }
  [[nodiscard]] std::string header() const {
    std::string text(magic);
    for (int shift = 0; shift < 64; shift += 8) text += static_cast<char>(size_ >> shift & 0xff);
    text += md5_;
    text.resize(header_size, '\0');
    return text;
  }
  void write_record() const { (void)out_.write_at(record_offset(), header() + bits_); }
  /// Reads the record from the file. Returns false if it is missing or describes other content.
  result<bool> load_record() {
    std::string text(header_size, '\0');
    const auto head = out_.read_at(record_offset(), text.data(), text.size());
    if (head < 0) return disk_error("read", where_, static_cast<int>(-head));
    if (head != static_cast<std::int64_t>(text.size()) || text != header()) return false;
    const std::size_t shortest = bits_.size();
    bits_.resize(record_size());
    const auto count = out_.read_at(record_offset() + header_size, bits_.data(), bits_.size());
    if (count < 0) return disk_error("read", where_, static_cast<int>(-count));
    bits_.resize(static_cast<std::size_t>(count));
    return count >= static_cast<std::int64_t>(shortest);
  }
  [[nodiscard]] std::uint64_t recorded() const {
    std::uint64_t count = 0;
    for (std::uint64_t i = 0; i < covered(); ++i) count += has(i) ? 1u : 0u;
    return count;
  }
  /// Opens a candidate and reads its record. Returns null if it has no record of this content, and an error if the record
  /// cannot be read. Sets is_own_ if the file belongs to this user and has one hard link: through another one, others could
  /// change the file after it was published.
  static result<std::unique_ptr<partial_file>> inspect(const found_partial& candidate, const std::string& md5,
                                                       std::uint64_t size);
  /// Renames an abandoned candidate so that no other process claims it. Returns false if another process was faster.
  bool claim(const place& destination);
  /// Copies the blocks that `source` has and this file lacks. Returns false if it stopped early: at a failure, or because `go_on`
  /// returned false.
  bool adopt(const partial_file& source, watcher go_on);
  /// Whether another writer has released a file with more blocks of the same content. An error if that cannot be told.
  [[nodiscard]] result<bool> has_better_released(const place& destination) const {
    found_partial released;
    released.where = destination.released();
    const auto facts = facts_of_entry(released.where);
    if (facts.failure() != 0) return disk_error("look at", released.where, facts.failure());
    released.facts = *facts;
    const auto kept = inspect(released, md5_, size_);
    if (!kept) return kept.error();
    return *kept && (*kept)->recorded() > recorded();
  }

  file out_;
  path where_, fallback_;
  std::string md5_;  // of the content; empty if unknown
  std::uint64_t size_;
  std::string bits_;            // the record: one bit for each block, lowest bit first
  bool is_claimed_ = false;     // no other object uses the directory entry; the destructor removes it
  bool is_own_ = true;          // this user's file; may be written and published
  bool is_finished_ = false;    // the record is cut off; the content is on stable storage
  bool is_unreliable_ = false;  // a sync failed: the kernel may have dropped written pages
};

/// Returns the permissions of a partial file that will replace `old`: those of `old`, and read and write for its owner.
inline unsigned permissions_beside(const look_result& old) {
  return old.found() ? (old->mode & 0666u) | 0600u : 0666u;
}

inline result<std::unique_ptr<partial_file>>
partial_file::create(const place& destination, const std::string& md5, std::uint64_t size) {
  if (size > max_size) {
    return error(errc::protocol_violation, in_quotes(destination.target) +
                                               " has an impossible size: " + std::to_string(size) + " bytes");
  }
  if (auto room = check_room(destination.directory, size); !room) return room.error();
  const auto old = facts_of(destination.target);
  if (old.failure() != 0) return disk_error("look at", destination.target, old.failure());
  const path where = destination.partial(md5, owner::self().str());
  // Make the object before the file: a lack of memory must not leave a file behind.
  std::unique_ptr<partial_file> made(new partial_file(file(), where, md5, size));
  if (const int code = made->out_.open(where, file::mode::create, permissions_beside(old)))
    return disk_error("create", where, code);
  made->is_claimed_ = true;
  if (auto allowed = check_limit(made->whole()); !allowed) return allowed.error();
  if (size > 0) {
    if (auto done = made->write(made->record_offset(), made->header() + made->bits_); !done)
      return done.error();
  }
  return made;
}

inline result<std::unique_ptr<partial_file>>
partial_file::inspect(const found_partial& candidate, const std::string& md5, std::uint64_t size) {
  using opened_file = std::unique_ptr<partial_file>;
  if (!candidate.facts.is_file || (!candidate.key.empty() && candidate.key != place::key(md5)))
    return opened_file();
  file out;
  bool is_own = out.open(candidate.where, file::mode::update) == 0;
  if (!is_own) {
    const int code = out.open(candidate.where, file::mode::neighbour);
    if (code != 0) return disk_error("open", candidate.where, code);
  }
  const auto facts = out.facts();
  if (!facts.found()) return disk_error("look at", candidate.where, facts.failure());
  if (!facts->is_file || facts->size < size) return opened_file();
  is_own = is_own && facts->user == own_user() && facts->links == 1;
  opened_file made(new partial_file(std::move(out), candidate.where, md5, size));
  made->is_own_ = is_own;
  if (!candidate.key.empty() && facts->size == size) {
    // The writer was killed between finish() and the rename: all blocks are present.
    made->bits_.assign(made->record_size(), '\xff');
    return made;
  }
  const auto has_record = made->load_record();
  if (!has_record) return has_record.error();
  if (!*has_record) made.reset();
  return made;
}

inline bool partial_file::claim(const place& destination) {
  fallback_ = destination.partial(md5_, owner::self().str());
  if (out_.rename(where_, fallback_) != 0) return false;
  where_.swap(fallback_);
  is_claimed_ = true;
  const auto opened = out_.facts();
  if (out_.is_surely_not(where_) || (opened.found() && opened->links != 1)) {
    // Not the inspected file: somebody replaced the entry before the rename. The destructor removes it.
    fallback_.clear();
    return false;
  }
  if (!opened.found() || !out_.is_named(where_))
    return false;  // not known: the destructor gives the former name back
  if (const auto old = facts_of(destination.target); old.found()) {
    set_permissions(out_.native(), opened->mode & permissions_beside(old));
  }
  if (opened->size == size_) write_record();
  return true;
}

inline result<std::unique_ptr<partial_file>> partial_file::open(const place& destination,
                                                                const std::string& md5, std::uint64_t size,
                                                                watcher go_on, const place_lock* lock) {
  if (md5.empty() || size == 0) return create(destination, md5, size);
  std::vector<found_partial> sources;  // with content to reuse; most recorded blocks first
  auto listing = find_partials(destination);
  for (auto& candidate : listing.found) {
    const auto content = inspect(candidate, md5, size);
    if (!content) continue;  // a later call may be able to read it
    if (!*content) {
      // Remove an abandoned file of this md5 whose record is damaged or has another size. A restore of another md5 may be
      // able to use its file.
      if (candidate.abandoned() && candidate.key == place::key(md5)) remove_quietly(candidate.where);
      continue;
    }
    candidate.recorded = (*content)->recorded();
    candidate.is_own = (*content)->is_own_;
    sources.push_back(std::move(candidate));
    for (auto i = sources.size() - 1; i > 0 && sources[i].recorded > sources[i - 1].recorded; --i)
      std::swap(sources[i], sources[i - 1]);
  }
  std::unique_ptr<partial_file> made;
  const found_partial* claimed = nullptr;
  const found_partial* in_use = nullptr;
  for (const auto& source : sources) {
    if (!source.abandoned()) in_use = &source;
    if (made || !source.is_own || !source.abandoned()) continue;
    auto content = *inspect(source, md5, size);
    if (!content || !content->is_own_ || !content->claim(destination)) continue;
    made = std::move(content);
    claimed = &source;
  }
  if (!made) {
    auto created = create(destination, md5, size);
    if (!created && in_use != nullptr && created.error().code() == errc::disk_failure &&
        !check_room(destination.directory, size)) {
      return error(created.error().code(),
                   std::string(created.error().what()) + "; also, " + in_quotes(in_use->where) +
                       " holds a part of the file: if no process is downloading it, remove that part");
    }
    if (!created) return created;
    made = *std::move(created);
  }
  made->touch();
  const auto now = made->out_.facts();  // touched just now, by the file system's clock
  for (const auto& source : sources) {
    if (&source == claimed) continue;
    const auto& writer = source.writer;
    const bool is_abandoned = source.abandoned();
    // This call holds the lock, so a live writer of this machine has lost it by being silent. The writer may continue: copy
    // the file, do not claim it.
    const bool is_locked_out =
        lock != nullptr && !writer.is_here() && writer.is_of_this_boot() && lock->is_effective();
    const bool is_silent =
        now.found() && !writer.is_here() && source.is_silent(now->modified, std::chrono::seconds(quiet));
    if (!is_abandoned && !is_locked_out && !is_silent) continue;
    const auto content = inspect(source, md5, size);
    const bool is_copied = content && (!*content || made->adopt(**content, go_on));
    if (is_copied && (is_abandoned || is_locked_out)) remove_quietly(source.where);
  }
  return made;
}

inline bool partial_file::adopt(const partial_file& source, watcher go_on) {
  page_buffer buffer;
  constexpr std::uint64_t stride = 16;  // blocks copied between two calls of the watcher
  for (std::uint64_t first = 0, last = 0; first < source.covered(); first = last) {
    last = first + 1;
    if (has(first) || !source.has(first)) continue;
    while (last < source.covered() && last - first < stride && !has(last) && source.has(last)) ++last;
    if (go_on && !go_on(first * block)) return false;
    const auto end = (std::min)(last * block, size_);
    auto offset = first * block;
    for (std::uint64_t count = 1; offset < end && count > 0; offset += count)
      count = clone_bytes(source.out_.native(), out_.native(), offset, end - offset);
    while (offset < end) {
      const auto wanted =
          static_cast<std::size_t>((std::min<std::uint64_t>)(page_buffer::size, end - offset));
      if (source.out_.read_at(offset, buffer.data(), wanted) != static_cast<std::int64_t>(wanted))
        return false;
      if (!write(offset, {buffer.data(), wanted})) return false;
      offset += wanted;
    }
    if (!record(first, last)) return false;
  }
  return true;
}

inline result<void> partial_file::check_limit(std::uint64_t bytes) {
  const auto limit = file_size_limit();
  if (!limit || bytes <= *limit) return {};
  return error(errc::disk_failure, "cannot write a file of " + std::to_string(bytes) +
                                       " bytes: the limit of this process is " + std::to_string(*limit) +
                                       "; raise it (ulimit -f)");
}

inline result<void> partial_file::check_room(const path& directory, std::uint64_t bytes) {
  const auto space = free_space(directory);
  if (!space || bytes <= *space) return {};
  return error(errc::disk_failure,
               "not enough room in " + in_quotes(or_dot(directory)) + ": " + std::to_string(bytes) +
                   " bytes are needed, " + std::to_string(*space) + " are free, " +
                   std::to_string(bytes - *space) + " are missing; free some, or set root to another disk");
}

inline result<void> partial_file::reserve() const {
  const auto facts = out_.facts();
  if (auto allowed = check_limit(whole()); !allowed) return allowed;
  // On a file system that compresses, written blocks may have less space allocated than their size.
  const auto present = (std::max)(facts.found() ? facts->allocated : 0, recorded() * block);
  const std::uint64_t missing = present < whole() ? whole() - present : 0;
  const path directory = where_.parent_path();
  if (auto room = check_room(directory, missing); !room) return room;
  const int code = out_.reserve(whole());
  if (code == 0) return {};
  return error(errc::disk_failure, "not enough room in " + in_quotes(or_dot(directory)) + ": " +
                                       std::to_string(missing) + " bytes are missing: " + system_text(code) +
                                       "; free some (or raise the quota), or set root to another disk");
}

inline result<void> partial_file::finish() {
  if (const int code = out_.resize(size_)) return disk_error("shorten", where_, code);
  if (const int code = out_.sync()) {
    is_unreliable_ = true;
    return disk_error("sync", where_, code);
  }
  is_finished_ = true;
  return {};
}

inline result<std::ifstream> partial_file::publish(const place& destination,
                                                   function_ref<void(const file_facts&)> announce) {
  const auto old = facts_of(destination.target);
  // Restore the record, so that release() can keep the file. Do not if another name leads to the file: it may be the
  // published one.
  const auto failed = [&](const error& failure) {
    const bool is_open = out_.is_open() || out_.open(where_, file::mode::update) == 0;
    if (is_open && out_.is_named(where_)) write_record();
    return failure;
  };
  if (old.failure() != 0) return failed(disk_error("look at", destination.target, old.failure()));
  if (old.found() && !old->is_file) {
    return failed(error(errc::disk_failure,
                        "cannot replace " + in_quotes(destination.target) + ": it is no ordinary file"));
  }
  if (!is_finished_) {
    if (auto done = finish(); !done) return is_unreliable_ ? done.error() : failed(done.error());
  }
  // Keep the old file's permissions, if it belonged to this user.
  if (old.found() && old->user == own_user()) set_permissions(out_.native(), old->mode & 0777);
  // Set the time of modification back by more than a tick of any file system's clock, so that any later change, however
  // soon, gives the file another time and makes its receipt invalid.
  using namespace std::chrono;
  (void)set_modified(out_.native(), system_clock::now().time_since_epoch() - seconds(3));
  const auto facts = out_.facts();
  if (facts.found() && announce) announce(*facts);
#ifdef _WIN32
  out_.close();  // Windows does not rename an open file
  if (const int code = rename_over(where_, destination.target)) {
    const error failure = failed(disk_error("rename a finished file to", destination.target, code));
    if (code != ERROR_ACCESS_DENIED && code != ERROR_SHARING_VIOLATION) return failure;
    return error(failure.code(), "cannot replace " + in_quotes(destination.target) + ": " +
                                     system_text(code) +
                                     "; close it where it is open, e.g. a stream of an earlier restore");
  }
  is_claimed_ = false;
  file published;
  if (const int code = published.open(destination.target, file::mode::keep_name))
    return disk_error("open", destination.target, code);
  auto stream = stream_on(published, destination.target);
#else
  auto stream = stream_on(out_, where_);
  if (!stream) return failed(stream.error());
  if (!out_.is_named(where_)) {
    return error(errc::disk_failure,
                 "cannot use " + in_quotes(where_) + ": another program has replaced it; try again");
  }
  if (const int code = out_.rename(where_, destination.target))
    return failed(disk_error("rename a finished file to", destination.target, code));
  is_claimed_ = false;
  out_.close();
  sync_directory(destination.directory);
#endif
  return stream;
}

/// Removes abandoned partial files that were not written for `age`, and files whose writer cannot be examined (on another
/// host, for example) and that were not written for an hour. `now` is the file system's clock in nanoseconds since 1970.
/// Returns true if no partial file is left, except for a released one, whose name is known without reading the directory.
inline bool remove_abandoned_partials(const place& destination, std::int64_t now,
                                      std::chrono::nanoseconds age = {}) {
  const auto listing = find_partials(destination);
  bool is_clean = listing.is_complete;
  for (const auto& partial : listing.found) {
    const bool is_old = age.count() == 0 || partial.is_silent(now, age);
    const bool is_lost = !partial.writer.is_here() && partial.is_silent(now, std::chrono::seconds(3600));
    const bool is_removed = ((partial.abandoned() && is_old) || is_lost) && remove_quietly(partial.where);
    if (!is_removed && !partial.released) is_clean = false;
  }
  return is_clean;
}

// ---- receipts: records of restored files, in the user's cache directory

struct receipt {
  run_path run;
  std::string name;           // the file's name in the run; empty in receipts of version 0.1
  std::uint64_t size = 0;     // bytes
  std::int64_t modified = 0;  // nanoseconds since 1970
  std::string md5;            // in hex; empty if it was not verified

  explicit operator bool() const { return !run.run_id.empty(); }  // false: no receipt
};

/// Resolves the links in the directory's path, so that a file has one receipt whichever path leads to it.
inline result<path> real_path(const path& where) {
  std::error_code failure;
  const path parent = absolute_path(where).parent_path();
  path directory = std::filesystem::canonical(parent, failure);
  if (failure) return disk_error("resolve the path", parent, failure.value());
  return directory / where.filename();
}
inline path receipt_path(const path& cache, const path& real_target) {
  return cache / "receipts" / hex64(name_hash(utf8(real_target)));
}
/// Whether a change that is made now could get the same time of modification: some file systems' clocks tick every 2
/// seconds. A receipt must not record the md5 of such a file.
inline bool is_too_fresh(std::int64_t modified) {
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  return modified + 2000000000 > std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

/// Removes unfinished receipts, older than a day, of killed processes. Does not look at the files that receipts are about:
/// their file systems may not answer.
inline void remove_unfinished_receipts(const path& directory) {
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  const auto old =
      std::chrono::duration_cast<std::chrono::nanoseconds>(now - std::chrono::seconds(86400)).count();
  for_each_name(directory, [&](const path& name) {
    if (utf8(name).find(".new-") == std::string::npos) return;
    const path where = directory / name;
    if (const auto facts = facts_of_entry(where); facts.found() && facts->modified <= old)
      remove_quietly(where);
  });
}

/// Reads the receipts that are stored in a receipt file. Returns "" if there is none, or if another user made the file.
inline result<std::string> receipts_at(const path& where) {
  file opened;
  const int code = opened.open(where, file::mode::neighbour);
  const auto facts = code == 0 ? opened.facts() : facts_of_entry(where);
  if (facts.absent() || (facts.found() && !(facts->is_file && facts->user == own_user())))
    return std::string();
  if (code != 0 || !facts.found()) return disk_error("read", where, code != 0 ? code : facts.failure());
  return read_small_file(opened, where, 64 * 1024);
}

inline constexpr std::string_view end_of_receipt = "end=yes\n";

/// Writes the receipt of a file just before its publication. Appends the receipt of the file that it replaces, so that a
/// call at that moment recognises either file. Does nothing if `cache` is empty: later calls then do not know that the file
/// was restored.
inline result<void> write_receipt(const path& cache, const path& target, const receipt& facts) {
  if (cache.empty()) return {};
  const auto real = real_path(target);
  if (!real) return real.error();
  std::string record =
      "path=" + percent_encode(utf8(*real), "/") + "\nentity=" + percent_encode(facts.run.entity) +
      "\nproject=" + percent_encode(facts.run.project) + "\nrun_id=" + percent_encode(facts.run.run_id) +
      "\nname=" + percent_encode(facts.name, "/") + "\nsize=" + std::to_string(facts.size) +
      "\nmodified_ns=" + std::to_string(facts.modified) +
      "\nmd5=" + (is_too_fresh(facts.modified) ? std::string() : facts.md5) + '\n';
  record += end_of_receipt;
  const path where = receipt_path(cache, *real);
  const std::string previous = receipts_at(where).value_or(std::string());
  if (const auto end = previous.find(end_of_receipt); end != previous.npos)
    record += previous.substr(0, end + end_of_receipt.size());
  if (unique_number() % 64 == 0) remove_unfinished_receipts(where.parent_path());
  return replace_small_file(where, record, 0666, durability::best_effort);
}

/// Reads the receipt that is stored under exactly this path. Returns an empty one if the file has changed since.
inline result<receipt> receipt_of(const path& cache, const path& real, const file_facts& now) {
  const auto text = receipts_at(receipt_path(cache, real));
  if (!text) return text.error();
  std::string_view rest = *text;
  for (auto end = rest.find(end_of_receipt); end != rest.npos; end = rest.find(end_of_receipt)) {
    auto record = parse_key_values(rest.substr(0, end));
    rest.remove_prefix(end + end_of_receipt.size());
    const auto field = [&](const char* name) { return percent_decode(record[name]).value_or(std::string()); };
    if (field("path") != utf8(real) || to_number(record["size"]) != now.size ||
        record["modified_ns"] != std::to_string(now.modified)) {
      continue;
    }
    return receipt{{field("entity"), field("project"), field("run_id")},
                   field("name"),
                   now.size,
                   now.modified,
                   field("md5")};
  }
  return receipt();
}

/// Reads the receipt of a file. Returns an empty one if there is none or the file has changed since. An error means that
/// the receipt could not be read.
inline result<receipt> read_receipt(const path& cache, const path& target, const file_facts& now) {
  if (cache.empty()) return receipt();
  const path plain = absolute_path(target);
  if (auto found = receipt_of(cache, plain, now); !found || *found) return found;
  const auto real = real_path(target);  // slow: it examines each directory of the path
  if (!real) return real.error();
  return *real == plain ? receipt() : receipt_of(cache, *real, now);
}

}  // namespace detail

// ================================================================================================== digest

namespace detail {

/// Computes an MD5 (RFC 1321) piece by piece. Does not use OpenSSL, whose FIPS configurations refuse MD5; as fast as OpenSSL.
class md5 {
 public:
  void update(std::string_view bytes) {
    length_ += bytes.size();
    if (held_ > 0) {
      const auto taken = (std::min)(bytes.size(), buffer_.size() - held_);
      std::memcpy(buffer_.data() + held_, bytes.data(), taken);
      held_ += taken;
      bytes.remove_prefix(taken);
      if (held_ < buffer_.size()) return;
      compress(state_, buffer_.data(), 1);
      held_ = 0;
    }
    const auto blocks = bytes.size() / buffer_.size();
    if (blocks > 0) compress(state_, bytes.data(), blocks);
    bytes.remove_prefix(blocks * buffer_.size());
    if (!bytes.empty()) std::memcpy(buffer_.data(), bytes.data(), bytes.size());
    held_ = bytes.size();
  }

  /// Returns the digest in 32 lower-case hex digits. Do not use the object afterwards.
  std::string finish() {
    const std::uint64_t bits = length_ * 8;
    std::string tail(1, '\x80');
    tail.append((buffer_.size() * 2 - 9 - held_) % buffer_.size(), '\0');
    for (int shift = 0; shift < 64; shift += 8) tail += static_cast<char>(bits >> shift & 0xff);
    update(tail);
    std::string digest;
    for (const auto word : state_) {
      for (int shift = 0; shift < 32; shift += 8) digest += static_cast<char>(word >> shift & 0xff);
    }
    return hex_encode(digest);
  }

 private:
  using words = std::array<std::uint32_t, 4>;

  // Optimised in debug builds, too: a verified download on a fast network spends most of its time here.
#if defined(__GNUC__) && !defined(__clang__) && !defined(__OPTIMIZE__)
  __attribute__((optimize("O2")))
#endif
  static void
  compress(words& state, const char* bytes, std::size_t blocks) {
    std::uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
    for (; blocks > 0; --blocks, bytes += 64) {
      std::uint32_t x[16];
      for (int i = 0; i < 16; ++i) {
        unsigned char byte[4];
        std::memcpy(byte, bytes + 4 * i, 4);
        x[i] = static_cast<std::uint32_t>(byte[0]) | static_cast<std::uint32_t>(byte[1]) << 8 |
               static_cast<std::uint32_t>(byte[2]) << 16 | static_cast<std::uint32_t>(byte[3]) << 24;
      }
      const auto a0 = a, b0 = b, c0 = c, d0 = d;
// One step of a round. The terms that depend on the previous step come last, which shortens the chain of dependent
// operations. G is (p & r) | (q & ~r); the two terms share no bit, so adding each to w equals adding G.
#define WANDB_RESTORE_PRIVATE_STEP(mix, w, p, q, r, k, s, t)                                                 \
  w += x[k] + t##u;                                                                                          \
  mix(w, p, q, r);                                                                                           \
  w = (w << s | w >> (32 - s)) + p;
#define WANDB_RESTORE_PRIVATE_F(w, p, q, r) w += r ^ (p & (q ^ r))
#define WANDB_RESTORE_PRIVATE_G(w, p, q, r) w += q & ~r, w += p & r
#define WANDB_RESTORE_PRIVATE_H(w, p, q, r) w += p ^ (q ^ r)
#define WANDB_RESTORE_PRIVATE_I(w, p, q, r) w += q ^ (p | ~r)
#define WANDB_RESTORE_PRIVATE_FOUR(mix, k0, s0, t0, k1, s1, t1, k2, s2, t2, k3, s3, t3)                      \
  WANDB_RESTORE_PRIVATE_STEP(mix, a, b, c, d, k0, s0, t0)                                                    \
  WANDB_RESTORE_PRIVATE_STEP(mix, d, a, b, c, k1, s1, t1)                                                    \
  WANDB_RESTORE_PRIVATE_STEP(mix, c, d, a, b, k2, s2, t2)                                                    \
  WANDB_RESTORE_PRIVATE_STEP(mix, b, c, d, a, k3, s3, t3)
      WANDB_RESTORE_PRIVATE_FOUR(WANDB_RESTORE_PRIVATE_F, 0, 7, 0xd76aa478, 1, 12, 0xe8c7b756, 2, 17,
                                 0x242070db, 3, 22, 0xc1bdceee)
      WANDB_RESTORE_PRIVATE_FOUR(WANDB_RESTORE_PRIVATE_F, 4, 7, 0xf57c0faf, 5, 12, 0x4787c62a, 6, 17,
                                 0xa8304613, 7, 22, 0xfd469501)
      WANDB_RESTORE_PRIVATE_FOUR(WANDB_RESTORE_PRIVATE_F, 8, 7, 0x698098d8, 9, 12, 0x8b44f7af, 10, 17,
                                 0xffff5bb1, 11, 22, 0x895cd7be)
      WANDB_RESTORE_PRIVATE_FOUR(WANDB_RESTORE_PRIVATE_F, 12, 7, 0x6b901122, 13, 12, 0xfd987193, 14, 17,
                                 0xa679438e, 15, 22, 0x49b40821)
      WANDB_RESTORE_PRIVATE_FOUR(WANDB_RESTORE_PRIVATE_G, 1, 5, 0xf61e2562, 6, 9, 0xc040b340, 11, 14,
                                 0x265e5a51, 0, 20, 0xe9b6c7aa)
      WANDB_RESTORE_PRIVATE_FOUR(WANDB_RESTORE_PRIVATE_G, 5, 5, 0xd62f105d, 10, 9, 0x02441453, 15, 14,
                                 0xd8a1e681, 4, 20, 0xe7d3fbc8)
      WANDB_RESTORE_PRIVATE_FOUR(WANDB_RESTORE_PRIVATE_G, 9, 5, 0x21e1cde6, 14, 9, 0xc33707d6, 3, 14,
                                 0xf4d50d87, 8, 20, 0x455a14ed)
      WANDB_RESTORE_PRIVATE_FOUR(WANDB_RESTORE_PRIVATE_G, 13, 5, 0xa9e3e905, 2, 9, 0xfcefa3f8, 7, 14,
                                 0x676f02d9, 12, 20, 0x8d2a4c8a)
      WANDB_RESTORE_PRIVATE_FOUR(WANDB_RESTORE_PRIVATE_H, 5, 4, 0xfffa3942, 8, 11, 0x8771f681, 11, 16,
                                 0x6d9d6122, 14, 23, 0xfde5380c)
      WANDB_RESTORE_PRIVATE_FOUR(WANDB_RESTORE_PRIVATE_H, 1, 4, 0xa4beea44, 4, 11, 0x4bdecfa9, 7, 16,
                                 0xf6bb4b60, 10, 23, 0xbebfbc70)
      WANDB_RESTORE_PRIVATE_FOUR(WANDB_RESTORE_PRIVATE_H, 13, 4, 0x289b7ec6, 0, 11, 0xeaa127fa, 3, 16,
                                 0xd4ef3085, 6, 23, 0x04881d05)
      WANDB_RESTORE_PRIVATE_FOUR(WANDB_RESTORE_PRIVATE_H, 9, 4, 0xd9d4d039, 12, 11, 0xe6db99e5, 15, 16,
                                 0x1fa27cf8, 2, 23, 0xc4ac5665)
      WANDB_RESTORE_PRIVATE_FOUR(WANDB_RESTORE_PRIVATE_I, 0, 6, 0xf4292244, 7, 10, 0x432aff97, 14, 15,
                                 0xab9423a7, 5, 21, 0xfc93a039)
      WANDB_RESTORE_PRIVATE_FOUR(WANDB_RESTORE_PRIVATE_I, 12, 6, 0x655b59c3, 3, 10, 0x8f0ccc92, 10, 15,
                                 0xffeff47d, 1, 21, 0x85845dd1)
      WANDB_RESTORE_PRIVATE_FOUR(WANDB_RESTORE_PRIVATE_I, 8, 6, 0x6fa87e4f, 15, 10, 0xfe2ce6e0, 6, 15,
                                 0xa3014314, 13, 21, 0x4e0811a1)
      WANDB_RESTORE_PRIVATE_FOUR(WANDB_RESTORE_PRIVATE_I, 4, 6, 0xf7537e82, 11, 10, 0xbd3af235, 2, 15,
                                 0x2ad7d2bb, 9, 21, 0xeb86d391)
#undef WANDB_RESTORE_PRIVATE_STEP
#undef WANDB_RESTORE_PRIVATE_F
#undef WANDB_RESTORE_PRIVATE_G
#undef WANDB_RESTORE_PRIVATE_H
#undef WANDB_RESTORE_PRIVATE_I
#undef WANDB_RESTORE_PRIVATE_FOUR
      a += a0, b += b0, c += c0, d += d0;
    }
    state = {a, b, c, d};
  }

  words state_ = {0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476};
  std::array<char, 64> buffer_{};
  std::size_t held_ = 0;
  std::uint64_t length_ = 0;
};

/// Returns the md5 of a whole file in hex; empty if the file cannot be read or the watcher returned false.
inline std::string md5_of_file(const file& opened, watcher go_on = {}) {
  md5 hash;
  page_buffer buffer;
  for (std::uint64_t offset = 0;;) {
    const auto count = opened.read_at(offset, buffer.data(), page_buffer::size);
    if (count < 0 || (go_on && !go_on(offset))) return {};
    if (count == 0) return hash.finish();
    hash.update({buffer.data(), static_cast<std::size_t>(count)});
    offset += static_cast<std::uint64_t>(count);
  }
}
inline std::string md5_of_file(const path& where, watcher go_on = {}) {
  file opened;
  return opened.open(where, file::mode::read) == 0 ? md5_of_file(opened, go_on) : std::string();
}

}  // namespace detail

// ====================================================================================== settings, resolved

namespace detail {

// ------------------------------------------------------------------------------------------ the environment

/// The value of an environment variable, in UTF-8 on Windows. An empty value counts as set.
inline std::optional<std::string> environment(const char* name) {
#ifdef _WIN32
  const wchar_t* wide = _wgetenv(std::wstring(name, name + std::strlen(name)).c_str());
  return wide ? std::optional<std::string>(utf8(path(wide))) : std::nullopt;
#else
  const char* value = std::getenv(name);
  return value ? std::optional<std::string>(value) : std::nullopt;
#endif
}

/// The value of the first of these variables that is set and not empty, else "".
inline std::string first_of_environment(std::initializer_list<const char*> names) {
  for (const char* name : names) {
    if (auto value = environment(name); value && !value->empty()) return *std::move(value);
  }
  return {};
}

/// The user's home directory, or an empty path if the environment does not name one.
inline path home_directory() {
#ifdef _WIN32
  if (auto profile = first_of_environment({"USERPROFILE"}); !profile.empty()) return from_utf8(profile);
  return from_utf8(first_of_environment({"HOMEDRIVE"}) + first_of_environment({"HOMEPATH"}));
#else
  return from_utf8(first_of_environment({"HOME"}));
#endif
}

/// Converts the text of a setting to a path. Replaces a leading "~" by the home directory.
inline path expand_home(std::string_view text) {
  const bool from_home = text == "~" || starts_with(text, "~/") ||
                         (path::preferred_separator == '\\' && starts_with(text, "~\\"));
  const path home = home_directory();
  if (!from_home || home.empty()) return from_utf8(text);
  return text.size() <= 2 ? home : home / from_utf8(text.substr(2));
}

/// A path below the home directory. Empty without a home directory: a relative path would be one in the working directory.
inline path in_home(std::string_view relative) {
  const path home = home_directory();
  return home.empty() ? path() : home / from_utf8(relative);
}

/// The SDK's cache directory: $WANDB_CACHE_DIR, else "wandb" in the platform's cache directory. Empty if there is none.
inline path wandb_cache_directory() {
  if (const auto chosen = first_of_environment({"WANDB_CACHE_DIR"}); !chosen.empty())
    return expand_home(chosen);
#if defined(_WIN32)
  const path base = from_utf8(first_of_environment({"LOCALAPPDATA"}));
#elif defined(__APPLE__)
  const path base = in_home("Library/Caches");
#else
  const auto chosen = first_of_environment({"XDG_CACHE_HOME"});
  const path base = chosen.empty() ? in_home(".cache") : from_utf8(chosen);
#endif
  return base.empty() ? base : base / "wandb";
}

// -------------------------------------------------------------------------------------------- plain checks

/// Checks the form of an API key: 40 characters or more, with an optional prefix and a dash in front; or a JWT. The error's
/// text does not contain the key.
/// Source: wandb/sdk/lib/wbauth/validation.py.
inline result<void> check_api_key(std::string_view key) {
  const auto fail = [](const std::string& why) {
    return error(errc::invalid_argument,
                 "the API key " + why +
                     "; copy it again from the page where it was made "
                     "(https://forge.coreweave.com/wandb/authorize for the public service)");
  };
  if (key.empty()) return fail("is empty");
  if (has_control(key)) return fail("has control characters");
  const auto parts = split(key, '.');
  bool is_jwt = parts.size() == 3;
  for (const auto part : parts) is_jwt = is_jwt && !part.empty() && is_plain(part);
  if (is_jwt) return {};
  const auto dash = key.find('-');
  const auto secret = dash == key.npos ? key : key.substr(dash + 1);
  if (!is_plain(secret)) return fail("has other characters than letters, digits, - and _");
  if (secret.size() < 40)
    return fail("has " + std::to_string(secret.size()) + " characters instead of 40 or more");
  return {};
}

/// The host names of a base URL's service. The first is the base URL's own.
inline std::vector<std::string> hosts_of(const url& base) {
  std::vector<std::string> hosts{base.host};
  if (const auto* deployment = forge_deployment_of(base.host)) {
    for (const auto host : {deployment->api_host, deployment->wandb_api_host}) {
      if (host != base.host) hosts.push_back(std::string(host));
    }
  }
  return hosts;
}
inline url with_host(url address, std::string_view host) {
  address.host = host;
  return address;
}

inline std::string without_final_slash(const url& address) {
  return address.origin() + (address.target == "/" ? std::string() : address.target);
}

/// The page where a user makes and copies an API key.
/// Source: api_to_app_url in wandb/util.py, _authorize_url in sdk/lib/wbauth/prompt.py.
inline std::string key_page(url base) {
  if (const auto* deployment = forge_deployment_of(base.host)) {
    return "https://" + std::string(deployment->web_host) + "/wandb/authorize";
  }
  if (starts_with(base.host, "api.")) base.host.replace(0, 3, "app");
  return without_final_slash(base) + "/authorize";
}

/// Whether credentials for the base URL may be sent to an address. It must have the base URL's scheme and port, one of the
/// names of the service's host, and the base URL's path as a prefix of whole segments. False for a path with a segment
/// "..", plain or percent-encoded: the server may resolve it to a path outside.
inline bool under_base(const url& base, const url& candidate) {
  if (!contains(hosts_of(base), candidate.host) ||
      with_host(base, candidate.host).origin() != candidate.origin())
    return false;
  const std::string target = candidate.target.substr(0, candidate.target.find('?'));
  auto plain = percent_decode(target);
  if (!plain) return false;
  *plain = replace_all(*plain, "\\", "/");
  for (const auto segment : split(*plain, '/')) {
    if (segment == "..") return false;
  }
  std::string_view prefix = base.target;
  while (!prefix.empty() && prefix.back() == '/') prefix.remove_suffix(1);
  return starts_with(target, prefix) && (target.size() == prefix.size() || target[prefix.size()] == '/');
}

/// Parses a base URL. Removes trailing slashes, and replaces https://forge.coreweave.com/api/wandb by the API's own host.
/// Source: wandb/sdk/lib/wbauth/host_url.py, sdk/lib/urls.py. Unlike the source, refuses URLs that could not be sent
/// unchanged, and http for every host of the public service.
inline result<url> parse_base_url(std::string_view text) {
  const auto fail = [&](std::string_view why) {
    return error(errc::invalid_argument, "cannot use the base URL " + in_quotes(redacted_address(text)) +
                                             " (WANDB_BASE_URL): " + std::string(why));
  };
  if (text.find('@') != text.npos) return fail("it has an @, but must not contain a user name or password");
  if (text.find_first_of("?#") != text.npos) return fail("it has a query or a fragment");
  if (text.find(' ') != text.npos) return fail("it has a space");
  auto parsed = url::parse(text);
  if (!parsed)
    return error(errc::invalid_argument,
                 std::string("the base URL (WANDB_BASE_URL) is malformed: ") + parsed.error().what());
  while (parsed->target.size() > 1 && parsed->target.back() == '/') parsed->target.pop_back();
  const std::string_view host = parsed->host;
  const auto* deployment = forge_deployment_of(host);
  const auto public_api =
      "https://" + std::string((deployment ? *deployment : forge_deployments[0]).api_host);
  if (deployment && host == deployment->web_host) {
    const auto rest = text.substr(text.find("://") + 3);
    const bool has_port = rest.substr(0, rest.find('/')).find(':') != rest.npos;
    if (parsed->scheme == "https" && !has_port && parsed->target == "/api/wandb")
      return url::parse(public_api);
    return fail("the API of this server is at " + public_api);
  }
  const bool on_wandb_ai =
      host == "wandb.ai" || (host.size() > 9 && host.substr(host.size() - 9) == ".wandb.ai");
  if (on_wandb_ai && host.find("api.") == host.npos) return fail("did you mean " + public_api + "?");
  if ((on_wandb_ai || deployment) && parsed->scheme != "https") {
    return fail("http is not secure, use " + public_api);
  }
  if (!under_base(*parsed, *parsed)) return fail("its path has a segment \"..\" or a malformed escape");
  return parsed;
}

inline bool is_one_of(std::string_view text, std::initializer_list<const char*> words) {
  for (const char* word : words) {
    if (equal_ignoring_case(text, word)) return true;
  }
  return false;
}

/// Parses seconds with an optional fraction; ignores digits after the third. Returns 0 for other texts. Not all standard
/// libraries have std::from_chars for double.
inline std::chrono::milliseconds parse_seconds(std::string_view text) {
  constexpr std::uint64_t max_seconds = 0xffffffff;
  text = trim(text);
  const auto dot = text.find('.');
  const auto seconds = to_number(text.substr(0, dot));
  std::string fraction(dot == text.npos ? "" : text.substr(dot + 1));
  for (const char c : fraction) {
    if (!is_digit(c)) return {};
  }
  fraction.resize(3, '0');
  const auto thousandths = to_number(fraction);
  if (!seconds || *seconds > max_seconds || !thousandths) return {};
  return std::chrono::milliseconds(static_cast<std::int64_t>(*seconds * 1000 + *thousandths));
}

/// Parses a JSON object whose values are strings. errc::invalid_argument for other texts.
inline result<text_map> parse_string_object(std::string_view text) {
  const auto parsed = parse_json(text);
  text_map strings;
  bool good = parsed->is_object();
  for (const auto& [name, value] : members(*parsed)) {
    good = good && value.is_string();
    strings[name] = text_of(value);
  }
  if (!good) return error(errc::invalid_argument, "expected a JSON object of strings");
  return strings;
}

/// Whether a header field is well-formed (RFC 9110, section 5). A line break in the value would begin another field.
inline bool is_header(std::string_view name, std::string_view value) {
  return is_token(name) && is_field_value(value);
}

// ------------------------------------------------------------------------------------------------- proxies

using ip_address = std::string;  // 16 bytes; IPv4 as ::ffff:a.b.c.d; empty: no address

inline constexpr std::string_view ipv4_prefix("\0\0\0\0\0\0\0\0\0\0\xff\xff", 12);
inline bool is_ipv4(const ip_address& address) { return starts_with(address, ipv4_prefix); }

/// Parses an IP address. Returns an empty one for other texts.
inline ip_address parse_ip(std::string_view text) {
  const std::string address(text);
  char bytes[16];
  if (::inet_pton(AF_INET, address.c_str(), bytes) == 1) return std::string(ipv4_prefix).append(bytes, 4);
  if (::inet_pton(AF_INET6, address.c_str(), bytes) == 1) return std::string(bytes, 16);
  return {};
}

/// Whether an address is in a network like "10.0.0.0/8" or "fd00::/8".
inline bool in_network(const ip_address& address, std::string_view network) {
  const auto slash = network.find('/');
  const auto base = parse_ip(network.substr(0, slash));
  auto bits = to_number(network.substr(slash + 1));
  if (base.empty() || !bits || is_ipv4(base) != is_ipv4(address) || *bits > (is_ipv4(base) ? 32u : 128u))
    return false;
  if (is_ipv4(base)) *bits += 96;
  for (std::size_t bit = 0; bit < *bits; ++bit) {
    if ((base[bit / 8] ^ address[bit / 8]) & (0x80 >> bit % 8)) return false;
  }
  return true;
}

/// Whether an entry of NO_PROXY covers a host. "example.com" covers the host and its subdomains, ".example.com" and
/// "*.example.com" only the subdomains, an IP address only itself. Each may be followed by a port.
/// Source: golang.org/x/net/http/httpproxy, which the SDK's core uses.
inline bool bypasses(std::string_view entry, const url& target) {
  if (entry == "*") return true;
  const auto address = parse_ip(target.host);
  if (entry.find('/') != entry.npos) return !address.empty() && in_network(address, entry);

  std::string_view host = entry, port;
  if (!entry.empty() && entry.front() == '[') {
    const auto end = (std::min)(entry.find(']'), entry.size());
    host = entry.substr(1, end - 1);
    port = entry.substr((std::min)(end + 1, entry.size()));
  } else if (const auto colon = entry.find(':'); colon != entry.npos && colon == entry.rfind(':')) {
    host = entry.substr(0, colon);
    port = entry.substr(colon);
  }
  if (!port.empty() &&
      (port.front() != ':' || to_number(port.substr(1)) != static_cast<unsigned>(target.port)))
    return false;
  if (const auto wanted = parse_ip(host); !wanted.empty()) return address == wanted;
  if (starts_with(host, "*.")) host.remove_prefix(1);
  if (host.empty() || !address.empty()) return false;
  const std::string_view name = target.host;
  if (equal_ignoring_case(name, host)) return true;
  const std::string suffix = (host.front() == '.' ? "" : ".") + std::string(host);
  return name.size() > suffix.size() && equal_ignoring_case(name.substr(name.size() - suffix.size()), suffix);
}

/// The URL of the proxy for requests to `target`, or "" for a direct connection.
inline std::string proxy_for(const settings& configuration, const url& target) {
  const auto& proxy = target.scheme == "https" ? configuration.https_proxy : configuration.http_proxy;
  if (proxy.url.empty()) return {};
  for (const auto entry : split(proxy.bypass, ',')) {
    if (!trim(entry).empty() && bypasses(trim(entry), target)) return {};
  }
  return proxy.url;
}

/// Parses the URL of an HTTP proxy; the scheme may be left out. errc::invalid_argument for other texts.
inline result<url> parse_proxy(std::string_view text) {
  const std::string address = (text.find("://") == text.npos ? "http://" : "") + std::string(text);
  auto parsed = url::parse(address);
  // An '@' behind the authority follows a password with an unescaped '/', '?' or '#', which would be taken for host and port.
  const auto authority_end =
      (std::min)(address.find_first_of("/?#", address.find("://") + 3), address.size());
  const bool is_whole = address.find('@', authority_end) == address.npos;
  if (parsed && parsed->scheme == "http" && is_whole) return parsed;
  // Do not show the text: it may hold a password.
  return error(errc::invalid_argument,
               "expected http://[user:password@]host:port, with /, ? and # in the password percent-encoded");
}

// --------------------------------------------------------------------------------------------------- netrc

/// The machine names to look up in a netrc file, by priority. `base_text`: the base URL as the user wrote it.
/// Source: wandb/sdk/lib/wbauth/wbnetrc.py, which looks up the host as written, then "default", then the service's wandb.ai
/// host. Unlike the source, also looks up other spellings and the service's other hosts.
inline std::vector<std::string> netrc_machines(std::string_view base_text, const url& base) {
  const auto authority = [](std::string_view address) {
    const auto start = address.find("://");
    if (start != address.npos) address.remove_prefix(start + 3);
    return std::string(address.substr(0, address.find('/')));
  };
  std::vector<std::string> machines{authority(base.origin()), "default"};
  const auto* deployment = forge_deployment_of(base.host);
  if (deployment == nullptr) {
    machines.insert(machines.begin(), authority(base_text));
    return machines;
  }
  if (url::parse(base_text).value_or(base).host == base.host)
    machines.insert(machines.begin(), authority(base_text));
  for (const auto& host : hosts_of(base)) {
    machines.push_back(authority(with_host(base, host).origin()));
    machines.push_back(host);
  }
  machines.push_back(std::string(deployment->web_host));
  return machines;
}

/// The API key in the netrc file for a server, or "". Appends a warning if the file cannot be read or parsed.
/// If `found_machine` is not null, stores the machine's name in it.
inline std::string api_key_from_netrc(const settings& configuration, const url& base,
                                      std::vector<std::string>& warnings,
                                      std::string* found_machine = nullptr) {
  const path& file = configuration.netrc_file;
  if (file.empty() || !facts_of(file).found()) return {};
  const auto text = read_small_file(file, 1 << 20);
  if (!text) {
    warnings.push_back(text.error().what());
    return {};
  }
  const auto passwords = parse_netrc(*text);
  if (!passwords) {
    warnings.push_back("the netrc file " + in_quotes(file) + " is not used: " + passwords.error().what());
    return {};
  }
  for (const auto& machine : netrc_machines(configuration.base_url, base)) {
    const std::string* const password = passwords->find(machine);
    if (!password) continue;
    if (trim(*password).empty()) {
      warnings.push_back("the netrc file " + in_quotes(file) + " has no password for " +
                         in_quotes(std::string_view(machine)));
    }
    if (found_machine) *found_machine = machine;
    return std::string(trim(*password));
  }
  return {};
}

// ------------------------------------------------------------------------------------ shared access tokens

/// A token that expires within this time is not used.
inline constexpr std::chrono::seconds token_margin{300};

struct access_token {
  std::string value;
  std::chrono::system_clock::time_point expires_at;
  std::chrono::seconds margin = token_margin;  // shorter for a token with a short life

  [[nodiscard]] bool lasts() const { return expires_at - std::chrono::system_clock::now() > margin; }
};

/// Converts "YYYY-MM-DD HH:MM:SS" (UTC) to seconds since 1970. Takes times after 2200 for the beginning of 2200: a
/// system_clock that counts nanoseconds ends in 2262.
inline std::optional<std::uint64_t> parse_utc(std::string_view text) {
  if (text.size() != 19 || text[4] != '-' || text[7] != '-' || text[10] != ' ' || text[13] != ':' ||
      text[16] != ':') {
    return std::nullopt;
  }
  constexpr std::uint64_t year_2200 = 7258118400;
  const auto seconds = utc_seconds({text.substr(0, 4), text.substr(5, 2), text.substr(8, 2),
                                    text.substr(11, 2), text.substr(14, 2), text.substr(17, 2)});
  return seconds ? (std::min)(*seconds, year_2200) : seconds;
}

inline std::string format_utc(std::chrono::system_clock::time_point time) {
  const std::time_t seconds = std::chrono::system_clock::to_time_t(time);
  std::tm parts{};
#ifdef _WIN32
  gmtime_s(&parts, &seconds);
#else
  gmtime_r(&seconds, &parts);
#endif
  std::array<char, 32> text{};
  return std::string(text.data(), std::strftime(text.data(), text.size(), "%Y-%m-%d %H:%M:%S", &parts));
}

/// The keys of a server in the file of shared tokens, by priority. `base_text`: the base URL as the user wrote it, which is
/// the SDK's key. For the public service: the base URL under each of its host names.
inline std::vector<std::string> shared_token_keys(std::string_view base_text, const url& base) {
  while (!base_text.empty() && base_text.back() == '/') base_text.remove_suffix(1);
  if (forge_deployment_of(base.host) == nullptr) return {std::string(base_text)};
  std::vector<std::string> keys;
  for (const auto& host : hosts_of(base)) keys.push_back(without_final_slash(with_host(base, host)));
  return keys;
}

/// Reads the file of access tokens that the SDK shares between processes: {"credentials": {base URL: token}}. The file is a
/// cache: a missing or malformed one counts as empty.
inline result<json_document> read_credentials(const path& credentials_file) {
  if (!facts_of(credentials_file).found()) return json_document();
  const auto text = read_small_file(credentials_file, 1 << 20);
  if (!text) return text.error();
  return parse_json(*text);
}

/// Reads a server's access token from that file. Returns an empty one if there is none or it expires within token_margin.
/// `base_url`: without a trailing slash. Source, also of the format: core/internal/api/credentials.go.
inline access_token read_shared_token(const path& credentials_file, const std::string& base_url,
                                      std::chrono::system_clock::time_point now) {
  const auto file = read_credentials(credentials_file);
  if (!file) return {};
  const json& entry = member(member(**file, "credentials"), base_url);
  const auto expires_at = parse_utc(text_of(member(entry, "expires_at")));
  auto value = text_of(member(entry, "access_token"));
  if (!expires_at || value.empty() || has_control(value)) return {};
  const std::chrono::system_clock::time_point end{std::chrono::seconds(*expires_at)};
  if (end - now <= token_margin) return {};
  return {std::move(value), end};
}

/// Adds a token to that file and keeps its other content. Replaces the file atomically; only its owner can read it.
inline result<void> write_shared_token(const path& credentials_file, const std::string& base_url,
                                       const access_token& token) {
  const auto file = read_credentials(credentials_file);
  if (!file) return file.error();
  json_object whole(0), tokens(1), entry(2);
  entry.add_text("access_token", token.value).add_text("expires_at", format_utc(token.expires_at));
  tokens.add(base_url, entry.str());
  for (const auto& [name, other] : members(member(**file, "credentials"))) {
    if (name != base_url) tokens.add(name, json_of(other, 2));
  }
  whole.add("credentials", tokens.str());
  for (const auto& [name, other] : members(**file)) {
    if (name != "credentials") whole.add(name, json_of(other, 1));
  }
  std::error_code failure;  // replace the target of a symbolic link, not the link
  const path target = std::filesystem::canonical(credentials_file, failure);
  return replace_small_file(failure ? credentials_file : target, whole.str() + "\n", 0600);
}

// --------------------------------------------------------------------- the sources of settings, by priority

/// The value of a setting and where it was found.
struct found_setting {
  std::string value;
  std::string source;  ///< the variable or the key, for messages
  bool in_file = false;
  std::string origin = {};  ///< of a settings file: key and file, for settings::shown

  explicit operator bool() const { return !value.empty(); }
};

/// Looks up settings in environment variables, then in the settings files of WANDB_DIR, of the working directory and of the
/// user, in this order.
class settings_sources {
 public:
  /// Records where the value of these members was found; spaces separate the names.
  void note(std::string_view members, const found_setting& found) const {
    if (found) note(members, found.origin.empty() ? found.source : found.origin);
  }
  void note(std::string_view members, const std::string& origin) const {
    for (const auto member : split(members, ' '))
      target_.sources.push_back({std::string(member), {}, origin});
  }

  explicit settings_sources(settings& target) : target_(target) {
    const auto config = first_of_environment({"WANDB_CONFIG_DIR"});
    load(config.empty() ? in_home(".config/wandb/settings") : expand_home(config) / "settings");
    wandb_directory = wandb_directory_in(expand_home(first_of_environment({"WANDB_DIR"})));
    // The SDK writes settings below WANDB_DIR, but reads only those below the working directory.
    const path sdk_file = wandb_directory_in({}) / "settings", own_file = wandb_directory / "settings";
    std::error_code failure;
    if (!std::filesystem::equivalent(sdk_file, own_file, failure)) load(sdk_file);
    load(own_file);
    load_sagemaker();
  }

  /// The directory of a project's runs, settings and resume file.
  path wandb_directory;
  /// The key that Amazon SageMaker passes to training jobs. Used only if there is no other key.
  std::string sagemaker_api_key;

  /// The value of the first variable that is set and not empty, else of the key in the settings files. Skips null names.
  found_setting find(const std::array<const char*, 3>& variables, const char* key = nullptr) const {
    for (const char* name : variables) {
      if (auto value = name ? variable(name) : std::nullopt; value && !value->empty())
        return {*std::move(value), name, false};
    }
    const std::string* const value = key ? files_.find(key) : nullptr;
    if (!value) return {};
    const std::string* const file = origins_.find(key);
    return {*value, "the setting " + std::string(key) + " of a settings file", true,
            std::string(key) + " in " + (file ? *file : std::string())};
  }
  /// As find, for the entity and the project. A variable that is set to an empty value counts as found.
  found_setting find_name(const char* name, const char* key) const {
    if (auto value = variable(name)) return {*std::move(value), name, false};
    return find({}, key);
  }
  /// Reports a value that cannot be used: as an error if it comes from the environment, as in the SDK; else as a warning.
  void reject(const found_setting& setting, const std::string& why) const {
    const std::string text =
        setting.source + " cannot be used: " + why;  // without the value: it may be secret
    if (setting.in_file) {
      target_.warnings.push_back(text);
    } else if (!target_.problem) {
      target_.problem = error(errc::invalid_argument, text);
    }
  }

 private:
  static path wandb_directory_in(const path& root) {
    std::error_code failure;
    return root / (std::filesystem::exists(root / ".wandb", failure) ? ".wandb" : "wandb");
  }
  std::optional<std::string> variable(const char* name) const {
    if (auto value = environment(name)) return value;
    // Hide the secret API key: netrc has priority over it.
    const auto* const secret = std::string_view(name) == "WANDB_API_KEY" ? nullptr : secrets_.find(name);
    return secret ? std::optional(*secret) : std::nullopt;
  }
  void load(const path& file) {
    if (file.empty() || !facts_of(file).found()) return;
    const auto text = read_small_file(file, 1 << 20);
    auto values = text ? parse_ini(*text) : result<text_map>(text.error());
    if (!values) {
      target_.warnings.push_back("the settings file " + in_quotes(file) +
                                 " is not used: " + values.error().what());
      return;
    }
    for (const auto& entry : *values) origins_[entry.first] = utf8(file);
    values->merge(files_);  // files loaded earlier have lower priority
    files_ = *std::move(values);
  }
  /// Reads the settings that SageMaker passes to training jobs. Source: wandb/integration/sagemaker. Unlike there, the
  /// environment has priority over secrets.env.
  void load_sagemaker() {
    const path hyperparameters = "/opt/ml/input/config/hyperparameters.json";
    const auto training = environment("SM_TRAINING_ENV");
    if (!training && !facts_of(hyperparameters).found()) return;
    if (const auto text = read_small_file("secrets.env", 1 << 20)) secrets_ = parse_key_values(*text);
    const auto file_text = read_small_file(hyperparameters, 1 << 20);
    for (const std::string& text : {file_text ? *file_text : std::string(), training.value_or("")}) {
      const auto parsed = parse_json(text);
      const json& entry = member(*parsed, "wandb_api_key");
      if (!entry.is_string()) continue;
      const std::string quoted = text_of(entry);
      std::string_view key = trim(quoted);
      while (!key.empty() && key.front() == '"')
        key.remove_prefix(1);  // hyperparameter searches quote the value twice
      while (!key.empty() && key.back() == '"') key.remove_suffix(1);
      sagemaker_api_key = trim(key);
    }
    const std::string* const secret = secrets_.find("WANDB_API_KEY");
    if (secret && sagemaker_api_key.empty()) sagemaker_api_key = *secret;
  }

  settings& target_;
  text_map files_, secrets_, origins_;  // origins_: the file of each key of files_
};

/// Finds entity, project and id of the default run.
inline void find_run(settings& s, const settings_sources& sources) {
  const auto entity = sources.find_name("WANDB_ENTITY", "entity");
  const auto project = sources.find_name("WANDB_PROJECT", "project");
  const auto run_id = sources.find({"WANDB_RUN_ID"}, "run_id");
  s.entity = strip(entity.value);
  s.project = strip(project.value);
  s.run_id = strip(run_id.value);
  sources.note("entity", entity);
  sources.note("project", project);
  sources.note("run_id", run_id);
  const path resume_file = sources.wandb_directory / "wandb-resume.json";
  if (!s.run_id.empty() || sources.find({"WANDB_RESUME"}, "resume").value != "auto" ||
      !facts_of(resume_file).found())
    return;
  const auto text = read_small_file(resume_file, 1 << 20);
  const auto resumed = parse_json(text ? *text : std::string());
  if (const json& id = member(*resumed, "run_id"); id.is_string()) {
    s.run_id = text_of(id);
    sources.note("run_id", "run_id in " + utf8(resume_file));
  } else {
    s.warnings.push_back("the resume file " + in_quotes(resume_file) + " has no run_id and is not used");
  }
}

/// Finds the credentials, by priority: a key in the environment, an identity token file, the key in netrc, the key of
/// SageMaker, the key in the settings files.
inline void find_credentials(settings& s, const settings_sources& sources) {
  s.netrc_file = expand_home(first_of_environment({"NETRC"}));
  if (!s.netrc_file.empty()) {
    sources.note("netrc_file", "NETRC");
  } else {
    const path dotted = in_home(".netrc"), windows = in_home("_netrc");
    const bool prefer_windows =
        !facts_of(dotted).found() && (facts_of(windows).found() || path::preferred_separator == '\\');
    s.netrc_file = prefer_windows ? windows : dotted;
  }
  const auto credentials = sources.find({"WANDB_CREDENTIALS_FILE"}, "credentials_file");
  s.credentials_file =
      credentials ? expand_home(credentials.value) : in_home(".config/wandb/credentials.json");
  sources.note("credentials_file", credentials);
  const auto token_file = sources.find({"WANDB_IDENTITY_TOKEN_FILE"});
  s.identity_token_file = token_file.value;
  sources.note("identity_token_file", token_file);
  auto key = sources.find({"WANDB_API_KEY"});
  key.value = trim(std::exchange(key.value, {}));
  s.api_key = key.value;
  sources.note("api_key", key);
  if (key && !s.identity_token_file.empty()) {
    sources.reject(key, "WANDB_IDENTITY_TOKEN_FILE is set too; unset one of them");
  } else if (const auto checked = check_api_key(s.api_key); key && !checked) {
    sources.reject(key, checked.error().what());
  }
  if (key || !s.identity_token_file.empty()) return;

  const found_setting last_resort = sources.sagemaker_api_key.empty()
                                        ? sources.find({}, "api_key")
                                        : found_setting{sources.sagemaker_api_key, "Amazon SageMaker", true};
  if (!last_resort) return;
  const auto base = parse_base_url(s.base_url);
  std::vector<std::string> ignored;  // the session reads netrc again and reports them
  if (base && !api_key_from_netrc(s, *base, ignored).empty()) return;
  s.api_key = trim(last_resort.value);
  sources.note("api_key", last_resort);
}

// Functions for the table below: each writes a value to the settings, or returns false if the value cannot be used.

inline bool use_mode(settings& target, const std::string& mode) {
  target.offline = mode == "offline" || mode == "dryrun" || mode == "disabled";
  return target.offline || mode == "online" || mode == "run" || mode == "shared";
}
inline bool use_timeout(settings& target, const std::string& seconds) {
  const auto time = parse_seconds(seconds);
  if (time.count() <= 0) return false;
  target.connect_timeout = target.idle_timeout = time;
  target.retry_timeout = time * 10;
  return true;
}
inline bool use_extra_headers(settings& target, const std::string& object) {
  const auto strings = parse_string_object(object);
  http_headers headers;
  for (const auto& [name, value] : *strings) {
    if (!is_header(name, value)) return false;
    add_header(headers, name, value);
  }
  target.extra_headers = std::move(headers);
  return strings.has_value();
}
inline bool use_insecure(settings& target, const std::string& value) {
  target.verify_tls = !is_one_of(value, {"y", "yes", "t", "true", "on", "1"});
  return !target.verify_tls || is_one_of(value, {"n", "no", "f", "false", "off", "0"});
}

/// A setting and its sources: the first variable that is set and not empty, else the key in the settings files. README.md
/// has the same table for users. Settings that depend on others have functions of their own.
struct setting_rule {
  const char* members;  // of `settings`, for settings::shown
  std::array<const char*, 3> variables;
  const char* file_key;
  std::string settings::*text;  // the field that stores the value unchanged; null: `use` is called
  bool (*use)(settings& target, const std::string& value) = nullptr;
  const char* expected = "";  // for the message if `use` refuses the value
};
inline constexpr setting_rule setting_rules[] = {
    {"base_url", {"WANDB_BASE_URL"}, "base_url", &settings::base_url},
    {"username", {"WANDB_USERNAME"}, "username", &settings::username},
    {"user_email", {"WANDB_USER_EMAIL"}, "email", &settings::user_email},
    {"offline",
     {"WANDB_MODE"},
     "mode",
     nullptr,
     use_mode,
     "expected online, offline, dryrun, disabled, run or shared"},
    {"connect_timeout idle_timeout retry_timeout",
     {"WANDB_HTTP_TIMEOUT", "WANDB_X_GRAPHQL_TIMEOUT_SECONDS", "WANDB__GRAPHQL_TIMEOUT_SECONDS"},
     "x_graphql_timeout_seconds",
     nullptr,
     use_timeout,
     "expected a number of seconds, more than 0"},
    {"extra_headers",
     {"WANDB_X_EXTRA_HTTP_HEADERS", "WANDB__EXTRA_HTTP_HEADERS"},
     "x_extra_http_headers",
     nullptr,
     use_extra_headers,
     R"(expected a JSON object of header names and values, like {"X-Team": "blue"})"},
    {"verify_tls",
     {"WANDB_INSECURE_DISABLE_SSL"},
     "insecure_disable_ssl",
     nullptr,
     use_insecure,
     "expected true or false"},
};

/// The system's CA bundle, or an empty path if there is none. On some systems OpenSSL finds no certificate in the system's
/// directory, because the directory has no hash links.
/// Source: Go, crypto/x509/root_linux.go and root_bsd.go.
inline path system_bundle() {
  for (const char* const file : {"/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt",
                                 "/etc/ssl/ca-bundle.pem", "/etc/pki/tls/cacert.pem",
                                 "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem", "/etc/ssl/cert.pem"}) {
    if (facts_of(file)->is_file) return file;
  }
  return {};
}

/// Finds the CA certificates. SSL_CERT_FILE and SSL_CERT_DIR are those of OpenSSL and of the SDK's core; if only
/// SSL_CERT_FILE is set, the system's directory is used, too; if only SSL_CERT_DIR is set, the system's directory and
/// bundle are. If neither is set, REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE names a file or a directory that replaces the
/// system's certificates.
inline void find_certificates(settings& s, const settings_sources& sources) {
  s.ca_file = from_utf8(first_of_environment({"SSL_CERT_FILE"}));
  s.ca_directory = from_utf8(first_of_environment({"SSL_CERT_DIR"}));
  if (!s.ca_file.empty()) sources.note("ca_file", "SSL_CERT_FILE");
  if (!s.ca_directory.empty()) sources.note("ca_directory", "SSL_CERT_DIR");
  if (s.ca_file.empty() != s.ca_directory.empty()) {
    for (const char* const directory : {"/etc/ssl/certs", "/etc/pki/tls/certs"}) {
      if (!facts_of(directory)->is_directory) continue;
      if (!s.ca_directory.empty()) s.ca_directory += ":";
      s.ca_directory += directory;
      break;
    }
  }
  if (s.ca_file.empty() && !s.ca_directory.empty()) s.ca_file = system_bundle();
  const path bundle = expand_home(first_of_environment({"REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"}));
  if (s.ca_file.empty() && s.ca_directory.empty() && !bundle.empty()) {
    const bool is_directory = facts_of(bundle)->is_directory;
    (is_directory ? s.ca_directory : s.ca_file) = bundle;
    const char* const first = "REQUESTS_CA_BUNDLE";
    sources.note(is_directory ? "ca_directory" : "ca_file",
                 first_of_environment({first}).empty() ? "CURL_CA_BUNDLE" : first);
  }
}

/// Finds the proxy for one scheme: WANDB__PROXIES, then WANDB_<SCHEME>_PROXY, then <SCHEME>_PROXY. NO_PROXY and the
/// exemption of loopback addresses apply to the last alone.
inline proxy_settings find_proxy(settings& s, const settings_sources& sources, bool tls) {
  found_setting chosen =
      sources.find({tls ? "WANDB_HTTPS_PROXY" : "WANDB_HTTP_PROXY"}, tls ? "https_proxy" : "http_proxy");
  if (auto legacy = sources.find({"WANDB__PROXIES"})) {
    if (const auto proxies = parse_string_object(legacy.value)) {
      for (const auto& [scheme, address] : *proxies) {
        if (scheme == (tls ? "https" : "http") && !address.empty()) chosen = {address, legacy.source, false};
      }
    } else {
      sources.reject(legacy, R"(expected a JSON object, like {"https": "http://proxy:3128"})");
    }
  }
  std::string bypass;
  if (!chosen) {
    for (const char* name : {tls ? "HTTPS_PROXY" : "HTTP_PROXY", tls ? "https_proxy" : "http_proxy"})
      if (!chosen) chosen = {first_of_environment({name}), name, false};
    if (!tls && chosen && !first_of_environment({"REQUEST_METHOD"}).empty()) {
      // In a CGI program HTTP_PROXY holds the Proxy header of the client's request: https://httpoxy.org. Go refuses both
      // spellings, and so does the SDK.
      s.warnings.push_back(chosen.source + " is not used in a CGI program");
      return {};
    }
    bypass = first_of_environment({"NO_PROXY", "no_proxy"}) + ",localhost,127.0.0.0/8,::1";
  }
  if (!chosen) return {};
  const auto address = parse_proxy(chosen.value);
  if (!address) {
    const auto base = parse_base_url(s.base_url);
    // Redirects from https to http are refused: with an https base URL this proxy is never used, so only warn.
    chosen.in_file = chosen.in_file || (!tls && base && base->scheme == "https");
    sources.reject(chosen, std::string(address.error().what()) + " (other kinds of proxy are not supported)");
    return {};
  }
  sources.note(tls ? "https_proxy" : "http_proxy", chosen);
  const std::string user = address->user_info.empty() ? "" : address->user_info + "@";
  return {"http://" + user + address->origin().substr(7), std::move(bypass)};
}

/// Every setting with its value as text; of secrets only "(set)". Leaves the sources empty.
inline std::vector<shown_setting> texts_of(const settings& s) {
  std::vector<shown_setting> all;
  const auto add = [&all](const char* name, std::string value) {
    all.push_back({name, std::move(value), {}});
  };
  const auto seconds = [](std::chrono::milliseconds time) {
    std::string text = std::to_string(time.count() / 1000);
    if (time.count() % 1000 != 0) text += '.' + std::to_string(time.count() % 1000 + 1000).substr(1);
    while (text.find('.') != text.npos && text.back() == '0') text.pop_back();
    return text + " s";
  };
  const auto proxy = [](const proxy_settings& one) {
    const std::string text = redacted_address(one.url);
    std::string_view bypass = one.bypass;
    while (!bypass.empty() && bypass.front() == ',') bypass.remove_prefix(1);
    return bypass.empty() || text.empty() ? text : text + " except " + std::string(bypass);
  };
  std::string headers;
  for (const auto& field : s.extra_headers)
    headers += (headers.empty() ? "" : ", ") + field.first + ": (set)";
  add("base_url", redacted_address(s.base_url));
  add("api_key", s.api_key.empty() ? "" : "(set)");
  add("identity_token_file", is_jwt(s.identity_token_file) ? "(set)" : s.identity_token_file);
  add("credentials_file", utf8(s.credentials_file));
  add("netrc_file", utf8(s.netrc_file));
  add("entity", s.entity);
  add("project", s.project);
  add("run_id", s.run_id);
  add("run_dir", utf8(s.run_dir));
  add("cache_dir", utf8(s.cache_dir));
  add("offline", s.offline ? "true" : "false");
  add("connect_timeout", seconds(s.connect_timeout));
  add("idle_timeout", seconds(s.idle_timeout));
  add("low_speed", std::to_string(s.low_speed) + " bytes/s");
  add("retry_timeout", seconds(s.retry_timeout));
  add("total_timeout", s.total_timeout.count() == 0 ? std::string() : seconds(s.total_timeout));
  add("http_proxy", proxy(s.http_proxy));
  add("https_proxy", proxy(s.https_proxy));
  add("ca_file", utf8(s.ca_file));
  add("ca_directory", utf8(s.ca_directory));
  add("verify_tls", s.verify_tls ? "true" : "false");
  add("extra_headers", headers);
  add("username", s.username);
  add("user_email", s.user_email);
  add("user_agent", s.user_agent);
  return all;
}

inline const shown_setting* find_setting(const std::vector<shown_setting>& all, const std::string& name) {
  for (const auto& each : all) {
    if (each.name == name) return &each;
  }
  return nullptr;
}

}  // namespace detail

WANDB_RESTORE_PRIVATE_INLINE settings settings::from_environment() {
  settings s;
  const detail::settings_sources sources(s);
  for (const auto& rule : detail::setting_rules) {
    const auto found = sources.find(rule.variables, rule.file_key);
    if (!found) continue;
    if (rule.text) {
      s.*rule.text = found.value;
    } else if (!rule.use(s, found.value)) {
      sources.reject(found, rule.expected);
      continue;
    }
    sources.note(rule.members, found);
  }
  detail::find_run(s, sources);
  detail::find_credentials(s, sources);
  detail::find_certificates(s, sources);
  const auto cache = detail::wandb_cache_directory();
  s.cache_dir = cache.empty() ? cache : cache / "restore";
  if (!detail::first_of_environment({"WANDB_CACHE_DIR"}).empty())
    sources.note("cache_dir", "WANDB_CACHE_DIR");
  s.http_proxy = detail::find_proxy(s, sources, false);
  s.https_proxy = detail::find_proxy(s, sources, true);

  const auto texts = detail::texts_of(s);
  for (const auto& each : texts) {
    if (!detail::find_setting(s.sources, each.name)) s.sources.push_back({each.name, {}, "default"});
  }
  for (auto& each : s.sources) each.value = detail::find_setting(texts, each.name)->value;
  return s;
}

WANDB_RESTORE_PRIVATE_INLINE std::vector<shown_setting> settings::shown() const {
  auto all = detail::texts_of(*this);
  const auto defaults = detail::texts_of(settings());
  for (std::size_t i = 0; i < all.size(); ++i) {
    const auto* const found = detail::find_setting(sources, all[i].name);
    const bool is_default = !found && all[i].value == defaults[i].value;
    all[i].source = found && found->value == all[i].value ? found->source
                    : is_default                          ? "default"
                                                          : "program";
    if (all[i].name != "api_key" || !api_key.empty() || !identity_token_file.empty()) continue;
    std::vector<std::string> ignored;  // the first request reports them
    std::string machine;
    const auto base = detail::parse_base_url(base_url);
    if (!base || detail::api_key_from_netrc(*this, *base, ignored, &machine).empty()) continue;
    all[i].value = "(set)";
    all[i].source = "netrc entry " + machine + " in " + detail::utf8(netrc_file);
  }
  return all;
}

// ================================================================================================ exchange

namespace detail {

using clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

inline std::string seconds_text(milliseconds time) {
  std::array<char, 32> text{};
  static_cast<void>(
      std::snprintf(text.data(), text.size(), "%g s", static_cast<double>(time.count()) / 1000));
  return text.data();
}

/// A copy of a failure with another text.
inline error with_text(const error& failure, const std::string& text) {
  error whole(failure.code(), text, failure.http_status());
  if (!failure.is_transient()) whole = error::permanent(failure.code(), text, failure.http_status());
  whole.retry_after(failure.retry_after());
  return whole;
}

/// The state of one call by the user: cancellation, total_timeout, and whether any server was reached. Thread-safe.
class call {
 public:
  call(const settings& configuration, const std::atomic<bool>* cancel)
      : config(configuration), cancel_(cancel), began_(clock::now()) {}
  /// Makes a part of another call. It is cancelled with that call, or by a flag of its own.
  call(const call& outer, const std::atomic<bool>& cancel)
      : config(outer.config), outer_(&outer), cancel_(&cancel), began_(outer.began_) {}

  const settings& config;

  /// Reports that a server has accepted a connection or answered, also to the call that this one is a part of.
  void set_reached() const {
    for (const call* each = this; each != nullptr; each = each->outer_) each->reached_ = true;
  }
  [[nodiscard]] bool has_reached() const { return reached_ || (outer_ != nullptr && outer_->has_reached()); }
  [[nodiscard]] bool cancelled() const {
    return stopped_ || (cancel_ != nullptr && cancel_->load(std::memory_order_relaxed)) || out_of_time() ||
           (outer_ != nullptr && outer_->cancelled());
  }
  void stop() { stopped_ = true; }
  [[nodiscard]] error why_cancelled() const {
    if (!stopped_ && out_of_time()) {
      return error::permanent(errc::connection_failed,
                              "not done within " + seconds_text(config.total_timeout) +
                                  " (total_timeout): raise the limit, or call again to resume");
    }
    return error(errc::cancelled, "cancelled");
  }
  /// Blocks for this time. Returns false, at once, if the call is cancelled.
  [[nodiscard]] bool sleep(milliseconds time) const {
    for (const auto end = clock::now() + time; !cancelled();) {
      const auto left = std::chrono::duration_cast<milliseconds>(end - clock::now());
      if (left.count() <= 0) return true;
      pause_thread(static_cast<int>((std::min<std::int64_t>)(left.count(), 20)));
    }
    return false;
  }

 private:
  [[nodiscard]] bool out_of_time() const {
    return config.total_timeout.count() > 0 && clock::now() - began_ > config.total_timeout;
  }
  const call* outer_ = nullptr;
  const std::atomic<bool>* cancel_;
  std::atomic<bool> stopped_{false};
  mutable std::atomic<bool> reached_{false};
  clock::time_point began_;
};

/// Measures the time since the last progress. Retries end if it exceeds the limit: settings::retry_timeout, or
/// connect_timeout while no server was reached. A transfer has one clock for all of its connections. Thread-safe.
class retry_clock {
 public:
  explicit retry_clock(const call& user_call) : call_(user_call) {}

  /// Counts bytes that arrived. Restarts the clock if `low_speed` bytes a second have arrived since it started. Otherwise a
  /// transfer that gains a few bytes with each try would be tried for ever.
  void progressed(std::uint64_t bytes) {
    const std::lock_guard<std::mutex> guard(mutex_);
    arrived_ += bytes;
    const double seconds = std::chrono::duration<double>(clock::now() - since_).count();
    if (bytes == 0 || static_cast<double>(arrived_) < static_cast<double>(call_.config.low_speed) * seconds)
      return;
    since_ = clock::now();
    arrived_ = 0;
    failures_ = 0;
    last_failure_.reset();
  }
  /// Counts a failure. Returns the time left for another try, or, if no time is left, the error to give up with.
  result<milliseconds> failed(const error& failure) {
    const std::lock_guard<std::mutex> guard(mutex_);
    ++failures_;
    last_failure_ = failure;
    const milliseconds left = limit() - spent();
    if (failure.retry_after() < left) return left;
    return gave_up(failure);
  }
  /// Whether the limit is exceeded.
  [[nodiscard]] bool is_over() const {
    const std::lock_guard<std::mutex> guard(mutex_);
    return spent() >= limit();
  }
  /// Returns the error to give up with if the time is used up and the last try failed.
  [[nodiscard]] std::optional<error> expired() const {
    const std::lock_guard<std::mutex> guard(mutex_);
    if (!last_failure_ || spent() < limit()) return std::nullopt;
    return gave_up(*last_failure_);
  }

 private:
  [[nodiscard]] milliseconds limit() const {
    return call_.has_reached() ? call_.config.retry_timeout : call_.config.connect_timeout;
  }
  [[nodiscard]] milliseconds spent() const {
    return std::chrono::duration_cast<milliseconds>(clock::now() - since_);
  }
  [[nodiscard]] error gave_up(const error& failure) const {
    std::string text = failure.what();
    if (failure.retry_after().count() > 0)
      text += "; the server asks to wait " + seconds_text(failure.retry_after());
    text += " (gave up after " + std::to_string(failures_) + (failures_ == 1 ? " try in " : " tries in ") +
            seconds_text(spent()) + "; the limit without progress is " + seconds_text(limit()) + ")";
    text += failure.code() == errc::connection_failed ? ": check the network, WANDB_BASE_URL and HTTPS_PROXY"
                                                      : ": try again later";
    return with_text(failure, text);
  }

  const call& call_;
  mutable std::mutex mutex_;  // guards the rest
  int failures_ = 0;          // since `since_`
  std::optional<error> last_failure_;
  std::uint64_t arrived_ = 0;               // bytes since `since_`
  clock::time_point since_ = clock::now();  // the last progress
};

/// Computes the wait before each retry: exponential backoff with full jitter, at least the server's Retry-After.
class backoff {
 public:
  /// Several connections may share the clock.
  backoff(const call& user_call, retry_clock& time) : call_(user_call), clock_(time) {}

  /// Returns true if the next try needs no wait: the failure is transient, this try received at least one block (`gained`
  /// bytes), and the limit of the clock is not exceeded. If true, the next wait will be the shortest one.
  bool retries_at_once(const error& failure, std::uint64_t gained) {
    if (!failure.is_transient() || gained < partial_file::block || clock_.is_over()) return false;
    tries_ = 0;
    return true;
  }
  /// Returns the number of failures since the last reset.
  [[nodiscard]] int failures() const { return tries_; }
  /// Returns the wait before the next try, or, if there shall be none, the error to give up with.
  [[nodiscard]] result<milliseconds> after(const error& failure) {
    if (call_.cancelled()) return call_.why_cancelled();
    if (!failure.is_transient()) return failure;
    const auto left = clock_.failed(failure);
    const milliseconds ceiling((std::min)(30000, 500 << (std::min)(tries_++, 6)));
    if (!left) return left;
    return (std::max)((std::min)(jitter(ceiling), *left), failure.retry_after());
  }
  /// Waits for the next try. Returns the error to give up with if there shall be none.
  [[nodiscard]] std::optional<error> wait_after(const error& failure) {
    const auto wait = after(failure);
    if (!wait) return wait.error();
    if (!call_.sleep(*wait)) return call_.why_cancelled();
    return std::nullopt;
  }

 private:
  static milliseconds jitter(milliseconds ceiling) {
    return milliseconds(unique_number() % static_cast<std::uint64_t>(ceiling.count() + 1));
  }
  const call& call_;
  retry_clock& clock_;
  int tries_ = 0;
};

/// Parses Retry-After: seconds or a date (RFC 9110, section 10.2.3). Rounds fractions up; returns 0 for a past date.
inline milliseconds parse_retry_after(const http_response& head) {
  const std::string* field = head.header("Retry-After");
  if (field == nullptr) return milliseconds(0);
  const auto text = trim(*field);
  if (const auto date = parse_http_date(text)) {
    const auto now = std::chrono::system_clock::to_time_t(std::chrono::system_clock::now());
    return milliseconds((std::max<std::int64_t>)(0, static_cast<std::int64_t>(*date) - now) * 1000);
  }
  const auto whole = to_number(text.substr(0, text.find('.')));
  if (!whole) return {};
  const auto seconds = (std::min<std::uint64_t>)(*whole, 86400) + (text.find('.') < text.size() ? 1 : 0);
  return std::chrono::seconds(static_cast<std::int64_t>(seconds));
}

/// The last response after all redirects.
struct answer {
  http_response head;
  std::string body;  // the beginning of a body that was not streamed
};

/// Returns the Content-Encoding of a response, for a message. Empty if there is none: requests accept identity only.
inline std::string unwanted_coding(const http_response& head) {
  const std::string* coding = head.header("Content-Encoding");
  if (coding == nullptr || trim(*coding).empty() || equal_ignoring_case(trim(*coding), "identity")) return {};
  return "its Content-Encoding is " + in_quotes(*coding) +
         ", although the request accepts identity only: a proxy may be compressing";
}

/// How many bytes of a body a message may describe.
inline constexpr std::size_t max_described = 2048;

/// Checks a response before its body reaches the destination. Bounds the head, ends a transfer that is too slow, and
/// streams only bodies of status 200 and 206 to the destination; keeps the beginning of other bodies.
class guarded_sink final : public body_sink {
 public:
  static constexpr std::size_t max_fields = 200, max_error_body = 16 * 1024;

  /// `label` names the request in messages.
  guarded_sink(call& user_call, body_sink& destination, std::string label)
      : call_(user_call), destination_(destination), label_(std::move(label)), since_(clock::now()) {}

  void connected() override { call_.set_reached(); }
  bool start(const http_response& head) override { return go_on_ = begin(head); }
  bool write(std::string_view bytes) override { return go_on_ = go_on_ && take(bytes); }
  /// Whether the transport was told to stop. The body is then incomplete, even if the transport reports success.
  [[nodiscard]] bool said_stop() const { return !go_on_; }

  /// For http_request::is_cancelled. Returns true if the call is cancelled or the peer is too slow.
  bool cancelled() {
    if (slow_ || call_.cancelled()) return true;
    const std::lock_guard<std::mutex> guard(mutex_);
    if (is_writing_) return false;  // a transport may ask from a thread of its own
    const auto now = clock::now();
    const auto span = std::chrono::duration_cast<milliseconds>(now - since_);
    const auto allowed =
        call_.config.idle_timeout + (started_ ? milliseconds(0) : call_.config.connect_timeout);
    if (span < allowed) return false;
    const auto minimum = call_.config.low_speed * static_cast<std::uint64_t>(span.count()) / 1000;
    slow_ = slow_ || !started_ || window_bytes_ < minimum;
    since_ = now;
    window_bytes_ = 0;
    return slow_;
  }

  /// Returns the cause of a transport's failure. Returns nothing if the response is usable without the rest of its body: an
  /// error or a redirect.
  [[nodiscard]] std::optional<error> verdict(const error& failure) const {
    if (refused_) return refused_;
    if (call_.cancelled()) return call_.why_cancelled();
    if (head_.status != 0 && !streamed_) return std::nullopt;
    if (slow_) {
      return error(errc::connection_failed,
                   label_ + (started_ ? ": sent less than " + readable_bytes(call_.config.low_speed) +
                                            " a second for " + seconds_text(call_.config.idle_timeout)
                                      : std::string(": no answer in time")));
    }
    return failure;
  }
  [[nodiscard]] const http_response& head() const { return head_; }
  [[nodiscard]] std::string take_body() { return std::move(kept_); }

 private:
  bool begin(const http_response& head) {
    connected();
    {
      const std::lock_guard<std::mutex> guard(mutex_);
      started_ = true;  // the pace of the body does not include the wait for the head
      since_ = clock::now();
      window_bytes_ = 0;
    }
    std::size_t size = 0;
    for (const auto& field : head.headers) size += field.first.size() + field.second.size() + 4;
    if (head.headers.size() > max_fields || size > max_head_bytes) return refuse("its header is too large");
    head_ = head;
    streamed_ = head.status == 200 || head.status == 206;
    return !streamed_ || destination_.start(head);
  }

  bool take(std::string_view bytes) {
    {
      const std::lock_guard<std::mutex> guard(mutex_);
      window_bytes_ += bytes.size();
    }
    if (cancelled()) return false;
    if (streamed_) {
      const auto before = clock::now();
      is_writing_ = true;
      const bool more = destination_.write(bytes);
      const std::lock_guard<std::mutex> guard(mutex_);
      since_ += clock::now() - before;  // a slow disk does not make the peer slow
      is_writing_ = false;
      return more;
    }
    kept_.append(bytes.substr(0, max_error_body - kept_.size()));
    return kept_.size() < max_error_body;
  }

  bool refuse(const std::string& why) {
    refused_ = error(errc::protocol_violation, label_ + ": cannot use the answer: " + why);
    return false;
  }
  call& call_;
  body_sink& destination_;
  std::string label_;
  http_response head_;
  std::string kept_;
  std::optional<error> refused_;
  std::atomic<bool> started_{false}, slow_{false}, is_writing_{false};
  bool streamed_ = false;
  bool go_on_ = true;
  std::mutex mutex_;
  clock::time_point since_;
  std::uint64_t window_bytes_ = 0;
};

/// Collects a body of at most `limit` bytes in memory, if it has no Content-Encoding.
class collecting_sink final : public body_sink {
 public:
  explicit collecting_sink(std::size_t limit) : limit_(limit) {}
  bool start(const http_response& head) override {
    problem = unwanted_coding(head);
    return problem.empty();
  }
  bool write(std::string_view bytes) override {
    if (text.size() + bytes.size() > limit_) {
      problem = "it is longer than " + readable_bytes(limit_);
      return false;
    }
    text.append(bytes);
    return true;
  }
  std::string text;
  std::string problem;  // why the answer cannot be used, for a message; empty if it can

 private:
  std::size_t limit_;
};

/// Whether a name is the domain `suffix`, which begins with a dot, or is below that domain.
inline bool is_below(std::string_view name, std::string_view suffix) {
  if (name == suffix.substr(1)) return true;
  return name.size() > suffix.size() && name.substr(name.size() - suffix.size()) == suffix;
}
inline bool in_any_network(const ip_address& address, std::initializer_list<const char*> networks) {
  return std::any_of(networks.begin(), networks.end(),
                     [&](const char* network) { return in_network(address, network); });
}
/// A host without the dot at the end of a name or the zone of an IPv6 address.
inline std::string_view plain_host(std::string_view host) {
  host = host.substr(0, host.find('%'));
  return host.substr(0, host.find_last_not_of('.') + 1);
}

/// Whether a host is certainly this machine (loopback), or on its network link (link-local; the metadata services of clouds
/// are there). Addresses in forms that only resolvers understand count, too: "127.1", "0x7f000001".
inline bool is_this_machine_or_link(std::string_view host) {
  host = plain_host(host);
  if (is_below(host, ".localhost")) return true;
  const auto address = parse_ip(host);
  if (!address.empty())
    return in_any_network(address, {"127.0.0.0/8", "169.254.0.0/16", "0.0.0.0/8", "::/96", "fe80::/10"});
  const auto last_label = host.substr(host.rfind('.') + 1);
  return !last_label.empty() && is_digit(last_label[0]) && host.find(':') == host.npos &&
         to_number(last_label.substr(starts_with(last_label, "0x") ? 2 : 0), 16).has_value();
}

/// Whether a host is on the public internet, as far as its text tells: neither an address of a private network, nor a name
/// without a dot or with an ending for private use (RFC 6761, 6762, 8375).
inline bool is_public(std::string_view host) {
  if (is_this_machine_or_link(host)) return false;
  host = plain_host(host);
  const auto address = parse_ip(host);
  if (!address.empty()) {
    return !in_any_network(address,
                           {"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7"});
  }
  if (host.find('.') == host.npos) return false;
  for (const char* suffix : {".local", ".internal", ".lan", ".home.arpa", ".test", ".invalid"}) {
    if (is_below(host, suffix)) return false;
  }
  return true;
}

inline bool is_redirect(int status) {
  return status == 301 || status == 302 || status == 303 || status == 307 || status == 308;
}

/// Appends to the path of the base URL. `suffix` begins with a slash.
inline url join_path(url base, std::string_view suffix) {
  if (base.target == "/") base.target.clear();
  base.target += suffix;
  return base;
}

/// Limits all durations to a year: `milliseconds::max()` would overflow when it is added to a time point.
inline settings with_bounded_times(settings configuration) {
  constexpr std::chrono::seconds year(365 * 86400);
  for (auto* time : {&configuration.connect_timeout, &configuration.idle_timeout,
                     &configuration.retry_timeout, &configuration.total_timeout}) {
    *time = (std::min<milliseconds>)(*time, year);
  }
  return configuration;
}

/// The state that calls of one client share: settings, transport, credentials, cached answers. Thread-safe.
class session {
 public:
  session(settings configuration, transport_ref transport, cache_policy policy_)
      : config(with_bounded_times(std::move(configuration))), policy(std::move(policy_)),
        base(parse_base_url(config.base_url)), transport_(std::move(transport)) {}

  const settings config;
  const cache_policy policy;
  const result<url> base;  // the base URL, or the reason why it cannot be used
  /// Whether an address is the service's own: see under_base.
  [[nodiscard]] bool is_own(const url& address) const { return base && under_base(*base, address); }
  /// Whether a server on the internet redirects this client to the client's own machine or network link (server-side
  /// request forgery). False if a proxy is used: the server may be anywhere then.
  [[nodiscard]] bool leads_inward(const url& server, const url& target) const {
    return is_public(server.host) && is_this_machine_or_link(target.host) &&
           proxy_for(config, server).empty();
  }

  /// Checks that the settings allow a request. Calls warn_of_settings.
  result<void> ready();
  /// Reports the warnings of from_environment, once: they may explain a failure.
  void warn_of_settings();

  /// Sends a request to `address` and follows redirects (RFC 9110, section 15.4; at most 10, never from https to http, and
  /// never where leads_inward says so).
  /// Updates `address` and calls `redirected` for each redirect. Sends the Authorization value and the extra headers only
  /// to addresses under the base URL. Streams the body of a 200 or 206 to the sink; returns any other answer with the
  /// beginning of its body. No status is an error here.
  result<answer> send(call& user_call, http_request request, const std::string& authorization,
                      body_sink& sink, url& address, function_ref<void(const url&)> redirected = {});

  /// Returns the value of Authorization for the base URL, or "" if there are no credentials.
  result<std::string> authorization(call& user_call);
  /// Removes credentials from a server's message: a server may quote the request's headers.
  [[nodiscard]] std::string without_secrets(std::string said, const std::string& authorization) const;
  /// Says, for a message, which credentials were refused or missing, and what to do.
  [[nodiscard]] std::string credentials_hint(const std::string& authorization) const;
  /// Describes an unexpected answer for a message: its type and its first words. Uses the first max_described bytes of
  /// `body`, which may be the beginning of the answer's body.
  [[nodiscard]] std::string description(const http_response& head, std::string_view body,
                                        const std::string& authorization) const;
  /// Returns the HTTP status and, if the answer has one, the service's message or storage's error code.
  [[nodiscard]] std::string status_text(const answer& got, const url& address,
                                        const std::string& authorization) const;
  /// Makes the error for an unexpected HTTP status.
  [[nodiscard]] error status_error(const std::string& task, const answer& got, const url& address,
                                   const std::string& authorization) const;

  void warn(const std::string& text) const {
    if (config.on_warning) {
      config.on_warning(text);
    } else {
      static_cast<void>(std::fprintf(stderr, "wandb_restore: warning: %s\n", text.c_str()));
    }
  }

  std::atomic<bool> has_warned_of_receipts{false};  // that receipts cannot be read or written
  /// Returns the account's default entity, once the service has told it; until then "".
  std::string default_entity() {
    memory& known = memory_.get();
    const std::lock_guard<std::mutex> guard(known.mutex);
    return known.default_entity;
  }
  void set_default_entity(const std::string& entity) {
    memory& known = memory_.get();
    const std::lock_guard<std::mutex> guard(known.mutex);
    known.default_entity = entity;
  }

 private:
  /// What the calls of a process have learnt.
  struct memory {
    std::mutex mutex = {};  // guards default_entity and netrc_key
    std::string default_entity = {};
    std::optional<std::string> netrc_key = {};
    std::mutex token_mutex = {};  // guards token, also while a call exchanges the identity token
    access_token token = {};
    bool try_close() { return is_free(mutex) && is_free(token_mutex); }
  };

  void add_credentials(http_request& request, bool is_under_base, const std::string& authorization) const;
  result<std::string> bearer(call& user_call);
  result<access_token> exchange_identity(call& user_call);

  transport_ref transport_;
  std::atomic<bool> warned_{false};
  per_process<memory> memory_;
};

inline result<void> session::ready() {
  if (config.offline) {
    return error(errc::offline, "offline mode (WANDB_MODE): no requests to " +
                                    (base ? base->redacted() : "the service") +
                                    ". Restore the file in online mode first, or unset WANDB_MODE");
  }
  warn_of_settings();
  if (config.problem) return *config.problem;
  auto fields = config.extra_headers;
  add_header(fields, "User-Agent", config.user_agent);
  add_header(fields, "X-WANDB-USERNAME", config.username);
  add_header(fields, "X-WANDB-USER-EMAIL", config.user_email);
  for (const auto& field : fields) {
    if (!is_header(field.first, field.second)) {
      return error(errc::invalid_argument,
                   "the settings' value for the header " + in_quotes(field.first) +
                       " cannot be sent: the value has control characters, or the name is malformed");
    }
  }
  if (!base) return base.error();
  return {};
}

inline void session::warn_of_settings() {
  if (warned_.exchange(true)) return;
  for (const auto& text : config.warnings) warn(text);
  if (!config.verify_tls && base && base->scheme == "https") {
    warn("certificates are not checked (WANDB_INSECURE_DISABLE_SSL): "
         "anyone between here and the server can read the API key and change the files");
  }
}

inline result<answer> session::send(call& user_call, http_request request, const std::string& authorization,
                                    body_sink& sink, url& address,
                                    function_ref<void(const url&)> redirected) {
  if (!base) return base.error();
  const http_headers headers = std::move(request.headers);
  const auto is_cancelled = std::move(request.is_cancelled);
  const std::string first_address = address.redacted();
  request.connect_timeout = config.connect_timeout;
  request.idle_timeout = config.idle_timeout;
  for (int hop = 0; hop <= 10; ++hop) {
    request.url = address.str();
    request.proxy = proxy_for(config, address);
    request.headers.clear();
    add_header(request.headers, "User-Agent", config.user_agent);
    add_header(request.headers, "Accept", "*/*");
    add_header(request.headers, "Accept-Encoding", "identity");
    for (const auto& field : headers) request.headers.push_back(field);
    add_credentials(request, is_own(address), authorization);

    const std::string label = request.method + " " + address.redacted();
    guarded_sink guard(user_call, sink, label);
    request.is_cancelled = [&] { return guard.cancelled() || (is_cancelled && is_cancelled()); };
    auto got = transport_.send(transport_.object.get(), request, guard);
    if (got && guard.said_stop()) got = error(errc::cancelled, label + ": stopped");
    if (!got) {
      if (auto failure = guard.verdict(got.error())) return *std::move(failure);
      got = guard.head();
    }
    const std::string* location = got->header("Location");
    if (!is_redirect(got->status) || location == nullptr) return answer{*std::move(got), guard.take_body()};

    // Repeat a POST only under the base URL, since its body may hold secrets, and only after 307 and 308: the other
    // redirects would make it a GET. Usually a wrong base URL is the cause.
    auto next = address.resolve(trim(*location));
    const bool keeps_method = got->status == 307 || got->status == 308;
    const bool repeatable = request.method == "GET" || (keeps_method && next && is_own(*next));
    const bool downgrade = next && address.scheme == "https" && next->scheme == "http";
    const bool inward = next && leads_inward(address, *next);
    if (!repeatable || !next || downgrade || inward) {
      return error(errc::protocol_violation,
                   label + " was redirected to " +
                       (next ? next->redacted() : std::string("an address that cannot be used")) +
                       (inward      ? ", which is this machine or its network link: refused"
                        : downgrade ? ", from https to http: refused"
                                    : ": refused; check the base URL"),
                   got->status);
    }
    address = *std::move(next);
    if (redirected) redirected(address);
  }
  return error(errc::protocol_violation, "more than 10 redirects from " + first_address +
                                             ": check the base URL, and whether a proxy asks for a login");
}

/// Adds the Authorization value and the extra headers to a request to an address under the base URL; the
/// Proxy-Authorization, for the proxy, to any request.
inline void session::add_credentials(http_request& request, bool is_under_base,
                                     const std::string& authorization) const {
  if (is_under_base && !authorization.empty()) add_header(request.headers, "Authorization", authorization);
  for (const auto& field : config.extra_headers) {
    const bool set = find_header(request.headers, field.first) != nullptr;
    if (equal_ignoring_case(field.first, "Proxy-Authorization")) {
      request.proxy_authorization = field.second;
    } else if (is_under_base && !set) {
      request.headers.push_back(field);
    }
  }
}

inline result<std::string> session::authorization(call& user_call) {
  if (auto good = ready(); !good) return good.error();
  const bool has_key = !trim(config.api_key).empty();
  if (!config.identity_token_file.empty() && !has_key) return bearer(user_call);
  std::string key(trim(config.api_key));  // a mounted secret often ends with a line break
  if (!has_key) {
    std::vector<std::string> warnings;  // reported without the lock: on_warning may use this client
    {
      memory& known = memory_.get();
      std::unique_lock<std::mutex> held(known.mutex);
      if (!known.netrc_key) {
        held.unlock();  // the disk may not answer
        std::string found = api_key_from_netrc(config, *base, warnings);
        held.lock();
        if (!known.netrc_key) known.netrc_key = std::move(found);
      }
      key = *known.netrc_key;
    }
    for (const auto& text : warnings) warn(text);
  }
  if (key.empty()) return std::string();
  if (auto good = check_api_key(key); !good) {
    return error(errc::invalid_argument,
                 (!has_key ? "in " + in_quotes(config.netrc_file) + ": " : std::string()) +
                     good.error().what());
  }
  return "Basic " + base64_encode("api:" + key);
}

/// Returns "Bearer" and the access token of this session or of the shared file, if it does not expire soon. Otherwise one
/// call exchanges the identity token while the others wait.
inline result<std::string> session::bearer(call& user_call) {
  if (!base) return base.error();
  memory& known = memory_.get();
  access_token& token = known.token;
  std::unique_lock<std::mutex> turn(known.token_mutex, std::defer_lock);
  while (!turn.try_lock()) {
    if (!user_call.sleep(milliseconds(20))) return user_call.why_cancelled();
  }
  const auto keys = shared_token_keys(config.base_url, *base);
  for (const auto& key : keys) {
    if (token.lasts()) break;
    token = read_shared_token(config.credentials_file, key, std::chrono::system_clock::now());
  }
  result<void> kept;
  if (!token.lasts()) {
    auto got = exchange_identity(user_call);
    if (!got) return got.error();
    token = *std::move(got);
    if (!config.credentials_file.empty())
      kept = write_shared_token(config.credentials_file, keys.front(), token);
  }
  const std::string value = "Bearer " + token.value;
  turn.unlock();  // on_warning may use this client
  if (!kept) warn(kept.error().what());
  return value;
}

/// Exchanges the identity token for an access token (RFC 7523, section 2.1).
inline result<access_token> session::exchange_identity(call& user_call) {
  const auto identity = read_small_file(from_utf8(config.identity_token_file), 64 * 1024);
  if (!identity && is_jwt(config.identity_token_file)) {
    return error(
        errc::invalid_argument,
        "WANDB_IDENTITY_TOKEN_FILE must be the name of a file with the identity token, not the token");
  }
  if (!identity) {
    return error(errc::invalid_argument,
                 std::string("identity token (WANDB_IDENTITY_TOKEN_FILE): ") + identity.error().what());
  }
  if (trim(*identity).empty()) {
    return error(errc::invalid_argument, "the identity token file " + in_quotes(config.identity_token_file) +
                                             " (WANDB_IDENTITY_TOKEN_FILE) is empty");
  }
  http_request request;
  request.method = "POST";
  add_header(request.headers, "Content-Type", "application/x-www-form-urlencoded");
  request.body = "grant_type=" + percent_encode("urn:ietf:params:oauth:grant-type:jwt-bearer") +
                 "&assertion=" + percent_encode(trim(*identity));
  const std::string task = "exchanging the identity token at " + base->redacted();
  retry_clock time(user_call);
  for (backoff tries(user_call, time);;) {
    collecting_sink body(64 * 1024);
    url address = join_path(*base, "/oidc/token");
    auto got = send(user_call, request, {}, body, address);
    error failure(errc::protocol_violation, task + ": the answer has no access token; check that " +
                                                config.base_url + " is the base URL of a W&B server");
    if (!body.problem.empty())
      return error(errc::protocol_violation, task + ": cannot use the answer: " + body.problem);
    if (!got) {
      failure = got.error();
    } else if (got->head.status != 200) {
      const int status = got->head.status;
      const bool refused = status >= 400 && status < 500 && status != 408 && status != 429;
      failure = error(status == 401   ? errc::not_authenticated
                      : status == 403 ? errc::permission_denied
                                      : errc::http_failure,
                      task + ": " + status_text(*got, address, "Bearer " + std::string(trim(*identity))) +
                          (refused ? "; check that the identity token (WANDB_IDENTITY_TOKEN_FILE) is "
                                     "current, and made for this server"
                                   : ""),
                      status);
      failure.retry_after(parse_retry_after(got->head));
    } else {
      const auto answered = parse_json(body.text);
      const json& lifetime = member(*answered, "expires_in");
      auto token = text_of(member(*answered, "access_token"));
      if (lifetime.is_number() && !token.empty() && !has_control(token)) {
        const std::chrono::seconds lives(
            static_cast<std::int64_t>(std::clamp(number_of(lifetime), 0.0, 1e9)));
        return access_token{std::move(token), std::chrono::system_clock::now() + lives,
                            (std::min)(token_margin, lives / 2)};
      }
    }
    if (auto end = tries.wait_after(failure)) return *end;
  }
}

inline std::string session::credentials_hint(const std::string& authorization) const {
  const std::string host = base ? base->host : "the service";
  const std::string page = base ? key_page(*base) : "the settings of your account";
  if (authorization.empty()) {
    return "no API key for " + host + ": set WANDB_API_KEY to one from " + page +
           ", or run `wandb login` (searched: settings, environment" +
           (config.netrc_file.empty() ? std::string() : ", " + in_quotes(config.netrc_file)) + ")";
  }
  const std::string key =
      config.api_key.empty() && !config.netrc_file.empty()
          ? "the key in " + in_quotes(config.netrc_file) +
                ": run `wandb login --relogin`, or set WANDB_API_KEY, with a key from "
          : "WANDB_API_KEY (it has precedence over the key that `wandb login` stores); keys are on ";
  return starts_with(authorization, "Bearer")
             ? "the access token for " + host +
                   " was refused: is the identity token (WANDB_IDENTITY_TOKEN_FILE) current? " +
                   in_quotes(config.credentials_file) + " may hold a revoked access token: remove it"
             : "the API key for " + host + " was refused: check " + key + page;
}

/// Joins the messages of an error body: {"error": "s"}, {"error": {"message": "s"}}, {"errors": ["s", {"message": "s"}]}.
inline std::string backend_message(const json& body) {
  std::string joined;
  const auto add = [&](const json& entry) {
    const std::string text = text_of(entry.is_string() ? entry : member(entry, "message"));
    if (!text.empty()) joined.append(joined.empty() ? "" : "; ").append(text);
  };
  add(member(body, "error"));
  for (const json& entry : elements(member(body, "errors"))) add(entry);
  return joined;
}

/// Returns the error code in an XML answer of storage (S3, Azure, Google), e.g. "NoSuchKey"; else an empty string. Codes have
/// letters only: a signature has digits, and is never returned.
inline std::string storage_code(std::string_view body) {
  constexpr std::string_view begin = "<Code>", end = "</Code>";
  const auto error_begin = body.find("<Error>");
  const auto code_begin = error_begin == body.npos ? body.npos : body.find(begin, error_begin);
  const auto code_end = code_begin == body.npos ? body.npos : body.find(end, code_begin);
  if (code_end == body.npos) return {};
  const auto code = trim(body.substr(code_begin + begin.size(), code_end - code_begin - begin.size()));
  constexpr std::size_t longest = 64;
  const bool is_word = code.size() <= longest && std::all_of(code.begin(), code.end(), is_letter);
  return is_word ? std::string(code) : std::string();
}

inline std::string session::without_secrets(std::string said, const std::string& authorization) const {
  const auto text_after = [](const std::string& text, char mark) {
    const auto found = text.find(mark);
    return found == text.npos ? std::string() : text.substr(found + 1);
  };
  constexpr std::size_t shortest = 4;  // a shorter value is no secret, and is part of many words
  const auto hide = [&](const std::string& secret) {
    if (secret.size() >= shortest) said = replace_all(said, secret, "***");
  };
  const auto hide_credentials = [&](const std::string& value) {
    const auto secret = text_after(value, ' ');
    hide(value);
    hide(secret);
    if (starts_with(value, "Basic ")) hide(text_after(base64_decode(secret).value_or(""), ':'));
  };
  hide_credentials(authorization);
  hide(std::string(trim(config.api_key)));
  for (const auto& field : config.extra_headers) hide_credentials(field.second);
  for (const auto* proxy : {&config.http_proxy, &config.https_proxy}) {
    const auto address = parse_proxy(proxy->url);
    const std::string user = address ? percent_decode(address->user_info).value_or(address->user_info) : "";
    hide(text_after(user, ':'));
    hide(base64_encode(user));
  }
  return without_queries(said);
}

inline std::string session::description(const http_response& head, std::string_view body,
                                        const std::string& authorization) const {
  std::string beginning(body.substr(0, max_described));
  if (body.size() >= max_described)  // the last word may be a part of a secret, which would not be recognised
    beginning.replace(beginning.find_last_of(" \t\r\n<>\"'") + 1, std::string::npos, "***");
  const std::string* type = head.header("Content-Type");
  const std::string words = first_words(without_secrets(std::move(beginning), authorization));
  return "the answer " + (type != nullptr ? "is " + in_quotes(*type) : "has no Content-Type") +
         (words.empty() ? " without a text" : " and begins with " + in_quotes(words)) +
         ": a login page or proxy may answer in the place of the server";
}

/// Returns run_not_found or file_not_found if the service's message says that a run or file does not exist, else
/// `otherwise`. The message must name the thing: any web server says "not found", and a program that takes a run for
/// missing starts a new one.
inline errc code_of_missing(std::string_view said, errc otherwise) {
  if (!contains_ignoring_case(said, "not found") && !contains_ignoring_case(said, "could not find"))
    return otherwise;
  for (const char* word : {"run", "project", "entity"}) {
    if (has_word(said, word)) return errc::run_not_found;
  }
  return has_word(said, "file") ? errc::file_not_found : otherwise;
}

inline std::string session::status_text(const answer& got, const url& address,
                                        const std::string& authorization) const {
  const std::string status = "HTTP status " + std::to_string(got.head.status);
  if (!is_own(address)) {  // the rest of storage's answer may contain signatures
    const std::string code = storage_code(got.body);
    return code.empty() ? status : status + ", " + code;
  }
  auto said = without_secrets(backend_message(*parse_json(got.body)), authorization);
  const auto query = address.target.find('?');  // a server may quote the request
  if (query != std::string::npos && query + 1 < address.target.size())
    said = replace_all(said, std::string_view(address.target).substr(query + 1), "***");
  return said.empty() ? status : status + ", " + in_quotes(said);
}

inline error session::status_error(const std::string& task, const answer& got, const url& address,
                                   const std::string& authorization) const {
  const int status = got.head.status;
  std::string text = task + ": " + status_text(got, address, authorization);
  if (is_own(address)) {
    const std::string said = backend_message(*parse_json(got.body));
    const auto missing = code_of_missing(said, errc::http_failure);
    const bool forbidden = status == 403 || contains_ignoring_case(said, "permission denied");
    if (status == 401)
      return error(errc::not_authenticated, text + "; " + credentials_hint(authorization), status);
    if (forbidden) {
      return error(errc::permission_denied,
                   text + "; " +
                       (authorization.empty()
                            ? credentials_hint(authorization)
                            : "this account has no access: ask the owner, or use another key"),
                   status);
    }
    if (status == 404 && missing != errc::http_failure) {
      return error(missing,
                   text + "; " +
                       (authorization.empty()
                            ? credentials_hint(authorization)
                            : "check the run path, and that the key belongs to the right account"),
                   status);
    }
  }
  error failure(errc::http_failure, text, status);
  failure.retry_after(parse_retry_after(got.head));
  return failure;
}

}  // namespace detail

// ================================================================================================= service

namespace detail {

/// Removes "." and empty segments from a name.
inline std::string plain_name(std::string_view name) {
  std::string joined;
  for (const auto part : split(name, '/')) {
    if (!part.empty() && part != ".") joined.append(joined.empty() ? "" : "/").append(part);
  }
  return joined;
}

/// The Levenshtein distance of two texts, in bytes.
inline std::size_t edit_distance(std::string_view a, std::string_view b) {
  // The distances between the current prefix of `a` and each prefix of `b`.
  std::vector<std::size_t> row(b.size() + 1);
  for (std::size_t j = 0; j < row.size(); ++j) row[j] = j;
  for (std::size_t i = 0; i < a.size(); ++i) {
    std::size_t diagonal = std::exchange(row[0], i + 1);
    for (std::size_t j = 0; j < b.size(); ++j) {
      const std::size_t replaced = diagonal + (a[i] == b[j] ? 0 : 1);
      diagonal = row[j + 1];
      row[j + 1] = (std::min)(replaced, (std::min)(row[j], diagonal) + 1);
    }
  }
  return row.back();
}

/// Up to three of `names` that a user who wrote `name` may have meant, nearest first: names that differ in a few characters,
/// ignoring case, and names with the same last part in another directory.
inline std::vector<std::string> nearest_names(std::string_view name, const std::vector<std::string>& names) {
  constexpr std::size_t max_bytes = 512;  // edit_distance takes quadratic time
  const auto last_part = [](std::string_view text) { return text.substr(text.rfind('/') + 1); };
  const std::string wanted = lower(name.substr(0, max_bytes));
  const std::size_t limit = (std::max<std::size_t>)(1, wanted.size() / 3);
  std::vector<std::size_t> distances;
  for (const auto& existing : names) {
    const std::string candidate = lower(existing);
    const auto longer = (std::max)(candidate.size(), wanted.size());
    const auto shorter = (std::min)(candidate.size(), wanted.size());
    const bool is_far = candidate.empty() || longer > max_bytes || longer - shorter > limit;
    std::size_t distance = is_far ? limit + 1 : edit_distance(wanted, candidate);
    if (last_part(candidate) == last_part(wanted)) distance = (std::min<std::size_t>)(distance, 1);
    distances.push_back(distance);
  }
  std::vector<std::string> found;
  for (std::size_t distance = 0; distance <= limit; ++distance) {
    for (std::size_t i = 0; i < names.size() && found.size() < 3; ++i) {
      if (distances[i] == distance) found.push_back(names[i]);
    }
  }
  return found;
}

/// A file of a run, and the URL to download it from.
struct found_file {
  file_info info;
  std::string address;  // absolute; keep it out of messages: its query may be a signature
  // A signed address at the storage, which saves the redirect from `address`. Empty: unknown, or not to be used.
  std::string direct_address = {};
  std::atomic<bool>* direct_is_refused = nullptr;  // to set if the storage refuses the direct address
};

/// What the service says of a file that was asked for.
struct lookup {
  std::optional<found_file> file = {};  // empty: there is no such file, or it was never uploaded
  std::string direct_address = {};      // a caller that wants to use it copies it into `file`
  bool is_never_uploaded = false;       // its md5 is "0": also the answer for an unknown name
  bool has_run_ended = false;           // the run uploads nothing more
};

/// Sends GraphQL queries to the service and checks the answers.
class service {
 public:
  service(session& shared_session, call& user_call) : session_(shared_session), call_(user_call) {}

  /// Requests a file's URL, size and md5. For a name such as "./a" or "d//a" the same request asks for the given name and
  /// for its plain_name; the given name has priority.
  result<lookup> look_up(const run_path& run, const std::string& name);
  /// As look_up. If there is no such file, one more request finds names to suggest in the error.
  result<found_file> find_file(const run_path& run, const std::string& name);
  /// The error for a file that look_up has not found. Makes a request, to suggest names.
  error missing_file(const run_path& run, const std::string& name, const lookup& answered);
  /// Returns the error for a pattern that no file matches. If the pattern is a name, makes a request, to suggest names.
  /// `excluded`: the number of files that match, but are left out.
  error no_match(const run_path& run, const std::string& pattern, std::size_t excluded);
  /// Lists all files of a run.
  result<std::vector<file_info>> list_files(const run_path& run);
  /// Calls `take` for each file of a run, with one request for each page of 500, until it returns false. A file without a
  /// usable address is passed with an empty one. `take` may move from the file. More than max_pages pages are an error.
  /// Returns whether the run has ended.
  result<bool> for_each_file(const run_path& run, function_ref<bool(found_file& file)> take);
  /// The account's default entity, for run paths without one. The session remembers the answer.
  result<std::string> default_entity();

 private:
  static constexpr std::size_t max_answer = 8 * 1024 * 1024;   // bytes; a page of files takes about 1 MiB
  static constexpr std::size_t max_listed = 24 * 1024 * 1024;  // bytes in memory; about 125,000 files
  static constexpr std::size_t max_pages = 5000;
  static constexpr std::int64_t page_size = 500;  // files
  static constexpr const char* list_advice = "`wandb-restore --list` shows the names of the run's files";

  enum class retries { until_timeout, none };
  result<json_document> ask(const std::string& task, const char* query, const json_object& variables,
                            retries wanted = retries::until_timeout);
  result<json_document> ask_once(const std::string& task, const std::string& authorization,
                                 const std::string& body);
  result<json_document> files_page(const std::string& task, const run_path& run, json_object variables,
                                   retries wanted = retries::until_timeout, bool* has_run_ended = nullptr);
  std::string hint_for_missing(const run_path& run, const std::string& name);
  [[nodiscard]] result<void> check_answered(const std::string& task, const char* kind, const json& answered,
                                            const std::string& requested) const;
  [[nodiscard]] error wrong_answer(const std::string& task, const char* kind, const std::string& name) const;
  [[nodiscard]] error too_many(const run_path& run, std::size_t count) const;
  [[nodiscard]] static file_info info_of(const json& node);
  [[nodiscard]] result<found_file> file_of(const std::string& task, const json& node) const;
  [[nodiscard]] result<std::string> address_of(const std::string& task, std::string address) const;
  [[nodiscard]] std::string direct_address_of(const std::string& task, const json& node,
                                              const std::string& own) const;
  [[nodiscard]] std::string host() const {
    const auto& base = session_.base;
    return base ? base->host : "the service";
  }

  session& session_;
  call& call_;
  bool anonymous_ = false;
};

inline result<json_document> service::ask(const std::string& task, const char* query,
                                          const json_object& variables, retries wanted) {
  if (auto good = session_.ready(); !good) return good.error();
  auto authorization = session_.authorization(call_);
  if (!authorization) return authorization.error();
  anonymous_ = authorization->empty();
  const std::string body = json_object().add_text("query", query).add("variables", variables.str()).str();
  retry_clock time(call_);
  for (backoff tries(call_, time);;) {
    auto data = ask_once(task, *authorization, body);
    if (data || wanted == retries::none) return data;
    if (auto end = tries.wait_after(data.error())) return *end;
  }
}

inline result<json_document> service::ask_once(const std::string& task, const std::string& authorization,
                                               const std::string& body) {
  http_request request;
  request.method = "POST";
  request.body = body;
  add_header(request.headers, "Content-Type", "application/json");
  add_header(request.headers, "Use-Admin-Privileges", "true");
  if (!session_.config.username.empty())
    add_header(request.headers, "X-WANDB-USERNAME", session_.config.username);
  if (!session_.config.user_email.empty())
    add_header(request.headers, "X-WANDB-USER-EMAIL", session_.config.user_email);

  collecting_sink collected(max_answer);
  url address = join_path(*session_.base, "/graphql");
  auto response = session_.send(call_, std::move(request), authorization, collected, address);
  if (!collected.problem.empty()) {
    return error(errc::protocol_violation,
                 task + ": cannot use the answer of " + host() + ": " + collected.problem);
  }
  if (!response) return error(response.error());
  if (response->head.status != 200) {
    const error failure = session_.status_error(task + " at " + host(), *response, address, authorization);
    if (failure.http_status() != 404 || failure.code() != errc::http_failure) return failure;
    return error(failure.code(),
                 std::string(failure.what()) + "; check that " + session_.config.base_url +
                     " is the base URL of a W&B server",
                 404);
  }
  const auto parsed = parse_json(collected.text);
  if (!parsed->is_object()) {
    return error(errc::protocol_violation,
                 task + ": the answer of " + host() +
                     " is not a JSON object, is nested too deeply, or has too many or too long values; " +
                     session_.description(response->head, collected.text, authorization) + "; check that " +
                     session_.config.base_url + " is the base URL of a W&B server",
                 200);
  }
  const auto message = backend_message(*parsed);
  if (!message.empty() || !member(*parsed, "errors").empty()) {
    const std::string full = task + ": " + host() + " answered " +
                             (message.empty() ? "with errors that have no message"
                                              : in_quotes(session_.without_secrets(message, authorization)));
    if (contains_ignoring_case(message, "permission denied") ||
        contains_ignoring_case(message, "access denied")) {
      return error(errc::permission_denied,
                   full + (anonymous_ ? "; " + session_.credentials_hint({}) : std::string()), 200);
    }
    const auto code = code_of_missing(message, errc::http_failure);
    const bool may_be_hidden = anonymous_ && code != errc::http_failure;
    return error(code, full + (may_be_hidden ? "; " + session_.credentials_hint({}) : std::string()), 200);
  }
  return parsed.at(member(*parsed, "data"));
}

/// Requests a page of a run's files. Returns the member `project.run.files` of the answer. Sets `has_run_ended` if it is
/// not null.
inline result<json_document> service::files_page(const std::string& task, const run_path& run,
                                                 json_object variables, retries wanted, bool* has_run_ended) {
  // The variables have the SDK's names (RunFiles in wandb/apis/public/files.py).
  static constexpr const char* query =
      "query RunFiles($project: String!, $entity: String!, $name: String!, $fileCursor: String, "
      "$fileLimit: Int = 50, $fileNames: [String] = [], $pattern: String) { "
      "project(name: $project, entityName: $entity) { name run(name: $name) { name state fileCount "
      "files(names: $fileNames, after: $fileCursor, first: $fileLimit, pattern: $pattern) { "
      "edges { node { id name url directUrl sizeBytes mimetype updatedAt md5 } cursor } "
      "pageInfo { endCursor hasNextPage } } } } }";
  variables.add_text("project", run.project).add_text("entity", run.entity).add_text("name", run.run_id);
  auto data = ask(task, query, variables, wanted);
  if (!data) return data;
  if (!has_member(**data, "project")) {
    return error(errc::protocol_violation, task + ": the answer of " + host() + " has no field \"project\"");
  }
  const json& project = member(**data, "project");
  const json& found = member(project, "run");
  if (auto good = check_answered(task, "project", project, run.project); !good) return good.error();
  if (auto good = check_answered(task, "run", found, run.run_id); !good) return good.error();
  const bool no_project = project.is_null();
  if (no_project || (has_member(project, "run") && found.is_null())) {
    const std::string missing =
        no_project ? "project " + in_quotes(run.entity + "/" + run.project) : "run " + in_quotes(run.str());
    return error(errc::run_not_found,
                 task + ": " + host() + " has no " + missing +
                     (anonymous_
                          ? ", or does not show it without a key: " + session_.credentials_hint({})
                          : std::string(", or this API key may not see it: check the run path, and that "
                                        "the key belongs to the right account")));
  }
  const json& files = member(found, "files");
  if (!found.is_object() || !member(files, "edges").is_array()) {
    return error(errc::protocol_violation, task + ": the answer of " + host() + " has no list of files");
  }
  if (has_run_ended != nullptr) {
    const std::string state = text_of(member(found, "state"));
    *has_run_ended = state == "finished" || state == "crashed" || state == "failed" || state == "killed";
  }
  return data->at(files);
}

/// Checks that an answer describes the requested project or run: a proxy or cache may mix up two answers. A missing name
/// passes; so does one that differs only in case, because the service's database ignores case.
inline result<void> service::check_answered(const std::string& task, const char* kind, const json& answered,
                                            const std::string& requested) const {
  const std::string name = text_of(member(answered, "name"));
  if (name.empty() || equal_ignoring_case(name, requested)) return {};
  return wrong_answer(task, kind, name);
}

inline error service::wrong_answer(const std::string& task, const char* kind, const std::string& name) const {
  return error(errc::protocol_violation,
               task + ": " + host() + " answered about the " + kind + " " +
                   in_quotes(std::string_view(name)) +
                   " instead: try again; if it happens again, check the proxies on the way");
}

inline file_info service::info_of(const json& node) {
  file_info info;
  info.name = text_of(member(node, "name"));
  info.md5 = normalised_md5(trim(text_of(member(node, "md5"))));
  info.mimetype = text_of(member(node, "mimetype"));
  info.updated_at = text_of(member(node, "updatedAt"));
  const json& size = member(node, "sizeBytes");  // a number, a string or null
  if (const auto* number = size.get_ptr<const json::number_unsigned_t*>()) info.size = *number;
  if (size.is_string()) info.size = to_number(text_of(size));
  if (info.size == std::uint64_t{0} && info.md5 != md5().finish())
    info.size.reset();  // some servers send 0 for an unknown size
  return info;
}

/// Checks an address from the service, and makes it absolute.
inline result<std::string> service::address_of(const std::string& task, std::string address) const {
  if (address.empty()) {
    return error(errc::protocol_violation,
                 task + ": the answer of " + host() + " has no address for the file");
  }
  const auto end_of_scheme = address.find_first_of(":/?#");
  const bool has_scheme = end_of_scheme != address.npos && address[end_of_scheme] == ':';
  const std::string shown = in_quotes(redacted_address(address));
  if (has_scheme && !starts_with(lower(address), "http")) {
    return error(errc::protocol_violation, task + ": the file is a reference to " + shown +
                                               ", which is stored elsewhere and not served over HTTP");
  }
  const auto& base = session_.base;
  if (!base) return base.error();
  const auto absolute = base->resolve(address);
  if (!absolute) return error(errc::protocol_violation, task + ": " + absolute.error().what());
  if (base->scheme == "https" && absolute->scheme == "http") {
    return error(errc::protocol_violation, task + ": the address " + shown + " is not https: refused");
  }
  if (session_.leads_inward(*base, *absolute)) {
    return error(errc::protocol_violation,
                 task + ": the address " + shown + " is this machine or its network link: refused");
  }
  return absolute->str();
}

/// Returns the address at the storage, if there is a usable one besides the service's own.
inline std::string service::direct_address_of(const std::string& task, const json& node,
                                              const std::string& own) const {
  auto direct = address_of(task, text_of(member(node, "directUrl")));
  return direct && *direct != own ? *std::move(direct) : std::string();
}

inline result<found_file> service::file_of(const std::string& task, const json& node) const {
  const std::string own = text_of(member(node, "url"));
  auto address = address_of(task, own.empty() ? text_of(member(node, "directUrl")) : own);
  if (!address) return address.error();
  auto info = info_of(node);
  if (info.size && *info.size > partial_file::max_size) {
    return error(errc::protocol_violation, task + ": " + host() + " gives an impossible size: " +
                                               std::to_string(*info.size) + " bytes");
  }
  return found_file{std::move(info), *std::move(address)};
}

inline result<lookup> service::look_up(const run_path& run, const std::string& name) {
  const std::string task = "looking for " + in_quotes(name) + " in " + run.str();
  lookup answered;
  const std::string plain = plain_name(name);
  const bool has_other_spelling = plain != name;
  json_object variables;
  variables.add("fileNames",
                '[' + json_string(name) + (has_other_spelling ? "," + json_string(plain) : "") + ']');
  variables.add("fileLimit", has_other_spelling ? "2" : "1");
  auto files = files_page(task, run, std::move(variables), retries::until_timeout, &answered.has_run_ended);
  if (!files) return files.error();
  const json *exact = nullptr, *similar = nullptr, *never_uploaded = nullptr, *unrelated = nullptr;
  for (const json& edge : elements(member(**files, "edges"))) {
    const json& node = member(edge, "node");
    if (!node.is_object()) continue;
    const auto node_name = text_of(member(node, "name"));
    if (!node_name.empty() && node_name != name && node_name != plain) {
      unrelated = &node;
    } else if (text_of(member(node, "md5")) == "0") {
      never_uploaded = &node;
    } else {
      (node_name == name || node_name.empty() ? exact : similar) = &node;
    }
  }
  if (const json* found = exact ? exact : similar) {
    auto file = file_of(task, *found);
    if (!file) return file.error();
    answered.direct_address = direct_address_of(task, *found, file->address);
    answered.file = *std::move(file);
    return answered;
  }
  if (unrelated && !never_uploaded) return wrong_answer(task, "file", text_of(member(*unrelated, "name")));
  answered.is_never_uploaded = never_uploaded != nullptr;
  return answered;
}

inline result<found_file> service::find_file(const run_path& run, const std::string& name) {
  auto answered = look_up(run, name);
  if (!answered) return answered.error();
  if (!answered->file) return missing_file(run, name, *answered);
  return *std::move(answered->file);
}

inline error service::missing_file(const run_path& run, const std::string& name, const lookup& answered) {
  const std::string task = "looking for " + in_quotes(name) + " in " + run.str();
  const auto hint = hint_for_missing(run, plain_name(name));
  if (answered.is_never_uploaded) {
    // The service gives this answer for every unknown name.
    return error(errc::file_not_found,
                 task + ": " + host() +
                     " says that this file was never uploaded: either the name is wrong (" + hint +
                     "), or the run has not uploaded it yet: then try again later");
  }
  return error(errc::file_not_found, task + ": the run has no such file at " + host() + ": " + hint);
}

inline error service::no_match(const run_path& run, const std::string& pattern, std::size_t excluded) {
  const std::string task = "looking for files that match " + in_quotes(pattern) + " in " + run.str() + ": ";
  if (excluded > 0) {
    return error(errc::file_not_found, task + "the files that match (" + std::to_string(excluded) +
                                           ") are all excluded: check the patterns of `exclude`");
  }
  const bool is_name = pattern.find_first_of("*?") == pattern.npos && pattern.back() != '/';
  return error(errc::file_not_found,
               task + "the run has no such file at " + host() + ": " +
                   (is_name ? hint_for_missing(run, plain_name(pattern)) : list_advice));
}

/// Suggests names instead of a missing one, from the first page of the run's files. Does not retry: that would delay the
/// error message.
inline std::string service::hint_for_missing(const run_path& run, const std::string& name) {
  json_object variables;
  variables.add("fileLimit", std::to_string(page_size));
  const auto files =
      files_page("looking for names like " + in_quotes(name), run, std::move(variables), retries::none);
  if (!files) return list_advice;
  std::vector<std::string> names;
  for (const json& edge : elements(member(**files, "edges"))) {
    const json& node = member(edge, "node");
    if (text_of(member(node, "md5")) != "0") names.push_back(text_of(member(node, "name")));
  }
  if (names.empty()) return "the run has no files";
  for (const auto& existing : names) {
    if (!starts_with(existing, name + "/")) continue;
    const std::string pattern = name + '/';
    const bool is_plain = pattern.find('\'') == pattern.npos && !has_control(pattern);
    return in_quotes(name) + " is a directory of the run: restore_all with the pattern " +
           in_quotes(pattern) + (is_plain ? " (in a shell: `wandb-restore '" + pattern + "'`)" : "") +
           " restores the files in it";
  }
  const auto similar = nearest_names(name, names);
  if (similar.empty()) return list_advice;
  std::string question = "did you mean ";
  for (std::size_t i = 0; i < similar.size(); ++i) {
    question += (i == 0 ? "" : i + 1 < similar.size() ? ", " : " or ") + in_quotes(similar[i]);
  }
  return question + "?";
}

inline result<std::vector<file_info>> service::list_files(const run_path& run) {
  std::vector<file_info> all;
  std::size_t bytes = 0;
  const auto listed = for_each_file(run, [&](found_file& file) {
    const file_info& added = file.info;
    bytes += sizeof(added) + added.name.size() + added.mimetype.size() + added.updated_at.size();
    all.push_back(std::move(file.info));
    return bytes <= max_listed;
  });
  if (!listed) return listed.error();
  if (bytes > max_listed) return too_many(run, all.size());
  return all;
}

inline error service::too_many(const run_path& run, std::size_t count) const {
  return error(errc::protocol_violation, "listing the files of " + run.str() + ": " + host() +
                                             " lists too many files: " + std::to_string(count) +
                                             " so far, and more to come");
}

inline result<bool> service::for_each_file(const run_path& run, function_ref<bool(found_file& file)> take) {
  const std::string task = "listing the files of " + run.str();
  std::vector<std::string> seen;  // cursors
  std::size_t count = 0, cursor_bytes = 0;
  for (std::string cursor;;) {
    json_object variables;
    variables.add("fileLimit", std::to_string(page_size));
    if (!cursor.empty()) variables.add_text("fileCursor", cursor);
    bool has_run_ended = false;
    auto files = files_page(task, run, std::move(variables), retries::until_timeout, &has_run_ended);
    if (!files) return files.error();
    std::string last;
    for (const json& edge : elements(member(**files, "edges"))) {
      last = text_of(member(edge, "cursor"));
      const json& node = member(edge, "node");
      if (!node.is_object() || text_of(member(node, "md5")) == "0") continue;
      ++count;
      auto file = file_of(task, node);
      if (!file) file = found_file{info_of(node), {}};
      file->direct_address = direct_address_of(task, node, file->address);
      if (!take(*file)) return has_run_ended;
    }
    const json& page = member(**files, "pageInfo");
    if (last.empty()) last = text_of(member(page, "endCursor"));
    if (!is_true(member(page, "hasNextPage")) || last.empty()) return has_run_ended;
    if (seen.size() >= max_pages || cursor_bytes > max_listed) return too_many(run, count);
    if (contains(seen, last)) {
      return error(errc::protocol_violation, task + ": " + host() + " sends the same page again and again");
    }
    cursor_bytes += last.size();
    seen.push_back(last);
    cursor = last;
  }
}

inline result<std::string> service::default_entity() {
  if (auto known = session_.default_entity(); !known.empty()) return known;
  const std::string task = "asking for the account's default entity";
  auto data = ask(task, "query Viewer { viewer { id entity } }", json_object());
  if (!data) return data.error();
  const std::string entity = text_of(member(member(**data, "viewer"), "entity"));
  if (entity.empty()) {
    return error(errc::invalid_run_path,
                 task + ": " + host() +
                     " reports none; set WANDB_ENTITY, or give entity/project/run_id as the run path" +
                     (anonymous_ ? "; " + session_.credentials_hint({}) : std::string()));
  }
  session_.set_default_entity(entity);
  return entity;
}

}  // namespace detail

// ================================================================================================ download

namespace detail {

/// A thread that reports a failure to start. std::thread throws instead, which terminates a program without exceptions. The
/// destructor joins the thread: declare it after the objects that it uses.
class thread {
 public:
  thread() = default;
  thread(const thread&) = delete;
  thread& operator=(const thread&) = delete;
  ~thread() { join(); }

  /// Calls a member function of an object in a new thread. Returns false if the system starts none.
  template <auto Function, class Object>
  [[nodiscard]] bool start(Object* object) {
    object_ = object;
    function_ = [](void* erased) { (static_cast<Object*>(erased)->*Function)(); };
#ifdef _WIN32
    handle_ = reinterpret_cast<HANDLE>(_beginthreadex(nullptr, 0, &run, this, 0, nullptr));
    started_ = handle_ != nullptr;
#else
    started_ = ::pthread_create(&handle_, nullptr, &run, this) == 0;
#endif
    return started_;
  }
  /// Blocks until a started thread has returned from its function, but no longer than `limit`. Returns whether it has
  /// returned.
  bool wait(milliseconds limit) {
    std::unique_lock<std::mutex> held(mutex_);
    return returned_.wait_for(held, limit, [&] { return has_returned_; });
  }
  void join() {
    if (!std::exchange(started_, false)) return;
#ifdef _WIN32
    WaitForSingleObject(handle_, INFINITE);
    CloseHandle(handle_);
#else
    ::pthread_join(handle_, nullptr);
#endif
  }

 private:
#ifdef _WIN32
  static unsigned __stdcall run(void* self) {
#else
  static void* run(void* self) {
#endif
    static_cast<thread*>(self)->run_body();
    return {};
  }
  void run_body() {
    function_(object_);
    const std::lock_guard<std::mutex> guard(mutex_);
    has_returned_ = true;
    returned_.notify_all();
  }
#ifdef _WIN32
  HANDLE handle_ = nullptr;
#else
  pthread_t handle_{};
#endif
  void* object_ = nullptr;
  void (*function_)(void* erased) = nullptr;
  bool started_ = false;
  std::mutex mutex_;
  std::condition_variable returned_;
  bool has_returned_ = false;
};

/// Returns the error for a thread that did not start.
inline error no_thread(const std::string& task) {
  return error(errc::disk_failure,
               task + ": the system cannot start a thread; check the limit on processes (ulimit -u)");
}

// ---- the end of a transfer

/// Whether a transfer is running, complete or stopped, for all of its threads. Thread-safe.
class transfer_state {
 public:
  /// Call when every byte is on disk. Later failures are ignored.
  void complete() { end(nullptr, complete_); }
  /// Stops every thread. Only the first failure counts.
  void fail(const error& failure) { end(&failure, stopped_); }
  /// Stops every thread without a failure.
  void stop() { end(nullptr, stopped_); }

  [[nodiscard]] bool is_complete() const { return complete_; }
  [[nodiscard]] bool is_stopped() const { return stopped_; }
  [[nodiscard]] bool is_over() const { return complete_ || stopped_; }
  /// For detail::call: true once the transfer is stopped.
  [[nodiscard]] const std::atomic<bool>& stop_flag() const { return stopped_; }
  /// Blocks until the transfer is complete or stopped, but no longer than `limit`. Returns is_over().
  bool wait(milliseconds limit) {
    std::unique_lock<std::mutex> held(mutex_);
    return ended_.wait_for(held, limit, [&] { return is_over(); });
  }
  [[nodiscard]] std::optional<error> failure() {
    const std::lock_guard<std::mutex> guard(mutex_);
    return failure_;
  }

  /// Calls the function of a thread. An exception (std::bad_alloc; a transport's own) must not leave the thread, which would
  /// end the program: it stops every thread, and rethrow() throws it in the caller's. Returns false after an exception.
  template <class Function>
  bool run(Function function) {
#if WANDB_RESTORE_EXCEPTIONS
    try {
      function();
      return true;
    } catch (...) {
      {
        const std::lock_guard<std::mutex> guard(mutex_);
        if (!thrown_) thrown_ = std::current_exception();
      }
      stop();
      return false;
    }
#else
    function();
    return true;
#endif
  }
  /// Throws the first exception of a thread, if there was one. Call in the caller's thread after the threads have ended.
  void rethrow() const {
#if WANDB_RESTORE_EXCEPTIONS
    if (thrown_) std::rethrow_exception(thrown_);
#endif
  }

 private:
  void end(const error* failure, std::atomic<bool>& flag) {
    const std::lock_guard<std::mutex> guard(mutex_);
    if (failure != nullptr && complete_) return;
    if (failure != nullptr && !failure_) failure_ = *failure;
    flag = true;
    ended_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable ended_;
  std::atomic<bool> complete_{false}, stopped_{false};
  std::optional<error> failure_;
#if WANDB_RESTORE_EXCEPTIONS
  std::exception_ptr thrown_;
#endif
};

/// Calls on_progress, about ten times a second at most. Use from the caller's thread only.
class progress_reporter {
 public:
  progress_reporter(call& user_call, const restore_options& options, const std::string& name)
      : call_(user_call), options_(options), name_(name) {}

  [[nodiscard]] bool is_due() const { return clock::now() - reported_ >= milliseconds(90); }
  /// Returns the seconds since the last report, at least 0.001.
  [[nodiscard]] double elapsed() const {
    return (std::max)(std::chrono::duration<double>(clock::now() - reported_).count(), 0.001);
  }
  /// Calls on_progress. Cancels the call if it returns false.
  void report(phase now, std::uint64_t bytes_done, std::optional<std::uint64_t> bytes_total,
              double bytes_per_second) {
    reported_ = clock::now();
    if (options_.on_progress &&
        !options_.on_progress({name_, now, bytes_done, bytes_total, bytes_per_second}))
      call_.stop();
  }
  /// Calls on_progress if a report is due. Returns false if the call is cancelled.
  bool report_if_due(phase now, std::uint64_t bytes_done, std::optional<std::uint64_t> bytes_total) {
    if (is_due()) report(now, bytes_done, bytes_total, 0);
    return !call_.cancelled();
  }

 private:
  call& call_;
  const restore_options& options_;
  const std::string& name_;
  clock::time_point reported_ = clock::now();
};

// ---- which connection fetches which bytes

/// Bytes [begin, end) of a file.
struct byte_range {
  std::uint64_t begin = 0, end = 0;

  [[nodiscard]] std::uint64_t size() const { return end - begin; }
};

/// Assigns byte ranges to connections, lowest offsets first: the digest consumes the file in order and must not wait for a
/// gap. Thread-safe.
///
/// The delay of a request is the time to the first byte of its response. Ranges are large enough to make the delay a small
/// part of the time, and shrink towards the end so that all connections finish together; a connection without work takes
/// over half of the range that would finish last. Callers pass the time, so that tests need no real clock.
class range_plan {
 public:
  static constexpr std::uint64_t block = partial_file::block;
  static constexpr std::uint64_t mebibyte = 1024 * 1024;
  static constexpr std::uint64_t first_piece = 4 * mebibyte, smallest_piece = mebibyte;
  static constexpr std::uint64_t largest_unmeasured_piece = 32 * mebibyte;  // before the first response
  static constexpr std::uint64_t smallest_share = mebibyte / 2;      // do not divide into smaller parts
  static constexpr std::uint64_t worth_splitting = 2 * first_piece;  // use one connection for less
  static constexpr milliseconds probe_time{50};  // the others wait this long for the first response

  /// The range of one connection. The connection's thread advances `position` and `received`; the plan may lower `end`.
  struct cursor {
    std::atomic<std::uint64_t> position{0};  // offset of the next byte to arrive
    std::atomic<std::uint64_t> end{0};
    std::atomic<bool> revoked{false};        // `end` was lowered: ignore bytes beyond it
    std::atomic<std::uint64_t> received{0};  // bytes of all responses

    [[nodiscard]] bool is_wanted() const { return position < end; }
    [[nodiscard]] bool is_taken_over() const { return revoked && position >= end; }
  };

  range_plan(std::size_t connections, std::uint64_t file_size, const std::vector<byte_range>& gaps)
      : file_size_(file_size), slots_(connections) {
    for (auto gap = gaps.size(); gap-- > 0;) gaps_.push_back(gaps[gap]);
  }

  [[nodiscard]] std::size_t connections() const { return slots_.size(); }
  [[nodiscard]] cursor& operator[](std::size_t connection) { return slots_[connection].range; }

  /// Assigns the next range to a connection. Returns false if no range can be assigned at the moment.
  bool assign(std::size_t connection, clock::time_point now) {
    const std::lock_guard<std::mutex> guard(mutex_);
    slot& asking = slots_[connection];
    if (whole_) {
      if (is_any_busy() || stored_everything_) return false;
      start(asking, {0, file_size_}, 0);
      return true;
    }
    if (!gaps_.empty()) {
      if (!is_delay_known() && is_any_busy() && !is_probe_over(now)) return false;
      byte_range& gap = gaps_.back();
      const byte_range range{gap.begin, gap.begin + (std::min)(gap.size(), piece(asking))};
      gap.begin = range.end;
      if (gap.size() == 0) gaps_.pop_back();
      start(asking, range, 0);
      return true;
    }
    return take_over(asking, now);
  }
  /// Call when the final address is known. Restarts the measurement of the delay, which excludes redirects.
  void address_found(std::size_t connection, clock::time_point now) {
    const std::lock_guard<std::mutex> guard(mutex_);
    slots_[connection].asked = now;
    if (probe_began_ == clock::time_point{}) probe_began_ = now;
  }
  /// Call before each request. Returns the bytes to request: the rest of the connection's range; the whole file if ranges
  /// do not work; none if another connection has taken the range over.
  byte_range request(std::size_t connection, clock::time_point now) {
    const std::lock_guard<std::mutex> guard(mutex_);
    slot& asking = slots_[connection];
    if (!asking.is_busy || !asking.range.is_wanted()) return {};
    asking.asked = now;
    asking.is_waiting = true;
    if (whole_) start(asking, {0, file_size_}, 0);  // the response will begin at offset 0 again
    return {asking.range.position, asking.range.end};
  }
  /// Call when the head of a response has arrived: the delay ends now.
  void responded(std::size_t connection, clock::time_point now) {
    const std::lock_guard<std::mutex> guard(mutex_);
    slot& asking = slots_[connection];
    asking.delay = std::chrono::duration<double>(now - asking.asked).count();
    asking.is_waiting = false;
    asking.is_receiving = true;
    asking.measured = asking.range.received;
  }
  /// Call after each request, also a failed one.
  void ended(std::size_t connection) {
    const std::lock_guard<std::mutex> guard(mutex_);
    slots_[connection].is_waiting = slots_[connection].is_receiving = false;
  }
  /// Call when the bytes of the connection's range before `offset` are on disk and recorded.
  void stored(std::size_t connection, std::uint64_t offset) {
    const std::lock_guard<std::mutex> guard(mutex_);
    slots_[connection].stored = offset;
  }
  [[nodiscard]] std::uint64_t stored(std::size_t connection) const {
    const std::lock_guard<std::mutex> guard(mutex_);
    return slots_[connection].stored;
  }
  /// Returns the unfetched rest of the connection's range to the plan.
  void release(std::size_t connection) {
    const std::lock_guard<std::mutex> guard(mutex_);
    slot& releasing = slots_[connection];
    const byte_range rest{releasing.stored, releasing.range.end};
    if (releasing.is_busy && !whole_ && rest.begin < rest.end) gaps_.push_back(rest);
    releasing.is_busy = false;
  }
  /// Call when a request for a range has shown that ranges do not work: from now on one connection fetches the whole file.
  /// Returns false if `connection` has already requested the whole file: then the file cannot be fetched.
  bool use_whole(std::size_t connection) {
    const std::lock_guard<std::mutex> guard(mutex_);
    if (whole_) return !slots_[connection].is_busy;
    start_whole(slots_[connection]);
    return true;
  }
  /// Call when a server answers a request for a range with the whole file: the connection takes it.
  void take_whole(std::size_t connection) {
    const std::lock_guard<std::mutex> guard(mutex_);
    start_whole(slots_[connection]);
  }
  [[nodiscard]] bool is_whole() const {
    const std::lock_guard<std::mutex> guard(mutex_);
    return whole_;
  }
  /// Call when every byte is on disk: no connection gets another range.
  void finish() {
    const std::lock_guard<std::mutex> guard(mutex_);
    stored_everything_ = true;
    gaps_.clear();
  }

  /// Whether another connection receives the body of a response.
  [[nodiscard]] bool is_another_receiving(std::size_t connection) const {
    const std::lock_guard<std::mutex> guard(mutex_);
    for (const slot& each : slots_) {
      if (&each != &slots_[connection] && each.is_busy && each.is_receiving) return true;
    }
    return false;
  }
  /// Takes a connection out of use because the server seems to want fewer. Returns false for the last one in use.
  bool park(std::size_t connection) {
    const std::lock_guard<std::mutex> guard(mutex_);
    std::size_t in_use = 0;
    for (const slot& each : slots_) in_use += each.is_parked ? 0 : 1;
    if (in_use <= 1) return false;
    slots_[connection].is_parked = true;
    return true;
  }
  void unpark(std::size_t connection) {
    const std::lock_guard<std::mutex> guard(mutex_);
    slots_[connection].is_parked = false;
  }

  /// Returns the number of bytes that have arrived but are not on disk yet.
  [[nodiscard]] std::uint64_t buffered() const {
    const std::lock_guard<std::mutex> guard(mutex_);
    std::uint64_t sum = 0;
    for (const slot& each : slots_) {
      const std::uint64_t position = each.range.position;
      if (each.is_busy && position > each.stored) sum += position - each.stored;
    }
    return sum;
  }
  /// Returns the number of bytes in all responses so far.
  [[nodiscard]] std::uint64_t received() const {
    std::uint64_t sum = 0;
    for (const slot& each : slots_) sum += each.range.received;
    return sum;
  }
  /// Measures each connection's pace over the last `seconds`. Skips connections that wait for a response.
  void measure(double seconds) {
    const std::lock_guard<std::mutex> guard(mutex_);
    for (slot& each : slots_) {
      if (!each.is_busy || each.is_waiting) continue;
      const std::uint64_t received = each.range.received;
      const double lately = static_cast<double>(received - each.measured) / seconds;
      each.measured = received;
      each.pace = each.pace < 0 ? lately : 0.7 * each.pace + 0.3 * lately;
    }
  }

 private:
  struct slot {
    cursor range;
    std::uint64_t stored = 0;    // bytes of the range before this are on disk and recorded
    std::uint64_t measured = 0;  // `received` when the pace was last measured
    double pace = -1;            // bytes a second; negative: unknown
    double delay = -1;           // seconds from the last request to its response; negative: unknown
    clock::time_point asked{};
    bool is_waiting = false;    // for the first byte of a response
    bool is_receiving = false;  // the body of a response
    bool is_busy = false;
    int takeovers = 0;  // how often the whole range was taken over from another connection
    bool is_parked = false;
  };

  static void start(slot& connection, byte_range range, int takeovers) {
    connection.stored = range.begin;
    connection.range.revoked = false;
    connection.range.position = range.begin;
    connection.range.end = range.end;
    connection.takeovers = takeovers;
    connection.is_busy = true;
  }
  void start_whole(slot& connection) {
    whole_ = true;
    gaps_.clear();
    for (slot& each : slots_) {
      if (&each == &connection) continue;  // continues with the whole file
      revoke(each, each.range.position);
      each.is_busy = false;
    }
    start(connection, {0, file_size_}, 0);
  }
  static void revoke(slot& connection, std::uint64_t end) {
    connection.range.end = end;
    connection.range.revoked = true;
  }
  [[nodiscard]] bool is_any_busy() const {
    for (const slot& each : slots_) {
      if (each.is_busy) return true;
    }
    return false;
  }
  [[nodiscard]] bool is_delay_known() const { return longest_delay() >= 0; }
  [[nodiscard]] double longest_delay() const {
    double longest = -1;
    for (const slot& each : slots_) longest = (std::max)(longest, each.delay);
    return longest;
  }
  [[nodiscard]] bool is_probe_over(clock::time_point now) const {
    return probe_began_ != clock::time_point{} && now - probe_began_ >= probe_time;
  }
  /// Returns the mean pace of the connections whose pace is known; negative if none is.
  [[nodiscard]] double mean_pace() const {
    double sum = 0;
    int known = 0;
    for (const slot& each : slots_) {
      if (each.pace >= 0) sum += each.pace, ++known;
    }
    return known > 0 ? sum / known : -1;
  }

  /// Returns the size of the next range for a connection, in bytes.
  [[nodiscard]] std::uint64_t piece(const slot& asking) const {
    if (slots_.size() == 1) return file_size_;
    std::uint64_t unassigned = 0, idle = 0;
    for (const byte_range& gap : gaps_) unassigned += gap.size();
    std::uint64_t missing = unassigned;
    for (const slot& each : slots_) {
      if (!each.is_busy) ++idle;
      if (each.is_busy && each.range.position < each.range.end)
        missing += each.range.end - each.range.position;
    }
    const auto in_blocks = [](std::uint64_t size) { return (size + block - 1) / block * block; };
    if (!is_delay_known()) {
      // The first connection measures the delay with a small piece. If probe_time passes without a response, the delay is
      // long: the other connections request larger pieces.
      return is_any_busy() ? in_blocks(std::clamp(unassigned / idle, first_piece, largest_unmeasured_piece))
                           : first_piece;
    }
    constexpr double presumed_pace = 16.0 * mebibyte;
    const double mean = mean_pace(), pace = asking.pace >= 0 ? asking.pace : mean >= 0 ? mean : presumed_pace;
    const double delay = asking.delay >= 0 ? asking.delay : longest_delay();
    const auto bytes = [](double value) { return static_cast<std::uint64_t>(value); };
    // The fair share is in proportion to the pace, so that all connections finish together.
    const double share = mean > 0 ? std::clamp(pace / mean, 0.05, 1.0) : 1.0;
    const auto fair = bytes(static_cast<double>(missing) / static_cast<double>(slots_.size()) * share);
    // After a short delay: half a second's bytes, so that the digest does not wait long for a gap to close. After a long
    // one: more, so that the delay is 1/50 of the transfer time, or 1/10 at the end, where ranges shrink.
    const auto usual = mean >= 0 ? std::clamp(bytes(pace / 2), smallest_piece, 2 * first_piece) : first_piece;
    const auto wanted = (std::max)(usual, bytes(50 * pace * delay)), least = bytes(10 * pace * delay);
    const auto size = (std::min)(fair, (std::max)((std::min)(wanted, fair / 2), least));
    return in_blocks((std::max)(size, smallest_piece));
  }

  /// Assigns half of the range that would finish last, or all of it if its connection is stalled.
  bool take_over(slot& asking, clock::time_point now) {
    const double delay = asking.delay >= 0 ? asking.delay : longest_delay();
    if (delay < 0) return false;
    slot* slowest = nullptr;
    double longest = 0;  // seconds
    for (slot& each : slots_) {
      if (&each == &asking || !each.is_busy || !each.range.is_wanted()) continue;
      const std::uint64_t rest = each.range.end - each.range.position;
      double left = static_cast<double>(rest) / (std::max)(each.pace, 1.0);
      if (each.is_waiting) {
        // A connection that waits for a response counts as stalled after twice the longest delay, and 0.25 s; the time is
        // four times as long after each takeover of the range, so that a server that has become slower can respond.
        const double waited = std::chrono::duration<double>(now - each.asked).count();
        double patience = 2 * longest_delay() + 0.25;
        for (int i = 0; i < each.takeovers; ++i) patience *= 4;
        if (waited < patience) continue;
        left = never;
      } else if (each.pace < 0 || (each.takeovers > 0 && rest < 2 * smallest_share)) {
        continue;
      }
      if (left > longest) longest = left, slowest = &each;
    }
    // Do not take over a range that will be complete within 30 ms, or before a new request could return its first byte.
    if (slowest == nullptr || longest < (std::max)(0.03, 2 * delay)) return false;
    const std::uint64_t position = slowest->range.position, end = slowest->range.end;
    const auto middle = (position + (end - position) / 2 + block - 1) / block * block;
    if (longest < never && end - position >= 2 * smallest_share) {
      revoke(*slowest, middle);
      start(asking, {middle, end}, 0);
      return true;
    }
    const byte_range rest{slowest->stored, end};
    const double alone = static_cast<double>(rest.size()) / (std::max)(asking.pace, 1.0) + delay;
    if (longest < 2 * alone) return false;  // too little gain for fetching the unstored bytes twice
    revoke(*slowest, rest.begin);
    start(asking, rest, slowest->takeovers + 1);
    return true;
  }

  static constexpr double never = 1e18;  // seconds

  const std::uint64_t file_size_;
  mutable std::mutex mutex_;  // guards the rest, except the cursors' atomics
  bool whole_ = false;        // ranges do not work: one connection fetches the whole file
  bool stored_everything_ = false;
  clock::time_point probe_began_{};
  std::vector<byte_range> gaps_;  // unassigned ranges; the next one to assign is the last element
  std::vector<slot> slots_;
};

// ---- blocks on disk

/// Writes and records the blocks of a file. Keeps the frontier, the offset before which every byte is on disk. Thread-safe.
///
/// The first writer of a block claims it. Nobody writes a block twice, even if it arrives twice: a block that was hashed
/// must not change on disk.
class block_table {
 public:
  explicit block_table(partial_file& file) : file_(file), claimed_(static_cast<std::size_t>(file.covered())) {
    for (std::uint64_t i = 0; i < file.covered(); ++i) {
      claimed_[static_cast<std::size_t>(i)] = file.has(i);
      if (file.has(i)) present_ += size_of(i);
    }
    advance();
  }

  /// Returns the ranges that are not on disk, lowest offsets first.
  [[nodiscard]] std::vector<byte_range> missing() const {
    const std::lock_guard<std::mutex> guard(mutex_);
    std::vector<byte_range> gaps;
    const auto add = [&](const byte_range& gap) {
      if (!gaps.empty() && gaps.back().end == gap.begin) {
        gaps.back().end = gap.end;
      } else if (gap.size() > 0) {
        gaps.push_back(gap);
      }
    };
    for (std::uint64_t i = 0; i < file_.covered(); ++i) {
      if (!file_.has(i)) add({i * block, i * block + size_of(i)});
    }
    add({(std::min)(file_.size(), file_.covered() * block), file_.size()});
    return gaps;
  }
  /// Writes and records the blocks that no writer has claimed. `offset` is a multiple of the block size. Ignores an
  /// incomplete last block, unless it ends the file.
  result<void> store(std::uint64_t offset, std::string_view bytes) {
    const auto end = offset + bytes.size();
    const auto first = offset / block, last = end == file_.size() ? file_.blocks() : end / block;
    std::vector<byte_range> claims;  // in blocks, not bytes
    {
      const std::lock_guard<std::mutex> guard(mutex_);
      if (claimed_.size() < last) claimed_.resize(static_cast<std::size_t>(last));
      for (auto i = first; i < last; ++i) {
        if (claimed_[static_cast<std::size_t>(i)]) continue;
        claimed_[static_cast<std::size_t>(i)] = true;
        if (claims.empty() || claims.back().end != i) claims.push_back({i, i});
        claims.back().end = i + 1;
      }
    }
    result<void> stored;
    for (const byte_range& claim : claims) {
      const auto begin = claim.begin * block, until = (std::min)(claim.end * block, end);
      const auto part =
          bytes.substr(static_cast<std::size_t>(begin - offset), static_cast<std::size_t>(until - begin));
      if (stored) stored = file_.write(begin, part);
    }
    const std::lock_guard<std::mutex> guard(mutex_);
    for (const byte_range& claim : claims) {
      if (stored) stored = file_.record(claim.begin, claim.end);
      for (auto i = claim.begin; i < claim.end; ++i) {
        if (stored) present_ += size_of(i);
        claimed_[static_cast<std::size_t>(i)] = stored.has_value();
      }
    }
    advance();
    return stored;
  }

  /// Returns the number of bytes on disk.
  [[nodiscard]] std::uint64_t present() const {
    const std::lock_guard<std::mutex> guard(mutex_);
    return present_;
  }
  [[nodiscard]] std::uint64_t frontier() const {
    const std::lock_guard<std::mutex> guard(mutex_);
    return frontier_;
  }
  [[nodiscard]] bool is_complete() const { return present() == file_.size(); }
  /// Blocks until the frontier is beyond `offset` or the table is closed. Returns the frontier.
  std::uint64_t wait_beyond(std::uint64_t offset) {
    std::unique_lock<std::mutex> held(mutex_);
    advanced_.wait(held, [&] { return closed_ || frontier_ > offset; });
    return frontier_;
  }
  /// Ends every wait_beyond, now and later.
  void close() {
    const std::lock_guard<std::mutex> guard(mutex_);
    closed_ = true;
    advanced_.notify_all();
  }

 private:
  static constexpr std::uint64_t block = partial_file::block;

  [[nodiscard]] std::uint64_t size_of(std::uint64_t index) const {
    return (std::min)(file_.size(), (index + 1) * block) - index * block;
  }
  void advance() {
    const auto before = frontier_;
    while (frontier_ < file_.size() && file_.has(frontier_ / block)) frontier_ += size_of(frontier_ / block);
    if (frontier_ != before) advanced_.notify_all();
  }

  partial_file& file_;
  mutable std::mutex mutex_;  // guards the rest, and the record of the partial file
  std::condition_variable advanced_;
  std::vector<bool> claimed_;
  std::uint64_t present_ = 0, frontier_ = 0;
  bool closed_ = false;
};

/// Computes the MD5 of a file during its download: a thread hashes the bytes before the frontier. MD5 is sequential, and as
/// slow as a fast network: hashing afterwards could double the time.
class digest_follower {
 public:
  digest_follower(const partial_file& file, block_table& table, transfer_state& state)
      : file_(file), table_(table), state_(state) {}

  /// Returns false if the system starts no thread: then compute the digest after the download.
  [[nodiscard]] bool start() { return is_started_ = thread_.start<&digest_follower::run>(this); }
  /// Blocks until the thread has hashed the file or ended early, but no longer than `limit`. Returns whether it has ended.
  bool wait(milliseconds limit) { return thread_.wait(limit); }
  void join() { thread_.join(); }

  [[nodiscard]] std::uint64_t hashed() const { return hashed_; }
  /// Whether bytes arrive faster than they are hashed and the backlog is large. Then more connections would only take
  /// processor time from the digest.
  [[nodiscard]] bool is_behind(double bytes_per_second) const {
    constexpr std::uint64_t backlog = 64 * 1024 * 1024;
    const std::uint64_t hashed = hashed_;
    return is_started_ && bytes_per_second > pace_ && table_.frontier() > hashed + backlog;
  }
  /// Returns 32 lower-case hex digits, or "" if the thread ended early. Call after join().
  [[nodiscard]] const std::string& digest() const { return digest_; }
  /// Returns the error if the file could not be read back. Call after join().
  [[nodiscard]] const std::optional<error>& failure() const { return failure_; }

 private:
  void run() {
    state_.run([this] { follow(); });
  }
  void follow() {
    md5 hash;
    page_buffer buffer;
    double busy = 0;  // seconds
    for (std::uint64_t offset = 0; offset < file_.size() && !state_.is_stopped();) {
      const auto until = table_.wait_beyond(offset);
      const auto began = clock::now();
      while (offset < until && !state_.is_stopped()) {
        const auto wanted =
            static_cast<std::size_t>((std::min<std::uint64_t>)(page_buffer::size, until - offset));
        const auto count = file_.content().read_at(offset, buffer.data(), wanted);
        if (count != static_cast<std::int64_t>(wanted)) {
          failure_ = count < 0
                         ? disk_error("read back", file_.where(), static_cast<int>(-count))
                         : error(errc::disk_failure, "cannot read back " + in_quotes(file_.where()) +
                                                         ": another program has shortened it; try again");
          state_.fail(*failure_);
          state_.stop();
          break;
        }
        hash.update({buffer.data(), wanted});
        hashed_ = offset += wanted;
      }
      busy += std::chrono::duration<double>(clock::now() - began).count();
      if (busy > 0) pace_ = static_cast<double>(offset) / busy;
    }
    if (hashed_ == file_.size()) digest_ = hash.finish();
  }

  const partial_file& file_;
  block_table& table_;
  transfer_state& state_;
  std::atomic<std::uint64_t> hashed_{0};
  std::atomic<double> pace_{0};  // bytes a second, without the waits for the frontier
  std::string digest_;
  std::optional<error> failure_;
  bool is_started_ = false;
  thread thread_;
};

// ---- the address of the file

/// The final address of a file, to which the service's redirects lead. One connection resolves it for all. If it expires,
/// one connection asks the service for a new one. Thread-safe.
class file_location {
 public:
  /// The address for one request.
  struct lease {
    url address;
    std::uint64_t generation = 0;
    // The address is the service's: this request follows the redirects, the other connections wait for the final address.
    bool is_resolving = false;
    bool is_direct = false;  // see found_file::direct_address
  };
  /// Asks the service for the file again. Returns the new address at the service.
  using renewal = std::function<result<url>(call& asking_call)>;
  static constexpr int max_renewals = 3;  // in a row, without a successful response

  /// `direct_address`: the final address, if the service has told it; else an empty one.
  file_location(url service_address, url direct_address, renewal renew)
      : service_address_(std::move(service_address)), renew_(std::move(renew)),
        final_address_(std::move(direct_address)), has_direct_(!final_address_.host.empty()) {}

  /// Returns the address for the next request. Blocks while another connection resolves it. Pass each lease to release().
  result<lease> acquire(call& asking_call) {
    std::unique_lock<std::mutex> held(mutex_);
    while (is_resolving_ && !asking_call.cancelled()) changed_.wait_for(held, milliseconds(20));
    if (asking_call.cancelled()) return asking_call.why_cancelled();
    if (!final_address_.host.empty())
      return lease{final_address_, generation_, false, has_direct_ && generation_ == 0};
    is_resolving_ = true;
    struct resolving {  // after a failure or an exception another connection tries
      file_location& location;
      std::unique_lock<std::mutex>& held;
      bool is_leased = false;
      ~resolving() {
        if (is_leased) return;
        if (!held.owns_lock()) held.lock();
        location.is_resolving_ = false;
        location.changed_.notify_all();
      }
    } at_exit{*this, held};
    const auto generation = generation_;
    if (is_renewal_due_) {
      const milliseconds pause(renewals_ > 1 ? 250 << renewals_ : 0);
      held.unlock();
      auto fresh = asking_call.sleep(pause) ? renew_(asking_call) : result<url>(asking_call.why_cancelled());
      held.lock();
      if (!fresh) return std::move(fresh).error();
      is_renewal_due_ = false;
      service_address_ = *std::move(fresh);
    }
    result<lease> leased = lease{service_address_, generation, true, false};
    at_exit.is_leased = true;
    return leased;
  }
  /// Call when redirects have led to this address: every connection may use it.
  void found(const lease& current, const url& final_address) {
    const std::lock_guard<std::mutex> guard(mutex_);
    if (!current.is_resolving || current.generation != generation_) return;
    final_address_ = final_address;
    is_resolving_ = false;
    changed_.notify_all();
  }
  /// Call when the address has led to a response: the count of renewals starts again.
  void served(const lease& current) {
    const std::lock_guard<std::mutex> guard(mutex_);
    if (current.generation == generation_) renewals_ = 0, was_served_ = true;
  }
  /// Call when the request has ended. If it failed to resolve the address, another connection tries.
  void release(const lease& current) {
    const std::lock_guard<std::mutex> guard(mutex_);
    if (!current.is_resolving || current.generation != generation_ || !final_address_.host.empty()) return;
    is_resolving_ = false;
    changed_.notify_all();
  }
  /// Call when the file's server has refused the address: it may have expired. Returns true if the next acquire() asks for
  /// a new one, false after max_renewals.
  bool renew(const lease& refused) {
    const std::lock_guard<std::mutex> guard(mutex_);
    if (refused.generation != generation_) return true;  // another connection was faster
    if (renewals_ == max_renewals) return false;
    ++renewals_;
    is_renewal_due_ = true;
    reset();
    return true;
  }
  /// Call when the file's server cannot be reached: the next request follows the redirects again.
  void forget(const lease& unreachable) {
    const std::lock_guard<std::mutex> guard(mutex_);
    if (unreachable.generation == generation_ && !unreachable.is_resolving) reset();
  }
  /// Whether any address has led to a response.
  [[nodiscard]] bool was_served() const {
    const std::lock_guard<std::mutex> guard(mutex_);
    return was_served_;
  }

 private:
  void reset() {
    ++generation_;
    final_address_ = {};
    is_resolving_ = false;
    changed_.notify_all();
  }

  mutable std::mutex mutex_;  // guards the rest
  std::condition_variable changed_;
  url service_address_;
  const renewal renew_;
  url final_address_;      // unknown if it has no host
  const bool has_direct_;  // the first generation's address is the direct one
  std::uint64_t generation_ = 0;
  int renewals_ = 0;
  bool is_resolving_ = false, is_renewal_due_ = false, was_served_ = false;
};

/// The entity tag (RFC 9110, section 8.8.3) of the first response. Later responses must have the same. Thread-safe.
class entity_pin {
 public:
  /// Returns false if the response has another tag.
  bool accept(const http_response& head) {
    const std::string* tag = head.header("ETag");
    const std::lock_guard<std::mutex> guard(mutex_);
    if (tag == nullptr || is_ignored_) return true;
    if (tag_.empty()) tag_ = *tag;
    return *tag == tag_;
  }
  /// Returns the tag if it is strong, else "". Strong tags alone may be sent as If-Range, and prove that parts of several
  /// responses belong together (RFC 9110, sections 13.1.5 and 15.3.7.3).
  [[nodiscard]] std::string strong_tag() const {
    const std::lock_guard<std::mutex> guard(mutex_);
    return is_ignored_ || starts_with(tag_, "W/") ? std::string() : tag_;
  }
  /// Ignores all tags from now on. Call if several servers of the same content have different tags.
  void ignore() {
    const std::lock_guard<std::mutex> guard(mutex_);
    is_ignored_ = true;
  }
  /// Forgets the tag. The next response sets it anew.
  void reset() {
    const std::lock_guard<std::mutex> guard(mutex_);
    tag_.clear();
  }

 private:
  mutable std::mutex mutex_;
  std::string tag_;
  bool is_ignored_ = false;
};

/// Content-Range: bytes first-last/size (RFC 9110, section 14.4). `size` is empty for "*". `bytes` is empty if the text is
/// malformed.
struct content_range {
  byte_range bytes;
  std::optional<std::uint64_t> size;

  static content_range parse(std::string_view text) {
    text = trim(text);
    if (!equal_ignoring_case(text.substr(0, 6), "bytes ")) return {};
    const auto dash = text.find('-'), slash = text.find('/');
    if (dash == std::string_view::npos || slash == std::string_view::npos || dash > slash) return {};
    const auto first = to_number(trim(text.substr(6, dash - 6)));
    const auto last = to_number(trim(text.substr(dash + 1, slash - dash - 1)));
    const auto size = to_number(trim(text.substr(slash + 1)));
    if (!first || !last || *last < *first || *last + 1 == 0 || (!size && trim(text.substr(slash + 1)) != "*"))
      return {};
    return {{*first, *last + 1}, size};
  }
};

// ---- the job

/// The file to transfer, and the call that asks for it.
struct transfer_job {
  session& service_session;
  call& user_call;
  const run_path& run;
  const std::string& name;
  const restore_options& options;
  const found_file& remote;
  const char* task = "downloading";

  [[nodiscard]] std::string label() const { return task + (' ' + in_quotes(name)) + " of " + run.str(); }
  /// Whether the transfer checks the md5: the caller wants it, and the service has told it.
  [[nodiscard]] bool is_verified() const { return options.verify && !remote.info.md5.empty(); }
  /// Whether the size or the md5 is known, so that other content would be noticed.
  [[nodiscard]] bool is_checked() const { return remote.info.size || is_verified(); }
};

/// How a transfer reacts to a failed request.
enum class reaction {
  none,       // no failure, or already handled: continue
  retry,      // try again if the error is transient
  use_fewer,  // as retry; the server may accept fewer connections only
  use_whole,  // the server does not support ranges: fetch the whole file
  restart,    // the file has changed, or its bytes are wrong: start a new download
};

/// The outcome of a request or a download.
struct fetch_outcome {
  reaction next = reaction::none;
  std::optional<error> failure = {};  // why the request or download is incomplete

  [[nodiscard]] bool has_failed() const { return failure.has_value(); }
};

// ---- what the requests of a transfer share

class file_request;

/// The beginning of a response. Recognises answers that are not the file: a proxy has compressed them, or another server has
/// sent a page.
class response_sample {
 public:
  void start(const http_response& head, const std::string& mimetype) {
    head_ = head;
    coding_ = unwanted_coding(head);
    const auto without_parameters = [](std::string_view type) {
      return lower(trim(type.substr(0, type.find(';'))));
    };
    const std::string* field = head.header("Content-Type");
    const std::string type = without_parameters(field != nullptr ? *field : std::string());
    is_html_ = type == "text/html";
    is_other_text_ =
        type != without_parameters(mimetype) && (starts_with(type, "text/") || type == "application/json");
  }
  void write(std::string_view bytes) {
    received_ += bytes.size();
    text_.append(bytes.substr(0, max_described - text_.size()));
  }
  [[nodiscard]] bool is_full() const { return text_.size() == max_described; }
  [[nodiscard]] bool is_coded() const { return !coding_.empty(); }
  /// Whether the whole body has arrived. False for a body that ends with the connection: it may have been cut off.
  [[nodiscard]] bool is_whole() const {
    const std::string* length = head_.header("Content-Length");
    return length != nullptr ? to_number(trim(*length)) == received_
                             : head_.header("Transfer-Encoding") != nullptr;
  }
  /// Returns text to append to a failure; empty if nothing is suspicious. Quotes only pages and texts of another type than the
  /// file has: the file's own content may be private.
  [[nodiscard]] std::string remark(const session& service_session, const std::string& authorization) const {
    if (is_coded()) return "; " + coding_;
    const bool is_page = is_html_ || is_other_text_ || starts_with(trim(text_), "<");
    if (head_.status != 200 || text_.empty() || !is_page) return {};
    return "; " + service_session.description(head_, text_, authorization);
  }

 private:
  http_response head_;
  std::string coding_, text_;
  std::uint64_t received_ = 0;
  bool is_html_ = false, is_other_text_ = false;
};

/// The state that the requests for one file share: its address, its entity tag, and whether to stop. Thread-safe.
class file_access {
 public:
  file_access(const file_access&) = delete;
  file_access& operator=(const file_access&) = delete;
  /// Whether the run has replaced the file since this object was made.
  [[nodiscard]] bool is_replaced() const { return is_replaced_; }
  /// Returns text to append to the error for a wrong md5; empty if no response was suspicious.
  [[nodiscard]] std::string remark() {
    const std::lock_guard<std::mutex> guard(remark_mutex_);
    return remark_;
  }

 protected:
  file_access(const transfer_job& job, const url& service_address)
      : job_(job), location_(service_address, url::parse(job.remote.direct_address).value_or(url()),
                             [this](call& asking_call) { return ask_again(asking_call); }) {}
  ~file_access() = default;

  const transfer_job& job_;
  transfer_state state_;
  file_location location_;
  entity_pin entity_;
  std::atomic<bool> is_replaced_{false};

 private:
  friend class file_request;

  /// Asks the service for the file's address again. Fails if the run has replaced the file; then is_replaced() is true.
  result<url> ask_again(call& asking_call) {
    auto fresh = service(job_.service_session, asking_call).find_file(job_.run, job_.name);
    if (!fresh)
      return error::permanent(fresh.error().code(), fresh.error().what(), fresh.error().http_status());
    const file_info& known = job_.remote.info;
    if (fresh->info.md5 != known.md5 || fresh->info.size != known.size) {
      is_replaced_ = true;
      return error(errc::protocol_violation,
                   job_.label() + ": the run has replaced the file meanwhile; try again");
    }
    return url::parse(fresh->address);
  }

  std::mutex remark_mutex_;  // guards remark_
  std::string remark_;
};

/// The base of both kinds of transfer. Supervises the threads, enforces the limits, reports progress.
class transfer : public file_access {
 protected:
  transfer(const transfer_job& job, partial_file& destination, const url& service_address)
      : file_access(job, service_address), file_(destination), retries_(job.user_call),
        reporter_(job.user_call, job.options, job.name) {}
  ~transfer() = default;

  /// Waits in the caller's thread until the transfer is complete or stopped. Calls `tick` ten times a second. Stops the
  /// transfer when the call is cancelled or the retry clock has expired.
  template <class Tick>
  void supervise(Tick tick) {
    while (!state_.wait(milliseconds(100))) {
      if (reporter_.is_due()) tick();
      if (job_.user_call.cancelled()) {
        state_.fail(job_.user_call.why_cancelled());
      } else if (auto expired = retries_.expired()) {
        state_.fail(*expired);
      }
    }
  }
  /// Measures the pace of all connections together. `received` counts the bytes of all responses so far.
  void measure(std::uint64_t received) {
    const double lately = static_cast<double>(received - received_before_) / reporter_.elapsed();
    received_before_ = received;
    pace_ = pace_ == 0 ? lately : 0.8 * pace_ + 0.2 * lately;
  }
  /// Reports progress to the retry clock if `arrived`, the number of bytes present, has a new maximum. Returns the maximum.
  std::uint64_t advance(std::uint64_t arrived) {
    std::uint64_t before = arrived_;
    while (before < arrived && !arrived_.compare_exchange_weak(before, arrived)) {}
    if (before < arrived) retries_.progressed(arrived - before);
    return (std::max)(before, arrived);
  }

  partial_file& file_;
  retry_clock retries_;
  progress_reporter reporter_;
  std::atomic<double> pace_{0};  // of all connections together, in bytes a second

 private:
  std::uint64_t received_before_ = 0;      // `received` of the last measure()
  std::atomic<std::uint64_t> arrived_{0};  // the maximum, in bytes
};

// ---- one request for a file

/// One request for a file or a range of it: checks the response, and takes its body.
class file_request : public body_sink {
 public:
  /// Makes the request. Without a failure, either has_ended() is true, or the caller must request again at once, for
  /// example from a new address.
  fetch_outcome fetch();

  /// Whether the transport delivered a response of status 200 or 206 to its end.
  [[nodiscard]] bool has_ended() const { return has_ended_; }
  /// Whether the response had another entity tag than an earlier one.
  [[nodiscard]] bool met_other_entity() const { return is_other_entity_; }
  /// Makes a failure with the text "<label of the job>: <address> <problem>".
  [[nodiscard]] fetch_outcome failure(reaction next, errc code, const std::string& problem) const {
    return {next, error(code, requester_.job_.label() + ": " + address_.redacted() + " " + problem)};
  }
  /// Makes the failure for a response that lacks bytes. The failure is permanent if the response is complete and is not the
  /// file.
  [[nodiscard]] fetch_outcome ended_early(std::uint64_t missing) const {
    const bool is_foreign = !remark_.empty() && sample_.is_whole();
    return failure(reaction::retry, is_foreign ? errc::protocol_violation : errc::connection_failed,
                   "ended " + std::to_string(missing) + " bytes early" + remark_);
  }
  /// Whether the transfer still needs the bytes. The transport may ask from another thread.
  [[nodiscard]] virtual bool is_wanted() const { return !requester_.state_.is_stopped(); }

  bool start(const http_response& head) final;
  bool write(std::string_view bytes) final {
    has_body_ = true;
    sample_.write(bytes);
    return problem_.has_failed() ? is_sampled() : take(bytes);
  }

 protected:
  /// An `asked.end` of 0 stands for the end of the file; {0, 0} is the whole file, requested without a Range field.
  /// `on_violation`: how to react to a response that breaks the protocol.
  file_request(file_access& requester, call& user_call, byte_range asked, reaction on_violation)
      : requester_(requester), call_(user_call), asked_(asked), on_violation_(on_violation) {}
  ~file_request() = default;

  [[nodiscard]] bool is_range() const { return asked_.begin > 0 || asked_.end > 0; }
  [[nodiscard]] fetch_outcome wrong_size(reaction next, std::uint64_t size) const {
    return failure(next, errc::checksum_mismatch,
                   "has " + std::to_string(size) + " bytes, the service says " +
                       std::to_string(*requester_.job_.remote.info.size));
  }
  [[nodiscard]] fetch_outcome violation(const std::string& problem) const {
    return failure(on_violation_, errc::protocol_violation, problem);
  }
  /// For take(): refuses bytes beyond the end of the response or the file.
  bool refuse_surplus() {
    problem_ = violation("sends more than it promised");
    return false;
  }

 private:
  /// Called when redirects have led away from the service. Returns whether other connections wait for the address.
  virtual bool address_found() { return false; }
  /// Whether a response of status 200 or 206 has the same entity tag as those before it.
  [[nodiscard]] virtual bool is_same_entity(const http_response& head) {
    return requester_.entity_.accept(head);
  }
  /// Reports the head of a response of status 200 or 206.
  virtual void responded() {}
  /// Checks a response with the requested range or the beginning of it.
  virtual fetch_outcome begin_part(const http_response& head, const content_range& part) = 0;
  /// Checks a response with the whole file. `length` is empty if the response does not tell it.
  virtual fetch_outcome begin_whole(const http_response& head, std::optional<std::uint64_t> length) = 0;
  /// Takes a piece of the body. Returns false to stop.
  virtual bool take(std::string_view bytes) = 0;

  /// Whether to continue to read a response of the wrong size, so that the error can quote its beginning.
  [[nodiscard]] bool is_sampled() const {
    return problem_.failure->code() == errc::checksum_mismatch && !sample_.is_coded() && !sample_.is_full();
  }
  [[nodiscard]] fetch_outcome begin(const http_response& head);
  [[nodiscard]] fetch_outcome refused(const answer& got, const std::string& authorization);
  [[nodiscard]] fetch_outcome other_entity(call& asking_call);

  file_access& requester_;
  call& call_;
  const byte_range asked_;
  const reaction on_violation_;
  file_location::lease lease_;
  url address_;            // of the request; after redirects, of the response
  fetch_outcome problem_;  // the reason for which the response was refused
  response_sample sample_;
  std::string remark_;  // text to append to a failure
  bool is_other_entity_ = false, has_body_ = false, has_ended_ = false;
};

inline fetch_outcome file_request::fetch() {
  const transfer_job& job = requester_.job_;
  file_location& location = requester_.location_;
  call asking_call(call_, requester_.state_.stop_flag());
  auto lease = location.acquire(asking_call);
  if (!lease) return {reaction::retry, lease.error()};
  lease_ = *std::move(lease);
  const struct releaser {  // the transport may throw
    file_location& location;
    const file_location::lease& held;
    ~releaser() { location.release(held); }
  } at_exit{location, lease_};
  address_ = lease_.address;
  result<std::string> authorization{std::string()};
  if (job.service_session.is_own(address_)) authorization = job.service_session.authorization(asking_call);
  if (!authorization) {
    const error& refusal = authorization.error();
    return {reaction::retry, error::permanent(refusal.code(), refusal.what(), refusal.http_status())};
  }
  http_request request;
  if (is_range()) {
    const std::string last = asked_.end > 0 ? std::to_string(asked_.end - 1) : std::string();
    add_header(request.headers, "Range", "bytes=" + std::to_string(asked_.begin) + '-' + last);
    if (const auto tag = requester_.entity_.strong_tag(); !tag.empty())
      add_header(request.headers, "If-Range", tag);
  }
  request.is_cancelled = [this] { return !is_wanted(); };
  const auto got = job.service_session.send(
      call_, std::move(request), *authorization, *this, address_, [&](const url& hop) {
        const bool is_final = !job.service_session.is_own(hop);
        if (is_final && address_found()) location.found(lease_, hop);  // before the response: others wait
      });
  remark_ = sample_.remark(job.service_session, *authorization);
  if (sample_.is_coded() || !job.remote.info.size) {
    const std::lock_guard<std::mutex> guard(requester_.remark_mutex_);
    requester_.remark_ = remark_;
  }
  fetch_outcome outcome;
  const bool is_served = got && (got->head.status == 200 || got->head.status == 206);
  if (is_other_entity_) {
    outcome = other_entity(asking_call);
  } else if (lease_.is_direct && !problem_.has_failed() && !has_body_ && !is_served &&
             (got || got.error().code() != errc::cancelled)) {
    location.forget(lease_);  // the next request uses the service's own address
    if (job.remote.direct_is_refused != nullptr) *job.remote.direct_is_refused = true;
  } else if (problem_.has_failed()) {
    outcome = problem_;
    const bool is_compressed = sample_.is_coded() && outcome.failure->code() == errc::checksum_mismatch;
    const auto code = is_compressed ? errc::protocol_violation : outcome.failure->code();
    if (!remark_.empty()) outcome.failure = error(code, outcome.failure->what() + remark_);
  } else if (!got) {
    outcome = {reaction::use_fewer, got.error()};
    if (!has_body_ && got.error().code() != errc::cancelled) location.forget(lease_);
  } else if (!is_served) {
    outcome = refused(*got, *authorization);
  } else {
    has_ended_ = true;
  }
  return outcome;
}

inline bool file_request::start(const http_response& head) {
  sample_.start(head, requester_.job_.remote.info.mimetype);
  is_other_entity_ = !is_same_entity(head);
  if (is_other_entity_) return false;
  responded();
  if (!is_wanted()) return false;
  problem_ = begin(head);
  if (!problem_.has_failed() && sample_.is_coded() && !requester_.job_.is_checked())
    problem_ = failure(reaction::retry, errc::protocol_violation, "sends bytes that cannot be checked");
  if (problem_.has_failed()) return is_sampled();
  requester_.location_.found(lease_, address_);
  requester_.location_.served(lease_);
  return true;
}

/// RFC 9110, section 15.3.7.
inline fetch_outcome file_request::begin(const http_response& head) {
  const std::string* field = head.header("Content-Range");
  const auto part = content_range::parse(field != nullptr ? *field : "");
  // Some stores answer a range with 200. A Content-Range then distinguishes the part from the whole file.
  if (head.status != 206 && (!is_range() || part.bytes.end == 0)) {
    const std::string* length = head.header("Content-Length");
    return begin_whole(head, length != nullptr ? to_number(trim(*length)) : std::nullopt);
  }
  if (!is_range() || part.bytes.end == 0) return violation("answers 206 without a requested range");
  if (part.bytes.begin != asked_.begin || (asked_.end != 0 && part.bytes.end > asked_.end))
    return violation("sends a range that was not requested (" + in_quotes(*field) + ")");
  return begin_part(head, part);
}

/// Interprets a status that is neither 200 nor 206.
inline fetch_outcome file_request::refused(const answer& got, const std::string& authorization) {
  const int status = got.head.status;
  const session& service_session = requester_.job_.service_session;
  error refusal = service_session.status_error(requester_.job_.label() + ": " + address_.redacted(), got,
                                               address_, authorization);
  const bool is_own =
      service_session.is_own(address_) && address_.str() == lease_.address.str() && lease_.is_resolving;
  // Some stores answer 400 to an expired signature, and say so in the body. A storage node that lost the file answers 404.
  const bool has_expired = status == 401 || status == 403 || status == 410 ||
                           (status == 404 && requester_.location_.was_served()) ||
                           (status == 400 && contains_ignoring_case(got.body, "expired"));
  if (!is_own && has_expired) {
    if (requester_.location_.renew(lease_)) return {};
    return {reaction::use_fewer,
            error(status == 401 || status == 403 ? errc::permission_denied : errc::http_failure,
                  std::string(refusal.what()) + ", also with " + std::to_string(file_location::max_renewals) +
                      " new addresses",
                  status)};
  }
  if (is_range() && (status == 400 || status == 405 || status == 416 || status == 501))
    return {reaction::use_whole, refusal};
  return {refusal.is_transient() ? reaction::use_fewer : reaction::retry, refusal};
}

/// Handles a response with another entity tag. Asks the service whether the run has replaced the file. If it has not, the
/// servers of the storage use different tags. Then ignores tags if there is an md5; otherwise parts cannot be combined.
inline fetch_outcome file_request::other_entity(call& asking_call) {
  const auto same = requester_.ask_again(asking_call);
  if (!same) return {reaction::retry, same.error()};
  if (requester_.job_.is_verified()) {
    requester_.entity_.ignore();
    return {};
  }
  return failure(reaction::use_whole, errc::connection_failed, "has another entity tag than before");
}

// ---- transfers

/// Transfers a file of known size and md5: several connections fetch ranges while the digest_follower hashes.
class ranged_transfer final : public transfer {
 public:
  ranged_transfer(const transfer_job& job, partial_file& destination, const url& service_address)
      : transfer(job, destination, service_address), table_(destination),
        plan_(connections(), destination.size(), table_.missing()), digest_(destination, table_, state_) {}
  ~ranged_transfer() { end(); }  // on_progress may have thrown

  /// Fetches the missing blocks. Returns the md5 of the whole file.
  result<std::string> run();

 private:
  class range_request;
  static constexpr int patience = 3;  // failures of a connection before the transfer tries with fewer
  static constexpr int max_connections = 64;

  [[nodiscard]] std::size_t connections() const {
    const std::uint64_t missing = file_.size() - table_.present();
    if (missing < range_plan::worth_splitting) return 1;
    const auto wanted = static_cast<std::uint64_t>((std::min)(job_.options.connections, max_connections));
    return static_cast<std::size_t>((std::min)(wanted, missing / range_plan::first_piece));
  }
  void start_workers();
  void work(std::size_t connection);
  void fetch_range(std::size_t connection, std::string& buffer, milliseconds& park_time);
  bool wait_for_range(std::size_t connection);
  fetch_outcome fetch(std::size_t connection, std::string& buffer);
  bool flush(std::size_t connection, std::string& buffer);
  void flush_whole_blocks(std::size_t connection, std::string& buffer);
  void tick(phase now);
  void end();

  block_table table_;
  range_plan plan_;
  clock::time_point touched_ = clock::now();
  digest_follower digest_;
  struct worker {
    ranged_transfer* owner = nullptr;
    std::size_t connection = 0;
    thread handle = {};
    void run() { owner->work(connection); }
  };
  std::vector<worker> workers_;
};

/// Checks a response against the requested range, and stores its bytes.
class ranged_transfer::range_request final : public file_request {
 public:
  static constexpr std::uint64_t chunk = 4 * partial_file::block;  // bytes: a connection's buffer

  range_request(ranged_transfer& transfer, std::size_t connection, byte_range asked, std::string& buffer)
      : file_request(transfer, transfer.job_.user_call,
                     asked.size() < transfer.file_.size() ? asked : byte_range(), reaction::use_whole),
        transfer_(transfer), connection_(connection), cursor_(transfer.plan_[connection]),
        begin_(asked.begin), promised_end_(asked.end), buffer_(buffer) {}

  [[nodiscard]] bool is_wanted() const override {
    return file_request::is_wanted() && !cursor_.is_taken_over();
  }
  /// Whether the response is complete but a part of the requested range (RFC 9110, section 15.3.7), at least a block long.
  [[nodiscard]] bool is_short() const {
    return cursor_.position == promised_end_ && cursor_.position >= begin_ + partial_file::block;
  }

 private:
  bool address_found() override {
    transfer_.plan_.address_found(connection_, clock::now());
    return true;
  }
  void responded() override { transfer_.plan_.responded(connection_, clock::now()); }
  fetch_outcome begin_part(const http_response&, const content_range& part) override {
    if (part.size && *part.size != transfer_.file_.size()) return wrong_size(reaction::use_whole, *part.size);
    promised_end_ = part.bytes.end;
    return {};
  }
  /// If the server has ignored Range, this connection becomes the only one.
  fetch_outcome begin_whole(const http_response&, std::optional<std::uint64_t> length) override {
    const std::uint64_t size = transfer_.file_.size();
    if (length && *length != size) return wrong_size(reaction::retry, *length);
    if (is_range()) {
      transfer_.plan_.take_whole(connection_);
      buffer_.clear();
      begin_ = 0;
    }
    promised_end_ = size;
    return {};
  }
  bool take(std::string_view bytes) override {
    cursor_.received += bytes.size();
    while (!bytes.empty()) {
      const std::uint64_t position = cursor_.position, wanted_end = cursor_.end;
      const auto end = (std::min)(wanted_end, promised_end_);
      if (transfer_.state_.is_stopped()) return false;
      if (position >= end) return refuse_surplus();
      // A short 206 may end inside a block. The rest of the block stays in the buffer until the next response completes it.
      const auto boundary = (std::min)((position / chunk + 1) * chunk, wanted_end);
      const auto taken = static_cast<std::size_t>(
          (std::min<std::uint64_t>)(bytes.size(), (std::min)(boundary, end) - position));
      buffer_.append(bytes.substr(0, taken));
      bytes.remove_prefix(taken);
      cursor_.position = position + taken;
      if (position + taken == boundary && !transfer_.flush(connection_, buffer_)) return false;
    }
    return true;
  }

  ranged_transfer& transfer_;
  const std::size_t connection_;
  range_plan::cursor& cursor_;
  std::uint64_t begin_, promised_end_;  // the range that the response announces
  std::string& buffer_;
};

inline result<std::string> ranged_transfer::run() {
  static_assert(range_plan::smallest_share >= range_request::chunk,
                "a buffer must not reach into the half of a range that another connection takes over");
  const bool is_followed = digest_.start();
  if (table_.is_complete()) {
    state_.complete();
  } else {
    start_workers();
  }
  if (!job_.remote.direct_address.empty()) plan_.address_found(0, clock::now());
  supervise([&] { tick(phase::downloading); });
  while (is_followed && state_.is_complete() && !digest_.wait(milliseconds(100))) {
    if (reporter_.is_due()) tick(phase::verifying);
    if (job_.user_call.cancelled()) state_.stop();
  }
  end();
  state_.rethrow();
  if (auto failure = state_.failure()) return *failure;
  if (digest_.failure()) return *digest_.failure();
  if (job_.user_call.cancelled()) return job_.user_call.why_cancelled();
  std::string digest = digest_.digest();
  if (!is_followed) {
    digest = md5_of_file(file_.content(), [&](std::uint64_t done) {
      return reporter_.report_if_due(phase::verifying, done, file_.size());
    });
  }
  reporter_.report(phase::verifying, file_.size(), file_.size(), pace_);
  if (job_.user_call.cancelled()) return job_.user_call.why_cancelled();
  return digest;
}

inline void ranged_transfer::start_workers() {
  workers_ = std::vector<worker>(plan_.connections());
  for (std::size_t connection = 0; connection < workers_.size(); ++connection) {
    workers_[connection].owner = this;
    workers_[connection].connection = connection;
    if (workers_[connection].handle.start<&worker::run>(&workers_[connection])) continue;
    if (connection == 0) state_.fail(no_thread(job_.label()));
    for (; connection < workers_.size(); ++connection) plan_.park(connection);  // fewer connections
  }
}

inline void ranged_transfer::end() {
  state_.stop();
  table_.close();
  for (auto& each : workers_) each.handle.join();
  digest_.join();
}

inline void ranged_transfer::tick(phase now) {
  plan_.measure(reporter_.elapsed());
  measure(plan_.received());
  // Count buffered bytes. A take-over discards some of them: advance() keeps the reported number from falling.
  const auto arrived = advance((std::min)(table_.present() + plan_.buffered(), file_.size()));
  if (now == phase::verifying && clock::now() - touched_ > std::chrono::seconds(partial_file::quiet / 6)) {
    touched_ = clock::now();
    file_.touch();
  }
  reporter_.report(now, now == phase::verifying ? digest_.hashed() : arrived, file_.size(), pace_);
}

/// Stores the buffer of a connection, which begins at the end of the stored part of the range. A failure stops the transfer;
/// then it returns false.
inline bool ranged_transfer::flush(std::size_t connection, std::string& buffer) {
  if (buffer.empty()) return true;
  const auto begin = plan_.stored(connection);
  if (auto stored = table_.store(begin, buffer); !stored) {
    state_.fail(stored.error());
    return false;
  }
  advance(table_.present());  // here, too: the caller's thread may be blocked in on_progress
  plan_.stored(connection, begin + buffer.size());
  buffer.clear();
  return true;
}

/// Stores the complete blocks in the buffer when a connection gives its range up: the record has complete blocks only.
inline void ranged_transfer::flush_whole_blocks(std::size_t connection, std::string& buffer) {
  const auto stored = plan_.stored(connection);
  const auto end = (std::min)(stored + buffer.size(), plan_[connection].end.load());
  const auto whole = end == file_.size() ? end : end / partial_file::block * partial_file::block;
  buffer.resize(static_cast<std::size_t>((std::max)(whole, stored) - stored));
  flush(connection, buffer);
}

/// One connection: fetches range after range until every byte is on disk.
inline void ranged_transfer::work(std::size_t connection) {
  std::string buffer;
  const bool has_ended = state_.run([&] {
    buffer.reserve(static_cast<std::size_t>(range_request::chunk));
    milliseconds park_time(5000);
    while (wait_for_range(connection)) {
      buffer.clear();
      fetch_range(connection, buffer, park_time);
      flush_whole_blocks(connection, buffer);
      plan_.release(connection);
      plan_.unpark(connection);
    }
  });
  if (!has_ended) state_.run([&] { flush_whole_blocks(connection, buffer); });  // keep the bytes that arrived
}

/// Waits for a range to fetch. Returns false when the transfer is complete or stopped.
inline bool ranged_transfer::wait_for_range(std::size_t connection) {
  while (!state_.is_over()) {
    if (table_.is_complete()) {
      plan_.finish();
      state_.complete();
      return false;
    }
    // Never hold up the first two connections: the digest may wait for their ranges.
    const bool is_needed = connection < 2 || !digest_.is_behind(pace_);
    if (is_needed && plan_.assign(connection, clock::now())) return true;
    state_.wait(milliseconds(20));
  }
  return false;
}

/// Fetches the connection's range with as many requests as necessary. Returns early if another connection takes the range
/// over. If the server seems to want fewer connections, returns the range, waits for `park_time`, and doubles `park_time`.
inline void ranged_transfer::fetch_range(std::size_t connection, std::string& buffer,
                                         milliseconds& park_time) {
  const auto& cursor = plan_[connection];
  backoff tries(job_.user_call, retries_);
  while (cursor.is_wanted() && !state_.is_over()) {
    const std::uint64_t position = cursor.position, present = table_.present();
    const fetch_outcome outcome = fetch(connection, buffer);
    if (!outcome.has_failed() || state_.is_over()) continue;
    if (outcome.next == reaction::use_whole && plan_.use_whole(connection)) continue;
    if (outcome.next == reaction::restart) is_replaced_ = true;
    const std::uint64_t reached = cursor.position;
    const std::uint64_t gained =
        plan_.is_whole() ? table_.present() - present : reached - (std::min)(position, reached);
    if (tries.retries_at_once(*outcome.failure, gained)) continue;
    const bool is_hopeless = !outcome.failure->is_transient() || tries.failures() + 1 >= patience ||
                             outcome.failure->retry_after() > std::chrono::seconds(1);
    if (outcome.next == reaction::use_fewer && is_hopeless && plan_.is_another_receiving(connection) &&
        plan_.park(connection)) {
      // Another connection receives bytes: the server may limit their number. Try again later.
      flush_whole_blocks(connection, buffer);
      plan_.release(connection);
      state_.wait((std::max)(park_time, outcome.failure->retry_after()));
      park_time = (std::min)(park_time * 2, milliseconds(60000));
      return;
    }
    const auto wait = tries.after(*outcome.failure);
    if (!wait) return state_.fail(wait.error());
    for (const auto until = clock::now() + *wait; cursor.is_wanted() && clock::now() < until;) {
      if (state_.wait((std::min)(std::chrono::ceil<milliseconds>(until - clock::now()), milliseconds(20))))
        break;
    }
  }
}

/// Makes one request for the rest of a connection's range.
inline fetch_outcome ranged_transfer::fetch(std::size_t connection, std::string& buffer) {
  const auto& cursor = plan_[connection];
  const byte_range asked = plan_.request(connection, clock::now());
  if (asked.size() == 0) return {};      // another connection has taken the range over
  if (asked.begin == 0) buffer.clear();  // the whole file: earlier bytes will arrive again
  range_request request(*this, connection, asked, buffer);
  const fetch_outcome outcome = request.fetch();
  plan_.ended(connection);
  if (!request.is_wanted()) return {};
  if (outcome.has_failed() || !request.has_ended() || !cursor.is_wanted() || request.is_short())
    return outcome;
  return request.ended_early(cursor.end - cursor.position);
}

/// Transfers a file of unknown size or md5: one connection fetches it, because ranges could not be verified together. Hashes
/// the bytes as they arrive if the md5 is known.
class stream_transfer final : public transfer {
 public:
  stream_transfer(const transfer_job& job, partial_file& destination, const url& service_address)
      : transfer(job, destination, service_address), total_(job.remote.info.size) {}
  ~stream_transfer() { end(); }

  /// Fetches the file. Returns its md5, or "" if it is not verified.
  result<std::string> run();

 private:
  class stream_request;

  void run_worker() {
    state_.run([this] { work(); });
  }
  void work();
  fetch_outcome fetch();
  void start_over();
  /// Whether the md5 proves that all bytes have arrived.
  [[nodiscard]] bool is_proved() const {
    return job_.is_verified() && md5(hash_).finish() == job_.remote.info.md5;
  }
  void end() {
    state_.stop();
    worker_.join();
  }

  std::atomic<std::uint64_t> received_{0};  // bytes of all responses
  std::atomic<std::uint64_t> position_{0};  // offset of the next byte to arrive
  // Only the worker uses the next two.
  md5 hash_;                            // of the bytes before `position_`
  std::optional<std::uint64_t> total_;  // the file's size, from the service or a response; empty if unknown
  thread worker_;
};

/// Checks a response and appends its bytes to the file.
class stream_transfer::stream_request final : public file_request {
 public:
  explicit stream_request(stream_transfer& transfer)
      : file_request(transfer, transfer.job_.user_call, {transfer.position_, 0}, reaction::retry),
        transfer_(transfer) {}

  /// Whether the response has fewer bytes than were present already.
  [[nodiscard]] bool is_shorter() const { return skipped_ > 0; }
  [[nodiscard]] fetch_outcome shorter() const {
    return failure(reaction::restart, errc::protocol_violation, "became shorter during the download");
  }

 private:
  fetch_outcome begin_part(const http_response& head, const content_range& part) override {
    // Without an md5 only the entity tag proves that both parts are of one file (RFC 9110, section 15.3.7.3).
    const bool is_pinned = !transfer_.entity_.strong_tag().empty() && head.header("ETag") != nullptr;
    if (!transfer_.job_.is_verified() && !is_pinned)
      return failure(reaction::use_whole, errc::connection_failed, "sends a part without the entity tag");
    if (!part.size) return violation("does not tell the size of the file");
    if (transfer_.total_ && *part.size != *transfer_.total_) {
      return failure(reaction::restart, errc::protocol_violation, "changed its size while it was fetched");
    }
    return check_total(part.size);
  }
  fetch_outcome begin_whole(const http_response&, std::optional<std::uint64_t> length) override {
    // With an md5, skip the bytes already present; without one, start over.
    if (transfer_.job_.is_verified()) {
      skipped_ = transfer_.position_;
    } else if (transfer_.position_ > 0) {
      transfer_.start_over();
    }
    return check_total(length);
  }
  fetch_outcome check_total(std::optional<std::uint64_t> size) {
    if (!size) return {};
    if (transfer_.job_.remote.info.size && *size != *transfer_.job_.remote.info.size)
      return wrong_size(reaction::retry, *size);
    if (*size < transfer_.position_) return shorter();
    transfer_.total_ = size;
    return {};
  }
  bool take(std::string_view bytes) override {
    transfer_.received_ += bytes.size();
    const auto skipped = static_cast<std::size_t>((std::min<std::uint64_t>)(bytes.size(), skipped_));
    bytes.remove_prefix(skipped);
    skipped_ -= skipped;
    if (bytes.empty()) return true;
    const std::uint64_t position = transfer_.position_;
    if (!is_wanted()) return false;
    if (transfer_.total_ && bytes.size() > *transfer_.total_ - position) return refuse_surplus();
    auto written = partial_file::check_limit(position + bytes.size());  // the size may be unknown
    if (written) written = transfer_.file_.write(position, bytes);
    if (!written) {
      transfer_.state_.fail(written.error());
      return false;
    }
    if (transfer_.job_.is_verified()) transfer_.hash_.update(bytes);
    transfer_.position_ = position + bytes.size();
    transfer_.advance(transfer_.position_);
    return true;
  }

  stream_transfer& transfer_;
  std::uint64_t skipped_ = 0;  // bytes still to skip: they are present already
};

inline result<std::string> stream_transfer::run() {
  if (!worker_.start<&stream_transfer::run_worker>(this)) return no_thread(job_.label());
  supervise([&] {
    measure(received_);
    reporter_.report(phase::downloading, advance(position_), job_.remote.info.size, pace_);
  });
  end();
  state_.rethrow();
  if (auto failure = state_.failure()) return *failure;
  file_.set_size(position_);
  reporter_.report(job_.is_verified() ? phase::verifying : phase::downloading, position_, position_, pace_);
  if (job_.user_call.cancelled()) return job_.user_call.why_cancelled();
  return job_.is_verified() ? hash_.finish() : std::string();
}

inline void stream_transfer::start_over() {
  position_ = 0;
  hash_ = md5();
  total_ = job_.remote.info.size;
  entity_.reset();
}

inline void stream_transfer::work() {
  backoff tries(job_.user_call, retries_);
  std::uint64_t furthest = 0;  // the highest position of all tries
  while (!state_.is_over()) {
    const fetch_outcome outcome = fetch();
    if (!outcome.has_failed() || state_.is_stopped()) continue;
    if (outcome.next == reaction::restart) is_replaced_ = true;
    if (outcome.failure->is_transient()) {
      // All bytes may have arrived although the response did not end properly. Only the md5 can tell.
      if (is_proved()) return state_.complete();
      const std::uint64_t reached = position_;
      if (tries.retries_at_once(*outcome.failure, reached - (std::min)(reached, furthest))) {
        furthest = reached;
        continue;
      }
    }
    const auto wait = tries.after(*outcome.failure);
    if (!wait) return state_.fail(wait.error());
    state_.wait(*wait);
  }
}

/// Makes one request for the rest of the file. Completes the transfer if the response ended properly.
inline fetch_outcome stream_transfer::fetch() {
  const bool is_combinable = job_.is_verified() || !entity_.strong_tag().empty();
  if (position_ > 0 && (!is_combinable || (total_ && position_ >= *total_))) start_over();
  stream_request request(*this);
  const fetch_outcome outcome = request.fetch();
  if (outcome.next == reaction::use_whole) {
    start_over();
    if (!outcome.failure->is_transient()) return {};
  }
  if (outcome.has_failed() || !request.has_ended()) return outcome;
  if (request.is_shorter()) return request.shorter();
  if (total_ && position_ < *total_) {
    return request.ended_early(*total_ - position_);
  }
  state_.complete();
  return {};
}

/// Downloads the blocks that are missing in a partial file, and verifies the whole file. Blocks; calls on_progress in this
/// thread. The reaction is `restart` if the downloaded bytes must be discarded: the run has replaced the file, or the md5 is
/// wrong.
inline fetch_outcome download(const transfer_job& job, partial_file& destination) {
  const auto address = url::parse(job.remote.address);
  if (!address) return {reaction::retry, address.error()};
  const auto run = [&](auto&& transfer) -> fetch_outcome {
    const result<std::string> digest = transfer.run();
    if (!digest) return {transfer.is_replaced() ? reaction::restart : reaction::retry, digest.error()};
    if (!job.is_verified() || *digest == job.remote.info.md5) return {};
    return {reaction::restart,
            error(errc::checksum_mismatch,
                  job.label() + ": its md5 is " + (digest->empty() ? "unreadable" : *digest) + " after " +
                      std::to_string(destination.size()) + " bytes, the service says " + job.remote.info.md5 +
                      transfer.remark())};
  };
  if (job.remote.info.size && job.is_verified()) return run(ranged_transfer(job, destination, *address));
  return run(stream_transfer(job, destination, *address));
}

}  // namespace detail

// ============================================================================================== restoring

WANDB_RESTORE_PRIVATE_INLINE bool matches_pattern(std::string_view name, std::string_view pattern) {
  if (!pattern.empty() && pattern.back() == '/' && pattern.find_first_of("*?") == pattern.npos)
    return detail::starts_with(name, pattern);
  std::string open_ended;
  if (!pattern.empty() && pattern.back() == '/') pattern = open_ended.append(pattern).append("*");
  std::size_t n = 0, p = 0, star = pattern.npos,
              resume = 0;  // the last '*', and the end of the text it stands for
  while (n < name.size()) {
    if (p < pattern.size() && pattern[p] == '*') {
      star = p++;
      resume = n;
    } else if (p < pattern.size() && pattern[p] == '?') {
      ++p, ++n;
      while (n < name.size() && (static_cast<unsigned char>(name[n]) & 0xC0U) == 0x80U) ++n;  // UTF-8
    } else if (p < pattern.size() && pattern[p] == name[n]) {
      ++p, ++n;
    } else if (star != pattern.npos) {
      p = star + 1;
      n = ++resume;
    } else {
      return false;
    }
  }
  while (p < pattern.size() && pattern[p] == '*') ++p;
  return p == pattern.size();
}

WANDB_RESTORE_PRIVATE_INLINE cache_policy cache_policy::keep() {
  return rule(+[](const local_copy&, const file_info*) { return verdict::keep; });
}
WANDB_RESTORE_PRIVATE_INLINE cache_policy cache_policy::replace() {
  return rule(+[](const local_copy&, const file_info*) { return verdict::fetch; });
}
WANDB_RESTORE_PRIVATE_INLINE cache_policy cache_policy::refresh() {
  return rule(+[](const local_copy& local, const file_info* remote) {
    if (remote == nullptr) return verdict::ask;
    if (remote->md5.empty() || (remote->size && *remote->size != local.size)) return verdict::fetch;
    return local.md5() == remote->md5 ? verdict::keep : verdict::fetch;
  });
}

namespace detail {

/// Whether Windows can use a path segment unchanged as the name of a file or directory: no reserved character, no device
/// name, no dot or space at its end.
inline bool is_windows_name(std::string_view segment) {
  if (segment == "." || segment.empty()) return true;
  if (segment.find_first_of("<>:\"|?*") != segment.npos || has_control(segment)) return false;
  if (segment.back() == '.' || segment.back() == ' ') return false;
  const std::string stem = lower(trim(segment.substr(0, segment.find('.'))));
  if (stem == "con" || stem == "prn" || stem == "aux" || stem == "nul") return false;
  return !(stem.size() == 4 && (starts_with(stem, "com") || starts_with(stem, "lpt")) && is_digit(stem[3]));
}

/// Refuses names that lead outside root on any operating system. Source: wandb/sdk/lib/paths.py.
inline result<void> check_name(std::string_view name, const char* verb = "restore") {
  const auto refuse = [&](const char* why) {
    return error(errc::invalid_argument,
                 std::string("cannot ") + verb + ' ' + in_quotes(name) + ": " + why +
                     "; a name is a path inside the run, such as \"model.h5\" or \"ckpt/best.h5\"");
  };
  if (name.empty()) return refuse("the name is empty");
  if (name.find('\0') != std::string_view::npos) return refuse("the name contains a NUL character");
  if (name.front() == '/' || name.front() == '\\') return refuse("it is absolute");
  if (name.size() > 1 && name[1] == ':') return refuse("it names a drive");
  std::string_view last;
  for (const auto part : split(name, '/')) {
    last = part;
    for (const auto piece : split(part, '\\')) {
      if (piece == "..") return refuse("it leaves the directory");
#ifdef _WIN32
      if (!is_windows_name(piece)) return refuse("Windows does not allow this name");
#endif
    }
  }
  if (last.empty() || last == ".") return refuse("it is a directory");
  if (starts_with(last, hidden_prefix))
    return refuse("names with this prefix are reserved for the library's hidden files");
  return {};
}

/// Completes a run path from the settings. The entity may remain empty: the service knows the default one.
inline result<run_path> run_of(session& current, std::string_view text) {
  const settings& configuration = current.config;
  const std::string run_id = text.empty() ? configuration.run_id : std::string();
  auto run = completed_run_path(text, {configuration.entity, configuration.project, run_id});
  if (!run) return run;
  auto good = check_parts(
      text, {{"project", "WANDB_PROJECT", run->project}, {"run id", "WANDB_RUN_ID", run->run_id}});
  if (good && !run->entity.empty()) good = check_parts(text, {{"entity", "WANDB_ENTITY", run->entity}});
  if (good) return run;
  current.warn_of_settings();  // a settings file that is not used may have the missing part
  return good.error();
}

inline result<void> check_times(const settings& configuration, const std::string& task) {
  for (const auto time :
       {configuration.connect_timeout, configuration.idle_timeout, configuration.retry_timeout}) {
    if (time.count() <= 0)
      return error(errc::invalid_argument, task + ": connect, idle and retry timeouts must be more than 0");
  }
  return {};
}

/// A run, for messages. Its entity may be empty.
inline std::string shown(const run_path& run) {
  return run.entity.empty() ? run.project + '/' + run.run_id + " (of the default entity)" : run.str();
}

/// Puts the task in front of a failure's text, unless the text contains all of `names`.
inline error in_context(const error& failure, const std::string& task,
                        std::initializer_list<std::string> names) {
  const std::string_view text = failure.what();
  if (std::all_of(names.begin(), names.end(), [&](const auto& name) { return text.find(name) != text.npos; }))
    return failure;
  return with_text(failure, task + ": " + failure.what());
}

/// Likewise for a task that concerns a run, such as "restoring x from ". `quoted`: the file's name or pattern in quotes, or "".
inline error in_context(const error& failure, const std::string& task, const std::string& quoted,
                        const run_path& run) {
  return in_context(failure, task + shown(run), {quoted, run.project + '/' + run.run_id});
}

/// An open local copy. Facts, md5 and stream are those of the opened file, even if another process replaces it meanwhile.
class opened_copy {
 public:
  /// Opens a regular file without blocking. Null if there is none; errc::disk_failure for a directory, device or pipe.
  static result<std::shared_ptr<opened_copy>> open(const path& location, std::string_view name) {
    std::shared_ptr<opened_copy> copy;
    const auto named =
        facts_of(location);  // before the open: opening a device or a pipe can have side effects
    if (named.absent()) return copy;
    if (!named.found()) return disk_error("look at the local copy", location, named.failure());
    copy = std::make_shared<opened_copy>(location);
    copy->facts_ = *named;
    if (named->is_file) {
      const int code = copy->open_code_ = copy->file_.open(location, file::mode::keep_name);
      if (look_result::failed(code).absent()) return std::shared_ptr<opened_copy>();  // removed just now
      // A file without read permission can still be replaced.
      if (code != 0 && !is_refusal(code)) return disk_error("open the local copy", location, code);
      if (code == 0) {
        const auto facts = copy->file_.facts();
        if (!facts.found()) return disk_error("look at the local copy", location, facts.failure());
        copy->facts_ = *facts;
      }
    }
    if (!copy->facts_.is_file) {
      return error(errc::disk_failure,
                   "cannot restore " + in_quotes(name) + ": " + in_quotes(location) +
                       (copy->facts_.is_directory ? " is a directory" : " is not a regular file") +
                       "; set another root, or move it away");
    }
    return copy;
  }
  explicit opened_copy(path location) : location_(std::move(location)) {}

  [[nodiscard]] const file_facts& facts() const { return facts_; }
  /// Makes md5() report its progress. The reporter must outlive this object.
  void report_to(progress_reporter& reporter) { reporter_ = &reporter; }
  /// In hex; empty if the file cannot be read, has changed since it was opened, or the call was cancelled.
  [[nodiscard]] std::string md5() const {
    if (!file_.is_open()) return {};
    std::string digest = md5_of_file(file_, [this](std::uint64_t done) {
      return !reporter_ || reporter_->report_if_due(phase::verifying, done, facts_.size);
    });
    const auto now = file_.facts();
    return now.found() && *now == facts_ ? digest : std::string();
  }
  [[nodiscard]] result<std::ifstream> stream() const {
    if (file_.is_open()) return stream_on(file_, location_);
    return error(errc::disk_failure, "cannot open the local copy " + in_quotes(location_) + ": " +
                                         system_text(open_code_) + "; make it readable, or replace it");
  }

 private:
  path location_;
  file file_;
  int open_code_ = 0;  // the system's error code if file_ is not open
  file_facts facts_;
  progress_reporter* reporter_ = nullptr;
};

/// Fills in the account's default entity if a run path lacks one.
inline result<void> complete_entity(service& api, run_path& run) {
  if (!run.entity.empty()) return {};
  auto entity = api.default_entity();
  if (!entity) return entity.error();
  run.entity = *std::move(entity);
  return {};
}

/// The wait for a file that the run has not uploaded yet (restore_options::wait).
class upload_wait {
 public:
  upload_wait(const call& user_call, milliseconds limit) : call_(user_call), limit_(limit) {}

  /// Blocks until the next query is due. Returns false if no query may follow: the time is over, the run has ended, the
  /// call is cancelled, or `report`, which is called meanwhile, has returned false.
  bool may_ask_again(bool has_run_ended, function_ref<bool()> report) {
    constexpr milliseconds interval(10000);
    has_run_ended_ = has_run_ended;
    const auto left = limit_ - std::chrono::duration_cast<milliseconds>(clock::now() - began_);
    if (has_run_ended || left.count() <= 0) return false;
    for (const auto until = clock::now() + (std::min)(interval, left); clock::now() < until;) {
      if (!report() || !call_.sleep(milliseconds(50))) return false;
    }
    return true;
  }
  /// Adds the waiting time to the error for a missing file.
  [[nodiscard]] error with_time(const error& missing) const {
    if (limit_.count() == 0) return missing;
    const auto waited = std::chrono::duration_cast<milliseconds>(clock::now() - began_);
    return with_text(missing,
                     missing.what() + std::string(has_run_ended_ ? "; the run has ended, and uploads no more"
                                                                 : "; waited " + seconds_text(waited)));
  }

 private:
  const call& call_;
  const milliseconds limit_;
  const clock::time_point began_ = clock::now();
  bool has_run_ended_ = false;
};

/// Asks the service for a file. While the run has not uploaded it, asks again until `limit` is over. See upload_wait for
/// `report`.
inline result<lookup> find_awaited(service& api, const call& user_call, milliseconds limit,
                                   const run_path& run, const std::string& name,
                                   function_ref<bool()> report) {
  upload_wait wait(user_call, limit);
  for (;;) {
    auto answered = api.look_up(run, name);
    if (!answered || answered->file) return answered;
    if (!wait.may_ask_again(answered->has_run_ended, report)) {
      if (user_call.cancelled()) return user_call.why_cancelled();
      return wait.with_time(api.missing_file(run, name, *answered));
    }
  }
}

/// One call of restore.
class restoring {
 public:
  /// `listed`: the file, if the service has described it already; else null.
  restoring(session& current, call& user_call, const restore_options& options, std::string name, run_path run,
            place destination, const found_file* listed = nullptr)
      : session_(current), call_(user_call), options_(options), name_(std::move(name)), run_(std::move(run)),
        place_(std::move(destination)), listed_(listed),
        policy_(options.replace ? cache_policy::replace() : options.cache.value_or(current.policy)) {}

  result<restored_file> operator()() {
    if (auto opened = open_copy(); !opened) return opened.error();
    const auto verdict = decide(nullptr);
    if (call_.cancelled()) return call_.why_cancelled();
    if (verdict == cache_policy::verdict::keep) return use_local(nullptr);

    service api(session_, call_);
    if (auto good = complete_entity(api, run_); !good) return good.error();
    auto remote = listed_ != nullptr ? result<found_file>(*listed_) : find(api);
    if (!remote) return remote.error();
    if (!remote->info.name.empty()) name_ = remote->info.name;
    if (verdict == cache_policy::verdict::ask && decide(&remote->info) == cache_policy::verdict::keep)
      return use_local(&remote->info);
    if (call_.cancelled()) return call_.why_cancelled();
    return fetch(*std::move(remote));
  }

 private:
  result<found_file> find(service& api) {
    const auto report = [&] { return reporter_.report_if_due(phase::downloading, 0, {}); };
    auto answered = find_awaited(api, call_, options_.wait, run_, name_, report);
    if (!answered) return answered.error();
    return *std::move(answered->file);
  }

  /// Opens the local copy, if there is one, and reads its receipt.
  result<void> open_copy() {
    auto opened = opened_copy::open(place_.target, name_);
    if (!opened) return opened.error();
    opened_ = *std::move(opened);
    copy_ = local_copy();
    is_judged_ = false;
    if (!opened_) return {};
    const auto& facts = opened_->facts();
    opened_->report_to(reporter_);
    copy_.opened_ = opened_;
    copy_.path = place_.target;
    copy_.size = facts.size;
    copy_.modified += std::chrono::duration_cast<std::chrono::system_clock::duration>(
        std::chrono::nanoseconds(facts.modified));
    const auto known = read_receipt(session_.config.cache_dir, place_.target, facts);
    if (!known) warn_of_receipts("read", known.error());
    if (known && *known) {
      copy_.restored_from = known->run;
      copy_.restored_name = known->name;
      copy_.receipt_md5 = known->md5;
    }
    return {};
  }

  /// Warns once for each client: a failure of the cache directory concerns every file.
  void warn_of_receipts(const std::string& action, const error& failure) const {
    if (session_.has_warned_of_receipts.exchange(true)) return;
    const std::string text =
        failure.what();  // after the quoted path and a ';' is a remedy for failures in root
    session_.warn("receipts cannot be " + action + ", so files of other runs will not be recognised: " +
                  text.substr(0, text.find(';', text.rfind('"') + 1)) +
                  "; set WANDB_CACHE_DIR to another directory");
  }

  /// Applies the policy to the opened copy. `remote` is null before the request to the service; after it, `ask` means
  /// `fetch`.
  cache_policy::verdict decide(const file_info* remote) {
    using verdict = cache_policy::verdict;
    if (!opened_) return verdict::fetch;
    if (!std::exchange(is_judged_, true)) first_verdict_ = policy_(copy_, nullptr);
    if (first_verdict_ != verdict::ask || remote == nullptr) return first_verdict_;
    return policy_(copy_, remote) == verdict::keep ? verdict::keep : verdict::fetch;
  }

  /// Returns errc::local_conflict if the receipt names another run, or another file of the run.
  [[nodiscard]] result<void> check_origin() const {
    if (!copy_.restored_from) return {};
    const run_path& source_run = *copy_.restored_from;
    const bool other_run = source_run.run_id != run_.run_id || source_run.project != run_.project ||
                           (!run_.entity.empty() && source_run.entity != run_.entity);
    // The receipt may hold the plain spelling of the requested name.
    const bool other_name =
        !copy_.restored_name.empty() && plain_name(copy_.restored_name) != plain_name(name_);
    if (!other_run && !other_name) return {};
    const std::string origin = other_name
                                   ? "the file " + in_quotes(copy_.restored_name) + " of " + source_run.str()
                                   : source_run.str();
    const std::string wanted = other_name ? in_quotes(name_) + " of " + shown(run_) : shown(run_);
    return error(errc::local_conflict, in_quotes(place_.target) + " was restored from " + origin + ", but " +
                                           wanted +
                                           " was requested: replace or refresh it, or set another root");
  }

  /// Returns the local copy. A copy with the service's md5 is the requested file, whatever its receipt says. Any other copy
  /// must pass check_origin().
  result<restored_file> use_local(const file_info* remote) {
    if (remote != nullptr && !remote->md5.empty() && copy_.md5() == remote->md5) {
      remember(remote->md5, opened_->facts());
      auto restored = open_local(remote->md5);
      if (restored)
        remove_quietly(place_.released());  // it may be a part of other content: the file is complete
      return restored;
    }
    if (call_.cancelled()) return call_.why_cancelled();
    if (auto good = check_origin(); !good) return good.error();
    // A receipt without a name may belong to another file of the run: its md5 does not verify this one.
    return open_local(copy_.restored_name.empty() ? std::string() : copy_.receipt_md5);
  }
  /// `md5`: the verified md5 of the content; empty if it was not verified.
  result<restored_file> open_local(const std::string& md5) const {
    auto stream = opened_->stream();
    if (!stream) return stream.error();
    remove_after_kill();
    return restored_file(*std::move(stream), {place_.target, copy_.size, md5, source::local, !md5.empty()});
  }

  /// Removes hidden files of processes that were killed an hour ago or earlier. A killed process also leaves its lock file.
  /// Without a lock file the directory, which may be large, is not read.
  void remove_after_kill() const {
    if (!facts_of_entry(place_.lock()).found()) return;
    place_lock lock(place_);
    if (lock.try_acquire() == place_lock::outcome::held) remove_abandoned(lock, std::chrono::seconds(3600));
  }
  /// Removes abandoned hidden files that are older than `age`. Keeps the lock file if any hidden file remains.
  void remove_abandoned(place_lock& lock, std::chrono::nanoseconds age) const {
    if (remove_abandoned_partials(place_, lock.now(), age)) {
      lock.remove_file();
    } else {
      lock.leave_file();
    }
  }

  void remember(const std::string& md5, const file_facts& facts) const {
    const auto written = write_receipt(session_.config.cache_dir, place_.target,
                                       {run_, name_, facts.size, facts.modified, md5});
    if (!written) warn_of_receipts("written", written.error());
  }

  /// Takes the place's lock. Then uses the copy that another call has restored meanwhile, if the policy allows it; otherwise
  /// downloads the file.
  result<restored_file> fetch(found_file remote) {
    if (auto made = make_directories(place_.directory); !made) return made.error();
    if (auto good = check_replaceable(place_); !good) return good.error();
    place_lock lock(place_);
    if (!wait_for_turn(lock, remote.info)) return call_.why_cancelled();
    if (!lock.is_first())
      lock.leave_file();  // until remove_abandoned() has found that no hidden file remains
    const auto is_another = reopen_copy();
    if (!is_another) return is_another.error();
    if (*is_another && is_usable(remote.info)) {
      if (first_verdict_ == cache_policy::verdict::keep) {  // as a call that started now would do
        if (auto good = check_origin(); !good) return good.error();
      }
      if (!lock.is_first()) remove_abandoned(lock, std::chrono::seconds(3600));
      return use_local(&remote.info);
    }
    if (call_.cancelled()) return call_.why_cancelled();
    return download_and_publish(std::move(remote), lock);
  }

  /// Whether a copy that another call has restored meanwhile is the file that this call wants: the policy keeps it, or it has the
  /// service's md5.
  bool is_usable(const file_info& remote) {
    if (decide(&remote) == cache_policy::verdict::keep) return true;
    return !remote.md5.empty() && remote.size.value_or(copy_.size) == copy_.size && copy_.md5() == remote.md5;
  }

  /// Opens the local copy again. Returns true if the copy is new or has other content than when the call began.
  result<bool> reopen_copy() {
    const auto before = std::move(opened_);  // closed on return: see publish()
    if (auto opened = open_copy(); !opened) return opened.error();
    return opened_ && !(before && before->facts() == opened_->facts());
  }

  /// Downloads the file and publishes it. If the downloaded bytes are worthless, downloads the file a second time, from nothing.
  result<restored_file> download_and_publish(found_file remote, place_lock& lock) {
    const transfer_job job{session_, call_, run_, name_, options_, remote};
    for (bool again = false;; again = true) {
      // The md5 to verify the file with. Without one, no partial file is resumed.
      const std::string md5 = options_.verify ? remote.info.md5 : std::string();
      const std::uint64_t size = remote.info.size.value_or(0);
      const auto copying = [&](std::uint64_t done) {
        return reporter_.report_if_due(phase::downloading, done, size);
      };
      // Without a size, existing partial files are left for a later call.
      const bool resumes = !again && remote.info.size && may_find_partials(lock, size);
      auto opened = resumes ? partial_file::open(place_, md5, size, copying, &lock)
                            : partial_file::create(place_, md5, size);
      if (!opened) return opened.error();
      partial_file& partial = **opened;
      releaser on_exit{partial, lock, place_, md5, place_.released()};
      partial.set_fallback({});
      if (auto room = partial.reserve(); !room) return room.error();

      const fetch_outcome outcome = download(job, partial);
      if (!outcome.has_failed()) return publish(partial, md5, lock);
      const error& failure = *outcome.failure;
      const bool is_wrong = failure.code() == errc::checksum_mismatch;
      const bool is_worthless = outcome.next == reaction::restart;
      if (!is_wrong && !is_worthless) {
        if (!partial.is_worth_keeping(md5)) return failure;
        return with_text(failure,
                         failure.what() + std::string("; the next call resumes from the bytes that arrived"));
      }
      on_exit.keep = !is_worthless;
      if (again) {
        return with_text(failure, std::string(failure.what()) + " (again after a second fetch from nothing" +
                                      (is_wrong ? "; the run may be writing it: try again later)" : ")"));
      }
      auto fresh = service(session_, call_).find_file(run_, name_);  // the run may have a new version
      if (!fresh) return fresh.error();
      remote = *std::move(fresh);
    }
  }

  /// Releases the partial file for the next call at the end of this one, also if on_progress throws.
  struct releaser {
    partial_file& partial;
    place_lock& lock;
    const place& destination;
    std::string md5;
    path released;
    bool keep = true;
    ~releaser() {
      if (!keep) return;
      transfer_state ending;  // catches exceptions, which must not leave a destructor
      const auto release = [this] {
        if (!partial.release(destination, md5))
          lock.leave_file();  // so that the next call reads the directory
      };
      if (!ending.run(release) && partial.is_worth_keeping(md5)) partial.set_fallback(std::move(released));
    }
  };

  /// `md5`: the verified md5 of the content; empty if it was not verified.
  result<restored_file> publish(partial_file& partial, const std::string& md5, place_lock& lock) {
    if (auto finished = finish(partial); !finished) return finished.error();
    if (call_.cancelled()) return call_.why_cancelled();
    opened_.reset();  // Windows does not replace an open file
    // Write the receipt first: a call in between must not take another run's file for the user's own.
    auto stream = partial.publish(place_, [&](const file_facts& facts) { remember(md5, facts); });
    if (!stream) return stream.error();
    remove_quietly(place_.released());
    if (may_find_partials(lock, partial.size())) remove_abandoned(lock, {});
    return restored_file(*std::move(stream),
                         {place_.target, partial.size(), md5, source::downloaded, !md5.empty()});
  }

  /// Writes the content to stable storage. That can take many seconds: meanwhile it reports progress to the caller, and
  /// touches the file as a sign of life for processes that wait.
  result<void> finish(partial_file& partial) {
    constexpr std::uint64_t large = 8 * 1024 * 1024;  // bytes
    if (partial.size() < large) return partial.finish();
    struct task {
      partial_file& content;
      transfer_state state = {};
      result<void> finished = {};
      void run() {
        state.run([this] { finished = content.finish(); });
      }
    };
    task sync{partial};
    thread syncing;
    if (!syncing.start<&task::run>(&sync)) return partial.finish();
    for (auto touched = clock::now(); !syncing.wait(milliseconds(100));) {
      reporter_.report_if_due(phase::verifying, partial.size(), partial.size());
      if (clock::now() - touched > std::chrono::seconds(partial_file::quiet / 6)) {
        touched = clock::now();
        partial.touch();
      }
    }
    sync.state.rethrow();
    return std::move(sync.finished);
  }

  /// Whether to read the directory for partial files. A killed writer leaves its lock file, and the name of a released
  /// partial file is known. For a large file the directory is always read.
  [[nodiscard]] bool may_find_partials(const place_lock& lock, std::uint64_t size) const {
    constexpr std::uint64_t large = 64 * 1024 * 1024;  // bytes
    return !lock.is_first() || size >= large || facts_of_entry(place_.released()).found();
  }

  /// Whether a process on another host or in another container seems to download the same large file: it wrote within
  /// partial_file::quiet. Waiting for its next sign of life is cheaper than another download of the file.
  [[nodiscard]] bool is_another_at_work(const place_lock& lock, const file_info& remote) const {
    constexpr std::uint64_t large = 16 * 1024 * 1024;  // bytes
    if (lock.is_first() || !options_.verify || remote.md5.empty() || remote.size.value_or(0) < large)
      return false;
    const auto now = lock.now();
    const auto listing = find_partials(place_);
    for (const auto& found : listing.found) {
      const bool is_remote = found.key == place::key(remote.md5) && found.writer.process != 0 &&
                             !found.writer.is_here() && found.facts.is_file && found.facts.user == own_user();
      if (!is_remote || found.is_silent(now, std::chrono::seconds(partial_file::quiet))) continue;
      if (!(found.writer.is_of_this_boot() && lock.is_effective())) return true;
    }
    return false;
  }

  /// The sum of the modification times of this user's partial files. It changes when a writer shows a sign of life.
  [[nodiscard]] std::uint64_t signs_of_life() const {
    std::uint64_t times = 0;
    const auto listing = find_partials(place_);
    for (const auto& found : listing.found)
      if (found.facts.user == own_user()) times += static_cast<std::uint64_t>(found.facts.modified);
    return times;
  }

  /// Waits while another process or thread downloads this target and shows signs of life. Returns false if cancelled.
  bool wait_for_turn(place_lock& lock, const file_info& remote) {
    constexpr auto scan_interval = std::chrono::seconds(2);  // reading a directory can be slow
    const auto began = clock::now();
    auto last_sign = began, next_scan = began;
    for (std::uint64_t signs = 0;;) {
      const bool is_locked = lock.try_acquire() == place_lock::outcome::busy;
      if (is_locked && lock.take_from_dead()) continue;
      if (!is_locked && !is_another_at_work(lock, remote)) return true;
      if (is_locked && clock::now() >= next_scan) {
        next_scan = clock::now() + scan_interval;
        const auto now = signs_of_life();
        if (now != signs) last_sign = clock::now();
        signs = now;
      }
      // Do not wait for a holder without a sign of life.
      if (is_locked && clock::now() - last_sign > std::chrono::seconds(partial_file::quiet)) return true;
      if (!reporter_.report_if_due(phase::downloading, 0, {})) return false;
      // Poll less often the longer the wait, so that many waiting processes do not overload the file system.
      const auto waited = std::chrono::duration_cast<milliseconds>(clock::now() - began);
      if (!call_.sleep(std::clamp(waited / 10, milliseconds(50), milliseconds(1000)))) return false;
    }
  }

  session& session_;
  call& call_;
  const restore_options& options_;
  std::string name_;
  run_path run_;
  place place_;
  const found_file* const listed_;
  const cache_policy policy_;
  progress_reporter reporter_{call_, options_, name_};
  std::shared_ptr<opened_copy> opened_;  // null: there is no local copy
  local_copy copy_;                      // of opened_
  // The policy's verdict on copy_ before the request to the service. Known if is_judged_.
  cache_policy::verdict first_verdict_ = cache_policy::verdict::ask;
  bool is_judged_ = false;
};

}  // namespace detail

WANDB_RESTORE_PRIVATE_INLINE std::string local_copy::md5() const {
  if (!receipt_md5.empty()) return receipt_md5;
  if (known_md5_.empty()) {
    const auto opened = opened_.lock();
    known_md5_ = opened ? opened->md5() : detail::md5_of_file(path);
  }
  return known_md5_;
}

namespace detail {

WANDB_RESTORE_PRIVATE_INLINE std::shared_ptr<session>
open_session(settings configuration, transport_ref transport, cache_policy policy) {
  return std::make_shared<session>(std::move(configuration), std::move(transport), std::move(policy));
}

/// Checks the options that all calls share.
inline result<void> check_options(const session& current, const restore_options& options,
                                  const std::string& task) {
  if (options.connections < 1) {
    return error(errc::invalid_argument,
                 task + ": connections must be at least 1, not " + std::to_string(options.connections));
  }
  if (options.wait.count() < 0) return error(errc::invalid_argument, task + ": wait must not be negative");
  return check_times(current.config, task);
}

/// The directory of a call's files, and its deepest ancestor that exists.
struct destination_root {
  path root, existing;

  /// errc::invalid_argument if a part of the root is not a directory.
  static result<destination_root> find(const session& current, const restore_options& options,
                                       const std::string& task) {
    destination_root made;
    made.root = made.existing = options.root.empty() ? current.config.run_dir : options.root;
    auto facts = facts_of(made.existing);
    while (made.existing.has_relative_path() && facts.absent()) {
      made.existing = made.existing.parent_path();
      facts = facts_of(made.existing);
    }
    if (facts.found() && !facts->is_directory) {
      return error(errc::invalid_argument, task + ": root " + in_quotes(made.root) + ": " +
                                               in_quotes(made.existing) + " is not a directory");
    }
    return made;
  }
  /// errc::invalid_argument if the file system takes no name as long as a part of this one.
  [[nodiscard]] result<void> check_lengths(std::string_view name, const std::string& task) const {
    constexpr std::size_t always_taken = 128;  // by every file system in use: spares a system call
    for (const auto part : split(name, '/')) {
      if (part.size() <= always_taken) continue;
      if (const auto limit = longest_name(existing); name_length(part) > limit) {
        return error(errc::invalid_argument, task + ": " + std::to_string(name_length(part)) +
                                                 " characters are more than a name in " +
                                                 in_quotes(or_dot(existing)) + " may have (" +
                                                 std::to_string(limit) + ")");
      }
    }
    return {};
  }
};

WANDB_RESTORE_PRIVATE_INLINE result<restored_file> restore(session& current, std::string_view name,
                                                           const restore_options& options) {
  if (auto good = check_name(name); !good) return good.error();
  const std::string quoted = in_quotes(name), task = "cannot restore " + quoted;
  if (auto good = check_options(current, options, task); !good) return good.error();
  auto run = run_of(current, options.run_path);
  if (!run) return in_context(run.error(), "restoring " + quoted, {quoted});
  const auto where = destination_root::find(current, options, task);
  if (!where) return where.error();
  if (auto good = where->check_lengths(name, task); !good) return good.error();
  call user_call(current.config, options.cancel);
  auto restored =
      restoring(current, user_call, options, std::string(name), *run, place(where->root / from_utf8(name)))();
  if (restored) return restored;
  return in_context(restored.error(), "restoring " + quoted + " from ", quoted, *run);
}

// ---- many files

/// The files that a call with a pattern concerns: those that match, except excluded ones.
class selection {
 public:
  selection(std::string_view pattern, const restore_options& options)
      : pattern_(pattern), exclude_(options.exclude) {}

  [[nodiscard]] bool takes(std::string_view name) {
    if (!matches_pattern(name, pattern_)) return false;
    for (const std::string& excluded : exclude_) {
      if (matches_pattern(name, excluded)) return ++excluded_, false;
    }
    return true;
  }
  /// Returns the number of files that match, but are excluded.
  [[nodiscard]] std::size_t excluded() const { return excluded_; }

 private:
  const std::string_view pattern_;
  const std::vector<std::string>& exclude_;
  std::size_t excluded_ = 0;
};

/// A set of hashes. std::unordered_set is slow to compile.
class hash_set {
 public:
  /// Returns false if the hash is present already.
  bool add(std::uint64_t hash) {
    if (2 * (count_ + 1) > slots_.size()) grow();
    std::uint64_t& slot = slot_of(hash);
    if (slot == marked(hash)) return false;
    slot = marked(hash);
    ++count_;
    return true;
  }

 private:
  static std::uint64_t marked(std::uint64_t hash) { return hash == 0 ? 1 : hash; }  // 0 is an empty slot
  std::uint64_t& slot_of(std::uint64_t hash) {
    auto index = static_cast<std::size_t>(hash) & (slots_.size() - 1);
    while (slots_[index] != 0 && slots_[index] != marked(hash)) index = (index + 1) & (slots_.size() - 1);
    return slots_[index];
  }
  void grow() {
    std::vector<std::uint64_t> old((std::max<std::size_t>)(1024, 2 * slots_.size()));
    old.swap(slots_);
    for (const std::uint64_t hash : old)
      if (hash != 0) slot_of(hash) = hash;
  }
  std::vector<std::uint64_t> slots_;
  std::size_t count_ = 0;
};

/// One call of restore_all: a thread lists the run's files, others restore those that match, and the caller's thread reports
/// progress.
class restoring_all {
 public:
  restoring_all(session& current, const restore_options& options, std::string pattern, run_path run,
                destination_root where)
      : session_(current), options_(options), pattern_(std::move(pattern)), run_(std::move(run)),
        where_(std::move(where)), user_call_(current.config, options.cancel),
        part_call_(user_call_, state_.stop_flag()) {}

  /// The run; with its entity once the call operator has found it.
  [[nodiscard]] const run_path& run() const { return run_; }
  result<restore_report> operator()() {
    service api(session_, user_call_);
    if (auto good = complete_entity(api, run_); !good) return good.error();
    workers_ = std::vector<worker>(static_cast<std::size_t>((std::min)(options_.connections, max_workers)));
    const struct joiner {  // on_progress may throw
      restoring_all& owner;
      ~joiner() { owner.end(); }
    } at_exit{*this};
    upload_wait wait(user_call_, options_.wait);
    do {
      is_listed_ = is_list_whole_ = has_run_ended_ = false;
      listing_failure_.reset();
      if (!lister_.start<&restoring_all::list>(this)) return no_thread("restoring " + in_quotes(pattern_));
      start_workers();
      supervise();
      lister_.join();
      const auto report = [&] { return !user_call_.cancelled() && report_progress(); };
      if (!report_.files.empty() || listing_failure_ || state_.is_stopped() ||
          !wait.may_ask_again(has_run_ended_, report)) {
        break;
      }
    } while (true);
    end();
    state_.rethrow();
    if (user_call_.cancelled() && !is_complete()) fatal_ = user_call_.why_cancelled();
    if (!fatal_ && listing_failure_) fatal_ = listing_failure_;
    if (report_.files.empty()) {
      if (fatal_) return *fatal_;
      return wait.with_time(api.no_match(run_, pattern_, excluded_));
    }
    report_.failure = fatal_;
    for (std::size_t i = 0; i < report_.files.size() && fatal_; ++i) {
      auto& failure = report_.files[i].failure;
      if (!finished_[i] || (failure && failure->code() == errc::cancelled)) failure = fatal_;
    }
    return std::move(report_);
  }

 private:
  static constexpr int max_workers = 64;
  static constexpr std::size_t max_queued = 1000;  // files: addresses take memory, and expire

  struct worker {
    restoring_all* owner = nullptr;
    std::atomic<std::uint64_t> bytes{0};  // of the file in work
    thread handle;
    void run() {
      owner->state_.run([this] { owner->work(*this); });
      owner->changed_.notify_all();
    }
  };
  struct task {
    std::size_t index = 0;  // in the report
    found_file remote = {};
    int connections = 1;
  };

  void start_workers() {
    for (worker& each : workers_) {
      if (each.owner != nullptr) continue;  // they run since the first listing
      each.owner = this;
      if (!each.handle.start<&worker::run>(&each) && &each == workers_.data())
        stop_for(no_thread("restoring " + in_quotes(pattern_)));
    }
  }
  void end() {
    {
      const std::lock_guard<std::mutex> guard(mutex_);
      is_closed_ = true;
      changed_.notify_all();
    }
    if (!is_finished()) state_.stop();
    changed_.notify_all();
    lister_.join();
    for (worker& each : workers_) each.handle.join();
  }
  /// Stops the call: every other file would fail in the same way.
  void stop_for(const error& failure) {
    {
      const std::lock_guard<std::mutex> guard(mutex_);
      if (!fatal_) fatal_ = failure;
    }
    state_.stop();
    changed_.notify_all();
  }

  // ---- the thread that lists

  void list() {
    state_.run([this] {
      service api(session_, part_call_);
      selection wanted(pattern_, options_);
      bool is_cut = false;
      const auto listed = api.for_each_file(run_, [&](found_file& file) {
        is_cut = wanted.takes(file.info.name) ? !add(file) : part_call_.cancelled();
        return !is_cut;
      });
      const std::lock_guard<std::mutex> guard(mutex_);
      excluded_ = wanted.excluded();
      if (listed) has_run_ended_ = *listed;
      is_list_whole_ = listed && !is_cut;
      if (!listed && !state_.is_stopped()) listing_failure_ = listed.error();
    });
    const std::lock_guard<std::mutex> guard(mutex_);
    is_listed_ = true;
    changed_.notify_all();
  }
  /// Adds a file. Blocks while many files are waiting. Returns false if the call has been stopped.
  bool add(found_file& file) {
    std::unique_lock<std::mutex> held(mutex_);
    while (queue_.size() - next_ >= max_queued && !part_call_.cancelled())
      changed_.wait_for(held, milliseconds(50));
    if (part_call_.cancelled()) return false;
    restored_entry entry;
    entry.name = file.info.name;
    const std::string quoted = in_quotes(entry.name), what = "cannot restore " + quoted;
    auto good = check_name(entry.name);
    if (good) good = where_.check_lengths(entry.name, what);
    if (good) entry.path = where_.root / from_utf8(entry.name);
    if (good && !hashes_.add(folded_hash(entry.name))) {
      if (const std::string* const other = namesake(entry.name)) {
        if (*other == entry.name) return true;  // a list that changes between two pages may have a file twice
        good = error(errc::invalid_argument, what + ": some file systems do not distinguish its name from " +
                                                 in_quotes(*other) +
                                                 ", another file of the run; restore it by its own name");
      }
    }
    if (!good) entry.failure = good.error();
    if (file.info.size) bytes_found_ += *file.info.size;
    is_size_known_ = is_size_known_ && file.info.size;
    report_.files.push_back(std::move(entry));
    finished_.push_back(!good);
    if (!good) {
      ++files_done_;
    } else {
      queue_.push_back({report_.files.size() - 1, std::move(file)});
      changed_.notify_all();
    }
    return true;
  }
  /// A hash of a name without regard to the case of ASCII letters: the names of 100,000 files take much memory.
  static std::uint64_t folded_hash(const std::string& name) { return name_hash(lower(plain_name(name))); }
  /// Returns the name of an earlier file that differs only in case, or not at all; null if there is none.
  [[nodiscard]] const std::string* namesake(const std::string& name) const {
    for (const restored_entry& each : report_.files) {
      if (equal_ignoring_case(plain_name(each.name), plain_name(name))) return &each.name;
    }
    return nullptr;
  }

  // ---- the threads that restore

  /// Takes the next file, once enough connections for it are free: see share_of.
  std::optional<task> take() {
    std::unique_lock<std::mutex> held(mutex_);
    for (;;) {
      if (part_call_.cancelled() || is_closed_) return std::nullopt;
      if (next_ < queue_.size()) {
        const int share = share_of(queue_[next_].remote);
        if (share > 0) {
          used_ += share;
          ++active_;
          task taken = std::move(queue_[next_++]);
          taken.connections = share;
          if (next_ == queue_.size() || next_ >= max_queued) {
            queue_.erase(queue_.begin(), queue_.begin() + static_cast<std::ptrdiff_t>(next_));
            next_ = 0;
          }
          current_ = taken.remote.info.name;
          changed_.notify_all();
          return taken;
        }
      }
      changed_.wait_for(held, milliseconds(100));
    }
  }
  /// Returns the number of connections for the next file: one for each 8 MiB, or more if the list is complete and few files
  /// wait. Returns 0, to wait, if one of the free connections would have to fetch more than 16 MiB. Needs the lock.
  [[nodiscard]] int share_of(const found_file& file) const {
    constexpr std::uint64_t most_for_one = 2 * range_plan::worth_splitting;  // bytes
    const int limit = static_cast<int>(workers_.size()), free = limit - used_;
    const std::uint64_t size = file.info.size.value_or(0);
    const auto bounded = [&](std::uint64_t count) {
      return static_cast<int>(std::clamp<std::uint64_t>(count, 1, static_cast<std::uint64_t>(limit)));
    };
    if (free < bounded((size + most_for_one - 1) / most_for_one)) return 0;
    const std::uint64_t waiting = queue_.size() - next_;
    const auto equal = is_list_whole_ ? static_cast<std::uint64_t>(free) / waiting : 0;
    const bool is_split = size >= range_plan::worth_splitting;
    return is_split ? (std::min)(free, bounded((std::max)(size / range_plan::worth_splitting, equal))) : 1;
  }
  void work(worker& self) {
    while (auto taken = take()) {
      const auto began = clock::now();
      found_file& remote = taken->remote;
      if (is_direct_refused_) remote.direct_address.clear();
      remote.direct_is_refused = &is_direct_refused_;
      restore_options own = options_;
      own.cancel = nullptr;  // part_call_ has it
      own.connections = taken->connections;
      bool has_reported = false;  // the first report may count bytes of earlier calls
      own.on_progress = [&](const progress& now) {
        if (now.phase == phase::downloading) {
          if (has_reported && now.bytes_done > self.bytes) received_ += now.bytes_done - self.bytes;
          self.bytes = now.bytes_done;
          has_reported = true;
        }
        return true;
      };
      const std::string name = remote.info.name;
      call file_call(user_call_, state_.stop_flag());
      auto restored = restoring(session_, file_call, own, name, run_, place(where_.root / from_utf8(name)),
                                remote.address.empty() ? nullptr : &remote)();
      finish(*taken, self, restored, clock::now() - began);
    }
  }
  void finish(const task& taken, worker& self, const result<restored_file>& restored, clock::duration time) {
    std::optional<error> ending;
    {
      const std::lock_guard<std::mutex> guard(mutex_);
      restored_entry& entry = report_.files[taken.index];
      entry.time = std::chrono::duration_cast<milliseconds>(time);
      if (restored) {
        entry.path = restored->path();
        entry.size = restored->size();
        entry.md5 = restored->md5();
        entry.source = restored->source();
        entry.verified = restored->verified();
      } else {
        const std::string quoted = in_quotes(entry.name);
        entry.failure = in_context(restored.error(), "restoring " + quoted + " from ", quoted, run_);
        if (is_fatal(restored.error())) ending = entry.failure;
      }
      finished_[taken.index] = true;
      bytes_done_ += taken.remote.info.size.value_or(entry.size);
      if (restored && restored->source() == source::downloaded && self.bytes < entry.size)
        received_ += entry.size - self.bytes;  // a small file may be complete before it reports
      self.bytes = 0;
      ++files_done_;
      --active_;
      used_ -= taken.connections;
      changed_.notify_all();
    }
    if (ending && !part_call_.cancelled()) stop_for(*ending);
  }
  /// Whether every other file would fail in the same way: a refused key, a full disk.
  [[nodiscard]] bool is_fatal(const error& failure) const {
    if (failure.code() == errc::not_authenticated || failure.code() == errc::offline) return true;
    if (failure.code() != errc::disk_failure) return false;
    const auto room = free_space(where_.existing);
    return room && *room < 1024 * 1024;
  }

  // ---- the caller's thread

  [[nodiscard]] bool is_finished() {
    const std::lock_guard<std::mutex> guard(mutex_);
    return is_listed_ && next_ == queue_.size() && active_ == 0;
  }
  /// Whether the list is whole and each file has an outcome of its own. Only after the threads have ended.
  [[nodiscard]] bool is_complete() {
    if (!is_list_whole_ || report_.files.empty() || !is_finished()) return false;
    for (const restored_entry& each : report_.files) {
      if (each.failure && each.failure->code() == errc::cancelled) return false;
    }
    return true;
  }
  void supervise() {
    while (!is_finished() && !state_.is_stopped()) {
      {
        std::unique_lock<std::mutex> held(mutex_);
        changed_.wait_for(held, milliseconds(20));
      }
      if (!report_progress() || user_call_.cancelled()) {
        state_.stop();
        changed_.notify_all();
      }
    }
    if (user_call_.cancelled()) return;
    reported_ = {};
    report_progress();
  }
  /// Calls on_progress if a report is due. Returns false if it cancels the call.
  bool report_progress() {
    const auto now = clock::now();
    if (!options_.on_progress || now - reported_ < milliseconds(90)) return true;
    progress report;
    std::string name;
    {
      const std::lock_guard<std::mutex> guard(mutex_);
      name = current_;
      report.bytes_done = bytes_done_;
      for (const worker& each : workers_) report.bytes_done += each.bytes;
      if (is_size_known_) {
        report.bytes_total = bytes_found_;
        report.bytes_done = (std::min)(report.bytes_done, bytes_found_);
      }
      report.files_done = files_done_;
      report.files_total = report_.files.size();
    }
    const double seconds = (std::max)(std::chrono::duration<double>(now - measured_).count(), 0.001);
    if (seconds > 0.5) {
      const std::uint64_t received = received_;
      const double lately = static_cast<double>(received - received_before_) / seconds;
      pace_ = pace_ == 0 ? lately : 0.5 * pace_ + 0.5 * lately;
      received_before_ = received;
      measured_ = now;
    }
    report.name = name;
    report.bytes_per_second = pace_;
    reported_ = now;
    if (options_.on_progress(report)) return true;
    user_call_.stop();
    return false;
  }

  session& session_;
  const restore_options& options_;
  const std::string pattern_;
  run_path run_;
  const destination_root where_;
  call user_call_;
  transfer_state state_;
  call part_call_;  // is cancelled with user_call_, or when state_ is stopped
  std::atomic<bool> is_direct_refused_{false};
  std::atomic<std::uint64_t> received_{0};  // bytes of all files

  std::mutex mutex_;  // guards the next group
  std::condition_variable changed_;
  std::vector<task> queue_;  // files to restore; those before next_ have been taken
  std::size_t next_ = 0;
  std::size_t active_ = 0, files_done_ = 0;
  std::size_t excluded_ = 0;    // files that match, but are left out
  int used_ = 0;                // connections of the files in work
  bool is_listed_ = false;      // the listing has ended, perhaps early
  bool is_list_whole_ = false;  // it has reached the end of the list
  bool is_closed_ = false, has_run_ended_ = false, is_size_known_ = true;
  std::uint64_t bytes_found_ = 0, bytes_done_ = 0;
  std::string current_;  // the name of a file in work
  hash_set hashes_;
  std::optional<error> listing_failure_, fatal_;
  restore_report report_;
  std::vector<bool> finished_;  // for each file of the report

  // Only the caller's thread uses these.
  clock::time_point reported_{}, measured_ = clock::now();
  std::uint64_t received_before_ = 0;
  double pace_ = 0;

  std::vector<worker> workers_;
  thread lister_;
};

/// Checks the arguments of a call with a pattern. Returns its run and root.
struct pattern_call {
  run_path run;
  destination_root where;

  static result<pattern_call> check(session& current, std::string_view pattern,
                                    const restore_options& options) {
    const std::string quoted = in_quotes(pattern), task = "cannot restore " + quoted;
    if (pattern.empty()) return error(errc::invalid_argument, task + ": the pattern is empty");
    if (auto good = check_options(current, options, task); !good) return good.error();
    auto run = run_of(current, options.run_path);
    if (!run) return in_context(run.error(), "restoring " + quoted, {quoted});
    auto where = destination_root::find(current, options, task);
    if (!where) return where.error();
    pattern_call checked;
    checked.run = *std::move(run);
    checked.where = *std::move(where);
    return checked;
  }
};

WANDB_RESTORE_PRIVATE_INLINE result<restore_report> restore_all(session& current, std::string_view pattern,
                                                                const restore_options& options) {
  auto checked = pattern_call::check(current, pattern, options);
  if (!checked) return checked.error();
  restoring_all job(current, options, std::string(pattern), checked->run, checked->where);
  auto report = job();
  if (report) return report;
  const std::string quoted = in_quotes(pattern);
  return in_context(report.error(), "restoring " + quoted + " from ", quoted, job.run());
}

WANDB_RESTORE_PRIVATE_INLINE result<restored_file> restore_newest(session& current, std::string_view pattern,
                                                                  const restore_options& options) {
  auto checked = pattern_call::check(current, pattern, options);
  if (!checked) return checked.error();
  run_path run = checked->run;
  call user_call(current.config, options.cancel);
  // Times in UTC sort as text, also with fractions of a second, if the final Z is removed.
  const auto time_of = [](const file_info& info) {
    const std::string_view time = info.updated_at;
    return time.substr(0, time.find('Z'));
  };
  auto newest = [&]() -> result<found_file> {
    service api(current, user_call);
    if (auto good = complete_entity(api, run); !good) return good.error();
    upload_wait wait(user_call, options.wait);
    const std::string name(pattern);
    progress_reporter reporter(user_call, options, name);
    for (;;) {
      std::optional<found_file> latest;
      selection wanted(pattern, options);
      const auto listed = api.for_each_file(run, [&](found_file& file) {
        if (!wanted.takes(file.info.name)) return true;
        if (!latest || time_of(latest->info) <= time_of(file.info)) latest = std::move(file);
        return true;
      });
      if (!listed) return listed.error();
      if (latest) return *std::move(latest);
      const auto report = [&] { return reporter.report_if_due(phase::downloading, 0, {}); };
      if (!wait.may_ask_again(*listed, report)) {
        if (user_call.cancelled()) return user_call.why_cancelled();
        return wait.with_time(api.no_match(run, name, wanted.excluded()));
      }
    }
  }();
  const std::string quoted = in_quotes(newest ? newest->info.name : std::string(pattern));
  const std::string task = "cannot restore " + quoted;
  const auto restored = [&]() -> result<restored_file> {
    if (!newest) return newest.error();
    const std::string name = newest->info.name;
    if (auto good = check_name(name); !good) return good.error();
    if (auto good = checked->where.check_lengths(name, task); !good) return good.error();
    return restoring(current, user_call, options, name, run, place(checked->where.root / from_utf8(name)),
                     newest->address.empty() ? nullptr : &*newest)();
  };
  auto file = restored();
  if (file) return file;
  return in_context(file.error(), "restoring " + quoted + " from ", quoted, run);
}

/// Returns options that name the run of an argument; a run_path without any part means the current run. Refuses a run_path
/// that cannot be read back from its text: without run id, with a gap, or with a separator inside a part. `task` is for the
/// error.
inline result<restore_options> options_of(const run_argument& run, const std::string& task,
                                          bool replace = false, path root = {}) {
  restore_options options;
  options.run_path = run.text;
  options.replace = replace;
  options.root = std::move(root);
  if (run.parts == nullptr || *run.parts == run_path{}) return options;
  options.run_path = run.parts->str();
  const auto reread = split_run_path(options.run_path);
  if (reread && *reread == *run.parts) return options;
  return error(errc::invalid_run_path, task + ": invalid run path: entity " + in_quotes(run.parts->entity) +
                                           ", project " + in_quotes(run.parts->project) + ", run id " +
                                           in_quotes(run.parts->run_id) +
                                           ": expected a run id, a project if there is an entity, and no "
                                           "part with '/', '?', '#' or spaces around it");
}

WANDB_RESTORE_PRIVATE_INLINE result<restored_file> restore(session& current, std::string_view name,
                                                           const run_argument& run, bool replace, path root) {
  const auto options = options_of(run, "restoring " + in_quotes(name), replace, std::move(root));
  if (!options) return options.error();
  return restore(current, name, *options);
}
WANDB_RESTORE_PRIVATE_INLINE result<restore_report>
restore_all(session& current, std::string_view pattern, const run_argument& run, bool replace, path root) {
  const auto options = options_of(run, "restoring " + in_quotes(pattern), replace, std::move(root));
  if (!options) return options.error();
  return restore_all(current, pattern, *options);
}
WANDB_RESTORE_PRIVATE_INLINE result<restored_file>
restore_newest(session& current, std::string_view pattern, const run_argument& run, bool replace, path root) {
  const auto options = options_of(run, "restoring " + in_quotes(pattern), replace, std::move(root));
  if (!options) return options.error();
  return restore_newest(current, pattern, *options);
}

WANDB_RESTORE_PRIVATE_INLINE result<std::vector<file_info>> list_files(session& current,
                                                                       const restore_options& options) {
  if (auto good = check_times(current.config, "cannot list the files of a run"); !good) return good.error();
  auto run = run_of(current, options.run_path);
  if (!run) return run.error();
  call user_call(current.config, options.cancel);
  auto listed = [&]() -> result<std::vector<file_info>> {
    service api(current, user_call);
    if (auto good = complete_entity(api, *run); !good) return good.error();
    return api.list_files(*run);
  }();
  if (listed) return listed;
  return in_context(listed.error(), "listing the files of ", "", *run);
}

WANDB_RESTORE_PRIVATE_INLINE result<std::vector<file_info>> list_files(session& current,
                                                                       const run_argument& run) {
  const auto options = options_of(run, "listing the files of a run");
  if (!options) return options.error();
  return list_files(current, *options);
}

}  // namespace detail

// =========================================================================================== remote files

namespace detail {

/// The blocks of a remote file that were read last. Its memory is bounded: blocks in transit are blocks of the cache, too.
/// Thread-safe.
class block_cache {
 public:
  static constexpr std::uint64_t block = 64 * 1024;  // bytes
  static constexpr std::size_t max_blocks = 64, max_at_once = 16;

  /// The state of a claim, which the threads that wait for its blocks share.
  struct transit {
    bool is_over = false;
    std::optional<error> failure = {};  // why blocks have not arrived; empty if another thread may try
  };
  /// Consecutive blocks that one thread fetches. Until finish(), no other thread reads or evicts them.
  struct claim {
    std::uint64_t first = 0;
    std::vector<char*> blocks = {};
    bool is_awaited = false;  // the first block is present, or in transit: then wait(); copy() again
    std::shared_ptr<transit> state = {};  // null if the first block is present

    [[nodiscard]] std::uint64_t begin() const { return first * block; }
    [[nodiscard]] std::uint64_t end() const { return (first + blocks.size()) * block; }
    /// Copies bytes that have arrived into the blocks. `offset` is in the file.
    void put(std::uint64_t offset, std::string_view bytes) const {
      while (!bytes.empty()) {
        const auto within = static_cast<std::size_t>(offset % block);
        const auto count = (std::min)(bytes.size(), static_cast<std::size_t>(block) - within);
        std::memcpy(blocks[static_cast<std::size_t>(offset / block - first)] + within, bytes.data(), count);
        offset += count;
        bytes.remove_prefix(count);
      }
    }
  };

  /// Copies the bytes from `offset` on that are present. Returns their number: 0 if the block of `offset` is missing.
  std::size_t copy(std::uint64_t offset, char* destination, std::size_t length) {
    const std::lock_guard<std::mutex> guard(mutex_);
    std::size_t copied = 0;
    while (copied < length) {
      slot* present = find((offset + copied) / block);
      if (present == nullptr || present->state) break;
      present->used = ++time_;
      const auto within = static_cast<std::size_t>((offset + copied) % block);
      const auto count = (std::min)(length - copied, static_cast<std::size_t>(block) - within);
      std::memcpy(destination + copied, present->bytes.get() + within, count);
      copied += count;
    }
    return copied;
  }
  /// Claims missing blocks for the calling thread: those from `first` up to `last`, and if the file is read in order, more
  /// up to `last_of_file`. The claim stops before a block that is present or in transit. The claim is empty if every slot
  /// is in transit: then read without the cache.
  claim begin(std::uint64_t first, std::uint64_t last, std::uint64_t last_of_file) {
    const std::lock_guard<std::mutex> guard(mutex_);
    claim made;
    made.first = first;
    if (const slot* const found = find(first)) {
      made.is_awaited = true;
      made.state = found->state;
      return made;
    }
    made.state = std::make_shared<transit>();
    sequence& reader = sequence_at(first);
    if (first == 0 && reader.blocks == 0) reader.blocks = 2;  // many files begin with a header
    const std::uint64_t ahead = (std::min)(first + 2 * reader.blocks, last_of_file + 1) - first;
    const auto wanted = (std::min<std::uint64_t>)((std::max)(last - first + 1, ahead), max_at_once);
    made.blocks.reserve(static_cast<std::size_t>(wanted));  // once a block is claimed, nothing may throw
    while (made.blocks.size() < wanted && find(first + made.blocks.size()) == nullptr) {
      slot* free = free_slot();
      if (free == nullptr) break;
      constexpr auto bytes = static_cast<std::size_t>(block);
      if (free->bytes == nullptr)
        free->bytes.reset(made.blocks.empty() ? new char[bytes] : new (std::nothrow) char[bytes]);
      if (free->bytes == nullptr) break;
      made.blocks.push_back(free->bytes.get());
      free->index = first + made.blocks.size() - 1;
      free->is_present = false;
      free->state = made.state;
      free->used = ++time_;
    }
    reader = {first + made.blocks.size(), made.blocks.size(), ++time_};
    return made;
  }
  /// Ends a claim. Blocks that end at or before the offset `end` become readable; the others are dropped. `failure`: the
  /// error for the threads that wait for dropped blocks. Without it, each of them repeats the request.
  void finish(const claim& claimed, std::uint64_t end, std::optional<error> failure = {}) {
    const std::lock_guard<std::mutex> guard(mutex_);
    for (slot& each : slots_) {
      if (each.state != claimed.state) continue;
      each.is_present = (each.index + 1) * block <= end;
      each.state.reset();
    }
    claimed.state->failure = std::move(failure);
    claimed.state->is_over = true;
    changed_.notify_all();
  }
  /// Blocks while another thread fetches blocks, but no longer than 20 ms. Returns true if that thread has ended.
  bool wait(const transit& other) {
    std::unique_lock<std::mutex> held(mutex_);
    if (!other.is_over) changed_.wait_for(held, milliseconds(20));
    return other.is_over;
  }

 private:
  struct slot {
    std::uint64_t index = 0;  // of the block
    bool is_present = false;
    std::shared_ptr<transit> state = {};  // not null: a thread fetches the block
    std::uint64_t used = 0;
    std::unique_ptr<char[]> bytes = {};
  };
  /// A reader that may be reading the file in order.
  struct sequence {
    std::uint64_t next = UINT64_MAX;  // the block after those that were fetched last
    std::size_t blocks = 0;           // the number of blocks that were fetched last; 0: none
    std::uint64_t used = 0;
  };

  slot* find(std::uint64_t index) {
    for (slot& each : slots_) {
      if ((each.is_present || each.state) && each.index == index) return &each;
    }
    return nullptr;
  }
  slot* free_slot() {
    slot* oldest = nullptr;
    for (slot& each : slots_) {
      if (each.state) continue;
      if (!each.is_present) return &each;
      if (oldest == nullptr || each.used < oldest->used) oldest = &each;
    }
    return oldest;
  }
  /// Returns the sequence that `first` continues, or else the oldest one, as a new one.
  sequence& sequence_at(std::uint64_t first) {
    sequence* oldest = &sequences_[0];
    for (sequence& each : sequences_) {
      if (each.next == first) return each;
      if (each.used < oldest->used) oldest = &each;
    }
    return *oldest = {};
  }

  std::mutex mutex_;  // guards the rest
  std::condition_variable changed_;
  std::array<slot, max_blocks> slots_;
  std::array<sequence, 8> sequences_;
  std::uint64_t time_ = 0;
};

/// Reads parts of a file, for a remote_file and its streams. Thread-safe.
class remote_reader {
 public:
  remote_reader(std::shared_ptr<session> current, run_path run, std::string name, found_file found,
                const std::atomic<bool>* cancel, const url& service_address)
      : session_(std::move(current)), run_(std::move(run)), name_(std::move(name)), found_(std::move(found)),
        options_(options_of(cancel)),
        call_(session_->config, cancel), job_{*session_, call_, run_, name_, options_, found_, "reading"},
        access_(job_, service_address), size_(found_.info.size) {}

  /// Opens a file that the service has described.
  static result<remote_file> open(std::shared_ptr<session> current, run_path run, std::string name,
                                  found_file found, const std::atomic<bool>* cancel, call& user_call) {
    const auto address = url::parse(found.address);
    if (!address) return address.error();
    remote_file opened;
    opened.info_ = found.info;
    opened.info_.name = name;
    opened.reader_ = std::make_shared<remote_reader>(std::move(current), std::move(run), std::move(name),
                                                     std::move(found), cancel, *address);
    if (!opened.info_.size) {
      const auto size = opened.reader_->ask_for_size(user_call);
      if (!size) return size.error();
      opened.info_.size = *size;
    }
    return opened;
  }

  /// See remote_file::try_read_at.
  result<std::size_t> read_at(std::uint64_t offset, char* destination, std::size_t length) {
    call read_call(session_->config, options_.cancel);
    read_call.set_reached();  // the service was, to open the file
    auto count = read(read_call, offset, destination, length);
    if (count) return count;
    return in_context(count.error(), job_.label(), {in_quotes(name_), run_.project + '/' + run_.run_id});
  }
  /// See remote_file::entity_tag.
  [[nodiscard]] std::string entity_tag() {
    const std::lock_guard<std::mutex> guard(version_mutex_);
    return tag_;
  }

 private:
  class access final : public file_access {
   public:
    access(const transfer_job& job, const url& service_address) : file_access(job, service_address) {}
    /// Later requests ask for a part of this version only, if its entity tag is strong.
    void pin(const http_response& head) { entity_.accept(head); }
  };
  class read_request;
  /// Takes bytes that have arrived, with their offset in the file.
  using taker = function_ref<void(std::uint64_t offset, std::string_view bytes)>;

  static constexpr std::uint64_t block = block_cache::block;
  static constexpr std::size_t direct = 4 * block;  // bytes: longer reads bypass the cache

  static restore_options options_of(const std::atomic<bool>* cancel) {
    restore_options made;
    made.cancel = cancel;
    made.verify = false;  // a part has no md5
    return made;
  }
  result<std::size_t> read(call& read_call, std::uint64_t offset, char* destination, std::size_t length);
  result<std::uint64_t> ask_for_size(call& user_call);
  result<void> fetch_blocks(call& user_call, const block_cache::claim& claimed, std::uint64_t needed_end);
  result<void> fetch(call& user_call, byte_range range, std::uint64_t needed_end, std::uint64_t& position,
                     taker take);
  [[nodiscard]] error error_of(const read_request& request, const fetch_outcome& outcome) const;
  [[nodiscard]] bool has_tag(const http_response& head);
  [[nodiscard]] bool is_same_version(const http_response& head);

  const std::shared_ptr<session> session_;
  const run_path run_;
  const std::string name_;
  const found_file found_;
  const restore_options options_;
  call call_;  // job_ needs one; each read has its own
  const transfer_job job_;
  access access_;
  std::optional<std::uint64_t> size_;  // known once the file is open
  block_cache cache_;
  std::mutex version_mutex_;  // guards the rest
  bool has_version_ = false;
  std::string tag_, modified_;  // ETag and Last-Modified of the first response; empty if it has none
};

/// One request for a part of a file.
class remote_reader::read_request final : public file_request {
 public:
  /// `position`: the offset of the next byte to arrive, at first `asked.begin`.
  read_request(remote_reader& reader, call& user_call, byte_range asked, std::uint64_t& position, taker take)
      : file_request(reader.access_, user_call, asked, reaction::retry), reader_(reader), wanted_(asked),
        position_(position), take_(take) {}

  [[nodiscard]] error changed(const std::string& problem) const {
    return *violation(problem + ": the file has changed since it was opened; open it again").failure;
  }

 private:
  static constexpr std::uint64_t max_outside = 1024 * 1024;  // bytes of a response that are outside the range

  [[nodiscard]] bool is_same_entity(const http_response& head) override { return reader_.has_tag(head); }
  fetch_outcome begin_part(const http_response& head, const content_range& part) override {
    auto& size = reader_.size_;
    if (!size && !part.size) return violation("does not tell the size of the file");
    if (size && part.size && *part.size != *size) return of_other_size(*part.size);
    if (part.size && part.bytes.end > *part.size) return violation("sends a part beyond the end of the file");
    if (!size) size = part.size;
    next_ = part.bytes.begin;
    promised_end_ = part.bytes.end;
    return check(head);
  }
  /// A server may ignore Range (RFC 9110, section 14.2). A whole file is accepted if few of its bytes are outside the range.
  fetch_outcome begin_whole(const http_response& head, std::optional<std::uint64_t> length) override {
    const auto size = reader_.size_ ? reader_.size_ : length;
    if (length && *length != *size) return of_other_size(*length);
    if (!size || *size > max_outside + ((std::min)(wanted_.end, *size) - wanted_.begin)) {
      const fetch_outcome whole =
          failure(reaction::retry, errc::http_failure,
                  "answers with the whole file: this server does not send parts of files; "
                  "restore the file instead");
      return {reaction::retry, error(errc::http_failure, whole.failure->what(), 200)};
    }
    if (!reader_.size_) reader_.size_ = size;
    promised_end_ = *size;
    return check(head);
  }
  bool take(std::string_view bytes) override {
    if (bytes.size() > promised_end_ - next_) return refuse_surplus();
    const std::uint64_t begin = std::exchange(next_, next_ + bytes.size());
    const std::uint64_t end = (std::min)(next_, wanted_.end);
    if (end > position_) {
      take_(position_, bytes.substr(static_cast<std::size_t>(position_ - begin),
                                    static_cast<std::size_t>(end - position_)));
      position_ = end;
    }
    return true;
  }
  [[nodiscard]] fetch_outcome of_other_size(std::uint64_t size) const {
    return {reaction::retry,
            changed("has " + std::to_string(size) + " bytes instead of " + std::to_string(*reader_.size_))};
  }
  [[nodiscard]] fetch_outcome check(const http_response& head) {
    if (const auto coding = unwanted_coding(head); !coding.empty())
      return violation("sends a part that cannot be used: " + coding);
    if (!reader_.is_same_version(head)) return {reaction::retry, changed("sends another version")};
    return {};
  }

  remote_reader& reader_;
  const byte_range wanted_;
  std::uint64_t& position_;
  std::uint64_t next_ = 0;          // the offset of the next byte of the response
  std::uint64_t promised_end_ = 0;  // of the range that the response announces
  taker take_;
};

inline result<std::size_t> remote_reader::read(call& read_call, std::uint64_t offset, char* destination,
                                               std::size_t length) {
  const std::uint64_t size = size_.value_or(0);
  if (offset >= size) return std::size_t{0};
  length = static_cast<std::size_t>((std::min<std::uint64_t>)(length, size - offset));
  std::shared_ptr<const block_cache::transit>
      awaited;  // the ended claim of another thread for the next block
  for (std::size_t done = 0; done < length;) {
    if (read_call.cancelled()) return read_call.why_cancelled();
    const std::uint64_t position = offset + done;
    const std::size_t rest = length - done;
    char* const here = destination + done;
    if (const auto copied = cache_.copy(position, here, rest); copied > 0) {
      done += copied;
      awaited.reset();
      continue;
    }
    if (awaited && awaited->failure) return *awaited->failure;
    awaited.reset();
    if (rest < direct) {
      const auto claimed = cache_.begin(position / block, (position + rest - 1) / block, (size - 1) / block);
      if (claimed.is_awaited) {
        while (claimed.state && !cache_.wait(*claimed.state)) {
          if (read_call.cancelled()) return read_call.why_cancelled();
        }
        awaited = claimed.state;
        continue;
      }
      if (!claimed.blocks.empty()) {
        if (auto fetched = fetch_blocks(read_call, claimed, position + rest); !fetched)
          return fetched.error();
        continue;
      }
    }
    std::uint64_t arrived = position;
    const auto fetched = fetch(read_call, {position, position + rest}, position + rest, arrived,
                               [&](std::uint64_t from, std::string_view bytes) {
                                 std::memcpy(here + (from - position), bytes.data(), bytes.size());
                               });
    if (!fetched) return fetched.error();
    done = length;
  }
  return length;
}

/// Learns the size from the storage, with the first blocks of the file.
inline result<std::uint64_t> remote_reader::ask_for_size(call& user_call) {
  const auto fetched = fetch_blocks(user_call, cache_.begin(0, 0, 3), 1);
  // A range that begins at 0 cannot be satisfied by an empty file alone (RFC 9110, section 15.5.17).
  if (!fetched && fetched.error().http_status() == 416) size_ = 0;
  if (!fetched && size_ != std::uint64_t{0}) return fetched.error();
  return *size_;
}

/// Fetches claimed blocks, and gives them back to the cache. Bytes from `needed_end` on are read ahead.
inline result<void> remote_reader::fetch_blocks(call& user_call, const block_cache::claim& claimed,
                                                std::uint64_t needed_end) {
  struct giver {  // the transport may throw
    remote_reader& reader;
    const block_cache::claim& claimed;
    std::uint64_t arrived = claimed.begin();
    std::optional<error> failure = {};
    ~giver() {
      reader.cache_.finish(claimed, arrived == reader.size_ ? UINT64_MAX : arrived, std::move(failure));
    }
  } at_exit{*this, claimed};
  const std::uint64_t end = (std::min)(claimed.end(), size_.value_or(UINT64_MAX));
  const std::uint64_t whole_blocks = (needed_end + block - 1) / block * block;
  auto fetched = fetch(user_call, {claimed.begin(), end}, (std::min)(whole_blocks, end), at_exit.arrived,
                       [&](std::uint64_t offset, std::string_view bytes) { claimed.put(offset, bytes); });
  if (!fetched && !user_call.cancelled())
    at_exit.failure = fetched.error();  // a cancellation is this call's alone
  return fetched;
}

/// Fetches a range with as many requests as necessary. `position`: the offset of the next byte to arrive. If a connection
/// or a server fails at `needed_end` or later, where bytes are read ahead, this is a success.
inline result<void> remote_reader::fetch(call& user_call, byte_range range, std::uint64_t needed_end,
                                         std::uint64_t& position, taker take) {
  retry_clock time(user_call);
  backoff tries(user_call, time);
  for (position = range.begin;;) {
    const std::uint64_t before = position;
    read_request request(*this, user_call, {position, range.end}, position, take);
    fetch_outcome outcome = request.fetch();
    time.progressed(position - before);
    const std::uint64_t end = (std::min)(range.end, size_.value_or(range.end));
    const bool is_usable = !outcome.has_failed() || outcome.failure->is_transient();
    if (position == end && (request.has_ended() || position > before) && is_usable) return {};
    if (!outcome.has_failed() && !request.has_ended()) continue;  // with a new address
    if (!outcome.has_failed()) outcome = request.ended_early(end - position);
    const error failure = error_of(request, outcome);
    const bool is_read_ahead = position >= needed_end && position > range.begin;
    if (is_read_ahead && (failure.code() == errc::connection_failed || failure.code() == errc::http_failure))
      return {};
    if (tries.retries_at_once(failure, position - before)) continue;
    if (auto last = tries.wait_after(failure)) return *std::move(last);
  }
}

/// Returns the error for a failed request.
inline error remote_reader::error_of(const read_request& request, const fetch_outcome& outcome) const {
  const error& failure = *outcome.failure;
  if (failure.code() == errc::cancelled) return failure;
  if (access_.is_replaced()) return request.changed("is out of date");
  if (request.met_other_entity()) return request.changed("has another entity tag than before");
  if (failure.http_status() == 416 && size_) return request.changed("has no bytes at this position");
  if (outcome.next != reaction::use_whole) return failure;
  return error(errc::http_failure,
               failure.what() +
                   std::string("; this server may not send parts of files: restore the file instead"),
               failure.http_status());
}

/// Returns the value of a header field; empty if there is none.
inline std::string field_of(const http_response& head, const char* name) {
  const std::string* field = head.header(name);
  return field != nullptr ? *field : std::string();
}

/// Whether a response has the entity tag of the first one, or is the first.
inline bool remote_reader::has_tag(const http_response& head) {
  const std::lock_guard<std::mutex> guard(version_mutex_);
  return !has_version_ || field_of(head, "ETag") == tag_;
}

/// Whether a response is of the same version of the file as the first one. A strong entity tag alone proves that parts belong
/// together (RFC 9110, section 15.3.7.3). Without one, Last-Modified has to agree, too.
inline bool remote_reader::is_same_version(const http_response& head) {
  std::string tag = field_of(head, "ETag"), modified = field_of(head, "Last-Modified");
  const std::lock_guard<std::mutex> guard(version_mutex_);
  if (!has_version_) {
    access_.pin(head);  // may throw, and leaves no version then
    tag_ = std::move(tag);
    modified_ = std::move(modified);
    has_version_ = true;
    return true;
  }
  const bool is_strong = !tag_.empty() && !starts_with(tag_, "W/");
  return tag == tag_ && (is_strong || modified == modified_);
}

/// The stream buffer of a remote_stream. Holds the rest of one block of the cache.
class remote_buffer final : public std::streambuf {
 public:
  remote_buffer(std::shared_ptr<remote_reader> reader, std::uint64_t size)
      : reader_(std::move(reader)), size_(size) {}
  remote_buffer(const remote_buffer&) = delete;
  remote_buffer& operator=(const remote_buffer&) = delete;
  ~remote_buffer() override = default;

  [[nodiscard]] const std::optional<error>& failure() const { return failure_; }
  /// Sets the stream that uses this buffer.
  void serve(std::istream& owner) { owner_ = &owner; }

 protected:
  int_type underflow() override {
    if (gptr() < egptr()) return traits_type::to_int_type(*gptr());
    const std::uint64_t here = position();
    if (here >= size_) return traits_type::eof();
    if (buffer_ == nullptr) buffer_.reset(new char[block]);
    begin_ = here;
    setg(buffer_.get(), buffer_.get(), buffer_.get());
    const auto count = read(here, buffer_.get(), block - static_cast<std::size_t>(here % block));
    if (count == 0) return traits_type::eof();
    setg(buffer_.get(), buffer_.get(), buffer_.get() + count);
    return traits_type::to_int_type(*gptr());
  }
  std::streamsize xsgetn(char* destination, std::streamsize length) override {
    struct rewinder {  // if read() throws, std::istream counts no byte: the position must not have moved
      remote_buffer& buffer;
      const std::uint64_t start;
      bool is_done = false;
      ~rewinder() {
        if (!is_done) buffer.move_to(start);
      }
    } at_exit{*this, position()};
    std::streamsize copied = 0;
    while (copied < length) {
      const std::streamsize rest = length - copied,
                            ready = (std::min<std::streamsize>)(rest, egptr() - gptr());
      if (ready > 0) {
        std::memcpy(destination + copied, gptr(), static_cast<std::size_t>(ready));
        gbump(static_cast<int>(ready));
        copied += ready;
      } else if (rest >= static_cast<std::streamsize>(block)) {
        const std::uint64_t here = position();
        const auto count = read(here, destination + copied, static_cast<std::size_t>(rest));
        move_to(here + count);
        copied += static_cast<std::streamsize>(count);
        if (count == 0) break;
      } else if (traits_type::eq_int_type(underflow(), traits_type::eof())) {
        break;
      }
    }
    at_exit.is_done = true;
    return copied;
  }
  int_type pbackfail(int_type wanted) override {
    const std::uint64_t here = position();
    if (here == 0) return traits_type::eof();
    move_to(here - 1);
    const int_type before = underflow();
    const bool is_any = traits_type::eq_int_type(wanted, traits_type::eof());
    if (is_any || traits_type::eq_int_type(before, wanted)) return before;
    move_to(here);
    return traits_type::eof();
  }
  std::streamsize showmanyc() override { return position() < size_ ? 0 : -1; }
  pos_type seekoff(off_type offset, std::ios_base::seekdir from, std::ios_base::openmode which) override {
    const std::uint64_t base = from == std::ios_base::beg   ? 0
                               : from == std::ios_base::cur ? position()
                                                            : size_;
    const auto back =
        offset < 0 ? static_cast<std::uint64_t>(-(offset + 1)) + 1 : 0;  // -offset, also of the smallest
    const bool is_inside = offset < 0 ? back <= base : static_cast<std::uint64_t>(offset) <= size_ - base;
    if ((which & std::ios_base::in) == 0 || !is_inside) return pos_type(off_type(-1));
    move_to(offset < 0 ? base - back : base + static_cast<std::uint64_t>(offset));
    return pos_type(static_cast<off_type>(position()));
  }
  pos_type seekpos(pos_type target, std::ios_base::openmode which) override {
    return seekoff(off_type(target), std::ios_base::beg, which);
  }

 private:
  static constexpr std::size_t block = block_cache::block;

  [[nodiscard]] std::uint64_t position() const {
    return begin_ + static_cast<std::uint64_t>(gptr() - eback());
  }
  void move_to(std::uint64_t target) {
    const auto ready = static_cast<std::uint64_t>(egptr() - eback());
    if (target >= begin_ && target - begin_ <= ready) {
      setg(eback(), eback() + (target - begin_), egptr());
    } else {
      begin_ = target;
      setg(buffer_.get(), buffer_.get(), buffer_.get());
    }
  }
  /// Returns the number of bytes; 0 at the end of the file, and, without exceptions, after a failure.
  std::size_t read(std::uint64_t here, char* destination, std::size_t length) {
    if (here >= size_) return 0;
    auto count = reader_->read_at(here, destination, length);
    if (count) return *count;
    failure_ = std::move(count).error();
#if WANDB_RESTORE_EXCEPTIONS
    throw error(*failure_);
#else
    if (owner_ != nullptr) owner_->setstate(std::ios_base::badbit);
    return 0;
#endif
  }

  const std::shared_ptr<remote_reader> reader_;  // null if size_ is 0
  const std::uint64_t size_;
  std::uint64_t begin_ = 0;  // the offset of the buffer's first byte
  std::unique_ptr<char[]> buffer_;
  std::optional<error> failure_;
  std::istream* owner_ = nullptr;
};

WANDB_RESTORE_PRIVATE_INLINE result<remote_file>
open_remote(const std::shared_ptr<session>& current, std::string_view name, const restore_options& options) {
  if (auto good = check_name(name, "open"); !good) return good.error();
  const std::string quoted = in_quotes(name), task = "opening " + quoted;
  if (auto good = check_options(*current, options, "cannot open " + quoted); !good) return good.error();
  auto run = run_of(*current, options.run_path);
  if (!run) return in_context(run.error(), task, {quoted});
  call user_call(current->config, options.cancel);
  auto opened = [&]() -> result<remote_file> {
    service api(*current, user_call);
    if (auto good = complete_entity(api, *run); !good) return good.error();
    std::string wanted(name);
    progress_reporter reporter(user_call, options, wanted);
    const auto report = [&] { return reporter.report_if_due(phase::downloading, 0, {}); };
    auto answered = find_awaited(api, user_call, options.wait, *run, wanted, report);
    if (!answered) return answered.error();
    found_file& found = *answered->file;
    found.direct_address = answered->direct_address;
    if (!found.info.name.empty()) wanted = found.info.name;
    return remote_reader::open(current, *run, wanted, std::move(found), options.cancel, user_call);
  }();
  if (opened) return opened;
  return in_context(opened.error(), task + " of ", quoted, *run);
}

WANDB_RESTORE_PRIVATE_INLINE result<remote_file> open_remote(const std::shared_ptr<session>& current,
                                                             std::string_view name, const run_argument& run) {
  const auto options = options_of(run, "opening " + in_quotes(name));
  if (!options) return options.error();
  return open_remote(current, name, *options);
}

}  // namespace detail

WANDB_RESTORE_PRIVATE_INLINE std::string remote_file::entity_tag() const {
  return reader_ ? reader_->entity_tag() : std::string();
}
WANDB_RESTORE_PRIVATE_INLINE result<std::size_t> remote_file::try_read_at(std::uint64_t offset, void* buffer,
                                                                          std::size_t length) const {
  if (!reader_) return error(errc::invalid_argument, "cannot read: this remote_file has no file");
  return reader_->read_at(offset, static_cast<char*>(buffer), length);
}
WANDB_RESTORE_PRIVATE_INLINE remote_stream remote_file::stream() const { return remote_stream(*this); }

WANDB_RESTORE_PRIVATE_INLINE remote_stream::remote_stream(const remote_file& file)
    : std::istream(nullptr),
      buffer_(std::make_unique<detail::remote_buffer>(file.reader_, file.reader_ ? file.size() : 0)) {
  buffer_->serve(*this);
  rdbuf(buffer_.get());
}
WANDB_RESTORE_PRIVATE_INLINE remote_stream::remote_stream(remote_stream&& other) noexcept
    : std::istream(static_cast<std::istream&&>(other)), buffer_(std::move(other.buffer_)) {
  if (buffer_) buffer_->serve(*this);
  set_rdbuf(buffer_.get());
  other.exceptions(goodbit);
  other.rdbuf(nullptr);  // sets badbit
}
WANDB_RESTORE_PRIVATE_INLINE remote_stream& remote_stream::operator=(remote_stream&& other) noexcept {
  if (this == &other) return *this;
  std::istream::operator=(static_cast<std::istream&&>(other));
  buffer_ = std::move(other.buffer_);
  if (buffer_) buffer_->serve(*this);
  set_rdbuf(buffer_.get());
  other.exceptions(goodbit);
  other.rdbuf(nullptr);  // sets badbit
  return *this;
}
WANDB_RESTORE_PRIVATE_INLINE remote_stream::~remote_stream() = default;
WANDB_RESTORE_PRIVATE_INLINE const error* remote_stream::failure() const noexcept {
  return buffer_ && buffer_->failure() ? &*buffer_->failure() : nullptr;
}

// ======================================================================================= http_transport
//
// HTTP/1.1 over TCP and TLS. From the bottom up: sockets, connecting to a host, the channel (TCP, and TLS for https), heads,
// bodies, one connection, and the pool of idle connections.

namespace detail {

// ---- the route of a request, and the state of one exchange

/// The server of a request, and the proxy on the way to it, if any.
struct request_route {
  url server;
  url proxy;                        ///< without a host: no proxy
  std::string proxy_authorization;  ///< value of Proxy-Authorization for that proxy

  bool is_secure() const { return server.scheme == "https"; }
  bool has_proxy() const { return !proxy.host.empty(); }
  /// The request itself goes to the proxy, with an absolute URL. For https the proxy makes a tunnel instead (CONNECT).
  bool sends_to_proxy() const { return has_proxy() && !is_secure(); }
  /// The host and port to connect to.
  const url& first_hop() const { return has_proxy() ? proxy : server; }
  /// "host:port", as in CONNECT and in messages.
  static std::string authority(const url& address) {
    const bool is_ipv6 = address.host.find(':') != std::string::npos;
    return (is_ipv6 ? '[' + address.host + ']' : address.host) + ':' + std::to_string(address.port);
  }
  /// Requests with equal keys may share a connection.
  std::string key() const {
    return server.origin() + '\n' + (has_proxy() ? proxy.origin() : "") + '\n' + proxy_authorization;
  }

  static result<request_route> of(const http_request& request) {
    auto server = url::parse(request.url);
    if (!server) return std::move(server).error();
    request_route route{*std::move(server), {}, request.proxy_authorization};
    if (request.proxy.empty()) return route;

    auto proxy = parse_proxy(request.proxy);
    if (!proxy) {
      return error(proxy.error().code(),
                   "the proxy for " + route.server.origin() + " cannot be used: " + proxy.error().what());
    }
    if (route.proxy_authorization.empty() && !proxy->user_info.empty()) {
      route.proxy_authorization =
          "Basic " + base64_encode(percent_decode(proxy->user_info).value_or(proxy->user_info));
    }
    route.proxy = *std::move(proxy);
    return route;
  }
};

/// Returns the end of a time limit that begins now. A year is long enough, and does not overflow the clock.
inline clock::time_point deadline_after(milliseconds limit) {
  return clock::now() + (std::min<milliseconds>)(limit, std::chrono::seconds(365 * 86400));
}

/// One exchange: the request, the sink for its response, and the state so far.
struct exchange {
  const http_request& request;
  body_sink& sink;
  const request_route& route;
  http_response head = {};
  bool was_answered = false;  ///< at least one byte was received
  bool was_closed = false;    ///< the failure is that the peer closed the connection
  bool has_head = false;
  std::optional<wandb::error> failure = {};

  std::string label() const {
    const std::string through =
        route.has_proxy() ? " through the proxy " + route.proxy.origin() : std::string();
    return request.method + ' ' + route.server.redacted() + through + ": ";
  }
  /// Records a failure and returns false. Later failures are consequences of the first and are ignored.
  bool fail(error cause) {
    if (!failure) failure.emplace(std::move(cause));
    return false;
  }
  bool fail(errc code, const std::string& text) { return fail(error(code, label() + text)); }
  bool fail_permanently(const std::string& text, int status = 0) {
    return fail(error::permanent(errc::connection_failed, label() + text, status));
  }
  bool is_cancelled() { return request.cancelled() && !fail(errc::cancelled, "cancelled"); }
  /// Records that the proxy refused the request with `status`. Returns false.
  bool fail_at_proxy(int status) {
    const std::string text = "the proxy " + route.proxy.origin() + " answered " + std::to_string(status) +
                             (status == 407 ? " (check the user and password in the proxy's address)" : "");
    if (status < 500) return fail_permanently(text, status);
    return fail(error(errc::connection_failed, label() + text, status));
  }
};

// ---- sockets: one block of the same functions for each operating system

#ifdef _WIN32

using socket_handle = SOCKET;
inline constexpr socket_handle no_socket = INVALID_SOCKET;
inline constexpr char list_separator = ';';

inline int socket_error() { return WSAGetLastError(); }
inline bool would_block(int code) { return code == WSAEWOULDBLOCK; }
inline std::string resolver_text(int code) { return system_text(code); }

inline void start_sockets() {
  static const int code = [] {
    WSADATA unused;
    return WSAStartup(MAKEWORD(2, 2), &unused);
  }();
  static_cast<void>(code);  // a failure shows in the first call that needs a socket
}
inline void close_socket(socket_handle handle) { ::closesocket(handle); }
inline socket_handle open_socket(int family) {
  const socket_handle opened = ::socket(family, SOCK_STREAM, IPPROTO_TCP);
  u_long on = 1;
  if (opened == no_socket || ::ioctlsocket(opened, static_cast<long>(FIONBIO), &on) == 0) return opened;
  close_socket(opened);
  return no_socket;
}
inline int poll_sockets(pollfd* entries, std::size_t count, int timeout_ms) {
  return ::WSAPoll(entries, static_cast<ULONG>(count), timeout_ms);
}
inline long receive_bytes(socket_handle handle, char* out, std::size_t size, int flags = 0) {
  return ::recv(handle, out, static_cast<int>((std::min)(size, std::size_t{1} << 30)), flags);
}
inline long send_bytes(socket_handle handle, const char* data, std::size_t size) {
  return ::send(handle, data, static_cast<int>((std::min)(size, std::size_t{1} << 30)), 0);
}

#else

using socket_handle = int;
inline constexpr socket_handle no_socket = -1;
inline constexpr char list_separator = ':';

inline int socket_error() { return errno; }
inline bool would_block(int code) {
  return code == EAGAIN || code == EWOULDBLOCK || code == EINPROGRESS || code == EINTR;
}
inline std::string resolver_text(int code) { return gai_strerror(code); }
inline void start_sockets() {}
inline void close_socket(socket_handle handle) { ::close(handle); }
/// Opens a socket: non-blocking, close-on-exec, without SIGPIPE.
inline socket_handle open_socket(int family) {
#ifdef SOCK_CLOEXEC
  constexpr int type = SOCK_STREAM | SOCK_CLOEXEC;
#else
  constexpr int type = SOCK_STREAM;
#endif
  const socket_handle opened = above_standard_streams(::socket(family, type, IPPROTO_TCP));
  if (opened == no_socket) return no_socket;
#ifdef SO_NOSIGPIPE
  const int on = 1;
  ::setsockopt(opened, SOL_SOCKET, SO_NOSIGPIPE, &on, sizeof on);
#endif
  if (::fcntl(opened, F_SETFD, FD_CLOEXEC) == 0 && ::fcntl(opened, F_SETFL, O_NONBLOCK) == 0) return opened;
  close_socket(opened);
  return no_socket;
}
inline int poll_sockets(pollfd* entries, std::size_t count, int timeout_ms) {
  return ::poll(entries, static_cast<nfds_t>(count), timeout_ms);
}
inline long receive_bytes(socket_handle handle, char* out, std::size_t size, int flags = 0) {
  return static_cast<long>(::recv(handle, out, size, flags));
}
inline long send_bytes(socket_handle handle, const char* data, std::size_t size) {
#ifdef MSG_NOSIGNAL
  return static_cast<long>(::send(handle, data, size, MSG_NOSIGNAL));
#else
  return static_cast<long>(::send(handle, data, size, 0));  // macOS: see SO_NOSIGPIPE
#endif
}

#endif

/// Milliseconds until `deadline` for poll: at most 100, so that a cancellation is noticed soon; 0 after the deadline.
inline int poll_timeout(clock::time_point deadline) {
  const auto left = std::chrono::ceil<milliseconds>(deadline - clock::now()).count();
  return static_cast<int>((std::clamp<std::int64_t>)(left, 0, 100));
}

// ---- connecting to a host

/// The address of a socket, of either family.
struct socket_address {
  sockaddr_storage storage{};
  socklen_t size = 0;

  int family() const { return storage.ss_family; }
  const sockaddr* data() const { return reinterpret_cast<const sockaddr*>(&storage); }
  friend bool operator==(const socket_address& a, const socket_address& b) {
    return a.size == b.size && std::memcmp(&a.storage, &b.storage, static_cast<std::size_t>(a.size)) == 0;
  }
};
using socket_addresses = std::vector<socket_address>;

/// Resolves a host. Blocks; cannot be cancelled. Returns 0, or a code for resolver_text.
inline int resolve_host(const std::string& host, int port, socket_addresses& addresses) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* list = nullptr;
  if (const int code = ::getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &list)) return code;
  const std::unique_ptr<addrinfo, void (*)(addrinfo*)> freed_at_exit(
      list, [](addrinfo* all) { ::freeaddrinfo(all); });
  for (const addrinfo* entry = list; entry; entry = entry->ai_next) {
    socket_address address;
    if (entry->ai_addrlen > sizeof address.storage) continue;
    address.size = static_cast<socklen_t>(entry->ai_addrlen);
    std::memcpy(&address.storage, entry->ai_addr, entry->ai_addrlen);
    addresses.push_back(address);
  }
  return 0;
}

/// The order of attempts (RFC 8305, section 4): families alternate, beginning with that of the first address.
inline socket_addresses interleave_families(const socket_addresses& addresses) {
  socket_addresses first, second, ordered;
  for (const auto& address : addresses) {
    (address.family() == addresses.front().family() ? first : second).push_back(address);
  }
  for (std::size_t index = 0; index < addresses.size(); ++index) {
    if (index < first.size()) ordered.push_back(first[index]);
    if (index < second.size()) ordered.push_back(second[index]);
  }
  return ordered;
}

/// The delay between the starts of two attempts (RFC 8305, section 8).
inline constexpr milliseconds connection_attempt_delay{250};

/// Concurrent attempts to connect to the addresses of a host (RFC 8305, section 5). The first to succeed wins.
class connection_race {
 public:
  connection_race(const socket_addresses& addresses, clock::time_point deadline, const http_request& request)
      : addresses_(addresses), deadline_(deadline), request_(request) {
    pending_.reserve(addresses.size());  // so that std::bad_alloc cannot leak a socket
    indices_.reserve(addresses.size());
  }
  connection_race(const connection_race&) = delete;
  connection_race& operator=(const connection_race&) = delete;
  ~connection_race() {
    for (const auto& entry : pending_) close_socket(entry.fd);
  }

  /// Blocks. Returns a connected, non-blocking socket, which the caller closes. Returns no_socket after a failure.
  socket_handle run() {
    for (auto next_start = clock::now();;) {
      if (started_ < addresses_.size() && (pending_.empty() || clock::now() >= next_start)) {
        next_start = clock::now() + connection_attempt_delay;
        start(addresses_[started_++]);
        continue;
      }
      if (pending_.empty()) return no_socket;
      if (request_.cancelled()) return failure_.clear(), no_socket;
      const auto until = started_ < addresses_.size() ? (std::min)(next_start, deadline_) : deadline_;
      const int ready = poll_sockets(pending_.data(), pending_.size(), poll_timeout(until));
      if (ready > 0) {
        const std::size_t before = pending_.size();
        if (const socket_handle winner = take_finished(); winner != no_socket) return winner;
        if (pending_.size() < before) next_start = clock::now();  // a failure starts the next attempt at once
      } else if (ready < 0 && !would_block(socket_error())) {
        return failure_ = "poll: " + system_text(socket_error()), no_socket;
      } else if (clock::now() >= deadline_) {
        return failure_ = "no answer in time", no_socket;
      }
    }
  }
  /// The index of the address that won.
  std::size_t winner() const { return winner_; }
  /// The reason why the last attempt failed. Empty if the request was cancelled.
  const std::string& failure() const { return failure_; }

 private:
  void start(const socket_address& address) {
    const socket_handle socket = open_socket(address.family());
    if (socket == no_socket) {
      failure_ = system_text(socket_error());
      return;
    }
    pollfd entry{};
    entry.fd = socket;
    entry.events = POLLOUT;
    const int code = ::connect(socket, address.data(), address.size) == 0 ? 0 : socket_error();
    if (code == 0 || would_block(code)) {  // poll reports a finished connect, too
      pending_.push_back(entry);
      indices_.push_back(started_ - 1);
      return;
    }
    close_socket(socket);
    failure_ = system_text(code);
  }

  /// Removes sockets that poll reported: closes failed ones, and returns the first connected one, or no_socket.
  socket_handle take_finished() {
    for (std::size_t i = 0; i < pending_.size();) {
      if (pending_[i].revents == 0) {
        ++i;
        continue;
      }
      const socket_handle socket = pending_[i].fd;
      winner_ = indices_[i];
      pending_.erase(pending_.begin() + static_cast<std::ptrdiff_t>(i));
      indices_.erase(indices_.begin() + static_cast<std::ptrdiff_t>(i));
      int code = 0;
      socklen_t size = sizeof code;
      if (::getsockopt(socket, SOL_SOCKET, SO_ERROR, reinterpret_cast<char*>(&code), &size) != 0) {
        code = socket_error();
      }
      if (code == 0) return socket;
      close_socket(socket);
      failure_ = system_text(code);
    }
    return no_socket;
  }

  const socket_addresses& addresses_;
  const clock::time_point deadline_;
  const http_request& request_;
  std::size_t started_ = 0, winner_ = 0;
  std::vector<pollfd> pending_ = {};  // connecting sockets; indices_ has the index of each address
  std::vector<std::size_t> indices_ = {};
  std::string failure_ = "it has no address";
};

/// Remembers, for hosts whose first address failed or was silent, the address that connected; later connections try it
/// first. For other hosts the resolver's order stays, which spreads the load over a host's addresses.
class address_memory {
 public:
  std::mutex mutex;  ///< protects the addresses; each function locks it

  /// Moves the remembered address to the front, if it is still among the host's.
  void prefer_remembered(const std::string& host, socket_addresses& addresses) {
    const std::lock_guard<std::mutex> lock(mutex);
    for (std::size_t known = 0; known < hosts_.size(); ++known) {
      if (hosts_[known] != host) continue;
      for (std::size_t i = 1; i < addresses.size(); ++i) {
        if (!(addresses[i] == winners_[known])) continue;
        for (auto place = i; place > 0; --place) std::swap(addresses[place], addresses[place - 1]);
        return;
      }
    }
  }
  void remember(const std::string& host, const socket_address& address) {
    const std::lock_guard<std::mutex> lock(mutex);
    for (std::size_t known = 0; known < hosts_.size(); ++known) {
      if (hosts_[known] == host) return void(winners_[known] = address);
    }
    if (hosts_.size() == max_hosts) {
      hosts_.erase(hosts_.begin());
      winners_.erase(winners_.begin());
    }
    hosts_.push_back(host);
    winners_.push_back(address);
  }

 private:
  static constexpr std::size_t max_hosts = 64;
  std::vector<std::string> hosts_;  // "host:port"; the oldest first
  socket_addresses winners_;        // of each host
};

struct connect_outcome {
  socket_handle socket = no_socket;  ///< connected and non-blocking; the caller closes it
  std::string failure = {};          ///< why there is no socket; empty: the request was cancelled
};

/// Connects to a host. `host` is "host:port"; `resolved` has its addresses in the resolver's order.
inline connect_outcome connect_to_host(const std::string& host, const socket_addresses& resolved,
                                       clock::time_point deadline, const http_request& request,
                                       address_memory& memory) {
  auto addresses = interleave_families(resolved);
  memory.prefer_remembered(host, addresses);
  connection_race race(addresses, deadline, request);
  struct socket_owner {  // std::bad_alloc must not leak the socket
    socket_handle socket;
    ~socket_owner() {
      if (socket != no_socket) close_socket(socket);
    }
  } connected{race.run()};
  if (connected.socket == no_socket) return {no_socket, race.failure()};
  if (race.winner() > 0) memory.remember(host, addresses[race.winner()]);
  return {std::exchange(connected.socket, no_socket), {}};
}

// ---- the channel: bytes to and from a peer

/// A TCP connection with a buffer of received bytes; with TLS after start_tls(). Only connect() and wait() block.
class channel {
 public:
  static constexpr std::size_t buffer_bytes = 65536;

  channel() = default;
  channel(const channel&) = delete;
  channel& operator=(const channel&) = delete;
  ~channel() { close(); }

  bool is_open() const { return socket_ != no_socket; }

  /// Until detach(), failures are recorded in `current`, and its request's timeouts and cancellation apply.
  void attach(exchange& current) { exchange_ = &current; }
  void detach() { exchange_ = nullptr; }

  static constexpr clock::time_point no_deadline = (clock::time_point::max)();
  /// Begins a stage, which messages name. The stage must end by the deadline. Without a deadline, each wait may take the
  /// request's idle timeout.
  void enter(const char* stage, clock::time_point deadline = no_deadline) {
    stage_ = stage;
    deadline_ = deadline;
  }

  bool connect(const url& peer, address_memory& memory) {
    start_sockets();
    socket_addresses addresses;
    if (const int code = resolve_host(peer.host, peer.port, addresses)) {
      return fail("the name " + in_quotes(peer.host) + " cannot be resolved: " + resolver_text(code));
    }
    enter("connecting", deadline_after(exchange_->request.connect_timeout));
    const std::string host = request_route::authority(peer);
    const auto connected = connect_to_host(host, addresses, deadline_, exchange_->request, memory);
    if (connected.socket == no_socket) {
      if (connected.failure.empty()) return exchange_->fail(errc::cancelled, "cancelled");
      return fail("cannot connect to " + std::string(exchange_->route.has_proxy() ? "the proxy " : "") +
                  host + ": " + connected.failure);
    }
    socket_ = connected.socket;
    const int on = 1;
    ::setsockopt(socket_, IPPROTO_TCP, TCP_NODELAY, reinterpret_cast<const char*>(&on), sizeof on);
    return true;
  }

  bool write(std::string_view bytes) {
    while (!bytes.empty()) {
      const long count = write_some(bytes);
      if (count < 0) return false;
      bytes.remove_prefix(static_cast<std::size_t>(count));
    }
    return true;
  }

  /// The received bytes that are not consumed yet; waits for some if there are none. Empty after an orderly close by the
  /// peer, or after a failure.
  std::string_view peek() {
    if (begin_ == end_) {
      if (exchange_->is_cancelled()) return {};
      const long count = read_some(buffer_.data(), buffer_.size());
      begin_ = 0;
      end_ = count > 0 ? static_cast<std::size_t>(count) : 0;
      exchange_->was_answered = exchange_->was_answered || count > 0;
    }
    return unread();
  }
  /// The received bytes that are not consumed yet. Does not wait.
  std::string_view unread() const { return {buffer_.data() + begin_, end_ - begin_}; }
  void consume(std::size_t count) { begin_ += count; }

  /// Reads a line, drops its end (CRLF or LF), and subtracts its length from `budget`. A longer line is a
  /// protocol_violation: "<part> has more than <limit>".
  bool read_line(std::string& line, std::size_t& budget, const char* part, std::size_t limit) {
    line.clear();
    for (bool is_complete = false; !is_complete;) {
      const std::string_view bytes = peek();
      if (bytes.empty()) return fail_at_end();
      const auto line_feed = bytes.find('\n');
      is_complete = line_feed != std::string_view::npos;
      const auto count = is_complete ? line_feed + 1 : bytes.size();
      if (count > budget) {
        return exchange_->fail(errc::protocol_violation,
                               std::string(part) + " has more than " + readable_bytes(limit));
      }
      budget -= count;
      line.append(bytes.substr(0, line_feed));
      consume(count);
    }
    if (!line.empty() && line.back() == '\r') line.pop_back();
    return true;
  }

  /// Records that the peer closed the connection too early, unless a failure was recorded before. Returns false.
  bool fail_at_end() {
    const request_route& route = exchange_->route;
    if (exchange_->has_head) return fail_closed("the peer closed the connection before the end of the body");
    if (exchange_->was_answered)
      return fail_closed("the peer closed the connection within the head of its response");
    return fail_closed(
        std::string("the peer closed the connection without a response") +
        (route.is_secure() || route.has_proxy() ? "" : " (if this is a TLS port, use https://)"));
  }

  /// Whether an idle connection can be reused: it is open, belongs to this process, and has received no unexpected bytes.
  bool is_quiet() {
    if (!is_open() || process_ != this_process() || begin_ != end_) return false;
    char byte;
#ifndef WANDB_RESTORE_NO_OPENSSL
    if (tls_) {  // SSL_peek also processes pending TLS messages, such as session tickets
      ERR_clear_error();
      const int count = SSL_peek(tls_, &byte, 1);
      const int code = SSL_get_error(tls_, count);
      is_sound_ = is_sound_ && code != SSL_ERROR_SSL && code != SSL_ERROR_SYSCALL;
      return count <= 0 && code == SSL_ERROR_WANT_READ;
    }
#endif
    return receive_bytes(socket_, &byte, 1, MSG_PEEK) < 0 && would_block(socket_error());
  }

  /// Closes the connection. A forked child closes only its descriptor, without close_notify: the parent may still use the
  /// connection.
  void close() {
#ifndef WANDB_RESTORE_NO_OPENSSL
    if (tls_) {
      if (is_sound_ && process_ == this_process()) {
        SSL_shutdown(tls_);
      } else {
        SSL_set_shutdown(tls_, SSL_SENT_SHUTDOWN | SSL_RECEIVED_SHUTDOWN);
      }
      SSL_free(tls_);
      ERR_clear_error();
    }
    tls_ = nullptr;
#endif
    if (is_open()) close_socket(socket_);
    socket_ = no_socket;
    begin_ = end_ = 0;
  }

#ifndef WANDB_RESTORE_NO_OPENSSL
  /// Makes the TLS handshake. Fails with protocol_violation if bytes were received before it: they would be taken for
  /// decrypted ones.
  bool start_tls(SSL_CTX* context, const std::string& host) {
    if (!unread().empty()) {
      return exchange_->fail(errc::protocol_violation,
                             "the proxy sent bytes of its own into the tunnel before the TLS handshake: "
                             "refused; does " +
                                 request_route::authority(exchange_->route.first_hop()) +
                                 " support CONNECT?");
    }
    stage_ = "waiting for the TLS handshake";
    tls_ = SSL_new(context);
    BIO* const bio = bio_method() != nullptr ? BIO_new(bio_method()) : nullptr;
    if (!tls_ || !bio) {
      BIO_free(bio);
      return fail("OpenSSL could not start: out of memory");
    }
    BIO_set_data(bio, this);
    SSL_set_bio(tls_, bio, bio);
    is_sound_ = true;

    X509_VERIFY_PARAM* const expected = SSL_get0_param(tls_);
    if (X509_VERIFY_PARAM_set1_ip_asc(expected, host.c_str()) != 1) {  // not an IP address: a name
      X509_VERIFY_PARAM_set_hostflags(expected, X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS);
      void* const name =
          const_cast<char*>(host.c_str());  // the macro SSL_set_tlsext_host_name has an old-style cast
      if (X509_VERIFY_PARAM_set1_host(expected, host.c_str(), host.size()) != 1 ||
          SSL_ctrl(tls_, SSL_CTRL_SET_TLSEXT_HOSTNAME, TLSEXT_NAMETYPE_host_name, name) != 1) {
        return exchange_->fail(errc::invalid_argument, "TLS cannot use the host name " + in_quotes(host));
      }
    }
    const long done = repeat([&] { return SSL_connect(tls_); });
    return done > 0 || (done == 0 && fail("the peer closed the connection in the TLS handshake"));
  }
#endif

 private:
  bool fail(const std::string& text) { return exchange_->fail(errc::connection_failed, text); }
  /// Records that the peer closed the connection, unless a failure was recorded before. Returns false.
  bool fail_closed(const std::string& text) {
    exchange_->was_closed = exchange_->was_closed || !exchange_->failure;
    return fail(text);
  }
  /// Records that a system call failed, or that the peer closed the connection unexpectedly. Returns -1.
  long fail_lost() {
    fail_closed(std::string("the connection was lost while ") + stage_ +
                (code_ != 0 ? ": " + system_text(code_) : ""));
    return -1;
  }

  /// Waits until the socket is ready. Returns false after a timeout, a cancellation or a failure.
  bool wait(short events) {
    const auto deadline =
        deadline_ != no_deadline ? deadline_ : deadline_after(exchange_->request.idle_timeout);
    for (;;) {
      if (exchange_->is_cancelled()) return false;
      pollfd entry{};
      entry.fd = socket_;
      entry.events = events;
      const int timeout = poll_timeout(deadline);
      const int count = poll_sockets(&entry, 1, timeout);
      if (count > 0) return true;  // the next call reports an error or a hang-up
      if (count < 0 && !would_block(socket_error())) return fail("poll: " + system_text(socket_error()));
      if (timeout == 0) return fail(std::string("timed out while ") + stage_);
    }
  }

  // Each makes one system call, returns its result and sets code_.
  long receive(char* out, std::size_t size) {
    const long count = receive_bytes(socket_, out, size);
    code_ = count < 0 ? socket_error() : 0;
    has_ended_ = count == 0;
    return count;
  }
  long transmit(const char* data, std::size_t size) {
    const long count = send_bytes(socket_, data, size);
    code_ = count < 0 ? socket_error() : 0;
    return count;
  }

  /// Reads at least one byte. Returns 0 after an orderly close by the peer, -1 after a failure.
  long read_some(char* out, std::size_t size) {
#ifndef WANDB_RESTORE_NO_OPENSSL
    if (tls_) return repeat([&] { return SSL_read(tls_, out, static_cast<int>(size)); });
#endif
    for (;;) {
      const long count = receive(out, size);
      if (count >= 0) return count;
      if (!would_block(code_)) return fail_lost();
      if (!wait(POLLIN)) return -1;
    }
  }

  /// Writes at least one byte. Returns -1 after a failure.
  long write_some(std::string_view bytes) {
#ifndef WANDB_RESTORE_NO_OPENSSL
    if (tls_) {
      const int size = static_cast<int>((std::min)(bytes.size(), buffer_bytes));
      const long count = repeat([&] { return SSL_write(tls_, bytes.data(), size); });
      return count != 0 ? count : fail_lost();
    }
#endif
    for (;;) {
      const long count = transmit(bytes.data(), bytes.size());
      if (count >= 0) return count;
      if (!would_block(code_)) return fail_lost();
      if (!wait(POLLOUT)) return -1;
    }
  }

#ifndef WANDB_RESTORE_NO_OPENSSL
  /// Repeats an OpenSSL call until it succeeds (returns > 0), the peer has sent close_notify (0), or it fails (-1).
  template <class Call>
  long repeat(Call call) {
    for (;;) {
      ERR_clear_error();
      const int done = call();
      if (done > 0) return done;
      switch (SSL_get_error(tls_, done)) {
        case SSL_ERROR_WANT_READ:
          if (!wait(POLLIN)) return is_sound_ = false, -1;
          break;
        case SSL_ERROR_WANT_WRITE:
          if (!wait(POLLOUT)) return is_sound_ = false, -1;
          break;
        case SSL_ERROR_ZERO_RETURN: return 0;
        default: is_sound_ = false; return fail_tls();
      }
    }
  }

  /// Records why an OpenSSL call failed. Returns -1.
  long fail_tls() {
    const long verdict = SSL_get_verify_result(tls_);
    if (SSL_get_verify_mode(tls_) != SSL_VERIFY_NONE && verdict != X509_V_OK) {
      exchange_->fail_permanently(
          std::string("the server's certificate is refused: ") + X509_verify_cert_error_string(verdict) +
          " (for a private authority, or a proxy that inspects TLS, name its CA bundle in SSL_CERT_FILE or "
          "REQUESTS_CA_BUNDLE; otherwise check host name and clock)");
      return -1;
    }
    if (!greeting_.empty() && (greeting_[0] < 20 || greeting_[0] > 23)) {  // not the type of a TLS record
      exchange_->fail_permanently(starts_with(greeting_, "HTTP/")
                                      ? "the server speaks plain http: use http://"
                                      : "the server does not speak TLS on this port");
      return -1;
    }
    const unsigned long code = ERR_peek_error();
    const char* const reason = ERR_reason_error_string(code);
    const int number = ERR_GET_LIB(code) == ERR_LIB_SSL ? ERR_GET_REASON(code) : 0;
    const int alert = number - SSL_AD_REASON_OFFSET;
    if (is_permanent_alert(alert) || number == SSL_R_UNSUPPORTED_PROTOCOL) {
      const bool is_version = alert == SSL_AD_PROTOCOL_VERSION || number == SSL_R_UNSUPPORTED_PROTOCOL;
      exchange_->fail_permanently(
          std::string("the server and this client do not agree on TLS: ") + (reason ? reason : "alert") +
          (is_version ? " (TLS 1.2 or later is needed)"
                      : " (the server may demand a client certificate, which is not supported)"));
      return -1;
    }
    if (code_ != 0 || has_ended_ || !reason) return fail_lost();
    fail(std::string("TLS failed while ") + stage_ + ": " + reason);
    return -1;
  }

  /// Whether a retry would get this alert again (RFC 8446, section 6.2): alerts about versions, certificates and names.
  static bool is_permanent_alert(int alert) {
    return (alert >= SSL_AD_BAD_CERTIFICATE && alert <= SSL_AD_ACCESS_DENIED) ||
           alert == SSL_AD_HANDSHAKE_FAILURE || alert == SSL_AD_PROTOCOL_VERSION ||
           alert == SSL_AD_INSUFFICIENT_SECURITY || alert == SSL_AD_UNRECOGNIZED_NAME ||
           alert == SSL_AD_CERTIFICATE_REQUIRED;
  }

  // A BIO over receive() and transmit(): OpenSSL's own socket BIO raises SIGPIPE.
  static BIO_METHOD* bio_method() {
    static BIO_METHOD* const method = [] {
      BIO_METHOD* const made =
          BIO_meth_new(BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, "wandb_restore channel");
      if (!made) return made;
      BIO_meth_set_read(made, [](BIO* bio, char* out, int size) {
        BIO_clear_retry_flags(bio);
        channel& self = *static_cast<channel*>(BIO_get_data(bio));
        const long count = self.receive(out, static_cast<std::size_t>(size));
        if (count > 0 && self.greeting_.empty()) {
          self.greeting_.assign(out, (std::min)(static_cast<std::size_t>(count), std::size_t{5}));
        }
        if (count < 0 && would_block(self.code_)) BIO_set_retry_read(bio);
        return static_cast<int>(count);
      });
      BIO_meth_set_write(made, [](BIO* bio, const char* data, int size) {
        BIO_clear_retry_flags(bio);
        channel& self = *static_cast<channel*>(BIO_get_data(bio));
        const long count = self.transmit(data, static_cast<std::size_t>(size));
        if (count < 0 && would_block(self.code_)) BIO_set_retry_write(bio);
        return static_cast<int>(count);
      });
      BIO_meth_set_ctrl(made,
                        [](BIO*, int command, long, void*) { return command == BIO_CTRL_FLUSH ? 1L : 0L; });
      BIO_meth_set_create(made, [](BIO* bio) { return BIO_set_init(bio, 1), 1; });
      return made;
    }();
    return method;
  }

  SSL* tls_ = nullptr;
  bool is_sound_ = false;      ///< no OpenSSL call has failed: close_notify may be sent
  std::string greeting_ = {};  ///< the first bytes received in the TLS handshake, five at most
#endif
  socket_handle socket_ = no_socket;
  const std::uint64_t process_ = this_process();  ///< the process that opened the socket
  exchange* exchange_ = nullptr;
  const char* stage_ = "";
  clock::time_point deadline_ = no_deadline;
  int code_ = 0;            ///< error of the last system call, or 0
  bool has_ended_ = false;  ///< the peer has closed its side
  std::string buffer_ = std::string(buffer_bytes, '\0');
  std::size_t begin_ = 0, end_ = 0;  ///< the part of the buffer that is not consumed
};

// ---- heads (RFC 9112, sections 2 to 5)

/// Whether a header field that is a list of tokens contains `token`.
inline bool has_token(const http_response& head, std::string_view name, std::string_view token) {
  for (const auto& [field, value] : head.headers) {
    if (!equal_ignoring_case(field, name)) continue;
    for (const auto part : split(value, ',')) {
      if (equal_ignoring_case(trim(part), token)) return true;
    }
  }
  return false;
}

/// Records that the peer expects TLS. Returns false.
inline bool fail_expects_tls(exchange& current, int status = 0) {
  return current.fail_permanently(current.route.has_proxy()
                                      ? "the proxy expects TLS; only plain http:// proxies are supported"
                                      : "the server expects TLS: use https://",
                                  status);
}
/// Passes a response on to the sink of an exchange. Buffers the beginning of the body of a 400 response, and searches it
/// for the texts by which nginx, Apache, Go and Tomcat say that the server expects TLS.
class tls_hint_filter final : public body_sink {
 public:
  explicit tls_hint_filter(exchange& current) : exchange_(current) {}

  bool start(const http_response& head) override {
    is_holding_ = head.status == 400 && !exchange_.route.is_secure();
    return is_holding_ || exchange_.sink.start(head);
  }
  bool write(std::string_view bytes) override {
    if (!is_holding_) return exchange_.sink.write(bytes);
    held_ += bytes;
    if (says_that_tls_is_expected()) {
      is_holding_ = false;  // nothing is passed on
      return fail_expects_tls(exchange_, exchange_.head.status);
    }
    return held_.size() < max_searched || release();
  }
  /// Passes on what is held. Returns false if the sink stops.
  bool release() {
    if (!is_holding_) return true;
    is_holding_ = false;
    return exchange_.sink.start(exchange_.head) && (held_.empty() || exchange_.sink.write(held_));
  }

 private:
  static constexpr std::size_t max_searched = 4096;

  bool says_that_tls_is_expected() const {
    const auto beginning = std::string_view(held_).substr(0, max_searched);
    for (const char* text :
         {"HTTP request was sent to HTTPS port", "speaking plain HTTP to an SSL-enabled",
          "HTTP request to an HTTPS server", "combination of host and port requires TLS"}) {
      if (beginning.find(text) != std::string_view::npos) return true;
    }
    return false;
  }

  exchange& exchange_;
  std::string held_;
  bool is_holding_ = false;
};

/// Reads the head of the final response. Skips interim responses.
class head_reader {
 public:
  head_reader(channel& peer, exchange& current) : peer_(peer), exchange_(current) {}

  bool read(http_response& head) {
    constexpr char tls_alert = 21;
    if (starts_with(peer_.peek(), {&tls_alert, 1})) return fail_expects_tls(exchange_);
    do {
      head = {};
      if (!read_line() || !parse_status_line(head)) return false;
      for (;;) {
        if (!read_line()) return false;
        if (line_.empty()) break;
        const auto colon = line_.find(':');
        if (colon == std::string::npos || !is_token({line_.data(), colon}) || !is_field_value(line_)) {
          return fail_malformed("a header line");
        }
        const auto value = trim(std::string_view(line_).substr(colon + 1));
        add_header(head.headers, {line_.data(), colon}, value);
      }
    } while (head.status < 200);
    return true;
  }
  /// The peer speaks HTTP/1.1 or later: the connection stays open unless a header says otherwise.
  bool is_persistent() const { return is_persistent_; }

 private:
  bool read_line() { return peer_.read_line(line_, budget_, "the head of the response", max_head_bytes); }
  bool parse_status_line(http_response& head) {
    const std::string_view line = line_;
    const auto status = to_number(line.substr((std::min)(line.size(), std::size_t{9}), 3));
    if (!starts_with(line, "HTTP/1.") || line.size() < 12 || !is_digit(line[7]) || line[8] != ' ' ||
        !status || *status < 100 || *status == 101 || (line.size() > 12 && line[12] != ' ')) {
      return fail_malformed("the status line");
    }
    head.status = static_cast<int>(*status);
    is_persistent_ = line[7] != '0';
    return true;
  }
  bool fail_malformed(const char* part) {
    // Show only the name of a field, or the beginning of a status line: a value, and the continuation of a folded line, may be
    // a signed URL or a cookie.
    const std::string_view name = std::string_view(line_).substr(0, line_.find(':'));
    const bool is_shown = (name.size() < line_.size() && is_token(name)) || starts_with(line_, "HTTP/");
    const std::string shown = is_shown ? ": " + in_quotes(name.substr(0, name.find_first_of("?="))) : "";
    return exchange_.fail(errc::protocol_violation,
                          std::string(part) + " of the response is malformed" + shown +
                              "; check that this is an HTTP server, and that no proxy changes its responses");
  }

  channel& peer_;
  exchange& exchange_;
  std::string line_;
  std::size_t budget_ = max_head_bytes;
  bool is_persistent_ = false;
};

/// The error for a malformed method or header field: a line break in it would begin another field.
inline error malformed_header(const request_route& route) {
  return error(errc::invalid_argument, "a header for " + route.server.redacted() +
                                           " is malformed: check extra_headers, username, user_email and "
                                           "user_agent for control characters");
}

/// The bytes of a request. Empty if the method or a header field is malformed.
inline std::optional<std::string> request_message(const http_request& request, const request_route& route) {
  const std::string origin = route.server.origin();
  std::string text =
      request.method + ' ' + (route.sends_to_proxy() ? origin : "") + route.server.target + " HTTP/1.1\r\n";
  const auto add = [&](std::string_view name, std::string_view value) {
    text.append(name).append(": ").append(value).append("\r\n");
    return is_header(name, value);
  };
  bool is_clean = is_token(request.method) && add("Host", origin.substr(origin.find("//") + 2));
  for (const auto& [name, value] : request.headers) is_clean = add(name, value) && is_clean;
  if (route.sends_to_proxy() && !route.proxy_authorization.empty())
    add("Proxy-Authorization", route.proxy_authorization);
  is_clean =
      is_clean && is_header("Proxy-Authorization", route.proxy_authorization);  // CONNECT sends it, too
  if (!request.body.empty() || request.method == "POST" || request.method == "PUT" ||
      request.method == "PATCH") {
    add("Content-Length", std::to_string(request.body.size()));
  }
  if (!is_clean) return std::nullopt;
  return text + "\r\n" + request.body;
}

// ---- bodies (RFC 9112, sections 6 and 7)

/// Reads the body of a response and passes it to a sink.
class body_reader {
 public:
  body_reader(channel& peer, exchange& current, body_sink& sink)
      : peer_(peer), exchange_(current), sink_(sink) {}

  /// Determines from the head how the body is delimited (RFC 9112, section 6.3).
  bool find_framing() {
    bool has_length = false;
    const http_response& head = exchange_.head;
    for (const auto& [name, value] : head.headers) {
      if (equal_ignoring_case(name, "Content-Length")) {
        const auto number = to_number(value);
        if (!number || *number > max_body_bytes || (has_length && *number != length_)) {
          return fail("bad Content-Length in the response: " + in_quotes(value));
        }
        has_length = true;
        length_ = *number;
      } else if (equal_ignoring_case(name, "Transfer-Encoding")) {
        if (is_chunked_ || !equal_ignoring_case(value, "chunked")) {
          return fail("unknown Transfer-Encoding in the response: " + in_quotes(value));
        }
        is_chunked_ = true;
      }
    }
    if (exchange_.request.method == "HEAD" || head.status == 204 || head.status == 304) {
      is_chunked_ = false;
      length_ = 0;
      return true;
    }
    // With both fields, a proxy may see the body end elsewhere: do not reuse the connection.
    is_delimited_ = is_chunked_ != has_length;
    ends_with_connection_ = !is_chunked_ && !has_length;
    return true;
  }
  /// The connection can carry another response after this body.
  bool is_delimited() const { return is_delimited_; }

  bool read() {
    if (is_chunked_) return pass_on_chunks();
    return ends_with_connection_ ? pass_on_rest() : pass_on(length_);
  }

 private:
  static constexpr std::uint64_t max_body_bytes = std::uint64_t{1} << 62;
  static constexpr std::size_t max_line_bytes = 8 * 1024, max_trailer_bytes = 64 * 1024;

  bool fail(const std::string& text) { return exchange_.fail(errc::protocol_violation, text); }

  /// Passes at most `limit` received bytes to the sink. Returns their number; 0 after a close by the peer or a failure.
  std::uint64_t pass_some(std::uint64_t limit) {
    auto bytes = peer_.peek();
    bytes = bytes.substr(0, static_cast<std::size_t>((std::min<std::uint64_t>)(limit, bytes.size())));
    if (!bytes.empty() && !sink_.write(bytes)) {
      exchange_.fail(errc::cancelled, "stopped by the receiver");
      return 0;
    }
    peer_.consume(bytes.size());
    return bytes.size();
  }
  bool pass_on(std::uint64_t size) {
    while (size > 0) {
      const auto passed = pass_some(size);
      if (passed == 0) return peer_.fail_at_end();
      size -= passed;
    }
    return true;
  }
  bool pass_on_rest() {
    while (pass_some(max_body_bytes) > 0) {}
    return !exchange_.failure;
  }

  /// RFC 9112, section 7.1. Chunk extensions and trailers are skipped.
  bool pass_on_chunks() {
    std::string line;
    const auto read_line = [&](const char* part) {
      std::size_t budget = max_line_bytes;
      return peer_.read_line(line, budget, part, max_line_bytes);
    };
    for (std::uint64_t total = 0;;) {
      if (!read_line("the size line of a chunk")) return false;
      const auto size = to_number(trim(std::string_view(line).substr(0, line.find(';'))), 16);
      // Do not show the line: if the body is not chunked at all, it is a part of the content.
      if (!size || *size > max_body_bytes - total) return fail("the size line of a chunk is malformed");
      if (*size == 0) break;
      total += *size;
      if (!pass_on(*size) || !read_line("the end of a chunk")) return false;
      if (!line.empty()) return fail("a chunk of the body is longer than its size line says");
    }
    std::size_t trailer_bytes = 0;
    do {
      if (!read_line("a trailer line of the body")) return false;
      trailer_bytes += line.size() + 1;
      if (trailer_bytes > max_trailer_bytes) {
        return fail("the trailers of the body have more than " + readable_bytes(max_trailer_bytes));
      }
    } while (!line.empty());
    return true;
  }

  channel& peer_;
  exchange& exchange_;
  body_sink& sink_;
  std::uint64_t length_ = 0;
  bool is_chunked_ = false, ends_with_connection_ = false, is_delimited_ = true;
};

// ---- connections

/// Idle connections of a transport. Safe to use from several threads at once.
template <class Connection>
class idle_connections {
 public:
  /// Removes and returns a reusable connection; null if there is none. Closes connections that have been idle for max_age.
  std::unique_ptr<Connection> take(const std::string& key, clock::time_point now = clock::now()) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto index = idle_.size(); index-- > 0;) {
      const bool is_old = now - idle_[index].since >= max_age;
      if (idle_[index].kept->key() != key && !is_old) continue;
      auto taken = std::move(idle_[index].kept);
      idle_.erase(idle_.begin() + static_cast<std::ptrdiff_t>(index));
      if (!is_old && taken->is_reusable()) return taken;
    }
    return nullptr;
  }
  /// Keeps a connection. Beyond max_idle, closes the one that has been idle longest.
  void give_back(std::unique_ptr<Connection> used, clock::time_point now = clock::now()) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (idle_.size() == max_idle) idle_.erase(idle_.begin());
    idle_.push_back({std::move(used), now});
  }
  /// Closes the connections of a route.
  void drop(const std::string& key) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto index = idle_.size(); index-- > 0;) {
      if (idle_[index].kept->key() == key) idle_.erase(idle_.begin() + static_cast<std::ptrdiff_t>(index));
    }
  }
  /// Closes the connections. Returns false if the lock is held, and does nothing.
  bool try_clear() {
    if (!mutex_.try_lock()) return false;
    idle_.clear();
    mutex_.unlock();
    return true;
  }

 private:
  struct entry {
    std::unique_ptr<Connection> kept;
    clock::time_point since;
  };
  static constexpr std::size_t max_idle = 64;
  // Routers and servers forget idle connections, some without a word: a request on one would wait for its time limit.
  static constexpr std::chrono::seconds max_age{90};
  std::mutex mutex_;
  std::vector<entry> idle_;  // the last used one at the end
};

#ifndef WANDB_RESTORE_NO_OPENSSL
using tls_context = SSL_CTX;
#else
using tls_context = void;
#endif

/// A connection for one route. Carries one exchange at a time.
class connection {
 public:
  connection(const request_route& route, std::shared_ptr<tls_context> tls)
      : key_(route.key()), tls_(std::move(tls)) {}

  const std::string& key() const { return key_; }
  /// Whether the connection can carry another exchange now.
  bool is_reusable() { return is_reusable_ && channel_.is_quiet(); }

  /// Makes one exchange; connects first if necessary. Returns false if it sets `current.failure`.
  bool perform(exchange& current, const std::string& message, address_memory& memory) {
    channel_.attach(current);
    is_reusable_ = false;
    const bool done = (channel_.is_open() || open(current, memory)) && transfer(current, message);
    channel_.detach();
    return done;
  }

 private:
  bool open(exchange& current, address_memory& memory) {
    const request_route& route = current.route;
    if (!channel_.connect(route.first_hop(), memory)) return false;
    current.sink.connected();
    if (!route.is_secure()) return true;
    if (route.has_proxy() && !open_tunnel(current)) return false;
#ifndef WANDB_RESTORE_NO_OPENSSL
    return channel_.start_tls(tls_.get(), route.server.host);
#else
    return false;  // not reached: send refuses https
#endif
  }

  /// Asks the proxy for a tunnel to the server (RFC 9110, section 9.3.6).
  bool open_tunnel(exchange& current) {
    const request_route& route = current.route;
    const std::string server = request_route::authority(route.server);
    std::string message = "CONNECT " + server + " HTTP/1.1\r\nHost: " + server + "\r\n";
    if (!route.proxy_authorization.empty()) {
      message += "Proxy-Authorization: " + route.proxy_authorization + "\r\n";
    }
    http_response answer;
    if (!channel_.write(message + "\r\n") || !head_reader(channel_, current).read(answer)) return false;
    return answer.status < 300 || current.fail_at_proxy(answer.status);
  }

  bool transfer(exchange& current, const std::string& message) {
    channel_.enter("sending the request");
    if (!channel_.write(message)) return false;
    channel_.enter("waiting for the response", deadline_after(current.request.idle_timeout));
    head_reader heads(channel_, current);
    const http_response& head = current.head;
    if (!heads.read(current.head)) return false;
    current.has_head = true;
    if (head.status == 407 && current.route.sends_to_proxy()) return current.fail_at_proxy(head.status);
    tls_hint_filter filter(current);
    body_reader body(channel_, current, filter);
    if (!body.find_framing()) return false;
    channel_.enter("receiving the body");
    if (!filter.start(head)) return current.fail(errc::cancelled, "stopped by the receiver");
    const bool is_whole = body.read();
    if (!filter.release() && is_whole) return current.fail(errc::cancelled, "stopped by the receiver");
    if (!is_whole) return false;
    is_reusable_ = heads.is_persistent() && body.is_delimited() && !has_token(head, "Connection", "close");
    return true;
  }

  const std::string key_;
  const std::shared_ptr<tls_context> tls_;
  channel channel_;
  bool is_reusable_ = false;
};

#ifndef WANDB_RESTORE_NO_OPENSSL
#ifdef _WIN32
inline bool load_system_certificates(SSL_CTX* context) {
  const HCERTSTORE store = CertOpenSystemStoreW(0, L"ROOT");
  if (!store) return false;
  for (PCCERT_CONTEXT each = nullptr; (each = CertEnumCertificatesInStore(store, each)) != nullptr;) {
    const unsigned char* der = each->pbCertEncoded;
    if (X509* const certificate = d2i_X509(nullptr, &der, static_cast<long>(each->cbCertEncoded))) {
      X509_STORE_add_cert(SSL_CTX_get_cert_store(context), certificate);
      X509_free(certificate);
    }
  }
  return CertCloseStore(store, 0) != 0;
}
#else
inline bool load_system_certificates(SSL_CTX* context) {
  return SSL_CTX_set_default_verify_paths(context) == 1;
}
#endif

/// Makes the TLS configuration that the connections of a process share, and loads the CA certificates.
inline result<std::shared_ptr<SSL_CTX>> make_tls_context(const std::filesystem::path& ca_file,
                                                         const std::filesystem::path& ca_directory,
                                                         bool verify) {
  const auto unusable = [](const char* what, const std::filesystem::path& location) {
    ERR_clear_error();
    return error(errc::invalid_argument,
                 std::string("the CA ") + what + ' ' + in_quotes(location) +
                     " is not readable, or has no certificates in PEM form: correct settings::ca_file and "
                     "ca_directory, SSL_CERT_FILE, SSL_CERT_DIR or REQUESTS_CA_BUNDLE");
  };
  std::shared_ptr<SSL_CTX> context(SSL_CTX_new(TLS_client_method()), SSL_CTX_free);
  if (!context) return error::permanent(errc::connection_failed, "OpenSSL could not be set up");
  SSL_CTX_set_min_proto_version(context.get(), TLS1_2_VERSION);
  SSL_CTX_set_mode(context.get(), SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_RELEASE_BUFFERS);
  // One system call may receive several TLS records.
  SSL_CTX_set_read_ahead(context.get(), 1);
  SSL_CTX_set_default_read_buffer_len(context.get(), channel::buffer_bytes);
  // Trust an intermediate CA certificate of a bundle, even if the bundle lacks its root.
  X509_VERIFY_PARAM_set_flags(SSL_CTX_get0_param(context.get()), X509_V_FLAG_PARTIAL_CHAIN);
  if (!verify) return context;

  SSL_CTX_set_verify(context.get(), SSL_VERIFY_PEER, nullptr);
  if (!ca_file.empty() && SSL_CTX_load_verify_locations(context.get(), utf8(ca_file).c_str(), nullptr) != 1) {
    return unusable("file", ca_file);
  }
  const std::string directories = utf8(ca_directory);
  const auto parts = split(directories, list_separator);
  bool any = false;
  for (const auto part : parts) any = any || facts_of(from_utf8(part))->is_directory;
  if (!ca_directory.empty() &&
      (!any ||  // OpenSSL would not notice before the handshake
       SSL_CTX_load_verify_locations(context.get(), nullptr, directories.c_str()) != 1)) {
    return unusable("directory", ca_directory);
  }
  if (ca_file.empty() && ca_directory.empty() && !load_system_certificates(context.get())) {
    return error::permanent(
        errc::connection_failed,
        "the system's CA certificates cannot be loaded: name a CA bundle in SSL_CERT_FILE");
  }
  return context;
}
#endif

/// The state that the connections of one process share. A forked child has its own: the parent still uses its connections.
struct connection_pool {
  address_memory memory = {};
  std::mutex tls_mutex = {};  ///< protects `tls`
  std::shared_ptr<tls_context> tls = {};
  idle_connections<connection> idle = {};

  /// Closes idle connections. Returns false if a lock was held during the fork.
  bool try_close() { return is_free(tls_mutex) && is_free(memory.mutex) && idle.try_clear(); }
};

}  // namespace detail

struct http_transport::state {
  explicit state(const settings& configuration)
      : ca_file(configuration.ca_file), ca_directory(configuration.ca_directory),
        verify(configuration.verify_tls) {}

  const std::filesystem::path ca_file, ca_directory;
  const bool verify;
  detail::per_process<detail::connection_pool> pools;

  /// Returns the pool's TLS configuration, which the first https request makes.
  result<std::shared_ptr<detail::tls_context>> shared_tls(detail::connection_pool& pool) {
#ifndef WANDB_RESTORE_NO_OPENSSL
    const std::lock_guard<std::mutex> lock(pool.tls_mutex);
    if (!pool.tls) {
      auto made = detail::make_tls_context(ca_file, ca_directory, verify);
      if (!made) return made;
      pool.tls = *std::move(made);
    }
    return pool.tls;
#else
    static_cast<void>(pool);
    return error(errc::invalid_argument,
                 "https needs OpenSSL, and this program was built with WANDB_RESTORE_NO_OPENSSL");
#endif
  }
};

WANDB_RESTORE_PRIVATE_INLINE http_transport::http_transport() : http_transport(settings{}) {}
WANDB_RESTORE_PRIVATE_INLINE http_transport::http_transport(const settings& configuration)
    : state_(std::make_shared<state>(configuration)) {}

WANDB_RESTORE_PRIVATE_INLINE result<http_response> http_transport::send(const http_request& request,
                                                                        body_sink& sink) {
  const auto route = detail::request_route::of(request);
  if (!route) return route.error();
  const auto message = detail::request_message(request, *route);
  if (!message) return detail::malformed_header(*route);
  detail::connection_pool& pool = state_->pools.get();
  std::shared_ptr<detail::tls_context> tls;
  if (route->is_secure()) {
    auto shared = state_->shared_tls(pool);
    if (!shared) return std::move(shared).error();
    tls = *std::move(shared);
  }

  auto connection = pool.idle.take(route->key());
  for (;;) {
    const bool is_fresh = !connection;
    if (is_fresh) connection.reset(new detail::connection(*route, tls));
    detail::exchange current{request, sink, *route};
    if (connection->perform(current, *message, pool.memory)) {
      if (connection->is_reusable()) pool.idle.give_back(std::move(connection));
      return std::move(current.head);
    }
    // If the peer closed the idle connection, send an idempotent request again, over a new connection (RFC 9112, section
    // 9.3.1). After a timeout do not: the caller would wait twice as long as it asked for.
    const bool is_idempotent = request.method == "GET" || request.method == "HEAD";
    const bool was_dropped = !is_fresh && !current.was_answered;
    // The other idle connections of the route are probably lost, too: a router may have forgotten all of them.
    if (was_dropped) pool.idle.drop(route->key());
    if (is_fresh || current.was_answered || !is_idempotent || !current.was_closed) {
      if (was_dropped) sink.connected();  // the server was reached before: retry_timeout applies
      return *std::move(current.failure);
    }
    connection = nullptr;
  }
}

}  // namespace WANDB_RESTORE_PRIVATE_ABI
}  // namespace wandb

// ==================================================================================== httplib_transport

#ifdef WANDB_RESTORE_HTTPLIB

#if !defined(WANDB_RESTORE_NO_OPENSSL) && !defined(CPPHTTPLIB_OPENSSL_SUPPORT)
#ifdef CPPHTTPLIB_HTTPLIB_H
#error                                                                                                       \
    "httplib.h was included without CPPHTTPLIB_OPENSSL_SUPPORT, which changes its classes: define that macro for \
the whole program, or WANDB_RESTORE_NO_OPENSSL if plain HTTP is enough"
#endif
#define CPPHTTPLIB_OPENSSL_SUPPORT
#endif
#if !WANDB_RESTORE_EXCEPTIONS && !defined(CPPHTTPLIB_NO_EXCEPTIONS)
#define CPPHTTPLIB_NO_EXCEPTIONS
#endif
#include <httplib.h>

namespace wandb {
inline namespace WANDB_RESTORE_PRIVATE_ABI {
namespace detail {

// ---- differences between the versions of cpp-httplib. The first overload of a pair is chosen where its call compiles.

template <class Client>
auto keep_target(Client& client, int) -> decltype(client.set_path_encode(false)) {
  client.set_path_encode(false);
}
template <class Client>
void keep_target(Client& client, long) {
  client.set_url_encode(false);  // the name before 0.24
}

template <class Client>
auto lift_body_limit(Client& client, int) -> decltype(client.set_payload_max_length(0)) {
  client.set_payload_max_length(SIZE_MAX);
}
template <class Client>
void lift_body_limit(Client&, long) {}  // this version has no limit

template <class Code>
auto is_refused_certificate(Code code, int) -> decltype(code == Code::SSLServerHostnameVerification) {
  return code == Code::SSLServerVerification || code == Code::SSLServerHostnameVerification;
}
template <class Code>
bool is_refused_certificate(Code code, long) {
  return code == Code::SSLServerVerification;
}

/// Header fields that cpp-httplib adds to a request without them. Some versions also send the proxy's credentials inside a
/// tunnel, and wait for a response to "Expect: 100-continue" before they send a body.
inline constexpr const char* added_fields[] = {"Accept",       "Accept-Encoding", "User-Agent",
                                               "Content-Type", "Expect",          "Proxy-Authorization"};

inline bool is_added_field(std::string_view name) {
  return std::any_of(std::begin(added_fields), std::end(added_fields),
                     [&](const char* added) { return equal_ignoring_case(name, added); });
}

/// Makes the client omit the fields in added_fields whose values are empty. Setting such a field to "" thus prevents the
/// client from adding the field. Returns false if the client has no such hook (before 0.15).
template <class Client>
auto leave_out_empty_fields(Client& client, int) -> decltype(client.set_header_writer(nullptr), true) {
  client.set_header_writer([](httplib::Stream& stream, httplib::Headers& fields) {
    std::string text;
    for (const auto& [name, value] : fields) {
      if (!value.empty() || !is_added_field(name))
        text.append(name).append(": ").append(value).append("\r\n");
    }
    text += "\r\n";
    return stream.write(text.data(), text.size());
  });
  return true;
}
template <class Client>
bool leave_out_empty_fields(Client&, long) {
  return false;
}

// ---- SIGPIPE and cancellation, which cpp-httplib leaves to its caller

/// Blocks SIGPIPE in this thread during its lifetime: a write to a closed connection would raise it.
class sigpipe_guard {
#ifdef _WIN32
 public:
  sigpipe_guard() {}  // Windows has no SIGPIPE. "= default" would cause a warning about an unused variable
#else
 public:
  sigpipe_guard() {
    ::sigemptyset(&pipe_);
    ::sigaddset(&pipe_, SIGPIPE);
    was_pending_ = is_pending();
    ::pthread_sigmask(SIG_BLOCK, &pipe_, &mask_before_);
  }
  ~sigpipe_guard() {
    int signal = 0;
    if (!was_pending_ && is_pending()) ::sigwait(&pipe_, &signal);
    ::pthread_sigmask(SIG_SETMASK, &mask_before_, nullptr);
  }
  sigpipe_guard(const sigpipe_guard&) = delete;
  sigpipe_guard& operator=(const sigpipe_guard&) = delete;

 private:
  static bool is_pending() {
    sigset_t pending;
    return ::sigpending(&pending) == 0 && ::sigismember(&pending, SIGPIPE) == 1;
  }
  sigset_t pipe_{}, mask_before_{};
  bool was_pending_ = false;
#endif
};

/// A thread that checks ten times a second whether a request is cancelled, and then interrupts the exchange at every check,
/// because cpp-httplib may open another socket.
class cancellation_watcher {
 public:
  cancellation_watcher(const http_request& request, std::function<void()> interrupt)
      : request_(request), interrupt_(std::move(interrupt)) {}
  ~cancellation_watcher() { exchange_.stop(); }
  cancellation_watcher(const cancellation_watcher&) = delete;
  cancellation_watcher& operator=(const cancellation_watcher&) = delete;

  [[nodiscard]] bool start() {
    return !request_.is_cancelled || thread_.start<&cancellation_watcher::watch>(this);
  }

 private:
  void watch() {
    while (!exchange_.wait(milliseconds(100))) {
      if (request_.cancelled()) interrupt_();
    }
  }

  const http_request& request_;
  const std::function<void()> interrupt_;
  transfer_state exchange_;
  thread thread_;
};

// ---- connections

/// An httplib::Client for one route, with at most one connection.
class httplib_connection {
 public:
  httplib_connection(const request_route& route, const std::filesystem::path& ca_file,
                     const std::filesystem::path& ca_directory, bool verify)
      : key_(route.key()), client_(std::make_unique<httplib::Client>(route.server.origin())) {
    client_->set_keep_alive(true);
    client_->set_follow_location(false);
    client_->set_decompress(false);
    client_->set_tcp_nodelay(true);
    keep_target(*client_, 0);
    lift_body_limit(*client_, 0);
    leaves_out_empty_fields_ = leave_out_empty_fields(*client_, 0);
    client_->set_socket_options([this](auto socket) { remember(static_cast<socket_handle>(socket)); });
    if (route.has_proxy()) client_->set_proxy(route.proxy.host, route.proxy.port);
#ifdef CPPHTTPLIB_OPENSSL_SUPPORT
    client_->enable_server_certificate_verification(verify);
    if (!ca_file.empty() || !ca_directory.empty())
      client_->set_ca_cert_path(utf8(ca_file), utf8(ca_directory));
#else
    static_cast<void>(ca_file), static_cast<void>(ca_directory), static_cast<void>(verify);
#endif
  }
  ~httplib_connection() {
    const sigpipe_guard no_signal;  // closing TLS sends a message
    // In a forked child, the client's destructor would shut down the parent's connection.
    if (process_ == this_process()) client_.reset();
    else static_cast<void>(client_.release());
    forget();
  }
  httplib_connection(const httplib_connection&) = delete;
  httplib_connection& operator=(const httplib_connection&) = delete;

  const std::string& key() const { return key_; }
  /// Whether the connection is open, belongs to this process, and has received no unexpected bytes.
  bool is_reusable() {
    if (process_ != this_process()) return false;
#ifndef _WIN32
    pollfd entry{};
    entry.fd = socket_;
    entry.events = POLLIN;
    return socket_ != no_socket && poll_sockets(&entry, 1, 0) == 0;
#else
    return true;
#endif
  }

  /// Makes one exchange; connects first if necessary. Returns false if it sets `current.failure`.
  bool perform(exchange& current) {
    httplib::Request request;
    if (!fill(request, current)) return false;
    request.response_handler = [&](const httplib::Response& response) { return on_head(current, response); };
    request.content_receiver = [&](const char* data, std::size_t size, auto, auto) {
      return current.sink.write({data, size}) || current.fail(errc::cancelled, "stopped by the receiver");
    };
    client_->set_connection_timeout(current.request.connect_timeout);
    client_->set_read_timeout(current.request.idle_timeout);
    client_->set_write_timeout(current.request.idle_timeout);

    httplib::Response response;
    auto code = httplib::Error::Success;
    bool is_done = false;
    {
      const sigpipe_guard no_signal;
      cancellation_watcher cancellation(current.request, [this] { interrupt(); });
      if (!cancellation.start()) return current.fail_permanently("a thread could not be started");
      is_done = client_->send(request, response, code);
    }
    if (!is_done) return explain(current, code);
    if (current.has_head) return true;
    // cpp-httplib does not call response_handler for a response without a body, or if the proxy refuses a tunnel.
    const bool has_no_body = request.method == "HEAD" || response.status == 204;
    if (current.route.has_proxy() && current.route.is_secure() && (!has_no_body || response.status == 407)) {
      return current.fail_at_proxy(response.status);
    }
    return on_head(current, response);
  }

 private:
  bool fill(httplib::Request& request, exchange& current) {
    const request_route& route = current.route;
    request.method = current.request.method;
    request.path = route.server.target;
    request.body = current.request.body;
    bool is_clean = is_token(request.method);
    for (const auto& [name, value] : current.request.headers) {
      is_clean = is_clean && is_header(name, value);
      request.headers.emplace(name, value);
    }
    if (!is_clean) return current.fail(malformed_header(route));
    const std::string& credentials = route.proxy_authorization;
    if (!credentials.empty()) {  // empty in a tunnel, to keep them from the server
      request.headers.emplace("Proxy-Authorization", route.sends_to_proxy() ? credentials : "");
    }
    for (const char* name : added_fields) {
      if (leaves_out_empty_fields_ && !request.has_header(name)) request.headers.emplace(name, "");
    }
    if (credentials.empty() || route.sends_to_proxy()) return true;
    const auto basic =
        starts_with(credentials, "Basic ") ? base64_decode(credentials.substr(6)) : std::nullopt;
    const auto colon = basic ? basic->find(':') : std::string::npos;
    if (colon != std::string::npos) {
      client_->set_proxy_basic_auth(basic->substr(0, colon), basic->substr(colon + 1));
    } else if (starts_with(credentials, "Bearer ")) {
      client_->set_proxy_bearer_token_auth(credentials.substr(7));
    } else {
      return current.fail(errc::invalid_argument,
                          "cpp-httplib takes Basic and Bearer credentials for a proxy only");
    }
    return true;
  }

  static bool on_head(exchange& current, const httplib::Response& response) {
    current.head.status = response.status;
    for (const auto& [name, value] : response.headers) current.head.headers.emplace_back(name, value);
    if (response.status < 200) {
      return current.fail(errc::protocol_violation, "cpp-httplib takes the interim response " +
                                                        std::to_string(response.status) +
                                                        " for the final one");
    }
    if (response.status == 407 && current.route.sends_to_proxy()) return current.fail_at_proxy(407);
    current.has_head = true;
    current.sink.connected();
    return current.sink.start(current.head) || current.fail(errc::cancelled, "stopped by the receiver");
  }

  /// Records why cpp-httplib failed, unless a handler has recorded a failure. Returns false.
  static bool explain(exchange& current, httplib::Error code) {
    using httplib::Error;
    if (current.failure || current.is_cancelled()) return false;
    const bool not_connected =
        code == Error::Connection || code == Error::ConnectionTimeout || code == Error::BindIPAddress;
    if (!not_connected && !current.has_head) current.sink.connected();
    const std::string text =
        std::string(not_connected ? "cannot connect to " + request_route::authority(current.route.first_hop())
                    : current.has_head ? "the body could not be read to its end"
                                       : "no response came") +
        " (cpp-httplib: " + httplib::to_string(code) + ')';
    if (code == Error::SSLLoadingCerts) {
      return current.fail(errc::invalid_argument,
                          text +
                              ": correct settings::ca_file and ca_directory, SSL_CERT_FILE, SSL_CERT_DIR or "
                              "REQUESTS_CA_BUNDLE");
    }
    if (is_refused_certificate(code, 0)) {
      return current.fail_permanently(
          "the server's certificate is refused (cpp-httplib: " + httplib::to_string(code) +
          "): if the server is the right one, name its authority in SSL_CERT_FILE");
    }
    return current.fail(errc::connection_failed, text);
  }

#ifdef _WIN32
  void remember(socket_handle) {}
  void forget() {}
  void interrupt() { client_->stop(); }
#else
  // Client::stop() waits for a lock that cpp-httplib holds while it connects. A duplicate of the socket's descriptor can be
  // shut down at any time, and is not reused for another file.
  void remember(socket_handle socket) {
    forget();
    const std::lock_guard<std::mutex> lock(mutex_);
    socket_ = ::fcntl(socket, F_DUPFD_CLOEXEC, 3);
  }
  void forget() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (socket_ != no_socket) close_socket(socket_);
    socket_ = no_socket;
  }
  void interrupt() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (socket_ != no_socket) ::shutdown(socket_, SHUT_RDWR);
  }
  std::mutex mutex_;  // protects socket_
  socket_handle socket_ = no_socket;
#endif

  const std::string key_;
  const std::uint64_t process_ = this_process();
  std::unique_ptr<httplib::Client> client_;
  bool leaves_out_empty_fields_ = false;
};

}  // namespace detail

struct httplib_transport::state {
  explicit state(const settings& configuration)
      : ca_file(configuration.ca_file), ca_directory(configuration.ca_directory),
        verify(configuration.verify_tls) {}

  const std::filesystem::path ca_file, ca_directory;
  const bool verify;
  detail::idle_connections<detail::httplib_connection> idle;
};

WANDB_RESTORE_PRIVATE_INLINE httplib_transport::httplib_transport() : httplib_transport(settings{}) {}
WANDB_RESTORE_PRIVATE_INLINE httplib_transport::httplib_transport(const settings& configuration)
    : state_(std::make_shared<state>(configuration)) {}

WANDB_RESTORE_PRIVATE_INLINE result<http_response> httplib_transport::send(const http_request& request,
                                                                           body_sink& sink) {
  const auto route = detail::request_route::of(request);
  if (!route) return route.error();
#ifndef CPPHTTPLIB_OPENSSL_SUPPORT
  if (route->is_secure()) {
    return error(errc::invalid_argument, "https needs cpp-httplib with CPPHTTPLIB_OPENSSL_SUPPORT");
  }
#endif
  if (request.cancelled()) return error(errc::cancelled, "cancelled");
  auto connection = state_->idle.take(route->key());
  for (;;) {
    const bool is_fresh = !connection;
    if (is_fresh) {
      connection = std::make_unique<detail::httplib_connection>(*route, state_->ca_file, state_->ca_directory,
                                                                state_->verify);
    }
    detail::exchange current{request, sink, *route};
    const auto begin = detail::clock::now();
    if (connection->perform(current)) {
      if (connection->is_reusable()) state_->idle.give_back(std::move(connection));
      return std::move(current.head);
    }
    // The server may have closed the connection while it was idle: see http_transport::send. A time-out has another cause.
    const bool may_be_repeated = request.method == "GET" || request.method == "HEAD";
    if (is_fresh || current.has_head || !may_be_repeated ||
        current.failure->code() != errc::connection_failed ||
        detail::clock::now() - begin >= request.idle_timeout) {
      return *std::move(current.failure);
    }
    connection = nullptr;
  }
}

}  // namespace WANDB_RESTORE_PRIVATE_ABI
}  // namespace wandb

#endif  // WANDB_RESTORE_HTTPLIB

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#endif  // implementation
