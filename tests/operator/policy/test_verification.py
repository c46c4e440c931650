"""From success to a verdict: when the Job is made, what its end means, and that nothing is said twice or taken back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from finetune_api.status import Adapter, Condition, ConditionType, FineTuneJobStatus, Phase
from finetune_api.verification import VerificationMessage
from finetune_operator.names import KUEUE_QUEUE_LABEL
from finetune_operator.policy.conditions import condition
from finetune_operator.policy.decide import decide
from finetune_operator.policy.evictions import exceeded_limit
from finetune_operator.policy.observed import PodView, VerificationView, read_verification
from finetune_operator.policy.plan import ObservedState, Plan
from finetune_operator.policy.reasons import VerificationReason
from finetune_operator.policy.times import rfc3339
from finetune_operator.policy.transitions import events_between
from finetune_operator.policy.verification import awaits_verdict, is_asked_for, note_blocked, note_created
from tests.operator.policy.views import (
    ADAPTER,
    NOW,
    PATIENCE,
    WORKERS_UID,
    ended,
    later,
    observed,
    pytorch_job,
    success,
)

PENDING, VERIFYING, FAILED = VerificationReason.PENDING, VerificationReason.VERIFYING, VerificationReason.FAILED
RUNS = "The Job guard-verify opens the adapter in a process of its own."


def succeeded(reason: str | None = VERIFYING, message: str = RUNS, ago: float = 60, **more: Any) -> FineTuneJobStatus:
    """Status of a job that succeeded so many seconds ago, with that reason of Verified; None for no such condition."""
    time = rfc3339(later(-ago))
    conditions = [Condition(type="Succeeded", status="True", reason="Succeeded", last_transition_time=time)]
    if reason is not None:
        state = {"AsTrained": "True", "NotAsTrained": "False"}.get(reason, "Unknown")
        found = {"status": state, "reason": reason, "message": message, "observedGeneration": 1}
        conditions.append(Condition.model_validate({"type": "Verified", "lastTransitionTime": time, **found}))
    made: dict[str, Any] = {
        "phase": Phase.SUCCEEDED,
        "conditions": conditions,
        "attempt": 1,
        "completion_time": time,
        "observed_generation": 1,
        "adapter": Adapter(uri=ADAPTER.uri, base_model="acme/model", sha256="0" * 64, size_bytes=1),
    }
    return FineTuneJobStatus(**{**made, **more})


def job(*pods: PodView, **more: Any) -> VerificationView:
    """The Job, begun a minute ago."""
    made: dict[str, Any] = {"created_at": later(-61), "started_at": later(-60), **more}
    return VerificationView(name="guard-verify", uid=WORKERS_UID, pods=pods, **made)


def says(verified: bool | None, message: str = "So it is.", code: int | None = None, **more: Any) -> PodView:
    """A pod that ended with these words, and the exit code that goes with them unless told otherwise."""
    words = VerificationMessage(verified=verified, message=message)
    exit_code = words.exit_code if code is None else code
    return ended(0, exit_code, ended_message=words.to_bytes().decode(), **more)


def look(status: FineTuneJobStatus, found: VerificationView | None = None, **spec: Any) -> Plan:
    """What comes of a look."""
    return decide(replace(observed(status, **{"verify": True, **spec}), verification=found), NOW, PATIENCE)


def told(plan: Plan) -> tuple[str, str, str]:
    """State, reason and message of Verified."""
    found = condition(plan.status, ConditionType.VERIFIED)
    return (found.status, found.reason, found.message) if found else ("", "", "")


def test_success_and_the_coming_verification_are_written_at_once() -> None:
    status = FineTuneJobStatus(attempt=1, attempt_start_time=rfc3339(later(-3600)))
    plan = decide(observed(status, pytorch_job(), [ended(0, 0, success())], verify=True), NOW, PATIENCE)
    assert plan.status.phase == Phase.SUCCEEDED
    assert told(plan)[:2] == ("Unknown", PENDING)
    assert (plan.verify, plan.again_at) == (False, NOW)
    assert [item.type for item in plan.status.conditions] == ["Succeeded", "Verified"]


@pytest.mark.parametrize("reason", [None, PENDING])
def test_the_job_is_made_after_success_was_written(reason: str | None) -> None:
    assert look(succeeded(reason)).verify
    assert not look(succeeded(reason), job()).verify


def test_once_made_it_is_never_made_again() -> None:
    plan = look(succeeded(PENDING))
    note_created(plan, job(created_at=NOW, started_at=None), NOW, PATIENCE)
    assert told(plan) == ("Unknown", VERIFYING, RUNS)
    gone = look(plan.status)
    assert not gone.verify
    assert told(gone)[:2] == ("Unknown", FAILED)
    assert "was deleted by somebody else; `finetune verify` does the same by hand." in told(gone)[2]


@pytest.mark.parametrize("reason", ["AsTrained", "NotAsTrained", FAILED])
@pytest.mark.parametrize("found", [None, job(), job(says(True)), job(ended=True)])
def test_a_verdict_stays(reason: str, found: VerificationView | None) -> None:
    status = succeeded(reason)
    plan = look(status, found)
    assert (plan.status, plan.verify, plan.again_at) == (status, False, None)


def test_without_the_wish_or_without_success_there_is_none() -> None:
    assert look(succeeded(None), verify=False).status == succeeded(None)
    failed = succeeded(None)
    failed.conditions = [failed.conditions[0].model_copy(update={"status": "False"})]
    assert told(look(failed)) == ("", "", "")
    assert not awaits_verdict(FineTuneJobStatus(), verify=True)


def test_a_status_without_an_adapter_cannot_be_verified() -> None:
    plan = look(succeeded(PENDING, adapter=None))
    assert (plan.verify, told(plan)[1]) == (False, FAILED)


NO_PROGRAM = 'exec: "python": executable file not found in $PATH'
TOO_LARGE = exceeded_limit('Usage of EmptyDir volume "finetune-cache" exceeds the limit "100Gi". ')
KILLED: dict[str, Any] = {"ended_reason": "OOMKilled"}
LOST: dict[str, Any] = {"disruption": "Evicted"}
ENDS: dict[str, tuple[VerificationView, tuple[str, str, str]]] = {
    "as trained": (job(says(True)), ("True", "AsTrained", "So it is.")),
    "as trained, without a sentence": (job(says(True, "")), ("True", "AsTrained", "The adapter answers as it")),
    "not as trained": (job(says(False, "The BOS is doubled.")), ("False", "NotAsTrained", "The BOS is doubled.")),
    "not as trained, without a sentence": (job(says(False, "")), ("False", "NotAsTrained", "does not answer")),
    "not known": (job(says(None, "No base model.")), ("Unknown", FAILED, "as it was trained: No base model.")),
    "a verdict counts although the pod is on its way out": (
        job(says(True, deleting=True, **LOST)),
        ("True", "AsTrained", ""),
    ),
    "a verdict counts although the Job is deleted": (job(says(True), deleting=True), ("True", "AsTrained", "")),
    "told by the second pod": (job(ended(0, 137, **LOST), says(False)), ("False", "NotAsTrained", "")),
    "told by the first pod": (job(says(False), ended(0, 137, **LOST)), ("False", "NotAsTrained", "")),
    "words that its exit code does not bear out": (
        job(says(True, code=1), ended=True),
        ("Unknown", FAILED, "ended with exit code 1 and did not say why"),
    ),
    "no words": (job(ended(0, 1), ended=True), ("Unknown", FAILED, "`kubectl logs guard-1-worker-0`")),
    "out of memory": (job(ended(0, 137, **KILLED), ended=True), ("Unknown", FAILED, "limits.memory")),
    "an image that has no trainer": (
        job(ended(0, 128, ended_reason="StartError", ended_message=NO_PROGRAM), ended=True),
        ("Unknown", FAILED, f"({NO_PROGRAM}): check that workers.image"),
    ),
    "a node that cannot start it": (
        job(ended(0, 128, ended_reason="StartError", ended_message="nvml error", node="node-7"), ended=True),
        ("Unknown", FAILED, "which the node node-7 may be the cause of (StartError: nvml error)"),
    ),
    "an init container that failed": (
        job(ended(0, None, init_container="mesh", ended_reason="OOMKilled"), ended=True),
        ("Unknown", FAILED, "the init container mesh failed (OOMKilled)"),
    ),
    "a node without memory": (
        job(ended(0, 137, memory_limit=None, **KILLED), ended=True),
        ("Unknown", FAILED, "its node had no more main memory"),
    ),
    "too much disk": (
        job(ended(0, 137, disk_limit=TOO_LARGE), ended=True),
        (
            "Unknown",
            FAILED,
            "raise workers.cache.sizeLimit, or name a claim with workers.cache.persistentVolumeClaim, or",
        ),
    ),
    "no pod left": (
        job(ended=True, end_reason="BackoffLimitExceeded", end_message="Job has reached the limit"),
        ("Unknown", FAILED, "ended without a result (Job has reached the limit)"),
    ),
    "a word that ends in what looks like a mark": (
        job(ended=True, end_message="Job XX."),
        ("Unknown", FAILED, "ended without a result (Job XX);"),
    ),
    "a success that nobody can read": (job(ended=True), ("Unknown", FAILED, "its pod was deleted")),
    "its time is over": (
        job(ended=True, end_reason="DeadlineExceeded"),
        ("Unknown", FAILED, f"did not end in time; what was known of it last: {RUNS}"),
    ),
    "on its way out": (job(deleting=True), ("Unknown", FAILED, "was deleted by somebody else")),
}


@pytest.mark.parametrize("end", ENDS)
def test_an_end_has_its_sentence(end: str) -> None:
    found, (state, reason, message) = ENDS[end]
    plan = look(succeeded(), found)
    assert told(plan)[:2] == (state, reason)
    assert message in told(plan)[2]
    before = condition(succeeded(), ConditionType.SUCCEEDED)
    assert condition(plan.status, ConditionType.SUCCEEDED) == before
    (event,) = events_between(succeeded(), plan.status)
    assert (event.reason, event.type) == (reason, "Normal" if state == "True" else "Warning")
    assert event.message == told(plan)[2]


FULL: dict[str, Any] = {"unschedulable": "0/3 nodes: full"}
NO_IMAGE: dict[str, Any] = {"waiting": "ErrImagePull", "waiting_message": "not found"}
OVER = 7200 - 60 + 5
ON_THE_WAY: dict[str, tuple[VerificationView, str, float]] = {
    "queued": (job(suspended=True, queue="team"), "waits in the queue team until Kueue admits it", 60),
    "suspended by hand": (job(suspended=True), "set its spec.suspend to false", 60),
    "just made": (job(created_at=NOW, started_at=None), RUNS, 30),
    "no pods yet": (job(started_at=later(-10)), RUNS, 20),
    "no pods at all": (job(), "has no pod yet: `kubectl describe job guard-verify` says why", 60),
    "no pods for hours": (job(started_at=later(-4000)), "has no pod yet", 300),
    "no room": (job(ended(0, 137, **LOST), replace(ended(), ended=False, **FULL)), "0/3 nodes: full", OVER),
    "no image": (job(replace(ended(), ended=False, **NO_IMAGE)), "(ErrImagePull: not found)", OVER),
    "running": (job(replace(ended(), ended=False, running=True)), RUNS, OVER),
    "a pod has crashed and the Job may try again": (job(ended(0, 139)), RUNS, 5),
    "a pod was taken away, whatever it said": (job(says(None, **LOST)), RUNS, 5),
    "a pod has ended and nobody ends the Job": (job(ended(0, 139, ago=40)), RUNS, 5),
    "nor has for an hour": (job(ended(0, 139, ago=3600), started_at=later(-3700)), RUNS, 300),
    "by a clock that is wrong": (job(ended(0, 139, ago=-3600), started_at=later(-1000)), RUNS, 100),
    "its time is over and its pod gone": (job(started_at=later(-7200)), "no room", 5),
    "its time has long been over": (job(started_at=later(-8200)), "no room", 100),
}


@pytest.mark.parametrize("doing", ON_THE_WAY)
def test_what_it_does_is_said_once(doing: str) -> None:
    found, message, after = ON_THE_WAY[doing]
    before = succeeded(message="no room", ago=8200) if message == "no room" else succeeded(ago=4000)
    plan = look(before, found)
    assert told(plan)[:2] == ("Unknown", VERIFYING)
    assert message in told(plan)[2]
    assert plan.again_at == later(after)
    assert look(plan.status, found).status == plan.status
    assert events_between(before, plan.status) == []


@pytest.mark.parametrize(("ago", "reason"), [(7199, PENDING), (7200, FAILED)])
def test_what_hinders_it_is_said_and_not_for_ever(ago: float, reason: str) -> None:
    plan = look(succeeded(PENDING, ago=ago))
    note_blocked(plan, "A quota refuses it.", later(8), NOW, PATIENCE)
    assert told(plan)[1] == reason
    assert told(plan)[2].startswith("A quota refuses it. It ")
    assert plan.again_at == (later(8) if reason == PENDING else None)


@pytest.mark.parametrize(
    ("found", "deleted", "again"),
    [(job(replace(ended(), ended=False, running=True)), False, OVER), (job(says(True)), False, -50)],
)
def test_the_job_stays_until_there_is_a_verdict(found: VerificationView, deleted: bool, again: float) -> None:
    status = succeeded(ago=60)
    plan = look(status, found, ttl_seconds_after_finished=10)
    assert (plan.delete_job, plan.again_at) == (deleted, later(again))
    decided = look(succeeded("AsTrained"), ttl_seconds_after_finished=10)
    assert decided.delete_job


def test_the_config_map_of_an_attempt_outlives_it() -> None:
    held = observed(succeeded(), pytorch_job(2), [replace(ended(), ended=False, running=True)], verify=True)
    plan = decide(replace(held, verification=job()), NOW, PATIENCE)
    assert (plan.release, plan.keep_config_map) == (True, True)
    assert not decide(ObservedState(desired=observed().desired, status=succeeded(None)), NOW, PATIENCE).keep_config_map


@pytest.mark.parametrize(
    ("spec", "asked"),
    [
        ({"output": {"verify": True}}, True),
        ({"output": {"verify": False}}, False),
        ({"output": None}, False),
        ({}, False),
    ],
)
def test_who_asks_for_it(spec: dict[str, Any], asked: bool) -> None:
    assert is_asked_for(spec) is asked


def raw(uid: str, name: str, container: str, code: int) -> dict[str, Any]:
    """A pod that ended."""
    ended_state = {"exitCode": code, "message": "word"}
    return {
        "metadata": {
            "name": name,
            "uid": name,
            "ownerReferences": [{"uid": uid, "controller": True}],
            "creationTimestamp": name,
        },
        "status": {"phase": "Failed", "containerStatuses": [{"name": container, "state": {"terminated": ended_state}}]},
    }


def test_a_job_is_read_with_its_own_pods_alone() -> None:
    times = ["2026-01-31T12:00:02Z", "2026-01-31T12:00:01Z"]
    pods = [raw("job", times[0], "verify", 1), raw("other", "x", "verify", 0), raw("job", times[1], "pytorch", 3)]
    status = {"conditions": [{"type": "Failed", "status": "True", "reason": "DeadlineExceeded", "message": "late"}]}
    found = read_verification(
        {
            "metadata": {"name": "j", "uid": "job", "labels": {KUEUE_QUEUE_LABEL: "team"}},
            "spec": {"suspend": True},
            "status": status,
        },
        pods,
    )
    assert [pod.name for pod in found.pods] == times[::-1]
    # What another container says is not its word.
    assert [pod.exit_code for pod in found.pods] == [None, 1]
    assert (found.ended, found.end_reason, found.suspended, found.queue) == (True, "DeadlineExceeded", True, "team")
    assert not read_verification({"metadata": [], "spec": 3, "status": {"conditions": [{"type": 7}]}}, []).ended


@pytest.mark.parametrize("text", ["", "{", "[]", '{"message": "x"}', '{"verified": "perhaps"}', "x" * 5000])
def test_other_words_are_no_verdict(text: str) -> None:
    assert VerificationMessage.parse(text) is None


@pytest.mark.parametrize("message", ["short", "ä" * 9000, '"\\' * 4000, "\ud800 odd", "\x00" * 5000])
def test_words_survive_the_way(message: str) -> None:
    for verified in (True, False, None):
        data = VerificationMessage(verified=verified, message=message).to_bytes()
        assert len(data) <= 4096
        found = VerificationMessage.parse(data)
        assert found is not None
        assert found.verified is verified
