"""The chart's values become the operator's settings, and its defaults are the operator's own."""

from __future__ import annotations

import os
from typing import Any

import pytest

from finetune_operator.settings import PREFIX, OperatorSettings
from tests.chart.charts import NAMESPACE, RELEASE, TABLE, environment, pod_of, render

FIXED = {"ca_config_map", "health_port", "metrics_port", "progress_audience", "progress_host", "progress_port"}
"""Settings that nobody has a reason to change in a pod."""


def settings_of(values: Any, monkeypatch: pytest.MonkeyPatch) -> OperatorSettings:
    """What the operator reads from the variables that the chart gives it."""
    for name, value in environment(render(values)).items():
        if name.startswith(PREFIX):
            monkeypatch.setenv(name, value)
    return OperatorSettings.from_environment(os.environ)


def test_without_values_the_operator_has_its_own_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"https://{RELEASE}.{NAMESPACE}.svc:{OperatorSettings().progress_port}"
    assert settings_of({}, monkeypatch) == OperatorSettings(progress_url=url)


@pytest.mark.parametrize("name", TABLE)
def test_the_operator_accepts_what_it_is_given(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(TABLE[name], monkeypatch)
    assert settings.namespace == NAMESPACE


@pytest.mark.parametrize(
    ("values", "setting", "expected"),
    [
        ({"watchNamespaces": ["a", "b"]}, "watch_namespaces", ("a", "b")),
        ({"trainer": {"image": {"tag": "2"}}}, "trainer_image", "finetune-trainer:2"),
        ({"trainer": {"defaultOutputUri": "s3://models"}}, "default_output_uri", "s3://models"),
        ({"trainer": {"objectStoreSecret": "store"}}, "object_store_secret", "store"),
        ({"trainer": {"huggingFaceSecret": "hub"}}, "hugging_face_secret", "hub"),
        ({"trainer": {"defaultResources": {"limits": {"cpu": 4}}}}, "default_resources.limits", {"cpu": 4}),
        (
            {"trainer": {"acceleratorNodeSelectors": {"A10G": {"example.com/gpu": 'a "10"'}}}},
            "accelerator_node_selectors",
            {"A10G": {"example.com/gpu": 'a "10"'}},
        ),
        ({"trainer": {"queueName": "tuning"}}, "queue_name", "tuning"),
        ({"trainer": {"cacheClaim": "models"}}, "cache_claim", "models"),
        ({"trainer": {"sharedMemorySize": "8Gi"}}, "shared_memory_size", "8Gi"),
        ({"trainer": {"scratchSize": "1Ti"}}, "scratch_size", "1Ti"),
        # Above a million Go writes numbers with an exponent.
        ({"trainer": {"podUserId": 1000680000}}, "pod_user_id", 1000680000),
        ({"trainer": {"podUserId": None}}, "pod_user_id", None),
        ({"trainer": {"terminationGraceSeconds": 3600}}, "termination_grace_seconds", 3600),
        ({"progress": {"enabled": False}}, "progress_url", None),
        ({"fullnameOverride": "tuner"}, "progress_url", f"https://tuner.{NAMESPACE}.svc:8443"),
        ({"fullnameOverride": "tuner"}, "tls_secret", "tuner-tls"),
        ({"settings": {"concurrency": 4}}, "concurrency", 4),
        ({"settings": {"resyncSeconds": 0.5}}, "resync_seconds", 0.5),
        # Zero is a value, and not the lack of one.
        ({"settings": {"statusIntervalSeconds": 0}}, "status_interval_seconds", 0),
        ({"settings": {"retryBaseSeconds": 0}}, "retry_base_seconds", 0),
        ({"settings": {"retryLimitSeconds": 86400}}, "retry_limit_seconds", 86400),
        ({"settings": {"groupEndSeconds": 60}}, "group_end_seconds", 60),
        ({"settings": {"podsExpectedSeconds": 60}}, "pods_expected_seconds", 60),
        ({"settings": {"verificationSeconds": 60}}, "verification_seconds", 60),
    ],
)
def test_a_value_becomes_a_setting(
    values: Any, setting: str, expected: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: Any = settings_of(values, monkeypatch)
    for name in setting.split("."):
        found = getattr(found, name)
    assert found == expected


def test_every_setting_has_a_value_or_a_reason_to_have_none() -> None:
    given = {name.removeprefix(PREFIX).lower() for name in environment(render(TABLE["everything"]))}
    assert OperatorSettings.model_fields.keys() - given == {*FIXED, "watch_namespaces"}
    assert "FINETUNE_OPERATOR_WATCH_NAMESPACES" in environment(render(TABLE["some namespaces"]))


def test_variables_that_kubernetes_makes_of_services_do_not_stop_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the Service `finetune-operator` it would make some that look like settings."""
    monkeypatch.setenv("FINETUNE_OPERATOR_SERVICE_HOST", "10.0.0.7")
    with pytest.raises(ValueError, match="FINETUNE_OPERATOR_SERVICE_HOST"):
        OperatorSettings.from_environment(os.environ)
    assert pod_of(render())["spec"]["enableServiceLinks"] is False
