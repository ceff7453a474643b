"""What a convolutional model cannot take ends as in dense PyTorch, and what looks odd but is right gives the same."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor, nn

from lottery_kernels import dense_state_dict, sparsify
from tests.kernels.nets import masked, random_masks


def network() -> nn.Sequential:
    """For images [N, 3, H, W] of at least 8×8, which the second convolution sees at 2×2 then."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 5, 2),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 4),
    ).double()


def both(density: float = 0.4) -> tuple[nn.Module, nn.Module]:
    """The same model, sparse and dense masked."""
    model = network()
    masks = random_masks(model, density)
    return sparsify(copy.deepcopy(model), masks, when="always"), masked(model, masks)


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 1, 8, 8), (4, 8, 8), (3, 8), (1, 2, 3, 8, 8)])
def test_wrong_channels_and_dimensions_are_errors_that_say_what_is_taken(shape: tuple[int, ...]) -> None:
    sparse, dense = both()
    with pytest.raises(RuntimeError):
        dense(images(*shape))
    with pytest.raises(ValueError, match=re.escape(f"{shape}, the layer takes [N, 3, H, W] or [3, H, W]")):
        sparse(images(*shape))


@pytest.mark.parametrize("shape", [(2, 3, 4, 8), (2, 3, 8, 4)])
def test_an_image_smaller_than_a_kernel_is_the_error_of_dense_pytorch(shape: tuple[int, ...]) -> None:
    sparse, dense = both()
    with pytest.raises(RuntimeError) as expected:
        dense(images(*shape))
    with pytest.raises(RuntimeError, match=re.escape(str(expected.value))):
        sparse(images(*shape))


def test_an_image_smaller_than_a_pool_is_the_error_of_dense_pytorch() -> None:
    sparse, dense = both()
    with pytest.raises(RuntimeError, match="Output size is too small"):
        dense(images(2, 3, 1, 8))
    with pytest.raises(RuntimeError, match="Output size is too small"):
        sparse(images(2, 3, 1, 8))


def test_one_sample_with_one_value_a_channel_is_refused_in_training_alone() -> None:
    sparse, dense = both()
    x = images(1, 3, 8, 8)  # one value a channel at the second BatchNorm
    with pytest.raises(ValueError, match="Expected more than 1 value per channel") as expected:
        dense(x)
    with pytest.raises(ValueError, match=re.escape(str(expected.value))):
        sparse(x)
    torch.testing.assert_close(sparse.eval()(x), dense.eval()(x))


@pytest.mark.parametrize("shape", [(1, 3, 12, 12), (2, 3, 8, 8)])
def test_one_larger_sample_and_two_small_ones_train_as_in_dense_pytorch(shape: tuple[int, ...]) -> None:
    assert_trains_alike(*both(), images(*shape))


@pytest.mark.parametrize("empty", [["0"], ["4"], ["6"], ["11"], ["0", "4", "6", "11"]])
@pytest.mark.parametrize("block", [(1, 1), (4, 4)])
def test_a_mask_that_kills_whole_layers_trains_as_in_dense_pytorch(empty: list[str], block: tuple[int, int]) -> None:
    model = network()
    with torch.no_grad():
        for norm in (model[1], model[7]):
            norm.bias.normal_()  # a layer of zeros would sit on the kink of ReLU
    masks = random_masks(model, 0.4)
    for name in empty:
        masks[name] = torch.zeros_like(masks[name])
    assert_trains_alike(
        sparsify(copy.deepcopy(model), masks, block, "always"), masked(model, masks), images(4, 3, 9, 8)
    )


def test_an_empty_batch_is_the_same_as_in_dense_pytorch() -> None:
    sparse, dense = both()
    x = images(0, 3, 8, 8)
    assert sparse.eval()(x).shape == dense.eval()(x).shape == (0, 4)


def assert_trains_alike(sparse: nn.Module, dense: nn.Module, x: Tensor) -> None:
    """Three steps: the same outputs, parameters, buffers and gradients of the input."""
    optimizers = [torch.optim.Adam(model.parameters(), lr=0.01) for model in (sparse, dense)]
    for _ in range(3):
        results = []
        for model, optimizer in zip((sparse, dense), optimizers, strict=True):
            optimizer.zero_grad()
            given = x.clone().requires_grad_()
            y = model(given)
            (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
            optimizer.step()
            assert given.grad is not None
            results.append((y.detach(), given.grad))
        torch.testing.assert_close(*results)
    torch.testing.assert_close(dense_state_dict(sparse), dense_state_dict(dense))
