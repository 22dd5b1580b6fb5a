// Who fetches which bytes, how long one goes on trying, and how slow a peer may be: the engine's rules,
// without a network.
//
// These classes stand in the implementation part of the header: this file brings it along, inline, in the inline
// namespace of that build mode. The rest of the program is not touched by that.
#undef WANDB_RESTORE_SPLIT
#include "wandb_restore.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace {

using namespace std::chrono_literals;
using wandb::detail::byte_range;
using wandb::detail::range_plan;
constexpr std::uint64_t MiB = 1024 * 1024;
constexpr std::uint64_t block = range_plan::block;
constexpr std::uint64_t chunk = 4 * block;  // what a connection has before it writes

/// A download on a clock of its own: each connection brings `pace` bytes a second.
class simulation {
 public:
  simulation(std::uint64_t size, std::vector<byte_range> gaps, std::vector<double> paces)
      : size_(size), plan(paces.size(), gaps), written_((size + block - 1) / block, 0),
        wanted_(written_.size(), 0), paces_(std::move(paces)) {
    for (std::size_t me = 0; me < paces_.size(); ++me)
      plan[me].delay = 0.05;  // seconds: a server that is not near
    for (const auto& gap : gaps)
      for (auto i = gap.begin / block; i < (gap.end + block - 1) / block; ++i) wanted_[i] = 1, ++missing_;
  }

  /// Until everything is there, or `limit` seconds. True: it is.
  bool run(double limit, const std::function<void(simulation&)>& each_step = {}) {
    constexpr double step = 0.01;
    for (int ticks = 0; missing_ > 0 && time < limit; ++ticks) {
      for (std::size_t me = 0; me < paces_.size(); ++me) advance(me, paces_[me] * step);
      time += step;
      if (ticks % 10 == 9) plan.measure(10 * step);
      if (each_step) each_step(*this);
    }
    return missing_ == 0;
  }

  double time = 0;            // seconds
  std::uint64_t fetched = 0;  // bytes over the network
  std::uint64_t largest = 0;  // piece that was given out
  std::uint64_t requests = 0;
  bool strayed = false;  // a byte was fetched that nobody wanted

 private:
  std::uint64_t size_;

 public:
  range_plan plan;
  std::vector<int> written_;  // times, for each block

 private:
  void advance(std::size_t me, double bytes) {
    auto& mine = plan[me];
    for (;;) {
      if (!mine.busy) {
        if (!plan.take(me)) return;
        ++requests;
        largest = (std::max)(largest, mine.end - mine.at);
        strayed = strayed || mine.at % block != 0 || (mine.end % block != 0 && mine.end != size_) ||
                  mine.end > size_;
      }
      if (mine.at >= mine.end) {
        plan.done(me);
        continue;
      }
      credit(me) += bytes;
      bytes = 0;
      const auto count = (std::min)(static_cast<std::uint64_t>(credit(me)), mine.end - mine.at);
      if (count == 0) return;
      credit(me) -= static_cast<double>(count);
      fetched += count;
      mine.received += count;
      mine.at = mine.at + count;
      while (mine.flushed < mine.end) {
        const auto boundary = (std::min)((mine.flushed / chunk + 1) * chunk, mine.end.load());
        if (mine.at < boundary) break;
        for (auto i = mine.flushed / block; i < (boundary + block - 1) / block; ++i) {
          strayed = strayed || !wanted_[i];
          if (written_[i]++ == 0) --missing_;
        }
        mine.flushed = boundary;
      }
    }
  }
  double& credit(std::size_t me) {
    credits_.resize(paces_.size());
    return credits_[me];
  }
  std::vector<int> wanted_;
  std::vector<double> paces_, credits_;
  std::uint64_t missing_ = 0;
};

std::vector<byte_range> everything(std::uint64_t size) { return {{0, size}}; }

/// A call with settings of its own.
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

}  // namespace

TEST_SUITE("range plan") {
  TEST_CASE("random sizes, gaps, connections and paces: everything is fetched, hardly anything twice, "
            "nothing else") {
    std::mt19937_64 random(1);
    for (int round = 0; round < 60; ++round) {
      CAPTURE(round);
      const std::size_t connections = 1 + random() % 16;
      const std::uint64_t size = 1 + random() % (200 * MiB);
      std::vector<byte_range> gaps;
      std::uint64_t wanted = 0;
      for (std::uint64_t at = 0; at < size;) {
        const auto end = (std::min)(size, at + block * (1 + random() % 800));
        if (random() % 3 != 0) {
          gaps.push_back({at, end});
          wanted += end - at;
        }
        at = (std::min)(size, end + block * (random() % 10));
      }
      std::vector<double> paces;
      for (std::size_t i = 0; i < connections; ++i)
        paces.push_back(1e5 * static_cast<double>(1 + random() % 1000));
      simulation one(size, gaps, paces);
      REQUIRE(one.run(3000));
      REQUIRE_FALSE(one.strayed);
      REQUIRE(one.largest <= (connections == 1 ? size : range_plan::largest_piece));
      // What is fetched twice: less than two shares for each connection that was left behind, and chunks
      // begun.
      REQUIRE(one.fetched <= wanted + connections * 2 * range_plan::smallest_share);
    }
  }

  TEST_CASE("equal connections end together") {
    const std::uint64_t size = 1024 * MiB;
    simulation one(size, everything(size), std::vector<double>(8, 20.0 * MiB));
    REQUIRE(one.run(100));
    CHECK(one.time < 1.05 * 1024 / (8 * 20));
    CHECK(one.fetched == size);
    CHECK(*std::max_element(one.written_.begin(), one.written_.end()) == 1);
    CHECK(one.requests < 400);
  }

  TEST_CASE("one connection at a tenth of the others costs no time") {
    const std::uint64_t size = 1024 * MiB;
    std::vector<double> paces(8, 20.0 * MiB);
    paces[0] = 2.0 * MiB;
    simulation one(size, everything(size), paces);
    REQUIRE(one.run(100));
    CHECK(one.time < 1.1 * 1024 / (7 * 20));
  }

  TEST_CASE("a connection that comes to a halt loses its range to the others") {
    const std::uint64_t size = 100 * MiB;
    for (const double halted : {0.0, 100.0, 10000.0}) {
      CAPTURE(halted);
      simulation one(size, everything(size), {10.0 * MiB, halted, 10.0 * MiB, 10.0 * MiB});
      REQUIRE(one.run(10));
      CHECK(one.time < 1.4 * 100 / 30);
    }
  }

  TEST_CASE("pieces come from the front, so that the digest can follow") {
    const std::uint64_t size = 512 * MiB;
    simulation one(size, everything(size), std::vector<double>(4, 10.0 * MiB));
    std::size_t widest = 0;
    REQUIRE(one.run(100, [&](simulation& now) {
      const auto first = std::find(now.written_.begin(), now.written_.end(), 0);
      const auto last = std::find_if(now.written_.rbegin(), now.written_.rend(), [](int times) {
                          return times > 0;
                        }).base();
      if (last > first) widest = (std::max)(widest, static_cast<std::size_t>(last - first));
    }));
    CHECK(widest * block <= 4 * range_plan::largest_piece);
  }

  TEST_CASE("what a connection gives back is taken next") {
    range_plan plan(2, everything(64 * MiB));
    REQUIRE(plan.take(0));
    REQUIRE(plan.take(1));
    const auto begin = plan[0].at.load(), end = plan[0].end.load();
    plan[0].at = begin + chunk + 5;
    plan[0].flushed = begin + chunk;
    plan.give_back(0);
    CHECK_FALSE(plan[0].busy);
    plan.done(1);
    REQUIRE(plan.take(1));
    CHECK(plan[1].at == begin + chunk);
    CHECK(plan[1].end <= end);
  }

  TEST_CASE("the whole for one: the others' ends are taken away") {
    range_plan plan(3, everything(64 * MiB));
    for (std::size_t i = 0; i < 3; ++i) REQUIRE(plan.take(i));
    plan[1].at = plan[1].at + 1000;
    plan.take_whole(1, 64 * MiB);
    CHECK(plan[1].at == 0);
    CHECK(plan[1].end == 64 * MiB);
    CHECK_FALSE(plan[1].revoked);
    for (const std::size_t i : {std::size_t{0}, std::size_t{2}}) {
      CHECK(plan[i].revoked);
      CHECK(plan[i].at >= plan[i].end);
    }
  }

  TEST_CASE("the whole for one is not shared: a range of it would bring the whole again") {
    range_plan plan(2, everything(64 * MiB));
    REQUIRE(plan.take(0));
    REQUIRE(plan.take(1));
    plan.take_whole(0, 64 * MiB);
    plan.done(1);
    CHECK_FALSE(plan.take(1));
    plan[0].at = 40 * MiB;
    plan[0].flushed = 40 * MiB;
    plan.give_back(0);
    REQUIRE(plan.take(1));
    CHECK(plan[1].at == 40 * MiB);
    CHECK(plan[1].end == 64 * MiB);
  }

  TEST_CASE("nothing to fetch: nobody gets anything") {
    range_plan plan(2, {});
    CHECK_FALSE(plan.take(0));
    CHECK_FALSE(plan.take(1));
  }
}

TEST_SUITE("backoff") {
  using wandb::errc;
  using wandb::error;
  using wandb::detail::backoff;

  TEST_CASE("what cannot get better is given up at once") {
    call_of_a_test one;
    backoff tries(one.call);
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

  TEST_CASE("waits grow up to half a minute, at random from nothing on") {
    call_of_a_test one;
    one.call.reached = true;
    one.configuration.retry_timeout = 1h;
    for (const int status : {0, 408, 429, 500, 502, 503, 504, 599}) {
      CAPTURE(status);
      const error failure(status == 0 ? errc::connection_failed : errc::http_failure, "x", status);
      std::int64_t longest = 0, shortest = 1000000;
      for (int round = 0; round < 200; ++round) {
        backoff tries(one.call);
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

  TEST_CASE("Retry-After is kept to, unless it is too long to wait for") {
    call_of_a_test one;
    one.call.reached = true;
    backoff tries(one.call);
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
    CHECK(std::string(wait.error().what()).find("it asks to wait 300 s") != std::string::npos);
    CHECK(std::string(wait.error().what()).find("gave up after 2 tries") != std::string::npos);
  }

  TEST_CASE("where nothing was ever reached, trying ends after connect_timeout") {
    call_of_a_test one;
    backoff tries(one.call);
    error failure(errc::connection_failed, "refused");
    failure.retry_after(one.configuration.connect_timeout + 1s);
    CHECK_FALSE(tries.after(failure).has_value());
    one.call.reached = true;
    CHECK(tries.after(failure).has_value());
  }

  TEST_CASE("a wait that would go beyond the limit is shortened to it: the time that was promised is used") {
    for (int round = 0; round < 200; ++round) {
      call_of_a_test one;
      one.call.reached = true;
      one.configuration.retry_timeout = 10ms;
      backoff tries(one.call);
      const auto wait = tries.after(error(errc::connection_failed, "x"));
      REQUIRE(wait.has_value());
      REQUIRE(*wait <= 10ms);
    }
  }

  TEST_CASE("progress resets the count: as much as low_speed asks for, in all the time since") {
    call_of_a_test one;
    one.call.reached = true;
    one.configuration.retry_timeout = 1h;
    one.configuration.low_speed = 1;
    backoff tries(one.call);
    REQUIRE(tries.after(error(errc::connection_failed, "x")).has_value());
    tries.progressed(0);
    CHECK(tries.failures() == 1);
    one.configuration.low_speed = std::uint64_t{1} << 50;
    tries.progressed(1);
    CHECK(tries.failures() == 1);
    one.configuration.low_speed = 1;
    for (int n = 0; n < 200; ++n) {
      tries.progressed(1000 * 1000);
      CHECK(tries.failures() == 0);
      const auto wait = tries.after(error(errc::connection_failed, "x"));
      REQUIRE(wait.has_value());
      REQUIRE(wait->count() <= 500);
    }
  }

  TEST_CASE("cancelled comes first") {
    call_of_a_test one;
    one.cancel = true;
    backoff tries(one.call);
    const auto wait = tries.after(error(errc::connection_failed, "x"));
    REQUIRE_FALSE(wait.has_value());
    CHECK(wait.error().code() == errc::cancelled);
  }
}

TEST_SUITE("pace") {
  using wandb::detail::guarded_sink;

  TEST_CASE("the time until the head came does not count as the body's") {
    call_of_a_test one;
    one.configuration.connect_timeout = 10s;
    one.configuration.idle_timeout = 500ms;
    taker into;
    guarded_sink guard(one.call, into, "GET x");
    std::this_thread::sleep_for(700ms);  // longer than a body may idle, shorter than an answer may take
    REQUIRE_FALSE(guard.cancelled());
    wandb::http_response head;
    head.status = 200;
    CHECK(guard.start(head));
    CHECK(guard.write("a"));
    CHECK(into.text == "a");
  }

  TEST_CASE("a body slower than the limit is dropped, whoever looks, and the error is a transient one") {
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
