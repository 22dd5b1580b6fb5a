#!/usr/bin/env bash
# Compares wandb-restore with the Python SDK, case by case, against the stand-in for the service; see cases.py. On a fresh
# Debian, Ubuntu or Fedora it installs what is missing first. Ends with the numbers of agreements and differences; fails if there is a
# difference that is not in the table of cases.py, which README.md repeats.
#
#   tests/interop/run.sh [--quick] [--match TEXT] [--verbose] [--build FOLDER]
#
#   --quick   every sixth case, without slow ones
#   --match   only the cases whose group and title contain TEXT
#   --build   an existing build of the project, with examples and tests; default: builds in build-interop/build
#
# The SDK is kept in ~/.cache/wandb_restore-tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# shellcheck source-path=SCRIPTDIR source=../tools.sh
. tests/tools.sh

read_arguments "$@"

install_missing "$to_build" "$to_compare"
install_sdk
build_programs
exec python3 tests/interop/compare.py --build "$build" --python "$sdk/bin/python" "${arguments[@]}"
