"""FineTuneJobs in every state that health is judged by, as the real operator writes them.

They are kept beside Argo CD's health script, in the place that its own tests have for them, and Flux' expressions are
tested on the same files. Names, times and identifiers are made equal, so that two recordings differ only by meaning.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from tests.cluster.api import Object

ROOT = Path(__file__).parents[2]
CUSTOMIZATION = ROOT / "integrations" / "argocd" / "resource_customizations" / "finetune.dev" / "FineTuneJob"
FOLDER = CUSTOMIZATION / "testdata"
TIME = "2026-11-02T09:30:00Z"
UID = "1e0a8729"


def stored() -> dict[str, Object]:
    """The recordings, by the state that they are of."""
    return {path.stem: yaml.safe_load(path.read_text()) for path in sorted(FOLDER.glob("*.yaml"))}


def store(recordings: dict[str, Object]) -> None:
    """Replace the recordings."""
    for name, job in recordings.items():
        (FOLDER / f"{name}.yaml").write_text(yaml.safe_dump(job, sort_keys=False, width=120))


def timeless(job: Object) -> Object:
    """A job without what differs from one recording to the next."""
    metadata = job["metadata"]
    kept = {key: metadata[key] for key in ("name", "labels", "generation") if key in metadata}
    parts = {**job, "metadata": kept | {"namespace": "default"}}
    text = yaml.safe_dump({key: parts[key] for key in ("apiVersion", "kind", "metadata", "spec", "status")})
    text = text.replace(metadata["uid"][:8], UID).replace(metadata["namespace"], "default")
    text = re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", TIME, text)
    found: Object = yaml.safe_load(re.sub(r"activeSeconds: \d+", "activeSeconds: 0", text))
    return found
