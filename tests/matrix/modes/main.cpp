// One program for every mode of the header. Restores over a transport in memory, and over the default transport from the server
// that the environment names (its file big.bin has 9,000,000 bytes). Prints "ok", and how it was compiled.
#include "shared.hpp"

namespace {

using matrix::check;
using matrix::memory_transport;
using matrix::scratch;
using wandb::errc;

std::string why(const wandb::error& failure) {
  return std::string(wandb::to_string(failure.code())) + ": " + failure.what();
}
template <class T>
std::string why(const wandb::result<T>& outcome) {
  return outcome ? "it succeeded" : why(outcome.error());
}

constexpr std::uint64_t megabytes = 9437185;  // not a multiple of anything
constexpr const char* md5_of_megabytes = "e2232f9a2943528d3d46ec800659a072";

bool is_generated(std::istream& stream, std::uint64_t size) {
  std::string buffer(65536, '\0');
  std::uint64_t at = 0;
  for (;;) {
    stream.read(buffer.data(), static_cast<std::streamsize>(buffer.size()));
    const auto count = static_cast<std::size_t>(stream.gcount());
    for (std::size_t i = 0; i < count; ++i, ++at) {
      if (buffer[i] != matrix::byte_at(at)) return false;
    }
    if (count < buffer.size()) return at == size;
  }
}

void restores_over_memory() {
  const scratch folder("memory");
  memory_transport::state state;
  state.files["big.bin"] = {megabytes, std::string(",\"md5\":\"") + md5_of_megabytes + '"'};
  state.files["wrong.bin"] = {70000, ",\"md5\":\"00000000000000000000000000000000\""};
  state.files["small.txt"] = {5, {}};
  state.files["empty"] = {0, ",\"md5\":\"1B2M2Y8AsgTpgAmY7PhCfg==\""};
  wandb::client<memory_transport> client(matrix::memory_settings(folder), memory_transport(state));

  std::uint64_t seen = 0;
  wandb::restore_options options;
  options.on_progress = [&](const wandb::progress& report) { return seen = report.bytes_done, true; };
  auto big = client.try_restore("big.bin", options);
  check(big.has_value(), "a file of many blocks", why(big));
  if (big) {
    check(big->verified() && big->size() == megabytes && is_generated(*big, megabytes), "its content");
    check(seen == megabytes && state.fetches > 1 && state.bytes < megabytes + megabytes / 2,
          "it came in ranges");
    check(big->source() == wandb::source::downloaded && big->path() == folder.where / "big.bin", "its facts");
  }
  const int questions = state.questions, fetches = state.fetches;
  auto again = client.try_restore("big.bin");
  check(again && again->source() == wandb::source::local && state.questions == questions,
        "a local copy asks nobody");
  options = {};
  options.cache = wandb::cache_policy::refresh();
  again = client.try_restore("big.bin", options);
  check(again && again->source() == wandb::source::local && again->verified() && state.fetches == fetches,
        "refresh keeps what has the service's md5", why(again));

  auto small = client.try_restore("small.txt", "entity/project/run", true);
  check(small && !small->verified() && is_generated(*small, 5), "a file without md5", why(small));
  auto empty = client.try_restore("empty");
  check(empty && empty->verified() && empty->size() == 0, "an empty file", why(empty));

  const auto names = folder.count();
  auto wrong = client.try_restore("wrong.bin");
  check(!wrong && wrong.error().code() == errc::checksum_mismatch, "a wrong md5", why(wrong));
  check(folder.count() == names, "leaves nothing");
  auto none = client.try_restore("none.txt");
  check(!none && none.error().is_not_found(), "a file that is not there", why(none));
  check(!client.try_restore("../none.txt"), "a name that escapes");
  check(!client.try_restore("\xff\xfe.txt"), "a name that is not UTF-8");
  auto listed = client.try_list_files();
  check(listed && listed->size() == 4, "a list of files", why(listed));

  std::atomic<bool> cancel{true};
  options = {};
  options.replace = true;
  options.cancel = &cancel;
  auto cancelled = client.try_restore("big.bin", options);
  check(!cancelled && cancelled.error().code() == errc::cancelled, "a cancelled restore", why(cancelled));
}

void reads_over_memory() {
  const scratch folder("remote");
  memory_transport::state state;
  state.files["big.bin"] = {megabytes, {}};
  auto opened = [&] {
    wandb::client<memory_transport> client(matrix::memory_settings(folder), memory_transport(state));
    return client.try_open("big.bin");
  }();
  check(opened && opened->size() == megabytes, "a remote file", why(opened));
  if (!opened) return;
  char part[3] = {};
  auto count = opened->try_read_at(megabytes - 2, part, sizeof part);
  check(count && *count == 2 && part[1] == matrix::byte_at(megabytes - 1), "its last bytes", why(count));
  auto stream = opened->stream();
  check(is_generated(stream, megabytes) && stream.eof() && !stream.bad(), "a stream on it");
  check(folder.count() == 0, "nothing on disk");

  stream = opened->stream();
  state.files.clear();
  stream.seekg(5000000);
  check(stream.get() == std::char_traits<char>::eof() && stream.bad() && stream.failure() != nullptr &&
            stream.failure()->code() == errc::connection_failed,
        "a stream that fails");
}

/// Malformed answers cause failures, and never a crash.
void survives_answers() {
  const scratch folder("answers");
  memory_transport::state state;
  const std::string nodes = "{\"data\":{\"project\":{\"run\":{\"files\":{\"edges\":[{\"node\":";
  for (const std::string& answer :
       {std::string("no JSON"), std::string("[]"), std::string("{\"data\":7}"), std::string("\xff\xfe{"),
        std::string(1, '\0'), std::string("{\"errors\":{}}"), std::string("{\"errors\":[{\"message\":[1]}]}"),
        std::string("{\"error\":1e999}"), nodes + "7}]}}}}}",
        nodes + "{\"name\":1,\"url\":2,\"md5\":[],\"sizeBytes\":-1.5}}]}}}}}",
        nodes + "{\"name\":\"a\",\"url\":\"http://memory.test/\\u0000\",\"sizeBytes\":\"x\"}}]}}}}}",
        std::string(100000, '[')}) {
    state.answer = answer;
    wandb::client<memory_transport> client(matrix::memory_settings(folder), memory_transport(state));
    auto file = client.try_restore("a");
    check(!file && file.error().what()[0] != '\0', "an answer that is of no use", answer.substr(0, 60));
    (void)client.try_list_files();
  }
}

void shares_types() {
  const scratch folder("elsewhere");
  auto file = matrix::restore_elsewhere(folder);
  check(file && file->size() == 10 && is_generated(*file, 10), "a file that another source restored",
        why(file));
#if WANDB_RESTORE_EXCEPTIONS
  bool caught = false;
  try {
    matrix::throw_elsewhere();
  } catch (const wandb::error& failure) {
    caught = failure.code() == errc::offline;
  }
  check(caught, "an error that another source throws");
  memory_transport::state state;
  wandb::client<memory_transport> client(matrix::memory_settings(folder), memory_transport(state));
  caught = false;
  try {
    (void)client.restore("none.txt");
  } catch (const std::runtime_error& failure) {
    caught = std::string_view(failure.what()).find("none.txt") != std::string_view::npos;
  }
  check(caught, "restore throws");
#endif
}

void restores_over_http() {
  const scratch folder("http");
  wandb::settings settings = wandb::settings::from_environment();
  settings.run_dir = folder.where;
  settings.cache_dir.clear();
  wandb::client<> client(settings);
  auto big = client.try_restore("big.bin", "stand-in/project/run1");
  check(big && big->size() == 9000000 && big->verified(), "a file over the default transport", why(big));
  auto none = client.try_restore("none.bin", "stand-in/project/run1");
  check(!none && none.error().code() == errc::file_not_found, "a file that the server does not have",
        why(none));

  settings.base_url = "http://127.0.0.1:1";
  settings.connect_timeout = settings.retry_timeout = std::chrono::milliseconds(100);
  auto refused = wandb::client<>(settings).try_restore("a.txt", "stand-in/project/run1");
  check(!refused && refused.error().code() == errc::connection_failed, "nobody listens", why(refused));
#ifdef WANDB_RESTORE_NO_OPENSSL
  settings.base_url = "https://127.0.0.1:1";
  auto secure = wandb::client<>(settings).try_restore("a.txt", "stand-in/project/run1");
  check(!secure && secure.error().code() == errc::invalid_argument, "https without OpenSSL", why(secure));
#endif
}

}  // namespace

int main() {
  restores_over_memory();
  reads_over_memory();
  survives_answers();
  shares_types();
  restores_over_http();
  if (matrix::failures == 0)
    std::printf("ok %s c++%ld\n", WANDB_RESTORE_VERSION, static_cast<long>(__cplusplus));
  return matrix::failures == 0 ? 0 : 1;
}
