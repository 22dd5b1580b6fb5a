#!/usr/bin/env bash
# Runs wandb-restore through real proxies (squid, mitmproxy, nginx) and with real faults between it and the stand-in for the service
# (toxiproxy); see networks.py. Prints a line for each case, and fails if one fails.
#
#   tests/networks/run.sh [--match TEXT] [--list] [--build FOLDER]
#
#   --match   only the cases whose group and title contain TEXT
#   --list    prints the cases and runs none
#   --build   an existing build of the project, with examples and tests; default: builds in build-interop/build
#
# On a fresh Debian, Ubuntu or Fedora it installs what is missing first. toxiproxy and mitmproxy are kept in
# ~/.cache/wandb_restore-tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# shellcheck source-path=SCRIPTDIR source=../tools.sh
. tests/tools.sh

read_arguments "$@"

PATH=$PATH:/usr/sbin # nginx and squid, on Debian
install_missing "$to_build" "$to_connect"
install_toxiproxy
install_mitmproxy
build_programs
command=(python3 tests/networks/networks.py --build "$build" --toxiproxy "$toxiproxy" --mitmdump "$mitmdump" "${arguments[@]}")
# In a network namespace of their own, the programs can have names, further addresses and the ports 80 and 443, and reach no other
# machine. networks.py prints which cases it leaves out without one.
if [ "$(id -u)" = 0 ] && unshare --net --mount true 2> /dev/null; then
  exec unshare --net --mount "${command[@]}" --in-namespace
fi
exec "${command[@]}"
