"""Every value is described and checked, and a wrong one ends `helm install` with its name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from scripts import chart_readme
from tests.chart.charts import CHART, KUBERNETES, NAMESPACE, RELEASE, TABLE, helm, try_helm

VALUES = (CHART / "values.yaml").read_text()
SCHEMA = json.loads((CHART / "values.schema.json").read_text())


def test_every_value_is_described_and_the_readme_says_it() -> None:
    assert chart_readme.undocumented(VALUES) == []
    assert chart_readme.readme() == (CHART / "README.md").read_text(), "run `make generate`"


def test_a_description_is_what_stands_above_its_key() -> None:
    text = "# about the file\n\na:\n  # -- First\n  # and more.\n  b: 1\n  c: {d: 2}\n# no description\ne: x\n"
    assert list(chart_readme.documented(text)) == [(("a", "b"), 1, "First and more.")]
    assert chart_readme.undocumented(text) == ["a.c.d", "e"]


def _resolved(node: Any) -> Any:
    reference = node.get("$ref")
    return SCHEMA["definitions"][reference.rpartition("/")[2]] if reference else node


def _objects(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    node = _resolved(node)
    if "properties" in node:
        yield path, node
    for key, inner in node.get("properties", {}).items():
        yield from _objects(inner, f"{path}.{key}".lstrip("."))


def test_the_schema_knows_the_values_and_no_others() -> None:
    def compare(values: Any, node: Any, path: str) -> None:
        known = _resolved(node).get("properties")
        if isinstance(values, dict) and known is not None:
            # Others may be given, though not by default.
            assert values.keys() <= known.keys(), path
            for key, inner in values.items():
                compare(inner, known[key], f"{path}.{key}")

    compare(yaml.safe_load(VALUES), SCHEMA, "")
    # Other charts have values below `global`.
    assert [path for path, node in _objects(SCHEMA) if node.get("additionalProperties") is not False] == ["global"]


@pytest.mark.parametrize("name", TABLE)
def test_helm_finds_nothing_to_warn_of(name: str) -> None:
    helm(
        "lint", "--strict", "--quiet", "--namespace", NAMESPACE, "--kube-version", KUBERNETES, CHART, values=TABLE[name]
    )


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"watchNamespace": ["a"]}, "watchNamespace"),
        ({"watchNamespaces": "team-a"}, "/watchNamespaces"),
        ({"watchNamespaces": ["Team_A"]}, "/watchNamespaces/0"),
        ({"replicas": 2}, "/replicas"),
        ({"strategy": {"type": "Sometimes"}}, "/strategy/type"),
        ({"image": {"digest": "latest"}}, "/image/digest"),
        ({"image": {"registry": "https://registry.example.com"}}, "/image/registry"),
        ({"global": {"imageRegistry": "https://mirror.example.com"}}, "/global/imageRegistry"),
        ({"extraEnv": [{"name": "FINETUNE_OPERATOR_CONCURRENCY", "value": "1"}]}, "/extraEnv/0/name"),
        ({"extraEnv": [{"name": "A", "value": 1}]}, "/extraEnv/0/value"),
        ({"commonLabels": {"app.kubernetes.io/name": "x"}}, "propertyName 'app.kubernetes.io/name'"),
        ({"trainer": {"defaultOutputUri": "gs://models"}}, "/trainer/defaultOutputUri"),
        ({"trainer": {"defaultOutputUri": "/data"}}, "/trainer/defaultOutputUri"),
        ({"trainer": {"terminationGraceSeconds": 5}}, "/trainer/terminationGraceSeconds"),
        ({"trainer": {"podUserId": 0}}, "/trainer/podUserId"),
        ({"trainer": {"sharedMemorySize": "much"}}, "/trainer/sharedMemorySize"),
        ({"trainer": {"defaultResources": {"cpu": 1}}}, "/trainer/defaultResources"),
        ({"trainer": {"acceleratorNodeSelectors": {"A10G": "gpu=a10g"}}}, "/trainer/acceleratorNodeSelectors/A10G"),
        ({"settings": {"concurrency": 0}}, "/settings/concurrency"),
        ({"settings": {"resyncSeconds": 0}}, "/settings/resyncSeconds"),
        ({"settings": {"resync": 5}}, "/settings"),
        ({"networkPolicy": {"operator": {"apiServerCidrs": ["10.0.0.1"]}}}, "/networkPolicy/operator/apiServerCidrs/0"),
        ({"networkPolicy": {"trainer": {"enabled": True}}}, "list them in networkPolicy.trainer.namespaces"),
        ({"metrics": {"serviceMonitor": {"interval": "often"}}}, "/metrics/serviceMonitor/interval"),
        ({"metrics": {"prometheusRule": {"runbookUrl": "runbooks.md"}}}, "/metrics/prometheusRule/runbookUrl"),
    ],
)
def test_a_wrong_value_is_refused(values: Any, said: str) -> None:
    done = try_helm("template", RELEASE, CHART, "--kube-version", KUBERNETES, values=values)
    assert done.returncode != 0
    assert said in done.stderr


def test_an_old_cluster_is_refused() -> None:
    done = try_helm("template", RELEASE, CHART, "--kube-version", "1.29.9")
    assert "requires kubeVersion: >=1.30.0-0" in done.stderr
