// The program that each consumer builds. It links the whole library, and runs without a network.
#include "wandb_restore.hpp"

#include <fstream>
#include <iostream>

int main() {
  std::ofstream("kept.txt") << "kept";
  const auto run = wandb::run_path::parse("entity/project/run");
  if (!run || run->run_id != "run") return 1;
  const auto file = wandb::try_restore("kept.txt", run->str());  // a local copy needs no request
  if (!file) {
    std::cerr << file.error().what() << '\n';
    return 1;
  }
#ifdef WANDB_RESTORE_SPLIT
  const char* const mode = "compiled";
#else
  const char* const mode = "inline";
#endif
  std::cout << WANDB_RESTORE_VERSION << ' ' << mode << ' ' << file->name() << ' ' << file->size() << '\n';
  return file->size() == 4 ? 0 : 1;
}
