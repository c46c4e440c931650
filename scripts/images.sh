#!/usr/bin/env bash
# Builds both images with the container tool that is there. Options are passed on to it, e.g. --build-arg
# BASE_IMAGE=mirror.example/python:3.12-slim. IMAGES chooses among them, REGISTRY comes before their names,
# CONTAINER_TOOL names the tool and BUILDAH_OPTIONS goes before its command.
set -euo pipefail
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
revision=$(git -c safe.directory="$PWD" rev-parse HEAD 2>/dev/null || echo unknown)
for tool in ${CONTAINER_TOOL:-docker podman buildah}; do
  # A client without its daemon does not count.
  if "$tool" info >/dev/null 2>&1; then break; fi
  tool=
done
if [ -z "$tool" ]; then
  echo "No container tool works here: install docker, podman or buildah and run this again." >&2
  exit 1
fi
command=("$tool" build)
# The others keep a step's result only when told to.
[ "$tool" = podman ] && command+=(--layers)
# shellcheck disable=SC2206 # words, as the name says
[ "$tool" = buildah ] && command=(buildah ${BUILDAH_OPTIONS:-} build --layers)
for image in ${IMAGES:-operator trainer}; do
  name="${REGISTRY:+$REGISTRY/}finetune-$image:$version"
  echo "Building $name with $tool…" >&2
  "${command[@]}" --file "images/$image/Containerfile" --tag "$name" \
    --build-arg "VERSION=$version" --build-arg "REVISION=$revision" "$@" .
done
