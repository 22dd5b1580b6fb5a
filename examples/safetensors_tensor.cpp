// Lists the tensors of a safetensors file in a run, and reads one of them, without downloading the file:
//
//   ./safetensors_tensor NAME RUN_PATH [TENSOR]
//
// A safetensors file is: the size of the header in 8 bytes, little-endian; the header, a JSON object that has type, shape and
// position of each tensor; the tensors. Listing needs the header alone, and a tensor one more request.
//
// SPDX-License-Identifier: MIT
#include "wandb_restore.hpp"

#include <nlohmann/json.hpp>

#include <cstring>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using json = nlohmann::ordered_json;  // keeps the order of the tensors

constexpr std::uint64_t largest_header = 100'000'000;  // bytes; the format's own limit

json read_header(const wandb::remote_file& file, std::uint64_t& data_begins) {
  unsigned char size_bytes[8];
  if (file.read_at(0, size_bytes, sizeof size_bytes) < sizeof size_bytes)
    throw std::runtime_error(file.name() + " is not a safetensors file: it is too short");
  std::uint64_t size = 0;
  for (unsigned i = 0; i < 8; ++i) size |= std::uint64_t{size_bytes[i]} << (8 * i);
  if (size > largest_header || size > file.size() - 8)
    throw std::runtime_error(file.name() + " is not a safetensors file");
  std::string text(static_cast<std::size_t>(size), '\0');
  file.read_at(8, text.data(), text.size());
  data_begins = 8 + size;
  json header = json::parse(text);
  header.erase("__metadata__");  // about the file, not a tensor
  return header;
}

/// Returns the bytes of a tensor.
std::vector<char> read_tensor(const wandb::remote_file& file, std::uint64_t data_begins, const json& tensor) {
  const auto begin = tensor.at("data_offsets").at(0).get<std::uint64_t>();
  const auto end = tensor.at("data_offsets").at(1).get<std::uint64_t>();
  if (begin > end || end > file.size() - data_begins)
    throw std::runtime_error("a tensor lies outside the file");
  std::vector<char> bytes(static_cast<std::size_t>(end - begin));
  file.read_at(data_begins + begin, bytes.data(), bytes.size());
  return bytes;
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 3 || argc > 4) {
    std::cerr << "usage: safetensors_tensor NAME RUN_PATH [TENSOR]\n";
    return 2;
  }
  const auto file = wandb::open(argv[1], argv[2]);
  std::uint64_t data_begins = 0;
  const json header = read_header(file, data_begins);
  if (argc == 3) {
    for (const auto& [name, tensor] : header.items())
      std::cout << name << ' ' << tensor.at("dtype").get<std::string>() << ' ' << tensor.at("shape") << '\n';
    return 0;
  }
  if (!header.contains(argv[3])) {
    std::cerr << argv[1] << " has no tensor \"" << argv[3] << "\"; without TENSOR all are listed\n";
    return 1;
  }
  const json& tensor = header.at(argv[3]);
  const auto bytes = read_tensor(file, data_begins, tensor);
  std::cout << argv[3] << ": " << bytes.size() << " of " << file.size() << " bytes";
  if (tensor.at("dtype") == "F32") {  // little-endian, as this machine is presumed to be
    std::vector<float> values(bytes.size() / sizeof(float));
    std::memcpy(values.data(), bytes.data(), values.size() * sizeof(float));
    for (std::size_t i = 0; i < values.size() && i < 6; ++i) std::cout << (i == 0 ? ": " : " ") << values[i];
    if (values.size() > 6) std::cout << " ...";
  }
  std::cout << '\n';
} catch (const std::exception& failure) {
  std::cerr << failure.what() << '\n';
  return 1;
}
