#!/usr/bin/env bash
# Measures the time to include the header, and its size in a program. The two parts of a pair are measured alternately, so
# that other load slows both; the result is the median of the ratios.
#
#   tests/matrix/measure.sh [RUNS]     default: 5 runs
#
# CXX selects the compiler.
set -euo pipefail
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cxx=${CXX:-c++}
runs=${1:-5}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch"

milliseconds() { # of processor time
  local user system
  { TIMEFORMAT='%U %S'; time "$@" > /dev/null; } 2> time.txt || { cat time.txt >&2; return 1; }
  read -r user system < <(tail -1 time.txt)
  awk -v u="$user" -v s="$system" 'BEGIN { printf "%d\n", (u + s) * 1000 }'
}
median() { sort -n | awk '{ a[NR] = $0 } END { print a[int((NR + 1) / 2)] }'; }

compare() { # WHAT LIMIT EXTRA-MS OURS THEIRS FLAG...
  local what=$1 limit=$2 extra=$3 ours=$4 theirs=$5 i
  shift 5
  : > pairs.txt
  for ((i = 0; i < runs; ++i)); do
    echo "$(milliseconds "$cxx" -std=c++17 "$@" -I"$top" "$ours")" \
      "$(milliseconds "$cxx" -std=c++17 "$@" -I"$top" "$theirs")" >> pairs.txt
  done
  awk '{ printf "%.4f %d %d\n", $1 / $2, $1, $2 }' pairs.txt | median |
    awk -v what="$what" -v limit="$limit" -v extra="$extra" '{
      verdict = $1 <= limit || $2 <= $3 + extra ? "ok" : "TOO MUCH"
      printf "%s: %.2f times, such as %d ms against %d ms (at most %s) %s\n", what, $1, $2, $3, limit, verdict
    }'
}

header=$top/wandb_restore.hpp
# The declarations include the standard headers that stand above the beginning of the implementation.
sed '/implementation from here on/q' "$header" | grep -E '^#include <[a-z_]+>' > standard.cpp
printf '#define WANDB_RESTORE_SPLIT\n#include "wandb_restore.hpp"\n' > split.cpp
printf '#include <openssl/ssl.h>\n#include <nlohmann/json.hpp>\n' > libraries.cpp
printf '#include "wandb_restore.hpp"\n' > full.cpp

compare "include in split mode, -O0, against its standard headers alone" 1.25 150 split.cpp standard.cpp -O0 -c -o include.o
compare "include in full mode, -fsyntax-only, against openssl/ssl.h and json.hpp alone" 1.5 0 full.cpp libraries.cpp -fsyntax-only

# A minimal program with a transport in memory.
cat > small.cpp <<'CODE'
#include "wandb_restore.hpp"
struct memory {
  wandb::result<wandb::http_response> send(const wandb::http_request& request, wandb::body_sink& sink) {
    wandb::http_response head;
    head.status = 200;
    const char* text = request.method == "POST"
        ? "{\"data\":{\"project\":{\"run\":{\"files\":{\"edges\":[{\"node\":{\"url\":\"http://m/a\",\"sizeBytes\":3}}]}}}}}" : "abc";
    if (!sink.start(head) || !sink.write(text)) return wandb::error(wandb::errc::cancelled, "stopped");
    return head;
  }
};
int main() {
  wandb::settings settings;
  settings.base_url = "http://m";
  wandb::client<memory> client(settings, memory{});
  auto file = client.try_restore("a", "e/p/r");
  return file && file->get() == 'a' ? 0 : 1;
}
CODE
size_of() { # WHAT FLAG...
  local what=$1
  shift
  "$cxx" -std=c++17 -Os -s -DWANDB_RESTORE_NO_OPENSSL -I"$top" "$@" small.cpp -o small -pthread
  rm -rf a
  ./small || { echo "$what: the program fails"; return 1; }
  echo "$what: $(($(stat -c %s small) / 1024)) KiB (aim: under 300 KiB)"
}
size_of "stripped program over a Transport in memory, -Os"
size_of "the same with -ffunction-sections -fdata-sections -Wl,--gc-sections" -ffunction-sections -fdata-sections -Wl,--gc-sections
size_of "the same without exceptions and RTTI" -ffunction-sections -fdata-sections -Wl,--gc-sections -fno-exceptions -fno-rtti
