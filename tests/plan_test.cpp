// The parts of the download engine, each without a server: the assignment of ranges, the blocks on
// disk, the file's address, and the time limits of retries.
//
// These classes are in the implementation part of the header: this file compiles it inline, in the inline namespace of that
// build mode. The rest of the program is not affected.
#undef WANDB_RESTORE_SPLIT
#include "wandb_restore.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "support.hpp"

namespace {

using namespace std::chrono_literals;
using wandb::errc;
using wandb::error;
using wandb::detail::byte_range;
using wandb::detail::range_plan;
using time_point = wandb::detail::clock::time_point;
constexpr std::uint64_t MiB = 1024 * 1024;
constexpr std::uint64_t block = range_plan::block;
constexpr std::uint64_t chunk = 4 * block;  // bytes that a connection buffers before it writes

/// A download in simulated time. Each connection has a rate, and a delay for each request. All connections together may share
/// one link.
class simulation {
 public:
  struct network {
    std::vector<double> paces;  // bytes a second of each connection
    double delay = 0.05;        // seconds from a request to the first byte of its response
    double link = 1e18;         // bytes a second of all connections together
  };

  simulation(std::uint64_t size, const std::vector<byte_range>& gaps, network simulated)
      : plan(simulated.paces.size(), size, gaps), written((size + block - 1) / block, 0),
        network_(std::move(simulated)), size_(size), wanted_(written.size(), 0),
        connections_(network_.paces.size()) {
    for (const auto& gap : gaps)
      for (auto i = gap.begin / block; i < (gap.end + block - 1) / block; ++i) wanted_[i] = 1, ++missing_;
  }

  /// Runs until every byte has arrived, or for `limit` seconds. Returns whether every byte has arrived.
  bool run(double limit, const std::function<void(simulation&)>& each_step = {}) {
    constexpr double step = 0.005;
    for (int ticks = 0; missing_ > 0 && time < limit; ++ticks) {
      double demand = 0;
      for (std::size_t i = 0; i < connections_.size(); ++i) demand += is_receiving(i) ? network_.paces[i] : 0;
      const double scale = demand > network_.link ? network_.link / demand : 1;
      for (std::size_t i = 0; i < connections_.size(); ++i) advance(i, network_.paces[i] * scale * step);
      time += step;
      if (ticks % 20 == 19) plan.measure(20 * step);
      if (each_step) each_step(*this);
    }
    return missing_ == 0;
  }
  time_point now() const {
    return time_point{} + 1s +
           std::chrono::duration_cast<time_point::duration>(std::chrono::duration<double>(time));
  }

  double time = 0;            // seconds
  std::uint64_t fetched = 0;  // bytes over the network
  std::uint64_t largest = 0;  // bytes of the largest range that was assigned
  std::uint64_t requests = 0;
  bool strayed = false;  // a byte outside the missing ranges was fetched
  range_plan plan;
  std::vector<int> written;  // number of times that each block was written

 private:
  struct connection {
    bool is_busy = false;
    double answers_at = 0;  // seconds
    double credit = 0;      // received bytes that are not yet counted
  };
  bool is_receiving(std::size_t i) const {
    return connections_[i].is_busy && time >= connections_[i].answers_at;
  }

  void ask(std::size_t i) {
    auto& range = plan[i];
    const auto asked = plan.request(i, now());
    // The first request resolves the file's address.
    if (++requests == 1) plan.address_found(i, now());
    largest = (std::max)(largest, asked.size());
    strayed = strayed || range.position % block != 0 || (range.end % block != 0 && range.end != size_) ||
              range.end > size_;
    connections_[i] = {true, time + network_.delay, 0};
  }
  void advance(std::size_t i, double bytes) {
    auto& range = plan[i];
    auto& mine = connections_[i];
    if (!mine.is_busy) {
      if (!plan.assign(i, now())) return;
      ask(i);
    }
    if (!range.is_wanted()) return finish(i);
    if (time < mine.answers_at) return;
    if (mine.credit == 0) plan.responded(i, now());
    mine.credit += bytes;
    const auto count = (std::min)(static_cast<std::uint64_t>(mine.credit), range.end - range.position);
    mine.credit -= static_cast<double>(count) - 1e-9;
    fetched += count;
    range.received += count;
    range.position = range.position + count;
    for (auto stored = plan.stored(i); stored < range.end; stored = plan.stored(i)) {
      const auto boundary = (std::min)((stored / chunk + 1) * chunk, range.end.load());
      if (range.position < boundary) break;
      for (auto each = stored / block; each < (boundary + block - 1) / block; ++each) {
        strayed = strayed || !wanted_[each];
        if (written[each]++ == 0) --missing_;
      }
      plan.stored(i, boundary);
    }
    if (!range.is_wanted()) finish(i);
  }
  void finish(std::size_t i) {
    plan.release(i);
    connections_[i].is_busy = false;
  }

  network network_;
  std::uint64_t size_;
  std::vector<int> wanted_;
  std::vector<connection> connections_;
  std::uint64_t missing_ = 0;
};

std::vector<byte_range> everything(std::uint64_t size) { return {{0, size}}; }

/// A call with its own settings.
struct call_of_a_test {
  wandb::settings configuration;
  std::atomic<bool> cancel{false};
  wandb::detail::call call{configuration, &cancel};
};

struct taker final : wandb::body_sink {
  bool start(const wandb::http_response&) override { return true; }
  bool write(std::string_view bytes) override {
    text += bytes;
    return true;
  }
  std::string text;
};

/// A partial file of pseudo-random content.
struct partial_of_a_test {
  explicit partial_of_a_test(std::uint64_t size) : content(size, '\0'), where(directory / "file") {
    std::mt19937_64 random(size);
    for (char& c : content) c = static_cast<char>(random());
    auto made = wandb::detail::partial_file::create(where, std::string(32, 'a'), size);
    REQUIRE(made.has_value());
    file = *std::move(made);
  }
  std::string_view part(std::uint64_t begin, std::uint64_t end) const {
    return std::string_view(content).substr(begin, end - begin);
  }
  std::string md5() const {
    wandb::detail::md5 hash;
    hash.update(content);
    return hash.finish();
  }

  support::temporary_directory directory;
  std::string content;
  wandb::detail::place where;
  std::unique_ptr<wandb::detail::partial_file> file;
};

wandb::url address(const std::string& text) { return wandb::url::parse(text).value(); }

wandb::http_response tagged(const char* tag) {
  wandb::http_response head;
  head.status = 206;
  if (tag != nullptr) head.headers = {{"ETag", tag}};
  return head;
}

}  // namespace

TEST_SUITE("range plan") {
  TEST_CASE("with random sizes, gaps, connections, rates and delays all missing bytes are fetched, few of "
            "them twice") {
    std::mt19937_64 random(1);
    for (int round = 0; round < 60; ++round) {
      CAPTURE(round);
      const std::size_t connections = 1 + random() % 16;
      const std::uint64_t size = 1 + random() % (200 * MiB);
      std::vector<byte_range> gaps;
      std::uint64_t wanted = 0;
      for (std::uint64_t begin = 0; begin < size;) {
        const auto end = (std::min)(size, begin + block * (1 + random() % 800));
        if (random() % 3 != 0) {
          gaps.push_back({begin, end});
          wanted += end - begin;
        }
        begin = (std::min)(size, end + block * (random() % 10));
      }
      simulation::network network;
      network.delay = static_cast<double>(random() % 200) / 1000;
      for (std::size_t i = 0; i < connections; ++i)
        network.paces.push_back(1e5 * static_cast<double>(1 + random() % 1000));
      simulation one(size, gaps, network);
      REQUIRE(one.run(3000));
      REQUIRE_FALSE(one.strayed);
      // Bytes fetched twice: less than two shares for each connection that lost a range, and the chunks in its buffer.
      REQUIRE(one.fetched <= wanted + connections * 2 * range_plan::smallest_share);
    }
  }

  TEST_CASE("equal connections finish together") {
    const std::uint64_t size = 1024 * MiB;
    simulation one(size, everything(size), {std::vector<double>(8, 20.0 * MiB), 0.01});
    REQUIRE(one.run(100));
    CHECK(one.time < 1.05 * 1024 / (8 * 20));
    CHECK(one.fetched == size);
    CHECK(*std::max_element(one.written.begin(), one.written.end()) == 1);
    CHECK(one.requests < 200);
  }

  TEST_CASE("one connection at a tenth of the others' rate costs no time") {
    const std::uint64_t size = 1024 * MiB;
    std::vector<double> paces(8, 20.0 * MiB);
    paces[0] = 2.0 * MiB;
    simulation one(size, everything(size), {paces, 0.01});
    REQUIRE(one.run(100));
    CHECK(one.time < 1.1 * 1024 / (7 * 20));
  }

  TEST_CASE("a stalled connection loses its range to the others") {
    const std::uint64_t size = 100 * MiB;
    for (const double halted : {0.0, 100.0, 10000.0}) {
      CAPTURE(halted);
      simulation one(size, everything(size), {{10.0 * MiB, halted, 10.0 * MiB, 10.0 * MiB}, 0.05});
      REQUIRE(one.run(10));
      CHECK(one.time < 1.4 * 100 / 30);
    }
  }

  TEST_CASE("with a delay of 0 to 1000 ms few requests are made, and it takes no longer than equal parts") {
    for (const double delay : {0.001, 0.05, 0.2, 1.0}) {
      for (const std::uint64_t size : {32 * MiB, 200 * MiB}) {
        for (const double pace : {20.0 * MiB, 200.0 * MiB}) {
          CAPTURE(delay);
          CAPTURE(size);
          CAPTURE(pace);
          const double link = 400.0 * MiB;
          simulation one(size, everything(size), {std::vector<double>(8, pace), delay, link});
          REQUIRE(one.run(100));
          // The time of a client that requests the size and then eight equal parts.
          const double equal_parts = 2 * delay + static_cast<double>(size) / (std::min)(8 * pace, link);
          CHECK(one.time <= 1.05 * equal_parts + 0.1);
          const double one_connection = delay + static_cast<double>(size) / (std::min)(pace, link);
          CHECK(one.time <= one_connection + 0.1);
          if (delay >= 0.2) CHECK(one.requests <= 16);
          CHECK(one.fetched <= size + size / 20);
        }
      }
    }
  }

  TEST_CASE("a connection that waits for its first byte keeps its range for as long as others had to wait") {
    range_plan plan(2, 16 * MiB, everything(16 * MiB));
    const time_point start = time_point{} + 1s;
    REQUIRE(plan.assign(0, start));
    (void)plan.request(0, start);
    plan.address_found(0, start);
    plan.responded(0, start + 1s);  // a delay of one second
    REQUIRE(plan.assign(1, start + 1s));
    (void)plan.request(1, start + 1s);
    plan[0].position = plan[0].end.load();
    plan[0].received = plan[0].position.load();
    plan.stored(0, plan[0].end);
    plan.measure(0.1);
    plan.release(0);
    while (plan.assign(0, start + 1s)) {  // only the waiting range is left to assign
      plan[0].position = plan[0].end.load();
      plan.stored(0, plan[0].end);
      plan.release(0);
    }
    CHECK_FALSE(plan.assign(0, start + 2s));
    CHECK_FALSE(plan.assign(0, start + 3s));
    REQUIRE(plan.assign(0, start + 4s));  // more than twice the delay of others: it counts as stalled
    CHECK(plan[1].is_taken_over());
    (void)plan.request(0, start + 4s);
    plan.release(1);
    CHECK_FALSE(plan.assign(1, start + 12s));  // after a takeover the next one comes four times as late
    CHECK(plan.assign(1, start + 14s));
  }

  TEST_CASE("ranges are assigned from the front, for the digest") {
    const std::uint64_t size = 512 * MiB;
    simulation one(size, everything(size), {std::vector<double>(4, 10.0 * MiB), 0.01});
    std::size_t widest = 0;
    REQUIRE(one.run(100, [&](simulation& now) {
      const auto first = std::find(now.written.begin(), now.written.end(), 0);
      const auto last =
          std::find_if(now.written.rbegin(), now.written.rend(), [](int times) { return times > 0; }).base();
      if (last > first) widest = (std::max)(widest, static_cast<std::size_t>(last - first));
    }));
    CHECK(widest * block <= 64 * MiB);
  }

  TEST_CASE("the other connections wait for the first response for a limited time") {
    range_plan plan(2, 64 * MiB, everything(64 * MiB));
    const time_point start = time_point{} + 1s;
    REQUIRE(plan.assign(0, start));
    CHECK_FALSE(plan.assign(1, start));
    (void)plan.request(0, start);
    CHECK_FALSE(plan.assign(1, start + 10s));  // the file's address is unknown
    plan.address_found(0, start + 10s);
    CHECK_FALSE(plan.assign(1, start + 10s));
    CHECK(plan.assign(1, start + 10s + range_plan::probe_time));
  }

  TEST_CASE("the rest of a released range is assigned next") {
    range_plan plan(2, 64 * MiB, everything(64 * MiB));
    const time_point start = time_point{} + 1s;
    REQUIRE(plan.assign(0, start));
    (void)plan.request(0, start);
    plan.responded(0, start);
    REQUIRE(plan.assign(1, start));
    const auto begin = plan[0].position.load(), end = plan[0].end.load();
    plan[0].position = begin + chunk + 5;
    plan.stored(0, begin + chunk);
    plan.release(0);
    plan.release(1);
    plan.stored(1, plan[1].end);
    REQUIRE(plan.assign(1, start));
    REQUIRE(plan.assign(0, start));
    CHECK((std::min)(plan[0].position, plan[1].position) == begin + chunk);
    CHECK((std::max)(plan[0].end, plan[1].end) >= end);
  }

  TEST_CASE("without ranges one connection fetches the whole file, and the others get none") {
    range_plan plan(3, 64 * MiB, everything(64 * MiB));
    const time_point start = time_point{} + 1s;
    for (std::size_t i = 0; i < 3; ++i) {
      REQUIRE(plan.assign(i, start));
      (void)plan.request(i, start);
      plan.responded(i, start);
    }
    plan[1].position = plan[1].position + 1000;
    CHECK(plan.use_whole(1));
    CHECK_FALSE(plan.use_whole(1));  // the whole file cannot be fetched either
    CHECK(plan.use_whole(0));        // too late: another connection fetches the whole file, and keeps it
    CHECK(plan[1].end == 64 * MiB);
    CHECK(plan[1].position == 0);
    CHECK(plan[1].end == 64 * MiB);
    CHECK_FALSE(plan[1].revoked);
    for (const std::size_t i : {std::size_t{0}, std::size_t{2}}) {
      CHECK(plan[i].is_taken_over());
      plan.release(i);
      CHECK_FALSE(plan.assign(i, start + 100s));
      CHECK(plan.request(i, start).size() == 0);
    }
    plan[1].position = 40 * MiB;
    CHECK(plan.request(1, start).begin == 0);  // the request is for the whole file
    plan.release(1);
    REQUIRE(plan.assign(0, start));
    CHECK(plan[0].position == 0);
    CHECK(plan[0].end == 64 * MiB);
  }

  TEST_CASE("parking always leaves one connection in use") {
    range_plan plan(3, 64 * MiB, everything(64 * MiB));
    CHECK(plan.park(0));
    CHECK(plan.park(2));
    CHECK_FALSE(plan.park(1));
    plan.unpark(0);
    CHECK(plan.park(1));
    CHECK_FALSE(plan.park(0));
  }

  TEST_CASE("without missing bytes no connection gets a range") {
    range_plan plan(2, 64 * MiB, {});
    CHECK_FALSE(plan.assign(0, time_point{} + 1s));
    CHECK_FALSE(plan.assign(1, time_point{} + 1s));
  }
}

TEST_SUITE("block table") {
  using wandb::detail::block_table;

  TEST_CASE("the frontier is the first missing block, in any order of arrival") {
    partial_of_a_test one(5 * block + 7);
    block_table table(*one.file);
    CHECK(table.missing().size() == 1);
    CHECK(table.missing().at(0).end == 5 * block + 7);
    REQUIRE(table.store(2 * block, one.part(2 * block, 4 * block)).has_value());
    CHECK(table.frontier() == 0);
    CHECK(table.present() == 2 * block);
    CHECK(table.missing().size() == 2);
    REQUIRE(table.store(0, one.part(0, 2 * block)).has_value());
    CHECK(table.frontier() == 4 * block);
    CHECK_FALSE(table.is_complete());
    REQUIRE(table.store(4 * block, one.part(4 * block, 5 * block + 7)).has_value());
    CHECK(table.is_complete());
    CHECK(table.frontier() == 5 * block + 7);
    CHECK(table.missing().empty());
    std::string got(one.content.size(), '\0');
    REQUIRE(one.file->content().read_at(0, got.data(), got.size()) == static_cast<std::int64_t>(got.size()));
    CHECK(got == one.content);
  }

  TEST_CASE("a partial block is recorded only at the end of the file") {
    partial_of_a_test one(2 * block + 100);
    block_table table(*one.file);
    REQUIRE(table.store(0, one.part(0, block + 10)).has_value());
    CHECK(table.present() == block);
    CHECK(one.file->has(0));
    CHECK_FALSE(one.file->has(1));
    REQUIRE(table.store(2 * block, one.part(2 * block, 2 * block + 100)).has_value());
    CHECK(table.present() == block + 100);
  }

  TEST_CASE("a block that arrives twice is written once") {
    partial_of_a_test one(2 * block);
    block_table table(*one.file);
    REQUIRE(table.store(0, one.part(0, block)).has_value());
    REQUIRE(table.store(0, std::string(2 * block, 'x')).has_value());
    std::string got(block, '\0');
    REQUIRE(one.file->content().read_at(0, got.data(), got.size()) == static_cast<std::int64_t>(got.size()));
    CHECK(got == one.part(0, block));
    CHECK(table.is_complete());
  }

  TEST_CASE("a thread that waits for the frontier wakes when it advances, and when the table is closed") {
    constexpr std::uint64_t count = 20;
    partial_of_a_test one((count + 1) * block);
    block_table table(*one.file);
    std::mutex mutex;
    std::condition_variable changed;
    std::uint64_t seen = 0, after_close = 0;
    std::thread waiter([&] {
      for (std::uint64_t n = 0; n < count; ++n) {
        const auto frontier = table.wait_beyond(n * block);
        const std::lock_guard<std::mutex> lock(mutex);
        seen = frontier;
        changed.notify_all();
      }
      after_close = table.wait_beyond(count * block);
    });
    // A block is stored when the thread has seen the one before, so that it waits in most of the rounds.
    for (std::uint64_t n = 0; n < count; ++n) {
      CHECK(table.store(n * block, one.part(n * block, (n + 1) * block)).has_value());
      std::unique_lock<std::mutex> lock(mutex);
      if (!changed.wait_for(lock, 20s, [&] { return seen == (n + 1) * block; })) break;
    }
    table.close();
    waiter.join();
    CHECK(seen == count * block);
    CHECK(after_close == count * block);
  }
}

TEST_SUITE("digest follower") {
  using wandb::detail::block_table;
  using wandb::detail::digest_follower;
  using wandb::detail::transfer_state;

  TEST_CASE("the digest is right for any order of the blocks") {
    for (const std::uint64_t size : {std::uint64_t{0}, std::uint64_t{1}, block, 9 * block + 3}) {
      CAPTURE(size);
      partial_of_a_test one(size);
      block_table table(*one.file);
      transfer_state state;
      digest_follower follower(*one.file, table, state);
      REQUIRE(follower.start());
      for (auto begin = size / block * block;; begin -= block) {
        REQUIRE(table.store(begin, one.part(begin, (std::min)(size, begin + block))).has_value());
        if (begin == 0) break;
      }
      while (!follower.wait(100ms)) {}
      follower.join();
      CHECK(follower.digest() == one.md5());
      CHECK(follower.hashed() == size);
      CHECK_FALSE(follower.failure().has_value());
    }
  }

  TEST_CASE("a stopped transfer has no digest") {
    partial_of_a_test one(4 * block);
    block_table table(*one.file);
    transfer_state state;
    digest_follower follower(*one.file, table, state);
    REQUIRE(follower.start());
    REQUIRE(table.store(0, one.part(0, block)).has_value());
    state.stop();
    table.close();
    follower.join();
    CHECK(follower.digest().empty());
  }

  TEST_CASE("a file that was truncated meanwhile is a disk_failure, and stops the transfer") {
    partial_of_a_test one(4 * block);
    block_table table(*one.file);
    transfer_state state;
    REQUIRE(table.store(0, one.content).has_value());
    std::filesystem::resize_file(one.file->where(), block);
    digest_follower follower(*one.file, table, state);
    REQUIRE(follower.start());
    follower.join();
    REQUIRE(follower.failure().has_value());
    CHECK(follower.failure()->code() == errc::disk_failure);
    CHECK(state.is_stopped());
  }
}

TEST_SUITE("transfer state") {
  using wandb::detail::transfer_state;

  TEST_CASE("the first failure is kept") {
    transfer_state state;
    CHECK_FALSE(state.wait(0ms));
    state.fail(error(errc::connection_failed, "first"));
    state.fail(error(errc::disk_failure, "second"));
    CHECK(state.is_stopped());
    CHECK(state.wait(0ms));
    REQUIRE(state.failure().has_value());
    CHECK(std::string(state.failure()->what()) == "first");
  }

  TEST_CASE("a failure after the last byte is ignored") {
    transfer_state state;
    state.complete();
    state.fail(error(errc::connection_failed, "late"));
    CHECK(state.is_complete());
    CHECK_FALSE(state.is_stopped());
    CHECK_FALSE(state.failure().has_value());
  }
}

TEST_SUITE("file location") {
  using wandb::detail::file_location;

  const char* const at_service = "https://service/files/a";
  const char* const at_storage = "https://storage/a?sig=1";

  TEST_CASE("one connection resolves the address; the others wait and get the final address") {
    for (int round = 0; round < 50; ++round) {  // in most rounds the second thread comes before the address
      call_of_a_test one;
      file_location location(address(at_service), wandb::url(),
                             [](wandb::detail::call&) -> wandb::result<wandb::url> {
                               FAIL("nothing has expired");
                               return wandb::url{};
                             });
      const auto first = location.acquire(one.call);
      REQUIRE(first.has_value());
      CHECK(first->is_resolving);
      CHECK(first->address.str() == at_service);
      std::string second;
      std::atomic<bool> is_running{false};
      std::thread other([&] {
        is_running = true;
        second = location.acquire(one.call).value().address.str();
      });
      while (!is_running) std::this_thread::yield();
      std::this_thread::yield();
      location.found(*first, address(at_storage));
      other.join();
      CHECK(second == at_storage);
      location.release(*first);
      CHECK(location.acquire(one.call).value().address.str() == at_storage);
    }
  }

  TEST_CASE("if a connection fails to resolve the address, another one tries") {
    call_of_a_test one;
    file_location location(address(at_service), wandb::url(), {});
    const auto first = location.acquire(one.call);
    location.release(*first);
    const auto second = location.acquire(one.call);
    REQUIRE(second.has_value());
    CHECK(second->is_resolving);
  }

  TEST_CASE("an expired address is renewed once for all; a late refusal of the old address does not renew") {
    call_of_a_test one;
    int asked = 0;
    file_location location(address(at_service), wandb::url(),
                           [&](wandb::detail::call&) -> wandb::result<wandb::url> {
                             return address("https://service/files/a?" + std::to_string(++asked));
                           });
    const auto resolving = location.acquire(one.call);
    location.found(*resolving, address(at_storage));
    const auto first = location.acquire(one.call), second = location.acquire(one.call);
    CHECK(location.renew(*first));
    const auto renewed = location.acquire(one.call);
    REQUIRE(renewed.has_value());
    CHECK(renewed->address.str() == "https://service/files/a?1");
    CHECK(renewed->is_resolving);
    location.found(*renewed, address("https://storage/b"));
    CHECK(location.renew(*second));
    CHECK(location.acquire(one.call).value().address.str() == "https://storage/b");
    CHECK(asked == 1);
  }

  TEST_CASE("after three refused new addresses there is no fourth; a response resets the count") {
    for (const bool is_served : {false, true}) {
      CAPTURE(is_served);
      call_of_a_test one;
      int asked = 0;
      file_location location(address(at_service), wandb::url(),
                             [&](wandb::detail::call&) -> wandb::result<wandb::url> {
                               ++asked;
                               return address(at_service);
                             });
      for (int i = 0; i <= file_location::max_renewals; ++i) {
        const auto lease = location.acquire(one.call);
        REQUIRE(lease.has_value());
        if (is_served) location.served(*lease);
        CHECK(location.renew(*lease) == (is_served || i < file_location::max_renewals));
      }
      CHECK(asked == file_location::max_renewals);
      CHECK(location.was_served() == is_served);
    }
  }

  TEST_CASE("after a failed connection the redirects are followed again, without a query") {
    call_of_a_test one;
    file_location location(address(at_service), wandb::url(), {});
    const auto resolving = location.acquire(one.call);
    location.found(*resolving, address(at_storage));
    location.forget(*location.acquire(one.call));
    const auto next = location.acquire(one.call);
    REQUIRE(next.has_value());
    CHECK(next->is_resolving);
    CHECK(next->address.str() == at_service);
  }

  TEST_CASE("a failed renewal returns its error, and the next connection asks again") {
    call_of_a_test one;
    int asked = 0;
    file_location location(address(at_service), wandb::url(),
                           [&](wandb::detail::call&) -> wandb::result<wandb::url> {
                             if (++asked == 1) return error(errc::connection_failed, "no answer");
                             return address(at_storage);
                           });
    CHECK(location.renew(*location.acquire(one.call)));
    const auto failed = location.acquire(one.call);
    REQUIRE_FALSE(failed.has_value());
    CHECK(failed.error().code() == errc::connection_failed);
    CHECK(location.acquire(one.call).value().address.str() == at_storage);
  }

  TEST_CASE("a cancellation ends the wait for another connection") {
    call_of_a_test one;
    file_location location(address(at_service), wandb::url(), {});
    REQUIRE(location.acquire(one.call).has_value());
    one.cancel = true;
    const auto second = location.acquire(one.call);
    REQUIRE_FALSE(second.has_value());
    CHECK(second.error().code() == errc::cancelled);
  }
}

TEST_SUITE("entity pin") {
  using wandb::detail::entity_pin;

  TEST_CASE("the first tag is kept; responses without a tag are accepted") {
    entity_pin pin;
    CHECK(pin.strong_tag().empty());
    CHECK(pin.accept(tagged(nullptr)));
    CHECK(pin.accept(tagged("\"a\"")));
    CHECK(pin.accept(tagged(nullptr)));
    CHECK(pin.strong_tag() == "\"a\"");
    CHECK_FALSE(pin.accept(tagged("\"b\"")));
    pin.reset();
    CHECK(pin.accept(tagged("\"b\"")));
    pin.ignore();
    CHECK(pin.accept(tagged("\"c\"")));
    CHECK(pin.strong_tag().empty());
  }

  TEST_CASE("a weak tag is compared, but not sent as If-Range") {
    entity_pin pin;
    CHECK(pin.accept(tagged("W/\"a\"")));
    CHECK(pin.strong_tag().empty());
    CHECK_FALSE(pin.accept(tagged("\"a\"")));
  }
}

TEST_SUITE("retry clock") {
  using wandb::detail::backoff;
  using wandb::detail::retry_clock;

  TEST_CASE("the clock expires only after a failed try") {
    call_of_a_test one;
    one.call.set_reached();
    one.configuration.retry_timeout = 0ms;
    retry_clock clock(one.call);
    CHECK_FALSE(clock.expired().has_value());
    (void)clock.failed(error(errc::http_failure, "busy", 503));
    REQUIRE(clock.expired().has_value());
    CHECK(clock.expired()->http_status() == 503);
    CHECK(std::string(clock.expired()->what()).find("gave up after 1 try") != std::string::npos);
    one.configuration.low_speed = 1;
    clock.progressed(1000 * 1000);
    CHECK_FALSE(clock.expired().has_value());
  }

  TEST_CASE("connections share the time of one clock") {
    call_of_a_test one;
    one.call.set_reached();
    one.configuration.retry_timeout = 1h;
    retry_clock clock(one.call);
    backoff first(one.call, clock), second(one.call, clock);
    error failure(errc::http_failure, "busy", 503);
    REQUIRE(first.after(failure).has_value());
    REQUIRE(second.after(failure).has_value());
    failure.retry_after(2h);
    const auto end = first.after(failure);
    REQUIRE_FALSE(end.has_value());
    CHECK(std::string(end.error().what()).find("gave up after 3 tries") != std::string::npos);
  }

  TEST_CASE("progress of low_speed since the last reset starts the time again") {
    call_of_a_test one;
    one.call.set_reached();
    one.configuration.retry_timeout = 0ms;
    retry_clock clock(one.call);
    const error failure(errc::connection_failed, "x");
    const auto expires_after = [&](std::uint64_t bytes, std::uint64_t low_speed) {
      (void)clock.failed(failure);
      one.configuration.low_speed = low_speed;
      clock.progressed(bytes);
      return clock.expired().has_value();
    };
    for (int n = 0; n < 200; ++n) {
      CHECK(expires_after(0, 1));
      CHECK(expires_after(1, std::uint64_t{1} << 50));
      CHECK_FALSE(expires_after(1000 * 1000, 1));
    }
  }
}

TEST_SUITE("backoff") {
  using wandb::detail::backoff;
  using wandb::detail::retry_clock;

  TEST_CASE("permanent failures are given up at once") {
    call_of_a_test one;
    retry_clock time(one.call);
    backoff tries(one.call, time);
    for (const auto& failure :
         {error(errc::http_failure, "x", 400), error(errc::http_failure, "x", 404),
          error(errc::http_failure, "x", 501), error(errc::not_authenticated, "x", 401),
          error(errc::permission_denied, "x", 403), error(errc::protocol_violation, "x"),
          error(errc::checksum_mismatch, "x"), error(errc::disk_failure, "x"),
          error::permanent(errc::connection_failed, "x")}) {
      CAPTURE(failure.http_status());
      const auto wait = tries.after(failure);
      REQUIRE_FALSE(wait.has_value());
      CHECK(wait.error().code() == failure.code());
      CHECK(std::string(wait.error().what()) == "x");
    }
  }

  TEST_CASE("waits are random, with an upper bound that grows to half a minute") {
    call_of_a_test one;
    one.call.set_reached();
    one.configuration.retry_timeout = 1h;
    for (const int status : {0, 408, 429, 500, 502, 503, 504, 599}) {
      CAPTURE(status);
      const error failure(status == 0 ? errc::connection_failed : errc::http_failure, "x", status);
      std::int64_t longest = 0, shortest = 1000000;
      for (int round = 0; round < 200; ++round) {
        retry_clock time(one.call);
        backoff tries(one.call, time);
        for (int n = 0; n < 9; ++n) {
          const auto wait = tries.after(failure);
          REQUIRE(wait.has_value());
          REQUIRE(wait->count() <= (std::min)(30000, 500 << n));
          if (n == 8)
            longest = (std::max)(longest, wait->count()), shortest = (std::min)(shortest, wait->count());
        }
      }
      CHECK(longest > 15000);
      CHECK(shortest < 15000);
    }
  }

  TEST_CASE("Retry-After is honoured, unless it exceeds the remaining time") {
    call_of_a_test one;
    one.call.set_reached();
    retry_clock time(one.call);
    backoff tries(one.call, time);
    error failure(errc::http_failure, "busy", 429);
    failure.retry_after(60s);
    auto wait = tries.after(failure);
    REQUIRE(wait.has_value());
    CHECK(*wait >= 60s);
    failure.retry_after(one.configuration.retry_timeout);
    wait = tries.after(failure);
    REQUIRE_FALSE(wait.has_value());
    CHECK(wait.error().code() == errc::http_failure);
    CHECK(wait.error().http_status() == 429);
    CHECK(std::string(wait.error().what()).find("the server asks to wait 300 s") != std::string::npos);
    CHECK(std::string(wait.error().what()).find("gave up after 2 tries") != std::string::npos);
  }

  TEST_CASE("if no server was reached, retries end after connect_timeout") {
    call_of_a_test one;
    retry_clock time(one.call);
    backoff tries(one.call, time);
    error failure(errc::connection_failed, "refused");
    failure.retry_after(one.configuration.connect_timeout + 1s);
    CHECK_FALSE(tries.after(failure).has_value());
    one.call.set_reached();
    CHECK(tries.after(failure).has_value());
  }

  TEST_CASE("a wait beyond the limit is shortened to the limit") {
    for (int round = 0; round < 200; ++round) {
      call_of_a_test one;
      one.call.set_reached();
      one.configuration.retry_timeout = 400ms;  // the first wait is up to 500 ms
      retry_clock time(one.call);
      backoff tries(one.call, time);
      const auto wait = tries.after(error(errc::connection_failed, "x"));
      REQUIRE(wait.has_value());
      REQUIRE(*wait <= 400ms);
    }
  }

  TEST_CASE(
      "after a try that brought a block there is no wait, and the next upper bound is the shortest again") {
    call_of_a_test one;
    one.call.set_reached();
    one.configuration.retry_timeout = 1h;
    retry_clock time(one.call);
    backoff tries(one.call, time);
    const error failure(errc::connection_failed, "x");
    for (int n = 0; n < 200; ++n) {
      const auto wait = tries.after(failure);
      REQUIRE(wait.has_value());
      REQUIRE(wait->count() <= 500);
      CHECK(tries.failures() == 1);
      CHECK_FALSE(tries.retries_at_once(failure, wandb::detail::partial_file::block - 1));
      CHECK_FALSE(
          tries.retries_at_once(error(errc::protocol_violation, "x"), wandb::detail::partial_file::block));
      CHECK(tries.failures() == 1);
      CHECK(tries.retries_at_once(failure, wandb::detail::partial_file::block));
      CHECK(tries.failures() == 0);
    }
    one.configuration.retry_timeout = 0ms;
    CHECK_FALSE(tries.retries_at_once(failure, wandb::detail::partial_file::block));
    CHECK_FALSE(tries.after(failure).has_value());
  }

  TEST_CASE("a cancellation takes precedence") {
    call_of_a_test one;
    one.cancel = true;
    retry_clock time(one.call);
    backoff tries(one.call, time);
    const auto wait = tries.after(error(errc::connection_failed, "x"));
    REQUIRE_FALSE(wait.has_value());
    CHECK(wait.error().code() == errc::cancelled);
  }
}

TEST_SUITE("block cache") {
  using wandb::detail::block_cache;

  TEST_CASE("a failure is that of every thread that waits for a block of the claim") {
    block_cache cache;
    const auto mine = cache.begin(0, 1, 10);
    REQUIRE(mine.blocks.size() >= 2);
    CHECK_FALSE(mine.is_awaited);
    const auto other = cache.begin(1, 1, 10);
    REQUIRE(other.is_awaited);
    REQUIRE(other.state == mine.state);
    CHECK_FALSE(cache.wait(*other.state));
    mine.put(0, std::string(block_cache::block, 'x'));
    cache.finish(mine, block_cache::block, error(errc::connection_failed, "cut"));
    CHECK(cache.wait(*other.state));
    REQUIRE(other.state->failure.has_value());
    CHECK(other.state->failure->code() == errc::connection_failed);
    char byte = 0;
    CHECK(cache.copy(5, &byte, 1) == 1);  // the first block has arrived
    CHECK(byte == 'x');
    CHECK(cache.copy(block_cache::block, &byte, 1) == 0);
    const auto again = cache.begin(1, 1, 10);  // a later call tries again
    CHECK_FALSE(again.is_awaited);
    cache.finish(again, 2 * block_cache::block);
    CHECK_FALSE(again.state->failure.has_value());
    CHECK(cache.begin(1, 1, 10).state == nullptr);  // present
  }
}

TEST_SUITE("pace") {
  using wandb::detail::guarded_sink;

  TEST_CASE("the time before the head does not count for the body's rate") {
    // If a slow machine takes longer for the body than the limit, the test is repeated.
    bool was_interrupted = true;
    for (int round = 0; round < 20 && was_interrupted; ++round) {
      call_of_a_test one;
      one.configuration.connect_timeout = 60s;
      one.configuration.idle_timeout = 500ms;
      taker into;
      guarded_sink guard(one.call, into, "GET x");
      std::this_thread::sleep_for(
          700ms);  // longer than the limit for a body, shorter than the limit for a head
      REQUIRE_FALSE(guard.cancelled());
      wandb::http_response head;
      head.status = 200;
      const auto begin = std::chrono::steady_clock::now();
      const bool is_taken = guard.start(head) && guard.write("a");
      was_interrupted = std::chrono::steady_clock::now() - begin >= 400ms;
      if (was_interrupted) continue;
      CHECK(is_taken);
      CHECK(into.text == "a");
    }
    CHECK_FALSE(was_interrupted);
  }

  TEST_CASE("a body slower than the limit is dropped with a transient error, also while no bytes arrive") {
    call_of_a_test one;
    one.configuration.idle_timeout = 20ms;
    taker into;
    guarded_sink guard(one.call, into, "GET x");
    wandb::http_response head;
    head.status = 206;
    REQUIRE(guard.start(head));
    std::this_thread::sleep_for(40ms);
    CHECK_FALSE(guard.write("a"));
    CHECK(guard.cancelled());
    const auto why = guard.verdict(wandb::error(wandb::errc::cancelled, "stopped"));
    REQUIRE(why.has_value());
    CHECK(why->code() == wandb::errc::connection_failed);
    CHECK(why->is_transient());
    CHECK(std::string(why->what()).find("less than 1.0 KiB a second") != std::string::npos);
  }
}
