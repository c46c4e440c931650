"""LLMForge's worker_resources: which accelerator the machines of a job must have.

Ray names it in the key of a custom resource, `accelerator_type:A10G` or `anyscale/accelerator_shape:4xA10G`; the amount
(0.001) says nothing. In a cluster the operator turns the name into a node selector that its platform team has set.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from finetune_api.problem import Problem

_ACCELERATOR = re.compile(r"^(?:accelerator_type:|anyscale/accelerator_shape:(?:[0-9]+x)?)(\S+)$")

KEY = "worker_resources"


def accelerator_types(worker_resources: Mapping[str, Any] | None) -> list[str]:
    """The accelerators named, each once, in order. More than one is a contradiction."""
    found = (_ACCELERATOR.match(key) for key in worker_resources or {})
    return list(dict.fromkeys(match.group(1) for match in found if match))


def accelerator_type(worker_resources: Mapping[str, Any] | None) -> str | None:
    """The accelerator named, or None."""
    return next(iter(accelerator_types(worker_resources)), None)


def accelerator_problems(worker_resources: Mapping[str, Any] | None) -> Iterator[Problem]:
    """A sentence when no machine could have what is asked for."""
    types = accelerator_types(worker_resources)
    if len(types) > 1:
        yield Problem(KEY, f"{KEY} names {len(types)} accelerators, {' and '.join(types)}: keep one of them.")


def accelerator_notice(worker_resources: Mapping[str, Any] | None) -> Problem | None:
    """What to know where the operator's settings are not known."""
    name = accelerator_type(worker_resources)
    if name is None:
        return None
    return Problem(
        KEY,
        f"{KEY} chooses machines with {name} only in a cluster whose operator has a node selector for it "
        "(accelerator_node_selectors): workers.nodeSelector works in every cluster.",
    )


def resources_without_effect(worker_resources: Mapping[str, Any] | None) -> Iterator[Problem]:
    """A sentence for each key that names no accelerator."""
    for key in worker_resources or {}:
        if not _ACCELERATOR.match(key):
            yield Problem(
                f"{KEY}.{key}",
                f"{key} has no effect here: give CPU and memory with workers.resources, and name an accelerator as "
                "accelerator_type:NAME.",
            )
