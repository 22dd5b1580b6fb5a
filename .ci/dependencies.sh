# shellcheck shell=bash disable=SC2034
# Sourced by examples/quickstart.sh, tests/run.sh and tests/tools.sh. `install_missing` installs missing tools
# and headers on Debian, Ubuntu and Fedora, and prints their names on other systems. If none is missing it does nothing, and
# needs no root.

# Each line: the kind and name of a dependency, its package on Debian and Ubuntu, its package on Fedora.
to_build='
  command c++               g++                  gcc-c++
  command cmake             cmake                cmake
  command ninja             ninja-build          ninja-build
  command pkg-config        pkg-config           pkgconf-pkg-config
  header openssl/ssl.h      libssl-dev           openssl-devel
  header nlohmann/json.hpp  nlohmann-json3-dev   json-devel
  header CLI/CLI.hpp        libcli11-dev         cli11-devel
  header doctest/doctest.h  doctest-dev          doctest-devel
  certificates authorities  ca-certificates      ca-certificates
'
to_test='
  header httplib.h          libcpp-httplib-dev   cpp-httplib-devel
  header curl/curl.h        libcurl4-openssl-dev libcurl-devel
  command h5c++             libhdf5-dev          hdf5-devel
  command doxygen           doxygen              doxygen
  command fish              fish                 fish
  command git               git                  git-core
  command groff             groff-base           groff-base
  command mandoc            mandoc               mandoc
  command meson             meson                meson
  command python3           python3              python3
  command zsh               zsh                  zsh
  sanitizer address         g++                  libasan
  sanitizer undefined       g++                  libubsan
'
to_measure='
  command clang++           clang                clang
  command llvm-cov          llvm                 llvm
  command clang-tidy        clang-tidy           clang-tools-extra
  command valgrind          valgrind             valgrind
  sanitizer thread          g++                  libtsan
'
to_compare='
  command python3           python3              python3
  module  ensurepip         python3-venv         python3-libs
'
to_store="$to_compare"'
  command go                golang-go            golang
  command node              nodejs               nodejs
  command npm               npm                  nodejs-npm
'
to_connect="$to_compare"'
  command go                golang-go            golang
  command ip                iproute2             iproute
  command nginx             nginx-light          nginx
  command openssl           openssl              openssl
  command squid             squid                squid
  command unshare           util-linux           util-linux
'

is_there() {
  case $1 in
    command) command -v "$2" > /dev/null ;;
    header) printf '#if !__has_include(<%s>)\n#error\n#endif\n' "$2" | c++ -std=c++17 -fsyntax-only -x c++ - > /dev/null 2>&1 ;;
    module) python3 -c "import $2" > /dev/null 2>&1 ;;
    sanitizer) echo 'int main() {}' | c++ "-fsanitize=$2" -x c++ - -o /dev/null > /dev/null 2>&1 ;;
    certificates) [ -e /etc/ssl/certs/ca-certificates.crt ] || [ -e /etc/pki/tls/certs/ca-bundle.crt ] || [ -e /etc/ssl/cert.pem ] ;;
  esac
}

as_root() {
  if [ "$(id -u)" = 0 ]; then
    "$@"
  elif ! command -v sudo > /dev/null; then
    echo "this needs root, or sudo: $*"
    return 1
  elif [ -t 0 ]; then
    sudo "$@"
  else
    sudo -n "$@" # without a terminal, sudo cannot ask for a password
  fi
}

# Prints the packages that this release has. CMake fetches the others.
known_to_apt() {
  local package
  for package; do
    if [ -n "$(apt-cache --quiet=2 show "$package" 2> /dev/null)" ]; then echo "$package"; fi
  done
}

install_with_apt() {
  local -a options=(-q -y -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3) packages
  as_root env DEBIAN_FRONTEND=noninteractive apt-get "${options[@]}" update || echo "apt-get update failed; going on"
  mapfile -t packages < <(known_to_apt "$@")
  [ ${#packages[@]} = 0 ] || as_root env DEBIAN_FRONTEND=noninteractive \
    apt-get "${options[@]}" install --no-install-recommends "${packages[@]}"
}

install_with_dnf() { as_root dnf -q -y install --setopt=install_weak_deps=False --skip-unavailable "$@" ||
  as_root dnf -q -y install --setopt=install_weak_deps=False "$@"; } # before dnf 5, --skip-unavailable was unknown

# install_missing LIST...: installs the missing ones of the lists above.
install_missing() {
  local kind what debian fedora log
  local -a missing=() for_apt=() for_dnf=()
  while read -r kind what debian fedora; do
    [ -n "$kind" ] || continue
    if ! is_there "$kind" "$what"; then
      missing+=("$what")
      [[ " ${for_apt[*]} " == *" $debian "* ]] || for_apt+=("$debian")
      [[ " ${for_dnf[*]} " == *" $fedora "* ]] || for_dnf+=("$fedora")
    fi
  done <<< "$(printf '%s\n' "$@")"
  [ ${#missing[@]} != 0 ] || return 0

  local -a installer
  if command -v apt-get > /dev/null; then
    installer=(install_with_apt "${for_apt[@]}")
  elif command -v dnf > /dev/null; then
    installer=(install_with_dnf "${for_dnf[@]}")
  else
    echo "Missing: ${missing[*]}" >&2
    echo "Please install them. On Debian and Ubuntu they are in: ${for_apt[*]}; on Fedora in: ${for_dnf[*]}" >&2
    return 1
  fi

  echo "Missing: ${missing[*]}. Installing: ${installer[*]:1}" >&2
  log=$(mktemp)
  # The log takes the output of the subshell. sudo still asks for a password, because it opens the terminal itself.
  if ! ("${installer[@]}") > "$log" 2>&1; then
    cat "$log" >&2
    rm -f "$log"
    echo "Installing failed. What is needed: ${installer[*]:1}" >&2
    return 1
  fi
  rm -f "$log"
}
