"""Every sentence that the policies say, whole: sentences.txt is what a person reads in `kubectl describe ftj`.

After a change, `python -m tests.operator.policy.test_sentences` writes the file anew; read what became of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune_api.outcome import Reason, TerminationMessage
from finetune_api.problem import Problem
from finetune_api.status import Adapter, Attempt, Checkpoint, Condition, ConditionType, FineTuneJobStatus, Phase
from finetune_api.verification import VerificationMessage
from finetune_operator.errors import api_error
from finetune_operator.policy.conditions import condition
from finetune_operator.policy.decide import decide, note_blocked
from finetune_operator.policy.evictions import exceeded_limit
from finetune_operator.policy.observed import PodView, PyTorchJobView, VerificationView
from finetune_operator.policy.plan import Plan
from finetune_operator.policy.refusals import refusal
from finetune_operator.policy.times import rfc3339
from finetune_operator.policy.transitions import events_between
from finetune_operator.policy.verification import give_up
from finetune_operator.policy.verification import note_blocked as verification_blocked
from tests.operator.policy.views import (
    ADAPTER,
    NOW,
    PATIENCE,
    WORKERS_UID,
    ended,
    failure,
    later,
    observed,
    pod,
    pytorch_job,
    running,
    success,
)

FILE = Path(__file__).parent / "sentences.txt"
BAD = [Problem("spec.output", "output is required."), Problem("spec.train_path", "it is local: use s3://.")]
NOTICES = [Problem("spec.deepspeed", "deepspeed has no effect."), Problem("spec.task", "no task is given.")]
NO_PROGRAM = 'exec: "python": executable file not found in $PATH'
STUCK: dict[str, Any] = {"waiting_message": "text of\n  the kubelet"}


def during(attempt: int = 1, **more: Any) -> FineTuneJobStatus:
    """A job whose attempt has been active for an hour."""
    since = rfc3339(later(-3600))
    made = {"attempt_start_time": since, "active_since": since, "start_time": since, **more}
    return FineTuneJobStatus(attempt=attempt, **made)


def just_begun() -> FineTuneJobStatus:
    """A job whose attempt became active a minute ago."""
    return during(active_since=rfc3339(later(-60)))


def after_an_end(why: str = "HubUnavailable", ago: float = 3600, **more: Any) -> FineTuneJobStatus:
    """A job whose first attempt ended so many seconds ago."""
    end = Attempt(number=1, reason=why, message="It was away.", completion_time=rfc3339(later(-ago)))
    return during(**{"attempts": [end], "active_since": None, "active_seconds": 60, **more})


def told(plan: Plan, kind: ConditionType = ConditionType.SUCCEEDED) -> str:
    """State, phase, reason and sentence."""
    found = condition(plan.status, kind)
    assert found is not None
    return f"{found.status} {plan.status.phase} {found.reason}\n{found.message}"


def doing(found: PyTorchJobView | None, *pods: PodView, status: FineTuneJobStatus | None = None, **spec: Any) -> str:
    """What a job says while its attempt goes on, or of an attempt that has just ended."""
    return told(decide(observed(status or during(), found, pods, **spec), NOW, PATIENCE))


def ends(*pods: PodView, found: PyTorchJobView | None = None, status: FineTuneJobStatus | None = None) -> str:
    """What is written down of the end of an attempt."""
    found = found or pytorch_job(nodes=len(pods))
    state = replace(observed(status or during(), found, pods), noticed=later(-30))
    (end,) = decide(state, NOW, PATIENCE).status.attempts[-1:]
    return f"{end.reason} counted={end.counted} exit_code={end.exit_code}\n{end.message}"


def full(volume: str) -> PodView:
    """Evicted for what it wrote to that volume."""
    return ended(0, 137, disk_limit=exceeded_limit(f'Usage of EmptyDir volume "{volume}" exceeds the limit "9Gi". '))


def killed(**more: Any) -> PodView:
    """For want of memory."""
    return ended(0, 137, ended_reason="OOMKilled", node="node-7", **more)


POD_LIMIT = "Pod ephemeral local storage usage exceeds the total limit of containers 1Gi. "


def full_disk(container: str = "") -> PodView:
    """Evicted for what all containers of the pod wrote, or one of them."""
    of_one = f'Container {container} exceeded its local ephemeral storage limit "1Gi". '
    return ended(0, 137, disk_limit=exceeded_limit(of_one if container else POD_LIMIT))


def no_init(**more: Any) -> PodView:
    """An init container did not let the trainer start."""
    return ended(0, None, init_container="mesh", **more)


def never(message: str, **more: Any) -> PodView:
    """Could not be started."""
    return ended(0, 128, ended_reason="StartError", ended_message=message, **more)


def verifying(*pods: PodView, **more: Any) -> VerificationView:
    """The Job of a verification, begun a minute ago."""
    made: dict[str, Any] = {"created_at": later(-61), "started_at": later(-60), **more}
    return VerificationView(name="guard-verify", uid=WORKERS_UID, pods=pods, **made)


def done(reason: str | None, **more: Any) -> FineTuneJobStatus:
    """A job that succeeded, with that reason of Verified."""
    time = rfc3339(later(-60))
    conditions = [Condition(type="Succeeded", status="True", reason="Succeeded", last_transition_time=time)]
    if reason is not None:
        words = "The Job guard-verify runs."
        conditions.append(
            Condition(type="Verified", status="Unknown", reason=reason, message=words, last_transition_time=time)
        )
    made: dict[str, Any] = {
        "phase": Phase.SUCCEEDED,
        "conditions": conditions,
        "attempt": 1,
        "completion_time": time,
        "adapter": Adapter(uri=ADAPTER.uri, base_model="acme/model", sha256="0" * 64, size_bytes=1),
    }
    return FineTuneJobStatus(**{**made, **more})


def verified(found: VerificationView | None, status: FineTuneJobStatus | None = None) -> str:
    """What Verified says."""
    state = replace(observed(status or done("Verifying"), verify=True), verification=found)
    return told(decide(state, NOW, PATIENCE), ConditionType.VERIFIED)


def judged(said: bool | None, message: str) -> PodView:
    """A pod with a verdict."""
    words = VerificationMessage(verified=said, message=message)
    return ended(0, words.exit_code, ended_message=words.to_bytes().decode())


def blocked(sentence: str, ago: float) -> str:
    """What Verified says when the Job cannot be made."""
    plan = decide(
        observed(done("VerificationPending", completion_time=rfc3339(later(-ago))), verify=True), NOW, PATIENCE
    )
    verification_blocked(plan, sentence, later(5), NOW, PATIENCE)
    return told(plan, ConditionType.VERIFIED)


def noted(how: str) -> str:
    """What a job says whose next attempt cannot be made."""
    plan = decide(observed(), NOW, PATIENCE)
    if how == "blocked":
        note_blocked(plan, "NameTaken", "It belongs to somebody else.")
    else:
        give_up(plan, "Nothing is known.")
        return told(plan, ConditionType.VERIFIED)
    return told(plan)


def refused(kind: str, code: int, text: str) -> str:
    """What is made of the API server's answer to a creation."""
    error = api_error(code, "", text)
    error.kind = kind
    found = refusal(error)
    assert found is not None
    return f"{found.reason}\n{found.sentence}"


def just_succeeded() -> Plan:
    """A job that is to be verified."""
    return decide(observed(during(), pytorch_job(), [ended(0, 0, success())], verify=True), NOW, PATIENCE)


def first_notices(count: int) -> str:
    """The last event of so many notices."""
    many = [Problem(f"spec.env[{number}]", "it is null.") for number in range(count)]
    events = events_between(FineTuneJobStatus(), FineTuneJobStatus(observed_generation=1), notices=many)
    return f"{len(events)} events\n{events[-1].type} {events[-1].reason} {events[-1].message}"


def history(status: FineTuneJobStatus, new: FineTuneJobStatus) -> str:
    """The events between two states."""
    return "\n".join(f"{event.type} {event.reason} {event.message}" for event in events_between(status, new))


TWO = pytorch_job(nodes=2)
ASKED = pytorch_job(end="Failed", end_message="It was asked to.")
OUT_OF_MEMORY = Attempt(number=1, reason="OutOfMemory")
MESH: dict[str, Any] = {"init_container": "mesh", **STUCK}
LEAVING: dict[str, Any] = {"deleting": True}
PEER = failure(Reason.PEER_FAILED, "It lost the others.", collateral=True)


def situations() -> Mapping[str, str]:
    """What is said, by what has happened."""
    stopped = decide(observed(during(), pytorch_job(), [running()], suspend=True), NOW, PATIENCE).status
    return {
        # An attempt goes on.
        "one worker is being started": doing(pytorch_job(), pod(), status=just_begun()),
        "two workers are being started": doing(TWO, pod(0), running(1), status=just_begun()),
        "one worker runs": doing(pytorch_job(), running()),
        "two workers run": doing(TWO, running(0), running(1)),
        "it was edited": doing(pytorch_job(edited=True), running()),
        "pods are missing": doing(TWO, running(0)),
        "one worker finds no node": doing(pytorch_job(), pod(unschedulable="0/3 nodes:\n  3 full.")),
        "one of two workers finds no node": doing(TWO, running(0), pod(1, unschedulable="0/3 nodes: 3 full.")),
        "one worker has no node": doing(pytorch_job(), pod()),
        "one worker does not start": doing(pytorch_job(), pod(node="node-7")),
        "no image": doing(pytorch_job(), pod(waiting="ErrImagePull", **STUCK)),
        "no image of an init container": doing(pytorch_job(), pod(waiting="ErrImagePull", **MESH)),
        "no Secret": doing(pytorch_job(), pod(waiting="CreateContainerConfigError", **STUCK)),
        "no Secret of an init container": doing(pytorch_job(), pod(waiting="CreateContainerConfigError", **MESH)),
        "no start": doing(pytorch_job(), pod(waiting="RunContainerError", **STUCK)),
        "no start of an init container": doing(pytorch_job(), pod(waiting="RunContainerError", **MESH)),
        "it is queued": doing(pytorch_job(suspended=True, queue="team"), queue="team"),
        "it was preempted": doing(pytorch_job(suspended=True, has_run=True, queue="team"), queue="team"),
        "somebody suspended the PyTorchJob": doing(pytorch_job(suspended=True)),
        "it is in another queue": doing(pytorch_job(queue="team"), running(), queue="other"),
        "it is in no queue": doing(pytorch_job(), running(), queue="other"),
        "it is to be in no queue": doing(pytorch_job(queue="team"), running()),
        "one notice": doing(pytorch_job(), running(), notices=NOTICES[:1]),
        "two notices": doing(pytorch_job(), running(), notices=NOTICES),
        "the spec became invalid meanwhile": doing(pytorch_job(), running(), problems=BAD),
        # An attempt ends.
        "a user's mistake": ends(ended(0, 11, failure(Reason.DATA_INVALID, "Row 7 is empty."))),
        "one that says nothing of it": ends(ended(0, 11, failure(Reason.DATA_INVALID, ""))),
        "one that its exit code denies": ends(ended(0, 0, failure(Reason.DATA_INVALID, "Row 7 is empty."))),
        "a peer was lost": ends(ended(0, 203, PEER), found=TWO),
        "memory of its own": ends(killed(memory_request="64Gi")),
        "memory that was not set aside": ends(killed(memory_request="8Gi")),
        "memory without a limit": ends(killed(memory_limit=None)),
        "memory of an unknown node": ends(ended(0, 137, ended_reason="OOMKilled", memory_limit=None)),
        "memory again": ends(
            killed(memory_limit=None), status=during(2, attempts=[Attempt(number=1, reason="OutOfMemory")])
        ),
        "disk: the cache": ends(full("finetune-cache")),
        "disk: temporary files": ends(full("finetune-scratch")),
        "disk: shared memory": ends(full("finetune-shared-memory")),
        "disk: a volume": ends(full("data")),
        "disk: the pod": ends(full_disk()),
        "disk: the container": ends(full_disk("pytorch")),
        "disk: another container": ends(full_disk("mesh")),
        "it was evicted": ends(ended(0, 137, disruption="Evicted: low on\n  memory")),
        "its pod was deleted": ends(ended(0, 137, deleting=True)),
        "it was told to stop": ends(ended(0, 143, failure(Reason.TERMINATED, "Stopped."))),
        "no program": ends(never(NO_PROGRAM)),
        "no GPU driver": ends(never("nvml error", node="node-7")),
        "no GPU driver on an unknown node": ends(never("nvml error")),
        "no start and no word": ends(ended(0, 128, ended_reason="StartError")),
        "an init container failed": ends(
            ended(0, None, init_container="mesh", ended_reason="Error", ended_message="exit code 1")
        ),
        "an init container vanished": ends(ended(0, None, init_container="mesh")),
        "silence": ends(ended(0, 77)),
        "a signal": ends(ended(0, 139)),
        "a kill": ends(ended(0, 137)),
        "no exit code": ends(ended(0, None, ended_reason="ContainerStatusUnknown")),
        "no exit code but a text": ends(ended(0, None, ended_reason="Unknown", ended_message="it is gone")),
        "a success without an adapter that failed": ends(ended(0, 1, TerminationMessage(succeeded=True))),
        "a success without an adapter that crashed": ends(ended(0, 139, TerminationMessage(succeeded=True))),
        "a failure without a reason": ends(ended(0, 204, TerminationMessage(succeeded=False, message="Odd."))),
        "a failure without a word": ends(ended(0, 204, TerminationMessage(succeeded=False))),
        "no result": ends(ended(0, 0)),
        "a result": ends(ended(0, 0, success())),
        "a result that its exit code denies": ends(ended(0, 139, success())),
        "pods are gone": ends(found=pytorch_job(nodes=5, end="Failed")),
        "the training operator's word": ends(running(), found=ASKED),
        "the training operator's silence": ends(running(), found=pytorch_job(end="Failed")),
        "the training operator's word after a suspension": ends(
            running(created_at=later(-50)), found=replace(ASKED, resumed_at=later(-60))
        ),
        "the PyTorchJob was deleted": doing(None),
        "a result of a deleted PyTorchJob": doing(None, ended(0, 0, success())),
        "suspended": doing(pytorch_job(), running(), suspend=True),
        "the deadline": doing(pytorch_job(), running(), active_deadline_seconds=60),
        "another attempt follows": doing(pytorch_job(), ended(0, 201, failure(Reason.HUB_UNAVAILABLE, "It was away."))),
        "the only attempt": doing(
            pytorch_job(), ended(0, 201, failure(Reason.HUB_UNAVAILABLE, "It was away.")), backoff_limit=0
        ),
        "the last attempt": doing(
            pytorch_job(2),
            ended(0, 201, failure(Reason.HUB_UNAVAILABLE, "It was away.")),
            status=during(2, failures=1),
            backoff_limit=1,
        ),
        # Between two attempts.
        "pods are still ending": doing(
            None, running(0), *(running(n, **LEAVING) for n in (1, 2, 3)), status=after_an_end()
        ),
        "the PyTorchJob is still there": doing(pytorch_job(), status=after_an_end()),
        "a pod without an owner": doing(None, replace(running(), owner_uid=""), status=after_an_end()),
        "pods of a suspended job": doing(None, running(deleting=True), status=stopped, suspend=True),
        "it rests": doing(None, status=stopped, suspend=True),
        "it rests at a checkpoint": doing(
            None, status=during(attempts=stopped.attempts, checkpoint=Checkpoint(uri="s3://x", step=9)), suspend=True
        ),
        "it was applied suspended": doing(None, status=FineTuneJobStatus(), suspend=True),
        "the next attempt has to wait": doing(None, status=after_an_end(ago=5)),
        "one problem": doing(None, status=FineTuneJobStatus(), problems=BAD[:1]),
        "two problems": doing(None, status=FineTuneJobStatus(), problems=BAD),
        "the limit was lowered": doing(None, status=after_an_end(failures=1), backoff_limit=0),
        "of all failures none is kept": doing(None, status=FineTuneJobStatus(failures=9)),
        "the deadline between two attempts": doing(None, status=after_an_end(), active_deadline_seconds=60),
        "no progress": doing(None, status=after_an_end("Disrupted", attempts_without_progress=10)),
        "no progress, and nothing is kept": doing(None, status=FineTuneJobStatus(attempts_without_progress=10)),
        "the next attempt is blocked": noted("blocked"),
        "there is no training operator": refused("PyTorchJob", 404, "not found"),
        "the training operator does not answer": refused("PyTorchJob", 500, "a webhook timed out"),
        "Kueue does not answer": refused("PyTorchJob", 500, 'webhook "pods.kueue" timed out'),
        "a webhook does not answer": refused("PyTorchJob", 500, 'webhook "validate.kyverno.svc" timed out'),
        "some webhook does not answer": refused("ConfigMap", 500, "a webhook timed out"),
        "a quota is used up": refused("PyTorchJob", 403, "exceeded quota: jobs"),
        "a webhook objects": refused("ConfigMap", 403, 'webhook "validate.kyverno.svc" denied it'),
        "a right is missing": refused("ConfigMap", 403, 'cannot create resource "configmaps"'),
        "somebody objects": refused("ConfigMap", 403, "no"),
        "it is not valid": refused("PyTorchJob", 422, "no such key"),
        # A verification.
        "it comes next": told(
            decide(observed(during(), pytorch_job(), [ended(0, 0, success())], verify=True), NOW, PATIENCE),
            ConditionType.VERIFIED,
        ),
        "nothing to verify": verified(None, done("VerificationPending", adapter=None)),
        "its Job was deleted": verified(None),
        "its Job is being deleted": verified(verifying(deleting=True)),
        "as trained": verified(verifying(judged(True, "So it is."))),
        "as trained, in no words": verified(verifying(judged(True, ""))),
        "not as trained": verified(verifying(judged(False, "Two differ."))),
        "not as trained, in no words": verified(verifying(judged(False, ""))),
        "not to be told": verified(verifying(judged(None, "No base model."))),
        "its time is over": verified(verifying(ended=True, end_reason="DeadlineExceeded")),
        "its time is over, and nothing was known": verified(
            verifying(ended=True, end_reason="DeadlineExceeded"), done(None)
        ),
        "no pod is left": verified(verifying(ended=True, end_message="It has reached it.")),
        "no pod is left, and a word": verified(verifying(ended=True, end_reason="BackoffLimitExceeded")),
        "no pod is left, and no word": verified(verifying(ended=True)),
        "its memory": verified(verifying(killed(), ended=True)),
        "its node's memory": verified(verifying(killed(memory_limit=None), ended=True)),
        "its disk": verified(verifying(full("finetune-cache"), ended=True)),
        "its image": verified(verifying(never(NO_PROGRAM), ended=True)),
        "its node": verified(verifying(never("nvml error", node="node-7"), ended=True)),
        "its init container": verified(
            verifying(ended(0, None, init_container="mesh", ended_reason="Error"), ended=True)
        ),
        "its exit code": verified(verifying(ended(0, 77), ended=True)),
        "its exit code is not known": verified(verifying(ended(0, None, ended_message="it is gone"), ended=True)),
        "it is queued, too": verified(verifying(suspended=True, queue="team")),
        "somebody suspended its Job": verified(verifying(suspended=True)),
        "it has no pod": verified(verifying()),
        "it finds no node": verified(verifying(pod(unschedulable="0/3 nodes: full."))),
        "it has no image": verified(verifying(pod(waiting="ErrImagePull", waiting_message="not found"))),
        "it runs": verified(verifying(running())),
        "it is blocked": blocked("A quota refuses it.", 60),
        "it has been blocked for long": blocked("A quota refuses it.", 7200),
        "it is given up": noted("given up"),
        # Events.
        "ten notices": first_notices(10),
        "twelve notices": first_notices(12),
        "an attempt was made and has ended": history(
            FineTuneJobStatus(), during(2, attempts=[Attempt(number=1, reason="Disrupted", message="It was evicted.")])
        ),
        "an end without a reason": history(FineTuneJobStatus(), during(1, attempts=[Attempt(number=1)])),
    }


def rendered() -> str:
    """The file."""
    return "\n".join(f"== {name}\n{said}\n" for name, said in situations().items())


def test_every_sentence_is_the_one_that_was_read_by_a_person() -> None:
    assert rendered() == FILE.read_text()


def test_every_sentence_is_one() -> None:
    for name, said in situations().items():
        sentence = said.partition("\n")[2]
        assert sentence.endswith((".", ".)", "`.")), name
        assert "None" not in sentence, name
        assert "  " not in sentence, name


if __name__ == "__main__":
    FILE.write_text(rendered())
