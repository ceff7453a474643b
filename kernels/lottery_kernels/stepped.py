"""What a recorded step takes for given of the optimizers that it calls: their options, and where their state lies."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

PLAIN = (float, int, str, tuple, type(None))


class Stepped:
    """The optimizers that have taken a step while they were looked for."""

    def __init__(self) -> None:
        self._states: list[tuple[Optimizer, Any]] = []

    @contextmanager
    def looked_for(self) -> Iterator[None]:
        handle = register_optimizer_step_pre_hook(self._meet)
        try:
            yield
        finally:
            handle.remove()

    def _meet(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if all(optimizer is not other for other, _ in self._states):
            self._states.append((optimizer, optimizer.state))

    def options(self) -> Hashable:
        """Another value whenever an option is another, as a rate that a schedule sets, or a group is added."""
        return tuple(  # a tensor is read where it is
            len(value) if key == "params" else value if isinstance(value, PLAIN) else id(value)
            for optimizer, _ in self._states
            for group in optimizer.param_groups
            for key, value in group.items()
        )

    def reloaded(self) -> bool:
        """Whether an optimizer holds another state than when it was met, as after `load_state_dict`."""
        return any(optimizer.state is not state for optimizer, state in self._states)

    def forget(self) -> None:
        self._states.clear()
