// Shared by the tests of whole restores: a stand-in with one run, settings for it, its log of requests, and a search for
// secrets in every error and warning.
// SPDX-License-Identifier: MIT
#ifndef WANDB_RESTORE_TESTS_RESTORE_FIXTURE_HPP
#define WANDB_RESTORE_TESTS_RESTORE_FIXTURE_HPP

#ifndef WANDB_RESTORE_SPLIT
#error "tests that look into wandb::detail are built in another mode: they cannot share this with the others"
#endif

#include <doctest/doctest.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <iterator>  // istreambuf_iterator
#include <mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "stand_in/stand_in.hpp"
#include "support.hpp"
#include "wandb_restore.hpp"

namespace restore_tests {

namespace fs = std::filesystem;
using namespace std::chrono_literals;
using stand_in::place;
using stand_in::request_kind;
using stand_in::target;
using support::read_file;
using support::scoped_environment;
using support::scoped_working_directory;
using support::temporary_directory;
using support::write_file;
namespace act = stand_in::act;

/// RFC 4648. The tests do not use the library's own encoder, which they test.
inline std::string base64(std::string_view bytes) {
  static constexpr char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string out;
  for (std::size_t i = 0; i < bytes.size(); i += 3) {
    std::uint32_t group = 0;
    for (std::size_t k = 0; k < 3; ++k) {
      group = group << 8 | (i + k < bytes.size() ? static_cast<unsigned char>(bytes[i + k]) : 0u);
    }
    for (std::size_t k = 0; k < 4; ++k) {
      const bool padding = k > bytes.size() - i;
      out += padding ? '=' : digits[group >> (18 - 6 * k) & 63];
    }
  }
  return out;
}
inline std::string basic(const std::string& key) { return "Basic " + base64("api:" + key); }

inline bool contains(std::string_view text, std::string_view part) { return text.find(part) != text.npos; }

inline std::string read_all(std::istream& from) { return {std::istreambuf_iterator<char>(from), {}}; }

/// Returns the relative names of the files in a directory, without the library's hidden files.
inline std::vector<std::string> visible(const fs::path& directory) {
  std::vector<std::string> names;
  if (!fs::exists(directory)) return names;
  for (const auto& entry : fs::recursive_directory_iterator(directory)) {
    if (entry.path().filename().string().rfind(".wandb-restore-", 0) == 0 || entry.is_directory()) continue;
    names.push_back(entry.path().lexically_relative(directory).generic_string());
  }
  std::sort(names.begin(), names.end());
  return names;
}
using names = std::vector<std::string>;

/// A stand-in with the run vanpelt/my-project/a1b2c3d, and a directory for restored files.
class fixture {
 public:
  static constexpr const char* path = "vanpelt/my-project/a1b2c3d";

  explicit fixture(stand_in::options how = {})
      : server(std::move(how)), run(server.add_run("vanpelt", "my-project", "a1b2c3d")) {
    server.write_ca(ca());
    fs::create_directories(root());
    secrets = {server.key(), base64("api:" + server.key()), base64(server.key())};
  }

  fs::path root() const { return directory / "root"; }
  fs::path ca() const { return directory / "ca.pem"; }

  /// Returns settings for the stand-in. Its timeouts are longer than any test holds a connection. Warnings are collected.
  wandb::settings settings() {
    wandb::settings s;
    s.base_url = server.base_url();
    s.api_key = server.key();
    s.run_dir = root();
    s.cache_dir = directory / "cache";
    s.ca_file = ca();
    s.connect_timeout = s.idle_timeout = 60s;
    s.retry_timeout = 20s;
    s.on_warning = [this](std::string_view text) {
      const std::lock_guard<std::mutex> lock(mutex_);
      warnings_.emplace_back(text);
    };
    return s;
  }
  wandb::settings public_settings() {
    auto s = settings();
    s.api_key.clear();
    return s;
  }
  wandb::client<> client() { return wandb::client<>(settings()); }

  /// Returns options for a restore of the run.
  static wandb::restore_options options(bool replace = false) {
    wandb::restore_options made;
    made.run_path = path;
    made.replace = replace;
    return made;
  }
  static wandb::restore_options with(wandb::cache_policy policy) {
    auto made = options();
    made.cache = std::move(policy);
    return made;
  }

  /// Returns the number of requests of each kind since the start or the last clear_log().
  std::string asked() const {
    const auto counts = server.counted();
    const auto of = [&](request_kind kind) { return std::to_string(counts.of(kind).requests); };
    return "graphql " + of(request_kind::graphql) + ", files " + of(request_kind::files) + ", storage " +
           of(request_kind::storage);
  }

  std::vector<std::string> warnings() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& text : warnings_) check_harmless(text);
    return warnings_;
  }

  /// Checks that a text has no key, token or signature.
  void check_harmless(std::string_view text) const {
    for (const auto& secret : secrets)
      CHECK_MESSAGE(!contains(text, secret), "a secret in: ", std::string(text));
    for (const char* sign : {"X-Signature", "Authorization", "Basic ", "Bearer ", "token-"}) {
      CHECK_MESSAGE(!contains(text, sign), "a secret in: ", std::string(text));
    }
  }
  /// Checks that `outcome` is a failure with a harmless text, and returns the error.
  template <class T>
  wandb::error failure(wandb::result<T> outcome) const {
    if (outcome) FAIL("succeeded");
    check_harmless(outcome.error().what());
    INFO(std::string(outcome.error().what()));
    CHECK(std::string(outcome.error().what()).size() > 20);
    return std::move(outcome).error();
  }
  /// Checks the code, too.
  template <class T>
  wandb::error failure(wandb::result<T> outcome, wandb::errc code) const {
    auto made = failure(std::move(outcome));
    INFO(std::string(made.what()));
    CHECK(std::string(wandb::to_string(made.code())) == wandb::to_string(code));
    return made;
  }
  /// Checks that `outcome` is a success, and returns the value.
  template <class T>
  T success(wandb::result<T> outcome) const {
    if (!outcome) FAIL(std::string(outcome.error().what()));
    return *std::move(outcome);
  }

  temporary_directory directory;
  stand_in::server server;
  stand_in::run_ref run;
  std::vector<std::string> secrets;

 private:
  mutable std::mutex mutex_;
  std::vector<std::string> warnings_;
};

/// Checks that the text of an error contains every part.
inline void check_names(const wandb::error& failure, const std::vector<std::string>& parts) {
  for (const auto& part : parts)
    CHECK_MESSAGE(contains(failure.what(), part), "no ", part, " in: ", std::string(failure.what()));
}

/// The environment with which the free functions use a fixture.
class environment {
 public:
  explicit environment(fixture& f)
      : set_{{"WANDB_BASE_URL", f.server.base_url()},
             {"WANDB_API_KEY", f.server.key()},
             {"SSL_CERT_FILE", f.ca().string()},
             {"WANDB_ENTITY", "vanpelt"},
             {"WANDB_PROJECT", "my-project"},
             {"WANDB_RUN_ID", "a1b2c3d"},
             {"XDG_CACHE_HOME", (f.directory / "home-cache").string()}},
        there_(f.root()) {}

 private:
  scoped_environment set_;
  scoped_working_directory there_;
};

}  // namespace restore_tests

#endif  // WANDB_RESTORE_TESTS_RESTORE_FIXTURE_HPP
