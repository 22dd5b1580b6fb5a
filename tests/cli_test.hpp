// Shared by tests that start a program against the stand-in: a child process with its own environment and collected
// output, and a scratch directory. POSIX only.
//
// SPDX-License-Identifier: MIT
#ifndef WANDB_RESTORE_TESTS_CLI_TEST_HPP
#define WANDB_RESTORE_TESTS_CLI_TEST_HPP

#include <doctest/doctest.h>

#include "stand_in/stand_in.hpp"

#include <fcntl.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

namespace programs {

namespace fs = std::filesystem;
using namespace std::chrono_literals;

/// Returns the path of an example, which the build puts beside this program's directory.
inline fs::path example(const std::string& name) {
  const fs::path directory = fs::read_symlink("/proc/self/exe").parent_path().parent_path() / "examples";
  REQUIRE_MESSAGE(fs::exists(directory / name), "not built: ", (directory / name).string());
  return directory / name;
}

/// A directory that the destructor removes.
class scratch {
 public:
  scratch() {
    std::string name = (fs::temp_directory_path() / "wandb_restore_test_XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) throw std::system_error(errno, std::generic_category(), name);
    path_ = name;
  }
  ~scratch() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  scratch(const scratch&) = delete;
  scratch& operator=(const scratch&) = delete;
  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

inline std::string read_file(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}
inline void write_file(const fs::path& path, const std::string& text) {
  fs::create_directories(path.parent_path());
  std::ofstream(path, std::ios::binary) << text;
}

/// Closes a file descriptor in its destructor.
class descriptor {
 public:
  descriptor() = default;
  explicit descriptor(int fd) : fd_(fd) {}
  descriptor(descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  descriptor& operator=(descriptor&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~descriptor() { close(); }
  void close() {
    if (fd_ >= 0) ::close(fd_);
    fd_ = -1;
  }
  int get() const { return fd_; }

 private:
  int fd_ = -1;
};

struct pipe_ends {
  descriptor read, write;
};
inline pipe_ends make_pipe() {
  int fds[2];
  if (::pipe(fds) != 0) throw std::system_error(errno, std::generic_category(), "pipe");
  for (const int fd : fds) fcntl(fd, F_SETFD, FD_CLOEXEC);
  return {descriptor(fds[0]), descriptor(fds[1])};
}

/// A pseudo terminal: `master` reads the bytes that a program writes to `slave`.
class terminal {
 public:
  explicit terminal(unsigned short columns) : master_(posix_openpt(O_RDWR | O_NOCTTY)) {
    if (master_.get() < 0 || grantpt(master_.get()) != 0 || unlockpt(master_.get()) != 0) {
      throw std::system_error(errno, std::generic_category(), "pseudo terminal");
    }
    fcntl(master_.get(), F_SETFD, FD_CLOEXEC);
    slave_ = descriptor(::open(ptsname(master_.get()), O_RDWR | O_NOCTTY | O_CLOEXEC));
    resize(columns);
  }
  void resize(unsigned short columns) {
    winsize size{};
    size.ws_row = 24;
    size.ws_col = columns;
    if (ioctl(master_.get(), TIOCSWINSZ, &size) != 0)
      throw std::system_error(errno, std::generic_category(), "resize");
  }
  descriptor& master() { return master_; }
  descriptor& slave() { return slave_; }

 private:
  descriptor master_, slave_;
};

/// Whether this machine has pseudo terminals: a container without /dev/pts has none. If not, it prints a message, and the test
/// case returns.
inline bool has_terminals() {
  const descriptor master(posix_openpt(O_RDWR | O_NOCTTY));
  const char* const slave = master.get() >= 0 && grantpt(master.get()) == 0 && unlockpt(master.get()) == 0
                                ? ptsname(master.get())
                                : nullptr;
  const bool usable = slave != nullptr && ::access(slave, R_OK | W_OK) == 0;
  if (!usable) MESSAGE("left out: no pseudo terminals here");
  return usable;
}

struct outcome {
  int status = -1;  ///< the exit status, or 128 + the signal
  std::string out, err;
  long peak_kibibytes = 0;  ///< resident memory
};

struct setup {
  std::map<std::string, std::string> environment;
  fs::path directory;        ///< the working directory
  int standard_output = -1;  ///< a descriptor to use instead of a pipe
  terminal* tty = nullptr;   ///< a terminal to use as standard error instead of a pipe
};

/// A running program. The destructor kills it if it still runs.
class child {
 public:
  child(const fs::path& program, const std::vector<std::string>& arguments, const setup& how) {
    std::vector<std::string> words{program.string()};
    words.insert(words.end(), arguments.begin(), arguments.end());
    std::vector<std::string> variables;
    for (const auto& [name, value] : how.environment) variables.push_back(name + '=' + value);
    // children need the same variables for sanitizers, coverage and libraries
    for (const char* name : {"PATH", "LD_LIBRARY_PATH", "ASAN_OPTIONS", "LSAN_OPTIONS", "UBSAN_OPTIONS",
                             "TSAN_OPTIONS", "LLVM_PROFILE_FILE", "GCOV_PREFIX", "GCOV_PREFIX_STRIP"}) {
      if (const char* value = std::getenv(name)) variables.push_back(name + std::string("=") + value);
    }
    std::vector<char*> argv, envp;
    for (std::string& word : words) argv.push_back(word.data());
    for (std::string& variable : variables) envp.push_back(variable.data());
    argv.push_back(nullptr);
    envp.push_back(nullptr);

    pipe_ends out = make_pipe(), err = make_pipe();
    const descriptor nothing(::open("/dev/null", O_RDWR | O_CLOEXEC));
    const int child_out = how.standard_output >= 0 ? how.standard_output : out.write.get();
    const int child_err = how.tty != nullptr ? how.tty->slave().get() : err.write.get();
    const std::string directory = how.directory.string();

    pid_ = fork();
    if (pid_ < 0) throw std::system_error(errno, std::generic_category(), "fork");
    if (pid_ == 0) {  // only async-signal-safe calls: other threads may have held locks at the fork
      dup2(nothing.get(), 0);
      dup2(child_out, 1);
      dup2(child_err, 2);
      std::signal(SIGPIPE, SIG_DFL);
      if (chdir(directory.c_str()) == 0) execve(argv[0], argv.data(), envp.data());
      _exit(127);
    }
    out_ = std::move(out.read);
    if (how.tty != nullptr) {
      how.tty->slave().close();  // so that the child has the last descriptor of the terminal
      err_ = descriptor(fcntl(how.tty->master().get(), F_DUPFD_CLOEXEC, 3));
    } else {
      err_ = std::move(err.read);
    }
  }

  ~child() {
    if (pid_ <= 0) return;
    ::kill(pid_, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
  }
  child(const child&) = delete;
  child& operator=(const child&) = delete;

  void signal(int number) const { ::kill(pid_, number); }

  /// Collects output until standard error fulfils the predicate. Returns false if the program ended or the time is up.
  bool read_until(const std::function<bool(const std::string& err)>& enough,
                  std::chrono::milliseconds limit = 540s) {
    const auto deadline = std::chrono::steady_clock::now() + limit;
    while (!enough(seen_.err)) {
      if (!collect(deadline)) return enough(seen_.err);
    }
    return true;
  }

  /// Waits for the end of the program. Kills it after the time limit, which its status shows.
  outcome wait(std::chrono::milliseconds limit = 540s) {
    const auto deadline = std::chrono::steady_clock::now() + limit;
    while (collect(deadline)) {}
    if (std::chrono::steady_clock::now() >= deadline) ::kill(pid_, SIGKILL);
    int status = 0;
    rusage used{};
    ::wait4(pid_, &status, 0, &used);
    pid_ = 0;
    seen_.peak_kibibytes = used.ru_maxrss;
    seen_.status = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    return seen_;
  }

 private:
  /// Reads once from the ready descriptors. Returns false if both are closed, or the time is up.
  bool collect(std::chrono::steady_clock::time_point deadline) {
    if (out_.get() < 0 && err_.get() < 0) return false;
    const auto left =
        std::chrono::duration_cast<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now());
    if (left.count() <= 0) return false;
    pollfd ready[2] = {{out_.get(), POLLIN, 0}, {err_.get(), POLLIN, 0}};  // -1 is ignored
    if (::poll(ready, 2, static_cast<int>(left.count())) < 0 && errno != EINTR) return false;
    if (ready[0].revents != 0) read_some(out_, seen_.out);
    if (ready[1].revents != 0) read_some(err_, seen_.err);
    return true;
  }
  static void read_some(descriptor& from, std::string& into) {
    char buffer[16384];
    const ssize_t count = ::read(from.get(), buffer, sizeof buffer);
    if (count > 0) {
      into.append(buffer, static_cast<std::size_t>(count));
    } else if (count == 0 || errno != EINTR) {  // EIO: the last writer closed the terminal
      from.close();
    }
  }

  pid_t pid_ = 0;
  descriptor out_, err_;
  outcome seen_;
};

/// A stand-in with a run, and an environment that leads programs to it.
class fixture {
 public:
  explicit fixture(stand_in::options how = {})
      : server(std::move(how)), run(server.add_run("vanpelt", "my-project", "a1b2c3d")) {
    fs::create_directories(home());
    fs::create_directories(work());
    server.write_ca(directory.path() / "ca.pem");
    environment = {{"HOME", home().string()},
                   {"TMPDIR", directory.path().string()},
                   {"SSL_CERT_FILE", (directory.path() / "ca.pem").string()},
                   {"WANDB_BASE_URL", server.base_url()},
                   {"WANDB_API_KEY", server.key()}};
  }

  scratch directory;
  stand_in::server server;
  stand_in::run_ref run;
  std::map<std::string, std::string> environment;

  fs::path home() const { return directory.path() / "home"; }
  fs::path work() const { return directory.path() / "work"; }  ///< the programs' working directory
  std::string run_path() const { return run.entity + '/' + run.project + '/' + run.id; }

  setup how() const {
    setup result;
    result.environment = environment;
    result.directory = work();
    return result;
  }

  /// Runs a program to its end. Checks that its output has no secret.
  outcome start(const std::string& program, const std::vector<std::string>& arguments) {
    child running(example(program), arguments, how());
    outcome result = running.wait();
    check_no_secret(result);
    return result;
  }

  void check_no_secret(const outcome& result) const {
    for (const std::string& text : {result.out, result.err}) {
      CHECK(text.find(server.key()) == std::string::npos);
      CHECK(text.find("X-Signature") == std::string::npos);  // the query of a signed address
      CHECK(text.find("Authorization") == std::string::npos);
      CHECK(text.find("YXBpO") == std::string::npos);  // "api:..." in base64
    }
  }

  std::size_t requests() const { return server.requests().size(); }
};

}  // namespace programs

#endif
