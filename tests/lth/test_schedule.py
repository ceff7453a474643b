"""The learning rate: warm-up, milestones, and iterations given as shares."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lth.schedule import Schedule, iteration_of


def rates(schedule: Schedule, iterations: int, rate: float = 1.0) -> list[float]:
    """The rate that each iteration's update sees."""
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=rate)
    schedulers, seen = schedule.schedulers([optimizer]), []
    for _ in range(iterations):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    return seen


def test_the_rate_rises_in_equal_steps_to_its_height_and_falls_to_a_tenth_at_milestones() -> None:
    seen = rates(Schedule(warmup=4, milestones=(6, 8)), 10, rate=0.4)
    assert seen == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.04, 0.04, 0.004, 0.004])


def test_a_milestone_at_the_end_of_the_warm_up_lets_one_iteration_see_the_height() -> None:
    assert rates(Schedule(warmup=2, milestones=(2,)), 4) == pytest.approx([0.5, 1.0, 0.1, 0.1])


def test_a_constant_rate_has_no_scheduler() -> None:
    assert Schedule().schedulers([torch.optim.SGD(nn.Linear(1, 1).parameters())]) == []
    assert rates(Schedule(), 3) == [1.0, 1.0, 1.0]


def test_several_optimizers_follow_the_same_schedule() -> None:
    optimizers = [torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=rate) for rate in (1.0, 3.0)]
    assert len(Schedule(warmup=2).schedulers(optimizers)) == 2
    assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers] == [0.5, 1.5]


@pytest.mark.parametrize(
    ("text", "iteration"), [("0", 0), ("1", 1), ("20000", 20_000), ("2/3", 20_000), ("0.5", 15_000), ("5/56", 2679)]
)
def test_iterations_are_numbers_or_shares(text: str, iteration: int) -> None:
    assert iteration_of(text, 30_000) == iteration


@pytest.mark.parametrize("text", ["", "late", "-1", "3/2", "1.5", "1/0", "nan"])
def test_what_is_neither_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is neither an iteration nor a share"):
        iteration_of(text, 30_000)
