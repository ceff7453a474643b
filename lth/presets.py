"""Presets of `lth run`: the settings of LeNet on the small MNIST, and what every other preset does differently."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lth import data
from lth.augment import AUGMENTATIONS
from lth.classify import classification
from lth.events import Plan
from lth.masked import parse_block
from lth.models import NETWORKS
from lth.plan import Search, make_plan
from lth.prune import Block, layers_of, prunable
from lth.schedule import Schedule, iteration_of
from lth.train import Task

OPTIMIZERS = ("adam", "sgd")
DEVICES = ("cpu", "cuda")
CLASSES = 10  # of every data set
PRECISIONS = ("auto", "fp32", "bf16")  # fp16 would need its loss scaled; bf16 has the range of fp32


@dataclass(frozen=True)
class Settings:
    """All that decides a run; a preset is one of these."""

    network: str = "lenet-300-100"  # of lenet-300-100, lenet-wide, conv-2, conv-4, conv-6, resnet20, vgg19
    dropout: float = 0.0  # share of the units dropped behind hidden fully connected layers
    data: str = "mnist5k"  # of mnist5k, mnist, fashion-mnist, cifar10
    image: str = ""  # channels x height x width, such as 3x32x32: pads with black, repeats one channel; empty: its own
    augment: str = ""  # of training images, on the device: flip, crop (out of a frame of 4), separated by commas
    iterations: int = 2500  # of a training; the paper's 50,000 fit LeNet's 55,000 digits, 2,500 are 38 epochs of 4,000
    batch: int = 60  # examples in a batch
    optimizer: str = "adam"  # adam or sgd
    learning_rate: float = 1.2e-3  # at its full height; LeNet's is the paper's
    warmup: str = "0"  # iterations, or a share of them such as 2/3, over which the learning rate rises in equal steps
    milestones: str = ""  # where the learning rate falls to a tenth: iterations or shares, separated by commas
    momentum: float = 0.9  # of sgd
    weight_decay: float = 0.0
    rounds: int = 15  # prunings; 0.8^15 leaves 3.6 % of LeNet
    fc_rate: float = 0.2  # share of the remaining weights of a fully connected layer pruned a round
    conv_rate: float = 0.1  # of a convolution
    output_rate: float = 0.1  # and of the output layer: half, as in the paper
    scope: str = "layer"  # layer prunes each at its own rate; global ranks the weights of all layers together
    exempt: str = ""  # layers that are neither pruned nor counted, separated by commas; * stands for any part of a name
    block: str = "1x1"  # rows x columns pruned together; auto: 1x1 on the CPU, 32x32 on a GPU
    rewind: int = 0  # survivors return to their weights after this many iterations; 0 is initialisation
    branches: str = ""  # controls: reinit, random, oneshot, separated by commas
    branch_rounds: str = ""  # rounds that grow branches, separated by commas; empty: all
    replicates: int = 1  # repeats, each with seeds of its own
    seed: int = 0
    eval_every: int = 100  # iterations between evaluations
    device: str = "cpu"  # cpu or cuda
    precision: str = "auto"  # fp32, or bf16 by autocast, on a GPU only; auto: bf16 on a GPU, fp32 on the CPU
    graph: bool = True  # whether training steps are recorded and replayed, on a GPU whole in a CUDA graph
    kernels: str = "auto"  # auto measures once a round; sparse; dense (masked PyTorch)


CONV = Settings(  # Conv-2 of the paper; 4 and 6 say how they differ
    network="conv-2",
    data="cifar10",
    iterations=20_000,
    learning_rate=2e-4,
    eval_every=500,  # the paper's 100 would cost as much as the training between
)
DEEP = Settings(  # what the paper's deep networks have in common
    data="cifar10",
    augment="flip,crop",  # stated for ResNet, and usual for VGG-19
    optimizer="sgd",
    weight_decay=1e-4,
    conv_rate=0.2,
    scope="global",  # layers of so many sizes: the smallest would be worn out first
    eval_every=1000,
)

PRESETS: Mapping[str, Settings] = {
    "lenet": Settings(),
    "lenet-wide": Settings(
        network="lenet-wide",
        batch=128,  # wide layers are for machines that like large batches
        exempt="output",  # ten rows: a block of them would cut an input off from every class, and they cost little
        iterations=1500,  # a step costs 14 times that of LeNet
        fc_rate=0.5,  # 3 % in five rounds
        rounds=5,
    ),
    "conv2": CONV,
    "conv4": replace(CONV, network="conv-4", iterations=25_000, learning_rate=3e-4),
    "conv6": replace(
        CONV,
        network="conv-6",
        iterations=30_000,
        learning_rate=3e-4,
        conv_rate=0.15,  # half of its weights are in convolutions
        rounds=18,  # which are pruned more slowly: 3.6 % again
    ),
    "resnet20": replace(
        DEEP,
        network="resnet20",
        iterations=30_000,
        batch=128,
        learning_rate=0.03,
        warmup="2/3",  # 20,000; above 0.01 the paper finds tickets only after a warm-up
        milestones="2/3,5/6",  # 20,000 and 25,000
        exempt="output,*.shortcut.*",  # 3,200 of 270,896 weights
        rounds=12,  # 6.9 %; the paper's tickets end at 10.7 % of what is pruned
    ),
    "vgg19": replace(
        DEEP,
        network="vgg19",
        iterations=112_000,
        batch=64,
        learning_rate=0.1,
        warmup="5/56",  # 10,000; without it no tickets at this rate
        milestones="1/2,3/4",  # epochs 80 and 120 of 160
        exempt="output",
        rounds=19,  # 1.4 %, to where the paper's tickets reach
    ),
}


def named(preset: str) -> Settings:
    if preset not in PRESETS:
        raise ValueError(f"preset: {preset!r}; there are {', '.join(PRESETS)}")
    return PRESETS[preset]


def directory_of(preset: str, settings: Settings) -> Path:
    """runs/PRESET, followed by what is not the preset's own: the same command finds the same folder."""
    default = named(preset)
    fit_for_a_path = str.maketrans({",": "+", "/": "of", "*": "any"})
    parts = [
        f"{field.name}-{str(value).translate(fit_for_a_path) or 'none'}"
        for field in dataclasses.fields(Settings)
        if (value := getattr(settings, field.name)) != getattr(default, field.name)
    ]
    name = "_".join([preset, *parts])
    if len(name) > 120:
        name = f"{name[:100]}_{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return Path("runs") / name


def make(settings: Settings, data_dir: Path | None = None) -> tuple[Task, Search, dict[str, Any], data.Dataset]:
    """The task and search that settings ask for, what else run.json is to hold, and the data.

    Raises:
        ValueError: a setting that cannot be; its name comes first. DataError: the data set is not there.
    """
    _check_settings(settings)
    search = _search(settings)  # checks before the data is read
    schedule, shape = _schedule(settings), _image(settings.image)
    device = torch.device(settings.device)
    dataset = data.load(settings.data, data_dir)
    dataset = (data.fitted(dataset, shape) if shape else dataset).to(device)
    network: Any = partial(NETWORKS[settings.network], dropout=settings.dropout)
    on_gpu = settings.device == "cuda"
    task = classification(
        dataset,
        network,
        settings.batch,
        partial(make_optimizer, settings),
        device,
        _listed(settings.augment),
        schedule,
        autocast=torch.bfloat16 if on_gpu and settings.precision != "fp32" else None,
        graph=settings.graph,
    )
    search = replace(search, rate=_rates(settings, task.model()))
    return task, search, {**dataclasses.asdict(settings), **search.settings(), "data_sha256": dataset.digest}, dataset


def plan(settings: Settings, directory: Path) -> Plan:
    """What a run would do; its data need not be there."""
    _check_settings(settings)
    search, shape = _search(settings), data.image_shape(settings.data, _image(settings.image))
    _schedule(settings)
    model = NETWORKS[settings.network](shape, CLASSES, settings.dropout)
    search = replace(search, rate=_rates(settings, model))
    return make_plan(search, layers_of(model, search.rate, search.block), directory)


def make_optimizer(settings: Settings, model: nn.Module) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    if settings.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True)
    return torch.optim.SGD(
        parameters,
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def _check_settings(settings: Settings) -> None:
    _check("network", settings.network, settings.network in NETWORKS, ", ".join(NETWORKS))
    _check("dropout", settings.dropout, 0 <= settings.dropout < 1, "0 to below 1")
    for kind in _listed(settings.augment):
        _check("augment", kind, kind in AUGMENTATIONS, ", ".join(AUGMENTATIONS))
    _check("optimizer", settings.optimizer, settings.optimizer in OPTIMIZERS, ", ".join(OPTIMIZERS))
    _check("device", settings.device, settings.device in DEVICES, ", ".join(DEVICES))
    _check("precision", settings.precision, settings.precision in PRECISIONS, ", ".join(PRECISIONS))
    _check("learning_rate", settings.learning_rate, 0 < settings.learning_rate < float("inf"), "a positive number")
    _check("momentum", settings.momentum, 0 <= settings.momentum < 1, "0 to below 1")
    _check("weight_decay", settings.weight_decay, 0 <= settings.weight_decay < float("inf"), "0 or more")
    _check("batch", settings.batch, settings.batch >= 1, "at least 1")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: 'cuda', but PyTorch finds no CUDA device here; it takes cpu")
    if settings.device == "cpu" and settings.precision == "bf16":
        raise ValueError("precision: 'bf16', but the CPU's kernels know fp32 only; it takes auto or fp32")


def _search(settings: Settings) -> Search:
    for name in ("conv_rate", "fc_rate", "output_rate"):
        _check(name, getattr(settings, name), 0 < getattr(settings, name) < 1, "between 0 and 1")
    return Search(
        iterations=settings.iterations,
        rounds=settings.rounds,
        rate=settings.fc_rate,
        scope=settings.scope,
        block=_block(settings),
        rewind=settings.rewind,
        branches=tuple(_listed(settings.branches)),
        branch_rounds=_rounds(settings.branch_rounds),
        replicates=settings.replicates,
        seed=settings.seed,
        eval_every=settings.eval_every,
        kernels=settings.kernels,
    )


def _block(settings: Settings) -> Block:
    if settings.block == "auto":  # single weights cost no accuracy and are fast on a CPU; a GPU needs blocks
        return (32, 32) if settings.device == "cuda" else (1, 1)
    return parse_block(settings.block)


def _schedule(settings: Settings) -> Schedule:
    iterations = settings.iterations

    def point(name: str, text: str) -> int:
        try:
            number = iteration_of(text, iterations)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        _check(name, text, number <= iterations, f"at most the {iterations} iterations, or a share of them such as 2/3")
        return number

    milestones = tuple(point("milestones", text) for text in _listed(settings.milestones))
    return Schedule(point("warmup", settings.warmup), milestones)


def _image(text: str) -> tuple[int, int, int] | None:
    if not text:
        return None
    sizes = text.split("x")
    right = len(sizes) == 3 and all(size.isdecimal() and int(size) for size in sizes)
    _check("image", text, right, "channels x height x width, such as 3x32x32")
    channels, height, width = map(int, sizes)
    return channels, height, width


def _rates(settings: Settings, model: nn.Module) -> dict[str, float]:
    """By layer type: the last layer is the output."""
    found = prunable(model)
    output, exempt = list(found)[-1], set()
    for pattern in _listed(settings.exempt):
        matching = fnmatch.filter(found, pattern)
        _check("exempt", pattern, bool(matching), ", ".join(found))
        exempt.update(matching)

    def rate(name: str) -> float:
        if name == output:
            return settings.output_rate
        return settings.conv_rate if isinstance(found[name], nn.Conv2d) else settings.fc_rate

    return {name: rate(name) for name in found if name not in exempt}


def _rounds(text: str) -> tuple[int, ...] | None:
    numbers = _listed(text)
    _check("branch_rounds", text, all(number.isdecimal() for number in numbers), "round numbers separated by commas")
    return tuple(map(int, numbers)) or None


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _check(name: str, value: object, right: bool, allowed: str) -> None:
    if not right:
        raise ValueError(f"{name}: {value!r}; it takes {allowed}")
