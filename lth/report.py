"""`lth report`: one self-contained page about one run or several, and its pictures as PNG files beside it."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import tyro

from lth import pictures
from lth.files import DamagedFile, write_atomically
from lth.findings import comparisons, findings, layer_rows, round_rows
from lth.movement import Movement, movement
from lth.results import Results, planned_stages
from lth.store import Run, RunError

PAGE = "report.html"


@dataclass(frozen=True)
class Read:
    """A run as the report uses it."""

    label: str
    run: Run
    results: Results
    evaluations: pictures.Evaluations
    moved: Movement
    environment: Sequence[Mapping[str, Any]]


def main(arguments: Sequence[str]) -> int:
    """The command. Returns its exit status."""

    def command(runs: tyro.conf.Positional[tuple[Path, ...]], out: Path | None = None) -> int:
        """Writes a page about runs, finished or not, and its pictures.

        Args:
            runs: folders of runs; several are compared.
            out: folder for page and pictures; without it RUN/report, for several runs lth-report in this folder.
        """
        page = report(runs, out)
        pictures = page.read_text(encoding="utf-8").count("<figure ")  # the folder may hold those of earlier reports
        print(f"{page}, and its {pictures} pictures beside it")
        return 0

    return tyro.cli(command, prog="lth report", args=list(arguments))


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
        raise RunError("runs: none was given; it takes the folder of a run, or of several")
    opened = [Run.open(Path(path)) for path in paths]
    read = [_read(run, label) for run, label in zip(opened, labels(opened), strict=True)]
    folder = Path(out) if out is not None else opened[0].path / "report" if len(read) == 1 else Path("lth-report")
    compared = pictures.of_runs({one.label: one.results for one in read}) if len(read) > 1 else []
    sections = [_section(one, _prefix(number, one) if len(read) > 1 else "") for number, one in enumerate(read, 1)]
    page = _template().render(
        title="Lottery tickets: " + ", ".join(one.label for one in read),
        compared=compared,
        sections=sections,
        written=time.strftime("%Y-%m-%d %H:%M"),
    )
    drawn = [picture for section in sections for group in section["groups"] for picture in group["pictures"]]
    for picture in [*compared, *drawn]:
        write_atomically(folder / f"{picture.name}.png", picture.png)
    write_atomically(folder / PAGE, page.encode())
    return folder / PAGE


def labels(runs: Sequence[Run]) -> list[str]:
    """What tells runs apart: the settings that differ, if short, or one that does it alone, or the folder's name."""
    names = [run.path.resolve().name for run in runs]
    if len(runs) == 1:
        return names
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    differing = [key for key in keys if len({shown(key, run.settings.get(key)) for run in runs}) > 1]
    for some in (differing, *([key] for key in differing)):
        found = [", ".join(f"{key} {shown(key, run.settings.get(key))}" for key in some) for run in runs]
        if len(set(found)) == len(runs) and max(map(len, found)) <= 40:
            return found
    return names if len(set(names)) == len(runs) else [str(run.path) for run in runs]


def shown(key: str, value: Any) -> str:
    """A setting in words: a block as 16x16."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {shown(name, one)}" for name, one in value.items())
    if isinstance(value, list):
        return ("x" if key == "block" else ", ").join(map(str, value)) or "none"
    return "none" if value is None or value == "" else str(value)


def _read(run: Run, label: str) -> Read:
    try:
        stages = run.finished()
        if not stages:
            raise RunError(f"{run.path}: no training is finished yet, so there is nothing to report")
        results = Results(stage.result() for stage in stages)
        evaluations = {stage.stage: stage.evaluations() for stage in stages}
        return Read(label, run, results, evaluations, movement(run, results), run.environment())
    except FileNotFoundError as error:
        raise DamagedFile(f"{error.filename or error}".removesuffix(": missing") + ": missing") from error


def _section(one: Read, prefix: str) -> dict[str, Any]:
    """All that the page says about one run."""
    results = one.results
    groups = {
        "Accuracy and early stopping": pictures.of_accuracy(results),
        "Learning curves": pictures.of_learning(results, one.evaluations),
        "Time": pictures.of_time(results),
        "Movement from θ₀": pictures.of_movement(one.moved, results),
    }
    return {
        "label": one.label,
        "path": str(one.run.path),
        "finished": len(results.all),
        "planned": planned_stages(one.run.settings),
        "replicates": len(results.replicates),
        "findings": findings(results),
        "comparisons": comparisons(results),
        "groups": [
            {"title": title, "pictures": [replace(picture, name=prefix + picture.name) for picture in found]}
            for title, found in groups.items()
            if found
        ],
        "rounds": round_rows(results),
        "layers": {name: _shown_layer(layer, one.run.settings) for name, layer in one.run.layers.items()},
        "layer_rows": layer_rows(one.run, results),
        "settings": {key: shown(key, value) for key, value in sorted(one.run.settings.items())},
        "environment": [_shown_environment(record) for record in one.environment],
    }


def _prefix(number: int, one: Read) -> str:
    return f"{number}-{re.sub(r'[^A-Za-z0-9.]+', '-', one.label)}-"


def _shown_layer(layer: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    together = " of all layers together" if settings.get("scope") == "global" else ""
    rate = f"{100 * layer['rate']:.3g} % a round{together}"
    return f"{'×'.join(map(str, layer['shape']))}, block {shown('block', layer['block'])}, {rate}"


def _shown_environment(record: Mapping[str, Any]) -> dict[str, str]:
    words = {key: shown(key, value) for key, value in record.items() if key != "started"}
    if "started" in record:
        words["started"] = time.strftime("%Y-%m-%d %H:%M", time.localtime(record["started"]))
    return words


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string((resources.files("lth") / "report.html").read_text(encoding="utf-8"))
