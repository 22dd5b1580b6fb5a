#!/usr/bin/env bash
# Checks that clang-format leaves every tracked C and C++ source unchanged.
# Skipped (status 77) without clang-format, outside of a git work tree, and with a clang-format older than 14, which lacks
# options that .clang-format uses. Versions after 14 format some constructs differently: their findings are shown, and the test
# is skipped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

skip() {
  echo "format_test.sh: SKIPPED: $*" >&2
  exit 77
}

program=${CLANG_FORMAT:-$(command -v clang-format-14 || echo clang-format)}
command -v "$program" > /dev/null || skip "clang-format is not installed, so the formatting was not checked"
git rev-parse --is-inside-work-tree > /dev/null 2>&1 || skip "this is not a git work tree, so the list of sources is unknown"
version=$("$program" --version | sed -n 's/.*version \([0-9]*\).*/\1/p')
[ "${version:-0}" -ge 14 ] || skip "$program is version ${version:-unknown}; 14 or later is needed"

mapfile -d '' -t sources < <(git ls-files -z -- '*.cpp' '*.hpp' '*.h' '*.c')
[ ${#sources[@]} != 0 ] || { echo "format_test.sh: found no sources" >&2; exit 1; }
if "$program" --dry-run --Werror "${sources[@]}"; then
  echo "${#sources[@]} sources are formatted"
elif [ "$version" = 14 ]; then
  echo "format_test.sh: to fix this: git ls-files '*.cpp' '*.hpp' '*.h' '*.c' | xargs clang-format -i" >&2
  exit 1
else
  skip "clang-format $version formats differently from version 14, which the sources are formatted with"
fi
