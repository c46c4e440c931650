"""How often an attempt is tried to be created that cannot be: what nobody mends must not cost requests without end."""

from __future__ import annotations

import pytest

from finetune_operator.errors import api_error
from finetune_operator.names import PYTORCH_PLURAL, child_name
from finetune_operator.reconcile import FIRST_CONFLICT_SECONDS
from tests.operator.desk import Desk, always
from tests.operator.simulation.author import NAME, foreign

QUOTA = 'pytorchjobs.kubeflow.org "a" is forbidden: exceeded quota: jobs, requested: 1, used: 4, limited: 4'
REASONS = {422: "Invalid"}
DENIED = 'admission webhook "policy.example.com" denied the request: no GPUs for you'


@pytest.fixture
def desk() -> Desk:
    return Desk()


def waits(desk: Desk) -> list[float]:
    """How long the tries in a row wait for the next one."""
    waited: list[float] = []
    for _ in range(28):
        again = desk.reconcile()
        assert again is not None
        waited.append(again)
        desk.wait(again)
    # The ConfigMap is there already, for which the job is read first.
    return [again for again in waited if again != FIRST_CONFLICT_SECONDS]


@pytest.mark.parametrize(
    ("status", "text", "longest"),
    [
        (403, QUOTA, 30),
        (500, 'failed calling webhook "policy.example.com": connection refused', 30),
        (403, DENIED, 300),
        (400, DENIED, 300),
        (404, "404 page not found", 300),
        # An admission policy refuses with this code as well, and may be changed.
        (422, "spec: Invalid value", 300),
    ],
)
def test_what_only_somebodys_hand_mends_is_tried_more_and_more_seldom(
    desk: Desk, status: int, text: str, longest: float
) -> None:
    desk.apply()
    desk.wire.refuse = always("POST", "/pytorchjobs", api_error(status, REASONS.get(status, ""), text))
    waited = waits(desk)
    assert waited[:3] == [1, 2, 4]
    assert waited[-1] == longest
    desk.wire.refuse = lambda method, path: None
    desk.settle()
    assert desk.cached().attempt == 1


def test_a_name_that_is_taken_is_asked_for_more_and_more_seldom(desk: Desk) -> None:
    raw = desk.apply()
    name = child_name(NAME, raw["metadata"]["uid"], 1)
    taken = desk.client.create(PYTORCH_PLURAL, foreign(name))
    waited = waits(desk)
    assert desk.reason()[0] == "NameTaken"
    assert (waited[0], waited[-1]) == (1, 300)
    desk.client.delete(taken)
    desk.settle()
    assert desk.cached().attempt == 1
