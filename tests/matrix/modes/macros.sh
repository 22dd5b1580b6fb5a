#!/usr/bin/env bash
# Which macros the header leaves behind, beyond those of the headers that it includes: only such as begin with WANDB_RESTORE_.
# And which names, of those that its own text declares, are in the global namespace: none.
#
#   macros.sh COMPILER FLAG...
set -euo pipefail
header=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)/wandb_restore.hpp
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# -dD keeps definitions in the preprocessed text, between line markers that tell whose they are.
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

# What an object file defines, demangled: everything that comes from here has wandb:: in it.
"$@" -I"$(dirname "$header")" -DWANDB_RESTORE_SPLIT -DWANDB_RESTORE_IMPLEMENTATION -c "$scratch/one.cpp" -o "$scratch/one.o"
leaked=$(nm -C --defined-only "$scratch/one.o" | awk '$2 ~ /^[TDBR]$/' | grep -vE 'wandb::|nlohmann::' || true)
if [ -n "$leaked" ]; then
  echo "names that leak: $leaked"
  exit 1
fi
echo ok
