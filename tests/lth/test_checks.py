"""What is refused of a user's model, optimizers and step, before it goes wrong late or in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim import lr_scheduler

from tests.lth import tiny


def no_step(model: nn.Module, batch: Any) -> Tensor:
    raise AssertionError("trained")


class Scaled(nn.Module):
    """Holds a parameter of its own, and says not how to draw it anew."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.scale = nn.Linear(12, 3), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.scale


class WithNote(nn.Linear):
    def get_extra_state(self) -> str:
        return "a note"

    def set_extra_state(self, state: str) -> None: ...


def seeded() -> nn.Module:
    torch.manual_seed(3)
    return tiny.network()


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(3))


def parametrized() -> nn.Module:
    model = tiny.network()
    nn.utils.parametrizations.weight_norm(model[0])
    return model


def pruned() -> nn.Module:
    model = tiny.network()
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


def always(model: nn.Module) -> Callable[[], nn.Module]:
    return lambda: model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": always(tiny.network())}, "returned the same parameters twice"),
        ({"model": lambda: None}, "model: the function returned a NoneType"),
        ({"model": seeded, "branches": ("reinit",)}, "two draws gave equal weights, but branches with 'reinit' take"),
        ({"model": seeded, "replicates": 2}, "two draws gave equal weights, but replicates=2 take"),
        ({"model": Scaled(), "branches": ("reinit",)}, "module '' has parameters but no reset_parameters"),
        ({"model": Scaled(), "replicates": 2}, "module '' has parameters but no reset_parameters"),
        ({"model": parametrized, "replicates": 2}, "'0' is parametrized"),
        ({"model": lazy}, "model: '0.weight' has no shape yet, its module is lazy"),
        ({"model": pruned}, "model: it is pruned or sparse already"),
        ({"model": lambda: nn.Sequential(WithNote(12, 3))}, "its state holds '0._extra_state', a str"),
    ],
)
def test_a_model_that_a_search_cannot_use_is_refused_before_any_work(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        tiny.search(step=no_step, **changes)


@pytest.mark.parametrize("model", [seeded, Scaled()], ids=["seeded", "without reset_parameters"])
def test_draws_are_not_asked_for_where_none_is_needed(model: Any) -> None:
    assert len(tiny.search(model=model, branches=("random", "oneshot"))) == 2


def by_name(model: nn.Module) -> torch.optim.Optimizer:
    """A usual way to keep biases from decay, which misses weights that have another name."""
    groups = [
        {"params": [p for name, p in model.named_parameters() if name.endswith(ending)], "weight_decay": decay}
        for ending, decay in (("weight", 0.1), ("bias", 0.0))
    ]
    return torch.optim.AdamW(groups)


def by_dimensions(model: nn.Module) -> torch.optim.Optimizer:
    """Another, which sees masked and packed weights as what they are."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    return torch.optim.AdamW([{"params": matrices}, {"params": [p for p in model.parameters() if p.ndim < 2]}])


def by_size(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [p], "lr": 1 / p.shape[-1]} for p in model.parameters()], lr=0.1)


@pytest.mark.parametrize(
    ("optimizer", "kernels", "message"),
    [
        (by_name, "dense", "'0.weight', but does not train it when its layer is masked .* '0.weight_orig'; pick"),
        (by_size, "sparse", r"lr=0.08.* '0.weight', but trains \(.*lr=1.0.* when its layer is sparse .* '0.values'"),
    ],
)
def test_an_optimizer_that_loses_masked_weights_is_refused_before_any_work(
    optimizer: Any, kernels: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.search(optimizer=optimizer, kernels=kernels, step=no_step)


@pytest.mark.parametrize("optimizer", [by_dimensions, lambda model: tiny.sgd(model[0])], ids=["dimensions", "a part"])
@pytest.mark.parametrize("kernels", ["dense", "sparse"])
def test_parameters_may_be_grouped_and_left_out(optimizer: Any, kernels: str) -> None:
    assert len(tiny.search(optimizer=optimizer, kernels=kernels)) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"optimizer": lambda model: torch.optim.LBFGS(model.parameters())},
            "optimizer: step.. of LBFGS takes a clos",
        ),
        ({"optimizer": lambda model: model.parameters()}, "optimizer: the function returned a Parameter"),
        (
            {"optimizer": lambda model: tiny.adam(nn.Linear(7, 5))},
            r"it trains a parameter \(5, 7\) that is none of",
        ),
        ({"scheduler": lr_scheduler.ReduceLROnPlateau}, "scheduler: step.. of ReduceLROnPlateau takes a metrics"),
        ({"scheduler": lambda optimizer: None}, "scheduler: the function returned a NoneType"),
        ({"data": torch.utils.data.TensorDataset(torch.zeros(9, 12))}, "data: a TensorDataset; it takes tensors"),
        ({"data": [[1.0, 2.0]]}, "data: a list of list; it takes tensors"),
        ({"data": ()}, "data: a tuple; it takes tensors"),
    ],
)
def test_what_the_driver_cannot_drive_is_refused_before_any_work(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        tiny.search(step=no_step, **changes)


elsewhere = tiny.network()


def without_backward(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0]).square().mean()


def of_another_model(model: nn.Module, batch: Any) -> Tensor:
    return tiny.step(elsewhere, batch)


@pytest.mark.parametrize("step", [without_backward, of_another_model])
def test_a_step_that_would_train_nothing_is_said_at_once(step: Any) -> None:
    with pytest.raises(ValueError, match=r"step: it left no gradient in any parameter that the optimizers train"):
        tiny.search(step=step)


@pytest.mark.parametrize("returned", [None, 0.5, {}, torch.zeros(4), {"loss": 1.0}, [torch.tensor(1.0), None]])
def test_a_step_that_returns_no_losses_is_said_at_once(returned: Any) -> None:
    def step(model: nn.Module, batch: Any) -> Any:
        tiny.step(model, batch)
        return returned

    with pytest.raises(TypeError, match=r"step: it returned .*; it takes the loss, or losses, each a tensor of one"):
        tiny.search(step=step)


@pytest.mark.parametrize("returned", [None, 0.5, {"val_loss": "low"}, {"val_loss": torch.zeros(2)}])
def test_an_evaluation_that_returns_no_numbers_is_said_before_the_first_step(returned: Any) -> None:
    with pytest.raises(TypeError, match=r"evaluate: it returned .*; it takes a dict of numbers by their names"):
        tiny.search(evaluate=lambda model: returned, step=no_step)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 3)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return self.fc(x) + shift


def shifted(model: nn.Module, batch: Any) -> Tensor:
    loss = model(batch[0], batch[1][:, None]).square().mean()
    loss.backward()
    return loss


def test_an_example_that_the_model_cannot_be_called_with_is_said_before_any_work() -> None:
    search: dict[str, Any] = {"model": TwoInputs, "evaluate": None, "kernels": "auto"}
    with pytest.raises(
        TypeError, match=r"example: kernels='auto' could not call .*missing 1 required positional argum"
    ):
        tiny.search(step=no_step, **search)
    tiny.search(step=shifted, **search, example=lambda batch: (batch[0], batch[1][:, None]))
    tiny.search(step=shifted, **search, example=lambda batch: {"shift": batch[1][:, None], "x": batch[0]})
    tiny.search(step=shifted, **{**search, "kernels": "sparse"})
