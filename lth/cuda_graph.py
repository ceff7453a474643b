"""Training steps that never wait for the device: gated by a flag that lives there, captured whole in a CUDA graph.

A graph replays kernels on the memory that they were captured with. So the batch, the learning rates and the gate are
tensors made once and written into; everything else of a step happens in between, from clearing gradients to the update.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lth.batches import like, tensors_of
from lth.seeds import random_state, restore_random_state
from lth.train import Losses, Step, Task, Training, diverged, named

CHECK_EVERY = 100  # steps between two looks at the gate
WARM_UP = 3  # runs before a capture: what is made, compiled or chosen once must not be part of it


class Gate:
    """Whether every loss so far was finite. It is kept on the device, and once shut it stays shut.

    Attributes:
        shut: 0 or 1, fp32 []; as `found_inf` of a fused optimizer it decides whether there is an update.
    """

    def __init__(self, device: torch.device) -> None:
        self.shut = torch.zeros((), device=device)
        self._steps_shut = torch.zeros((), dtype=torch.int64, device=device)
        self._open = torch.ones((), dtype=torch.bool, device=device)
        self._losses: Tensor | None = None  # fp64 [losses]: of the last step that found the gate open
        self._names: list[Any] = []

    def judge(self, losses: Losses) -> None:
        """Shuts the gate if one of them is not finite. Waits for nothing."""
        by_name = named(losses)
        values = torch.stack([loss.detach().double().reshape(()) for loss in by_name.values()])
        if self._losses is None:
            self._losses, self._names = torch.full_like(values, torch.nan), list(by_name)
        torch.where(self._open, values, self._losses, out=self._losses)
        torch.all(self._losses * 0 == 0, out=self._open)  # of finite numbers alone
        torch.logical_not(self._open, out=self.shut)
        self._steps_shut += ~self._open

    def verdict(self) -> tuple[int, Any, float] | None:
        """None while it is open, else (steps since it was shut, that one included, name of the loss, its value).

        Waits for the device.
        """
        steps = int(self._steps_shut)
        if not steps:
            return None
        assert self._losses is not None
        values = self._losses.tolist()
        worst = next(i for i, value in enumerate(values) if value * 0 != 0)
        return steps, self._names[worst], values[worst]

    @contextlib.contextmanager
    def held_shut(self) -> Iterator[None]:
        """Whatever is judged meanwhile updates nothing, and is forgotten, unless it ends in an error."""
        self._open.zero_()
        if self._losses is not None:
            self._losses.fill_(torch.nan)
        yield
        self._open.fill_(True)
        self.shut.zero_()
        self._steps_shut.zero_()


class GatedStep(Step):
    """A step of device work alone: a loss that is not finite keeps the device itself from updating, from then on.

    The host learns of it when it looks, every `CHECK_EVERY` steps or at `check`. Until then batches are drawn and
    buffers such as BatchNorm's go on, but parameters and optimizer state stay as they were before the bad step.

    Raises:
        TypeError, ValueError: an optimizer that cannot be gated.
    """

    def __init__(self, task: Task, training: Training, order_seed: int, stage: object) -> None:
        super().__init__(task, training, order_seed, stage)
        for optimizer in training.optimizers:
            _make_gateable(optimizer)
        self.device = training.parameters[0].device
        self.gate = Gate(self.device)
        self._groups = training.groups
        self._rates = [torch.zeros((), device=self.device) for _ in self._groups]
        self._rates_hold: list[float | None] = [None] * len(self._groups)
        self._batch: Any = None

    def __call__(self) -> None:
        training = self.training
        self._load()
        self._run()
        for scheduler in training.schedulers:
            scheduler.step()
        training.iteration += 1
        if training.iteration % CHECK_EVERY == 0:
            self.check()

    def check(self) -> None:
        verdict = self.gate.verdict()
        if verdict is not None:
            steps, name, value = verdict
            raise diverged(name, value, self.training.iteration - steps + 1, self.stage)

    def _run(self) -> None:
        self._work()

    def _work(self) -> None:
        """All that a step does on the device. Reads and writes the same memory whenever it is called."""
        for parameter in self.training.parameters:
            parameter.grad = None  # so that backward writes gradients anew, and does not add to them
        self.gate.judge(self.task.step(self.training.model, self._batch))
        self._require_gradients()
        with self._rates_as_tensors():
            for optimizer in self.training.optimizers:
                optimizer.found_inf = self.gate.shut  # type: ignore[attr-defined]
                optimizer.step()

    def _load(self) -> None:
        """Brings the batch and the learning rates of this iteration to where the step reads them."""
        iteration, batches = self.training.iteration, self.task.batches
        if self._batch is None:
            batch = batches(iteration, self.order_seed)
            self._batch = like(batch, [tensor.to(self.device, copy=True) for tensor in tensors_of(batch)])
        elif (fill := getattr(batches, "fill", None)) is not None:
            fill(iteration, self.order_seed, tensors_of(self._batch))
        else:
            _copy(batches(iteration, self.order_seed), self._batch, iteration)
        for i, group in enumerate(self._groups):
            rate = group["lr"]
            if isinstance(rate, Tensor):
                self._rates[i].copy_(rate)
            elif rate != self._rates_hold[i]:
                self._rates[i].fill_(rate)
                self._rates_hold[i] = rate

    @contextlib.contextmanager
    def _rates_as_tensors(self) -> Iterator[None]:
        """Meanwhile optimizers read their learning rates on the device; schedulers and checkpoints see the numbers."""
        numbers = [group["lr"] for group in self._groups]
        for group, rate in zip(self._groups, self._rates, strict=True):
            group["lr"] = rate
        try:
            yield
        finally:
            for group, number in zip(self._groups, numbers, strict=True):
                group["lr"] = number


class CapturedStep(GatedStep):
    """A gated step that is captured once and replayed: one call from the host for all kernels.

    The step must be device work on its batch, the same whatever it computes: no `.item()`, no branch on a value, no
    random numbers but those of the device's generator. Changes to the model or the optimizer other than by steps, such
    as loading a state, go before the first step.
    """

    def __init__(self, task: Task, training: Training, order_seed: int, stage: object) -> None:
        super().__init__(task, training, order_seed, stage)
        self._replay: Callable[[], None] | None = None
        self._captured_with: list[dict[str, Any]] = []

    def prepare(self) -> None:
        """Captures, and leaves everything as it was."""
        self._load()
        for group in self._groups:
            if "capturable" in group:
                group["capturable"] = True
        with _restored(self.training.model), self.gate.held_shut():
            self._replay = self._record()
        self._captured_with = [_fixed_options(group) for group in self._groups]

    def _run(self) -> None:
        if self._replay is None:
            self.prepare()
            assert self._replay is not None
        for group, then in zip(self._groups, self._captured_with, strict=True):
            if (now := _fixed_options(group)) != then:
                changed = next(key for key in now if now[key] != then.get(key))
                raise ValueError(
                    f"graph: {changed} of an optimizer went from {then.get(changed)} to {now[changed]}, but of a "
                    "captured step only the learning rate can change; graph=False runs it step by step"
                )
        self._replay()

    def _record(self) -> Callable[[], None]:
        generator = torch.cuda.default_generators[self.device.index]
        before = generator.clone_state()
        try:
            with torch.cuda.device(self.device):
                return record(self._work, self.training.model)
        except RuntimeError as error:
            generator.graphsafe_set_state(before)  # a capture that failed leaves it waiting for its end
            raise RuntimeError(
                f"the training step could not be captured in a CUDA graph ({error}); without one (graph=False, "
                "lth run --no-graph) it runs kernel by kernel"
            ) from error


def record(work: Callable[[], None], model: nn.Module | None = None) -> Callable[[], None]:
    """`work` as a graph of the current CUDA device, after `WARM_UP` runs on a side stream; returns what replays it.

    Args:
        model: what `work` trains, if it does.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            _let_go_of_graphs(model)
            work()
    torch.cuda.current_stream().wait_stream(side)
    _let_go_of_graphs(model)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()

    def replay(_keeps_alive: Callable[[], None] = work) -> None:  # the tensors that the graph reads and writes
        graph.replay()

    return replay


def _let_go_of_graphs(model: nn.Module | None) -> None:
    """Detaches results that an earlier forward left in the model, as pruning leaves the masked `weight`.

    As long as they live, so do the autograd nodes that add up the gradients of the parameters behind them, each on the
    stream that was current when it was made: a capture on another stream fails there.
    """
    for module in () if model is None else model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                vars(module)[name] = value.detach()


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Afterwards the model's buffers and all random generators are as before; after an error training ends."""
    buffers, random = [(buffer, buffer.clone()) for buffer in model.buffers()], random_state()
    yield
    for buffer, value in buffers:
        buffer.copy_(value)
    restore_random_state(random)


def _make_gateable(optimizer: Optimizer) -> None:
    """Raises unless the optimizer can be kept from updating by the device; gives it the state of its first step.

    A fused SGD makes its momentum in the first step, whether that is let through or not, from that step's gradient:
    zero momentum before it comes to the same, if gradients are not dampened.
    """
    kind = type(optimizer).__name__
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        raise TypeError(
            f"graph: the optimizer is a {kind} that cannot skip an update on the device; make it a torch.optim "
            "Adam, AdamW, SGD or Adagrad with fused=True"
        )
    if not isinstance(optimizer, SGD):
        return
    for group in optimizer.param_groups:
        if group["momentum"] and group["dampening"]:
            raise ValueError(f"graph: the optimizer is an SGD with dampening={group['dampening']}; it takes 0")
        for parameter in group["params"] if group["momentum"] else ():
            if optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _fixed_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """What a captured update has compiled in."""
    return {
        key: value
        for key, value in group.items()
        if key not in ("params", "lr", "initial_lr") and not isinstance(value, Tensor)
    }


def _copy(batch: Any, into: Any, iteration: int) -> None:
    given, taken = tensors_of(batch), tensors_of(into)
    shapes, expected = ([tuple(tensor.shape) for tensor in tensors] for tensors in (given, taken))
    if shapes != expected:
        raise ValueError(f"graph: the batch of iteration {iteration} has shapes {shapes}; the step takes {expected}")
    for tensor, place in zip(given, taken, strict=True):
        place.copy_(tensor)
