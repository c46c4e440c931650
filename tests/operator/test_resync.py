"""A look over everything finds what no event told, for a few pages of names, and each namespace for itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest

from finetune_operator.errors import ApiError, HistoryRewound, api_error
from finetune_operator.names import FINETUNE_PLURAL, PODS_PLURAL, PYTORCH_PLURAL
from finetune_operator.resync import KINDS, ON_ITS_WAY_SECONDS, START_SECONDS
from finetune_operator.serving.health import Watch
from tests.operator.raw import CHILD, KEY, finished, job, pod, pytorch_job
from tests.operator.resync_stage import Listed, Raw, Stage, known, running


def test_what_is_known_as_it_is_listed_costs_nothing() -> None:
    stage = Stage()
    known(stage, running())
    stage.cache.child_seen(PYTORCH_PLURAL, pytorch_job("3"), deleted=False)
    stage.cache.child_seen(PODS_PLURAL, pod("4"), deleted=False)
    stage.server.objects = {FINETUNE_PLURAL: [running()], PYTORCH_PLURAL: [pytorch_job("3")], PODS_PLURAL: [pod("4")]}
    assert stage.once()
    assert stage.added == []
    assert stage.server.pages == 3
    assert stage.heartbeat.ready
    assert stage.heartbeat.problem() is None


@pytest.mark.parametrize(
    ("kind", "raw"), [(FINETUNE_PLURAL, running("9")), (PYTORCH_PLURAL, pytorch_job("9")), (PODS_PLURAL, pod("9"))]
)
def test_what_no_event_told_is_read_anew_and_twice_is_a_silent_watch(kind: str, raw: Raw) -> None:
    stage = Stage()
    known(stage, running())
    stage.server.objects[FINETUNE_PLURAL] = [running()]
    stage.server.objects[kind] = [raw]
    assert stage.once()
    assert stage.added == [KEY]
    cached = stage.cache.find(KEY)
    assert cached is not None
    assert cached.raw is None if kind == FINETUNE_PLURAL else stage.cache.children(KEY, cached.uid).must_be_read
    assert stage.heartbeat.problem() is None
    stage.once()
    assert kind in str(stage.heartbeat.problem())
    stage.heartbeat.event(kind, KEY.namespace)
    assert stage.heartbeat.problem() is None


def test_an_event_that_comes_a_moment_later_was_not_missed() -> None:
    stage = Stage()
    stage.server.objects[FINETUNE_PLURAL] = [running()]

    async def event() -> None:
        await asyncio.sleep(ON_ITS_WAY_SECONDS - 1)
        known(stage, running())

    assert stage.once(event())
    assert stage.added == []


def test_a_start_waits_for_the_watches_as_long_as_they_get_on() -> None:
    stage = Stage()
    jobs = []
    for number in range(20):
        raw = running()
        raw["metadata"] |= {"name": f"job-{number}", "uid": f"uid-{number}"}
        jobs.append(raw)
    stage.server.objects[FINETUNE_PLURAL] = jobs

    async def events() -> None:
        for raw in jobs:
            await asyncio.sleep(ON_ITS_WAY_SECONDS - 1)
            known(stage, raw)

    assert stage.once(events())
    assert stage.added == []


def test_after_the_first_look_whatever_has_not_ended_is_reconciled() -> None:
    stage = Stage()
    stage.cache.synced = False
    stage.server.objects[FINETUNE_PLURAL] = [running()]
    known(stage, running())
    assert stage.once()
    assert stage.cache.synced
    assert stage.added == [KEY]


@pytest.mark.parametrize("silent", [None, *KINDS])
def test_a_start_lists_nothing_that_the_watches_tell(silent: str | None) -> None:
    stage = Stage()
    stage.cache.synced = False

    async def begin() -> None:
        for number in range(5):  # longer than a silence may last
            await asyncio.sleep(ON_ITS_WAY_SECONDS - 1)
            assert not stage.heartbeat.ready
            stage.resync.watch_tells(silent or FINETUNE_PLURAL, None)
            known(stage, running(str(number + 1)))
        for kind in KINDS:
            if kind != silent:
                stage.resync.watch_begun(kind, None)
        await asyncio.sleep(1)
        assert stage.heartbeat.ready is (silent is None)
        await asyncio.sleep(10)

    stage.live(begin())
    assert stage.heartbeat.ready
    assert stage.cache.synced
    assert stage.added[0] == KEY
    assert stage.server.pages == (3 if silent else 0)


def test_a_watch_that_missed_something_is_made_up_for_soon() -> None:
    stage = Stage()

    async def miss() -> int:
        await asyncio.sleep(10)
        before = stage.server.pages
        stage.resync.soon()
        await asyncio.sleep(10)
        return stage.server.pages - before

    assert stage.live(miss()) == 3


@pytest.mark.parametrize("after", [1, 11, 21, 29])
def test_what_is_missed_while_everything_is_looked_over_is_made_up_for_soon(after: float) -> None:
    stage = Stage()
    stage.server.page_seconds = 10.0

    async def miss() -> int:
        await asyncio.sleep(60)  # one was made by then
        before = stage.server.pages
        stage.resync.soon()
        await asyncio.sleep(1 + after)
        stage.resync.soon()
        await asyncio.sleep(100)
        return stage.server.pages - before

    assert stage.live(miss()) == 6


def test_what_is_missed_while_the_watches_begin_is_made_up_for_soon() -> None:
    stage = Stage()

    async def miss() -> None:
        stage.resync.soon()
        for kind in KINDS:
            stage.resync.watch_begun(kind, None)
        await asyncio.sleep(10)

    stage.live(miss())
    assert stage.server.pages == 3


@pytest.mark.parametrize(
    ("tells", "limit_seconds"),
    [
        (None, ON_ITS_WAY_SECONDS + 1),
        (FINETUNE_PLURAL, ON_ITS_WAY_SECONDS + 1),  # it lists again
        (PODS_PLURAL, START_SECONDS + 1),  # it lists, and never to the end
    ],
)
def test_a_watch_that_cannot_begin_does_not_keep_a_busy_operator_from_starting(
    tells: str | None, limit_seconds: float
) -> None:
    stage = Stage()
    stage.cache.synced = False
    for kind in (FINETUNE_PLURAL, PYTORCH_PLURAL):
        stage.resync.watch_begun(kind, None)

    async def busy() -> float:
        clock, version = asyncio.get_running_loop().time, 1
        while not stage.heartbeat.ready and clock() < 1000:
            await asyncio.sleep(1)
            version += 1
            stage.server.objects[FINETUNE_PLURAL] = [running(str(version))]
            known(stage, running(str(version)))
            if tells:
                stage.resync.watch_tells(tells, None)
        return clock()

    assert stage.live(busy()) <= limit_seconds
    assert stage.cache.synced


@pytest.mark.parametrize(
    ("period_seconds", "keeps_place_seconds", "always"), [(300, 300, True), (86400, 300, True), (86400, 60, False)]
)
def test_a_list_is_at_its_end_before_the_server_forgets_where_it_was(
    period_seconds: float, keeps_place_seconds: float, always: bool, caplog: pytest.LogCaptureFixture
) -> None:
    stage = Stage(period_seconds=period_seconds)
    stage.server.keeps_place_seconds = keeps_place_seconds
    stage.server.page_seconds = 0.1
    stage.server.objects[PODS_PLURAL] = [pod(str(number)) for number in range(1000)]
    for number, raw in enumerate(stage.server.objects[PODS_PLURAL]):
        raw["metadata"]["name"] = str(number)

    whole: list[Mapping[Watch, int]] = []
    stage.heartbeat.resynced = whole.append  # type: ignore[assignment, method-assign]
    stage.live(asyncio.sleep(10 * period_seconds))
    assert len(whole) > 5
    assert ("too old" not in caplog.text) is always


def test_what_is_not_listed_any_more_is_looked_for() -> None:
    stage = Stage()
    known(stage, running())
    assert stage.once()
    assert stage.added == [KEY]
    stage.added.clear()
    stage.server.objects[FINETUNE_PLURAL] = [running()]
    stage.cache.child_seen(PODS_PLURAL, pod(), deleted=False)
    stage.once()
    assert stage.added == [KEY]


@pytest.mark.parametrize(
    ("kind", "raw"), [(FINETUNE_PLURAL, running()), (PYTORCH_PLURAL, pytorch_job("3")), (PODS_PLURAL, pod("4"))]
)
def test_deletions_that_no_event_told_of_are_a_silent_watch(kind: str, raw: Raw) -> None:
    stage = Stage()
    for _ in range(2):
        assert stage.heartbeat.problem() is None
        known(stage, running())
        stage.server.objects[FINETUNE_PLURAL] = [running()]
        if kind == FINETUNE_PLURAL:
            stage.server.objects[FINETUNE_PLURAL] = []
        else:
            stage.cache.child_seen(kind, raw, deleted=False)
        stage.once()
    assert kind in str(stage.heartbeat.problem())


@pytest.mark.parametrize(
    ("kind", "known_as", "listed_as", "rewound"),
    [
        (FINETUNE_PLURAL, running("90"), running("70"), True),
        (PYTORCH_PLURAL, pytorch_job("90"), pytorch_job("70"), True),
        (PODS_PLURAL, pod("90"), pod("70"), True),
        (FINETUNE_PLURAL, running("90"), running("90"), False),
        (FINETUNE_PLURAL, running("opaque"), running("other"), False),
        (PODS_PLURAL, pod("90"), {"metadata": pod("70")["metadata"] | {"uid": "another"}}, False),
    ],
)
def test_a_store_that_was_restored_ends_the_operator_which_begins_anew(
    kind: str, known_as: Raw, listed_as: Raw, rewound: bool
) -> None:
    stage = Stage()
    known(stage, running("60"))
    stage.server.objects[FINETUNE_PLURAL] = [running("60")]
    if kind == FINETUNE_PLURAL:
        known(stage, known_as)
    else:
        stage.cache.child_seen(kind, known_as, deleted=False)
    stage.server.objects[kind] = [listed_as]
    if not rewound:
        assert stage.once()
        return
    with pytest.raises(HistoryRewound, match=f"older {kind} team/.*restored"):
        stage.once()


def test_what_is_told_while_it_is_listed_may_be_newer_than_the_list() -> None:
    stage = Stage()
    known(stage, running("60"))
    stage.server.objects[FINETUNE_PLURAL] = [running("60")]
    listed = stage.server.list_metadata

    async def meanwhile(kind: str, namespace: str | None) -> AsyncIterator[list[Raw]]:
        pages = [page async for page in listed(kind, namespace)]
        known(stage, running("61"))
        for page in pages:
            yield page

    stage.server.list_metadata = meanwhile  # type: ignore[method-assign]
    assert stage.once()


@pytest.mark.parametrize("of", KINDS)
def test_what_is_told_while_the_rest_is_listed_is_not_taken_for_gone(of: str) -> None:
    stage = Stage()
    known(stage, running("5"))
    stage.cache.child_seen(PYTORCH_PLURAL, pytorch_job("6"), deleted=False)
    stage.server.objects |= {FINETUNE_PLURAL: [running("5")], PYTORCH_PLURAL: [pytorch_job("6")]}
    younger = {FINETUNE_PLURAL: running("90"), PYTORCH_PLURAL: pytorch_job("90", name="other"), PODS_PLURAL: pod("90")}
    younger[FINETUNE_PLURAL]["metadata"] |= {"name": "other", "uid": "other"}
    listed = stage.server.list_metadata

    async def meanwhile(kind: str, namespace: str | None) -> AsyncIterator[list[Raw]]:
        async for page in listed(kind, namespace):
            yield page
        if kind == of == FINETUNE_PLURAL:
            known(stage, younger[kind])
        elif kind == of:
            stage.cache.child_seen(kind, younger[kind], deleted=False)

    stage.server.list_metadata = meanwhile  # type: ignore[method-assign]
    stage.once()
    assert stage.added == []
    assert stage.cache.is_current(of, younger[of])


def test_a_namespace_that_cannot_be_listed_is_no_reason_to_leave_the_others_alone() -> None:
    stage = Stage("gone", "team")
    stage.server.errors["gone"] = api_error(403, "Forbidden", "is forbidden")
    stage.server.objects[FINETUNE_PLURAL] = [running()]
    elsewhere = running()
    elsewhere["metadata"]["namespace"] = "gone"
    known(stage, elsewhere)
    assert stage.once()
    assert stage.added == [KEY]
    assert stage.heartbeat.ready
    stage.server.errors["team"] = api_error(None)
    assert not stage.once()


def test_without_the_training_operator_there_are_no_pytorchjobs() -> None:
    class Without(Listed):
        def list_metadata(self, kind: str, namespace: str | None) -> AsyncIterator[list[Raw]]:
            if kind == PYTORCH_PLURAL:
                raise api_error(404, "NotFound", "page not found")
            return super().list_metadata(kind, namespace)

    stage = Stage()
    stage.server = stage.resync._cluster = Without()  # type: ignore[assignment]
    assert stage.once()
    assert stage.heartbeat.ready


@pytest.mark.parametrize(
    ("status", "attempt", "deleted"),
    [
        ({"phase": "Running", "attempt": 2}, "1", True),
        ({"phase": "Running", "attempt": 2}, "2", False),
        ({"phase": "Running", "attempt": 2}, "3", False),  # just made, and not written down yet
        (finished(), "1", False),  # what it leaves are its logs
        (finished(), "2", True),  # made just before the operator was stopped, and the job ended without it
        ({"phase": "Pending"}, "1", False),
        ({"phase": "Running", "attempt": 2}, "many", False),
    ],
)
def test_a_pytorchjob_of_no_attempt_is_deleted_and_no_other(
    status: dict[str, Any], attempt: str, deleted: bool
) -> None:
    stage = Stage()
    raw = job(status)
    known(stage, raw)
    stage.cache.child_seen(PYTORCH_PLURAL, pytorch_job(attempt=attempt), deleted=False)
    stage.server.objects |= {FINETUNE_PLURAL: [raw], PYTORCH_PLURAL: [pytorch_job(attempt=attempt)]}
    stage.once()
    assert stage.server.deleted == [CHILD] * deleted


REFUSED = [api_error(409, "Conflict", "no"), api_error(403, "Forbidden"), api_error(422, "Invalid"), api_error(None)]


@pytest.mark.parametrize(
    ("jobs", "deletions"),
    [
        *([[], [error]] for error in REFUSED),
        *([[error], []] for error in REFUSED),
        ([job({"phase": "Running", "attempt": "many"})], []),
    ],
)
def test_a_pytorchjob_that_cannot_be_deleted_costs_only_itself(
    jobs: list[Raw | ApiError], deletions: list[ApiError], caplog: pytest.LogCaptureFixture
) -> None:
    stage = Stage()
    raw = job({"phase": "Running", "attempt": 2})
    known(stage, raw)
    strays = [pytorch_job(name=name) for name in ("protected", "other")]
    for stray in strays:
        stage.cache.child_seen(PYTORCH_PLURAL, stray, deleted=False)
    stage.server.objects |= {FINETUNE_PLURAL: [raw], PYTORCH_PLURAL: strays, PODS_PLURAL: [pod("9")]}
    stage.server.next_job, stage.server.next_deletion = list(jobs), list(deletions)
    assert stage.once()
    assert stage.server.deleted == ["other"]
    assert stage.added == [KEY]  # of the pod
    assert "team/protected" in caplog.text


def test_a_pytorchjob_of_somebody_elses_is_neither_deleted_nor_missed() -> None:
    stage = Stage()
    raw = job({"phase": "Running", "attempt": 2})
    known(stage, raw)
    foreign = pytorch_job(attempt="1")
    foreign["metadata"]["ownerReferences"] = [{"uid": "somebody", "controller": True}]
    stage.server.objects |= {FINETUNE_PLURAL: [raw], PYTORCH_PLURAL: [foreign]}
    for _ in range(3):
        stage.once()
    assert stage.server.deleted == []
    assert stage.added == []
    assert stage.heartbeat.problem() is None
