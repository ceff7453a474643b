"""Augmentation: where every pixel comes from, how often, and that a batch is drawn the same again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lth.augment import AUGMENTATIONS, FRAME, Augmented, shifted_and_mirrored


def by_hand(image: Tensor, up: int, left: int, mirrored: bool) -> Tensor:
    """One image [C, H, W], cropped out of its frame and mirrored."""
    _, height, width = image.shape
    top, side = FRAME + up, FRAME + left
    crop = F.pad(image, (FRAME,) * 4)[:, top : top + height, side : side + width]
    return crop.flip(-1) if mirrored else crop


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 5, 9), (2, 3, 1)])
def test_every_pixel_comes_from_where_shift_and_mirror_say(shape: tuple[int, int, int]) -> None:
    places = [(up, left, flip) for up in range(-4, 5) for left in range(-4, 5) for flip in (False, True)]
    x = torch.randn(len(places), *shape)
    shifts = torch.tensor([(up, left) for up, left, _ in places]).T
    found = shifted_and_mirrored(x, shifts, torch.tensor([flip for _, _, flip in places]))
    expected = torch.stack([by_hand(image, *place) for image, place in zip(x, places, strict=True)])
    assert torch.equal(found, expected) and found.is_contiguous()


def ones(iteration: int, seed: int) -> tuple[Tensor, Tensor]:
    """500 images whose pixels are numbered from 1."""
    return torch.arange(1.0, 101).view(1, 1, 10, 10).expand(500, -1, -1, -1), torch.arange(500)


def test_a_batch_is_a_pure_function_of_seed_and_iteration() -> None:
    first = [Augmented(ones, AUGMENTATIONS)(iteration, 3)[0] for iteration in range(3)]
    batches = Augmented(ones, AUGMENTATIONS)
    torch.rand(7)
    for iteration in (2, 0, 1):
        x, y = batches(iteration, 3)
        assert torch.equal(x, first[iteration]) and torch.equal(y, torch.arange(500))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(batches(0, 4)[0], first[0])


def test_global_random_numbers_are_left_alone() -> None:
    before = torch.get_rng_state()
    Augmented(ones, AUGMENTATIONS)(0, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_crop_and_either_side_is_as_likely() -> None:
    batches, counts, mirrored = Augmented(ones, AUGMENTATIONS), torch.zeros(9, 9), 0
    for iteration in range(40):
        x, _ = batches(iteration, 0)
        pixel = x[:, 0, 4, 4].long() - 1  # never out of the frame, and tells of shift and mirror
        flipped = x[:, 0, 4, 5] < x[:, 0, 4, 4]
        rows, columns = pixel // 10 - 4, pixel % 10 - torch.where(flipped, 5, 4)
        counts.index_put_((rows + 4, columns + 4), torch.ones(500), accumulate=True)
        mirrored += int(flipped.sum())
    assert counts.sum() == 20_000
    expected = 20_000 / 81
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 80 + 4 * (2 * 80) ** 0.5  # 80 degrees of freedom, four standard deviations
    assert abs(mirrored - 10_000) < 4 * 5000**0.5


def test_only_what_is_asked_for_is_done() -> None:
    (own, _), (flipped, _), (cropped, _) = ones(0, 0), Augmented(ones, ["flip"])(0, 0), Augmented(ones, ["crop"])(0, 0)
    sides = (flipped == own).all((1, 2, 3)), (flipped == own.flip(-1)).all((1, 2, 3))
    assert (sides[0] ^ sides[1]).all() and sides[0].any() and sides[1].any()
    assert (cropped[:, 0, 4, 5] > cropped[:, 0, 4, 4]).all()
    assert not torch.equal(cropped, own)
    assert torch.equal(Augmented(ones, [])(0, 0)[0], own)
