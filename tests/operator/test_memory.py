"""Nothing is held as it was read while the API server is asked for more: anybody can fill 1.4 MB of what is read, which
become 15 MB, and many jobs are reconciled at the same time.
"""

from __future__ import annotations

import weakref
from typing import Any

import pytest

from finetune_operator.cluster import Cluster
from finetune_operator.errors import ApiError
from finetune_operator.names import PYTORCH_PLURAL
from finetune_operator.wire import Raw
from tests.operator.desk import Desk
from tests.operator.simulation.actors import End


class Read(dict[str, Any]):
    """An object as it was read, of which it can be told whether it is held."""

    def __hash__(self) -> int:  # type: ignore[override]  # only by which it is
        return id(self)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> tuple[Desk, list[str]]:
    """A desk, and the requests that were made while anything was held; each with what that was."""
    desk = Desk()
    found: list[str] = []
    alive: weakref.WeakSet[Read] = weakref.WeakSet()
    get = Cluster._get

    async def read(self: Cluster, path: str) -> Raw | None:
        raw = await get(self, path)
        if raw is None:
            return None
        noted = Read(raw)
        alive.add(noted)
        return noted

    def asked(method: str, path: str) -> ApiError | None:
        found.extend(f"{method} {path} holds {raw['kind']}" for raw in alive)
        return None

    monkeypatch.setattr(Cluster, "_get", read)
    desk.wire.refuse = asked
    return desk, found


def forgotten(desk: Desk) -> None:
    """As by an operator that starts: everything is read, and reconciled until there is nothing left to do."""
    for cached in map(desk.cache.find, desk.cache.all_keys()):
        if cached is not None:
            desk.cache.forget(cached.key)
    desk.settle()


@pytest.mark.parametrize("edited", [False, True], ids=["as it was made", "edited"])
def test_nothing_is_held_whole_of_a_job_that_waits(held: tuple[Desk, list[str]], edited: bool) -> None:
    desk, found = held
    raw = desk.apply()
    desk.settle()
    if edited:
        desk.client.patch(raw, {"spec": {"workers": {"nodes": 2}}})
    (made,) = desk.client.find(PYTORCH_PLURAL)
    desk.client.patch(made, {"spec": {"runPolicy": {"suspend": True}}})
    forgotten(desk)
    assert desk.job()["status"]["phase"] == "Queued"
    assert found == []


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("how", [End.ADAPTER, End.USER_ERROR, End.EVICTED])
def test_nor_of_one_that_ends(held: tuple[Desk, list[str]], how: End, verify: bool) -> None:
    desk, found = held
    desk.apply(output={"uri": "s3://models/team", "verify": verify})
    desk.settle()
    desk.kubelet.run(desk.pods()[0])
    desk.kubelet.end(desk.pods()[0], how)
    desk.settle()
    forgotten(desk)
    assert found == []
