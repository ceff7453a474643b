"""The learning rate of the papers: a linear warm-up, then a tenth of it from every milestone on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True)
class Schedule:
    """Attributes:
    warmup: iterations over which the rate rises in equal steps to its full height, which the last of them has.
    milestones: from each of these iterations on the rate is a tenth of what it was; they may lie in the warm-up.
    """

    warmup: int = 0
    milestones: tuple[int, ...] = ()

    def factor(self, iteration: int) -> float:
        """What the rate is multiplied by at an iteration, counted from 0."""
        risen = min(1.0, (iteration + 1) / self.warmup) if self.warmup else 1.0
        return risen * 0.1 ** sum(milestone <= iteration for milestone in self.milestones)

    def schedulers(self, optimizers: Sequence[Optimizer]) -> list[LambdaLR]:
        """One for each optimizer, stepped every iteration; none if the rate never changes."""
        if not self.warmup and not self.milestones:
            return []
        return [LambdaLR(optimizer, self.factor) for optimizer in optimizers]


def iteration_of(text: str, iterations: int) -> int:
    """An iteration given as a number, "20000", or as a share of all `iterations`, "2/3" or "0.8" (below 1).

    Raises:
        ValueError: neither.
    """
    try:
        number = Fraction(text)
    except (ValueError, ZeroDivisionError):
        number = Fraction(-1)
    if number < 0 or (number >= 1 and number.denominator != 1):
        raise ValueError(f"{text!r} is neither an iteration nor a share of them such as 2/3")
    return round(number * iterations) if number < 1 else int(number)
