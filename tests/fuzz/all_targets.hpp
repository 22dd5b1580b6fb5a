// The table of all targets.
// SPDX-License-Identifier: MIT
#ifndef WANDB_RESTORE_TESTS_FUZZ_ALL_TARGETS_HPP
#define WANDB_RESTORE_TESTS_FUZZ_ALL_TARGETS_HPP

#include "restore_target.hpp"
#include "small_targets.hpp"

namespace fuzz {

inline constexpr target targets[] = {
    {"run_path", run_paths},   {"url", urls},
    {"netrc", netrc},          {"ini", ini},
    {"settings", settings},    {"graphql", graphql},
    {"json", json_texts},      {"fields", fields},
    {"proxy", proxies},        {"records", records},
    {"resume", resume_record}, {"response", responses},
    {"restore", restore},      {"restore_ranges", restore_ranges},
};

}  // namespace fuzz

#endif  // WANDB_RESTORE_TESTS_FUZZ_ALL_TARGETS_HPP
