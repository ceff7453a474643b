"""The pictures of a report: matplotlib figures from results. One axis system each, so that a phone shows it legibly."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from lth.movement import Movement
from lth.results import DENSE_MS, SPARSE_MS, SPEEDUP, Measure, Point, Results
from lth.store import TICKET

SIZE = (5.8, 4.3)  # inches; with these font sizes a 360-pixel screen still shows 9-pixel letters
STYLE: Any = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    "figure.facecolor": "white",
}
# Okabe & Ito's colours, told apart with any colour vision; markers and dashes say the same without colour
LOOKS: Sequence[dict[str, Any]] = (
    {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    {"color": "#D55E00", "marker": "s", "linestyle": (0, (5, 2))},
    {"color": "#009E73", "marker": "^", "linestyle": (0, (1, 1.3))},
    {"color": "#CC79A7", "marker": "D", "linestyle": (0, (5, 1.5, 1, 1.5))},
    {"color": "#56B4E9", "marker": "v", "linestyle": (0, (8, 2))},
    {"color": "#E69F00", "marker": "P", "linestyle": (0, (3, 1.5))},
)
BRANCH_NAMES = {
    TICKET: "ticket",
    "reinit": "random reinitialisation",
    "random": "random mask",
    "oneshot": "one-shot pruning",
}
DASHES = ("-", (0, (6, 2)), (0, (2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (1, 1)), (0, (9, 2, 2, 2)))  # of curves
MOST_CURVES = len(DASHES)


@dataclass(frozen=True)
class Line:
    """A curve against % remaining, with bars from low to high."""

    label: str
    look: Mapping[str, Any]
    remaining: Sequence[float]
    means: Sequence[float]
    lows: Sequence[float]
    highs: Sequence[float]

    @classmethod
    def of(cls, label: str, look: Mapping[str, Any], points: Sequence[Point]) -> Line:
        return cls(
            label,
            look,
            [p.remaining for p in points],
            [p.mean for p in points],
            [p.lowest for p in points],
            [p.highest for p in points],
        )


@dataclass(frozen=True)
class Curve:
    """A learning curve, the mean over replicates, with the point of early stopping."""

    place: float  # among the run's rounds, 0 the first, 1 the last: a round has its colour in all pictures
    remaining: float
    iterations: Sequence[int]
    values: Sequence[float]
    early_stop: float | None


def to_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        FigureCanvasAgg(figure).print_png(buffer)  # `savefig` would draw, and lay out, twice
    return buffer.getvalue()


def branch_lines(results: Results, measure: Measure) -> list[Line]:
    """The ticket and its branches, which start at the dense network."""
    lines = []
    for branch, look in zip(BRANCH_NAMES, LOOKS, strict=False):
        points = results.points(measure, branch)
        if branch != TICKET and points and (dense := results.point(measure, 0)) is not None:
            points = [dense, *points]
        if points:
            lines.append(Line.of(BRANCH_NAMES[branch], look, points))
    return lines


def run_lines(runs: Mapping[str, Results], measure: Measure) -> list[Line]:
    """The tickets of several runs, by their labels."""
    looks = (LOOKS[i % len(LOOKS)] for i in range(len(runs)))
    found = ((label, look, results.points(measure)) for (label, results), look in zip(runs.items(), looks, strict=True))
    return [Line.of(label, look, points) for label, look, points in found if points]


def speedup_lines(runs: Mapping[str, Results]) -> list[Line]:
    """Speed-ups, the bars from the lowest to the highest ratio of all repeats and replicates."""
    lines = []
    for line, results in zip(run_lines(runs, SPEEDUP), [r for r in runs.values() if r.points(SPEEDUP)], strict=True):
        spreads = [
            [result["timing"]["sampled"]["spread"] for result in results.at(point.round) if SPEEDUP.of(result)]
            for point in results.points(SPEEDUP)
        ]
        lows = [min(low for low, _ in spread) for spread in spreads]
        highs = [max(high for _, high in spread) for spread in spreads]
        lines.append(Line(line.label, line.look, line.remaining, line.means, lows, highs))
    return lines


def step_lines(results: Results) -> list[Line]:
    pairs = (("sparse, as chosen", SPARSE_MS, LOOKS[0]), ("dense masked", DENSE_MS, LOOKS[1]))
    return [Line.of(label, look, points) for label, measure, look in pairs if (points := results.points(measure))]


def against_remaining(
    title: str,
    axis: str,
    lines: Sequence[Line],
    *,
    level: float | None = None,
    level_label: str = "",
    floor: bool = False,
) -> Figure:
    """A measure against % of weights remaining, on a logarithmic axis that falls to the right.

    Args:
        level: a horizontal line, such as the dense network's.
        floor: the axis starts at 0.
    """
    with mpl.rc_context(STYLE):
        figure, ax = _figure(title)
        for number, line in enumerate(lines):
            shift = 1.012 ** (number - (len(lines) - 1) / 2)  # so that bars at one density stand side by side
            bars = np.abs(np.array([line.lows, line.highs]) - np.array(line.means))
            x = np.array(line.remaining) * shift
            ax.errorbar(x, line.means, yerr=bars, label=line.label, capsize=2.5, elinewidth=1, **line.look)
        if level is not None:
            ax.axhline(level, color="#444444", linewidth=1, linestyle=(0, (2, 2)), label=level_label, zorder=1)
        remaining_axis(ax, sorted({round(x, 6) for line in lines for x in line.remaining}, reverse=True))
        ax.set_ylabel(axis)
        if floor:
            highest, means = max(h for line in lines for h in line.highs), [m for line in lines for m in line.means]
            ax.set_ylim(0, 1.06 * min(highest, 3 * max(means)) or 1)  # a bar that far out would flatten the lines
        else:
            cut = _cut(lines, level) if axis.endswith("(%)") else None
            if cut is not None:
                ax.set_ylim(bottom=cut)
        if ax.get_ylim()[1] >= 1000:
            ax.yaxis.set_major_formatter("{x:,.0f}")
        if len(lines) > 1 or level is not None:
            _legend(figure, min(2, len(lines) + (level is not None)))
    return figure


def learning_curves(title: str, axis: str, curves: Sequence[Curve], *, rising: bool) -> Figure:
    """Curves by density against the iteration; dots mark the early stop. The steep beginning is cut off.

    Args:
        rising: better is higher (an accuracy), else lower (a loss).
    """
    with mpl.rc_context(STYLE):
        figure, ax = _figure(title)
        for curve, dash in zip(curves, DASHES, strict=False):
            shade = mpl.colormaps["viridis"](0.05 + 0.83 * curve.place)
            x, y = np.array(curve.iterations), np.array(curve.values)
            ax.plot(x, y, color=shade, linestyle=dash, linewidth=1.6, label=f"{curve.remaining:.3g} %")
            if curve.early_stop is not None:
                ax.plot(curve.early_stop, np.interp(curve.early_stop, x, y), "o", color=shade, markersize=6)
        ax.set_xlabel("iteration")
        ax.set_ylabel(axis)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        ax.set_xlim(0, max(curve.iterations[-1] for curve in curves) * 1.01)
        limits = _settled(curves, rising)
        if limits is not None:
            ax.set_ylim(*limits)
        _legend(figure, 3, title="weights remaining")
    return figure


def movement_spread(found: Movement) -> Figure:
    with mpl.rc_context(STYLE):
        figure, ax = _figure("Movement away from zero, weight by weight")
        groups = (("remain after the last round", found.survivors), ("pruned on the way", found.dropped))
        for (label, counts), look in zip(groups, LOOKS, strict=False):
            if counts.sum():
                color, share = look["color"], 100 * counts / counts.sum()
                ax.stairs(share, found.edges, fill=True, color=color, alpha=0.22)
                ax.stairs(share, found.edges, color=color, linestyle=look["linestyle"], linewidth=1.5, label=label)
        ax.axvline(0, color="#444444", linewidth=1, linestyle=(0, (2, 2)))
        ax.set_ylim(bottom=0)
        ax.set_xlabel("← towards zero      distance from θ₀      away from zero →")
        ax.set_ylabel("% of the weights of a group, per bin")
        ax.xaxis.set_major_locator(MaxNLocator(6))
        _legend(figure, 2)
    return figure


def remaining_axis(ax: Axes, densities: Sequence[float]) -> None:
    """A logarithmic axis of % remaining, falling to the right; ticks at the first, the last and what fits between."""
    ax.set_xscale("log")
    first, last = densities[0], densities[-1]
    margin = max((first / last) ** 0.03, 1.03)
    ax.set_xlim(first * margin, last / margin)
    apart = max(math.log(first / last) / 9, 1e-9)
    ticks = [first]
    for density in densities:
        if math.log(ticks[-1] / density) >= apart and (density == last or math.log(density / last) >= apart):
            ticks.append(density)
    if ticks[-1] != last:
        ticks.append(last)
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    ax.set_xlabel("weights remaining (%)")


def chosen_rounds(rounds: Sequence[int]) -> list[int]:
    """At most MOST_CURVES rounds, from the first to the last, evenly."""
    if len(rounds) <= MOST_CURVES:
        return list(rounds)
    return [rounds[round(i * (len(rounds) - 1) / (MOST_CURVES - 1))] for i in range(MOST_CURVES)]


def _figure(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, dpi=170, layout="constrained")
    ax = figure.add_subplot()
    ax.set_title(title)
    return figure, ax


def _legend(figure: Figure, columns: int, title: str | None = None) -> None:
    """Below the axes, where it covers no data."""
    figure.legend(loc="outside lower center", ncols=columns, title=title, handlelength=2.8, columnspacing=1.4)


def _cut(lines: Sequence[Line], level: float | None) -> float | None:
    """Where an accuracy axis starts if a control that collapses would flatten everything else, or None."""
    best = max(mean for line in lines for mean in line.means)
    reference = level if level is not None else lines[0].means[0]
    cut = reference - max(8.0, 4 * (best - reference))
    return cut if min(low for line in lines for low in line.lows) < cut else None


def _settled(curves: Sequence[Curve], rising: bool) -> tuple[float, float] | None:
    """Limits around what the curves do after the first tenth of the training."""
    until = 0.1 * max(curve.iterations[-1] for curve in curves)
    late = [v for c in curves for i, v in zip(c.iterations, c.values, strict=True) if i >= until and math.isfinite(v)]
    if not late or min(late) == max(late):
        return None
    low, high = min(late), max(late)
    if rising:
        low = max(low, high - max(4 * (high - float(np.median(late))), 1e-6))
    else:
        high = min(high, low + max(4 * (float(np.median(late)) - low), 1e-6))
    return low - 0.04 * (high - low), high + 0.06 * (high - low)
