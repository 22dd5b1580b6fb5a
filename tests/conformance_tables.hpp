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
      {"the host may be an IPv6 address", "0.11 accepts no letters in the address"},
      {"the target is sent unchanged", "0.41 decodes and encodes the query; 0.53 drops a trailing `?`"},
      {"an http request goes to the proxy with its absolute URL", "0.41 decodes and encodes the query"},
      {"the request's headers are sent unchanged and in order",
       "0.18 and 0.41 reverse the order of fields with the same name"},
      {"no header is added except Host and Connection and Content-Length",
       "0.11 adds Accept, User-Agent and Content-Type if the request has none"},
      {"interim responses are skipped", "100 is skipped; any other is taken for the response and fails"},
      {"response headers keep their order", "0.11 to 0.41 sort or scatter them by name"},
      {"response header values are passed on unchanged", "0.11 to 0.41 percent-decode them"},
      {"a Location of more than 8 KiB is passed on whole", "a line of a head has at most 8 KiB"},
      {"trailers are skipped", "0.11 fails"},
      {"a response to HEAD or with status 204 or 304 has no body", "0.11 waits for the body of a 304"},
      {"a truncated response is a transient connection_failed",
       "0.18 takes a chunked body without its last line for complete"},
      {"a body that ends with its TLS connection is incomplete without close_notify",
       "0.11 to 0.41 do not check"},
      {"an endless head, chunk size line or trailer fails before 1 MiB is sent",
       "0.11 bounds no line, and an endless status line crashes it; the others do not bound trailers"},
      {"an endless head, chunk size line or trailer is a protocol_violation",
       "every unreadable response is connection_failed"},
      {"an answer that is not HTTP is a protocol_violation",
       "every unreadable response is connection_failed"},
      {"a malformed framing is a protocol_violation",
       "every unreadable response is connection_failed; a length `3x` is taken for 3"},
      {"a size that does not fit 64 bits is a protocol_violation",
       "every unreadable response is connection_failed, some after idle_timeout"},
  };
}

/// Seen with libcurl 7.88.1.
inline limits limits_of_libcurl() {
  return {
      {"a body that ends with its TLS connection is incomplete without close_notify",
       "libcurl does not check"},
      {"an endless head, chunk size line or trailer fails before 1 MiB is sent",
       "libcurl skips a chunk extension of any length, in constant memory"},
      {"an endless head, chunk size line or trailer is a protocol_violation",
       "libcurl has the same code for a malformed body and a lost connection"},
      {"a malformed framing is a protocol_violation", "a length `3x` is taken for 3"},
      {"a size that does not fit 64 bits is a protocol_violation", "libcurl ignores such a Content-Length"},
  };
}

}  // namespace conformance

#endif  // WANDB_RESTORE_TESTS_CONFORMANCE_TABLES_HPP
