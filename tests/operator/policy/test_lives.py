"""Whole lives of a job in a world that does what it likes, checked after every step against what must always hold.

The world is a model of the cluster in a few lines; the operator is `decide` and the two steps around it, with a crash
possible between what it does and what it writes down.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from finetune_api.outcome import Reason
from finetune_api.status import Condition, ConditionType, FineTuneJobStatus
from finetune_api.verification import VerificationMessage
from finetune_operator.policy.conditions import condition, is_finished
from finetune_operator.policy.decide import attempt_is_open, decide, next_attempt, note_created
from finetune_operator.policy.observed import PodView, PyTorchJobView, VerificationView
from finetune_operator.policy.plan import ObservedState, Plan
from finetune_operator.policy.verification import awaits_verdict
from finetune_operator.policy.verification import note_created as note_verifying
from tests.operator.policy.views import NOW, PATIENCE, desired, failure, pod, pytorch_job, success


@dataclass
class World:
    """What exists."""

    now: datetime = NOW
    children: dict[int, PyTorchJobView] = field(default_factory=dict)
    pods: dict[int, PodView] = field(default_factory=dict)
    created: list[int] = field(default_factory=list)
    verification: VerificationView | None = None
    verifications: int = 0
    """How many were made."""

    def create(self, attempt: int) -> PyTorchJobView:
        """A PyTorchJob and its pod; the one that is there already when there is one."""
        if attempt not in self.children:
            assert not [number for number, found in self.pods.items() if not found.ended and number != attempt]
            self.created.append(attempt)
            self.children[attempt] = pytorch_job(attempt, created_at=self.now)
            self.pods[attempt] = pod(0, phase="Running", running=True, created_at=self.now)
        return self.children[attempt]

    def verify(self) -> VerificationView:
        """The Job of a verification; the one that is there already when there is one."""
        if self.verification is None:
            self.verifications += 1
            self.verification = VerificationView(
                name="guard-verify", uid="verify", created_at=self.now, started_at=self.now
            )
        return self.verification


class Life(RuleBasedStateMachine):
    """One job."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.status = FineTuneJobStatus()
        self.desired = desired(backoff_limit=2, active_deadline_seconds=5000, verify=True)
        self.deleted = False
        self.ended_as: Condition | None = None
        self.verdict: Condition | None = None
        self.unrecorded = 0
        """Verifications that were deleted before status said that they had been made."""
        self.active_seconds = 0

    def _seen(self) -> ObservedState:
        attempt = self.status.attempt or 0
        unrecorded = None
        if not is_finished(self.status) and not attempt_is_open(self.status):
            unrecorded = self.world.children.get(next_attempt(self.status))
        return ObservedState(
            desired=self.desired,
            status=self.status,
            pytorch_job=self.world.children.get(attempt),
            pods=[self.world.pods[attempt]] if attempt in self.world.pods else [],
            unrecorded=unrecorded,
            verification=self.world.verification if awaits_verdict(self.status, verify=True) else None,
        )

    @rule(crash=st.sampled_from(["no", "before the status"]))
    def look(self, crash: str) -> None:
        """The operator looks at the job."""
        if self.deleted:
            return
        observed = self._seen()
        plan: Plan = decide(observed, self.world.now, PATIENCE)
        if plan.delete_job:
            assert is_finished(self.status)
            self.deleted = True
            return
        if plan.release:
            assert self.status.attempt is not None
            assert not attempt_is_open(self.status) or is_finished(self.status)
            self.world.children.pop(self.status.attempt, None)
            left = self.world.pods.get(self.status.attempt)
            if left is not None and not left.ended:
                self.world.pods[self.status.attempt] = replace(left, deleting=True)
        if plan.create is not None:
            assert not is_finished(self.status)
            note_created(plan, self.world.create(plan.create), observed, self.world.now, PATIENCE)
        if plan.verify:
            end = condition(self.status, ConditionType.SUCCEEDED)
            assert end is not None
            assert end.status == "True"
            note_verifying(plan, self.world.verify(), self.world.now, PATIENCE)
        if crash == "no":
            self.status = plan.status

    @rule(seconds=st.sampled_from([1, 11, 40, 400, 3000]))
    def time_passes(self, seconds: int) -> None:
        """Nothing else happens."""
        self.world.now += timedelta(seconds=seconds)

    @rule(how=st.sampled_from(["success", "user", "world", "silent", "evicted"]))
    def a_pod_ends(self, how: str) -> None:
        """The newest pod ends."""
        for number, found in sorted(self.world.pods.items(), reverse=True):
            if not found.ended and not found.deleting:
                words = {
                    "success": success(),
                    "user": failure(Reason.DATA_INVALID),
                    "world": failure(Reason.HUB_UNAVAILABLE),
                }.get(how)
                self.world.pods[number] = replace(
                    found,
                    phase="Succeeded" if how == "success" else "Failed",
                    running=False,
                    ended=True,
                    exit_code={"success": 0, "user": 11, "world": 201, "silent": 137}.get(how),
                    last_words=words,
                    disruption="Evicted" if how == "evicted" else None,
                    ended_at=self.world.now,
                )
                return

    @rule(how=st.sampled_from(["as trained", "not as trained", "crash", "failed", "deleted"]))
    def the_verification_goes_on(self, how: str) -> None:
        """Its pod ends, or it is deleted."""
        found = self.world.verification
        if found is None:
            return
        if how == "deleted":
            recorded = condition(self.status, ConditionType.VERIFIED)
            self.unrecorded += recorded is None or recorded.reason == "VerificationPending"
            self.world.verification = None
        elif not found.ended:
            said = {"as trained": True, "not as trained": False}.get(how)
            words = VerificationMessage(verified=said)
            text = words.to_bytes().decode() if how != "crash" else ""
            code = words.exit_code if how != "crash" else 139
            ended = pod(0, phase="Failed", ended=True, exit_code=code, ended_message=text)
            self.world.verification = replace(found, pods=[*found.pods, ended], ended=how != "crash")

    @rule()
    def deleted_pods_go(self) -> None:
        """The kubelet confirms what was deleted, garbage collection takes what has no owner."""
        self.world.pods = {
            number: found
            for number, found in self.world.pods.items()
            if not found.deleting and number in self.world.children
        }

    @rule()
    def somebody_deletes_the_pytorchjob(self) -> None:
        """By hand."""
        for number in list(self.world.children):
            del self.world.children[number]
            if number in self.world.pods and not self.world.pods[number].ended:
                self.world.pods[number] = replace(self.world.pods[number], deleting=True)

    @rule(suspend=st.booleans())
    def the_user_changes_her_mind(self, suspend: bool) -> None:
        """Suspend or resume."""
        self.desired = replace(self.desired, suspend=suspend, generation=self.desired.generation + 1)

    @rule(suspend=st.booleans())
    def kueue_suspends(self, suspend: bool) -> None:
        """Or lets go."""
        for number, found in self.world.children.items():
            resumed = self.world.now if found.suspended and not suspend else found.resumed_at
            self.world.children[number] = replace(found, suspended=suspend, resumed_at=resumed)

    @invariant()
    def at_most_one_group_runs(self) -> None:
        """Two groups would write to one output."""
        alive = [number for number, found in self.world.pods.items() if not found.ended and not found.deleting]
        assert len(alive) <= 1

    @invariant()
    def every_attempt_is_made_once(self) -> None:
        """Unless it was deleted before anybody wrote down that it was there."""
        recorded = [attempt.number for attempt in self.status.attempts]
        assert recorded == sorted(set(recorded))
        assert max(recorded, default=0) <= max(self.world.created, default=0)

    @invariant()
    def the_end_is_the_end(self) -> None:
        """The terminal condition never changes again."""
        if is_finished(self.status):
            (found,) = [item for item in self.status.conditions if item.type == "Succeeded"]
            assert self.ended_as in (None, found)
            self.ended_as = found
        else:
            assert self.ended_as is None

    @invariant()
    def a_verdict_is_one_and_comes_after_success(self) -> None:
        """No verification is made twice, and none is of a job that has failed."""
        assert self.world.verifications <= 1 + self.unrecorded
        found = condition(self.status, ConditionType.VERIFIED)
        end = condition(self.status, ConditionType.SUCCEEDED)
        assert found is None or (end is not None and end.status == "True")
        if found is not None and not awaits_verdict(self.status, verify=True):
            assert self.verdict in (None, found)
            self.verdict = found
        else:
            assert self.verdict is None

    @invariant()
    def active_time_never_shrinks(self) -> None:
        """The deadline could otherwise be put off."""
        assert (self.status.active_seconds or 0) >= self.active_seconds
        self.active_seconds = self.status.active_seconds or 0

    @invariant()
    def a_second_look_at_the_same_world_decides_the_same(self) -> None:
        """At rest nothing is written: a look that changes nothing leads to no other status."""
        plan = decide(self._seen(), self.world.now, PATIENCE)
        again = decide(replace(self._seen(), status=plan.status), self.world.now, PATIENCE)
        if not (plan.create or plan.verify or plan.release or plan.again_at == self.world.now or plan.delete_job):
            assert again.status == plan.status

    @invariant()
    def failures_are_within_the_limit(self) -> None:
        """backoffLimit failures are repeated, one more is the last."""
        assert (self.status.failures or 0) <= self.desired.backoff_limit + 1


class LifeAfterSuccess(Life):
    """One job that has an adapter: what may still go wrong is its verification."""

    @initialize()
    def it_succeeds(self) -> None:
        """At its first attempt."""
        self.look(crash="no")
        self.a_pod_ends(how="success")
        self.look(crash="no")
        assert is_finished(self.status)


Life.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
test_whatever_happens = Life.TestCase

LifeAfterSuccess.TestCase.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
test_whatever_happens_after_success = LifeAfterSuccess.TestCase
