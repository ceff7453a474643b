"""Classification problems that train in milliseconds, with everything that a continuation could lose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lth import files
from lth.augment import AUGMENTATIONS, Augmented
from lth.classify import Shuffled
from lth.models import Residual
from lth.schedule import Schedule
from lth.store import Run
from lth.ticket import Tickets, find_ticket


def examples(count: int = 96, features: int = 12, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(count, features, generator=generator)
    return x, (x @ torch.randn(features, classes, generator=generator)).argmax(1)


def network(features: int = 12, hidden: int = 16, classes: int = 3) -> nn.Sequential:
    """fc1, norm, relu, dropout, output: buffers to rewind and a random generator to restore."""
    return nn.Sequential(
        *(nn.Linear(features, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(0.2), nn.Linear(hidden, classes))
    )


def step(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def evaluate(model: nn.Module) -> dict[str, float]:
    x, y = examples()
    logits = model(x)
    return {
        "val_loss": F.cross_entropy(logits, y).item(),
        "val_accuracy": (logits.argmax(1) == y).float().mean().item(),
    }


def search(**changes: Any) -> Tickets:
    """A search over the tiny problem; `changes` go to find_ticket."""
    chosen: dict[str, Any] = {
        "model": network,
        "data": examples(),
        "step": step,
        "optimizer": adam,
        "batch_size": 32,
        "evaluate": evaluate,
        "iterations": 6,
        "rounds": 1,
        "rate": 0.3,
        "eval_every": 3,
        "kernels": "dense",
        "checkpoint_seconds": 0,
    }
    chosen.update(changes)
    return find_ticket(**chosen)


IMAGE = (2, 9, 8)


def images(count: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(count, *IMAGE, generator=generator)
    return x, (x.flatten(1) @ torch.randn(x[0].numel(), 3, generator=generator)).argmax(1)


def residual_network() -> nn.Sequential:
    """Convolutions with BatchNorm, strides, a shortcut of 1×1, pooling: 0, 1, 3.body.conv1, …, output."""
    first = nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()
    return nn.Sequential(*first, Residual(6, 8, 2), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 3))


def conv_search(**changes: Any) -> Tickets:
    """A search over convolutions with all that the deep presets ask for: global scope, exempt layers, augmentation,
    warm-up and milestones, momentum and weight decay; `changes` go to find_ticket."""
    dtype = changes.pop("dtype", torch.float32)
    x, y = images()
    chosen: dict[str, Any] = {
        "model": lambda: residual_network().to(dtype),
        "data": Augmented(Shuffled((x.to(dtype), y), 16), AUGMENTATIONS),
        "optimizer": sgd,
        "scheduler": lambda optimizer: Schedule(3, (4, 8)).schedulers([optimizer]),
        "evaluate": lambda model: {"val_loss": F.cross_entropy(model(x.to(dtype)), y).item()},
        "rate": dict.fromkeys(("0", "3.body.conv1", "3.body.conv2"), 0.3),
        "scope": "global",
        "rewind": 2,
        "batch_size": None,
    }
    return search(**{**chosen, **changes})


def bits(folder: Path) -> dict[str, Any]:
    """All that a run holds and that must not depend on how often it was interrupted."""
    run = Run.open(folder)
    held: dict[str, Any] = {
        path.relative_to(folder).as_posix(): files.digest_of(files.read_tensors(path))
        for path in sorted(folder.rglob("*.safetensors"))
    }
    for stage in run.finished():
        result = stage.result()
        del result["timing"]
        held[stage.stage.folder] = (result, stage.evaluations())
    return held
