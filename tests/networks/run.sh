#!/usr/bin/env bash
# Runs wandb-restore through real proxies (squid, mitmproxy, nginx) and with real faults between it and the stand-in for the service
# (toxiproxy); see networks.py. On a fresh Debian, Ubuntu or Fedora it installs what is missing first; tools from PyPI and from the Go
# module proxy go to ${XDG_CACHE_HOME:-~/.cache}/wandb_restore-tests. Prints a line for each case and fails if a case does.
#
#   tests/networks/run.sh [--match TEXT] [--list]    --match: only the cases whose group and title contain TEXT
#
# WANDB_RESTORE_BUILD names a build folder that has examples/wandb-restore and tests/wandb-stand-in; otherwise they are built.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

mitmproxy=11.0.2
toxiproxy=v2.5.0
tools=${XDG_CACHE_HOME:-$HOME/.cache}/wandb_restore-tests
to_connect='
  command go        golang-go      golang
  command ip        iproute2       iproute
  command nginx     nginx-light    nginx
  command openssl   openssl        openssl
  command python3   python3        python3
  command squid     squid          squid
  command unshare   util-linux     util-linux
  module  ensurepip python3-venv   python3-libs
'

case ${1-} in
  -h | --help) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "$0"; exit 0 ;;
esac
PATH=$PATH:/usr/sbin:/usr/local/go/bin

# shellcheck source-path=SCRIPTDIR source=../../.ci/dependencies.sh
. .ci/dependencies.sh
install_missing "$to_build" "$to_connect"

python=$tools/mitmproxy-$mitmproxy/bin/python
if ! "$python" -c 'import mitmproxy' 2> /dev/null; then
  echo "installing mitmproxy $mitmproxy into $tools"
  python3 -m venv --clear "$tools/mitmproxy-$mitmproxy"
  "$python" -m pip install --quiet --disable-pip-version-check "mitmproxy==$mitmproxy"
fi
toxiproxy_server=$tools/toxiproxy-$toxiproxy/server
if ! [ -x "$toxiproxy_server" ]; then
  echo "installing toxiproxy $toxiproxy into $tools"
  GOBIN=$(dirname "$toxiproxy_server") go install "github.com/Shopify/toxiproxy/v2/cmd/server@$toxiproxy"
fi

folder=${WANDB_RESTORE_BUILD:-build-networks}
if [ -z "${WANDB_RESTORE_BUILD-}" ]; then
  echo "building wandb-stand-in and wandb-restore in $folder"
  generator=()
  [ -e "$folder/CMakeCache.txt" ] || generator=(-G Ninja)
  log=$(mktemp)
  if ! { cmake -S . -B "$folder" "${generator[@]}" -DWANDB_RESTORE_TESTS=ON -DWANDB_RESTORE_EXAMPLES=ON -DCMAKE_BUILD_TYPE= \
    -DCMAKE_CXX_FLAGS=-O1 && cmake --build "$folder" --parallel "$(nproc)" --target wandb-stand-in example_wandb-restore; } > "$log" 2>&1; then
    cat "$log"
    exit 1
  fi
  rm -f "$log"
fi

command=(python3 tests/networks/networks.py --build "$folder" --toxiproxy "$toxiproxy_server" --mitmdump "$(dirname "$python")/mitmdump")
# In a network namespace of their own, the programs can have names, further addresses and the ports 80 and 443, and reach no other
# machine. networks.py prints which cases it leaves out without one.
if [ "$(id -u)" = 0 ] && unshare --net --mount true 2> /dev/null; then
  exec unshare --net --mount "${command[@]}" --in-namespace "$@"
fi
exec "${command[@]}" "$@"
