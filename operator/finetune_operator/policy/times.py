"""Times as Kubernetes writes them, in whole seconds, and back."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta


def rfc3339(moment: datetime) -> str:
    """`moment` in UTC to the second, as in 2026-01-31T12:00:00Z."""
    return moment.astimezone(UTC).replace(microsecond=0, tzinfo=None).isoformat() + "Z"


def moment(text: str | None) -> datetime | None:
    """The time that `text` names, or None for no text or one that is no time with a zone."""
    if not text:
        return None
    try:
        parsed = datetime.fromisoformat(text)
        return parsed.astimezone(UTC) if parsed.tzinfo else None
    except (OverflowError, ValueError):
        return None


def after(start: datetime, seconds: float) -> datetime:
    """The time that many seconds after `start`, at most the last one that there is."""
    try:
        return start + timedelta(seconds=seconds)
    except OverflowError:
        return datetime.max.replace(tzinfo=UTC)


def seconds_between(start: datetime, end: datetime) -> float:
    """Seconds from `start` to `end`, never negative: clocks of several machines differ."""
    return max(0.0, (end - start).total_seconds())
