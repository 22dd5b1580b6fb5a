// The structural target: a whole restore over a transport in memory and a directory that the input prepares.
// SPDX-License-Identifier: MIT
#ifndef WANDB_RESTORE_TESTS_FUZZ_RESTORE_TARGET_HPP
#define WANDB_RESTORE_TESTS_FUZZ_RESTORE_TARGET_HPP

#include <sys/stat.h>

#include <map>
#include <mutex>
#include <vector>

#include "targets.hpp"

namespace fuzz {

/// A version of the run's file.
struct version {
  std::string bytes, md5;  // md5 in hex
};

/// The two versions of the file with a given size.
inline const version& version_of(std::uint64_t size, unsigned number) {
  static std::map<std::pair<std::uint64_t, unsigned>, version> known;
  auto& one = known[{size, number}];
  if (!one.md5.empty()) return one;
  one.bytes.resize(size);
  std::uint64_t state = size * 2 + number + 1;
  for (char& c : one.bytes)
    c = static_cast<char>((state = state * 6364136223846793005u + 1442695040888963407u) >> 56);
  wandb::detail::md5 hash;
  hash.update(one.bytes);
  one.md5 = hash.finish();
  return one;
}

/// Plays the service and its storage. The input decides what each request gets; after its end all answers are right.
class scripted_transport {
 public:
  struct world {
    explicit world(std::string_view input) : in(input) {}
    std::mutex mutex;  // guards the rest
    feed in;
    std::uint64_t size = 0;
    unsigned current = 0;  // the version that storage has
    bool named[2] = {false, false};
    bool has_key_leaked = false;
    int requests = 0;
  };
  explicit scripted_transport(world& shared) : world_(&shared) {}

  wandb::result<wandb::http_response> send(const wandb::http_request& request, wandb::body_sink& sink) const {
    const std::lock_guard<std::mutex> guard(world_->mutex);
    ++world_->requests;
    if (request.cancelled()) return wandb::error(wandb::errc::cancelled, "the request was cancelled");
    const bool is_service = request.url.rfind("https://service.test/", 0) == 0;
    if (!is_service && request_header(request, "Authorization") != nullptr) world_->has_key_leaked = true;
    if (request.method == "POST") return answer_question(sink);
    return is_service ? redirect(sink) : serve(request, sink);
  }

 private:
  static const std::string* request_header(const wandb::http_request& request, std::string_view name) {
    return wandb::detail::find_header(request.headers, name);
  }
  static wandb::result<wandb::http_response> deliver(wandb::http_response head, std::string_view body,
                                                     wandb::body_sink& sink) {
    if (!sink.start(head)) return wandb::error(wandb::errc::cancelled, "stopped by the receiver");
    while (!body.empty()) {
      const auto piece = body.substr(0, 50'000);
      if (!sink.write(piece)) return wandb::error(wandb::errc::cancelled, "stopped by the receiver");
      body.remove_prefix(piece.size());
    }
    return head;
  }
  static wandb::http_response head_of(int status, std::uint64_t length) {
    return {status, {{"Content-Length", std::to_string(length)}}};
  }
  static wandb::error transport_error(std::uint8_t choice) {
    switch (choice % 4) {
      case 0: return wandb::error::permanent(wandb::errc::connection_failed, "the certificate is refused");
      case 1: return wandb::error(wandb::errc::protocol_violation, "the head is malformed");
      default: return wandb::error(wandb::errc::connection_failed, "the connection was reset");
    }
  }
  int status() const {
    static constexpr int known[] = {400, 401, 403, 404, 408, 410, 412, 416, 425, 429,
                                    500, 501, 502, 503, 504, 204, 304, 100, 203, 300};
    return known[world_->in.byte() % std::size(known)];
  }

  wandb::result<wandb::http_response> answer_question(wandb::body_sink& sink) const {
    feed& in = world_->in;
    const auto action = in.byte();
    if (action > 200) {
      sink.connected();
      if (action > 230) return transport_error(action);
      const std::string body = R"({"errors":[{"message":"try again"}]})";
      return deliver(head_of(action > 215 ? 200 : status(), body.size()), body, sink);
    }
    const unsigned named = action > 150 ? 1 - world_->current : world_->current;
    if (action > 180) world_->current = 1 - world_->current;  // the run replaces the file
    world_->named[named] = true;
    const std::string size = action % 8 == 7 ? "null" : std::to_string(world_->size);
    const std::string body =
        R"({"data":{"project":{"run":{"files":{"edges":[{"node":{"name":"f.bin","url":"https://service.test/files/f.bin",)"
        R"("md5":")" +
        version_of(world_->size, named).md5 + R"(","sizeBytes":)" + size +
        R"(}}],"pageInfo":{"hasNextPage":false}}}}}})";
    return deliver(head_of(200, body.size()), body, sink);
  }

  wandb::result<wandb::http_response> redirect(wandb::body_sink& sink) const {
    feed& in = world_->in;
    const auto action = in.byte();
    if (action > 230) return transport_error(action);
    if (action > 200) return deliver(head_of(status(), 0), "", sink);
    const std::string targets[] = {"https://storage.test/f?signature=" + secret,
                                   "http://storage.test/f",
                                   "/files/f.bin",
                                   "ftp://x/",
                                   "",
                                   "//storage.test/g",
                                   "https://service.test.evil/"};
    wandb::http_response head = head_of(302, 0);
    head.headers.push_back({"Location", targets[action > 170 ? action % std::size(targets) : 0]});
    return deliver(head, "", sink);
  }

  wandb::result<wandb::http_response> serve(const wandb::http_request& request,
                                            wandb::body_sink& sink) const {
    feed& in = world_->in;
    const std::string& content = version_of(world_->size, world_->current).bytes;
    const auto action = in.byte();
    if (action > 235) return transport_error(action);
    if (action > 210) return deliver(head_of(status(), 0), "", sink);
    sink.connected();
    std::uint64_t begin = 0, end = content.size();
    wandb::http_response head;
    const std::string* range = request_header(request, "Range");
    if (range != nullptr && action % 16 != 15 && range->rfind("bytes=", 0) == 0) {
      const auto dash = range->find('-');
      begin = (std::min<std::uint64_t>)(std::strtoull(range->c_str() + 6, nullptr, 10), end);
      if (dash + 1 < range->size())
        end = (std::min<std::uint64_t>)(std::strtoull(range->c_str() + dash + 1, nullptr, 10) + 1, end);
      if (end < begin) end = begin;
      const std::uint64_t shift = action > 180 ? in.below(100'000) : 0;  // other bytes than were asked for
      head = head_of(206, end - begin);
      head.headers.push_back(
          {"Content-Range", "bytes " + std::to_string(begin + shift) + "-" + std::to_string(end + shift - 1) +
                                "/" +
                                (action % 16 == 14 ? std::string("*") : std::to_string(content.size()))});
    } else {
      head = head_of(200, content.size());
    }
    std::string body = content.substr(begin, end - begin);
    const auto flaw = in.byte();
    const std::size_t where = flaw > 128 ? in.below(body.size() + 1) : 0;
    bool is_cut = false;
    switch (flaw > 128 ? flaw % 10 : 0) {
      case 1:  // wrong bytes
        if (where < body.size()) body[where] = static_cast<char>(body[where] ^ 0x55);
        break;
      case 2:  // the connection is lost
        body.resize(where);
        is_cut = true;
        break;
      case 3:  // the body ends early, which the transport has not noticed
        body.resize(where);
        break;
      case 4: body += std::string(1 + where, 'z'); break;
      case 5: head.headers.erase(head.headers.begin()); break;
      case 6: head.headers.push_back({"ETag", where % 2 == 0 ? "\"one\"" : "W/\"one\""}); break;
      case 7: head.headers.push_back({"ETag", "\"" + std::to_string(where % 5) + "\""}); break;
      case 8: head.headers.push_back({"Content-Encoding", "gzip"}); break;
      case 9: head.headers.front().second = std::to_string(where); break;
      default: break;
    }
    auto sent = deliver(head, body, sink);
    if (is_cut && sent) return wandb::error(wandb::errc::connection_failed, "the connection was cut");
    return sent;
  }

  world* world_;
};

/// Puts a hidden file of a chosen kind beside the target: right, wrong or torn, of several owners.
inline void prepare_partial(feed& in, const wandb::detail::place& at, const version& content) {
  static constexpr std::uint64_t block = 65536;
  const std::uint64_t size = content.bytes.size();
  const std::uint64_t blocks = (size + block - 1) / block;
  std::string whole = content.bytes;
  const auto kind = in.byte();
  if (kind % 4 == 1 && !whole.empty()) whole[in.below(whole.size())] ^= 1;
  whole.resize(blocks * block);
  whole += "wandb-restore 2\n";
  for (int shift = 0; shift < 64; shift += 8) whole += static_cast<char>(size >> shift & 0xff);
  whole += content.md5 + std::string(8, '\0');
  for (std::uint64_t i = 0; i < (blocks + 14) / 8; ++i) whole += static_cast<char>(in.byte());
  if (kind % 8 == 3) whole.resize(in.below(whole.size() + 1));
  if (kind % 8 == 5) whole.resize(size);
  static const char* const owners[] = {"", "dead", "1-1-x", "garbage"};
  const std::string owner = owners[kind / 8 % 4];
  const auto where = owner.empty() ? at.released() : at.partial(content.md5, owner);
  std::error_code ignored;
  std::filesystem::remove_all(where, ignored);  // an earlier one may be a link
  if (kind < 200) {
    write_file(where, whole);
  } else if (kind < 215) {
    std::filesystem::create_symlink("../outside/victim", where, ignored);
  } else if (kind < 230) {
    (void)::mkfifo(where.c_str(), 0600);
  } else if (kind < 240) {
    std::filesystem::create_hard_link(at.directory / "../outside/victim", where, ignored);
  } else if (kind < 250) {
    std::filesystem::create_directory(where, ignored);
  } else {
    std::filesystem::create_symlink("../outside/victim", at.lock(), ignored);
  }
}

inline void restore_file(std::string_view input, std::uint64_t fixed_size) {
  namespace fs = std::filesystem;
  static const fs::path top = folder::shared().path() / "restore";
  const fs::path root = top / "root", target = root / "f.bin", outside = top / "outside";
  std::error_code ignored;
  fs::remove_all(top, ignored);
  fs::create_directories(root);
  fs::create_directories(outside);
  write_file(outside / "victim", "the neighbour's bytes");

  scripted_transport::world world(input);
  static constexpr std::uint64_t sizes[] = {0, 1, 1000, 65535, 65536, 65537, 200'000};
  const auto size_choice = world.in.byte();
  world.size = fixed_size != 0 ? fixed_size : sizes[size_choice % std::size(sizes)];
  const auto setup = world.in.byte();
  const std::string old = "an old file";
  const bool has_old = setup % 3 != 0;
  if (setup % 3 == 1) write_file(target, old);
  if (setup % 3 == 2) write_file(target, version_of(world.size, setup / 64 % 2).bytes);
  const std::string before = has_old ? read_file(target) : std::string();
  for (int i = setup / 3 % 4; i > 0; --i)
    prepare_partial(world.in, wandb::detail::place(target),
                    version_of(world.size, static_cast<unsigned>(i % 2)));

  wandb::settings configuration;
  configuration.base_url = "https://service.test";
  configuration.api_key = api_key;
  configuration.cache_dir = top / "cache";
  configuration.connect_timeout = configuration.idle_timeout = configuration.retry_timeout =
      std::chrono::milliseconds(setup % 16 == 15 ? 40 : 2);
  configuration.on_warning = [](std::string_view) {};
  wandb::restore_options options;
  options.run_path = "e/p/r";
  options.root = root;
  options.connections = 1 + setup % 3;
  static const wandb::cache_policy policies[] = {wandb::cache_policy::keep(), wandb::cache_policy::replace(),
                                                 wandb::cache_policy::refresh()};
  options.cache = policies[setup / 12 % 3];
  std::string delivered;
  bool is_verified = false;
  {
    wandb::client<scripted_transport> client(configuration, scripted_transport(world));
    const auto file = client.try_restore("f.bin", options);
    if (!file) {
      check_error(file.error());
      FUZZ_CHECK(std::string_view(file.error().what()).find("signature") == std::string_view::npos);
    } else {
      auto& stream = const_cast<wandb::restored_file&>(*file);
      delivered = read_stream(stream);
      is_verified = file->verified();
      FUZZ_CHECK(file->size() == delivered.size());
      if (file->source() == wandb::source::downloaded) FUZZ_CHECK(is_verified);
    }
    const bool is_there = fs::exists(fs::symlink_status(target, ignored));
    const std::string after = is_there ? read_file(target) : std::string();
    const auto is_named = [&](const std::string& bytes) {
      for (unsigned number : {0u, 1u})
        if (world.named[number] && bytes == version_of(world.size, number).bytes) return true;
      return false;
    };
    // The visible file is the old one, absent, or the content whose md5 the service named.
    if (is_there) {
      FUZZ_CHECK(fs::is_regular_file(fs::symlink_status(target, ignored)));
      FUZZ_CHECK((has_old && after == before) || is_named(after));
    } else {
      FUZZ_CHECK(!has_old);
    }
    if (file) {
      FUZZ_CHECK(is_there && after == delivered);
      if (is_verified) FUZZ_CHECK(is_named(delivered));
    }
  }
  FUZZ_CHECK(!world.has_key_leaked);
  FUZZ_CHECK(world.requests < 2000);
  // Nothing outside the root has changed.
  FUZZ_CHECK(read_file(outside / "victim") == "the neighbour's bytes");
  for (const auto& entry : fs::directory_iterator(outside)) FUZZ_CHECK(entry.path().filename() == "victim");
  for (const auto& entry : fs::directory_iterator(top)) {
    const auto name = entry.path().filename().string();
    FUZZ_CHECK(name == "root" || name == "outside" || name == "cache");
  }
}

/// Small files: one request brings them whole.
inline void restore(std::string_view input) { restore_file(input, 0); }
/// A file of several ranges, over up to three connections.
inline void restore_ranges(std::string_view input) { restore_file(input, 8'400'001); }

}  // namespace fuzz

#endif  // WANDB_RESTORE_TESTS_FUZZ_RESTORE_TARGET_HPP
