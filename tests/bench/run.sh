#!/usr/bin/env bash
# Measures the library against curl and aria2c, side by side: nginx serves, over TLS; everything runs on this machine.
#
#   tests/bench/run.sh [SIZE] [--rounds N] [--only CASE,...] [--out DIR] [--work DIR]
#
#   SIZE      of the main case's file, 1G unless given; the other cases' files follow it
#   --rounds  how often each contender takes its turn, 3 unless given; medians count
#   --only    some of: capped far slow-peer link loopback small memory keep refresh kills herd
#   --kills   how many processes the case `kills` kills, 100 unless given
#   --before  a folder with the programs of another version (its build-bench), which take their turns beside these
#   --out     where results.md, results.svg and results.json go, build-bench unless given
#   --work    where files are served from and restored to, /dev/shm unless given; about six times SIZE is needed
#
# The network namespaces of the case `link` need root. Installs nothing: what is missing is named.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

for argument; do
  case $argument in
    -h | --help) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "$0"; exit 0 ;;
  esac
done

missing=()
for tool in cmake c++ python3 nginx curl aria2c openssl; do
  PATH=$PATH:/usr/sbin:/sbin command -v "$tool" > /dev/null || missing+=("$tool")
done
if [ ${#missing[@]} != 0 ]; then
  echo "tests/bench/run.sh needs ${missing[*]}." >&2
  echo "On Debian and Ubuntu: cmake g++ python3 nginx-light curl aria2 openssl, and what tests/run.sh installs." >&2
  exit 1
fi

build='build-bench'
generator=()
if [ ! -e "$build/CMakeCache.txt" ] && command -v ninja > /dev/null; then generator=(-G Ninja); fi
mkdir -p "$build"
{
  cmake -S tests/bench -B "$build" "${generator[@]}" && cmake --build "$build" --parallel "$(nproc)"
} > "$build/build.log" 2>&1 || { cat "$build/build.log" >&2; exit 1; }

PATH=$PATH:/usr/sbin:/sbin PYTHONDONTWRITEBYTECODE=1 exec python3 tests/bench/bench.py --programs "$build" "$@"
