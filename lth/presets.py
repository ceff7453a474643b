"""Presets of `lth run`: the settings of LeNet on the small MNIST, and what every other preset does differently."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lth import data
from lth.classify import classification
from lth.masked import parse_block
from lth.models import NETWORKS
from lth.plan import Search
from lth.prune import Block, prunable
from lth.train import Task

OPTIMIZERS = ("adam", "sgd")
DEVICES = ("cpu", "cuda")
PRECISIONS = ("auto", "fp32", "bf16")  # fp16 would need its loss scaled; bf16 has the range of fp32


@dataclass(frozen=True)
class Settings:
    """All that decides a run; a preset is one of these."""

    network: str = "lenet-300-100"  # of lenet-300-100, lenet-wide
    data: str = "mnist5k"  # of mnist5k, mnist, fashion-mnist, cifar10
    iterations: int = 2500  # of a training; the paper's 50,000 fit 55,000 digits, these are 38 epochs of 4,000
    batch: int = 60  # examples in a batch
    optimizer: str = "adam"  # adam or sgd
    learning_rate: float = 1.2e-3  # the paper's, for LeNet
    momentum: float = 0.9  # of sgd
    weight_decay: float = 0.0
    rounds: int = 15  # prunings; 0.8^15 leaves 3.6 % of LeNet
    fc_rate: float = 0.2  # share of the remaining weights of a fully connected layer pruned a round
    output_rate: float = 0.1  # and of the output layer: half, as in the paper
    exempt: str = ""  # layers that are neither pruned nor counted, separated by commas
    block: str = "1x1"  # rows x columns pruned together; auto: 1x1 on the CPU, 32x32 on a GPU
    rewind: int = 0  # survivors return to their weights after this many iterations; 0 is initialisation
    branches: str = ""  # controls: reinit, random, oneshot, separated by commas
    branch_rounds: str = ""  # rounds that grow branches, separated by commas; empty: all
    replicates: int = 1  # repeats, each with seeds of its own
    seed: int = 0
    eval_every: int = 100  # iterations between evaluations
    device: str = "cpu"  # cpu or cuda
    precision: str = "auto"  # fp32, or bf16 by autocast, on a GPU only; auto: bf16 on a GPU, fp32 on the CPU
    graph: bool = True  # a GPU's training step is captured whole in a CUDA graph and replayed
    kernels: str = "auto"  # auto measures once a round; sparse; dense (masked PyTorch)


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
}


def named(preset: str) -> Settings:
    if preset not in PRESETS:
        raise ValueError(f"preset: {preset!r}; there are {', '.join(PRESETS)}")
    return PRESETS[preset]


def directory_of(preset: str, settings: Settings) -> Path:
    """runs/PRESET, followed by what is not the preset's own: the same command finds the same folder."""
    default = named(preset)
    parts = [
        f"{field.name}-{str(value).replace(',', '+') or 'none'}"
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
    _check("network", settings.network, settings.network in NETWORKS, ", ".join(NETWORKS))
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
    search = _search(settings)  # checks before the data is read
    device = torch.device(settings.device)
    dataset = data.load(settings.data, data_dir).to(device)
    task = classification(
        dataset,
        NETWORKS[settings.network],
        settings.batch,
        partial(make_optimizer, settings),
        device,
        autocast=torch.bfloat16 if settings.device == "cuda" and settings.precision != "fp32" else None,
        graph=settings.graph and settings.device == "cuda",
    )
    search = dataclasses.replace(search, rate=_rates(settings, task.model()))
    return task, search, {**dataclasses.asdict(settings), **search.settings(), "data_sha256": dataset.digest}, dataset


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


def _search(settings: Settings) -> Search:
    for name in ("fc_rate", "output_rate"):
        _check(name, getattr(settings, name), 0 < getattr(settings, name) < 1, "between 0 and 1")
    return Search(
        iterations=settings.iterations,
        rounds=settings.rounds,
        rate=settings.fc_rate,
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


def _rates(settings: Settings, model: nn.Module) -> dict[str, float]:
    """By layer type: the last layer is the output."""
    found, exempt = list(prunable(model)), _listed(settings.exempt)
    for name in exempt:
        _check("exempt", name, name in found, ", ".join(found))
    return {
        name: settings.output_rate if name == found[-1] else settings.fc_rate for name in found if name not in exempt
    }


def _rounds(text: str) -> tuple[int, ...] | None:
    numbers = _listed(text)
    _check("branch_rounds", text, all(number.isdecimal() for number in numbers), "round numbers separated by commas")
    return tuple(map(int, numbers)) or None


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _check(name: str, value: object, right: bool, allowed: str) -> None:
    if not right:
        raise ValueError(f"{name}: {value!r}; it takes {allowed}")
