"""The report: what it claims, what it draws, and what it does with runs that are unfinished, damaged or several."""

import base64
import math
import re
import shutil
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import stats

from lth import pictures, plots
from lth.cli import main
from lth.files import DamagedFile
from lth.findings import findings, saved_sentence
from lth.movement import movement
from lth.report import labels, report
from lth.results import EARLY_ACCURACY, EARLY_ITERATION, Results, paired_interval, planned_stages
from lth.store import Run, RunError, Stage
from tests.lth.synthetic import search_for, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return write_run(tmp_path_factory.mktemp("runs") / "made-up", replicates=3, branches=("reinit",))


@pytest.fixture(scope="module")
def page(run: Run) -> Path:
    return report([run.path])


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves pictures empty, for tests that look at the words only."""
    monkeypatch.setattr(plots, "to_png", lambda figure: b"")


def results_of(run: Run) -> Results:
    return Results(stage.result() for stage in run.finished())


def made_up_result(replicate: int, number: int, branch: str = "ticket", **changes):
    return {
        "replicate": replicate,
        "round": number,
        "branch": branch,
        "density": 0.8**number,
        "start": 0,
        "iterations": 1000,
        "early_stop": {"iteration": 500, "test_accuracy": 0.9},
        "final": None,
        "kernels": {"layers": {"fc1": "sparse 1x1"}},
        "timing": {"seconds": 1.0, "step_ms": 1.0, "sampled": None},
        **changes,
    }


def test_the_page_carries_its_pictures_and_the_same_lie_beside_it(run, page):
    assert page == run.path / "report" / "report.html"
    text = page.read_text()
    inline = {base64.b64decode(found) for found in re.findall(r'src="data:image/png;base64,([^"]+)"', text)}
    assert inline == {path.read_bytes() for path in page.parent.glob("*.png")}
    assert {"early-accuracy", "final-accuracy", "early-iteration", "gap", "speed-up", "step-time", "movement"} <= {
        path.stem for path in page.parent.glob("*.png")
    }
    assert not re.search(r'(?:src|href)="(?!data:)', text), "the page needs something from elsewhere"


def test_the_table_shows_means_and_extremes(run, page):
    accuracies = [100 * run.stage(Stage(i, 2)).result()["early_stop"]["test_accuracy"] for i in range(3)]
    mean, low, high = (f"{value:.2f}" for value in (np.mean(accuracies), min(accuracies), max(accuracies)))
    assert f"{mean}<small>{low}–{high}</small>" in page.read_text()


def test_a_finished_run_is_not_called_unfinished(page):
    assert "not finished" not in page.read_text()


def test_pairs_of_numbers_are_a_block_only_where_they_are_one(tmp_path, undrawn):
    run = write_run(tmp_path / "run", block=(4, 4), branches=("reinit",), branch_rounds=(1, 3))
    text = report([run.path]).read_text()
    assert "<td>branch_rounds</td><td>1, 3</td>" in text and "<td>block</td><td>4x4</td>" in text


def test_a_copy_of_a_stage_beside_it_is_no_stage(tmp_path):
    run = write_run(tmp_path / "run", branches=("reinit",))
    before = run.finished()
    for name in ("round-02-backup", "round-02.old"):
        shutil.copytree(run.path / "replicate-0/round-02", run.path / "replicate-0" / name)
    assert [stage.stage for stage in run.finished()] == [stage.stage for stage in before]


def test_pictures_of_an_earlier_report_are_not_counted(tmp_path, undrawn, capsys):
    run = write_run(tmp_path / "run", stages=1)
    (run.path / "report").mkdir()
    (run.path / "report" / "other.png").touch()
    with pytest.raises(SystemExit):
        main(["report", str(run.path)])
    assert "report.html, and its 3 pictures beside it" in capsys.readouterr().out


def test_a_curve_without_a_finite_value_is_not_drawn(tmp_path, undrawn):
    run, nowhere = write_run(tmp_path / "run", stages=2), [{"iteration": 0, "val_loss": math.nan}]
    evaluations = {stage.stage: nowhere for stage in run.finished()}
    assert pictures.of_learning(results_of(run), evaluations) == []


def test_an_axis_shows_the_lines_whatever_is_0_or_far_out():
    line = plots.Line("ticket", plots.LOOKS[0], [80.0, 64.0], [2.0, 3.0], [1.0, 2.0], [4.0, 700.0])
    drawn = plots.against_remaining("Speed-up", "× dense masked", [line], floor=True)
    assert drawn.axes[0].get_ylim() == (0, pytest.approx(9.54))
    nothing = plots.Line("ticket", plots.LOOKS[0], [80.0, 64.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0])
    assert plots.against_remaining("Iteration", "iteration", [nothing], floor=True).axes[0].get_ylim() == (0, 1)


def test_an_unfinished_run_is_reported_and_called_so(tmp_path, undrawn):
    run = write_run(tmp_path / "run", branches=("reinit",), stages=4)
    text = report([run.path]).read_text()
    assert "This run is not finished" in text
    assert f"4 of its {planned_stages(run.settings)} trainings" in text


def test_a_run_of_one_stage_leaves_out_pictures_of_a_single_point(tmp_path, undrawn):
    page = report([write_run(tmp_path / "run", stages=1).path])
    names = {path.stem for path in page.parent.glob("*.png")}
    assert names == {"curves-accuracy-ticket", "curves-loss-ticket", "movement-spread"}


@pytest.mark.parametrize(
    "settings",
    [{}, {"branches": ("reinit", "random")}, {"branches": ("reinit",), "branch_rounds": (2, 3)}, {"replicates": 2}],
)
def test_planned_stages_agree_with_the_plan(tmp_path, settings):
    run = write_run(tmp_path / "run", **settings)
    assert planned_stages(run.settings) == len(run.finished())


def test_a_run_without_test_set_or_samples_is_reported(tmp_path, undrawn):
    page = report([write_run(tmp_path / "run", test_set=False, sampled=False).path])
    text = page.read_text()
    assert "Validation accuracy: ticket" in text
    assert "no saving can be stated" in text
    assert not (page.parent / "early-accuracy.png").exists()


def test_markup_in_a_name_is_text(tmp_path, undrawn):
    page = report([write_run(tmp_path / "<script>alert(1)&", stages=1).path])
    assert "<script>" not in page.read_text()


def test_errors_name_what_cannot_be_read(tmp_path):
    with pytest.raises(RunError, match=r"nowhere holds no run"):
        report([tmp_path / "nowhere"])
    unstarted = Run.create(tmp_path / "unstarted", search_for().settings(), {})
    with pytest.raises(RunError, match=r"unstarted: no training is finished"):
        report([unstarted.path])


@pytest.mark.parametrize("file", ["result.json", "evaluations.jsonl", "weights.safetensors", "mask.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_damaged_files_are_named(tmp_path, undrawn, file, damage):
    run = write_run(tmp_path / "run", rounds=1)
    path = run.stage(Stage(0, 1)).path / file
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    else:
        path.unlink()
    if (file, damage) == ("result.json", "missing"):  # that is how an unfinished stage looks
        assert "not finished" in report([run.path]).read_text()
        return
    with pytest.raises(DamagedFile, match=re.escape(str(path))):
        report([run.path])


def test_several_runs_are_laid_over_each_other(tmp_path, undrawn, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [
        write_run(tmp_path / f"run-{n}", rounds=2, block=block) for n, block in enumerate([(1, 1), (4, 4), (16, 16)])
    ]
    page = report([run.path for run in runs])
    assert page.resolve() == tmp_path / "lth-report" / "report.html"
    names = {path.stem.removeprefix("compare-") for path in page.parent.glob("compare-*.png")}
    assert names == {"early-accuracy", "final-accuracy", "early-iteration", "gap", "step-time", "speed-up"}
    assert (page.parent / "2-block-4x4-speed-up.png").exists()
    assert "block 1x1, block 4x4, block 16x16" in page.read_text()
    assert report([run.path for run in runs], tmp_path / "elsewhere").parent == tmp_path / "elsewhere"


def test_the_command_says_where_the_page_is(tmp_path, undrawn, capsys):
    run = write_run(tmp_path / "run", stages=1)
    with pytest.raises(SystemExit) as exit:
        main(["report", str(run.path), "--out", str(tmp_path / "page")])
    assert exit.value.code == 0
    assert str(tmp_path / "page" / "report.html") in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "error"), [([], "runs: none was given"), (["nowhere"], "nowhere holds no run")])
def test_the_command_explains_what_it_cannot_do(arguments, error, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["report", *arguments])
    assert exit.value.code == 1
    assert error in capsys.readouterr().err


def test_labels_are_short_and_tell_runs_apart(tmp_path):
    def described(name: str, **settings) -> Run:
        return Run(tmp_path / name, {"settings": {"data": "mnist", "rounds": 5, "block": [1, 1], **settings}})

    plain, blocks = described("a/x"), described("b/x", block=[16, 16])
    assert labels([plain]) == ["x"]
    assert labels([plain, blocks]) == ["block 1x1", "block 16x16"]
    assert labels([plain, described("b/y", note="n" * 50, block=[4, 4])]) == ["block 1x1", "block 4x4"]
    assert labels([plain, described("b/y")]) == ["x", "y"]
    assert labels([plain, described("b/x")]) == [str(tmp_path / "a/x"), str(tmp_path / "b/x")]


def test_nothing_is_claimed_with_one_replicate(tmp_path, undrawn):
    text = report([write_run(tmp_path / "run", branches=("reinit",)).path]).read_text()
    assert "No comparison of tickets with other networks is claimed" in text
    assert "Against" not in text


def test_claims_are_those_whose_interval_leaves_out_zero(run, page):
    differences = results_of(run).differences(EARLY_ACCURACY, "reinit")
    assert [d.round for d in differences] == [1, 2, 3]
    shown = [f"{d.remaining:.3g}" for d in differences if d.low > 0 and d.shown]
    assert shown, "the made-up tickets are better, so some difference should show"
    assert f"Against random reinitialisation, at early stop, tickets are more accurate at {', '.join(shown)}" in (
        page.read_text().replace("\N{NO-BREAK SPACE}", " ")
    )


def test_the_interval_is_students_over_the_pairs():
    differences = [0.3, 0.5, 0.1, 0.9]
    mean, half = paired_interval(differences)
    expected = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((expected.low, expected.high))


def test_replicates_are_paired_and_a_lone_one_is_left_out():
    early = [0.90, 0.92, 0.97]
    tickets = [made_up_result(i, 1, early_stop={"test_accuracy": value}) for i, value in enumerate(early)]
    controls = [made_up_result(i, 1, "reinit", early_stop={"test_accuracy": 0.89}) for i in (0, 1)]
    (difference,) = Results([*tickets, *controls]).differences(EARLY_ACCURACY, "reinit")
    assert (difference.pairs, difference.mean) == (2, pytest.approx(2.0))
    assert Results([*tickets, controls[0]]).differences(EARLY_ACCURACY, "reinit") == []


def test_equal_differences_are_no_evidence():
    results = [made_up_result(i, 1, early_stop={"test_accuracy": 0.5}) for i in (0, 1)]
    results += [made_up_result(i, 1, "reinit", early_stop={"test_accuracy": 0.25}) for i in (0, 1)]
    (difference,) = Results(results).differences(EARLY_ACCURACY, "reinit")
    assert (difference.mean, difference.low, difference.high) == (25, 25, 25)
    assert not difference.shown


def test_a_diverged_number_is_no_value():
    results = Results([made_up_result(0, 0, early_stop={"iteration": float("nan")}), made_up_result(1, 0)])
    point = results.point(EARLY_ITERATION, 0)
    assert point is not None and point.values == {1: 500}


def test_an_early_stop_at_the_end_is_called_a_lower_bound():
    late = made_up_result(0, 0, early_stop={"iteration": 1000, "test_accuracy": 0.9})
    assert any("In 1 of 2 trainings" in sentence for sentence in findings(Results([late, made_up_result(0, 1)])))
    assert not any("lower bound" in sentence for sentence in findings(Results([made_up_result(0, 0)])))


def test_savings_sum_over_trainings_and_a_branch_goes_by_its_ticket():
    sampled = {"sparse_ms": 1.0, "dense_ms": 3.0, "speedup": 3.0, "spread": [2.9, 3.1]}
    dense = made_up_result(0, 0, kernels={"layers": {"fc1": "dense"}})
    ticket = made_up_result(0, 1, start=100, timing={"seconds": 1, "step_ms": 1, "sampled": sampled})
    branch, lone = made_up_result(0, 1, "reinit"), made_up_result(0, 2)
    saved = Results([dense, ticket, branch, lone]).saved()
    assert (saved.seconds, saved.dense_seconds) == (pytest.approx(1.8 + 2.0), pytest.approx(2.7 + 3.0))
    assert (saved.stages, saved.unsampled) == (2, 1)
    assert "Estimate: sparse steps saved 4 s of the 6 s" in saved_sentence(saved)


def test_movement_is_measured_where_a_weight_was_last_alive(tmp_path):
    run = Run.create(tmp_path / "run", search_for(rounds=1).settings(), {"fc": {}})
    initial = torch.tensor([[1.0, -1.0, 0.0, 2.0]])
    run.save(0, "initial", {"fc.weight": initial})
    masks = [[1, 1, 1, 1], [1, 0, 1, 1]]
    trained = [[1.5, -0.75, 0.25, 1.0], [2.0, 0.0, -0.5, 1.5]]
    for number in (0, 1):
        files = run.stage(Stage(0, number))
        files.save_mask({"fc": torch.tensor([masks[number]], dtype=torch.bool)})
        files.finish({"fc.weight": torch.tensor([trained[number]])}, made_up_result(0, number))
    found = movement(run, results_of(run))
    assert [point.mean for point in found.kept] == pytest.approx([(0.5 + 0.25 + 1.0) / 3, (1.0 + 0.5 + 0.5) / 3])
    assert [point.mean for point in found.pruned] == pytest.approx([0.25])
    assert found.dropped.sum() == 1 and found.dropped[found.edges[:-1] < 0].sum() == 1  # it shrank by 0.25
    assert found.survivors.sum() + found.dropped.sum() == pytest.approx(4 * (1 - found.outside))


def rendered(figure: Figure) -> FigureCanvasAgg:
    canvas = FigureCanvasAgg(figure)
    with mpl.rc_context(plots.STYLE):
        canvas.draw()
    return canvas


@pytest.mark.parametrize("rounds", [1, 2, 15, 40])
def test_the_density_axis_falls_to_the_right_with_labels_apart(rounds):
    remaining = [100 * 0.8**n for n in range(rounds + 1)]
    lines = [plots.Line(name, plots.LOOKS[i], *[remaining] * 4) for i, name in enumerate("abcd")]
    figure = plots.against_remaining("title", "unit", lines, level=50, level_label="level")
    renderer = rendered(figure).get_renderer()
    (ax,) = figure.axes
    assert ax.get_xscale() == "log" and ax.xaxis_inverted()
    ticks = [label for label in ax.get_xticklabels() if label.get_text()]
    assert (ticks[0].get_text(), ticks[-1].get_text()) == ("100", f"{remaining[-1]:.3g}")
    boxes = [label.get_window_extent(renderer) for label in ticks]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
    (legend,) = figure.legends
    assert not legend.get_window_extent(renderer).overlaps(ax.get_tightbbox(renderer))


def test_a_collapsed_control_does_not_flatten_the_tickets():
    remaining = [100.0, 50.0, 25.0]
    ticket = plots.Line("ticket", plots.LOOKS[0], remaining, [95, 96, 95], [95, 96, 95], [95, 96, 95])
    control = plots.Line("control", plots.LOOKS[1], remaining, [95, 60, 10], [95, 60, 10], [95, 60, 10])
    figure = plots.against_remaining("title", "test accuracy (%)", [ticket, control])
    low, high = figure.axes[0].get_ylim()
    assert 80 < low < 95 and high > 96


@pytest.mark.parametrize("count", [1, 2, 6, 7, 16, 100])
def test_curves_are_few_and_span_all_rounds(count):
    chosen = plots.chosen_rounds(list(range(count)))
    assert len(set(chosen)) == len(chosen) == min(count, plots.MOST_CURVES)
    assert (chosen[0], chosen[-1]) == (0, count - 1)
