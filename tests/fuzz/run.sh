#!/usr/bin/env bash
# Fuzzes the header with libFuzzer, under the address and undefined behaviour sanitizers. Needs clang++ and its runtime
# (Debian: clang libclang-rt-14-dev), OpenSSL and nlohmann/json.
#
#   tests/fuzz/run.sh [--seconds N | --executions N] [--fast] [--add] [TARGET...]
#
#   --seconds     time for each target (default: 20)
#   --executions  executions of all targets together; a whole restore counts for twenty other ones
#   --fast        without sanitizers: whole restores run four times as often
#   --add         adds inputs that reach new code, whatever the number of times, to the committed corpus (tests/fuzz/corpus)
#
# Prints a line for each target, and fails if one ends a run. An input that does so is left in build-fuzz.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

seconds=20 executions='' add='' fast='' targets=()
while [ $# != 0 ]; do
  case $1 in
    --seconds) seconds=$2; shift 2 ;;
    --executions) executions=$2; shift 2 ;;
    --add) add=yes; shift ;;
    --fast) fast=yes; shift ;;
    -h | --help) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "$0"; exit 0 ;;
    -*) echo "tests/fuzz/run.sh: unknown argument $1; see --help" >&2; exit 2 ;;
    *) targets+=("$1"); shift ;;
  esac
done

build=build-fuzz
mkdir -p "$build"
program=$build/fuzz sanitizers=(-fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -O1)
[ -z "$fast" ] || program=$build/fuzz-fast sanitizers=(-fsanitize=fuzzer -O2)
if [ ! -e "$program" ] || [ -n "$(find wandb_restore.hpp tests/fuzz -name '*.[hc]pp' -newer "$program")" ]; then
  "${CLANGXX:-clang++}" -std=c++17 -g1 "${sanitizers[@]}" -I. tests/fuzz/fuzz.cpp \
    -o "$program" -lssl -lcrypto -pthread -ldl
fi
mapfile -t known < <(grep -o '{"[a-z_]*"' tests/fuzz/all_targets.hpp | tr -d '{"')
[ ${#targets[@]} != 0 ] || targets=("${known[@]}")

# The share of a target in the executions, in proportion to its speed.
share_of() { case $1 in restore_ranges) echo 1 ;; restore | graphql | response | records | resume | settings) echo 50 ;; *) echo 200 ;; esac; }
sum=0
for target in "${targets[@]}"; do sum=$((sum + $(share_of "$target"))); done

total=0 failed=0
printf '%-16s %12s %8s %8s  %s\n' target executions seconds inputs found
for target in "${targets[@]}"; do
  limit=(-max_total_time="$seconds")
  [ -z "$executions" ] || limit=(-runs="$((executions * $(share_of "$target") / sum))")
  mkdir -p "$build/$target" "tests/fuzz/corpus/$target"
  log=$build/$target.log began=$SECONDS status=0
  # The library keeps threads and static objects: leaks are looked for by the unit tests.
  WANDB_FUZZ_TARGET=$target "$program" "${limit[@]}" -detect_leaks=0 -entropic=0 -print_funcs=0 -print_final_stats=1 -timeout=20 \
    -max_len=4096 -artifact_prefix="$build/$target-" "$build/$target" "tests/fuzz/corpus/$target" > "$log" 2>&1 || status=$?
  ran=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
  total=$((total + ${ran:-0}))
  found=nothing
  if [ $status != 0 ]; then
    failed=1
    found=$(sed -n 's/.*\(does not hold.*\|SUMMARY: .*\|runtime error.*\)/\1/p' "$log" | head -1)
  fi
  printf '%-16s %12s %8s %8s  %s\n' "$target" "${ran:-0}" $((SECONDS - began)) "$(find "$build/$target" -type f | wc -l)" "$found"
  if [ -n "$add" ] && [ $status = 0 ]; then
    WANDB_FUZZ_TARGET=$target "$program" -merge=1 -use_counters=0 -detect_leaks=0 -max_len=600 "tests/fuzz/corpus/$target" "$build/$target" \
      > "$log" 2>&1
  fi
done
printf '%-16s %12s\n' all "$total"
exit $failed
