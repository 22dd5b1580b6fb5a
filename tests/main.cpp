// The program of all unit and integration tests. It removes the environment's settings for servers, keys, proxies and
// certificates, and uses an empty home directory, so that tests do not depend on the machine. A child process of
// tests/process_test.cpp and tests/hostile_server_test.cpp uses its parent's home: a killed process could not remove its own.
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <cstdlib>       // environment
#include <filesystem>    // the empty home directory
#include <optional>      // a child process has none
#include <random>        // and its name
#include <string>        //
#include <system_error>  //
#include <vector>        //

#ifdef _WIN32
#include <stdlib.h>  // _environ, _putenv_s
#else
#include <unistd.h>  // environ
#endif

namespace {

void set_variable(const std::string& name, const std::string& value) {
#ifdef _WIN32
  _putenv_s(name.c_str(), value.c_str());  // an empty value removes the variable
#else
  if (value.empty()) unsetenv(name.c_str());
  else setenv(name.c_str(), value.c_str(), 1);
#endif
}

std::vector<std::string> variable_names() {
  std::vector<std::string> names;
#ifdef _WIN32
  char** entry = _environ;
#else
  char** entry = environ;
#endif
  for (; entry != nullptr && *entry != nullptr; ++entry) {
    const std::string text = *entry;
    names.push_back(text.substr(0, text.find('=')));
  }
  return names;
}

bool is_foreign(std::string name) {
  for (char& c : name)
    if (c >= 'a' && c <= 'z') c = static_cast<char>(c - 'a' + 'A');
  const auto begins = [&](const char* with) { return name.rfind(with, 0) == 0; };
  const auto ends = [&](const std::string& with) {
    return name.size() >= with.size() && name.compare(name.size() - with.size(), with.size(), with) == 0;
  };
  return begins("WANDB_") || begins("XDG_") || ends("_PROXY") || ends("_CA_BUNDLE") || name == "NETRC" ||
         name == "SSL_CERT_FILE" || name == "SSL_CERT_DIR";
}

/// A home directory for the duration of the tests.
class empty_home {
 public:
  empty_home()
      : path_(std::filesystem::temp_directory_path() /
              ("wandb_restore_home_" + std::to_string(std::random_device{}()))) {
    std::filesystem::create_directories(path_);
    for (const char* name : {"HOME", "USERPROFILE", "APPDATA", "LOCALAPPDATA"})
      set_variable(name, path_.string());
  }
  ~empty_home() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  empty_home(const empty_home&) = delete;
  empty_home& operator=(const empty_home&) = delete;

 private:
  std::filesystem::path path_;
};

}  // namespace

int main(int argc, char** argv) {
  for (const std::string& name : variable_names())
    if (is_foreign(name)) set_variable(name, "");
  std::optional<empty_home> home;
  if (std::getenv("CHILD_URL") == nullptr) home.emplace();
  doctest::Context context(argc, argv);
  return context.run();
}
