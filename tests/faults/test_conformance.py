"""The API server that the operator's own tests simulate answers as a real one does, and tells watches the same.

The same random requests go to both: what the simulation makes of them is what a real one makes of them, objects whose
owner is gone included. So what is found out in memory is worth something.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from finetune_operator.names import FINETUNE_PLURAL, JOB_UID_LABEL, PODS_PLURAL, PYTORCH_PLURAL
from tests.cluster.api import Api, Object, wait_until
from tests.cluster.operator_process import OperatorProcess
from tests.cluster.scene import manifest
from tests.cluster.test_control_plane import pod, pytorchjob
from tests.faults.fault_table import ALL_FAULTS
from tests.faults.two_servers import CONFIG_MAPS, WATCHED, Meaning, RealServer, Side, meaning, simulated
from tests.operator.simulation.clients import path_of
from tests.operator.simulation.rules import KINDS
from tests.operator.simulation.server import Event, SimulatedServer

FINALIZER = "example.com/wait"
ANOTHER_UID = "00000000-0000-4000-8000-00000000dead"
_TIME = ("startTime", lambda count: f"2026-01-31T12:00:{count % 60:02}Z")
FILLED_IN = (FINETUNE_PLURAL,)
"""Kinds of which the first request that changes nothing stores what its schema says of what nobody said."""
STATUS: Mapping[str, tuple[str, Callable[[int], str]]] = {
    FINETUNE_PLURAL: _TIME,
    PYTORCH_PLURAL: _TIME,
    PODS_PLURAL: ("message", str),
}
"""Kind -> a key of its status, and what it becomes with the n-th change."""
LAST = 99
"""Number of an object of which watches tell last."""

Operation = Callable[[Side], Meaning]
"""Asks one side; both are asked the same."""


def create(plural: str, number: int, side: Side, *, owned: bool, label: bool, finalizer: bool) -> Meaning:
    """An object, of the first ConfigMap where it is owned."""
    bodies = {FINETUNE_PLURAL: manifest("x"), PYTORCH_PLURAL: pytorchjob(1), PODS_PLURAL: pod()}
    body = bodies.get(plural, {"apiVersion": "v1", "kind": "ConfigMap", "data": {"a": "b"}})
    metadata: Object = {"name": side.name(number), "labels": {JOB_UID_LABEL: "u"} if label else {}}
    owners = side.seen_of(CONFIG_MAPS, 0)
    if owned and owners and (plural, number) != (CONFIG_MAPS, 0):
        owner = {"apiVersion": "v1", "kind": "ConfigMap", "name": side.name(0), "uid": owners[-1]["metadata"]["uid"]}
        metadata["ownerReferences"] = [owner]
    if finalizer:
        metadata["finalizers"] = [FINALIZER]
    if plural == PYTORCH_PLURAL:  # so that the training operator leaves it alone
        body["spec"]["runPolicy"]["managedBy"] = "kueue.x-k8s.io/multikueue"
    return side.ask("POST", plural, number, body={**body, "metadata": metadata})


def read(plural: str, number: int, side: Side) -> Meaning:
    """The object."""
    return side.ask("GET", plural, number)


def replace(plural: str, number: int, side: Side, *, part: str, version: str, uid: str, change: str) -> Meaning:
    """What was read becomes something else."""
    seen = side.seen_of(plural, number)
    if not seen:
        return ()
    body = deepcopy(seen[0] if version == "first" else seen[-1])
    if version == "none":
        del body["metadata"]["resourceVersion"]
    if uid == "none":
        del body["metadata"]["uid"]
    elif uid == "another":
        body["metadata"]["uid"] = ANOTHER_UID
    part = part if KINDS[plural].status else ""
    if change != "nothing" or "none" in (version, uid) or plural in FILLED_IN:
        _change(body, plural, f"{change}, status" if part else change, side.asked)
    return side.ask("PUT", plural, number, part, body)


def patch(plural: str, number: int, side: Side, *, change: str) -> Meaning:
    """A merge patch."""
    body: Object = {"metadata": {}}
    if change != "nothing" or plural in FILLED_IN:
        _change(body, plural, change, side.asked)
    return side.ask("PATCH", plural, number, body=body)


def _change(body: Object, plural: str, change: str, count: int) -> None:
    """Change it in some way, and always in one that counts.

    Of a request of which nothing is left, since what it says is not for it to say, the real one writes down when it
    came: whether that is another second decides whether the object has another version.
    """
    metadata, spec = body["metadata"], body.get("spec", {})
    metadata["labels"] = {**metadata.get("labels", {}), "example.com/change": str(count)}
    if change.startswith("label"):
        metadata["labels"][JOB_UID_LABEL] = f"v{count}"
    if change.startswith("no label"):
        metadata["labels"].pop(JOB_UID_LABEL, None)
        metadata["labels"] |= {} if "name" in metadata else {JOB_UID_LABEL: None}
    if change.startswith("no finalizer"):
        metadata["finalizers"] = []
    if change.startswith("spec") and plural == FINETUNE_PLURAL:
        body["spec"] = {**spec, "backoffLimit": count}
    if change.startswith("spec") and plural == PYTORCH_PLURAL:
        body["spec"] = {**spec, "runPolicy": {**spec.get("runPolicy", {}), "suspend": True}}
    if "status" in change and plural in STATUS:
        key, value = STATUS[plural]
        body["status"] = {**body.get("status", {}), key: value(count)}


def set_phase(number: int, side: Side, *, phase: str) -> Meaning:
    """A pod's, as its kubelet writes it."""
    return side.ask("PATCH", PODS_PLURAL, number, "status", {"status": {"phase": phase}})


def bind(number: int, side: Side) -> Meaning:
    """A pod is on a node from now on, and has to be given time to end.

    That node is not there, so nobody confirms a deletion; each example has its own, since after a while the pods of one
    that is not there are taken off.
    """
    code, _, now = side.send("GET", side.path(PODS_PLURAL, number), None, {})
    if code >= 400 or now["spec"].get("nodeName") or "deletionTimestamp" in now["metadata"]:
        return ()
    side.send("BIND", side.path(PODS_PLURAL, number), f"{side.prefix}-node", {})
    return side.ask("GET", PODS_PLURAL, number)


def delete(plural: str, number: int, side: Side, *, uid: str, version: str, grace: int | None) -> Meaning:
    """An object, if it is the one that is meant."""
    wanted = {"uid": uid, "resourceVersion": version}
    seen = side.seen_of(plural, number)
    which = {key: seen[0 if one == "first" else -1] for key, one in wanted.items() if seen and one != "none"}
    options: Object = {"propagationPolicy": "Background"}
    if which:
        options["preconditions"] = {key: raw["metadata"][key] for key, raw in which.items()}
    if grace is not None and plural == PODS_PLURAL:
        options["gracePeriodSeconds"] = grace
    return side.ask("DELETE", plural, number, body=options)


def operations(do: Callable[..., Meaning], *of: st.SearchStrategy[Any], **how: st.SearchStrategy[Any]) -> Any:
    """Operations of one kind, which show themselves when they fail."""
    return st.builds(partial, st.just(do), *of, **how)


KIND, NUMBER, YES_OR_NO = st.sampled_from([*WATCHED, CONFIG_MAPS]), st.integers(0, 1), st.booleans()
POD, YES, NO = st.just(PODS_PLURAL), st.just(True), st.just(False)
CHANGE = st.sampled_from(["label", "no label", "no finalizer", "status", "spec", "spec, status", "nothing"])
WHICH = st.sampled_from(["latest", "latest", "first", "none"])
UID = st.sampled_from(["same", "same", "none", "another"])
PART = st.sampled_from(["", "status"])
OPERATIONS = st.one_of(
    operations(create, KIND, NUMBER, owned=YES_OR_NO, label=YES_OR_NO, finalizer=YES_OR_NO),
    operations(create, POD, NUMBER, owned=YES_OR_NO, label=YES, finalizer=NO),
    operations(read, KIND, NUMBER),
    operations(replace, KIND, NUMBER, part=PART, version=WHICH, uid=UID, change=CHANGE),
    operations(patch, KIND, NUMBER, change=CHANGE),
    operations(set_phase, NUMBER, phase=st.sampled_from(["Running", "Succeeded", "Failed"])),
    operations(bind, NUMBER),
    operations(delete, KIND, NUMBER, uid=WHICH, version=WHICH, grace=st.sampled_from([None, 0])),
)
_examples = itertools.count()


def life(plural: str) -> list[Operation]:
    """All that happens to an object of a kind, and to the next one of its name."""

    def new(*, finalizer: bool) -> Operation:
        return partial(create, plural, 0, owned=False, label=True, finalizer=finalizer)

    def write(change: str, part: str = "", version: str = "latest", uid: str = "same") -> Operation:
        return partial(replace, plural, 0, part=part, version=version, uid=uid, change=change)

    def remove(uid: str, version: str = "none", grace: int | None = None) -> Operation:
        return partial(delete, plural, 0, uid=uid, version=version, grace=grace)

    look: Operation = partial(read, plural, 0)
    edits = [write("nothing"), write("spec"), write("label"), write("status"), write("label", "status")]
    refused = [
        write("label", uid="another"),
        write("label", version="first"),
        write("label", "status", version="first"),
        write("label", version="none"),
        remove("latest", "first"),
    ]
    gone = [look, remove("latest", "latest"), remove("none"), write("label"), write("label", "status", uid="another")]
    again = [new(finalizer=True), write("label", version="first"), write("label", uid="none"), remove("first")]
    patches: list[Operation] = [
        *(partial(patch, plural, 0, change=change) for change in ("spec", "no label", "status", "nothing"))
    ]
    held = [remove("latest"), look, write("spec"), write("no finalizer"), look]
    return [new(finalizer=False), new(finalizer=False), *edits, *refused, *gone, *again, *patches, *held]


PODS_LIFE: list[Operation] = [
    partial(create, CONFIG_MAPS, 0, owned=False, label=False, finalizer=False),
    *(partial(create, PODS_PLURAL, number, owned=True, label=True, finalizer=False) for number in (0, 1)),
    *(partial(bind, number) for number in (0, 1)),
    *(partial(set_phase, number, phase="Running") for number in (0, 1)),
    partial(set_phase, 1, phase="Succeeded"),
    *(partial(delete, PODS_PLURAL, 0, uid="latest", version="none", grace=grace) for grace in (None, None, 0)),
    partial(delete, CONFIG_MAPS, 0, uid="latest", version="none", grace=None),
    partial(read, PODS_PLURAL, 1),
]
"""Two on a node, which are their owner's: one is deleted while it runs, the other goes with its owner."""


@pytest.fixture
def real(api: Api, shared_operator: OperatorProcess) -> Iterator[RealServer]:
    """The API server, with no operator that would interfere."""
    shared_operator.stop()
    yield RealServer(api)
    for kind in ("FineTuneJob", "PyTorchJob", "ConfigMap"):
        for left in api.list(kind):
            if left["metadata"].get("finalizers"):  # which would keep its namespace, and its kind, for ever
                api.patch(kind, left["metadata"]["name"], {"metadata": {"finalizers": None}})


@settings(
    max_examples=120 if ALL_FAULTS else 20,
    derandomize=not ALL_FAULTS,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],  # a smaller example takes minutes to be found here
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@example(asked=life(FINETUNE_PLURAL))
@example(asked=life(PYTORCH_PLURAL))
@example(asked=life(PODS_PLURAL))
@example(asked=life(CONFIG_MAPS))
@example(asked=PODS_LIFE)
@given(asked=st.lists(OPERATIONS, min_size=15, max_size=30))
def test_the_simulated_api_server_answers_as_a_real_one(real: RealServer, api: Api, asked: list[Operation]) -> None:
    namespace, prefix, server = str(api.namespace), f"e{next(_examples)}", SimulatedServer()
    sides = [Side(send, namespace, prefix) for send in (real.send, simulated(server))]
    told: dict[str, list[Event]] = {kind: [] for kind in WATCHED}
    for kind, selectors in WATCHED.items():
        server.watch(kind, told[kind].append, *selectors)
    paths = {kind: path_of(kind, namespace=namespace) for kind in WATCHED}
    begun = {kind: real.version(path) for kind, path in paths.items()}
    for number, operation in enumerate(asked):
        answers = [operation(side) for side in sides]
        assert answers[1] == answers[0], f"{number}: {operation}"
        while server.collect():
            pass
        wait_until(sides[0].garbage, lambda names: not names, 20)
    for kind, (labels, fields) in WATCHED.items():
        lists = [[meaning(raw) for raw in side.listed(kind, labels, fields)] for side in sides]
        assert lists[1] == lists[0], f"a list of {kind}"
        create(kind, LAST, sides[0], owned=False, label=True, finalizer=False)
        query = {"labelSelector": labels, "fieldSelector": fields, "resourceVersion": begun[kind]}
        events = real.events(paths[kind], query, sides[0].name(LAST))
        ours = [event for event in events if event.raw["metadata"]["name"].startswith(f"{prefix}-")]
        assert [_told(one) for one in told[kind]] == [_told(one) for one in ours], f"a watch of {kind}"


def _told(event: Event) -> Meaning:
    return event.type, *meaning(event.raw)
