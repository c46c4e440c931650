"""Times as Kubernetes writes them, in whole seconds, and back."""

from __future__ import annotations

from datetime import UTC, datetime


def rfc3339(moment: datetime) -> str:
    """`moment` in UTC to the second, as in 2026-01-31T12:00:00Z."""
    return moment.astimezone(UTC).replace(microsecond=0, tzinfo=None).isoformat() + "Z"


def moment(text: str | None) -> datetime | None:
    """The time that `text` names, or None for no text or one that is no time with a zone."""
    if not text:
        return None
    try:
        parsed = datetime.fromisoformat(text)
    except ValueError:
        return None
    return parsed.astimezone(UTC) if parsed.tzinfo else None


def seconds_between(start: datetime, end: datetime) -> float:
    """Seconds from `start` to `end`, never negative: clocks of several machines differ."""
    return max(0.0, (end - start).total_seconds())
