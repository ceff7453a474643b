"""What the sparse layers promise: dense masked results, to and from dense layers."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from lottery_kernels import SparseConv2d, SparseLinear
from tests.kernels.layer_cases import BLOCKS, LAYERS, assert_same_training, dense_masked, sparse_conv, sparse_linear

# Results


class Doubled(nn.Module):
    def forward(self, parameter: torch.Tensor) -> torch.Tensor:
        return 2 * parameter


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_training_equals_dense_masked(make, shape, block, density):
    layer = make(block, density)
    assert_same_training(layer, dense_masked(layer), torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(13,), (0, 13), (1, 13), (2, 3, 13), (2, 0, 13), (2, 1, 3, 13)])
def test_linear_takes_any_leading_shape(shape):
    layer = sparse_linear()
    assert_same_training(layer, dense_masked(layer), torch.randn(shape, dtype=torch.float64))


def test_a_parametrized_bias_is_the_one_that_counts():
    layer, x = sparse_linear(), torch.randn(5, 13, dtype=torch.float64)
    expected = layer(x) + layer.bias
    parametrize.register_parametrization(layer, "bias", Doubled())
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_the_input_may_be_named(make, shape):
    layer, x = make(), torch.randn(shape, dtype=torch.float64)
    assert torch.equal(layer(input=x), layer(x))


@pytest.mark.parametrize("shape", [(8, 6, 7), (0, 8, 6, 7), (1, 8, 3, 3)])
def test_conv_takes_unbatched_images_and_empty_batches(shape):
    layer = sparse_conv()
    assert_same_training(layer, dense_masked(layer), torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2, "padding": (2, 1), "dilation": (1, 2)},
        {"padding": "same"},
        {"padding": "same", "dilation": (1, 2), "padding_mode": "reflect"},
        {"padding": "valid", "bias": False},
        {"padding": 1, "padding_mode": "circular"},
        {"groups": 1},
    ],
    ids=str,
)
def test_conv_takes_what_nn_conv2d_takes(options):
    layer = sparse_conv(**options)
    assert_same_training(layer, dense_masked(layer), torch.randn(2, 8, 7, 9, dtype=torch.float64))


def test_same_padding_of_an_even_kernel():
    """Which pads one side more than the other."""
    layer = SparseConv2d(3, 4, (2, 4), padding="same", dtype=torch.float64)
    assert_same_training(layer, dense_masked(layer), torch.randn(2, 3, 5, 6, dtype=torch.float64))


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_layers_without_features(sizes):
    y = SparseLinear(*sizes)(torch.randn(2, sizes[0]))
    assert y.shape == (2, sizes[1])


@pytest.mark.parametrize("shape", [(5, 12), (12,), ()])
def test_an_input_of_the_wrong_width_is_named(shape):
    with pytest.raises(ValueError, match=r"input has shape \(.*in_features=13"):
        sparse_linear()(torch.randn(shape, dtype=torch.float64))


def test_an_image_of_the_wrong_channels_is_named():
    with pytest.raises(ValueError, match=r"input has shape \(2, 7, 6, 6\).*\[N, 8, H, W\]"):
        sparse_conv()(torch.randn(2, 7, 6, 6, dtype=torch.float64))


def test_from_dense_takes_its_own_kind_alone():
    with pytest.raises(TypeError, match=r"linear must be a torch\.nn\.Linear, got Conv2d"):
        SparseLinear.from_dense(nn.Conv2d(3, 4, 1))
    with pytest.raises(TypeError, match=r"conv must be a torch\.nn\.Conv2d, got Linear"):
        SparseConv2d.from_dense(nn.Linear(3, 4))


@pytest.mark.parametrize(
    ("mask", "error", "words"),
    [
        (torch.ones(13, 11, dtype=torch.bool), ValueError, r"mask has shape \(13, 11\), the weight's is \(11, 13\)"),
        (torch.ones(11, 13), TypeError, "mask must be a bool tensor.*float32"),
        ([[True] * 13] * 11, TypeError, "mask must be a bool tensor.*list"),
    ],
)
def test_a_mask_that_does_not_fit_is_named(mask, error, words):
    with pytest.raises(error, match=words):
        SparseLinear(13, 11, mask=mask)
    layer = sparse_linear()
    before = layer.weight
    with pytest.raises(error, match=words):
        layer.set_mask(mask)
    assert torch.equal(layer.weight, before)


# To and from dense layers


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dense", [nn.Linear(13, 11), nn.Conv2d(8, 6, 3, 2, "valid", 1, 2, False)])
def test_from_dense_and_back_gives_the_same_bits(dense, block):
    mask = torch.rand_like(dense.weight) < 0.4
    kind = SparseLinear if isinstance(dense, nn.Linear) else SparseConv2d
    back = kind.from_dense(dense.eval(), mask, block).to_dense()
    assert type(back) is type(dense)
    assert repr(back) == repr(dense)
    assert not back.training
    assert torch.equal(back.weight, dense.weight.where(mask, torch.zeros(())))
    assert (back.bias is None) == (dense.bias is None)
    assert back.bias is None or torch.equal(back.bias, dense.bias)


def test_copies_are_independent():
    dense = nn.Linear(13, 11)
    layer = SparseLinear.from_dense(dense)
    back = layer.to_dense()
    with torch.no_grad():
        layer.values.zero_()
        layer.bias.zero_()
    assert dense.weight.all()
    assert dense.bias.all()
    assert back.weight.all()
    assert back.bias.all()


def test_from_dense_takes_what_prune_left_even_after_an_optimizer_step():
    """prune's `weight` is that of the last forward."""
    dense = prune.random_unstructured(nn.Linear(13, 11), "weight", 0.5)
    with torch.no_grad():
        dense.weight_orig.add_(1)
    layer = SparseLinear.from_dense(dense)
    assert torch.equal(layer.mask, dense.weight_mask.bool())
    assert torch.equal(layer.weight, dense.weight_orig * dense.weight_mask)


def test_from_dense_keeps_trainability_and_draws_no_random_numbers():
    dense = nn.Linear(13, 11).requires_grad_(False)
    state = torch.get_rng_state()
    layer = SparseLinear.from_dense(dense)
    assert torch.equal(torch.get_rng_state(), state)
    assert not layer.values.requires_grad
    assert not layer.bias.requires_grad
    assert not layer.to_dense().weight.requires_grad


@pytest.mark.parametrize("bias", [True, False])
def test_the_same_seed_draws_the_dense_layers_survivors(bias):
    torch.manual_seed(3)
    dense = [nn.Linear(13, 11, bias), nn.Conv2d(4, 6, 3, bias=bias)]
    masks = [torch.rand_like(layer.weight) < 0.5 for layer in dense]
    torch.manual_seed(3)
    sparse = [SparseLinear(13, 11, bias, mask=masks[0]), SparseConv2d(4, 6, 3, bias=bias, mask=masks[1])]
    for one, other, mask in zip(dense, sparse, masks, strict=True):
        assert torch.equal(other.weight, one.weight.where(mask, torch.zeros(())))
        assert not bias or torch.equal(other.bias, one.bias)


def test_values_are_a_leaf_as_small_as_the_mask():
    layer = sparse_linear(density=0.2)
    assert layer.values.is_leaf
    assert layer.values.numel() == layer.mask.sum()
    assert layer.density == layer.mask.double().mean()
    assert {name for name, _ in layer.named_parameters()} == {"values", "bias"}
    assert not list(layer.buffers())


def test_weight_is_dense_and_differentiable():
    layer = sparse_linear((4, 4))
    assert torch.equal(layer.weight, layer.weight * layer.mask)
    layer.weight.sum().backward()
    assert torch.equal(layer.values.grad, layer.pattern.pack(torch.ones_like(layer.weight)))


# Training as a whole


@pytest.mark.parametrize("block", BLOCKS)
def test_a_hundred_steps_equal_dense_masked_training(block):
    sparse = nn.Sequential(sparse_conv(block), nn.Flatten(), nn.Tanh(), SparseLinear(96, 4, dtype=torch.float64))
    sparse[3].set_mask(torch.rand(4, 96) < 0.2)
    dense = nn.Sequential(dense_masked(sparse[0]), nn.Flatten(), nn.Tanh(), dense_masked(sparse[3]))
    optimizers = [torch.optim.Adam(model.parameters(), 1e-2) for model in (sparse, dense)]
    for _ in range(100):
        x, target = torch.randn(3, 8, 6, 6, dtype=torch.float64), torch.randint(4, (3,))
        for model, optimizer in zip((sparse, dense), optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), target).backward()
            optimizer.step()
    torch.testing.assert_close(sparse(x), dense(x))
