// A stand-in for the Weights & Biases service, for tests: it answers as the service and its object storage
// do, and misbehaves on demand, byte for byte and in a fixed order.
//
//   stand_in::server server;
//   auto run = server.add_run("vanpelt", "my-project", "a1b2c3d");
//   server.add_file(run, "model.h5", stand_in::generated(5'000'000));
//   server.add_fault(stand_in::target(stand_in::place::storage).nth(1), stand_in::act::reset(1000));
//   // point the client at server.base_url(), server.ca_file(path), server.key(), then
//   CHECK(server.counted().of(stand_in::request_kind::storage).requests == 2);
//
// It listens on 127.0.0.1 alone. Everything is safe to call from any thread while it runs.
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

// ---- what is served -------------------------------------------------------------------------------------

/// The bytes of a file. Reading is safe from several threads at once.
class content {
 public:
  content() = default;
  content(const content&) = delete;
  content& operator=(const content&) = delete;
  virtual ~content() = default;

  virtual std::uint64_t size() const = 0;
  /// Exactly `count` bytes from `offset` on, all of which lie inside. Throws std::runtime_error if a disk
  /// fails.
  virtual void read(std::uint64_t offset, char* out, std::size_t count) const = 0;
  /// Differs where the bytes differ, and costs no reading of them. Goes into the ETag.
  virtual std::string fingerprint() const = 0;
};
using content_ptr = std::shared_ptr<const content>;

content_ptr bytes(std::string text);
/// Read with pread when it is asked for, never loaded. Throws std::runtime_error if it cannot be opened.
content_ptr from_disk(const std::filesystem::path& path);
/// Pseudo-random bytes, each a function of its offset and `seed`: any size costs no memory.
content_ptr generated(std::uint64_t size, std::uint64_t seed = 0);

/// A part of some content as a string; the whole by default.
std::string read_text(const content& from, std::uint64_t offset = 0, std::uint64_t count = UINT64_MAX);
std::string md5_base64(const content& of);
std::string md5_hex(const content& of);

struct run_ref {
  std::string entity, project, id;
};

enum class md5_form { base64, hex, null, absent };
enum class size_form { number, string, null, absent };
enum class etag_form { strong, weak, none };

/// What the service says of a file beside its bytes.
struct file_attributes {
  md5_form md5_as = md5_form::base64;
  std::optional<std::string>
      md5;  ///< said as it stands ("0", "XXX", another's); otherwise computed on first demand
  size_form size_as = size_form::number;
  std::optional<std::uint64_t> size;  ///< claimed in place of the true one
  std::string mimetype = "application/octet-stream";
  std::optional<std::string> updated_at = "2024-01-02T03:04:05Z";  ///< nullopt: null
  std::optional<std::string> url;         ///< said as it stands, e.g. "s3://bucket/key"
  std::optional<std::string> direct_url;  ///< likewise
  etag_form etag = etag_form::strong;
};

// ---- options --------------------------------------------------------------------------------------------

enum class origin { service, storage, proxy };
constexpr std::size_t origin_count = 3;

enum class certificate { good, wrong_host, expired, other_authority };
enum class tls_versions { both, only_1_2, only_1_3 };

/// Where `/files/...` leads. `relative`: a path on the service, which then sends the file itself; `none`: it
/// does so at once; `chain`: over `redirect_hops` addresses of the service; `loop`: for ever; `plain_http`:
/// the storage address with http in place of https; `other_host`: with `options::other_host` for its host.
enum class redirect { absolute, relative, chain, loop, plain_http, other_host, none };

/// The default API key: 40 characters, as the SDK wants.
constexpr const char* default_key = "standin00123456789abcdef0123456789abcdef0123";

struct options {
  std::uint16_t service_port = 0, storage_port = 0, proxy_port = 0;  ///< 0: any free one
  bool service_tls = true, storage_tls = true;                       ///< false: plain HTTP
  certificate service_certificate = certificate::good, storage_certificate = certificate::good;
  tls_versions versions = tls_versions::both;
  bool through_intermediate = false;        ///< certificates are signed by an intermediate authority
  bool demands_client_certificate = false;  ///< in the TLS handshake
  std::string host = "127.0.0.1";           ///< in the addresses that are given out
  std::string other_host = "localhost";     ///< see redirect::other_host
  /// Names that certificates cover. The proxy takes each to 127.0.0.1, and port 443 of it to the service.
  std::vector<std::string> more_hosts;
  std::string
      service_url;  ///< what the service calls itself, e.g. "https://api.example.test"; empty: its port at `host`
  std::string prefix;  ///< of every path of the service, e.g. "/wandb"

  std::string key = default_key;
  std::optional<std::string> viewer_entity =
      "stand-in";                            ///< the account's default entity; nullopt: it has none
  std::vector<std::string> identity_tokens;  ///< JWTs that /oidc/token takes
  std::int64_t token_seconds = 3600;         ///< its expires_in

  redirect redirect_to = redirect::absolute;
  unsigned redirect_hops = 3;
  int redirect_status = 302;
  unsigned signature_uses = 0;  ///< a signed address is good for so many requests; 0: any number

  bool node_for_missing = true;  ///< a name that is not there: a node whose md5 is "0", else no node
  std::vector<std::string> unknown_fields;  ///< fields of GraphQL that this (older) server does not know

  std::uint64_t body_rate = 0;    ///< bytes per second of each file body; 0: no cap
  std::uint64_t global_rate = 0;  ///< and of all of them together

  bool proxy = false;                            ///< listen as a forward proxy too
  std::optional<std::string> proxy_credentials;  ///< "user:password", asked for with 407
};

// ---- faults ---------------------------------------------------------------------------------------------

/// Where a fault strikes. `connect`: a connection that was just accepted, before TLS. `storage`: file bytes,
/// from whichever origin. `files`: the service's `/files/...`, as long as it redirects.
enum class place { any, connect, graphql, oidc, files, storage, proxy };

/// Which requests a fault strikes: those that match, from the `first` such one to the `last`, counted from 1.
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

struct circumstances;  // what an answer is made from
struct reply;          // and the answer itself; both private to stand_in.cpp

/// What happens then. Several that strike one request add up.
struct action {
  std::function<void(circumstances&)> before;
  std::function<void(reply&)> after;
};

enum class bad_range { missing, shifted, wrong_end, wrong_total, unknown_total, garbage };

/// The faults there are. Numbers of bytes count the body that is sent, offsets are those of the file.
namespace act {
// nothing is answered; the first three also strike at place::connect
action hang();    ///< until released, stopped, or the peer leaves; at place::connect the TLS handshake hangs
action drop();    ///< the connection is closed
action refuse();  ///< the connection is reset
// another answer
action status(int code, header_list fields = {}, std::string body = {});
action too_many_requests(std::string retry_after);                     ///< 429; seconds or an HTTP date
action html(int code);                                                 ///< an error page as gateways send it
action body(std::string text, std::string type = "application/json");  ///< 200
action malformed_json();
action wrong_shape();                                   ///< JSON of a shape that nobody asked for
action graphql_errors(std::vector<std::string> texts);  ///< 200 with errors
action redirect_to(std::string location, int code = 302);
action oversize(std::uint64_t size);  ///< a JSON document of this size
action endless_body();
// the head
action interim(int code = 103, unsigned count = 1);  ///< such responses first
action header(std::string name, std::string value);  ///< set, e.g. Content-Encoding: gzip
action without_header(std::string name);
action many_headers(unsigned count);
action endless_header();
action garbage_status_line(std::string line = "ICY 200 OK");
action close_after();     ///< Connection: close, and it is
action close_silently();  ///< closed after the answer that promised to keep the connection
action chunked();         ///< no Content-Length
action until_close();     ///< neither length nor chunks
action
length_off_by(std::int64_t promised_more);  ///< > 0: the body ends early; < 0: it is longer than promised
action content_range(bad_range how);
// the bytes
action flip_byte(std::uint64_t offset);
action cut(std::uint64_t after);           ///< in good order: close_notify, FIN
action cut_abruptly(std::uint64_t after);  ///< FIN without close_notify
action reset(std::uint64_t after);         ///< RST, once the peer has what was sent
action stall(std::uint64_t after);         ///< goes on once released
action drip(std::chrono::milliseconds interval, std::size_t count = 1);  ///< `count` bytes, then a pause
action ignore_range();                                                   ///< 200 and all of it
action etag(std::string text);  ///< changed: what If-Range and If-Match are held against
action
changed_content(std::uint64_t from = 0);  ///< other bytes from this offset on, and an ETag that says so
}  // namespace act

/// A fault in the notation of the program's `--fault`; throws std::invalid_argument that says what is wrong.
std::pair<target, action> parse_fault(std::string_view spec);
/// That notation, explained, with each fault it knows.
std::string fault_notation();

// ---- what was seen --------------------------------------------------------------------------------------

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
  // as the answer goes out
  int status = 0;  ///< 0: none yet
  std::uint64_t body_sent = 0;
  bool finished = false;  ///< answered, cut or given up

  /// The first header of that name, whatever its case.
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
  std::uint64_t stalled = 0;          ///< connections that hang or stall now
  std::uint64_t faults_struck = 0;    ///< each time one did
  std::uint64_t signatures_made = 0;  ///< signed addresses given out

  const origin_counters& of(origin at) const { return by_origin.at(static_cast<std::size_t>(at)); }
  const kind_counters& of(request_kind kind) const { return by_kind.at(static_cast<std::size_t>(kind)); }
};

// ---- the server -----------------------------------------------------------------------------------------

class server {
 public:
  /// Listens when this returns. Throws std::runtime_error if it cannot.
  explicit server(options how = {});
  ~server();
  server(const server&) = delete;
  server& operator=(const server&) = delete;

  /// Ends every connection, stalled or not, and joins every thread; idempotent. An on_request callback that
  /// blocks has to be let go by its test first.
  void stop();

  std::string base_url() const;     ///< with the prefix: what goes into WANDB_BASE_URL
  std::string storage_url() const;  ///< without a path
  std::string proxy_url() const;    ///< empty without a proxy
  std::uint16_t port(origin at) const;
  std::string key() const;
  std::string ca_pem() const;
  std::string intermediate_pem() const;  ///< see options::through_intermediate
  void write_ca(const std::filesystem::path& file) const;
  std::string files_url(const run_ref& run, std::string_view name) const;  ///< what a node's url says
  std::string signed_url(const run_ref& run, std::string_view name);       ///< a fresh one, as directUrl says

  run_ref add_run(std::string entity, std::string project, std::string id, bool is_public = false);
  void remove_run(const run_ref& run);
  /// Adds or replaces; the run is added if it is not there.
  void add_file(const run_ref& run, const std::string& name, content_ptr what,
                file_attributes attributes = {});
  void add_file(const run_ref& run, const std::string& name, std::string text,
                file_attributes attributes = {});
  void remove_file(const run_ref& run, const std::string& name);
  /// Every regular file below `directory`, under its relative name. Returns how many.
  std::size_t load_folder(const run_ref& run, const std::filesystem::path& directory);

  void set_key(std::string key);  ///< the only one that is good from now on
  void expire_signatures();       ///< storage answers 403 to all given out so far
  void revoke_tokens();           ///< of /oidc/token: 401 from now on
  void set_redirect(redirect to, unsigned hops = 3, int status = 302);
  void set_rate(std::uint64_t each_body, std::uint64_t all_together = 0);  ///< for answers that begin later

  std::size_t add_fault(target where, action what);  ///< returns its number
  std::size_t add_fault(std::string_view spec);      ///< see parse_fault
  std::size_t struck(std::size_t fault) const;       ///< how often it did
  void clear_faults();
  void release();  ///< lets everything that stalls now go on

  /// Called in the connection's thread once a request is logged and before it is answered; may block.
  void on_request(std::function<void(const request_record&)> callback);

  std::vector<request_record> requests() const;
  std::vector<request_record> requests(request_kind kind) const;
  counters counted() const;
  void clear_log();  ///< forgets the requests and counters (but for connections that are open or stalled)

  struct view {
    const std::vector<request_record>& requests;
    const counters& counts;
  };
  /// Waits until the predicate holds, which is asked at each change with the log locked, so it must not call
  /// the server. Returns false when the time is up or the server stopped.
  bool wait_for(const std::function<bool(const view&)>& predicate, std::chrono::milliseconds timeout) const;

 private:
  class implementation;
  std::unique_ptr<implementation> impl_;
};

std::string_view name_of(origin at);
std::string_view name_of(request_kind kind);

}  // namespace stand_in

#endif
