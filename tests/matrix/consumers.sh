#!/usr/bin/env bash
# Builds and runs a tiny program for every way to use the library in a build, without a network.
#
#   tests/matrix/consumers.sh [NAME...]      runs all, or the named ones; prints "ok NAME" for each
#   tests/matrix/consumers.sh --list         prints the names
#
# CXX selects the compiler.
set -euo pipefail
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
here=$top/tests/matrix/consumers
cxx=${CXX:-c++}
names=(add_subdirectory find_package find_package_refused pkg_config pkg_config_of_meson fetch_content
  meson_subproject meson_wrap plain_copy plain_copy_bare tool_of_cmake tool_of_meson)

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export XDG_CACHE_HOME=$scratch/cache # keep the user's files unchanged
export GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_NOSYSTEM=1
unset "${!WANDB_@}"

run() { # PROGRAM EXPECTED-WORD: runs it in an empty folder
  local out
  mkdir -p "$scratch/run"
  out=$(cd "$scratch/run" && "$1")
  [[ $out == *" $2 "* ]] || { echo "$1 said: $out"; return 1; }
}

build_with_cmake() { # FOLDER CMAKE-ARGUMENT...
  local folder=$1
  shift
  cmake -G Ninja -S "$folder" -B "$scratch/build" "$@"
  cmake --build "$scratch/build"
}

# Copies the files of a release that builds need.
copy_of_the_library() {
  mkdir -p "$1/subprojects"
  cp -r "$top"/{wandb_restore.hpp,CMakeLists.txt,meson.build,meson_options.txt,packaging,LICENSE} "$1"
  cp "$top"/subprojects/*.wrap "$1/subprojects"
}

# Makes a git repository of these files, and sets `commit`.
repository_of_the_library() {
  copy_of_the_library "$1"
  git -C "$1" init -q
  git -C "$1" add -A
  git -C "$1" -c user.name=tests -c user.email=tests@example.invalid commit -q -m "A release"
  commit=$(git -C "$1" rev-parse HEAD)
}

install_with_cmake() {
  build_with_cmake "$top" -DWANDB_RESTORE_TESTS=OFF -DWANDB_RESTORE_EXAMPLES=OFF -DCMAKE_INSTALL_PREFIX="$scratch/prefix" \
    -DCMAKE_BUILD_TYPE=Debug "$@"
  cmake --install "$scratch/build"
  rm -rf "$scratch/build"
}

find_package_modes=(-DWANDB_RESTORE_COMPILED=ON)

add_subdirectory() {
  build_with_cmake "$here/add_subdirectory" -DWANDB_RESTORE_FOLDER="$top"
  run "$scratch/build/inline" inline
  run "$scratch/build/compiled" compiled
}

find_package() {
  install_with_cmake "${find_package_modes[@]}"
  mv "$scratch/prefix" "$scratch/moved" # an installed package may be moved
  build_with_cmake "$here/find_package" -DCMAKE_PREFIX_PATH="$scratch/moved"
  run "$scratch/build/inline" inline
  run "$scratch/build/compiled" compiled
}

find_package_refused() {
  install_with_cmake
  cmake -G Ninja -S "$here/find_package_refused" -B "$scratch/build" -DCMAKE_PREFIX_PATH="$scratch/prefix"
}

pkg_config() {
  install_with_cmake "${find_package_modes[@]}"
  mv "$scratch/prefix" "$scratch/moved"
  local folder
  folder=$(dirname "$(find "$scratch/moved" -name wandb_restore.pc)")
  export PKG_CONFIG_PATH=$folder
  pkg-config --exact-version="$(sed -n 's/^#define WANDB_RESTORE_VERSION "\(.*\)"$/\1/p' "$top/wandb_restore.hpp")" wandb_restore
  # shellcheck disable=SC2046
  "$cxx" -std=c++17 "$here/main.cpp" -o "$scratch/inline" $(pkg-config --cflags --libs wandb_restore)
  run "$scratch/inline" inline
  # shellcheck disable=SC2046
  "$cxx" -std=c++17 "$here/main.cpp" -o "$scratch/compiled" $(pkg-config --cflags --libs wandb_restore-compiled)
  run "$scratch/compiled" compiled
}

# Exits with 77, "skipped", if Meson is older than meson.build requires.
needs_meson() {
  local wanted found
  wanted=$(sed -n "s/.*meson_version: '>=\(.*\)',.*/\1/p" "$top/meson.build")
  found=$(meson --version)
  [ "$(printf '%s\n' "$wanted" "$found" | sort -V | head -n 1)" = "$wanted" ] ||
    { echo "Meson $found is older than $wanted"; exit 77; }
}

pkg_config_of_meson() {
  needs_meson
  meson setup --prefix="$scratch/prefix" --libdir=lib -Dtests=false -Dexamples=false -Dcompiled=true --buildtype=debug "$scratch/build" "$top"
  meson install -C "$scratch/build"
  export PKG_CONFIG_PATH=$scratch/prefix/share/pkgconfig:$scratch/prefix/lib/pkgconfig
  # shellcheck disable=SC2046
  "$cxx" -std=c++17 "$here/main.cpp" -o "$scratch/inline" $(pkg-config --cflags --libs wandb_restore)
  run "$scratch/inline" inline
  # shellcheck disable=SC2046
  "$cxx" -std=c++17 "$here/main.cpp" -o "$scratch/compiled" $(pkg-config --cflags --libs wandb_restore-compiled)
  run "$scratch/compiled" compiled
}

fetch_content() {
  repository_of_the_library "$scratch/repository"
  build_with_cmake "$here/fetch_content" -DWANDB_RESTORE_REPOSITORY="$scratch/repository" -DWANDB_RESTORE_COMMIT="$commit"
  run "$scratch/build/inline" inline
}

meson_subproject() {
  needs_meson
  cp -r "$here/meson_subproject" "$scratch/consumer"
  cp "$here/main.cpp" "$scratch/consumer"
  copy_of_the_library "$scratch/consumer/subprojects/wandb_restore"
  meson setup "$scratch/build" "$scratch/consumer"
  meson compile -C "$scratch/build"
  run "$scratch/build/inline" inline
  run "$scratch/build/compiled" compiled
}

meson_wrap() {
  needs_meson
  repository_of_the_library "$scratch/repository"
  cp -r "$here/meson_wrap" "$scratch/consumer"
  cp "$here/main.cpp" "$scratch/consumer"
  sed -e "s|@repository@|$scratch/repository|" -e "s|@commit@|$commit|" "$here/meson_wrap/subprojects/wandb_restore.wrap.in" \
    > "$scratch/consumer/subprojects/wandb_restore.wrap"
  meson setup "$scratch/build" "$scratch/consumer"
  meson compile -C "$scratch/build"
  run "$scratch/build/inline" inline
}

# Prints the folder of a system header.
folder_of() {
  echo "#include <$1>" | "$cxx" -std=c++17 -x c++ -E - | sed -n "s|^# [0-9]* \"\(.*\)/$1\".*|\1|p" | head -n 1
}

plain_copy() {
  mkdir "$scratch/copy"
  cp "$top/wandb_restore.hpp" "$here/main.cpp" "$scratch/copy"
  cp -r "$(folder_of nlohmann/json.hpp)/nlohmann" "$scratch/copy"
  (cd "$scratch/copy" && "$cxx" -std=c++17 -I. main.cpp -o inline -lssl -lcrypto -pthread)
  run "$scratch/copy/inline" inline
}

plain_copy_bare() {
  mkdir "$scratch/copy"
  cp "$top/wandb_restore.hpp" "$here/bare.cpp" "$scratch/copy"
  cp -r "$(folder_of nlohmann/json.hpp)/nlohmann" "$scratch/copy"
  (cd "$scratch/copy" && "$cxx" -std=c++17 -I. bare.cpp -o bare -pthread)
  run "$scratch/copy/bare" bare
}

# Prints the options in a text, a line each.
options_in() { grep -o -- '--[a-z][a-z-]*' | sort -u; }

# Prints what bash offers after these words.
bash_completions() { # FILE WORD...
  env -i PATH="$PATH" bash --norc --noprofile -c '
    . "$1"; shift
    complete -p wandb-restore > /dev/null
    COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
    _wandb_restore wandb-restore "${@: -1}" "${@: -2:1}"
    printf "%s\n" "${COMPREPLY[@]}"' bash "$@"
}

# Checks an installed wandb-restore: the program, the man page and the completions.
check_the_tool() { # PREFIX
  local tool=$1/bin/wandb-restore man=$1/share/man/man1/wandb-restore.1 missing=
  local bash=$1/share/bash-completion/completions/wandb-restore zsh=$1/share/zsh/site-functions/_wandb-restore
  local fish=$1/share/fish/vendor_completions.d/wandb-restore.fish
  [ "$("$tool" --version)" = "wandb-restore $(sed -n 's/^#define WANDB_RESTORE_VERSION "\(.*\)"$/\1/p' "$top/wandb_restore.hpp")" ]
  mkdir "$scratch/run" "$scratch/run/directory"
  echo weights > "$scratch/run/model.h5"
  cd "$scratch/run"
  [ "$("$tool" model.h5 --run-path entity/project/run_id)" = model.h5 ] # a local copy is kept without a request

  "$tool" --help | options_in > "$scratch/options"
  sed 's/Fl -/--/g' "$man" | options_in | diff "$scratch/options" -
  bash_completions "$bash" wandb-restore -- | options_in | diff "$scratch/options" -
  options_in < "$zsh" | diff "$scratch/options" -
  sed 's/-l /--/' "$fish" | options_in | diff "$scratch/options" -

  [ "$(bash_completions "$bash" wandb-restore --refr)" = --refresh ]
  [ "$(bash_completions "$bash" wandb-restore --root d)" = directory ]
  [ -z "$(bash_completions "$bash" wandb-restore --root directory mod)" ]

  if command -v mandoc > /dev/null; then
    mandoc -T lint -W warning "$man"
  else
    missing+=" mandoc"
  fi
  if command -v groff > /dev/null; then
    groff -mandoc -Tutf8 -ww "$man" > "$scratch/rendered" 2> "$scratch/warnings"
    diff /dev/null "$scratch/warnings"
    grep -q 'restore files of Weights & Biases runs' "$scratch/rendered"
  else
    missing+=" groff"
  fi
  if command -v zsh > /dev/null; then
    zsh -f -c 'fpath=("$1" $fpath); autoload -Uz compinit; compinit -D; [[ ${_comps[wandb-restore]} = _wandb-restore ]]; autoload +X _wandb-restore' \
      zsh "$(dirname "$zsh")"
  else
    missing+=" zsh"
  fi
  if command -v fish > /dev/null; then
    fish --no-execute "$fish"
    # shellcheck disable=SC2016
    [[ $(HOME=$scratch fish -c 'source $argv[1]; complete -C "wandb-restore --refr"' "$fish") == --refresh* ]]
  else
    missing+=" fish"
  fi
  [ -z "$missing" ] || { echo "not checked, because a program is missing:$missing"; exit 77; }
}

tool_of_cmake() {
  build_with_cmake "$top" -DWANDB_RESTORE_TESTS=OFF -DWANDB_RESTORE_EXAMPLES=OFF -DWANDB_RESTORE_TOOL=ON \
    -DCMAKE_INSTALL_PREFIX=/usr -DCMAKE_BUILD_TYPE=Debug
  DESTDIR=$scratch/destination cmake --install "$scratch/build"
  rm -rf "$scratch/build"
  check_the_tool "$scratch/destination/usr"
}

tool_of_meson() {
  needs_meson
  meson setup --prefix=/usr -Dtests=false -Dexamples=false -Dtool=enabled --buildtype=debug "$scratch/build" "$top"
  DESTDIR=$scratch/destination meson install -C "$scratch/build"
  rm -rf "$scratch/build"
  check_the_tool "$scratch/destination/usr"
}

if [ "${1:-}" = --list ]; then
  printf '%s\n' "${names[@]}"
  exit 0
fi
[ $# = 0 ] || names=("$@")
failed=0
for name in "${names[@]}"; do
  if ! declare -F "$name" > /dev/null; then
    echo "consumers.sh: there is no consumer $name; see --list" >&2
    exit 2
  fi
  rm -rf "${scratch:?}"/*
  # Runs in a subshell, and not as a condition: `set -e` has no effect in a condition.
  set +e
  (set -e; "$name") > "$scratch/log" 2>&1 < /dev/null
  status=$?
  set -e
  if [ "$status" = 0 ]; then
    echo "ok $name"
  elif [ "$status" = 77 ]; then
    echo "skipped $name: $(tail -n 1 "$scratch/log")"
    [ "$failed" != 0 ] || [ ${#names[@]} != 1 ] || failed=77
  else
    cat "$scratch/log"
    echo "not ok $name"
    failed=1
  fi
  rm -f "$scratch/log"
done
exit "$failed"
