// A transport over libcurl.
//
//   c++ -std=c++17 -I.. libcurl_transport.cpp -o libcurl_transport -lcurl -pthread
//   ./libcurl_transport NAME RUN_PATH
//
// A transport makes one exchange: no redirects, no retries, no credentials, no decompression. The library does these,
// and ranges, resuming and verification, above every transport.
//
// SPDX-License-Identifier: MIT
#ifndef WANDB_RESTORE_NO_OPENSSL
#define WANDB_RESTORE_NO_OPENSSL  // libcurl brings its own TLS
#endif
#include "wandb_restore.hpp"

#include <curl/curl.h>

#include <chrono>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#ifndef _WIN32
#include <pthread.h>
#include <signal.h>
#endif

namespace {

/// Blocks SIGPIPE in this thread during its lifetime: a write to a closed connection is then an error, not a signal.
/// CURLOPT_NOSIGNAL keeps libcurl from changing the signal handlers of the process, which is unsafe with threads.
class without_sigpipe {
#ifndef _WIN32
 public:
  without_sigpipe() {
    sigemptyset(&pipe_);
    sigaddset(&pipe_, SIGPIPE);
    pending_before_ = pending();
    pthread_sigmask(SIG_BLOCK, &pipe_, &before_);
  }
  ~without_sigpipe() {
    if (!pending_before_ && pending()) {
      int ignored = 0;
      sigwait(&pipe_, &ignored);
    }
    pthread_sigmask(SIG_SETMASK, &before_, nullptr);
  }
  without_sigpipe(const without_sigpipe&) = delete;
  without_sigpipe& operator=(const without_sigpipe&) = delete;

 private:
  static bool pending() {
    sigset_t set;
    sigemptyset(&set);
    return sigpending(&set) == 0 && sigismember(&set, SIGPIPE) == 1;
  }
  sigset_t pipe_{}, before_{};
  bool pending_before_ = false;
#else
 public:
  without_sigpipe() {}  // a defaulted constructor would cause a warning about an unused variable
#endif
};

/// A list of header lines for libcurl, freed at the end.
class header_list {
 public:
  header_list() = default;
  ~header_list() { curl_slist_free_all(head_); }
  header_list(const header_list&) = delete;
  header_list& operator=(const header_list&) = delete;

  void add(const std::string& line) {
    if (curl_slist* head = curl_slist_append(head_, line.c_str())) head_ = head;
  }
  curl_slist* get() const { return head_; }

 private:
  curl_slist* head_ = nullptr;
};

/// The idle easy handles. Each keeps its connections open, so a handle that was last used for the same origin is taken first.
/// (libcurl documents a cache of connections that threads share through CURLSH as unsafe.)
class handle_pool {
 public:
  using handle = std::unique_ptr<CURL, decltype(&curl_easy_cleanup)>;

  handle take(const std::string& origin) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto it = idle_.rbegin(); it != idle_.rend(); ++it) {
      if (it->origin != origin) continue;
      handle found = std::move(it->curl);
      idle_.erase(std::next(it).base());
      return found;
    }
    return {curl_easy_init(), &curl_easy_cleanup};
  }

  void give_back(handle curl, std::string origin) {
    curl_easy_reset(curl.get());  // clears the options; keeps connections, TLS sessions and resolved names
    const std::lock_guard<std::mutex> lock(mutex_);
    if (idle_.size() >= most) idle_.erase(idle_.begin());  // the one that was idle longest
    idle_.push_back({std::move(curl), std::move(origin)});
  }

 private:
  static constexpr std::size_t most = 32;
  struct entry {
    handle curl;
    std::string origin;
  };
  std::mutex mutex_;
  std::vector<entry> idle_;
};

/// The state of one exchange, for libcurl's callbacks.
class exchange {
 public:
  using clock = std::chrono::steady_clock;

  exchange(CURL* curl, const wandb::http_request& request, wandb::body_sink& sink)
      : curl_(curl), request_(request), sink_(sink) {}

  enum class end { none, sink_said_stop, cancelled, idle, header_too_large };
  end ended = end::none;  // why a callback ended the exchange, if one did
  wandb::http_response response;

  /// Returns whether the final response's head has arrived.
  bool started() const { return started_; }

  static std::size_t on_header(char* data, std::size_t, std::size_t size, void* self) {
    return static_cast<exchange*>(self)->header({data, size}) ? size : 0;
  }
  static std::size_t on_body(char* data, std::size_t, std::size_t size, void* self) {
    return static_cast<exchange*>(self)->body({data, size}) ? size : 0;
  }
  static int on_progress(void* self, curl_off_t, curl_off_t, curl_off_t, curl_off_t sent) {
    return static_cast<exchange*>(self)->progress(sent) ? 0 : 1;
  }

 private:
  /// Takes one line with its line break. Lines of interim responses (1xx) come first, trailers after the body.
  bool header(std::string_view line) {
    last_byte_ = clock::now();
    header_bytes_ += line.size();
    if (header_bytes_ > 256 * 1024) return ended = end::header_too_large, false;
    if (started_) return true;  // a trailer
    while (!line.empty() && (line.back() == '\r' || line.back() == '\n')) line.remove_suffix(1);

    if (line.empty()) {  // the end of a head
      if (response.status < 200) return true;
      started_ = true;
      sink_.connected();
      if (!sink_.start(response)) ended = end::sink_said_stop;
      return ended == end::none;
    }
    if (line.substr(0, 5) == "HTTP/") {
      response = {};
      const auto space = line.find(' ');
      if (space != line.npos) response.status = std::atoi(std::string(line.substr(space + 1, 3)).c_str());
    } else if (const auto colon = line.find(':'); colon != line.npos) {
      std::string_view value = line.substr(colon + 1);
      while (!value.empty() && (value.front() == ' ' || value.front() == '\t')) value.remove_prefix(1);
      while (!value.empty() && (value.back() == ' ' || value.back() == '\t')) value.remove_suffix(1);
      response.headers.emplace_back(line.substr(0, colon), value);
    }
    return true;
  }

  bool body(std::string_view bytes) {
    last_byte_ = clock::now();
    if (!sink_.write(bytes)) ended = end::sink_said_stop;
    return ended == end::none;
  }

  /// libcurl calls this during transfers, and about once a second while it waits.
  bool progress(curl_off_t sent) {
    if (request_.cancelled()) return ended = end::cancelled, false;
    curl_off_t connected = 0;  // microseconds; 0: not yet connected, so CURLOPT_CONNECTTIMEOUT_MS applies
    curl_easy_getinfo(curl_, CURLINFO_PRETRANSFER_TIME_T, &connected);
    if (connected == 0 || sent != sent_) last_byte_ = clock::now();
    sent_ = sent;
    if (clock::now() - last_byte_ > request_.idle_timeout) return ended = end::idle, false;
    return true;
  }

  CURL* curl_;
  const wandb::http_request& request_;
  wandb::body_sink& sink_;
  std::size_t header_bytes_ = 0;
  bool started_ = false;
  curl_off_t sent_ = 0;
  clock::time_point last_byte_ = clock::now();
};

/// A Transport over libcurl's easy interface. Copies share their connections.
class curl_transport {
 public:
  /// Takes the CA locations and verify_tls from the settings. If they name no CA, libcurl's defaults apply.
  explicit curl_transport(const wandb::settings& settings)
      : ca_file_(settings.ca_file.string()), ca_directory_(settings.ca_directory.string()),
        verify_tls_(settings.verify_tls) {
    static const CURLcode once = curl_global_init(CURL_GLOBAL_DEFAULT);
    static_cast<void>(once);
  }

  wandb::result<wandb::http_response> send(const wandb::http_request& request, wandb::body_sink& sink) {
    const auto address = wandb::url::parse(request.url);
    if (!address) return address.error();
    if (request.cancelled()) return wandb::error(wandb::errc::cancelled, "cancelled");
    if (!are_sendable(request.headers))
      return wandb::error(wandb::errc::invalid_argument,
                          address->redacted() + ": a header has a control character");
    handle_pool::handle curl = pool_->take(address->origin());
    if (!curl)
      return wandb::error(wandb::errc::connection_failed, "libcurl has no handle to give: out of memory?");

    exchange now(curl.get(), request, sink);
    char message[CURL_ERROR_SIZE] = "";
    header_list headers, proxy_headers;
    set_up(curl.get(), request, *address, now, headers, proxy_headers);
    curl_easy_setopt(curl.get(), CURLOPT_ERRORBUFFER, message);

    const without_sigpipe guard;
    const CURLcode code = curl_easy_perform(curl.get());
    curl_off_t connected = 0;  // microseconds; 0: no connection was established
    curl_easy_getinfo(curl.get(), CURLINFO_CONNECT_TIME_T, &connected);
    if (connected > 0 && !now.started()) sink.connected();
    long proxy_status = 0;  // of a tunnel
    curl_easy_getinfo(curl.get(), CURLINFO_HTTP_CONNECTCODE, &proxy_status);
    pool_->give_back(std::move(curl), address->origin());
    if (code == CURLE_OK && now.started()) return std::move(now.response);
    const std::string text = address->redacted() + ": ";
    if (code == CURLE_OK)  // libcurl returns this for a truncated head too, as if the response had no body
      return wandb::error(wandb::errc::connection_failed, text + "the head of the response was cut short");
    if (proxy_status >= 400 && proxy_status < 500)
      return wandb::error::permanent(wandb::errc::connection_failed,
                                     text + "the proxy answered " + std::to_string(proxy_status),
                                     static_cast<int>(proxy_status));
    return failure(code, now.ended, text + (*message ? message : curl_easy_strerror(code)));
  }

 private:
  /// Refuses line breaks in headers: libcurl would send the rest as another header.
  static bool are_sendable(const wandb::http_headers& headers) {
    for (const auto& [name, value] : headers) {
      for (const char c : name + value) {
        if ((c >= 0 && c < ' ' && c != '\t') || c == 0x7f) return false;
      }
    }
    return true;
  }

  void set_up(CURL* curl, const wandb::http_request& request, const wandb::url& address, exchange& now,
              header_list& headers, header_list& proxy_headers) const {
    curl_easy_setopt(curl, CURLOPT_URL,
                     address.str().c_str());  // without user and password
    curl_easy_setopt(curl, CURLOPT_PATH_AS_IS, 1L);
    curl_easy_setopt(curl, CURLOPT_FOLLOWLOCATION, 0L);
    curl_easy_setopt(curl, CURLOPT_HTTP_VERSION, CURL_HTTP_VERSION_1_1);  // each range has its connection
#if LIBCURL_VERSION_NUM >= 0x075500
    curl_easy_setopt(curl, CURLOPT_PROTOCOLS_STR, "http,https");
#else
    curl_easy_setopt(curl, CURLOPT_PROTOCOLS, CURLPROTO_HTTP | CURLPROTO_HTTPS);
#endif

    // "Name:" suppresses a field that libcurl would add; "Name;" sends a field with an empty value.
    for (const char* unwanted : {"Accept:", "Content-Type:", "Expect:"}) headers.add(unwanted);
    for (const auto& [name, value] : request.headers)
      headers.add(value.empty() ? name + ';' : name + ": " + value);
    if (request.method == "HEAD") {
      curl_easy_setopt(curl, CURLOPT_NOBODY, 1L);
    } else if (request.method != "GET") {
      curl_easy_setopt(curl, CURLOPT_POST, 1L);
      curl_easy_setopt(curl, CURLOPT_POSTFIELDS, request.body.data());
      curl_easy_setopt(curl, CURLOPT_POSTFIELDSIZE_LARGE, static_cast<curl_off_t>(request.body.size()));
      curl_easy_setopt(curl, CURLOPT_CUSTOMREQUEST, request.method.c_str());
    }
    curl_easy_setopt(curl, CURLOPT_HTTPHEADER, headers.get());

    // The proxy of the settings. If there is none, libcurl reads ALL_PROXY and NO_PROXY: they may name a SOCKS proxy,
    // which the settings do not support.
    const char* any = std::getenv("all_proxy");
    if (any == nullptr) any = std::getenv("ALL_PROXY");
    if (!request.proxy.empty()) {
      curl_easy_setopt(curl, CURLOPT_PROXY, request.proxy.c_str());
      curl_easy_setopt(curl, CURLOPT_NOPROXY, "");  // the settings have applied NO_PROXY
      if (!request.proxy_authorization.empty())
        proxy_headers.add("Proxy-Authorization: " + request.proxy_authorization);
    } else {
      curl_easy_setopt(curl, CURLOPT_PROXY, any != nullptr ? any : "");
    }
    curl_easy_setopt(curl, CURLOPT_HEADEROPT, static_cast<long>(CURLHEADER_SEPARATE));
    curl_easy_setopt(curl, CURLOPT_PROXYHEADER, proxy_headers.get());
    curl_easy_setopt(curl, CURLOPT_SUPPRESS_CONNECT_HEADERS, 1L);

    if (!ca_file_.empty()) curl_easy_setopt(curl, CURLOPT_CAINFO, ca_file_.c_str());
    if (!ca_directory_.empty()) curl_easy_setopt(curl, CURLOPT_CAPATH, ca_directory_.c_str());
    curl_easy_setopt(curl, CURLOPT_SSL_VERIFYPEER, verify_tls_ ? 1L : 0L);
    curl_easy_setopt(curl, CURLOPT_SSL_VERIFYHOST, verify_tls_ ? 2L : 0L);

    curl_easy_setopt(curl, CURLOPT_NOSIGNAL, 1L);
    curl_easy_setopt(curl, CURLOPT_CONNECTTIMEOUT_MS, static_cast<long>(request.connect_timeout.count()));
    curl_easy_setopt(curl, CURLOPT_NOPROGRESS, 0L);
    curl_easy_setopt(curl, CURLOPT_XFERINFOFUNCTION, &exchange::on_progress);
    curl_easy_setopt(curl, CURLOPT_XFERINFODATA, &now);
    curl_easy_setopt(curl, CURLOPT_HEADERFUNCTION, &exchange::on_header);
    curl_easy_setopt(curl, CURLOPT_HEADERDATA, &now);
    curl_easy_setopt(curl, CURLOPT_WRITEFUNCTION, &exchange::on_body);
    curl_easy_setopt(curl, CURLOPT_WRITEDATA, &now);
    curl_easy_setopt(curl, CURLOPT_BUFFERSIZE, 256L * 1024);
  }

  static wandb::error failure(CURLcode code, exchange::end ended, const std::string& text) {
    using wandb::errc;
    switch (ended) {
      case exchange::end::sink_said_stop:
      case exchange::end::cancelled: return {errc::cancelled, "cancelled"};
      case exchange::end::idle: return {errc::connection_failed, text + ": not a byte for too long"};
      case exchange::end::header_too_large:
        return {errc::protocol_violation, text + ": the header is too large"};
      case exchange::end::none: break;
    }
    switch (code) {
      case CURLE_PEER_FAILED_VERIFICATION:  // a retry cannot make the certificate valid
      case CURLE_SSL_CACERT_BADFILE:
      case CURLE_SSL_CERTPROBLEM:
      case CURLE_SSL_CIPHER:
      case CURLE_SSL_ISSUER_ERROR:
      case CURLE_SSL_ENGINE_NOTFOUND: return wandb::error::permanent(errc::connection_failed, text);
      case CURLE_UNSUPPORTED_PROTOCOL:  // libcurl takes any answer that is not HTTP for HTTP/0.9
      case CURLE_WEIRD_SERVER_REPLY:
      case CURLE_BAD_CONTENT_ENCODING:
      case CURLE_URL_MALFORMAT: return {errc::protocol_violation, text};
      default: return {errc::connection_failed, text};
    }
  }

  std::string ca_file_, ca_directory_;
  bool verify_tls_;
  std::shared_ptr<handle_pool> pool_ = std::make_shared<handle_pool>();
};

static_assert(wandb::is_transport<curl_transport>::value, "");

}  // namespace

#ifndef WANDB_RESTORE_EXAMPLE_WITHOUT_MAIN  // the conformance tests include only the transport
int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: libcurl_transport NAME RUN_PATH\n";
    return 2;
  }
  wandb::client<curl_transport> client;  // settings from the environment, and the transport made from them
  const auto file = client.try_restore(argv[1], argv[2]);
  if (!file) {
    std::cerr << file.error().what() << '\n';
    return 1;
  }
  std::cout << file->name() << ": " << file->size() << " bytes over libcurl, "
            << (file->verified() ? "verified" : "not verified") << '\n';
}
#endif
