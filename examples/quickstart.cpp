// Restore one file of a run and say what came: quickstart [NAME RUN_PATH]
#include "wandb_restore.hpp"

#include <iostream>

int main(int argc, char** argv) try {
  auto file = wandb::restore(argc > 1 ? argv[1] : "model-best.h5", argc > 2 ? argv[2] : "vanpelt/my-project/a1b2c3d");
  std::cout << file.name() << ": " << file.size() << " bytes, " << (file.verified() ? "verified" : "not verified") << '\n';
} catch (const wandb::error& failure) {
  std::cerr << failure.what() << '\n';
  return 1;
}
