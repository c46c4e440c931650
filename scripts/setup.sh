#!/usr/bin/env bash
# Makes the virtual environment: exact versions, checked by hash, then the project itself in editable form.
set -euo pipefail
venv="$1"
uv=$(scripts/find-uv.sh)
versions='>=3.11,<3.15'

if ! "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  # uv takes a Python of the machine, or fetches one.
  if ! "$uv" venv --quiet --clear --python "$versions" "$venv"; then
    echo "No Python $versions was found and none could be fetched: install one (https://www.python.org) and run this again." >&2
    exit 1
  fi
fi
echo "Installing the dependencies into $venv (the first time this fetches about 3 GB, most of it PyTorch)…" >&2
export VIRTUAL_ENV="$PWD/$venv"
# Wheels only: nothing is compiled on the user's machine but Python's own bytecode, which saves every later start ten
# seconds where the environment forbids Python to write it.
"$uv" pip sync --quiet --compile-bytecode --require-hashes --only-binary :all: requirements.lock
# The build backend comes from the lock too, so it is not resolved anew.
"$uv" pip install --quiet --no-deps --no-build-isolation --editable .
