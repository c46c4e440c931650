"""The operator that most people would write first, to compare ours with: one kopf handler that posts the PyTorchJob.

kopf's settings are its defaults. The PyTorchJob comes from the same builder and goes out through the same client as
ours, so what differs is the design alone: no validation, no ConfigMap, no status, no events, no retries.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import kopf

from finetune_api.job import FineTuneJob
from finetune_operator.cluster import Cluster
from finetune_operator.desired import pytorch_job
from finetune_operator.names import FINETUNE_GROUP, FINETUNE_PLURAL, FINETUNE_VERSION
from finetune_operator.settings import OperatorSettings


@kopf.on.startup()
async def connect(memo: kopf.Memo, **_: Any) -> None:
    """One client for all jobs."""
    memo["settings"] = OperatorSettings.from_environment(os.environ)
    memo["cluster"] = await (await Cluster.connect()).__aenter__()


@kopf.on.cleanup()
async def disconnect(memo: kopf.Memo, **_: Any) -> None:
    """The client's connections."""
    await memo["cluster"].__aexit__(None, None, None)


# What the benchmark made by copying was dealt with long ago; kopf's own mark of that would be an annotation.
@kopf.on.create(FINETUNE_GROUP, FINETUNE_VERSION, FINETUNE_PLURAL, labels={"past": kopf.ABSENT})
async def create(body: kopf.Body, namespace: str | None, memo: kopf.Memo, **_: Any) -> None:
    """Post the PyTorchJob."""
    job = FineTuneJob.model_validate({key: value for key, value in body.items() if key != "status"})
    await memo["cluster"].create_pytorch_job(namespace or "", pytorch_job(job, 1, memo["settings"]))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    port = OperatorSettings.from_environment(os.environ).health_port
    kopf.run(clusterwide=True, standalone=True, liveness_endpoint=f"http://127.0.0.1:{port}/readyz")
