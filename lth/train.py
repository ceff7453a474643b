"""One training, from a start to its last iteration: steps, evaluations, checkpoints. Reads top to bottom."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lth.events import Observer
from lth.seeds import random_state, restore_random_state
from lth.store import StageFiles

Losses = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


class Diverged(RuntimeError):
    """A loss was NaN or infinite. It was stopped before the update."""


@dataclass(frozen=True)
class Task:
    """What is trained. None of it knows of masks, rounds or kernels.

    Attributes:
        model: makes a model, drawn from torch's generator, on its device. Called anew for every training.
        batches: (iteration, seed) → the batch of that iteration, a pure function of both, so that it can be resumed.
        step: (model, batch) → loss or losses, after it has left the gradients of the update in `.grad`. The driver
            steps and clears; the step may clip, scale, or run backward several times.
        optimizers: model → optimizer or optimizers. Called on the model as it is trained: a layer that runs sparse
            holds `values` in the place of `weight`, so collect from `parameters()`.
        schedulers: optimizers → schedulers that are stepped after every iteration.
        evaluate: model → numbers; `val_loss` decides the early stop. Called in eval mode, without gradients.
        conclude: model → more numbers, once, after the last iteration.
        example: batch → what the model is called with, for measuring which kernels are faster.
        first: the model that replicate 0 starts from, in the place of a draw.
        graph: whether a step is recorded and replayed, on a GPU in a CUDA graph: see `lth.replayed.ReplayedStep` and
            `lth.cuda_graph.CapturedStep` for what it must be then.
        autocast: the type that the step has autocast compute in, for measuring in it; None: no autocast.
    """

    model: Callable[[], nn.Module]
    batches: Callable[[int, int], Any]
    step: Callable[[nn.Module, Any], Losses]
    optimizers: Callable[[nn.Module], Optimizer | Sequence[Optimizer]]
    schedulers: Callable[[list[Optimizer]], Sequence[Any]] = lambda optimizers: ()
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None
    conclude: Callable[[nn.Module], Mapping[str, float]] | None = None
    example: Callable[[Any], Any] = lambda batch: batch[0] if isinstance(batch, tuple | list) else batch
    first: nn.Module | None = None
    graph: bool = False
    autocast: torch.dtype | None = None

    def fresh(self) -> nn.Module:
        """A plain model whose weights are to be loaded."""
        return copy.deepcopy(self.first) if self.first is not None else self.model()


@dataclass
class Training:
    """A model in training, with all that a continuation needs."""

    model: nn.Module
    optimizers: list[Optimizer]
    schedulers: list[Any]
    iteration: int  # iterations done
    seconds: float = 0.0  # spent in steps
    steps: int = 0  # that those seconds hold
    parameters: list[nn.Parameter] = field(init=False)  # that the optimizers train
    last_save: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.parameters = [parameter for group in self.groups for parameter in group["params"]]

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The parameter groups of all optimizers; loading an optimizer's state makes new ones."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @classmethod
    def begin(cls, task: Task, model: nn.Module, iteration: int) -> Training:
        """Fresh optimizers, and schedulers brought to `iteration`."""
        optimizers = _optimizers(task, model)
        schedulers = _schedulers(task, optimizers)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")  # no optimizer step went before
            for _ in range(iteration):
                for scheduler in schedulers:
                    scheduler.step()
        return cls(model, optimizers, schedulers, iteration)

    def state(self) -> dict[str, Any]:
        return {
            "iteration": self.iteration,
            "seconds": self.seconds,
            "steps": self.steps,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "random": random_state(),
        }

    def schedule(self) -> dict[str, Any]:
        """Where schedules stand: the state of the schedulers, and what they set in the optimizers."""
        options = [{key: value for key, value in group.items() if key != "params"} for group in self.groups]
        return copy.deepcopy({"options": options, "schedulers": [one.state_dict() for one in self.schedulers]})

    def reschedule(self, iteration: int, schedule: Mapping[str, Any]) -> None:
        """Goes on from an iteration at which schedules stood so; weights and state of optimizers stay as they are."""
        self.iteration, schedule = iteration, copy.deepcopy(schedule)
        for group, options in zip(self.groups, schedule["options"], strict=True):
            group.update(options)
        for scheduler, state in zip(self.schedulers, schedule["schedulers"], strict=True):
            scheduler.load_state_dict(state)

    def restore(self, state: Mapping[str, Any]) -> None:
        self.iteration, self.seconds, self.steps = state["iteration"], state["seconds"], state["steps"]
        self.model.load_state_dict(state["model"])
        for optimizer, stored in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        for scheduler, stored in zip(self.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(stored)
        restore_random_state(state["random"])


class Step:
    """An iteration of a training: when called, does the one that comes next."""

    def __init__(self, task: Task, training: Training, order_seed: int, stage: object) -> None:
        """`order_seed` seeds the batches; `stage` is named in errors."""
        self.task, self.training, self.order_seed, self.stage = task, training, order_seed, stage
        self._has_gradients = False

    def prepare(self) -> None:
        """Does what is done once, before the time of steps is taken."""

    def __call__(self) -> None:
        raise NotImplementedError

    def check(self) -> None:
        """Before anything of a training is judged or saved: raises :class:`Diverged` if a loss was not finite."""

    def _require_gradients(self) -> None:
        """Raises ValueError if the first step left no gradient: it would train nothing and say nothing."""
        self._has_gradients = self._has_gradients or any(one.grad is not None for one in self.training.parameters)
        if not self._has_gradients:
            raise ValueError(
                "step: it left no gradient in any parameter that the optimizers train; it has to call backward() on "
                "a loss of the model that it was called with"
            )


class EagerStep(Step):
    """Looks at every loss and raises :class:`Diverged` before one that is not finite updates anything."""

    def __call__(self) -> None:
        task, training = self.task, self.training
        for name, loss in self._gradients(task.batches(training.iteration, self.order_seed)).items():
            value = loss.item()
            if not math.isfinite(value):
                raise diverged(name, value, training.iteration + 1, self.stage)
        self._update()
        for scheduler in training.schedulers:
            scheduler.step()
        training.iteration += 1

    def _gradients(self, batch: Any) -> Mapping[Any, Tensor]:
        """Computes the gradients of a step; returns its losses."""
        losses = named(self.task.step(self.training.model, batch))
        self._require_gradients()
        return losses

    def _update(self) -> None:
        for optimizer in self.training.optimizers:
            optimizer.step()
        self._clear_gradients()

    def _clear_gradients(self) -> None:
        for parameter in self.training.parameters:
            parameter.grad = None  # as zero_grad does, at a twentieth of its time


def train(
    task: Task,
    training: Training,
    step: Step,
    files: StageFiles,
    observer: Observer,
    *,
    iterations: int,
    eval_every: int,
    checkpoint_seconds: float,
    reached: Mapping[int, Callable[[nn.Module], None]],
) -> None:
    """Trains to `iterations`, evaluating at the start, every `eval_every` iterations and at the end.

    Args:
        step: does an iteration of `training`.
        checkpoint_seconds: a checkpoint is written at an evaluation if so long has passed since the last.
        reached: {iteration ≥ 1: called with the model when that many iterations are done}.

    Raises:
        Diverged: a loss is NaN or infinite.
    """
    stage, model = files.stage, training.model
    if not files.evaluations():
        _evaluate(task, training, files, observer)
    if training.iteration < iterations:
        step.prepare()
    began, begun_at = time.perf_counter(), training.iteration
    while training.iteration < iterations:
        step()
        if training.iteration in reached:
            step.check()
            reached[training.iteration](model)
        if training.iteration % eval_every and training.iteration < iterations:
            continue
        step.check()
        synchronize(model)
        seconds, steps = time.perf_counter() - began, training.iteration - begun_at
        training.seconds, training.steps = training.seconds + seconds, training.steps + steps
        observer.stepped(stage, training.iteration, 1000 * seconds / steps)
        _evaluate(task, training, files, observer)
        if time.monotonic() - training.last_save >= checkpoint_seconds and training.iteration < iterations:
            files.save_checkpoint({**training.state(), "evaluations": len(files.evaluations())})
            training.last_save = time.monotonic()
        began, begun_at = time.perf_counter(), training.iteration


def _evaluate(task: Task, training: Training, files: StageFiles, observer: Observer) -> None:
    if task.evaluate is None:
        return
    with evaluating(training.model):
        numbers = as_numbers("evaluate", task.evaluate(training.model))
    record = {"iteration": training.iteration, **numbers}
    files.append_evaluation(record)
    observer.evaluated(files.stage, record)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every module is back in its own mode."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def named(losses: Losses) -> Mapping[Any, Tensor]:
    """The losses by name; one alone has the name "".

    Raises:
        TypeError: something else than tensors of one number.
    """
    if isinstance(losses, Tensor):
        by_name: Mapping[Any, Tensor] = {"": losses}
    elif isinstance(losses, Mapping):
        by_name = losses
    else:
        by_name = dict(enumerate(losses)) if isinstance(losses, Sequence) else {"": losses}
    for loss in by_name.values() or [losses]:
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"a tensor {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"{loss!r}"
            raise TypeError(f"step: it returned {what}; it takes the loss, or losses, each a tensor of one number")
    return by_name


def as_numbers(who: str, returned: Any) -> dict[str, float]:
    """{name: number} of what a user's function returned.

    Raises:
        TypeError: it returned something else.
    """
    try:
        return {str(name): float(value) for name, value in returned.items()}
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{who}: it returned {returned!r}; it takes a dict of numbers by their names") from error


def diverged(name: Any, value: float, step: int, stage: object) -> Diverged:
    """The error for a loss that is not finite at a step, counted from 1."""
    which = f"loss {name}" if name != "" else "the loss"
    return Diverged(f"{which} is {value} at step {step} of {stage}; stopped before the update")


def computing_in(autocast: torch.dtype | None, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Autocast to a type, or nothing."""
    return contextlib.nullcontext() if autocast is None else torch.autocast(device.type, autocast)


def synchronize(model: nn.Module) -> None:
    parameter = next(model.parameters(), None)
    if parameter is not None and parameter.is_cuda:
        torch.cuda.synchronize(parameter.device)


def _optimizers(task: Task, model: nn.Module) -> list[Optimizer]:
    made = task.optimizers(model)
    optimizers = [made] if isinstance(made, Optimizer) else list(made)
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer: the function returned a {type(optimizer).__name__}; it takes an Optimizer")
        _check_steps_alone("optimizer", optimizer)
    return optimizers


def _schedulers(task: Task, optimizers: list[Optimizer]) -> list[Any]:
    schedulers = list(task.schedulers(optimizers))
    for scheduler in schedulers:
        if not callable(getattr(scheduler, "step", None)):
            raise TypeError(f"scheduler: the function returned a {type(scheduler).__name__}, which cannot be stepped")
        _check_steps_alone("scheduler", scheduler)
    return schedulers


def _check_steps_alone(who: str, stepped: Any) -> None:
    """Raises TypeError for LBFGS, which calls back for losses, or ReduceLROnPlateau, which is told them."""
    parameters = inspect.signature(stepped.step).parameters.values()
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if wanted := [one.name for one in parameters if one.default is one.empty and one.kind not in kinds]:
        raise TypeError(
            f"{who}: step() of {type(stepped).__name__} takes a {wanted[0]}, but is called after every iteration "
            "without arguments"
        )
