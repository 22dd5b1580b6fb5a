// Targets for the readers of outside texts: addresses, settings, the service's answers, HTTP, records on disk.
// SPDX-License-Identifier: MIT
#ifndef WANDB_RESTORE_TESTS_FUZZ_SMALL_TARGETS_HPP
#define WANDB_RESTORE_TESTS_FUZZ_SMALL_TARGETS_HPP

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <atomic>
#include <thread>

#include "targets.hpp"

namespace fuzz {

namespace detail = wandb::detail;

/// An accepted run path can be written and read back; a refused one has an error.
inline void run_paths(std::string_view input) {
  feed in(input);
  const std::string text(in.line());
  const wandb::run_path defaults{std::string(in.line()), std::string(in.line()), std::string(in.line())};
  const auto parsed = wandb::run_path::parse(text, defaults);
  if (!parsed) {
    FUZZ_CHECK(parsed.error().code() == wandb::errc::invalid_run_path);
    return check_error(parsed.error());
  }
  FUZZ_CHECK(!parsed->entity.empty() && !parsed->project.empty() && !parsed->run_id.empty());
  for (const auto* part : {&parsed->entity, &parsed->project, &parsed->run_id}) {
    FUZZ_CHECK(part->find('\0') == part->npos && part->find('\n') == part->npos);
  }
  if (const auto named = detail::options_of(detail::run_argument(*parsed), "fuzzing")) {
    const auto again = wandb::run_path::parse(named->run_path);
    FUZZ_CHECK(again && *again == *parsed);
  }
}

/// An accepted URL keeps its parts when it is parsed again; resolving a reference gives such a URL, too.
inline void urls(std::string_view input) {
  feed in(input);
  const auto check = [](const wandb::result<wandb::url>& parsed) {
    if (!parsed) {
      FUZZ_CHECK(parsed.error().code() == wandb::errc::protocol_violation);
      return check_error(parsed.error());
    }
    FUZZ_CHECK(parsed->scheme == "http" || parsed->scheme == "https");
    FUZZ_CHECK(parsed->port > 0 && parsed->port < 65536 && !parsed->host.empty());
    FUZZ_CHECK(parsed->target.front() == '/');
    for (const char c : parsed->str()) FUZZ_CHECK(c > ' ' && c < '\x7f');
    const auto again = wandb::url::parse(parsed->str());
    FUZZ_CHECK(again && again->str() == parsed->str() && again->host == parsed->host);
    FUZZ_CHECK(parsed->redacted().find('?') == std::string::npos);
  };
  const auto base = wandb::url::parse(in.line());
  check(base);
  if (!base) return;
  check(base->resolve(in.rest()));
  if (const auto service = detail::parse_base_url(base->str())) {
    FUZZ_CHECK(detail::under_base(*service, *service));
    const auto other = base->resolve(in.rest());
    if (other && detail::under_base(*service, *other)) {
      FUZZ_CHECK(other->scheme == service->scheme && other->port == service->port);
      FUZZ_CHECK(detail::contains(detail::hosts_of(*service), other->host));
    }
  }
}

/// A file that the netrc reader accepts ends with the same passwords after a comment is added.
inline void netrc(std::string_view input) {
  const auto read = detail::parse_netrc(input);
  if (!read) {
    check_error(read.error());
    return;
  }
  for (const auto& [machine, password] : *read) FUZZ_CHECK(machine.size() + password.size() <= input.size());
  const auto again = detail::parse_netrc("# a comment\n" + std::string(input));
  FUZZ_CHECK(again.has_value());
  for (const auto& [machine, password] : *read) {
    const auto* found = again->find(machine);
    FUZZ_CHECK(found != nullptr && *found == password);
  }
}

inline void ini(std::string_view input) {
  const auto read = detail::parse_ini(input);
  if (!read) {
    check_error(read.error());
    return;
  }
  for (const auto& [key, value] : *read) {
    FUZZ_CHECK(!key.empty() && key == detail::lower(key));
    FUZZ_CHECK(value.empty() || !detail::is_space(value.back()));
  }
  (void)detail::parse_key_values(input);
}

/// Reads the settings from variables and files that the input chooses. No secret is in a warning or error.
inline void settings(std::string_view input) {
  static const char* const names[] = {"WANDB_BASE_URL",
                                      "WANDB_API_KEY",
                                      "WANDB_ENTITY",
                                      "WANDB_PROJECT",
                                      "WANDB_RUN_ID",
                                      "WANDB_MODE",
                                      "WANDB_RESUME",
                                      "WANDB_X_EXTRA_HTTP_HEADERS",
                                      "WANDB__PROXIES",
                                      "WANDB_HTTP_PROXY",
                                      "HTTPS_PROXY",
                                      "NO_PROXY",
                                      "WANDB_HTTP_TIMEOUT",
                                      "WANDB_INSECURE_DISABLE_SSL",
                                      "WANDB_IDENTITY_TOKEN_FILE",
                                      "SM_TRAINING_ENV",
                                      "WANDB_USERNAME",
                                      "WANDB_USER_EMAIL"};
  static const std::filesystem::path home = folder::shared().path() / "home";
  static const bool ready = [] {
    std::filesystem::create_directories(home / "wandb");
    ::setenv("HOME", home.c_str(), 1);
    ::setenv("WANDB_CONFIG_DIR", home.c_str(), 1);
    ::setenv("WANDB_DIR", home.c_str(), 1);
    ::setenv("NETRC", (home / "netrc").c_str(), 1);
    return true;
  }();
  (void)ready;
  feed in(input);
  std::string variables;
  for (const char* name : names) {
    const std::string value = with_key(in.line());
    if (value.empty() || value.find('\0') != value.npos) {
      ::unsetenv(name);
    } else {
      ::setenv(name, value.c_str(), 1);
    }
  }
  const auto split = in.rest().find("\n---\n");
  write_file(home / "wandb" / "settings", in.rest().substr(0, split));
  const auto netrc_text = split == std::string_view::npos ? std::string_view() : in.rest().substr(split + 5);
  write_file(home / "netrc", with_key(netrc_text));
  const auto found = wandb::settings::from_environment();
  if (found.problem) check_error(*found.problem);
  for (const auto& warning : found.warnings) FUZZ_CHECK(warning.find(secret) == std::string::npos);
  for (const auto& [name, value] : found.extra_headers) FUZZ_CHECK(detail::is_header(name, value));
  for (const char* name : names) ::unsetenv(name);
}

/// A transport that answers every request with the same bytes.
struct constant_transport {
  std::string body;
  int status = 200;
  wandb::result<wandb::http_response> send(const wandb::http_request&, wandb::body_sink& sink) const {
    wandb::http_response head{status, {{"Content-Length", std::to_string(body.size())}}};
    if (!sink.start(head) || !sink.write(body)) return wandb::error(wandb::errc::cancelled, "cancelled");
    return head;
  }
};

inline wandb::settings test_settings() {
  wandb::settings made;
  made.base_url = "https://service.test";
  made.api_key = api_key;
  made.connect_timeout = made.idle_timeout = made.retry_timeout = std::chrono::milliseconds(1);
  made.on_warning = [](std::string_view) {};
  return made;
}

/// Answers of the service: listing and looking for a file end with files or with an error.
inline void graphql(std::string_view input) {
  feed in(input);
  const std::uint8_t choice = in.byte();
  static constexpr int statuses[] = {200, 200, 200, 400, 401, 403, 404, 429, 500};
  constant_transport transport{with_key(in.rest()), statuses[choice % std::size(statuses)]};
  auto configuration = test_settings();
  wandb::client<constant_transport> client(configuration, transport);
  const auto listed = client.try_list_files("e/p/r");
  if (!listed) check_error(listed.error());
  wandb::restore_options options;
  options.run_path = "p/r";  // asks for the default entity first
  options.root = folder::shared().path() / "graphql";
  const auto file = client.try_restore("a/name", options);
  if (!file) check_error(file.error());
  std::error_code ignored;
  std::filesystem::remove_all(options.root, ignored);
}

/// JSON texts of our own: what json_string writes, the JSON library reads back.
inline void json_texts(std::string_view input) {
  const std::string text = detail::json_string(input);
  const auto read = detail::parse_json("[" + text + "]");
  FUZZ_CHECK(read->is_array() && read->size() == 1);
  const auto again = detail::text_of(detail::elements(*read)[0]);
  FUZZ_CHECK(detail::json_string(again) == text);
  (void)detail::parse_json(input);
  (void)detail::backend_message(*detail::parse_json(input));
}

/// Fields of responses.
inline void fields(std::string_view input) {
  feed in(input);
  const auto range = detail::content_range::parse(in.line());
  FUZZ_CHECK(range.bytes.begin <= range.bytes.end);
  wandb::http_response head;
  head.headers = {{"Retry-After", std::string(in.line())}};
  const auto wait = detail::parse_retry_after(head);
  FUZZ_CHECK(wait.count() >= 0);
  const auto date = in.line();
  if (const auto seconds = detail::parse_http_date(date)) FUZZ_CHECK(*seconds < 253402300800u + 86400u);
  if (const auto seconds = detail::parse_utc(date)) FUZZ_CHECK(*seconds <= 7258118400u);
  const auto limit = detail::parse_seconds(date);
  FUZZ_CHECK(limit.count() >= 0);
  const auto digest = detail::normalised_md5(date);
  FUZZ_CHECK(digest.empty() || (digest.size() == 32 && detail::normalised_md5(digest) == digest));
  if (const auto bytes = detail::base64_decode(date)) {
    FUZZ_CHECK(bytes->size() <= date.size());
    FUZZ_CHECK(detail::base64_decode(detail::base64_encode(*bytes)) == bytes);
  }
  FUZZ_CHECK(detail::base64_decode(detail::base64_encode(in.rest())) == std::string(in.rest()));
  FUZZ_CHECK(detail::percent_decode(detail::percent_encode(in.rest())) == std::string(in.rest()));
  FUZZ_CHECK(detail::hex_decode(detail::hex_encode(in.rest())) == std::string(in.rest()));
  const auto shown = detail::first_words(in.rest());
  FUZZ_CHECK(shown.find('\n') == shown.npos && shown.size() < 600);
  (void)detail::without_markup(in.rest());
  const auto name = detail::in_quotes(in.rest());
  for (const char c : name) FUZZ_CHECK(static_cast<unsigned char>(c) >= ' ');
}

/// Proxies and NO_PROXY.
inline void proxies(std::string_view input) {
  feed in(input);
  const auto target = wandb::url::parse("https://" + std::string(in.line()) + "/");
  wandb::settings configuration;
  configuration.https_proxy.url = "http://proxy.test:3128";
  configuration.https_proxy.bypass = in.line();
  const auto proxy = detail::parse_proxy(in.line());
  if (!proxy) check_error(proxy.error());
  if (proxy) FUZZ_CHECK(proxy->scheme == "http" && proxy->port > 0);
  if (!target) return;
  const auto chosen = detail::proxy_for(configuration, *target);
  FUZZ_CHECK(chosen.empty() || chosen == configuration.https_proxy.url);
  configuration.https_proxy.bypass += ",*";
  FUZZ_CHECK(detail::proxy_for(configuration, *target).empty());
}

/// Receipts and credentials files. A receipt that was written is read back behind any older content of its file.
inline void records(std::string_view input) {
  static const std::filesystem::path home = folder::shared().path() / "records";
  static const bool ready = std::filesystem::create_directories(home / "cache" / "receipts");
  (void)ready;
  const auto target = home / "target";
  write_file(target, "abc");
  const auto facts = detail::facts_of(target);
  const auto where = detail::receipt_path(home / "cache", *detail::real_path(target));
  write_file(where, input);
  const auto read = detail::read_receipt(home / "cache", target, *facts).value_or(detail::receipt());
  if (read) FUZZ_CHECK(read.size == facts->size && read.modified == facts->modified);
  feed in(input);
  const std::string part(in.line().substr(0, 100));
  detail::receipt mine{{"e" + part, "p", "r" + part}, part, facts->size, facts->modified, {}};
  FUZZ_CHECK(detail::write_receipt(home / "cache", target, mine).has_value());
  const auto again = detail::read_receipt(home / "cache", target, *facts).value_or(detail::receipt());
  FUZZ_CHECK(again && again.run == mine.run && again.name == mine.name);
  write_file(home / "credentials.json", input);
  (void)detail::read_credentials(home / "credentials.json");
}

/// The record of a partial file. Blocks that a wrong record claims are found by the md5, which is not this target's job; but no
/// record makes the file longer or shorter, or reads outside of it.
inline void resume_record(std::string_view input) {
  static const std::filesystem::path home = folder::shared().path() / "partial";
  static const bool ready = std::filesystem::create_directories(home);
  (void)ready;
  feed in(input);
  const std::uint64_t size = 1 + in.below(200'000);
  const detail::place at(home / "file");
  const std::string md5(32, 'a');
  const std::string name = in.byte() % 2 == 0
                               ? at.released().string()
                               : at.partial(md5, std::string(in.line().substr(0, 60))).string();
  if (name.find('\0') == name.npos && name.find('/', home.string().size() + 1) == name.npos) {
    const auto start = in.below(220'000);
    std::string content(start, 'x');
    if (in.byte() % 2 == 0) {  // a true header
      content.resize((size + 65535) / 65536 * 65536, 'x');
      content += "wandb-restore 2\n";
      for (int shift = 0; shift < 64; shift += 8) content += static_cast<char>(size >> shift & 0xff);
      content += md5 + std::string(8, '\0');
    }
    content += in.rest();
    write_file(name, content);
  }
  {
    auto opened = detail::partial_file::open(at, md5, size);
    FUZZ_CHECK(opened.has_value());
    auto& partial = **opened;
    FUZZ_CHECK(partial.size() == size);
    FUZZ_CHECK(partial.record(0, partial.blocks()).has_value());
    FUZZ_CHECK(partial.has(0));
    FUZZ_CHECK(partial.finish().has_value());
    FUZZ_CHECK(std::filesystem::file_size(partial.where()) == size);
  }
  std::error_code ignored;
  for (const auto& entry : std::filesystem::directory_iterator(home, ignored))
    std::filesystem::remove_all(entry.path(), ignored);
}

/// A server on loopback that sends the same bytes to each connection, in pieces, and closes it.
class byte_server {
 public:
  byte_server() {
    listener_ = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t length = sizeof address;
    FUZZ_CHECK(::bind(listener_, reinterpret_cast<sockaddr*>(&address), length) == 0);
    FUZZ_CHECK(::listen(listener_, 16) == 0);
    FUZZ_CHECK(::getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &length) == 0);
    port_ = ntohs(address.sin_port);
    thread_ = std::thread([this] { serve(); });
  }
  ~byte_server() {
    ::shutdown(listener_, SHUT_RDWR);
    thread_.join();
    ::close(listener_);
  }
  byte_server(const byte_server&) = delete;
  byte_server& operator=(const byte_server&) = delete;

  [[nodiscard]] int port() const { return port_; }
  /// Call while no connection is open.
  void send(std::string_view bytes, std::size_t piece) {
    bytes_ = bytes;
    piece_ = piece;
  }

 private:
  void serve() {
    for (;;) {
      const int peer = ::accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
      if (peer < 0) return;
      const int on = 1;
      ::setsockopt(peer, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
      char request[4096];
      (void)::recv(peer, request, sizeof request, 0);
      for (std::string_view rest = bytes_; !rest.empty();) {
        const auto count = ::send(peer, rest.data(), (std::min)(piece_, rest.size()), MSG_NOSIGNAL);
        if (count <= 0) break;
        rest.remove_prefix(static_cast<std::size_t>(count));
      }
      ::shutdown(peer, SHUT_WR);
      while (::recv(peer, request, sizeof request, 0) > 0) {}
      ::close(peer);
    }
  }
  int listener_ = -1, port_ = 0;
  std::string bytes_;
  std::size_t piece_ = 1;
  std::thread thread_;
};

/// Heads and bodies of responses, through http_transport. However the bytes are cut into packets, the outcome is the same.
inline void responses(std::string_view input) {
  static byte_server server;
  struct collector final : wandb::body_sink {
    bool start(const wandb::http_response& head) override {
      FUZZ_CHECK(!started);
      started = true;
      status = head.status;
      for (const auto& [name, value] : head.headers) fields += name + ": " + value + "\n";
      return true;
    }
    bool write(std::string_view bytes) override {
      FUZZ_CHECK(started && !bytes.empty());
      body += bytes;
      return true;
    }
    bool started = false;
    int status = 0;
    std::string fields, body;
  };
  const auto exchange = [&](std::size_t piece, collector& sink) {
    server.send(input, piece);
    wandb::http_transport transport;
    wandb::http_request request;
    request.url = "http://127.0.0.1:" + std::to_string(server.port()) + "/a?signature=" + secret;
    request.connect_timeout = request.idle_timeout = std::chrono::seconds(20);
    auto got = transport.send(request, sink);
    if (!got) check_error(got.error());
    if (got) FUZZ_CHECK(sink.started && got->status == sink.status && got->status >= 200);
    return got ? std::string() : std::string(wandb::to_string(got.error().code()));
  };
  collector whole, pieces;
  const auto first = exchange(input.size() + 1, whole);
  FUZZ_CHECK(whole.body.size() <= input.size());
  if (input.size() > 300) return;  // many packets take long
  const auto second = exchange(1 + input.size() / 16, pieces);
  FUZZ_CHECK(first == second && whole.status == pieces.status && whole.fields == pieces.fields);
  FUZZ_CHECK(whole.body == pieces.body);
}

}  // namespace fuzz

#endif  // WANDB_RESTORE_TESTS_FUZZ_SMALL_TARGETS_HPP
