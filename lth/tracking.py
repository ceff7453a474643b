"""Writes a run's numbers for a tracker to show, if one is asked for. TensorBoard is the only one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lth.events import Observer, Plan, PlannedStage
from lth.results import (
    DENSE_MS,
    EARLY_ACCURACY,
    EARLY_ITERATION,
    FINAL_ACCURACY,
    GAP,
    SPARSE_MS,
    SPEEDUP,
    STEP_MS,
)
from lth.store import Stage

TRACKERS = ("tensorboard",)
BY_ROUND = {
    "early_stop/iteration": EARLY_ITERATION,
    "early_stop/test_accuracy_percent": EARLY_ACCURACY,
    "final/test_accuracy_percent": FINAL_ACCURACY,
    "final/train_minus_test_points": GAP,
    "step/ms_as_run": STEP_MS,
    "step/ms_sparse": SPARSE_MS,
    "step/ms_dense_masked": DENSE_MS,
    "step/speedup": SPEEDUP,
}


class TrackingError(RuntimeError):
    """A tracker was asked for that cannot be used; the message says what to do."""


def tracker(name: str) -> Observer:
    """The observer that writes for a tracker.

    Raises:
        ValueError: there is no such tracker.
        TrackingError: it is not installed.
    """
    if name not in TRACKERS:
        raise ValueError(f"track: {name!r}; it takes {', '.join(TRACKERS)}")
    return TensorBoard()


class TensorBoard(Observer):
    """Writes scalars below RUN/tensorboard: curves of each training over its iterations, of each branch over rounds."""

    def __init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise TrackingError(
                "track: tensorboard is not installed; `pip install 'lottery-kernels[tracking]'` brings it"
            ) from error
        self._open: Any = SummaryWriter  # it is not typed
        self._stage: Any = None

    def run_started(self, plan: Plan, finished: Sequence[Stage]) -> None:
        if plan.directory is None:
            raise TrackingError("track: the run has no folder to write to; give one")
        self._folder: Path = plan.directory / "tensorboard"

    def stage_started(self, planned: PlannedStage, kernels: Mapping[str, Any], iteration: int) -> None:
        # what a killed start wrote after the checkpoint is made again, so it is not to be shown twice
        self._stage = self._open(str(self._folder / planned.stage.folder), purge_step=iteration + 1 if iteration else 0)
        self._stage.add_scalar("weights_remaining_percent", 100 * planned.density, iteration)

    def stepped(self, stage: Stage, iteration: int, step_ms: float) -> None:
        self._stage.add_scalar("step/ms", step_ms, iteration)

    def evaluated(self, stage: Stage, record: Mapping[str, Any]) -> None:
        for name, value in record.items():
            if name != "iteration":
                split, _, number = name.partition("_")
                self._stage.add_scalar(f"{split}/{number}" if number else name, value, record["iteration"])

    def stage_finished(self, stage: Stage, result: Mapping[str, Any]) -> None:
        self._stage.close()
        folder = self._folder / f"replicate-{stage.replicate}" / f"rounds-{stage.branch}"
        writer = self._open(str(folder))
        writer.add_scalar("weights_remaining_percent", 100 * result["density"], stage.round)
        for name, measure in BY_ROUND.items():
            if (value := measure.of(result)) is not None:
                writer.add_scalar(name, value, stage.round)
        writer.close()
