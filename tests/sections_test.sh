#!/usr/bin/env bash
# Checks that the map at the top of the header lists the header's sections in order.
set -euo pipefail
header=$(dirname "${BASH_SOURCE[0]}")/../wandb_restore.hpp

map=$(sed -n '/^\/\/ The sections, in order/,/^#ifndef/s/^\/\/   \([^ ].*[^ ]\)  .*/\1/p' "$header" | sed 's/  .*//')
rulers=$(sed -n 's/^\/\/ ====* \(.*\)$/\1/p' "$header")
[ -n "$map" ] || { echo "sections_test.sh: found no map at the top of the header" >&2; exit 1; }
if ! diff <(echo "$map") <(echo "$rulers"); then
  echo "sections_test.sh: the map at the top of the header (<) and its sections (>) differ" >&2
  exit 1
fi
echo "$(wc -l <<< "$map") sections, as the map says"
