// Resumes a training from its last checkpoint, or starts a new one if there is no checkpoint.
//
//   WANDB_ENTITY=... WANDB_PROJECT=... WANDB_RUN_ID=... ./resume_training
//
// Without a run path the current run is used: WANDB_RUN_ID, or with WANDB_RESUME=auto the run in wandb/wandb-resume.json.
// Only file_not_found may start a new training: the run exists, and has no checkpoint. A program that did so after a network failure,
// or without its API key (then the service hides the run: run_not_found), would lose days of work, and then overwrite the good
// checkpoint with a new one.
//
// SPDX-License-Identifier: MIT
#include "wandb_restore.hpp"

#include <iostream>
#include <istream>

namespace {

/// A toy model. Its checkpoint is a text with the number of the last epoch and the loss after that epoch.
struct model {
  int epoch = 0;
  double loss = 8;

  bool load(std::istream& checkpoint) { return static_cast<bool>(checkpoint >> epoch >> loss); }
  void train() { ++epoch, loss /= 2; }
};

}  // namespace

int main() {
  model net;

  // A checkpoint on disk is used without a request. If another machine may have continued the training, set
  // options.cache = wandb::cache_policy::refresh().
  if (auto checkpoint = wandb::try_restore("checkpoint.txt")) {
    if (!net.load(*checkpoint)) {
      std::cerr << checkpoint->name() << " is not a checkpoint\n";
      return 1;
    }
    std::cout << "resuming after epoch " << net.epoch << ", loss " << net.loss << '\n';
  } else if (checkpoint.error().code() == wandb::errc::file_not_found) {
    std::cout << "no checkpoint yet: starting fresh\n";
  } else {
    std::cerr << "not starting: " << checkpoint.error().what() << '\n';
    return 1;
  }

  for (int i = 0; i < 2; ++i) {
    net.train();
    std::cout << "epoch " << net.epoch << ", loss " << net.loss << '\n';
  }
}
