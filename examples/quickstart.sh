#!/usr/bin/env bash
# Installs missing packages (Debian, Ubuntu, Fedora), builds wandb-restore, and restores a file with it.
#
#   examples/quickstart.sh
#       restores from a local server in place of the service: needs no account; it needs the network only to install missing packages
#   WANDB_API_KEY=... examples/quickstart.sh model-best.h5 --run-path entity/project/run_id
#       restores from the real service; the arguments are those of wandb-restore
set -euo pipefail
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
case ${1:-} in
  -h | --help) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "$0"; exit 0 ;;
esac

# shellcheck source-path=SCRIPTDIR source=../.ci/dependencies.sh
. "$top/.ci/dependencies.sh"
install_missing "$to_build"

scratch=$(mktemp -d)
server=
clean_up() {
  if [ -n "$server" ]; then
    kill "$server" 2> /dev/null || true
    wait "$server" 2> /dev/null || true
  fi
  rm -rf "$scratch"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

echo "Building wandb-restore (once; it takes about a minute)" >&2
build=$top/build
generator=()
[ -e "$build/CMakeCache.txt" ] || generator=(-G Ninja)
if ! (cmake -S "$top" -B "$build" "${generator[@]}" -DWANDB_RESTORE_TESTS=ON -DWANDB_RESTORE_EXAMPLES=ON &&
  cmake --build "$build" --parallel "$(nproc)" --target example_wandb-restore wandb-stand-in) > "$scratch/log" 2>&1; then
  cat "$scratch/log" >&2
  exit 1
fi

if [ $# != 0 ]; then
  rm -rf "$scratch"
  exec "$build/examples/wandb-restore" "$@"
fi

# The user's settings for servers, keys, proxies and certificates do not apply to the local server.
unset "${!WANDB_@}" REQUESTS_CA_BUNDLE CURL_CA_BUNDLE SSL_CERT_FILE SSL_CERT_DIR
unset HTTP_PROXY HTTPS_PROXY ALL_PROXY http_proxy https_proxy all_proxy
export XDG_CACHE_HOME=$scratch/cache

pace=()
[ ! -t 2 ] || pace=(--global-rate 33554432) # slow enough to show the progress bar
echo "Starting a local server in place of the service, with a model file of 64 MiB" >&2
"$build/tests/wandb-stand-in" --run team/project/a1b2c3d --generate model-best.h5=67108864 \
  --ca "$scratch/ca.pem" --env "$scratch/env" "${pace[@]}" > "$scratch/log" 2>&1 < /dev/null &
server=$!
for ((i = 0; i < 300; i++)); do # the server writes the file once it listens
  [ ! -e "$scratch/env" ] || break
  kill -0 "$server" 2> /dev/null || break
  sleep 0.1
done
if [ ! -e "$scratch/env" ]; then
  cat "$scratch/log" >&2
  echo "The local server did not start." >&2
  exit 1
fi
# shellcheck disable=SC1091
. "$scratch/env"
arguments=(model-best.h5 --run-path team/project/a1b2c3d --root "$scratch/restored")

echo "wandb-restore ${arguments[*]}" >&2
status=0
"$build/examples/wandb-restore" --json "${arguments[@]}" > "$scratch/result" || status=$?

while IFS= read -r line; do
  name=$(sed -n 's/.*"name": *"\(\([^"\\]\|\\.\)*\)".*/\1/p' <<< "$line")
  size=$(sed -n 's/.*"size": *\([0-9]*\).*/\1/p' <<< "$line")
  case $line in
    *'"verified":true'* | *'"verified": true'*) verified="verified" ;;
    *) verified="not verified" ;;
  esac
  echo "$name: $size bytes, $verified"
done < "$scratch/result"
exit "$status"
