#!/usr/bin/env bash
# Runs static and dynamic analysis beyond the sanitizers of tests/run.sh. Installs missing tools first (Debian, Ubuntu, Fedora).
#
#   tests/analysis.sh [--quick] [--build DIR] [tidy] [valgrind] [debug] [tsan] [analyzer]      (default: all)
#
#   tidy       clang-tidy with the checks of .clang-tidy (bugprone, cert, concurrency, clang-analyzer and others) over the header,
#              the stand-in server and the examples
#   valgrind   memcheck, with leaks, over the short unit tests
#   debug      the short unit tests with the checked containers and iterators of libstdc++ (_GLIBCXX_DEBUG)
#   tsan       the tests with threads under the thread sanitizer
#   analyzer   GCC's -fanalyzer over the sources in C. Not over the header: of C++, GCC 12 and 13 understand too little, and do
#              not come to an end in minutes.
#   --quick    the selection that tests/run.sh runs: tidy of the header alone, and fewer tests
#   --build    a build directory of CMake whose tests valgrind runs; otherwise they are built
#
# It works in build-analysis/. Fails at the first finding of a tool, and prints the seconds that each took.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

quick='' built='' tools=()
while [ $# != 0 ]; do
  case $1 in
    --quick) quick=yes; shift ;;
    --build) built=$2; shift 2 ;;
    tidy | valgrind | debug | tsan | analyzer) tools+=("$1"); shift ;;
    -h | --help) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "$0"; exit 0 ;;
    *) echo "tests/analysis.sh: unknown argument $1; see --help" >&2; exit 2 ;;
  esac
done
[ ${#tools[@]} != 0 ] || tools=(tidy valgrind debug tsan analyzer)

# shellcheck source-path=SCRIPTDIR source=../.ci/dependencies.sh
. .ci/dependencies.sh
install_missing "$to_build" "$to_test" "$to_measure"

# build NAME FLAGS TEST...: builds build-analysis/NAME/tests, a program of these unit tests. Sets `program`.
build() {
  local folder=build-analysis/$1 mode=$2 sources=() source split
  shift 2
  program=$folder/tests
  mkdir -p "$folder"
  sources=(tests/main.cpp tests/stand_in/stand_in.cpp packaging/wandb_restore.cpp)
  for source; do sources+=("tests/${source}_test.cpp"); done
  for source in "${sources[@]}"; do
    split=-DWANDB_RESTORE_SPLIT
    if grep -q wandb::detail "$source"; then split=''; fi # tests of internals include the whole header
    printf '%s\0' "-std=c++17 -g -I. -Itests -Itests/stand_in $mode $split -c $source -o $folder/$(basename "$source" .cpp).o"
  done | xargs -0 -n 1 -P "$(nproc)" sh -c 'exec c++ $0'
  # shellcheck disable=SC2086
  c++ $mode "$folder"/*.o -o "$program" -lssl -lcrypto -pthread -ldl
}

short=(digest_text disk netrc odr plan proxy run_path settings)

run_tidy() {
  local sources=(packaging/wandb_restore.cpp)
  [ -n "$quick" ] || sources+=(tests/stand_in/*.cpp examples/*.cpp)
  printf '%s\0' "${sources[@]}" | xargs -0 -n 1 -P "$(nproc)" sh -c \
    'exec clang-tidy --quiet "$0" -- -std=c++17 -I. -Itests/stand_in' 2> build-analysis/tidy.log ||
    { cat build-analysis/tidy.log; return 1; }
}

run_valgrind() {
  local tests=("${short[@]}")
  # The tests of the digest take minutes under valgrind, except in an optimised build.
  [ -z "$quick" ] || tests=(disk netrc plan proxy run_path settings)
  if [ -n "$built" ]; then
    program=$built/tests/wandb_restore_tests
  else
    build valgrind -O1 "${tests[@]}"
  fi
  local files
  files=$(printf '*/%s_test.cpp,' "${tests[@]}")
  valgrind --quiet --error-exitcode=1 --leak-check=full "$program" --source-file="${files%,}"
}

run_debug() {
  local tests=("${short[@]}")
  [ -z "$quick" ] || tests=(disk plan settings)
  build debug "-O0 -D_GLIBCXX_DEBUG -D_GLIBCXX_DEBUG_PEDANTIC" "${tests[@]}"
  "$program"
}

run_tsan() {
  local tests=(download restore restore_all transport)
  [ -z "$quick" ] || tests=(restore_all)
  build tsan "-O1 -fsanitize=thread" "${tests[@]}"
  TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1 "$program"
}

run_analyzer() { gcc -std=gnu11 -O1 -Wall -Wextra -Werror -fanalyzer -c tests/faults/shim.c -o /dev/null; }

mkdir -p build-analysis
for tool in "${tools[@]}"; do
  began=$SECONDS
  "run_$tool" || { echo "tests/analysis.sh: $tool found something" >&2; exit 1; }
  echo "$tool: nothing found, $((SECONDS - began)) s"
done
