"""Training steps that are recorded and replayed on a CPU, against the plain loop: equal bits, checked losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lottery_kernels import replay, sparsify
from lth.classify import Shuffled
from lth.replayed import ReplayedStep
from lth.stepper import stepper
from lth.store import Stage
from lth.train import Diverged, EagerStep, Training
from tests.lth import tiny
from tests.lth.test_cuda_graph import assert_same, bad_from, numbered, stepping, task_of, trained
from tests.lth.test_resume import StopAt


def halves(task: Any, steps: int) -> ReplayedStep:
    """After some steps of a fresh training."""
    torch.manual_seed(0)
    step = ReplayedStep(task, Training.begin(task, task.model(), 0), 3, "a test")
    for _ in range(steps):
        step()
    return step


def is_replayed(half: replay.Replayed) -> bool:
    return half.refusal is None and any(callable(seen) for seen in half._seen.values())


def test_both_halves_are_replayed() -> None:
    step = halves(task_of(), 4)
    assert is_replayed(step._half_with_gradients) and is_replayed(step._half_with_update)


def test_a_graph_is_replayed_on_a_cpu() -> None:
    task = task_of(graph=True)
    training = Training.begin(task, task.model(), 0)
    assert type(stepper(task, training, 0, "a test")) is ReplayedStep
    assert type(stepper(task_of(), training, 0, "a test")) is EagerStep


def unfused(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01)


def of_two(model: nn.Module) -> list[torch.optim.Optimizer]:
    first, *rest = model.parameters()
    return [torch.optim.SGD([first], lr=0.1, momentum=0.9), torch.optim.Adam(rest, lr=0.01, fused=True)]


def clipped(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    x, y = batch
    losses = {"fit": F.cross_entropy(model(x), y), "size": 1e-3 * sum(one.square().sum() for one in model.parameters())}
    sum(losses.values()).backward()  # type: ignore[union-attr]
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    return losses


@pytest.mark.parametrize(
    ("changes", "update_too"),
    [
        ({"optimizers": unfused}, False),  # which reads its count of steps
        ({"optimizers": of_two}, True),
        ({"step": clipped}, True),
        ({"schedulers": lambda all_: [torch.optim.lr_scheduler.OneCycleLR(all_[0], 0.1, total_steps=30)]}, False),
        ({"schedulers": lambda all_: [torch.optim.lr_scheduler.StepLR(all_[0], 8, 0.5)]}, True),
    ],
    ids=["unfused", "two optimizers", "clipped", "one cycle", "steps"],
)
def test_takes_the_path_of_the_plain_loop(changes: dict[str, Any], update_too: bool) -> None:
    task = task_of(**changes)
    assert_same(trained(EagerStep, 20, task), trained(ReplayedStep, 20, task))
    step = halves(task, 20)
    assert is_replayed(step._half_with_gradients) and is_replayed(step._half_with_update) == update_too


def test_dropout_draws_the_same_numbers() -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))

    def change(model: nn.Module) -> None:
        sparsify(model, {"0": torch.rand(16, 12) < 0.4}, when="always")

    task = task_of(model=network)
    assert_same(trained(EagerStep, 20, task, change), trained(ReplayedStep, 20, task, change))


def test_batches_of_other_sizes_and_forms_take_it_too() -> None:
    x, y = tiny.examples()

    def drawn(iteration: int, seed: int) -> Any:
        rows = torch.arange(32 - iteration % 4) + iteration
        return {"x": x[rows], "y": y[rows]} if iteration % 8 < 4 else (x[rows], y[rows])

    def step(model: nn.Module, batch: Any) -> Tensor:
        return tiny.step(model, tuple(batch.values()) if isinstance(batch, dict) else batch)

    task = task_of(batches=drawn, step=step)
    assert_same(trained(EagerStep, 50, task), trained(ReplayedStep, 50, task))


@pytest.mark.parametrize("k", [0, 2, 7])
def test_a_bad_loss_stops_before_its_update_as_in_the_plain_loop(k: int) -> None:
    task = task_of(batches=numbered, step=stepping(bad_from(k, float("inf"))))
    stopped = []
    for kind in (EagerStep, ReplayedStep):
        torch.manual_seed(0)
        stopped.append(Training.begin(task, task.model(), 0))
        step = kind(task, stopped[-1], 3, "round 4")
        with pytest.raises(Diverged, match=f"the loss is inf at step {k + 1} of round 4; stopped before the update"):
            for _ in range(12):
                step()
    assert_same(*stopped)


def test_of_several_losses_the_bad_one_is_named() -> None:
    def losses(number: int, loss: Tensor) -> dict[str, Tensor]:
        return {"fit": loss, "penalty": bad_from(6, float("nan"))(number, loss)}

    with pytest.raises(Diverged, match="loss penalty is nan at step 7 of a test"):
        trained(ReplayedStep, 12, task_of(batches=numbered, step=stepping(losses)))


def test_losses_and_gradients_that_go_with_the_form_of_a_batch() -> None:
    x, y = tiny.examples()
    seen: list[tuple[Any, ...]] = []

    def step(model: nn.Module, batch: Any) -> Any:
        if isinstance(batch, dict):
            loss = F.cross_entropy(model(batch["x"]), batch["y"])
            loss.backward()
            return {"fit": loss}
        size = model.get_parameter("0.weight").square().sum()
        size.backward()
        return [size]

    class Watched(ReplayedStep):
        def _update(self) -> None:
            seen.append(tuple(self._found))
            super()._update()

    def drawn(iteration: int, seed: int) -> Any:
        return {"x": x, "y": y} if iteration % 2 else (x,)

    task = task_of(batches=drawn, step=step)
    assert_same(trained(EagerStep, 20, task), trained(Watched, 20, task))
    assert seen == [(0,), (0, 1, 2, 3, 4, 5)] * 10
    losses = [Watched(task, Training.begin(task, task.model(), 0), 3, "a test")._gradients(drawn(i, 0)) for i in (0, 1)]
    assert [list(one) for one in losses] == [[0], ["fit"]]


def test_a_step_that_asks_for_values_is_refused_before_its_update() -> None:
    def asks(model: nn.Module, batch: Any) -> Tensor:
        loss = tiny.step(model, batch)
        assert loss.item() > 0
        return loss

    task = task_of(step=asks)
    before = trained(EagerStep, replay.CALLS_BEFORE, task)
    torch.manual_seed(0)
    training = Training.begin(task, task.model(), 0)
    step = ReplayedStep(task, training, 3, "a test")
    with pytest.raises(RuntimeError, match=r"cannot be replayed .*_local_scalar_dense.* asks for a value.*graph=False"):
        for _ in range(12):
            step()
    for one, other in zip(before.parameters, training.parameters, strict=True):
        assert torch.equal(one, other)


def test_a_step_without_gradients_is_refused() -> None:
    with pytest.raises(ValueError, match="it left no gradient in any parameter"):
        trained(ReplayedStep, 1, task_of(step=lambda model, batch: model(batch[0]).sum()))


def test_batches_hold_tensors() -> None:
    x, _ = tiny.examples()
    with pytest.raises(TypeError, match="a batch holds Tensor, int; it takes a tensor, or a tuple"):
        trained(ReplayedStep, 1, task_of(batches=lambda iteration, seed: (x, 3)))


OPTIONS: dict[str, Any] = {"iterations": 12, "rewind": 3, "rounds": 2, "data": Shuffled(tiny.examples(), 32)}


@pytest.mark.parametrize("kernels", ["dense", "sparse"])
def test_a_search_takes_the_path_of_the_plain_loop(kernels: str, tmp_path: Path) -> None:
    for graph in (False, True):
        tiny.search(out=tmp_path / str(graph), kernels=kernels, graph=graph, **OPTIONS)
    assert tiny.bits(tmp_path / "False") == tiny.bits(tmp_path / "True")


@pytest.mark.parametrize("iteration", [4, 6, 9])
def test_interrupted_it_resumes_to_the_same_bits(iteration: int, tmp_path: Path) -> None:
    options = {**OPTIONS, "graph": True, "checkpoint_seconds": 0.0, "eval_every": 1}
    tiny.search(out=tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        tiny.search(out=tmp_path / "broken", observer=StopAt(Stage(0, 1), iteration), **options)
    tiny.search(out=tmp_path / "broken", resume=True, **options)
    assert tiny.bits(tmp_path / "broken") == tiny.bits(tmp_path / "whole")
