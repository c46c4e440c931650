"""What the chart renders: names, pods within the restricted standard, images, and who reaches whom."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from finetune_api.load import load_manifest
from finetune_operator.names import CA_KEY, TLS_SECRET
from tests.chart.charts import CHART, NAMESPACE, ROOT, TABLE, TEAMS, environment, only, pod_of, render, selects
from tests.operator.desired.built import pytorch, stored

METADATA = yaml.safe_load((CHART / "Chart.yaml").read_text())
TRAINER_LABELS = pytorch(stored())["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["metadata"]["labels"]
"""Of a pod that the operator asks for; the training operator adds more."""
DNS = [{"port": port, "protocol": protocol} for port in (53, 5353) for protocol in ("UDP", "TCP")]
CLUSTER_SCOPED = ("ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition")


@pytest.mark.parametrize("name", TABLE)
def test_every_object_belongs_to_the_release_and_stands_where_it_may(name: str) -> None:
    for found in render(TABLE[name]):
        metadata = found["metadata"]
        assert (
            metadata["labels"].items()
            >= {
                "app.kubernetes.io/instance": "finetune-operator",
                "app.kubernetes.io/managed-by": "Helm",
                **TABLE[name].get("commonLabels", {}),
            }.items()
        )
        where = {None} if found["kind"] in CLUSTER_SCOPED else {NAMESPACE, *TEAMS}
        assert metadata.get("namespace") in where


@pytest.mark.parametrize("name", TABLE)
def test_no_two_objects_have_the_same_name(name: str) -> None:
    names = [
        (found["kind"], found["metadata"].get("namespace"), found["metadata"]["name"]) for found in render(TABLE[name])
    ]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("release", "name"), [("finetune-operator", "finetune-operator"), ("ml", "ml-finetune-operator")]
)
def test_names_begin_with_the_release(release: str, name: str) -> None:
    objects = render(release=release)
    assert only(objects, "Deployment")["metadata"]["name"] == name
    assert only(objects, "Secret")["metadata"]["name"] == f"{name}-tls"


def test_the_longest_release_name_makes_valid_names() -> None:
    objects = render({"networkPolicy": {"trainer": {"enabled": True, "namespaces": ["a"]}}}, release="r" * 53)
    service = only(objects, "Service")["metadata"]["name"]
    assert len(service) <= 63
    # Certificates and pods name the Service.
    assert f"https://{service}.{NAMESPACE}.svc:8443" == environment(objects)["FINETUNE_OPERATOR_PROGRESS_URL"]


def test_the_secret_comes_empty_so_that_upgrades_leave_it_alone() -> None:
    secret = only(render(), "Secret")
    assert secret["metadata"]["name"] == TLS_SECRET
    assert not {"data", "stringData", CA_KEY} & secret.keys()


@pytest.mark.parametrize("keep", [True, False])
def test_the_custom_resource_definition_is_the_contracts(keep: bool) -> None:
    found = only(render({"crds": {"keep": keep}}), "CustomResourceDefinition")
    contract = yaml.safe_load((ROOT / "crds" / "finetunejobs.yaml").read_text())
    assert found["metadata"].get("annotations") == ({"helm.sh/resource-policy": "keep"} if keep else None)
    assert (found["metadata"]["name"], found["spec"]) == (contract["metadata"]["name"], contract["spec"])


@pytest.mark.parametrize(
    ("values", "operators", "trainers"),
    [
        ({}, "finetune-operator:0.1.0", "finetune-trainer:0.1.0"),
        (
            {"image": {"registry": "a.example.com", "tag": "2"}},
            "a.example.com/finetune-operator:2",
            "finetune-trainer:0.1.0",
        ),
        ({"trainer": {"image": {"registry": "b"}}}, "finetune-operator:0.1.0", "b/finetune-trainer:0.1.0"),
        (
            {"image": {"tag": "2", "digest": f"sha256:{'a' * 64}"}},
            f"finetune-operator@sha256:{'a' * 64}",
            "finetune-trainer:0.1.0",
        ),
        (
            {
                "global": {"imageRegistry": "mirror:5000/ml/"},
                "image": {"registry": "a"},
                "trainer": {"image": {"registry": "b", "repository": "nlp/trainer"}},
            },
            "mirror:5000/ml/finetune-operator:0.1.0",
            "mirror:5000/ml/nlp/trainer:0.1.0",
        ),
    ],
)
def test_images_come_from_where_the_values_say(values: Any, operators: str, trainers: str) -> None:
    objects = render(values)
    assert pod_of(objects)["spec"]["containers"][0]["image"] == operators
    assert environment(objects)["FINETUNE_OPERATOR_TRAINER_IMAGE"] == trainers


def test_the_chart_says_what_is_in_it() -> None:
    annotations = {name.partition("/")[2]: text for name, text in METADATA["annotations"].items()}
    images = {entry["image"] for entry in yaml.safe_load(annotations["images"])}
    objects = render()
    shown = {pod_of(objects)["spec"]["containers"][0]["image"], environment(objects)["FINETUNE_OPERATOR_TRAINER_IMAGE"]}
    assert images == shown
    (example,) = yaml.safe_load(annotations["crdsExamples"])
    assert load_manifest(example).errors == []
    definition = only(objects, "CustomResourceDefinition")
    (described,) = yaml.safe_load(annotations["crds"])
    assert (described["name"], described["kind"]) == (
        definition["metadata"]["name"],
        definition["spec"]["names"]["kind"],
    )
    assert described["version"] in {version["name"] for version in definition["spec"]["versions"]}


def test_chart_and_project_have_the_same_version() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert f'\nversion = "{METADATA["version"]}"\n' in project
    assert METADATA["appVersion"] == METADATA["version"]


def test_one_operator_is_gone_before_the_next_comes() -> None:
    spec = only(render(), "Deployment")["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})


def test_only_the_operators_pod_has_a_token_of_the_api_server() -> None:
    objects = render()
    assert only(objects, "ServiceAccount")["automountServiceAccountToken"] is False
    assert pod_of(objects)["spec"]["automountServiceAccountToken"] is True


def test_of_what_the_operator_writes_nothing_is_outside_of_its_folder_for_it() -> None:
    spec = pod_of(render())["spec"]
    (container,) = spec["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["volumeMounts"] == [{"name": "tmp", "mountPath": "/tmp"}]  # noqa: S108  a volume of its own
    assert spec["volumes"] == [{"name": "tmp", "emptyDir": {}}]
    assert {"name": "HOME", "value": "/tmp"} in container["env"]  # noqa: S108  likewise


def test_probes_ask_the_ports_that_are_open() -> None:
    (container,) = pod_of(render())["spec"]["containers"]
    for probe, path in (("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")):
        assert container[probe]["httpGet"] == {"path": path, "port": "health"}
    assert "health" in {port["name"] for port in container["ports"]}


@pytest.mark.parametrize("name", ["everything", "other names"])
def test_what_selects_the_operators_pod_finds_it(name: str) -> None:
    objects = render(TABLE[name])
    labels = pod_of(objects)["metadata"]["labels"]
    selectors = [
        only(objects, "Deployment")["spec"]["selector"],
        {"matchLabels": only(objects, "Service")["spec"]["selector"]},
    ]
    selectors.append(
        only(objects, "NetworkPolicy", only(objects, "Deployment")["metadata"]["name"])["spec"]["podSelector"]
    )
    if name == "everything":
        selectors.append(only(objects, "PodDisruptionBudget")["spec"]["selector"])
        (constraint,) = pod_of(objects)["spec"]["topologySpreadConstraints"]
        selectors.append(constraint["labelSelector"])
    assert all(selects(selector, labels) for selector in selectors)


def test_a_topology_constraint_keeps_a_selector_of_its_own() -> None:
    own = {"labelSelector": {"matchLabels": {"a": "b"}}, "maxSkew": 2}
    assert pod_of(render({"topologySpreadConstraints": [own]}))["spec"]["topologySpreadConstraints"] == [own]


def test_trainers_reach_the_progress_endpoint_and_everybody_the_metrics() -> None:
    policy = only(render(), "NetworkPolicy")["spec"]
    progress, metrics = policy["ingress"]
    (trainers,) = progress["from"]
    assert trainers["namespaceSelector"] == {}
    assert selects(trainers["podSelector"], TRAINER_LABELS)
    assert progress["ports"] == [{"port": 8443, "protocol": "TCP"}]
    assert metrics == {"ports": [{"port": 8080, "protocol": "TCP"}]}
    assert policy["policyTypes"] == ["Ingress"]


def test_trainers_of_other_namespaces_than_those_looked_after_are_kept_out() -> None:
    (trainers,) = only(render(TABLE["some namespaces"]), "NetworkPolicy")["spec"]["ingress"][0]["from"]
    (expression,) = trainers["namespaceSelector"]["matchExpressions"]
    assert expression == {"key": "kubernetes.io/metadata.name", "operator": "In", "values": [*TEAMS]}


def test_with_the_api_servers_address_the_operator_reaches_that_and_dns_alone() -> None:
    policy = only(render(TABLE["everything"]), "NetworkPolicy", "finetune-operator")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    ports = [{"port": port, "protocol": "TCP"} for port in (443, 6443)]
    assert policy["egress"] == [{"ports": DNS}, {"to": [{"ipBlock": {"cidr": "10.0.0.1/32"}}], "ports": ports}]
    assert policy["ingress"][1]["from"] == TABLE["everything"]["networkPolicy"]["operator"]["metricsFrom"]


@pytest.mark.parametrize("name", ["everything", "trainers fenced in"])
def test_a_trainer_reaches_its_like_dns_the_operator_and_stores(name: str) -> None:
    objects = render(TABLE[name])
    policies = [each for each in objects if each["metadata"]["name"] == "finetune-operator-trainer"]
    assert [policy["metadata"]["namespace"] for policy in policies] == [*TEAMS]
    operators = pod_of(objects)["metadata"]["labels"]
    for policy in (each["spec"] for each in policies):
        assert selects(policy["podSelector"], TRAINER_LABELS)
        assert policy["ingress"] == [{"from": [{"podSelector": policy["podSelector"]}]}]
        peers, dns, operator, stores, *extra = policy["egress"]
        assert peers == {"to": [{"podSelector": policy["podSelector"]}]}
        assert dns == {"ports": DNS}
        (target,) = operator["to"]
        assert target["namespaceSelector"] == {"matchLabels": {"kubernetes.io/metadata.name": NAMESPACE}}
        assert selects(target["podSelector"], operators)
        assert operator["ports"] == [{"port": 8443, "protocol": "TCP"}]
        assert [peer["ipBlock"]["cidr"] for peer in stores["to"]] == ["0.0.0.0/0", "::/0"]
        assert stores["ports"] == [{"port": 443, "protocol": "TCP"}]
        assert extra == TABLE[name]["networkPolicy"]["trainer"].get("extraEgress", [])


def test_without_addresses_and_progress_trainers_reach_each_other_alone() -> None:
    objects = render(TABLE["only other trainers to reach"])
    policy = only(objects, "NetworkPolicy", "finetune-operator-trainer")["spec"]
    assert policy["egress"] == [{"to": [{"podSelector": policy["podSelector"]}]}, {"ports": DNS}]


def test_without_progress_nothing_is_there_for_it() -> None:
    objects = render({"progress": {"enabled": False}})
    assert "Secret" not in {found["kind"] for found in objects}
    rules = only(objects, "ClusterRole", "finetune-operator")["rules"]
    assert "tokenreviews" not in {resource for rule in rules for resource in rule["resources"]}
    assert [port["name"] for port in only(objects, "Service")["spec"]["ports"]] == ["metrics"]
    assert [rule["ports"][0]["port"] for rule in only(objects, "NetworkPolicy")["spec"]["ingress"]] == [8080]
