# shellcheck shell=bash
# Sourced by the scripts: `find_python` sets $python to an interpreter that the pinned packages are made for.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)"

find_python() {
  local candidate
  # 3.11 first: the pins are resolved and tested with it. RELIGHT_PYTHON overrides.
  for candidate in ${RELIGHT_PYTHON:+"$RELIGHT_PYTHON"} python3.11 python3.12 python3.13 python3; do
    if python="$(command -v "$candidate")" &&
      "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      if "$python" -c 'import venv, ensurepip' 2>/dev/null; then
        return 0
      fi
      echo "${0##*/}: $python has no venv module; on Debian and Ubuntu: apt-get install python3-venv" >&2
      return 1
    fi
  done
  echo "${0##*/}: needs Python 3.11, 3.12 or 3.13, and found none; install one, or name one with RELIGHT_PYTHON" >&2
  return 1
}

install_env() { find_python && "$python" "$root/scripts/lib/install.py" "$@"; }
