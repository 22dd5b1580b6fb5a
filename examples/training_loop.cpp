// Trains in a loop that may be killed at any time, and continues from the newest checkpoint of the run.
//
//   ./training_loop EPOCHS
//
// The run is the current one: WANDB_ENTITY, WANDB_PROJECT and WANDB_RUN_ID. The checkpoints, checkpoints/epoch-1.txt and so on, are
// uploaded by the program that started this one, for example with wandb.save("checkpoints/*") in Python.
//
// The first start finds no checkpoint: file_not_found. Every other failure ends the program, run_not_found, too: without a valid
// API key the service hides private runs, and a run with checkpoints would begin again.
//
// SPDX-License-Identifier: MIT
#include "wandb_restore.hpp"

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>

namespace {

/// A toy model: its checkpoint is a text with the number of the last epoch and the weight after that epoch.
struct model {
  int epoch = 0;
  double weight = 1;

  bool load(std::istream& checkpoint) { return static_cast<bool>(checkpoint >> epoch >> weight); }
  void train() { ++epoch, weight /= 2; }
  bool save() const {
    std::filesystem::create_directories("checkpoints");
    const std::string name = "checkpoints/epoch-" + std::to_string(epoch) + ".txt";
    {
      std::ofstream file(name + ".new");
      file << epoch << ' ' << weight << '\n';
      if (!file.flush()) return false;
    }
    std::error_code failure;
    std::filesystem::rename(name + ".new", name, failure);  // never half a checkpoint under its name
    return !failure;
  }
};

}  // namespace

int main(int argc, char** argv) {
  const int epochs = argc > 1 ? std::atoi(argv[1]) : 3;
  model net;
  wandb::restore_options options;
  options.cache = wandb::cache_policy::refresh();  // another machine may have continued this run
  if (auto checkpoint = wandb::try_restore_newest("checkpoints/*.txt", options)) {
    if (!net.load(*checkpoint)) {
      std::cerr << checkpoint->name() << " is not a checkpoint\n";
      return 1;
    }
    std::cout << "continuing from " << checkpoint->name() << std::endl;
  } else if (checkpoint.error().code() == wandb::errc::file_not_found) {  // see resume_training.cpp
    std::cout << "no checkpoint yet" << std::endl;
  } else {
    std::cerr << "not starting: " << checkpoint.error().what() << '\n';
    return 1;
  }
  while (net.epoch < epochs) {
    net.train();
    if (!net.save()) {
      std::cerr << "cannot save a checkpoint\n";
      return 1;
    }
    std::cout << "epoch " << net.epoch << ", weight " << net.weight << std::endl;
  }
}
