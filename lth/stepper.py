"""Which kind of step a training takes: as it is, captured in a CUDA graph, or recorded and replayed on a CPU."""

from __future__ import annotations

import torch

from lth.cuda_graph import CapturedStep
from lth.replayed import ReplayedStep
from lth.train import EagerStep, Step, Task, Training


def stepper(task: Task, training: Training, order_seed: int, stage: object) -> Step:
    """The steps of a training, as its task wants them run where its model is."""
    kind: type[Step] = EagerStep
    if task.graph:
        kind = CapturedStep if captures(task, training.parameters[0].device) else ReplayedStep
    return kind(task, training, order_seed, stage)


def captures(task: Task, device: torch.device) -> bool:
    """Whether steps of a model on `device` are captured in a CUDA graph."""
    return task.graph and device.type == "cuda"
