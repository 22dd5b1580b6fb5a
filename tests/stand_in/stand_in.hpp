// A stand-in server for the Weights & Biases service and its object storage, for tests. On demand it fails in a specified way,
// reproducibly and to the byte.
//
//   stand_in::server server;
//   auto run = server.add_run("vanpelt", "my-project", "a1b2c3d");
//   server.add_file(run, "model.h5", stand_in::generated(5'000'000));
//   server.add_fault(stand_in::target(stand_in::place::storage).nth(1), stand_in::act::reset(1000));
//   // point the client at server.base_url(), server.ca_file(path), server.key(), then
//   CHECK(server.counted().of(stand_in::request_kind::storage).requests == 2);
//
// It listens on 127.0.0.1 only. All functions are safe to call from any thread while it runs.
//
// SPDX-License-Identifier: MIT
#ifndef WANDB_RESTORE_TESTS_STAND_IN_HPP
#define WANDB_RESTORE_TESTS_STAND_IN_HPP

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace stand_in {

using header_list = std::vector<std::pair<std::string, std::string>>;

// ---- content and files ----------------------------------------------------------------------------------

/// The content of a file. Safe to read from several threads at once.
class content {
 public:
  content() = default;
  content(const content&) = delete;
  content& operator=(const content&) = delete;
  virtual ~content() = default;

  virtual std::uint64_t size() const = 0;
  /// Reads exactly `count` bytes from `offset` on. The range must lie inside the content. Throws std::runtime_error after a
  /// disk error.
  virtual void read(std::uint64_t offset, char* out, std::size_t count) const = 0;
  /// Identifies the bytes without reading them. The ETag is made from it.
  virtual std::string fingerprint() const = 0;
};
using content_ptr = std::shared_ptr<const content>;

content_ptr bytes(std::string text);
/// A file on disk, read with pread on demand. Throws std::runtime_error if it cannot be opened.
content_ptr from_disk(const std::filesystem::path& path);
/// Pseudo-random bytes, each a function of its offset and `seed`. Needs no memory.
content_ptr generated(std::uint64_t size, std::uint64_t seed = 0);

/// Returns a part of some content, by default all of it, as a string.
std::string read_text(const content& from, std::uint64_t offset = 0, std::uint64_t count = UINT64_MAX);
std::string md5_base64(const content& of);
std::string md5_hex(const content& of);

struct run_ref {
  std::string entity, project, id;
};

enum class md5_form { base64, hex, null, absent };
enum class size_form { number, string, null, absent };
enum class etag_form { strong, weak, none };

/// The properties of a file in the service's answers.
struct file_attributes {
  md5_form md5_as = md5_form::base64;
  std::optional<std::string>
      md5;  ///< sent unchanged ("0", "XXX", another file's); otherwise computed on first demand
  size_form size_as = size_form::number;
  std::optional<std::uint64_t> size;  ///< reported instead of the true size
  std::string mimetype = "application/octet-stream";
  std::optional<std::string> updated_at = "2024-01-02T03:04:05Z";  ///< nullopt: null
  std::optional<std::string> url;                                  ///< sent unchanged, e.g. "s3://bucket/key"
  std::optional<std::string> direct_url;                           ///< likewise
  etag_form etag = etag_form::strong;
};

// ---- options --------------------------------------------------------------------------------------------

enum class origin { service, storage, proxy };
constexpr std::size_t origin_count = 3;

enum class certificate { good, wrong_host, expired, other_authority };
enum class tls_versions { both, only_1_2, only_1_3 };

/// The redirect of `/files/...`. `relative`: to a path on the service, which sends the file itself; `none`: no redirect, the
/// service sends the file; `chain`: over `redirect_hops` addresses of the service; `loop`: endless; `plain_http`: to the
/// storage address with http instead of https; `other_host`: to the storage address with the host `options::other_host`.
enum class redirect { absolute, relative, chain, loop, plain_http, other_host, none };

/// The default API key: 40 characters, as the SDK wants.
constexpr const char* default_key = "standin00123456789abcdef0123456789abcdef0123";

struct options {
  std::uint16_t service_port = 0, storage_port = 0, proxy_port = 0;  ///< 0: any free one
  bool service_tls = true, storage_tls = true;                       ///< false: plain HTTP
  certificate service_certificate = certificate::good, storage_certificate = certificate::good;
  tls_versions versions = tls_versions::both;
  bool through_intermediate = false;        ///< certificates are signed by an intermediate authority
  bool demands_client_certificate = false;  ///< the server requires a client certificate
  std::string host = "127.0.0.1";           ///< the host in generated addresses
  std::string other_host = "localhost";     ///< see redirect::other_host
  /// Names that certificates cover. The proxy takes each to 127.0.0.1, and port 443 of it to the service.
  std::vector<std::string> more_hosts;
  std::string
      service_url;  ///< what the service calls itself, e.g. "https://api.example.test"; empty: its port at `host`
  std::string storage_url;  ///< the same for the storage
  std::string prefix;       ///< of every path of the service, e.g. "/wandb"

  std::string key = default_key;
  std::optional<std::string> viewer_entity =
      "stand-in";                            ///< the account's default entity; nullopt: it has none
  std::vector<std::string> identity_tokens;  ///< JWTs that /oidc/token takes
  std::int64_t token_seconds = 3600;         ///< its expires_in

  redirect redirect_to = redirect::absolute;
  unsigned redirect_hops = 3;
  int redirect_status = 302;
  unsigned signature_uses = 0;  ///< requests that a signed address is valid for; 0: any number

  bool node_for_missing = true;             ///< a missing name: true: a node with the md5 "0"; false: no node
  std::vector<std::string> unknown_fields;  ///< fields of GraphQL that this (older) server does not know

  std::uint64_t body_rate = 0;    ///< bytes per second of each file body; 0: no cap
  std::uint64_t global_rate = 0;  ///< bytes per second of all bodies together

  bool proxy = false;                            ///< listen as a forward proxy too
  std::optional<std::string> proxy_credentials;  ///< "user:password"; without them the proxy answers 407
};

// ---- faults ---------------------------------------------------------------------------------------------

/// The place of a fault. `connect`: a connection after accept, before TLS. `storage`: file bytes, from either origin. `files`:
/// the service's `/files/...`, if it redirects.
enum class place { any, connect, graphql, oidc, files, storage, proxy };

/// The requests that a fault applies to: the matching ones from number `first` to `last`, counted from 1.
class target {
 public:
  target(place at_place)
      : at(at_place) {}  // NOLINT(google-explicit-constructor): add_fault(place::storage, ...)

  target& nth(unsigned n) { return nth(n, n); }
  target& nth(unsigned from, unsigned to) { return first = from, last = to, *this; }
  target& from(unsigned n) { return nth(n, UINT32_MAX); }
  /// A part of the decoded path (files, storage, oidc), of the request's body (graphql), of the name of the
  /// origin (connect: "service", "storage", "proxy"), or of the address asked for (proxy).
  target& matching(std::string text) { return match = std::move(text), *this; }
  /// Only requests for a range that contains this offset.
  target& covering(std::uint64_t offset) { return covers = offset, *this; }

  place at;
  std::string match;
  unsigned first = 1;
  unsigned last = UINT32_MAX;
  std::optional<std::uint64_t> covers;
};

struct circumstances;  // the input of an answer
struct reply;          // the answer; both are private to stand_in.cpp

/// The effect of a fault. The effects of several faults on one request are combined.
struct action {
  std::function<void(circumstances&)> before;
  std::function<void(reply&)> after;
};

enum class bad_range { missing, shifted, wrong_end, wrong_total, unknown_total, garbage };

/// The available faults. Numbers of bytes count the sent body; offsets are offsets in the file.
namespace act {
// faults without an answer; these three can also be used at place::connect
action
hang();  ///< waits until released, stopped, or the peer closes; at place::connect the TLS handshake hangs
action drop();    ///< the connection is closed
action refuse();  ///< the connection is reset
// faults with another answer
action status(int code, header_list fields = {}, std::string body = {});
action too_many_requests(std::string retry_after);  ///< 429; seconds or an HTTP date
action html(int code);                              ///< an HTML error page, as gateways send it
action body(std::string text, std::string type = "application/json");  ///< 200
action malformed_json();
action wrong_shape();                                   ///< JSON of a wrong structure
action graphql_errors(std::vector<std::string> texts);  ///< 200 with errors
action redirect_to(std::string location, int code = 302);
action oversize(std::uint64_t size);  ///< a JSON document of this size
action endless_body();
// faults in the head
action interim(int code = 103, unsigned count = 1);  ///< interim responses before the answer
action header(std::string name, std::string value);  ///< sets a header, e.g. Content-Encoding: gzip
action without_header(std::string name);
action many_headers(unsigned count);
action endless_header();
action garbage_status_line(std::string line = "ICY 200 OK");
action close_after();     ///< sends Connection: close, and closes
action close_silently();  ///< closes after an answer that promised to keep the connection
action chunked();         ///< no Content-Length
action until_close();     ///< the body ends with the connection
action
length_off_by(std::int64_t promised_more);  ///< > 0: the body ends early; < 0: it is longer than promised
action content_range(bad_range how);
// faults in the body
action flip_byte(std::uint64_t offset);
action cut(std::uint64_t after);           ///< ends with close_notify and FIN
action cut_abruptly(std::uint64_t after);  ///< ends with FIN, without close_notify
action reset(std::uint64_t after);         ///< RST, once the peer has received the sent bytes
action stall(std::uint64_t after);         ///< continues once released
action drip(std::chrono::milliseconds interval,
            std::size_t count = 1);  ///< sends `count` bytes after each pause
action ignore_range();               ///< 200 with the whole file
action etag(std::string text);       ///< another ETag, which If-Range and If-Match are compared with
action changed_content(std::uint64_t from = 0);  ///< other bytes from this offset on, with another ETag
}  // namespace act

/// Parses a fault in the notation of the program's `--fault`. Throws std::invalid_argument with the reason.
std::pair<target, action> parse_fault(std::string_view spec);
/// Returns a description of that notation, with all faults.
std::string fault_notation();

// ---- the log of requests --------------------------------------------------------------------------------

enum class request_kind { graphql, oidc, files, storage, proxy, other };
constexpr std::size_t request_kind_count = 6;

struct request_record {
  std::size_t number = 0;  ///< in order of arrival over all origins, from 0
  origin at = origin::service;
  request_kind kind = request_kind::other;
  std::uint64_t connection = 0;
  std::string method, target, path, query;  ///< target: as received; path: decoded; query: as received
  header_list headers;                      ///< as received
  std::string body;
  // the progress of the answer
  int status = 0;  ///< 0: none yet
  std::uint64_t body_sent = 0;
  bool finished = false;  ///< whether the request was answered, cut or given up

  /// Returns the first header of that name, compared without case.
  std::optional<std::string> header(std::string_view name) const;
  std::optional<std::string> range() const { return header("Range"); }
};

struct origin_counters {
  std::uint64_t connections = 0, open_connections = 0, handshakes = 0, failed_handshakes = 0;
};
struct kind_counters {
  std::uint64_t requests = 0, answered = 0, body_bytes = 0;
};

struct counters {
  std::array<origin_counters, origin_count> by_origin;
  std::array<kind_counters, request_kind_count> by_kind;
  std::uint64_t stalled = 0;          ///< connections that currently hang or stall
  std::uint64_t faults_struck = 0;    ///< number of times that a fault was applied
  std::uint64_t signatures_made = 0;  ///< number of signed addresses that were generated

  const origin_counters& of(origin at) const { return by_origin.at(static_cast<std::size_t>(at)); }
  const kind_counters& of(request_kind kind) const { return by_kind.at(static_cast<std::size_t>(kind)); }
};

// ---- the server -----------------------------------------------------------------------------------------

class server {
 public:
  /// Starts listening. Throws std::runtime_error if that fails.
  explicit server(options how = {});
  ~server();
  server(const server&) = delete;
  server& operator=(const server&) = delete;

  /// Ends every connection, also stalled ones, and joins every thread. Idempotent. A test must first release an on_request
  /// callback that blocks.
  void stop();

  std::string base_url() const;     ///< with the prefix; a value for WANDB_BASE_URL
  std::string storage_url() const;  ///< without a path
  std::string proxy_url() const;    ///< empty without a proxy
  std::uint16_t port(origin at) const;
  std::string key() const;
  std::string ca_pem() const;
  std::string intermediate_pem() const;  ///< see options::through_intermediate
  void write_ca(const std::filesystem::path& file) const;
  std::string files_url(const run_ref& run, std::string_view name) const;  ///< the value of a node's url
  std::string signed_url(const run_ref& run,
                         std::string_view name);  ///< a new signed address, like the value of directUrl

  run_ref add_run(std::string entity, std::string project, std::string id, bool is_public = false);
  void remove_run(const run_ref& run);
  void set_run_state(const run_ref& run,
                     std::string state);  ///< as in the service: "running", "finished", "crashed", ...
  /// Adds or replaces a file. Adds the run if it is missing.
  void add_file(const run_ref& run, const std::string& name, content_ptr what,
                file_attributes attributes = {});
  void add_file(const run_ref& run, const std::string& name, std::string text,
                file_attributes attributes = {});
  void remove_file(const run_ref& run, const std::string& name);
  /// Adds every regular file below `directory` under its relative name. Returns the number of files.
  std::size_t load_folder(const run_ref& run, const std::filesystem::path& directory);

  void set_key(std::string key);  ///< replaces the valid key
  void expire_signatures();       ///< storage answers 403 to all signed addresses so far
  void revoke_tokens();           ///< tokens of /oidc/token get 401 from now on
  void set_redirect(redirect to, unsigned hops = 3, int status = 302);
  /// From now on `/files/...` redirects to the address that this function returns for a file, e.g. a signed address of another
  /// server, in place of one of the stand-in's storage. The function runs in the connection's thread and may block.
  void set_addresses(std::function<std::string(const run_ref&, const std::string& name)> addresses);
  void set_rate(std::uint64_t each_body, std::uint64_t all_together = 0);  ///< applies to later answers

  std::size_t add_fault(target where, action what);  ///< returns the number of the fault
  std::size_t add_fault(std::string_view spec);      ///< see parse_fault
  std::size_t struck(std::size_t fault) const;       ///< number of times that the fault was applied
  void clear_faults();
  void release();  ///< continues all stalled answers

  /// Sets a callback, which runs in the connection's thread after a request is logged and before it is answered. It may block.
  void on_request(std::function<void(const request_record&)> callback);

  std::vector<request_record> requests() const;
  std::vector<request_record> requests(request_kind kind) const;
  counters counted() const;
  void clear_log();  ///< forgets the requests and counters (but for connections that are open or stalled)

  struct view {
    const std::vector<request_record>& requests;
    const counters& counts;
  };
  /// Waits until the predicate holds. It is evaluated after each change with the log locked, so it must not call the server.
  /// Returns false after the timeout, or if the server stopped.
  bool wait_for(const std::function<bool(const view&)>& predicate, std::chrono::milliseconds timeout) const;

 private:
  class implementation;
  std::unique_ptr<implementation> impl_;
};

std::string_view name_of(origin at);
std::string_view name_of(request_kind kind);

}  // namespace stand_in

#endif
