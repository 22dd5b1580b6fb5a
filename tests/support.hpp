// Shared by the tests: scopes that change the environment, the working directory or the disk, and restore it.
#ifndef WANDB_RESTORE_TESTS_SUPPORT_HPP
#define WANDB_RESTORE_TESTS_SUPPORT_HPP

#include <cstdlib>     // environment
#include <filesystem>  //
#include <fstream>     //
#include <initializer_list>
#include <iterator>      // istreambuf_iterator
#include <optional>      // a variable that is not set
#include <random>        // names of directories
#include <stdexcept>     //
#include <string>        //
#include <system_error>  //
#include <vector>        //

// 1 under the address or the thread sanitizer. Their allocators do not survive a fork while another thread allocates: the
// first allocation of the child may wait for ever. So tests that fork beside threads of the stand-in run without them.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define TESTS_SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define TESTS_SANITIZED 1
#endif
#endif
#ifndef TESTS_SANITIZED
#define TESTS_SANITIZED 0
#endif

namespace support {

/// Sets or removes environment variables for the duration of a scope. Not for use with several threads.
class scoped_environment {
 public:
  struct variable {
    std::string name;
    std::optional<std::string> value;
  };
  /// scoped_environment env{{"NAME", "value"}, {"OTHER", std::nullopt}};
  scoped_environment(std::initializer_list<variable> wanted) {
    for (const auto& [name, value] : wanted) {
      const char* old = std::getenv(name.c_str());
      before_.push_back({name, old ? std::optional<std::string>(old) : std::nullopt});
      set(name, value);
    }
  }
  ~scoped_environment() {
    for (auto at = before_.rbegin(); at != before_.rend(); ++at) set(at->name, at->value);
  }
  scoped_environment(const scoped_environment&) = delete;
  scoped_environment& operator=(const scoped_environment&) = delete;

 private:
  static void set(const std::string& name, const std::optional<std::string>& value) {
#ifdef _WIN32
    _putenv_s(name.c_str(), value.value_or("").c_str());  // an empty value removes the variable
#else
    if (value) setenv(name.c_str(), value->c_str(), 1);
    else unsetenv(name.c_str());
#endif
  }
  std::vector<variable> before_;
};

/// An empty directory. The destructor removes it with its contents.
class temporary_directory {
 public:
  temporary_directory() {
    std::random_device random;
    do {
      path_ = std::filesystem::temp_directory_path() / ("wandb_restore_test_" + std::to_string(random()));
    } while (!std::filesystem::create_directory(path_));
  }
  ~temporary_directory() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  temporary_directory(const temporary_directory&) = delete;
  temporary_directory& operator=(const temporary_directory&) = delete;

  const std::filesystem::path& path() const { return path_; }
  std::filesystem::path operator/(const std::filesystem::path& below) const { return path_ / below; }
  std::string string() const { return path_.string(); }

 private:
  std::filesystem::path path_;
};

/// Changes the working directory for the duration of a scope.
class scoped_working_directory {
 public:
  explicit scoped_working_directory(const std::filesystem::path& wanted)
      : before_(std::filesystem::current_path()) {
    std::filesystem::current_path(wanted);
  }
  ~scoped_working_directory() {
    std::error_code ignored;
    std::filesystem::current_path(before_, ignored);
  }
  scoped_working_directory(const scoped_working_directory&) = delete;
  scoped_working_directory& operator=(const scoped_working_directory&) = delete;

 private:
  std::filesystem::path before_;
};

/// Writes a file, with the directories above it. Returns its path.
inline std::filesystem::path write_file(const std::filesystem::path& where, const std::string& text) {
  if (where.has_parent_path()) std::filesystem::create_directories(where.parent_path());
  std::ofstream out(where, std::ios::binary);
  out << text;
  if (!out.flush()) throw std::runtime_error("cannot write " + where.string());
  return where;
}

inline std::string read_file(const std::filesystem::path& where) {
  std::ifstream in(where, std::ios::binary);
  if (!in) throw std::runtime_error("cannot read " + where.string());
  return std::string(std::istreambuf_iterator<char>(in), {});
}

}  // namespace support

#endif  // WANDB_RESTORE_TESTS_SUPPORT_HPP
