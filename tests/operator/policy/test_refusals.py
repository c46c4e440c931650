"""Whatever an API server, a quota or a webhook says of whichever object we create: a true reason, and who can help."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.outcome import Reason
from finetune_operator.errors import api_error
from finetune_operator.policy.reasons import OperatorReason
from finetune_operator.policy.refusals import refusal

TRAINING = (
    'Internal error occurred: failed calling webhook "validator.pytorchjob.training-operator.kubeflow.org": failed to '
    'call webhook: Post "https://training-operator.kubeflow.svc:443": connect: connection refused'
)
KUEUE = 'Internal error occurred: failed calling webhook "mpytorchjob.kb.io": kueue-webhook-service: no endpoints'
POLICY = 'Internal error occurred: failed calling webhook "validate.kyverno.svc": context deadline exceeded'
DENIED = 'admission webhook "validate.kyverno.svc" denied the request: no GPUs for you'
QUOTA = 'pytorchjobs.kubeflow.org "a" is forbidden: exceeded quota: jobs, requested: 1, used: 4, limited: 4'
ROLE = 'configmaps is forbidden: User "system:serviceaccount:a:b" cannot create resource "configmaps" in API group ""'
GOING = 'configmaps "a" is forbidden: unable to create new content in namespace team because it is being terminated'


@pytest.mark.parametrize(
    ("kind", "status", "text", "reason", "says"),
    [
        ("PyTorchJob", 404, "404 page not found", OperatorReason.TRAINING_OPERATOR_MISSING, "training operator (v1)"),
        ("PyTorchJob", 500, TRAINING, OperatorReason.TRAINING_OPERATOR_UNAVAILABLE, "Kubeflow's training operator"),
        ("PyTorchJob", 500, KUEUE, OperatorReason.ADMISSION_UNAVAILABLE, "Kueue, which is asked about PyTorchJobs"),
        ("PyTorchJob", 500, POLICY, OperatorReason.ADMISSION_UNAVAILABLE, "webhook validate.kyverno.svc"),
        ("ConfigMap", 500, POLICY, OperatorReason.ADMISSION_UNAVAILABLE, "which is asked about ConfigMaps"),
        ("ConfigMap", 500, TRAINING, OperatorReason.ADMISSION_UNAVAILABLE, "which is asked about ConfigMaps"),
        ("PyTorchJob", 403, DENIED, OperatorReason.CREATION_FORBIDDEN, "validate.kyverno.svc objects to"),
        ("ConfigMap", 403, DENIED, OperatorReason.CREATION_FORBIDDEN, "The ConfigMap of this job may not be created"),
        ("PyTorchJob", 403, QUOTA, OperatorReason.CREATION_FORBIDDEN, "have the quota raised"),
        ("ConfigMap", 403, ROLE, OperatorReason.CREATION_FORBIDDEN, "the operator's role lacks this right"),
        ("PyTorchJob", 422, "spec: Invalid value", Reason.INVALID_SPEC, "refuses the PyTorchJob"),
        ("ConfigMap", 413, "too large", Reason.INVALID_SPEC, "refuses the ConfigMap"),
        ("PyTorchJob", 400, DENIED, Reason.INVALID_SPEC, "denied the request"),
    ],
)
def test_the_right_party_is_named(kind: str, status: int, text: str, reason: str, says: str) -> None:
    error = api_error(status, "", text)
    error.kind = kind
    found = refusal(error)
    assert found is not None
    assert (found.reason, found.final) == (reason, reason == Reason.INVALID_SPEC)
    assert says in found.sentence
    assert text in found.sentence or status == 404
    # A quota is free again when another job ends, and whoever does not answer may do so in a moment.
    assert found.by_hand is (text in (DENIED, ROLE) or status in (404, 413, 422))


@pytest.mark.parametrize(
    ("kind", "status", "text"),
    [
        ("ConfigMap", 404, 'namespaces "team" not found'),
        ("ConfigMap", 403, GOING),
        ("PyTorchJob", 403, GOING),
        ("PyTorchJob", 500, "etcdserver: leader changed"),
        ("PyTorchJob", 503, "apiserver is shutting down"),
        ("ConfigMap", 429, "too many requests"),
        ("ConfigMap", None, "The API server gave no answer."),
        ("PyTorchJob", 409, "the object has been modified"),
    ],
)
def test_where_nothing_in_particular_hinders_nothing_is_blamed(kind: str, status: int | None, text: str) -> None:
    error = api_error(status, "", text)
    error.kind = kind
    assert refusal(error) is None


@given(
    kind=st.sampled_from(["ConfigMap", "PyTorchJob"]), status=st.sampled_from([None, *range(400, 600)]), text=st.text()
)
def test_only_the_training_operators_own_object_is_ever_blamed_on_it(kind: str, status: int | None, text: str) -> None:
    error = api_error(status, "", text + "webhook")
    error.kind = kind
    found = refusal(error)
    if found is not None and kind != "PyTorchJob":
        assert found.reason not in (
            OperatorReason.TRAINING_OPERATOR_MISSING,
            OperatorReason.TRAINING_OPERATOR_UNAVAILABLE,
        )
