"""Why an object of an attempt could not be created: the condition's reason, and a sentence that names who can help."""

from __future__ import annotations

import re
from typing import NamedTuple

from finetune_api.outcome import Reason
from finetune_operator.errors import ApiError, Forbidden, Invalid, NotFound, Unavailable
from finetune_operator.policy.reasons import OperatorReason

PYTORCH_JOB = "PyTorchJob"
_WEBHOOK = re.compile(r'webhook "([^"]{1,253})"')


class Refusal(NamedTuple):
    """Why, in one word and in one sentence."""

    reason: str
    sentence: str
    final: bool = False
    """Only a change of the job helps."""
    by_hand: bool = False
    """Only somebody's hand helps, which is not told of: nothing comes or goes by itself."""


def refusal(error: ApiError) -> Refusal | None:
    """Why the object of kind `error.kind` could not be created.

    None when nothing in particular hinders: the API server did not answer, or the namespace is on its way out.
    """
    kind, text = error.kind, error.message
    if isinstance(error, Invalid):
        sentence = f"The API server refuses the {kind} of this job: {text}. Change workers, or report it."
        # Webhooks and admission policies object by rules of their own, and those may be changed as well.
        return Refusal(Reason.INVALID_SPEC, sentence, final=True, by_hand=True)
    if isinstance(error, NotFound) and kind == PYTORCH_JOB:
        return Refusal(
            OperatorReason.TRAINING_OPERATOR_MISSING,
            "The cluster has no PyTorchJob kind: have Kubeflow's training operator (v1) installed, and the job starts "
            "by itself.",
            by_hand=True,
        )
    if isinstance(error, Forbidden) and "being terminated" not in text:
        sentence = (
            f"The {kind} of this job may not be created ({text}): {_permission(text)}; the job starts by itself then."
        )
        # Of a quota something is free again as soon as another job ends.
        return Refusal(OperatorReason.CREATION_FORBIDDEN, sentence, by_hand="quota" not in text)
    if isinstance(error, Unavailable) and "webhook" in text:
        return _without_answer(kind, text)
    return None


def _permission(text: str) -> str:
    webhook = _WEBHOOK.search(text)
    if "quota" in text:
        return "ask for less, or have the quota raised"
    if webhook is not None:
        return f"change what the admission webhook {webhook[1]} objects to, or have it allowed"
    if "cannot create resource" in text:
        return "the operator's role lacks this right, so have its installation renewed"
    return "change what is objected to, or have it allowed"


def _without_answer(kind: str, text: str) -> Refusal:
    webhook = _WEBHOOK.search(text)
    name = webhook[1] if webhook is not None else ""
    if kind == PYTORCH_JOB and (not name or "training-operator" in name):
        return Refusal(
            OperatorReason.TRAINING_OPERATOR_UNAVAILABLE,
            f"Kubeflow's training operator, which is asked about PyTorchJobs, does not answer ({text}): the job starts "
            "by itself once it does.",
        )
    who = "Kueue" if "kueue" in text else f"The admission webhook {name or 'of the cluster'}"
    return Refusal(
        OperatorReason.ADMISSION_UNAVAILABLE,
        f"{who}, which is asked about {kind}s, does not answer ({text}): whoever runs it can help, and the job starts "
        "by itself once it does.",
    )
