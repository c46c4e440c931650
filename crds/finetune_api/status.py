"""A FineTuneJob's status: what the operator writes and people, scripts and GitOps tools read."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from finetune_api.fields import Address, Amount, Word
from finetune_api.outcome import BatchLayout

Sentence = Annotated[str, Field(max_length=4096)]
Time = Annotated[str, Field(max_length=64, json_schema_extra={"format": "date-time"})]
"""RFC 3339, UTC."""
LARGEST_NUMBER = 2**53
Number = Annotated[int, Field(ge=0, le=LARGEST_NUMBER, json_schema_extra={"format": "int64"})]
NodeName = Annotated[str, Field(max_length=253)]
ATTEMPTS_KEPT = 64
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", max_length=64)]


class Phase(StrEnum):
    """Where a job is, for people. Machines read the conditions."""

    PENDING = "Pending"
    QUEUED = "Queued"
    STARTING = "Starting"
    PREPARING = "Preparing"
    RUNNING = "Running"
    PUBLISHING = "Publishing"
    SUSPENDED = "Suspended"
    RETRYING = "Retrying"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


class ConditionType(StrEnum):
    """Conditions of a job. Succeeded is always there; the others only while they are true."""

    SUCCEEDED = "Succeeded"
    RECONCILING = "Reconciling"
    STALLED = "Stalled"
    VERIFIED = "Verified"
    """Only of jobs with output.verify: Unknown until the adapter was opened in a process of its own."""


class StatusModel(BaseModel):
    """Unknown fields are dropped, so that an older program can read what a newer one wrote."""

    model_config = ConfigDict(
        extra="ignore",
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
        serialize_by_alias=True,
        validate_assignment=True,
    )


class Condition(StatusModel):
    """One condition, as Kubernetes' metav1.Condition."""

    type: Annotated[str, Field(min_length=1, max_length=316)] = Field(
        description="type is Succeeded, Reconciling, Stalled or Verified."
    )
    status: Literal["True", "False", "Unknown"] = Field(
        description="status is True, False or Unknown. Succeeded is Unknown until the job has ended."
    )
    reason: Annotated[
        str, Field(min_length=1, max_length=1024, pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$")
    ] = Field(description="reason is one CamelCase word for machines, such as OutOfMemory.")
    message: Annotated[str, Field(max_length=32768)] = Field(
        default="", description="message is one sentence for people: what happened and what to do."
    )
    last_transition_time: Time = Field(description="lastTransitionTime is when status last changed.")
    observed_generation: Number | None = Field(
        default=None, description="observedGeneration is the metadata.generation that the condition is about."
    )


class Attempt(StatusModel):
    """One attempt that has ended."""

    number: Number = Field(description="number of the attempt, from 1.")
    reason: Word | None = Field(default=None, description="reason is why it ended, one CamelCase word.")
    message: Sentence | None = Field(default=None, description="message is why it ended, in one sentence.")
    exit_code: Annotated[int, Field(ge=0, le=255)] | None = Field(
        default=None, description="exitCode of the worker that caused the end."
    )
    counted: bool = Field(default=True, description="counted says whether it counts against backoffLimit.")
    node: NodeName | None = Field(default=None, description="node is where the worker ran that caused the end.")
    start_time: Time | None = Field(default=None, description="startTime of the attempt.")
    completion_time: Time | None = Field(default=None, description="completionTime of the attempt.")


class Progress(StatusModel):
    """How far training is. A figure that is not known is absent."""

    percent: Annotated[int, Field(ge=0, le=100)] | None = Field(default=None, description="percent done, 0 to 100.")
    step: Number | None = Field(default=None, description="step is the number of optimizer steps made.")
    total_steps: Number | None = Field(default=None, description="totalSteps is the number of optimizer steps to make.")
    epoch: Amount | None = Field(default=None, description="epoch is the number of passes made over the data.")
    loss: Amount | None = Field(default=None, description="loss is the training loss per token, in nats, most recent.")
    eval_loss: Amount | None = Field(default=None, description="evalLoss is the validation loss per token, in nats.")
    learning_rate: Amount | None = Field(default=None, description="learningRate of the most recent step.")
    tokens_per_second: Amount | None = Field(
        default=None, description="tokensPerSecond is the speed over all workers, in tokens per second."
    )
    batching: BatchLayout | None = Field(
        default=None,
        description="batching is how rows lie beside each other: SharedPrefix (packed, common beginnings once), "
        "Packed, Padded, or SingleRows (one at a time).",
    )
    eta_seconds: Number | None = Field(default=None, description="etaSeconds is the time left, in seconds.")
    last_updated: Time | None = Field(default=None, description="lastUpdated is when a worker last reported.")


class Dataset(StatusModel):
    """What was read."""

    rows: Number = Field(description="rows of the training data.")
    trainable_tokens: Number = Field(description="trainableTokens is the number of tokens that the loss falls on.")
    truncated_rows: Number = Field(default=0, description="truncatedRows were cut at context_length.")
    dropped_rows: Number = Field(default=0, description="droppedRows had no trainable token left.")
    invalid_rows: Number = Field(default=0, description="invalidRows were malformed and left out.")
    retokenized_rows: Number = Field(
        default=0, description="retokenizedRows had a token across the seam of prompt and answer."
    )
    sha256: Digest | None = Field(default=None, description="sha256 of the training file.")


class Verified(StatusModel):
    """What was checked on the adapter, read back from its address, before the job was called a success."""

    tensors: Number = Field(
        description="tensors in the file: all that the model has, each finite and bit by bit as it was trained."
    )
    moved_tensors: Number = Field(description="movedTensors differ from what training began with.")
    rows: Number = Field(
        description="rows of the training data on which logits were compared; 0 where they were not, because GPUs "
        "share the model."
    )
    difference_from_training: Amount | None = Field(
        default=None,
        description="differenceFromTraining is the largest difference of a logit between the reopened adapter and the "
        "one in memory.",
    )
    difference_from_base: Amount | None = Field(
        default=None,
        description="differenceFromBase is the largest difference of a logit that the reopened adapter makes to the "
        "base model.",
    )


class Adapter(StatusModel):
    """Where the result is."""

    uri: Address = Field(description="uri is the folder or prefix that holds the adapter.")
    format: Literal["peft"] = Field(default="peft", description="format is peft.")
    base_model: Address = Field(description="baseModel is the model that the adapter belongs to.")
    base_model_revision: Annotated[str, Field(max_length=128)] | None = Field(
        default=None, description="baseModelRevision is the commit of the base model."
    )
    sha256: Digest = Field(description="sha256 of manifest.json, which holds every other file's digest.")
    size_bytes: Number = Field(description="sizeBytes is the size of all files together, in bytes.")
    targets: Annotated[str, Field(max_length=512)] | None = Field(
        default=None,
        description="targets are the layers that were trained and the number of parameters, in short: q,k,v,o x 32 "
        "layers: 13.6 M parameters.",
    )
    verified: Verified | None = Field(
        default=None,
        description="verified says what was checked on the adapter, read back from its address, before the job was "
        "called a success; absent where the trainer did not check.",
    )


class Checkpoint(StatusModel):
    """The newest complete checkpoint."""

    uri: Address = Field(description="uri is the folder or prefix that holds the checkpoint.")
    step: Number = Field(description="step is the number of optimizer steps it has.")


class Metrics(StatusModel):
    """Final figures. A figure that was not measured is absent."""

    train_loss: Amount | None = Field(default=None, description="trainLoss per token, in nats, over the last epoch.")
    eval_loss: Amount | None = Field(default=None, description="evalLoss per token, in nats, of the adapter.")
    perplexity: Amount | None = Field(default=None, description="perplexity on the validation data, e to the evalLoss.")
    token_accuracy: Amount | None = Field(
        default=None, description="tokenAccuracy is the share of validation tokens predicted first, 0 to 1."
    )


class FineTuneJobStatus(StatusModel):
    """What has become of a job."""

    observed_generation: Number | None = Field(
        default=None, description="observedGeneration is the metadata.generation that this status is about."
    )
    phase: Phase | None = Field(
        default=None,
        description="phase sums up the conditions for people: Pending, Queued, Starting, Preparing, Running, "
        "Publishing, Suspended, Retrying, Succeeded or Failed.",
    )
    conditions: Annotated[list[Condition], Field(max_length=16)] = Field(
        default_factory=list,
        description="conditions are what machines wait for. Succeeded is Unknown until the job has ended, then True "
        "or False for ever; Reconciling and Stalled are there only while true.",
    )
    attempt: Number | None = Field(default=None, description="attempt is the number of the current attempt, from 1.")
    attempt_start_time: Time | None = Field(
        default=None, description="attemptStartTime is when the current attempt was created."
    )
    attempts: Annotated[list[Attempt], Field(max_length=ATTEMPTS_KEPT)] = Field(
        default_factory=list, description="attempts are those that have ended, the newest 64, oldest first."
    )
    failures: Number | None = Field(
        default=None, description="failures is the number of attempts that count against backoffLimit."
    )
    attempts_without_progress: Number | None = Field(
        default=None,
        description="attemptsWithoutProgress is the number of attempts in a row that were taken away since training "
        "last got further; the job fails when there are too many.",
    )
    resumed_step: Number | None = Field(
        default=None,
        description="resumedStep is the newest optimizer step that an attempt is known to have gone on from.",
    )
    active_seconds: Number | None = Field(
        default=None,
        description="activeSeconds is how long the job was active before activeSince, over all attempts, in seconds.",
    )
    active_since: Time | None = Field(
        default=None, description="activeSince is since when the job is active; absent while it waits or is suspended."
    )
    progress: Progress | None = Field(default=None, description="progress of the current attempt.")
    dataset: Dataset | None = Field(default=None, description="dataset is what was read.")
    adapter: Adapter | None = Field(default=None, description="adapter is the result, once it is complete.")
    checkpoint: Checkpoint | None = Field(
        default=None, description="checkpoint is the newest complete one, from which a next attempt goes on."
    )
    metrics: Metrics | None = Field(default=None, description="metrics are the final figures.")
    start_time: Time | None = Field(default=None, description="startTime is when the first attempt was created.")
    completion_time: Time | None = Field(default=None, description="completionTime is when the job ended.")
