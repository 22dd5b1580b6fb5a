// The header in a program: included first and twice, in two source files, without side effects on other names.
#include "wandb_restore.hpp"
#include "wandb_restore.hpp"  // NOLINT: included twice on purpose

#include <doctest/doctest.h>

#include <string>
#include <type_traits>

// Names that a using-directive in a header would make ambiguous here.
struct client {};
struct settings {};
struct error {};
struct json {};
namespace detail {
struct session {};
}  // namespace detail

// Defined in odr_test.cpp.
const std::type_info& type_of_settings_elsewhere();
std::string caught_elsewhere(void (*thrower)());
wandb::cache_policy policy_from_elsewhere();

TEST_SUITE("headers") {
  TEST_CASE("the header does not disturb the program's own names") {
    CHECK(std::is_empty_v<client>);
    CHECK(std::is_empty_v<settings>);
    CHECK(std::is_empty_v<error>);
    CHECK(std::is_empty_v<json>);
    CHECK(std::is_empty_v<detail::session>);
  }

  TEST_CASE("two source files of a program see the same types") {
    CHECK(typeid(wandb::settings) == type_of_settings_elsewhere());
    const auto caught = caught_elsewhere([] { throw wandb::error(wandb::errc::offline, "a text", 0); });
    CHECK(caught == "offline: a text");
    const wandb::local_copy local;
    CHECK(policy_from_elsewhere()(local, nullptr) == wandb::cache_policy::verdict::ask);
  }

  TEST_CASE("all version macros agree") {
    CHECK(std::string(WANDB_RESTORE_VERSION) == std::to_string(WANDB_RESTORE_VERSION_MAJOR) + '.' +
                                                    std::to_string(WANDB_RESTORE_VERSION_MINOR) + '.' +
                                                    std::to_string(WANDB_RESTORE_VERSION_PATCH));
    CHECK(wandb::settings().user_agent == "wandb_restore.hpp/" WANDB_RESTORE_VERSION);
  }

  TEST_CASE("the types have the documented properties") {
    CHECK(std::is_base_of_v<std::ifstream, wandb::restored_file>);
    CHECK(std::is_base_of_v<std::runtime_error, wandb::error>);
    CHECK(std::is_nothrow_move_constructible_v<wandb::restored_file>);
    CHECK_FALSE(std::is_copy_constructible_v<wandb::restored_file>);
    CHECK(std::is_aggregate_v<wandb::restore_options>);
    CHECK(std::is_move_constructible_v<wandb::client<>>);
    CHECK(wandb::is_transport<wandb::http_transport>::value);
    CHECK_FALSE(wandb::is_transport<int>::value);
  }
}
