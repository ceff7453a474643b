"""Optimizer checkpoints that do not depend on kernels and blocks."""

import copy
import io

import pytest
import torch
from torch import nn

from lottery_kernels import (
    SparseLinear,
    dense_optimizer_state_dict,
    dense_state_dict,
    load_dense_optimizer_state_dict,
    sparsify,
)
from tests.kernels.nets import random_masks, small_net, train

# How a model can be computed: `block` and `when` of sparsify.
WAYS = {
    "1x1": ((1, 1), "always"),
    "4x4": ((4, 4), "always"),
    "dense": ((1, 1), lambda *_: False),
    "mixed": ("auto", lambda name, *_: name == "4"),
}
OPTIMIZERS = {
    "adam": lambda parameters: torch.optim.Adam(parameters, 1e-2, weight_decay=0.01, amsgrad=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, 1e-2, momentum=0.9),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, 1e-2),
}


def masked_net(way: str, masks: dict) -> nn.Module:
    block, when = WAYS[way]
    torch.manual_seed(0)
    return sparsify(small_net(), masks, block, when)


def saved(checkpoint: dict) -> dict:
    """As it comes back from a file."""
    file = io.BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize(
    ("first", "then", "optimizer"),
    [
        ("1x1", "4x4", "adam"),
        ("1x1", "dense", "adam"),
        ("dense", "4x4", "adam"),
        ("4x4", "mixed", "adam"),
        ("1x1", "4x4", "sgd"),
        ("dense", "1x1", "adagrad"),
    ],
)
def test_a_checkpoint_of_any_kernels_resumes_on_any_others(first, then, optimizer):
    masks, make = random_masks(small_net()), OPTIMIZERS[optimizer]
    model = masked_net(first, masks)
    trained = make(model.parameters())
    train(model, trained, 3)
    checkpoint = saved({"model": dense_state_dict(model), "optimizer": dense_optimizer_state_dict(model, trained)})
    train(model, trained, 4, seed=6)  # uninterrupted

    resumed = masked_net(then, masks)
    if then in ("1x1", "4x4"):
        resumed.load_state_dict(checkpoint["model"])
    else:  # layers left dense hold weight_orig: load before they are masked
        resumed = small_net()
        resumed.load_state_dict(checkpoint["model"])
        resumed = sparsify(resumed, masks, *WAYS[then])
    optimizer = make(resumed.parameters())
    load_dense_optimizer_state_dict(resumed, optimizer, checkpoint["optimizer"])
    train(resumed, optimizer, 4, seed=6)
    expected, found = dense_state_dict(model), dense_state_dict(resumed)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key])
    states = [dense_optimizer_state_dict(*pair)["state"] for pair in ((model, trained), (resumed, optimizer))]
    assert states[0].keys() == states[1].keys()
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[1][name])


@pytest.mark.parametrize("way", WAYS)
def test_state_is_dense_named_and_zero_where_pruned(way):
    masks = random_masks(small_net())
    model = masked_net(way, masks)
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=0.1)
    train(model, optimizer, 2)
    state = dense_optimizer_state_dict(model, optimizer)
    plain = small_net()
    shapes = {name: parameter.shape for name, parameter in plain.named_parameters()}
    assert state["param_groups"][0]["params"] == list(shapes)
    assert {name: entries["exp_avg"].shape for name, entries in state["state"].items()} == shapes
    for name, mask in masks.items():
        assert (state["state"][f"{name}.weight"]["exp_avg_sq"][~mask] == 0).all()
    load_dense_optimizer_state_dict(plain, torch.optim.Adam(plain.parameters()), state)


def test_options_of_param_groups_are_kept():
    model = masked_net("1x1", random_masks(small_net()))
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    rest = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.SGD([{"params": weights, "weight_decay": 0.1}, {"params": rest}], 0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    train(model, optimizer, 1)
    scheduler.step()
    state = dense_optimizer_state_dict(model, optimizer)
    other = torch.optim.SGD([{"params": weights}, {"params": rest}], 7.0)
    load_dense_optimizer_state_dict(model, other, state)
    for group, kept in zip(other.param_groups, optimizer.param_groups, strict=True):
        assert {key: group[key] for key in kept if key != "params"} == {
            key: value for key, value in kept.items() if key != "params"
        }


@pytest.mark.parametrize("way", ["1x1", "dense"])
def test_a_checkpoint_is_a_copy_both_ways(way):
    model = masked_net(way, random_masks(small_net()))
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, 1)
    state = dense_optimizer_state_dict(model, optimizer)
    before = copy.deepcopy(state)
    train(model, optimizer, 1)
    load_dense_optimizer_state_dict(model, optimizer, state)
    train(model, optimizer, 1)
    for name, entries in before["state"].items():
        torch.testing.assert_close(state["state"][name], entries, rtol=0, atol=0)


def test_a_checkpoint_that_does_not_fit_leaves_the_optimizer_as_it_was():
    model = masked_net("1x1", random_masks(small_net()))
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, 1)
    good = dense_optimizer_state_dict(model, optimizer)
    groups, wrong = good["param_groups"], copy.deepcopy(good)
    wrong["state"]["4.weight"]["exp_avg"] = torch.zeros(3, 3)
    cases = [
        (good | {"param_groups": groups * 2}, "state_dict has 2 param groups, the optimizer 1"),
        (good | {"param_groups": [groups[0] | {"params": ["other"]}]}, r"of \['other'\] where the optimizer has"),
        (wrong, r"state 'exp_avg' of '4.weight' has shape \(3, 3\)"),
    ]
    for bad, words in cases:
        with pytest.raises(ValueError, match=words):
            load_dense_optimizer_state_dict(model, optimizer, bad)
    torch.testing.assert_close(dense_optimizer_state_dict(model, optimizer)["state"], good["state"], rtol=0, atol=0)


def test_a_parameter_that_is_not_the_models_is_refused():
    model = masked_net("1x1", random_masks(small_net()))
    optimizer = torch.optim.SGD([*model.parameters(), *SparseLinear(3, 3).parameters()], 0.1)
    with pytest.raises(ValueError, match=r"parameter of shape \(9, 1, 1\) that is none of the model's"):
        dense_optimizer_state_dict(model, optimizer)
