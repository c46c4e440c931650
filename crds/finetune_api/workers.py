"""Where a job runs: machines, image, secrets, and the place of its output. Kubernetes' own names throughout."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, WithJsonSchema

from finetune_api.affinity import Affinity
from finetune_api.fields import Address, KubernetesModel, LabelKey, LabelMap, Name, Word
from finetune_api.untyped import INT_OR_TEXT, one_of_several

_QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti|P|Pi|E|Ei)?$"
_QUANTITY_LIMIT = 2**53
"""Of one written as a number: the largest that every reader of JSON keeps as it is."""

Quantity = Annotated[
    Annotated[int, Field(ge=0, le=_QUANTITY_LIMIT)] | Annotated[str, Field(pattern=_QUANTITY, max_length=32)],
    one_of_several("a quantity such as 4, 500m or 64Gi"),
    WithJsonSchema({**INT_OR_TEXT, "minimum": 0, "maximum": _QUANTITY_LIMIT, "pattern": _QUANTITY, "maxLength": 32}),
]

Quantities = Annotated[dict[LabelKey, Quantity], Field(max_length=32)]


class Resources(KubernetesModel):
    """Requests and limits of one worker's container."""

    requests: Quantities | None = Field(
        default=None,
        description="requests is what the scheduler reserves per node of the job: cpu, memory, ephemeral-storage or "
        "an extended resource to a quantity. Default: the limits.",
    )
    limits: Quantities | None = Field(
        default=None,
        description="limits is what the container may use at most, to a quantity. GPUs are asked for with "
        "workers.gpusPerNode, not here. Default: none.",
    )


class Toleration(KubernetesModel):
    """A Kubernetes toleration."""

    key: LabelKey | None = Field(
        default=None, description="key of the taint; absent with operator Exists matches every taint."
    )
    operator: Literal["Exists", "Equal"] | None = Field(
        default=None, description="operator is Equal or Exists. Default: Equal."
    )
    value: Annotated[str, Field(max_length=63)] | None = Field(default=None, description="value of the taint.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        default=None, description="effect of the taint; absent matches all effects."
    )
    toleration_seconds: int | None = Field(
        default=None,
        ge=0,
        le=2**31 - 1,
        description="tolerationSeconds is how long a NoExecute taint is borne, in seconds. Default: for ever.",
    )


class LocalReference(KubernetesModel):
    """An object of the job's own namespace."""

    name: Name = Field(description="name of the object, in the job's own namespace.")


class KeyReference(KubernetesModel):
    """One key of an object of the job's own namespace."""

    name: Name = Field(description="name of the object, in the job's own namespace.")
    key: Name = Field(description="key whose value is taken.")
    optional: bool | None = Field(
        default=None, description="optional starts the worker even when object or key is absent. Default: false."
    )


class FieldReference(KubernetesModel):
    """A field of the worker's own pod."""

    field_path: Word = Field(description="fieldPath is the field, such as metadata.name or status.podIP.")


class EnvironmentSource(KubernetesModel):
    """Where an environment variable's value comes from: exactly one of these."""

    secret_key_ref: KeyReference | None = Field(default=None, description="secretKeyRef takes a key of a Secret.")
    config_map_key_ref: KeyReference | None = Field(
        default=None, description="configMapKeyRef takes a key of a ConfigMap."
    )
    field_ref: FieldReference | None = Field(default=None, description="fieldRef takes a field of the pod.")


class EnvironmentVariable(KubernetesModel):
    """One environment variable of the trainer."""

    name: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] = Field(
        description="name of the variable."
    )
    value: Annotated[str, Field(max_length=4096)] | None = Field(
        default=None, description="value as plain text, at most 4096 characters. Tokens and passwords are refused."
    )
    value_from: EnvironmentSource | None = Field(
        default=None, description="valueFrom takes the value from a Secret, a ConfigMap or the pod."
    )


class ClaimReference(KubernetesModel):
    """A PersistentVolumeClaim of the job's own namespace."""

    claim_name: Name = Field(description="claimName is the name of the PersistentVolumeClaim.")
    read_only: bool | None = Field(default=None, description="readOnly mounts it for reading. Default: false.")


class EmptyDirectory(KubernetesModel):
    """Space on the node that goes with the pod."""

    medium: Literal["", "Memory"] | None = Field(
        default=None, description="medium is Memory for a file system in memory. Default: the node's disk."
    )
    size_limit: Quantity | None = Field(default=None, description="sizeLimit is the most it may hold, as a quantity.")


class SecretVolume(KubernetesModel):
    """A Secret as files."""

    secret_name: Name = Field(description="secretName is the name of the Secret.")


class Volume(KubernetesModel):
    """A volume and where the trainer sees it: exactly one of the four kinds."""

    name: Annotated[str, Field(max_length=63, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")] = Field(
        description="name of the volume, a DNS label of at most 63 characters, unique in the list."
    )
    mount_path: Annotated[str, Field(max_length=1024, pattern=r"^/[^:]*$")] = Field(
        description="mountPath is the absolute path at which the trainer sees it."
    )
    sub_path: Annotated[str, Field(max_length=1024)] | None = Field(
        default=None, description="subPath is the folder inside the volume that is mounted. Default: its root."
    )
    read_only: bool | None = Field(default=None, description="readOnly mounts it for reading. Default: false.")
    persistent_volume_claim: ClaimReference | None = Field(
        default=None, description="persistentVolumeClaim mounts a claim. pvc:// addresses mount theirs by themselves."
    )
    config_map: LocalReference | None = Field(default=None, description="configMap mounts a ConfigMap as files.")
    secret: SecretVolume | None = Field(default=None, description="secret mounts a Secret as files.")
    empty_dir: EmptyDirectory | None = Field(
        default=None, description="emptyDir is space on the node that goes with the pod."
    )


class Cache(KubernetesModel):
    """Where models and tokenized data are kept between attempts."""

    persistent_volume_claim: ClaimReference | None = Field(
        default=None,
        description="persistentVolumeClaim keeps them on a claim. One that several nodes mount must be ReadWriteMany.",
    )
    size_limit: Quantity | None = Field(
        default=None, description="sizeLimit bounds the node's disk space that is used when there is no claim."
    )


class Workers(KubernetesModel):
    """The machines of one attempt: nodes x gpusPerNode processes train together."""

    nodes: int = Field(
        default=1, ge=1, le=1024, description="nodes is the number of pods that train together, 1 to 1024. Default: 1."
    )
    gpus_per_node: int = Field(
        default=1,
        ge=0,
        le=64,
        description="gpusPerNode is the number of GPUs and of processes per node, 0 to 64; 0 trains on CPU with one "
        "process per node. Default: 1.",
    )
    gpu_resource_name: Word = Field(
        default="nvidia.com/gpu",
        description="gpuResourceName is the extended resource that GPUs are asked for by. Default: nvidia.com/gpu.",
    )
    image: Annotated[str, Field(min_length=1, max_length=1024)] | None = Field(
        default=None, description="image is the trainer's container image. Default: the operator's own trainer image."
    )
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = Field(
        default=None, description="imagePullPolicy is Always, IfNotPresent or Never. Default: Kubernetes' own."
    )
    image_pull_secrets: Annotated[list[LocalReference], Field(max_length=16)] = Field(
        default_factory=list, description="imagePullSecrets are the Secrets that the image is pulled with. Default: []."
    )
    resources: Resources | None = Field(
        default=None, description="resources are CPU and memory of one node's container. Default: the operator's."
    )
    node_selector: LabelMap = Field(
        default_factory=dict, description="nodeSelector gives labels that a machine must carry. Default: {}."
    )
    tolerations: Annotated[list[Toleration], Field(max_length=64)] = Field(
        default_factory=list, description="tolerations lets the pods onto tainted machines. Default: []."
    )
    affinity: Affinity | None = Field(
        default=None, description="affinity is a Kubernetes Affinity, passed on as it is. Default: none."
    )
    priority_class_name: Name | None = Field(
        default=None, description="priorityClassName is the PriorityClass of the pods. Default: the cluster's."
    )
    runtime_class_name: Name | None = Field(
        default=None, description="runtimeClassName is the RuntimeClass of the pods. Default: the cluster's."
    )
    service_account_name: Name | None = Field(
        default=None,
        description="serviceAccountName is the account whose cloud identity reads and writes the object store. No "
        "Kubernetes credentials of it reach the pods. Default: default.",
    )
    env: Annotated[list[EnvironmentVariable], Field(max_length=128)] = Field(
        default_factory=list,
        description="env are environment variables of the trainer, at most 128. Tokens and passwords are refused as "
        "plain values: use secrets, or valueFrom.secretKeyRef. Default: [].",
    )
    volumes: Annotated[list[Volume], Field(max_length=32)] = Field(
        default_factory=list, description="volumes are further volumes that the trainer sees, at most 32. Default: []."
    )
    cache: Cache | None = Field(
        default=None,
        description="cache is where models and tokenized data are kept. Default: the node's disk, gone with the pod.",
    )

    @property
    def world_size(self) -> int:
        """Number of processes that train together."""
        return self.nodes * max(self.gpus_per_node, 1)


class Output(KubernetesModel):
    """Where the results go."""

    uri: Address = Field(
        description="uri is where adapter, checkpoints and report are written: s3://bucket/prefix, pvc://claim/path, "
        "or a local folder. In a cluster the job's own folder below it is <namespace>/<name>/<first 8 of uid>. "
        "hf://owner/name[@branch] pushes the adapter to the top of a model repository of the Hub, which is made "
        "private where there is none, and keeps the rest on a branch of the job's own; the token of "
        "secrets.huggingFace must be allowed to write there."
    )
    golden: bool = Field(
        default=True,
        description="golden puts golden.jsonl into the adapter: about ten conversations of the validation data (of the "
        "training data where there are none) with what the trained model answers, against which `finetune verify` "
        "holds a server. false keeps the data out of the adapter. Default: true.",
    )
    merged: bool = Field(
        default=False,
        description="merged writes the whole model with the adapter merged into it to `merged`, beside the adapter. "
        "Default: false.",
    )
    verify: bool = Field(
        default=False,
        description="verify starts a Job after training that opens the adapter at its address in a fresh process, as "
        "`finetune verify` does; the condition Verified says what it found. Default: false.",
    )


class HuggingFaceSecret(KubernetesModel):
    """The Secret with a Hugging Face token."""

    name: Name = Field(description="name of the Secret, in the job's own namespace.")
    key: Name = Field(default="token", description="key of the Secret that holds the token. Default: token.")


class Secrets(KubernetesModel):
    """Credentials, by reference only."""

    hugging_face: HuggingFaceSecret | None = Field(
        default=None,
        description="huggingFace is the Secret whose token reads gated models and private datasets (HF_TOKEN). "
        "Default: the operator's, if it has one.",
    )
    object_store: LocalReference | None = Field(
        default=None,
        description="objectStore is the Secret whose keys become the variables that read and write s3:// addresses: "
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and where it has them AWS_SESSION_TOKEN, AWS_REGION, "
        "AWS_DEFAULT_REGION, AWS_ENDPOINT_URL and AWS_ENDPOINT_URL_S3. Other keys are not read. "
        "Default: the operator's, if it has one.",
    )
