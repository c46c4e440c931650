"""Jobs go before, while and after the operator looks: nothing of them stays, and nothing is made for what is gone."""

from __future__ import annotations

import secrets
import time

from tests.cluster.api import Api, wait_until
from tests.cluster.control_plane import ControlPlane
from tests.cluster.kubelet import Kubelet, Reaper
from tests.cluster.scene import Scene
from tests.faults.calls import Call
from tests.faults.conftest import UnluckyOperator
from tests.faults.faults import Refusal
from tests.faults.history import watching
from tests.faults.stage import Stage
from tests.faults.stories import AT_WORK, STORIES
from tests.faults.theatre import Theatre

MOMENTS = 8


def test_a_namespace_is_deleted_under_running_jobs(
    theatre: Theatre, control_plane: ControlPlane, api: Api, reaper: Reaper
) -> None:
    since, story = time.monotonic(), STORIES["happy"]
    doomed = api.in_namespace(f"doomed-{secrets.token_hex(4)}")
    control_plane.api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": doomed.namespace}})
    doomed.wait("ServiceAccount", "default", bool)
    with watching(doomed) as history:
        stage = Stage(Kubelet(doomed, reaper), doomed, history)
        neighbours, mine = theatre.stage.begin(story, ["neighbour"]), stage.begin(story, ["runs", "starts"])
        stage.play((story, mine[:1]), until=lambda name: stage.phase(name) in AT_WORK)
        control_plane.api.delete("Namespace", str(doomed.namespace))
        control_plane.api.wait_gone("Namespace", str(doomed.namespace))
        theatre.stage.play((story, neighbours))
        theatre.nothing_left("15", {"namespace deleted": ["runs", "starts"]}, since=since, stage=stage)
    life = theatre.undisturbed("happy")["happy"]
    theatre.compare("15", {"another namespace deleted": ["neighbour"]}, life, since=since)


def test_a_job_is_deleted_while_the_operator_is_away(theatre: Theatre, api: Api) -> None:
    lives = theatre.undisturbed("happy", "deletion")
    since, story = time.monotonic(), STORIES["happy"]
    scenes = theatre.stage.begin(story, ["goes", "goes-and-comes"])
    theatre.stage.play((story, scenes), until=lambda name: theatre.stage.phase(name) in AT_WORK)
    theatre.operator.kill()
    for scene in scenes:
        api.delete("FineTuneJob", scene.name)
        api.wait_gone("FineTuneJob", scene.name)
    scenes[1].apply()
    theatre.operator.start()
    theatre.stage.play((story, scenes[1:]))
    theatre.compare("16", {"operator down while the job is deleted": ["goes"]}, lives["deletion"], since=since)
    # It has a past, so its history is longer.
    assert theatre.stage.wait_endings(["goes-and-comes"], lives["happy"].ending) == {
        "goes-and-comes": lives["happy"].ending
    }
    assert theatre.stage.history("goes-and-comes")[-1] == "1 times pod job-1-worker-0"
    assert len(theatre.stage.created("goes-and-comes")) == 2


def test_a_job_lives_for_a_moment(theatre: Theatre, api: Api) -> None:
    since = time.monotonic()
    names = [f"moment-{number}" for number in range(MOMENTS)]
    for number, name in enumerate(names):
        (scene,) = theatre.stage.begin(STORIES["happy"], [name])
        # From at once to about when the first attempt is there.
        time.sleep(0.05 * number)
        scene.change(backoffLimit=1)
        api.delete("FineTuneJob", name)
    theatre.nothing_left("17", {"created, edited and deleted within moments": names}, since=since)


def test_nothing_is_decided_of_a_job_that_is_gone_by_the_time_it_is_read(
    unlucky: UnluckyOperator, api: Api, kubelet: Kubelet
) -> None:
    scene = Scene(api, kubelet, "guard")
    scene.apply()
    scene.run()
    gone: list[int] = []

    def delete_before(call: Call) -> Refusal | None:
        if (call.verb, call.resource, call.name) == ("get", "finetunejobs", "guard") and not gone:
            api.delete("FineTuneJob", "guard")
            api.wait_gone("FineTuneJob", "guard")
            gone.append(len(unlucky.proxy.changes("guard")))
        return None

    unlucky.proxy.refuse = delete_before
    scene.change(suspend=True)
    wait_until(lambda: gone)
    wait_until(lambda: api.list("PyTorchJob"), lambda found: not found)
    neighbour = Scene(api, kubelet, "neighbour")
    neighbour.apply()
    neighbour.run()
    assert unlucky.proxy.changes("guard")[gone[0] :] == []
