// Authentication in whole restores: keys, access tokens, extra headers, proxies and certificates.
#include "restore_fixture.hpp"

#include <ctime>
#include <fcntl.h>
#include <functional>
#include <new>
#include <nlohmann/json.hpp>
#include <optional>
#include <thread>
#include <sys/wait.h>
#include <unistd.h>
#include <utility>

#include <openssl/pem.h>
#include <openssl/x509.h>

using namespace restore_tests;
using nlohmann::json;
using stand_in::origin;
using wandb::errc;

namespace {

const std::string text = "the bytes of the file";

/// Returns the Authorization of all requests of a kind. Checks that they agree.
std::optional<std::string> authorization(const fixture& f, request_kind kind) {
  std::optional<std::string> seen;
  bool first = true;
  for (const auto& one : f.server.requests(kind)) {
    const auto now = one.header("Authorization");
    CHECK((first || now == seen));
    seen = now;
    first = false;
  }
  CHECK_FALSE(first);
  return seen;
}

std::string utc(std::chrono::system_clock::time_point time) {
  const std::time_t seconds = std::chrono::system_clock::to_time_t(time);
  std::tm parts{};
#ifdef _WIN32
  gmtime_s(&parts, &seconds);
#else
  gmtime_r(&seconds, &parts);
#endif
  char text_of[32];
  return {text_of, std::strftime(text_of, sizeof text_of, "%Y-%m-%d %H:%M:%S", &parts)};
}

}  // namespace

TEST_SUITE("credentials: keys") {
  TEST_CASE("a key in the settings is sent as Basic credentials, to the service alone") {
    fixture f;
    f.server.add_file(f.run, "a.txt", text);
    (void)f.success(f.client().try_restore("a.txt", f.path));
    CHECK(authorization(f, request_kind::graphql) == basic(f.server.key()));
    CHECK(authorization(f, request_kind::files) == basic(f.server.key()));
    CHECK(authorization(f, request_kind::storage) == std::nullopt);
  }

  TEST_CASE("the key of the environment is used") {
    fixture f;
    f.server.add_file(f.run, "a.txt", text);
    const scoped_environment there{{"WANDB_API_KEY", f.server.key()},
                                   {"WANDB_BASE_URL", f.server.base_url()},
                                   {"SSL_CERT_FILE", f.ca().string()}};
    (void)f.success(wandb::try_restore("a.txt", f.path, false, f.root()));
    CHECK(authorization(f, request_kind::graphql) == basic(f.server.key()));
  }

  TEST_CASE("the key of netrc is that of the host and port, else of the default entry") {
    for (const bool by_default : {false, true}) {
      fixture f;
      f.server.add_file(f.run, "a.txt", text);
      const std::string host = f.server.base_url().substr(8);
      auto s = f.public_settings();
      s.netrc_file =
          write_file(f.directory / "netrc", "machine elsewhere.invalid login user password wrong\n" +
                                                (by_default ? "default" : "machine " + host) +
                                                " login user password " + f.server.key() + "\n");
      (void)f.success(wandb::client<>(s).try_restore("a.txt", f.path));
      CHECK(authorization(f, request_kind::graphql) == basic(f.server.key()));
      CHECK(authorization(f, request_kind::files) == basic(f.server.key()));
    }
  }

  TEST_CASE("with a key in the settings, netrc is not read") {
    fixture f;
    f.server.add_file(f.run, "a.txt", text);
    auto s = f.settings();
    s.netrc_file = write_file(f.directory / "netrc", "this is no netrc file");
    (void)f.success(wandb::client<>(s).try_restore("a.txt", f.path));
    CHECK(authorization(f, request_kind::graphql) == basic(f.server.key()));
    CHECK(f.warnings().empty());
  }

  TEST_CASE("an unusable netrc file causes one warning for each client, and no key is used") {
    fixture f;
    f.server.add_file(f.server.add_run("somebody", "open", "r1", true), "a.txt", text);
    auto s = f.public_settings();
    s.netrc_file = write_file(f.directory / "netrc", "this is no netrc file");
    wandb::client<> client(s);
    for (int i = 0; i < 2; ++i) (void)f.success(client.try_restore("a.txt", "somebody/open/r1", true));
    CHECK(authorization(f, request_kind::graphql) == std::nullopt);
    REQUIRE(f.warnings().size() == 1);
    CHECK(contains(f.warnings()[0], "netrc"));
  }

  TEST_CASE("public runs need no key") {
    fixture f;
    f.server.add_file(f.server.add_run("somebody", "open", "r1", true), "a.txt", text);
    wandb::client<> client(f.public_settings());
    (void)f.success(client.try_restore("a.txt", "somebody/open/r1"));
    CHECK(f.success(client.try_list_files([] {
             wandb::restore_options options;
             options.run_path = "somebody/open/r1";
             return options;
           }()))
              .size() == 1);
    CHECK(authorization(f, request_kind::graphql) == std::nullopt);
    CHECK(authorization(f, request_kind::files) == std::nullopt);
    CHECK(f.warnings().empty());
  }

  TEST_CASE("without a key a private run is run_not_found, and the text says where a key was looked for") {
    fixture f;
    f.server.add_file(f.run, "a.txt", text);
    auto s = f.public_settings();
    s.netrc_file = f.directory / "no-netrc";
    const auto failure = f.failure(wandb::client<>(s).try_restore("a.txt", f.path), errc::run_not_found);
    check_names(failure, {"a.txt", f.path, "127.0.0.1", "WANDB_API_KEY", "wandb login", "no-netrc"});
    CHECK(failure.is_not_found());
  }

  TEST_CASE("keys of every accepted form are sent unchanged") {
    for (const std::string& key :
         {std::string(40, 'k'), std::string(86, 'k'), "local-" + std::string(40, 'k'),
          "wandb_v1_" + std::string(60, 'x') + "_y", std::string("eyJhbGciOi.eyJzdWIi-_.c2ln")}) {
      CAPTURE(key);
      stand_in::options how;
      how.key = key;
      fixture f(how);
      f.server.add_file(f.run, "a.txt", text);
      (void)f.success(f.client().try_restore("a.txt", f.path));
      CHECK(authorization(f, request_kind::graphql) == basic(key));
    }
  }

  TEST_CASE("white space around a key is removed, in code and in netrc, also when error texts are redacted") {
    fixture f;
    f.server.add_file(f.run, "a.txt", text);
    auto s = f.public_settings();
    for (const bool in_netrc : {false, true}) {
      s.api_key = in_netrc ? "" : " \t" + f.server.key() + "\r\n";
      s.netrc_file =
          write_file(f.directory / "netrc", "default login u password \" " + f.server.key() + "\n\"");
      (void)f.success(wandb::client<>(s).try_restore("a.txt", f.path, true));
      CHECK(authorization(f, request_kind::graphql) == basic(f.server.key()));
    }
    s.api_key = " \n";  // empty after trimming: netrc is used
    (void)f.success(wandb::client<>(s).try_restore("a.txt", f.path, true));
    CHECK(authorization(f, request_kind::graphql) == basic(f.server.key()));
    f.server.add_fault(place::graphql,
                       act::status(403, {}, json{{"error", "no entry for " + f.server.key()}}.dump()));
    s.api_key = f.server.key() + "\n";
    (void)f.failure(wandb::client<>(s).try_restore("a.txt", f.path, true), errc::permission_denied);
  }

  TEST_CASE("a malformed key is reported without the key, before any request") {
    fixture f;
    for (const std::string& key :
         {std::string("short"), std::string(39, 's'), std::string(39, 's') + '*',
          "s\r\nX-Evil: " + std::string(40, 's'), std::string(20, 's') + ' ' + std::string(20, 's')}) {
      for (const bool in_netrc : {false, true}) {
        if (in_netrc && key.find_first_of(" \r\n") != key.npos)
          continue;  // cannot be written in a netrc file
        CAPTURE(key);
        f.secrets.push_back(key);
        auto s = f.public_settings();
        if (in_netrc) {
          s.netrc_file = write_file(f.directory / "netrc", "default login user password " + key);
        } else {
          s.api_key = key;
        }
        const auto failure =
            f.failure(wandb::client<>(s).try_restore("a.txt", f.path), errc::invalid_argument);
        check_names(failure, {"API key", "a.txt", f.path});
      }
    }
    CHECK(f.asked() == "graphql 0, files 0, storage 0");
  }

  TEST_CASE("401: the text names the source of the key and a remedy; there is no second request") {
    fixture f;
    f.server.add_file(f.run, "a.txt", text);
    auto client = f.client();
    f.server.set_key(std::string(40, 'n'));
    const auto failure = f.failure(client.try_restore("a.txt", f.path), errc::not_authenticated);
    check_names(failure,
                {"a.txt", f.path, "127.0.0.1", "401", "key", "refused", "WANDB_API_KEY", "wandb login"});
    CHECK(failure.http_status() == 401);
    CHECK_FALSE(failure.is_transient());
    CHECK(f.asked() == "graphql 1, files 0, storage 0");
  }

  TEST_CASE("401 without a key: the text says that no key was found, and where it was looked for") {
    fixture f;
    f.server.add_fault(place::graphql, act::status(401));
    auto s = f.public_settings();
    s.netrc_file = f.directory / "no-netrc";
    const auto failure = f.failure(wandb::client<>(s).try_restore("a.txt", f.path), errc::not_authenticated);
    check_names(failure, {"no API key for 127.0.0.1", "WANDB_API_KEY", "wandb login", "no-netrc"});
  }

  TEST_CASE("401 and 403 from the service's address of the file: not_authenticated and permission_denied") {
    fixture f;
    f.server.add_file(f.run, "a.txt", text);
    auto client = f.client();
    f.server.add_fault(place::files, act::status(401));
    check_names(f.failure(client.try_restore("a.txt", f.path), errc::not_authenticated),
                {"a.txt", f.path, "WANDB_API_KEY"});
    f.server.clear_faults();
    f.server.add_fault(place::files, act::status(403, {}, R"({"error":"not for you"})"));
    check_names(f.failure(client.try_restore("a.txt", f.path), errc::permission_denied),
                {"a.txt", f.path, "not for you"});
  }

  TEST_CASE("secrets that a server repeats are removed from error texts") {
    const std::string key(44, 'q');
    for (const bool from_netrc : {false, true}) {
      for (const int status : {200, 400, 401, 403, 404, 500}) {
        CAPTURE(from_netrc);
        CAPTURE(status);
        fixture f;
        f.secrets = {key, base64("api:" + key)};
        auto s = f.public_settings();
        s.retry_timeout = 1ms;
        const std::string gateway = "gateway-secret-1234";
        f.secrets.push_back(gateway);
        s.extra_headers = {{"X-Gateway", "Token " + gateway}};
        if (from_netrc) {
          s.netrc_file = write_file(f.directory / "netrc", "default login user password " + key);
        } else {
          s.api_key = key;
        }
        f.server.add_fault(place::graphql,
                           act::status(status, {{"Content-Type", "application/json"}},
                                       json{{"error", "bad key " + key + " as " + base64("api:" + key) +
                                                          " behind " + gateway + " it is"}}
                                           .dump()));
        const auto failure = f.failure(wandb::client<>(s).try_restore("a.txt", f.path));
        check_names(failure, {"bad key", "it is"});
      }
    }
  }
}

TEST_SUITE("credentials: the service's two names") {
  /// Options for a stand-in that a proxy reaches under the service's names.
  stand_in::options named(const std::string& own_name) {
    stand_in::options how;
    how.proxy = true;
    how.more_hosts = {"api.forge.coreweave.com", "forge.coreweave.com", "api.wandb.ai"};
    how.service_url = own_name;
    return how;
  }

  TEST_CASE("a netrc key under either name serves every form of the base URL, and the default") {
    for (const char* own_name : {"https://api.forge.coreweave.com", "https://api.wandb.ai"}) {
      fixture f(named(own_name));
      f.server.add_file(f.run, "a.txt", text);
      for (const char* machine : {"api.forge.coreweave.com", "api.wandb.ai", "forge.coreweave.com"}) {
        write_file(f.directory / "netrc",
                   std::string("machine ") + machine + "\n  login user\n  password " + f.server.key() + "\n");
        for (const char* base :
             {"", "https://api.forge.coreweave.com", "https://api.forge.coreweave.com/",
              "https://forge.coreweave.com/api/wandb", "https://forge.coreweave.com/api/wandb/",
              "https://api.wandb.ai", "https://api.wandb.ai/"}) {
          for (const bool in_file : {false, true}) {
            CAPTURE(own_name);
            CAPTURE(machine);
            CAPTURE(base);
            CAPTURE(in_file);
            if (in_file) {
              write_file(f.directory / "config" / "settings",
                         *base == '\0' ? "" : std::string("[default]\nbase_url = ") + base + "\n");
            }
            const scoped_environment there{{"WANDB_CONFIG_DIR", (f.directory / "config").string()},
                                           {"WANDB_BASE_URL", in_file ? "" : base},
                                           {"NETRC", (f.directory / "netrc").string()},
                                           {"WANDB_HTTPS_PROXY", f.server.proxy_url()},
                                           {"SSL_CERT_FILE", f.ca().string()}};
            f.server.clear_log();
            auto file = f.success(wandb::try_restore("a.txt", f.path, true, f.root()));
            CHECK(read_all(file) == text);
            CHECK(f.asked() == "graphql 1, files 1, storage 1");
            CHECK(authorization(f, request_kind::graphql) == basic(f.server.key()));
            CHECK(authorization(f, request_kind::files) == basic(f.server.key()));
            CHECK(authorization(f, request_kind::storage) == std::nullopt);
            const bool old_name = contains(base, "api.wandb.ai");
            CHECK(f.server.requests(request_kind::proxy).at(0).target ==
                  (old_name ? "api.wandb.ai:443" : "api.forge.coreweave.com:443"));
            fs::remove_all(f.directory / "config");
          }
        }
      }
    }
  }

  TEST_CASE("a receipt of one name is valid under the other") {
    fixture f(named("https://api.wandb.ai"));
    f.server.add_file(f.run, "a.txt", text);
    auto s = f.settings();
    s.https_proxy.url = f.server.proxy_url();
    s.base_url = "https://api.wandb.ai";
    (void)f.success(wandb::client<>(s).try_restore("a.txt", f.path));
    s.base_url = "https://forge.coreweave.com/api/wandb";
    const auto kept = f.success(wandb::client<>(s).try_restore("a.txt", f.path));
    CHECK(kept.source() == wandb::source::local);
    CHECK(kept.verified());
  }

  TEST_CASE("hints name the host of the base URL, and the page that shows the key") {
    fixture f(named("https://api.forge.coreweave.com"));
    for (const char* base : {"https://api.forge.coreweave.com", "https://forge.coreweave.com/api/wandb",
                             "https://api.wandb.ai"}) {
      CAPTURE(base);
      auto s = f.public_settings();
      s.https_proxy.url = f.server.proxy_url();
      s.base_url = base;
      check_names(f.failure(wandb::client<>(s).try_restore("a.txt", f.path), errc::run_not_found),
                  {"no API key for api.", "https://forge.coreweave.com/wandb/authorize"});
      s.api_key = std::string(40, 'n');
      check_names(f.failure(wandb::client<>(s).try_restore("a.txt", f.path), errc::not_authenticated),
                  {"401", "https://forge.coreweave.com/wandb/authorize"});
    }
    auto s = f.public_settings();
    s.base_url = "https://127.0.0.1:" + std::to_string(f.server.port(origin::service));
    check_names(f.failure(wandb::client<>(s).try_restore("a.txt", f.path), errc::run_not_found),
                {"no API key for 127.0.0.1", s.base_url + "/authorize"});
  }

  TEST_CASE(
      "an unusable base URL on a Forge host is refused without a request; the text names the right one") {
    fixture f(named("https://api.forge.coreweave.com"));
    auto s = f.settings();
    s.https_proxy.url = f.server.proxy_url();
    s.base_url = "https://forge.coreweave.com/wandb";
    check_names(f.failure(wandb::client<>(s).try_restore("a.txt", f.path), errc::invalid_argument),
                {"https://forge.coreweave.com/wandb", "https://api.forge.coreweave.com"});
    CHECK(f.server.requests().empty());
  }
}

TEST_SUITE("credentials: identity tokens") {
  const char* const jwt = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJ3b3JrZXIifQ.c2lnbmF0dXJl_-";

  /// A stand-in that accepts an identity token, and settings with its file.
  class federated : public fixture {
   public:
    explicit federated(std::int64_t token_seconds = 3600, stand_in::options how = {})
        : fixture(with_tokens(std::move(how), token_seconds)) {
      server.add_file(run, "a.txt", text);
      write_file(directory / "identity", std::string(" \n") + jwt + "\n");
      secrets.emplace_back(jwt);
    }
    wandb::settings settings() {
      auto s = fixture::settings();
      s.api_key.clear();
      s.identity_token_file = (directory / "identity").string();
      s.credentials_file = credentials();
      return s;
    }
    fs::path credentials() const { return directory / "config" / "credentials.json"; }
    std::uint64_t exchanges() const { return server.counted().of(request_kind::oidc).requests; }
    json shared() const { return json::parse(read_file(credentials())).at("credentials"); }

   private:
    static stand_in::options with_tokens(stand_in::options how, std::int64_t token_seconds) {
      how.identity_tokens = {jwt};
      how.token_seconds = token_seconds;
      return how;
    }
  };

  TEST_CASE("the token exchange sends a form without credentials; then Bearer goes to the service alone") {
    federated f;
    (void)f.success(wandb::client<>(f.settings()).try_restore("a.txt", f.path));
    const auto exchanged = f.server.requests(request_kind::oidc);
    REQUIRE(exchanged.size() == 1);
    CHECK(exchanged[0].method == "POST");
    CHECK(exchanged[0].path == "/oidc/token");
    CHECK(exchanged[0].header("Content-Type") == "application/x-www-form-urlencoded");
    CHECK_FALSE(exchanged[0].header("Authorization").has_value());
    CHECK(exchanged[0].body ==
          std::string("grant_type=urn%3Aietf%3Aparams%3Aoauth%3Agrant-type%3Ajwt-bearer&assertion=") + jwt);
    const auto bearer = authorization(f, request_kind::graphql);
    REQUIRE(bearer.has_value());
    CHECK(bearer->rfind("Bearer token-", 0) == 0);
    CHECK(authorization(f, request_kind::files) == bearer);
    CHECK(authorization(f, request_kind::storage) == std::nullopt);
  }

  TEST_CASE("one exchange serves a client, and through the shared file a second client") {
    federated f;
    wandb::client<> first(f.settings());
    (void)f.success(first.try_restore("a.txt", f.path, true));
    (void)f.success(first.try_restore("a.txt", f.path, true));
    CHECK(f.exchanges() == 1);
    (void)f.success(wandb::client<>(f.settings()).try_restore("a.txt", f.path, true));
    CHECK(f.exchanges() == 1);
    (void)authorization(f, request_kind::graphql);  // checks that all requests agree
  }

  TEST_CASE("threads share one exchange") {
    federated f;
    wandb::client<> client(f.settings());
    std::vector<std::thread> threads;
    for (int i = 0; i < 6; ++i) {
      threads.emplace_back(
          [&, i] { (void)client.try_restore("a.txt", f.path, true, f.root() / std::to_string(i)); });
    }
    for (auto& one : threads) one.join();
    CHECK(visible(f.root()).size() == 6);
    CHECK(f.exchanges() == 1);
  }

  TEST_CASE("the shared file is readable by its owner alone, and keeps other entries and members") {
    federated f;
    write_file(f.credentials(),
               R"({"credentials": {"https://api.wandb.ai": {"expires_at": "2099-01-01 00:00:00",
        "access_token": "of another"}}, "more": [1]})");
    (void)f.success(wandb::client<>(f.settings()).try_restore("a.txt", f.path));
    const json whole = json::parse(read_file(f.credentials()));
    CHECK(whole.at("more") == json::array({1}));
    CHECK(f.shared().at("https://api.wandb.ai").at("access_token") == "of another");
    const json mine = f.shared().at(f.server.base_url());
    CHECK("Bearer " + mine.at("access_token").get<std::string>() == authorization(f, request_kind::graphql));
    const std::string until = mine.at("expires_at");
    CHECK(until > utc(std::chrono::system_clock::now() + 55min));
    CHECK(until < utc(std::chrono::system_clock::now() + 65min));
#ifndef _WIN32
    CHECK(fs::status(f.credentials()).permissions() == (fs::perms::owner_read | fs::perms::owner_write));
#endif
    CHECK(visible(f.credentials().parent_path()) == names{"credentials.json"});
  }

  TEST_CASE("a shared token is used until five minutes before it expires, and only for its own server") {
    struct row {
      const char* what;
      std::chrono::seconds left;
      bool own_server;
      std::uint64_t exchanges;
    };
    const std::vector<row> table = {
        {"an hour left", 3600s, true, 0},      {"six minutes left", 360s, true, 0},
        {"four minutes left", 240s, true, 1},  {"run out", -60s, true, 1},
        {"another server's", 3600s, false, 1},
    };
    for (const row& r : table) {
      CAPTURE(std::string(r.what));
      federated f;
      (void)f.success(wandb::client<>(f.settings()).try_restore("a.txt", f.path));
      json whole = json::parse(read_file(f.credentials()));
      json entry = whole["credentials"].at(f.server.base_url());
      entry["expires_at"] = utc(std::chrono::system_clock::now() + r.left);
      whole["credentials"] = {{r.own_server ? f.server.base_url() : "https://elsewhere.invalid", entry}};
      write_file(f.credentials(), whole.dump());
      f.server.clear_log();
      (void)f.success(wandb::client<>(f.settings()).try_restore("a.txt", f.path, true));
      CHECK(f.exchanges() == r.exchanges);
    }
  }

  TEST_CASE(
      "a shared token is valid for both names of the service, and is stored under the base URL's name") {
    const std::string forge = "https://api.forge.coreweave.com", wandb_ai = "https://api.wandb.ai";
    struct row {
      std::string base, stored;
      std::uint64_t exchanges;
    };
    for (const row& r :
         {row{forge, wandb_ai, 0}, row{wandb_ai, forge, 0}, row{forge, forge, 0},
          row{"https://forge.coreweave.com/api/wandb/", forge, 0},
          row{"https://forge.coreweave.com/api/wandb", wandb_ai, 0}, row{forge, "https://api.qa.wandb.ai", 1},
          row{"https://forge.coreweave.com/api/wandb", "https://elsewhere.invalid", 1},
          row{wandb_ai + "/", "https://elsewhere.invalid", 1}}) {
      CAPTURE(r.base);
      CAPTURE(r.stored);
      stand_in::options how;
      how.proxy = true;
      how.more_hosts = {"api.forge.coreweave.com", "api.wandb.ai"};
      how.service_url = forge;
      federated f(3600, how);
      auto s = f.settings();
      s.https_proxy.url = f.server.proxy_url();
      s.base_url = forge;
      (void)f.success(wandb::client<>(s).try_restore("a.txt", f.path));
      const json entry = f.shared().at(forge);
      write_file(f.credentials(), json{{"credentials", {{r.stored, entry}}}}.dump());
      f.server.clear_log();
      s.base_url = r.base;
      (void)f.success(wandb::client<>(s).try_restore("a.txt", f.path, true));
      CHECK(f.exchanges() == r.exchanges);
      if (r.exchanges == 0) continue;
      CHECK(f.shared().contains(contains(r.base, "wandb.ai") ? wandb_ai : forge));
      CHECK(f.shared().size() == 2);
    }
  }

  TEST_CASE("a client renews a token that expires soon, and reads the identity file again") {
    federated f(0);  // seconds
    wandb::client<> client(f.settings());
    (void)f.success(client.try_restore("a.txt", f.path, true));
    const auto before = f.exchanges();
    CHECK(before >= 1);
    (void)f.success(client.try_restore("a.txt", f.path, true));
    CHECK(f.exchanges() > before);
    write_file(f.directory / "identity", "eyJub3QiOiJ0aGlzIn0.e30.e30");
    (void)f.failure(client.try_restore("a.txt", f.path, true), errc::not_authenticated);
  }

  TEST_CASE("a token with a short lifetime is used for half of it, not exchanged for each request") {
    federated f(200);  // seconds
    f.server.add_file(f.run, "large", stand_in::generated(16 << 20, 1));
    (void)f.success(wandb::client<>(f.settings()).try_restore("large", f.path));
    CHECK(f.server.counted().of(request_kind::storage).requests > 1);
    CHECK(f.exchanges() == 1);
  }

  TEST_CASE("a call that waits for the exchange of another call can be cancelled") {
    federated f;
    f.server.add_fault(place::oidc, act::hang());
    wandb::client<> client(f.settings());
    std::atomic<bool> stop_first{false}, stop_second{true}, first_is_back{false};
    const auto ask = [&](const std::atomic<bool>& stop) {
      wandb::restore_options options;
      options.run_path = f.path;
      options.root = f.root();
      options.cancel = &stop;
      return client.try_restore("a.txt", options);
    };
    std::thread first([&] {
      (void)ask(stop_first);
      first_is_back = true;
    });
    CHECK(f.server.wait_for([](const auto& seen) { return seen.counts.stalled > 0; }, 20s));
    (void)f.failure(ask(stop_second), errc::cancelled);
    CHECK_FALSE(first_is_back);
    stop_first = true;
    first.join();
  }

  /// Throws once, instead of the first request.
  class throwing_transport : public wandb::http_transport {
   public:
    using http_transport::http_transport;
    wandb::result<wandb::http_response> send(const wandb::http_request& request, wandb::body_sink& sink) {
      if (std::exchange(throws_, false)) throw std::bad_alloc();
      return http_transport::send(request, sink);
    }

   private:
    bool throws_ = true;
  };

  TEST_CASE("after an exception during the exchange the next call exchanges the token, and does not wait") {
    federated f;
    auto s = f.settings();
    s.total_timeout = 20s;  // ends a call that waits for the exchange of the first
    wandb::client<throwing_transport> client(s);
    CHECK_THROWS_AS((void)client.try_restore("a.txt", f.path), std::bad_alloc);
    (void)f.success(client.try_restore("a.txt", f.path));
    CHECK(f.exchanges() == 1);
  }

  TEST_CASE("an unwritable shared file causes a warning; a malformed one is replaced") {
    federated f;
    write_file(f.directory / "config", "a file where a directory should be");
    (void)f.success(wandb::client<>(f.settings()).try_restore("a.txt", f.path));
    REQUIRE(f.warnings().size() == 1);

    federated g;
    write_file(g.credentials(), "[1, 2");
    (void)g.success(wandb::client<>(g.settings()).try_restore("a.txt", g.path));
    CHECK(g.shared().contains(g.server.base_url()));
    CHECK(g.warnings().empty());
  }

  TEST_CASE("without a shared file the exchange works, too") {
    federated f;
    auto s = f.settings();
    s.credentials_file.clear();
    (void)f.success(wandb::client<>(s).try_restore("a.txt", f.path));
    CHECK(f.warnings().empty());
  }

  TEST_CASE("a refused exchange is not retried, and the text quotes the server") {
    for (const int status : {400, 401, 403, 404, 422}) {
      CAPTURE(status);
      federated f;
      f.server.add_fault(place::oidc,
                         act::status(status, {{"Content-Type", "application/json"}},
                                     json{{"error", "the audience is wrong: " + std::string(jwt)}}.dump()));
      const auto failure = f.failure(wandb::client<>(f.settings()).try_restore("a.txt", f.path));
      check_names(failure, {"a.txt", f.path, "identity token", "127.0.0.1", std::to_string(status),
                            "the audience is wrong"});
      CHECK(failure.http_status() == status);
      CHECK_FALSE(failure.is_transient());
      if (status == 401) CHECK(failure.code() == errc::not_authenticated);
      CHECK(f.exchanges() == 1);
      CHECK_FALSE(fs::exists(f.credentials()));
    }
  }

  TEST_CASE("an exchange that fails transiently is retried") {
    for (const auto& fault :
         {act::status(500), act::status(503), act::too_many_requests("0"), act::drop(), act::cut(5)}) {
      federated f;
      f.server.add_fault(target(place::oidc).nth(1), fault);
      (void)f.success(wandb::client<>(f.settings()).try_restore("a.txt", f.path));
      CHECK(f.exchanges() == 2);
    }
  }

  TEST_CASE("a malformed answer to an exchange is a protocol_violation") {
    const std::string page = "<html>" + std::string(100'000, 'x');
    for (const std::string& body : std::initializer_list<std::string>{
             page, "", "{}", "[]", "null", R"({"access_token": 7, "expires_in": 3600})",
             R"({"access_token": "token-x"})", R"({"access_token": "", "expires_in": 3600})",
             R"({"access_token": "token-x", "expires_in": "soon"})",
             R"({"access_token": "token-\r\nX-Evil: 1", "expires_in": 3600})", "<html>"}) {
      CAPTURE(body.substr(0, 80));
      federated f;
      f.server.add_fault(place::oidc, act::body(body));
      const auto failure =
          f.failure(wandb::client<>(f.settings()).try_restore("a.txt", f.path), errc::protocol_violation);
      check_names(failure, {"a.txt", f.path, "127.0.0.1", "identity token"});
      CHECK(f.exchanges() == 1);
      CHECK(f.asked() == "graphql 0, files 0, storage 0");
    }
  }

  TEST_CASE("an exchange without an answer ends after the timeout") {
    federated f;
    f.server.add_fault(place::oidc, act::hang());
    auto s = f.settings();
    s.connect_timeout = s.idle_timeout = 200ms;
    s.retry_timeout = 500ms;
    const auto begin = std::chrono::steady_clock::now();
    const auto failure = f.failure(wandb::client<>(s).try_restore("a.txt", f.path), errc::connection_failed);
    CHECK(std::chrono::steady_clock::now() - begin < 10s);
    check_names(failure, {"a.txt", f.path, "127.0.0.1", "/oidc/token"});
  }

  TEST_CASE("a child uses the client of its parent, a thread of which exchanged the token during the fork") {
    struct gated_transport {
      pid_t parent;
      int inside, open;  // pipes
      wandb::result<wandb::http_response> send(const wandb::http_request&, wandb::body_sink&) const {
        char byte = 0;
        if (::getpid() == parent && (::write(inside, &byte, 1) != 1 || ::read(open, &byte, 1) != 0))
          return wandb::error(errc::cancelled, "the pipes are broken");
        return wandb::error::permanent(errc::permission_denied, "answered");
      }
    };
    const temporary_directory directory;
    wandb::settings s;
    s.base_url = "http://127.0.0.1:1";
    s.identity_token_file = write_file(directory / "identity", jwt).string();
    s.on_warning = [](std::string_view) {};
    int inside[2], open[2];
    REQUIRE(::pipe(inside) == 0);
    REQUIRE(::pipe(open) == 0);
    wandb::client<gated_transport> client(s, gated_transport{::getpid(), inside[1], open[0]});
    wandb::restore_options options;
    options.run_path = "e/p/r";
    const auto is_answered = [&] {
      const auto listed = client.try_list_files(options);
      return !listed && listed.error().code() == errc::permission_denied;
    };
    bool is_right = false;
    std::thread exchanging([&] { is_right = is_answered(); });
    char byte = 0;
    REQUIRE(::read(inside[0], &byte, 1) == 1);
    const pid_t child = ::fork();
    REQUIRE(child >= 0);
    if (child == 0) {
      ::alarm(300);
      ::_exit(is_answered() ? 7 : 8);
    }
    int status = 0;
    REQUIRE(::waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status));
    CHECK(WEXITSTATUS(status) == 7);
    ::close(open[1]);
    exchanging.join();
    CHECK(is_right);
    for (const int end : {inside[0], inside[1], open[0]}) ::close(end);
  }

  TEST_CASE("a missing or empty identity file is reported with its name, without a request") {
    federated f;
    auto s = f.settings();
    for (const bool empty : {false, true}) {
      s.identity_token_file = (f.directory / "nothing").string();
      if (empty) write_file(f.directory / "nothing", "\n");
      check_names(f.failure(wandb::client<>(s).try_restore("a.txt", f.path), errc::invalid_argument),
                  {"WANDB_IDENTITY_TOKEN_FILE", "nothing"});
    }
    CHECK(f.exchanges() == 0);
  }

  TEST_CASE("a token in place of a file name is not repeated in the text") {
    federated f;
    auto s = f.settings();
    s.identity_token_file = "eyJhbGciOiJub25lIn0.eyJzdWIiOiJzb21lYm9keSJ9.c2lnbmF0dXJl";
    const auto failure = f.failure(wandb::client<>(s).try_restore("a.txt", f.path), errc::invalid_argument);
    check_names(failure, {"WANDB_IDENTITY_TOKEN_FILE", "not the token"});
    CHECK_FALSE(contains(failure.what(), "eyJ"));
    CHECK(f.exchanges() == 0);
  }

  TEST_CASE("a key and a token file in the environment are reported with a remedy") {
    federated f;
    const scoped_environment both{{"WANDB_API_KEY", f.server.key()},
                                  {"WANDB_IDENTITY_TOKEN_FILE", (f.directory / "identity").string()},
                                  {"WANDB_BASE_URL", f.server.base_url()},
                                  {"SSL_CERT_FILE", f.ca().string()}};
    const auto failure =
        f.failure(wandb::try_restore("a.txt", f.path, false, f.root()), errc::invalid_argument);
    check_names(failure, {"WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"});
    CHECK(f.exchanges() == 0);
  }

  TEST_CASE("a refused access token: the text names a remedy") {
    federated f;
    wandb::client<> client(f.settings());
    (void)f.success(client.try_restore("a.txt", f.path));
    f.server.revoke_tokens();
    const auto failure = f.failure(client.try_restore("a.txt", f.path, true), errc::not_authenticated);
    check_names(failure, {"access token", "127.0.0.1", "WANDB_IDENTITY_TOKEN_FILE"});
  }
}

TEST_SUITE("credentials: recipients") {
  TEST_CASE("a redirect to another origin gets neither the key nor extra headers") {
    using stand_in::redirect;
    for (const auto to : {redirect::absolute, redirect::other_host, redirect::chain}) {
      CAPTURE(static_cast<int>(to));
      fixture f;
      f.server.add_file(f.run, "a.txt", text);
      f.server.set_redirect(to);
      auto s = f.settings();
      s.extra_headers = {{"X-Team", "blue"}, {"Cookie", "session=1"}};
      (void)f.success(wandb::client<>(s).try_restore("a.txt", f.path));
      for (const auto& one : f.server.requests()) {
        const bool home = one.at == origin::service;
        CHECK(one.header("Authorization").has_value() == home);
        CHECK(one.header("X-Team").has_value() == home);
        CHECK(one.header("Cookie").has_value() == home);
      }
    }
  }

  TEST_CASE("the key is sent only below the base URL's path, compared by whole segments") {
    stand_in::options how;
    how.prefix = "/wandb";
    struct row {
      const char* path;
      bool home;
    };
    for (const row& r :
         {row{"/wandb/elsewhere", true}, row{"/wandb", true}, row{"/wandb?x=1", true},
          row{"/wandb-evil/files", false}, row{"/wandbx", false}, row{"/", false},
          row{"/other/wandb/", false}, row{"/wandb/../evil", false}, row{"/wandb/%2e%2e/evil", false}}) {
      CAPTURE(std::string(r.path));
      fixture f(how);
      f.server.add_file(f.run, "a.txt", text);
      f.server.add_fault(place::files, act::redirect_to(r.path));
      auto s = f.settings();
      s.extra_headers = {{"X-Team", "blue"}};
      (void)f.failure(wandb::client<>(s).try_restore("a.txt", f.path));
      const auto seen = f.server.requests(request_kind::other);
      REQUIRE(seen.size() >= 1);
      for (const auto& one : seen) {
        CHECK(one.header("Authorization").has_value() == r.home);
        CHECK(one.header("X-Team").has_value() == r.home);
      }
    }
  }

  TEST_CASE("origins are compared without case, and with default ports") {
    stand_in::options how;
    how.host = "localhost";
    fixture f(how);
    f.server.add_file(f.run, "a.txt", text);
    auto s = f.settings();
    s.base_url = "HTTPS://LocalHost:" + std::to_string(f.server.port(origin::service));
    (void)f.success(wandb::client<>(s).try_restore("a.txt", f.path));
    CHECK(authorization(f, request_kind::files) == basic(f.server.key()));
  }

  TEST_CASE("a redirect from https to http is refused without a request to it") {
    fixture f;
    f.server.add_file(f.run, "a.txt", text);
    f.server.set_redirect(stand_in::redirect::plain_http);
    const auto failure = f.failure(f.client().try_restore("a.txt", f.path), errc::protocol_violation);
    check_names(failure, {"a.txt", f.path, "https", "http:"});
    CHECK(f.asked() == "graphql 1, files 1, storage 0");
  }

  TEST_CASE("an endless chain of redirects is refused") {
    fixture f;
    f.server.add_file(f.run, "a.txt", text);
    f.server.set_redirect(stand_in::redirect::loop);
    check_names(f.failure(f.client().try_restore("a.txt", f.path), errc::protocol_violation),
                {"a.txt", f.path, "redirects"});
    CHECK(f.server.counted().of(request_kind::files).requests <= 11);
  }

  TEST_CASE("extra headers go to the service, and do not override the library's headers") {
    fixture f;
    f.server.add_file(f.run, "a.txt", text);
    auto s = f.settings();
    s.extra_headers = {{"X-Team", "blue"},
                       {"Authorization", "Basic somebody-else"},
                       {"user-agent", "other"},
                       {"Content-Type", "text/plain"},
                       {"Proxy-Authorization", "Basic for-the-proxy"}};
    (void)f.success(wandb::client<>(s).try_restore("a.txt", f.path));
    CHECK(authorization(f, request_kind::graphql) == basic(f.server.key()));
    for (const auto& one : f.server.requests()) {
      CAPTURE(one.path);
      CHECK(one.header("X-Team").has_value() == (one.at == origin::service));
      CHECK(one.header("User-Agent") == s.user_agent);
      CHECK_FALSE(one.header("Proxy-Authorization").has_value());
      if (one.kind == request_kind::graphql) CHECK(one.header("Content-Type") == "application/json");
    }
  }

  TEST_CASE("an Authorization among the extra headers is used if there is no key, for the service alone") {
    fixture f;
    f.server.add_file(f.run, "a.txt", text);
    auto s = f.public_settings();
    s.extra_headers = {{"Authorization", basic(f.server.key())}};
    (void)f.success(wandb::client<>(s).try_restore("a.txt", f.path));
    CHECK(authorization(f, request_kind::files) == basic(f.server.key()));
    CHECK(authorization(f, request_kind::storage) == std::nullopt);
  }

  TEST_CASE("storage on another port of the service's host gets no key, also in retries") {
    fixture f;  // its storage has another port than its service
    f.server.add_file(f.run, "a.txt", text);
    f.server.add_fault(target(place::storage).nth(1), act::status(503));
    f.server.add_fault(target(place::storage).nth(2), act::cut(3));
    (void)f.success(f.client().try_restore("a.txt", f.path));
    CHECK(f.server.requests(request_kind::storage).size() >= 3);
    CHECK(authorization(f, request_kind::storage) == std::nullopt);
  }

  TEST_CASE("an expired address is renewed, and the key goes to the service alone") {
    fixture f;
    f.server.add_file(f.run, "a.txt", text);
    f.server.add_fault(target(place::storage).nth(1), act::status(403));
    (void)f.success(f.client().try_restore("a.txt", f.path));
    CHECK(f.asked() == "graphql 2, files 2, storage 2");
    CHECK(authorization(f, request_kind::graphql) == basic(f.server.key()));
    CHECK(authorization(f, request_kind::storage) == std::nullopt);
  }
}

TEST_SUITE("credentials: proxies") {
  std::string proxy_host(const fixture& f) {
    return "127.0.0.1:" + std::to_string(f.server.port(origin::proxy));
  }

  stand_in::options with_proxy(std::optional<std::string> credentials = {}) {
    stand_in::options how;
    how.proxy = true;
    how.proxy_credentials = std::move(credentials);
    how.more_hosts = {"api.example.test"};
    return how;
  }

  TEST_CASE("service and storage are reached through tunnels: the proxy gets no key, they get no proxy "
            "credentials") {
    fixture f(with_proxy("somebody:secret word"));
    f.server.add_file(f.run, "a.txt", text);
    f.secrets.insert(f.secrets.end(), {"secret word", "secret%20word", base64("somebody:secret word")});
    auto s = f.settings();
    s.https_proxy.url = "http://somebody:secret%20word@" + proxy_host(f);
    (void)f.success(wandb::client<>(s).try_restore("a.txt", f.path));
    const auto tunnels = f.server.requests(request_kind::proxy);
    CHECK(tunnels.size() == 2);
    for (const auto& one : f.server.requests()) {
      const bool at_proxy = one.kind == request_kind::proxy;
      CHECK(one.header("Proxy-Authorization").has_value() == at_proxy);
      CHECK(one.header("Authorization").has_value() == (one.at == origin::service));
      if (at_proxy) CHECK(one.method == "CONNECT");
    }

    s.https_proxy.url = "http://somebody:other@" + proxy_host(f);
    const auto failure = f.failure(wandb::client<>(s).try_restore("a.txt", f.path, true));
    check_names(failure, {"a.txt", f.path, "proxy", "407"});
  }

  TEST_CASE("a Proxy-Authorization among the extra headers goes to the proxy alone") {
    fixture f(with_proxy("somebody:secret word"));
    f.server.add_file(f.run, "a.txt", text);
    auto s = f.settings();
    s.https_proxy.url = "http://" + proxy_host(f);
    s.extra_headers = {{"Proxy-Authorization", "Basic " + base64("somebody:secret word")}};
    (void)f.success(wandb::client<>(s).try_restore("a.txt", f.path));
    for (const auto& one : f.server.requests()) {
      CHECK(one.header("Proxy-Authorization").has_value() == (one.kind == request_kind::proxy));
    }
  }

  TEST_CASE("the proxy resolves host names") {
    auto how = with_proxy();
    how.host = "api.example.test";
    fixture f(how);
    f.server.add_file(f.run, "a.txt", text);
    auto s = f.settings();
    s.https_proxy.url = "http://" + proxy_host(f);
    (void)f.success(wandb::client<>(s).try_restore("a.txt", f.path));
    CHECK(f.server.requests(request_kind::proxy).at(0).target ==
          "api.example.test:" + std::to_string(f.server.port(origin::service)));
  }

  TEST_CASE("the environment's proxy variables and NO_PROXY apply to service and storage") {
    struct row {
      std::vector<std::pair<const char*, const char*>>
          variables;          ///< PROXY is replaced by the proxy's address
      bool service, storage;  ///< through the proxy
    };
    const std::vector<row> table = {
        {{{"HTTPS_PROXY", "PROXY"}}, true, true},
        {{{"https_proxy", "PROXY"}}, true, true},
        {{{"HTTP_PROXY", "PROXY"}}, false, false},
        {{{"HTTPS_PROXY", "PROXY"}, {"NO_PROXY", "api.example.test"}}, false, false},
        {{{"HTTPS_PROXY", "PROXY"}, {"NO_PROXY", ".example.test"}}, false, false},
        {{{"HTTPS_PROXY", "PROXY"}, {"NO_PROXY", "other.test, STORAGE"}}, true, false},
        {{{"HTTPS_PROXY", "PROXY"}, {"NO_PROXY", "*"}}, false, false},
        {{{"HTTPS_PROXY", "PROXY"}, {"no_proxy", "other.test"}}, true, true},
        {{{"WANDB_HTTPS_PROXY", "PROXY"}, {"NO_PROXY", "*"}}, true, true},
        {{{"WANDB__PROXIES", "{\"https\": \"PROXY\"}"}, {"NO_PROXY", "*"}}, true, true},
        {{{"WANDB_HTTPS_PROXY", "PROXY"}, {"HTTPS_PROXY", "http://127.0.0.1:1"}}, true, true},
        {{{"WANDB_HTTP_PROXY", "PROXY"}}, false, false},
    };
    for (const row& r : table) {
      auto how = with_proxy();
      how.host = "api.example.test";
      fixture f(how);
      f.server.add_file(f.run, "a.txt", text);
      std::string all;
      std::vector<std::unique_ptr<scoped_environment>> set;
      const auto put = [&](const std::string& name, const std::string& value) {
        set.push_back(std::make_unique<scoped_environment>(
            std::initializer_list<scoped_environment::variable>{{name, value}}));
      };
      for (const auto& [name, value] : r.variables) {
        std::string now = value;
        const auto replace = [&](const std::string& what, const std::string& with) {
          if (const auto at = now.find(what); at != now.npos) now.replace(at, what.size(), with);
        };
        replace("PROXY", "http://" + proxy_host(f));
        replace("STORAGE", "api.example.test:" + std::to_string(f.server.port(origin::storage)));
        put(name, now);
        all += std::string(name) + "=" + now + " ";
      }
      CAPTURE(all);
      put("WANDB_BASE_URL", f.server.base_url());
      put("WANDB_API_KEY", f.server.key());
      put("SSL_CERT_FILE", f.ca().string());
      auto s = wandb::settings::from_environment();
      s.connect_timeout = s.retry_timeout = r.service && r.storage ? 20s : 300ms;
      auto outcome = wandb::client<>(s).try_restore("a.txt", f.path, false, f.root());
      // Only the proxy can resolve the host: a failure shows that the proxy was not used.
      if (r.service && r.storage) {
        (void)f.success(std::move(outcome));
      } else {
        (void)f.failure(std::move(outcome), errc::connection_failed);
      }
      bool service = false, storage = false;
      for (const auto& one : f.server.requests(request_kind::proxy)) {
        service = service || contains(one.target, std::to_string(f.server.port(origin::service)));
        storage = storage || contains(one.target, std::to_string(f.server.port(origin::storage)));
      }
      CHECK(service == r.service);
      CHECK(storage == r.storage);
    }
  }

  TEST_CASE("an unreachable or refusing proxy: the text has its name, not its password") {
    fixture f(with_proxy());
    f.server.add_file(f.run, "a.txt", text);
    f.secrets.push_back("secretword");
    f.server.add_fault(place::proxy, act::status(403));
    auto s = f.settings();
    s.connect_timeout = 20s;
    s.retry_timeout = 300ms;
    s.https_proxy.url = "http://me:secretword@" + proxy_host(f);
    check_names(f.failure(wandb::client<>(s).try_restore("a.txt", f.path)),
                {"a.txt", f.path, "proxy", "403"});
    s.https_proxy.url = "http://me:secretword@127.0.0.1:1";
    check_names(f.failure(wandb::client<>(s).try_restore("a.txt", f.path), errc::connection_failed),
                {"a.txt", f.path, "127.0.0.1:1"});
  }
}

TEST_SUITE("credentials: certificates") {
#ifndef WANDB_RESTORE_NO_OPENSSL
  /// Puts the CA into a directory as OpenSSL searches it: under the hash of its name.
  fs::path hashed_directory(const fixture& f) {
    const fs::path directory = f.directory / "certificates";
    fs::create_directories(directory);
    const std::string pem = f.server.ca_pem();
    BIO* const in = BIO_new_mem_buf(pem.data(), static_cast<int>(pem.size()));
    X509* const certificate = PEM_read_bio_X509(in, nullptr, nullptr, nullptr);
    REQUIRE(certificate != nullptr);
    char name[16];
    std::snprintf(name, sizeof name, "%08lx.0", X509_subject_name_hash(certificate));
    X509_free(certificate);
    BIO_free(in);
    write_file(directory / name, pem);
    return directory;
  }

  TEST_CASE("every CA variable is honoured, for files and for hashed directories") {
    fixture f;
    f.server.add_file(f.run, "a.txt", text);
    const std::string directory = hashed_directory(f).string(), file = f.ca().string();
    struct row {
      const char* name;
      std::string value;
    };
    for (const row& r : {row{"SSL_CERT_FILE", file}, row{"SSL_CERT_DIR", directory},
                         row{"SSL_CERT_DIR", "/nowhere:" + directory}, row{"REQUESTS_CA_BUNDLE", file},
                         row{"REQUESTS_CA_BUNDLE", directory}, row{"CURL_CA_BUNDLE", file}}) {
      CAPTURE(std::string(r.name));
      CAPTURE(r.value);
      const scoped_environment there{
          {"WANDB_API_KEY", f.server.key()}, {"WANDB_BASE_URL", f.server.base_url()}, {r.name, r.value}};
      (void)f.success(wandb::try_restore("a.txt", f.path, true, f.root()));
    }
    const scoped_environment none{{"WANDB_API_KEY", f.server.key()}, {"WANDB_BASE_URL", f.server.base_url()}};
    auto s = wandb::settings::from_environment();
    const auto failure =
        f.failure(wandb::client<>(s).try_restore("a.txt", f.path, true, f.root()), errc::connection_failed);
    check_names(failure, {"a.txt", f.path, "127.0.0.1", "certificate", "SSL_CERT_FILE"});
    CHECK_FALSE(failure.is_transient());
  }

  TEST_CASE("a refused certificate of service or storage fails at once, without a retry") {
    using stand_in::certificate;
    for (const bool storage : {false, true}) {
      for (const auto how_bad :
           {certificate::wrong_host, certificate::expired, certificate::other_authority}) {
        CAPTURE(storage);
        CAPTURE(static_cast<int>(how_bad));
        stand_in::options how;
        (storage ? how.storage_certificate : how.service_certificate) = how_bad;
        fixture f(how);
        f.server.add_file(f.run, "a.txt", text);
        const auto failure = f.failure(f.client().try_restore("a.txt", f.path), errc::connection_failed);
        check_names(failure, {"a.txt", f.path, "127.0.0.1", "certificate"});
        CHECK_FALSE(failure.is_transient());
        CHECK(f.server.counted().of(storage ? origin::storage : origin::service).connections == 1);
        CHECK(f.asked() == (storage ? "graphql 1, files 1, storage 0" : "graphql 0, files 0, storage 0"));
        CHECK(visible(f.root()).empty());
      }
    }
  }

  TEST_CASE("with verify_tls off, restores work, with one warning for each client") {
    stand_in::options how;
    how.service_certificate = stand_in::certificate::other_authority;
    fixture f(how);
    f.server.add_file(f.run, "a.txt", text);
    const scoped_environment there{{"WANDB_INSECURE_DISABLE_SSL", "true"},
                                   {"WANDB_API_KEY", f.server.key()},
                                   {"WANDB_BASE_URL", f.server.base_url()}};
    auto s = wandb::settings::from_environment();
    s.run_dir = f.root();
    s.on_warning = f.settings().on_warning;
    for (std::size_t clients = 1; clients <= 2; ++clients) {
      wandb::client<> client(s);
      for (int i = 0; i < 3; ++i) (void)f.success(client.try_restore("a.txt", f.path, true));
      REQUIRE(f.warnings().size() == clients);
      CHECK(contains(f.warnings().back(), "WANDB_INSECURE_DISABLE_SSL"));
    }
  }

  TEST_CASE("without on_warning, warnings go to standard error") {
    fixture f;
    f.server.add_file(f.run, "a.txt", text);
    auto s = f.settings();
    s.warnings = {"the first warning"};
    s.on_warning = {};
    const auto said = f.directory / "stderr";
    const int before = ::dup(2), file = ::open(said.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    REQUIRE(file >= 0);
    REQUIRE(::dup2(file, 2) == 2);
    const auto got = wandb::client<>(s).try_restore("a.txt", f.path);
    REQUIRE(::dup2(before, 2) == 2);
    ::close(before);
    ::close(file);
    CHECK(got.has_value());
    CHECK(support::read_file(said) == "wandb_restore: warning: the first warning\n");
  }

  TEST_CASE("a header of the settings that cannot be sent is invalid_argument, without its value") {
    fixture f;
    f.server.add_file(f.run, "a.txt", text);
    for (const auto& field : {std::pair<std::string, std::string>{"X-Extra", "SECRET\r\nX: y"},
                              std::pair<std::string, std::string>{"X Extra", "SECRET"}}) {
      auto s = f.settings();
      s.extra_headers = {field};
      const auto failure = f.failure(wandb::client<>(s).try_restore("a.txt", f.path), errc::invalid_argument);
      check_names(failure, {field.first, "cannot be sent"});
      CHECK_FALSE(contains(failure.what(), "SECRET"));
    }
    CHECK(f.asked() == "graphql 0, files 0, storage 0");
  }

  TEST_CASE("the warnings of settings are reported at the first request, once for each client") {
    fixture f;
    f.server.add_file(f.run, "a.txt", text);
    write_file(f.root() / "kept.txt", "old");
    auto s = f.settings();
    s.warnings = {"first", "second"};
    wandb::client<> client(s);
    (void)f.success(client.try_restore("kept.txt", f.path));
    CHECK(f.warnings().empty());
    for (int i = 0; i < 2; ++i) (void)f.success(client.try_restore("a.txt", f.path, true));
    CHECK(f.warnings() == names{"first", "second"});
  }

  TEST_CASE("the warnings of settings are reported if the run path is incomplete: they may explain that") {
    fixture f;
    auto s = f.settings();
    s.entity = s.project = "";
    s.warnings = {"the settings file is not used"};
    wandb::client<> client(s);
    for (int i = 0; i < 2; ++i) (void)f.failure(client.try_restore("a.txt", "run1"), errc::invalid_run_path);
    (void)f.failure(client.try_restore_all("*", "run1"), errc::invalid_run_path);
    CHECK(f.warnings() == names{"the settings file is not used"});
    CHECK(f.asked() == "graphql 0, files 0, storage 0");
  }

  TEST_CASE("a refused key: the message names the place of the key") {
    fixture f;
    auto s = f.settings();
    f.server.set_key("another0123456789012345678901234567890123");
    const std::string set =
        f.failure(wandb::client<>(s).try_restore("a.txt", f.path), errc::not_authenticated).what();
    CHECK(contains(set, "WANDB_API_KEY"));
    CHECK(contains(set, "precedence"));
    s.netrc_file = write_file(f.directory / "netrc",
                              "default login user password " + std::exchange(s.api_key, {}) + '\n');
    const std::string stored =
        f.failure(wandb::client<>(s).try_restore("a.txt", f.path), errc::not_authenticated).what();
    CHECK(contains(stored, s.netrc_file.string()));
    CHECK(contains(stored, "wandb login --relogin"));
    CHECK_FALSE(contains(stored, "precedence"));
  }

  TEST_CASE("an unusable CA file is reported with its name, without a request") {
    fixture f;
    auto s = f.settings();
    s.ca_file = write_file(f.directory / "not-a-ca.pem", "hello");
    check_names(f.failure(wandb::client<>(s).try_restore("a.txt", f.path), errc::invalid_argument),
                {"a.txt", f.path, "not-a-ca.pem"});
    CHECK(f.asked() == "graphql 0, files 0, storage 0");
  }
#endif
}
