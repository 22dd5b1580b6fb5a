// The fuzzed functions. Each takes any bytes, and checks properties that must hold for all of them. fuzz.cpp runs them under
// libFuzzer, tests/fuzz_test.cpp over the committed corpus.
// SPDX-License-Identifier: MIT
#ifndef WANDB_RESTORE_TESTS_FUZZ_TARGETS_HPP
#define WANDB_RESTORE_TESTS_FUZZ_TARGETS_HPP

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <string_view>

#include <unistd.h>

#include "wandb_restore.hpp"

namespace fuzz {

/// A fuzzed function.
struct target {
  const char* name;  // also the folder of its corpus
  void (*run)(std::string_view input);
};

/// Ends the program with a message if a property does not hold: libFuzzer then saves the input.
#define FUZZ_CHECK(property)                                                                                 \
  do {                                                                                                       \
    if (!(property)) {                                                                                       \
      std::fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #property);                     \
      std::abort();                                                                                          \
    }                                                                                                        \
  } while (false)

/// Takes values from the front of an input. After its end all values are 0.
class feed {
 public:
  explicit feed(std::string_view input) : rest_(input) {}

  [[nodiscard]] bool is_empty() const { return rest_.empty(); }
  std::uint8_t byte() {
    if (rest_.empty()) return 0;
    const auto first = static_cast<std::uint8_t>(rest_.front());
    rest_.remove_prefix(1);
    return first;
  }
  /// A value below `limit`.
  std::uint64_t below(std::uint64_t limit) {
    std::uint64_t value = byte();
    if (limit > 256) value = value << 16 | static_cast<std::uint64_t>(byte()) << 8 | byte();
    return value % limit;
  }
  std::string_view rest() const { return rest_; }
  std::string_view line() {
    const auto end = (std::min)(rest_.find('\n'), rest_.size());
    const auto taken = rest_.substr(0, end);
    rest_.remove_prefix((std::min)(end + 1, rest_.size()));
    return taken;
  }

 private:
  std::string_view rest_;
};

/// A folder for the files of one process, in memory where the system has such a file system. Removed at the end.
class folder {
 public:
  folder() {
    const std::filesystem::path memory = "/dev/shm";
    std::error_code failure;
    const auto base =
        std::filesystem::is_directory(memory, failure) ? memory : std::filesystem::temp_directory_path();
    where_ = base / ("wandb-restore-fuzz-" + std::to_string(::getpid()));
    std::filesystem::create_directories(where_);
  }
  ~folder() {
    std::error_code ignored;
    std::filesystem::remove_all(where_, ignored);
  }
  folder(const folder&) = delete;
  folder& operator=(const folder&) = delete;
  [[nodiscard]] const std::filesystem::path& path() const { return where_; }

  static const folder& shared() {
    static const folder one;
    return one;
  }

 private:
  std::filesystem::path where_;
};

inline void write_file(const std::filesystem::path& where, std::string_view bytes) {
  std::ofstream out(where, std::ios::binary | std::ios::trunc);
  out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}
inline std::string read_stream(std::istream& in) {
  std::string text;
  for (std::size_t held = 0; in; held = text.size()) {
    text.resize(held + 65536);
    in.read(&text[held], 65536);
    text.resize(held + static_cast<std::size_t>(in.gcount()));
  }
  return text;
}
inline std::string read_file(const std::filesystem::path& where) {
  std::ifstream in(where, std::ios::binary);
  return read_stream(in);
}

/// A part of the key and of the signatures: no message may contain it. It depends on the input, so that an input cannot
/// contain it, also not with other bytes in between or encoded.
inline std::string secret;
inline std::string api_key;

/// Derives the secrets from an input (FNV-1a).
inline void make_secrets(std::string_view input) {
  std::uint64_t hash = 14695981039346656037u;
  for (const char c : input) hash = (hash ^ static_cast<unsigned char>(c)) * 1099511628211u;
  secret.clear();
  for (int i = 0; i < 16; ++i, hash >>= 4) secret += static_cast<char>('A' + (hash & 15));
  api_key = "KEY0KEY1KEY2" + secret + "KEY3KEY4KEY5";
}

/// Replaces the text "${key}" of an input by the key: a file or an answer that holds it.
inline std::string with_key(std::string_view text) {
  static constexpr std::string_view mark = "${key}";
  std::string replaced;
  for (auto found = text.find(mark); found != text.npos; found = text.find(mark)) {
    replaced.append(text.substr(0, found)).append(api_key);
    text.remove_prefix(found + mark.size());
  }
  return replaced.append(text);
}

/// Runs a target.
inline void run(const target& chosen, std::string_view input) {
  make_secrets(input);
  chosen.run(input);
}

/// Checks an error that a user may see: it has a text, on one line, without the key.
inline void check_error(const wandb::error& failure) {
  const std::string_view text = failure.what();
  FUZZ_CHECK(text.size() > 10);
  FUZZ_CHECK(text.find('\n') == text.npos);
  FUZZ_CHECK(text.find(secret) == text.npos);
  FUZZ_CHECK(std::string_view(wandb::to_string(failure.code())) != "unknown");
}

}  // namespace fuzz

#endif  // WANDB_RESTORE_TESTS_FUZZ_TARGETS_HPP
