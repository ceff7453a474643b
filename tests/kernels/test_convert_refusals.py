"""What cannot be converted is named, and nothing is changed."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parametrizations, prune

from lottery_kernels import SparseLinear, densify, sparsify
from tests.kernels.nets import images, random_masks, small_net, snapshot, train

MASK = torch.ones(6, 6, dtype=torch.bool)


class Subclass(nn.Linear):
    pass


def linear(change=lambda layer: None, **options) -> nn.Linear:
    layer = nn.Linear(6, 6, **options)
    change(layer)
    return layer


REFUSED_LAYERS = {
    "another kind": (nn.ReLU, TypeError, "'bad' is a ReLU: only nn.Linear and nn.Conv2d"),
    "a container": (lambda: nn.Sequential(linear()), TypeError, "'bad' is a Sequential"),
    "a subclass": (lambda: Subclass(6, 6), TypeError, r"'bad' is a Subclass \(a subclass may"),
    "sparse already": (lambda: SparseLinear(6, 6), TypeError, "'bad' is sparse already: .* set_mask"),
    "parametrized": (lambda: parametrizations.weight_norm(linear()), TypeError, "'bad' is parametrized"),
    "spectral norm": (lambda: nn.utils.spectral_norm(linear()), TypeError, "'bad'.*SpectralNorm"),
    "gradient hook": (
        lambda: linear(lambda layer: layer.weight.register_hook(torch.clone)),
        ValueError,
        "the weight of 'bad' has gradient hooks",
    ),
    "pruned bias": (
        lambda: prune.random_unstructured(linear(), "bias", 0.5),
        TypeError,
        r"'bad' holds \['bias_mask', 'bias_orig'\] besides weight and bias",
    ),
    "own forward": (
        lambda: linear(lambda layer: setattr(layer, "forward", torch.relu)),
        TypeError,
        r"'bad' holds \['forward'\]",
    ),
    "buffer": (
        lambda: linear(lambda layer: layer.register_buffer("importance", torch.ones(6, 6))),
        TypeError,
        r"'bad' holds \['importance'\]",
    ),
    "complex": (lambda: linear(dtype=torch.complex64), TypeError, "weight of 'bad' is a Parameter of torch.complex64"),
    "another mask": (
        lambda: prune.custom_from_mask(linear(), "weight", torch.zeros(6, 6)),
        ValueError,
        "'bad' is pruned by torch.nn.utils.prune with another mask",
    ),
}


@pytest.mark.parametrize("case", REFUSED_LAYERS)
def test_a_layer_that_cannot_be_converted_is_named_and_nothing_is_changed(case):
    make, error, words = REFUSED_LAYERS[case]
    model = nn.ModuleDict({"good": linear(), "bad": make()})
    before = snapshot(model)
    with pytest.raises(error, match=words):
        sparsify(model, {"good": MASK, "bad": MASK}, when="always")
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("masks", "error", "words"),
    [
        ([MASK], TypeError, "masks must map module names to bool masks, got list"),
        ({"other": MASK}, ValueError, r"masks names 'other', .* its layers are \['good', 'bad'\]"),
        ({"bad": MASK[:5]}, ValueError, r"mask of 'bad' has shape \(5, 6\), its weight \(6, 6\)"),
        ({"bad": MASK.float()}, TypeError, "mask of 'bad' must be a bool tensor.*float32"),
        ({"bad": [1]}, TypeError, "mask of 'bad' must be a bool tensor.*list"),
        ({"bad": MASK.to("meta")}, ValueError, "mask of 'bad' is on the meta device"),
    ],
)
def test_masks_that_do_not_fit_are_named_and_nothing_is_changed(masks, error, words):
    model = nn.ModuleDict({"good": linear(), "bad": linear()})
    before = snapshot(model)
    with pytest.raises(error, match=words):
        sparsify(model, {"good": MASK} | masks if isinstance(masks, dict) else masks, when="always")
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"block": 4}, TypeError, "block must be a pair of integers"),
        ({"block": "largest"}, TypeError, "block must be a pair of integers.*'largest'"),
        ({"block": {"other": (4, 4)}}, ValueError, r"block names \['other'\]"),
        ({"when": "never"}, ValueError, "when must be .*'never'"),
        (
            {"when": {"other": {"kernel": "sparse", "block": [1, 1]}}},
            ValueError,
            r"when records choices for \['other'\]",
        ),
        ({"when": {"good": {"kernel": "fast", "block": [1, 1]}}}, ValueError, "kernel of 'good' must be .*'fast'"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_changed(arguments, error, words):
    model = nn.ModuleDict({"good": linear()})
    before = snapshot(model)
    with pytest.raises(error, match=words):
        sparsify(model, {"good": MASK}, **arguments)
    assert snapshot(model) == before


def test_tied_weights_are_refused():
    model = nn.Sequential(linear(), linear())
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"weight of '0' is tied, 0\.weight and 1\.weight are one Parameter"):
        sparsify(model, {"0": MASK}, when="always")


def test_what_is_no_plain_model_is_refused():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        sparsify("model", {})
    with pytest.raises(TypeError, match="'part' is wrapped in DataParallel: convert the bare model"):
        sparsify(nn.ModuleDict({"part": nn.DataParallel(linear())}), {"part.module": MASK}, when="always")
    with pytest.raises(TypeError, match="'' is a LazyLinear"):
        sparsify(nn.LazyLinear(6), {"": MASK}, when="always")


def test_weight_norm_by_hooks_is_refused():
    with pytest.warns(FutureWarning):
        model = nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 6)))
    with pytest.raises(TypeError, match=r"'0'.*WeightNorm"):
        sparsify(model, {"0": MASK}, when="always")


def test_a_prune_mask_between_zero_and_one_is_refused():
    model = nn.Sequential(nn.Linear(6, 6))
    prune.custom_from_mask(model[0], "weight", torch.full((6, 6), 0.5))
    with pytest.raises(ValueError, match="weight_mask of '0' holds other values than 0 and 1"):
        sparsify(model, when="always")


def test_models_in_ddp_are_refused_wrapped_and_bare():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(6, 6))
        wrapped = nn.parallel.DistributedDataParallel(model)
        with pytest.raises(TypeError, match="model is wrapped in DistributedDataParallel: convert the bare model"):
            sparsify(wrapped, {"module.0": MASK}, when="always")
        with pytest.raises(RuntimeError, match="inside DistributedDataParallel"):
            sparsify(model, {"0": MASK}, when="always")
        with pytest.raises(TypeError, match="model is wrapped"):
            densify(wrapped)
    finally:
        dist.destroy_process_group()


def adafactor(model):
    optimizer = torch.optim.Adafactor(model.parameters())
    train(model, optimizer, 1)
    return optimizer


def lbfgs(model):
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def closure():
        optimizer.zero_grad()
        loss = model(images()).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return optimizer


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda model: torch.optim.Adam(small_net().parameters()), ValueError, "optimizer holds none of the weights"),
        (lambda model: model.parameters(), TypeError, "optimizer must be a torch.optim.Optimizer, got generator"),
        (adafactor, ValueError, "'row_var' of '0'"),
        (lbfgs, ValueError, "state 'd' of '0' has shape"),
    ],
    ids=["another model's", "no optimizer", "factored", "lbfgs"],
)
def test_an_optimizer_that_cannot_be_repointed_leaves_all_as_it_was(make, error, words):
    model = small_net()
    optimizer = make(model)
    before, held = snapshot(model), getattr(optimizer, "param_groups", None)
    parameters = [[*group["params"]] for group in held] if held else None
    with pytest.raises(error, match=words):
        sparsify(model, random_masks(model), when="always", optimizer=optimizer)
    assert snapshot(model) == before
    assert not held or [[*group["params"]] for group in held] == parameters
