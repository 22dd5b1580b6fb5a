// The readers of configuration files: netrc, settings files (ini) and KEY=VALUE.
#include "support.hpp"
#include "wandb_restore.hpp"

#include <doctest/doctest.h>

#include <map>
#include <optional>
#include <string>
#include <vector>

namespace {

/// Returns the password for a host in a netrc file, else that of the default entry.
std::optional<std::string> find_netrc_password(std::string_view text, const std::string& host) {
  const auto passwords = wandb::detail::parse_netrc(text);
  if (!passwords) return std::nullopt;
  const std::string* found = passwords->find(host);
  if (!found) found = passwords->find("default");
  return found ? std::optional(*found) : std::nullopt;
}

/// Reads a netrc file through settings that name it.
struct netrc_answer {
  std::string key;
  std::vector<std::string> warnings;
};
netrc_answer ask(const std::filesystem::path& where, const std::string& base_url) {
  wandb::settings configuration;
  configuration.base_url = base_url;
  configuration.netrc_file = where;
  const auto base = wandb::detail::parse_base_url(base_url);
  REQUIRE(base.has_value());
  netrc_answer answer;
  answer.key = wandb::detail::api_key_from_netrc(configuration, *base, answer.warnings);
  return answer;
}

}  // namespace

TEST_SUITE("netrc") {
  TEST_CASE("the password for the machine h") {
    // [checked against Python 3.11's netrc, which wandb 0.29.0 and 0.31.0 use]; null: no entry
    const struct {
      const char* text;
      const char* password;
    } rows[] = {
        {"", nullptr},
        {"machine h login user password K", "K"},
        {"machine h\n  login user\n  password K\n", "K"},
        {"machine other password X", nullptr},
        {"default login u password D", "D"},
        {"machine h password K\ndefault password D", "K"},
        {"default password D\nmachine h password K", "K"},
        {"machine h password A\nmachine h password B", "B"},
        {"machine h password A\nmachine h login u", ""},
        {"machine h password \"a b\"", "a b"},
        {"machine h password \"a\\\"b\"", "a\"b"},
        {"machine h password a\\ b", "a b"},
        {"machine h password p#x", "p#x"},
        {"machine h password K # note", "K"},
        {"machine h # note\n password K", "K"},
        {"# first line\nmachine h password K", "K"},
        {"machine h account acc password K", "K"},
        {"machine h account acc login u password K", "K"},
        {"machine h user u password K", "K"},
        {"macdef m\n  put x\n  password Z\n\nmachine h password K", "K"},
        {"machine h password K\nmacdef init\n echo\n\n", "K"},
        {"machine h login u", ""},
        {"machine h password \"\"", ""},
        {"machine H password K", nullptr},
        {"machine h:8080 password K", nullptr},
        {"machine h.corp password X\nmachine h password K", "K"},
        {"machine\th\tpassword\tK\r\n", "K"},
        {"machine h password K machine i password L", "K"},
        {"\"machine\" h password K", "K"},
        {"machine default password D2", "D2"},
        {"machine h password \"K", "K"},
    };
    for (const auto& row : rows) {
      const auto& text = row.text;
      const auto& password = row.password;
      CAPTURE(text);
      const auto found = find_netrc_password(text, "h");
      REQUIRE(found.has_value() == (password != nullptr));
      if (password) CHECK(*found == password);
    }
  }

  TEST_CASE("malformed netrc files are refused") {
    // [checked against Python 3.11's netrc]
    const char* const rows[] = {
        "invalid", "machine h wrong x", "machine h password 'a b'", "machine", "password K",
    };
    for (const char* text : rows) {
      CAPTURE(text);
      CHECK_FALSE(wandb::detail::parse_netrc(text).has_value());
      CHECK_FALSE(find_netrc_password(text, "h").has_value());
    }
  }

  TEST_CASE("comments may stand anywhere, and a macro may end the file") {
    // Python's reader fails on these files.
    const char* const rows[] = {
        "\n\n# after empty lines\nmachine h password K",
        "#machine h password OLD\nmachine h password K",
        "machine h\n\n# c d\n password K",
        "machine h password K\n#c\n\n# d e\nmachine i password L",
        "machine h password K\nmacdef m\n  put x\n",
    };
    for (const char* text : rows) {
      CAPTURE(text);
      CHECK(find_netrc_password(text, "h") == "K");
    }
  }

  TEST_CASE("the host must match exactly, with its port") {
    const std::string text = "machine localhost:8080 password with\nmachine localhost password without\n";
    CHECK(find_netrc_password(text, "localhost:8080") == "with");
    CHECK(find_netrc_password(text, "localhost") == "without");
    CHECK_FALSE(find_netrc_password(text, "localhost:80").has_value());
    CHECK_FALSE(find_netrc_password(text, "LOCALHOST").has_value());
    // Entries of the service as `wandb login` writes them.
    CHECK(find_netrc_password("machine api.wandb.ai\n  login user\n  password K\n", "api.wandb.ai") == "K");
  }

  TEST_CASE("the key is found for every spelling of the base URL's origin") {
    const support::temporary_directory directory;
    const auto where = support::write_file(directory / "netrc", "machine api.host password plain\n"
                                                                "machine API.host:8080 password port\n"
                                                                "machine h:443 password explicit\n");
    CHECK(ask(where, "https://api.host").key == "plain");
    CHECK(ask(where, "https://API.HOST/base/").key == "plain");
    CHECK(ask(where, "https://api.host:443").key == "plain");
    CHECK(ask(where, "http://API.host:8080").key == "port");
    CHECK(ask(where, "http://api.host:8080").key == "");
    CHECK(ask(where, "https://h:443/").key == "explicit");
    CHECK(ask(where, "https://elsewhere").key == "");
    CHECK(ask(where, "https://elsewhere").warnings.empty());
  }

  TEST_CASE("a key under another name of the service is used after the base URL's name and the default") {
    const char* const bases[] = {"https://api.forge.coreweave.com",
                                 "https://api.forge.coreweave.com/",
                                 "https://forge.coreweave.com/api/wandb",
                                 "https://api.wandb.ai",
                                 "https://API.WANDB.AI:443",
                                 "https://api.forge.coreweave.com:8443"};
    const char* const machines[] = {"api.forge.coreweave.com", "api.wandb.ai", "forge.coreweave.com"};
    const support::temporary_directory directory;
    for (const std::string base : bases) {
      for (const std::string machine : machines) {
        CAPTURE(base);
        CAPTURE(machine);
        const std::string entry = "machine " + machine + " login user password K\n";
        const std::string noise = "machine api.qa.wandb.ai password Q\nmachine wandb.ai password W\n";
        const auto answer = ask(support::write_file(directory / "netrc", noise + entry), base);
        CHECK(answer.key == "K");
        CHECK(answer.warnings.empty());
      }
    }
    const struct {
      const char* text;
      const char* base;
      const char* key;
    } rows[] = {
        // [checked against wandb 0.31.0: read_netrc_auth], but for the lines of which the SDK finds no key
        {"machine api.forge.coreweave.com password F\nmachine api.wandb.ai password W",
         "https://api.forge.coreweave.com", "F"},
        {"machine api.forge.coreweave.com password F\nmachine api.wandb.ai password W",
         "https://forge.coreweave.com/api/wandb", "F"},
        {"machine api.forge.coreweave.com password F\nmachine api.wandb.ai password W",
         "https://api.wandb.ai", "W"},
        {"machine api.wandb.ai password W\ndefault password D", "https://api.forge.coreweave.com", "D"},
        {"machine api.forge.coreweave.com login u\nmachine api.wandb.ai password W",
         "https://api.forge.coreweave.com", ""},
        {"machine api.wandb.ai password W", "https://api.qa.forge.coreweave.com", ""},
        {"machine api.qa.wandb.ai password Q", "https://api.qa.forge.coreweave.com", "Q"},
        {"machine api.qa.forge.coreweave.com password Q", "https://api.qa.wandb.ai", "Q"},
        {"machine api.wandb.ai:8443 password P\nmachine api.wandb.ai password W",
         "https://api.forge.coreweave.com:8443", "P"},
        {"machine api.wandb.ai:8443 password P", "https://api.forge.coreweave.com", ""},
        {"machine api.wandb.ai password W", "https://api.other.example.org", ""},
    };
    for (const auto& row : rows) {
      const std::string text = row.text, base = row.base;
      CAPTURE(text);
      CAPTURE(base);
      CHECK(ask(support::write_file(directory / "netrc", text), base).key == row.key);
    }
  }

  TEST_CASE("an unusable file causes a warning; a missing file does not") {
    const support::temporary_directory directory;
    CHECK(ask(directory / "none", "https://h").warnings.empty());
    CHECK(ask(directory.path(), "https://h").warnings.size() == 1);

    auto answer = ask(support::write_file(directory / "bad", "machine h passwrd SECRET"), "https://h");
    CHECK(answer.key == "");
    REQUIRE(answer.warnings.size() == 1);
    CHECK(answer.warnings[0].find("bad\" is not used: expected machine") != std::string::npos);
    CHECK(answer.warnings[0].find("SECRET") == std::string::npos);

    answer = ask(support::write_file(directory / "empty", "machine h login u"), "https://h");
    CHECK(answer.key == "");
    REQUIRE(answer.warnings.size() == 1);
    CHECK(answer.warnings[0].find("has no password for \"h\"") != std::string::npos);
  }
}

TEST_SUITE("ini") {
  TEST_CASE("the section [default]") {
    // [checked against wandb 0.29.0: SettingsFiles.all()]
    const struct {
      const char* text;
      std::map<std::string, std::string> values;
    } rows[] = {
        {"", {}},
        {"[default]\na=b\n", {{"a", "b"}}},
        {"[default]\nA_b : C d \n", {{"a_b", "C d"}}},
        {"[default]\na = b ; c\n", {{"a", "b ; c"}}},
        {"[default]\na = b # c\n# full\n ; x\nb=1", {{"a", "b # c"}, {"b", "1"}}},
        {"[default]\na = 1\n  2\n\n  3\nb=2", {{"a", "1\n2\n\n3"}, {"b", "2"}}},
        {"[DEFAULT]\na=1\n", {}},
        {"[DEFAULT]\na=1\nb=2\n[default]\nb=3\n", {{"a", "1"}, {"b", "3"}}},
        {"[default]\na=%%x\n", {{"a", "%x"}}},
        {"[other]\na=1\n", {}},
        {"[other]\na=%\n[default]\nb=1", {{"b", "1"}}},
        {"[DEFAULT]\na=%\n[default]\na=1", {{"a", "1"}}},
        {"[default] junk\na=1", {{"a", "1"}}},
        {"  [default]\n  a=1\n   b=2\n", {{"a", "1\nb=2"}}},
        {"[default]\na=1\n [other]\nb=2\n", {{"a", "1\n[other]"}, {"b", "2"}}},
        {"[default]\na=\n", {{"a", ""}}},
        {"[default]\na = b = c : d\n", {{"a", "b = c : d"}}},
        {"[default]\na:b=c", {{"a", "b=c"}}},
        {"[default]\r\na=1\r\n", {{"a", "1"}}},
        {"[default]\na=1\n# c\n  2\n", {{"a", "1\n2"}}},
        {"[default]\na=1\n   # c\n  2\n", {{"a", "1\n2"}}},
        {"[default]\na b = c\n", {{"a b", "c"}}},
        {"[Default]\na=1", {}},
        {"[default]\na=1\n\n\n", {{"a", "1"}}},
        {"[DEFAULT]\na=1\n[DEFAULT]\nb=2\n[default]", {{"a", "1"}, {"b", "2"}}},
        {"[default]\na=\n  x", {{"a", "\nx"}}},
        {"[default]\n  a=1\n b=2\n  3", {{"a", "1"}, {"b", "2\n3"}}},
        {"[default]\na = 1\t\n\tb", {{"a", "1\nb"}}},
    };
    for (const auto& row : rows) {
      const auto& text = row.text;
      const auto& values = row.values;
      CAPTURE(text);
      const auto parsed = wandb::detail::parse_ini(text);
      REQUIRE(parsed.has_value());
      CHECK(std::map<std::string, std::string>(parsed->begin(), parsed->end()) == values);
    }
  }

  TEST_CASE("malformed settings files are refused") {
    // [checked against wandb 0.29.0: a warning, or an exception that escapes]
    const char* const rows[] = {
        "[default]\na=%\n",
        "[default]\na=1\nA=2\n",
        "[default]\na=1\n[default]\nb=2\n",
        "a=1\n",
        "[default]\nnovalue\n",
        "[default]\n=x\n",
        "\xef\xbb\xbf[default]\na=1",
        "[default\na=1",
        "[]\na=1",
        "[default]\nbase_url = https://x/%2f",
        "[other]\na=1\na=2\n[default]\nb=1",
        "[DEFAULT]\na=1\n[DEFAULT]\na=2\n[default]",
        "oops - invalid format",
        "[DEFAULT]\na=%\n[default]\nb=1",
    };
    for (const char* text : rows) {
      CAPTURE(text);
      CHECK_FALSE(wandb::detail::parse_ini(text).has_value());
    }
  }

  TEST_CASE("errors name the line") {
    const auto parsed = wandb::detail::parse_ini("[default]\n\n# comment\na = 1\nA = 2\n");
    REQUIRE_FALSE(parsed.has_value());
    CHECK(std::string(parsed.error().what()) == "line 5: the key \"a\" appears twice");
  }

  TEST_CASE("KEY=VALUE lines") {
    const auto values = wandb::detail::parse_key_values("A=1\r\n B=x=y \nnothing\n\nA=2\nC=");
    CHECK(std::map<std::string, std::string>(values.begin(), values.end()) ==
          std::map<std::string, std::string>{{"A", "2"}, {"B", "x=y"}, {"C", ""}});
  }
}
