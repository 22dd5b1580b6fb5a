// The command-line program against the stand-in, started as a shell would: output, exit status, signals, terminal.
//
// SPDX-License-Identifier: MIT
#ifndef _WIN32
#include "cli_test.hpp"
#include "support.hpp"

#include <nlohmann/json.hpp>

#include <sys/stat.h>

#include <atomic>
#include <chrono>
#include <optional>
#include <sstream>
#include <thread>

namespace {

using namespace programs;
using nlohmann::json;

constexpr const char* program = "wandb-restore";

std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) lines.push_back(line);
  return lines;
}

std::vector<json> objects_of(const std::string& text) {
  std::vector<json> objects;
  for (const std::string& line : lines_of(text)) objects.push_back(json::parse(line));
  return objects;
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

/// Returns `first` followed by the fixture's --run-path.
std::vector<std::string> with_run(const fixture& f, std::vector<std::string> first) {
  first.insert(first.end(), {"--run-path", f.run_path()});
  return first;
}

/// Checks that standard error has one or more messages, and nothing else.
void check_messages(const std::string& err) {
  CHECK(err.rfind("wandb-restore: ", 0) == 0);
  CHECK(err.back() == '\n');
  CHECK_FALSE(contains(err, "\r"));
}

}  // namespace

TEST_SUITE("command line") {
  TEST_CASE("a restore prints the local path, and nothing else, and ends with status 0") {
    fixture f;
    f.server.add_file(f.run, "ckpt/model.h5", "twelve bytes");
    const fs::path root = f.directory.path() / "some root";
    const outcome result = f.start(program, with_run(f, {"ckpt/model.h5", "--root", root.string()}));
    CHECK(result.status == 0);
    CHECK(result.out == (root / "ckpt/model.h5").string() + '\n');
    CHECK(result.err == "");
    CHECK(read_file(root / "ckpt/model.h5") == "twelve bytes");
  }

  TEST_CASE("without --root the file is stored in the working directory") {
    fixture f;
    f.server.add_file(f.run, "model.h5", "twelve bytes");
    const outcome result = f.start(program, with_run(f, {"model.h5"}));
    REQUIRE(result.status == 0);
    const auto lines = lines_of(result.out);
    REQUIRE(lines.size() == 1);
    CHECK(fs::equivalent(f.work() / lines[0], f.work() / "model.h5"));
  }

  TEST_CASE("without --run-path the run comes from the environment") {
    fixture f;
    f.server.add_file(f.run, "model.h5", "twelve bytes");
    f.environment.insert(
        {{"WANDB_ENTITY", f.run.entity}, {"WANDB_PROJECT", f.run.project}, {"WANDB_RUN_ID", f.run.id}});
    CHECK(f.start(program, {"model.h5"}).status == 0);
    CHECK(read_file(f.work() / "model.h5") == "twelve bytes");
  }

  TEST_CASE("--json prints one object for each file, with all its properties") {
    fixture f;
    f.server.add_file(f.run, "model.h5", "twelve bytes");
    stand_in::file_attributes no_md5;
    no_md5.md5_as = stand_in::md5_form::null;
    f.server.add_file(f.run, "old.h5", "of an old server", no_md5);

    outcome result = f.start(program, with_run(f, {"model.h5", "old.h5", "--root", "here", "--json"}));
    CHECK(result.status == 0);
    CHECK(result.err == "");
    auto objects = objects_of(result.out);
    REQUIRE(objects.size() == 2);
    CHECK(objects[0]["name"] == "model.h5");
    CHECK(objects[0]["path"] == "here/model.h5");
    CHECK(objects[0]["size"] == 12);
    CHECK(objects[0]["md5"] == stand_in::md5_hex(*stand_in::bytes("twelve bytes")));
    CHECK(objects[0]["source"] == "downloaded");
    CHECK(objects[0]["verified"] == true);
    CHECK(objects[0]["seconds"].is_number());
    CHECK(objects[0]["seconds"] >= 0);
    CHECK(objects[0].size() == 7);
    CHECK(objects[1]["name"] == "old.h5");
    CHECK(objects[1]["verified"] == false);

    result = f.start(program, with_run(f, {"model.h5", "--root", "here", "--json"}));
    objects = objects_of(result.out);
    REQUIRE(objects.size() == 1);
    CHECK(objects[0]["source"] == "local");
    CHECK(objects[0]["verified"] == true);  // a receipt says so
  }

  TEST_CASE("several names are restored in order; the status is that of the first failure") {
    fixture f;
    f.server.add_file(f.run, "a.txt", "a");
    f.server.add_file(f.run, "c.txt", "c");
    f.server.add_file(f.run, "e.txt", "e");
    const outcome result =
        f.start(program, with_run(f, {"a.txt", "b.txt", "c.txt", "../d.txt", "e.txt", "--json"}));
    CHECK(result.status == 3);  // b.txt is not there; ../d.txt would be 2
    const auto objects = objects_of(result.out);
    REQUIRE(objects.size() == 3);
    CHECK(objects[0]["name"] == "a.txt");
    CHECK(objects[1]["name"] == "c.txt");
    CHECK(objects[2]["name"] == "e.txt");
    check_messages(result.err);
    const auto b = result.err.find("b.txt");
    const auto d = result.err.find("../d.txt");
    CHECK(b != std::string::npos);
    CHECK(d != std::string::npos);
    CHECK(b < d);
  }

  TEST_CASE("several names share one client's connections") {
    fixture f;
    for (const char* name : {"a", "b", "c"}) f.server.add_file(f.run, name, name);
    CHECK(f.start(program, with_run(f, {"a", "b", "c"})).status == 0);
    CHECK(f.server.counted().of(stand_in::origin::service).handshakes == 1);
    CHECK(f.server.counted().of(stand_in::origin::storage).handshakes == 1);
  }

  TEST_CASE("a local copy is kept without a request; --refresh compares the md5; --replace downloads") {
    fixture f;
    f.server.add_file(f.run, "model.h5", "first");
    REQUIRE(f.start(program, with_run(f, {"model.h5"})).status == 0);

    f.server.clear_log();
    CHECK(f.start(program, with_run(f, {"model.h5"})).status == 0);
    CHECK(f.requests() == 0);

    CHECK(f.start(program, with_run(f, {"model.h5", "--refresh"})).status == 0);
    CHECK(f.server.requests(stand_in::request_kind::graphql).size() == 1);
    CHECK(f.server.requests(stand_in::request_kind::storage).empty());

    f.server.add_file(f.run, "model.h5", "second");
    CHECK(f.start(program, with_run(f, {"model.h5"})).status == 0);
    CHECK(read_file(f.work() / "model.h5") == "first");
    CHECK(f.start(program, with_run(f, {"model.h5", "--refresh"})).status == 0);
    CHECK(read_file(f.work() / "model.h5") == "second");

    f.server.clear_log();
    CHECK(f.start(program, with_run(f, {"model.h5", "--replace"})).status == 0);
    CHECK(f.server.requests(stand_in::request_kind::storage).size() == 1);
  }

  TEST_CASE("a pattern restores the files that match, in the service's order") {
    fixture f;
    for (const char* name : {"ckpt/a.pt", "ckpt/deep/b.pt", "config.yaml", "z.pt"})
      f.server.add_file(f.run, name, name);
    const auto restored = [&](std::vector<std::string> arguments) {
      const outcome result = f.start(program, with_run(f, std::move(arguments)));
      CHECK(result.status == 0);
      CHECK(result.err == "");
      return result.out;
    };
    CHECK(restored({"*.pt"}) == "ckpt/a.pt\nckpt/deep/b.pt\nz.pt\n");
    CHECK(read_file(f.work() / "ckpt/deep/b.pt") == "ckpt/deep/b.pt");
    CHECK_FALSE(fs::exists(f.work() / "config.yaml"));
    CHECK(restored({"ckpt/", "--root", "r"}) == "r/ckpt/a.pt\nr/ckpt/deep/b.pt\n");
    CHECK(restored({"?.pt", "config.yaml", "--root", "s"}) == "s/z.pt\ns/config.yaml\n");

    SUBCASE("--json ends with the totals") {
      f.server.clear_log();
      const auto objects = objects_of(restored({"*.pt", "--json", "--refresh"}));
      REQUIRE(objects.size() == 4);
      CHECK(objects[0]["name"] == "ckpt/a.pt");
      CHECK(objects[0]["source"] == "local");
      CHECK(objects[0].size() == 7);
      const json& totals = objects[3]["totals"];
      CHECK(totals["files"] == 3);
      CHECK(totals["downloaded"] == 0);
      CHECK(totals["local"] == 3);
      CHECK(totals["failed"] == 0);
      CHECK(totals["bytes"] == 0);
      CHECK(totals["seconds"].is_number());
      CHECK(f.requests() == 1);
    }
    SUBCASE("--json has one object of totals for several NAMEs of which one is a pattern") {
      const auto objects = objects_of(restored({"z.*", "ckpt/", "config.yaml", "--json", "--root", "u"}));
      REQUIRE(objects.size() == 5);
      for (std::size_t i = 0; i < 4; ++i) CHECK(objects[i].contains("name"));
      CHECK(objects[4].size() == 1);
      CHECK(objects[4]["totals"]["files"] == 4);
      CHECK(objects[4]["totals"]["downloaded"] == 4);
      CHECK(objects[4]["totals"]["local"] == 0);
      CHECK(objects[4]["totals"]["bytes"] == 4 + 9 + 14 + 11);
    }
    SUBCASE("a pattern without a match is file_not_found, and the next name is tried") {
      const outcome result = f.start(program, with_run(f, {"*.h5", "z.pt"}));
      CHECK(result.status == 3);
      CHECK(result.out == "z.pt\n");
      check_messages(result.err);
      CHECK(contains(result.err, "*.h5"));
    }
    SUBCASE("the failure of one file is told, and the others are restored") {
      f.server.add_fault(stand_in::target(stand_in::place::storage).matching("deep"),
                         stand_in::act::status(405));
      const outcome result = f.start(program, with_run(f, {"*.pt", "--root", "t", "--json"}));
      CHECK(result.status == 5);
      const auto objects = objects_of(result.out);
      REQUIRE(objects.size() == 3);
      CHECK(objects[0]["name"] == "ckpt/a.pt");
      CHECK(objects[1]["name"] == "z.pt");
      CHECK(objects[2]["totals"]["failed"] == 1);
      CHECK(objects[2]["totals"]["downloaded"] == 2);
      CHECK(lines_of(result.err).size() == 1);
      CHECK(contains(result.err, "ckpt/deep/b.pt"));
    }
  }

  TEST_CASE("killed in the middle of a pattern; the next call fetches only what is missing") {
    fixture f;
    constexpr std::size_t count = 60;
    for (std::size_t i = 0; i < count; ++i)
      f.server.add_file(f.run, "ckpt/" + std::to_string(100 + i), stand_in::generated(20'000, i));
    f.server.add_fault(stand_in::target(stand_in::place::storage).from(31), stand_in::act::stall(10'000));
    const auto storage = [&] { return f.server.requests(stand_in::request_kind::storage).size(); };
    {
      child running(example(program), with_run(f, {"ckpt/", "--connections", "4"}), f.how());
      REQUIRE(f.server.wait_for(  // the requests 31 to 34 stall
          [](const auto& seen) { return seen.counts.of(stand_in::request_kind::storage).requests >= 34; },
          60s));
      running.signal(SIGKILL);
      CHECK(running.wait().status == 128 + SIGKILL);
    }
    std::size_t complete = 0;
    for (std::size_t i = 0; i < count; ++i)
      complete += fs::exists(f.work() / "ckpt" / std::to_string(100 + i));
    CHECK(complete == 30);
    f.server.clear_faults();
    f.server.release();
    f.server.clear_log();
    CHECK(f.start(program, with_run(f, {"ckpt/"})).status == 0);
    CHECK(storage() == count - complete);
    std::size_t entries = 0;
    for (const auto& entry : fs::directory_iterator(f.work() / "ckpt")) {
      const auto number = static_cast<std::uint64_t>(std::stoi(entry.path().filename().string()) - 100);
      CHECK(read_file(entry.path()) == stand_in::read_text(*stand_in::generated(20'000, number)));
      ++entries;
    }
    CHECK(entries == count);
  }

  TEST_CASE("of 100,000 files those that match are restored while the list is read, in bounded memory") {
    fixture f;
    constexpr std::size_t count = TESTS_SANITIZED ? 5'000 : 100'000;  // sanitizers take time and memory
    for (std::size_t i = 0; i < count; ++i)
      f.server.add_file(f.run, "media/images/validation_" + std::to_string(100'000 + i) + ".png", "x");
    // The last page but one is held until a file is requested, so that the order of the requests does not depend on threads.
    std::atomic<std::size_t> asked{0};
    f.server.on_request([&](const stand_in::request_record& one) {
      if (one.kind != stand_in::request_kind::graphql || ++asked != count / 500 - 1) return;
      CHECK(f.server.wait_for(
          [](const auto& seen) { return seen.counts.of(stand_in::request_kind::storage).requests > 0; },
          60s));
    });
    const outcome result = f.start(program, with_run(f, {"media/images/validation_1000??.png"}));
    f.server.on_request({});
    CHECK(result.status == 0);
    CHECK(result.err == "");
    CHECK(lines_of(result.out).size() == 100);
    const auto pages = f.server.requests(stand_in::request_kind::graphql);
    CHECK(pages.size() == count / 500);
    const auto files = f.server.requests(stand_in::request_kind::storage);
    REQUIRE(files.size() == 100);
    CHECK(files[0].number < pages.back().number);
#if !TESTS_SANITIZED
    CHECK(result.peak_kibibytes < 128 * 1024);
#endif
    MESSAGE("peak memory with a pattern: " << result.peak_kibibytes / 1024 << " MiB");

    const outcome listed = f.start(program, with_run(f, {"--list"}));
    CHECK(listed.status == 0);
    CHECK(std::count(listed.out.begin(), listed.out.end(), '\n') == count);
#if !TESTS_SANITIZED
    CHECK(listed.peak_kibibytes < 128 * 1024);
#endif
    MESSAGE("peak memory with --list: " << listed.peak_kibibytes / 1024 << " MiB");
  }

  TEST_CASE("--newest restores the match that was changed last") {
    fixture f;
    const std::pair<const char*, const char*> files[] = {{"ckpt/1.pt", "2024-01-02T03:04:05Z"},
                                                         {"ckpt/3.pt", "2024-03-02T03:04:05Z"},
                                                         {"ckpt/2.pt", "2024-02-02T03:04:05Z"},
                                                         {"notes.txt", "2024-04-02T03:04:05Z"}};
    for (const auto& [name, time] : files) {
      stand_in::file_attributes attributes;
      attributes.updated_at = time;
      f.server.add_file(f.run, name, name, attributes);
    }
    CHECK(f.start(program, with_run(f, {"ckpt/", "--newest"})).out == "ckpt/3.pt\n");
    const auto objects =
        objects_of(f.start(program, with_run(f, {"*.pt", "--newest", "--json", "--root", "r/."})).out);
    REQUIRE(objects.size() == 1);
    CHECK(objects[0]["name"] == "ckpt/3.pt");
    CHECK(f.start(program, with_run(f, {"*.h5", "--newest"})).status == 3);
    CHECK_FALSE(fs::exists(f.work() / "ckpt/1.pt"));
  }

  TEST_CASE("--exclude leaves out files that match") {
    fixture f;
    for (const char* name : {"ckpt/a.pt", "ckpt/a.optim", "ckpt/\xc3\xa4.pt", "ckpt/tmp/b.pt"})
      f.server.add_file(f.run, name, name);
    const auto printed = [&](std::vector<std::string> arguments) {
      const outcome result = f.start(program, with_run(f, std::move(arguments)));
      CHECK(result.status == 0);
      return result.out;
    };
    CHECK(printed({"ckpt/", "--exclude", "*.optim", "--exclude", "*/tmp/"}) ==
          "ckpt/a.pt\nckpt/\xc3\xa4.pt\n");
    CHECK_FALSE(fs::exists(f.work() / "ckpt/a.optim"));
    CHECK(printed({"*", "--exclude", "ckpt/?.pt", "--exclude", "*/tmp/", "--newest"}) == "ckpt/a.optim\n");
    CHECK(printed({"ckpt/", "--exclude", "ckpt/?.pt", "--replace", "--dry-run"}) ==
          "12\tckpt/a.optim\n13\tckpt/tmp/b.pt\n");
    CHECK(lines_of(printed({"--list", "--exclude", "*.pt"})).size() == 1);
    CHECK(printed({"ckpt/a.pt", "--exclude", "*.pt"}) ==
          "ckpt/a.pt\n");  // a plain name is not a match of a pattern
    const outcome nothing = f.start(program, with_run(f, {"*.pt", "--exclude", "*"}));
    CHECK(nothing.status == 3);
    check_messages(nothing.err);
    CHECK(contains(nothing.err, "(3) are all excluded"));
    const outcome planned = f.start(program, with_run(f, {"*.pt", "--exclude", "*", "--dry-run"}));
    CHECK(planned.status == 3);
    CHECK(contains(planned.err, "(3) are all excluded"));
  }

  TEST_CASE("--show-settings prints values and sources, no secrets, and makes no request") {
    fixture f;
    f.environment["WANDB_ENTITY"] = "vanpelt";
    f.environment["HTTPS_PROXY"] = "http://user:hidden@127.0.0.1:3128";
    f.environment["WANDB_X_EXTRA_HTTP_HEADERS"] = R"({"X-Team": "hidden"})";
    write_file(f.home() / ".config/wandb/settings", "[default]\nproject = my-project\n");
    const auto setting = [&](const std::string& name, std::vector<std::string> arguments = {}) {
      arguments.push_back("--show-settings");
      const outcome result = f.start(program, arguments);
      CHECK(result.status == 0);
      CHECK_FALSE(contains(result.out, "hidden"));
      for (const std::string& line : lines_of(result.out)) {
        if (line.rfind(name + '\t', 0) == 0) return line.substr(name.size() + 1);
      }
      return std::string("missing");
    };
    CHECK(setting("base_url") == f.server.base_url() + "\tWANDB_BASE_URL");
    CHECK(setting("api_key") == "(set)\tWANDB_API_KEY");
    CHECK(setting("entity") == "vanpelt\tWANDB_ENTITY");
    CHECK(setting("project") == "my-project\tproject in " + (f.home() / ".config/wandb/settings").string());
    CHECK(setting("run_id") == "-\tdefault");
    CHECK(setting("https_proxy").rfind("http://...@127.0.0.1:3128 except localhost,", 0) == 0);
    CHECK(setting("extra_headers") == "X-Team: (set)\tWANDB_X_EXTRA_HTTP_HEADERS");
    CHECK(setting("idle_timeout") == "30 s\tdefault");
    CHECK(setting("idle_timeout", {"--timeout", "2.5"}) == "2.5 s\tcommand line");

    f.environment.erase("WANDB_API_KEY");
    CHECK(setting("api_key") == "-\tdefault");
    write_file(f.home() / ".netrc", "machine 127.0.0.1 login user password " + f.server.key() +
                                        "\n"
                                        "default login user password " +
                                        f.server.key() + "\n");
    CHECK(setting("api_key") == "(set)\tnetrc entry default in " + (f.home() / ".netrc").string());

    const auto objects = objects_of(f.start(program, {"--show-settings", "--json"}).out);
    REQUIRE(objects.size() > 20);
    for (const json& object : objects) CHECK(object.size() == 3);
    CHECK(f.requests() == 0);

    f.environment["WANDB_MODE"] = "sometimes";
    const outcome wrong = f.start(program, {"--show-settings"});
    CHECK(wrong.status == 2);
    CHECK(contains(wrong.out, "base_url\t"));
    CHECK(contains(wrong.err, "WANDB_MODE"));
  }

  TEST_CASE("--wait asks again while the run is running, and ends when the run has ended") {
    fixture f;
    f.server.set_run_state(f.run, "finished");
    const outcome result = f.start(program, with_run(f, {"model.h5", "--wait", "3600"}));
    CHECK(result.status == 3);
    f.server.set_run_state(f.run, "running");
    std::atomic<int> asked{0};
    f.server.on_request([&](const stand_in::request_record& one) {
      if (one.kind == stand_in::request_kind::graphql && ++asked == 2)
        f.server.add_file(f.run, "ckpt/a", "late");
    });
    const outcome late = f.start(program, with_run(f, {"ckpt/*", "--wait", "2"}));  // asks again at the end
    f.server.on_request({});
    CHECK(late.status == 0);
    CHECK(late.out == "ckpt/a\n");
    CHECK(asked == 2);
  }

  TEST_CASE("--dry-run prints what would be downloaded, and downloads nothing") {
    fixture f;
    f.server.add_file(f.run, "ckpt/a.pt", "12345");
    f.server.add_file(f.run, "ckpt/b.pt", "123");
    f.server.add_file(f.run, "c.txt", "1");
    write_file(f.work() / "here/ckpt/a.pt", "old");
    write_file(f.work() / "here/ckpt/b.pt", "123");
    const auto shown = [&](std::vector<std::string> arguments) {
      arguments.insert(arguments.end(), {"--dry-run", "--root", "here"});
      const outcome result = f.start(program, with_run(f, std::move(arguments)));
      CHECK(result.status == 0);
      CHECK(contains(result.err, "would be downloaded"));
      return result.out;
    };
    CHECK(shown({"ckpt/", "c.txt"}) == "1\there/c.txt\n");  // local copies are kept
    CHECK(shown({"ckpt/", "--refresh"}) == "5\there/ckpt/a.pt\n");
    CHECK(shown({"*", "--replace"}) == "1\there/c.txt\n5\there/ckpt/a.pt\n3\there/ckpt/b.pt\n");
    CHECK(read_file(f.work() / "here/ckpt/a.pt") == "old");
    CHECK_FALSE(fs::exists(f.work() / "here/c.txt"));
    CHECK(f.server.requests(stand_in::request_kind::storage).empty());
    CHECK(f.server.requests(stand_in::request_kind::files).empty());
    const outcome missing = f.start(program, with_run(f, {"*.h5", "--dry-run"}));
    CHECK(missing.status == 3);
    CHECK(missing.out == "");
    const auto objects = objects_of(f.start(program, with_run(f, {"c.txt", "--dry-run", "--json"})).out);
    REQUIRE(objects.size() == 1);
    CHECK(objects[0]["name"] == "c.txt");
    CHECK(objects[0]["size"] == 1);
  }

  TEST_CASE(
      "--dry-run refuses what a restore would refuse: a directory in a file's place, a root that is a file") {
    fixture f;
    f.server.add_file(f.run, "a.txt", "1");
    f.server.add_file(f.run, "b.txt", "22");
    fs::create_directories(f.work() / "here/a.txt");
    write_file(f.work() / "file", "no directory");
    for (const bool is_dry : {false, true}) {
      CAPTURE(is_dry);
      std::vector<std::string> taken = {"*", "--root", "here"}, rootless = {"b.txt", "--root", "file"};
      for (auto* arguments : {&taken, &rootless})
        if (is_dry) arguments->push_back("--dry-run");
      const outcome directory = f.start(program, with_run(f, taken));
      CHECK(directory.status == 7);
      CHECK(contains(directory.err, "here/a.txt"));
      CHECK(contains(directory.err, "is a directory"));
      CHECK(contains(directory.out, "here/b.txt"));
      const outcome file = f.start(program, with_run(f, rootless));
      CHECK(file.status == 2);
      CHECK(contains(file.err, "is not a directory"));
      CHECK(file.out == "");
      fs::remove(f.work() / "here/b.txt");
    }
  }

  TEST_CASE("--dry-run ends with the status of a restore, wherever that needs no download") {
    fixture f;
    f.server.add_file(f.run, "a.txt", "1");
    f.server.add_file(f.run, "d/Model.h5", "22");
    f.server.add_file(f.run, "d/model.h5", "333");
    f.server.add_file({"vanpelt", "my-project", "other"}, "a.txt", "two");
    write_file(f.work() / "file", "no directory");
    write_file(f.work() / "mine/gone.txt", "a file that the run does not have");
    fs::create_directories(f.work() / "pipe");
    REQUIRE(mkfifo((f.work() / "pipe/a.txt").c_str(), 0600) == 0);
    REQUIRE(f.start(program, {"a.txt", "--run-path", "vanpelt/my-project/other", "--root", "other"}).status ==
            0);
    struct row {
      std::vector<std::string> arguments;
      int status;
      const char* text;
    };
    const std::vector<row> table = {
        {{"d/", "--root", "new"}, 2, "d/Model.h5"},
        {{"d/model.h5", "--root", "new2"}, 0, ""},
        {{"../a.txt"}, 2, "leaves the directory"},
        {{"d/.."}, 2, "leaves the directory"},
        {{"a.txt", "--root", "file/below"}, 2, "is not a directory"},
        {{"*.txt", "--root", "file/below"}, 2, "is not a directory"},
        {{"*.txt", "--newest", "--root", "file"}, 2, "is not a directory"},
        {{"a.txt", "--root", "pipe"}, 7, "is not a regular file"},
        {{"a.txt", "--root", "pipe", "--replace"}, 7, "is not a regular file"},
        {{"a.txt", "--root", "other"}, 8, "--replace"},
        {{"*.txt", "--root", "other"}, 8, "--replace"},
        {{"gone.txt", "--root", "mine"}, 0, ""},
        {{"gone.txt", "--root", "mine", "--refresh"}, 3, "gone.txt"},
        {{"./a.txt", "--root", "new3"}, 0, ""},
        {{"a.txt", "nothing.txt", "../a.txt", "--root", "new4"}, 3, "nothing.txt"},
        {{"a.txt", "--root", "other", "--refresh"}, 0, ""},
    };
    for (const row& r : table) {
      std::vector<std::string> dry = with_run(f, r.arguments);
      dry.push_back("--dry-run");
      CAPTURE(r.arguments[0]);
      CAPTURE(r.arguments.back());
      const outcome planned = f.start(program, dry), real = f.start(program, with_run(f, r.arguments));
      CHECK(planned.status == r.status);
      CHECK(real.status == r.status);
      CHECK(contains(planned.err, r.text));
      CHECK(contains(real.err, r.text));
    }
    f.server.clear_log();
    const outcome kept = f.start(program, with_run(f, {"gone.txt", "--root", "mine", "--dry-run"}));
    CHECK(kept.out == "");
    CHECK(contains(kept.err, "0 files"));
    CHECK(f.requests() == 0);  // as in a restore
  }

  TEST_CASE("--list prints size, time and name, separated by tabs, in the service's order") {
    fixture f;
    f.server.add_file(f.run, "a/best.ckpt", "0123456789");
    stand_in::file_attributes vague;
    vague.size_as = stand_in::size_form::null;
    vague.updated_at = std::nullopt;
    f.server.add_file(f.run, "b.ckpt", "?", vague);
    f.server.add_file(f.run, "config.yaml", "x: 1\n");

    outcome result = f.start(program, with_run(f, {"--list"}));
    CHECK(result.status == 0);
    CHECK(result.err == "");
    CHECK(result.out ==
          "10\t2024-01-02T03:04:05Z\ta/best.ckpt\n-\t-\tb.ckpt\n5\t2024-01-02T03:04:05Z\tconfig.yaml\n");
    CHECK(f.server.requests(stand_in::request_kind::storage).empty());

    SUBCASE("patterns select files") {
      CHECK(lines_of(f.start(program, with_run(f, {"--list", "*.ckpt"})).out).size() ==
            2);  // * goes across '/'
      CHECK(lines_of(f.start(program, with_run(f, {"--list", "?.ckpt"})).out).size() == 1);
      CHECK(lines_of(f.start(program, with_run(f, {"--list", "?.ckpt", "c*g.y?ml"})).out).size() == 2);
      CHECK(lines_of(f.start(program, with_run(f, {"--list", "config.yaml"})).out).size() == 1);
      CHECK(lines_of(f.start(program, with_run(f, {"--list", "*"})).out).size() == 3);
    }
    SUBCASE("a pattern without a match is file_not_found") {
      result = f.start(program, with_run(f, {"--list", "*.h5", "*.yaml"}));
      CHECK(result.status == 3);
      CHECK(lines_of(result.out).size() == 1);
      check_messages(result.err);
      CHECK(contains(result.err, "*.h5"));
      CHECK_FALSE(contains(result.err, "*.yaml"));
    }
    SUBCASE("--exclude that leaves out every match is file_not_found") {
      result = f.start(program, with_run(f, {"--list", "*.ckpt", "*.yaml", "--exclude", "*.ckpt"}));
      CHECK(result.status == 3);
      CHECK(lines_of(result.out).size() == 1);
      check_messages(result.err);
      CHECK(contains(result.err, "*.ckpt"));
      CHECK(contains(result.err, "(2) are all excluded"));
    }
    SUBCASE("--json") {
      const auto objects = objects_of(f.start(program, with_run(f, {"--list", "--json"})).out);
      REQUIRE(objects.size() == 3);
      CHECK(objects[0] == json{{"name", "a/best.ckpt"},
                               {"size", 10},
                               {"md5", stand_in::md5_hex(*stand_in::bytes("0123456789"))},
                               {"mimetype", "application/octet-stream"},
                               {"updated_at", "2024-01-02T03:04:05Z"}});
      CHECK(objects[1]["size"].is_null());
      CHECK(objects[1]["updated_at"].is_null());
    }
  }

  TEST_CASE("--list of a run without files prints nothing, status 0; --list of an unknown run fails") {
    fixture f;
    const outcome result = f.start(program, with_run(f, {"--list"}));
    CHECK(result.status == 0);
    CHECK(result.out == "");
    CHECK(f.start(program, {"--list", "--run-path", "vanpelt/my-project/nothing"}).status == 3);
  }

  TEST_CASE("control characters in names are replaced on a terminal, and escaped in JSON") {
    fixture f;
    f.server.add_file(f.run, "a\x1b[2J\tb", "x");
    CHECK(f.start(program, with_run(f, {"--list"})).out == "1\t2024-01-02T03:04:05Z\ta?[2J?b\n");
    const auto objects = objects_of(f.start(program, with_run(f, {"--list", "--json"})).out);
    REQUIRE(objects.size() == 1);
    CHECK(objects[0]["name"] == "a\x1b[2J\tb");
  }

  TEST_CASE("--help and --version go to standard output") {
    fixture f;
    outcome result = f.start(program, {"--help"});
    CHECK(result.status == 0);
    CHECK(result.err == "");
    for (const char* option : {"--run-path", "--replace", "--refresh", "--root", "--exclude", "--newest",
                               "--show-settings", "--wait", "--dry-run", "--list", "--json", "--connections",
                               "--timeout", "--quiet", "--no-progress", "--version", "Exit status"}) {
      CHECK_MESSAGE(contains(result.out, option), option);
    }
    result = f.start(program, {"--version"});
    CHECK(result.status == 0);
    CHECK(result.out.rfind("wandb-restore ", 0) == 0);
    CHECK(f.requests() == 0);
  }

  TEST_CASE("invalid arguments: status 2, a message, no request") {
    fixture f;
    const std::vector<std::vector<std::string>> table = {
        {},
        {"--json"},
        {"a.txt", "--no-such-option"},
        {"a.txt", "--run-path"},
        {"a.txt", "--replace", "--refresh"},
        {"a.txt", "--connections", "0"},
        {"a.txt", "--connections", "-1"},
        {"a.txt", "--connections", "many"},
        {"a.txt", "--connections", "1.5"},
        {"a.txt", "--timeout", "0"},
        {"a.txt", "--timeout", "-1"},
        {"a.txt", "--timeout", "soon"},
        {"a.txt", "--timeout", "nan"},
        {"a.txt", "--timeout", "inf"},
        {"a.txt", "--timeout", "1e300"},
        {"a.txt", "--wait", "-1"},
        {"a.txt", "--wait", "nan"},
        {"a.txt", "--wait", "1", "--dry-run"},
        {"--list", "--newest"},
        {"--list", "--dry-run"},
        {"--newest"},
        {""},
        {"."},
        {"../a.txt"},
        {"a/../../a.txt"},
        {"/etc/passwd"},
        {"a.txt", "--run-path", "a/b/c/d/e"},
        {"a.txt", "--run-path", "e/p:"},
        {"a.txt", "--run-path", "e//r"},
        {"--list", "--run-path", "a/b/c/d/e"},
    };
    for (const auto& arguments : table) {
      std::vector<std::string> words = arguments;
      if (std::find(words.begin(), words.end(), "--run-path") == words.end()) words = with_run(f, words);
      std::string shown;
      for (const std::string& word : words) shown += " '" + word + "'";
      INFO("wandb-restore", shown);
      const outcome result = f.start(program, words);
      CHECK(result.status == 2);
      CHECK(result.out == "");
      for (const std::string& line : lines_of(result.err)) CHECK(line.rfind("wandb-restore: ", 0) == 0);
      CHECK(result.err != "");
    }
    CHECK(f.server.requests(stand_in::request_kind::files).empty());
    CHECK(f.server.requests(stand_in::request_kind::storage).empty());
  }

  TEST_CASE("messages about arguments name the option or an example, and --help") {
    fixture f;
    const auto err = [&](const std::vector<std::string>& arguments) {
      const outcome result = f.start(program, arguments);
      CHECK(result.status == 2);
      CHECK(contains(result.err, "--help"));
      return result.err;
    };
    CHECK(contains(err({}), "wandb-restore model-best.h5 --run-path entity/project/run_id"));
    CHECK(contains(err({"a.txt", "--timeout", "soon"}), "--timeout"));
    CHECK(contains(err({"a.txt", "--no-such-option"}), "--no-such-option"));
  }

  TEST_CASE("a run path in place of a name: the message names --run-path") {
    fixture f;
    const outcome both = f.start(program, {"a.txt", "team/project/run1"});
    CHECK(both.status == 2);
    CHECK(contains(both.err, "no run path was given"));
    CHECK(contains(both.err, "--run-path team/project/run1"));
    const outcome one = f.start(program, {"a.txt"});
    CHECK(one.status == 2);
    CHECK(contains(one.err, "--run-path"));
    CHECK(f.server.requests().empty());
  }

  TEST_CASE("each kind of failure has its exit status and one message, and leaves the old file unchanged") {
    using namespace stand_in;
    struct row {
      const char* what;
      int status;
      std::function<void(fixture&)> prepare;
      std::vector<std::string> more = {};
    };
    const auto environment = [](const char* name, std::string value) {
      return [name, value](fixture& f) { f.environment[name] = value; };
    };
    const auto fault = [](target where, action what) {
      return [where, what](fixture& f) { f.server.add_fault(where, what); };
    };
    const std::vector<row> table = {
        {"a malformed base URL", 2, environment("WANDB_BASE_URL", "ftp://127.0.0.1")},
        {"a malformed key", 2, environment("WANDB_API_KEY", "short")},
        {"no such run", 3, [](fixture& f) { f.server.remove_run(f.run); }},
        {"no such file", 3, [](fixture& f) { f.server.remove_file(f.run, "a.txt"); }},
        {"401", 4, [](fixture& f) { f.server.set_key(std::string(40, 'x')); }},
        {"403 from the service", 4, fault(place::graphql, act::status(403))},
        {"403 from storage, again and again", 4, fault(place::storage, act::status(403))},
        {"WANDB_MODE=offline", 5, environment("WANDB_MODE", "offline")},
        {"nobody listens", 5, [](fixture& f) { f.server.stop(); }, {"--timeout", "0.5"}},
        {"no such host",
         5,
         environment("WANDB_BASE_URL", "https://no-such-host.invalid"),
         {"--timeout", "0.5"}},
        {"a certificate that another authority signed", 5,
         [](fixture& f) { server().write_ca(f.directory.path() / "ca.pem"); }},
        {"a file without certificates", 2, environment("SSL_CERT_FILE", "/dev/null")},
        {"a peer that says nothing", 5, fault(place::graphql, act::hang()), {"--timeout", "0.2"}},
        {"a status that is not retried", 5, fault(place::storage, act::status(404))},
        {"an answer that is not what was promised", 6, fault(place::graphql, act::wrong_shape())},
        {"another md5, twice", 6,
         [](fixture& f) {
           file_attributes wrong;
           wrong.md5 = md5_base64(*bytes("another"));
           f.server.add_file(f.run, "a.txt", "new", wrong);
         }},
    };
    for (const row& r : table) {
      SUBCASE(r.what) {
        fixture f;
        f.server.add_file(f.run, "a.txt", "new");
        write_file(f.work() / "a.txt", "old");
        r.prepare(f);
        std::vector<std::string> words = with_run(f, {"a.txt", "--replace"});
        words.insert(words.end(), r.more.begin(), r.more.end());
        const outcome result = f.start(program, words);
        CHECK(result.status == r.status);
        CHECK(result.out == "");
        check_messages(result.err);
        CHECK(read_file(f.work() / "a.txt") == "old");

        words.push_back("--quiet");  // suppresses warnings and progress, but not errors
        const outcome quiet = f.start(program, words);
        CHECK(quiet.status == r.status);
        check_messages(quiet.err);
      }
    }
  }

  TEST_CASE("no run is known: status 2") {
    fixture f;
    CHECK(f.start(program, {"a.txt"}).status == 2);
  }

  TEST_CASE("an account without a default entity: status 2") {
    stand_in::options how;
    how.viewer_entity = std::nullopt;
    fixture f(how);
    CHECK(f.start(program, {"a.txt", "--run-path", "my-project/a1b2c3d"}).status == 2);
  }

  TEST_CASE("a directory has the file's name: status 7") {
    fixture f;
    f.server.add_file(f.run, "a.txt", "new");
    write_file(f.work() / "a.txt/b.txt", "mine");
    const outcome result = f.start(program, with_run(f, {"a.txt", "--replace"}));
    CHECK(result.status == 7);
    check_messages(result.err);
    CHECK(read_file(f.work() / "a.txt/b.txt") == "mine");
  }

  TEST_CASE("the local copy is from another run: status 8, and the copy stays") {
    fixture f;
    f.server.add_file(f.run, "a.txt", "one");
    f.server.add_file({"vanpelt", "my-project", "other"}, "a.txt", "two");
    REQUIRE(f.start(program, with_run(f, {"a.txt"})).status == 0);
    const outcome result = f.start(program, {"a.txt", "--run-path", "vanpelt/my-project/other"});
    CHECK(result.status == 8);
    check_messages(result.err);
    CHECK(read_file(f.work() / "a.txt") == "one");
  }

  TEST_CASE("a failed write to standard output: status 7") {
    fixture f;
    f.server.add_file(f.run, "a.txt", "new");
    setup how = f.how();
    pipe_ends nobody_reads = make_pipe();
    nobody_reads.read.close();
    const descriptor full(::open("/dev/full", O_WRONLY | O_CLOEXEC));
    for (const int output : {nobody_reads.write.get(), full.get()}) {
      if (output < 0) continue;  // no /dev/full here
      how.standard_output = output;
      for (const auto& words :
           {with_run(f, {"a.txt"}), with_run(f, {"--list"}), with_run(f, {"--list", "--json"})}) {
        child running(example(program), words, how);
        const outcome result = running.wait();
        CHECK(result.status == 7);
        check_messages(result.err);
        CHECK(contains(result.err, "standard output"));
      }
    }
  }

  TEST_CASE("an interrupt: status 130, and the remaining names are not tried") {
    for (const int number : {SIGINT, SIGTERM}) {
      CAPTURE(number);
      fixture f;
      f.server.add_file(f.run, "model.h5", stand_in::generated(3'000'000));
      f.server.add_file(f.run, "next.h5", "next");
      f.server.add_fault(stand_in::place::storage, stand_in::act::stall(1'000'000));

      child running(example(program), with_run(f, {"model.h5", "next.h5"}), f.how());
      REQUIRE(f.server.wait_for([](const auto& seen) { return seen.counts.stalled >= 1; }, 60s));
      running.signal(number);
      const outcome result = running.wait();
      f.check_no_secret(result);
      CHECK(result.status == 130);
      CHECK(result.out == "");
      check_messages(result.err);
      CHECK(contains(result.err, "next call"));
      CHECK_FALSE(fs::exists(f.work() / "model.h5"));
      CHECK_FALSE(fs::exists(f.work() / "next.h5"));
    }
  }

  TEST_CASE("an interrupt in the middle of a pattern: the next call fetches only what is missing") {
    fixture f;
    for (const char* name : {"ckpt/a", "ckpt/b", "ckpt/c"})
      f.server.add_file(f.run, name, stand_in::generated(300'000));
    f.server.add_fault(stand_in::target(stand_in::place::storage).matching("ckpt/b"),
                       stand_in::act::stall(100'000));
    child running(example(program), with_run(f, {"ckpt/", "--json"}), f.how());
    REQUIRE(f.server.wait_for([](const auto& seen) { return seen.counts.stalled >= 1; }, 60s));
    const auto end = std::chrono::steady_clock::now() + 60s;
    while (!fs::exists(f.work() / "ckpt/a") || !fs::exists(f.work() / "ckpt/c")) {
      REQUIRE(std::chrono::steady_clock::now() < end);
      std::this_thread::yield();
    }
    running.signal(SIGINT);
    const outcome result = running.wait();
    CHECK(result.status == 130);
    check_messages(result.err);
    CHECK(contains(result.err, "next call"));
    const auto objects = objects_of(result.out);
    REQUIRE(objects.size() == 3);
    CHECK(objects[2]["totals"]["downloaded"] == 2);
    CHECK(objects[2]["totals"]["failed"] == 1);

    f.server.clear_faults();
    f.server.clear_log();
    CHECK(f.start(program, with_run(f, {"ckpt/"})).status == 0);
    const auto fetched = f.server.requests(stand_in::request_kind::storage);
    REQUIRE(!fetched.empty());
    for (const auto& request : fetched) CHECK(contains(request.target, "ckpt/b"));
    CHECK(fs::file_size(f.work() / "ckpt/b") == 300'000);
  }

  TEST_CASE("warnings go to standard error; --quiet suppresses them") {
    fixture f;
    f.server.add_file(f.run, "a.txt", "new");
    f.environment["WANDB_INSECURE_DISABLE_SSL"] = "true";
    f.environment.erase("SSL_CERT_FILE");
    outcome result = f.start(program, with_run(f, {"a.txt", "--replace"}));
    CHECK(result.status == 0);
    CHECK(result.err.rfind("wandb-restore: warning: ", 0) == 0);
    result = f.start(program, with_run(f, {"a.txt", "--replace", "--quiet"}));
    CHECK(result.status == 0);
    CHECK(result.err == "");
  }

  // ---- on a terminal

  struct screen {
    std::vector<std::string> frames;  // successive contents of the line
    std::string last;                 // the last content
  };

  screen watch(const std::string& err) {
    screen seen;
    std::string frame;
    for (const char c : err + '\r') {
      if (c != '\r' && c != '\n') {
        frame += c;
      } else if (!frame.empty()) {
        seen.frames.push_back(std::exchange(frame, ""));
      }
    }
    if (!seen.frames.empty()) seen.last = seen.frames.back();
    return seen;
  }

  TEST_CASE("a terminal shows a progress line that fits its width, then one final line") {
    if (!has_terminals()) return;
    for (const unsigned short width : {static_cast<unsigned short>(100), static_cast<unsigned short>(40),
                                       static_cast<unsigned short>(12)}) {
      CAPTURE(width);
      stand_in::options options;
      options.global_rate = 4'000'000;
      fixture f(options);
      f.server.add_file(f.run, "checkpoints/epoch-12/model-best.h5", stand_in::generated(2'000'000));
      terminal tty(width);
      setup how = f.how();
      how.tty = &tty;
      child running(example(program), with_run(f, {"checkpoints/epoch-12/model-best.h5"}), how);
      const outcome result = running.wait();
      CHECK(result.status == 0);
      const screen seen = watch(result.err);
      REQUIRE(seen.frames.size() > 2);
      bool rate = false;
      for (const std::string& frame : seen.frames) {
        if (&frame != &seen.frames.back()) CHECK(frame.size() < width);
        for (const char c : frame) CHECK((c >= ' ' && c < 127));
        if (frame.find("iB/s") != std::string::npos) rate = true;
      }
      CHECK(contains(seen.frames[0], "%"));
      if (width == 100) {
        CHECK(contains(seen.frames[0], "model-best.h5"));
        CHECK(contains(seen.frames[0], "1.9 MiB"));
        CHECK(contains(seen.frames[0], "left"));
        CHECK(rate);
      }
      CHECK(contains(seen.last, "verified"));
      if (width >= 40) {
        CHECK(seen.last.size() < width);
        CHECK(contains(seen.last, "best.h5  1.9 MiB in "));
      }
      CHECK(result.err.substr(result.err.size() - 2) == "\r\n");
    }
  }

  TEST_CASE("the progress line of many files counts them, and fits terminals of 80 and 40 columns") {
    if (!has_terminals()) return;
    for (const unsigned short width : {static_cast<unsigned short>(80), static_cast<unsigned short>(40)}) {
      CAPTURE(width);
      stand_in::options options;
      options.global_rate = 2'000'000;  // 1.2 s: the rate is shown after half a second
      fixture f(options);
      for (int i = 0; i < 12; ++i)
        f.server.add_file(f.run, "checkpoints/epoch-" + std::to_string(i), stand_in::generated(200'000));
      terminal tty(width);
      setup how = f.how();
      how.tty = &tty;
      child running(example(program), with_run(f, {"checkpoints/"}), how);
      const outcome result = running.wait();
      CHECK(result.status == 0);
      CHECK(lines_of(result.out).size() == 12);
      const screen seen = watch(result.err);
      REQUIRE(seen.frames.size() > 2);
      bool is_whole = false;
      for (const std::string& frame : seen.frames) {
        if (&frame != &seen.frames.back()) CHECK(frame.size() < width);
        for (const char c : frame) CHECK((c >= ' ' && c < 127));
        is_whole = is_whole || (contains(frame, "%") && contains(frame, width == 80 ? "/12 files" : "/12 ") &&
                                contains(frame, width == 80 ? "/2.3 MiB" : "/2.3MiB") &&
                                contains(frame, "iB/s") && contains(frame, ":0"));
      }
      CHECK(is_whole);
      CHECK(contains(seen.last, "12 of 12 files"));
      CHECK(seen.last.size() < width);

      terminal next(width);
      how.tty = &next;
      child keeping(example(program), with_run(f, {"checkpoints/"}), how);
      const screen kept = watch(keeping.wait().err);
      CHECK(kept.last.substr(kept.last.find("  ")) == "  12 of 12 files, local copies kept");
      CHECK(kept.last.size() < width);
    }
  }

  TEST_CASE("the progress line is cleared before paths are printed to the same terminal") {
    if (!has_terminals()) return;
    stand_in::options options;
    options.global_rate = 2'000'000;
    fixture f(options);
    for (const char* name : {"ckpt/a", "ckpt/b"})
      f.server.add_file(f.run, name, stand_in::generated(500'000));
    terminal tty(80);
    setup how = f.how();
    how.tty = &tty;
    how.standard_output = tty.slave().get();
    child running(example(program), with_run(f, {"ckpt/"}), how);
    const outcome result = running.wait();
    CHECK(result.status == 0);
    const std::size_t percent = result.err.rfind('%');
    REQUIRE(percent != std::string::npos);
    const std::size_t cleared = result.err.find("\r  ", percent);
    CHECK(cleared != std::string::npos);
    CHECK(cleared < result.err.find("ckpt/a\r\nckpt/b\r\n", percent));
  }

  TEST_CASE("the progress line says that a file is waited for") {
    if (!has_terminals()) return;
    for (const char* name : {"ckpt/*", "late.h5"}) {
      fixture f;
      f.server.set_run_state(f.run, "running");
      terminal tty(40);
      setup how = f.how();
      how.tty = &tty;
      child running(example(program), with_run(f, {name, "--wait", "3600"}), how);
      REQUIRE(running.read_until([](const std::string& err) { return contains(err, "waiting    0:0"); }));
      running.signal(SIGINT);
      const outcome result = running.wait();
      CHECK(result.status == 130);
      CHECK_FALSE(contains(result.err, "%"));
    }
  }

  TEST_CASE("no colours and no other control sequences, with NO_COLOR or without") {
    if (!has_terminals()) return;
    for (const bool is_set : {false, true}) {
      fixture f;
      f.server.add_file(f.run, "ckpt/a", "a");
      terminal tty(80);
      setup how = f.how();
      how.tty = &tty;
      how.environment["TERM"] = "xterm-256color";
      if (is_set) how.environment["NO_COLOR"] = "1";
      child running(example(program), with_run(f, {"ckpt/", "missing"}), how);
      const outcome result = running.wait();
      CHECK(result.status == 3);
      CHECK_FALSE(contains(result.err, "\x1b"));
    }
  }

  TEST_CASE("no progress line on a terminal that cannot draw a line again") {
    if (!has_terminals()) return;
    fixture f;
    f.server.add_file(f.run, "model.h5", "twelve bytes");
    terminal tty(80);
    setup how = f.how();
    how.tty = &tty;
    how.environment["TERM"] = "dumb";
    child running(example(program), with_run(f, {"model.h5"}), how);
    const outcome result = running.wait();
    CHECK(result.status == 0);
    CHECK(result.err == "");
  }

  TEST_CASE("the progress line follows a change of the terminal's width") {
    if (!has_terminals()) return;
    fixture f;
    f.server.add_file(f.run, "model-best.h5", stand_in::generated(4'000'000));
    f.server.add_fault(stand_in::place::storage, stand_in::act::stall(1'000'000));
    terminal tty(120);
    setup how = f.how();
    how.tty = &tty;
    child running(example(program), with_run(f, {"model-best.h5"}), how);
    REQUIRE(running.read_until([](const std::string& err) { return contains(err, "%"); }));
    tty.resize(30);
    REQUIRE(running.read_until([](const std::string& err) {  // a line was drawn that is narrow, and complete
      for (std::size_t begin = err.find('\r'), end = 0; begin != err.npos; begin = end) {
        end = err.find('\r', begin + 1);
        if (end != err.npos && end - begin > 1 && end - begin <= 30) return true;
      }
      return false;
    }));
    f.server.release();
    const outcome result = running.wait();
    CHECK(result.status == 0);
    const screen seen = watch(result.err);
    REQUIRE(seen.frames.size() >= 4);
    CHECK(seen.frames[0].size() > 30);
    for (std::size_t begin = 0, end = 0; end != result.err.npos; begin = end + 1) {
      end = result.err.find('\r', begin);
      std::string drawn = result.err.substr(begin, end == result.err.npos ? end : end - begin);
      const auto whole = drawn.size();
      drawn.erase(drawn.find_last_not_of(' ') + 1);
      if (drawn.size() < 30) CHECK(whole < 30);  // not padded to the earlier width, which would wrap
    }
    CHECK(seen.frames[seen.frames.size() - 3].size() < 30);
  }

  TEST_CASE("no progress line with --quiet or --no-progress") {
    if (!has_terminals()) return;
    fixture f;
    f.server.add_file(f.run, "model.h5", "twelve bytes");
    for (const char* option : {"--quiet", "--no-progress"}) {
      terminal tty(80);
      setup how = f.how();
      how.tty = &tty;
      child running(example(program), with_run(f, {"model.h5", "--replace", option}), how);
      const outcome result = running.wait();
      CHECK(result.status == 0);
      CHECK(result.err == "");
    }
  }

  /// Returns the rows that a terminal of `width` columns shows after this output.
  std::vector<std::string> rows_of(const std::string& output, std::size_t width) {
    std::vector<std::string> rows(1);
    std::size_t column = 0;
    for (const char c : output) {
      if (c == '\r') {
        column = 0;
      } else if (c == '\n') {
        rows.emplace_back();
      } else {
        if (column == width) {
          rows.emplace_back();
          column = 0;
        }
        if (rows.back().size() <= column) rows.back().resize(column + 1, ' ');
        rows.back()[column++] = c;
      }
    }
    for (std::string& row : rows) row.erase(row.find_last_not_of(' ') + 1);
    return rows;
  }

  TEST_CASE("the ^C that a terminal echoes does not spoil the progress line") {
    if (!has_terminals()) return;
    for (const unsigned short width : {static_cast<unsigned short>(80), static_cast<unsigned short>(40)}) {
      CAPTURE(width);
      fixture f;
      f.server.add_file(f.run, "checkpoints/a-directory/another-directory/model-best.h5",
                        stand_in::generated(3'000'000));
      f.server.add_fault(stand_in::place::storage, stand_in::act::stall(1'000'000));
      terminal tty(width);
      setup how = f.how();
      how.tty = &tty;
      child running(example(program),
                    with_run(f, {"checkpoints/a-directory/another-directory/model-best.h5"}), how);
      REQUIRE(running.read_until([](const std::string& err) {  // drawn again several times
        return contains(err, "%") && std::count(err.begin(), err.end(), '\r') >= 5;
      }));
      REQUIRE(::write(tty.master().get(), "\x03", 1) == 1);  // its signal goes to nobody here
      REQUIRE(running.read_until([](const std::string& err) { return contains(err, "^C"); }));
      running.signal(SIGINT);
      const outcome result = running.wait();
      CHECK(result.status == 130);
      const auto rows = rows_of(result.err, width);
      CHECK(rows[0].rfind("wandb-restore: ", 0) == 0);
      for (const std::string& row : rows) CHECK_FALSE(contains(row, "^C"));
    }
  }

  TEST_CASE("an interrupt clears the progress line; the next call resumes") {
    if (!has_terminals()) return;
    fixture f;
    const auto content = stand_in::generated(3'000'000);
    f.server.add_file(f.run, "model.h5", content);
    f.server.add_fault(stand_in::place::storage, stand_in::act::stall(1'000'000));
    terminal tty(80);
    setup how = f.how();
    how.tty = &tty;
    child running(example(program), with_run(f, {"model.h5", "--connections", "1"}), how);
    REQUIRE(running.read_until([](const std::string& err) {  // a part of the file has arrived
      const auto percent = err.rfind('%');
      return percent != std::string::npos && percent >= 2 && err[percent - 2] >= '1' &&
             err[percent - 2] <= '9';
    }));
    running.signal(SIGINT);
    const outcome result = running.wait();
    CHECK(result.status == 130);
    const screen seen = watch(result.err);
    bool erased = false;
    for (const std::string& frame : seen.frames) {
      if (frame.find_first_not_of(' ') == std::string::npos) erased = true;
      if (contains(frame, "wandb-restore: ")) CHECK(erased);
    }
    CHECK(contains(seen.last, "wandb-restore: "));
    CHECK(contains(seen.last, "next call"));

    f.server.clear_faults();
    f.server.clear_log();
    CHECK(f.start(program, with_run(f, {"model.h5", "--connections", "1"})).status == 0);
    CHECK(read_file(f.work() / "model.h5") == stand_in::read_text(*content));
    const auto fetched = f.server.requests(stand_in::request_kind::storage);
    REQUIRE(!fetched.empty());
    CHECK(fetched[0].range().value_or("").rfind("bytes=", 0) == 0);
    CHECK(fetched[0].range().value_or("").rfind("bytes=0-", 0) == std::string::npos);
  }
}
#endif  // _WIN32
