"""`find_ticket`: iterative magnitude pruning over anyone's model, data and training step; and what it finds."""

from __future__ import annotations

import copy
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from torch import Tensor, nn
from torch.optim import Optimizer

from lth.checks import check_draws, check_example, check_maskable, check_model, check_optimizers, check_plain
from lth.classify import Shuffled
from lth.driver import Driver
from lth.events import Observer, Plan
from lth.masked import mask_as_chosen
from lth.plan import Search, make_plan
from lth.prune import layers_of
from lth.stepper import captures
from lth.store import TICKET, Run, RunError, Stage, locked
from lth.train import Losses, Task


class Ticket:
    """A mask and the weights to start it from; read from the run's folder when asked for."""

    def __init__(self, run: Run, stage: Stage) -> None:
        self._files, self.stage = run.stage(stage), stage

    @property
    def masks(self) -> dict[str, Tensor]:
        """{layer name: bool mask, in the shape of the dense weight}."""
        return self._files.mask()

    @property
    def weights(self) -> dict[str, Tensor]:
        """The state to start from: θ0, θk or a new draw; dense, unmasked."""
        return self._files.start()

    @property
    def trained(self) -> dict[str, Tensor]:
        """The state after training; dense, pruned positions 0."""
        return self._files.weights()

    @property
    def result(self) -> dict[str, Any]:
        """Density, early stop, final numbers, timing: as `lth.store` describes result.json."""
        return self._files.result()

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return self._files.evaluations()

    def plant(self, model: nn.Module) -> nn.Module:
        """Loads the weights into a plain model and masks it, sparse or dense as it was trained here. In place."""
        check_plain(model)
        model.load_state_dict(self.weights)
        return mask_as_chosen(model, self.masks, self.result["kernels"])


class Tickets:
    """What a search found. `tickets[n]` is the ticket of round n; `tickets[0]` is dense, `tickets[-1]` the sparsest."""

    def __init__(self, run: Run) -> None:
        self.run = run

    @classmethod
    def open(cls, folder: str | Path) -> Tickets:
        """What `find_ticket(out=folder)` or `lth run` left in a folder.

        Raises:
            RunError: the folder holds no run. DamagedFile: its description was truncated or altered.
        """
        return cls(Run.open(Path(folder)))

    def __len__(self) -> int:
        return self.run.settings["rounds"] + 1

    @overload
    def __getitem__(self, number: int) -> Ticket: ...

    @overload
    def __getitem__(self, number: slice) -> list[Ticket]: ...

    def __getitem__(self, number: int | slice) -> Ticket | list[Ticket]:
        found = range(len(self))[number]
        return self.at(found) if isinstance(found, int) else [self.at(one) for one in found]

    def __iter__(self) -> Iterator[Ticket]:
        return (self[number] for number in range(len(self)))

    def at(self, number: int, branch: str = TICKET, replicate: int = 0) -> Ticket:
        """The ticket of a round, of a branch, of a replicate."""
        if not self.run.stage(Stage(replicate, number, branch)).finished:
            raise KeyError(f"{Stage(replicate, number, branch)} was not run")
        return Ticket(self.run, Stage(replicate, number, branch))


def find_ticket(
    model: nn.Module | Callable[[], nn.Module],
    data: Tensor | Sequence[Tensor] | Callable[[int, int], Any],
    step: Callable[[nn.Module, Any], Losses],
    optimizer: Callable[[nn.Module], Optimizer | Sequence[Optimizer]],
    *,
    iterations: int,
    batch_size: int | None = None,
    scheduler: Callable[..., Any] | None = None,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    example: Callable[[Any], Any] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    observer: Observer | None = None,
    graph: bool = False,
    **search: Any,
) -> Tickets:
    """Searches for a ticket: trains, prunes the smallest weights, rewinds the rest, and again.

    Args:
        model: makes a model on its device, drawn from torch's generator; or a model, whose weights are θ0 (it is not
            changed; new draws, for other replicates and reinit, call `reset_parameters()` of its modules).
        data: tensors of equal length, of which `batch_size` rows a time are drawn in a new order every epoch; or a
            function (iteration, seed) → batch of anything, that gives the same batch whenever it is called with the
            same numbers.
        step: (model, batch) → loss or losses, a tensor or several. It leaves the gradients of the update in `.grad` and
            may clip them; the driver checks the losses, steps the optimizers and schedulers, and clears the gradients.
            Unless kernels="dense" it is also called on copies, to time sparse against dense masked.
        optimizer: model → an optimizer or several, whose steps need no closure. Masked layers train `weight_orig` and
            sparse ones `values` [blocks, rows, cols] in the place of `weight`: take all `parameters()`, or pick them
            by their modules or number of dimensions; picking by name is refused.
        scheduler: optimizer (or the list of several) → a scheduler or several, stepped every iteration.
        evaluate: model → numbers, called every `eval_every` iterations; `val_loss` decides the early stop.
        example: batch → what the model is called with (a tensor, a tuple of arguments or a dict of named ones), for
            kernels="auto" to time it; the first entry of a tuple unless given.
        out: the run's folder, which `Tickets.open` reads later; without one, a temporary folder that lives as long as
            what is found.
        resume: continue what `out` holds.
        observer: hears how it goes.
        graph: record a whole training step, with its update, and replay it: on a GPU in a CUDA graph, on a CPU operator
            by operator, which saves small nets more than half of a step. `step` must be the same work on its batch
            whatever it computes: no `.item()`, no branch on a value, no random numbers but torch's of the device. On a
            GPU optimizers must be fused, and a loss that is not finite still stops the run, with the weights that went
            before it, but up to 100 steps later.
        **search: as in :class:`lth.plan.Search`: rounds, rate, block, rewind, branches, branch_rounds, replicates,
            seed, eval_every, kernels, checkpoint_seconds.

    Raises:
        ValueError: a setting that cannot be.
        TypeError, ValueError: a layer to prune that cannot be masked, by name: parametrized, tied, a subclass. Give
            `rate` without it. A model, optimizer, example or step that a search cannot be run with (`lth.checks`).
        RunError: the folder holds something else.
        Diverged: a loss was not finite.
        DamagedFile: a file of the run to resume was truncated or altered.
    """
    batches = data if callable(data) else _batches(data, batch_size)
    optional: dict[str, Any] = {} if example is None else {"example": example}
    task = Task(
        model=(lambda: _redrawn(model)) if isinstance(model, nn.Module) else model,
        batches=batches,
        step=step,
        optimizers=optimizer,
        schedulers=lambda optimizers: _schedulers(scheduler, optimizers),
        evaluate=evaluate,
        first=model if isinstance(model, nn.Module) else None,
        graph=graph,
        **optional,
    )
    chosen, settings = Search(iterations=iterations, **search), {"graph": True} if graph else None
    if out is not None:
        run = run_search(task, chosen, Path(out), resume=resume, observer=observer or Observer(), settings=settings)
        return Tickets(run)
    directory = Path(tempfile.mkdtemp(prefix="lth-"))
    try:
        run = run_search(task, chosen, directory, resume=False, observer=observer or Observer())
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    weakref.finalize(run, shutil.rmtree, directory, ignore_errors=True)
    return Tickets(run)


def run_search(
    task: Task,
    search: Search,
    directory: Path,
    *,
    resume: bool,
    observer: Observer,
    settings: Mapping[str, Any] | None = None,
) -> Run:
    """Runs a search in its folder; `settings` are what else decides its result."""
    plan = plan_search(task, search, directory)
    with locked(directory):
        described_by = {**search.settings(), **(settings or {})}
        run = open_run(directory, described_by, plan, resume=resume)
        Driver(task, search, layers_of(task.fresh(), search.rate, search.block), run, observer).go(plan)
    return run


def plan_search(task: Task, search: Search, directory: Path | None) -> Plan:
    """The plan, after all that can be checked without training.

    Raises:
        TypeError, ValueError: the model, a layer or an optimizer is none that a search can be run with.
    """
    model = task.fresh()
    check_model(model)
    layers = layers_of(model, search.rate, search.block)
    plan = make_plan(search, layers, directory)
    check_maskable(model, layers)
    check_draws(task, search, layers)
    if search.rounds:
        check_optimizers(task, search, layers)
        if search.kernels == "auto" and not captures(task, next(model.parameters()).device):
            check_example(task, search)
    return plan


def open_run(directory: Path, settings: Mapping[str, Any], plan: Plan, *, resume: bool) -> Run:
    """A new run, or the one that the folder holds if it is to be resumed and its settings are these."""
    if not (directory / "run.json").exists():
        return Run.create(directory, settings, plan.layers)
    if not resume:
        raise RunError(f"{directory} holds a run already; --resume continues it, --out names another folder")
    run = Run.open(directory)
    theirs = {**run.settings, "layers": run.layers}
    ours = {**settings, "layers": dict(plan.layers)}
    if changed := [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]:
        differences = "; ".join(f"{key}: {theirs.get(key)} there, {ours.get(key)} here" for key in changed)
        raise RunError(f"{directory} holds a run with other settings ({differences}); --out names another folder")
    return run


def _batches(data: Tensor | Sequence[Tensor], batch_size: int | None) -> Shuffled:
    rows = [data] if isinstance(data, Tensor) else data
    if not isinstance(rows, Sequence) or not rows or not all(isinstance(one, Tensor) and one.ndim for one in rows):
        held = f" of {type(rows[0]).__name__}" if isinstance(rows, Sequence) and rows else ""
        raise TypeError(
            f"data: a {type(data).__name__}{held}; it takes tensors of equal length, or a function (iteration, seed) → "
            "batch"
        )
    if batch_size is None:
        raise ValueError("batch_size: None; it takes a number where data is tensors")
    return Shuffled(rows, batch_size)


def _redrawn(model: nn.Module) -> nn.Module:
    """A copy of a model with every module's parameters drawn anew."""
    drawn = copy.deepcopy(model)
    for name, module in drawn.named_modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
        elif any(True for _ in module.parameters(recurse=False)):
            raise ValueError(
                f"model: module {name!r} has parameters but no reset_parameters(); pass a function that makes the model"
            )
    return drawn


def _schedulers(scheduler: Callable[..., Any] | None, optimizers: list[Optimizer]) -> Sequence[Any]:
    if scheduler is None:
        return ()
    made = scheduler(optimizers[0] if len(optimizers) == 1 else optimizers)
    return list(made) if isinstance(made, list | tuple) else [made]
