// wandb_restore.hpp - restore files of Weights & Biases runs in C++: verified, resumable, parallel.
//
//   #include "wandb_restore.hpp"
//   auto file = wandb::restore("model-best.h5", "entity/project/run_id");   // a std::ifstream on a verified local copy
//   load_weights(file.name());
//
// Needs C++17, cpp-httplib, OpenSSL and nlohmann/json; see README.md for doing without the first two.
// SPDX-License-Identifier: MIT
// SPDX-FileCopyrightText: 2026 wandb_restore contributors
#ifndef WANDB_RESTORE_HPP
#define WANDB_RESTORE_HPP

// ============================================================================================ configuration

#define WANDB_RESTORE_VERSION_MAJOR 0
#define WANDB_RESTORE_VERSION_MINOR 1
#define WANDB_RESTORE_VERSION_PATCH 0
#define WANDB_RESTORE_VERSION "0.1.0"

// Macros a program may define. The first four must be the same in every file of one program; each is part of the
// inline namespace's name, so that files which disagree fail to link instead of running wrong.
//   WANDB_RESTORE_SPLIT           an include brings declarations only; one source file defines the next macro
//   WANDB_RESTORE_NO_OPENSSL      plain HTTP only
//   WANDB_RESTORE_NO_HTTPLIB      no httplib_transport: the program brings a Transport of its own
//   WANDB_RESTORE_EXCEPTIONS      0 or 1; default: what the compiler's flags allow
//   WANDB_RESTORE_IMPLEMENTATION  in split mode, in exactly one source file: brings the rest

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
#ifdef WANDB_RESTORE_NO_HTTPLIB
#define WANDB_RESTORE_PRIVATE_NOHTTP _nohttplib
#else
#define WANDB_RESTORE_PRIVATE_NOHTTP
#endif
#define WANDB_RESTORE_PRIVATE_JOIN2(a, b, c, d, e) a##b##c##d##e
#define WANDB_RESTORE_PRIVATE_JOIN(a, b, c, d, e) WANDB_RESTORE_PRIVATE_JOIN2(a, b, c, d, e)
#define WANDB_RESTORE_PRIVATE_ABI                                                                             \
  WANDB_RESTORE_PRIVATE_JOIN(v0, WANDB_RESTORE_PRIVATE_SPLIT, WANDB_RESTORE_PRIVATE_NOEX,                     \
                             WANDB_RESTORE_PRIVATE_NOTLS, WANDB_RESTORE_PRIVATE_NOHTTP)

#if defined(__GNUC__) && !defined(_WIN32)
#define WANDB_RESTORE_PRIVATE_VISIBLE __attribute__((visibility("default")))
#else
#define WANDB_RESTORE_PRIVATE_VISIBLE
#endif

#include <atomic>       // the caller's cancel flag
#include <chrono>       // timeouts
#include <cstdint>      // sizes
#include <cstdlib>      // abort, where there are no exceptions
#include <filesystem>   // paths
#include <fstream>      // restored_file is an ifstream
#include <functional>   // callbacks
#include <memory>       // shared_ptr
#include <optional>     // what may be unknown
#include <stdexcept>    // error is a runtime_error
#include <string>       //
#include <string_view>  //
#include <type_traits>  //
#include <utility>      //
#include <variant>      // result
#include <vector>       //

namespace wandb {
inline namespace WANDB_RESTORE_PRIVATE_ABI {

// =================================================================================================== errors

/// What kind of failure an `error` is. README.md has the table of situations.
enum class errc {
  invalid_argument = 1,  ///< empty or escaping name, unusable root, option, base URL or key
  invalid_run_path,      ///< malformed run path; no entity, project or run to be had
  run_not_found,         ///< the service knows no such run, or hides it
  file_not_found,        ///< the run has no such file, or it was never uploaded
  not_authenticated,     ///< 401 from the service
  permission_denied,     ///< 403 from the service; 403 from storage that a new address did not cure
  offline,               ///< WANDB_MODE forbids the network and there is no local copy to keep
  connection_failed,     ///< no connection, certificate refused, peer stalled, too slow or cut off
  http_failure,          ///< an HTTP status that retrying did not cure, or should not
  protocol_violation,    ///< an answer that breaks HTTP's or the service's promises
  checksum_mismatch,     ///< size or md5 wrong, also after a second fetch from nothing
  local_conflict,        ///< the local copy is another run's
  disk_failure,          ///< disk full, not permitted, a directory in the file's place
  cancelled,             ///< by the caller; what had arrived is kept for the next try
};

/// The name of a code as it is spelled here, e.g. "file_not_found". Never null.
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

/// A failure: a code to act on and a text for people. The text says what was tried, on what, what came back and what to
/// do next; it never holds an API key, an Authorization header or the query of a signed address.
class WANDB_RESTORE_PRIVATE_VISIBLE error : public std::runtime_error {
 public:
  error(errc code, const std::string& text, int http_status = 0)
      : std::runtime_error(text), code_(code), http_status_(http_status), transient_(may_pass(code, http_status)) {}

  /// The same, for a failure that trying again cannot cure although its code suggests it: a refused certificate, say.
  [[nodiscard]] static error permanent(errc code, const std::string& text, int http_status = 0) {
    error e(code, text, http_status);
    e.transient_ = false;
    return e;
  }

  [[nodiscard]] errc code() const noexcept { return code_; }
  /// No such run, or no such file (yet): the usual "start fresh" branch.
  [[nodiscard]] bool is_not_found() const noexcept {
    return code_ == errc::run_not_found || code_ == errc::file_not_found;
  }
  /// Trying again may help: failed connections, and the statuses 408, 429 and 5xx but 501.
  [[nodiscard]] bool is_transient() const noexcept { return transient_; }
  /// The HTTP status that led to this, or 0 where none did.
  [[nodiscard]] int http_status() const noexcept { return http_status_; }
  /// How long the server asked to wait before another try (Retry-After), or 0.
  [[nodiscard]] std::chrono::milliseconds retry_after() const noexcept { return retry_after_; }
  void retry_after(std::chrono::milliseconds time) noexcept { retry_after_ = time; }

 private:
  static bool may_pass(errc code, int status) noexcept {
    return code == errc::connection_failed ||
           (code == errc::http_failure && (status == 408 || status == 429 || (status >= 500 && status != 501)));
  }
  errc code_;
  int http_status_;
  bool transient_;
  std::chrono::milliseconds retry_after_{0};
};

/// A value or an `error`: the part of std::expected<T, error> that is needed here, under the same names. `value()` on a
/// failure throws the error (or aborts, where exceptions are off).
template <class T>
class [[nodiscard]] result {
 public:
  using value_type = T;
  using error_type = wandb::error;

  result(T value) : state_(std::in_place_index<0>, std::move(value)) {}               // NOLINT: implicit, as in expected
  result(wandb::error failure) : state_(std::in_place_index<1>, std::move(failure)) {}  // NOLINT

  [[nodiscard]] bool has_value() const noexcept { return state_.index() == 0; }
  explicit operator bool() const noexcept { return has_value(); }

  T& operator*() & noexcept { return *std::get_if<0>(&state_); }
  const T& operator*() const& noexcept { return *std::get_if<0>(&state_); }
  T&& operator*() && noexcept { return std::move(*std::get_if<0>(&state_)); }
  T* operator->() noexcept { return std::get_if<0>(&state_); }
  const T* operator->() const noexcept { return std::get_if<0>(&state_); }

  T& value() & { return require(), **this; }
  const T& value() const& { return require(), **this; }
  T&& value() && { return require(), *std::move(*this); }
  template <class U>
  T value_or(U&& other) && {
    return has_value() ? *std::move(*this) : static_cast<T>(std::forward<U>(other));
  }

  /// Only where there is no value.
  [[nodiscard]] const wandb::error& error() const& noexcept { return *std::get_if<1>(&state_); }
  [[nodiscard]] wandb::error&& error() && noexcept { return std::move(*std::get_if<1>(&state_)); }

 private:
  void require() const {
    if (has_value()) return;
#if WANDB_RESTORE_EXCEPTIONS
    throw *std::get_if<1>(&state_);
#else
    std::abort();
#endif
  }
  std::variant<T, wandb::error> state_;
};

template <>
class [[nodiscard]] result<void> {
 public:
  using value_type = void;
  using error_type = wandb::error;

  result() = default;
  result(wandb::error failure) : failure_(std::move(failure)) {}  // NOLINT: implicit, as in expected

  [[nodiscard]] bool has_value() const noexcept { return !failure_; }
  explicit operator bool() const noexcept { return has_value(); }
  void value() const {
    if (!failure_) return;
#if WANDB_RESTORE_EXCEPTIONS
    throw *failure_;
#else
    std::abort();
#endif
  }
  [[nodiscard]] const wandb::error& error() const& noexcept { return *failure_; }
  [[nodiscard]] wandb::error&& error() && noexcept { return *std::move(failure_); }

 private:
  std::optional<wandb::error> failure_;
};

// ================================================================================================= run path

/// Which run: entity (a user or a team), project and run id.
struct run_path {
  std::string entity;
  std::string project;
  std::string run_id;

  /// Reads a run path in any form that the Python SDK accepts, with the same meaning (`e/p/r`, `e/p/runs/r`, `e/p:r`,
  /// `p/r`, `p:r`, `r`, slashes and spaces around), and the address of a run in the browser, with or without scheme
  /// and with any tail (`https://wandb.ai/e/p/runs/r/files/x`; the host is not used). A query or fragment is dropped.
  /// What the text leaves out is taken from `defaults`; an empty text names none.
  /// @return  errc::invalid_run_path where a part is missing or malformed.
  /// Source: wandb/apis/public/api.py, Api._parse_path.
  static result<run_path> parse(std::string_view text, const run_path& defaults = {});

  /// "entity/project/run_id".
  [[nodiscard]] std::string str() const { return entity + '/' + project + '/' + run_id; }

  friend bool operator==(const run_path& a, const run_path& b) {
    return a.entity == b.entity && a.project == b.project && a.run_id == b.run_id;
  }
  friend bool operator!=(const run_path& a, const run_path& b) { return !(a == b); }
};

// ========================================================================================== HTTP vocabulary

/// An absolute http or https address in parts (RFC 3986, section 3).
struct url {
  std::string scheme;      ///< "http" or "https"
  std::string user_info;   ///< as written, percent-encoded; used for proxies only
  std::string host;        ///< lower case; an IPv6 address without its brackets
  int port = 0;            ///< explicit or the scheme's default
  std::string target;      ///< path and query as sent, at least "/"

  /// Spaces and bytes beyond ASCII are percent-encoded, a fragment is dropped.
  /// @return  errc::protocol_violation for control characters, another scheme, a missing host or a bad port.
  static result<url> parse(std::string_view text);
  /// What `location` means when it is met at this address: absolute or relative (RFC 3986, section 5.2).
  [[nodiscard]] result<url> resolve(std::string_view location) const;

  /// "https://host:port", the port only where it is not the default: equal for equal origins (RFC 6454, section 4).
  [[nodiscard]] std::string origin() const;
  /// The whole address again, without user_info.
  [[nodiscard]] std::string str() const { return origin() + target; }
  /// The address without its query, which may be a signature: fit for messages and logs.
  [[nodiscard]] std::string redacted() const { return origin() + target.substr(0, target.find('?')); }
};

/// Header fields in the order they are sent or came in: pairs of name and value.
using http_headers = std::vector<std::pair<std::string, std::string>>;

/// One HTTP exchange to make.
struct http_request {
  std::string method = "GET";
  std::string url = {};       ///< absolute, http or https
  http_headers headers = {};  ///< complete but for Host, Connection and Content-Length
  std::string body = {};
  std::string proxy = {};  ///< "http://[user:password@]host:port", or empty for a direct connection
  std::string proxy_authorization = {};                     ///< a Proxy-Authorization value for that proxy alone
  std::chrono::milliseconds connect_timeout{30000};         ///< name resolution excepted; TLS handshake included
  std::chrono::milliseconds idle_timeout{30000};            ///< longest time without a byte, either way
  std::function<bool()> is_cancelled = {};                  ///< called from any thread

  /// The exchange is no longer wanted. A transport looks at this at least once a second.
  [[nodiscard]] bool cancelled() const { return is_cancelled && is_cancelled(); }
};

/// The head of a response.
struct http_response {
  int status = 0;
  http_headers headers = {};

  /// The value of the first field of that name (case does not matter), or null.
  [[nodiscard]] const std::string* header(std::string_view name) const;
};

/// Where a transport delivers a response: `start` once, then `write` any number of times, from one thread. Either
/// returns false to say: stop now, close the connection, return errc::cancelled.
class body_sink {
 public:
  virtual bool start(const http_response& head) = 0;
  virtual bool write(std::string_view bytes) = 0;

 protected:
  body_sink() = default;
  body_sink(const body_sink&) = default;
  body_sink& operator=(const body_sink&) = default;
  ~body_sink() = default;
};

/// Whether T is a Transport: `result<http_response> send(const http_request&, body_sink&)` makes exactly one exchange,
/// blocks until it is over, and may be called from several threads at once. It follows no redirects, retries nothing, adds
/// no credentials, decompresses nothing and does not keep the body. Failures are errc::connection_failed (made with
/// `error::permanent` where trying again is no use), errc::protocol_violation or errc::cancelled.
template <class T, class = void>
struct is_transport : std::false_type {};
template <class T>
struct is_transport<T, std::void_t<decltype(std::declval<T&>().send(std::declval<const http_request&>(),
                                                                    std::declval<body_sink&>()))>>
    : std::is_convertible<decltype(std::declval<T&>().send(std::declval<const http_request&>(),
                                                           std::declval<body_sink&>())),
                          result<http_response>> {};

// ==================================================================================================== files

/// What the service says of a file of a run.
struct file_info {
  std::string name;
  std::optional<std::uint64_t> size;  ///< bytes; absent where the service does not say
  std::string md5;                    ///< 32 lower-case hex digits, or empty where unknown
  std::string mimetype;
  std::string updated_at;             ///< ISO 8601, as the service writes it; empty where unknown
};

/// What a restore is busy with.
enum class phase { downloading, verifying };

/// How far a restore is.
struct progress {
  std::string_view name;                        ///< as asked for
  wandb::phase phase = wandb::phase::downloading;
  std::uint64_t bytes_done = 0;                 ///< downloading: bytes on disk; verifying: bytes hashed
  std::optional<std::uint64_t> bytes_total;     ///< absent where the size is unknown
  double bytes_per_second = 0;                  ///< of what came over the network lately
};

/// Where the bytes of a restored file came from. `store` is reserved.
enum class source { downloaded, local, store };

/// An open, binary input stream at offset 0 on the local copy, and what is known of it. Movable, not copyable.
class restored_file : public std::ifstream {
 public:
  struct facts {
    std::filesystem::path path;
    std::uint64_t size = 0;
    std::string md5;
    wandb::source source = wandb::source::local;
    bool verified = false;
  };
  restored_file(std::ifstream stream, facts known) : std::ifstream(std::move(stream)), facts_(std::move(known)) {}
  restored_file(restored_file&& other) noexcept
      : std::ifstream(std::move(other)), facts_(std::move(other.facts_)) {}
  restored_file& operator=(restored_file&& other) noexcept {
    std::ifstream::operator=(std::move(other));
    facts_ = std::move(other.facts_);
    return *this;
  }

  /// The local file's name, for frameworks that want one: `path()` as a string.
  [[nodiscard]] std::string name() const { return facts_.path.string(); }
  /// root / name, as given.
  [[nodiscard]] const std::filesystem::path& path() const noexcept { return facts_.path; }
  /// Bytes.
  [[nodiscard]] std::uint64_t size() const noexcept { return facts_.size; }
  /// 32 lower-case hex digits, or empty where it is not known.
  [[nodiscard]] const std::string& md5() const noexcept { return facts_.md5; }
  [[nodiscard]] wandb::source source() const noexcept { return facts_.source; }
  /// The md5 that the service told was checked now, or a receipt says that it was and the file has not changed since.
  [[nodiscard]] bool verified() const noexcept { return facts_.verified; }

 private:
  facts facts_;
};

// ============================================================================================= cache policy

/// What is known of a local copy without asking the service.
class local_copy {
 public:
  std::filesystem::path path;
  std::uint64_t size = 0;                       ///< bytes
  std::chrono::system_clock::time_point modified{};
  /// The run that a receipt says the file came from. Absent for a file that was not restored here, or changed since.
  std::optional<run_path> restored_from;
  /// What was verified when the receipt was written: hex, or empty.
  std::string receipt_md5;

  /// The md5 of the content, in hex: from the receipt or, where that does not tell, by reading the file once (blocks).
  /// Empty where the file cannot be read.
  [[nodiscard]] std::string md5() const;
};

/// Says what a local copy is worth: a function of the copy's facts and, once asked for, the service's.
class cache_policy {
 public:
  enum class verdict {
    keep,   ///< use the local copy
    fetch,  ///< download and replace it
    ask,    ///< cannot tell yet: call again with what the service says (the second time it counts as fetch)
  };
  using rule = std::function<verdict(const local_copy& local, const file_info* remote)>;

  /// A rule of one's own. `remote` is null in the first call. Called in the thread of the restore.
  cache_policy(rule decide) : decide_(std::move(decide)) {}  // NOLINT: implicit, so that a lambda can stand for a policy
  template <class F, class = std::enable_if_t<std::is_constructible_v<rule, F> &&
                                              !std::is_same_v<std::decay_t<F>, cache_policy> &&
                                              !std::is_same_v<std::decay_t<F>, rule>>>
  cache_policy(F&& decide) : decide_(std::forward<F>(decide)) {}  // NOLINT

  /// Whatever is there is used, without any request (the SDK's `replace=False`).
  static cache_policy keep();
  /// Fetched again, always (the SDK's `replace=True`).
  static cache_policy replace();
  /// Fetched again where the service's md5 differs or is unknown.
  static cache_policy refresh();

  [[nodiscard]] verdict operator()(const local_copy& local, const file_info* remote) const {
    return decide_(local, remote);
  }

 private:
  rule decide_;
};

// ================================================================================================= settings

/// A proxy for one scheme, and the hosts that are reached without it.
struct proxy_settings {
  std::string url;     ///< "http://[user:password@]host:port"; empty: none
  std::string bypass;  ///< as NO_PROXY: host, .domain, address, address/prefix, each with an optional :port; or "*"
};

/// Server, credentials, default run and manners. A default-constructed object asks the public service without a key;
/// `from_environment` resolves what the SDK would. What is wrong in settings is reported by the first call that needs it.
struct settings {
  std::string base_url = "https://api.wandb.ai";  ///< may have a path prefix and trailing slashes

  std::string api_key = {};                              ///< 40 characters or more, or a JWT
  std::string identity_token_file = {};                  ///< a file with a JWT that is exchanged for an access token
  std::filesystem::path credentials_file = {};           ///< where access tokens are shared with the SDK
  std::filesystem::path netrc_file = {};                 ///< where a key is looked for if the two above are empty

  std::string entity = {};   ///< default for run paths without one
  std::string project = {};  ///< likewise
  std::string run_id = {};   ///< the current run, meant where no run path is given

  std::filesystem::path run_dir = {};    ///< default root where the program has a run directory; else "."
  std::filesystem::path cache_dir = {};  ///< where receipts are kept; empty: none are
  bool offline = false;                  ///< no network at all

  std::chrono::milliseconds connect_timeout{30000};    ///< for a connection, TLS handshake included
  std::chrono::milliseconds idle_timeout{30000};       ///< a peer that sends less than `low_speed` for this long has failed
  std::uint64_t low_speed = 1024;                      ///< bytes per second
  std::chrono::milliseconds retry_timeout{300000};     ///< trying again without progress ends after this
  std::chrono::milliseconds total_timeout{0};          ///< for a whole call; 0: none

  proxy_settings http_proxy = {};         ///< for http addresses
  proxy_settings https_proxy = {};        ///< for https addresses, through CONNECT
  std::filesystem::path ca_file = {};       ///< PEM bundle; this and the next empty: the system's own
  std::filesystem::path ca_directory = {};  ///< hashed directory of certificates
  bool verify_tls = true;                   ///< false accepts any certificate, with a warning

  http_headers extra_headers = {};      ///< for the base URL's requests only; a Proxy-Authorization goes to the proxy only
  std::string username = {};            ///< X-WANDB-USERNAME of questions to the service
  std::string user_email = {};          ///< X-WANDB-USER-EMAIL, likewise
  std::string user_agent = "wandb_restore.hpp/" WANDB_RESTORE_VERSION;

  /// Receives warnings (insecure TLS, unreadable settings files), each once a client. Default: standard error.
  std::function<void(std::string_view)> on_warning = {};
  std::vector<std::string> warnings = {};      ///< what from_environment noticed; passed on at the first request
  std::optional<wandb::error> problem = {};    ///< what from_environment could not use; reported at the first request

  /// Environment variables over settings files (local, then global) over wandb-resume.json (where WANDB_RESUME=auto), as
  /// README.md lists them. Reads files, makes no request, never fails: see `problem`.
  static settings from_environment();
};

// ================================================================================= client and entry points

/// What a restore may be told, each with a default. The first three are the SDK's.
struct restore_options {
  std::string run_path = {};               ///< any form of run_path::parse; empty: the current run
  bool replace = false;                    ///< fetch even if there is a local copy
  std::filesystem::path root = {};         ///< directory under which the file is put; empty: settings::run_dir, else "."
  std::optional<cache_policy> cache = {};  ///< over the client's policy; `replace = true` wins
  /// Called about ten times a second, from one thread at a time; returns false to cancel.
  std::function<bool(const progress&)> on_progress = {};
  const std::atomic<bool>* cancel = nullptr;  ///< the caller's; once true, the call ends within a second
  int connections = 8;                        ///< upper bound for a large file, at least 1
  bool verify = true;                         ///< check the md5 that the service tells
};

/// The default transport: cpp-httplib over TLS (OpenSSL) or plain TCP. Keeps connections alive per origin and loads the
/// CA store once. Safe to use from several threads.
class httplib_transport {
 public:
  httplib_transport();
  /// Takes CA locations and verify_tls from there.
  explicit httplib_transport(const settings& configuration);
  result<http_response> send(const http_request& request, body_sink& sink);

 private:
  struct state;
  std::shared_ptr<state> state_;
};

namespace detail {

/// What the engine sees of a Transport: two pointers, so that its bodies are compiled once.
struct transport_ref {
  void* object;
  result<http_response> (*send)(void* object, const http_request&, body_sink&);
};

class session;
std::shared_ptr<session> open_session(settings configuration, transport_ref transport, cache_policy policy);
result<restored_file> restore(session& with, std::string_view name, const restore_options& options);
result<std::vector<file_info>> list_files(session& with, const restore_options& options);

template <class T>
inline constexpr bool is_text = std::is_convertible_v<T, std::string_view>;

inline restore_options positional(std::string_view run_path, bool replace, std::filesystem::path root) {
  restore_options options;
  options.run_path = run_path;
  options.replace = replace;
  options.root = std::move(root);
  return options;
}

}  // namespace detail

/// Restores files with settings, transport and policy of its own, and keeps connections between calls. All calls block,
/// and may be made from several threads at once.
template <class Transport = httplib_transport>
class client {
  static_assert(is_transport<Transport>::value,
                "a Transport has a member: wandb::result<wandb::http_response> "
                "send(const wandb::http_request&, wandb::body_sink&)");

 public:
  client() : client(settings::from_environment()) {}
  explicit client(settings configuration, cache_policy policy = cache_policy::keep())
      : transport_(make_transport(configuration)),
        session_(detail::open_session(std::move(configuration), ref(), std::move(policy))) {}
  client(settings configuration, Transport transport, cache_policy policy = cache_policy::keep())
      : transport_(std::make_unique<Transport>(std::move(transport))),
        session_(detail::open_session(std::move(configuration), ref(), std::move(policy))) {}

  /// Brings one file of a run to local disk and opens it. See the free function of the same name.
  result<restored_file> try_restore(std::string_view name, const restore_options& options = {}) {
    return detail::restore(*session_, name, options);
  }
  template <class Text, std::enable_if_t<detail::is_text<Text>, int> = 0>
  result<restored_file> try_restore(std::string_view name, const Text& run_path, bool replace = false,
                                    std::filesystem::path root = {}) {
    return try_restore(name, detail::positional(run_path, replace, std::move(root)));
  }

  /// The files of a run, in the service's order. Of the options, run_path and cancel count. Errors as in restore.
  result<std::vector<file_info>> try_list_files(const restore_options& options = {}) {
    return detail::list_files(*session_, options);
  }

#if WANDB_RESTORE_EXCEPTIONS
  restored_file restore(std::string_view name, const restore_options& options = {}) {
    return try_restore(name, options).value();
  }
  template <class Text, std::enable_if_t<detail::is_text<Text>, int> = 0>
  restored_file restore(std::string_view name, const Text& run_path, bool replace = false,
                        std::filesystem::path root = {}) {
    return try_restore(name, run_path, replace, std::move(root)).value();
  }
  std::vector<file_info> list_files(const restore_options& options = {}) { return try_list_files(options).value(); }
#endif

 private:
  static std::unique_ptr<Transport> make_transport(const settings& configuration) {
    if constexpr (std::is_constructible_v<Transport, const settings&>) {
      return std::make_unique<Transport>(configuration);
    } else {
      return std::make_unique<Transport>();
    }
  }
  detail::transport_ref ref() {
    return {transport_.get(), [](void* object, const http_request& request, body_sink& sink) {
              return result<http_response>(static_cast<Transport*>(object)->send(request, sink));
            }};
  }
  std::unique_ptr<Transport> transport_;  // its address is the session's; survives a move of the client
  std::shared_ptr<detail::session> session_;
};

#ifndef WANDB_RESTORE_NO_HTTPLIB
/// Brings one file of a run to local disk, verified, and opens it. Under the default policy a local copy is opened
/// without any request. Blocks; may be called from several threads and processes at once, also for the same file.
///
/// @param name     '/'-separated path inside the run, e.g. "ckpt/best.h5". Empty, absolute and escaping names are refused.
/// @param options  see restore_options.
/// @return         the stream, or any errc. On failure the local path holds what it held before; what had arrived is kept in
///                 a hidden file beside it, so that the next call goes on from there.
/// Source: wandb.restore of the Python SDK (wandb/sdk/wandb_run.py).
inline result<restored_file> try_restore(std::string_view name, const restore_options& options = {}) {
  return client<>().try_restore(name, options);
}
/// The same with the order of arguments of the Python SDK.
template <class Text, std::enable_if_t<detail::is_text<Text>, int> = 0>
result<restored_file> try_restore(std::string_view name, const Text& run_path, bool replace = false,
                                  std::filesystem::path root = {}) {
  return try_restore(name, detail::positional(run_path, replace, std::move(root)));
}

#if WANDB_RESTORE_EXCEPTIONS
/// try_restore, with wandb::error thrown instead of returned.
inline restored_file restore(std::string_view name, const restore_options& options = {}) {
  return try_restore(name, options).value();
}
template <class Text, std::enable_if_t<detail::is_text<Text>, int> = 0>
restored_file restore(std::string_view name, const Text& run_path, bool replace = false,
                      std::filesystem::path root = {}) {
  return try_restore(name, run_path, replace, std::move(root)).value();
}
#endif
#endif  // WANDB_RESTORE_NO_HTTPLIB

}  // namespace WANDB_RESTORE_PRIVATE_ABI
}  // namespace wandb

#endif  // WANDB_RESTORE_HPP
