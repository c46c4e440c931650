"""No panel of the dashboard is empty and every alert can fire: a real Prometheus scrapes a real operator.

What makes each alert fire is told in tests/chart/test_observability.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import pytest

from finetune_api.outcome import Reason
from tests.chart.monitoring import ALERTS, DASHBOARD, NAMESPACE, QUERIES, RULES
from tests.chart.prometheus import Prometheus, run_prometheus
from tests.cluster.api import wait_until
from tests.cluster.conftest import empty_namespace
from tests.cluster.control_plane import ControlPlane
from tests.cluster.kubelet import Kubelet, Reaper
from tests.cluster.operator_process import OperatorProcess
from tests.cluster.scene import Scene, failure, success

GRAFANA = {"$namespace": ".*", "$__rate_interval": "30s"}
"""What Grafana puts in the place of its variables."""


@pytest.fixture(scope="module")
def prometheus(
    control_plane: ControlPlane,
    shared_operator: OperatorProcess,
    reaper: Reaper,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Prometheus]:
    """One that has watched the operator while a job began to run, one succeeded, one failed and one found no room."""
    shared_operator.start()
    target, folder = urlsplit(shared_operator.metrics_url).netloc, tmp_path_factory.mktemp("prometheus")
    with (
        run_prometheus(folder, target, labels={"namespace": NAMESPACE}, rules=RULES) as prometheus,
        empty_namespace(control_plane) as api,
    ):
        # A rise is seen from the second scrape on.
        wait_until(lambda: prometheus.query("finetune_build_info"), bool)
        kubelet = Kubelet(api, reaper)
        scenes = {name: Scene(api, kubelet, name) for name in ("running", "done", "failed", "crowded")}
        for scene in scenes.values():
            scene.apply()
        pods = {name: scene.pods()[0] for name, scene in scenes.items()}
        kubelet.run(pods["running"])
        kubelet.succeed(pods["done"], success())
        kubelet.fail(pods["failed"], 11, failure(Reason.DATA_INVALID))
        kubelet.unschedulable(pods["crowded"], "0/3 nodes are available: 3 Insufficient gpu.")
        scenes["running"].wait_phase("Preparing")
        scenes["done"].wait_reason("Succeeded")
        scenes["failed"].wait_reason("DataInvalid")
        scenes["crowded"].wait_reason("Unschedulable")
        yield prometheus


def test_every_panel_shows_something(operator: OperatorProcess, prometheus: Prometheus) -> None:
    def empty() -> Mapping[str, Any]:
        answers = {name: prometheus.query(_as_grafana_asks(query)) for name, query in QUERIES.items()}
        return {name: found for name, found in answers.items() if not any(_is_number(series) for series in found)}

    wait_until(empty, lambda found: not found)
    (choice,) = (each["query"] for each in DASHBOARD["templating"]["list"] if each["type"] == "query")
    assert choice == "label_values(finetune_build_info, namespace)"
    assert [series["metric"]["namespace"] for series in prometheus.query("finetune_build_info")] == [NAMESPACE]


def test_every_alert_reads_what_the_operator_tells_and_none_fires(
    operator: OperatorProcess, prometheus: Prometheus
) -> None:
    wait_until(lambda: prometheus.query("finetune_longest_wait_seconds"), bool)
    for alert, rule in ALERTS.items():
        for selector in prometheus.selectors(rule["expr"]):
            # A reason to wait is there as long as a job waits for it.
            found = prometheus.query(str(selector.without("reason")))
            labels = {label for label, _, _ in selector.matchers}
            assert found, f"{alert}: nothing is {selector}"
            assert all(labels <= series["metric"].keys() for series in found), f"{alert}: {selector}"

    def states() -> Mapping[str, tuple[str, str]]:
        return {rule["name"]: (rule["health"], rule["state"]) for rule in prometheus.rules()}

    # Nor is one about to, but the one about reports: the trainer that runs here makes none.
    expected = {**dict.fromkeys(ALERTS, ("ok", "inactive")), "FineTuneProgressReportsMissing": ("ok", "pending")}
    wait_until(states, lambda found: found == expected)


def _as_grafana_asks(query: str) -> str:
    for variable, value in GRAFANA.items():
        query = query.replace(variable, value)
    return query


def _is_number(series: Mapping[str, Any]) -> bool:
    return math.isfinite(float(series["value"][1]))
