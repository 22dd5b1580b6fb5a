// Settings: their sources, the order of the sources, and errors.
#include "support.hpp"
#include "wandb_restore.hpp"

#include <doctest/doctest.h>

#include <chrono>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

namespace fs = std::filesystem;
using support::scoped_environment;
using support::temporary_directory;
using support::write_file;
using wandb::settings;
using wandb::detail::check_api_key;
using wandb::detail::parse_base_url;
using wandb::detail::under_base;

namespace {

const std::string key(40, 'k');
const std::string other_key(40, 'o');

/// A simulated machine: an empty home directory, and a project directory.
class machine {
 public:
  machine()
      : environment_{
            {"HOME", home().string()}, {"USERPROFILE", home().string()}, {"WANDB_DIR", project().string()}} {
    std::filesystem::create_directories(home());
    std::filesystem::create_directories(project());
  }
  std::filesystem::path home() const { return directory_ / "home"; }
  std::filesystem::path project() const { return directory_ / "project"; }
  void global_settings(const std::string& text) const {
    write_file(home() / ".config" / "wandb" / "settings", text);
  }
  void local_settings(const std::string& text) const { write_file(project() / "wandb" / "settings", text); }

 private:
  temporary_directory directory_;
  scoped_environment environment_;
};

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

/// "VALUE from SOURCE" of a setting, as settings::shown has them.
std::string shown(const settings& s, const std::string& name) {
  std::string text;
  for (const wandb::shown_setting& each : s.shown()) {
    for (const std::string& secret : {key, other_key, std::string("password")}) {
      CHECK_FALSE(contains(each.name + each.value + each.source, secret));
    }
    if (each.name == name) text += each.value + " from " + each.source;
  }
  return text;
}

std::string problem_of(const settings& s) {
  if (!s.problem) return "";
  CHECK(s.problem->code() == wandb::errc::invalid_argument);
  return s.problem->what();
}

wandb::url address(const std::string& text) {
  auto parsed = wandb::url::parse(text);
  REQUIRE(parsed.has_value());
  return *std::move(parsed);
}

}  // namespace

TEST_SUITE("settings") {
  TEST_CASE("without any settings: the public service, no key, no problem") {
    const machine here;
    const auto s = settings::from_environment();
    CHECK(s.base_url == "https://api.forge.coreweave.com");
    CHECK(s.entity + s.project + s.run_id + s.api_key + s.identity_token_file == "");
    CHECK(s.netrc_file.filename().string().find("netrc") == 1);
    CHECK(s.credentials_file == here.home() / ".config" / "wandb" / "credentials.json");
    CHECK_FALSE(s.offline);
    CHECK(s.verify_tls);
    CHECK(s.warnings.empty());
    CHECK_FALSE(s.problem.has_value());
  }

  TEST_CASE("shown: every value with its source") {
    const machine here;
    const std::string in_local = " in " + (here.project() / "wandb" / "settings").string();
    const std::string in_global = " in " + (here.home() / ".config" / "wandb" / "settings").string();
    here.global_settings("[default]\nproject = global\nentity = global\napi_key = " + other_key +
                         "\nmode = offline\n");
    here.local_settings("[default]\nproject = local\nmode = sometimes\n");
    const scoped_environment variables{
        {"WANDB_ENTITY", "variable"},
        {"WANDB__GRAPHQL_TIMEOUT_SECONDS", "0.25"},
        {"WANDB_BASE_URL", "https://user:password@example.com/?password"},
        {"WANDB_HTTPS_PROXY", "http://user:password@proxy:1"},
        {"CURL_CA_BUNDLE", here.home().string()},
        {"WANDB_X_EXTRA_HTTP_HEADERS", R"({"A": "password", "B": "password"})"}};
    auto s = settings::from_environment();
    CHECK(shown(s, "entity") == "variable from WANDB_ENTITY");
    CHECK(shown(s, "project") == "local from project" + in_local);
    CHECK(shown(s, "offline") == "false from default");  // "sometimes" is not used
    CHECK(shown(s, "api_key") == "(set) from api_key" + in_global);
    CHECK(shown(s, "run_id") == " from default");
    CHECK(shown(s, "base_url") == "https://...@example.com/ from WANDB_BASE_URL");
    CHECK(shown(s, "connect_timeout") == "0.25 s from WANDB__GRAPHQL_TIMEOUT_SECONDS");
    CHECK(shown(s, "retry_timeout") == "2.5 s from WANDB__GRAPHQL_TIMEOUT_SECONDS");
    CHECK(shown(s, "https_proxy") == "http://...@proxy:1 from WANDB_HTTPS_PROXY");
    CHECK(shown(s, "ca_directory") == here.home().string() + " from CURL_CA_BUNDLE");
    CHECK(shown(s, "extra_headers") == "A: (set), B: (set) from WANDB_X_EXTRA_HTTP_HEADERS");
    CHECK(shown(s, "total_timeout") == " from default");

    s.entity = "mine";
    s.run_dir = "runs";
    CHECK(shown(s, "entity") == "mine from program");
    CHECK(shown(s, "run_dir") == "runs from program");
    CHECK(shown(s, "project") == "local from project" + in_local);

    settings from_nothing;
    from_nothing.api_key = key;
    CHECK(shown(from_nothing, "api_key") == "(set) from program");
    CHECK(shown(from_nothing, "verify_tls") == "true from default");
  }

  TEST_CASE("shown: a key in netrc, a run id in the resume file") {
    const machine here;
    write_file(here.home() / ".netrc", "machine api.wandb.ai login user password " + key + "\n");
    write_file(here.project() / "wandb" / "wandb-resume.json", R"({"run_id": "r1"})");
    const scoped_environment variables{{"WANDB_RESUME", "auto"}};
    auto s = settings::from_environment();
    CHECK(s.api_key == "");
    CHECK(shown(s, "api_key") ==
          "(set) from netrc entry api.wandb.ai in " + (here.home() / ".netrc").string());
    CHECK(shown(s, "run_id") ==
          "r1 from run_id in " + (here.project() / "wandb" / "wandb-resume.json").string());
    s.base_url = "https://example.com";
    CHECK(shown(s, "api_key") == " from default");
    s.identity_token_file = "token";
    CHECK(shown(s, "api_key") == " from default");
    CHECK(shown(s, "identity_token_file") == "token from program");
    s.identity_token_file = "eyJhbGciOiJub25lIn0.e30.";  // a common error: the token itself
    CHECK(shown(s, "identity_token_file") == "(set) from program");
  }

  TEST_CASE("for each key the environment overrides the local file, which overrides the global one") {
    const machine here;
    here.global_settings("[default]\nentity = global\nproject = global\nbase_url = https://global\n");
    CHECK(settings::from_environment().entity == "global");
    here.local_settings("[default]\nentity = local\nproject = local\n");
    {
      const scoped_environment variables{{"WANDB_ENTITY", "variable"}};
      const auto s = settings::from_environment();
      CHECK(s.entity == "variable");
      CHECK(s.project == "local");
      CHECK(s.base_url == "https://global");
    }
    const scoped_environment variables{{"WANDB_PROJECT", "variable"},
                                       {"WANDB_BASE_URL", "https://variable/"}};
    const auto s = settings::from_environment();
    CHECK(s.entity == "local");
    CHECK(s.project == "variable");
    CHECK(s.base_url == "https://variable/");
  }

  TEST_CASE("white space around names and keys is removed, from every source") {
    const machine here;
    {
      // [checked against wandb 0.31.0, for entity and project]
      const scoped_environment variables{{"WANDB_ENTITY", " team\n"},
                                         {"WANDB_PROJECT", "\tproject "},
                                         {"WANDB_RUN_ID", "run\r\n"},
                                         {"WANDB_API_KEY", "\n " + key + "\r\n"}};
      const auto s = settings::from_environment();
      CHECK(s.entity == "team");
      CHECK(s.project == "project");
      CHECK(s.run_id == "run");
      CHECK(s.api_key == key);
      CHECK(problem_of(s) == "");
    }
    {
      const scoped_environment blank{{"WANDB_API_KEY", " \n"}};  // counts as empty
      const auto s = settings::from_environment();
      CHECK(s.api_key == "");
      CHECK(problem_of(s) == "");
    }
    here.global_settings("[default]\napi_key =\n  " + key + "\n\n");
    CHECK(settings::from_environment().api_key == key);
    const support::scoped_working_directory there(here.project());
    const scoped_environment job{
        {"SM_TRAINING_ENV", R"({"wandb_api_key": "\" )" + other_key + R"(\n\"\n"})"}};
    CHECK(settings::from_environment().api_key == other_key);
  }

  TEST_CASE("an empty entity or project hides that of the files; other empty variables are ignored") {
    const machine here;
    here.global_settings("[default]\nentity = e\nproject = p\nbase_url = https://host\nmode = offline\n");
    const scoped_environment variables{{"WANDB_ENTITY", ""},
                                       {"WANDB_PROJECT", ""},
                                       {"WANDB_BASE_URL", ""},
                                       {"WANDB_MODE", ""},
                                       {"WANDB_API_KEY", ""}};
    const auto s = settings::from_environment();
#ifndef _WIN32  // Windows has no empty variables
    CHECK(s.entity == "");
    CHECK(s.project == "");
#endif
    CHECK(s.base_url == "https://host");
    CHECK(s.offline);
    CHECK_FALSE(s.problem.has_value());
  }

  TEST_CASE("settings files are found in their documented places") {
    const machine here;
    here.global_settings("[default]\nentity = home\n");
    write_file(here.home() / "elsewhere" / "settings", "[default]\nentity = elsewhere\n");
    {
      const scoped_environment variables{{"WANDB_CONFIG_DIR", "~/elsewhere"}};
      CHECK(settings::from_environment().entity == "elsewhere");
    }
    here.local_settings("[default]\nentity = wandb\n");
    CHECK(settings::from_environment().entity == "wandb");
    write_file(here.project() / ".wandb" / "settings", "[default]\nentity = dot\n");
    CHECK(settings::from_environment().entity == "dot");
    const scoped_environment variables{{"WANDB_DIR", std::nullopt}};
    CHECK(settings::from_environment().entity == "home");
    const support::scoped_working_directory there(here.project());
    CHECK(settings::from_environment().entity == "dot");
  }

  TEST_CASE("the settings in WANDB_DIR override those in the working directory") {
    const machine here;  // WANDB_DIR is the project
    const temporary_directory elsewhere;
    const support::scoped_working_directory there(elsewhere.path());
    here.global_settings(
        "[default]\nentity = global\nproject = global\nrun_id = global\nusername = global\n");
    write_file("wandb/settings", "[default]\nentity = here\nproject = here\nrun_id = here\n");
    here.local_settings("[default]\nentity = dir\nproject = dir\n");
    const scoped_environment variables{{"WANDB_ENTITY", "variable"}};
    auto s = settings::from_environment();
    CHECK(s.entity == "variable");
    CHECK(s.project == "dir");
    CHECK(s.run_id == "here");
    CHECK(s.username == "global");

    // The same directory under both names is read once.
    const scoped_environment same{{"WANDB_DIR", "./"}};
    write_file("wandb/settings", "oops - invalid format");
    s = settings::from_environment();
    CHECK(s.project == "global");
    CHECK(s.warnings.size() == 1);
  }

  TEST_CASE("an unusable settings file causes a warning, and counts as empty") {
    const machine here;
    here.global_settings("[default]\nentity = e\n");
    here.local_settings("oops - invalid format");
    const auto s = settings::from_environment();
    CHECK(s.entity == "e");
    REQUIRE(s.warnings.size() == 1);
    CHECK(contains(s.warnings[0], "settings\" is not used: line 1: a section header is missing"));
  }

  TEST_CASE("the current run comes from WANDB_RUN_ID, or from the resume file") {
    const machine here;
    const auto resume_file = here.project() / "wandb" / "wandb-resume.json";
    write_file(resume_file, R"({"run_id": "resumed"})");
    CHECK(settings::from_environment().run_id == "");
    {
      const scoped_environment variables{{"WANDB_RESUME", "allow"}};
      CHECK(settings::from_environment().run_id == "");
    }
    const scoped_environment variables{{"WANDB_RESUME", "auto"}};
    CHECK(settings::from_environment().run_id == "resumed");
    {
      const scoped_environment id{{"WANDB_RUN_ID", "chosen"}};
      CHECK(settings::from_environment().run_id == "chosen");
    }
    for (const char* text : {"", "{}", "[]", R"({"run_id": 1})", "{\"run_id\": \"\xff\"}"}) {
      CAPTURE(text);
      write_file(resume_file, text);
      const auto s = settings::from_environment();
      CHECK(s.run_id == "");
      CHECK(s.warnings.size() == 1);
      CHECK_FALSE(s.problem.has_value());
    }
    std::filesystem::remove(resume_file);
    CHECK(settings::from_environment().warnings.empty());
  }

  TEST_CASE("the API key comes from the environment, then netrc, then settings files") {
    const machine here;
    here.global_settings("[default]\napi_key = " + other_key + "\n");
    CHECK(settings::from_environment().api_key == other_key);
    write_file(here.home() / ".netrc", "machine api.wandb.ai login user password " + key);
    CHECK(settings::from_environment().api_key == "");  // the session reads netrc later
    CHECK(settings::from_environment().netrc_file == here.home() / ".netrc");
    const scoped_environment variables{{"WANDB_API_KEY", key}};
    CHECK(settings::from_environment().api_key == key);
  }

  TEST_CASE("the netrc file is NETRC, then ~/.netrc, then ~/_netrc") {
    const machine here;
    write_file(here.home() / "_netrc", "");
    CHECK(settings::from_environment().netrc_file == here.home() / "_netrc");
    write_file(here.home() / ".netrc", "");
    CHECK(settings::from_environment().netrc_file == here.home() / ".netrc");
    const scoped_environment variables{{"NETRC", "~/my netrc"}};
    CHECK(settings::from_environment().netrc_file == here.home() / "my netrc");
  }

  TEST_CASE("the identity token file and the credentials file come from their variables") {
    const machine here;
    const scoped_environment variables{{"WANDB_IDENTITY_TOKEN_FILE", "/run/jwt"},
                                       {"WANDB_CREDENTIALS_FILE", "~/c.json"}};
    const auto s = settings::from_environment();
    CHECK(s.identity_token_file == "/run/jwt");
    CHECK(s.credentials_file == here.home() / "c.json");
    CHECK(problem_of(s) == "");
    const scoped_environment both{{"WANDB_API_KEY", key}};
    CHECK(problem_of(settings::from_environment()) ==
          "WANDB_API_KEY cannot be used: WANDB_IDENTITY_TOKEN_FILE is set too; unset one of them");
  }

  TEST_CASE("a malformed key is a problem, reported without the key") {
    const machine here;
    const scoped_environment variables{{"WANDB_API_KEY", "SECRET\n" + key}};
    const auto told = problem_of(settings::from_environment());
    CHECK(contains(told, "WANDB_API_KEY cannot be used: the API key has control characters"));
    CHECK_FALSE(contains(told, "SECRET"));
  }

  TEST_CASE("SageMaker: secrets.env and hyperparameters, inside a training job only") {
    const machine here;
    const support::scoped_working_directory there(here.project());
    write_file("secrets.env", "WANDB_API_KEY=" + key + "\nWANDB_ENTITY=secret\nWANDB_PROJECT=secret\n");
    CHECK(settings::from_environment().entity == "");
    CHECK(settings::from_environment().api_key == "");

    const scoped_environment job{{"SM_TRAINING_ENV", "{}"}, {"WANDB_PROJECT", "variable"}};
    auto s = settings::from_environment();
    CHECK(s.api_key == key);
    CHECK(s.entity == "secret");
    CHECK(s.project == "variable");
    {
      const scoped_environment parameters{
          {"SM_TRAINING_ENV", R"({"wandb_api_key": "\")" + other_key + R"(\""})"}};
      CHECK(settings::from_environment().api_key == other_key);
    }
    write_file(here.home() / ".netrc", "default password " + key);
    CHECK(settings::from_environment().api_key == "");  // the session reads netrc later
  }

  TEST_CASE("the modes that mean offline") {
    const machine here;
    for (const char* mode : {"offline", "dryrun", "disabled"}) {
      const scoped_environment variables{{"WANDB_MODE", mode}};
      CHECK(settings::from_environment().offline);
    }
    for (const char* mode : {"online", "run", "shared"}) {
      const scoped_environment variables{{"WANDB_MODE", mode}};
      const auto s = settings::from_environment();
      CHECK_FALSE(s.offline);
      CHECK(problem_of(s) == "");
    }
    {
      const scoped_environment variables{{"WANDB_MODE", "Offline"}};
      CHECK(contains(problem_of(settings::from_environment()),
                     "WANDB_MODE cannot be used: expected online, offline"));
    }
    here.global_settings("[default]\nmode = offline\n");
    CHECK(settings::from_environment().offline);
    here.global_settings("[default]\nmode = ofline\n");
    const auto s = settings::from_environment();
    CHECK_FALSE(s.offline);
    CHECK(problem_of(s) == "");
    REQUIRE(s.warnings.size() == 1);
    CHECK(contains(s.warnings[0], "the setting mode of a settings file cannot be used"));
  }

  TEST_CASE("the values that switch certificate checks off") {
    const machine here;
    // [checked against wandb 0.29.0: Settings.insecure_disable_ssl]
    for (const char* yes : {"1", "y", "TRUE", "On", "t", "yes"}) {
      CAPTURE(yes);
      const scoped_environment variables{{"WANDB_INSECURE_DISABLE_SSL", yes}};
      CHECK_FALSE(settings::from_environment().verify_tls);
    }
    for (const char* no : {"0", "No", "f", "false", "OFF", "n"}) {
      CAPTURE(no);
      const scoped_environment variables{{"WANDB_INSECURE_DISABLE_SSL", no}};
      const auto s = settings::from_environment();
      CHECK(s.verify_tls);
      CHECK(problem_of(s) == "");
    }
    for (const char* bad : {"maybe", " 1", "2"}) {
      CAPTURE(bad);
      const scoped_environment variables{{"WANDB_INSECURE_DISABLE_SSL", bad}};
      const auto s = settings::from_environment();
      CHECK(s.verify_tls);
      CHECK(problem_of(s) == "WANDB_INSECURE_DISABLE_SSL cannot be used: expected true or false");
    }
    here.local_settings("[default]\ninsecure_disable_ssl = true\n");
    CHECK_FALSE(settings::from_environment().verify_tls);
  }

  TEST_CASE("timeouts come from the SDK's variables") {
    using namespace std::chrono_literals;
    const machine here;
    for (const char* name :
         {"WANDB_HTTP_TIMEOUT", "WANDB_X_GRAPHQL_TIMEOUT_SECONDS", "WANDB__GRAPHQL_TIMEOUT_SECONDS"}) {
      CAPTURE(name);
      const scoped_environment variables{{name, " 1.5 "}};
      const auto s = settings::from_environment();
      CHECK(s.connect_timeout == 1500ms);
      CHECK(s.idle_timeout == 1500ms);
      CHECK(s.retry_timeout == 15s);
      CHECK(problem_of(s) == "");
    }
    for (const char* bad : {"0", "-1", "abc", "1s", "0.0", "99999999999", "1.x", "1.500x", "1.2.3", "."}) {
      CAPTURE(bad);
      const scoped_environment variables{{"WANDB_HTTP_TIMEOUT", bad}};
      const auto s = settings::from_environment();
      CHECK(s.connect_timeout == settings().connect_timeout);
      CHECK(contains(problem_of(s), "WANDB_HTTP_TIMEOUT cannot be used"));
    }
  }

  TEST_CASE("extra headers come from a JSON object of strings") {
    const machine here;
    for (const char* name : {"WANDB_X_EXTRA_HTTP_HEADERS", "WANDB__EXTRA_HTTP_HEADERS"}) {
      CAPTURE(name);
      const scoped_environment variables{{name, R"({"X-Team": "blue", "Cf-Access": "t=1"})"}};
      const wandb::http_headers wanted{{"Cf-Access", "t=1"}, {"X-Team", "blue"}};
      CHECK(settings::from_environment().extra_headers == wanted);
    }
    for (const char* bad :
         {"x", "[]", R"({"a": 1})", R"({"a b": "c"})", R"({"a": "b\r\nc: d"})", R"({"": "x"})", "{"}) {
      CAPTURE(bad);
      const scoped_environment variables{{"WANDB_X_EXTRA_HTTP_HEADERS", bad}};
      const auto s = settings::from_environment();
      CHECK(s.extra_headers.empty());
      CHECK(contains(problem_of(s), "WANDB_X_EXTRA_HTTP_HEADERS cannot be used"));
    }
    here.global_settings("[default]\nx_extra_http_headers = {\"a\": \"b\"}\n");
    CHECK(settings::from_environment().extra_headers == wandb::http_headers{{"a", "b"}});
  }

  TEST_CASE("username and email come from their variables") {
    const machine here;
    const scoped_environment variables{{"WANDB_USERNAME", "ann"}, {"WANDB_USER_EMAIL", "ann@example.com"}};
    const auto s = settings::from_environment();
    CHECK(s.username == "ann");
    CHECK(s.user_email == "ann@example.com");
  }

  TEST_CASE("CA files and directories come from their variables") {
    const machine here;
    const auto file = write_file(here.home() / "ca.pem", "");
    const auto directory = here.home();
    // SSL_CERT_FILE and SSL_CERT_DIR each replace one of the system's two defaults.
    const std::string system = fs::is_directory("/etc/ssl/certs")       ? "/etc/ssl/certs"
                               : fs::is_directory("/etc/pki/tls/certs") ? "/etc/pki/tls/certs"
                                                                        : "";
    std::string bundle = "/etc/ssl/certs/ca-certificates.crt";  // Debian's path, which Fedora also has
    if (!fs::exists(bundle)) bundle = "/etc/pki/tls/certs/ca-bundle.crt";
    {
      const scoped_environment variables{{"REQUESTS_CA_BUNDLE", file.string()},
                                         {"CURL_CA_BUNDLE", "/curl.pem"}};
      CHECK(settings::from_environment().ca_file == file);
      CHECK(settings::from_environment().ca_directory == "");
      const scoped_environment own{{"SSL_CERT_FILE", "/own.pem"}};
      CHECK(settings::from_environment().ca_file == "/own.pem");
      CHECK(settings::from_environment().ca_directory == system);
    }
    {
      const scoped_environment variables{{"REQUESTS_CA_BUNDLE", directory.string()}};
      CHECK(settings::from_environment().ca_file == "");
      CHECK(settings::from_environment().ca_directory == directory);
      const scoped_environment own{{"SSL_CERT_DIR", "/own.d"}};
      CHECK(settings::from_environment().ca_file == bundle);
      CHECK(settings::from_environment().ca_directory == (system.empty() ? "/own.d" : "/own.d:" + system));
    }
    {
      const scoped_environment both{{"SSL_CERT_FILE", "/own.pem"}, {"SSL_CERT_DIR", "/own.d"}};
      CHECK(settings::from_environment().ca_file == "/own.pem");
      CHECK(settings::from_environment().ca_directory == "/own.d");
    }
    const scoped_environment variables{{"CURL_CA_BUNDLE", "/curl.pem"}};
    CHECK(settings::from_environment().ca_file == "/curl.pem");
    CHECK(settings::from_environment().ca_directory == "");
  }

  TEST_CASE("the cache directory follows WANDB_CACHE_DIR and XDG_CACHE_HOME") {
    const machine here;
    {
      const scoped_environment variables{{"WANDB_CACHE_DIR", "~/c"}};
      CHECK(settings::from_environment().cache_dir == here.home() / "c" / "restore");
    }
#if !defined(_WIN32) && !defined(__APPLE__)
    CHECK(settings::from_environment().cache_dir == here.home() / ".cache" / "wandb" / "restore");
    const scoped_environment variables{{"XDG_CACHE_HOME", "/x"}};
    CHECK(settings::from_environment().cache_dir == "/x/wandb/restore");
#endif
  }

  TEST_CASE("without a home directory no file is looked for in the working directory") {
    const machine here;
    write_file(here.project() / ".netrc", "default password " + key);
    const support::scoped_working_directory there(here.project());
    const scoped_environment variables{{"HOME", std::nullopt},
                                       {"USERPROFILE", std::nullopt},
                                       {"HOMEDRIVE", std::nullopt},
                                       {"HOMEPATH", std::nullopt},
                                       {"LOCALAPPDATA", std::nullopt}};
    const auto s = settings::from_environment();
    CHECK(s.netrc_file == "");
    CHECK(s.credentials_file == "");
    CHECK(s.cache_dir == "");
  }

  TEST_CASE("the first of several problems is reported") {
    const machine here;
    const scoped_environment variables{{"WANDB_MODE", "x"}, {"WANDB_HTTP_TIMEOUT", "x"}};
    CHECK(contains(problem_of(settings::from_environment()), "WANDB_MODE"));
  }
}

TEST_SUITE("API key") {
  TEST_CASE("valid keys are accepted") {
    // [checked against wandb 0.29.0 and 0.31.0: validation.check_api_key]
    for (const std::string& good : {key, "p-" + key, "some_prefix-" + std::string(60, 'A'), "local-" + key,
                                    "-" + key, std::string("a.b.c"), "x-y-" + std::string(38, 'a'),
                                    "p*-" + key, std::string("he_ad.pay-load.s1g")}) {
      CAPTURE(good);
      CHECK(check_api_key(good).has_value());
    }
  }

  TEST_CASE("malformed keys are refused without repeating them") {
    const struct {
      std::string text;
      const char* why;
    } rows[] = {
        {"", "is empty"},
        {std::string(39, 'a'), "has 39 characters"},
        {"some_prefix-" + std::string(39, 'A'), "has 39 characters"},
        {"x-y-" + std::string(37, 'a'), "has 39 characters"},
        {"*", "has other characters"},
        {"a.b.", "has other characters"},
        {key + "." + key, "has other characters"},
        {key + " " + key, "has other characters"},
        {"p\r\n-" + key, "has control characters"},
    };
    for (const auto& row : rows) {
      const auto& text = row.text;
      const auto& why = row.why;
      CAPTURE(text);
      const auto checked = check_api_key(text);
      REQUIRE_FALSE(checked.has_value());
      const std::string told = checked.error().what();
      CHECK(checked.error().code() == wandb::errc::invalid_argument);
      CHECK(contains(told, why));
      CHECK((text.size() < 5 || !contains(told, text)));
    }
  }
}

TEST_SUITE("base URL") {
  TEST_CASE("valid base URLs are accepted, and normalised") {
    // [checked against wandb 0.29.0: Settings.base_url]
    const struct {
      const char* text;
      const char* read;
    } rows[] = {
        {"https://api.wandb.ai", "https://api.wandb.ai/"},
        {"https://api.wandb.ai/", "https://api.wandb.ai/"},
        {"https://api.wandb.ai//", "https://api.wandb.ai/"},
        {"https://api.wandb.ai:443", "https://api.wandb.ai/"},
        {"http://123.123.123.123", "http://123.123.123.123/"},
        {"https://192.168.31.1:8080", "https://192.168.31.1:8080/"},
        {"https://localhost", "https://localhost/"},
        {"https://wandb.ai.other.crazy.domain.com", "https://wandb.ai.other.crazy.domain.com/"},
        {"https://api.qa.wandb.ai", "https://api.qa.wandb.ai/"},
        {"HTTPS://X.com/Base/", "https://x.com/Base"},
        {"https://host/a/b///", "https://host/a/b"},
        {"https://[::1]:80/", "https://[::1]:80/"},
        {"http://wandb.ai.local", "http://wandb.ai.local/"},
        // [checked against wandb 0.31.0: urls.normalize_forge_base_url]
        {"https://api.forge.coreweave.com", "https://api.forge.coreweave.com/"},
        {"https://api.forge.coreweave.com//", "https://api.forge.coreweave.com/"},
        {"https://api.forge.coreweave.com:8443", "https://api.forge.coreweave.com:8443/"},
        {"https://forge.coreweave.com/api/wandb", "https://api.forge.coreweave.com/"},
        {"https://forge.coreweave.com/api/wandb/", "https://api.forge.coreweave.com/"},
        {"https://Forge.CoreWeave.com/api/wandb", "https://api.forge.coreweave.com/"},
        {"https://qa.forge.coreweave.com/api/wandb", "https://api.qa.forge.coreweave.com/"},
        {"https://api.qa.forge.coreweave.com", "https://api.qa.forge.coreweave.com/"},
        {"https://my.forge.coreweave.com", "https://my.forge.coreweave.com/"},
        {"https://forge.coreweave.com.example.org/x", "https://forge.coreweave.com.example.org/x"},
    };
    for (const auto& row : rows) {
      const auto& text = row.text;
      const auto& read = row.read;
      CAPTURE(text);
      const auto parsed = parse_base_url(text);
      REQUIRE(parsed.has_value());
      CHECK(parsed->str() == read);
    }
  }

  TEST_CASE("invalid base URLs are refused") {
    // [checked against wandb 0.29.0]: it accepts those of the last three lines, but cannot use them
    const struct {
      const char* text;
      const char* why;
    } rows[] = {
        {"", "not absolute"},
        {"new", "not absolute"},
        {"//x", "not absolute"},
        {"https:/x", "not absolute"},
        {"https://", "no host"},
        {"ftp://host", "neither http nor https"},
        {"file://wandb.ai", "neither http nor https"},
        {"http://host\t.ai", "control characters"},
        {"http://host\n.ai", "control characters"},
        {"https://wandb.ai\r", "control characters"},
        {" https://x", "space"},
        {"https://x ", "space"},
        {"https://x/a b", "space"},
        {"https://x:99999", "port"},
        {"https://wandb.ai", "did you mean https://api.forge.coreweave.com?"},
        {"https://app.wandb.ai", "did you mean https://api.forge.coreweave.com?"},
        {"http://api.wandb.ai", "http is not secure"},
        {"https://wandb.ai/api.", "did you mean https://api.forge.coreweave.com?"},
        {"https://forge.coreweave.com", "the API of this server is at https://api.forge.coreweave.com"},
        {"https://forge.coreweave.com/wandb", "is at https://api.forge.coreweave.com"},
        {"https://forge.coreweave.com/api/wandb/x", "is at https://api.forge.coreweave.com"},
        {"https://forge.coreweave.com/api/wandbx", "is at https://api.forge.coreweave.com"},
        {"https://forge.coreweave.com/API/wandb", "is at https://api.forge.coreweave.com"},
        {"https://forge.coreweave.com:443/api/wandb", "is at https://api.forge.coreweave.com"},
        {"http://forge.coreweave.com/api/wandb", "is at https://api.forge.coreweave.com"},
        {"https://qa.forge.coreweave.com/", "is at https://api.qa.forge.coreweave.com"},
        // accepted by the SDK, although it refuses http for the service's other name
        {"http://api.forge.coreweave.com", "http is not secure, use https://api.forge.coreweave.com"},
        {"http://api.qa.wandb.ai", "http is not secure, use https://api.qa.forge.coreweave.com"},
        {"https://x/p?q", "query or a fragment"},
        {"https://x/p#f", "query or a fragment"},
        {"https://x/p?token=SECRET", "query or a fragment"},
        {"https://u:SECRET@x/", "a user name or password"},
        {"https://b\xc3\xbc"
         "cher.example",
         "xn--"},
        {"https://x/a/../b", "a segment \"..\""},
        {"https://x/..", "a segment \"..\""},
        {"https://x/a/%2e%2E/b", "a segment \"..\""},
        {"https://x/a%2f..%2fb", "a segment \"..\""},
        {"https://x/a\\..\\b", "a segment \"..\""},
        {"https://x/a%2", "a malformed escape"},
        {"https://x/a%zz", "a malformed escape"},
    };
    for (const auto& row : rows) {
      const auto& text = row.text;
      const auto& why = row.why;
      CAPTURE(text);
      const auto parsed = parse_base_url(text);
      REQUIRE_FALSE(parsed.has_value());
      CHECK(parsed.error().code() == wandb::errc::invalid_argument);
      CHECK(contains(parsed.error().what(), why));
      CHECK_FALSE(contains(parsed.error().what(), "SECRET"));
    }
  }

  TEST_CASE("addresses below the base URL are recognised") {
    const struct {
      const char* base;
      const char* candidate;
      bool below;
    } rows[] = {
        {"https://h", "https://h/graphql", true},
        {"https://h", "https://h", true},
        {"https://h", "https://H:443/x?y=..", true},
        {"https://h:8443", "https://h:8443/x", true},
        {"https://h", "http://h/x", false},
        {"https://h", "https://h:8443/x", false},
        {"https://h", "https://h.evil/x", false},
        {"https://h", "https://evil@h/x", true},
        {"https://h/wandb", "https://h/wandb", true},
        {"https://h/wandb/", "https://h/wandb/graphql", true},
        {"https://h/wandb", "https://h/wandb?x", true},
        {"https://h/wandb", "https://h/wandb-evil/graphql", false},
        {"https://h/wandb", "https://h/Wandb/graphql", false},
        {"https://h/wandb", "https://h/other?/wandb/", false},
        {"https://h/wandb", "https://h/", false},
        {"https://h/wandb", "https://h/wandb/../x", false},
        {"https://h/wandb", "https://h/wandb/%2e%2E/x", false},
        {"https://h/wandb", "https://h/wandb/.%2e/x", false},
        {"https://h/wandb", "https://h/wandb/..%2fx", false},
        {"https://h/wandb", "https://h/wandb/..\\x", false},
        {"https://h/wandb", "https://h/wandb/..%5cx", false},
        {"https://h/wandb", "https://h/wandb/%zz", false},
        {"https://h/wandb", "https://h/wandb/./x/%2e", true},
        {"https://h/wandb", "https://h/wandb/a..b/...", true},
        {"https://h", "https://h/a/../b", false},
        // both names of the service, with and without a port
        {"https://api.forge.coreweave.com", "https://api.wandb.ai/files/x", true},
        {"https://api.wandb.ai", "https://api.forge.coreweave.com/files/x", true},
        {"https://forge.coreweave.com/api/wandb", "https://api.wandb.ai/files/x", true},
        {"https://api.qa.wandb.ai", "https://api.qa.forge.coreweave.com/files/x", true},
        {"https://api.wandb.ai:8443", "https://api.forge.coreweave.com:8443/x", true},
        {"https://api.wandb.ai", "https://api.forge.coreweave.com:8443/x", false},
        {"https://api.wandb.ai", "http://api.forge.coreweave.com/x", false},
        {"https://api.wandb.ai", "https://api.qa.wandb.ai/x", false},
        {"https://api.wandb.ai", "https://forge.coreweave.com/x", false},
        {"https://api.wandb.ai", "https://wandb.ai/x", false},
        {"https://api.wandb.ai/a", "https://api.forge.coreweave.com/x", false},
    };
    for (const auto& row : rows) {
      const auto& base = row.base;
      const auto& candidate = row.candidate;
      const auto& below = row.below;
      CAPTURE(base);
      CAPTURE(candidate);
      const auto parsed = parse_base_url(base);
      REQUIRE(parsed.has_value());
      CHECK(under_base(*parsed, address(candidate)) == below);
    }
  }
}

TEST_SUITE("shared access tokens") {
  using wandb::detail::access_token;
  using wandb::detail::read_shared_token;
  using wandb::detail::write_shared_token;
  using clock = std::chrono::system_clock;

  TEST_CASE("expiry times are UTC, to the second") {
    // [checked against date -u]
    const struct {
      const char* text;
      std::uint64_t seconds;
    } rows[] = {
        {"1970-01-01 00:00:00", 0},          {"2000-02-29 12:34:56", 951827696},
        {"2026-11-21 21:50:00", 1795297800}, {"2024-12-31 23:59:59", 1735689599},
        {"2100-03-01 00:00:00", 4107542400},
    };
    for (const auto& row : rows) {
      const auto& text = row.text;
      const auto& seconds = row.seconds;
      CAPTURE(text);
      const clock::time_point time{std::chrono::seconds(seconds)};
      CHECK(wandb::detail::parse_utc(text) == seconds);
      CHECK(wandb::detail::format_utc(time) == text);
    }
    CHECK(clock::time_point(std::chrono::seconds(wandb::detail::parse_utc("9999-12-31 23:59:59").value())) >
          clock::now());
    for (const char* bad :
         {"", "2026-11-21T21:50:00", "2026-13-21 21:50:00", "2026-11-21 24:50:00", "2026-11-21 21:50:0x",
          "2026-00-21 21:50:00", "2026-11-21 21:50:00Z", "-026-11-21 21:50:00"}) {
      CAPTURE(bad);
      CHECK_FALSE(wandb::detail::parse_utc(bad).has_value());
    }
  }

  TEST_CASE("a token is found until five minutes before it expires") {
    const temporary_directory directory;
    const auto where = directory / "new" / "credentials.json";
    const clock::time_point end{std::chrono::seconds(1795297800)};
    CHECK(read_shared_token(where, "https://a", end).value.empty());
    REQUIRE(write_shared_token(where, "https://a", {"T", end}).has_value());

    const auto token = read_shared_token(where, "https://a", end - std::chrono::seconds(301));
    CHECK(token.value == "T");
    CHECK(token.expires_at == end);
    CHECK(read_shared_token(where, "https://a", end - std::chrono::seconds(300)).value.empty());
    CHECK(read_shared_token(where, "https://b", end - std::chrono::hours(1)).value.empty());
#ifndef _WIN32
    using std::filesystem::perms;
    CHECK((std::filesystem::status(where).permissions() & perms::mask) ==
          (perms::owner_read | perms::owner_write));
#endif
  }

  TEST_CASE("the file has the SDK's format and keeps other entries; no other file is left") {
    const temporary_directory directory;
    const auto where = write_file(directory / "c.json",
                                  R"({"x": [1], "credentials": {
          "https://b": {"expires_at": "2026-01-01 00:00:00", "access_token": "B", "more": 1}}})");
    const clock::time_point end{std::chrono::seconds(1795297800)};
    REQUIRE(write_shared_token(where, "https://a", {"A", end}).has_value());
    const auto written = support::read_file(where);
    CHECK(contains(written, "{\n  \"credentials\": {\n    \"https://a\": {\n"));
    const auto json = nlohmann::json::parse(written);
    CHECK(json == nlohmann::json::parse(R"({"credentials": {
      "https://a": {"expires_at": "2026-11-21 21:50:00", "access_token": "A"},
      "https://b": {"expires_at": "2026-01-01 00:00:00", "access_token": "B", "more": 1}}, "x": [1]})"));
    CHECK(std::distance(std::filesystem::directory_iterator(directory.path()), {}) == 1);
#ifndef _WIN32
    using std::filesystem::perms;
    CHECK((std::filesystem::status(where).permissions() & perms::mask) ==
          (perms::owner_read | perms::owner_write));
#endif
  }

#ifndef _WIN32
  TEST_CASE("a link to the file is kept") {
    const temporary_directory directory;
    const auto real = write_file(directory / "real.json", "{}");
    std::filesystem::create_symlink(real, directory / "link.json");
    REQUIRE(
        write_shared_token(directory / "link.json", "https://a", {"A", clock::now() + std::chrono::hours(1)})
            .has_value());
    CHECK(std::filesystem::is_symlink(directory / "link.json"));
    CHECK_FALSE(read_shared_token(real, "https://a", clock::now()).value.empty());
  }
#endif

  TEST_CASE("a malformed file has no token, and is replaced") {
    const temporary_directory directory;
    const auto later = clock::now() + std::chrono::hours(1);
    for (
        const char* text :
        {"", "x", "[]", R"({"credentials": 1})", R"({"credentials": {"https://a": 1}})",
         R"({"credentials": {"https://a": {"expires_at": 1, "access_token": "A"}}})",
         R"({"credentials": {"https://a": {"expires_at": "2999-01-01 00:00:00", "access_token": 1}}})",
         R"({"credentials": {"https://a": {"expires_at": "2999-01-01 00:00:00", "access_token": "a\r\nb"}}})",
         R"({"credentials": {"https://a": {"expires_at": "soon", "access_token": "A"}}})",
         R"({"credentials": {"https://a": {"expires_at": "yyyy-01-01 00:00:00", "access_token": "A"}}})"}) {
      CAPTURE(text);
      const auto where = write_file(directory / "c.json", text);
      CHECK(read_shared_token(where, "https://a", clock::now()).value.empty());
      REQUIRE(write_shared_token(where, "https://a", {"A", later}).has_value());
      CHECK_FALSE(read_shared_token(where, "https://a", clock::now()).value.empty());
    }
  }

  TEST_CASE("a file that cannot be read is left alone") {
    const temporary_directory directory;
    const auto result = write_shared_token(directory.path(), "https://a", {"A", clock::now()});
    REQUIRE_FALSE(result.has_value());
    CHECK(result.error().code() == wandb::errc::disk_failure);
    CHECK(std::filesystem::is_directory(directory.path()));
  }
}
