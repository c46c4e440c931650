#!/usr/bin/env bash
# Prints a uv that works, installing one into the cache when the machine has none.
set -euo pipefail

# A pyenv or asdf shim answers `command -v` and still fails when it is called, so it is called.
if uv --version >/dev/null 2>&1; then
  command -v uv
  exit
fi
home="${FINETUNE_CACHE_DIR:-$HOME/.cache/finetune-operator}/uv"
for candidate in "$home/bin/uv" "$home/target/bin/uv"; do
  if "$candidate" --version >/dev/null 2>&1; then
    echo "$candidate"
    exit
  fi
done
if ! command -v python3 >/dev/null; then
  echo "Neither uv nor python3 was found: install Python 3.11 or newer (https://www.python.org) and run this again." >&2
  exit 1
fi
echo "Installing uv into $home…" >&2
mkdir -p "$home"
# Debian's python3 has venv in a package of its own; pip --target does without.
if python3 -m venv "$home" >/dev/null 2>&1 && "$home/bin/python" -m pip install --quiet --upgrade uv >&2; then
  echo "$home/bin/uv"
elif python3 -m pip install --quiet --target "$home/target" uv >&2; then
  echo "$home/target/bin/uv"
else
  echo "uv could not be installed: install it by hand (https://docs.astral.sh/uv) or add python3-venv, then run this again." >&2
  exit 1
fi
