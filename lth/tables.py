"""The table of rounds for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rich.table import Table

from lth.results import (
    DENSE_MS,
    EARLY_ACCURACY,
    EARLY_ITERATION,
    FINAL_ACCURACY,
    GAP,
    SPARSE_MS,
    SPEEDUP,
    STEP_MS,
    Measure,
    Result,
    Results,
)
from lth.store import TICKET

SHORT = {TICKET: "", "reinit": "reinit", "random": "random", "oneshot": "one-shot"}


def milliseconds(value: float) -> str:
    """About four digits: 0.464, 12.35, 1235."""
    return f"{value:.{3 if value < 10 else 2 if value < 100 else 1 if value < 1000 else 0}f}"


# heading: width, measure, form. With the two columns before them they take 78 of a terminal's 80 columns
COLUMNS: Mapping[str, tuple[int, Measure, Callable[[float], str]]] = {
    "early\nstop at": (7, EARLY_ITERATION, "{:,.0f}".format),
    "test %\nthere": (6, EARLY_ACCURACY, "{:.2f}".format),
    "test %\nat end": (6, FINAL_ACCURACY, "{:.2f}".format),
    "train\n− test": (6, GAP, "{:.2f}".format),
    "ms/step\nas run": (7, STEP_MS, milliseconds),
    "sampled\nsparse": (7, SPARSE_MS, milliseconds),
    "dense\nmasked": (6, DENSE_MS, milliseconds),
    "speed\n-up": (6, SPEEDUP, "{:.2f}×".format),
}


def results_table(results: Results, title: str | None = None, header: bool = True) -> Table:
    """A row a round and branch, means over the replicates; fits 80 columns, and rows of several tables align."""
    table = Table(box=None, padding=(0, 0, 0, 1), title=title, show_header=header)
    table.add_column("round", min_width=11, no_wrap=True)
    table.add_column("% re-\nmain", min_width=5, justify="right", no_wrap=True)
    for heading, (width, _, _) in COLUMNS.items():
        table.add_column(heading, min_width=width, justify="right", no_wrap=True)
    for number in dict.fromkeys(n for branch in results.branches for n in results.rounds(branch)):
        for branch in results.branches:
            if results.at(number, branch):
                cells = (_cell(results, measure, form, number, branch) for _, measure, form in COLUMNS.values())
                remaining = f"{results.remaining(number, branch):.3g}"
                table.add_row(f"{number} {SHORT[branch]}".strip(), remaining, *cells)
    return table


def finished_line(result: Result) -> str:
    """One finished training in a line."""
    stop, early, final = (measure.of(result) for measure in (EARLY_ITERATION, EARLY_ACCURACY, FINAL_ACCURACY))
    ms, speedup = STEP_MS.of(result), SPEEDUP.of(result)
    parts = [
        "" if stop is None else f"early stop at {stop:,.0f}" + ("" if early is None else f" with {early:.2f} %"),
        "" if final is None else f"{final:.2f} % at the end",
        "" if ms is None else f"{milliseconds(ms)} ms a step" + ("" if speedup is None else f" ({speedup:.2f}×)"),
    ]
    return ", ".join(part for part in parts if part)


def _cell(results: Results, measure: Measure, form: Callable[[float], str], number: int, branch: str) -> str:
    point = results.point(measure, number, branch)
    return "–" if point is None else form(point.mean)
