// What the sources of one program of the matrix share. They are written for every mode of the header: nothing here throws,
// and no type information is asked for.
#ifndef WANDB_RESTORE_TESTS_MATRIX_SHARED_HPP
#define WANDB_RESTORE_TESTS_MATRIX_SHARED_HPP

#include "wandb_restore.hpp"

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <string>
#include <string_view>
#include <utility>

namespace matrix {

/// Says what does not hold, and goes on. Both are the program's, whichever of its sources includes this.
inline std::atomic<int> failures{0};
inline void check(bool holds, const char* what, const std::string& detail = "") {
  if (holds) return;
  ++failures;
  std::fprintf(stderr, "FAILED: %s%s%s\n", what, detail.empty() ? "" : ": ", detail.c_str());
}

/// The byte at an offset of content that takes no memory, whatever its size.
inline char byte_at(std::uint64_t offset) {
  const std::uint64_t mixed = (offset + 1) * 0x9e3779b97f4a7c15u;
  return static_cast<char>(mixed >> 56);
}

struct stored_file {
  std::uint64_t size = 0;
  std::string facts = {};  // more fields of the answer, as JSON
};

/// A service in memory: one run, whose files are all made of `byte_at`.
class memory_transport {
 public:
  struct state {
    std::map<std::string, stored_file> files;
    std::string answer;  // given instead of the truth, where it is not empty
    std::atomic<int> questions{0}, fetches{0};
    std::atomic<std::uint64_t> bytes{0};
  };
  explicit memory_transport(state& of) : state_(&of) {}

  wandb::result<wandb::http_response> send(const wandb::http_request& request, wandb::body_sink& sink) {
    return request.method == "POST" ? answer(request, sink) : serve(request, sink);
  }

 private:
  wandb::result<wandb::http_response> answer(const wandb::http_request& request, wandb::body_sink& sink) {
    ++state_->questions;
    std::string edges;
    for (const auto& [name, file] : state_->files) {
      // A question for one file has its name in a list.
      if (request.body.find("\"fileNames\":[\"") != std::string::npos &&
          request.body.find("\"fileNames\":[\"" + name + "\"]") == std::string::npos) {
        continue;
      }
      edges += std::string(edges.empty() ? "" : ",") + "{\"node\":{\"name\":\"" + name +
               "\",\"url\":\"http://memory.test/" + name + "\",\"sizeBytes\":" + std::to_string(file.size) +
               file.facts + "}}";
    }
    const std::string truth = "{\"data\":{\"project\":{\"run\":{\"files\":{\"edges\":[" + edges + "]}}}}}";
    const std::string& text = state_->answer.empty() ? truth : state_->answer;
    wandb::http_response head;
    head.status = 200;
    head.headers.emplace_back("Content-Length", std::to_string(text.size()));
    if (!sink.start(head) || !sink.write(text)) return stopped();
    return head;
  }

  wandb::result<wandb::http_response> serve(const wandb::http_request& request, wandb::body_sink& sink) {
    ++state_->fetches;
    const auto found = state_->files.find(request.url.substr(request.url.rfind('/') + 1));
    if (found == state_->files.end())
      return wandb::error(wandb::errc::connection_failed, "there is no such address");
    const std::uint64_t size = found->second.size;
    std::uint64_t at = 0, end = size;
    wandb::http_response head;
    head.status = 200;
    for (const auto& [name, value] : request.headers) {
      if (name != "Range") continue;
      const auto dash = value.find('-');
      at = std::strtoull(value.c_str() + 6, nullptr, 10);  // behind "bytes="
      if (dash + 1 < value.size()) end = std::strtoull(value.c_str() + dash + 1, nullptr, 10) + 1;
      head.status = 206;
      head.headers.emplace_back("Content-Range", "bytes " + std::to_string(at) + '-' +
                                                     std::to_string(end - 1) + '/' + std::to_string(size));
    }
    head.headers.emplace_back("Content-Length", std::to_string(end - at));
    if (!sink.start(head)) return stopped();
    std::string buffer;
    while (at < end) {
      if (request.cancelled()) return stopped();
      for (buffer.clear(); at < end && buffer.size() < 60000; ++at) buffer += byte_at(at);
      state_->bytes += buffer.size();
      if (!sink.write(buffer)) return stopped();
    }
    return head;
  }
  static wandb::error stopped() { return wandb::error(wandb::errc::cancelled, "stopped"); }

  state* state_;
};

/// An empty folder of this program's own, in the working directory; gone in the end.
class scratch {
 public:
  explicit scratch(const std::string& name) : where(std::filesystem::absolute("scratch-" + name)) {
    clear(true);
  }
  scratch(const scratch&) = delete;
  scratch& operator=(const scratch&) = delete;
  ~scratch() { clear(false); }
  const std::filesystem::path where;

  /// Names in it, hidden ones too.
  std::size_t count() const {
    std::error_code ignored;
    std::size_t number = 0;
    for (std::filesystem::directory_iterator at(where, ignored), end; at != end; at.increment(ignored))
      ++number;
    return number;
  }

 private:
  void clear(bool make) const {
    std::error_code ignored;
    std::filesystem::remove_all(where, ignored);
    if (make) std::filesystem::create_directories(where, ignored);
  }
};

/// Settings of the memory's own: nothing from the environment, no receipts.
inline wandb::settings memory_settings(const scratch& folder) {
  wandb::settings settings;
  settings.base_url = "http://memory.test";
  settings.entity = "entity";
  settings.project = "project";
  settings.run_id = "run";
  settings.run_dir = folder.where;
  settings.retry_timeout = std::chrono::milliseconds(50);
  return settings;
}

/// In other.cpp: a Transport and a rule of that file's own, and a restored file that is handed over to this one.
wandb::result<wandb::restored_file> restore_elsewhere(const scratch& folder);
#if WANDB_RESTORE_EXCEPTIONS
/// In other.cpp: throws what this file catches.
void throw_elsewhere();
#endif

}  // namespace matrix

#endif
