"""A made-up run, written by the store's own functions: for tests of what reads runs and listens to them."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lth.events import Observer, Plan
from lth.plan import Search, make_plan
from lth.prune import Block, Layer, Masks, by_magnitude, density_of, full_masks
from lth.store import TICKET, Run, Stage

ITERATIONS, EVAL_EVERY = 2000, 100


def layers_for(block: Block = (1, 1)) -> list[Layer]:
    return [Layer("fc1", (32, 64), 0.2, block), Layer("output", (10, 32), 0.1, (1, 1))]


def search_for(**settings: Any) -> Search:
    return Search(**{"iterations": ITERATIONS, "rounds": 3, "eval_every": EVAL_EVERY, **settings})


def write_run(
    path: Path,
    *,
    block: Block = (1, 1),
    stages: int | None = None,
    observer: Observer | None = None,
    sampled: bool = True,
    test_set: bool = True,
    **settings: Any,
) -> Run:
    """Writes a run whose numbers have the shape of the paper's, and tells an observer of it.

    Args:
        path: a new folder.
        stages: only so many are finished, and the next has begun; None: all.
        sampled: step times were sampled side by side.
        test_set: evaluations judge a test set too.
        settings: of :class:`Search`.
    """
    search, layers = search_for(block=block, **settings), layers_for(block)
    plan = make_plan(search, layers, path)
    run = Run.create(path, {"preset": "made-up", "data": "made-up", **search.settings()}, plan.layers)
    run.append_environment({"torch": "2.x", "threads": 2, "machine": "made-up", "python": "3.x", "started": 0.0})
    observer = observer or Observer()
    observer.run_started(plan, [])
    for planned in plan.stages[:stages]:
        _finish(run, planned.stage, planned.start, layers, observer, plan, sampled, test_set)
    if stages is not None and stages < len(plan.stages):
        begun = run.stage(plan.stages[stages].stage)
        begun.save_mask(full_masks(layers))
        begun.append_evaluation({"iteration": 0, "val_loss": 2.3, "val_accuracy": 0.1})
    else:
        observer.run_finished(path)
    return run


def _finish(
    run: Run,
    stage: Stage,
    start: int,
    layers: Sequence[Layer],
    observer: Observer,
    plan: Plan,
    sampled: bool,
    test_set: bool,
) -> None:
    files = run.stage(stage)
    if not run.has(stage.replicate, "initial"):
        run.save(stage.replicate, "initial", _weights(layers, stage.replicate))
    initial = run.initial(stage.replicate)
    masks = _masks(run, stage, layers)
    density = density_of(masks)
    how = "dense" if stage.round == 0 else "sparse {}x{}".format(*layers[0].block)
    kernels = {"layers": {"fc1": how, "output": "dense masked" if stage.round else "dense"}, "reason": "measured"}
    files.save_mask(masks)
    files.save_kernels(kernels)
    planned = next(p for p in plan.stages if p.stage == stage)
    observer.stage_started(planned, kernels, start)
    records = _evaluations(stage, density, test_set)
    step_ms = 0.4 + 1.1 * density if stage.round else 1.3
    for record in records:
        if record["iteration"]:
            observer.stepped(stage, record["iteration"], step_ms)
        files.append_evaluation(record)
        observer.evaluated(stage, record)
    result = {
        "replicate": stage.replicate,
        "round": stage.round,
        "branch": stage.branch,
        "density": density,
        "layers": {name: {"weights": mask.numel(), "remaining": int(mask.sum())} for name, mask in masks.items()},
        "start": start,
        "iterations": ITERATIONS,
        "evaluations": len(records),
        "early_stop": min(records, key=lambda record: record["val_loss"]),
        "final": {**records[-1], "train_loss_all": 0.01, "train_accuracy_all": 0.999 - 0.02 * (1 - density) ** 8},
        "kernels": kernels,
        "timing": {"seconds": ITERATIONS * step_ms / 1000, "step_ms": step_ms, "sampled": None},
    }
    if stage.round and stage.branch == TICKET and sampled:
        dense_ms = 1.4
        speedup = dense_ms / step_ms
        result["timing"]["sampled"] = {
            "sparse_ms": step_ms,
            "dense_ms": dense_ms,
            "speedup": speedup,
            "spread": [0.93 * speedup, 1.06 * speedup],
        }
    files.finish(_trained(initial, masks, stage), result)
    observer.stage_finished(stage, result)


def _weights(layers: Sequence[Layer], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = {f"{layer.name}.weight": 0.1 * torch.randn(layer.shape, generator=generator) for layer in layers}
    return {**drawn, **{f"{layer.name}.bias": torch.zeros(layer.shape[0]) for layer in layers}}


def _trained(initial: dict[str, Tensor], masks: Masks, stage: Stage) -> dict[str, Tensor]:
    """Weights that moved away from zero, the larger the farther."""
    generator = torch.Generator().manual_seed(100 * stage.replicate + stage.round)
    trained = dict(initial)
    for name, mask in masks.items():
        weight = initial[f"{name}.weight"]
        moved = weight + 0.3 * weight * torch.rand(weight.shape, generator=generator) * (1 + stage.round)
        trained[f"{name}.weight"] = moved * mask
    return trained


def _masks(run: Run, stage: Stage, layers: Sequence[Layer]) -> Masks:
    if stage.round == 0:
        return full_masks(layers)
    if stage.branch != TICKET:
        return run.stage(Stage(stage.replicate, stage.round)).mask()
    before = run.stage(Stage(stage.replicate, stage.round - 1))
    trained = before.weights()
    weights = {layer.name: trained[f"{layer.name}.weight"] for layer in layers}
    return by_magnitude(layers, weights, before.mask(), stage.round)


def _evaluations(stage: Stage, density: float, test_set: bool) -> list[dict[str, Any]]:
    """Tickets learn sooner and better down to a few percent, controls later and worse from the start."""
    generator = torch.Generator().manual_seed(7919 * stage.replicate + 31 * stage.round + len(stage.branch))
    pruned = -math.log(density)  # 0 dense, 3 at 5 %
    if stage.branch == TICKET:
        stop = 900 / (1 + 0.5 * pruned) + 60 * max(0.0, pruned - 2.5) ** 2
        best = 0.960 + 0.004 * pruned - 0.0016 * pruned**2
    else:
        harm = {"reinit": 1.0, "random": 1.3, "oneshot": 0.3}[stage.branch]
        stop, best = 900 + 250 * harm * pruned, 0.960 - 0.006 * harm * pruned
    stop *= 1 + 0.1 * float(torch.randn((), generator=generator))
    best += 0.001 * float(torch.randn((), generator=generator))
    records = []
    for iteration in range(0, ITERATIONS + 1, EVAL_EVERY):
        learnt = 1 - math.exp(-3 * iteration / stop)
        noise = 0.0008 * float(torch.randn((), generator=generator))
        record = {
            "iteration": iteration,
            "val_loss": 2.3 * (1 - learnt) + 0.14 + 0.05 * (iteration / stop) + 4 * noise,
            "val_accuracy": 0.1 + (best - 0.1) * learnt + noise,
            "train_loss": 2.3 * (1 - learnt) + 0.01,
            "train_accuracy": 0.1 + 0.9 * learnt,
        }
        if test_set:
            record |= {"test_loss": record["val_loss"] + 0.01, "test_accuracy": 0.1 + (best - 0.1) * learnt - noise}
        records.append(record)
    return records
