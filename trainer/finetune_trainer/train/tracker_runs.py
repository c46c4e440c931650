"""One run at a tracker for all attempts of a job: how each provider is told that it is the same one.

Everything here may wait for a server, so that it runs in the thread of `trackers`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.tracking import (  # type: ignore[import-untyped]
    GeneralTracker,
    MLflowTracker,
    TensorBoardTracker,
    WandBTracker,
)

from finetune_trainer.train.tracker_settings import WANDB_VARIABLES, MlflowConfig, TensorboardConfig, WandbConfig

RUN_TAG = "finetune.run"
"""Tag of an MLflow run by which a later attempt finds it."""

WANDB_INIT_SECONDS = 20
WANDB_FINISH_SECONDS = 20
"""How long wandb waits for its server at the start of a run and at its end. At exit Python waits as long again."""


@dataclass(frozen=True)
class RunFacts:
    """What a run is called and where it goes on.

    Args:
        name: for people.
        key: the same in all attempts of one training, and in no other.
        folder: where files may be written.
        config: what was trained with, for the tracker's table of runs; may be nested.
        resumed_at_step: optimizer step of the checkpoint that this attempt continues from.
    """

    name: str
    key: str
    folder: Path
    config: Mapping[str, Any]
    resumed_at_step: int | None


@dataclass(frozen=True)
class Opened:
    """A run that a tracker has begun or continues.

    Args:
        tracker: takes figures.
        config: what its `store_init_configuration` should still be told.
        address: of the run, if people can look at it there.
    """

    tracker: GeneralTracker
    config: dict[str, Any]
    address: str | None = None


def start_wandb(config: WandbConfig, facts: RunFacts, environ: Mapping[str, str]) -> Opened:
    """Begin or continue a run of Weights & Biases.

    Steps that the run has already are not taken again by wandb: they were the same.
    """
    import wandb

    given = wandb_arguments(config, facts, environ)
    settings = wandb.Settings(
        silent=True,
        # The worker's output is the pod's log and nobody else's.
        console="off",
        disable_git=True,
        save_code=False,
        init_timeout=WANDB_INIT_SECONDS,
        finish_timeout=WANDB_FINISH_SECONDS,
    )
    if config.base_url and "WANDB_BASE_URL" not in environ:
        settings.base_url = config.base_url
    tracker = WandBTracker(given.pop("project"), settings=settings, **given)
    tracker.start()
    return Opened(tracker, dict(facts.config) | config.config, tracker.run.url)


def wandb_arguments(config: WandbConfig, facts: RunFacts, environ: Mapping[str, str]) -> dict[str, Any]:
    """What `wandb.init` gets; None for what it is to read from the environment."""
    given = config.model_dump(exclude={"base_url", "config"}) | {
        "id": config.id or hashlib.sha256(facts.key.encode()).hexdigest()[:16],
        "name": config.name or facts.name,
        "tags": config.tags or None,
        "dir": config.dir or str(facts.folder),
    }
    given |= {key: None for key, variable in WANDB_VARIABLES.items() if key in given and variable in environ}
    return given | {"resume": "allow"}


def start_mlflow(config: MlflowConfig, facts: RunFacts) -> Opened:
    """Begin or continue an MLflow run."""
    import mlflow

    uri = str(config.tracking_uri)
    mlflow.set_tracking_uri(uri)
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(config.experiment_name)
    # accelerate would put the run's tags on the experiment.
    experiment_id = (
        experiment.experiment_id
        if experiment
        else client.create_experiment(config.experiment_name, artifact_location=config.artifact_location)
    )
    key = hashlib.sha256(facts.key.encode()).hexdigest()
    earlier = client.search_runs([experiment_id], filter_string=f"tags.`{RUN_TAG}` = '{key}'", max_results=1)
    tracker = MLflowTracker(
        config.experiment_name,
        run_id=earlier[0].info.run_id if earlier else None,
        run_name=config.run_name or facts.name,
        tags=config.tags | {RUN_TAG: key},
        description=config.description,
    )
    # There is one process here, whatever accelerate thinks of the others.
    tracker.main_process_only = False
    tracker.start()
    # A parameter keeps its first value.
    known = tracker.active_run.data.params
    parameters = {name: value for name, value in _flat(facts.config) if name not in known}
    address = f"{uri.rstrip('/')}/#/experiments/{experiment_id}/runs/{tracker.active_run.info.run_id}"
    return Opened(tracker, parameters, address if uri.startswith("http") else None)


def start_tensorboard(config: TensorboardConfig, facts: RunFacts) -> Opened:
    """A new file of events among those of earlier attempts.

    TensorBoard hides what those wrote beyond the checkpoint, since these steps are trained again.
    """
    folder = Path(config.logging_dir) / facts.name if config.logging_dir else facts.folder / "tensorboard"
    # The names have whole seconds only.
    number = len(list(folder.glob("events.*"))) if folder.is_dir() else 0
    tracker = TensorBoardTracker(
        "",
        folder,
        purge_step=0 if facts.resumed_at_step is None else facts.resumed_at_step + 1,
        filename_suffix=f".{number:03d}",
    )
    tracker.main_process_only = False
    tracker.start()
    lines = json.dumps(facts.config, indent=2, default=str).splitlines()
    # accelerate would make a run of its own for the configuration. Indented by four it is shown as it is.
    tracker.log({"config": "\n".join(f"    {line}" for line in lines)}, step=facts.resumed_at_step or 0)
    return Opened(tracker, {})


def end(tracker: GeneralTracker, *, succeeded: bool) -> None:
    """Close the run; one that is to go on in a next attempt is not shown as finished."""
    if succeeded or isinstance(tracker, TensorBoardTracker):
        tracker.finish()
    elif isinstance(tracker, WandBTracker):
        tracker.run.finish(exit_code=1)
    else:
        import mlflow

        mlflow.end_run("KILLED")


def named(provider: str, values: Mapping[str, float]) -> dict[str, float]:
    """Names of figures as transformers gave them to each provider, so that what people plot stays."""
    if provider == "mlflow":
        return {name: float(value) for name, value in values.items()}
    return {
        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": float(value)
        for name, value in values.items()
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)
