// Shows the progress of a restore, and cancels it.
//
//   ./progress_and_cancel NAME RUN_PATH [SECONDS]
//
// There are two ways to cancel: the progress callback returns false (here: after SECONDS), or another thread or a signal
// handler sets an atomic flag (here: Ctrl-C). The call returns errc::cancelled within about a second, or after the resolution
// of a host name. The local file is unchanged. A later call resumes the download.
//
// SPDX-License-Identifier: MIT
#include "wandb_restore.hpp"

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <iostream>

namespace {

std::atomic<bool> stop{false};
extern "C" void on_interrupt(int) { stop = true; }

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::cerr << "usage: progress_and_cancel NAME RUN_PATH [SECONDS]\n";
    return 2;
  }
  const double seconds = argc > 3 ? std::atof(argv[3]) : 3600;
  std::signal(SIGINT, on_interrupt);

  using clock = std::chrono::steady_clock;
  const auto deadline = clock::now() + std::chrono::duration<double>(seconds);
  std::uint64_t seen = 0;  // needs no lock: on_progress runs in this thread
  int shown = -1;

  wandb::restore_options options;
  options.run_path = argv[2];
  options.cancel = &stop;
  options.on_progress = [&](const wandb::progress& now) {
    seen = now.bytes_done;
    if (now.bytes_total && *now.bytes_total > 0 && now.phase == wandb::phase::downloading) {
      const int percent = static_cast<int>(100 * now.bytes_done / *now.bytes_total);
      if (percent / 10 != shown / 10 || shown < 0) std::cout << percent << " %" << std::endl;
      shown = percent;
    }
    return clock::now() < deadline;
  };

  const auto file = wandb::try_restore(argv[1], options);
  if (file) {
    std::cout << file->name() << " is here: " << file->size() << " bytes\n";
    return 0;
  }
  if (file.error().code() == wandb::errc::cancelled) {
    std::cout << "stopped after " << seen << " bytes; the next call goes on from there\n";
    return 130;  // the exit status that shells use after Ctrl-C
  }
  std::cerr << file.error().what() << '\n';
  return 1;
}
