// wandb-restore: restores files of Weights & Biases runs to local disk, verified and resumable.
//
//   wandb-restore model-best.h5 --run-path entity/project/run_id
//   wandb-restore 'checkpoints/*.pt' --newest --wait 600 --run-path entity/project/run_id
//   wandb-restore --list '*.ckpt' --run-path entity/project/run_id --json
//
// Prints the local path of each restored file to standard output, one per line (with --json: one object per line, and one of
// totals after the files of a pattern), and everything else to standard error. `exit_status` maps failures to exit statuses.
//
// Needs CLI11 2.1 or later, and the dependencies of wandb_restore.hpp.
// SPDX-License-Identifier: MIT
#include "wandb_restore.hpp"

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <filesystem>
#include <iterator>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#ifdef _WIN32
#ifndef NOMINMAX
#define NOMINMAX
#endif
#include <windows.h>
// after windows.h
#include <io.h>
#include <shellapi.h>
#else
#include <sys/ioctl.h>
#include <unistd.h>
#endif

namespace {

// ---- exit statuses and help -------------------------------------------------------------------------------

constexpr int status_done = 0;
constexpr int status_usage = 2;
constexpr int status_not_found = 3;
constexpr int status_disk = 7;
constexpr int status_interrupted = 130;

int exit_status(wandb::errc code) {
  switch (code) {
    case wandb::errc::invalid_argument:
    case wandb::errc::invalid_run_path: return status_usage;
    case wandb::errc::run_not_found:
    case wandb::errc::file_not_found: return status_not_found;
    case wandb::errc::not_authenticated:
    case wandb::errc::permission_denied: return 4;
    case wandb::errc::offline:
    case wandb::errc::connection_failed:
    case wandb::errc::http_failure: return 5;
    case wandb::errc::protocol_violation:
    case wandb::errc::checksum_mismatch: return 6;
    case wandb::errc::disk_failure: return status_disk;
    case wandb::errc::local_conflict: return 8;
    case wandb::errc::cancelled: return status_interrupted;
  }
  return 1;
}

constexpr const char* help_footer =
    "NAMEs are paths inside the run. A NAME that contains * or ?, or ends in /, is a pattern: * matches\n"
    "any text, including /; ? matches one character; a final / matches all files below. Quote patterns,\n"
    "or the shell replaces them. A failure of one NAME does not stop the others. The exit status is that\n"
    "of the first failure, or 130 after an interrupt.\n"
    "\n"
    "The key and the default entity, project and run come from the same sources as in the Python SDK:\n"
    "WANDB_API_KEY, WANDB_BASE_URL, WANDB_ENTITY, WANDB_PROJECT, WANDB_RUN_ID, settings files, netrc.\n"
    "Without a key, the service hides private runs: exit status 3.\n"
    "\n"
    "Examples:\n"
    "  wandb-restore model-best.h5 --run-path entity/project/run_id\n"
    "  wandb-restore 'checkpoints/' --exclude '*.optim' --dry-run\n"
    "  wandb-restore 'checkpoints/*.pt' --newest --wait 3600\n"
    "  wandb-restore '*'                             all files of the current run\n"
    "\n"
    "Exit status: 0 done; 1 none of the failures below, such as a lack of memory; 2 bad arguments or run\n"
    "path; 3 no such run or file; 4 not authenticated or not permitted; 5 network, HTTP or offline;\n"
    "6 checksum or protocol; 7 disk; 8 the local copy was restored from another run, or is another file\n"
    "of the run; 130 interrupted: the next call resumes the download.";

// ---- the platform -----------------------------------------------------------------------------------------

/// Set by the first Ctrl-C or SIGTERM. The library polls it.
std::atomic<bool> interrupted{false};
static_assert(std::atomic<bool>::is_always_lock_free, "a signal handler needs this");

extern "C" void on_interrupt(int) {
  if (interrupted.exchange(true)) std::_Exit(status_interrupted);  // the second signal exits at once
}

#ifdef _WIN32

/// Returns the arguments in UTF-8, independent of the code page, without the program's name.
std::vector<std::string> utf8_arguments(int, char**) {
  std::vector<std::string> arguments;
  int count = 0;
  wchar_t** wide = CommandLineToArgvW(GetCommandLineW(), &count);
  for (int i = 1; wide != nullptr && i < count; ++i) {
    arguments.emplace_back();
    for (const char c : std::filesystem::path(wide[i]).u8string()) arguments.back() += c;
  }
  LocalFree(wide);
  return arguments;
}

std::filesystem::path utf8_path(const std::string& text) {
  const int size = static_cast<int>(text.size());
  std::wstring wide(text.size(), L'\0');  // UTF-16 has at most as many units as UTF-8 has bytes
  wide.resize(
      static_cast<std::size_t>(MultiByteToWideChar(CP_UTF8, 0, text.data(), size, wide.data(), size)));
  return wide;
}

bool stderr_is_terminal() { return _isatty(_fileno(stderr)) != 0; }

std::size_t terminal_width() {
  CONSOLE_SCREEN_BUFFER_INFO info;
  if (!GetConsoleScreenBufferInfo(GetStdHandle(STD_ERROR_HANDLE), &info)) return 80;
  return static_cast<std::size_t>(info.srWindow.Right - info.srWindow.Left + 1);
}

void prepare_process() {
  std::signal(SIGINT, on_interrupt);
  std::signal(SIGTERM, on_interrupt);
  static const UINT code_page = GetConsoleOutputCP();  // the console keeps its code page after this program
  SetConsoleOutputCP(CP_UTF8);
  std::atexit([] { SetConsoleOutputCP(code_page); });
}

#else

std::vector<std::string> utf8_arguments(int argc, char** argv) {
  return {argv + (argc > 0 ? 1 : 0), argv + argc};
}

std::filesystem::path utf8_path(const std::string& text) { return text; }

/// Whether standard error is a terminal on which a line can be drawn again.
bool stderr_is_terminal() {
  const char* const kind = std::getenv("TERM");
  return isatty(STDERR_FILENO) != 0 && !(kind != nullptr && std::strcmp(kind, "dumb") == 0);
}

std::size_t terminal_width() {
  winsize size{};
  return ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
}

void prepare_process() {
  (void)std::signal(SIGINT, on_interrupt);
  (void)std::signal(SIGTERM, on_interrupt);
  if (std::signal(SIGHUP, on_interrupt) == SIG_IGN) (void)std::signal(SIGHUP, SIG_IGN);  // nohup
  (void)std::signal(SIGPIPE, SIG_IGN);  // `print` reports a closed pipe
  (void)std::signal(SIGXFSZ, SIG_IGN);  // a write beyond the file size limit then fails with EFBIG
}

#endif

std::string utf8_text(const std::filesystem::path& path) {
  std::string text;
  for (const auto unit : path.u8string()) text += static_cast<char>(unit);  // char, or since C++20 char8_t
  return text;
}

/// Returns the name without "." parts and doubled slashes.
std::string plain_name(const std::string& name) {
  std::string text;
  for (const auto unit : utf8_path(name).lexically_normal().generic_u8string())
    text += static_cast<char>(unit);
  return text;
}

// ---- text -------------------------------------------------------------------------------------------------

/// Replaces control characters by '?': names and messages may come from a server and must not control the terminal.
std::string printable(std::string_view text, bool keep_newlines = false) {
  std::string safe(text);
  for (char& c : safe) {
    const auto byte = static_cast<unsigned char>(c);
    if ((byte < 0x20 || byte == 0x7f) && !(keep_newlines && c == '\n')) c = '?';
  }
  return safe;
}

bool continues_character(char c) { return (static_cast<unsigned char>(c) & 0xC0U) == 0x80U; }  // in UTF-8

/// Returns an upper bound of the columns on a terminal: characters from U+1000 on count as wide.
std::size_t columns(std::string_view text) {
  std::size_t count = 0;
  for (const char c : text) {
    if (!continues_character(c)) count += static_cast<unsigned char>(c) < 0xE1 ? 1 : 2;
  }
  return count;
}

/// Shortens a name to `width` columns. Keeps the end, which says more than the beginning.
std::string shortened(std::string name, std::size_t width) {
  if (columns(name) <= width) return name;
  const std::string_view mark = width > 8 ? "..." : "";
  std::size_t start = 0;
  while (start < name.size() && (continues_character(name[start]) ||
                                 columns(std::string_view(name).substr(start)) > width - mark.size())) {
    ++start;
  }
  return name.replace(0, start, mark);
}

std::string padded(const std::string& text, std::size_t width) {
  return std::string(width - std::min(width, columns(text)), ' ') + text;
}

/// A unit for amounts of bytes.
struct unit {
  const char* name;
  double bytes;
};
unit unit_for(double bytes) {
  const char* const names[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  unit found{names[0], 1};
  for (std::size_t i = 1; i < std::size(names) && bytes >= 999.5 * found.bytes; ++i)
    found = {names[i], found.bytes * 1024};
  return found;
}

/// Returns e.g. "694" or "52.1", in the given unit: at most four characters.
std::string number(double bytes, unit in) {
  char text[32];
  const double value = bytes / in.bytes;
  (void)std::snprintf(text, sizeof text, in.bytes > 1 && value < 99.95 ? "%.1f" : "%.0f", value);
  return text;
}

/// "694 MiB"
std::string amount(double bytes) {
  const unit in = unit_for(bytes);
  return number(bytes, in) + ' ' + in.name;
}

/// "0:07", "1:02:03"
std::string clock_time(double seconds) {
  const auto whole = static_cast<long long>(std::ceil(seconds));
  char text[64];
  if (whole < 3600) {
    (void)std::snprintf(text, sizeof text, "%lld:%02lld", whole / 60, whole % 60);
  } else {
    (void)std::snprintf(text, sizeof text, "%lld:%02lld:%02lld", whole / 3600, whole / 60 % 60, whole % 60);
  }
  return text;
}

/// "3.2 s", "1:02"
std::string duration(double seconds) {
  if (seconds >= 60) return clock_time(seconds);
  char text[32];
  (void)std::snprintf(text, sizeof text, "%.1f s", seconds);
  return text;
}

/// Returns the text with the ASCII letters in lower case.
std::string lower(std::string text) {
  for (char& c : text)
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  return text;
}

bool is_pattern(std::string_view name) {
  return name.find_first_of("*?") != std::string_view::npos || (!name.empty() && name.back() == '/');
}

// ---- standard error: messages, and a progress line on a terminal ------------------------------------------

/// A part of the progress line.
struct item {
  std::string wide, narrow;  // narrow: for terminals where the wide forms do not fit
  int importance;            // the least important item is left out first
};

/// Returns the items for a progress report. Their widths hardly change during a download, so that the line is steady.
std::vector<item> items_of(const wandb::progress& now) {
  const auto done = static_cast<double>(now.bytes_done);
  const auto total = static_cast<double>(now.bytes_total.value_or(0));
  std::vector<item> items;
  if (now.bytes_total) {
    const double part = total > 0 ? std::min(done / total, 1.0) : 1;
    const std::string percent = padded(std::to_string(static_cast<int>(part * 100)) + '%', 4);
    items.push_back({percent, percent, 5});
  }
  if (now.files_total > 1) {
    const std::string files = std::to_string(now.files_total);
    const std::string count = padded(std::to_string(now.files_done), files.size()) + '/' + files;
    items.push_back({count + " files", count, 4});
  }
  if (now.bytes_total) {
    const unit in = unit_for(total);
    const std::string wide = padded(number(done, in), 4) + '/' + amount(total);
    items.push_back({wide, padded(number(done, in), 4) + '/' + number(total, in) + in.name, 3});
  } else {
    items.push_back({padded(amount(done), 8), padded(amount(done), 8), 3});
  }
  if (now.phase == wandb::phase::verifying) {
    items.push_back({"verifying", "verifying", 2});
    return items;
  }
  const double rate = now.bytes_per_second;
  const unit in = unit_for(rate);
  items.push_back({padded(rate > 0 ? amount(rate) + "/s" : "-", 10),
                   padded(rate > 0 ? number(rate, in) + in.name + "/s" : "-", 8), 1});
  if (now.bytes_total) {
    const double seconds = rate > 0 ? (total - done) / rate : 0;
    const std::string left = rate > 0 && seconds < 360000 ? clock_time(seconds) : "-";
    items.push_back({padded(left, 7) + " left", padded(left, 4), 2});
  }
  return items;
}

/// Returns e.g. "ckpt/best.h5  [#######-----]   61%   423/694 MiB  54.1 MiB/s     0:05 left" for one file, and for several
/// " 61%  12/40 files   423/694 MiB  54.1 MiB/s     0:05 left  ckpt/best.h5". To fit into `width` columns, the items take
/// their narrow forms, then items are left out; the name is shortened, and left out of the line for several files.
std::string status_line(const wandb::progress& now, std::size_t width) {
  const bool has_many = now.files_total > 1;
  std::string name = printable(now.name);
  const std::size_t for_name = has_many ? 0 : std::min(columns(name), width / 4) + 1;
  std::vector<item> items = items_of(now);
  const auto joined = [&items](bool wide) {
    std::string line;
    for (const item& i : items) line += (line.empty() ? "" : wide ? "  " : " ") + (wide ? i.wide : i.narrow);
    return line;
  };
  bool wide = true;
  std::string facts = joined(wide);
  if (facts.size() + for_name + (has_many ? 0 : 1) > width) facts = joined(wide = false);
  while (facts.size() + for_name > width && items.size() > 1) {
    items.erase(std::min_element(items.begin(), items.end(),
                                 [](const item& a, const item& b) { return a.importance < b.importance; }));
    facts = joined(wide);
  }
  const std::string gap(wide ? 2 : 1, ' ');
  const std::size_t room = width - std::min(width, facts.size() + gap.size());  // for name and bar
  const std::size_t least_name = has_many ? 12 : 1;
  if (room < least_name) return facts.size() <= width ? facts : std::string();
  name = shortened(std::move(name), room);

  std::string bar;
  const std::size_t spare = room - columns(name);
  if (now.bytes_total && spare >= 14) {
    const std::size_t size = std::min<std::size_t>(spare - 4, 30);
    const auto total = static_cast<double>(*now.bytes_total);
    const double part = total > 0 ? std::min(static_cast<double>(now.bytes_done) / total, 1.0) : 1;
    const auto filled = static_cast<std::size_t>(part * static_cast<double>(size));
    bar = '[' + std::string(filled, '#') + std::string(size - filled, '-') + ']';
  }
  if (!has_many) return name + (bar.empty() ? "" : "  " + bar) + gap + facts;
  return bar + (bar.empty() ? "" : gap) + facts + gap + name;
}

class console {
 public:
  /// `waits`: whether --wait is given.
  console(bool with_warnings, bool with_progress, bool waits)
      : warnings_(with_warnings), progress_(with_progress), waits_(waits) {}

  bool shows_progress() const { return progress_; }

  void error(std::string_view text) { say(text); }
  /// Prints a message once, however often it is given.
  void advise(const std::string& text) {
    if (std::exchange(advice_, text) != text) say(text);
  }
  /// Prints a message unless --quiet is given.
  void note(std::string_view text) {
    if (warnings_) say(text);
  }
  void warning(std::string_view text) {
    if (warnings_) say("warning: " + std::string(text));
  }

  /// Draws the line over the previous one.
  void progress(const wandb::progress& now) {
    if (!progress_) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    const std::size_t width = terminal_width() - 1;  // the last column may wrap
    const std::size_t room = width - std::min(width, echo);
    const std::string line = is_idle(now) ? idle_line(now, room) : status_line(now, room);
    // Spaces move the cursor, and the echo is to begin where the line ends: they cover it only once it may be there.
    const std::size_t before =
        std::min(drawn_ + (interrupted ? echo : 0), width);  // the terminal may have shrunk
    write('\r' + line + std::string(before - std::min(before, columns(line)), ' '));
    drawn_ = columns(line);
  }

  /// Clears the progress line.
  void clear() {
    if (!progress_) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    write(erased());
  }
  /// Replaces the progress line by a final line. On a narrow terminal the facts take their short form, and then the name is
  /// shortened.
  void finish(const std::string& name, std::string facts, const std::string& short_facts) {
    if (!progress_) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    const std::size_t width = terminal_width() - 1;
    std::string shown = printable(name);
    if (columns(shown) + 2 + facts.size() > width) facts = short_facts;
    const std::size_t room = width - std::min(width, facts.size() + 2);
    shown = room == 0 ? "" : shortened(std::move(shown), room) + "  ";
    write(erased() + shown + facts + '\n');
  }

 private:
  void say(std::string_view text) {
    const std::lock_guard<std::mutex> lock(mutex_);
    write(erased() + "wandb-restore: " + printable(text, true) + '\n');
  }
  std::string erased() {
    if (drawn_ == 0) return {};
    const std::size_t count = std::min(std::exchange(drawn_, 0) + echo, terminal_width() - 1);
    return '\r' + std::string(count, ' ') + '\r';
  }
  /// Whether no file has been found yet, or the file may be still to come.
  bool is_idle(const wandb::progress& now) {
    const bool is_idle =
        now.files_total == 0 || (waits_ && now.bytes_done == 0 && now.bytes_total.value_or(0) == 0);
    if (!is_idle) {
      idle_since_.reset();
    } else if (!idle_since_) {
      idle_since_ = clock::now();
    }
    return is_idle;
  }
  std::string idle_line(const wandb::progress& now, std::size_t width) const {
    const double seconds = std::chrono::duration<double>(clock::now() - *idle_since_).count();
    const std::string tail = (waits_ ? "waiting " : "listing ") + padded(clock_time(seconds), 7);
    std::string name = printable(now.name);
    if (tail.size() > width) return {};
    if (name.empty() || tail.size() + 3 > width) return tail;
    return shortened(std::move(name), width - tail.size() - 2) + "  " + tail;
  }
  static void write(const std::string& text) { (void)std::fwrite(text.data(), 1, text.size(), stderr); }

  static constexpr std::size_t echo = 2;  // columns behind the line, for the ^C that a terminal echoes

  std::mutex mutex_;  // guards the members: warnings may come from other threads than progress
  std::size_t drawn_ = 0;
  std::string advice_;
  bool warnings_, progress_, waits_;
  using clock = std::chrono::steady_clock;
  std::optional<clock::time_point> idle_since_;
};

// ---- standard output --------------------------------------------------------------------------------------

/// Writes a line and flushes it, so that the reader of a pipe can use the file at once.
bool print(std::string line, console& out) {
  line += '\n';
  if (std::fwrite(line.data(), 1, line.size(), stdout) == line.size() && std::fflush(stdout) == 0)
    return true;
  out.error(std::string("cannot write to standard output: ") + std::strerror(errno));
  return false;
}

using json = nlohmann::ordered_json;  // keeps the order of fields

std::string text_of(const json& object) {
  return object.dump(-1, ' ', false, json::error_handler_t::replace);
}

json unless_empty(const std::string& text) { return text.empty() ? json(nullptr) : json(text); }

const char* name_of(wandb::source source) {
  switch (source) {
    case wandb::source::downloaded: return "downloaded";
    case wandb::source::local: return "local";
    case wandb::source::store: return "store";
  }
  return "unknown";
}

// ---- restoring and listing --------------------------------------------------------------------------------

struct arguments {
  std::vector<std::string> names, exclude;
  std::string run_path, root;
  bool replace = false, refresh = false, list = false, as_json = false, quiet = false, no_progress = false;
  bool newest = false, dry_run = false, show_settings = false;
  int connections = wandb::restore_options{}.connections;
  std::optional<double> timeout;    // seconds
  double wait = 0;                  // seconds
  std::filesystem::path directory;  // root, or else the run's directory
};

int report(const wandb::error& failure, console& out) {
  out.error(failure.what());
  return exit_status(failure.code());
}

/// How long something took.
class stopwatch {
 public:
  double seconds() const { return std::chrono::duration<double>(clock::now() - begin_).count(); }

 private:
  using clock = std::chrono::steady_clock;
  const clock::time_point begin_ = clock::now();
};

double in_milliseconds(double seconds) { return std::round(seconds * 1000) / 1000; }

std::chrono::milliseconds duration_of(double seconds) {
  return std::chrono::ceil<std::chrono::milliseconds>(std::chrono::duration<double>(seconds));
}

/// The outcome of restore_all for a file that was restored alone.
wandb::restored_entry entry_of(const std::string& name, const wandb::restored_file& file, double seconds) {
  wandb::restored_entry entry;
  entry.name = name;
  entry.path = file.path();
  entry.size = file.size();
  entry.md5 = file.md5();
  entry.source = file.source();
  entry.verified = file.verified();
  entry.time = std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::duration<double>(seconds));
  return entry;
}

/// Prints the line of a restored file.
bool print(const wandb::restored_entry& file, const arguments& given, console& out) {
  const std::string path = utf8_text(file.path);
  if (!given.as_json) return print(path, out);
  return print(text_of({{"name", file.name},
                        {"path", path},
                        {"size", file.size},
                        {"md5", unless_empty(file.md5)},
                        {"source", name_of(file.source)},
                        {"verified", file.verified},
                        {"seconds", in_milliseconds(std::chrono::duration<double>(file.time).count())}}),
               out);
}

wandb::restore_options options_of(const arguments& given, console& out) {
  wandb::restore_options options;
  options.run_path = given.run_path;
  options.root = utf8_path(given.root);
  options.replace = given.replace;
  if (given.refresh) options.cache = wandb::cache_policy::refresh();
  options.connections = given.connections;
  options.wait = duration_of(given.wait);
  options.exclude = given.exclude;
  options.cancel = &interrupted;
  if (out.shows_progress()) {
    options.on_progress = [&out](const wandb::progress& now) { return out.progress(now), true; };
  }
  return options;
}

/// Reports a failure, and says which option helps. Returns the exit status.
int report(const wandb::error& failure, const arguments& given, console& out) {
  const int status = report(failure, out);
  if (failure.code() == wandb::errc::local_conflict)
    out.advise("--replace or --refresh replaces the local copy; --root DIR stores the file elsewhere");
  if (given.run_path.empty() && failure.code() == wandb::errc::invalid_run_path) {
    const bool like_one = given.names.size() > 1 && wandb::run_path::parse(given.names.back()).has_value();
    out.advise("name the run with --run-path " +
               (like_one ? given.names.back() : std::string("entity/project/run_id")));
  }
  return status;
}

/// What a call with patterns has done.
struct totals {
  std::size_t files = 0, downloaded = 0, failed = 0;
  std::uint64_t bytes = 0;  // downloaded

  void add(const totals& more) {
    files += more.files;
    downloaded += more.downloaded;
    failed += more.failed;
    bytes += more.bytes;
  }
};

/// Whether --json ends with an object of totals: the number of lines is not known beforehand.
bool has_totals(const arguments& given) {
  return !given.newest && std::any_of(given.names.begin(), given.names.end(), is_pattern);
}

/// Restores one file, or with --newest the last changed one of a pattern. Returns the exit status.
int restore_file(wandb::client<>& client, const std::string& name, const arguments& given, totals& sum,
                 console& out) {
  const wandb::restore_options options = options_of(given, out);
  const stopwatch time;
  auto file = given.newest ? client.try_restore_newest(name, options) : client.try_restore(name, options);
  if (!file) return report(file.error(), given, out);

  wandb::restored_entry entry = entry_of(name, *file, time.seconds());
  if (given.newest) {
    const auto& root = given.directory;
    const auto relative = root.empty() ? file->path() : file->path().lexically_relative(root);
    entry.name.clear();
    for (const auto unit : relative.generic_u8string()) entry.name += static_cast<char>(unit);
  }
  const std::string verified = entry.verified ? ", verified" : ", not verified";
  if (entry.source == wandb::source::downloaded) {
    sum.downloaded = 1;
    sum.bytes = entry.size;
    const std::string facts =
        amount(static_cast<double>(entry.size)) + " in " + duration(time.seconds()) + verified;
    out.finish(entry.name, facts, facts);
  } else {
    out.finish(entry.name, "local copy kept" + verified, "kept" + verified);
  }
  return print(entry, given, out) ? status_done : status_disk;
}

/// Restores the files that match a pattern. Returns the exit status.
int restore_matches(wandb::client<>& client, const std::string& pattern, const arguments& given, totals& sum,
                    console& out) {
  const stopwatch time;
  const auto restored = client.try_restore_all(pattern, options_of(given, out));
  if (!restored) return report(restored.error(), given, out);

  out.clear();  // before lines on standard output, which may be the same terminal
  int status = status_done;
  totals here;
  here.files = restored->files.size();
  for (const wandb::restored_entry& file : restored->files) {
    if (file.failure) {
      ++here.failed;
      // The failure that ended the call is that of each file that was left: it is told once.
      const bool is_told =
          restored->failure && std::string_view(file.failure->what()) == restored->failure->what();
      const int failure = is_told ? exit_status(file.failure->code()) : report(*file.failure, given, out);
      if (status == status_done) status = failure;
      continue;
    }
    if (file.source == wandb::source::downloaded) ++here.downloaded, here.bytes += file.size;
    if (!print(file, given, out)) return status == status_done ? status_disk : status;
  }
  sum.add(here);
  if (restored->failure) {
    const bool is_interrupted = restored->failure->code() == wandb::errc::cancelled;
    if (is_interrupted) out.error("interrupted; the next call fetches only what is missing");
    const int failure = is_interrupted ? status_interrupted : report(*restored->failure, given, out);
    if (status == status_done || failure == status_interrupted) status = failure;
  }
  const std::string files =
      std::to_string(here.files - here.failed) + " of " + std::to_string(here.files) + " files, ";
  if (here.downloaded == 0 && here.failed == 0) {
    out.finish(pattern, files + "local copies kept", files + "local copies kept");
  } else {
    const std::string bytes = files + amount(static_cast<double>(here.bytes));
    const std::string seconds = " in " + duration(time.seconds());
    out.finish(pattern, bytes + " downloaded" + seconds, bytes + seconds);
  }
  return status;
}

/// Restores the files of every NAME. After a failure it continues with the next. With --json and a pattern among the
/// NAMEs, a last object has the totals. Returns the exit status.
int restore_files(wandb::client<>& client, const arguments& given, console& out) {
  const stopwatch time;
  int status = status_done;
  totals sum;
  for (const std::string& name : given.names) {
    int failure = status_done;
    if (is_pattern(name) && !given.newest) {
      failure = restore_matches(client, name, given, sum, out);
    } else {
      totals one;
      one.files = 1;
      failure = restore_file(client, name, given, one, out);
      if (failure != status_done) one.failed = 1;
      sum.add(one);
    }
    if (status == status_done || failure == status_interrupted) status = failure;
    if (failure == status_interrupted) break;
  }
  if (!given.as_json || !has_totals(given)) return status;
  const json object = {{"files", sum.files},
                       {"downloaded", sum.downloaded},
                       {"local", sum.files - sum.downloaded - sum.failed},
                       {"failed", sum.failed},
                       {"bytes", sum.bytes},
                       {"seconds", in_milliseconds(time.seconds())}};
  const bool is_printed = print(text_of({{"totals", object}}), out);
  return is_printed || status != status_done ? status : status_disk;
}

/// Whether --exclude leaves out a file that a pattern matches.
bool is_excluded(const std::string& name, const arguments& given) {
  return std::any_of(given.exclude.begin(), given.exclude.end(),
                     [&name](const std::string& pattern) { return wandb::matches_pattern(name, pattern); });
}

/// Says why no file is chosen for a NAME. `excluded`: the number of files that match, but are left out. Returns the exit status.
int report_no_match(const std::string& name, std::size_t excluded, const arguments& given, console& out) {
  const std::string run = given.run_path.empty() ? std::string("the current run") : given.run_path;
  if (excluded > 0) {
    out.error("the files of " + run + " that match \"" + name + "\" (" + std::to_string(excluded) +
              ") are all excluded");
  } else {
    out.error("no file of " + run + " matches \"" + name + "\": --list without a NAME shows all files");
  }
  return status_not_found;
}

/// A restore without its downloads: prints a line for each file that would be downloaded, and reports the failures that can be
/// known without a download.
class dry_run {
 public:
  dry_run(const wandb::settings& settings, const arguments& given, console& out)
      : settings_(settings), client_(settings), offline_(without_requests(settings)), given_(given),
        out_(out) {}

  /// Returns the exit status.
  int operator()() {
    int status = status_done;
    for (const std::string& name : given_.names) {
      const int failure = is_pattern(name) || given_.newest ? add_matches(name) : add_file(name);
      if (status == status_done || failure == status_interrupted) status = failure;
      if (failure == status_interrupted || listing_failure_) break;
    }
    if (given_.as_json && has_totals(given_)) {
      const bool is_printed = print(text_of({{"totals", {{"files", count_}, {"bytes", bytes_}}}}), out_);
      if (!is_printed && status == status_done) status = status_disk;
    }
    out_.note(std::to_string(count_) + (count_ == 1 ? " file, " : " files, ") +
              amount(static_cast<double>(bytes_)) + " would be downloaded");
    return status;
  }

 private:
  static wandb::settings without_requests(wandb::settings settings) {
    settings.offline = true;
    return settings;
  }

  /// The state of a file's place on this machine.
  struct local_state {
    std::optional<wandb::error> failure;    // of a restore
    std::optional<wandb::local_copy> copy;  // if there is one
  };

  wandb::restore_options options() const {
    wandb::restore_options options = options_of(given_, out_);
    options.on_progress = nullptr;
    return options;
  }
  bool keeps() const { return !given_.replace && !given_.refresh; }

  /// Returns the failure of a restore that makes no request, unless it is the lack of a request.
  template <class Restored>
  static std::optional<wandb::error> failure_of(const Restored& restored) {
    if (restored || restored.error().code() == wandb::errc::offline) return std::nullopt;
    return restored.error();
  }

  /// Looks at the place of a file. Changes nothing: the policy never keeps a copy, because a restore that does may remove old
  /// hidden files beside it.
  local_state look_at(const std::string& name) {
    local_state seen;
    wandb::restore_options without_keeping = options();
    without_keeping.replace = false;
    without_keeping.cache =
        wandb::cache_policy([&seen](const wandb::local_copy& copy, const wandb::file_info*) {
          seen.copy = copy;
          return wandb::cache_policy::verdict::fetch;
        });
    seen.failure = failure_of(offline_.try_restore(name, without_keeping));
    // The library tells whether a copy that was restored from elsewhere is a local_conflict.
    if (!seen.failure && seen.copy && keeps() && is_from_elsewhere(name, *seen.copy))
      seen.failure = failure_of(offline_.try_restore(name, options()));
    return seen;
  }
  bool is_from_elsewhere(const std::string& name, const wandb::local_copy& copy) const {
    if (!copy.restored_from) return false;
    const std::string current = given_.run_path.empty() ? settings_.run_id : std::string();
    const auto run = wandb::run_path::parse(given_.run_path, {settings_.entity, settings_.project, current});
    return !run || *run != *copy.restored_from || name != copy.restored_name;
  }

  /// Returns the run's files. Asks the service once; reports its failure. Null after a failure.
  const std::vector<wandb::file_info>* files() {
    if (!files_) {
      auto listed = client_.try_list_files(options());
      if (listed) {
        files_ = *std::move(listed);
      } else {
        listing_failure_ = report(listed.error(), given_, out_);
      }
    }
    return files_ ? &*files_ : nullptr;
  }

  int add_file(const std::string& name) {
    const local_state place = look_at(name);
    if (place.failure) return report(*place.failure, given_, out_);
    if (place.copy && keeps()) return status_done;  // as in a restore, the service is not asked
    const auto* const all = files();
    if (all == nullptr) return *listing_failure_;
    const std::string plain = plain_name(name);
    const wandb::file_info* found = nullptr;
    for (const wandb::file_info& file : *all) {
      if (file.name == name || (file.name == plain && found == nullptr)) found = &file;
    }
    return found != nullptr ? add(*found, place) : report_no_match(name, 0, given_, out_);
  }

  int add_matches(const std::string& pattern) {
    const auto refused = given_.newest ? failure_of(offline_.try_restore_newest(pattern, options()))
                                       : failure_of(offline_.try_restore_all(pattern, options()));
    if (refused) return report(*refused, given_, out_);
    const auto* const all = files();
    if (all == nullptr) return *listing_failure_;
    int status = status_done;
    const wandb::file_info* newest = nullptr;
    std::size_t matches = 0, excluded = 0;
    std::map<std::string, std::string> names;  // without regard to case
    for (const wandb::file_info& file : *all) {
      if (!wandb::matches_pattern(file.name, pattern)) continue;
      ++matches;
      if (is_excluded(file.name, given_)) {
        ++excluded;
      } else if (given_.newest) {
        if (newest == nullptr || newest->updated_at <= file.updated_at) newest = &file;
      } else {
        const auto [other, is_new] = names.emplace(lower(plain_name(file.name)), file.name);
        const int failure =
            is_new ? add(file, look_at(file.name)) : report_namesake(file.name, other->second);
        if (status == status_done) status = failure;
      }
    }
    if (newest != nullptr) return add(*newest, look_at(newest->name));
    return matches > excluded ? status : report_no_match(pattern, excluded, given_, out_);
  }
  int report_namesake(const std::string& name, const std::string& other) {
    if (name == other) return status_done;  // a list that changes between two pages may have a file twice
    out_.error("cannot restore \"" + name + "\": some file systems do not distinguish its name from \"" +
               other + "\", another file of the run; restore it by its own name");
    return status_usage;
  }

  /// Prints a line for the file, if it would be downloaded. Returns the exit status of the file.
  int add(const wandb::file_info& file, const local_state& place) {
    if (place.failure) return report(*place.failure, given_, out_);
    if (place.copy && keeps()) return status_done;
    if (place.copy && given_.refresh &&
        wandb::cache_policy::refresh()(*place.copy, &file) == wandb::cache_policy::verdict::keep) {
      return status_done;
    }
    ++count_;
    bytes_ += file.size.value_or(0);
    const std::string path = utf8_text(given_.directory / utf8_path(file.name));
    const std::string line = given_.as_json ? text_of({{"name", file.name},
                                                       {"path", path},
                                                       {"size", file.size ? json(*file.size) : json(nullptr)},
                                                       {"md5", unless_empty(file.md5)}})
                                            : (file.size ? std::to_string(*file.size) : "-") + '\t' + path;
    return print(line, out_) ? status_done : status_disk;
  }

  const wandb::settings& settings_;
  wandb::client<> client_;
  wandb::client<>
      offline_;  // makes no request: the library checks names, roots and local files before it needs one
  const arguments& given_;
  console& out_;
  std::optional<std::vector<wandb::file_info>> files_;
  std::optional<int> listing_failure_;  // an exit status
  std::size_t count_ = 0;
  std::uint64_t bytes_ = 0;
};

/// Lists the files that match any pattern. A pattern without a match is reported as file_not_found.
int list_files(wandb::client<>& client, const arguments& given, console& out) {
  wandb::restore_options options;
  options.run_path = given.run_path;
  options.cancel = &interrupted;
  const auto files = client.try_list_files(options);
  if (!files) return report(files.error(), given, out);

  struct uses {
    std::size_t listed = 0, excluded = 0;  // files that match
  };
  std::vector<uses> used(given.names.size());
  for (const wandb::file_info& file : *files) {
    const bool excluded = is_excluded(file.name, given);
    bool wanted = given.names.empty();
    for (std::size_t i = 0; i < given.names.size(); ++i) {
      if (!wandb::matches_pattern(file.name, given.names[i])) continue;
      wanted = true;
      ++(excluded ? used[i].excluded : used[i].listed);
    }
    if (!wanted || excluded) continue;
    std::string line;
    if (given.as_json) {
      line = text_of({{"name", file.name},
                      {"size", file.size ? json(*file.size) : json(nullptr)},
                      {"md5", unless_empty(file.md5)},
                      {"mimetype", unless_empty(file.mimetype)},
                      {"updated_at", unless_empty(file.updated_at)}});
    } else {
      line = (file.size ? std::to_string(*file.size) : "-") + '\t' +
             (file.updated_at.empty() ? "-" : printable(file.updated_at)) + '\t' + printable(file.name);
    }
    if (!print(std::move(line), out)) return status_disk;
  }

  int status = status_done;
  for (std::size_t i = 0; i < used.size(); ++i) {
    if (used[i].listed == 0) status = report_no_match(given.names[i], used[i].excluded, given, out);
  }
  return status;
}

/// Prints every setting, its value and the source of the value. Returns the exit status.
int show_settings(const wandb::settings& settings, const arguments& given, console& out) {
  for (const wandb::shown_setting& setting : settings.shown()) {
    const std::string source = setting.source == "program" ? "command line" : setting.source;
    const std::string line =
        given.as_json
            ? text_of({{"name", setting.name}, {"value", unless_empty(setting.value)}, {"source", source}})
            : printable(setting.name) + '\t' + (setting.value.empty() ? "-" : printable(setting.value)) +
                  '\t' + printable(source);
    if (!print(line, out)) return status_disk;
  }
  for (const std::string& warning : settings.warnings) out.warning(warning);
  return settings.problem ? report(*settings.problem, out) : status_done;
}

int run(int argc, char** argv) {
  arguments given;
  CLI::App app{"Restores files of Weights & Biases runs: verified, resumable.", "wandb-restore"};
  app.footer(help_footer);
  app.failure_message([](const CLI::App*, const CLI::Error& failure) {
    return "wandb-restore: " + printable(failure.what()) + "\nwandb-restore: see wandb-restore --help\n";
  });
  app.set_version_flag("--version", "wandb-restore " WANDB_RESTORE_VERSION);
  app.add_option("NAME", given.names, "Files of the run")->type_name("");
  app.add_option("--run-path", given.run_path,
                 "entity/project/run_id, or a run's address; default: the current run")
      ->type_name("PATH");
  app.add_flag("--replace", given.replace, "Download even if there is a local copy");
  app.add_flag("--refresh", given.refresh, "Download if the local copy differs from the run's file");
  app.add_option("--root", given.root, "Directory to store files under; default: the current one")
      ->type_name("DIR");
  app.add_option(
         "--exclude", given.exclude,
         "Of the files that match a pattern, leave out those that match this one; may be given several times")
      ->type_name("PATTERN")
      ->expected(1)
      ->take_all();
  app.add_flag("--newest", given.newest, "Of the files that match a NAME, only the one changed last");
  app.add_option("--wait", given.wait, "Wait for a file that the run has not uploaded yet; default: 0")
      ->type_name("SECONDS");
  app.add_flag("--dry-run", given.dry_run,
               "Print sizes and paths of what would be downloaded; download nothing");
  app.add_flag("--list", given.list, "List the run's files: size, time of the last change, name");
  app.add_flag("--json", given.as_json, "Print one JSON object per line");
  app.add_option("--connections", given.connections, "The maximum number of connections")
      ->capture_default_str()
      ->type_name("N");
  app.add_option("--timeout", given.timeout,
                 "End a connection that is slower than 1 KiB/s for this time, and retries after ten times as "
                 "long without progress; default: 30")
      ->type_name("SECONDS");
  app.add_flag("--show-settings", given.show_settings,
               "Print each setting, its value without secrets, and the source of the value");
  app.add_flag("-q,--quiet", given.quiet, "Print no warnings and no progress");
  app.add_flag("--no-progress", given.no_progress, "Print no progress");

  try {
    std::vector<std::string> words = utf8_arguments(argc, argv);
    std::reverse(words.begin(), words.end());  // CLI11 takes the arguments in reverse order
    app.parse(std::move(words));
    if (given.names.empty() && !given.list && !given.show_settings) {
      throw CLI::ValidationError(
          "a NAME is needed, for example: wandb-restore model-best.h5 --run-path entity/project/run_id");
    }
    if (given.replace && given.refresh) throw CLI::ExcludesError("--replace", "--refresh");
    if (given.list && (given.newest || given.dry_run || given.wait != 0)) {
      throw CLI::ExcludesError("--list", given.newest ? "--newest" : given.dry_run ? "--dry-run" : "--wait");
    }
    if (given.dry_run && given.wait != 0) throw CLI::ExcludesError("--dry-run", "--wait");
    if (given.connections < 1) throw CLI::ValidationError("--connections", "must be at least 1");
    constexpr double longest = 1e6;  // eleven days
    if (given.timeout && !(*given.timeout > 0 && *given.timeout <= longest)) {
      throw CLI::ValidationError("--timeout", "must be more than 0 and at most 1000000 seconds");
    }
    if (!(given.wait >= 0 && given.wait <= 100 * longest)) {
      throw CLI::ValidationError("--wait", "must be at least 0 and at most 100000000 seconds");
    }
  } catch (const CLI::ParseError& stop) {
    return app.exit(stop) == 0 ? status_done : status_usage;  // --help and --version throw, too
  }

  console out(!given.quiet, !given.quiet && !given.no_progress && stderr_is_terminal(), given.wait > 0);
  wandb::settings settings = wandb::settings::from_environment();
  settings.on_warning = [&out](std::string_view text) { out.warning(text); };
  if (given.timeout) {
    const auto limit = duration_of(*given.timeout);
    settings.connect_timeout = settings.idle_timeout = limit;
    settings.retry_timeout = 10 * limit;
  }

  if (given.show_settings) return show_settings(settings, given, out);
  given.directory = given.root.empty() ? settings.run_dir : utf8_path(given.root);
  if (given.dry_run) return dry_run(settings, given, out)();
  wandb::client<> client(std::move(settings));
  return given.list ? list_files(client, given, out) : restore_files(client, given, out);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    prepare_process();
    return run(argc, argv);
  } catch (const std::exception& failure) {  // for example std::bad_alloc
    (void)std::fprintf(stderr, "wandb-restore: %s\n", failure.what());
    return 1;
  }
}
