"""The published permissions are exactly these: whoever adds one changes this list and says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_operator.names import (
    BATCH_GROUP,
    BATCH_PLURAL,
    FINETUNE_GROUP,
    FINETUNE_PLURAL,
    MANAGER,
    PYTORCH_GROUP,
    PYTORCH_PLURAL,
    TLS_SECRET,
)
from finetune_operator.settings import OperatorSettings

DIST = Path(__file__).resolve().parents[2] / "dist"
FILES = ("install.yaml", "install-one-namespace.yaml")

JOBS = {
    (FINETUNE_GROUP, FINETUNE_PLURAL): ["get", "list", "watch", "delete"],
    (FINETUNE_GROUP, f"{FINETUNE_PLURAL}/status"): ["update"],
    (PYTORCH_GROUP, PYTORCH_PLURAL): ["get", "list", "watch", "create", "delete"],
    # The verification of an adapter. Its pods tell how it goes, and it goes with its FineTuneJob.
    (BATCH_GROUP, BATCH_PLURAL): ["get", "create"],
    ("", "pods"): ["get", "list", "watch"],
    ("", "configmaps"): ["get", "create", "update", "delete"],
    ("", "events"): ["create"],
}
TOKENS = {("authentication.k8s.io", "tokenreviews"): ["create"]}
SECRET = {("", "secrets"): ["get", "update"]}
USERS = {
    "finetune-edit": {
        (FINETUNE_GROUP, FINETUNE_PLURAL): ["get", "list", "watch", "create", "update", "patch", "delete"],
        (FINETUNE_GROUP, f"{FINETUNE_PLURAL}/status"): ["get"],
    },
    "finetune-view": {
        (FINETUNE_GROUP, FINETUNE_PLURAL): ["get", "list", "watch"],
        (FINETUNE_GROUP, f"{FINETUNE_PLURAL}/status"): ["get"],
    },
}
"""For people: Kubernetes adds them to its own `edit` and `view`, so nothing binds them."""


def documents(file: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DIST / file).read_text()))


def rules(document: dict[str, Any]) -> dict[tuple[str, str], list[str]]:
    return {
        (group, resource): rule["verbs"]
        for rule in document["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }


def named(file: str, *kinds: str) -> dict[tuple[str, str | None], dict[str, Any]]:
    """Documents of these kinds by name and namespace."""
    found = [document for document in documents(file) if document["kind"] in kinds]
    return {(each["metadata"]["name"], each["metadata"].get("namespace")): each for each in found}


def operators(file: str) -> dict[tuple[str, str | None], dict[str, Any]]:
    """Roles that are not for people."""
    return {key: role for key, role in named(file, "ClusterRole", "Role").items() if key[0] not in USERS}


def test_the_operator_of_a_cluster_may_do_this() -> None:
    roles = {name: rules(role) for name, role in operators("install.yaml").items()}
    assert roles == {
        ("finetune-operator", None): {**JOBS, **TOKENS},
        ("finetune-operator-tls", "finetune-system"): SECRET,
    }


def test_the_operator_of_one_namespace_may_do_this_there_and_review_tokens() -> None:
    roles = {name: rules(role) for name, role in operators("install-one-namespace.yaml").items()}
    assert roles == {
        ("finetune-operator", "finetune-jobs"): JOBS,
        ("finetune-operator-tokens", None): TOKENS,
        ("finetune-operator-tls", "finetune-system"): SECRET,
    }


@pytest.mark.parametrize("file", FILES)
def test_who_may_edit_a_namespace_may_fine_tune_there_and_who_may_view_it_sees_jobs(file: str) -> None:
    roles = {key[0]: role for key, role in named(file, "ClusterRole").items() if key[0] in USERS}
    assert {name: rules(role) for name, role in roles.items()} == USERS
    joined = {
        name: {label.rpartition("-")[2] for label in role["metadata"]["labels"] if "/aggregate-to-" in label}
        for name, role in roles.items()
    }
    assert joined == {"finetune-edit": {"admin", "edit"}, "finetune-view": {"admin", "edit", "view"}}


@pytest.mark.parametrize("file", FILES)
def test_every_role_is_bound_to_the_operators_account_where_it_stands(file: str) -> None:
    bindings = named(file, "ClusterRoleBinding", "RoleBinding")
    roles = operators(file)
    assert bindings.keys() == roles.keys()
    account = {"kind": "ServiceAccount", "name": "finetune-operator", "namespace": "finetune-system"}
    assert (account["name"], account["namespace"]) in named(file, "ServiceAccount")
    for name, binding in bindings.items():
        reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": roles[name]["kind"], "name": name[0]}
        assert (binding["roleRef"], binding["subjects"]) == (reference, [account])


@pytest.mark.parametrize("file", FILES)
def test_of_secrets_one_is_open_and_it_comes_empty(file: str) -> None:
    (rule,) = named(file, "Role")["finetune-operator-tls", "finetune-system"]["rules"]
    assert rule["resourceNames"] == [TLS_SECRET]
    secret = named(file, "Secret")[TLS_SECRET, "finetune-system"]
    assert not {"data", "stringData"} & secret.keys()


@pytest.mark.parametrize("file", FILES)
def test_names_and_ports_are_those_that_the_operator_has_by_default(file: str) -> None:
    settings = OperatorSettings()
    service = named(file, "Service")[MANAGER, settings.namespace]
    pod = named(file, "Deployment")[MANAGER, settings.namespace]["spec"]["template"]["spec"]
    listening = {port["name"]: port["containerPort"] for port in pod["containers"][0]["ports"]}
    ports = {"progress": settings.progress_port, "metrics": settings.metrics_port, "health": settings.health_port}
    assert listening == ports
    reached = {port["targetPort"]: port["port"] for port in service["spec"]["ports"]}
    assert reached == {name: ports[name] for name in ("progress", "metrics")}
    assert (settings.namespace, None) in named(file, "Namespace")
    assert settings.tls_secret == TLS_SECRET
