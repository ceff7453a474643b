"""What a search for tickets does: its settings, checked, and the trainings that follow from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lth.events import Plan, PlannedStage
from lth.prune import SCOPES, Block, Layer, pools, remaining
from lth.store import BRANCHES, TICKET, Stage

KERNELS = ("auto", "sparse", "dense")
TOGETHER = "all layers"  # what a plan calls layers that are pruned by one ranking


@dataclass(frozen=True)
class Search:
    """How tickets are searched for.

    Attributes:
        iterations: a training ends at this iteration.
        rounds: how often is pruned; round 0 is the dense network.
        rate: share of the remaining weights (blocks) pruned a round: one for all layers, or {module name: rate}, where
            the layers left out are exempt: neither pruned nor counted.
        scope: "layer" prunes every layer at its rate; "global" prunes all layers together, by one ranking, at one rate.
        block: (rows, cols) that are pruned together.
        rewind: survivors return to their weights after this many iterations of round 0; 0 is initialisation.
        branches: of "reinit", "random", "oneshot": controls grown from a round.
        branch_rounds: the rounds that grow branches; None: all but round 0.
        replicates: repeats, each with its own seed for initialisation, data order and pruning.
        eval_every: iterations between evaluations.
        kernels: "auto" measures once a round, "sparse" or "dense".
        checkpoint_seconds: an evaluation is followed by a checkpoint if so many seconds have passed since the last.
    """

    iterations: int
    rounds: int = 15
    rate: float | Mapping[str, float] = 0.2
    scope: str = "layer"
    block: Block = (1, 1)
    rewind: int = 0
    branches: tuple[str, ...] = ()
    branch_rounds: tuple[int, ...] | None = None
    replicates: int = 1
    seed: int = 0
    eval_every: int = 100
    kernels: str = "auto"
    checkpoint_seconds: float = 20.0

    def __post_init__(self) -> None:
        self._check_types()
        _check("iterations", self.iterations, self.iterations >= 1, "at least 1")
        _check("rounds", self.rounds, 0 <= self.rounds <= 99, "0 to 99")
        _check(
            "rewind", self.rewind, 0 <= self.rewind < self.iterations, f"0 to below the {self.iterations} iterations"
        )
        _check("replicates", self.replicates, self.replicates >= 1, "at least 1")
        _check("eval_every", self.eval_every, self.eval_every >= 1, "at least 1")
        _check("kernels", self.kernels, self.kernels in KERNELS, ", ".join(KERNELS))
        _check("checkpoint_seconds", self.checkpoint_seconds, self.checkpoint_seconds >= 0, "0 or more")
        _check("block", self.block, len(self.block) == 2 and min(self.block) >= 1, "two sizes of at least 1")
        for branch in self.branches:
            _check("branches", branch, branch in BRANCHES, ", ".join(BRANCHES))
        for number in self.branch_rounds or ():
            _check("branch_rounds", number, 1 <= number <= self.rounds, f"1 to the {self.rounds} rounds")
        for name in ("branches", "branch_rounds"):
            given = getattr(self, name) or ()
            _check(name, given, len(set(given)) == len(given), "each of them once")
        rates = self.rate.values() if isinstance(self.rate, Mapping) else [self.rate]
        for rate in rates:
            _check("rate", rate, 0 < rate < 1, "between 0 and 1")
        _check("scope", self.scope, self.scope in SCOPES, ", ".join(SCOPES))
        one_rate = self.scope == "layer" or len(set(rates)) < 2
        _check("rate", self.rate, one_rate, "one rate for all layers that are not exempt where the scope is global")

    def _check_types(self) -> None:
        for name in ("iterations", "rounds", "rewind", "replicates", "seed", "eval_every"):
            _check(name, getattr(self, name), isinstance(getattr(self, name), int), "a whole number")
        listed = {"block": (int, "two whole numbers"), "branches": (str, "a sequence of names")}
        if self.branch_rounds is not None:
            listed["branch_rounds"] = int, "a sequence of whole numbers"
        for name, (kind, allowed) in listed.items():
            given = getattr(self, name)
            right = isinstance(given, tuple | list) and all(isinstance(one, kind) for one in given)
            _check(name, given, right, allowed)
            object.__setattr__(self, name, tuple(given))
        rates = self.rate.values() if isinstance(self.rate, Mapping) else [self.rate]
        numbers = all(isinstance(rate, int | float) for rate in rates)
        _check("rate", self.rate, numbers, "a number, or {module name: number}")

    def settings(self) -> dict[str, Any]:
        """What decides the result, for run.json."""
        settings = asdict(self)
        del settings["checkpoint_seconds"]
        settings["rate"] = dict(self.rate) if isinstance(self.rate, Mapping) else self.rate
        return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}


def make_plan(search: Search, layers: Sequence[Layer], directory: Path | None) -> Plan:
    """The trainings of a search, in order.

    Raises:
        ValueError: a round would leave nothing of a layer.
    """
    for pool in pools(layers, search.scope):
        if not remaining(pool, search.rounds):
            layer, blocks = pool[0], _blocks(pool)
            name = f"layer {layer.name!r}, which has" if len(pool) == 1 else "the layers, which have"
            raise ValueError(
                f"rounds: after {search.rounds} rounds at rate {layer.rate} nothing would be left of "
                f"{name} {blocks} block(s) of {layer.block[0]}x{layer.block[1]}"
            )
    stages = [
        _planned(search, layers, Stage(replicate, number, branch))
        for replicate in range(search.replicates)
        for number in range(search.rounds + 1)
        for branch in (TICKET, *(search.branches if _branches_grow(search, number) else ()))
    ]
    return Plan(directory, described(layers), stages)


def described(layers: Sequence[Layer]) -> dict[str, dict[str, Any]]:
    """The layers as run.json holds them."""
    return {
        layer.name: {
            "shape": list(layer.shape),
            "weights": layer.weights,
            "rate": layer.rate,
            "block": list(layer.block),
            "blocks": layer.blocks,
        }
        for layer in layers
    }


def _branches_grow(search: Search, number: int) -> bool:
    return number > 0 and (search.branch_rounds is None or number in search.branch_rounds)


def _planned(search: Search, layers: Sequence[Layer], stage: Stage) -> PlannedStage:
    pooled = {pool[0].name if len(pool) == 1 else TOGETHER: pool for pool in pools(layers, search.scope)}
    blocks = {name: remaining(pool, stage.round) for name, pool in pooled.items()}
    left = sum(blocks[name] / _blocks(pool) * _weights(pool) for name, pool in pooled.items())
    # a reinit has no trajectory of its own to rewind to, so it starts where the dense network did
    start = 0 if stage.round == 0 or stage.branch == "reinit" else search.rewind
    return PlannedStage(stage, left / _weights(layers), blocks, start, search.iterations)


def _weights(layers: Sequence[Layer]) -> int:
    return sum(layer.weights for layer in layers)


def _blocks(layers: Sequence[Layer]) -> int:
    return sum(layer.blocks for layer in layers)


def _check(name: str, value: object, right: bool, allowed: str) -> None:
    if not right:
        raise ValueError(f"{name}: {value!r}; it takes {allowed}")
