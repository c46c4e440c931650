"""What a job says of its experiment tracker, read and checked before anything is downloaded.

A variable that the environment sets already stays: the platform team, or the job's own workers.env, has said it.
"""

from __future__ import annotations

import importlib.util
import netrc
import re
from collections.abc import Mapping, MutableMapping
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from finetune_api.outcome import Reason
from finetune_api.training import Logger
from finetune_trainer.errors import JobError, first_line
from finetune_trainer.launch.failures import redact

NAMES = {"wandb": "Weights & Biases", "mlflow": "MLflow", "tensorboard": "TensorBoard"}

# accelerate writes event files with either.
_PACKAGES = {"wandb": ("wandb",), "mlflow": ("mlflow",), "tensorboard": ("tensorboardX", "tensorboard")}

_WANDB_CLOUD = "https://api.wandb.ai"

_PATIENCE = {
    "mlflow": {
        # MLflow's own are seven retries of two minutes each: a run would long be over.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    },
    "wandb": {"WANDB_SILENT": "true"},
    "tensorboard": {},
}


class _Config(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, coerce_numbers_to_str=True)


class WandbConfig(_Config):
    """What `wandb.init` is told."""

    project: str = "finetune"
    entity: str | None = None
    group: str | None = None
    name: str | None = None
    notes: str | None = None
    job_type: str | None = None
    tags: list[str] = []
    id: str | None = None
    base_url: str | None = None
    mode: Literal["online", "offline", "disabled", "shared"] | None = None
    dir: str | None = None
    config: dict[str, Any] = {}


class MlflowConfig(_Config):
    """Where an MLflow run is, and what it is called."""

    tracking_uri: str | None = None
    experiment_name: str = Field(default="Default", min_length=1)
    create_experiment_if_not_exists: bool = True
    artifact_location: str | None = None
    run_name: str | None = None
    tags: dict[str, str] = {}
    description: str | None = None


class TensorboardConfig(_Config):
    """A folder, on a volume for example, where a TensorBoard sees the run while it goes on."""

    logging_dir: str | None = None


TrackerConfig = WandbConfig | MlflowConfig | TensorboardConfig

_MODELS: dict[str, type[TrackerConfig]] = {
    "wandb": WandbConfig,
    "mlflow": MlflowConfig,
    "tensorboard": TensorboardConfig,
}

WANDB_VARIABLES = {
    "project": "WANDB_PROJECT",
    "entity": "WANDB_ENTITY",
    "group": "WANDB_RUN_GROUP",
    "name": "WANDB_NAME",
    "notes": "WANDB_NOTES",
    "job_type": "WANDB_JOB_TYPE",
    "tags": "WANDB_TAGS",
    "id": "WANDB_RUN_ID",
    "base_url": "WANDB_BASE_URL",
    "mode": "WANDB_MODE",
    "dir": "WANDB_DIR",
}
_MLFLOW_VARIABLES = {"tracking_uri": "MLFLOW_TRACKING_URI", "experiment_name": "MLFLOW_EXPERIMENT_NAME"}


def read_config(logger: Logger, environ: Mapping[str, str]) -> TrackerConfig:
    """The provider's settings; those of MLflow with the environment's in them.

    Raises:
        JobError: InvalidSpec, a value is not what the provider takes.
    """
    given = dict(logger.provider_config)
    if logger.provider == "mlflow":
        given |= {key: environ[name] for key, name in _MLFLOW_VARIABLES.items() if environ.get(name)}
    if logger.provider == "wandb" and isinstance(given.get("tags"), str):
        given["tags"] = [given["tags"]]
    try:
        return _MODELS[logger.provider].model_validate(given)
    except ValidationError as error:
        problem = error.errors(include_input=False)[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise JobError(
            Reason.INVALID_SPEC,
            f"logger.provider_config.{key} is nothing that {NAMES[logger.provider]} takes ({problem['msg']}): "
            "correct it or leave it out.",
        ) from None


def check_tracker(logger: Logger | None, environ: MutableMapping[str, str]) -> list[str]:
    """See that the job's tracker can be used, as far as that can be known; to be called on one rank.

    MLflow is asked for the experiment. A server that does not answer is no mistake of the job's.

    Args:
        environ: the process's own; how long the libraries may wait is set there where nobody said it.

    Returns:
        What the user should be told: settings that have no effect, a server that does not answer.

    Raises:
        JobError: InvalidSpec, the package is missing or a setting is wrong.
    """
    if logger is None:
        return []
    provider = logger.provider
    if not any(importlib.util.find_spec(package) for package in _PACKAGES[provider]):
        raise JobError(
            Reason.INVALID_SPEC,
            f"logger.provider is {provider}, whose Python package is not installed: use a trainer image with it "
            "(pip install finetune-operator[loggers]) or remove logger.",
        )
    for name, value in _PATIENCE[provider].items():
        environ.setdefault(name, value)
    config = read_config(logger, environ)
    unknown = sorted(set(logger.provider_config) - set(type(config).model_fields))
    told = [f"logger.provider_config.{key} has no effect." for key in unknown]
    if isinstance(config, WandbConfig):
        _check_wandb_key(config, environ)
    elif isinstance(config, MlflowConfig):
        told += _check_experiment(config, environ)
    return told


def without_secrets(text: str, environ: Mapping[str, str]) -> str:
    """`text` without the environment's secrets, and without the account in an address."""
    return re.sub(r"//[^/\s@]+@", "//***@", redact(text, environ))


def _check_wandb_key(config: WandbConfig, environ: Mapping[str, str]) -> None:
    """A run online needs a key; wandb would find out after the model was loaded."""
    if environ.get("WANDB_MODE", config.mode) in {"offline", "disabled"}:
        return
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return
    host = urlsplit(environ.get("WANDB_BASE_URL") or config.base_url or _WANDB_CLOUD).hostname
    try:
        known = netrc.netrc(environ.get("NETRC")).authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        known = False
    if not known:
        raise JobError(
            Reason.INVALID_SPEC,
            "logger.provider is wandb and there is no key: give WANDB_API_KEY with workers.env and "
            "valueFrom.secretKeyRef, or write provider_config.mode: offline.",
        )


def _check_experiment(config: MlflowConfig, environ: Mapping[str, str]) -> list[str]:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    name = config.experiment_name
    if not config.tracking_uri:
        raise JobError(
            Reason.INVALID_SPEC,
            "logger.provider is mlflow and no server is named: write provider_config.tracking_uri, or set "
            "MLFLOW_TRACKING_URI with workers.env.",
        )
    if "'" in name:
        raise _experiment_error(f"The name of MLflow's experiment {name} has a quotation mark in it: rename it.")
    try:
        found = MlflowClient(tracking_uri=config.tracking_uri).get_experiment_by_name(name)
    except MlflowException as error:
        sentence = without_secrets(first_line(error), environ)
        if is_outage(config.tracking_uri, int(error.get_http_status_code())):  # type: ignore[no-untyped-call]
            return [f"MLflow does not answer now ({sentence}); the run's metrics are sent when it does."]
        raise JobError(
            Reason.INVALID_SPEC,
            f"MLflow cannot be used ({sentence}): correct logger.provider_config.tracking_uri, or the account in "
            "MLFLOW_TRACKING_TOKEN or MLFLOW_TRACKING_USERNAME.",
        ) from None
    if found is None and not config.create_experiment_if_not_exists:
        raise _experiment_error(
            f"MLflow has no experiment {name}: create it, or write "
            "logger.provider_config.create_experiment_if_not_exists: true."
        )
    if found is not None and found.lifecycle_stage != "active":
        raise _experiment_error(f"MLflow's experiment {name} is deleted: restore it, or name another one.")
    return []


def _experiment_error(sentence: str) -> JobError:
    return JobError(Reason.INVALID_SPEC, sentence)


def is_outage(tracking_uri: str, status: int) -> bool:
    """Whether an error of MLflow's with this HTTP status may pass by itself."""
    remote = urlsplit(tracking_uri).scheme in {"http", "https", "databricks"}
    return remote and (status >= 500 or status in {408, 429})
