"""Training steps on a CPU whose operators are recorded once and replayed, to the bits of the plain loop."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from torch import Tensor

from lottery_kernels import Replayed
from lth.batches import like, tensors_of
from lth.train import EagerStep, Task, Training, named


class ReplayedStep(EagerStep):
    """An eager step in two recorded halves, between which it looks at the losses: gradients, and the update.

    The first half must be the same operators whatever they compute: no `.item()`, no branch on a value, no random
    numbers but torch's. An update that asks for values, as that of an Adam which is not fused, runs as it is; one whose
    options change, as by a schedule, runs as it is until they stay.
    """

    def __init__(self, task: Task, training: Training, order_seed: int, stage: object) -> None:
        super().__init__(task, training, order_seed, stage)
        self._batch: Any = None  # of this iteration
        self._found: dict[int, Tensor] = {}  # its gradients, by the numbers of their parameters
        self._half_with_gradients = Replayed(self._differentiate, self._form_of_batch)
        self._half_with_update = Replayed(self._take_update, lambda: tuple(self._found))

    def _gradients(self, batch: Any) -> Mapping[Any, Tensor]:
        self._batch = batch
        losses, self._found = self._half_with_gradients(*tensors_of(batch))
        if self._half_with_gradients.refusal is not None:
            raise RuntimeError(
                f"the training step cannot be replayed ({self._half_with_gradients.refusal}); graph=False, or lth run "
                "--no-graph, runs it as it is"
            )
        return losses

    def _update(self) -> None:
        self._half_with_update(*self._found.values())

    def _differentiate(self, *tensors: Tensor) -> tuple[dict[Any, Tensor], dict[int, Tensor]]:
        losses = named(self.task.step(self.training.model, like(self._batch, tensors)))
        self._require_gradients()
        found = {i: one.grad for i, one in enumerate(self.training.parameters) if one.grad is not None}
        self._clear_gradients()
        return dict(losses), found

    def _take_update(self, *gradients: Tensor) -> None:
        for i, gradient in zip(self._found, gradients, strict=True):
            self.training.parameters[i].grad = gradient
        super()._update()

    def _form_of_batch(self) -> Hashable:
        return type(self._batch), tuple(self._batch) if isinstance(self._batch, Mapping) else None
