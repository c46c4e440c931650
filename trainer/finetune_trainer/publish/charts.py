"""Line charts and histograms as inline SVG for the report.

matplotlib draws for a light page. The page's style sheet inverts the pictures on a dark one and sets their text, which
stays text, in its own font: one picture fits both, and no font is embedded. It is imported when it draws: that takes
a second, for which the first step need not wait.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = Sequence[tuple[int, float | None]]
"""(step, value); a value that is None or not finite leaves a gap."""

MOST_POINTS = 1000
"""More than a chart has pixels for; longer curves are averaged down to this."""

_TEXT, _GRID, _FIRST, _SECOND = "#1b1f24", "#b8bfc9", "#1f6feb", "#c2410c"
_RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 11.0,
    "font.sans-serif": ["DejaVu Sans"],
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.color": _GRID,
    "xtick.labelcolor": _TEXT,
    "ytick.color": _GRID,
    "ytick.labelcolor": _TEXT,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Series:
    """One curve. `marked` draws a dot at every point, for curves of few points; otherwise only lone points get one."""

    label: str
    points: Points
    marked: bool = field(default=False)


def has_values(points: Points) -> bool:
    """Whether there is anything to draw."""
    return any(value is not None and math.isfinite(value) for _, value in points)


def line_chart(name: str, series: Sequence[Series], *, resumed_at_step: int | None = None) -> str:
    """At most two curves over the step, as an `<svg>` element; `name` keeps its ids apart from other pictures'."""
    import matplotlib as mpl
    from matplotlib.ticker import MaxNLocator

    with mpl.rc_context({**_RC, "svg.hashsalt": name}):
        figure, axes = _figure()
        for one, colour in zip(series, (_FIRST, _SECOND), strict=False):
            steps, values = _averaged(one.points)
            # A value between two gaps would have no line at all.
            marker = "o" if one.marked or len(steps) <= 40 else None
            axes.plot(steps, values, color=colour, label=one.label, linewidth=1.8, marker=marker, markersize=3.5)
        if resumed_at_step is not None:
            axes.axvline(
                resumed_at_step, color=_TEXT, linewidth=1, linestyle=":", label=f"resumed at {resumed_at_step}"
            )
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        if len(series) > 1 or resumed_at_step is not None:
            _legend(axes)
        # 1e-4 reads better than 0.00010.
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 5))
        return _svg(figure, name)


def histogram(name: str, lengths: ArrayLike, *, limit: int | None, limit_label: str) -> str:
    """How many rows have how many tokens, as an `<svg>` element, with a line at `limit` tokens."""
    import matplotlib as mpl
    from matplotlib.ticker import MaxNLocator

    values: NDArray[np.int64] = np.asarray(lengths, dtype=np.int64)
    with mpl.rc_context({**_RC, "svg.hashsalt": name}):
        figure, axes = _figure()
        # Whole numbers: never more bins than there are different lengths.
        bins = int(min(40, values.max() - values.min() + 1))
        axes.hist(values, bins=bins, color=_FIRST, rwidth=0.92)
        # A limit far beyond the rows would leave them no room.
        if limit is not None and limit <= 2 * values.max():
            axes.axvline(limit, color=_SECOND, linewidth=1.5, linestyle="--", label=f"{limit_label} {limit:,}")
            _legend(axes)
        axes.grid(visible=False, axis="x")
        axes.set_xlabel("tokens in a row")
        axes.set_ylabel("rows")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        return _svg(figure, name)


def _figure() -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    # Small on purpose: the page scales it up, and on a phone the text stays readable.
    figure = Figure(figsize=(5.0, 3.0), layout="constrained")
    return figure, figure.add_subplot()


def _legend(axes: Axes) -> None:
    # Above the picture, where it hides nothing.
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0, columnspacing=1.2, handlelength=1.4)


def _averaged(points: Points) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps and values (NaN where there is none), averaged over neighbours when there are more than MOST_POINTS."""
    steps = np.array([step for step, _ in points], dtype=np.float64)
    values = np.array([math.nan if value is None else value for _, value in points], dtype=np.float64)
    values[~np.isfinite(values)] = math.nan
    group = group_size(len(points))
    if group == 1:
        return steps, values
    edges = np.arange(0, len(points), group)
    counts = np.diff(np.append(edges, len(points)))
    return np.add.reduceat(steps, edges) / counts, np.add.reduceat(values, edges) / counts


def group_size(points: int) -> int:
    """How many neighbouring points become one."""
    return max(1, math.ceil(points / MOST_POINTS))


def _svg(figure: Figure, name: str) -> str:
    buffer = io.StringIO()
    no_metadata: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    # In HTML the parser knows the namespaces, and the size is the page's affair.
    drawn = buffer.getvalue().partition("<svg")[2].partition(">")[2]
    for reference in ('id="', 'href="#', "url(#"):
        drawn = drawn.replace(reference, f"{reference}{name}-")
    width, height = 72 * figure.get_size_inches()
    return f'<svg viewBox="0 0 {width:g} {height:g}" aria-hidden="true">{drawn}'
