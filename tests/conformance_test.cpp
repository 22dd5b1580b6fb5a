// The conformance suite over every transport that is here: the library's own and those of the examples.
#ifndef _WIN32
#include <doctest/doctest.h>

#include "wandb_restore.hpp"

#include <string>
#include <utility>
#include <vector>

namespace {

using exceptions = std::vector<std::pair<std::string, std::string>>;

struct http_transport {
  static constexpr const char* name = "http_transport";
  static wandb::http_transport make(const wandb::settings& settings) {
    return wandb::http_transport(settings);
  }
  static exceptions cannot_keep() { return {}; }
};

}  // namespace

#define TRANSPORTS_UNDER_TEST http_transport
#include "transport_conformance.hpp"

#endif  // _WIN32
