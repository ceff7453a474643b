"""What a search does between trainings: prune, rewind, branch, repeat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lottery_kernels import SparseLinear
from lth import Tickets
from lth.masked import dense_weights
from lth.report import report
from lth.store import RunError
from lth.train import Diverged
from tests.lth import tiny


class Watched:
    """The tiny step, noting the state in which each training starts and the batches it sees."""

    def __init__(self) -> None:
        self.starts: list[dict[str, Tensor]] = []
        self.batches: list[list[Tensor]] = []
        self._model: nn.Module | None = None

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        if model is not self._model:
            self._model = model
            self.starts.append(dense_weights(model))
            self.batches.append([])
        self.batches[-1].append(batch[0])
        return tiny.step(model, batch)


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def differ(left: dict[str, Tensor], right: dict[str, Tensor], name: str = "0.weight") -> bool:
    return not torch.equal(left[name], right[name])


def masked(weights: dict[str, Tensor], masks: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        key: w * masks[key.removesuffix(".weight")] if key.removesuffix(".weight") in masks else w
        for key, w in weights.items()
    }


def test_survivors_biases_and_buffers_rewind_to_initialisation() -> None:
    watched = Watched()
    found = tiny.search(step=watched, rounds=2)
    for number in (1, 2):
        assert_equal(watched.starts[number], masked(watched.starts[0], found[number].masks))
    assert differ(watched.starts[0], found[0].trained, "0.bias")  # training does move what is rewound
    assert differ(watched.starts[0], found[0].trained, "1.running_mean")


def test_survivors_rewind_to_an_early_iteration_and_the_batches_go_on_from_there() -> None:
    short, watched = tiny.search(iterations=4, rounds=0), Watched()
    found = tiny.search(step=watched, rewind=4, iterations=10)
    assert_equal(found[1].weights, short[0].trained)
    assert_equal(watched.starts[1], masked(short[0].trained, found[1].masks))
    assert len(watched.batches[1]) == 6
    assert all(torch.equal(a, b) for a, b in zip(watched.batches[0][4:], watched.batches[1], strict=True))


def test_every_training_has_a_fresh_optimizer() -> None:
    made: list[torch.optim.Optimizer] = []

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        made.append(tiny.adam(model))
        assert not made[-1].state
        return made[-1]

    tiny.search(optimizer=optimizer, rounds=3)
    assert sum(bool(one.state) for one in made) == 4


def test_masks_come_from_the_trained_weights_of_the_round_before() -> None:
    found = tiny.search(rounds=2)
    for number in (1, 2):
        trained, before, after = found[number - 1].trained, found[number - 1].masks, found[number].masks
        for layer, mask in after.items():
            assert not (mask & ~before[layer]).any()
            gone = before[layer] & ~mask
            assert trained[f"{layer}.weight"][mask].abs().min() >= trained[f"{layer}.weight"][gone].abs().max()
            assert int(mask.sum()) == round(mask.numel() * 0.7**number)
            assert not trained[f"{layer}.weight"][~before[layer]].any()


def test_reinit_keeps_the_mask_and_draws_anew_each_time() -> None:
    found = tiny.search(rounds=2, branches=("reinit",))
    draws = [found[0].weights] + [found.at(number, "reinit").weights for number in (1, 2)]
    assert differ(draws[0], draws[1]) and differ(draws[1], draws[2])
    for number in (1, 2):
        assert_equal(found.at(number, "reinit").masks, found[number].masks)


def test_a_random_mask_keeps_the_density_of_each_layer_and_the_weights() -> None:
    found = tiny.search(rounds=2, branches=("random",))
    for number in (1, 2):
        control, ticket = found.at(number, "random"), found[number]
        assert {k: int(m.sum()) for k, m in control.masks.items()} == {k: int(m.sum()) for k, m in ticket.masks.items()}
        assert differ(control.masks, ticket.masks, "0")
        assert_equal(control.weights, ticket.weights)


def test_one_shot_prunes_the_dense_network_to_the_same_counts() -> None:
    found = tiny.search(rounds=3, branches=("oneshot",))
    trained = found[0].trained
    for number in (1, 2, 3):
        for layer, mask in found.at(number, "oneshot").masks.items():
            assert mask.sum() == found[number].masks[layer].sum()
            assert trained[f"{layer}.weight"][mask].abs().min() >= trained[f"{layer}.weight"][~mask].abs().max()
    assert differ(found.at(3, "oneshot").masks, found[3].masks, "0")


def test_branches_grow_from_the_rounds_asked_for() -> None:
    found = tiny.search(rounds=3, branches=("reinit", "oneshot"), branch_rounds=(2,))
    branches = {(stage.stage.round, stage.stage.branch) for stage in found.run.finished()}
    assert branches == {(n, "ticket") for n in range(4)} | {(2, "reinit"), (2, "oneshot")}


def test_each_replicate_has_its_own_weights_batches_and_random_masks() -> None:
    watched = Watched()
    found = tiny.search(step=watched, replicates=2, branches=("random",))
    assert differ(watched.starts[0], watched.starts[3])
    assert not torch.equal(watched.batches[0][0], watched.batches[3][0])
    controls = [found.at(1, "random", replicate).masks["0"] for replicate in (0, 1)]
    assert not torch.equal(*controls)


def test_a_replicate_does_not_depend_on_how_many_there_are() -> None:
    one, two = tiny.search(), tiny.search(replicates=2)
    assert_equal(one[1].trained, two[1].trained)


def test_equal_seeds_give_equal_bits_and_other_seeds_others() -> None:
    first, again, other = (tiny.search(seed=seed, branches=("reinit",)) for seed in (3, 3, 4))
    assert tiny.bits(first.run.path) == tiny.bits(again.run.path)
    assert differ(first[1].trained, other[1].trained)


def test_layers_without_a_rate_are_exempt() -> None:
    found = tiny.search(rate={"0": 0.5}, rounds=2)
    assert found[2].masks.keys() == {"0"}
    assert found[2].result["density"] == 0.25
    assert found[2].trained["4.weight"].all()


def test_blocks_are_pruned_whole() -> None:
    mask = tiny.search(rate={"0": 0.5}, block=(4, 3))[1].masks["0"]
    tiles = mask.view(4, 4, 4, 3).float().mean((1, 3))
    assert sorted(set(tiles.flatten().tolist())) == [0.0, 1.0]
    assert tiles.sum() == 8


def test_the_early_stop_is_the_evaluation_of_least_validation_loss() -> None:
    losses = iter([9.0, 3.0, float("nan"), 5.0, 4.0])
    found = tiny.search(rounds=0, iterations=12, evaluate=lambda model: {"val_loss": next(losses)})
    assert found[0].result["early_stop"] == {"iteration": 3, "val_loss": 3.0}
    assert found[0].result["final"] == {"iteration": 12, "val_loss": 4.0}
    assert [record["iteration"] for record in found[0].evaluations] == [0, 3, 6, 9, 12]


def test_where_every_validation_loss_is_nan_there_is_no_early_stop() -> None:
    result = tiny.search(evaluate=lambda model: {"val_loss": float("nan")})[1].result
    assert result["early_stop"] is None and result["final"]["iteration"] == 6


def test_without_an_evaluation_there_is_no_early_stop() -> None:
    result = tiny.search(evaluate=None)[1].result
    assert result["early_stop"] is None and result["final"] is None


def test_a_loss_that_is_not_finite_stops_before_the_update_and_says_where() -> None:
    seen: list[nn.Module] = []
    before: dict[str, Tensor] = {}

    def step(model: nn.Module, batch: Any) -> Tensor:
        if model not in seen:
            seen.append(model)
            model.steps = 0  # type: ignore[assignment]
        model.steps += 1  # type: ignore[operator, assignment]
        loss = tiny.step(model, batch)
        if len(seen) == 2 and model.steps == 5:
            before.update({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
            return loss * float("inf")
        return loss

    with pytest.raises(Diverged, match=r"loss is inf at step 5 of round 1 of replicate 0; stopped before the update"):
        tiny.search(step=step)
    assert_equal(before, {name: parameter.detach() for name, parameter in seen[1].named_parameters()})


def test_one_of_several_losses_that_is_nan_is_named() -> None:
    def step(model: nn.Module, batch: Any) -> dict[str, Tensor]:
        return {"task": tiny.step(model, batch), "penalty": torch.tensor(float("nan"))}

    with pytest.raises(Diverged, match="loss penalty is nan at step 1 of round 0"):
        tiny.search(step=step)


def test_two_losses_clipping_a_scheduler_and_two_optimizers() -> None:
    rates: list[tuple[float, ...]] = []
    norms: list[float] = []

    def step(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        x, y = batch
        logits = model(x)
        task, penalty = F.cross_entropy(logits, y), 1e-3 * logits.square().mean()
        task.backward(retain_graph=True)
        penalty.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.1)))
        return task, penalty

    def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
        *body, head = [module for module in model if any(True for _ in module.parameters())]  # type: ignore[union-attr]
        return [
            torch.optim.SGD([p for module in body for p in module.parameters()], lr=0.4, momentum=0.9),
            torch.optim.Adam(head.parameters(), lr=0.1),
        ]

    def schedulers(made: list[torch.optim.Optimizer]) -> list[Any]:
        class Noted(torch.optim.lr_scheduler.StepLR):
            def step(self, epoch: int | None = None) -> None:
                super().step(epoch)
                rates.append(tuple(optimizer.param_groups[0]["lr"] for optimizer in made))

        return [Noted(made[0], 2, gamma=0.5)]

    found = tiny.search(step=step, optimizer=optimizers, scheduler=schedulers, rewind=2, rounds=1)
    per_round = [0.4, 0.4, 0.2, 0.2, 0.1, 0.1, 0.05]  # before the first step, then after each of six
    tried = 2  # made for a trial before any work, of a plain model and of a masked one
    assert [rate for rate, _ in rates[tried:]] == pytest.approx(per_round * 2)
    assert {rate for _, rate in rates} == {0.1}
    assert len(norms) == 6 + 4 and max(norms) > 0.1
    assert differ(found[1].weights, found[1].trained) and differ(found[1].weights, found[1].trained, "4.weight")


def test_a_model_that_is_given_is_the_first_replicates_start_and_is_left_alone() -> None:
    model = tiny.network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = tiny.search(model=model, replicates=2, branches=("reinit",))
    assert_equal(found[1].weights, before)
    assert_equal(model.state_dict(), before)
    assert differ(found.at(0, replicate=1).weights, before)
    assert differ(found.at(1, "reinit").weights, before)


def test_a_given_model_that_cannot_be_redrawn_asks_for_a_function() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.layer = nn.Parameter(torch.ones(1)), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * self.layer(x)

    tiny.search(model=Scaled())
    with pytest.raises(ValueError, match=r"no reset_parameters\(\); pass a function"):
        tiny.search(model=Scaled(), branches=("reinit",))


def test_data_may_be_a_function_of_the_iteration() -> None:
    x, y = tiny.examples()
    asked = []

    def batches(iteration: int, seed: int) -> tuple[Tensor, Tensor]:
        asked.append((iteration, seed))
        return x[iteration : iteration + 8], y[iteration : iteration + 8]

    tiny.search(data=batches, batch_size=None, rounds=1)
    assert [iteration for iteration, _ in asked] == [0, 1, 2, 3, 4, 5] * 2
    assert len({seed for _, seed in asked}) == 1


def test_a_planted_ticket_is_the_pruned_start() -> None:
    found = tiny.search(rounds=2)
    model = found[2].plant(tiny.network())
    assert_equal(dense_weights(model), masked(found[0].weights, found[2].masks))
    with pytest.raises(ValueError, match="model: it is pruned or sparse already; it takes a dense one"):
        found[1].plant(model)


def test_tickets_are_opened_from_the_folder_that_a_search_left(tmp_path: Path) -> None:
    found = tiny.search(rounds=2, out=tmp_path / "run", kernels="sparse")
    opened = Tickets.open(tmp_path / "run")
    assert len(opened) == 3
    models = [tickets[-1].plant(tiny.network()) for tickets in (found, opened)]
    assert isinstance(models[0][0], SparseLinear)
    assert_equal(*(dense_weights(model) for model in models))
    with pytest.raises(RunError, match="holds no run"):
        Tickets.open(tmp_path)


@pytest.mark.parametrize("kernels", ["dense", "sparse"])
def test_a_model_may_be_a_single_layer(kernels: str, tmp_path: Path) -> None:
    found = tiny.search(model=lambda: nn.Linear(12, 3), kernels=kernels, rounds=2, out=tmp_path)
    assert found[2].masks[""].sum() == round(36 * 0.7**2)
    assert found[2].result["kernels"]["layers"] == {"": "sparse 1x1" if kernels == "sparse" else "dense masked"}
    assert not found[2].trained["weight"][~found[2].masks[""]].any()
    model = found[2].plant(nn.Linear(12, 3))
    assert torch.equal(dense_weights(model)["weight"], found[2].weights["weight"] * found[2].masks[""])
    assert report([tmp_path]).exists()


def test_a_step_on_a_copy_leaves_schedules_and_batches_no_later_than_the_training() -> None:
    """Both may end with it."""
    x, y = tiny.examples()
    asked = set()

    def batches(iteration: int, seed: int) -> tuple[Tensor, Tensor]:
        asked.add(iteration)
        return x[iteration : iteration + 8], y[iteration : iteration + 8]

    def schedule(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=6)

    found = tiny.search(data=batches, batch_size=None, scheduler=schedule, kernels="sparse", iterations=6, rewind=2)
    assert found[1].result["timing"]["sampled"]["speedup"] > 0
    assert asked == set(range(6))


def test_tickets_are_counted_as_a_sequence() -> None:
    found = tiny.search(rounds=2)
    assert [ticket.stage.round for ticket in found[1:]] == [1, 2]
    assert len(found) == 3 and [ticket.stage.round for ticket in found] == [0, 1, 2]
    assert found[-1].stage.round == 2
    with pytest.raises(IndexError):
        found[3]
    with pytest.raises(KeyError, match=r"round 1 \(reinit\) of replicate 0 was not run"):
        found.at(1, "reinit")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": 1.5}, "rate: 1.5; it takes between 0 and 1"),
        ({"rate": -0.2}, "rate: -0.2"),
        ({"rounds": -1}, "rounds: -1"),
        ({"iterations": 0}, "iterations: 0"),
        ({"rewind": 6}, "rewind: 6; it takes 0 to below the 6 iterations"),
        ({"replicates": 0}, "replicates: 0"),
        ({"branches": ("again",)}, "branches: 'again'; it takes reinit, random, oneshot"),
        ({"rounds": 2.5}, "rounds: 2.5; it takes a whole number"),
        ({"iterations": 6.5}, "iterations: 6.5; it takes a whole number"),
        ({"seed": "a"}, "seed: 'a'; it takes a whole number"),
        ({"rate": "0.2"}, "rate: '0.2'; it takes a number"),
        ({"block": 4}, "block: 4; it takes two whole numbers"),
        ({"block": (2.0, 2.0)}, "block: .*; it takes two whole numbers"),
        ({"branches": "reinit"}, "branches: 'reinit'; it takes a sequence of names"),
        ({"branches": ("reinit", "reinit")}, "branches: .*; it takes each of them once"),
        ({"branches": ("reinit",), "branch_rounds": 1}, "branch_rounds: 1; it takes a sequence of whole numbers"),
        ({"branches": ("reinit",), "branch_rounds": (1, 1)}, "branch_rounds: .*; it takes each of them once"),
        ({"branches": ("reinit",), "branch_rounds": (2,)}, "branch_rounds: 2; it takes 1 to the 1 rounds"),
        ({"kernels": "fast"}, "kernels: 'fast'; it takes auto, sparse, dense"),
        ({"block": (0, 1)}, "block"),
        ({"batch_size": None}, "batch_size: None"),
        ({"batch_size": 97}, "batch: 97, but there are 96 examples"),
        ({"data": (torch.zeros(4), torch.zeros(5))}, "different lengths"),
        ({"rate": {"0": 0.9}, "rounds": 9, "block": (8, 8)}, "nothing would be left of layer '0'"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_any_work(changes: dict[str, Any], message: str) -> None:
    def untouched(model: nn.Module, batch: Any) -> Tensor:
        raise AssertionError("trained")

    with pytest.raises(ValueError, match=message):
        tiny.search(step=untouched, **changes)
