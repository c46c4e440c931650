#!/usr/bin/env bash
# For releases: lists what is in each image, and looks it up among the vulnerabilities that are known.
set -euo pipefail
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
if ! command -v trivy >/dev/null; then
  echo "trivy was not found: install it (https://trivy.dev) and run this again." >&2
  exit 1
fi
mkdir -p build/sbom
for image in operator trainer; do
  name="${REGISTRY:+$REGISTRY/}finetune-$image:$version"
  trivy image --quiet --format cyclonedx --output "build/sbom/finetune-$image.cdx.json" "$name"
  trivy sbom --severity HIGH,CRITICAL --ignore-unfixed --exit-code 1 "build/sbom/finetune-$image.cdx.json"
done
