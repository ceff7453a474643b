"""`lth report`: one self-contained page about one run or several, and its pictures as PNG files beside it."""

from __future__ import annotations

import base64
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import jinja2
import tyro
from matplotlib.figure import Figure

from lth import plots
from lth.files import DamagedFile, write_atomically
from lth.movement import Movement, movement
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
    Results,
    duration,
    planned_stages,
)
from lth.store import TICKET, Run, RunError, Stage

PAGE = "report.html"


@dataclass(frozen=True)
class Read:
    """A run as the report uses it."""

    label: str
    run: Run
    results: Results
    curves: Mapping[Stage, Sequence[Mapping[str, Any]]]  # evaluations of the finished stages
    moved: Movement
    planned: int  # stages
    environment: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Picture:
    name: str  # of its file, without the ending
    title: str
    caption: str
    png: bytes

    @property
    def inline(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


def main(arguments: Sequence[str]) -> int:
    """The command. Returns its exit status."""

    def command(
        runs: tyro.conf.Positional[
            tuple[Path, ...]
        ],  # folders of runs, finished or not; several are laid over each other
        out: Path | None = None,  # folder for page and pictures; default RUN/report, for several runs ./lth-report
    ) -> int:
        page = report(runs, out)
        print(f"{page} ({len(list(page.parent.glob('*.png')))} pictures beside it)")
        return 0

    return tyro.cli(Annotated[Any, command], prog="lth report", args=list(arguments))  # type: ignore[call-overload]


def report(paths: Sequence[Path], out: Path | None = None) -> Path:
    """Writes the report of one run or several and returns the path of its page.

    Args:
        paths: folders of runs.
        out: the folder to write into. Default: `report` in the run's own folder, `lth-report` here for several runs.

    Raises:
        RunError: a folder holds no run, or nothing is finished yet.
        DamagedFile: a file of a run is damaged or missing; the message names it.
    """
    if not paths:
        raise RunError("runs: none was given; lth report RUN...")
    opened = [Run.open(Path(path)) for path in paths]
    read = [_read(run, label) for run, label in zip(opened, labels(opened), strict=True)]
    folder = Path(out) if out is not None else opened[0].path / "report" if len(read) == 1 else Path("lth-report")
    comparison = compared(read) if len(read) > 1 else []
    sections = []
    for number, one in enumerate(read, 1):
        prefix = "" if len(read) == 1 else f"{number}-{re.sub(r'[^A-Za-z0-9.]+', '-', one.label)}-"
        sections.append(section(one, prefix))
    page = _template().render(
        title="Lottery tickets: " + ", ".join(one.label for one in read),
        comparison=comparison,
        sections=sections,
        written=time.strftime("%Y-%m-%d %H:%M"),
    )
    for picture in [
        *comparison,
        *(picture for s in sections for group in s["pictures"] for picture in group["pictures"]),
    ]:
        write_atomically(folder / f"{picture.name}.png", picture.png)
    write_atomically(folder / PAGE, page.encode())
    return folder / PAGE


def labels(runs: Sequence[Run]) -> list[str]:
    """What tells the runs apart: the settings that differ, or the folder's name where that says too little or too much."""
    names = [run.path.resolve().name for run in runs]
    if len(runs) == 1:
        return names
    keys = sorted({key for run in runs for key in run.settings})
    differing = [key for key in keys if len({shown_setting(run.settings.get(key)) for run in runs}) > 1]
    found = [", ".join(f"{key} {shown_setting(run.settings.get(key))}" for key in differing) for run in runs]
    if len(set(found)) == len(runs) and max(map(len, found)) <= 40:
        return found
    return names if len(set(names)) == len(runs) else [str(run.path) for run in runs]


def shown_setting(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {shown_setting(one)}" for key, one in value.items())
    if isinstance(value, list):
        pair = len(value) == 2 and all(isinstance(one, int) for one in value)
        return "{}x{}".format(*value) if pair else ", ".join(map(str, value)) or "none"
    return "none" if value is None or value == "" else str(value)


def _read(run: Run, label: str) -> Read:
    try:
        stages = run.finished()
        if not stages:
            raise RunError(f"{run.path}: no training is finished yet, so there is nothing to report")
        results = Results(stage.result() for stage in stages)
        curves = {stage.stage: stage.evaluations() for stage in stages}
        return Read(
            label, run, results, curves, movement(run, results), planned_stages(run.settings), run.environment()
        )
    except FileNotFoundError as error:
        raise DamagedFile(f"{error.filename or error}".removesuffix(": missing") + ": missing") from error


def compared(read: Sequence[Read]) -> list[Picture]:
    """The tickets of several runs in one picture each."""
    runs = {one.label: one.results for one in read}
    wanted = (
        ("early-accuracy", EARLY_ACCURACY, False),
        ("final-accuracy", FINAL_ACCURACY, False),
        ("early-iteration", EARLY_ITERATION, True),
        ("gap", GAP, False),
        ("step-time", STEP_MS, True),
    )
    found = []
    for name, measure, floor in wanted:
        if lines := plots.run_lines(runs, measure):
            title, unit = _sentence(measure.name), measure.unit or measure.name
            figure = plots.against_remaining(title, unit, lines, floor=floor)
            found.append(_picture(f"compare-{name}", title, f"Tickets of {len(lines)} runs; {BARS}", figure))
    if lines := plots.speedup_lines(runs):
        title = "Speed-up of a training step"
        figure = plots.against_remaining(
            title, "× dense masked", lines, level=1, level_label="dense masked", floor=True
        )
        found.append(
            _picture("compare-speed-up", title, f"Each run against its own dense masked twin. {SPREAD}", figure)
        )
    return found


BARS = "means over replicates, bars from the lowest to the highest."
SPREAD = "Bars: lowest and highest ratio of all repeats, sampled side by side on copies."


def section(one: Read, prefix: str) -> dict[str, Any]:
    """All that the page says about one run."""
    results, settings = one.results, one.run.settings
    groups = (
        ("Accuracy and early stopping", accuracy_pictures(results)),
        ("Learning curves", curve_pictures(one)),
        ("Time", time_pictures(results)),
        ("Movement from θ0", movement_pictures(one.moved)),
    )
    pictures = [
        {"title": title, "pictures": [Picture(prefix + p.name, p.title, p.caption, p.png) for p in found]}
        for title, found in groups
        if found
    ]
    return {
        "label": one.label,
        "path": str(one.run.path),
        "finished": len(results.all),
        "planned": one.planned,
        "replicates": len(results.replicates),
        "findings": findings(results),
        "comparisons": comparisons(results),
        "pictures": pictures,
        "rows": table_rows(results),
        "layers": layer_rows(one),
        "settings": {key: shown_setting(value) for key, value in sorted(settings.items())},
        "environment": [_shown_environment(record) for record in one.environment],
    }


def accuracy_pictures(results: Results) -> list[Picture]:
    found = []
    for name, measure, floor in (
        ("early-accuracy", EARLY_ACCURACY, False),
        ("final-accuracy", FINAL_ACCURACY, False),
        ("early-iteration", EARLY_ITERATION, True),
        ("gap", GAP, False),
    ):
        lines, dense = plots.branch_lines(results, measure), results.point(measure, 0)
        if not lines:
            continue
        title = _sentence(measure.name)
        level = {"level": dense.mean, "level_label": "dense network"} if dense else {}
        figure = plots.against_remaining(title, measure.unit or measure.name, lines, floor=floor, **level)  # type: ignore[arg-type]
        found.append(_picture(name, title, CAPTIONS[name] + _bars(results), figure))
    return found


CAPTIONS = {
    "early-accuracy": "Test accuracy at the iteration of lowest validation loss. ",
    "final-accuracy": "Test accuracy after the last iteration. ",
    "early-iteration": "Iteration of lowest validation loss; the lower, the sooner it has learnt. ",
    "gap": "Accuracy on the whole training set minus that on the test set, after the last iteration. ",
}


def curve_pictures(one: Read) -> list[Picture]:
    found = []
    shown = plots.chosen_rounds(one.results.rounds())
    for branch in one.results.branches:
        rounds = [number for number in shown if number == 0 or one.results.at(number, branch)]
        known = {key for records in one.curves.values() for record in records for key in record}
        accuracy = "test_accuracy" if "test_accuracy" in known else "val_accuracy"
        for key, what, scale, rising in (
            (accuracy, accuracy.split("_")[0], 100, True),
            ("val_loss", "validation", 1, False),
        ):
            curves = [c for number in rounds if (c := _curve(one, branch if number else TICKET, number, key, scale))]
            if not curves:
                continue
            kind = "accuracy" if rising else "loss"
            title = (
                f"{_sentence('validation' if what == 'val' else what)} {kind}: {plots.BRANCH_NAMES.get(branch, branch)}"
            )
            figure = plots.learning_curves(title, "%" if rising else "cross-entropy or loss", curves, rising=rising)
            caption = f"{_sentence(kind)} while training, mean over replicates; a dot at the mean early-stop iteration."
            found.append(_picture(f"curves-{kind}-{branch}", title, caption, figure))
    return found


def _curve(one: Read, branch: str, number: int, key: str, scale: float) -> plots.Curve | None:
    """The mean over replicates at the iterations that all of them have."""
    by_iteration: dict[int, list[float]] = {}
    results = one.results.at(number, branch)
    for result in results:
        for record in one.curves[Stage(result["replicate"], number, branch)]:
            if key in record:
                by_iteration.setdefault(record["iteration"], []).append(scale * record[key])
    means = {i: statistics.fmean(values) for i, values in sorted(by_iteration.items()) if len(values) == len(results)}
    stop = one.results.point(EARLY_ITERATION, number, branch)
    remaining = one.results.remaining(number, branch)
    return plots.Curve(remaining, list(means), list(means.values()), stop.mean if stop else None) if means else None


def time_pictures(results: Results) -> list[Picture]:
    found = []
    if lines := plots.step_lines(results):
        title = "Milliseconds per training step"
        caption = (
            "The whole step (forward, backward, optimizer), sampled side by side on copies of the model. "
            + _bars(results)
        )
        found.append(_picture("step-time", title, caption, plots.against_remaining(title, "ms", lines, floor=True)))
        lines = plots.speedup_lines({"ticket": results})
        title = "Speed-up of a training step"
        figure = plots.against_remaining(
            title, "× dense masked", lines, level=1, level_label="dense masked", floor=True
        )
        found.append(_picture("speed-up", title, SPREAD, figure))
    elif points := results.points(STEP_MS):
        title = "Milliseconds per training step, as it ran"
        lines = [plots.Line.of("ticket", plots.LOOKS[0], points)]
        caption = "No round ran sparse, so there is nothing to compare. " + _bars(results)
        found.append(_picture("step-time", title, caption, plots.against_remaining(title, "ms", lines, floor=True)))
    return found


def movement_pictures(moved: Movement) -> list[Picture]:
    pairs = (("left by the next pruning", moved.kept, plots.LOOKS[0]), ("taken by it", moved.pruned, plots.LOOKS[1]))
    title = "Mean distance from θ0 at the end of a round"
    lines = [plots.Line.of(label, look, points) for label, points, look in pairs if points]
    figure = plots.against_remaining(title, "mean |θ − θ0|", lines, floor=True)
    caption = (
        "Weights in force in that round. After the last round all that remain count as left. Bars over replicates."
    )
    spread = (
        "Remaining weights at the end of the last round; pruned ones at the end of the round after which they were pruned. "
        f"{100 * moved.outside:.1f} % of the weights lie outside the axis."
    )
    return [
        _picture("movement", title, caption, figure),
        _picture("movement-spread", "Movement away from zero", spread, plots.movement_spread(moved)),
    ]


def findings(results: Results) -> list[str]:
    """Plain sentences of what was measured; no comparison that replicates would have to carry."""
    said = []
    for number, who in ((0, "The dense network"), (max(results.rounds()), "The sparsest ticket")):
        early, final = results.point(EARLY_ACCURACY, number), results.point(FINAL_ACCURACY, number)
        stop = results.point(EARLY_ITERATION, number)
        if early and final and stop:
            kept = "" if number == 0 else f" ({results.remaining(number):.3g} % of the weights)"
            said.append(
                f"{who}{kept} stops early at iteration {stop.mean:,.0f} with {early.mean:.2f} % test accuracy, "
                f"and ends at {final.mean:.2f} %."
            )
        if max(results.rounds()) == 0:
            break
    if points := results.points(SPEEDUP):
        last = points[-1]
        lows, highs = (plots.speedup_lines({"": results})[0].lows[-1], plots.speedup_lines({"": results})[0].highs[-1])
        sparse, dense = results.point(SPARSE_MS, last.round), results.point(DENSE_MS, last.round)
        if sparse and dense:
            said.append(
                f"At {last.remaining:.3g} % a training step takes {sparse.mean:.3g} ms sparse and {dense.mean:.3g} ms dense "
                f"masked: {last.mean:.2f}× (repeats from {lows:.2f}× to {highs:.2f}×)."
            )
    said.append(saved_sentence(results))
    return said


def saved_sentence(results: Results) -> str:
    """What sparse steps saved the run, as an estimate."""
    saved = results.saved()
    if not saved.stages:
        return "No training ran sparse with a sampled step time, so nothing can be said about time saved."
    whole = f"of about {duration(saved.dense_seconds)} that these would have taken dense masked"
    verb = "saved" if saved.seconds >= 0 else "lost"
    missing = f" {saved.unsampled} sparse training(s) without a sample are left out." if saved.unsampled else ""
    return (
        f"Sparse steps {verb} the {saved.stages} training(s) that used them an estimated {duration(abs(saved.seconds))} "
        f"{whole}: iterations × the difference of the sampled step times.{missing}"
    )


def comparisons(results: Results) -> list[dict[str, Any]]:
    """Tickets against the dense network and each branch: differences with intervals, and a sentence on what they show."""
    measures = (EARLY_ACCURACY, FINAL_ACCURACY, EARLY_ITERATION)
    others = [None, *(branch for branch in results.branches if branch != TICKET)]
    found = []
    for other in others:
        by_measure = {m.name: {d.round: d for d in results.differences(m, other)} for m in measures}
        rounds = sorted({number for by_round in by_measure.values() for number in by_round})
        if not rounds:
            continue
        name = "the dense network" if other is None else plots.BRANCH_NAMES.get(other, other)
        found.append(
            {
                "other": name,
                "sentence": _claim(results, name, EARLY_ACCURACY, other),
                "rows": [
                    {
                        "remaining": results.remaining(number),
                        "cells": [by_measure[m.name].get(number) for m in measures],
                    }
                    for number in rounds
                ],
            }
        )
    return found


def _claim(results: Results, name: str, measure: Measure, other: str | None) -> str:
    differences = results.differences(measure, other)
    parts = []
    for word, chosen in (
        ("above", [d for d in differences if d.low > 0]),
        ("below", [d for d in differences if d.high < 0]),
    ):
        if chosen:
            parts.append(f"{word} it at " + ", ".join(f"{d.remaining:.3g}" for d in chosen) + " % remaining")
    if not parts:
        return f"In {measure.name}, no difference between tickets and {name} is shown at any density."
    return f"In {measure.name}, tickets against {name} lie " + ", ".join(parts) + "; elsewhere no difference is shown."


def table_rows(results: Results) -> list[dict[str, Any]]:
    rows = []
    for number in results.rounds():
        for branch in results.branches:
            if not (stages := results.at(number, branch)):
                continue
            spreads = [s["timing"]["sampled"]["spread"] for s in stages if s["timing"].get("sampled")]
            measures = (EARLY_ITERATION, EARLY_ACCURACY, FINAL_ACCURACY, GAP, STEP_MS, SPARSE_MS, DENSE_MS, SPEEDUP)
            rows.append(
                {
                    "round": number,
                    "branch": plots.BRANCH_NAMES.get(branch, branch) if number else "dense network",
                    "remaining": results.remaining(number, branch),
                    "points": [results.point(measure, number, branch) for measure in measures],
                    "spread": (min(low for low, _ in spreads), max(high for _, high in spreads)) if spreads else None,
                }
            )
    return rows


def layer_rows(one: Read) -> dict[str, Any]:
    """How each layer ran in each round of the first replicate, and how much of it remained."""
    replicate = one.results.replicates[0]
    tickets = [r for number in one.results.rounds() if (r := one.results.get(replicate, number)) is not None]
    rows = [
        {
            "round": result["round"],
            "cells": [
                (result["kernels"]["layers"].get(name, "–"), 100 * layer["remaining"] / layer["weights"])
                for name in one.run.layers
                if (layer := result["layers"].get(name))
            ],
            "reason": result["kernels"].get("reason", ""),
        }
        for result in tickets
    ]
    described = {
        name: f"{'×'.join(map(str, layer['shape']))}, block {shown_setting(layer['block'])}, {100 * layer['rate']:.3g} % a round"
        for name, layer in one.run.layers.items()
    }
    return {"described": described, "rows": rows}


def _picture(name: str, title: str, caption: str, figure: Figure) -> Picture:
    return Picture(name, title, caption[0].upper() + caption[1:], plots.to_png(figure))


def _bars(results: Results) -> str:
    count = len(results.replicates)
    return f"Means over {count} replicates, bars from the lowest to the highest." if count > 1 else "One replicate."


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _shown_environment(record: Mapping[str, Any]) -> dict[str, str]:
    shown = {key: shown_setting(value) for key, value in record.items() if key != "started"}
    if "started" in record:
        shown["started"] = time.strftime("%Y-%m-%d %H:%M", time.localtime(record["started"]))
    return shown


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string((resources.files("lth") / "report.html").read_text(encoding="utf-8"))
