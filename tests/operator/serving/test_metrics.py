"""Prometheus finds the operator's metrics under their documented names, and every one starts where it should."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from finetune_api.status import Phase
from finetune_operator.cache import Cache
from finetune_operator.serving.metrics import Metrics, metrics_app
from finetune_operator.serving.port import listening


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(CollectorRegistry(), queue_depth=lambda: 7)


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_names_and_labels_are_these_and_no_others(metrics: Metrics) -> None:
    """A dashboard or an alert of somebody's rests on each."""
    metrics.set_longest_waits({"Unschedulable": 60})
    names = {family.name: family.type for family in metrics.registry.collect() if family.name.startswith("finetune")}
    assert names == {
        "finetune_jobs": "gauge",
        "finetune_reconcile": "counter",
        "finetune_reconcile_time_seconds": "histogram",
        "finetune_attempts": "counter",
        "finetune_gpus_in_use": "gauge",
        "finetune_job_start_seconds": "histogram",
        "finetune_progress_reports": "counter",
        "finetune_longest_wait_seconds": "gauge",
        "finetune_in_sync": "gauge",
        "finetune_queue_depth": "gauge",
        "finetune_build": "info",
    }
    labels = {
        label
        for family in metrics.registry.collect()
        if family.name.startswith("finetune")
        for sample in family.samples
        for label in sample.labels
    }
    assert labels == {"phase", "result", "reason", "le", "version", "python"}


def test_what_the_reconciler_tells_is_counted(metrics: Metrics) -> None:
    metrics.observe_reconcile("success", 0.1)
    metrics.observe_reconcile("success", 0.2)
    metrics.observe_reconcile("error", 0.3)
    metrics.attempt_ended("OutOfMemory")
    metrics.started(0.2)
    metrics.set_gpus(16)
    assert value(metrics, "finetune_reconcile_total", result="success") == 2
    assert value(metrics, "finetune_reconcile_total", result="error") == 1
    assert value(metrics, "finetune_reconcile_time_seconds_sum") == pytest.approx(0.6)
    assert value(metrics, "finetune_attempts_total", reason="OutOfMemory") == 1
    assert value(metrics, "finetune_job_start_seconds_bucket", le="0.25") == 1
    assert value(metrics, "finetune_job_start_seconds_bucket", le="0.1") == 0
    assert value(metrics, "finetune_gpus_in_use") == 16
    assert value(metrics, "finetune_queue_depth") == 7


def test_a_phase_that_no_job_is_in_any_more_goes_back_to_zero(metrics: Metrics) -> None:
    assert value(metrics, "finetune_jobs", phase="Running") == 0
    metrics.set_jobs({Phase.RUNNING: 3, Phase.FAILED: 1})
    metrics.set_jobs({Phase.FAILED: 2})
    assert {phase: value(metrics, "finetune_jobs", phase=phase.value) for phase in Phase} == {
        phase: 2 if phase is Phase.FAILED else 0 for phase in Phase
    }


@pytest.mark.parametrize("reason", ["Succeeded", "Disrupted", "TrainerCrashed", "OutOfMemory", "HubUnavailable"])
def test_the_first_attempt_that_ends_so_is_a_rise(metrics: Metrics, reason: str) -> None:
    """Prometheus sees none in a series that begins with it."""
    assert value(metrics, "finetune_attempts_total", reason=reason) == 0


def test_the_first_look_that_fails_is_a_rise(metrics: Metrics) -> None:
    assert value(metrics, "finetune_reconcile_total", result="error") == 0


def test_the_longest_wait_of_each_reason_is_told_and_gone_when_nobody_waits_for_it(metrics: Metrics) -> None:
    cache, start = Cache(), datetime(2026, 1, 31, tzinfo=UTC)

    def told(*waits: tuple[str, str | None], at: int) -> dict[str, float | None]:
        """What the metrics tell after so many seconds, once jobs were seen waiting or not."""
        now = start + timedelta(seconds=at)
        for name, reason in waits:
            raw = {"metadata": {"namespace": "team", "name": name, "uid": name, "resourceVersion": "1"}}
            cache.job_read(raw).note_wait(reason, now)
        metrics.set_longest_waits(cache.longest_waits(now))
        reasons = ("Unschedulable", "ImagePullFailed")
        return {r: value(metrics, "finetune_longest_wait_seconds", reason=r) for r in reasons}

    told(("old", "Unschedulable"), at=0)
    told(("young", "Unschedulable"), ("old", "Unschedulable"), at=40)
    assert told(at=60) == {"Unschedulable": 60, "ImagePullFailed": None}
    assert told(("old", "ImagePullFailed"), at=70) == {"Unschedulable": 30, "ImagePullFailed": 0}
    assert told(("old", None), at=80) == {"Unschedulable": 40, "ImagePullFailed": None}


@pytest.mark.parametrize("in_sync", [True, False])
def test_whether_the_operator_sees_the_cluster_is_one_or_zero(metrics: Metrics, in_sync: bool) -> None:
    assert value(metrics, "finetune_in_sync") == 0
    metrics.set_in_sync(in_sync)
    assert value(metrics, "finetune_in_sync") == int(in_sync)


@pytest.mark.parametrize(
    ("status", "result"),
    [
        (200, "accepted"),
        (400, "malformed"),
        (401, "unknown_token"),
        (403, "forbidden"),
        (405, "malformed"),
        (408, "malformed"),
        (413, "malformed"),
        (500, "unavailable"),
        (503, "unavailable"),
    ],
)
def test_reports_are_counted_by_what_became_of_them_and_each_result_is_there_from_the_start(
    metrics: Metrics, status: int, result: str
) -> None:
    assert value(metrics, "finetune_progress_reports_total", result=result) == 0
    metrics.report_answered(status)
    assert value(metrics, "finetune_progress_reports_total", result=result) == 1


def test_two_operators_in_one_process_keep_apart(metrics: Metrics) -> None:
    other = Metrics(CollectorRegistry())
    other.set_gpus(1)
    assert value(metrics, "finetune_gpus_in_use") == 0


def test_a_scraper_gets_the_format_that_it_asks_for(metrics: Metrics) -> None:
    async def scrape(accept: str) -> httpx.Response:
        async with (
            listening(metrics_app(metrics), "127.0.0.1", 0) as port,
            httpx.AsyncClient(trust_env=False, headers={"Accept": accept}) as client,
        ):
            assert (await client.post(f"http://127.0.0.1:{port}/metrics")).status_code == 405
            assert (await client.get(f"http://127.0.0.1:{port}/")).status_code == 404
            return await client.get(f"http://127.0.0.1:{port}/metrics")

    plain = asyncio.run(scrape("text/plain"))
    assert plain.headers["content-type"].startswith("text/plain")
    openmetrics = asyncio.run(scrape("application/openmetrics-text; version=1.0.0"))
    assert openmetrics.headers["content-type"].startswith("application/openmetrics-text")
    parsers: Any = (parse_text, plain.text), (parse_openmetrics, openmetrics.text)  # one is not typed
    for parse, text in parsers:
        names = {family.name for family in parse(text)}
        assert {"finetune_jobs", "process_resident_memory_bytes", "process_open_fds"} <= names
