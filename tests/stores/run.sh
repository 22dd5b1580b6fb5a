#!/usr/bin/env bash
# Restores from object stores through wandb-restore: versitygw for S3, Azurite for Azure, each over http and https, with addresses that
# boto3 and azure-storage-blob sign; see cases.py. Prints a line for each case, and fails if one fails.
#
#   tests/stores/run.sh [--quick] [--match TEXT] [--build FOLDER]
#
#   --quick   only the most telling cases
#   --match   only the cases whose store and title contain TEXT
#   --build   an existing build of the project, with examples and tests; default: builds in build-interop/build
#
# On a fresh Debian, Ubuntu or Fedora it installs what is missing first. The stores are kept in ~/.cache/wandb_restore-tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# shellcheck source-path=SCRIPTDIR source=../tools.sh
. tests/tools.sh

read_arguments "$@"

install_missing "$to_build" "$to_store"
install_versitygw
install_azurite
install_store_clients
build_programs
exec "$store_clients/bin/python" tests/stores/cases.py --build "$build" --tools "$tools" "${arguments[@]}"
