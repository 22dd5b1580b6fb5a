// Kills processes that restore one file at random moments, and checks what is left.
//
//   kills [--rounds N] [--processes N] [--seed N]
//
// A round (default: 1,000) starts four processes that restore the same file to the same place, and kills each with SIGKILL at a
// random moment of its own. The span of these moments is random, too: up to three times as long as a lone process takes, so that
// some finish before. Before a round the place is empty, or has another content, which is replaced or refreshed. Hidden files of
// earlier rounds stay. After each round:
// - the visible file is the old one, or exactly the new one, or absent if there was none; nothing else is visible;
// - a process that ended by itself has succeeded, and read exactly the new content; then the visible file is the new one.
// After the last round, and after each 10th, one more restore succeeds, and no hidden file remains.
//
// Prints the seed, and what came of the processes and the rounds. Exit status 1: a check failed; the text of the check is on
// standard error.
//
// SPDX-License-Identifier: MIT
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <iterator>
#include <random>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "trial.hpp"

namespace {

namespace fs = std::filesystem;
using clock = std::chrono::steady_clock;
using std::chrono::nanoseconds;

constexpr const char* name = "large.bin";
enum status { right, failed, wrong_content };

class killing {
 public:
  killing(const faults::servers& all, const fs::path& folder, std::size_t processes, std::uint64_t seed)
      : root_(folder / "root"), cache_(folder / "cache"), processes_(processes), dice_(seed),
        old_content_(stand_in::read_text(*stand_in::generated(faults::large_size, faults::old_seed))),
        new_content_(stand_in::read_text(*stand_in::generated(faults::large_size, faults::new_seed))) {
    settings_.base_url = all.plain.base_url;
    settings_.api_key = all.plain.key;
    settings_.cache_dir = cache_;
    settings_.on_warning = [](std::string_view) {};
    options_.run_path = "e/p/r";
    options_.root = root_;
    fs::create_directories(root_);
    fs::create_directories(cache_);
  }

  /// Measures how long a lone process takes that nobody kills.
  void measure() {
    prepare(0);
    const auto began = clock::now();
    take(start());
    span_ = clock::now() - began;
  }
  void round(std::uint64_t number) {
    number_ = number;
    prepare(number);
    const auto began = clock::now();
    std::vector<pid_t> ids;
    while (ids.size() < processes_) ids.push_back(start());
    std::uniform_real_distribution<double> share(0.1, 3);
    std::uniform_int_distribution<std::int64_t> moment(
        0, static_cast<std::int64_t>(share(dice_) * static_cast<double>(span_.count())));
    std::vector<std::pair<clock::time_point, pid_t>> victims;
    for (const auto id : ids) victims.emplace_back(began + nanoseconds(moment(dice_)), id);
    std::sort(victims.begin(), victims.end());
    for (const auto& [when, id] : victims) {
      std::this_thread::sleep_until(when);
      kill(id, SIGKILL);  // a process that has ended is still there until take()
    }
    const auto succeeded_before = succeeded_;
    for (const auto id : ids) take(id);
    check(succeeded_ != succeeded_before);
  }
  /// Restores once more, and checks that nothing is left.
  void settle() {
    options_.cache = wandb::cache_policy::replace();
    if (const int status = restore(); status != right)
      report("an undisturbed restore fails: " + std::to_string(status));
    for (const auto& [file, text] : faults::read_files(root_)) {
      if (file != name) report(file + " is left"), fs::remove(root_ / file);
      else if (text != new_content_) report("an undisturbed restore leaves a wrong content");
    }
  }
  void print() const {
    std::uint64_t unfinished_receipts = 0;
    for (const auto& entry : fs::directory_iterator(cache_ / "receipts"))
      if (entry.path().filename().string().find(".new-") != std::string::npos) ++unfinished_receipts;
    std::cout << "processes: " << killed_ << " killed, " << succeeded_
              << " ended before with the right file; a lone one takes "
              << std::chrono::duration<double>(span_).count() << " s\n"
              << "after a round: the new file " << is_new_ << " times, the old one " << is_old_ << ", none "
              << is_absent_ << "; with bytes of a download beside it " << has_parts_ << "\n"
              << "unfinished receipts in the cache directory, which later calls remove after a day: "
              << unfinished_receipts << '\n';
  }
  int violations() const { return violations_; }
  std::uint64_t killed() const { return killed_; }

 private:
  /// Puts the files of a round in place.
  void prepare(std::uint64_t number) {
    has_old_ = number % 4 > 1;
    options_.cache = number % 4 == 2   ? wandb::cache_policy::replace()
                     : number % 4 == 3 ? wandb::cache_policy::refresh()
                                       : wandb::cache_policy::keep();
    fs::remove(root_ / name);
    if (has_old_) support::write_file(root_ / name, old_content_);
  }
  /// Starts a process that restores the file.
  pid_t start() {
    const pid_t id = fork();
    if (id < 0) std::abort();
    if (id != 0) return id;
    alarm(120);
    _exit(restore());
  }
  int restore() {
    wandb::client<> client(settings_);
    auto got = client.try_restore(name, options_);
    if (!got) std::cerr << got.error().what() << std::endl;
    if (!got) return failed;
    return std::string(std::istreambuf_iterator<char>(*got), {}) == new_content_ ? right : wrong_content;
  }
  void take(pid_t id) {
    int how = 0;
    waitpid(id, &how, 0);
    if (WIFSIGNALED(how) && WTERMSIG(how) == SIGKILL) {
      ++killed_;
    } else if (WIFSIGNALED(how)) {
      report(WTERMSIG(how) == SIGALRM ? "a process does not end"
                                      : "a process died of signal " + std::to_string(WTERMSIG(how)));
    } else if (WEXITSTATUS(how) == right) {
      ++succeeded_;
    } else {
      report(WEXITSTATUS(how) == failed ? "a restore fails" : "a restore returns a wrong content");
    }
  }
  void check(bool has_succeeded) {
    bool is_there = false, has_part = false;
    for (const auto& [file, text] : faults::read_files(root_)) {
      has_part = has_part || file.find(".part") != file.npos;
      if (faults::is_hidden(file)) continue;
      const bool is_new = text == new_content_;
      is_there = true;
      if (file != name) report(file + " is visible");
      if (!is_new && !(has_old_ && text == old_content_)) report("the visible file has a wrong content");
      if (!is_new && has_succeeded) report("a restore succeeded, but the visible file is the old one");
      ++(is_new ? is_new_ : is_old_);
    }
    if (!is_there) ++is_absent_;
    if (!is_there && (has_old_ || has_succeeded)) report("the visible file is missing");
    if (has_part) ++has_parts_;
  }
  void report(const std::string& text) {
    if (++violations_ <= 20) std::cerr << "round " << number_ << ": " << text << std::endl;
  }

  const fs::path root_, cache_;
  const std::size_t processes_;
  std::mt19937_64 dice_;
  const std::string old_content_, new_content_;
  wandb::settings settings_;
  wandb::restore_options options_;
  nanoseconds span_{0};
  std::uint64_t number_ = 0, killed_ = 0, succeeded_ = 0, is_new_ = 0, is_old_ = 0, is_absent_ = 0,
                has_parts_ = 0;
  bool has_old_ = false;
  int violations_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
  std::uint64_t rounds = 1000, processes = 4, seed = std::random_device()();
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    std::uint64_t* const value = argument == "--rounds"      ? &rounds
                                 : argument == "--processes" ? &processes
                                 : argument == "--seed"      ? &seed
                                                             : nullptr;
    if (value == nullptr || i + 1 == argc) {
      std::cerr << "usage: kills [--rounds N] [--processes N] [--seed N]\n";
      return 2;
    }
    *value = std::strtoull(argv[++i], nullptr, 10);
  }
  signal(SIGPIPE, SIG_IGN);
  const support::temporary_directory folder;
  const faults::servers all(folder.path());
  std::cout << "seed: " << seed << std::endl;
  killing loop(all, folder.path(), processes, seed);
  loop.measure();
  for (std::uint64_t number = 0; number < rounds; ++number) {
    loop.round(number);
    if (number % 10 == 9) loop.settle();
    if (number % 100 == 99) std::cout << number + 1 << " rounds" << std::endl;
  }
  loop.settle();
  loop.print();
  std::cout << "rounds: " << rounds << ", violations: " << loop.violations() << std::endl;
  if (rounds * processes >= 40 && loop.killed() == 0) {
    std::cerr << "every process ended before it was killed" << std::endl;
    return 1;
  }
  return loop.violations() == 0 ? 0 : 1;
}
