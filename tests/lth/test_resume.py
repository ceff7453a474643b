"""Killed or stopped at any moment and resumed, a run ends as if it had never been interrupted, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lth import files
from lth.events import Observer
from lth.store import Run, RunError, Stage
from tests.lth import tiny

ROOT = Path(__file__).parents[2]


def test_killed_at_every_write_a_dense_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    assert "equal bits" in kill_and_resume(tmp_path, "search", "dense", every=1)


def test_killed_at_writes_a_sparse_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    assert "equal bits" in kill_and_resume(tmp_path, "search", "sparse", every=17)


@pytest.mark.parametrize("kernels", ["dense", "sparse"])
def test_killed_at_writes_a_run_of_convolutions_resumes_to_the_same_bits(tmp_path: Path, kernels: str) -> None:
    """With BatchNorm, augmentation, a schedule, the global scope and exempt layers."""
    assert "equal bits" in kill_and_resume(tmp_path, "conv_search", kernels, every=23)


def kill_and_resume(folder: Path, search: str, kernels: str, every: int) -> str:
    command = [sys.executable, "-m", "tests.lth.killed_runs", folder, search, kernels, str(every)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


class StopAt(Observer):
    """Interrupts as Ctrl-C does, at an evaluation."""

    def __init__(self, stage: Stage, iteration: int) -> None:
        self.stage, self.iteration = stage, iteration

    def evaluated(self, stage: Stage, record: Any) -> None:
        if (stage, record["iteration"]) == (self.stage, self.iteration):
            raise KeyboardInterrupt


def test_interrupted_between_checkpoints_it_resumes_to_the_same_bits(tmp_path: Path) -> None:
    tiny.search(out=tmp_path / "whole", iterations=12)
    with pytest.raises(KeyboardInterrupt):
        tiny.search(out=tmp_path / "broken", iterations=12, observer=StopAt(Stage(0, 1), 9))
    tiny.search(out=tmp_path / "broken", iterations=12, resume=True)
    assert tiny.bits(tmp_path / "broken") == tiny.bits(tmp_path / "whole")


def test_a_checkpoint_continues_on_no_other_kernels_than_its_own(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        tiny.search(out=tmp_path, iterations=12, observer=StopAt(Stage(0, 1), 9))
    (tmp_path / "replicate-0/round-01/kernels.json").unlink()
    with pytest.raises(files.DamagedFile, match=r"round-01/kernels\.json: missing"):
        tiny.search(out=tmp_path, iterations=12, resume=True)


def test_a_new_process_continues_with_the_same_bits(tmp_path: Path) -> None:
    """What a process does at its first step, such as to load kernels, must not show in the bits."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = "kernels='sparse', iterations=12, optimizer=tiny.sgd"
    stopped = f"tiny.search(out={str(broken)!r}, observer=StopAt(Stage(0, 1), 9), {options})"
    in_new_process(
        f"tiny.search(out={str(whole)!r}, {options})",
        f"with pytest.raises(KeyboardInterrupt): {stopped}",
    )
    in_new_process(f"tiny.search(out={str(broken)!r}, resume=True, {options})")
    assert tiny.bits(broken) == tiny.bits(whole)


def in_new_process(*statements: str) -> None:
    program = "\n".join(
        ["import torch", "torch.set_num_threads(1)", "from tests.lth.test_resume import *", *statements]
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    tiny.search(out=tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    tiny.search(out=tmp_path, resume=True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")} == before


def test_a_checkpoint_without_its_evaluations_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        tiny.search(out=tmp_path, iterations=12, observer=StopAt(Stage(0, 0), 9))
    (tmp_path / "replicate-0/round-00/evaluations.jsonl").write_bytes(b"")
    with pytest.raises(files.DamagedFile, match=r"evaluations\.jsonl: truncated"):
        tiny.search(out=tmp_path, iterations=12, resume=True)


@pytest.mark.parametrize("name", ["mask.safetensors", "weights.safetensors", "result.json"])
@pytest.mark.parametrize("damage", ["truncated", "altered"])
def test_a_damaged_file_is_named_and_never_used(tmp_path: Path, name: str, damage: str) -> None:
    tiny.search(out=tmp_path, rounds=1)
    files.remove(tmp_path / "replicate-0/round-01/result.json")
    files.remove(tmp_path / "replicate-0/round-01/mask.safetensors")
    path = tmp_path / "replicate-0/round-00" / name
    data = bytearray(path.read_bytes())
    if damage == "altered":
        data[-10] ^= 1
    path.write_bytes(data if damage == "altered" else data[:-10])
    with pytest.raises(files.DamagedFile, match=name.replace(".", r"\.")):
        tiny.search(out=tmp_path, rounds=1, resume=True).at(0).result  # noqa: B018, reads the file


def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path) -> None:
    tiny.search(out=tmp_path)
    with pytest.raises(RunError, match="holds a run already"):
        tiny.search(out=tmp_path)


def test_a_folder_with_another_runs_settings_is_refused_by_name(tmp_path: Path) -> None:
    tiny.search(out=tmp_path)
    with pytest.raises(RunError, match="seed: 0 there, 1 here"):
        tiny.search(out=tmp_path, seed=1, resume=True)


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(RunError, match="something else than a run"):
        tiny.search(out=tmp_path)


def test_two_processes_cannot_use_one_folder(tmp_path: Path) -> None:
    class Second(Observer):
        def run_started(self, plan: Any, finished: Any) -> None:
            with pytest.raises(RunError, match="in use by another process"):
                tiny.search(out=tmp_path, resume=True)

    tiny.search(out=tmp_path, observer=Second())
    assert Run.open(tmp_path).finished()


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import os

    tiny.search(out=tmp_path / "whole", iterations=12)
    real, calls = os.write, 0

    def full(descriptor: int, data: Any) -> int:
        nonlocal calls
        calls += 1
        if calls > 12:
            real(descriptor, data[:5])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data)

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left") as raised:
            tiny.search(out=tmp_path / "full", iterations=12)
    assert str(tmp_path / "full") in str(raised.value.filename)
    assert not list((tmp_path / "full").rglob("*.tmp"))
    tiny.search(out=tmp_path / "full", iterations=12, resume=True)
    assert tiny.bits(tmp_path / "full") == tiny.bits(tmp_path / "whole")
