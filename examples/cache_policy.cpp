// A cache policy that a program defines:
//
//   ./cache_policy NAME RUN_PATH MAX_AGE_SECONDS
//
// A file without a receipt is the user's own work and is kept. A copy younger than MAX_AGE_SECONDS is kept without a request.
// An older copy is compared with the run's file, and downloaded again if it differs.
//
// SPDX-License-Identifier: MIT
#include "wandb_restore.hpp"

#include <chrono>
#include <cstdlib>
#include <iostream>

namespace {

/// The rule is called first with the local copy alone. If it returns `ask`, it is called again with the service's
/// description of the file.
wandb::cache_policy trust_for(std::chrono::seconds max_age) {
  using verdict = wandb::cache_policy::verdict;
  return [max_age](const wandb::local_copy& local, const wandb::file_info* remote) {
    if (!local.restored_from) {
      std::cout << "our own file: kept\n";
      return verdict::keep;
    }
    if (remote == nullptr) {
      const auto age = std::chrono::system_clock::now() - local.modified;
      if (age < max_age) {
        std::cout << "a young copy of " << local.restored_from->str() << ": kept\n";
        return verdict::keep;
      }
      return verdict::ask;
    }
    if (!remote->md5.empty() && remote->md5 == local.md5()) {
      std::cout << "an old copy, still the same: kept\n";
      return verdict::keep;
    }
    std::cout << "an old copy, and another file by now: downloaded\n";
    return verdict::fetch;
  };
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: cache_policy NAME RUN_PATH MAX_AGE_SECONDS\n";
    return 2;
  }
  // This policy applies to all calls of the client. restore_options::cache applies to one call.
  wandb::client<> client(wandb::settings::from_environment(),
                         trust_for(std::chrono::seconds(std::atol(argv[3]))));
  const auto file = client.try_restore(argv[1], argv[2]);
  if (!file) {
    std::cerr << file.error().what() << '\n';
    return 1;
  }
  std::cout << file->name() << ": " << file->size() << " bytes\n";
}
