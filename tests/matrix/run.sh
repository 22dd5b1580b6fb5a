#!/usr/bin/env bash
# Builds and runs the header with many compilers, standards, modes, dependencies and machines. Every combination is a cell: it is
# built with strict warnings as errors, and run. An unavailable cell states the reason. Prints the text of results.md.
#
#   tests/matrix/run.sh              all cells (hours): makes roots of other Debian releases, which needs root and debootstrap,
#                                    and uses the installed cross-compilers, qemu-user and wine
#   tests/matrix/run.sh --quick      the cells for this machine's installed compilers (minutes)
#   tests/matrix/run.sh ... PATTERN  only cells whose row ("clang++-16 | c++20 | split | ...") matches PATTERN
#
# It works in build-matrix/, or in $WANDB_RESTORE_MATRIX_FOLDER. The folder keeps roots and headers for the next run, and a log
# of each cell. WANDB_RESTORE_MATRIX_JOBS is the number of cells built at once.
set -uo pipefail
shopt -s nullglob
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
work=${WANDB_RESTORE_MATRIX_FOLDER:-$top/build-matrix}
warnings=(-Wall -Wextra -Wpedantic -Wconversion -Wsign-conversion -Wshadow -Wold-style-cast -Wnull-dereference -Werror)
bare=(-DWANDB_RESTORE_NO_OPENSSL)

# ------------------------------------------------------------------------------------------------------ one cell
#
# A cell consists of: compiler, standard, mode, nlohmann/json, machine. A "bare" mode has no OpenSSL. The machine is "this" one,
# the "root" of another release, an architecture that qemu emulates, or "windows".

say_why() { # the cell is unavailable: neither passed nor failed
  echo "not here: $*" > result
  exit 0
}

# Sets `inside`, a command prefix that runs programs in the cell's machine, and `there`, the path of the work folder in it.
enter_machine() {
  inside=() there=$work sources=$top target=''
  case $machine in
    root\ *)
      root=$work/roots/${machine#root }
      [ -e "$root/complete" ] || say_why "$(cat "$root.why" 2> /dev/null || echo "no root was made")"
      inside=(chroot "$root") there=/matrix sources=/matrix/sources
      ;;
    armhf) target=arm-linux-gnueabihf emulator=qemu-arm ;;
    arm64) target=aarch64-linux-gnu emulator=qemu-aarch64 ;;
    s390x) target=s390x-linux-gnu emulator=qemu-s390x ;;
  esac
}

std_flag() { # of c++23, the first spelling that the compiler knows
  local older=${standard/20/2a} flag
  older=${older/23/2b}
  for flag in "-std=$standard" "-std=$older"; do
    echo 'int main() {}' | "${inside[@]}" $compiler "$flag" -x c++ -fsyntax-only - 2> /dev/null && { echo "$flag"; return; }
  done
}

run_program() { # PROGRAM: in the cell's folder, as the machine runs it
  case $machine in
    this) timeout 600 ./"$1" ;;
    root\ *)
      "${inside[@]}" env WANDB_BASE_URL="${WANDB_BASE_URL:-}" WANDB_API_KEY="${WANDB_API_KEY:-}" \
        SSL_CERT_FILE="${SSL_CERT_FILE:+/matrix/ca.pem}" HOME=/matrix sh -c "cd '$there/cells/$number' && timeout 600 ./$1"
      ;;
    windows) timeout 600 env WINEDEBUG=-all WINEPREFIX="$work/wine" "$wine" "./$1" ;;
    *) timeout 3000 "$(command -v "$emulator" || command -v "$emulator-static")" -L "/usr/$target" "./$1" ;;
  esac
}

misuses() {
  local file text flags failed=0 out status
  for file in "$top"/tests/matrix/misuse/*.cpp; do
    text=$(sed -n 's|^// expect: ||p' "$file")
    read -r -a flags <<< "$(sed -n 's|^// mode: ||p' "$file")"
    if [ "${flags[0]:-}" = bare ]; then flags=("${bare[@]}" "${flags[@]:1}"); fi
    if grep -q '^// stage: link' "$file"; then
      # Linked with a file that was compiled with exceptions and contains the implementation.
      local others=("$sources/tests/matrix/modes/implementation.cpp") mixed=()
      [[ " ${flags[*]} " == *SPLIT* ]] && mixed=(-DWANDB_RESTORE_SPLIT)
      "${inside[@]}" $compiler "$flag" "${json_flags[@]}" "${bare[@]}" "${mixed[@]}" -c "${others[@]}" -I"$sources" -o "$there/cells/$number/other.o" || failed=1
      out=$("${inside[@]}" $compiler "$flag" "${json_flags[@]}" "${flags[@]}" -I"$sources" "${file/$top/$sources}" "$there/cells/$number/other.o" -pthread -o "$there/cells/$number/misuse" 2>&1)
    else
      out=$("${inside[@]}" $compiler "$flag" "${json_flags[@]}" "${flags[@]}" -I"$sources" -fsyntax-only "${file/$top/$sources}" 2>&1)
    fi
    status=$?
    if [ $status = 0 ] || [[ $out != *"$text"* ]]; then
      echo "$file: ended with $status and without the words \"$text\":"
      echo "$out" | head -20
      failed=1
    fi
  done
  return $failed
}

build_and_run() {
  local modes=$sources/tests/matrix/modes files=() flags=() libraries=(-pthread) json_flags=() flag name
  name=program
  "${inside[@]}" ${compiler%% *} --version > /dev/null 2>&1 || say_why "no ${compiler%% *}"
  flag=$(std_flag)
  [ -n "$flag" ] || say_why "this compiler does not know $standard"

  case $json in
    system) [ -z "$target" ] && [ "$machine" != windows ] || json_flags=(-isystem "$work/headers/json-system") ;;
    *)
      [ -e "$work/headers/json-$json/nlohmann/json.hpp" ] || say_why "no headers of nlohmann/json $json: $(cat "$work/headers/why" 2> /dev/null)"
      json_flags=(-isystem "$there/headers/json-$json")
      ;;
  esac
  case $mode in
    misuse) misuses && echo ok > result; return ;;
    *manners)
      files=("$modes/hygiene.cpp")
      [ "$machine" != this ] || bash "$top/tests/matrix/modes/macros.sh" $compiler "$flag" "${bare[@]}" || return
      ;;
    machine) files=("$modes/machine.cpp") ;;
    *two\ files* | *LTO*) files=("$modes"/{main,other}.cpp) ;;
    *split*) files=("$modes"/{main,other,implementation}.cpp) flags=(-DWANDB_RESTORE_SPLIT) ;;
    *) files=("$modes/one.cpp") ;;
  esac
  case $mode in *bare* | machine) flags+=("${bare[@]}") ;; *) libraries=(-lssl -lcrypto -pthread) ;; esac
  case $mode in *no\ exceptions*) flags+=(-fno-exceptions -fno-rtti) ;; esac
  case $mode in *sanitized*) flags+=(-g1 -fsanitize=address,undefined -fno-sanitize-recover=all) ;; esac
  case $mode in *LTO*) flags+=(-O2 -flto -Wodr) ;; esac
  # With LTO, GCC warns about null dereferences inside the standard library.
  case $mode in *LTO*) flags+=(-Wno-null-dereference) ;; esac
  if [ "$machine" = windows ]; then
    # Without optimisation the inline functions need more sections than a standard object file may have.
    flags+=(-D_WIN32_WINNT=0x0A00 -static -Wa,-mbig-obj) name=program.exe
    libraries=(-lws2_32)
  fi

  rm -f "$name" ./*.o
  "${inside[@]}" sh -c 'cd "$0" && exec "$@"' "$there/cells/$number" \
    $compiler "$flag" "${warnings[@]}" "${flags[@]}" -I"$sources" "${json_flags[@]}" "${files[@]}" -o "$name" "${libraries[@]}" || {
    # Some releases of compiler and nlohmann/json are incompatible, also without this header.
    echo '#include <nlohmann/json.hpp>
      int main(int count, char** texts) { return nlohmann::json::parse(texts[count - 1], nullptr, false).is_object(); }' |
      "${inside[@]}" $compiler "$flag" "${json_flags[@]}" -fsyntax-only -x c++ - ||
      say_why "this compiler does not take nlohmann/json alone"
    return 1
  }
  case $mode in # a plain server for those without TLS
    *bare*) . "$work/plain.env" ;;
    *) . "$work/tls.env" ;;
  esac
  if [ "$machine" = windows ]; then
    wine=$(command -v wine64 || command -v wine || echo /usr/lib/wine/wine64)
    [ -x "$wine" ] || say_why "built; no wine to run it"
  elif [ -n "$target" ] && ! command -v "$emulator" "$emulator-static" > /dev/null; then
    say_why "built; no $emulator to run it"
  fi
  local out
  out=$(run_program "$name")
  echo "$out"
  [[ $out == ok* ]] && echo ok > result && return
  return 1
}

one_cell() { # NUMBER DESCRIPTION
  number=$1
  IFS='|' read -r compiler standard mode json machine <<< "${2// | /|}"
  mkdir -p "$work/cells/$number"
  cd "$work/cells/$number" || exit 1
  rm -rf -- *
  echo FAILED > result
  (
    enter_machine
    if [ "${machine%% *}" = root ] && [ -e "$root/complete" ]; then
      mkdir -p "$root/matrix/cells/$number"
      build_and_run
    else
      build_and_run
    fi
  ) > log 2>&1
  if [[ $machine == root* ]]; then rm -rf "$work/roots/${machine#root }/matrix/cells/$number"; fi
  rm -f program program.exe misuse ./*.o
  echo "$(cat result) | $2" >&2
}

if [ "${1:-}" = --cell ]; then
  one_cell "$2" "$3"
  exit 0
fi

# --------------------------------------------------------------------------- headers, roots and servers for the cells

# Prints the Debian mirror that this system's apt uses.
mirror() {
  apt-get indextargets --format '$(ORIGIN) $(LABEL) $(REPO_URI)' 'Created-By: Packages' 2> /dev/null |
    awk '$1 == "Debian" && $2 == "Debian" { print $3; exit }'
}

# Fetches the headers of several releases of nlohmann/json from Debian's packages, and from pip. Uses its own apt state, so that
# the system's is unchanged. Headers that a user puts into such a folder (headers/json-3.10/nlohmann/json.hpp) are used, too.
fetch_headers() {
  mkdir -p "$work/headers" "$work/apt/lists/partial"
  local from state=() name release version folder fetched missing=()
  mkdir -p "$work/headers/json-system"
  ln -sfn /usr/include/nlohmann "$work/headers/json-system/nlohmann" # for compilers that do not search /usr/include
  [ ! -e "$work/headers/complete" ] || return 0
  from=$(mirror)
  if [ -z "$from" ]; then
    echo "packages of other releases are fetched on Debian only" > "$work/headers/why"
    return
  fi
  for release in bookworm trixie sid; do
    echo "deb-src [trusted=yes] $from $release main"
  done > "$work/apt/sources.list"
  echo "deb [trusted=yes] $from bullseye main" >> "$work/apt/sources.list" # its sources are no longer there
  touch "$work/apt/status"
  state=(-o Dir::Etc::SourceList="$work/apt/sources.list" -o Dir::Etc::SourceParts=- -o Dir::State="$work/apt"
    -o Dir::State::status="$work/apt/status" -o Dir::Cache="$work/apt" -o APT::Sandbox::User="$(id -un)" -o Acquire::Retries=3)
  if ! apt-get "${state[@]}" -q update > "$work/apt/log" 2>&1 || ! command -v dpkg-source > /dev/null; then
    echo "source packages are unavailable (apt, dpkg-source)" > "$work/headers/why"
    return
  fi
  name=nlohmann-json3
  for release in bullseye bookworm sid pip; do # trixie has the same as sid
    [ $release != pip ] || python3 -m pip --version > /dev/null 2>&1 || continue
    folder=$work/apt/$release/$name
    rm -rf "$folder" && mkdir -p "$folder"
    fetched=yes
    case $release in
      bullseye) (cd "$folder" && apt-get "${state[@]}" -q download "$name-dev" && dpkg-deb -x ./*.deb source) ;;
      pip) (cd "$folder" && python3 -m pip -q download --no-deps nlohmann-json==3.12.0 && python3 -m zipfile -e ./*.whl source) ;;
      *)
        (cd "$folder" && apt-get "${state[@]}" -q --only-source -t "$release" source --download-only "$name" &&
          dpkg-source --no-check -x ./*.dsc source)
        ;;
    esac >> "$work/apt/log" 2>&1 || fetched=no
    if [ $fetched = no ]; then
      missing+=("$release's $name")
      continue
    fi
    folder+=/source
    case $release in
      bullseye) folder+=/usr/include ;;
      pip) folder+=/nlohmann_json/include ;;
      *) folder+=/single_include ;;
    esac
    version=$(cat "$folder/nlohmann/json.hpp" "$folder/nlohmann/detail/abi_macros.hpp" 2> /dev/null |
      sed -n 's/^#define NLOHMANN_JSON_VERSION_\(MAJOR\|MINOR\) *\([0-9]*\).*/\2/p' | head -2 | paste -sd.)
    rm -rf "$work/headers/json-$version"
    mkdir -p "$work/headers/json-$version"
    cp -r "$folder/nlohmann" "$work/headers/json-$version"
  done
  if [ ${#missing[@]} = 0 ]; then
    echo "no package has it" > "$work/headers/why"
    touch "$work/headers/complete"
  else
    (IFS=,; echo "not downloaded: ${missing[*]} (see apt/log)") > "$work/headers/why" # the next run tries again
  fi
}

# Makes a root of another Debian release, for compilers that this system does not have.
make_root() { # RELEASE PACKAGE,...
  local root=$work/roots/$1 from
  mkdir -p "$work/roots"
  if [ ! -e "$root/complete" ]; then
    from=$(mirror)
    if [ "$(id -u)" != 0 ]; then
      echo "needs root" > "$root.why"
    elif ! command -v debootstrap > /dev/null || [ -z "$from" ]; then
      echo "needs debootstrap and a mirror of Debian" > "$root.why"
    elif ! { rm -rf "$root" && debootstrap --variant=minbase --include="ca-certificates,libssl-dev,nlohmann-json3-dev,$2" "$1" "$root" "$from" > "$root.log" 2>&1; }; then
      echo "debootstrap failed: $(tail -1 "$root.log")" > "$root.why"
    else
      touch "$root/complete"
    fi
  fi
  [ -e "$root/complete" ] || return 0
  rm -rf "$root/matrix"
  mkdir -p "$root/matrix/sources/tests/matrix"
  cp "$top/wandb_restore.hpp" "$root/matrix/sources"
  cp -r "$top"/tests/matrix/{modes,misuse} "$root/matrix/sources/tests/matrix"
  cp -rL "$work/headers" "$root/matrix"
  cp "$work/ca.pem" "$root/matrix"
}

start_servers() {
  local flags=(-std=c++17 -O1 -I"$top/tests/stand_in") program=$work/wandb-stand-in
  if [ ! -x "$program" ] || [ -n "$(find "$top/tests/stand_in" -newer "$program" -print -quit)" ]; then
    c++ "${flags[@]}" "$top"/tests/stand_in/*.cpp -o "$program" -lssl -lcrypto -pthread || return
  fi
  # The servers end with this script, because their standard input then ends.
  exec {hold}> >(exec "$program" --until-input-ends --generate big.bin=9000000 --ca "$work/ca.pem" --env "$work/tls.env" > /dev/null)
  exec {hold_too}> >(exec "$program" --until-input-ends --generate big.bin=9000000 --plain --env "$work/plain.env" > /dev/null)
  local tries
  for tries in $(seq 100); do
    [ -s "$work/tls.env" ] && [ -s "$work/plain.env" ] && return
    sleep 0.1
  done
  echo "run.sh: the stand-in server does not start" >&2
  return 1
}

# ------------------------------------------------------------------------------------------------------ the cells

cells=()
cell() { # COMPILER STANDARD MODE JSON MACHINE
  local text
  text=$(printf '%s | ' "$@")
  text=${text% | }
  [[ -z $pattern || $text =~ $pattern ]] && cells+=("$text")
  return 0
}

installed() { # of the compilers NAME and NAME-<version>, those that are here
  local path
  for path in $(compgen -c "$1" | sort -uV); do
    [[ $path =~ ^${1//+/\\+}(-[0-9]+)?$ ]] && echo "$path"
  done
}

quick_cells() {
  local compiler
  for compiler in g++ clang++; do
    for mode in inline "two files" split "no exceptions" "split, no exceptions" manners misuse; do cell $compiler c++17 "$mode" system this; done
    cell $compiler c++20 inline system this
    for mode in bare "bare, two files" "bare, split" "bare, no exceptions" "bare, split, no exceptions" "bare, LTO" "bare, manners" machine; do
      cell $compiler c++17 "$mode" system this
    done
    for mode in bare "bare, split, no exceptions"; do cell $compiler c++20 "$mode" system this; done
  done
  cell g++ c++17 "no exceptions, sanitized" system this
}

all_cells() {
  local compiler standard version
  quick_cells
  for compiler in g++ clang++; do
    for standard in c++20 c++23; do
      for mode in inline split "no exceptions" bare "bare, split" "bare, no exceptions"; do cell $compiler $standard "$mode" system this; done
    done
    for version in 3.9 3.10 3.11 3.12 3.13; do cell $compiler c++17 bare $version this; done
    cell $compiler c++17 LTO system this
  done
  for compiler in $(installed g++) $(installed clang++); do
    for standard in c++17 c++20 c++23; do cell $compiler $standard bare system this; done
    cell $compiler c++17 inline system this
  done
  cell "clang++ -stdlib=libc++" c++17 inline system this

  # This root's OpenSSL is 1.1.1.
  for compiler in g++-9 g++-10 clang++-9 clang++-11 "clang++-11 -stdlib=libc++"; do
    for standard in c++17 c++20; do
      for mode in inline bare "bare, no exceptions"; do cell "$compiler" $standard "$mode" 3.11 "root bullseye"; done
    done
    cell "$compiler" c++17 bare system "root bullseye"
    cell "$compiler" c++17 "bare, split" 3.11 "root bullseye"
  done
  for compiler in g++-9 clang++-9; do
    for mode in split "no exceptions" machine; do cell $compiler c++17 "$mode" 3.11 "root bullseye"; done
  done
  for compiler in g++-13 g++-14 clang++-17 clang++-19; do
    for standard in c++17 c++20 c++23; do
      for mode in inline bare; do cell $compiler $standard "$mode" system "root trixie"; done
    done
  done
  for compiler in g++-16 clang++-23 "clang++-23 -stdlib=libc++"; do
    for standard in c++17 c++20 c++23; do
      for mode in inline split bare "bare, no exceptions" "bare, split"; do cell "$compiler" $standard "$mode" system "root sid"; done
    done
    for mode in manners "bare, manners" misuse machine; do cell "$compiler" c++17 "$mode" system "root sid"; done
    [[ $compiler == *libc* ]] || cell "$compiler" c++17 "bare, LTO" system "root sid"
    cell "$compiler" c++20 "no exceptions" system "root sid"
  done

  for machine in armhf arm64 s390x; do
    case $machine in
      armhf) compiler=arm-linux-gnueabihf-g++ ;;
      arm64) compiler=aarch64-linux-gnu-g++ ;;
      s390x) compiler=s390x-linux-gnu-g++ ;;
    esac
    for mode in bare "bare, split, no exceptions" machine; do cell $compiler c++17 "$mode" system $machine; done
  done
  compiler=x86_64-w64-mingw32-g++-posix
  for mode in bare "bare, split" "bare, no exceptions" machine "bare, manners"; do cell $compiler c++17 "$mode" system windows; done
  cell $compiler c++20 bare system windows
  cell "musl-g++" c++17 bare system this
}

# ---------------------------------------------------------------------------------------------------------- main

list=all_cells pattern=''
for argument; do
  case $argument in
    --quick) list=quick_cells ;;
    -h | --help) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "$0"; exit 0 ;;
    -*) echo "tests/matrix/run.sh: unknown argument $argument; see --help" >&2; exit 2 ;;
    *) pattern=$argument ;;
  esac
done
mkdir -p "$work"
jobs=${WANDB_RESTORE_MATRIX_JOBS:-$(nproc)}
unset "${!WANDB_@}"
export WANDB_RESTORE_MATRIX_FOLDER=$work XDG_CACHE_HOME=$work/cache
rm -rf "$work"/{tls,plain}.env "$work/cells"
fetch_headers
start_servers || exit 1
"$list"
# The roots are shared: they are made before the cells run in parallel.
for name in $(printf '%s\n' "${cells[@]}" | sed -n 's/.*root \([a-z]*\)$/\1/p' | sort -u); do
  case $name in
    bullseye) make_root bullseye g++-9,g++-10,clang-9,clang-11,libc++-11-dev,libc++abi-11-dev ;;
    trixie) make_root trixie g++-13,g++-14,clang-17,clang-19 ;;
    sid) make_root sid g++-16,clang-23,libc++-23-dev,libc++abi-23-dev ;;
  esac
done
if printf '%s\n' "${cells[@]}" | grep -q windows; then
  wine=$(command -v wine64 || command -v wine || echo /usr/lib/wine/wine64)
  [ ! -x "$wine" ] || WINEDEBUG=-all WINEPREFIX="$work/wine" timeout 300 "$wine" cmd /c exit > /dev/null 2>&1
fi

mapfile -t cells < <(printf '%s\n' "${cells[@]}" | awk '!seen[$0]++')
for i in "${!cells[@]}"; do printf '%s\0%s\0' "$i" "${cells[i]}"; done |
  xargs -0 -n 2 -P "$jobs" bash "${BASH_SOURCE[0]}" --cell

version_of() { # COMPILER MACHINE: as it says itself
  local root=''
  [[ $2 != root* ]] || root="chroot $work/roots/${2#root }"
  $root ${1%% *} -dumpfullversion -dumpversion 2> /dev/null | head -1
}
os_release() { # FILE KEY...: the first that has a value
  local file=$1 key value
  shift
  for key; do
    value=$(sed -n "s/^$key=\"\{0,1\}\([^\"]*\)\"\{0,1\}$/\1/p" "$file" 2> /dev/null)
    [ -z "$value" ] || break
  done
  echo "$value"
}
name_of() { # MACHINE: a root by its release, "Debian 11"; one without a number, as sid, by its name
  local name=${1#root } version
  case $1 in
    root*)
      version=$(os_release "$work/roots/$name/etc/os-release" VERSION_ID)
      echo "Debian ${version:-$name}"
      ;;
    *) echo "$1" ;;
  esac
}

passed=0 failed=0 skipped=0 rows=()
declare -A versions
for i in "${!cells[@]}"; do
  text=${cells[i]}
  compiler=${text%% | *} machine=${text##* | } middle=${text#* | }
  versions[$compiler,$machine]=${versions[$compiler,$machine]-$(version_of "$compiler" "$machine")}
  result=$(cat "$work/cells/$i/result" 2> /dev/null || echo FAILED)
  rows+=("| $compiler | ${versions[$compiler,$machine]:-} | ${middle% | *} | $(name_of "$machine") | $result |")
  case $result in
    ok) passed=$((passed + 1)) ;;
    not\ here*) skipped=$((skipped + 1)) ;;
    *)
      failed=$((failed + 1))
      { echo "--- $text"; tail -n 40 "$work/cells/$i/log"; } >&2
      ;;
  esac
done

arguments=''
for argument; do
  case $argument in
    -*) arguments+=" $argument" ;;
    *) arguments+=" '$argument'" ;;
  esac
done
commit=$(git -C "$top" describe --always --dirty 2> /dev/null || sed -n 's/^#define WANDB_RESTORE_VERSION "\(.*\)"$/\1/p' "$top/wandb_restore.hpp")
cat << TEXT
# Results of the last matrix run

\`tests/matrix/run.sh$arguments\` at $commit: $passed passed, $failed failed, $skipped not here.

Each cell was built with strict warnings as errors, and run. "this" is $(os_release /etc/os-release PRETTY_NAME) on $(uname -m);
other Debian releases are roots on it, qemu-user emulates other architectures, and wine runs the programs for windows.

| compiler | version | standard | mode | nlohmann/json | machine | result |
| --- | --- | --- | --- | --- | --- | --- |
$(printf '%s\n' "${rows[@]}")
TEXT
[ "$failed" = 0 ] && [ "$passed" != 0 ]
