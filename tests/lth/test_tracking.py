"""What a tracker is told."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from lth.cli import main
from lth.events import Observers, Plan
from lth.plan import make_plan
from lth.progress import Progress
from lth.store import Stage
from lth.tracking import TrackingError, tracker
from tests.lth.synthetic import ITERATIONS, layers_for, search_for, write_run

Written = dict[str, dict[str, dict[int, float]]]  # by folder, name and step


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Written:
    """Stands in for TensorBoard's writer and keeps what it is given."""
    found: Written = {}

    class SummaryWriter:
        def __init__(self, log_dir: str, purge_step: int | None = None) -> None:
            self.scalars = found.setdefault(str(Path(log_dir).relative_to(tmp_path / "run" / "tensorboard")), {})
            self.open = True
            for values in self.scalars.values():
                for step in [step for step in values if purge_step is not None and step >= purge_step]:
                    del values[step]

        def add_scalar(self, name: str, value: float, step: int) -> None:
            assert self.open
            self.scalars.setdefault(name, {})[step] = value

        def close(self) -> None:
            self.open = False

    module: Any = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return found


def test_without_tensorboard_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        TrackingError, match=r"tensorboard is not installed; `pip install 'lottery-kernels\[tracking\]'`"
    ):
        tracker("tensorboard")


def test_an_unknown_tracker_is_refused_before_any_work(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        main(["run", "--track", "elsewhere"])
    assert exit.value.code == 1
    assert "track: 'elsewhere'; it takes tensorboard" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_every_training_has_its_curves_and_every_branch_its_rounds(tmp_path, written):
    run = write_run(tmp_path / "run", rounds=2, branches=("reinit",), observer=tracker("tensorboard"))
    rounds = {"replicate-0/rounds-ticket", "replicate-0/rounds-reinit"}
    assert set(written) == rounds | {stage.stage.folder for stage in run.finished()}
    evaluations = run.stage(Stage(0, 1)).evaluations()
    assert written["replicate-0/round-01"]["val/loss"] == {r["iteration"]: r["val_loss"] for r in evaluations}
    assert set(written["replicate-0/round-01"]) > {"test/accuracy", "train/loss", "step/ms"}
    assert sorted(written["replicate-0/rounds-ticket"]["weights_remaining_percent"]) == [0, 1, 2]
    assert sorted(written["replicate-0/rounds-ticket"]["step/speedup"]) == [1, 2]
    assert sorted(written["replicate-0/rounds-reinit"]["early_stop/iteration"]) == [1, 2]


def test_what_a_resumed_training_does_again_is_shown_once(tmp_path, written):
    plan: Plan = make_plan(search_for(rounds=0), layers_for(), tmp_path / "run")
    (planned,) = plan.stages
    for start in (0, 200):  # killed after 300, resumed from the checkpoint at 200
        observer = tracker("tensorboard")
        observer.run_started(plan, [])
        observer.stage_started(planned, {}, start)
        for iteration in range(start + 100 if start else 0, 301 if not start else 501, 100):
            observer.evaluated(planned.stage, {"iteration": iteration, "val_loss": float(start)})
    losses = written["replicate-0/round-00"]["val/loss"]
    assert losses == {0: 0.0, 100: 0.0, 200: 0.0, 300: 200.0, 400: 200.0, 500: 200.0}


def test_a_run_without_a_folder_is_refused(written):
    with pytest.raises(TrackingError, match="no folder"):
        tracker("tensorboard").run_started(make_plan(search_for(), layers_for(), None), [])


def test_several_observers_hear_everything(tmp_path, written, capsys):
    with Progress() as progress:
        both = Observers(progress, tracker("tensorboard"))
        both.note("a word before")
        write_run(tmp_path / "run", rounds=1, observer=both)
    text = capsys.readouterr().out
    assert "a word before" in text and "Estimate" in text
    assert written["replicate-0/round-01"]["val/loss"][ITERATIONS] > 0


def test_tensorboard_itself_reads_what_was_written(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = write_run(tmp_path / "run", rounds=1, observer=tracker("tensorboard"))
    read = accumulator.EventAccumulator(str(run.path / "tensorboard" / "replicate-0" / "round-01"))
    read.Reload()
    evaluations = run.stage(Stage(0, 1)).evaluations()
    assert [s.step for s in read.Scalars("val/loss")] == [record["iteration"] for record in evaluations]
    assert [s.value for s in read.Scalars("val/loss")] == pytest.approx([r["val_loss"] for r in evaluations])
