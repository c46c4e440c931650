"""Two operators at once, as in a rolling update or behind a broken network: they do what one would have done."""

from __future__ import annotations

from collections import Counter

from tests.cluster.api import wait_until
from tests.cluster.conftest import OperatorFactory
from tests.cluster.stage import Stage
from tests.cluster.stories import STORIES

LIVES = ("retry", "suspend and resume")
CREATED = ("create", 201)


def test_two_operators_do_what_one_would(operator_factory: OperatorFactory, stage: Stage) -> None:
    operators = [operator_factory(), operator_factory()]
    for operator in operators:
        operator.server.launch()
    for operator in operators:
        operator.server.wait_ready()
    lives = {life: stage.begin(STORIES[life], [f"{life.split()[0]}-{n}" for n in range(3)]) for life in LIVES}
    stage.play(*((STORIES[life], scenes) for life, scenes in lives.items()))
    for scene in (scene for scenes in lives.values() for scene in scenes):
        wait_until(lambda scene=scene: stage.ending(scene.name))  # type: ignore[misc]
        status = scene.status()
        assert (status["phase"], status["attempt"], len(status["attempts"])) == ("Succeeded", 2, 2)
        # Whoever wrote a status tells of it, so nothing is told twice.
        events = Counter(scene.events())
        assert max(events.values()) <= 2, events
        assert events["Normal", "Succeeded"] == 1, events
        assert events["Normal", "AttemptCreated"] == 2, events
    # Both have the same account, so either's requests are those of both. A name is free again only once what had it is
    # gone: so many creations are that many attempts.
    made = Counter(request.resource for request in operators[0].writes() if (request.verb, request.code) == CREATED)
    assert made["pytorchjobs"] == made["configmaps"] - 1 == 2 * sum(map(len, lives.values()))
