"""From a file to a FineTuneJob, or to the list of what is wrong with it.

A FineTuneJob manifest and a bare LLMForge configuration (the spec's keys at the top) are read alike, in YAML or JSON.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune_api.defaults import notices
from finetune_api.document import SIZE_LIMIT_BYTES, DocumentError, decode, parse_mapping, parse_value
from finetune_api.job import API_VERSION, KIND, NAME_LIMIT, FineTuneJob
from finetune_api.llmforge import FULL_PARAMETER_REFUSAL, REFUSED, keys_without_effect
from finetune_api.problem import MOST, Problem, first_ones
from finetune_api.rules import spec_problems
from finetune_api.spec_errors import dotted, findings_of
from finetune_api.spec_size import size_fault

__all__ = ["LoadResult", "Problem", "load_job", "load_job_file", "load_manifest"]

_TOP_LEVEL = ("apiVersion", "kind", "metadata", "spec", "status")

_LEVELS = 32
"""So far down empty values are looked for; the models refuse what is nested half as deep."""

_SERVERS = ("managedFields", "ownerReferences")
"""Of metadata, kept by the server and of any depth: left as they are."""


@dataclass(frozen=True, slots=True)
class LoadResult:
    """A job, or why there is none. Of errors as of warnings there are a few, and the number of those left out."""

    job: FineTuneJob | None
    errors: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    bare: bool = False
    """True for a file that holds the spec's keys alone; paths of problems then start below `spec`."""

    def as_written(self, problem: Problem) -> Problem:
        """`problem`, whose path starts at the top of a manifest, with the path that it has in the file."""
        return _without_spec(problem) if self.bare else problem


def load_job_file(path: str | Path, overrides: Sequence[str] = ()) -> LoadResult:
    """The job in the file at `path`, with `overrides` ("dotted.key=YAML value") on top. Nothing is raised."""
    file, shown = Path(path), str(path)
    try:
        with file.open("rb") as opened:
            text = decode(opened.read(SIZE_LIMIT_BYTES + 1), shown)
    except FileNotFoundError:
        return _failed(f"{shown} does not exist: check the path.")
    except IsADirectoryError:
        return _failed(f"{shown} is a folder: name the job's file in it.")
    except DocumentError as error:
        return _failed(str(error))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return _failed(f"{shown} cannot be read: {reason}.")
    return load_job(text, source=shown, overrides=overrides)


def load_job(text: str, *, source: str, overrides: Sequence[str] = (), patience: float = math.inf) -> LoadResult:
    """The job in `text`.

    Args:
        text: YAML or JSON.
        source: names it in messages and, without metadata, gives the job its name.
        overrides: as for `load_job_file`.
        patience: as for `parse_mapping`.
    """
    try:
        document = parse_mapping(text, source, patience)
    except DocumentError as error:
        return _failed(str(error))
    is_manifest = any(key in document for key in _TOP_LEVEL)
    manifest = document if is_manifest else _wrapped(document, source)
    faults = [fault for override in overrides if (fault := _override(manifest, override))]
    if faults:
        return LoadResult(None, faults)
    result = load_manifest(manifest)
    if is_manifest:
        return result
    return LoadResult(
        result.job, list(map(_without_spec, result.errors)), list(map(_without_spec, result.warnings)), bare=True
    )


def load_manifest(manifest: Mapping[str, Any]) -> LoadResult:
    """The job in an object as the API server gives it. Paths of problems start at its top."""
    spec = manifest.get("spec")
    if fault := size_fault(spec):
        return LoadResult(None, [Problem("spec", f"spec {fault}")])
    missing = [
        Problem(key, f"{key} is required: write {key}: {value}.")
        for key, value in (("apiVersion", API_VERSION), ("kind", KIND))
        if not manifest.get(key)
    ]
    empty: list[Keys] = []
    cleaned = {
        key: _without_nulls(value, (key,), empty if key == "spec" else [])
        for key, value in manifest.items()
        if value is not None
    }
    named = [keys for keys in empty if keys != ("spec", "lora_config")]
    warnings = [Problem(dotted(keys), f"{keys[-1]} is empty, so it counts as not given.") for keys in named[:MOST]]
    unnamed = len(named) - len(warnings)
    if isinstance(cleaned.get("spec"), dict):
        if ("spec", "lora_config") in empty:
            missing.append(Problem("spec.lora_config", FULL_PARAMETER_REFUSAL))
        # Whatever is in them: the sentence about the key is the one that helps.
        refused = [key for key in REFUSED if key in cleaned["spec"]]
        missing += [Problem(f"spec.{key}", REFUSED[key]) for key in refused]
        for key in refused:
            del cleaned["spec"][key]
    metadata = cleaned.get("metadata")
    if isinstance(metadata, dict) and "name" not in metadata and isinstance(metadata.get("generateName"), str):
        metadata["name"] = metadata["generateName"].rstrip("-")
    try:
        job = FineTuneJob.model_validate(cleaned, by_alias=True, by_name=False)
    except ValidationError as error:
        found, more = findings_of(error, manifest)
        other_kind = [finding.problem() for finding in found if finding.path in ("apiVersion", "kind")]
        if other_kind:
            return LoadResult(None, first_ones(other_kind))
        shown = [finding.problem() for finding in found[:MOST]]
        more += len(found) - len(shown)
        return LoadResult(None, first_ones([*missing, *shown], more), first_ones(warnings, unnamed))
    errors = [*missing, *(problem.below("spec") for problem in spec_problems(job.spec))]
    if errors:
        ignored = [problem.below("spec") for problem in keys_without_effect(job.spec)]
        return LoadResult(None, first_ones(errors), first_ones([*warnings, *ignored], unnamed))
    said = [*warnings, *(problem.below("spec") for problem in notices(job))]
    return LoadResult(job, [], first_ones(said, unnamed))


def job_name(source: str) -> str:
    """A name for a job whose file gives none: the file's own, as a DNS label that starts with a letter."""
    slug = re.sub(r"[^a-z0-9]+", "-", Path(source).stem.lower()).strip("-")
    if not slug:
        return "job"
    return (slug if slug[0].isalpha() else f"job-{slug}")[:NAME_LIMIT].rstrip("-")


def _wrapped(document: dict[str, Any], source: str) -> dict[str, Any]:
    return {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": job_name(source)}, "spec": document}


def _without_spec(problem: Problem) -> Problem:
    return Problem(problem.path.removeprefix("spec").removeprefix("."), problem.message)


def _failed(message: str) -> LoadResult:
    return LoadResult(None, [Problem("", message)])


def _override(manifest: dict[str, Any], override: str) -> Problem | None:
    """Set one key of `manifest`; a problem when that cannot be done."""
    key, separator, text = override.partition("=")
    key = key.strip()
    keys = key.split(".")
    if not separator or not all(keys):
        return Problem(key, f"--set {override!r} does not have the form key=value, as in num_epochs=2.")
    try:
        value = parse_value(text, f"the value of --set {key}")
    except DocumentError as error:
        return Problem(key, str(error))
    if keys[0] not in _TOP_LEVEL:
        keys = ["spec", *keys]
    place: Any = manifest
    for index, part in enumerate(keys[:-1]):
        if place.get(part) is None:
            place[part] = {}
        elif not isinstance(place[part], dict):
            parent = ".".join(keys[: index + 1])
            return Problem(key, f"--set {key} cannot be done, because {parent} holds a value of its own, not keys.")
        place = place[part]
    place[keys[-1]] = value
    return None


Keys = tuple[str | int, ...]


def _without_nulls(value: Any, keys: Keys, empty: list[Keys]) -> Any:
    """As the API server does: an empty value is an absent one. Where there are some is added to `empty`."""
    if len(keys) >= _LEVELS:
        return value
    if isinstance(value, dict):
        found = {}
        for key, inner in value.items():
            if inner is None:
                empty.append((*keys, key))
            elif isinstance(inner, dict | list) and not (len(keys) == 1 and key in _SERVERS):
                found[key] = _without_nulls(inner, (*keys, key), empty)
            else:
                found[key] = inner
        return found
    if isinstance(value, list):
        return [
            _without_nulls(inner, (*keys, index), empty) if isinstance(inner, dict | list) else inner
            for index, inner in enumerate(value)
        ]
    return value
