"""Which machines the next attempt prefers others to."""

from __future__ import annotations

import pytest

from finetune_api.outcome import Reason
from finetune_api.status import Attempt
from finetune_operator.policy.nodes import NODES_AVOIDED, nodes_to_avoid


def attempts(*ends: tuple[str, str | None]) -> list[Attempt]:
    """Reasons and nodes, oldest first."""
    return [Attempt(number=number, reason=why, node=node) for number, (why, node) in enumerate(ends, 1)]


@pytest.mark.parametrize(
    ("ends", "avoided"),
    [
        ([], ()),
        ([("TrainerNotStarted", "a")], ("a",)),
        ([("TrainerCrashed", "a"), ("InternalError", "b"), ("TrainerCrashed", "a")], ("a", "b")),
        ([("OutOfMemory", "a"), ("Disrupted", "b")], ("b", "a")),
        # Nothing that a machine could be blamed for.
        ([("HubUnavailable", "a"), ("StorageUnavailable", "b"), ("PeerFailed", "c"), ("ResultMissing", "d")], ()),
        ([("TrainerCrashed", None), ("TrainerCrashed", "")], ()),
        # Its author has looked at it since.
        ([("TrainerCrashed", "a"), ("Suspended", "b"), ("TrainerCrashed", "c")], ("c",)),
        # What somebody wrote into status by hand must not make the next attempt one that the API server refuses.
        ([("TrainerCrashed", "no name"), ("TrainerCrashed", "-a"), ("TrainerCrashed", "A" * 253)], ()),
        ([("TrainerCrashed", "ip-10-0-0-1.eu-west-1.compute.internal")], ("ip-10-0-0-1.eu-west-1.compute.internal",)),
    ],
)
def test_the_nodes_of_ends_that_may_be_theirs_are_avoided(
    ends: list[tuple[str, str | None]], avoided: tuple[str, ...]
) -> None:
    assert nodes_to_avoid(attempts(*ends)) == avoided


def test_only_the_latest_are_avoided() -> None:
    ends = [(str(Reason.INTERNAL_ERROR), f"node-{number}") for number in range(20)]
    assert nodes_to_avoid(attempts(*ends)) == tuple(f"node-{number}" for number in range(19, 19 - NODES_AVOIDED, -1))
