"""A convolution and the ReLU behind it run as one operator, and give the bits of both one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lottery_kernels import SparseConv2d
from lottery_kernels.cpu import build
from lottery_kernels.fuse import FusedSequential
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

BLOCKS = [(1, 1), (2, 3), (4, 4)]
GEOMETRIES = {
    "3×3": {"kernel_size": 3, "padding": 1},
    "no padding": {"kernel_size": 3},
    "1×1": {"kernel_size": 1},
    "padding beyond the kernel": {"kernel_size": 2, "padding": 2},
    "dilation": {"kernel_size": (3, 2), "dilation": 2, "padding": (2, 0)},
    "stride": {"kernel_size": 3, "stride": 2, "padding": 1},
    "groups": {"kernel_size": 3, "padding": 1, "groups": 2},
}


def net(geometry="3×3", block=(1, 1), density=0.4, dtype=torch.float64, channels=(4, 6, 8)) -> FusedSequential:
    """Two convolutions, ReLU behind each."""
    layers: list[nn.Module] = []
    first, middle, last = channels
    for inputs, out in ((first, middle), (middle, last)):
        dense = nn.Conv2d(inputs, out, dtype=dtype, **GEOMETRIES[geometry])
        mask = torch.rand_like(dense.weight) < density
        layers += [SparseConv2d.from_dense(dense, mask, block), nn.ReLU(inplace=not layers)]
    return FusedSequential(*layers)


def images(model: nn.Module, batch: int, size=(9, 7), dtype=torch.float64) -> tuple[Tensor, Tensor]:
    """Images for a net, and a cotangent of its output."""
    x = torch.randn(batch, model[0].in_channels, *size, dtype=dtype)
    return x, torch.randn_like(model(x)).contiguous()


@pytest.mark.parametrize("batch", [1, 5, 64, 70])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_same_bits_as_one_by_one(geometry, block, batch):
    model = net(geometry, block)
    x, dy = images(model, batch)
    assert runs("conv2d_relu", model, x)
    assert_same_bits(model, x, dy)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_gradients_are_those_of_the_dense_masked_net(geometry):
    model = net(geometry)
    x, dy = images(model, 6)
    dense = nn.Sequential(*(layer.to_dense() if isinstance(layer, SparseConv2d) else nn.ReLU() for layer in model))
    ours, theirs = step(model, x, dy), step(dense, x, dy)
    ours[2], ours[4] = model[0].pattern.unpack(ours[2]), model[2].pattern.unpack(ours[4])
    theirs[2], theirs[4] = theirs[2] * model[0].mask, theirs[4] * model[2].mask
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("block", BLOCKS)
def test_all_pruned_and_full_masks(block, density):
    model = net(block=block, density=density)
    assert_same_bits(model, *images(model, 7))


def test_an_image_of_many_tiles():
    model = net(dtype=torch.float32, channels=(40, 64, 48))
    assert_same_bits(model, *images(model, 64, (30, 32), torch.float32))


def test_relu_lets_nan_and_infinities_through_as_torch_does():
    model = net("1×1", density=1.0)
    x, dy = images(model, 3)
    x[0], x[1] = torch.nan, torch.inf
    assert_same_bits(model, x, dy)


@pytest.mark.parametrize("geometry", ["3×3", "stride"])
@pytest.mark.parametrize("wanted", ["values", "bias", "x"])
def test_only_wanted_gradients_are_computed(geometry, wanted):
    model = net(geometry)
    x, dy = images(model, 5)
    found = []
    for modules in (model, unfused(model)):
        for name, parameter in modules.named_parameters():
            parameter.requires_grad_(name.endswith(wanted))
        inputs = [x.detach().requires_grad_(wanted == "x"), *modules.parameters()]
        found.append(torch.autograd.grad(modules(inputs[0]), [tensor for tensor in inputs if tensor.requires_grad], dy))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("geometry", ["3×3", "stride"])
def test_gradients_of_any_order(geometry):
    model = net(geometry, (2, 3), channels=(2, 3, 2))
    x = torch.randn(2, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    names = list(dict(model.named_parameters()))

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), x)

    assert torch.autograd.gradcheck(function, [x, *model.parameters()])
    assert torch.autograd.gradgradcheck(function, [x, *model.parameters()])


@pytest.mark.parametrize("block", [(1, 1), (4, 4)])
def test_same_bits_for_any_number_of_threads(threads, block):
    model = net(block=block, dtype=torch.float32, channels=(20, 32, 24))
    assert_same_bits_for_any_number_of_threads(model, *images(model, 60, (16, 16), torch.float32))


def test_a_result_that_is_written_into_is_noticed():
    y = net()(torch.randn(3, 4, 5, 5, dtype=torch.float64))
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_half_precision_is_as_one_by_one():
    model = net(dtype=torch.float32).bfloat16()
    x, dy = images(model, 5, dtype=torch.bfloat16)
    assert_same_bits(model, x, dy)


def test_a_hook_sees_its_module_called():
    model, seen = net(), []
    model[0].register_forward_hook(lambda *_: seen.append("conv"))
    model[3].register_forward_hook(lambda *_: seen.append("relu"))
    x, _ = images(model, 3)
    seen.clear()
    assert not runs("conv2d_relu", model, x)
    assert seen == ["conv", "relu"]


def test_padding_modes_and_single_images_run_one_by_one():
    dense = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect", dtype=torch.float64)
    model = FusedSequential(SparseConv2d.from_dense(dense, torch.rand_like(dense.weight) < 0.5), nn.ReLU())
    assert_same_bits(model, *images(model, 4))
    model = net()
    single = torch.randn(4, 9, 7, dtype=torch.float64)
    assert torch.equal(model(single), unfused(model)(single))
