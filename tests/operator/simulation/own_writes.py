"""What an operator wrote itself, it knows: it never acts on an object that is older than its own last write of it."""

from __future__ import annotations

from collections.abc import Sequence

from finetune_operator.names import ATTEMPT_LABEL, JOB_UID_LABEL
from tests.operator.simulation.wire import Call


def witness(call: Call, sent: Sequence[Call]) -> None:
    """A request is about to be carried out.

    Args:
        call: the request.
        sent: what the same process of the operator sent before.

    Raises:
        AssertionError: it follows from an older view of the job than the sender's own last status.
    """
    if call.method == "PUT" and call.place.plural == "finetunejobs":
        last = _last_status(sent, call.body["metadata"]["uid"])
        seen = int(call.body["metadata"]["resourceVersion"])
        assert last is None or last.made is None or seen >= last.made, "a status follows from what was before the last"
    elif call.method == "POST" and call.place.plural in ("configmaps", "pytorchjobs"):
        labels = call.body["metadata"]["labels"]
        last = _last_status(sent, labels[JOB_UID_LABEL])
        known = last.body["status"].get("attempt", 0) if last is not None else 0
        assert int(labels[ATTEMPT_LABEL]) > known, "an attempt is made that was entered in status before"


def _last_status(sent: Sequence[Call], uid: str) -> Call | None:
    """The last status of a job among those requests that was granted, whether or not its answer came."""
    granted = (call for call in reversed(sent) if call.method == "PUT" and call.made is not None)
    return next((call for call in granted if call.body["metadata"]["uid"] == uid), None)
