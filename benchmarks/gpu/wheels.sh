#!/usr/bin/env bash
# Gathers what a bare image with PyTorch lacks for `python -m benchmarks.gpu --first-contact`: about 40 MB of wheels.
#   benchmarks/gpu/wheels.sh FOLDER [PYTHON_VERSION]      there: pip install --no-index --no-deps FOLDER/*.whl
# bitsandbytes (60 MB more) is left out: without it the check of quantization says that it is missing.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$1 version=${2:-3.12}
names=(
  accelerate annotated-types anyio certifi click filelock fsspec h11 httpcore2 httpx2 huggingface-hub idna liger-kernel numpy orjson
  packaging peft psutil pydantic pydantic-core pyyaml regex safetensors tenacity tokenizers tqdm transformers trl truststore
  typer typing-extensions typing-inspection urllib3
)
uv=$(scripts/find-uv.sh)
wanted=$(IFS='|'; echo "${names[*]}")
mapfile -t pinned < <(
  "$uv" pip compile --quiet --no-deps --no-header --no-annotate --python-version "$version" requirements.lock \
    | grep --extended-regexp "^($wanted)==" | sed --regexp-extended 's/ .*//'
)
"$uv" run --quiet --no-project --with pip python -m pip download --quiet --no-deps --only-binary :all: \
  --python-version "$version" --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
  --platform manylinux2014_x86_64 --platform manylinux_2_27_x86_64 --dest "$folder" "${pinned[@]}"
du --summarize --human-readable "$folder"
