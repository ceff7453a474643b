"""Fused neighbours compute what they compute one by one."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lottery_kernels import SparseLinear, densify, sparsify
from lottery_kernels.cpu import build
from lottery_kernels.fuse import FusedSequential, to_fused
from tests.kernels.fused import (
    assert_same_bits,
    assert_same_bits_for_any_number_of_threads,
    runs,
    step,
    unfused,
)

pytestmark = [
    pytest.mark.usefixtures("nan_filled"),
    pytest.mark.skipif(not build.load(), reason="no C++ compiler"),
]

BLOCKS = [(1, 1), (3, 2), (4, 4), (16, 16), (5, 18)]


class Own(nn.Sequential):
    """A user's subclass."""


def sparse(inputs: int, out: int, block=(1, 1), density=0.3, bias=True, dtype=torch.float64) -> SparseLinear:
    mask = torch.rand(out, inputs) < density
    return SparseLinear.from_dense(nn.Linear(inputs, out, bias, dtype=dtype), mask, block)


def mlp(block=(1, 1), density=0.3, last_relu=False, dtype=torch.float64, sizes=(45, 37, 21, 10)) -> FusedSequential:
    layers: list[nn.Module] = []
    for number, (inputs, out) in enumerate(itertools.pairwise(sizes)):
        layers += [sparse(inputs, out, block, density, number != 1, dtype), nn.ReLU(inplace=number == 0)]
    return FusedSequential(*layers if last_relu else layers[:-1])


def runs_fused(model: nn.Module, x: Tensor) -> bool:
    return runs("mlp", model, x)


@pytest.mark.parametrize("last_relu", [False, True])
@pytest.mark.parametrize("batch", [0, 1, 17, 60, 128, 130, 280])
@pytest.mark.parametrize("block", BLOCKS)
def test_the_same_bits_as_one_by_one(block, batch, last_relu):
    model = mlp(block, last_relu=last_relu)
    x, dy = torch.randn(batch, 45, dtype=torch.float64), torch.randn(batch, 10, dtype=torch.float64)
    assert runs_fused(model, x)
    assert_same_bits(model, x, dy)


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("block", BLOCKS)
def test_all_pruned_and_full_masks(block, density):
    model = mlp(block, density, last_relu=True)
    x, dy = torch.randn(7, 45, dtype=torch.float64), torch.randn(7, 10, dtype=torch.float64)
    assert_same_bits(model, x, dy)


@pytest.mark.parametrize("content", [3.0, torch.nan])
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_dead_positions_neither_act_nor_receive_gradients(density, content):
    model = mlp((4, 4), density)
    x, dy = torch.randn(60, 45, dtype=torch.float64), torch.randn(60, 10, dtype=torch.float64)
    clean = step(model, x, dy)
    with torch.no_grad():
        for layer in (module for module in model if isinstance(module, SparseLinear)):
            layer.values[~layer.pattern.alive] = content
    assert runs_fused(model, x)
    assert all(torch.equal(*pair) for pair in zip(step(model, x, dy), clean, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_too_wide_for_the_cache(dtype):
    model = mlp(sizes=(50, 6000, 10), dtype=dtype, density=0.05)
    x, dy = torch.randn(70, 50, dtype=dtype), torch.randn(70, 10, dtype=dtype)
    for fused, single in zip(step(model, x, dy), step(unfused(model), x, dy), strict=True):
        torch.testing.assert_close(fused, single)


@pytest.mark.parametrize("layout", ["row-major", "batch-innermost", "every second column"])
def test_inputs_and_cotangents_of_any_strides(layout):
    def lay(x: Tensor) -> Tensor:
        if layout == "batch-innermost":
            return x.T.contiguous().T
        return x.repeat_interleave(2, 1)[:, ::2] if layout != "row-major" else x

    model = mlp(last_relu=True)
    x, dy = torch.randn(60, 45, dtype=torch.float64), torch.randn(60, 10, dtype=torch.float64)
    for fused, single in zip(step(model, lay(x), lay(dy)), step(unfused(model), x, dy), strict=True):
        assert torch.equal(fused, single)


def test_relu_lets_nan_and_infinities_through_as_torch_does():
    model = FusedSequential(sparse(3, 4, density=1.0), nn.ReLU())
    x = torch.tensor([[torch.nan, 1, 1], [torch.inf, -1, 1], [0, 0, 0]], dtype=torch.float64)
    assert_same_bits(model, x, x.new_ones(3, 4))


@pytest.mark.parametrize("frozen", ["0.values", "0.bias", "2.values", "4.values", "first layers", "all but the input"])
def test_only_wanted_gradients_are_computed(frozen):
    model = mlp()
    for name, parameter in model.named_parameters():
        parts = {"first layers": ("0.", "2."), "all but the input": ("",)}.get(frozen, (frozen,))
        parameter.requires_grad_(not name.startswith(parts))
    x, dy = torch.randn(9, 45, dtype=torch.float64), torch.randn(9, 10, dtype=torch.float64)
    for needs_dx in (True, False) if frozen != "all but the input" else (True,):
        found = []
        for net in (model, unfused(model)):
            inputs = [x.detach().requires_grad_(needs_dx), *net.parameters()]
            wanted = [tensor for tensor in inputs if tensor.requires_grad]
            found.append(torch.autograd.grad(net(inputs[0]), wanted, dy))
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("block", [(1, 1), (3, 2)])
def test_gradients_of_any_order(block):
    model = mlp(block, 0.5, last_relu=True, sizes=(5, 7, 4, 3))
    parameters = list(model.parameters())
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        names = dict(model.named_parameters())
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), x)

    assert torch.autograd.gradcheck(function, [x, *parameters])
    assert torch.autograd.gradgradcheck(function, [x, *parameters])


@pytest.mark.parametrize("block", [(1, 1), (16, 16)])
@pytest.mark.parametrize("batch", [5, 60, 200, 570])
def test_same_bits_for_any_number_of_threads(threads, block, batch):
    model = mlp(block, 0.2, True, torch.float32, (300, 400, 200, 50))
    assert_same_bits_for_any_number_of_threads(model, torch.randn(batch, 300), torch.randn(batch, 50))


def test_what_looks_at_a_module_sees_it_called():
    x = torch.randn(3, 45, dtype=torch.float64)
    seen = []
    for add in (
        lambda m: m[2].register_forward_hook(lambda *_: seen.append("hook")),
        lambda m: m[3].register_forward_pre_hook(lambda *_: seen.append("hook")),
        lambda m: m[2].register_full_backward_hook(lambda *_: seen.append("hook")),
        lambda m: nn.modules.module.register_module_forward_hook(
            lambda module, *_: seen.append("hook") if module is m[2] else None
        ),
    ):
        model = mlp()
        handle = add(model)
        model(x.requires_grad_()).sum().backward()
        handle.remove()
        assert len(seen) == 1
        seen.clear()
        assert runs_fused(model, x)


def test_the_meta_device_gives_shapes():
    x = torch.empty(3, 45, dtype=torch.float64, device="meta")
    assert mlp().to("meta")(x).shape == (3, 10)


@pytest.mark.parametrize("kind", ["negated", "zero"])
def test_tensors_that_autograd_only_marks(kind):
    """A negation that is a bit, zeros without memory: of inputs, parameters and cotangents."""

    def marked(*shape: int) -> Tensor:
        if kind == "zero":
            return torch._efficientzerotensor(shape, dtype=torch.float64)
        return torch.randn(*shape, dtype=torch.complex128).conj().imag

    def plain(x: Tensor) -> Tensor:
        return x.resolve_neg() if kind == "negated" else torch.zeros_like(x)

    model, x, dy = mlp(last_relu=True), marked(5, 45), marked(5, 10)
    if kind == "negated":
        for layer in (model[0], model[4]):
            layer.values = nn.Parameter(marked(*layer.values.shape))
            layer.bias = nn.Parameter(marked(*layer.bias.shape))
            assert layer.values.is_neg() and layer.bias.is_neg()
    single = unfused(model)
    for parameter in single.parameters():
        parameter.data = parameter.data.resolve_neg()
    assert runs_fused(model, x)
    for fused, alone in zip(step(model, x, dy), step(single, plain(x), plain(dy)), strict=True):
        assert torch.equal(fused, alone)


def test_replicas_of_data_parallel_compute_one_by_one():
    """Their parameters are plain attributes, views that autograd leads back to the model's."""
    model, x = mlp(), torch.randn(3, 45, dtype=torch.float64)
    replica = model._replicate_for_data_parallel()
    replica._modules = {key: module._replicate_for_data_parallel() for key, module in model._modules.items()}
    for own, module in zip(replica._modules.values(), model, strict=True):
        own._parameters = {}
        for name, parameter in module._parameters.items():
            setattr(own, name, None if parameter is None else parameter.view_as(parameter))
    replica(x).sum().backward()
    found = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    assert all(torch.equal(one, parameter.grad) for one, parameter in zip(found, model.parameters(), strict=True))


def test_an_input_of_the_wrong_width_is_named_as_before():
    with pytest.raises(ValueError, match=r"input has shape \(3, 44\), the layer takes \[..., in_features=45\]"):
        mlp()(torch.randn(3, 44, dtype=torch.float64))


def test_a_mask_changed_between_forward_and_backward_is_an_error():
    model = mlp()
    y = model(torch.randn(3, 45, dtype=torch.float64))
    model[2].set_mask(torch.rand(21, 37) < 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_backward_twice_needs_a_retained_graph():
    y = mlp()(torch.randn(3, 45, dtype=torch.float64)).sum()
    y.backward(retain_graph=True)
    y.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()


def test_a_compiled_graph_and_an_exported_program_give_the_same_bits():
    model, x = mlp(), torch.randn(6, 45, dtype=torch.float64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    dy = torch.randn(6, 10, dtype=torch.float64)
    for one, other in zip(step(model, x, dy), step(compiled, x, dy), strict=True):
        assert torch.equal(one, other)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert torch.equal(exported.module()(x[:4]), model(x[:4]))


@pytest.mark.parametrize("whole", [unfused, copy.deepcopy])
def test_a_compiled_backward_pass(whole):
    model, x, dy = whole(mlp()), torch.randn(6, 45, dtype=torch.float64), torch.randn(6, 10, dtype=torch.float64)
    model(x).backward(dy)
    eager = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        model(x).backward(dy)
    assert all(torch.equal(one, parameter.grad) for one, parameter in zip(eager, model.parameters(), strict=True))


def test_autocast_and_half_precision_are_as_one_by_one():
    model = mlp(dtype=torch.float32)
    x = torch.randn(6, 45)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), unfused(model)(x))
    half = model.bfloat16()
    assert torch.equal(half(x.bfloat16()), unfused(half)(x.bfloat16()))


def test_sparsify_fuses_containers_and_densify_undoes_it():
    inner = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    model = nn.Sequential(inner, Own(nn.ReLU(), nn.Linear(4, 3)))
    keys, modules = list(model.state_dict()), [type(module) for module in model.modules()]
    sparsify(model, {"0.0": torch.rand(5, 6) < 0.5, "0.2": torch.rand(4, 5) < 0.5}, when="always")
    assert type(model) is type(inner) is FusedSequential
    assert type(model[1]) is Own
    assert [key for key in model.state_dict() if not key.endswith("_mask")] == keys
    x = torch.randn(3, 6)
    assert runs_fused(model, x)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(twin(x), model(x))
    assert type(inner[:2]) is FusedSequential
    densify(model)
    assert [type(module) for module in model.modules()] == modules


def test_a_net_trains_as_one_by_one():
    model = mlp(dtype=torch.float32)
    other = unfused(model)
    x, target = torch.randn(60, 45), torch.randint(10, (60,))
    for net in (model, other):
        optimizer = torch.optim.Adam(net.parameters(), fused=True)
        for _ in range(20):
            optimizer.zero_grad()
            F.cross_entropy(net(x), target).backward()
            optimizer.step()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    assert type(to_fused(other)) is FusedSequential
