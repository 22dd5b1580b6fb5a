#!/usr/bin/env bash
# Restores under failures: runs the programs of this directory whole (about an hour), and prints a line for each.
#
#   tests/faults/run.sh [--build DIR] [NAME [ARGUMENT...]]
#
#   allocations    every allocation fails in turn
#   system_calls   every system call fails in turn
#   kills          processes that restore one file are killed at random, 1,000 rounds
#   power_cut      the states that a file system may hold after a power cut
#
# DIR is a build directory of CMake (default: build). With a NAME, runs only this program, with its arguments: the head of NAME.cpp
# explains them. Exit status 1: a check failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

build=build
if [ "${1:-}" = --build ]; then
  build=$2
  shift 2
fi
programs=(allocations system_calls kills power_cut)
[ $# = 0 ] || programs=("$1")
[ -e "$build/CMakeCache.txt" ] || cmake -S . -B "$build" -DCMAKE_BUILD_TYPE=Release > /dev/null
cmake --build "$build" --target "${programs[@]/#/wandb_restore_}" > /dev/null
if [ $# != 0 ]; then
  shift
  exec "$build/tests/wandb_restore_${programs[0]}" "$@"
fi

lines=$(mktemp)
trap 'rm -f "$lines"' EXIT
failed=0
table=""
for name in "${programs[@]}"; do
  began=$SECONDS
  "$build/tests/wandb_restore_$name" | tee "$lines" || failed=1
  table+=$(printf '%-14s %4d s   %s' "$name" $((SECONDS - began)) "$(tail -n 1 "$lines")")$'\n'
done
printf '\n%s' "$table"
exit "$failed"
