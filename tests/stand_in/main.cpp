// wandb-stand-in: the stand-in server as a program, for shells and for tests in other languages.
//
// SPDX-License-Identifier: MIT
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <array>
#include <cerrno>
#include <condition_variable>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "stand_in.hpp"

namespace {

std::array<int, 2> wake_pipe;

extern "C" void wake(int) {
  const int kept = errno;
  const ssize_t written = write(wake_pipe[1], "x", 1);
  static_cast<void>(written);
  errno = kept;
}

/// Waits for SIGTERM, SIGINT or, if requested, the end of standard input. Passes each line of the input on.
void wait_for_the_end(bool watch_input, const std::function<void(const std::string& line)>& take) {
  std::string input;
  for (;;) {
    std::array<pollfd, 2> both{{{wake_pipe[0], POLLIN, 0}, {watch_input ? STDIN_FILENO : -1, POLLIN, 0}}};
    if (poll(both.data(), both.size(), -1) < 0)
      continue;  // interrupted: the signal handler wrote to the pipe
    if (both[0].revents != 0) return;
    if (both[1].revents == 0) continue;
    std::array<char, 65536> piece;
    const ssize_t count = read(STDIN_FILENO, piece.data(), piece.size());
    if (count <= 0) return;
    input.append(piece.data(), static_cast<std::size_t>(count));
    for (std::size_t end; (end = input.find('\n')) != std::string::npos; input.erase(0, end + 1))
      take(input.substr(0, end));
  }
}

std::pair<std::string, std::string> split_at(const std::string& text, char separator,
                                             const std::string& what) {
  const auto at = text.rfind(separator);
  if (at == std::string::npos)
    throw std::invalid_argument(what + ": \"" + text + "\" has no '" + separator + "'");
  return {text.substr(0, at), text.substr(at + 1)};
}

stand_in::run_ref parse_run(const std::string& text) {
  const auto [front, id] = split_at(text, '/', "--run ENTITY/PROJECT/RUN");
  const auto [entity, project] = split_at(front, '/', "--run ENTITY/PROJECT/RUN");
  if (entity.empty() || project.empty() || id.empty()) throw std::invalid_argument("--run: an empty part");
  return {entity, project, id};
}

std::string shell_quoted(const std::string& text) {
  std::string out = "'";
  for (const char c : text) out += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return out + "'";
}

/// Writes a temporary file and renames it, so that a reader never sees a partial file.
void write_whole(const std::filesystem::path& file, const std::string& text) {
  const std::filesystem::path beside = file.string() + ".part";
  {
    std::ofstream out(beside, std::ios::binary);
    if (!(out << text << std::flush)) throw std::runtime_error("cannot write " + beside.string());
  }
  std::filesystem::rename(beside, file);
}

/// Returns a string member of a JSON object, or nothing if the member is null or missing.
std::optional<std::string> text_in(const nlohmann::json& object, const char* name) {
  const auto found = object.find(name);
  if (found == object.end() || found->is_null()) return std::nullopt;
  return found->get<std::string>();
}

/// Adds runs, for example
///   {"ENTITY/PROJECT/RUN": {"public": true, "files": {"NAME": {"text": "...", "md5": "0", "sizeBytes": null}}}}
/// "text", or "generate" (a number of pseudo-random bytes), is the content of a file. The other members replace fields of the
/// file's GraphQL node: "md5", "sizeBytes", "updatedAt", "url", "directUrl", "mimetype". "md5_as": "hex" changes the md5's form.
/// "absent" lists the fields that the node leaves out: "md5", "sizeBytes".
void add_runs(stand_in::server& server, const nlohmann::json& runs) {
  for (const auto& [name, content] : runs.items()) {
    const stand_in::run_ref asked = parse_run(name);
    const auto run = server.add_run(asked.entity, asked.project, asked.id, content.value("public", false));
    for (const auto& [file, given] : content.at("files").items()) {
      stand_in::file_attributes says;
      says.md5 = text_in(given, "md5");
      says.url = text_in(given, "url");
      says.direct_url = text_in(given, "directUrl");
      says.mimetype = given.value("mimetype", says.mimetype);
      if (given.contains("updatedAt")) says.updated_at = text_in(given, "updatedAt");
      if (given.contains("md5") && given["md5"].is_null()) says.md5_as = stand_in::md5_form::null;
      if (given.value("md5_as", "") == "hex") says.md5_as = stand_in::md5_form::hex;
      if (const auto size = given.find("sizeBytes"); size != given.end()) {
        if (size->is_null()) says.size_as = stand_in::size_form::null;
        if (size->is_string()) says.size_as = stand_in::size_form::string;
        if (size->is_number()) says.size = size->get<std::uint64_t>();
      }
      for (const std::string& field : given.value("absent", std::vector<std::string>())) {
        if (field == "md5") says.md5_as = stand_in::md5_form::absent;
        if (field == "sizeBytes") says.size_as = stand_in::size_form::absent;
      }
      const auto bytes = given.contains("generate")
                             ? stand_in::generated(given["generate"].get<std::uint64_t>())
                             : stand_in::bytes(given.at("text").get<std::string>());
      server.add_file(run, file, bytes, says);
    }
  }
}

/// The conversation of --control, over standard output and input; one JSON object a line.
class control {
 public:
  explicit control(stand_in::server& server) : server_(server) {}

  /// Asks for the address of a file, and waits for the answer. Empty once the input has ended.
  std::string ask(const stand_in::run_ref& run, const std::string& name) {
    const std::lock_guard<std::mutex> one_question(asking_);
    std::unique_lock<std::mutex> held(mutex_);
    answer_.reset();
    say({{"address_of", name}, {"run", run.entity + "/" + run.project + "/" + run.id}});
    changed_.wait(held, [&] { return answer_ || is_over_; });
    return answer_.value_or("");
  }
  void take(const std::string& line) {
    const std::lock_guard<std::mutex> held(mutex_);
    const auto command = nlohmann::json::parse(line);
    if (command.contains("address")) {
      answer_ = command["address"].get<std::string>();
      changed_.notify_all();
    } else {
      add_runs(server_, command.at("runs"));
      say({{"done", true}});
    }
  }
  void end() {
    const std::lock_guard<std::mutex> held(mutex_);
    is_over_ = true;
    changed_.notify_all();
  }

 private:
  static void say(const nlohmann::json& what) { std::cout << what.dump() << std::endl; }

  stand_in::server& server_;
  std::mutex asking_, mutex_;  // mutex_ guards the rest, and standard output
  std::condition_variable changed_;
  std::optional<std::string> answer_;
  bool is_over_ = false;
};

const std::map<std::string, stand_in::redirect>& redirect_names() {
  using stand_in::redirect;
  static const std::map<std::string, redirect> names = {{"absolute", redirect::absolute},
                                                        {"relative", redirect::relative},
                                                        {"chain", redirect::chain},
                                                        {"loop", redirect::loop},
                                                        {"none", redirect::none}};
  return names;
}

struct arguments {
  std::string folder, run = "stand-in/project/run1", runs_file, ca_file, env_file;
  std::optional<std::string> default_entity;
  std::vector<std::string> generate, faults;
  bool is_public = false, plain = false, until_input_ends = false, control = false;
  stand_in::options server;
};

int serve(arguments& given) {
  if (given.plain) given.server.service_tls = given.server.storage_tls = false;
  const stand_in::run_ref asked = parse_run(given.run);
  given.server.viewer_entity = given.default_entity.value_or(asked.entity);
  if (given.server.viewer_entity->empty()) given.server.viewer_entity.reset();
  stand_in::server server(given.server);
  const auto run = server.add_run(asked.entity, asked.project, asked.id, given.is_public);
  if (!given.folder.empty()) server.load_folder(run, given.folder);
  for (const auto& text : given.generate) {
    const auto [name, size] = split_at(text, '=', "--generate NAME=SIZE");
    std::uint64_t bytes = 0;
    if (!CLI::detail::lexical_cast(size, bytes))
      throw std::invalid_argument("--generate: no size \"" + size + '"');
    server.add_file(run, name, stand_in::generated(bytes));
  }
  if (!given.runs_file.empty()) {
    std::ifstream in(given.runs_file, std::ios::binary);
    add_runs(server, nlohmann::json::parse(in));
  }
  for (const auto& spec : given.faults) server.add_fault(spec);

  std::string ca;
  if (!given.plain) {
    const bool own = given.ca_file.empty();
    const auto file =
        own ? std::filesystem::temp_directory_path() / ("wandb-stand-in-" + std::to_string(getpid()) + ".pem")
            : std::filesystem::path(given.ca_file);
    ca = std::filesystem::absolute(file).string();
    write_whole(ca, server.ca_pem());
  }
  const std::string key = given.is_public ? "" : server.key();
  if (!given.env_file.empty()) {
    std::string text = "export WANDB_BASE_URL=" + shell_quoted(server.base_url()) + "\n";
    if (!ca.empty()) text += "export SSL_CERT_FILE=" + shell_quoted(ca) + "\n";
    if (!key.empty()) text += "export WANDB_API_KEY=" + shell_quoted(key) + "\n";
    write_whole(given.env_file, text);
  }
  std::cout << "base_url=" << server.base_url() << "\nstorage=" << server.storage_url() << "\nca=" << ca
            << "\nkey=" << key << "\n";
  if (given.server.proxy) std::cout << "proxy=" << server.proxy_url() << "\n";

  control commands(server);
  if (given.control) {
    server.set_addresses(
        [&](const stand_in::run_ref& of, const std::string& name) { return commands.ask(of, name); });
  }
  std::cout << "ready" << std::endl;
  wait_for_the_end(given.until_input_ends || given.control, [&](const std::string& line) {
    if (given.control) commands.take(line);
  });
  commands.end();
  server.stop();
  if (!ca.empty() && given.ca_file.empty()) std::filesystem::remove(ca);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  arguments given;
  CLI::App app("A stand-in for the Weights & Biases service, on 127.0.0.1, which misbehaves on demand.");
  app.footer("--fault " + stand_in::fault_notation());
  app.add_option("--folder", given.folder, "serve the files below it")->check(CLI::ExistingDirectory);
  app.add_option("--run", given.run, "ENTITY/PROJECT/RUN that they belong to")->capture_default_str();
  app.add_option("--generate", given.generate, "NAME=SIZE: a file of pseudo-random bytes; repeatable")
      ->allow_extra_args(false);
  app.add_option("--runs", given.runs_file,
                 "a JSON file of runs, their files, and fields of the files' nodes")
      ->check(CLI::ExistingFile);
  app.add_option("--default-entity", given.default_entity,
                 "default entity of the account; empty: none; default: the entity of --run");
  app.add_flag("!--no-node-for-missing", given.server.node_for_missing,
               "answer no node for a missing name; default: a node whose md5 is \"0\"");
  app.add_option("--unknown-field", given.server.unknown_fields,
                 "a GraphQL field that this server, being older, refuses; repeatable")
      ->allow_extra_args(false);
  app.add_option("--redirect", given.server.redirect_to, "where /files/... leads")
      ->transform(CLI::CheckedTransformer(redirect_names()));
  app.add_option(
         "--host", given.server.more_hosts,
         "a name that the certificate covers; the proxy takes its port 443 to the service; repeatable")
      ->allow_extra_args(false);
  app.add_option("--service-url", given.server.service_url,
                 "what the service calls itself, e.g. https://api.example.test");
  app.add_option("--storage-url", given.server.storage_url,
                 "what the storage calls itself, e.g. https://store.example.test");
  auto* const key = app.add_option("--key", given.server.key, "the API key that is good");
  app.add_flag("--public", given.is_public, "the run needs no key")->excludes(key);
  app.add_option("--identity-token", given.server.identity_tokens, "a JWT that /oidc/token takes; repeatable")
      ->allow_extra_args(false);
  app.add_option("--port", given.server.service_port, "of the service; 0: any");
  app.add_option("--storage-port", given.server.storage_port, "of the storage; 0: any");
  app.add_flag("--plain", given.plain, "HTTP in place of HTTPS");
  app.add_option("--ca", given.ca_file, "write the CA certificate there (default: a temporary file)");
  app.add_option("--prefix", given.server.prefix, "of every path of the service, e.g. /wandb");
  app.add_option("--env", given.env_file,
                 "write a shell file that exports WANDB_BASE_URL, SSL_CERT_FILE, WANDB_API_KEY");
  app.add_option("--rate", given.server.body_rate, "bytes per second of each file body");
  app.add_option("--global-rate", given.server.global_rate, "bytes per second of all of them together");
  app.add_option("--signature-uses", given.server.signature_uses,
                 "a signed address is good for so many requests");
  app.add_flag("--proxy", given.server.proxy, "be a forward proxy too, to this stand-in alone");
  app.add_option("--fault", given.faults, "what goes wrong, see below; repeatable")->allow_extra_args(false);
  app.add_flag("--until-input-ends", given.until_input_ends, "stop at the end of standard input too");
  app.add_flag("--control", given.control,
               "/files/... leads to addresses from outside. For each redirect, standard output gets a line "
               "{\"address_of\": NAME, \"run\": RUN}, and standard input must answer {\"address\": URL}. A "
               "line {\"runs\": {...}} of "
               "the input adds runs and files as --runs does, and is answered with {\"done\": true}. Ends "
               "with the input.");
  CLI11_PARSE(app, argc, argv);

  if (pipe(wake_pipe.data()) != 0) return EXIT_FAILURE;
  for (const int end : wake_pipe) {
    fcntl(end, F_SETFD, FD_CLOEXEC);
    fcntl(end, F_SETFL, fcntl(end, F_GETFL) | O_NONBLOCK);
  }
  struct sigaction how {};
  how.sa_handler = wake;
  sigaction(SIGTERM, &how, nullptr);
  sigaction(SIGINT, &how, nullptr);
  try {
    return serve(given);
  } catch (const std::exception& error) {
    std::cerr << "wandb-stand-in: " << error.what() << "\n";
    return 2;
  }
}
