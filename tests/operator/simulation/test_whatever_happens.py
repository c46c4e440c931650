"""Whatever happens to a job, its children, its operator and what is between them: the properties hold."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from finetune_operator.names import FINETUNE_PLURAL, KUEUE_QUEUE_LABEL, child_name
from finetune_operator.progress.sender import Sender
from finetune_operator.wire import Raw
from tests.operator.simulation import author, own_writes, rest
from tests.operator.simulation.actors import End, is_over
from tests.operator.simulation.author import NAME, manifest, report
from tests.operator.simulation.clients import NAMESPACE, is_going
from tests.operator.simulation.model import Model
from tests.operator.simulation.operator import SELECTORS
from tests.operator.simulation.wire import Call, Fate, Fault
from tests.operator.simulation.world import Circumstances, World

KIND = st.sampled_from(list(SELECTORS))
WHICH = st.integers(0, 3)
"""Which of several."""
SKEW_SECONDS = (0, -3600, -40, 40, 3600)


class Life(RuleBasedStateMachine):
    """One name, under which jobs come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.model = Model(self.world.server)
        self.hidden = False
        """Something is there that watches do not find any more."""
        self.unwatched = False
        """Something was changed that is not watched."""

    @initialize(
        circumstances=st.builds(
            Circumstances,
            latency_seconds=st.sampled_from([0.0, 0.05]),
            node_skew_seconds=st.sampled_from(SKEW_SECONDS),
            same_uid_prefix=st.booleans(),
            queued=st.booleans(),
            progress=st.booleans(),
        ),
        nodes=st.sampled_from([1, 2]),
        queued=st.booleans(),
    )
    def it_begins(self, circumstances: Circumstances, nodes: int, queued: bool) -> None:
        """An operator runs, and a job is applied."""
        self.world.close()
        self.world = World(circumstances)
        self.model = Model(self.world.server)
        self.world.witness = self._watch_over
        self.world.start_operator()
        self._apply(queue="team" if queued else None, workers={"nodes": nodes, "gpusPerNode": 0})

    def teardown(self) -> None:
        """What it ends as is at rest, too."""
        try:
            if sys.exc_info()[0] is None:
                self.settle()
        finally:
            self.world.close()

    # The author

    @rule(limit=st.sampled_from([0, 1]), deadline=st.sampled_from([None, 300]), ttl=st.sampled_from([None, 100]))
    def apply(self, limit: int, deadline: int | None, ttl: int | None) -> None:
        """A job of that name is applied, unless there is one."""
        if self.world.client.get("finetunejobs", NAME) is None:
            self._apply(backoffLimit=limit, activeDeadlineSeconds=deadline, ttlSecondsAfterFinished=ttl)

    @rule(
        key=st.sampled_from(["backoffLimit", "ttlSecondsAfterFinished", "activeDeadlineSeconds"]),
        value=st.sampled_from([1, 2, 200]),
    )
    def edit(self, key: str, value: int) -> None:
        """A key that may be changed."""
        self._change({"spec": {key: value}})

    @rule(nodes=st.sampled_from([1, 2]))
    def resize(self, nodes: int) -> None:
        """Other workers, from the next attempt on."""
        self._change({"spec": {"workers": {"nodes": nodes}}})

    @rule(path=st.sampled_from(["s3://data/train.jsonl", "s3://data/other.jsonl", "/data/train.jsonl"]))
    def change_training(self, path: str) -> None:
        """What is trained, which no admission refuses here; the last is one that no pod can read."""
        self._change({"spec": {"train_path": path}})

    @rule(queue=st.sampled_from([None, "team", "other"]))
    def change_queue(self, queue: str | None) -> None:
        """Its label, of which the generation knows nothing."""
        self._change({"metadata": {"labels": {KUEUE_QUEUE_LABEL: queue}}})

    @rule(suspend=st.booleans())
    def suspend(self, suspend: bool) -> None:
        """Or resume."""
        self._change({"spec": {"suspend": suspend}})

    @rule(hold=st.booleans())
    def delete(self, hold: bool) -> None:
        """It goes, at once or when somebody's finalizer does."""
        job = self._job()
        if job is not None:
            if hold:
                job = self.world.client.patch(job, {"metadata": {"finalizers": [author.FINALIZER]}})
            self.world.client.delete(job)

    @rule()
    def finalizers_go(self) -> None:
        """Whoever held something up lets it go."""
        for plural in ("finetunejobs", "pytorchjobs"):
            for raw in self.world.client.find(plural):
                if raw["metadata"].get("finalizers"):
                    self.world.client.patch(raw, {"metadata": {"finalizers": None}})

    # What happens to children

    @rule()
    def surroundings_work(self) -> None:
        """Training operator, garbage collector and kubelets do what there is to do."""
        self.world.surroundings_work()

    @rule()
    def life_goes_on(self) -> None:
        """So that something is there that can go wrong."""
        self.world.surroundings_work()
        for pod in self.world.client.find("pods"):
            if pod["status"]["phase"] == "Pending":
                self.world.kubelet.run(pod)
        self.world.pass_time(3.0)

    @rule()
    def training_operator_works(self) -> None:
        """It alone."""
        self.world.training_operator.work()

    @rule(which=WHICH)
    def a_pod_runs(self, which: int) -> None:
        """Its node has started it."""
        pod = self._one([pod for pod in self.world.client.find("pods") if pod["status"]["phase"] == "Pending"], which)
        if pod is not None:
            self.world.kubelet.run(pod)

    @rule(which=WHICH, how=st.sampled_from(End))
    def a_pod_ends(self, which: int, how: End) -> None:
        """By itself, or because its deletion was asked for."""
        pod = self._one([pod for pod in self.world.client.find("pods") if not is_over(pod)], which)
        if pod is not None:
            self.world.kubelet.end(pod, how)

    @rule(plural=st.sampled_from(["pods", "pytorchjobs", "configmaps"]), which=WHICH, hold=st.booleans())
    def a_child_is_deleted(self, plural: str, which: int, hold: bool) -> None:
        """By hand, or by whatever takes pods away."""
        raw = self._one(self.world.client.find(plural), which)
        if raw is not None:
            if hold and plural == "pytorchjobs":
                raw = self.world.client.patch(raw, {"metadata": {"finalizers": [author.FINALIZER]}})
            self.world.client.delete(raw)
            self.unwatched |= plural == "configmaps"

    @rule(suspend=st.booleans(), which=WHICH)
    def kueue(self, suspend: bool, which: int) -> None:
        """It stops an attempt, or admits it."""
        raw = self._one(self.world.client.find("pytorchjobs"), which)
        if raw is not None:
            self.world.client.patch(raw, {"spec": {"runPolicy": {"suspend": suspend}}})

    @rule(plural=st.sampled_from(["pods", "pytorchjobs"]), which=WHICH, how=st.sampled_from(["relabel", "orphan"]))
    def a_child_is_edited(self, plural: str, which: int, how: str) -> None:
        """As nobody should."""
        raw = self._one(self.world.client.find(plural), which)
        if raw is not None:
            (author.relabel if how == "relabel" else author.orphan)(self.world.client, raw)
            self.hidden |= how == "relabel"

    @rule(plural=st.sampled_from(["pytorchjobs", "configmaps"]), number=st.integers(1, 3))
    def a_stranger_has_the_name(self, plural: str, number: int) -> None:
        """Of a child to come."""
        job = self._job()
        if job is not None:
            name = child_name(NAME, job["metadata"]["uid"], number)
            if self.world.client.get(plural, name) is None:
                self.world.client.create(plural, author.foreign(name))

    # What happens to operators

    @rule(kind=KIND)
    def a_watch_is_late(self, kind: str) -> None:
        """It tells nothing more until it is made to."""
        for operator in self.world.alive:
            operator.late.add(kind)

    @rule(kind=KIND, how=st.sampled_from(["one", "twice", "all", "lost", "anew"]))
    def a_watch_tells(self, kind: str, how: str) -> None:
        """Something that it has to tell, or it is lost, or it begins anew."""
        for operator in self.world.alive:
            if how == "all":
                operator.late.discard(kind)
                while operator.pending[kind]:
                    operator.deliver(kind)
            elif how == "anew":
                operator.watch_anew(kind)
                self.world.missed = True
            elif how == "lost":
                self.world.missed |= bool(operator.pending[kind])
                operator.pending[kind].clear()
            else:
                operator.deliver(kind, twice=how == "twice")

    @rule(fate=st.sampled_from(Fate), countdown=st.integers(1, 4), reads=st.booleans())
    def a_request_will_meet_its_fate(self, fate: Fate, countdown: int, reads: bool) -> None:
        """One that is still to come."""
        for operator in self.world.alive[:1]:
            operator.wire.faults.append(Fault(fate, countdown, reads))

    @rule()
    def requests_go_on(self) -> None:
        """Those that are held up."""
        for operator in self.world.alive:
            operator.wire.let_go()

    @rule(which=WHICH)
    def an_operator_crashes(self, which: int) -> None:
        """It is killed."""
        alive = self.world.alive
        if alive:
            alive[which % len(alive)].crash()

    @precondition(lambda self: len(self.world.alive) < 2)
    @rule(skew_seconds=st.sampled_from(SKEW_SECONDS))
    def an_operator_starts(self, skew_seconds: int) -> None:
        """Perhaps while another one still runs, and on a node whose clock is wrong."""
        self.world.start_operator(skew_seconds)

    @rule(number=st.integers(1, 3), phase=st.sampled_from(["Preparing", "Running", "Publishing", "Done"]), step=WHICH)
    def a_trainer_reports(self, number: int, phase: str, step: int) -> None:
        """The present one, or one that is late; to whichever operator the service leads."""
        job = self._job()
        child = self.world.client.get("pytorchjobs", child_name(NAME, job["metadata"]["uid"], number)) if job else None
        if job is None or child is None or not self.world.circumstances.progress:
            return
        sender = Sender(
            NAMESPACE, NAME, job["metadata"]["uid"], number, child["metadata"]["uid"], "worker-0", self.world.now()
        )
        for operator in self.world.alive[:1]:
            operator.report(sender, report(phase, step, self.world.now()))

    @rule()
    def resync(self) -> None:
        """Operators look over everything."""
        for operator in self.world.alive:
            operator.resync()

    @rule(seconds=st.sampled_from([0.001, 1.0, 7.0, 100.0]))
    def time_passes(self, seconds: float) -> None:
        """And nothing else happens."""
        self.world.pass_time(seconds)

    @rule()
    def settle(self) -> None:
        """Everything that can happen by itself has happened."""
        self.world.missed |= self.hidden
        if self.unwatched:
            # What a ConfigMap said is remembered, and nobody would notice that it is gone.
            for operator in self.world.alive:
                operator.crash()
            self.unwatched = False
        self.world.settle()
        rest.check(self.world, self.model)

    def _watch_over(self, call: Call, sent: Sequence[Call]) -> None:
        self.model.witness(call, sent)
        own_writes.witness(call, sent)

    def _apply(self, queue: str | None = None, **spec: Any) -> None:
        self.world.client.create("finetunejobs", manifest(queue=queue, **spec))
        self.world.pass_time(0.001)

    def _change(self, patch: Raw) -> None:
        job = self._job()
        if job is not None:
            self.world.client.patch(job, patch)

    def _job(self) -> Raw | None:
        job = self.world.client.get("finetunejobs", NAME)
        return None if job is None or is_going(job) else job

    def _one(self, found: list[Raw], which: int) -> Raw | None:
        return found[which % len(found)] if found else None


Life.TestCase.settings = settings(
    # The usual ones are the same every time; whoever asks for more gets others.
    max_examples=int(os.environ.get("LIVES", "30")),
    derandomize="LIVES" not in os.environ,
    stateful_step_count=40,
    deadline=None,
)
test_whatever_happens = Life.TestCase


@pytest.mark.parametrize("fate", [Fate.LOST, Fate.REFUSED, Fate.UNANSWERED])
def test_a_job_of_which_no_event_told_is_taken_up_as_soon_as_it_can_be_read(fate: Fate) -> None:
    """A resync finds it, and there is no other one for minutes."""
    world = World()
    try:
        operator = world.start_operator()
        world.settle()
        operator.late.add(FINETUNE_PLURAL)
        world.client.create(FINETUNE_PLURAL, manifest())
        operator.pending[FINETUNE_PLURAL].clear()
        # Two lists come before it: that in which it is found, and the next one, while it is on its way to be read.
        operator.wire.faults.append(Fault(fate, countdown=3, reads=True))
        operator.resync()
        world.pass_time(20.0)
        assert not operator.wire.faults
        (job,) = world.client.find(FINETUNE_PLURAL)
        assert job["status"]["attempt"] == 1
    finally:
        world.close()
