"""The networks of the lottery-ticket papers, and their initialisation."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor, nn


class Builder(Protocol):
    """Makes a network, freshly drawn.

    Args:
        input_shape: (channels, height, width) of an image.
        classes: width of the output.
        dropout: share of the units that is dropped behind every hidden fully connected layer.

    Raises:
        ValueError: images too small for the network, or dropout where it has no hidden fully connected layer.
    """

    def __call__(self, input_shape: Sequence[int], classes: int, dropout: float = 0.0) -> nn.Module: ...


def mlp(*hidden: int) -> Builder:
    """A builder of fully connected networks with ReLU; layers fc1, fc2, …, output."""

    def build(input_shape: Sequence[int], classes: int, dropout: float = 0.0) -> nn.Module:
        return gaussian_glorot_(nn.Sequential(_fully_connected(math.prod(input_shape), hidden, classes, dropout)))

    return build


def conv(*widths: int) -> Builder:
    """A builder of Conv-2, -4, -6: two 3×3 convolutions for each of `widths`, then a pool that halves; 256-256 on top.

    Layers conv1, conv2, …, fc1, fc2, output.
    """

    def build(input_shape: Sequence[int], classes: int, dropout: float = 0.0) -> nn.Module:
        channels, height, width = _image(input_shape, 2 ** len(widths))
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for pool, maps in enumerate(widths, 1):
            for number in (2 * pool - 1, 2 * pool):
                layers[f"conv{number}"] = nn.Conv2d(channels, maps, 3, padding=1)
                layers[f"relu_conv{number}"] = nn.ReLU()
                channels = maps
            layers[f"pool{pool}"] = nn.MaxPool2d(2)
            height, width = height // 2, width // 2
        layers.update(_fully_connected(channels * height * width, (256, 256), classes, dropout))
        return gaussian_glorot_(nn.Sequential(layers))

    return build


def vgg19(input_shape: Sequence[int], classes: int, dropout: float = 0.0) -> nn.Module:
    """VGG-19 for small images: 16 convolutions with BatchNorm, an average over the image, one output layer.

    Layers conv1 to conv16, bn1 to bn16, output. No biases in front of BatchNorm, which would take them away.
    """
    _no_dropout("vgg19", dropout)
    channels, _, _ = _image(input_shape, 16)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    number = 0
    for stage, (maps, depth) in enumerate([(64, 2), (128, 2), (256, 4), (512, 4), (512, 4)], 1):
        if stage > 1:
            layers[f"pool{stage - 1}"] = nn.MaxPool2d(2)
        for _ in range(depth):
            number += 1
            layers[f"conv{number}"] = nn.Conv2d(channels, maps, 3, padding=1, bias=False)
            layers[f"bn{number}"] = nn.BatchNorm2d(maps)
            layers[f"relu{number}"] = nn.ReLU()
            channels = maps
    return gaussian_glorot_(nn.Sequential(layers | _averaged(channels, classes)))


def resnet20(input_shape: Sequence[int], classes: int, dropout: float = 0.0) -> nn.Module:
    """The residual network of 20 layers for small images (He et al. 2015), which the paper calls ResNet-18.

    Three stages of three blocks, 16, 32 and 64 wide; conv1, then stage1.block1.body.conv1 and so on, output. Where the
    shape changes the shortcut is a 1×1 convolution, stage2.block1.shortcut.conv and stage3.block1.shortcut.conv.
    """
    _no_dropout("resnet20", dropout)
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        _normalised_conv("1", _image(input_shape, 1)[0], 16), relu1=nn.ReLU()
    )
    channels = 16
    for stage, maps in enumerate((16, 32, 64), 1):
        blocks: OrderedDict[str, nn.Module] = OrderedDict()
        for block in range(1, 4):
            blocks[f"block{block}"] = Residual(channels, maps, stride=2 if stage > 1 and block == 1 else 1)
            channels = maps
        layers[f"stage{stage}"] = nn.Sequential(blocks)
    return gaussian_glorot_(nn.Sequential(layers | _averaged(channels, classes)))


class Residual(nn.Module):
    """relu(body(x) + shortcut(x)), `[N, inputs, H, W] -> [N, maps, H/stride, W/stride]`, halves rounded up."""

    def __init__(self, inputs: int, maps: int, stride: int) -> None:
        super().__init__()
        first, second = _normalised_conv("1", inputs, maps, stride), _normalised_conv("2", maps, maps)
        self.body = nn.Sequential(OrderedDict(first, relu1=nn.ReLU(), **second))
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != maps:
            self.shortcut = nn.Sequential(_normalised_conv("", inputs, maps, stride, kernel=1))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + self.shortcut(x))


def gaussian_glorot_(model: nn.Module) -> nn.Module:
    """Draws every weight from N(0, 2 / (fan_in + fan_out)) (Glorot & Bengio 2010, as in Frankle & Carbin); biases 0."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def _fully_connected(features: int, hidden: Sequence[int], classes: int, dropout: float) -> OrderedDict[str, nn.Module]:
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for number, width in enumerate(hidden, 1):
        layers[f"fc{number}"] = nn.Linear(features, width)
        layers[f"relu{number}"] = nn.ReLU()
        if dropout:
            layers[f"dropout{number}"] = nn.Dropout(dropout)
        features = width
    layers["output"] = nn.Linear(features, classes)
    return layers


def _normalised_conv(
    suffix: str, inputs: int, maps: int, stride: int = 1, kernel: int = 3
) -> OrderedDict[str, nn.Module]:
    """A convolution that keeps the size (or divides it by `stride`), and its BatchNorm."""
    layer = nn.Conv2d(inputs, maps, kernel, stride, padding=kernel // 2, bias=False)
    return OrderedDict([(f"conv{suffix}", layer), (f"bn{suffix}", nn.BatchNorm2d(maps))])


def _averaged(channels: int, classes: int) -> OrderedDict[str, nn.Module]:
    return OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), output=nn.Linear(channels, classes))


def _image(input_shape: Sequence[int], smallest: int) -> tuple[int, int, int]:
    if len(input_shape) != 3:
        raise ValueError(f"input_shape: {tuple(input_shape)}; the network takes images, (channels, height, width)")
    channels, height, width = input_shape
    if min(height, width) < smallest:
        raise ValueError(f"input_shape: {tuple(input_shape)}; the network takes {smallest}×{smallest} or more")
    return channels, height, width


def _no_dropout(network: str, dropout: float) -> None:
    if dropout:
        raise ValueError(f"dropout: {dropout}; {network} has no hidden fully connected layer to put it behind")


NETWORKS: Mapping[str, Builder] = {
    "lenet-300-100": mlp(300, 100),  # 266,200 prunable weights on 28×28 images
    "lenet-wide": mlp(2048, 1024),  # 3,713,024; wide enough for blocks of 16 to 64
    "conv-2": conv(64),  # 4,300,992 on 3×32×32 images, as those below
    "conv-4": conv(64, 128),  # 2,425,024
    "conv-6": conv(64, 128, 256),  # 2,261,184; the paper prints 1.7 million
    "resnet20": resnet20,  # 270,896, 2,560 of them in shortcuts and 640 in the output
    "vgg19": vgg19,  # 20,024,000, 5,120 of them in the output
}
