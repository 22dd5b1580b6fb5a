#!/usr/bin/env bash
# Builds and runs every test, and prints the summary of ctest. Installs missing packages first (Debian, Ubuntu, Fedora).
#
#   tests/run.sh              runs the tests, then again under the address and undefined behaviour sanitizers
#   tests/run.sh --quick      runs the tests without sanitizers
#   tests/run.sh --sanitize   runs the tests under the sanitizers; --sanitize=thread selects another sanitizer
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

plain=yes
sanitizer=address,undefined
for argument; do
  case $argument in
    --quick) sanitizer= ;;
    --sanitize) plain= ;;
    --sanitize=*) plain='' sanitizer=${argument#*=} ;;
    -h | --help) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "$0"; exit 0 ;;
    *) echo "tests/run.sh: unknown argument $argument; see --help" >&2; exit 2 ;;
  esac
done

# shellcheck source-path=SCRIPTDIR source=../.ci/dependencies.sh
. .ci/dependencies.sh
install_missing "$to_build" "$to_test" "$to_store" "$to_measure"

jobs=$(nproc)
folders=()
build() { # FOLDER CMAKE-ARGUMENT...
  local folder=$1 generator=()
  shift
  [ -e "$folder/CMakeCache.txt" ] || generator=(-G Ninja)
  cmake -S . -B "$folder" "${generator[@]}" -DWANDB_RESTORE_TESTS=ON -DWANDB_RESTORE_WERROR=ON "$@"
  cmake --build "$folder" --parallel "$jobs"
  folders+=("$PWD/$folder")
}

if [ -n "$plain" ]; then
  build build -DWANDB_RESTORE_EXAMPLES=ON
fi
if [ -n "$sanitizer" ]; then
  # Tests that build other programs against the library do not depend on the sanitizer: the first build runs them. Of the examples
  # this build has the tool alone, which tests of the library start.
  # Assertions of libstdc++ check the use of its containers, too. _GLIBCXX_DEBUG would check more, but its types are other ones than
  # those of a compiled cpp-httplib: tests/analysis.sh builds tests with it. An optimised build takes four times as long, which its
  # tests do not make up for.
  build "build-${sanitizer//,/-}" -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG=-g1 -DCMAKE_CXX_FLAGS=-D_GLIBCXX_ASSERTIONS \
    -DWANDB_RESTORE_EXAMPLES=OFF -DWANDB_RESTORE_TOOL=ON "-DWANDB_RESTORE_SANITIZE=$sanitizer" \
    "-DWANDB_RESTORE_TEST_PREFIX=${sanitizer//,/-}." -DWANDB_RESTORE_TEST_MATRIX=OFF
fi

# One run of ctest covers all builds, so that one summary counts all tests.
mkdir -p build-all
printf 'subdirs("%s")\n' "${folders[@]}" > build-all/CTestTestfile.cmake
cd build-all
status=0
ctest --output-on-failure --no-tests=error --no-label-summary --parallel "$jobs" | tee output.txt || status=$?

# ctest shows the output of failed tests alone. Passed ones may have left cases out, and say why.
left_out=$(grep -hoE '(left out: .*|cannot keep this promise: .*)' Testing/Temporary/LastTest.log | sort | uniq -c || true)
if [ -n "$left_out" ]; then
  printf '\nLeft out (number of cases, reason):\n%s\n' "$left_out"
  sed -n '/tests passed/,$p' output.txt
fi
exit "$status"
