// The conformance suite over httplib_transport.
#define WANDB_RESTORE_HTTPLIB
#include "wandb_restore.hpp"

#ifndef _WIN32

#include "conformance_tables.hpp"

namespace {

struct httplib_transport {
  static constexpr const char* name = "httplib_transport";
  static wandb::httplib_transport make(const wandb::settings& settings) {
    return wandb::httplib_transport(settings);
  }
  static conformance::limits cannot_keep() { return conformance::limits_of_httplib(); }
};

}  // namespace

#define TRANSPORT_CONFORMANCE_SUITE "conformance_httplib"
#define TRANSPORTS_UNDER_TEST httplib_transport
#include "transport_conformance.hpp"

#endif  // _WIN32
