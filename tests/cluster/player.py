"""Lets jobs on the development cluster run and succeed, in half a minute and without training anything.

It plays every pod that is made for a job: kubelet, and trainer by the words that a trainer sends.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import logging
import math
import ssl
from collections import defaultdict

import httpx
import yaml

from finetune_api.job import FineTuneJob
from finetune_api.outcome import (
    AdapterResult,
    DatasetResult,
    Metric,
    MetricsResult,
    ProgressMetric,
    ProgressReport,
    TerminationMessage,
    TrainerStatus,
)
from finetune_api.output import output_address
from finetune_api.verification import VerificationMessage
from finetune_operator.names import CA_CONFIG_MAP, CA_KEY, JOB_FILE_KEY, JOB_NAME_LABEL, MANAGER
from tests.cluster.api import ApiError, Object
from tests.cluster.control_plane import ControlPlane
from tests.cluster.kubelet import JOB_LABEL, Kubelet, Reaper

TICKS = 24
STEPS_PER_TICK = 50
FIRST_LOSS = 2.4

_log = logging.getLogger(__name__)


class Player:
    """Brings every pod one moment further with each tick."""

    def __init__(self, control_plane: ControlPlane, reaper: Reaper, progress_url: str) -> None:
        self._plane = control_plane
        self._reaper = reaper
        self._progress_url = progress_url
        self._ticks: defaultdict[str, int] = defaultdict(int)

    def tick(self) -> None:
        """One moment, which a caller repeats about once a second."""
        for pod in self._plane.api.list("Pod", labels=JOB_NAME_LABEL, everywhere=True):
            gone = "deletionTimestamp" in pod["metadata"] or pod["status"].get("phase") in {"Succeeded", "Failed"}
            if not gone:
                try:
                    self._play(pod, self._ticks[pod["metadata"]["uid"]])
                except (ApiError, httpx.HTTPError, KeyError) as error:
                    _log.warning("%s: %s", pod["metadata"]["name"], error)
                self._ticks[pod["metadata"]["uid"]] += 1

    def _play(self, pod: Object, tick: int) -> None:
        kubelet = Kubelet(self._plane.api.in_namespace(pod["metadata"]["namespace"]), self._reaper)
        if tick == 0:
            kubelet.scheduled(pod)
        elif tick == 1:
            kubelet.run(pod)
        elif JOB_LABEL not in pod["metadata"]["labels"]:
            kubelet.succeed(pod, VerificationMessage(verified=True, message="It is only played.").to_bytes().decode())
        elif tick >= TICKS:
            kubelet.succeed(pod, self._last_words(pod))
        elif pod["metadata"]["name"].endswith("-worker-0"):
            self._report(pod, tick)

    def _report(self, pod: Object, tick: int) -> None:
        namespace = pod["metadata"]["namespace"]
        account = pod["spec"].get("serviceAccountName", "default")
        token = self._plane.token(namespace, account, audiences=(MANAGER,), pod=pod)
        authority = self._plane.api.get("ConfigMap", CA_CONFIG_MAP, namespace)["data"][CA_KEY]
        figures = {
            ProgressMetric.PHASE: "Preparing" if tick < 4 else "Publishing" if tick > TICKS - 3 else "Running",
            ProgressMetric.STEP: tick * STEPS_PER_TICK,
            ProgressMetric.TOTAL_STEPS: TICKS * STEPS_PER_TICK,
            ProgressMetric.LOSS: round(_loss(tick), 4),
            ProgressMetric.TOKENS_PER_SECOND: 18_000,
        }
        status = TrainerStatus(
            progress_percentage=100 * tick // TICKS,
            estimated_remaining_seconds=TICKS - tick,
            metrics=[Metric(name=name, value=str(value)) for name, value in figures.items()],
            last_updated_time=dt.datetime.now(dt.UTC).isoformat(),
        )
        httpx.post(
            self._progress_url,
            content=ProgressReport(trainer_status=status).model_dump_json(exclude_none=True),
            headers={"Authorization": f"Bearer {token}"},
            verify=ssl.create_default_context(cadata=authority),
            trust_env=False,
        ).raise_for_status()

    def _last_words(self, pod: Object) -> str:
        name = pod["metadata"]["labels"][JOB_LABEL]
        text = self._plane.api.get("ConfigMap", name, pod["metadata"]["namespace"])["data"][JOB_FILE_KEY]
        job = FineTuneJob.model_validate(yaml.safe_load(text))
        adapter = AdapterResult(
            uri=f"{output_address(job)}/adapter",
            base_model=str(job.spec.model_id),
            sha256=hashlib.sha256(text.encode()).hexdigest(),
            size_bytes=13_631_488,
        )
        loss = _loss(TICKS)
        said = TerminationMessage(
            succeeded=True,
            message=f"The adapter is at {adapter.uri}.",
            rank=0,
            adapter=adapter,
            dataset=DatasetResult(rows=TICKS * STEPS_PER_TICK * 8, trainable_tokens=4_800_000),
            metrics=MetricsResult(train_loss=loss, eval_loss=loss * 1.1, perplexity=math.exp(loss * 1.1)),
        )
        return said.to_bytes().decode() if pod["metadata"]["name"].endswith("-worker-0") else ""


def _loss(tick: int) -> float:
    return FIRST_LOSS / (1 + tick / 8)
