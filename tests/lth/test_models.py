"""Networks and their initialisation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lth.models import NETWORKS


@pytest.mark.parametrize(("name", "weights"), [("lenet-300-100", 266_200), ("lenet-wide", 3_713_024)])
def test_networks_have_the_stated_number_of_weights(name: str, weights: int) -> None:
    model = NETWORKS[name]((1, 28, 28), 10)
    assert sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear)) == weights
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_initialisation_is_gaussian_glorot_with_zero_biases() -> None:
    layer = NETWORKS["lenet-wide"]((1, 28, 28), 10).get_submodule("fc1")
    assert isinstance(layer, nn.Linear)
    sigma = (2 / (784 + 2048)) ** 0.5
    weight = layer.weight.detach()
    assert weight.std().item() == pytest.approx(sigma, rel=0.01)
    assert (weight.abs() > 3 * sigma).float().mean().item() == pytest.approx(0.0027, abs=0.0005)  # no uniform has these
    assert not layer.bias.any()


def test_a_draw_follows_torchs_seed() -> None:
    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return NETWORKS["lenet-300-100"]((1, 28, 28), 10).get_submodule("fc1").weight.detach()

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
