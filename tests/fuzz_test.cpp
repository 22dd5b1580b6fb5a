// Runs each fuzz target over its committed corpus: inputs that reach different code, and inputs that once found a fault.
// tests/fuzz/run.sh looks for new ones.
//
// The targets use wandb::detail: this file compiles the header inline.
#undef WANDB_RESTORE_SPLIT
#include "fuzz/all_targets.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <vector>

TEST_SUITE("fuzz corpus") {
  TEST_CASE("no property fails for any input of a corpus") {
    for (const auto& target : fuzz::targets) {
      const auto folder = std::filesystem::path(__FILE__).parent_path() / "fuzz" / "corpus" / target.name;
      std::vector<std::filesystem::path> inputs;
      for (const auto& entry : std::filesystem::directory_iterator(folder)) inputs.push_back(entry.path());
      std::sort(inputs.begin(), inputs.end());
      CAPTURE(target.name);
      CHECK(inputs.size() >= 3);
      for (const auto& input : inputs) {
        INFO(input.string());  // a failed property ends the program with its own message
        fuzz::run(target, fuzz::read_file(input));
      }
    }
  }
}
