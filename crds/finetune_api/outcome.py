"""A trainer's last words: how an attempt ended, in a form that survives the pod.

Operator and trainer share no memory, only an exit code, a termination message of at most 4 096 bytes and the
progress that was posted in between. All three are defined here, so neither side guesses what the other meant.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

Words = TypeVar("Words", bound=BaseModel)

TERMINATION_MESSAGE_LIMIT_BYTES = 4096
"""What the kubelet keeps of a container's termination message file."""

MESSAGE_ROOM_BYTES = 512
"""What addresses leave for the sentence: it says what to do, and an address can be found again."""

PROGRESS_BODY_LIMIT_BYTES = 64 * 1024
"""Largest progress report that is read; a real one has a few hundred bytes."""


class Reason(StrEnum):
    """Why an attempt ended without an adapter. The value is the condition reason that users see."""

    INVALID_SPEC = "InvalidSpec"
    DATA_INVALID = "DataInvalid"
    MODEL_NOT_FOUND = "ModelNotFound"
    MODEL_ACCESS_DENIED = "ModelAccessDenied"
    MODEL_UNSUPPORTED = "ModelUnsupported"
    CONTEXT_TOO_LONG = "ContextTooLong"
    OUT_OF_MEMORY = "OutOfMemory"
    LOSS_DIVERGED = "LossDiverged"
    STORAGE_ACCESS_DENIED = "StorageAccessDenied"
    STORAGE_NOT_FOUND = "StorageNotFound"
    DISK_FULL = "DiskFull"
    WORLD_SIZE_MISMATCH = "WorldSizeMismatch"
    CHECKPOINT_MISMATCH = "CheckpointMismatch"
    OUTPUT_CONFLICT = "OutputConflict"
    ADAPTER_UNPROVEN = "AdapterUnproven"

    TERMINATED = "Terminated"
    HUB_UNAVAILABLE = "HubUnavailable"
    STORAGE_UNAVAILABLE = "StorageUnavailable"
    PEER_FAILED = "PeerFailed"
    PACKS_TOO_LARGE = "PacksTooLarge"
    INTERNAL_ERROR = "InternalError"


EXIT_CODES: dict[Reason, int] = {
    Reason.INVALID_SPEC: 10,
    Reason.DATA_INVALID: 11,
    Reason.MODEL_NOT_FOUND: 12,
    Reason.MODEL_ACCESS_DENIED: 13,
    Reason.MODEL_UNSUPPORTED: 14,
    Reason.CONTEXT_TOO_LONG: 15,
    Reason.OUT_OF_MEMORY: 16,
    Reason.LOSS_DIVERGED: 17,
    Reason.STORAGE_ACCESS_DENIED: 18,
    Reason.STORAGE_NOT_FOUND: 19,
    Reason.DISK_FULL: 20,
    Reason.WORLD_SIZE_MISMATCH: 21,
    Reason.CHECKPOINT_MISMATCH: 22,
    Reason.OUTPUT_CONFLICT: 23,
    Reason.ADAPTER_UNPROVEN: 24,
    # 128 and above: the world's fault. 143 is 128 + SIGTERM, what the kubelet sends when it wants the node back.
    Reason.TERMINATED: 143,
    Reason.HUB_UNAVAILABLE: 201,
    Reason.STORAGE_UNAVAILABLE: 202,
    Reason.PEER_FAILED: 203,
    Reason.INTERNAL_ERROR: 204,
    Reason.PACKS_TOO_LARGE: 205,
}
"""Exit code of a trainer process per reason. 1-127 are the user's (permanent), 128 and above the world's (retry)."""

FIRST_RETRYABLE_EXIT_CODE = 128


def is_retryable(exit_code: int) -> bool:
    """Whether an attempt that ended with `exit_code` may succeed when it is simply started again.

    A code below 0 is no program's own: some runtimes write it for one that a signal ended.
    """
    return not 0 <= exit_code < FIRST_RETRYABLE_EXIT_CODE


class _Wire(BaseModel):
    """Base of what travels between processes: unknown fields are dropped, so that old readers meet new writers."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True, serialize_by_alias=True)


class VerifiedResult(_Wire):
    """What was checked on the adapter, read back from its address, before the job was called a success."""

    tensors: int = Field(ge=1)
    """Tensors in the file: all that the model has, each finite and bit by bit as it was trained."""
    moved_tensors: int = Field(alias="movedTensors", ge=1)
    """Those that differ from what training began with."""
    rows: int = Field(ge=0)
    """Rows of the training data on which logits were compared; 0 where they were not (a model that GPUs share)."""
    difference_from_training: float | None = Field(default=None, alias="differenceFromTraining", allow_inf_nan=False)
    """Largest difference of a logit between the reopened adapter and the one in memory."""
    difference_from_base: float | None = Field(default=None, alias="differenceFromBase", allow_inf_nan=False)
    """Largest difference of a logit that the reopened adapter makes to the base model."""


class AdapterResult(_Wire):
    """Where the adapter is and how to know it is whole."""

    uri: str = Field(max_length=2048)
    """Folder or `s3://` prefix that holds adapter_config.json; the manifest in it is written last."""
    format: Literal["peft"] = "peft"
    base_model: str = Field(alias="baseModel", max_length=512)
    base_model_revision: str | None = Field(default=None, alias="baseModelRevision", max_length=128)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Digest of manifest.json, which in turn holds the digest of every other file."""
    size_bytes: int = Field(alias="sizeBytes", ge=0)
    targets: str | None = Field(default=None, max_length=512)
    """The layers it is on and its size, in short; the report has them in full."""
    verified: VerifiedResult | None = None
    """Absent from adapters of trainers that did not check."""


class DatasetResult(_Wire):
    """What was read, in rows and tokens."""

    rows: int = Field(ge=0)
    trainable_tokens: int = Field(alias="trainableTokens", ge=0)
    truncated_rows: int = Field(default=0, alias="truncatedRows", ge=0)
    dropped_rows: int = Field(default=0, alias="droppedRows", ge=0)
    invalid_rows: int = Field(default=0, alias="invalidRows", ge=0)
    retokenized_rows: int = Field(default=0, alias="retokenizedRows", ge=0)
    sha256: str | None = Field(default=None, max_length=64)
    """Digest of the training file's bytes."""


class MetricsResult(_Wire):
    """Final figures. A figure that was not measured is absent, never zero."""

    train_loss: float | None = Field(default=None, alias="trainLoss", allow_inf_nan=False)
    eval_loss: float | None = Field(default=None, alias="evalLoss", allow_inf_nan=False)
    perplexity: float | None = Field(default=None, allow_inf_nan=False)
    token_accuracy: float | None = Field(default=None, alias="tokenAccuracy", allow_inf_nan=False)


class CheckpointResult(_Wire):
    """The newest complete checkpoint."""

    uri: str = Field(max_length=2048)
    step: int = Field(ge=0)


_CUT_SENTENCE = re.compile(
    r'(?P<whole>\{.*"message":"(?:[^"\\]|\\u[0-9a-fA-F]{4}|\\[^u])*)(?:(?P<end>")|\\(?:u[0-9a-fA-F]{0,3})?)?', re.DOTALL
)
"""A JSON object that ends within or right after its sentence, which is its last field, and maybe within an escape."""


def parse_cut(kind: type[Words], data: bytes | str, *, before_sentence: str) -> Words | None:
    """The last words in `data`, or None when they are no `kind`. A sentence that was cut off ends with "…".

    A kubelet keeps 4 096 bytes of a container's message, and of all containers of a pod together 12 KiB: where
    somebody adds sidecars, each may keep less than what was written.

    Args:
        kind: what is looked for; its sentence is called message.
        data: the text.
        before_sentence: a field that is always written, before the sentence. Who did not write it may have lost more
            than words.
    """
    if len(data) > TERMINATION_MESSAGE_LIMIT_BYTES:
        return None
    found = _strictly(kind, data)
    if found is None:
        text = data if isinstance(data, str) else data.decode(errors="replace")
        cut = _CUT_SENTENCE.fullmatch(text)
        if cut is not None:
            found = _strictly(kind, cut["whole"] + '"}' if cut["end"] else cut["whole"].rstrip("\ufffd") + '…"}')
        found = found if found is not None and before_sentence in found.model_fields_set else None
    return found


def _strictly(kind: type[Words], data: bytes | str) -> Words | None:
    """Without the conversions that pydantic makes otherwise: another program's "yes" is not our true."""
    try:
        return kind.model_validate_json(data, strict=True)
    except ValidationError:
        return None


def sayable(message: Any) -> Any:
    """Last words must not fail on their own text: odd file names bring lone surrogates, odd data any length."""
    if not isinstance(message, str):
        return message
    return message.encode(errors="replace").decode()[:TERMINATION_MESSAGE_LIMIT_BYTES]


class TerminationMessage(_Wire):
    """What one attempt leaves behind, as JSON in the container's termination message."""

    version: Literal[1] = 1
    succeeded: bool
    reason: Reason | None = None
    """Why it failed; absent after success."""
    collateral: bool = False
    """True when this pod failed only because another one did: its reason must not outweigh the other's."""
    rank: int | None = Field(default=None, ge=0)
    adapter: AdapterResult | None = None
    dataset: DatasetResult | None = None
    metrics: MetricsResult | None = None
    checkpoint: CheckpointResult | None = None
    # Last, so that a reader of a text that was cut off has lost nothing but words.
    message: Annotated[str, BeforeValidator(sayable)] = ""
    """One sentence for the person who applied the job."""

    def to_bytes(self) -> bytes:
        """UTF-8 JSON of at most TERMINATION_MESSAGE_LIMIT_BYTES.

        A message too long for that is shortened with "…". Where addresses leave it no room, the checkpoint and then
        the adapter are left out.
        """
        shortened = self
        data = _json(shortened)
        for address in ("checkpoint", "adapter"):
            room = TERMINATION_MESSAGE_LIMIT_BYTES - len(_json(shortened.model_copy(update={"message": ""})))
            if len(data) > TERMINATION_MESSAGE_LIMIT_BYTES and room < MESSAGE_ROOM_BYTES:
                shortened = shortened.model_copy(update={address: None})
                data = _json(shortened)
        message = self.message
        while len(data) > TERMINATION_MESSAGE_LIMIT_BYTES and message:
            message = message[: len(message) * 3 // 4]
            data = _json(shortened.model_copy(update={"message": message + "…"}))
        return data

    @classmethod
    def parse(cls, data: bytes | str) -> Self | None:
        """The message in `data`, or None when it is not one: another program's last words, or two that contradict.

        Of a text that was cut off within its sentence the rest is read.
        """
        found = parse_cut(cls, data, before_sentence="collateral")
        return None if found is not None and found.succeeded and (found.reason or found.collateral) else found


def _json(message: TerminationMessage) -> bytes:
    return message.model_dump_json(exclude_none=True).encode()


class Metric(_Wire):
    """One named figure of a progress report; values travel as text, as transformers' KubeflowCallback sends them."""

    name: str = Field(max_length=128)
    value: str = Field(max_length=128)


class TrainerStatus(_Wire):
    """Progress of a running attempt, in the protocol of Kubeflow Trainer's runtime status endpoint."""

    progress_percentage: Annotated[int, Field(ge=0, le=100)] | None = Field(default=None, alias="progressPercentage")
    estimated_remaining_seconds: Annotated[int, Field(ge=0)] | None = Field(
        default=None, alias="estimatedRemainingSeconds"
    )
    metrics: list[Metric] = Field(default_factory=list, max_length=256)
    last_updated_time: str = Field(alias="lastUpdatedTime", max_length=64)
    """RFC 3339, UTC."""

    def number(self, name: str) -> float | None:
        """The metric called `name` as a finite number, or None when it is absent or is none."""
        for metric in self.metrics:
            if metric.name == name:
                try:
                    value = float(metric.value)
                except ValueError:
                    return None
                return value if abs(value) != float("inf") and value == value else None
        return None

    def text(self, name: str) -> str | None:
        """The metric called `name` as it was sent."""
        return next((metric.value for metric in self.metrics if metric.name == name), None)


class ProgressReport(_Wire):
    """Body of a progress POST."""

    trainer_status: TrainerStatus = Field(alias="trainerStatus")


class BatchLayout(StrEnum):
    """How rows lie beside each other in what goes through the model at once."""

    SHARED_PREFIX = "SharedPrefix"
    """In packs, without padding, what rows begin with alike only once."""
    PACKED = "Packed"
    """In packs, each row whole."""
    PADDED = "Padded"
    """A row each, filled up to the longest."""
    SINGLE_ROWS = "SingleRows"
    """One row at a time, for models that compute a row otherwise when others are beside it."""


class ProgressMetric(StrEnum):
    """Names of the metrics in our own reports. A stock KubeflowCallback sends some of them and others besides."""

    PHASE = "phase"
    """Preparing, Running or Publishing."""
    STEP = "current_step"
    TOTAL_STEPS = "total_steps"
    EPOCH = "current_epoch"
    LOSS = "loss"
    EVAL_LOSS = "eval_loss"
    LEARNING_RATE = "learning_rate"
    TOKENS_PER_SECOND = "tokens_per_second"
    BATCHING = "batching"
    """A `BatchLayout`."""
