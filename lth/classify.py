"""The task of the papers: a network that classifies images, judged by loss and accuracy."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from lth.augment import Augmented
from lth.data import Dataset, Examples, sent
from lth.models import Builder
from lth.schedule import Schedule
from lth.seeds import derive
from lth.train import Task, computing_in

CHUNK = 100  # examples evaluated at a time: the images of more would leave a CPU's caches between convolutions
GPU_CHUNK = 1000  # smaller ones would leave a GPU waiting


class Shuffled:
    """Batches drawn by index from tensors: every epoch a new order, a pure function of (seed, epoch).

    The last examples of an order that fill no batch are left out of that epoch.
    """

    def __init__(self, tensors: Sequence[Tensor], batch_size: int) -> None:
        if len({len(tensor) for tensor in tensors}) != 1:
            raise ValueError(f"data: tensors of different lengths, {[len(tensor) for tensor in tensors]}")
        if not 1 <= batch_size <= len(tensors[0]):
            raise ValueError(f"batch: {batch_size}, but there are {len(tensors[0])} examples")
        self.tensors, self.batch_size = tuple(tensors), batch_size
        self._order: tuple[tuple[int, int], Sequence[Tensor]] | None = None

    def __call__(self, iteration: int, seed: int) -> tuple[Tensor, ...]:
        rows = self._rows(iteration, seed)
        return tuple(tensor.index_select(0, rows) for tensor in self.tensors)

    def fill(self, iteration: int, seed: int, out: Sequence[Tensor]) -> None:
        """Draws the same batch into tensors that are there."""
        rows = self._rows(iteration, seed)
        for tensor, place in zip(self.tensors, out, strict=True):
            torch.index_select(tensor, 0, rows, out=place)

    def _rows(self, iteration: int, seed: int) -> Tensor:
        count = len(self.tensors[0])
        epoch, position = divmod(iteration, count // self.batch_size)
        if self._order is None or self._order[0] != (seed, epoch):
            generator = torch.Generator().manual_seed(derive(seed, epoch))
            order = sent(torch.randperm(count, generator=generator), self.tensors[0].device)
            self._order = (seed, epoch), order.split(self.batch_size)
        return self._order[1][position]


def classification(
    dataset: Dataset,
    network: Builder,
    batch_size: int,
    optimizer: Callable[[nn.Module], Optimizer],
    device: torch.device,
    augment: Collection[str] = (),
    schedule: Schedule | None = None,
    autocast: torch.dtype | None = None,
    graph: bool = False,
) -> Task:
    """The task of training `network` on `dataset`, whose tensors are on `device`.

    Args:
        augment: kinds of `lth.augment.Augmented`, of training batches only.
        schedule: of the learning rate, which is constant without one.
        autocast: the type that networks compute in, training and judged; None: that of their weights.
        graph: whether steps are recorded and replayed, on a GPU whole in a CUDA graph.
    """
    shape = dataset.train.x.shape[1:]
    batches = Shuffled((dataset.train.x, dataset.train.y), batch_size)
    judged: Mapping[str, Examples] = {
        "val": dataset.validation,
        "test": dataset.test,
        # as many training examples as are held out: all of them would cost more than the training between evaluations
        "train": Examples(dataset.train.x[: len(dataset.validation)], dataset.train.y[: len(dataset.validation)]),
    }

    def evaluate(model: nn.Module) -> dict[str, float]:
        numbers = {}
        for split, examples in judged.items():
            numbers[f"{split}_loss"], numbers[f"{split}_accuracy"] = judge(model, examples, autocast)
        return numbers

    def conclude(model: nn.Module) -> dict[str, float]:
        loss, accuracy = judge(model, dataset.train, autocast)
        return {"train_loss_all": loss, "train_accuracy_all": accuracy}

    return Task(
        model=lambda: _placed(network(shape, dataset.classes), device),
        batches=Augmented(batches, augment) if augment else batches,
        step=partial(cross_entropy_step, autocast=autocast),
        optimizers=optimizer,
        schedulers=(schedule or Schedule()).schedulers,
        evaluate=evaluate,
        conclude=conclude,
        graph=graph,
        autocast=autocast,
    )


def cross_entropy_step(model: nn.Module, batch: Any, autocast: torch.dtype | None = None) -> Tensor:
    x, y = batch
    with computing_in(autocast, x.device):
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss


def judge(model: nn.Module, examples: Examples, autocast: torch.dtype | None = None) -> tuple[float, float]:
    """(mean cross-entropy, accuracy 0–1) over all examples."""
    loss, right = torch.zeros((), dtype=torch.float64), 0
    chunk = GPU_CHUNK if examples.x.is_cuda else CHUNK
    for x, y in zip(examples.x.split(chunk), examples.y.split(chunk), strict=True):
        with computing_in(autocast, x.device):
            logits = model(x)
            loss += F.cross_entropy(logits, y, reduction="sum").cpu()
        right += int((logits.argmax(1) == y).sum())
    return loss.item() / len(examples), right / len(examples)


def _placed(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on its device, where tensor cores want the channels of a pixel side by side."""
    model = model.to(device)
    return model.to(memory_format=torch.channels_last) if device.type == "cuda" else model
