"""What a run tells while it goes. The driver calls an :class:`Observer`, in its own process, between steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lth.store import Stage


@dataclass(frozen=True)
class PlannedStage:
    """A training that the run will do."""

    stage: Stage
    density: float  # share of the prunable weights that remain, 0–1
    remaining: Mapping[str, int]  # blocks (weights where the block is 1x1) that remain, by what is ranked together
    start: int  # iteration it starts from
    iterations: int  # iteration it ends at


@dataclass(frozen=True)
class Plan:
    """All that a run will do, in order."""

    directory: Path | None
    layers: Mapping[str, Mapping[str, Any]]  # as in run.json
    stages: Sequence[PlannedStage]


class Observer:
    """Hears how a run goes. Every method does nothing here; override what is wanted."""

    def run_started(self, plan: Plan, finished: Sequence[Stage]) -> None:
        """Before the first stage; `finished` are the stages that an earlier start has done already."""

    def stage_started(self, planned: PlannedStage, kernels: Mapping[str, Any], iteration: int) -> None:
        """Before a stage's first step; `kernels` as in kernels.json, `iteration` > planned.start if it was resumed."""

    def stepped(self, stage: Stage, iteration: int, step_ms: float) -> None:
        """At every evaluation interval: iterations done, and the mean milliseconds a step since the last call."""

    def evaluated(self, stage: Stage, record: Mapping[str, Any]) -> None:
        """After an evaluation; `record` as in evaluations.jsonl."""

    def stage_finished(self, stage: Stage, result: Mapping[str, Any]) -> None:
        """After a stage; `result` as in result.json."""

    def run_finished(self, directory: Path | None) -> None:
        """After the last stage."""

    def note(self, text: str) -> None:
        """Something worth a line: where data came from, a change of threads on resume."""


class Observers(Observer):
    """Several observers as one."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def run_started(self, plan: Plan, finished: Sequence[Stage]) -> None:
        for observer in self._observers:
            observer.run_started(plan, finished)

    def stage_started(self, planned: PlannedStage, kernels: Mapping[str, Any], iteration: int) -> None:
        for observer in self._observers:
            observer.stage_started(planned, kernels, iteration)

    def stepped(self, stage: Stage, iteration: int, step_ms: float) -> None:
        for observer in self._observers:
            observer.stepped(stage, iteration, step_ms)

    def evaluated(self, stage: Stage, record: Mapping[str, Any]) -> None:
        for observer in self._observers:
            observer.evaluated(stage, record)

    def stage_finished(self, stage: Stage, result: Mapping[str, Any]) -> None:
        for observer in self._observers:
            observer.stage_finished(stage, result)

    def run_finished(self, directory: Path | None) -> None:
        for observer in self._observers:
            observer.run_finished(directory)

    def note(self, text: str) -> None:
        for observer in self._observers:
            observer.note(text)
