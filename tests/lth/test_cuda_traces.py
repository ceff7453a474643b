"""A training step on CUDA tensors that have no data: types, devices and strides under autocast, and what is launched.

Forward, gate and update are traced as a step runs them. The autograd engine wants a driver, so the gradients of sparse
layers are traced by calling their operators. `torch.autocast` turns itself off without a card: its switch is set.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lottery_kernels import SparseConv2d, SparseLinear, operators, sparsify
from lth.cuda_graph import GatedStep
from lth.models import NETWORKS
from lth.train import Task, Training

BLOCK = (32, 32)
KINDS = (SparseLinear, SparseConv2d)


def convnet() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, maps, stride in ((3, 32, 1), (32, 64, 2), (64, 64, 1)):
        layers += [nn.Conv2d(inputs, maps, 3, stride, padding=1), nn.BatchNorm2d(maps), nn.ReLU(), nn.Dropout(0.2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


@dataclass(frozen=True)
class Net:
    model: nn.Module
    sparse: tuple[str, ...]  # the layers that are
    x: tuple[int, ...]  # shape of a batch


def net_of(name: str) -> Net:
    if name == "lenet-wide":
        return Net(NETWORKS["lenet-wide"]((1, 28, 28), 10), ("fc1", "fc2"), (128, 1, 28, 28))
    return Net(convnet(), ("4", "8"), (16, 3, 32, 32))


OPTIMIZERS = {
    "adam": lambda parameters: torch.optim.Adam(parameters, fused=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, momentum=0.9, fused=True),
}


class Launches(TorchDispatchMode):
    """Keeps what is called; the fused updates, which know no fake tensors, are noted and not run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.partition("::")[2]
        self.calls.append((name, args, kwargs or {}))
        return None if name.startswith("_fused_") else function(*args, **(kwargs or {}))

    def named(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(args, kwargs) for found, args, kwargs in self.calls if found == name]


@dataclass
class Trace:
    model: nn.Module
    x: Tensor
    step: GatedStep
    launches: Launches
    inputs: dict[str, Tensor] = field(default_factory=dict)  # of every layer
    outputs: dict[str, Tensor] = field(default_factory=dict)

    def keeper(self, layer: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
            self.inputs[layer], self.outputs[layer] = args[0], y

        return keep


@contextlib.contextmanager
def autocast(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", before)


def without_data(model: nn.Module) -> None:
    """Replaces all tensors of a model by CUDA tensors without data; inside of a FakeTensorMode."""

    def moved(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(moved(parameter))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = moved(buffer)
        if isinstance(module, KINDS):
            object.__setattr__(module.pattern, "index", [moved(array) for array in module.pattern.index])


def as_on_a_gpu(net: Net) -> nn.Module:
    """The net with its sparse layers, its patterns' arrays those that a GPU gets, all still on the CPU."""
    masks = {}
    for name in net.sparse:
        out, inputs, *kernel = net.model.get_parameter(f"{name}.weight").shape
        live = torch.rand(-(-out // 32), -(-inputs // 32), *kernel) < 0.4
        masks[name] = live.repeat_interleave(32, 0).repeat_interleave(32, 1)[:out, :inputs]
    model = sparsify(net.model, masks, BLOCK, "always")
    for module in model.modules():
        if isinstance(module, KINDS):
            object.__setattr__(module.pattern, "index", module.pattern.scheduled_index)
    return model


@contextlib.contextmanager
def traced(name: str, optimizer: str = "adam", dtype: torch.dtype = torch.bfloat16) -> Iterator[Trace]:
    """A step without its backward pass, in whose place gradients come from nowhere."""
    net = net_of(name)
    model = as_on_a_gpu(net)

    def step(model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        with autocast(dtype):
            loss = F.cross_entropy(model(x), y)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        return loss

    with FakeTensorMode():
        without_data(model)
        x, y = torch.empty(net.x, device="cuda"), torch.empty(net.x[:1], dtype=torch.int64, device="cuda")
        task = Task(
            model=lambda: model,
            batches=lambda iteration, seed: (x, y),
            step=step,
            optimizers=lambda model: OPTIMIZERS[optimizer](list(model.parameters())),
        )
        gated, launches = GatedStep(task, Training.begin(task, model, 0), 0, "a trace"), Launches()
        trace = Trace(model, x, gated, launches)
        for layer, module in model.named_children():
            module.register_forward_hook(trace.keeper(layer))
        gated._load()
        with launches:
            gated._work()
        yield trace


NETS = pytest.mark.parametrize("name", ["lenet-wide", "convnet"])
TYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@NETS
@TYPES
def test_every_product_runs_in_autocasts_type_and_row_major(name: str, dtype: torch.dtype) -> None:
    with traced(name, dtype=dtype) as trace:
        for layer in net_of(name).sparse:
            y = trace.outputs[layer]
            assert y.dtype == dtype and y.device.type == "cuda"
            channels_last = y.dim() == 4
            assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        sparse = trace.launches.named("conv2d" if name == "convnet" else "linear")
        assert len(sparse) == 2
        for (x, values, bias, index, *_), _ in sparse:
            assert x.dtype == values.dtype == bias.dtype == dtype
            assert all(array.device.type == "cuda" for array in index) and len(index) >= 8
        for (bias, x, weight), _ in trace.launches.named("addmm"):  # the layers that stay dense
            assert bias.dtype == x.dtype == weight.dtype == dtype


@NETS
def test_activations_between_layers_are_not_copied_into_another_layout(name: str) -> None:
    """What one sparse layer returns is what the next one takes: no copy but autocast's of fp32 parameters and x."""
    with traced(name) as trace:
        widths = {tuple(trace.outputs[layer].shape) for layer in net_of(name).sparse}
        for copied, _ in trace.launches.named("clone") + trace.launches.named("_to_copy"):
            assert tuple(copied[0].shape) not in widths


@NETS
def test_gradients_are_of_the_inputs_type_and_layout(name: str) -> None:
    with traced(name) as trace:
        for layer in net_of(name).sparse:
            module, x = trace.model.get_submodule(layer), trace.inputs[layer]
            dy, index = torch.empty_like(trace.outputs[layer]), module.pattern.index
            kind, shape, x_shape, rest = "linear", module.pattern.weight_shape, (), ()
            if isinstance(module, SparseConv2d):
                kind, x_shape = "conv2d", (x.shape,)
                rest = (module.stride, module.padding, module.dilation, module.groups)
            with autocast(torch.bfloat16):
                dx = getattr(operators, f"{kind}_dgrad")(dy, module.values, index, shape, *x_shape, *rest)
                dvalues = getattr(operators, f"{kind}_wgrad")(dy, x, index, shape, BLOCK, *rest)
            assert dx.dtype == dvalues.dtype == torch.bfloat16 and dx.device.type == "cuda"
            assert dx.shape == x.shape
            assert dx.is_contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format)
            assert dvalues.shape == module.values.shape and dvalues.is_contiguous()
            assert module.values.dtype == torch.float32  # what is trained stays exact


@NETS
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_fused_update_takes_its_rate_and_its_permission_from_the_device(name: str, optimizer: str) -> None:
    with traced(name, optimizer) as trace:
        (launch,) = [call for call in trace.launches.calls if call[0].startswith("_fused_")]
        fused, (parameters, gradients, *state), options = launch
        assert fused == f"_fused_{optimizer}_"
        assert len(parameters) == len(list(trace.model.parameters()))
        for lists in (gradients, *state):
            assert all(tensor.device.type == "cuda" for tensor in lists)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            assert parameter.stride() == gradient.stride()
        assert options["found_inf"] is trace.step.gate.shut
        for scalar in (options["found_inf"], options["lr"]):
            assert (scalar.device.type, scalar.dtype, scalar.shape) == ("cuda", torch.float32, ())


@NETS
def test_nothing_is_asked_of_the_device_and_nothing_moves(name: str) -> None:
    with traced(name) as trace:
        assert not trace.launches.named("_local_scalar_dense") and not trace.launches.named("nonzero")
        for called, args, kwargs in trace.launches.calls:
            tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
            assert all(t.device.type == "cuda" for t in tensors), called


@NETS
def test_without_autocast_it_is_fp32_throughout(name: str) -> None:
    with traced(name, dtype=torch.float32) as trace:
        assert {y.dtype for y in trace.outputs.values()} == {torch.float32}
