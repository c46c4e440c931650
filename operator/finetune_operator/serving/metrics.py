"""What Prometheus can ask the operator: one place for every name, so that dashboards and alerts have one to rely on.

Names follow Prometheus' and, where the meaning is the same, controller-runtime's. No label names a job or a namespace:
their number is not bounded, and what became of one job is said by its status.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, GCCollector, Histogram, Info, ProcessCollector
from prometheus_client.exposition import choose_encoder

from finetune_api.outcome import Reason
from finetune_api.status import Phase
from finetune_operator.policy.reasons import ENDS_OF_ATTEMPTS

RECONCILE_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
"""Bounds in seconds: from a job that has not changed to an API server that takes its time."""
START_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
"""Bounds in seconds: what a person who applied a job notices, up to an operator that was away."""
RECONCILE_RESULTS = ("success", "requeue_after", "conflict", "error")
REPORT_RESULTS = {
    200: "accepted",
    401: "unknown_token",
    403: "forbidden",
    500: "unavailable",
    503: "unavailable",
}
"""Status of the progress endpoint's answer -> label; every other one is `malformed`."""


class Metrics:
    """The operator's metrics.

    Args:
        registry: where they are registered; a new one for each, or names collide.
        queue_depth: jobs that wait to be reconciled, asked at every scrape.
    """

    def __init__(self, registry: CollectorRegistry, *, queue_depth: Callable[[], float] = lambda: 0) -> None:
        self.registry = registry
        self._jobs = Gauge("finetune_jobs", "FineTuneJobs by phase.", ["phase"], registry=registry)
        self._reconciles = Counter(
            "finetune_reconcile_total", "Reconciliations by result.", ["result"], registry=registry
        )
        self._reconcile_seconds = Histogram(
            "finetune_reconcile_time_seconds",
            "Time that a reconciliation took.",
            registry=registry,
            buckets=RECONCILE_BUCKETS,
        )
        self._attempts = Counter(
            "finetune_attempts_total", "Attempts that have ended, by reason.", ["reason"], registry=registry
        )
        self._gpus = Gauge("finetune_gpus_in_use", "GPUs that running attempts asked for.", registry=registry)
        self._start_seconds = Histogram(
            "finetune_job_start_seconds",
            "Time from the creation of a FineTuneJob to that of its first PyTorchJob.",
            registry=registry,
            buckets=START_BUCKETS,
        )
        self._reports = Counter(
            "finetune_progress_reports_total", "Progress reports received, by result.", ["result"], registry=registry
        )
        self._longest_waits = Gauge(
            "finetune_longest_wait_seconds",
            "How long the job has waited that has waited longest, by what it waits for.",
            ["reason"],
            registry=registry,
        )
        self._in_sync = Gauge(
            "finetune_in_sync",
            "1 while the operator sees the cluster: all jobs were looked at lately, and every watch tells of changes.",
            registry=registry,
        )
        Gauge("finetune_queue_depth", "Jobs that wait to be reconciled.", registry=registry).set_function(queue_depth)
        Info("finetune_build", "Version of the operator.", registry=registry).info(
            {"version": _version(), "python": platform.python_version()}
        )
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        # From the start, so that a rate over the first one is not lost.
        for result in RECONCILE_RESULTS:
            self._reconciles.labels(result)
        for reason in (*Reason, *ENDS_OF_ATTEMPTS):
            self._attempts.labels(reason.value)
        for result in {*REPORT_RESULTS.values(), "malformed"}:
            self._reports.labels(result)
        self.set_jobs({})

    def observe_reconcile(self, result: str, seconds: float) -> None:
        """A reconciliation ended with `result`, one of RECONCILE_RESULTS, after `seconds`."""
        self._reconciles.labels(result).inc()
        self._reconcile_seconds.observe(seconds)

    def attempt_ended(self, reason: str) -> None:
        """An attempt ended; `reason` is the CamelCase word in status, `Succeeded` for success."""
        self._attempts.labels(reason).inc()

    def started(self, seconds: float) -> None:
        """A job's first PyTorchJob was created `seconds` after the job itself."""
        self._start_seconds.observe(seconds)

    def set_jobs(self, counts: Mapping[Phase, int]) -> None:
        """How many jobs there are in each phase; none in a phase that is not named."""
        for phase in Phase:
            self._jobs.labels(phase.value).set(counts.get(phase, 0))

    def set_gpus(self, count: int) -> None:
        """How many GPUs the attempts that run now asked for."""
        self._gpus.set(count)

    def set_longest_waits(self, seconds: Mapping[str, float]) -> None:
        """How long jobs have waited by now (seconds), by the reason that is in their status."""
        self._longest_waits.clear()
        for reason, waited in seconds.items():
            self._longest_waits.labels(reason).set(waited)

    def set_in_sync(self, in_sync: bool) -> None:
        """Whether the operator sees the cluster."""
        self._in_sync.set(in_sync)

    def report_answered(self, status: int) -> None:
        """The progress endpoint answered a report with HTTP status `status`."""
        self._reports.labels(REPORT_RESULTS.get(status, "malformed")).inc()


def metrics_app(metrics: Metrics, *, refresh: Callable[[], None] = lambda: None) -> web.Application:
    """GET /metrics, in the format that the scraper prefers.

    Args:
        metrics: what is told.
        refresh: called before each scrape, to set what is only counted then.
    """

    async def scrape(request: web.Request) -> web.Response:
        refresh()
        encoder, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encoder(metrics.registry), headers={"Content-Type": content_type})

    app = web.Application()
    app.router.add_get("/metrics", scrape)
    return app


def _version() -> str:
    try:
        return version("finetune-operator")
    except PackageNotFoundError:
        return "unknown"
