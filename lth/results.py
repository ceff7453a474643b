"""What a run found, by round and branch over its replicates: the numbers behind tables and plots. Reads no files."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lth.store import BRANCHES, TICKET

Result = Mapping[str, Any]  # as in result.json


@dataclass(frozen=True)
class Measure:
    """A number of a finished stage; None where the stage has none."""

    name: str
    axis: str  # what stands beside an axis of it: the unit, or what has none
    of: Callable[[Result], float | None]


def _at(moment: str, key: str, scale: float = 1.0) -> Callable[[Result], float | None]:
    def of(result: Result) -> float | None:
        value = (result.get(moment) or {}).get(key)
        return None if value is None else scale * value

    return of


def _gap(result: Result) -> float | None:
    final = result.get("final") or {}
    train, test = final.get("train_accuracy_all"), final.get("test_accuracy")
    return None if train is None or test is None else 100 * (train - test)


def _sampled(key: str) -> Callable[[Result], float | None]:
    return lambda result: (result["timing"].get("sampled") or {}).get(key)


def _step_ms(result: Result) -> float | None:
    return result["timing"]["step_ms"] or None  # 0 where no step was timed


EARLY_ITERATION = Measure("early-stop iteration", "iteration", _at("early_stop", "iteration"))
EARLY_ACCURACY = Measure("test accuracy at early stop", "test accuracy (%)", _at("early_stop", "test_accuracy", 100))
FINAL_ACCURACY = Measure("test accuracy at the end", "test accuracy (%)", _at("final", "test_accuracy", 100))
GAP = Measure("train minus test accuracy at the end", "percentage points", _gap)
STEP_MS = Measure("training step as it ran", "ms", _step_ms)
SPARSE_MS = Measure("step, sparse", "ms", _sampled("sparse_ms"))
DENSE_MS = Measure("step, dense masked", "ms", _sampled("dense_ms"))
SPEEDUP = Measure("speed-up of a step over dense masked", "× dense masked", _sampled("speedup"))


@dataclass(frozen=True)
class Point:
    """A measure at one round of one branch."""

    round: int
    remaining: float  # % of the prunable weights
    values: Mapping[int, float]  # by replicate

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values.values())

    @property
    def lowest(self) -> float:
        return min(self.values.values())

    @property
    def highest(self) -> float:
        return max(self.values.values())


@dataclass(frozen=True)
class Difference:
    """Tickets minus another branch or the dense network, paired by replicate; the 95 % interval of Student's t."""

    round: int
    remaining: float
    pairs: int
    mean: float
    low: float
    high: float

    @property
    def shown(self) -> bool:
        """Whether the interval leaves 0 out. One without width, as of two equal differences, says nothing of chance."""
        return self.low < self.high and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Saved:
    """What sparse steps saved a run, estimated from the step times that were sampled side by side."""

    seconds: float
    dense_seconds: float  # what the same stages would have taken dense masked
    stages: int  # that a sample speaks for
    unsampled: int  # that ran sparse without one


class Results:
    """The results of finished stages."""

    def __init__(self, results: Iterable[Result]) -> None:
        self.all = list(results)
        self._by_stage = {(r["replicate"], r["round"], r["branch"]): r for r in self.all}

    @property
    def replicates(self) -> list[int]:
        return sorted({r["replicate"] for r in self.all})

    @property
    def branches(self) -> list[str]:
        """The ticket first."""
        return sorted({r["branch"] for r in self.all}, key=(TICKET, *BRANCHES).index)

    def rounds(self, branch: str = TICKET) -> list[int]:
        return sorted({r["round"] for r in self.all if r["branch"] == branch})

    def get(self, replicate: int, number: int, branch: str = TICKET) -> Result | None:
        return self._by_stage.get((replicate, number, branch))

    def at(self, number: int, branch: str = TICKET) -> list[Result]:
        """One round's results, by replicate."""
        return [r for replicate in self.replicates if (r := self.get(replicate, number, branch)) is not None]

    def remaining(self, number: int, branch: str = TICKET) -> float:
        """% of the prunable weights that remain; a mean, as blocks at a weight's edge make replicates differ."""
        return 100 * statistics.fmean(r["density"] for r in self.at(number, branch))

    def point(self, measure: Measure, number: int, branch: str = TICKET) -> Point | None:
        values = {r["replicate"]: value for r in self.at(number, branch) if (value := measure.of(r)) is not None}
        finite = {replicate: value for replicate, value in values.items() if math.isfinite(value)}
        return Point(number, self.remaining(number, branch), finite) if finite else None

    def points(self, measure: Measure, branch: str = TICKET) -> list[Point]:
        """The measure by round, densest first."""
        return [p for number in self.rounds(branch) if (p := self.point(measure, number, branch)) is not None]

    def differences(self, measure: Measure, other: str | None) -> list[Difference]:
        """Tickets minus `other` at each round that both have; None: minus the dense network of the same replicate.

        Rounds with fewer than two pairs are left out: they carry no interval.
        """
        found = []
        for point in self.points(measure):
            against = self.point(measure, 0) if other is None else self.point(measure, point.round, other)
            if against is None or point.round == 0:
                continue
            both = point.values.keys() & against.values.keys()
            deltas = [point.values[replicate] - against.values[replicate] for replicate in sorted(both)]
            if len(deltas) >= 2:
                mean, half = paired_interval(deltas)
                found.append(Difference(point.round, point.remaining, len(deltas), mean, mean - half, mean + half))
        return found

    def saved(self) -> Saved:
        """Iterations × (dense masked ms − sparse ms), summed over the stages; a branch goes by its ticket's sample."""
        seconds, dense_seconds, stages, unsampled = 0.0, 0.0, 0, 0
        for result in self.all:
            if not runs_sparse(result):
                continue
            ticket = self.get(result["replicate"], result["round"])
            sampled = result["timing"].get("sampled") or (ticket and ticket["timing"].get("sampled"))
            if not sampled:
                unsampled += 1
                continue
            iterations = result["iterations"] - result["start"]
            seconds += iterations * (sampled["dense_ms"] - sampled["sparse_ms"]) / 1000
            dense_seconds += iterations * sampled["dense_ms"] / 1000
            stages += 1
        return Saved(seconds, dense_seconds, stages, unsampled)


def paired_interval(differences: Sequence[float]) -> tuple[float, float]:
    """(mean, half width of the 95 % confidence interval) of at least two differences, by Student's t."""
    from scipy.special import stdtrit  # half a second to import, and few commands need it

    count = len(differences)
    return statistics.fmean(differences), float(stdtrit(count - 1, 0.975)) * statistics.stdev(differences) / count**0.5


def runs_sparse(result: Result) -> bool:
    return any(how.startswith("sparse") for how in result["kernels"]["layers"].values())


def planned_stages(settings: Mapping[str, Any]) -> int:
    """How many stages a run of these settings has."""
    grown = settings["rounds"] if settings.get("branch_rounds") is None else len(settings["branch_rounds"])
    return settings["replicates"] * (settings["rounds"] + 1 + len(settings["branches"]) * grown)


def duration(seconds: float) -> str:
    """ "45 s", "12 min", "3 h 05 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
