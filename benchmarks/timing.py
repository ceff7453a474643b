"""Times that can be compared: taken in turns, given with their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Times:
    """Seconds per call, one entry for each turn."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def speedup_over(self, other: Times) -> Speedup:
        """How much faster this is than `other`, which took its turns beside it."""
        ratios = [theirs / ours for theirs, ours in zip(other.seconds, self.seconds, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        return Speedup(other.median / self.median, low, high)


@dataclass(frozen=True)
class Speedup:
    """Ratio of medians, and the quartiles of the ratios of single turns."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.1f}× ({self.low:.1f}–{self.high:.1f})"


def in_turns(runs: Mapping[str, Callable[[], object]], seconds: float = 1.0, least: int = 9) -> dict[str, Times]:
    """Times of each run. All take a turn before any takes its next, so that a machine's moods meet all alike.

    A turn is as many calls as fill about 3 ms, after one that is not counted: the run before it has left its own data
    in the caches, which no training loop does.
    """
    for run in runs.values():
        run()
    calls = {name: max(1, round(3e-3 / _once(run))) for name, run in runs.items()}
    kept: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or any(len(times) < least for times in kept.values()):
        for name, run in runs.items():
            run()
            start = time.perf_counter()
            for _ in range(calls[name]):
                run()
            kept[name].append((time.perf_counter() - start) / calls[name])
    return {name: Times(times) for name, times in kept.items()}


def _once(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
