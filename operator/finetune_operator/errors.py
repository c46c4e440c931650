"""What the operator can be told by the API server, and what only a person can put right.

The client's own exceptions stay in `cluster`: everything else decides by these, so it needs no Kubernetes library.
"""

from __future__ import annotations


class ApiError(Exception):
    """The API server refused a request, or did not answer.

    Args:
        status: HTTP status; None when there was no answer.
        reason: the server's word for it (`AlreadyExists`, `Conflict`, `Forbidden`, …), or "" where it gave none.
        message: the server's sentence.
        retry_after_seconds: how long the server wants to be left alone (seconds).
    """

    def __init__(
        self,
        status: int | None,
        reason: str,
        message: str,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message or reason or f"HTTP status {status}")
        self.status = status
        self.reason = reason
        self.message = message
        self.retry_after_seconds = retry_after_seconds
        self.kind = ""
        """Kind of the object that could not be created, where one was to be."""


class NotFound(ApiError):  # noqa: N818  HTTP's own name, as for those below
    """404: the object is not there, or its kind or namespace is not."""


class Conflict(ApiError):  # noqa: N818
    """409: it exists already, or it was changed since it was read. Read again and decide anew."""


class Forbidden(ApiError):  # noqa: N818
    """401 or 403: the operator lacks a permission, an admission plugin refused, or the namespace is going away."""


class Invalid(ApiError):  # noqa: N818
    """400, 413 or 422: the object itself is refused; the same request will never succeed."""


class Unavailable(ApiError):  # noqa: N818
    """429, 5xx or no answer: the same request may succeed later. A write may have been carried out all the same."""


def api_error(
    status: int | None, reason: str = "", message: str = "", retry_after_seconds: float | None = None
) -> ApiError:
    """The exception for an answer with `status`, or for none (None)."""
    if status is None or status == 429 or status >= 500:
        kind: type[ApiError] = Unavailable
    else:
        kind = _KINDS.get(status, ApiError)
    return kind(status, reason, message, retry_after_seconds)


_KINDS: dict[int, type[ApiError]] = {
    400: Invalid,
    401: Forbidden,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    413: Invalid,
    422: Invalid,
}


class HistoryRewound(Exception):  # noqa: N818  what has happened
    """The API server has an older state than it once had, as after its store was restored from a backup: nothing that
    is known, and no watch, can be trusted any more."""


class SetupProblem(Exception):  # noqa: N818  read as "a problem with the setup"
    """Something in the cluster has to be put right by a person; the message is one sentence that says what."""
