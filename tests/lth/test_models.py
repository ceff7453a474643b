"""Networks and their initialisation."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from lth.models import NETWORKS
from lth.prune import prunable

DIGITS, CIFAR = (1, 28, 28), (3, 32, 32)


@pytest.mark.parametrize(
    ("name", "shape", "weights"),
    [
        ("lenet-300-100", DIGITS, 266_200),
        ("lenet-wide", DIGITS, 3_713_024),
        ("conv-2", CIFAR, 4_300_992),
        ("conv-4", CIFAR, 2_425_024),
        ("conv-6", CIFAR, 2_261_184),
        ("resnet20", CIFAR, 270_896),
        ("vgg19", CIFAR, 20_024_000),
    ],
)
def test_networks_have_the_papers_number_of_weights(name: str, shape: Sequence[int], weights: int) -> None:
    assert sum(layer.weight.numel() for layer in prunable(NETWORKS[name](shape, 10)).values()) == weights


def test_convolutions_hold_the_share_of_the_weights_that_the_paper_gives() -> None:
    counts = {
        name: sum(
            layer.weight.numel()
            for layer in prunable(NETWORKS[name](CIFAR, 10)).values()
            if isinstance(layer, nn.Conv2d)
        )
        for name in ("conv-2", "conv-4", "conv-6")
    }
    assert counts == {"conv-2": 38_592, "conv-4": 259_776, "conv-6": 1_144_512}


def test_the_residual_network_has_20_layers_besides_its_shortcuts() -> None:
    layers = prunable(NETWORKS["resnet20"](CIFAR, 10))
    shortcuts = {name: layer for name, layer in layers.items() if "shortcut" in name}
    assert len(layers) - len(shortcuts) == 20
    assert sum(layer.weight.numel() for layer in shortcuts.values()) == 2_560
    assert all(layer.kernel_size == (1, 1) for layer in shortcuts.values())
    assert layers["output"].weight.numel() == 640


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("shape", [DIGITS, CIFAR, (2, 33, 47)])
def test_networks_take_images_of_any_shape(name: str, shape: Sequence[int]) -> None:
    model = NETWORKS[name](shape, 7)
    assert model(torch.zeros(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize(("name", "smallest"), [("conv-2", 2), ("conv-4", 4), ("conv-6", 8), ("vgg19", 16)])
def test_images_too_small_are_refused_when_the_network_is_made(name: str, smallest: int) -> None:
    assert NETWORKS[name]((1, smallest, smallest), 3)(torch.zeros(2, 1, smallest, smallest)).shape == (2, 3)
    with pytest.raises(ValueError, match=f"input_shape: .*{smallest}×{smallest} or more"):
        NETWORKS[name]((1, smallest, smallest - 1), 3)
    with pytest.raises(ValueError, match=r"input_shape: .*channels, height, width"):
        NETWORKS[name]((784,), 3)


@pytest.mark.parametrize("name", NETWORKS)
def test_dropout_stands_behind_every_hidden_fully_connected_layer(name: str) -> None:
    if name in ("resnet20", "vgg19"):
        with pytest.raises(ValueError, match=f"dropout: 0.5; {name} has no hidden"):
            NETWORKS[name](CIFAR, 10, dropout=0.5)
        return
    modules = [module for module in NETWORKS[name](CIFAR, 10, dropout=0.5).modules()][1:]
    linear = [place for place, module in enumerate(modules) if isinstance(module, nn.Linear)]
    dropout = [place for place, module in enumerate(modules) if isinstance(module, nn.Dropout)]
    assert dropout == [place + 2 for place in linear[:-1]]  # behind the ReLU
    assert all(module.p == 0.5 for module in modules if isinstance(module, nn.Dropout))


@pytest.mark.parametrize("name", ["lenet-wide", "vgg19"])
def test_initialisation_is_gaussian_glorot_with_zero_biases(name: str) -> None:
    layers = prunable(NETWORKS[name](DIGITS, 10))
    layer = layers["fc1"] if name == "lenet-wide" else layers["conv16"]
    fans = 784 + 2048 if name == "lenet-wide" else 2 * 9 * 512
    weight = layer.weight.detach()
    sigma = (2 / fans) ** 0.5
    assert weight.std().item() == pytest.approx(sigma, rel=0.01)
    assert (weight.abs() > 3 * sigma).float().mean().item() == pytest.approx(0.0027, abs=0.0005)  # no uniform has these
    assert not any(layer.bias.any() for layer in layers.values() if layer.bias is not None)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_draw_follows_torchs_seed(name: str) -> None:
    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.cat([layer.weight.detach().flatten() for layer in prunable(NETWORKS[name](CIFAR, 10)).values()])

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
