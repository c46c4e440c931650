"""What is said of a pod whose end the cluster explains: the same for a worker and for the pod of a verification."""

from __future__ import annotations

from finetune_operator.policy.evictions import DiskLimit
from finetune_operator.policy.observed import PodView
from finetune_operator.policy.start_errors import image_is_at_fault

_FOREIGN_TEXT_LIMIT = 400
"""Characters of a foreign text that are quoted in our sentence."""


def out_of_memory(who: str, pod: PodView, then: str) -> str:
    """A container of `pod` was killed for want of memory. The kernel does not say whose want: its limit's, its node's.

    Args:
        who: the subject of the sentence.
        pod: the pod.
        then: how to go on with what has been changed.
    """
    if pod.memory_is_its_own:
        return (
            f"{who} used more main memory than its limit and was killed: raise workers.resources.limits.memory, or "
            f"lower context_length, {then}."
        )
    node = f"its node {pod.node}" if pod.node else "its node"
    if pod.memory_limit is None:
        return (
            f"{who} was killed because {node} had no more main memory: set workers.resources.requests.memory, and "
            f"limits.memory to the same, to what it needs, {then}."
        )
    return (
        f"{who} was killed for want of main memory, at its limit of {pod.memory_limit} or because {node} had no more: "
        f"raise workers.resources.limits.memory, and set requests.memory to the same, {then}."
    )


def disk_full(who: str, limit: DiskLimit, then: str) -> str:
    """A pod was evicted for going over a limit of its own; `who` and `then` as above."""
    return f"{who} wrote more than {limit.size} to {limit.where} and was evicted for it: {limit.cure}, {then}."


def never_started(who: str, pod: PodView) -> str:
    """The program that the container of `pod` is made for did not come to run."""
    if pod.init_container is not None:
        return (
            f"{who} could not start the trainer: the init container {quoted(pod.init_container)} failed "
            f"({_how(pod)}). It is not this operator's: look at who adds it to pods, such as a service mesh."
        )
    if image_is_at_fault(pod.ended_message):
        return (
            f"{who} could not start the trainer ({quoted(pod.ended_message)}): check that workers.image is a trainer "
            "of this operator."
        )
    node = f"the node {pod.node}" if pod.node else "its node"
    return (
        f"{who} could not start the trainer, which {node} may be the cause of ({_how(pod)}): if it comes back, have "
        "the node's GPU driver and container runtime looked at."
    )


def quoted(text: str) -> str:
    """A foreign text on one line, and not too long for a sentence of ours."""
    line = " ".join(text.split())
    return line if len(line) <= _FOREIGN_TEXT_LIMIT else line[: _FOREIGN_TEXT_LIMIT - 1] + "…"


def _how(pod: PodView) -> str:
    return quoted(": ".join(text for text in (pod.ended_reason, pod.ended_message) if text)) or "nobody says why"
