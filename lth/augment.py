"""Augmentation of image batches on their device: mirrored half of the time, cropped at random out of a frame."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lth.data import sent
from lth.seeds import derive

AUGMENTATIONS = ("flip", "crop")
FRAME = 4  # pixels of zeros around an image, out of which its size is cropped


class Augmented:
    """Batches (images, labels) whose images are augmented, as a pure function of (seed, iteration).

    Args:
        batches: (iteration, seed) → (x [N, C, H, W], y, …), on any device.
        kinds: of "flip" (mirrored with a chance of one half) and "crop" (out of a frame of `FRAME` zeros, every
            position as likely; zero is the mean of normalised images).
    """

    def __init__(self, batches: Callable[[int, int], tuple[Tensor, ...]], kinds: Collection[str]) -> None:
        self.batches, self.kinds = batches, frozenset(kinds)

    def __call__(self, iteration: int, seed: int) -> tuple[Any, ...]:
        x, *rest = self.batches(iteration, seed)
        generator = torch.Generator().manual_seed(derive(seed, "augmentation", iteration))
        shifts = torch.randint(-FRAME, FRAME + 1, (2, len(x)), generator=generator)
        mirrored = torch.rand(len(x), generator=generator) < 0.5
        if "crop" not in self.kinds:
            shifts.zero_()
        if "flip" not in self.kinds:
            mirrored.zero_()
        return shifted_and_mirrored(x, sent(shifts, x.device), sent(mirrored, x.device)), *rest


def shifted_and_mirrored(x: Tensor, shifts: Tensor, mirrored: Tensor) -> Tensor:
    """Image n of x `[N, C, H, W]` moved up by shifts[0, n] and left by shifts[1, n] pixels (of at most `FRAME`), zeros
    coming in at the edges; then mirrored, right to left, where bool mirrored[n]. Contiguous."""
    n, channels, height, width = x.shape
    rows = torch.arange(height, device=x.device) + shifts[0, :, None]  # [N, H]
    columns = torch.arange(width, device=x.device).expand(n, -1)
    columns = torch.where(mirrored[:, None], width - 1 - columns, columns) + shifts[1, :, None]  # [N, W]
    framed = F.pad(x, (FRAME,) * 4)
    places = (rows + FRAME)[:, :, None] * framed.shape[3] + (columns + FRAME)[:, None, :]  # [N, H, W]
    places = places.view(n, 1, height * width).expand(-1, channels, -1)
    return framed.flatten(2).gather(2, places).view(n, channels, height, width)
