// The stand-in's GraphQL: what clients other than this library ask of it, the Python SDK above all.
// SPDX-License-Identifier: MIT
#include <nlohmann/json.hpp>

#include "restore_fixture.hpp"

namespace {

using namespace restore_tests;
using nlohmann::json;

struct text_sink : wandb::body_sink {
  std::string text;
  bool start(const wandb::http_response&) override { return true; }
  bool write(std::string_view bytes) override { return text += bytes, true; }
};

/// The answer to a question, whatever its status.
json ask(fixture& f, const std::string& query, const json& variables = json::object()) {
  wandb::http_transport transport(f.settings());
  wandb::http_request request;
  request.method = "POST";
  request.url = f.server.base_url() + "/graphql";
  request.headers = {{"Content-Type", "application/json"}, {"Authorization", basic(f.server.key())}};
  request.body = json{{"query", query}, {"variables", variables}}.dump();
  text_sink sink;
  const auto response = transport.send(request, sink);
  REQUIRE_MESSAGE(response.has_value(), response.error().what());
  return json::parse(sink.text);
}

TEST_SUITE("stand-in") {
  TEST_CASE("a question may have fragments, in front of it or behind, one in another") {
    fixture f;
    const std::string inner = "fragment Inner on User { entity username } ";
    const std::string outer = "fragment Outer on User { id ...Inner ... on User { email } } ";
    const json expected = {{"id", "VXNlcjox"},
                           {"entity", "stand-in"},
                           {"username", "stand-in"},
                           {"email", "somebody@example.invalid"}};
    CHECK(ask(f, "query A { viewer { ...Outer } } " + outer + inner)["data"]["viewer"] == expected);
    CHECK(ask(f, inner + outer + "{ viewer { ...Outer } }")["data"]["viewer"] == expected);
  }

  TEST_CASE("a fragment has the variables of the operation") {
    fixture f;
    f.server.add_file(f.run, "a", std::string("1"));
    f.server.add_file(f.run, "b", std::string("2"));
    const json answer = ask(f,
                            "fragment Files on Run { files(names: $names) { edges { node { name } } } }"
                            "query A($names: [String] = []) { project(name: \"my-project\", entityName: "
                            "\"vanpelt\") { run(name: \"a1b2c3d\") { fileCount ...Files } } }",
                            {{"names", {"b"}}});
    const json expected = {{"fileCount", 2}, {"files", {{"edges", {{{"node", {{"name", "b"}}}}}}}}};
    CHECK(answer["data"]["project"]["run"] == expected);
  }

  TEST_CASE("@include and @skip leave fields, fragments and inline fragments out") {
    fixture f;
    const std::string query =
        "query A($yes: Boolean!, $no: Boolean = false) { viewer { id @include(if: $yes) entity @skip(if: "
        "$yes) "
        "...F @include(if: $no) ... @skip(if: $no) { username } ... on User @skip(if: $yes) { email } } } "
        "fragment F on User { name }";
    const json yes = {{"id", "VXNlcjox"}, {"username", "stand-in"}};
    CHECK(ask(f, query, {{"yes", true}})["data"]["viewer"] == yes);
    const json no = {{"entity", "stand-in"}, {"username", "stand-in"}, {"email", "somebody@example.invalid"}};
    CHECK(ask(f, query, {{"yes", false}})["data"]["viewer"] == no);
  }

  TEST_CASE("the selections of one field that is there twice are put together") {
    fixture f;
    const json both = {{"id", "VXNlcjox"}, {"entity", "stand-in"}};
    CHECK(ask(f, "{ viewer { id } ...F } fragment F on Query { viewer { entity } }")["data"]["viewer"] ==
          both);
  }

  TEST_CASE("the error names what is wrong with a question") {
    fixture f;
    const struct {
      const char *query, *says;
    } rows[] = {
        {"{ viewer { ...F } }", "Unknown fragment \"F\"."},
        {"{ viewer { ...F } } fragment F on User { ...F }", "Syntax Error: nested too deeply"},
        {"{ viewer { id @defer(if: true) } }", "Unknown directive \"@defer\"."},
        {"{ viewer { id @skip(if: 1) } }", "Directive \"@skip\" takes a Boolean."},
        {"{ viewer { id } } { viewer { id } }", "Syntax Error: expected one query, found \"{\""},
        {"mutation { x }", "Syntax Error: expected one query, found \"mutation\""},
        {"fragment F on User { id }", "Syntax Error: expected a query"},
        {"{ viewer { id }", "Syntax Error: expected \"}\", found the end"},
        {"{ viewer { nothing } }", "Cannot query field \"nothing\" on type \"User\"."},
    };
    for (const auto& r : rows) {
      CAPTURE(r.query);
      const json answer = ask(f, r.query);
      REQUIRE(answer.contains("errors"));
      CHECK(answer["errors"][0]["message"] == r.says);
    }
  }

  TEST_CASE("/files/... leads to addresses that the test gives, a new one for each request") {
    fixture f;
    stand_in::server store;
    const stand_in::run_ref elsewhere = store.add_run("a", "b", "c");
    store.add_file(elsewhere, "key", std::string("of another server"));
    f.server.add_file(f.run, "x y.txt", std::string("of another server"));
    std::vector<std::string> given;
    f.server.set_addresses([&](const stand_in::run_ref& run, const std::string& name) {
      CHECK(run.id == f.run.id);
      CHECK(name == "x y.txt");
      given.push_back(store.signed_url(elsewhere, "key"));
      if (given.size() == 1) store.expire_signatures();
      return given.back();
    });
    wandb::settings s = f.settings();
    write_file(f.directory / "both.pem", f.server.ca_pem() + store.ca_pem());
    s.ca_file = f.directory / "both.pem";
    auto file = wandb::client<>(s).restore("x y.txt", f.path);
    CHECK(read_all(file) == "of another server");
    CHECK(given.size() == 2);
    CHECK(f.server.counted().of(request_kind::storage).requests == 0);
  }
}

}  // namespace
