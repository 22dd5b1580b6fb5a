// The second source file of headers_test.cpp.
#include "wandb_restore.hpp"

#include <doctest/doctest.h>

#include <string>
#include <typeinfo>

const std::type_info& type_of_settings_elsewhere();
std::string caught_elsewhere(void (*thrower)());
wandb::cache_policy policy_from_elsewhere();

const std::type_info& type_of_settings_elsewhere() { return typeid(wandb::settings); }

std::string caught_elsewhere(void (*thrower)()) {
  try {
    thrower();
  } catch (const wandb::error& one) {
    return std::string(wandb::to_string(one.code())) + ": " + one.what();
  }
  return "nothing";
}

wandb::cache_policy policy_from_elsewhere() { return wandb::cache_policy::refresh(); }

TEST_SUITE("headers") {
  TEST_CASE("the second source file can use the library") {
    CHECK(wandb::run_path::parse("e/p/runs/r").value().str() == "e/p/r");
    CHECK(wandb::url::parse("https://API.example/a b").value().str() == "https://api.example/a%20b");
  }
}
