#!/usr/bin/env bash
# Measures the library against curl and aria2c. nginx serves over TLS; servers and clients run on this machine.
#
#   tests/bench/run.sh [SIZE] [--rounds N] [--only CASE,...] [--before DIR] [--out DIR] [--work DIR]
#   tests/bench/run.sh --store [SIZE] [--rounds N] [--only CASE,...] [--out DIR] [--work DIR]
#
#   SIZE      size of the file in the main case (default: 1G); the other sizes are multiples and fractions of it
#   --rounds  number of runs of each contender (default: 3); the results are medians
#   --only    cases to run, from: capped far slow-peer link loopback small memory keep refresh kills herd
#   --kills   number of processes that the case `kills` kills (default: 100)
#   --store   one object of SIZE (default: 512M) from an object store (versitygw), against s5cmd, the client of AWS's CRT, the
#             Python SDK, curl and aria2c; then 1,000 small objects, and 40 of 24 MiB
#             cases for --only: store expiring many shards
#             installs the clients and the store into ~/.cache/wandb_restore-tests
#             writes store.md, store.svg and store.json
#   --before  folder with the programs of another version (its build-bench), which run in turn with these
#   --out     folder for results.md, results.svg and results.json (default: build-bench)
#   --work    folder for served and restored files (default: /dev/shm); needs about six times SIZE
#
# The case `link` needs root, for network namespaces. Without --store it installs nothing, and names missing programs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

store=
arguments=()
for argument; do
  case $argument in
    -h | --help) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "$0"; exit 0 ;;
    --store) store=yes ;;
    *) arguments+=("$argument") ;;
  esac
done

missing=()
for tool in cmake c++ python3 nginx curl aria2c openssl; do
  PATH=$PATH:/usr/sbin:/sbin command -v "$tool" > /dev/null || missing+=("$tool")
done
if [ ${#missing[@]} != 0 ]; then
  echo "tests/bench/run.sh needs ${missing[*]}." >&2
  echo "On Debian and Ubuntu: cmake g++ python3 nginx-light curl aria2 openssl, and the packages that tests/run.sh installs." >&2
  exit 1
fi

build='build-bench'
generator=()
if [ ! -e "$build/CMakeCache.txt" ] && command -v ninja > /dev/null; then generator=(-G Ninja); fi
mkdir -p "$build"
{
  cmake -S tests/bench -B "$build" "${generator[@]}" && cmake --build "$build" --parallel "$(nproc)"
} > "$build/build.log" 2>&1 || { cat "$build/build.log" >&2; exit 1; }

export PATH=$PATH:/usr/sbin:/sbin PYTHONDONTWRITEBYTECODE=1
[ -n "$store" ] || exec python3 tests/bench/bench.py --programs "$build" "${arguments[@]}"

# shellcheck source-path=SCRIPTDIR source=../tools.sh
. tests/tools.sh
install_missing "$to_build" "$to_store"
install_versitygw
install_sdk
install_store_clients
install_store_peers
programs=$build build=
build_programs
exec "$store_clients/bin/python" tests/bench/store.py --programs "$programs" --stand-in "$build/tests/wandb-stand-in" \
  --tools "$tools" --peers "$store_peers" --sdk "$sdk" "${arguments[@]}"
