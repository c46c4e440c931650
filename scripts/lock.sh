#!/usr/bin/env bash
# Resolves the dependencies anew: requirements.lock for development, and of its versions what each image needs.
set -euo pipefail
uv=$(scripts/find-uv.sh)
compile() {
  "$uv" pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --quiet "$@"
}
compile pyproject.toml --all-extras -o requirements.lock
compile pyproject.toml --extra operator --constraints requirements.lock -o images/operator/requirements.lock
compile pyproject.toml --extra trainer --extra kernels --extra loggers --constraints requirements.lock -o images/trainer/requirements.lock
compile images/build.in --constraints requirements.lock -o images/build.lock
# An environment of its own: vLLM pins versions that the trainer has left behind.
compile tests/serving/requirements.in --overrides tests/serving/overrides.txt -o tests/serving/requirements.lock
