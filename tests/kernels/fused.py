"""Fused sequences beside the same modules one by one."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from lottery_kernels.fuse import to_unfused


def unfused(model: nn.Module) -> nn.Module:
    """A copy that runs its modules one by one."""
    return to_unfused(copy.deepcopy(model))


def step(model: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """y, and the gradients of x and the parameters."""
    x = x.detach().requires_grad_()
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *model.parameters()], dy)]


def runs(operator: str, model: nn.Module, x: Tensor) -> bool:
    """Whether `model(x)` calls an operator of this package."""
    with torch.profiler.profile() as profile:
        model(x)
    return any(event.key == f"lottery_kernels::{operator}" for event in profile.key_averages())


def assert_same_bits(model: nn.Module, x: Tensor, dy: Tensor) -> None:
    """Outputs, their strides and all gradients of a fused model are those of its modules one by one."""
    for fused, single in zip(step(model, x, dy), step(unfused(model), x, dy), strict=True):
        torch.testing.assert_close(fused, single, rtol=0, atol=0, equal_nan=True)
        assert len(x) < 2 or fused.stride() == single.stride()


def assert_same_bits_for_any_number_of_threads(model: nn.Module, x: Tensor, dy: Tensor) -> None:
    """The caller restores the number (fixture `threads`)."""
    results = []
    for count in (1, 2, 8, 2):
        torch.set_num_threads(count)
        results.append(step(model, x, dy))
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))
