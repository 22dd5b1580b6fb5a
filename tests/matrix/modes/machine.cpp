// Tests the parts that depend on the machine and the system: byte order, the width of sizes, files over 4 GiB, locks, atomic
// replacement, the home directory. Compiled without OpenSSL, and inline, to reach the internals.
#include "shared.hpp"

#include <fstream>

namespace {

namespace detail = wandb::detail;
using matrix::check;
using matrix::scratch;

void set_environment(const char* name, const char* value) {
#ifdef _WIN32
  _putenv_s(name, value);
#else
  ::setenv(name, value, 1);
#endif
}

std::string md5_of(std::string_view text) {
  detail::md5 hash;
  hash.update(text);
  return hash.finish();
}

/// RFC 1321, appendix A.5; RFC 4648, section 10.
void digest_and_text() {
  check(md5_of("") == "d41d8cd98f00b204e9800998ecf8427e", "md5 of nothing");
  check(md5_of("abc") == "900150983cd24fb0d6963f7d28e17f72", "md5 of abc");
  check(md5_of("message digest") == "f96b697d7cb7938d525a2f31aaf161d0", "md5 of message digest");
  check(md5_of("12345678901234567890123456789012345678901234567890123456789012345678901234567890") ==
            "57edf4a22be3c955ac49da2e2107b67a",
        "md5 of 80 digits");
  std::string text;
  for (std::uint64_t i = 0; i < 200000; ++i) text += matrix::byte_at(i);
  detail::md5 pieces;
  for (std::size_t at = 0, step = 1; at < text.size(); at += step, step = step * 7 % 1000 + 1) {
    pieces.update(std::string_view(text).substr(at, step));
  }
  check(pieces.finish() == md5_of(text), "md5 in pieces");
  check(detail::base64_encode("foobar") == "Zm9vYmFy" && detail::base64_decode("Zm8=") == "fo", "base64");
  check(detail::normalised_md5("kAFQmDzST7DWlj99KOF/cg==") == "900150983cd24fb0d6963f7d28e17f72",
        "md5 in base64");
  check(detail::hex64(0x0123456789abcdefu) == "0123456789abcdef", "hex");
  check(detail::to_number("18446744073709551615") == UINT64_MAX, "64-bit numbers");
  check(detail::parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT") == 784111777, "dates");
  check(detail::parse_http_date("Fri, 01 Jan 2100 00:00:00 GMT") == std::int64_t{4102444800},
        "dates beyond 2038");
  check(detail::utf8(detail::from_utf8("m\xc3\xbcnchen/\xe6\xa8\xa1\xe5\x9e\x8b")) ==
            "m\xc3\xbcnchen/\xe6\xa8\xa1\xe5\x9e\x8b",
        "paths are UTF-8");
}

void paths_and_homes() {
  const scratch folder("paths");
  const std::string name = "d\xc3\xa4ta/\xe6\xa8\xa1\xe5\x9e\x8b.h5";
  matrix::memory_transport::state state;
  state.files["plain.h5"] = {1000, {}};
  state.answer = "{\"data\":{\"project\":{\"run\":{\"files\":{\"edges\":[{\"node\":{\"name\":\"" + name +
                 "\",\"url\":\"http://memory.test/plain.h5\",\"sizeBytes\":1000}}]}}}}}";
  wandb::client<matrix::memory_transport> client(matrix::memory_settings(folder),
                                                 matrix::memory_transport(state));
  auto file = client.try_restore(name);
  check(file && file->size() == 1000 && file->get() == static_cast<unsigned char>(matrix::byte_at(0)),
        "a name beyond ASCII", file ? "" : file.error().what());
  std::error_code failure;
  check(std::filesystem::file_size(folder.where / detail::from_utf8(name), failure) == 1000,
        "is found by its name");
  for (const char* bad : {"/etc/x", "\\x", "C:\\x", "c:x", "a/../../x", "a\\..\\..\\x"}) {
    check(!client.try_restore(bad), "a name that leaves the folder", bad);
  }

#ifdef _WIN32
  set_environment("USERPROFILE", "C:\\users\\m\xc3\xbcller");
  check(detail::utf8(detail::home_directory()).find("users") != std::string::npos, "the home directory");
  set_environment("LOCALAPPDATA", "C:\\local");
  check(detail::wandb_cache_directory() == detail::path("C:\\local") / "wandb", "the cache directory");
#else
  set_environment("HOME", "/home/someone");
  check(detail::expand_home("~/x") == "/home/someone/x", "the home directory");
  set_environment("XDG_CACHE_HOME", "/somewhere");
  check(detail::wandb_cache_directory() == "/somewhere/wandb", "the cache directory");
#endif
}

void replacing_and_locks() {
  const scratch folder("locks");
  const auto target = folder.where / "file.txt";
  matrix::memory_transport::state state;
  state.files["file.txt"] = {100, {}};
  wandb::client<matrix::memory_transport> client(matrix::memory_settings(folder),
                                                 matrix::memory_transport(state));
  auto old = client.try_restore("file.txt");
  check(old.has_value(), "a first restore", old ? "" : old.error().what());
  state.files["file.txt"] = {200, {}};
#ifdef _WIN32
  if (old) old->close();  // Windows does not replace an open file
#endif
  auto fresh = client.try_restore("file.txt", "", true);
  check(fresh && fresh->size() == 200, "a second one in its place", fresh ? "" : fresh.error().what());
#ifndef _WIN32
  old->seekg(0, std::ios::end);
  check(old->tellg() == 100, "the old stream still has the old content");
#endif

  const detail::place at(target);
  {
    detail::place_lock one(at), other(at);
    check(one.try_acquire() == detail::place_lock::outcome::held, "a lock");
    check(other.try_acquire() == detail::place_lock::outcome::busy, "is one holder's");
  }
  detail::file beside;
  {
    detail::place_lock next(at);
    check(next.try_acquire() == detail::place_lock::outcome::held, "and free again");
    // As another process would find it: through the file, not through names in this process's memory.
#ifdef _WIN32
    check(beside.open(at.lock(), detail::file::mode::read) != 0, "no other process can open it");
#endif
  }
  check(folder.count() == 1, "locks leave nothing");

  const auto self = detail::owner::self();
  const auto parsed = detail::owner::parse(self.str());
  check(parsed.process != 0 && !parsed.is_provably_dead(), "this process is alive");
  detail::owner gone = self;
  gone.process = 0x7ffffffe;
  check(self.realm.empty() || gone.is_provably_dead(), "that one is not");
}

/// Offsets beyond 32 bits. Unwritten parts of the file are holes.
void large_files() {
  const scratch folder("large");
  const std::uint64_t size = (std::uint64_t{4} << 30) + 5 * detail::partial_file::block + 17;
  {
    detail::file file;
    check(file.open(folder.where / "sparse", detail::file::mode::create) == 0, "a file");
    for (const std::uint64_t at : {std::uint64_t{0x7ffffff0}, std::uint64_t{0xfffffff0}, size}) {
      char back[32] = {};
      check(file.write_at(at, "thirty-two bytes, all of them ok") == 0, "writing", std::to_string(at));
      check(file.read_at(at, back, sizeof back) == 32 &&
                std::string_view(back, 32) == "thirty-two bytes, all of them ok",
            "reading");
    }
    const auto facts = file.facts();
    check(facts.found() && facts->size == size + 32, "the size of an open file");
    check(file.resize(size) == 0, "shortening");
    const auto named = detail::facts_of(folder.where / "sparse");
    check(named.found() && named->size == size, "the size of a file");
  }
  std::error_code ignored;
  std::filesystem::remove(folder.where / "sparse", ignored);

  // A partial file of that size is resumed and published. The earlier blocks are holes here.
  const std::string md5(32, '7');
  const std::uint64_t last = (size - 1) / detail::partial_file::block, missing[] = {last - 3, last};
  const detail::place at(folder.where / "large.bin");
  {
    auto partial = detail::partial_file::create(at, md5, size);
    check(partial.has_value(), "a partial file", partial ? "" : partial.error().what());
    if (!partial) return;
    check(!!(*partial)->record(0, missing[0]) && !!(*partial)->record(missing[0] + 1, missing[1]),
          "its record");
    (*partial)->release(at, md5);
  }
  auto partial = detail::partial_file::open(at, md5, size);
  check(partial.has_value(), "the partial file again", partial ? "" : partial.error().what());
  if (!partial) return;
  for (const std::uint64_t index : missing) {
    check(!(*partial)->has(index) && (*partial)->has(index - 1), "what is missing", std::to_string(index));
    const auto begin = index * detail::partial_file::block;
    std::string bytes;
    for (auto i = begin; i < (std::min)(begin + detail::partial_file::block, size); ++i)
      bytes += matrix::byte_at(i);
    check(!!(*partial)->write(begin, bytes) && !!(*partial)->record(index, index + 1), "a block",
          std::to_string(index));
  }
  auto file = (*partial)->publish(at);
  check(file.has_value(), "a file over 4 GiB", file ? "" : file.error().what());
  if (!file) return;
  for (const std::uint64_t offset : {missing[0] * detail::partial_file::block, size - 1}) {
    file->seekg(static_cast<std::streamoff>(offset));
    check(file->get() == static_cast<unsigned char>(matrix::byte_at(offset)), "and puts it where it belongs",
          std::to_string(offset));
  }
  file->seekg(0, std::ios::end);
  check(static_cast<std::uint64_t>(file->tellg()) == size, "the stream's end");
}

}  // namespace

int main() {
  digest_and_text();
  paths_and_homes();
  replacing_and_locks();
  large_files();
  if (matrix::failures == 0)
    std::printf("ok %s, %u-bit sizes\n", WANDB_RESTORE_VERSION,
                static_cast<unsigned>(sizeof(std::size_t) * 8));
  return matrix::failures == 0 ? 0 : 1;
}
