"""Figures of several rounds as Markdown tables: least, median and most of each contestant, and their ratio."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

Rounds = Mapping[str, Sequence[float]]
"""Figure -> its value in each round."""


@dataclass
class Report:
    """All figures, by situation and contestant."""

    _situations: dict[str, dict[str, defaultdict[str, list[float]]]] = field(default_factory=dict)

    def add(self, situation: str, contestant: str, figures: Mapping[str, float]) -> None:
        """One more round's figures."""
        contestants = self._situations.setdefault(situation, {})
        rounds = contestants.setdefault(contestant, defaultdict(list))
        for name, value in figures.items():
            rounds[name].append(value)

    def markdown(self) -> str:
        """One table for each situation."""
        return "\n".join(line for title, found in self._situations.items() for line in _table(title, found))


def _table(title: str, contestants: Mapping[str, Rounds]) -> Iterator[str]:
    names, first = list(contestants), next(iter(contestants.values()))
    rounds = max(len(values) for found in contestants.values() for values in found.values())
    yield f"### {title}\n"
    yield f"{rounds} rounds; least / median / most.\n" if rounds > 1 else "One round.\n"
    ratio = f" {names[0]} : {names[1]} |" if len(names) == 2 else ""
    yield f"| | {' | '.join(names)} |{ratio}"
    yield "| --- |" + " ---: |" * (len(names) + bool(ratio))
    for figure in first:
        columns = [contestants[name].get(figure, ()) for name in names]
        cells = " | ".join(_cell(values) for values in columns)
        yield f"| {figure} | {cells} |" + (f" {_ratio(*columns)} |" if ratio else "")
    yield ""


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "–"
    found = (min(values), median(values), max(values)) if len(values) > 1 else (values[0],)
    return " / ".join(_number(value) for value in found)


def _ratio(first: Sequence[float], second: Sequence[float]) -> str:
    if not first or not second or not median(second):
        return ""
    return f"{median(first) / median(second):.2f}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
