"""Steps that are gated on the device and captured in a CUDA graph; here on the CPU, the graph as a recording."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from lottery_kernels import SparseLinear, sparsify
from lth import cuda_graph, masked
from lth.augment import Augmented
from lth.classify import Shuffled
from lth.cuda_graph import GatedStep
from lth.events import Observer
from lth.prune import Layer, full_masks
from lth.replayed import ReplayedStep
from lth.store import Stage
from lth.train import Diverged, EagerStep, Step, Task, Training
from tests.lth import tiny
from tests.lth.recorded import RecordedStep
from tests.lth.test_resume import StopAt

RATE = 2.0**-7  # the same number in fp32, in which the device holds it
KINDS = pytest.mark.parametrize("kind", [GatedStep, RecordedStep])
KINDS_AND_REPLAYED = pytest.mark.parametrize("kind", [GatedStep, RecordedStep, ReplayedStep])
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=RATE, fused=True),
    "sgd": lambda model: torch.optim.SGD(
        model.parameters(), lr=8 * RATE, momentum=0.9, weight_decay=2.0**-10, fused=True
    ),
    "plain sgd": lambda model: torch.optim.SGD(model.parameters(), lr=8 * RATE, fused=True),
}


def task_of(**changes: Any) -> Task:
    chosen: dict[str, Any] = {
        "model": tiny.network,
        "batches": Shuffled(tiny.examples(), 32),
        "step": tiny.step,
        "optimizers": OPTIMIZERS["adam"],
    }
    chosen.update(changes)
    return Task(**chosen)


def trained(
    kind: type[Step], steps: int, task: Task, change: Callable[[nn.Module], object] = lambda model: None
) -> Training:
    """A training of a fresh model, which `change` may change, after some steps of a kind."""
    torch.manual_seed(0)
    model = task.model()
    change(model)
    training = Training.begin(task, model, 0)
    step = kind(task, training, 3, "a test")
    for _ in range(steps):
        step()
    step.check()
    return training


def assert_same(one: Training, other: Training) -> None:
    first, second = (training.state() for training in (one, other))
    assert first["iteration"] == second["iteration"] and first["schedulers"] == second["schedulers"]
    assert torch.equal(first["random"]["torch"], second["random"]["torch"])
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
    for mine, theirs in zip(first["optimizers"], second["optimizers"], strict=True):
        assert mine["state"].keys() == theirs["state"].keys()
        for parameter, state in mine["state"].items():
            for key, value in state.items():
                assert torch.equal(value, theirs["state"][parameter][key]), (parameter, key)
        for group, group_too in zip(mine["param_groups"], theirs["param_groups"], strict=True):
            assert group["lr"] == group_too["lr"]


@KINDS_AND_REPLAYED
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_takes_the_path_of_the_plain_loop(kind: type[Step], optimizer: str) -> None:
    task = task_of(optimizers=OPTIMIZERS[optimizer])
    assert_same(trained(EagerStep, 20, task), trained(kind, 20, task))


@KINDS_AND_REPLAYED
def test_sparse_layers_take_it_too(kind: type[Step]) -> None:
    def change(model: nn.Module) -> None:
        masks = {"0": torch.rand(16, 12) < 0.4, "4": torch.rand(3, 16) < 0.6}
        sparsify(model, masks, when="always")
        assert isinstance(model.get_submodule("0"), SparseLinear)

    trained(EagerStep, 1, task_of(), change)  # loads the kernels
    assert_same(trained(EagerStep, 20, task_of(), change), trained(kind, 20, task_of(), change))


@KINDS_AND_REPLAYED
def test_rates_follow_a_schedule(kind: type[Step]) -> None:
    def halved(optimizers: list[torch.optim.Optimizer]) -> list[Any]:
        return [torch.optim.lr_scheduler.StepLR(optimizers[0], 3, 0.5)]

    task = task_of(schedulers=halved)
    scheduled = trained(kind, 12, task)
    assert_same(trained(EagerStep, 12, task), scheduled)
    assert scheduled.optimizers[0].param_groups[0]["lr"] == RATE / 16
    constant = trained(kind, 12, task_of())
    assert not torch.equal(*(training.parameters[0] for training in (constant, scheduled)))


def stepping(losses: Callable[[int, Tensor], Any]) -> Callable[[nn.Module, Any], Any]:
    """A step whose losses are made of those of the tiny problem; the batch carries the number of its step."""

    def step(model: nn.Module, batch: Any) -> Any:
        x, y, number = batch
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return losses(number, loss)

    return step


def numbered(iteration: int, seed: int) -> tuple[Tensor, ...]:
    return *Shuffled(tiny.examples(), 32)(iteration, seed), torch.tensor(iteration)


def bad_from(k: int, value: float) -> Callable[[int, Tensor], Tensor]:
    """A loss that is `value` at iteration k alone."""
    return lambda number, loss: torch.where(number == k, value, loss)


@KINDS
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("k", [0, 7])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_loss_leaves_what_went_before_it(kind: type[Step], optimizer: str, k: int, value: float) -> None:
    task = task_of(batches=numbered, step=stepping(bad_from(k, value)), optimizers=OPTIMIZERS[optimizer])
    before = trained(kind, k, task)
    torch.manual_seed(0)
    after = Training.begin(task, task.model(), 0)
    step = kind(task, after, 3, "round 4")
    for _ in range(12):
        step()
    for one, other in zip(before.parameters, after.parameters, strict=True):
        assert torch.equal(one, other)
        mine, theirs = before.optimizers[0].state[one], after.optimizers[0].state[other]
        assert all(torch.equal(value, theirs[key]) for key, value in mine.items())
    with pytest.raises(Diverged, match=f"the loss is {value} at step {k + 1} of round 4; stopped before the update"):
        step.check()


@KINDS
def test_of_several_losses_the_bad_one_is_named(kind: type[Step]) -> None:
    def losses(number: int, loss: Tensor) -> dict[str, Tensor]:
        return {"fit": loss, "penalty": bad_from(2, float("inf"))(number, loss)}

    with pytest.raises(Diverged, match="loss penalty is inf at step 3 of a test"):
        trained(kind, 5, task_of(batches=numbered, step=stepping(losses)))


@KINDS
def test_the_host_looks_now_and_then(kind: type[Step], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "CHECK_EVERY", 4)
    task = task_of(batches=numbered, step=stepping(bad_from(5, float("nan"))))
    step = kind(task, Training.begin(task, task.model(), 0), 3, "a test")
    for _ in range(7):
        step()
    with pytest.raises(Diverged, match="the loss is nan at step 6 of a test"):
        step()


def test_a_recording_asks_for_no_value() -> None:
    def asks(model: nn.Module, batch: Any) -> Tensor:
        loss = tiny.step(model, batch)
        assert loss.item() > 0
        return loss

    trained(RecordedStep, 1, task_of())
    trained(GatedStep, 1, task_of(step=asks))
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        trained(RecordedStep, 1, task_of(step=asks))


def test_a_capture_leaves_no_trace() -> None:
    """Buffers, parameters, optimizer state, random numbers and the gate: as if it had not been."""
    task = task_of()
    torch.manual_seed(0)
    training = Training.begin(task, task.model(), 0)
    untouched = copy.deepcopy(training.model.state_dict())
    random = torch.get_rng_state()
    step = RecordedStep(task, training, 3, "a test")
    step.prepare()
    for name, value in training.model.state_dict().items():
        assert torch.equal(value, untouched[name]), name
    for state in training.optimizers[0].state.values():
        assert not any(value.any() for value in state.values())
    assert torch.equal(torch.get_rng_state(), random)
    step.check()
    for _ in range(20):
        step()
    assert_same(trained(EagerStep, 20, task), training)


def test_batches_of_any_make_are_copied_in() -> None:
    x, y = tiny.examples()

    def drawn(iteration: int, seed: int) -> dict[str, Tensor]:
        rows = torch.arange(32) + iteration
        return {"x": x[rows], "y": y[rows]}

    def step(model: nn.Module, batch: Any) -> Tensor:
        return tiny.step(model, (batch["x"], batch["y"]))

    task = task_of(batches=drawn, step=step)
    assert_same(trained(EagerStep, 10, task), trained(RecordedStep, 10, task))


def test_augmented_images_and_convolutions_take_it_too() -> None:
    generator = torch.Generator().manual_seed(2)
    images, labels = torch.randn(96, 3, 8, 8, generator=generator), tiny.examples()[1]

    def network() -> nn.Module:
        layers = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        return nn.Sequential(*layers, nn.Linear(8, 3))

    task = task_of(model=network, batches=Augmented(Shuffled((images, labels), 32), ("flip", "crop")))
    assert_same(trained(EagerStep, 10, task), trained(RecordedStep, 10, task))


def test_batches_that_a_recording_cannot_take() -> None:
    x, y = tiny.examples()
    shrinking = task_of(batches=lambda iteration, seed: (x[: 32 - iteration], y[: 32 - iteration]))
    with pytest.raises(ValueError, match=r"batch of iteration 1 has shapes \[\(31, 12\), \(31,\)\]; the step takes"):
        trained(RecordedStep, 2, shrinking)
    with pytest.raises(TypeError, match="a batch holds Tensor, int; it takes a tensor, or a tuple"):
        trained(RecordedStep, 1, task_of(batches=lambda iteration, seed: (x, 3)))


def test_optimizers_that_cannot_be_gated() -> None:
    with pytest.raises(
        TypeError, match=r"the optimizer is a Adam that cannot skip an update on the device.*fused=True"
    ):
        trained(GatedStep, 1, task_of(optimizers=lambda model: torch.optim.Adam(model.parameters())))
    with pytest.raises(TypeError, match="RMSprop"):
        trained(GatedStep, 1, task_of(optimizers=lambda model: torch.optim.RMSprop(model.parameters())))

    def dampened(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.1, fused=True)

    with pytest.raises(ValueError, match=r"dampening=0.1; it takes 0"):
        trained(GatedStep, 1, task_of(optimizers=dampened))


def test_a_schedule_of_what_is_compiled_in_is_refused() -> None:
    def cycled(optimizers: list[torch.optim.Optimizer]) -> list[Any]:
        return [torch.optim.lr_scheduler.OneCycleLR(optimizers[0], 0.1, total_steps=20)]

    with pytest.raises(ValueError, match=r"graph: betas of an optimizer went from .* only the learning"):
        trained(RecordedStep, 3, task_of(schedulers=cycled))


@pytest.fixture
def recorded_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lth.driver.stepper", RecordedStep)


def fused(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=RATE, fused=True)


@pytest.mark.parametrize("kernels", ["dense", "sparse"])
def test_a_search_takes_the_path_of_the_plain_loop(
    kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"optimizer": fused, "kernels": kernels, "iterations": 12, "rewind": 3, "rounds": 2}
    tiny.search(out=tmp_path / "plain", **options)
    monkeypatch.setattr("lth.driver.stepper", RecordedStep)
    tiny.search(out=tmp_path / "recorded", **options)
    assert tiny.bits(tmp_path / "plain") == tiny.bits(tmp_path / "recorded")


@pytest.mark.usefixtures("recorded_searches")
def test_interrupted_between_checkpoints_it_resumes_to_the_same_bits(tmp_path: Path) -> None:
    def scheduler(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda iteration: 0.5 ** (iteration // 5))

    options: dict[str, Any] = {"optimizer": fused, "scheduler": scheduler, "iterations": 12}
    tiny.search(out=tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        tiny.search(out=tmp_path / "broken", observer=StopAt(Stage(0, 1), 9), **options)
    tiny.search(out=tmp_path / "broken", resume=True, **options)
    assert tiny.bits(tmp_path / "broken") == tiny.bits(tmp_path / "whole")


@pytest.mark.usefixtures("recorded_searches")
@pytest.mark.parametrize("k", [1, 4])
def test_nothing_is_saved_of_a_training_that_diverged(k: int, tmp_path: Path) -> None:
    """At iteration 1 it would be the weights to rewind to, at iteration 4 an evaluation and a checkpoint."""
    seen: list[int] = []

    class Listener(Observer):
        def evaluated(self, stage: Any, record: Any) -> None:
            seen.append(record["iteration"])

    with pytest.raises(Diverged, match=f"the loss is nan at step {k + 1} of round 0 of replicate 0"):
        tiny.search(
            data=numbered,
            step=stepping(bad_from(k, float("nan"))),
            optimizer=fused,
            out=tmp_path,
            rewind=2,
            observer=Listener(),
        )
    assert seen == [0, 3][: 1 + (k > 3)]
    assert (tmp_path / "replicate-0/rewind.safetensors").exists() == (k > 2)
    assert not (tmp_path / "replicate-0/round-00/result.json").exists()


def test_in_a_graph_layers_run_sparse_where_gpu_kernels_serve_and_may_win() -> None:
    """Timed one by one, their launches would hide what they cost; whole captured steps are compared afterwards."""
    pytest.importorskip("triton")
    model = nn.Sequential(nn.Linear(784, 2048), nn.ReLU(), nn.Linear(2048, 16), nn.ReLU(), nn.Linear(16, 1024))
    blocks = {"0": (32, 32), "2": (32, 32), "4": (1, 1)}
    layers = [Layer(name, tuple(model.get_parameter(f"{name}.weight").shape), 0.5, blocks[name]) for name in blocks]
    kernels = masked.choose_kernels(model, full_masks(layers), layers, "auto", None, captured=True)
    assert kernels["layers"] == {"0": "sparse 32x32", "2": "dense masked", "4": "dense masked"}
    reasons = {name: choice["reason"] for name, choice in kernels["choices"].items()}
    assert reasons["0"] == "served by GPU kernels; whole steps were compared"
    assert "too narrow" in reasons["2"] and "block (1, 1) has no GPU kernel" in reasons["4"]


@pytest.mark.usefixtures("recorded_searches")
def test_in_a_graph_whole_captured_steps_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    real = masked.choose_kernels

    def all_sparse(*arguments: Any) -> Any:
        asked.append(arguments[5])
        return real(*arguments[:3], "sparse", None)

    def compared(sparse: Callable[[], None], dense: Callable[[], None]) -> dict[str, Any]:
        sparse(), dense()
        return {"sparse_ms": 2.0, "dense_ms": 1.0, "speedup": 0.5, "spread": [0.4, 0.6]}

    monkeypatch.setattr("lth.driver.captures", lambda task, device: task.graph)
    monkeypatch.setattr("lth.driver.choose_kernels", all_sparse)
    monkeypatch.setattr("lth.driver.side_by_side", compared)
    monkeypatch.setattr("lth.ticket.Task", lambda **given: Task(**{**given, "graph": True}))
    result = tiny.search(kernels="auto", optimizer=fused)[1].result
    assert asked == [True]
    assert set(result["kernels"]["layers"].values()) == {"dense masked"}
    assert result["kernels"]["reason"] == "a training step takes 2 ms sparse and 1 ms dense masked"


@pytest.fixture
def cuda_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of CUDA's streams and graphs, of which none is there."""
    happened: list[str] = []

    class Stream:
        def __init__(self, name: str = "side") -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            happened.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self) -> None:
            happened.append("replay")

    @contextlib.contextmanager
    def inside(of: Any) -> Iterator[None]:
        name = of.name if isinstance(of, Stream) else "capture"
        happened.append(f"begin {name}")
        yield
        happened.append(f"end {name}")

    stands_in = {"Stream": Stream, "current_stream": lambda: Stream("current"), "stream": inside, "CUDAGraph": Graph}
    for name, value in {**stands_in, "graph": inside}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return happened


def test_capture_follows_pytorchs_order(cuda_calls: list[str]) -> None:
    """Warm-up on a side stream that waits for the current one and is waited for, then the capture."""
    replay = cuda_graph.record(lambda: cuda_calls.append("work"))
    replay()
    assert cuda_calls == [
        "side waits for current",
        *("begin side", *["work"] * cuda_graph.WARM_UP, "end side"),
        "current waits for side",
        *("begin capture", "work", "end capture"),
        "replay",
    ]


def test_a_capture_meets_no_graph_that_an_earlier_forward_left(cuda_calls: list[str]) -> None:
    """Autograd's nodes in it would work on another stream than the one that is captured."""
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    prune.random_unstructured(model[0], "weight", amount=0.5)
    assert model[0].weight.grad_fn is not None
    had_graphs = []

    def work() -> None:
        had_graphs.append(model[0].weight.grad_fn is not None)
        model(torch.randn(2, 4)).sum().backward()

    cuda_graph.record(work, model)
    assert had_graphs == [False] * (cuda_graph.WARM_UP + 1)
