"""Which pictures a report has, and what stands below them."""

from __future__ import annotations

import base64
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lth import plots
from lth.movement import Movement
from lth.results import EARLY_ACCURACY, EARLY_ITERATION, FINAL_ACCURACY, GAP, STEP_MS, Results
from lth.store import TICKET, Stage

Evaluations = Mapping[Stage, Sequence[Mapping[str, Any]]]  # of the finished stages

MEASURES = {
    "early-accuracy": EARLY_ACCURACY,
    "final-accuracy": FINAL_ACCURACY,
    "early-iteration": EARLY_ITERATION,
    "gap": GAP,
}
CAPTIONS = {
    "early-accuracy": "Test accuracy at the iteration of lowest validation loss. ",
    "final-accuracy": "Test accuracy after the last iteration. ",
    "early-iteration": "Iteration of lowest validation loss; the lower, the sooner it has learnt. ",
    "gap": "Accuracy on the whole training set minus that on the test set, after the last iteration. ",
}
FROM_ZERO = ("iteration", "ms", "× dense masked", "mean |θ − θ₀|")  # axes that start at 0


@dataclass(frozen=True)
class Picture:
    name: str  # of its file, without the ending
    title: str
    caption: str
    png: bytes

    @property
    def inline(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


def of_runs(runs: Mapping[str, Results]) -> list[Picture]:
    """The tickets of several runs, by their labels, in one picture a measure."""
    alone = all(len(results.replicates) == 1 for results in runs.values())
    how = "one replicate each." if alone else "means over replicates, bars from the lowest to the highest."
    caption = f"Tickets of {len(runs)} runs; {how}"
    found = [
        _drawn(f"compare-{name}", measure.name, measure.axis, plots.run_lines(runs, measure), CAPTIONS[name] + caption)
        for name, measure in MEASURES.items()
    ]
    ran = plots.run_lines(runs, STEP_MS)
    found.append(_drawn("compare-step-time", "Milliseconds per training step, as it ran", "ms", ran, caption))
    found.append(_speedup("compare-speed-up", plots.speedup_lines(runs), "Each run against its dense masked twin. "))
    return [picture for picture in found if picture]


def of_accuracy(results: Results) -> list[Picture]:
    found = []
    for name, measure in MEASURES.items():
        dense = results.point(measure, 0)
        level = {"level": dense.mean, "level_label": "dense network"} if dense else {}
        lines = plots.branch_lines(results, measure)
        found.append(_drawn(name, measure.name, measure.axis, lines, CAPTIONS[name] + bars(results), **level))
    return [picture for picture in found if picture]


def of_learning(results: Results, evaluations: Evaluations) -> list[Picture]:
    known = {key for records in evaluations.values() for record in records for key in record}
    judged = "test_accuracy" if "test_accuracy" in known else "val_accuracy"
    caption = "Means over replicates; a dot" if len(results.replicates) > 1 else "One replicate; a dot"
    caption += " at the early-stop iteration. The axis is cut to where the curves settle."
    last = max(results.rounds())
    found = []
    for branch in results.branches:
        rounds = plots.chosen_rounds(sorted({0, *results.rounds(branch)}))
        for key, axis in (
            (judged, f"{'test' if judged[0] == 't' else 'validation'} accuracy (%)"),
            ("val_loss", "validation loss"),
        ):
            curves = [
                curve
                for number in rounds
                if (
                    curve := _curve(
                        results, evaluations, branch if number else TICKET, number, key, number / max(last, 1)
                    )
                )
            ]
            if curves:
                title = f"{capitalised(axis.removesuffix(' (%)'))}: {plots.BRANCH_NAMES[branch]}"
                figure = plots.learning_curves(title, axis, curves, rising=key == judged)
                kind = "accuracy" if key == judged else "loss"
                found.append(Picture(f"curves-{kind}-{branch}", title, caption, plots.to_png(figure)))
    return found


def of_time(results: Results) -> list[Picture]:
    title, lines = "Milliseconds per training step", plots.step_lines(results)
    caption = "The whole step (forward, backward, optimizer), sampled side by side on copies of the model. "
    if not lines:
        title, lines = f"{title}, as it ran", plots.run_lines({"ticket": results}, STEP_MS)
        caption = "No round ran sparse, so there is nothing to compare. "
    found = [
        _drawn("step-time", title, "ms", lines, caption + bars(results)),
        _speedup("speed-up", plots.speedup_lines({"ticket": results})),
    ]
    return [picture for picture in found if picture]


def of_movement(moved: Movement, results: Results) -> list[Picture]:
    groups = (("kept by the next pruning", moved.kept), ("pruned next", moved.pruned))
    lines = [
        plots.Line.of(label, look, points) for (label, points), look in zip(groups, plots.LOOKS, strict=False) if points
    ]
    title = "Mean distance from θ₀ at the end of a round"
    caption = "Weights in force in that round; after the last round all that remain count as kept. "
    spread = (
        "Remaining weights at the end of the last round; pruned ones at the end of the round after which they were "
        f"pruned. {100 * moved.outside:.1f} % of the weights lie outside the axis."
    )
    found = [
        _drawn("movement", title, "mean |θ − θ₀|", lines, caption + bars(results)),
        Picture("movement-spread", "Movement away from zero", spread, plots.to_png(plots.movement_spread(moved))),
    ]
    return [picture for picture in found if picture]


def bars(results: Results) -> str:
    count = len(results.replicates)
    return f"Means over {count} replicates, bars from the lowest to the highest." if count > 1 else "One replicate."


def capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


def _drawn(name: str, title: str, axis: str, lines: Sequence[plots.Line], caption: str, **level: Any) -> Picture | None:
    """A picture against % remaining; None where there is but one density, which a table says better."""
    if len({round(x, 6) for line in lines for x in line.remaining}) < 2:
        return None
    figure = plots.against_remaining(capitalised(title), axis, lines, floor=axis in FROM_ZERO, **level)
    return Picture(name, capitalised(title), caption, plots.to_png(figure))


def _speedup(name: str, lines: Sequence[plots.Line], caption: str = "") -> Picture | None:
    caption += "Bars: lowest and highest ratio of all repeats, sampled side by side on copies."
    title = "Speed-up of a training step"
    return _drawn(name, title, "× dense masked", lines, caption, level=1, level_label="dense masked")


def _curve(
    results: Results, evaluations: Evaluations, branch: str, number: int, key: str, place: float
) -> plots.Curve | None:
    """The mean over replicates at the iterations that all of them have; accuracies in %."""
    scale = 100 if key.endswith("accuracy") else 1
    by_iteration: dict[int, list[float]] = {}
    found = results.at(number, branch)
    for result in found:
        for record in evaluations[Stage(result["replicate"], number, branch)]:
            if key in record:
                by_iteration.setdefault(record["iteration"], []).append(scale * record[key])
    means = {i: statistics.fmean(values) for i, values in sorted(by_iteration.items()) if len(values) == len(found)}
    if not any(map(math.isfinite, means.values())):
        return None
    stop = results.point(EARLY_ITERATION, number, branch)
    remaining = results.remaining(number, branch)
    return plots.Curve(place, remaining, list(means), list(means.values()), stop.mean if stop else None)
