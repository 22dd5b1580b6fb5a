#!/usr/bin/env bash
# Makes every system call of a restore fail in turn, and checks what is left each time: see system_calls.cpp. Takes about 20 minutes.
#
#   tests/faults/system_calls.sh [--build DIR] [--sample N] [--from-then-on] [--functions] [--each] [KIND...]
#
# DIR is a build directory of CMake (default: build). Ends with the numbers of calls that failed, of failures and of violations.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

build=build
if [ "${1:-}" = --build ]; then
  build=$2
  shift 2
fi
[ -e "$build/CMakeCache.txt" ] || cmake -S . -B "$build" -DCMAKE_BUILD_TYPE=Release > /dev/null
cmake --build "$build" --target wandb_restore_system_calls > /dev/null
exec "$build/tests/wandb_restore_system_calls" "$@"
