// How does a training program go on from its last checkpoint, and start fresh where there is none?
//
//   WANDB_ENTITY=... WANDB_PROJECT=... WANDB_RUN_ID=... ./resume_training
//
// With no run path the current run is meant: the one that WANDB_RUN_ID names or, with WANDB_RESUME=auto, the
// one that wandb/wandb-resume.json does. "Not there (yet)" is the only failure that may start from nothing: a
// program that did so after a network failure would throw days of work away, and then overwrite the good
// checkpoint with a young one.
//
// SPDX-License-Identifier: MIT
#include "wandb_restore.hpp"

#include <iostream>
#include <istream>

namespace {

/// A stand-in for a model: its checkpoint is a text with the number of the last epoch and the loss after it.
struct model {
  int epoch = 0;
  double loss = 8;

  bool load(std::istream& checkpoint) { return static_cast<bool>(checkpoint >> epoch >> loss); }
  void train() { ++epoch, loss /= 2; }
};

}  // namespace

int main() {
  model net;

  // A checkpoint that is on disk is used without asking the service. Say options.cache =
  // wandb::cache_policy::refresh() where another machine may have trained on meanwhile.
  if (auto checkpoint = wandb::try_restore("checkpoint.txt")) {
    if (!net.load(*checkpoint)) {
      std::cerr << checkpoint->name() << " is not a checkpoint\n";
      return 1;
    }
    std::cout << "resuming after epoch " << net.epoch << ", loss " << net.loss << '\n';
  } else if (checkpoint.error().is_not_found()) {
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
