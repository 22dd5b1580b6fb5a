// The promises that a transport's HTTP stack cannot keep: the name of a case of transport_conformance.hpp, and the reason.
// README.md has the same rows.
#ifndef WANDB_RESTORE_TESTS_CONFORMANCE_TABLES_HPP
#define WANDB_RESTORE_TESTS_CONFORMANCE_TABLES_HPP

#include <string>
#include <utility>
#include <vector>

namespace conformance {

using limits = std::vector<std::pair<std::string, std::string>>;

/// Seen with cpp-httplib 0.11.4, 0.18.7, 0.41.0 and 0.53.1.
inline limits limits_of_httplib() {
  return {
      {"an IPv6 address is a host", "0.11 takes no letters in one"},
      {"the target is sent as it is",
       "0.41 decodes and encodes the query; 0.53 drops a `?` with nothing behind it"},
      {"an http request goes to the proxy with the whole address", "0.41, for the same reason"},
      {"the request's headers are sent as they are given",
       "0.18 and 0.41 reverse the order of fields of one name"},
      {"no header is added but Host and Connection and Content-Length",
       "0.11 adds Accept, User-Agent and Content-Type where the request has none"},
      {"interim responses are skipped", "100 is; any other is taken for the response and fails"},
      {"headers come in their order", "0.11 to 0.41 sort or scatter them by name"},
      {"header values are handed on as they stand", "0.11 to 0.41 percent-decode them"},
      {"a Location of more than 8 KiB is taken whole", "a line of a head has at most 8 KiB"},
      {"trailers are skipped", "0.11 fails"},
      {"a response to HEAD or with status 204 or 304 has no body", "0.11 waits for the body of a 304"},
      {"a response that is cut short is a transient connection_failed",
       "0.18 takes a chunked body without its last line for whole"},
      {"a body until the end of a TLS connection is not whole without close_notify",
       "0.11 to 0.41 do not look"},
      {"an endless head, chunk size line or trailer fails before 1 MiB was sent",
       "0.11 bounds no line, and an endless status line crashes it; the others do not bound trailers"},
      {"an endless head, chunk size line or trailer is a protocol_violation",
       "a response that cannot be read is connection_failed, whatever the cause"},
      {"an answer that is not HTTP is a protocol_violation", "likewise"},
      {"a framing that makes no sense is a protocol_violation", "likewise; a length `3x` is taken for 3"},
      {"a size that does not fit 64 bits is a protocol_violation", "likewise, some after idle_timeout"},
  };
}

/// Seen with libcurl 7.88.1.
inline limits limits_of_libcurl() {
  return {
      {"a body until the end of a TLS connection is not whole without close_notify", "libcurl does not look"},
      {"an endless head, chunk size line or trailer fails before 1 MiB was sent",
       "libcurl skips a chunk extension of any length, in constant memory"},
      {"an endless head, chunk size line or trailer is a protocol_violation",
       "libcurl has the same code for a malformed body and a lost connection"},
      {"a framing that makes no sense is a protocol_violation", "a length `3x` is taken for 3"},
      {"a size that does not fit 64 bits is a protocol_violation",
       "a Content-Length of that kind is ignored"},
  };
}

}  // namespace conformance

#endif  // WANDB_RESTORE_TESTS_CONFORMANCE_TABLES_HPP
