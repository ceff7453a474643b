"""The C++ convolution kernels against fp64 autograd of the dense masked layer."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lottery_kernels import Pattern, operators
from lottery_kernels.cpu import build

pytestmark = [
    pytest.mark.usefixtures("nan_filled"),
    pytest.mark.skipif(not build.load(), reason="no C++ compiler"),
]

backward = torch.ops.lottery_kernels.conv2d_backward if build.load() else None


@dataclass
class Case:
    """A convolution with a mask, an input and a cotangent. `inputs` and `outputs` are channels of a group."""

    inputs: int = 5
    outputs: int = 6
    kernel: tuple[int, int] = (3, 3)
    image: tuple[int, int] = (7, 6)
    batch: int = 9
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    block: tuple[int, int] = (1, 1)
    density: float = 0.3
    dtype: torch.dtype = torch.float64
    mask: Tensor | None = None
    tensors: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        shape = (self.outputs * self.groups, self.inputs, *self.kernel)
        if self.mask is None:
            self.mask = torch.rand(shape) < self.density
        self.pattern = Pattern.from_mask(self.mask, self.block, self.groups)
        x = torch.randn(self.batch, self.inputs * self.groups, *self.image, dtype=self.dtype)
        weight, bias = torch.randn(shape, dtype=self.dtype), torch.randn(shape[0], dtype=self.dtype)
        self.tensors = {"x": x, "weight": weight, "bias": bias}
        self.dy = torch.randn_like(self.dense(x, weight, bias))

    @property
    def geometry(self) -> tuple:
        return (list(self.stride), list(self.padding), list(self.dilation), self.groups)

    @property
    def arguments(self) -> tuple:
        return (self.pattern.index, self.pattern.weight_shape)

    @property
    def values(self) -> Tensor:
        return self.pattern.pack(self.tensors["weight"])

    def dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight * self.mask, bias, *self.geometry)

    def expected(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """y, dx, dvalues, dbias of the dense masked layer."""
        x, weight, bias = (t.to(dtype).requires_grad_() for t in self.tensors.values())
        y = self.dense(x, weight, bias)
        dx, dweight, dbias = torch.autograd.grad(y, (x, weight, bias), self.dy.to(dtype))
        return [y.detach(), dx, self.pattern.pack(dweight), dbias]

    def found(self, x: Tensor | None = None, dy: Tensor | None = None) -> list[Tensor]:
        """The same of the sparse operators, through autograd."""
        x = (self.tensors["x"] if x is None else x).detach().requires_grad_()
        values, bias = self.values.requires_grad_(), self.tensors["bias"].clone().requires_grad_()
        y = operators.conv2d(x, values, bias, *self.arguments, *self.geometry)
        return [y.detach(), *torch.autograd.grad(y, (x, values, bias), self.dy if dy is None else dy)]

    def check(self) -> None:
        for found, expected in zip(self.found(), self.expected(), strict=True):
            torch.testing.assert_close(found, expected)

    def check_error(self) -> None:
        """At most twice torch's own fp32 error against fp64."""
        for found, torchs, exact in zip(self.found(), self.expected(torch.float32), self.expected(), strict=True):
            assert found.dtype == torch.float32
            assert (found - exact).abs().max() <= 2 * (torchs - exact).abs().max()


GEOMETRIES = {
    "plain": {},
    "pointwise": {"kernel": (1, 1), "padding": (0, 0)},
    "strided": {"stride": (2, 2)},
    "pointwise strided": {"kernel": (1, 1), "padding": (0, 0), "stride": (2, 3)},
    "stride past the kernel": {"kernel": (2, 1), "padding": (0, 0), "stride": (3, 2)},
    "uneven": {"kernel": (2, 3), "stride": (2, 1), "padding": (0, 2), "dilation": (3, 1)},
    "dilated and strided": {"stride": (2, 2), "padding": (2, 2), "dilation": (2, 2)},
    "wide padding": {"padding": (4, 5)},
    "two groups": {"groups": 2},
    "depthwise": {"inputs": 1, "outputs": 2, "groups": 5},
    "tiny image": {"image": (2, 2)},
    "one pixel": {"image": (1, 1)},
    "large kernel": {"kernel": (7, 7), "padding": (3, 3), "stride": (2, 2), "image": (15, 14)},
}
BLOCKS = [(1, 1), (4, 4), (2, 3), (16, 16)]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_outputs_and_gradients_equal_dense_masked(geometry, block):
    Case(**geometry, block=block).check()


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("batch", [0, 1, 16, 60, 130])
def test_batches_of_any_size(batch, block):
    Case(batch=batch, block=block, image=(4, 5)).check()


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("block", BLOCKS)
def test_all_pruned_and_full_masks(block, density):
    Case(block=block, density=density, stride=(2, 1)).check()


@pytest.mark.parametrize("block", BLOCKS)
def test_empty_output_and_input_channels(block):
    mask = torch.rand(6, 5, 3, 3) < 0.5
    mask[2:5], mask[:, 1:4] = False, False
    Case(block=block, mask=mask).check()


@pytest.mark.parametrize("block", [(1, 1), (8, 8)])
def test_images_larger_than_the_cache(block):
    """Several tiles along every axis, whose sources overlap."""
    Case(inputs=32, outputs=16, image=(40, 50), batch=33, density=0.05, block=block, dtype=torch.float32).check_error()


def test_memory_of_freed_images_is_used_again_but_never_shared():
    with deterministic(False):  # which would ask for NaN in new memory, and so for new memory
        case = Case(inputs=3, outputs=3, image=(128, 128), batch=16, dtype=torch.float32, density=1.0)
        x = case.tensors["x"].contiguous()
        y, dx, dvalues, _ = case.found(x)  # images of 3 MiB
        addresses = {y.data_ptr(), dx.data_ptr()}
        kept = y.clone()
        others = case.found(-x)
        assert addresses.isdisjoint({others[0].data_ptr(), others[1].data_ptr()})
        assert torch.equal(y, kept)
        del y, dx, others
        again = case.found(x)
        assert addresses & {again[0].data_ptr(), again[1].data_ptr()}
        assert torch.equal(again[0], kept) and torch.equal(again[2], dvalues)


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("block", BLOCKS)
def test_fp32_is_as_exact_as_torch(block):
    Case(dtype=torch.float32, block=block, batch=60, image=(8, 8)).check_error()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [24, 48, 80, 96])
def test_batches_whose_last_tile_is_short_of_whole_vectors(batch, dtype):
    """In images that are larger than the second-level cache, so that what is written goes past it."""
    case = Case(batch=batch, image=(24, 24), inputs=32, outputs=32, density=0.05, dtype=dtype)
    for found, expected in zip(case.found(), case.expected(), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-3 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("block", [(1, 1), (4, 4)])
def test_each_gradient_alone_equals_all_at_once(block, wanted):
    case = Case(block=block, stride=(2, 1))
    tensors = (case.dy, case.tensors["x"], case.values, *case.arguments, *case.geometry)
    together, alone = backward(*tensors, [True] * 3), backward(*tensors, wanted)
    for one, other, asked in zip(alone, together, wanted, strict=True):
        torch.testing.assert_close(one, other) if asked else None
        assert asked or one.numel() == 0
    dgrad = operators.conv2d_dgrad(case.dy, case.values, *case.arguments, case.tensors["x"].shape, *case.geometry)
    torch.testing.assert_close(dgrad, together[0])
    wgrad = operators.conv2d_wgrad(case.dy, case.tensors["x"], *case.arguments, block, *case.geometry)
    torch.testing.assert_close(wgrad, together[1])


@pytest.mark.parametrize("block", [(1, 1), (4, 4)])
@pytest.mark.parametrize("batch", [5, 200])
def test_same_bits_for_any_number_of_threads(threads, block, batch):
    case = Case(batch=batch, image=(12, 12), inputs=20, outputs=24, block=block, dtype=torch.float32)
    results = []
    for count in (1, 2, 8, 2):
        torch.set_num_threads(count)
        results.append(case.found())
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))


def batch_innermost(x: Tensor) -> Tensor:
    return x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


LAYOUTS = {
    "batch innermost": batch_innermost,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_inputs_of_any_strides_give_the_same_bits(layout):
    case = Case()
    x, dy = layout(case.tensors["x"]), layout(case.dy)
    for found, expected in zip(case.found(x, dy), case.found(x.contiguous(), dy.contiguous()), strict=True):
        assert torch.equal(found, expected)


def test_results_are_batch_innermost():
    case = Case(stride=(2, 2))
    y, dx, *_ = case.found()
    for image in (y, dx):
        assert image.permute(1, 2, 3, 0).is_contiguous()


@pytest.mark.parametrize("block", BLOCKS)
def test_infinities_of_another_group_stay_there(block):
    case = Case(groups=2, block=block)
    case.tensors["x"][:, 5:] = torch.inf  # the second group's inputs
    y, *_ = case.found()
    assert y[:, :6].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_in_fp32(dtype):
    case = Case(dtype=torch.float32)
    x, values, bias = (t.to(dtype) for t in (case.tensors["x"], case.values, case.tensors["bias"]))
    y = operators.conv2d(x, values, bias, *case.arguments, *case.geometry)
    exact = operators.conv2d(x.float(), values.float(), bias.float(), *case.arguments, *case.geometry)
    assert torch.equal(y, exact.to(dtype))


@pytest.mark.parametrize("geometry", ["plain", "strided", "two groups"])
@pytest.mark.parametrize("block", [(1, 1), (2, 3)])
def test_derivatives_of_second_order(geometry, block):
    options = {"inputs": 2, "outputs": 3, "image": (3, 2), "batch": 2} | GEOMETRIES[geometry]
    case = Case(**options, block=block)
    alive = case.pattern.alive if case.pattern.alive is not None else torch.ones_like(case.values, dtype=torch.bool)

    def function(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return operators.conv2d(x, values * alive, bias, *case.arguments, *case.geometry)

    inputs = [t.requires_grad_() for t in (case.tensors["x"], case.values, case.tensors["bias"])]
    assert torch.autograd.gradgradcheck(function, inputs)


def test_all_gradients_in_one_operator_pass_opcheck():
    case = Case(stride=(2, 1))
    dy, x, values = (t.requires_grad_() for t in (case.dy, case.tensors["x"], case.values))
    torch.library.opcheck(backward.default, (dy, x, values, *case.arguments, *case.geometry, [True] * 3))


def test_an_image_smaller_than_the_kernel_is_refused_as_torch_refuses_it():
    case = Case()
    x = case.tensors["x"][:, :, :2, :2].clone()
    geometry = ([1, 1], [0, 0], [1, 1], 1)
    with pytest.raises(RuntimeError) as torchs:
        F.conv2d(x, case.tensors["weight"], None, *geometry)
    with pytest.raises(RuntimeError) as ours:
        operators.conv2d(x, case.values, None, *case.arguments, *geometry)
    assert str(ours.value).splitlines()[0] == str(torchs.value).splitlines()[0]


def test_arguments_that_do_not_fit_are_named():
    case = Case()
    x, dy, geometry = case.tensors["x"], case.dy, case.geometry
    with pytest.raises(RuntimeError, match=r"x must be \[N, 5, H, W\]"):
        operators.conv2d(x[:, :4], case.values, None, *case.arguments, *geometry)
    with pytest.raises(RuntimeError, match="x is Float"):
        operators.conv2d(x.float(), case.values, None, *case.arguments, *geometry)
    with pytest.raises(RuntimeError, match="dy must be"):
        operators.conv2d_wgrad(dy[..., :-1], x, *case.arguments, case.block, *geometry)
    with pytest.raises(RuntimeError, match="values must be"):
        operators.conv2d(x, case.values[:-1], None, *case.arguments, *geometry)
