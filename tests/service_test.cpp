// The queries to the service, and every form of answer from the service, an old version of it, or another server in its place.
#include "restore_fixture.hpp"

#include <functional>
#include <nlohmann/json.hpp>
#include <optional>

using namespace restore_tests;
using nlohmann::json;
using stand_in::origin;
using wandb::errc;

namespace {

const std::string text = "the bytes of the file";
const std::string text_md5 = stand_in::md5_hex(*stand_in::bytes(text));

/// Builds an answer of the service about the files of a run.
std::string answer(const json& edges) {
  return json{{"data", {{"project", {{"run", {{"files", {{"edges", edges}}}}}}}}}}.dump();
}
std::string answer_node(const json& node) { return answer(json::array({json{{"node", node}}})); }

/// Returns the first part that is missing or out of order in a text, or "".
std::string in_order(const std::string& told, const std::vector<std::string>& parts) {
  std::size_t end = 0;
  for (const auto& part : parts) {
    const auto found = told.find(part, end);
    if (found == told.npos) return part;
    end = found + part.size();
  }
  return "";
}

std::string asked_url(fixture& f, const std::string& name = "a.txt") {
  return f.server.files_url(f.run, name);
}

}  // namespace

TEST_SUITE("service: the query") {
  TEST_CASE("one query, as the SDK sends it, has all properties that a restore needs") {
    fixture f;
    f.server.add_file(f.run, "sub/a \"b\".txt", text);
    auto s = f.settings();
    s.username = "somebody";
    s.user_email = "somebody@example.invalid";
    (void)f.success(wandb::client<>(s).try_restore("sub/a \"b\".txt", f.path));

    const auto questions = f.server.requests(request_kind::graphql);
    REQUIRE(questions.size() == 1);
    const auto& asked = questions[0];
    CHECK(asked.method == "POST");
    CHECK(asked.header("Content-Type") == "application/json");
    CHECK(asked.header("Use-Admin-Privileges") == "true");
    CHECK(asked.header("X-WANDB-USERNAME") == "somebody");
    CHECK(asked.header("X-WANDB-USER-EMAIL") == "somebody@example.invalid");
    CHECK(asked.header("Accept-Encoding") == "identity");
    CHECK(asked.header("User-Agent") == "wandb_restore.hpp/" WANDB_RESTORE_VERSION);
    const json body = json::parse(asked.body);
    const json variables = body.at("variables");
    CHECK(variables.at("entity") == "vanpelt");
    CHECK(variables.at("project") == "my-project");
    CHECK(variables.at("name") == "a1b2c3d");
    CHECK(variables.at("fileNames") == json::array({"sub/a \"b\".txt"}));
    for (const char* name :
         {"$project", "$entity", "$name", "$fileNames", "$fileCursor", "$fileLimit", "$pattern"}) {
      CHECK(contains(body.at("query").get<std::string>(), name));
    }
  }

  TEST_CASE("username and email are sent with the service's queries alone") {
    fixture f;
    f.server.add_file(f.run, "a.txt", text);
    auto s = f.settings();
    s.username = "somebody";
    s.user_email = "somebody@example.invalid";
    s.user_agent = "my-trainer/7";
    (void)f.success(wandb::client<>(s).try_restore("a.txt", f.path));
    for (const auto& one : f.server.requests()) {
      CAPTURE(one.path);
      CHECK(one.header("User-Agent") == "my-trainer/7");
      if (one.kind == request_kind::graphql) continue;
      CHECK_FALSE(one.header("X-WANDB-USERNAME").has_value());
      CHECK_FALSE(one.header("X-WANDB-USER-EMAIL").has_value());
      CHECK_FALSE(one.header("Use-Admin-Privileges").has_value());
    }
  }

  TEST_CASE("without username and email no such header is sent") {
    fixture f;
    f.server.add_file(f.run, "a.txt", text);
    (void)f.success(f.client().try_restore("a.txt", f.path));
    const auto asked = f.server.requests(request_kind::graphql).at(0);
    CHECK_FALSE(asked.header("X-WANDB-USERNAME").has_value());
    CHECK_FALSE(asked.header("X-WANDB-USER-EMAIL").has_value());
  }

  TEST_CASE("a base URL with a prefix and trailing slashes works") {
    stand_in::options how;
    how.prefix = "/wandb";
    fixture f(how);
    f.server.add_file(f.run, "a.txt", text);
    for (const char* slashes : {"", "/", "///"}) {
      CAPTURE(std::string(slashes));
      auto s = f.settings();
      s.base_url += slashes;
      f.server.clear_log();
      (void)f.success(wandb::client<>(s).try_restore("a.txt", f.path, true));
      CHECK(f.server.requests().at(0).path == "/wandb/graphql");
      CHECK(f.asked() == "graphql 1, files 1, storage 1");
    }
  }

  TEST_CASE("a server that does not know all fields of the query is supported") {
    stand_in::options how;
    how.unknown_fields = {"internalId"};
    fixture f(how);
    f.server.add_file(f.run, "a.txt", text);
    auto client = f.client();
    CHECK(f.success(client.try_restore("a.txt", f.path)).verified());
    CHECK(f.success(client.try_list_files(f.options())).size() == 1);
  }
}

TEST_SUITE("service: answers that lead to the file") {
  TEST_CASE("every form of a node is understood") {
    struct row {
      const char* what;
      std::function<json(fixture&)> node;
      bool verified;
      const char* asked;
    };
    const auto with = [](const char* key, json value) {
      return [=](fixture& f) {
        json node = {{"id", "1"},
                     {"name", "a.txt"},
                     {"url", asked_url(f)},
                     {"sizeBytes", text.size()},
                     {"md5", text_md5}};
        node[key] = value;
        return node;
      };
    };
    const std::string once = "graphql 1, files 1, storage 1", direct = "graphql 1, files 0, storage 1";
    const std::vector<row> table = {
        {"id, name and directUrl alone",
         [](fixture& f) {
           return json{{"id", "1"}, {"name", "a.txt"}, {"directUrl", f.server.signed_url(f.run, "a.txt")}};
         },
         false, direct.c_str()},
        {"url null, directUrl there",
         [](fixture& f) {
           return json{{"name", "a.txt"},
                       {"url", nullptr},
                       {"directUrl", f.server.signed_url(f.run, "a.txt")},
                       {"md5", text_md5}};
         },
         true, direct.c_str()},
        {"url alone",
         [](fixture& f) {
           return json{{"name", "a.txt"}, {"url", asked_url(f)}};
         },
         false, once.c_str()},
        {"no name",
         [](fixture& f) {
           return json{{"url", asked_url(f)}};
         },
         false, once.c_str()},
        {"url relative to the origin", with("url", "/files/vanpelt/my-project/a1b2c3d/a.txt"), true,
         once.c_str()},
        {"directUrl null", with("directUrl", nullptr), true, once.c_str()},
        {"size as a string", with("sizeBytes", std::to_string(text.size())), true, once.c_str()},
        {"size null", with("sizeBytes", nullptr), true, once.c_str()},
        {"size 0 for null", with("sizeBytes", 0), true, once.c_str()},
        {"size of no sense", with("sizeBytes", "many"), true, once.c_str()},
        {"size below zero", with("sizeBytes", -1), true, once.c_str()},
        {"size true", with("sizeBytes", true), true, once.c_str()},
        {"md5 in base64", with("md5", stand_in::md5_base64(*stand_in::bytes(text))), true, once.c_str()},
        {"md5 in capital hex",
         with("md5",
              [] {
                std::string capital = text_md5;
                for (char& c : capital) c = static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
                return capital;
              }()),
         true, once.c_str()},
        {"md5 null", with("md5", nullptr), false, once.c_str()},
        {"md5 empty", with("md5", ""), false, once.c_str()},
        {"md5 junk", with("md5", "XXX"), false, once.c_str()},
        {"md5 of another length", with("md5", "c2hvcnQ="), false, once.c_str()},
        {"md5 a number", with("md5", 7), false, once.c_str()},
        {"updatedAt null", with("updatedAt", nullptr), true, once.c_str()},
        {"fields of tomorrow", with("sha512", json{{"value", {1, 2, 3}}}), true, once.c_str()},
    };
    fixture f;
    f.server.add_file(f.run, "a.txt", text);
    auto client = f.client();
    for (const row& r : table) {
      CAPTURE(std::string(r.what));
      f.server.clear_faults();
      f.server.add_fault(place::graphql, act::body(answer_node(r.node(f))));
      f.server.clear_log();
      auto file = f.success(client.try_restore("a.txt", f.path, true));
      CHECK(read_all(file) == text);
      CHECK(file.size() == text.size());
      CHECK(file.verified() == r.verified);
      CHECK(file.md5() == (r.verified ? text_md5 : ""));
      CHECK(f.asked() == r.asked);
    }
  }

  TEST_CASE("an impossible size is a protocol_violation") {
    fixture f;
    f.server.add_file(f.run, "a.txt", text);
    const std::uint64_t most = std::uint64_t{1} << 46;
    for (const std::uint64_t size : {most + 1, std::uint64_t{1} << 61, UINT64_MAX}) {
      CAPTURE(size);
      f.server.clear_faults();
      f.server.add_fault(
          place::graphql,
          act::body(answer_node(
              {{"name", "a.txt"}, {"url", asked_url(f)}, {"sizeBytes", size}, {"md5", text_md5}})));
      const auto failure = f.failure(f.client().try_restore("a.txt", f.path), errc::protocol_violation);
      CHECK(contains(failure.what(), "impossible size: " + std::to_string(size) + " bytes"));
    }
  }

  TEST_CASE("every form of md5 and size is understood") {
    using stand_in::md5_form;
    using stand_in::size_form;
    fixture f;
    auto client = f.client();
    for (const auto md5 : {md5_form::base64, md5_form::hex, md5_form::null, md5_form::absent}) {
      for (const auto size : {size_form::number, size_form::string, size_form::null, size_form::absent}) {
        CAPTURE(static_cast<int>(md5));
        CAPTURE(static_cast<int>(size));
        stand_in::file_attributes told;
        told.md5_as = md5;
        told.size_as = size;
        f.server.add_file(f.run, "a.txt", text, told);
        auto file = f.success(client.try_restore("a.txt", f.path, true));
        CHECK(read_all(file) == text);
        CHECK(file.verified() == (md5 == md5_form::base64 || md5 == md5_form::hex));
      }
    }
  }

  TEST_CASE("the node is found by its name among other nodes") {
    fixture f;
    f.server.add_file(f.run, "a.txt", text);
    f.server.add_fault(
        place::graphql,
        act::body(answer(json::array({nullptr, json{{"node", nullptr}}, json{{"cursor", "x"}},
                                      json{{"node", {{"name", "b.txt"}, {"url", asked_url(f, "b.txt")}}}},
                                      json{{"node", {{"name", "a.txt"}, {"url", asked_url(f)}}}}}))));
    auto file = f.success(f.client().try_restore("a.txt", f.path));
    CHECK(read_all(file) == text);
  }

  TEST_CASE("an answer about another run or project is refused") {
    fixture f;
    f.server.add_file(f.run, "a.txt", text);
    auto client = f.client();
    (void)f.success(client.try_restore("a.txt", f.path));
    const json question = json::parse(f.server.requests(request_kind::graphql).at(0).body);
    const std::string query = question.at("query");
    CHECK(contains(query, "{ name run(name: $name) { name state fileCount"));
    // A database that ignores case returns the run's own spelling.
    for (const json& names : {json{{"project", "my-project"}, {"run", "a1b2c3d"}},
                              json{{"project", "My-Project"}, {"run", "A1B2C3D"}},
                              json{{"project", nullptr}, {"run", 7}}, json{{"project", ""}, {"run", ""}}}) {
      CAPTURE(names.dump());
      json body = json::parse(answer_node({{"name", "a.txt"}, {"url", asked_url(f)}}));
      body["data"]["project"]["name"] = names.at("project");
      body["data"]["project"]["run"]["name"] = names.at("run");
      f.server.clear_faults();
      f.server.add_fault(place::graphql, act::body(body.dump()));
      (void)f.success(client.try_restore("a.txt", f.path, true));
    }
    f.server.clear_faults();
    f.server.add_fault(
        place::graphql,
        act::body(
            R"({"data":{"project":{"run":{"name":"other","files":{"edges":[{"node":{"name":"b"}}]}}}}})"));
    check_names(f.failure(client.try_list_files(f.options()), errc::protocol_violation),
                {"the run \"other\"", f.path});
  }

  TEST_CASE("a file is requested by its given name, and if that does not exist by its normalised path") {
    fixture f;
    auto client = f.client();
    f.server.add_file(f.run, "d//g.txt", "two slashes");
    f.server.add_file(f.run, "./x", "dot");
    f.server.add_file(f.run, "y", "plain");
    for (const auto& listed : f.success(client.try_list_files(f.options()))) {
      CAPTURE(listed.name);
      f.server.clear_log();
      auto file = f.success(client.try_restore(listed.name, f.options(true)));
      CHECK(file.verified());
      CHECK(file.path() == f.root() / listed.name);
      CHECK(f.asked() == "graphql 1, files 1, storage 1");
    }
    CHECK(read_file(f.root() / "d" / "g.txt") == "two slashes");
    CHECK(read_file(f.root() / "x") == "dot");
    f.server.clear_log();
    auto file = f.success(client.try_restore(".//y", f.options(true)));
    CHECK(read_all(file) == "plain");
    CHECK(f.asked() == "graphql 1, files 1, storage 1");
    CHECK(json::parse(f.server.requests(request_kind::graphql).at(0).body).at("variables").at("fileNames") ==
          json::array({".//y", "y"}));
    // If both exist, the given name is used.
    f.server.add_file(f.run, "d/g.txt", "one slash");
    (void)f.success(client.try_restore("d//g.txt", f.options(true)));
    CHECK(read_file(f.root() / "d" / "g.txt") == "two slashes");
    (void)f.success(client.try_restore("d/g.txt", f.options(true)));
    CHECK(read_file(f.root() / "d" / "g.txt") == "one slash");
    check_names(f.failure(client.try_restore("./none", f.options(true)), errc::file_not_found),
                {"\"./none\""});
  }

  TEST_CASE("an empty or null list of errors is no error") {
    fixture f;
    f.server.add_file(f.run, "a.txt", text);
    auto client = f.client();
    for (const json& errors : {json::array(), json()}) {
      json body = json::parse(answer_node({{"name", "a.txt"}, {"url", asked_url(f)}}));
      body["errors"] = errors;
      f.server.clear_faults();
      f.server.add_fault(place::graphql, act::body(body.dump()));
      (void)f.success(client.try_restore("a.txt", f.path, true));
    }
  }

  TEST_CASE("addresses are used unchanged; spaces and bytes beyond ASCII are encoded") {
    const std::string name = "gr\xc3\xbc\xc3\x9f mod\xe6\xa8\xa1 50%.h5";
    fixture f;
    stand_in::file_attributes raw;
    raw.url = "/files/vanpelt/my-project/a1b2c3d/gr\xc3\xbc\xc3\x9f mod\xe6\xa8\xa1 50%25.h5";
    f.server.add_file(f.run, name, text, raw);
    auto file = f.success(f.client().try_restore(name, f.path));
    CHECK(read_all(file) == text);
    CHECK(f.server.requests(request_kind::files).at(0).target ==
          "/files/vanpelt/my-project/a1b2c3d/gr%C3%BC%C3%9F%20mod%E6%A8%A1%2050%25.h5");
  }

  TEST_CASE("every kind of redirect leads to the bytes") {
    using stand_in::redirect;
    struct row {
      redirect to;
      int status;
      const char* asked;
    };
    const std::vector<row> table = {
        {redirect::absolute, 302, "graphql 1, files 1, storage 1"},
        {redirect::absolute, 301, "graphql 1, files 1, storage 1"},
        {redirect::absolute, 303, "graphql 1, files 1, storage 1"},
        {redirect::absolute, 307, "graphql 1, files 1, storage 1"},
        {redirect::absolute, 308, "graphql 1, files 1, storage 1"},
        {redirect::relative, 302, "graphql 1, files 2, storage 0"},
        {redirect::chain, 302, "graphql 1, files 4, storage 1"},
        {redirect::none, 302, "graphql 1, files 1, storage 0"},
    };
    fixture f;
    f.server.add_file(f.run, "a.txt", text);
    auto client = f.client();
    for (const row& r : table) {
      CAPTURE(static_cast<int>(r.to));
      CAPTURE(r.status);
      f.server.set_redirect(r.to, 3, r.status);
      f.server.clear_log();
      auto file = f.success(client.try_restore("a.txt", f.path, true));
      CHECK(read_all(file) == text);
      CHECK(f.asked() == r.asked);
    }
  }

  TEST_CASE("user info and query of an address do not appear in texts") {
    fixture f;
    f.server.add_file(f.run, "a.txt", stand_in::generated(10, 1));
    f.server.add_fault(place::graphql, act::body(answer_node(
                                           {{"name", "a.txt"}, {"url", "s3://key:hidden-secret@bucket/a"}})));
    const auto failure = f.failure(f.client().try_restore("a.txt", f.path), errc::protocol_violation);
    CHECK(std::string(failure.what()).find("hidden-secret") == std::string::npos);
    check_names(failure, {"s3://", "bucket/a"});
  }

  TEST_CASE("plain HTTP addresses are accepted if the base URL is plain HTTP") {
    stand_in::options how;
    how.service_tls = how.storage_tls = false;
    fixture f(how);
    f.server.add_file(f.run, "a.txt", text);
    auto file = f.success(f.client().try_restore("a.txt", f.path));
    CHECK(read_all(file) == text);
  }
}

TEST_SUITE("service: answers that lead to no file") {
  TEST_CASE("every unusable answer of status 200 has its error") {
    struct row {
      const char* what;
      std::string body;
      errc code;
      std::vector<std::string> names;
    };
    const auto address = [](const char* url) {
      return answer_node({{"name", "a.txt"}, {"url", url}, {"md5", text_md5}});
    };
    const std::vector<row> table = {
        {"project null",
         R"({"data":{"project":null}})",
         errc::run_not_found,
         {"vanpelt/my-project", "127.0.0.1", "run path"}},
        {"run null",
         R"({"data":{"project":{"run":null}}})",
         errc::run_not_found,
         {fixture::path, "127.0.0.1", "run path"}},
        {"no edges", answer(json::array()), errc::file_not_found, {"a.txt", fixture::path, "no such file"}},
        {"another file's edge",
         answer_node({{"name", "b.txt"}, {"url", "https://x/"}}),
         errc::protocol_violation,
         {"a.txt", "the file \"b.txt\"", "127.0.0.1"}},
        {"another run's files",
         R"({"data":{"project":{"name":"my-project","run":{"name":"a1b2c3e","files":{"edges":[
            {"node":{"name":"a.txt","url":"https://x/"}}]}}}}})",
         errc::protocol_violation,
         {"the run \"a1b2c3e\"", "127.0.0.1"}},
        {"another run that has no such file",
         R"({"data":{"project":{"run":{"name":"a1b2c3e","files":{"edges":[]}}}}})",
         errc::protocol_violation,
         {"the run \"a1b2c3e\""}},
        {"another project's run of that name",
         R"({"data":{"project":{"name":"other","run":{"name":"a1b2c3d","files":{"edges":[]}}}}})",
         errc::protocol_violation,
         {"the project \"other\""}},
        {"another project without the run",
         R"({"data":{"project":{"name":"other","run":null}}})",
         errc::protocol_violation,
         {"the project \"other\""}},
        {"md5 0",
         answer_node({{"name", "a.txt"}, {"md5", "0"}, {"sizeBytes", 0}, {"url", "https://x/"}}),
         errc::file_not_found,
         {"a.txt", "never uploaded"}},
        {"no address", answer_node({{"name", "a.txt"}}), errc::protocol_violation, {"address"}},
        {"empty addresses",
         answer_node({{"name", "a.txt"}, {"url", ""}, {"directUrl", ""}}),
         errc::protocol_violation,
         {"address"}},
        {"a reference into a bucket",
         address("s3://bucket/key?X-Signature=1"),
         errc::protocol_violation,
         {"s3://bucket/key", "reference"}},
        {"a reference to a local file",
         address("file:///etc/passwd"),
         errc::protocol_violation,
         {"file:///etc/passwd"}},
        {"another scheme", address("ftp://127.0.0.1/a"), errc::protocol_violation, {"ftp://127.0.0.1/a"}},
        {"a scheme that begins as http does", address("httpx://127.0.0.1/a"), errc::protocol_violation, {}},
        {"a scheme without slashes", address("data:text/plain,hello"), errc::protocol_violation, {}},
        {"plain http under https",
         address("http://127.0.0.1:1/a?X-Signature=1"),
         errc::protocol_violation,
         {"http://127.0.0.1:1/a", "https"}},
        {"a line break in the address",
         address("https://127.0.0.1/a\r\nX-Evil: 1"),
         errc::protocol_violation,
         {"control"}},
        {"a NUL in the address",
         answer_node({{"name", "a.txt"}, {"url", std::string("https://127.0.0.1/a\0b", 21)}}),
         errc::protocol_violation,
         {"control"}},
        {"a tab in the address", address("https://127.0.0.1/a\tb"), errc::protocol_violation, {"control"}},
        {"no host", address("https:///a"), errc::protocol_violation, {}},
        {"a bad port", address("https://127.0.0.1:99999/a"), errc::protocol_violation, {}},
        {"nothing", "", errc::protocol_violation, {"JSON", "base URL"}},
        {"cut off", R"({"data":{"project":{"run")", errc::protocol_violation, {"JSON"}},
        {"a page", "<html><body>Welcome</body></html>", errc::protocol_violation, {"base URL"}},
        {"a list", "[]", errc::protocol_violation, {}},
        {"a word", "\"yes\"", errc::protocol_violation, {}},
        {"two documents", "{}{}", errc::protocol_violation, {}},
        {"an empty object", "{}", errc::protocol_violation, {}},
        {"objects nested without measure",
         [] {
           std::string text;
           for (int i = 0; i < 100'000; ++i) text += R"({"a":)";
           return text + "1" + std::string(100'000, '}');
         }(),
         errc::protocol_violation,
         {"JSON", "base URL"}},
        {"lists nested without measure where the files should be",
         R"({"data":{"project":{"run":{"files":{"edges":)" + std::string(100'000, '[') +
             std::string(100'000, ']') + "}}}}}",
         errc::protocol_violation,
         {"JSON"}},
        {"data null", R"({"data":null})", errc::protocol_violation, {}},
        {"data a list", R"({"data":[]})", errc::protocol_violation, {}},
        {"no project", R"({"data":{"viewer":null}})", errc::protocol_violation, {}},
        {"project a list", R"({"data":{"project":[{"run":"none"},7]}})", errc::protocol_violation, {}},
        {"project a word", R"({"data":{"project":"p"}})", errc::protocol_violation, {}},
        {"no run", R"({"data":{"project":{}}})", errc::protocol_violation, {}},
        {"run a word", R"({"data":{"project":{"run":"r"}}})", errc::protocol_violation, {}},
        {"no files", R"({"data":{"project":{"run":{}}}})", errc::protocol_violation, {}},
        {"files null", R"({"data":{"project":{"run":{"files":null}}}})", errc::protocol_violation, {}},
        {"edges no list",
         R"({"data":{"project":{"run":{"files":{"edges":{}}}}}})",
         errc::protocol_violation,
         {}},
        {"errors: not found",
         R"({"errors":[{"message":"project not found"}],"data":{"project":null}})",
         errc::run_not_found,
         {"project not found", "127.0.0.1"}},
        {"errors: could not find",
         R"({"errors":[{"message":"could not find run"}]})",
         errc::run_not_found,
         {"could not find run"}},
        {"errors: something else not found",
         R"({"errors":[{"message":"PersistedQueryNotFound: query not found"}]})",
         errc::http_failure,
         {}},
        {"errors: permission denied",
         R"({"errors":[{"message":"permission denied"}]})",
         errc::permission_denied,
         {"permission denied"}},
        {"errors: several", R"({"errors":["one",{"message":"two"}]})", errc::http_failure, {"one; two"}},
        {"errors beside data",
         R"({"errors":[{"message":"half of it failed"}],"data":{"project":{"run":{"files":{"edges":[]}}}}})",
         errc::http_failure,
         {"half of it failed"}},
        {"error: a word", R"({"error":"out of order"})", errc::http_failure, {"out of order"}},
        {"error: a message", R"({"error":{"message":"out of order"}})", errc::http_failure, {"out of order"}},
        {"errors without a message",
         R"({"errors":[{"path":["x"]}],"data":{"project":null}})",
         errc::http_failure,
         {}},
    };
    fixture f;
    f.server.add_file(f.run, "a.txt", text);
    write_file(f.root() / "a.txt", "old");
    auto client = f.client();
    for (const row& r : table) {
      CAPTURE(std::string(r.what));
      f.server.clear_faults();
      f.server.add_fault(place::graphql, act::body(r.body));
      f.server.clear_log();
      const auto failure = f.failure(client.try_restore("a.txt", f.path, true), r.code);
      check_names(failure, {"a.txt", "a1b2c3d"});
      check_names(failure, r.names);
      CHECK_FALSE(failure.is_transient());
      CHECK_FALSE(contains(failure.what(), "\n"));
      // Only a missing name causes a second query, for the existing names.
      CHECK(f.asked() == (r.code == errc::file_not_found ? "graphql 2, files 0, storage 0"
                                                         : "graphql 1, files 0, storage 0"));
      CHECK(visible(f.root()) == names{"a.txt"});
      CHECK(read_file(f.root() / "a.txt") == "old");
    }
  }

  TEST_CASE("a missing name: the error suggests the nearest names, or says that the name is a directory") {
    struct row {
      const char* name;
      std::vector<std::string> told;  ///< expected parts, in this order
      std::vector<std::string> untold;
    };
    const std::vector<row> table = {
        {"modle-best.h5", {"did you mean \"model-best.h5\"?"}, {"config.yaml"}},
        {"model-best.hdf5", {"did you mean \"model-best.h5\""}, {}},
        {"Model-Best.H5", {"did you mean \"model-best.h5\"?"}, {}},
        {"best.h5", {"did you mean \"ckpt/best.h5\""}, {"config.yaml"}},
        {"ckpts/best.h5", {"did you mean \"ckpt/best.h5\""}, {}},
        {"epoch-04.h5", {"did you mean \"epoch-01.h5\", \"epoch-02.h5\" or \"epoch-03.h5\"?"}, {"epoch-05"}},
        {"ckpt",
         {"\"ckpt\" is a directory of the run: restore_all", "\"ckpt/\"", "wandb-restore 'ckpt/'"},
         {"did you mean"}},
        {"./ckpt", {"\"ckpt\" is a directory of the run"}, {"did you mean"}},
        {"it's", {"\"it's\" is a directory of the run: restore_all", "\"it's/\""}, {"wandb-restore"}},
        {"something-else-entirely", {"--list"}, {"did you mean", "directory"}},
    };
    for (const bool node_for_missing : {true, false}) {
      CAPTURE(node_for_missing);
      stand_in::options how;
      how.node_for_missing = node_for_missing;
      fixture f(how);
      for (const char* name : {"model-best.h5", "config.yaml", "ckpt/best.h5", "ckpt/last.h5", "epoch-01.h5",
                               "epoch-02.h5", "epoch-03.h5", "epoch-05.h5", "it's/a.txt"})
        f.server.add_file(f.run, name, text);
      auto client = f.client();
      for (const row& r : table) {
        CAPTURE(std::string(r.name));
        f.server.clear_log();
        const auto failure = f.failure(client.try_restore(r.name, f.path), errc::file_not_found);
        check_names(failure, {in_order(failure.what(), r.told), "127.0.0.1", f.path});
        for (const auto& part : r.untold) CHECK_FALSE(contains(failure.what(), part));
        CHECK(contains(failure.what(), "never uploaded") == node_for_missing);
        CHECK(contains(failure.what(), "try again later") == node_for_missing);
        CHECK(contains(failure.what(), "no such file") == !node_for_missing);
        CHECK(f.asked() == "graphql 2, files 0, storage 0");
      }
      CHECK(visible(f.root()).empty());
    }
  }

  TEST_CASE("a missing name in a run without files, or with more than a page of files") {
    fixture f;
    auto client = f.client();
    check_names(f.failure(client.try_restore("a.txt", f.path), errc::file_not_found),
                {"the run has no files"});
    for (int i = 0; i < 1201; ++i) f.server.add_file(f.run, "f" + std::to_string(10000 + i), "x");
    f.server.clear_log();
    check_names(f.failure(client.try_restore("f1000", f.path), errc::file_not_found), {"f10000"});
    CHECK(f.asked() == "graphql 2, files 0, storage 0");
  }

  TEST_CASE("long names and control characters from a server are shortened, escaped or left out") {
    fixture f;
    f.server.add_file(f.run, "a.txt\x1b[31m", "x");
    f.server.add_file(f.run, std::string(5000, 'a'), "x");
    const auto failure = f.failure(f.client().try_restore("a.txt", f.path), errc::file_not_found);
    CHECK_FALSE(contains(failure.what(), "\x1b"));
    CHECK(std::string(failure.what()).size() < 1000);
  }

  TEST_CASE("a failed query for suggestions does not change the error, and is not retried") {
    for (const auto& fault : {act::status(500), act::status(401), act::malformed_json(), act::drop()}) {
      fixture f;
      f.server.add_file(f.run, "b.txt", text);
      f.server.add_fault(target(place::graphql).from(2), fault);
      const auto failure = f.failure(f.client().try_restore("a.txt", f.path), errc::file_not_found);
      CHECK_FALSE(contains(failure.what(), "did you mean"));
      CHECK(f.server.requests(request_kind::graphql).size() == 2);
    }
  }

  TEST_CASE("short values of extra headers are not removed from the service's texts") {
    fixture f;
    auto s = f.settings();
    s.extra_headers = {{"X-Region", "u"}, {"X-Ticket", "run not found"}};
    wandb::client<> client(s);
    for (const int status : {200, 404}) {
      CAPTURE(status);
      f.server.clear_faults();
      f.server.add_fault(place::graphql,
                         act::status(status, {}, R"({"errors":[{"message":"run not found, ours"}]})"));
      const auto failure = f.failure(client.try_restore("a.txt", f.path), errc::run_not_found);
      check_names(failure, {"***, ours"});
      CHECK_FALSE(contains(failure.what(), "run not found"));
    }
  }

  TEST_CASE("every status other than 200 has its error") {
    struct row {
      int status;
      std::string body;
      errc code;
      std::vector<std::string> names;
    };
    const std::vector<row> table = {
        {404, R"({"error":"project not found"})", errc::run_not_found, {"project not found"}},
        {404, R"({"errors":[{"message":"project not found"}]})", errc::run_not_found, {"project not found"}},
        {404, R"({"error":"file not found"})", errc::file_not_found, {"file not found"}},
        {404,
         R"({"error":"not found"})",
         errc::http_failure,
         {"base URL"}},  // the text of a router: not a missing run
        {404, "<html>no such page</html>", errc::http_failure, {"base URL"}},
        {404, "", errc::http_failure, {"base URL"}},
        {403, R"({"errors":["permission denied"]})", errc::permission_denied, {"permission denied"}},
        {403, R"({"error":{"message":"forbidden"}})", errc::permission_denied, {"forbidden"}},
        {403, "<html>no entry</html>", errc::permission_denied, {}},
        {401, "<html>who are you</html>", errc::not_authenticated, {"WANDB_API_KEY"}},
        {400, R"({"errors":[{"message":"Cannot query field"}]})", errc::http_failure, {"Cannot query field"}},
        {400, R"({"errors":["permission denied"]})", errc::permission_denied, {"permission denied"}},
        {409, R"({"error":"conflict"})", errc::http_failure, {"conflict"}},
        {410, R"({"error":"gone"})", errc::http_failure, {"gone"}},
        {413, "", errc::http_failure, {}},
        {418, "short and stout", errc::http_failure, {}},
        {422, R"({"errors":["one",{"message":"two"}]})", errc::http_failure, {"one; two"}},
        {501, "", errc::http_failure, {}},
        {302, "", errc::http_failure, {}},  // a redirect without a Location
        {204, "", errc::http_failure, {}},
    };
    fixture f;
    f.server.add_file(f.run, "a.txt", text);
    auto client = f.client();
    for (const row& r : table) {
      CAPTURE(r.status);
      CAPTURE(r.body);
      f.server.clear_faults();
      f.server.add_fault(place::graphql, act::status(r.status, {}, r.body));
      f.server.clear_log();
      const auto failure = f.failure(client.try_restore("a.txt", f.path), r.code);
      CHECK(failure.http_status() == r.status);
      check_names(failure, {"a.txt", f.path, "127.0.0.1", std::to_string(r.status)});
      check_names(failure, r.names);
      CHECK_FALSE(failure.is_transient());
      CHECK(f.asked() == "graphql 1, files 0, storage 0");
    }
  }

  TEST_CASE("transient statuses are retried") {
    struct row {
      const char* what;
      stand_in::action fault;
    };
    const std::vector<row> table = {
        {"Server down",
         act::status(500, {{"Content-Type", "application/json"}}, R"({"errors":["Server down"]})")},
        {"502 of a gateway", act::html(502)},
        {"503", act::status(503)},
        {"504", act::html(504)},
        {"429 that asks for nothing", act::too_many_requests("0")},
        {"429 that asks for a while", act::too_many_requests("0.2")},
        {"408", act::status(408)},
        {"a connection that is closed", act::drop()},
        {"a connection that is reset", act::refuse()},
        {"an answer that is cut", act::cut(10)},
    };
    for (const row& r : table) {
      CAPTURE(std::string(r.what));
      fixture f;
      f.server.add_file(f.run, "a.txt", text);
      const auto fault = f.server.add_fault(target(place::graphql).nth(1), r.fault);
      auto file = f.success(f.client().try_restore("a.txt", f.path));
      CHECK(file.verified());
      CHECK(f.server.struck(fault) == 1);
      CHECK(f.server.counted().of(request_kind::graphql).requests == 2);
    }
  }

  TEST_CASE("long and endless answers and heads are refused") {
    fixture f;
    f.server.add_file(f.run, "a.txt", text);
    auto client = f.client();
    for (const auto& fault :
         {act::oversize(64 << 20), act::endless_body(), act::endless_header(), act::many_headers(5000)}) {
      f.server.clear_faults();
      f.server.add_fault(place::graphql, fault);
      f.server.clear_log();
      const auto failure = f.failure(client.try_restore("a.txt", f.path), errc::protocol_violation);
      check_names(failure, {"a.txt", f.path, "127.0.0.1"});
      CHECK(f.server.counted().of(request_kind::graphql).requests == 1);
    }
  }

  TEST_CASE("an endless error page is not read to its end") {
    fixture f;
    f.server.add_fault(place::graphql, act::status(400));
    f.server.add_fault(place::graphql, act::endless_body());
    const auto failure = f.failure(f.client().try_restore("a.txt", f.path), errc::http_failure);
    CHECK(failure.http_status() == 400);
  }

  TEST_CASE("redirects of a query are refused unless they keep the method") {
    fixture f;
    f.server.add_file(f.run, "a.txt", text);
    auto client = f.client();
    for (const int status : {301, 302, 303}) {
      CAPTURE(status);
      f.server.clear_faults();
      f.server.add_fault(place::graphql, act::redirect_to(f.server.base_url() + "/login", status));
      const auto failure = f.failure(client.try_restore("a.txt", f.path), errc::protocol_violation);
      check_names(failure, {"redirected", "/login", "base URL"});
      CHECK(failure.http_status() == status);
    }
    for (const int status : {307, 308}) {
      CAPTURE(status);
      f.server.clear_faults();
      f.server.add_fault(target(place::graphql).nth(1), act::redirect_to("/graphql", status));
      (void)f.success(client.try_restore("a.txt", f.path, true));
    }
  }
}

TEST_SUITE("service: the default entity") {
  TEST_CASE("the default entity is requested once for each client") {
    fixture f;
    const auto own = f.server.add_run("stand-in", "my-project", "r1");
    f.server.add_file(own, "a.txt", text);
    f.server.add_file(own, "b.txt", text);
    auto client = f.client();
    (void)f.success(client.try_restore("a.txt", "my-project/r1"));
    CHECK(f.asked() == "graphql 2, files 1, storage 1");
    (void)f.success(client.try_restore("b.txt", "my-project/r1"));
    CHECK(f.asked() == "graphql 3, files 2, storage 2");
    CHECK(f.success(client.try_list_files([] {
             wandb::restore_options options;
             options.run_path = "my-project:r1";
             return options;
           }()))
              .size() == 2);
    CHECK(f.asked() == "graphql 4, files 2, storage 2");
    CHECK(contains(f.server.requests(request_kind::graphql).at(0).body, "viewer"));
    CHECK(json::parse(f.server.requests(request_kind::graphql).at(1).body).at("variables").at("entity") ==
          "stand-in");
  }

  TEST_CASE("the default entity is not requested if an entity is known, or for a local copy") {
    fixture f;
    f.server.add_file(f.run, "a.txt", text);
    write_file(f.root() / "here.txt", "old");
    auto s = f.settings();
    s.entity = "vanpelt";
    (void)f.success(wandb::client<>(s).try_restore("a.txt", "my-project/a1b2c3d"));
    CHECK(f.asked() == "graphql 1, files 1, storage 1");
    (void)f.success(f.client().try_restore("here.txt", "my-project/a1b2c3d"));
    CHECK(f.asked() == "graphql 1, files 1, storage 1");
  }

  TEST_CASE("project and run may come from the settings") {
    fixture f;
    f.server.add_file(f.server.add_run("stand-in", "p", "r"), "a.txt", text);
    auto s = f.settings();
    s.project = "p";
    (void)f.success(wandb::client<>(s).try_restore("a.txt", "r"));
    s.run_id = "r";
    (void)f.success(wandb::client<>(s).try_restore("a.txt", "", true));
  }

  TEST_CASE("without a default entity or an account the error names a remedy") {
    stand_in::options how;
    how.viewer_entity.reset();
    fixture f(how);
    for (const bool with_key : {true, false}) {
      CAPTURE(with_key);
      wandb::client<> client(with_key ? f.settings() : f.public_settings());
      const auto failure =
          f.failure(client.try_restore("a.txt", "my-project/a1b2c3d"), errc::invalid_run_path);
      check_names(failure,
                  {"a.txt", "my-project/a1b2c3d", "127.0.0.1", "WANDB_ENTITY", "entity/project/run_id"});
      CHECK(contains(failure.what(), "WANDB_API_KEY") == !with_key);
      CHECK_FALSE(failure.is_not_found());
    }
  }

  TEST_CASE("a missing run or project is reported without a request") {
    fixture f;
    auto client = f.client();
    check_names(f.failure(client.try_restore("a.txt"), errc::invalid_run_path),
                {"a.txt", "entity/project/run_id", "WANDB_RUN_ID"});
    check_names(f.failure(client.try_restore("a.txt", "r"), errc::invalid_run_path),
                {"\"r\"", "WANDB_PROJECT"});
    CHECK(f.asked() == "graphql 0, files 0, storage 0");
  }
}

TEST_SUITE("service: the list of files") {
  TEST_CASE("each file has its properties, in the service's order") {
    fixture f;
    stand_in::file_attributes plain;
    plain.mimetype = "text/plain";
    f.server.add_file(f.run, "b/deep.txt", text, plain);
    stand_in::file_attributes bare;
    bare.md5_as = stand_in::md5_form::null;
    bare.size_as = stand_in::size_form::string;
    bare.updated_at.reset();
    f.server.add_file(f.run, "a.bin", "12", bare);
    auto listed = f.success(f.client().try_list_files(f.options()));
    REQUIRE(listed.size() == 2);
    CHECK(listed[0].name == "a.bin");
    CHECK(listed[0].size == std::uint64_t{2});
    CHECK(listed[0].md5.empty());
    CHECK(listed[0].updated_at.empty());
    CHECK(listed[1].name == "b/deep.txt");
    CHECK(listed[1].size == text.size());
    CHECK(listed[1].md5 == text_md5);
    CHECK(listed[1].mimetype == "text/plain");
    CHECK(listed[1].updated_at == "2024-01-02T03:04:05Z");
    CHECK(f.asked() == "graphql 1, files 0, storage 0");
  }

  TEST_CASE("several pages are requested once each, and every file is listed once") {
    fixture f;
    for (int i = 0; i < 1201; ++i) f.server.add_file(f.run, "f" + std::to_string(10000 + i), "x");
    const auto listed = f.success(f.client().try_list_files(f.options()));
    REQUIRE(listed.size() == 1201);
    for (std::size_t i = 0; i < listed.size(); ++i) {
      if (listed[i].name != "f" + std::to_string(10000 + i)) FAIL(listed[i].name);
    }
    const auto pages = f.server.counted().of(request_kind::graphql).requests;
    CHECK(pages > 1);
    CHECK(pages < 20);
  }

  TEST_CASE("a run without files has an empty list; nulls and files never uploaded are left out") {
    fixture f;
    auto client = f.client();
    CHECK(f.success(client.try_list_files(f.options())).empty());
    f.server.add_fault(
        place::graphql,
        act::body(answer(json::array({json{{"node", {{"name", "soon"}, {"md5", "0"}}}},
                                      json{{"node", nullptr}}, json{{"node", {{"name", "there"}}}}}))));
    const auto listed = f.success(client.try_list_files(f.options()));
    REQUIRE(listed.size() == 1);
    CHECK(listed[0].name == "there");
  }

  TEST_CASE("pages without end, each with a new cursor, end: small pages by their number, large ones by "
            "their size") {
    /// Answers each query with another page of `count` files with names of the given length.
    struct endless {
      std::size_t files, name_bytes;
      std::shared_ptr<std::size_t> pages = std::make_shared<std::size_t>(0);

      wandb::result<wandb::http_response> send(const wandb::http_request&, wandb::body_sink& sink) {
        const std::string page = std::to_string(++*pages);
        std::string edges;
        for (std::size_t i = 0; i < files; ++i) {
          edges += std::string(i == 0 ? "" : ",") + R"({"node":{"name":")" + page + "-" + std::to_string(i) +
                   std::string(name_bytes, 'x') + R"("}})";
        }
        const std::string body = R"({"data":{"project":{"run":{"files":{"edges":[)" + edges +
                                 R"(],"pageInfo":{"hasNextPage":true,"endCursor":")" + page + R"("}}}}}})";
        wandb::http_response response;
        response.status = 200;
        if (sink.start(response)) sink.write(body);
        return response;
      }
    };
    fixture f;
    for (const auto& [files, name_bytes, most_pages] :
         {std::tuple<std::size_t, std::size_t, std::size_t>{1, 1, 5001}, {400, 15'000, 40}}) {
      const std::size_t shown = files;
      CAPTURE(shown);
      const endless transport{files, name_bytes};
      wandb::client<endless> client(f.settings(), transport);
      const auto failure = f.failure(client.try_list_files(f.options()), errc::protocol_violation);
      check_names(failure, {f.path, "127.0.0.1", "lists too many files"});
      CHECK(*transport.pages <= most_pages);
    }
  }

  TEST_CASE("a server whose pages repeat is given up") {
    fixture f;
    json page = json::parse(answer(json::array({json{{"node", {{"name", "again"}}}, {"cursor", "same"}}})));
    page["data"]["project"]["run"]["files"]["pageInfo"] = {{"endCursor", "same"}, {"hasNextPage", true}};
    f.server.add_fault(place::graphql, act::body(page.dump()));
    (void)f.failure(f.client().try_list_files(f.options()), errc::protocol_violation);
    CHECK(f.server.counted().of(request_kind::graphql).requests <= 2);
  }

  TEST_CASE("failures have the codes of a restore, and name the run") {
    fixture f;
    auto without_time = f.settings();
    without_time.idle_timeout = std::chrono::milliseconds(0);
    (void)f.failure(wandb::client<>(without_time).try_list_files(f.options()), errc::invalid_argument);
    auto client = f.client();
    auto options = f.options();
    options.run_path = "vanpelt/my-project/none";
    check_names(f.failure(client.try_list_files(options), errc::run_not_found),
                {"vanpelt/my-project/none", "127.0.0.1"});
    options.run_path = "a/b/c/d/e";
    (void)f.failure(client.try_list_files(options), errc::invalid_run_path);
    f.server.add_fault(place::graphql, act::malformed_json());
    check_names(f.failure(client.try_list_files(f.options()), errc::protocol_violation),
                {f.path, "127.0.0.1"});
    CHECK(fs::is_empty(f.root()));
  }
}
