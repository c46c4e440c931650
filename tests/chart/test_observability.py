"""What a platform team watches the operator with: monitors, alerts with runbooks, and a dashboard.

Alerts live through histories in promtool. That every query has an answer, a real Prometheus tells that scrapes a real
operator: tests/cluster/test_prometheus.py.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from finetune_api.outcome import Reason
from finetune_operator.policy.reasons import ENDS_OF_ATTEMPTS, ENDS_OF_JOBS, OperatorReason
from finetune_operator.serving.metrics import Metrics
from tests.chart.monitoring import (
    ALERTS,
    CHART,
    DASHBOARD,
    NAMESPACE,
    PANELS,
    QUERIES,
    ROOT,
    RULES_FILE,
)
from tests.tools.build import binary

RUNBOOKS = (ROOT / "docs" / "runbooks.md").read_text()
UNITS = {"short", "s", "bytes", "ops", "reqps"}
"""Those of Grafana that are used."""


@dataclass(frozen=True)
class History:
    """What Prometheus scraped, a sample a minute, and when an alert fires. Nothing else fires then."""

    series: Mapping[str, str]
    """What differs from HEALTHY, in promtool's notation: `1x9` is ten times 1, `0+2x9` rises by 2 nine times."""
    alert: str | None = None
    """None: all is quiet."""
    _: KW_ONLY
    fires: int = 0
    """Minute at which it fires."""
    quiet: Sequence[int]
    """Minutes at which nothing does."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Of the alert, besides namespace and severity."""


HERE = {"instance": "10.0.0.7:8080"}
HEALTHY = {
    "finetune_build_info": "1x720",
    "finetune_in_sync": "1x720",
    "process_start_time_seconds": "1000x720",
    "finetune_queue_depth": "0x720",
    'finetune_reconcile_total{result="success"}': "0+60x720",
    'finetune_reconcile_total{result="error"}': "0x720",
    'finetune_attempts_total{reason="Succeeded"}': "0+1x720",
    'finetune_jobs{phase="Running"}': "3x720",
    'finetune_progress_reports_total{result="accepted"}': "0+36x720",
    'finetune_progress_reports_total{result="forbidden"}': "0x720",
}
ALARMING: Mapping[str, History] = {
    "the operator is gone": History(
        {"finetune_build_info": "1x9 stale"},
        "FineTuneOperatorDown",
        fires=15,
        quiet=[14],
    ),
    "the third restart within an hour": History(
        {"process_start_time_seconds": "1x9 2x9 3x9 4x60"},
        "FineTuneOperatorRestarting",
        fires=30,
        quiet=[29, 75],
        labels=HERE,
    ),
    "the API server is out of reach": History(
        {"finetune_in_sync": "1x9 0x60"},
        "FineTuneOperatorOutOfSync",
        fires=15,
        quiet=[14],
        labels=HERE,
    ),
    "one job cannot be looked at": History(
        {'finetune_reconcile_total{result="error"}': "0x9 0+1x60"},
        "FineTuneReconcileErrors",
        fires=35,
        quiet=[25],
    ),
    "more changes than the operator can look at": History(
        {"finetune_queue_depth": "0x9 1x60"},
        "FineTuneQueueNotDraining",
        fires=25,
        quiet=[24],
        labels=HERE,
    ),
    "no training operator": History(
        {'finetune_longest_wait_seconds{reason="TrainingOperatorMissing"}': "0+60x9"},
        "FineTuneTrainingOperatorUnavailable",
        fires=6,
        quiet=[5],
        labels={"reason": "TrainingOperatorMissing"},
    ),
    "an image that is not there": History(
        {'finetune_longest_wait_seconds{reason="ImagePullFailed"}': "0+60x60"},
        "FineTuneJobBlocked",
        fires=31,
        quiet=[30],
        labels={"reason": "ImagePullFailed"},
    ),
    "a full cluster": History(
        {'finetune_longest_wait_seconds{reason="Unschedulable"}': "0+60x720"},
        "FineTuneJobWaitingForRoom",
        fires=361,
        quiet=[360],
        labels={"reason": "Unschedulable"},
    ),
    "the third crash within an hour": History(
        {'finetune_attempts_total{reason="TrainerCrashed"}': "0x9 1x9 2x9 3x60"},
        "FineTuneAttemptsFailing",
        fires=30,
        quiet=[29],
        labels={"reason": "TrainerCrashed"},
    ),
    "one node after the other is drained": History(
        {'finetune_attempts_total{reason="Disrupted"}': "0x9 0+1x60"},
        "FineTuneAttemptsDisrupted",
        fires=22,
        quiet=[18],
    ),
    "a fifth of the reports is refused": History(
        {'finetune_progress_reports_total{result="forbidden"}': "0x9 0+9x120"},
        "FineTuneProgressReportsRefused",
        fires=40,
        quiet=[20],
    ),
    "reports cease": History(
        {'finetune_progress_reports_total{result="accepted"}': "0+36x9 324x120"},
        "FineTuneProgressReportsMissing",
        fires=70,
        quiet=[60],
    ),
}
WELL = "a day on which nothing is wrong"
QUIET: Mapping[str, History] = {
    WELL: History({}, quiet=[1, 60, 720]),
    "another program in the namespace restarts": History(
        {'process_start_time_seconds{instance="10.0.0.8:80"}': "1x9 2x9 3x9 4x60"}, quiet=[30]
    ),
    "the API server is away for five minutes": History(
        {'finetune_reconcile_total{result="error"}': "0x9 0+30x5 150x60"}, quiet=[11, 15, 20, 25, 30, 40]
    ),
    "a thousand jobs at once": History({"finetune_queue_depth": "0x9 900 600 300 0x60"}, quiet=[10, 12, 25, 40]),
    "a job that only its author can mend": History(
        {'finetune_longest_wait_seconds{reason="InvalidSpec"}': "0+60x720"}, quiet=[31, 361, 720]
    ),
    "somebody tries things out": History(
        {
            'finetune_attempts_total{reason="DataInvalid"}': "0+1x720",
            'finetune_attempts_total{reason="OutOfMemory"}': "0x9 2x60",
        },
        quiet=[10, 30, 70],
    ),
    "an operator that has just begun does not know the senders yet": History(
        {'finetune_progress_reports_total{result="unavailable"}': "0x9 0+36x2 72x60"}, quiet=[11, 20, 27, 40]
    ),
    "no job trains": History(
        {
            'finetune_jobs{phase="Running"}': "0x720",
            'finetune_jobs{phase="Queued"}': "3x720",
            'finetune_progress_reports_total{result="accepted"}': "324x720",
        },
        quiet=[70],
    ),
    "the API server refuses something every three minutes": History(
        {'finetune_reconcile_total{result="error"}': " ".join(f"{count}x2" for count in range(40))}, quiet=[60, 110]
    ),
    "now and then the report of a pod that is ending": History(
        {'finetune_progress_reports_total{result="forbidden"}': "0+1x120"}, quiet=[60, 110]
    ),
}
HISTORIES = {**ALARMING, **QUIET}


def promtool(*arguments: str | Path) -> str:
    """What promtool says; it must be content."""
    done = subprocess.run([binary("promtool"), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def scraped(history: History, namespace: str = NAMESPACE) -> dict[str, str]:
    """Series and samples of an operator, with the labels that a monitor adds to those that do not have them."""
    added = {"namespace": namespace, **HERE}
    series = {}
    for name, samples in {**HEALTHY, **history.series}.items():
        metric, _, given = name.rstrip("}").partition("{")
        missing = [f'{label}="{value}"' for label, value in added.items() if f"{label}=" not in given]
        series[f"{metric}{{{','.join([*filter(None, [given]), *missing])}}}"] = samples
    return series


def firing(history: History) -> dict[str, str]:
    """Labels of the series that Prometheus keeps of the history's alert while it fires."""
    assert history.alert is not None
    labels = {"alertname": history.alert, "alertstate": "firing", "namespace": NAMESPACE}
    return {**labels, **ALERTS[history.alert]["labels"], **history.labels}


def test_the_rules_have_no_fault_that_promtool_knows() -> None:
    promtool("check", "rules", "--lint=all", "--lint-fatal", RULES_FILE)


def live_through(folder: Path, series: Mapping[str, str], firing: Mapping[int, Sequence[str]]) -> None:
    """Let Prometheus live through what it scraped: at those minutes these series of ALERTS fire, and no others."""
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": 'ALERTS{alertstate="firing"}',
                "eval_time": f"{minute}m",
                "exp_samples": [{"labels": alert, "value": 1} for alert in alerts],
            }
            for minute, alerts in firing.items()
        ],
    }
    file = folder / "test.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(RULES_FILE)], "evaluation_interval": "1m", "tests": [test]}))
    promtool("test", "rules", file)


@pytest.mark.parametrize("name", HISTORIES)
def test_an_alert_fires_when_it_should_and_no_other_does(name: str, tmp_path: Path) -> None:
    history = HISTORIES[name]
    expected: dict[int, list[str]] = {minute: [] for minute in history.quiet}
    if history.alert is not None:
        inside = ",".join(f'{label}="{value}"' for label, value in firing(history).items())
        expected[history.fires] = [f"ALERTS{{{inside}}}"]
    live_through(tmp_path, scraped(history), expected)


@pytest.mark.parametrize("name", ALARMING)
def test_what_happens_to_another_release_is_none_of_its_business(name: str, tmp_path: Path) -> None:
    history = ALARMING[name]
    live_through(tmp_path, scraped(QUIET[WELL]) | scraped(history, namespace="other"), {history.fires: []})


def test_every_alert_has_a_history() -> None:
    assert [history.alert for history in ALARMING.values()] == list(ALERTS)


@pytest.mark.parametrize("history", [pytest.param(each, id=each.alert) for each in ALARMING.values()])
def test_the_sentences_of_an_alert_name_labels_that_it_has(history: History) -> None:
    annotations = ALERTS[str(history.alert)]["annotations"]
    assert annotations.keys() == {"summary", "description"}
    named = re.findall(r"\$labels\.(\w+)", " ".join(annotations.values()))
    assert set(named) <= firing(history).keys()


def words(metric: str) -> set[str]:
    """Reasons that the alerts on a metric name."""
    selectors = re.findall(rf"{metric}\{{([^}}]*)\}}", " ".join(rule["expr"] for rule in ALERTS.values()))
    named = re.findall(r'reason=~?"([^"]*)"', " ".join(selectors))
    return {word for alternatives in named for word in alternatives.split("|")}


def test_every_reason_to_wait_has_an_alert_but_the_authors_own_mistake() -> None:
    waits = {str(reason) for reason in OperatorReason} - {str(reason) for reason in (*ENDS_OF_ATTEMPTS, *ENDS_OF_JOBS)}
    assert words("finetune_longest_wait_seconds") == waits | {"Starting"}


def test_the_alerts_on_attempts_name_reasons_that_there_are() -> None:
    named = words("finetune_attempts_total")
    assert "Disrupted" in named
    assert named <= {str(reason) for reason in (*Reason, *ENDS_OF_ATTEMPTS)}


def test_every_alert_has_a_section_of_the_runbooks_and_every_section_an_alert() -> None:
    assert re.findall(r"^## (\S+)$", RUNBOOKS, re.MULTILINE) == list(ALERTS)


def test_values_that_the_runbooks_name_are_the_charts() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    paths = [path.split(".") for path in re.findall(r"`(\w+(?:\.\w+)+)`", RUNBOOKS)]
    named = [path for path in paths if path[0] in values]
    assert ["settings", "concurrency"] in named
    for path in named:
        found = values
        for key in path:
            assert key in found, ".".join(path)
            found = found[key]


def test_every_metric_of_the_operator_is_on_the_dashboard() -> None:
    registry = CollectorRegistry()
    Metrics(registry)
    families = [family.name for family in registry.collect() if family.name.startswith("finetune")]
    shown = " ".join(QUERIES.values())
    assert families
    assert [name for name in families if not re.search(rf"\b{name}(_total|_bucket|_info)?\b", shown)] == []


def test_panels_have_their_own_place_and_number() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    assert len(QUERIES) == sum(len(panel["targets"]) for panel in PANELS)

    def cells(panel: dict[str, Any]) -> set[tuple[int, int]]:
        place = panel["gridPos"]
        across, down = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        return {(x, y) for x in across for y in down}

    places = [cells(panel) for panel in DASHBOARD["panels"]]
    assert not any(one & other for one, other in combinations(places, 2))
    # Grafana has 24 columns, and moves panels up into room that is left.
    rows = max(y for place in places for _, y in place) + 1
    assert set().union(*places) == {(x, y) for x in range(24) for y in range(rows)}


@pytest.mark.parametrize("panel", [pytest.param(each, id=each["title"]) for each in PANELS])
def test_a_panel_asks_the_chosen_data_source_about_the_chosen_namespace(panel: dict[str, Any]) -> None:
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert panel["fieldConfig"]["defaults"].get("unit", "short") in UNITS
    assert all('{namespace=~"$namespace"' in target["expr"] for target in panel["targets"])


VALUES = {
    "servicemonitor": "serviceMonitor",
    "podmonitor": "podMonitor",
    "prometheusrule": "prometheusRule",
    "dashboard": "dashboard",
}
"""Template -> its key below `metrics` in the chart's values."""


def rendered(template: str, *settings: str) -> list[dict[str, Any]]:
    """The objects that a template of the chart comes to."""
    command: list[str | Path] = [binary("helm"), "template", "guard", CHART, "--namespace=tuning"]
    values = [f"--set={setting}" for setting in settings]
    done = subprocess.run([*command, "--kube-version=1.34.0", *values], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    documents = done.stdout.split("\n---\n")
    return [yaml.safe_load(text) for text in documents if f"/templates/{template}.yaml" in text]


def enabled(template: str, *settings: str) -> dict[str, Any]:
    """The one object of a template that is enabled; `settings` are below its own key."""
    wanted = [f"metrics.{VALUES[template]}.{setting}" for setting in ("enabled=true", *settings)]
    (found,) = rendered(template, *wanted)
    return found


@pytest.mark.parametrize("template", VALUES)
def test_nothing_is_there_unless_it_is_asked_for(template: str) -> None:
    """A cluster without the Prometheus operator refuses its kinds."""
    assert rendered(template) == []
    found = enabled(template)
    assert found["metadata"]["namespace"] == "tuning"
    assert found["metadata"]["labels"]["app.kubernetes.io/instance"] == "guard"


@pytest.mark.parametrize(
    ("template", "endpoints"), [("servicemonitor", "endpoints"), ("podmonitor", "podMetricsEndpoints")]
)
def test_a_monitor_finds_the_port_of_the_metrics(template: str, endpoints: str) -> None:
    monitor = enabled(template, "interval=15s", "labels.release=prometheus")
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    (endpoint,) = monitor["spec"][endpoints]
    assert endpoint["interval"] == "15s"
    (service,), (deployment,) = rendered("service"), rendered("deployment")
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    found, ports = (service, service["spec"]["ports"]) if template == "servicemonitor" else (pod, container["ports"])
    labels = found["metadata"]["labels"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert endpoint["port"] in {port["name"] for port in ports}
    assert labels[monitor["spec"]["jobLabel"]] == "finetune-operator"


@pytest.mark.parametrize("url", ["", "https://wiki.example/tuning"])
def test_alerts_are_about_the_releases_own_namespace_and_name_their_runbook(url: str) -> None:
    rule = enabled("prometheusrule", *([f"runbookUrl={url}"] if url else []))
    written = yaml.safe_load(RULES_FILE.read_text().replace(NAMESPACE, "tuning"))
    for group in written["groups"]:
        for alert in group["rules"]:
            section = f"#{alert['alert'].lower()}"
            alert["annotations"]["runbook"] = f"docs/runbooks.md{section}"
            if url:
                alert["annotations"]["runbook_url"] = f"{url}{section}"
    assert rule["spec"] == written
    assert NAMESPACE not in str(rule)


def test_without_a_progress_endpoint_nobody_waits_for_reports() -> None:
    (rule,) = rendered("prometheusrule", "metrics.prometheusRule.enabled=true", "progress.enabled=false")
    assert [group["name"] for group in rule["spec"]["groups"]] == ["finetune-operator"]


def test_the_dashboard_comes_as_it_is_where_grafanas_sidecar_looks() -> None:
    config_map = enabled("dashboard", "labels.team=ml", "annotations.folder=Tuning")
    assert config_map["kind"] == "ConfigMap"
    assert config_map["metadata"]["labels"].items() >= {("grafana_dashboard", "1"), ("team", "ml")}
    assert config_map["metadata"]["annotations"] == {"folder": "Tuning"}
    (text,) = config_map["data"].values()
    assert json.loads(text) == DASHBOARD
