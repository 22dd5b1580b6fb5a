// Lists the entries of a zip archive in a run (.npz, .zip, a checkpoint of PyTorch), and reads one of them, without downloading
// the archive:
//
//   ./zip_directory NAME RUN_PATH [ENTRY]
//
// A zip archive has its directory at the end. Prints size, "stored" or the number of the compression method, and name of each
// entry; with ENTRY, writes the content of that entry to standard output, if it is stored (as numpy.savez and torch.save do it).
// Reads zip64 archives, which may have more than 4 GiB. Source: APPNOTE.TXT of PKWARE, sections 4.3 to 4.5.
//
// SPDX-License-Identifier: MIT
#include "wandb_restore.hpp"

#include <algorithm>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

struct entry {
  std::string name;
  unsigned method = 0;  // 0: stored
  std::uint64_t size = 0, stored_size = 0, header_begins = 0;
};

[[noreturn]] void fail(const std::string& why) { throw std::runtime_error(why); }

/// Returns an unsigned number of `bytes` bytes, little-endian.
std::uint64_t number(const std::string& text, std::size_t offset, std::size_t bytes) {
  if (offset + bytes > text.size()) fail("the archive is malformed");
  std::uint64_t value = 0;
  for (std::size_t i = bytes; i-- > 0;) value = value << 8 | static_cast<unsigned char>(text[offset + i]);
  return value;
}

std::string read(const wandb::remote_file& file, std::uint64_t offset, std::uint64_t count) {
  if (offset > file.size() || count > file.size() - offset) fail("the archive is malformed");
  std::string text(static_cast<std::size_t>(count), '\0');
  file.read_at(offset, text.data(), text.size());
  return text;
}

/// Replaces numbers of 32 bits that are all ones by those of 64 bits in the extra field (section 4.5.3).
void apply_zip64(const std::string& extra, std::initializer_list<std::uint64_t*> numbers) {
  for (std::size_t at = 0; at + 4 <= extra.size();
       at += 4 + static_cast<std::size_t>(number(extra, at + 2, 2))) {
    if (number(extra, at, 2) != 1) continue;
    std::size_t next = at + 4;
    for (std::uint64_t* each : numbers) {
      if (*each != 0xffffffff) continue;
      *each = number(extra, next, 8);
      next += 8;
    }
    return;
  }
}

std::vector<entry> read_directory(const wandb::remote_file& file) {
  // The record at the end has 22 bytes and a comment of up to 65,535 bytes; a locator of zip64 stands before it.
  const std::uint64_t tail_size = (std::min<std::uint64_t>)(file.size(), 20 + 22 + 65535);
  const std::string tail = read(file, file.size() - tail_size, tail_size);
  const auto end = tail.rfind("PK\5\6");
  if (end == std::string::npos) fail(file.name() + " is not a zip archive");
  std::uint64_t size = number(tail, end + 12, 4), begins = number(tail, end + 16, 4);
  if (end >= 20 && tail.compare(end - 20, 4, "PK\6\7") == 0) {
    const std::string end64 = read(file, number(tail, end - 20 + 8, 8), 56);
    size = number(end64, 40, 8);
    begins = number(end64, 48, 8);
  }
  const std::string directory = read(file, begins, size);
  std::vector<entry> entries;
  for (std::size_t at = 0; directory.compare(at, 4, "PK\1\2") == 0;) {
    const auto name_size = static_cast<std::size_t>(number(directory, at + 28, 2));
    const auto extra_size = static_cast<std::size_t>(number(directory, at + 30, 2));
    const auto comment_size = static_cast<std::size_t>(number(directory, at + 32, 2));
    entry found;
    found.method = static_cast<unsigned>(number(directory, at + 10, 2));
    found.stored_size = number(directory, at + 20, 4);
    found.size = number(directory, at + 24, 4);
    found.header_begins = number(directory, at + 42, 4);
    found.name = directory.substr(at + 46, name_size);
    at += 46 + name_size + extra_size + comment_size;
    if (at > directory.size()) fail("the archive is malformed");
    apply_zip64(directory.substr(at - comment_size - extra_size, extra_size),
                {&found.size, &found.stored_size, &found.header_begins});
    entries.push_back(std::move(found));
  }
  return entries;
}

/// Writes the content of a stored entry, piece by piece.
void write_entry(const wandb::remote_file& file, const entry& wanted, std::ostream& out) {
  if (wanted.method != 0) fail("the entry is compressed: inflate it with zlib, for example");
  const std::string header = read(file, wanted.header_begins, 30);
  if (header.compare(0, 4, "PK\3\4") != 0) fail("the archive is malformed");
  auto in = file.stream();
  in.exceptions(std::ios::badbit);  // a failure of the network is an exception, with its reason
  in.seekg(
      static_cast<std::streamoff>(wanted.header_begins + 30 + number(header, 26, 2) + number(header, 28, 2)));
  std::string buffer(65536, '\0');
  for (std::uint64_t left = wanted.size; left > 0 && in;) {
    in.read(buffer.data(), static_cast<std::streamsize>((std::min<std::uint64_t>)(left, buffer.size())));
    out.write(buffer.data(), in.gcount());
    left -= static_cast<std::uint64_t>(in.gcount());
  }
  if (!in) fail("the archive ends early");
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 3 || argc > 4) {
    std::cerr << "usage: zip_directory NAME RUN_PATH [ENTRY]\n";
    return 2;
  }
  const auto file = wandb::open(argv[1], argv[2]);
  const auto entries = read_directory(file);
  if (argc == 3) {
    for (const entry& each : entries)
      std::cout << each.size << ' ' << (each.method == 0 ? "stored" : std::to_string(each.method)) << ' '
                << each.name << '\n';
    return 0;
  }
  const auto wanted =
      std::find_if(entries.begin(), entries.end(), [&](const entry& e) { return e.name == argv[3]; });
  if (wanted == entries.end()) fail("the archive has no such entry");
  write_entry(file, *wanted, std::cout);
} catch (const std::exception& failure) {
  std::cerr << failure.what() << '\n';
  return 1;
}
