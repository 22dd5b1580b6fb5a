// Proxies: the choice of a proxy for an address, and the sources of proxy settings.
#include "support.hpp"
#include "wandb_restore.hpp"

#include <doctest/doctest.h>

#include <string>

using support::scoped_environment;

namespace {

struct rule {
  const char* bypass;
  const char* target;
  bool proxied;
};

std::string asked(const wandb::settings& configuration, const char* target) {
  const auto address = wandb::url::parse(target);
  REQUIRE(address.has_value());
  return wandb::detail::proxy_for(configuration, *address);
}

}  // namespace

TEST_SUITE("proxy") {
  TEST_CASE("NO_PROXY") {
    // [checked against Go's golang.org/x/net/http/httpproxy, which the SDK's core uses]
    const rule rows[] = {
        {"", "https://example.com/x", true},
        {"example.com", "https://example.com/x", false},
        {"example.com", "https://sub.example.com", false},
        {"example.com", "https://notexample.com", true},
        {".example.com", "https://example.com", true},
        {".example.com", "https://a.b.example.com", false},
        {"*.example.com", "https://example.com", true},
        {"*.example.com", "https://a.example.com", false},
        {"example.com:8443", "https://example.com:8443", false},
        {"example.com:8443", "https://example.com", true},
        {"example.com:443", "https://example.com", false},
        {"example.com:80", "http://example.com", false},
        {".example.com:443", "https://a.example.com", false},
        {"*", "https://example.com", false},
        {"foo, *", "https://10.0.0.1", false},
        {" EXAMPLE.com ", "https://example.COM", false},
        {"a,,example.com", "https://example.com", false},
        {"10.0.0.1", "https://10.0.0.1", false},
        {"10.0.0.1", "https://10.0.0.11", true},
        {"10.0.0.1:443", "https://10.0.0.1", false},
        {"10.0.0.1:80", "https://10.0.0.1", true},
        {"10.0.0.0/8", "https://10.200.3.4", false},
        {"10.0.0.0/8", "https://11.0.0.1", true},
        {"10.0.0.0/8", "https://10.example.com", true},
        {"192.168.4.128/25", "https://192.168.4.200", false},
        {"192.168.4.128/25", "https://192.168.4.100", true},
        {"0.0.0.0/0", "https://8.8.8.8", false},
        {"0.0.0.0/0", "https://[2001:db8::1]", true},
        {"::/0", "https://8.8.8.8", true},
        {"::/0", "https://[2001:db8::1]", false},
        {"2001:db8::/32", "https://[2001:db8:5::1]", false},
        {"2001:db8::/32", "https://[2001:db9::1]", true},
        {"2001:db8::1", "https://[2001:0db8:0::0:1]", false},
        {"[2001:db8::1]:443", "https://[2001:db8::1]", false},
        {"[2001:db8::1]:80", "https://[2001:db8::1]", true},
        {"::ffff:10.0.0.1", "https://10.0.0.1", false},
        {"1.2.3.4::", "https://[102:304::]", true},
        {"10.0.0.0/33", "https://10.0.0.1", true},
        {"10.0.0.0/x", "https://10.0.0.1", true},
        {"010.0.0.1", "https://10.0.0.1", true},
        {"0.0.0.1", "https://10.0.0.1", true},
        {".0.0.1", "https://10.0.0.1", true},
        {"com", "https://example.com", false},
        {".", "https://example.com", true},
        {":443", "https://example.com", true},
        {"example.com/8", "https://example.com", true},
        {"exam*.com", "https://example.com", true},
        // Go accepts brackets only before a port.
        {"[2001:db8::1]", "https://[2001:db8::1]", false},
    };
    for (const auto& row : rows) {
      const auto& bypass = row.bypass;
      const auto& target = row.target;
      const auto& proxied = row.proxied;
      CAPTURE(bypass);
      CAPTURE(target);
      wandb::settings configuration;
      configuration.http_proxy = configuration.https_proxy = {"http://p", bypass};
      CHECK(asked(configuration, target) == (proxied ? "http://p" : ""));
    }
  }

  TEST_CASE("the environment's proxies are not used for this machine") {
    // [checked against Go's golang.org/x/net/http/httpproxy]
    const rule rows[] = {
        {"", "https://localhost:8080", false},
        {"", "http://127.0.0.1", false},
        {"", "http://127.8.9.1", false},
        {"", "http://[::1]:80", false},
        {"", "http://localhost.example.com", true},
        {"", "http://128.0.0.1", true},
        {"", "http://[::ffff:127.0.0.1]", false},
    };
    const scoped_environment proxies{{"HTTP_PROXY", "http://p"}, {"HTTPS_PROXY", "http://p"}};
    const auto configuration = wandb::settings::from_environment();
    for (const auto& row : rows) {
      const auto& target = row.target;
      const auto& proxied = row.proxied;
      CAPTURE(target);
      CHECK(asked(configuration, target) == (proxied ? "http://p" : ""));
    }
  }

  TEST_CASE("each scheme has its own proxy") {
    wandb::settings configuration;
    CHECK(asked(configuration, "https://example.com") == "");
    configuration.http_proxy.url = "http://plain";
    CHECK(asked(configuration, "https://example.com") == "");
    CHECK(asked(configuration, "http://example.com") == "http://plain");
    configuration.https_proxy.url = "http://secure";
    CHECK(asked(configuration, "https://example.com") == "http://secure");
  }

  TEST_CASE("upper case comes before lower case, empty counts as unset") {
    const scoped_environment proxies{{"HTTP_PROXY", ""},
                                     {"http_proxy", "low:1"},
                                     {"HTTPS_PROXY", "http://user:p%40ss@High:3128/"},
                                     {"https_proxy", "low:2"},
                                     {"no_proxy", "example.org"}};
    const auto configuration = wandb::settings::from_environment();
    CHECK(configuration.http_proxy.url == "http://low:1");
    CHECK(configuration.https_proxy.url == "http://user:p%40ss@high:3128");
    CHECK(asked(configuration, "http://example.org") == "");
    CHECK(asked(configuration, "http://example.com") == "http://low:1");
    CHECK_FALSE(configuration.problem.has_value());
  }

  TEST_CASE("W&B's own variables ignore NO_PROXY, also for this machine") {
    const scoped_environment proxies{{"WANDB_HTTP_PROXY", "http://own:1/"},
                                     {"HTTP_PROXY", "http://all:1"},
                                     {"HTTPS_PROXY", "http://all:2"},
                                     {"NO_PROXY", "*"}};
    const auto configuration = wandb::settings::from_environment();
    CHECK(configuration.http_proxy.bypass == "");
    CHECK(asked(configuration, "http://example.com") == "http://own:1");
    CHECK(asked(configuration, "http://localhost:8080") == "http://own:1");
    CHECK(asked(configuration, "https://example.com") == "");
  }

  TEST_CASE("WANDB__PROXIES comes before WANDB_HTTPS_PROXY") {
    // As in the SDK, whose public API overwrites the setting.
    const scoped_environment proxies{{"WANDB__PROXIES", R"({"https": "http://legacy:1", "other": "x"})"},
                                     {"WANDB_HTTPS_PROXY", "http://own:1"},
                                     {"WANDB_HTTP_PROXY", "http://own:2"}};
    const auto configuration = wandb::settings::from_environment();
    CHECK(configuration.https_proxy.url == "http://legacy:1");
    CHECK(configuration.http_proxy.url == "http://own:2");
  }

  TEST_CASE("in a CGI program HTTP_PROXY is ignored") {
    const scoped_environment cgi{
        {"REQUEST_METHOD", "GET"}, {"HTTP_PROXY", "http://evil:1"}, {"HTTPS_PROXY", "http://p:1"}};
    const auto configuration = wandb::settings::from_environment();
    CHECK(configuration.http_proxy.url == "");
    CHECK(configuration.https_proxy.url == "http://p:1");
    REQUIRE(configuration.warnings.size() == 1);
    CHECK(configuration.warnings[0] == "HTTP_PROXY is not used in a CGI program");
  }

  TEST_CASE("a proxy of another kind is a problem, reported without its password") {
    for (const char* text : {"socks5://u:secret@p:1", "https://u:secret@p", "http://u:secret@",
                             "http://p:99999", "http://p\n"}) {
      CAPTURE(text);
      const scoped_environment proxies{{"HTTPS_PROXY", text}};
      const auto configuration = wandb::settings::from_environment();
      CHECK(configuration.https_proxy.url == "");
      REQUIRE(configuration.problem.has_value());
      const std::string told = configuration.problem->what();
      CHECK(configuration.problem->code() == wandb::errc::invalid_argument);
      CHECK(told.find("HTTPS_PROXY cannot be used: ") == 0);
      CHECK(told.find("secret") == std::string::npos);
    }
    {  // for http addresses, which an https service never redirects to
      const scoped_environment proxies{{"HTTP_PROXY", "socks5://u:secret@p:1"}};
      const auto configuration = wandb::settings::from_environment();
      CHECK_FALSE(configuration.problem.has_value());
      REQUIRE(configuration.warnings.size() == 1);
      CHECK(configuration.warnings[0].find("HTTP_PROXY cannot be used: ") == 0);
      CHECK(configuration.warnings[0].find("secret") == std::string::npos);
    }
    for (const char* text : {"x", "[]", R"({"https": 1})"}) {
      CAPTURE(text);
      const scoped_environment proxies{{"WANDB__PROXIES", text}};
      CHECK(wandb::settings::from_environment().problem.has_value());
    }
  }
}
