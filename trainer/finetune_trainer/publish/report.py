"""report.html: one page that tells what was trained on what and how well it went, readable wherever it is copied to.

The page loads nothing and runs nothing. Everything shown comes from the user's data and job, so it is escaped without
exception, and a content security policy in the page forbids what escaping might have missed.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from importlib import metadata, resources
from pathlib import Path

import numpy as np
from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup
from numpy.typing import ArrayLike

from finetune_trainer.publish import charts
from finetune_trainer.publish.visible_text import elided, pieces
from finetune_trainer.train.console import human_duration
from finetune_trainer.train.metrics_log import measured, read_metrics

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Curves:
    """(step, value) in the order of the steps; a value that was not finite is None."""

    loss: Sequence[tuple[int, float | None]] = ()
    eval_loss: Sequence[tuple[int, float | None]] = ()
    learning_rate: Sequence[tuple[int, float | None]] = ()


@dataclass(frozen=True, kw_only=True)
class DataCounts:
    """What was read from one file. None is shown as a dash: not counted is not zero."""

    name: str
    """Heading of its column: `train` or `valid`."""
    source: str | None = None
    """Where it was read from, as the job names it."""
    rows: int | None = None
    """Rows trained on, or evaluated."""
    tokens: int | None = None
    trainable_tokens: int | None = None
    """Tokens that count in the loss."""
    truncated_rows: int | None = None
    dropped_rows: int | None = None
    """Left out since no trainable token was left of them."""
    invalid_rows: int | None = None
    retokenized_rows: int | None = None
    """Tokenized in two pieces, since one token lay across the seam between prompt and answer."""


@dataclass(frozen=True, kw_only=True)
class RenderedRow:
    """One row as the model sees it."""

    title: str
    """Such as `train.jsonl line 3`."""
    spans: Sequence[tuple[str, bool]]
    """(text, whether the loss covers it), in order."""
    note: str | None = None
    """Such as `truncated to 512 tokens`."""


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything the report shows. A figure that was not measured is None (or NaN, which is shown the same)."""

    job_name: str
    model: str
    created: datetime
    job_yaml: str
    """The effective job, defaults filled in."""
    model_revision: str | None = None
    steps: int | None = None
    """Optimizer steps of the whole run."""
    train_loss: float | None = None
    eval_loss: float | None = None
    perplexity: float | None = None
    token_accuracy: float | None = None
    """Share of supervised tokens predicted right, 0 to 1."""
    best_checkpoint_step: int | None = None
    wall_seconds: float | None = None
    resumed_from: str | None = None
    """Address of the checkpoint that this attempt continued from."""
    resumed_at_step: int | None = None
    curves: Curves = field(default_factory=Curves)
    token_lengths: ArrayLike | None = None
    """Tokens of each training row as the model gets it; shape (rows,)."""
    context_length: int | None = None
    data: Sequence[DataCounts] = ()
    rows: Sequence[RenderedRow] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    targets: str | None = None
    """What was trained, in short."""
    layers: Sequence[str] = ()
    """The same in full, a kind of layer each."""
    notices: Sequence[str] = ()
    """What the user was told: defaults chosen, keys not acted on, warnings."""


def curves_from_metrics(path: Path) -> Curves:
    """The curves in a metrics.jsonl; where a step occurs twice the later line counts. Empty when there is no file."""
    found: dict[str, dict[int, float | None]] = {"loss": {}, "eval_loss": {}, "learning_rate": {}}
    for entry in read_metrics(path):
        for name, points in found.items():
            if name in entry:
                points[entry["step"]] = measured(entry[name])
    return Curves(**{name: sorted(points.items(), key=lambda point: point[0]) for name, points in found.items()})


def library_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide about a result, those that are installed."""
    versions = {"python": ".".join(str(part) for part in sys.version_info[:3])}
    for name in ("finetune-operator", "torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def write_report(path: Path, data: ReportData) -> None:
    """Write the page to `path`: the whole page or, after a crash, none.

    Raises:
        OSError: the folder cannot be written to.
    """
    # Data may hold lone surrogates (JSON allows "\ud800"), which no encoding can write.
    page = render_report(data).encode("utf-8", errors="backslashreplace")
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_bytes(page)
    unfinished.replace(path)


def render_report(data: ReportData) -> str:
    """The page as text."""
    return _template().render(data=data, figures=_figures(data))


@cache
def _template() -> Template:
    source = resources.files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        number=_number,
        count=_count,
        share=_share,
        duration=_duration,
        percentage=_percentage,
        pieces=pieces,
        elided=elided,
    )
    return environment.from_string(source)


@dataclass(frozen=True)
class _Chart:
    title: str
    svg: Markup | None
    caption: str


def _figures(data: ReportData) -> list[_Chart]:
    curves = data.curves
    loss = [
        charts.Series(label, points, marked)
        for label, points, marked in (("training", curves.loss, False), ("evaluation", curves.eval_loss, True))
    ]
    return [
        _chart("Loss", "loss", [one for one in loss if charts.has_values(one.points)], data.resumed_at_step),
        _chart(
            "Learning rate",
            "learning-rate",
            [charts.Series("learning rate", curves.learning_rate)] if charts.has_values(curves.learning_rate) else [],
            data.resumed_at_step,
        ),
        _length_chart(data),
    ]


def _chart(title: str, name: str, series: Sequence[charts.Series], resumed_at_step: int | None) -> _Chart:
    if not series:
        return _Chart(title, None, "")
    group = charts.group_size(max(len(one.points) for one in series))
    caption = "" if group == 1 else f"Each point is the mean of {group} logged steps."
    return _Chart(title, _picture(charts.line_chart(name, series, resumed_at_step=resumed_at_step)), caption)


def _length_chart(data: ReportData) -> _Chart:
    lengths = np.asarray(() if data.token_lengths is None else data.token_lengths, dtype=np.int64)
    if lengths.size == 0:
        return _Chart("Row lengths", None, "")
    svg = charts.histogram("lengths", lengths, limit=data.context_length, limit_label="context_length")
    caption = f"Shortest {lengths.min():,}, median {np.median(lengths):,.0f}, longest {lengths.max():,} tokens."
    return _Chart("Row lengths", _picture(svg), caption)


def _picture(svg: str) -> Markup:
    return Markup(svg)  # noqa: S704  matplotlib's output: it holds our own labels and numbers, no text of the user's


def _number(value: float | None, digits: int = 4) -> str:
    number = measured(value)
    return NOT_MEASURED if number is None else f"{number:.{digits}f}"


def _percentage(value: float | None) -> str:
    number = measured(value)
    return NOT_MEASURED if number is None else f"{number:.1%}"


def _duration(seconds: float | None) -> str:
    number = measured(seconds)
    return NOT_MEASURED if number is None else human_duration(number)


def _count(value: int | None) -> str:
    return "—" if value is None else f"{value:,}"


def _share(part: int | None, whole: int | None) -> str:
    return "—" if part is None or not whole else f"{part / whole:.1%}"
