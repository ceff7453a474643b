"""How far weights moved from θ0: those that a pruning leaves, and those that it takes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lth.prune import weight_key
from lth.results import Point, Results
from lth.store import Run, Stage, StageFiles

BINS = 80


@dataclass(frozen=True)
class Movement:
    """Distances |θ − θ0| at the end of each ticket's training, and how they are spread over the weights.

    Attributes:
        kept: mean distance, by round, of the weights that the next pruning leaves; after the last round, of all that
            remain.
        pruned: mean distance of those that it takes, by round.
        edges: [BINS + 1] of the histograms, in distance away from zero: negative if a weight moved towards zero or past
            it.
        survivors: [BINS], weights that remain after the last round, at its end.
        dropped: [BINS], all others, each at the end of the round after which it was pruned.
        outside: share of all these weights that lies outside the edges.
    """

    kept: list[Point]
    pruned: list[Point]
    edges: np.ndarray
    survivors: np.ndarray
    dropped: np.ndarray
    outside: float


def movement(run: Run, results: Results) -> Movement:
    """Reads the weights and masks of every finished ticket of `run`."""
    means: dict[bool, dict[int, dict[int, float]]] = {True: {}, False: {}}
    edges, counted = np.empty(0), {True: np.zeros(BINS), False: np.zeros(BINS)}
    total = 0
    for replicate in results.replicates:
        spread: dict[bool, list[np.ndarray]] = {True: [], False: []}
        rounds = [number for number in results.rounds() if results.get(replicate, number)]
        for number in rounds:
            files = run.stage(Stage(replicate, number))
            for kept, away in _moved(run, files, run.stage(Stage(replicate, number + 1))).items():
                if len(away):
                    means[kept].setdefault(number, {})[replicate] = float(np.abs(away).mean())
                if not kept or number == rounds[-1]:
                    spread[kept].append(away)
        pooled = {kept: np.concatenate(parts) for kept, parts in spread.items() if parts}
        if not len(edges):
            edges = _edges(np.concatenate(list(pooled.values())))
        for kept, away in pooled.items():
            counted[kept] += np.histogram(away, edges)[0]
            total += len(away)
    inside = counted[True].sum() + counted[False].sum()
    points = {
        kept: [Point(number, results.remaining(number), values) for number, values in sorted(by_round.items())]
        for kept, by_round in means.items()
    }
    return Movement(points[True], points[False], edges, counted[True], counted[False], 1 - inside / max(total, 1))


def _moved(run: Run, files: StageFiles, following: StageFiles) -> dict[bool, np.ndarray]:
    """{whether the next pruning leaves it: how far each weight has moved away from zero}."""
    trained, initial, mask = files.weights(), run.initial(files.stage.replicate), files.mask()
    left = following.mask() if (following.path / "mask.safetensors").exists() else mask
    moved: dict[bool, list[np.ndarray]] = {True: [], False: []}
    for layer in run.layers:
        key = weight_key(layer)
        first, last = initial[key].float(), trained[key].float()
        away = (last - first) * first.sign() + last.abs() * (first == 0)
        moved[True].append(away[left[layer]].numpy())
        moved[False].append(away[mask[layer] & ~left[layer]].numpy())
    return {kept: np.concatenate(parts) for kept, parts in moved.items()}


def _edges(away: np.ndarray) -> np.ndarray:
    """Bins over all but the outermost 0.2 % on either side, with an edge at 0."""
    low, high = np.quantile(away, [0.002, 0.998])
    width = max(high - low, 1e-12) / (BINS - 1)
    return width * (np.floor(low / width) + np.arange(BINS + 1))
