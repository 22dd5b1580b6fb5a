// Restores a file in a program that is built without exceptions and RTTI.
//
//   c++ -std=c++17 -fno-exceptions -fno-rtti -I.. no_exceptions.cpp -o no_exceptions -lssl -lcrypto -pthread
//   ./no_exceptions NAME RUN_PATH
//
// Without exceptions there is only try_restore. It returns failures as values, with a code for the program and a text for
// people.
//
// SPDX-License-Identifier: MIT
#include "wandb_restore.hpp"

#include <cstdio>

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: no_exceptions NAME RUN_PATH\n");
    return 2;
  }
  const wandb::result<wandb::restored_file> file = wandb::try_restore(argv[1], argv[2]);
  if (!file) {
    const wandb::error& failure = file.error();
    std::fprintf(stderr, "%s (%s, HTTP status %d)\n", failure.what(), wandb::to_string(failure.code()),
                 failure.http_status());
    return 1;
  }
  std::printf("%s: %llu bytes\n", file->name().c_str(), static_cast<unsigned long long>(file->size()));
}
