#!/usr/bin/env bash
# Compares wandb-restore with the Python SDK, case by case, against the stand-in for the service; see cases.py. On a fresh
# Debian, Ubuntu or Fedora it installs what is missing first. Ends with the numbers of agreements and differences; fails if there is a
# difference that is not in the table of cases.py, which README.md repeats.
#
#   tests/interop/run.sh [--match TEXT] [--verbose]    --match: only the cases whose group and title contain TEXT
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

sdk=wandb==0.31.0
folder=build-interop
to_compare='
  command python3    python3       python3
  module  ensurepip  python3-venv  python3-libs
'

case ${1-} in
  -h | --help) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "$0"; exit 0 ;;
esac

# shellcheck source-path=SCRIPTDIR source=../../.ci/dependencies.sh
. .ci/dependencies.sh
install_missing "$to_build" "$to_compare"

python=$folder/sdk/bin/python
if ! [ -x "$python" ] || [ "$("$python" -m pip freeze | grep -i '^wandb==')" != "$sdk" ]; then
  echo "installing $sdk into $folder/sdk"
  python3 -m venv --clear "$folder/sdk"
  "$python" -m pip install --quiet --disable-pip-version-check "$sdk"
fi

generator=()
[ -e "$folder/build/CMakeCache.txt" ] || generator=(-G Ninja)
echo "building wandb-stand-in and wandb-restore in $folder/build"
log=$folder/build.log
if ! { cmake -S . -B "$folder/build" "${generator[@]}" -DWANDB_RESTORE_TESTS=ON -DWANDB_RESTORE_EXAMPLES=ON -DCMAKE_BUILD_TYPE= \
  -DCMAKE_CXX_FLAGS=-O1 && cmake --build "$folder/build" --parallel "$(nproc)" --target wandb-stand-in example_wandb-restore; } > "$log" 2>&1; then
  cat "$log"
  exit 1
fi
exec python3 tests/interop/compare.py --build "$folder/build" --python "$python" "$@"
