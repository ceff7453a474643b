"""One training: batches, evaluations, seeds."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lth import classify, data, models
from lth.classify import Shuffled
from lth.events import Observer
from lth.seeds import derive, random_state, restore_random_state, seed_all
from lth.timing import LONG, fastest_threads, side_by_side, threads
from tests.lth import tiny


def test_an_epoch_draws_every_example_once_in_a_new_order() -> None:
    rows = torch.arange(12)
    batches = Shuffled([rows, -rows], 4)
    drawn = [batches(iteration, 7) for iteration in range(6)]
    epochs = [torch.cat([x for x, _ in drawn[first : first + 3]]) for first in (0, 3)]
    for epoch in epochs:
        assert torch.equal(epoch.sort().values, rows)
    assert not torch.equal(*epochs)
    assert all(torch.equal(x, -y) for x, y in drawn)


def test_batches_are_a_pure_function_of_iteration_and_seed() -> None:
    x, _ = tiny.examples()
    batches = Shuffled([x], 32)
    forward = [batches(iteration, 1)[0] for iteration in range(7)]
    assert all(torch.equal(Shuffled([x], 32)(iteration, 1)[0], forward[iteration]) for iteration in (6, 2, 4))
    assert not torch.equal(batches(0, 2)[0], forward[0])


def test_a_batch_can_be_drawn_into_tensors_that_are_there() -> None:
    x, y = tiny.examples()
    batches = Shuffled([x, y], 32)
    for iteration in range(7):
        drawn = batches(iteration, 1)
        places = [torch.empty_like(tensor) for tensor in drawn]
        batches.fill(iteration, 1, places)
        assert all(torch.equal(*pair) for pair in zip(places, drawn, strict=True))


def test_examples_that_fill_no_batch_wait_for_another_order() -> None:
    batches = Shuffled([torch.arange(10)], 4)
    assert {len(batches(iteration, 0)[0]) for iteration in range(10)} == {4}
    assert {int(row) for iteration in range(40) for row in batches(iteration, 0)[0]} == set(range(10))


def test_derived_seeds_differ_by_every_part_of_their_path() -> None:
    seeds = [
        derive(0),
        derive(1),
        derive(0, 0),
        derive(0, 1),
        derive(0, 0, "order"),
        derive(0, 0, "initial"),
        derive(1, 0),
    ]
    assert len(set(seeds)) == len(seeds)
    assert derive(0, 1, "order") == derive(0, 1, "order")
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_random_state_covers_torch_numpy_and_python() -> None:
    def draw() -> tuple[float, ...]:
        return torch.rand(()).item(), float(np.random.normal()), np.random.rand(), random.random(), random.gauss(0, 1)

    seed_all(3)
    draw()
    state = random_state()
    first = draw()
    restore_random_state(state)
    assert draw() == first


def test_evaluation_leaves_every_module_in_its_own_mode() -> None:
    modes: list[list[bool]] = []

    def frozen() -> nn.Module:
        model = tiny.network()
        model[1].eval()  # a norm that is kept frozen
        return model

    def step(model: nn.Module, batch: Any) -> Tensor:
        modes.append([module.training for module in model.modules()])
        return tiny.step(model, batch)

    def evaluate(model: nn.Module) -> dict[str, float]:
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        return {"val_loss": 1.0}

    tiny.search(model=frozen, step=step, evaluate=evaluate, rounds=0)
    assert all(mode == modes[0] for mode in modes)
    assert modes[0].count(False) == 1


def test_evaluation_does_not_change_the_path() -> None:
    often, seldom = (tiny.search(eval_every=every)[1].trained for every in (1, 6))
    assert all(torch.equal(often[name], seldom[name]) for name in seldom)


def test_the_observer_hears_the_run_in_order() -> None:
    heard: list[Any] = []

    class Listener(Observer):
        def run_started(self, plan: Any, finished: Any) -> None:
            heard.append(("run", len(plan.stages), list(finished)))

        def stage_started(self, planned: Any, kernels: Any, iteration: int) -> None:
            heard.append(("stage", planned.stage.round, iteration))

        def stepped(self, stage: Any, iteration: int, step_ms: float) -> None:
            assert step_ms > 0
            heard.append(("stepped", iteration))

        def evaluated(self, stage: Any, record: Any) -> None:
            heard.append(("evaluated", record["iteration"]))

        def stage_finished(self, stage: Any, result: Any) -> None:
            heard.append(("finished", stage.round))

        def run_finished(self, directory: Path | None) -> None:
            heard.append("over")

    tiny.search(observer=Listener(), rounds=1)
    a_stage = [("evaluated", 0), ("stepped", 3), ("evaluated", 3), ("stepped", 6), ("evaluated", 6)]
    rounds = [[("stage", n, 0), *a_stage, ("finished", n)] for n in (0, 1)]
    assert heard == [("run", 2, []), *rounds[0], *rounds[1], "over"]


def test_classification_judges_all_examples_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = tiny.examples()
    model = nn.Linear(12, 3)
    whole = classify.judge(model, data.Examples(x, y))
    monkeypatch.setattr(classify, "CHUNK", 7)
    assert classify.judge(model, data.Examples(x, y)) == pytest.approx(whole)
    assert whole[0] == pytest.approx(nn.functional.cross_entropy(model(x), y).item())
    assert whole[1] == pytest.approx((model(x).argmax(1) == y).float().mean().item())


def test_autocast_computes_in_its_type_and_judges_so_too() -> None:
    x, y = tiny.examples()
    model, seen = tiny.network(), list[torch.dtype]()
    model[0].register_forward_hook(lambda module, args, y: seen.append(y.dtype))
    loss = classify.cross_entropy_step(model, (x, y), torch.bfloat16)
    classify.judge(model, data.Examples(x, y), torch.bfloat16)
    assert seen == [torch.bfloat16, torch.bfloat16]
    assert loss.dtype == torch.float32
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_lenet_learns_the_small_mnist() -> None:
    dataset = data.load("mnist5k")
    task = classify.classification(dataset, models.NETWORKS["lenet-300-100"], 60, tiny.adam, torch.device("cpu"))
    torch.manual_seed(0)
    model = task.model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1.2e-3)
    for iteration in range(150):
        task.step(model, task.batches(iteration, 0))
        optimizer.step()
        optimizer.zero_grad()
    assert task.evaluate is not None and task.conclude is not None
    with torch.no_grad():
        numbers = task.evaluate(model)
        assert numbers["test_accuracy"] > 0.88 and numbers["val_accuracy"] > 0.88
        assert task.conclude(model)["train_accuracy_all"] > 0.92


def test_side_by_side_takes_medians_of_both() -> None:
    calls = {"sparse": 0, "dense": 0}

    def step(name: str, work: int) -> Any:
        def run() -> None:
            calls[name] += 1
            sum(range(work))

        return run

    timed = side_by_side(step("sparse", 1000), step("dense", 100_000))
    assert timed["spread"][0] <= timed["speedup"] <= timed["spread"][1]
    assert timed["dense_ms"] > timed["sparse_ms"] > 0
    assert min(calls.values()) >= 3


@pytest.fixture
def four_threads() -> Iterator[None]:
    with threads(4):
        yield


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize("best", [4, 2, 1])
def test_a_step_runs_on_the_threads_that_it_is_fastest_on(best: int) -> None:
    tried = set()

    def step() -> None:
        tried.add(torch.get_num_threads())
        time.sleep(1e-4 if torch.get_num_threads() == best else 2e-3)

    assert fastest_threads(step) == best
    assert tried == {4, 2, 1} and torch.get_num_threads() == 4


@pytest.mark.usefixtures("four_threads")
def test_a_long_step_gets_all_threads_untried() -> None:
    tried = set()

    def step() -> None:
        tried.add(torch.get_num_threads())
        time.sleep(2 * LONG)

    assert fastest_threads(step) == 4 and tried == {4}


@pytest.mark.usefixtures("four_threads")
def test_threads_are_as_before_after_an_error() -> None:
    with pytest.raises(ValueError, match="in between"), threads(2):
        assert torch.get_num_threads() == 2
        raise ValueError("in between")
    assert torch.get_num_threads() == 4
    with threads(None):
        assert torch.get_num_threads() == 4
