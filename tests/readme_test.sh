#!/usr/bin/env bash
# Compiles every C++ block of README.md and runs its command lines; see readme_test.py.
# Skipped (status 77) without python3.
set -euo pipefail
if ! command -v python3 > /dev/null; then
  echo "readme_test.sh: SKIPPED: python3 is not installed, so the code blocks of README.md were not compiled" >&2
  exit 77
fi
exec python3 "$(dirname "${BASH_SOURCE[0]}")/readme_test.py"
