"""A new mask for a sparse layer: survivors, optimizer state, graphs that are alive."""

import pytest
import torch
from torch import nn

from tests.kernels.layer_cases import BLOCKS, LAYERS, assert_same_training, dense_masked, sparse_linear


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_a_new_mask_keeps_survivors_and_starts_others_at_zero(make, shape, block):
    layer = make(block)
    before, values = layer.weight.detach(), layer.values
    mask = torch.rand_like(before) < 0.4
    layer(torch.randn(shape, dtype=torch.float64)).sum().backward()
    layer.set_mask(mask)
    assert layer.values is values
    assert layer.values.grad is None
    assert torch.equal(layer.mask, mask)
    assert torch.equal(layer.weight, before.where(mask, torch.zeros((), dtype=torch.float64)))
    assert_same_training(layer, dense_masked(layer), torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("fused", [False, True])
def test_a_new_mask_carries_the_optimizers_state_along(block, fused):
    layer = sparse_linear(block, density=0.6)
    optimizer = torch.optim.Adam(layer.parameters(), amsgrad=True, fused=fused)
    x = torch.randn(5, 13, dtype=torch.float64)
    layer(x).square().sum().backward()
    optimizer.step()
    before = {key: value.clone() for key, value in optimizer.state[layer.values].items()}
    pattern, mask = layer.pattern, torch.rand(11, 13) < 0.5
    layer.set_mask(mask, optimizer)
    state = optimizer.state[layer.values]
    assert state.keys() == before.keys()
    assert torch.equal(state["step"], before["step"])
    for key in state.keys() - {"step"}:
        expected = pattern.unpack(before[key]).where(mask, torch.zeros((), dtype=torch.float64))
        assert torch.equal(layer.pattern.unpack(state[key]), expected)
    layer(x).square().sum().backward()
    optimizer.step()
    assert torch.equal(layer.weight, layer.weight * mask)


def test_an_optimizer_that_does_not_hold_the_layer_is_refused():
    layer = sparse_linear()
    with pytest.raises(ValueError, match="optimizer does not hold"):
        layer.set_mask(~layer.mask, torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1))


def test_a_new_mask_while_an_old_graph_is_alive():
    """A loss that is still referenced must not make the leaf remember its old size."""
    layer = sparse_linear()
    losses = []
    for density in (0.2, 0.6, 0.05):
        layer.set_mask(torch.rand(11, 13) < density)
        loss = layer(torch.randn(5, 13, dtype=torch.float64)).sum()
        loss.backward()
        assert layer.values.grad.shape == layer.values.shape
        losses.append(loss)


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_a_new_mask_between_forward_and_backward_is_an_error(make, shape):
    layer = make()
    loss = layer(torch.randn(shape, dtype=torch.float64, requires_grad=True)).sum()
    layer.set_mask(layer.mask)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_positions_of_tail_blocks_stay_zero_under_every_optimizer():
    layer = sparse_linear((4, 4), density=0.5)
    x = torch.randn(5, 13, dtype=torch.float64)
    for kind in (torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.SGD):
        optimizer = kind(layer.parameters(), lr=0.1, weight_decay=0.1)
        layer(x).sum().backward()
        optimizer.step()
        assert (layer.values[~layer.pattern.alive] == 0).all(), kind
