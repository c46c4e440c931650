"""Nothing that a spec says reaches beyond its job: tried with every text field of the schema, one at a time.

What a pod may have is listed here, so that a field that is added to it tomorrow has to be added here by somebody.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import yaml

from finetune_api.job import FineTuneJob
from finetune_api.llmforge import REFUSED
from finetune_api.load import load_job, load_manifest
from finetune_operator.desired import effective_job, job_config_map, job_problems, pytorch_job, verification_job
from finetune_operator.desired.volumes import VOLUME_PREFIX
from tests.api.extremes import Node, Path, least, nodes
from tests.api.jobs import manifest
from tests.cluster.api import Object
from tests.cluster.hostile import SPEC, Edge, Pack, completed, sorted_out
from tests.operator.desired.built import SETTINGS, UID

NAMESPACE = "team-a"
MARK = "zq9"
"""Stands in every text that is tried, in a spelling that names of Kubernetes' may have."""
HOSTILE = {
    "name": MARK,
    "path": f"../../{MARK}",
    "absolute path": f"/../..//proc/self/{MARK}",
    "option": f"--{MARK}=1",
    "shell": f"{MARK};$(id)`id`|&>x'\"\\",
    "variable": f"$(HF_TOKEN){MARK}$$(A)${{HOME}}",
    "yaml": f"{MARK}: {{a: [b]}} # 'c\"",
    "yaml document": f"{MARK}\n---\nkind: Pod\nspec: !!python/object/apply:os.system [id]",
    "jinja": f"{{{{ {MARK}.__class__ }}}}{{% for x in y %}}{{# {MARK} #}}",
    "html": f"</pre><script>{MARK}</script>",
    "controls": f"{MARK}\r\n\x1b[2K\x00 \u2028 \x85 \x7f\x9b\ufeff\uffff\u202e",
    "json": f'{MARK}","hostNetwork":true,"x":"',
}
BEGINNINGS = ("", "/", "s3://b/", "pvc://c/", "a", "A", "{instruction}")
"""What a field may ask a text to begin with."""


def places() -> Iterator[tuple[Path, Node]]:
    """Every node of the spec; of schemas that several lists or maps have, those of the first."""
    known: set[str] = set()
    for path, node in nodes(SPEC):
        if path and path[0] not in REFUSED and not {"[]", "{}"} & set(path):
            yield path, node
            inner = node.get("additionalProperties", node.get("items"))
            if inner is not None and json.dumps(inner) not in known:
                known.add(json.dumps(inner))
                yield from (((*path, *below), found) for below, found in nodes(node) if below)


def hostile() -> Iterator[Edge]:
    """Every text field with every hostile text that it takes, and every map with every one as a key."""
    for path, node in places():
        if "enum" not in node and node.get("type") in ("string", None):
            for word, text in HOSTILE.items():
                tries = [begin + text for begin in BEGINNINGS if _takes(node, begin + text)]
                yield from (Edge(path, word, found) for found in tries[:1])
        if "additionalProperties" in node and "anyOf" not in node:
            value = least(node["additionalProperties"])
            yield from (Edge(path, f"key, {word}", {text: value}) for word, text in HOSTILE.items())


def _takes(node: Node, text: str) -> bool:
    pattern = node.get("pattern", "").replace("$", r"\Z")
    return len(text) <= node.get("maxLength", len(text)) and re.search(pattern, text) is not None


def read(spec: Object) -> FineTuneJob | None:
    """The job, if it is accepted in a cluster."""
    metadata = {"name": "guard", "namespace": NAMESPACE, "uid": UID}
    job = load_manifest({**manifest(), "metadata": metadata, "spec": spec}).job
    return job if job is not None and job_problems(job, SETTINGS) == [] else None


def spec_of(edge: Edge) -> Object:
    alone = Pack()
    assert alone.takes(edge, 0)
    return completed(alone.spec)


@dataclass(frozen=True)
class Made:
    """What is made of a spec with one hostile text in it."""

    edge: Edge
    job: FineTuneJob
    config_map: Object
    pytorch_job: Object
    verification: Object

    @property
    def pods(self) -> tuple[Object, Object]:
        """The templates of the pods that train, and of the one that verifies."""
        training: Object = self.pytorch_job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
        return training, self.verification["spec"]["template"]

    @property
    def containers(self) -> list[Object]:
        """The only container of each."""
        return [container for template in self.pods for (container,) in [template["spec"]["containers"]]]


ADDRESS = "s3://models/$(HF_TOKEN)/$$(HF_TOKEN)/$$$(HF_TOKEN)/$(HF_TOKEN/$"
"""Where the trainer's last words may say that the adapter is."""


@pytest.fixture(scope="module")
def made() -> list[Made]:
    """Those that are accepted."""
    fine, _ = sorted_out(hostile(), lambda spec: read(spec) is not None)
    return [
        Made(
            edge,
            job,
            job_config_map(job, 1, SETTINGS),
            pytorch_job(job, 1, SETTINGS),
            verification_job(job, 1, ADDRESS, SETTINGS),
        )
        for edge in fine
        if (job := read(spec_of(edge))) is not None
    ]


def holds_mark(value: Any) -> bool:
    return MARK in json.dumps(value).lower()


def test_the_marks_get_far_enough_to_show_something(made: list[Made]) -> None:
    assert len({one.edge.path for one in made}) > 60
    assert {one.edge.word.removeprefix("key, ") for one in made} == HOSTILE.keys()
    marked = {one.edge.path[:2] for one in made if holds_mark(one.pods[0])}
    assert marked >= {("workers", "env"), ("workers", "volumes"), ("secrets", "huggingFace")}


def test_no_text_of_a_spec_is_part_of_a_command(made: list[Made]) -> None:
    for one in made:
        training, verification = one.containers
        assert training["command"] == ["python", "-m", "finetune_trainer", "/etc/finetune/job.yaml"], one.edge
        *command, address = verification["command"]
        job_file = ("--job", "/etc/finetune/job.yaml")
        assert command == ["python", "-m", "finetune_trainer.verify", *job_file, "--adapter"], one.edge
        assert expanded(address) == ADDRESS
        others = {"args", "lifecycle", "livenessProbe", "readinessProbe", "startupProbe"}
        assert not others & {*training, *verification}, one.edge


def expanded(text: str) -> str:
    """What a kubelet makes of an argument: `$(NAME)` is the variable's value, and `$$` is `$`."""
    found = re.compile(r"\$(\$|\([^)]*\)|.)", re.DOTALL)
    return found.sub(lambda match: {"$": "$", "(": "(the value)"}.get(match[1][0], match[0]), text)


@pytest.mark.parametrize(
    ("text", "result"),
    [("$(A)", "(the value)"), ("$$(A)", "$(A)"), ("$$$(A)", "$(the value)"), ("$a$", "$a$"), ("a$$", "a$")],
)
def test_variables_are_put_in_as_kubelets_do(text: str, result: str) -> None:
    assert expanded(text) == result


POD_KEYS = {
    *("restartPolicy", "serviceAccountName", "automountServiceAccountToken", "enableServiceLinks"),
    *("terminationGracePeriodSeconds", "securityContext", "containers", "volumes"),
    *("nodeSelector", "tolerations", "affinity", "priorityClassName", "runtimeClassName", "imagePullSecrets"),
}
CONTAINER_KEYS = {
    *("name", "image", "imagePullPolicy", "command", "env", "ports", "resources", "securityContext", "volumeMounts"),
    *("terminationMessagePath", "terminationMessagePolicy"),
}
VOLUME_SOURCES = {"emptyDir", "configMap", "secret", "persistentVolumeClaim", "projected"}
MOUNT_KEYS = {"name", "mountPath", "readOnly", "subPath"}


def test_no_spec_makes_a_pod_that_has_more_of_its_node_than_any_pod(made: list[Made]) -> None:
    for one in made:
        for template, container in zip(one.pods, one.containers, strict=True):
            spec = template["spec"]
            assert spec.keys() <= POD_KEYS, one.edge
            assert container.keys() <= CONTAINER_KEYS, one.edge
            assert spec["automountServiceAccountToken"] is False
            assert spec["securityContext"] == {
                "runAsNonRoot": True,
                "runAsUser": 1000,
                "runAsGroup": 1000,
                "fsGroup": 1000,
                "fsGroupChangePolicy": "OnRootMismatch",
                "seccompProfile": {"type": "RuntimeDefault"},
            }
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
                "readOnlyRootFilesystem": True,
            }
            assert all(port.keys() == {"name", "containerPort", "protocol"} for port in container.get("ports", ()))
            for volume in spec["volumes"]:
                (source,) = volume.keys() - {"name"}
                assert source in VOLUME_SOURCES, one.edge
                # A token is projected for the progress endpoint and for nobody else, whatever the job says.
                assert source != "projected" or volume["name"].startswith(VOLUME_PREFIX), one.edge
            assert all(mount.keys() <= MOUNT_KEYS for mount in container["volumeMounts"]), one.edge


def test_no_volume_of_a_job_hides_what_the_operator_mounts(made: list[Made]) -> None:
    for one in made:
        for container in one.containers:
            mounts = container["volumeMounts"]
            assert len({mount["mountPath"] for mount in mounts}) == len(mounts), one.edge
            ours = [mount["mountPath"] for mount in mounts if mount["name"].startswith(VOLUME_PREFIX)]
            ours.append(container["terminationMessagePath"])
            for mount in mounts:
                if not mount["name"].startswith(VOLUME_PREFIX):
                    place = mount["mountPath"].rstrip("/") + "/"
                    assert not any(path.startswith(place) for path in ours), (one.edge, mount)
                assert ".." not in mount.get("subPath", "").split("/"), (one.edge, mount)


REFERENCES = {
    "secretKeyRef": {"name", "key", "optional"},
    "configMapKeyRef": {"name", "key", "optional"},
    "fieldRef": {"fieldPath", "apiVersion"},
    "configMap": {"name", "items"},
    "secret": {"secretName"},
    "persistentVolumeClaim": {"claimName", "readOnly"},
}


def test_secrets_config_maps_and_claims_are_named_and_so_are_of_the_jobs_namespace(made: list[Made]) -> None:
    for one in made:
        objects = one.config_map, one.pytorch_job, one.verification
        assert {found["metadata"]["namespace"] for found in objects} == {NAMESPACE}, one.edge
        for template, container in zip(one.pods, one.containers, strict=True):
            spec = template["spec"]
            assert all(secret.keys() == {"name"} for secret in spec.get("imagePullSecrets", ())), one.edge
            references = [*spec["volumes"], *(variable.get("valueFrom", {}) for variable in container["env"])]
            for reference in references:
                for kind in reference.keys() - {"name", "emptyDir", "projected"}:
                    assert reference[kind].keys() <= REFERENCES[kind], one.edge


def test_the_operators_own_variables_carry_no_text_of_the_job(made: list[Made]) -> None:
    """What a job sets itself is its own affair: its variables take the place of none of these."""
    for one in made:
        given = {variable.name for variable in one.job.spec.workers.env}
        for container in one.containers:
            names = [variable["name"] for variable in container["env"]]
            assert len(names) == len(set(names)), one.edge
            ours = [variable for variable in container["env"] if variable["name"] not in given]
            assert not holds_mark([variable for variable in ours if "valueFrom" not in variable]), one.edge


def test_labels_annotations_and_owners_carry_no_text_of_the_spec(made: list[Made]) -> None:
    for one in made:
        for found in (one.config_map, one.pytorch_job, one.verification, *one.pods):
            assert not holds_mark(found["metadata"]), one.edge


CONTROLS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]")


def test_the_config_map_says_exactly_what_was_written_to_every_reader(made: list[Made]) -> None:
    for one in made:
        data = one.config_map["data"]
        text = data["job.yaml"]
        assert load_job(text, source="job.yaml").job == effective_job(one.job, SETTINGS), one.edge
        # One document, which a reader of JSON and one of YAML take for the same.
        assert yaml.safe_load(text) == json.loads(text), one.edge
        assert not CONTROLS.search(text), one.edge
        written = {**json.loads(data["spec.json"]), **json.loads(data["placement.json"])}
        spec = one.job.spec.model_dump(mode="json", by_alias=True, exclude_unset=True)
        assert written == {key: value for key, value in spec.items() if key in written}, one.edge


MAPS = {"nodeSelector", "limits", "requests", "matchLabels"}
"""Maps of a pod with keys of anybody's choice."""


def test_a_key_of_a_map_stays_in_a_map(made: list[Made]) -> None:
    for one in made:
        if one.edge.word.startswith("key, "):
            for template in one.pods:
                assert all(place[-1] in MAPS for place in _marked_keys(template["spec"])), one.edge


def _marked_keys(value: Any, place: Path = ()) -> Iterator[Path]:
    """Where in a value there is a key with the mark."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if MARK in key.lower():
                yield place
            yield from _marked_keys(inner, (*place, key))
    elif isinstance(value, list):
        for inner in value:
            yield from _marked_keys(inner, place)
