"""The C++ linear kernels against fp64 autograd of the dense masked layer."""

from collections.abc import Callable
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

backward = torch.ops.lottery_kernels.linear_backward if build.load() else None

BLOCKS = [(1, 1), (1, 5), (3, 2), (4, 4), (8, 8), (16, 16), (5, 18)]


@dataclass
class Case:
    """A masked linear layer with an input and a cotangent."""

    out: int = 37
    inputs: int = 45
    batch: int = 60
    block: tuple[int, int] = (1, 1)
    density: float = 0.2
    dtype: torch.dtype = torch.float64
    mask: Tensor | None = None
    pattern: Pattern = field(init=False)

    def __post_init__(self) -> None:
        mask = torch.rand(self.out, self.inputs) < self.density if self.mask is None else self.mask
        self.pattern = Pattern.from_mask(mask, self.block)
        self.x = torch.randn(self.batch, self.inputs, dtype=self.dtype)
        self.dy = torch.randn(self.batch, self.out, dtype=self.dtype)
        self.weight, self.bias = torch.randn(self.out, self.inputs, dtype=self.dtype) * mask, self.x.new_ones(self.out)

    @property
    def arguments(self) -> tuple:
        return (self.pattern.index, self.pattern.weight_shape)

    @property
    def values(self) -> Tensor:
        return self.pattern.pack(self.weight)

    def expected(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """y, dx, dvalues, dbias of the dense masked layer."""
        tensors = [t.to(dtype).requires_grad_() for t in (self.x, self.weight, self.bias)]
        y = F.linear(*tensors)
        dx, dweight, dbias = torch.autograd.grad(y, tensors, self.dy.to(dtype))
        return [y.detach(), dx, self.pattern.pack(dweight), dbias]

    def found(self, layout: Callable[[Tensor], Tensor] = Tensor.contiguous) -> list[Tensor]:
        """The same of the sparse operators, through autograd, from x and dy in a layout."""
        tensors = [layout(self.x).detach(), self.values, self.bias]
        for tensor in tensors:
            tensor.requires_grad_()
        y = operators.linear(*tensors, *self.arguments)
        return [y.detach(), *torch.autograd.grad(y, tensors, layout(self.dy))]

    def check(self) -> None:
        for found, expected in zip(self.found(), self.expected(), strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("batch", [0, 1, 17, 60, 128, 130, 280])
def test_outputs_and_gradients_equal_dense_masked(batch, block):
    Case(batch=batch, block=block).check()


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("density", [0.0, 1.0])
def test_all_pruned_and_full_masks(density, block):
    Case(density=density, block=block).check()


@pytest.mark.parametrize("block", BLOCKS)
def test_empty_rows_and_columns(block):
    mask = torch.rand(37, 45) < 0.5
    mask[5:25], mask[:, :21] = False, False
    Case(mask=mask, block=block).check()


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (64, 64), (16, 4000)])
def test_shapes_from_one_weight_to_more_than_the_cache_holds(shape):
    Case(*shape, batch=40).check()


@pytest.mark.parametrize("block", [(1, 1), (4, 4)])
@pytest.mark.parametrize("batch", [80, 83])  # whole vectors, and not
@pytest.mark.parametrize("shape", [(7000, 5), (5, 7000)])
def test_outputs_that_no_core_has_the_cache_for(shape, batch, block):
    Case(*shape, batch, block).check()


@pytest.mark.parametrize("block", [(1, 1), (4, 4), (16, 16)])
@pytest.mark.parametrize("layout", ["row-major", "batch innermost"])
def test_inputs_that_no_weight_reads_may_be_anything(layout, block):
    mask = torch.rand(37, 90) < 0.5
    mask[:, 10:70] = False
    case = Case(mask=mask, inputs=90, block=block)
    expected = case.expected()
    case.x = case.x.clone().index_fill_(1, torch.arange(16, 64), torch.nan)
    for found, wanted in zip(case.found(LAYOUTS.get(layout, Tensor.contiguous)), expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("block", BLOCKS)
def test_fp32_is_as_exact_as_torch(block):
    case = Case(dtype=torch.float32, block=block, batch=200, inputs=300)
    for found, torchs, exact in zip(case.found(), case.expected(torch.float32), case.expected(), strict=True):
        assert found.dtype == torch.float32
        assert (found - exact).abs().max() <= 2 * (torchs - exact).abs().max()


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("block", [(1, 1), (4, 4)])
def test_each_gradient_alone_equals_all_at_once(block, wanted):
    case = Case(block=block)
    tensors = (case.dy, case.x, case.values, *case.arguments)
    together, alone = backward(*tensors, [True] * 3), backward(*tensors, wanted)
    for one, other, asked in zip(alone, together, wanted, strict=True):
        assert torch.allclose(one, other) if asked else one.numel() == 0
    dgrad = operators.linear_dgrad(case.dy, case.values, *case.arguments)
    torch.testing.assert_close(dgrad, together[0])
    wgrad = operators.linear_wgrad(case.dy, case.x, *case.arguments, block)
    torch.testing.assert_close(wgrad, together[1])


@pytest.mark.parametrize("block", [(1, 1), (3, 2)])
def test_all_gradients_at_once_have_gradients_themselves(block):
    case = Case(7, 5, 4, block, 0.5)
    tensors = [t.requires_grad_() for t in (case.dy, case.x, case.values)]

    def gradients(dy: Tensor, x: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        return backward(dy, x, values, *case.arguments, [True] * 3)

    assert torch.autograd.gradcheck(gradients, tensors)
    assert torch.autograd.gradgradcheck(gradients, tensors)


@pytest.mark.parametrize("block", [(1, 1), (4, 4), (16, 16)])
@pytest.mark.parametrize("batch", [5, 60, 200, 570])
def test_same_bits_for_any_number_of_threads(threads, block, batch):
    case = Case(300, 400, batch, block, dtype=torch.float32)
    results = []
    for count in (1, 2, 8, 2):
        torch.set_num_threads(count)
        results.append(case.found())
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))


@pytest.mark.parametrize("batch", [60, 130])  # summed in one part, and in two
@pytest.mark.parametrize("rows", [slice(0, 0), slice(0, 290), slice(10, 300), slice(140, 160)])
def test_gradients_of_single_weights_that_several_threads_put_in_place(threads, rows, batch):
    mask = torch.rand(300, 900) < 0.9
    mask[rows] = mask[rows] & (torch.rand(mask[rows].shape) < 0.02)
    mask[rows.start] = False
    case = Case(300, 900, batch, mask=mask)
    expected = case.expected()
    for count in (1, 2, 8):
        torch.set_num_threads(count)
        for found, wanted in zip(case.found(), expected, strict=True):
            torch.testing.assert_close(found, wanted)


LAYOUTS = {
    "batch innermost": lambda x: x.T.contiguous().T,
    "one panel wide": lambda x: x[:16].T.contiguous().T.repeat(4, 1)[:60],
    "sliced": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_inputs_of_any_strides_give_the_same_bits(layout):
    case = Case()
    for found, expected in zip(case.found(layout), case.found(lambda x: layout(x).contiguous()), strict=True):
        assert torch.equal(found, expected)


def test_results_are_batch_innermost():
    y, dx, *_ = Case().found()
    assert y.T.is_contiguous()
    assert dx.T.is_contiguous()


def test_nothing_outside_the_input_is_read():
    case = Case(batch=13, dtype=torch.float32)
    surrounded = torch.full((13 + 2, 45 + 2), torch.nan)
    surrounded[1:-1, 1:-1] = case.x
    y = operators.linear(surrounded[1:-1, 1:-1], case.values, case.bias, *case.arguments)
    torch.testing.assert_close(y, case.expected(torch.float32)[0])


def test_inputs_that_do_not_fit_are_named():
    case = Case()
    with pytest.raises(RuntimeError, match=r"x must be \[N, 45\], got \[60, 44\]"):
        operators.linear(case.x[:, 1:], case.values, case.bias, *case.arguments)
    with pytest.raises(RuntimeError, match=r"x is Float, the weight's values are Double"):
        operators.linear(case.x.float(), case.values, case.bias, *case.arguments)
    with pytest.raises(RuntimeError, match=r"index does not belong to a weight of shape \[36, 45\]"):
        operators.linear(case.x, case.values, case.bias, case.pattern.index, [36, 45])
