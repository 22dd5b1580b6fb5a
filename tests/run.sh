#!/usr/bin/env bash
# Builds and runs every test, and ends with the summary of ctest. On a fresh Debian, Ubuntu or Fedora it installs what
# is missing first.
#
#   tests/run.sh              the tests, and again under the address and undefined behaviour sanitizers
#   tests/run.sh --quick      the first alone
#   tests/run.sh --sanitize   the second alone; --sanitize=thread for another sanitizer
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
install_missing "$to_build" "$to_test"

jobs=$(nproc)
folders=()
build() { # FOLDER CMAKE-ARGUMENT...
  local folder=$1 generator=()
  shift
  [ -e "$folder/CMakeCache.txt" ] || generator=(-G Ninja)
  cmake -S . -B "$folder" "${generator[@]}" -DWANDB_RESTORE_TESTS=ON -DWANDB_RESTORE_EXAMPLES=ON -DWANDB_RESTORE_WERROR=ON "$@"
  cmake --build "$folder" --parallel "$jobs"
  folders+=("$PWD/$folder")
}

if [ -n "$plain" ]; then
  build build
fi
if [ -n "$sanitizer" ]; then
  # What other programs do with the library is a matter of the first build alone.
  build "build-${sanitizer//,/-}" -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS=-O1 "-DWANDB_RESTORE_SANITIZE=$sanitizer" \
    "-DWANDB_RESTORE_TEST_PREFIX=${sanitizer//,/-}." -DWANDB_RESTORE_TEST_MATRIX=OFF
fi

# One run of ctest over all builds: one summary counts them all.
mkdir -p build-all
printf 'subdirs("%s")\n' "${folders[@]}" > build-all/CTestTestfile.cmake
cd build-all
exec ctest --output-on-failure --no-tests=error --no-label-summary --parallel "$jobs"
