// A transport in memory, for unit tests without network, key or server.
//
// It answers the query for a file's properties, and the request for its bytes. Code that takes a wandb::client<Transport>
// can be tested with it.
//
// It needs nlohmann/json, but no OpenSSL: it defines WANDB_RESTORE_NO_OPENSSL. All files of a program must agree on this macro,
// so that a larger program defines it on the command line:
//
//   c++ -std=c++17 -I.. -DWANDB_RESTORE_NO_OPENSSL memory_transport.cpp -o memory_transport -pthread
//
// SPDX-License-Identifier: MIT
#ifndef WANDB_RESTORE_NO_OPENSSL
#define WANDB_RESTORE_NO_OPENSSL
#endif
#include "wandb_restore.hpp"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <system_error>

namespace {

using json = nlohmann::json;

/// The files of one run, from name to content. Copies share files and counter: a test reads the counter of its own copy.
class memory_transport {
 public:
  explicit memory_transport(std::map<std::string, std::string> files) : shared_(std::make_shared<shared>()) {
    shared_->files = std::move(files);
  }

  int requests() const { return shared_->requests; }

  /// Makes one exchange. Safe to call from several threads at once: only the atomic counter changes.
  wandb::result<wandb::http_response> send(const wandb::http_request& request, wandb::body_sink& sink) {
    ++shared_->requests;
    if (request.cancelled()) return wandb::error(wandb::errc::cancelled, "cancelled");
    return request.method == "POST" ? answer_question(request, sink) : serve_file(request, sink);
  }

 private:
  struct shared {
    std::map<std::string, std::string> files;
    std::atomic<int> requests{0};
  };

  /// Answers the GraphQL query with data.project.run.files.edges[].node. A name without a node has no file.
  wandb::result<wandb::http_response> answer_question(const wandb::http_request& request,
                                                      wandb::body_sink& sink) const {
    const json question = json::parse(request.body, nullptr, false);
    const json names = question.value("/variables/fileNames"_json_pointer, json::array());
    json edges = json::array();
    for (const auto& [name, content] : shared_->files) {
      if (!names.empty() && std::find(names.begin(), names.end(), name) == names.end()) continue;
      edges.push_back({{"node",
                        {{"name", name},
                         {"url", "http://wandb.test/files/" + name},
                         {"sizeBytes", content.size()},
                         {"md5", nullptr},  // or 16 bytes in base64 or hex, to have the md5 checked
                         {"mimetype", "application/octet-stream"},
                         {"updatedAt", "2026-01-02T03:04:05Z"}}}});
    }
    json answer;
    answer["data"]["project"]["run"]["files"] = {{"edges", edges}, {"pageInfo", {{"hasNextPage", false}}}};
    return deliver({200, {{"Content-Type", "application/json"}}}, answer.dump(), sink);
  }

  /// Sends the file, or the requested range of it.
  wandb::result<wandb::http_response> serve_file(const wandb::http_request& request,
                                                 wandb::body_sink& sink) const {
    const std::string start = "http://wandb.test/files/";
    const auto found = shared_->files.find(request.url.substr(std::min(start.size(), request.url.size())));
    if (found == shared_->files.end()) return deliver({404, {}}, "", sink);
    const std::string& content = found->second;

    for (const auto& [name, value] : request.headers) {
      if (name != "Range" || value.compare(0, 6, "bytes=") != 0) continue;
      const auto dash = value.find('-');
      const std::size_t first = std::strtoull(value.c_str() + 6, nullptr, 10);
      const std::size_t last =
          dash + 1 < value.size() ? std::strtoull(value.c_str() + dash + 1, nullptr, 10) : content.size();
      if (first >= content.size()) return deliver({416, {}}, "", sink);
      const std::string part = content.substr(first, last - first + 1);
      const std::string range = "bytes " + std::to_string(first) + '-' +
                                std::to_string(first + part.size() - 1) + '/' +
                                std::to_string(content.size());
      return deliver({206, {{"Content-Range", range}}}, part, sink);
    }
    return deliver({200, {{"Accept-Ranges", "bytes"}}}, content, sink);
  }

  static wandb::result<wandb::http_response> deliver(wandb::http_response head, const std::string& body,
                                                     wandb::body_sink& sink) {
    head.headers.emplace_back("Content-Length", std::to_string(body.size()));
    if (!sink.start(head) || (!body.empty() && !sink.write(body)))
      return wandb::error(wandb::errc::cancelled, "cancelled");
    return head;
  }

  std::shared_ptr<shared> shared_;
};

}  // namespace

#ifndef WANDB_RESTORE_EXAMPLE_WITHOUT_MAIN  // the conformance tests include only the transport

namespace {

/// The function under test: it restores files through a client.
template <class Transport>
std::string first_line_of_vocabulary(wandb::client<Transport>& client) {
  auto file = client.try_restore("data/vocabulary.txt");
  if (!file) return std::string("none: ") + wandb::to_string(file.error().code());
  std::string line;
  std::getline(*file, line);
  return line;
}

int failures = 0;
void check(const char* what, bool holds) {
  std::cout << (holds ? "ok: " : "FAILED: ") << what << '\n';
  if (!holds) ++failures;
}

}  // namespace

int main() {
  const auto scratch = std::filesystem::temp_directory_path() /
                       ("wandb_restore_memory_transport_" + std::to_string(std::random_device{}()));

  wandb::settings settings;  // not from the environment, so that the test does not depend on the machine
  settings.base_url = "http://wandb.test";
  settings.entity = "entity";
  settings.project = "project";
  settings.run_id = "run";
  settings.run_dir = scratch;

  {
    const memory_transport transport({{"data/vocabulary.txt", "apple\nbanana\n"}, {"other.txt", ""}});
    wandb::client<memory_transport> client(settings, transport);
    check("the file's first line is found", first_line_of_vocabulary(client) == "apple");
    const int requests = transport.requests();
    check("a second time it needs no request",
          first_line_of_vocabulary(client) == "apple" && transport.requests() == requests);
  }
  std::error_code ignored;
  std::filesystem::remove_all(scratch, ignored);
  {
    wandb::client<memory_transport> client(settings, memory_transport({}));
    check("a run without the file is told from a failure",
          first_line_of_vocabulary(client) == "none: file_not_found");
  }
  std::filesystem::remove_all(scratch, ignored);
  return failures == 0 ? 0 : 1;
}
#endif
