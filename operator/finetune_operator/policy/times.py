"""Times as Kubernetes writes them, in whole seconds, and back."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

CLOCK_TOLERANCE = timedelta(minutes=10)
"""How long ago something may have happened by another machine's clock that was noticed just now."""

LONGEST_PAUSE_SECONDS = 300.0
"""Longest time between two looks at what an event tells as a rule (seconds)."""
PAUSE_SHARE = 0.1
"""The next look comes after this share of the time that something has lasted."""


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


def pause_seconds(since: datetime | None, now: datetime, *, least: float) -> float:
    """How long to wait for the next look at something that lasts since then: the longer, the more seldom (seconds).

    It is for what an event tells as a rule. What lasts for days must not cost a request every few seconds.

    Args:
        since: when it began. Where that is unknown, or in the future and so by a clock that is wrong, it may last
            for long already.
        now: the present.
        least: the wait at first.
    """
    if since is None or since > after(now, CLOCK_TOLERANCE.total_seconds()):
        return LONGEST_PAUSE_SECONDS
    return min(LONGEST_PAUSE_SECONDS, max(least, PAUSE_SHARE * seconds_between(since, now)))


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
