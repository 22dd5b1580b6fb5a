// What a restore means: names, roots, local copies, policies and receipts, against the stand-in over TLS.
#include "restore_fixture.hpp"

#ifndef _WIN32
#include <sys/stat.h>  // mkfifo
#endif
#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <thread>

using namespace restore_tests;
using stand_in::origin;
using wandb::cache_policy;
using wandb::errc;
using verdict = cache_policy::verdict;

namespace {

const std::string old_text = "old bytes";
const std::string new_text = "new bytes, more of them";

void check_file(wandb::restored_file& file, const std::string& text, wandb::source source, bool verified) {
  CHECK(file.tellg() == std::streampos(0));
  CHECK(read_all(file) == text);
  CHECK(file.size() == text.size());
  CHECK(file.source() == source);
  CHECK(file.verified() == verified);
  CHECK(file.md5() == (verified ? stand_in::md5_hex(*stand_in::bytes(text)) : ""));
}

}  // namespace

TEST_SUITE("restore: overloads") {
  TEST_CASE("the free functions, in both overloads, use the environment") {
    fixture f;
    f.server.add_file(f.run, "a.txt", new_text);
    const environment there(f);
    const auto form = [&](wandb::restored_file file, const fs::path& where) {
      check_file(file, new_text, wandb::source::downloaded, true);
      CHECK(file.path() == where);
      CHECK(file.name() == where.string());
    };
    wandb::restore_options options;
    options.root = "1";
    form(wandb::restore("a.txt", options), "1/a.txt");
    form(wandb::restore("a.txt", "vanpelt/my-project/a1b2c3d", false, "2"), "2/a.txt");
    form(wandb::restore("a.txt", std::string("my-project/a1b2c3d"), true, "2"),
         "2/a.txt");  // entity: the environment
    form(wandb::restore("a.txt", std::string_view("a1b2c3d"), false, "3"), "3/a.txt");
    form(f.success(wandb::try_restore("a.txt", f.options(true))), "a.txt");
    form(f.success(wandb::try_restore("a.txt", f.path, true)), "a.txt");
    form(wandb::restore("a.txt", "", true, "4"), "4/a.txt");  // an empty run path is the current run
    CHECK(visible(f.root()) == names{"1/a.txt", "2/a.txt", "3/a.txt", "4/a.txt", "a.txt"});
  }

  TEST_CASE("with a name alone, restore uses the current run and the working directory") {
    fixture f;
    f.server.add_file(f.run, "a.txt", new_text);
    const environment there(f);
    auto file = wandb::restore("a.txt");
    check_file(file, new_text, wandb::source::downloaded, true);
    CHECK(file.path() == "a.txt");
    CHECK(f.asked() == "graphql 1, files 1, storage 1");
    auto again = f.success(wandb::try_restore("a.txt", {}));
    check_file(again, new_text, wandb::source::local, true);
    CHECK(f.asked() == "graphql 1, files 1, storage 1");
  }

  TEST_CASE("try_restore returns the errors that restore throws") {
    fixture f;
    const environment there(f);
    const auto returned = f.failure(wandb::try_restore("none.txt"), errc::file_not_found);
    CHECK(returned.is_not_found());
    try {
      (void)wandb::restore("none.txt", f.path);
      FAIL("nothing was thrown");
    } catch (const std::runtime_error& thrown) {
      CHECK(std::string(thrown.what()) == returned.what());
      const auto* known = dynamic_cast<const wandb::error*>(&thrown);
      REQUIRE(known != nullptr);
      CHECK(known->code() == errc::file_not_found);
    }
    auto client = f.client();
    CHECK_THROWS_AS((void)client.restore("none.txt", f.options()), wandb::error);
    CHECK_THROWS_AS((void)client.restore("none.txt", f.path), wandb::error);
    CHECK_THROWS_AS((void)client.list_files(), wandb::error);  // the settings name no run
  }

  TEST_CASE("a client has both overloads of restore and try_restore") {
    fixture f;
    f.server.add_file(f.run, "a.txt", new_text);
    auto client = f.client();
    auto one = client.restore("a.txt", f.options());
    check_file(one, new_text, wandb::source::downloaded, true);
    auto two = client.restore("a.txt", f.path);
    check_file(two, new_text, wandb::source::local, true);
    auto three = f.success(client.try_restore("a.txt", f.path, true));
    check_file(three, new_text, wandb::source::downloaded, true);
    auto four = f.success(client.try_restore("a.txt", f.path, false, f.root() / "four"));
    check_file(four, new_text, wandb::source::downloaded, true);
  }

  TEST_CASE("a run_path object is accepted in place of every textual run path") {
    fixture f;
    f.server.add_file(f.run, "a.txt", new_text);
    const environment there(f);
    const wandb::run_path run{"vanpelt", "my-project", "a1b2c3d"};
    CHECK(wandb::restore("a.txt", run, true).source() == wandb::source::downloaded);
    CHECK(wandb::restore("a.txt", wandb::run_path{run}, false, "2").path() == fs::path("2") / "a.txt");
    CHECK(f.success(wandb::try_restore("a.txt", run, true)).verified());
    wandb::client<> client;
    CHECK(client.restore("a.txt", run, true).source() == wandb::source::downloaded);
    CHECK(f.success(client.try_restore("a.txt", run, false, "3")).path() == fs::path("3") / "a.txt");
    // Missing entity and project come from the settings; an empty object means the current run.
    CHECK(client.restore("a.txt", wandb::run_path{"", "my-project", "a1b2c3d"}, true).verified());
    CHECK(client.restore("a.txt", wandb::run_path{"", "", "a1b2c3d"}, true).verified());
    CHECK(client.restore("a.txt", wandb::run_path{}, true).verified());
    CHECK(wandb::restore("a.txt", wandb::run_path{}, true).verified());
  }

  TEST_CASE("a run_path object without a textual equivalent is refused without a request") {
    fixture f;
    auto client = f.client();
    const wandb::run_path refused[] = {
        {"vanpelt", "my-project", ""},         // as text: project vanpelt, run my-project
        {"vanpelt", "", "a1b2c3d"},            // a gap
        {"", "vanpelt/my-project", "a1b2c3d"}  // two parts in one
    };
    for (const auto& run : refused) {
      const auto failure = f.failure(client.try_restore("a.txt", run), errc::invalid_run_path);
      check_names(failure, {"a.txt", run.entity, run.project, run.run_id});
      (void)f.failure(client.try_list_files(run), errc::invalid_run_path);
    }
    CHECK(f.asked() == "graphql 0, files 0, storage 0");
  }

  TEST_CASE("list_files takes options, a text or an object, as a member and as a free function") {
    fixture f;
    f.server.add_file(f.run, "a.txt", new_text);
    const environment there(f);
    const wandb::run_path run{"vanpelt", "my-project", "a1b2c3d"};
    const auto has_file = [&](const std::vector<wandb::file_info>& files) {
      return files.size() == 1 && files.front().name == "a.txt" && files.front().size == new_text.size();
    };
    CHECK(has_file(wandb::list_files()));
    CHECK(has_file(wandb::list_files(f.options())));
    CHECK(has_file(wandb::list_files(f.path)));
    CHECK(has_file(wandb::list_files(run)));
    CHECK(has_file(f.success(wandb::try_list_files())));
    CHECK(has_file(f.success(wandb::try_list_files(f.options()))));
    CHECK(has_file(f.success(wandb::try_list_files(std::string(f.path)))));
    CHECK(has_file(f.success(wandb::try_list_files(run))));
    wandb::client<> client;
    CHECK(has_file(client.list_files(f.path)));
    CHECK(has_file(client.list_files(run)));
    CHECK(has_file(f.success(client.try_list_files(f.path))));
    CHECK(has_file(f.success(client.try_list_files(run))));
    (void)f.failure(wandb::try_list_files("vanpelt/my-project/other"), errc::run_not_found);
    CHECK_THROWS_AS((void)wandb::list_files("vanpelt/my-project/other"), wandb::error);
  }

  TEST_CASE(
      "an explicit run path takes one query, one redirect, one fetch, and a handshake for each origin") {
    fixture f;
    f.server.add_file(f.run, "a.txt", new_text);
    auto client = f.client();
    (void)f.success(client.try_restore("a.txt", f.path));
    CHECK(f.asked() == "graphql 1, files 1, storage 1");
    CHECK(f.server.counted().of(origin::service).handshakes == 1);
    CHECK(f.server.counted().of(origin::storage).handshakes == 1);
  }

  TEST_CASE("restores through one client share its connections") {
    fixture f;
    for (int i = 0; i < 20; ++i) f.server.add_file(f.run, "f" + std::to_string(i), new_text);
    auto client = f.client();
    for (int i = 0; i < 20; ++i) (void)f.success(client.try_restore("f" + std::to_string(i), f.path));
    CHECK(f.asked() == "graphql 20, files 20, storage 20");
    CHECK(f.server.counted().of(origin::service).handshakes == 1);
    CHECK(f.server.counted().of(origin::storage).handshakes == 1);
  }

  TEST_CASE("a moved client keeps its connections") {
    fixture f;
    f.server.add_file(f.run, "a.txt", new_text);
    auto first = f.client();
    (void)f.success(first.try_restore("a.txt", f.path));
    auto second = std::move(first);
    (void)f.success(second.try_restore("a.txt", f.path, true));
    CHECK(f.server.counted().of(origin::service).handshakes == 1);
  }

  TEST_CASE("in C++17 the options are members of a restore_options") {
    fixture f;
    f.server.add_file(f.run, "a.txt", new_text);
    wandb::restore_options options;
    CHECK(options.run_path.empty());
    CHECK_FALSE(options.replace);
    CHECK(options.root.empty());
    CHECK_FALSE(options.cache.has_value());
    CHECK(options.verify);
    CHECK(options.connections >= 1);
    CHECK(options.cancel == nullptr);
    options.run_path = f.path;
    options.root = f.root() / "ckpt";
    auto client = f.client();
    auto file = f.success(client.try_restore("a.txt", options));
    CHECK(file.path() == f.root() / "ckpt" / "a.txt");
  }

  TEST_CASE("options: verify = false accepts any content, which is not verified()") {
    fixture f;
    stand_in::file_attributes wrong;
    wrong.md5 = stand_in::md5_base64(*stand_in::bytes("another"));
    f.server.add_file(f.run, "a.txt", new_text, wrong);
    auto client = f.client();
    auto options = f.options();
    const auto failure = f.failure(client.try_restore("a.txt", options), errc::checksum_mismatch);
    CHECK(contains(failure.what(), "again after a second fetch from nothing"));
    options.verify = false;
    auto file = f.success(client.try_restore("a.txt", options));
    check_file(file, new_text, wandb::source::downloaded, false);
    auto kept = f.success(client.try_restore("a.txt", options));
    check_file(kept, new_text, wandb::source::local, false);
  }

  TEST_CASE("options: progress ends with the total; false cancels") {
    fixture f;
    f.server.add_file(f.run, "a.txt", stand_in::generated(300'000));
    auto client = f.client();
    auto options = f.options();
    std::uint64_t last = 0, end = 0, calls = 0;
    bool grows = true;
    options.on_progress = [&](const wandb::progress& now) {
      end = now.bytes_done;  // in any phase: the last report is that of the verification
      CHECK(now.name == "a.txt");
      CHECK(now.bytes_total == std::uint64_t{300'000});
      if (now.phase == wandb::phase::downloading) {
        grows = grows && now.bytes_done >= last;
        last = now.bytes_done;
      }
      ++calls;
      return true;
    };
    (void)f.success(client.try_restore("a.txt", options));
    CHECK(calls >= 1);
    CHECK(grows);
    CHECK(end == 300'000);

    options.replace = true;
    options.on_progress = [](const wandb::progress&) { return false; };
    (void)f.failure(client.try_restore("a.txt", options), errc::cancelled);
    CHECK(fs::file_size(f.root() / "a.txt") == 300'000);
  }

  TEST_CASE("options: a cancel flag that is already set ends the call before any request") {
    fixture f;
    f.server.add_file(f.run, "a.txt", new_text);
    const std::atomic<bool> cancel{true};
    auto options = f.options();
    options.cancel = &cancel;
    auto client = f.client();
    (void)f.failure(client.try_restore("a.txt", options), errc::cancelled);
    (void)f.failure(client.try_list_files(options), errc::cancelled);
    CHECK(f.asked() == "graphql 0, files 0, storage 0");
    CHECK(visible(f.root()).empty());
  }

  TEST_CASE("options: a cancel flag ends a call that waits for a server") {
    fixture f;
    f.server.add_file(f.run, "a.txt", new_text);
    f.server.add_fault(place::storage, act::hang());
    std::atomic<bool> cancel{false};
    auto options = f.options();
    options.cancel = &cancel;
    std::thread other([&] {
      CHECK(f.server.wait_for([](const auto& seen) { return seen.counts.stalled > 0; }, 20s));
      cancel = true;
    });
    auto client = f.client();
    (void)f.failure(client.try_restore("a.txt", options), errc::cancelled);
    other.join();
    CHECK(visible(f.root()).empty());
  }

  TEST_CASE("options: hashing a local copy reports progress, and can be cancelled") {
    fixture f;
    f.server.add_file(f.run, "a.bin", stand_in::generated(0, 1));
    constexpr std::uint64_t size = 1 << 30;
    std::atomic<bool> cancel{false};
    for (const bool by_flag : {false, true}) {
      fs::create_directories(f.root());
      std::ofstream(f.root() / "a.bin").close();
      fs::resize_file(f.root() / "a.bin", size);  // a hole: takes no space
      auto options = f.options();
      // With a rule, so that the size alone does not decide.
      options.cache = [](const wandb::local_copy& local, const wandb::file_info*) {
        return local.md5().empty() ? wandb::cache_policy::verdict::fetch : wandb::cache_policy::verdict::keep;
      };
      bool verifying = false;
      options.cancel = &cancel;
      options.on_progress = [&](const wandb::progress& now) {
        verifying = now.phase == wandb::phase::verifying && now.bytes_total == size && now.bytes_done < size;
        if (by_flag) cancel = true;
        return by_flag;
      };
      auto client = f.client();
      (void)f.failure(client.try_restore("a.bin", options), errc::cancelled);
      CHECK(verifying);
      CHECK(fs::file_size(f.root() / "a.bin") == size);
      CHECK(f.asked() == "graphql 0, files 0, storage 0");
    }
  }

  TEST_CASE("options: invalid options are refused without a request") {
    fixture f;
    auto client = f.client();
    for (const int connections : {0, -1}) {
      auto options = f.options();
      options.connections = connections;
      check_names(f.failure(client.try_restore("a.txt", options), errc::invalid_argument),
                  {"connections", "1"});
    }
    CHECK(f.asked() == "graphql 0, files 0, storage 0");
  }
}

TEST_SUITE("restore: the stream") {
  TEST_CASE("line ends, NUL and control-Z are restored unchanged") {
    fixture f;
    std::string every;
    for (int i = 0; i < 1024; ++i) every += static_cast<char>(i & 0xff);
    every += "\r\n\n\r\x1a";
    f.server.add_file(f.run, "bytes.bin", every);
    auto client = f.client();
    auto file = client.restore("bytes.bin", f.path);
    check_file(file, every, wandb::source::downloaded, true);
    auto kept = client.restore("bytes.bin", f.path);
    check_file(kept, every, wandb::source::local, true);
  }

  TEST_CASE("an empty file is restored") {
    fixture f;
    f.server.add_file(f.run, "empty", "");
    auto client = f.client();
    auto file = client.restore("empty", f.path);
    CHECK(file.is_open());
    check_file(file, "", wandb::source::downloaded, true);
    CHECK(visible(f.root()) == names{"empty"});
  }

  TEST_CASE("a moved stream keeps its position") {
    fixture f;
    f.server.add_file(f.run, "a.txt", new_text);
    auto client = f.client();
    auto first = client.restore("a.txt", f.path);
    std::string head(9, '\0');
    REQUIRE(first.read(head.data(), 9));
    CHECK(head == "new bytes");
    wandb::restored_file second = std::move(first);
    CHECK(second.tellg() == std::streampos(9));
    auto other = client.restore("a.txt", f.path);
    other = std::move(second);
    CHECK(read_all(other) == new_text.substr(9));
    CHECK(other.path() == f.root() / "a.txt");
    CHECK(other.verified());
    std::vector<wandb::restored_file> several;
    several.push_back(client.restore("a.txt", f.path));
    several.push_back(client.restore("a.txt", f.path));
    several.push_back(client.restore("a.txt", f.path));
    for (auto& one : several) CHECK(read_all(one) == new_text);
  }

  TEST_CASE("the stream stays on the verified file after the name is replaced") {
    fixture f;
    f.server.add_file(f.run, "a.txt", new_text);
    auto client = f.client();
    auto file = client.restore("a.txt", f.path);
    fs::rename(write_file(f.root() / "other", "something else"), f.root() / "a.txt");
    CHECK(read_all(file) == new_text);
  }

  TEST_CASE("a replacement does not disturb a reader of the old copy") {
    fixture f;
    f.server.add_file(f.run, "a.txt", old_text);
    auto client = f.client();
    auto before = client.restore("a.txt", f.path);
    f.server.add_file(f.run, "a.txt", new_text);
    auto after = client.restore("a.txt", f.path, true);
    CHECK(read_all(before) == old_text);
    CHECK(read_all(after) == new_text);
  }

  TEST_CASE("seeking works both ways") {
    fixture f;
    f.server.add_file(f.run, "a.txt", new_text);
    auto client = f.client();
    auto file = client.restore("a.txt", f.path);
    file.seekg(-4, std::ios::end);
    CHECK(read_all(file) == "them");
    file.clear();
    file.seekg(0);
    CHECK(read_all(file) == new_text);
  }
}

TEST_SUITE("restore: names and roots") {
  TEST_CASE("accepted names map to their local path and their name in the query") {
    struct row {
      const char *name, *local, *remote;
    };
    const std::vector<row> table = {
        {"a", "a", "a"},
        {"sub/dir/a.txt", "sub/dir/a.txt", "sub/dir/a.txt"},
        {"./a", "a", "a"},
        {"a//b", "a/b", "a/b"},
        {"x/./y", "x/y", "x/y"},
        {"..a", "..a", "..a"},
        {"a..", "a..", "a.."},
        {"...", "...", "..."},
        {"~/a", "~/a", "~/a"},
        {"con", "con", "con"},
        {"with space.txt", "with space.txt", "with space.txt"},
        {"100%.txt", "100%.txt", "100%.txt"},
        {"%2e%2e", "%2e%2e", "%2e%2e"},
        {"what?#.txt", "what?#.txt", "what?#.txt"},
        {"gr\xc3\xbc\xc3\x9f \xe6\xa8\xa1\xe5\x9e\x8b.h5", "gr\xc3\xbc\xc3\x9f \xe6\xa8\xa1\xe5\x9e\x8b.h5",
         "gr\xc3\xbc\xc3\x9f \xe6\xa8\xa1\xe5\x9e\x8b.h5"},
        {"step:100.ckpt", "step:100.ckpt", "step:100.ckpt"},
        {"quote\"'.txt", "quote\"'.txt", "quote\"'.txt"},
#ifndef _WIN32
        {"a\\b", "a\\b", "a\\b"},
#endif
    };
    fixture f;
    auto client = f.client();
    for (const row& r : table) {
      CAPTURE(std::string(r.name));
      const std::string text = std::string("content of ") + r.remote;
      f.server.add_file(f.run, r.remote, text);
      const fs::path root = f.root() / std::to_string(&r - table.data());
      auto options = f.options();
      options.root = root;
      auto file = f.success(client.try_restore(r.name, options));
      CHECK(read_all(file) == text);
      CHECK(file.path() == root / fs::u8path(r.name));  // root and name as given
      CHECK(visible(root) == names{r.local});
    }
  }

  TEST_CASE("names that leave the root are refused on every system, without a request or a new directory") {
    using namespace std::string_view_literals;
    // Source: wandb/sdk/lib/paths.py; NUL and directories fail there later.
    const std::vector<std::string_view> table = {
        ""sv,
        "."sv,
        ".."sv,
        "../a"sv,
        "a/.."sv,
        "a/../b"sv,
        "a/../../b"sv,
        "..\\a"sv,
        "a\\..\\b"sv,
        "/a"sv,
        "//host/a"sv,
        "\\a"sv,
        "\\\\host\\share\\a"sv,
        "C:/a"sv,
        "C:a"sv,
        "c:\\a"sv,
        "a:b"sv,
        "1:a"sv,
        "a/"sv,
        "a/."sv,
        "./"sv,
        "a\0b"sv,
        "/"sv,
        "a/..\\b"sv,
        "./.."sv,
        ".wandb-restore-0123456789abcdef.part"sv,
        "a/.wandb-restore-x"sv,
    };
    fixture f;
    auto client = f.client();
    for (const auto name : table) {
      CAPTURE(std::string(name));
      const auto failure = f.failure(client.try_restore(name, f.options()), errc::invalid_argument);
      CHECK(contains(failure.what(), "cannot restore"));
      CHECK_FALSE(contains(failure.what(), std::string_view("\0", 1)));
    }
    CHECK(f.asked() == "graphql 0, files 0, storage 0");
    CHECK(fs::is_empty(f.root()));
  }

  TEST_CASE("a name that the file system rejects is refused, without a request or a new directory") {
    fixture f;
    auto client = f.client();
    for (const std::string& name :
         {std::string(256, 'n'), "a/" + std::string(1000, 'n'), std::string(300, 'n') + "/a"}) {
      CAPTURE(name);
      check_names(f.failure(client.try_restore(name, f.options()), errc::invalid_argument), {"255"});
      (void)f.failure(client.try_restore(name, f.path, false, f.root() / "none"), errc::invalid_argument);
    }
    CHECK(f.asked() == "graphql 0, files 0, storage 0");
    CHECK(fs::is_empty(f.root()));
  }

  TEST_CASE("names are checked before anything else") {
    fixture f;
    auto broken = f.settings();
    broken.base_url = "nonsense";
    broken.offline = true;
    wandb::client<> client(broken);
    auto options = f.options();
    options.run_path = "//";
    (void)f.failure(client.try_restore("../a", options), errc::invalid_argument);
  }

  TEST_CASE("root is the option, else the program's run directory, else the working directory") {
    fixture f;
    f.server.add_file(f.run, "sub/a.txt", new_text);
    const scoped_working_directory there(f.directory.path());
    auto s = f.settings();
    s.run_dir = f.directory / "run dir" / "files";
    wandb::client<> with_run_dir(s);
    s.run_dir.clear();
    wandb::client<> without(s);

    auto options = f.options();
    CHECK(with_run_dir.restore("sub/a.txt", options).path() ==
          f.directory / "run dir" / "files" / "sub/a.txt");
    CHECK(without.restore("sub/a.txt", options).path() == "sub/a.txt");
    CHECK(read_file(f.directory / "sub" / "a.txt") == new_text);

    for (const char* root :
         {"rel", "rel/deeper/still", "./dot", "with space", "gr\xc3\xbc\xc3\x9f e\xcc\x81"}) {
      CAPTURE(std::string(root));
      options.root = fs::u8path(root);
      auto file = with_run_dir.restore("sub/a.txt", options);
      CHECK(file.path() == fs::u8path(root) / "sub/a.txt");
      CHECK(read_all(file) == new_text);
      CHECK(read_file(f.directory / fs::u8path(root) / "sub" / "a.txt") == new_text);
    }
  }

  TEST_CASE("a relative root may leave the working directory") {
    fixture f;
    f.server.add_file(f.run, "a.txt", new_text);
    fs::create_directories(f.directory / "here");
    const scoped_working_directory there(f.directory / "here");
    auto client = f.client();
    (void)client.restore("a.txt", f.path, false, "../beside");
    CHECK(read_file(f.directory / "beside" / "a.txt") == new_text);
  }

  TEST_CASE("a receipt belongs to the absolute path in any spelling") {
    fixture f;
    f.server.add_file(f.run, "a.txt", new_text);
    const scoped_working_directory there(f.directory.path());
    auto client = f.client();
    (void)client.restore("a.txt", f.path, false, "root/sub/..");
    CHECK(client.restore("a.txt", f.path, false, f.root()).verified());
    CHECK(client.restore("./a.txt", f.path, false, "root").verified());
    CHECK(f.asked() == "graphql 1, files 1, storage 1");
  }

#ifndef _WIN32
  TEST_CASE("a path through links finds the file's receipt, and its conflict") {
    fixture f;
    f.server.add_file(f.run, "a.txt", new_text);
    fs::create_directories(f.directory / "real");
    fs::create_directory_symlink(f.directory / "real", f.directory / "link");
    auto client = f.client();
    for (const bool through_link : {false, true}) {
      const fs::path one = f.directory / (through_link ? "link" : "real");
      const fs::path other = f.directory / (through_link ? "real" : "link");
      (void)client.restore("a.txt", f.path, true, one);
      CHECK(client.restore("a.txt", f.path, false, other).verified());
      CHECK(client.restore("a.txt", f.path, false, one).verified());
      (void)f.failure(client.try_restore("a.txt", "other/my-project/a1b2c3d", false, other),
                      errc::local_conflict);
      (void)f.failure(client.try_restore("a.txt", "other/my-project/a1b2c3d", false, one),
                      errc::local_conflict);
    }
  }

  TEST_CASE("a pipe or device is left alone, and not waited for") {
    fixture f;
    f.server.add_file(f.run, "pipe", new_text);
    f.server.add_file(f.run, "zero", new_text);
    REQUIRE(::mkfifo((f.root() / "pipe").c_str(), 0600) == 0);
    fs::create_symlink("/dev/zero", f.root() / "zero");
    auto client = f.client();
    for (const char* name : {"pipe", "zero"}) {
      for (const bool replace : {false, true}) {
        check_names(f.failure(client.try_restore(name, f.path, replace), errc::disk_failure),
                    {name, "not a regular file"});
      }
    }
    CHECK(fs::is_fifo(f.root() / "pipe"));
  }
#endif

  TEST_CASE("a receipt that cannot be written causes one warning") {
    fixture f;
    f.server.add_file(f.run, "a.txt", new_text);
    auto s = f.settings();
    s.cache_dir = write_file(f.directory / "file", "in the place of a directory");
    wandb::client<> client(s);
    (void)f.success(client.try_restore("a.txt", f.path));
    (void)f.success(client.try_restore("a.txt", f.path, true));
    REQUIRE(f.warnings().size() == 1);
    CHECK(f.warnings()[0].find("receipts cannot be written") != std::string::npos);
    CHECK(f.warnings()[0].find("WANDB_CACHE_DIR") != std::string::npos);
  }

  TEST_CASE("a root that is a file is an invalid_argument that names it") {
    fixture f;
    f.server.add_file(f.run, "a.txt", new_text);
    write_file(f.root() / "file", "not a directory");
    auto client = f.client();
    check_names(
        f.failure(client.try_restore("a.txt", f.path, false, f.root() / "file"), errc::invalid_argument),
        {"file"});
    check_names(f.failure(client.try_restore("a.txt", f.path, false, f.root() / "file" / "deep"),
                          errc::invalid_argument),
                {"file", "deep"});
    CHECK(read_file(f.root() / "file") == "not a directory");
  }

#ifndef _WIN32
  TEST_CASE("a link in the file's place is replaced, not followed") {
    fixture f;
    f.server.add_file(f.run, "a.txt", new_text);
    write_file(f.directory / "elsewhere.txt", old_text);
    fs::create_symlink(f.directory / "elsewhere.txt", f.root() / "a.txt");
    auto client = f.client();
    auto kept = client.restore("a.txt", f.path);
    CHECK(read_all(kept) == old_text);
    auto file = client.restore("a.txt", f.path, true);
    CHECK(read_all(file) == new_text);
    CHECK(read_file(f.root() / "a.txt") == new_text);
    CHECK(read_file(f.directory / "elsewhere.txt") == old_text);
  }
#endif

  TEST_CASE("a directory in the file's place stays") {
    fixture f;
    f.server.add_file(f.run, "a", new_text);
    write_file(f.root() / "a" / "inside", "mine");
    auto client = f.client();
    for (const bool replace : {false, true}) {
      check_names(f.failure(client.try_restore("a", f.path, replace), errc::disk_failure),
                  {"directory", "\"a\""});
    }
    CHECK(read_file(f.root() / "a" / "inside") == "mine");
  }
}

TEST_SUITE("restore: keep") {
  TEST_CASE("a local copy needs no server, no key, no certificate and no valid settings") {
    struct row {
      const char* what;
      std::function<void(wandb::settings&)> spoil;
    };
    const std::vector<row> table = {
        {"nothing spoiled", [](auto&) {}},
        {"no key", [](auto& s) { s.api_key.clear(); }},
        {"a malformed key", [](auto& s) { s.api_key = "short"; }},
        {"a malformed base URL", [](auto& s) { s.base_url = "gopher:nowhere"; }},
        {"a host that is not there", [](auto& s) { s.base_url = "https://no-such-host.invalid"; }},
        {"offline", [](auto& s) { s.offline = true; }},
        {"no such CA file", [](auto& s) { s.ca_file = "/no/such/file"; }},
        {"a problem of the environment",
         [](auto& s) { s.problem = wandb::error(errc::invalid_argument, "the environment is no good"); }},
        {"an identity token file that is not there",
         [](auto& s) { s.api_key.clear(), s.identity_token_file = "/no/such/file"; }},
        {"warnings", [](auto& s) { s.warnings = {"something"}, s.verify_tls = false; }},
    };
    fixture f;
    write_file(f.root() / "a.txt", old_text);
    f.server.stop();
    for (const row& r : table) {
      CAPTURE(std::string(r.what));
      auto s = f.settings();
      r.spoil(s);
      wandb::client<> client(s);
      auto file = f.success(client.try_restore("a.txt", f.path));
      check_file(file, old_text, wandb::source::local, false);
    }
    CHECK(f.asked() == "graphql 0, files 0, storage 0");
    CHECK(f.warnings().empty());
    CHECK(fs::exists(f.directory / "cache") == false);  // not even a receipt is written
  }

  TEST_CASE("a local copy needs no valid environment in the free function") {
    fixture f;
    const environment there(f);
    write_file(f.root() / "a.txt", old_text);
    const scoped_environment bad{{"WANDB_API_KEY", "short"},
                                 {"WANDB_BASE_URL", "nonsense"},
                                 {"SSL_CERT_FILE", "/none"},
                                 {"WANDB_HTTP_TIMEOUT", "soon"},
                                 {"WANDB_MODE", "sideways"}};
    auto file = wandb::restore("a.txt");
    check_file(file, old_text, wandb::source::local, false);
    (void)f.failure(wandb::try_restore("other.txt"), errc::invalid_argument);
  }

  TEST_CASE("a file without a receipt is kept, and is not verified()") {
    fixture f;
    f.server.add_file(f.run, "a.txt", new_text);
    write_file(f.root() / "a.txt", old_text);
    auto client = f.client();
    auto file = client.restore("a.txt", f.path);
    check_file(file, old_text, wandb::source::local, false);
    CHECK(f.asked() == "graphql 0, files 0, storage 0");
  }

  TEST_CASE("an empty local file is a local copy") {
    fixture f;
    f.server.add_file(f.run, "a.txt", new_text);
    write_file(f.root() / "a.txt", "");
    auto file = f.client().restore("a.txt", f.path);
    check_file(file, "", wandb::source::local, false);
  }

  TEST_CASE("keeping a local copy needs a run path, to detect conflicts") {
    fixture f;
    write_file(f.root() / "a.txt", old_text);
    auto client = f.client();
    auto options = f.options();
    options.run_path = "https://wandb.ai/too/many/parts/in/this";
    (void)f.failure(client.try_restore("a.txt", options), errc::invalid_run_path);
  }
}

TEST_SUITE("restore: replace and refresh") {
  TEST_CASE("replace downloads every time") {
    fixture f;
    f.server.add_file(f.run, "a.txt", new_text);
    write_file(f.root() / "a.txt", old_text);
    auto client = f.client();
    for (int i = 1; i <= 2; ++i) {
      auto file = client.restore("a.txt", f.path, true);
      check_file(file, new_text, wandb::source::downloaded, true);
    }
    CHECK(f.asked() == "graphql 2, files 2, storage 2");
    CHECK(visible(f.root()) == names{"a.txt"});
  }

  TEST_CASE("replace = true overrides the option's policy, which overrides the client's") {
    struct row {
      const char* what;
      cache_policy client;
      std::optional<cache_policy> option;
      bool replace;
      const char* asked;
    };
    const std::vector<row> table = {
        {"keep", cache_policy::keep(), {}, false, "graphql 0, files 0, storage 0"},
        {"replace", cache_policy::replace(), {}, false, "graphql 1, files 1, storage 1"},
        {"refresh", cache_policy::refresh(), {}, false, "graphql 1, files 0, storage 0"},
        {"keep, replace = true", cache_policy::keep(), {}, true, "graphql 1, files 1, storage 1"},
        {"keep over replace", cache_policy::replace(), cache_policy::keep(), false,
         "graphql 0, files 0, storage 0"},
        {"refresh over keep", cache_policy::keep(), cache_policy::refresh(), false,
         "graphql 1, files 0, storage 0"},
        {"replace over keep", cache_policy::keep(), cache_policy::replace(), false,
         "graphql 1, files 1, storage 1"},
        {"keep over keep, replace = true", cache_policy::keep(), cache_policy::keep(), true,
         "graphql 1, files 1, storage 1"},
        {"refresh, replace = true", cache_policy::refresh(), {}, true, "graphql 1, files 1, storage 1"},
    };
    fixture f;
    f.server.add_file(f.run, "a.txt", new_text);
    (void)f.client().restore("a.txt", f.path);
    for (const row& r : table) {
      CAPTURE(std::string(r.what));
      wandb::client<> client(f.settings(), r.client);
      f.server.clear_log();
      auto options = f.options(r.replace);
      options.cache = r.option;
      auto file = f.success(client.try_restore("a.txt", options));
      check_file(file, new_text,
                 std::string(r.asked).back() == '1' ? wandb::source::downloaded : wandb::source::local, true);
      CHECK(f.asked() == r.asked);
    }
  }

#ifndef _WIN32
  TEST_CASE("refresh of an unchanged file with a receipt takes one query, and does not read the file") {
    fixture f;
    f.server.add_file(f.run, "a.txt", new_text);
    auto client = f.client();
    (void)client.restore("a.txt", f.path);
    // Changes the bytes, but not size and time: only reading the file would show the difference.
    const auto time = fs::last_write_time(f.root() / "a.txt");
    std::string other = new_text;
    other[0] = 'N';
    write_file(f.root() / "a.txt", other);
    fs::last_write_time(f.root() / "a.txt", time);
    f.server.clear_log();
    auto file = f.success(client.try_restore("a.txt", f.with(cache_policy::refresh())));
    CHECK(file.source() == wandb::source::local);
    CHECK(f.asked() == "graphql 1, files 0, storage 0");
  }
#endif

  TEST_CASE("refresh of an unchanged file without a receipt hashes it, and writes a receipt") {
    fixture f;
    f.server.add_file(f.run, "a.txt", new_text);
    write_file(f.root() / "a.txt", new_text);
    const auto now = fs::last_write_time(f.root() / "a.txt");
    fs::last_write_time(f.root() / "a.txt", now + 1h);
    auto client = f.client();
    const auto refresh = [&] {
      auto file = f.success(client.try_restore("a.txt", f.with(cache_policy::refresh())));
      check_file(file, new_text, wandb::source::local, true);
    };
    refresh();
    auto fresh = client.restore("a.txt", f.path);  // the file changed too recently for a receipt
    check_file(fresh, new_text, wandb::source::local, false);
    fs::last_write_time(f.root() / "a.txt", now - 10s);
    refresh();
    CHECK(f.asked() == "graphql 2, files 0, storage 0");
    auto kept = client.restore("a.txt", f.path);
    check_file(kept, new_text, wandb::source::local, true);
  }

  TEST_CASE("refresh downloads if the md5 or size differs, or the md5 is unknown") {
    struct row {
      const char* what;
      std::function<void(fixture&)> change;
      bool verified;
    };
    const std::vector<row> table = {
        {"another file at the service", [](fixture& f) { f.server.add_file(f.run, "a.txt", new_text); },
         true},
        {"one of the same size", [](fixture& f) { f.server.add_file(f.run, "a.txt", "OLD bytes"); }, true},
        {"changed by the user", [](fixture& f) { write_file(f.root() / "a.txt", "mine"); }, true},
        {"changed by the user, same size", [](fixture& f) { write_file(f.root() / "a.txt", "OLD mines"); },
         true},
        {"no md5",
         [](fixture& f) {
           stand_in::file_attributes unknown;
           unknown.md5_as = stand_in::md5_form::null;
           f.server.add_file(f.run, "a.txt", new_text, unknown);
         },
         false},
        {"a junk md5",
         [](fixture& f) {
           stand_in::file_attributes junk;
           junk.md5 = "XXX";
           f.server.add_file(f.run, "a.txt", new_text, junk);
         },
         false},
    };
    for (const row& r : table) {
      CAPTURE(std::string(r.what));
      fixture f;
      f.server.add_file(f.run, "a.txt", old_text);
      auto client = f.client();
      (void)client.restore("a.txt", f.path);
      r.change(f);
      f.server.clear_log();
      auto file = f.success(client.try_restore("a.txt", f.with(cache_policy::refresh())));
      CHECK(file.source() == wandb::source::downloaded);
      CHECK(file.verified() == r.verified);
      CHECK(f.asked() == "graphql 1, files 1, storage 1");
      CHECK(read_all(file) == read_file(f.root() / "a.txt"));
    }
  }

  TEST_CASE("refresh without a local copy downloads") {
    fixture f;
    f.server.add_file(f.run, "a.txt", new_text);
    auto file = f.success(f.client().try_restore("a.txt", f.with(cache_policy::refresh())));
    check_file(file, new_text, wandb::source::downloaded, true);
  }

  TEST_CASE("refresh of a file that the run lacks is file_not_found, and leaves the copy") {
    fixture f;
    f.server.add_file(f.run, "a.txt", old_text);
    auto client = f.client();
    (void)client.restore("a.txt", f.path);
    f.server.remove_file(f.run, "a.txt");
    (void)f.failure(client.try_restore("a.txt", f.with(cache_policy::refresh())), errc::file_not_found);
    CHECK(read_file(f.root() / "a.txt") == old_text);
  }
}

TEST_SUITE("restore: a user's cache rule") {
  TEST_CASE("a rule is called with the copy, then after ask with the service's description") {
    fixture f;
    f.server.add_file(f.run, "a.txt", new_text);
    auto client = f.client();
    (void)client.restore("a.txt", f.path);
    f.server.clear_log();
    std::vector<std::string> calls;
    const auto rule = [&](const wandb::local_copy& local, const wandb::file_info* remote) {
      CHECK(local.path == f.root() / "a.txt");
      CHECK(local.size == new_text.size());
      REQUIRE(local.restored_from.has_value());
      CHECK(local.restored_from->str() == f.path);
      CHECK(local.receipt_md5 == stand_in::md5_hex(*stand_in::bytes(new_text)));
      CHECK(local.md5() == local.receipt_md5);
      const auto age = std::chrono::system_clock::now() - local.modified;
      CHECK(age < 1h);
      CHECK(age > -1h);
      calls.push_back(remote == nullptr
                          ? "copy"
                          : "service: " + remote->name + ' ' + std::to_string(remote->size.value_or(0)));
      return remote == nullptr ? verdict::ask : verdict::keep;
    };
    auto file = f.success(client.try_restore("a.txt", f.with(rule)));
    check_file(file, new_text, wandb::source::local, true);
    CHECK(calls == names{"copy", "service: a.txt 23"});
    CHECK(f.asked() == "graphql 1, files 0, storage 0");
  }

  TEST_CASE("every verdict of both calls is followed") {
    struct row {
      verdict first, second;
      const char* asked;
    };
    const std::vector<row> table = {
        {verdict::keep, verdict::fetch, "graphql 0, files 0, storage 0"},
        {verdict::fetch, verdict::keep, "graphql 1, files 1, storage 1"},
        {verdict::ask, verdict::keep, "graphql 1, files 0, storage 0"},
        {verdict::ask, verdict::fetch, "graphql 1, files 1, storage 1"},
        {verdict::ask, verdict::ask, "graphql 1, files 1, storage 1"},
    };
    fixture f;
    f.server.add_file(f.run, "a.txt", new_text);
    auto client = f.client();
    for (const row& r : table) {
      CAPTURE(static_cast<int>(r.first));
      CAPTURE(static_cast<int>(r.second));
      write_file(f.root() / "a.txt", old_text);
      f.server.clear_log();
      auto file = f.success(client.try_restore(
          "a.txt", f.with([&](const wandb::local_copy& local, const wandb::file_info* remote) {
            CHECK_FALSE(local.restored_from.has_value());  // a file without a receipt
            CHECK(local.receipt_md5.empty());
            return remote == nullptr ? r.first : r.second;
          })));
      const bool fetched = std::string(r.asked).back() == '1';
      check_file(file, fetched ? new_text : old_text,
                 fetched ? wandb::source::downloaded : wandb::source::local, fetched);
      CHECK(f.asked() == r.asked);
    }
  }

  TEST_CASE("a rule may keep the local_copy after the restore") {
    fixture f;
    write_file(f.root() / "a.txt", "hello");
    std::optional<wandb::local_copy> shown;
    (void)f.success(f.client().try_restore("a.txt", f.with([&](const wandb::local_copy& local, const auto*) {
      shown = local;
      return wandb::cache_policy::verdict::keep;
    })));
    REQUIRE(shown.has_value());
    CHECK(shown->md5() == "5d41402abc4b2a76b9719d911017c592");
  }

  TEST_CASE("a rule is not called without a local copy") {
    fixture f;
    f.server.add_file(f.run, "a.txt", new_text);
    auto file = f.success(
        f.client().try_restore("a.txt", f.with([](const wandb::local_copy&, const wandb::file_info*) {
          FAIL_CHECK("asked");
          return verdict::keep;
        })));
    check_file(file, new_text, wandb::source::downloaded, true);
  }

  TEST_CASE("a kept copy that differs from the service's file gets no receipt") {
    fixture f;
    f.server.add_file(f.run, "a.txt", new_text);
    write_file(f.root() / "a.txt", old_text);
    auto client = f.client();
    const auto stubborn = [](const wandb::local_copy&, const wandb::file_info* remote) {
      return remote == nullptr ? verdict::ask : verdict::keep;
    };
    (void)f.success(client.try_restore("a.txt", f.with(stubborn)));
    bool seen = false;
    (void)f.success(
        client.try_restore("a.txt", f.with([&](const wandb::local_copy& local, const wandb::file_info*) {
          seen = true;
          CHECK_FALSE(local.restored_from.has_value());
          return verdict::keep;
        })));
    CHECK(seen);
  }

  TEST_CASE("keeping another run's file is local_conflict with any rule") {
    fixture f;
    f.server.add_file(f.run, "a.txt", new_text);
    const auto other = f.server.add_run("vanpelt", "my-project", "other");
    f.server.add_file(other, "a.txt", old_text);
    auto client = f.client();
    (void)client.restore("a.txt", "vanpelt/my-project/other");
    for (const bool asks : {false, true}) {
      CAPTURE(asks);
      auto options = f.with([asks](const wandb::local_copy&, const wandb::file_info* remote) {
        return asks && remote == nullptr ? verdict::ask : verdict::keep;
      });
      (void)f.failure(client.try_restore("a.txt", options), errc::local_conflict);
      CHECK(read_file(f.root() / "a.txt") == old_text);
      auto still =
          client.restore("a.txt", "vanpelt/my-project/other");  // the receipt still names the other run
      check_file(still, old_text, wandb::source::local, true);
    }
  }
}

#ifndef _WIN32
TEST_SUITE("restore: the returned stream is the inspected copy") {
  TEST_CASE("a file swapped while the rule decides is not returned") {
    fixture f;
    f.server.add_file(f.run, "a.txt", new_text);
    auto client = f.client();
    (void)client.restore("a.txt", f.path);
    auto kept =
        f.success(client.try_restore("a.txt", f.with([&](const wandb::local_copy&, const wandb::file_info*) {
          write_file(f.root() / "b.txt", std::string(new_text.size(), '-'));
          fs::rename(f.root() / "b.txt", f.root() / "a.txt");
          return verdict::keep;
        })));
    check_file(kept, new_text, wandb::source::local, true);
  }

  TEST_CASE("a file swapped after hashing is not returned") {
    fixture f;
    f.server.add_file(f.run, "a.txt", new_text);
    write_file(f.root() / "a.txt", new_text);
    auto client = f.client();
    auto kept = f.success(client.try_restore(
        "a.txt", f.with([&](const wandb::local_copy& local, const wandb::file_info* remote) {
          if (remote == nullptr) return verdict::ask;
          CHECK(local.md5() == remote->md5);
          const auto later = fs::last_write_time(f.root() / "a.txt") + 2s;
          write_file(f.root() / "b.txt", std::string(new_text.size(), '-'));
          fs::last_write_time(f.root() / "b.txt", later);
          fs::rename(f.root() / "b.txt", f.root() / "a.txt");
          return verdict::keep;
        })));
    check_file(kept, new_text, wandb::source::local, true);
    // The receipt is for the hashed file: the other one has none.
    auto swapped = f.success(client.try_restore("a.txt", f.path));
    check_file(swapped, std::string(new_text.size(), '-'), wandb::source::local, false);
  }

  TEST_CASE("a file swapped before hashing does not supply the md5 of the returned one") {
    fixture f;
    f.server.add_file(f.run, "a.txt", new_text);
    write_file(f.root() / "a.txt", std::string(new_text.size(), '-'));
    auto client = f.client();
    auto got = f.success(client.try_restore(
        "a.txt", f.with([&](const wandb::local_copy& local, const wandb::file_info* remote) {
          if (remote == nullptr) return verdict::ask;
          write_file(f.root() / "b.txt", new_text);
          fs::rename(f.root() / "b.txt", f.root() / "a.txt");
          CHECK(local.md5() != remote->md5);
          return verdict::keep;
        })));
    check_file(got, std::string(new_text.size(), '-'), wandb::source::local, false);
  }

  TEST_CASE("a file that changes while it is hashed has no md5") {
    fixture f;
    const auto content = stand_in::generated(1'000'000);
    f.server.add_file(f.run, "a.bin", content);
    std::string text = stand_in::read_text(*content);
    write_file(f.root() / "a.bin", text);
    auto client = f.client();
    auto options = f.with([&](const wandb::local_copy& local, const wandb::file_info* remote) {
      if (remote == nullptr) return verdict::ask;
      std::fstream file(f.root() / "a.bin", std::ios::in | std::ios::out | std::ios::binary);
      const auto later = fs::last_write_time(f.root() / "a.bin") + 2s;
      file << "changed" << std::flush;
      fs::last_write_time(f.root() / "a.bin", later);
      CHECK(local.md5().empty());
      return verdict::keep;
    });
    auto got = f.success(client.try_restore("a.bin", options));
    CHECK_FALSE(got.verified());
  }
}
#endif

TEST_SUITE("restore: receipts") {
  TEST_CASE("a copy of another run is a local_conflict, if the requested run is known without a request") {
    struct row {
      const char* from;
      const char* asked;
      const char* entity;  ///< the entity in the settings
      bool conflict;
    };
    const std::vector<row> table = {
        {"vanpelt/my-project/a1b2c3d", "vanpelt/my-project/a1b2c3d", "", false},
        {"vanpelt/my-project/a1b2c3d", "vanpelt/my-project/other", "", true},
        {"vanpelt/my-project/a1b2c3d", "vanpelt/their-project/a1b2c3d", "", true},
        {"vanpelt/my-project/a1b2c3d", "somebody/my-project/a1b2c3d", "", true},
        {"vanpelt/my-project/a1b2c3d", "my-project/a1b2c3d", "",
         false},  // the entity is unknown: no conflict
        {"vanpelt/my-project/a1b2c3d", "my-project/other", "", true},
        {"vanpelt/my-project/a1b2c3d", "their-project/a1b2c3d", "", true},
        {"vanpelt/my-project/a1b2c3d", "my-project/a1b2c3d", "vanpelt", false},
        {"vanpelt/my-project/a1b2c3d", "my-project/a1b2c3d", "somebody", true},
        {"vanpelt/my-project/a1b2c3d", "https://wandb.ai/vanpelt/my-project/runs/a1b2c3d", "", false},
        {"vanpelt/my-project/a1b2c3d", "https://wandb.ai/vanpelt/my-project/runs/other", "", true},
        {"my-project/a1b2c3d", "stand-in/my-project/a1b2c3d", "",
         false},  // the default entity of the account
        {"my-project/a1b2c3d", "vanpelt/my-project/a1b2c3d", "", true},
    };
    for (const row& r : table) {
      CAPTURE(std::string(r.from));
      CAPTURE(std::string(r.asked));
      CAPTURE(std::string(r.entity));
      fixture f;
      f.server.add_file(f.run, "a.txt", new_text);
      f.server.add_file(f.server.add_run("stand-in", "my-project", "a1b2c3d"), "a.txt", new_text);
      (void)f.client().restore("a.txt", r.from);
      f.server.stop();
      auto s = f.settings();
      s.entity = r.entity;
      auto outcome = wandb::client<>(s).try_restore("a.txt", r.asked);
      if (r.conflict) {
        const auto failure = f.failure(std::move(outcome), errc::local_conflict);
        check_names(failure, {(f.root() / "a.txt").string(), "a1b2c3d", "replace", "root"});
        CHECK_FALSE(failure.is_not_found());
        CHECK_FALSE(failure.is_transient());
      } else {
        auto file = f.success(std::move(outcome));
        check_file(file, new_text, wandb::source::local, true);
      }
      CHECK(read_file(f.root() / "a.txt") == new_text);
    }
  }

  TEST_CASE("a copy of another file of the run is a local_conflict") {
    fixture f;
    f.server.add_file(f.run, "a/w.bin", new_text);
    f.server.add_file(f.run, "w.bin", old_text);
    auto client = f.client();
    (void)client.restore("a/w.bin", f.path);
    f.server.clear_log();
    const fs::path folder = f.root() / "a";
    check_names(f.failure(client.try_restore("w.bin", f.path, false, folder), errc::local_conflict),
                {(folder / "w.bin").string(), "\"a/w.bin\"", "\"w.bin\"", "replace", "root"});
    CHECK(f.asked() == "graphql 0, files 0, storage 0");

    auto options = f.with([&](const wandb::local_copy& local, const wandb::file_info*) {
      CHECK(local.restored_name == "a/w.bin");
      REQUIRE(local.restored_from.has_value());
      CHECK(local.restored_from->str() == f.path);
      return verdict::keep;
    });
    options.root = folder;
    (void)f.failure(client.try_restore("w.bin", options), errc::local_conflict);
    auto still = client.restore("./a//w.bin", f.path);
    check_file(still, new_text, wandb::source::local, true);

    auto refreshed = f.with(cache_policy::refresh());
    refreshed.root = folder;
    auto other = f.success(client.try_restore("w.bin", refreshed));
    check_file(other, old_text, wandb::source::downloaded, true);
    (void)f.failure(client.try_restore("a/w.bin", f.path), errc::local_conflict);
  }

  TEST_CASE("a receipt without the file's name does not verify, but reveals a copy of another run") {
    fixture f;
    f.server.add_file(f.run, "a.txt", new_text);
    auto client = f.client();
    (void)client.restore("a.txt", f.path);
    int rewritten = 0;
    for (const auto& entry : fs::recursive_directory_iterator(f.directory / "cache")) {
      if (!entry.is_regular_file()) continue;
      std::string text = read_file(entry.path());
      const auto begin = text.find("\nname=a.txt\n");
      REQUIRE(begin != text.npos);
      write_file(entry.path(), text.erase(begin, std::string("\nname=a.txt").size()));
      ++rewritten;
    }
    REQUIRE(rewritten == 1);
    auto kept = f.success(client.try_restore("a.txt", f.path));
    check_file(kept, new_text, wandb::source::local, false);
    (void)f.failure(client.try_restore("a.txt", "vanpelt/my-project/other"), errc::local_conflict);
    f.server.clear_log();
    auto refreshed = f.success(client.try_restore("a.txt", f.with(cache_policy::refresh())));
    check_file(refreshed, new_text, wandb::source::local, true);
    CHECK(f.asked() == "graphql 1, files 0, storage 0");
    auto again = f.success(client.try_restore("a.txt", f.path));
    check_file(again, new_text, wandb::source::local, true);
  }

  TEST_CASE("receipts do not depend on the server") {
    fixture f;
    f.server.add_file(f.run, "a.txt", new_text);
    (void)f.client().restore("a.txt", f.path);
    auto s = f.settings();
    s.base_url = "https://elsewhere.invalid";
    auto file = f.success(wandb::client<>(s).try_restore("a.txt", f.path));
    check_file(file, new_text, wandb::source::local, true);
  }

  TEST_CASE("replace, refresh or another root resolve a conflict") {
    for (const bool same_content : {false, true}) {
      for (const bool refresh : {false, true}) {
        CAPTURE(same_content);
        CAPTURE(refresh);
        fixture f;
        f.server.add_file(f.run, "a.txt", new_text);
        const auto other = f.server.add_run("vanpelt", "my-project", "other");
        f.server.add_file(other, "a.txt", same_content ? new_text : old_text);
        auto client = f.client();
        (void)client.restore("a.txt", "vanpelt/my-project/other");
        (void)f.failure(client.try_restore("a.txt", f.path), errc::local_conflict);
        auto beside = f.success(client.try_restore("a.txt", f.path, false, f.root() / "beside"));
        check_file(beside, new_text, wandb::source::downloaded, true);

        auto options = refresh ? f.with(cache_policy::refresh()) : f.options(true);
        f.server.clear_log();
        auto file = f.success(client.try_restore("a.txt", options));
        CHECK(read_all(file) == new_text);
        const bool fetched = !(refresh && same_content);
        CHECK(f.asked() == (fetched ? "graphql 1, files 1, storage 1" : "graphql 1, files 0, storage 0"));
        auto kept = f.success(client.try_restore("a.txt", f.path));
        check_file(kept, new_text, wandb::source::local, true);
        (void)f.failure(client.try_restore("a.txt", "vanpelt/my-project/other"), errc::local_conflict);
      }
    }
  }

  TEST_CASE("a file that the user changed, replaced or put back is kept for any run, unverified") {
    struct row {
      const char* what;
      std::function<void(const fs::path&)> change;
    };
    const std::vector<row> table = {
        {"more in it", [](const fs::path& file) { write_file(file, new_text + "!"); }},
        {"another of the same size",
         [](const fs::path& file) {
           const auto later = fs::last_write_time(file) + 2s;
           write_file(file, std::string(new_text.size(), '-'));
           fs::last_write_time(file, later);
         }},
        {"touched", [](const fs::path& file) { fs::last_write_time(file, fs::last_write_time(file) + 2s); }},
        {"taken away and made anew",
         [](const fs::path& file) {
           fs::remove(file);
           write_file(file, "mine");
         }},
    };
    for (const row& r : table) {
      CAPTURE(std::string(r.what));
      fixture f;
      f.server.add_file(f.run, "a.txt", new_text);
      auto client = f.client();
      (void)client.restore("a.txt", f.path);
      r.change(f.root() / "a.txt");
      const std::string now = read_file(f.root() / "a.txt");
      for (const char* run : {f.path, "somebody/else/entirely"}) {
        auto file = f.success(client.try_restore("a.txt", run));
        check_file(file, now, wandb::source::local, false);
      }
    }
  }

  TEST_CASE("without a cache directory copies are kept, not verified, and never in conflict") {
    fixture f;
    f.server.add_file(f.run, "a.txt", new_text);
    auto s = f.settings();
    s.cache_dir.clear();
    wandb::client<> client(s);
    auto first = client.restore("a.txt", f.path);
    check_file(first, new_text, wandb::source::downloaded, true);
    auto kept = f.success(client.try_restore("a.txt", "somebody/else/entirely"));
    check_file(kept, new_text, wandb::source::local, false);
  }

  TEST_CASE("an unwritable or corrupt cache directory only loses the receipt") {
    fixture f;
    f.server.add_file(f.run, "a.txt", new_text);
    write_file(f.directory / "not-a-directory", "");
    auto s = f.settings();
    s.cache_dir = f.directory / "not-a-directory";
    auto first = wandb::client<>(s).restore("a.txt", f.path);
    check_file(first, new_text, wandb::source::downloaded, true);

    auto client = f.client();
    (void)client.restore("a.txt", f.path, true);
    std::size_t spoiled = 0;
    for (const auto& entry : fs::recursive_directory_iterator(f.directory / "cache")) {
      if (!entry.is_regular_file()) continue;
      for (const char* rubbish : {"", "{", "[]", "null", "{\"path\": 7}", "\xff\xfe"}) {
        write_file(entry.path(), rubbish);
        auto kept = f.success(client.try_restore("a.txt", f.path));
        check_file(kept, new_text, wandb::source::local, false);
        ++spoiled;
      }
    }
    CHECK(spoiled == 6);
  }

  TEST_CASE("a receipt has the run and the verified md5, and no secret") {
    fixture f;
    f.server.add_file(f.run, "a.txt", new_text);
    (void)f.client().restore("a.txt", f.path);
    int receipts = 0;
    for (const auto& entry : fs::recursive_directory_iterator(f.directory / "cache")) {
      if (!entry.is_regular_file()) continue;
      ++receipts;
      const std::string text = read_file(entry.path());
      f.check_harmless(text);
      CHECK(contains(text, stand_in::md5_hex(*stand_in::bytes(new_text))));
      CHECK(contains(text, "a1b2c3d"));
    }
    CHECK(receipts == 1);
  }

  TEST_CASE("a file without an md5 gets a receipt: it is not verified, but conflicts with other runs") {
    fixture f;
    stand_in::file_attributes unknown;
    unknown.md5_as = stand_in::md5_form::absent;
    f.server.add_file(f.run, "a.txt", new_text, unknown);
    auto client = f.client();
    auto file = client.restore("a.txt", f.path);
    check_file(file, new_text, wandb::source::downloaded, false);
    auto kept = client.restore("a.txt", f.path);
    check_file(kept, new_text, wandb::source::local, false);
    (void)f.failure(client.try_restore("a.txt", "vanpelt/my-project/other"), errc::local_conflict);
  }
}

TEST_SUITE("restore: offline") {
  TEST_CASE("every offline mode keeps local copies, and makes no request for missing files") {
    for (const char* mode : {"offline", "dryrun", "disabled"}) {
      CAPTURE(std::string(mode));
      fixture f;
      const environment there(f);
      const scoped_environment quiet{{"WANDB_MODE", mode}};
      f.server.add_file(f.run, "a.txt", new_text);
      write_file(f.root() / "kept.txt", old_text);
      auto kept = wandb::restore("kept.txt");
      check_file(kept, old_text, wandb::source::local, false);

      const auto failure = f.failure(wandb::try_restore("a.txt"), errc::offline);
      check_names(failure, {"a.txt", f.path, "WANDB_MODE"});
      CHECK(failure.http_status() == 0);
      CHECK_FALSE(failure.is_transient());
      CHECK_FALSE(failure.is_not_found());
      (void)f.failure(wandb::try_restore("kept.txt", f.options(true)), errc::offline);
      (void)f.failure(wandb::try_restore("kept.txt", f.with(cache_policy::refresh())), errc::offline);
      (void)f.failure(wandb::client<>().try_list_files(), errc::offline);
      CHECK(read_file(f.root() / "kept.txt") == old_text);
      CHECK(f.asked() == "graphql 0, files 0, storage 0");
    }
  }

  TEST_CASE("a conflict is reported offline, too") {
    fixture f;
    f.server.add_file(f.run, "a.txt", new_text);
    (void)f.client().restore("a.txt", f.path);
    auto s = f.settings();
    s.offline = true;
    (void)f.failure(wandb::client<>(s).try_restore("a.txt", "vanpelt/my-project/other"),
                    errc::local_conflict);
  }
}

TEST_SUITE("restore: several at once") {
  TEST_CASE("threads restore different files through one client") {
    fixture f;
    for (int i = 0; i < 8; ++i)
      f.server.add_file(f.run, "f" + std::to_string(i),
                        stand_in::generated(50'000, static_cast<unsigned>(i)));
    auto client = f.client();
    std::vector<std::thread> threads;
    std::atomic<int> good{0};
    for (int i = 0; i < 8; ++i) {
      threads.emplace_back([&, i] {
        auto file = client.try_restore("f" + std::to_string(i), f.path);
        if (file && file->verified() &&
            read_all(*file) == stand_in::read_text(*stand_in::generated(50'000, static_cast<unsigned>(i))))
          ++good;
      });
    }
    for (auto& one : threads) one.join();
    CHECK(good == 8);
    CHECK(f.server.counted().of(request_kind::graphql).requests == 8);
    CHECK(visible(f.root()).size() == 8);
  }

  TEST_CASE("threads that restore one file, through one client or two, download it once") {
    for (const bool two : {false, true}) {
      CAPTURE(two);
      fixture f;
      const auto content = stand_in::generated(400'000);
      f.server.add_file(f.run, "sub/a.bin", content);
      auto first = f.client(), second = f.client();
      std::vector<std::thread> threads;
      std::atomic<int> good{0};
      for (int i = 0; i < 6; ++i) {
        threads.emplace_back([&, i] {
          auto file = (two && i % 2 == 1 ? second : first).try_restore("sub/a.bin", f.path);
          if (file && file->verified() && read_all(*file) == stand_in::read_text(*content)) ++good;
        });
      }
      for (auto& one : threads) one.join();
      CHECK(good == 6);
      CHECK(f.server.counted().of(request_kind::storage).requests == 1);
      CHECK(visible(f.root()) == names{"sub/a.bin"});
    }
  }

  TEST_CASE("two runs into one target at once: the waiting call fails with local_conflict") {
    fixture f;
    const auto other = f.server.add_run("vanpelt", "my-project", "other");
    f.server.add_file(f.run, "a.txt", new_text);
    f.server.add_file(other, "a.txt", old_text);
    auto client = f.client();
    std::atomic<bool> waits{false};
    f.server.on_request([&](const stand_in::request_record& one) {
      while (one.kind == request_kind::storage && !waits) std::this_thread::yield();
    });
    std::thread first([&] {
      auto file = client.try_restore("a.txt", f.path);
      CHECK((file && file->verified() && read_all(*file) == new_text));
    });
    REQUIRE(f.server.wait_for([](const auto& now) { return now.counts.of(request_kind::files).requests > 0; },
                              20s));
    auto options = f.options();
    options.run_path = "vanpelt/my-project/other";
    options.on_progress = [&](const wandb::progress&) { return waits = true; };
    auto second = client.try_restore("a.txt", options);
    first.join();
    (void)f.failure(std::move(second), errc::local_conflict);
    CHECK(read_file(f.root() / "a.txt") == new_text);
    CHECK(f.server.counted().of(request_kind::storage).requests == 1);
    f.server.on_request({});
  }

  TEST_CASE("threads that wait for a file without an md5 return the downloaded copy") {
    fixture f;
    stand_in::file_attributes unknown;
    unknown.md5_as = stand_in::md5_form::absent;
    f.server.add_file(f.run, "a.txt", new_text, unknown);
    constexpr int count = 6;
    f.server.on_request([&](const stand_in::request_record& one) {
      if (one.kind != request_kind::storage) return;
      CHECK(f.server.wait_for(
          [](const auto& now) { return now.counts.of(request_kind::graphql).requests >= count; }, 20s));
    });
    auto client = f.client();
    std::vector<std::thread> threads;
    std::atomic<int> downloaded{0}, local{0};
    for (int i = 0; i < count; ++i) {
      threads.emplace_back([&] {
        auto file = client.try_restore("a.txt", f.path);
        if (file && read_all(*file) == new_text)
          ++(file->source() == wandb::source::local ? local : downloaded);
      });
    }
    for (auto& one : threads) one.join();
    CHECK(downloaded == 1);
    CHECK(local == count - 1);
    CHECK(f.server.counted().of(request_kind::storage).requests == 1);
    f.server.on_request({});
  }

  TEST_CASE("two runs into one target at once: each call gets its own bytes, or local_conflict") {
    fixture f;
    const auto other = f.server.add_run("vanpelt", "my-project", "other");
    const std::map<std::string, std::string> text{{f.path, new_text}, {"vanpelt/my-project/other", old_text}};
    f.server.add_file(f.run, "a.txt", new_text);
    f.server.add_file(other, "a.txt", old_text);
    auto client = f.client();
    for (int round = 0; round < 5; ++round) {
      fs::remove(f.root() / "a.txt");
      std::vector<std::thread> threads;
      std::atomic<int> wrong{0};
      for (const auto& [path, expected] : text) {
        threads.emplace_back([&, path = path, expected = expected] {
          auto file = client.try_restore("a.txt", path);
          if (file ? read_all(*file) != expected : file.error().code() != errc::local_conflict) ++wrong;
        });
      }
      for (auto& one : threads) one.join();
      CHECK(wrong == 0);
    }
  }
}
