"""Replayed functions against the same functions called as they are: equal bits, and what cannot be replayed is not."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from lottery_kernels import Replayed, SparseLinear, densify, sparsify
from lottery_kernels.replay import CALLS_BEFORE, PROGRAMS, Recorder

CALLS = CALLS_BEFORE + 4


def sparse(model: nn.Module, block: tuple[int, int] = (1, 1)) -> nn.Module:
    """Half of every weight but the last's pruned, and run sparse."""
    layers = [(name, layer.weight) for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    masks = {name: torch.rand_like(weight) < 0.5 for name, weight in layers[:-1]}
    return sparsify(model, masks, block, when="always")


def lenet() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 12), nn.ReLU(), nn.Linear(12, 5))


def images() -> nn.Module:
    convolutions = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)
    return nn.Sequential(nn.Unflatten(1, (1, 4, 5)), *convolutions, nn.Conv2d(8, 4, 2), nn.Flatten(), nn.Linear(4, 5))


def dropped() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 16), nn.Dropout(0.5), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 5))


def masked() -> nn.Module:
    model = lenet()
    prune.random_unstructured(model.get_submodule("0"), "weight", amount=0.5)
    return model


class Recurrent(nn.Module):
    """Reads the 20 features four at a time, and attends to what it read."""

    def __init__(self) -> None:
        super().__init__()
        self.reader, self.attention = nn.GRU(4, 8, batch_first=True), nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        read = self.reader(x.unflatten(1, (5, 4)))[0]
        return self.out(self.attention(read, read, read, need_weights=False)[0].mean(1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "dense": lenet,
    "dense masked": masked,
    "sparse": lambda: sparse(lenet()),
    "sparse, blocks": lambda: sparse(lenet(), (4, 4)),
    "images": images,
    "sparse images": lambda: sparse(images()),
    "dropout": dropped,
    "sparse, dropout": lambda: sparse(dropped()),
    "recurrent": Recurrent,
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-2, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3, nesterov=True),
    "adam, not fused": lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
}


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[Tensor, Tensor], Tensor]:
    def step(x: Tensor, target: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def batches(count: int = CALLS, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(size, 20, generator=generator), torch.randint(5, (size,), generator=generator))
        for _ in range(count)
    ]


def assert_same_training(
    model: nn.Module, optimizer: Callable[[Any], torch.optim.Optimizer], given: list[tuple[Tensor, Tensor]]
) -> Replayed:
    """Trains two copies, one of them replayed."""
    with torch.no_grad():
        model(given[0][0])  # so that a masked weight is left without a gradient graph, which cannot be copied
    twin = copy.deepcopy(model)
    plain, replayed = (training_step(one, optimizer(one.parameters())) for one in (model, twin))
    replayed = Replayed(replayed)
    for number, (x, target) in enumerate(given):
        torch.manual_seed(number)
        expected = plain(x, target)
        torch.manual_seed(number)
        assert torch.equal(replayed(x, target), expected), number
    for (name, value), other in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    return replayed


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("model", MODELS)
def test_training_takes_the_same_path(model: str, optimizer: str) -> None:
    torch.manual_seed(0)
    replayed = assert_same_training(MODELS[model](), OPTIMIZERS[optimizer], batches())
    assert replayed.refusal is None


def test_what_is_not_replayed_is_right_too() -> None:
    """An Adam that is not fused reads its count of steps: every call runs as it is."""
    torch.manual_seed(0)
    replayed = assert_same_training(lenet(), OPTIMIZERS["adam, not fused"], batches())
    assert replayed.refusal is not None and "_local_scalar_dense" in replayed.refusal


def test_other_inputs_begin_anew() -> None:
    torch.manual_seed(0)
    given = [*batches(), *batches(CALLS, 7), *batches()]
    assert_same_training(sparse(lenet()), OPTIMIZERS["adam"], given)


def counted(function: Callable[..., Any]) -> tuple[Callable[..., Any], list[int]]:
    """A function and how often Python ran it."""
    calls: list[int] = []

    def counting(*inputs: Tensor) -> Any:
        calls.append(1)
        return function(*inputs)

    return counting, calls


def test_python_runs_three_times_for_a_kind_of_input() -> None:
    function, calls = counted(lambda x: x * 2)
    replayed = Replayed(function)
    kinds = [torch.ones(3), torch.ones(4), torch.ones(3, dtype=torch.float64), torch.ones(4, 4)[:, 0]]
    for x in kinds * CALLS:
        assert torch.equal(replayed(x), x * 2)
    assert len(calls) == len(kinds) * (CALLS_BEFORE + 1)


def test_kinds_without_end_take_no_memory_without_end() -> None:
    replayed = Replayed(lambda x: x + 1)
    for size in range(3 * PROGRAMS):
        for _ in range(CALLS):
            assert replayed(torch.zeros(size)).shape == (size,)
    assert len(replayed._seen) <= PROGRAMS


@pytest.mark.parametrize("requires_grad", [False, True])
def test_one_tensor_given_twice_is_another_kind_than_two(requires_grad: bool) -> None:
    replayed = Replayed(lambda x, y: (x - y).detach())
    one, other = (torch.full((2,), value, requires_grad=requires_grad) for value in (1.0, 3.0))
    for _ in range(CALLS):
        assert replayed(one, one).tolist() == [0, 0]
    for _ in range(CALLS):
        assert replayed(other, one).tolist() == [2, 2]


def test_an_input_that_is_reached_otherwise_too_is_not_replayed() -> None:
    first = torch.ones(2)
    replayed = Replayed(lambda x: x + first)
    for given in [first] * CALLS + [torch.full((2,), 5.0)] * CALLS:
        assert torch.equal(replayed(given), given + first)
    assert replayed.refusal is not None and "neither an input nor" in replayed.refusal


def test_a_key_tells_of_what_python_decides() -> None:
    factor = 2.0
    replayed = Replayed(lambda x: x * factor, key=lambda: factor)
    for factor in [2.0] * CALLS + [3.0] * CALLS + [2.0] * CALLS:
        assert replayed(torch.ones(2)).tolist() == [factor, factor]


def test_a_schedule_that_is_stepped_in_every_call_is_not_replayed() -> None:
    model, twin = lenet(), lenet()
    twin.load_state_dict(model.state_dict())
    losses = []
    for one, wrap in ((model, lambda step: step), (twin, Replayed)):
        optimizer = OPTIMIZERS["sgd"](one.parameters())
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
        training = training_step(one, optimizer)

        def step(x: Tensor, target: Tensor, training: Any = training, schedule: Any = schedule) -> Tensor:
            loss = training(x, target)
            schedule.step()
            return loss

        step = wrap(step)
        losses.append([step(*batch) for batch in batches(20)])
    assert torch.equal(*map(torch.stack, losses))


def test_gradients_on_and_off_are_two_kinds() -> None:
    weight = nn.Parameter(torch.ones(2))

    def function(x: Tensor) -> Tensor:
        return x * weight + torch.is_grad_enabled()

    replayed = Replayed(function)
    for enabled in [True] * CALLS + [False] * CALLS + [True] * CALLS:
        with torch.set_grad_enabled(enabled):
            assert replayed(torch.ones(2)).tolist() == [1 + enabled] * 2


def rewired(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Another mask of as many weights: no shape tells of it."""
    layer = model.get_submodule("0")
    assert isinstance(layer, SparseLinear)
    layer.set_mask(layer.mask.roll(1, 1), optimizer)


def reloaded(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    state = {name: value.roll(1, -1) for name, value in model.state_dict().items()}
    model.load_state_dict(state)


def densified(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    densify(model, optimizer)


def rescheduled(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Another rate, the second time the first one again."""
    group = optimizer.param_groups[0]
    group["lr"] = 1e-3 if group["lr"] == 1e-2 else 1e-2


def restored(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    state = copy.deepcopy(optimizer.state_dict())
    for one in state["state"].values():
        one["exp_avg"].zero_()
    optimizer.load_state_dict(state)


def regrouped(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.add_param_group({"params": [optimizer.param_groups[0]["params"].pop()], "lr": 1e-3})


@pytest.mark.parametrize("exchange", [rewired, reloaded, densified, rescheduled, restored, regrouped])
def test_what_is_exchanged_between_calls_is_recorded_anew(exchange: Callable[..., None]) -> None:
    torch.manual_seed(0)
    model = sparse(lenet())
    twin = copy.deepcopy(model)
    optimizers = [OPTIMIZERS["adam"](one.parameters()) for one in (model, twin)]
    plain, (step, calls) = training_step(model, optimizers[0]), counted(training_step(twin, optimizers[1]))
    replayed = Replayed(step)
    for number, (x, target) in enumerate(batches(3 * CALLS)):
        if number % CALLS == CALLS - 1 and not (exchange is densified and number > CALLS):
            exchange(model, optimizers[0]), exchange(twin, optimizers[1])
        assert torch.equal(plain(x, target), replayed(x, target)), number
    for (name, value), other in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    assert replayed.refusal is None and len(calls) <= 3 * (CALLS_BEFORE + 1) + 1


def test_a_sparse_net_is_recorded_fused() -> None:
    """Under a recorder the same operators are chosen as without one."""
    torch.manual_seed(0)
    x = batches()[0][0]
    net, pictures = sparse(lenet()), sparse(images())
    for model, operators in ((net, ["mlp_forward"]), (pictures, ["batch_norm", "max_pool2d"])):
        model(x)
        recorder = Recorder((x,))
        with recorder:
            y = model(x)
        source = recorder.program(y).source  # type: ignore[attr-defined]
        assert all(f"lottery_kernels_{operator}_default(" in source for operator in operators), source


def same_for(function: Callable[..., Any], *inputs: Tensor) -> Replayed:
    """Calls a function, replayed, with inputs that differ from call to call."""
    replayed = Replayed(function)
    for number in range(CALLS):
        given = [tensor + number for tensor in inputs]
        torch.manual_seed(number)
        expected = function(*(tensor.clone() for tensor in given))
        torch.manual_seed(number)
        torch.testing.assert_close(replayed(*given), expected, rtol=0, atol=0)
    return replayed


def test_results_of_any_form() -> None:
    assert (
        same_for(lambda x, y: {"a": [x + y, (x,)], "b": x.sum(), "c": None}, torch.ones(3), torch.ones(3)).refusal
        is None
    )
    assert same_for(lambda x: x.split(1), torch.ones(3)).refusal is None
    assert same_for(lambda x: x.chunk(1), torch.ones(3)).refusal is None
    assert same_for(lambda x: torch.stack(torch._foreach_mul([x, x + 1], 2.0)), torch.ones(3)).refusal is None


def test_writes_and_views() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        y = x.clone()
        y[1:].add_(1)
        y.view(-1)[0] = 5.0
        torch.mul(x[2:], 2, out=y[:2])
        return y.t(), x.data, y.data

    assert same_for(function, torch.ones(4, 3)).refusal is None


def test_tensors_made_from_numbers_are_made_anew() -> None:
    def function(x: Tensor) -> Tensor:
        total = torch.tensor(1.0)
        total += x.sum()
        return total + torch.tensor([1.0, 2.0])

    assert same_for(function, torch.ones(3)).refusal is None


def test_tensors_made_from_numbers_are_told_from_results_whose_place_they_take() -> None:
    def function(x: Tensor) -> Tensor:
        for number in range(100):
            x = x * 2 + torch.tensor(float(number))
        return x

    assert same_for(function, torch.ones(3, dtype=torch.float64)).refusal is None


def test_random_numbers_come_from_the_generator_in_the_same_order() -> None:
    assert (
        same_for(lambda x: F.dropout(x, 0.5) + torch.rand(100) + torch.randn_like(x), torch.ones(100)).refusal is None
    )


def test_gradients_that_two_parameters_share_stay_two() -> None:
    first, second = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))

    def function(x: Tensor) -> list[Tensor]:
        first.grad = second.grad = None
        ((first + second) * x).sum().backward()
        assert first.grad is not None and second.grad is not None
        first.grad.mul_(2)
        return [first.grad, second.grad]

    assert same_for(function, torch.ones(3)).refusal is None


def test_gradients_that_are_kept_add_up() -> None:
    parameters = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    plain, replayed = ((lambda x, of=of: (of * x).sum().backward()) for of in parameters)
    replayed = Replayed(replayed)
    for number in range(CALLS):
        plain(torch.full((3,), float(number))), replayed(torch.full((3,), float(number)))
        assert torch.equal(parameters[0].grad, parameters[1].grad)  # type: ignore[arg-type]


def test_gradients_of_gradients() -> None:
    torch.manual_seed(0)
    model = sparse(lenet())

    def function(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), list(model.parameters()))

    assert same_for(function, batches()[0][0]).refusal is None


def test_one_replayed_function_in_another() -> None:
    inner = Replayed(lambda x: x.exp())
    assert same_for(lambda x: inner(x) + 1, torch.ones(3)).refusal is None


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x: x * x.sum().item(), "_local_scalar_dense.default asks for a value"),
        (lambda x: x + 1 if x.sum() > 4 else x - 1, "asks for a value"),
        (lambda x: x[x > 2], "asks for a shape that depends on values"),
        (lambda x: x.nonzero(), "asks for a shape"),
        (lambda x: x + sum(x.tolist()), "tolist asks for values"),
        (lambda x: x + torch.from_numpy((x * 2).numpy()), "numpy asks for values"),
        (lambda x: x + float(np.asarray(x * 2).sum()), "asks for values"),
        (lambda x: x + torch.from_dlpack(x * 2), "asks for values"),
    ],
)
def test_functions_that_are_not_replayed(function: Callable[[Tensor], Tensor], why: str) -> None:
    replayed = same_for(function, torch.tensor([1.0, 2.0]))
    assert replayed.refusal is not None and why in replayed.refusal


def test_a_step_that_talks_to_other_processes_is_not_replayed() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(lenet())
        replayed = Replayed(training_step(model, OPTIMIZERS["adam"](model.parameters())))
        for x, target in batches():
            replayed(x, target)
        assert replayed.refusal is not None and "talks to other processes" in replayed.refusal
    finally:
        dist.destroy_process_group()


def test_an_error_is_no_recording() -> None:
    fails = True

    def function(x: Tensor) -> Tensor:
        if fails:
            raise RuntimeError("not today")
        return x + 1

    replayed = Replayed(function)
    for _ in range(CALLS):
        with pytest.raises(RuntimeError, match="not today"):
            replayed(torch.ones(2))
    assert Recorder.active == 0
    fails = False
    for _ in range(CALLS):
        assert replayed(torch.ones(2)).tolist() == [2, 2]


def test_it_takes_tensors() -> None:
    with pytest.raises(TypeError, match="a replayed function takes tensors, got a float"):
        Replayed(lambda x: x)(1.0)  # type: ignore[arg-type]


def test_nothing_between_the_operators_is_kept() -> None:
    """A program drops what it needs no more, as autograd does: here all but two of six results are gone in time."""
    seen: list[weakref.ref[Tensor]] = []
    most = 0
    library = torch.library.Library("lottery_tests", "DEF")
    library.define("watched(Tensor x) -> Tensor")

    def watched(x: Tensor) -> Tensor:
        nonlocal most
        y = x + 1
        seen.append(weakref.ref(y))
        most = max(most, sum(one() is not None for one in seen))
        return y

    library.impl("watched", watched, "CPU")

    def chain(x: Tensor) -> Tensor:
        for _ in range(6):
            x = torch.ops.lottery_tests.watched(x)
        return x

    replayed = Replayed(chain)
    for _ in range(CALLS_BEFORE + 1):
        replayed(torch.ones(2))
    gc.collect()
    seen.clear()
    most = 0
    assert replayed(torch.ones(2)).tolist() == [7, 7]
    assert len(seen) == 6 and most <= 2
