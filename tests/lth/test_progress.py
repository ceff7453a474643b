"""What a run shows while it goes, and its table."""

import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.live import Live

from lth.events import Plan
from lth.plan import make_plan
from lth.progress import REFRESH, Progress, TimeLeft
from lth.results import Results
from lth.store import Stage
from lth.tables import results_table
from tests.lth.synthetic import ITERATIONS, layers_for, search_for, write_run


def clock(seconds: float) -> Callable[[], float]:
    """Goes on by so much whenever it is asked."""

    def ticks() -> Iterator[float]:
        now = 0.0
        while True:
            now += seconds
            yield now

    ticking = ticks()
    return lambda: next(ticking)


def console(terminal: bool = False, width: int = 80) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width)


def shown_run(path: Path, screen: Console, seconds: float = 0.01, **settings: Any) -> str:
    with Progress(screen, clock(seconds)) as progress:
        write_run(path, observer=progress, **settings)
    return screen.file.getvalue()  # type: ignore[attr-defined]


def planned(**settings: Any) -> Plan:
    return make_plan(search_for(**settings), layers_for(), None)


def test_elsewhere_than_on_a_terminal_it_writes_plain_lines(tmp_path):
    text = shown_run(tmp_path / "run", console(), rounds=2, replicates=2, branches=("reinit",))
    assert "\x1b" not in text and "\r" not in text
    assert "round 2 of 2, reinit, 66.3 % remain, replicate 2 of 2: from iteration 0 to 2,000; fc1: sparse 1x1" in text
    assert text.count("finished: early stop at") == 10
    assert "Estimate: sparse steps saved" in text


def test_plain_lines_come_at_most_every_few_seconds(tmp_path):
    fast = shown_run(tmp_path / "fast", console(), seconds=0.01, rounds=1)
    slow = shown_run(tmp_path / "slow", console(), seconds=20, rounds=1)
    assert fast.count("validation loss") == 0
    assert slow.count("validation loss") > 10
    assert "left" in slow


def test_the_terminal_is_drawn_rarely_and_by_no_thread(tmp_path, monkeypatch):
    drawn = []
    update = Live.update
    monkeypatch.setattr(Live, "update", lambda self, *a, **k: (drawn.append(self.auto_refresh), update(self, *a, **k)))
    asked, step = 0, 0.05

    def now() -> float:
        nonlocal asked
        asked += 1
        return asked * step

    with Progress(console(terminal=True), now) as progress:
        write_run(tmp_path / "run", observer=progress, rounds=2)
    starts = 3  # every stage is shown as it starts
    assert 3 < len(drawn) <= asked * step / REFRESH + starts
    assert not any(drawn)


def test_the_live_display_says_where_the_run_is(tmp_path):
    text = shown_run(tmp_path / "run", console(terminal=True), seconds=1, rounds=1, branches=("reinit",))
    for part in (
        "round 1 of 1, reinit, 81.3 % remain",
        "iteration 1,000 of 2,000",
        "training 3 of 3",
        "lowest",
        "ms a step",
    ):
        assert part in text


def test_an_error_leaves_the_terminal_in_order(tmp_path):
    screen = console(terminal=True)
    with pytest.raises(ZeroDivisionError), Progress(screen) as progress:
        progress.run_started(planned(), [])
        progress.stage_started(planned().stages[0], {"layers": {"fc1": "dense"}}, 0)
        raise ZeroDivisionError
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is back


def test_a_run_without_evaluations_shows_its_steps(tmp_path):
    screen, plan = console(), planned()
    with Progress(screen, clock(15)) as progress:
        progress.run_started(plan, [])
        progress.stage_started(plan.stages[0], {"layers": {"fc1": "dense"}}, 0)
        progress.stepped(plan.stages[0].stage, 100, 1.25)
    assert "iteration 100, 1.250 ms a step" in screen.file.getvalue()  # type: ignore[attr-defined]


def test_a_resumed_run_counts_what_was_done_before(tmp_path):
    run = write_run(tmp_path / "run", rounds=1)
    plan = make_plan(search_for(rounds=1), layers_for(), run.path)
    screen = console()
    with Progress(screen) as progress:
        progress.run_started(plan, [planned.stage for planned in plan.stages])
        progress.run_finished(run.path)
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "2 of 2 trainings are done already" in text
    assert "81.3" in text and "1.08×" in text


def test_a_terminal_gets_a_row_as_a_training_finishes_below_its_replicates_head(tmp_path):
    text = shown_run(tmp_path / "run", console(terminal=True, width=80), rounds=1, replicates=2)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    places = [plain.index("Replicate 1 of 2"), plain.index("Replicate 2 of 2"), plain.index("Means over 2 replicates")]
    assert places == sorted(places)
    rows = [line.rstrip() for line in plain.splitlines() if line.startswith(" 1  ")]
    assert len(rows) == 3 and len({len(row) for row in rows}) == 1, "rows of a replicate and of the means align"


def test_time_left_goes_by_the_same_round_of_another_replicate():
    plan = planned(rounds=1, replicates=2)
    left = TimeLeft(plan, {})
    first, second, third, fourth = (planned.stage for planned in plan.stages)
    assert left.seconds(first, 0, None) is None
    assert left.seconds(first, 500, 0.01) == pytest.approx(0.01 * (4 * ITERATIONS - 500))
    left.stage_finished(first, seconds=20, iterations=ITERATIONS)  # 10 ms
    left.stage_finished(second, seconds=4, iterations=ITERATIONS)  # 2 ms
    assert left.seconds(third, 1000, 0.008) == pytest.approx(0.008 * 1000 + 0.002 * ITERATIONS)
    assert left.seconds(third, 0, None) == pytest.approx(0.010 * ITERATIONS + 0.002 * ITERATIONS)
    left.stage_finished(third, seconds=20, iterations=ITERATIONS)
    assert left.seconds(fourth, ITERATIONS, 0.1) == 0


def test_time_left_of_a_resumed_run_goes_by_stored_step_times():
    plan = planned(rounds=1)
    left = TimeLeft(plan, {Stage(0, 0): {"timing": {"step_ms": 5.0}}})
    assert left.seconds(Stage(0, 1), 0, None) == pytest.approx(0.005 * ITERATIONS)


def test_the_table_holds_a_row_a_round_and_branch(tmp_path):
    run = write_run(tmp_path / "run", rounds=2, replicates=2, branches=("reinit", "oneshot"), branch_rounds=(2,))
    lines = printed(Results(stage.result() for stage in run.finished()))
    rows = [line.split() for line in lines if line.strip()[0].isdigit()]
    assert [row[:2] for row in rows] == [["0", "100"], ["1", "81.3"], ["2", "66.3"], ["2", "reinit"], ["2", "one-shot"]]
    stops = [run.stage(Stage(i, 1)).result()["early_stop"]["iteration"] for i in (0, 1)]
    assert rows[1][2] == f"{sum(stops) / 2:,.0f}"


def test_the_widest_table_fits_80_columns(tmp_path):
    run = write_run(tmp_path / "run", rounds=1, branches=("oneshot",))
    results = [stage.result() for stage in run.finished()]
    for result in results:
        result["round"] += 14
        result["early_stop"]["iteration"] = 112_000
        result["timing"]["step_ms"] = 1234.567
        result["timing"]["sampled"] = {
            "sparse_ms": 1234.567,
            "dense_ms": 9876.543,
            "speedup": 12.34,
            "spread": [12, 13],
        }
    lines = printed(Results(results))
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    assert any("15 one-shot" in line and "112,000" in line and "9877 12.34×" in line for line in lines)


def printed(results: Results) -> list[str]:
    screen = console()
    screen.print(results_table(results))
    return screen.file.getvalue().splitlines()  # type: ignore[attr-defined]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_narrow_terminal_loses_no_column_of_the_table(terminal, tmp_path):
    narrow, wide = (shown_run(tmp_path / str(width), console(terminal, width), rounds=1) for width in (40, 80))
    for text in (narrow, wide):
        last = text[text.rindex("speed") :]
        assert "-up" in last and "×" in last


def test_a_terminal_that_cannot_redraw_gets_plain_lines(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    text = shown_run(tmp_path, console(terminal=True), rounds=1)
    assert text.count("finished: early stop at") == 2
