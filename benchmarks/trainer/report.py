"""Figures as Markdown tables: least, median and most of each contestant, and what each takes of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from statistics import median

import torch

from benchmarks.console import machine, span, three
from benchmarks.trainer.contestants import Step
from benchmarks.trainer.memory import Peak

TOLERANCE = 1e-4
"""Relative difference of losses and gradient norms up to which contestants count as training the same."""


@dataclass
class Case:
    """One shape of data at one number of rows a step. The first contestant is ours."""

    shape: str
    rows: int
    steps: dict[str, list[Step]]
    """Of each contestant, the warm-up included."""
    warm_up: int = 1
    """Steps before those that are measured."""
    failures: dict[str, str] = field(default_factory=dict)
    """Why a contestant was left out."""
    shrunk: dict[str, int] = field(default_factory=dict)
    """Rows of the micro-batches of a contestant that did not fit with those it was to have."""
    tokens: list[int] = field(default_factory=list)
    """Of each step, padding not counted."""
    trained_tokens: list[int] = field(default_factory=list)
    distinct_tokens: list[int] = field(default_factory=list)
    """Of each step: those that no trainer can do without."""
    positions: dict[str, list[int]] = field(default_factory=dict)
    """That each contestant computes in each step."""
    longest_row: int = 0
    remarks: list[str] = field(default_factory=list)
    """Sentences about what contestants did before the first step."""
    peaks: dict[str, Peak] = field(default_factory=dict)
    profile: str = ""


def case_markdown(case: Case) -> str:
    """All that was found about one case."""
    return "\n".join(_lines(case))


def conditions() -> str:
    """Where and with what it was measured."""
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "trl"))
    return f"{machine()}, {libraries}, {torch.get_num_threads()} threads; float32, SmolLM2-135M-Instruct."


def _lines(case: Case) -> Iterator[str]:
    measured = slice(case.warm_up, None)
    ours = case.steps[next(iter(case.steps))][measured]
    yield f"### {case.shape}, {case.rows} rows a step\n"
    yield (
        f"{span(case.tokens[measured])} tokens a step, {span(case.trained_tokens[measured])} of them trained; the "
        f"longest row has {case.longest_row}. {len(ours)} steps after a warm-up of {case.warm_up}; least / median / "
        f"most. No trainer can do without {span(case.distinct_tokens[measured])} tokens; `positions : needed` is what "
        "one computes for each of these, and the column behind it what its time against ours is of that.\n"
    )
    columns = ["CPU s", "wall s", "CPU : ours", "wall : ours", "rows/s", "tokens/s", "tokens/CPU s"]
    columns += ["positions : needed", "CPU : ours, of that"]
    columns += ["RSS before (MiB)", "RSS peak (MiB)"] if case.peaks else []
    yield f"| | {' | '.join(columns)} |"
    yield "| --- |" + " ---: |" * len(columns)
    for name, steps in case.steps.items():
        cells = [case.failures[name], *[""] * 8] if name in case.failures else _cells(case, steps[measured], ours)
        cells += _quotients(case, name, ours) if name not in case.failures else []
        label = f"{name} ({case.shrunk[name]} at a time)" if name in case.shrunk else name
        yield f"| {label} | {' | '.join(cells + _memory(case, name))} |"
    yield ""
    for remark in case.remarks:
        yield f"{remark}\n"
    yield from _agreement(case)
    if case.profile:
        yield f"\n```\n{case.profile}\n```"
    yield ""


def _cells(case: Case, steps: Sequence[Step], ours: Sequence[Step]) -> list[str]:
    wall, cpu = [step.wall_seconds for step in steps], [step.cpu_seconds for step in steps]
    pairs = list(zip(steps, ours, strict=False))
    tokens = case.tokens[case.warm_up :]
    return [
        _three(cpu),
        _three(wall),
        _three([step.cpu_seconds / own.cpu_seconds for step, own in pairs]),
        _three([step.wall_seconds / own.wall_seconds for step, own in pairs]),
        _number(median(case.rows / seconds for seconds in wall)),
        _number(median(count / seconds for count, seconds in zip(tokens, wall, strict=False))),
        _number(median(count / seconds for count, seconds in zip(tokens, cpu, strict=False))),
    ]


def _quotients(case: Case, name: str, ours: Sequence[Step]) -> list[str]:
    """Positions for each token that is needed, and the ratio of CPU seconds to ours for each of these."""
    measured = slice(case.warm_up, None)
    counts = zip(case.positions[name][measured], case.distinct_tokens[measured], strict=False)
    quotients = [positions / needed for positions, needed in counts]
    pairs = zip(case.steps[name][measured], ours, quotients, strict=False)
    shares = [step.cpu_seconds / own.cpu_seconds / quotient for step, own, quotient in pairs]
    return [_number(median(quotients)), _number(median(shares))]


def _memory(case: Case, name: str) -> list[str]:
    if not case.peaks:
        return []
    peak = case.peaks.get(name)
    if peak is None:
        return ["–", "–"]
    return [_number(peak.before), _number(peak.most) if peak.fits else f"more than {_number(peak.most)}"]


def _agreement(case: Case) -> Iterator[str]:
    """Losses of all steps, the warm-up's first, and whether all contestants train the same."""
    names = [name for name in case.steps if name not in case.failures]
    if len(names) < 2:
        yield "There is nothing to compare.\n"
        return
    yield f"| loss | {' | '.join(names)} |"
    yield "| --- |" + " ---: |" * len(names)
    for number in range(len(case.tokens)):
        losses = " | ".join(f"{case.steps[name][number].loss:.6f}" for name in names)
        yield f"| step {number + 1} | {losses} |"
    yield ""
    found: dict[str, Callable[[Step], float]] = {
        "Losses": lambda step: step.loss,
        "Gradient norms": lambda step: step.gradient_norm,
    }
    for what, of in found.items():
        most = max(_spread([of(case.steps[name][number]) for name in names]) for number in range(len(case.tokens)))
        verdict = "agree" if most <= TOLERANCE else "DO NOT AGREE"
        yield f"{what} {verdict} to {TOLERANCE:g}: the largest relative difference is {most:.1e}.\n"


def _spread(values: Sequence[float]) -> float:
    return (max(values) - min(values)) / max(abs(value) for value in values)


def _three(values: Sequence[float]) -> str:
    if not values:
        return "–"
    if len(values) == 1:
        return _number(values[0])
    return three(values, _number)


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
