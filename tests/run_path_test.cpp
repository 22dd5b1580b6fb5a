// Run paths: the forms that the SDK accepts, and browser addresses.
#include "wandb_restore.hpp"

#include <doctest/doctest.h>

#include <sstream>
#include <string>
#include <string_view>

namespace {

const wandb::run_path defaults{"DE", "DP", "DR"};

struct good {
  std::string text, entity, project, run_id;
};

void check(const good& row) {
  CAPTURE(row.text);
  const auto parsed = wandb::run_path::parse(row.text, defaults);
  REQUIRE(parsed.has_value());
  CHECK(parsed->entity == row.entity);
  CHECK(parsed->project == row.project);
  CHECK(parsed->run_id == row.run_id);
}

std::string failure(std::string_view text, const wandb::run_path& with = defaults) {
  const auto parsed = wandb::run_path::parse(text, with);
  if (parsed) return "parsed as " + parsed->str();
  CHECK(parsed.error().code() == wandb::errc::invalid_run_path);
  return parsed.error().what();
}

bool contains(const std::string& text, std::string_view part) { return text.find(part) != std::string::npos; }

}  // namespace

TEST_SUITE("run path") {
  TEST_CASE("run paths that the SDK accepts have the same meaning") {
    // [checked against wandb 0.29.0 and 0.31.0: Api._parse_path with entity DE and project DP]
    const good rows[] = {
        {"e/p/r", "e", "p", "r"},
        {"/e/p/r/", "e", "p", "r"},
        {"e/p/runs/r", "e", "p", "r"},
        {" e / p / r ", "e", "p", "r"},
        {"user/proj:run", "user", "proj", "run"},
        {"p/r", "DE", "p", "r"},
        {"p:r", "DE", "p", "r"},
        {"r", "DE", "DP", "r"},
        {"/runs/r", "DE", "DP", "r"},
        {"/sweeps/r", "DE", "DP", "r"},
        {"e/p/sweeps", "e", "p", "sweeps"},
        {"https://wandb.ai/e/sweeps/runs/r/sweeps/s", "e", "sweeps", "r"},
        {"r/", "DE", "DP", "r"},
        {"//r//", "DE", "DP", "r"},
        {"e/p/r:1", "e", "p", "r:1"},
        {"e/p/runs/r:1", "e", "p", "r:1"},
        {"p:a:b", "DE", "p", "a:b"},
        {"e:x/r", "DE", "e:x", "r"},
        {"e/p/", "DE", "e", "p"},
        {"runs/r", "DE", "runs", "r"},
        {"e/runs/r", "DE", "e", "r"},
        {"e/sweeps/r", "DE", "e", "r"},
        {"e/p/runs/runs/r", "e", "p", "r"},
        {"e/p/runs/", "DE", "e", "p"},
        {"e/p/runs", "e", "p", "runs"},
        {"\te/p/r\n", "e", "p", "r"},
        {"e/p/r;1,2'", "e", "p", "r;1,2'"},
        {"e/p:a/b", "e", "p:a", "b"},
        {"wandb.ai/p/runs/r", "wandb.ai", "p", "r"},
        {"wandb.ai/e/p", "wandb.ai", "e", "p"},
        {"e.x/p/r", "e.x", "p", "r"},
        {"\xc3\xa9/p/r", "\xc3\xa9", "p", "r"},
        {"a b/c d/r", "a b", "c d", "r"},
        {"e/p%20q/r", "e", "p%20q", "r"},
    };
    for (const auto& row : rows) check(row);
  }

  TEST_CASE("white space around the parts is removed as Python's str.strip() does") {
    const std::string_view white[] = {" ",
                                      "\t",
                                      "\n",
                                      "\v",
                                      "\f",
                                      "\r",
                                      "\x1c",
                                      "\x1d",
                                      "\x1e",
                                      "\x1f",
                                      "\xc2\x85",
                                      "\xc2\xa0",
                                      "\xe1\x9a\x80",
                                      "\xe2\x80\x80",
                                      "\xe2\x80\x81",
                                      "\xe2\x80\x82",
                                      "\xe2\x80\x83",
                                      "\xe2\x80\x84",
                                      "\xe2\x80\x85",
                                      "\xe2\x80\x86",
                                      "\xe2\x80\x87",
                                      "\xe2\x80\x88",
                                      "\xe2\x80\x89",
                                      "\xe2\x80\x8a",
                                      "\xe2\x80\xa8",
                                      "\xe2\x80\xa9",
                                      "\xe2\x80\xaf",
                                      "\xe2\x81\x9f",
                                      "\xe3\x80\x80"};
    for (const auto character : white) {
      const std::string space(character);
      CAPTURE(space);
      CHECK(wandb::detail::strip(space + "r" + space + " " + space) == "r");
      CHECK(wandb::detail::strip(space + space).empty());
      check({"e/p/r" + space, "e", "p", "r"});
      check({space + "e/p/r", "e", "p", "r"});
      check({"https://wandb.ai/e/p/runs/r" + space, "e", "p", "r"});
      if (wandb::detail::has_control(space)) continue;  // refused between the parts
      check({"e" + space + "/" + space + "p/" + space + "r" + space, "e", "p", "r"});
      check({"p:" + space + "r", "DE", "p", "r"});
    }
    // Other characters, and parts of characters, stay.
    for (const std::string_view text : {"\xe2\x80\x8b", "\xe1\xa0\x8e", "\xe2\x80\x8e", "\xef\xbb\xbf",
                                        "\xa0", "\x85", "\xe2\x80", "\x80\x80", "\xc4\x85", "\xe4\x80\x80"}) {
      CAPTURE(text);
      const std::string part = std::string(text) + "r" + std::string(text);
      CHECK(wandb::detail::strip(part) == part);
    }
  }

  TEST_CASE("run paths that the SDK refuses are refused") {
    // [checked against wandb 0.29.0 and 0.31.0]; the empty text has another meaning, see below
    for (const std::string_view text : {"    ", ":", "/", "//", "/ /", "/ / /", "/runs/", "e/p:", "e//r",
                                        "e/p//r", "e/p/q/r", "e/p/r/overview", "p:", ":r", "e/:r",
                                        "a/b/c/d/e", "/ /r/ /x/y/z", "e/p/ runs /r", "https://wandb.ai"}) {
      CAPTURE(text);
      CHECK(contains(failure(text), "invalid run path "));
    }
  }

  TEST_CASE("browser addresses of a run are accepted, with any tail") {
    const good rows[] = {
        {"https://wandb.ai/e/p/runs/r", "e", "p", "r"},
        {"HTTP://localhost:8080/e/p/runs/r/", "e", "p", "r"},
        {"  https://wandb.ai/e/p/runs/r  ", "e", "p", "r"},
        {"https://wandb.ai/e/p/runs/r/overview", "e", "p", "r"},
        {"https://wandb.ai/e/p/runs/r/files/ckpt/runs/x.h5", "e", "p", "r"},
        {"https://wandb.ai/e/p/runs/r?nw=nwuser", "e", "p", "r"},
        {"https://wandb.ai/e/p/runs/r/logs?a=/runs/#b", "e", "p", "r"},
        {"https://wandb.ai/e/p/runs/r#top", "e", "p", "r"},
        {"https://wandb.ai//e/p//runs/r", "e", "p", "r"},
        {"https://host/a/prefix/e/p/runs/r/workspace", "e", "p", "r"},
        {"https://wandb.ai/e/My%20Project/runs/r%2D1", "e", "My Project", "r-1"},
        {"https://wandb.ai/e/runs/runs/r", "e", "runs", "r"},
        {"https://wandb.ai/e/p/runs/runs/overview", "e", "p", "runs"},
        {"https://forge.coreweave.com/wandb/e/p/runs/r", "e", "p", "r"},
        {"https://forge.coreweave.com/wandb/e/p/runs/r/files/a/runs/b?nw=x", "e", "p", "r"},
        {"https://forge.coreweave.com/wandb/e/runs/runs/r", "e", "runs", "r"},
        {"https://forge.coreweave.com/wandb/wandb/runs/runs/runs/logs", "wandb", "runs", "runs"},
        {"https://forge.coreweave.com/wandb/wandb/p/runs/r", "wandb", "p", "r"},
        {"https://qa.forge.coreweave.com/wandb/e/runs/runs/r/overview", "e", "runs", "r"},
        {"forge.coreweave.com/wandb/e/p/runs/r", "e", "p", "r"},
        {"Forge.CoreWeave.com/wandb/e/runs/runs/r", "e", "runs", "r"},
        {"https://wandb.ai/wandb/runs/runs/r", "wandb", "runs", "r"},
        {"wandb.ai/e/p/runs/r", "e", "p", "r"},
        {"wandb.ai/e/p/runs/r/files/x", "e", "p", "r"},
        {"wandb.ai/e/a%20b/runs/r", "e", "a b", "r"},
        {"localhost/e/p/runs/r", "e", "p", "r"},
        {"host:8080/e/p/runs/r?x", "e", "p", "r"},
        {"e/p/runs/r/overview", "e", "p", "r"},
        {"/e/p/runs/r/files/runs/x", "e", "p", "r"},
    };
    for (const auto& row : rows) check(row);
  }

  TEST_CASE("a query or fragment is dropped after any form") {
    const good rows[] = {
        {"e/p/runs/r?nw=x", "e", "p", "r"}, {"e/p/r#x", "e", "p", "r"}, {"p/r?a/b/c", "DE", "p", "r"},
        {"p:r?x", "DE", "p", "r"},          {"r#x?y", "DE", "DP", "r"},
    };
    for (const auto& row : rows) check(row);
    for (const char* text : {"https://user:secret@wandb.corp/e/p", "https://user:secret?x@wandb.corp/e/p"}) {
      const auto other = wandb::run_path::parse(text, {});
      REQUIRE_FALSE(other.has_value());
      CHECK_FALSE(contains(other.error().what(), "secret"));
      // Where a password may have a '?', nothing behind the scheme is shown.
      CHECK(contains(other.error().what(), contains(text, "?") ? "https://..." : "wandb.corp/e/p"));
    }
    const auto incomplete = wandb::run_path::parse("r?accessToken=secret", {});
    REQUIRE_FALSE(incomplete.has_value());
    CHECK_FALSE(contains(incomplete.error().what(), "secret"));
  }

  TEST_CASE("browser addresses of other pages are refused with an explanation") {
    for (const std::string_view text :
         {"https://wandb.ai/e/p", "https://wandb.ai/e/p/runs/", "https://wandb.ai/e/p/runs",
          "https://wandb.ai/e/p/reports/My-Report--XYZ", "https://wandb.ai/runs/r", "https://",
          "https://wandb.ai/e/p/runs/%2f", "https://wandb.ai/e/%0a/runs/r", "https://wandb.ai/e/%zz/runs/r",
          "https://wandb.ai/e/p?x=/e/p/runs/r"}) {
      CAPTURE(text);
      CHECK(contains(failure(text), "not the address of a run"));
    }
    for (const std::string_view text :
         {"ftp://wandb.ai/e/p/runs/r/", "wandb.ai/e/p/x/s/x", "q/e/p/runs/r", "my.team/p/runs/r/overview"}) {
      CAPTURE(text);
      CHECK(contains(failure(text), "expected entity/project/run_id"));
    }
  }

  TEST_CASE("the path of a sweep is refused, with a text that says so") {
    // The SDK takes the first two for runs.
    for (const std::string_view text :
         {"e/p/sweeps/s", "/ e / p / sweeps / s /", "https://wandb.ai/e/p/sweeps/s", "wandb.ai/e/p/sweeps/s",
          "https://forge.coreweave.com/wandb/e/p/sweeps/s?nw=x", "https://host/prefix/e/p/sweeps/s/runs"}) {
      CAPTURE(text);
      CHECK(contains(failure(text), "names a sweep, not a run"));
    }
  }

  TEST_CASE("missing parts come from the defaults; otherwise the error names them") {
    CHECK(wandb::run_path::parse("", defaults)->str() == "DE/DP/DR");
    CHECK(failure("team/proj", {}) ==
          "invalid run path \"team/proj\": no entity; expected entity/project/run_id, or set WANDB_ENTITY");
    CHECK(failure("r", {}) ==
          "invalid run path \"r\": no entity, no project; expected entity/project/run_id, "
          "or set WANDB_ENTITY, WANDB_PROJECT");
    CHECK(failure("", {"e", "p", ""}) ==
          "no run path was given: no run id; expected entity/project/run_id, or set WANDB_RUN_ID");
    CHECK(contains(failure("r", {"e", "a/b", ""}), "the project \"a/b\" has a slash"));
    CHECK(contains(failure("r", {"e\n", "p", ""}), "the entity \"e\\x0a\" has"));
  }

  TEST_CASE("control characters are refused, and escaped in the error") {
    CHECK(contains(failure("e/p/r\x01z"), "\"e/p/r\\x01z\": it has control characters"));
    CHECK(contains(failure(std::string_view("e/p/r\0z", 7)), "control characters"));
    CHECK(contains(failure("e/\np/r"), "control characters"));
  }

  TEST_CASE("split_run_path returns missing parts as empty") {
    const auto run = wandb::detail::split_run_path("r");
    REQUIRE(run.has_value());
    CHECK(*run == wandb::run_path{"", "", "r"});
    CHECK(*wandb::detail::split_run_path("") == wandb::run_path{});
    CHECK(*wandb::detail::split_run_path("p:r") == wandb::run_path{"", "p", "r"});
  }

  TEST_CASE("parse(str()) returns the same path") {
    const wandb::run_path path{"e", "p", "r:1"};
    CHECK(path.str() == "e/p/r:1");
    CHECK(*wandb::run_path::parse(path.str()) == path);
    CHECK(path != defaults);
  }

  TEST_CASE("<< writes str() to any output stream") {
    std::ostringstream out;
    out << wandb::run_path{"e", "p", "r"} << ' ' << wandb::run_path{};
    CHECK(out.str() == "e/p/r //");
  }
}
