"""Shows a run while it goes: live on a terminal, in plain lines elsewhere; at the end, the table of what it found."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lth.events import Observer, Plan, PlannedStage
from lth.findings import saved_sentence
from lth.results import Result, Results, duration
from lth.store import TICKET, Run, Stage
from lth.tables import SHORT, finished_line, milliseconds, results_table

REFRESH = 0.5  # seconds between two drawings on a terminal
LINE = 10.0  # seconds between two lines elsewhere


class TimeLeft:
    """How long a plan still takes, by the time that iterations took, evaluations included.

    A stage goes by the same round and branch of another replicate, or by the same round, or by the last one measured.
    """

    def __init__(self, plan: Plan, finished: Mapping[Stage, Result]) -> None:
        self._waiting = {planned.stage: planned for planned in plan.stages if planned.stage not in finished}
        self._measured: dict[tuple[int, str], float] = {}  # seconds an iteration
        self._last: float | None = None
        for stage, result in finished.items():
            self._note(stage, result["timing"]["step_ms"] / 1000)

    def stage_finished(self, stage: Stage, seconds: float, iterations: int) -> None:
        self._waiting.pop(stage, None)
        if iterations:
            self._note(stage, seconds / iterations)

    def seconds(self, running: Stage, iteration: int, rate: float | None) -> float | None:
        """From `iteration` of a stage whose iterations take `rate` seconds so far; None while nothing is measured."""
        total = 0.0
        for stage, planned in self._waiting.items():
            measured = self._expected(stage)
            expected = rate or measured if stage == running else measured or rate
            if expected is None:
                return None
            total += expected * (planned.iterations - (iteration if stage == running else planned.start))
        return total

    def _expected(self, stage: Stage) -> float | None:
        same_round = self._measured.get((stage.round, stage.branch)) or self._measured.get((stage.round, TICKET))
        return same_round or self._last

    def _note(self, stage: Stage, rate: float) -> None:
        self._measured[stage.round, stage.branch] = self._last = rate


class Progress(Observer):
    """Shows a run on a console. Use it as a context, so that the terminal is left in order however the run ends."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console()
        self._can_redraw = self._console.is_terminal and not self._console.is_dumb_terminal
        self._clock = clock
        self._live: Live | None = None
        self._shown_at = float("-inf")
        self._planned: PlannedStage | None = None
        self._record: Mapping[str, Any] = {}
        self._lowest: tuple[float, int] | None = None  # validation loss and its iteration
        self._results: dict[Stage, Result] = {}
        self._headed: int | None = None  # the replicate whose table has begun

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def run_started(self, plan: Plan, finished: Sequence[Stage]) -> None:
        self._plan = plan
        if plan.directory is not None and finished:
            run = Run.open(plan.directory)
            self._results = {stage: run.stage(stage).result() for stage in finished}
            self._print(f"{len(finished)} of {len(plan.stages)} trainings are done already")
        self._time_left = TimeLeft(plan, self._results)
        if self._can_redraw and len(finished) < len(plan.stages):
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()

    def stage_started(self, planned: PlannedStage, kernels: Mapping[str, Any], iteration: int) -> None:
        self._planned, self._kernels, self._record, self._lowest = planned, kernels, {}, None
        self._iteration = iteration
        self._step_ms: float | None = None
        self._began, self._began_at = self._clock(), iteration
        self._shown_at = float("-inf") if self._live else self._clock()
        if not self._live:
            self._print(f"{self._where()}: from iteration {iteration:,} to {planned.iterations:,}; {self._how()}")
        self._show()

    def stepped(self, stage: Stage, iteration: int, step_ms: float) -> None:
        self._iteration, self._step_ms = iteration, step_ms
        if not self._record:  # else the evaluation that follows shows it
            self._show()

    def evaluated(self, stage: Stage, record: Mapping[str, Any]) -> None:
        self._record, self._iteration = record, record["iteration"]
        loss = record.get("val_loss")
        if loss is not None and (self._lowest is None or loss < self._lowest[0]):
            self._lowest = loss, record["iteration"]
        self._show()

    def stage_finished(self, stage: Stage, result: Mapping[str, Any]) -> None:
        self._results[stage] = result
        self._time_left.stage_finished(stage, self._clock() - self._began, self._iteration - self._began_at)
        if self._live:
            first = stage.replicate != self._headed
            self._headed = stage.replicate
            title = f"Replicate {stage.replicate + 1} of {self._replicates()}" if self._replicates() > 1 else None
            self._print_table(results_table(Results([result]), title=title if first else None, header=first))
        else:
            self._print(f"  finished: {finished_line(result)}")

    def run_finished(self, directory: Path | None) -> None:
        self._stop()
        results = Results(self._results.values())
        count = len(results.replicates)
        self._print_table(results_table(results, title=f"Means over {count} replicates" if count > 1 else None))
        self._console.print(saved_sentence(results.saved()), highlight=False)

    def note(self, text: str) -> None:
        self._print(text)

    def _stop(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def _print(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=not self._console.is_terminal)

    def _print_table(self, table: Table) -> None:
        self._console.print(table, crop=False)  # a narrower terminal wraps its rows, where columns would be lost

    def _show(self) -> None:
        now = self._clock()
        if now - self._shown_at < (REFRESH if self._live else LINE):
            return
        self._shown_at = now
        if self._live:
            self._live.update(self._drawing(), refresh=True)
        else:
            parts = [f"  iteration {self._iteration:,}", *self._numbers(), self._left()]
            self._print(", ".join(part for part in parts if part))

    def _drawing(self) -> RenderableType:
        assert self._planned is not None
        bars = Table.grid(padding=(0, 1), expand=True)
        bars.add_column(no_wrap=True)
        bars.add_column(ratio=1)
        bars.add_column(no_wrap=True)
        start, end = self._planned.start, self._planned.iterations
        bars.add_row(
            "training", _bar(self._iteration - start, end - start), f"iteration {self._iteration:,} of {end:,}"
        )
        done, total = len(self._results), len(self._plan.stages)
        whole = done + (self._iteration - start) / max(end - start, 1)
        bars.add_row("run", _bar(whole, total), f"training {done + 1} of {total}, {self._left() or '…'}")
        numbers = self._numbers()
        lines: list[RenderableType] = [Text(self._where(), style="bold"), Text(self._how(), style="dim"), bars]
        lines += [Text("   ".join(numbers[i : i + 2])) for i in range(0, len(numbers), 2)]
        return Group(*lines)

    def _where(self) -> str:
        assert self._planned is not None
        stage, stages = self._planned.stage, self._plan.stages
        parts = [f"round {stage.round} of {max(planned.stage.round for planned in stages)}"]
        if stage.branch != TICKET:
            parts.append(SHORT[stage.branch])
        parts.append(f"{100 * self._planned.density:.3g} % remain")
        if self._replicates() > 1:
            parts.append(f"replicate {stage.replicate + 1} of {self._replicates()}")
        return ", ".join(parts)

    def _replicates(self) -> int:
        return max(planned.stage.replicate for planned in self._plan.stages) + 1

    def _how(self) -> str:
        """Which layers run sparse, and on how many threads if not on all."""
        layers = self._kernels["layers"]
        ways: dict[str, list[str]] = {}
        for name, way in layers.items():
            ways.setdefault(way, []).append(name)
        said = {way: ", ".join(names) if len(names) <= 4 else f"{len(names)} layers" for way, names in ways.items()}
        parts = [f"{names}: {way}" for way, names in said.items()]
        threads = self._kernels.get("threads")
        if threads is not None and threads < torch.get_num_threads():
            parts.append(f"on {threads} thread{'s' if threads > 1 else ''}")
        return "; ".join(parts)

    def _numbers(self) -> list[str]:
        record, said = self._record, []
        if "val_loss" in record and self._lowest:
            loss, iteration = self._lowest
            said.append(f"validation loss {record['val_loss']:.4f} (lowest {loss:.4f} at {iteration:,})")
        if "train_loss" in record:
            said.append(f"training loss {record['train_loss']:.4f}")
        accuracies = [
            f"{word} {100 * record[key]:.2f} %"
            for key, word in (("val_accuracy", "validation"), ("test_accuracy", "test"))
            if key in record
        ]
        if accuracies:
            said.append(f"accuracy {', '.join(accuracies)}")
        if self._step_ms is not None:
            said.append(f"{milliseconds(self._step_ms)} ms a step")
        return said

    def _left(self) -> str:
        done = self._iteration - self._began_at
        rate = (self._clock() - self._began) / done if done else None
        assert self._planned is not None
        seconds = self._time_left.seconds(self._planned.stage, self._iteration, rate)
        return "" if seconds is None else f"{duration(seconds)} left"


def _bar(completed: float, total: float) -> ProgressBar:
    return ProgressBar(total=max(total, 1), completed=completed, complete_style="cyan", finished_style="cyan")
