// Calls with braces: designated initialisers in C++20, empty braces in every version. Without C++20 the tests assign the members
// of a restore_options instead.
#include "restore_fixture.hpp"

using namespace restore_tests;

TEST_SUITE("braced forms") {
  TEST_CASE("empty braces mean the defaults in every overload") {
    fixture f;
    f.server.add_file(f.run, "a.txt", "text");
    const environment there(f);
    CHECK(wandb::restore("a.txt", {}).path() == "a.txt");
    CHECK(wandb::try_restore("a.txt", {}).has_value());
    wandb::client<> client;
    CHECK(client.restore("a.txt", {}).path() == "a.txt");
    CHECK(client.try_restore("a.txt", {}).has_value());
    CHECK(client.try_list_files({}).value().size() == 1);
    CHECK(wandb::list_files({}).size() == 1);
    CHECK(f.server.counted().of(request_kind::storage).requests == 1);
  }

  TEST_CASE("designated initialisers") {
    fixture f;
    f.server.add_file(f.run, "a.txt", "text");
    const environment there(f);
#if defined(__cpp_designated_initializers) && __cpp_designated_initializers >= 201707L
    auto one = wandb::restore("a.txt", {.run_path = fixture::path, .replace = true, .root = "ckpt"});
    CHECK(one.path() == fs::path("ckpt") / "a.txt");
    CHECK(wandb::restore("a.txt", {.run_path = fixture::path}).path() == "a.txt");
    CHECK(wandb::restore("a.txt", {.replace = true}).source() == wandb::source::downloaded);
    CHECK(wandb::restore("a.txt", {.root = "ckpt"}).source() == wandb::source::local);
    CHECK(wandb::restore("a.txt", {.cache = wandb::cache_policy::refresh()}).source() ==
          wandb::source::local);
    CHECK(wandb::restore(
              "a.txt", {.cache = [](const wandb::local_copy&,
                                    const wandb::file_info*) { return wandb::cache_policy::verdict::fetch; }})
              .source() == wandb::source::downloaded);
    CHECK(wandb::try_restore("a.txt", {.run_path = fixture::path, .connections = 1, .verify = false})
              .has_value());
    wandb::client<> client;
    CHECK(client.restore("a.txt", {.run_path = fixture::path}).path() == "a.txt");
    CHECK(client.try_restore("a.txt", {.on_progress = [](const wandb::progress&) { return true; }})
              .has_value());
    CHECK(wandb::list_files({.run_path = fixture::path}).size() == 1);
    wandb::client<> told({.base_url = f.server.base_url(), .api_key = f.server.key(), .ca_file = f.ca()});
    CHECK(told.restore("a.txt", {.run_path = fixture::path, .root = "told"}).verified());
#else
    MESSAGE("left out: this compiler has no designated initialisers");
    wandb::restore_options options;
    options.run_path = fixture::path;
    options.replace = true;
    options.root = "ckpt";
    CHECK(wandb::restore("a.txt", options).path() == fs::path("ckpt") / "a.txt");
#endif
  }

  TEST_CASE("run paths of every string type select the overload of the SDK's arguments") {
    fixture f;
    f.server.add_file(f.run, "a.txt", "text");
    const environment there(f);
    const char* pointer = fixture::path;
    const std::string string = fixture::path;
    const std::string_view view = string;
    char array[64] = "vanpelt/my-project/a1b2c3d";
    for (int i = 0; i < 2; ++i) {
      CHECK(wandb::restore("a.txt", pointer).path() == "a.txt");
      CHECK(wandb::restore("a.txt", string).path() == "a.txt");
      CHECK(wandb::restore("a.txt", view, false, "r").path() == fs::path("r") / "a.txt");
      CHECK(wandb::restore("a.txt", array, false).path() == "a.txt");
      CHECK(wandb::restore(string.substr(0, 0) + "a.txt", "vanpelt/my-project/a1b2c3d").path() == "a.txt");
    }
    CHECK(f.server.counted().of(request_kind::storage).requests == 2);
  }
}
