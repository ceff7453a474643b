"""The operators against fp64 autograd of the dense masked layer, whatever backend serves the CPU."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lottery_kernels import Pattern, SparseLinear, operators
from lottery_kernels.fuse import FusedSequential

pytestmark = pytest.mark.usefixtures("nan_filled")

BLOCKS = [(1, 1), (4, 4), (2, 3), (16, 16)]


@dataclass
class Case:
    """One weight, mask and input, with the operators' arguments."""

    x: Tensor
    weight: Tensor
    mask: Tensor
    bias: Tensor
    pattern: Pattern
    geometry: tuple = ()  # of a convolution

    @property
    def values(self) -> Tensor:
        return self.pattern.pack(self.weight)

    def sparse(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        op = operators.conv2d if self.geometry else operators.linear
        return op(x, values, bias, self.pattern.index, self.pattern.weight_shape, *self.geometry)

    def dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weight = weight * self.mask
        return F.conv2d(x, weight, bias, *self.geometry) if self.geometry else F.linear(x, weight, bias)


def linear_case(block=(1, 1), density=0.3, batch=5, shape=(19, 23), dtype=torch.float64) -> Case:
    weight, mask = torch.randn(shape, dtype=dtype), torch.rand(shape) < density
    x, bias = torch.randn(batch, shape[1], dtype=dtype), torch.randn(shape[0], dtype=dtype)
    return Case(x, weight, mask, bias, Pattern.from_mask(mask, block))


def conv_case(block=(1, 1), density=0.3, stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2) -> Case:
    weight = torch.randn(6, 5, 3, 2, dtype=torch.float64)
    mask = torch.rand(weight.shape) < density
    x = torch.randn(3, 5 * groups, 7, 6, dtype=torch.float64)
    bias, pattern = torch.randn(6, dtype=torch.float64), Pattern.from_mask(mask, block, groups)
    return Case(x, weight, mask, bias, pattern, (list(stride), list(padding), list(dilation), groups))


CASES = [
    pytest.param(make, block, id=f"{make.__name__}-{block[0]}x{block[1]}")
    for make in (linear_case, conv_case)
    for block in BLOCKS
]


def gradients(case: Case) -> list[tuple[Tensor, Tensor]]:
    """(sparse, dense masked) output, input gradient, packed weight gradient and bias gradient."""
    x, bias, weight = (t.clone().requires_grad_() for t in (case.x, case.bias, case.weight))
    expected = case.dense(x, weight, bias)
    cotangent = torch.randn_like(expected)
    dense = torch.autograd.grad(expected, (x, weight, bias), cotangent)
    values = case.values.requires_grad_()
    y = case.sparse(x, values, bias)
    sparse = torch.autograd.grad(y, (x, values, bias), cotangent)
    return [(y, expected), (sparse[0], dense[0]), (sparse[1], case.pattern.pack(dense[1])), (sparse[2], dense[2])]


@pytest.mark.parametrize(("make", "block"), CASES)
def test_outputs_and_gradients_equal_dense_masked(make, block):
    for sparse, dense in gradients(make(block)):
        torch.testing.assert_close(sparse, dense)


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize(("make", "block"), CASES)
def test_all_pruned_and_full_masks(make, block, density):
    for sparse, dense in gradients(make(block, density=density)):
        torch.testing.assert_close(sparse, dense)


@pytest.mark.parametrize("block", BLOCKS)
def test_one_survivor(block):
    case = linear_case(block)
    case.mask = torch.zeros_like(case.mask)
    case.mask[-1, -1] = True
    case.pattern = Pattern.from_mask(case.mask, block)
    for sparse, dense in gradients(case):
        torch.testing.assert_close(sparse, dense)


@pytest.mark.parametrize("batch", [0, 1, 60])
@pytest.mark.parametrize("block", BLOCKS)
def test_batches_of_any_size(block, batch):
    for sparse, dense in gradients(linear_case(block, batch=batch)):
        torch.testing.assert_close(sparse, dense)


@pytest.mark.parametrize(("make", "block"), CASES)
def test_operators_pass_opcheck(make, block):
    case = make(block)
    index, shape = case.pattern.index, case.pattern.weight_shape
    x, values, bias = case.x.requires_grad_(), case.values.requires_grad_(), case.bias.requires_grad_()
    ops = torch.ops.lottery_kernels
    if case.geometry:
        forward, dgrad, wgrad, x_shape = ops.conv2d, ops.conv2d_dgrad, ops.conv2d_wgrad, [list(x.shape)]
    else:
        forward, dgrad, wgrad, x_shape = ops.linear, ops.linear_dgrad, ops.linear_wgrad, []
    dy = torch.randn_like(case.sparse(x, values, bias)).requires_grad_()
    torch.library.opcheck(forward.default, (x, values, bias, index, shape, *case.geometry))
    torch.library.opcheck(dgrad.default, (dy, values, index, shape, *x_shape, *case.geometry))
    torch.library.opcheck(wgrad.default, (dy, x, index, shape, block, *case.geometry))


@pytest.mark.parametrize("make", [linear_case, conv_case])
@pytest.mark.parametrize("block", [(1, 1), (2, 3)])
def test_derivatives_of_second_order(make, block):
    case = make(block)
    dead = case.pattern.alive if case.pattern.alive is not None else torch.ones_like(case.values, dtype=torch.bool)

    def function(x, values, bias):
        return case.sparse(x, values * dead, bias)  # dead positions are no coordinates

    inputs = [t.requires_grad_() for t in (case.x[:2], case.values, case.bias)]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("content", [0.0, 3.0, torch.inf, torch.nan])
@pytest.mark.parametrize("density", [0.2, 1.0])  # dead where the mask is finer; only outside the weight
@pytest.mark.parametrize("make", [linear_case, conv_case])
def test_dead_positions_neither_act_nor_receive_gradients(make, density, content):
    case = make((4, 4), density=density)
    dead = ~case.pattern.alive
    polluted = torch.where(dead, content, case.values).requires_grad_()
    before = polluted.detach().clone()
    x, exact_x = (case.x.clone().requires_grad_() for _ in range(2))
    y, exact = case.sparse(x, polluted, None), case.dense(exact_x, case.weight, None)
    torch.testing.assert_close(y, exact)
    cotangent = torch.randn_like(exact)
    dx, dvalues = torch.autograd.grad(y, (x, polluted), cotangent)
    torch.testing.assert_close(dx, *torch.autograd.grad(exact, exact_x, cotangent))
    assert (dvalues[dead] == 0).all()
    torch.testing.assert_close(polluted.detach(), before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("make", [linear_case, conv_case])
def test_dead_positions_receive_no_gradient_of_infinite_activations(make):
    """A product with the zeros around a weight would be NaN."""
    case = make((4, 4), density=1.0)
    case.x[0] = torch.inf
    values = case.values.requires_grad_()
    y = case.sparse(case.x, values, None)
    (dvalues,) = torch.autograd.grad(y, values, torch.full_like(y, torch.inf))
    assert (dvalues[~case.pattern.alive] == 0).all()


@pytest.mark.skipif(not operators._backend_serves("linear", "cpu"), reason="no C++ compiler: the reference is dense")
def test_pruned_weights_skip_infinite_inputs():
    """Dense masked training makes NaN of 0·inf; a weight that is not there makes nothing."""
    case = linear_case()
    case.x[:, 3] = torch.inf
    case.mask[:, 3] = False
    case.pattern = Pattern.from_mask(case.mask)
    assert case.sparse(case.x, case.values, case.bias).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_exact_as_torch(dtype):
    case = linear_case(density=0.5, shape=(33, 65))
    y = case.sparse(case.x.to(dtype), case.values.to(dtype), case.bias.to(dtype))
    assert y.dtype == dtype
    expected = case.dense(case.x, case.weight, case.bias)
    torchs = F.linear(case.x.to(dtype), (case.weight * case.mask).to(dtype), case.bias.to(dtype))
    assert (y - expected).abs().max() <= 2 * (torchs - expected).abs().max()


def test_autocast_on_the_cpu_computes_in_fp32():
    case = linear_case(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = case.sparse(case.x.bfloat16(), case.values, case.bias)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, case.dense(case.x.bfloat16().float(), case.weight, case.bias))


def test_outputs_are_batch_innermost_on_the_cpu_but_for_narrow_ones():
    for features, stride in ((17, (1, 7)), (16, (16, 1))):
        case = linear_case(batch=7, shape=(features, 23))
        assert case.sparse(case.x, case.values, None).stride() == stride
    conv = conv_case()
    y = conv.sparse(conv.x, conv.values, None)
    assert y.stride() == torch.empty(*y.shape[1:], y.shape[0]).permute(3, 0, 1, 2).stride()


@pytest.mark.parametrize("layout", ["row-major", "batch-innermost", "sliced"])
def test_inputs_of_any_strides(layout):
    case = linear_case(batch=9)
    if layout == "batch-innermost":
        case.x = case.x.t().contiguous().t()
    elif layout == "sliced":
        case.x = torch.randn(18, 46, dtype=torch.float64)[::2, 1::2]
    for sparse, dense in gradients(case):
        torch.testing.assert_close(sparse, dense)


@pytest.mark.parametrize("block", [(1, 1), (4, 4)])
def test_compiled_graphs_give_the_same_bits(block):
    case = linear_case(block)
    values = case.values.requires_grad_()

    def step(x, values, bias):
        return case.sparse(x, values, bias).relu()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected, found = step(case.x, values, case.bias), compiled(case.x, values, case.bias)
    assert torch.equal(expected, found)
    cotangent = torch.randn_like(expected)
    assert torch.equal(*(torch.autograd.grad(y, values, cotangent)[0] for y in (expected, found)))


@pytest.mark.parametrize("moved", [0, 1, 2, 3], ids=["x", "values", "bias", "index"])
def test_tensors_on_different_devices_are_named(moved):
    """Where no backend's own kernel has seen them; meta stands for a GPU."""
    pattern = Pattern.from_mask(torch.rand(6, 8) < 0.5)
    args = [torch.randn(3, 8), torch.randn(pattern.nnz, 1, 1), torch.randn(6), pattern.index, [6, 8]]
    args[moved] = [t.to("meta") for t in args[3]] if moved == 3 else args[moved].to("meta")
    name = ["x", "values", "bias", "index"][moved]
    found = rf"linear: x is on {'meta' if moved == 0 else 'cpu'}, {'values' if moved == 0 else name} on"
    with pytest.raises(ValueError, match=found):
        operators._kernel("linear")(*args)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch._mkldnn])
def test_a_tensor_that_is_not_dense_is_named(layout):
    x = torch.randn(3, 8)
    x = x.to_mkldnn() if layout is torch._mkldnn else x.to_sparse(layout=layout)
    one, other = SparseLinear(8, 6), SparseLinear(6, 4)
    for model in (one, FusedSequential(one, nn.ReLU(), other)):
        with pytest.raises(ValueError, match=rf"x is {layout}; it takes dense tensors: x.to_dense\(\)"):
            model(x)
