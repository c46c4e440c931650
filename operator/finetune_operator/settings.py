"""What a platform team sets once for all jobs: environment variables FINETUNE_OPERATOR_<FIELD IN CAPITALS>.

Maps and objects are given as JSON, lists of words separated by commas; empty counts as not given, `null` as none. A
variable with that prefix that is no setting is refused at start, so a misspelled one is not ignored in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from finetune_api.fields import LabelMap
from finetune_api.storage_uri import Scheme, parse
from finetune_api.workers import Quantity, Resources
from finetune_operator.names import CA_CONFIG_MAP, MANAGER, TLS_SECRET

PREFIX = "FINETUNE_OPERATOR_"


class OperatorSettings(BaseSettings):
    """The operator's settings."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, extra="forbid", frozen=True, env_ignore_empty=True, env_parse_none_str="null"
    )

    namespace: str = "finetune-system"
    """Namespace that the operator itself runs in."""
    watch_namespaces: Annotated[tuple[str, ...], NoDecode] = ()
    """Namespaces whose jobs are looked after; empty for all of them."""

    trainer_image: str = "finetune-trainer:0.1.0"
    """Image of jobs that name none."""
    default_output_uri: str | None = None
    """`output.uri` of jobs that name none. Without it such a job is refused."""
    object_store_secret: str | None = None
    """Secret, in each job's namespace, for jobs without `secrets.objectStore`. Where it is missing they go without."""
    hugging_face_secret: str | None = None
    """Likewise for jobs without `secrets.huggingFace`; it has the token below the key `token`."""
    default_resources: Resources | None = None
    """CPU and memory per node of jobs that ask for none."""
    accelerator_node_selectors: dict[str, LabelMap] = Field(default_factory=dict)
    """LLMForge's accelerator_type -> labels of the machines that have it."""
    queue_name: str | None = None
    """Kueue queue of jobs that carry no queue label."""
    cache_claim: str | None = None
    """PersistentVolumeClaim, in each job's namespace, that keeps models for jobs that name no cache."""
    shared_memory_size: Quantity | None = None
    """Size of /dev/shm. Default: what the container's memory limit leaves."""
    scratch_size: Quantity | None = None
    """Most that a pod may write to its node's disk. Default: no limit of ours."""
    pod_user_id: int | None = 1000
    """User and group that trainers run as. `null`: the cluster chooses, as OpenShift does."""
    termination_grace_seconds: int = Field(default=120, ge=10)
    """Time a pod has between SIGTERM and SIGKILL, to write a checkpoint (seconds)."""

    progress_url: str | None = None
    """Where trainers post their progress, e.g. https://finetune-operator.finetune-system.svc:8443. Default: nowhere,
    and status then shows no progress."""
    progress_host: str = ""
    """Address that the progress endpoint listens on; empty for all."""
    progress_port: int = 8443
    progress_audience: str = MANAGER
    """Audience of the tokens that trainers prove themselves with."""
    tls_secret: str = TLS_SECRET
    ca_config_map: str = CA_CONFIG_MAP
    metrics_port: int = 8080
    health_port: int = 8081

    concurrency: int = Field(default=16, ge=1)
    """Jobs that are reconciled at the same time."""
    resync_seconds: float = Field(default=300, gt=0)
    """Time between two looks at everything, which finds what no event told (seconds)."""
    status_interval_seconds: float = Field(default=5, ge=0)
    """Least time between two status writes of one job that only report progress (seconds)."""
    retry_base_seconds: float = Field(default=10, ge=0)
    """Wait before the second attempt; doubles with every further one (seconds)."""
    retry_limit_seconds: float = Field(default=360, ge=0)
    """Longest wait between two attempts (seconds)."""
    group_end_seconds: float = Field(default=30, ge=0)
    """How long the other workers of an attempt may take to end after the first has failed (seconds)."""
    pods_expected_seconds: float = Field(default=30, ge=0)
    """After this long without pods the job's status says that the training operator makes none (seconds)."""
    verification_seconds: int = Field(default=7200, ge=1)
    """How long the Job of `output.verify` may take, its waiting for a machine included (seconds)."""

    @field_validator("watch_namespaces", mode="before")
    @classmethod
    def _words(cls, value: Any) -> Any:
        return tuple(word.strip() for word in value.split(",") if word.strip()) if isinstance(value, str) else value

    @field_validator("default_output_uri")
    @classmethod
    def _can_hold_results(cls, value: str | None) -> str | None:
        if value is not None and parse(value).scheme not in (Scheme.S3, Scheme.PVC):
            raise ValueError(f"{value} cannot hold the results of pods: write s3://bucket/prefix or pvc://claim/path.")
        return value

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> OperatorSettings:
        """The settings in the environment, which pydantic reads itself.

        Raises:
            ValueError: a variable has no valid value, or is no setting.
        """
        known = {f"{PREFIX}{name.upper()}" for name in cls.model_fields}
        unknown = sorted(name for name in environ if name.startswith(PREFIX) and name not in known)
        if unknown:
            raise ValueError(f"{unknown[0]} is no setting of the operator: correct or remove it.")
        return cls()
