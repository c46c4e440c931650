"""What became of an adapter's files since they were published, and what its tensors are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_trainer.errors import JobError, first_line
from finetune_trainer.storage.manifest import MANIFEST_NAME, build_manifest, parse_manifest
from finetune_trainer.verify.report import Check, Status

if TYPE_CHECKING:
    import torch

WEIGHTS = "adapter_model.safetensors"
_FOR_PEOPLE = {"README.md", "SERVING.md", "report.html"}
"""Files that no loader reads, and that people edit."""
_MANIFEST_LIMIT_BYTES = 8 << 20
_SHOWN = 4


def check_files(folder: Path) -> tuple[Check, list[str]]:
    """The files in `folder` beside those that its manifest lists, and notes about what does not matter."""
    name, path = "files", folder / MANIFEST_NAME
    if not path.is_file():
        what = f"there is no {MANIFEST_NAME}: the adapter was never published whole, or not all of it was copied"
        return Check(name, Status.FAULT, what), []
    try:
        with path.open("rb") as file:
            listed = parse_manifest(file.read(_MANIFEST_LIMIT_BYTES), str(path)).files
        found = build_manifest(folder).files
    except JobError:
        return Check(name, Status.FAULT, f"{MANIFEST_NAME} is no manifest: copy the adapter again"), []
    except OSError as error:
        return Check(name, Status.FAULT, f"a file cannot be read ({error.strerror}): mend its permissions"), []
    missing = sorted(listed.keys() - found.keys())
    changed = sorted(path for path in listed.keys() & found.keys() if listed[path] != found[path])
    added = sorted(found.keys() - listed.keys())
    notes = []
    if edited := [path for path in (*missing, *changed) if path in _FOR_PEOPLE]:
        notes.append(f"{_some(edited)} {_is(edited)} not as published; servers do not read it.")
    if added:
        notes.append(f"{_some(added)} {_is(added)} not among the published files.")
    faults = [
        f"{_some(paths)} {_is(paths)} {what}"
        for what, paths in (
            ("missing", [path for path in missing if path not in _FOR_PEOPLE]),
            ("not as published", [path for path in changed if path not in _FOR_PEOPLE]),
        )
        if paths
    ]
    if faults:
        return Check(name, Status.FAULT, f"{', and '.join(faults)}: copy the adapter again"), notes
    return Check(name, Status.OK, f"its {len(listed)} files are as published"), notes


def check_tensors(tensors: Mapping[str, torch.Tensor]) -> Check:
    """Whether the adapter's tensors can have an effect."""
    import torch

    name = "tensors"
    if broken := [key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]:
        return Check(name, Status.FAULT, f"{_some(sorted(broken))} {_have(broken)} values that are no numbers")
    if not any(".lora_" in key for key in tensors):
        return Check(name, Status.FAULT, f"{WEIGHTS} holds no LoRA tensors")
    moved = [key for key, tensor in tensors.items() if ".lora_B" in key or ".lora_embedding_B" in key if tensor.any()]
    if not moved:
        return Check(name, Status.FAULT, "every lora_B is zero, so the adapter does nothing: it was not trained")
    return Check(name, Status.OK, f"its {len(tensors)} tensors are all in the model")


def read_tensors(folder: Path) -> dict[str, torch.Tensor] | Check:
    """The adapter's tensors, or why they cannot be read."""
    from safetensors.torch import load_file

    try:
        return load_file(folder / WEIGHTS)
    except FileNotFoundError:
        return Check("tensors", Status.FAULT, f"there is no {WEIGHTS}: copy the adapter again")
    except Exception as error:  # Damaged files can make the library raise anything.
        return Check("tensors", Status.FAULT, f"{WEIGHTS} cannot be read ({first_line(error)}): copy the adapter again")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} others" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _is(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _have(names: Sequence[str]) -> str:
    return "has" if len(names) == 1 else "have"
