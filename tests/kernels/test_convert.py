"""Whole models made sparse and dense again."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lottery_kernels import SparseConv2d, SparseLinear, choices, dense_state_dict, densify, sparsify
from lottery_kernels.layout import BatchInnermostBatchNorm2d
from tests.kernels.nets import images, masked, random_masks, small_net, train

BLOCKS = [(1, 1), (4, 4), "auto"]


# Results


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("when", ["always", lambda name, layer, mask: name == "4"], ids=["always", "some"])
def test_outputs_and_gradients_equal_dense_masked(block, when):
    model = small_net()
    masks = random_masks(model)
    dense = masked(copy.deepcopy(model), masks)
    assert sparsify(model, masks, block, when) is model
    x = images()
    outputs = [net(x) for net in (model, dense)]
    for y in outputs:
        y.square().sum().backward()
    torch.testing.assert_close(*outputs)
    densify(model)
    densify(dense)
    for one, other in zip(model.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
def test_training_on_with_a_repointed_optimizer_equals_dense_masked_training(block, kind):
    sparse, dense = small_net(), small_net()
    dense.load_state_dict(sparse.state_dict())
    masks = random_masks(sparse)
    for model, when in ((sparse, "always"), (dense, lambda *_: False)):
        optimizer = kind(model.parameters(), 1e-2, weight_decay=0.01)
        train(model, optimizer, 3)
        sparsify(model, masks, block, when, optimizer=optimizer)
        train(model, optimizer, 5, seed=6)
    found, expected = dense_state_dict(sparse), dense_state_dict(dense)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key])


# Masks


def test_masks_default_to_what_prune_left():
    model = small_net()
    prune.l1_unstructured(model[4], "weight", 0.7)
    prune.random_unstructured(model[4], "weight", 0.2)  # prune combines them
    prune.ln_structured(model[0], "weight", 0.5, n=2, dim=0)
    expected = {0: model[0].weight_mask.bool(), 4: model[4].weight_mask.bool()}
    with torch.no_grad():
        model[4].weight_orig.mul_(2)  # as an optimizer does: `weight` is now out of date
    weight = model[4].weight_orig * model[4].weight_mask
    sparsify(model, when="always")
    for i, mask in expected.items():
        assert torch.equal(model[i].mask, mask)
        assert not model[i]._forward_pre_hooks
    assert torch.equal(model[4].weight, weight)
    assert type(model[7]) is nn.Linear


def test_without_any_mask_there_is_an_error():
    with pytest.raises(ValueError, match=r"masks is None, and no nn.Linear or nn.Conv2d .* is pruned"):
        sparsify(small_net())


def test_no_masks_leave_the_model_alone():
    model = small_net()
    assert sparsify(model, {}) is model
    assert choices(model) == {}


# What stays


def test_mode_trainability_dtype_and_order_stay():
    model = small_net(torch.float32)
    model[4].eval().requires_grad_(False)
    model[0].bias.requires_grad_(False)
    shapes = [name for name, _ in model.named_modules()]
    sparsify(model, random_masks(model), when="always")
    assert [name for name, _ in model.named_modules()] == shapes
    assert not model[4].training
    assert model[7].training
    assert not model[4].values.requires_grad
    assert model[0].values.requires_grad
    assert not model[0].bias.requires_grad
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    densify(model)
    assert not model[4].training
    assert not model[4].weight.requires_grad
    assert not model[0].bias.requires_grad


def test_biases_stay_the_same_parameter_even_if_tied():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].bias = bias = model[0].bias
    sparsify(model, random_masks(model), when="always")
    assert model[0].bias is model[1].bias is bias
    densify(model)
    assert model[0].bias is model[1].bias is bias


@pytest.mark.parametrize(("when", "swapped"), [("always", True), (lambda name, *_: name != "0", False)])
def test_batch_norm_keeps_the_layout_of_sparse_convolutions(when, swapped):
    model = small_net()
    norm = model[1]
    sparsify(model, random_masks(model), when=when)
    assert model[1] is norm
    assert isinstance(norm, BatchInnermostBatchNorm2d) == swapped
    densify(model)
    assert type(norm) is nn.BatchNorm2d


def test_gradients_stay():
    model = small_net()
    model(images()).sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    masks = random_masks(model)
    densify(sparsify(model, masks, (4, 4), "always"))
    for name, parameter in model.named_parameters():
        mask = masks.get(name.removesuffix(".weight"), torch.tensor(True))
        assert torch.equal(parameter.grad, gradients[name] * mask), name


def test_random_state_stays():
    model = small_net()
    masks = random_masks(model)
    state = torch.get_rng_state()
    densify(sparsify(model, masks, "auto", "always"))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("when", ["always", lambda *_: False], ids=["sparse", "dense"])
def test_hooks_of_a_layer_keep_working_and_can_be_removed(when):
    model = small_net()
    calls = []
    layer = model[4]
    handles = [
        layer.register_forward_pre_hook(lambda module, args: calls.append(("before", module))),
        layer.register_forward_hook(
            lambda module, args, kwargs, out: calls.append(("after", module)), with_kwargs=True
        ),
        layer.register_full_backward_hook(lambda module, *_: calls.append(("backward", module))),
        layer.register_load_state_dict_pre_hook(lambda module, *_: calls.append(("load", module))),
        layer.register_load_state_dict_post_hook(lambda module, _: calls.append(("loaded", module))),
    ]
    state = model.state_dict()
    masks = random_masks(model)

    def use() -> list:
        calls.clear()
        model(images().requires_grad_()).sum().backward()
        model.load_state_dict(state, strict=False)
        return [*calls]

    for convert in (lambda: sparsify(model, masks, when=when), lambda: densify(model)):
        convert()
        assert use() == [(what, model[4]) for what in ("before", "after", "backward", "load", "loaded")]
    sparsify(model, masks, when=when)
    for handle in handles:
        handle.remove()
    assert use() == []


def test_attributes_that_users_put_on_a_layer_stay():
    model = small_net()
    model[4].note = "classifier"
    model[0].note = "stem"
    masks = random_masks(model)
    sparsify(model, masks, when="always")
    assert (model[0].note, model[4].note) == ("stem", "classifier")
    densify(model)
    assert (model[0].note, model[4].note) == ("stem", "classifier")
    assert vars(model[4]).keys() == vars(nn.Linear(1, 1)).keys() | {"note"}


class Shared(nn.Module):
    """One linear layer under two names, in two modules."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6).double()
        self.rest = nn.ModuleDict({"second": self.first, "other": nn.Linear(6, 6).double()})

    def forward(self, x):
        return self.rest["other"](self.rest["second"](self.first(x)).tanh())


@pytest.mark.parametrize("names", [["first"], ["rest.second"], ["first", "rest.second"]])
@pytest.mark.parametrize("when", ["always", lambda *_: False], ids=["sparse", "dense"])
def test_a_shared_layer_is_converted_once_and_stays_shared(names, when):
    model, mask, x = Shared(), torch.rand(6, 6) < 0.4, torch.randn(3, 6, dtype=torch.float64)
    dense = masked(copy.deepcopy(model), {"first": mask})
    sparsify(model, dict.fromkeys(names, mask), when=when)
    assert model.first is model.rest["second"]
    assert list(choices(model)) == ["first"]
    torch.testing.assert_close(model(x), dense(x))
    densify(model)
    assert type(model.first) is nn.Linear
    assert model.first is model.rest["second"]
    torch.testing.assert_close(model(x), dense(x))


def test_different_masks_for_a_shared_layer_are_refused():
    model, mask = Shared(), torch.rand(6, 6) < 0.4
    with pytest.raises(ValueError, match=r"'first' and 'rest.second' different masks"):
        sparsify(model, {"first": mask, "rest.second": ~mask}, when="always")


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Conv2d(3, 4, 3)])
def test_a_model_that_is_itself_a_layer(layer):
    mask = torch.rand_like(layer.weight) < 0.4
    sparse = sparsify(layer, {"": mask}, when="always")
    assert isinstance(sparse, SparseLinear | SparseConv2d)
    assert torch.equal(sparse.mask, mask)
    assert choices(sparse).keys() == {""}
    dense = densify(sparse)
    assert type(dense) is type(layer)


def test_copies_of_sparse_models_train_on():
    model = small_net()
    sparsify(model, random_masks(model), (4, 4), "always")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    train(model, optimizer, 2)
    for twin in twins:
        assert choices(twin) == choices(model)
        train(twin, torch.optim.SGD(twin.parameters(), 0.1), 2)
        for one, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(one, other)


# Layers left dense


def test_layers_left_dense_are_masked_all_the_same():
    model = small_net()
    masks = random_masks(model)
    weight = model[4].weight
    sparsify(model, masks, when=lambda *_: False)
    assert prune.is_pruned(model[4])
    assert model[4].weight_orig is weight
    assert [name for name, _ in model[4].named_parameters()] == ["weight_orig", "bias"]
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=0.1)
    train(model, optimizer, 3)
    for name, mask in masks.items():
        assert (dense_state_dict(model)[f"{name}.weight"][~mask] == 0).all()


def test_what_was_left_dense_can_become_sparse_later():
    model = small_net()
    masks = random_masks(model)
    sparsify(model, masks, when=lambda *_: False)
    state = dense_state_dict(model)
    sparsify(model, when="always")
    assert isinstance(model[4], SparseLinear)
    assert choices(model)["4"]["kernel"] == "sparse"
    assert all(torch.equal(value, state[key]) for key, value in dense_state_dict(model).items())


# And back


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("when", ["always", lambda *_: False], ids=["sparse", "dense"])
def test_densify_gives_the_same_bits_with_zeros_where_pruned(block, when):
    model = small_net()
    masks = random_masks(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    sparsify(model, masks, block, when)
    state = dense_state_dict(model)
    assert densify(model) is model
    assert choices(model) == {}
    after = model.state_dict()
    assert list(after) == list(before)
    assert state.keys() == before.keys()
    for key, value in before.items():
        mask = masks.get(key.removesuffix(".weight"))
        expected = value if mask is None else value.where(mask, torch.zeros_like(value))
        for found in (after[key], state[key]):
            assert torch.equal(found, expected), key
            assert torch.equal(found.signbit(), expected.signbit()), key  # no -0


@pytest.mark.parametrize("when", ["always", lambda name, *_: name == "4"], ids=["sparse", "mixed"])
def test_the_dense_state_dict_loads_strictly_into_the_plain_model(when):
    model = sparsify(net := small_net(), random_masks(net), when=when)
    plain = small_net()
    assert plain.load_state_dict(dense_state_dict(model), strict=True)
    x = images()
    torch.testing.assert_close(plain.eval()(x), model.eval()(x))


@pytest.mark.parametrize("block", [(1, 1), (4, 4)])
def test_state_dicts_load_into_models_with_other_blocks_and_plain_ones_too(block):
    model = small_net()
    masks = random_masks(model)
    sparsify(model, masks, "auto", "always")
    other = sparsify(net := small_net(), random_masks(net, 0.8), block, "always")
    other.load_state_dict(model.state_dict())
    for name, mask in masks.items():
        assert torch.equal(other.get_submodule(name).mask, mask)
        assert torch.equal(other.get_submodule(name).weight, model.get_submodule(name).weight)
    other.load_state_dict(plain := small_net().state_dict())
    for name, mask in masks.items():
        assert torch.equal(other.get_submodule(name).weight, plain[f"{name}.weight"] * mask)


# Optimizers


@pytest.mark.parametrize("when", ["always", lambda name, *_: name == "4"], ids=["sparse", "mixed"])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD, torch.optim.RMSprop])
def test_values_take_the_weights_places_in_the_optimizer(kind, when):
    model = small_net()
    options = {"momentum": 0.9} if kind is not torch.optim.Adam else {"amsgrad": True}
    rest = [parameter for name, parameter in model.named_parameters() if not name.startswith("4.")]
    groups = [{"params": rest}, {"params": model[4].parameters(), "lr": 0.02}]
    optimizer = kind(groups, lr=0.01, **options)
    train(model, optimizer, 1)
    before = {key: value.clone() for key, value in optimizer.state[model[4].weight].items() if torch.is_tensor(value)}
    masks = random_masks(model)
    names = [
        [name for held in group["params"] for name, p in model.named_parameters() if p is held]
        for group in optimizer.param_groups
    ]
    sparsify(model, masks, when=when, optimizer=optimizer)
    assert optimizer.param_groups[1]["params"] == [model[4].values, model[4].bias]
    assert optimizer.state.keys() == set(model.parameters())
    for key, value in optimizer.state[model[4].values].items():
        if torch.is_tensor(value) and value.dim():
            assert torch.equal(value, model[4].pattern.pack(before[key]))
        elif torch.is_tensor(value):
            assert torch.equal(value, before[key])
    train(model, optimizer, 2)
    densify(model, optimizer)
    found = [
        [name for held in group["params"] for name, p in model.named_parameters() if p is held]
        for group in optimizer.param_groups
    ]
    assert found == names
    assert optimizer.state.keys() == set(model.parameters())
    for name, mask in masks.items():
        for value in optimizer.state[model.get_submodule(name).weight].values():
            assert not torch.is_tensor(value) or not value.dim() or (value[~mask] == 0).all()


def test_frozen_layers_need_not_be_in_the_optimizer():
    model = small_net()
    model[0].requires_grad_(False)
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad])
    sparsify(model, random_masks(model), when="always", optimizer=optimizer)
    train(model, optimizer, 2)


# Choices


def test_choices_are_plain_data_and_replay_exactly():
    model = small_net()
    masks = random_masks(model)
    sparsify(model, masks, {"4": (4, 4), "0": "auto"}, lambda name, *_: name != "7")
    recorded = json.loads(json.dumps(choices(model)))
    assert recorded["4"] == {"kernel": "sparse", "block": [4, 4], "reason": "asked for: when() gave True"}
    assert recorded["7"]["kernel"] == "dense"
    again = small_net()
    sparsify(again, masks, when=recorded)
    assert choices(again) == choices(model) == recorded
    assert again[4].block == (4, 4)
    assert prune.is_pruned(again[7])


def test_choices_are_copies():
    model = sparsify(nn.Linear(6, 6), {"": torch.ones(6, 6, dtype=torch.bool)}, when="always")
    choices(model)[""]["kernel"] = "changed"
    assert choices(model)[""]["kernel"] == "sparse"
