// The conformance suite over the default transport, and those of the examples.
#ifndef _WIN32
#include <doctest/doctest.h>

#include <filesystem>
#include <string>
#include <utility>

#include "support.hpp"
#include "wandb_restore.hpp"

#define WANDB_RESTORE_EXAMPLE_WITHOUT_MAIN
#include "../examples/memory_transport.cpp"
#ifdef WANDB_RESTORE_TESTS_LIBCURL
#include "../examples/libcurl_transport.cpp"
#endif

#include "conformance_tables.hpp"

namespace {

struct http {
  static constexpr const char* name = "http_transport";
  static wandb::http_transport make(const wandb::settings& settings) {
    return wandb::http_transport(settings);
  }
  static conformance::limits cannot_keep() { return {}; }
};

struct memory {
  static constexpr const char* name = "memory_transport";
  static constexpr const char* address = "http://wandb.test/files/a.bin";
  static memory_transport make(const std::string& content) { return memory_transport({{"a.bin", content}}); }
  static conformance::limits cannot_keep() { return {}; }
};

#ifdef WANDB_RESTORE_TESTS_LIBCURL
struct libcurl {
  static constexpr const char* name = "curl_transport";
  static curl_transport make(const wandb::settings& settings) { return curl_transport(settings); }
  static conformance::limits cannot_keep() { return conformance::limits_of_libcurl(); }
};
#endif

}  // namespace

#ifdef WANDB_RESTORE_TESTS_LIBCURL
#define TRANSPORTS_UNDER_TEST http, libcurl
#else
#define TRANSPORTS_UNDER_TEST http
#endif
#define LOCAL_TRANSPORTS_UNDER_TEST memory
#include "transport_conformance.hpp"

TEST_SUITE("conformance") {
  TEST_CASE("README.md lists the promises that transports cannot keep") {
    std::string expected = "| transport | broken promise | what happens |\n| --- | --- | --- |\n";
    for (const auto& [name, limits] : {std::pair("`httplib_transport`", conformance::limits_of_httplib()),
                                       std::pair("libcurl", conformance::limits_of_libcurl())}) {
      for (const auto& [promise, reason] : limits)
        expected += std::string("| ") + name + " | " + promise + " | " + reason + " |\n";
    }
    const auto top = std::filesystem::path(__FILE__).parent_path().parent_path();
    const std::string text = support::read_file(top / "README.md");
    const auto begin = text.find(expected);
    REQUIRE(begin != std::string::npos);
    CHECK(text.substr(begin + expected.size(), 1) == "\n");  // no further rows
  }
}

#endif  // _WIN32
