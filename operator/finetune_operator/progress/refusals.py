"""Why a report is not taken: what whoever decides about a token raises, and what the sender is told."""

from __future__ import annotations

from typing import ClassVar


class ReportRefused(Exception):  # noqa: N818  said of a report, as are those below
    """A report is not taken; the message is one sentence that is sent to whoever posted it."""

    status: ClassVar[int]
    """HTTP status of the answer."""


class MayNotReport(ReportRefused):
    """The token is genuine, but not of a pod that reports."""

    status = 403


class TryAgain(ReportRefused):
    """It cannot be told yet, and why has been said where it matters."""

    status = 503
