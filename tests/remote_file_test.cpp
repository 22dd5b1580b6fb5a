// Reading remotely: positions and ends, the cache and its bounds, reading in order, one version of the file, renewed
// addresses, servers without ranges, streams, cancellation. Requests and bytes are counted by the stand-in.
#include "restore_fixture.hpp"

#include <array>
#include <atomic>
#include <cstring>
#include <istream>
#include <limits>
#include <memory>
#include <set>
#include <thread>
#include <type_traits>

using namespace restore_tests;
using wandb::errc;

static_assert(!std::is_copy_constructible_v<wandb::remote_file>);
static_assert(std::is_nothrow_move_constructible_v<wandb::remote_file>);
static_assert(std::is_nothrow_move_assignable_v<wandb::remote_file>);
static_assert(!std::is_copy_constructible_v<wandb::remote_stream>);
static_assert(std::is_nothrow_move_constructible_v<wandb::remote_stream>);

namespace {

constexpr std::uint64_t KiB = 1024, MiB = 1024 * KiB;
constexpr std::uint64_t block = 64 * KiB, cache_blocks = 64;

/// Some bytes in front of generated ones: a large file with a header needs no memory.
class headed_content : public stand_in::content {
 public:
  headed_content(std::string header, std::uint64_t size)
      : header_(std::move(header)), rest_(stand_in::generated(size, 7)) {}
  std::uint64_t size() const override { return rest_->size(); }
  void read(std::uint64_t offset, char* out, std::size_t count) const override {
    rest_->read(offset, out, count);
    if (offset >= header_.size()) return;
    std::memcpy(out, header_.data() + offset,
                (std::min)(count, header_.size() - static_cast<std::size_t>(offset)));
  }
  std::string fingerprint() const override { return "headed-" + rest_->fingerprint(); }

 private:
  const std::string header_;
  const stand_in::content_ptr rest_;
};

/// A fixture with the file "model.bin".
struct remote_fixture : fixture {
  explicit remote_fixture(std::uint64_t size = 10 * MiB, stand_in::file_attributes attributes = {},
                          stand_in::options how = {})
      : fixture(std::move(how)) {
    put(stand_in::generated(size, 1), std::move(attributes));
  }
  void put(stand_in::content_ptr what, stand_in::file_attributes attributes = {}) {
    content = std::move(what);
    server.add_file(run, "model.bin", content, std::move(attributes));
  }
  wandb::remote_file open() { return success(client().try_open("model.bin", options())); }

  /// Reads a part, and checks that its bytes are the content's.
  void check_read(const wandb::remote_file& file, std::uint64_t offset, std::size_t length) const {
    CAPTURE(offset);
    CAPTURE(length);
    std::string buffer(length + 8, '\x5a');
    const auto count = file.try_read_at(offset, buffer.data(), length);
    if (!count) FAIL(std::string(count.error().what()));
    const std::uint64_t wanted =
        offset < content->size() ? (std::min<std::uint64_t>)(length, content->size() - offset) : 0;
    CHECK(*count == wanted);
    CHECK((buffer.substr(0, *count) ==
           stand_in::read_text(*content, (std::min)(offset, content->size()), wanted)));
    CHECK(buffer.substr(length) == std::string(8, '\x5a'));  // nothing is written behind the buffer
  }
  wandb::error failed_read(const wandb::remote_file& file, std::uint64_t offset, std::size_t length,
                           errc code) const {
    std::string buffer(length, '\0');
    auto read_error = failure(file.try_read_at(offset, buffer.data(), length), code);
    check_names(read_error, {"model.bin", "vanpelt/my-project/a1b2c3d"});
    return read_error;
  }
  /// Returns the counts of the storage, once it has counted all that it has sent.
  stand_in::kind_counters storage() const {
    CHECK(server.wait_for(
        [](const auto& view) {
          return std::all_of(view.requests.begin(), view.requests.end(),
                             [](const auto& each) { return each.finished; });
        },
        20s));
    return server.counted().of(request_kind::storage);
  }
  std::uint64_t graphql() const { return server.counted().of(request_kind::graphql).requests; }
  std::uint64_t redirects() const { return server.counted().of(request_kind::files).requests; }
  std::vector<std::string> ranges() const {
    std::vector<std::string> found;
    for (const auto& request : server.requests(request_kind::storage))
      found.push_back(request.range().value_or(""));
    return found;
  }

  stand_in::content_ptr content;
};

stand_in::file_attributes with_etag(stand_in::etag_form form) {
  stand_in::file_attributes attributes;
  attributes.etag = form;
  return attributes;
}

}  // namespace

TEST_SUITE("remote_file") {
  TEST_CASE("open asks the service once; the first read asks the storage; nothing is written to disk") {
    remote_fixture f(300'001);
    auto file = f.open();
    CHECK(f.asked() == "graphql 1, files 0, storage 0");
    CHECK(file.name() == "model.bin");
    CHECK(file.size() == 300'001);
    CHECK(file.info().md5 == stand_in::md5_hex(*f.content));
    CHECK(file.entity_tag().empty());
    f.check_read(file, 0, 10);
    CHECK(f.asked() == "graphql 1, files 0, storage 1");
    CHECK(file.entity_tag().front() == '"');
    auto in = file.stream();
    CHECK((read_all(in) == stand_in::read_text(*f.content)));
    CHECK(fs::is_empty(f.root()));
    CHECK_FALSE(fs::exists(f.directory / "cache"));
  }

  TEST_CASE("reads at edges: blocks, the end, beyond it, no bytes") {
    remote_fixture f(3 * block + 100);
    const auto file = f.open();
    const std::uint64_t size = file.size();
    const std::pair<std::uint64_t, std::size_t> parts[] = {{0, 0},
                                                           {0, 1},
                                                           {block - 1, 1},
                                                           {block - 1, 2},
                                                           {block, block},
                                                           {1, block},
                                                           {size - 1, 1},
                                                           {size - 1, 2},
                                                           {size, 1},
                                                           {size + 1, 10},
                                                           {size, 0},
                                                           {UINT64_MAX, 5},
                                                           {0, 3 * block + 100},
                                                           {0, 3 * block + 101},
                                                           {5, 9 * block},
                                                           {size - 50, 99}};
    for (const auto& [offset, length] : parts) f.check_read(file, offset, length);
    for (const auto& [offset, length] : parts) {  // each with an empty cache
      const auto fresh = f.open();
      f.check_read(fresh, offset, length);
    }
    CHECK(file.read_at(size - 3, std::array<char, 8>().data(), 8) == 3);
  }

  TEST_CASE("a read that needs no bytes makes no request") {
    remote_fixture f;
    const auto file = f.open();
    f.check_read(file, 0, 0);
    f.check_read(file, file.size(), 100);
    CHECK(f.asked() == "graphql 1, files 0, storage 0");
  }

  TEST_CASE("a long read is one request for its bytes, past the cache") {
    remote_fixture f;
    const auto file = f.open();
    f.check_read(file, 1'000'003, 4 * block);
    f.check_read(file, 1'000'003, 5'000'000);
    CHECK(f.storage().requests == 2);
    CHECK(f.storage().body_bytes == 4 * block + 5'000'000);
    f.check_read(file, 1'000'003, 1);  // it did not fill the cache
    CHECK(f.storage().requests == 3);
  }

  TEST_CASE("a long read takes its beginning from the cache") {
    remote_fixture f;
    const auto file = f.open();
    f.check_read(file, 0, 8);
    f.check_read(file, 8, 1'000'000);
    CHECK(f.ranges() == names{"bytes=0-262143", "bytes=262144-1000007"});
  }

  TEST_CASE("other reads request the blocks that they touch, once") {
    remote_fixture f;
    const auto file = f.open();
    f.check_read(file, 5 * MiB + 10, 100);
    f.check_read(file, 5 * MiB + 200, 100);
    f.check_read(file, 2 * MiB - 1, 2);
    f.check_read(file, 2 * MiB - 5, 10);
    f.check_read(file, 10 * MiB - 5, 10);
    CHECK(f.ranges() == names{"bytes=5242880-5308415", "bytes=2031616-2162687", "bytes=10420224-10485759"});
  }

  TEST_CASE("read in order: requests grow to 1 MiB, and every byte is requested once") {
    remote_fixture f(4 * MiB);
    const auto file = f.open();
    for (std::uint64_t offset = 0; offset < 4 * MiB; offset += 4096) f.check_read(file, offset, 4096);
    // 4 + 8 + 16 + 16 + 16 + 4 blocks
    CHECK(f.storage().requests == 6);
    CHECK(f.storage().body_bytes == 4 * MiB);
  }

  TEST_CASE("the first blocks are requested together") {
    remote_fixture f(4 * MiB);
    const auto file = f.open();
    f.check_read(file, 0, 8);
    f.check_read(file, 8, 200'000);
    CHECK(f.ranges() == names{"bytes=0-262143"});
  }

  TEST_CASE("two readers in order, in turns, are both read ahead for") {
    remote_fixture f(8 * MiB);
    const auto file = f.open();
    for (std::uint64_t offset = 0; offset < 2 * MiB; offset += 16384) {
      f.check_read(file, offset, 16384);
      f.check_read(file, 4 * MiB + offset, 16384);
    }
    CHECK(f.storage().requests <= 14);
    CHECK(f.storage().body_bytes <= 6 * MiB);
  }

  TEST_CASE("the cache keeps 64 blocks, those that were used last") {
    remote_fixture f(30 * MiB);
    const auto file = f.open();
    const auto far = [&](std::uint64_t i) { return (i + 1) * 5 * block; };  // no two in order
    for (std::uint64_t i = 0; i < cache_blocks; ++i) f.check_read(file, far(i), 1);
    for (std::uint64_t i = 0; i < cache_blocks; ++i) f.check_read(file, far(i) + block - 1, 1);
    CHECK(f.storage().requests == cache_blocks);
    f.check_read(file, far(0), 1);             // used again: block 1 is the oldest now
    f.check_read(file, far(cache_blocks), 1);  // in its place
    CHECK(f.storage().requests == cache_blocks + 1);
    f.check_read(file, far(0), 1);
    CHECK(f.storage().requests == cache_blocks + 1);
    f.check_read(file, far(1), 1);
    CHECK(f.storage().requests == cache_blocks + 2);
  }

  TEST_CASE("several threads read at once; a block that all want is requested once") {
    remote_fixture f(3 * MiB);
    const auto file = f.open();
    const std::string wanted = stand_in::read_text(*f.content);
    std::atomic<int> wrong{0};
    const auto together = [&](auto&& body) {
      std::vector<std::thread> threads;
      for (unsigned t = 0; t < 8; ++t) threads.emplace_back([&body, t] { body(t); });
      for (auto& each : threads) each.join();
    };
    together([&](unsigned) {
      char byte = 0;
      if (file.try_read_at(100, &byte, 1).value_or(0) != 1 || byte != wanted[100]) ++wrong;
    });
    CHECK(wrong == 0);
    CHECK(f.storage().requests == 1);

    together([&](unsigned t) {
      std::string buffer(500'000, '\0');
      std::uint64_t state = t + 1;
      for (int i = 0; i < 60; ++i) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        const std::uint64_t offset = (state >> 33) % (3 * MiB);
        const std::size_t length = i % 10 == 0 ? 400'000 : static_cast<std::size_t>(state >> 50);
        const auto count = file.try_read_at(offset, buffer.data(), length);
        const auto expected = (std::min<std::uint64_t>)(length, 3 * MiB - offset);
        if (!count || *count != expected ||
            wanted.compare(static_cast<std::size_t>(offset), *count, buffer, 0, *count) != 0)
          ++wrong;
      }
    });
    CHECK(wrong == 0);
  }

  TEST_CASE("more threads fetch than the cache has room for") {
    remote_fixture f(30 * MiB);
    const auto file = f.open();
    constexpr unsigned threads_at_once = cache_blocks + 8;
    f.server.add_fault(place::storage, act::stall(100));
    std::vector<std::thread> threads;
    std::atomic<int> good{0};
    for (std::uint64_t t = 0; t < threads_at_once; ++t) {
      threads.emplace_back([&, t] {
        char byte = 0;
        const auto offset = (t + 1) * 5 * block;
        good += file.try_read_at(offset, &byte, 1).value_or(0) == 1 &&
                byte == stand_in::read_text(*f.content, offset, 1)[0];
      });
    }
    CHECK(f.server.wait_for(
        [](const auto& view) {
          return view.counts.stalled == cache_blocks &&
                 view.counts.of(request_kind::storage).requests == threads_at_once;
        },
        20s));
    f.server.release();
    for (auto& each : threads) each.join();
    CHECK(good == int{threads_at_once});
    // 64 blocks, and eight reads without a block: exactly their byte
    CHECK(f.storage().requests == threads_at_once);
    CHECK(f.storage().body_bytes == cache_blocks * block + 8);
  }

  TEST_CASE("a large safetensors file: the header with at most 3 requests and 1 MiB, then one tensor") {
    std::string header = "{";
    for (unsigned i = 0; i < 2000; ++i)
      header += "\"model.layers." + std::to_string(i) + ".weight\":{\"dtype\":\"F16\",\"shape\":[1024,512]," +
                "\"data_offsets\":[" + std::to_string(i * MiB) + "," + std::to_string((i + 1) * MiB) + "]},";
    header.back() = '}';
    std::string start(8, '\0');
    for (unsigned i = 0; i < 8; ++i) start[i] = static_cast<char>(header.size() >> (8 * i));
    remote_fixture f;
    stand_in::file_attributes attributes;
    attributes.md5_as = stand_in::md5_form::null;  // to compute it takes seconds
    f.put(std::make_shared<headed_content>(start + header, 2048 * MiB), attributes);

    const auto file = f.open();
    std::uint64_t length = 0;
    unsigned char bytes[8];
    REQUIRE(file.read_at(0, bytes, 8) == 8);
    for (unsigned i = 0; i < 8; ++i) length |= std::uint64_t{bytes[i]} << (8 * i);
    REQUIRE(length == header.size());
    std::string read(static_cast<std::size_t>(length), '\0');
    REQUIRE(file.read_at(8, read.data(), read.size()) == read.size());
    CHECK((read == header));
    const std::uint64_t requests = f.graphql() + f.redirects() + f.storage().requests;
    MESSAGE("header of ", header.size(), " bytes: ", requests, " requests, ", f.storage().body_bytes,
            " bytes");
    CHECK(requests <= 3);
    CHECK(f.storage().body_bytes <= MiB);

    f.server.clear_log();
    f.check_read(file, 8 + header.size() + 1000 * MiB, 16 * MiB);
    MESSAGE("tensor of ", 16 * MiB, " bytes: ", f.storage().requests, " requests, ", f.storage().body_bytes,
            " bytes");
    CHECK(f.asked() == "graphql 0, files 0, storage 1");
    CHECK(f.storage().body_bytes == 16 * MiB);
  }

  // ---- one version

  TEST_CASE("a file that changes after it was opened is protocol_violation, never a mixture") {
    for (const auto form :
         {stand_in::etag_form::strong, stand_in::etag_form::weak, stand_in::etag_form::none}) {
      for (const std::uint64_t size : {10 * MiB, 9 * MiB, 11 * MiB}) {
        if (form == stand_in::etag_form::none && size == 10 * MiB) continue;  // see the next test
        CAPTURE(static_cast<int>(form));
        CAPTURE(size);
        remote_fixture f(10 * MiB, with_etag(form));
        const auto file = f.open();
        f.check_read(file, 0, 10);
        const auto before = f.content;
        f.put(stand_in::generated(size, 2), with_etag(form));
        check_names(f.failed_read(file, 5 * MiB, 100, errc::protocol_violation), {"open it again"});
        f.failed_read(file, 5 * MiB, 2 * MiB, errc::protocol_violation);
        f.failed_read(file, 10 * MiB - 10, 10, errc::protocol_violation);  // also beyond the new end
        f.content = before;
        f.check_read(file, 100, 100);  // the cache has bytes of the old version only
        f.put(stand_in::generated(size, 2), with_etag(form));
        f.check_read(f.open(), 5 * MiB, 100);
      }
    }
  }

  TEST_CASE("a change that the service tells when the address is renewed") {
    stand_in::file_attributes attributes;
    attributes.direct_url = "";
    remote_fixture f(10 * MiB, attributes);
    const auto file = f.open();
    f.check_read(file, 0, 10);
    f.put(stand_in::generated(10 * MiB, 2), attributes);
    f.server.expire_signatures();
    check_names(f.failed_read(file, 5 * MiB, 100, errc::protocol_violation), {"open it again"});
    f.failed_read(file, 5 * MiB, MiB, errc::protocol_violation);
    f.server.remove_file(f.run, "model.bin");
    f.server.expire_signatures();
    CHECK_FALSE(file.try_read_at(5 * MiB, std::array<char, 8>().data(), 8).has_value());
  }

  TEST_CASE("without a strong entity tag, Last-Modified and the presence of a tag count, too") {
    for (const auto form : {stand_in::etag_form::weak, stand_in::etag_form::none}) {
      CAPTURE(static_cast<int>(form));
      remote_fixture f(10 * MiB, with_etag(form));
      const auto file = f.open();
      f.check_read(file, 0, 10);
      f.check_read(file, 1 * MiB, 10);
      auto fault =
          f.server.add_fault(place::storage, act::header("Last-Modified", "Wed, 03 Jan 2024 03:04:05 GMT"));
      f.failed_read(file, 5 * MiB, 100, errc::protocol_violation);
      CHECK(f.server.struck(fault) >= 1);
      f.server.clear_faults();
      f.server.add_fault(place::storage, act::without_header("Last-Modified"));
      f.failed_read(file, 5 * MiB, 100, errc::protocol_violation);
      f.server.clear_faults();
      f.server.add_fault(place::storage, act::etag("\"another\""));
      f.failed_read(file, 5 * MiB, 100, errc::protocol_violation);
      f.server.clear_faults();
      f.check_read(file, 5 * MiB, 100);
    }
    remote_fixture f;
    const auto file = f.open();
    f.check_read(file, 0, 10);
    f.server.add_fault(place::storage, act::header("Last-Modified", "Wed, 03 Jan 2024 03:04:05 GMT"));
    f.check_read(file, 5 * MiB, 100);  // a strong entity tag suffices
    f.server.add_fault(place::storage, act::without_header("ETag"));
    f.failed_read(file, 6 * MiB, 100, errc::protocol_violation);
  }

  TEST_CASE("a change in the middle of one read is noticed, too") {
    remote_fixture f;
    const auto file = f.open();
    f.server.add_fault(stand_in::target(place::storage).nth(1), act::reset(2 * MiB));
    f.server.add_fault(stand_in::target(place::storage).from(2), act::changed_content());
    f.failed_read(file, 0, 5 * MiB, errc::protocol_violation);
    CHECK(f.storage().requests >= 2);
  }

  TEST_CASE("a storage that contradicts the service's size is protocol_violation") {
    stand_in::file_attributes attributes;
    attributes.size = 5'000'000;
    remote_fixture f(10 * MiB, attributes);
    const auto file = f.open();
    CHECK(file.size() == 5'000'000);
    f.failed_read(file, 0, 10, errc::protocol_violation);
  }

  // ---- the storage

  TEST_CASE("an address that expired is renewed once for all threads") {
    remote_fixture f(20 * MiB);
    const auto file = f.open();
    f.check_read(file, 0, 10);
    f.server.expire_signatures();
    f.server.clear_log();
    std::vector<std::thread> threads;
    std::atomic<int> good{0};
    for (std::uint64_t t = 1; t <= 8; ++t) {
      threads.emplace_back([&, t] {
        std::string buffer(MiB, '\0');
        good += file.try_read_at(t * 2 * MiB, buffer.data(), buffer.size()).value_or(0) == MiB &&
                buffer == stand_in::read_text(*f.content, t * 2 * MiB, MiB);
      });
    }
    for (auto& each : threads) each.join();
    CHECK(good == 8);
    CHECK(f.graphql() <= 1);  // none where the service's own address was not used yet
    CHECK(f.redirects() == 1);
    f.server.expire_signatures();
    f.server.clear_log();
    f.check_read(file, 0 + 19 * MiB, MiB);
    CHECK(f.asked() == "graphql 1, files 1, storage 2");
    CHECK(f.server.counted().signatures_made <= 2);
  }

  TEST_CASE("statuses of an expired address, and one that stays refused") {
    for (const int status : {401, 403, 410, 404}) {
      CAPTURE(status);
      remote_fixture f;
      const auto file = f.open();
      f.check_read(file, 0, 10);
      f.server.add_fault(stand_in::target(place::storage).nth(1, 2), act::status(status));
      f.check_read(file, 5 * MiB, 10);
    }
    remote_fixture f;
    const auto file = f.open();
    f.server.add_fault(place::storage, act::status(403));
    CHECK(f.failed_read(file, 0, 10, errc::permission_denied).http_status() == 403);
  }

  TEST_CASE("without a direct address the redirect is followed once") {
    stand_in::file_attributes attributes;
    attributes.direct_url = "";
    remote_fixture f(10 * MiB, attributes);
    const auto file = f.open();
    f.check_read(file, 0, 10);
    f.check_read(file, 5 * MiB, MiB);
    f.check_read(file, 7 * MiB, 10);
    CHECK(f.asked() == "graphql 1, files 1, storage 3");
  }

  TEST_CASE("a direct address that is refused or unreachable: the service's own is used") {
    stand_in::file_attributes attributes;
    attributes.direct_url = "https://127.0.0.1:1/model.bin";
    remote_fixture f(10 * MiB, attributes);
    const auto file = f.open();
    f.check_read(file, 5 * MiB, 10);
    f.check_read(file, 7 * MiB, 10);
    CHECK(f.asked() == "graphql 1, files 1, storage 2");
    f.server.clear_log();
    attributes.direct_url = f.server.storage_url() + "/nothing";
    f.put(f.content, attributes);
    f.check_read(f.open(), 5 * MiB, 10);
    CHECK(f.redirects() == 1);
  }

  TEST_CASE("a file that the service sends itself") {
    stand_in::file_attributes attributes;
    attributes.direct_url = "";
    stand_in::options how;
    how.redirect_to = stand_in::redirect::none;
    remote_fixture f(MiB, attributes, how);
    const auto file = f.open();
    f.check_read(file, 0, 10);
    f.check_read(file, 500'000, 500'000);
  }

  TEST_CASE("requests that are cut go on where they ended; transient statuses are tried again") {
    remote_fixture f;
    const auto file = f.open();
    f.server.add_fault(stand_in::target(place::storage).nth(1), act::reset(2 * MiB));
    f.server.add_fault(stand_in::target(place::storage).nth(2), act::cut(MiB));
    f.check_read(file, 100, 5 * MiB);
    CHECK(f.storage().requests == 3);
    CHECK(f.storage().body_bytes < 6 * MiB);
    f.server.clear_faults();
    f.server.add_fault(stand_in::target(place::storage).nth(1), act::status(503));
    f.server.add_fault(stand_in::target(place::storage).nth(2), act::reset(10));
    f.check_read(file, 9 * MiB, 10);
  }

  TEST_CASE(
      "a server that ignores ranges is an error that names the remedy; a small file can be read anyway") {
    remote_fixture f(64 * MiB);
    const auto file = f.open();
    f.server.add_fault(place::storage, act::ignore_range());
    const auto refused = f.failed_read(file, 0, 10, errc::http_failure);
    CHECK(refused.http_status() == 200);
    check_names(refused, {"restore the file instead"});
    f.failed_read(file, 5 * MiB, 2 * MiB, errc::http_failure);
    CHECK(f.storage().body_bytes < 32 * MiB);  // it does not wait for the end of the file
    f.server.add_file(f.run, "small.txt", "twelve bytes");
    auto in = f.success(f.client().try_open("small.txt", f.options())).stream();
    CHECK(read_all(in) == "twelve bytes");
    CHECK_FALSE(in.bad());
  }

  TEST_CASE("a server that ignores ranges and cuts the file: the next answer is the whole file again") {
    for (const std::uint64_t cut : {100'000U, 65'536U, 1U}) {
      CAPTURE(cut);
      remote_fixture f(300'000);
      const auto file = f.open();
      f.server.add_fault(place::storage, act::ignore_range());
      f.server.add_fault(stand_in::target(place::storage).nth(1), act::cut(cut));
      f.check_read(file, 0, 300'000);
      CHECK(f.storage().requests == 2);
    }
  }

  TEST_CASE("a server that ignores ranges: a part of a file of 1 MiB and its last byte can be read") {
    remote_fixture f(MiB);
    const auto file = f.open();
    f.server.add_fault(place::storage, act::ignore_range());
    f.check_read(file, 70'000, 10);
    f.check_read(file, MiB - 1, 1);
    f.check_read(file, 200'000, 400'000);
  }

  TEST_CASE("answers that break the protocol") {
    struct wrong {
      const char* what;
      stand_in::action action;
      errc code;
    };
    const wrong cases[] = {
        {"shifted", act::content_range(stand_in::bad_range::shifted), errc::protocol_violation},
        {"missing", act::content_range(stand_in::bad_range::missing), errc::protocol_violation},
        {"garbage", act::content_range(stand_in::bad_range::garbage), errc::protocol_violation},
        {"end", act::content_range(stand_in::bad_range::wrong_end), errc::protocol_violation},
        {"total", act::content_range(stand_in::bad_range::wrong_total), errc::protocol_violation},
        {"coded", act::header("Content-Encoding", "gzip"), errc::protocol_violation},
        {"501", act::status(501), errc::http_failure},
        {"418", act::status(418), errc::http_failure},
        {"page", act::html(200), errc::protocol_violation},
        {"other", act::status(200, {{"ETag", "\"other\""}}, "not the file"), errc::protocol_violation},
    };
    for (const auto& each : cases) {
      CAPTURE(each.what);
      remote_fixture f;
      const auto file = f.open();
      f.server.add_fault(place::storage, each.action);
      f.failed_read(file, MiB, 10, each.code);
      f.failed_read(file, MiB, 2 * MiB, each.code);
      f.server.clear_faults();
      f.check_read(file, MiB, 10);
      f.check_read(file, MiB, 2 * MiB);
    }
  }

  TEST_CASE("bodies that are shorter or longer than their head says") {
    remote_fixture f;
    const auto file = f.open();
    f.server.add_fault(stand_in::target(place::storage).nth(1), act::length_off_by(-10));
    f.server.add_fault(stand_in::target(place::storage).nth(3), act::length_off_by(10));
    f.check_read(file, 5 * MiB, MiB);
    CHECK(f.storage().requests == 2);  // the second brought the rest
    f.check_read(file, 7 * MiB, MiB);
  }

  TEST_CASE("an empty file") {
    remote_fixture f(0);
    const auto file = f.open();
    CHECK(file.size() == 0);
    f.check_read(file, 0, 10);
    auto in = file.stream();
    CHECK(in.peek() == std::istream::traits_type::eof());
    CHECK(in.eof());
    CHECK_FALSE(in.bad());
    CHECK(f.asked() == "graphql 1, files 0, storage 0");
  }

  TEST_CASE("a file whose size the service does not tell: the storage tells it") {
    stand_in::file_attributes attributes;
    attributes.size_as = stand_in::size_form::null;
    for (const std::uint64_t size :
         {std::uint64_t{0}, std::uint64_t{1}, block - 1, block, block + 1, 3 * MiB}) {
      CAPTURE(size);
      remote_fixture f(size, attributes);
      const auto file = f.open();
      CHECK(file.size() == size);
      CHECK(file.info().size == size);
      f.check_read(file, 0, 10);
      if (size > 0) CHECK(f.storage().requests == 1);  // the first block is there
      auto in = file.stream();
      CHECK((read_all(in) == stand_in::read_text(*f.content)));
    }
    remote_fixture f(3 * MiB, attributes);
    f.server.add_fault(place::storage, act::ignore_range());
    CHECK(f.failure(f.client().try_open("model.bin", f.options()), errc::http_failure).http_status() == 200);
    f.server.clear_faults();
    f.server.add_fault(place::storage, act::content_range(stand_in::bad_range::unknown_total));
    f.failure(f.client().try_open("model.bin", f.options()), errc::protocol_violation);
  }

  // ---- calls

  TEST_CASE("what cannot be opened") {
    remote_fixture f;
    auto client = f.client();
    check_names(f.failure(client.try_open("model.bim", f.options()), errc::file_not_found), {"model.bin"});
    f.failure(client.try_open("model.bin", "vanpelt/my-project/nothing"), errc::run_not_found);
    check_names(f.failure(client.try_open("", f.options()), errc::invalid_argument), {"cannot open"});
    f.failure(client.try_open("../model.bin", f.options()), errc::invalid_argument);
    f.failure(client.try_open("model.bin", "a//b//c/d/e"), errc::invalid_run_path);
    auto none = f.options();
    none.connections = 0;
    f.failure(client.try_open("model.bin", none), errc::invalid_argument);
    auto settings = f.settings();
    settings.offline = true;
    f.failure(wandb::client<>(settings).try_open("model.bin", f.options()), errc::offline);
    CHECK_THROWS_AS(client.open("nothing", fixture::path), wandb::error);
    wandb::remote_file closed;
    char byte = 0;
    f.failure(closed.try_read_at(0, &byte, 1), errc::invalid_argument);
    CHECK_THROWS_AS(closed.read_at(0, &byte, 1), wandb::error);
    CHECK(closed.stream().peek() == std::istream::traits_type::eof());
  }

  TEST_CASE("the free functions, and both forms of the arguments") {
    remote_fixture f(1000);
    const environment set(f);
    CHECK(wandb::open("model.bin").size() == 1000);
    CHECK(wandb::open("model.bin", fixture::path).size() == 1000);
    CHECK(wandb::open("model.bin", wandb::run_path{"vanpelt", "my-project", "a1b2c3d"}).size() == 1000);
    CHECK(wandb::try_open("model.bin", fixture::options())->size() == 1000);
    CHECK(f.client().open("./model.bin", fixture::path).name() == "model.bin");
    const auto file = wandb::open("model.bin");  // outlives its client
    f.check_read(file, 0, 1000);
    auto in = wandb::open("model.bin").stream();  // outlives its file
    CHECK((read_all(in) == stand_in::read_text(*f.content)));
  }

  TEST_CASE("wait: a file that is still to come") {
    fixture f;
    auto options = f.options();
    f.server.set_run_state(f.run, "running");
    options.wait = 1500ms;  // the last question comes at its end
    auto client = f.client();
    f.success(
        client.try_list_files(f.options()));  // connects: the wait counts from before the first question
    int asked = 0;
    options.on_progress = [&](const wandb::progress&) {
      if (++asked == 1) f.server.add_file(f.run, "late.bin", "here");
      return true;
    };
    auto in = f.success(client.try_open("late.bin", options)).stream();
    CHECK(read_all(in) == "here");
    options.on_progress = [](const wandb::progress&) { return false; };
    f.failure(client.try_open("later.bin", options), errc::cancelled);
  }

  TEST_CASE("cancelling ends a read that hangs, and later ones") {
    remote_fixture f;
    std::atomic<bool> cancel{false};
    auto options = f.options();
    options.cancel = &cancel;
    const auto file = f.success(f.client().try_open("model.bin", options));
    f.check_read(file, 0, 10);
    f.server.add_fault(place::storage, act::stall(1000));
    std::thread canceller([&] {
      CHECK(f.server.wait_for([](const auto& view) { return view.counts.stalled == 2; }, 20s));
      cancel = true;
    });
    std::thread waiting([&] { f.failed_read(file, 5 * MiB, 10, errc::cancelled); });
    f.failed_read(file, 7 * MiB, MiB, errc::cancelled);
    waiting.join();
    canceller.join();
    f.failed_read(file, 0, 10, errc::cancelled);
    cancel = false;
    f.server.clear_faults();
    f.check_read(file, 5 * MiB, 10);
  }

  TEST_CASE("total_timeout limits each read, not the life of the file") {
    remote_fixture f;
    auto settings = f.settings();
    settings.total_timeout = 3s;  // enough to open the file on a busy machine
    const auto file = f.success(wandb::client<>(settings).try_open("model.bin", f.options()));
    const auto stalls = f.server.add_fault(place::storage, act::stall(10));
    const auto first = f.failed_read(file, 0, 10, errc::connection_failed);
    check_names(first, {"total_timeout"});
    CHECK(f.server.struck(stalls) == 1);
    f.server.clear_faults();
    f.check_read(file, 0, 10);
  }

  TEST_CASE("a failure of bytes that are read ahead is no failure of the read") {
    remote_fixture f(3 * MiB);
    const auto file = f.open();
    f.server.add_fault(place::storage, act::cut_abruptly(100'000));
    f.server.clear_log();
    f.check_read(file, 0, 10);
    f.check_read(file, 0, 10);
    CHECK(f.storage().requests == 1);
  }

  TEST_CASE("an object that was moved from has no file") {
    remote_fixture f;
    auto file = f.open();
    CHECK(file.size() > 0);
    const wandb::remote_file other = std::move(file);
    CHECK(other.size() > 0);
    CHECK(file.size() == 0);  // NOLINT(bugprone-use-after-move)
    CHECK(file.name().empty());
  }

  // ---- streams

  TEST_CASE("after a failed read of a stream its position is the one before that read") {
    remote_fixture f(3 * MiB);
    const std::string wanted = stand_in::read_text(*f.content);
    const auto file = f.open();
    auto in = file.stream();
    std::string part(300'000, '\0');
    in.read(part.data(), 1000);
    f.server.add_fault(place::storage, act::status(400));
    in.read(part.data(), 300'000);  // a part is in the buffer, the rest fails
    CHECK(in.bad());
    CHECK(in.gcount() == 0);
    f.server.clear_faults();
    in.clear();
    CHECK(in.tellg() == 1000);
    in.read(part.data(), 300'000);
    CHECK(in.gcount() == 300'000);
    CHECK((part == wanted.substr(1000, 300'000)));
  }

  TEST_CASE("a stream seeks, tells, reads and ends as a file does") {
    remote_fixture f(3 * MiB + 17);
    const std::string wanted = stand_in::read_text(*f.content);
    const auto file = f.open();
    auto in = file.stream();
    CHECK(in.tellg() == 0);
    CHECK(f.storage().requests == 0);
    std::string part(10, '\0');
    in.read(part.data(), 10);
    CHECK((part == wanted.substr(0, 10)));
    CHECK(in.tellg() == 10);
    in.seekg(2 * MiB + 5);
    CHECK(in.get() == static_cast<unsigned char>(wanted[2 * MiB + 5]));
    in.seekg(-3, std::ios::cur);
    CHECK(in.tellg() == static_cast<std::streamoff>(2 * MiB + 3));
    CHECK(in.get() == static_cast<unsigned char>(wanted[2 * MiB + 3]));
    in.seekg(-5, std::ios::end);
    part.assign(10, '\0');
    in.read(part.data(), 10);
    CHECK(in.gcount() == 5);
    CHECK((part.substr(0, 5) == wanted.substr(wanted.size() - 5)));
    CHECK(in.eof());
    CHECK(in.fail());
    CHECK_FALSE(in.bad());
    CHECK(in.failure() == nullptr);
    in.clear();
    CHECK(in.tellg() == static_cast<std::streamoff>(wanted.size()));
    in.seekg(1, std::ios::end);
    CHECK(in.fail());
    in.clear();
    for (const auto far :
         {(std::numeric_limits<std::streamoff>::max)(), (std::numeric_limits<std::streamoff>::min)()}) {
      in.clear();
      in.seekg(far, std::ios::beg);
      CHECK(in.fail());
    }
    in.clear();
    in.seekg(-1);
    CHECK(in.fail());
    in.clear();
    CHECK(in.tellg() == static_cast<std::streamoff>(wanted.size()));
    in.seekg(0);
    CHECK((read_all(in) == wanted));
    in.clear();
    in.seekg(MiB - 1);
    std::string long_part(MiB + 2, '\0');
    in.read(long_part.data(), static_cast<std::streamsize>(long_part.size()));
    CHECK(in.good());
    CHECK((long_part == wanted.substr(MiB - 1, MiB + 2)));
    CHECK(in.tellg() == static_cast<std::streamoff>(2 * MiB + 1));
    in.unget();
    CHECK(in.tellg() == static_cast<std::streamoff>(2 * MiB));
    in.seekg(0, std::ios::end);
    CHECK(in.tellg() == static_cast<std::streamoff>(wanted.size()));
  }

  TEST_CASE("a stream that reads in order needs few requests, and a seek inside the buffer none") {
    remote_fixture f(4 * MiB);
    auto in = f.open().stream();
    CHECK((read_all(in) == stand_in::read_text(*f.content)));
    CHECK(f.storage().requests == 6);
    CHECK(f.storage().body_bytes == 4 * MiB);
    in.clear();
    in.seekg(4 * MiB - 100);
    in.get();
    in.seekg(4 * MiB - 50);
    in.get();
    CHECK(f.storage().requests == 6);
  }

  TEST_CASE("streams move with their position") {
    remote_fixture f(MiB);
    const std::string wanted = stand_in::read_text(*f.content);
    auto file = f.open();
    auto moved_file = std::move(file);
    auto in = moved_file.stream();
    in.seekg(1000);
    CHECK(in.get() == static_cast<unsigned char>(wanted[1000]));
    wandb::remote_stream moved(std::move(in));
    CHECK(moved.get() == static_cast<unsigned char>(wanted[1001]));
    auto another = moved_file.stream();
    another = std::move(moved);
    CHECK(another.tellg() == 1002);
    CHECK(another.get() == static_cast<unsigned char>(wanted[1002]));
    CHECK(in.get() == std::istream::traits_type::eof());  // NOLINT: moved from
    CHECK(moved.bad());                                   // NOLINT
    file = std::move(moved_file);
    f.check_read(file, 5, 5);
  }

  TEST_CASE("a stream's failure is badbit, never an end; clear() tries again") {
    remote_fixture f;
    auto in = f.open().stream();
    in.get();
    f.server.add_fault(place::storage, act::status(418));
    in.seekg(5 * MiB);
    CHECK(in.get() == std::istream::traits_type::eof());
    CHECK(in.bad());
    CHECK_FALSE(in.eof());
    REQUIRE(in.failure() != nullptr);
    CHECK(in.failure()->code() == errc::http_failure);
    f.check_harmless(in.failure()->what());
    in.clear();
    CHECK(in.tellg() == static_cast<std::streamoff>(5 * MiB));
    std::string part(MiB, '\0');
    in.read(part.data(), static_cast<std::streamsize>(part.size()));
    CHECK(in.bad());
    in.clear();
    in.exceptions(std::ios::badbit);
    CHECK_THROWS_AS(in.get(), wandb::error);
    in.clear();
    CHECK_THROWS_AS(read_all(in), wandb::error);  // an iterator would take an end for the file's
    f.server.clear_faults();
    in.clear();
    CHECK(in.get() == static_cast<unsigned char>(stand_in::read_text(*f.content, 5 * MiB, 1)[0]));
  }

  TEST_CASE("a transport that throws leaves the file usable") {
    struct throwing_transport {
      std::shared_ptr<wandb::http_transport> network;
      std::shared_ptr<std::atomic<int>> throws;
      wandb::result<wandb::http_response> send(const wandb::http_request& request, wandb::body_sink& sink) {
        if (request.method == "GET" && throws->fetch_sub(1) > 0) throw std::bad_alloc();
        return network->send(request, sink);
      }
    };
    remote_fixture f;
    const auto throws = std::make_shared<std::atomic<int>>(2);
    wandb::client<throwing_transport> client(f.settings(),
                                             {std::make_shared<wandb::http_transport>(f.settings()), throws});
    const auto file = f.success(client.try_open("model.bin", f.options()));
    char byte = 0;
    CHECK_THROWS_AS((void)file.try_read_at(0, &byte, 1), std::bad_alloc);
    CHECK_THROWS_AS((void)file.try_read_at(0, &byte, 1), std::bad_alloc);
    f.check_read(file, 0, 10);
    f.check_read(file, 0, MiB);
  }
}
