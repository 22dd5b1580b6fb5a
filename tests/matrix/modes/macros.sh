#!/usr/bin/env bash
# Checks that the header defines only macros whose names begin with WANDB_RESTORE_ (macros of included headers do not count), and
# that it declares no name in the global namespace.
#
#   macros.sh COMPILER FLAG...
set -euo pipefail
header=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)/wandb_restore.hpp
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# -dD keeps definitions in the preprocessed text. The line markers tell which file each definition is from.
echo '#include "wandb_restore.hpp"' > "$scratch/one.cpp"
"$@" -I"$(dirname "$header")" -E -dD "$scratch/one.cpp" | awk '
  /^# [0-9]+ "/ { ours = $3 ~ /wandb_restore\.hpp"$/; next }
  ours && /^#define / { sub(/\(.*/, "", $2); defined_[$2] = 1 }
  ours && /^#undef / { delete defined_[$2] }
  END { for (name in defined_) print name }' | grep -vE '^WANDB_RESTORE_' > "$scratch/macros" || true
if [ -s "$scratch/macros" ]; then
  echo "macros that leak: $(sort "$scratch/macros" | tr '\n' ' ')"
  exit 1
fi

# Every symbol of the header has wandb:: in its demangled name.
"$@" -I"$(dirname "$header")" -DWANDB_RESTORE_SPLIT -DWANDB_RESTORE_IMPLEMENTATION -c "$scratch/one.cpp" -o "$scratch/one.o"
leaked=$(nm -C --defined-only "$scratch/one.o" | awk '$2 ~ /^[TDBR]$/' | grep -vE 'wandb::|nlohmann::' || true)
if [ -n "$leaked" ]; then
  echo "names that leak: $leaked"
  exit 1
fi
echo ok
