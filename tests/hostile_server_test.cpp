// Servers that attack: requests and responses that break out of their frame, bombs, loops, other schemes, other hosts, lies about
// lengths and ranges, answers without end. Each restore is a child process over an old file: it ends with the error of its case,
// leaves the old file and nothing else that is visible, tells no secret, and uses less than 64 MiB of memory.
#include <doctest/doctest.h>

#include <cstdlib>
#include <fstream>
#include <functional>
#include <iterator>
#include <mutex>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "sockets.hpp"

#ifndef _WIN32
#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>

extern char** environ;

namespace {

namespace fs = std::filesystem;
using namespace sockets;
using wandb::errc;

const std::string key = "hostile00123456789abcdef0123456789abcdef0123";
const std::string key_in_base64 =
    "YXBpOmhvc3RpbGUwMDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWYwMTIz";  // of "api:" + key
const std::string extra_value = "extra-secret-value", signature = "SECRETSIGNATURE";
const std::string old_text = "the old file", new_text(300'000, 'n');
constexpr std::size_t MiB = 1024 * 1024;

// ------------------------------------------------------------------------------------------------- the client's process

std::string variable(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

/// The most memory that this process has used, in KiB; 0 if the system does not tell.
long peak_memory() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);)
    if (line.rfind("VmHWM:", 0) == 0) return std::atol(line.c_str() + 6);
  return 0;
}

}  // namespace

TEST_CASE("hostile server: a client" * doctest::skip()) {
  if (variable("HOSTILE_RESULT").empty()) return;
  wandb::settings settings;
  settings.base_url = variable("CHILD_URL");
  settings.api_key = key;
  settings.ca_file = variable("HOSTILE_CA");
  settings.extra_headers = {{"X-Extra", extra_value}};
  settings.cache_dir = variable("HOSTILE_CACHE");
  settings.connect_timeout = settings.idle_timeout = 5s;
  settings.retry_timeout = 1s;
  std::string told;  // the warnings
  settings.on_warning = [&](std::string_view text) { told += text; };
  wandb::restore_options options;
  options.run_path = "e/p/r";
  options.root = variable("HOSTILE_ROOT");
  options.replace = true;
  options.connections = 4;
  errc code{};
  wandb::client<> client(settings);
  if (variable("HOSTILE_LISTS") == "1") {
    if (const auto got = client.try_list_files(options); !got)
      code = got.error().code(), told += got.error().what();
  } else if (const auto got = client.try_restore("model.bin", options); !got) {
    code = got.error().code();
    told += got.error().what();
  }
  std::ofstream(variable("HOSTILE_RESULT"), std::ios::binary)
      << static_cast<int>(code) << ' ' << peak_memory() << ' ' << told;
  _exit(0);
}

namespace {

struct client_result {
  errc code{};
  long memory = 0;  // KiB
  std::string text;
};

using variables = std::vector<std::pair<std::string, std::string>>;

/// Runs the client in a child process.
client_result run_client(const std::string& base_url, const fs::path& folder, bool lists,
                         const fs::path& ca = {}, const variables& more = {}) {
  variables all = {{"CHILD_URL", base_url},
                   {"HOSTILE_CA", ca.string()},
                   {"HOSTILE_CACHE", (folder / "cache").string()},
                   {"HOSTILE_ROOT", (folder / "root").string()},
                   {"HOSTILE_LISTS", lists ? "1" : "0"},
                   {"HOSTILE_RESULT", (folder / "result").string()}};
  all.insert(all.end(), more.begin(), more.end());
  std::vector<std::string> texts;
  for (char** one = environ; *one != nullptr; ++one) texts.emplace_back(*one);
  for (const auto& [name, value] : all) texts.push_back(name + "=" + value);
  std::vector<char*> environment;
  for (auto& text : texts) environment.push_back(text.data());
  environment.push_back(nullptr);
  std::string program = "tests", only = "--test-case=hostile server: a client", skipped = "--no-skip";
  char* arguments[] = {program.data(), only.data(), skipped.data(), nullptr};
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, 1, "/dev/null", O_WRONLY, 0);
  pid_t child = -1;
  const int failure = posix_spawn(&child, "/proc/self/exe", &actions, nullptr, arguments, environment.data());
  posix_spawn_file_actions_destroy(&actions);
  REQUIRE(failure == 0);
  int status = 0;
  waitpid(child, &status, 0);
  REQUIRE_MESSAGE((WIFEXITED(status) && WEXITSTATUS(status) == 0), "the client's process died: ", status);
  std::istringstream result(support::read_file(folder / "result"));
  client_result got;
  int code = -1;
  result >> code >> got.memory;
  result.ignore();
  got.code = static_cast<errc>(code);
  got.text.assign(std::istreambuf_iterator<char>(result), {});
  return got;
}

// -------------------------------------------------------------------------------------------------------- the server

struct request {
  std::string head, target;
  bool is_question() const { return head.rfind("POST ", 0) == 0; }
  bool has_range() const { return head.find("\r\nRange: ") != head.npos; }
};

/// Bytes to send, then `endless` again and again until the client closes the connection.
struct reply {
  std::string bytes, endless = {};
};

struct addresses {
  std::string service, other_host;  // "http://host:port"
};

using answering = std::function<reply(const request&, const addresses&)>;

reply response(const std::string& body, const std::string& fields = "",
               const std::string& status = "200 OK") {
  return {"HTTP/1.1 " + status + "\r\nConnection: close\r\nContent-Length: " + std::to_string(body.size()) +
          "\r\n" + fields + "\r\n" + body};
}
reply redirect(const std::string& location) {
  return response("", "Location: " + location + "\r\n", "302 Found");
}

/// The service's answer about the file. `fields` are further members of the node, which replace those before them.
reply node(const addresses& at, const std::string& fields = "") {
  return response(R"({"data":{"project":{"run":{"files":{"edges":[{"node":{"name":"model.bin","url":")" +
                  at.service + "/files/model.bin?signature=" + signature + R"(","sizeBytes":300000,"md5":")" +
                  stand_in::md5_hex(*stand_in::bytes(new_text)) + '"' + fields + "}}]}}}}}");
}

/// The service and another host, on two ports. Other hosts get no secrets: the test checks what they received.
class hostile_servers {
 public:
  hostile_servers(answering question, answering file)
      : question_(std::move(question)), file_(std::move(file)),
        other_host_([this](peer& client) { serve(client, true); }),
        service_([this](peer& client) { serve(client, false); }) {}

  addresses at() const { return {service_.url(""), other_host_.url("")}; }
  std::vector<std::string> received_by_other_host() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return received_;
  }
  std::vector<std::string> received_by_service() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return received_by_service_;
  }

 private:
  void serve(peer& client, bool is_other_host) {
    request asked;
    asked.head = client.read_head();
    if (asked.head.empty()) return;
    const auto begin = asked.head.find(' ') + 1;
    asked.target = asked.head.substr(begin, asked.head.find(' ', begin) - begin);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      (is_other_host ? received_ : received_by_service_).push_back(asked.head);
    }
    if (const auto length = asked.head.find("Content-Length: "); length != asked.head.npos)
      client.read(static_cast<std::size_t>(std::atol(asked.head.c_str() + length + 16)));
    const reply sent = (asked.is_question() ? question_ : file_)(asked, at());
    if (!client.send(sent.bytes)) return;
    if (!sent.endless.empty()) client.send_without_end(sent.endless, 1024 * MiB);
    client.leave();
    client.wait_for_close(5s);
  }

  const answering question_, file_;
  mutable std::mutex mutex_;
  std::vector<std::string> received_, received_by_service_;
  raw_server other_host_, service_;
};

// --------------------------------------------------------------------------------------------------------- the checks

/// A directory with an old file, and what is around it.
class victim {
 public:
  victim() {
    fs::create_directories(folder / "root");
    fs::create_directories(folder / "cache");
    support::write_file(folder / "root" / "model.bin", old_text);
  }
  /// Checks what a failed restore has left: the old file, hidden files beside it, and the library's cache.
  void check_unharmed() const {
    CHECK(support::read_file(folder / "root" / "model.bin") == old_text);
    for (const auto& entry : fs::recursive_directory_iterator(folder.path())) {
      const std::string name = entry.path().lexically_relative(folder.path()).generic_string();
      const bool is_expected = name == "root" || name == "root/model.bin" || name == "cache" ||
                               name == "result" || name.rfind("cache/", 0) == 0 ||
                               name.rfind("root/.wandb-restore-", 0) == 0;
      CHECK_MESSAGE(is_expected, "written: ", name);
    }
  }
  support::temporary_directory folder;
};

void check_harmless(const std::string& text) {
  for (const auto& secret :
       {key, key.substr(8, 30), key_in_base64, extra_value, signature, std::string("Basic ")})
    CHECK_MESSAGE(text.find(secret) == text.npos, "a secret in: ", text.substr(0, 500));
}

void check_memory(long kibibytes) {
#if TESTS_SANITIZED
  (void)kibibytes;  // a sanitizer needs more memory than the client
#else
  const bool counts = std::getenv("TESTS_COUNT_COVERAGE") != nullptr;  // counters need memory
  if (kibibytes != 0 && !counts) CHECK(kibibytes < 64 * 1024);
#endif
}

struct attack {
  const char* what;
  errc code;
  const char* text;  // a part of the error's text
  answering file;
  answering question = [](const request&, const addresses& at) { return node(at); };
  bool lists = false;
  variables environment = {};
};

long peak = 0;  // KiB, of all attacks

/// Runs one attack. Returns the heads of the requests that the service received.
std::vector<std::string> check(const attack& each) {
  const std::string what = each.what;
  CAPTURE(what);
  const victim here;
  const hostile_servers servers(each.question, each.file);
  const auto got = run_client(servers.at().service, here.folder.path(), each.lists, {}, each.environment);
  const std::string shown = got.text.substr(0, 1000);
  CAPTURE(shown);
  CHECK(wandb::to_string(got.code) == std::string(wandb::to_string(each.code)));
  CHECK(got.text.find(each.text) != got.text.npos);
  CHECK(got.text.size() < 4096);
  check_harmless(got.text);
  here.check_unharmed();
  CAPTURE(got.memory);
  check_memory(got.memory);
  peak = (std::max)(peak, got.memory);
  for (const auto& head : servers.received_by_other_host()) check_harmless(head.substr(head.find("\r\n")));
  return servers.received_by_service();
}

void check_all(const std::vector<attack>& attacks) {
  for (const auto& each : attacks) check(each);
  MESSAGE(attacks.size(), " attacks; the most memory so far: ", peak, " KiB");
}

/// Always the same response.
answering always(reply sent) {
  return [sent = std::move(sent)](const request&, const addresses&) { return sent; };
}
answering always(const std::string& bytes, const std::string& endless = "") {
  return always(reply{bytes, endless});
}

/// The node with further members.
answering node_with(std::string fields) {
  return [fields = std::move(fields)](const request&, const addresses& at) { return node(at, fields); };
}

const std::string ok = "HTTP/1.1 200 OK\r\n", chunked = ok + "Transfer-Encoding: chunked\r\n\r\n";
const std::string unknown_size = R"(,"sizeBytes":null,"md5":null)";
const answering no_file = always(response("", "", "404 Not Found"));

}  // namespace

TEST_SUITE("hostile servers") {
  TEST_CASE("framing: two lengths, two encodings, folded lines, characters that end a line") {
    const std::string length = "Content-Length: 300000\r\n";
    check_all({
        {"two different lengths", errc::protocol_violation, "bad Content-Length in the response",
         always(ok + length + "Content-Length: 5\r\n\r\n" + new_text)},
        {"a list of lengths", errc::protocol_violation, "bad Content-Length in the response: \"300000, 5\"",
         always(ok + "Content-Length: 300000, 5\r\n\r\n" + new_text)},
        {"a length with a sign", errc::protocol_violation, "bad Content-Length",
         always(ok + "Content-Length: +300000\r\n\r\n" + new_text)},
        {"a length in hexadecimal", errc::protocol_violation, "bad Content-Length",
         always(ok + "Content-Length: 0x493e0\r\n\r\n" + new_text)},
        {"a length beyond 64 bits", errc::protocol_violation, "bad Content-Length",
         always(ok + "Content-Length: 18446744073709851616\r\n\r\n" + new_text)},
        {"an encoding before chunked", errc::protocol_violation, "unknown Transfer-Encoding in the response",
         always(ok + "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n")},
        {"chunked twice", errc::protocol_violation, "unknown Transfer-Encoding",
         always(ok + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")},
        {"an encoding that only some understand", errc::protocol_violation, "unknown Transfer-Encoding",
         always(ok + "Transfer-Encoding: xchunked\r\n" + length + "\r\n" + new_text)},
        {"a folded line", errc::protocol_violation, "a header line of the response is malformed",
         always(ok + "X: a\r\n Transfer-Encoding: chunked\r\n" + length + "\r\n" + new_text)},
        {"a space before the colon", errc::protocol_violation, "a header line of the response is malformed",
         always(ok + "Content-Length : 300000\r\n\r\n" + new_text)},
        {"a line without a colon", errc::protocol_violation, "a header line of the response is malformed",
         always(ok + "Content-Length\r\n\r\n")},
        {"a carriage return within a line", errc::protocol_violation,
         "a header line of the response is malformed",
         always(ok + "X: a\rContent-Length: 5\r\n" + length + "\r\n" + new_text)},
        {"a NUL within a line", errc::protocol_violation, "a header line of the response is malformed",
         always(ok + std::string("X: a\0b\r\n", 8) + length + "\r\n" + new_text)},
        {"a status of four digits", errc::protocol_violation, "the status line of the response is malformed",
         always("HTTP/1.1 2000 OK\r\n" + length + "\r\n" + new_text)},
        {"another protocol", errc::protocol_violation, "the status line of the response is malformed",
         always("ICY 200 OK\r\n" + length + "\r\n" + new_text)},
        {"a switch of protocols", errc::protocol_violation, "the status line of the response is malformed",
         always("HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n")},
        {"a chunk's size with a sign", errc::protocol_violation, "the size line of a chunk is malformed",
         always(chunked + "-1\r\nx\r\n0\r\n\r\n")},
        {"a chunk beyond 64 bits", errc::protocol_violation, "the size line of a chunk is malformed",
         always(chunked + "1000000000000000a\r\n0123456789\r\n0\r\n\r\n")},
        {"a chunk longer than its size", errc::protocol_violation,
         "a chunk of the body is longer than its size", always(chunked + "3\r\nabcdef\r\n0\r\n\r\n")},
    });
  }

  TEST_CASE("a length beside chunks: what follows the chunks is never taken for the next response") {
    // RFC 9112, section 6.3: the chunks count. The engine then misses the bytes that the length promised.
    const std::string whole = "493e0\r\n" + new_text + "\r\n0\r\n\r\n";
    const std::string smuggled = ok + "Content-Length: 300000\r\n\r\n" + std::string(300'000, 'b');
    check_all(
        {{"a shorter length", errc::checksum_mismatch, "has 5 bytes, the service says 300000",
          always(ok + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n" + whole + smuggled)},
         {"fewer chunks", errc::connection_failed, "ended 299995 bytes early",
          always(ok + "Content-Length: 300000\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nnnnnn\r\n0\r\n\r\n" +
                 smuggled)}});
  }

  TEST_CASE("addresses with line breaks begin no header field") {
    const auto with_url = [](const std::string& tail) {
      return [tail](const request&, const addresses& at) {
        return node(at, ",\"url\":\"" + at.service + tail + '"');
      };
    };
    const std::string injected = "X-Injected: yes";
    check({"a line break in an address", errc::protocol_violation, "control character", no_file,
           with_url(R"(/f HTTP/1.1\r\n)" + injected + R"(\r\n\r\n)")});
    check({"a line feed in an address", errc::protocol_violation, "control character", no_file,
           with_url(R"(/f\n)" + injected)});
    check({"a line break in a host", errc::protocol_violation, "control character", no_file,
           node_with(R"(,"url":"http://127.0.0.1\r\n)" + injected + R"(:80/f")")});
    for (const auto& heads : {check({"an encoded line break in an address", errc::http_failure,
                                     "HTTP status 404", no_file, with_url("/f%0d%0a" + injected)}),
                              check({"an encoded line break in a redirect", errc::http_failure,
                                     "HTTP status 404", [=](const request&asked, const addresses&) {
                                       return asked.target.find("%0D%0A") == std::string::npos
                                                  ? redirect("/g%0D%0A" + injected)
                                                  : response("", "", "404 Not Found");
                                     }})}) {
      for (const auto& head : heads) CHECK(head.find("\n" + injected) == head.npos);
    }
  }

  TEST_CASE("bombs: encoded bodies are not decoded, and JSON is bounded before it takes memory") {
    std::string bomb("\x1f\x8b\x08\0\0\0\0\0\0\x03", 10);  // the beginning of a gzip file
    bomb.resize(64 * 1024, '\0');
    const std::string many(7 * MiB, ' ');
    const auto filled = [](const std::string& part, std::size_t size) {
      std::string text = part;
      while (text.size() + part.size() < size) text += ',' + part;
      return text;
    };
    const auto data = [](const std::string& inner) { return always(response("{\"data\":[" + inner + "]}")); };
    std::string nested, numbered = "\"x\":0";
    for (int i = 0; i < 100'000; ++i) nested += "{\"a\":";
    for (int i = 0; numbered.size() < 7 * MiB; ++i) numbered += ",\"" + std::to_string(i) + "\":0";
    const std::string long_text(8 * MiB - 64 * 1024, 'x');
    check_all({
        {"an encoded file", errc::protocol_violation, "its Content-Encoding is \"gzip\"",
         always(response(bomb, "Content-Encoding: gzip\r\n"))},
        {"an encoded file, chunked, without end", errc::protocol_violation,
         "its Content-Encoding is \"gzip\"",
         always(ok + "Content-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n",
                "10000\r\n" + bomb + "\r\n")},
        {"an encoded file of unknown size", errc::protocol_violation, "its Content-Encoding is \"br\"",
         always(response(bomb, "Content-Encoding: br\r\n")), node_with(unknown_size)},
        {"an encoded answer", errc::protocol_violation, "its Content-Encoding is \"gzip\"", no_file,
         always(response(bomb, "Content-Encoding: gzip\r\n"))},
        {"objects 100,000 deep", errc::protocol_violation, "nested too deeply", no_file,
         always(response(nested + std::string(100'000, '}')))},
        {"arrays 4,000,000 deep", errc::protocol_violation, "nested too deeply", no_file,
         always(response(std::string(4 * MiB, '[')))},
        {"an array of numbers", errc::protocol_violation, "has too many or too long values", no_file,
         data(filled("0", 7 * MiB))},
        {"an array of objects", errc::protocol_violation, "has too many or too long values", no_file,
         data(filled("{}", 7 * MiB))},
        {"an array of strings", errc::protocol_violation, "has too many or too long values", no_file,
         data(filled("\"\"", 7 * MiB))},
        {"an array of nested objects", errc::protocol_violation, "has too many or too long values", no_file,
         data(filled(R"({"a":{"a":{"a":{"a":{"a":{}}}}}})", 7 * MiB))},
        {"an object of many members", errc::protocol_violation, "has too many or too long values", no_file,
         data("{" + numbered + "}")},
        {"an answer without end", errc::protocol_violation, "longer than 8.0 MiB", no_file,
         always(chunked, "1000\r\n" + std::string(4096, ' ') + "\r\n")},
        {"a long message", errc::protocol_violation, "too long values", no_file,
         always(response("{\"errors\":[{\"message\":\"" + long_text + "\"}]}"))},
        {"a long message of status 500", errc::http_failure, "HTTP status 500", no_file,
         always(response("{\"errors\":[{\"message\":\"" + long_text + "\"}]}", "",
                         "500 Internal Server Error"))},
        {"a long name", errc::protocol_violation, "too long values", no_file,
         node_with(",\"name\":\"" + long_text + '"')},
        {"a long md5", errc::protocol_violation, "too long values", no_file,
         node_with(",\"md5\":\"" + long_text + '"')},
        {"a long size", errc::protocol_violation, "too long values", no_file,
         node_with(",\"sizeBytes\":\"" + std::string(7 * MiB, '1') + '"')},
        {"a long media type", errc::protocol_violation, "too long values", no_file,
         node_with(",\"mimetype\":\"" + long_text + '"')},
        {"a long address", errc::protocol_violation, "too long values", no_file,
         [&](const request&, const addresses& at) {
           return node(at, ",\"url\":\"" + at.service + "/" + long_text + '"');
         }},
        {"an answer of white space", errc::protocol_violation, "is not a JSON object", no_file,
         always(response(many))},
        {"an error page without end", errc::http_failure, "HTTP status 500", no_file,
         always("HTTP/1.1 500 Oops\r\n\r\n", std::string(65536, 'x'))},
    });
  }

  TEST_CASE("answers without end: heads, interim responses, chunks, trailers, pages") {
    const std::string text(4096, 'x'), field = "X: " + text + "\r\n", chunk = chunked + "3\r\nabc\r\n";
    check_all({
        {"a status line", errc::protocol_violation, "the head of the response has more than",
         always("HTTP/1.1 200 ", text)},
        {"a header line", errc::protocol_violation, "the head of the response has more than",
         always(ok + "X: ", text)},
        {"header lines", errc::protocol_violation, "the head of the response has more than",
         always(ok, field)},
        {"short header lines", errc::protocol_violation, "its header is too large",
         always(ok +
                [] {
                  std::string fields;
                  for (int i = 0; i < 201; ++i) fields += "X:\r\n";
                  return fields;
                }() +
                "\r\n")},
        {"interim responses", errc::protocol_violation, "the head of the response has more than",
         always("", "HTTP/1.1 103 Early Hints\r\n\r\n")},
        {"a chunk's size", errc::protocol_violation, "the size line of a chunk has more than",
         always(chunk, std::string(4096, '0')), node_with(unknown_size)},
        {"a chunk's extension", errc::protocol_violation, "the size line of a chunk has more than",
         always(chunk + "5;x=", text), node_with(unknown_size)},
        {"a trailer line", errc::protocol_violation, "a trailer line of the body has more than",
         always(chunk + "0\r\nX: ", text), node_with(unknown_size)},
        {"trailer lines", errc::protocol_violation, "the trailers of the body have more than",
         always(chunk + "0\r\n", field), node_with(unknown_size)},
        {"the body of a file of known size", errc::protocol_violation, "sends more than it promised",
         always(ok + "Content-Type: x/y\r\n\r\n", text)},
        {"a redirect to a long address", errc::http_failure, "x...: HTTP status 404",
         [](const request& asked, const addresses&) {
           return asked.target.size() > 1000 ? response("", "", "404 Not Found")
                                             : redirect("/" + std::string(50'000, 'x'));
         }},
        {"a redirect's body", errc::http_failure, "HTTP status 404",
         [=](const request& asked, const addresses&) {
           return asked.target == "/next" ? response("", "", "404 Not Found")
                                          : reply{"HTTP/1.1 302 Found\r\nLocation: /next\r\n\r\n", text};
         }},
    });
    int pages = 0;
    const auto page_of = [&](std::size_t files, std::size_t name_bytes) {
      return [&pages, files, name_bytes](const request&, const addresses&) {
        const std::string page = std::to_string(++pages);
        std::string edges;
        for (std::size_t i = 0; i < files; ++i) {
          edges += (i == 0 ? R"({"node":{"name":")" : R"(,{"node":{"name":")") + page + "-" +
                   std::to_string(i) + std::string(name_bytes, 'x') + R"("}})";
        }
        return response(R"({"data":{"project":{"run":{"files":{"edges":[)" + edges +
                        R"(],"pageInfo":{"hasNextPage":true,"endCursor":")" + page + R"("}}}}}})");
      };
    };
    check_all({{"pages of one file", errc::protocol_violation, "lists too many files", no_file, page_of(1, 1),
                true},
               {"pages of 500 files", errc::protocol_violation, "lists too many files", no_file,
                page_of(500, 10), true},
               {"pages of 7,000 files", errc::protocol_violation, "lists too many files", no_file,
                page_of(7000, 900), true},
               {"a page of one long name", errc::protocol_violation, "too long values", no_file,
                page_of(1, 7 * MiB), true},
               {"pages of long names", errc::protocol_violation, "lists too many files", no_file,
                page_of(100, 65'000), true}});
  }

  TEST_CASE("redirects: loops, other schemes, and a host that waits for the key") {
    const auto to = [](const std::string& location) { return always(redirect(location)); };
    std::vector<attack> attacks = {
        {"a loop", errc::protocol_violation, "more than 10 redirects",
         to("/files/model.bin?signature=" + signature)},
        {"a loop of two hosts", errc::protocol_violation, "more than 10 redirects",
         [](const request& asked, const addresses& at) {
           const bool is_at_service = asked.head.find("Host: " + at.service.substr(7)) != asked.head.npos;
           return redirect((is_at_service ? at.other_host : at.service) + "/again");
         }},
        {"a question's loop", errc::protocol_violation, "more than 10 redirects", no_file,
         always(response("", "Location: /graphql\r\n", "307 Temporary Redirect"))},
        {"a question sent elsewhere", errc::protocol_violation, "check the base URL", no_file,
         [](const request&, const addresses& at) {
           return response("", "Location: " + at.other_host + "/graphql\r\n", "307 Temporary Redirect");
         }},
    };
    for (const char* location :
         {"file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://127.0.0.1:70/_x", "data:text/plain,x",
          "javascript:0", "unix:/run/x.sock", "ldap://127.0.0.1/x", "http://", "http://[::1", "//"}) {
      attacks.push_back({location, errc::protocol_violation,
                         "was redirected to an address that cannot be used", to(location)});
    }
    for (const char* address : {"file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://127.0.0.1/x"}) {
      attacks.push_back({address, errc::protocol_violation, "not served over HTTP", no_file,
                         node_with(",\"url\":\"" + std::string(address) + '"')});
    }
    // The other host asks for credentials, and says that it is the service.
    const reply demand = response("", "WWW-Authenticate: Basic realm=\"api.wandb.ai\"\r\nSet-Cookie: a=b\r\n",
                                  "401 Unauthorized");
    for (const char* form : {"/f?x", "@/f?x", "user"}) {
      attacks.push_back({form, errc::permission_denied, "also with 3 new addresses",
                         [=](const request& asked, const addresses& at) {
                           const bool is_at_service =
                               asked.head.find("Host: " + at.service.substr(7)) != asked.head.npos;
                           if (!is_at_service) return demand;
                           const std::string host = at.other_host.substr(7);
                           if (form[0] == '@')
                             return redirect("http://" + at.service.substr(7) + "@" + host + "/f?x");
                           if (form[0] == 'u') return redirect("http://user:" + key + "@" + host + "/f?x");
                           return redirect(at.other_host + form);
                         }});
    }
    attacks.push_back({"an address at another host", errc::permission_denied, "also with 3 new addresses",
                       always(demand), [](const request&, const addresses& at) {
                         return node(at, ",\"url\":\"" + at.other_host + "/f?x\"");
                       }});
    check_all(attacks);
  }

  TEST_CASE("messages that repeat the request's secrets") {
    const auto echo = [](const std::string& status, const std::string& before, const std::string& after) {
      return [=](const request& asked, const addresses&) {
        std::string head;
        for (const char c : asked.head) head += c == '\r' ? "" : c == '\n' ? "\\n" : std::string(1, c);
        return response(before + head + " " + key + after, "", status);
      };
    };
    const std::string json = R"({"errors":[{"message":")", end = R"("}]})";
    check_all({
        {"status 200", errc::http_failure, "answered", no_file, echo("200 OK", json, end)},
        {"status 400", errc::http_failure, "HTTP status 400", no_file, echo("400 Bad Request", json, end)},
        {"status 401", errc::not_authenticated, "HTTP status 401", no_file,
         echo("401 Unauthorized", json, end)},
        {"status 403", errc::permission_denied, "HTTP status 403", no_file, echo("403 Forbidden", json, end)},
        {"a page", errc::protocol_violation, "is not a JSON object", no_file, echo("200 OK", "<p>", "</p>")},
        {"a page in the place of the file", errc::checksum_mismatch, "has", echo("200 OK", "<p>", "</p>")},
        {"a refusal of the file", errc::http_failure, "HTTP status 400", echo("400 Bad Request", json, end)},
    });
  }

  TEST_CASE("lies about lengths and ranges") {
    const std::string large = R"(,"sizeBytes":20000000,"md5":"0123456789abcdef0123456789abcdef")";
    const auto part = [](const std::string& range) {
      return always(response(new_text, "Content-Range: " + range + "\r\n", "206 Partial Content"));
    };
    check_all({
        {"a body that ends early", errc::connection_failed, "before the end of the body",
         always(ok + "Content-Length: 300000\r\n\r\n" + new_text.substr(0, 1000))},
        {"a shorter file", errc::checksum_mismatch, "has 1000 bytes, the service says 300000",
         always(response(new_text.substr(0, 1000)))},
        {"a longer file", errc::checksum_mismatch, "has 300001 bytes, the service says 300000",
         always(response(new_text + "x"))},
        {"other bytes", errc::checksum_mismatch, "its md5 is", always(response(std::string(300'000, 'x')))},
        {"chunks that end early", errc::connection_failed, "before the end of the body",
         always(chunked + "493e0\r\n" + new_text.substr(0, 1000))},
        {"chunks without an end", errc::connection_failed, "before the end of the body",
         always(chunked + "10\r\n0123456789abcdef\r\n"), node_with(unknown_size)},
        {"206 without a range", errc::protocol_violation, "answers 206 without a requested range",
         always(response(new_text, "", "206 Partial Content"))},
        {"206 for the whole file", errc::protocol_violation, "answers 206 without a requested range",
         part("bytes 0-299999/300000")},
        {"206 without Content-Range", errc::protocol_violation, "answers 206 without a requested range",
         always(response(new_text, "", "206 Partial Content")), node_with(large)},
        {"another range", errc::protocol_violation, "answers 206", part("bytes 1-300000/20000000"),
         node_with(large)},
        {"a range backwards", errc::protocol_violation, "answers 206", part("bytes 300000-1/20000000"),
         node_with(large)},
        {"a range beyond 64 bits", errc::protocol_violation, "answers 206",
         part("bytes 0-18446744073709551615/18446744073709551615"), node_with(large)},
        {"several ranges", errc::protocol_violation, "answers 206",
         always(
             response(new_text, "Content-Type: multipart/byteranges; boundary=x\r\n", "206 Partial Content")),
         node_with(large)},
        {"a size of 2^62", errc::protocol_violation, "gives an impossible size: 4611686018427387904", no_file,
         node_with(",\"sizeBytes\":4611686018427387904")},
        {"a size of 10^15", errc::protocol_violation, "gives an impossible size: 1000000000000000", no_file,
         node_with(",\"sizeBytes\":1000000000000000")},
        {"a negative size", errc::http_failure, "HTTP status 404", no_file, node_with(",\"sizeBytes\":-1")},
        {"a wait of years", errc::http_failure, "the server asks to wait 86400 s",
         always(response("", "Retry-After: 999999999999\r\n", "503 Slow Down"))},
        {"another file", errc::protocol_violation, "answered about the file \"../../evil\" instead",
         always(response(new_text)), node_with(R"(,"name":"../../evil")")},
    });
  }

  TEST_CASE("a great size, where free space cannot be told, takes little memory") {
#if TESTS_SANITIZED
    MESSAGE("left out: a preloaded library and a sanitizer's runtime do not go together");
#else
    const std::string library = WANDB_RESTORE_TESTS_SHIM;
    REQUIRE_MESSAGE(fs::exists(library), "not built: ", library);
    const variables no_free_space = {
        {"LD_PRELOAD", library}, {"FAULT_FREE", "unknown"}, {"FAULT_ALLOCATE", "EOPNOTSUPP"}};
    // Some file systems have a limit of 16 TiB, which leaves room for the record behind the content.
    const std::string large = std::to_string(std::uint64_t{15} << 40);
    const std::string too_large = std::to_string((std::uint64_t{1} << 46) + 1);
    check_all({{"15 TiB", errc::http_failure, "HTTP status 404", no_file,
                node_with(",\"sizeBytes\":" + large), false, no_free_space},
               {"more than 64 TiB", errc::protocol_violation, "gives an impossible size", no_file,
                node_with(",\"sizeBytes\":" + too_large), false, no_free_space}});
#endif
  }

  TEST_CASE("TLS: a connection that is cut off is not the end of a file of unknown size") {
    using stand_in::place;
    namespace act = stand_in::act;
    for (const bool chunks : {false, true}) {
      CAPTURE(chunks);
      stand_in::options how;
      how.key = key;
      stand_in::server server(how);
      const auto run = server.add_run("e", "p", "r");
      stand_in::file_attributes unknown;
      unknown.md5_as = stand_in::md5_form::null;
      unknown.size_as = stand_in::size_form::null;
      server.add_file(run, "model.bin", new_text, unknown);
      server.add_fault(place::storage, chunks ? act::chunked() : act::until_close());
      server.add_fault(place::storage, act::cut_abruptly(100'000));
      const victim here;
      const support::temporary_directory elsewhere;
      server.write_ca(elsewhere / "ca.pem");
      const auto got = run_client(server.base_url(), here.folder.path(), false, elsewhere / "ca.pem");
      CAPTURE(got.text);
      CHECK(got.code == errc::connection_failed);
      check_harmless(got.text);
      here.check_unharmed();
      check_memory(got.memory);
    }
  }
}

// ----------------------------------------------------------------------------- from the internet to this machine

namespace {

/// A transport in memory: the service at any name. Records the hosts that were asked.
struct named_service {
  std::function<std::string(const std::string& address)> location;  // for a file: "" for the content
  std::string file_url;
  std::vector<std::string>* asked;

  wandb::result<wandb::http_response> send(const wandb::http_request& request, wandb::body_sink& sink) {
    asked->push_back(request.url);
    std::string body = new_text;
    wandb::http_response head;
    head.status = 200;
    if (request.method == "POST") {
      body = R"({"data":{"project":{"run":{"files":{"edges":[{"node":{"name":"model.bin","url":")" +
             file_url + R"(","sizeBytes":300000,"md5":")" + stand_in::md5_hex(*stand_in::bytes(new_text)) +
             R"("}}]}}}}})";
    } else if (const auto to = location(request.url); !to.empty()) {
      head.status = 302;
      head.headers = {{"Location", to}};
      body.clear();
    }
    head.headers.emplace_back("Content-Length", std::to_string(body.size()));
    if (!sink.start(head) || !sink.write(body)) return wandb::error(errc::cancelled, "stopped");
    return head;
  }
};

struct inward {
  wandb::result<wandb::restored_file> got;
  std::vector<std::string> asked;
};

/// Restores a file whose address at `base` redirects to `target`, or is `target`.
inward restore_from(const std::string& base, const std::string& target, bool redirects,
                    const std::string& proxy = "") {
  const victim here;
  std::vector<std::string> asked;
  wandb::settings settings;
  settings.base_url = base;
  settings.api_key = key;
  settings.http_proxy.url = settings.https_proxy.url = proxy;
  settings.cache_dir = here.folder / "cache";
  wandb::restore_options options;
  options.run_path = "e/p/r";
  options.root = here.folder / "root";
  options.replace = true;
  const std::string first = base + "/files/model.bin";
  named_service transport{
      [=](const std::string& address) { return redirects && address == first ? target : std::string(); },
      redirects ? first : target, &asked};
  wandb::client<named_service> client(settings, transport);
  auto got = client.try_restore("model.bin", options);
  return {std::move(got), asked};
}

}  // namespace

TEST_SUITE("hostile servers: from the internet to this machine") {
  TEST_CASE("a server on the internet cannot send the client to its own machine or network link") {
    for (const char* host : {"127.0.0.1",
                             "127.8.9.10",
                             "127.1",
                             "2130706433",
                             "0x7f000001",
                             "0x7f.1",
                             "0177.0.0.1",
                             "0.0.0.0",
                             "localhost",
                             "LOCALHOST",
                             "localhost.",
                             "a.localhost",
                             "[::1]",
                             "[::]",
                             "[::ffff:127.0.0.1]",
                             "[::127.0.0.1]",
                             "169.254.169.254",
                             "[::ffff:169.254.169.254]",
                             "169.254.43518",
                             "[fe80::1]"}) {
      for (const char* base : {"https://api.wandb.ai", "https://wandb.example.com", "http://203.0.113.7:8080",
                               "https://[2001:db8::1]", "https://wandb.example.com:8443/wandb"}) {
        const std::string scheme = std::string(base).substr(0, std::string(base).find(':'));
        for (const bool redirects : {true, false}) {
          CAPTURE(host);
          CAPTURE(base);
          CAPTURE(redirects);
          const auto end =
              restore_from(base, scheme + "://" + host + ":8443/x?signature=" + signature, redirects);
          REQUIRE_FALSE(end.got.has_value());
          const std::string text = end.got.error().what();
          CAPTURE(text);
          CHECK(end.got.error().code() == errc::protocol_violation);
          CHECK(text.find("is this machine or its network link: refused") != text.npos);
          check_harmless(text);
          CHECK(end.asked.size() == (redirects ? 2u : 1u));
        }
      }
    }
  }

  TEST_CASE("a private server, a server behind a proxy, and other targets are not affected") {
    struct example {
      const char *base, *target, *proxy;
    };
    for (const auto& [base, target, proxy] : std::vector<example>{
             {"http://127.0.0.1:8080", "http://127.0.0.1:9000/x", ""},
             {"http://localhost:8080", "http://127.0.0.1:9000/x", ""},
             {"http://[::1]:8080", "http://localhost:9000/x", ""},
             {"http://wandb:8080", "http://localhost:9000/x", ""},
             {"http://wandb.local", "http://127.0.0.1:9000/x", ""},
             {"http://wandb.corp.internal", "http://127.0.0.1:9000/x", ""},
             {"http://10.1.2.3", "http://127.0.0.1:9000/x", ""},
             {"http://172.20.0.2", "http://169.254.1.1:9000/x", ""},
             {"http://192.168.1.2", "http://localhost:9000/x", ""},
             {"http://[fd00::2]", "http://[::1]:9000/x", ""},
             {"https://api.wandb.ai", "https://127.0.0.1:9000/x", "http://proxy.example.com:3128"},
             {"https://api.wandb.ai", "https://10.1.2.3:9000/x", ""},
             {"https://api.wandb.ai", "https://minio:9000/x", ""},
             {"https://api.wandb.ai", "https://128.0.0.1/x", ""},
             {"https://api.wandb.ai", "https://storage.googleapis.com/x", ""},
             {"https://api.wandb.ai", "https://127.0.0.1.nip.example.com/x", ""},
             {"https://api.wandb.ai", "https://localhost.example.com/x", ""},
             {"https://api.wandb.ai", "https://notlocalhost/x", ""}}) {
      for (const bool redirects : {true, false}) {
        const std::string shown = std::string(base) + " to " + target;
        CAPTURE(shown);
        const auto end = restore_from(base, target, redirects, proxy);
        if (!end.got) FAIL_CHECK(std::string(end.got.error().what()));
        CHECK(end.asked.back() == target);
      }
    }
  }
}

#endif  // _WIN32
