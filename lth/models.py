"""The networks of the lottery-ticket papers, and their initialisation."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

from torch import nn

# Makes a network for inputs of a shape (channels, height, width) and a number of classes, freshly drawn.
Builder = Callable[[Sequence[int], int], nn.Module]


def mlp(*hidden: int) -> Builder:
    """A builder of fully connected networks with ReLU; layers fc1, fc2, …, output."""

    def build(input_shape: Sequence[int], classes: int) -> nn.Module:
        features = 1
        for size in input_shape:
            features *= size
        layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        for number, width in enumerate(hidden, 1):
            layers[f"fc{number}"] = nn.Linear(features, width)
            layers[f"relu{number}"] = nn.ReLU()
            features = width
        layers["output"] = nn.Linear(features, classes)
        return gaussian_glorot_(nn.Sequential(layers))

    return build


def gaussian_glorot_(model: nn.Module) -> nn.Module:
    """Draws every weight from N(0, 2 / (fan_in + fan_out)) (Glorot & Bengio 2010, as in Frankle & Carbin); biases 0."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


NETWORKS: Mapping[str, Builder] = {
    "lenet-300-100": mlp(300, 100),  # 266,200 prunable weights on 28×28 images
    "lenet-wide": mlp(2048, 1024),  # 3,713,024; wide enough for blocks of 16 to 64
}
