"""Times as Kubernetes writes them, in whole seconds, and back."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

CLOCK_TOLERANCE = timedelta(minutes=10)
"""How long ago something may have happened by another machine's clock that was noticed just now."""


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
    """The time that many seconds after `start`, or before it if negative, within the times that there are."""
    try:
        return start + timedelta(seconds=seconds)
    except OverflowError:
        return datetime.max.replace(tzinfo=UTC) if seconds > 0 else datetime.min.replace(tzinfo=UTC)


def seconds_between(start: datetime, end: datetime) -> float:
    """Seconds from `start` to `end`, never negative: clocks of several machines differ."""
    return max(0.0, (end - start).total_seconds())


def believed(foreign: datetime | None, *, earliest: datetime, now: datetime, otherwise: datetime) -> datetime:
    """A time by another machine's clock where it can be right, else `otherwise`, a time by our own.

    Args:
        foreign: when something happened, as somebody else wrote it down.
        earliest: before this it cannot have been, by our own clock.
        now: the present, after which it cannot have been either.
        otherwise: what to go by when the other clock is wrong, or says nothing.
    """
    return foreign if foreign is not None and earliest <= foreign <= now else otherwise


def believed_if_recent(foreign: datetime | None, now: datetime) -> datetime:
    """A time by another machine's clock if it lies within the last minutes, else the present, when we noticed.

    Who looks after a long pause counts too little of it, and that is the lesser evil: a clock that is an hour behind
    must not use up an hour.
    """
    return believed(foreign, earliest=now - CLOCK_TOLERANCE, now=now, otherwise=now)
