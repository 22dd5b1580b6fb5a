// Measures the restore of an existing local file, and for comparison a plain stat and open of it.
//
//   keep NAME RUN_PATH ROOT    prints one line of JSON: nanoseconds per call, medians of interleaved batches
// SPDX-License-Identifier: MIT
#include "wandb_restore.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

namespace {

[[noreturn]] void give_up(const std::string& why) {
  std::fprintf(stderr, "keep: %s\n", why.c_str());
  std::exit(1);
}

class timing {
 public:
  template <class Body>
  void batch(Body body) {
    constexpr int calls =
        10;  // a batch is much shorter than a time slice, so that other programs do not disturb the median
    const auto begin = std::chrono::steady_clock::now();
    for (int i = 0; i < calls; ++i) body();
    const std::chrono::duration<double, std::nano> taken = std::chrono::steady_clock::now() - begin;
    batches_.push_back(taken.count() / calls);
  }
  double median() {
    std::sort(batches_.begin(), batches_.end());
    return batches_[batches_.size() / 2];
  }

 private:
  std::vector<double> batches_;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) give_up("usage: keep NAME RUN_PATH ROOT");
  const std::string name = argv[1];
  wandb::restore_options options;
  options.run_path = argv[2];
  options.root = argv[3];
  const std::string where = (options.root / name).string();
  wandb::client<> client;

  timing kept, free_function, stream, bare;
  for (int round = 0; round < 1001; ++round) {
    kept.batch([&] {
      auto file = client.try_restore(name, options);
      if (!file || file->source() != wandb::source::local) give_up("the file was not kept");
    });
    stream.batch([&] {
      struct stat facts;
      std::ifstream file(where, std::ios::binary);
      if (::stat(where.c_str(), &facts) != 0 || !file) give_up("the file is not there");
    });
    bare.batch([&] {
      struct stat facts;
      const int file = ::open(where.c_str(), O_RDONLY | O_CLOEXEC);
      if (::stat(where.c_str(), &facts) != 0 || file < 0) give_up("the file is not there");
      ::close(file);
    });
    free_function.batch([&] {
      auto file = wandb::try_restore(name, options);
      if (!file || file->source() != wandb::source::local) give_up("the file was not kept");
    });
  }
  std::printf("{\"client\": %.0f, \"function\": %.0f, \"stream\": %.0f, \"bare\": %.0f}\n", kept.median(),
              free_function.median(), stream.median(), bare.median());
}
