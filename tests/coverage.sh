#!/usr/bin/env bash
# Measures the line coverage of wandb_restore.hpp with Clang's source-based coverage: runs the unit and integration tests, also those
# that kill processes, and a sample of the allocations that fail. Needs clang++, llvm-profdata and llvm-cov of one version
# (Debian: clang llvm).
#
#   tests/coverage.sh [--jobs N] [--keep] [--min PERCENT] [REGEX]
#
#   --jobs   tests that run at once (default: the number of processors)
#   --keep   adds to the counts of the last run; otherwise they start at 0
#   --min    fails below this coverage (default: 98.5)
#   REGEX    runs only the tests whose names match
#
# Prints each region that is left, with its reason from tests/coverage_left.txt, and the total. Counted are the lines with code of
# this system, also those of functions that no test calls or instantiates. Fails if a test fails or a line that is left has no
# reason.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

jobs=$(nproc) keep='' least=98.5 tests=.
while [ $# != 0 ]; do
  case $1 in
    --jobs) jobs=$2; shift 2 ;;
    --keep) keep=yes; shift ;;
    --min) least=$2; shift 2 ;;
    -h | --help) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "$0"; exit 0 ;;
    -*) echo "tests/coverage.sh: unknown argument $1; see --help" >&2; exit 2 ;;
    *) tests=$1; shift ;;
  esac
done

# shellcheck source-path=SCRIPTDIR source=../.ci/dependencies.sh
. .ci/dependencies.sh
install_missing "$to_build" "$to_test" "$to_measure"

build=$PWD/build-coverage
# All processes of a program count in one mapped file (%m, %c): so killed and forked ones count, too.
flags="-O0 -g1 -fprofile-instr-generate=$build/profiles/%m%c.profraw -fcoverage-mapping -mllvm -runtime-counter-relocation"
cmake -S . -B "$build" -G Ninja -DCMAKE_CXX_COMPILER="${CLANGXX:-clang++}" -DCMAKE_BUILD_TYPE=Debug "-DCMAKE_CXX_FLAGS=$flags" \
  -DWANDB_RESTORE_TESTS=ON -DWANDB_RESTORE_EXAMPLES=ON -DWANDB_RESTORE_TEST_MATRIX=OFF > "$build.log"
cmake --build "$build" --parallel "$jobs" >> "$build.log" 2>&1 || { cat "$build.log"; exit 1; }
[ -n "$keep" ] || rm -rf "$build/profiles"
status=0
(cd "$build" && TESTS_COUNT_COVERAGE=1 \
  ctest --label-regex unit --tests-regex "$tests" --parallel "$jobs" --no-tests=error --output-on-failure) || status=$?

llvm-profdata merge --sparse "$build"/profiles/*.profraw -o "$build/all.profdata"
programs=("$build/tests/wandb_restore_tests" "$build/tests/wandb_restore_allocations")
for program in "$build"/examples/*; do
  if [ -f "$program" ] && [ -x "$program" ]; then programs+=("$program"); fi
done
llvm-cov export -format=lcov -instr-profile="$build/all.profdata" "${programs[0]}" "${programs[@]/#/-object=}" \
  "$PWD/wandb_restore.hpp" > "$build/lines.lcov"
"${CLANGXX:-clang++}" -std=c++17 -I. -E -DWANDB_RESTORE_HTTPLIB -DCPPHTTPLIB_OPENSSL_SUPPORT -x c++ wandb_restore.hpp -o "$build/preprocessed"
python3 tests/coverage.py wandb_restore.hpp "$build/lines.lcov" "$build/preprocessed" tests/coverage_left.txt "$least" || status=$?
[ $status = 0 ] || echo "tests/coverage.sh: a test failed, or the coverage is below $least %, or a line has no reason" >&2
exit $status
