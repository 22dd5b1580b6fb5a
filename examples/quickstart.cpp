// Restores one file of a run and prints its size: quickstart [NAME RUN_PATH]
#include "wandb_restore.hpp"

#include <iostream>

int main(int argc, char** argv) try {
  const char* name = argc > 1 ? argv[1] : "model-best.h5";
  const char* run = argc > 2 ? argv[2] : "vanpelt/my-project/a1b2c3d";
  auto file = wandb::restore(name, run);
  std::cout << file.name() << ": " << file.size() << " bytes, " << (file.verified() ? "" : "not ")
            << "verified\n";
} catch (const wandb::error& failure) {
  std::cerr << failure.what() << '\n';
  return 1;
}
