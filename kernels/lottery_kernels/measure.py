"""Times layers and whole models, dense masked against sparse, without disturbing a training that goes on."""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from . import masked, surgery
from .fuse import to_fused
from .layout import to_batch_innermost
from .pattern import Pattern
from .targets import Target

REPEATS = range(3, 10)  # at least and at most, within the time allowed
LAYER_SECONDS, MODEL_SECONDS = 0.4, 4.0


def fastest(
    model: nn.Module, targets: Sequence[Target], patterns: Sequence[Pattern], example: Any
) -> list[tuple[bool, str] | None]:
    """For each target whether it had better be sparse, and why; None for one that the example does not reach.

    First each layer by itself on its input in the model, forward and backward; then the whole model, because layers
    that follow each other save each other transposes. What counts is the whole model: the best of all dense masked,
    the layers that won by themselves, and all sparse. Without gradients (under `no_grad`, or with nothing to train)
    forward alone is timed.

    Args:
        example: a batch; what the model is called with: a tensor, a tuple of arguments, or a dict of named ones.
    """
    with undisturbed(model):
        inputs = _record_inputs(model, targets, example)
        reached = [i for i, target in enumerate(targets) if target.layer in inputs]
        if not reached:
            return [None] * len(targets)
        dense = {i: _dense_twin(targets[i]) for i in reached}
        sparse = {i: _sparse_twin(targets[i], patterns[i]) for i in reached}
        reasons, won = {}, set()
        for i in reached:
            runs = [_layer_step(twin, *inputs[targets[i].layer]) for twin in (dense[i], sparse[i])]
            dense_time, sparse_time = medians(runs, targets[i].leaf.device, LAYER_SECONDS)
            reasons[i] = f"layer {_ms(sparse_time)} sparse, {_ms(dense_time)} dense masked"
            if sparse_time < dense_time:
                won.add(i)
        best, reason = _fastest_model(model, targets, example, dense, sparse, won)
    return [(i in best, f"{reasons[i]}; {reason}") if i in reasons else None for i in range(len(targets))]


def _fastest_model(
    model: nn.Module,
    targets: Sequence[Target],
    example: Any,
    dense: dict[int, nn.Module],
    sparse: dict[int, nn.Module],
    won: Collection[int],
) -> tuple[Collection[int], str]:
    """Which targets to make sparse, and why."""
    distinct = {frozenset(won): "mixed", frozenset(sparse): "all sparse", frozenset[int](): "all dense masked"}
    places = surgery.places_of({target.layer for target in targets}, model)

    def step(chosen: frozenset[int]) -> Callable[[], None]:
        twins: dict[nn.Module, nn.Module] = {targets[i].layer: sparse[i] if i in chosen else dense[i] for i in dense}
        return lambda: _model_step(surgery.install(twins, places, model), example)

    kinds = [(module, type(module)) for module in model.modules()]
    to_fused(to_batch_innermost(model))
    try:
        times = medians([step(chosen) for chosen in distinct], _device(model), MODEL_SECONDS)
    finally:
        surgery.install({}, places, model)
        for module, kind in kinds:
            module.__class__ = kind
    ranked = sorted(zip(times, distinct, strict=True), key=lambda pair: pair[0])
    parts = [f"{_ms(seconds)} {distinct[chosen]}" for seconds, chosen in ranked]
    return ranked[0][1], "model " + ", ".join(parts)


def medians(runs: Sequence[Callable[[], None]], device: torch.device, seconds: float) -> list[float]:
    """Median seconds of each run, taken in turns, after one run of each to warm up."""
    for run in runs:
        run()
    times: list[list[float]] = [[] for _ in runs]
    end = time.perf_counter() + seconds
    while len(times[0]) < REPEATS.start or (len(times[0]) < REPEATS.stop and time.perf_counter() < end):
        for run, kept in zip(runs, times, strict=True):
            _synchronize(device)
            start = time.perf_counter()
            run()
            _synchronize(device)
            kept.append(time.perf_counter() - start)
    return [statistics.median(kept) for kept in times]


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Restores the model's buffers and the random state of torch, NumPy and Python."""
    buffers = [
        (module._buffers, key, buffer, buffer.clone())
        for module in model.modules()
        for key, buffer in module._buffers.items()
        if buffer is not None
    ]
    python, numpy = random.getstate(), np.random.get_state()
    devices = {tensor.device for tensor in [*model.parameters(), *model.buffers()] if tensor.is_cuda}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            with torch.no_grad():
                for owner, key, buffer, before in buffers:
                    owner[key] = buffer.copy_(before)


def _record_inputs(model: nn.Module, targets: Sequence[Target], example: Any) -> dict[nn.Module, tuple[Tensor, bool]]:
    """What one forward gives each layer, the first time that it comes by, and whether that needs a gradient."""
    inputs: dict[nn.Module, tuple[Tensor, bool]] = {}

    def record(layer: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else kwargs["input"]
        inputs.setdefault(layer, (x.detach(), x.requires_grad))

    handles = [target.layer.register_forward_pre_hook(record, with_kwargs=True) for target in targets]
    try:
        _call(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def _dense_twin(target: Target) -> nn.Module:
    twin = surgery.shallow_copy(target.layer)
    if not masked.prune_hooks(twin):
        masked.put_mask(twin, target.mask)
    return twin


def _sparse_twin(target: Target, pattern: Pattern) -> nn.Module:
    return surgery.take_over(surgery.shallow_copy(target.layer), target.sparse_copy(pattern))


def _layer_step(twin: nn.Module, x: Tensor, needs_grad: bool) -> Callable[[], None]:
    layer, x = surgery.without_hooks(twin), x.requires_grad_(needs_grad)

    def step() -> None:
        _backward(layer(x), [x, *layer.parameters()])

    return step


def _model_step(model: nn.Module, example: Any) -> None:
    _backward(_call(model, example), list(model.parameters()))


def _backward(output: Any, inputs: Sequence[Tensor]) -> None:
    """Gradients of everything in `output`, left alone in `.grad`, and without the hooks of gradient accumulation."""
    outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    if outputs and wanted:
        torch.autograd.grad(outputs, wanted, [torch.ones_like(leaf) for leaf in outputs], allow_unused=True)


def _call(model: nn.Module, example: Any) -> Any:
    if isinstance(example, dict):
        return model(**example)
    return model(*example) if isinstance(example, tuple | list) else model(example)


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
