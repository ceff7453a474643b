"""Activations stay batch-innermost through a model, and nothing but speed changes."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lottery_kernels import SparseConv2d, SparseLinear, densify, sparsify
from lottery_kernels.cpu import build
from lottery_kernels.fuse import to_fused
from lottery_kernels.layout import is_batch_innermost, to_batch_innermost, to_usual_layout
from lth.models import NETWORKS

POOLS = {
    "max": lambda: nn.MaxPool2d(2),
    "max, not square, with gaps": lambda: nn.MaxPool2d((2, 3), (3, 4)),
    "max of what is left": lambda: nn.MaxPool2d(2, ceil_mode=True),
    "max, overlapping": lambda: nn.MaxPool2d(3, 2, 1),
    "max with indices": lambda: nn.MaxPool2d(2, return_indices=True),
    "average": lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True),
    "adaptive average": lambda: nn.AdaptiveAvgPool2d((3, 2)),
    "adaptive average to a pixel": lambda: nn.AdaptiveAvgPool2d(1),
    "adaptive maximum": lambda: nn.AdaptiveMaxPool2d(2),
    "batch norm": lambda: nn.BatchNorm2d(5),
    "batch norm without statistics": lambda: nn.BatchNorm2d(5, track_running_stats=False),
    "batch norm without affine": lambda: nn.BatchNorm2d(5, affine=False, momentum=None),
}


def batch_innermost(x: Tensor) -> Tensor:
    return x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


def step(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs, the input's gradient, and the gradients and buffers of the module after two steps."""
    x = x.detach().requires_grad_()
    for _ in range(2):
        outputs = tree_leaves(module(x))
        outputs[0].square().sum().backward()
    state = [p.grad for p in module.parameters()] + list(module.buffers())
    return [*(y.detach() for y in outputs), x.grad, *state]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", POOLS.values(), ids=POOLS)
def test_results_are_the_usual_ones_and_batch_innermost(make, training):
    usual = make().train(training)
    swapped = to_batch_innermost(copy.deepcopy(usual))
    x = torch.randn(4, 5, 9, 8, dtype=torch.float64)
    usual.double(), swapped.double()
    found = step(swapped, batch_innermost(x))
    for one, other in zip(found, step(usual, x), strict=True):
        torch.testing.assert_close(one, other)
    assert is_batch_innermost(found[0])


@pytest.mark.parametrize("make", POOLS.values(), ids=POOLS)
@pytest.mark.parametrize("layout", ["row-major", "channels_last", "one image"])
def test_other_layouts_give_the_same_bits_as_before(make, layout):
    usual = make().double()
    swapped = to_batch_innermost(copy.deepcopy(usual))
    x = torch.randn(1 if layout == "one image" else 4, 5, 9, 8, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x
    for one, other in zip(step(swapped, x), step(usual, x), strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()


def max_pools(kernel=2, stride=None) -> tuple[nn.Module, nn.Module]:
    """torch's, and the batch-innermost one."""
    usual = nn.MaxPool2d(kernel, stride)
    return usual, to_batch_innermost(copy.deepcopy(usual))


@pytest.mark.skipif(not build.load(), reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [2, 8, 16, 60, 67])
def test_max_pooling_gives_a_window_s_gradient_to_the_entry_that_torch_chooses(nan_filled, batch, dtype):
    x = torch.randint(-2, 3, (batch, 5, 9, 8), dtype=dtype)  # many equals
    x.flatten()[torch.randperm(x.numel())[:40]] = torch.nan
    x[:, 0], x[0] = -torch.inf, torch.inf
    for kernel, stride in ((2, None), (2, 3), ((3, 2), (4, 2))):
        usual, ours = max_pools(kernel, stride)
        with torch.profiler.profile() as profile:
            found = step(ours, batch_innermost(x))
        assert any(event.key == "lottery_kernels::max_pool2d" for event in profile.key_averages())
        for one, other in zip(found, step(usual, x), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(not build.load(), reason="no C++ compiler")
def test_max_pooling_has_gradients_of_any_order_and_a_shape_rule():
    _, ours = max_pools()
    x = batch_innermost(torch.randn(3, 2, 5, 4, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(ours, [x])
    assert torch.autograd.gradgradcheck(ours, [x])
    torch.library.opcheck(torch.ops.lottery_kernels.max_pool2d.default, (x, (2, 2), (2, 2)))
    torch.library.opcheck(
        torch.ops.lottery_kernels.max_pool2d_backward.default, (ours(x).detach(), x.detach(), (2, 2), (2, 2))
    )
    with pytest.raises(RuntimeError, match="must not be empty or overlap"):
        torch.ops.lottery_kernels.max_pool2d(x, (2, 2), (1, 2))
    with pytest.raises(RuntimeError, match="x must be a batch-innermost image"):
        torch.ops.lottery_kernels.max_pool2d(x.contiguous(), (2, 2), (2, 2))


def test_one_value_per_channel_is_refused_as_torch_refuses_it():
    x = torch.randn(1, 5, 1, 1)
    for module in (nn.BatchNorm2d(5), to_batch_innermost(nn.BatchNorm2d(5))):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            module(x)


def test_swapping_keeps_everything_but_the_class():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.MaxPool2d(2), nn.AvgPool2d(2)).eval()
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append("hook"))
    modules, state, kinds = list(model), model.state_dict(keep_vars=True), [type(m) for m in model]
    to_batch_innermost(model)
    assert [type(m) for m in model] != kinds
    assert list(model) == modules
    assert {key: id(value) for key, value in model.state_dict(keep_vars=True).items()} == {
        key: id(value) for key, value in state.items()
    }
    assert not model[0].training
    pickle.loads(pickle.dumps(copy.deepcopy(model[1])))
    to_usual_layout(model)
    assert [type(m) for m in model] == kinds
    model(torch.randn(2, 3, 8, 8))
    assert calls == ["hook"]


def test_subclasses_of_a_user_are_left_alone():
    class Own(nn.BatchNorm2d):
        pass

    assert type(to_batch_innermost(Own(3))) is Own


class Residual(nn.Module):
    """Two convolutions beside a shortcut with functional calls, as users write them."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 2 * channels, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(2 * channels, 2 * channels, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(channels, 2 * channels, 1, stride, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(2 * channels) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norms[0](self.first(x)))
        y = self.norms[1](self.second(y))
        return F.relu(y + self.norms[2](self.shortcut(x)), inplace=True)


def vgg() -> nn.Module:
    widths, layers = (3, 8, 16), []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(True), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Dropout(0.0), nn.Flatten(), nn.Linear(16 * 2 * 2, 10))


def resnet() -> nn.Module:
    stem = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(True)]
    blocks = [Residual(8, 1), Residual(16, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def sparse(model: nn.Module) -> nn.Module:
    convolutions = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    masks = {name: torch.rand_like(m.weight) < 0.5 for name, m in convolutions.items()}
    return to_batch_innermost(sparsify(model, masks, when="always"))


def count_convolutions(model: nn.Module) -> int:
    return sum(isinstance(module, SparseConv2d) for module in model.modules())


class Layouts(TorchDispatchMode):
    """Notes, for every operation on images, its name and whether one of them was not batch-innermost."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch
        self.noted: list[tuple[str, bool]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        images = [value for value in tree_leaves((args, result)) if isinstance(value, Tensor) and value.dim() == 4]
        if images and not func.is_view:
            self.noted.append((str(func), any(map(self.foreign, images))))
        return result

    def foreign(self, image: Tensor) -> bool:
        """Whether an image, as it is or seen as `[1, C, H·W, N]` or `[C, N, H, W]`, is not batch-innermost."""
        if image.shape[0] == self.batch:
            return not is_batch_innermost(image)
        if image.shape[0] == 1:
            return not image.is_contiguous()
        return image.shape[1] == self.batch and not is_batch_innermost(image.transpose(0, 1))


@pytest.mark.skipif(not build.load(), reason="the reference works in torch's layouts")
@pytest.mark.parametrize("make", [vgg, resnet, "vgg19", "resnet20", "conv-4"])
def test_a_step_converts_layouts_at_its_two_ends_alone(make):
    model = sparse(NETWORKS[make]((3, 16, 16), 10) if isinstance(make, str) else make())
    x = torch.randn(6, 3, 16, 16) if isinstance(make, str) else torch.randn(6, 3, 8, 8)
    with Layouts(6) as forward:
        loss = F.cross_entropy(model(x), torch.randint(10, (6,)))
    assert forward.noted[0] == ("lottery_kernels.conv2d.default", True)  # the images come in
    assert not any(foreign for _, foreign in forward.noted[1:])
    with Layouts(6) as backward:
        loss.backward()
    # The classifier's gradient comes in, at the other end the images do once more; nothing between.
    middle = list(itertools.dropwhile(lambda note: note[1], backward.noted))[:-1]
    assert backward.noted[-1] == ("lottery_kernels.conv2d_backward.default", True)
    assert sum(name == "lottery_kernels.conv2d_backward.default" for name, _ in middle) == count_convolutions(model) - 1
    assert not any(foreign for _, foreign in middle)


@pytest.mark.skipif(not build.load(), reason="no C++ compiler")
@pytest.mark.parametrize("relu", [False, True])
def test_batch_norm_has_derivatives_of_second_order(relu):
    norm = to_fused(nn.Sequential(to_batch_innermost(nn.BatchNorm2d(2).double()), *[nn.ReLU()] * relu))
    x = batch_innermost(torch.randn(3, 2, 2, 1, dtype=torch.float64))

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"0.weight": weight, "0.bias": bias}, x)

    inputs = [t.detach().clone().requires_grad_() for t in (x, norm[0].weight, norm[0].bias)]
    inputs[0] = x.requires_grad_()
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.skipif(not build.load(), reason="no C++ compiler")
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 2, 1), (60, 5, 7, 3), (64, 5, 32, 32), (17, 5, 33, 40)])
def test_batch_norm_and_relu_in_one_give_the_bits_of_both(shape, affine):
    apart = nn.Sequential(to_batch_innermost(nn.BatchNorm2d(5, affine=affine)), nn.ReLU())
    if affine:
        nn.init.normal_(apart[0].weight), nn.init.normal_(apart[0].bias)
    fused = to_fused(copy.deepcopy(apart))
    x = batch_innermost(torch.randn(shape))
    for one, other in zip(step(fused, x), step(apart, x), strict=True):
        assert torch.equal(one, other)
    y = fused(x.requires_grad_())
    assert "BatchNorm" in y.grad_fn.name() and is_batch_innermost(y)  # no ReLU node
    assert fused[1](torch.tensor(-1.0)) == 0


@pytest.mark.skipif(not build.load(), reason="no C++ compiler")
def test_batch_norm_in_evaluation_is_not_fused():
    fused = to_fused(nn.Sequential(to_batch_innermost(nn.BatchNorm2d(5)), nn.ReLU())).eval()
    x = batch_innermost(torch.randn(4, 5, 3, 3))
    torch.testing.assert_close(fused(x), F.relu(F.batch_norm(x, fused[0].running_mean, fused[0].running_var)))


@pytest.mark.skipif(not build.load(), reason="no C++ compiler")
@pytest.mark.parametrize("shape", [(3, 2, 2, 1), (60, 5, 7, 3), (64, 3, 32, 32)])
def test_batch_norm_in_fp32_is_as_exact_as_torch(shape):
    x, usual = torch.randn(shape) * 3 + 100, nn.BatchNorm2d(shape[1])
    single = step(copy.deepcopy(usual), x)
    exact = step(copy.deepcopy(usual).double(), x.double())
    found = step(to_batch_innermost(usual), batch_innermost(x))
    for ours, theirs, true in zip(found, single, exact, strict=True):
        bound = 2 * (theirs - true).abs().max() + 1e-6 * true.abs().max()
        assert (ours - true).abs().max() <= bound


@pytest.mark.parametrize("make", [vgg, resnet])
def test_a_model_trains_as_the_dense_masked_one(make):
    dense = make().double()
    model = sparse(copy.deepcopy(dense))
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, SparseConv2d | SparseLinear):
                dense.get_submodule(name).weight.mul_(module.mask)
    x, target = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.randint(10, (6,))
    losses = []
    for net in (dense, model):
        F.cross_entropy(net(x), target).backward()
        losses.append(net(x))
    torch.testing.assert_close(*losses)
    for name, module in model.named_modules():
        if isinstance(module, SparseConv2d):
            gradient = dense.get_submodule(name).weight.grad
            torch.testing.assert_close(module.values.grad, module.pattern.pack(gradient))


def test_densify_gives_the_usual_classes_back():
    model = vgg()
    kinds = [type(m) for m in model.modules()]
    assert [type(m) for m in to_usual_layout(densify(sparse(model))).modules()] == kinds
