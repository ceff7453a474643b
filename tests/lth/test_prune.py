"""Masks: exact counts, ties, blocks with tails, and controls of the same density."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lth.models import NETWORKS
from lth.prune import (
    Layer,
    at_random,
    block_scores,
    blocks_alive,
    by_magnitude,
    density_of,
    full_masks,
    layers_of,
    mask_from_blocks,
    remaining,
)


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    """A linear or convolution layer with any block, dividing or not."""
    groups = draw(st.sampled_from([1, 1, 2]))
    out, inputs = groups * draw(st.integers(1, 9)), draw(st.integers(1, 9))
    kernel = draw(st.sampled_from([(), (1, 1), (3, 2)])) if groups == 1 else (3, 2)
    block = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    return Layer("layer", (out, inputs, *kernel), draw(st.floats(0.05, 0.5)), block, groups)


def blocks_by_hand(layer: Layer) -> list[list[tuple[int, ...]]]:
    """The positions in the dense weight of each block, in the order of the blocks."""
    out, inputs = layer.shape[0] // layer.groups, layer.shape[1]
    kernel = layer.shape[2:]
    taps = [divmod(tap, kernel[1]) for tap in range(kernel[0] * kernel[1])] if kernel else [()]
    (r, c), found = layer.block, []
    for group in range(layer.groups):
        for top in range(0, out, r):
            for tap in taps:
                for left in range(0, inputs, c):
                    rows, cols = range(top, min(top + r, out)), range(left, min(left + c, inputs))
                    found.append([(group * out + row, col, *tap) for row in rows for col in cols])
    return found


@given(layers())
@settings(max_examples=80, deadline=None)
def test_a_blocks_score_is_the_mean_magnitude_of_its_real_positions(layer: Layer) -> None:
    weight = torch.randn(layer.shape, generator=torch.Generator().manual_seed(0))
    by_hand = [sum(abs(weight[p].item()) for p in block) / len(block) for block in blocks_by_hand(layer)]
    torch.testing.assert_close(block_scores(weight, layer), torch.tensor(by_hand, dtype=torch.float64))
    assert layer.blocks == len(by_hand)


@given(layers())
@settings(max_examples=80, deadline=None)
def test_a_mask_holds_exactly_its_blocks(layer: Layer) -> None:
    alive = torch.rand(layer.blocks, generator=torch.Generator().manual_seed(1)) < 0.5
    by_hand = torch.zeros(layer.shape, dtype=torch.bool)
    for block, lives in zip(blocks_by_hand(layer), alive, strict=True):
        for position in block:
            by_hand[position] = lives
    assert torch.equal(mask_from_blocks(alive, layer), by_hand)
    assert torch.equal(blocks_alive(by_hand, layer), alive)


@given(layers(), st.integers(1, 4))
@settings(max_examples=80, deadline=None)
def test_every_round_leaves_the_exact_count_of_the_largest_and_nothing_returns(layer: Layer, rounds: int) -> None:
    if not remaining([layer], rounds):
        return
    generator = torch.Generator().manual_seed(2)
    masks = full_masks([layer])
    for number in range(1, rounds + 1):
        weight = torch.randn(layer.shape, generator=generator)
        before, scores = masks, block_scores(weight, layer)
        masks = by_magnitude([layer], {"layer": weight}, masks, number)
        was, lives = blocks_alive(before["layer"], layer), blocks_alive(masks["layer"], layer)
        assert lives.sum() == remaining([layer], number)
        assert not (lives & ~was).any()
        gone = was & ~lives
        assert not gone.any() or scores[lives].min() >= scores[gone].max()


def test_ties_are_broken_by_position_and_counts_stay_exact() -> None:
    layer = Layer("layer", (4, 5), 0.25)
    masks = by_magnitude([layer], {"layer": torch.full((4, 5), -0.5)}, full_masks([layer]), 1)
    assert masks["layer"].flatten().tolist() == [False] * 5 + [True] * 15


def test_a_live_weight_of_zero_is_not_taken_for_a_pruned_one() -> None:
    layer = Layer("layer", (1, 4), 0.5)
    masks = {"layer": torch.tensor([[True, False, True, False]])}
    pruned = by_magnitude([layer], {"layer": torch.tensor([[0.0, 9.0, 0.0, 9.0]])}, masks, 1)
    assert pruned["layer"].tolist() == [[True, False, True, False]]  # two were to remain, and two do


def test_nan_in_a_weight_is_an_error_that_names_the_layer() -> None:
    layer = Layer("fc1", (2, 2), 0.5)
    weight = torch.tensor([[1.0, float("nan")], [1.0, 1.0]])
    with pytest.raises(ValueError, match=r"'fc1'.*NaN"):
        by_magnitude([layer], {"fc1": weight}, full_masks([layer]), 1)


def test_an_emptied_layer_is_an_error_that_names_it() -> None:
    layer = Layer("fc1", (2, 2), 0.9)
    with pytest.raises(ValueError, match="'fc1': nothing would be left after 2 rounds"):
        by_magnitude([layer], {"fc1": torch.ones(2, 2)}, full_masks([layer]), 2)


@given(layers())
@settings(max_examples=50, deadline=None)
def test_a_random_mask_has_the_same_count_of_weights_in_blocks(layer: Layer) -> None:
    generator = torch.Generator().manual_seed(3)
    mask = mask_from_blocks(torch.rand(layer.blocks, generator=generator) < 0.4, layer)
    moved = at_random([layer], {"layer": mask}, generator)["layer"]
    assert moved.sum() == mask.sum()
    assert torch.equal(mask_from_blocks(blocks_alive(moved, layer), layer), moved)


def test_random_masks_follow_their_generator() -> None:
    layer = Layer("layer", (30, 30), 0.5)
    mask = {"layer": torch.arange(900).view(30, 30) < 300}

    def draw(seed: int) -> Tensor:
        return at_random([layer], mask, torch.Generator().manual_seed(seed))["layer"]

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


@pytest.mark.parametrize(
    ("rounds", "percent"), [(3, 51.3), (7, 21.1), (9, 13.5), (12, 6.95), (15, 3.58), (16, 2.87)]
)  # Frankle & Carbin's labels
def test_lenet_has_the_papers_weights_and_densities(rounds: int, percent: float) -> None:
    model = NETWORKS["lenet-300-100"]((1, 28, 28), 10)
    rates = {"fc1": 0.2, "fc2": 0.2, "output": 0.1}
    found = layers_of(model, rates)
    assert sum(layer.weights for layer in found) == 266_200
    weights = {layer.name: model.get_submodule(layer.name).weight.detach() for layer in found}
    density = 100 * density_of(by_magnitude(found, weights, full_masks(found), rounds))
    assert density == pytest.approx(percent, abs=0.05)


def test_layers_left_out_are_neither_pruned_nor_counted() -> None:
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 1000))
    found = layers_of(model, {"0": 0.2})
    assert [layer.name for layer in found] == ["0"]
    assert density_of(by_magnitude(found, {"0": model[0].weight}, full_masks(found), 1)) == 0.8


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"nowhere": 0.2}, "no layer 'nowhere'.* 0, 1"),
        ({"0": 1.5}, "1.5 for layer '0'"),
        (-0.1, "-0.1"),
        ({}, "no layer is left"),
    ],
)
def test_rates_that_cannot_be_are_refused(rates: float | dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layers_of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), rates)
